"""Windows: known scenes, the recorded one, and what cannot be solved."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from engine.geometry import camera_center
from engine.types import BoolArray, Float64Array
from engine.window_types import WindowEstimate, WindowProblem, WindowStatus
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.calibration_scenes import lawnmower, plane
from tests.support.paths import GOLDEN
from tests.support.synthetic import similarity
from tests.support.window_scenes import FOCAL_PX, WindowScene, arc_scene, scene_of, turning_scene

CONFIG = WindowSolverConfig()
GOLDEN = GOLDEN / "vggsfm_window" / "window16.npz"
KNOWN = np.array([FOCAL_PX])


def assert_refused(estimate: WindowEstimate, status: WindowStatus) -> None:
    """Not solved, with a reason, and with nothing in it that anyone could use."""
    assert estimate.status is status, estimate.reason
    assert estimate.reason
    assert not estimate.is_valid.any()
    assert estimate.num_observations == estimate.num_points == 0
    assert not estimate.cam_from_world.any()


# -- known scenes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("relief", [1.0, 0.0], ids=["with depth", "a plane"])
def test_a_window_without_noise_is_solved_exactly_from_its_tracks_alone(relief: float) -> None:
    scene = arc_scene(relief=relief)
    estimate = solve_window(scene.problem(), CONFIG)
    assert estimate.status is WindowStatus.SOLVED, estimate.reason
    assert estimate.is_bootstrapped
    assert estimate.is_valid.all()
    assert estimate.num_observations == scene.is_visible.sum()
    assert estimate.mean_reprojection_px < 1e-5
    assert scene.centre_errors(estimate).max() < 1e-7
    assert estimate.focal_px[0] == pytest.approx(FOCAL_PX, abs=1e-3)


def test_a_focal_length_that_a_window_hardly_tells_stays_as_it_is_given() -> None:
    down = scene_of(lawnmower(columns=4, rows=2), plane(), noise_px=0.3)
    around = arc_scene(noise_px=0.3)
    for scene, moves in ((down, False), (around, True)):
        problem = scene.problem(cam_from_world=scene.poses, focal_px=np.array([1.05 * FOCAL_PX]))
        estimate = solve_window(problem, CONFIG)
        assert estimate.status is WindowStatus.SOLVED, estimate.reason
        wanted_px = FOCAL_PX if moves else 1.05 * FOCAL_PX
        tolerance = 0.01 if moves else 1e-9
        assert estimate.focal_px[0] == pytest.approx(wanted_px, rel=tolerance)
        assert estimate.mean_reprojection_px < 0.6


def test_noise_leaves_errors_of_its_own_size() -> None:
    scene = arc_scene(noise_px=0.5)
    estimate = solve_window(scene.problem(), CONFIG)
    assert estimate.status is WindowStatus.SOLVED
    assert estimate.num_observations > 0.99 * scene.is_visible.sum()
    assert 0.45 < estimate.mean_reprojection_px < 0.6  # 0.627 less what the points take up
    assert 5e-5 < np.median(scene.centre_errors(estimate)) < 1.5e-3
    assert estimate.focal_px[0] == pytest.approx(FOCAL_PX, rel=0.01)


def test_points_lie_where_the_similarity_of_the_cameras_puts_them() -> None:
    scene = arc_scene(noise_px=0.5)
    estimate = solve_window(scene.problem(), CONFIG)
    true_from_window = similarity(
        camera_center(estimate.cam_from_world), camera_center(scene.poses)
    )
    points = estimate.points3D_in_world @ true_from_window[:, :3].T + true_from_window[:, 3]
    errors = np.linalg.norm(points - scene.points, axis=1)[estimate.is_point_valid]
    assert 1e-3 < np.median(errors) < 0.05  # at a distance of 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("angle_deg", "shift_ratio", "focal_ratio", "starts_anew"),
    [(3.0, 0.05, 1.15, False), (20.0, 0.4, 1.5, True)],
)
def test_rough_poses_lead_to_the_same_optimum_and_wild_ones_do_no_harm(
    angle_deg: float, shift_ratio: float, focal_ratio: float, starts_anew: bool
) -> None:
    scene = arc_scene(noise_px=0.5)
    alone = solve_window(scene.problem(), CONFIG)
    problem = scene.problem(
        cam_from_world=scene.rough_poses(angle_deg=angle_deg, shift_ratio=shift_ratio),
        focal_px=focal_ratio * KNOWN,
    )
    estimate = solve_window(problem, CONFIG)
    assert estimate.is_bootstrapped is starts_anew
    assert estimate.mean_reprojection_px == pytest.approx(alone.mean_reprojection_px, abs=1e-3)
    assert scene.centre_errors(estimate).max() < 1.5e-3


def test_rough_poses_give_their_frame_of_reference() -> None:
    scene = arc_scene(noise_px=0.5)
    rough = scene.rough_poses(angle_deg=2.0, shift_ratio=0.02)
    estimate = solve_window(scene.problem(cam_from_world=rough, focal_px=KNOWN), CONFIG)
    shift = camera_center(estimate.cam_from_world) - camera_center(scene.poses)
    assert np.linalg.norm(shift, axis=1).max() < 0.6  # of an extent of 5


def test_a_fifth_of_wrong_observations_is_detected_and_bends_nothing() -> None:
    scene = arc_scene(noise_px=0.5, num_points=600)
    moved_xy, is_moved = scene.with_outliers(ratio=0.2)
    estimate = solve_window(scene.problem(tracks_xy=moved_xy), CONFIG)
    assert estimate.is_inlier[scene.is_visible & ~is_moved].mean() > 0.98
    assert estimate.is_inlier[is_moved].mean() < 0.02
    assert np.median(scene.centre_errors(estimate)) < 1.5e-3


@pytest.mark.slow
def test_every_frame_can_have_a_focal_length_of_its_own() -> None:
    scene = arc_scene(noise_px=0.2)
    zoomed_xy = scene.tracks_xy.copy()
    zoomed_xy[::2] = 1.25 * (zoomed_xy[::2] - (500, 375)) + (500, 375)
    problem = scene.problem(
        tracks_xy=zoomed_xy,
        image_sizes=np.tile([1000, 750], (8, 1)),
        camera_idx=np.arange(8),
        focal_px=np.full(8, 900.0),
    )
    estimate = solve_window(problem, CONFIG)
    assert estimate.focal_px[::2] == pytest.approx(1.25 * FOCAL_PX, rel=0.02)
    assert estimate.focal_px[1::2] == pytest.approx(FOCAL_PX, rel=0.02)
    shared = solve_window(scene.problem(tracks_xy=zoomed_xy), CONFIG)
    assert shared.num_observations < estimate.num_observations


def test_a_calibrated_camera_stays_as_it_is_beside_one_that_is_not() -> None:
    scene = arc_scene(noise_px=0.2)
    problem = scene.problem(
        image_sizes=np.array([[1000, 750], [1000, 750]]),
        camera_idx=np.arange(8) % 2,
        focal_px=np.array([FOCAL_PX, 900.0]),
        is_calibrated=np.array([True, False]),
    )
    estimate = solve_window(problem, CONFIG)
    assert estimate.focal_px[0] == FOCAL_PX
    assert estimate.focal_px[1] == pytest.approx(FOCAL_PX, rel=0.01)
    assert scene.centre_errors(estimate).max() < 1e-3


@pytest.mark.slow
def test_known_distortion_is_honoured_and_unknown_one_found_on_demand() -> None:
    scene = arc_scene(noise_px=0.1, distortion=-0.08)
    known = solve_window(scene.problem(distortion=np.array([-0.08])), CONFIG)
    assert known.distortion[0] == -0.08
    found = solve_window(scene.problem(), replace(CONFIG, refine_distortion=True))
    assert found.distortion[0] == pytest.approx(-0.08, abs=0.01)
    ignored = solve_window(scene.problem(), CONFIG)
    assert known.mean_reprojection_px < 0.12
    assert ignored.mean_reprojection_px > 0.13


def test_held_poses_stay_to_the_bit_and_the_others_come_to_them() -> None:
    scene = arc_scene(noise_px=0.5)
    is_held = np.arange(8) < 3
    poses = scene.rough_poses(angle_deg=40.0, shift_ratio=0.8)
    poses[is_held] = scene.poses[is_held]
    problem = scene.problem(cam_from_world=poses, is_held=is_held, focal_px=KNOWN)
    estimate = solve_window(problem, CONFIG)
    assert (estimate.cam_from_world[is_held] == scene.poses[is_held]).all()
    errors = np.linalg.norm(
        camera_center(estimate.cam_from_world) - camera_center(scene.poses), axis=1
    )
    assert 1e-5 < errors.max() < 0.02  # without any alignment


@pytest.mark.parametrize("others_known", [True, False])
def test_one_held_pose_is_kept_and_the_window_hangs_on_it(others_known: bool) -> None:
    scene = arc_scene(noise_px=0.5)
    poses = scene.rough_poses(angle_deg=3.0, shift_ratio=0.03)
    if not others_known:
        poses[:] = np.nan
    poses[2] = scene.poses[2]
    problem = scene.problem(cam_from_world=poses, is_held=np.arange(8) == 2, focal_px=KNOWN)
    estimate = solve_window(problem, CONFIG)
    assert estimate.cam_from_world[2] == pytest.approx(scene.poses[2], abs=1e-12)
    assert scene.centre_errors(estimate).max() < 1.5e-3
    assert estimate.mean_reprojection_px < 0.6


def test_a_frame_that_lacks_a_pose_gets_one() -> None:
    scene = arc_scene(noise_px=0.5)
    poses = scene.poses.copy()
    poses[[2, 5]] = np.nan
    estimate = solve_window(scene.problem(cam_from_world=poses, focal_px=KNOWN), CONFIG)
    assert not estimate.is_bootstrapped
    assert estimate.is_valid.all()
    assert scene.centre_errors(estimate).max() < 1.5e-3


def test_two_frames_are_enough() -> None:
    scene = arc_scene(2)
    estimate = solve_window(scene.problem(focal_px=KNOWN), CONFIG)
    assert estimate.status is WindowStatus.SOLVED
    assert estimate.is_valid.all()
    assert estimate.num_points == len(scene.points)
    assert estimate.mean_reprojection_px < 1e-6
    assert estimate.focal_px[0] == FOCAL_PX  # two views do not determine it


@pytest.mark.slow
def test_the_same_window_gives_the_same_estimate() -> None:
    problem = arc_scene(noise_px=0.5).problem()
    first, second = (solve_window(problem, CONFIG) for _ in range(2))
    assert (first.cam_from_world == second.cam_from_world).all()
    assert (first.points3D_in_world == second.points3D_in_world).all()


def test_the_scale_of_the_world_does_not_matter() -> None:
    scene = arc_scene(noise_px=0.5)
    errors = []
    for scale in (1e-4, 1.0, 1e4):
        poses = scene.rough_poses(angle_deg=2.0, shift_ratio=0.02)
        poses[:, :, 3] *= scale
        problem = scene.problem(cam_from_world=poses, focal_px=KNOWN)
        errors.append(solve_window(problem, CONFIG).mean_reprojection_px)
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-3)


# -- what cannot be solved, and what is only partly there -----------------------------------------


def test_observations_that_are_not_finite_are_left_out_and_counted() -> None:
    scene = arc_scene(noise_px=0.5)
    rng = np.random.default_rng(0)
    is_lost = scene.is_visible & (rng.random(scene.is_visible.shape) < 0.2)
    tracks_xy = np.where(is_lost[..., None], np.nan, scene.tracks_xy)
    tracks_xy[0, np.flatnonzero(is_lost[0])[0]] = np.inf
    estimate = solve_window(scene.problem(tracks_xy=tracks_xy), CONFIG)
    assert estimate.status is WindowStatus.SOLVED
    assert estimate.num_unusable == is_lost.sum()
    assert not estimate.is_inlier[is_lost].any()
    assert scene.centre_errors(estimate).max() < 2e-3


@pytest.mark.parametrize("far_px", [1e5, 1e12, 1e200, -1e308])
def test_observations_far_beyond_any_image_are_outliers(far_px: float) -> None:
    scene = arc_scene()
    tracks_xy = scene.tracks_xy.copy()
    is_far = scene.is_visible & (np.random.default_rng(0).random(scene.is_visible.shape) < 0.05)
    tracks_xy[is_far] = far_px
    with np.errstate(all="ignore"):
        estimate = solve_window(scene.problem(tracks_xy=tracks_xy), CONFIG)
        hopeless = solve_window(scene.problem(tracks_xy=np.full_like(tracks_xy, far_px)), CONFIG)
    assert estimate.status is WindowStatus.SOLVED, estimate.reason
    assert not estimate.is_inlier[is_far].any()
    assert scene.centre_errors(estimate).max() < 1e-5
    assert hopeless.status is not WindowStatus.SOLVED


def test_observations_of_low_score_are_left_out() -> None:
    scene = arc_scene(noise_px=0.5, num_points=800)
    moved_xy, is_moved = scene.with_outliers(ratio=0.4)
    score = np.where(is_moved, 0.1, 0.9).astype(np.float32)
    estimate = solve_window(scene.problem(tracks_xy=moved_xy, score=score), CONFIG)
    assert estimate.num_unusable == is_moved.sum()
    assert estimate.num_observations > 0.9 * (scene.is_visible & ~is_moved).sum()


def test_tracks_of_nothing_but_nan_are_refused() -> None:
    scene = arc_scene()
    estimate = solve_window(scene.problem(tracks_xy=np.nan * scene.tracks_xy), CONFIG)
    assert_refused(estimate, WindowStatus.TOO_FEW_FRAMES)


@pytest.mark.parametrize("with_poses", [True, False])
def test_a_frame_that_sees_nothing_is_not_valid_and_the_others_are_solved(
    with_poses: bool,
) -> None:
    scene = arc_scene(noise_px=0.5)
    is_visible = scene.is_visible.copy()
    is_visible[3] = False
    rough = scene.rough_poses(angle_deg=2.0, shift_ratio=0.03) if with_poses else None
    problem = scene.problem(is_visible=is_visible, cam_from_world=rough)
    estimate = solve_window(problem, CONFIG)
    assert estimate.status is WindowStatus.SOLVED
    assert estimate.is_valid.tolist() == [idx != 3 for idx in range(8)]
    assert scene.centre_errors(estimate).max() < 2e-3


def far_scene(noise_px: float) -> WindowScene:
    directions = np.random.default_rng(0).normal(size=(3000, 3))
    return scene_of(arc_scene().poses, 1e6 * directions, noise_px=noise_px)


def twice_the_same(noise_px: float) -> WindowScene:
    scene = arc_scene(noise_px=noise_px)
    same = np.zeros(5, np.int64)
    return replace(
        scene,
        poses=scene.poses[same],
        tracks_xy=scene.tracks_xy[same],
        is_visible=scene.is_visible[same],
    )


@pytest.mark.parametrize("given", ["nothing", "the focal length", "poses"])
@pytest.mark.parametrize("noise_px", [0.0, 0.5])
@pytest.mark.parametrize(
    "make",
    [far_scene, lambda noise_px: turning_scene(noise_px=noise_px), twice_the_same],
    ids=["all far away", "a turn on the spot", "one frame five times"],
)
def test_a_window_without_parallax_is_refused(
    make: Callable[[float], WindowScene], noise_px: float, given: str
) -> None:
    scene = make(noise_px)
    known: dict[str, Any] = {} if given == "nothing" else {"focal_px": KNOWN}
    if given == "poses":  # with a motion that was never there
        poses = scene.poses.copy()
        poses[:, :, 3] += np.random.default_rng(0).normal(scale=0.3, size=(len(poses), 3))
        known["cam_from_world"] = poses
    estimate = solve_window(scene.problem(**known), CONFIG)
    assert_refused(estimate, WindowStatus.NO_PARALLAX)


def test_frames_that_come_twice_do_no_harm() -> None:
    scene = arc_scene(noise_px=0.5)
    twice = np.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 7])
    doubled = replace(
        scene,
        poses=scene.poses[twice],
        tracks_xy=scene.tracks_xy[twice],
        is_visible=scene.is_visible[twice],
    )
    estimate = solve_window(doubled.problem(), CONFIG)
    assert estimate.is_valid.all()
    assert doubled.centre_errors(estimate).max() < 2e-3
    centers = camera_center(estimate.cam_from_world)
    extent = np.linalg.norm(np.ptp(centers, axis=0))
    assert np.linalg.norm(centers[1] - centers[0]) < 1e-3 * extent


def test_one_frame_is_refused() -> None:
    scene = arc_scene()
    problem = WindowProblem(
        tracks_xy=scene.tracks_xy[:1],
        is_visible=scene.is_visible[:1],
        image_sizes=np.array([[1000, 750]]),
    )
    assert_refused(solve_window(problem, CONFIG), WindowStatus.TOO_FEW_FRAMES)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_window_of_nothing_is_refused(shape: tuple[int, int]) -> None:
    problem = WindowProblem(
        tracks_xy=np.zeros((*shape, 2)),
        is_visible=np.zeros(shape, np.bool_),
        image_sizes=np.array([[1000, 750]]),
    )
    assert_refused(solve_window(problem, CONFIG), WindowStatus.TOO_FEW_FRAMES)


def test_a_handful_of_tracks_is_refused() -> None:
    scene = arc_scene(num_points=10)
    assert_refused(solve_window(scene.problem(), CONFIG), WindowStatus.TOO_FEW_TRACKS)


@pytest.mark.parametrize("with_poses", [True, False])
def test_tracks_of_chance_are_refused(with_poses: bool) -> None:
    scene = arc_scene()
    rng = np.random.default_rng(0)
    chance_xy = rng.uniform(0, (1000, 750), scene.tracks_xy.shape)
    known = {"cam_from_world": scene.poses, "focal_px": KNOWN} if with_poses else {}
    estimate = solve_window(scene.problem(tracks_xy=chance_xy, **known), CONFIG)
    assert_refused(estimate, WindowStatus.NO_INITIAL_PAIR)


@pytest.mark.parametrize(
    "changes",
    [
        {"focal_px": np.array([np.nan])},
        {"focal_px": np.array([-800.0])},
        {"focal_px": np.array([1e9])},
        {"distortion": np.array([np.inf])},
        {"is_calibrated": np.array([True])},  # with what focal length?
        {"image_sizes": np.array([[1000, 0]]), "principal_points_xy": np.array([[500.0, 375.0]])},
        {"image_sizes": np.array([[0, 0]])},
        {"principal_points_xy": np.array([[np.nan, 0.0]])},
    ],
    ids=", ".join,
)
def test_intrinsics_that_no_camera_can_have_are_refused(changes: dict[str, Any]) -> None:
    estimate = solve_window(arc_scene().problem(**changes), CONFIG)
    assert_refused(estimate, WindowStatus.BAD_INTRINSICS)


@pytest.mark.parametrize("pose", [np.full((3, 4), np.nan), np.ones((3, 4)), -np.eye(3, 4)])
def test_held_poses_that_are_none_are_refused(pose: Float64Array) -> None:
    scene = arc_scene()
    poses = scene.poses.copy()
    poses[1] = pose
    problem = scene.problem(cam_from_world=poses, is_held=np.arange(8) < 2, focal_px=KNOWN)
    assert_refused(solve_window(problem, CONFIG), WindowStatus.BAD_POSES)


def test_poses_that_are_none_and_not_held_are_found_anew() -> None:
    scene = arc_scene(noise_px=0.5)
    poses = scene.poses.copy()
    poses[1], poses[4] = np.ones((3, 4)), -np.eye(3, 4)
    estimate = solve_window(scene.problem(cam_from_world=poses, focal_px=KNOWN), CONFIG)
    assert scene.centre_errors(estimate).max() < 1.5e-3


def test_held_poses_that_the_tracks_contradict_are_refused() -> None:
    scene = arc_scene(noise_px=0.5)
    poses = scene.poses[[5, 2, 7, 0, 3, 6, 1, 4]]
    problem = scene.problem(cam_from_world=poses, is_held=np.ones(8, np.bool_), focal_px=KNOWN)
    assert_refused(solve_window(problem, CONFIG), WindowStatus.BAD_POSES)


def test_one_held_pose_that_is_wrong_is_detected_by_the_others() -> None:
    scene = arc_scene(noise_px=0.5)
    poses, is_held = scene.poses.copy(), np.arange(8) < 4
    poses[1] = poses[6]
    problem = scene.problem(cam_from_world=poses, is_held=is_held, focal_px=KNOWN)
    estimate = solve_window(problem, CONFIG)
    assert estimate.status is WindowStatus.SOLVED
    assert estimate.is_valid.tolist() == [idx != 1 for idx in range(8)]


def test_a_problem_whose_shapes_do_not_fit_is_refused_at_once() -> None:
    scene = arc_scene()
    with pytest.raises(ValueError, match="camera_idx"):
        scene.problem(camera_idx=np.array([0, 1, 0, 0, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="is_visible"):
        scene.problem(is_visible=scene.is_visible[:, :-1])
    with pytest.raises(ValueError, match="focal_px"):
        scene.problem(focal_px=np.array([800.0, 800.0]))


# -- the recorded window --------------------------------------------------------------------------


@cache
def golden() -> dict[str, Any]:
    return dict(np.load(GOLDEN))


def golden_problem(*, shared: bool = True, **changes: Any) -> WindowProblem:
    """The recorded window; its pixels have their origin at the centre of the first one."""
    num_cameras = 1 if shared else 16
    given = {
        "tracks_xy": golden()["tracks"].astype(np.float64) + 0.5,
        "is_visible": golden()["vis"].astype(np.bool_),
        "image_sizes": np.tile([1024, 1024], (num_cameras, 1)),
        "camera_idx": np.zeros(16, np.int64) if shared else np.arange(16),
        "focal_px": np.full(num_cameras, float(golden()["init_focal"])),
        "cam_from_world": golden()["init_extrinsics"],
    }
    return WindowProblem(**(given | changes))


def golden_errors_pct(estimate: WindowEstimate) -> Float64Array:
    """(16,) errors of centres, in percent of the trajectory's radius."""
    centers = camera_center(estimate.cam_from_world)
    wanted = camera_center(golden()["ref_ngp_extrinsics"])
    true_from_window = similarity(centers, wanted)
    placed = centers @ true_from_window[:, :3].T + true_from_window[:, 3]
    radius = np.linalg.norm(wanted - wanted.mean(axis=0), axis=1).max()
    return np.asarray(100.0 * np.linalg.norm(placed - wanted, axis=1) / radius)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "max_error_px", "max_centre_error_pct"), [(True, 0.526, 0.11), (False, 0.52, 0.41)]
)
def test_the_recorded_window_comes_out_at_least_as_well_as_upstream(
    shared: bool, max_error_px: float, max_centre_error_pct: float
) -> None:
    estimate = solve_window(golden_problem(shared=shared), CONFIG)
    assert estimate.is_valid.all()
    assert 0.4 < estimate.mean_reprojection_px < max_error_px
    assert estimate.num_observations > 15_800
    assert estimate.num_points > 2_600
    assert 0.02 < np.median(golden_errors_pct(estimate)) < max_centre_error_pct


@pytest.mark.slow
@pytest.mark.parametrize("focal_px", [0.0, 848.0, 1106.0])
def test_the_recorded_window_comes_out_the_same_from_its_tracks_alone(focal_px: float) -> None:
    problem = golden_problem(cam_from_world=None, focal_px=np.array([focal_px]))
    estimate = solve_window(problem, CONFIG)
    assert estimate.is_bootstrapped
    assert estimate.num_observations > 15_800
    assert estimate.focal_px[0] == pytest.approx(743.1, abs=1.0)
    assert np.median(golden_errors_pct(estimate)) < 0.11


def golden_outliers() -> tuple[Float64Array, BoolArray]:
    moved_xy = golden()["tri_out_tracks"].astype(np.float64) + 0.5
    return moved_xy, golden()["tri_out_is_outlier"].astype(np.bool_)


@pytest.mark.slow
def test_a_fifth_of_wrong_observations_barely_moves_the_recorded_window() -> None:
    moved_xy, is_moved = golden_outliers()
    problem = golden_problem(tracks_xy=moved_xy)
    estimate = solve_window(problem, CONFIG)
    assert np.median(golden_errors_pct(estimate)) < 0.2
    assert estimate.is_inlier[problem.is_visible & ~is_moved].mean() > 0.95
    assert estimate.is_inlier[is_moved].sum() < 50


@pytest.mark.parametrize("factor", [0.7, 0.8, 1.2, 1.5])
def test_a_calibration_that_the_tracks_contradict_is_refused_with_what_they_want(
    factor: float,
) -> None:
    scene = arc_scene(8, noise_px=0.5)
    given = {"focal_px": np.array([factor * FOCAL_PX]), "is_calibrated": np.array([True])}
    estimate = solve_window(scene.problem(**given), WindowSolverConfig())
    assert estimate.status is WindowStatus.BAD_INTRINSICS
    assert re.match(r"the tracks want a focal length of (7\d\d|8\d\d) px, not", estimate.reason)
    assert not estimate.is_valid.any()


@pytest.mark.parametrize("factor", [0.97, 1.0, 1.03])
def test_a_calibration_that_is_about_right_is_believed(factor: float) -> None:
    scene = arc_scene(8, noise_px=0.5)
    given = {"focal_px": np.array([factor * FOCAL_PX]), "is_calibrated": np.array([True])}
    estimate = solve_window(scene.problem(**given), WindowSolverConfig())
    assert estimate.status is WindowStatus.SOLVED
    assert estimate.focal_px.tolist() == [factor * FOCAL_PX]
