"""Stored weights: arguments, names and shapes of a checkpoint, and its tensors one at a time."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.regular_files import regular_file_size

# What reading a file that is cut, damaged or of another kind raises: a broken pickle is a broken
# program, and fails wherever it happens to.
DAMAGES = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredWeights:
    """An opened checkpoint whose tensors are read one by one, so that memory is needed once."""

    path: Path
    arguments: Mapping[str, object]  # of the network's constructor
    shapes: Mapping[str, tuple[int, ...]]  # by name
    read: Callable[[str], Tensor]  # on the CPU, as stored; each name may be read once


def first_bytes(path: Path) -> bytes:
    """The first bytes of a file, to detect its format.

    Raises:
        OSError: it cannot be read.
    """
    regular_file_size(path)
    with path.open("rb") as file:
        return file.read(24)


def listed(names: Collection[str], *, limit: int = 4) -> str:
    """The first few of some names, and how many more there are."""
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown or "nothing"
