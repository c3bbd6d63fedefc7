"""The HTTPS server behind the page: who may come in, and what they get."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from adapters.live.quiet_log import QuietLog
from adapters.phone.certificate import PageCertificate
from adapters.phone.connections import PhoneConnection
from adapters.phone.gate import Gate
from adapters.phone.phone_session import PhoneContext
from adapters.phone.sessions import Refusal, Sessions
from adapters.phone.static_files import StaticFiles

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)

TOKEN_KEY = "token"
_KEEPALIVE_S = 15.0  # of a connection that asks for nothing more
_PICTURE = "application/octet-stream"
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,260}")
_REFUSED = {
    Refusal.NOT_INVITED: (
        "This page needs an invitation",
        "Scan the code that LiveSfM shows in its terminal. Every run has a new one.",
    ),
    Refusal.FULL: (
        "No place is left",
        "As many phones as this run takes are here already (phone.max_phones).",
    ),
}

_Handler = Callable[["web.Request"], Awaitable["web.StreamResponse"]]


class PhoneServer:
    """Serves the page and listens to phones, on the event loop that it is started on."""

    def __init__(
        self,
        *,
        address: tuple[str, int],
        certificate: PageCertificate,
        sessions: Sessions,
        files: StaticFiles,
        context: PhoneContext,
    ) -> None:
        """Prepares a server.

        Args:
            address: host and port to listen at.
            certificate: shown to phones.
            sessions: who may come in.
            files: the page.
            context: what the phones share.
        """
        self._address = address
        self._certificate = certificate
        self._sessions = sessions
        self._files = files
        self._context = context
        self._live = context.config.live_sources
        self._cookie = f"__Host-livesfm-{address[1]}"  # cookies do not know ports
        self._connections: dict[str, PhoneConnection] = {}  # by token
        self._runner: web.AppRunner | None = None
        self._gate: Gate | None = None
        self._log = QuietLog(logger)

    async def start(self) -> None:
        """Begins to listen.

        Raises:
            OSError: the address cannot be used.
        """
        from aiohttp import web

        app = web.Application(
            client_max_size=self._live.max_payload_mb << 20, middlewares=[self._count_request()]
        )
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/", self._page, allow_head=False)
        app.router.add_get("/frames", self._socket, allow_head=False)
        app.router.add_post("/frames", self._post)
        app.router.add_get("/{name:[a-z]+\\.(?:js|css)}", self._file)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=_KEEPALIVE_S
        )
        await self._runner.setup()
        self._context.feedback.open(self._wake_all)
        if self._runner.server is None:
            raise ConnectionAbortedError("the server is not set up")
        self._gate = Gate(
            context=self._certificate.context,
            handshake_timeout_s=self._live.open_timeout_s,
            silence_s=self._live.open_timeout_s,
            server=self._runner.server,
            label=self._context.label,
        )
        await self._gate.open(*self._address)

    async def stop(self) -> None:
        """Sends phones the end of the run and lets go of everything."""
        self._context.feedback.end()
        await asyncio.gather(*(one.send_end() for one in self._connections.values()))
        self._context.feedback.close()
        if self._gate is not None:
            await self._gate.close()
        await asyncio.gather(*(one.close() for one in self._connections.values()))
        self._connections.clear()
        if self._runner is not None and self._runner.server is not None:
            transports = [connection.transport for connection in self._runner.server.connections]
            await self._runner.cleanup()
            for transport in transports:
                if transport is not None:
                    transport.abort()  # TLS would wait for the other side to close, too
            await asyncio.sleep(0)

    # -- connections ------------------------------------------------------------------------------

    def _count_request(self) -> Any:
        from aiohttp import web

        @web.middleware
        async def count(request: web.Request, handler: _Handler) -> web.StreamResponse:
            if self._gate is not None:
                self._gate.heard(request.protocol)
                if self._sessions.find(request.cookies.get(self._cookie)) is not None:
                    self._gate.admit(request.protocol)
            return await handler(request)

        return count

    # -- the page ---------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        session = self._sessions.admit(
            request.query.get(TOKEN_KEY), token=request.cookies.get(self._cookie)
        )
        if isinstance(session, Refusal):
            title, text = _REFUSED[session]
            self._log.warn(f"{self._context.label}: a device was turned away: {title.lower()}")
            body = self._files.notice(title=title, text=text)
            return web.Response(status=403, text=body, content_type="text/html")
        response = web.Response(text=self._files.page, content_type="text/html")
        response.set_cookie(
            self._cookie, session.token, secure=True, httponly=True, samesite="Strict", path="/"
        )
        return response

    async def _file(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        file = self._files.files.get(request.match_info["name"])
        if file is None:
            raise web.HTTPNotFound
        return web.Response(text=file.text, content_type=file.content_type)

    # -- phones -----------------------------------------------------------------------------------

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        connection = await self._connection_of(request)
        socket = web.WebSocketResponse(
            heartbeat=self._live.read_timeout_s,
            timeout=1.0,
            max_msg_size=self._live.max_payload_mb << 20,
            compress=False,
        )
        await socket.prepare(request)
        await connection.serve(socket)
        return socket

    async def _post(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        connection = await self._connection_of(request)
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            connection.phone.refuse_oversized()
            raise
        known_plan = request.headers.get("X-Plan", "")
        answer = connection.answer(
            body,
            is_picture=request.content_type == _PICTURE,
            known_plan=int(known_plan) if re.fullmatch("[0-9]{1,9}", known_plan) else 0,
        )
        if connection.phone.is_babbling:
            raise web.HTTPBadRequest
        return web.json_response(answer)

    async def _connection_of(self, request: web.Request) -> PhoneConnection:
        """The connection of the device that asks, from the page of this server and no other.

        Raises:
            HTTPForbidden: it was not admitted, or another site's page asks in its name.
        """
        from aiohttp import web

        session = self._sessions.find(request.cookies.get(self._cookie))
        origin = request.headers.get("Origin", "")
        if session is None or origin.lower() != f"https://{request.host}".lower():
            raise web.HTTPForbidden
        if session.token not in self._connections:
            self._connections[session.token] = PhoneConnection(
                session, context=self._context, sessions=self._sessions
            )
            for token, other in list(self._connections.items()):
                if not self._sessions.has(other.session):
                    await self._connections.pop(token).close()
        return self._connections[session.token]

    def _wake_all(self) -> None:
        for connection in self._connections.values():
            connection.wake()


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Lets browsers load the page's own parts from here and nothing else, and keep nothing."""
    # Older Safari does not count wss: as 'self'.
    socket = f"wss://{request.host}" if _HOST.fullmatch(request.host) else ""
    response.headers.update(
        {
            "Content-Security-Policy": (
                "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                f"connect-src 'self' {socket}; base-uri 'none'; form-action 'none'; "
                "frame-ancestors 'none'"
            ),
            "Permissions-Policy": (
                "camera=(self), geolocation=(self), accelerometer=(self), gyroscope=(self), "
                "magnetometer=(self), screen-wake-lock=(self), microphone=()"
            ),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
    )
