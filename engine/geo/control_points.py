"""Ground control: a map laid onto surveyed points, those that contradict the others left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.config import GeoreferenceConfig
from engine.geo.georeference import MAX_UPWARDS, Georeference, median_fix, positions_in_enu, stds_m
from engine.geo.similarity_fit import (
    UNKNOWN_STD_M,
    SimilarityFit,
    fit_similarity,
    least_squares_similarity,
    mean_height,
)
from engine.geometry import transform_points
from engine.types import (
    BoolArray,
    ControlPoint,
    Float64Array,
    GpsFix,
    Int64Array,
    freeze_field,
)

MIN_CONTROL_POINTS = 3
_NUM_TRUSTED = 4  # at least, before one can be found wrong: three fit any similarity
_MIN_WIDTH_RATIO = 0.02  # of the points' width to their length
_MAX_ROTATION_STD_DEG = 4.0
_MAX_ERROR_RATIO = 0.1  # root mean square, of the points' extent
_NUM_UNKNOWNS = 7  # of a similarity
_ONE_PLACE = "the control points, or their places in the map, are all one"
_LINE = "the control points lie on a line, or nearly: the turn about it stays open"
# The most of F that right points have by chance, about one in a thousand maps of ten points: it is
# _F_LIMIT for many degrees of freedom and larger for few.
_F_LIMIT, _F_OF_FEW = 10.0, 12.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedPoint:
    """A control point and where its marks put it in the map."""

    point: ControlPoint
    place: Float64Array  # (3,)
    covariance: Float64Array  # (3, 3)

    def __post_init__(self) -> None:
        freeze_field(self, "place", (3,), np.float64)
        freeze_field(self, "covariance", (3, 3), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ControlFit:
    """A map laid onto control points. N: the points that were surveyed, in order."""

    georeference: Georeference  # its arrays are of those N that are no check points
    errors_m: Float64Array  # (N, 3) map minus survey, east, north, up; NaN: not surveyed
    is_used: BoolArray  # (N,) the map is laid onto it
    expected_m: float  # root mean square that surveying and marking account for, of those used

    def __post_init__(self) -> None:
        freeze_field(self, "errors_m", (None, 3), np.float64, finite=False)
        freeze_field(self, "is_used", (len(self.errors_m),), np.bool_)


def lay_onto_control_points(
    points: Sequence[PlacedPoint],
    *,
    downwards: Float64Array,
    config: GeoreferenceConfig,
    seed: int = 0,
) -> ControlFit | str:
    """The similarity that lays a map onto its control points by least squares.

    Each counts by the accuracy of surveys (``control_accuracy_m``) and of its place in the map.
    From the half of the points that a robust fit has nearest, three with a height among them that
    lie on no line, others are added as long as they agree: by the F test of one more point in a
    forward search (Atkinson and Riani, 2000). Those that are left contradict the others. Fewer than
    five points all count: of four, the wrong one cannot be found.

    Args:
        points: surveyed ones, check points among them.
        downwards: (C, 3) in the map, the sum of each camera's y and z axes: on level cameras and
            those that face down it points down.
        config: accuracies, and what is refused.
        seed: of random samples.

    Returns:
        The fit, or why there is none, in words.
    """
    is_control = np.array([not one.point.is_check for one in points], np.bool_)
    fixes = [one.point.fix for one in points if one.point.fix is not None]
    control = [fix for fix, is_one in zip(fixes, is_control, strict=True) if is_one]
    num_whole = sum(fix.altitude_m is not None for fix in control)
    if num_whole < MIN_CONTROL_POINTS:
        return (
            f"{num_whole} control points with a height are marked in two or more images of the"
            f" map, {MIN_CONTROL_POINTS} are needed"
        )
    origin = median_fix(control)
    every = _problem_of(points, fixes, origin=origin, config=config)
    first = every.of(is_control).robust_fit(max_error_m=config.max_error_m, seed=seed)
    if first is None:
        return _ONE_PLACE
    every = every.with_places(points, first.onto_from_map)
    problem = every.of(is_control)
    used = problem.agreeing(first)
    fit = problem.fit(used)
    if fit is None:
        return _ONE_PLACE
    refusal = problem.refusal(fit, used, downwards, config=config)
    if refusal:
        return refusal
    is_used = is_control.copy()
    is_used[is_control] = used
    errors_m = np.where(every.known, every.offsets_m(fit.onto_from_map), np.nan)
    return ControlFit(
        georeference=problem.georeference(fit, used, errors_m[is_control], origin=origin),
        errors_m=errors_m,
        is_used=is_used,
        expected_m=problem.expected_m(used),
    )


def _problem_of(
    points: Sequence[PlacedPoint],
    fixes: Sequence[GpsFix],
    *,
    origin: GpsFix,
    config: GeoreferenceConfig,
) -> _Problem:
    """Points and their surveys, each as accurate as the survey alone."""
    accurate = [replace(fix, accuracy_m=config.control_accuracy_m) for fix in fixes]
    return _Problem(
        places=np.array([one.place for one in points]),
        positions_m=positions_in_enu(fixes, origin=origin),
        stds_m=stds_m(accurate, config=config),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Problem:
    """Control points in the map and where they were surveyed."""

    places: Float64Array  # (N, 3)
    positions_m: Float64Array  # (N, 3)
    stds_m: Float64Array  # (N, 3)

    @property
    def known(self) -> BoolArray:
        return np.asarray(self.stds_m < UNKNOWN_STD_M)

    @property
    def is_whole(self) -> BoolArray:
        return np.asarray(self.known.all(axis=1))

    def of(self, rows: BoolArray) -> _Problem:
        """That of some points alone."""
        return _Problem(
            places=self.places[rows], positions_m=self.positions_m[rows], stds_m=self.stds_m[rows]
        )

    def with_places(self, points: Sequence[PlacedPoint], onto_from_map: Float64Array) -> _Problem:
        """With the errors of the places in the map beside those of the surveys."""
        linear = onto_from_map[:, :3]
        of_places = np.array([np.diag(linear @ one.covariance @ linear.T) for one in points])
        both_m = np.sqrt(self.stds_m**2 + of_places)
        return replace(self, stds_m=np.where(self.known, both_m, UNKNOWN_STD_M))

    def robust_fit(self, *, max_error_m: float, seed: int) -> SimilarityFit | None:
        return fit_similarity(
            self.places,
            self.positions_m,
            stds_m=self.stds_m,
            max_error_m=max_error_m,
            seed=seed,
        )

    def fit(self, used: BoolArray) -> SimilarityFit | None:
        return least_squares_similarity(
            self.places[used], self.positions_m[used], stds_m=self.stds_m[used]
        )

    def offsets_m(self, onto_from_map: Float64Array) -> Float64Array:
        return transform_points(onto_from_map, self.places) - self.positions_m

    def distances_m(self, onto_from_map: Float64Array) -> Float64Array:
        """Of places to where they were surveyed (N,), along what is known."""
        offsets_m = np.where(self.known, self.offsets_m(onto_from_map), 0.0)
        return np.asarray(np.linalg.norm(offsets_m, axis=1))

    def refusal(
        self,
        fit: SimilarityFit,
        used: BoolArray,
        downwards: Float64Array,
        *,
        config: GeoreferenceConfig,
    ) -> str:
        """Why a fit to the points that are used is none, "" where it is one."""
        rmse_m = float(np.sqrt(np.mean(self.distances_m(fit.onto_from_map)[used] ** 2)))
        extent_m = float(np.linalg.norm(np.ptp(self.positions_m[used], axis=0)))
        is_far_off = rmse_m > min(config.max_error_m, _MAX_ERROR_RATIO * extent_m)
        turn_deg = math.degrees(fit.rotation_std_rad)
        noise = math.sqrt(self.noise_squared(self.misfits(fit.onto_from_map), used))
        if _is_line(self.positions_m[used & self.is_whole]) or (
            turn_deg / noise > _MAX_ROTATION_STD_DEG and not is_far_off
        ):
            return _LINE
        if mean_height(fit, downwards) > MAX_UPWARDS:
            return (
                "the cameras would stand on their heads or look at the sky: the file has east and"
                " north, or the sign of one of them, the wrong way round"
            )
        if is_far_off or turn_deg > _MAX_ROTATION_STD_DEG:
            return (
                f"the control points contradict the map: it is off by {rmse_m:.2g} m, root mean"
                " square; is the coordinate system of the file wrong, or one of the points?"
            )
        return ""

    def noise_squared(self, misfits: Float64Array, used: BoolArray) -> float:
        """Of the points that are used, in units of what surveying and marking account for; >= 1."""
        return max(float(misfits[used].sum()) / self.freedom(used), 1.0)

    def freedom(self, used: BoolArray) -> int:
        return max(int(self.known[used].sum()) - _NUM_UNKNOWNS, 1)

    def expected_m(self, used: BoolArray) -> float:
        """Root mean square of the errors that surveying and marking account for."""
        variances = np.where(self.known, self.stds_m**2, 0.0)[used]
        return float(np.sqrt(variances.sum(axis=1).mean()))

    def georeference(
        self, fit: SimilarityFit, used: BoolArray, offsets_m: Float64Array, *, origin: GpsFix
    ) -> Georeference:
        residuals_m = self.distances_m(fit.onto_from_map)
        return Georeference(
            origin=origin,
            enu_from_map=fit.onto_from_map,
            residuals_m=residuals_m,
            weights=used.astype(np.float64),
            is_inlier=used,
            offsets_enu_m=offsets_m,
            rmse_m=float(np.sqrt(np.mean(residuals_m[used] ** 2))),
            rotation_std_deg=math.degrees(fit.rotation_std_rad),
            scale_std_ratio=fit.scale_std_ratio,
            is_levelled_by_cameras=False,
        )

    def misfits(self, onto_from_map: Float64Array) -> Float64Array:
        """Squared offsets (N,) in units of their standard deviations."""
        scaled = np.where(self.known, self.offsets_m(onto_from_map) / self.stds_m, 0.0)
        return np.asarray((scaled**2).sum(axis=1))

    def agreeing(self, first: SimilarityFit) -> BoolArray:
        """Which of the points (N,) agree, from a robust fit on."""
        num_known = self.known.sum(axis=1)
        distances = self.misfits(first.onto_from_map) / num_known
        used = self._trusted(np.argsort(distances, kind="stable"))
        while not used.all() and (fit := self.fit(used)) is not None:
            misfits = self.misfits(fit.onto_from_map)
            candidate = int(np.argmin(np.where(used, np.inf, misfits / num_known)))
            more = used.copy()
            more[candidate] = True
            wider = self.fit(more)
            if wider is None:
                break
            gain = float(self.misfits(wider.onto_from_map)[more].sum() - misfits[used].sum())
            f_value = gain / int(num_known[candidate]) / self.noise_squared(misfits, used)
            if f_value > _F_LIMIT * (1.0 + _F_OF_FEW / self.freedom(used)):
                break
            used = more
        return used

    def _trusted(self, nearest: Int64Array) -> BoolArray:
        """Half of the points (N,), the nearest; the nearest whole ones that span a plane first."""
        whole = nearest[self.is_whole[nearest]]
        num = MIN_CONTROL_POINTS
        while num < len(whole) and _is_line(self.positions_m[whole[:num]]):
            num += 1
        used = np.zeros(len(nearest), np.bool_)
        used[whole[:num]] = True
        rest = nearest[~used[nearest]]
        used[rest[: max(_NUM_TRUSTED - num, len(nearest) // 2 + 1 - num, 0)]] = True
        return used


def _is_line(positions_m: Float64Array) -> bool:
    spread = np.linalg.svd(positions_m - positions_m.mean(axis=0), compute_uv=False)
    return bool(spread[1] <= _MIN_WIDTH_RATIO * spread[0])
