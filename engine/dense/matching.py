"""Matching of rectified images: semi-global, then to fractions of a pixel, with its error.

Semi-global matching is OpenCV's (Hirschmueller, PAMI 2008); refinement is a step of Lucas and
Kanade (IJCAI 1981) along the line, whose normal equation also says how exact the disparity is.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from engine.types import Float32Array, Uint8Array

UNKNOWN = -1000.0  # in place of a disparity
_BLOCK = 5  # px
_SMALL_STEP, _LARGE_STEP = 8 * _BLOCK * _BLOCK, 32 * _BLOCK * _BLOCK  # penalties of SGM
_UNIQUENESS_PERCENT = 8
_SPECKLE_PX = 60
_WINDOW = 7  # px, of the refinement
_EXPOSURE_WINDOW = 15  # px, over which the images may differ in brightness
_MAX_SHIFT = 1.0  # columns that the refinement may move a disparity
_FLOOR_SIGMA = 0.08  # columns, of poses, calibration and interpolation
_LEVEL_SIGMA = 0.25  # lines, that a point is off its line
_NOISE_LEVELS = 2.0  # standard deviation of grey levels where both images agree best


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Disparities:
    """Disparities of a rectified image."""

    disparity: Float32Array  # (H, W) columns, or UNKNOWN
    sigma: Float32Array  # (H, W) columns, one standard deviation


def match_lines(
    first: Uint8Array,
    second: Uint8Array,
    *,
    first_usable: Uint8Array,
    second_usable: Uint8Array,
    num_disparities: int,
) -> Disparities:
    """Disparities of two rectified images (H, W), which hold 0 to ``num_disparities``.

    Args:
        first: grey levels; its columns before ``num_disparities`` are none of the result's.
        second: grey levels, its points at most so many columns further left.
        first_usable: 255 where a pixel is of use, else 0.
        second_usable: likewise.
        num_disparities: a multiple of 16, less than the width.
    """
    matcher = cv2.StereoSGBM.create(
        minDisparity=0,
        numDisparities=num_disparities,
        blockSize=_BLOCK,
        P1=_SMALL_STEP,
        P2=_LARGE_STEP,
        disp12MaxDiff=1,
        uniquenessRatio=_UNIQUENESS_PERCENT,
        speckleWindowSize=_SPECKLE_PX,
        speckleRange=1,
        mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )
    # The columns at the left are there for the matcher alone.
    kept = np.s_[:, num_disparities:]
    sixteenths = matcher.compute(first, second)[kept]
    known = (sixteenths >= 0) & (first_usable[kept] > 0)
    disparity = sixteenths.astype(np.float32)
    disparity *= np.float32(1.0 / 16.0)
    columns = np.arange(num_disparities, first.shape[1], dtype=np.float32) - disparity
    lines = np.repeat(np.arange(len(first), dtype=np.float32)[:, None], columns.shape[1], axis=1)
    usable = cv2.remap(second_usable, columns, lines, cv2.INTER_NEAREST)
    known &= usable > 0
    warped = cv2.remap(second, columns, lines, cv2.INTER_LINEAR)
    shift, sigma = _refinement(first[kept], np.asarray(warped, np.uint8))
    known &= np.abs(shift) <= _MAX_SHIFT
    return Disparities(
        disparity=np.where(known, disparity + shift, np.float32(UNKNOWN)), sigma=sigma
    )


def _refinement(first: Uint8Array, warped: Uint8Array) -> tuple[Float32Array, Float32Array]:
    """What is to be added to disparities, and their standard deviation, in columns.

    Args:
        first: grey levels (H, W).
        warped: the other image's at the disparities found.
    """
    difference = np.subtract(first, warped, dtype=np.float32)
    difference -= cv2.blur(difference, (_EXPOSURE_WINDOW, _EXPOSURE_WINDOW))
    levels = cv2.addWeighted(first, 0.5, warped, 0.5, 0.0, dtype=cv2.CV_32F)
    slope = cv2.Sobel(levels, -1, 1, 0, ksize=1, scale=0.5)
    steepness = cv2.Sobel(levels, -1, 0, 1, ksize=1, scale=0.5)
    size = (_WINDOW, _WINDOW)
    strength = cv2.boxFilter(slope * slope, -1, size, normalize=False) + np.float32(1.0)
    shift = cv2.boxFilter(slope * difference, -1, size, normalize=False)
    noise = cv2.boxFilter(difference * difference, -1, size) + np.float32(_NOISE_LEVELS**2)
    # An edge along the line slides on it where the images are not exactly level.
    slide = cv2.boxFilter(slope * steepness, -1, size, normalize=False) / strength
    sigma = np.sqrt(
        noise / strength + slide * slide * np.float32(_LEVEL_SIGMA**2) + np.float32(_FLOOR_SIGMA**2)
    )
    return np.asarray(-shift / strength, np.float32), np.asarray(sigma, np.float32)
