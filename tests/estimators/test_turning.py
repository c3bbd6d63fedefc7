"""Turning without moving: what rotations explain, and what they must not."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.estimators.turning import (
    FocalPrior,
    TurningFit,
    fit_turning,
    nearest_turn_ratio,
    share_explained_by_turning,
)
from engine.types import Float64Array
from tests.support.turning_scenes import (
    HEIGHT,
    SHAPE,
    WIDTH,
    Matched,
    camera,
    matched_pairs,
    moved,
    points_around,
    turned,
    wall,
)

TURN_DEG = np.arange(6) * 8.0
TELE_DEG = np.arange(6) * 2.5
ASIDE = np.column_stack([0.5 * np.arange(6), 0.1 * np.arange(6), np.zeros(6)])
AHEAD = np.column_stack([np.zeros((6, 2)), 0.5 * np.arange(6)])


def fitted(pairs: list[Matched], *, zooms: bool = False, **options: object) -> TurningFit:
    return fit_turning(
        [pair.as_turning_pair(zooms=zooms) for pair in pairs],
        shape=SHAPE,
        **options,  # type: ignore[arg-type]
    )


def distorted(k: float, *, focal_ratio: float) -> pycolmap.Camera:
    params = (focal_ratio * WIDTH, WIDTH / 2, HEIGHT / 2, k)
    return pycolmap.Camera(model="SIMPLE_RADIAL", width=WIDTH, height=HEIGHT, params=params)


@pytest.mark.parametrize(
    ("lens", "angles_deg", "focal_ratio", "tolerance"),
    [
        pytest.param(camera(0.4), TURN_DEG, 0.4, 0.01, id="wide"),
        pytest.param(camera(0.8), TURN_DEG, 0.8, 0.01, id="normal"),
        pytest.param(camera(4.0), TELE_DEG, 4.0, 0.15, id="tele"),
        pytest.param(distorted(-0.15, focal_ratio=0.8), TURN_DEG, 0.8, 0.02, id="barrel"),
        pytest.param(distorted(0.15, focal_ratio=0.8), TURN_DEG, 0.8, 0.02, id="pincushion"),
        pytest.param(camera(0.4, model="SIMPLE_FISHEYE"), 1.5 * TURN_DEG, 0.4, 0.05, id="fisheye"),
    ],
)
def test_turns_are_explained_and_tell_the_focal_length_of_any_lens(
    lens: pycolmap.Camera, angles_deg: Float64Array, focal_ratio: float, tolerance: float
) -> None:
    num_points = 60_000 if focal_ratio > 2.0 else 6000
    fit = fitted(matched_pairs(turned(angles_deg.tolist()), points_around(num_points), lens))
    assert fit.explained.min() > 0.8
    assert fit.is_determined
    assert fit.focal_ratios[0] == pytest.approx(focal_ratio, rel=tolerance)
    assert fit.angles_rad.max() == pytest.approx(np.radians(3 * (angles_deg[1])), abs=0.1)


def test_a_camera_that_turns_and_zooms_has_a_focal_length_in_each_view() -> None:
    ratios = 0.8 * 1.12 ** np.arange(6)
    pairs = matched_pairs(
        turned((0.6 * TURN_DEG).tolist()), points_around(20_000), [camera(one) for one in ratios]
    )
    zooming = fitted(pairs, zooms=True)
    assert zooming.explained.min() > 0.9
    assert zooming.is_determined
    assert zooming.focal_ratios == pytest.approx(ratios, rel=0.02)
    assert np.median(fitted(pairs).explained) < 0.3


@pytest.mark.parametrize("centers", [ASIDE, AHEAD], ids=["aside", "ahead"])
@pytest.mark.parametrize("zooms", [False, True])
def test_a_motion_among_things_of_all_depths_is_no_turn(centers: Float64Array, zooms: bool) -> None:
    fit = fitted(matched_pairs(moved(centers), points_around(), camera()), zooms=zooms)
    assert np.median(fit.explained) < 0.4
    assert (fit.explained < 0.7).mean() > 0.5


@pytest.mark.parametrize("shake_rad", [0.0, 0.02])
def test_a_motion_along_a_wall_leaves_the_focal_length_of_turns_open(shake_rad: float) -> None:
    poses = moved(ASIDE, shake_rad=shake_rad)
    fit = fitted(matched_pairs(poses, wall(), camera(1.5)))
    assert not fit.is_determined


@pytest.mark.parametrize("focal_ratio", [0.6, 0.8, 1.0, 1.5, 2.2])
@pytest.mark.parametrize("sigma_ratio", [0.02, 0.05])
def test_a_motion_along_a_wall_is_no_turn_of_a_known_camera(
    focal_ratio: float, sigma_ratio: float
) -> None:
    pairs = matched_pairs(moved(ASIDE), wall(), camera(focal_ratio))
    known = fitted(pairs, priors=[FocalPrior(ratio=focal_ratio, sigma_ratio=sigma_ratio)])
    is_turn = known.is_determined and (known.explained > 0.7).mean() > 0.8
    assert not is_turn or known.prior_sigmas > 3.0


def test_what_is_known_of_a_focal_length_may_be_wrong() -> None:
    pairs = matched_pairs(turned(TURN_DEG.tolist()), points_around(), camera(0.8))
    wrong = fitted(pairs, priors=[FocalPrior(ratio=1.0, sigma_ratio=0.02)])
    right = fitted(pairs, priors=[FocalPrior(ratio=0.81, sigma_ratio=0.02)])
    assert wrong.prior_sigmas > 3.0
    assert right.prior_sigmas < 1.0
    assert right.explained.min() > 0.9


def test_a_motion_towards_a_wall_is_a_zoom_without_turns() -> None:
    fit = fitted(matched_pairs(moved(AHEAD), wall(), camera(1.5)), zooms=True)
    assert fit.angles_rad.max() < 0.02


def test_noise_is_allowed_for_as_far_as_epipolar_lines_show_it() -> None:
    pairs = matched_pairs(turned(TURN_DEG.tolist()), points_around(), camera(), noise_px=2.0)
    known = fit_turning([p.as_turning_pair(noise_px=1.9) for p in pairs], shape=SHAPE)
    assert known.explained.min() > 0.8
    assert known.is_determined
    assert fitted(pairs).explained.min() < 0.8
    assert known.error_ratio * WIDTH > 1.5


def test_a_small_circle_is_a_turn_and_a_large_one_is_a_motion() -> None:
    lens, points = camera(), points_around()
    small = fitted(matched_pairs(turned(TURN_DEG.tolist(), radius=0.02), points, lens))
    large = fitted(matched_pairs(turned(TURN_DEG.tolist(), radius=1.0), points, lens))
    assert small.explained.min() > 0.9
    assert np.median(large.explained) < 0.7


def test_a_coarse_look_tells_turns_from_motions() -> None:
    turns = matched_pairs(turned(TURN_DEG.tolist()), points_around(), camera(0.9))
    motions = matched_pairs(moved(ASIDE), points_around(), camera(0.9))
    near = [nearest_turn_ratio(pair.as_turning_pair(), SHAPE) for pair in turns]
    far = [nearest_turn_ratio(pair.as_turning_pair(), SHAPE) for pair in motions]
    assert max(near) < 0.01
    assert np.median(far) > 0.015


@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "SIMPLE_FISHEYE"])
def test_turns_of_calibrated_cameras_are_told_from_motions(model: str) -> None:
    lens = camera(0.5, model=model)

    def shares(poses: Float64Array, points: Float64Array) -> list[float]:
        return [
            share_explained_by_turning(p.points1_xy, p.points2_xy, camera1=lens, camera2=lens)[0]
            for p in matched_pairs(poses, points, lens)
        ]

    assert min(shares(turned(TURN_DEG.tolist()), points_around())) > 0.95
    assert max(shares(moved(ASIDE), points_around())) < 0.5
    assert max(shares(moved(ASIDE), wall())) < 0.5
