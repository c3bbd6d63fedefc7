"""Calibrations in COLMAP's ``cameras.txt``: a line ``CAMERA_ID MODEL WIDTH HEIGHT PARAMS...``."""

from __future__ import annotations

import math
import re

from adapters.calibrations.calibration import Calibration, checked_calibration
from adapters.calibrations.fields import numbers
from engine.errors import ConfigError

_LINE = re.compile(r"(?:(?P<id>\d+)\s+)?(?P<model>[A-Z][A-Z0-9_]+)\s+(?P<numbers>[^:\[\]{}]+)")


def looks_like_colmap(text: str) -> bool:
    """Whether the first line that is no comment begins as a camera of COLMAP does."""
    lines = _lines(text)
    return bool(lines) and _LINE.fullmatch(lines[0]) is not None


def read_colmap(text: str, *, origin: str) -> list[Calibration]:
    """The cameras of the text, named by their ids.

    Raises:
        ConfigError: a line is no camera, or no camera that can be.
    """
    return [_camera(line, origin=origin) for line in _lines(text)]


def _camera(line: str, *, origin: str) -> Calibration:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ConfigError(
            f"{origin}: {line[:60]!r} is no camera; expected ID MODEL WIDTH HEIGHT PARAMS..."
        )
    name = match["id"] or ""
    camera_origin = f"{origin}#{name}" if name else origin
    width, height, *params = [
        *numbers(match["numbers"].split(), what="the line", origin=camera_origin),
        *(math.nan, math.nan),
    ]
    if not (width.is_integer() and height.is_integer()):
        raise ConfigError(f"{camera_origin}: no width and height in {line[:60]!r}")
    return checked_calibration(
        origin=camera_origin,
        name=name,
        model=match["model"],
        width=int(width),
        height=int(height),
        params=params[:-2],
    )


def _lines(text: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]
