"""Spherical images recognised by what is in them.

An equirectangular image is twice as wide as high. Its left border continues at its right border,
and its first and last row each show one point: the zenith and the nadir. An ordinary photo of that
shape (18:9 of a phone) does neither.
"""

from __future__ import annotations

import numpy as np

from engine.types import Float64Array, Uint8Array

_MAX_ROWS = 512  # looked at
_BESIDE_POLES = 0.2  # of the height: rows there are drawn out so far that they say nothing
_MIN_SEAM_CONTRAST = 6.0  # grey levels of a border column: a black frame continues anything
_MIN_SEAM_CORRELATION = 0.8
_MAX_SEAM_RATIO = 3.0  # of the difference of two columns beside each other
_MAX_SEAM_LEVELS = 2.0  # grey levels more, of noise and compression
_MAX_OPPOSITE_RATIO = 0.5  # of the difference of columns that have nothing to do with each other
_MAX_POLE_CONTRAST_RATIO = 0.7  # of a row elsewhere: an edge may run through a pole
_MAX_POLE_STEP_RATIO = 0.2  # of the difference of two pixels beside each other elsewhere
_MAX_POLE_LEVELS = 1.5  # grey levels more, of noise and compression


def is_spherical_shape(width: int, height: int) -> bool:
    """Whether an image of this size can be equirectangular."""
    return width == 2 * height


def is_equirectangular(pixels: Uint8Array) -> bool:
    """Whether an image (H, W, 3) shows everything around the camera, longitude by latitude."""
    height, width = pixels.shape[:2]
    if not is_spherical_shape(width, height):
        return False
    return has_closed_seam(pixels) and _has_poles(pixels)


def has_closed_seam(pixels: Uint8Array) -> bool:
    """Whether the left border of an image (H, W, 3) continues at its right border."""
    height, width = pixels.shape[:2]
    top, bottom = int(_BESIDE_POLES * height), int((1.0 - _BESIDE_POLES) * height)
    rows = np.linspace(top, bottom - 1, min(_MAX_ROWS, bottom - top)).astype(int)
    left, right = (_grey(pixels[rows, column]) for column in (0, width - 1))
    if min(left.std(), right.std()) < _MIN_SEAM_CONTRAST:
        return False
    if np.corrcoef(left, right)[0, 1] < _MIN_SEAM_CORRELATION:
        return False
    columns = np.linspace(0, width // 2 - 1, 32).astype(int)
    strips = [_grey(pixels[rows][:, columns + offset]) for offset in (0, 1, width // 2)]
    beside = float(np.abs(strips[1] - strips[0]).mean())
    opposite = float(np.abs(strips[2] - strips[0]).mean())
    seam = float(np.abs(left - right).mean())
    return (
        seam <= _MAX_SEAM_RATIO * beside + _MAX_SEAM_LEVELS
        and seam <= _MAX_OPPOSITE_RATIO * opposite
    )


def _has_poles(pixels: Uint8Array) -> bool:
    """Whether the first and the last row of an image (H, W, 3) each are next to one point.

    Such a row is drawn out so far that pixels beside each other are nearly the same.
    """
    height = len(pixels)
    rows = np.linspace(_BESIDE_POLES * height, (1.0 - _BESIDE_POLES) * height, 16).astype(int)
    elsewhere = _grey(pixels[rows])
    contrast = _MAX_POLE_LEVELS + _MAX_POLE_CONTRAST_RATIO * float(np.median(elsewhere.std(axis=1)))
    step = _MAX_POLE_LEVELS + _MAX_POLE_STEP_RATIO * float(
        np.abs(np.diff(elsewhere, axis=1)).mean()
    )
    poles = _grey(pixels[[0, height - 1]])
    steps = np.abs(np.diff(poles, axis=1)).mean(axis=1)
    return bool((poles.std(axis=1) <= contrast).all() and (steps <= step).all())


def _grey(pixels: Uint8Array) -> Float64Array:
    """The mean of the channels of pixels (..., 3)."""
    return np.asarray(pixels.mean(axis=-1))
