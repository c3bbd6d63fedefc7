"""Waiting for sockets, however many files a process has open."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from adapters.sources.streams.patience import OutOfPatienceError, Patience, ready
from adapters.sources.streams.push_listener import PushListener, listen
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.network

LOOPBACK = "127.0.0.1"


@pytest.fixture
def _many_files() -> Iterator[None]:
    """What is opened from here on has a number beyond those that select takes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limits[1] < 2048:
        pytest.skip("no process may have so many files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while files[-1] < 1024:
            files.append(os.dup(files[0]))
        yield
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("_many_files")
def test_sockets_are_waited_for_beyond_a_thousand_open_files() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        patience = Patience(threading.Event(), silence_s=HANG_S)
        assert patience.wait_for(ours, to_write=True)
        assert not patience.wait_for(ours, at_most_s=0.0)
        theirs.sendall(b"a")
        assert patience.wait_for(ours.fileno())
        assert ready([theirs, ours], HANG_S) == [ours]


@pytest.mark.usefixtures("_many_files")
def test_a_push_is_waited_for_beyond_a_thousand_open_files() -> None:
    listening = listen(LOOPBACK, 0)
    listener = PushListener(listening, label="rtmp", patience_s=HANG_S)
    with socket.create_connection(listening.getsockname()) as pushing:
        assert listener.wait(0.01, stop=threading.Event()) is None
        pushing.sendall(b"\x03" + bytes(1536))
        publisher = listener.wait(HANG_S, stop=threading.Event())
    assert publisher is not None
    publisher.connection.close()
    listener.close()


def test_a_connection_that_the_other_side_ended_is_waited_for_no_longer() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert ready([ours], HANG_S) == [ours]
        assert ready([ours], HANG_S, to_write=True) == [ours]


def test_what_is_no_longer_wanted_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()
    stop.set()
    with ours, theirs, pytest.raises(OutOfPatienceError, match="stopped"):
        Patience(stop, silence_s=HANG_S).wait_for(ours)
