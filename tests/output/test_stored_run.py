"""What the journal gives back of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.stored_state import (
    StoredCalibration,
    StoredFrame,
    StoredRelativePose,
)
from engine.output.journal import Journal, Moment, NewKeyframe
from engine.output.run_format import format_line
from engine.output.stored_run import read_stored_run
from engine.types import (
    CalibrationOrigin,
    DescriptorKind,
    Features,
    FrameId,
    GpsFix,
    GpsReading,
    ImagePair,
    IntrinsicsPrior,
    Keyframe,
    PackedMask,
    PairReason,
    VerifiedPair,
)

JPEG = b"\xff\xd8 as received \xff\xd9"


def camera(camera_id: int = 1, *, focal_px: float = 500.0) -> pycolmap.Camera:
    made = pycolmap.Camera.create_from_model_name(camera_id, "SIMPLE_RADIAL", focal_px, 64, 48)
    made.has_prior_focal_length = True
    return made


def features(number: int, *, num: int = 40, kind: DescriptorKind) -> Features:
    rng = np.random.default_rng(number)
    return Features(
        frame_id=FrameId(number),
        keypoints_xy=rng.uniform(0, 48, (num, 2)),
        descriptors=rng.integers(0, 128, (num, 128), dtype=np.uint8),
        scales=rng.uniform(2, 30, num).astype(np.float32),
        colors=rng.integers(0, 256, (num, 3), dtype=np.uint8),
        is_free=rng.integers(0, 2, num).astype(np.bool_),
        descriptor_kind=kind,
    )


def keyframe(number: int, **changes: Any) -> Keyframe:
    values: dict[str, Any] = {
        "frame_id": FrameId(number),
        "camera_key": "left",
        "index": number * 3,
        "name": f"left/{number:06d}.jpg",
        "width": 64,
        "height": 48,
        "captured_at_s": 1.7e9 + number / 3,
        "received_at_s": 0.0,
        "features": features(number, kind=DescriptorKind.ROOT_SIFT),
    }
    return Keyframe(**{**values, **changes})


def new(of: Keyframe, *, camera_id: int = 1) -> NewKeyframe:
    return NewKeyframe(keyframe=of, camera=camera(camera_id), source="video.mp4", image_bytes=JPEG)


def pair(first: int, second: int, **changes: Any) -> VerifiedPair:
    rng = np.random.default_rng(100 * first + second)
    values: dict[str, Any] = {
        "pair": ImagePair(FrameId(first), FrameId(second)),
        "reason": PairReason.RETRIEVED,
        "inlier_matches_idx": rng.integers(0, 40, (9, 2), dtype=np.uint32),
        "num_matches": 17,
        "fundamental": rng.normal(size=(3, 3)),
        "homography_inlier_ratio": 1 / 3,
    }
    return VerifiedPair(**{**values, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(format_line() + "sift:\n  max_features: 2000\n")
    return tmp_path


def write(run: Path, *moments: Moment) -> None:
    journal = Journal.open(run)
    for moment in moments:
        journal.write(moment)
    journal.close()


def same(one: Any, other: Any) -> bool:
    """Whether two products are the same to the bit, arrays of arrays as well."""
    if isinstance(one, pycolmap.Camera):
        return repr(one) == repr(other) and same(one.params.tolist(), other.params.tolist())
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, item.name), getattr(other, item.name))
            for item in dataclasses.fields(one)
        )
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype) and one.tobytes() == other.tobytes()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def test_every_field_of_a_keyframe_comes_back_to_the_bit(run: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (48, 64)).astype(np.bool_)
    written = [
        keyframe(
            7,
            gps=GpsFix(
                latitude_deg=46.1 / 3, longitude_deg=-91.99, altitude_m=198.3, accuracy_m=0.1
            ),
            intrinsics_prior=IntrinsicsPrior(
                focal_px=1000 / 3,
                camera_model="OPENCV_FISHEYE",
                params=(500.1, 499.9, 32.0, 24.0, 0.1, 1e-17, 0.0, -0.3),
                origin=CalibrationOrigin.FILE,
                focal_sigma_ratio=0.1 / 3,
                is_fisheye=True,
                doubt='it says "7 mm", which no lens has',
            ),
            mask=PackedMask.of(mask),
            calibration_key="left#2",
        ),
        keyframe(3, is_photo=True, features=features(3, kind=DescriptorKind.OTHER)),
        keyframe(9, features=features(9, num=0, kind=DescriptorKind.ROOT_SIFT)),
    ]
    write(run, *(Moment(keyframe=new(one)) for one in written))
    stored = read_stored_run(run)
    assert len(stored.keyframes) == 3
    for one, other in zip(written, stored.keyframes, strict=True):
        assert same(one, other.keyframe)
        assert (other.camera_id, other.source, other.has_image) == (1, "video.mp4", True)
    assert stored.next_frame_id == 10


def test_pairs_come_back_to_the_bit_in_the_order_in_which_they_became_edges(run: Path) -> None:
    pose = np.column_stack([np.eye(3), [0.6, 0.0, 0.8]])
    first, second = pair(2, 3), pair(1, 3, cam2_from_cam1=pose, fundamental=np.zeros((3, 3)))
    lost = pair(1, 2, inlier_matches_idx=np.empty((0, 2), np.uint32))
    changed = pair(2, 3, num_matches=12)
    write(
        run,
        *(Moment(keyframe=new(keyframe(number))) for number in (1, 2, 3, 4)),
        Moment(pairs=(pair(1, 2), first, second), tried=(ImagePair(FrameId(1), FrameId(4)),)),
        Moment(pairs=(lost, changed)),
    )
    stored = read_stored_run(run)
    assert len(stored.pairs) == 2
    assert same(stored.pairs, (changed, second))
    assert {(one.first, one.second) for one in stored.tried} == {(2, 3), (1, 3), (1, 2), (1, 4)}
    assert len(stored.tried) == 4


def test_calibrations_frames_poses_readings_and_facts_come_back_to_the_bit(run: Path) -> None:
    prior = CameraPrior.of(
        camera(), origin=CalibrationOrigin.EXIF, focal_sigma_ratio=0.02, is_constant=True
    )
    calibration = StoredCalibration(camera=camera(focal_px=499.3), initial=camera(), prior=prior)
    frames = (
        frame(1, status="keyframe"),
        dataclasses.replace(frame(2, status="dropped:unreadable"), frame_id=None, camera_key=None),
        frame(3, status=None),
    )
    poses = (
        StoredRelativePose(
            frame_id=FrameId(5),
            keyframe_id=FrameId(1),
            index=4,
            captured_at_s=1.25,
            cam_from_keyframe=np.random.default_rng(1).normal(size=(3, 4)),
        ),
        StoredRelativePose(
            frame_id=FrameId(6),
            keyframe_id=FrameId(1),
            index=5,
            captured_at_s=1.5,
            cam_from_keyframe=None,
        ),
    )
    reading = GpsReading(
        source="flight.mp4",
        camera_key=None,
        captured_at_s=0.1,
        fix=GpsFix(latitude_deg=1 / 3, longitude_deg=2.0, altitude_m=3.0),
    )
    facts: dict[str, Any] = {
        "agreement": {"is_required": True, "ratios": [1 / 3, 1e-300]},
        "vocabulary": np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32),
        "words": "ä",
        "none": 0,
    }
    write(
        run,
        Moment(keyframe=new(keyframe(1)), frames=frames, facts={"gone": 1, "none": 5}),
        Moment(
            calibrations={"left": calibration},
            relative_poses=poses,
            gps_readings=(reading,),
            facts={**facts, "gone": None},
        ),
    )
    stored = read_stored_run(run)
    assert list(stored.calibrations) == ["left"]
    assert same(stored.calibrations["left"], calibration)
    assert same(stored.cameras[1], calibration.camera)
    assert stored.frames == frames
    assert same(stored.relative_poses, poses)
    assert stored.gps_readings == (reading,)
    assert stored.facts.keys() == facts.keys()
    assert all(same(stored.facts[name], fact) for name, fact in facts.items())
    source = stored.sources["video.mp4"]
    assert (source.camera_keys, source.next_index, source.last_index) == (("left",), 3, 3)
    assert source.unsettled == (frames[2],)
    assert stored.next_frame_id == 4


def frame(number: int, *, status: str | None) -> StoredFrame:
    return StoredFrame(
        frame_id=FrameId(number),
        camera_key="left",
        source="video.mp4",
        index=number,
        name=f"{number:06d}.jpg",
        captured_at_s=number / 3,
        status=status,
    )


def test_keypoints_that_moved_and_cameras_that_changed_come_back_as_they_were_last(
    run: Path,
) -> None:
    moved = features(11, kind=DescriptorKind.ROOT_SIFT)
    before = keyframe(1)
    moved = dataclasses.replace(moved, frame_id=FrameId(1), descriptors=before.features.descriptors)
    zoomed = StoredCalibration(
        camera=camera(2, focal_px=700.0),
        initial=camera(2),
        prior=CameraPrior.assumed(camera(2)),
    )
    write(
        run,
        Moment(keyframe=new(before)),
        Moment(
            moved=(moved,),
            calibrations={"left#1": zoomed},
            recalibrated={FrameId(1): camera(2, focal_px=710.0)},
        ),
    )
    (stored,) = read_stored_run(run).keyframes
    assert same(stored.keyframe.features, moved)
    assert (stored.camera_id, stored.keyframe.calibration_key) == (2, "left#1")
    assert read_stored_run(run).cameras[2].params[0] == 710.0
