"""Small rendered scenes of textured rectangles, seen through any lens, with their true depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pycolmap

from engine.dense_types import DenseImage, DenseView, DepthMap, DepthProblem
from engine.geometry import camera_center, invert_pose, transform_points
from engine.types import BoolArray, Float64Array, FrameId, Intrinsics, Uint8Array

WIDTH, HEIGHT, FOCAL_PX = 160, 120, 130.0
PINHOLE = Intrinsics(
    model="PINHOLE", width=WIDTH, height=HEIGHT, params=(FOCAL_PX, FOCAL_PX, WIDTH / 2, HEIGHT / 2)
)
FISHEYE = Intrinsics(
    model="OPENCV_FISHEYE",
    width=WIDTH,
    height=HEIGHT,
    params=(62.0, 62.0, WIDTH / 2, HEIGHT / 2, 0.02, -0.005, 0.0, 0.0),
)
SKY_LEVEL = 205
_TEXELS = 256  # of a texture, each way
_NOISE_LEVELS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rectangle:
    """A textured rectangle; the texture repeats."""

    corner: tuple[float, float, float]
    right: tuple[float, float, float]  # to the next corner
    down: tuple[float, float, float]
    seed: int
    texel: float = 0.04  # its edge in the world

    def hits(
        self, center: Float64Array, rays: Float64Array
    ) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Ray lengths (N,), inf where missed, and texels (N,) right and down."""
        right, down = np.array(self.right), np.array(self.down)
        columns = np.stack(
            np.broadcast_arrays(-rays, right, down), axis=-1
        )  # center + t * ray = corner + a * right + b * down
        offset = center - np.array(self.corner)
        is_flat = np.abs(np.linalg.det(columns)) < 1e-12
        columns[is_flat] = np.eye(3)
        length, a, b = np.linalg.solve(columns, np.broadcast_to(offset, rays.shape)[..., None])[
            ..., 0
        ].T
        is_hit = ~is_flat & (length > 1e-6) & (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)
        scale = np.linalg.norm(right), np.linalg.norm(down)
        return (
            np.where(is_hit, length, np.inf),
            a * scale[0] / self.texel,
            b * scale[1] / self.texel,
        )

    def texture(self) -> Uint8Array:
        """Grey levels (T, T, 3) of smooth noise."""
        rng = np.random.default_rng(self.seed)
        noise = cv2.GaussianBlur(
            rng.normal(size=(_TEXELS, _TEXELS, 3)), (0, 0), 1.2, borderType=cv2.BORDER_REFLECT
        )
        shared = noise.mean(axis=2, keepdims=True)
        levels = 128 + 42 * (0.4 * noise + shared) / shared.std()
        return np.asarray(np.clip(levels, 0, 255), np.uint8)


WALL = Rectangle(corner=(-9.0, -7.0, 6.4), right=(18.0, 0.0, -1.2), down=(0.0, 14.0, 0.6), seed=1)
BOX = Rectangle(corner=(-0.9, -0.8, 4.4), right=(1.7, 0.0, 0.2), down=(0.0, 1.6, 0.1), seed=2)
GROUND = Rectangle(corner=(-30.0, 1.4, -5.0), right=(60.0, 0, 0), down=(0, 0, 60.0), seed=3)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """An image and its truth."""

    pixels: Uint8Array  # (H, W, 3)
    depth: Float64Array  # (H, W) along the optical axis; inf: nothing


def pose_at(center: tuple[float, float, float], *, yaw_deg: float = 0.0) -> Float64Array:
    """``cam_from_world`` (3, 4) of a level camera; it looks along z at yaw 0."""
    yaw = np.deg2rad(yaw_deg)
    rotation = np.array(
        [[np.cos(yaw), 0.0, -np.sin(yaw)], [0.0, 1.0, 0.0], [np.sin(yaw), 0.0, np.cos(yaw)]]
    )
    return np.column_stack([rotation, -rotation @ np.array(center)])


def render(
    scene: Sequence[Rectangle], cam_from_world: Float64Array, intrinsics: Intrinsics
) -> Rendered:
    """Draws rectangles, the nearest of each pixel, by rays through pixel centres."""
    height, width = intrinsics.height, intrinsics.width
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    camera = pycolmap.Camera(
        model=intrinsics.model, width=width, height=height, params=list(intrinsics.params)
    )
    in_cam = np.asarray(camera.cam_ray_from_img(grid.reshape(-1, 2))).reshape(-1, 3)
    rays = in_cam @ cam_from_world[:, :3]
    center = camera_center(cam_from_world)
    nearest = np.full(len(rays), np.inf)
    pixels = np.full((len(rays), 3), SKY_LEVEL, np.uint8)
    for rectangle in scene:
        length, right, down = rectangle.hits(center, rays)
        wins = length < nearest
        texels = cv2.remap(
            rectangle.texture(),
            np.mod(right, _TEXELS).astype(np.float32).reshape(height, width),
            np.mod(down, _TEXELS).astype(np.float32).reshape(height, width),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_WRAP,
        ).reshape(-1, 3)
        pixels[wins] = texels[wins]
        nearest[wins] = length[wins]
    rng = np.random.default_rng(int(1e6 * abs(center.sum())) + 1)
    noisy = pixels + rng.normal(scale=_NOISE_LEVELS, size=pixels.shape)
    return Rendered(
        pixels=np.clip(np.round(noisy), 0, 255).astype(np.uint8).reshape(height, width, 3),
        depth=(nearest * in_cam[:, 2]).reshape(height, width),
    )


def problem_of(
    scene: Sequence[Rectangle],
    poses: Sequence[Float64Array],
    intrinsics: Intrinsics = PINHOLE,
    *,
    num_points: int = 150,
    masks: Sequence[BoolArray | None] | None = None,
    claimed_poses: Sequence[Float64Array] | None = None,
) -> tuple[DepthProblem, dict[FrameId, DenseImage], Rendered]:
    """A problem whose keyframe is the first pose, all images, and the keyframe's truth.

    Args:
        scene: what is seen.
        poses: where the images are taken.
        intrinsics: of all.
        num_points: sparse points, at random pixels of the keyframe.
        masks: one an image.
        claimed_poses: what the map says instead.
    """
    rendered = [render(scene, pose, intrinsics) for pose in poses]
    rng = np.random.default_rng(0)
    height, width = intrinsics.height, intrinsics.width
    xy = np.column_stack(
        [rng.uniform(3, width - 3, num_points), rng.uniform(3, height - 3, num_points)]
    )
    columns, lines = xy.astype(int).T
    depth = rendered[0].depth[lines, columns]
    xy, depth = (
        (np.column_stack([columns, lines]) + 0.5)[np.isfinite(depth)],
        depth[np.isfinite(depth)],
    )
    camera = pycolmap.Camera(
        model=intrinsics.model, width=width, height=height, params=list(intrinsics.params)
    )
    rays = np.asarray(camera.cam_ray_from_img(xy)).reshape(-1, 3)
    points = transform_points(invert_pose(poses[0]), rays * (depth / rays[:, 2])[:, None])
    views = []
    for number, pose in enumerate(poses):
        in_cam = transform_points(pose, points)
        seen_xy = np.asarray(camera.img_from_cam(in_cam)).reshape(-1, 2)
        with np.errstate(invalid="ignore"):
            seen = (in_cam[:, 2] > 0) & ((seen_xy > 0) & (seen_xy < (width, height))).all(axis=1)
        views.append(
            DenseView(
                frame_id=FrameId(number + 1),
                intrinsics=intrinsics,
                cam_from_world=pose if claimed_poses is None else claimed_poses[number],
                points3D_ids=np.flatnonzero(seen),
                keypoints_xy=seen_xy[seen],
                points3D_in_world=points[seen],
            )
        )
    images = {
        view.frame_id: DenseImage(pixels=image.pixels, mask=None if masks is None else masks[k])
        for k, (view, image) in enumerate(zip(views, rendered, strict=True))
    }
    return DepthProblem(view=views[0], neighbours=tuple(views[1:])), images, rendered[0]


def relative_errors(depth_map: DepthMap, truth: Rendered, intrinsics: Intrinsics) -> Float64Array:
    """|depth / true depth - 1| of the pixels with a depth, (K,); inf where nothing is seen."""
    focal_x, focal_y, center_x, center_y = depth_map.pinhole
    lines, columns = np.nonzero(depth_map.depth)
    rays = np.column_stack(
        [
            (columns + 0.5 - center_x) / focal_x,
            (lines + 0.5 - center_y) / focal_y,
            np.ones(len(lines)),
        ]
    )
    camera = pycolmap.Camera(
        model=intrinsics.model,
        width=intrinsics.width,
        height=intrinsics.height,
        params=list(intrinsics.params),
    )
    x, y = (np.asarray(camera.img_from_cam(rays)).reshape(-1, 2) - 0.5).T.astype(np.float32)
    inverse = (1.0 / truth.depth).astype(np.float32)
    true = cv2.remap(inverse, x[None], y[None], cv2.INTER_LINEAR)[0]
    with np.errstate(divide="ignore"):
        own = depth_map.depth[lines, columns].astype(np.float64)
        return np.where(true > 0, np.abs(own * true - 1.0), np.inf)
