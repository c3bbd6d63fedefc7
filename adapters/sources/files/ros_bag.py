"""A ROS recording as a source: ``.mcap``, ``.db3`` or ``.bag``, or the folder of one."""

from __future__ import annotations

import functools
import math
import os
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.images.decoding import RefusedImage, decode_image, read_image_header, refused_by_size
from adapters.images.intrinsics import IntrinsicsReader
from adapters.install_advice import missing_package
from adapters.live.blocking import iterate_in_thread
from adapters.sources.files.ros_calibrations import (
    TopicCalibration,
    calibration_of_message,
    calibrations_of_cameras,
)
from adapters.sources.files.ros_limits import (
    bound_unindexed_chunks,
    message_unpacker,
    refuse_large_chunks,
    refuse_large_files,
)
from adapters.sources.files.ros_messages import (
    fix_of_position,
    rgb_of_image,
    stamp_s,
)
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.ports import FrameIds
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    GpsReading,
    IntrinsicsPrior,
    Received,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    SourceState,
    TakenFrames,
    Uint8Array,
)

if TYPE_CHECKING:
    from rosbags.highlevel import AnyReader
    from rosbags.interfaces import Connection

BAG_SUFFIXES = frozenset({".mcap", ".db3", ".bag"})

_IMAGE = "sensor_msgs/msg/Image"
_COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
_CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
_POSITION = "sensor_msgs/msg/NavSatFix"
_METADATA = "metadata.yaml"
_MCAP_MAGIC = b"\x89MCAP0\r\n"  # at the start and the end of a file
_BROKEN = (  # what rosbags and lz4 raise where bytes are not what they should be
    struct.error,
    ValueError,
    LookupError,
    AssertionError,
    EOFError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RuntimeError,
)
_LEAST_STEP_S = 1e-6  # between messages of a topic that are recorded at the same time
_MAX_NAMED = 4  # topics that a sentence names


def is_ros_bag(path: Path) -> bool:
    """Whether a path is a ROS recording, by its name, or a folder of one, by its metadata."""
    if path.is_dir():
        try:
            with (path / _METADATA).open("rb") as file:
                return b"rosbag2_bagfile_information" in file.read(4096)
        except OSError:
            return False
    return path.suffix.lower() in BAG_SUFFIXES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Camera:
    """One camera of a recording."""

    number: int
    topic: str  # of its images
    name: str  # without what says how they are encoded
    calibration: TopicCalibration | None  # its own

    def prior_of_size(self, size: tuple[int, int]) -> IntrinsicsPrior | None:
        """The calibration of its images of this width and height in px."""
        known = self.calibration
        if known is None or isinstance(known.raw, str) or known.size not in {None, size}:
            return None
        return known.raw


class RosBag:
    """The images of a recording in the order in which they were recorded.

    Each camera is a camera of its own; of one whose images are recorded in two ways the compressed
    ones are taken. Its calibration is that of the first CameraInfo in its namespace, where it is
    the only camera there. Positions (NavSatFix) come as readings, of the topic that has most. Times
    are those of the headers, else of the recording, and grow. ``index`` counts the images of all
    cameras; of each camera every n-th is taken. What is left out (depth, images of other topics,
    calibrations that do not fit) is reported in a notice.
    """

    def __init__(self, path: Path, *, config: SourcesConfig, next_frame_id: FrameIds) -> None:
        """Opens the recording once, to see which cameras it has.

        Args:
            path: a file, or the folder with ``metadata.yaml``.
            config: limits on what is taken, and which topics.
            next_frame_id: gives out frame ids; called on the thread that decodes.

        Raises:
            AdapterUnavailableError: rosbags is not installed.
            SourceError: it cannot be read, is too large unpacked, or holds no images.
        """
        self._path = path
        self._config = config
        self._next_frame_id = next_frame_id
        self._is_size_checked = False
        self._unpack: Callable[[bytes], bytes] = bytes
        with self._reader() as reader:
            images = _image_connections(reader, patterns=config.topics)
            if not images:
                raise SourceError(f"{path}: {_no_images(reader, config.topics)}")
            self._position_topic, other_positions = _position_topics(reader)
            self._left_out = [*_left_out(reader, images), *other_positions]
            calibrations, self._doubts = calibrations_of_cameras(
                [_camera_name(connection.topic) for connection in images],
                all_names=_image_names(reader),
                calibrations=_calibrations(reader, path=path, unpack=self._unpack),
            )
            self._cameras = {
                connection.topic: _Camera(
                    number=number,
                    topic=connection.topic,
                    name=_camera_name(connection.topic),
                    calibration=calibrations.get(_camera_name(connection.topic)),
                )
                for number, connection in enumerate(images, start=1)
            }
            num_taken = sum(
                -(-connection.msgcount // config.every_nth_frame)
                for connection in reader.connections
                if connection.topic in self._cameras
            )
        self._taken = TakenFrames(names={}, captured_at_s={})
        self._misfits: set[str] = set()  # topics with images of which the calibration is not
        self._intrinsics = IntrinsicsReader()
        self.info = SourceInfo(
            label=str(path),
            is_live=False,
            is_sequence=True,
            num_frames=min(num_taken, config.max_frames or num_taken),
            has_many_cameras=len(images) > 1,
        )

    @property
    def fingerprint(self) -> str:
        """Size and time of its files."""
        try:
            files = sorted(self._path.iterdir()) if self._path.is_dir() else [self._path]
            states = [file.stat() for file in files if not file.is_dir()]
        except OSError:
            return ""
        return " ".join(f"{state.st_size} {state.st_mtime_ns}" for state in states)

    def leave_out(self, taken: TakenFrames) -> list[str]:
        """Leaves out images by their indices; the recording is read from its start."""
        self._taken = taken
        num_left = max((self.info.num_frames or 0) - len(taken.names), 0)
        self.info = replace(self.info, num_frames=num_left)
        if taken.fingerprint and taken.fingerprint != self.fingerprint:
            return [f"{self._path}: another recording than before; it goes on where that stopped"]
        return []

    def frames(self) -> AsyncGenerator[Received, None]:
        """Yields the images and positions, read on a thread as they are asked for."""
        return iterate_in_thread(self._read, name=f"recording {self._path.name}")

    def _read(self, stop: threading.Event) -> Generator[Received, None, None]:
        for sentence in (*self._left_out, *self._doubts):
            yield self._notice(sentence)
        unusable: dict[str, int] = {}
        clocks: defaultdict[str, _TopicClock] = defaultdict(_TopicClock)
        odd: set[str] = set()  # topics whose stamps turned out to be of no use
        with self._reader() as reader:
            wanted = [
                connection
                for connection in reader.connections
                if connection.topic == self._position_topic or connection.topic in self._cameras
            ]
            index = 0
            num_seen = dict.fromkeys(self._cameras, 0)
            for connection, recorded_ns, raw in _messages(
                reader, wanted, path=self._path, unpack=self._unpack
            ):
                if stop.is_set():
                    return
                topic, clock = connection.topic, clocks[connection.topic]
                if topic == self._position_topic:
                    reading = self._reading(reader, connection, raw, clock=clock, at_ns=recorded_ns)
                    if isinstance(reading, str):
                        unusable[reading] = unusable.get(reading, 0) + 1
                    else:
                        yield reading
                else:
                    if num_seen[topic] % self._config.every_nth_frame == 0:
                        yield from self._image(
                            reader,
                            connection,
                            raw,
                            index=index,
                            clock=clock,
                            at_ns=recorded_ns,
                        )
                    num_seen[topic] += 1
                    index += 1
                if clock.is_odd and topic not in odd:
                    odd.add(topic)
                    yield self._notice(
                        f"{topic}: its stamps do not grow; times are the recording's"
                    )
        for reason, number in unusable.items():
            yield self._notice(f"{number} positions are not used: {reason}")

    def _notice(self, sentence: str) -> SourceNotice:
        return SourceNotice(source=self.info.label, state=SourceState.CONNECTED, detail=sentence)

    def _reading(
        self,
        reader: AnyReader,
        connection: Connection,
        raw: bytes,
        *,
        clock: _TopicClock,
        at_ns: int,
    ) -> GpsReading | str:
        message = _deserialized(reader, connection, raw)
        if isinstance(message, str):
            return message
        fix = fix_of_position(message)
        if isinstance(fix, str):
            return fix
        time_s = clock.tick(stamp_s(message), recorded_at_s=at_ns * 1e-9)
        return GpsReading(source=self.info.label, camera_key=None, captured_at_s=time_s, fix=fix)

    def _image(
        self,
        reader: AnyReader,
        connection: Connection,
        raw: bytes,
        *,
        index: int,
        clock: _TopicClock,
        at_ns: int,
    ) -> Iterator[Received]:
        """An image that was not taken before, and before it what is odd of it."""
        camera = self._cameras[connection.topic]
        is_large = len(raw) > self._config.max_image_bytes
        message = "" if is_large else _deserialized(reader, connection, raw)
        if isinstance(message, str):
            time_s = clock.expected_s(at_ns * 1e-9)
        else:
            time_s = clock.tick(stamp_s(message), recorded_at_s=at_ns * 1e-9)
        if index in self._taken.names:
            return
        pending = _Pending(
            camera=camera, index=index, captured_at_s=time_s, received_at_s=time.monotonic()
        )
        if is_large:
            yield self._rejected(pending, DropReason.TOO_LARGE, f"{len(raw) / 1e6:.3g} MB")
            return
        if isinstance(message, str):
            yield self._rejected(pending, DropReason.UNREADABLE, message)
            return
        if sentence := self._misfit(camera, message):
            yield self._notice(sentence)
        yield Arrival(
            source=self.info.label,
            index=index,
            name=pending.name,
            captured_at_s=time_s,
            num_bytes=len(raw),
            decode=functools.partial(self._frame, pending, message),
            lane=camera.topic if self.info.has_many_cameras else "",
            origin=camera.topic,
        )

    def _misfit(self, camera: _Camera, message: Any) -> str:
        """Why the calibration of a camera is not that of its images; "": it is, or was said."""
        known = camera.calibration
        if known is None or known.size is None or camera.topic in self._misfits:
            return ""
        size = _size_of(message)
        if size is None or size == known.size:
            return ""
        self._misfits.add(camera.topic)
        wanted, had = ("{} x {} px".format(*one) for one in (known.size, size))
        return f"{known.topic} is not used: it is for {wanted}, and {camera.topic} has {had}"

    def _frame(self, pending: _Pending, message: Any) -> Frame | RejectedFrame:
        camera, jpeg = pending.camera, None
        pixels: Uint8Array
        prior: IntrinsicsPrior | None
        if hasattr(message, "format"):
            image = decode_image(bytes(message.data), config=self._config)
            if isinstance(image, RefusedImage):
                detail = f"{image.detail} ({message.format})" if message.format else image.detail
                return self._rejected(pending, image.reason, detail)
            pixels, jpeg, prior = image.pixels, image.jpeg, self._intrinsics.of_image(image)
        else:
            refused = refused_by_size(message.width, message.height, config=self._config)
            if refused is not None:
                return self._rejected(pending, refused.reason, refused.detail)
            converted = rgb_of_image(message)
            if isinstance(converted, str):
                return self._rejected(pending, DropReason.UNREADABLE, converted)
            pixels, prior = converted, self._intrinsics.of_pixels(converted)
        height, width = pixels.shape[:2]
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=f"{camera.name}|{width}x{height}",
            source=self.info.label,
            index=pending.index,
            name=pending.name,
            captured_at_s=pending.captured_at_s,
            received_at_s=pending.received_at_s,
            pixels=pixels,
            jpeg=jpeg,
            intrinsics_prior=camera.prior_of_size((width, height)) or prior,
        )

    def _rejected(self, pending: _Pending, reason: DropReason, detail: str) -> RejectedFrame:
        return RejectedFrame(
            source=self.info.label,
            index=pending.index,
            name=pending.name,
            captured_at_s=pending.captured_at_s,
            reason=reason,
            detail=f"{pending.camera.topic}: {detail}",
        )

    @contextmanager
    def _reader(self) -> Iterator[AnyReader]:
        """The opened recording.

        Raises:
            AdapterUnavailableError: rosbags is not installed.
            SourceError: it cannot be read, or is too large unpacked.
        """
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise missing_package("ROS recordings", package="rosbags", extra="ros") from error
        default = get_typestore(Stores.ROS2_HUMBLE)  # older .db3 files have no definitions
        with _errors_of(self._path):
            if self._path.is_dir() and not self._is_size_checked:
                refuse_large_files(self._path, metadata=_METADATA)
            self._is_size_checked = True
            bound_unindexed_chunks()
            reader = AnyReader([self._path], default_typestore=default)
            reader.open()
        try:
            with _errors_of(self._path):
                limit = self._config.max_image_bytes
                refuse_large_chunks(reader, path=self._path, max_image_bytes=limit)
                self._unpack = message_unpacker(reader, at_most=limit)
            yield reader
        finally:
            reader.close()


class _TopicClock:
    """Times of the messages of one topic in s, strictly increasing.

    They are the headers' up to the first one that is missing or does not grow, and from there on
    those of the recording, moved so that they go on.
    """

    def __init__(self) -> None:
        self.is_odd = False  # whether stamps turned out to be of no use
        self._is_of_headers = True
        self._last_s = -math.inf
        self._recorded_at_s = 0.0

    def tick(self, stamp: float | None, *, recorded_at_s: float) -> float:
        """The time of the next message.

        Args:
            stamp: of its header in s; None: it has none.
            recorded_at_s: when it was recorded.
        """
        if self._is_of_headers:
            if stamp is not None and stamp > self._last_s:
                self._last_s, self._recorded_at_s = stamp, recorded_at_s
                return stamp
            self.is_odd = self._last_s > -math.inf
            self._is_of_headers = False
        elif stamp is not None:
            self.is_odd = True
        self._last_s, self._recorded_at_s = self.expected_s(recorded_at_s), recorded_at_s
        return self._last_s

    def expected_s(self, recorded_at_s: float) -> float:
        """The time of the next message by when it was recorded."""
        if self._last_s == -math.inf:
            return recorded_at_s
        passed_s = recorded_at_s - self._recorded_at_s
        return self._last_s + max(passed_s, _LEAST_STEP_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """What is known of an image that is not decoded yet."""

    camera: _Camera
    index: int
    captured_at_s: float
    received_at_s: float

    @property
    def name(self) -> str:
        """The frame's, made from nothing that the recording says."""
        return f"camera{self.camera.number:02d}/{self.index:06d}.jpg"


@functools.cache
def _reader_errors() -> tuple[type[Exception], ...]:
    """What rosbags and the packages beneath it raise on purpose."""
    from rosbags.highlevel import AnyReaderError
    from rosbags.rosbag1 import ReaderError as Ros1Error
    from rosbags.rosbag2 import ReaderError as Ros2Error

    errors: list[type[Exception]] = [AnyReaderError, Ros1Error, Ros2Error]
    with suppress(ImportError):  # other versions of rosbags read .db3 by another package
        import apsw

        errors.append(apsw.Error)
    with suppress(ImportError):
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        errors.append(zstd.ZstdError)
    return tuple(errors)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns what broken recordings raise into source errors.

    Raises:
        SourceError: the recording cannot be read.
    """
    try:
        yield
    except _reader_errors() as error:
        raise SourceError(_cut_off(path) or f"{path}: cannot be read: {error}") from error
    except OSError as error:
        words = f"{path}: cannot be read: {error.strerror or error}"
        raise SourceError(_cut_off(path) or words) from error
    except _BROKEN as error:
        words = f"{path}: is broken: {type(error).__name__}: {error}"
        raise SourceError(_cut_off(path) or words) from error


def _cut_off(path: Path) -> str:
    """What to do about a recording of which an MCAP file lacks its end; "": none does."""
    for file in sorted(path.glob("*.mcap")) if path.is_dir() else [path]:
        if _lacks_its_end(file):
            instead = " and put that in its place" if path.is_dir() else ""
            return (
                f"{file}: its end is missing: the recording was not closed, or not copied whole;"
                f" what is there can be had: mcap recover {file} -o OTHER.mcap{instead}"
            )
    return ""


def _lacks_its_end(file: Path) -> bool:
    """Whether a file begins as MCAP and does not end so."""
    if not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            if opened.read(len(_MCAP_MAGIC)) != _MCAP_MAGIC:
                return False
            opened.seek(-len(_MCAP_MAGIC), os.SEEK_END)
            is_alone = opened.tell() == 0
            return is_alone or opened.read() != _MCAP_MAGIC
    except OSError:
        return False


def _messages(
    reader: AnyReader,
    connections: list[Connection],
    *,
    path: Path,
    unpack: Callable[[bytes], bytes],
) -> Generator[tuple[Connection, int, bytes], None, None]:
    """The messages of some topics, in order.

    Raises:
        SourceError: the recording breaks off.
    """
    messages = reader.messages(connections=connections)
    while True:
        with _errors_of(path):
            message = next(messages, None)
            if message is None:
                return
            connection, recorded_ns, raw = message
            unpacked = unpack(raw)
        yield connection, recorded_ns, unpacked


def _deserialized(reader: AnyReader, connection: Connection, raw: bytes) -> Any:
    """A message, or why it cannot be read."""
    from rosbags.highlevel import AnyReaderError

    try:
        return reader.deserialize(raw, connection.msgtype)
    except (AnyReaderError, *_BROKEN) as error:
        return f"a broken message: {type(error).__name__}"


def _image_connections(reader: AnyReader, *, patterns: tuple[str, ...]) -> list[Connection]:
    """One connection of each camera that is wanted, by topic."""
    chosen: dict[str, Connection] = {}
    for connection in sorted(reader.connections, key=lambda one: one.topic):
        if not connection.msgcount or not _is_wanted(connection, patterns):
            continue
        name = _camera_name(connection.topic)
        if name not in chosen or connection.msgtype == _COMPRESSED_IMAGE:
            chosen[name] = connection
    return sorted(chosen.values(), key=lambda one: one.topic)


def _is_wanted(connection: Connection, patterns: tuple[str, ...]) -> bool:
    if connection.msgtype not in {_IMAGE, _COMPRESSED_IMAGE}:
        return False
    if patterns:
        return any(fnmatchcase(connection.topic, pattern) for pattern in patterns)
    return "depth" not in connection.topic.lower()


def _camera_name(topic: str) -> str:
    """A topic without the transport at its end: /front/image_raw of /front/image_raw/compressed."""
    return topic.removesuffix("/compressed")


def _image_names(reader: AnyReader) -> list[str]:
    """The names of all cameras that have images, wanted or not."""
    return sorted(
        {_camera_name(one.topic) for one in reader.connections if _is_image(one) and one.msgcount}
    )


def _no_images(reader: AnyReader, patterns: tuple[str, ...]) -> str:
    images = _named([one.topic for one in reader.connections if _is_image(one)])
    if images and patterns:
        return (
            f"no topic of images is named {', '.join(patterns)} (sources.topics); it has {images}"
        )
    if images:
        return f"only depth images, or topics without messages: {images}"
    return f"no images in it; its topics: {_named([one.topic for one in reader.connections])}"


def _is_image(connection: Connection) -> bool:
    return connection.msgtype in {_IMAGE, _COMPRESSED_IMAGE} or "Image" in connection.msgtype


def _left_out(reader: AnyReader, chosen: list[Connection]) -> list[str]:
    """A sentence on topics with images that are not taken."""
    taken = {connection.topic for connection in chosen}
    others = {
        one.topic: one.msgcount
        for one in reader.connections
        if one.topic not in taken and (_is_image(one) or "CompressedVideo" in one.msgtype)
    }
    if not others:
        return []
    number = sum(others.values())
    return [f"left out: {number} images of {_named(sorted(others))}; sources.topics chooses others"]


def _position_topics(reader: AnyReader) -> tuple[str | None, list[str]]:
    """The topic of positions with the most messages, and a sentence on the others."""
    counts: dict[str, int] = {}
    for one in reader.connections:
        if one.msgtype == _POSITION and one.msgcount:
            counts[one.topic] = counts.get(one.topic, 0) + one.msgcount
    if len(counts) <= 1:
        return next(iter(counts), None), []
    first, *others = sorted(counts, key=lambda topic: (-counts[topic], topic))
    return first, [f"left out: positions of {_named(others)}; those of {first} are taken"]


def _named(topics: list[str]) -> str:
    more = f" and {len(topics) - _MAX_NAMED} more" if len(topics) > _MAX_NAMED else ""
    return ", ".join(topics[:_MAX_NAMED]) + more


def _calibrations(
    reader: AnyReader, *, path: Path, unpack: Callable[[bytes], bytes]
) -> list[TopicCalibration]:
    """What the first message of each topic of CameraInfo says."""
    found = []
    for topic, connection in sorted({one.topic: one for one in reader.connections}.items()):
        if connection.msgtype != _CAMERA_INFO or not connection.msgcount:
            continue
        message: Any
        try:
            first = next(_messages(reader, [connection], path=path, unpack=unpack), None)
        except SourceError as error:
            message = str(error)
        else:
            message = _deserialized(reader, connection, first[2]) if first else "it is empty"
        found.append(calibration_of_message(topic, message))
    return found


def _size_of(message: Any) -> tuple[int, int] | None:
    """Width and height of an image in px; None: it does not say, or in a way that is not read."""
    if not hasattr(message, "format"):
        return int(message.width), int(message.height)
    header = read_image_header(bytes(message.data))
    return None if header is None else (header.width, header.height)
