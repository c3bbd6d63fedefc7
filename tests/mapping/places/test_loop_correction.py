"""Loops: a map that drifted is closed by its pairs; pairs that only look alike leave it alone."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import (
    GlobalBundleAdjustmentConfig,
    LocalBundleAdjustmentConfig,
    LoopsConfig,
)
from engine.events import Event, LoopClosed, LoopCorrected, LoopRefused
from engine.geometry import camera_center
from engine.mapping.model.growth import GrowthConfig, register_and_refine
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places import loop_closing
from engine.mapping.places.contradictions import find_contradictions
from engine.mapping.places.loop_closing import LoopClosing
from engine.mapping.places.loop_correction import LoopCorrection
from engine.types import Float64Array, FrameId, ImagePair, RegistrationStatus, VerifiedPair
from tests.support.synthetic import (
    SyntheticWorld,
    add_unused_pair,
    ground,
    grown_map,
    map_of_keyframes,
    pose_errors,
    poses_of,
    repeated_place,
    round_path,
    straight_path,
)

GROWTH = GrowthConfig(
    min_inlier_ratio=0.25,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)
NUM_FRAMES = 40
ENDS = [(one, other) for one in (1, 2, 3, 4) for other in (37, 38, 39, 40)]


@pytest.fixture(scope="module")
def ring() -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM_FRAMES, radius=14.0), noise_px=0.5)


def drifted(poses: Float64Array, *, scale: float) -> Float64Array:
    """Poses (N, 3, 4) whose steps shrink steadily, to ``scale`` at the end."""
    centers = camera_center(poses)
    scales = scale ** (np.arange(len(poses)) / (len(poses) - 1))
    steps = scales[:-1, None] * np.diff(centers, axis=0)
    moved = np.concatenate([centers[:1], centers[0] + np.cumsum(steps, axis=0)])
    return np.concatenate([poses[:, :, :3], -poses[:, :, :3] @ moved[:, :, None]], axis=2)


def drifted_map(world: SyntheticWorld, loops: list[VerifiedPair]) -> SparseMap:
    sparse_map = map_of_keyframes(world, max_gap=4, given_pairs=loops)
    poses = drifted(world.poses, scale=0.85)
    sparse_map.place({FrameId(number + 1): pose for number, pose in enumerate(poses)})
    for frame_id in sparse_map.registered_ids:
        sparse_map.triangulate(frame_id)
    sparse_map.filter_all()
    return sparse_map


def closing(events: list[Event], **settings: bool) -> LoopClosing:
    def emit(event: Event) -> None:
        events.append(event)

    return LoopClosing(LoopsConfig(**settings), growth=GROWTH, min_inliers=20, seed=0, emit=emit)


@pytest.mark.slow
def test_a_map_that_drifted_is_closed(ring: SyntheticWorld) -> None:
    events: list[Event] = []
    loops = [ring.verified_pair(*ends) for ends in ENDS]
    sparse_map = drifted_map(ring, loops)
    before = poses_of(sparse_map)
    watched = closing(events)
    watched.add_loop(loops[0])
    watched.report(sparse_map)
    assert events == []
    corrected = watched.correct(sparse_map, is_final=True)
    assert corrected is not None
    watched.report(corrected)
    found, closed = events
    assert isinstance(found, LoopCorrected)
    assert found.num_pairs >= 3
    assert found.error_before_px > 20.0
    assert 0.1 < found.error_after_px < 2.0
    assert found.scale_ratio > 1.08
    assert isinstance(closed, LoopClosed)
    assert find_contradictions(corrected) == []
    assert corrected.registered_ids == ring.frame_ids
    was, now = pose_errors(before, ring), pose_errors(poses_of(corrected), ring)
    assert was.rmse_ratio > 0.01
    assert 1e-5 < now.rmse_ratio < 2e-3
    assert all((sparse_map.cam_from_world(i) == before[i]).all() for i in before)
    assert watched.correct(corrected, is_final=True) is None


@pytest.mark.slow
def test_a_keyframe_where_a_loop_drifted_registers_so_that_it_is_closed(
    ring: SyntheticWorld,
) -> None:
    """The pairs of the last keyframe show it after the one before and at the beginning."""
    newest = FrameId(NUM_FRAMES)
    sparse_map = map_of_keyframes(
        ring, max_gap=4, given_pairs=[ring.verified_pair(*ends) for ends in ENDS]
    )
    poses = drifted(ring.poses, scale=0.85)
    sparse_map.place({i: poses[i - 1] for i in ring.frame_ids if i != newest})
    for frame_id in sparse_map.registered_ids:
        sparse_map.triangulate(frame_id)
    sparse_map.filter_all()

    registration = register_and_refine(sparse_map, newest, config=GROWTH)

    assert registration.status is RegistrationStatus.REGISTERED
    centers = [camera_center(sparse_map.cam_from_world(FrameId(i))) for i in (38, 39, 40)]
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=1)
    assert 0.7 < steps[1] / steps[0] < 1.3
    events: list[Event] = []
    corrected = closing(events).correct(sparse_map, is_final=True)
    assert corrected is not None
    assert find_contradictions(corrected) == []
    assert corrected.registered_ids == ring.frame_ids
    assert pose_errors(poses_of(corrected), ring).rmse_ratio < 5e-3


def test_without_correction_the_contradiction_stays(ring: SyntheticWorld) -> None:
    events: list[Event] = []
    sparse_map = drifted_map(ring, [ring.verified_pair(*ends) for ends in ENDS])
    contradicting = {verified.pair for verified, _ in find_contradictions(sparse_map)}
    assert {pair.first for pair in contradicting} >= {1, 2}
    assert closing(events, correct=False).correct(sparse_map, is_final=True) is None
    assert events == []


def counted(monkeypatch: pytest.MonkeyPatch, name: str, value: object = None) -> list[object]:
    """What a function of `loop_closing` was called with; it gives a value, or what it gave."""
    calls: list[object] = []
    former = getattr(loop_closing, name)

    def call(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return former(*args, **kwargs) if value is None else value

    monkeypatch.setattr(loop_closing, name, call)
    return calls


def test_contradictions_that_are_gone_cost_nothing_any_more(
    ring: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [ring.verified_pair(*ends) for ends in ENDS]
    drifted, right = drifted_map(ring, loops), map_of_keyframes(ring, frame_ids=range(1, 5))
    watched = closing([])
    for frame_id in (37, 38, 39, 40):
        watched.watch(drifted, FrameId(frame_id))
    examined = counted(monkeypatch, "find_contradictions")
    for _ in range(3):
        assert watched.correct(right) is None
    assert len(examined) == 1


def test_what_is_refused_at_the_end_is_tried_again_when_the_map_is_another_one(
    ring: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    sparse_map = drifted_map(ring, [ring.verified_pair(*ends) for ends in ENDS])
    first, second = FrameId(1), FrameId(40)
    refused = LoopRefused(first=first, second=second, num_pairs=9, error_px=40.0, reason="")
    tried = counted(monkeypatch, "correct_loops", LoopCorrection(event=refused))
    watched = closing(events)
    for _ in range(3):
        assert watched.correct(sparse_map, is_final=True) is None
    assert len(tried) == len(events) == 1
    sparse_map.deregister([FrameId(20)])
    assert watched.correct(sparse_map, is_final=True) is None
    assert len(tried) == len(events) == 2


def test_a_single_pair_corrects_nothing(ring: SyntheticWorld) -> None:
    events: list[Event] = []
    sparse_map = drifted_map(ring, [ring.verified_pair(1, 40)])
    assert len(find_contradictions(sparse_map)) == 1
    assert closing(events).correct(sparse_map, is_final=True) is None
    assert events == []


def false_pair(world: SyntheticWorld, one: int, other: int, *, source: int) -> VerifiedPair:
    """A pair whose second end looks as frame ``source`` does: matches of another pair."""
    true = world.verified_pair(one, source)
    rng = np.random.default_rng((one, other))
    rows1 = true.inlier_matches_idx[:, 0]
    rows2 = rng.permutation(len(world.view(other).point_ids))[: len(rows1)]
    num = min(len(rows1), len(rows2))
    return VerifiedPair(
        pair=ImagePair(FrameId(one), FrameId(other)),
        reason=true.reason,
        inlier_matches_idx=np.column_stack([rows1[:num], rows2[:num]]).astype(np.uint32),
        num_matches=num,
        fundamental=true.fundamental,
        homography_inlier_ratio=true.homography_inlier_ratio,
    )


def test_pairs_whose_matches_agree_on_nothing_do_not_count() -> None:
    events: list[Event] = []
    world = SyntheticWorld(straight_path(18), noise_px=0.5)
    sparse_map = grown_map(world)
    for one in (1, 2, 3):
        for other in (16, 17, 18):
            add_unused_pair(sparse_map, false_pair(world, one, other, source=one + 1))
    assert find_contradictions(sparse_map) == []
    assert closing(events).correct(sparse_map, is_final=True) is None
    assert events == []


def test_a_map_that_nothing_contradicts_is_left_alone() -> None:
    events: list[Event] = []
    world = SyntheticWorld(straight_path(10), noise_px=0.5)
    sparse_map = grown_map(world)
    watched = closing(events)
    for frame_id in sparse_map.registered_ids:
        watched.watch(sparse_map, frame_id)
        assert watched.correct(sparse_map) is None
    assert watched.correct(sparse_map, is_final=True) is None
    assert events == []


@pytest.fixture(scope="module")
def look_alike() -> SparseMap:
    """A right map of a way past two places that look alike, with pairs across them."""
    poses = straight_path(18)
    points, looks_like = repeated_place(ground(poses), x_range=(3.0, 27.0), shift=24.0, ratio=0.4)
    world = SyntheticWorld(poses, points=points, looks_like=looks_like, noise_px=0.5)
    across = [world.verified_pair(one, other) for one in range(1, 4) for other in range(13, 16)]
    sparse_map = map_of_keyframes(world, max_gap=4, given_pairs=across)
    sparse_map.place({frame_id: world.pose(frame_id) for frame_id in world.frame_ids})
    for frame_id in sparse_map.registered_ids:
        sparse_map.triangulate(frame_id)
    sparse_map.filter_all()
    return sparse_map


@pytest.mark.slow
def test_pairs_that_all_the_others_contradict_are_refuted_and_leave_the_map(
    look_alike: SparseMap,
) -> None:
    events: list[Event] = []
    false = [verified for verified, _ in find_contradictions(look_alike)]
    assert len(false) >= 6
    assert closing(events).correct(look_alike) is None  # not before the end
    watched = closing(events)
    without = watched.correct(look_alike, is_final=True)
    (refused,) = events
    assert isinstance(refused, LoopRefused)
    assert refused.num_pairs == len(false)
    assert refused.error_px > 20.0
    assert refused.reason == "the pairs do not ask for one and the same correction"
    assert without is not None
    assert find_contradictions(without) == []
    for frame_id in look_alike.registered_ids:
        here, there = (one.cam_from_world(frame_id) for one in (without, look_alike))
        np.testing.assert_array_equal(here, there)


@pytest.mark.slow
def test_refuted_pairs_that_others_confirm_still_speak_against_the_map(
    look_alike: SparseMap,
) -> None:
    watched = closing([])
    false = {verified.pair for verified, _ in find_contradictions(look_alike)}
    without = watched.correct(look_alike, is_final=True)
    assert without is not None
    found = watched.contradictions(without, is_confirmed=lambda pair: pair.first == 1)
    assert {one.pair for one, _ in found} == {pair for pair in false if pair.first == 1}
    assert watched.contradictions(without, is_confirmed=lambda pair: False) == []
