"""Merging maps: a smaller map moves into a larger one by what pairs across show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pycolmap
import pytest

from engine.config import Config, RegistrationConfig
from engine.geometry import rotation_from_vector
from engine.mapping.maps.map_merging import (
    MapAlignment,
    MergedMap,
    find_similarity,
    merge_maps,
    take_apart,
)
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId, ImagePair
from tests.support.synthetic import (
    SyntheticWorld,
    ground,
    grow,
    map_of_keyframes,
    pose_errors,
    poses_of,
    repeated_place,
    straight_path,
)

FIRST, SECOND = range(1, 9), range(9, 15)  # keyframes of the larger and of the smaller map
REGISTRATION = RegistrationConfig()
GROWTH = GrowthConfig(
    min_inlier_ratio=REGISTRATION.sure_inlier_ratio,
    local_bundle_adjustment=Config().local_bundle_adjustment,
    global_bundle_adjustment=Config().global_bundle_adjustment,
    num_threads=1,
)
MOVED = np.column_stack(
    [3.0 * rotation_from_vector(np.array([0.4, -1.0, 2.0])), [50.0, -20.0, 7.0]]
)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(14), noise_px=0.5)


def two_maps(
    world: SyntheticWorld, *, skips: Callable[[ImagePair], bool] = lambda pair: False
) -> tuple[SparseMap, SparseMap]:
    """A larger map that knows all keyframes, and a smaller one somewhere else, of another scale."""
    larger = map_of_keyframes(world, wrong_ratio=0.1, skips=skips)
    grow(larger, world, list(FIRST))
    smaller = map_of_keyframes(world, frame_ids=list(SECOND), wrong_ratio=0.1)
    grow(smaller, world, list(SECOND))
    smaller.reconstruction.transform(pycolmap.Sim3d(MOVED))
    return larger, smaller


def merged_of(larger: SparseMap, smaller: SparseMap) -> MergedMap | None:
    """What becomes of two maps; None where nothing shows how they lie, or it is not sure."""
    alignment = find_similarity(larger, smaller, registration=REGISTRATION)
    if alignment is None:
        return None
    return merge_maps(
        larger, smaller, alignment=alignment, registration=REGISTRATION, config=GROWTH
    )


def test_a_map_moves_into_another_as_exact_as_it_was(world: SyntheticWorld) -> None:
    larger, smaller = two_maps(world)
    merged = merged_of(larger, smaller)
    assert merged is not None
    assert merged.moved_ids == tuple(SECOND)
    assert merged.num_inliers >= 100
    assert merged.sparse_map.registered_ids == world.frame_ids
    assert 1e-5 < pose_errors(poses_of(merged.sparse_map), world).rmse_ratio < 2e-3


def test_both_maps_stay_as_they_were(world: SyntheticWorld) -> None:
    larger, smaller = two_maps(world)
    before = poses_of(larger), poses_of(smaller)
    assert merged_of(larger, smaller) is not None
    for one, poses in zip((larger, smaller), before, strict=True):
        assert one.registered_ids == list(poses)
        assert all(np.array_equal(one.cam_from_world(i), pose) for i, pose in poses.items())


def test_the_similarity_is_the_one_between_the_maps(world: SyntheticWorld) -> None:
    larger, smaller = two_maps(world)
    found = find_similarity(larger, smaller, registration=REGISTRATION)
    assert found is not None
    assert found.num_supporting >= 3
    assert 0.5 * found.num_matches < found.num_inliers < found.num_matches
    scale = np.cbrt(np.linalg.det(found.larger_from_smaller[:, :3]))
    assert scale == pytest.approx(1.0 / 3.0, rel=0.03)


def test_pairs_of_one_keyframe_move_no_map(world: SyntheticWorld) -> None:
    def skips(pair: ImagePair) -> bool:
        return pair.first < SECOND[0] < pair.second

    larger, smaller = two_maps(world, skips=skips)
    found = find_similarity(larger, smaller, registration=REGISTRATION)
    assert found is not None
    assert found.num_supporting == 1
    assert merged_of(larger, smaller) is None


def test_maps_without_pairs_across_do_not_merge(world: SyntheticWorld) -> None:
    larger, smaller = two_maps(world, skips=lambda pair: pair.first < SECOND[0] <= pair.second)
    assert find_similarity(larger, smaller, registration=REGISTRATION) is None
    assert merged_of(larger, smaller) is None
    assert take_apart(larger, smaller, config=GROWTH) is None


def test_maps_stay_apart_while_a_second_place_looks_like_the_right_one() -> None:
    """Only what both places have in common is matched: two similarities explain it."""
    poses = straight_path(26)
    points, looks_like = repeated_place(
        ground(poses, density=1.0), x_range=(-9.0, 15.0), shift=40.0, ratio=0.5
    )
    world = SyntheticWorld(poses, points=points, looks_like=looks_like, noise_px=0.1)
    originals = set(looks_like[looks_like != np.arange(len(points))].tolist())
    copies = set(np.flatnonzero(looks_like != np.arange(len(points))).tolist())
    moved, here, there = (2, 3, 4), (1, 5), (21, 25)

    def merged(others: tuple[int, ...], *, wrong_ratio: float = 0.0) -> MergedMap | None:
        larger = map_of_keyframes(
            world,
            skips=lambda pair: (pair.first in moved) is not (pair.second in moved),
            given_pairs=[
                world.verified_pair(
                    one,
                    other,
                    wrong_ratio=wrong_ratio if other in there else 0.0,
                    among=originals | copies,
                )
                for one in moved
                for other in others
            ],
        )
        grow(larger, world, [i for i in world.frame_ids if i not in moved])
        smaller = map_of_keyframes(world, frame_ids=list(moved))
        grow(smaller, world, list(moved))
        return merged_of(larger, smaller)

    assert merged(here) is not None
    assert merged(there) is not None
    assert merged(here + there) is None
    # More matches, but no pair of theirs agrees with any place as a whole: a pattern.
    right = merged(here + there, wrong_ratio=0.35)
    assert right is not None
    assert pose_errors(poses_of(right.sparse_map), world).rmse_ratio < 5e-3


def test_one_pair_alone_does_not_overrule_what_most_matches_agree_with() -> None:
    poses = straight_path(26)
    points, looks_like = repeated_place(
        ground(poses, density=3.0), x_range=(-9.0, 15.0), shift=40.0, ratio=0.5
    )
    world = SyntheticWorld(poses, points=points, looks_like=looks_like, noise_px=0.1)
    alike = looks_like != np.arange(len(points))
    among = {*np.flatnonzero(alike).tolist(), *looks_like[alike].tolist()}
    moved, there = (2, 3, 4), (21, 25)
    smaller = map_of_keyframes(world, frame_ids=list(moved))
    grow(smaller, world, list(moved))

    def found_with(right: list[tuple[int, int]]) -> MapAlignment:
        larger = map_of_keyframes(
            world,
            skips=lambda pair: (pair.first in moved) is not (pair.second in moved),
            given_pairs=[
                *(world.verified_pair(*ends, among=among) for ends in right),
                *(
                    world.verified_pair(one, other, wrong_ratio=0.35, among=among)
                    for one in moved
                    for other in there
                ),
            ],
        )
        grow(larger, world, [i for i in world.frame_ids if i not in moved])
        alignment = find_similarity(larger, smaller, registration=REGISTRATION)
        assert alignment is not None
        return alignment

    by_one, by_two = found_with([(3, 5)]), found_with([(3, 5), (4, 5)])
    assert by_one.is_ambiguous
    assert not by_two.is_ambiguous
    assert by_two.num_inliers == by_two.num_matches > 100
    assert by_two.num_supporting == 1  # what the overruled pairs happen to agree with counts not


def test_a_bent_map_is_not_moved_but_taken_apart(world: SyntheticWorld) -> None:
    larger, smaller = two_maps(world)
    centers = {i: smaller.cam_from_world(i) for i in smaller.registered_ids}
    for number, (frame_id, pose) in enumerate(centers.items()):
        bent = pose.copy()
        bent[:, 3] += 4.0 * number**2 * np.array((0.3, -0.2, 0.1))
        smaller.set_pose(frame_id, bent)
    smaller.filter_all()
    assert merged_of(larger, smaller) is None
    taken = take_apart(larger, smaller, config=GROWTH)
    assert taken is not None
    assert taken.moved_ids == tuple(SECOND)
    assert taken.num_inliers == 0
    assert 1e-5 < pose_errors(poses_of(taken.sparse_map), world).rmse_ratio < 5e-3


def test_a_map_that_sees_more_by_itself_is_not_taken_apart(world: SyntheticWorld) -> None:
    """Few matches lead to the other map: its own are the better evidence."""

    def skips(pair: ImagePair) -> bool:
        return pair.second in SECOND

    larger = map_of_keyframes(
        world,
        skips=skips,
        given_pairs=[
            world.verified_pair(one, other, among=set(world.view(8).point_ids[:60].tolist()))
            for one in (7, 8)
            for other in (9, 10, 11)
        ],
    )
    grow(larger, world, list(FIRST))
    smaller = map_of_keyframes(world, frame_ids=list(SECOND))
    grow(smaller, world, list(SECOND))
    assert larger.num_visible_points(FrameId(9)) >= 20
    assert take_apart(larger, smaller, config=GROWTH) is None
