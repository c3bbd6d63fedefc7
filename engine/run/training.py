"""The training folder beside mapping: ``train`` follows the snapshots of the run.

There is no queue: after each snapshot the newest one is taken when the thread is free, and those in
between are passed over and counted. What may hang on a disk is given up where nothing comes of it;
whatever still runs then, or once the run lets go of its folder, writes there no more.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import threading
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

from engine.config import SnapshotsConfig
from engine.errors import ConfigError, HangError, JournalError, PartOffError, SnapshotError
from engine.events import RunPart
from engine.output.recorder import Recorder
from engine.output.run_folder import TRAIN_LINK
from engine.output.training_folder import TrainingFigures, TrainingFolder
from engine.run.event_loop import run_in
from engine.run.faults import Faults, Guard, StoppedError, Wait, wait_for_call
from engine.run.queues import Writer

logger = logging.getLogger(__name__)

TRAIN = f"{TRAIN_LINK}/"  # for people
MAX_CALL_S = 30.0  # without a file: the end of a run waits for it
_NICENESS = 10  # of its threads, where the system has it for each


class TrainingFolderMaking:
    """Keeps ``train`` up to date with the newest snapshot, on a thread of its own.

    Args:
        config: whether it does, and what former versions may take.
        jpeg_quality: of images.
        thread: runs one call at a time.
        faults: takes what breaks.
        recorder: knows the folder, and counts what cannot be written; called through the writer.
        writer: runs writes in order.
        max_call_s: a file that takes longer hangs; 0: none does.
        wait: waits for calls that may hang.
    """

    def __init__(
        self,
        *,
        config: SnapshotsConfig,
        jpeg_quality: int,
        thread: Executor,
        faults: Faults,
        recorder: Recorder,
        writer: Writer,
        max_call_s: float = MAX_CALL_S,
        wait: Wait = wait_for_call,
    ) -> None:
        self._is_wanted = config.train
        self._keep_bytes = config.train_keep_mb * 1_000_000
        self._jpeg_quality = jpeg_quality
        self._thread = thread
        self._faults = faults
        self._recorder = recorder
        self._writer = writer
        self._wait = wait
        self._guard = Guard(
            RunPart.TRAINING, limit_s=max_call_s, max_hangs=1, wait=self._wait_while_it_goes_on
        )
        self._stopped = threading.Event()
        self._num_steps = 0  # signs that a call goes on
        self._news = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._is_ending = False
        self._num_snapshots = 0
        self._num_done = 0  # of these, by the newest version
        self._folder: TrainingFolder | None = None  # for the thread only
        self._figures: TrainingFigures | None = None  # of the newest version
        self._num_updates = 0
        self._num_failed = 0
        self._num_passed_over = 0  # snapshots
        self._has_failed = False  # the last update that could have been made
        self._num_written = 0

    # -- the run ----------------------------------------------------------------------------------

    async def snapshot_written(self) -> None:
        """A snapshot was written, or has failed: the folder may follow."""
        self._num_snapshots += 1
        self._news.set()

    def start(self) -> None:
        """Follows the snapshots from now on, until `finish`."""
        if self._is_wanted:
            self._working = asyncio.create_task(self._work(), name="training folder")

    def drop_what_waits(self) -> None:
        """Writes nothing more; what is at hand is broken off at its next file."""
        self._stopped.set()
        self._news.set()

    async def finish(self) -> None:
        """Follows the final snapshot."""
        if self._working is None:
            return
        self._is_ending = True
        self._news.set()
        await asyncio.wait((self._working,))
        await (await self._writer.schedule(_nothing))  # the final snapshot is on its way
        if self._num_done < self._num_snapshots or self._has_failed:
            await self._update()

    async def close(self) -> None:
        """Waits until nothing is written any more; before the run lets go of its folder."""
        self._stopped.set()
        idle = asyncio.ensure_future(run_in(self._thread, self._guard.close))
        await asyncio.wait((idle,), timeout=2 * MAX_CALL_S)
        if not idle.done():
            error = HangError(f"{RunPart.TRAINING.value} has not ended after {2 * MAX_CALL_S:g} s")
            self._faults.report(RunPart.TRAINING, error, consequence="the run ends without it")

    def figures(self) -> dict[str, Any]:
        """The figures of ``summary.json``."""
        newest = self._figures
        return {
            "enabled": self._is_wanted,
            "updates": self._num_updates,
            "snapshots_passed_over": self._num_passed_over,
            "failed": self._num_failed,
            "images": 0 if newest is None else newest.num_images,
            "images_written": self._num_written,
            "images_missing": 0 if newest is None else newest.num_missing,
            "generations": 0 if newest is None else newest.num_generations,
        }

    # -- updates ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._is_ending:
            await self._news.wait()
            self._news.clear()
            if self._num_done < self._num_snapshots and not self._is_ending:
                await self._update()

    async def _update(self) -> None:
        """Follows the newest snapshot; what it raises is reported and counted."""
        self._num_passed_over += max(self._num_snapshots - self._num_done - 1, 0)
        self._num_done = self._num_snapshots
        if self._stopped.is_set():
            self._num_passed_over += 1
            return
        try:
            if self._recorder.is_space_low:
                raise JournalError("it stays as it was: the disk is nearly full")
            update = functools.partial(self._guard.call, self._updated)
            figures = await run_in(self._thread, update)
        except (StoppedError, PartOffError) as error:
            self._num_passed_over += 1
            logger.debug("%s: %s", TRAIN, error)
        except (ConfigError, JournalError, SnapshotError) as error:
            await self._failed(error)
        except Exception as error:  # the task boundary: the run goes on without this update
            self._faults.report(RunPart.TRAINING, error, consequence=f"{TRAIN} stays as it was")
            await self._failed(error)
        else:
            await self._take(figures)

    async def _take(self, figures: TrainingFigures | None) -> None:
        if figures is None:  # too few images: what failed before is as it was
            self._num_passed_over += 1
            return
        self._has_failed = False
        self._figures = figures
        self._num_updates += 1
        self._num_written += figures.num_written
        written = functools.partial(self._recorder.product_written, TRAIN)
        await self._writer.schedule(written)

    async def _failed(self, error: Exception) -> None:
        self._num_failed += 1
        self._has_failed = True
        failed = functools.partial(self._recorder.product_failed, TRAIN, error)
        await self._writer.schedule(failed)

    def _updated(self) -> TrainingFigures | None:
        """On a thread that may be left behind: makes a version of the newest snapshot."""
        _be_nice()
        self._step()
        run_path = self._recorder.path
        if self._folder is None or self._folder.run_path != run_path:
            self._folder = TrainingFolder(
                run_path, jpeg_quality=self._jpeg_quality, keep_bytes=self._keep_bytes
            )
        try:
            snapshot = (run_path / "latest").resolve(strict=True)
        except OSError as error:
            raise SnapshotError(f"{run_path}: has no snapshot: {error.strerror}") from error
        return self._folder.update(snapshot, between=self._step)

    def _step(self) -> None:
        """Is called before each file.

        Raises:
            StoppedError: nothing is to be written any more.
        """
        self._num_steps += 1
        if self._stopped.is_set():
            raise StoppedError("it is stopped")
        if self._recorder.is_space_low:
            raise JournalError("it stays as it was: the disk is nearly full")

    def _wait_while_it_goes_on(self, result: Future[object], limit_s: float) -> bool:
        """Waits for a call for as long as it writes a file within the limit."""
        while True:
            num_steps = self._num_steps
            if self._wait(result, limit_s):
                return True
            if self._num_steps == num_steps:
                self._stopped.set()
                return False


def _nothing() -> None:
    """Is done when all that was scheduled before is."""


def _be_nice() -> None:
    """Lets other threads of the machine go first, where the system knows priorities of threads."""
    if sys.platform != "linux":
        return  # elsewhere it would be the priority of the process
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
