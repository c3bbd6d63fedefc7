"""``--z-up``: a map turned so that +z points away from the ground.

A map on the globe has its z upwards already. Else up is taken from cameras that are held level, as
people and gimbals hold them: their x axes are then horizontal and, over different headings, span
the horizontal plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import ConfigError
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

_MAX_TILT = np.sin(np.radians(10.0))  # of x axes out of the horizontal plane, root mean square
_MIN_SPREAD = np.sin(np.radians(12.0))  # of headings, likewise
_MIN_SIDE = 0.3  # of the mean of the cameras' axes along up, to know which of two ways it is
_MIN_ALIKE = 0.9  # length of the mean of unit vectors, of cameras that all stand alike


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upright:
    """How a map is turned."""

    upright_from_map: Float64Array  # (3, 3) rotation
    words: str  # where it is from, for people


def upright_of(model: pycolmap.Reconstruction, *, is_on_globe: bool) -> Upright:
    """Finds up of a map.

    Args:
        model: of the map.
        is_on_globe: it lies in metres east, north, up.

    Raises:
        ConfigError: up is not known.
    """
    if is_on_globe:
        return Upright(upright_from_map=np.eye(3), words="z is up, as the positions say")
    rotations = np.array(
        [model.image(i).cam_from_world().matrix()[:, :3] for i in sorted(model.reg_image_ids())]
    ).reshape(-1, 3, 3)
    up, words = _up_of(rotations)
    return Upright(upright_from_map=_rotation_to(up, ahead=rotations[0, 2]), words=words)


def _up_of(rotations: Float64Array) -> tuple[Float64Array, str]:
    """Up in the map, a unit vector, by cameras (N, 3, 3) from it."""
    right, down, forward = rotations[:, 0], rotations[:, 1], rotations[:, 2]
    _, spreads, axes = np.linalg.svd(right, full_matrices=False)
    spreads, up = spreads / np.sqrt(max(len(right), 1)), axes[-1]
    is_level = len(right) >= 3 and spreads[2] <= _MAX_TILT and spreads[1] >= _MIN_SPREAD
    if is_level:
        # People hold cameras upright; those that look down look away from up.
        for axis in (down, forward):
            side = float((axis @ up).mean())
            if abs(side) >= _MIN_SIDE:
                return -np.sign(side) * up, "z is up by cameras that are level, no more"
    mean = -down.mean(axis=0)
    sideways = right.mean(axis=0)
    alike = min(np.linalg.norm(mean), np.linalg.norm(sideways))
    if len(right) and alike >= _MIN_ALIKE:
        sideways /= np.linalg.norm(sideways)
        mean -= (mean @ sideways) * sideways
        words = "z is up if the cameras, which all look one way, look neither up nor down"
        return mean / np.linalg.norm(mean), words
    raise ConfigError(
        "--z-up: which way is up is not known: the map has no place on the globe, and its cameras"
        " were not held level; leave --z-up out, or lay the map onto positions (livesfm"
        " georeference)"
    )


def _rotation_to(up: Float64Array, *, ahead: Float64Array) -> Float64Array:
    """The rotation that makes a direction +z, and another one, as far as it can, +y."""
    level = ahead - (ahead @ up) * up
    if np.linalg.norm(level) < 1e-6:
        level = np.eye(3)[int(np.abs(up).argmin())]
        level = level - (level @ up) * up
    north = level / np.linalg.norm(level)
    return np.stack([np.cross(north, up), north, up])
