"""Matching of rectified images: semi-global, then to fractions of a pixel, with its error.

Semi-global matching is OpenCV's (Hirschmueller, PAMI 2008); refinement is a step of Lucas and
Kanade (IJCAI 1981) along the line, whose normal equation also says how exact the disparity is.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from engine.types import BoolArray, Float32Array, Uint8Array

_BLOCK = 5  # px
_SMALL_STEP, _LARGE_STEP = 8 * _BLOCK * _BLOCK, 32 * _BLOCK * _BLOCK  # penalties of SGM
_UNIQUENESS_PERCENT = 8
_SPECKLE_PX = 60
_WINDOW = 7  # px, of the refinement
_MAX_SHIFT = 1.0  # columns that the refinement may move a disparity
_FLOOR_SIGMA = 0.08  # columns, of poses, calibration and interpolation
_NOISE_LEVELS = 2.0  # standard deviation of grey levels where both images agree best


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Disparities:
    """Disparities of a rectified image."""

    disparity: Float32Array  # (H, W) columns; -1: unknown
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
        first: grey levels; the columns before ``num_disparities`` get no disparity.
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
    sixteenths = matcher.compute(first, second)
    disparity = np.asarray(sixteenths, np.float32) / np.float32(16.0)
    known = (sixteenths >= 0) & (first_usable > 0)
    return _refined(first, second, second_usable, disparity, known)


def _refined(
    first: Uint8Array,
    second: Uint8Array,
    second_usable: Uint8Array,
    disparity: Float32Array,
    known: BoolArray,
) -> Disparities:
    height, width = first.shape
    columns = np.arange(width, dtype=np.float32)
    lines = np.repeat(np.arange(height, dtype=np.float32)[:, None], width, axis=1)
    # Differences of brightness are taken out with the mean of the surroundings.
    first_levels = first.astype(np.float32)
    second_levels = second.astype(np.float32)
    first_levels -= cv2.blur(first_levels, (15, 15))
    second_levels -= cv2.blur(second_levels, (15, 15))
    at = columns - disparity
    warped = cv2.remap(second_levels, at, lines, cv2.INTER_LINEAR)
    usable = cv2.remap(second_usable, at, lines, cv2.INTER_NEAREST)
    known &= usable > 0
    slope = (
        0.5
        * (
            cv2.Sobel(first_levels, cv2.CV_32F, 1, 0, ksize=1)
            + cv2.Sobel(warped, cv2.CV_32F, 1, 0, ksize=1)
        )
        * 0.5
    )
    difference = first_levels - warped
    size = (_WINDOW, _WINDOW)
    strength = cv2.boxFilter(slope * slope, cv2.CV_32F, size, normalize=False)
    shift = -cv2.boxFilter(slope * difference, cv2.CV_32F, size, normalize=False) / (strength + 1.0)
    noise = cv2.boxFilter(difference * difference, cv2.CV_32F, size)
    known &= np.abs(shift) <= _MAX_SHIFT
    sigma = np.sqrt((noise + _NOISE_LEVELS**2) / (strength + 1.0) * 1.0 + _FLOOR_SIGMA**2)
    return Disparities(disparity=np.where(known, disparity + shift, np.float32(-1.0)), sigma=sigma)
