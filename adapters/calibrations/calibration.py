"""A calibration as a file gives it: checked, scaled to other image sizes, turned with photos.

Everything is COLMAP's: camera models by name, parameters in their order, and pixels in which the
first pixel's centre is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    import pycolmap

OPENCV_PIXEL_OFFSET = 0.5  # OpenCV and Kalibr: the first pixel's centre is (0, 0)
_ROUNDING_PX = 1.0  # by which each edge of a resized image may be off
_MAX_EDGE_PX = 1_000_000

# Parameters that change places and signs in an image turned by 90 degrees clockwise: the new value
# of each is the sign times the old value of the other. All others are radial.
_TURNED_PARAMS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "OPENCV": (("p1", 1, "p2"), ("p2", -1, "p1")),
    "FULL_OPENCV": (("p1", 1, "p2"), ("p2", -1, "p1")),
    "THIN_PRISM_FISHEYE": (
        *(("p1", 1, "p2"), ("p2", -1, "p1")),
        *(("sx1", -1, "sy1"), ("sy1", 1, "sx1")),
    ),
    "RAD_TAN_THIN_PRISM_FISHEYE": (
        *(("p0", -1, "p1"), ("p1", 1, "p0")),
        *(("s0", -1, "s2"), ("s1", -1, "s3"), ("s2", 1, "s0"), ("s3", 1, "s1")),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The calibration of one camera of a file, for images of one size."""

    origin: str  # the file and, where it holds several cameras, which one; for messages
    name: str  # of the camera in its file; empty where it has none
    model: str
    width: int  # px
    height: int
    params: tuple[float, ...]

    @property
    def size(self) -> str:
        """Width and height in words."""
        return f"{self.width} x {self.height}"

    @property
    def focal_px(self) -> float:
        """The mean focal length; 0 for models without one."""
        indices = self.camera().focal_length_idxs()
        return sum(self.params[i] for i in indices) / len(indices) if len(indices) else 0.0

    def camera(self) -> pycolmap.Camera:
        """The calibration as COLMAP's camera."""
        import pycolmap

        camera = pycolmap.Camera.create_from_model_name(1, self.model, 1.0, self.width, self.height)
        camera.params = list(self.params)
        return camera

    def fits(self, width: int, height: int) -> bool:
        """Whether images of this size can be of this camera: resized as a whole, and rounded."""
        small, large = sorted(((width, height), (self.width, self.height)))
        lowest = max(
            (edge - _ROUNDING_PX) / whole for edge, whole in zip(small, large, strict=True)
        )
        highest = min(
            (edge + _ROUNDING_PX) / whole for edge, whole in zip(small, large, strict=True)
        )
        return lowest <= highest

    def scaled_to(self, width: int, height: int) -> Calibration:
        """The calibration of the same images resized to another size."""
        camera = self.camera()
        camera.rescale(width, height)
        return replace(self, width=width, height=height, params=tuple(camera.params.tolist()))

    def turned(self, quarter_turns: int) -> Calibration:
        """The calibration of the same images turned clockwise by so many times 90 degrees."""
        turned = self
        for _ in range(quarter_turns % 4):
            turned = turned._turned_once()
        return turned

    def _turned_once(self) -> Calibration:
        """A point (x, y) of the image comes to (height - y, x), a ray (x, y, z) to (-y, x, z)."""
        names = _param_names(self.camera())
        old = dict(zip(names, self.params, strict=True))
        new = dict(old)
        if {"w", "h"} <= old.keys():
            new.update(w=old["h"], h=old["w"])
        else:
            new.update(cx=self.height - old["cy"], cy=old["cx"])
        if "fx" in old:
            new.update(fx=old["fy"], fy=old["fx"])
        for name, sign, other in _TURNED_PARAMS.get(self.model, ()):
            new[name] = sign * old[other]
        return replace(
            self,
            width=self.height,
            height=self.width,
            params=tuple(new[name] for name in names),
        )


def checked_calibration(
    *,
    origin: str,
    name: str,
    model: str,
    width: int,
    height: int,
    params: Sequence[float],
) -> Calibration:
    """A calibration that can be one.

    Raises:
        ConfigError: with the file, the camera, and what is wrong: COLMAP knows no such model, the
            number of parameters is another one, something is not finite, or the size or a focal
            length is not positive.
    """
    import pycolmap

    if model not in pycolmap.CameraModelId.__members__ or model == "INVALID":
        raise ConfigError(f"{origin}: COLMAP knows no camera model {model}")
    if not (0 < width <= _MAX_EDGE_PX and 0 < height <= _MAX_EDGE_PX):
        raise ConfigError(f"{origin}: {width} x {height} px is no size of an image")
    calibration = Calibration(
        origin=origin,
        name=name,
        model=model,
        width=width,
        height=height,
        params=tuple(float(param) for param in params),
    )
    blank = pycolmap.Camera.create_from_model_name(1, model, 1.0, width, height)
    names = _param_names(blank)
    if len(params) != len(names):
        raise ConfigError(
            f"{origin}: {model} has {len(names)} parameters ({', '.join(names)}),"
            f" {len(params)} given"
        )
    for param_name, param in zip(names, calibration.params, strict=True):
        if not math.isfinite(param):
            raise ConfigError(f"{origin}: {param_name} is {param}")
    for i in blank.focal_length_idxs():
        if calibration.params[i] <= 0.0:
            raise ConfigError(f"{origin}: the focal length {names[i]} is {calibration.params[i]:g}")
    return calibration


def _param_names(camera: pycolmap.Camera) -> list[str]:
    return [name.strip() for name in camera.params_info.split(",")]
