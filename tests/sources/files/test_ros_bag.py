"""ROS recordings as sources: images, calibrations and positions of all three kinds of files."""

from __future__ import annotations

import asyncio
import bz2
import itertools
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: tools/setup ros")

from lz4.frame import compress as lz4_compress  # type: ignore[import-untyped]

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.rosbag2 import Writer as Ros2Writer
from rosbags.typesys import Stores, get_typestore

from adapters.sources.files import ros_limits
from adapters.sources.files.ros_bag import RosBag, is_ros_bag
from adapters.sources.files.ros_messages import fix_of_position, rgb_of_image
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.ports import ResumableSource
from engine.types import (
    DropReason,
    Frame,
    FrameId,
    GpsFix,
    GpsReading,
    RejectedFrame,
    SourceNotice,
    TakenFrames,
    Uint8Array,
)
from tests.support.received import items_of

ROS2 = get_typestore(Stores.ROS2_HUMBLE)
ROS1 = get_typestore(Stores.ROS1_NOETIC)
SIZE = (80, 72)  # width, height, px
INFLATED_BYTES = 40_000_000


def picture(number: int) -> Uint8Array:
    """A smooth image whose colours say which one it is."""
    x, y = np.meshgrid(np.linspace(0, 200, SIZE[0]), np.linspace(0, 120, SIZE[1]))
    return np.dstack([x, y, np.full_like(x, 10 * number)]).astype(np.uint8)


def jpeg(number: int) -> bytes:
    """The same as a JPEG."""
    return cv2.imencode(".jpg", cv2.cvtColor(picture(number), cv2.COLOR_RGB2BGR))[1].tobytes()


@dataclass
class Recording:
    """Makes messages of either ROS and writes them, one every 0.1 s."""

    is_ros1: bool = False
    messages: list[tuple[str, str, Any]] = field(default_factory=list)

    @property
    def types(self) -> Any:
        """Message classes by name."""
        return (ROS1 if self.is_ros1 else ROS2).types

    def header(self, time_s: float) -> Any:
        seconds, fraction = divmod(time_s, 1.0)
        stamp = self.types["builtin_interfaces/msg/Time"](
            sec=int(seconds), nanosec=round(fraction * 1e9)
        )
        sequence = {"seq": 0} if self.is_ros1 else {}
        return self.types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera", **sequence)

    def add(self, topic: str, kind: str, **fields: Any) -> None:
        name = f"sensor_msgs/msg/{kind}"
        self.messages.append((topic, name, self.types[name](**fields)))

    def add_compressed(self, number: int, topic: str = "/front/image_raw/compressed") -> None:
        self.add(
            topic,
            "CompressedImage",
            header=self.header(100.0 + number / 10),
            format="rgb8; jpeg compressed bgr8",
            data=np.frombuffer(jpeg(number), np.uint8),
        )

    def add_image(
        self, number: int, topic: str, *, encoding: str = "rgb8", data: Uint8Array | None = None
    ) -> None:
        pixels = picture(number) if data is None else data
        self.add(
            topic,
            "Image",
            header=self.header(100.0 + number / 10),
            height=SIZE[1],
            width=SIZE[0],
            encoding=encoding,
            is_bigendian=0,
            step=pixels.nbytes // SIZE[1],
            data=pixels.reshape(-1).view(np.uint8),
        )

    def add_camera_info(self, topic: str, model: str, distortion: Sequence[float]) -> None:
        roi = self.types["sensor_msgs/msg/RegionOfInterest"](
            x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
        )
        matrices = {
            "d": np.array(distortion, float),
            "k": np.array([70.0, 0, 39.5, 0, 71.0, 35.5, 0, 0, 1]),
            "r": np.eye(3).reshape(-1),
            "p": np.array([60.0, 0, 37.5, 0, 0, 61.0, 33.5, 0, 0, 0, 1, 0]),
        }
        if self.is_ros1:
            matrices = {key.upper(): value for key, value in matrices.items()}
        self.add(
            topic,
            "CameraInfo",
            header=self.header(100.0),
            height=SIZE[1],
            width=SIZE[0],
            distortion_model=model,
            binning_x=0,
            binning_y=0,
            roi=roi,
            **matrices,
        )

    def add_position(
        self, number: int, *, topic: str = "/fix", status: int = 0, altitude_m: float = 30.0
    ) -> None:
        self.add(topic, "NavSatFix", **self.position(number, status, altitude_m))

    def position(self, number: int, status: int, altitude_m: float) -> dict[str, Any]:
        return {
            "header": self.header(100.0 + number / 10),
            "status": self.types["sensor_msgs/msg/NavSatStatus"](status=status, service=1),
            "latitude": 47.0 + number * 1e-5,
            "longitude": 8.0,
            "altitude": altitude_m,
            "position_covariance": np.diag([4.0, 4.0, 9.0]).reshape(-1),
            "position_covariance_type": 2,
        }

    def write(self, path: Path, *, storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
        """The file, or the folder of a ROS 2 recording."""
        if self.is_ros1:
            with Ros1Writer(path) as bag:
                self._write(bag, ROS1.serialize_ros1, ROS1)
        else:
            with Ros2Writer(path, version=9, storage_plugin=storage) as bag:
                self._write(bag, ROS2.serialize_cdr, ROS2)
        return path

    def _write(self, bag: Any, serialize: Any, typestore: Any) -> None:
        connections: dict[str, Any] = {}
        for number, (topic, name, message) in enumerate(self.messages):
            if topic not in connections:
                connections[topic] = bag.add_connection(topic, name, typestore=typestore)
            recorded_ns = 200_000_000_000 + number * 100_000_000
            bag.write(connections[topic], recorded_ns, serialize(message, name))


def bag_of(path: Path, **settings: Any) -> RosBag:
    counter = itertools.count(1)
    return RosBag(
        path, config=SourcesConfig(**settings), next_frame_id=lambda: FrameId(next(counter))
    )


def received(path: Path, **settings: Any) -> list[Any]:
    """All that a recording gives, decoded."""
    return items_from(bag_of(path, **settings))


def items_from(bag: RosBag) -> list[Any]:
    async def all_of() -> list[Any]:
        return [item async for item in items_of(bag)]

    return asyncio.run(all_of())


def frames_of(items: Sequence[Any]) -> list[Frame]:
    return [item for item in items if isinstance(item, Frame)]


@pytest.mark.parametrize("kind", ["mcap", "db3", "bag", "mcap file", "db3 file"])
def test_each_kind_of_recording_gives_images_calibrations_and_positions(
    tmp_path: Path, kind: str
) -> None:
    recording = Recording(is_ros1=kind == "bag")
    for number in range(3):
        recording.add_compressed(number)
        recording.add_position(number)
    recording.add_camera_info("/front/camera_info", "plumb_bob", [0.1, -0.05, 1e-3, 2e-3, 0.0])
    storage = StoragePlugin.SQLITE3 if "db3" in kind else StoragePlugin.MCAP
    path = recording.write(tmp_path / ("walk.bag" if kind == "bag" else "walk"), storage=storage)
    if "file" in kind:
        (path,) = path.glob(f"*.{kind.split(maxsplit=1)[0]}")
    assert is_ros_bag(path)
    items = received(path)
    frames = frames_of(items)
    readings = [item for item in items if isinstance(item, GpsReading)]
    assert [frame.captured_at_s for frame in frames] == pytest.approx([100.0, 100.1, 100.2])
    assert [frame.jpeg for frame in frames] == [jpeg(number) for number in range(3)]
    assert np.abs(frames[2].pixels.astype(int) - picture(2)).mean() < 3.0
    prior = frames[0].intrinsics_prior
    assert prior is not None
    assert prior.camera_model == "OPENCV"
    assert prior.params == (70.0, 71.0, 40.0, 36.0, 0.1, -0.05, 1e-3, 2e-3)
    assert [reading.fix.latitude_deg for reading in readings] == [47.0, 47.00001, 47.00002]
    assert readings[0].fix.accuracy_m == 2.0
    assert readings[1].captured_at_s == pytest.approx(100.1)


def test_cameras_are_told_apart_and_each_is_read_once(tmp_path: Path) -> None:
    recording = Recording()
    for number in range(2):
        recording.add_compressed(number)
        recording.add_image(number, "/front/image_raw")  # the same once more
        recording.add_image(number, "/back/image_raw")
        recording.add_image(
            number,
            "/back/depth/image_raw",
            encoding="16UC1",
            data=np.zeros((SIZE[1], SIZE[0], 2), np.uint8),
        )
    recording.add_camera_info("/back/camera_info", "equidistant", [0.1, 0.2, 0.3, 0.4])
    path = recording.write(tmp_path / "walk")
    items = received(path)
    frames = frames_of(items)
    assert {frame.camera_key for frame in frames} == {
        "/front/image_raw|80x72",
        "/back/image_raw|80x72",
    }
    assert len(frames) == 4
    assert {frame.name for frame in frames} == {
        *(f"camera01/{index:06d}.jpg" for index in (1, 3)),
        *(f"camera02/{index:06d}.jpg" for index in (0, 2)),
    }
    models = {
        frame.camera_key: frame.intrinsics_prior and frame.intrinsics_prior.camera_model
        for frame in frames
    }
    assert models == {"/front/image_raw|80x72": None, "/back/image_raw|80x72": "OPENCV_FISHEYE"}
    (notice,) = (item for item in items if isinstance(item, SourceNotice))
    assert notice.detail == (
        "left out: 4 images of /back/depth/image_raw, /front/image_raw; sources.topics chooses"
        " others"
    )
    chosen = frames_of(received(path, topics=("/front/*",)))
    assert len(chosen) == 2
    assert len({frame.camera_key for frame in chosen}) == 1


def test_of_each_camera_every_nth_image_is_taken(tmp_path: Path) -> None:
    recording = Recording()
    for number in range(6):
        recording.add_compressed(number, ("/left/image", "/right/image")[number % 2])
    frames = frames_of(received(recording.write(tmp_path / "walk"), every_nth_frame=2))
    assert [(frame.camera_key, frame.index) for frame in frames] == [
        ("/left/image|80x72", 0),
        ("/right/image|80x72", 1),
        ("/left/image|80x72", 4),
        ("/right/image|80x72", 5),
    ]


def notices_of(items: Sequence[Any]) -> list[str]:
    return [item.detail for item in items if isinstance(item, SourceNotice)]


def test_rectified_images_have_the_matrix_of_rectified_images(tmp_path: Path) -> None:
    recording = Recording()
    recording.add_compressed(0, "/front/image_rect_color/compressed")
    recording.add_compressed(1, "/side/direct_image/compressed")
    recording.add_camera_info("/front/camera_info", "plumb_bob", [0.1, -0.05, 1e-3, 2e-3, 0.0])
    recording.add_camera_info("/side/camera_info", "plumb_bob", [0.1, -0.05, 1e-3, 2e-3, 0.0])
    items = received(recording.write(tmp_path / "walk"))
    front, side = (frame.intrinsics_prior for frame in frames_of(items))
    assert front is not None
    assert (front.camera_model, front.params) == ("PINHOLE", (60.0, 61.0, 38.0, 34.0))
    assert side is not None
    assert side.camera_model == "OPENCV"
    assert notices_of(items) == []


def test_a_calibration_of_another_size_is_not_used_and_reported_once(tmp_path: Path) -> None:
    recording = Recording()
    for number in range(2):
        recording.add_compressed(number)
    recording.add_camera_info("/front/camera_info", "plumb_bob", [0.0])
    recording.messages[-1][2].width = 160
    items = received(recording.write(tmp_path / "walk"))
    assert [frame.intrinsics_prior for frame in frames_of(items)] == [None, None]
    assert notices_of(items) == [
        "/front/camera_info is not used: it is for 160 x 72 px, and /front/image_raw/compressed has"
        " 80 x 72 px"
    ]


def test_a_calibration_beside_several_cameras_is_that_of_none(tmp_path: Path) -> None:
    recording = Recording()
    recording.add_compressed(0, "/device/colour/compressed")
    recording.add_compressed(1, "/device/infrared/compressed")
    recording.add_camera_info("/device/camera_info", "plumb_bob", [0.0])
    path = recording.write(tmp_path / "walk")
    for topics in ((), ("/device/infrared/*",)):
        items = received(path, topics=topics)
        assert {frame.intrinsics_prior for frame in frames_of(items)} == {None}
        assert (
            "/device/camera_info is not used: whose it is is not clear beside /device/colour and"
            " /device/infrared"
        ) in notices_of(items)


@pytest.mark.parametrize(
    ("stamps", "times", "is_odd"),
    [
        ((100.0, 100.1, 0.0, 0.1), (100.0, 100.1, 100.2, 100.3), True),  # the clock starts anew
        ((100.0, 100.0, 100.0, 100.0), (100.0, 100.1, 100.2, 100.3), True),
        ((100.0, 0.0, 100.2, 100.3), (100.0, 100.1, 100.2, 100.3), True),  # one is missing
        ((0.0, 100.1, 100.2, 100.3), (200.0, 200.1, 200.2, 200.3), True),
        ((0.0, 0.0, 0.0, 0.0), (200.0, 200.1, 200.2, 200.3), False),
        ((100.0, 103.0, 103.1, 109.0), (100.0, 103.0, 103.1, 109.0), False),
    ],
)
def test_the_times_of_a_topic_grow(
    stamps: Sequence[float], times: Sequence[float], is_odd: bool, tmp_path: Path
) -> None:
    recording = Recording()
    for number, stamp in enumerate(stamps):
        recording.add_compressed(number)
        recording.messages[-1][2].header = recording.header(stamp)
    items = received(recording.write(tmp_path / "walk"))
    assert [frame.captured_at_s for frame in frames_of(items)] == pytest.approx(times)
    sentence = "/front/image_raw/compressed: its stamps do not grow; times are the recording's"
    assert notices_of(items) == [sentence] * is_odd


def test_a_recording_goes_on_after_what_was_taken_and_says_that_it_is_another(
    tmp_path: Path,
) -> None:
    recording = Recording()
    for number, stamp in enumerate((100.0, 0.0, 100.5, 101.0)):
        recording.add_compressed(number)
        recording.messages[-1][2].header = recording.header(stamp)
    path = recording.write(tmp_path / "walk")
    first = bag_of(path)
    frames = frames_of(items_from(first))
    taken = TakenFrames(
        names={frame.index: frame.name for frame in frames[:2]},
        captured_at_s={},
        fingerprint=first.fingerprint,
    )
    again = bag_of(path)
    assert isinstance(again, ResumableSource)
    assert again.leave_out(taken) == []
    assert again.info.num_frames == 2
    rest = frames_of(items_from(again))
    assert [(frame.index, frame.name, frame.captured_at_s) for frame in rest] == [
        (frame.index, frame.name, frame.captured_at_s) for frame in frames[2:]
    ]
    recording.add_compressed(4)
    shutil.rmtree(path)
    (oddity,) = bag_of(recording.write(path)).leave_out(taken)
    assert oddity.endswith("walk: another recording than before; it goes on where that stopped")


def test_what_cannot_be_read_is_said_and_costs_itself(tmp_path: Path) -> None:
    recording = Recording()
    recording.add_compressed(0)
    recording.add(
        "/front/image_raw/compressed",
        "CompressedImage",
        header=recording.header(0.0),
        format="h264",
        data=np.arange(50, dtype=np.uint8),
    )
    recording.add_image(1, "/side/image", encoding="strange7")
    recording.add_position(0, status=-1)
    recording.add_camera_info("/side/camera_info", "plumb_bob", [0.0])
    recording.messages[-1][2].k[:] = 0.0
    items = received(recording.write(tmp_path / "walk"))
    assert len(frames_of(items)) == 1
    rejected = [item for item in items if isinstance(item, RejectedFrame)]
    assert [one.reason for one in rejected] == [DropReason.UNREADABLE] * 2
    assert "h264" in rejected[0].detail
    assert rejected[0].captured_at_s == pytest.approx(100.1)  # the header says nothing
    assert rejected[1].detail == "/side/image: images of encoding strange7 are not read"
    notices = [item.detail for item in items if isinstance(item, SourceNotice)]
    assert notices == [
        "/side/camera_info is not used: the camera is not calibrated",
        "/front/image_raw/compressed: its stamps do not grow; times are the recording's",
        "1 positions are not used: no fix",
    ]


def test_recordings_without_images_or_that_are_broken_are_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    recording = Recording()
    recording.add_position(0)
    with pytest.raises(SourceError, match="no images in it; its topics: /fix"):
        received(recording.write(tmp_path / "positions"))
    recording.add_compressed(0)
    path = recording.write(tmp_path / "walk")
    with pytest.raises(SourceError, match=r"no topic of images is named /back/\*"):
        received(path, topics=("/back/*",))
    (file,) = path.glob("*.mcap")
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SourceError, match=r"cut\.mcap: its end is missing.*: mcap recover .*cut"):
        received(cut)
    file.write_bytes(cut.read_bytes())
    with pytest.raises(SourceError, match="mcap recover .* and put that in its place$"):
        received(path)
    for name in ("empty.mcap", "noise.db3", "noise.bag"):
        noise = tmp_path / name
        noise.write_bytes(b"" if "empty" in name else b"\x01\x02" * 500)
        with pytest.raises(SourceError, match=name):
            received(noise)


def written(path: Path, kind: str) -> Path:
    """The file of a recording with a calibration, images and positions, of a kind in words."""
    recording = Recording(is_ros1=kind.startswith("bag"))
    recording.add_camera_info("/front/camera_info", "plumb_bob", [0.1, -0.05, 1e-3, 2e-3, 0.0])
    for number in range(6):
        recording.add_compressed(number)
        recording.add_position(number)
    suffix, _, packing = kind.partition(" ")
    if recording.is_ros1:
        bag: Any = Ros1Writer(path.with_suffix(".bag"))
        if packing:
            bag.set_compression(Ros1Writer.CompressionFormat[packing.upper()])
        with bag:
            recording._write(bag, ROS1.serialize_ros1, ROS1)
        return path.with_suffix(".bag")
    plugin = StoragePlugin.SQLITE3 if suffix == "db3" else StoragePlugin.MCAP
    bag = Ros2Writer(path, version=9, storage_plugin=plugin)
    if packing:
        bag.set_compression(CompressionMode[packing.upper()], CompressionFormat.ZSTD)
    with bag:
        recording._write(bag, ROS2.serialize_cdr, ROS2)
    return path


@pytest.mark.parametrize(
    "kind",
    ["mcap", "mcap storage", "mcap message", "db3", "db3 message", "bag", "bag bz2", "bag lz4"],
)
def test_damage_anywhere_is_a_source_error_or_costs_what_it_hits(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "walk", kind)
    file = path if path.is_file() else next(one for one in path.iterdir() if "yaml" not in one.name)
    whole = file.read_bytes()
    assert len(frames_of(received(path))) == 6
    num_refused = 0
    for damage in (b"\xff" * 40, bytes(400)):
        for part in range(1, 8):
            start = len(whole) * part // 8
            file.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
            try:
                received(path)
            except SourceError as error:
                num_refused += 1
                assert "walk" in str(error)
    assert num_refused


def test_a_chunk_that_declares_to_be_huge_is_refused(tmp_path: Path) -> None:
    (file,) = written(tmp_path / "walk", "mcap storage").glob("*.mcap")
    data = file.read_bytes()
    place = data.rindex(b"zstd") + 12  # in the index: the packed size, then the unpacked one
    file.write_bytes(data[:place] + (2**40).to_bytes(8, "little") + data[place + 8 :])
    with pytest.raises(SourceError, match="has a chunk of 1.1e"):
        bag_of(tmp_path / "walk")
    bag = written(tmp_path / "ros1", "bag lz4")
    data = bag.read_bytes()
    place = data.index(b"size=") + 5
    bag.write_bytes(data[:place] + b"\xff" * 4 + data[place + 4 :])
    with pytest.raises(SourceError, match="has a chunk of 4.29 GB"):
        bag_of(bag)


def inflated(compress: Callable[[bytes], bytes]) -> Callable[..., bytes]:
    """Compresses far more than it is given."""
    return lambda data, *more: compress(bytes(data) + bytes(INFLATED_BYTES))


@pytest.mark.parametrize("kind", ["mcap storage", "bag bz2", "bag lz4"])
def test_a_chunk_that_unpacks_to_more_than_it_declares_takes_no_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    writers = {
        "mcap storage": ("rosbags.rosbag2.storage_mcap.zstd.compress", zstd.compress),
        "bag bz2": ("rosbags.rosbag1.writer.bz2_compress", bz2.compress),
        "bag lz4": ("rosbags.rosbag1.writer.lz4_compress", lz4_compress),
    }
    target, compress = writers[kind]
    with monkeypatch.context() as patched:
        patched.setattr(target, inflated(compress))
        path = written(tmp_path / "walk", kind)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=r"larger than the \d+ bytes that it declares"):
            received(path)
        assert tracemalloc.get_traced_memory()[1] < INFLATED_BYTES / 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["mcap message", "db3 message"])
def test_a_message_that_unpacks_to_more_than_an_image_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    numbers, pack = itertools.count(), zstd.compress

    def compress(data: bytes) -> bytes:  # the fourth message is the second image
        return pack(bytes(data) + bytes(INFLATED_BYTES if next(numbers) == 3 else 0))

    with monkeypatch.context() as patched:
        patched.setattr("rosbags.rosbag2.writer.zstd.compress", compress)
        path = written(tmp_path / "walk", kind)
    monkeypatch.setattr(SourcesConfig, "max_image_bytes", 100_000)
    tracemalloc.start()
    try:
        items = received(path)
        assert tracemalloc.get_traced_memory()[1] < INFLATED_BYTES / 4
    finally:
        tracemalloc.stop()
    (dropped,) = (item for item in items if isinstance(item, RejectedFrame))
    assert (dropped.index, dropped.reason) == (1, DropReason.TOO_LARGE)
    assert len(frames_of(items)) == 5


def test_a_chunk_that_declares_to_be_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    (file,) = written(tmp_path / "walk", "mcap storage").glob("*.mcap")
    data = file.read_bytes()
    place = data.rindex(b"zstd") + 4  # in the index: the packed size
    file.write_bytes(data[:place] + (2**40).to_bytes(8, "little") + data[place + 8 :])
    with pytest.raises(SourceError, match="it has a chunk that is larger than its file"):
        bag_of(tmp_path / "walk")
    bag = written(tmp_path / "ros1", "bag lz4")
    data = bag.read_bytes()
    place = data.index(b"size=") + 9  # the end of its header: the packed size
    bag.write_bytes(data[:place] + (2**31).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(SourceError, match=r"ros1\.bag: "):
        bag_of(bag)


def test_a_chunk_without_an_index_is_unpacked_up_to_what_it_declares(tmp_path: Path) -> None:
    (file,) = written(tmp_path / "walk", "mcap storage").glob("*.mcap")
    data = file.read_bytes()
    footer = len(data) - 28  # its summary begins nowhere: the file is scanned
    file.write_bytes(data[:footer] + bytes(8) + data[footer + 8 :])
    assert len(frames_of(received(file))) == 6
    place = data.index(b"zstd") - 16  # the size of the chunk, unpacked
    scanned = file.read_bytes()
    for size in (100, 2**40):
        file.write_bytes(scanned[:place] + size.to_bytes(8, "little") + scanned[place + 8 :])
        with pytest.raises(SourceError, match="is broken: ValueError: a chunk"):
            bag_of(file)


def test_files_that_are_compressed_as_a_whole_are_unpacked_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "walk", "db3 file")
    assert len(frames_of(received(path))) == 6
    monkeypatch.setattr(ros_limits, "_MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(SourceError, match="compressed as a whole, and larger than 1e-06 GB"):
        bag_of(path)


def test_a_message_larger_than_any_image_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording()
    recording.add_compressed(0)
    recording.add_image(1, "/side/image")
    path = recording.write(tmp_path / "walk")
    monkeypatch.setattr(SourcesConfig, "max_image_bytes", 9000)
    small, large = received(path)
    assert isinstance(small, Frame)
    assert (large.reason, large.detail) == (DropReason.TOO_LARGE, "/side/image: 0.0173 MB")


@pytest.mark.parametrize(
    ("encoding", "channels"),
    [("bgr8", [2, 1, 0]), ("rgba8", [0, 1, 2, 2]), ("bgra8", [2, 1, 0, 0]), ("mono8", [0])],
)
def test_pixels_of_any_layout_become_rgb(encoding: str, channels: list[int]) -> None:
    pixels = picture(3)
    recording = Recording()
    recording.add_image(3, "/a", encoding=encoding, data=pixels[:, :, channels].copy())
    converted = rgb_of_image(recording.messages[0][2])
    expected = pixels if len(channels) > 1 else np.repeat(pixels[:, :, :1], 3, axis=2)
    assert np.array_equal(converted, expected)


def test_bayer_and_yuv_and_deep_images_become_rgb_too() -> None:
    flat = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    flat[:] = (200, 100, 50)
    mosaic = flat[:, :, 1].copy()
    mosaic[0::2, 0::2], mosaic[1::2, 1::2] = 200, 50  # red first
    recording = Recording()
    recording.add_image(0, "/a", encoding="bayer_rggb8", data=mosaic)
    bayer = rgb_of_image(recording.messages[-1][2])
    assert np.array_equal(np.asarray(bayer)[4:-4, 4:-4], flat[4:-4, 4:-4])
    grey = np.full((SIZE[1], SIZE[0], 2), (128, 90), np.uint8)
    recording.add_image(0, "/a", encoding="yuv422", data=grey)
    yuv = np.asarray(rgb_of_image(recording.messages[-1][2])).astype(int)
    assert np.ptp(yuv) <= 2
    assert 80 < yuv.mean() < 95
    deep = np.full((SIZE[1], SIZE[0]), 0x7F10, "<u2")
    recording.add_image(0, "/a", encoding="mono16", data=deep.view(np.uint8))
    assert np.all(np.asarray(rgb_of_image(recording.messages[-1][2])) == 0x7F)


@pytest.mark.parametrize("bits", [10, 12])
def test_fewer_bits_in_sixteen_are_stretched_until_they_are_seen(bits: int) -> None:
    deep = (picture(0)[:, :, 0].astype("<u2") << 8) >> (16 - bits)
    recording = Recording()
    recording.add_image(0, "/a", encoding="mono16", data=deep.view(np.uint8))
    converted = np.asarray(rgb_of_image(recording.messages[-1][2]))
    assert np.percentile(converted, 99) > 200


def test_an_image_that_is_shorter_than_it_says_is_refused() -> None:
    recording = Recording()
    recording.add_image(0, "/a", data=picture(0)[: SIZE[1] // 2])
    assert isinstance(rgb_of_image(recording.messages[0][2]), str)


def test_yuv_of_an_odd_width_is_refused() -> None:
    recording = Recording()
    data = np.zeros((SIZE[1], SIZE[0] * 2), np.uint8)
    recording.add_image(0, "/a", encoding="yuv422", data=data)
    message = recording.messages[0][2]
    message.width -= 1
    assert "79 x 72 px of yuv422 cannot be converted" in str(rgb_of_image(message))


def test_a_position_without_altitude_or_accuracy_counts_without_them() -> None:
    recording = Recording()
    recording.add_position(0, altitude_m=float("nan"))
    message = recording.messages[0][2]
    message.position_covariance[:] = np.nan
    assert fix_of_position(message) == GpsFix(latitude_deg=47.0, longitude_deg=8.0)


def test_positions_are_those_of_the_topic_with_the_most(tmp_path: Path) -> None:
    recording = Recording()
    for number in range(3):
        recording.add_compressed(number)
        recording.add_position(number, topic="/rover/fix")
    recording.add_position(7, topic="/base/fix")
    items = received(recording.write(tmp_path / "walk"))
    readings = [item.fix.latitude_deg for item in items if isinstance(item, GpsReading)]
    assert readings == [47.0, 47.00001, 47.00002]
    (notice,) = (item.detail for item in items if isinstance(item, SourceNotice))
    assert notice == "left out: positions of /base/fix; those of /rover/fix are taken"


def test_positions_beyond_the_globe_are_none() -> None:
    recording = Recording()
    recording.add_position(0)
    message = recording.messages[0][2]
    assert not isinstance(fix_of_position(message), str)
    message.latitude = 91.0
    assert fix_of_position(message) == "no latitude and longitude"
