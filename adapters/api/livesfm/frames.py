"""Frames that a program hands over, as a source of a run."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from adapters.images.decoding import RefusedImage, decode_image, refused_by_size
from adapters.images.intrinsics import IntrinsicsReader
from engine.config import SourcesConfig
from engine.errors import EngineError
from engine.ports import ArrivalSink, FrameIds
from engine.types import (
    PROGRAM_LABEL,
    Arrival,
    BoolArray,
    DropReason,
    Frame,
    FrameId,
    GpsFix,
    GpsReading,
    IntrinsicsPrior,
    Received,
    RejectedFrame,
    SourceInfo,
    Uint8Array,
)

_MAX_WAITING = 4  # frames of a lossless run; who adds one more waits


class RunEndedError(EngineError):
    """A frame is handed to a run that takes no more, or a run is entered a second time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HandedFrame:
    """A frame as a program hands it over."""

    image: Uint8Array | bytes  # (H, W, 3) RGB, upright; or an encoded image
    camera: str
    captured_at_s: float | None  # None: when it was handed over
    handed_at_s: float = field(default_factory=time.time)  # before it waits for room
    gps: GpsFix | None = None
    intrinsics: IntrinsicsPrior | None = None
    mask: BoolArray | None = None  # (H, W), True where a pixel may be used


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedPosition:
    """A position as a program hands it over."""

    fix: GpsFix
    camera: str | None  # None: of all cameras
    captured_at_s: float


class _Frames(ABC):
    """What lossless and live runs have in common: numbers, names, decoding and the end."""

    def __init__(
        self,
        config: SourcesConfig,
        *,
        next_frame_id: FrameIds,
        is_live: bool,
        are_photos: bool = False,
    ) -> None:
        self.info = SourceInfo(
            label=PROGRAM_LABEL,
            is_live=is_live,
            is_sequence=not are_photos,
            num_frames=None,
            has_many_cameras=True,
        )
        self._config = config
        self._next_frame_id = next_frame_id
        self._changed = threading.Condition()
        self._has_ended = False
        self._cause: BaseException | None = None  # of the end
        self._wake: Callable[[], None] | None = None  # who reads, while somebody does
        self._num_frames = 0
        self._newest_at_s: dict[str, float] = {}  # by name of the camera, of videos
        self._names: list[str] = []  # of the cameras, by number - 1
        self._camera_keys: dict[tuple[str, int, int], str] = {}  # by name and size
        self._intrinsics = IntrinsicsReader()
        self._indices = array("q")  # by frame id: 1, 2, 3, ...; of every id that was taken
        self._numbers = array("q")  # of their cameras

    def origin_of(self, frame_id: FrameId) -> tuple[str, int]:
        """The camera that a frame is of, and its index.

        Raises:
            IndexError: no frame has the id.
        """
        position = frame_id - 1
        return self._names[self._numbers[position] - 1], self._indices[position]

    def _arrival(self, handed: HandedFrame) -> Arrival:
        """The next arrival, as handed over; called with the lock held."""
        captured_at_s = self._time_of(handed)
        index = self._num_frames
        self._num_frames += 1
        if handed.camera not in self._names:
            self._names.append(handed.camera)
        number = self._names.index(handed.camera) + 1
        received_at_s = time.monotonic()
        is_encoded = isinstance(handed.image, bytes)
        name = f"camera{number:02d}/{index:06d}.{'jpg' if is_encoded else 'png'}"

        def decode() -> Frame | RejectedFrame:
            decoded = self._decode(
                handed,
                index=index,
                name=name,
                captured_at_s=captured_at_s,
                received_at_s=received_at_s,
            )
            if isinstance(decoded, RefusedImage):
                return arrival.rejected(decoded.reason, decoded.detail)
            return decoded

        arrival = Arrival(
            source=self.info.label,
            index=index,
            name=name,
            captured_at_s=captured_at_s,
            num_bytes=len(handed.image) if is_encoded else np.asarray(handed.image).nbytes,
            decode=decode,
            lane=handed.camera,
            origin=f"camera {handed.camera!r}",
        )
        return arrival

    def _time_of(self, handed: HandedFrame) -> float:
        """When a frame was taken; called with the lock held.

        Raises:
            ValueError: it is of a video, and not later than the camera's frame before it.
        """
        given_s = handed.captured_at_s
        if not self.info.is_sequence:
            return handed.handed_at_s if given_s is None else given_s
        newest_s = self._newest_at_s.get(handed.camera, -math.inf)
        if given_s is None:
            # Clocks are set back, and frames of several threads overtake each other.
            given_s = max(handed.handed_at_s, math.nextafter(newest_s, math.inf))
        if given_s <= newest_s:
            raise ValueError(
                f"captured_at_s: {given_s!r} is not later than {newest_s!r}, the time of the frame"
                f" before it of camera {handed.camera!r}"
            )
        self._newest_at_s[handed.camera] = given_s
        return given_s

    def _decode(
        self,
        handed: HandedFrame,
        *,
        index: int,
        name: str,
        captured_at_s: float,
        received_at_s: float,
    ) -> Frame | RefusedImage:
        """The frame that was handed over, or why it cannot be used."""
        jpeg, gps, quarter_turns = None, handed.gps, 0
        if isinstance(handed.image, bytes):
            image = decode_image(handed.image, config=self._config)
            if isinstance(image, RefusedImage):
                return image
            pixels, jpeg, quarter_turns = image.pixels, image.jpeg, image.exif.quarter_turns
            gps, prior = gps or image.exif.gps, self._intrinsics.of_image(image)
        else:
            pixels = handed.image
            refused = refused_by_size(pixels.shape[1], pixels.shape[0], config=self._config)
            if refused is not None:
                return refused
            prior = self._intrinsics.of_pixels(pixels, name=handed.camera)
        height, width = pixels.shape[:2]
        if handed.mask is not None and handed.mask.shape != (height, width):
            mask_height, mask_width = handed.mask.shape
            detail = f"its mask is {mask_width} x {mask_height} px, the image {width} x {height}"
            return RefusedImage(reason=DropReason.BAD_MASK, detail=detail)
        return Frame(
            frame_id=self._take_frame_id(handed.camera, index),
            camera_key=self._camera_key(handed.camera, width, height),
            source=self.info.label,
            index=index,
            name=name,
            captured_at_s=captured_at_s,
            received_at_s=received_at_s,
            pixels=pixels,
            jpeg=jpeg,
            gps=gps,
            intrinsics_prior=handed.intrinsics or prior,
            quarter_turns=quarter_turns,
            mask=handed.mask,
        )

    def _take_frame_id(self, camera: str, index: int) -> FrameId:
        """A new id, with its origin: the frame may still fail, and then its id is not used."""
        with self._changed:
            frame_id = self._next_frame_id()
            self._indices.append(index)
            self._numbers.append(self._names.index(camera) + 1)
            return frame_id

    def _camera_key(self, camera: str, width: int, height: int) -> str:
        """Frames of another size are of another camera."""
        key = camera, width, height
        if key not in self._camera_keys:
            is_first = all(name != camera for name, _, _ in self._camera_keys)
            self._camera_keys[key] = camera if is_first else f"{camera} {width}x{height}"
        return self._camera_keys[key]

    # -- what a program adds ----------------------------------------------------------------------

    def add(self, handed: HandedFrame | HandedPosition, *, timeout_s: float | None = None) -> int:
        """Adds a frame or a position; waits until there is room.

        Returns:
            The frame's index; that of the next frame where it is a position.

        Raises:
            ValueError: a frame is not later than its camera's frame before it; it was not added.
            TimeoutError: there was no room in time; it was not added.
            RunEndedError: the run takes no more.
        """
        with self._changed:
            if not self.wait_for_room(timeout_s=timeout_s):
                raise TimeoutError(f"the run took no frame for {timeout_s:g} s")
            index = self.add_if_room(handed)
        assert index is not None
        return index

    def add_if_room(self, handed: HandedFrame | HandedPosition) -> int | None:
        """Adds a frame or a position at once; None where there is no room.

        Raises:
            ValueError: a frame is not later than its camera's frame before it; it was not added.
            RunEndedError: the run takes no more.
        """
        with self._changed:
            if self._has_ended:
                raise RunEndedError("the run takes no more frames") from self._cause
            if not self._has_room():
                return None
            index = self._num_frames
            self._put(
                self._arrival(handed) if isinstance(handed, HandedFrame) else self._reading(handed)
            )
            return index

    def wait_for_room(
        self, *, timeout_s: float | None = None, given_up: threading.Event | None = None
    ) -> bool:
        """Waits for room or the end, and adds nothing.

        Args:
            timeout_s: how long; None: for ever.
            given_up: ends the waiting once it is set and `stop_waiting` is called.

        Returns:
            Whether there is an end of the waiting other than the time.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    self._has_ended
                    or self._has_room()
                    or (given_up is not None and given_up.is_set())
                ),
                timeout_s,
            )

    def stop_waiting(self) -> None:
        """Has those who wait for room look whether they still have to."""
        with self._changed:
            self._changed.notify_all()

    def end(self, cause: BaseException | None = None) -> None:
        """Adds nothing more; what waits is still taken.

        Args:
            cause: what ended the run; None: nothing broke.
        """
        with self._changed:
            self._has_ended = True
            self._cause = self._cause or cause
            self._changed.notify_all()
            if self._wake is not None:
                self._wake()

    @contextmanager
    def _waking(self, something: asyncio.Event) -> Iterator[None]:
        """Has an event of the running loop set at each change; ends what may be added."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody reads any more
                loop.call_soon_threadsafe(something.set)

        with self._changed:
            self._wake = wake
        try:
            yield
        finally:
            with self._changed:
                self._wake = None
            self.end()

    @abstractmethod
    def _has_room(self) -> bool:
        """Whether something can be added; called with the lock held."""

    @abstractmethod
    def _put(self, item: Received) -> None:
        """Adds an item; called with the lock held."""

    def _reading(self, handed: HandedPosition) -> GpsReading:
        return GpsReading(
            source=self.info.label,
            camera_key=handed.camera,
            captured_at_s=handed.captured_at_s,
            fix=handed.fix,
        )


class LiveFrames(_Frames):
    """Frames of a live run: neither waits for the other, and of each camera the newest wins."""

    def __init__(self, config: SourcesConfig, *, next_frame_id: FrameIds) -> None:
        super().__init__(config, next_frame_id=next_frame_id, is_live=True)
        self._sink: ArrivalSink | None = None

    async def receive(self, sink: ArrivalSink) -> None:
        """Hands over what is added until nothing more is, or the run takes no more."""
        something = asyncio.Event()
        with self._waking(something):
            with self._changed:
                self._sink = sink
                self._changed.notify_all()
            while not self._has_ended:
                something.clear()
                await something.wait()

    def wait_for_room(
        self, *, timeout_s: float | None = None, given_up: threading.Event | None = None
    ) -> bool:
        """Waits until the run listens: one that begins does at once, so there is no limit."""
        del timeout_s
        return super().wait_for_room(given_up=given_up)

    def _has_room(self) -> bool:
        return self._sink is not None

    def _put(self, item: Received) -> None:
        if self._sink is not None:
            self._sink(item)


class WaitingFrames(_Frames):
    """Frames of a lossless run: whoever adds one waits while the engine is behind.

    Args:
        config: limits on what is taken.
        next_frame_id: gives out frame ids.
        are_photos: each frame is worth a keyframe; False: those of a camera are a video.
    """

    def __init__(
        self, config: SourcesConfig, *, next_frame_id: FrameIds, are_photos: bool = False
    ) -> None:
        super().__init__(config, next_frame_id=next_frame_id, is_live=False, are_photos=are_photos)
        self._waiting: deque[Received] = deque()

    async def frames(self) -> AsyncGenerator[Received, None]:
        """Yields what is added until nothing more is; closing it ends what may be added."""
        something = asyncio.Event()
        with self._waking(something):
            while True:
                something.clear()
                with self._changed:
                    item = self._waiting.popleft() if self._waiting else None
                    self._changed.notify_all()
                    has_ended = self._has_ended
                if item is not None:
                    yield item
                elif has_ended:
                    return
                else:
                    await something.wait()

    def take_unread(self) -> list[Received]:
        """What was added and is not yielded any more, once the iterator is closed."""
        with self._changed:
            unread = list(self._waiting)
            self._waiting.clear()
        return unread

    def _has_room(self) -> bool:
        return len(self._waiting) < _MAX_WAITING

    def _put(self, item: Received) -> None:
        self._waiting.append(item)
        if self._wake is not None:
            self._wake()
