"""Dense types: what depth maps are made of, the depth maps, and the points that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from engine.types import (
    BoolArray,
    Float32Array,
    Float64Array,
    FrameId,
    Int64Array,
    Intrinsics,
    Uint8Array,
    freeze_field,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseView:
    """A registered keyframe and points of the map that it sees, frozen.

    Those of a neighbour are the ones that the keyframe whose depth is wanted sees, too.
    """

    frame_id: FrameId
    intrinsics: Intrinsics
    cam_from_world: Float64Array  # (3, 4)
    points3D_ids: Int64Array  # (M,) the same point has the same id in all views of a problem
    keypoints_xy: Float64Array  # (M, 2) px of the original image, with its lens
    points3D_in_world: Float64Array  # (M, 3)

    def __post_init__(self) -> None:
        freeze_field(self, "cam_from_world", (3, 4), np.float64)
        freeze_field(self, "points3D_ids", (None,), np.int64)
        freeze_field(self, "keypoints_xy", (len(self.points3D_ids), 2), np.float64)
        freeze_field(self, "points3D_in_world", (len(self.points3D_ids), 3), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseImage:
    """The image of a keyframe."""

    pixels: Uint8Array  # (H, W, 3) RGB, upright, of the size of its intrinsics
    mask: BoolArray | None = None  # (H, W), True where a pixel may be used; None: everywhere


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepthProblem:
    """A keyframe whose depth is wanted, and keyframes that see the same points."""

    view: DenseView
    neighbours: tuple[DenseView, ...]  # the most covisible ones, the best first, a dozen at most


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeenDepth:
    """The depth of a keyframe's image as a matcher sees it, such as by a pointmap; in any unit."""

    depth: Float32Array  # (H, W) along the optical axis; 0: unknown
    # Pixels of the original image are those of the depth times the scale, and the offset.
    scale_xy: Float64Array  # (2,)
    offset_xy: Float64Array  # (2,) px of the original image

    def __post_init__(self) -> None:
        freeze_field(self, "depth", (None, None), np.float32)
        freeze_field(self, "scale_xy", (2,), np.float64)
        freeze_field(self, "offset_xy", (2,), np.float64)


class DepthStatus(StrEnum):
    """The outcome of making a depth map."""

    MADE = "made"
    TOO_FEW_POINTS = "too_few_points"  # of the map in the keyframe
    NO_NEIGHBOUR = "no_neighbour"  # that shares enough points at a useful angle
    NO_IMAGE = "no_image"  # of the keyframe, or of any neighbour
    NOTHING_AGREES = "nothing_agrees"  # no pixel has a depth that passes the checks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepthMap:
    """Depth of a keyframe, in a pinhole camera of its own at the keyframe's place and orientation.

    It is of the poses that the keyframe and its neighbours had when it was made: ``neighbour_ids``
    and ``neighbour_from_keyframe`` say which, in the map's unit of then.
    """

    frame_id: FrameId
    pinhole: Float64Array  # (4,) fx, fy, cx, cy, px of this depth map
    depth: Float32Array  # (H, W) along the optical axis, map units; 0: unknown
    relative_error: Float32Array  # (H, W) one standard deviation of depth / depth; 0 where unknown
    num_agreeing: Uint8Array  # (H, W) neighbours whose images agree on the depth; 0 where unknown
    colors: Uint8Array  # (H, W, 3) RGB
    neighbour_ids: Int64Array  # (N,) keyframes that it was made with
    neighbour_from_keyframe: Float64Array  # (N, 3, 4)
    # (H, W) bit i: neighbour i is one that agrees; None: not known any more, maybe all are.
    agreeing_bits: Uint8Array | None = None

    def __post_init__(self) -> None:
        if self.agreeing_bits is not None:
            freeze_field(self, "agreeing_bits", self.depth.shape, np.uint8)
        freeze_field(self, "pinhole", (4,), np.float64)
        freeze_field(self, "depth", (None, None), np.float32)
        freeze_field(self, "relative_error", self.depth.shape, np.float32)
        freeze_field(self, "num_agreeing", self.depth.shape, np.uint8)
        freeze_field(self, "colors", (*self.depth.shape, 3), np.uint8)
        freeze_field(self, "neighbour_ids", (None,), np.int64)
        freeze_field(self, "neighbour_from_keyframe", (len(self.neighbour_ids), 3, 4), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepthEstimate:
    """A depth map, or why there is none."""

    status: DepthStatus
    reason: str  # one sentence with the figures that decided
    depth_map: DepthMap | None  # None unless it was made
    cpu_s: float  # of the calling thread


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DensePoints:
    """Points on surfaces: of a keyframe in its camera's frame, or fused in the world."""

    xyz: Float32Array  # (P, 3) map units
    colors: Uint8Array  # (P, 3) RGB
    normals: Float32Array  # (P, 3) unit vectors towards the cameras
    sampling: Float32Array  # (P,) map units: how far apart two pixels are on the surface
    num_views: Uint8Array  # (P,) keyframes that agree on the point

    def __post_init__(self) -> None:
        freeze_field(self, "xyz", (None, 3), np.float32)
        num_points = len(self.xyz)
        freeze_field(self, "colors", (num_points, 3), np.uint8)
        freeze_field(self, "normals", (num_points, 3), np.float32)
        freeze_field(self, "sampling", (num_points,), np.float32)
        freeze_field(self, "num_views", (num_points,), np.uint8)


def first_param(params: Sequence[float] | Float64Array) -> float:
    """A camera's focal length, px, as far as its first parameter is one; 1 for models without."""
    return float(params[0]) if len(params) else 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframePoses:
    """Where registered keyframes are in one world."""

    frame_ids: Int64Array  # (K,) each once
    cam_from_world: Float64Array  # (K, 3, 4)
    focal_px: Float64Array  # (K,) `first_param` of each keyframe's camera
    # (K, 8, 3) unit rays to the corners and edge middles of each image; NaN: it sees nothing there.
    border_rays: Float64Array

    def __post_init__(self) -> None:
        freeze_field(self, "frame_ids", (None,), np.int64)
        freeze_field(self, "cam_from_world", (len(self.frame_ids), 3, 4), np.float64)
        freeze_field(self, "focal_px", (len(self.frame_ids),), np.float64)
        freeze_field(self, "border_rays", (len(self.frame_ids), 8, 3), np.float64, finite=False)

    def by_id(self) -> dict[int, Float64Array]:
        """The pose (3, 4) of each keyframe."""
        return dict(zip(self.frame_ids.tolist(), self.cam_from_world, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseChunk:
    """A sample of the dense points of one keyframe, for views."""

    frame_id: FrameId
    version: int  # of the points: chunks of a keyframe with the same version are the same
    xyz_in_cam: Float32Array  # (P, 3) in the keyframe's camera
    colors: Uint8Array  # (P, 3) RGB

    def __post_init__(self) -> None:
        freeze_field(self, "xyz_in_cam", (None, 3), np.float32)
        freeze_field(self, "colors", (len(self.xyz_in_cam), 3), np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseCloud:
    """The dense map as views show it: chunks that rarely change, and where they lie now."""

    chunks: tuple[DenseChunk, ...]  # one a keyframe, in order of arrival
    world_from_chunk: Float64Array  # (N, 3, 4) similarities [s R | t] from cameras to the world

    def __post_init__(self) -> None:
        freeze_field(self, "world_from_chunk", (len(self.chunks), 3, 4), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroundPicture:
    """The ground from above as views show it: a textured surface, and how well it is covered."""

    vertices_in_world: Float32Array  # (H, W, 3) of a grid, line by line; NaN where unknown
    texture: Uint8Array  # (TH, TW, 4) RGBA; alpha 0: unknown
    u_in_texture: Float64Array  # (W,) of the grid's columns, 0 to 1 from the texture's left edge
    v_in_texture: Float64Array  # (H,) of its lines, 0 to 1 from the texture's upper edge
    holes_in_world: Float32Array  # (N, 3) middles of cells that too few keyframes see
    thin_in_world: Float32Array  # (M, 3) of cells that are seen, but badly
    coverage: str  # GeoJSON; "" where there is none, or the map is not on the globe

    def __post_init__(self) -> None:
        freeze_field(self, "vertices_in_world", (None, None, 3), np.float32, finite=False)
        height, width = self.vertices_in_world.shape[:2]
        freeze_field(self, "texture", (None, None, 4), np.uint8)
        freeze_field(self, "u_in_texture", (width,), np.float64)
        freeze_field(self, "v_in_texture", (height,), np.float64)
        freeze_field(self, "holes_in_world", (None, 3), np.float32)
        freeze_field(self, "thin_in_world", (None, 3), np.float32)

    def moved(self, onto_from_world: Float64Array) -> GroundPicture:
        """The same in another world, by a similarity (3, 4)."""
        matrix, shift = onto_from_world[:, :3].T, onto_from_world[:, 3]
        names = ("vertices_in_world", "holes_in_world", "thin_in_world")
        moved = {name: (getattr(self, name) @ matrix + shift).astype(np.float32) for name in names}
        return replace(self, **moved)
