"""``mqtt://`` and ``mqtts://``: what cameras publish on a broker, as a live source.

The topic may hold wildcards: each topic that matches is a camera. Images that the broker kept from
before (retained messages) are of an unknown age and are left out as duplicates; what is published
from now on counts.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.images.decoding import DecodedImage, RefusedImage, decode_image
from adapters.images.exif import PLAUSIBLE_FOCAL_RATIOS
from adapters.images.intrinsics import IntrinsicsReader
from adapters.live.deadline import GiveUpDeadline
from adapters.mqtt.cameras import Camera, Cameras, Positions
from adapters.mqtt.connection import (
    MqttAddress,
    MqttLink,
    MqttRefusal,
    is_refusal,
    keep_connected,
)
from adapters.mqtt.payloads import Metadata, Properties, kind_of, unwrap
from adapters.mqtt.telemetry import MAX_TELEMETRY_BYTES, Unreadable, read_telemetry
from adapters.mqtt.topics import Levels, TopicFilter, printable, telemetry_filter
from engine.config import Config, SourcesConfig
from engine.errors import SourceError
from engine.ports import ArrivalSink, FrameIds
from engine.types import (
    Arrival,
    CalibrationOrigin,
    DropReason,
    Frame,
    GpsFix,
    IntrinsicsPrior,
    Received,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    SourceState,
)

if TYPE_CHECKING:
    import aiomqtt

_MAX_TOPIC_CHARS = 80


def open_mqtt_source(spec: str, *, config: Config, next_frame_id: FrameIds) -> MqttSource:
    """Prepares a source; connecting is left to ``receive``.

    Args:
        spec: ``mqtt(s)://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC``, with ``+`` and ``#`` in the topic
            as in subscriptions. A user's password may also stand in LIVESFM_MQTT_PASSWORD.
        config: the resolved configuration.
        next_frame_id: the run's counter of frame ids; called on the thread that decodes.

    Raises:
        SourceError: the address is none.
        ConfigError: files of certificates cannot be used, or the telemetry topic is no topic.
        AdapterUnavailableError: a package is missing.
    """
    try:
        address = MqttAddress.parse(spec)
    except ValueError as error:
        # The spec stays out of the message: it may hold a password.
        raise SourceError(f"{spec.partition(':')[0]}: not an address of MQTT: {error}") from None
    return MqttSource(address, config=config, next_frame_id=next_frame_id)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageMessage:
    """A message on a topic of frames."""

    index: int  # of all messages for frames, 0-based
    topic: str
    levels: Levels  # of its topic, at the wildcards
    payload: bytes
    properties: Properties
    arrived_at_s: float  # Unix time
    received_at_s: float  # monotonic


class MqttSource:
    """Images from the topics of a broker; the images of a topic are a lane.

    A message is refused by its size and first bytes before anything is decoded. A camera is a topic
    and an image size; each has its own clock. Positions on the telemetry topic belong to the camera
    whose topic has the same levels at the wildcards, or to all cameras where that topic has other
    wildcards or none.
    """

    def __init__(self, address: MqttAddress, *, config: Config, next_frame_id: FrameIds) -> None:
        """Takes an address; see ``open_mqtt_source``."""
        self._link = MqttLink(address, config=config, receiver=True)
        self.info = SourceInfo(label=address.label, is_live=True, is_sequence=True, num_frames=None)
        self._sources_config: SourcesConfig = config.sources
        self._live = config.live_sources
        self._next_frame_id = next_frame_id
        self._intrinsics = IntrinsicsReader()
        self._max_payload_bytes = 10**6 * config.live_sources.max_payload_mb
        self._frames_filter = TopicFilter(address.topic)
        self._telemetry_filter = telemetry_filter(self._frames_filter, config.mqtt.telemetry_topic)
        self._has_same_wildcards = (
            self._frames_filter.num_wildcards == self._telemetry_filter.num_wildcards
        )
        max_cameras = config.live_sources.max_cameras
        self._cameras = Cameras(max_cameras)
        self._positions = Positions(
            source=self.info.label, cameras=self._cameras, max_topics=max_cameras, put=self._put
        )
        self._lock = threading.Lock()  # of cameras and positions: frames are decoded elsewhere
        self._num_messages = 0
        self._sink: ArrivalSink | None = None
        self._deadline: GiveUpDeadline | None = None

    async def receive(self, sink: ArrivalSink) -> None:
        """Receives until the broker refuses us, or no image came for ``give_up_after_s``."""
        self._sink = sink
        self._deadline = GiveUpDeadline(self._live.give_up_after_s)
        if not await self._deadline.outlasts(self._stay_connected()):
            self._report(SourceState.ENDED, f"no frame for {self._live.give_up_after_s:g} s")

    def _put(self, item: Received) -> None:
        if self._sink is not None:
            self._sink(item)

    async def _stay_connected(self) -> None:
        await keep_connected(
            self._link,
            self._subscribe,
            report=self._report,
            client=lambda: self._link.client(queue_type=_handing_to(self._take_in)),
        )

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        for topics in (self._frames_filter, self._telemetry_filter):
            codes = await client.subscribe(topics.text, qos=0)
            if any(is_refusal(code) for code in codes):
                raise MqttRefusal(f"the broker does not let us read {topics.text}")
        self._report(SourceState.CONNECTED, f"reading {self._frames_filter.text}")
        async for _ in client.messages:  # none: they went to `_take_in`; ends with the connection
            pass

    def _report(self, state: SourceState, detail: str) -> None:
        self._put(SourceNotice(source=self.info.label, state=state, detail=detail))

    def _take_in(self, message: aiomqtt.Message) -> None:
        """Sorts a message; called for each one as it is read from the socket."""
        topic = message.topic.value
        levels = self._telemetry_filter.match(topic)
        if levels is not None:
            self._take_in_telemetry(message, levels)
            return
        levels = self._frames_filter.match(topic)
        if levels is not None:
            self._take_in_image(message, levels)

    def _take_in_telemetry(self, message: aiomqtt.Message, levels: Levels) -> None:
        if message.retain:
            return  # where the camera was, not where it is
        is_short = len(message.payload) <= MAX_TELEMETRY_BYTES
        telemetry = read_telemetry(message.payload) if is_short else Unreadable.TOO_LONG
        with self._lock:
            if isinstance(telemetry, Unreadable):
                self._positions.count_unreadable(telemetry, message.payload)
                return
            self._positions.add(
                telemetry,
                levels=levels if self._has_same_wildcards else None,
                arrived_at_s=time.time(),
            )

    def _take_in_image(self, message: aiomqtt.Message, levels: Levels) -> None:
        image = ImageMessage(
            index=self._num_messages,
            topic=message.topic.value,
            levels=levels,
            payload=message.payload,
            properties=dict(getattr(message.properties, "UserProperty", ())),
            arrived_at_s=time.time(),
            received_at_s=time.monotonic(),
        )
        self._num_messages += 1
        refusal = self._refusal_of(image, is_retained=message.retain)
        if refusal is not None:
            self._put(self._rejected(image, refusal))
            return
        if self._deadline is not None:
            self._deadline.restart()
        self._put(
            Arrival(
                source=self.info.label,
                index=image.index,
                name=_frame_name(image.index),
                captured_at_s=image.arrived_at_s,
                num_bytes=len(image.payload),
                decode=functools.partial(self._decode, image),
                lane=image.topic,
                origin=printable(image.topic, max_chars=_MAX_TOPIC_CHARS),
            )
        )

    def _refusal_of(self, image: ImageMessage, *, is_retained: bool) -> RefusedImage | None:
        """Why a message cannot become a frame, by what shows at once."""
        num_bytes = len(image.payload)
        if is_retained:
            return RefusedImage(
                reason=DropReason.DUPLICATE, detail="kept by the broker from before"
            )
        if num_bytes > self._max_payload_bytes:
            return RefusedImage(
                reason=DropReason.TOO_LARGE, detail=f"a message of {num_bytes / 1e6:,.1f} MB"
            )
        if kind_of(image.payload) is None:
            detail = "no image by its first bytes" if num_bytes else "empty"
            return RefusedImage(reason=DropReason.UNREADABLE, detail=detail)
        with self._lock:
            is_one = self._cameras.may_be_one(image.levels)
        return None if is_one else self._too_many_cameras()

    def _rejected(self, image: ImageMessage, refusal: RefusedImage) -> RejectedFrame:
        topic = printable(image.topic, max_chars=_MAX_TOPIC_CHARS)
        return RejectedFrame(
            source=self.info.label,
            index=image.index,
            name=_frame_name(image.index),
            captured_at_s=image.arrived_at_s,
            reason=refusal.reason,
            detail=f"{topic}: {refusal.detail}",
        )

    def _too_many_cameras(self) -> RefusedImage:
        return RefusedImage(
            reason=DropReason.OVERLOAD,
            detail=f"more than {self._live.max_cameras} cameras; see live_sources.max_cameras",
        )

    def _decode(self, message: ImageMessage) -> Frame | RejectedFrame:
        unwrapped = unwrap(message.payload, message.properties)
        if isinstance(unwrapped, str):
            refusal = RefusedImage(reason=DropReason.UNREADABLE, detail=unwrapped)
            return self._rejected(message, refusal)
        image = decode_image(unwrapped.image, config=self._sources_config)
        if isinstance(image, RefusedImage):
            return self._rejected(message, image)
        with self._lock:
            camera = self._camera_of(message, image, unwrapped.metadata)
        if camera is None:
            return self._rejected(message, self._too_many_cameras())
        return self._frame(message, image, unwrapped.metadata, camera=camera)

    def _camera_of(
        self, message: ImageMessage, image: DecodedImage, metadata: Metadata
    ) -> Camera | None:
        """The camera that sent an image, its clock set; None when there are too many."""
        height, width = image.pixels.shape[:2]
        known = self._cameras.find(message.topic, width, height)
        camera = known or self._cameras.add(message.topic, message.levels, width, height)
        if camera is not None:
            camera.captured_at_s = camera.clock.tick(
                metadata.sender_time_s, arrived_at_s=message.arrived_at_s
            )
        if camera is not None and known is None:
            self._positions.catch_up(camera)
        return camera

    def _frame(
        self, message: ImageMessage, image: DecodedImage, metadata: Metadata, *, camera: Camera
    ) -> Frame:
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=camera.key,
            source=self.info.label,
            index=message.index,
            name=f"camera{camera.number:02d}/{_frame_name(message.index)}",
            captured_at_s=camera.captured_at_s,
            received_at_s=message.received_at_s,
            pixels=image.pixels,
            jpeg=image.jpeg,
            gps=self._fix_of(metadata) or image.exif.gps,
            intrinsics_prior=self._prior_of(metadata, image),
            quarter_turns=image.exif.quarter_turns,
        )

    def _prior_of(self, metadata: Metadata, image: DecodedImage) -> IntrinsicsPrior | None:
        height, width = image.pixels.shape[:2]
        shortest, longest = (ratio * max(width, height) for ratio in PLAUSIBLE_FOCAL_RATIOS)
        if metadata.focal_px is not None and shortest <= metadata.focal_px <= longest:
            return IntrinsicsPrior(focal_px=metadata.focal_px, origin=CalibrationOrigin.KNOWN)
        return self._intrinsics.of_image(image)

    def _fix_of(self, metadata: Metadata) -> GpsFix | None:
        return None if metadata.position is None else metadata.position.fix


def _frame_name(index: int) -> str:
    """The name of a message's frame, made from nothing that came with it."""
    return f"{index:06d}.jpg"


def _handing_to(
    take_in: Callable[[aiomqtt.Message], None],
) -> type[asyncio.Queue[aiomqtt.Message]]:
    """A queue for aiomqtt that keeps nothing: messages are sorted as they come off the socket.

    Its own queue either grows without end or throws away the newest messages.
    """

    class Handing(asyncio.Queue["aiomqtt.Message"]):
        def put_nowait(self, item: aiomqtt.Message) -> None:
            take_in(item)

    return Handing
