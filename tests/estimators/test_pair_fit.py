"""Relative poses fitted to matches: right ones stay, wrong ones are found, turns have no depth."""

from __future__ import annotations

import numpy as np
import pytest

from engine.estimators.pair_fit import PairFits, PairSamples, fit_pairs
from engine.geometry import rotation_from_vector, transform_points
from engine.types import Float64Array

FOCAL_PX = 800.0
NUM = 40


def truth(*, baseline: float = 0.5) -> Float64Array:
    """A relative pose (3, 4): a turn of 6 degrees and a step aside."""
    turned = rotation_from_vector(np.array([0.02, 0.1, -0.01]))
    return np.column_stack([turned, baseline * np.array([1.0, 0.1, 0.2])])


def samples(
    given: Float64Array,
    *,
    baseline: float = 0.5,
    noise_px: float = 0.3,
    wrong: int = 0,
    num: int = NUM,
    seed: int = 0,
) -> PairSamples:
    """Matches of one pair whose true pose is `truth`, and the pose to examine."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((-2.0, -2.0, 3.0), (2.0, 2.0, 9.0), (num, 3))
    seen = [points, transform_points(truth(baseline=baseline), points)]
    rays = []
    for one in seen:
        noisy = one / one[:, 2:] + np.column_stack(
            [rng.normal(0.0, noise_px / FOCAL_PX, (num, 2)), np.zeros(num)]
        )
        rays.append(noisy / np.linalg.norm(noisy, axis=1, keepdims=True))
    if wrong:
        rays[1][:wrong] = rays[1][:wrong][::-1]
    filler = np.tile((0.0, 0.0, 1.0), (NUM - num, 1))
    return PairSamples(
        rays1=np.vstack([rays[0], filler])[None],
        rays2=np.vstack([rays[1], filler])[None],
        is_used=(np.arange(NUM) < num)[None],
        cam2_from_cam1=given[None],
        focal_px=np.array([FOCAL_PX]),
    )


def swung(degrees: float) -> Float64Array:
    """The true pose with another direction of motion."""
    pose = truth()
    pose[:, 3] = rotation_from_vector(np.array([0.0, 0.0, np.radians(degrees)])) @ pose[:, 3]
    return pose


def median_px(fits: PairFits, used: int = NUM) -> float:
    return float(np.median(fits.errors_px[0, :used]))


def test_exact_matches_leave_a_right_pose_as_it_is() -> None:
    fits = fit_pairs(samples(truth(), noise_px=0.0))
    assert median_px(fits) < 1e-6
    assert fits.swung_rad[0] < 1e-5
    assert fits.turned_rad[0] < 1e-5
    assert fits.gain[0] == pytest.approx(0.0, abs=1e-3)


def test_noise_moves_the_best_pose_a_little_and_is_no_evidence() -> None:
    fits = fit_pairs(samples(truth(), noise_px=0.5))
    assert 0.05 < median_px(fits) < 0.6
    assert 0.0 < fits.swung_rad[0] < np.radians(5.0)
    assert 0.0 <= fits.gain[0] < 10.0


@pytest.mark.parametrize("wrong", [0, 4])
def test_another_direction_of_motion_is_found_whatever_wrong_matches_say(wrong: int) -> None:
    fits = fit_pairs(samples(swung(20.0), wrong=wrong))
    assert np.degrees(fits.swung_rad[0]) == pytest.approx(20.0, abs=6.0)
    assert fits.gain[0] > 30.0
    assert fits.best_error_px[0] < 1.0 < median_px(fits)


def test_another_turn_is_found() -> None:
    pose = truth()
    pose[:, :3] = rotation_from_vector(np.array([0.0, np.radians(3.0), 0.0])) @ pose[:, :3]
    fits = fit_pairs(samples(pose))
    assert np.degrees(fits.turned_rad[0]) == pytest.approx(3.0, abs=1.0)
    assert fits.gain[0] > 30.0


def test_a_longer_baseline_is_the_same_pose() -> None:
    pose = truth()
    pose[:, 3] *= 7.0
    assert fit_pairs(samples(pose, noise_px=0.0)).swung_rad[0] < 1e-5


def test_matches_that_are_not_used_say_nothing() -> None:
    few, filled = samples(truth(), num=25), samples(truth(), num=25)
    other = filled.rays2.copy()
    other[:, 25:] = (1.0, 0.0, 0.0)
    changed = PairSamples(
        rays1=filled.rays1,
        rays2=other,
        is_used=filled.is_used,
        cam2_from_cam1=filled.cam2_from_cam1,
        focal_px=filled.focal_px,
    )
    one, two = fit_pairs(few), fit_pairs(changed)
    assert one.gain[0] == pytest.approx(two.gain[0])
    assert one.parallax_px[0] == pytest.approx(two.parallax_px[0])


def test_a_camera_that_turns_has_no_parallax() -> None:
    turning = fit_pairs(samples(truth(), baseline=0.0, noise_px=0.3))
    walking = fit_pairs(samples(truth(), noise_px=0.3))
    assert 0.05 < turning.parallax_px[0] < 1.0
    assert walking.parallax_px[0] > 15.0


def test_pairs_are_fitted_each_by_itself() -> None:
    right, wrong = samples(truth(), seed=1), samples(swung(20.0), seed=2)
    both = PairSamples(
        rays1=np.concatenate([right.rays1, wrong.rays1]),
        rays2=np.concatenate([right.rays2, wrong.rays2]),
        is_used=np.concatenate([right.is_used, wrong.is_used]),
        cam2_from_cam1=np.concatenate([right.cam2_from_cam1, wrong.cam2_from_cam1]),
        focal_px=np.concatenate([right.focal_px, wrong.focal_px]),
    )
    gains = fit_pairs(both).gain
    assert gains == pytest.approx([fit_pairs(right).gain[0], fit_pairs(wrong).gain[0]])


def test_no_pairs_give_no_fits() -> None:
    none = PairSamples(
        rays1=np.zeros((0, NUM, 3)),
        rays2=np.zeros((0, NUM, 3)),
        is_used=np.zeros((0, NUM), np.bool_),
        cam2_from_cam1=np.zeros((0, 3, 4)),
        focal_px=np.zeros(0),
    )
    assert len(fit_pairs(none).gain) == 0
