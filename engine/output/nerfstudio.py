"""``transforms.json``: cameras and poses in nerfstudio's form.

Format: https://docs.nerf.studio/quickstart/data_conventions.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ConfigError
from engine.geometry import invert_pose

if TYPE_CHECKING:
    import pycolmap

TRANSFORMS_NAME = "transforms.json"

# Where nerfstudio's names stand in COLMAP's parameters of each model; the rest are zero.
_PARAMS = {
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


def check_cameras(reconstruction: pycolmap.Reconstruction) -> None:
    """Checks that nerfstudio has cameras like those of a model.

    Raises:
        ConfigError: it has none like one of them, or no word for all of them.
    """
    _model(reconstruction)
    for camera in reconstruction.cameras.values():
        _intrinsics(camera)


def transforms_record(
    reconstruction: pycolmap.Reconstruction, *, points_name: str, masks_folder: str
) -> dict[str, Any]:
    """The record of ``transforms.json``: OpenGL world_from_cam, intrinsics with each frame.

    The world is the model's own, for the poses and for the points, hence ``applied_transform`` is
    the identity. Paths are those beside the file; images are in ``images/``.

    Args:
        reconstruction: the model of the images.
        points_name: the PLY file with its points.
        masks_folder: has a mask of each image, with .png added to its name; "": there are none.

    Raises:
        ConfigError: nerfstudio has no camera like one of them, or no word for all of them.
    """
    images = [reconstruction.image(image_id) for image_id in sorted(reconstruction.reg_image_ids())]
    return {
        "camera_model": _model(reconstruction),
        "applied_transform": np.eye(4)[:3].tolist(),
        "ply_file_path": points_name,
        "frames": [
            _frame(image, reconstruction.camera(image.camera_id), masks_folder=masks_folder)
            for image in images
        ],
    }


def _frame(image: pycolmap.Image, camera: pycolmap.Camera, *, masks_folder: str) -> dict[str, Any]:
    mask = {"mask_path": f"{masks_folder}/{image.name}.png"} if masks_folder else {}
    world_from_cam = np.vstack([invert_pose(image.cam_from_world().matrix()), [0, 0, 0, 1]])
    return {
        "file_path": f"images/{image.name}",
        **mask,
        "colmap_im_id": image.image_id,
        "transform_matrix": (world_from_cam @ _OPENCV_FROM_OPENGL).tolist(),
        **_intrinsics(camera),
    }


def _model(reconstruction: pycolmap.Reconstruction) -> str:
    """The kind of all cameras in nerfstudio's words."""
    kinds = {_kind(camera) for camera in reconstruction.cameras.values()}
    if len(kinds) > 1:
        raise ConfigError("nerfstudio takes lenses of one kind; export undistorted images with it")
    return kinds.pop() if kinds else "OPENCV"


def _kind(camera: pycolmap.Camera) -> str:
    if camera.is_spherical():
        return "EQUIRECTANGULAR"
    return "OPENCV_FISHEYE" if camera.is_perspective_fisheye() else "OPENCV"


def _intrinsics(camera: pycolmap.Camera) -> dict[str, float]:
    if camera.is_spherical():  # nerfstudio wants a focal length, and makes no use of it
        middle = {"cx": camera.width / 2.0, "cy": camera.height / 2.0}
        focal = {"fl_x": float(camera.width), "fl_y": float(camera.height)}
        return {"w": camera.width, "h": camera.height, **focal, **middle}
    try:
        positions = _PARAMS[camera.model_name]
    except KeyError:
        raise ConfigError(
            f"nerfstudio has no camera like {camera.model_name}; export undistorted images with it"
        ) from None
    is_fisheye = camera.is_perspective_fisheye()
    names = ("k1", "k2", "k3", "k4") if is_fisheye else ("k1", "k2", "p1", "p2")
    distortion = dict.fromkeys(names, 0.0)
    params = {name: float(camera.params[position]) for name, position in positions.items()}
    return {"w": camera.width, "h": camera.height, **distortion, **params}
