"""One phone: what its messages become, its clock and its cameras."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from adapters.images.decoding import RefusedImage, decode_image
from adapters.live.capture_clock import CaptureClock
from adapters.phone.feedback import ArrivedPicture, DecodedPicture
from adapters.phone.feedback_view import FeedbackChannel
from adapters.phone.messages import (
    PhoneFrame,
    PhoneHello,
    PhonePosition,
    RefusedMessage,
    parse_frame,
    parse_text,
)
from adapters.phone.motion_blur import MotionBlurMeter
from engine.config import Config
from engine.ports import ArrivalSink, FrameIds
from engine.types import Arrival, DropReason, Frame, GpsFix, GpsReading, RejectedFrame

logger = logging.getLogger(__name__)

_MAX_MALFORMED = 10  # messages in a row


@dataclass(slots=True, kw_only=True)
class PhoneContext:
    """What the phones of one source share."""

    label: str
    config: Config
    next_frame_id: FrameIds
    sink: ArrivalSink
    feedback: FeedbackChannel
    camera_keys: set[str] = field(default_factory=set)  # for the thread that decodes
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
class _Picture:
    """A picture that is to be decoded."""

    message: PhoneFrame
    number: int  # of the phone's pictures that are decoded unless dropped
    index: int
    captured_at_s: float
    received_at_s: float


class PhoneSession:
    """Turns the messages of one phone into arrivals and positions.

    For the event loop, but for decoding, which happens on one other thread. The pictures of a phone
    are a lane.
    """

    def __init__(self, number: int, context: PhoneContext) -> None:
        """Starts without a picture.

        Args:
            number: of the phone, from 1.
            context: what it shares with others.
        """
        self.number = number
        self.num_left = 0  # pictures that were taken or refused, so that more may be sent
        self.changed: Callable[[], None] = lambda: None  # called when a picture left
        self._context = context
        self._clock = CaptureClock()
        self._last_sequence = -1
        self._num_malformed = 0
        self._camera_keys: list[str] = []  # grows on the thread that decodes
        self._last_fix: tuple[float, GpsFix] | None = None
        self._meter = MotionBlurMeter()
        self._num_pictures = 0
        self._last_measured = 0

    @property
    def name(self) -> str:
        """What its frames are filed under."""
        return f"phone{self.number}"

    @property
    def is_babbling(self) -> bool:
        """Whether it sends nothing that makes sense."""
        return self._num_malformed >= _MAX_MALFORMED

    def take_text(self, text: str) -> None:
        """Takes a text message."""
        message = parse_text(text)
        match message:
            case RefusedMessage():
                self._refuse_malformed(message)
            case PhoneHello():  # the page was opened anew: what it said before is past
                self._last_sequence = -1
                self._num_malformed = 0
            case PhonePosition():
                self._num_malformed = 0
                self._take_position(message)

    def take_binary(self, data: bytes) -> None:
        """Takes a picture."""
        message = parse_frame(data)
        if isinstance(message, RefusedMessage):
            self._refuse_malformed(message)
        else:
            self._num_malformed = 0
            self._take_picture(message)
        self.num_left += 1
        self.changed()

    def refuse_oversized(self) -> None:
        """Counts a message that was larger than allowed and not read."""
        limit_mb = self._context.config.live_sources.max_payload_mb
        refused = RefusedMessage(
            reason=DropReason.TOO_LARGE, detail=f"a message of more than {limit_mb} MB"
        )
        self._refuse_malformed(refused)

    def _take_picture(self, message: PhoneFrame) -> None:
        picture = _Picture(
            message=message,
            number=self._num_pictures + 1,
            index=self._context.next_index(),
            captured_at_s=self._clock.tick(message.captured_at_s, arrived_at_s=time.time()),
            received_at_s=time.monotonic(),
        )
        if message.sequence <= self._last_sequence:
            self._context.sink(
                self._rejected(picture, DropReason.DUPLICATE, "this picture came before")
            )
            return
        self._last_sequence = message.sequence
        self._num_pictures = picture.number
        self._context.feedback.put(ArrivedPicture(index=picture.index, phone=self.number))
        self._context.sink(
            Arrival(
                source=self._context.label,
                index=picture.index,
                name=self._frame_name(picture.index),
                captured_at_s=picture.captured_at_s,
                num_bytes=len(message.jpeg),
                decode=functools.partial(self._decode, picture),
                lane=self.name,
            )
        )

    # -- on the thread that decodes ---------------------------------------------------------------

    def _decode(self, picture: _Picture) -> Frame | RejectedFrame:
        decoded = self._decoded(picture)
        frame_id, blur = None, None
        if isinstance(decoded, Frame):
            frame_id = decoded.frame_id
            is_next = picture.number == self._last_measured + 1
            blur = self._meter.measure(decoded.pixels, is_next=is_next)
            self._last_measured = picture.number
        self._context.feedback.put(
            DecodedPicture(
                index=picture.index,
                phone=self.number,
                frame_id=frame_id,
                blur=blur,
                up_in_camera=picture.message.up_in_camera,
            )
        )
        return decoded

    def _decoded(self, picture: _Picture) -> Frame | RejectedFrame:
        image = decode_image(picture.message.jpeg, config=self._context.config.sources)
        if isinstance(image, RefusedImage):
            return self._rejected(picture, image.reason, image.detail)
        height, width = image.pixels.shape[:2]
        announced = picture.message.width, picture.message.height
        if announced != (width, height):
            detail = f"{width} x {height} px, announced as {announced[0]} x {announced[1]}"
            return self._rejected(picture, DropReason.UNREADABLE, detail)
        camera_key = f"{self.name}|{width}x{height}"
        if not self._context.takes_camera(camera_key):
            detail = "more cameras than live_sources.max_cameras"
            return self._rejected(picture, DropReason.OVERLOAD, detail)
        self._add_camera(camera_key)
        return Frame(
            frame_id=self._context.next_frame_id(),
            camera_key=camera_key,
            source=self._context.label,
            index=picture.index,
            name=self._frame_name(picture.index),
            captured_at_s=picture.captured_at_s,
            received_at_s=picture.received_at_s,
            pixels=image.pixels,
            jpeg=image.jpeg,
        )

    def _add_camera(self, camera_key: str) -> None:
        if camera_key in self._camera_keys:
            return
        self._camera_keys.append(camera_key)
        if self._last_fix is not None:
            self._context.sink(self._reading(camera_key, *self._last_fix))

    # -- on either --------------------------------------------------------------------------------

    def _take_position(self, position: PhonePosition) -> None:
        captured_at_s = self._clock.on_this_clock(position.captured_at_s, arrived_at_s=time.time())
        self._last_fix = captured_at_s, position.fix
        for camera_key in tuple(self._camera_keys):
            self._context.sink(self._reading(camera_key, captured_at_s, position.fix))

    def _reading(self, camera_key: str, captured_at_s: float, fix: GpsFix) -> GpsReading:
        return GpsReading(
            source=self._context.label,
            camera_key=camera_key,
            captured_at_s=captured_at_s,
            fix=fix,
        )

    def _refuse_malformed(self, refused: RefusedMessage) -> None:
        self._num_malformed += 1
        index = self._context.next_index()
        self._context.sink(self._rejected_frame(index, time.time(), refused.reason, refused.detail))

    def _rejected(self, picture: _Picture, reason: DropReason, detail: str) -> RejectedFrame:
        return self._rejected_frame(picture.index, picture.captured_at_s, reason, detail)

    def _rejected_frame(
        self, index: int, captured_at_s: float, reason: DropReason, detail: str
    ) -> RejectedFrame:
        logger.debug("%s: picture %d: %s: %s", self.name, index, reason, detail)
        return RejectedFrame(
            source=self._context.label,
            index=index,
            name=self._frame_name(index),
            captured_at_s=captured_at_s,
            reason=reason,
            detail=detail,
        )

    def _frame_name(self, index: int) -> str:
        return f"{self.name}/{index + 1:06d}.jpg"
