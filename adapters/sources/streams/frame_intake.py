"""Counts, dates and hands on the frames of a stream, whichever way they come."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.live.capture_clock import CaptureClock
from engine.ports import ArrivalSink
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    RejectedFrame,
    SourceNotice,
    SourceState,
)

if TYPE_CHECKING:
    from av import VideoFrame

_MIN_STEP_S = 1e-3  # of capture times across two connections
_MAX_DETAIL_CHARS = 120


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UndecodedFrame:
    """A received frame before it becomes pixels."""

    index: int  # of all that the source received
    captured_at_s: float
    received_at_s: float  # monotonic
    content: VideoFrame | bytes  # bytes: an image file


DecodeFrame = Callable[[UndecodedFrame], Frame | RejectedFrame]


class FrameIntake:
    """The frames of all connections of a stream, one after the other. It belongs to one thread."""

    def __init__(
        self, label: str, *, every_nth_frame: int, decode: DecodeFrame, sink: ArrivalSink
    ) -> None:
        """Begins before the first frame.

        Args:
            label: of the source.
            every_nth_frame: of the frames received, one of n goes on.
            decode: makes RGB of a received frame; called on whichever thread decodes arrivals.
            sink: takes arrivals, frames that cannot be decoded, and notices.
        """
        self._label = label
        self._every_nth_frame = every_nth_frame
        self._decode = decode
        self._sink = sink
        self._clock = CaptureClock()
        self._last_captured_at_s = 0.0
        self._last_loss = ""
        self.num_received = 0

    def connected(self, detail: str) -> None:
        """Reports that frames can come from now on, with times of their own."""
        self._clock = CaptureClock()
        self._last_loss = ""
        self._report(SourceState.CONNECTED, detail)

    def lost(self, detail: str) -> None:
        """Reports that the connection broke; not the same at every try."""
        if detail != self._last_loss:
            self._report(SourceState.LOST, detail)
            self._last_loss = detail

    def over(self, state: SourceState, detail: str) -> None:
        """Reports that no connection follows."""
        self._report(state, detail)

    @property
    def has_news(self) -> bool:
        """Whether frames came or a loss was reported."""
        return bool(self._last_loss or self.num_received)

    def put(self, content: VideoFrame | bytes, *, num_bytes: int, stream_s: float | None) -> None:
        """Hands a frame on.

        Args:
            content: a decoded frame, or an image file.
            num_bytes: of memory.
            stream_s: on the stream's own clock; None: unknown.
        """
        captured_at_s = self._clock.tick(stream_s, arrived_at_s=time.time())
        captured_at_s = max(captured_at_s, self._last_captured_at_s + _MIN_STEP_S)
        self._last_captured_at_s = captured_at_s
        index = self._next_index()
        if index % self._every_nth_frame:
            return
        undecoded = UndecodedFrame(
            index=index,
            captured_at_s=captured_at_s,
            received_at_s=time.monotonic(),
            content=content,
        )
        self._sink(
            Arrival(
                source=self._label,
                index=index,
                name=frame_name(index),
                captured_at_s=captured_at_s,
                num_bytes=num_bytes,
                decode=functools.partial(self._decode, undecoded),
            )
        )

    def reject(self, reason: DropReason, detail: str) -> None:
        """Counts a frame that cannot be used."""
        self._sink(
            rejected_frame(
                self._label,
                index=self._next_index(),
                captured_at_s=self._last_captured_at_s or time.time(),
                reason=reason,
                detail=detail,
            )
        )

    def _next_index(self) -> int:
        self.num_received += 1
        return self.num_received - 1

    def _report(self, state: SourceState, detail: str) -> None:
        self._sink(SourceNotice(source=self._label, state=state, detail=detail))


def rejected_frame(
    source: str, *, index: int, captured_at_s: float, reason: DropReason, detail: str
) -> RejectedFrame:
    """A frame of a stream that does not go on, under the name it would have had."""
    return RejectedFrame(
        source=source,
        index=index,
        name=frame_name(index),
        captured_at_s=captured_at_s,
        reason=reason,
        detail=detail[:_MAX_DETAIL_CHARS],
    )


def frame_name(index: int) -> str:
    """The name of a frame of a stream."""
    return f"{index:06d}.jpg"
