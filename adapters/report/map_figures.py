"""What a report shows of a COLMAP model: places, residuals, track lengths.

Residuals are of keyframes evenly spread over the run where there are many, so that a report costs
no more of a map of thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.types import Float64Array, Int64Array, Uint8Array

if TYPE_CHECKING:
    import pycolmap

MAX_RESIDUAL_KEYFRAMES = 250
_MAX_POINTS = 30_000  # that are drawn
_MAX_TRACKS = 100_000
_MAX_OBSERVATIONS = 120_000  # whose residuals are measured


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframeResiduals:
    """How far observations of a keyframe lie from the projections of their points."""

    frame_id: int
    camera_id: int
    size: tuple[int, int]  # of the image, px
    num_observations: int
    xy: Float64Array  # (N, 2) px, the observations, or some of many
    offsets_xy: Float64Array  # (N, 2) px, from the observations to the projections

    @property
    def errors_px(self) -> Float64Array:
        """Their lengths (N,)."""
        return np.asarray(np.linalg.norm(self.offsets_xy, axis=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapFigures:
    """A model in arrays. K: its keyframes, by their ids."""

    frame_ids: Int64Array  # (K,)
    names: tuple[str, ...]
    cam_from_world: Float64Array  # (K, 3, 4)
    points3D: Float64Array  # (P, 3) some of the points
    colors: Uint8Array  # (P, 3) RGB
    track_lengths: Int64Array  # (T,) of some or all points
    num_points3D: int
    residuals: tuple[KeyframeResiduals, ...]  # of some or all keyframes
    pinholes: dict[int, Float64Array]  # (4,) fx, fy, cx, cy by keyframe, where there is a pinhole
    sizes: dict[int, tuple[int, int]]  # of images, px, by keyframe

    @property
    def centers(self) -> Float64Array:
        """Camera centres (K, 3) in the world."""
        rotations, translations = self.cam_from_world[:, :, :3], self.cam_from_world[:, :, 3]
        return np.asarray(-np.einsum("kji,kj->ki", rotations, translations))


def measure_map(reconstruction: pycolmap.Reconstruction) -> MapFigures:
    """Measures a model that holds at least one registered image."""
    ids = sorted(reconstruction.reg_image_ids())
    images = [reconstruction.image(i) for i in ids]
    cameras = [reconstruction.camera(image.camera_id) for image in images]
    sampled = evenly(ids, at_most=MAX_RESIDUAL_KEYFRAMES)
    num = sum(reconstruction.image(i).num_points3D for i in sampled)
    step = max(1, -(-num // _MAX_OBSERVATIONS))
    points, colors, lengths = _points_of(reconstruction)
    return MapFigures(
        frame_ids=np.array(ids, np.int64),
        names=tuple(image.name for image in images),
        cam_from_world=np.array([image.cam_from_world().matrix() for image in images]),
        points3D=points,
        colors=colors,
        track_lengths=lengths,
        num_points3D=reconstruction.num_points3D(),
        residuals=tuple(_residuals_of(reconstruction, i, step=step) for i in sampled),
        pinholes={i: _pinhole_of(camera) for i, camera in zip(ids, cameras, strict=True)},
        sizes={i: _size_of(camera) for i, camera in zip(ids, cameras, strict=True)},
    )


def evenly(ids: list[int], *, at_most: int) -> list[int]:
    """At most so many of ``ids``, evenly spread, the first and the last among them."""
    if len(ids) <= at_most:
        return ids
    return [ids[place] for place in np.linspace(0, len(ids) - 1, at_most).round().astype(int)]


def _points_of(
    reconstruction: pycolmap.Reconstruction,
) -> tuple[Float64Array, Uint8Array, Int64Array]:
    ids = list(reconstruction.points3D.keys())
    tracks = ids[:: max(1, -(-len(ids) // _MAX_TRACKS))]
    lengths = [reconstruction.point3D(i).track.length() for i in tracks]
    drawn = [reconstruction.point3D(i) for i in ids[:: max(1, -(-len(ids) // _MAX_POINTS))]]
    return (
        np.array([point.xyz for point in drawn]).reshape(-1, 3),
        np.array([point.color for point in drawn], np.uint8).reshape(-1, 3),
        np.array(lengths, np.int64),
    )


def _residuals_of(
    reconstruction: pycolmap.Reconstruction, image_id: int, *, step: int
) -> KeyframeResiduals:
    """Of every ``step``-th observation."""
    image = reconstruction.image(image_id)
    camera, pose = reconstruction.camera(image.camera_id), image.cam_from_world().matrix()
    seen = [image.point2D(i) for i in image.get_observation_point2D_idxs()[::step]]
    xy = np.array([point.xy for point in seen]).reshape(-1, 2)
    points = [reconstruction.point3D(point.point3D_id).xyz for point in seen]
    in_cam = np.array(points).reshape(-1, 3) @ pose[:, :3].T + pose[:, 3]
    projected = np.asarray(camera.img_from_cam(in_cam, check_cheirality=False)).reshape(-1, 2)
    offsets: Float64Array = projected - xy
    is_known = np.isfinite(offsets).all(axis=1)
    return KeyframeResiduals(
        frame_id=image_id,
        camera_id=image.camera_id,
        size=_size_of(camera),
        num_observations=image.num_points3D,
        xy=xy[is_known],
        offsets_xy=offsets[is_known],
    )


def _size_of(camera: pycolmap.Camera) -> tuple[int, int]:
    return int(camera.width), int(camera.height)


def _pinhole_of(camera: pycolmap.Camera) -> Float64Array:
    focal = [camera.params[i] for i in camera.focal_length_idxs()]
    center = [camera.params[i] for i in camera.principal_point_idxs()]
    return np.array([focal[0], focal[-1], *center]) if focal and len(center) == 2 else np.zeros(0)
