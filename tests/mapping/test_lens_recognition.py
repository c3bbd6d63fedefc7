"""Lenses that nobody described: fisheyes and long lenses are found, ordinary cameras stay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.config import CamerasConfig, Config
from engine.events import LensRecognised
from engine.types import Float64Array, IntrinsicsPrior
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import (
    HEIGHT,
    WIDTH,
    FakeMatcher,
    PoseErrors,
    SyntheticCamera,
    SyntheticWorld,
    look_at,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
)

NUM_KEYFRAMES = 10
WRONG_RATIO = 0.1  # of the matches


def camera(
    focal_px: float,
    k: float = 0.0,
    *,
    model: str = "SIMPLE_RADIAL",
    prior: IntrinsicsPrior | None = None,
) -> SyntheticCamera:
    return SyntheticCamera(model=model, params=(focal_px, WIDTH / 2, HEIGHT / 2, k), prior=prior)


def fisheye(degrees_across: float) -> SyntheticCamera:
    focal_px = WIDTH / 2 / math.radians(degrees_across / 2)
    return camera(focal_px, model="SIMPLE_RADIAL_FISHEYE")


def flight(taken_with: SyntheticCamera, *, noise_px: float = 0.4) -> SyntheticWorld:
    return SyntheticWorld(
        straight_path(NUM_KEYFRAMES), cameras=[taken_with], noise_px=noise_px, density=1.0
    )


def around_an_object(focal_px: float) -> SyntheticWorld:
    """A long lens on an arc around a ball of points."""
    angles = np.linspace(-0.3, 0.3, NUM_KEYFRAMES)
    centers = 14.0 * np.column_stack([np.cos(angles), np.sin(angles), 0.1 * np.sin(3 * angles)])
    rng = np.random.default_rng(3)
    directions: Float64Array = rng.normal(size=(500, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return SyntheticWorld(
        np.array([look_at(center, np.zeros(3)) for center in centers]),
        points=2.0 * directions * rng.random((500, 1)) ** (1 / 3),
        cameras=[camera(focal_px)],
        noise_px=0.4,
    )


class Run(MapperRun):
    """A mapper fed with all frames of a world, not finished."""

    def __init__(self, world: SyntheticWorld, *, config: Config | None = None) -> None:
        matcher = FakeMatcher(world=world, wrong_ratio=WRONG_RATIO)
        super().__init__(config or Config(), matcher=matcher, graph=scene_graph())
        self.world = world
        for frame_id in world.frame_ids:
            self.add_keyframe(world.keyframe(frame_id))

    @property
    def model(self) -> str:
        return str(self.sparse_map.camera("camera").model_name)

    @property
    def focal_px(self) -> float:
        return float(self.sparse_map.camera("camera").mean_focal_length())

    @property
    def recognised(self) -> list[LensRecognised]:
        return self.emitted(LensRecognised)

    def errors(self) -> PoseErrors:
        return pose_errors(poses_of(self.sparse_map), self.world)


@pytest.mark.slow
@pytest.mark.parametrize("degrees_across", [110.0, 150.0])
def test_a_fisheye_that_nobody_named_is_recognised_while_frames_arrive(
    degrees_across: float,
) -> None:
    world = flight(fisheye(degrees_across))
    mapped = Run(world)
    (recognised,) = mapped.recognised
    true_px = float(world.camera(1).params[0])
    assert (recognised.former_model, recognised.model) == ("SIMPLE_RADIAL", "RADIAL_FISHEYE")
    assert abs(recognised.focal_px - true_px) < 0.02 * true_px
    assert recognised.gain_ratio is None or recognised.gain_ratio > 1.03
    assert mapped.model == "RADIAL_FISHEYE"
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3
    mapped.end()
    assert abs(mapped.focal_px - true_px) < 0.005 * true_px
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


def test_no_lens_is_searched_when_that_is_not_wanted() -> None:
    cameras = CamerasConfig(recognise_lenses=False)
    mapped = Run(flight(fisheye(110.0)), config=Config(cameras=cameras))
    assert not mapped.recognised
    assert mapped.model == "SIMPLE_RADIAL"


@pytest.mark.slow
def test_a_long_lens_is_found_while_frames_arrive() -> None:
    mapped = Run(around_an_object(2600.0))
    assert abs(mapped.focal_px - 2600.0) < 0.03 * 2600.0
    assert mapped.registered_ids == mapped.world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3
    assert {event.model for event in mapped.recognised} <= {"SIMPLE_RADIAL"}


@pytest.mark.slow
@pytest.mark.parametrize(("k", "noise_px"), [(0.0, 1.0), (-0.15, 0.4), (-0.15, 1.0)])
def test_an_ordinary_camera_stays_a_perspective_with_noise_and_distortion(
    k: float, noise_px: float
) -> None:
    world = flight(camera(800.0, k), noise_px=noise_px)
    mapped = Run(world)
    mapped.end()
    assert mapped.model == "SIMPLE_RADIAL"
    assert all(event.model == "SIMPLE_RADIAL" for event in mapped.recognised)
    assert abs(mapped.focal_px - 800.0) < 0.03 * 800.0
    assert 1e-5 < mapped.errors().rmse_ratio < 2e-3


def test_a_start_that_looks_right_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(
        "engine.mapping.lens_recognition.LensRecognition.recognise",
        lambda self, sparse_map, camera_key: searched.append(camera_key),
    )
    mapped = Run(flight(camera(800.0)))
    mapped.end()
    assert searched == []
    assert mapped.registered_ids == mapped.world.frame_ids


@pytest.mark.slow
def test_a_camera_named_like_an_action_camera_may_be_set_to_perspective() -> None:
    hint = IntrinsicsPrior(focal_px=0.0, is_fisheye=True)
    mapped = Run(flight(camera(560.0, prior=hint)))
    (recognised,) = mapped.recognised
    assert (recognised.former_model, recognised.model) == ("RADIAL_FISHEYE", "SIMPLE_RADIAL")
    assert abs(mapped.focal_px - 560.0) < 0.02 * 560.0
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


@pytest.mark.parametrize(
    ("cameras", "prior"),
    [
        (CamerasConfig(focal_px=816.0), None),
        (CamerasConfig(intrinsics="fixed"), None),
        (CamerasConfig(), IntrinsicsPrior(focal_px=816.0)),
        (CamerasConfig(model="OPENCV_FISHEYE"), None),
    ],
)
def test_a_lens_that_somebody_vouched_for_is_not_searched(
    cameras: CamerasConfig, prior: IntrinsicsPrior | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []
    monkeypatch.setattr(
        "engine.mapping.lens_recognition.LensRecognition.recognise",
        lambda self, sparse_map, camera_key: searched.append(camera_key),
    )
    lens = fisheye(130.0)
    taken_with = SyntheticCamera(model=lens.model, params=lens.params, prior=prior)
    Run(flight(taken_with), config=Config(cameras=cameras))
    assert searched == []
