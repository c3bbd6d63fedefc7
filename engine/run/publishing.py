"""What leaves a run while it goes on: events, poses and maps, to the run folder and the views."""

from __future__ import annotations

import functools

from engine.events import Event, FramePosed
from engine.mapping.steps import MappingStep
from engine.output.recorder import Recorder
from engine.output.statistics import RunStatistics
from engine.run.queues import EventQueue, Writer
from engine.run.views import ViewDispatcher
from engine.types import Frame, FramePose


class Publisher:
    """Publishes what happened to the run folder, the views and the statistics.

    Args:
        events: holds what was emitted.
        statistics: counts it.
        views: show it.
        recorder: writes it; called through the writer.
        writer: runs writes in order.
    """

    def __init__(
        self,
        *,
        events: EventQueue,
        statistics: RunStatistics,
        views: ViewDispatcher,
        recorder: Recorder,
        writer: Writer,
    ) -> None:
        self._events = events
        self._statistics = statistics
        self._views = views
        self._recorder = recorder
        self._writer = writer

    @property
    def wants_view(self) -> bool:
        """Whether a map published at this moment would be shown."""
        return self._views.wants_map()

    async def publish_step(self, step: MappingStep, frame: Frame | None = None) -> None:
        """Publishes new poses, the current frame, and the size of the map or the map itself."""
        if step.record is None and step.has_changes:  # else its keyframe was written with it
            await self._writer.schedule(functools.partial(self._recorder.step_taken, step))
        if step.new_poses:
            await self._writer.schedule(
                functools.partial(self._recorder.live_poses, step.new_poses)
            )
        if frame is not None:
            # Poses in maps apart are in worlds of their own, which views do not show.
            in_main_map = (one for one in step.new_poses if one.map_number == 0)
            own = next((one for one in in_main_map if one.frame_id == frame.frame_id), None)
            self._views.offer_frame(frame, own)
        self._views.offer_counts(step.counts)
        if step.view is not None:
            self._views.offer_map(step.view)
        await self.publish_events()

    async def publish_pose(self, pose: FramePose, event: FramePosed, frame: Frame) -> None:
        """Publishes the pose of a frame that the mapper has not seen yet."""
        self._events(event)
        self._views.offer_frame(frame, pose if pose.map_number == 0 else None)
        await self.publish_events()

    async def publish_events(self) -> None:
        """Publishes the events that were emitted since the last time."""
        events = self.take_events()
        if events:
            await self._writer.schedule(functools.partial(self._recorder.events, events))

    def take_events(self) -> list[Event]:
        """Counts and shows the events that were emitted, and returns them to be written."""
        events = self._events.take()
        for event in events:
            self._statistics(event)
            self._views.offer_event(event)
        return events
