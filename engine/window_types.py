"""Window types: the problem that a window solver gets and the estimate that it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import DTypeLike

from engine.types import BoolArray, Float32Array, Float64Array, Int64Array, freeze_field

ASSUMED_FOCAL_RATIO = 1.2  # of the longer image edge; what solvers begin with where 0 is given

_ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowProblem:
    """Tracks through a few frames, to be solved for cameras and points together.

    Shapes are checked on construction, values by the solver. Observations that are not finite are
    left out. ``focal_px`` 0 stands for unknown; one camera for all frames shares a focal length,
    one camera for each frame gives every frame its own.
    """

    tracks_xy: Float64Array  # (S, N, 2) px; anything where not visible, NaN too
    is_visible: BoolArray  # (S, N)
    image_sizes: Int64Array  # (C, 2) width, height of each camera's images
    camera_idx: Int64Array = field(  # (S,) the camera of each frame; empty: the first for all
        default_factory=lambda: np.zeros(0, np.int64)
    )
    score: Float32Array = field(  # (S, N) trust in each observation, 0..1; empty: all 1
        default_factory=lambda: np.zeros((0, 0), np.float32)
    )
    focal_px: Float64Array = field(  # (C,) 0: unknown; empty: all unknown
        default_factory=lambda: np.zeros(0)
    )
    distortion: Float64Array = field(  # (C,) k of SIMPLE_RADIAL; empty: all 0
        default_factory=lambda: np.zeros(0)
    )
    principal_points_xy: Float64Array = field(  # (C, 2) px, never refined; empty: image centres
        default_factory=lambda: np.zeros((0, 2))
    )
    is_calibrated: BoolArray = field(  # (C,) intrinsics that must not change; empty: none
        default_factory=lambda: np.zeros(0, np.bool_)
    )
    cam_from_world: Float64Array | None = None  # (S, 3, 4) where known; rows may be NaN
    is_held: BoolArray = field(  # (S,) poses that must not move; empty: none
        default_factory=lambda: np.zeros(0, np.bool_)
    )
    image_names: tuple[str, ...] = ()  # (S,) for solvers that read images; empty: none

    def __post_init__(self) -> None:
        freeze_field(self, "tracks_xy", (None, None, 2), np.float64, finite=False)
        num_frames, num_tracks = self.tracks_xy.shape[:2]
        freeze_field(self, "is_visible", (num_frames, num_tracks), np.bool_)
        freeze_field(self, "image_sizes", (None, 2), np.int64)
        num_cameras = len(self.image_sizes)
        if not self.score.size:
            object.__setattr__(self, "score", np.ones((num_frames, num_tracks), np.float32))
        freeze_field(self, "score", (num_frames, num_tracks), np.float32, finite=False)
        if not len(self.principal_points_xy):
            object.__setattr__(self, "principal_points_xy", self.image_sizes / 2.0)
        freeze_field(self, "principal_points_xy", (num_cameras, 2), np.float64, finite=False)
        self._fill("camera_idx", num_frames, np.int64)
        self._fill("is_held", num_frames, np.bool_)
        self._fill("focal_px", num_cameras, np.float64)
        self._fill("distortion", num_cameras, np.float64)
        self._fill("is_calibrated", num_cameras, np.bool_)
        if self.cam_from_world is not None:
            freeze_field(self, "cam_from_world", (num_frames, 3, 4), np.float64, finite=False)
        if self.image_names and len(self.image_names) != num_frames:
            raise ValueError(f"image_names: {len(self.image_names)} for {num_frames} frames")
        if ((self.camera_idx < 0) | (self.camera_idx >= num_cameras)).any():
            raise ValueError("camera_idx: names a camera that image_sizes does not have")

    def _fill(self, name: str, num: int, dtype: DTypeLike) -> None:
        """Zeros where nothing is given."""
        if not len(getattr(self, name)):
            object.__setattr__(self, name, np.zeros(num, dtype))
        freeze_field(self, name, (num,), dtype, finite=False)

    @property
    def has_pose(self) -> BoolArray:
        """(S,) frames that are given a finite rotation and translation."""
        if self.cam_from_world is None:
            return np.zeros(self.num_frames, np.bool_)
        is_finite = np.asarray(np.isfinite(self.cam_from_world).all(axis=(1, 2)))
        rotation = np.where(is_finite[:, None, None], self.cam_from_world[:, :, :3], 0.0)
        product = rotation @ np.swapaxes(rotation, 1, 2)
        is_rotation = np.isclose(product, np.eye(3), atol=_ROTATION_TOLERANCE).all(axis=(1, 2))
        return np.asarray(is_finite & is_rotation & (np.linalg.det(rotation) > 0))

    def wrong_intrinsics(self, *, focal_ratios: tuple[float, float]) -> str | None:
        """A sentence on intrinsics that no camera can have; None when all are possible.

        Args:
            focal_ratios: least and most focal length, of the longer image edge.
        """
        values = (self.focal_px, self.distortion, self.principal_points_xy)
        if not all(np.isfinite(value).all() for value in values):
            return "intrinsics are not finite"
        if (self.image_sizes <= 0).any():
            return "an image has no size"
        is_known, ratio = self.focal_px != 0.0, self.focal_px / self.image_sizes.max(axis=1)
        low, high = focal_ratios
        if (is_known & ((ratio < low) | (ratio > high))).any():
            return f"a focal length is not between {low} and {high} times its image's edge"
        if (self.is_calibrated & ~is_known).any():
            return "a calibrated camera has no focal length"
        return None

    @property
    def num_frames(self) -> int:
        """Number of frames, S."""
        return int(self.tracks_xy.shape[0])

    @property
    def num_tracks(self) -> int:
        """Number of tracks, N."""
        return int(self.tracks_xy.shape[1])


class WindowStatus(StrEnum):
    """The outcome of solving a window."""

    SOLVED = "solved"
    TOO_FEW_FRAMES = "too_few_frames"  # fewer than two see anything
    TOO_FEW_TRACKS = "too_few_tracks"  # seen in two frames or more
    BAD_INTRINSICS = "bad_intrinsics"  # given ones that no camera can have
    BAD_POSES = "bad_poses"  # held ones that are no poses, or that the tracks contradict
    NO_INITIAL_PAIR = "no_initial_pair"  # no two frames are related by their tracks
    NO_PARALLAX = "no_parallax"  # a turn on the spot, one place twice, or all is far away
    INCONSISTENT = "inconsistent"  # cameras were found, but too little of the tracks agrees
    NO_IMAGES = "no_images"  # the solver reads images, and one is missing or of another size
    SOLVER_FAILED = "solver_failed"  # an external solver raised an error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowEstimate:
    """Cameras and points of a window; one that is not solved has none.

    Rows of points that are not valid hold zeros, and so do poses that were not found.
    """

    status: WindowStatus
    reason: str  # one sentence with the figures that decided
    cam_from_world: Float64Array  # (S, 3, 4)
    is_valid: BoolArray  # (S,) frames that enough inliers hold
    focal_px: Float64Array  # (C,)
    distortion: Float64Array  # (C,)
    points3D_in_world: Float64Array  # (N, 3)
    is_point_valid: BoolArray  # (N,)
    is_inlier: BoolArray  # (S, N) observations that agree
    mean_reprojection_px: float  # over the inliers; 0 without any
    num_unusable: int  # visible observations that were left out: not finite, or of low score
    is_bootstrapped: bool  # the poses come from the tracks alone, in a gauge of their own
    elapsed_s: float
    cpu_s: float  # of the calling thread

    def __post_init__(self) -> None:
        freeze_field(self, "is_inlier", (None, None), np.bool_)
        num_frames, num_points = self.is_inlier.shape
        freeze_field(self, "cam_from_world", (num_frames, 3, 4), np.float64)
        freeze_field(self, "is_valid", (num_frames,), np.bool_)
        freeze_field(self, "focal_px", (None,), np.float64)
        freeze_field(self, "distortion", (len(self.focal_px),), np.float64)
        freeze_field(self, "points3D_in_world", (num_points, 3), np.float64)
        freeze_field(self, "is_point_valid", (num_points,), np.bool_)

    @property
    def num_observations(self) -> int:
        """Observations that agree with cameras and points."""
        return int(self.is_inlier.sum())

    @property
    def num_points(self) -> int:
        """Tracks that became points."""
        return int(self.is_point_valid.sum())
