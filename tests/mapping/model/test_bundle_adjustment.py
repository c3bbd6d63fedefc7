"""Local and global bundle adjustment on a synthetic world, and merging a global one back."""

from __future__ import annotations

import itertools

import numpy as np
import pycolmap
import pytest

from engine.config import GlobalBundleAdjustmentConfig, LocalBundleAdjustmentConfig
from engine.estimators import adjustment_options
from engine.geometry import camera_center, rotation_from_vector
from engine.mapping.model.bundle_adjustment import (
    GlobalAdjustment,
    GlobalAdjustmentSchedule,
    adjust_globally,
    adjust_locally,
    merge_global_adjustment,
    solve_globally,
    start_global_adjustment,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, RegistrationStatus
from tests.support.synthetic import (
    EXACT_CAMERA,
    FOCAL_PX,
    PoseErrors,
    SyntheticCamera,
    SyntheticWorld,
    grow,
    grown_map,
    map_of_keyframes,
    pose_errors,
    poses_of,
    straight_path,
)

NUM_FRAMES = 12
LOCAL = LocalBundleAdjustmentConfig(num_keyframes=4, max_iterations=10, num_passes=1)
ONE, TWO, SIX, LAST = FrameId(1), FrameId(2), FrameId(6), FrameId(NUM_FRAMES)
CAMERA_ID = 1


@pytest.fixture(scope="module")
def exact_world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES))


@pytest.fixture(scope="module")
def noisy_world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.5)


@pytest.fixture
def exact_map(exact_world: SyntheticWorld) -> SparseMap:
    return grown_map(exact_world)


@pytest.fixture
def noisy_map(noisy_world: SyntheticWorld) -> SparseMap:
    return grown_map(noisy_world)


def errors_of(sparse_map: SparseMap, world: SyntheticWorld) -> PoseErrors:
    return pose_errors(poses_of(sparse_map), world)


def adjust(sparse_map: SparseMap, frame_id: int) -> tuple[FrameId, ...]:
    return adjust_locally(sparse_map, FrameId(frame_id), config=LOCAL).keyframe_ids


def solve(
    sparse_map: SparseMap, *, constant_camera_ids: tuple[int, ...] = (CAMERA_ID,), steps: int = 30
) -> None:
    solve_globally(
        sparse_map.reconstruction,
        constant_camera_ids=constant_camera_ids,
        max_iterations=steps,
        num_threads=1,
    )


def nudged(pose: Float64Array, *, by: float) -> Float64Array:
    """A pose moved by a length and turned by a hundredth of a radian for each unit of it."""
    moved = pose.copy()
    moved[:, :3] = rotation_from_vector(np.array([0.0, 0.01 * by, 0.0])) @ moved[:, :3]
    moved[:, 3] += (by, 0.0, 0.0)
    return moved


# -- local ----------------------------------------------------------------------------------------


def test_local_adjustment_puts_a_nudged_keyframe_back(
    exact_map: SparseMap, exact_world: SyntheticWorld
) -> None:
    before = poses_of(exact_map)
    exact_map.set_pose(LAST, nudged(before[LAST], by=0.03))
    off = np.abs(exact_map.cam_from_world(LAST) - before[LAST]).max()
    assert exact_map.mean_reprojection_error_px() > 0.05
    adjust(exact_map, LAST)
    assert np.abs(exact_map.cam_from_world(LAST) - before[LAST]).max() < 0.05 * off
    assert exact_map.mean_reprojection_error_px() < 0.02
    assert errors_of(exact_map, exact_world).max_ratio < 1e-3


def test_local_adjustment_moves_only_the_newest_and_its_best_neighbours(
    noisy_map: SparseMap,
) -> None:
    before = poses_of(noisy_map)
    local = adjust(noisy_map, LAST)
    neighbours = list(noisy_map.covisibility(LAST))[:3]
    assert len(local) == 4
    assert local[0] == LAST
    assert len(set(local[1:]) & set(neighbours)) >= 2
    after = poses_of(noisy_map)
    moved = {i for i in before if not np.array_equal(before[i], after[i])}
    assert LAST in moved
    assert moved <= set(local)
    assert len(moved) <= len(local) - 2  # the two that share least hold the others


def test_local_adjustment_reduces_the_error_of_noisy_keyframes(noisy_world: SyntheticWorld) -> None:
    plain, refined = map_of_keyframes(noisy_world), map_of_keyframes(noisy_world)
    for sparse_map in (plain, refined):
        grow(sparse_map, noisy_world, [1, 2])
    for frame_id in noisy_world.frame_ids[2:]:
        for sparse_map in (plain, refined):
            assert (
                sparse_map.register(frame_id, min_inlier_ratio=0.25).status
                is RegistrationStatus.REGISTERED
            )
            sparse_map.triangulate(frame_id)
        adjust(refined, frame_id)
    assert refined.mean_reprojection_error_px() < 0.7 * plain.mean_reprojection_error_px()
    assert 0.3 < refined.mean_reprojection_error_px() < 1.0
    errors = errors_of(refined, noisy_world)
    assert 1e-5 < errors.rmse_ratio < 2e-3


def test_local_adjustment_of_a_whole_small_map_keeps_scale_and_place(
    noisy_world: SyntheticWorld,
) -> None:
    sparse_map = grown_map(noisy_world, frame_ids=[1, 2, 3])
    before = poses_of(sparse_map)
    error_px = sparse_map.mean_reprojection_error_px()
    assert set(adjust(sparse_map, 3)) == {1, 2, 3}
    assert sparse_map.mean_reprojection_error_px() < error_px
    centers = camera_center(np.array([sparse_map.cam_from_world(FrameId(i)) for i in (1, 2, 3)]))
    true_centers = camera_center(np.array([before[FrameId(i)] for i in (1, 2, 3)]))
    sizes = np.linalg.norm(np.ptp(centers, axis=0)), np.linalg.norm(np.ptp(true_centers, axis=0))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_local_adjustment_of_part_of_a_map_leaves_the_calibration(
    noisy_world: SyntheticWorld,
) -> None:
    sparse_map = grown_map(noisy_world, is_constant=False)
    sparse_map.set_camera_params("camera", (1.05 * FOCAL_PX, *EXACT_CAMERA[1:]))
    adjust(sparse_map, LAST)
    assert sparse_map.camera("camera").mean_focal_length() == 1.05 * FOCAL_PX


def test_local_adjustment_of_a_whole_map_refines_only_what_may_change(
    noisy_world: SyntheticWorld,
) -> None:
    focal_px = {}
    for is_constant in (True, False):
        sparse_map = grown_map(noisy_world, frame_ids=[1, 2, 3, 4], is_constant=is_constant)
        sparse_map.set_camera_params("camera", (1.05 * FOCAL_PX, *EXACT_CAMERA[1:]))
        adjust(sparse_map, 4)
        focal_px[is_constant] = sparse_map.camera("camera").mean_focal_length()
        assert sparse_map.camera("camera").params[3] == 0.0  # too few views for distortion
    assert focal_px[True] == 1.05 * FOCAL_PX
    assert abs(focal_px[False] - FOCAL_PX) < 0.04 * FOCAL_PX


def test_a_keyframe_that_shares_little_with_each_other_one_is_refined_against_them_all() -> None:
    world = SyntheticWorld(straight_path(7, step=1.0))
    newest = FrameId(7)
    common = sorted(set.intersection(*(set(world.view(i).point_ids) for i in world.frame_ids)))
    few_of = {i: common[9 * (i % 3) :][:9] for i in range(1, 7)}  # the same for 1 and 4, ...
    pairs = [world.verified_pair(i, newest, among=few_of[i]) for i in range(1, 7)]
    for first, second in itertools.combinations(range(1, 7), 2):
        few = few_of[first] if few_of[first] == few_of[second] else []
        pairs.append(world.verified_pair(first, second, among=[*common[27:], *few]))
    sparse_map = map_of_keyframes(world, skips=lambda pair: True, given_pairs=pairs)
    grow(sparse_map, world, world.frame_ids)
    assert set(sparse_map.covisibility(newest).values()) == {9}
    true_poses = poses_of(sparse_map)
    sparse_map.set_pose(newest, nudged(true_poses[newest], by=0.03))
    assert adjust(sparse_map, newest) == (newest,)
    np.testing.assert_allclose(sparse_map.cam_from_world(newest), true_poses[newest], atol=1e-3)


def test_every_pass_of_a_local_adjustment_counts(noisy_world: SyntheticWorld) -> None:
    changed = {}
    for num_passes in (1, 3):
        sparse_map = grown_map(noisy_world, wrong_ratio=0.2)
        config = LOCAL.model_copy(update={"num_passes": num_passes})
        adjusted = adjust_locally(sparse_map, LAST, config=config)
        changed[num_passes] = adjusted.num_changed
    assert changed[1] > 0
    assert changed[3] >= changed[1]


# -- global ---------------------------------------------------------------------------------------


def test_global_adjustment_brings_noise_down_to_what_it_is(
    noisy_map: SparseMap, noisy_world: SyntheticWorld
) -> None:
    before = errors_of(noisy_map, noisy_world).rmse_ratio
    solve(noisy_map)
    errors = errors_of(noisy_map, noisy_world)
    assert 1e-5 < errors.rmse_ratio < min(1e-3, before)
    # Two coordinates with 0.5 px each: 0.63 px on average, less what the parameters take up.
    assert 0.4 < noisy_map.mean_reprojection_error_px() < 0.65


def test_a_focal_length_a_fifth_off_is_refined_to_a_hundredth() -> None:
    for factor in (0.8, 1.25):
        world = SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)
        sparse_map = grown_map(world)
        sparse_map.set_camera_params("camera", (factor * FOCAL_PX, *EXACT_CAMERA[1:]))
        solve(sparse_map, constant_camera_ids=(), steps=100)
        focal_px = sparse_map.camera("camera").mean_focal_length()
        assert abs(focal_px - FOCAL_PX) < 0.01 * FOCAL_PX
        assert errors_of(sparse_map, world).rmse_ratio < 3e-3


@pytest.mark.parametrize("residuals_of_slice", [400_000, 1])
def test_constant_cameras_stay_and_the_others_are_refined(
    residuals_of_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adjustment_options, "_RESIDUALS_OF_SLICE", residuals_of_slice)
    cameras = (SyntheticCamera.known("known"), SyntheticCamera(key="guessed"))
    world = SyntheticWorld(straight_path(NUM_FRAMES), cameras=cameras, noise_px=0.3)
    sparse_map = grown_map(world)
    for key in ("known", "guessed"):
        sparse_map.set_camera_params(key, (1.1 * FOCAL_PX, *EXACT_CAMERA[1:]))
    sparse_map.set_camera_params("known", EXACT_CAMERA)
    solve(sparse_map, constant_camera_ids=(sparse_map.camera("known").camera_id,), steps=100)
    assert sparse_map.camera("known").params.tolist() == list(EXACT_CAMERA)
    assert abs(sparse_map.camera("guessed").mean_focal_length() - FOCAL_PX) < 0.01 * FOCAL_PX
    assert errors_of(sparse_map, world).rmse_ratio < 1e-3


def test_an_adjustment_in_slices_takes_no_more_steps_than_it_has() -> None:
    def adjusted(steps: int, *, slices: int) -> float:
        """The error after so many steps, the known camera held; two of a slice."""
        cameras = (SyntheticCamera.known("known"), SyntheticCamera(key="guessed"))
        sparse_map = grown_map(SyntheticWorld(straight_path(NUM_FRAMES), cameras=cameras))
        sparse_map.set_camera_params("guessed", (1.2 * FOCAL_PX, *EXACT_CAMERA[1:]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adjustment_options, "_RESIDUALS_OF_SLICE", 400_000 if slices == 1 else 1)
            held = (sparse_map.camera("known").camera_id,)
            solve(sparse_map, constant_camera_ids=held, steps=steps)
        return sparse_map.mean_reprojection_error_px()

    assert adjusted(2, slices=2) == adjusted(2, slices=1)
    assert adjusted(2, slices=2) > 1.5 * adjusted(6, slices=2)


def test_distortion_is_refined_only_with_enough_keyframes(noisy_world: SyntheticWorld) -> None:
    for num, is_refined in ((5, False), (6, True)):
        sparse_map = grown_map(noisy_world, frame_ids=list(range(1, num + 1)))
        solve(sparse_map, constant_camera_ids=())
        assert bool(sparse_map.camera("camera").params[3]) is is_refined


def test_a_constant_camera_without_keyframes_does_no_harm(noisy_world: SyntheticWorld) -> None:
    sparse_map = grown_map(noisy_world)
    sparse_map.add_camera("unused", noisy_world.camera(1).as_colmap())
    solve(sparse_map, constant_camera_ids=(sparse_map.camera("unused").camera_id,))
    assert sparse_map.camera("camera").params.tolist() != list(EXACT_CAMERA)
    assert errors_of(sparse_map, noisy_world).rmse_ratio < 1e-3


# -- merging --------------------------------------------------------------------------------------


def map_and_adjustment(
    world: SyntheticWorld, *, num_before: int = 9, is_constant: bool = True
) -> tuple[SparseMap, GlobalAdjustment]:
    """A map copied for adjustment after some keyframes, which then got all the others."""
    sparse_map = map_of_keyframes(world, is_constant=is_constant)
    grow(sparse_map, world, world.frame_ids[:num_before])
    adjustment = start_global_adjustment(sparse_map)
    for frame_id in world.frame_ids[num_before:]:
        assert (
            sparse_map.register(frame_id, min_inlier_ratio=0.25).status
            is RegistrationStatus.REGISTERED
        )
        sparse_map.triangulate(frame_id)
    return sparse_map, adjustment


def adjust_copy(adjustment: GlobalAdjustment) -> None:
    adjust_globally(
        adjustment.reconstruction,
        calibration=adjustment.calibration,
        max_iterations=30,
        num_threads=1,
    )


def test_a_merged_adjustment_reaches_old_and_new_keyframes(noisy_world: SyntheticWorld) -> None:
    sparse_map, adjustment = map_and_adjustment(noisy_world)
    before = errors_of(sparse_map, noisy_world).rmse_ratio
    adjust_copy(adjustment)
    merged = merge_global_adjustment(sparse_map, adjustment)
    assert (merged.num_keyframes, merged.keyframes_added_meanwhile) == (9, 3)
    for frame_id in noisy_world.frame_ids[:9]:
        adjusted_pose = adjustment.reconstruction.image(frame_id).cam_from_world().matrix()
        np.testing.assert_allclose(sparse_map.cam_from_world(frame_id), adjusted_pose, atol=1e-12)
    assert sparse_map.num_registered == NUM_FRAMES
    assert 1e-5 < errors_of(sparse_map, noisy_world).rmse_ratio < 1.5 * before
    assert merged.reprojection_error_before_px == adjustment.error_before_px > 0.0
    assert merged.reprojection_error_after_px == sparse_map.mean_reprojection_error_px() < 3.0
    assert merged.num_points3D == sparse_map.num_points3D
    assert merged.elapsed_s > 0.0
    assert sparse_map.reconstruction.is_valid()


def test_what_came_meanwhile_follows_a_known_similarity(exact_world: SyntheticWorld) -> None:
    sparse_map, adjustment = map_and_adjustment(exact_world)
    num_points = sparse_map.num_points3D
    new_points = [
        i
        for i in sparse_map.reconstruction.point3D_ids()
        if not adjustment.reconstruction.exists_point3D(i)
    ]
    assert len(new_points) > 20
    positions = sparse_map.points3D_in_world(new_points)
    moved_from_world = pycolmap.Sim3d(
        2.5, pycolmap.Rotation3d(np.array([0.0, 0.6, 0.0, 0.8])), np.array([5.0, -3.0, 40.0])
    )
    adjustment.reconstruction.transform(moved_from_world)
    merge_global_adjustment(sparse_map, adjustment)
    assert sparse_map.num_points3D == num_points
    assert sparse_map.mean_reprojection_error_px() < 1e-6
    errors = errors_of(sparse_map, exact_world)
    assert errors.max_ratio < 1e-6
    assert errors.max_rotation_rad < 1e-6
    matrix = moved_from_world.matrix()
    np.testing.assert_allclose(
        sparse_map.points3D_in_world(new_points),
        positions @ matrix[:, :3].T + matrix[:, 3],
        atol=1e-6,
    )


def test_a_merged_map_grows_on(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world)
    grow(sparse_map, exact_world, exact_world.frame_ids[:8])
    adjustment = start_global_adjustment(sparse_map)
    adjustment.reconstruction.transform(
        pycolmap.Sim3d(0.5, pycolmap.Rotation3d(), np.array([1.0, 2.0, 3.0]))
    )
    merge_global_adjustment(sparse_map, adjustment)
    for frame_id in exact_world.frame_ids[8:]:
        registration = sparse_map.register(frame_id, min_inlier_ratio=0.65)
        assert registration.status is RegistrationStatus.REGISTERED
        sparse_map.triangulate(frame_id)
    assert errors_of(sparse_map, exact_world).max_ratio < 1e-6


def test_points_that_are_gone_meanwhile_are_skipped(exact_world: SyntheticWorld) -> None:
    sparse_map, adjustment = map_and_adjustment(exact_world)
    ids = sparse_map.point3D_ids(TWO)
    gone = [int(i) for i in ids[ids >= 0][:10]]
    for point3D_id in gone:
        sparse_map.reconstruction.point3D(point3D_id).xyz += (50.0, 0.0, 0.0)
    sparse_map.filter_all()
    assert not any(sparse_map.reconstruction.exists_point3D(i) for i in gone)
    assert all(adjustment.reconstruction.exists_point3D(i) for i in gone)
    merge_global_adjustment(sparse_map, adjustment)
    assert not any(sparse_map.reconstruction.exists_point3D(i) for i in gone)
    assert errors_of(sparse_map, exact_world).max_ratio < 1e-6
    assert sparse_map.reconstruction.is_valid()


def test_keyframes_taken_out_meanwhile_stay_out(exact_world: SyntheticWorld) -> None:
    sparse_map, adjustment = map_and_adjustment(exact_world)
    newest_of_copy = adjustment.keyframe_ids[-1]
    sparse_map.deregister([SIX, newest_of_copy])
    adjustment.reconstruction.transform(
        pycolmap.Sim3d(3.0, pycolmap.Rotation3d(), np.array([1.0, 2.0, 3.0]))
    )
    merged = merge_global_adjustment(sparse_map, adjustment)
    assert (merged.num_keyframes, merged.keyframes_added_meanwhile) == (7, 3)
    assert not sparse_map.is_registered(SIX)
    assert not sparse_map.is_registered(newest_of_copy)
    assert errors_of(sparse_map, exact_world).max_ratio < 1e-6
    assert sparse_map.mean_reprojection_error_px() < 1e-6


def test_a_merge_under_a_map_without_those_keyframes_changes_nothing(
    exact_world: SyntheticWorld,
) -> None:
    sparse_map, adjustment = map_and_adjustment(exact_world)
    sparse_map.deregister(adjustment.keyframe_ids)
    before = poses_of(sparse_map)
    adjustment.reconstruction.transform(
        pycolmap.Sim3d(3.0, pycolmap.Rotation3d(), np.array([1.0, 2.0, 3.0]))
    )
    merged = merge_global_adjustment(sparse_map, adjustment)
    assert merged.num_keyframes == 0
    after = poses_of(sparse_map)
    assert all(np.array_equal(before[i], after[i]) for i in before)


def test_a_refined_calibration_comes_back_with_the_merge(noisy_world: SyntheticWorld) -> None:
    sparse_map, _ = map_and_adjustment(noisy_world, is_constant=False)
    sparse_map.set_camera_params("camera", (1.05 * FOCAL_PX, *EXACT_CAMERA[1:]))
    adjustment = start_global_adjustment(sparse_map)
    adjust_copy(adjustment)
    assert sparse_map.camera("camera").mean_focal_length() == 1.05 * FOCAL_PX
    merge_global_adjustment(sparse_map, adjustment)
    assert abs(sparse_map.camera("camera").mean_focal_length() - FOCAL_PX) < 0.01 * FOCAL_PX


def test_the_live_map_is_untouched_while_its_copy_is_adjusted(noisy_map: SparseMap) -> None:
    before = poses_of(noisy_map)
    points = noisy_map.point_cloud().points3D_in_world
    adjust_copy(start_global_adjustment(noisy_map))
    assert all(np.array_equal(noisy_map.cam_from_world(i), before[i]) for i in before)
    assert np.array_equal(noisy_map.point_cloud().points3D_in_world, points)


# -- schedule -------------------------------------------------------------------------------------


def test_another_adjustment_is_due_when_the_map_grew_by_the_ratio() -> None:
    schedule = GlobalAdjustmentSchedule(GlobalBundleAdjustmentConfig(growth_ratio=1.5))
    assert [schedule.should(num) for num in (2, 3, 4)] == [False, True, True]
    schedule.done(4)
    assert [schedule.should(num) for num in (4, 5, 6)] == [False, False, True]
    schedule.done(1)  # a map that was taken back
    assert [schedule.should(num) for num in (2, 3)] == [False, True]
