"""A flat ground with a box on it, seen by pinhole cameras from above: depth maps and the truth."""

from __future__ import annotations

import numpy as np

from engine.dense.consistency import OtherDepth
from engine.dense_types import DensePoints, DepthMap
from engine.geometry import camera_center, compose_poses, invert_pose, transform_points
from engine.types import Float64Array, FrameId, Uint8Array

SIZE = (160, 120)  # px, width and height
FOCAL = 150.0  # px
BOX = np.array([[-2.0, -2.0, 0.0], [2.0, 2.0, 3.0]])  # lower and upper corner


def pose_above(x: float, y: float, z: float, *, tilt_deg: float = 0.0) -> Float64Array:
    """A camera (3, 4) that looks straight down, its lines running along -y; or tilted to +y."""
    tilt = np.deg2rad(tilt_deg)
    down = np.array([0.0, np.sin(tilt), -np.cos(tilt)])
    right = np.array([1.0, 0.0, 0.0])
    rotation = np.stack([right, np.cross(down, right), down])
    return np.column_stack([rotation, -rotation @ [x, y, z]])


def colour_at(x: Float64Array, y: Float64Array) -> Uint8Array:
    """The colour (..., 3) of what lies at a place of the plan: a smooth pattern of its own."""
    channels = [np.sin(x * 1.1) + np.cos(y * 0.7), np.cos(x * 0.9), np.sin(x * 0.6 + y)]
    scaled = [128 + 60 * channel for channel in channels]
    return np.stack(scaled, axis=-1).astype(np.uint8)


def depth_map(
    cam_from_world: Float64Array,
    *,
    frame_id: int = 1,
    noise: float = 0.0,
    has_box: bool = True,
    num_agreeing: int = 3,
    unit: float = 1.0,
) -> DepthMap:
    """What a camera (3, 4) sees, with Gaussian noise of ``noise`` times the depth."""
    width, height = SIZE
    pinhole = np.array([FOCAL, FOCAL, width / 2, height / 2])
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([(x - pinhole[2]) / FOCAL, (y - pinhole[3]) / FOCAL, np.ones_like(x)], axis=-1)
    rays = rays @ cam_from_world[:, :3]
    center = camera_center(cam_from_world)
    with np.errstate(divide="ignore"):
        depth = -center[2] / rays[..., 2]
        depth[depth <= 0] = 0.0
        if has_box:
            bounds = (BOX[:, None, None] - center) / rays
            enter, leave = bounds.min(axis=0).max(axis=-1), bounds.max(axis=0).min(axis=-1)
            depth = np.where((enter < leave) & (enter > 0), enter, depth)
    places = center + rays * depth[..., None]
    rng = np.random.default_rng(frame_id)
    noisy = depth * (1.0 + noise * rng.normal(size=depth.shape))
    return DepthMap(
        frame_id=FrameId(frame_id),
        pinhole=pinhole,
        depth=(noisy * unit).astype(np.float32),
        relative_error=np.where(depth > 0, np.float32(max(noise, 1e-3)), np.float32(0.0)),
        num_agreeing=np.where(depth > 0, np.uint8(num_agreeing), np.uint8(0)),
        colors=colour_at(places[..., 0], places[..., 1]),
        neighbour_ids=np.arange(4) + 100,
        neighbour_from_keyframe=np.broadcast_to(np.eye(4)[:3], (4, 3, 4)),
    )


def other_depth(
    other: DepthMap, other_pose: Float64Array, *, seen_from: Float64Array
) -> OtherDepth:
    """A depth map as it lies to a camera (3, 4)."""
    return OtherDepth(
        depth_map=other, other_from_keyframe=compose_poses(other_pose, invert_pose(seen_from))
    )


def in_world(points: DensePoints, cam_from_world: Float64Array) -> DensePoints:
    """Points of a camera's frame in the world."""
    world_from_cam = invert_pose(cam_from_world)
    return DensePoints(
        xyz=transform_points(world_from_cam, points.xyz.astype(np.float64)).astype(np.float32),
        colors=points.colors,
        normals=(points.normals @ world_from_cam[:, :3].T).astype(np.float32),
        sampling=points.sampling,
        num_views=points.num_views,
    )


def distance_to_surface(xyz: Float64Array) -> Float64Array:
    """How far points (P, 3) are from the ground and from the box's sides, the nearer one (P,)."""
    outside = np.linalg.norm(np.maximum(np.maximum(BOX[0] - xyz, xyz - BOX[1]), 0.0), axis=1)
    inside = np.minimum(xyz - BOX[0], BOX[1] - xyz).min(axis=1)
    to_box = np.where(outside > 0, outside, np.abs(inside))
    return np.asarray(np.minimum(np.abs(xyz[:, 2]), to_box))
