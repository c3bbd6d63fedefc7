"""Sharpness and motion at a glance."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from adapters.phone.motion_blur import MotionBlurMeter
from engine.types import Uint8Array


def scene(seed: int = 0) -> Uint8Array:
    """A picture with structure at all scales, (600, 1000, 3)."""
    rng = np.random.default_rng(seed)
    grey = np.zeros((600, 1000))
    for size in (12, 40, 120, 300):
        grey += cv2.resize(rng.uniform(0, 1, (size, size)), (1000, 600)) / np.sqrt(size)
    grey = (255 * (grey - grey.min()) / np.ptp(grey)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def test_a_blurred_picture_is_less_sharp() -> None:
    sharp = scene()
    blurred = np.asarray(cv2.GaussianBlur(sharp, (31, 31), 0), np.uint8)
    sharpness = MotionBlurMeter().measure(sharp).sharpness
    assert MotionBlurMeter().measure(blurred).sharpness < 0.2 * sharpness


@pytest.mark.parametrize("shift_px", [8, 64, 160])
def test_a_shift_is_a_share_of_the_width(shift_px: int) -> None:
    picture, meter = scene(), MotionBlurMeter()
    assert meter.measure(picture[:480, :640]).shift_ratio is None
    moved = meter.measure(picture[:480, shift_px : shift_px + 640])
    assert moved.shift_ratio == pytest.approx(shift_px / 640, abs=0.01)


def test_another_scene_has_no_shift() -> None:
    meter = MotionBlurMeter()
    meter.measure(scene()[:480, :640])
    assert meter.measure(scene(seed=1)[:480, :640]).shift_ratio is None


def test_a_picture_of_another_size_begins_anew() -> None:
    picture, meter = scene(), MotionBlurMeter()
    meter.measure(picture[:480, :640])
    assert meter.measure(picture[:600, :480]).shift_ratio is None
    assert meter.measure(picture[:600, 10:490]).shift_ratio == pytest.approx(10 / 480, abs=0.01)


def test_a_picture_of_one_colour_says_nothing() -> None:
    flat = np.full((480, 640, 3), 90, np.uint8)
    meter = MotionBlurMeter()
    assert meter.measure(flat).sharpness == 0.0
    assert (meter.measure(flat).shift_ratio or 0.0) < 1e-6


def test_after_a_picture_that_was_not_measured_the_shift_is_unknown() -> None:
    picture, meter = scene(), MotionBlurMeter()
    meter.measure(picture[:480, :640])
    moved = picture[:480, 64:704]
    assert meter.measure(moved, is_next=False).shift_ratio is None
    assert meter.measure(moved).shift_ratio == pytest.approx(0.0, abs=0.01)
