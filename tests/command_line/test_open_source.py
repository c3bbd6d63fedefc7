"""SOURCE strings into sources."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from adapters.launch import _open_sources
from adapters.open_source import (
    open_source,
    photos_together,
    refuse_unknown_sources,
    report_unused_positions,
)
from adapters.sources.files.image_folder import ImageFolder
from adapters.sources.files.video_file import VideoFile
from adapters.sources.files.watched_folder import WatchedFolder
from adapters.sources.streams.live_stream import LiveStream
from engine.config import Config, TelemetryConfig, load_config
from engine.errors import ConfigError, SourceError
from engine.ports import FrameIds, Source
from engine.types import Frame, FrameId, GpsFix, GpsReading, RejectedFrame, SourceNotice
from tests.support.received import items_of

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


def names_of(source: Source) -> list[str]:
    """The names of a source's frames, and of what it drops."""

    async def collect() -> list[str]:
        return [i.name async for i in items_of(source) if isinstance(i, Frame | RejectedFrame)]

    return asyncio.run(collect())


def write_card(folder: Path, *names: str) -> list[str]:
    """Photos that differ, by their paths."""
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((80, 96, 3), 20 + 10 * number, np.uint8))
    return [str(path) for path in paths]


def test_photos_named_one_by_one_are_one_source_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = write_card(Path("card/100APPLE"), "IMG_2.JPG", "IMG_10.JPG", "IMG_1.png")
    video = str(write_video(Path("card/100APPLE/IMG_3.mov")))
    together = photos_together([photos[0], video, *photos[1:]])
    assert len(together) == 2
    assert together[1] == video
    source = open_spec(together[0])
    assert (source.info.label, source.info.num_frames) == ("card/100APPLE", 3)
    assert names_of(source) == ["IMG_2.JPG", "IMG_10.JPG", "IMG_1.png.jpg"]


def test_one_photo_alone_or_beside_other_sources_stays_as_it_is(tmp_path: Path) -> None:
    (photo,) = write_card(tmp_path, "a.jpg")
    for specs in ([photo], [photo, "rtsp://host/x"], [photo, f"{tmp_path}/missing.jpg"]):
        assert photos_together(specs) == specs


def test_photos_of_several_folders_are_named_from_the_folder_of_all(tmp_path: Path) -> None:
    (spec,) = photos_together(write_card(tmp_path, "left/a.jpg", "right/a.jpg"))
    source = open_spec(spec)
    assert source.info.label == str(tmp_path)
    assert names_of(source) == ["left/a.jpg", "right/a.jpg"]


def test_what_is_named_beside_photos_and_no_photo_is_counted_as_in_a_folder(tmp_path: Path) -> None:
    photos = write_card(tmp_path, "a.jpg", "b.jpg")
    for name in ("a.AAE", "b.gif"):
        (tmp_path / name).write_bytes(b"something")
    (spec,) = photos_together([*photos, photos[0], f"{tmp_path}/a.AAE", f"{tmp_path}/b.gif"])
    source = open_spec(spec)
    assert source.info.num_frames == 2

    async def left_out() -> set[tuple[str, str, int]]:
        notices = [item async for item in items_of(source) if isinstance(item, SourceNotice)]
        return {(one.kind, one.reason, one.num_files) for one in notices[0].left_out}

    assert asyncio.run(left_out()) == {
        (".aae", "no photo", 1),
        (".gif", "cannot be read: save it as JPEG", 1),
        ("files", "named once more", 1),
    }


def test_positions_and_masks_fit_photos_that_are_named_one_by_one(tmp_path: Path) -> None:
    photos = write_card(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks" / "b.jpg.png"), np.full((80, 96), 255, np.uint8))
    positions = tmp_path / "p.csv"
    positions.write_text("name,lat,lon\na.jpg,1,1\nb.jpg,2,2\n")
    telemetry = TelemetryConfig(positions=(str(positions),))
    config = load_config().model_copy(update={"telemetry": telemetry})
    (source,) = _open_sources(photos_together(photos), config)

    async def frames() -> list[Frame]:
        return [item async for item in items_of(source) if isinstance(item, Frame)]

    first, second = asyncio.run(frames())
    assert first.gps is not None
    assert second.gps is not None
    assert (first.gps.latitude_deg, second.gps.latitude_deg) == (1.0, 2.0)
    assert (first.mask is None, second.mask is None) == (True, False)


def test_a_damaged_list_of_photos_is_refused() -> None:
    with pytest.raises(SourceError, match="no list of photos"):
        open_spec('photos:{"files": 3}')


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


def positions_of(source: Source) -> list[GpsFix | str]:
    """The positions of a source's frames, or why they have none, or of its readings."""

    async def collect() -> list[GpsFix | str]:
        found = [
            (item.gps or item.gps_problem) if isinstance(item, Frame) else item.fix
            async for item in items_of(source)
            if isinstance(item, Frame | GpsReading)
        ]
        return [fix for fix in found if fix]

    return asyncio.run(collect())


def open_all(folder: Path, *names: str, positions: list[Path]) -> list[Source]:
    config = load_config().model_copy(
        update={"telemetry": TelemetryConfig(positions=tuple(map(str, positions)))}
    )
    return _open_sources([str(folder / name) for name in names], config)


def write_srt(path: Path, latitude_deg: int) -> Path:
    block = f"[latitude: {latitude_deg}.5] [longitude: 8.2] [abs_alt: 433.0]"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"1\n00:00:00,000 --> 00:00:01,000\n{block}\n")
    return path


def latitudes_of(sources: list[Source]) -> list[set[float | str]]:
    return [
        {fix if isinstance(fix, str) else fix.latitude_deg for fix in positions_of(source)}
        for source in sources
    ]


def test_a_lone_file_of_positions_is_for_the_video_of_its_name(tmp_path: Path) -> None:
    for name in ("A.mp4", "B.mp4"):
        write_video(tmp_path / name)
    given = write_srt(tmp_path / "cards" / "a.SRT", 40)
    assert latitudes_of(open_all(tmp_path, "A.mp4", "B.mp4", positions=[given])) == [{40.5}, set()]
    assert latitudes_of(open_all(tmp_path, "B.mp4", positions=[given])) == [{40.5}]
    write_srt(tmp_path / "B.SRT", 41)
    assert latitudes_of(open_all(tmp_path, "A.mp4", "B.mp4", positions=[given])) == [{40.5}, {41.5}]


def test_positions_for_a_name_of_several_videos_are_for_that_in_their_folder(
    tmp_path: Path,
) -> None:
    for card in ("1", "2"):
        (tmp_path / card).mkdir()
        write_video(tmp_path / card / "A.mp4")
    elsewhere = write_srt(tmp_path / "a.srt", 40)
    names = ("1/A.mp4", "2/A.mp4")
    assert latitudes_of(open_all(tmp_path, *names, positions=[elsewhere])) == [set(), set()]
    beside = write_srt(tmp_path / "2" / "a.srt", 41)
    assert latitudes_of(open_all(tmp_path, *names, positions=[beside])) == [set(), {41.5}]


def test_a_name_in_two_folders_of_photos_is_used_for_neither(tmp_path: Path) -> None:
    for name in ("one/a.jpg", "two/a.jpg", "two/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name)
    cv2.imwrite(str(tmp_path / "two" / "b.jpg"), np.full((80, 96, 3), 90, np.uint8))
    positions = tmp_path / "p.csv"
    positions.write_text("name,lat,lon\na.jpg,1,1\nb.jpg,2,2\n")
    unnamed = "the files of positions do not name it"
    sources = open_all(tmp_path, "one", "two", positions=[positions])
    assert latitudes_of(sources) == [{unnamed}, {unnamed, 2.0}]
    positions.write_text("name,lat,lon\none/a.jpg,1,1\ntwo/a.jpg,3,3\nb.jpg,2,2\n")
    sources = open_all(tmp_path, "one", "two", positions=[positions])
    assert latitudes_of(sources) == [{1.0}, {3.0, 2.0}]


def test_files_of_positions_that_no_source_takes_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "a.jpg")
    write_video(tmp_path / "A.mp4")
    write_video(tmp_path / "B.mp4")
    table, srt = tmp_path / "p.csv", write_srt(tmp_path / "c.srt", 40)
    table.write_text("name,lat,lon\na.jpg,1,1\n")
    telemetry = TelemetryConfig(positions=(str(table), str(srt)))
    cases: tuple[tuple[list[str], list[str]], ...] = (
        (["a.jpg"], [f"{srt}: is not used: it is for a video"]),
        (["A.mp4"], [f"{table}: is not used: by names"]),
        (["A.mp4", "B.mp4", "a.jpg"], [f"{srt}: is not used: no video of this run has its name"]),
        (["a.jpg", "A.mp4"], []),
        (["watch:folder"], [f"{table}: is not used", f"{srt}: is not used"]),
    )
    for names, expected in cases:
        caplog.clear()
        specs = [name if ":" in name else str(tmp_path / name) for name in names]
        report_unused_positions(specs, config=telemetry)
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == len(expected)
        assert all(m.startswith(start) for m, start in zip(messages, expected, strict=True))
