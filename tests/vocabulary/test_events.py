"""Events: one JSON line each, complete, and never changed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from engine.events import (
    BundleAdjusted,
    CameraCalibrated,
    CameraDoubted,
    CameraSplit,
    CameraTurning,
    CommandTaken,
    ComponentJoined,
    ComponentStarted,
    ControlPointsUsed,
    CropFound,
    DenseMapWritten,
    DepthEstimated,
    DiskSpaceLow,
    EarlyMapMade,
    Event,
    FaultKind,
    FaultOccurred,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    LensRecognised,
    LoadMeasured,
    LoopClosed,
    LoopCorrected,
    LoopRefused,
    MainMapChanged,
    MapInitialized,
    MetricScaleEstimated,
    MisplacementFound,
    OverlayFound,
    PairsRejected,
    PairVerified,
    RegistrationFailed,
    RunFinished,
    RunFolderMoved,
    RunPart,
    RunResumed,
    RunStarted,
    SnapshotWritten,
    SourceChanged,
    SourceOpened,
    VerdictChanged,
    Warned,
    WeakPairsMatched,
    WindowPurpose,
    WindowSolved,
    WindowVerdict,
    ZoomSearched,
)
from engine.types import (
    DropReason,
    FrameId,
    LeftOut,
    PairReason,
    RegistrationStatus,
    RunCommand,
    SourceState,
    Verdict,
    VerdictLevel,
    VerdictReason,
)

ONE, TWO = FrameId(1), FrameId(2)

EVENTS: tuple[Event, ...] = (
    RunStarted(at_s=0.5, sources=("folder", "camera:0"), matcher="sift"),
    RunResumed(
        at_s=0.5,
        sources=("folder",),
        matcher="sift",
        num_keyframes=9,
        num_registered=8,
        num_frames_again=2,
    ),
    SourceOpened(
        at_s=0.5,
        source="folder",
        address="/home/folder",
        prefix="",
        is_live=False,
        fingerprint="0a1b2c3d",
    ),
    FaultOccurred(
        at_s=0.5,
        part=RunPart.MATCHING,
        kind=FaultKind.HUNG,
        detail="matching has not ended after 120 s",
        consequence="the keyframe is matched again with the next one",
        num_faults=1,
        frame_id=TWO,
    ),
    FrameReceived(at_s=0.5, frame_id=ONE, index=0, captured_at_s=0.0),
    FrameDropped(
        at_s=0.5,
        frame_id=None,
        source="folder",
        index=3,
        name="bäume.jpg",
        captured_at_s=3.0,
        reason=DropReason.UNREADABLE,
        detail="the JPEG ends early",
    ),
    FramePosed(
        camera_key="camera",
        at_s=0.5,
        frame_id=ONE,
        captured_at_s=0.0,
        cam_center_in_world=(0.0, 1.5, -2.0),
        world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
        is_first=True,
        is_keyframe=True,
        latency_s=0.25,
    ),
    KeyframeAdded(
        camera_key="camera",
        at_s=0.5,
        frame_id=ONE,
        index=0,
        is_photo=False,
        name="a.jpg",
        captured_at_s=0.0,
        num_keypoints=900,
    ),
    PairVerified(
        at_s=0.5,
        first=ONE,
        second=TWO,
        reason=PairReason.RETRIEVED,
        num_matches=300,
        num_inliers=200,
    ),
    PairsRejected(at_s=0.5, frame_id=TWO, num_pairs=12, num_given_up_early=9),
    CameraCalibrated(
        at_s=0.5,
        camera_key="camera",
        model="SIMPLE_RADIAL",
        focal_px=800.0,
        how="exif",
        focal_sigma_ratio=0.02,
    ),
    CameraSplit(
        at_s=0.5,
        camera_key="camera",
        calibration_keys=("camera", "camera#2"),
        focal_px=(800.0, 1200.0),
        frame_ids=(ONE, TWO),
        calibration_idx=(0, 1),
    ),
    CameraTurning(
        at_s=0.5,
        camera_key="camera",
        first=ONE,
        last=TWO,
        num_keyframes=4,
        turned_deg=30.0,
        is_whole=False,
    ),
    CropFound(
        at_s=0.5,
        camera_key="crop",
        whole_camera_key="camera",
        focal_px=800.0,
        principal_point_xy=(320.0, 240.0),
    ),
    ZoomSearched(at_s=0.5, camera_key="camera", frame_ids=(FrameId(2), FrameId(9))),
    LensRecognised(
        at_s=0.5,
        camera_key="camera",
        model="RADIAL_FISHEYE",
        focal_px=500.0,
        former_model="SIMPLE_RADIAL",
        former_focal_px=816.0,
        gain_ratio=1.4,
    ),
    CameraDoubted(at_s=0.5, camera_key="camera", reason="k1 is 14.3", is_held=True),
    EarlyMapMade(at_s=0.4, first=ONE, second=TWO, num_registered=2, num_points3D=80),
    MapInitialized(at_s=0.5, first=ONE, second=TWO, num_points3D=120, attempt=1),
    MetricScaleEstimated(
        at_s=0.5, metres_per_map_unit=7.5, num_depths=900, spread_ratio=0.1, is_applied=True
    ),
    WindowSolved(
        at_s=0.5,
        purpose=WindowPurpose.RESCUE,
        verdict=WindowVerdict.MERGED,
        reason="fits by +2.0%",
        keyframe_ids=(FrameId(1), TWO),
        num_registered=1,
        num_observations_before=90,
        num_observations_after=120,
        error_before_px=0.5,
        error_after_px=0.4,
        moved_map=0.25,
        elapsed_s=0.4,
        cpu_s=0.3,
    ),
    FrameRegistered(
        at_s=0.5,
        frame_id=TWO,
        num_inliers=50,
        num_correspondences=60,
        num_registered=2,
        num_points3D=120,
        is_retry=False,
        elapsed_s=0.01,
    ),
    RegistrationFailed(
        at_s=0.5,
        frame_id=TWO,
        status=RegistrationStatus.TOO_FEW_INLIERS,
        num_inliers=5,
        num_correspondences=60,
    ),
    ComponentStarted(
        at_s=0.5, map_number=1, first=ONE, second=TWO, num_registered=3, num_points3D=120
    ),
    ComponentJoined(
        at_s=0.5,
        map_number=1,
        into_map_number=0,
        keyframe_ids=(ONE, TWO),
        num_inliers=80,
        num_registered=12,
    ),
    MisplacementFound(
        at_s=0.5, keyframe_ids=(ONE, TWO), evidence_first=ONE, evidence_second=FrameId(7)
    ),
    OverlayFound(
        at_s=0.5,
        camera_key="camera",
        share=0.02,
        boxes=((500, 10, 620, 50), (12, 12, 200, 60)),
        num_keyframes=5,
    ),
    LoopClosed(at_s=0.5, first=ONE, second=TWO, num_inliers=70),
    LoopCorrected(
        at_s=0.5,
        first=ONE,
        second=TWO,
        num_pairs=5,
        error_before_px=120.0,
        error_after_px=0.7,
        scale_ratio=1.1,
        rotation_rad=0.02,
        moved_map=0.5,
        num_points_merged=100,
        elapsed_s=2.0,
    ),
    LoopRefused(
        at_s=0.5, first=ONE, second=TWO, num_pairs=3, error_px=80.0, reason="they do not agree"
    ),
    DepthEstimated(
        at_s=0.5,
        frame_id=ONE,
        status="made",
        reason="2 neighbours",
        num_points=900,
        is_again=True,
        cpu_s=0.06,
    ),
    DenseMapWritten(
        at_s=0.5,
        path="products/dense.ply",
        num_keyframes=9,
        num_points=100_000,
        verdict="good",
        cpu_s=0.4,
    ),
    BundleAdjusted(
        at_s=0.5,
        num_keyframes=9,
        num_points3D=120,
        reprojection_error_before_px=0.9,
        reprojection_error_after_px=0.5,
        keyframes_added_meanwhile=2,
        elapsed_s=0.3,
    ),
    SourceChanged(
        at_s=0.5,
        source="rtsp://drone",
        state=SourceState.LOST,
        detail="no frame for 5 s",
        left_out=(LeftOut(kind=".mov", reason="a video", num_files=2, example="a.mov"),),
    ),
    CommandTaken(at_s=0.5, command=RunCommand.PAUSE),
    Georeferenced(
        at_s=0.5,
        origin_latitude_deg=47.0,
        origin_longitude_deg=8.5,
        origin_altitude_m=430.0,
        metres_per_map_unit=3.2,
        num_fixes=13,
        rmse_m=0.4,
        rejected_ids=(TWO,),
    ),
    ControlPointsUsed(
        at_s=0.5,
        num_control=5,
        num_check=2,
        rejected=("P3",),
        rmse_m=0.04,
        check_rmse_m=0.06,
        metres_per_map_unit=1.01,
    ),
    SnapshotWritten(
        at_s=0.5,
        sequence=4,
        path="runs/x/snapshots/000001",
        num_keyframes=9,
        num_points3D=120,
        elapsed_s=0.1,
    ),
    RunFolderMoved(
        at_s=0.5,
        former_path="runs/x",
        path="runs/x.rescued",
        reason="was deleted",
        num_images_lost=3,
    ),
    DiskSpaceLow(at_s=0.5, free_mb=12.5, reserve_mb=500.0),
    MainMapChanged(at_s=0.5, former_map_number=1, num_registered=20, num_registered_in_former=6),
    VerdictChanged(
        at_s=0.5,
        verdict=Verdict(
            level=VerdictLevel.WRONG,
            reasons=(
                VerdictReason(
                    kind="turning",
                    level=VerdictLevel.WRONG,
                    sentence="frames 2 to 9 turn on the spot",
                    frame_ids=(FrameId(2), FrameId(9)),
                ),
            ),
        ),
    ),
    Warned(at_s=0.5, message="the disk is slow"),
    WeakPairsMatched(at_s=0.5, matcher="mast3r", num_pairs=4, num_left_out=2),
    LoadMeasured(
        at_s=0.5,
        period_s=2.0,
        cpu_s={"match": 0.5},
        loop_late_s=0.01,
        queue_wait_s={"writes": 0.1},
    ),
    RunFinished(at_s=0.5, stopped_by="signal", num_keyframes=9, num_registered=8),
)
event_by_name = pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)


def test_every_kind_of_event_is_tested_here() -> None:
    # By name: a class with slots is made twice, and the first one is listed, too.
    kinds = {kind.__name__ for kind in Event.__subclasses__()}
    assert {type(event).__name__ for event in EVENTS} == kinds


def _as_json(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, tuple) else value


@event_by_name
def test_an_event_survives_being_a_line_of_json(event: Event) -> None:
    line = json.dumps(event.as_record(), allow_nan=False)
    record = json.loads(line)
    expected: dict[str, Any] = {key: _as_json(value) for key, value in event.as_record().items()}
    assert "\n" not in line
    assert record == expected


@event_by_name
def test_a_record_starts_with_the_kind_and_the_time_and_holds_every_field(event: Event) -> None:
    names = [field.name for field in dataclasses.fields(event)]
    assert list(event.as_record()) == ["event", *names]
    assert names[0] == "at_s"
    assert event.as_record()["event"] == type(event).__name__


@event_by_name
def test_an_event_is_a_value_and_never_changes(event: Event) -> None:
    assert dataclasses.replace(event) == event
    assert dataclasses.replace(event, at_s=0.75) != event
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.at_s = 1.0  # type: ignore[misc]


def test_reasons_are_written_as_their_words() -> None:
    by_name = {type(event).__name__: json.dumps(event.as_record()) for event in EVENTS}
    assert '"reason": "unreadable"' in by_name["FrameDropped"]
    assert '"reason": "retrieved"' in by_name["PairVerified"]
    assert '"status": "too_few_inliers"' in by_name["RegistrationFailed"]
