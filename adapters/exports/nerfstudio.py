"""``transforms.json``, by the page "Data conventions" of nerfstudio's documentation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.exports.images import IMAGES
from adapters.exports.job import ExportJob
from adapters.exports.masks import MASKS
from adapters.exports.ply import POINTS_NAME
from engine.errors import ConfigError
from engine.geometry import invert_pose

if TYPE_CHECKING:
    import pycolmap

# Where nerfstudio's names stand in COLMAP's parameters of each model; the rest are zero.
_NERFSTUDIO_PARAMS = {
    "SIMPLE_PINHOLE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2},
    "PINHOLE": {"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3},
    "SIMPLE_RADIAL": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3},
    "RADIAL": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3, "k2": 4},
    "OPENCV": {"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3, "k1": 4, "k2": 5, "p1": 6, "p2": 7},
    "SIMPLE_FISHEYE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2},
    "FISHEYE": {"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3},
    "SIMPLE_RADIAL_FISHEYE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3},
    "RADIAL_FISHEYE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3, "k2": 4},
    "OPENCV_FISHEYE": {
        **{"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3},
        **{"k1": 4, "k2": 5, "k3": 6, "k4": 7},
    },
}
_OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # camera axes: y up, z backward


def write_nerfstudio(job: ExportJob) -> None:
    """Writes ``transforms.json``: OpenGL world_from_cam, intrinsics with each frame.

    The world is the map's own, for the poses and for the points, hence ``applied_transform`` is
    the identity. Its images, masks and points are there already.

    Raises:
        ConfigError: nerfstudio has no such camera.
        OSError: it cannot be written.
    """
    has_masks = (job.to / MASKS).is_dir()
    cameras = job.reconstruction.cameras
    record = {
        "camera_model": _nerfstudio_model(job.reconstruction),
        "applied_transform": np.eye(4)[:3].tolist(),
        "ply_file_path": POINTS_NAME,
        "frames": [
            _nerfstudio_frame(image, cameras[image.camera_id], has_mask=has_masks)
            for image in job.images()
        ],
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (job.to / "transforms.json").write_text(text, encoding="utf-8")


def _nerfstudio_frame(
    image: pycolmap.Image, camera: pycolmap.Camera, *, has_mask: bool
) -> dict[str, Any]:
    mask = {"mask_path": f"{MASKS}/{image.name}.png"} if has_mask else {}
    world_from_cam = np.vstack([invert_pose(image.cam_from_world().matrix()), [0, 0, 0, 1]])
    return {
        "file_path": f"{IMAGES}/{image.name}",
        **mask,
        "colmap_im_id": image.image_id,
        "transform_matrix": (world_from_cam @ _OPENCV_FROM_OPENGL).tolist(),
        **_nerfstudio_intrinsics(camera),
    }


def _nerfstudio_model(reconstruction: pycolmap.Reconstruction) -> str:
    """The kind of all cameras in nerfstudio's words."""
    kinds = {_nerfstudio_kind(camera) for camera in reconstruction.cameras.values()}
    if len(kinds) > 1:
        raise ConfigError("nerfstudio takes lenses of one kind; export undistorted images with it")
    return kinds.pop() if kinds else "OPENCV"


def _nerfstudio_kind(camera: pycolmap.Camera) -> str:
    if camera.is_spherical():
        return "EQUIRECTANGULAR"
    return "OPENCV_FISHEYE" if camera.is_perspective_fisheye() else "OPENCV"


def _nerfstudio_intrinsics(camera: pycolmap.Camera) -> dict[str, float]:
    if camera.is_spherical():  # nerfstudio wants a focal length, and makes no use of it
        middle = {"cx": camera.width / 2.0, "cy": camera.height / 2.0}
        focal = {"fl_x": float(camera.width), "fl_y": float(camera.height)}
        return {"w": camera.width, "h": camera.height, **focal, **middle}
    try:
        positions = _NERFSTUDIO_PARAMS[camera.model_name]
    except KeyError:
        raise ConfigError(
            f"nerfstudio has no camera like {camera.model_name}; export undistorted images with it"
        ) from None
    is_fisheye = camera.is_perspective_fisheye()
    names = ("k1", "k2", "k3", "k4") if is_fisheye else ("k1", "k2", "p1", "p2")
    distortion = dict.fromkeys(names, 0.0)
    params = {name: float(camera.params[position]) for name, position in positions.items()}
    return {"w": camera.width, "h": camera.height, **distortion, **params}
