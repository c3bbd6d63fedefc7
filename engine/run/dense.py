"""The dense map beside mapping: which keyframes get depth, when, and what it may cost.

A keyframe gets its turn when its pose has settled, the newest first. There is no queue of copies:
the mapper is asked for the next problem when the thread is free, so what waits are numbers, and a
problem has the poses of that moment. Keyframes are left out, and counted by reason, where the
share of the run's CPU time is spent: those that came first, and are still without depth when the
run ends.

What may hang on a disk is given up where nothing comes of it, and the dense map with it. Whatever
still runs then, or once the run lets go of its folder, writes there no more.
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
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.config import DenseConfig
from engine.cpu_time import Stage, cpu_by_stage
from engine.dense.dense_map import DenseMap, PlacedKeyframe
from engine.dense.depth import DepthOptions, SeeDepth, estimate_depth
from engine.dense_types import (
    DenseCloud,
    DepthEstimate,
    DepthMap,
    DepthProblem,
    DepthStatus,
    KeyframePoses,
)
from engine.errors import HangError, InferenceError, JournalError
from engine.events import DenseMapWritten, DepthEstimated, RunPart
from engine.geometry import similarity_between_poses
from engine.mapping.depth_problems import DenseHandout
from engine.mapping.mapper import Mapper
from engine.output.dense_products import (
    DENSE_PLY,
    DenseWorld,
    WrittenPoints,
    write_ground,
    write_points_of,
)
from engine.output.depth_store import DepthStore
from engine.output.ground_products import GroundProducts
from engine.output.keyframe_images import KeyframeImages
from engine.output.recorder import Recorder
from engine.output.run_folder import DENSE_FOLDER, PRODUCTS_FOLDER
from engine.ports import EventSink
from engine.run.event_loop import ThreadOwned, run_in
from engine.run.faults import Faults, Guard, StoppedError, Wait, wait_for_call
from engine.run.queues import Writer
from engine.run.views import ViewDispatcher
from engine.types import FrameId

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

GROUND = f"{PRODUCTS_FOLDER}/: orthophoto, surface model or coverage"  # for people
MAX_CALL_S = 30.0  # a depth map that takes longer hangs: the end of a run waits for it

_NICENESS = 10  # of threads that make depth, where the system has it for each
_EXPECTED_CPU_S = 0.1  # of the first keyframe
_SMOOTHING = 0.2  # of what a keyframe costs
_MAX_END_S = 10.0  # that the end of a run waits for depth, at most
_MAX_AGAIN = 2  # times that the depth of a keyframe is made again
_PLACE_AFTER_RATIO = 0.1  # of the keyframes: so many new ones, and all are placed anew
_MIN_PLACE_AFTER = 8
_PRODUCT_SHARE = 0.5  # of what the dense map takes, before the end
_MIN_FOR_PRODUCT = 8  # keyframes with depth, before the end: fewer do not show what more cost
_POINTS_CPU_S = 0.02  # for each keyframe of the first product
_GROUND_CPU_S = 0.05  # likewise, with an orthophoto
_MIN_COMMON = 2  # keyframes by which a snapshot's world is laid onto that of views
_PRODUCT_TIMES = 10  # the time of a call that a step of writing products may take
_NOT_WRITTEN = "not_written"
_FAILED = "failed"
_LOST = "lost"  # it was made, and cannot be read any more
_TRIED_AT_END = frozenset(
    {DepthStatus.NO_IMAGE, DepthStatus.NO_NEIGHBOUR, DepthStatus.NOTHING_AGREES}
)


class LeftOut(StrEnum):
    """Why keyframes have not had their turn."""

    BUDGET = "budget"  # the share of the CPU time is spent
    END_OF_RUN = "end_of_run"  # the end of a run waits for so long only
    HUNG = "hung"  # too many calls did not return
    DROPPED = "dropped"  # a second signal
    SPACE_LOW = "disk_space_low"  # what is left of the disk is for the sparse map


class CpuBudget:
    """The share of the run's CPU time that the dense map may have.

    Args:
        share: of all that the process uses from now on, the dense map included.
        used_s: CPU seconds of the process, of earlier runs too.
        spent_s: those of them that dense maps took, likewise.
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
        self._used_before_s, self._spent_before_s = self._used_s(), self._spent_s()

    @property
    def spent_s(self) -> float:
        """CPU seconds that the dense map took."""
        return self._spent_s() - self._spent_before_s

    def has_room_for(self, cpu_s: float) -> bool:
        """Whether so much more may be spent now."""
        used_s = self._used_s() - self._used_before_s
        return self.spent_s + cpu_s <= self._share * (used_s + cpu_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Failure:
    """What a step raised; it is reported."""

    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """What came of one keyframe, and of placing them all."""

    estimate: DepthEstimate | None  # None: none was wanted
    num_points: int
    lost: JournalError | None  # why it is not on disk
    has_no_space: bool  # it was not stored: too little is free on the disk
    poses: KeyframePoses | None  # of the map; None: not asked for
    placed: tuple[PlacedKeyframe, ...] | None  # by them
    cloud: DenseCloud | None
    placing_s: float  # CPU seconds that the latter two took


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What the dense map holds."""

    frame_ids: frozenset[FrameId] = frozenset()  # keyframes whose depth can be read
    num_points: int = 0

    @property
    def num_keyframes(self) -> int:
        return len(self.frame_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """The newest products."""

    points: int = 0  # of dense.ply
    verdict: str = ""  # on the map; "": none is written
    epsg: int | None = None  # the CRS of orthophoto and surface model; None: in none


class DenseMaking:
    """Makes the dense map of a run.

    Args:
        config: how it is made, and what it may cost.
        mapper: hands out problems and poses.
        thread: runs one call at a time.
        guard: of making depth, which may hang.
        faults: takes what raises.
        recorder: knows where the run folder is and whether its disk is nearly full, and counts what
            cannot be written there; the latter is called through the writer.
        writer: runs writes in order.
        views: show it.
        emit: takes the events.
        see_depth: by the run's matcher; None: it does not see any.
        budget: by default the configured share of the process.
        max_call_s: a call that takes longer without a sign of going on hangs; 0: none does.
        wait: waits for calls that may hang.
        clock: seconds that never go back.
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
        see_depth: SeeDepth | None = None,
        budget: CpuBudget | None = None,
        max_call_s: float = MAX_CALL_S,
        wait: Wait = wait_for_call,
        clock: Callable[[], float] = time.monotonic,
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
        self._see_depth = see_depth
        self._budget = budget or CpuBudget(config.max_cpu_share)
        self._wait = wait
        self._clock = clock
        # Of what uses the disk and the map: after a call that was left behind there is no other.
        self._disk = Guard(
            RunPart.DENSE, limit_s=max_call_s, max_hangs=1, wait=self._wait_while_it_goes_on
        )
        self._options = DepthOptions(edge_px=config.edge_px, num_neighbours=config.neighbours)
        self._images = KeyframeImages(lambda: recorder.path, edge_px=config.edge_px)
        self._map = DenseMap(DepthStore(self._run_path))
        self._ground = GroundProducts(self._depth_of_product) if config.orthophoto else None
        self._is_on = config.enabled
        self._stopped = threading.Event()  # nothing more is made or written
        self._left_behind = threading.Event()  # a call that may still hold the map and the disk
        self._num_steps = 0  # of what uses the disk: signs that it goes on
        self._held = _Held()  # as the dense thread last saw it
        self._news = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._is_ending = False
        self._is_last_product = False  # no newer world follows
        self._done: dict[FrameId, str] = {}  # how keyframes fared that had their turn
        self._num_times: Counter[FrameId] = Counter()  # that a keyframe had its turn
        self._again: tuple[FrameId, ...] = ()  # have moved by more than their depth's error
        self._num_until_placing = _MIN_PLACE_AFTER  # keyframes
        self._cost_s = _EXPECTED_CPU_S  # of a keyframe
        self._num_waiting = 0  # settled keyframes, as last known
        self._left_out: LeftOut | None = None  # why they wait; None: their turn comes
        self._num_made_again = 0
        self._num_outdated = 0  # as last placed
        self._shown: KeyframePoses | None = None  # where keyframes are in the map that views show
        self._world: DenseWorld | None = None  # of the newest snapshot
        self._has_new_world = False  # no product was begun in it
        self._is_product_old = True  # it is of another world, or lacks depth
        self._product_cost_s = _POINTS_CPU_S if self._ground is None else _GROUND_CPU_S
        self._products_s = 0.0  # CPU seconds that products took so far
        self._product = _Product()

    # -- the run --------------------------------------------------------------------------------

    async def go_on(self, *, before: FrameId) -> None:
        """Takes over what a run before has made, as far as it can be read.

        Args:
            before: the first frame that is not of that run.
        """
        if not self._is_on:
            return
        restored = await self._attempt(
            self._on_thread(functools.partial(self._restored, before=before)),
            consequence="depth of the run before is made again",
        )
        if not isinstance(restored, _Failure):
            self._done = dict.fromkeys(restored, DepthStatus.MADE.value)

    def keyframe_mapped(self) -> None:
        """A keyframe was mapped: others may have settled."""
        self._news.set()

    def take_world(self, world: DenseWorld) -> None:
        """A snapshot is written: products follow it, the newest one only."""
        if self._is_on:
            self._world = world
            self._has_new_world = self._is_product_old = True
            self._news.set()

    def start(self) -> None:
        """Makes depth beside the run from now on, until `finish`."""
        if self._is_on:
            self._working = asyncio.create_task(self._work(), name="dense map")

    def drop_what_waits(self) -> None:
        """Makes and writes nothing more; what is at hand is broken off at its next step."""
        self._stopped.set()
        self._news.set()

    async def finish(self) -> None:
        """Makes depth again that the last adjustment moved, what else the budget allows, products.

        The former whatever the budget says, both within some seconds. What hangs is given up, and
        what was dropped is only counted.
        """
        if self._working is None:
            return
        self._is_ending = True
        self._news.set()
        await asyncio.wait((self._working,))  # for the step at hand, which has its limit
        await self._attempt(self._make_last(), consequence="keyframes have no depth")
        self._is_last_product = True
        await self._attempt(self._write_products(), consequence="its products stay as they were")
        if self._recorder.is_space_low and self._is_product_old and self._held.num_keyframes:
            error = JournalError(f"{DENSE_PLY} is not written: the disk is nearly full")
            failed = functools.partial(self._recorder.product_failed, DENSE_PLY, error)
            await self._writer.schedule(failed)

    async def close(self) -> None:
        """Waits until nothing is written any more; before the run lets go of its folder."""
        self._stopped.set()
        idle = asyncio.ensure_future(run_in(self._thread, self._disk.close))
        await asyncio.wait((idle,), timeout=2 * MAX_CALL_S)
        if not idle.done():
            self._faults.report(
                RunPart.DENSE,
                HangError(f"{RunPart.DENSE.value} has not ended after {2 * MAX_CALL_S:g} s"),
                consequence="the run ends without it",
            )

    def figures(self) -> dict[str, Any]:
        """The figures of ``summary.json``."""
        held = self._held.frame_ids
        reasons = Counter(why for frame_id, why in self._done.items() if frame_id not in held)
        num_lost = reasons.pop(DepthStatus.MADE.value, 0)
        if num_lost:
            reasons[_LOST] = num_lost
        if self._num_waiting:
            reasons[(self._left_out or LeftOut.END_OF_RUN).value] += self._num_waiting
        return {
            "enabled": self._config.enabled,
            "keyframes_with_depth": len(held),
            "keyframes_without": dict(sorted(reasons.items())),
            "made_again": self._num_made_again,
            "outdated": self._num_outdated,
            "points": self._held.num_points,
            "written": asdict(self._product),
        }

    # -- when -----------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._is_ending:
            await self._news.wait()
            self._news.clear()
            has_more = True
            while has_more and not self._is_ending:
                made = await self._attempt(self._make_next(), consequence="a keyframe has no depth")
                has_more = made is True
                if not self._is_ending and self._is_product_due():
                    await self._attempt(
                        self._write_products(), consequence="its products stay as they were"
                    )

    async def _make_last(self) -> None:
        for frame_id, status in list(self._done.items()):
            if status in _TRIED_AT_END:
                del self._done[frame_id]
        await self._place_all()  # the last adjustment moved keyframes
        ends_at_s = self._clock() + _MAX_END_S
        while self._clock() < ends_at_s:
            if not await self._make_next(is_final=True):
                break
        else:
            if self._left_out is not LeftOut.BUDGET:  # new ones had no turn in any case
                self._left_out = LeftOut.END_OF_RUN
        await self._place_all()

    def _reason_to_leave_out(self, *, num_before: int = 0) -> LeftOut | None:
        """Why no keyframe gets its turn now, with room for so many others that go before it."""
        if self._stopped.is_set():
            return LeftOut.DROPPED
        if self._recorder.is_space_low:
            return LeftOut.SPACE_LOW
        if self._guard.is_off or self._left_behind.is_set():
            return LeftOut.HUNG
        products_s = self._product_cost_s * (1 + self._held.num_keyframes)  # at the end
        has_room = self._budget.has_room_for((1 + num_before) * self._cost_s + products_s)
        return None if has_room else LeftOut.BUDGET

    def _is_product_due(self) -> bool:
        """Whether products of the newest snapshot cost little beside what else was done.

        The first ones are due in any case: they show what products cost.
        """
        if not self._has_new_world or self._held.num_keyframes < _MIN_FOR_PRODUCT:
            return False
        expected_s = self._product_cost_s * self._held.num_keyframes
        spent_s = self._budget.spent_s + expected_s
        is_cheap = self._products_s + expected_s <= _PRODUCT_SHARE * spent_s
        return (is_cheap or not self._products_s) and self._budget.has_room_for(expected_s)

    # -- depth ----------------------------------------------------------------------------------

    async def _place_all(self) -> None:
        """Places all depth by where keyframes are now, at the end."""
        handout = await self._mapper.call(
            Mapper.dense_handout,
            done=frozenset(self._done),
            is_final=True,
            wants_problem=False,
            wants_poses=not self._stopped.is_set(),
        )
        self._num_waiting = handout.num_waiting
        if self._stopped.is_set():
            self._left_out = LeftOut.DROPPED
            return
        made = await self._attempt(
            self._on_thread(functools.partial(self._make, handout)),
            consequence="views show it as it was",
        )
        if not isinstance(made, _Failure):
            self._take_placed(made)

    async def _make_next(self, *, is_final: bool = False) -> bool:
        """Makes the depth of one keyframe; returns whether another may follow at once."""
        # What the map shows to be wrong goes before what is new.
        self._left_out = self._reason_to_leave_out(num_before=len(self._again))
        is_repair = bool(self._again) and self._left_out is LeftOut.BUDGET
        # The last adjustment may move all of it, and depth that nothing agrees with shows nothing.
        may_repair = is_repair and (is_final or self._reason_to_leave_out() is None)
        wants_problem = self._left_out is None or may_repair
        wants_poses = self._num_until_placing <= 0 or self._views.wants_dense()
        if self._stopped.is_set() or not (wants_problem or wants_poses):
            return False
        handout = await self._mapper.call(
            Mapper.dense_handout,
            done=frozenset(self._done),
            again=self._again,
            is_final=is_final,
            wants_problem=wants_problem,
            wants_new=not is_repair,
            wants_poses=wants_poses,
        )
        self._num_waiting = handout.num_waiting
        problem = handout.problem
        if problem is None and handout.poses is None:
            return False
        began_s = self._budget.spent_s
        made = await self._attempt(
            self._on_thread(functools.partial(self._make, handout)),
            consequence="a keyframe has no depth",
            frame_id=None if problem is None else problem.view.frame_id,
        )
        if isinstance(made, _Failure):
            return self._is_turn_lost(problem, made)
        if made.lost is not None:
            failed = functools.partial(self._recorder.product_failed, DENSE_FOLDER, made.lost)
            await self._writer.schedule(failed)
        self._take_placed(made)
        if problem is None or made.estimate is None:
            return False
        if made.has_no_space:
            return False  # it is counted with those that wait
        self._made(problem, made, made.estimate)
        cost_s = self._budget.spent_s - began_s
        self._cost_s += _SMOOTHING * (cost_s - self._cost_s)
        return handout.num_waiting > 1 or bool(self._again) or is_final

    def _make(self, handout: DenseHandout) -> _Made:
        """On the dense thread: depth of a keyframe, and where all of it lies now."""
        _be_nice()
        problem = handout.problem
        estimate, num_points, lost, has_no_space = None, 0, None, False
        if problem is not None:
            estimate = self._guard.call(functools.partial(self._estimated, problem, handout))
            has_no_space = self._recorder.is_space_low  # since it was begun
            if estimate.depth_map is not None and not has_no_space:
                add = functools.partial(self._added, estimate.depth_map, problem)
                try:
                    num_points = self._disk.call(add)
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
            placing_s=time.thread_time() - began_s,
        )

    def _estimated(self, problem: DepthProblem, handout: DenseHandout) -> DepthEstimate:
        _be_nice()
        views = {one.frame_id: one for one in (problem.view, *problem.neighbours)}
        try:
            images = self._images.of(handout.image_names, views)
            return estimate_depth(problem, images, self._options, self._see_depth)
        except InferenceError as error:
            return DepthEstimate(
                status=DepthStatus.NO_IMAGE, reason=str(error), depth_map=None, cpu_s=0.0
            )

    def _added(self, depth_map: DepthMap, problem: DepthProblem) -> int:
        _be_nice()
        return self._map.add(depth_map, problem)

    def _restored(self, *, before: FrameId) -> list[FrameId]:
        """On the dense thread: keyframes whose depth a run before has made."""
        self._disk.call(functools.partial(self._map.restore, before=before))
        return self._map.frame_ids

    def _take_placed(self, made: _Made) -> None:
        """Takes where depth lies now, and what of it is to be made again."""
        if made.placed is None:
            return
        self._shown = made.poses
        outdated = [one.frame_id for one in made.placed if one.is_outdated]
        self._num_outdated = len(outdated)
        self._again = tuple(i for i in outdated if self._num_times[i] <= _MAX_AGAIN)
        self._num_until_placing = max(
            _MIN_PLACE_AFTER, int(_PLACE_AFTER_RATIO * self._held.num_keyframes)
        )
        if made.cloud is not None:
            self._views.offer_dense(made.cloud, cpu_s=made.placing_s)

    def _made(self, problem: DepthProblem, made: _Made, estimate: DepthEstimate) -> None:
        frame_id = problem.view.frame_id
        is_again = self._had_turn(frame_id)
        status = estimate.status.value if made.lost is None else _NOT_WRITTEN
        keeps_former = status != DepthStatus.MADE and frame_id in self._held.frame_ids
        self._done[frame_id] = DepthStatus.MADE.value if keeps_former else status
        self._num_made_again += is_again
        self._is_product_old |= status == DepthStatus.MADE
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

    def _is_turn_lost(self, problem: DepthProblem | None, failure: _Failure) -> bool:
        """Counts a keyframe whose depth failed; returns whether it has had its turn."""
        if problem is None or isinstance(failure.error, StoppedError):
            return False
        frame_id = problem.view.frame_id
        self._had_turn(frame_id)
        if frame_id not in self._held.frame_ids:
            self._done[frame_id] = _FAILED
        return True

    def _had_turn(self, frame_id: FrameId) -> bool:
        """Counts a keyframe that had its turn; returns whether it had depth before."""
        had_depth = self._done.get(frame_id) == DepthStatus.MADE
        self._num_times[frame_id] += 1
        self._again = tuple(i for i in self._again if i != frame_id)
        self._num_until_placing -= 1
        return had_depth

    # -- products -------------------------------------------------------------------------------

    async def _write_products(self) -> None:
        """Writes the products of the newest snapshot, unless they are written."""
        world = self._world
        may_write = not (self._stopped.is_set() or self._recorder.is_space_low)
        if world is None or not (self._is_product_old and may_write and self._held.num_keyframes):
            return
        self._has_new_world = self._is_product_old = False
        began_s = self._budget.spent_s
        points = await self._written(DENSE_PLY, functools.partial(self._write_points, world))
        if points is not None:
            self._product = replace(
                self._product, points=points.num_points, verdict=world.verdict.level.value
            )
            if self._ground is not None:
                write = functools.partial(self._write_ground, world, self._ground, points)
                if await self._written(GROUND, write) is None:
                    self._is_product_old = True
                else:
                    self._product = replace(self._product, epsg=self._ground.epsg)
                    self._show_ground(world)
        spent_s = self._budget.spent_s - began_s
        self._products_s += spent_s
        if points is None:
            self._is_product_old = True
            return
        self._product_cost_s = spent_s / max(self._held.num_keyframes, 1)
        self._emit(
            DenseMapWritten(
                path=str(self._recorder.path / DENSE_PLY),
                num_keyframes=points.num_keyframes,
                num_points=points.num_points,
                verdict=world.verdict.level.value,
                cpu_s=round(spent_s, 3),
            )
        )

    async def _written(self, name: str, write: Callable[[], Result]) -> Result | None:
        """Writes a product on the dense thread; None: it stays as it was, which is counted."""
        written = await self._attempt(
            self._on_thread(lambda: self._disk.call(write, times=_PRODUCT_TIMES)),
            consequence=f"{name} stays as it was",
        )
        if not isinstance(written, _Failure):
            await self._writer.schedule(functools.partial(self._recorder.product_written, name))
            return written
        if not isinstance(written.error, StoppedError):
            failed = functools.partial(self._recorder.product_failed, name, written.error)
            await self._writer.schedule(failed)
        return None

    def _write_points(self, world: DenseWorld) -> WrittenPoints:
        """On a thread: writes the points of a snapshot."""
        _be_nice()
        return write_points_of(
            self._map,
            self._run_path(),
            world,
            self._config,
            ground=self._ground,
            between=self._go_on_with_product,
        )

    def _write_ground(
        self, world: DenseWorld, ground: GroundProducts, points: WrittenPoints
    ) -> bool:
        """On a thread: writes the ground that the points of a snapshot gave."""
        _be_nice()
        write_ground(self._run_path(), world, ground, points.versions)
        return True

    def _depth_of_product(self, frame_id: FrameId) -> DepthMap | None:
        self._go_on_with_product()
        return self._map.depth_map(frame_id)

    def _go_on_with_product(self) -> None:
        """Is called between the steps of writing products.

        Raises:
            StoppedError: what is written is not wanted any more.
        """
        self._step()
        is_superseded = self._is_ending and not self._is_last_product
        if is_superseded or self._recorder.is_space_low:
            raise StoppedError("a newer one follows" if is_superseded else "too little disk space")

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

    # -- calls ----------------------------------------------------------------------------------

    async def _attempt(
        self, step: Awaitable[Result], *, consequence: str, frame_id: FrameId | None = None
    ) -> Result | _Failure:
        """Awaits a step; what it raises is reported, unless the recorder does that."""
        try:
            return await step
        except (JournalError, StoppedError) as error:
            logger.info("dense map: %s; %s", error, consequence)
            return _Failure(error=error)
        except Exception as error:  # the task boundary: the run goes on without this step
            self._faults.report(RunPart.DENSE, error, consequence=consequence, frame_id=frame_id)
            return _Failure(error=error)

    async def _on_thread(self, use: Callable[[], Result]) -> Result:
        """Awaits a call on the dense thread, and sees what the dense map holds after it."""

        def seen() -> Result:
            try:
                return use()
            finally:
                if not self._left_behind.is_set():
                    self._held = _Held(
                        frame_ids=frozenset(self._map.frame_ids), num_points=self._map.num_points
                    )

        return await run_in(self._thread, seen)

    def _wait_while_it_goes_on(self, result: Future[object], limit_s: float) -> bool:
        """Waits for a call for as long as it makes a step within the limit."""
        while True:
            num_steps = self._num_steps
            if self._wait(result, limit_s):
                return True
            if self._num_steps == num_steps:
                self._left_behind.set()
                return False

    def _run_path(self) -> Path:
        """Where the run folder is, for a step of what uses it.

        Raises:
            StoppedError: it must not be used any more.
        """
        self._step()
        return self._recorder.path

    def _step(self) -> None:
        self._num_steps += 1
        if self._stopped.is_set() or self._left_behind.is_set():
            raise StoppedError("it is stopped")


def _dense_cpu_s() -> float:
    by_stage = cpu_by_stage()
    return by_stage[Stage.DENSE_DEPTH] + by_stage[Stage.DENSE_FUSION]


def _be_nice() -> None:
    """Lets other threads of the machine go first, where the system knows priorities of threads."""
    if sys.platform != "linux":
        return  # elsewhere it would be the priority of the process
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
