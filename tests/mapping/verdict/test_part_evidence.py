"""Parts of a map: what contradicts the place of a whole part, and how little may join it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.geometry import camera_center, rotation_from_vector
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.verdict.part_evidence import PartsEvidence, examine_parts, views_of
from engine.types import Float64Array, FrameId, ImagePair, VerifiedPair
from tests.support.synthetic import SyntheticWorld, grown_map, round_path, straight_path

NUM, FIRST_OF_PART, MOVED = 16, FrameId(12), FrameId(7)
UNMOVED = np.eye(4)[:3]


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM, turns=0.5), noise_px=0.4)


def pairs_of(sparse_map: SparseMap) -> list[VerifiedPair]:
    return [
        verified
        for frame_id in sparse_map.keyframe_ids
        for other, verified in sparse_map.neighbors(frame_id).items()
        if other < frame_id
    ]


def is_across(verified: VerifiedPair) -> bool:
    return verified.pair.first < FIRST_OF_PART <= verified.pair.second


def examined(
    sparse_map: SparseMap,
    is_agreed: Callable[[ImagePair], bool] | None = None,
    *,
    pairs: Sequence[VerifiedPair] | None = None,
) -> PartsEvidence:
    pairs = pairs_of(sparse_map) if pairs is None else pairs
    views = views_of(sparse_map, pairs)
    return examine_parts(sparse_map, pairs, views=views, is_agreed=is_agreed)


def with_part_moved(world: SyntheticWorld, *, degrees: float = 0.0, size: float = 1.0) -> SparseMap:
    """A map whose last keyframes are turned and enlarged together about the first of them."""
    sparse_map = grown_map(world)
    center = camera_center(sparse_map.cam_from_world(FIRST_OF_PART))
    turn = size * rotation_from_vector(np.radians([0.0, 0.0, degrees]))
    moved = np.column_stack([turn, center - turn @ center])
    parts: dict[FrameId, Float64Array] = {
        i: moved if i >= FIRST_OF_PART else UNMOVED for i in sparse_map.registered_ids
    }
    sparse_map.transform_parts(parts)
    sparse_map.filter_all()
    return sparse_map


@pytest.mark.parametrize("wrong_ratio", [0.0, 0.3])
def test_nothing_is_said_of_a_right_map(world: SyntheticWorld, wrong_ratio: float) -> None:
    assert examined(grown_map(world, wrong_ratio=wrong_ratio)) == PartsEvidence()


def test_no_keyframes_have_no_parts(world: SyntheticWorld) -> None:
    assert examined(grown_map(world), pairs=[]) == PartsEvidence()


@pytest.mark.parametrize(("degrees", "size"), [(6.0, 1.0), (6.0, 1.3)])
def test_a_part_in_the_wrong_place_is_contested(
    world: SyntheticWorld, degrees: float, size: float
) -> None:
    contested = examined(with_part_moved(world, degrees=degrees, size=size)).contested
    assert contested is not None
    assert set(contested.frame_ids) <= set(range(FIRST_OF_PART, NUM + 1))
    assert len(contested.frame_ids) >= NUM - FIRST_OF_PART
    assert contested.num_contradicting > 0.5 * contested.num_pairs
    assert contested.contradicting_ratio > 0.5


@pytest.mark.parametrize("size", [0.7, 1.4])
def test_a_part_of_another_size_on_a_straight_way_shares_few_points_with_the_rest(
    size: float,
) -> None:
    straight = SyntheticWorld(straight_path(NUM, step=1.0), noise_px=0.4)
    assert examined(grown_map(straight)).torn is None
    torn = examined(with_part_moved(straight, size=size)).torn
    assert torn is not None
    assert abs(len(torn.frame_ids) - (NUM + 1 - FIRST_OF_PART)) <= 1
    assert torn.common_ratio < 0.3


def test_a_keyframe_moved_along_its_motion_shares_few_points_with_the_rest() -> None:
    sparse_map = grown_map(SyntheticWorld(straight_path(NUM, step=1.0), noise_px=0.4))
    pose = sparse_map.cam_from_world(MOVED)
    center, before = (
        camera_center(pose),
        camera_center(sparse_map.cam_from_world(FrameId(MOVED - 1))),
    )
    center = center + 0.4 * (center - before)
    sparse_map.set_pose(MOVED, np.column_stack([pose[:, :3], -pose[:, :3] @ center]))
    sparse_map.filter_all()
    found = examined(sparse_map)
    assert found.contested is None  # no epipolar line says it
    assert found.torn is not None
    assert found.torn.frame_ids == (MOVED,)
    assert found.torn.common_ratio < 0.1


@pytest.mark.parametrize(("kept", "is_torn"), [(0.36, False), (0.15, True)])
def test_a_keyframe_that_lost_points_as_a_blurred_one_does_is_torn_only_where_few_are_left(
    kept: float, is_torn: bool
) -> None:
    sparse_map = grown_map(SyntheticWorld(straight_path(NUM, step=1.0), noise_px=0.4))
    image = sparse_map.reconstruction.image(MOVED)
    observed = [row for row, point in enumerate(image.points2D) if point.has_point3D()]
    for row in observed[round(kept * len(observed)) :]:
        sparse_map.reconstruction.delete_observation(MOVED, row)
    sparse_map.filter_touched([MOVED])  # what is known of observations is counted anew
    found = examined(sparse_map)
    assert found.contested is None
    assert (found.torn is not None) == is_torn


def test_pairs_that_no_third_view_confirms_contest_nothing_that_others_hold(
    world: SyntheticWorld,
) -> None:
    sparse_map = grown_map(world)
    pairs = pairs_of(sparse_map)
    false = {one.pair for one in pairs if is_across(one) and one.pair.second % 2 == 0}
    deceived = [mismatched(one) if one.pair in false else one for one in pairs]
    assert examined(sparse_map, lambda pair: True, pairs=deceived).contested is not None
    unproven = examined(sparse_map, lambda pair: pair not in false, pairs=deceived)
    assert unproven.contested is None


def mismatched(verified: VerifiedPair) -> VerifiedPair:
    """The same keypoints, each with the match of another."""
    rows = verified.inlier_matches_idx.copy()
    rows[:, 1] = np.roll(rows[:, 1], len(rows) // 2)
    return replace(verified, inlier_matches_idx=rows)


def test_third_views_are_not_asked_about_a_right_map(world: SyntheticWorld) -> None:
    def refuse(pair: ImagePair) -> bool:
        raise AssertionError(pair)

    assert examined(grown_map(world), refuse) == PartsEvidence()


@pytest.mark.parametrize(("num_pairs", "is_thin"), [(0, True), (2, True), (100, False)])
def test_a_part_that_few_weak_pairs_join_is_named(
    world: SyntheticWorld, num_pairs: int, is_thin: bool
) -> None:
    sparse_map = grown_map(world)
    every = pairs_of(sparse_map)
    across = [one for one in every if is_across(one)]
    weak = [replace(one, inlier_matches_idx=one.inlier_matches_idx[:18]) for one in across]
    kept = weak[:num_pairs] if is_thin else across
    pairs = [one for one in every if not is_across(one)] + kept
    thin = examined(sparse_map, pairs=pairs).thin
    if not is_thin:
        assert thin is None
        return
    assert thin is not None
    assert thin.frame_ids == tuple(range(FIRST_OF_PART, NUM + 1))
    assert thin.num_pairs == num_pairs
    assert thin.strength_ratio < 0.6
