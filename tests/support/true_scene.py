"""A street scene known at every ray, shared by tests of what looks the truth up.

World axes: x east, y north, z up, in metres. Flat ground, a wall that hides some of it, and sky.
"""

from __future__ import annotations

import numpy as np

from adapters.town.oracle import TrueView
from engine.geometry import camera_center, transform_points
from engine.types import BoolArray, Features, Float64Array, Frame, FrameId, Keyframe
from tests.support.synthetic import look_at

WIDTH, HEIGHT = 320, 240
FOCAL_PX = 250.0
WALL_Y, WALL_HALF_WIDTH, WALL_HEIGHT = 8.0, 1.5, 2.5

_INTRINSICS = (FOCAL_PX, FOCAL_PX, WIDTH / 2, HEIGHT / 2)
_AHEAD = np.array([0.0, 10.0, -2.0])
_EYES = np.array([(-1.5, 0.0, 3.0), (-0.5, 0.0, 3.0), (0.5, 0.3, 3.0), (2.0, 0.0, 3.2)])
# Four cameras side by side that look north, and one that looks back.
POSES = np.array(
    [*(look_at(eye, eye + _AHEAD) for eye in _EYES), look_at(_EYES[0], _EYES[0] - (0, 10.0, 2.0))]
)


def rays_of(index: int, points_xy: Float64Array) -> Float64Array:
    """Directions (N, 3) in the world of points (N, 2) px, of depth one."""
    focal_x, focal_y, center_x, center_y = _INTRINSICS
    plane = (points_xy - (center_x, center_y)) / (focal_x, focal_y)
    in_cam = np.column_stack([plane, np.ones(len(plane))])
    rays: Float64Array = in_cam @ POSES[index][:, :3]
    return rays


def depths_along(eye: Float64Array, rays: Float64Array) -> Float64Array:
    """Depths (N,) of what rays (N, 3) meet first, inf in the sky."""
    with np.errstate(divide="ignore"):
        to_ground = np.where(rays[:, 2] < 0, -eye[2] / rays[:, 2], np.inf)
        to_wall = np.where(rays[:, 1] > 0, (WALL_Y - eye[1]) / rays[:, 1], np.inf)
    finite = np.where(np.isfinite(to_wall), to_wall, 0.0)
    at_wall = eye + finite[:, None] * rays
    is_wall = (np.abs(at_wall[:, 0]) <= WALL_HALF_WIDTH) & (at_wall[:, 2] <= WALL_HEIGHT)
    is_wall &= np.isfinite(to_wall) & (at_wall[:, 2] >= 0)
    return np.minimum(to_ground, np.where(is_wall, to_wall, np.inf))


def points_at(index: int, points_xy: Float64Array) -> Float64Array:
    """What a camera sees at points (N, 2) px: positions (N, 3), infinite in the sky."""
    eye, rays = camera_center(POSES[index]), rays_of(index, points_xy)
    depths = depths_along(eye, rays)
    with np.errstate(invalid="ignore"):
        return np.asarray(eye + depths[:, None] * rays)


def project(index: int, points: Float64Array) -> Float64Array:
    """Where points (N, 3) are in an image, (N, 2) px."""
    focal_x, focal_y, center_x, center_y = _INTRINSICS
    in_cam = transform_points(POSES[index], points)
    return np.asarray(in_cam[:, :2] / in_cam[:, 2:] * (focal_x, focal_y) + (center_x, center_y))


def is_hidden(index: int, points: Float64Array, *, margin_m: float = 0.2) -> BoolArray:
    """Whether something stands clearly before points (N, 3) as a camera sees them."""
    eye = camera_center(POSES[index])
    rays = points - eye  # of length one at the point
    return np.asarray(depths_along(eye, rays) < 1.0 - margin_m / np.linalg.norm(rays, axis=1))


def true_view(index: int) -> TrueView:
    """What is true of an image at the centres of its pixels."""
    centers = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), axis=-1)
    depths = depths_along(camera_center(POSES[index]), rays_of(index, centers.reshape(-1, 2)))
    return TrueView(
        depth_m=depths.reshape(HEIGHT, WIDTH).astype(np.float32),
        cam_from_world=POSES[index],
        intrinsics=_INTRINSICS,
    )


def frame_of(index: int) -> Frame:
    """A frame of the scene; its picture shows nothing of it, only corners all over."""
    rng = np.random.default_rng((30, index))
    coarse = rng.integers(0, 256, (HEIGHT // 10, WIDTH // 10, 3)).astype(np.uint8)
    return Frame(
        frame_id=FrameId(index + 1),
        camera_key="camera",
        source="scene",
        index=index,
        name=f"{index:06d}.jpg",
        captured_at_s=float(index),
        received_at_s=float(index),
        pixels=coarse.repeat(10, axis=0).repeat(10, axis=1),
    )


def keyframe_of(index: int, features: Features) -> Keyframe:
    """A keyframe of the scene."""
    frame = frame_of(index)
    return Keyframe(
        frame_id=frame.frame_id,
        camera_key=frame.camera_key,
        index=index,
        name=frame.name,
        width=WIDTH,
        height=HEIGHT,
        captured_at_s=frame.captured_at_s,
        received_at_s=frame.received_at_s,
        features=features,
    )
