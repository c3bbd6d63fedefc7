"""A whole map is adjusted as often as wanted, and on while the focal lengths of several move."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import GlobalBundleAdjustmentConfig, LocalBundleAdjustmentConfig
from engine.mapping.model import whole_adjustment
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.model.whole_adjustment import adjust_until_settled, adjust_whole
from engine.types import Float64Array
from tests.support.synthetic import SyntheticWorld, grown_map, straight_path

CONFIG = GrowthConfig(
    min_inlier_ratio=0.3,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)


@pytest.fixture
def sparse_map() -> SparseMap:
    return grown_map(SyntheticWorld(straight_path(5), noise_px=0.5))


def test_the_event_has_the_figures_of_the_adjusted_map(sparse_map: SparseMap) -> None:
    before_px = sparse_map.mean_reprojection_error_px()
    event = adjust_whole(sparse_map, config=CONFIG)
    assert event.num_keyframes == 5
    assert event.num_points3D == sparse_map.num_points3D > 100
    assert event.reprojection_error_before_px == before_px
    assert event.reprojection_error_after_px == sparse_map.mean_reprojection_error_px()
    assert 0.1 < event.reprojection_error_after_px <= before_px


@pytest.mark.parametrize("num_passes", [0, 2])
def test_a_single_camera_is_adjusted_as_often_as_wanted(
    sparse_map: SparseMap, num_passes: int
) -> None:
    events = adjust_until_settled(sparse_map, config=CONFIG, num_passes=num_passes)
    assert len(list(events)) == num_passes


@pytest.mark.parametrize(("ratio", "num_events"), [(1.01, 6), (1.0001, 1)])
def test_several_cameras_are_adjusted_on_while_one_of_them_moves(
    sparse_map: SparseMap, ratio: float, num_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    focal_px = 500.0

    def moving(sparse_map: SparseMap) -> Float64Array:
        nonlocal focal_px
        focal_px *= ratio
        return np.array([600.0, focal_px])

    monkeypatch.setattr(whole_adjustment, "_focal_lengths_px", moving)
    events = adjust_until_settled(sparse_map, config=CONFIG, num_passes=1)
    assert len(list(events)) == num_events
