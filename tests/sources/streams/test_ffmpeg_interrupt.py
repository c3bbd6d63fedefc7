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
from tests.support.waiting import HANG_S

core: Any = importlib.import_module("av.container.core")


def opening(port: int, before: Callable[[], None] = lambda: None) -> threading.Thread:
    """A thread that opens a stream of a server that says nothing, and would wait for ever."""

    def connect() -> None:
        before()
        with pytest.raises(av.error.FFmpegError):
            av.open(f"rtmp://{LOOPBACK}:{port}/live/x", timeout=(2 * HANG_S, 2 * HANG_S))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    return thread


def assert_ends(thread: threading.Thread) -> None:
    thread.join(HANG_S)
    assert not thread.is_alive()


def test_a_call_in_progress_ends_soon_after_it_was_told_to() -> None:
    stop, is_connected = threading.Event(), threading.Event()
    with raw_server(on_connection=is_connected.set) as port:
        thread = opening(port, before=lambda: interrupt_when(stop))
        assert is_connected.wait(HANG_S)
        assert thread.is_alive()
        stop.set()
        assert_ends(thread)


def test_a_call_that_begins_after_it_was_told_to_ends_at_once() -> None:
    stop = threading.Event()
    stop.set()
    with raw_server() as port:
        assert_ends(opening(port, before=lambda: interrupt_when(stop)))


def test_other_threads_keep_their_time() -> None:
    stop = threading.Event()
    interrupt_when(stop)
    stop.set()
    assert core.time.monotonic() > time.monotonic() + 1e8
    told: list[float] = [time.monotonic()]
    thread = threading.Thread(target=lambda: told.append(core.time.monotonic()))
    thread.start()
    thread.join()
    told.append(time.monotonic())
    assert told == sorted(told)
    assert core.time.sleep is time.sleep
    interrupt_when(threading.Event())
