"""A mapper that goes on with what was stored of another gives the map of one never stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import AgreementConfig, Config, GlobalBundleAdjustmentConfig, RuntimeConfig
from engine.events import (
    CameraSplit,
    ComponentStarted,
    Event,
    FramePosed,
    LensRecognised,
    MapInitialized,
    OverlayFound,
    VerdictChanged,
)
from engine.mapping.stored_state import StoredModel, StoredRun
from engine.matching.scene_graph import SceneGraph
from engine.output.snapshots import read_models
from engine.ports import PairMatcher
from engine.types import (
    Float64Array,
    FrameId,
    ImagePair,
    Keyframe,
    MatchRequest,
    PairMatches,
    VerdictLevel,
)
from tests.support.dense_world import DenseFakeMatcher, dense_graph
from tests.support.false_pairs import FalsePairMatcher
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.overlays import OverlaidWorld, marks
from tests.support.stored_runs import written_models
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


FLIGHT = SyntheticWorld(straight_path(20), noise_px=0.5)
SLOW = ("fisheye", "zoom", "agreed", "dense", "with windows")
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
        world=SyntheticWorld(round_path(20, turns=0.5), noise_px=0.5),
        num_saved=10,
        num=13,
        has_gps=True,
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


def _slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name.startswith(SLOW) else name


@pytest.mark.parametrize("name", [_slow(name) for name in SCENES])
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
        run.restore(stop.stored, read_models(tmp_path / "latest"))
        scene.feed(run, scene.rest)
        run.end()
        poses.append(poses_of(run.sparse_map))
    assert poses[0].keys() == poses[1].keys()
    assert all(np.array_equal(poses[0][i], poses[1][i]) for i in poses[0])


def test_a_run_that_is_killed_again_and_again_still_gives_the_map(tmp_path: Path) -> None:
    scene = SCENES["before the first snapshot"]
    run = scene.feed(scene.run(), range(1, 7))
    models: tuple[StoredModel, ...] = ()
    for number, frame_ids in enumerate([range(7, 10), range(10, 14), range(14, 17)]):
        stored, run = run.stored.run(), scene.run()
        run.restore(stored, models)
        assert run.registered_ids == list(range(1, frame_ids.start))
        if number == 1:
            models = written_models(run.mapper.snapshot(), tmp_path)
        scene.feed(run, frame_ids)
    scene.feed(run, range(17, 21))
    run.end()
    assert run.registered_ids == scene.world.frame_ids
    assert 0.0 < errors_of(run, scene.world)[0] < 5e-4


def test_nothing_is_emitted_again(tmp_path: Path) -> None:
    scene = SCENES["some keyframes after a snapshot"]
    stop = scene.killed(tmp_path)
    run = scene.run()
    run.restore(stop.stored, stop.models)
    assert run.events == []


def test_a_map_that_is_no_good_is_shown_as_none_at_once(tmp_path: Path) -> None:
    scene = SCENES["two maps"]
    stop = scene.killed(tmp_path)
    run = scene.run()
    run.restore(stop.stored, stop.models)
    (changed,) = run.emitted(VerdictChanged)
    assert changed.verdict.level is not VerdictLevel.GOOD


def test_a_keyframe_that_never_had_a_pose_is_reported_when_it_gets_one(tmp_path: Path) -> None:
    scene = SCENES["some keyframes after a snapshot"]
    stop = scene.killed(tmp_path)
    facts = {**stop.stored.facts, "without pose": [3, 12]}
    run = scene.run()
    step = run.restore(replace(stop.stored, facts=facts), stop.models)
    assert [pose.frame_id for pose in step.new_poses] == [3, 12]
    assert [event.frame_id for event in run.emitted(FramePosed)] == [3, 12]


@pytest.mark.slow
def test_pairs_that_nothing_confirms_are_held_back_where_the_run_had_shown_why(
    tmp_path: Path,
) -> None:
    scene = replace(
        SCENES["agreed pairs only"],
        config=WITHOUT_WINDOWS,
        matcher=lambda world: FalsePairMatcher(
            world=world, false_ratio=0.3, num_false=150, says_so=False
        ),
    )
    before = scene.feed(scene.run(), range(1, 10))
    before.mapper._require_agreement()
    models = written_models(before.mapper.snapshot(), tmp_path)
    scene.feed(before, range(10, 13))
    used = {verified.pair for verified in before.graph.edges()}
    held_back = {verified.pair for verified in before.graph.all_edges()} - used
    assert len(used) >= 20
    assert held_back

    run = scene.run()
    run.restore(before.stored.run(), models)
    assert {verified.pair for verified in run.graph.edges()} == used
    scene.feed(run, range(13, 17))
    run.end()
    assert run.registered_ids == scene.world.frame_ids
    assert any(run.graph.is_held_back(verified.pair) for verified in run.graph.all_edges())


def test_a_map_in_metres_goes_on_in_its_own_frame_and_unit(tmp_path: Path) -> None:
    scene = SCENES["GPS"]
    before = scene.feed(scene.run(), range(1, scene.num + 1))
    snapshot = before.mapper.snapshot()
    assert snapshot.copies[0].is_in_metres
    run = scene.run()
    run.restore(before.stored.run(), written_models(snapshot, tmp_path))
    assert run.mapper.snapshot().copies[0].is_in_metres
    poses, restored = poses_of(before.sparse_map), poses_of(run.sparse_map)
    assert poses.keys() == restored.keys()
    for frame_id, pose in poses.items():
        assert np.allclose(restored[frame_id], pose, atol=1e-9)


def test_frames_between_keyframes_keep_their_poses(tmp_path: Path) -> None:
    world = SyntheticWorld(straight_path(61, step=0.6), noise_px=0.5)
    scene = Scene(world=world, num_saved=0, num=0)

    def feed(run: MapperRun, frame_ids: Iterable[int]) -> None:
        for frame_id in frame_ids:
            if frame_id % 3 == 1:
                run.add_keyframe(world.keyframe(frame_id))
            else:
                run.add_frame(world.tracked(frame_id, keyframe_id=frame_id - (frame_id - 1) % 3))

    before = scene.run()
    feed(before, range(1, 38))
    stored = before.stored.run()
    models = written_models(before.mapper.snapshot(), tmp_path)
    poses = {pose.frame_id: pose for pose in before.trajectory}
    assert sum(not pose.is_keyframe for pose in poses.values()) >= 20

    run = scene.run()
    run.restore(stored, models)
    restored = {pose.frame_id: pose for pose in run.trajectory}
    assert restored.keys() == poses.keys()
    for frame_id, pose in poses.items():
        assert restored[frame_id].kind is pose.kind
        assert np.allclose(restored[frame_id].cam_from_world, pose.cam_from_world, atol=1e-9)

    feed(run, range(38, 62))
    run.end()
    final = {pose.frame_id: pose.cam_from_world for pose in run.trajectory}
    assert set(final) == set(world.frame_ids)
    assert 0.0 < pose_errors(final, world).rmse_ratio < 2e-3


def test_what_knows_only_keyframes_and_pairs_goes_on_too(tmp_path: Path) -> None:
    scene = SCENES["some keyframes after a snapshot"]
    stop = scene.killed(tmp_path)
    bare = replace(stop.stored, facts={}, calibrations={}, relative_poses=(), tried=())
    models = [replace(model, record={}) for model in stop.models]
    run = scene.run()
    step = run.restore(bare, models)
    assert step.counts.num_registered == scene.num
    scene.feed(run, scene.rest)
    run.end()
    assert run.registered_ids == scene.world.frame_ids
    assert 0.0 < errors_of(run, scene.world)[0] < 1e-3


def test_a_model_of_keyframes_that_the_journal_lost_is_used_as_far_as_it_goes(
    tmp_path: Path,
) -> None:
    scene = SCENES["just after a snapshot"]
    stop = scene.killed(tmp_path)
    kept = stop.stored.keyframes[:-2]
    run = scene.run()
    step = run.restore(replace(stop.stored, keyframes=kept), stop.models)
    assert step.counts.num_registered == scene.num - 2
    scene.feed(run, range(scene.num - 1, 21))
    run.end()
    assert run.registered_ids == scene.world.frame_ids
    assert 0.0 < errors_of(run, scene.world)[0] < 1e-3


def test_another_camera_goes_on_in_the_map_of_a_finished_run(tmp_path: Path) -> None:
    cameras = [SyntheticCamera.known("first"), SyntheticCamera.known("second", focal_px=900.0)]
    world = SyntheticWorld(straight_path(24), cameras=cameras, noise_px=0.5)
    scene = Scene(world=world, num_saved=0, num=0)
    before = scene.feed(scene.run(), range(1, 25, 2))
    before.end()
    run = scene.run()
    run.restore(before.stored.run(), written_models(before.mapper.snapshot(), tmp_path))
    scene.feed(run, range(2, 25, 2))
    run.end()
    assert run.registered_ids == world.frame_ids
    assert not run.emitted(MapInitialized)
    assert 0.0 < errors_of(run, world)[0] < 1e-3


def test_what_shares_nothing_with_a_finished_map_becomes_a_map_beside_it(tmp_path: Path) -> None:
    scene = Scene(world=two_flights(10), num_saved=0, num=0)
    before = scene.feed(scene.run(), range(1, 11))
    before.end()
    run = scene.run()
    run.restore(before.stored.run(), written_models(before.mapper.snapshot(), tmp_path))
    scene.feed(run, range(11, 21))
    run.end()
    assert num_registered(run) == [10, 10]
    assert [event.map_number for event in run.emitted(ComponentStarted)] == [1]
    assert all(0.0 < error < 1e-3 for error in errors_of(run, scene.world))


def test_maps_beside_the_main_one_keep_their_numbers(tmp_path: Path) -> None:
    scene = SCENES["two maps"]
    stop = scene.killed(tmp_path)
    assert [model.record["number"] for model in stop.models] == [0, 1]
    run = scene.run()
    run.restore(stop.stored, stop.models)
    assert {run.graph.map_number(FrameId(i)) for i in range(1, 11)} == {0}
    assert {run.graph.map_number(FrameId(i)) for i in range(11, 18)} == {1}
