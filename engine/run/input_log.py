"""What a run received and when it acted on it: kept for a replay, and followed in one.

The map of a live run depends on more than its frames: on which of them were dropped, which became
keyframes while mapping was behind, what was posed while a keyframe was matched, and before which
keyframe an adjustment or a window was merged. All of that passes here, so that a run that repeats
another one does the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Sequence

from engine.errors import JournalError
from engine.events import ALSO_AN_EVENT
from engine.ports import InputRecording, RepeatsRun, Source
from engine.run.queues import Writer
from engine.types import (
    Frame,
    FrameId,
    GpsReading,
    MappingDecision,
    RejectedFrame,
    SourceNotice,
    TrackingDecision,
)

logger = logging.getLogger(__name__)


class InputLog:
    """Records input and decisions, where that is wanted, and gives those of a run to be repeated.

    For the event loop only. What cannot be written ends the recording, not the run.

    Args:
        sources: of the run.
        recording: where they are kept; None: nowhere.
        writer: runs writes in order.
        warn: emits that something is degraded.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        recording: InputRecording | None,
        writer: Writer,
        warn: Callable[[str], None],
    ) -> None:
        self._recording = recording
        self._is_broken = False  # for the I/O thread only
        self._writer = writer
        self._warn = warn
        repeated = [source for source in sources if isinstance(source, RepeatsRun)]
        self._is_replay = bool(repeated)
        self._has_left = False  # the ways of the run to be repeated
        self._tracked: dict[FrameId, TrackingDecision] = {}
        self._mapped: dict[FrameId, MappingDecision] = {}
        for decision in repeated[0].decisions() if repeated else ():
            if isinstance(decision, TrackingDecision):
                self._tracked[decision.frame_id] = decision
            else:
                self._mapped[decision.frame_id] = decision

    @property
    def is_recording(self) -> bool:
        """Whether what arrives is kept."""
        return self._recording is not None

    async def frame(self, frame: Frame, *, source_idx: int) -> None:
        """Records a frame that was decoded, under the names of its source."""
        if self._recording is not None:
            await self._write(
                functools.partial(self._recording.add_frame, frame, source_idx=source_idx)
            )

    async def report(
        self, report: RejectedFrame | GpsReading | SourceNotice, *, source_idx: int
    ) -> None:
        """Records what came beside the frames, under the names of its source."""
        if self._recording is not None:
            await self._write(
                functools.partial(self._recording.add_report, report, source_idx=source_idx)
            )

    async def tracked(self, measured: TrackingDecision) -> TrackingDecision:
        """How far mapping is while a frame is tracked, or was in the run to be repeated."""
        decision = measured
        if self._is_replay:
            unknown = TrackingDecision(frame_id=measured.frame_id, is_behind=False)
            decision = self._tracked.get(measured.frame_id, unknown)
        await self._record(decision)
        return decision

    def decided_posing(self, keyframe_id: FrameId) -> MappingDecision | None:
        """How many frames the run to be repeated posed beside a keyframe; None: there is none."""
        unknown = MappingDecision(frame_id=keyframe_id, merged=(), num_readings=0, num_posed=0)
        return self._mapped.get(keyframe_id, unknown) if self._is_replay else None

    def decided(self, keyframe_id: FrameId, *, due: Collection[str] = ()) -> MappingDecision | None:
        """What mapping did with a keyframe in the run to be repeated; None: it is not known.

        Args:
            keyframe_id: the keyframe.
            due: kinds of the jobs that could be merged now.
        """
        decided = self._mapped.get(keyframe_id)
        if self._is_replay and (decided is None or not set(decided.merged) <= set(due)):
            self._warn_of_other_way(keyframe_id)
        return decided

    def _warn_of_other_way(self, keyframe_id: FrameId) -> None:
        if self._has_left:
            return
        self._has_left = True
        words = f"the run differs from the recorded one from frame {keyframe_id} on"
        logger.warning("%s", words, extra=ALSO_AN_EVENT)
        self._warn(words)

    async def mapped(self, decision: MappingDecision) -> None:
        """Records what mapping did with a keyframe."""
        await self._record(decision)

    async def close(self) -> None:
        """Closes the recording once all of it is written."""
        if self._recording is not None:
            await self._writer.schedule(functools.partial(self._close, self._recording))

    async def _record(self, decision: TrackingDecision | MappingDecision) -> None:
        if self._recording is not None:
            await self._write(functools.partial(self._recording.add_decision, decision))

    async def _write(self, write: Callable[[], None]) -> None:
        await self._writer.schedule(functools.partial(self._guarded, write))

    def _guarded(self, write: Callable[[], None]) -> None:
        """Writes, unless something before could not be written. On the I/O thread."""
        if self._is_broken:
            return
        try:
            write()
        except JournalError as error:
            self._is_broken = True
            words = f"the input is recorded no further: {error}"
            logger.error("%s", words, extra=ALSO_AN_EVENT)
            self._warn(words)

    def _close(self, recording: InputRecording) -> None:
        self._guarded(recording.flush)
        recording.close()
