"""Points of a map whose places are known far worse than those of the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from engine.types import BoolArray, Float64Array

if TYPE_CHECKING:
    import pycolmap

_FAR_OUT = 3.0  # distances between the quartiles: Tukey, Exploratory Data Analysis (1977), 2D


def unsure_points(reconstruction: pycolmap.Reconstruction) -> BoolArray:
    """Which points are known far worse than the others of their map.

    A point that two images see at a small angle has an error of many times that of its neighbours
    along the line of sight, however well it fits its pixels.

    Returns:
        (P,) in order of their ids: whether the standard deviation of the place is far out among
        all, in logarithms.
    """
    sigmas = place_sigmas(reconstruction)
    known = np.isfinite(sigmas)
    if not known.any():
        return np.zeros(len(sigmas), np.bool_)
    first, third = np.log(np.quantile(sigmas[known], (0.25, 0.75)))
    return np.asarray(~known | (sigmas > np.exp(third + _FAR_OUT * (third - first))))


def place_sigmas(reconstruction: pycolmap.Reconstruction) -> Float64Array:
    """How well points are known by the images that see them, for errors of one pixel.

    Returns:
        (P,) in order of their ids: one standard deviation of the place along the axis where it is
        largest, in units of the map; inf where the images say nothing of that.
    """
    points = [point for _, point in sorted(reconstruction.points3D.items())]
    lengths = [len(point.track.elements) for point in points]
    seen_by = np.array([one.image_id for point in points for one in point.track.elements], np.int64)
    image_ids, row = np.unique(seen_by, return_inverse=True)
    images = [reconstruction.image(i) for i in image_ids.tolist()]
    centers = np.array([image.projection_center() for image in images]).reshape(-1, 3)
    focals_px = np.array([_focal_px(reconstruction.camera(image.camera_id)) for image in images])
    xyz = np.array([point.xyz for point in points], np.float64).reshape(-1, 3)
    of_point = np.repeat(np.arange(len(points)), lengths)
    sight = xyz[of_point] - centers[row]
    distances = np.maximum(np.linalg.norm(sight, axis=1), np.finfo(np.float64).tiny)
    rays = sight / distances[:, None]
    across = np.eye(3) - rays[:, :, None] * rays[:, None, :]  # a ray says nothing along itself
    information = np.zeros((len(points), 3, 3))
    np.add.at(information, of_point, across * ((focals_px[row] / distances) ** 2)[:, None, None])
    least = np.linalg.eigvalsh(information)[:, 0]
    most = np.trace(information, axis1=1, axis2=2)
    sigmas = np.full(len(points), np.inf)
    is_known = least > np.finfo(np.float64).eps * most
    sigmas[is_known] = least[is_known] ** -0.5
    return sigmas


def _focal_px(camera: pycolmap.Camera) -> float:
    """Pixels per radian about the axis."""
    if len(camera.focal_length_idxs()):
        return float(camera.mean_focal_length())
    return float(camera.width / math.tau)
