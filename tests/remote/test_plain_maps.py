"""Maps as plain arrays: an adjustment elsewhere has the same bits as one here."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pycolmap
import pytest

from adapters.remote.plain_maps import (
    changes_to_plain,
    map_from_plain,
    map_to_plain,
    take_changes,
)
from engine.mapping.model.bundle_adjustment import (
    GlobalAdjustment,
    adjust_copy,
    adjust_globally,
    start_global_adjustment,
)
from engine.mapping.model.calibration_control import CalibrationControl
from engine.mapping.model.sparse_map import SparseMap
from tests.support.synthetic import SyntheticWorld, grow, map_of_keyframes, straight_path

adjust_20_times = functools.partial(adjust_copy, max_iterations=20, num_threads=1)


@pytest.fixture(scope="module")
def sparse_map() -> SparseMap:
    """A map whose keyframes were not registered in the order of their ids."""
    world = SyntheticWorld(straight_path(8), noise_px=1.0)
    sparse_map = map_of_keyframes(world, is_constant=False)
    ids = world.frame_ids
    grow(sparse_map, world, [*ids[2:], ids[1]])  # one keyframe is not registered
    return sparse_map


def elsewhere(
    reconstruction: pycolmap.Reconstruction,
    *,
    calibration: CalibrationControl,
    max_iterations: int,
    num_threads: int,
) -> None:
    """Adjusts a map that is made of arrays, and takes over what that changed."""
    arrays = map_to_plain(reconstruction, calibration)
    twin, twins_calibration = map_from_plain(arrays)
    adjust_globally(
        twin,
        calibration=twins_calibration,
        max_iterations=max_iterations,
        num_threads=num_threads,
    )
    changes = changes_to_plain(twin, twins_calibration, arrays)
    take_changes(reconstruction, calibration, arrays=arrays, changes=changes)


def bits_of(adjustment: GlobalAdjustment) -> dict[str, Any]:
    return map_to_plain(adjustment.reconstruction, adjustment.calibration)


def test_an_adjustment_of_arrays_has_the_bits_of_one_of_the_map(sparse_map: SparseMap) -> None:
    before = bits_of(start_global_adjustment(sparse_map))
    here = bits_of(adjust_20_times(start_global_adjustment(sparse_map)))
    there = bits_of(adjust_20_times(start_global_adjustment(sparse_map), adjust=elsewhere))
    assert len(before["keyframe_ids"]) == 7
    assert list(before["keyframe_ids"]) != sorted(before["keyframe_ids"])
    assert np.abs(here["poses"] - before["poses"]).max() > 1e-5
    for name, expected in here.items():
        assert np.array_equal(there[name], expected), name


@pytest.mark.parametrize(
    "change",
    [
        {"poses": np.zeros((3, 7))},
        {"points3D": np.zeros((1, 3))},
        {"cameras": np.frombuffer(b'{"cameras": []}', np.uint8)},
        {"cameras": np.frombuffer(b"nothing", np.uint8)},
        {"cameras": np.frombuffer(b"[]", np.uint8)},
    ],
)
def test_what_is_not_of_the_map_changes_nothing(
    sparse_map: SparseMap, change: dict[str, Any]
) -> None:
    copy = start_global_adjustment(sparse_map)
    arrays = map_to_plain(copy.reconstruction, copy.calibration)
    changes = {name: arrays[name] for name in ("cameras", "poses", "points3D")} | change
    with pytest.raises((KeyError, TypeError, ValueError)):
        take_changes(copy.reconstruction, copy.calibration, arrays=arrays, changes=changes)
    for name, expected in bits_of(copy).items():
        assert np.array_equal(arrays[name], expected), name
