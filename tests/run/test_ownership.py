"""Which thread uses what: the map is the mapping thread's, the graph changes hands for matching.

In these runs every public method and property of the map, the mapper, the scene graph and the
keypoint tables checks its thread.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from adapters.evaluate import read_tum
from engine.config import FrameTrackingConfig, TwoViewConfig
from engine.events import Event, FramePosed, FrameRegistered, KeyframeAdded
from engine.mapping.mapper import Mapper
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.steps import MappingStep
from engine.matching.keypoint_tables import KeypointTables
from engine.matching.pair_matching import MatchedKeyframe, PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.run import stages
from engine.run.engine import Engine, RunOutcome, StoppedBy
from engine.run.event_loop import RunRequests, ThreadOwned
from engine.tracking.frame_tracker import KeyframeReason, NewKeyframe, TrackingResult
from engine.types import (
    Features,
    Frame,
    FramePose,
    Keyframe,
    MapView,
    MatchRequest,
    PairMatches,
    RunCommand,
    TrackedFrame,
)
from engine.window_types import WindowEstimate, WindowProblem
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.fake_runs import (
    FakeLiveSource,
    FakeSource,
    Happening,
    WorldMatcher,
    Written,
    engine_of,
    frame_of,
)
from tests.support.synthetic import SyntheticWorld, straight_path

HANG_S = 300.0  # a guard, no measure
MAPPING, MATCHING = "mapping_0", "matching_0"
NUM_FRAMES = 30
KEYFRAME_EVERY = 3
WORLD = SyntheticWorld(straight_path(NUM_FRAMES, step=0.6), density=1.0)
KEYFRAMES = WORLD.frame_ids[::KEYFRAME_EVERY]
WITHOUT_DENSE = "dense.enabled=false"
NO_SNAPSHOTS = ["snapshots.every_keyframes=0", "snapshots.every_s=0"]  # but the final one
MUCH_WORK = [
    "global_bundle_adjustment.synchronous_until=0",
    "global_bundle_adjustment.merge_after_keyframes=1",
    "window.size=4",
    "window.num_older=4",
    "window.min_keyframes=6",
    "window.interval=2",
    "window.weak_fit_ratio=10",
    "window.merge_after_keyframes=1",
    "views.max_map_hz=1e6",
    "views.max_image_hz=1e6",
    "sources.frame_queue_size=1000",
]


class WrongThreadError(Exception):
    """Something was used on a thread that does not own it."""


class Ownership:
    """Checks the threads of calls and counts these.

    Args:
        monkeypatch: puts the checks in place.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()  # of a class, by a thread
        self.wrong_calls: list[str] = []
        self.num_views = 0
        self.was_posed_while_matching = threading.Event()
        self.was_copied = threading.Event()
        self._graph_thread = MAPPING
        self._monkeypatch = monkeypatch
        for owned in (SparseMap, Mapper):
            self._guard(owned, lambda: MAPPING)
        for shared in (SceneGraph, KeypointTables):
            self._guard(shared, lambda: self._graph_thread)
        self._after(Mapper.begin_keyframe, self._lend_graph)
        self._before(Mapper.add_keyframe, self._take_graph_back)
        self._before(Mapper.view, self._count_view)
        self._after(Mapper.add_frame, self._count_frame)
        self._after(Mapper.snapshot, self.was_copied.set)

    def _guard(self, owned: type, thread: Callable[[], str]) -> None:
        for name, member in list(vars(owned).items()):
            if name.startswith("_"):
                continue
            if isinstance(member, property):
                assert member.fget is not None
                checked: Any = property(self._checked(owned, name, member.fget, thread))
            else:
                assert isinstance(member, FunctionType), name
                checked = self._checked(owned, name, member, thread)
            self._monkeypatch.setattr(owned, name, checked)

    def _checked(
        self, owned: type, name: str, call: Callable[..., Any], thread: Callable[[], str]
    ) -> Callable[..., Any]:
        @functools.wraps(call)
        def checked(*args: Any, **kwargs: Any) -> Any:
            here, expected = threading.current_thread().name, thread()
            self.calls[owned.__name__, here] += 1
            if here != expected:
                wrong = f"{owned.__name__}.{name} on {here}, not on {expected}"
                self.wrong_calls.append(wrong)
                raise WrongThreadError(wrong)
            return call(*args, **kwargs)

        return checked

    def _before(self, method: Callable[..., Any], happens: Callable[[], None]) -> None:
        @functools.wraps(method)
        def with_first(*args: Any, **kwargs: Any) -> Any:
            happens()
            return method(*args, **kwargs)

        self._monkeypatch.setattr(Mapper, method.__name__, with_first)

    def _after(self, method: Callable[..., Any], happens: Callable[[], None]) -> None:
        @functools.wraps(method)
        def with_then(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            happens()
            return result

        self._monkeypatch.setattr(Mapper, method.__name__, with_then)

    def _lend_graph(self) -> None:
        self._graph_thread = MATCHING

    def _take_graph_back(self) -> None:
        self._graph_thread = MAPPING

    def _count_view(self) -> None:
        self.num_views += 1

    def _count_frame(self) -> None:
        if self._graph_thread == MATCHING:
            self.was_posed_while_matching.set()


@pytest.fixture
def ownership(monkeypatch: pytest.MonkeyPatch) -> Ownership:
    return Ownership(monkeypatch)


class WorldTracker:
    """Tracks by what the world shows; every third frame is a keyframe."""

    def __init__(
        self,
        config: FrameTrackingConfig,
        *,
        describe: Callable[[Frame], Features],
        is_sequence: bool,
        two_view: TwoViewConfig,
    ) -> None:
        del config, is_sequence, two_view
        self._describe = describe
        self._keyframe_ids: list[int] = []

    def follow(
        self, frame: Frame, *, wants_fallback: bool = False, motion_share: float = 1.0
    ) -> TrackingResult:
        """Follows the last keyframe, and the one before it where that is wanted."""
        if not self._keyframe_ids:
            return TrackingResult(tracked=None, fallback=None, due=KeyframeReason.FIRST)
        *earlier, last = self._keyframe_ids
        is_due = frame.frame_id in KEYFRAMES
        return TrackingResult(
            tracked=_tracked(frame, last),
            fallback=_tracked(frame, earlier[-1]) if wants_fallback and earlier else None,
            due=KeyframeReason.OVERLAP if is_due else None,
        )

    def make_keyframe(self, frame: Frame, reason: KeyframeReason) -> NewKeyframe:
        """Makes the frame a keyframe."""
        return self.end_keyframe(self.begin_keyframe(frame, reason), self.describe_keyframe(frame))

    def begin_keyframe(
        self, frame: Frame, reason: KeyframeReason, *, keeps_fallback: bool = False
    ) -> KeyframeReason:
        """Begins a keyframe that is described beside frames."""
        del frame, keeps_fallback
        return reason

    def describe_keyframe(self, frame: Frame) -> Keyframe:
        """Describes it."""
        features = self._describe(frame)
        keyframe = WORLD.keyframe(frame.frame_id)
        return replace(keyframe, features=features, received_at_s=frame.received_at_s)

    def end_keyframe(self, begun: KeyframeReason, keyframe: Keyframe) -> NewKeyframe:
        """Follows it from now on."""
        self._keyframe_ids.append(keyframe.frame_id)
        return NewKeyframe(keyframe=keyframe, reason=begun)


def _tracked(frame: Frame, keyframe_id: int) -> TrackedFrame:
    tracked = WORLD.tracked(frame.frame_id, keyframe_id=keyframe_id)
    return replace(tracked, received_at_s=frame.received_at_s)


@pytest.fixture
def _tracked_by_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FrameTracker", WorldTracker)


@dataclass
class WaitingView:
    """Sets an event of threads when it is shown that a keyframe was registered."""

    is_registered: threading.Event = field(default_factory=threading.Event)
    maps: list[MapView] = field(default_factory=list)

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        pass

    def show_map(self, view: MapView) -> None:
        self.maps.append(view)

    def show_event(self, event: Event) -> None:
        if isinstance(event, FrameRegistered):
            self.is_registered.set()

    def close(self) -> None:
        pass


@dataclass
class PoseWaitingView(WaitingView):
    """Sets events of threads when it is shown that a frame has its pose, or became a keyframe."""

    frame_id: int = 0
    is_posed: threading.Event = field(default_factory=threading.Event)
    is_added: dict[int, threading.Event] = field(
        default_factory=lambda: {frame_id: threading.Event() for frame_id in KEYFRAMES}
    )

    def show_event(self, event: Event) -> None:
        super().show_event(event)
        if isinstance(event, FramePosed) and event.frame_id == self.frame_id:
            self.is_posed.set()
        if isinstance(event, KeyframeAdded):
            self.is_added[event.frame_id].set()

    def paced(self, first: int, last: int) -> list[Happening]:
        """Frames, none of which comes while a keyframe is being described."""
        happenings: list[Happening] = []
        for frame in frames(first, last):
            happenings.append(frame)
            if frame.frame_id in self.is_added:
                happenings.append(until(self.is_added[frame.frame_id]))
        return happenings


@dataclass(kw_only=True)
class HeldMatcher(WorldMatcher):
    """Ends the matching of one keyframe when the gate opens."""

    held_id: int
    is_held: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        if any(self.held_id == request.pair.second for request in requests):
            self.is_held.set()
            assert self.gate.wait(HANG_S)
        return super().match(requests)


def frames(first: int, last: int) -> list[Frame]:
    return [frame_of(i, world=WORLD) for i in range(first, last + 1)]


def until(event: threading.Event) -> Callable[[], Awaitable[None]]:
    async def wait() -> None:
        assert await asyncio.to_thread(event.wait, HANG_S)

    return wait


def run(engine: Engine) -> tuple[RunOutcome, Written]:
    outcome = asyncio.run(asyncio.wait_for(engine.run(), HANG_S), debug=True)
    return outcome, Written.by(outcome)


# -- whole runs -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_tracked_by_the_world")
@pytest.mark.parametrize("is_live", [False, True], ids=["file", "live"])
def test_the_map_is_used_on_its_thread_only_and_the_graph_where_it_is_lent(
    tmp_path: Path, ownership: Ownership, is_live: bool
) -> None:
    """Keyframes, frames between, jobs, views of the map, and a snapshot on request."""
    view, requests = PoseWaitingView(), RunRequests()

    async def ask() -> None:
        await until(view.is_registered)()
        requests(RunCommand.SNAPSHOT)
        await until(ownership.was_copied)()

    gate = ownership.was_posed_while_matching
    if not is_live:
        gate.set()  # a file waits: nothing is posed meanwhile
    matcher = HeldMatcher(world=WORLD, held_id=KEYFRAMES[6], gate=gate)
    happenings: list[Happening] = [*frames(1, 17), ask, *frames(18, NUM_FRAMES)]
    if is_live:
        matching, rest = until(matcher.is_held), view.paced(matcher.held_id + 1, NUM_FRAMES)
        happenings = [*view.paced(1, 17), ask, *frames(18, matcher.held_id), matching, *rest]
    engine = engine_of(
        tmp_path / "run",
        matcher=matcher,
        sources=[
            FakeLiveSource(happenings=happenings)
            if is_live
            else FakeSource(happenings=happenings, is_sequence=True)
        ],
        views=[view],
        requests=requests,
        settings=[*MUCH_WORK, *NO_SNAPSHOTS],
    )
    outcome, written = run(engine)
    assert ownership.wrong_calls == []
    assert written.warnings() == []
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert outcome.num_registered == len(KEYFRAMES)
    assert written.statuses.count("tracked") == NUM_FRAMES - len(KEYFRAMES)

    # All of it took place.
    assert len(written.of_kind("SnapshotWritten")) == 2
    assert [event["command"] for event in written.of_kind("CommandTaken")] == ["snapshot"]
    assert written.of_kind("WindowSolved")
    assert any(event["keyframes_added_meanwhile"] for event in written.of_kind("BundleAdjusted"))
    assert ownership.num_views >= len(KEYFRAMES) - 3
    assert view.maps
    users = {name: {thread for of, thread in ownership.calls if of == name} for name in CHECKED}
    assert users == CHECKED


CHECKED = {
    "SparseMap": {MAPPING},
    "Mapper": {MAPPING},
    "SceneGraph": {MAPPING, MATCHING},
    "KeypointTables": {MAPPING, MATCHING},
}


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_frames_that_cannot_be_posed_while_a_keyframe_is_matched_cost_their_poses_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, order = threading.Event(), list[str]()
    matcher = HeldMatcher(world=WORLD, held_id=KEYFRAMES[6], gate=gate)
    add_frame, report, match_keyframe = Mapper.add_frame, Mapper.report, PairMatching.match_keyframe

    def break_while_matching(self: Mapper, *args: Any, **kwargs: Any) -> MappingStep:
        if matcher.is_held.is_set():
            asyncio.run_coroutine_threadsafe(open_later(), loops[0])
            raise RuntimeError("CHECK failed")
        return add_frame(self, *args, **kwargs)

    def recorded_match(self: PairMatching, *args: Any, **kwargs: Any) -> MatchedKeyframe:
        matched = match_keyframe(self, *args, **kwargs)
        order.append("matched")
        return matched

    def recorded_report(self: Mapper, **kwargs: Any) -> MappingStep:
        order.append("reported")
        return report(self, **kwargs)

    async def open_later() -> None:
        for _ in range(100):  # time enough for a run that does not wait
            await asyncio.sleep(0)
        gate.set()

    loops: list[asyncio.AbstractEventLoop] = []
    view = PoseWaitingView()
    first = [*view.paced(1, matcher.held_id - 1), *frames(matcher.held_id, matcher.held_id)]
    rest = frames(matcher.held_id + 1, NUM_FRAMES)

    async def find_loop() -> None:
        loops.append(asyncio.get_running_loop())

    monkeypatch.setattr(Mapper, "add_frame", break_while_matching)
    monkeypatch.setattr(Mapper, "report", recorded_report)
    monkeypatch.setattr(PairMatching, "match_keyframe", recorded_match)
    engine = engine_of(
        tmp_path / "run",
        matcher=matcher,
        sources=[FakeLiveSource(happenings=[find_loop, *first, until(matcher.is_held), *rest])],
        views=[view],
        settings=MUCH_WORK,
    )
    outcome, written = run(engine)
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    faults = written.of_kind("FaultOccurred")
    assert {fault["detail"] for fault in faults} == {"RuntimeError: CHECK failed"}
    assert order[-1] == "reported"
    assert outcome.num_registered == outcome.num_keyframes >= 7


# -- the checks bite ------------------------------------------------------------------------------


def test_using_the_map_on_the_event_loop_raises(tmp_path: Path, ownership: Ownership) -> None:
    engines: list[Engine] = []

    async def intrude() -> None:
        mapper = engines[0]._mapper._owned.result()
        with pytest.raises(WrongThreadError, match="Mapper.figures on MainThread"):
            mapper.figures()
        with pytest.raises(WrongThreadError, match="SparseMap.num_registered on MainThread"):
            _ = mapper._map.num_registered
        with pytest.raises(WrongThreadError, match="SceneGraph.edges on MainThread"):
            mapper._graph.edges()
        mapper.view()

    engines.append(
        engine_of(
            tmp_path / "run",
            matcher=WorldMatcher(world=WORLD),
            sources=[FakeSource(happenings=[*frames(1, 5), intrude])],
            settings=["faults.strict=true"],
        )
    )
    outcome, written = run(engines[0])
    assert len(ownership.wrong_calls) == 4
    assert outcome.stopped_by is StoppedBy.FAILURE  # by the last one, which nobody expected
    (warning,) = written.warnings()
    assert "Mapper.view on MainThread" in warning
    assert outcome.num_registered == 5


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_using_the_graph_on_the_mapping_thread_while_it_is_lent_raises(
    tmp_path: Path, ownership: Ownership
) -> None:
    engines: list[Engine] = []
    matcher = HeldMatcher(world=WORLD, held_id=KEYFRAMES[5], gate=threading.Event())

    async def look() -> None:
        mapper = engines[0]._mapper
        try:
            assert len(await mapper.call(Mapper.cameras)) == 1  # needs no graph
            with pytest.raises(WrongThreadError, match="SceneGraph.all_edges on mapping_0"):
                await mapper.call(Mapper.view)
        finally:
            matcher.gate.set()

    view = PoseWaitingView()
    first = [*view.paced(1, 15), *frames(16, 20)]
    happenings: list[Happening] = [*first, until(matcher.is_held), look, *frames(21, 24)]
    engines.append(
        engine_of(
            tmp_path / "run",
            matcher=matcher,
            sources=[FakeLiveSource(happenings=happenings)],
            views=[view],
            settings=["sources.frame_queue_size=1000"],
        )
    )
    outcome, _ = run(engines[0])
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert ownership.wrong_calls == ["SceneGraph.all_edges on mapping_0, not on matching_0"]


def test_a_job_that_uses_the_map_fails_the_run(tmp_path: Path, ownership: Ownership) -> None:
    engines: list[Engine] = []

    def solve(problem: WindowProblem) -> WindowEstimate:
        engines[0]._mapper._owned.result().figures()
        return solve_window(problem, WindowSolverConfig())

    engines.append(
        engine_of(
            tmp_path / "run",
            matcher=WorldMatcher(world=WORLD),
            sources=[FakeSource(happenings=frames(1, 16))],
            settings=[*MUCH_WORK, "faults.strict=true"],
            solve_window=solve,
        )
    )
    outcome, written = run(engines[0])
    assert outcome.stopped_by is StoppedBy.FAILURE
    assert "Mapper.figures on solving a window" in written.warnings()[0]
    assert ownership.wrong_calls


# -- hand-offs ------------------------------------------------------------------------------------


@pytest.fixture
def hand_offs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all calls to objects that a thread owns, in order."""
    names: list[str] = []
    original = ThreadOwned.call

    async def counted(
        self: ThreadOwned[Any], use: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        names.append(use.__name__)
        return await original(self, use, *args, **kwargs)

    monkeypatch.setattr(ThreadOwned, "call", counted)
    return names


SAVED = ["finish", "report", "trajectories", "cameras", "overlay_masks", "snapshot"]
SHOWN = ["report"]  # where there are views
REPORTED = ["figures"]


def test_a_keyframe_of_a_file_is_handed_to_the_mapper_twice(
    tmp_path: Path, hand_offs: list[str]
) -> None:
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames(1, 16))],
        views=[WaitingView()],
        settings=[*MUCH_WORK, *NO_SNAPSHOTS, WITHOUT_DENSE],
    )
    outcome, written = run(engine)
    assert outcome.num_registered == 16
    assert written.of_kind("WindowSolved")
    assert hand_offs == ["begin_keyframe", "add_keyframe"] * 16 + [*SAVED, *SHOWN, *REPORTED]


def test_the_dense_map_asks_the_mapper_a_bounded_number_of_times(
    tmp_path: Path, hand_offs: list[str]
) -> None:
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames(1, 16))],
        settings=NO_SNAPSHOTS,
    )
    outcome, _ = run(engine)
    assert outcome.num_registered == 16
    others = [name for name in hand_offs if name != "dense_handout"]
    assert others == ["begin_keyframe", "add_keyframe"] * 16 + [*SAVED, *REPORTED]
    # While keyframes come, one each and one that finds nothing more; at the end all once again.
    assert 0 < len(hand_offs) - len(others) <= 3 * 16 + 4


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_a_frame_between_keyframes_is_handed_to_the_mapper_once(
    tmp_path: Path, hand_offs: list[str]
) -> None:
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames(1, NUM_FRAMES), is_sequence=True)],
        settings=[*NO_SNAPSHOTS, WITHOUT_DENSE],
    )
    run(engine)
    # A frame that becomes a keyframe is tracked like any other first, except the very first one.
    keyframe = ["begin_keyframe", "add_keyframe"]
    each = ["add_frame", *keyframe, *["add_frame"] * (KEYFRAME_EVERY - 1)]
    assert hand_offs == (each * len(KEYFRAMES))[1:] + [*SAVED, *REPORTED]


@pytest.mark.usefixtures("_tracked_by_the_world")
@pytest.mark.parametrize("busy_with", ["begin_keyframe", "add_keyframe"])
def test_a_live_frame_has_its_pose_while_the_mapper_is_busy_with_a_keyframe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy_with: str
) -> None:
    held_id = KEYFRAMES[6]
    view, is_busy = PoseWaitingView(frame_id=held_id + 1), threading.Event()
    method = getattr(Mapper, busy_with)

    @functools.wraps(method)
    def held(mapper: Mapper, item: Any, *args: Any, **kwargs: Any) -> Any:
        if item.frame_id == held_id:
            is_busy.set()
            assert view.is_posed.wait(HANG_S)
        return method(mapper, item, *args, **kwargs)

    monkeypatch.setattr(Mapper, busy_with, held)
    first, rest = view.paced(1, held_id - 1), view.paced(held_id + 1, NUM_FRAMES)
    meanwhile: list[Happening] = [*frames(held_id, held_id), until(is_busy)]
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeLiveSource(happenings=[*first, *meanwhile, *rest])],
        views=[view],
        settings=[*NO_SNAPSHOTS, "sources.frame_queue_size=1000"],
    )
    outcome, written = run(engine)
    posed = [event["frame_id"] for event in written.of_kind("FramePosed") if event["is_first"]]
    assert sorted(posed) == WORLD.frame_ids  # each once
    assert len(read_tum(outcome.path / "trajectory.txt").timestamps_s) == NUM_FRAMES
    assert len(read_tum(outcome.path / "trajectory_live.txt").timestamps_s) == NUM_FRAMES


@dataclass(kw_only=True)
class HeldDescriber(WorldMatcher):
    """Ends the describing of one frame when the gate opens."""

    held_id: int
    gate: threading.Event
    is_held: threading.Event = field(default_factory=threading.Event)

    def describe(self, frame: Frame) -> Features:
        if frame.frame_id == self.held_id:
            self.is_held.set()
            assert self.gate.wait(HANG_S)
        return super().describe(frame)


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_live_frames_have_their_poses_while_a_keyframe_is_described(tmp_path: Path) -> None:
    held_id = KEYFRAMES[6]
    view = PoseWaitingView(frame_id=held_id + 2)
    matcher = HeldDescriber(world=WORLD, held_id=held_id, gate=view.is_posed)
    first, rest = view.paced(1, held_id - 1), view.paced(held_id + 3, NUM_FRAMES)
    held, meanwhile = frames(held_id, held_id), frames(held_id + 1, held_id + 2)
    described = until(view.is_added[held_id])
    engine = engine_of(
        tmp_path / "run",
        matcher=matcher,
        sources=[
            FakeLiveSource(
                happenings=[*first, *held, until(matcher.is_held), *meanwhile, described, *rest]
            )
        ],
        views=[view],
        settings=[*NO_SNAPSHOTS, "sources.frame_queue_size=1000"],
    )
    outcome, written = run(engine)
    posed = [event["frame_id"] for event in written.of_kind("FramePosed") if event["is_first"]]
    assert sorted(posed) == WORLD.frame_ids  # each once
    assert written.statuses.count("keyframe") == outcome.num_registered
    assert held_id in [event["frame_id"] for event in written.of_kind("FrameRegistered")]
    assert len(read_tum(outcome.path / "trajectory.txt").timestamps_s) == NUM_FRAMES


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_frames_of_several_cameras_are_described_one_at_a_time(tmp_path: Path) -> None:
    held_id, gate, overlaps = KEYFRAMES[6], threading.Event(), list[int]()

    class OneAtATime(HeldDescriber):
        def describe(self, frame: Frame) -> Features:
            if self.is_held.is_set() and not gate.is_set():
                overlaps.append(frame.frame_id)
            return super().describe(frame)

    async def open_later() -> None:
        for _ in range(1000):  # time enough for a frame that does not wait
            await asyncio.sleep(0)
        gate.set()

    matcher = OneAtATime(world=WORLD, held_id=held_id, gate=gate)
    other_id = KEYFRAMES[7]
    first_of_other = replace(frame_of(other_id, world=WORLD), camera_key="other")
    view = PoseWaitingView()
    happenings: list[Happening] = [
        *view.paced(1, 1),
        *frames(held_id, held_id),
        until(matcher.is_held),
        first_of_other,
        open_later,
    ]
    engine = engine_of(
        tmp_path / "run",
        matcher=matcher,
        sources=[FakeLiveSource(happenings=happenings)],
        views=[view],
        settings=NO_SNAPSHOTS,
    )
    _, written = run(engine)
    assert overlaps == []
    assert matcher.described == [1, held_id, other_id]
    assert written.statuses == ["keyframe"] * 3


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_poses_that_were_published_stay_when_the_run_breaks_off_before_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_id = KEYFRAMES[6]
    view, is_busy = PoseWaitingView(frame_id=held_id + 1), threading.Event()
    add_keyframe = Mapper.add_keyframe

    def broken(mapper: Mapper, matched: MatchedKeyframe, **kwargs: Any) -> MappingStep:
        if matched.frame_id == held_id:
            is_busy.set()
            assert view.is_posed.wait(HANG_S)
            raise RuntimeError("CHECK failed")
        return add_keyframe(mapper, matched, **kwargs)

    monkeypatch.setattr(Mapper, "add_keyframe", broken)
    happenings: list[Happening] = [*view.paced(1, held_id - 1), *frames(held_id, held_id)]
    happenings += [until(is_busy), *frames(held_id + 1, held_id + 1)]
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeLiveSource(happenings=happenings)],
        views=[view],
        settings=[*NO_SNAPSHOTS, "sources.frame_queue_size=1000", "faults.max_map_rebuilds=0"],
    )
    outcome, written = run(engine)
    assert outcome.stopped_by is StoppedBy.FAILURE
    posed = [event["frame_id"] for event in written.of_kind("FramePosed") if event["is_first"]]
    assert held_id + 1 in posed
    kept_s = read_tum(outcome.path / "trajectory_live.txt").timestamps_s
    assert sorted(kept_s) == pytest.approx([0.1 * frame_id for frame_id in sorted(posed)])


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_an_unexpected_error_beside_the_describing_of_a_keyframe_settles_its_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = WorldMatcher(world=WORLD)
    broken_ids: list[int] = []
    call = stages.TrackingStage._call

    async def broken(self: Any, use: Any, decoded: Any, **options: Any) -> Any:
        if options and decoded.frame.frame_id > KEYFRAMES[1] and not broken_ids:
            broken_ids.append(decoded.frame.frame_id)
            raise RuntimeError("no memory")
        return await call(self, use, decoded, **options)

    monkeypatch.setattr(stages.TrackingStage, "_call", broken)
    engine = engine_of(
        tmp_path / "run",
        matcher=matcher,
        sources=[FakeLiveSource(happenings=frames(1, NUM_FRAMES))],
        settings=[*NO_SNAPSHOTS, "sources.frame_queue_size=1000"],
    )
    outcome, written = run(engine)
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    (broken_id,) = broken_ids
    assert written.statuses[broken_id - 1] == "tracked"
    (fault,) = written.of_kind("FaultOccurred")
    assert (fault["part"], fault["frame_id"]) == ("tracking", broken_id)


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_no_more_frames_are_posed_ahead_of_a_busy_mapper_than_may_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_id = KEYFRAMES[6]
    monkeypatch.setitem(globals(), "KEYFRAMES", KEYFRAMES[:7])  # frames alone come after it
    is_busy, is_full = threading.Event(), threading.Event()
    num_waiting: list[int] = []
    add_keyframe = Mapper.add_keyframe

    def held(mapper: Mapper, matched: MatchedKeyframe, **kwargs: Any) -> MappingStep:
        if matched.frame_id == held_id:
            is_busy.set()
            assert is_full.wait(HANG_S)
        return add_keyframe(mapper, matched, **kwargs)

    async def count() -> None:
        for _ in range(5000):  # time enough for a run that does not wait
            await asyncio.sleep(0)
        num_waiting.append(len(engine._arrivals.frames_in_engine))
        is_full.set()

    monkeypatch.setattr(Mapper, "add_keyframe", held)
    view = PoseWaitingView(frame_id=held_id + 2)
    happenings: list[Happening] = [*view.paced(1, held_id - 1), *frames(held_id, held_id)]
    happenings += [until(is_busy), *frames(held_id + 1, NUM_FRAMES), until(view.is_posed), count]
    limits = ["sources.frame_queue_size=1000", "sources.mapping_queue_size=2"]
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeLiveSource(happenings=happenings)],
        views=[view],
        settings=[*NO_SNAPSHOTS, *limits],
    )
    _, written = run(engine)
    # The keyframe, two that were looked at, two that wait, one that tracking has and one to come.
    assert num_waiting[0] <= 7
    assert written.statuses.count("tracked") == NUM_FRAMES - 7
