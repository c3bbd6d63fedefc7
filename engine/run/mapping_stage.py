"""Mapping as a stage of a run: tracked frames and keyframes in; journal, poses and views told."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from engine.errors import InferenceError
from engine.mapping.mapper import MappingPipeline
from engine.output.recorder import Recorder
from engine.run.background import MapUpkeep
from engine.run.event_loop import Writer, run_in
from engine.run.event_queue import EventQueue
from engine.run.ingestion import FrameQueue
from engine.run.mapping_items import MappingItem, MappingItems
from engine.run.views import ViewDispatcher
from engine.types import Frame, FrameId, Keyframe


class MappingStage:
    """Brings what tracking made of the frames into the map, in order.

    While a live keyframe is matched, frames after it get their poses from the keyframe before.

    Args:
        pipeline: owns the map; called on the mapping thread.
        mapping_thread: runs one call at a time.
        matching_thread: matches keyframes, beside the mapping thread.
        items: where frames come from.
        frames: gets the memory of frames back.
        upkeep: adjusts the map and writes snapshots when they are due.
        recorder: writes; called through the writer.
        writer: runs writes in order.
        views: are shown frames and the map.
        events: takes facts.
        tell: passes facts on.
    """

    def __init__(
        self,
        pipeline: MappingPipeline,
        *,
        mapping_thread: Executor,
        matching_thread: Executor,
        items: MappingItems,
        frames: FrameQueue,
        upkeep: MapUpkeep,
        recorder: Recorder,
        writer: Writer,
        views: ViewDispatcher,
        events: EventQueue,
        tell: Callable[[], Awaitable[None]],
    ) -> None:
        self._pipeline = pipeline
        self._mapping_thread = mapping_thread
        self._matching_thread = matching_thread
        self._items = items
        self._frames = frames
        self._upkeep = upkeep
        self._recorder = recorder
        self._writer = writer
        self._views = views
        self._events = events
        self._tell = tell

    async def run(self) -> None:
        """Maps all items."""
        while (item := await self._items.get()) is not None:
            if item.keyframe is None:
                await self._pose(item)
            else:
                with self._items.mapping_keyframe():
                    await self._upkeep.merge_adjustment_if_due(wait=not item.is_live)
                    await self._upkeep.merge_window_if_due(wait=not item.is_live)
                    await self._map(item, item.keyframe.keyframe)
            await self._show(item.frame, with_map=True)
            await self._tell()

    async def _pose(self, item: MappingItem) -> None:
        """Poses a frame, and settles one that does not become a keyframe."""
        if item.tracked is not None:
            await run_in(
                self._mapping_thread, self._pipeline.add_tracked, item.tracked, item.fallback
            )
        if item.is_settled:
            await self._writer.schedule(
                functools.partial(self._recorder.frame_tracked, item.frame.frame_id),
                then=functools.partial(self._frames.give_back, item.frame),
            )

    async def _map(self, item: MappingItem, keyframe: Keyframe) -> None:
        started_s = time.monotonic()
        await run_in(self._mapping_thread, self._pipeline.meet_keyframe, keyframe)
        matching = asyncio.create_task(
            run_in(self._matching_thread, self._pipeline.match_keyframe, keyframe.frame_id),
            name="matching",
        )
        while item.is_live and (later := await self._items.get_tracked_until(matching)):
            await self._pose(later)
            # The scene graph changes while pairs are matched: no map is to be shown now.
            await self._show(later.frame, with_map=False)
            await self._tell()
        try:
            verified = await matching
        except InferenceError as error:
            self._events.warn(f"{keyframe.name}: {error}")
            await run_in(self._mapping_thread, self._pipeline.map_unmatched, keyframe.frame_id)
        else:
            await run_in(
                self._mapping_thread,
                self._pipeline.map_keyframe,
                keyframe.frame_id,
                verified,
                started_s=started_s,
            )
        await self._keep(item.frame, keyframe.frame_id)

    async def _keep(self, frame: Frame, frame_id: FrameId) -> None:
        """Journals a keyframe, and does what is due after one."""
        record = await run_in(self._mapping_thread, self._pipeline.keyframe_record, frame_id)
        await self._writer.schedule(
            functools.partial(
                self._recorder.keyframe_added,
                frame,
                record.keyframe,
                camera=record.camera,
                pairs=record.pairs,
                moved=record.moved,
            ),
            then=functools.partial(self._frames.give_back, frame),
        )
        await self._upkeep.start_adjustment_if_due()
        await self._upkeep.start_window_if_due()
        await self._upkeep.snapshot_if_due()

    async def _show(self, frame: Frame, *, with_map: bool) -> None:
        poses = self._pipeline.take_new_poses()
        if poses:
            await self._writer.schedule(functools.partial(self._recorder.live_poses, poses))
        own = next((pose for pose in poses if pose.frame_id == frame.frame_id), None)
        self._views.offer_frame(frame, own)
        if with_map and self._pipeline.is_initialized and self._views.wants_map():
            self._views.offer_map(await run_in(self._mapping_thread, self._pipeline.view))
