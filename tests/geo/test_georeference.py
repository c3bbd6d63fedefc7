"""Georeferences from GPS fixes that are exact, noisy, partly wrong, or do not determine one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.config import GeoreferenceConfig
from engine.geo.georeference import (
    Georeference,
    GeoreferenceRefused,
    RefusalReason,
    better_order,
    estimate_georeference,
    gps_rmse_m,
    median_fix,
    positions_in_enu,
    stds_m,
    swapped,
    to_enu,
)
from engine.geo.similarity_fit import UNKNOWN_STD_M
from engine.geometry import (
    camera_center,
    pose_in_other_world,
    rotation_from_vector,
    transform_points,
)
from engine.types import Float64Array, GpsFix
from tests.support.synthetic import SyntheticWorld, grown_map, straight_path

ORIGIN = (47.0, 8.0, 500.0)
ORIGIN_FIX = GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=500.0)
CONFIG = GeoreferenceConfig()
UNIT_M = 1.0 / 0.03  # of the maps below
TURN = rotation_from_vector(np.array([0.4, -1.2, 2.0]))
MAP_FROM_ENU = np.column_stack([0.03 * TURN, (1.0, -4.0, 2.0)])
DOWN = np.diag([1.0, -1.0, -1.0])  # a camera from the world: x east, y south, z down


def flight_m(num: int) -> Float64Array:
    """Positions (num, 3) east, north, up of a bending, climbing flight."""
    t = np.linspace(0.0, 1.0, num)
    return np.column_stack([200.0 * t, 60.0 * np.sin(4.0 * t), 20.0 + 15.0 * t**2])


def strips_m(num: int = 18, *, num_strips: int = 3) -> Float64Array:
    """Positions (num, 3) of a mapping flight at one height: strips to and fro, 25 m apart."""
    along, strip = np.arange(num) % (num // num_strips), np.arange(num) // (num // num_strips)
    east = np.where(strip % 2, num // num_strips - 1 - along, along) * 13.5
    return np.column_stack([east, 25.0 * strip, np.full(num, 40.0)])


def line_m(num: int = 12) -> Float64Array:
    """Positions (num, 3) of a straight flight at one height."""
    return np.outer(np.arange(float(num)), [5.0, 12.0, 0.0]) + (0.0, 0.0, 30.0)


def fixes_at(positions_m: Float64Array, *, accuracy_m: float | None = None) -> list[GpsFix]:
    geodetic = pycolmap.GPSTransform().enu_to_ellipsoid(positions_m, *ORIGIN)
    return [
        GpsFix(
            latitude_deg=latitude,
            longitude_deg=longitude,
            altitude_m=altitude,
            accuracy_m=accuracy_m,
        )
        for latitude, longitude, altitude in geodetic.tolist()
    ]


def in_map(positions_m: Float64Array) -> Float64Array:
    """The same places in a map of another scale, turned and moved."""
    return transform_points(MAP_FROM_ENU, positions_m)


def cameras_at(positions_m: Float64Array, *, rotation: Float64Array = DOWN) -> Float64Array:
    """Poses (N, 3, 4) in the map of cameras at places, held alike; by default they face down."""
    shifts = -positions_m @ rotation.T
    rotations = np.broadcast_to(rotation, (len(positions_m), 3, 3))
    return pose_in_other_world(np.concatenate([rotations, shifts[..., None]], axis=2), MAP_FROM_ENU)


def placed(
    true_m: Float64Array,
    measured_m: Float64Array | None = None,
    *,
    config: GeoreferenceConfig = CONFIG,
    rotation: Float64Array = DOWN,
) -> Georeference | GeoreferenceRefused:
    """Georeferences the map of cameras at true positions by those that a receiver measured."""
    fixes = fixes_at(true_m if measured_m is None else measured_m)
    poses = cameras_at(true_m, rotation=rotation)
    return estimate_georeference(poses, fixes, config=config, origin=ORIGIN_FIX)


def accepted(outcome: Georeference | GeoreferenceRefused) -> Georeference:
    assert isinstance(outcome, Georeference), outcome
    return outcome


def refused(outcome: Georeference | GeoreferenceRefused) -> RefusalReason:
    assert isinstance(outcome, GeoreferenceRefused)
    assert outcome.detail
    return outcome.reason


def errors_m(outcome: Georeference, true_m: Float64Array) -> Float64Array:
    """How far places of the map are from where they truly are, (N,)."""
    offsets_m = transform_points(outcome.enu_from_map, in_map(true_m)) - true_m
    return np.asarray(np.linalg.norm(offsets_m, axis=1))


def noise_m(num: int, *, horizontal_m: float, vertical_m: float, seed: int = 0) -> Float64Array:
    rng = np.random.default_rng(seed)
    return rng.normal(scale=(horizontal_m, horizontal_m, vertical_m), size=(num, 3))


# -- east, north, up ------------------------------------------------------------------------------


def fix_at(latitude_deg: float, longitude_deg: float, altitude_m: float = 0.0) -> GpsFix:
    return GpsFix(latitude_deg=latitude_deg, longitude_deg=longitude_deg, altitude_m=altitude_m)


def test_the_ellipsoid_has_the_axes_of_wgs84() -> None:
    (pole_m,) = positions_in_enu([fix_at(90.0, 0.0)], origin=fix_at(0.0, 0.0))
    np.testing.assert_allclose(pole_m, [0.0, 6_356_752.314_245, -6_378_137.0], atol=1e-6)


def test_east_north_and_up_are_the_axes() -> None:
    origin = fix_at(45.0, 7.0, 100.0)
    east_m, north_m, up_m = positions_in_enu(
        [fix_at(45.0, 7.001, 100.0), fix_at(45.001, 7.0, 100.0), fix_at(45.0, 7.0, 130.0)],
        origin=origin,
    )
    assert east_m == pytest.approx([78.85, 0.0, 0.0], abs=0.05)
    assert north_m == pytest.approx([0.0, 111.13, 0.0], abs=0.05)
    assert up_m == pytest.approx([0.0, 0.0, 30.0], abs=1e-6)


def test_positions_across_the_date_line_are_near() -> None:
    (east_m,) = positions_in_enu([fix_at(10.0, -179.9999)], origin=fix_at(10.0, 179.9999))
    assert east_m == pytest.approx([21.93, 0.0, 0.0], abs=0.01)
    assert positions_in_enu([], origin=fix_at(10.0, 179.9999)).shape == (0, 3)


# -- laying the map onto positions ----------------------------------------------------------------


@pytest.mark.parametrize("true_m", [flight_m(20), strips_m(), flight_m(6)])
def test_exact_positions_give_the_exact_place_turn_and_unit(true_m: Float64Array) -> None:
    outcome = accepted(placed(true_m))
    assert errors_m(outcome, true_m).max() < 1e-3
    assert outcome.metres_per_map_unit == pytest.approx(UNIT_M, rel=1e-6)
    assert outcome.rmse_m < 1e-3
    assert outcome.num_inliers == len(true_m)
    assert not outcome.is_levelled_by_cameras


def test_noise_in_the_positions_averages_out_and_shows_at_its_size() -> None:
    true_m = strips_m(60, num_strips=5)
    measured_m = true_m + noise_m(60, horizontal_m=1.0, vertical_m=2.0)
    outcome = accepted(placed(true_m, measured_m))
    assert outcome.rmse_m == pytest.approx(math.sqrt(6.0), rel=0.15)
    assert 0.05 < errors_m(outcome, true_m).max() < 1.5
    assert outcome.metres_per_map_unit == pytest.approx(UNIT_M, rel=0.01)
    assert outcome.num_inliers == 60


@pytest.mark.slow
def test_the_estimated_uncertainty_is_about_right() -> None:
    true_m = strips_m()
    turns_deg, estimated_deg = [], []
    for seed in range(20):
        measured_m = true_m + noise_m(18, horizontal_m=1.0, vertical_m=1.0, seed=seed)
        outcome = accepted(placed(true_m, measured_m))
        rotation = outcome.enu_from_map[:, :3] / outcome.metres_per_map_unit @ TURN
        turns_deg.append(math.degrees(math.acos(min(1.0, (np.trace(rotation) - 1.0) / 2.0))))
        estimated_deg.append(outcome.rotation_std_deg)
    ratio = np.sqrt(np.mean(np.square(turns_deg))) / np.mean(estimated_deg)
    assert 0.7 < ratio < 2.0  # the estimate is of one axis, the error of all three


@pytest.mark.slow
def test_vertical_noise_tilts_the_map_less_than_it_would_by_plain_least_squares() -> None:
    true_m = flight_m(12) + (0.0, 0.0, 20.0) * np.sin(np.arange(12.0))[:, None]
    weighted, plain = [], []
    for seed in range(20):
        measured_m = true_m + noise_m(12, horizontal_m=0.2, vertical_m=3.0, seed=seed)
        config = GeoreferenceConfig(accuracy_m=0.2, vertical_accuracy_m=3.0)
        weighted.append(errors_m(accepted(placed(true_m, measured_m, config=config)), true_m).max())
        config = GeoreferenceConfig(accuracy_m=1.0, vertical_accuracy_m=1.0)
        plain.append(errors_m(accepted(placed(true_m, measured_m, config=config)), true_m).max())
    assert np.mean(weighted) < 0.9 * np.mean(plain)


def test_accurate_fixes_count_more_than_inaccurate_ones() -> None:
    true_m = strips_m()
    measured_m = true_m.copy()
    measured_m[::2] += noise_m(9, horizontal_m=2.0, vertical_m=2.0)
    alike = fixes_at(measured_m)
    with_accuracies = [
        replace(fix, accuracy_m=2.0 if number % 2 == 0 else 0.05)
        for number, fix in enumerate(alike)
    ]
    errors = [
        errors_m(
            accepted(
                estimate_georeference(cameras_at(true_m), fixes, config=CONFIG, origin=ORIGIN_FIX)
            ),
            true_m,
        ).max()
        for fixes in (alike, with_accuracies)
    ]
    assert errors[1] < 0.2 * errors[0] or errors[1] < 0.05


@pytest.mark.parametrize("direction_deg", [None, 0.0, 90.0])
def test_five_of_eighteen_positions_eighty_metres_off_are_found_exactly(
    direction_deg: float | None,
) -> None:
    true_m = strips_m()
    rng = np.random.default_rng(4)
    measured_m = true_m + noise_m(18, horizontal_m=0.3, vertical_m=0.5)
    without = accepted(placed(true_m, measured_m))
    wrong = np.sort(rng.permutation(18)[:5])
    angles = rng.uniform(0.0, 2.0 * np.pi, 5) if direction_deg is None else np.full(5, 0.0)
    angles = angles + math.radians(direction_deg or 0.0)
    measured_m[wrong] += 80.0 * np.column_stack([np.cos(angles), np.sin(angles), np.zeros(5)])
    outcome = accepted(placed(true_m, measured_m))
    np.testing.assert_array_equal(np.flatnonzero(~outcome.is_inlier), wrong)
    assert outcome.weights[wrong].max() == 0.0
    assert outcome.rmse_m < 1.0
    assert outcome.residuals_m[wrong] == pytest.approx(80.0, abs=2.0)
    lengths_m = np.linalg.norm(outcome.offsets_enu_m, axis=1)
    np.testing.assert_allclose(lengths_m, outcome.residuals_m, atol=1e-9)
    away_m = -80.0 * np.column_stack([np.cos(angles), np.sin(angles), np.zeros(5)])
    assert outcome.offsets_enu_m[wrong] == pytest.approx(away_m, abs=2.0)
    assert errors_m(outcome, true_m).max() < 1.0
    difference = errors_m(outcome, true_m) - errors_m(without, true_m)
    assert np.abs(difference).max() < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_nearly_half_of_the_positions_may_be_anywhere(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true_m = strips_m(100, num_strips=10)
    measured_m = true_m + noise_m(100, horizontal_m=0.5, vertical_m=1.0, seed=seed)
    wrong = rng.permutation(100)[:45]
    measured_m[wrong] += rng.uniform(-200.0, 200.0, (45, 3))
    outcome = accepted(placed(true_m, measured_m))
    assert errors_m(outcome, true_m).max() < 1.5
    assert set(np.flatnonzero(~outcome.is_inlier)) <= set(wrong.tolist())
    assert outcome.num_inliers <= 60


def test_a_log_that_drifts_away_does_not_bend_the_map() -> None:
    true_m = strips_m(40, num_strips=4)
    drift_m = np.clip(np.linspace(-20.0, 20.0, 40), 0.0, None)  # from half-way on
    measured_m = true_m + noise_m(40, horizontal_m=0.3, vertical_m=0.5)
    measured_m[:, 0] += drift_m
    outcome = accepted(placed(true_m, measured_m))
    assert errors_m(outcome, true_m).max() < 1.0
    assert outcome.metres_per_map_unit == pytest.approx(UNIT_M, rel=0.01)
    is_far = drift_m > CONFIG.max_error_m + 1.5
    assert not outcome.is_inlier[is_far].any()
    assert outcome.weights[drift_m > 5.0].max() == 0.0
    assert outcome.weights[drift_m == 0.0].min() > 0.3


def test_the_same_arguments_give_the_same_result() -> None:
    true_m = strips_m(60, num_strips=5)
    measured_m = true_m + noise_m(60, horizontal_m=1.0, vertical_m=2.0)
    one, other = accepted(placed(true_m, measured_m)), accepted(placed(true_m, measured_m))
    np.testing.assert_array_equal(one.enu_from_map, other.enu_from_map)
    np.testing.assert_array_equal(one.residuals_m, other.residuals_m)


def test_positions_that_repeat_are_used_but_do_not_make_enough() -> None:
    true_m = flight_m(40)
    measured_m = np.repeat(true_m[::2], 2, axis=0)
    assert accepted(placed(true_m, measured_m)).metres_per_map_unit == pytest.approx(
        UNIT_M, rel=0.02
    )
    measured_m = np.repeat(true_m[4::8], 8, axis=0)
    assert refused(placed(true_m, measured_m)) is RefusalReason.TOO_FEW_FIXES


def test_a_fix_that_is_no_number_counts_as_none() -> None:
    true_m = strips_m()
    fixes = fixes_at(true_m)
    fixes[3] = replace(fixes[3], altitude_m=math.nan)
    fixes[7] = replace(fixes[7], accuracy_m=math.inf)
    outcome = accepted(estimate_georeference(cameras_at(true_m), fixes, config=CONFIG))
    np.testing.assert_array_equal(np.flatnonzero(~outcome.is_inlier), [3, 7])
    assert np.isinf(outcome.residuals_m[[3, 7]]).all()
    assert np.isnan(outcome.offsets_enu_m[[3, 7]]).all()
    assert math.isfinite(outcome.rmse_m)
    assert np.isfinite(outcome.enu_from_map).all()


@pytest.mark.parametrize(
    "impossible",
    [{"altitude_m": 1e300}, {"altitude_m": -1e160}, {"latitude_deg": 1e200}, {"accuracy_m": 1e200}],
)
def test_one_absurd_fix_of_many_counts_as_none(impossible: dict[str, Any]) -> None:
    true_m = strips_m()
    fixes = fixes_at(true_m)
    fixes[3] = replace(fixes[3], **impossible)
    outcome = accepted(estimate_georeference(cameras_at(true_m), fixes, config=CONFIG))
    np.testing.assert_array_equal(np.flatnonzero(~outcome.is_inlier), [3])
    assert outcome.metres_per_map_unit == pytest.approx(UNIT_M, rel=0.02)


def test_the_origin_is_the_middle_of_the_positions_unless_given() -> None:
    true_m = strips_m()
    measured_m = true_m.copy()
    measured_m[:5] += (0.0, 8000.0, 0.0)
    fixes = fixes_at(measured_m)
    outcome = accepted(estimate_georeference(cameras_at(true_m), fixes, config=CONFIG))
    assert outcome.origin == median_fix(fixes)
    assert outcome.origin.latitude_deg == pytest.approx(47.0, abs=1e-3)
    assert outcome.num_inliers == 13
    centers_m = transform_points(outcome.enu_from_map, in_map(true_m))
    assert np.abs(centers_m[:, :2]).max() < 100.0
    assert np.abs(centers_m[:, 2]).max() < 0.1  # one height, and the origin lies there


def test_the_middle_of_positions_across_the_date_line_lies_among_them() -> None:
    fixes = [
        GpsFix(latitude_deg=-17.0, longitude_deg=longitude_deg, altitude_m=3.0)
        for longitude_deg in (179.9998, 179.9999, -179.9999, -179.9998, -179.9997)
    ]
    assert median_fix(fixes).longitude_deg == pytest.approx(-179.9999)


# -- straight paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_level_cameras_settle_the_turn_about_a_straight_path(noise: float) -> None:
    true_m = line_m()
    measured_m = true_m + noise_m(12, horizontal_m=noise, vertical_m=noise)
    outcome = accepted(placed(true_m, measured_m, rotation=DOWN))
    assert outcome.is_levelled_by_cameras
    up_in_map = in_map(np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    up_in_enu = np.diff(transform_points(outcome.enu_from_map, up_in_map)[::-1], axis=0)[0]
    tilt_deg = math.degrees(math.acos(up_in_enu[2] / np.linalg.norm(up_in_enu)))
    assert tilt_deg < 2.0 + 3.0 * noise
    assert errors_m(outcome, true_m).max() < 0.01 + 3.0 * noise
    assert outcome.rotation_std_deg < 4.0


def test_a_straight_path_of_cameras_that_move_along_their_x_axis_is_refused() -> None:
    along = np.array([5.0, 12.0, 0.0]) / 13.0
    sideways = np.stack([along, (0.0, 0.0, -1.0), np.cross(along, (0.0, 0.0, -1.0))])
    assert refused(placed(line_m(), rotation=sideways)) is RefusalReason.STRAIGHT_PATH


def test_a_straight_path_of_cameras_that_roll_is_refused() -> None:
    true_m = line_m()
    poses = cameras_at(true_m)
    for number in range(len(poses)):
        roll = rotation_from_vector(np.array([0.0, 0.9 * (-1) ** number, 0.0]))
        poses[number] = roll @ poses[number]
    outcome = estimate_georeference(poses, fixes_at(true_m), config=CONFIG)
    assert refused(outcome) is RefusalReason.STRAIGHT_PATH


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 1, 3, 5])
def test_fewer_positions_than_configured_are_refused(num: int) -> None:
    assert refused(placed(flight_m(20)[:num])) is RefusalReason.TOO_FEW_FIXES


def test_a_camera_that_hardly_moved_is_refused() -> None:
    assert refused(placed(flight_m(20) * 0.03)) is RefusalReason.TOO_SMALL


def test_a_receiver_that_stood_still_is_refused() -> None:
    measured_m = np.zeros((20, 3)) + np.arange(20.0)[:, None] * 1e-4
    assert isinstance(placed(flight_m(20), measured_m), GeoreferenceRefused)


def test_a_map_of_one_place_is_refused() -> None:
    fixes = fixes_at(flight_m(20))
    outcome = estimate_georeference(cameras_at(np.ones((20, 3))), fixes, config=CONFIG)
    assert isinstance(outcome, GeoreferenceRefused)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread_m", [6.0, 30.0, 300.0])
def test_positions_that_have_nothing_to_do_with_the_map_are_refused(
    seed: int, spread_m: float
) -> None:
    measured_m = np.random.default_rng(seed).normal(scale=spread_m, size=(18, 3))
    expected = {RefusalReason.CONTRADICTION, RefusalReason.TOO_UNCERTAIN}
    assert refused(placed(strips_m(), measured_m)) in expected


def test_two_halves_that_contradict_each_other_are_refused() -> None:
    measured_m = strips_m()
    measured_m[::2] += (0.0, 80.0, 0.0)
    assert refused(placed(strips_m(), measured_m)) is RefusalReason.CONTRADICTION


def test_the_mirror_image_of_the_positions_is_no_place_for_the_map() -> None:
    true_m = flight_m(20) + (0.0, 0.0, 30.0) * np.sin(np.arange(20.0))[:, None]
    assert isinstance(placed(true_m, true_m * (1.0, 1.0, -1.0)), GeoreferenceRefused)


# -- moving the map -------------------------------------------------------------------------------


def test_a_reconstruction_in_metres_has_its_cameras_at_their_positions() -> None:
    world = SyntheticWorld(straight_path(8))
    sparse_map = grown_map(world)
    fixes = [world.gps(i, metres_per_unit=10.0) for i in sparse_map.registered_ids]
    poses = np.array([sparse_map.cam_from_world(i) for i in sparse_map.registered_ids])
    outcome = accepted(estimate_georeference(poses, fixes, config=CONFIG, origin=fixes[0]))
    copy = sparse_map.copy_reconstruction()
    error_px = copy.compute_mean_reprojection_error()
    to_enu(copy, outcome)
    moved = np.array([copy.image(i).cam_from_world().matrix() for i in sparse_map.registered_ids])
    true_centers = camera_center(np.array([world.pose(i) for i in sparse_map.registered_ids]))
    expected_m = 10.0 * (true_centers - true_centers[0])
    np.testing.assert_allclose(camera_center(moved), expected_m, atol=0.05)
    np.testing.assert_allclose(moved[0][:, :3], world.pose(1)[:, :3], atol=0.01)
    copy.update_point_3d_errors()
    assert copy.compute_mean_reprojection_error() == pytest.approx(error_px, abs=1e-6)


# -- the distance to all fixes --------------------------------------------------------------------


def test_an_exact_map_agrees_wherever_it_lies_and_however_large_it_is() -> None:
    positions_m = flight_m(20)
    rmse_m = gps_rmse_m(in_map(positions_m), fixes_at(positions_m))
    assert rmse_m == pytest.approx(0.0, abs=1e-4)


def test_noise_in_the_fixes_shows_at_its_size() -> None:
    positions_m = flight_m(200)
    noise_m = np.random.default_rng(0).normal(scale=2.0, size=positions_m.shape)
    rmse_m = gps_rmse_m(in_map(positions_m), fixes_at(positions_m + noise_m))
    assert rmse_m is not None
    assert rmse_m == pytest.approx(2.0 * np.sqrt(3.0), rel=0.1)


def test_fixes_without_altitude_count_horizontally() -> None:
    positions_m = flight_m(20)
    fixes = fixes_at(positions_m)
    without = [replace(fix, altitude_m=None) for fix in fixes[:5]]
    rmse_m = gps_rmse_m(in_map(positions_m), [*without, *fixes[5:]])
    assert rmse_m is not None
    assert rmse_m < 0.5


def test_a_bent_map_does_not_agree() -> None:
    positions_m = flight_m(20)
    bent_m = positions_m + np.outer(np.linspace(-1.0, 1.0, 20) ** 2, [0.0, 0.0, 30.0])
    rmse_m = gps_rmse_m(in_map(bent_m), fixes_at(positions_m))
    assert rmse_m is not None
    assert 1.0 < rmse_m < 30.0


@pytest.mark.parametrize("num", [0, 1, 3])
def test_few_fixes_have_no_rmse(num: int) -> None:
    positions_m = flight_m(20)[:num]
    assert gps_rmse_m(in_map(positions_m), fixes_at(positions_m)) is None


def test_four_fixes_have_an_rmse() -> None:
    positions_m = flight_m(4)
    assert gps_rmse_m(in_map(positions_m), fixes_at(positions_m)) is not None


def test_a_camera_that_stood_still_has_no_rmse() -> None:
    assert gps_rmse_m(np.ones((6, 3)), fixes_at(flight_m(6))) is None
    assert gps_rmse_m(in_map(flight_m(6)), fixes_at(np.ones((6, 3)))) is None


def test_a_perfectly_straight_flight_has_no_rmse() -> None:
    line_m = np.outer(np.arange(6.0), [10.0, 5.0, 1.0])
    assert gps_rmse_m(in_map(line_m), fixes_at(line_m)) is None


# -- without altitudes ----------------------------------------------------------------------------


def without_altitude(fixes: Sequence[GpsFix]) -> list[GpsFix]:
    return [replace(fix, altitude_m=None) for fix in fixes]


def scattered(positions_m: Float64Array, *, std_m: float = 1.0) -> Float64Array:
    return positions_m + np.random.default_rng(3).normal(0.0, std_m, positions_m.shape)


def test_strips_without_any_altitude_are_laid_out_horizontally_with_heights_of_the_map() -> None:
    true_m = strips_m()
    found = estimate_georeference(
        cameras_at(true_m), without_altitude(fixes_at(scattered(true_m))), config=CONFIG
    )
    assert isinstance(found, Georeference)
    assert not found.has_heights
    assert np.isnan(found.offsets_enu_m[:, 2]).all()
    assert np.isfinite(found.offsets_enu_m[:, :2]).all()
    assert found.origin.altitude_m is None
    assert found.metres_per_map_unit == pytest.approx(UNIT_M, rel=0.03)
    assert 0.3 < found.rmse_m < 2.0
    placed_m = transform_points(found.enu_from_map, in_map(true_m))
    assert np.ptp(placed_m[:, 2]) < 4.0
    apart_m = (placed_m - placed_m.mean(axis=0)) - (true_m - true_m.mean(axis=0))
    assert np.abs(apart_m[:, :2]).max() < 1.5


def test_a_climbing_flight_without_altitudes_climbs_where_its_cameras_are_level() -> None:
    true_m = flight_m(30)
    turns = [rotation_from_vector(np.array([0.0, 0.0, angle])) for angle in np.linspace(0, 3, 30)]
    rotations = np.array([DOWN @ turn for turn in turns])
    shifts = -np.einsum("nij,nj->ni", rotations, true_m)
    cameras = pose_in_other_world(
        np.concatenate([rotations, shifts[..., None]], axis=2), MAP_FROM_ENU
    )
    found = estimate_georeference(cameras, without_altitude(fixes_at(true_m)), config=CONFIG)
    assert isinstance(found, Georeference)
    placed_m = transform_points(found.enu_from_map, in_map(true_m))
    climbed_m = placed_m[-1, 2] - placed_m[0, 2]
    assert climbed_m == pytest.approx(15.0, abs=5.0)


def test_altitudes_on_half_of_the_fixes_give_all_the_heights() -> None:
    true_m = strips_m()
    fixes = fixes_at(true_m)
    fixes[::2] = without_altitude(fixes[::2])
    found = estimate_georeference(cameras_at(true_m), fixes, config=CONFIG)
    assert isinstance(found, Georeference)
    assert found.has_heights
    assert found.rmse_m < 0.01
    assert found.is_inlier.all()
    assert found.origin.altitude_m == pytest.approx(540.0, abs=0.1)


def test_wrong_positions_without_altitude_are_left_out_all_the_same() -> None:
    true_m = strips_m()
    measured_m = scattered(true_m, std_m=0.5)
    measured_m[4, 0] += 80.0
    found = estimate_georeference(
        cameras_at(true_m), without_altitude(fixes_at(measured_m)), config=CONFIG
    )
    assert isinstance(found, Georeference)
    assert np.flatnonzero(~found.is_inlier).tolist() == [4]


def test_a_straight_line_without_altitudes_is_placed_by_level_cameras() -> None:
    true_m = line_m()
    found = estimate_georeference(
        cameras_at(true_m), without_altitude(fixes_at(scattered(true_m, std_m=0.3))), config=CONFIG
    )
    assert isinstance(found, Georeference)
    placed_m = transform_points(found.enu_from_map, in_map(true_m))
    assert np.ptp(placed_m[:, 2]) < 4.0


def test_accuracies_of_heights_count_where_a_receiver_reports_them() -> None:
    fix = GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=1.0, accuracy_m=0.03)
    given = [replace(fix, vertical_accuracy_m=0.05), fix, replace(fix, altitude_m=None)]
    sigmas_m = stds_m(given, config=CONFIG)
    assert sigmas_m[0].tolist() == [0.03, 0.03, 0.05]
    assert sigmas_m[1, 2] == pytest.approx(0.06)
    assert sigmas_m[2, 2] == UNKNOWN_STD_M


# -- latitude and longitude as each other ---------------------------------------------------------


def both_orders(
    cameras: Float64Array, fixes: Sequence[GpsFix]
) -> list[Georeference | GeoreferenceRefused]:
    unsure = [replace(fix, is_order_unsure=True) for fix in fixes]
    other = [swapped(fix) for fix in unsure]
    return [estimate_georeference(cameras, each, config=CONFIG) for each in (unsure, other)]


@pytest.mark.parametrize("has_altitude", [True, False])
def test_the_right_order_of_latitude_and_longitude_is_the_one_with_cameras_upright(
    has_altitude: bool,
) -> None:
    true_m = strips_m()
    fixes = fixes_at(scattered(true_m))
    right, wrong = both_orders(
        cameras_at(true_m), fixes if has_altitude else without_altitude(fixes)
    )
    assert isinstance(right, Georeference)
    assert better_order(right, wrong) is right
    assert better_order(wrong, right) is right


def test_an_order_that_the_map_does_not_tell_is_asked_for() -> None:
    true_m = line_m()
    right, wrong = both_orders(cameras_at(true_m), fixes_at(true_m))
    found = better_order(right, wrong)
    assert isinstance(found, GeoreferenceRefused)
    assert found.reason is RefusalReason.UNSURE_ORDER
    assert "telemetry.order" in found.detail


# -- mirrored positions ---------------------------------------------------------------------------


@pytest.mark.parametrize("has_altitude", [True, False])
def test_positions_with_one_wrong_sign_are_refused_as_cameras_would_look_at_the_sky(
    has_altitude: bool,
) -> None:
    true_m = strips_m()
    fixes = [replace(fix, longitude_deg=-fix.longitude_deg) for fix in fixes_at(true_m)]
    found = estimate_georeference(
        cameras_at(true_m), fixes if has_altitude else without_altitude(fixes), config=CONFIG
    )
    assert isinstance(found, GeoreferenceRefused)
    assert found.reason is RefusalReason.UPSIDE_DOWN
    assert "sign" in found.detail
