"""Listens for those who push a stream by RTMP, and lets FFmpeg see them one at a time.

FFmpeg takes the first connection that comes and waits for it; whoever connects and says nothing
would keep a drone out. Here connections wait until the first message of RTMP's handshake is there
(C0 and C1 of "Adobe's Real Time Messaging Protocol", section 5.2); who sent it is handed on.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.live.crowding import oldest_of_most_crowded
from adapters.live.quiet_log import QuietLog
from adapters.sources.streams.patience import ready
from adapters.sources.streams.stream_address import place_of_push

if TYPE_CHECKING:
    from adapters.sources.streams.stream_address import StreamAddress
    from engine.config import LiveSourcesConfig

logger = logging.getLogger(__name__)

_VERSION = b"\x03"  # the first byte of RTMP
_HANDSHAKE_BYTES = 1 + 1536
_MAX_WAITING = 16
_MAX_SERVED = 256  # addresses that are remembered
_BACKLOG = 16
_LOOK_AGAIN_S = 0.1
_CHUNK_BYTES = 1 << 16
_LOOPBACK = "127.0.0.1"


@dataclass(slots=True, kw_only=True, eq=False)
class Publisher:
    """A connection that may push a stream."""

    connection: socket.socket
    address: str
    since_s: float  # monotonic
    received: bytearray = field(default_factory=bytearray)

    @property
    def is_ready(self) -> bool:
        """Whether the first message of the handshake is there."""
        return len(self.received) >= _HANDSHAKE_BYTES


EarlyListening = dict[tuple[str, int], socket.socket]  # by host and port, until they are used


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens and does not block.

    Raises:
        OSError: the address cannot be used.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    listening.setblocking(False)
    return listening


@contextmanager
def listening_early(specs: Sequence[str]) -> Iterator[EarlyListening]:
    """Listens where sources wait for a push, before anything else of a run is set up.

    What has not been used is closed in the end. What cannot be used is reported when its source is
    opened.
    """
    early: EarlyListening = {}
    try:
        for place in filter(None, map(place_of_push, specs)):
            with suppress(OSError, UnicodeError):
                early[place] = listen(*place)
        yield early
    finally:
        for listening in early.values():
            listening.close()


class PushListener:
    """The address that others push to. Its methods belong to one thread."""

    def __init__(self, listening: socket.socket, *, label: str, patience_s: float) -> None:
        """Takes a socket that listens, and closes it in the end.

        Args:
            listening: as ``listen`` makes it.
            label: of the source, for the log.
            patience_s: how long a connection may take to begin RTMP's handshake.
        """
        self._listening = listening
        self._label = label
        self._patience_s = patience_s
        self._log = QuietLog(logger)
        self._waiting: list[Publisher] = []  # oldest first
        self._served_at_s: dict[str, float] = {}  # by address

    @classmethod
    def at(
        cls, address: StreamAddress, *, config: LiveSourcesConfig, early: EarlyListening
    ) -> PushListener:
        """Listens at the address of a stream that is pushed, perhaps since before.

        Raises:
            OSError: it cannot be used.
        """
        place = address.host, address.port
        listening = early.pop(place, None) or listen(*place)
        return cls(listening, label=address.label, patience_s=config.read_timeout_s)

    def wait(self, timeout_s: float, *, stop: threading.Event) -> Publisher | None:
        """The next that may push: of several, from the address that was served longest ago.

        Returns:
            None when nobody came in time, or ``stop`` was set.

        Raises:
            OSError: nothing can be accepted any more.
        """
        give_up_at_s = time.monotonic() + timeout_s
        while not stop.is_set():
            self._receive()
            able = [one for one in self._waiting if one.is_ready]
            if able:
                return self._take(min(able, key=self._served_last_s))
            left_s = give_up_at_s - time.monotonic()
            if left_s <= 0.0:
                return None
            sockets = [self._listening, *(one.connection for one in self._waiting)]
            ready(sockets, min(left_s, _LOOK_AGAIN_S))
        return None

    def turn_away(self) -> None:
        """Closes all that wait: a stream has begun."""
        while self._waiting:
            self._waiting.pop().connection.close()

    def close(self) -> None:
        """Listens no more."""
        self.turn_away()
        self._listening.close()

    def _served_last_s(self, publisher: Publisher) -> float:
        return self._served_at_s.get(publisher.address, 0.0)

    def _take(self, publisher: Publisher) -> Publisher:
        self._waiting.remove(publisher)
        if len(self._served_at_s) >= _MAX_SERVED:
            self._served_at_s.pop(min(self._served_at_s, key=self._served_at_s.__getitem__))
        self._served_at_s[publisher.address] = time.monotonic()
        return publisher

    def _receive(self) -> None:
        """Accepts whoever is there, and takes what they have sent."""
        self._accept()
        now_s = time.monotonic()
        for publisher in list(self._waiting):
            if not self._may_stay(publisher, now_s=now_s):
                self._waiting.remove(publisher)
                publisher.connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listening.accept()
            except (BlockingIOError, ConnectionError):
                return
            connection.setblocking(False)
            self._waiting.append(
                Publisher(connection=connection, address=address[0], since_s=time.monotonic())
            )
            if len(self._waiting) > _MAX_WAITING:
                one, crowded = oldest_of_most_crowded([(one, one.address) for one in self._waiting])
                self._log.warn(f"{self._label}: {crowded} connects again and again; one is closed")
                self._waiting.remove(one)
                one.connection.close()

    def _may_stay(self, publisher: Publisher, *, now_s: float) -> bool:
        if publisher.is_ready:
            return not _has_left(publisher.connection)
        try:
            data = publisher.connection.recv(_HANDSHAKE_BYTES - len(publisher.received))
        except BlockingIOError:
            is_late = now_s - publisher.since_s > self._patience_s
            if is_late:
                self._log.warn(f"{self._label}: {publisher.address} connected and pushed no stream")
            return not is_late
        except OSError:
            return False
        publisher.received += data
        if data and not publisher.received.startswith(_VERSION):
            self._log.warn(f"{self._label}: {publisher.address} sent something else than RTMP")
            return False
        return bool(data)


class Relay:
    """Hands a connection on to FFmpeg, which listens on loopback, on a thread of its own."""

    def __init__(self, publisher: Publisher, *, silence_s: float) -> None:
        """Finds a port for FFmpeg to listen at.

        Args:
            publisher: is closed at the end.
            silence_s: how long it may send nothing.
        """
        with socket.socket() as probe:
            probe.bind((_LOOPBACK, 0))
            self.address = f"{_LOOPBACK}:{probe.getsockname()[1]}"
        self._publisher = publisher
        self._silence_s = silence_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rtmp relay", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._publisher.connection as outer, suppress(OSError):
            inner = self._connected()
            if inner is None:
                return
            with inner:
                outer.setblocking(True)
                for connection in (inner, outer):
                    connection.settimeout(self._silence_s)
                inner.sendall(self._publisher.received)
                self._hand_on(outer, inner)

    def _connected(self) -> socket.socket | None:
        """The connection to FFmpeg, as soon as it listens; it does not say when."""
        host, _, port = self.address.partition(":")
        while not self._stop.wait(0.01):
            with suppress(ConnectionRefusedError):
                return socket.create_connection((host, int(port)), timeout=self._silence_s)
        return None

    def _hand_on(self, outer: socket.socket, inner: socket.socket) -> None:
        heard_s = time.monotonic()
        while not self._stop.is_set() and time.monotonic() - heard_s < self._silence_s:
            for one in ready([outer, inner], _LOOK_AGAIN_S):
                data = one.recv(_CHUNK_BYTES)
                if not data:
                    return
                (inner if one is outer else outer).sendall(data)
                if one is outer:
                    heard_s = time.monotonic()


def _has_left(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
