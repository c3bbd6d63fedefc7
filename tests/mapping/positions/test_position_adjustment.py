"""Bundle adjustment with GPS positions: what it gains, leaves alone and refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pycolmap
import pytest

from engine.config import GeoreferenceConfig
from engine.geo.georeference import Georeference, estimate_georeference, positions_in_enu
from engine.geometry import camera_center, transform_points
from engine.mapping.model.bundle_adjustment import adjust_globally, solve_globally
from engine.mapping.model.calibration_control import CalibrationControl, Hold
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions import position_adjustment
from engine.mapping.positions.position_adjustment import PositionAdjustment, adjust_with_positions
from engine.types import CalibrationOrigin, Float64Array, FrameId, GpsFix
from tests.support.calibration_scenes import (
    FOCAL_PX,
    camera_with,
    lawnmower,
    plane,
    reconstruction_of,
)
from tests.support.synthetic import (
    PoseErrors,
    SyntheticWorld,
    grown_map,
    pose_errors,
    round_path,
)

NUM_FRAMES = 20
METRES_PER_UNIT = 10.0  # of the world; its map has the same unit
CONFIG = GeoreferenceConfig()
CAMERA_ID = 1


@dataclass(frozen=True, kw_only=True)
class Adjusted:
    """A copy of the map after its adjustment."""

    copy: pycolmap.Reconstruction
    georeference: Georeference
    outcome: PositionAdjustment

    def poses(self) -> dict[FrameId, Float64Array]:
        return {
            FrameId(i): np.asarray(self.copy.image(i).cam_from_world().matrix())
            for i in self.copy.reg_image_ids()
        }


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM_FRAMES, radius=16.0, turns=0.5), noise_px=0.6)


@pytest.fixture(scope="module")
def sparse_map(world: SyntheticWorld) -> SparseMap:
    grown = grown_map(world)
    solve_globally(
        grown.reconstruction, constant_camera_ids=[CAMERA_ID], max_iterations=50, num_threads=1
    )
    return grown


def true_fixes(world: SyntheticWorld, *, accuracy_m: float | None = None) -> list[GpsFix]:
    fixes = [world.gps(i, metres_per_unit=METRES_PER_UNIT) for i in world.frame_ids]
    return [replace(fix, accuracy_m=accuracy_m) for fix in fixes]


def moved(fixes: list[GpsFix], offsets_m: Float64Array) -> list[GpsFix]:
    """Fixes moved by offsets (N, 3) east, north, up; the world lies at 0, 0."""
    return [
        replace(
            fix,
            latitude_deg=fix.latitude_deg + north_m / 110_574.0,
            longitude_deg=fix.longitude_deg + east_m / 111_319.0,
            altitude_m=fix.altitude_m + up_m,
        )
        for fix, (east_m, north_m, up_m) in zip(fixes, offsets_m.tolist(), strict=True)
    ]


def poses_in(sparse_map: SparseMap) -> Float64Array:
    return np.array([sparse_map.cam_from_world(i) for i in sparse_map.registered_ids])


def calibration_of(
    reconstruction: pycolmap.Reconstruction, *, is_constant: bool
) -> CalibrationControl:
    calibration = CalibrationControl()
    for camera_id, camera in reconstruction.cameras.items():
        calibration.set_prior(camera_id, CameraPrior.assumed(camera, is_constant=is_constant))
    return calibration


def adjust(
    sparse_map: SparseMap,
    fixes: list[GpsFix],
    *,
    is_constant: bool = True,
    georeference: Georeference | None = None,
) -> Adjusted:
    if georeference is None:
        estimated = estimate_georeference(poses_in(sparse_map), fixes, config=CONFIG)
        assert isinstance(estimated, Georeference), estimated
        georeference = estimated
    copy = sparse_map.copy_reconstruction()
    outcome = adjust_with_positions(
        copy,
        sparse_map.registered_ids,
        fixes,
        georeference,
        config=CONFIG,
        calibration=calibration_of(copy, is_constant=is_constant),
        max_iterations=30,
    )
    return Adjusted(copy=copy, georeference=georeference, outcome=outcome)


def errors_before(sparse_map: SparseMap, world: SyntheticWorld) -> PoseErrors:
    return pose_errors({i: sparse_map.cam_from_world(i) for i in sparse_map.registered_ids}, world)


def test_accurate_positions_take_the_bend_out_of_a_map(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    before = errors_before(sparse_map, world)
    assert before.rmse_ratio > 2e-4
    adjusted = adjust(sparse_map, true_fixes(world, accuracy_m=0.05))
    outcome = adjusted.outcome
    assert (outcome.is_accepted, outcome.reason) == (True, "")
    assert outcome.num_positions == NUM_FRAMES
    after = pose_errors(adjusted.poses(), world)
    assert after.rmse_ratio < 0.5 * before.rmse_ratio
    assert outcome.rmse_after_m < 0.5 * outcome.rmse_before_m
    assert outcome.error_after_px < 1.02 * outcome.error_before_px


def test_the_adjusted_map_stays_where_the_georeference_has_it(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    fixes = true_fixes(world, accuracy_m=0.05)
    adjusted = adjust(sparse_map, fixes)
    georeference = adjusted.georeference
    poses = adjusted.poses()
    centers = camera_center(np.array([poses[i] for i in sparse_map.registered_ids]))
    offsets_m = transform_points(georeference.enu_from_map, centers) - positions_in_enu(
        fixes, origin=georeference.origin
    )
    rmse_m = float(np.sqrt((offsets_m**2).sum(axis=1).mean()))
    assert rmse_m == pytest.approx(adjusted.outcome.rmse_after_m, rel=0.5)
    assert rmse_m < 0.2
    extent = np.ptp(camera_center(poses_in(sparse_map)), axis=0).max()
    assert np.abs(centers - camera_center(poses_in(sparse_map))).max() < 0.02 * extent


def test_noisy_positions_do_not_shake_the_map(sparse_map: SparseMap, world: SyntheticWorld) -> None:
    noise_m = np.random.default_rng(1).normal(scale=(2.0, 2.0, 4.0), size=(NUM_FRAMES, 3))
    before = errors_before(sparse_map, world)
    adjusted = adjust(sparse_map, moved(true_fixes(world), noise_m))
    after = pose_errors(adjusted.poses(), world)
    assert adjusted.outcome.rmse_before_m > 2.0
    assert after.rmse_ratio < 1.5 * before.rmse_ratio
    assert adjusted.outcome.rmse_after_m > 0.8 * adjusted.outcome.rmse_before_m
    assert adjusted.outcome.error_after_px < 1.02 * adjusted.outcome.error_before_px


def test_positions_that_were_found_wrong_do_not_pull(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    right = true_fixes(world)
    offsets_m = np.zeros((NUM_FRAMES, 3))
    offsets_m[[2, 7, 11, 13, 18], 1] = 80.0
    with_wrong = adjust(sparse_map, moved(right, offsets_m))
    assert with_wrong.outcome.num_positions == NUM_FRAMES - 5
    assert with_wrong.outcome.rmse_after_m < 2.0
    after = pose_errors(with_wrong.poses(), world)
    without = pose_errors(adjust(sparse_map, right).poses(), world)
    assert after.rmse_ratio == pytest.approx(without.rmse_ratio, abs=2e-4)


def test_a_receiver_that_promises_too_much_does_not_bend_the_map(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    offsets_m = np.zeros((NUM_FRAMES, 3))
    offsets_m[:, 2] = 4.0 * np.cos(0.63 * np.arange(NUM_FRAMES))
    before = errors_before(sparse_map, world)
    adjusted = adjust(sparse_map, moved(true_fixes(world, accuracy_m=0.02), offsets_m))
    assert adjusted.outcome.rmse_before_m > 2.0
    assert pose_errors(adjusted.poses(), world).rmse_ratio < 1.5 * before.rmse_ratio
    assert adjusted.outcome.error_after_px < 1.01 * adjusted.outcome.error_before_px


def test_an_adjustment_that_makes_images_fit_worse_is_refused(
    sparse_map: SparseMap, world: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(position_adjustment, "_MAX_ERROR_GROWTH_RATIO", 1e-4)
    outcome = adjust(sparse_map, true_fixes(world, accuracy_m=0.05)).outcome
    assert outcome.error_after_px > 1.001 * outcome.error_before_px
    assert not outcome.is_accepted
    assert outcome.reason.startswith("the images would fit worse")


def test_an_adjustment_that_brings_cameras_no_nearer_is_refused(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    offsets_m = np.zeros((NUM_FRAMES, 3))
    offsets_m[:, 2] = 4.0 * (-1.0) ** np.arange(NUM_FRAMES)
    outcome = adjust(sparse_map, moved(true_fixes(world, accuracy_m=0.02), offsets_m)).outcome
    assert outcome.rmse_after_m >= outcome.rmse_before_m
    assert (outcome.is_accepted, outcome.reason) == (False, "the positions would fit no better")


def test_a_calibration_that_must_not_change_does_not(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    fixes = true_fixes(world, accuracy_m=0.05)
    params = sparse_map.reconstruction.camera(CAMERA_ID).params.copy()
    held = adjust(sparse_map, fixes, is_constant=True)
    np.testing.assert_array_equal(held.copy.camera(CAMERA_ID).params, params)
    free = adjust(sparse_map, fixes, is_constant=False)
    assert np.abs(free.copy.camera(CAMERA_ID).params - params).max() > 1e-3
    assert free.copy.camera(CAMERA_ID).params[0] == pytest.approx(params[0], rel=0.01)


def test_cameras_without_a_position_are_adjusted_with_the_others(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    fixes, kept = true_fixes(world, accuracy_m=0.05), [0, 3, 6, 9, 11, 13, 16, 19]
    poses = poses_in(sparse_map)[kept]
    some = [fixes[i] for i in kept]
    georeference = estimate_georeference(poses, some, config=CONFIG)
    assert isinstance(georeference, Georeference)
    copy = sparse_map.copy_reconstruction()
    outcome = adjust_with_positions(
        copy,
        [sparse_map.registered_ids[i] for i in kept],
        some,
        georeference,
        config=CONFIG,
        calibration=calibration_of(copy, is_constant=True),
        max_iterations=30,
    )
    assert outcome.is_accepted
    assert outcome.num_positions == len(kept)
    adjusted = Adjusted(copy=copy, georeference=georeference, outcome=outcome)
    before = errors_before(sparse_map, world)
    assert pose_errors(adjusted.poses(), world).rmse_ratio < 0.7 * before.rmse_ratio


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": np.zeros(NUM_FRAMES)}, "only 0 positions count"),
        ({"is_levelled_by_cameras": True}, "the path is straight"),
    ],
)
def test_what_positions_cannot_decide_is_left_as_it_is(
    sparse_map: SparseMap, world: SyntheticWorld, change: dict[str, object], reason: str
) -> None:
    fixes = true_fixes(world)
    georeference = adjust(sparse_map, fixes).georeference
    left = adjust(sparse_map, fixes, georeference=replace(georeference, **change))  # type: ignore[arg-type]
    assert (left.outcome.is_accepted, left.outcome.reason) == (False, reason)
    for frame_id, pose in left.poses().items():
        np.testing.assert_allclose(pose, sparse_map.cam_from_world(frame_id), atol=1e-9)


def test_the_same_map_and_positions_give_the_same_adjustment(
    sparse_map: SparseMap, world: SyntheticWorld
) -> None:
    fixes = true_fixes(world, accuracy_m=0.05)
    one, other = adjust(sparse_map, fixes), adjust(sparse_map, fixes)
    assert one.outcome == other.outcome
    for frame_id, pose in one.poses().items():
        np.testing.assert_array_equal(pose, other.poses()[frame_id])


def held_flight() -> tuple[pycolmap.Reconstruction, CalibrationControl]:
    """A flight over a plane whose focal length, wrong by a tenth, the images do not tell."""
    start = list(camera_with(0.9 * FOCAL_PX).params)
    flight = reconstruction_of(lawnmower(), plane(), camera_with(), start=start, noise_px=0.3)
    control = CalibrationControl()
    prior = CameraPrior.of(
        flight.camera(CAMERA_ID), origin=CalibrationOrigin.EXIF, focal_sigma_ratio=0.02
    )
    control.set_prior(CAMERA_ID, prior)
    adjust_globally(flight, calibration=control, max_iterations=40, num_threads=1)
    assert control.states[CAMERA_ID].hold is Hold.UNCERTAIN
    return flight, control


def over_plane(*, noise_m: float, seed: int = 0) -> list[GpsFix]:
    """Where the camera of that flight was, and how far from there the receiver says it was."""
    centers_m = METRES_PER_UNIT * camera_center(lawnmower())
    centers_m += np.random.default_rng(seed).normal(scale=noise_m, size=centers_m.shape)
    origin = GpsFix(latitude_deg=0.0, longitude_deg=0.0, altitude_m=0.0, accuracy_m=noise_m)
    return moved([origin] * len(centers_m), centers_m)


def adjust_flight(
    flight: pycolmap.Reconstruction, control: CalibrationControl, fixes: list[GpsFix]
) -> PositionAdjustment:
    frame_ids = sorted(FrameId(int(i)) for i in flight.reg_image_ids())
    poses = np.array([flight.image(i).cam_from_world().matrix() for i in frame_ids])
    georeference = estimate_georeference(poses, fixes, config=CONFIG)
    assert isinstance(georeference, Georeference), georeference
    return adjust_with_positions(
        flight,
        frame_ids,
        fixes,
        georeference,
        config=CONFIG,
        calibration=control,
        max_iterations=50,
    )


def test_positions_tell_a_focal_length_that_images_do_not() -> None:
    flight, control = held_flight()
    fixes = over_plane(noise_m=0.1)
    outcome = adjust_flight(flight, control, fixes)
    assert outcome.is_accepted
    assert outcome.told_camera_ids == {CAMERA_ID}
    assert not adjust_flight(flight, control, fixes).told_camera_ids  # it is free by now
    assert flight.camera(CAMERA_ID).params[0] == pytest.approx(FOCAL_PX, rel=0.02)
    assert flight.camera(CAMERA_ID).params[0] != FOCAL_PX  # noise was injected
    state = control.states[CAMERA_ID]
    assert state.hold is None
    assert 0.001 < state.focal_sigma_ratio < 0.05


@pytest.mark.parametrize("seed", range(2))
def test_noisy_positions_leave_a_focal_length_held(seed: int) -> None:
    flight, control = held_flight()
    before_px = float(flight.camera(CAMERA_ID).params[0])
    outcome = adjust_flight(flight, control, over_plane(noise_m=3.0, seed=seed))
    assert not outcome.told_camera_ids
    assert control.states[CAMERA_ID].hold is Hold.UNCERTAIN
    assert flight.camera(CAMERA_ID).params[0] == before_px


def test_positions_without_heights_leave_a_focal_length_held() -> None:
    flight, control = held_flight()
    before_px = float(flight.camera(CAMERA_ID).params[0])
    fixes = [replace(fix, altitude_m=None) for fix in over_plane(noise_m=0.1)]
    outcome = adjust_flight(flight, control, fixes)
    assert not outcome.told_camera_ids
    assert control.states[CAMERA_ID].hold is Hold.UNCERTAIN
    assert flight.camera(CAMERA_ID).params[0] == before_px


def test_a_few_heights_leave_a_focal_length_held() -> None:
    """With the freedom of place and of one camera gone they may fit better by chance."""
    num_heights = {10: False, 20: True}
    for num, is_told in num_heights.items():
        flight, control = held_flight()
        fixes = [
            fix if number < num else replace(fix, altitude_m=None)
            for number, fix in enumerate(over_plane(noise_m=0.1))
        ]
        assert bool(adjust_flight(flight, control, fixes).told_camera_ids) is is_told
