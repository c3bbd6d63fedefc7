"""HTTP addresses of every kind, from servers on loopback: frames come, or the right words."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest

from adapters.sources.streams import http_files
from adapters.sources.streams.container_reading import ContainerReader
from adapters.sources.streams.http_client import HttpAnswer, HttpClient
from adapters.sources.streams.http_files import HttpFile, HttpFiles
from adapters.sources.streams.patience import StreamError
from engine.types import DropReason, Frame, RejectedFrame, SourceNotice, SourceState
from tests.support.http_servers import (
    Answer,
    HttpServer,
    Request,
    body,
    file_in_ranges,
    head,
    moved,
    parts,
    status,
)
from tests.support.live_streams import (
    assert_all_counted,
    assert_in_order_of_capture,
    details_of,
    frames_of,
    num_frames,
    of_kind,
    open_stream,
    read,
    reported,
    states_of,
)
from tests.support.received import Decoded as Item
from tests.support.small_videos import write_video
from tests.support.stream_servers import jpeg, texture, write_clip
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.network

CONNECTED, LOST = SourceState.CONNECTED, SourceState.LOST
REFUSED, ENDED = SourceState.REFUSED, SourceState.ENDED
PICTURES = [jpeg(number) for number in range(6)]
QUICK_END = {"retry_first_s": 1e3, "retry_max_s": 1e3}  # what is lost is not tried again


def serve(
    answers: dict[str, Answer],
    *,
    until: Callable[[list[Item]], bool],
    path: str = "/x",
    live: dict[str, Any] | None = None,
    **limits: Any,
) -> list[Item]:
    """What comes of a path of a server."""
    with HttpServer(answers) as server:
        return read(open_stream(server.url(path), live=live, **limits), until=until)


def words_for(answer: Answer, **live: Any) -> str:
    """Why a stream is lost or refused at once."""
    items = serve(
        {"/x": answer},
        until=lambda items: isinstance(items[-1], SourceNotice),
        live={**QUICK_END, **live},
    )
    assert not frames_of(items)
    assert states_of(items)[0] in {LOST, REFUSED}
    return of_kind(items, SourceNotice)[0].detail


# -- pictures -------------------------------------------------------------------------------------

MJPEG_FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without lengths": {"with_length": False},
    "without the first boundary": {"with_first_boundary": False},
    "with neither": {"with_first_boundary": False, "with_length": False},
    "boundary announced with its hyphens and in quotes": {
        "content_type": 'multipart/x-mixed-replace; boundary="--part"'
    },
    "with neither, and announced with hyphens": {
        "content_type": 'multipart/x-mixed-replace; boundary="--part"',
        "with_first_boundary": False,
        "with_length": False,
    },
    "another boundary than announced": {"boundary": b"--other"},
    "no Content-Type": {"content_type": ""},
    "a Content-Type that is none": {"content_type": "application/octet-stream"},
    "chunked": {"is_chunked": True},
    "with times": {"more": b"X-Timestamp: 1733.25\r\n"},
}


@pytest.mark.parametrize("form", MJPEG_FORMS.values(), ids=MJPEG_FORMS)
def test_mjpeg_comes_in_every_form_that_cameras_send(form: dict[str, Any]) -> None:
    servers: list[HttpServer] = []
    answer = parts(lambda: servers[0], PICTURES, **form)
    with HttpServer({"/x": answer}) as server:
        servers.append(server)
        items = read(open_stream(server.url("/x")), until=num_frames(5))
    assert states_of(items) == [CONNECTED]
    assert not of_kind(items, RejectedFrame)
    assert_all_counted(items)
    for frame, picture in zip(frames_of(items), PICTURES, strict=False):
        assert frame.jpeg is not None
        assert frame.jpeg.rstrip(b"\r\n") == picture


def test_a_snapshot_is_asked_for_again_and_the_same_bytes_are_one_frame() -> None:
    number = itertools.count()

    def answer(request: Request) -> None:
        body(PICTURES[next(number) // 2 % 6], "image/jpeg")(request)

    items = serve({"/x": answer}, until=num_frames(4), live={"snapshot_rate_hz": 100.0})
    assert states_of(items) == [CONNECTED]
    assert details_of(items, CONNECTED) == ["mjpeg, 160 x 120 px"]
    assert [frame.jpeg for frame in frames_of(items)] == PICTURES[:4]
    assert_all_counted(items)
    assert_in_order_of_capture(items)


@pytest.mark.parametrize("content_type", ["image/jpeg", "", "application/octet-stream"])
@pytest.mark.parametrize("with_length", [True, False])
def test_a_snapshot_is_known_by_its_bytes(content_type: str, with_length: bool) -> None:
    answer = body(PICTURES[0], content_type, with_length=with_length)
    assert len(frames_of(serve({"/x": answer}, until=num_frames(1)))) == 1


def test_a_snapshot_that_is_gone_is_lost_and_found_again() -> None:
    number = itertools.count()

    def answer(request: Request) -> None:
        asked = next(number)
        (status(503) if asked in {2, 3} else body(PICTURES[asked % 6], "image/jpeg"))(request)

    items = serve({"/x": answer}, until=num_frames(4), live={"snapshot_rate_hz": 100.0})
    assert states_of(items) == [CONNECTED, LOST, CONNECTED]
    assert details_of(items, LOST) == ["connected, but the server says: 503 Service Unavailable"]


def test_a_snapshot_is_not_asked_for_more_often_than_it_may_be() -> None:
    number = itertools.count()

    def answer(request: Request) -> None:
        body(PICTURES[next(number) % 6])(request)

    items = serve({"/x": answer}, until=num_frames(4), live={"snapshot_rate_hz": 10.0})
    frames = frames_of(items)
    assert frames[-1].captured_at_s - frames[0].captured_at_s > 0.25


def test_a_snapshot_that_is_too_large_is_counted_and_not_kept() -> None:
    huge = PICTURES[0] + bytes(3_000_000)
    items = serve(
        {"/x": body(huge, with_length=False)},
        until=lambda items: len(of_kind(items, RejectedFrame)) == 3,
        live={"max_payload_mb": 1, "snapshot_rate_hz": 100.0},
    )
    assert {one.reason for one in of_kind(items, RejectedFrame)} == {DropReason.TOO_LARGE}
    assert states_of(items) == [CONNECTED]


def test_a_redirect_leads_to_the_stream() -> None:
    answers = {"/x": moved("/y"), "/y": moved("/z?a=b", 308), "/z": body(PICTURES[0])}
    assert len(frames_of(serve(answers, until=num_frames(1)))) == 1


# -- video ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """12 frames at 30 Hz, its index at the end."""
    folder = tmp_path_factory.mktemp("mp4")
    return write_clip(folder / "clip.mp4", 12, rate_hz=30).read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv"])
def test_a_stored_video_is_played_once_and_ends(suffix: str, tmp_path: Path) -> None:
    data = write_clip(tmp_path / f"clip{suffix}", 12, rate_hz=30).read_bytes()
    items = serve({"/x": file_in_ranges(data)}, until=reported(ENDED))
    frames = frames_of(items)
    assert states_of(items) == [CONNECTED, ENDED]
    assert details_of(items, CONNECTED) == ["h264, 160 x 120 px"]
    assert details_of(items, ENDED) == ["the video is over"]
    assert len(frames) == 12
    for frame in frames:
        assert np.abs(frame.pixels.astype(int) - texture(frame.index)).mean() < 12.0
    np.testing.assert_allclose(np.diff([f.captured_at_s for f in frames]), 1 / 30, atol=2e-3)


def test_a_stored_video_comes_no_faster_than_it_was_taken(short_mp4: bytes) -> None:
    items = serve({"/x": file_in_ranges(short_mp4)}, until=reported(ENDED))
    frames = frames_of(items)
    assert frames[-1].received_at_s - frames[0].received_at_s > 11 / 30 - 0.02


def test_a_video_with_its_index_at_the_end_needs_no_server_that_gives_parts(
    short_mp4: bytes,
) -> None:
    assert short_mp4.index(b"moov") > short_mp4.index(b"mdat")
    items = serve({"/x": body(short_mp4, "video/mp4")}, until=reported(ENDED))
    assert len(frames_of(items)) == 12


def test_a_video_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    data = write_video(tmp_path / "clip.mp4", 30).read_bytes()  # its index in front
    number = itertools.count()

    def answer(request: Request) -> None:
        if next(number):
            file_in_ranges(data)(request)
        else:
            head(request, Content_Length=len(data))
            request.wfile.write(data[: len(data) * 2 // 3])

    items = serve({"/x": answer}, until=reported(ENDED))
    assert states_of(items) == [CONNECTED, LOST, CONNECTED, ENDED]
    marks = [round(float(frame.pixels[:, :30].mean())) for frame in frames_of(items)]
    assert len(marks) == 30
    np.testing.assert_allclose(marks, range(30), atol=3)


def test_a_stored_video_that_fails_is_not_said_to_be_over(
    short_mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "connected, but nothing that comes can be decoded"
    monkeypatch.setattr(ContainerReader, "read", lambda reader, **_: words)
    items = serve({"/x": file_in_ranges(short_mp4)}, until=reported(LOST), live=QUICK_END)
    assert states_of(items) == [CONNECTED, LOST]
    assert details_of(items, LOST) == [words]


def test_two_sizes_in_one_stream_are_two_cameras(tmp_path: Path) -> None:
    data = b"".join(
        write_clip(tmp_path / f"{size[0]}.ts", 10, size=size).read_bytes()
        for size in ((160, 120), (320, 240))
    )
    items = serve({"/x": body(data, "video/mp2t", with_length=False)}, until=num_frames(19))
    keys = [frame.camera_key for frame in frames_of(items)]
    assert set(keys) == {"stream|160x120", "stream|320x240"}
    assert keys == sorted(keys)


def playlist(*pieces: str, duration_s: int = 1, ends: bool = True) -> bytes:
    """A media playlist (RFC 8216)."""
    lines = ["#EXTM3U", "#EXT-X-VERSION:3", f"#EXT-X-TARGETDURATION:{duration_s}"]
    for piece in pieces:
        lines += [f"#EXTINF:{duration_s}.0,", piece]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if ends else []), ""]).encode()


def pieces_of_video(folder: Path, num: int = 2) -> dict[str, Answer]:
    """MPEG-TS pieces of ten frames at 15 Hz, as FFmpeg cuts a stream for HLS; by path."""
    pieces = str(folder / "piece%d")
    write_playlist(folder, 10 * num, {"hls_time": "0.6", "hls_segment_filename": pieces})
    names = [f"piece{number}" for number in range(num)]
    return {f"/{name}": body((folder / name).read_bytes()) for name in names}


def write_playlist(folder: Path, num_frames: int, options: dict[str, str]) -> None:
    """Frame n shows ``texture(n)``."""
    options = {"hls_list_size": "0", **options}
    with av.open(str(folder / "list.m3u8"), "w", format="hls", options=options) as container:
        stream = container.add_stream(
            "libx264", rate=15, options={"tune": "zerolatency", "g": "10", "preset": "ultrafast"}
        )
        stream.width, stream.height = 160, 120
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(texture(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    "options",
    [{}, {"hls_segment_type": "fmp4"}, {"hls_flags": "single_file"}],
    ids=["pieces", "fragments with a header of their own", "parts of one file"],
)
def test_playlists_as_ffmpeg_makes_them_are_read(options: dict[str, str], tmp_path: Path) -> None:
    write_playlist(tmp_path, 20, {"hls_time": "0.6", "hls_playlist_type": "vod", **options})
    answers = {f"/{path.name}": file_in_ranges(path.read_bytes()) for path in tmp_path.iterdir()}
    items = serve(answers, until=reported(ENDED), path="/list.m3u8")
    assert states_of(items) == [CONNECTED, ENDED]
    assert len(frames_of(items)) == 20
    assert not of_kind(items, RejectedFrame)


@pytest.mark.parametrize("path", ["/x", "/live/list"])
def test_a_playlist_that_ends_is_played_once(path: str, tmp_path: Path) -> None:
    answers = {
        **pieces_of_video(tmp_path),
        path: body(playlist("/piece0", "../piece1"), "application/vnd.apple.mpegurl"),
    }
    items = serve(answers, until=reported(ENDED), path=path)
    assert states_of(items) == [CONNECTED, ENDED]
    assert len(frames_of(items)) == 20
    assert_all_counted(items)


def test_a_master_playlist_leads_to_its_pieces(tmp_path: Path) -> None:
    master = b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=90000\nlow/list.m3u8\n"
    answers = {
        **pieces_of_video(tmp_path),
        "/x": body(master),
        "/low/list.m3u8": body(playlist("/piece0", "/piece1")),
    }
    assert len(frames_of(serve(answers, until=reported(ENDED)))) == 20


def test_of_several_variants_the_first_is_read_and_no_other(tmp_path: Path) -> None:
    master = b"#EXTM3U\n" + b"".join(
        b"#EXT-X-STREAM-INF:BANDWIDTH=%d\n/%s\n" % (bandwidth, name)
        for bandwidth, name in ((90000, b"first"), (900000, b"second"))
    )
    pieces = pieces_of_video(tmp_path, 6)
    others = {f"/other{path}": piece for path, piece in pieces.items()}
    answers = {
        **pieces,
        **others,
        "/x": body(master),
        "/first": body(playlist(*pieces)),
        "/second": body(playlist(*others)),
    }
    with HttpServer(answers) as server:
        items = read(open_stream(server.url("/x")), until=reported(ENDED))
    assert len(frames_of(items)) == 60
    asked = [path for path, _ in server.requests]
    assert "/other/piece5" not in asked
    assert sum(path.startswith("/other") for path in asked) <= 3  # that are looked at


def test_a_playlist_of_too_many_variants_is_refused() -> None:
    variants = b"".join(b"#EXT-X-STREAM-INF:BANDWIDTH=1\n/%d\n" % n for n in range(5000))
    assert "too long" in words_for(body(b"#EXTM3U\n" + variants))


def test_a_playlist_whose_variants_lead_to_ever_more_variants_is_refused() -> None:
    number = itertools.count()

    def answer(request: Request) -> None:
        lines = (b"#EXT-X-STREAM-INF:BANDWIDTH=1\n/x?%d\n" % next(number) for _ in range(50))
        body(b"#EXTM3U\n" + b"".join(lines))(request)

    assert "too long" in words_for(answer)
    assert next(number) <= 500


def test_a_playlist_that_grows_is_read_on(tmp_path: Path) -> None:
    pieces = pieces_of_video(tmp_path, 3)
    asked = itertools.count(1)

    def answer(request: Request) -> None:
        num = min(next(asked), 3)
        body(playlist(*list(pieces)[:num], ends=num == 3))(request)

    items = serve({**pieces, "/x": answer}, until=num_frames(30))
    assert states_of(items)[0] is CONNECTED
    assert len(frames_of(items)) == 30


def test_a_playlist_that_stands_still_is_lost(tmp_path: Path) -> None:
    answers = {**pieces_of_video(tmp_path), "/x": body(playlist("/piece0", "/piece1", ends=False))}
    items = serve(answers, until=reported(LOST), live={**QUICK_END, "read_timeout_s": 0.5})
    assert len(frames_of(items)) >= 18  # where one ends, the next one says
    assert details_of(items, LOST) == ["nothing came for 2.5 s"]  # two pieces of 1 s more


# -- where playlists must not lead ----------------------------------------------------------------


def test_a_playlist_opens_no_file_of_this_computer(tmp_path: Path) -> None:
    (tmp_path / "secret.ts").write_bytes(write_clip(tmp_path / "clip.ts", 10).read_bytes())
    for url in (
        f"file://{tmp_path}/secret.ts",
        f"file:{tmp_path}/secret.ts",
        f"{tmp_path}/secret.ts",  # of the server
        f"concat:{tmp_path}/secret.ts",
        f"subfile,,start,0,end,0,,:{tmp_path}/secret.ts",
        "data:video/mp2t;base64,R0A=",
        "tcp://127.0.0.1:9/",
        "ftp://127.0.0.1/x.ts",
    ):
        assert "playlist" in words_for(body(playlist(url)))


def test_a_public_server_leads_into_no_private_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.sources.streams import http_client

    spaces = {"127.0.0.1": 2, "127.0.0.2": 1}  # as if the first were a public address
    monkeypatch.setattr(http_client, "_space_of", spaces.__getitem__)
    with HttpServer({}) as server, HttpServer(pieces_of_video(tmp_path), host="127.0.0.2") as inner:
        for answer in (body(playlist(inner.url("/piece0"))), moved(inner.url("/piece0"))):
            server.answers["/x"] = answer
            items = read(open_stream(server.url("/x"), live=QUICK_END), until=reported(LOST))
            assert "private network" in details_of(items, LOST)[0]
    assert not inner.requests
    with HttpServer({}, host="127.0.0.2") as inner, HttpServer({"/y": body(PICTURES[0])}) as server:
        inner.answers["/x"] = moved(server.url("/y"))
        assert frames_of(read(open_stream(inner.url("/x")), until=num_frames(1)))


def test_a_name_that_is_a_private_computers_by_now_is_not_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adapters.sources.streams import http_client

    spaces = iter((2, 1))  # of the same name, one request after the other
    monkeypatch.setattr(http_client, "_space_of", lambda _: next(spaces))
    assert "private network" in words_for(moved("/y"))


def test_an_encrypted_playlist_is_refused_with_words() -> None:
    key = b'#EXT-X-KEY:METHOD=AES-128,URI="key.bin"\n#EXTINF'
    text = playlist("/piece0").replace(b"#EXTINF", key)
    assert "encrypted" in words_for(body(text))


class WholeAnswer:
    """An answer as a file reads it, without a server."""

    url, begins_at, num_bytes = "http://127.0.0.1/x", 0, None

    def __init__(self, data: bytes) -> None:
        self._left = io.BytesIO(data)

    def begin(self) -> bytes:
        return self._left.getvalue()[:16]

    def read(self, num_bytes: int) -> bytes:
        return self._left.read(num_bytes)


@pytest.mark.parametrize("place", [60_000, 65_536 - 20, 65_536 - 300])
def test_a_key_is_seen_wherever_a_read_cuts_its_line(place: int) -> None:
    key = b'#EXT-X-KEY:URI="' + b"k" * 400 + b'",METHOD=AES-128\n'
    files = HttpFiles(cast("HttpClient", None), max_frame_bytes=10**6)
    begin = b"#EXTM3U\n"
    text = begin + b"#\n" * ((place - len(begin)) // 2) + key
    file = HttpFile(cast("HttpAnswer", WholeAnswer(text)), files=files)
    with pytest.raises(StreamError, match="encrypted"):
        while file.read(1 << 16):
            pass


@pytest.mark.parametrize(("said_s", "believed_s"), [(6, 6.0), (9999, 30.0), (10**17, 30.0)])
def test_a_playlist_decides_only_so_much_of_how_long_silence_may_be(
    said_s: int, believed_s: float
) -> None:
    files = HttpFiles(cast("HttpClient", None), max_frame_bytes=10**6)
    text = playlist("/piece0", duration_s=said_s)
    file = HttpFile(cast("HttpAnswer", WholeAnswer(text)), files=files)
    while file.read(1 << 16):
        pass
    assert files.piece_s == believed_s


def test_a_playlist_of_one_line_is_refused_before_much_of_it_is_looked_at() -> None:
    text = b"#EXTM3U\n" + b"#EXT-X-KEY:" * 300_000
    files = HttpFiles(cast("HttpClient", None), max_frame_bytes=10**6)
    file = HttpFile(cast("HttpAnswer", WholeAnswer(text)), files=files)
    begin_s = time.thread_time()
    with pytest.raises(StreamError, match="too long"):
        file.read(1 << 16)
    assert time.thread_time() - begin_s < 0.2  # of this thread alone


def test_a_piece_that_is_missing_costs_itself(tmp_path: Path) -> None:
    answers = {
        **pieces_of_video(tmp_path),
        "/x": body(playlist("/piece0", "/gone", "/piece1")),
    }
    items = serve(answers, until=reported(ENDED))
    assert len(frames_of(items)) == 20


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (status(404), "connected, but nothing is found at this path (404 Not Found)"),
        (status(500), "connected, but the server says: 500 Internal Server Error"),
        (status(403), "connected, but not allowed in (403 Forbidden)"),
        (status(401), "connected, but not allowed in: wrong or no password (401 Unauthorized)"),
        (body(b""), "connected, but the answer is empty"),
        (body(b"<!DOCTYPE html><html>", "text/html"), "a web page, no video"),
        (body(b"\n <html><body>hello</body>", ""), "a web page, no video"),
        (body(b'{"error": "no camera"}', "application/json"), "text (application/json), no video"),
        (body(b"PK\x03\x04" + bytes(4000), "application/zip"), "begins with 50 4b 03 04 00"),
        (body(b"%PDF-1.7\n\xe2\xe3\0" * 99, "video/mp4"), "format (video/mp4) is unknown"),
        (body(playlist("/gone")), "playlist leads on, but nothing is found at this path (404"),
        (moved("/x"), "its redirects do not end"),
        (moved("file:///etc/passwd"), "no address of HTTP ('file')"),
        (status(302), "it redirects to nowhere"),
        (lambda request: None, "connected, but the server hung up without an answer"),
    ],
)
def test_what_an_address_gives_instead_of_video_is_said(answer: Answer, words: str) -> None:
    assert words in words_for(answer)


def test_sound_alone_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.ts"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 48000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = (tmp_path / "sound.ts").read_bytes()
    assert words_for(body(data)) == "connected, but no pictures in this stream: sound alone"


def test_a_codec_that_cannot_be_decoded_is_said(short_mp4: bytes) -> None:
    unknown = short_mp4.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC")
    assert "codec" in words_for(body(unknown))


# -- servers that hang ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begin",
    [b"", b"\xff", b"--part\r\nContent-Type: image/jpeg\r\n", b"\0\0\0\x20ftypisom\0\0\2\0"],
)
def test_a_server_that_hangs_is_lost(begin: bytes) -> None:
    with HttpServer({}) as server:

        def answer(request: Request) -> None:
            head(request, Content_Length=10**6)
            request.wfile.write(begin)
            server.hold()

        server.answers["/x"] = answer
        live = {**QUICK_END, "open_timeout_s": 0.3, "read_timeout_s": 0.3}
        items = read(open_stream(server.url("/x"), live=live), until=reported(LOST))
    assert states_of(items) == [LOST]


def test_a_server_that_sends_its_header_a_byte_at_a_time_is_lost() -> None:
    with HttpServer({}) as server:

        def answer(request: Request) -> None:
            for byte in itertools.cycle(b"X"):
                request.wfile.write(bytes([byte]))
                if server.stopping.wait(0.02):
                    return

        server.answers["/x"] = answer
        live = {**QUICK_END, "open_timeout_s": 0.3}
        items = read(open_stream(server.url("/x"), live=live), until=reported(LOST))
    assert states_of(items) == [LOST]


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS: dict[str, tuple[bytes, bytes]] = {  # how it begins and how it goes on
    "headers": (OK, b"X-A: b\r\n"),
    "video": (OK + b"\r\n\0\0\0\x18ftypisom\0\0\2\0isomiso2", b"\0\0\0\x08free"),
    "playlist": (OK + b"\r\n#EXTM3U\n#EXT-X-TARGETDURATION:1\n", b"#EXTINF:1,\n/a\n"),
    "tag": (OK + b"\r\n#EXTM3U\n", b"#EXT-X-KEY:"),
    "frame": (OK + b"\r\n\0\0\0\x18ftypisom\0\0\2\0isomiso2", b"\xff\xff\xff\xffmoov"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_does_not_end_takes_bounded_memory_and_work(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_files, "_MAX_HEADER_BYTES", 2_000_000)
    monkeypatch.setattr(http_files, "_MAX_PLAYLIST_BYTES", 500_000)
    begin, again = ENDLESS[kind]
    num_sent = 0

    def answer(request: Request) -> None:
        nonlocal num_sent
        request.wfile.write(begin)
        while num_sent < 500_000_000:
            num_sent += request.wfile.write(again * 8000)

    begin_s = time.process_time()
    items = serve({"/x": answer}, until=reported(LOST), live=QUICK_END)
    assert states_of(items) == [LOST]
    assert num_sent < 50_000_000  # some lie in the buffers of both sockets
    assert time.process_time() - begin_s < 3.0  # of this process, whatever else runs


def test_a_camera_that_sends_fields_for_ever_behind_its_last_picture_is_lost() -> None:
    part = b"--part\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(PICTURES[0])
    data = part + PICTURES[0]
    num_sent = 0

    def answer(request: Request) -> None:
        nonlocal num_sent
        multipart = "multipart/x-mixed-replace; boundary=part"
        head(request, Content_Type=multipart, Transfer_Encoding="chunked")
        request.wfile.write(b"%x\r\n%s\r\n0\r\n" % (len(data), data))
        while num_sent < 500_000_000:
            num_sent += request.wfile.write(b"A: b\r\n" * 100)

    items = serve({"/x": answer}, until=reported(LOST), live={**QUICK_END, "read_timeout_s": 0.5})
    assert len(frames_of(items)) == 1
    assert details_of(items, LOST) == ["nothing came for 0.5 s"]


def test_closing_ends_the_thread_while_a_video_waits(short_mp4: bytes) -> None:
    number = itertools.count()
    items = serve({"/x": file_in_ranges(short_mp4)}, until=lambda _: next(number) == 2)
    assert any(isinstance(item, Frame) for item in items)
    reading = [one for one in threading.enumerate() if one.name.startswith("stream http")]
    for thread in reading:
        thread.join(HANG_S)
        assert not thread.is_alive()
