"""The growth bench: a small flight gives a right map, and every part is measured."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest

from engine.geometry import rotation_from_vector
from engine.mapping.model.sparse_map import SparseMap
from tests.support.paths import TOOLS


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_growth", TOOLS / "bench_growth.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_small_flight_is_mapped_and_measured_by_part(bench: ModuleType) -> None:
    register = SparseMap.register
    arguments = argparse.Namespace(keyframes=9, between=1, seed=0, set=[], finish=False)
    figures = bench.measure(arguments)

    assert figures["registered"] == 9
    assert 0.4 < figures["error_px"] < 0.7  # the noise of the keypoints is 0.5 px
    assert figures["ate_ratio"] < 0.005
    (only,) = figures["bins"]
    names = {name for name, _, _ in bench.PARTS}
    assert only["ms"].keys() <= names | {"matching", "the rest of the mapper"}
    assert {"verification", "registration", "local BA: solve", "frames between"} <= only[
        "ms"
    ].keys()
    assert SparseMap.register is register  # measured only meanwhile


def test_time_in_a_part_is_not_counted_for_the_part_that_calls_it(bench: ModuleType) -> None:
    clock = bench.Clock()
    inner = clock.timed("inner", lambda: sum(range(300_000)))
    clock.timed("outer", lambda: (inner(), inner()))()

    assert clock.spent_s["inner"] > 5 * clock.spent_s["outer"]


def _figures(costs_ms: list[float], *, of_global: float) -> dict[str, object]:
    bins = [
        {"num_keyframes": 100 * n, "ms": {"registration": ms, "global BA: solve": of_global}}
        for n, ms in enumerate(costs_ms, start=1)
    ]
    return {"bins": bins}


@pytest.mark.parametrize(
    ("costs_ms", "of_global", "is_kept"),
    [
        ([10.0, 10.0, 10.0, 10.0, 12.0, 12.0], 2.0, True),
        ([10.0, 10.0, 10.0, 10.0, 14.0, 14.0], 2.0, False),  # it grows
        ([10.0, 10.0, 10.0, 10.0, 10.0, 10.0], 3.0, False),  # too much global adjustment
    ],
)
def test_growth_and_global_adjustment_are_held_to_their_bars(
    bench: ModuleType, costs_ms: list[float], of_global: float, is_kept: bool
) -> None:
    bars = argparse.Namespace(max_growth=1.3, max_global=0.2)
    assert bench.compare(_figures(costs_ms, of_global=of_global), bars)[0] is is_kept


def test_a_similarity_hides_no_error(bench: ModuleType) -> None:
    truth = np.random.default_rng(0).normal(size=(20, 3))
    rotation = rotation_from_vector(np.array([0.3, -1.2, 0.5]))
    shifted = 3.0 * truth @ rotation.T + [5.0, -2.0, 1.0]
    bent = shifted + np.outer(np.linspace(0, 1, 20) ** 2, [1.0, 0.0, 0.0])

    assert bench.aligned_error(shifted, truth) < 1e-12
    assert bench.aligned_error(bent, truth) > 0.01
