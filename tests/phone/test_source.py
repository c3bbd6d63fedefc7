"""Phones as a source: the server, who may come in, and what becomes of what phones send."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import resource
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Sized
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from adapters.install_advice import how_to_install
from adapters.phone import connections
from adapters.phone import source as source_module
from adapters.phone.certificate import make_self_signed
from adapters.phone.gate import Gate
from adapters.phone.server import PhoneServer
from adapters.phone.source import open_phone_source, parse_phone_spec, qr_code_text
from engine.config import Config
from engine.errors import AdapterUnavailableError, SourceError
from engine.events import RunStarted
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    FrameId,
    Received,
    RejectedFrame,
    SourceNotice,
    SourceState,
)
from tests.support.phone_clients import (
    HOST,
    Listening,
    frame_message,
    free_port,
    jpeg_of,
    listening,
    phones,
    source_on,
)
from tests.support.received import items_of
from tests.support.waiting import HANG_S, LeapingLoop, leap, until

pytestmark = pytest.mark.network

POSITION = {
    "type": "position",
    "latitude": 47.37,
    "longitude": 8.54,
    "altitude": 408.0,
    "accuracy": 4.0,
}


PATIENCE_S = 1e3  # on the clock of the event loop, which leaps


def run(story: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(story)


def asynchronous(story: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """A test that runs on an event loop."""

    def test() -> None:
        async def awaited() -> None:
            await story()

        run(awaited())

    test.__name__ = story.__name__
    return test


# -- the spec -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ("phone://0.0.0.0:8443", ("0.0.0.0", 8443)),
        ("phone://127.0.0.1:9000/", ("127.0.0.1", 9000)),
        ("phone://mapper.local", ("mapper.local", 8443)),
        ("phone://:9000", ("0.0.0.0", 9000)),
        ("phone://", ("0.0.0.0", 8443)),
        ("PHONE://[::1]:9000", ("::1", 9000)),
    ],
)
def test_a_spec_is_a_host_and_a_port(spec: str, address: tuple[str, int]) -> None:
    assert parse_phone_spec(spec) == address


@pytest.mark.parametrize(
    "spec",
    [
        "phone:8443",
        "phone://host:0",
        "phone://host:99999",
        "phone://host:https",
        "phone://host/page",
        "phone://user:secret@host:8443",
        "phone://host?token=secret",
        "phone://[::1",
    ],
)
def test_other_specs_are_refused_and_secrets_not_repeated(spec: str) -> None:
    with pytest.raises(SourceError, match="expected phone://HOST:PORT") as refused:
        parse_phone_spec(spec)
    assert "secret" not in str(refused.value)


def test_a_missing_package_is_refused_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_module, "find_spec", lambda name: None)
    with pytest.raises(AdapterUnavailableError, match=re.escape(how_to_install("phone"))):
        open_phone_source("phone://", config=Config(), next_frame_id=lambda: FrameId(1))


def test_a_source_says_what_it_is_without_its_secret() -> None:
    source = source_on(8443)
    assert (source.info.is_live, source.info.is_sequence, source.info.num_frames) == (
        True,
        True,
        None,
    )
    assert source.info.label == "phone://127.0.0.1:8443"
    secret = source.url.partition("token=")[2]
    assert len(secret) >= 32
    assert secret not in source.info.label


def test_the_invitation_has_an_address_that_phones_reach_and_a_code() -> None:
    source = source_on(8443, host="0.0.0.0")
    assert "0.0.0.0" not in source.url
    assert source.url.startswith("https://")
    lines = source.invitation()
    assert source.url in lines
    assert qr_code_text(source.url) in lines
    assert "SHA-256" in lines


def test_the_invitation_uses_the_name_that_a_signed_certificate_is_for(tmp_path: Path) -> None:
    certificate, key = make_self_signed("maps.example")
    (tmp_path / "cert.pem").write_bytes(certificate)
    (tmp_path / "key.pem").write_bytes(key)
    settings = (
        f"phone.certificate={tmp_path / 'cert.pem'}",
        f"phone.certificate_key={tmp_path / 'key.pem'}",
    )
    source = source_on(8443, *settings, host="0.0.0.0")
    assert source.url.startswith("https://maps.example:8443/?token=")
    assert "warns" not in source.invitation()


def test_a_qr_code_is_square_half_blocks_with_a_margin() -> None:
    rows = qr_code_text("https://192.168.1.20:8443/?token=" + "x" * 32).splitlines()
    assert set("".join(rows)) <= set(" █▀▄")
    assert len({len(row) for row in rows}) == 1
    assert 2 * len(rows) - 1 <= len(rows[0]) <= 2 * len(rows)
    assert len(rows[0]) <= 60


def server_of(heard: Listening) -> PhoneServer:
    server = heard.source._server
    assert server is not None, "it listens"
    return server


def holds_one(waiting: Sized) -> bool:
    return len(waiting) == 1


class LinesOf(logging.Handler):
    """The lines of a logger while it is entered."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._logger = logging.getLogger(name)
        self._lines: list[str] = []

    def __enter__(self) -> list[str]:
        self._logger.addHandler(self)
        return self._lines

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def gate_of(heard: Listening) -> Gate:
    gate = server_of(heard)._gate
    assert gate is not None, "it listens"
    return gate


@asynchronous
async def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SourceError, match=f"phone://127.0.0.1:{port}: cannot listen there"):
            source_on(port)


@asynchronous
async def test_the_port_is_free_again_after_the_run() -> None:
    port = free_port()
    for _ in range(2):
        frames = items_of(source_on(port))
        notice = await anext(frames)
        assert isinstance(notice, SourceNotice)
        assert notice.state is SourceState.CONNECTED
        assert "token" not in notice.detail
        await frames.aclose()


# -- who may come in ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/?token=", "/?token=wrong", "/?Token=x", "/?token=%FF"])
def test_a_wrong_or_missing_token_gets_403(path: str) -> None:
    async def story() -> None:
        async with listening() as heard, phones(heard) as (phone,):
            assert await phone.load(path) == 403
            assert phone.cookie == ""
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await phone.connect()
            assert refused.value.status == 403
            assert await phone.post(b"") == 403
            phone.cookie = f"__Host-livesfm-{heard.port}=wrong"
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await phone.connect()
            assert refused.value.status == 403

    run(story())


@asynchronous
async def test_the_token_is_exchanged_for_a_cookie_that_only_this_server_sees() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        async with phone.session.get(heard.source.url) as answer:
            cookie = answer.headers["Set-Cookie"]
        for attribute in ("__Host-", "Secure", "HttpOnly", "SameSite=Strict", "Path=/"):
            assert attribute in cookie
        assert "Domain" not in cookie
        secret = heard.source.url.partition("token=")[2]
        assert secret not in cookie


@asynchronous
async def test_a_phone_reloads_without_the_token() -> None:
    async with listening("phone.max_phones=1") as heard, phones(heard) as (phone,):
        assert await phone.load() == 200
        first = phone.cookie
        assert await phone.load("/") == 200
        assert await phone.load() == 200
        assert phone.cookie == first


@asynchronous
async def test_no_more_phones_than_configured() -> None:
    async with listening("phone.max_phones=2") as heard, phones(heard, 3) as devices:
        assert [await device.load() for device in devices] == [200, 200, 403]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://{host}", "https://{host}.evil.example", None]
)
def test_pages_of_other_sites_may_not_speak_for_a_phone(origin: str | None) -> None:
    async def story() -> None:
        async with listening() as heard, phones(heard) as (phone,):
            await phone.load()
            foreign = origin and origin.format(host=f"{HOST}:{heard.port}")
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await phone.connect(headers=phone.headers(origin=foreign))
            assert refused.value.status == 403
            url = f"{heard.base}/frames"
            headers = phone.headers(origin=foreign)
            async with phone.session.post(url, headers=headers) as answer:
                assert answer.status == 403

    run(story())


@asynchronous
async def test_every_answer_is_kept_nowhere_and_loads_nothing_from_elsewhere() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        for path in ("/", "/page.js", "/nothing.js", "/?token=wrong"):
            async with phone.session.get(heard.base + path) as answer:
                headers = answer.headers
                assert headers["Cache-Control"] == "no-store"
                policy = headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert f"connect-src 'self' wss://{HOST}:{heard.port};" in policy
                assert "unsafe" not in policy
                assert headers["Referrer-Policy"] == "no-referrer"
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert "camera=(self)" in headers["Permissions-Policy"]


@asynchronous
async def test_a_host_header_cannot_write_into_the_policy() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        evil = {"Host": "x; script-src *"}
        async with phone.session.get(f"{heard.base}/page.css", headers=evil) as answer:
            policy = answer.headers.get("Content-Security-Policy", "")
            assert "script-src *" not in policy


@asynchronous
async def test_the_page_is_served_with_its_parts_and_the_settings() -> None:
    async with listening("phone.max_rate_hz=7.5") as heard, phones(heard) as (phone,):
        async with phone.session.get(heard.source.url) as answer:
            page = await answer.text()
        assert 'data-rate-hz="7.5"' in page
        assert 'data-edge-px="1280"' in page
        assert "{" not in page.partition("<body")[2].partition(">")[0]
        for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
            async with phone.session.get(f"{heard.base}/{name}") as answer:
                assert answer.status == 200
                assert answer.content_type == kind
        for name in ("source.py", "..%2Fsource.py", "page.html", "__init__.py"):
            async with phone.session.get(f"{heard.base}/{name}") as answer:
                assert answer.status == 404


# -- frames ---------------------------------------------------------------------------------------


@asynchronous
async def test_pictures_become_frames() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        picture = jpeg_of()
        for sequence in (1, 2):
            await connected.send_bytes(frame_message(sequence, jpeg=picture))
            await phone.news(lambda told, left=sequence: told.get("left") == left)  # type: ignore[misc]
        await heard.until(lambda: len(heard.frames) == 2)
        first, second = heard.frames
        assert first.camera_key == "phone1|96x80"
        assert (first.name, second.name) == ("phone1/000001.jpg", "phone1/000002.jpg")
        assert (first.index, second.index) == (0, 1)
        assert first.source == heard.source.info.label
        assert first.pixels.shape == (80, 96, 3)
        assert first.jpeg == picture
        assert 0.0 < second.captured_at_s - first.captured_at_s < 5.0
        assert abs(second.captured_at_s - time.time()) < 5.0
        assert (first.frame_id, second.frame_id) == (1, 2)


@asynchronous
async def test_two_phones_are_two_cameras() -> None:
    async with listening() as heard, phones(heard, 2) as devices:
        for number, device in enumerate(devices, start=1):
            connected = await device.enter()
            await connected.send_bytes(frame_message(1, width=64 * number, height=80))
        await heard.until(lambda: len(heard.frames) == 2)
        keys = {frame.camera_key for frame in heard.frames}
        assert keys == {"phone1|64x80", "phone2|128x80"}
        assert len({frame.name for frame in heard.frames}) == 2


@asynchronous
async def test_a_phone_that_is_turned_is_another_camera() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        for sequence, (width, height) in enumerate([(96, 80), (80, 96), (96, 80)]):
            await connected.send_bytes(frame_message(sequence, width=width, height=height))
            await heard.until(lambda num=sequence + 1: len(heard.frames) == num)  # type: ignore[misc]
        keys = [frame.camera_key for frame in heard.frames]
        assert keys == ["phone1|96x80", "phone1|80x96", "phone1|96x80"]


@asynchronous
async def test_no_more_cameras_than_configured() -> None:
    settings = "live_sources.max_cameras=2"
    async with listening(settings) as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        for sequence, width in enumerate((64, 72, 80, 64)):
            await connected.send_bytes(frame_message(sequence, width=width))
            num = sequence + 1
            await heard.until(lambda num=num: len(heard.of(Frame | RejectedFrame)) == num)  # type: ignore[misc]
        assert [frame.width for frame in heard.frames] == [64, 72, 64]
        assert "max_cameras" in heard.rejected[0].detail


@asynchronous
async def test_pictures_leave_at_once_undecoded_and_those_of_a_phone_are_a_lane() -> None:
    num = 30
    received: list[Received] = []
    source = source_on(free_port())
    receiving = asyncio.create_task(source.receive(received.append))
    heard = Listening(source=source, port=source._address[1])
    while not received:  # noqa: ASYNC110 - the sink has no event
        await asyncio.sleep(0.005)
    async with phones(heard) as (phone,):
        connected = await phone.enter()
        for sequence in range(num):
            await connected.send_bytes(frame_message(sequence))
        await phone.news(lambda told: told.get("left") == num)
    receiving.cancel()
    await asyncio.wait((receiving,))
    arrivals = [item for item in received if isinstance(item, Arrival)]
    assert [arrival.index for arrival in arrivals] == list(range(num))
    assert {arrival.lane for arrival in arrivals} == {"phone1"}
    frame = arrivals[0].decode()
    assert isinstance(frame, Frame)
    assert frame.name == arrivals[0].name


@asynchronous
async def test_a_picture_that_came_before_is_refused_and_a_reload_begins_anew() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        for num, sequence in enumerate((5, 5, 4), start=1):
            await connected.send_bytes(frame_message(sequence))
            await heard.until(lambda num=num: len(heard.of(Frame | RejectedFrame)) == num)  # type: ignore[misc]
        assert [one.reason for one in heard.rejected] == [DropReason.DUPLICATE] * 2
        again = await phone.enter()
        await again.send_bytes(frame_message(1))
        await heard.until(lambda: len(heard.frames) == 2)
        assert heard.frames[1].camera_key == heard.frames[0].camera_key
        assert heard.frames[1].captured_at_s > heard.frames[0].captured_at_s


@asynchronous
async def test_clocks_that_are_wrong_or_jump_give_times_near_the_arrival_that_increase() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        now_ms = time.time() * 1000.0
        told = [now_ms + 1e11, now_ms + 1e11 + 100.0, now_ms - 1e12, -5.0, now_ms]
        for sequence, captured_at_ms in enumerate(told):
            await connected.send_bytes(frame_message(sequence, captured_at_ms=captured_at_ms))
            await heard.until(lambda num=sequence + 1: len(heard.frames) == num)  # type: ignore[misc]
        times_s = [frame.captured_at_s for frame in heard.frames]
        assert all(early < late for early, late in zip(times_s, times_s[1:], strict=False))
        assert all(abs(time_s - time.time()) < 10.0 for time_s in times_s)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "reason", "detail"),
    [
        (b"", DropReason.UNREADABLE, "empty message"),
        (b"garbage" * 100, DropReason.UNREADABLE, "header"),
        (frame_message(1, jpeg=jpeg_of()[:-2]), DropReason.UNREADABLE, "truncated"),
        (frame_message(1, jpeg=b"\xff\xd8\xff\xe0"), DropReason.UNREADABLE, "no image"),
        (frame_message(1, width=97, jpeg=jpeg_of()), DropReason.UNREADABLE, "announced as 97 x 80"),
        (frame_message(1, path="/etc/passwd"), DropReason.UNREADABLE, "unknown keys"),
        (frame_message(1, width=8, height=8), DropReason.TOO_SMALL, "8 x 8 px"),
    ],
    ids=["empty", "garbage", "truncated", "no data", "wrong size", "path", "small"],
)
def test_a_bad_picture_is_counted_and_the_next_one_taken(
    message: bytes, reason: DropReason, detail: str
) -> None:
    async def story() -> None:
        async with listening() as heard, phones(heard) as (phone,):
            connected = await phone.enter()
            await connected.send_bytes(message)
            await heard.until(lambda: bool(heard.rejected))
            await connected.send_bytes(frame_message(2))
            await phone.news(lambda told: told.get("left") == 2)
            (rejected,) = heard.rejected
            assert rejected.reason is reason
            assert detail in rejected.detail
            assert rejected.name == "phone1/000001.jpg"
            await heard.until(lambda: len(heard.frames) == 1)

    run(story())


@asynchronous
async def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    jpeg = bytearray(jpeg_of())
    start = jpeg.find(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 16000, 16000)
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        message = frame_message(1, width=16000, height=16000, jpeg=bytes(jpeg))
        await connected.send_bytes(message)
        await heard.until(lambda: bool(heard.rejected))
        assert heard.rejected[0].reason is DropReason.TOO_LARGE


@asynchronous
async def test_an_oversized_message_ends_the_connection_unread_and_the_phone_may_return() -> None:
    settings = "live_sources.max_payload_mb=1"
    async with listening(settings) as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        with contextlib.suppress(ConnectionError):
            await connected.send_bytes(bytes(3 << 20))
        await heard.until(lambda: bool(heard.rejected))
        assert heard.rejected[0].reason is DropReason.TOO_LARGE
        assert "1 MB" in heard.rejected[0].detail
        assert await phone.post(bytes(3 << 20), is_picture=True) == 413
        await heard.until(lambda: len(heard.rejected) == 2)
        connected = await phone.connect()
        await connected.send_bytes(frame_message(1))
        await heard.until(lambda: bool(heard.frames))


@asynchronous
async def test_who_sends_nothing_but_nonsense_is_sent_away() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        for number in range(20):
            with contextlib.suppress(ConnectionError):
                await connected.send_str("{" if number % 2 else '{"type": "stop"}')
        async with asyncio.timeout(HANG_S):
            while (await connected.receive()).type not in CLOSED:
                pass
        assert connected.close_code == 1008
        await heard.until(lambda: len(heard.rejected) == 10)
        await heard.until(lambda: "makes sense" in heard.notices[-1])
        returned = await phone.enter()  # the page, loaded again
        await returned.send_str("{")
        await heard.until(lambda: len(heard.rejected) == 11)
        assert not returned.closed


CLOSED = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING)


@asynchronous
async def test_a_phone_that_connects_and_says_nothing_is_sent_away() -> None:
    settings = (f"live_sources.open_timeout_s={PATIENCE_S}", "live_sources.read_timeout_s=1e6")
    async with listening(*settings) as heard, phones(heard, 2) as (silent, other):
        await silent.load()
        connected = await silent.connect()
        talking = await other.enter()
        await talking.send_bytes(frame_message(0))
        await heard.until(lambda: len(heard.frames) == 1)
        leap(PATIENCE_S)
        async with asyncio.timeout(HANG_S):
            while (await connected.receive()).type not in CLOSED:
                pass
        await heard.until(lambda: "lost: phone 1 left: it said nothing" in heard.notices)
        await talking.send_bytes(frame_message(1))
        await heard.until(lambda: len(heard.frames) == 2)


@asynchronous
async def test_a_connection_without_a_request_is_dropped() -> None:
    async with listening(f"live_sources.open_timeout_s={PATIENCE_S}") as heard:
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname = False
        trusting.verify_mode = ssl.CERT_NONE
        gate = gate_of(heard)
        for context, waiting in ((None, gate._handshakes), (trusting, gate._silent)):
            reader, writer = await asyncio.open_connection(HOST, heard.port, ssl=context)
            await until(functools.partial(holds_one, waiting))
            leap(PATIENCE_S)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(HANG_S):
                    assert await reader.read() == b""
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@asynchronous
async def test_any_number_of_silent_connections_leaves_room_for_phones() -> None:
    async with listening() as heard, phones(heard, 2) as (here, newcomer):
        connected = await here.enter()
        gate = gate_of(heard)
        flood = []
        most = 0
        for _ in range(3 * gate.max_connections):
            flood.append(await asyncio.open_connection(HOST, heard.port))
            await asyncio.sleep(0)
            most = max(most, gate.num_connections)
        assert await newcomer.load() == 200
        await until(lambda: gate.num_connections <= gate.max_connections)
        assert gate.max_connections // 2 < most <= gate.max_connections
        await connected.send_bytes(frame_message(1))
        await heard.until(lambda: len(heard.frames) == 1)
        for _, writer in flood:
            writer.close()


@asynchronous
async def test_where_all_connections_are_those_of_phones_a_newcomer_is_turned_away() -> None:
    async with listening() as heard, phones(heard, 2) as (here, newcomer):
        await here.enter()
        gate = gate_of(heard)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gate, "max_connections", gate.num_connections)
            with pytest.raises(aiohttp.ClientError):
                await newcomer.load()
        assert await newcomer.load() == 200


@pytest.mark.parametrize(("limit", "expected"), [(24, 6), (128, 32), (1024, 64), (-1, 64)])
def test_connections_take_a_quarter_of_the_descriptors_at_most(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    gate = Gate.__new__(Gate)
    assert gate.max_connections == expected


@asynchronous
async def test_a_thousand_wrong_tokens_make_few_log_lines() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        with LinesOf("adapters.phone.server") as lines:
            for _ in range(100):
                assert await phone.load("/?token=wrong") == 403
        assert 1 <= len(lines) <= 5


@asynchronous
async def test_a_phone_that_answers_no_heartbeat_is_given_up() -> None:
    settings = "live_sources.read_timeout_s=0.4"
    async with listening(settings) as heard, phones(heard) as (phone,):
        await phone.load()
        connected = await phone.connect(autoping=False)
        await connected.send_json({"type": "hello"})
        await heard.until(lambda: any("broke" in notice for notice in heard.notices))


# -- positions ------------------------------------------------------------------------------------


@asynchronous
async def test_positions_are_of_the_phone_s_cameras_and_wait_for_the_first() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()

        async def tell(**changes: Any) -> None:
            message = POSITION | {"captured_at_ms": time.time() * 1000.0} | changes
            await connected.send_str(json.dumps(message))

        await tell()
        await connected.send_bytes(frame_message(1))
        await heard.until(lambda: bool(heard.frames))
        (early,) = heard.readings
        assert early.camera_key == "phone1|96x80"
        assert heard.received.index(early) < heard.received.index(heard.frames[0])
        await connected.send_bytes(frame_message(2, width=80, height=96))
        await heard.until(lambda: len(heard.frames) == 2)
        await tell(latitude=47.38)
        await heard.until(lambda: len(heard.readings) == 4)
        newest = heard.readings[-2:]
        assert {one.camera_key for one in newest} == {"phone1|96x80", "phone1|80x96"}
        assert {one.fix.latitude_deg for one in newest} == {47.38}
        assert newest[0].fix.accuracy_m == 4.0
        assert newest[0].source == heard.source.info.label
        assert abs(newest[0].captured_at_s - time.time()) < HANG_S


@asynchronous
async def test_positions_without_altitude_are_readings_too() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        flat = {key: value for key, value in POSITION.items() if key != "altitude"}
        await connected.send_str(json.dumps(flat | {"captured_at_ms": 0}))
        await connected.send_bytes(frame_message(1))
        await heard.until(lambda: bool(heard.frames) and bool(heard.readings))
        assert {one.fix.altitude_m for one in heard.readings} == {None}
        assert heard.rejected == []


# -- coming and going -----------------------------------------------------------------------------


@asynchronous
async def test_who_watches_hears_of_phones_that_come_and_go() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        connected = await phone.enter()
        await heard.until(lambda: "connected: phone 1 is there" in heard.notices)
        await connected.close()
        await heard.until(lambda: "lost: phone 1 left: the page was closed" in heard.notices)
        await phone.connect()
        await heard.until(lambda: heard.notices.count("connected: phone 1 is there") == 2)


@asynchronous
async def test_a_page_opened_again_takes_the_place_of_the_first() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        first = await phone.enter()
        second = await phone.connect()
        async with asyncio.timeout(HANG_S):
            while (await first.receive()).type not in CLOSED:
                pass
        assert first.close_code == 4000
        await second.send_bytes(frame_message(1))
        await heard.until(lambda: len(heard.frames) == 1)
        assert not [notice for notice in heard.notices if notice.startswith("lost")]


@asynchronous
async def test_phones_are_told_of_the_run_and_of_its_end() -> None:
    async with listening() as heard:
        view = heard.source.feedback_view()
        async with phones(heard) as (phone,):
            connected = await phone.enter()
            told = await phone.news(lambda told: "state" in told)
            assert told["state"]["advice"] == "waiting"
            event = RunStarted(at_s=0.0, sources=("phone",), matcher="sift")
            await asyncio.to_thread(view.show_event, event)
            await phone.news(lambda told: "state" in told)
            stopping = asyncio.create_task(heard.server.stop())
            told = await phone.news(lambda told: told.get("state", {}).get("advice") == "ended")
            message = await connected.receive()
            assert message.type in CLOSED
            assert connected.close_code == 4001
            await stopping


@asynchronous
async def test_many_events_make_few_messages() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        await phone.enter()
        await phone.news(lambda told: "state" in told)
        view = heard.source.feedback_view()
        for number in range(400):
            view.show_event(RunStarted(at_s=float(number), sources=(), matcher="sift"))
            await asyncio.sleep(0)
            if number % 100 == 99:
                leap(connections._STATE_GAP_S)
                await phone.news(lambda told: "state" in told)
        stopping = asyncio.create_task(server_of(heard).stop())
        num_more = 0
        while (await phone.news(lambda told: "state" in told))["state"]["advice"] != "ended":
            num_more += 1
        await stopping
        assert num_more <= 10


@asynchronous
async def test_a_source_without_frames_for_too_long_ends_when_configured() -> None:
    source = source_on(free_port(), "live_sources.give_up_after_s=0.3")
    received = [one async for one in items_of(source)]
    states = [one.state for one in received if isinstance(one, SourceNotice)]
    assert states == [SourceState.CONNECTED, SourceState.ENDED]


# -- without a WebSocket --------------------------------------------------------------------------


@asynchronous
async def test_a_browser_without_websockets_posts_and_reads_the_answers() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        await phone.load()
        answer = await phone.post(b'{"type": "hello"}')
        assert answer["left"] == 0
        assert answer["state"]["advice"] == "waiting"
        await phone.post(frame_message(1), is_picture=True)
        await heard.until(lambda: len(heard.frames) == 1)
        assert (await phone.post(b""))["left"] == 1
        assert "connected: phone 1 is there" in heard.notices
        assert (await phone.post(b"", plan="many"))["left"] == 1
        for _ in range(9):
            await phone.post(b"nonsense")
        assert await phone.post(b"nonsense") == 400


@asynchronous
async def test_a_phone_that_posts_no_more_has_left_and_may_come_back() -> None:
    settings = "live_sources.read_timeout_s=0.1"
    async with listening(settings) as heard, phones(heard) as (phone,):
        await phone.load()
        await phone.post(b"")
        await heard.until(lambda: "lost: phone 1 left: it sends nothing any more" in heard.notices)
        await phone.post(b"")
        await heard.until(lambda: heard.notices.count("connected: phone 1 is there") == 2)


@asynchronous
async def test_a_phone_that_posts_is_told_of_the_end() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(connections, "_FAREWELL_S", 2 * HANG_S)
        await post_until_the_end()


async def post_until_the_end() -> None:
    async with listening() as heard, phones(heard) as (phone,):
        await phone.load()
        await phone.post(b"")
        stopping = asyncio.create_task(heard.server.stop())
        await asyncio.sleep(0)
        answer = await phone.post(b"")
        assert answer["state"]["advice"] == "ended"
        await asyncio.wait_for(stopping, HANG_S)
