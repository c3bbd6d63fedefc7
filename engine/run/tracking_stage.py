"""Tracking as a stage of a run: frames in, what was made of each out to mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from engine.config import FrameTrackingConfig
from engine.errors import InferenceError
from engine.ports import FrameSource
from engine.run.event_loop import run_in
from engine.run.ingestion import Arrival, FrameQueue, Ingestion
from engine.run.mapping_items import MappingItem, MappingItems
from engine.tracking.frame_tracker import FrameTracker
from engine.types import DropReason, Features, Frame


class TrackingStage:
    """Follows the frames of each camera, and makes keyframes of them.

    Args:
        config: thresholds of tracking.
        sources: where frames come from.
        describe: makes the keypoint table of a keyframe.
        thread: runs one call at a time.
        frames: where frames wait.
        items: where what was made of them goes.
        ingestion: counts frames that cannot be described.
        warn: tells that something is degraded.
    """

    def __init__(
        self,
        config: FrameTrackingConfig,
        *,
        sources: Sequence[FrameSource],
        describe: Callable[[Frame], Features],
        thread: Executor,
        frames: FrameQueue,
        items: MappingItems,
        ingestion: Ingestion,
        warn: Callable[[str], None],
    ) -> None:
        self._config = config
        self._sources = sources
        self._describe = describe
        self._thread = thread
        self._frames = frames
        self._items = items
        self._ingestion = ingestion
        self._warn = warn
        self._trackers: dict[tuple[int, str], FrameTracker] = {}

    async def run(self) -> None:
        """Tracks all frames."""
        is_live = any(source.info.is_live for source in self._sources)
        while True:
            if is_live:
                await self._items.wait_until_keyframe_taken()
            arrival = await self._frames.get()
            if arrival is None:
                return
            try:
                await self._track(arrival)
            except InferenceError as error:
                await self._frames.give_back(arrival.frame)
                await self._ingestion.drop(
                    arrival.frame, reason=DropReason.FAILED, detail=str(error)
                )

    async def _track(self, arrival: Arrival) -> None:
        """Follows a frame and passes that on at once; then makes it a keyframe if one is due.

        Raises:
            InferenceError: it can only be a keyframe, and cannot be described.
        """
        tracker = self._tracker(arrival)
        is_ahead = arrival.is_live and self._items.is_behind
        followed = await run_in(
            self._thread, tracker.follow, arrival.frame, wants_fallback=is_ahead
        )
        due = None if is_ahead and followed.can_wait else followed.due
        item = MappingItem(
            frame=arrival.frame,
            tracked=followed.tracked,
            fallback=followed.fallback,
            keyframe=None,
            is_settled=due is None,
            is_live=arrival.is_live,
        )
        if followed.tracked is not None:
            await self._items.put(item)
        if due is None:
            return
        try:
            keyframe = await run_in(self._thread, tracker.make_keyframe, arrival.frame, due)
        except InferenceError as error:
            if followed.tracked is None:
                raise
            keyframe = None  # it has its pose already
            self._warn(f"{arrival.frame.name} does not become a keyframe: {error}")
        await self._items.put(
            replace(item, tracked=None, fallback=None, keyframe=keyframe, is_settled=True)
        )

    def _tracker(self, arrival: Arrival) -> FrameTracker:
        if arrival.lane not in self._trackers:
            self._trackers[arrival.lane] = FrameTracker(
                self._config,
                describe=self._describe,
                is_sequence=self._sources[arrival.source_idx].info.is_sequence,
            )
        return self._trackers[arrival.lane]
