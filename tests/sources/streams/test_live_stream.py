"""Live streams from real servers on loopback."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.sources.streams import live_stream, stream_reader
from adapters.sources.streams.push_listener import Publisher, PushListener
from adapters.sources.streams.stream_reader import StreamReader
from engine.errors import SourceError
from engine.types import DropReason, Frame, RejectedFrame, SourceNotice, SourceState
from tests.support.live_streams import (
    assert_all_counted,
    assert_in_order_of_capture,
    frames_of,
    num_frames,
    of_kind,
    open_stream,
    read,
    reported,
    states_of,
)
from tests.support.received import Decoded as Item
from tests.support.received import items_of
from tests.support.stream_servers import (
    LOOPBACK,
    MjpegServer,
    free_port,
    jpeg,
    push,
    pushing,
    raw_server,
    rtmp_relay,
    rtsp_server,
    running,
    self_signed,
    texture,
    write_clip,
)
from tests.support.waiting import HANG_S, block_until, leap, until

pytestmark = pytest.mark.network

CONNECTED, LOST = SourceState.CONNECTED, SourceState.LOST
REFUSED, ENDED = SourceState.REFUSED, SourceState.ENDED
PATIENCE_S = 1e3  # on the clock of the event loop, which leaps


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def give_up_when_lost(item: Item) -> None:
    if isinstance(item, SourceNotice) and item.state is LOST:
        leap(PATIENCE_S)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[StreamReader]:
    """The readers that were started, as they were started."""
    started: list[StreamReader] = []
    start = StreamReader.start

    def remember(reader: StreamReader) -> None:
        started.append(reader)
        start(reader)

    monkeypatch.setattr(StreamReader, "start", remember)
    return started


def assert_thread_ends(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(HANG_S)
    assert name not in [thread.name for thread in threading.enumerate()]


# -- MJPEG over HTTP ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_length", [True, False])
def test_mjpeg_frames_come_with_the_bytes_their_camera_sent(with_length: bool) -> None:
    parts = [jpeg(number) for number in range(6)]
    with MjpegServer(parts, pause_s=0.05, with_length=with_length) as server:
        stream = open_stream(server.url())
        assert (stream.info.is_live, stream.info.is_sequence, stream.info.num_frames) == (
            True,
            True,
            None,
        )
        items = read(stream, until=num_frames(5))
    first = items[0]
    assert isinstance(first, SourceNotice)
    assert (first.state, first.source) == (CONNECTED, stream.info.label)
    assert first.detail == "mjpeg, 160 x 120 px"
    frames = frames_of(items)
    for frame, part in zip(frames, parts, strict=False):
        assert frame.jpeg is not None
        assert frame.jpeg.rstrip(b"\r\n") == part
        assert np.abs(frame.pixels.astype(int) - texture(frame.index)).mean() < 6.0
        assert (frame.camera_key, frame.source) == ("stream|160x120", server.url())
    assert [frame.name for frame in frames[:2]] == ["000000.jpg", "000001.jpg"]
    assert [frame.frame_id for frame in frames] == list(range(1, len(frames) + 1))
    assert_all_counted(items)
    assert_in_order_of_capture(items)


def test_capture_times_of_mjpeg_are_those_of_the_arrival() -> None:
    with MjpegServer([jpeg(number) for number in range(5)], pause_s=0.2) as server:
        frames = frames_of(read(open_stream(server.url()), until=num_frames(5)))
    steps_s = np.diff([frame.captured_at_s for frame in frames])
    assert np.median(steps_s) == pytest.approx(0.2, abs=0.05)  # FFmpeg makes 1/25 s of it


def test_another_size_is_another_camera() -> None:
    small, large = jpeg(1), jpeg(2, size=(200, 150))
    with MjpegServer([small, small, large, large, small], pause_s=0.03) as server:
        items = read(open_stream(server.url()), until=num_frames(5))
    keys = [frame.camera_key.partition("|")[2] for frame in frames_of(items)]
    assert keys == ["160x120", "160x120", "200x150", "200x150", "160x120"]
    assert_all_counted(items)


def test_pictures_that_are_none_are_counted_and_the_rest_still_comes() -> None:
    good = jpeg()
    parts = [good, good, good[:-300], b"I am text", good[:150], jpeg(1, size=(40, 32)), good]
    parts += [jpeg(2, size=(600, 500)), bytes(2_500_000), good]
    with MjpegServer(parts, pause_s=0.1) as server:
        stream = open_stream(server.url(), live={"max_payload_mb": 2}, max_image_megapixels=0.2)
        items = read(stream, until=num_frames(4))
    assert [frame.index for frame in frames_of(items)] == [0, 1, 6, 9]
    rejected = of_kind(items, RejectedFrame)
    assert [item.reason for item in rejected] == (
        [DropReason.UNREADABLE] * 3
        + [DropReason.TOO_SMALL, DropReason.TOO_LARGE, DropReason.TOO_LARGE]
    )
    assert all(item.detail for item in rejected)
    assert states_of(items) == [CONNECTED]
    assert_all_counted(items)


def test_only_every_nth_frame_is_taken() -> None:
    with MjpegServer([jpeg(number) for number in range(12)], pause_s=0.02) as server:
        items = read(open_stream(server.url(), every_nth_frame=3), until=num_frames(3))
    assert [frame.index for frame in frames_of(items)] == [0, 3, 6]


def test_parts_without_a_byte_are_counted_and_the_next_one_comes() -> None:
    with MjpegServer([jpeg(), b"", b"", jpeg(1), b"", jpeg(2)], pause_s=0.1) as server:
        items = read(
            open_stream(server.url()), until=lambda items: getattr(items[-1], "index", 0) == 5
        )
    assert {frame.index for frame in frames_of(items)} <= {0, 3, 5}
    assert frames_of(items)[-1].index == 5
    assert states_of(items) == [CONNECTED]
    assert_all_counted(items)


# -- breaks ---------------------------------------------------------------------------------------


def test_a_server_that_comes_back_is_found_again_and_counting_goes_on() -> None:
    servers = [MjpegServer([jpeg(number) for number in range(3)])]
    port = servers[0].port

    def restart(item: Item) -> None:
        if isinstance(item, Frame) and item.index == 2:
            servers.pop().close()
        if isinstance(item, SourceNotice) and item.state is LOST and not servers:
            servers.append(MjpegServer([jpeg(7), jpeg(8)], port=port))

    try:
        items = read(open_stream(f"http://{LOOPBACK}:{port}/"), after=restart, until=num_frames(5))
    finally:
        for server in servers:
            server.close()
    assert states_of(items)[0] == states_of(items)[-1] == CONNECTED
    assert 1 <= states_of(items).count(LOST) <= 2  # broken, and perhaps refused once
    assert [frame.name for frame in frames_of(items)] == [f"{n:06d}.jpg" for n in range(5)]
    assert_in_order_of_capture(items)


def test_a_server_that_stops_sending_is_lost_and_asked_again() -> None:
    with MjpegServer([jpeg(1)]) as server:
        stream = open_stream(server.url(), live={"read_timeout_s": 1.0})
        items = read(stream, until=num_frames(2))
    assert states_of(items) == [CONNECTED, LOST, CONNECTED]
    assert [n.detail for n in of_kind(items, SourceNotice)][1] == "nothing came for 1 s"


def test_a_stream_that_ends_is_asked_for_again() -> None:
    with MjpegServer([jpeg(1), jpeg(2)], hangs_up=True) as server:
        items = read(open_stream(server.url()), until=num_frames(4))
    assert states_of(items) == [CONNECTED, LOST, CONNECTED]


def test_where_nothing_answers_that_is_told_once_and_given_up_in_time() -> None:
    live = {"give_up_after_s": PATIENCE_S, "retry_first_s": 2 * HANG_S, "retry_max_s": 2 * HANG_S}
    stream = open_stream(f"rtsp://{LOOPBACK}:{free_port()}/x", live=live)
    items = read(stream, after=give_up_when_lost)
    assert states_of(items) == [LOST, ENDED]
    details = [notice.detail for notice in of_kind(items, SourceNotice)]
    assert details == ["no connection: Connection refused", "no frame for 1000 s"]


def test_giving_up_counts_from_the_last_frame() -> None:
    may_send = threading.Semaphore(1)

    def let_time_pass(waited_s: float) -> None:
        leap(waited_s)
        may_send.release()

    def wait_on(item: Item) -> None:
        if isinstance(item, Frame):  # the next one is waited for when this is called
            waited_s = 0.6 * PATIENCE_S if item.index < 9 else PATIENCE_S
            asyncio.get_running_loop().call_soon(let_time_pass, waited_s)

    with MjpegServer([jpeg(n) for n in range(10)], before_part=may_send.acquire) as server:
        items = read(open_stream(server.url(), live={"give_up_after_s": PATIENCE_S}), after=wait_on)
    assert len(frames_of(items)) == 10
    assert states_of(items)[-1] is ENDED


@pytest.mark.parametrize("scheme", ["rtsp", "rtmp", "http"])
@pytest.mark.parametrize(
    ("reply", "says_bye"),
    [(b"", False), (b"\xff\x00garbage" * 1000, True), (b"HTTP/1.0 200 OK\r\n\r\n<html>", True)],
    ids=["silent", "garbage", "page"],
)
def test_servers_that_send_no_stream_are_survived_and_told(
    scheme: str, reply: bytes, says_bye: bool
) -> None:
    with raw_server(reply, says_bye=says_bye) as port:
        live = {"open_timeout_s": 0.3, "give_up_after_s": PATIENCE_S}
        stream = open_stream(f"{scheme}://{LOOPBACK}:{port}/live/x", live=live)
        items = read(stream, after=give_up_when_lost)
    assert states_of(items)[0] is LOST
    assert states_of(items)[-1] is ENDED
    assert not frames_of(items)
    assert all(notice.detail for notice in of_kind(items, SourceNotice))


def test_what_is_not_there_yet_is_asked_for_again() -> None:
    with MjpegServer([jpeg(1)], status=404) as server:

        def appear(item: Item) -> None:
            if isinstance(item, SourceNotice) and item.state is LOST:
                server.status = 200

        items = read(open_stream(server.url()), after=appear, until=num_frames(1))
    assert states_of(items) == [LOST, CONNECTED]
    assert "404" in of_kind(items, SourceNotice)[0].detail


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_refused_does_not_try_again(status: int) -> None:
    with MjpegServer([jpeg(1)], status=status) as server:
        items = read(open_stream(server.url(user="user:secret")))
        assert server.num_requests <= 2  # FFmpeg asks once without and once with the password
    assert states_of(items) == [REFUSED]
    assert str(status) in of_kind(items, SourceNotice)[0].detail


def test_a_camera_that_is_not_plugged_in_is_waited_for() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("cameras have other names here")
    items = read(open_stream("camera:987", live={"give_up_after_s": 0.3}))
    assert states_of(items) == [LOST, ENDED]
    notice = of_kind(items, SourceNotice)[0]
    assert (notice.source, notice.detail) == (
        "camera:987",
        "no connection: No such file or directory",
    )


def test_a_format_that_ffmpeg_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SourceError, match="cannot read dshow"):
        open_stream("camera:Webcam")


def test_pixels_that_do_not_become_rgb_are_counted(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_stream, "upright_rgb", lambda _: "no RGB")
    with listening() as (url, spec), pushing(clip, url):
        items = read(
            open_stream(spec),
            until=lambda items: getattr(items[-1], "reason", "") is DropReason.UNREADABLE,
        )
    rejected = of_kind(items, RejectedFrame)[-1]
    assert rejected.detail == "no RGB"


# -- credentials ----------------------------------------------------------------------------------


def test_credentials_open_the_stream_and_are_never_told(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with MjpegServer([jpeg(1)], user="user:s3cret", hangs_up=True) as server:
        stream = open_stream(server.url(user="user:s3cret"))
        items = read(stream, until=reported(CONNECTED, 2))
        server.user = "user:changed"
        items += read(stream, until=reported(REFUSED))
    with socket.socket() as closed:
        closed.bind((LOOPBACK, 0))
        url = f"rtsp://user:s3cret@{LOOPBACK}:{closed.getsockname()[1]}/x"
        items += read(open_stream(url, live={"give_up_after_s": 0.2}))
    assert {CONNECTED, LOST, REFUSED, ENDED} == set(states_of(items))
    for text in (repr(items), stream.info.label, caplog.text, *capfd.readouterr()):
        assert "s3cret" not in text
        assert "user" not in text


def test_a_certificate_has_to_be_trusted(tmp_path: Path) -> None:
    certificate, context = self_signed(tmp_path)
    with MjpegServer([jpeg(1)], context=context) as server:
        url = server.url(scheme="https", user="user:secret")
        refused = read(open_stream(url), until=reported(LOST))
        assert server.num_requests == 0
        known = read(open_stream(url, live={"ca_file": str(certificate)}), until=num_frames(1))
        trusting = read(open_stream(url, live={"verify_certificates": False}), until=num_frames(1))
    assert not frames_of(refused)
    assert "certificate" in of_kind(refused, SourceNotice)[0].detail
    assert states_of(known) == states_of(trusting) == [CONNECTED]


# -- RTMP and RTSP --------------------------------------------------------------------------------


@contextmanager
def listening() -> Any:
    """Where to push to, and the source that listens there."""
    url = f"rtmp://{LOOPBACK}:{free_port()}/live/drone"
    yield url, f"{url}?listen=1"


def test_a_drone_pushes_straight_to_the_engine(clip: Path) -> None:
    with listening() as (url, spec), pushing(clip, url):
        stream = open_stream(spec)
        items = read(stream, until=num_frames(20))
    frames = frames_of(items)
    assert stream.info.label == spec
    assert states_of(items)[0] is CONNECTED
    assert {frame.camera_key for frame in frames} == {"stream|160x120"}
    assert frames[0].jpeg is None
    assert_all_counted(items)
    assert_in_order_of_capture(items)
    for frame in frames[:5]:
        assert np.abs(frame.pixels.astype(int) - texture(frame.index % 30)).mean() < 12.0


def test_capture_times_keep_the_steps_of_the_stream(clip: Path) -> None:
    with listening() as (url, spec), pushing(clip, url):
        items = read(open_stream(spec), until=num_frames(20))
    frames = frames_of(items)
    steps_s = np.diff([frame.captured_at_s for frame in frames])
    steps = np.diff([frame.index for frame in frames])
    np.testing.assert_allclose(steps_s, steps / 15, atol=2e-3)


def test_a_sender_that_ends_is_lost_and_the_next_one_is_taken(tmp_path: Path) -> None:
    short = write_clip(tmp_path / "short.mp4", 12)
    with listening() as (url, spec):
        senders: list[subprocess.Popen[bytes]] = []
        stop = threading.Event()

        def send_again_and_again() -> None:
            while not stop.is_set():
                with running(push(short, url)) as sender:
                    senders.append(sender)
                    sender.wait()
                stop.wait(0.1)

        thread = threading.Thread(target=send_again_and_again)
        thread.start()
        try:
            items = read(open_stream(spec), until=reported(CONNECTED, 2))
        finally:
            stop.set()
            thread.join()
    assert states_of(items) == [CONNECTED, LOST, CONNECTED]
    assert len(frames_of(items)) + len(of_kind(items, RejectedFrame)) == 12


def test_nobody_pushing_is_no_loss(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    tries: list[StreamReader] = []
    read_once = StreamReader._read_once

    def count(reader: StreamReader) -> Any:
        tries.append(reader)
        return read_once(reader)

    async def wait_for_tries() -> None:
        await until(lambda: len(tries) == 3)
        leap(PATIENCE_S)

    monkeypatch.setattr(StreamReader, "_read_once", count)
    with listening() as (_, spec):
        live = {"open_timeout_s": 0.3, "give_up_after_s": PATIENCE_S}
        items = read(open_stream(spec, live=live), beside=wait_for_tries)
    assert states_of(items) == [ENDED]
    assert "waits for a stream to be pushed" in caplog.text


@pytest.mark.parametrize("num_others", [1, 40])
def test_who_connects_to_the_listener_and_sends_garbage_or_nothing_keeps_no_drone_out(
    clip: Path, num_others: int
) -> None:
    with listening() as (url, spec), ExitStack() as others:

        async def come() -> None:
            await asyncio.to_thread(crowd)
            others.enter_context(pushing(clip, url))

        def crowd() -> None:
            for number in range(num_others):
                client = others.enter_context(connected(url))
                with suppress(OSError):
                    client.sendall((b"", b"GET / HTTP/1.0\r\n\r\n", b"\x03")[number % 3])

        items = read(open_stream(spec), beside=come, until=num_frames(1))
    assert states_of(items) == [CONNECTED]


def test_who_begins_the_handshake_and_falls_silent_makes_room_for_a_drone(clip: Path) -> None:
    with listening() as (url, spec), ExitStack() as others:

        async def come() -> None:
            await asyncio.to_thread(begin)
            others.enter_context(pushing(clip, url))

        def begin() -> None:
            others.enter_context(connected(url)).sendall(b"\x03" + bytes(1536))

        live = {"read_timeout_s": 1.0}
        items = read(open_stream(spec, live=live), beside=come, until=num_frames(1))
    assert states_of(items) == [LOST, CONNECTED]
    assert "pushed no stream" in of_kind(items, SourceNotice)[0].detail


@contextmanager
def connected(url: str) -> Any:
    """A client of whoever comes to listen."""
    port = int(url.split(":")[2].partition("/")[0])
    clients: list[socket.socket] = []

    def is_let_in() -> bool:
        with suppress(OSError):
            clients.append(socket.create_connection((LOOPBACK, port)))
        return bool(clients)

    block_until(is_let_in, what=f"a listener on port {port}")
    with clients[0]:
        yield clients[0]


def test_a_port_that_is_taken_is_refused_before_the_run() -> None:
    with listening() as (url, spec):
        port = int(url.split(":")[2].partition("/")[0])
        with (
            socket.create_server((LOOPBACK, port)),
            pytest.raises(SourceError, match="cannot listen there: Address already in use"),
        ):
            open_stream(spec)


def test_a_listening_engine_says_where_to_push() -> None:
    with listening() as (url, spec):
        assert open_stream(spec).invitation() == f"waiting for a push to {url}"
    assert open_stream("rtsp://192.0.2.1/x").invitation() == ""


def test_a_sender_that_freezes_is_lost(clip: Path) -> None:
    with listening() as (url, spec), pushing(clip, url) as sender:

        def freeze(item: Item) -> None:
            if isinstance(item, Frame) and item.index >= 3:
                sender[0].send_signal(signal.SIGSTOP)

        stream = open_stream(spec, live={"read_timeout_s": 0.5})
        items = read(stream, after=freeze, until=reported(LOST))
    assert states_of(items) == [CONNECTED, LOST]
    assert of_kind(items, SourceNotice)[1].detail == "nothing came for 0.5 s"


def test_nginx_hands_on_what_is_pushed_to_it(clip: Path, tmp_path: Path) -> None:
    with rtmp_relay(tmp_path) as port:
        url = f"rtmp://{LOOPBACK}:{port}/live/drone"
        with pushing(clip, url):
            items = read(open_stream(url), until=num_frames(10))
    assert states_of(items)[-1] is CONNECTED
    assert_all_counted(items)
    assert_in_order_of_capture(items)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_rtsp_is_read_and_read_again_after_its_end(clip: Path, transport: str) -> None:
    with rtsp_server(clip) as port:
        url = f"rtsp://{LOOPBACK}:{port}/clip"
        stream = open_stream(url, live={"rtsp_transport": transport})
        items = read(stream, until=reported(CONNECTED, 2))
    assert states_of(items) == [CONNECTED, LOST, CONNECTED]
    frames = frames_of(items)
    assert {frame.camera_key for frame in frames} == {"stream|160x120"}
    assert len(frames) >= 15  # of 30; FFmpeg looks at the first for 0.5 s, which then come at once
    assert_all_counted(items)
    assert_in_order_of_capture(items)
    steps_s = np.diff([frame.captured_at_s for frame in frames])
    assert np.median(steps_s) == pytest.approx(1 / 15, abs=0.01)


def test_rtsp_with_a_password_is_opened_by_it_alone(clip: Path) -> None:
    with rtsp_server(clip, user="user", password="s3cret") as port:
        place = f"{LOOPBACK}:{port}/clip"
        good = read(open_stream(f"rtsp://user:s3cret@{place}"), until=num_frames(3))
        bad = read(open_stream(f"rtsp://user:wrong@{place}"))
        none = read(open_stream(f"rtsp://{place}"))
    assert states_of(good) == [CONNECTED]
    assert states_of(bad) == states_of(none) == [REFUSED]
    assert "wrong" not in repr(bad)


def test_an_rtsp_server_that_is_killed_and_comes_back_is_found_again(clip: Path) -> None:
    port = free_port()
    stream = open_stream(f"rtsp://{LOOPBACK}:{port}/clip")

    async def follow() -> list[Item]:
        items: list[Item] = []
        async with asyncio.timeout(HANG_S), aclosing(items_of(stream)) as arriving:
            for wanted in (num_frames(3), num_frames(6)):
                with rtsp_server(clip, port=port):
                    while not wanted(items):
                        items.append(await anext(arriving))
                while states_of(items)[-1] is CONNECTED and wanted(items):
                    items.append(await anext(arriving))
        return items

    items = asyncio.run(follow())
    states = states_of(items)
    assert states.count(CONNECTED) == 2
    assert states[-1] is LOST
    assert_all_counted(items)
    assert_in_order_of_capture(items)


# -- leaving --------------------------------------------------------------------------------------


@pytest.fixture
def _closing_waits_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_reader, "_JOIN_S", HANG_S)


waits_for_the_thread = pytest.mark.usefixtures("_closing_waits_for_the_thread")


def leave_when(
    spec: str, *, is_time: Callable[[AsyncGenerator[Item, None]], Awaitable[None]]
) -> None:
    """Closes a stream; hangs where closing waits for what comes or for a time-out."""
    never = {name: 2 * HANG_S for name in ("open_timeout_s", "read_timeout_s")}

    async def leave() -> None:
        arriving = items_of(open_stream(spec, live=never))
        await is_time(arriving)
        await asyncio.wait_for(arriving.aclose(), HANG_S)

    asyncio.run(leave(), debug=True)


def after(happened: threading.Event) -> Callable[[AsyncGenerator[Item, None]], Awaitable[None]]:
    async def is_time(arriving: AsyncGenerator[Item, None]) -> None:
        waiting = asyncio.create_task(anext(arriving))
        await until(happened.is_set)
        waiting.cancel()
        await asyncio.wait((waiting,))

    return is_time


async def after_a_frame(arriving: AsyncGenerator[Item, None]) -> None:
    while not isinstance(await anext(arriving), Frame):
        pass


@waits_for_the_thread
@pytest.mark.parametrize("scheme", ["rtsp", "rtmp", "http", "rtsps"])
def test_closing_does_not_wait_for_a_server_that_says_nothing(scheme: str) -> None:
    is_connected = threading.Event()
    with raw_server(on_connection=is_connected.set) as port:
        url = f"{scheme}://{LOOPBACK}:{port}/x/y"
        leave_when(url, is_time=after(is_connected))
        assert_thread_ends(f"stream {url}")


@waits_for_the_thread
def test_closing_does_not_wait_for_whoever_might_push_and_frees_the_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_waiting = threading.Event()
    wait = PushListener.wait

    def wait_from_now(listener: PushListener, *args: Any, **kwargs: Any) -> Publisher | None:
        is_waiting.set()
        return wait(listener, *args, **kwargs)

    monkeypatch.setattr(PushListener, "wait", wait_from_now)
    with listening() as (url, spec):
        leave_when(spec, is_time=after(is_waiting))
        assert_thread_ends(f"stream {spec}")
        port = int(url.split(":")[2].partition("/")[0])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, port))


@waits_for_the_thread
@pytest.mark.parametrize("num_parts", [1, 200], ids=["standing still", "flowing"])
def test_closing_while_connected_ends_the_thread(num_parts: int) -> None:
    with MjpegServer([jpeg(1)] * num_parts) as server:
        leave_when(server.url(), is_time=after_a_frame)
        assert_thread_ends(f"stream {server.url()}")


@waits_for_the_thread
def test_closing_between_two_tries_ends_the_thread_at_once() -> None:
    url = f"rtsp://{LOOPBACK}:{free_port()}/x"

    never = {name: 2 * HANG_S for name in ("retry_first_s", "retry_max_s")}

    async def leave() -> None:
        arriving = items_of(open_stream(url, live=never))
        assert isinstance(await anext(arriving), SourceNotice)
        await asyncio.wait_for(arriving.aclose(), HANG_S)

    asyncio.run(leave())
    assert_thread_ends(f"stream {url}")


def test_a_process_that_leaves_in_the_midst_of_connecting_ends_well() -> None:
    program = textwrap.dedent("""
        import asyncio, sys
        from adapters.sources.streams.live_stream import LiveStream
        from engine.config import LiveSourcesConfig, SourcesConfig

        async def connect(url):
            stream = LiveStream(url, sources=SourcesConfig(),
                live_sources=LiveSourcesConfig(open_timeout_s=60.0), next_frame_id=lambda: 1)
            await stream.receive(lambda item: None)

        async def main():
            tasks = [asyncio.create_task(connect(url)) for url in sys.argv[1:]]
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        asyncio.run(main())
        print("left")
    """)
    with raw_server() as port, listening() as (_, spec):
        urls = [f"{scheme}://{LOOPBACK}:{port}/live/x" for scheme in ("rtmp", "rtsp", "http")]
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *urls, spec],
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "left", "")
