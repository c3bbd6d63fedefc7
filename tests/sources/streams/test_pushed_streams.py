"""Streams that others send: SRT and MPEG-TS in UDP, HEVC and sound by RTMP, early senders."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from adapters.sources.streams import srt_program
from adapters.sources.streams.datagrams import holds_transport_stream
from adapters.sources.streams.patience import ready
from adapters.sources.streams.push_listener import listening_early
from adapters.sources.streams.srt_program import SrtProgram
from adapters.sources.streams.stream_address import parse_stream_address
from engine.config import LiveSourcesConfig
from engine.errors import SourceError
from engine.types import Frame, SourceState
from tests.support.live_streams import (
    assert_all_counted,
    assert_in_order_of_capture,
    details_of,
    frames_of,
    num_frames,
    open_stream,
    read,
    reported,
    states_of,
)
from tests.support.stream_servers import (
    LOOPBACK,
    free_port,
    program,
    running,
    texture,
    write_clip,
)
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.network

CONNECTED, LOST = SourceState.CONNECTED, SourceState.LOST
QUICK_END = {"retry_first_s": 1e3, "retry_max_s": 1e3}  # what is lost is not tried again


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.ts", 60)


@contextmanager
def sending(clip: Path, url: str) -> Iterator[None]:
    """ffmpeg sending a clip as MPEG-TS over and over, again when nobody takes it."""
    stop = threading.Event()
    current: list[subprocess.Popen[bytes]] = []
    command = [program("ffmpeg"), "-loglevel", "quiet", "-re", "-stream_loop", "-1"]
    command += ["-i", str(clip), "-c", "copy", "-f", "mpegts", url]

    def keep_sending() -> None:
        while not stop.wait(0.05):
            with running(subprocess.Popen(command, stdin=subprocess.DEVNULL)) as process:
                current[:] = [process]
                process.wait()

    thread = threading.Thread(target=keep_sending)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        while thread.is_alive():
            for process in current:
                process.kill()
            thread.join(0.05)


def assert_shows_the_clip(items: list[Any]) -> None:
    frames = frames_of(items)
    assert {frame.camera_key for frame in frames} == {"stream|160x120"}
    assert_all_counted(items)
    assert_in_order_of_capture(items)
    steps_s = np.diff([frame.captured_at_s for frame in frames])
    assert np.median(steps_s) == pytest.approx(1 / 15, abs=2e-3)


# -- MPEG-TS --------------------------------------------------------------------------------------


def test_datagrams_are_received_at_their_address(clip: Path) -> None:
    port = free_port()
    stream = open_stream(f"udp://{LOOPBACK}:{port}")
    assert stream.invitation() == f"waiting for a push to udp://{LOOPBACK}:{port}"
    with sending(clip, f"udp://{LOOPBACK}:{port}?pkt_size=1316"):
        items = read(stream, until=num_frames(20))
    assert states_of(items) == [CONNECTED]
    assert_shows_the_clip(items)


def test_nobody_sending_datagrams_is_no_loss() -> None:
    live = {"open_timeout_s": 0.1, "give_up_after_s": 1.5}
    items = read(open_stream(f"udp://{LOOPBACK}:{free_port()}", live=live))
    assert states_of(items) == [SourceState.ENDED]


def test_a_sender_of_datagrams_that_falls_silent_is_lost(clip: Path) -> None:
    port = free_port()
    data = clip.read_bytes()
    enough = threading.Event()

    def send() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sender:
            for place in itertools.cycle(range(0, len(data), 1316)):
                sender.sendto(data[place : place + 1316], (LOOPBACK, port))
                if enough.wait(2e-3):
                    return

    stream = open_stream(f"udp://{LOOPBACK}:{port}", live={**QUICK_END, "read_timeout_s": 0.5})
    thread = threading.Thread(target=send)
    thread.start()
    try:
        items = read(
            stream,
            after=lambda item: enough.set() if isinstance(item, Frame) else None,
            until=reported(LOST),
        )
    finally:
        enough.set()
        thread.join()
    assert states_of(items) == [CONNECTED, LOST]
    assert details_of(items, LOST) == ["nothing came for 0.5 s"]


@pytest.mark.parametrize("datagram", [b"\x80\x60hello" * 99, b"G", b"G" + bytes(1315)])
def test_datagrams_without_mpeg_ts_are_told_from_none(datagram: bytes) -> None:
    port = free_port()
    live = {**QUICK_END, "open_timeout_s": 60.0}
    enough = threading.Event()

    def send() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sender:
            while not enough.wait(2e-3):
                sender.sendto(datagram, (LOOPBACK, port))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        items = read(open_stream(f"udp://{LOOPBACK}:{port}", live=live), until=reported(LOST))
    finally:
        enough.set()
        thread.join()
    assert details_of(items, LOST)[0].startswith("what comes is no MPEG-TS: it begins with ")


def test_datagrams_to_a_group_are_received(clip: Path) -> None:
    place = f"udp://239.255.77.7:{free_port()}"
    stream = open_stream(f"{place}?localaddr={LOOPBACK}")
    assert stream.invitation() == f"waiting for a push to {place}"
    with sending(clip, f"{place}?pkt_size=1316&localaddr={LOOPBACK}"):
        items = read(stream, until=num_frames(5))
    assert states_of(items) == [CONNECTED]


def test_mpeg_ts_is_known_wherever_it_begins(clip: Path) -> None:
    data = clip.read_bytes()
    assert holds_transport_stream(data[: 7 * 188])
    assert holds_transport_stream(data[100 : 100 + 7 * 188])
    assert holds_transport_stream(bytes(12) + data[: 7 * 188])  # behind a header of RTP
    assert not holds_transport_stream(bytes(7 * 188))
    assert not holds_transport_stream(data[:100])


def test_a_port_of_datagrams_that_is_taken_is_refused_before_the_run() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind((LOOPBACK, 0))
        with pytest.raises(SourceError, match="cannot listen there: Address already in use"):
            open_stream(f"udp://{LOOPBACK}:{taken.getsockname()[1]}")
    with pytest.raises(SourceError, match="cannot listen there"):
        open_stream("udp://192.0.2.1:5000")  # not this computer's


def needs_srt() -> None:
    protocols = subprocess.run(
        [program("ffmpeg"), "-hide_banner", "-protocols"], capture_output=True, check=True
    )
    if b" srt\n" not in protocols.stdout:
        pytest.skip("the program ffmpeg does not know SRT")


PASSPHRASE = "passphrase=s3cret-enough"


def test_srt_is_received_where_a_sender_connects(clip: Path, capfd: Any) -> None:
    needs_srt()
    place = f"srt://{LOOPBACK}:{free_port()}"
    stream = open_stream(f"{place}?mode=listener&{PASSPHRASE}")
    assert stream.invitation() == f"waiting for a push to {place}"
    with sending(clip, f"{place}?{PASSPHRASE}"):
        items = read(stream, until=num_frames(20))
    assert states_of(items) == [CONNECTED]
    assert_shows_the_clip(items)
    assert "s3cret" not in repr(items) + "".join(capfd.readouterr())


def test_nobody_connecting_by_srt_is_no_loss() -> None:
    needs_srt()
    live = {"open_timeout_s": 0.1, "read_timeout_s": 0.1, "give_up_after_s": 1.5}
    items = read(open_stream(f"srt://{LOOPBACK}:{free_port()}?mode=listener", live=live))
    assert states_of(items) == [SourceState.ENDED]


def test_srt_is_pulled_from_a_server_and_found_again(clip: Path) -> None:
    needs_srt()
    place = f"srt://{LOOPBACK}:{free_port()}"
    with sending(clip, f"{place}?mode=listener"):
        items = read(open_stream(place), until=num_frames(5))
        items += read(open_stream(place), until=num_frames(5))
    assert states_of(items)[-1] is CONNECTED
    assert len(frames_of(items)) >= 10


def test_the_passphrase_of_srt_is_in_no_command_line(clip: Path) -> None:
    needs_srt()
    commands: list[str] = []
    place = f"srt://{LOOPBACK}:{free_port()}"

    def look(_: object) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                commands.append(path.read_text(errors="replace").replace("\0", " "))

    with sending(clip, f"{place}?mode=listener"):
        read(open_stream(f"{place}?streamid=s3cret"), until=num_frames(1), after=look)
    assert any("ffconcat" in command or "concat" in command for command in commands)
    assert not any("s3cret" in command for command in commands)


def test_no_srt_server_is_said() -> None:
    needs_srt()
    items = read(
        open_stream(f"srt://{LOOPBACK}:{free_port()}", live=QUICK_END), until=reported(LOST)
    )
    assert "no SRT server answers there" in details_of(items, LOST)[0]


_ENTER = """
import threading
from adapters.sources.streams.srt_program import SrtProgram
from adapters.sources.streams.stream_address import parse_stream_address
from engine.config import LiveSourcesConfig
config = LiveSourcesConfig()
address = parse_stream_address("srt://127.0.0.1:9000?mode=listener", config=config)
with SrtProgram(address, config=config, stop=threading.Event()):
    threading.Event().wait()
"""


def test_the_program_of_srt_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("Linux alone ends a program with whoever started it")
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    stand_in = tmp_path / "ffmpeg"  # holds the pipe open until it ends
    stand_in.write_text(f"#!/bin/sh\nexec > '{alive}'\necho $$\nexec tail -f /dev/null\n")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.Popen([sys.executable, "-c", _ENTER], env=environment)
    with running(run), alive.open("rb", buffering=0) as said:
        number = int(said.readline())
        run.kill()
        try:
            assert ready([said.fileno()], HANG_S)
            assert said.read() == b""
        finally:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def test_a_program_of_srt_that_takes_no_address_is_not_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(_: object, **pipes: Any) -> subprocess.Popen[bytes]:
        deaf = "exec 0<&-; echo; exec tail -f /dev/null"
        process = popen(["sh", "-c", deaf], **pipes)
        assert process.stdout is not None
        process.stdout.readline()
        started.append(process)
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    config = LiveSourcesConfig()
    address = parse_stream_address("srt://127.0.0.1:9000", config=config)
    with pytest.raises(BrokenPipeError), SrtProgram(address, config=config, stop=threading.Event()):
        pass
    assert started[0].returncode == -signal.SIGKILL


def test_without_a_program_that_knows_srt_what_does_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if srt_program._ffmpeg_knows_srt():
        pytest.skip("FFmpeg as it is here knows SRT itself")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match="apt install ffmpeg") as caught:
        open_stream(f"srt://{LOOPBACK}:9000?passphrase=s3cret-enough")
    assert "s3cret" not in str(caught.value)


# -- RTMP -----------------------------------------------------------------------------------------


_SEND = """
import sys
import av
file, url = sys.argv[1:]
with av.open(file) as source, av.open(url, "w", format="flv") as target:
    streams = [target.add_stream_from_template(stream) for stream in source.streams]
    last = [0.0 for _ in streams]
    for packet in source.demux():
        if packet.size:
            number, step = packet.stream.index, 1 / 30 if packet.stream.type == "video" else 0.0
            if step:  # times of joined files begin anew
                packet.pts = packet.dts = round(last[number] / packet.time_base)
                last[number] += step
            packet.stream = streams[number]
            target.mux(packet)
"""


@contextmanager
def pushing_flv(file: Path, url: str) -> Iterator[None]:
    """Sends a file once by RTMP, by FFmpeg as PyAV has it: ffmpeg may know no HEVC in FLV.

    In a process of its own, because PyAV connects while it keeps the interpreter locked.
    """
    with running(subprocess.Popen([sys.executable, "-c", _SEND, str(file), url])):
        yield


def write_flv(path: Path, *, codec: str, with_sound: bool) -> Path:
    """30 frames at 30 Hz; frame n shows ``texture(n)``."""
    options = {"preset": "ultrafast", "tune": "zerolatency", "g": "5"}
    if codec == "libx265":
        options["x265-params"] = "log-level=none:keyint=5"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = 160, 120
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=48000) if with_sound else None
        assert sound is None or isinstance(sound, av.AudioStream)
        for number in range(30):
            picture = av.VideoFrame.from_ndarray(texture(number), format="rgb24")
            container.mux(stream.encode(picture))
            if sound is not None:
                silence = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1600), np.float32), format="fltp", layout="mono"
                )
                silence.sample_rate = 48000
                container.mux(sound.encode(silence))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("with_sound", [True, False])
def test_rtmp_brings_h264_and_hevc_with_sound_or_without(
    codec: str, with_sound: bool, tmp_path: Path
) -> None:
    file = write_flv(tmp_path / "clip.flv", codec=codec, with_sound=with_sound)
    url = f"rtmp://{LOOPBACK}:{free_port()}/live/drone"
    stream = open_stream(f"{url}?listen=1", live=QUICK_END)
    with pushing_flv(file, url):
        items = read(stream, until=reported(LOST))
    name = {"libx264": "h264", "libx265": "hevc"}[codec]
    assert details_of(items, CONNECTED) == [f"{name}, 160 x 120 px"]
    frames = frames_of(items)
    assert len(frames) == 30
    for frame in frames:
        assert np.abs(frame.pixels.astype(int) - texture(frame.index)).mean() < 20.0
    np.testing.assert_allclose(np.diff([f.captured_at_s for f in frames]), 1 / 30, atol=2e-3)


def test_a_size_that_changes_in_the_midst_of_a_push_is_another_camera(tmp_path: Path) -> None:
    sizes = ((160, 120), (320, 240))
    clips = [write_clip(tmp_path / f"{size[0]}.flv", 10, size=size) for size in sizes]
    joined = tmp_path / "joined.flv"
    joined.write_bytes(clips[0].read_bytes() + clips[1].read_bytes()[13:])  # tags after a header
    url = f"rtmp://{LOOPBACK}:{free_port()}/live/drone"
    stream = open_stream(f"{url}?listen=1", live=QUICK_END)
    with pushing_flv(joined, url):
        items = read(stream, until=reported(LOST))
    keys = [frame.camera_key for frame in frames_of(items)]
    assert keys == ["stream|160x120"] * 10 + ["stream|320x240"] * 10
    assert states_of(items) == [CONNECTED, LOST]


def test_who_pushes_before_the_run_reads_waits_and_is_taken(tmp_path: Path) -> None:
    file = write_flv(tmp_path / "clip.flv", codec="libx264", with_sound=False)
    url = f"rtmp://{LOOPBACK}:{free_port()}/live/drone"
    stream = open_stream(f"{url}?listen=1", live=QUICK_END)
    with socket.create_connection((LOOPBACK, int(url.split(":")[2].partition("/")[0]))):
        pass  # it listens from here on
    with pushing_flv(file, url):
        items = read(stream, until=reported(LOST))
    assert len(frames_of(items)) == 30


def test_a_stream_that_is_never_read_frees_its_port() -> None:
    port = free_port()
    stream = open_stream(f"rtmp://{LOOPBACK}:{port}/live?listen=1")
    with socket.create_connection((LOOPBACK, port)):
        pass  # whoever is early is let in
    del stream
    with socket.create_server((LOOPBACK, port)):
        pass


def test_a_port_listens_before_anything_of_a_run_is_set_up() -> None:
    place = LOOPBACK, free_port()
    specs = [f"rtmp://{LOOPBACK}:{place[1]}/live?listen=1", "photos", "rtmp://host/x"]
    with listening_early(specs) as early:
        assert list(early) == [place]
        with socket.create_connection(place):
            stream = open_stream(specs[0], early=early)
            assert not early  # the stream has it now
    del stream
    with listening_early(specs):
        pass  # refused before it was opened
    with socket.create_server(place):
        pass


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("rtsp://no-such-host.invalid/x", "no connection: the host's name is unknown"),
        ("rtmp://no-such-host.invalid/live/x", "no connection: the host's name is unknown"),
        ("rtmp://127.0.0.1:1/live/x", "no connection: Connection refused"),
    ],
)
def test_a_host_that_is_not_there_is_told_from_one_that_refuses(url: str, words: str) -> None:
    items = read(open_stream(url, live=QUICK_END), until=reported(LOST))
    assert details_of(items, LOST)[0].startswith(words)
