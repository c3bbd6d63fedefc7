"""Adjustments in slices: as good as in one call, with no more iterations than are allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.estimators import adjustment_options as module
from engine.estimators.adjustment_options import adjust_in_slices, adjustment_options


class CountedAdjuster:
    """Counts the iterations of each call."""

    def __init__(self, adjuster: Any, num_iterations: list[int]) -> None:
        self._adjuster = adjuster
        self._num_iterations = num_iterations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adjuster, name)

    def solve(self) -> Any:
        summary = self._adjuster.solve()
        ceres = summary.ceres_summary
        # The first "successful step" is the evaluation before any.
        self._num_iterations.append(ceres.num_successful_steps + ceres.num_unsuccessful_steps - 1)
        return summary


@pytest.fixture
def num_iterations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call of the solver."""
    counted: list[int] = []
    create = pycolmap.create_default_bundle_adjuster
    monkeypatch.setattr(
        pycolmap,
        "create_default_bundle_adjuster",
        lambda *given: CountedAdjuster(create(*given), counted),
    )
    return counted


def noisy_model() -> pycolmap.Reconstruction:
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_frames_per_rig, options.num_points3D = 1, 8, 100
    reconstruction = pycolmap.synthesize_dataset(options)
    noise = pycolmap.SyntheticNoiseOptions()
    noise.point3D_stddev, noise.point2D_stddev = 0.2, 0.5
    pycolmap.synthesize_noise(noise, reconstruction)
    return reconstruction


def adjusted(*, max_iterations: int, function_tolerance: float) -> pycolmap.Reconstruction:
    reconstruction = noisy_model()
    problem = pycolmap.BundleAdjustmentConfig()
    for image_id in reconstruction.reg_image_ids():
        problem.add_image(image_id)
    problem.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    options = adjustment_options(
        max_iterations=max_iterations, function_tolerance=function_tolerance
    )
    adjust_in_slices(options, problem, reconstruction)
    reconstruction.update_point_3d_errors()
    return reconstruction


def slices_of(patch: pytest.MonkeyPatch, num_steps: int) -> None:
    patch.setattr(module, "_RESIDUALS_OF_SLICE", 1)
    patch.setattr(module, "_LEAST_STEPS", num_steps)


def test_slices_end_where_one_call_ends(
    monkeypatch: pytest.MonkeyPatch, num_iterations: list[int]
) -> None:
    whole = adjusted(max_iterations=100, function_tolerance=1e-9)
    assert len(num_iterations) == 1
    slices_of(monkeypatch, 3)
    sliced = adjusted(max_iterations=100, function_tolerance=1e-9)
    assert len(num_iterations) > 2
    for image_id in whole.reg_image_ids():
        np.testing.assert_allclose(
            sliced.image(image_id).cam_from_world().matrix(),
            whole.image(image_id).cam_from_world().matrix(),
            atol=1e-3,
        )
    whole_error = whole.compute_mean_reprojection_error()
    assert sliced.compute_mean_reprojection_error() == pytest.approx(whole_error, rel=1e-3)


@pytest.mark.parametrize(("allowed", "slices"), [(8, [3, 3, 2]), (6, [3, 3]), (2, [2])])
def test_slices_have_no_more_iterations_than_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
    num_iterations: list[int],
    allowed: int,
    slices: list[int],
) -> None:
    slices_of(monkeypatch, 3)
    adjusted(max_iterations=allowed, function_tolerance=0.0)
    assert num_iterations == slices
