"""FFmpeg's calls that nobody waits for any more."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

import av
import pytest

from adapters.sources.streams.ffmpeg_interrupt import interrupt_when
from tests.support.stream_servers import LOOPBACK, raw_server

TIMEOUT_S = 5.0
core: Any = importlib.import_module("av.container.core")


def seconds_to_open(port: int, before: Callable[[], None] = lambda: None) -> float:
    """How long a server that says nothing is waited for, on a thread of its own."""
    took_s: list[float] = []

    def connect() -> None:
        before()
        started_s = time.monotonic()
        with pytest.raises(av.error.FFmpegError):
            av.open(f"rtmp://{LOOPBACK}:{port}/live/x", timeout=(TIMEOUT_S, TIMEOUT_S))
        took_s.append(time.monotonic() - started_s)

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join(2 * TIMEOUT_S)
    return took_s[0]


def test_a_call_in_progress_ends_soon_after_it_was_told_to() -> None:
    stop = threading.Event()
    with raw_server() as port:
        timer = threading.Timer(0.3, stop.set)
        timer.start()
        took_s = seconds_to_open(port, before=lambda: interrupt_when(stop))
        timer.join()
    assert 0.25 < took_s < 1.0


def test_a_call_that_begins_after_it_was_told_to_ends_at_once() -> None:
    stop = threading.Event()
    stop.set()
    with raw_server() as port:
        assert seconds_to_open(port, before=lambda: interrupt_when(stop)) < 0.5


def test_other_threads_keep_their_time() -> None:
    stop = threading.Event()
    interrupt_when(stop)
    stop.set()
    assert core.time.monotonic() > time.monotonic() + 1e8
    told: list[float] = []
    thread = threading.Thread(target=lambda: told.append(core.time.monotonic()))
    thread.start()
    thread.join()
    assert told[0] == pytest.approx(time.monotonic(), abs=1.0)
    assert core.time.sleep is time.sleep
    interrupt_when(threading.Event())
