"""Calibration control: what observations tell is refined, the rest stays where it was known."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pycolmap
import pytest

from engine.estimators.camera_limits import lens_flaw
from engine.mapping.model.bundle_adjustment import adjust_globally
from engine.mapping.model.calibration_control import CalibrationControl, CalibrationState, Hold
from engine.mapping.model.camera_priors import CameraPrior
from engine.types import CalibrationOrigin, Float64Array
from tests.support.calibration_scenes import (
    CAMERA_ID,
    FOCAL_PX,
    camera_with,
    cloud,
    lawnmower,
    orbit,
    plane,
    reconstruction_of,
)

EXIF_SIGMA = 0.02


def begin(
    poses: Float64Array,
    points: Float64Array,
    *,
    focal_px: float,
    true_k: float = 0.0,
    noise_px: float = 0.3,
) -> pycolmap.Reconstruction:
    """A scene of a true focal length of 800 px whose camera begins with another, undistorted."""
    start = list(camera_with(focal_px).params)
    return reconstruction_of(poses, points, camera_with(k=true_k), start=start, noise_px=noise_px)


def control_of(reconstruction: pycolmap.Reconstruction, prior: CameraPrior) -> CalibrationControl:
    del reconstruction
    control = CalibrationControl()
    control.set_prior(CAMERA_ID, prior)
    return control


def adjust(
    reconstruction: pycolmap.Reconstruction, prior: CameraPrior, *, times: int = 2
) -> CalibrationState:
    control = control_of(reconstruction, prior)
    for _ in range(times):
        adjust_globally(reconstruction, calibration=control, max_iterations=40, num_threads=1)
    return control.states[CAMERA_ID]


def assumed(reconstruction: pycolmap.Reconstruction) -> CameraPrior:
    return CameraPrior.assumed(reconstruction.camera(CAMERA_ID))


def exif(reconstruction: pycolmap.Reconstruction) -> CameraPrior:
    return CameraPrior.of(
        reconstruction.camera(CAMERA_ID),
        origin=CalibrationOrigin.EXIF,
        focal_sigma_ratio=EXIF_SIGMA,
    )


def configured(reconstruction: pycolmap.Reconstruction) -> CameraPrior:
    return CameraPrior.of(
        reconstruction.camera(CAMERA_ID),
        origin=CalibrationOrigin.CONFIGURED,
        focal_sigma_ratio=0.01,
        max_change_ratio=0.02,
    )


def focal_px_of(reconstruction: pycolmap.Reconstruction) -> float:
    return float(reconstruction.camera(CAMERA_ID).params[0])


@pytest.mark.parametrize("focal_px", [0.7 * FOCAL_PX, 1.3 * FOCAL_PX])
def test_an_assumed_focal_length_far_off_is_found_where_the_scene_tells_it(
    focal_px: float,
) -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=focal_px)
    state = adjust(reconstruction, assumed(reconstruction))
    assert state.hold is None
    assert state.is_settled
    assert focal_px_of(reconstruction) == pytest.approx(FOCAL_PX, rel=0.01)
    assert focal_px_of(reconstruction) != FOCAL_PX  # noise was injected


@pytest.mark.parametrize("prior", [assumed, exif])
@pytest.mark.parametrize("focal_px", [0.85 * FOCAL_PX, 1.02 * FOCAL_PX])
def test_a_plane_seen_head_on_leaves_the_focal_length_where_it_was(
    focal_px: float, prior: Callable[[pycolmap.Reconstruction], CameraPrior]
) -> None:
    reconstruction = begin(lawnmower(), plane(), focal_px=focal_px)
    state = adjust(reconstruction, prior(reconstruction))
    assert state.hold is Hold.UNCERTAIN
    assert "of doubt about the focal length" in state.reason
    assert focal_px_of(reconstruction) == pytest.approx(focal_px, rel=1e-9)
    assert reconstruction.compute_mean_reprojection_error() < 0.5  # the plane fits all the same


def test_without_bounds_the_noise_decides_on_a_plane_seen_head_on() -> None:
    reconstruction = begin(lawnmower(jitter_deg=0.0), plane(), focal_px=0.85 * FOCAL_PX)
    control = CalibrationControl(is_bounded=False)
    control.set_prior(CAMERA_ID, exif(reconstruction))
    adjust_globally(reconstruction, calibration=control, max_iterations=40, num_threads=1)
    assert not control.states
    assert control.copy().flaw(reconstruction) == ""
    assert abs(focal_px_of(reconstruction) / (0.85 * FOCAL_PX) - 1.0) > EXIF_SIGMA


def test_distortion_is_found_where_the_focal_length_is_not() -> None:
    reconstruction = begin(lawnmower(), plane(), focal_px=FOCAL_PX, true_k=-0.08)
    state = adjust(reconstruction, exif(reconstruction))
    assert state.hold is Hold.UNCERTAIN
    assert not state.holds_distortion
    assert focal_px_of(reconstruction) == pytest.approx(FOCAL_PX, rel=1e-9)
    assert reconstruction.camera(CAMERA_ID).params[3] == pytest.approx(-0.08, abs=0.01)


def test_a_focal_length_of_exif_is_left_where_the_scene_is_surer() -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=0.9 * FOCAL_PX)
    state = adjust(reconstruction, exif(reconstruction))
    assert state.hold is None
    assert focal_px_of(reconstruction) == pytest.approx(FOCAL_PX, rel=0.01)


def test_what_exif_and_a_scene_that_hardly_tells_say_is_what_exif_says() -> None:
    reconstruction = begin(
        lawnmower(jitter_deg=3.0), plane(), focal_px=1.01 * FOCAL_PX, noise_px=1.0
    )
    adjust(reconstruction, exif(reconstruction))
    assert focal_px_of(reconstruction) == pytest.approx(1.01 * FOCAL_PX, rel=EXIF_SIGMA / 2)


def test_between_a_loose_prior_and_a_scene_that_hardly_tells_the_images_figure_is_said() -> None:
    reconstruction = begin(
        lawnmower(jitter_deg=3.0), plane(), focal_px=0.9 * FOCAL_PX, noise_px=1.0
    )
    prior = CameraPrior.of(
        reconstruction.camera(CAMERA_ID), origin=CalibrationOrigin.EXIF, focal_sigma_ratio=0.1
    )
    state = adjust(reconstruction, prior)
    assert state.hold is Hold.UNCERTAIN
    found = re.fullmatch(r"the images alone say (\d+) px, give or take \d+%", state.reason)
    assert found is not None
    assert 0.9 * FOCAL_PX < focal_px_of(reconstruction) < float(found[1])


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_given_focal_length_stays_within_its_bounds(factor: float) -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=factor * FOCAL_PX)
    prior = configured(reconstruction)
    state = adjust(reconstruction, prior)
    assert state.hold in (Hold.BOUND, Hold.LENS)
    change = focal_px_of(reconstruction) / (factor * FOCAL_PX) - 1.0
    assert change == pytest.approx(0.02 * np.sign(1.0 - factor), abs=1e-6)
    assert lens_flaw(reconstruction.camera(CAMERA_ID)) == ""


def test_a_given_focal_length_that_is_right_is_refined_and_its_distortion_found() -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=0.99 * FOCAL_PX, true_k=-0.05)
    state = adjust(reconstruction, configured(reconstruction))
    assert state.hold is None
    assert focal_px_of(reconstruction) == pytest.approx(FOCAL_PX, rel=2e-3)
    assert reconstruction.camera(CAMERA_ID).params[3] == pytest.approx(-0.05, abs=0.01)


def test_a_constant_calibration_stays_exactly() -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=0.97 * FOCAL_PX)
    prior = CameraPrior.assumed(reconstruction.camera(CAMERA_ID), is_constant=True)
    control = control_of(reconstruction, prior)
    adjust_globally(reconstruction, calibration=control, max_iterations=20, num_threads=1)
    assert focal_px_of(reconstruction) == 0.97 * FOCAL_PX
    assert control.states == {}


class RunawaySolve:
    """An adjustment that bends free cameras as far as asked, and counts its calls."""

    def __init__(
        self, reconstruction: pycolmap.Reconstruction, *params: float, moves_points: float = 5.0
    ) -> None:
        self._reconstruction = reconstruction
        self._params = params
        self._moves_points = moves_points
        self.calls: list[tuple[frozenset[int], bool]] = []

    def __call__(self, constant_camera_ids: frozenset[int], *, refine_focal_length: bool) -> None:
        self.calls.append((constant_camera_ids, refine_focal_length))
        if CAMERA_ID in constant_camera_ids:
            return
        camera = self._reconstruction.camera(CAMERA_ID)
        focal_px = self._params[0] if refine_focal_length else camera.params[0]
        camera.params = [focal_px, *self._params[1:]]
        for point in self._reconstruction.points3D.values():
            point.xyz = point.xyz + self._moves_points


@pytest.mark.parametrize(
    ("params", "hold"),
    [
        ((2325.0, 500.0, 375.0, 14.3), Hold.LENS),
        ((9000.0, 500.0, 375.0, -19.7), Hold.LENS),
        ((50_000.0, 500.0, 375.0, 0.0), Hold.BOUND),
        ((60.0, 500.0, 375.0, 0.0), Hold.BOUND),
        ((float("nan"), 500.0, 375.0, 0.0), Hold.LENS),
    ],
)
def test_a_calibration_that_ran_away_is_taken_back_with_its_map(
    params: tuple[float, ...], hold: Hold
) -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=FOCAL_PX)
    before = {i: point.xyz.copy() for i, point in reconstruction.points3D.items()}
    control = control_of(reconstruction, assumed(reconstruction))
    solve = RunawaySolve(reconstruction, *params)
    control.adjust(reconstruction, solve)
    camera = reconstruction.camera(CAMERA_ID)
    assert control.states[CAMERA_ID].hold is hold
    assert control.states[CAMERA_ID].reason
    assert lens_flaw(camera) == ""
    if hold is Hold.LENS and params[3] > 0.0:
        assert list(camera.params) == [FOCAL_PX, 500.0, 375.0, 0.0]
        assert all(np.array_equal(before[i], p.xyz) for i, p in reconstruction.points3D.items())
    calls = len(solve.calls)
    control.adjust(reconstruction, solve)  # held now: nothing is tried again so soon
    assert len(solve.calls) == calls + 1
    assert lens_flaw(reconstruction.camera(CAMERA_ID)) == ""


def test_a_barrel_beyond_the_model_keeps_what_a_lens_can_have() -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=FOCAL_PX)
    control = control_of(reconstruction, assumed(reconstruction))
    control.adjust(reconstruction, RunawaySolve(reconstruction, 780.0, 500.0, 375.0, -0.9))
    assert control.states[CAMERA_ID].hold is Hold.LENS
    assert -0.9 < reconstruction.camera(CAMERA_ID).params[3] < -0.1


def test_a_usual_map_is_solved_once_and_measured_no_more_when_it_is_sure() -> None:
    reconstruction = begin(orbit(), cloud(), focal_px=FOCAL_PX)
    control = control_of(reconstruction, assumed(reconstruction))
    solve = RunawaySolve(reconstruction, FOCAL_PX, 500.0, 375.0, 0.0, moves_points=0.0)
    control.adjust(reconstruction, solve)
    assert solve.calls == [(frozenset(), True)]
    assert control.states[CAMERA_ID].is_settled


def test_a_camera_is_measured_by_the_keyframes_that_are_its_own() -> None:
    poses, camera = orbit(), camera_with(FOCAL_PX)
    reconstruction = reconstruction_of(poses, cloud(), camera, cameras_each=True)
    control = CalibrationControl()
    for camera_id in range(CAMERA_ID, CAMERA_ID + len(poses)):
        control.set_prior(camera_id, CameraPrior.assumed(reconstruction.camera(camera_id)))
    adjust_globally(reconstruction, calibration=control, max_iterations=2, num_threads=1)
    assert [state.num_keyframes for state in control.states.values()] == [1] * len(poses)
    assert not any(state.is_settled for state in control.states.values())
    assert control.states[CAMERA_ID].is_due(2)


def test_copies_are_independent_and_give_back_what_they_found() -> None:
    reconstruction = begin(lawnmower(), plane(), focal_px=FOCAL_PX)
    control = control_of(reconstruction, assumed(reconstruction))
    twin = control.copy()
    adjust_globally(reconstruction, calibration=twin, max_iterations=5, num_threads=1)
    assert control.states == {}
    control.take_states(twin)
    assert control.states == twin.states
    assert control.held_camera_ids == {CAMERA_ID}
    control.set_prior(CAMERA_ID, exif(reconstruction))
    assert control.states == {}
    control.take_states(twin)  # found out with another prior
    assert control.states == {}
