"""Georeference: the similarity from a map to east, north, up in metres, from GPS fixes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import pycolmap

from engine.config import GeoreferenceConfig
from engine.geo.similarity_fit import (
    UNKNOWN_STD_M,
    SimilarityFit,
    fit_similarity,
    level_cameras,
    level_flat_path,
    mean_height,
)
from engine.geo.usable_fixes import is_usable_fix
from engine.geometry import camera_center, transform_points
from engine.types import BoolArray, Float64Array, GpsFix, freeze_field

_MIN_FIXES = 4  # three points fit any similarity
_MIN_AGREEING_RATIO = 0.5  # of the fixes; fewer that agree may do so by chance
_MAX_ROTATION_STD_DEG = 4.0
_MAX_SCALE_STD_RATIO = 0.1
_MAX_TILT_DEG = 10.0  # of cameras that count as level
_MIN_ACCURACY_M = 0.02  # smaller accuracies that receivers report do not hold for cameras
_CLEARLY_BETTER = 1.5  # by which one order of latitude and longitude must fit better
_SURE_M = 0.1  # a smaller distance does not decide between them
MAX_UPWARDS = 0.3  # of the mean of cameras' y and z axes: level ones and those facing down have -1


class RefusalReason(StrEnum):
    """Why a map was not georeferenced."""

    TOO_FEW_FIXES = "too_few_fixes"  # different ones
    TOO_SMALL = "too_small"  # the positions are too close together
    CONTRADICTION = "contradiction"  # map and positions differ in shape
    STRAIGHT_PATH = "straight_path"  # the rotation about it is undetermined
    TOO_UNCERTAIN = "too_uncertain"  # the positions are too noisy for their extent
    UNSURE_ORDER = "unsure_order"  # latitude and longitude may be each other
    UPSIDE_DOWN = "upside_down"  # cameras would stand on their heads: the positions are mirrored


@dataclass(frozen=True, slots=True, kw_only=True)
class GeoreferenceRefused:
    """Fixes and map do not determine a georeference; more of them may."""

    reason: RefusalReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Georeference:
    """A map's place in east, north, up in metres from an origin. N: the fixes, in order."""

    origin: GpsFix
    enu_from_map: Float64Array  # (3, 4) similarity [s R | t], m
    residuals_m: Float64Array  # (N,) distances of camera centres to fixes; inf: no usable fix
    weights: Float64Array  # (N,) 0..1, how much each fix counts
    is_inlier: BoolArray  # (N,) those that agree with the map
    offsets_enu_m: Float64Array  # (N, 3) from fixes to camera centres; nan: not known
    rmse_m: float  # of the inliers, root mean square
    rotation_std_deg: float  # about the axis that is known least
    scale_std_ratio: float
    is_levelled_by_cameras: bool  # the path is straight: level cameras give the rotation about it
    has_heights: bool = True  # False: too few altitudes; level cameras and a flat path replace them

    def __post_init__(self) -> None:
        freeze_field(self, "enu_from_map", (3, 4), np.float64)
        freeze_field(self, "residuals_m", (None,), np.float64, finite=False)
        freeze_field(self, "weights", (len(self.residuals_m),), np.float64)
        freeze_field(self, "is_inlier", (len(self.residuals_m),), np.bool_)
        freeze_field(self, "offsets_enu_m", (len(self.residuals_m), 3), np.float64, finite=False)

    @property
    def metres_per_map_unit(self) -> float:
        """The length of the map's unit in metres."""
        return float(np.cbrt(np.linalg.det(self.enu_from_map[:, :3])))

    @property
    def num_inliers(self) -> int:
        """How many fixes agree with the map."""
        return int(self.is_inlier.sum())


def estimate_georeference(
    cam_from_map: Float64Array,
    fixes: Sequence[GpsFix],
    *,
    config: GeoreferenceConfig,
    origin: GpsFix | None = None,
    seed: int = 0,
) -> Georeference | GeoreferenceRefused:
    """Estimates the similarity from a map to the GPS fixes of its cameras, robust to outliers.

    Fixes farther than ``max_error_m`` from the map are left out; nearer ones count by their
    accuracy, and less the farther they are from the consensus. A straight path leaves the rotation
    about it undetermined: then the cameras decide, if they were held level, as gimbals and hands
    do. Fixes without altitude count horizontally. Where hardly any has one, level cameras and a
    path that is flat on average give the vertical, and heights are those of the map.

    Args:
        cam_from_map: (N, 3, 4) poses.
        fixes: N positions. One with values that cannot be, see `usable_fix`, counts as none.
        config: how many fixes are needed, and which errors are allowed.
        origin: to keep the one of an earlier estimate; by default the median fix.
        seed: of random samples; the same arguments give the same result.

    Returns:
        The georeference, or why there is none. All values are finite but residuals and offsets of
        unusable fixes, and offsets up to fixes without altitude.
    """
    is_usable = np.array([is_usable_fix(fix) for fix in fixes], np.bool_)
    usable = [fix for fix, is_good in zip(fixes, is_usable, strict=True) if is_good]
    num_different = len({(fix.latitude_deg, fix.longitude_deg, fix.altitude_m) for fix in usable})
    if num_different < config.min_fixes:
        return GeoreferenceRefused(
            reason=RefusalReason.TOO_FEW_FIXES,
            detail=f"{num_different} different positions, {config.min_fixes} needed",
        )
    has_heights = sum(fix.altitude_m is not None for fix in usable) >= config.min_fixes
    if not has_heights:
        usable = [replace(fix, altitude_m=None) for fix in usable]
    origin = origin or median_fix(usable)
    problem = _Problem(
        rotations=cam_from_map[is_usable, :, :3],
        centers=camera_center(cam_from_map[is_usable]),
        positions_m=positions_in_enu(usable, origin=origin),
        stds_m=stds_m(usable, config=config),
        has_heights=has_heights,
        config=config,
    )
    solution = problem.solve(seed=seed)
    if isinstance(solution, GeoreferenceRefused):
        return solution
    residuals_m, weights = np.full(len(fixes), math.inf), np.zeros(len(fixes))
    residuals_m[is_usable] = solution.fit.residuals_m
    weights[is_usable] = solution.fit.weights
    is_inlier = residuals_m <= config.max_error_m
    offsets_enu_m = np.full((len(fixes), 3), math.nan)
    placed_m = transform_points(solution.fit.onto_from_map, problem.centers)
    offsets_enu_m[is_usable] = placed_m - problem.positions_m
    offsets_enu_m[[fix.altitude_m is None or not has_heights for fix in fixes], 2] = math.nan
    return Georeference(
        origin=origin,
        enu_from_map=solution.fit.onto_from_map,
        residuals_m=residuals_m,
        weights=weights,
        is_inlier=is_inlier,
        offsets_enu_m=offsets_enu_m,
        rmse_m=float(np.sqrt(np.mean(residuals_m[is_inlier] ** 2))),
        rotation_std_deg=math.degrees(solution.fit.rotation_std_rad),
        scale_std_ratio=solution.fit.scale_std_ratio,
        is_levelled_by_cameras=solution.is_levelled_by_cameras,
        has_heights=has_heights,
    )


def better_order(
    one: Georeference | GeoreferenceRefused, other: Georeference | GeoreferenceRefused
) -> Georeference | GeoreferenceRefused:
    """Which of two orders of latitude and longitude the map bears out, or that it says neither."""
    if isinstance(other, GeoreferenceRefused):
        return one
    if isinstance(one, GeoreferenceRefused):
        return other
    better, worse = sorted((one, other), key=lambda found: (-found.num_inliers, found.rmse_m))
    limit_m = _CLEARLY_BETTER * max(better.rmse_m, _SURE_M)
    if worse.num_inliers < better.num_inliers or worse.rmse_m > limit_m:
        return better
    return GeoreferenceRefused(
        reason=RefusalReason.UNSURE_ORDER,
        detail="latitude and longitude may be each other, and the map fits both:"
        " telemetry.order=latitude_first or longitude_first says which",
    )


def swapped(fix: GpsFix) -> GpsFix:
    """A fix whose order is unsure with latitude and longitude as each other; else the fix."""
    if not fix.is_order_unsure:
        return fix
    return replace(fix, latitude_deg=fix.longitude_deg, longitude_deg=fix.latitude_deg)


def sim3d_of(onto_from_map: Float64Array) -> pycolmap.Sim3d:
    """A similarity [s R | t] (3, 4) as COLMAP has it."""
    return pycolmap.Sim3d(np.array(onto_from_map))


def to_enu(reconstruction: pycolmap.Reconstruction, georeference: Georeference) -> None:
    """Moves a private copy of the map into metres east, north, up, in place."""
    reconstruction.transform(sim3d_of(georeference.enu_from_map))


def median_fix(fixes: Sequence[GpsFix]) -> GpsFix:
    """The median position, coordinate by coordinate; up to half of them may be wrong.

    Longitudes are taken relative to the first, so that none of them lies across the date line.
    """
    first_deg = fixes[0].longitude_deg
    turns_deg = [(fix.longitude_deg - first_deg + 180.0) % 360.0 - 180.0 for fix in fixes]
    longitude_deg = first_deg + float(np.median(turns_deg))
    altitudes_m = [fix.altitude_m for fix in fixes if fix.altitude_m is not None]
    return GpsFix(
        latitude_deg=float(np.median([fix.latitude_deg for fix in fixes])),
        longitude_deg=(longitude_deg + 180.0) % 360.0 - 180.0,
        altitude_m=float(np.median(altitudes_m)) if altitudes_m else None,
        is_order_unsure=any(fix.is_order_unsure for fix in fixes),
    )


def positions_in_enu(fixes: Sequence[GpsFix], *, origin: GpsFix) -> Float64Array:
    """Positions (N, 3) in metres east, north, up of an origin.

    Those without altitude lie as high as the origin, and that on the ellipsoid if it has none.
    """
    height_m = origin.altitude_m or 0.0
    rows = [
        (
            fix.latitude_deg,
            fix.longitude_deg,
            height_m if fix.altitude_m is None else fix.altitude_m,
        )
        for fix in fixes
    ]
    wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransformEllipsoid.WGS84)
    latitude_longitude_altitude = np.array(rows).reshape(-1, 3)
    return np.asarray(
        wgs84.ellipsoid_to_enu(
            latitude_longitude_altitude,
            origin.latitude_deg,
            origin.longitude_deg,
            height_m,
        )
    )


def places_on_globe(places_in_enu: Float64Array, *, origin: GpsFix) -> Float64Array:
    """Latitude, longitude (degrees) and altitude (P, 3) of places in metres east, north, up."""
    wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransformEllipsoid.WGS84)
    height_m = origin.altitude_m or 0.0
    return np.asarray(
        wgs84.enu_to_ellipsoid(places_in_enu, origin.latitude_deg, origin.longitude_deg, height_m)
    )


def stds_m(fixes: Sequence[GpsFix], *, config: GeoreferenceConfig) -> Float64Array:
    """Standard deviations (N, 3) of positions, east, north, up.

    Receivers report the horizontal one, if any; where they do not report the vertical one it is
    larger by a configured factor. An altitude that is not known has ``UNKNOWN_STD_M``.
    """
    stated_m = [config.accuracy_m if fix.accuracy_m is None else fix.accuracy_m for fix in fixes]
    horizontal_m = np.maximum(np.array(stated_m), _MIN_ACCURACY_M)
    vertical_m = horizontal_m * (config.vertical_accuracy_m / config.accuracy_m)
    for row, fix in enumerate(fixes):
        if fix.altitude_m is None:
            vertical_m[row] = UNKNOWN_STD_M
        elif fix.vertical_accuracy_m is not None:
            vertical_m[row] = max(fix.vertical_accuracy_m, _MIN_ACCURACY_M)
    return np.column_stack([horizontal_m, horizontal_m, vertical_m])


def gps_rmse_m(centers_in_world: Float64Array, fixes: Sequence[GpsFix]) -> float | None:
    """Root mean square distance in metres of camera centres to their GPS fixes, to all of them.

    The map is placed by the best similarity (Umeyama, 1991) in local east, north, up coordinates,
    by the fixes with altitude where there are enough; the others count horizontally.

    Args:
        centers_in_world: (N, 3) camera centres in the map.
        fixes: N positions.

    Returns:
        None with too few fixes, or when the centres do not determine a similarity.
    """
    if len(fixes) < _MIN_FIXES:
        return None
    positions_m = positions_in_enu(fixes, origin=median_fix(fixes))
    has_altitude = np.array([fix.altitude_m is not None for fix in fixes])
    is_fitted = has_altitude | (has_altitude.sum() < _MIN_FIXES)
    enu_from_map = pycolmap.estimate_sim3d(centers_in_world[is_fitted], positions_m[is_fitted])
    if enu_from_map is None:
        return None
    matrix = np.asarray(enu_from_map.matrix())
    placed_m = centers_in_world @ matrix[:, :3].T + matrix[:, 3]
    offsets_m = placed_m - positions_m
    offsets_m[~has_altitude, 2] = 0.0
    return float(np.sqrt((offsets_m**2).sum(axis=1).mean()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solution:
    fit: SimilarityFit
    is_levelled_by_cameras: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Problem:
    """Camera poses in the map and the positions of their fixes."""

    rotations: Float64Array  # (N, 3, 3) cameras from map
    centers: Float64Array  # (N, 3) in the map
    positions_m: Float64Array  # (N, 3) east, north, up
    stds_m: Float64Array  # (N, 3)
    has_heights: bool
    config: GeoreferenceConfig

    def solve(self, *, seed: int) -> _Solution | GeoreferenceRefused:
        fit = fit_similarity(
            self.centers,
            self.positions_m,
            stds_m=self.stds_m,
            max_error_m=self.config.max_error_m,
            seed=seed,
        )
        if fit is None:
            return _too_small(0.0, self.config)
        refused = self._disagreement(fit)
        if refused is not None:
            return refused
        if math.degrees(fit.rotation_std_rad) <= _MAX_ROTATION_STD_DEG:
            fit = fit if self.has_heights else self._levelled(fit)
            return self._if_certain(_Solution(fit=fit, is_levelled_by_cameras=False))
        fit, tilt_rad = level_cameras(
            fit,
            self.centers,
            self.positions_m,
            self.rotations,
            stds_m=self.stds_m,
            max_error_m=self.config.max_error_m,
        )
        if math.degrees(tilt_rad) > _MAX_TILT_DEG:
            return GeoreferenceRefused(
                reason=RefusalReason.STRAIGHT_PATH,
                detail="the turn about the path is open, and the cameras were not held level",
            )
        return self._if_certain(_Solution(fit=fit, is_levelled_by_cameras=True))

    def _disagreement(self, fit: SimilarityFit) -> GeoreferenceRefused | None:
        agrees = fit.residuals_m <= self.config.max_error_m
        num_different = len(np.unique(self.positions_m[agrees], axis=0))
        if agrees.mean() <= _MIN_AGREEING_RATIO or num_different < self.config.min_fixes:
            return GeoreferenceRefused(
                reason=RefusalReason.CONTRADICTION,
                detail=f"{agrees.sum()} of {len(agrees)} positions agree with the map"
                f" to {self.config.max_error_m:g} m",
            )
        extent_m = float(np.linalg.norm(np.ptp(self.positions_m[agrees], axis=0)))
        return _too_small(extent_m, self.config) if extent_m < self.config.min_extent_m else None

    def _levelled(self, fit: SimilarityFit) -> SimilarityFit:
        """The fit with the vertical of cameras too, if they were held level."""
        levelled, tilt_rad = level_flat_path(
            fit,
            self.centers,
            self.positions_m,
            self.rotations[:, 0],
            stds_m=self.stds_m,
            max_error_m=self.config.max_error_m,
        )
        return levelled if math.degrees(tilt_rad) <= _MAX_TILT_DEG else fit

    def _if_certain(self, solution: _Solution) -> _Solution | GeoreferenceRefused:
        downwards = self.rotations[:, 1] + self.rotations[:, 2]
        if mean_height(solution.fit, downwards) > MAX_UPWARDS:
            return GeoreferenceRefused(
                reason=RefusalReason.UPSIDE_DOWN,
                detail="the cameras would stand on their heads or look at the sky: latitude and"
                " longitude are swapped, or one of them has the wrong sign",
            )
        rotation_std_deg = math.degrees(solution.fit.rotation_std_rad)
        scale_std_ratio = solution.fit.scale_std_ratio
        if rotation_std_deg <= _MAX_ROTATION_STD_DEG and scale_std_ratio <= _MAX_SCALE_STD_RATIO:
            return solution
        is_known = scale_std_ratio <= _MAX_SCALE_STD_RATIO
        return GeoreferenceRefused(
            reason=RefusalReason.STRAIGHT_PATH if is_known else RefusalReason.TOO_UNCERTAIN,
            detail=f"directions are known to {min(rotation_std_deg, 180.0):.0f} degrees only,"
            f" the scale to {100.0 * min(scale_std_ratio, 1.0):.0f} %",
        )


def _too_small(extent_m: float, config: GeoreferenceConfig) -> GeoreferenceRefused:
    return GeoreferenceRefused(
        reason=RefusalReason.TOO_SMALL,
        detail=f"the positions span {extent_m:.1f} m, {config.min_extent_m:g} m needed",
    )
