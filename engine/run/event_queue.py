"""Facts from all threads, in order, until one thread takes them."""

from __future__ import annotations

import time
from collections import deque

from engine.events import Event, FrameDropped, Warned
from engine.types import DropReason, Frame, RejectedFrame


class EventQueue:
    """An ``EventSink`` with the clock that events are told by. Appending to a deque is atomic."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._events: deque[Event] = deque()

    def clock(self) -> float:
        """Seconds since the start of the run, monotonic."""
        return time.monotonic() - self._started_s

    def __call__(self, event: Event) -> None:
        """Takes one fact."""
        self._events.append(event)

    def warn(self, message: str) -> None:
        """Tells that something is degraded."""
        self(Warned(at_s=self.clock(), message=message))

    def frame_dropped(
        self, frame: Frame | RejectedFrame, *, reason: DropReason, detail: str
    ) -> None:
        """Tells that a frame was not used."""
        self(
            FrameDropped(
                at_s=self.clock(),
                frame_id=frame.frame_id if isinstance(frame, Frame) else None,
                source=frame.source,
                index=frame.index,
                name=frame.name,
                captured_at_s=frame.captured_at_s,
                reason=reason,
                detail=detail,
            )
        )

    def take(self) -> list[Event]:
        """All facts that came since the last call, in order."""
        return [self._events.popleft() for _ in range(len(self._events))]
