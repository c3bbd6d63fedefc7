"""COLMAP's cameras as the two lens models that most other tools have: OpenCV's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pycolmap

# Parameters in the order of COLMAP's behind focal lengths and middle; those that a model lacks are
# zero, and those behind the named ones must be.
_BROWN = {
    "SIMPLE_PINHOLE": (),
    "PINHOLE": (),
    "SIMPLE_RADIAL": ("k1",),
    "RADIAL": ("k1", "k2"),
    "OPENCV": ("k1", "k2", "p1", "p2"),
    "FULL_OPENCV": ("k1", "k2", "p1", "p2", "k3"),
}
_FISHEYE = {
    "SIMPLE_FISHEYE": (),
    "FISHEYE": (),
    "SIMPLE_RADIAL_FISHEYE": ("k1",),
    "RADIAL_FISHEYE": ("k1", "k2"),
    "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4"),
}


def brown_distortion(camera: pycolmap.Camera) -> dict[str, float] | None:
    """k1, k2, p1, p2 and k3 of a camera as Brown and Conrady have it; None: it is none."""
    return _distortion(camera, _BROWN, ("k1", "k2", "p1", "p2", "k3"))


def fisheye_distortion(camera: pycolmap.Camera) -> dict[str, float] | None:
    """k1 to k4 of an equidistant fisheye; None: the camera is none."""
    return _distortion(camera, _FISHEYE, ("k1", "k2", "k3", "k4"))


def _distortion(
    camera: pycolmap.Camera, models: dict[str, tuple[str, ...]], names: tuple[str, ...]
) -> dict[str, float] | None:
    own = models.get(camera.model_name)
    if own is None:
        return None
    extra = [float(camera.params[idx]) for idx in camera.extra_params_idxs()]
    if any(extra[len(own) :]):
        return None
    return {**dict.fromkeys(names, 0.0), **dict(zip(own, extra, strict=False))}
