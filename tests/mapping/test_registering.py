"""What is registered in the main map is reported, and the scene graph knows it."""

from __future__ import annotations

import time

import pytest

from engine.estimators.absolute_pose import AbsolutePose
from engine.events import Event, FrameRegistered, RegistrationFailed
from engine.mapping.assembly import assemble, empty_map
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import no_fix
from engine.matching.pair_matching import PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId, ImagePair
from engine.window_types import WindowEstimate, WindowProblem
from tests.support.mapper_runs import WITHOUT_WINDOWS
from tests.support.synthetic import (
    FakeMatcher,
    SyntheticWorld,
    grow,
    map_of_keyframes,
    scene_graph,
    straight_path,
)

WORLD = SyntheticWorld(straight_path(6))
ALONE = FrameId(6)  # has no pairs


def is_without_pairs(pair: ImagePair) -> bool:
    return ALONE in (pair.first, pair.second)


def no_solver(problem: WindowProblem) -> WindowEstimate:
    raise AssertionError("no window is solved")


class Run:
    """A main map of three keyframes, with three that wait."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.graph: SceneGraph = scene_graph()
        self.main: SparseMap = map_of_keyframes(WORLD, skips=is_without_pairs)
        for frame_id in WORLD.frame_ids:
            self.graph.add_keyframe(WORLD.keyframe(frame_id))
            for other in range(1, frame_id):
                if frame_id != ALONE:
                    self.graph.record_pair(WORLD.verified_pair(other, frame_id))
        matching = PairMatching(
            self.graph,
            FakeMatcher(world=WORLD),
            two_view=WITHOUT_WINDOWS.two_view,
            dense=WITHOUT_WINDOWS.dense_matching,
            coarse_to_fine=WITHOUT_WINDOWS.coarse_to_fine,
        )
        self.parts = assemble(
            WITHOUT_WINDOWS,
            graph=self.graph,
            matching=matching,
            camera_of=self.main.camera,
            emit=self._emit,
            solve_window=no_solver,
            adjust=None,
            fix_at=no_fix,
        )
        grow(self.main, WORLD, WORLD.frame_ids[:3])
        self.parts.registering.update_graph(self.main, self.main.keyframe_ids)

    @property
    def known_ids(self) -> list[int]:
        """Keyframes in the main map by the scene graph."""
        return [i for i in WORLD.frame_ids if self.graph.map_number(i) == 0]

    def _emit(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def run() -> Run:
    return Run()


def test_the_graph_knows_the_places_of_keyframes(run: Run) -> None:
    assert run.known_ids == [1, 2, 3]
    run.main.deregister([FrameId(2)])
    run.parts.registering.update_graph(run.main, [FrameId(2)])
    assert run.known_ids == [1, 3]


def test_the_newest_keyframe_is_reported_with_its_outcome(run: Run) -> None:
    begun_s = time.monotonic()
    assert run.parts.registering.register(run.main, FrameId(4), begun_s=begun_s)
    assert not run.parts.registering.register(run.main, ALONE, begun_s=begun_s)
    registered, failed = run.events
    assert isinstance(registered, FrameRegistered)
    assert (registered.frame_id, registered.num_registered, registered.is_retry) == (4, 4, False)
    assert isinstance(failed, RegistrationFailed)
    assert failed.frame_id == ALONE
    assert run.known_ids == [1, 2, 3, 4]


def test_keyframes_that_wait_are_reported_as_tried_again_when_they_fit(run: Run) -> None:
    run.parts.registering.retry_waiting(run.main)
    registered = [event for event in run.events if isinstance(event, FrameRegistered)]
    assert len(registered) == len(run.events)
    assert sorted(event.frame_id for event in registered) == [4, 5]
    assert all(event.is_retry for event in registered)
    assert run.known_ids == [1, 2, 3, 4, 5]


def test_all_that_fit_are_registered_at_once(run: Run) -> None:
    run.parts.registering.register_all(run.main, config=run.parts.final_growth)
    assert run.main.registered_ids == run.known_ids == [1, 2, 3, 4, 5]


def test_an_empty_map_has_no_keyframes() -> None:
    assert empty_map(WITHOUT_WINDOWS).keyframe_ids == []


def test_keyframes_that_have_two_places_keep_no_others_waiting(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One keyframe is tried at a time, and the one with most inliers has two places."""
    open_id, other_id = FrameId(4), FrameId(5)
    tried: list[FrameId] = []

    def rival_pose(self: SparseMap, frame_id: FrameId, pose: AbsolutePose, **_: object) -> object:
        tried.append(frame_id)
        return pose if frame_id == open_id else None

    monkeypatch.setattr(SparseMap, "_rival_pose", rival_pose)
    monkeypatch.setattr(SparseMap, "_better_pose", lambda self, *args, **settings: None)
    registering = run.parts.registering
    registering._max_retries = 1
    registering.retry_waiting(run.main)
    registering.retry_waiting(run.main)
    assert tried == [open_id, other_id]
    assert run.known_ids == [1, 2, 3, 5]
    registering.retry_waiting(run.main)  # it has one more neighbour in the map
    assert tried == [open_id, other_id, open_id]
    registering.retry_waiting(run.main)
    registering.retry_waiting(run.main.copy())  # where nothing was tried yet
    assert tried == [open_id, other_id, open_id, open_id]
