"""What is known of a camera before the map says anything: its focal length, how surely, bounds."""

from __future__ import annotations

from dataclasses import dataclass

import pycolmap

from engine.types import CalibrationOrigin

ASSUMED_SIGMA_RATIO = 0.7  # two of them reach from a quarter of the edge to four edges
POINTMAPS_SIGMA_RATIO = 0.10
TWO_VIEW_SIGMA_RATIO = 0.15

FOCAL_RATIOS = (0.2, 20.0)  # of the longer image edge, that a camera with a focal length can have
_MAX_FACTOR = 4.0  # by which a map may contradict a focal length that nobody vouched for


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
        edge_px = max(camera.width, camera.height)
        low_px, high_px = (ratio * edge_px for ratio in FOCAL_RATIOS)
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
