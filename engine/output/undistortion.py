"""Undistortion: images of any perspective or fisheye camera as those of a PINHOLE camera.

The PINHOLE camera is COLMAP's (``undistort_camera``): its images have no blank pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pycolmap

from engine.errors import SnapshotError
from engine.jpeg_segments import is_cut_short
from engine.types import BoolArray, Float32Array, Float64Array, Uint8Array

_SAME_PX = 1 / 64  # places that differ by less are those of one pixel
_NO_MAP = np.empty(0, np.float32)  # both coordinates are in the first one
_GRID = 21  # points a side by which two cameras are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class PinholeFit:
    """The PINHOLE camera whose rays pixels show best, and how far it is from showing them."""

    camera: pycolmap.Camera
    max_error_px: float


def is_pinhole(camera: pycolmap.Camera) -> bool:
    """Whether a camera's images are as a pinhole's."""
    return bool(camera.is_undistorted()) and not camera.is_perspective_fisheye()


def pinhole_of(camera: pycolmap.Camera) -> pycolmap.Camera:
    """The PINHOLE camera, with the same id, that the images of a camera are undistorted to."""
    if is_pinhole(camera):
        pinhole = pycolmap.Camera.create_from_model_name(
            camera.camera_id, "PINHOLE", 1.0, camera.width, camera.height
        )
        center = (camera.principal_point_x, camera.principal_point_y)
        pinhole.params = [camera.focal_length_x, camera.focal_length_y, *center]
        return pinhole
    pinhole = pycolmap.undistort_camera(pycolmap.UndistortCameraOptions(), camera)
    pinhole.camera_id = camera.camera_id
    return pinhole


class PinholeWarp:
    """Turns images of one camera into those of a PINHOLE camera.

    Args:
        original: the camera with the calibration that the images are undistorted by.
        pinhole: what they become images of.
    """

    def __init__(self, original: pycolmap.Camera, pinhole: pycolmap.Camera) -> None:
        self.original = pycolmap.Camera(original.todict())  # models may change theirs
        self.pinhole = pycolmap.Camera(pinhole.todict())
        places_xy = _original_xy(original, pinhole)
        self._is_inside = (
            (places_xy >= -0.5).all(axis=2)
            & (places_xy[:, :, 0] < original.width - 0.5)
            & (places_xy[:, :, 1] < original.height - 0.5)
        )
        self.is_identity = places_xy.shape[:2] == (original.height, original.width) and bool(
            np.abs(places_xy - _centres(pinhole)).max() < _SAME_PX
        )
        # Fixed-point places to 1/32 px: half the memory, and faster.
        self._maps = cv2.convertMaps(places_xy, _NO_MAP, cv2.CV_16SC2)
        self._nearest, _ = cv2.convertMaps(places_xy, _NO_MAP, cv2.CV_16SC2, nninterpolation=True)

    def image(self, pixels: Uint8Array) -> Uint8Array:
        """The undistorted image (h, w, 3) of one (H, W, 3)."""
        if self.is_identity:
            return pixels
        places, fractions = self._maps
        border = cv2.BORDER_REPLICATE  # a black one would show in the pixels beside it
        undistorted = cv2.remap(pixels, places, fractions, cv2.INTER_CUBIC, borderMode=border)
        return np.asarray(undistorted, np.uint8)

    def mask(self, mask: BoolArray) -> BoolArray:
        """The undistorted mask (h, w) of one (H, W); what lies outside the original is left out."""
        if self.is_identity:
            return mask
        warped = cv2.remap(mask.view(np.uint8), self._nearest, _NO_MAP, cv2.INTER_NEAREST)
        return np.asarray(warped, np.uint8).astype(bool) & self._is_inside


def fit_pinhole(
    original: pycolmap.Camera, pinhole: pycolmap.Camera, current: pycolmap.Camera
) -> PinholeFit:
    """The PINHOLE camera that undistorted images are of by another calibration.

    Another calibration of a lens with little distortion changes the parameters of the PINHOLE
    camera, and its images stay what they are. A change of distortion leaves an error.

    Args:
        original: the camera with the calibration that the images were undistorted by.
        pinhole: what they became images of.
        current: the original camera as it is calibrated now.
    """
    x, y = np.meshgrid(np.linspace(0, pinhole.width, _GRID), np.linspace(0, pinhole.height, _GRID))
    pixels_xy = np.column_stack([x.ravel(), y.ravel()])
    rays = _with_depth(np.asarray(pinhole.cam_from_img(pixels_xy)))
    seen_xy = np.asarray(current.cam_from_img(np.asarray(original.img_from_cam(rays))))
    known = np.isfinite(seen_xy).all(axis=1)
    fitted, errors_px = pycolmap.Camera(pinhole.todict()), np.zeros(0)
    params = np.array(pinhole.params, np.float64)
    for axis in (0, 1):
        columns = np.column_stack([seen_xy[known, axis], np.ones(np.count_nonzero(known))])
        solution, *_ = np.linalg.lstsq(columns, pixels_xy[known, axis], rcond=None)
        params[[axis, axis + 2]] = solution
        errors_px = np.append(errors_px, np.abs(columns @ solution - pixels_xy[known, axis]))
    fitted.params = params.tolist()
    is_camera = known.all() and (params[:2] > 0).all()
    return PinholeFit(
        camera=fitted, max_error_px=float(errors_px.max()) if is_camera else float("inf")
    )


def undistort_model(
    reconstruction: pycolmap.Reconstruction,
    pinholes: Mapping[int, pycolmap.Camera],
    *,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Replaces the cameras of a model by PINHOLE ones, and moves the keypoints along.

    Args:
        reconstruction: is changed.
        pinholes: for each camera id.
        between: is called before each image.

    Raises:
        What ``between`` raises; the model is half changed then.
    """
    for image in reconstruction.images.values():
        between()
        if image.num_points2D():
            _move_keypoints(
                image, reconstruction.camera(image.camera_id), pinholes[image.camera_id]
            )
    for camera_id, pinhole in pinholes.items():
        camera = reconstruction.camera(camera_id)
        camera.model = pinhole.model
        camera.params = [float(value) for value in pinhole.params]
        camera.width, camera.height = pinhole.width, pinhole.height


def _move_keypoints(
    image: pycolmap.Image, original: pycolmap.Camera, pinhole: pycolmap.Camera
) -> None:
    """Moves keypoints; those that the PINHOLE camera cannot see stay where they are."""
    points = image.points2D
    points_xy = np.array([point.xy for point in points])
    moved_xy = np.asarray(pinhole.img_from_cam(np.asarray(original.cam_ray_from_img(points_xy))))
    is_seen = np.isfinite(moved_xy).all(axis=1, keepdims=True)
    # Keypoints made at once, and their points one by one: half the time of moving each.
    moved = pycolmap.Image(keypoints=np.where(is_seen, moved_xy, points_xy)).points2D
    for row in image.get_observation_point2D_idxs():
        moved[row].point3D_id = points[row].point3D_id
    points[:] = moved


def undistorted_file(path: Path, warp: PinholeWarp, *, suffix: str, jpeg_quality: int) -> bytes:
    """The bytes of an image file undistorted; one without distortion keeps its own.

    Args:
        path: an image of the original camera.
        warp: to its PINHOLE camera.
        suffix: of the file that the bytes are for, .png or .jpg.
        jpeg_quality: 1 to 100.

    Raises:
        SnapshotError: it cannot be read or encoded, is cut short, or not of its camera's size.
        OSError: likewise.
    """
    data = path.read_bytes()
    if is_cut_short(data):
        raise SnapshotError(f"the image {path.name} is cut short: it has no end marker")
    if warp.is_identity and path.suffix.lower() == suffix:
        return data
    pixels = _decoded(data)
    size = (warp.original.height, warp.original.width)
    if pixels is None or pixels.shape[:2] != size:
        raise SnapshotError(f"the image {path.name} cannot be read, or is not of its camera's size")
    quality = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]
    is_encoded, encoded = cv2.imencode(suffix, warp.image(pixels), quality)
    if not is_encoded:
        raise SnapshotError(f"the image {path.name} cannot be encoded")
    return encoded.tobytes()


def read_mask(path: Path, camera: pycolmap.Camera) -> BoolArray:
    """The mask (H, W) in a file of a camera's image.

    Raises:
        SnapshotError: it cannot be read, or is not of the camera's size.
    """
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    if mask is None or mask.shape != (camera.height, camera.width):
        raise SnapshotError(f"mask {path.name} cannot be read, or is not of its image's size")
    return np.asarray(mask) > 0


def _decoded(data: bytes) -> Uint8Array | None:
    if not data:
        return None  # OpenCV raises
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return None if pixels is None else np.asarray(pixels, np.uint8)


def _original_xy(original: pycolmap.Camera, pinhole: pycolmap.Camera) -> Float32Array:
    """Where in the original each pixel (h, w) is, (h, w, 2), the first pixel's centre being 0."""
    places_xy = np.empty((pinhole.height, pinhole.width, 2), np.float32)
    x = np.arange(pinhole.width) + 0.5
    for line in range(pinhole.height):  # all at once takes ten times the memory of an image
        rays = np.asarray(pinhole.cam_from_img(np.column_stack([x, np.full(len(x), line + 0.5)])))
        places_xy[line] = np.asarray(original.img_from_cam(_with_depth(rays))) - 0.5
    # What the original cannot show lies outside, not nowhere.
    return np.nan_to_num(places_xy, copy=False, nan=-1e4, posinf=-1e4, neginf=-1e4)


def _centres(camera: pycolmap.Camera) -> Float32Array:
    x, y = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    return np.stack([x, y], axis=2).astype(np.float32)


def _with_depth(plane_xy: Float64Array) -> Float64Array:
    """Points (N, 3) at depth 1 of the image plane's (N, 2)."""
    return np.column_stack([plane_xy, np.ones(len(plane_xy))])
