"""The viewpoint from which a finished map is shown."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.views.display_geometry import cam_centers
from adapters.views.viewpoint import Viewpoint, overview_viewpoint, up_direction
from engine.types import Float32Array, Float64Array

DOWN = np.array([0.0, 1.0, 0.0])  # the synthetic worlds here have y down


def camera(
    center: Float64Array, target: Float64Array, image_down: Float64Array = DOWN
) -> Float64Array:
    """cam_from_world (3, 4) of a camera at ``center`` that faces ``target``."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(image_down, forward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.column_stack([rotation, -rotation @ center])


def orbit(num: int = 24) -> Float64Array:
    angles = np.linspace(0.0, 2.0 * np.pi, num, endpoint=False)
    centers = [np.array([10.0 * np.cos(a), -4.0, 10.0 * np.sin(a)]) for a in angles]
    return np.stack([camera(center, np.zeros(3)) for center in centers])


def walk_past_a_wall() -> Float64Array:
    """Cameras in a line along x that face along z, held upright."""
    return np.stack(
        [camera(np.array([x, 0.0, 0.0]), np.array([x, 0.0, 8.0])) for x in np.linspace(0, 20, 12)]
    )


def straight_down_flight(headings: tuple[float, ...]) -> Float64Array:
    """A grid of cameras 30 above the ground that face down; a lane per heading."""
    return np.stack(
        [
            camera(
                np.array([x, -30.0, 12.0 * lane]),
                np.array([x, 0.0, 12.0 * lane]),
                np.array([heading, 0.0, 0.0]),
            )
            for lane, heading in enumerate(headings)
            for x in np.linspace(0.0, 30.0, 6)
        ]
    )


@pytest.fixture
def ground() -> Float32Array:
    spread = np.random.default_rng(0).uniform(-10.0, 10.0, (500, 3)) * [1.0, 0.1, 1.0]
    return spread.astype(np.float32)


def project(viewpoint: Viewpoint, positions: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Tangents (N, 2) right and up from the viewpoint's line of sight, and depths (N,)."""
    forward = viewpoint.target - viewpoint.position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, viewpoint.up)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(right, forward), forward])
    in_view = (positions - viewpoint.position) @ axes.T
    return in_view[:, :2] / in_view[:, 2:], in_view[:, 2]


@pytest.mark.parametrize(
    "poses",
    [
        pytest.param(orbit(), id="orbit"),
        pytest.param(walk_past_a_wall(), id="walk past a wall"),
        pytest.param(straight_down_flight((1.0, -1.0, 1.0)), id="flight that turns"),
        pytest.param(straight_down_flight((1.0, 1.0, 1.0)), id="flight that never turns"),
    ],
)
def test_up_is_found_for_every_way_of_filming(poses: Float64Array) -> None:
    assert up_direction(poses) == pytest.approx(-DOWN, abs=1e-6)


@pytest.mark.parametrize("poses", [orbit(), straight_down_flight((1.0, -1.0)), orbit(1)])
def test_the_overview_is_from_above_and_has_every_camera_in_sight(
    poses: Float64Array, ground: Float32Array
) -> None:
    viewpoint = overview_viewpoint(poses, ground)
    tangents, depths = project(viewpoint, cam_centers(poses))

    assert viewpoint.position[1] < viewpoint.target[1]
    assert depths.min() > 0.0
    assert np.abs(tangents[:, 0]).max() < 0.85
    assert np.abs(tangents[:, 1]).max() < np.tan(np.radians(55.0 / 2.0))


def test_the_map_fills_the_picture_and_is_centred(ground: Float32Array) -> None:
    viewpoint = overview_viewpoint(orbit(), ground)
    tangents, _ = project(viewpoint, cam_centers(orbit()))
    low, high = tangents.min(axis=0), tangents.max(axis=0)

    assert max((high - low)[0] / 1.6, (high - low)[1] / 0.92) > 0.8
    assert np.abs(low + high).max() < 0.25


def test_a_few_points_far_away_do_not_push_the_eye_back(ground: Float32Array) -> None:
    stragglers = np.full((5, 3), 1e5, np.float32)
    near = overview_viewpoint(orbit(), ground)
    far = overview_viewpoint(orbit(), np.concatenate([ground, stragglers]))

    assert np.linalg.norm(far.position - near.position) < 1.0


def test_the_viewpoint_lies_behind_cameras_that_face_one_way(ground: Float32Array) -> None:
    viewpoint = overview_viewpoint(walk_past_a_wall(), ground)

    assert viewpoint.position[2] < viewpoint.target[2]


def test_a_map_of_cameras_without_points_has_an_overview() -> None:
    viewpoint = overview_viewpoint(orbit(), np.zeros((0, 3), np.float32))

    assert np.isfinite(viewpoint.position).all()
