"""Depth of a keyframe from its image, its neighbours' and their poses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from engine.dense.matching import match_lines
from engine.dense.neighbours import MIN_SHARED_POINTS, points_before, rank_neighbours
from engine.dense.rectification import (
    Pinhole,
    Rectification,
    WorkingImage,
    rectify,
    working_image,
)
from engine.dense_types import (
    DenseImage,
    DenseView,
    DepthEstimate,
    DepthMap,
    DepthProblem,
    DepthStatus,
)
from engine.geometry import compose_poses, invert_pose
from engine.types import BoolArray, Float32Array, Float64Array, FrameId, Uint8Array

_MAX_DISPARITY_RATIO = 0.4  # of the edge: the widest range of disparities that is searched
_AGREE_SIGMAS = 3.0  # depths differ by so many standard deviations at most
_AGREE_RATIO = 0.004  # or by so much of the depth
_BIG_STEP = 1.0  # columns between two pixels: no surface between them


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthOptions:
    """How depth maps are made."""

    edge_px: int = 640  # the longer edge of a depth map at most
    num_neighbours: int = 2  # images that a keyframe is matched with at most
    max_relative_error: float = (
        0.01  # one standard deviation of depth / depth; less exact is unknown
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    """Depth by one neighbour, on the pixels of the depth map."""

    inverse_depth: Float32Array  # (H, W); 0: unknown
    relative_error: Float32Array  # (H, W)


def estimate_depth(
    problem: DepthProblem, images: Mapping[FrameId, DenseImage], options: DepthOptions
) -> DepthEstimate:
    """The depth map of a keyframe.

    Args:
        problem: the keyframe and its neighbours.
        images: by keyframe; those of neighbours may be missing. Images may be smaller than their
            calibrations say, by one factor each way.
        options: size and number of neighbours.
    """
    begun_s = time.thread_time()
    status, reason, depth_map = _estimated(problem, images, options)
    return DepthEstimate(
        status=status, reason=reason, depth_map=depth_map, cpu_s=time.thread_time() - begun_s
    )


def _estimated(
    problem: DepthProblem, images: Mapping[FrameId, DenseImage], options: DepthOptions
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
    rays = pinhole.rays()
    measured: list[_Measured] = []
    used: list[DenseView] = []
    grey = _grey(own)
    for neighbour in available:
        if len(used) == options.num_neighbours:
            break
        rectification = rectify(
            pinhole,
            _relative(view, neighbour),
            points,
            max_disparities=round(_MAX_DISPARITY_RATIO * options.edge_px),
        )
        if rectification is None:
            continue
        other = _grey(_working(neighbour, images[neighbour.frame_id], pinhole))
        measured.append(_measure(rectification, grey, other, rays))
        used.append(neighbour)
    if not used:
        reason = f"the parallax of {len(available)} neighbours spans too much"
        return DepthStatus.NO_NEIGHBOUR, reason, None
    inverse_depth, error, num_agreeing = _combined(
        measured, max_relative_error=options.max_relative_error
    )
    share = float((num_agreeing > 0).mean())
    if share < 0.005:
        reason = f"{share:.2%} of the pixels have a depth that {len(used)} neighbours agree on"
        return DepthStatus.NOTHING_AGREES, reason, None
    columns, lines = own.sampled(rays.reshape(-1, 3).astype(np.float64))
    shape = inverse_depth.shape
    colors = cv2.remap(own.pixels, columns.reshape(shape), lines.reshape(shape), cv2.INTER_LINEAR)
    known = num_agreeing > 0
    depth = np.zeros(shape, np.float32)
    np.divide(1.0, inverse_depth, out=depth, where=known)
    depth_map = DepthMap(
        frame_id=view.frame_id,
        pinhole=pinhole.params,
        depth=depth,
        relative_error=np.where(known, error, np.float32(0.0)),
        num_agreeing=num_agreeing,
        colors=np.asarray(colors, np.uint8),
        neighbour_ids=np.array([neighbour.frame_id for neighbour in used], np.int64),
        neighbour_from_keyframe=np.stack([_relative(view, neighbour) for neighbour in used]),
    )
    return DepthStatus.MADE, f"{share:.0%} of the pixels, by {len(used)} neighbours", depth_map


def _relative(view: DenseView, neighbour: DenseView) -> Float64Array:
    return compose_poses(neighbour.cam_from_world, invert_pose(view.cam_from_world))


def _working(view: DenseView, image: DenseImage, pinhole: Pinhole) -> WorkingImage:
    return working_image(image.pixels, image.mask, view.intrinsics, focal_px=pinhole.focal_px)


def _grey(image: WorkingImage) -> WorkingImage:
    return WorkingImage(
        pixels=np.asarray(cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY), np.uint8),
        usable=image.usable,
        intrinsics=image.intrinsics,
    )


def _measure(
    rectification: Rectification, own: WorkingImage, other: WorkingImage, rays: Float32Array
) -> _Measured:
    first, first_usable = rectification.image(own, is_neighbour=False)
    second, second_usable = rectification.image(other, is_neighbour=True)
    found = match_lines(
        first,
        second,
        first_usable=first_usable,
        second_usable=second_usable,
        num_disparities=rectification.num_disparities,
    )
    columns, lines, angle = rectification.places_of(rays)
    disparity, known = _resampled(found.disparity, columns, lines)
    sigma = cv2.remap(found.sigma, columns, lines, cv2.INTER_NEAREST)
    parallax = rectification.parallax_of(disparity, columns, lines)
    known &= parallax > 0
    sine, other_sine = np.sin(angle), np.sin(angle + parallax)
    known &= other_sine > 0
    # Sine rule in the triangle of both centres and the point; rays have z = 1.
    length = np.sqrt((rays * rays).sum(axis=2))
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse_depth = np.sin(parallax) * length / (rectification.baseline * other_sine)
        error = sigma * rectification.parallax_step * sine / (other_sine * np.sin(parallax))
    return _Measured(
        inverse_depth=np.where(known, inverse_depth, 0.0).astype(np.float32),
        relative_error=np.where(known, error, np.inf).astype(np.float32),
    )


def _resampled(
    disparity: Float32Array, columns: Float32Array, lines: Float32Array
) -> tuple[Float32Array, BoolArray]:
    """Disparities at places between pixels; where those around differ, the nearest one's."""
    nearest = cv2.remap(disparity, columns, lines, cv2.INTER_NEAREST, borderValue=-1.0)
    smooth = cv2.remap(disparity, columns, lines, cv2.INTER_LINEAR, borderValue=-1000.0)
    is_smooth = np.abs(smooth - nearest) < _BIG_STEP
    return np.where(is_smooth, smooth, nearest), nearest >= 0


def _combined(
    measured: Sequence[_Measured], *, max_relative_error: float
) -> tuple[Float32Array, Float32Array, Uint8Array]:
    """Inverse depth (0: unknown), its relative error, and how many neighbours agree, (H, W).

    Each pixel takes the mean of those that agree with the most; where they contradict each other
    and none has more on its side than another, it stays unknown.
    """
    inverse = np.stack([one.inverse_depth for one in measured])
    error = np.stack([one.relative_error for one in measured])
    known = (inverse > 0) & (error < max_relative_error)
    error = np.where(known, error, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.abs(inverse[:, None] / inverse[None] - 1.0)
        tolerance = np.maximum(
            _AGREE_SIGMAS * np.sqrt(error[:, None] ** 2 + error[None] ** 2), _AGREE_RATIO
        )
        agrees = known[:, None] & known[None] & (difference < tolerance)
    votes = agrees.sum(axis=1)
    anchor = votes.argmax(axis=0)[None]
    own = np.take_along_axis(agrees, anchor[None], axis=0)[0]
    weight = np.where(own, 1.0 / error**2, 0.0)
    total = weight.sum(axis=0)
    num_agreeing = own.sum(axis=0)
    kept = (num_agreeing > 1) | (known.sum(axis=0) == 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(kept, (weight * inverse).sum(axis=0) / total, 0.0)
        combined = np.where(kept, 1.0 / np.sqrt(total), 0.0)
    return (
        mean.astype(np.float32),
        combined.astype(np.float32),
        np.where(kept, num_agreeing, 0).astype(np.uint8),
    )
