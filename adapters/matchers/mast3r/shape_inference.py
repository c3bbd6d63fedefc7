"""Shape inference: a network's architecture from its tensors and its constructor's arguments.

Widths and depths are the tensors'; arguments that say otherwise are refused. Numbers of heads,
positions and ranges leave no trace in tensors and are the arguments'.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from adapters.matchers.mast3r.architecture import NetworkShape, ValueRange
from adapters.matchers.mast3r.stored_weights import StoredWeights, listed
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_DPT = "downstream_head1.dpt."
# The values of arguments that are built here.
_REQUIRED_VALUES: Mapping[str, tuple[object, ...]] = {
    "head_type": ("catmlp+dpt",),
    "patch_embed_cls": ("ManyAR_PatchEmbed", "PatchEmbedDust3R"),
    "depth_mode": (("exp", -float("inf"), float("inf")),),
    "desc_mode": ("norm", ("norm",)),
    "norm_im2_in_dec": (True,),
}
_OPTIONAL = {"patch_embed_cls", "desc_mode", "norm_im2_in_dec"}
_WITHOUT_EFFECT = {"freeze", "landscape_only"}
_READ = {
    "pos_embed",
    "output_mode",
    "img_size",
    "enc_num_heads",
    "dec_num_heads",
    "two_confs",
    "conf_mode",
    "desc_conf_mode",
}


def infer_shape(weights: StoredWeights) -> NetworkShape:
    """The shape of the network that a checkpoint is of.

    Raises:
        ConfigError: it is another kind of network, or arguments and tensors disagree.
    """
    arguments = _Arguments(weights)
    arguments.check_fixed()
    dims = _Dimensions(weights)
    encoder_dim = dims.of("patch_embed.proj.weight", 0)
    two_confs = arguments.flag("two_confs", default=False)
    confidence_range = arguments.exponential_range("conf_mode")
    shape = NetworkShape(
        encoder_dim=encoder_dim,
        encoder_depth=dims.num_blocks("enc_blocks"),
        encoder_heads=arguments.whole("enc_num_heads"),
        decoder_dim=dims.of("decoder_embed.weight", 0),
        decoder_depth=dims.num_blocks("dec_blocks"),
        decoder_heads=arguments.whole("dec_num_heads"),
        descriptor_dim=int(arguments.matching("output_mode", r"pts3d\+desc(\d{1,4})")),
        image_edge_px=arguments.image_edge_px(),
        patch_size=dims.of("patch_embed.proj.weight", 3),
        mlp_ratio=dims.of("enc_blocks.0.mlp.fc1.weight", 0) // encoder_dim,
        dpt_layer_dims=(
            dims.of(f"{_DPT}act_postprocess.0.0.weight", 0),
            dims.of(f"{_DPT}act_postprocess.1.0.weight", 0),
            dims.of(f"{_DPT}act_postprocess.2.0.weight", 0),
            dims.of(f"{_DPT}act_postprocess.3.0.weight", 0),
        ),
        dpt_feature_dim=dims.of(f"{_DPT}head.0.weight", 1),
        dpt_last_dim=dims.of(f"{_DPT}head.0.weight", 0),
        two_confs=two_confs,
        confidence_range=confidence_range,
        descriptor_confidence_range=(
            arguments.exponential_range("desc_conf_mode") if two_confs else confidence_range
        ),
        rope_base=float(arguments.matching("pos_embed", r"RoPE(\d{1,6}(?:\.\d{1,6})?)")),
    )
    arguments.check_dimensions(shape)
    return shape


class _Dimensions:
    """Sizes of tensors."""

    def __init__(self, weights: StoredWeights) -> None:
        self._weights = weights

    def of(self, name: str, axis: int) -> int:
        shape = self._weights.shapes.get(name)
        if shape is None:
            raise ConfigError(
                f"{self._weights.path} is not a MASt3R checkpoint: expected a tensor {name!r},"
                f" found {listed(self._weights.shapes)}"
            )
        if axis >= len(shape) or not shape[axis]:
            raise ConfigError(
                f"{self._weights.path}: expected a size in axis {axis} of {name!r},"
                f" found the shape {shape}"
            )
        return shape[axis]

    def num_blocks(self, stack: str) -> int:
        """One more than the highest number of a block: tensors of lower ones must be there."""
        pattern = re.compile(rf"{stack}\.(\d{{1,3}})\.")
        found = [match for name in self._weights.shapes if (match := pattern.match(name))]
        return max((int(match[1]) + 1 for match in found), default=0)


class _Arguments:
    """The constructor's arguments, each read as what it must be."""

    def __init__(self, weights: StoredWeights) -> None:
        self._path = weights.path
        self._values = weights.arguments

    def check_fixed(self) -> None:
        """Refuses kinds of networks that are not built here."""
        for name, known in _REQUIRED_VALUES.items():
            if name not in self._values and name in _OPTIONAL:
                continue
            value = self._values.get(name)
            if value not in known:
                raise self._refusal(name, " or ".join(repr(each) for each in known))

    def check_dimensions(self, shape: NetworkShape) -> None:
        """Refuses arguments that contradict the tensors; logs those that are not known."""
        dimensions = {
            "enc_embed_dim": shape.encoder_dim,
            "enc_depth": shape.encoder_depth,
            "dec_embed_dim": shape.decoder_dim,
            "dec_depth": shape.decoder_depth,
            "patch_size": shape.patch_size,
            "mlp_ratio": shape.mlp_ratio,
        }
        for name, found in dimensions.items():
            if self._values.get(name, found) != found:
                raise self._refusal(name, f"{found}, as its tensors have it")
        known = {*dimensions, *_REQUIRED_VALUES, *_WITHOUT_EFFECT, *_READ}
        unknown = [name for name in self._values if name not in known]
        if unknown:
            logger.warning("%s: arguments %s are not known, ignored", self._path, listed(unknown))

    def matching(self, name: str, pattern: str) -> str:
        """The number in a text argument."""
        value = self._values.get(name)
        match = re.fullmatch(pattern, value, re.ASCII) if isinstance(value, str) else None
        if match is None:
            raise self._refusal(name, f"text like {pattern}")
        return match[1]

    def whole(self, name: str) -> int:
        value = self._values.get(name)
        if type(value) is not int or value < 1:
            raise self._refusal(name, "a whole number")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self._refusal(name, "True or False")
        return value

    def image_edge_px(self) -> int:
        """The longer edge of ``img_size``, which is one number or two."""
        value = self._values.get("img_size")
        edges = value if isinstance(value, tuple) else (value,)
        sizes = [edge for edge in edges if type(edge) is int and edge > 0]
        if not sizes or len(sizes) != len(edges):
            raise self._refusal("img_size", "a size in px")
        return max(sizes)

    def exponential_range(self, name: str) -> ValueRange:
        match self._values.get(name):
            case ("exp", int() | float() as least, int() | float() as largest) if least < largest:
                return float(least), float(largest)
        raise self._refusal(name, "('exp', least, largest)")

    def _refusal(self, name: str, expected: str) -> ConfigError:
        found = repr(self._values[name]) if name in self._values else "nothing"
        return ConfigError(
            f"{self._path}: expected the argument {name} to be {expected}, found {found}"
        )
