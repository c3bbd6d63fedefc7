"""Opens Hugging Face folders: ``config.json`` beside ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from adapters.install_advice import missing_package
from adapters.matchers.mast3r.stored_weights import StoredWeights, listed
from engine.errors import ConfigError
from engine.regular_files import read_regular_file

WEIGHTS_NAME: Final = "model.safetensors"
CONFIG_NAME: Final = "config.json"
_MAX_CONFIG_BYTES: Final = 1_000_000
_TYPES = ("F32", "F16", "BF16")


def open_hugging_face(path: Path) -> StoredWeights:
    """Opens a folder, or the ``.safetensors`` file in it.

    Raises:
        ConfigError: a file is missing, cannot be read, or is damaged.
    """
    weights_path = path / WEIGHTS_NAME if path.is_dir() else path
    config_path = weights_path.with_name(CONFIG_NAME)
    for needed in (weights_path, config_path):
        if not needed.is_file():
            there = sorted(entry.name for entry in weights_path.parent.iterdir())
            raise ConfigError(
                f"{path}: expected a Hugging Face folder with {CONFIG_NAME} and {WEIGHTS_NAME},"
                f" found no {needed.name} but {listed(there)}"
            )
    return _open_weights(weights_path, path=path, arguments=_read_config(config_path))


def _open_weights(weights_path: Path, *, path: Path, arguments: dict[str, object]) -> StoredWeights:
    """Maps a file into memory; each tensor that is read is a copy, which outlives the file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise missing_package(
            "MASt3R of a Hugging Face folder", package="safetensors", extra="mast3r"
        ) from error
    num_bytes = _num_bytes(weights_path)
    try:
        file: Any = safe_open(weights_path, framework="pt")  # its methods have no types
    except SafetensorError as error:
        raise ConfigError(f"{weights_path}: expected a whole safetensors file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{weights_path} cannot be read: {error}") from error
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    for name, part in parts.items():
        if part.get_dtype() not in _TYPES:
            raise ConfigError(
                f"{weights_path}: expected numbers of type {', '.join(_TYPES)},"
                f" found {name!r} of type {part.get_dtype()}"
            )

    def read(name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name).clone()
        if _num_bytes(weights_path) != num_bytes:  # the end of a shorter file reads as zeros
            raise ConfigError(f"{weights_path}: expected {num_bytes} bytes, as when it was opened")
        return tensor

    return StoredWeights(
        path=path,
        arguments=arguments,
        shapes={name: tuple(part.get_shape()) for name, part in parts.items()},
        read=read,
    )


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _read_config(path: Path) -> dict[str, object]:
    """The constructor's arguments; JSON's lists are its tuples."""
    try:
        config = json.loads(read_regular_file(path, max_bytes=_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected the network's arguments as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path}: expected the network's arguments by name, found {type(config).__name__}"
        )
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }
