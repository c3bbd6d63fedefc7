"""What is known of a camera before the map says anything: its focal length, how surely, bounds."""

from __future__ import annotations

from dataclasses import dataclass

import pycolmap

from engine.estimators.camera_limits import focal_limits_px
from engine.types import CalibrationOrigin

ASSUMED_SIGMA_RATIO = 0.7  # two of them reach from a quarter of the edge to four edges
POINTMAPS_SIGMA_RATIO = 0.10
TWO_VIEW_SIGMA_RATIO = 0.15
RECOGNISED_SIGMA_RATIO = 0.15

_MAX_FACTOR = 4.0  # by which a map may contradict a focal length that nobody vouched for

_WORDS = {
    CalibrationOrigin.CONFIGURED: "as configured",
    CalibrationOrigin.FILE: "by the calibration file",
    CalibrationOrigin.KNOWN: "by the source",
    CalibrationOrigin.EXIF: "by EXIF",
    CalibrationOrigin.EXIF_35MM: "by EXIF's 35 mm equivalent",
    CalibrationOrigin.POINTMAPS: "by the matcher",
    CalibrationOrigin.TWO_VIEW_GEOMETRIES: "by the first pairs",
    CalibrationOrigin.RECOGNISED: "recognised by small maps",
    CalibrationOrigin.ASSUMED: "assumed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraPrior:
    """What bundle adjustment must respect in the calibration of one camera.

    The standard deviation is one of the logarithm of the focal length: a ratio where it is small.
    """

    origin: CalibrationOrigin
    focal_px: float  # 0: the model has none
    focal_sigma_ratio: float
    min_focal_px: float
    max_focal_px: float
    is_constant: bool = False  # bundle adjustment must not change the calibration
    distortion: tuple[float, ...] = ()  # at the start, in COLMAP's order

    @property
    def words(self) -> str:
        """Where the focal length comes from, in words."""
        return _WORDS[self.origin]

    @classmethod
    def of(
        cls,
        camera: pycolmap.Camera,
        *,
        origin: CalibrationOrigin,
        focal_sigma_ratio: float,
        max_change_ratio: float | None = None,
        is_constant: bool = False,
    ) -> CameraPrior:
        """The prior around a camera's present focal length.

        Args:
            camera: its calibration at the start.
            origin: where that comes from.
            focal_sigma_ratio: one standard deviation.
            max_change_ratio: how far the focal length may move at most; None: as far as any camera
                of that origin may.
            is_constant: bundle adjustment must not change the calibration.
        """
        has_focal_length = bool(len(camera.focal_length_idxs()))
        focal_px = float(camera.mean_focal_length()) if has_focal_length else 0.0
        low_px, high_px = focal_limits_px(camera)
        if max_change_ratio is not None:
            low_px, high_px = focal_px * (1 - max_change_ratio), focal_px * (1 + max_change_ratio)
        elif origin is not CalibrationOrigin.ASSUMED:
            low_px = max(low_px, focal_px / _MAX_FACTOR)
            high_px = min(high_px, focal_px * _MAX_FACTOR)
        return cls(
            origin=origin,
            focal_px=focal_px,
            focal_sigma_ratio=focal_sigma_ratio,
            min_focal_px=min(low_px, focal_px),
            max_focal_px=max(high_px, focal_px),
            is_constant=is_constant,
            distortion=tuple(float(camera.params[idx]) for idx in camera.extra_params_idxs()),
        )

    @classmethod
    def assumed(cls, camera: pycolmap.Camera, *, is_constant: bool = False) -> CameraPrior:
        """The prior of a camera of which nothing is known."""
        return cls.of(
            camera,
            origin=CalibrationOrigin.ASSUMED,
            focal_sigma_ratio=ASSUMED_SIGMA_RATIO,
            is_constant=is_constant,
        )
