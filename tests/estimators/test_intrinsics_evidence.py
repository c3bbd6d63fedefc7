"""Intrinsics evidence: as sure as bundle adjustment is, and unsure where geometry says nothing."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.estimators.adjustment_options import adjustment_options
from engine.estimators.intrinsics_evidence import (
    IntrinsicsEvidence,
    distortion_sigmas,
    measure_evidence,
    params_of,
    refined_params,
)
from engine.types import Float64Array
from tests.support.calibration_scenes import (
    CAMERA_ID,
    FOCAL_PX,
    HEIGHT,
    WIDTH,
    camera_with,
    cloud,
    lawnmower,
    orbit,
    plane,
    reconstruction_of,
    turn,
)

INFLATION = 5.0  # of standard deviations for what does not average out


def evidence_of(reconstruction: pycolmap.Reconstruction) -> IntrinsicsEvidence:
    evidence = measure_evidence(reconstruction, CAMERA_ID)
    assert evidence is not None
    return evidence


def test_it_is_as_sure_as_adjustments_scatter() -> None:
    poses, points = orbit(8), cloud(140)
    found = []
    for seed in range(12):
        reconstruction = reconstruction_of(poses, points, camera_with(), noise_px=1.5, seed=seed)
        options = adjustment_options(max_iterations=30, function_tolerance=1e-6)
        pycolmap.bundle_adjustment(reconstruction, options)
        found.append(reconstruction.camera(CAMERA_ID).params[0])
    scatter = float(np.std(np.log(found)))
    noisy = reconstruction_of(poses, points, camera_with(), noise_px=1.5)
    sigma = evidence_of(noisy).focal_sigma_ratio / INFLATION
    assert 0.5 * scatter < sigma < 2.0 * scatter
    assert scatter > 1e-5


@pytest.mark.parametrize(
    ("poses", "points", "least", "most"),
    [
        (orbit(), cloud(), 0.0, 0.005),
        (lawnmower(jitter_deg=8.0), plane(), 0.005, 0.05),
        (lawnmower(jitter_deg=1.0), plane(), 0.35, np.inf),
        (lawnmower(jitter_deg=0.0), plane(), 1.0, np.inf),
        (turn(), cloud() + (10.0, 0.0, 0.0), 0.01, np.inf),
    ],
    ids=["around a cloud", "tilting over a plane", "swaying", "straight down", "turning"],
)
def test_what_the_geometry_tells(
    poses: Float64Array, points: Float64Array, least: float, most: float
) -> None:
    sigma = evidence_of(reconstruction_of(poses, points, camera_with())).focal_sigma_ratio
    assert least < sigma <= most


@pytest.mark.parametrize("factor", [0.75, 1.3])
def test_it_asks_for_the_right_step_from_a_wrong_focal_length(factor: float) -> None:
    start = list(camera_with(factor * FOCAL_PX).params)
    wrong = reconstruction_of(orbit(), cloud(), camera_with(), start=start)
    step = float(evidence_of(wrong).step[0])
    assert np.sign(step) == -np.sign(np.log(factor))
    assert 0.5 * abs(np.log(factor)) < abs(step) < 2.0 * abs(np.log(factor))
    assert evidence_of(wrong).focal_sigma_ratio < 0.01  # errors that a step explains are no noise


@pytest.mark.parametrize("model", ["PINHOLE", "OPENCV", "OPENCV_FISHEYE", "EUCM", "SIMPLE_RADIAL"])
def test_any_model_is_measured(model: str) -> None:
    camera = camera_with(600.0, model=model) if model == "EUCM" else camera_with(model=model)
    reconstruction = reconstruction_of(orbit(), cloud(), camera)
    evidence = evidence_of(reconstruction)
    refined = refined_params(reconstruction.camera(CAMERA_ID))
    assert evidence.information.shape == (len(refined), len(refined))
    assert np.abs(evidence.step[0]) < 0.05
    assert 0.0 < evidence.focal_sigma_ratio < 0.5


@pytest.mark.parametrize("model", ["PINHOLE", "OPENCV", "OPENCV_FISHEYE", "SIMPLE_RADIAL"])
def test_parameters_there_and_back(model: str) -> None:
    camera = camera_with(model=model)
    np.testing.assert_allclose(params_of(camera, refined_params(camera)), camera.params)


def test_a_distortion_s_sigma_moves_the_corner_by_its_share() -> None:
    corner = float(np.hypot(WIDTH, HEIGHT)) / 2.0
    (sigma,) = distortion_sigmas(camera_with(), 0.1)
    assert sigma == pytest.approx(0.1 / (corner / FOCAL_PX) ** 2, rel=0.01)


def test_cameras_of_one_keyframe_each_are_measured_beside_the_others() -> None:
    shared = reconstruction_of(orbit(8), cloud(), camera_with())
    each = reconstruction_of(orbit(8), cloud(), camera_with(), cameras_each=True)
    alone = [measure_evidence(each, camera_id) for camera_id in each.cameras]
    sigmas = [one.focal_sigma_ratio for one in alone if one is not None]
    assert len(sigmas) == len(each.cameras) == 8
    assert evidence_of(shared).focal_sigma_ratio < min(sigmas)
    assert max(sigmas) < 0.1


def test_nothing_to_see_is_no_evidence() -> None:
    assert measure_evidence(reconstruction_of(orbit(1), cloud(), camera_with()), CAMERA_ID) is None
    few = reconstruction_of(orbit(2), cloud(5), camera_with())
    assert measure_evidence(few, CAMERA_ID) is None
