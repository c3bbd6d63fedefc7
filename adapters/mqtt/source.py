"""``mqtt://`` and ``mqtts://``: what cameras publish on a broker, as a live source.

The topic may hold wildcards: each topic that matches is a camera. Images that the broker kept from
before (retained messages) are of an unknown age and are left out as duplicates; what is published
from now on counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from adapters.images.decoding import DecodedImage, RefusedImage, decode_image
from adapters.images.exif import PLAUSIBLE_FOCAL_RATIOS, intrinsics_prior
from adapters.mqtt.cameras import Camera, Cameras, Positions
from adapters.mqtt.connection import (
    MqttAddress,
    MqttLink,
    MqttRefusal,
    is_refusal,
    keep_connected,
)
from adapters.mqtt.inbox import Arrived, Inbox, Told, frame_name
from adapters.mqtt.payloads import Facts, kind_of, unwrap
from adapters.mqtt.telemetry import read_telemetry
from adapters.mqtt.topics import Levels, TopicFilter, telemetry_filter
from engine.config import Config, SourcesConfig
from engine.errors import SourceError
from engine.ports import FrameIds, FrameSource
from engine.types import (
    DropReason,
    Frame,
    GpsFix,
    IntrinsicsPrior,
    Received,
    SourceInfo,
    SourceNotice,
    SourceState,
)

if TYPE_CHECKING:
    import aiomqtt

_MAX_TELEMETRY_BYTES = 65_536
_LET_GO_S = 1.0  # for a farewell to the broker


def open_mqtt_source(spec: str, *, config: Config, next_frame_id: FrameIds) -> FrameSource:
    """Prepares a source; connecting is left to ``frames``.

    Args:
        spec: ``mqtt(s)://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC``, with ``+`` and ``#`` in the topic
            as in subscriptions. A user's password may also stand in LIVESFM_MQTT_PASSWORD.
        config: the resolved configuration.
        next_frame_id: the run's counter of frame ids.

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


class MqttSource:
    """Images from the topics of a broker, the newest of each camera first.

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
        self._max_payload_bytes = 10**6 * config.live_sources.max_payload_mb
        self._frames_filter = TopicFilter(address.topic)
        self._telemetry_filter = telemetry_filter(self._frames_filter, config.mqtt.telemetry_topic)
        self._tells_camera = (
            self._frames_filter.num_wildcards == self._telemetry_filter.num_wildcards
        )
        max_cameras = config.live_sources.max_cameras
        self._inbox = Inbox(source=self.info.label, max_cameras=max_cameras)
        self._cameras = Cameras(max_cameras)
        self._positions = Positions(
            source=self.info.label,
            cameras=self._cameras,
            max_topics=max_cameras,
            put=self._inbox.put_reading,
        )
        self._num_messages = 0
        self._num_frames = 0
        self._last_frame_s = 0.0
        self._has_given_up = False

    async def frames(self) -> AsyncGenerator[Received, None]:
        """Yields what comes until the broker refuses us; called once."""
        receiving = asyncio.create_task(self._receive(), name=f"receive {self.info.label}")
        self._last_frame_s = time.monotonic()
        try:
            while (item := await self._next_item()) is not None:
                if not isinstance(item, Arrived):
                    yield item
                elif (frame := await self._frame_of(item)) is not None:
                    yield frame
                if self._num_frames == self._sources_config.max_frames > 0:
                    yield self._ended(f"{self._num_frames} frames were taken, as configured")
                    return
            if receiving.done():
                receiving.result()  # what broke it, if anything did, belongs to who reads
        finally:
            receiving.cancel()
            await asyncio.wait((receiving,), timeout=_LET_GO_S)

    async def _next_item(self) -> Arrived | Told | None:
        """What to look at next; None after the last, or after a silence that was too long."""
        if self._has_given_up:
            return None
        patience_s = self._live.give_up_after_s
        left_s = patience_s - (time.monotonic() - self._last_frame_s) if patience_s else None
        try:
            if left_s is not None and left_s <= 0.0:  # also where other messages never end
                raise TimeoutError
            async with asyncio.timeout(left_s):
                return await self._inbox.next()
        except TimeoutError:
            self._has_given_up = True
            return self._ended(f"no frame for {patience_s:g} s")

    def _ended(self, detail: str) -> SourceNotice:
        return SourceNotice(source=self.info.label, state=SourceState.ENDED, detail=detail)

    async def _receive(self) -> None:
        try:
            await keep_connected(
                self._link, self._subscribe, report=self._tell, client=self._connection
            )
        finally:
            self._inbox.end()

    def _connection(self) -> AbstractAsyncContextManager[aiomqtt.Client]:
        return self._link.client(queue_type=_handing_to(self._take_in))

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        for topics in (self._frames_filter, self._telemetry_filter):
            codes = await client.subscribe(topics.text, qos=0)
            if any(is_refusal(code) for code in codes):
                raise MqttRefusal(f"the broker does not let us read {topics.text}")
        self._tell(SourceState.CONNECTED, f"reading {self._frames_filter.text}")
        async for _ in client.messages:  # none: they went to `_take_in`; ends with the connection
            pass

    def _tell(self, state: SourceState, detail: str) -> None:
        self._inbox.put_notice(SourceNotice(source=self.info.label, state=state, detail=detail))

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
        is_short = len(message.payload) <= _MAX_TELEMETRY_BYTES
        telemetry = read_telemetry(message.payload) if is_short else None
        if telemetry is None:
            self._positions.count_unusable("a message of telemetry that holds no position")
            return
        self._positions.add(
            telemetry, levels=levels if self._tells_camera else None, arrived_at_s=time.time()
        )

    def _take_in_image(self, message: aiomqtt.Message, levels: Levels) -> None:
        arrived = Arrived(
            index=self._num_messages,
            topic=message.topic.value,
            camera=levels,
            payload=message.payload,
            properties=dict(getattr(message.properties, "UserProperty", ())),
            arrived_at_s=time.time(),
            received_at_s=time.monotonic(),
        )
        self._num_messages += 1
        refusal = self._refusal_of(arrived, is_retained=message.retain)
        if refusal is None:
            self._inbox.put_image(arrived)
        else:
            self._inbox.refuse(arrived, reason=refusal.reason, detail=refusal.detail)

    def _refusal_of(self, arrived: Arrived, *, is_retained: bool) -> RefusedImage | None:
        """Why a message cannot become a frame, by what shows at once."""
        num_bytes = len(arrived.payload)
        if is_retained:
            return RefusedImage(
                reason=DropReason.DUPLICATE, detail="kept by the broker from before"
            )
        if num_bytes > self._max_payload_bytes:
            return RefusedImage(
                reason=DropReason.TOO_LARGE, detail=f"a message of {num_bytes / 1e6:,.1f} MB"
            )
        if kind_of(arrived.payload) is None:
            detail = "no image by its first bytes" if num_bytes else "empty"
            return RefusedImage(reason=DropReason.UNREADABLE, detail=detail)
        if not self._cameras.may_be_one(arrived.camera):
            return self._too_many_cameras()
        return None

    def _too_many_cameras(self) -> RefusedImage:
        return RefusedImage(
            reason=DropReason.OVERLOAD,
            detail=f"more than {self._live.max_cameras} cameras; see live_sources.max_cameras",
        )

    async def _frame_of(self, arrived: Arrived) -> Frame | None:
        """The frame in a message; where there is none, that goes to the inbox to be told."""
        decoded = await asyncio.to_thread(_decode, arrived, self._sources_config)
        if not isinstance(decoded, RefusedImage):
            image, facts = decoded
            camera = self._camera_of(arrived, image, facts)
            if camera is not None:
                return self._frame(arrived, image, facts, camera=camera)
            decoded = self._too_many_cameras()
        self._inbox.refuse(arrived, reason=decoded.reason, detail=decoded.detail)
        return None

    def _camera_of(self, arrived: Arrived, image: DecodedImage, facts: Facts) -> Camera | None:
        """The camera that sent an image, its clock set; None when there are too many."""
        height, width = image.pixels.shape[:2]
        known = self._cameras.find(arrived.topic, width, height)
        camera = known or self._cameras.add(arrived.topic, arrived.camera, width, height)
        if camera is not None:
            camera.captured_at_s = camera.clock.tick(
                facts.told_s, arrived_at_s=arrived.arrived_at_s
            )
        if camera is not None and known is None:
            self._positions.catch_up(camera)
        return camera

    def _frame(
        self, arrived: Arrived, image: DecodedImage, facts: Facts, *, camera: Camera
    ) -> Frame:
        self._num_frames += 1
        self._last_frame_s = time.monotonic()
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=camera.key,
            source=self.info.label,
            index=arrived.index,
            name=f"camera{camera.number:02d}/{frame_name(arrived.index)}",
            captured_at_s=camera.captured_at_s,
            received_at_s=arrived.received_at_s,
            pixels=image.pixels,
            jpeg=image.jpeg,
            gps=self._fix_of(facts) or image.exif.gps,
            intrinsics_prior=_prior_of(facts, image),
        )

    def _fix_of(self, facts: Facts) -> GpsFix | None:
        if facts.position is None:
            return None
        if facts.position.fix is None:
            self._positions.count_unusable("a position without altitude")
        return facts.position.fix


def _decode(arrived: Arrived, config: SourcesConfig) -> tuple[DecodedImage, Facts] | RefusedImage:
    """From a payload to pixels; slow, for a thread."""
    unwrapped = unwrap(arrived.payload, arrived.properties)
    if isinstance(unwrapped, str):
        return RefusedImage(reason=DropReason.UNREADABLE, detail=unwrapped)
    image = decode_image(unwrapped.image, config=config)
    return image if isinstance(image, RefusedImage) else (image, unwrapped.facts)


def _prior_of(facts: Facts, image: DecodedImage) -> IntrinsicsPrior | None:
    height, width = image.pixels.shape[:2]
    shortest, longest = (ratio * max(width, height) for ratio in PLAUSIBLE_FOCAL_RATIOS)
    if facts.focal_px is not None and shortest <= facts.focal_px <= longest:
        return IntrinsicsPrior(focal_px=facts.focal_px)
    return intrinsics_prior(image.exif, width=width, height=height)


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
