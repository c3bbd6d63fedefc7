"""Points that people marked in images: where they lie, and which marks contradict the others."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.estimators.marked_points import MarkedPoint, locate_marked_point
from engine.types import Float64Array
from tests.support.synthetic import look_at

PLACE = np.array([3.0, -2.0, 1.0])
NUM = 6


def camera_of(model: str = "OPENCV") -> pycolmap.Camera:
    camera_id = getattr(pycolmap.CameraModelId, model)
    return pycolmap.Camera.create_from_model_id(1, camera_id, 800.0, 1000, 750)


def poses_of(num: int = NUM, *, width: float = 20.0) -> Float64Array:
    """Cameras 30 above the ground that look at the origin."""
    places = [
        np.array([x, 4.0 * (-1) ** i, 30.0]) for i, x in enumerate(np.linspace(0, width, num))
    ]
    return np.array([look_at(place, np.zeros(3)) for place in places])


def marks_of(poses: Float64Array, *, noise_px: float = 0.0, seed: int = 0) -> Float64Array:
    in_cams = poses[:, :, :3] @ PLACE + poses[:, :, 3]
    noise = np.random.default_rng(seed).normal(scale=noise_px or 1e-12, size=(len(poses), 2))
    return np.asarray(camera_of().img_from_cam(in_cams) + noise)


def located(marks_xy: Float64Array, poses: Float64Array) -> MarkedPoint:
    found = locate_marked_point(marks_xy, [camera_of()] * len(poses), poses)
    assert isinstance(found, MarkedPoint), found
    return found


def test_marks_without_noise_give_the_point() -> None:
    found = located(marks_of(poses_of()), poses_of())
    np.testing.assert_allclose(found.place, PLACE, atol=1e-6)
    assert found.residual_px < 1e-3
    assert found.agrees.all()


def test_errors_are_as_large_as_the_covariance_says() -> None:
    poses = poses_of()
    found = [located(marks_of(poses, noise_px=0.5, seed=seed), poses) for seed in range(60)]
    errors = np.array([one.place - PLACE for one in found])
    said = np.sqrt(np.mean([np.diag(one.covariance) for one in found], axis=0))
    spread = np.sqrt((errors**2).mean(axis=0))
    assert (spread > 0.5 * said).all()
    assert (spread < 1.5 * said).all()
    assert 0.3 < np.mean([one.residual_px for one in found]) < 0.8


def test_a_mark_on_something_else_is_told_from_the_others() -> None:
    poses = poses_of()
    marks_xy = marks_of(poses, noise_px=0.5)
    marks_xy[2] += (40.0, -25.0)
    found = located(marks_xy, poses)
    assert found.agrees.tolist() == [True, True, False, True, True, True]
    assert 40.0 < found.residuals_px[2] < 60.0
    assert np.linalg.norm(found.place - PLACE) < 0.2


@pytest.mark.parametrize(
    ("poses", "words"),
    [
        (poses_of(1), "fewer than two images"),
        (
            np.array([look_at(np.array([x, 1.0, 30.0]), np.zeros(3)) for x in (0.0, 0.05)]),
            "from the same direction",
        ),
    ],
)
def test_what_cannot_be_located_says_why(poses: Float64Array, words: str) -> None:
    found = locate_marked_point(marks_of(poses), [camera_of()] * len(poses), poses)
    assert isinstance(found, str)
    assert words in found


def test_two_marks_of_different_things_contradict_each_other() -> None:
    poses = poses_of(2)
    marks_xy = marks_of(poses)
    marks_xy[1, 1] += 200.0
    assert locate_marked_point(marks_xy, [camera_of()] * 2, poses) == (
        "its marks contradict each other"
    )
