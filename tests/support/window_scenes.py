"""Windows with known cameras and points, and how far an estimate is from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.geometry import camera_center, rotation_from_vector
from engine.types import BoolArray, Float64Array
from engine.window_types import WindowEstimate, WindowProblem
from tests.support.synthetic import look_at, similarity

WIDTH, HEIGHT = 1000, 750
FOCAL_PX = 800.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowScene:
    """True cameras, true points, and the tracks they make."""

    poses: Float64Array  # (S, 3, 4)
    points: Float64Array  # (N, 3)
    tracks_xy: Float64Array  # (S, N, 2), NaN where not visible
    is_visible: BoolArray  # (S, N)

    def problem(self, **changes: Any) -> WindowProblem:
        """The scene as a problem that knows nothing but the images' size."""
        given = {
            "tracks_xy": self.tracks_xy,
            "is_visible": self.is_visible,
            "image_sizes": np.array([[WIDTH, HEIGHT]]),
        }
        return WindowProblem(**(given | changes))

    def rough_poses(self, *, angle_deg: float, shift_ratio: float, seed: int = 0) -> Float64Array:
        """(S, 3, 4) true poses, each turned by an angle and moved by a share of the extent."""
        rng = np.random.default_rng((seed, 1))
        centers = camera_center(self.poses)
        extent = float(np.linalg.norm(np.ptp(centers, axis=0)))
        rough = []
        for pose, center in zip(self.poses, centers, strict=True):
            axis, shift = (unit / np.linalg.norm(unit) for unit in rng.normal(size=(2, 3)))
            rotation = rotation_from_vector(np.radians(angle_deg) * axis) @ pose[:, :3]
            moved = center + shift_ratio * extent * shift
            rough.append(np.column_stack([rotation, -rotation @ moved]))
        return np.array(rough)

    def with_outliers(self, *, ratio: float, seed: int = 0) -> tuple[Float64Array, BoolArray]:
        """Tracks of which a share of the observations (S, N) is moved by 20 to 200 px."""
        rng = np.random.default_rng((seed, 2))
        is_moved = self.is_visible & (rng.random(self.is_visible.shape) < ratio)
        angle = rng.uniform(0.0, 2.0 * np.pi, is_moved.shape)
        far_px = rng.uniform(20.0, 200.0, is_moved.shape)
        shift_xy = far_px[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        return np.where(is_moved[..., None], self.tracks_xy + shift_xy, self.tracks_xy), is_moved

    def centre_errors(self, estimate: WindowEstimate) -> Float64Array:
        """(V,) errors of the centres of valid frames after the best similarity, of the extent."""
        valid = estimate.is_valid
        centers, wanted = camera_center(estimate.cam_from_world[valid]), camera_center(self.poses)
        wanted = wanted[valid]
        true_from_estimated = similarity(centers, wanted)
        placed = centers @ true_from_estimated[:, :3].T + true_from_estimated[:, 3]
        extent = float(np.linalg.norm(np.ptp(wanted, axis=0)))
        return np.asarray(np.linalg.norm(placed - wanted, axis=1) / extent)


def scene_of(
    poses: Float64Array,
    points: Float64Array,
    *,
    noise_px: float = 0.0,
    focal_px: float = FOCAL_PX,
    distortion: float = 0.0,
    seen_ratio: float = 0.7,
    seed: int = 0,
) -> WindowScene:
    """The tracks that cameras (S, 3, 4) make of points (N, 3); some are not found in all images."""
    rng = np.random.default_rng((seed, 3))
    in_cam = np.einsum("sij,nj->sni", poses[:, :, :3], points) + poses[:, None, :, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        plane_xy = in_cam[..., :2] / in_cam[..., 2:]
    bend = 1.0 + distortion * (plane_xy**2).sum(axis=-1, keepdims=True)
    tracks_xy = focal_px * bend * plane_xy + (WIDTH / 2, HEIGHT / 2)
    inside = ((tracks_xy > 0) & (tracks_xy < (WIDTH, HEIGHT))).all(axis=-1)
    is_visible = inside & (in_cam[..., 2] > 0.1) & (rng.random(inside.shape) < seen_ratio)
    tracks_xy += rng.normal(scale=noise_px, size=tracks_xy.shape) if noise_px else 0.0
    tracks_xy[~is_visible] = np.nan
    is_track = is_visible.sum(axis=0) >= 2
    return WindowScene(
        poses=poses,
        points=points[is_track],
        tracks_xy=tracks_xy[:, is_track],
        is_visible=is_visible[:, is_track],
    )


def arc_scene(
    num_frames: int = 8, *, num_points: int = 400, relief: float = 1.0, **settings: Any
) -> WindowScene:
    """Cameras on an arc of 60 degrees around points in a box; relief 0 makes it a plane."""
    rng = np.random.default_rng((settings.get("seed", 0), 4))
    angles = np.radians(np.linspace(-30.0, 30.0, num_frames))
    centers = np.column_stack(
        [5.0 * np.sin(angles), -5.0 * np.cos(angles), 2.0 + 0.3 * np.sin(3 * angles)]
    )
    poses = np.array([look_at(center, np.zeros(3)) for center in centers])
    points = rng.uniform(-1.5, 1.5, (num_points, 3))
    points[:, 2] *= 0.7 * relief
    return scene_of(poses, points, **settings)


def turning_scene(num_frames: int = 6, **settings: Any) -> WindowScene:
    """A camera that turns on the spot before points at many depths."""
    rng = np.random.default_rng(5)
    headings = np.radians(np.linspace(-15.0, 15.0, num_frames))
    aims = np.column_stack([np.sin(headings), np.cos(headings), 0.05 * headings])
    poses = np.array([look_at(np.zeros(3), aim) for aim in aims])
    points = rng.uniform((-6.0, 4.0, -3.0), (6.0, 12.0, 3.0), (500, 3))
    return scene_of(poses, points, **settings)
