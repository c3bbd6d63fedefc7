"""Camera limits: ordinary lenses pass, folded and impossible ones do not, for any model."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.camera_models import CAMERA_MODELS
from engine.estimators.camera_limits import (
    corner_displacement,
    focal_limits_px,
    lens_flaw,
    nearest_possible_distortion,
    undistorted_params,
)

WIDTH, HEIGHT = 960, 640
CORNER_PX = float(np.hypot(WIDTH, HEIGHT)) / 2


def camera(model: str, *params: float, size: tuple[int, int] = (WIDTH, HEIGHT)) -> pycolmap.Camera:
    width, height = size
    return pycolmap.Camera(model=model, width=width, height=height, params=params)


def radial(focal_px: float, k: float) -> pycolmap.Camera:
    return camera("SIMPLE_RADIAL", focal_px, WIDTH / 2, HEIGHT / 2, k)


@pytest.mark.parametrize("focal_ratio", [0.35, 0.85, 3.0])
@pytest.mark.parametrize("model", CAMERA_MODELS)
def test_every_model_begins_as_a_lens_can_be(model: str, focal_ratio: float) -> None:
    fresh = pycolmap.Camera.create_from_model_name(1, model, focal_ratio * WIDTH, WIDTH, HEIGHT)
    assert lens_flaw(fresh) == ""


@pytest.mark.parametrize(
    "lens",
    [
        radial(0.72 * WIDTH, 0.01),  # a phone
        radial(2.4 * WIDTH, -0.27),  # a long lens
        radial(0.585 * WIDTH, -0.03),  # a drone
        camera("OPENCV", 520.0, 520.0, 480.0, 320.0, -0.26, 0.08, 0.001, 0.0),  # a wide webcam
        camera("OPENCV_FISHEYE", 470.0, 470.0, 480.0, 320.0, -0.01, 0.002, 0.0, 0.0),
        camera("EUCM", 280.0, 280.0, 480.0, 320.0, 0.6, 1.1),
        camera("EQUIRECTANGULAR", 1280.0, 640.0, size=(1280, 640)),
    ],
)
def test_lenses_as_people_have_them_are_possible(lens: pycolmap.Camera) -> None:
    assert lens_flaw(lens) == ""
    assert nearest_possible_distortion(lens) == list(lens.params)


@pytest.mark.parametrize("focal_px", [400.0, 700.0, 1500.0])
def test_a_barrel_that_folds_before_the_corner_is_found(focal_px: float) -> None:
    """r (1 + k r^2) turns at r = (-3 k)^-1/2, where two thirds of that are left."""
    folds_at = -(4.0 / 27.0) / (CORNER_PX / focal_px) ** 2  # k, exactly at the corner
    assert "folds" in lens_flaw(radial(focal_px, 1.05 * folds_at))
    assert "folds" not in lens_flaw(radial(focal_px, 0.5 * folds_at))
    possible = nearest_possible_distortion(radial(focal_px, 2.0 * folds_at))
    assert lens_flaw(radial(focal_px, possible[3])) == ""
    assert folds_at < possible[3] < 0.05 * folds_at


@pytest.mark.parametrize(
    ("lens", "words"),
    [
        (camera("SIMPLE_RADIAL", 2325.0, 427.0, 240.0, 14.3, size=(854, 480)), "k 14.3"),
        (radial(9327.0, -19.7), "k -19.7"),
        (radial(0.15 * WIDTH, 0.0), "144 px is not between 192 and"),
        (radial(40.0 * WIDTH, 0.0), "38400 px is not between"),
        (radial(float("nan"), 0.0), "not finite"),
        (radial(700.0, float("inf")), "not finite"),
        (camera("PINHOLE", 700.0, 100.0, 480.0, 320.0), "100 px is not between"),
        (camera("OPENCV_FISHEYE", 300.0, 300.0, 480.0, 320.0, -0.3, 0.0, 0.0, 0.0), "folds"),
    ],
)
def test_what_no_lens_is_like_is_named(lens: pycolmap.Camera, words: str) -> None:
    assert words in lens_flaw(lens)


def test_longer_lenses_bend_less() -> None:
    for displacement in (0.1, -0.12):
        flaws = []
        for focal_ratio in (0.6, 6.0):
            tangent = CORNER_PX / (focal_ratio * WIDTH)
            undistorted = tangent / (1.0 + displacement)
            lens = radial(focal_ratio * WIDTH, displacement / undistorted**2)
            assert corner_displacement(lens) == pytest.approx(displacement, abs=0.01)
            flaws.append(lens_flaw(lens))
        assert flaws[0] == ""
        assert "moves the image's corner" in flaws[1]


def test_distortion_is_taken_out_alone() -> None:
    lens = camera("OPENCV", 500.0, 510.0, 470.0, 330.0, 9.0, 1.0, 0.1, 0.1)
    assert undistorted_params(lens) == [500.0, 510.0, 470.0, 330.0, 0.0, 0.0, 0.0, 0.0]


def test_wide_models_may_have_shorter_focal_lengths() -> None:
    fisheye = camera("SIMPLE_FISHEYE", 300.0, 480.0, 320.0)
    assert focal_limits_px(fisheye)[0] < focal_limits_px(radial(700.0, 0.0))[0]
