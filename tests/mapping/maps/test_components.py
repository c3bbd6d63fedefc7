"""Maps beside the main one: started where keyframes fit nowhere, grown, marked, and joined."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from engine.config import Config, RescueConfig
from engine.events import (
    ComponentJoined,
    ComponentStarted,
    FramePosed,
    FrameRegistered,
    MainMapChanged,
    MapInitialized,
)
from engine.mapping.cameras.cameras import CameraChange, InitialCamera
from engine.mapping.maps import components
from engine.mapping.maps.components import Components
from engine.mapping.maps.map_merging import MapAlignment, find_similarity
from engine.mapping.places.misplacement import Misplacement, repaired
from engine.types import Float64Array, FrameId, ImagePair
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.synthetic import (
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    pose_errors,
    poses_of,
    round_path,
    scene_graph,
    straight_path,
)

NUM_BEFORE = 8  # keyframes before the gap


def fed(
    world: SyntheticWorld,
    frame_ids: Sequence[int],
    *,
    config: Config = WITHOUT_WINDOWS,
    dropped: Callable[[ImagePair], bool] = lambda pair: False,
) -> MapperRun:
    run = MapperRun(
        config,
        matcher=FakeMatcher(world=world, wrong_ratio=0.1, dropped=dropped),
        graph=scene_graph(exhaustive_below=0, loop_min_gap=8),
    )
    for frame_id in frame_ids:
        run.add_keyframe(world.keyframe(frame_id))
    return run


def map_sizes(run: MapperRun) -> list[int]:
    return [run.sparse_map.num_registered, *(one.num_registered for one in run.separate_maps)]


def moved(poses: Float64Array, *, east: float) -> Float64Array:
    """Poses (N, 3, 4) some way to the east."""
    away = poses.copy()
    away[:, :, 3] -= away[:, :, :3] @ np.array((east, 0.0, 0.0))
    return away


def two_flights(num: int, *, apart: float) -> SyntheticWorld:
    """Two cameras in turn, each on a way of its own, the second so far east of the first."""
    ways = np.stack([straight_path(num), moved(straight_path(num), east=apart)], axis=1)
    return SyntheticWorld(
        ways.reshape(-1, 3, 4),
        cameras=[SyntheticCamera.known("first"), SyntheticCamera.known("second")],
        noise_px=0.5,
    )


@pytest.fixture(scope="module")
def circle() -> SyntheticWorld:
    """A way round that comes back over its beginning."""
    return SyntheticWorld(round_path(46, radius=18.0, turns=1.15), noise_px=0.5)


@pytest.fixture(scope="module")
def after_gap(circle: SyntheticWorld) -> MapperRun:
    """Blind for a while, going on; not yet back."""
    return fed(circle, [*range(1, NUM_BEFORE + 1), *range(19, 26)])


@pytest.fixture(scope="module")
def found_again(circle: SyntheticWorld) -> MapperRun:
    """Blind for a while, then round to where the way began."""
    run = fed(circle, [*range(1, NUM_BEFORE + 1), *range(19, 47)])
    run.end()
    return run


def test_keyframes_that_fit_nowhere_start_a_map_at_once(after_gap: MapperRun) -> None:
    (started,) = after_gap.emitted(ComponentStarted)
    assert started.map_number == 1
    assert NUM_BEFORE < started.first < started.second <= 22
    assert started.num_registered >= 3
    assert map_sizes(after_gap) == [NUM_BEFORE, 7]
    (component,) = after_gap.separate_maps
    assert component.registered_ids == list(range(19, 26))


def test_poses_in_a_component_are_marked(after_gap: MapperRun) -> None:
    by_map = {event.frame_id: event.map_number for event in after_gap.emitted(FramePosed)}
    assert {i for i, number in by_map.items() if number == 0} == set(range(1, NUM_BEFORE + 1))
    assert {i for i, number in by_map.items() if number == 1} == set(range(19, 26))
    assert {pose.frame_id: pose.map_number for pose in after_gap.poses} == by_map
    grown = [e for e in after_gap.emitted(FrameRegistered) if e.map_number == 1]
    assert grown[-1].num_registered == 7


def test_a_component_is_as_exact_as_the_main_map(
    after_gap: MapperRun, circle: SyntheticWorld
) -> None:
    for one in (after_gap.sparse_map, *after_gap.separate_maps):
        assert 1e-5 < pose_errors(poses_of(one), circle).rmse_ratio < 2e-3


def test_frames_between_keyframes_of_a_component_are_posed_in_it(circle: SyntheticWorld) -> None:
    run = fed(circle, [*range(1, NUM_BEFORE + 1), 19, 20, 21, 23])
    assert len(run.separate_maps) == 1
    step = run.add_frame(circle.tracked(24, keyframe_id=23))
    (pose,) = step.new_poses
    assert pose.map_number == 1
    component = run.separate_maps[0]
    poses = {**poses_of(component), FrameId(24): pose.cam_from_world}
    assert 1e-5 < pose_errors(poses, circle).rmse_ratio < 5e-3


def test_every_keyframe_is_in_one_map_at_most(after_gap: MapperRun) -> None:
    maps = [after_gap.sparse_map, *after_gap.separate_maps]
    held = [frame_id for one in maps for frame_id in one.registered_ids]
    assert len(held) == len(set(held))
    for number, one in enumerate(maps):
        assert {after_gap.graph.map_number(i) for i in one.registered_ids} == {number}


def test_what_was_lost_is_stated_with_times(after_gap: MapperRun, circle: SyntheticWorld) -> None:
    (stretch,) = after_gap.figures.lost
    assert (stretch.first, stretch.last) == (19, 25)
    assert stretch.begins_at_s == circle.keyframe(NUM_BEFORE).captured_at_s
    assert stretch.ends_at_s is None
    assert (stretch.num_missing, stretch.num_apart) == (0, 7)


def test_maps_join_when_the_way_leads_back(found_again: MapperRun, circle: SyntheticWorld) -> None:
    (joined,) = found_again.emitted(ComponentJoined)
    assert joined.into_map_number == 0
    assert joined.num_inliers >= 30
    assert map_sizes(found_again) == [NUM_BEFORE + 28]
    assert 1e-5 < pose_errors(poses_of(found_again.sparse_map), circle).rmse_ratio < 2e-3
    assert len(found_again.figures.maps) == 1


def test_a_clearly_fuller_component_becomes_the_main_map(found_again: MapperRun) -> None:
    (changed,) = found_again.emitted(MainMapChanged)
    assert changed.former_map_number == 1
    assert changed.num_registered >= 1.25 * changed.num_registered_in_former
    assert len(found_again.emitted(MapInitialized)) == 1  # no whole map was built anew


def test_first_poses_are_of_one_world_whichever_map_leads(
    found_again: MapperRun, circle: SyntheticWorld
) -> None:
    worlds = {0: range(1, NUM_BEFORE + 1), 1: range(NUM_BEFORE + 1, circle.frame_ids[-1] + 1)}
    for number, frame_ids in worlds.items():
        own = {p.frame_id: p.cam_from_world for p in found_again.poses if p.world_number == number}
        assert set(own) <= set(frame_ids)
        assert len(own) >= NUM_BEFORE
        assert 1e-5 < pose_errors(own, circle).rmse_ratio < 5e-3
    assert {pose.map_number for pose in found_again.poses if pose.world_number == 1} == {0, 1}


def test_keyframes_that_changed_their_map_are_reported_again(found_again: MapperRun) -> None:
    last = {event.frame_id: event for event in found_again.emitted(FramePosed)}
    assert {event.map_number for event in last.values()} == {0}
    firsts = [e.frame_id for e in found_again.emitted(FramePosed) if e.is_first]
    assert len(firsts) == len(set(firsts)) == NUM_BEFORE + 28


def test_nothing_is_done_where_no_keyframe_is_lost(circle: SyntheticWorld) -> None:
    run = fed(circle, range(1, 20))
    assert map_sizes(run) == [19]
    assert run.figures.lost == ()
    assert not run.emitted(ComponentStarted)


def test_two_flights_over_one_field_become_one_map() -> None:
    world = two_flights(12, apart=16.0)
    run = fed(world, world.frame_ids)
    run.end()
    assert map_sizes(run) == [24]
    assert 1e-5 < pose_errors(poses_of(run.sparse_map), world).rmse_ratio < 2e-3


def test_two_flights_over_fields_far_from_each_other_stay_two_maps() -> None:
    world = two_flights(8, apart=200.0)
    run = fed(world, world.frame_ids)
    run.end()
    assert map_sizes(run) == [8, 8]
    snapshot = run.mapper.snapshot()
    assert [one.reconstruction.num_reg_images() for one in snapshot.copies] == [8, 8]
    for one in (run.sparse_map, *run.separate_maps):
        assert 1e-5 < pose_errors(poses_of(one), world).rmse_ratio < 2e-3


def joined_by_one_pair(circle: SyntheticWorld) -> MapperRun:
    """Two maps, of 8 and 10 keyframes, and one pair between them."""

    def across(pair: ImagePair) -> bool:
        is_across = pair.first <= NUM_BEFORE and pair.second >= 19
        return is_across and pair != ImagePair(FrameId(2), FrameId(42))

    return fed(circle, [*range(1, NUM_BEFORE + 1), *range(35, 45)], dropped=across)


def test_one_pair_alone_joins_nothing(circle: SyntheticWorld) -> None:
    """Right as it may be: a pair of one keyframe each has no other to agree with."""
    run = joined_by_one_pair(circle)
    assert sorted(map_sizes(run)) == [NUM_BEFORE, 10]
    assert not run.emitted(ComponentJoined)


def test_a_rebuilt_component_takes_no_keyframe_that_another_map_holds(
    circle: SyntheticWorld,
) -> None:
    """A map that was the main one once holds all keyframes, and could register them."""
    run = joined_by_one_pair(circle)
    main, (component,) = run.sparse_map, run.separate_maps
    before = [list(one.registered_ids) for one in (main, component)]
    run.mapper._builder.complete(component, like=main)
    camera = InitialCamera(
        camera=copy.deepcopy(component.camera("camera")), prior=component.camera_prior("camera")
    )

    run.mapper._components.change_cameras(main, CameraChange(cameras={"camera": camera}))

    (rebuilt,) = run.separate_maps
    assert rebuilt is not component
    assert [list(one.registered_ids) for one in (main, rebuilt)] == before
    for number, one in enumerate((main, rebuilt)):
        assert {run.graph.map_number(i) for i in one.registered_ids} == {number}


def test_what_pairs_do_not_lead_to_is_found_by_its_looks(circle: SyntheticWorld) -> None:
    """The pairs of new keyframes never lead back: only the search for lost ones can."""
    run = MapperRun(
        WITHOUT_WINDOWS,
        matcher=FakeMatcher(world=circle, wrong_ratio=0.1),
        graph=scene_graph(exhaustive_below=0, num_retrieved=0),
    )
    for frame_id in [*range(1, NUM_BEFORE + 1), *range(19, 47)]:
        run.add_keyframe(circle.keyframe(frame_id))
    assert map_sizes(run) == [NUM_BEFORE + 28]
    (joined,) = run.emitted(ComponentJoined)
    assert joined.num_inliers >= 30
    assert 1e-5 < pose_errors(poses_of(run.sparse_map), circle).rmse_ratio < 2e-3


def test_keyframes_apart_that_show_the_same_lens_are_known() -> None:
    """So nobody searches for a zoom that would explain why the main map does not hold them."""
    world = SyntheticWorld(
        np.concatenate([straight_path(12), moved(straight_path(12), east=200.0)]),
        cameras=[SyntheticCamera()],
        noise_px=0.5,
    )
    run = fed(world, world.frame_ids)
    assert map_sizes(run) == [12, 12]
    components, later = run.mapper._components, set(world.frame_ids[12:])
    assert components.apart_ids(run.sparse_map, is_final=True) == later
    run.sparse_map.set_camera_params("camera", (1000.0, 500.0, 375.0, 0.0))
    assert components.apart_ids(run.sparse_map, is_final=True) == set()
    assert components.apart_ids(run.sparse_map, is_final=False) == later  # until they are joined


def test_without_components_keyframes_wait(circle: SyntheticWorld) -> None:
    config = WITHOUT_WINDOWS.model_copy(update={"rescue": RescueConfig(grow_components=False)})
    run = fed(circle, [*range(1, NUM_BEFORE + 1), *range(19, 26)], config=config)
    assert map_sizes(run) == [NUM_BEFORE]
    assert not run.emitted(ComponentStarted)


def test_a_repair_of_the_main_map_takes_nothing_from_another_map() -> None:
    run = joined_by_one_pair(SyntheticWorld(round_path(46, radius=18.0, turns=1.15), noise_px=0.5))
    before = set(run.registered_ids)
    last = FrameId(8)
    misplacement = Misplacement(
        keyframe_ids=(last,),
        misleading=(),
        evidence=ImagePair(FrameId(7), last),
        contradicting=(ImagePair(FrameId(7), last), ImagePair(FrameId(6), last)),
    )
    established_ids = run.mapper._components.established_ids
    assert established_ids and not established_ids & before

    def held(exclude: set[FrameId]) -> set[FrameId]:
        found = repaired(run.sparse_map, misplacement, config=run.mapper._growth, exclude=exclude)
        return set() if found is None else set(found.registered_ids)

    assert held(established_ids) <= before
    assert held(set()) & established_ids  # one pair is enough for all of them to come in


def test_where_two_places_are_open_to_the_end_keyframes_find_theirs_one_by_one(
    circle: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_similarity(*args: Any, **kwargs: Any) -> MapAlignment | None:
        found = find_similarity(*args, **kwargs)
        return None if found is None else dataclasses.replace(found, is_ambiguous=True)

    monkeypatch.setattr(components, "find_similarity", open_similarity)
    monkeypatch.setattr(Components, "num_rebuilds_wanted", lambda self, main: 0)
    run = fed(circle, [*range(1, NUM_BEFORE + 1), *range(19, 47)])
    assert len(map_sizes(run)) == 2
    run.end()
    assert map_sizes(run) == [NUM_BEFORE + 28]
    assert run.emitted(ComponentJoined)[0].num_inliers == 0  # that fix how the maps lie
    assert 1e-5 < pose_errors(poses_of(run.sparse_map), circle).rmse_ratio < 2e-3
