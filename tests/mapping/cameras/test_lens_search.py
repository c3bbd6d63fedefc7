"""Small maps by several lenses: the lens that took the keyframes fits best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from engine.config import (
    GlobalBundleAdjustmentConfig,
    InitializationConfig,
    LocalBundleAdjustmentConfig,
    RegistrationConfig,
    TriangulationConfig,
)
from engine.mapping.cameras.lens_search import LensFit, LensHypothesis, fit_lenses
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import SparseMap
from tests.support.synthetic import HEIGHT, WIDTH, SyntheticCamera, SyntheticWorld, straight_path

GROWTH = GrowthConfig(
    min_inlier_ratio=0.25,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(max_iterations=50),
    num_threads=1,
)
LENSES = [
    LensHypothesis(model="SIMPLE_RADIAL", focal_px=900.0),
    LensHypothesis(model="SIMPLE_RADIAL_FISHEYE", focal_px=450.0),
]


def new_map() -> SparseMap:
    return SparseMap(triangulation=TriangulationConfig(), registration=RegistrationConfig(), seed=0)


def fits(model: str, params: Sequence[float], *, wrong_ratio: float = 0.2) -> list[LensFit]:
    taken_with = SyntheticCamera(model=model, params=tuple(params))
    world = SyntheticWorld(straight_path(7), cameras=[taken_with], noise_px=0.4, density=0.8)
    pairs = [
        world.verified_pair(one, other, wrong_ratio=wrong_ratio)
        for other in world.frame_ids
        for one in world.frame_ids
        if one < other <= one + 4
    ]
    return fit_lenses(
        [world.keyframe(i) for i in world.frame_ids],
        pairs,
        LENSES,
        new_map=new_map,
        initialization=InitializationConfig(),
        growth=GROWTH,
        seed=0,
    )


def focal_px(fit: LensFit) -> float:
    return float(fit.camera.mean_focal_length())


@pytest.mark.slow
@pytest.mark.parametrize("degrees_across", [95.0, 130.0])
def test_a_fisheye_fits_its_own_images_best(degrees_across: float) -> None:
    true_px = WIDTH / 2 / math.radians(degrees_across / 2)
    found = fits("SIMPLE_RADIAL_FISHEYE", (true_px, WIDTH / 2, HEIGHT / 2, 0.0))
    assert found[0].camera.model_name == "SIMPLE_RADIAL_FISHEYE"
    assert abs(focal_px(found[0]) - true_px) < 0.02 * true_px
    assert len(found[0].poses) == 7
    assert all(found[0].gain > 1.05 * other.gain for other in found[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("true_px", "k"), [(520.0, 0.0), (800.0, -0.15)])
def test_a_perspective_fits_its_own_images_best(true_px: float, k: float) -> None:
    found = fits("SIMPLE_RADIAL", (true_px, WIDTH / 2, HEIGHT / 2, k))
    assert found[0].camera.model_name == "SIMPLE_RADIAL"
    assert abs(focal_px(found[0]) - true_px) < 0.03 * true_px
    assert len(found[0].poses) == 7


def test_keyframes_whose_matches_are_all_wrong_fit_no_lens() -> None:
    found = fits("SIMPLE_RADIAL", (800.0, WIDTH / 2, HEIGHT / 2, 0.0), wrong_ratio=1.0)
    assert found == []
