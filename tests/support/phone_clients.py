"""Phones for tests: a source that is listened to, and clients that talk to its server."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import Any

import aiohttp
import cv2
import numpy as np

from adapters.phone.server import PhoneServer
from adapters.phone.source import PhoneSource, open_phone_source
from engine.config import load_config
from engine.types import Frame, FrameId, GpsReading, RejectedFrame, SourceNotice
from tests.support.received import Decoded, items_of
from tests.support.waiting import HANG_S

HOST = "127.0.0.1"


def jpeg_of(width: int = 96, height: int = 80, *, shade: int = 120) -> bytes:
    _, data = cv2.imencode(".jpg", np.full((height, width, 3), shade, np.uint8))
    return data.tobytes()


def frame_message(
    sequence: int, *, width: int = 96, height: int = 80, jpeg: bytes | None = None, **changes: Any
) -> bytes:
    header = {
        "seq": sequence,
        "captured_at_ms": time.time() * 1000.0,
        "width": width,
        "height": height,
        "angle": 0,
    } | changes
    text = json.dumps(header).encode()
    picture = jpeg_of(width, height) if jpeg is None else jpeg
    return len(text).to_bytes(4, "big") + text + picture


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def source_on(port: int, *settings: str, host: str = HOST) -> PhoneSource:
    ids = itertools.count(1)
    return open_phone_source(
        f"phone://{host}:{port}",
        config=load_config([], list(settings)),
        next_frame_id=lambda: FrameId(next(ids)),
    )


@dataclass(kw_only=True)
class Listening:
    """A source whose frames are taken by nobody but the test."""

    source: PhoneSource
    port: int
    received: list[Decoded] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def base(self) -> str:
        return f"https://{HOST}:{self.port}"

    @property
    def server(self) -> PhoneServer:
        assert self.source._server is not None
        return self.source._server

    def of(self, kind: Any) -> list[Any]:
        return [one for one in self.received if isinstance(one, kind)]

    @property
    def frames(self) -> list[Frame]:
        return self.of(Frame)

    @property
    def rejected(self) -> list[RejectedFrame]:
        return self.of(RejectedFrame)

    @property
    def readings(self) -> list[GpsReading]:
        return self.of(GpsReading)

    @property
    def notices(self) -> list[str]:
        return [f"{one.state}: {one.detail}" for one in self.of(SourceNotice)]

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_S):
            while not is_true():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def listening(*settings: str) -> AsyncIterator[Listening]:
    port = free_port()
    heard = Listening(source=source_on(port, *settings), port=port)
    frames = items_of(heard.source)

    async def take() -> None:
        async for received in frames:
            heard.received.append(received)
            heard.changed.set()

    taking = asyncio.create_task(take())
    try:
        await heard.until(lambda: bool(heard.received))
        yield heard
    finally:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        await frames.aclose()


@dataclass(kw_only=True)
class FakePhone:
    """What the page does, by hand."""

    session: aiohttp.ClientSession
    heard: Listening
    socket: aiohttp.ClientWebSocketResponse | None = None
    cookie: str = ""

    async def load(self, path: str | None = None) -> int:
        """Loads the page; the status."""
        url = self.heard.source.url if path is None else self.heard.base + path
        async with self.session.get(url, headers=self.headers(origin=None)) as answer:
            for text in answer.headers.getall("Set-Cookie", ()):
                (morsel,) = SimpleCookie(text).values()
                self.cookie = f"{morsel.key}={morsel.value}"
            await answer.read()
            return answer.status

    def headers(self, *, origin: str | None = "") -> dict[str, str]:
        headers = {"Cookie": self.cookie} if self.cookie else {}
        if origin is not None:
            headers["Origin"] = origin or self.heard.base
        return headers

    async def connect(self, **options: Any) -> aiohttp.ClientWebSocketResponse:
        options.setdefault("headers", self.headers())
        url = f"{self.heard.base}/frames"
        self.socket = await self.session.ws_connect(url, **options)
        return self.socket

    async def enter(self) -> aiohttp.ClientWebSocketResponse:
        """Loads the page and connects as it does."""
        assert await self.load() == 200
        connected = await self.connect()
        await connected.send_json({"type": "hello"})
        return connected

    async def post(self, body: bytes, *, is_picture: bool = False, plan: str = "0") -> Any:
        kind = "application/octet-stream" if is_picture else "application/json"
        sent = {**self.headers(), "Content-Type": kind, "X-Plan": plan}
        async with self.session.post(
            f"{self.heard.base}/frames", data=io.BytesIO(body), headers=sent
        ) as answer:
            return await answer.json() if answer.status == 200 else answer.status

    async def news(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first news that is wanted."""
        assert self.socket is not None
        async with asyncio.timeout(HANG_S):
            while True:
                message: dict[str, Any] = await self.socket.receive_json()
                if is_wanted(message):
                    return message


@asynccontextmanager
async def phones(heard: Listening, num: int = 1) -> AsyncIterator[list[FakePhone]]:
    """Devices, each with its own cookies."""
    made: list[FakePhone] = []
    try:
        for _ in range(num):
            made.append(
                FakePhone(
                    session=aiohttp.ClientSession(
                        connector=aiohttp.TCPConnector(ssl=False),
                        cookie_jar=aiohttp.DummyCookieJar(),
                    ),
                    heard=heard,
                )
            )
        yield made
    finally:
        for phone in made:
            await phone.session.close()
        await asyncio.sleep(0)  # connections close in the next turn
