"""Depth of a keyframe from its image, its neighbours' and their poses."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from engine.dense.alignment import error_factor, is_beyond_points, laid_onto_points
from engine.dense.matching import UNKNOWN, match_lines
from engine.dense.neighbours import MIN_SHARED_POINTS, points_before, rank_neighbours
from engine.dense.rectification import (
    Pinhole,
    Places,
    Rectification,
    WorkingImage,
    rectify,
    working_image,
)
from engine.dense.seen_depth import MAX_RELATIVE_ERROR, inverse_depth_as_seen
from engine.dense_types import (
    DenseImage,
    DenseView,
    DepthEstimate,
    DepthMap,
    DepthProblem,
    DepthStatus,
    SeenDepth,
)
from engine.errors import InferenceError
from engine.geometry import compose_poses, invert_pose
from engine.types import BoolArray, Float32Array, Float64Array, FrameId, Uint8Array

logger = logging.getLogger(__name__)

_MAX_DISPARITY_RATIO = 0.4  # of the edge: the widest range of disparities that is searched
_MAX_SEARCHED = 120.0  # disparities at each pixel by all neighbours together: what matching costs
_MAX_RELATIVE_ERROR = 0.012  # of depth, one standard deviation; less exact is unknown
_MAX_TRIED = 8  # neighbours: each has a bit where it agrees
_MIN_SHARE = 0.005  # of pixels with a depth
_AGREE_SIGMAS = 3.0  # depths differ by so many standard deviations at most
_AGREE_RATIO = 0.004  # or by so much of the depth
_EDGE_WINDOW = 5  # px, about a pixel
_EDGE_STEP, _EDGE_SIGMAS = 0.01, 3.0  # of the depth, and of its standard deviations more
SeeDepth = Callable[[FrameId, FrameId], SeenDepth | None]  # see `ports.SeesDepth`

_BIG_STEP = 1.0  # columns between two pixels: no surface between them


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthOptions:
    """How depth maps are made."""

    edge_px: int  # the longer edge of a depth map at most
    num_neighbours: int  # keyframes that a keyframe is matched with at most


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pair:
    """A neighbour that the keyframe is matched with."""

    neighbour: DenseView
    rectification: Rectification


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    """Depth by one neighbour, on the pixels of the depth map."""

    inverse_depth: Float32Array  # (H, W); 0: unknown
    relative_error: Float32Array  # (H, W)
    max_error: float = _MAX_RELATIVE_ERROR  # less exact is unknown

    @property
    def is_known(self) -> BoolArray:
        """(H, W) where it is exact enough."""
        return self.relative_error < self.max_error


class _Readable:
    """Which images can be read."""

    def __init__(self, images: Mapping[FrameId, DenseImage]) -> None:
        self._images = images
        self.num_lost = 0  # that were asked for and cannot be read

    def __contains__(self, frame_id: FrameId) -> bool:
        try:
            self._images[frame_id]
        except InferenceError:
            self.num_lost += 1
            return False
        return True


def estimate_depth(
    problem: DepthProblem,
    images: Mapping[FrameId, DenseImage],
    options: DepthOptions,
    see_depth: SeeDepth | None = None,
) -> DepthEstimate:
    """The depth map of a keyframe: as a matcher sees it, else matched along lines.

    Args:
        problem: the keyframe and its neighbours.
        images: by keyframe; those of neighbours may be missing, or raise an ``InferenceError``
            when they are asked for. Images may be smaller than their calibrations say, by one
            factor each way.
        options: size and number of neighbours.
        see_depth: by a matcher that sees it; None: there is none. Where it has nothing of use, the
            images are matched.

    Raises:
        InferenceError: the keyframe's own image cannot be read.
    """
    begun_s = time.thread_time()
    status, reason, depth_map = _estimated(problem, images, options, see_depth)
    return DepthEstimate(
        status=status, reason=reason, depth_map=depth_map, cpu_s=time.thread_time() - begun_s
    )


def _estimated(
    problem: DepthProblem,
    images: Mapping[FrameId, DenseImage],
    options: DepthOptions,
    see_depth: SeeDepth | None,
) -> tuple[DepthStatus, str, DepthMap | None]:
    view = problem.view
    points = points_before(view)
    if len(points) < MIN_SHARED_POINTS:
        reason = f"{len(points)} points of the map before it, {MIN_SHARED_POINTS} are needed"
        return DepthStatus.TOO_FEW_POINTS, reason, None
    ranked = rank_neighbours(problem)
    if not ranked:
        reason = f"none of {len(problem.neighbours)} shares enough points at a useful angle"
        return DepthStatus.NO_NEIGHBOUR, reason, None
    available = [neighbour for neighbour in ranked if neighbour.frame_id in images]
    if view.frame_id not in images or not available:
        whose = "its" if view.frame_id not in images else "its neighbours'"
        return DepthStatus.NO_IMAGE, f"{whose} image is not at hand", None
    pinhole = Pinhole.of(view.intrinsics, edge_px=options.edge_px)
    own = _working(view, images[view.frame_id], pinhole)
    if see_depth is not None:
        see = functools.partial(see_depth, view.frame_id)
        seen = _seen(ranked[: options.num_neighbours], own, pinhole, points, see)
        if seen:
            return _outcome(view, seen, own, pinhole, points, how="as the matcher sees it with")
    readable = _Readable(images)
    pairs = _pairs(view, points, available, pinhole, options=options, readable=readable)
    if not pairs:
        status = DepthStatus.NO_IMAGE if readable.num_lost else DepthStatus.NO_NEIGHBOUR
        reason = f"the parallax of {len(available)} neighbours spans too much"
        return (
            status,
            "its neighbours' images cannot be read" if readable.num_lost else reason,
            None,
        )
    grey = _grey(own)
    measured = {
        pair.neighbour: _measure(
            pair.rectification, grey, _other(pair, images, pinhole), pinhole, points
        )
        for pair in pairs
    }
    return _outcome(view, measured, own, pinhole, points, how="by")


def _outcome(
    view: DenseView,
    measured: Mapping[DenseView, _Measured],
    own: WorkingImage,
    pinhole: Pinhole,
    points: Float64Array,
    *,
    how: str,
) -> tuple[DepthStatus, str, DepthMap | None]:
    """What the depth by each neighbour gives."""
    depth_map = _depth_map(view, measured, own, pinhole, points)
    share = float((depth_map.num_agreeing > 0).mean())
    summary = f"{share:.1%} of the pixels have a depth, {how} {len(measured)} neighbours"
    if share < _MIN_SHARE:
        return DepthStatus.NOTHING_AGREES, summary, None
    return DepthStatus.MADE, summary, depth_map


def _seen(
    neighbours: Sequence[DenseView],
    own: WorkingImage,
    pinhole: Pinhole,
    points: Float64Array,
    see: Callable[[FrameId], SeenDepth | None],
) -> dict[DenseView, _Measured]:
    """Depth as a matcher sees it with each neighbour, where it is of use."""
    measured = {}
    for neighbour in neighbours:
        try:
            seen = see(neighbour.frame_id)
        except InferenceError as error:
            logger.warning("depth of a keyframe is matched, not seen: %s", error)
            break
        found = None if seen is None else inverse_depth_as_seen(seen, own, pinhole, points)
        if found is None:
            continue
        inverse_depth, sigma = found
        measured[neighbour] = _Measured(
            inverse_depth=inverse_depth,
            relative_error=np.where(inverse_depth > 0, np.float32(sigma), np.float32(np.inf)),
            max_error=MAX_RELATIVE_ERROR,
        )
    return measured


def _pairs(
    view: DenseView,
    points: Float64Array,
    ranked: Sequence[DenseView],
    pinhole: Pinhole,
    *,
    options: DepthOptions,
    readable: _Readable,
) -> list[_Pair]:
    """The best neighbours whose matching costs no more than it may; one may cost more."""
    area = pinhole.width * pinhole.height
    pairs: list[_Pair] = []
    costly: list[_Pair] = []
    spent = 0.0
    for neighbour in ranked[:_MAX_TRIED]:
        if len(pairs) == options.num_neighbours:
            break
        rectification = rectify(
            pinhole,
            _relative(view, neighbour),
            points,
            max_disparities=round(_MAX_DISPARITY_RATIO * options.edge_px),
        )
        if rectification is None:
            continue
        rectification = rectification.cropped_to(neighbour.intrinsics)
        if rectification is None or neighbour.frame_id not in readable:
            continue
        pair = _Pair(neighbour=neighbour, rectification=rectification)
        searched = rectification.num_disparities * rectification.width * rectification.height / area
        if spent + searched > _MAX_SEARCHED:
            costly.append(pair)
            continue
        spent += searched
        pairs.append(pair)
    return pairs or costly[:1]


def _depth_map(
    view: DenseView,
    measured: Mapping[DenseView, _Measured],
    own: WorkingImage,
    pinhole: Pinhole,
    points: Float64Array,
) -> DepthMap:
    inverse_depth, error, agreeing = _combined(list(measured.values()))
    num_agreeing = np.bitwise_count(agreeing)
    known = (num_agreeing > 0) & _is_off_edges(inverse_depth, error)
    # Another neighbour, at another baseline, would not agree with a wrong period.
    known &= (num_agreeing > 1) | ~is_beyond_points(inverse_depth, pinhole, points)
    depth = np.zeros(inverse_depth.shape, np.float32)
    np.divide(1.0, inverse_depth, out=depth, where=known)
    return DepthMap(
        frame_id=view.frame_id,
        pinhole=pinhole.params,
        depth=depth,
        relative_error=np.where(known, error, np.float32(0.0)),
        num_agreeing=np.where(known, num_agreeing, np.uint8(0)),
        colors=pinhole.colors_of(own),
        neighbour_ids=np.array([one.frame_id for one in measured], np.int64),
        neighbour_from_keyframe=np.stack([_relative(view, one) for one in measured]),
        agreeing_bits=agreeing,
    )


def _relative(view: DenseView, neighbour: DenseView) -> Float64Array:
    return compose_poses(neighbour.cam_from_world, invert_pose(view.cam_from_world))


def _working(
    view: DenseView, image: DenseImage, pinhole: Pinhole, *, is_grey: bool = False
) -> WorkingImage:
    pixels = image.pixels
    if is_grey:
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    return working_image(pixels, image.mask, view.intrinsics, focal_px=pinhole.focal_px)


def _grey(image: WorkingImage) -> WorkingImage:
    pixels = np.asarray(cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    return replace(image, pixels=pixels)


def _other(pair: _Pair, images: Mapping[FrameId, DenseImage], pinhole: Pinhole) -> WorkingImage:
    image = images[pair.neighbour.frame_id]
    return _working(pair.neighbour, image, pinhole, is_grey=True)


def _measure(
    rectification: Rectification,
    own: WorkingImage,
    other: WorkingImage,
    pinhole: Pinhole,
    points: Float64Array,
) -> _Measured:
    """Depth by one neighbour; images are grey, ``points`` (P, 3) before the keyframe."""
    first, first_usable = rectification.image(own, is_neighbour=False)
    second, second_usable = rectification.image(other, is_neighbour=True)
    found = match_lines(
        first,
        second,
        first_usable=first_usable,
        second_usable=second_usable,
        num_disparities=rectification.num_disparities,
    )
    places = rectification.places_of(pinhole)
    disparity, known = _resampled(found.disparity, places)
    sigma = cv2.remap(found.sigma, places.columns, places.lines, cv2.INTER_NEAREST)
    parallax = rectification.parallax_of(disparity, places)
    sine, other_sine = np.sin(parallax), np.sin(places.angle + parallax)
    known &= (sine > 0) & (other_sine > 0)
    # Sine rule in the triangle of both centres and the point; the radius is that at depth 1.
    length = places.radius / np.sin(places.angle)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse_depth = sine * length / (np.float32(rectification.baseline) * other_sine)
        error = sigma * np.float32(rectification.parallax_step)
        error *= np.sin(places.angle) / (other_sine * sine)
    measured = np.where(known, inverse_depth, np.float32(0.0))
    laid = laid_onto_points(measured, pinhole, points)
    factor = np.float32(error_factor(laid, error, pinhole, points))
    return _Measured(
        inverse_depth=laid,
        relative_error=np.where(known, error * factor, np.float32(np.inf)),
    )


def _resampled(disparity: Float32Array, places: Places) -> tuple[Float32Array, BoolArray]:
    """Disparities at places between pixels; where those around differ, the nearest one's."""
    nearest, smooth = (
        cv2.remap(disparity, places.columns, places.lines, how, borderValue=UNKNOWN)
        for how in (cv2.INTER_NEAREST, cv2.INTER_LINEAR)
    )
    is_smooth = np.abs(smooth - nearest) < _BIG_STEP
    return np.where(is_smooth, smooth, nearest), nearest > UNKNOWN


def _is_off_edges(inverse_depth: Float32Array, error: Float32Array) -> BoolArray:
    """Whether pixels (H, W) keep away from steps of depth, about which it is not known whose it is.

    Matching in blocks lets what is in front grow into what is behind. On a slope the pixel lies
    in the middle of those around, at a step near one end of them.
    """
    window = np.ones((_EDGE_WINDOW, _EDGE_WINDOW), np.uint8)
    nearest = cv2.dilate(inverse_depth, window)
    unknown_far = np.where(inverse_depth > 0, inverse_depth, np.float32(np.inf))
    farthest = cv2.erode(unknown_far, window)
    step = np.abs(nearest + farthest - 2.0 * inverse_depth)
    return np.asarray(step < (_EDGE_STEP + _EDGE_SIGMAS * error) * inverse_depth)


def _combined(
    measured: Sequence[_Measured],
) -> tuple[Float32Array, Float32Array, Uint8Array]:
    """Inverse depth (0: unknown), its relative error, and which neighbours agree (bits), (H, W).

    Depths that agree are averaged; where the first two contradict each other, none is known.
    """
    first = measured[0]
    agreeing = first.is_known.astype(np.uint8)
    mean, weight = first.inverse_depth, 1.0 / first.relative_error**2
    is_contradicted = np.zeros(mean.shape, np.bool_)
    for number, other in enumerate(measured[1:], start=1):
        other_known = other.is_known
        other_weight = 1.0 / other.relative_error**2
        both = other_known & (agreeing > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            tolerance = np.maximum(
                _AGREE_SIGMAS * np.sqrt(1.0 / weight + 1.0 / other_weight), _AGREE_RATIO
            )
            agrees = both & (np.abs(other.inverse_depth - mean) < tolerance * mean)
            total = weight + other_weight
            average = (weight * mean + other_weight * other.inverse_depth) / total
        is_contradicted |= both & ~agrees & (np.bitwise_count(agreeing) == 1)
        alone = other_known & (agreeing == 0)
        mean = np.where(agrees, average, np.where(alone, other.inverse_depth, mean))
        weight = np.where(agrees, total, np.where(alone, other_weight, weight))
        agreeing |= (agrees | alone).astype(np.uint8) << np.uint8(number)
    agreeing[is_contradicted & (np.bitwise_count(agreeing) == 1)] = 0
    known = agreeing > 0
    error = np.zeros(mean.shape, np.float32)
    np.divide(1.0, np.sqrt(weight), out=error, where=known)
    return np.where(known, mean, np.float32(0.0)), error, agreeing
