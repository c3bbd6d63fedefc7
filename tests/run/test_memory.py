"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes

import psutil
import pytest
from engine.run.memory import return_free_memory


def test_memory_that_was_freed_is_the_system_s_again() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    process = psutil.Process()
    kept = []
    # Pieces below the size that is mapped by itself, with some between them that stay.
    pieces = [bytearray(60_000) for _ in range(2000)]
    kept = pieces[::50]
    held = process.memory_info().rss
    del pieces
    return_free_memory()
    assert process.memory_info().rss < held - 60_000_000
    assert len(kept) == 40


def test_without_such_a_call_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.run import memory

    memory._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    return_free_memory()
    assert memory._trim() is memory._nothing
    memory._trim.cache_clear()
