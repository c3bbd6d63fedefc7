"""Upstream MASt3R: the network's interface run by its authors' code, where a user has it.

Their code is licensed CC BY-NC-SA 4.0, for non-commercial use, is no package of an index, and is
not part of this project. It is used as installed, or from a checkout with its submodules.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from adapters.install_advice import how_to_install_packages
from adapters.matchers.mast3r.architecture import VIT_LARGE, Grid, NetworkShape
from adapters.matchers.mast3r.checkpoint import load_checkpoint
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.stored_weights import listed
from engine.errors import ConfigError, InferenceError

logger = logging.getLogger(__name__)

_HOW_TO_GET = (
    "get it with 'git clone --recursive https://github.com/naver/mast3r' and name that folder"
    " (its licence, CC BY-NC-SA 4.0, allows non-commercial use only)"
)
_FILES_OF_CHECKOUT = ("mast3r/model.py", "dust3r/dust3r/model.py", "dust3r/croco/models/croco.py")
_PACKAGES_OF_CHECKOUT = {"mast3r": "mast3r", "dust3r": "dust3r/dust3r"}
_OWN_PACKAGES = {"mast3r", "dust3r", "croco", "models"}
_DEPENDENCIES = ("einops", "huggingface_hub", "packaging", "scipy", "tqdm")
_INSTALLED_AS = {"cv2": "opencv-python-headless", "PIL": "pillow", "skimage": "scikit-image"}
_MIN_DECODER_DEPTH: Final = 10  # upstream asserts it


class UpstreamNetwork:
    """Upstream's model behind the interface of `Mast3rNetwork`, in float32."""

    def __init__(self, model: Any, shape: NetworkShape) -> None:
        self.shape = shape
        self._model = model

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which the network runs."""
        return torch.float32

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB from -1 to 1, to tokens (B, N, encoder_dim).

        Raises:
            InferenceError: an edge of the images is not made of whole patches.
        """
        height, width = images.shape[-2:]
        self.shape.grid_of(height=height, width=width)  # refuses what upstream would only assert
        true_shape = torch.tensor([[height, width]] * len(images), device=images.device)
        tokens: Tensor = self._model._encode_image(images.float(), true_shape)[0]
        return tokens

    @torch.no_grad()
    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        """Tokens of two encoded views, (B, N1, encoder_dim) and (B, N2, encoder_dim), to outputs.

        Grids are rows and columns of tokens, and may differ. Upstream computes points in any case.

        Raises:
            InferenceError: the tokens do not fill their grid, or views are not as many.
        """
        positions1 = _positions(tokens1, grid1, num_images=len(tokens1))
        positions2 = _positions(tokens2, grid2, num_images=len(tokens1))
        layers1, layers2 = self._model._decoder(
            tokens1.float(), positions1, tokens2.float(), positions2
        )
        return (
            self._head(1, layers1, grid=grid1, with_points=with_points),
            self._head(2, layers2, grid=grid2, with_points=with_points),
        )

    def _head(
        self, number: int, layers: Iterable[Tensor], *, grid: Grid, with_points: bool
    ) -> ViewOutput:
        in_full = [layer.float() for layer in layers]
        size = [edge * self.shape.patch_size for edge in grid]
        device = in_full[0].device
        true_shape = torch.tensor([size] * len(in_full[0]), device=device)
        with torch.autocast(device.type, enabled=False):
            output = self._model._downstream_head(number, in_full, true_shape)
        return ViewOutput(
            descriptors=output["desc"],
            descriptor_confidence=output["desc_conf"],
            points3D=output["pts3d"] if with_points else None,
            confidence=output["conf"] if with_points else None,
        )


def load_upstream(checkpoint: Path, *, root: Path | None, device: str) -> UpstreamNetwork:
    """Loads a checkpoint, by this project's safe means, into upstream's model.

    Args:
        checkpoint: a ``.pth`` file or a Hugging Face folder, as `load_checkpoint` takes it.
        root: the folder of a checkout; None for an installed package ``mast3r``.
        device: where the network runs.

    Raises:
        ConfigError: upstream's code or something it needs is missing, or the checkpoint cannot be
            read or does not fit upstream's model.
    """
    loaded = load_checkpoint(checkpoint, device="cpu", dtype=torch.float32).network
    return build_upstream(loaded.shape, loaded.state_dict(), root=root, device=device)


def build_upstream(
    shape: NetworkShape, state: Mapping[str, Tensor], *, root: Path | None, device: str
) -> UpstreamNetwork:
    """Makes upstream's model with given weights, by their names in the public checkpoints.

    Raises:
        ConfigError: upstream's code or something it needs is missing, or there is no upstream model
            of such a shape or with such weights.
    """
    arguments = _constructor_arguments(shape)
    module = import_upstream(root)
    # Without memory, as random weights of ViT-L take 3 GB and ten seconds to make.
    with _stdout_logged(), torch.device("meta"):
        model = module.AsymmetricMASt3R(**arguments)
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # sizes differ
        raise ConfigError(f"the weights do not fit upstream's MASt3R model: {error}") from error
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise ConfigError(f"upstream's MASt3R model needs more weights, {listed(missing)}")
    return UpstreamNetwork(model.to(device).eval().requires_grad_(False), shape)


def import_upstream(root: Path | None) -> ModuleType:
    """Imports upstream's ``mast3r.model`` and leaves no other trace.

    Upstream puts folders on the search path, binds the global name ``models``, switches TF32 on and
    prints. All of that is undone; the imported modules go on working.

    Args:
        root: the folder of a checkout; None for an installed package ``mast3r``.

    Raises:
        ConfigError: a file or a package is missing, or other packages are in the way.
    """
    if root is None:
        if importlib.util.find_spec("mast3r") is None:
            raise ConfigError(f"upstream's package mast3r is not installed; {_HOW_TO_GET}")
    else:
        root = root.expanduser().resolve()
        _check_checkout(root)
        _refuse_others(root)
    known, search_path = set(sys.modules), list(sys.path)
    allows_tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        if root is not None:
            sys.path.insert(0, str(root))
        with _stdout_logged():
            return importlib.import_module("mast3r.model")
    except ImportError as error:
        _forget(set(sys.modules) - known, packages=_OWN_PACKAGES)
        raise _not_importable(error) from error
    finally:
        sys.path[:] = search_path
        torch.backends.cuda.matmul.allow_tf32 = allows_tf32
        _forget(set(sys.modules) - known, packages={"models"})


def _check_checkout(root: Path) -> None:
    for name in _FILES_OF_CHECKOUT:
        if not (root / name).is_file():
            raise ConfigError(
                f"{root} is no checkout of upstream's MASt3R with its submodules: {root / name} is"
                f" missing; {_HOW_TO_GET}"
            )


def _refuse_others(root: Path) -> None:
    """Refuses what would be imported instead of the files of a checkout."""
    for package, folder in _PACKAGES_OF_CHECKOUT.items():
        loaded = sys.modules.get(package)
        if loaded is not None and _folder_of(loaded) != root / folder:
            raise ConfigError(
                f"another package {package} is loaded, from {_folder_of(loaded)}; upstream's MASt3R"
                f" cannot be loaded from {root} beside it"
            )
    if "mast3r.model" in sys.modules:
        return
    # Upstream's folder `models` is no regular package, so any other of that name would win.
    if "models" in sys.modules:
        where = _folder_of(sys.modules["models"])
    else:
        found = importlib.util.find_spec("models")
        where = Path(found.origin) if found and found.origin else None
        if where is None:
            return
    raise ConfigError(
        f"another package models, {where}, hides the one in {root / 'dust3r/croco'}; take it off"
        " the Python path to use upstream's MASt3R"
    )


def _folder_of(module: ModuleType) -> Path | None:
    folders = list(getattr(module, "__path__", ()))
    return Path(folders[0]).resolve() if folders else None


def _forget(names: Iterable[str], *, packages: set[str]) -> None:
    """Takes modules of some packages out of the interpreter's list."""
    for name in names:
        if name.partition(".")[0] in packages:
            sys.modules.pop(name, None)


def _not_importable(error: ImportError) -> ConfigError:
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in _OWN_PACKAGES:
        return ConfigError(f"upstream's MASt3R cannot be imported: {error}")
    others = {name for name in _DEPENDENCIES if importlib.util.find_spec(name) is None}
    missing = sorted({package, *others})
    command = how_to_install_packages(*(_INSTALLED_AS.get(name, name) for name in missing))
    return ConfigError(f"upstream's MASt3R needs packages that are not installed: {command}")


@contextlib.contextmanager
def _stdout_logged() -> Iterator[None]:
    """Sends what is printed to the log."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            logger.debug("Upstream says: %s", line)


def _constructor_arguments(shape: NetworkShape) -> dict[str, Any]:
    """Arguments of upstream's model class.

    Raises:
        ConfigError: upstream has no model of such a shape.
    """
    for name in ("dpt_layer_dims", "dpt_feature_dim", "dpt_last_dim"):
        if getattr(shape, name) != getattr(VIT_LARGE, name):
            raise ConfigError(
                f"upstream's MASt3R has no heads of {name} {getattr(shape, name)}, only"
                f" {getattr(VIT_LARGE, name)}"
            )
    if shape.decoder_depth < _MIN_DECODER_DEPTH:
        raise ConfigError(
            f"upstream's MASt3R has at least {_MIN_DECODER_DEPTH} decoder blocks, not"
            f" {shape.decoder_depth}"
        )
    return {
        "img_size": (shape.image_edge_px, shape.image_edge_px),
        "patch_size": shape.patch_size,
        "patch_embed_cls": "PatchEmbedDust3R",
        "landscape_only": False,
        "pos_embed": f"RoPE{shape.rope_base:g}",
        "mlp_ratio": shape.mlp_ratio,
        "enc_embed_dim": shape.encoder_dim,
        "enc_depth": shape.encoder_depth,
        "enc_num_heads": shape.encoder_heads,
        "dec_embed_dim": shape.decoder_dim,
        "dec_depth": shape.decoder_depth,
        "dec_num_heads": shape.decoder_heads,
        "head_type": "catmlp+dpt",
        "output_mode": f"pts3d+desc{shape.descriptor_dim}",
        "depth_mode": ("exp", -inf, inf),
        "conf_mode": ("exp", *shape.confidence_range),
        "two_confs": shape.two_confs,
        "desc_conf_mode": ("exp", *shape.descriptor_confidence_range),
    }


def _positions(tokens: Tensor, grid: Grid, *, num_images: int) -> Tensor:
    """Row and column of every token, (B, N, 2) int64.

    Raises:
        InferenceError: the tokens do not fill the grid, or are not those of so many images.
    """
    rows, columns = grid
    if tokens.shape[:2] != (num_images, rows * columns):
        raise InferenceError(
            f"tokens {tuple(tokens.shape[:2])} do not fill {num_images} grids of {rows} x {columns}"
        )
    along = [torch.arange(edge, device=tokens.device) for edge in grid]
    return torch.cartesian_prod(*along).expand(num_images, -1, -1).contiguous()
