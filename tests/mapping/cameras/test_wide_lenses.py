"""Cameras of every model through the mapper, with the truth: a walk through a room of points."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.camera_models import CAMERA_MODEL_NAMES
from engine.config import CamerasConfig, Config, GlobalBundleAdjustmentConfig, RuntimeConfig
from engine.estimators.lenses import camera_focal_px
from engine.events import CameraCalibrated, WindowPurpose
from engine.geometry import rotation_from_vector
from engine.mapping.model.place_evidence import PairErrors
from engine.mapping.windows.window_selection import Window, window_problem
from engine.types import Float64Array, FrameId, ImagePair, IntrinsicsPrior
from engine.window_types import WindowStatus
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import (
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    look_at,
    pose_errors,
    poses_of,
    scene_graph,
)

CONFIG = Config(
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(synchronous_until=6),
    runtime=RuntimeConfig(num_threads=1),
)
NUM_KEYFRAMES = 8
SIZE = (1000, 750)
CENTER = (500.0, 375.0)

# Calibrations as real lenses have them: about 75 degrees across, wide ones 100 to 150.
CALIBRATIONS: dict[str, tuple[float, ...]] = {
    "SIMPLE_PINHOLE": (650.0, *CENTER),
    "PINHOLE": (650.0, 640.0, *CENTER),
    "SIMPLE_RADIAL": (650.0, *CENTER, -0.1),
    "RADIAL": (600.0, *CENTER, -0.25, 0.06),
    "OPENCV": (600.0, 595.0, 505.0, 370.0, -0.28, 0.07, 0.0005, -0.0003),
    "FULL_OPENCV": (560.0, 558.0, *CENTER, 0.1, 0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0),
    "FOV": (480.0, 480.0, *CENTER, 0.9),
    "SIMPLE_DIVISION": (480.0, *CENTER, -0.2),
    "DIVISION": (480.0, 478.0, *CENTER, -0.2),
    "EUCM": (420.0, 420.0, *CENTER, 0.6, 1.1),
    "SIMPLE_FISHEYE": (382.0, *CENTER),
    "FISHEYE": (382.0, 380.0, *CENTER),
    "SIMPLE_RADIAL_FISHEYE": (400.0, *CENTER, 0.02),
    "RADIAL_FISHEYE": (400.0, *CENTER, 0.03, -0.01),
    "OPENCV_FISHEYE": (400.0, 399.0, 504.0, 371.0, 0.04, -0.01, 0.004, -0.001),
    "THIN_PRISM_FISHEYE": (
        *(420.0, 419.0, *CENTER),
        *(0.02, -0.01, 0.0003, -0.0002, 0.001, 0.0, 0.0004, -0.0003),
    ),
    "RAD_TAN_THIN_PRISM_FISHEYE": (
        *(400.0, 400.0, *CENTER),
        *(0.03, -0.01, 0.002, 0.0, 0.0, 0.0, 0.0003, -0.0002, 0.0004, 0.0, -0.0003, 0.0),
    ),
    "EQUIRECTANGULAR": (1000.0, 500.0),
}


def camera_of_model(model: str) -> SyntheticCamera:
    """A camera whose source knows its calibration completely."""
    params = CALIBRATIONS[model]
    width, height = (1000, 500) if model == "EQUIRECTANGULAR" else SIZE
    prior = IntrinsicsPrior(focal_px=500.0, camera_model=model, params=params)
    return SyntheticCamera(model=model, width=width, height=height, params=params, prior=prior)


def walk() -> Float64Array:
    """Poses (N, 3, 4) across a room, turning."""
    along = np.linspace(0.0, 1.0, NUM_KEYFRAMES)
    centers = np.stack([4.0 * along - 2.0, np.sin(3.0 * along), 0.3 * along], axis=1)
    headings = 0.5 + 0.9 * along
    aims = np.stack([np.cos(headings), np.sin(headings), -0.1 * np.ones_like(along)], axis=1)
    return np.array([look_at(c, c + aim) for c, aim in zip(centers, aims, strict=True)])


def walls(*, num: int = 700) -> Float64Array:
    """Points (num, 3) on and before the walls, floor and ceiling of a room around the walk."""
    rng = np.random.default_rng(8)
    points = rng.uniform(-1.0, 1.0, (num, 3))
    side = rng.integers(0, 3, num)
    points[np.arange(num), side] = np.sign(points[np.arange(num), side]) * rng.uniform(0.8, 1, num)
    return np.asarray(points * (7.0, 6.0, 3.0))


def world_of(camera: SyntheticCamera, *, noise_px: float = 0.0) -> SyntheticWorld:
    return SyntheticWorld(walk(), points=walls(), cameras=[camera], noise_px=noise_px)


def mapped(
    world: SyntheticWorld, config: Config = CONFIG, *, wrong_ratio: float = 0.1
) -> MapperRun:
    """The map of a world of photos, a tenth of whose matches are wrong."""
    matcher = FakeMatcher(world=world, wrong_ratio=wrong_ratio)
    run = MapperRun(config, matcher=matcher, graph=scene_graph())
    for frame_id in world.frame_ids:
        run.add_keyframe(world.keyframe(frame_id))
    run.end()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("model", CAMERA_MODEL_NAMES)
def test_every_camera_model_maps_exactly_when_its_calibration_is_given(model: str) -> None:
    world = world_of(camera_of_model(model))
    run = mapped(world, wrong_ratio=0.0)
    assert run.registered_ids == world.frame_ids
    errors = pose_errors(poses_of(run.sparse_map), world)
    assert errors.max_ratio < 1e-6
    assert errors.max_rotation_rad < 1e-6
    camera = run.sparse_map.camera("camera")
    assert (camera.model_name, tuple(camera.params)) == (model, CALIBRATIONS[model])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["OPENCV_FISHEYE", "EUCM", "EQUIRECTANGULAR"])
def test_noise_of_keypoints_shows_in_the_map_and_does_no_more(model: str) -> None:
    world = world_of(camera_of_model(model), noise_px=0.5)
    run = mapped(world)
    assert run.registered_ids == world.frame_ids
    errors = pose_errors(poses_of(run.sparse_map), world)
    assert 1e-5 < errors.rmse_ratio < 0.004


@pytest.mark.slow
def test_a_calibration_of_the_wrong_kind_is_clearly_worse() -> None:
    camera = camera_of_model("SIMPLE_FISHEYE")
    pinhole = IntrinsicsPrior(
        focal_px=382.0, camera_model="SIMPLE_PINHOLE", params=CALIBRATIONS["SIMPLE_FISHEYE"]
    )
    world = world_of(dataclasses.replace(camera, prior=pinhole))
    run = mapped(world)
    is_whole = run.registered_ids == world.frame_ids
    assert not is_whole or pose_errors(poses_of(run.sparse_map), world).rmse_ratio > 0.01


@pytest.mark.slow
def test_a_fisheye_by_its_name_finds_its_focal_length_and_distortion() -> None:
    hint = IntrinsicsPrior(focal_px=0.0, is_fisheye=True)
    camera = dataclasses.replace(camera_of_model("RADIAL_FISHEYE"), prior=hint)
    world = world_of(camera, noise_px=0.2)
    run = mapped(world)
    assert run.registered_ids == world.frame_ids
    assert pose_errors(poses_of(run.sparse_map), world).rmse_ratio < 0.003
    found = run.sparse_map.camera("camera")
    assert found.model_name == "RADIAL_FISHEYE"
    assert camera_focal_px(found) == pytest.approx(400.0, rel=0.01)
    first = run.emitted(CameraCalibrated)[0]
    assert abs(first.focal_px / 400.0 - 1.0) > 0.1  # it started elsewhere


@pytest.mark.slow
def test_the_pairs_of_a_wide_lens_carry_a_relative_pose_instead_of_a_fundamental_matrix() -> None:
    world = world_of(camera_of_model("OPENCV_FISHEYE"))
    pairs = [pair for record in mapped(world).records for pair in record.pairs]
    assert pairs
    for pair in pairs:
        assert pair.cam2_from_cam1 is not None
        assert not pair.fundamental.any()
        assert np.linalg.norm(pair.cam2_from_cam1[:, 3]) == pytest.approx(1.0)


def test_the_pairs_of_an_ordinary_lens_are_verified_as_ever() -> None:
    world = world_of(camera_of_model("SIMPLE_PINHOLE"))
    matcher = FakeMatcher(world=world)
    run = MapperRun(CONFIG, matcher=matcher, graph=scene_graph())
    assert run.begin_keyframe(world.keyframe(1)).intrinsics == {}


@pytest.mark.slow
def test_a_wide_and_an_ordinary_lens_share_one_map() -> None:
    fisheye = dataclasses.replace(camera_of_model("OPENCV_FISHEYE"), key="fisheye")
    phone = dataclasses.replace(camera_of_model("SIMPLE_PINHOLE"), key="phone")
    world = SyntheticWorld(walk(), points=walls(), cameras=[fisheye, phone])
    run = mapped(world)
    assert run.registered_ids == world.frame_ids
    assert pose_errors(poses_of(run.sparse_map), world).max_ratio < 1e-3


@pytest.mark.slow
def test_frames_between_keyframes_of_a_spherical_video_get_their_poses() -> None:
    world = world_of(camera_of_model("EQUIRECTANGULAR"))
    run = MapperRun(CONFIG, matcher=FakeMatcher(world=world), graph=scene_graph())
    keyframe_ids = world.frame_ids[::2]
    for frame_id in keyframe_ids:
        run.add_keyframe(world.keyframe(frame_id))
        if frame_id + 1 <= len(world.frame_ids):
            run.add_frame(world.tracked(frame_id + 1, keyframe_id=frame_id))
    run.end()
    poses = {pose.frame_id: pose.cam_from_world for pose in run.trajectory}
    assert sorted(poses) == world.frame_ids
    assert pose_errors(poses, world).max_ratio < 1e-3


@pytest.mark.slow
def test_the_configured_spherical_model_needs_no_parameters() -> None:
    camera = dataclasses.replace(camera_of_model("EQUIRECTANGULAR"), prior=None)
    world = world_of(camera)
    config = CONFIG.model_copy(update={"cameras": CamerasConfig(model="EQUIRECTANGULAR")})
    run = mapped(world, config)
    assert run.registered_ids == world.frame_ids
    assert pose_errors(poses_of(run.sparse_map), world).max_ratio < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["OPENCV_FISHEYE", "EQUIRECTANGULAR"])
def test_a_wide_lens_that_only_turns_makes_no_map(model: str) -> None:
    on_the_spot = walk()
    on_the_spot[:, :, 3] = -on_the_spot[:, :, :3] @ (0.5, 0.2, 0.1)
    world = SyntheticWorld(
        on_the_spot, points=walls(), cameras=[camera_of_model(model)], noise_px=0.5
    )
    assert mapped(world).registered_ids == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["OPENCV_FISHEYE", "EQUIRECTANGULAR"])
def test_a_pair_of_wide_lenses_contradicts_a_wrong_pose_and_no_right_one(model: str) -> None:
    run = mapped(world_of(camera_of_model(model)))
    pair = run.graph.edge(ImagePair(FrameId(2), FrameId(6)))
    assert pair is not None
    assert not PairErrors(run.sparse_map).contradicts(pair)
    moved = run.sparse_map.cam_from_world(FrameId(6)).copy()
    moved[:, :3] = rotation_from_vector(np.array([0.5, 0.3, 0.0])) @ moved[:, :3]
    run.sparse_map.set_pose(FrameId(6), moved)
    assert PairErrors(run.sparse_map).contradicts(pair)


@pytest.mark.slow
def test_a_window_of_fisheye_keyframes_leaves_out_what_a_pinhole_hardly_sees() -> None:
    run = mapped(world_of(camera_of_model("SIMPLE_FISHEYE")))
    ids = tuple(run.registered_ids)
    window = Window(frame_ids=ids, free_ids=frozenset(ids), purpose=WindowPurpose.FINAL)
    problem = window_problem(run.graph, run.sparse_map, window)
    assert problem is not None
    is_finite = np.isfinite(problem.tracks_xy).all(axis=2)
    is_left_out = problem.is_visible & ~is_finite
    assert 0.05 < is_left_out.sum() / problem.is_visible.sum() < 0.7
    offsets = problem.tracks_xy[is_finite] - problem.principal_points_xy[0]
    assert np.linalg.norm(offsets, axis=1).max() <= 382.0 * np.tan(np.radians(60.0)) + 1e-6
    assert solve_window(problem, config=WindowSolverConfig()).status is WindowStatus.SOLVED


@pytest.mark.slow
def test_a_spherical_map_is_laid_onto_gps() -> None:
    poses = walk()
    poses[:, :, 3] *= 10.0
    world = SyntheticWorld(
        poses, points=10.0 * walls(), cameras=[camera_of_model("EQUIRECTANGULAR")], max_range=200.0
    )
    run = MapperRun(CONFIG, matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in world.frame_ids:
        run.add_keyframe(world.keyframe(frame_id, gps=world.gps(frame_id)))
    run.end()
    figures = run.mapper.figures()
    assert figures.placement is not None
    assert figures.gps_rmse_m is not None
    assert figures.gps_rmse_m < 0.05


@pytest.mark.slow
def test_the_view_shows_what_wide_lenses_see() -> None:
    run = mapped(world_of(camera_of_model("SIMPLE_FISHEYE")))
    rays = run.mapper.view().corner_rays
    assert rays.shape == (NUM_KEYFRAMES, 4, 3)
    assert np.degrees(np.arccos(rays[0, :, 2])) == pytest.approx(
        np.degrees(np.hypot(500.0, 375.0) / 382.0), abs=5.0
    )
    assert not mapped(world_of(camera_of_model("EQUIRECTANGULAR"))).mapper.view().corner_rays.any()
