"""Finding misplaced keyframes: repeated structure is found out, drift and noise are left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from engine.config import (
    GlobalBundleAdjustmentConfig,
    LocalBundleAdjustmentConfig,
    TwoViewConfig,
)
from engine.estimators.two_view_geometry import verify_matches
from engine.geometry import rotation_from_vector
from engine.mapping.model.growth import GrowthConfig, grow_fully, register_and_refine
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.misplacement import (
    Misplacement,
    MisplacementRepair,
    find_misplacement,
    repaired,
    take_out,
)
from engine.types import (
    FrameId,
    ImagePair,
    PairMatches,
    PairReason,
    RegistrationStatus,
    VerifiedPair,
)
from tests.support.synthetic import (
    EXACT_CAMERA,
    SyntheticWorld,
    add_unused_pair,
    ground,
    grow,
    grown_map,
    map_of_keyframes,
    pose_errors,
    poses_of,
    repeated_place,
    round_path,
    straight_path,
)

GROWTH = GrowthConfig(
    min_inlier_ratio=0.65,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)
# A path over two places that look alike; the way between them is taken last.
FIRST_PLACE, WAY, SECOND_PLACE = range(1, 7), range(7, 13), range(13, 19)
RING_SIZE = 24


@pytest.fixture(scope="module")
def repeated_world() -> SyntheticWorld:
    poses = straight_path(18)
    points, looks_like = repeated_place(
        ground(poses, density=1.0), x_range=(3.0, 27.0), shift=24.0, ratio=0.4
    )
    return SyntheticWorld(poses, points=points, looks_like=looks_like, noise_px=0.5)


def pair_by_looks(world: SyntheticWorld, one: int, other: int) -> VerifiedPair | None:
    """What verification makes of matches between all points that look alike."""
    pair = ImagePair.of(FrameId(one), FrameId(other))
    rows = world.matches(pair)
    matches = PairMatches(
        pair=pair,
        matches_idx=rows.astype(np.int64),
        points1_xy=world.view(pair.first).points_xy[rows[:, 0]],
        points2_xy=world.view(pair.second).points_xy[rows[:, 1]],
        confidence=np.ones(len(rows), np.float32),
    )
    verified = verify_matches(matches, image_size=(1000, 750), config=TwoViewConfig())
    if verified is None:
        return None
    return VerifiedPair(
        pair=pair,
        reason=PairReason.EXHAUSTIVE,
        inlier_matches_idx=verified.inliers.matches_idx.astype(np.uint32),
        num_matches=len(matches),
        fundamental=verified.fundamental,
        homography_inlier_ratio=verified.homography_inlier_ratio,
    )


def add_by_looks(sparse_map: SparseMap, world: SyntheticWorld, frame_ids: Sequence[int]) -> None:
    for frame_id in frame_ids:
        tried = (pair_by_looks(world, other, frame_id) for other in sparse_map.keyframe_ids)
        pairs = [pair for pair in tried if pair is not None]
        sparse_map.add_keyframe(world.keyframe(frame_id), pairs)


def misled_map(world: SyntheticWorld) -> SparseMap:
    """The second place lies on the first one, by the points that look alike."""
    sparse_map = map_of_keyframes(world, frame_ids=[1])
    add_by_looks(sparse_map, world, [*FIRST_PLACE[1:], *SECOND_PLACE])
    grow(sparse_map, world, [1, 3])
    grow_fully(sparse_map, config=GROWTH)
    return sparse_map


def found_on_the_way(sparse_map: SparseMap, world: SyntheticWorld) -> Misplacement | None:
    for frame_id in WAY:
        add_by_looks(sparse_map, world, [frame_id])
        registration = register_and_refine(sparse_map, FrameId(frame_id), config=GROWTH)
        assert registration.status is RegistrationStatus.REGISTERED
        misplacement = find_misplacement(sparse_map, [FrameId(frame_id)])
        if misplacement is not None:
            return misplacement
    return None


# -- repeated structure ---------------------------------------------------------------------------


def test_places_that_look_alike_mislead_the_map_at_first(repeated_world: SyntheticWorld) -> None:
    sparse_map = misled_map(repeated_world)
    poses = poses_of(sparse_map)
    assert set(poses) == {*FIRST_PLACE, *SECOND_PLACE}
    assert pose_errors(poses, repeated_world).max_ratio > 0.2
    assert all(find_misplacement(sparse_map, [i]) is None for i in poses)


@pytest.mark.slow
def test_a_misplaced_block_is_found_taken_out_and_put_right(
    repeated_world: SyntheticWorld,
) -> None:
    sparse_map = misled_map(repeated_world)
    misplacement = found_on_the_way(sparse_map, repeated_world)
    assert misplacement is not None
    assert misplacement.keyframe_ids == tuple(SECOND_PLACE)
    assert misplacement.evidence.first in WAY
    assert misplacement.evidence.second in SECOND_PLACE
    misleading = {(pair.first, pair.second) for pair in misplacement.misleading}
    assert {(first, second) for first in (4, 5, 6) for second in (16, 17, 18)} <= misleading
    assert all(pair[1] in SECOND_PLACE for pair in misleading)
    take_out(sparse_map, misplacement)
    assert not set(sparse_map.registered_ids) & set(SECOND_PLACE)
    for pair in misplacement.misleading:
        assert pair.second not in sparse_map.neighbors(pair.first)
    assert set(grow_fully(sparse_map, config=GROWTH)) == set(SECOND_PLACE)
    errors = pose_errors(poses_of(sparse_map), repeated_world)
    assert 1e-5 < errors.rmse_ratio < 2e-3
    assert all(find_misplacement(sparse_map, [i]) is None for i in sparse_map.registered_ids)
    assert sparse_map.reconstruction.is_valid()


def test_the_smaller_part_is_taken_out_whichever_came_first(
    repeated_world: SyntheticWorld,
) -> None:
    """Two keyframes of the first place, then the whole second one on top of them."""
    sparse_map = map_of_keyframes(repeated_world, frame_ids=[5])
    add_by_looks(sparse_map, repeated_world, [6, *SECOND_PLACE])
    grow(sparse_map, repeated_world, [5, 6])
    grow_fully(sparse_map, config=GROWTH)
    assert set(sparse_map.registered_ids) == {5, 6, *SECOND_PLACE}
    add_by_looks(sparse_map, repeated_world, WAY)
    for frame_id in (7, 8, 9, 12, 11, 10):  # from both ends, as they are reached from both
        register_and_refine(sparse_map, FrameId(frame_id), config=GROWTH)
    found = [find_misplacement(sparse_map, [frame_id]) for frame_id in sparse_map.registered_ids]
    misplacement = next(one for one in found if one is not None)
    assert {5, 6} <= set(misplacement.keyframe_ids)
    assert not set(SECOND_PLACE) & set(misplacement.keyframe_ids)


# -- right maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise_px", "wrong_ratio"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.2)])
def test_noise_and_wrong_matches_are_no_misplacement(noise_px: float, wrong_ratio: float) -> None:
    world = SyntheticWorld(straight_path(12), noise_px=noise_px)
    sparse_map = grown_map(world, wrong_ratio=wrong_ratio)
    assert all(find_misplacement(sparse_map, [i]) is None for i in sparse_map.registered_ids)


def drifted_ring(*, drift_rad: float, weakest_link: int | None = None) -> SparseMap:
    """A ring of keyframes with its loop pair, which the map has not made use of yet.

    Args:
        drift_rad: turn of each keyframe against the one before, beyond the true one.
        weakest_link: how many matches link one half of the ring to the other; None for all.
    """
    world = SyntheticWorld(round_path(RING_SIZE), density=1.0)
    before, after = FrameId(RING_SIZE // 2), FrameId(RING_SIZE // 2 + 1)

    def is_weakened(pair: ImagePair) -> bool:
        return weakest_link is not None and pair.first <= before < pair.second

    links = []
    if weakest_link is not None:
        rows = world.matches(ImagePair(before, after))[:weakest_link, 0]
        among = world.view(before).point_ids[rows].tolist()
        links = [world.verified_pair(before, after, among=among)]
    sparse_map = map_of_keyframes(world, max_gap=3, skips=is_weakened, given_pairs=links)
    grow(sparse_map, world, world.frame_ids)
    for number, frame_id in enumerate(world.frame_ids):
        turn = rotation_from_vector(np.array([0.0, number * drift_rad, 0.0]))
        sparse_map.set_pose(frame_id, turn @ world.pose(frame_id))
    add_unused_pair(sparse_map, world.verified_pair(1, RING_SIZE - 1))
    return sparse_map


DRIFT_RAD = 0.002  # 1.6 px from one keyframe to the next, 35 px around the ring


def test_a_drifted_ring_is_left_to_adjustment() -> None:
    sparse_map = drifted_ring(drift_rad=DRIFT_RAD)
    (loop,) = [
        pair for other, pair in sparse_map.neighbors(FrameId(1)).items() if other == RING_SIZE - 1
    ]
    assert loop.num_inliers >= 60
    assert all(find_misplacement(sparse_map, [i]) is None for i in sparse_map.registered_ids)


def test_the_same_contradiction_counts_when_a_weaker_link_is_all_that_speaks_against_it() -> None:
    sparse_map = drifted_ring(drift_rad=DRIFT_RAD, weakest_link=40)
    misplacement = find_misplacement(sparse_map, [FrameId(RING_SIZE - 1)])
    assert misplacement is not None
    assert misplacement.keyframe_ids == tuple(range(RING_SIZE // 2 + 1, RING_SIZE + 1))
    assert misplacement.evidence == ImagePair(FrameId(1), FrameId(RING_SIZE - 1))
    middle = ImagePair(FrameId(RING_SIZE // 2), FrameId(RING_SIZE // 2 + 1))
    assert misplacement.misleading == (middle,)


def test_a_little_drift_is_no_contradiction() -> None:
    sparse_map = drifted_ring(drift_rad=DRIFT_RAD / 4, weakest_link=40)
    assert all(find_misplacement(sparse_map, [i]) is None for i in sparse_map.registered_ids)


# -- what counts as evidence ----------------------------------------------------------------------


DENSE_WORLD = SyntheticWorld(
    straight_path(6), points=ground(straight_path(6), density=4.0), noise_px=0.3
)


def map_of_six(
    world: SyntheticWorld = DENSE_WORLD,
    *,
    turn_rad: float = 0.0,
    unused_pair: VerifiedPair | None = None,
) -> SparseMap:
    """Keyframes 1 to 5, and 6 that hangs on 5 by 25 matches and was turned away.

    An unused pair of 4 and 6 (by default a strong and right one) knows where 6 belongs; the two
    share no point.
    """
    seen = set.intersection(*(set(world.view(i).point_ids.tolist()) for i in (3, 5, 6)))
    link = set(sorted(seen)[:25])
    others = set(range(len(world.points))) - link
    sparse_map = map_of_keyframes(
        world,
        skips=lambda pair: pair.second == 6 or 4 in (pair.first, pair.second),
        given_pairs=[
            *(world.verified_pair(i, 4, among=others) for i in (1, 2, 3, 5)),
            world.verified_pair(5, 6, among=link),
        ],
    )
    grow(sparse_map, world, world.frame_ids)
    turn = rotation_from_vector(np.array([0.0, 0.0, turn_rad]))
    sparse_map.set_pose(FrameId(6), turn @ sparse_map.cam_from_world(FrameId(6)))
    add_unused_pair(sparse_map, unused_pair or world.verified_pair(4, 6))
    return sparse_map


def test_a_strong_pair_against_a_keyframe_is_evidence() -> None:
    sparse_map = map_of_six(turn_rad=0.3)
    for frame_id in (4, 6):
        misplacement = find_misplacement(sparse_map, [FrameId(frame_id)])
        assert misplacement is not None
        assert misplacement.keyframe_ids == (6,)
        assert misplacement.evidence == ImagePair(FrameId(4), FrameId(6))
    assert find_misplacement(sparse_map, [FrameId(1)]) is None  # none of its pairs says so


def test_points_whose_distortion_cannot_be_undone_hide_no_evidence() -> None:
    sparse_map = map_of_six(turn_rad=0.3)
    sparse_map.set_camera_params("camera", (*EXACT_CAMERA[:3], -0.35))  # the corners have no rays
    keypoints_xy = sparse_map.keyframe(FrameId(4)).features.keypoints_xy
    has_ray = np.isfinite(np.asarray(sparse_map.camera("camera").cam_from_img(keypoints_xy)))
    assert 0.7 < has_ray.all(axis=1).mean() < 1.0
    misplacement = find_misplacement(sparse_map, [FrameId(6)])
    assert misplacement is not None
    assert misplacement.keyframe_ids == (6,)


def test_a_pair_that_agrees_is_no_evidence() -> None:
    sparse_map = map_of_six()
    assert all(find_misplacement(sparse_map, [i]) is None for i in sparse_map.registered_ids)


def test_few_matches_are_no_evidence() -> None:
    few = DENSE_WORLD.verified_pair(4, 6, among=range(400))
    assert 15 < few.num_inliers < 30
    assert find_misplacement(map_of_six(turn_rad=0.3, unused_pair=few), [FrameId(6)]) is None


def test_many_matches_in_one_corner_are_no_evidence() -> None:
    whole = DENSE_WORLD.verified_pair(4, 6)
    view = DENSE_WORLD.view(FrameId(4))
    rows = whole.inlier_matches_idx[:, 0]
    far_px = np.linalg.norm(view.points_xy[rows] - view.points_xy[rows[0]], axis=1)
    near = view.point_ids[rows[np.argsort(far_px)[:70]]]
    corner = DENSE_WORLD.verified_pair(4, 6, among=near.tolist())
    assert corner.num_inliers == 70
    assert find_misplacement(map_of_six(turn_rad=0.3, unused_pair=corner), [FrameId(6)]) is None
    spread = DENSE_WORLD.verified_pair(4, 6, among=view.point_ids[rows[::10]].tolist())
    assert 30 <= spread.num_inliers < 70
    assert find_misplacement(map_of_six(turn_rad=0.3, unused_pair=spread), [FrameId(6)])


def test_a_small_share_of_inliers_is_no_evidence() -> None:
    strong = DENSE_WORLD.verified_pair(4, 6)
    doubtful = dataclasses.replace(strong, num_matches=2 * strong.num_inliers)
    assert find_misplacement(map_of_six(turn_rad=0.3, unused_pair=doubtful), [FrameId(6)]) is None


# -- repairs --------------------------------------------------------------------------------------


def test_one_pair_alone_moves_nothing() -> None:
    sparse_map = map_of_six(turn_rad=0.3)
    before = poses_of(sparse_map)
    evidence, link = ImagePair(FrameId(4), FrameId(6)), ImagePair(FrameId(5), FrameId(6))
    misplacement = Misplacement(
        keyframe_ids=(FrameId(6),), misleading=(link,), evidence=evidence, contradicting=(evidence,)
    )
    assert repaired(sparse_map, misplacement, config=GROWTH) is None
    after = poses_of(sparse_map)
    assert all((after[i] == before[i]).all() for i in before)
    assert FrameId(5) in sparse_map.neighbors(FrameId(6))  # nothing is distrusted either


def test_two_pairs_that_agree_put_a_keyframe_right_on_a_copy() -> None:
    sparse_map = map_of_six(turn_rad=0.3)
    add_unused_pair(sparse_map, DENSE_WORLD.verified_pair(3, 6))
    repairs = MisplacementRepair()
    repair = repairs.repair(sparse_map, [FrameId(6)], config=GROWTH)
    assert repair is not None
    assert repair.misplacement.keyframe_ids == (6,)
    assert repair.sparse_map.num_registered == 6
    assert pose_errors(poses_of(repair.sparse_map), DENSE_WORLD).max_ratio < 2e-3
    assert pose_errors(poses_of(sparse_map), DENSE_WORLD).max_rotation_rad > 0.1
    # The same evidence is tried once, until another map is the map.
    assert repairs.repair(sparse_map, [FrameId(6)], config=GROWTH) is None
    repairs.forget()
    assert repairs.repair(sparse_map, [FrameId(6)], config=GROWTH) is not None


def test_a_large_map_is_repaired_again_only_when_it_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.mapping.places.misplacement._MAX_SMALL", 5)
    sparse_map = map_of_six(turn_rad=0.3)
    add_unused_pair(sparse_map, DENSE_WORLD.verified_pair(3, 6))
    repairs = MisplacementRepair()
    assert repairs.repair(sparse_map, [FrameId(6)], config=GROWTH) is not None
    repairs._tried.clear()  # as if it were another evidence
    assert repairs.repair(sparse_map, [FrameId(6)], config=GROWTH) is None
    assert repairs.num_put_off == 1
    assert len(list(repairs.repair_all(sparse_map, config=GROWTH, max_tries=5))) == 1  # at the end
    repairs.forget()
    monkeypatch.setattr("engine.mapping.places.misplacement._GROWTH_RATIO", 1.0)
    assert repairs.repair(sparse_map, [FrameId(6)], config=GROWTH) is not None
    repairs._tried.clear()
    assert repairs.repair(sparse_map, [FrameId(6)], config=GROWTH) is not None  # it has grown
    assert repairs.num_put_off == 1


def test_all_repairs_go_on_from_the_repaired_map() -> None:
    sparse_map = map_of_six(turn_rad=0.3)
    add_unused_pair(sparse_map, DENSE_WORLD.verified_pair(3, 6))
    repairs = MisplacementRepair()
    (repair,) = repairs.repair_all(sparse_map, config=GROWTH, max_tries=5)
    assert repair.misplacement.keyframe_ids == (6,)
    assert pose_errors(poses_of(repair.sparse_map), DENSE_WORLD).max_ratio < 2e-3
    assert list(repairs.repair_all(repair.sparse_map, config=GROWTH, max_tries=5)) == []
    assert list(repairs.repair_all(sparse_map, config=GROWTH, max_tries=0)) == []


@pytest.mark.slow
def test_a_misplaced_block_is_put_right_on_a_copy(repeated_world: SyntheticWorld) -> None:
    sparse_map = misled_map(repeated_world)
    assert found_on_the_way(sparse_map, repeated_world) is not None
    num_registered = sparse_map.num_registered
    repair = MisplacementRepair().repair(sparse_map, sparse_map.registered_ids, config=GROWTH)
    assert repair is not None
    assert repair.sparse_map.num_registered >= num_registered
    assert pose_errors(poses_of(repair.sparse_map), repeated_world).rmse_ratio < 2e-3
    assert pose_errors(poses_of(sparse_map), repeated_world).max_ratio > 0.2


def test_keyframes_outside_the_map_are_no_evidence() -> None:
    sparse_map = map_of_six(turn_rad=0.3)
    sparse_map.deregister([FrameId(4)])
    assert find_misplacement(sparse_map, [FrameId(6)]) is None


@pytest.mark.parametrize("baseline", [0.0, 1e-9, 1e-3])
def test_a_resting_camera_is_no_misplacement(baseline: float) -> None:
    """Without a baseline the direction of motion is noise, and says nothing."""
    path = straight_path(6)
    path[5] = path[3]
    world = SyntheticWorld(path, points=ground(path, density=4.0), noise_px=0.3)
    sparse_map = map_of_six(world)
    pose = sparse_map.cam_from_world(FrameId(4))
    pose[:, 3] += (0.0, baseline, 0.0)
    sparse_map.set_pose(FrameId(6), pose)
    assert sparse_map.neighbors(FrameId(6))[FrameId(4)].num_inliers > 500
    assert find_misplacement(sparse_map, [FrameId(6)]) is None
