"""What mapping tells, fact by fact."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from engine.mapping.facts import MappingFacts

from engine.events import (
    BundleAdjusted,
    Event,
    FramePosed,
    FrameRegistered,
    KeyframeAdded,
    LoopClosed,
    MapInitialized,
    MetricScaleEstimated,
    MisplacementFound,
    PairVerified,
    RegistrationFailed,
)
from engine.mapping.bundle_adjustment import GlobalMerge
from engine.mapping.metric_scale import MetricScale
from engine.mapping.misplacement import Misplacement
from engine.mapping.sparse_map import Registration
from engine.types import FrameId, FramePose, ImagePair, PairReason, RegistrationStatus
from tests.support.synthetic import SyntheticWorld, grown_map, straight_path

WORLD = SyntheticWorld(straight_path(4))
SPARSE_MAP = grown_map(WORLD)
NUM_POINTS = SPARSE_MAP.num_points3D
PAIR = WORLD.verified_pair(1, 3)
ONE, THREE = FrameId(1), FrameId(3)
AT_S = 2.5

FACTS: dict[str, tuple[Callable[[MappingFacts], None], Event]] = {
    "keyframe": (
        lambda facts: facts.keyframe_added(WORLD.keyframe(3)),
        KeyframeAdded(
            camera_key="camera",
            at_s=AT_S,
            frame_id=THREE,
            name="000003.jpg",
            captured_at_s=WORLD.keyframe(3).captured_at_s,
            num_keypoints=len(WORLD.view(3).point_ids),
        ),
    ),
    "pair": (
        lambda facts: facts.pair_verified(PAIR),
        PairVerified(
            at_s=AT_S,
            first=ONE,
            second=THREE,
            reason=PairReason.EXHAUSTIVE,
            num_matches=PAIR.num_matches,
            num_inliers=PAIR.num_inliers,
        ),
    ),
    "loop": (
        lambda facts: facts.loop_closed(PAIR),
        LoopClosed(at_s=AT_S, first=ONE, second=THREE, num_inliers=PAIR.num_inliers),
    ),
    "map": (
        lambda facts: facts.map_initialized(PAIR.pair, sparse_map=SPARSE_MAP, attempt=2),
        MapInitialized(at_s=AT_S, first=ONE, second=THREE, num_points3D=NUM_POINTS, attempt=2),
    ),
    "metric scale": (
        lambda facts: facts.metric_scale_estimated(
            MetricScale(metres_per_map_unit=7.5, num_depths=900, spread_ratio=0.1),
            is_applied=True,
        ),
        MetricScaleEstimated(
            at_s=AT_S, metres_per_map_unit=7.5, num_depths=900, spread_ratio=0.1, is_applied=True
        ),
    ),
    "registered": (
        lambda facts: facts.registered(
            THREE,
            Registration(
                status=RegistrationStatus.REGISTERED, num_inliers=40, num_correspondences=50
            ),
            sparse_map=SPARSE_MAP,
            is_retry=True,
            elapsed_s=0.25,
        ),
        FrameRegistered(
            at_s=AT_S,
            frame_id=THREE,
            num_inliers=40,
            num_correspondences=50,
            num_registered=4,
            num_points3D=NUM_POINTS,
            is_retry=True,
            elapsed_s=0.25,
        ),
    ),
    "failed": (
        lambda facts: facts.registration_failed(
            THREE, Registration(status=RegistrationStatus.TOO_FEW_INLIERS, num_inliers=3)
        ),
        RegistrationFailed(
            at_s=AT_S,
            frame_id=THREE,
            status=RegistrationStatus.TOO_FEW_INLIERS,
            num_inliers=3,
            num_correspondences=0,
        ),
    ),
    "misplacement": (
        lambda facts: facts.misplacement_found(
            Misplacement(keyframe_ids=(ONE,), misleading=(), evidence=ImagePair(FrameId(2), THREE))
        ),
        MisplacementFound(
            at_s=AT_S, keyframe_ids=(ONE,), evidence_first=FrameId(2), evidence_second=THREE
        ),
    ),
    "adjusted": (
        lambda facts: facts.adjusted(
            GlobalMerge(
                num_keyframes=3,
                keyframes_added_meanwhile=1,
                error_before_px=0.8,
                error_after_px=0.6,
                elapsed_s=0.5,
            ),
            sparse_map=SPARSE_MAP,
        ),
        BundleAdjusted(
            at_s=AT_S,
            num_keyframes=3,
            num_points3D=NUM_POINTS,
            reprojection_error_before_px=0.8,
            reprojection_error_after_px=0.6,
            keyframes_added_meanwhile=1,
            elapsed_s=0.5,
        ),
    ),
}


def told_by(tell: Callable[[MappingFacts], None]) -> list[Event]:
    told: list[Event] = []

    def emit(event: Event) -> None:
        told.append(event)

    tell(MappingFacts(emit=emit, clock=lambda: AT_S))
    return told


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_becomes_one_event_with_its_figures(name: str) -> None:
    tell, event = FACTS[name]
    assert told_by(tell) == [event]


def test_a_pose_is_told_by_its_centre_and_its_latency() -> None:
    pose = FramePose(
        frame_id=THREE,
        index=2,
        captured_at_s=0.3,
        cam_from_world=np.array([[1.0, 0, 0, -4.0], [0, 1, 0, -5.0], [0, 0, 1, -6.0]]),
        is_keyframe=True,
    )
    received_at_s = time.monotonic() - 3.0
    (event,) = told_by(
        lambda facts: facts.posed(pose, camera_key="camera", received_at_s=received_at_s)
    )
    assert isinstance(event, FramePosed)
    assert event.cam_center_in_world == (4.0, 5.0, 6.0)
    assert (event.frame_id, event.captured_at_s, event.is_keyframe) == (THREE, 0.3, True)
    assert 3.0 <= event.latency_s < 60.0
