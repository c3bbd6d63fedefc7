"""The dense map beside mapping: which keyframes get depth, when, and what it may cost.

A keyframe gets its turn when its pose has settled, the newest first. There is no queue of copies:
the mapper is asked for the next problem when the thread is free, so what waits are numbers, and a
problem has the poses of that moment. Keyframes are left out, and counted, where the share of the
run's CPU time is spent: those that came first, and are still without depth when the run ends.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import DenseConfig
from engine.cpu_time import Stage, cpu_by_stage
from engine.dense.dense_map import DenseMap, PlacedKeyframe
from engine.dense.depth import DepthOptions, estimate_depth
from engine.dense_types import (
    DenseCloud,
    DepthEstimate,
    DepthProblem,
    DepthStatus,
    KeyframePoses,
)
from engine.errors import InferenceError, JournalError
from engine.events import DenseMapWritten, DepthEstimated, RunPart
from engine.geometry import similarity_between_poses
from engine.mapping.depth_problems import DenseHandout
from engine.mapping.mapper import Mapper
from engine.output.dense_products import DENSE_PLY, DenseWorld, write_dense_points, write_ground
from engine.output.depth_store import DepthStore
from engine.output.ground_products import GroundProducts
from engine.output.keyframe_images import KeyframeImages
from engine.output.recorder import Recorder
from engine.output.run_folder import DENSE_FOLDER
from engine.ports import EventSink
from engine.run.event_loop import ThreadOwned, run_in
from engine.run.faults import Faults, Guard
from engine.run.queues import Writer
from engine.run.views import ViewDispatcher
from engine.types import FrameId

logger = logging.getLogger(__name__)

MAX_CALL_S = 30.0  # a depth map that takes longer hangs: the end of a run waits for it

_NICENESS = 10  # of threads that make depth, where the system has it for each
_EXPECTED_CPU_S = 0.1  # of the first keyframe
_SMOOTHING = 0.2  # of what a keyframe costs
_MAX_END_S = 10.0  # that the end of a run waits for depth, at most
_MAX_AGAIN = 2  # times that the depth of a keyframe is made again
_LOOK_AFTER_RATIO = 0.1  # of the keyframes: so many new ones, and all are looked at for moves
_MIN_LOOK_AFTER = 8
_PRODUCT_SHARE = 0.5  # of what the dense map takes, before the end
_POINTS_CPU_S = 0.02  # for each keyframe of the first product
_GROUND_CPU_S = 0.05  # likewise, with an orthophoto
_MIN_COMMON = 2  # keyframes by which a snapshot's world is laid onto that of views
_NOT_WRITTEN = "not_written"
_BUDGET = "budget"  # why a keyframe has no depth: its turn did not come
_SPACE_LOW = "disk_space_low"  # likewise: what is left of the disk is for the sparse map
_FAILED = "failed"
_TRIED_AT_END = frozenset({DepthStatus.NO_IMAGE, DepthStatus.NO_NEIGHBOUR})


class CpuBudget:
    """The share of the run's CPU time that the dense map may have.

    Args:
        share: of all that the process has used, the dense map included.
        used_s: CPU seconds of the process, from its start.
        spent_s: those of them that dense maps took, of earlier runs too.
    """

    def __init__(
        self,
        share: float,
        *,
        used_s: Callable[[], float] = time.process_time,
        spent_s: Callable[[], float] | None = None,
    ) -> None:
        self._share = share
        self._used_s = used_s
        self._spent_s = spent_s or _dense_cpu_s
        self._spent_before_s = self._spent_s()

    @property
    def spent_s(self) -> float:
        """CPU seconds that the dense map took."""
        return self._spent_s() - self._spent_before_s

    def has_room_for(self, cpu_s: float) -> bool:
        """Whether so much more may be spent now."""
        return self.spent_s + cpu_s <= self._share * (self._used_s() + cpu_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """What came of one keyframe, and of its looking at the others."""

    estimate: DepthEstimate | None  # None: none was wanted
    num_points: int
    lost: JournalError | None  # why it is not on disk
    has_no_space: bool  # it was not stored: too little is free on the disk
    poses: KeyframePoses | None  # of the map; None: not asked for
    placed: tuple[PlacedKeyframe, ...] | None  # by them
    cloud: DenseCloud | None
    looking_s: float  # CPU seconds that the latter two took


class DenseMaking:
    """Makes the dense map of a run.

    Args:
        config: how it is made, and what it may cost.
        mapper: hands out problems and poses.
        thread: runs one call at a time.
        guard: of making depth, which may hang.
        faults: takes what raises.
        recorder: knows where the run folder is, and counts what cannot be written there; the
            latter is called through the writer.
        writer: runs writes in order.
        views: show it.
        emit: takes the events.
        budget: by default the configured share of the process.
    """

    def __init__(
        self,
        config: DenseConfig,
        *,
        mapper: ThreadOwned[Mapper],
        thread: Executor,
        guard: Guard,
        faults: Faults,
        recorder: Recorder,
        writer: Writer,
        views: ViewDispatcher,
        emit: EventSink,
        budget: CpuBudget | None = None,
    ) -> None:
        self._config = config
        self._mapper = mapper
        self._thread = thread
        self._guard = guard
        self._faults = faults
        self._recorder = recorder
        self._writer = writer
        self._views = views
        self._emit = emit
        self._budget = budget or CpuBudget(config.max_cpu_share)
        self._options = DepthOptions(edge_px=config.edge_px, num_neighbours=config.neighbours)
        self._images = KeyframeImages(lambda: recorder.path, edge_px=config.edge_px)
        self._map = DenseMap(DepthStore(lambda: recorder.path))
        self._ground = GroundProducts(self._map.depth_map) if config.orthophoto else None
        self._is_on = config.enabled
        self._news = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._is_ending = False
        self._done: dict[FrameId, str] = {}  # how keyframes fared that had their turn
        self._num_times: Counter[FrameId] = Counter()  # that a keyframe had its turn
        self._again: tuple[FrameId, ...] = ()  # have moved by more than their depth's error
        self._num_until_look = _MIN_LOOK_AFTER  # keyframes
        self._cost_s = _EXPECTED_CPU_S  # of a keyframe
        self._num_waiting = 0  # settled keyframes, as last known
        self._placed: tuple[PlacedKeyframe, ...] = ()  # as last looked at
        self._num_made_again = 0
        self._shown: KeyframePoses | None = None  # where keyframes are in the map that views show
        self._world: DenseWorld | None = None  # of the newest snapshot, not yet in the products
        self._product_cost_s = _POINTS_CPU_S if self._ground is None else _GROUND_CPU_S
        self._products_s = 0.0  # CPU seconds that products took so far
        self._written = {"points": 0, "verdict": ""}  # of the newest product

    # -- the run --------------------------------------------------------------------------------

    async def go_on(self, *, before: FrameId) -> None:
        """Takes over what a run before has made.

        Args:
            before: the first frame that is not of that run.
        """
        if not self._is_on:
            return
        await run_in(self._thread, functools.partial(self._map.restore, before=before))
        self._done = dict.fromkeys(self._map.frame_ids, DepthStatus.MADE.value)

    def note_keyframe(self) -> None:
        """A keyframe was mapped: others may have settled."""
        self._news.set()

    def take_world(self, world: DenseWorld) -> None:
        """A snapshot is written: products follow it, the newest one only."""
        if self._is_on:
            self._world = world
            self._news.set()

    def start(self) -> None:
        """Makes depth beside the run from now on, until `finish`."""
        if self._is_on:
            self._working = asyncio.create_task(self._work(), name="dense map")

    async def finish(self, *, is_dropping: bool) -> None:
        """Makes what the budget still allows, within some seconds; after the last adjustment.

        Args:
            is_dropping: nothing more is to be made.
        """
        if self._working is None:
            return
        self._is_ending = True
        self._news.set()
        await asyncio.wait((self._working,), timeout=MAX_CALL_S)  # for the step at hand
        self._working.cancel()
        await asyncio.wait((self._working,))
        if is_dropping:
            return
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_MAX_END_S + MAX_CALL_S):
                    await self._make_last()
            await self._write_products()
        except Exception as error:  # a task boundary: the map is saved all the same
            self._failed(error, None)

    async def _make_last(self) -> None:
        for frame_id, status in list(self._done.items()):
            if status in _TRIED_AT_END:
                del self._done[frame_id]
        await self._look()  # the last adjustment moved keyframes
        ends_at_s = time.monotonic() + _MAX_END_S
        while time.monotonic() < ends_at_s and await self._make_next(is_final=True):
            continue
        await self._look()

    def figures(self) -> dict[str, Any]:
        """The figures of ``summary.json``."""
        reasons = Counter(self._done.values())
        num_made = reasons.pop(DepthStatus.MADE.value, 0)
        if self._num_waiting:
            reasons[_SPACE_LOW if self._recorder.is_space_low else _BUDGET] += self._num_waiting
        return {
            "enabled": self._config.enabled,
            "keyframes_with_depth": num_made,
            "keyframes_without": dict(sorted(reasons.items())),
            "made_again": self._num_made_again,
            "points": self._map.num_points,
            "written": self._written,
        }

    # -- inside ---------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._is_ending:
            await self._news.wait()
            self._news.clear()
            try:
                while not self._is_ending and await self._make_next():
                    continue
                if not self._is_ending and self._is_product_due():
                    await self._write_products()
            except Exception as error:  # a task boundary: it goes on with the next keyframe
                self._failed(error, None)

    async def _look(self) -> None:
        """Looks where all depth lies now, at the end."""
        handout = await self._mapper.call(
            Mapper.dense_handout, done=frozenset(self._done), is_final=True, wants_poses=True
        )
        self._num_waiting = handout.num_waiting
        try:
            self._look_at(await run_in(self._thread, functools.partial(self._make, handout, None)))
        except Exception as error:  # a task boundary: views show it as it was
            self._failed(error, None)

    async def _make_next(self, *, is_final: bool = False) -> bool:
        """Makes the depth of one keyframe; returns whether another may follow at once."""
        products_s = self._product_cost_s * (1 + len(self._map.frame_ids))  # at the end
        has_room = self._budget.has_room_for(self._cost_s + products_s)
        if self._guard.is_off or self._recorder.is_space_low or not has_room:
            return False
        wants_poses = self._num_until_look <= 0 or self._views.wants_dense()
        handout = await self._mapper.call(
            Mapper.dense_handout,
            done=frozenset(self._done),
            again=self._again,
            is_final=is_final,
            wants_poses=wants_poses,
        )
        self._num_waiting = handout.num_waiting
        problem = handout.problem
        if problem is None and handout.poses is None:
            return False
        began_s = self._budget.spent_s
        try:
            made = await run_in(self._thread, functools.partial(self._make, handout, problem))
        except Exception as error:  # a task boundary: a keyframe has no depth
            self._failed(error, problem)
            return problem is not None  # what fails has had its turn
        if made.lost is not None:
            failed = functools.partial(self._recorder.product_failed, DENSE_FOLDER, made.lost)
            await self._writer.schedule(failed)
        self._look_at(made)
        if problem is None or made.estimate is None:
            return False
        if made.has_no_space:
            return False  # it is counted with those that wait
        self._made(problem, made, made.estimate)
        cost_s = self._budget.spent_s - began_s
        self._cost_s += _SMOOTHING * (cost_s - self._cost_s)
        return handout.num_waiting > 1 or bool(self._again) or is_final

    def _make(self, handout: DenseHandout, problem: DepthProblem | None) -> _Made:
        """On the dense thread: depth of a keyframe, and where all of it lies now."""
        _be_nice()
        estimate, num_points, lost, has_no_space = None, 0, None, False
        if problem is not None:
            estimate = self._guard.call(functools.partial(self._estimated, problem, handout))
            has_no_space = self._recorder.is_space_low  # since it was begun
            if estimate.depth_map is not None and not has_no_space:
                try:
                    num_points = self._map.add(estimate.depth_map, problem)
                except JournalError as error:
                    lost = error
        placed = cloud = None
        began_s = time.thread_time()
        if handout.poses is not None:
            placed = tuple(self._map.placed(handout.poses))
            cloud = self._map.cloud(placed)
        return _Made(
            estimate=estimate,
            num_points=num_points,
            lost=lost,
            has_no_space=has_no_space,
            poses=handout.poses,
            placed=placed,
            cloud=cloud,
            looking_s=time.thread_time() - began_s,
        )

    def _estimated(self, problem: DepthProblem, handout: DenseHandout) -> DepthEstimate:
        _be_nice()
        views = {one.frame_id: one for one in (problem.view, *problem.neighbours)}
        try:
            images = self._images.of(handout.image_names, views)
            return estimate_depth(problem, images, self._options)
        except InferenceError as error:
            return DepthEstimate(
                status=DepthStatus.NO_IMAGE, reason=str(error), depth_map=None, cpu_s=0.0
            )

    def _is_product_due(self) -> bool:
        """Whether products of the newest snapshot cost little beside what else was done."""
        expected_s = self._product_cost_s * len(self._map.frame_ids)
        spent_s = self._budget.spent_s + expected_s
        is_cheap = self._products_s + expected_s <= _PRODUCT_SHARE * spent_s
        return is_cheap and self._budget.has_room_for(expected_s)

    async def _write_products(self) -> None:
        """Writes the products of the newest snapshot, unless they are written."""
        if self._recorder.is_space_low:
            return
        world, self._world = self._world, None
        if world is None or not self._map.frame_ids:
            return
        began_s = self._budget.spent_s
        try:
            event = await run_in(self._thread, self._write_world, world)
        except JournalError as error:
            failed = functools.partial(self._recorder.product_failed, DENSE_PLY, error)
            await self._writer.schedule(failed)
            return
        except Exception as error:  # a task boundary: the products stay as they were
            self._faults.report(RunPart.DENSE, error, consequence="its products stay as they were")
            return
        finally:
            spent_s = self._budget.spent_s - began_s
            self._products_s += spent_s
            self._product_cost_s = spent_s / len(self._map.frame_ids)
        self._show_ground(world)
        await self._writer.schedule(functools.partial(self._recorder.product_written, DENSE_PLY))
        self._written = {"points": event.num_points, "verdict": world.verdict.level.value}
        self._emit(event)

    def _show_ground(self, world: DenseWorld) -> None:
        """Has views show the ground, in the world of the map that they show."""
        picture = None if self._ground is None else self._ground.picture
        shown = {} if self._shown is None else self._shown.by_id()
        snapshot = world.poses.by_id()
        common = [frame_id for frame_id in snapshot if frame_id in shown]
        if picture is None or len(common) < _MIN_COMMON:
            return
        onto = similarity_between_poses(
            np.array([snapshot[i] for i in common]), np.array([shown[i] for i in common])
        )
        if onto is not None:
            self._views.offer_ground(picture.moved(onto))

    def _write_world(self, world: DenseWorld) -> DenseMapWritten:
        """On the dense thread: writes the products of a snapshot."""
        _be_nice()
        began_s = time.thread_time()
        placed = self._map.placed(world.poses)
        run_path = self._recorder.path
        points = self._map.points(placed)
        num_points = write_dense_points(run_path, points, world, self._config, ground=self._ground)
        if self._ground is not None:
            right = {one.frame_id for one in placed if not one.is_wrong}
            versions = {i: v for i, v in self._map.depth_versions().items() if i in right}
            write_ground(run_path, world, self._ground, versions)
        return DenseMapWritten(
            path=str(run_path / DENSE_PLY),
            num_keyframes=len(placed),
            num_points=num_points,
            verdict=world.verdict.level.value,
            cpu_s=round(time.thread_time() - began_s, 3),
        )

    def _look_at(self, made: _Made) -> None:
        """Takes where depth lies now, and what of it is to be made again."""
        if made.placed is None:
            return
        self._placed, self._shown = made.placed, made.poses
        outdated = (one.frame_id for one in made.placed if one.is_outdated)
        self._again = tuple(i for i in outdated if self._num_times[i] <= _MAX_AGAIN)
        self._num_until_look = max(
            _MIN_LOOK_AFTER, int(_LOOK_AFTER_RATIO * len(self._map.frame_ids))
        )
        if made.cloud is not None:
            self._views.offer_dense(made.cloud, cpu_s=made.looking_s)

    def _made(self, problem: DepthProblem, made: _Made, estimate: DepthEstimate) -> None:
        frame_id = problem.view.frame_id
        is_again = self._had_turn(frame_id)
        status = estimate.status.value if made.lost is None else _NOT_WRITTEN
        self._done[frame_id] = status
        self._num_made_again += is_again
        self._emit(
            DepthEstimated(
                frame_id=frame_id,
                status=status,
                reason=estimate.reason,
                num_points=made.num_points,
                is_again=is_again,
                cpu_s=round(estimate.cpu_s, 4),
            )
        )

    def _failed(self, error: Exception, problem: DepthProblem | None) -> None:
        frame_id = None
        if problem is not None:
            frame_id = problem.view.frame_id
            self._had_turn(frame_id)
            self._done[frame_id] = _FAILED
        self._faults.report(
            RunPart.DENSE, error, consequence="a keyframe has no depth", frame_id=frame_id
        )

    def _had_turn(self, frame_id: FrameId) -> bool:
        """Counts a keyframe that had its turn; returns whether it had depth before."""
        had_depth = self._done.get(frame_id) == DepthStatus.MADE
        self._num_times[frame_id] += 1
        self._again = tuple(i for i in self._again if i != frame_id)
        self._num_until_look -= 1
        return had_depth


def _dense_cpu_s() -> float:
    by_stage = cpu_by_stage()
    return by_stage[Stage.DENSE_DEPTH] + by_stage[Stage.DENSE_FUSION]


def _be_nice() -> None:
    """Lets other threads of the machine go first, where the system knows priorities of threads."""
    if sys.platform != "linux":
        return  # elsewhere it would be the priority of the process
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
