"""SOURCE strings into sources."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from adapters.open_source import open_source, refuse_unknown_sources
from adapters.sources.files.image_folder import ImageFolder
from adapters.sources.files.video_file import VideoFile
from adapters.sources.files.watched_folder import WatchedFolder
from adapters.sources.streams.live_stream import LiveStream
from engine.config import Config, load_config
from engine.errors import ConfigError, SourceError
from engine.ports import FrameIds, Source
from engine.types import FrameId

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cameras differ")


def open_spec(spec: str | Path, config: Config | None = None) -> Source:
    ids = itertools.count(1)
    return open_source(
        str(spec), config=config or Config(), next_frame_id=lambda: FrameId(next(ids))
    )


def write_image(path: Path) -> Path:
    cv2.imwrite(str(path), np.full((80, 96, 3), 120, np.uint8))
    return path


def write_video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height = 96, 80
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            pixels = np.full((80, 96, 3), 120, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_folder_is_a_source_of_photos(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    source = open_spec(tmp_path)
    assert isinstance(source, ImageFolder)
    assert (source.info.label, source.info.is_sequence, source.info.num_frames) == (
        str(tmp_path),
        False,
        1,
    )


@pytest.mark.parametrize("name", ["a.jpg", "a.PNG", "a.webp"])
def test_an_image_file_is_a_source_of_one_photo(tmp_path: Path, name: str) -> None:
    source = open_spec(write_image(tmp_path / name))
    assert isinstance(source, ImageFolder)
    assert source.info.num_frames == 1


def test_any_other_file_is_tried_as_a_video(tmp_path: Path) -> None:
    source = open_spec(write_video(tmp_path / "a.mp4"))
    assert isinstance(source, VideoFile)
    assert (source.info.is_sequence, source.info.num_frames) == (True, 3)
    (tmp_path / "notes.doc").write_bytes(b"no video at all")
    with pytest.raises(SourceError, match="not a readable video"):
        open_spec(tmp_path / "notes.doc")


def test_the_configuration_reaches_the_source(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        write_image(tmp_path / name)
    config = load_config(settings=["sources.max_frames=2"])
    assert open_spec(tmp_path, config).info.num_frames == 2


def test_a_path_that_exists_wins_over_a_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rtsp:photos").mkdir()
    write_image(tmp_path / "rtsp:photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_spec("rtsp:photos"), ImageFolder)


def test_the_synthetic_town_is_a_source_with_options() -> None:
    source = open_spec("synthetic:town")
    assert not source.info.is_live
    assert source.info.label.startswith("synthetic:town")


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("rtsp://user:secret@host/x", "rtsp://host/x"),
        ("rtsps://host/x", "rtsps://host/x"),
        ("rtmp://0.0.0.0:1935/live/x?listen=1", "rtmp://0.0.0.0:1935/live/x?listen=1"),
        ("rtmps://host/live/x", "rtmps://host/live/x"),
        ("http://host/video", "http://host/video"),
        ("HTTPS://host/video", "https://host/video"),
        pytest.param("camera:0", "camera:0", marks=ON_LINUX),
    ],
)
def test_streams_and_cameras_are_live_sources_that_connect_later(spec: str, label: str) -> None:
    source = open_spec(spec)
    assert isinstance(source, LiveStream)
    assert (source.info.label, source.info.is_live, source.info.is_sequence) == (label, True, True)


def test_a_folder_is_watched_when_told_so(tmp_path: Path) -> None:
    source = open_spec(f"watch:{tmp_path}")
    assert isinstance(source, WatchedFolder)
    assert source.info.label == f"watch:{tmp_path}"
    with pytest.raises(SourceError, match="no such folder"):
        open_spec(f"watch:{tmp_path}/missing")
    with pytest.raises(SourceError, match="which folder"):
        open_spec("watch:")


@pytest.mark.parametrize(
    ("spec", "opener"),
    [
        ("mqtt://broker/topic", "mqtt.source.open_mqtt_source"),
        ("mqtts://broker/topic", "mqtt.source.open_mqtt_source"),
        ("phone://0.0.0.0:8443", "phone.source.open_phone_source"),
    ],
)
def test_brokers_and_phones_have_openers_of_their_own(
    spec: str, opener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened = Config(), ImageFolder.__new__(ImageFolder)
    told: list[tuple[str, Config, FrameId]] = []

    def open_one(spec: str, *, config: Config, next_frame_id: FrameIds) -> Source:
        told.append((spec, config, next_frame_id()))
        return opened

    monkeypatch.setattr(f"adapters.{opener}", open_one)
    assert open_spec(spec, config) is opened
    assert told == [(spec, config, FrameId(1))]


@pytest.mark.parametrize("spec", ["missing", "missing/folder", "./a:b", "7:30.mp4", "x" * 5000])
def test_a_path_that_does_not_exist_is_refused(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no such file or folder|cannot be read"):
        open_spec(spec)


@pytest.mark.parametrize("spec", ["gopher://x", "synthetic:village", "synthetic:townhall", "town:"])
def test_an_unknown_scheme_is_refused_with_the_kinds_that_work(spec: str) -> None:
    with pytest.raises(SourceError, match=r"a ROS recording, or synthetic:town") as caught:
        open_spec(spec)
    assert str(caught.value).startswith(spec.split(":", maxsplit=1)[0] + ":")


def test_a_password_in_an_unknown_source_is_not_repeated() -> None:
    with pytest.raises(SourceError) as caught:
        open_spec("gopher://user:secret@host/stream")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        refuse_unknown_sources(["gopher://user:secret@host/stream"])
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "specs",
    [
        ["missing.mp4"],
        ["missing.mp4", "gopher://x"],
        ["synthetic:village"],
        ["x" * 5000],
        ["missing.mp4", "watch"],
    ],
)
def test_a_request_is_refused_with_what_is_wrong_with_its_first_source(
    specs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as opened:
        open_spec(specs[0])
    with pytest.raises(ConfigError) as refused:
        refuse_unknown_sources(specs)
    assert str(refused.value) == str(opened.value)


@pytest.mark.parametrize(
    "known",
    [
        "photos",
        "synthetic:town?frames=4",
        "watch:missing",
        "rtsp://camera/stream",
        "CAMERA:0",
        "mqtts://broker/topic",
        "phone://0.0.0.0:8443",
    ],
)
def test_a_request_with_one_known_source_is_opened(
    known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    refuse_unknown_sources([known])
    refuse_unknown_sources(["missing.mp4", known])
