"""Messages on their way from the broker to the decoder: the newest of each camera, all counted."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, replace

from adapters.mqtt.payloads import Properties
from adapters.mqtt.topics import Levels, printable
from engine.types import DropReason, GpsReading, RejectedFrame, SourceNotice

_MAX_TOLD_HZ = 200.0  # refused messages told one by one; what a storm has more is told in sums
_MAX_WAITING_REFUSED = 1_000
_MAX_WAITING_READINGS = 1_000
_MAX_WAITING_NOTICES = 100
_MAX_TOPIC_CHARS = 80

Told = RejectedFrame | GpsReading | SourceNotice  # goes on to the engine as it is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrived:
    """A message that seems to hold an image."""

    index: int  # of all messages for frames, 0-based
    topic: str
    camera: Levels
    payload: bytes
    properties: Properties
    arrived_at_s: float  # Unix time
    received_at_s: float  # monotonic


class Inbox:
    """Holds what came until it is taken. For the event loop only.

    A newer image of a camera replaces the one that waits. Refused messages wait as metadata, and
    when they come faster than anybody could read, the next one that is told carries the number of
    those that were not. So memory is bounded whatever comes.
    """

    def __init__(self, *, source: str, max_cameras: int) -> None:
        """Makes an empty inbox.

        Args:
            source: the source's label.
            max_cameras: images of more cameras than this do not wait at the same time.
        """
        self._source = source
        self._max_cameras = max_cameras
        self._newest: dict[Levels, Arrived] = {}  # in the order in which cameras get their turn
        self._notices: deque[SourceNotice] = deque(maxlen=_MAX_WAITING_NOTICES)
        self._readings: deque[GpsReading] = deque(maxlen=_MAX_WAITING_READINGS)
        self._refused: deque[RejectedFrame] = deque()
        self._num_untold: dict[DropReason, int] = {}
        self._last_untold: dict[DropReason, RejectedFrame] = {}
        self._allowance = _Allowance(rate_hz=_MAX_TOLD_HZ, burst=_MAX_WAITING_REFUSED)
        self._has_ended = False
        self._is_image_next = True
        self._changed = asyncio.Event()

    def put_image(self, arrived: Arrived) -> None:
        """Takes an image, in the place of an older one of its camera."""
        older = self._newest.get(arrived.camera)
        if older is None and len(self._newest) >= self._max_cameras:
            self.refuse(arrived, reason=DropReason.OVERLOAD, detail="too many cameras at once")
            return
        self._newest[arrived.camera] = arrived
        if older is not None:
            self.refuse(older, reason=DropReason.OVERLOAD, detail="a newer image came before it")
        self._changed.set()

    def put_reading(self, reading: GpsReading) -> None:
        """Takes a position; when too many wait, the oldest goes."""
        self._readings.append(reading)
        self._changed.set()

    def put_notice(self, notice: SourceNotice) -> None:
        """Takes news of the connection."""
        self._notices.append(notice)
        self._changed.set()

    def refuse(self, arrived: Arrived, *, reason: DropReason, detail: str) -> None:
        """Counts a message that becomes no frame; its payload is not kept."""
        rejected = self._rejected(arrived, reason=reason, detail=detail)
        if len(self._refused) < _MAX_WAITING_REFUSED and self._allowance.take():
            self._refused.append(self._with_untold(rejected))
        else:
            self._num_untold[reason] = self._num_untold.get(reason, 0) + 1
            self._last_untold[reason] = rejected
        self._changed.set()

    def end(self) -> None:
        """Says that nothing will come any more."""
        self._has_ended = True
        self._changed.set()

    async def next(self) -> Arrived | Told | None:
        """Waits for what is to be looked at next; None after the last.

        News and positions go first; images and refused messages take turns.
        """
        while (item := self._take()) is None and not self._has_ended:
            self._changed.clear()
            await self._changed.wait()
        return item or self._take_untold()

    def _take(self) -> Arrived | Told | None:
        for waiting in (self._notices, self._readings):
            if waiting:
                return waiting.popleft()
        if self._newest and (self._is_image_next or not self._refused):
            self._is_image_next = False
            return self._newest.pop(next(iter(self._newest)))
        self._is_image_next = True
        if self._refused:
            return self._refused.popleft()
        return self._take_untold() if self._num_untold and self._allowance.take() else None

    def _rejected(self, arrived: Arrived, *, reason: DropReason, detail: str) -> RejectedFrame:
        return RejectedFrame(
            source=self._source,
            index=arrived.index,
            name=frame_name(arrived.index),
            captured_at_s=arrived.arrived_at_s,
            reason=reason,
            detail=f"{printable(arrived.topic, max_chars=_MAX_TOPIC_CHARS)}: {detail}",
        )

    def _with_untold(self, rejected: RejectedFrame) -> RejectedFrame:
        num = self._num_untold.pop(rejected.reason, 0)
        self._last_untold.pop(rejected.reason, None)
        return _summed(rejected, num) if num else rejected

    def _take_untold(self) -> RejectedFrame | None:
        for reason, rejected in list(self._last_untold.items()):
            del self._last_untold[reason]
            return _summed(rejected, self._num_untold.pop(reason) - 1)
        return None


class _Allowance:
    """So many a second, and a burst of more after a quiet time."""

    def __init__(self, *, rate_hz: float, burst: int) -> None:
        self._rate_hz = rate_hz
        self._burst = burst
        self._left = float(burst)
        self._at_s = time.monotonic()

    def take(self) -> bool:
        now_s = time.monotonic()
        self._left = min(self._burst, self._left + self._rate_hz * (now_s - self._at_s))
        self._at_s = now_s
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def frame_name(index: int) -> str:
    """The name of a message's frame, made from nothing that came with it."""
    return f"{index:06d}.jpg"


def _summed(rejected: RejectedFrame, num: int) -> RejectedFrame:
    if not num:
        return rejected
    return replace(rejected, detail=f"{rejected.detail}; and {num:,} before it that are not listed")
