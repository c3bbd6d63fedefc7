"""Reads calibration files: COLMAP's cameras.txt, OpenCV's and ROS's YAML, Kalibr's YAML.

The format is recognised by what is in the file, not by its name.
"""

from __future__ import annotations

from pathlib import Path

from adapters.calibrations.calibration import Calibration
from adapters.calibrations.colmap_cameras import looks_like_colmap, read_colmap
from adapters.calibrations.fields import parse_fields
from adapters.calibrations.kalibr_yaml import looks_like_kalibr, read_kalibr
from adapters.calibrations.opencv_yaml import looks_like_opencv, read_opencv
from engine.errors import ConfigError
from engine.regular_files import read_regular_file

_MAX_BYTES = 1_000_000


def read_calibration_file(path: Path) -> list[Calibration]:
    """The calibrations in a file, one for each camera, in the order in which they stand there.

    Raises:
        ConfigError: the file cannot be read, is none of the formats, or one of its cameras is no
            camera that can be; the words name the file and the camera.
    """
    text, origin = _text_of(path), str(path)
    if looks_like_colmap(text):
        return read_colmap(text, origin=origin)
    fields = parse_fields(text, origin=origin)
    if looks_like_kalibr(fields):
        return read_kalibr(fields, origin=origin)
    if looks_like_opencv(fields):
        return read_opencv(fields, text, origin=origin)
    raise ConfigError(
        f"{origin}: holds no calibration; expected COLMAP's cameras.txt, YAML of OpenCV or ROS"
        " (camera_matrix), or of Kalibr (camera_model, intrinsics)"
    )


def _text_of(path: Path) -> str:
    try:
        data = read_regular_file(path, max_bytes=_MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text, so no calibration") from error
    if "\0" in text:
        raise ConfigError(f"{path}: is no text, so no calibration")
    if not text.strip():
        raise ConfigError(f"{path}: is empty")
    return text
