from __future__ import annotations

import asyncio
import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest

import adapters.exports.frames as frames_module
from adapters.exports.export import Export, ExportFormat, export
from adapters.exports.job import ExportCancelledError
from adapters.exports.source_frames import SourceFrame, read_frames
from adapters.recordings.input_recording import FolderRecording
from adapters.sources.files.video_file import VideoFile
from engine.config import Config, SourcesConfig
from engine.errors import ConfigError
from engine.types import Frame, FrameId, Uint8Array
from tests.support.plane_runs import PlaneRun, frame_name, make_plane_run, write_opened
from tests.support.received import items_of
from tests.support.small_videos import write_video
from tests.support.trainer_readers import READERS, read_as_gaussian_splatting

NOISE_RAD = 0.01  # 3 px


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> PlaneRun:
    return make_plane_run(tmp_path_factory.mktemp("plane"), noise_rad=NOISE_RAD)


def exported(plane: PlaneRun, to: Path, frames: str, **options: object) -> Export:
    formats = [ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO]
    return export(plane.path, to, formats=formats, frames=frames, **options)  # type: ignore[arg-type]


def errors_px(model: pycolmap.Reconstruction, name: str) -> list[float]:
    image = found(model, name)
    return [
        float(
            np.linalg.norm(np.asarray(image.project_point(model.point3D(p.point3D_id).xyz)) - p.xy)
        )
        for p in image.get_observation_points2D()
    ]


def found(model: pycolmap.Reconstruction, name: str) -> pycolmap.Image:
    image = model.find_image_with_name(name)
    assert image is not None
    return image


def table(path: Path) -> list[dict[str, str]]:
    with (path / "image_names.csv").open() as file:
        return list(csv.DictReader(file))


def test_frames_between_keyframes_get_poses_as_good_as_keyframes(
    plane: PlaneRun, tmp_path: Path
) -> None:
    done = exported(plane, tmp_path / "out", "all")
    assert done.num_images == len(plane.poses)
    model = pycolmap.Reconstruction(done.path / "sparse" / "0")
    keyframe_px = np.mean([e for k in plane.keyframes for e in errors_px(model, frame_name(k))])
    for number, pose in enumerate(plane.poses):
        image = found(model, frame_name(number))
        off = image.cam_from_world().matrix()[:, :3] @ pose[:, :3].T
        off_rad = np.arccos(np.clip((np.trace(off) - 1) / 2, -1, 1))
        assert off_rad < 0.15 * NOISE_RAD  # the trajectory is off by more than that
        assert np.mean(errors_px(model, image.name)) < 1.5 * keyframe_px
        assert len(errors_px(model, image.name)) > 50
    assert any("4 keyframes and 21 frames between them" in note for note in done.notes)


def test_pixels_of_exported_frames_are_where_the_model_says(
    plane: PlaneRun, tmp_path: Path
) -> None:
    done = exported(plane, tmp_path / "out", "all")
    scene = read_as_gaussian_splatting(done.path)
    for camera in scene.cameras.values():
        picture = cv2.imread(str(camera.image))
        assert picture is not None
        in_cam = scene.points @ camera.cam_from_world[:, :3].T + camera.cam_from_world[:, 3]
        places = in_cam @ camera.intrinsics.T
        xy = np.floor(places[:, :2] / places[:, 2:]).astype(int)
        inside = ((xy >= 4) & (xy < np.array(camera.size) - 4)).all(axis=1)
        seen = picture[xy[inside, 1], xy[inside, 0], ::-1].astype(float)
        true = plane.colors_at(scene.points[inside]).astype(float)
        beside = picture[xy[inside, 1], xy[inside, 0] - 4, ::-1].astype(float)
        off, off_beside = np.abs(seen - true).mean(), np.abs(beside - true).mean()
        assert inside.sum() > 50 and off < 0.6 * off_beside


def test_every_trainer_reads_the_same_cameras_of_all_frames(
    plane: PlaneRun, tmp_path: Path
) -> None:
    done = exported(plane, tmp_path / "out", "all")
    scenes = [read(done.path) for read in READERS]
    for scene in scenes:
        assert len(scene.cameras) == len(plane.poses)
        for name, camera in scene.cameras.items():
            first = scenes[0].cameras[name]
            np.testing.assert_allclose(camera.intrinsics, first.intrinsics)
            np.testing.assert_allclose(camera.cam_from_world, first.cam_from_world, atol=1e-9)


def test_the_sharpest_are_sharp_and_spread_over_the_way(tmp_path: Path) -> None:
    def blurred(number: int, image: Uint8Array) -> Uint8Array:
        if number % 3 == 1:
            return image
        brighter = cv2.convertScaleAbs(image, alpha=1.3)  # more gradients for the same detail
        return np.asarray(cv2.blur(brighter, (7, 1)), np.uint8)

    plane = make_plane_run(tmp_path, change=blurred)
    done = exported(plane, tmp_path / "out", "sharpest:6")
    chosen = sorted(int(row["frame"][:6]) for row in table(done.path))
    assert len(chosen) == 6 and done.num_images == 6
    assert all(number % 3 == 1 for number in chosen)
    assert np.diff(chosen).max() <= 8
    kinds = {row["kind"] for row in table(done.path)}
    assert kinds in ({"tracked"}, {"tracked", "keyframe"})


def test_frames_that_have_a_pose_in_another_map_or_none_are_counted(tmp_path: Path) -> None:
    plane = make_plane_run(tmp_path)
    with (plane.path / "frames.csv").open() as file:
        *others, last = csv.DictReader(file)
    with (plane.path / "frames.csv").open("w") as file:
        writer = csv.DictWriter(file, list(last))
        writer.writeheader()
        writer.writerows([*others, last])
        for pose, number in (("tracked", "1"), ("tracked", "1"), ("keyframe", "1"), ("none", "")):
            writer.writerow(last | {"name": "other.jpg", "pose": pose, "map": number})
        writer.writerow(last | {"status": "dropped_blurred", "pose": "none", "map": ""})
    done = exported(plane, tmp_path / "out", "all")
    assert any("2 in_another_map, 1 without_a_pose" in note for note in done.notes)


def test_a_frame_that_the_source_does_not_give_twice_is_counted(
    plane: PlaneRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_readings = 0
    whats: list[str] = []

    def forgetting(*arguments: Any, **options: Any) -> Iterator[SourceFrame]:
        nonlocal num_readings
        num_readings += 1
        frames = read_frames(*arguments, **options)
        return (one for one in frames if num_readings == 1 or one.name == frame_name(0))

    monkeypatch.setattr(frames_module, "read_frames", forgetting)
    done = exported(
        plane, tmp_path / "out", "sharpest:8", progress=lambda one: whats.append(one.what)
    )
    assert num_readings == 2 and done.num_images < 8
    assert any(f"{8 - done.num_images} not_in_source" in note for note in done.notes)
    assert "keyframes compared" in whats


def test_keyframes_alone_need_no_source(
    plane: PlaneRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(frames_module, "find_sources")
    with pytest.raises(ConfigError, match="--source says where frames between keyframes are"):
        exported(plane, tmp_path / "out", "keyframes", source="/nowhere")
    done = exported(plane, tmp_path / "out", "keyframes")
    assert [int(row["frame"][:6]) for row in table(done.path)] == plane.keyframes
    assert {row["kind"] for row in table(done.path)} == {"keyframe"}


def test_frames_that_the_source_has_no_more_are_counted(tmp_path: Path) -> None:
    plane = make_plane_run(tmp_path)
    short = write_video(tmp_path / "short.mp4", 17, size=(320, 240), draw=plane.draw)
    done = exported(plane, tmp_path / "out", "all", source=str(short))
    assert done.num_images == 17 + 1  # the last keyframe is in the run
    assert any("7 not_in_source" in note for note in done.notes)


@pytest.mark.parametrize("frames", ["all", "sharpest:5"])
def test_another_file_than_the_run_read_is_refused(
    plane: PlaneRun, tmp_path: Path, frames: str
) -> None:
    other = write_video(tmp_path / "other.mp4", 25, size=(320, 240))
    with pytest.raises(ConfigError, match="another picture"):
        exported(plane, tmp_path / "out", frames, source=str(other))
    smaller = write_video(tmp_path / "smaller.mp4", 25)
    with pytest.raises(ConfigError, match="another"):
        exported(plane, tmp_path / "out", frames, source=str(smaller))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "is_live", "words"),
    [
        ("rtsp://host/1", True, "a run with --record-input DIR keeps it"),
        ("", False, "secret"),
        ("/nowhere/walk.mp4", False, "no such file"),
    ],
)
def test_a_source_that_cannot_be_read_again_is_named_with_the_way_out(
    tmp_path: Path, address: str, is_live: bool, words: str
) -> None:
    plane = make_plane_run(tmp_path, num_frames=9)
    write_opened(plane.path, plane.video, address=address, is_live=is_live)
    with pytest.raises(Exception, match=words) as caught:
        exported(plane, tmp_path / "out", "all")
    assert type(caught.value).__name__ in {"ConfigError", "SourceError"}
    assert not (tmp_path / "out").exists()


def record_video(video: Path, folder: Path) -> None:
    """What a run over a video with --record-input keeps."""
    ids = itertools.count(1)
    source = VideoFile(video, config=SourcesConfig(), next_frame_id=lambda: FrameId(next(ids)))
    recording = FolderRecording.create(folder, config=Config(), sources=[source.info])

    async def record() -> None:
        async for item in items_of(source):
            assert isinstance(item, Frame)
            recording.add_frame(item, source_idx=0)

    asyncio.run(record())
    recording.close()


def test_frames_of_a_live_source_come_from_the_recording_that_the_run_made(tmp_path: Path) -> None:
    plane = make_plane_run(tmp_path, num_frames=9)
    kept = tmp_path / "kept"
    write_opened(
        plane.path, plane.video, address="rtsp://host/1", is_live=True, recording=str(kept)
    )
    with pytest.raises(ConfigError, match=f"kept in {kept}, where no recording is now"):
        exported(plane, tmp_path / "gone", "all")
    record_video(plane.video, kept)
    done = exported(plane, tmp_path / "out", "all")
    assert done.num_images == 9
    events = plane.path / "events.jsonl"
    first_part = events.read_text()
    write_opened(plane.path, plane.video, address="rtsp://host/1", is_live=True)
    events.write_text(first_part + events.read_text())  # it was resumed
    assert exported(plane, tmp_path / "again", "all").num_images == 9


def test_a_run_that_did_not_end_has_no_poses_between_keyframes(tmp_path: Path) -> None:
    plane = make_plane_run(tmp_path, num_frames=9)
    (plane.path / "trajectory.txt").unlink()
    with pytest.raises(ConfigError, match="livesfm resume"):
        exported(plane, tmp_path / "out", "all")
    (plane.path / "trajectory.txt").write_text("0 1 2 nan 0 0 0 1\n")
    with pytest.raises(ConfigError, match="is no trajectory"):
        exported(plane, tmp_path / "out", "all")


def test_a_trajectory_of_another_world_is_refused(tmp_path: Path) -> None:
    plane = make_plane_run(tmp_path, num_frames=9)
    lines = (plane.path / "trajectory.txt").read_text().splitlines()
    moved = [line.replace(" -3 ", " -4 ") for line in lines]
    (plane.path / "trajectory.txt").write_text("\n".join(moved) + "\n")
    with pytest.raises(ConfigError, match="not of the latest snapshot"):
        exported(plane, tmp_path / "out", "all")


@pytest.mark.parametrize("words", ["", "some", "sharpest", "sharpest:0", "sharpest:-1", "all:3"])
def test_words_that_choose_no_frames_are_refused(
    plane: PlaneRun, tmp_path: Path, words: str
) -> None:
    with pytest.raises(ConfigError, match="keyframes, all, or sharpest:N"):
        exported(plane, tmp_path / "out", words)


def test_frames_of_formats_without_images_are_refused(plane: PlaneRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--frames is for"):
        export(plane.path, tmp_path / "out", formats=[ExportFormat.PLY], frames="all")


def test_cancelling_while_frames_are_read_leaves_nothing(plane: PlaneRun, tmp_path: Path) -> None:
    def cancelled_after(number: int) -> Callable[[], bool]:
        left = [number]

        def is_cancelled() -> bool:
            left[0] -= 1
            return left[0] < 0

        return is_cancelled

    with pytest.raises(ExportCancelledError):
        exported(plane, tmp_path / "out", "all", is_cancelled=cancelled_after(9))
    assert not list(tmp_path.iterdir())


def test_masks_of_a_camera_are_those_of_its_frames_too(tmp_path: Path) -> None:
    plane = make_plane_run(tmp_path, num_frames=17)
    mask = np.full((240, 320), 255, np.uint8)
    mask[200:] = 0
    (plane.path / "masks").mkdir()
    for number in plane.keyframes:
        cv2.imwrite(str(plane.path / "masks" / f"{frame_name(number)}.png"), mask)
    done = exported(plane, tmp_path / "out", "all")
    written = list((done.path / "masks").iterdir())
    assert len(written) == done.num_images == 17
    for path in written:
        read = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert read is not None and float((read > 0).mean()) == pytest.approx(200 / 240, abs=0.01)
