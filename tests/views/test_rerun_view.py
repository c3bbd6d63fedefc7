"""Recordings and live servers of the Rerun view, read back with Rerun's own tools."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import psutil
import pytest

from adapters.views import rerun_service
from adapters.views.display_image import MAX_PASSED_BYTES
from adapters.views.rerun_blueprint import LOAD_PLOTS
from adapters.views.rerun_limits import RecordingLimit
from adapters.views.rerun_service import free_endpoint, viewer_program
from adapters.views.rerun_view import RerunView
from adapters.views.view_mode import ViewMode
from engine.config import ViewsConfig
from engine.dense_types import DenseChunk, DenseCloud, GroundPicture
from engine.errors import ConfigError
from engine.events import (
    BundleAdjusted,
    Event,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    KeyframeAdded,
    LoadMeasured,
    MainMapChanged,
    MapInitialized,
    OverlayFound,
    RegistrationFailed,
    RunFinished,
    RunStarted,
    SnapshotWritten,
    SourceOpened,
    VerdictChanged,
    Warned,
)
from engine.types import (
    CalibrationOrigin,
    CameraFigures,
    DropReason,
    Float64Array,
    Frame,
    FrameId,
    FramePose,
    GpsFix,
    MapView,
    PairReason,
    RegistrationStatus,
    Uint8Array,
    VerdictLevel,
)
from tests.support.paths import TOOLS
from tests.support.verdicts import verdict_of
from tests.support.waiting import HANG_S, block_until

WIDTH, HEIGHT, FOCAL_PX = 96, 64, 80.0
NUM_FRAMES = 30
LIVE = SourceOpened(at_s=0.0, source="a", address="", prefix="", is_live=True, fingerprint="")
POINTS_PER_KEYFRAME = 40
CONFIG = ViewsConfig(grpc_port=0, web_port=0)

Rows = list[dict[str, Any]]


def cam_from_world(frame_id: int) -> Float64Array:
    """A camera that faces along z and moves along x, half a unit per frame."""
    return np.column_stack([np.eye(3), [-0.5 * frame_id, 0.0, 0.0]])


def picture(frame_id: int) -> Uint8Array:
    noise = np.random.default_rng(frame_id).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (WIDTH, HEIGHT)), dtype=np.uint8)


def encode(pixels: Uint8Array) -> bytes:
    encoded = cv2.imencode(".jpg", pixels[:, :, ::-1])[1]
    return bytes(encoded.tobytes())


def frame(frame_id: int, *, pixels: Uint8Array | None = None, jpeg: bytes | None = None) -> Frame:
    return Frame(
        frame_id=FrameId(frame_id),
        camera_key="camera",
        source="synthetic",
        index=frame_id - 1,
        name=f"{frame_id:05d}.jpg",
        captured_at_s=50.0 + 0.1 * frame_id,
        received_at_s=0.1 * frame_id,
        pixels=picture(frame_id) if pixels is None else pixels,
        jpeg=jpeg,
    )


def frame_pose(frame_id: int) -> FramePose:
    return FramePose(
        frame_id=FrameId(frame_id),
        index=frame_id - 1,
        captured_at_s=50.0 + 0.1 * frame_id,
        cam_from_world=cam_from_world(frame_id),
        is_keyframe=frame_id % 2 == 1,
    )


def map_view(
    num_keyframes: int, *, version: int = 1, dropped_points: int = 0, far_points: int = 0
) -> MapView:
    """Keyframes 1, 3, 5, ..., each the first to see some points in front of it."""
    ids = np.arange(1, 2 * num_keyframes, 2)
    chunk_ids = np.repeat(ids, POINTS_PER_KEYFRAME)[dropped_points:]
    offsets = np.random.default_rng(0).uniform(-2, 2, (num_keyframes * POINTS_PER_KEYFRAME, 3))
    points = offsets[dropped_points:] + [0.0, 0.0, 6.0]
    points[:, 0] += 0.5 * chunk_ids
    points[:far_points] *= 1e4
    return MapView(
        version=version,
        keyframe_ids=ids,
        cam_from_world=np.stack([cam_from_world(int(frame_id)) for frame_id in ids]),
        focal_px=np.full(num_keyframes, FOCAL_PX),
        image_sizes=np.tile([WIDTH, HEIGHT], (num_keyframes, 1)),
        points3D_in_world=points.astype(np.float32),
        colors=np.full((len(points), 3), 128, np.uint8),
        chunk_ids=chunk_ids,
        edges=np.column_stack([ids[:-1], ids[1:]]),
        edge_reasons=(PairReason.TEMPORAL,) * (num_keyframes - 1),
        cameras=(camera_figures(num_registered=num_keyframes),),
    )


def camera_figures(*, num_registered: int) -> CameraFigures:
    return CameraFigures(
        camera_key="camera",
        model="SIMPLE_PINHOLE",
        width=WIDTH,
        height=HEIGHT,
        params=(FOCAL_PX, WIDTH / 2, HEIGHT / 2),
        focal_px=FOCAL_PX,
        fov_deg=61.9,
        num_registered=num_registered,
        origin=CalibrationOrigin.ASSUMED,
        prior_focal_px=FOCAL_PX,
        prior_sigma_ratio=0.7,
        observed_sigma_ratio=None,
        is_constant=False,
        is_held=True,
        doubts=("the images say nothing of it",),
    )


def posed(frame_id: int) -> FramePosed:
    return FramePosed(
        camera_key="camera",
        at_s=0.1 * frame_id,
        frame_id=FrameId(frame_id),
        captured_at_s=50.0 + 0.1 * frame_id,
        cam_center_in_world=(0.5 * frame_id, 0.0, 0.0),
        world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
        is_first=True,
        is_keyframe=frame_id % 2 == 1,
        latency_s=0.05,
    )


def events_of_frame(frame_id: int) -> Iterator[Event]:
    at_s, captured_at_s = 0.1 * frame_id, 50.0 + 0.1 * frame_id
    yield FrameReceived(
        at_s=at_s, frame_id=FrameId(frame_id), index=frame_id - 1, captured_at_s=captured_at_s
    )
    if frame_id % 2 == 1:
        yield KeyframeAdded(
            camera_key="camera",
            at_s=at_s,
            frame_id=FrameId(frame_id),
            index=0,
            is_photo=False,
            name=f"{frame_id:05d}.jpg",
            captured_at_s=captured_at_s,
            num_keypoints=500,
        )
        yield FrameRegistered(
            at_s=at_s,
            frame_id=FrameId(frame_id),
            num_inliers=90,
            num_correspondences=100,
            num_registered=(frame_id + 1) // 2,
            num_points3D=POINTS_PER_KEYFRAME * (frame_id + 1) // 2,
            is_retry=False,
            elapsed_s=0.01,
        )
    yield posed(frame_id)


def show_a_run(view: RerunView) -> dict[int, bytes]:
    """A run of ``NUM_FRAMES`` frames with one of each event; returns the JPEGs as received."""
    first, third = FrameId(1), FrameId(3)
    view.show_event(RunStarted(at_s=0.0, sources=("synthetic",), matcher="sift"))
    view.show_event(LIVE)
    received = {}
    for frame_id in range(1, NUM_FRAMES + 1):
        received[frame_id] = encode(picture(frame_id))
        view.show_frame(
            frame(frame_id, jpeg=received[frame_id]), frame_pose(frame_id) if frame_id > 2 else None
        )
        for event in events_of_frame(frame_id):
            view.show_event(event)
        if frame_id == 3:
            view.show_event(
                MapInitialized(at_s=0.3, first=first, second=third, num_points3D=80, attempt=1)
            )
        if frame_id % 10 == 0:
            view.show_map(map_view(frame_id // 2, version=frame_id))
    for event in (
        RegistrationFailed(
            at_s=3.0,
            frame_id=third,
            status=RegistrationStatus.TOO_FEW_INLIERS,
            num_inliers=3,
            num_correspondences=50,
        ),
        dropped(),
        BundleAdjusted(
            at_s=3.1,
            num_keyframes=15,
            num_points3D=600,
            reprojection_error_before_px=0.8,
            reprojection_error_after_px=0.5,
            keyframes_added_meanwhile=1,
            elapsed_s=0.2,
        ),
        SnapshotWritten(
            at_s=3.2,
            sequence=1,
            path="runs/x/snapshots/000001",
            num_keyframes=15,
            num_points3D=600,
            elapsed_s=0.1,
        ),
        LoadMeasured(
            at_s=3.3,
            period_s=2.0,
            cpu_s={"register": 0.5, "local_ba": 1.0, "mapping_rest": 0.1, "match": 0.8},
            loop_late_s=0.03,
            queue_wait_s={"writes": 0.2, "views": 0.0},
        ),
        Warned(at_s=3.3, message="the disk is nearly full"),
        VerdictChanged(at_s=3.3, verdict=verdict_of(VerdictLevel.WRONG, VerdictLevel.DOUBTFUL)),
        RunFinished(at_s=3.4, stopped_by="end_of_sources", num_keyframes=15, num_registered=15),
    ):
        view.show_event(event)
    return received


def dropped() -> FrameDropped:
    return FrameDropped(
        at_s=3.0,
        frame_id=None,
        source="synthetic",
        index=30,
        name="00031.jpg",
        captured_at_s=53.1,
        reason=DropReason.UNREADABLE,
        detail="the JPEG ends early",
    )


def open_recording(path: Path) -> RerunView:
    return RerunView.open("test", mode=ViewMode.RECORD, recording_path=path, config=CONFIG)


def read_rows(path: Path) -> dict[str, Rows]:
    """The rows of every entity in order of logging, without missing values; times in ns."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from rerun.chunk import RrdReader

    rows: dict[str, Rows] = {}
    for chunk in RrdReader(path).stream():
        batch = chunk.to_record_batch()
        columns = {
            name: column.cast(pa.int64()) if pa.types.is_temporal(column.type) else column
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        for index in range(batch.num_rows):
            values = {name: column[index].as_py() for name, column in columns.items()}
            row = {name: value for name, value in values.items() if value is not None}
            rows.setdefault(chunk.entity_path, []).append(row)
    for entity_rows in rows.values():
        entity_rows.sort(key=lambda row: bytes(row["rerun.controls.RowId"]))
    return rows


def jpeg_of(row: dict[str, Any]) -> bytes:
    return np.array(row["EncodedImage:blob"], dtype=np.uint8).tobytes()


def has_image(row: dict[str, Any]) -> bool:
    return "EncodedImage:blob" in row


def entities_below(rows: dict[str, Rows], prefix: str) -> list[str]:
    return sorted(entity for entity in rows if entity.startswith(prefix))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, bytes]]:
    path = tmp_path_factory.mktemp("run") / "recording.rrd"
    view = open_recording(path)
    received = show_a_run(view)
    view.close()
    return path, received


@pytest.fixture(scope="module")
def rows(recorded: tuple[Path, dict[int, bytes]]) -> dict[str, Rows]:
    return read_rows(recorded[0])


@pytest.mark.slow
def test_the_recording_of_a_run_verifies(recorded: tuple[Path, dict[int, bytes]]) -> None:
    check = subprocess.run(
        [viewer_program(), "rrd", "verify", str(recorded[0])], capture_output=True, check=False
    )

    assert check.returncode == 0, check.stderr


def test_a_run_leaves_every_entity(rows: dict[str, Rows]) -> None:
    wanted = {
        "/world",
        "/world/live",
        "/world/live/image",
        "/world/map/chunk_00000",
        "/world/map/chunk_00001",
        "/world/keyframes/chunk_00000",
        "/world/keyframes/chunk_00001",
        "/world/keyframe_path",
        "/world/trajectory/part_00000",
        "/world/trajectory/tail",
        "/world/scene_graph",
        "/cameras",
        "/verdict",
        "/graph",
        "/logs",
        "/metrics/registered",
        "/metrics/keyframes",
        "/metrics/points",
        "/metrics/reprojection_error_px",
        "/metrics/latency_ms",
        "/metrics/dropped",
    }

    assert wanted <= set(rows)


def test_the_layout_is_in_the_recording(recorded: tuple[Path, dict[int, bytes]]) -> None:
    from rerun.chunk import RrdReader

    blueprints = RrdReader(recorded[0]).blueprints()

    assert len(blueprints) == 2  # one for a run that is cut off, one that shows the whole map
    assert {blueprint.application_id for blueprint in blueprints} == {"livesfm"}


def test_a_received_jpeg_is_recorded_byte_for_byte(
    recorded: tuple[Path, dict[int, bytes]], rows: dict[str, Rows]
) -> None:
    images = [row for row in rows["/world/live/image"] if "EncodedImage:blob" in row]
    stored = {row["frame"]: jpeg_of(row) for row in images}

    assert stored == recorded[1]


def test_images_and_figures_are_found_at_their_frame_and_capture_time(
    rows: dict[str, Rows],
) -> None:
    image = next(row for row in rows["/world/live/image"] if row.get("frame") == 11)
    latencies = [row for row in rows["/metrics/latency_ms"] if "Scalars:scalars" in row]

    assert image["capture"] == pytest.approx(1e9)
    assert [row["frame"] for row in latencies] == list(range(1, NUM_FRAMES + 1))
    assert latencies[0]["Scalars:scalars"] == [50.0]


def test_the_last_figures_are_those_of_the_run(rows: dict[str, Rows]) -> None:
    last = {
        entity.rpartition("/")[2]: entity_rows[-1].get("Scalars:scalars")
        for entity, entity_rows in rows.items()
        if entity.startswith("/metrics/")
    }

    assert last == {
        "keyframes": [15.0],
        "registered": [15.0],
        "points": [600.0],
        "dropped": [1.0],
        "latency_ms": [50.0],
        "reprojection_error_px": [0.5],
    }


def test_the_load_is_drawn_in_cores_and_milliseconds(rows: dict[str, Rows]) -> None:
    drawn = {
        entity.removeprefix("/load/"): rows[entity][-1]["Scalars:scalars"][0]
        for entity in entities_below(rows, "/load/")
        if "Scalars:scalars" in rows[entity][-1]
    }
    assert drawn["cpu_map"] == pytest.approx(0.8)  # 1.6 s of 2 s
    assert drawn["cpu_match"] == pytest.approx(0.4)
    assert drawn["cpu_track"] == 0.0
    assert (drawn["late"], drawn["wait_writes"], drawn["wait_views"]) == (30.0, 200.0, 0.0)
    curves = {f"/load/{one.name}" for plot in LOAD_PLOTS for one in plot.metrics}
    assert set(entities_below(rows, "/load/")) == curves


def test_noteworthy_events_are_logged_with_their_level(rows: dict[str, Rows]) -> None:
    logged = [(row["TextLog:level"][0], row["TextLog:text"][0]) for row in rows["/logs"]]

    assert ("WARN", "dropped 00031.jpg as unreadable: the JPEG ends early") in logged
    assert ("WARN", "the disk is nearly full") in logged
    assert ("INFO", "snapshot 000001: 15 keyframes, 600 points") in logged
    first, second = (text for level, text in logged if level == "ERROR")
    assert first.startswith("so far the map is wrong: frames 10 to 15 turn on the spot")
    assert second.startswith("  - frames 20 to 25 turn on the spot")
    assert Counter(level for level, _ in logged) == {"INFO": 6, "WARN": 2, "ERROR": 2}


def test_the_verdict_is_a_document_with_all_its_reasons(rows: dict[str, Rows]) -> None:
    (row,) = rows["/verdict"]
    (text,) = row["TextDocument:text"]
    assert text.startswith("**The map is wrong.**")
    for reason in verdict_of(VerdictLevel.WRONG, VerdictLevel.DOUBTFUL).reasons:
        assert reason.sentence in text


def test_a_chunk_that_did_not_change_is_not_recorded_again(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    view = open_recording(path)
    for version, num_keyframes in enumerate((16, 16, 18, 18)):
        view.show_map(map_view(num_keyframes, version=version))
    view.close()
    rows = read_rows(path)

    assert {entity: len(rows[entity]) for entity in entities_below(rows, "/world/map/")} == {
        "/world/map/chunk_00000": 1,
        "/world/map/chunk_00001": 1,
        "/world/map/chunk_00002": 1,
    }
    assert len(rows["/world/keyframes/chunk_00000"]) == 1


def test_a_chunk_whose_points_are_gone_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    view = open_recording(path)
    view.show_map(map_view(16))
    view.show_map(map_view(16, version=2, dropped_points=8 * POINTS_PER_KEYFRAME))
    view.close()
    rows = read_rows(path)

    assert "Clear:is_recursive" in rows["/world/map/chunk_00000"][-1]
    assert not any("Clear:is_recursive" in row for row in rows["/world/map/chunk_00001"])


def test_points_far_outside_the_map_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    view = open_recording(path)
    view.show_map(map_view(16, far_points=5))
    view.close()
    rows = read_rows(path)
    drawn = [
        np.array(rows[entity][-1]["Points3D:positions"])
        for entity in entities_below(rows, "/world/map/")
    ]

    assert sum(map(len, drawn)) == 16 * POINTS_PER_KEYFRAME - 5
    assert max(np.abs(positions).max() for positions in drawn) < 100.0


def test_the_path_holds_every_posed_frame(rows: dict[str, Rows]) -> None:
    part = rows["/world/trajectory/part_00000"][-1]
    segments = np.array(part["LineStrips3D:strips"])

    assert segments.shape == (NUM_FRAMES - 1, 2, 3)
    assert segments[:, 0, 0] == pytest.approx(0.5 * np.arange(1, NUM_FRAMES))


def test_the_scene_graph_is_bounded_and_names_only_registered_keyframes(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    num_keyframes = 40
    base = map_view(num_keyframes)
    pairs = [(a, b) for a in base.keyframe_ids for b in base.keyframe_ids if a < b]
    pairs.append((1, 1000))  # a keyframe that waits for registration
    view = open_recording(path)
    view.show_map(
        MapView(
            **{
                **{name: getattr(base, name) for name in MapView.__slots__},
                "edges": np.array(pairs),
                "edge_reasons": (PairReason.EXHAUSTIVE,) * len(pairs),
            }
        )
    )
    view.close()
    graph = read_rows(path)["/graph"][-1]

    assert len(graph["GraphEdges:edges"]) == 300
    assert "1000" not in graph["GraphNodes:node_ids"]
    assert max(map(int, graph["GraphNodes:node_ids"])) == 2 * num_keyframes - 1


def test_the_live_camera_has_the_focal_length_of_the_map(rows: dict[str, Rows]) -> None:
    pinholes = [row for row in rows["/world/live/image"] if "Pinhole:image_from_camera" in row]

    assert pinholes[-1]["Pinhole:image_from_camera"][0][0] == pytest.approx(FOCAL_PX)
    assert pinholes[-1]["Pinhole:resolution"] == [[WIDTH, HEIGHT]]


def test_a_frame_without_a_pose_shows_its_image_but_no_camera(rows: dict[str, Rows]) -> None:
    distances = {
        row["frame"]: row["Pinhole:image_plane_distance"][0]
        for row in rows["/world/live/image"]
        if "Pinhole:image_plane_distance" in row
    }

    assert max(distances[1], distances[2]) < 1e-5
    assert min(distances[frame_id] for frame_id in range(3, NUM_FRAMES + 1)) > 1e-3
    assert min(row["frame"] for row in rows["/world/live"]) == 3


def shown_image(tmp_path: Path, shown: Frame, config: ViewsConfig) -> tuple[bytes, dict[str, Any]]:
    """The JPEG and the camera that are recorded for a frame."""
    path = tmp_path / "recording.rrd"
    view = RerunView.open("test", mode=ViewMode.RECORD, recording_path=path, config=config)
    view.show_frame(shown, frame_pose(1))
    view.close()
    rows = read_rows(path)["/world/live/image"]
    image = next(row for row in rows if "EncodedImage:blob" in row)
    camera = next(row for row in rows if "Pinhole:resolution" in row)
    return jpeg_of(image), camera


def test_a_frame_without_a_jpeg_is_shown_small_and_in_its_colours(tmp_path: Path) -> None:
    red = np.full((300, 400, 3), [220, 20, 20], np.uint8)
    config = CONFIG.model_copy(update={"image_edge_px": 100})
    jpeg, camera = shown_image(tmp_path, frame(1, pixels=red), config)
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)

    assert decoded is not None
    assert decoded.shape == (75, 100, 3)
    assert np.abs(decoded[:, :, ::-1].mean(axis=(0, 1)) - [220, 20, 20]).max() < 6
    assert camera["Pinhole:resolution"] == [[100.0, 75.0]]
    assert camera["Pinhole:image_from_camera"][0][0] == pytest.approx(0.85 * 100)


def test_a_huge_jpeg_is_shown_small(tmp_path: Path) -> None:
    huge = encode(picture(1)) + bytes(MAX_PASSED_BYTES)
    jpeg, _ = shown_image(tmp_path, frame(1, jpeg=huge), CONFIG)

    assert 100 < len(jpeg) < MAX_PASSED_BYTES


def test_overlays_are_drawn_on_the_images_of_their_camera(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    config = CONFIG.model_copy(update={"image_edge_px": WIDTH // 2})
    view = RerunView.open("test", mode=ViewMode.RECORD, recording_path=path, config=config)
    found = OverlayFound(
        at_s=0.1, camera_key="camera", share=0.1, boxes=((60, 4, 90, 20),), num_keyframes=5
    )
    other = replace(frame(4), camera_key="other")
    view.show_frame(frame(1), None)
    view.show_event(found)
    for shown in (frame(2), frame(3), other):
        view.show_frame(shown, None)
    view.close()
    rows = read_rows(path)["/world/live/image/overlays"]
    drawn = [row for row in rows if "Boxes2D:centers" in row]
    assert [row["frame"] for row in drawn] == [2]  # not again while they are the same
    assert drawn[0]["Boxes2D:centers"] == [[37.5, 6.0]]  # the image is shown at half its size
    assert drawn[0]["Boxes2D:half_sizes"] == [[7.5, 4.0]]
    assert [row["frame"] for row in rows if "Boxes2D:centers" not in row] == [4]


def test_a_frame_of_one_pixel_is_shown(tmp_path: Path) -> None:
    dot = np.zeros((1, 1, 3), np.uint8)
    _, camera = shown_image(tmp_path, frame(1, pixels=dot), CONFIG)

    assert camera["Pinhole:resolution"] == [[1.0, 1.0]]


def empty_map() -> MapView:
    return MapView(
        version=0,
        keyframe_ids=np.zeros(0, np.int64),
        cam_from_world=np.zeros((0, 3, 4)),
        focal_px=np.zeros(0),
        image_sizes=np.zeros((0, 2), np.int64),
        points3D_in_world=np.zeros((0, 3), np.float32),
        colors=np.zeros((0, 3), np.uint8),
        chunk_ids=np.zeros(0, np.int64),
        edges=np.zeros((0, 2), np.int64),
        edge_reasons=(),
    )


def test_a_run_without_a_map_leaves_a_recording_that_verifies(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    view = open_recording(path)
    view.show_map(empty_map())
    view.close()
    check = subprocess.run(
        [viewer_program(), "rrd", "verify", str(path)], capture_output=True, check=False
    )

    assert check.returncode == 0, check.stderr


def test_a_map_that_starts_again_from_nothing_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    view = open_recording(path)
    view.show_map(map_view(10))
    view.show_map(empty_map())
    view.close()
    rows = read_rows(path)

    for entity in ("/world/map/chunk_00001", "/world/keyframes/chunk_00000"):
        assert "Clear:is_recursive" in rows[entity][-1]
    assert rows["/world/keyframe_path"][-1]["LineStrips3D:strips"] == []
    assert rows["/metrics/points"][-1]["Scalars:scalars"] == [0.0]


def dense_cloud() -> DenseCloud:
    xyz = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
    chunk = DenseChunk(
        frame_id=FrameId(1), version=1, xyz_in_cam=xyz, colors=np.zeros((50, 3), np.uint8)
    )
    return DenseCloud(chunks=(chunk,), world_from_chunk=np.eye(4)[None, :3])


def ground_picture() -> GroundPicture:
    x, y = np.meshgrid(np.arange(3.0), np.arange(3.0))
    return GroundPicture(
        vertices_in_world=np.stack([x, y, 0 * x], axis=-1).astype(np.float32),
        texture=np.full((3, 3, 4), 255, np.uint8),
        u_in_texture=(np.arange(3) + 0.5) / 3,
        v_in_texture=(np.arange(3) + 0.5) / 3,
        holes_in_world=np.zeros((1, 3), np.float32),
        thin_in_world=np.zeros((0, 3), np.float32),
        coverage="",
    )


def main_map_changed() -> MainMapChanged:
    return MainMapChanged(
        at_s=1.0, former_map_number=1, num_registered=20, num_registered_in_former=10
    )


def test_dense_map_and_ground_of_a_former_world_are_not_drawn_into_a_new_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "recording.rrd"
    view = open_recording(path)
    view.show_dense(dense_cloud())  # waits for the map
    view.show_event(main_map_changed())
    view.show_map(map_view(10))
    view.show_dense(dense_cloud())
    view.show_ground(ground_picture())
    view.show_event(main_map_changed())
    view.show_map(map_view(20))
    view.close()
    rows = read_rows(path)

    drawn = [row for row in rows["/world/dense/keyframe_000001"] if "Points3D:positions" in row]
    assert len(drawn) == 1
    for entity in ("/world/dense/keyframe_000001", "/world/ground", "/world/coverage"):
        assert "Clear:is_recursive" in rows[entity][-1]


def test_far_dense_points_are_drawn_with_the_map_that_reaches_them(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    view = open_recording(path)
    view.show_map(map_view(4))
    far = np.eye(4)[None, :3].copy()
    far[0, 0, 3] = 30.0  # the map grows to twice that
    view.show_dense(replace(dense_cloud(), world_from_chunk=far))
    view.show_map(map_view(60, version=2))
    view.close()
    rows = read_rows(path)

    drawn = [
        len(row["Points3D:positions"])
        for row in rows["/world/dense/keyframe_000001"]
        if "Points3D:positions" in row
    ]
    assert drawn == [0, 50]


def test_a_full_recording_ends_without_the_dense_map(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    view = RerunView.open("test", mode=ViewMode.RECORD, recording_path=path, config=CONFIG)
    view.show_map(map_view(10))
    with patch.object(RecordingLimit, "is_full", True):
        view.show_map(map_view(20, version=2))
        view.show_dense(dense_cloud())
        view.show_ground(ground_picture())
        view.close()
    rows = read_rows(path)

    assert not entities_below(rows, "/world/dense") + entities_below(rows, "/world/ground")
    assert "/world/map/chunk_00002" in rows  # of keyframes that the first map did not have


def test_a_recording_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recording cannot be started"):
        open_recording(tmp_path / "missing" / "recording.rrd")


@pytest.mark.parametrize("mode", [ViewMode.RECORD, ViewMode.NONE])
def test_a_view_that_would_show_nothing_is_refused(mode: ViewMode) -> None:
    with pytest.raises(ConfigError, match=mode.value):
        RerunView.open("test", mode=mode, recording_path=None, config=CONFIG)


def test_a_port_that_is_taken_is_named_with_the_setting_of_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=r"already in use; .*--set views\.grpc_port=N$"):
            free_endpoint("127.0.0.1", port, port_setting="views.grpc_port")


@pytest.mark.parametrize("setting", ["grpc_port", "web_port"])
def test_a_port_that_is_taken_is_refused_by_its_setting(setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = CONFIG.model_copy(update={setting: taken.getsockname()[1]})
        with pytest.raises(ConfigError, match=rf"views\.{setting}.*in use"):
            RerunView.open("test", mode=ViewMode.SERVE, recording_path=None, config=config)


@pytest.mark.parametrize("bind", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match=r"views\.bind"):
        free_endpoint(bind, 0, port_setting="views.grpc_port")


def test_a_window_needs_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="screen"):
        RerunView.open("test", mode=ViewMode.SPAWN, recording_path=None, config=CONFIG)


def listening_addresses(process: psutil.Process) -> set[str]:
    connections = process.net_connections(kind="tcp")
    return {item.laddr.ip for item in connections if item.status == psutil.CONN_LISTEN}


@pytest.mark.network
def test_a_window_fetches_from_loopback_and_closes_with_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "arguments"
    window = tmp_path / "viewer"
    window.write_text(f'#!/bin/sh\necho $$ "$@" > {said}\nexec sleep 600\n')
    window.chmod(0o755)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(rerun_service, "viewer_program", lambda: str(window))
    view = RerunView.open("test", mode=ViewMode.SPAWN, recording_path=None, config=CONFIG)
    addresses = listening_addresses(psutil.Process())
    block_until(lambda: said.exists() and said.read_text(), what="the window")
    number, *arguments = said.read_text().split()
    process = psutil.Process(int(number))
    view.close()

    assert not process.is_running()
    assert addresses == {"127.0.0.1"}
    assert arguments[arguments.index("--bind") + 1] == "127.0.0.1"
    assert arguments[arguments.index("--connect") + 1].startswith("rerun+http://127.0.0.1:")


@pytest.mark.network
def test_a_web_viewer_that_does_not_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "viewer"
    broken.write_text("#!/bin/sh\necho out of order\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(rerun_service, "viewer_program", lambda: str(broken))
    children_before = set(psutil.Process().children())
    with pytest.raises(ConfigError, match="out of order"):
        RerunView.open("test", mode=ViewMode.SERVE, recording_path=None, config=CONFIG)

    assert set(psutil.Process().children()) <= children_before


@pytest.mark.network
def test_a_served_run_is_on_loopback_only_and_ends_with_close() -> None:
    children_before = set(psutil.Process().children())
    view = RerunView.open("test", mode=ViewMode.SERVE, recording_path=None, config=CONFIG)
    try:
        (watcher,) = set(psutil.Process().children()) - children_before
        (child,) = watcher.children()
        assert listening_addresses(psutil.Process()) == {"127.0.0.1"}
        assert listening_addresses(child) == {"127.0.0.1"}
        assert view.url is not None
        with urllib.request.urlopen(view.url, timeout=HANG_S) as page:
            assert page.status == 200
            assert b"<html" in page.read()
        show_a_run(view)
    finally:
        view.close()

    assert not child.is_running()


def wait_until_quiet(path: Path) -> None:
    """Returns when a file holds something and has not grown for a while."""
    sizes = [0]

    def is_quiet() -> bool:
        time.sleep(0.2)
        sizes.append(path.stat().st_size if path.exists() else 0)
        return bool(sizes[-1]) and sizes[-3:] == sizes[-1:] * 3

    block_until(is_quiet, what=f"the end of {path}")


def fetch_late(
    view: RerunView, folder: Path, *, is_whole: Callable[[dict[str, Rows]], bool]
) -> dict[str, Rows]:
    """What a viewer gets that connects now; another one connects where one was not quick enough."""
    fetched: list[dict[str, Rows]] = []

    def has_fetched() -> bool:
        fetched.append(fetch(view, folder / f"fetched{len(fetched)}.rrd"))
        return bool(is_whole(fetched[-1]))

    block_until(has_fetched, what="the whole run")
    return fetched[-1]


def fetch(view: RerunView, path: Path) -> dict[str, Rows]:
    """What a viewer gets until no more comes for a while."""
    assert view.viewer_command is not None
    grpc_url = view.viewer_command.split()[-1]
    command = [viewer_program(), "--bind", "127.0.0.1", "--save", str(path), "--connect", grpc_url]
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_quiet(path)
    finally:
        client.terminate()
        client.wait()
    return read_rows(path)


@pytest.mark.network
@pytest.mark.filterwarnings("ignore:RRD file has no footer")
def test_who_connects_late_gets_the_run_from_its_beginning(tmp_path: Path) -> None:
    def frames_of(rows: dict[str, Rows]) -> list[Any]:
        return [row["frame"] for row in rows["/metrics/latency_ms"] if "frame" in row]

    view = RerunView.open("test", mode=ViewMode.SERVE, recording_path=None, config=CONFIG)
    try:
        show_a_run(view)
        rows = fetch_late(view, tmp_path, is_whole=lambda rows: len(frames_of(rows)) >= NUM_FRAMES)
    finally:
        view.close()

    assert frames_of(rows) == list(range(1, NUM_FRAMES + 1))


@pytest.mark.network
@pytest.mark.filterwarnings("ignore:RRD file has no footer")
def test_a_view_that_stays_gives_the_run_to_who_comes_after_its_end(tmp_path: Path) -> None:
    view = RerunView.open(
        "test", mode=ViewMode.SERVE, recording_path=None, config=CONFIG, stays=True
    )
    try:
        show_a_run(view)
        view.close()
        rows = fetch_late(view, tmp_path, is_whole=lambda rows: "/metrics/registered" in rows)
    finally:
        view.end()
    assert rows["/metrics/registered"]
    assert not view.has_viewers


@pytest.mark.network
@pytest.mark.filterwarnings("ignore:RRD file has no footer")
def test_who_connects_after_the_server_forgot_the_beginning_gets_the_whole_map(
    tmp_path: Path,
) -> None:
    config = CONFIG.model_copy(update={"memory_limit_mb": 2})
    view = RerunView.open("test", mode=ViewMode.SERVE, recording_path=None, config=config)
    whole_map = map_view(15)
    noise = np.random.default_rng(0)

    def num_points(rows: dict[str, Rows]) -> int:
        chunks = entities_below(rows, "/world/map/chunk_")
        shown = (
            next((r for r in reversed(rows[c]) if "Points3D:positions" in r), None) for c in chunks
        )
        return sum(len(row["Points3D:positions"]) for row in shown if row is not None)

    def has_forgotten(rows: dict[str, Rows]) -> bool:
        return sum(has_image(row) for row in rows["/world/live/image"]) < 100

    try:
        view.show_map(whole_map)
        for frame_id in range(1, 121):  # 6 MB of images, of a server that keeps 2
            view.show_frame(frame(frame_id, jpeg=noise.bytes(50_000)), frame_pose(frame_id))
            time.sleep(0.01)  # what is sent at once is also kept or forgotten at once
            if frame_id % 5 == 0:
                view.show_map(whole_map)
        num_expected = 15 * POINTS_PER_KEYFRAME
        rows = fetch_late(
            view,
            tmp_path,
            is_whole=lambda rows: has_forgotten(rows) and num_points(rows) >= num_expected,
        )
    finally:
        view.close()

    assert num_points(rows) == num_expected


def test_a_full_recording_goes_on_without_images_and_ends_with_the_map(tmp_path: Path) -> None:
    path = tmp_path / "recording.rrd"
    config = CONFIG.model_copy(update={"max_recording_mb": 1})
    view = RerunView.open("test", mode=ViewMode.RECORD, recording_path=path, config=config)
    noise = np.random.default_rng(0)
    view.show_event(LIVE)
    for frame_id in range(1, 201):  # 10 MB
        view.show_frame(frame(frame_id, jpeg=noise.bytes(50_000)), frame_pose(frame_id))
        view.show_event(posed(frame_id))
        if frame_id % 10 == 0:
            view._recording.flush(timeout_sec=HANG_S)  # a file is written now and then
    view.show_map(map_view(15))
    view.close()
    rows = read_rows(path)

    assert path.stat().st_size < 8_000_000
    assert 10 < len([row for row in rows["/world/live/image"] if has_image(row)]) < 150
    assert len(rows["/metrics/latency_ms"]) >= 200
    points = [row for c in entities_below(rows, "/world/map/chunk_") for row in rows[c]]
    assert sum(len(r["Points3D:positions"]) for r in points) == 15 * POINTS_PER_KEYFRAME


def jpeg_bytes(row: dict[str, Any]) -> bool:
    return "EncodedImage:blob" in row


def test_the_way_over_the_globe_is_drawn_on_request_only(tmp_path: Path) -> None:
    paths = {True: tmp_path / "with.rrd", False: tmp_path / "without.rrd"}
    for geographic_map, path in paths.items():
        config = CONFIG.model_copy(update={"geographic_map": geographic_map})
        view = RerunView.open("test", mode=ViewMode.RECORD, recording_path=path, config=config)
        for frame_id in range(1, 4):
            fix = GpsFix(latitude_deg=47.0, longitude_deg=8.0 + 1e-4 * frame_id, altitude_m=400.0)
            view.show_frame(replace(frame(frame_id), gps=fix), None)
        view.close()
    with_map, without = read_rows(paths[True]), read_rows(paths[False])

    (last_track,) = with_map["/geo/track"][-1]["GeoLineStrings:line_strings"]
    assert last_track[-1] == pytest.approx([47.0, 8.0003])
    assert len(last_track) == 3
    assert not entities_below(without, "/geo")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["missing.rrd", "picture.png"], "missing.rrd is not a file"),
        ([__file__, "picture.jpg"], "must end in .png"),
        ([__file__, "picture.png", "--size", "big"], "expected WIDTHxHEIGHT"),
    ],
)
def test_the_screenshot_tool_says_what_it_cannot_work_with(
    arguments: list[str], complaint: str
) -> None:
    tool = TOOLS / "screenshot"
    result = subprocess.run(
        [sys.executable, str(tool), *arguments], capture_output=True, text=True, check=False
    )

    assert result.returncode == 2
    assert complaint in result.stderr
