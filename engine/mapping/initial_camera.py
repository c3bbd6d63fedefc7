"""What calibration a camera starts with, and who may change it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import pycolmap

from engine.config import CamerasConfig
from engine.errors import MapError
from engine.types import Keyframe


class CalibrationOrigin(StrEnum):
    """Where a camera's first calibration comes from, most trusted first."""

    CONFIGURED = "configured"
    KNOWN = "known"  # the source knows it completely
    EXIF = "exif"
    POINTMAPS = "pointmaps"  # a dense matcher saw it
    TWO_VIEW_GEOMETRIES = "two_view_geometries"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialCamera:
    """A camera as it enters the map."""

    camera: pycolmap.Camera
    origin: CalibrationOrigin
    is_constant: bool  # bundle adjustment must not change it


def initial_camera(keyframe: Keyframe, config: CamerasConfig) -> InitialCamera:
    """The camera of a keyframe, from the first of these that knows it.

    The configuration's whole calibration, the source's, the configured focal length, the source's
    (EXIF), an assumption.

    Raises:
        MapError: the whole calibration does not fit its camera model.
    """
    prior = keyframe.intrinsics_prior
    fixed = config.intrinsics == "fixed"
    if config.params:
        camera = _camera(keyframe, config.model, params=config.params)
        return InitialCamera(camera=camera, origin=CalibrationOrigin.CONFIGURED, is_constant=fixed)
    if prior is not None and prior.params is not None and prior.camera_model is not None:
        camera = _camera(keyframe, prior.camera_model, params=prior.params)
        return InitialCamera(
            camera=camera,
            origin=CalibrationOrigin.KNOWN,
            is_constant=fixed or not config.refine_known_intrinsics,
        )
    if config.focal_px:
        focal_px, origin = config.focal_px, CalibrationOrigin.CONFIGURED
    elif prior is not None:
        focal_px, origin = prior.focal_px, CalibrationOrigin.EXIF
    else:
        edge = max(keyframe.width, keyframe.height)
        focal_px, origin = config.default_focal_ratio * edge, CalibrationOrigin.ASSUMED
    camera = pycolmap.Camera.create_from_model_name(
        1, config.model, focal_px, keyframe.width, keyframe.height
    )
    camera.has_prior_focal_length = origin is not CalibrationOrigin.ASSUMED
    return InitialCamera(camera=camera, origin=origin, is_constant=fixed)


def with_focal_length(camera: pycolmap.Camera, focal_px: float) -> list[float]:
    """Parameters for a camera's model and size: another focal length, no distortion, centred."""
    return list(
        pycolmap.Camera.create_from_model_name(
            1, camera.model_name, focal_px, camera.width, camera.height
        ).params
    )


def _camera(keyframe: Keyframe, model: str, *, params: tuple[float, ...]) -> pycolmap.Camera:
    try:
        camera = pycolmap.Camera.create_from_model_name(
            1, model, 1.0, keyframe.width, keyframe.height
        )
    except ValueError as error:
        raise MapError(f"{keyframe.name}: COLMAP knows no camera model {model}") from error
    # COLMAP takes any number of parameters without a word and reads beyond their end later.
    camera.params = list(params)
    if not camera.verify_params():
        raise MapError(f"{keyframe.name}: {model} does not have {len(params)} parameters")
    camera.has_prior_focal_length = True
    return camera
