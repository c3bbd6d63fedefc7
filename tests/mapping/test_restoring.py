"""A mapper that goes on with what was stored of another gives the map of one never stopped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine.config import Config
from engine.mapping.stored_state import StoredModel, StoredRun
from engine.output.snapshots import read_models
from engine.types import ImagePair
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.stored_runs import model_paths, written_models
from tests.support.synthetic import (
    FakeMatcher,
    SyntheticWorld,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
)


@dataclass(frozen=True)
class Stop:
    """What is left of a run that was killed."""

    stored: StoredRun
    models: tuple[StoredModel, ...]
    matched: frozenset[ImagePair]  # pairs that its matcher has seen


def run_of(world: SyntheticWorld, config: Config = WITHOUT_WINDOWS) -> MapperRun:
    return MapperRun(
        config,
        matcher=FakeMatcher(world=world, wrong_ratio=0.1),
        graph=scene_graph(exhaustive_below=6, loop_min_gap=8),
    )


def seen_by(run: MapperRun) -> list[ImagePair]:
    matcher = run.matching._matcher
    assert isinstance(matcher, FakeMatcher)
    return [pair for call in matcher.calls for pair in call]


def fed(run: MapperRun, world: SyntheticWorld, frame_ids: Iterable[int]) -> MapperRun:
    for frame_id in frame_ids:
        run.add_keyframe(world.keyframe(frame_id))
    return run


def killed_at(
    world: SyntheticWorld,
    num: int,
    folder: Path,
    *,
    num_saved: int,
    config: Config = WITHOUT_WINDOWS,
) -> Stop:
    """A run that ends without a word after some keyframes, with a snapshot of fewer."""
    run = run_of(world, config)
    fed(run, world, range(1, num_saved + 1))
    models = written_models(run.mapper.snapshot(), folder)
    fed(run, world, range(num_saved + 1, num + 1))
    return Stop(stored=run.stored.run(), models=models, matched=frozenset(seen_by(run)))


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(24), noise_px=0.5)


@pytest.fixture(scope="module")
def whole(world: SyntheticWorld) -> MapperRun:
    run = fed(run_of(world), world, world.frame_ids)
    run.end()
    return run


@pytest.mark.parametrize("num_saved", [0, 9, 14])
def test_a_run_that_goes_on_gives_the_map_of_one_that_was_not_stopped(
    world: SyntheticWorld, whole: MapperRun, tmp_path: Path, num_saved: int
) -> None:
    stop = killed_at(world, 14, tmp_path, num_saved=num_saved)
    run = run_of(world)
    step = run.restore(stop.stored, stop.models)
    assert seen_by(run) == []
    assert step.counts.num_keyframes == 14
    assert step.counts.num_registered == 14
    assert step.new_poses == ()
    fed(run, world, range(15, 25))
    run.end()
    assert run.registered_ids == whole.registered_ids
    assert stop.matched.isdisjoint(seen_by(run))
    before, after = (pose_errors(poses_of(one.sparse_map), world) for one in (whole, run))
    assert after.rmse_ratio <= 1.1 * before.rmse_ratio
    assert after.rmse_ratio > 0.0


def test_going_on_twice_gives_the_same_map_to_the_last_bit(
    world: SyntheticWorld, tmp_path: Path
) -> None:
    stop = killed_at(world, 14, tmp_path, num_saved=9)
    poses = []
    for _ in range(2):
        run = run_of(world)
        run.restore(stop.stored, read_models(model_paths(tmp_path / "latest")))
        fed(run, world, range(15, 19))
        run.end()
        poses.append(poses_of(run.sparse_map))
    assert poses[0].keys() == poses[1].keys()
    assert all(np.array_equal(poses[0][i], poses[1][i]) for i in poses[0])
