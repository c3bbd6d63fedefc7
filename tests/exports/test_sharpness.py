from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from adapters.exports.frame_choice import choose_sharpest
from adapters.exports.sharpness import PatchDetail, patch_detail, sharpness_of
from engine.geometry import rotation_from_vector
from engine.types import Float64Array, Uint8Array

NUM_POINTS = 60


def picture(seed: int, *, contrast: float = 30.0) -> Uint8Array:
    numbers = np.random.default_rng(seed)
    sum_ = np.zeros((240, 320))
    for cells in (20, 60, 200):
        coarse = numbers.normal(0.0, contrast, (cells, cells))
        sum_ += cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(sum_ + 128, 0, 255), np.uint8)


def places(seed: int = 0) -> Float64Array:
    return np.random.default_rng(seed).uniform((30, 30), (290, 210), (NUM_POINTS, 2))


def detail(grey: Uint8Array, xy: Float64Array, *, first_id: int = 0) -> PatchDetail:
    return patch_detail(grey, np.arange(first_id, first_id + len(xy)), xy)


@pytest.mark.parametrize("blur_px", [3, 5, 9])
def test_blur_of_the_same_view_is_less_sharp_whatever_its_direction(blur_px: int) -> None:
    grey = picture(1)
    for size in ((blur_px, 1), (1, blur_px)):
        blurred = np.asarray(cv2.blur(grey, size), np.uint8)
        sharp, dull = sharpness_of([detail(grey, places()), detail(blurred, places())])
        assert sharp > dull + 0.3


def test_more_blur_is_less_sharp() -> None:
    grey = picture(1)
    images = [grey, *(np.asarray(cv2.blur(grey, (px, 1)), np.uint8) for px in (2, 4, 7, 11))]
    values = sharpness_of([detail(image, places()) for image in images])
    assert (np.diff(values) < -0.1).all()


def test_exposure_makes_no_difference() -> None:
    grey = picture(1, contrast=15.0)
    brighter = cv2.convertScaleAbs(grey, alpha=1.3, beta=-30.0)
    values = sharpness_of([detail(grey, places()), detail(np.asarray(brighter), places())])
    assert abs(values[0] - values[1]) < 0.05


def test_a_blurred_lawn_is_less_sharp_than_a_sharp_wall() -> None:
    """Each is compared with a frame that shows the same, and these two show one place together."""
    lawn, wall = picture(1), np.asarray(cv2.GaussianBlur(picture(2), (0, 0), 4.0), np.uint8)
    blurred_lawn = np.asarray(cv2.blur(lawn, (7, 1)), np.uint8)
    shared = picture(3)
    here, there = places(4), places(5)
    frames = [
        (lawn, 0, shared, shared),
        (blurred_lawn, 0, np.asarray(cv2.blur(shared, (7, 1)), np.uint8), None),
        (wall, 1000, shared, None),
    ]
    details = []
    for own, first_id, common, _ in frames:
        of_own = detail(own, here, first_id=first_id)
        of_common = detail(common, there, first_id=5000)
        details.append(
            PatchDetail(
                point3D_ids=np.concatenate([of_own.point3D_ids, of_common.point3D_ids]),
                log_detail=np.concatenate([of_own.log_detail, of_common.log_detail]),
            )
        )
    values = sharpness_of(details)
    raw = [float(cv2.Laplacian(image, cv2.CV_64F).var()) for image in (blurred_lawn, wall)]
    assert raw[0] > raw[1]  # by the variance of the Laplacian it is the other way round
    assert values[2] > values[1] + 0.3
    assert abs(values[0] - values[2]) < 0.15


def test_a_frame_that_shares_nothing_is_not_compared() -> None:
    alone = detail(picture(1), places(), first_id=9000)
    values = sharpness_of([detail(picture(1), places()), detail(picture(1), places()), alone])
    assert values[2] == -np.inf and np.isfinite(values[:2]).all()
    assert (sharpness_of([alone]) == -np.inf).all()
    empty = PatchDetail(point3D_ids=np.empty(0, np.int64), log_detail=np.empty(0))
    assert (sharpness_of([empty, empty]) == -np.inf).all()


def test_points_at_the_border_and_without_contrast_are_left_out() -> None:
    xy = np.array([[0.5, 0.5], [319.5, 239.5], [10.0, 120.0], [160.0, 120.0]])
    assert detail(picture(1), xy).point3D_ids.tolist() == [3]
    assert not len(detail(np.full((240, 320), 90, np.uint8), xy).point3D_ids)


def pose(x: float, *, turn_rad: float = 0.0) -> Float64Array:
    rotation = rotation_from_vector(np.array([0.0, turn_rad, 0.0]))
    return np.column_stack([rotation, -rotation @ np.array([x, 0.0, 0.0])])


def test_a_camera_that_stands_still_gets_no_more_than_its_share() -> None:
    poses = [pose(0.0) for _ in range(80)] + [pose(0.1 * number) for number in range(1, 21)]
    chosen = choose_sharpest(poses, np.zeros(100), depth_map=1.0, number=5)
    assert len(chosen) == 5 and sum(row < 80 for row in chosen) == 1


def test_turning_counts_as_well_as_moving() -> None:
    poses = [pose(0.0, turn_rad=0.1 * number) for number in range(30)]
    chosen = choose_sharpest(poses, np.zeros(30), depth_map=1.0, number=4)
    assert np.diff(chosen).min() >= 6


def test_the_sharpest_near_each_view_is_taken_and_no_view_is_lost() -> None:
    poses = [pose(0.01 * number) for number in range(200)]
    sharpness = np.random.default_rng(0).normal(size=200)
    chosen = choose_sharpest(poses, sharpness, depth_map=1.0, number=20)
    assert len(chosen) == 20
    assert sharpness[chosen].mean() > 0.8  # of any 20 it is about 0
    assert np.diff(chosen).max() <= 25


def test_all_are_taken_where_there_are_no_more_and_equal_places_count_once() -> None:
    assert choose_sharpest([pose(0.0)] * 3, np.zeros(3), depth_map=1.0, number=5) == [0, 1, 2]
    assert len(choose_sharpest([pose(0.0)] * 9, np.zeros(9), depth_map=1.0, number=5)) == 1


def test_thousands_of_views_take_little_memory() -> None:
    rng = np.random.default_rng(0)
    poses = [np.column_stack([np.eye(3), center]) for center in rng.normal(size=(2000, 3))]
    tracemalloc.start()
    try:
        chosen = choose_sharpest(poses, rng.normal(size=2000), depth_map=1.0, number=400)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(chosen) == 400
    assert peak_bytes < 5e6
