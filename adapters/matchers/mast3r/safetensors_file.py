"""Opens Hugging Face folders: ``config.json`` beside ``model.safetensors``.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: type,
shape and place of every tensor by name) and the numbers, one tensor after the other without gaps
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, NoReturn

import torch
from torch import Tensor

from adapters.matchers.mast3r.stored_weights import StoredWeights, listed
from engine.errors import ConfigError

WEIGHTS_NAME: Final = "model.safetensors"
CONFIG_NAME: Final = "config.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_LENGTH_BYTES = 8
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


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
    arguments = _read_config(config_path)
    entries, data_start = _read_header(weights_path)

    def read(name: str) -> Tensor:
        return _read_tensor(weights_path, entries[name], data_start=data_start)

    return StoredWeights(
        path=path,
        arguments=arguments,
        shapes={name: entry.shape for name, entry in entries.items()},
        read=read,
    )


def _read_config(path: Path) -> dict[str, object]:
    """The constructor's arguments; JSON's lists are its tuples."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected the network's arguments as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path}: expected the network's arguments by name, found {type(config).__name__}"
        )
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """The tensors of a file by name, and where their numbers start."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
                _refuse(path, f"a header of {header_bytes} bytes in a file of {num_bytes}")
            text = file.read(header_bytes)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: expected a safetensors file, found a header that is not one: {error}"
        ) from error
    if not isinstance(header, dict):
        _refuse(path, f"a header that is not a list of tensors but {type(header).__name__}")
    header.pop("__metadata__", None)  # names of aliases, which are known
    entries = [_entry(name, fields, path=path) for name, fields in header.items()]
    data_start = _LENGTH_BYTES + header_bytes
    _check_places(entries, path=path, data_bytes=num_bytes - data_start)
    return {entry.name: entry for entry in entries}, data_start


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return values


def _entry(name: str, fields: object, *, path: Path) -> _Entry:
    match fields:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
        case _:
            _refuse(path, f"no type, shape and place of {name!r}")
    if not all(type(number) is int and number >= 0 for number in numbers):
        _refuse(path, f"sizes of {name!r} that are not whole numbers")
    if kind not in _TYPES:
        _refuse(path, f"{name!r} of type {kind}; known are {', '.join(_TYPES)}")
    dtype = _TYPES[kind]
    if end - begin != prod(shape) * dtype.itemsize:
        _refuse(path, f"{end - begin} bytes for {name!r} of shape {tuple(shape)}")
    return _Entry(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _check_places(entries: list[_Entry], *, path: Path, data_bytes: int) -> None:
    """Tensors must fill the file: one that was cut or has overlapping parts is refused."""
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            _refuse(path, f"{entry.name!r} at byte {entry.begin} of the numbers, not {end}")
        end = entry.end
    if end != data_bytes:
        _refuse(path, f"{data_bytes} bytes of numbers where the header tells of {end}")


def _read_tensor(path: Path, entry: _Entry, *, data_start: int) -> Tensor:
    """Reads straight into the tensor's own memory; a mapped file could change or shrink later."""
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            file.seek(data_start + entry.begin)
            num_read = file.readinto(raw.numpy().data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if num_read != len(raw):
        _refuse(path, f"{num_read} of {len(raw)} bytes of {entry.name!r}")
    return raw.view(entry.dtype).view(entry.shape)


def _refuse(path: Path, found: str) -> NoReturn:
    raise ConfigError(f"{path}: expected a whole safetensors file, found {found}")
