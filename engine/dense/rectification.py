"""Epipolar rectification of two calibrated views of any lens, whatever way the camera moved.

Pixels of a rectified image are viewing rays about the baseline: a line holds one half of an
epipolar plane, a column the angle from the baseline. A point lies on the same line of both images,
and its disparity is its parallax angle, so that one matcher of lines serves sideways, vertical and
forward motion (polar rectification: Pollefeys, Koch and Van Gool, ICCV 1999, with angles in place
of pixels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
import pycolmap

from engine.dense.robust_fit import robust_fit
from engine.estimators.lenses import camera_of
from engine.geometry import skew
from engine.types import BoolArray, Float32Array, Float64Array, Intrinsics, Uint8Array

_NUM_LENSES = 32  # kept
_BORDER_PX = 3  # of an image that are of no use: blocks reach beyond it
_NODE_PX = 8  # lens and rotation are worked out at every so many pixels, and interpolated
_MAX_TANGENT = 1.0  # of half the field of view of a depth map
_MAX_AREA_RATIO = 1.5  # of a rectified image to the depth map: about the epipole lines crowd
_ABOUT_SAME_SIZE = 0.97  # an image is not resampled for less
_MIN_POINTS_OF_PLANE = 12
_MAX_SHEAR = 0.4  # columns of disparity a column
_MIN_EDGE_PX = 16  # of a rectified image
_PERCENTILES = np.array([0.01, 0.99])  # of the sparse points' disparities
_RANGE_MARGIN, _RANGE_MARGIN_PX = 0.1, 2.0  # added to either side of the range of disparities
_LARGEST_ANGLE_MARGIN_RAD = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinhole:
    """The pinhole camera of a depth map."""

    focal_px: float
    center_x_px: float
    center_y_px: float
    width: int
    height: int

    @classmethod
    def of(cls, intrinsics: Intrinsics, *, edge_px: int) -> Pinhole:
        """The pinhole with a view's field of view up to 90 degrees, and at most its resolution."""
        lens = lens_of(intrinsics)
        size = np.array([intrinsics.width, intrinsics.height], np.float64)
        middles = np.array([[0.0, 0.5], [1.0, 0.5], [0.5, 0.0], [0.5, 1.0]]) * size
        rays = np.asarray(lens.camera.cam_ray_from_img(middles)).reshape(-1, 3)
        reach = np.array([-rays[0, 0], rays[1, 0], -rays[2, 1], rays[3, 1]])
        with np.errstate(divide="ignore", invalid="ignore"):
            tangents = np.where(rays[:, 2] > 0, reach / rays[:, 2], _MAX_TANGENT)
        tangents = np.clip(np.nan_to_num(tangents, nan=_MAX_TANGENT), 0.05, _MAX_TANGENT)
        left, right, up, down = tangents
        longest = max(left + right, up + down)
        focal_px = min(lens.focal_px, edge_px / longest)
        return cls(
            focal_px=focal_px,
            center_x_px=focal_px * left,
            center_y_px=focal_px * up,
            width=max(1, round(focal_px * (left + right))),
            height=max(1, round(focal_px * (up + down))),
        )

    @property
    def params(self) -> Float64Array:
        """fx, fy, cx, cy in px, (4,)."""
        return np.array([self.focal_px, self.focal_px, self.center_x_px, self.center_y_px])

    def plane_xy(
        self, columns: Float64Array, lines: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """X (1, C) and y (L, 1) of the rays, z = 1, of columns (C,) and lines (L,), from 0 on."""
        x = (columns + 0.5 - self.center_x_px) / self.focal_px
        y = (lines + 0.5 - self.center_y_px) / self.focal_px
        return x[None], y[:, None]

    def rays_of(self, columns: Float64Array, lines: Float64Array) -> Float64Array:
        """Rays (L, C, 3), z = 1, of columns (C,) and lines (L,), from 0 on."""
        x, y = self.plane_xy(columns, lines)
        return np.stack(np.broadcast_arrays(x, y, np.ones((1, 1))), axis=-1)

    def pixels_in(self, image: WorkingImage) -> tuple[Float32Array, Float32Array]:
        """Columns and lines (H, W) in ``image``, for ``cv2.remap``, of what the pinhole sees."""
        nodes = image.sampled(self.rays_of(_nodes(self.width), _nodes(self.height)))
        columns, lines = (
            _between_nodes(node, width=self.width, height=self.height) for node in nodes
        )
        return columns, lines

    def colors_of(self, image: WorkingImage) -> Uint8Array:
        """The image (H, W, 3) that the pinhole sees of an image in colour."""
        columns, lines = self.pixels_in(image)
        return np.asarray(cv2.remap(image.pixels, columns, lines, cv2.INTER_LINEAR), np.uint8)

    def pixels_of(self, points_in_cam: Float64Array) -> Float64Array:
        """Where points (N, 3) before the camera are seen, (N, 2) px."""
        plane_xy = points_in_cam[:, :2] / points_in_cam[:, 2:]
        return np.asarray(plane_xy * self.focal_px + [self.center_x_px, self.center_y_px])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WorkingImage:
    """An image at the resolution of a depth map, with its lens."""

    pixels: Uint8Array  # (H, W) grey, or (H, W, 3)
    usable: Uint8Array  # (H, W) 255 or 0
    intrinsics: Intrinsics  # of the original size

    def sampled(self, rays: Float64Array) -> tuple[Float32Array, Float32Array]:
        """Columns and lines of rays (..., 3) in ``pixels``, for ``cv2.remap``; far out: -1e4."""
        scale = np.array(self.pixels.shape[1::-1]) / [self.intrinsics.width, self.intrinsics.height]
        points_xy = np.clip(pixels_of_rays(self.intrinsics, rays) * scale - 0.5, -1e4, 1e4)
        columns, lines = np.moveaxis(np.nan_to_num(points_xy, nan=-1e4).astype(np.float32), -1, 0)
        return np.ascontiguousarray(columns), np.ascontiguousarray(lines)


def pixels_of_rays(intrinsics: Intrinsics, rays: Float64Array) -> Float64Array:
    """Where a lens shows rays (..., 3), (..., 2) px; not a number where it cannot."""
    lens = lens_of(intrinsics)
    flat = rays.reshape(-1, 3)
    points_xy = np.array(lens.camera.img_from_cam(flat), np.float64).reshape(-1, 2)
    lengths = np.sqrt(np.einsum("ij,ij->i", flat, flat))
    points_xy[flat[:, 2] < lens.least_cosine * lengths] = np.nan
    return points_xy.reshape(*rays.shape[:-1], 2)


def _nodes(num: int) -> Float64Array:
    """Pixels of a line, a step apart, that enclose all ``num`` of it."""
    return np.asarray((np.arange(-(-num // _NODE_PX) + 2) - 0.5) * _NODE_PX - 0.5, np.float64)


def _between_nodes(values: Float32Array, *, width: int, height: int) -> Float32Array:
    """Values at every pixel (H, W) of those at the nodes of lines and columns."""
    finer = cv2.resize(values, None, fx=_NODE_PX, fy=_NODE_PX, interpolation=cv2.INTER_LINEAR)
    return np.asarray(finer[_NODE_PX : _NODE_PX + height, _NODE_PX : _NODE_PX + width])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lens:
    """COLMAP's camera of a calibration, and how far it sees."""

    camera: pycolmap.Camera  # not to be changed
    focal_px: float  # pixels a radian at the centre of the image
    least_cosine: float  # of the angles from the optical axis at which the image has pixels


@lru_cache(maxsize=_NUM_LENSES)
def lens_of(intrinsics: Intrinsics) -> Lens:
    """The lens of a calibration; the same one is asked for many times a depth map."""
    camera = camera_of(intrinsics)
    return Lens(
        camera=camera,
        focal_px=_central_focal_px(camera),
        least_cosine=math.cos(_largest_angle(camera)),
    )


def _central_focal_px(camera: pycolmap.Camera) -> float:
    """Pixels a radian at the centre of the image."""
    center = np.array([camera.width, camera.height]) / 2.0
    rays = np.asarray(camera.cam_ray_from_img(center + np.array([[-0.5, 0.0], [0.5, 0.0]])))
    return 1.0 / max(float(np.linalg.norm(rays[1] - rays[0])), 1e-9)


def _largest_angle(camera: pycolmap.Camera) -> float:
    """The largest angle from the optical axis at which the image has pixels, radians."""
    steps = np.linspace(0.0, 1.0, 9)
    ends = np.array([0.0, 1.0])
    border = np.concatenate(
        [
            np.stack(np.meshgrid(steps, ends), axis=-1).reshape(-1, 2),
            np.stack(np.meshgrid(ends, steps), axis=-1).reshape(-1, 2),
        ]
    )
    rays = np.asarray(camera.cam_ray_from_img(border * [camera.width, camera.height]))
    rays = rays.reshape(-1, 3)
    rays = rays[np.isfinite(rays).all(axis=1)]
    if not len(rays):
        return math.pi
    cosine = (rays[:, 2] / np.linalg.norm(rays, axis=1)).min()
    return math.acos(np.clip(cosine, -1.0, 1.0)) + _LARGEST_ANGLE_MARGIN_RAD


def working_image(
    pixels: Uint8Array, usable: BoolArray | None, intrinsics: Intrinsics, *, focal_px: float
) -> WorkingImage:
    """An image, made smaller to about so many pixels a radian at its centre.

    Args:
        pixels: (H, W) grey or (H, W, 3), of the calibration's size or smaller by the same factor
            each way.
        usable: (H, W) mask, or None.
        intrinsics: its calibration.
        focal_px: of the depth map; the image is never made larger.
    """
    height, width = pixels.shape[:2]
    ratio = focal_px / (lens_of(intrinsics).focal_px * width / intrinsics.width)
    if ratio < _ABOUT_SAME_SIZE:
        width, height = max(2, round(width * ratio)), max(2, round(height * ratio))
        pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))
    levels = np.full((height, width), 255, np.uint8)
    if usable is not None:
        mask = usable.astype(np.uint8) * np.uint8(255)
        levels = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST))
    levels[:_BORDER_PX] = levels[-_BORDER_PX:] = 0
    levels[:, :_BORDER_PX] = levels[:, -_BORDER_PX:] = 0
    return WorkingImage(pixels=pixels, usable=levels, intrinsics=intrinsics)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Where the pixels of a depth map are in the keyframe's rectified image."""

    columns: Float32Array  # (H, W)
    lines: Float32Array  # (H, W)
    angle: Float32Array  # (H, W) from the baseline, radians
    radius: Float32Array  # (H, W) from the baseline, of the point at depth 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rectification:
    """The rectified images of a keyframe and a neighbour, still without pixels.

    A pixel of line r and column c of the keyframe's image holds the ray at the angle
    ``first_turn + r * line_step`` about the baseline, counted from ``axes[0]`` to ``axes[1]``, and
    at the angle ``first_angle - c * column_step`` from the baseline (``axes[2]``). The neighbour's
    image is sheared by what disparity is expected where (``expected``), so that disparities are
    small and those of a dominant plane alike.
    """

    neighbour_from_keyframe: Float64Array  # (3, 4)
    axes: Float64Array  # (3, 3) unit vectors in the keyframe's frame; the last is the baseline
    baseline: float  # map units
    first_turn: float  # radians
    line_step: float
    first_angle: float
    column_step: float
    expected: Float64Array  # (3,) columns: at the start, its growth a column and a line
    num_disparities: int  # columns
    width: int
    height: int

    def expected_at(self, columns: Float64Array, lines: Float64Array) -> Float64Array:
        """The disparity from which is searched, in columns."""
        at_start, per_column, per_line = self.expected
        return np.asarray(at_start + per_column * columns + per_line * lines)

    def rays_of(
        self, columns: Float64Array, lines: Float64Array, *, is_neighbour: bool
    ) -> Float64Array:
        """Rays (L, C, 3) of columns (C,) and lines (L,), in the frame of the image's camera."""
        at, line = np.meshgrid(columns, lines)
        if is_neighbour:
            at = at - self.expected_at(at, line)
        angle = self.first_angle - at * self.column_step
        turn = self.first_turn + line * self.line_step
        rays = np.stack(
            [np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), np.cos(angle)], axis=-1
        )
        rotation = self.neighbour_from_keyframe[:, :3] if is_neighbour else np.eye(3)
        return np.asarray(rays @ (self.axes @ rotation.T))

    def cropped_to(self, neighbour: Intrinsics) -> Rectification | None:
        """The part that the neighbour's image can show; None where that is next to nothing."""
        columns = np.arange(
            -self.num_disparities, self.width + _NODE_PX, _NODE_PX, dtype=np.float64
        )
        lines = np.arange(0, self.height + _NODE_PX, _NODE_PX, dtype=np.float64)
        seen_xy = pixels_of_rays(neighbour, self.rays_of(columns, lines, is_neighbour=True))
        with np.errstate(invalid="ignore"):
            between = (seen_xy > 0) & (seen_xy < (neighbour.width, neighbour.height))
        is_inside = np.asarray(between.all(axis=-1))
        if not is_inside.any():
            return None
        seen_columns = columns[is_inside.any(axis=0)][[0, -1]]
        seen_lines = lines[is_inside.any(axis=1)][[0, -1]]
        left = int(max(seen_columns[0] - _NODE_PX, 0))
        right = int(min(seen_columns[1] + self.num_disparities + _NODE_PX, self.width))
        top = int(max(seen_lines[0] - _NODE_PX, 0))
        bottom = int(min(seen_lines[1] + _NODE_PX, self.height))
        if right - left < _MIN_EDGE_PX or bottom - top < _MIN_EDGE_PX:
            return None
        return replace(
            self,
            first_turn=self.first_turn + top * self.line_step,
            first_angle=self.first_angle - left * self.column_step,
            expected=self.expected
            + [self.expected_at(np.array(left), np.array(top)) - self.expected[0], 0.0, 0.0],
            width=right - left,
            height=bottom - top,
        )

    def image(self, image: WorkingImage, *, is_neighbour: bool) -> tuple[Uint8Array, Uint8Array]:
        """The rectified pixels (H, D + W), and whether they are of use, 255 or 0.

        The matcher needs columns -D to -1 to search ``num_disparities`` D at column 0.
        """
        width, height = self.width + self.num_disparities, self.height
        columns, lines = _nodes(width) - self.num_disparities, _nodes(height)
        nodes = image.sampled(self.rays_of(columns, lines, is_neighbour=is_neighbour))
        maps = [_between_nodes(node, width=width, height=height) for node in nodes]
        pixels = cv2.remap(
            image.pixels, maps[0], maps[1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        usable = cv2.remap(image.usable, maps[0], maps[1], cv2.INTER_NEAREST)
        return np.asarray(pixels, np.uint8), np.asarray(usable, np.uint8)

    def places_of(self, pinhole: Pinhole) -> Places:
        """Where the pixels of the keyframe's depth map are."""
        columns = np.arange(pinhole.width, dtype=np.float64)
        lines = np.arange(pinhole.height, dtype=np.float64)
        x, y = pinhole.plane_xy(columns, lines)
        across, down, along = (
            (row[0] * x).astype(np.float32) + (row[1] * y + row[2]).astype(np.float32)
            for row in self.axes
        )
        radius = np.sqrt(across * across + down * down)
        angle = np.arctan2(radius, along)
        turn = np.arctan2(down, across)
        return Places(
            columns=(np.float32(self.first_angle) - angle) * np.float32(1.0 / self.column_step),
            lines=(turn - np.float32(self.first_turn)) * np.float32(1.0 / self.line_step),
            angle=angle,
            radius=radius,
        )

    def parallax_of(self, disparity: Float32Array, places: Places) -> Float32Array:
        """Parallax angles in radians of disparities at places."""
        at_start, per_column, per_line = (self.expected * self.column_step).astype(np.float32)
        return np.asarray(
            at_start
            + places.columns * per_column
            + places.lines * per_line
            + disparity * np.float32(self.parallax_step)
        )

    @property
    def parallax_step(self) -> float:
        """The parallax angle of a column of disparity, in radians."""
        return float(self.column_step * (1.0 - self.expected[1]))


def rectify(
    pinhole: Pinhole,
    neighbour_from_keyframe: Float64Array,
    points_in_keyframe: Float64Array,
    *,
    max_disparities: int,
) -> Rectification | None:
    """The rectification of a keyframe's field of view and a neighbour.

    Args:
        pinhole: of the keyframe's depth map.
        neighbour_from_keyframe: (3, 4).
        points_in_keyframe: (P, 3) sparse points, from which the range of disparities is taken.
        max_disparities: a wider range is refused.

    Returns:
        None where there is no baseline, or where the range of disparities is too wide.
    """
    center = -neighbour_from_keyframe[:, :3].T @ neighbour_from_keyframe[:, 3]
    baseline = float(np.linalg.norm(center))
    if not baseline > 0.0 or len(points_in_keyframe) == 0:
        return None
    axes = _axes(center / baseline)
    step = 1.0 / pinhole.focal_px
    turns, angles = _extent(pinhole, axes)
    line_step = step / max(math.sin(angle) for angle in np.linspace(*angles, 9))
    width = math.ceil((angles[1] - angles[0]) / step) + 1
    height = math.ceil((turns[1] - turns[0]) / line_step) + 1
    crowd = width * height / (_MAX_AREA_RATIO * pinhole.width * pinhole.height)
    if crowd > 1.0:
        line_step *= crowd
        height = math.ceil((turns[1] - turns[0]) / line_step) + 1
    in_axes = points_in_keyframe @ axes.T
    turn = np.arctan2(in_axes[:, 1], in_axes[:, 0])
    angle = np.arctan2(np.hypot(in_axes[:, 0], in_axes[:, 1]), in_axes[:, 2])
    expected, num_disparities = _disparity_range(
        (angles[1] - angle) / step,
        (turn - turns[0]) / line_step,
        _parallax(points_in_keyframe, center) / step,
        is_full_turn=turns[1] - turns[0] > math.pi,
    )
    if num_disparities > max_disparities:
        return None
    return Rectification(
        neighbour_from_keyframe=neighbour_from_keyframe,
        axes=axes,
        baseline=baseline,
        first_turn=turns[0],
        line_step=line_step,
        first_angle=angles[1],
        column_step=step,
        expected=expected,
        num_disparities=num_disparities,
        width=width,
        height=height,
    )


def _axes(along: Float64Array) -> Float64Array:
    """Axes about a baseline, the first as near to the optical axis as can be."""
    forward = np.array([0.0, 0.0, 1.0]) - along[2] * along
    if np.linalg.norm(forward) < 1e-6:
        forward = np.array([1.0, 0.0, 0.0]) - along[0] * along
    forward = forward / np.linalg.norm(forward)
    return np.stack([forward, np.cross(along, forward), along])


def _parallax(points_in_keyframe: Float64Array, center: Float64Array) -> Float64Array:
    """Angles (P,) in radians under which points see the baseline."""
    cosine_part = np.einsum("ij,ij->i", points_in_keyframe, points_in_keyframe - center)
    sine_part = np.linalg.norm(points_in_keyframe @ skew(center), axis=1)
    return np.asarray(np.arctan2(sine_part, cosine_part))


def _disparity_range(
    columns: Float64Array, lines: Float64Array, disparity: Float64Array, *, is_full_turn: bool
) -> tuple[Float64Array, int]:
    """The disparities expected over the image, and how many columns are searched from there.

    Most scenes are ground, a wall or a floor for the most part. Disparities of a plane grow about
    linearly over the image, so that those of the sparse points lie close to such a growth.

    Args:
        columns: (P,) of the sparse points.
        lines: (P,).
        disparity: (P,) columns.
        is_full_turn: whether lines go all around the baseline, where no growth is expected.
    """
    best: tuple[Float64Array, float, float] = (np.zeros(3), *_spread(disparity))
    growth = np.column_stack([np.ones(len(columns)), columns, lines * (not is_full_turn)])
    if len(columns) >= _MIN_POINTS_OF_PLANE:
        plane = robust_fit(growth, disparity, noise=1.0, slope_weight=0.0)
        if abs(plane[1]) < _MAX_SHEAR:
            low, high = _spread((disparity - growth @ plane) / (1.0 - plane[1]))
            if high - low < best[2] - best[1]:
                best = plane, low, high
    plane, low, high = best
    wider = _RANGE_MARGIN * (high - low) + _RANGE_MARGIN_PX
    plane = plane + [(low - wider) * (1.0 - plane[1]), 0.0, 0.0]
    return plane, math.ceil((high - low + 2.0 * wider) / 16.0) * 16


def _spread(disparity: Float64Array) -> tuple[float, float]:
    """The first and the last percentile."""
    ordered = np.sort(disparity)
    low, high = np.interp(_PERCENTILES * (len(ordered) - 1), np.arange(len(ordered)), ordered)
    return float(low), float(high)


def _extent(
    pinhole: Pinhole, axes: Float64Array
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Least and largest turn about the baseline, and angle from it, of the field of view."""
    columns, lines = np.linspace(0, pinhole.width - 1, 33), np.linspace(0, pinhole.height - 1, 33)
    rays = pinhole.rays_of(columns, lines).reshape(-1, 3) @ axes.T
    turn = np.arctan2(rays[:, 1], rays[:, 0])
    angle = np.arctan2(np.hypot(rays[:, 0], rays[:, 1]), rays[:, 2])
    turns = (float(turn.min()), float(turn.max()))
    angles = [float(angle.min()), float(angle.max())]
    for sign, k in ((1.0, 0), (-1.0, 1)):
        pole = sign * axes[2]
        if pole[2] > 0:
            x, y = pinhole.pixels_of(pole[None])[0]
            if 0 <= x <= pinhole.width and 0 <= y <= pinhole.height:
                turns = (-math.pi, math.pi)
                angles[k] = 0.0 if k == 0 else math.pi
    return turns, (angles[0], angles[1])
