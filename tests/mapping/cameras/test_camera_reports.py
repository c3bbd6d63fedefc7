"""Camera reports: calibrations that changed and cameras to doubt, each once for each reason."""

from __future__ import annotations

import json
import math

import pytest

from engine.config import CamerasConfig, Config
from engine.events import CameraCalibrated, CameraDoubted, Event
from engine.mapping.cameras.camera_reports import CameraReports
from engine.mapping.cameras.cameras import CameraCalibration
from engine.mapping.model.calibration_control import CalibrationState, Hold
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.growth import GrowthConfig, adjust_in_place
from engine.mapping.model.sparse_map import SparseMap
from engine.types import CalibrationOrigin, IntrinsicsPrior
from tests.support.synthetic import (
    EXACT_CAMERA,
    FOCAL_PX,
    SyntheticCamera,
    SyntheticWorld,
    grown_map,
    straight_path,
)

GROWTH = GrowthConfig(
    min_inlier_ratio=0.25,
    local_bundle_adjustment=Config().local_bundle_adjustment,
    global_bundle_adjustment=Config().global_bundle_adjustment,
    num_threads=1,
)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(12), noise_px=0.3)


class Emitted:
    """What reports emitted."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reports = CameraReports(emit=self._emit)

    def _emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def focal_px(self) -> list[tuple[float, bool]]:
        return [(e.focal_px, e.is_refined) for e in self.events if isinstance(e, CameraCalibrated)]

    @property
    def doubts(self) -> list[CameraDoubted]:
        return [event for event in self.events if isinstance(event, CameraDoubted)]


def calibration_and_events() -> tuple[CameraCalibration, list[Event]]:
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)

    return CameraCalibration(CamerasConfig(), emit=emit), events


def map_of(world: SyntheticWorld, *, focal_px: float, sigma: float = 0.02) -> SparseMap:
    """A map of twelve keyframes, made with the true camera, that EXIF says another of."""
    sparse_map = grown_map(world, is_constant=False)
    sparse_map.set_camera_params("camera", (focal_px, *EXACT_CAMERA[1:]))
    prior = CameraPrior.of(
        sparse_map.camera("camera"), origin=CalibrationOrigin.EXIF, focal_sigma_ratio=sigma
    )
    sparse_map.set_camera_prior("camera", prior)
    return sparse_map


def test_a_focal_length_is_reported_again_when_the_map_moved_it(world: SyntheticWorld) -> None:
    emitted, sparse_map = Emitted(), map_of(world, focal_px=1.06 * FOCAL_PX, sigma=0.05)
    prior = sparse_map.camera_prior("camera")
    emitted.reports.add("camera", sparse_map.camera("camera"), prior)
    emitted.reports.update(["camera"], sparse_map)
    assert emitted.focal_px == [(1.06 * FOCAL_PX, False)]
    adjust_in_place(sparse_map, config=GROWTH)
    for _ in range(2):
        emitted.reports.update(["camera"], sparse_map)
    assert [is_refined for _, is_refined in emitted.focal_px] == [False, True]
    assert emitted.focal_px[1][0] == pytest.approx(FOCAL_PX, rel=0.01)
    assert emitted.doubts == []


def test_a_map_that_contradicts_exif_says_both_figures_once(world: SyntheticWorld) -> None:
    emitted, sparse_map = Emitted(), map_of(world, focal_px=1.2 * FOCAL_PX)
    adjust_in_place(sparse_map, config=GROWTH)
    for _ in range(2):
        emitted.reports.update(["camera"], sparse_map)
    (doubt,) = emitted.doubts
    assert "960 px is that by EXIF" in doubt.reason
    assert any(f"{focal_px} px, and" in doubt.reason for focal_px in range(790, 811))
    assert not doubt.is_held


def test_figures_of_a_camera_that_moved(world: SyntheticWorld) -> None:
    emitted, sparse_map = Emitted(), map_of(world, focal_px=1.06 * FOCAL_PX, sigma=0.05)
    adjust_in_place(sparse_map, config=GROWTH)
    (figures,) = emitted.reports.figures(["camera"], sparse_map)
    assert figures.num_registered == 12
    assert figures.model == "SIMPLE_RADIAL"
    assert figures.params[0] == figures.focal_px == pytest.approx(FOCAL_PX, rel=0.01)
    assert figures.focal_ratio == figures.focal_px / 1000.0
    assert figures.moved_ratio == pytest.approx(1.0 / 1.06 - 1.0, abs=0.01)
    assert figures.fov_deg == pytest.approx(2 * math.degrees(math.atan(500.0 / 800.0)), abs=1.0)
    assert figures.origin is CalibrationOrigin.EXIF
    assert figures.observed_sigma_ratio is not None
    assert 0.0 < figures.observed_sigma_ratio < 0.05
    assert not figures.is_held
    record = figures.as_record()
    assert json.loads(json.dumps(record)) == record
    assert record["key"] == "camera"
    assert record["origin"] == "exif"
    assert record["doubts"] == []


def test_a_held_camera_is_doubted_with_the_bound(world: SyntheticWorld) -> None:
    emitted, sparse_map = Emitted(), map_of(world, focal_px=1.2 * FOCAL_PX)
    prior = CameraPrior.of(
        sparse_map.camera("camera"),
        origin=CalibrationOrigin.CONFIGURED,
        focal_sigma_ratio=0.01,
        max_change_ratio=0.02,
    )
    sparse_map.set_camera_prior("camera", prior)
    adjust_in_place(sparse_map, config=GROWTH)
    emitted.reports.update(["camera"], sparse_map)
    (figures,) = emitted.reports.figures(["camera"], sparse_map)
    state = sparse_map.camera_state("camera")
    assert state is not None
    assert state.hold in (Hold.BOUND, Hold.LENS)
    assert figures.is_held
    assert figures.doubts[0] == emitted.doubts[0].reason
    assert "the map holds the focal length at 9" in figures.doubts[0]
    assert emitted.doubts[0].is_held
    assert figures.focal_px == pytest.approx(1.2 * 0.98 * FOCAL_PX)


def test_a_held_focal_length_is_said_as_the_map_has_it_beside_the_others(
    world: SyntheticWorld,
) -> None:
    emitted, sparse_map = Emitted(), map_of(world, focal_px=449.0)
    sparse_map.set_camera_params("camera", (480.0, *EXACT_CAMERA[1:]))
    sparse_map.calibration.set_state(
        sparse_map.camera("camera").camera_id,
        CalibrationState(
            num_keyframes=12,
            focal_sigma_ratio=0.22,
            hold=Hold.UNCERTAIN,
            holds_distortion=True,
            reason="the images alone say 527 px, give or take 22%",
        ),
    )
    emitted.reports.update(["camera"], sparse_map)
    assert emitted.doubts[0].reason == (
        "the map holds the focal length at 480 px (449 px by EXIF): the images alone say 527 px,"
        " give or take 22%"
    )


def test_a_given_calibration_that_no_lens_has_is_doubted(world: SyntheticWorld) -> None:
    sparse_map = grown_map(world)
    sparse_map.set_camera_params("camera", (FOCAL_PX, 500.0, 375.0, -0.9))
    emitted = Emitted()
    emitted.reports.update(["camera"], sparse_map)
    (doubt,) = emitted.doubts
    assert "folds" in doubt.reason
    assert not doubt.is_held


@pytest.mark.parametrize("focal_px", [1e9, -5.0, float("nan"), float("inf"), 12.0])
def test_what_no_lens_has_is_not_begun_with_and_said(focal_px: float) -> None:
    prior = IntrinsicsPrior(focal_px=focal_px)
    camera = SyntheticCamera(prior=prior)
    world = SyntheticWorld(straight_path(2), cameras=[camera])
    calibration, events = calibration_and_events()
    sparse_map = SparseMap(
        triangulation=Config().triangulation, registration=Config().registration, seed=0
    )
    calibration.add(world.keyframe(1), sparse_map)
    calibrated, doubted = events
    assert isinstance(calibrated, CameraCalibrated)
    assert calibrated.how == "assumed"
    assert calibrated.focal_px == 850.0
    assert isinstance(doubted, CameraDoubted)
    assert "ignored" in doubted.reason
    (figures,) = calibration.figures(sparse_map)
    assert figures.doubts == (doubted.reason,)


def test_a_doubt_about_a_camera_of_few_keyframes_is_said_at_the_end() -> None:
    sparse_map = grown_map(SyntheticWorld(straight_path(5)))
    sparse_map.set_camera_params("camera", (FOCAL_PX, 500.0, 375.0, -0.9))
    emitted = Emitted()
    emitted.reports.update(["camera"], sparse_map)
    assert emitted.doubts == []
    emitted.reports.update(["camera"], sparse_map, is_final=True)
    (doubt,) = emitted.doubts
    assert "folds" in doubt.reason


@pytest.mark.parametrize(
    ("model", "params", "words"),
    [
        ("SIMPLE_RADIAL", (800.0, 500.0, 375.0, -0.9), "no lens has the calibration"),
        ("SIMPLE_PINHOLE", (1e9, 500.0, 375.0), "no lens has the calibration"),
        ("EQUIRECTANGULAR", (1000.0, 750.0), "twice as wide as it is high"),
        ("SIMPLE_RADIAL", (800.0, 500.0, 375.0, 0.05), ""),
    ],
)
def test_a_given_calibration_that_cannot_be_is_doubted_at_once(
    model: str, params: tuple[float, ...], words: str
) -> None:
    prior = IntrinsicsPrior(
        focal_px=params[0], camera_model=model, params=params, origin=CalibrationOrigin.FILE
    )
    world = SyntheticWorld(straight_path(2), cameras=[SyntheticCamera(prior=prior)])
    calibration, events = calibration_and_events()
    sparse_map = SparseMap(
        triangulation=Config().triangulation, registration=Config().registration, seed=0
    )
    calibration.add(world.keyframe(1), sparse_map)
    reasons = [event.reason for event in events if isinstance(event, CameraDoubted)]
    assert len(reasons) == bool(words)
    assert all(words in reason for reason in reasons)


def test_the_doubt_of_a_source_is_passed_on() -> None:
    prior = IntrinsicsPrior(focal_px=700.0, focal_sigma_ratio=0.5, doubt="two tags differ")
    world = SyntheticWorld(straight_path(2), cameras=[SyntheticCamera(prior=prior)])
    calibration, events = calibration_and_events()
    sparse_map = SparseMap(
        triangulation=Config().triangulation, registration=Config().registration, seed=0
    )
    calibration.add(world.keyframe(1), sparse_map)
    assert [e.reason for e in events if isinstance(e, CameraDoubted)] == ["two tags differ"]
    assert sparse_map.camera_prior("camera").focal_sigma_ratio == 0.5
