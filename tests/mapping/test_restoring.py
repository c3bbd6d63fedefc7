"""A mapper that goes on with what was stored of another gives the map of one never stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import AgreementConfig, Config, GlobalBundleAdjustmentConfig, RuntimeConfig
from engine.events import CameraSplit, ComponentStarted, Event, LensRecognised, OverlayFound
from engine.mapping.stored_state import StoredModel, StoredRun
from engine.matching.scene_graph import SceneGraph
from engine.output.snapshots import read_models
from engine.ports import PairMatcher
from engine.types import Float64Array, ImagePair, Keyframe, MatchRequest, PairMatches
from tests.support.dense_world import DenseFakeMatcher, dense_graph
from tests.support.false_pairs import FalsePairMatcher
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.overlays import OverlaidWorld, marks
from tests.support.stored_runs import model_paths, written_models
from tests.support.synthetic import (
    DENSITY,
    EXACT_CAMERA,
    FOCAL_PX,
    HEIGHT,
    WIDTH,
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    pose_errors,
    poses_of,
    round_path,
    scene_graph,
    straight_path,
)

WITH_WINDOWS = Config(
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(
        synchronous_until=6, merge_after_keyframes=2
    ),
    runtime=RuntimeConfig(num_threads=1),
)


class CountingMatcher:
    """Passes everything on, and remembers the pairs that were matched."""

    def __init__(self, matcher: PairMatcher) -> None:
        self._matcher = matcher
        self.pairs: list[ImagePair] = []

    def match(self, requests: list[MatchRequest]) -> list[PairMatches]:
        """Matches pairs."""
        self.pairs += [request.pair for request in requests]
        return self._matcher.match(requests)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is mapped, and where the first run is killed."""

    world: SyntheticWorld
    num_saved: int  # keyframes in the last snapshot
    num: int  # keyframes that came
    config: Config = WITHOUT_WINDOWS
    matcher: Callable[[SyntheticWorld], PairMatcher] = lambda world: FakeMatcher(
        world=world, wrong_ratio=0.1
    )
    graph: Callable[[], SceneGraph] = lambda: scene_graph(exhaustive_below=6, loop_min_gap=8)
    has_gps: bool = False
    shows: type[Event] | None = None  # emitted before the run is killed

    def run(self) -> MapperRun:
        """A mapper that has seen nothing yet."""
        matcher: Any = CountingMatcher(self.matcher(self.world))
        return MapperRun(self.config, matcher=matcher, graph=self.graph())

    def feed(self, run: MapperRun, frame_ids: Iterable[int]) -> MapperRun:
        """Feeds keyframes."""
        for frame_id in frame_ids:
            run.add_keyframe(self.keyframe(run, frame_id))
        return run

    def keyframe(self, run: MapperRun, frame_id: int) -> Keyframe:
        """A keyframe as its matcher describes it."""
        matcher = self.matcher(self.world)
        if isinstance(matcher, DenseFakeMatcher):
            return matcher.keyframe(frame_id)
        gps = self.world.gps(frame_id, metres_per_unit=4.0) if self.has_gps else None
        return self.world.keyframe(frame_id, gps=gps)

    def killed(self, folder: Path) -> Stop:
        """What is left of a run that ends without a word."""
        run = self.feed(self.run(), range(1, self.num_saved + 1))
        models = written_models(run.mapper.snapshot(), folder)
        self.feed(run, range(self.num_saved + 1, self.num + 1))
        assert self.shows is None or run.emitted(self.shows)
        return Stop(
            stored=run.stored.run(),
            models=models,
            matched=frozenset(matched(run)),
            num_registered=num_registered(run),
        )

    @property
    def rest(self) -> range:
        """The frames that come after the run was killed."""
        return range(self.num + 1, len(self.world.poses) + 1)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What is left of a run that was killed."""

    stored: StoredRun
    models: tuple[StoredModel, ...]
    matched: frozenset[ImagePair]
    num_registered: list[int]  # in each map


def matched(run: MapperRun) -> list[ImagePair]:
    matcher: Any = run.matching._matcher
    assert isinstance(matcher, CountingMatcher)
    return matcher.pairs


def num_registered(run: MapperRun) -> list[int]:
    return [run.sparse_map.num_registered, *(one.num_registered for one in run.separate_maps)]


def errors_of(run: MapperRun, world: SyntheticWorld) -> list[float]:
    """Errors of camera centres in each map, as shares of its extent."""
    maps = [run.sparse_map, *run.separate_maps]
    return [pose_errors(poses_of(one), world).rmse_ratio for one in maps]


def moved(poses: Float64Array, *, east: float) -> Float64Array:
    away = poses.copy()
    away[:, :, 3] -= away[:, :, :3] @ np.array((east, 0.0, 0.0))
    return away


def two_flights(num: int) -> SyntheticWorld:
    """A flight, and then another one far from it."""
    ways = [straight_path(num), moved(straight_path(num), east=200.0)]
    return SyntheticWorld(np.concatenate(ways), noise_px=0.5)


def zooming(num: int) -> SyntheticWorld:
    """A camera whose source knows nothing of it, and that zooms from frame to frame."""
    cameras = [
        SyntheticCamera(params=(ratio * FOCAL_PX, *EXACT_CAMERA[1:])) for ratio in (0.9, 1.35)
    ]
    return SyntheticWorld(straight_path(num, step=1.2), cameras=cameras, noise_px=0.3)


def fisheye(num: int) -> SyntheticWorld:
    focal_px = WIDTH / 2 / math.radians(110.0 / 2)
    camera = SyntheticCamera(
        model="SIMPLE_RADIAL_FISHEYE", params=(focal_px, WIDTH / 2, HEIGHT / 2, 0.0)
    )
    return SyntheticWorld(straight_path(num), cameras=[camera], noise_px=0.4, density=1.0)


FLIGHT = SyntheticWorld(straight_path(24), noise_px=0.5)
SCENES = {
    "before the first snapshot": Scene(world=FLIGHT, num_saved=0, num=14),
    "some keyframes after a snapshot": Scene(world=FLIGHT, num_saved=9, num=14),
    "just after a snapshot": Scene(world=FLIGHT, num_saved=14, num=14),
    "with windows": Scene(world=FLIGHT, num_saved=9, num=16, config=WITH_WINDOWS),
    "unknown camera": Scene(
        world=SyntheticWorld(straight_path(20), cameras=[SyntheticCamera()], noise_px=0.5),
        num_saved=9,
        num=13,
    ),
    "two maps": Scene(world=two_flights(10), num_saved=15, num=17, shows=ComponentStarted),
    "two maps, the second after the snapshot": Scene(
        world=two_flights(10), num_saved=9, num=17, shows=ComponentStarted
    ),
    "GPS": Scene(
        world=SyntheticWorld(round_path(20), noise_px=0.5), num_saved=10, num=13, has_gps=True
    ),
    "agreed pairs only": Scene(
        world=SyntheticWorld(round_path(16, radius=14.0), noise_px=0.3, density=2.0 * DENSITY),
        num_saved=9,
        num=12,
        config=WITHOUT_WINDOWS.model_copy(update={"agreement": AgreementConfig(mode="required")}),
        matcher=lambda world: FalsePairMatcher(
            world=world, false_ratio=0.3, num_false=150, says_so=True
        ),
    ),
    "zoom, split before the snapshot": Scene(
        world=zooming(14), num_saved=9, num=11, shows=CameraSplit, graph=scene_graph
    ),
    "zoom, split after the snapshot": Scene(
        world=zooming(14), num_saved=4, num=11, shows=CameraSplit, graph=scene_graph
    ),
    "fisheye, recognised before the snapshot": Scene(
        world=fisheye(14), num_saved=9, num=11, config=Config(), shows=LensRecognised
    ),
    "fisheye, recognised after the snapshot": Scene(
        world=fisheye(14), num_saved=5, num=11, config=Config(), shows=LensRecognised
    ),
    "dense": Scene(
        world=SyntheticWorld(straight_path(16, step=1.2)),
        num_saved=7,
        num=10,
        matcher=lambda world: DenseFakeMatcher(world=world, wrong_ratio=0.1, metres_per_unit=6.5),
        graph=lambda: dense_graph(exhaustive_below=4, pairs_per_keyframe=10),
    ),
    "overlay": Scene(
        world=OverlaidWorld(straight_path(18), fixed_xy=marks((700, 40, 960, 160)), noise_px=0.5),
        num_saved=9,
        num=12,
        matcher=lambda world: FakeMatcher(world=world),
        shows=OverlayFound,
    ),
}


@pytest.mark.parametrize("name", SCENES)
def test_a_run_that_goes_on_gives_the_map_of_one_that_was_not_stopped(
    name: str, tmp_path: Path
) -> None:
    scene = SCENES[name]
    whole = scene.feed(scene.run(), scene.world.frame_ids)
    whole.end()
    stop = scene.killed(tmp_path)

    run = scene.run()
    step = run.restore(stop.stored, stop.models)
    assert matched(run) == []
    assert step.counts.num_keyframes == scene.num
    assert num_registered(run) == stop.num_registered
    assert step.new_poses == ()

    scene.feed(run, scene.rest)
    run.end()
    assert stop.matched.isdisjoint(matched(run))
    print(
        name,
        num_registered(run),
        num_registered(whole),
        errors_of(whole, scene.world),
        errors_of(run, scene.world),
    )
    assert num_registered(run) == num_registered(whole)
    before, after = errors_of(whole, scene.world), errors_of(run, scene.world)
    assert all(0.0 < now <= 1.1 * then for then, now in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["some keyframes after a snapshot", "two maps"])
def test_going_on_twice_gives_the_same_map_to_the_last_bit(name: str, tmp_path: Path) -> None:
    scene = SCENES[name]
    stop = scene.killed(tmp_path)
    poses = []
    for _ in range(2):
        run = scene.run()
        run.restore(stop.stored, read_models(model_paths(tmp_path / "latest")))
        scene.feed(run, scene.rest)
        run.end()
        poses.append(poses_of(run.sparse_map))
    assert poses[0].keys() == poses[1].keys()
    assert all(np.array_equal(poses[0][i], poses[1][i]) for i in poses[0])
