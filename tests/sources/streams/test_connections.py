"""Connections to hosts of several addresses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from adapters.sources.streams.connections import connected
from adapters.sources.streams.patience import OutOfPatienceError, Patience
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.network

SILENT, ANSWERING = "127.0.0.2", "127.0.0.1"


@contextmanager
def silent_and_answering() -> Iterator[int]:
    """A port that one address never answers, because its queue is full, and another does."""
    with ExitStack() as opened:
        silent = opened.enter_context(socket.socket())
        silent.bind((SILENT, 0))
        silent.listen(0)
        port = int(silent.getsockname()[1])
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((SILENT, port))
        opened.enter_context(socket.create_server((ANSWERING, port)))
        yield port


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    look_up = socket.getaddrinfo

    def all_of(_: object, port: int, **kind: Any) -> list[Any]:
        return [place for address in addresses for place in look_up(address, port, **kind)]

    monkeypatch.setattr(socket, "getaddrinfo", all_of)


def test_an_address_that_says_nothing_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve_to(monkeypatch, SILENT, ANSWERING)
    monkeypatch.setattr(Patience, "left_s", 0.2)  # of which the first has its share
    patience = Patience(threading.Event(), silence_s=HANG_S)
    with silent_and_answering() as port, connected("camera.test", port, patience) as connection:
        assert connection.getpeername()[0] == ANSWERING


def test_what_is_left_is_the_limit_or_else_the_silence_that_is_allowed() -> None:
    patience = Patience(threading.Event(), silence_s=HANG_S)
    assert patience.left_s == HANG_S
    patience.limit(1.0, too_late="too late")
    assert patience.left_s <= 1.0
    patience.limit(3 * HANG_S, too_late="too late")
    assert 2 * HANG_S < patience.left_s <= 3 * HANG_S
    patience.unlimit()
    assert patience.left_s == HANG_S


def test_the_last_address_has_all_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, SILENT, SILENT)
    patience = Patience(threading.Event(), silence_s=HANG_S)
    patience.limit(0.2, too_late="too late")
    with silent_and_answering() as port, pytest.raises(OutOfPatienceError, match="too late"):
        connected("camera.test", port, patience)


def test_what_is_no_longer_wanted_tries_no_further_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve_to(monkeypatch, SILENT, ANSWERING)
    stop = threading.Event()
    stop.set()
    patience = Patience(stop, silence_s=HANG_S)
    with silent_and_answering() as port, pytest.raises(OutOfPatienceError, match="stopped"):
        connected("camera.test", port, patience)
