"""Perspective views of spherical images, for what reads pinhole cameras only.

Each image becomes the six faces of a cube about its centre, level with the camera. Masks follow
their images, and observations the view that they fall into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.job import ExportJob
from engine.errors import SnapshotError
from engine.output.flat_names import FlatNames
from engine.types import Float32Array, Float64Array, Uint8Array

if TYPE_CHECKING:
    import pycolmap

_JPEG_QUALITY = 95

# Axes of each view in the camera's frame, as rows: right, down, forward.
VIEWS: Mapping[str, Float64Array] = {
    "front": np.array([(1.0, 0, 0), (0, 1, 0), (0, 0, 1)]),
    "right": np.array([(0.0, 0, -1), (0, 1, 0), (1, 0, 0)]),
    "back": np.array([(-1.0, 0, 0), (0, 1, 0), (0, 0, -1)]),
    "left": np.array([(0.0, 0, 1), (0, 1, 0), (-1, 0, 0)]),
    "up": np.array([(1.0, 0, 0), (0, 0, 1), (0, -1, 0)]),
    "down": np.array([(1.0, 0, 0), (0, 0, -1), (0, 1, 0)]),
}


def has_spherical_images(reconstruction: pycolmap.Reconstruction) -> bool:
    """Whether a model has cameras that see all around."""
    return any(camera.is_spherical() for camera in reconstruction.cameras.values())


def split_spherical_images(
    job: ExportJob, to: Path
) -> tuple[pycolmap.Reconstruction, dict[str, list[str]]]:
    """Writes a model's images to a folder, spherical ones as views.

    Args:
        job: of the export, whose images have flat names.
        to: gets ``images/`` and ``masks/`` alike.

    Returns:
        The model of the written images, and their names by those of the images that were split.

    Raises:
        SnapshotError: an image cannot be read or written.
        OSError: likewise.
        ExportCancelledError: the export was cancelled.
    """
    import pycolmap

    reconstruction, run = job.reconstruction, job.run
    views = pycolmap.Reconstruction()
    for camera in reconstruction.cameras.values():
        views.add_camera_with_trivial_rig(_view_camera(camera) if camera.is_spherical() else camera)
    names = FlatNames(taken=[PurePosixPath(image.name).stem for image in job.images()])
    names_of_views: dict[str, list[str]] = {}
    places: dict[tuple[int, int], tuple[int, int]] = {}  # image and point: the same in the views
    for image in job.each("images split into views", job.images()):
        camera = reconstruction.camera(image.camera_id)
        if camera.is_spherical():
            own = [names.of(_view_name(image.name, view)) for view in VIEWS]
            names_of_views[image.name] = own
            _add_views(views, image, own, camera, places)
            _write_views(run, to, image.name, own)
        else:
            _add_image(views, image, places)
            _copy(run, to, image.name)
    for point in reconstruction.points3D.values():
        track = pycolmap.Track()
        for element in point.track.elements:
            place = places.get((element.image_id, element.point2D_idx))
            if place is not None:
                track.add_element(*place)
        if track.length() > 1:
            views.add_point3D(point.xyz, track, point.color)
    return views, names_of_views


def _view_camera(camera: pycolmap.Camera) -> pycolmap.Camera:
    """The pinhole of 90 degrees that has a spherical image's resolution at its horizon."""
    import pycolmap

    edge_px = camera.width // 4
    view = pycolmap.Camera.create_from_model_name(
        camera.camera_id, "PINHOLE", edge_px / 2.0, edge_px, edge_px
    )
    view.has_prior_focal_length = True
    return view


def _add_views(
    views: pycolmap.Reconstruction,
    image: pycolmap.Image,
    names: Sequence[str],
    spherical: pycolmap.Camera,
    places: dict[tuple[int, int], tuple[int, int]],
) -> None:
    import pycolmap

    camera = views.camera(image.camera_id)
    rays = np.asarray(spherical.cam_ray_from_img(_keypoints(image))).reshape(-1, 3)
    # The view whose axis is nearest sees a point; behind the others' planes it has no place.
    nearest = np.stack([rays @ axes[2] for axes in VIEWS.values()]).argmax(axis=0)
    cam_from_world = np.asarray(image.cam_from_world().matrix())
    for number, (name, axes) in enumerate(zip(names, VIEWS.values(), strict=True)):
        own = np.flatnonzero(nearest == number)
        in_view = rays[own] @ axes.T
        image_id = views.num_images() + 1
        views.add_image_with_trivial_frame(
            pycolmap.Image(
                name=name,
                keypoints=np.asarray(camera.img_from_cam(in_view)).reshape(-1, 2),
                camera_id=camera.camera_id,
                image_id=image_id,
            ),
            pycolmap.Rigid3d(axes @ cam_from_world),
        )
        places.update({(image.image_id, int(row)): (image_id, k) for k, row in enumerate(own)})


def _add_image(
    views: pycolmap.Reconstruction,
    image: pycolmap.Image,
    places: dict[tuple[int, int], tuple[int, int]],
) -> None:
    import pycolmap

    image_id = views.num_images() + 1
    keypoints = _keypoints(image)
    copy = pycolmap.Image(
        name=image.name, keypoints=keypoints, camera_id=image.camera_id, image_id=image_id
    )
    views.add_image_with_trivial_frame(copy, image.cam_from_world())
    places.update({(image.image_id, k): (image_id, k) for k in range(len(keypoints))})


def _keypoints(image: pycolmap.Image) -> Float64Array:
    return np.array([point.xy for point in image.points2D], np.float64).reshape(-1, 2)


def _view_name(name: str, view: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}_{view}{path.suffix}"))


# -- pixels ---------------------------------------------------------------------------------------


def _write_views(run: Path, to: Path, name: str, names: Sequence[str]) -> None:
    """Writes the views of an image, and of its mask where it has one."""
    import cv2

    pixels = _read(run / "images" / name, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    mask_path = run / "masks" / f"{name}.png"
    mask = _read(mask_path, cv2.IMREAD_GRAYSCALE) if mask_path.is_file() else None
    height, width = pixels.shape[:2]
    for view, axes in zip(names, VIEWS.values(), strict=True):
        x, y = _positions(axes, width=width, height=height)
        seen = cv2.remap(pixels, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        _write(np.asarray(seen, np.uint8), to / "images" / view)
        if mask is not None:
            seen = cv2.remap(mask, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_WRAP)
            _write(np.asarray(seen, np.uint8), to / "masks" / f"{view}.png")


def _positions(axes: Float64Array, *, width: int, height: int) -> tuple[Float32Array, Float32Array]:
    """Where in a spherical image the pixels of a view lie: x and y (E, E), first centre at 0."""
    edge_px = width // 4
    offsets = (np.arange(edge_px) + 0.5) / edge_px * 2.0 - 1.0
    right, down = np.meshgrid(offsets, offsets)
    rays = np.stack([right, down, np.ones_like(right)], axis=-1) @ axes
    longitude = np.arctan2(rays[..., 0], rays[..., 2])
    latitude = np.arctan2(-rays[..., 1], np.hypot(rays[..., 0], rays[..., 2]))
    x = (longitude / (2.0 * np.pi) + 0.5) * width - 0.5
    y = np.clip((0.5 - latitude / np.pi) * height - 0.5, 0.0, height - 1.0)
    return x.astype(np.float32), y.astype(np.float32)


def _copy(run: Path, to: Path, name: str) -> None:
    for folder, file in (("images", name), ("masks", f"{name}.png")):
        if (run / folder / file).is_file():
            (to / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (to / folder / file).write_bytes((run / folder / file).read_bytes())


def _read(path: Path, flags: int) -> Uint8Array:
    import cv2

    pixels = cv2.imread(str(path), flags)
    if pixels is None:
        raise SnapshotError(f"{path.name}: cannot be read")
    return np.asarray(pixels, np.uint8)


def _write(pixels: Uint8Array, path: Path) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]):
        raise SnapshotError(f"{path.name}: cannot be written")
