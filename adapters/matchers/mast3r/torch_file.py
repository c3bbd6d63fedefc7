"""Torch files: ``.pth`` checkpoints of weights and of the arguments of the training.

Nothing in the file is run. Unpickling is torch's restricted one, with the one class added that
holds the arguments.
"""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.matchers.mast3r.model_string import parse_model_string
from adapters.matchers.mast3r.stored_weights import (
    DAMAGES,
    StoredWeights,
    first_bytes,
    listed,
)
from engine.errors import ConfigError

_ZIP_MAGIC = b"PK\x03\x04"


def open_torch_file(path: Path) -> StoredWeights:
    """Reads the archive into memory; optimizer states and the like are dropped.

    Raises:
        ConfigError: it cannot be read, or is not a checkpoint of MASt3R.
    """
    contents = _contents(path)
    if "dune_backbone_name" in contents:
        raise ConfigError(
            f"{path} is a DUNE variant of MASt3R, whose encoder is another network;"
            " expected a MASt3R checkpoint with its own encoder"
        )
    for key in ("args", "model"):
        if key not in contents:
            raise ConfigError(
                f"{path} is not a MASt3R checkpoint: expected the entries 'args' and 'model',"
                f" found {listed([str(name) for name in contents])}"
            )
    text = getattr(contents["args"], "model", None)
    if not isinstance(text, str):
        raise ConfigError(
            f"{path} is not a MASt3R checkpoint: expected the network's construction as text in"
            f" its entry 'args', found {type(contents['args']).__name__}"
        )
    tensors = _tensors(contents["model"], path=path)
    try:
        arguments = parse_model_string(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return StoredWeights(
        path=path,
        arguments=arguments,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        read=tensors.pop,
    )


def _contents(path: Path) -> dict[Any, Any]:
    expected = "expected a checkpoint written by torch.save (a zip archive)"
    try:
        beginning = first_bytes(path)
        if not beginning.startswith(_ZIP_MAGIC):
            raise ConfigError(f"{path}: {expected}, found a file that begins with {beginning!r}")
        with torch.serialization.safe_globals([Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGES, OSError) as error:
        raise ConfigError(f"{path}: {expected}, found {_reason(error)}") from error
    if not isinstance(contents, dict):
        raise ConfigError(
            f"{path} is not a MASt3R checkpoint: expected a dictionary with the entries 'args' and"
            f" 'model', found {type(contents).__name__}"
        )
    return contents


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # torch's own message advises to unpickle freely, which is what must not be done.
    forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and forbidden:
        return f"one that asks for {forbidden[1]}, which weights do not need"
    lines = str(error).strip().splitlines()
    return f"a damaged or foreign one ({lines[0] if lines else type(error).__name__})"


def _tensors(model: object, *, path: Path) -> dict[str, Tensor]:
    if not isinstance(model, dict) or not model:
        raise ConfigError(
            f"{path} is not a MASt3R checkpoint: expected tensors by name in its entry 'model',"
            f" found {type(model).__name__}"
        )
    for name, tensor in model.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and _is_plain(tensor)):
            raise ConfigError(
                f"{path} is not a MASt3R checkpoint: expected a plain tensor of floating-point"
                f" numbers as {name!r}, found {_kind(tensor)}"
            )
    return {name: tensor.detach() for name, tensor in model.items()}


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        # A view that repeats a few numbers could claim any size.
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one of {value.dtype} on {value.device}"
    return type(value).__name__
