"""Memory that was freed, back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def return_free_memory() -> None:
    """Has the C library give back what it keeps of freed memory; blocks for some milliseconds.

    Copies of the map and the solvers' matrices come and go with every adjustment. Between them
    glibc keeps what they took, scattered over the arenas of several threads: hundreds of megabytes
    in a run of minutes. Does nothing where the C library has no such call.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        call: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return _nothing
    return call


def _nothing(num_bytes_kept: int) -> None:
    del num_bytes_kept
