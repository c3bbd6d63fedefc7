"""One phone: its newest frame, its clock and its cameras."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from adapters.images.decoding import DecodedImage, RefusedImage, decode_image
from adapters.live.capture_clock import CaptureClock
from adapters.phone.feedback_view import FeedbackDesk
from adapters.phone.messages import (
    PhoneFrame,
    PhoneHello,
    PhonePosition,
    RefusedMessage,
    parse_frame,
    parse_text,
)
from adapters.phone.motion_blur import Look, Looks
from engine.config import Config
from engine.ports import FrameIds
from engine.types import DropReason, Frame, GpsFix, GpsReading, Received, RejectedFrame

logger = logging.getLogger(__name__)

_MAX_MALFORMED = 10  # messages in a row


@dataclass(slots=True, kw_only=True)
class Intake:
    """What the phones of one source share."""

    label: str
    config: Config
    next_frame_id: FrameIds
    put: Callable[[Received], Awaitable[None]]
    desk: FeedbackDesk
    camera_keys: set[str] = field(default_factory=set)
    num_received: int = 0

    def next_index(self) -> int:
        """The position of the next frame in the source."""
        self.num_received += 1
        return self.num_received - 1

    def takes_camera(self, camera_key: str) -> bool:
        """Whether a camera is known or one more may be."""
        is_room = len(self.camera_keys) < self.config.live_sources.max_cameras
        if camera_key in self.camera_keys or is_room:
            self.camera_keys.add(camera_key)
            return True
        return False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Arrived:
    """A picture that waits for decoding."""

    frame: PhoneFrame
    index: int
    captured_at_s: float
    received_at_s: float


class Phone:
    """Turns the messages of one phone into frames and positions; for the event loop.

    A picture that comes while another one waits for decoding takes its place.
    """

    def __init__(self, number: int, intake: Intake) -> None:
        self.number = number
        self.num_left = 0  # pictures that do not wait any more, whatever became of them
        self.changed: Callable[[], None] = lambda: None  # called when a picture left
        self._intake = intake
        self._clock = CaptureClock()
        self._looks = Looks()
        self._waiting: _Arrived | None = None
        self._arrived = asyncio.Event()
        self._last_sequence = -1
        self._num_malformed = 0
        self._camera_keys: list[str] = []
        self._last_fix: tuple[float, GpsFix] | None = None

    @property
    def name(self) -> str:
        """What its frames are filed under."""
        return f"phone{self.number}"

    @property
    def is_babbling(self) -> bool:
        """Whether it sends nothing that makes sense."""
        return self._num_malformed >= _MAX_MALFORMED

    async def take_text(self, text: str) -> None:
        """Takes a text message."""
        message = parse_text(text)
        match message:
            case RefusedMessage():
                await self._refuse_malformed(message)
            case PhoneHello():  # the page was opened anew: what it said before is past
                self._last_sequence = -1
                self._num_malformed = 0
            case PhonePosition():
                self._num_malformed = 0
                await self._take_position(message)

    async def take_binary(self, data: bytes) -> None:
        """Takes a picture."""
        message = parse_frame(data)
        if isinstance(message, RefusedMessage):
            await self._refuse_malformed(message)
            self._leave()
            return
        self._num_malformed = 0
        captured_at_s = self._clock.tick(message.captured_at_s, arrived_at_s=time.time())
        arrived = _Arrived(
            frame=message,
            index=self._intake.next_index(),
            captured_at_s=captured_at_s,
            received_at_s=time.monotonic(),
        )
        if message.sequence <= self._last_sequence:
            await self._reject(arrived, DropReason.DUPLICATE, "this picture came before")
            return
        self._last_sequence = message.sequence
        overtaken, self._waiting = self._waiting, arrived
        self._arrived.set()
        if overtaken is not None:
            await self._reject(overtaken, DropReason.OVERLOAD, "a newer picture came")

    async def refuse_oversized(self) -> None:
        """Counts a message that was larger than allowed and not read."""
        limit_mb = self._intake.config.live_sources.max_payload_mb
        refused = RefusedMessage(
            reason=DropReason.TOO_LARGE, detail=f"a message of more than {limit_mb} MB"
        )
        await self._refuse_malformed(refused)

    async def work(self) -> None:
        """Decodes pictures until cancelled, always the newest one."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            arrived, self._waiting = self._waiting, None
            if arrived is not None:
                await self._decode(arrived)

    async def _decode(self, arrived: _Arrived) -> None:
        image, look = await asyncio.to_thread(self._look_at, arrived.frame.jpeg)
        if isinstance(image, RefusedImage):
            await self._reject(arrived, image.reason, image.detail)
            return
        height, width = image.pixels.shape[:2]
        told = arrived.frame
        camera_key = f"{self.name}|{width}x{height}"
        if (told.width, told.height) != (width, height):
            detail = f"{width} x {height} px, announced as {told.width} x {told.height}"
            await self._reject(arrived, DropReason.UNREADABLE, detail)
        elif not self._intake.takes_camera(camera_key):
            detail = "more cameras than live_sources.max_cameras"
            await self._reject(arrived, DropReason.OVERLOAD, detail)
        else:
            await self._give(arrived, image, look, camera_key=camera_key)

    def _look_at(self, jpeg: bytes) -> tuple[DecodedImage | RefusedImage, Look | None]:
        """Blocking; one picture at a time."""
        image = decode_image(jpeg, config=self._intake.config.sources)
        look = self._looks.look(image.pixels) if isinstance(image, DecodedImage) else None
        return image, look

    async def _give(
        self, arrived: _Arrived, image: DecodedImage, look: Look | None, *, camera_key: str
    ) -> None:
        if camera_key not in self._camera_keys:
            self._camera_keys.append(camera_key)
            if self._last_fix is not None:
                await self._intake.put(self._reading(camera_key, *self._last_fix))
        frame = Frame(
            frame_id=self._intake.next_frame_id(),
            camera_key=camera_key,
            source=self._intake.label,
            index=arrived.index,
            name=self._frame_name(arrived.index),
            captured_at_s=arrived.captured_at_s,
            received_at_s=arrived.received_at_s,
            pixels=image.pixels,
            jpeg=image.jpeg,
        )
        self._intake.desk.feedback.frame_made(
            frame.frame_id,
            phone=self.number,
            look=look,
            up_in_camera=arrived.frame.up_in_camera,
        )
        await self._intake.put(frame)
        self._leave()

    async def _take_position(self, position: PhonePosition) -> None:
        if position.fix is None:
            return
        told_at_s = position.captured_at_s
        captured_at_s = self._clock.on_this_clock(told_at_s, arrived_at_s=time.time())
        self._last_fix = captured_at_s, position.fix
        for camera_key in self._camera_keys:
            await self._intake.put(self._reading(camera_key, captured_at_s, position.fix))

    def _reading(self, camera_key: str, captured_at_s: float, fix: GpsFix) -> GpsReading:
        return GpsReading(
            source=self._intake.label,
            camera_key=camera_key,
            captured_at_s=captured_at_s,
            fix=fix,
        )

    async def _refuse_malformed(self, refused: RefusedMessage) -> None:
        self._num_malformed += 1
        await self._put_rejected(
            self._intake.next_index(), time.time(), refused.reason, refused.detail
        )

    async def _reject(self, arrived: _Arrived, reason: DropReason, detail: str) -> None:
        await self._put_rejected(arrived.index, arrived.captured_at_s, reason, detail)
        self._leave()

    async def _put_rejected(
        self, index: int, captured_at_s: float, reason: DropReason, detail: str
    ) -> None:
        logger.debug("%s: picture %d: %s: %s", self.name, index, reason, detail)
        await self._intake.put(
            RejectedFrame(
                source=self._intake.label,
                index=index,
                name=self._frame_name(index),
                captured_at_s=captured_at_s,
                reason=reason,
                detail=detail,
            )
        )

    def _frame_name(self, index: int) -> str:
        return f"{self.name}/{index + 1:06d}.jpg"

    def _leave(self) -> None:
        self.num_left += 1
        self.changed()
