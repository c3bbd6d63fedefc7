"""Frames that a program hands over, as a source of a run."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass

import numpy as np

from adapters.images.decoding import RefusedImage, decode_image, refused_by_size
from adapters.images.intrinsics import IntrinsicsReader
from adapters.live.blocking import iterate_in_thread
from engine.config import SourcesConfig
from engine.errors import EngineError
from engine.ports import ArrivalSink, FrameIds
from engine.types import (
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
_LOOK_PERIOD_S = 0.2  # for whether the run stopped, while nothing is added
_LABEL = "python"


class RunEndedError(EngineError):
    """A frame is handed to a run that takes no more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HandedFrame:
    """A frame as a program hands it over."""

    image: Uint8Array | bytes  # (H, W, 3) RGB, upright; or an encoded image
    camera: str
    captured_at_s: float
    gps: GpsFix | None = None
    intrinsics: IntrinsicsPrior | None = None
    mask: BoolArray | None = None  # (H, W), True where a pixel may be used


class _Frames:
    """What lossless and live runs have in common: numbers, names and decoding."""

    def __init__(self, config: SourcesConfig, *, next_frame_id: FrameIds, is_live: bool) -> None:
        self.info = SourceInfo(
            label=_LABEL,
            is_live=is_live,
            is_sequence=True,
            num_frames=None,
            has_many_cameras=True,
        )
        self._config = config
        self._next_frame_id = next_frame_id
        self._lock = threading.Lock()
        self._num_frames = 0
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
        index = self._num_frames
        self._num_frames += 1
        if handed.camera not in self._names:
            self._names.append(handed.camera)
        number = self._names.index(handed.camera) + 1
        received_at_s = time.monotonic()
        is_encoded = isinstance(handed.image, bytes)
        name = f"camera{number:02d}/{index:06d}.{'jpg' if is_encoded else 'png'}"

        def decode() -> Frame | RejectedFrame:
            decoded = self._decode(handed, index=index, name=name, received_at_s=received_at_s)
            if isinstance(decoded, RefusedImage):
                return arrival.rejected(decoded.reason, decoded.detail)
            return decoded

        arrival = Arrival(
            source=self.info.label,
            index=index,
            name=name,
            captured_at_s=handed.captured_at_s,
            num_bytes=len(handed.image) if is_encoded else np.asarray(handed.image).nbytes,
            decode=decode,
            lane=handed.camera,
            origin=f"camera {handed.camera!r}",
        )
        return arrival

    def _decode(
        self, handed: HandedFrame, *, index: int, name: str, received_at_s: float
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
            captured_at_s=handed.captured_at_s,
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
        with self._lock:
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

    def _reading(self, fix: GpsFix, *, captured_at_s: float, camera: str | None) -> GpsReading:
        return GpsReading(
            source=self.info.label, camera_key=camera, captured_at_s=captured_at_s, fix=fix
        )


class LiveFrames(_Frames):
    """Frames of a live run: neither waits for the other, and of each camera the newest wins."""

    def __init__(self, config: SourcesConfig, *, next_frame_id: FrameIds) -> None:
        super().__init__(config, next_frame_id=next_frame_id, is_live=True)
        self._sink: ArrivalSink | None = None
        self._is_open = threading.Event()  # or has ended before that
        self._end: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_ended = False

    async def receive(self, sink: ArrivalSink) -> None:
        """Hands over what is added until nothing more is."""
        with self._lock:
            if self._has_ended:
                return
            self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
            self._sink = sink
        self._is_open.set()
        await self._end.wait()

    def add(self, handed: HandedFrame, *, timeout_s: float | None = None) -> int:
        """Adds a frame and returns its index; waits until the run listens, and then no more.

        Raises:
            RunEndedError: the run takes no more.
        """
        del timeout_s  # a run that begins listens at once
        self._is_open.wait()
        with self._lock:
            arrival = self._arrival(handed)
            self._put(arrival)
            return arrival.index

    def add_position(self, fix: GpsFix, *, captured_at_s: float, camera: str | None) -> None:
        """Adds a position.

        Raises:
            RunEndedError: the run takes no more.
        """
        self._is_open.wait()
        with self._lock:
            self._put(self._reading(fix, captured_at_s=captured_at_s, camera=camera))

    def end(self) -> None:
        """Adds nothing more."""
        with self._lock:
            self._has_ended = True
            if self._loop is not None and self._end is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._end.set)
        self._is_open.set()

    def _put(self, item: Received) -> None:
        if self._has_ended or self._sink is None:
            raise RunEndedError("the run takes no more frames")
        self._sink(item)


class WaitingFrames(_Frames):
    """Frames of a lossless run: whoever adds one waits while the engine is behind."""

    def __init__(self, config: SourcesConfig, *, next_frame_id: FrameIds) -> None:
        super().__init__(config, next_frame_id=next_frame_id, is_live=False)
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Received] = deque()
        self._has_ended = False

    def frames(self) -> AsyncGenerator[Received, None]:
        """Yields what is added until nothing more is."""
        return iterate_in_thread(self._items, name="added frames")

    def add(self, handed: HandedFrame, *, timeout_s: float | None = None) -> int:
        """Adds a frame and returns its index; waits while too many wait.

        Raises:
            TimeoutError: there was no room in time; the frame was not added.
            RunEndedError: the run takes no more.
        """
        with self._changed:
            self._wait_for_room(timeout_s)
            arrival = self._arrival(handed)
            self._put(arrival)
            return arrival.index

    def add_position(self, fix: GpsFix, *, captured_at_s: float, camera: str | None) -> None:
        """Adds a position; waits like a frame.

        Raises:
            RunEndedError: the run takes no more.
        """
        with self._changed:
            self._wait_for_room(None)
            self._put(self._reading(fix, captured_at_s=captured_at_s, camera=camera))

    def end(self) -> None:
        """Adds nothing more; what waits is still taken."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _wait_for_room(self, timeout_s: float | None) -> None:
        if not self._changed.wait_for(
            lambda: self._has_ended or len(self._waiting) < _MAX_WAITING, timeout_s
        ):
            raise TimeoutError(f"the run took no frame for {timeout_s:g} s")

    def _put(self, item: Received) -> None:
        if self._has_ended:
            raise RunEndedError("the run takes no more frames")
        self._waiting.append(item)
        self._changed.notify_all()

    def _items(self, stop: threading.Event) -> Generator[Received, None, None]:
        while True:
            with self._changed:
                while not self._changed.wait_for(
                    lambda: self._waiting or self._has_ended, _LOOK_PERIOD_S
                ):
                    if stop.is_set():
                        return
                if not self._waiting:
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
