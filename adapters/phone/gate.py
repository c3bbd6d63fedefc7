"""Connections to the page: accepted as long as there is room, silent ones thrown out for others."""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
import socket
import ssl
from typing import TYPE_CHECKING, TypeAlias

from adapters.live.crowding import oldest_of_most_crowded
from adapters.live.quiet_log import QuietLog

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 64
_SHARE_OF_DESCRIPTORS = 4  # a quarter of what the process may open; the run needs the rest
_BACKLOG = 128  # that the system holds until they are accepted
_PAUSE_S = 1.0  # after the process ran out of descriptors


Guest: TypeAlias = "asyncio.Task[None] | web.RequestHandler"  # in its handshake, or after it


class Gate:
    """Accepts connections of devices, on the event loop that it is started on.

    A connection is a guest's until a request of an admitted device came over it. When there are
    as many connections as there may be, a newcomer takes the place of the oldest guest from the
    address that most guests are from, so that nobody keeps the others out; without guests it is
    turned away.
    """

    def __init__(
        self,
        *,
        context: ssl.SSLContext,
        handshake_timeout_s: float,
        silence_s: float,
        server: web.Server,
        label: str,
    ) -> None:
        """Prepares; nothing is accepted yet.

        Args:
            context: of TLS.
            handshake_timeout_s: how long a TLS handshake may last.
            silence_s: how long until the first request.
            server: makes the handler of each connection, and knows which are open.
            label: of the source, for the log.
        """
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s
        self._silence_s = silence_s
        self._server = server
        self._log = QuietLog(logger)
        self._label = label
        self._listening: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._handshakes: dict[asyncio.Task[None], str] = {}  # by address, oldest first
        self._guests: dict[web.RequestHandler, str] = {}  # likewise
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}  # without a request so far

    @property
    def max_connections(self) -> int:
        """Connections at the same time."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        share = limit // _SHARE_OF_DESCRIPTORS if limit > 0 else _MAX_CONNECTIONS
        return max(1, min(_MAX_CONNECTIONS, share))

    @property
    def num_connections(self) -> int:
        """Open connections, those in their handshake among them."""
        return len(self._handshakes) + len(self._server.connections)

    async def open(self, host: str, port: int) -> None:
        """Begins to accept at every address of a host.

        Raises:
            OSError: an address cannot be used.
        """
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(infos):
            listening = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
            listening.setblocking(False)
            self._listening.append(listening)
        for listening in self._listening:
            accepting = asyncio.create_task(self._accept(listening), name=f"accept {self._label}")
            self._accepting.append(accepting)

    async def close(self) -> None:
        """Accepts nothing more and breaks off what is in its handshake; connections stay."""
        tasks = [*self._accepting, *self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listening in self._listening:
            listening.close()
        for waiting in self._silent.values():
            waiting.cancel()

    def heard(self, connection: web.RequestHandler) -> None:
        """A request came over a connection."""
        waiting = self._silent.pop(connection, None)
        if waiting is not None:
            waiting.cancel()

    def admit(self, connection: web.RequestHandler) -> None:
        """A request of an admitted device came over a connection."""
        self._guests.pop(connection, None)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listening)
            except ConnectionError:  # it has gone already
                continue
            except OSError as error:
                self._log.warn(f"{self._label}: no connection can be accepted: {error.strerror}")
                await asyncio.sleep(_PAUSE_S)
                continue
            if not self._has_room():
                self._log.warn(f"{self._label}: a device was turned away: too many connections")
                accepted.close()
                continue
            task = asyncio.create_task(self._shake_hands(accepted, address[0]), name="handshake")
            self._handshakes[task] = address[0]
            task.add_done_callback(functools.partial(self._handshake_ended, accepted))

    def _handshake_ended(self, accepted: socket.socket, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)
        if task.cancelled():
            accepted.close()  # it may not even have begun

    def _has_room(self) -> bool:
        """Whether there is room for another connection; makes it where guests are there."""
        if self.num_connections < self.max_connections:
            return True
        here = set(self._server.connections)
        self._guests = {one: address for one, address in self._guests.items() if one in here}
        guests: list[tuple[Guest, str]] = [*self._handshakes.items(), *self._guests.items()]
        if not guests:
            return False
        oldest, crowded = oldest_of_most_crowded(guests)
        self._log.warn(
            f"{self._label}: all {self.max_connections} connections are taken, most from {crowded};"
            " its oldest that sent no cookie is closed"
        )
        if isinstance(oldest, asyncio.Task):
            oldest.cancel()
            self._handshakes.pop(oldest)
        else:
            self._drop(oldest)
        return True

    async def _shake_hands(self, accepted: socket.socket, address: str) -> None:
        connection = self._server()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._handshake_timeout_s,
            )
        except OSError:  # of the network, of TLS, or too slow
            return
        self._guests[connection] = address
        self._silent[connection] = asyncio.get_running_loop().call_later(
            self._silence_s, self._drop_silent, connection
        )

    def _drop_silent(self, connection: web.RequestHandler) -> None:
        self._silent.pop(connection, None)
        self._drop(connection)

    def _drop(self, connection: web.RequestHandler) -> None:
        self.heard(connection)
        self._guests.pop(connection, None)
        if connection.transport is not None:
            connection.transport.abort()
