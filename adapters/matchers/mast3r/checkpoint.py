"""Checkpoints of MASt3R: the public ``.pth`` files and Hugging Face folders.

Files are taken from where the user put them; nothing is downloaded. Nothing in them is run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.safetensors_file import open_hugging_face
from adapters.matchers.mast3r.shape_inference import infer_shape
from adapters.matchers.mast3r.stored_weights import StoredWeights, listed
from adapters.matchers.mast3r.torch_file import open_torch_file
from adapters.matchers.mast3r.weights import download_command
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_FIRST_NAME = re.compile(r"(\.scratch)\.layer(\d)_rn\.")
_SECOND_NAME = re.compile(r"(\.scratch)\.layer_rn\.(\d)\.")
_NEVER_USED = "mask_token"
_IS_METRIC = re.compile(r"(?<![a-z])metric(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedCheckpoint:
    """A network ready to use."""

    network: Mast3rNetwork  # in evaluation mode, without gradients
    is_metric: bool  # its points are in metres
    path: Path  # where it was loaded from


def load_checkpoint(path: Path, *, device: str, dtype: torch.dtype) -> LoadedCheckpoint:
    """Loads a ``.pth`` file, a Hugging Face folder, or the ``.safetensors`` file in one.

    Memory peaks near the size of the file (``.pth``) or of the result (``.safetensors``).

    Raises:
        ConfigError: the file is missing, unreadable, damaged, or not of a MASt3R network.
    """
    weights = _open(path)
    with torch.device("meta"):
        network = Mast3rNetwork(infer_shape(weights))
    state = _state_for(network, weights, device=device, dtype=dtype)
    network.load_state_dict(state, assign=True)
    for head in (network.downstream_head1, network.downstream_head2):
        # Convolutions run up to twice as fast with channels last, and tokens lie so already.
        nn.utils.convert_conv2d_weight_memory_format(head.dpt, torch.channels_last)
    logger.info("loaded MASt3R from %s", path)
    return LoadedCheckpoint(
        network=network.eval().requires_grad_(False), is_metric=is_named_metric(path), path=path
    )


def is_named_metric(path: Path) -> bool:
    """Whether a checkpoint's points are in metres: its file or folder is named ``metric``.

    A network that was trained to keep lengths has the same tensors and arguments as one that was
    not; the published one is distinguished by its name alone. In a Hugging Face cache the name is
    that of the folder two above the snapshot.
    """
    names = [path.name, path.absolute().parent.name]
    names += [above.parent.name for above in path.absolute().parents if above.name == "snapshots"]
    return any(_IS_METRIC.search(name) for name in names)


def _open(path: Path) -> StoredWeights:
    try:
        if not path.exists():
            raise ConfigError(
                f"{path} is not there: expected a MASt3R checkpoint, a .pth file or a Hugging Face"
                f" folder. To fetch the public one: {download_command()}"
            )
        if path.is_dir() or path.suffix == ".safetensors":
            return open_hugging_face(path)
        return open_torch_file(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a MASt3R checkpoint, which cannot be read: {error.strerror}"
        ) from error


def _state_for(
    network: Mast3rNetwork, weights: StoredWeights, *, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The network's state; tensors with two names are read and kept once."""
    sizes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    sources = {name: _name_in_file(name, weights.shapes) for name in sizes}
    _check_complete(sizes, sources, weights)
    loaded: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, source in sources.items():
        if source not in weights.shapes:
            state[name] = torch.zeros(sizes[name], dtype=dtype, device=device)
            continue
        if source not in loaded:
            tensor = weights.read(source)
            _check_values(tensor, source, path=weights.path, dtype=dtype)
            loaded[source] = tensor.to(device=device, dtype=dtype)
        state[name] = loaded[source]
    return state


def _name_in_file(name: str, there: Mapping[str, object]) -> str:
    """The name under which a file holds a tensor of the network, or the network's own.

    Some convolutions have two names, of which a file may hold either. Where there is no second
    decoder, as before the training of DUSt3R, it starts as a copy of the first.
    """
    first = _SECOND_NAME.sub(lambda match: f"{match[1]}.layer{int(match[2]) + 1}_rn.", name)
    second = _FIRST_NAME.sub(lambda match: f"{match[1]}.layer_rn.{int(match[2]) - 1}.", first)
    for candidate in (first, second):
        if candidate in there:
            return candidate
    if name.startswith("dec_blocks2.") and not any(
        each.startswith("dec_blocks2.") for each in there
    ):
        return name.replace("dec_blocks2.", "dec_blocks.", 1)
    return name


def _check_complete(
    sizes: Mapping[str, tuple[int, ...]], sources: Mapping[str, str], weights: StoredWeights
) -> None:
    there = weights.shapes
    missing = [
        name for name, source in sources.items() if source not in there and name != _NEVER_USED
    ]
    unexpected = [name for name in there if name not in sizes]
    if missing:
        raise ConfigError(
            f"{weights.path} is not a complete MASt3R checkpoint: expected {len(sizes)} tensors,"
            f" {len(missing)} are missing ({listed(missing)});"
            f" not expected were {listed(unexpected)}"
        )
    for name, source in sources.items():
        if source in there and there[source] != sizes[name]:
            raise ConfigError(
                f"{weights.path}: expected {source!r} of shape {sizes[name]}, found {there[source]}"
            )
    if unexpected:
        logger.debug("%s: not used are %s", weights.path, listed(unexpected))


def _check_values(tensor: Tensor, name: str, *, path: Path, dtype: torch.dtype) -> None:
    least, largest = (value.item() for value in tensor.aminmax())
    limit = torch.finfo(dtype).max
    if not (-limit <= least and largest <= limit):
        raise ConfigError(
            f"{path}: expected numbers that {str(dtype).removeprefix('torch.')} can hold in"
            f" {name!r}, found {least} to {largest}"
        )
