"""Moments of a run: what changed since the journal was written last, gathered and kept in order."""

from __future__ import annotations

import errno
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import pycolmap

from engine.errors import JournalError
from engine.mapping.steps import KeyframeRecord, MappingStep
from engine.mapping.stored_state import Fact, StoredFrame, StoredRelativePose
from engine.output.disk import Trouble, trouble_of
from engine.output.journal import Moment, NewKeyframe
from engine.types import Frame, FrameId, GpsReading, RejectedFrame

logger = logging.getLogger(__name__)

MAX_LOCKED_S = 600.0  # for which a program that holds the database is waited for

_MAX_GATHERED = 256  # frames, readings, poses and states that wait for the next keyframe
_RETRY_S = 0.5
# Of a file whose name the disk does not take, or that has another thing's name.
_NEVER = {
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.EEXIST,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ELOOP,
}
_MAX_UNWRITTEN = 64  # moments that wait for room on the disk, or for another program
_MAX_UNWRITTEN_BYTES = 256_000_000  # of their keyframes


class MomentQueue:
    """Gathers what changes in a run, and writes it to the journal with each keyframe.

    A moment that cannot be written for now, since the disk is full or another program holds the
    database, is tried again with the next one. When many wait for another program, whoever adds one
    waits, too, for ten minutes at most. When many wait for room, or still for that program, the
    oldest keyframes are lost: they, and pairs with them, are missing from the journal, and the run
    says so. What else changed is written all the same.

    Args:
        write: writes a moment whole or not at all; raises JournalError.
        failed: is called with each error.
        beat: is called twice a second while another program is waited for.
    """

    def __init__(
        self,
        write: Callable[[Moment], None],
        *,
        failed: Callable[[JournalError], None],
        beat: Callable[[], None],
    ) -> None:
        self._write = write
        self._failed = failed
        self._beat = beat
        self._arrived: dict[FrameId, StoredFrame] = {}  # frames whose turn did not come yet
        self._frames: list[StoredFrame] = []
        self._readings: list[GpsReading] = []
        self._poses: list[StoredRelativePose] = []
        self._facts: dict[str, Fact] = {}  # the latest of each name
        self._unwritten: deque[Moment] = deque()  # the oldest first
        self._is_locked = False  # another program holds the database
        self._waited_since_s: float | None = None  # for it to let go; None: it has
        self.num_lost = 0  # keyframes, and moments beside them, that the journal does not have

    @property
    def num_unwritten(self) -> int:
        """Moments that wait to be written."""
        return len(self._unwritten)

    def add_frame(self, frame: Frame | RejectedFrame, *, status: str | None = None) -> None:
        """Adds a frame that arrived; one that was rejected has its status already."""
        stored = _stored(frame, status=status)
        if stored.frame_id is not None:
            self._arrived[stored.frame_id] = stored
        self._frames.append(stored)
        self._flush_many()

    def settle_frame(self, frame_id: FrameId, *, status: str) -> None:
        """Sets the status of a frame that arrived."""
        if (arrived := self._arrived.pop(frame_id, None)) is not None:
            self._frames.append(replace(arrived, status=status))
            self._flush_many()

    def add_reading(self, reading: GpsReading) -> None:
        """Adds a position that came beside the frames."""
        self._readings.append(reading)
        self._flush_many()

    def add_step(self, step: MappingStep, *, keyframe: NewKeyframe | None = None) -> None:
        """Adds what a step of the mapper changed.

        Poses between keyframes and small states alone wait for the next keyframe.

        Args:
            step: of the mapper.
            keyframe: that of its record; None where it has none, or its image cannot be written.
        """
        self._poses += step.relative_poses
        self._facts.update(step.facts)
        changed = Moment() if step.record is None else _moment_of(step.record, keyframe)
        self.write(
            replace(
                changed,
                pairs=(*changed.pairs, *step.changed_pairs),
                tried=step.tried,
                recalibrated=step.recalibrated,
                calibrations=step.calibrations,
            )
        )

    def add_cameras(self, cameras: Iterable[pycolmap.Camera]) -> None:
        """Adds the present parameters of cameras."""
        self.write(Moment(cameras=tuple(cameras)))

    def write(self, moment: Moment) -> None:
        """Writes a moment after those that wait, with what was gathered; an empty one waits."""
        if moment.is_empty:
            self._flush_many()
        else:
            self._write_with_gathered(moment)

    def flush(self, *, wait_s: float = 0.0) -> None:
        """Writes all that waits, as far as that is possible now.

        Args:
            wait_s: for how long to wait for another program that holds the database. Blocks.
        """
        self._write_with_gathered(Moment())
        until_s = time.monotonic() + wait_s
        while self._is_locked and time.monotonic() < until_s:
            self._try_again()

    def _flush_many(self) -> None:
        num_frames = len(self._frames) + len(self._readings)
        if num_frames + len(self._poses) + len(self._facts) > _MAX_GATHERED:
            self.flush()

    def _write_with_gathered(self, moment: Moment) -> None:
        frames, self._frames = tuple(self._frames), []
        readings, self._readings = tuple(self._readings), []
        poses, self._poses = tuple(self._poses), []
        facts, self._facts = self._facts, {}
        moment = replace(
            moment, frames=frames, gps_readings=readings, relative_poses=poses, facts=facts
        )
        if not moment.is_empty:
            self._unwritten.append(moment)
        self._write_waiting()
        self._wait_for_other_program()
        while self._are_too_many():
            self._lose_oldest_keyframe()

    def _are_too_many(self) -> bool:
        num_bytes = sum(_num_bytes(moment) for moment in self._unwritten)
        is_too_much = len(self._unwritten) > 1 and num_bytes > _MAX_UNWRITTEN_BYTES
        return len(self._unwritten) > _MAX_UNWRITTEN or is_too_much

    def _wait_for_other_program(self) -> None:
        """Waits while too many wait for another program; but once only, until it lets go."""
        if not self._is_locked:
            self._waited_since_s = None
        while self._is_locked and self._are_too_many():
            now_s = time.monotonic()
            if self._waited_since_s is None:
                self._waited_since_s = now_s
            if now_s - self._waited_since_s >= MAX_LOCKED_S:
                return
            self._try_again()
            if self._is_locked and time.monotonic() - self._waited_since_s >= MAX_LOCKED_S:
                self._failed(
                    JournalError(
                        f"another program has held database.db for {MAX_LOCKED_S:g} s: the oldest"
                        " keyframes that wait are lost to it"
                    )
                )

    def _try_again(self) -> None:
        """Writes what waits after a moment, in which the run still shows that it is alive."""
        time.sleep(_RETRY_S)
        self._beat()
        self._write_waiting()

    def _write_waiting(self) -> None:
        self._is_locked = False
        while self._unwritten:
            # Taken out first: one that breaks must not keep those behind it from their turn.
            rest = self._write_or_lose(self._unwritten.popleft())
            if rest is not None:
                self._unwritten.appendleft(rest)
                return

    def _write_or_lose(self, moment: Moment) -> Moment | None:
        """Writes a moment, and gives up what never can be; returns what may be written later."""
        try:
            self._write(moment)
        except JournalError as error:
            self._failed(error)
            self._is_locked = trouble_of(error) is Trouble.LOCKED
            if _may_pass(error):
                return moment
            if moment.keyframe is not None:
                return self._write_or_lose(self._without_keyframe(moment))
            self.num_lost += 1
        return None

    def _lose_oldest_keyframe(self) -> None:
        """Gives up the keyframe of the oldest moment; what else it has goes into the next one."""
        oldest, following = self._unwritten.popleft(), self._unwritten.popleft()
        self._unwritten.appendleft(_joined(self._without_keyframe(oldest), following))

    def _without_keyframe(self, moment: Moment) -> Moment:
        """A moment without its keyframe, which is lost, and its pairs."""
        if moment.keyframe is None:
            return moment
        keyframe = moment.keyframe.keyframe
        self.num_lost += 1
        logger.error("%s is lost to the journal", keyframe.name)
        pairs = tuple(
            one
            for one in moment.pairs
            if keyframe.frame_id not in (one.pair.first, one.pair.second)
        )
        return replace(moment, keyframe=None, pairs=pairs)


def _moment_of(record: KeyframeRecord, keyframe: NewKeyframe | None) -> Moment:
    pairs = (*record.changed_pairs, *record.pairs)
    return Moment(keyframe=keyframe, moved=record.moved, pairs=pairs)


def _num_bytes(moment: Moment) -> int:
    """The memory of a moment's keyframe, which has nearly all of it."""
    new = moment.keyframe
    if new is None:
        return 0
    return (
        len(new.image_bytes) + len(new.mask_bytes or b"") + new.keyframe.features.descriptors.nbytes
    )


def _joined(former: Moment, latter: Moment) -> Moment:
    """What two moments changed, of which the former has no keyframe; of each thing the latest."""
    return Moment(
        keyframe=latter.keyframe,
        moved=tuple({one.frame_id: one for one in (*former.moved, *latter.moved)}.values()),
        pairs=tuple({one.pair: one for one in (*former.pairs, *latter.pairs)}.values()),
        tried=(*former.tried, *latter.tried),
        recalibrated={**former.recalibrated, **latter.recalibrated},
        cameras=tuple({one.camera_id: one for one in (*former.cameras, *latter.cameras)}.values()),
        calibrations={**former.calibrations, **latter.calibrations},
        relative_poses=(*former.relative_poses, *latter.relative_poses),
        frames=(*former.frames, *latter.frames),
        gps_readings=(*former.gps_readings, *latter.gps_readings),
        facts={**former.facts, **latter.facts},
    )


def _stored(frame: Frame | RejectedFrame, *, status: str | None) -> StoredFrame:
    frame_id, camera_key = (
        (frame.frame_id, frame.camera_key) if isinstance(frame, Frame) else (None, None)
    )
    return StoredFrame(
        frame_id=frame_id,
        camera_key=camera_key,
        source=frame.source,
        index=frame.index,
        name=frame.name,
        captured_at_s=frame.captured_at_s,
        status=status,
    )


def _may_pass(error: JournalError) -> bool:
    """Whether a write may succeed later: the disk is full, or another program holds the file."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno not in _NEVER
    return isinstance(cause, sqlite3.OperationalError)
