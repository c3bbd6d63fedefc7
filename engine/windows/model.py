"""Window model: a window's usable observations, and the current cameras and points.

Observations are kept as a list, track after track: tracks see few of the frames. Pixels follow
COLMAP, cameras are its SIMPLE_RADIAL.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pycolmap

from engine.estimators.camera_limits import FOCAL_RATIOS, lens_flaw
from engine.geometry import image_scale
from engine.types import BoolArray, Float64Array, Int64Array
from engine.window_types import WindowProblem

_MIN_DEPTH = 1e-9  # nearer points, and those behind, are not seen


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSolverConfig:
    """Settings of the window solver; pixels are those of an image of 1000 px."""

    min_score: float = 0.5  # observations trusted less are left out
    max_error_px: float = 4.0  # final gate of an observation
    loss_scale_px: float = 0.9  # errors beyond it count linearly
    min_parallax_deg: float = 1.0  # of a point
    min_track_length: int = 2  # observations that a point needs
    num_hypotheses: int = 12  # pairs of views tried per track
    coarse_gates_deg: tuple[float, ...] = (4.0, 1.2)  # with poses that are only roughly known
    tracks_per_frame: int = 80  # in adjustments that only have to bring the poses close
    max_coarse_iterations: int = 20
    max_iterations: int = 25
    min_frame_inliers: int = 15  # of a frame that is valid
    min_frame_inlier_ratio: float = 0.25  # of what it sees
    min_inlier_ratio: float = 0.5  # of what the posed frames see, else the window fails
    min_frames_for_focal: int = 3  # fewer views bend the focal length to fit noise
    refine_distortion: bool = False
    min_frames_for_distortion: int = 6
    min_pair_tracks: int = 20  # that the first two frames share
    min_rotation_residual_px: float = 1.5  # median, that a turn on the spot leaves of such a pair
    num_initial_pairs: int = 6  # tried in full
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowState:
    """A saved state of a window; shapes as in `WindowModel`."""

    focal_px: Float64Array
    distortion: Float64Array
    cam_from_world: Float64Array
    is_posed: BoolArray
    points3D_in_world: Float64Array
    is_inlier: BoolArray


@dataclass(slots=True, kw_only=True, eq=False)
class WindowModel:
    """Observations of a window (M of them), cameras and points; owned by one thread."""

    problem: WindowProblem
    frame_idx: Int64Array  # (M,)
    track_idx: Int64Array  # (M,) ascending
    points_xy: Float64Array  # (M, 2) px
    num_unusable: int
    scale: float  # how much larger the images are than 1000 px
    focal_px: Float64Array  # (C,)
    distortion: Float64Array  # (C,)
    cam_from_world: Float64Array  # (S, 3, 4)
    is_posed: BoolArray  # (S,)
    points3D_in_world: Float64Array  # (N, 3), NaN: none
    is_inlier: BoolArray  # (M,)
    _plane_xy: Float64Array | None = field(default=None)

    @classmethod
    def of(cls, problem: WindowProblem, *, min_score: float) -> WindowModel:
        """The usable observations of a problem, with its intrinsics but no poses and points."""
        is_usable = problem.is_visible & np.isfinite(problem.tracks_xy).all(axis=2)
        is_usable &= problem.score >= min_score
        num_unusable = int(problem.is_visible.sum() - is_usable.sum())
        track_idx, frame_idx = np.nonzero(is_usable.T)
        return cls(
            problem=problem,
            frame_idx=frame_idx,
            track_idx=track_idx,
            points_xy=problem.tracks_xy[frame_idx, track_idx],
            num_unusable=num_unusable,
            scale=float(np.median([image_scale(*size) for size in problem.image_sizes])),
            focal_px=problem.focal_px.copy(),
            distortion=problem.distortion.copy(),
            cam_from_world=np.tile(np.eye(3, 4), (problem.num_frames, 1, 1)),
            is_posed=np.zeros(problem.num_frames, np.bool_),
            points3D_in_world=np.full((problem.num_tracks, 3), np.nan),
            is_inlier=np.zeros(len(frame_idx), np.bool_),
        )

    def reset(self) -> None:
        """Restores the given intrinsics and removes poses and points."""
        self.focal_px, self.distortion = self.problem.focal_px, self.problem.distortion
        self._plane_xy = None
        self.is_posed[:] = False
        self.points3D_in_world[:] = np.nan
        self.is_inlier[:] = False

    def state(self) -> WindowState:
        """A copy of the current state, for `restore`."""
        return WindowState(
            focal_px=self.focal_px.copy(),
            distortion=self.distortion.copy(),
            cam_from_world=self.cam_from_world.copy(),
            is_posed=self.is_posed.copy(),
            points3D_in_world=self.points3D_in_world.copy(),
            is_inlier=self.is_inlier.copy(),
        )

    def restore(self, state: WindowState) -> None:
        """Restores a state of this window."""
        self.cam_from_world = state.cam_from_world.copy()
        self.is_posed = state.is_posed.copy()
        self.points3D_in_world = state.points3D_in_world.copy()
        self.is_inlier = state.is_inlier.copy()
        self.set_intrinsics(state.focal_px, state.distortion)

    @property
    def has_point(self) -> BoolArray:
        """(N,) tracks that have a point."""
        return np.isfinite(self.points3D_in_world[:, 0])

    @property
    def camera_of_observation(self) -> Int64Array:
        """(M,) index of each observation's camera."""
        return self.problem.camera_idx[self.frame_idx]

    def set_intrinsics(self, focal_px: Float64Array, distortion: Float64Array) -> None:
        """Sets focal lengths (C,) and distortion (C,); impossible ones leave a camera unchanged."""
        edge = self.problem.image_sizes.max(axis=1)
        low, high = FOCAL_RATIOS
        is_sane = (focal_px > low * edge) & (focal_px < high * edge)
        for idx in np.flatnonzero(is_sane & (distortion != 0.0)).tolist():
            is_sane[idx] = not lens_flaw(self._camera(idx, focal_px[idx], distortion[idx]))
        self.focal_px = np.where(is_sane, focal_px, self.focal_px)
        self.distortion = np.where(is_sane, distortion, self.distortion)
        self._plane_xy = None

    def camera(self, camera_idx: int) -> pycolmap.Camera:
        """A camera as COLMAP has it; its id is the index + 1."""
        return self._camera(camera_idx, self.focal_px[camera_idx], self.distortion[camera_idx])

    def _camera(self, camera_idx: int, focal_px: float, distortion: float) -> pycolmap.Camera:
        width, height = self.problem.image_sizes[camera_idx].tolist()
        center_x, center_y = self.problem.principal_points_xy[camera_idx].tolist()
        params = (focal_px, center_x, center_y, distortion)
        return pycolmap.Camera(
            camera_id=camera_idx + 1,
            model="SIMPLE_RADIAL",
            width=width,
            height=height,
            params=params,
        )

    def plane_xy(self) -> Float64Array:
        """(M, 2) undistorted observations on the plane z = 1; NaN where that is impossible."""
        if self._plane_xy is None:
            camera_idx = self.camera_of_observation
            center_xy = self.problem.principal_points_xy[camera_idx]
            plane_xy = (self.points_xy - center_xy) / self.focal_px[camera_idx, None]
            for idx in np.flatnonzero(self.distortion):
                own = camera_idx == idx
                plane_xy[own] = self.camera(int(idx)).cam_from_img(self.points_xy[own])
            self._plane_xy = plane_xy
        return self._plane_xy

    def errors_px(self) -> Float64Array:
        """(M,) reprojection errors; infinite without a pose or a point, and behind the camera."""
        pose = self.cam_from_world[self.frame_idx]
        points = self.points3D_in_world[self.track_idx]
        in_cam = np.einsum("mij,mj->mi", pose[:, :, :3], points) + pose[:, :, 3]
        is_known = self.is_posed[self.frame_idx] & (in_cam[:, 2] > _MIN_DEPTH)
        depth = np.where(is_known, in_cam[:, 2], 1.0)
        plane_xy = in_cam[:, :2] / depth[:, None]
        camera_idx = self.camera_of_observation
        bend = self.distortion[camera_idx] * (plane_xy**2).sum(axis=1)
        radial = self.focal_px[camera_idx] * (1.0 + bend)
        projected_xy = radial[:, None] * plane_xy + self.problem.principal_points_xy[camera_idx]
        errors = np.linalg.norm(projected_xy - self.points_xy, axis=1)
        return np.where(is_known & np.isfinite(errors), errors, np.inf)

    def num_seen(self) -> Int64Array:
        """(S,) usable observations of each frame."""
        return np.bincount(self.frame_idx, minlength=self.problem.num_frames)

    def num_inliers(self) -> Int64Array:
        """(S,) observations of each frame that agree."""
        return np.bincount(self.frame_idx[self.is_inlier], minlength=self.problem.num_frames)

    def track_lengths(self) -> Int64Array:
        """(N,) observations of each track that agree."""
        return np.bincount(self.track_idx[self.is_inlier], minlength=self.problem.num_tracks)

    def support(self) -> float:
        """Share of what the posed frames see that agrees."""
        is_seen = self.is_posed[self.frame_idx]
        return float(self.is_inlier[is_seen].mean()) if is_seen.any() else 0.0
