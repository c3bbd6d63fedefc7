"""Cameras on MQTT as a source: what arrives, what is refused, and what a broker may do."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from adapters.live import deadline as deadline_module
from adapters.mqtt.connection import PASSWORD_VARIABLE
from adapters.mqtt.source import MqttSource, open_mqtt_source
from engine.config import Config
from engine.errors import ConfigError, SourceError
from engine.ports import ArrivalSink
from engine.run.queues import ArrivalQueue
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    FrameId,
    GpsFix,
    GpsReading,
    Received,
    RejectedFrame,
    SourceNotice,
    SourceState,
)
from tests.support.mqtt_broker import (
    PASSWORD,
    USER,
    Broker,
    client_of,
    jpeg,
    make_certificates,
    mqtt_config,
    password_options,
    png,
    publish,
    running_broker,
    user_properties,
)
from tests.support.paths import TOOLS
from tests.support.received import Decoded, decoded, items_of
from tests.support.waiting import HANG_S, LeapingLoop, leap, until

Kind = TypeVar("Kind", Frame, RejectedFrame, GpsReading, SourceNotice)

TOOL = TOOLS / "publish_frames.py"


class Collected:
    """What a source has yielded so far."""

    def __init__(self, source: MqttSource) -> None:
        self.source = source
        self.items: list[Decoded] = []
        self.reading: asyncio.Task[None] | None = None

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [item for item in self.items if isinstance(item, kind)]

    @property
    def frames(self) -> list[Frame]:
        return self.of(Frame)

    @property
    def rejected(self) -> list[RejectedFrame]:
        return self.of(RejectedFrame)

    @property
    def states(self) -> list[SourceState]:
        return [notice.state for notice in self.of(SourceNotice)]

    async def until_num(self, num_frames: int, num_rejected: int = 0) -> None:
        await until(lambda: len(self.frames) >= num_frames and len(self.rejected) >= num_rejected)

    async def read(self) -> None:
        async with aclosing(items_of(self.source)) as frames:
            async for item in frames:
                self.items.append(item)


def source_of(
    broker: Broker, topic: str, *, config: Config | None = None, scheme: str = "mqtt", who: str = ""
) -> MqttSource:
    ids = itertools.count(1)
    source = open_mqtt_source(
        f"{scheme}://{who}127.0.0.1:{broker.port}/{topic}",
        config=config or mqtt_config(),
        next_frame_id=lambda: FrameId(next(ids)),
    )
    assert isinstance(source, MqttSource)
    return source


@asynccontextmanager
async def reading(source: MqttSource) -> AsyncIterator[Collected]:
    """Reads a source once it is connected, until the context is left."""
    received = Collected(source)
    received.reading = asyncio.create_task(received.read())
    reading_ends = received.reading.done
    await until(lambda: received.items or reading_ends())
    try:
        yield received
    finally:
        received.reading.cancel()
        await asyncio.wait((received.reading,))


# -- what it says of itself -----------------------------------------------------------------------


def test_a_source_is_live_and_its_label_holds_no_credentials() -> None:
    source = open_mqtt_source(
        "mqtt://pilot:hunter2@h/sfm/+/frame",
        config=mqtt_config(),
        next_frame_id=lambda: FrameId(1),
    )
    assert source.info.label == "mqtt://h/sfm/+/frame"
    assert (source.info.is_live, source.info.is_sequence, source.info.num_frames) == (
        True,
        True,
        None,
    )


def test_what_is_no_address_is_refused_without_its_password() -> None:
    with pytest.raises(SourceError, match="mqtt: not an address") as refusal:
        open_mqtt_source(
            "mqtt://pilot:hunter2@h", config=mqtt_config(), next_frame_id=lambda: FrameId(1)
        )
    assert "hunter2" not in str(refusal.value)


def test_files_of_certificates_are_looked_at_when_the_source_is_opened() -> None:
    config = mqtt_config("mqtt.ca_file=/nowhere.pem")
    with pytest.raises(ConfigError, match=r"mqtt\.ca_file"):
        open_mqtt_source("mqtts://h/t", config=config, next_frame_id=lambda: FrameId(1))


# -- frames ---------------------------------------------------------------------------------------


@pytest.mark.network
def test_images_of_every_wrapping_become_frames(tmp_path: Path) -> None:
    image = jpeg()
    text = base64.b64encode(image)
    payloads = [
        image,
        png(),
        text,
        b"data:image/jpeg;base64," + text,
        json.dumps({"image": text.decode(), "lat": 47, "lon": 8, "alt": 400}).encode(),
    ]

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "cam")) as received:
            for number, payload in enumerate(payloads, start=1):
                await publish(broker, ("cam", payload))
                await received.until_num(number)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    frames = received.frames
    assert [frame.frame_id for frame in frames] == [1, 2, 3, 4, 5]
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame.name for frame in frames] == [f"camera01/{i:06d}.jpg" for i in range(5)]
    assert {frame.camera_key for frame in frames} == {"cam|96x80"}
    assert [frame.jpeg for frame in frames] == [image, None, image, image, image]
    assert [frame.gps is not None for frame in frames] == [False] * 4 + [True]
    assert all(abs(frame.captured_at_s - time.time()) < HANG_S for frame in frames)
    assert frames == sorted(frames, key=lambda frame: frame.captured_at_s)
    assert not received.rejected


@pytest.mark.network
def test_each_topic_behind_a_wildcard_is_a_camera_and_so_is_each_size(tmp_path: Path) -> None:
    messages = [
        ("sfm/a/frame", jpeg()),
        ("sfm/b/frame", jpeg()),
        ("sfm/a/frame", jpeg(120, 90)),  # a second publisher there
        ("sfm/a/frame", jpeg()),
        ("sfm/b/other", jpeg()),
    ]

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "sfm/+/frame")) as received:
            for number, message in enumerate(messages, start=1):
                await publish(broker, message)
                await received.until_num(min(number, 4))
        return received

    with running_broker(tmp_path) as broker:
        frames = asyncio.run(run(broker)).frames
    assert [(frame.camera_key, frame.name) for frame in frames] == [
        ("sfm/a/frame|96x80", "camera01/000000.jpg"),
        ("sfm/b/frame|96x80", "camera02/000001.jpg"),
        ("sfm/a/frame|120x90", "camera03/000002.jpg"),
        ("sfm/a/frame|96x80", "camera01/000003.jpg"),
    ]


@pytest.mark.network
def test_user_properties_tell_of_a_bare_image_and_impossible_focal_lengths_are_left_out(
    tmp_path: Path,
) -> None:
    properties = user_properties(lat="47.5", lon="8.5", alt="410", focal_px="90", accuracy="2.5")

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "cam")) as received:
            await publish(broker, ("cam", jpeg()), properties=properties)
            await received.until_num(1)
            await publish(broker, ("cam", jpeg()), properties=user_properties(focal_px="1"))
            await received.until_num(2)
        return received

    with running_broker(tmp_path) as broker:
        known, absurd = asyncio.run(run(broker)).frames
    assert known.gps is not None
    assert (known.gps.altitude_m, known.gps.accuracy_m) == (410.0, 2.5)
    assert known.intrinsics_prior is not None
    assert known.intrinsics_prior.focal_px == 90.0
    assert absurd.intrinsics_prior is None


@pytest.mark.network
def test_capture_times_rise_whatever_the_senders_clock_says(tmp_path: Path) -> None:
    now_s = time.time()
    sender_time_s = [now_s - 1.0, now_s - 0.9, now_s - 500.0, now_s + 3e8, 17.0, 17.1, float("nan")]

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "cam")) as received:
            for number, time_s in enumerate(sender_time_s, start=1):
                properties = user_properties(t_capture=str(time_s))
                await publish(broker, ("cam", jpeg()), properties=properties)
                await received.until_num(number)
        return received

    with running_broker(tmp_path) as broker:
        times_s = [frame.captured_at_s for frame in asyncio.run(run(broker)).frames]
    assert times_s[:2] == pytest.approx(sender_time_s[:2], abs=1e-5)
    assert all(later > earlier for earlier, later in itertools.pairwise(times_s))
    assert all(abs(time_s - time.time()) < HANG_S for time_s in times_s)


# -- positions ------------------------------------------------------------------------------------


def position(**values: float) -> bytes:
    return json.dumps({"lat": 47.0, "lon": 8.0, **values}).encode()


@pytest.mark.network
def test_positions_belong_to_the_camera_with_the_same_wildcards_even_before_its_first_frame(
    tmp_path: Path,
) -> None:
    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "sfm/+/frame")) as received:
            await publish(broker, ("sfm/a/telemetry", position(alt=1.0)))
            await publish(broker, ("sfm/a/frame", jpeg()), ("sfm/b/frame", jpeg(120, 90)))
            await received.until_num(2)
            await publish(broker, ("sfm/b/telemetry", position(alt=2.0)))
            await until(lambda: len(received.of(GpsReading)) == 2)
        return received

    with running_broker(tmp_path) as broker:
        readings = asyncio.run(run(broker)).of(GpsReading)
    assert [(reading.camera_key, reading.fix.altitude_m) for reading in readings] == [
        ("sfm/a/frame|96x80", 1.0),
        ("sfm/b/frame|120x90", 2.0),
    ]
    assert all(abs(reading.captured_at_s - time.time()) < HANG_S for reading in readings)


@pytest.mark.network
def test_a_telemetry_topic_of_its_own_tells_of_all_cameras_on_their_clocks(tmp_path: Path) -> None:
    config = mqtt_config("mqtt.telemetry_topic=rtk")

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "+/frame", config=config)) as received:
            since_start = user_properties(t_capture="17.0")
            await publish(broker, ("a/frame", jpeg()), properties=since_start)
            await publish(broker, ("b/frame", jpeg()))
            await received.until_num(2)
            await publish(broker, ("rtk", position(alt=1.0, time=17.5)))
            await until(lambda: len(received.of(GpsReading)) == 2)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    first_of_a = next(frame for frame in received.frames if frame.camera_key == "a/frame|96x80")
    by_a, by_b = received.of(GpsReading)
    assert (by_a.camera_key, by_b.camera_key) == ("a/frame|96x80", "b/frame|96x80")
    assert by_a.captured_at_s == pytest.approx(first_of_a.captured_at_s + 0.5)
    assert abs(by_b.captured_at_s - time.time()) < HANG_S  # its arrival: b sends no times


@pytest.mark.network
def test_positions_without_altitude_are_used(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "sfm/frame")) as received:
            await publish(broker, ("sfm/telemetry", position()), ("sfm/frame", jpeg()))
            await received.until_num(1)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    assert {one.fix.altitude_m for one in received.of(GpsReading)} == {None}


@pytest.mark.network
def test_telemetry_that_is_not_read_is_counted_and_shown_once_without_its_values(
    tmp_path: Path,
) -> None:
    places = [("sfm/telemetry", b'{"pilot": "Ann", "xy": [4.25, 6.5]}')] * 12

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "sfm/frame")) as received:
            await publish(broker, *places, ("sfm/telemetry", b"4.25"), ("sfm/frame", jpeg()))
            await received.until_num(1)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    _, first, tenth, other = received.of(SourceNotice)
    assert first.detail == (
        "a message of telemetry left out, which holds no position in a form that is known:"
        " {pilot: text, xy: [number x 2]}"
    )
    assert tenth.detail.startswith("10 messages of telemetry")
    assert [(one.kind, one.num_files) for one in other.left_out] == [
        ("telemetry", 12),
        ("telemetry", 1),
    ]
    assert other.left_out[1].example == "4 bytes"
    said = "".join(notice.detail for notice in (first, tenth, other))
    assert "Ann" not in said
    assert "4.25" not in said


@pytest.mark.network
@pytest.mark.parametrize(
    "message",
    [
        {"timestamp": 1, "data": {"latitude": 47.0, "longitude": 8.0, "height": 400.0}},
        {"mavpackettype": "GLOBAL_POSITION_INT", "lat": 470000000, "lon": 80000000, "alt": 400000},
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [8.0, 47.0, 400.0]}},
    ],
)
def test_positions_of_drones_and_of_geojson_reach_the_camera(
    tmp_path: Path, message: dict[str, Any]
) -> None:
    config = mqtt_config("mqtt.telemetry_topic=thing/product/1ZNBJ/osd")

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "+/frame", config=config)) as received:
            await publish(broker, ("a/frame", jpeg()))
            await received.until_num(1)
            await publish(broker, ("thing/product/1ZNBJ/osd", json.dumps(message).encode()))
            await until(lambda: len(received.of(GpsReading)) == 1)
        return received

    with running_broker(tmp_path) as broker:
        [reading_] = asyncio.run(run(broker)).of(GpsReading)
    assert reading_.fix == GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=400.0)


# -- bad input ------------------------------------------------------------------------------------


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.network
def test_bad_messages_are_refused_by_reason_and_the_next_frame_comes(tmp_path: Path) -> None:
    bad: list[tuple[bytes, DropReason, str]] = [
        (b"", DropReason.UNREADABLE, "empty"),
        (b"hello", DropReason.UNREADABLE, "no image"),
        (jpeg()[:30], DropReason.UNREADABLE, ""),  # a header, and no data
        (jpeg()[:-2], DropReason.UNREADABLE, "truncated"),
        (b"\xff\xd8\xff" + b"\x00" * 1_000, DropReason.UNREADABLE, ""),
        (b"/9j/%%%%", DropReason.UNREADABLE, "base64"),
        (b'{"image": "/etc/passwd"}', DropReason.UNREADABLE, "JSON"),
        (png_of_size(60_000, 60_000), DropReason.TOO_LARGE, "60000 x 60000 px"),
        (jpeg(32, 32), DropReason.TOO_SMALL, "32 x 32 px"),
        (b"\xff\xd8\xff" + bytes(1_000_001), DropReason.TOO_LARGE, "1.0 MB"),
        (b"\x00" * 1_500_000, DropReason.TOO_LARGE, "1.5 MB"),
    ]

    async def run(broker: Broker) -> Collected:
        config = mqtt_config("live_sources.max_payload_mb=1")
        async with reading(source_of(broker, "cam", config=config)) as received:
            for number, (payload, _, _) in enumerate(bad, start=1):
                await publish(broker, ("cam", payload))
                await received.until_num(0, number)
            await publish(broker, ("cam", jpeg()))
            await received.until_num(1)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    for rejected, (_, reason, words) in zip(received.rejected, bad, strict=True):
        assert rejected.reason is reason
        assert words in rejected.detail
        assert rejected.detail.startswith("cam: ")
        assert abs(rejected.captured_at_s - time.time()) < HANG_S
    [frame] = received.frames
    assert frame.index == len(bad)
    assert received.states == [SourceState.CONNECTED]


@pytest.mark.network
def test_a_message_far_beyond_the_limit_is_kept_back_by_the_broker(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Collected:
        config = mqtt_config("live_sources.max_payload_mb=1")
        async with reading(source_of(broker, "cam", config=config)) as received:
            await publish(broker, ("cam", b"\xff\xd8\xff" + bytes(3_000_000)), ("cam", jpeg()))
            await received.until_num(1)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    assert [frame.index for frame in received.frames] == [0]
    assert received.states == [SourceState.CONNECTED]


@pytest.mark.network
def test_what_the_broker_kept_from_before_is_no_news(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Collected:
        await publish(broker, ("cam", jpeg(shade=7)), retain=True)
        async with reading(source_of(broker, "cam")) as received:
            await received.until_num(0, 1)
            await publish(broker, ("cam", jpeg()), retain=True)  # as it comes
            await received.until_num(1)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    [rejected] = received.rejected
    assert rejected.reason is DropReason.DUPLICATE
    assert len(received.frames) == 1


@pytest.mark.network
def test_topics_cannot_speak_to_the_terminal_or_name_files(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "#")) as received:
            await publish(broker, ("../../etc/\u202e" + "x" * 500, jpeg()), ("../y", b""))
            await received.until_num(1, 1)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    [frame] = received.frames
    assert frame.name == "camera01/000000.jpg"
    assert frame.camera_key.isprintable()
    assert len(received.rejected[0].detail) < 100


@pytest.mark.network
def test_more_cameras_than_allowed_are_dropped_and_junk_takes_no_place(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Collected:
        config = mqtt_config("live_sources.max_cameras=2")
        async with reading(source_of(broker, "+", config=config)) as received:
            junk = [(f"junk{i}", b"\xff\xd8\xff junk") for i in range(5)]
            for number, message in enumerate(junk, start=1):
                await publish(broker, message)
                await received.until_num(0, number)
            for number, name in enumerate("abacb", start=1):
                await publish(broker, (name, jpeg()))
                await until(lambda num=1 + 5 + number: len(received.items) == num)  # type: ignore[misc]
            await publish(broker, ("a", jpeg(120, 90)))
            await received.until_num(4, 7)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    assert [frame.camera_key[0] for frame in received.frames] == ["a", "b", "a", "b"]
    assert [item.reason for item in received.rejected[5:]] == [DropReason.OVERLOAD] * 2
    assert all("max_cameras" in item.detail for item in received.rejected[5:])


def packets_of_a_storm(num: int) -> bytes:
    """A connection's start and tiny messages on as many topics, as MQTT 3.1.1 writes them."""
    connect = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x3c\x00\x05storm"
    payloads = (b"", b"x", b"{}", b"/9j/", b"\xff\xd8\xff")
    packets = [connect]
    for number in range(num):
        topic = f"storm/{number}".encode()
        body = struct.pack(">H", len(topic)) + topic + payloads[number % len(payloads)]
        packets.append(b"\x30" + bytes([len(body)]) + body)
    return b"".join(packets)


@pytest.mark.slow
@pytest.mark.network
def test_a_storm_of_topics_leaves_loop_and_memory_alone_and_frames_come_after_it(
    tmp_path: Path,
) -> None:
    num_messages = 20_000
    memory = psutil.Process().memory_info

    async def run(broker: Broker) -> tuple[list[Decoded], int, float]:
        queue = ArrivalQueue(max_waiting=4, max_bytes=10**8, max_lanes=16)
        decoded_items: list[Decoded] = []
        num_received = 0
        is_connected, has_frames = asyncio.Event(), asyncio.Event()

        def counting(sink: ArrivalSink) -> ArrivalSink:
            def put(item: Received) -> None:
                nonlocal num_received
                num_received += not isinstance(item, SourceNotice)
                is_connected.set()
                sink(item)

            return put

        async def report() -> None:
            while (report := await queue.next_report()) is not None:
                decoded_items.append(report[1])

        async def decode() -> None:
            while (queued := await queue.get()) is not None:
                item = await asyncio.to_thread(decoded, queued.item)
                if isinstance(item, RejectedFrame):
                    queue.reject(queued, item)
                    continue
                queue.forget(queued)
                decoded_items.append(item)
                if sum(isinstance(item, Frame) for item in decoded_items) >= 3:
                    has_frames.set()

        source = source_of(broker, "#")
        tasks = [
            asyncio.create_task(task)
            for task in (source.receive(counting(queue.sink(0))), report(), decode())
        ]
        try:
            await is_connected.wait()
            async with client_of(broker) as camera:
                _, storm = await asyncio.open_connection("127.0.0.1", broker.port)
                before = memory().rss
                storm.write(packets_of_a_storm(num_messages))
                longest_s = 0.0
                while num_received < num_messages / 2:
                    started_s = time.thread_time()  # as long as the loop is kept busy
                    await asyncio.sleep(0.02)
                    longest_s = max(longest_s, time.thread_time() - started_s)
                num_bytes = memory().rss - before
                await storm.drain()
                storm.close()
                await storm.wait_closed()
                async with asyncio.timeout(HANG_S):
                    while not has_frames.is_set():
                        await camera.publish("cam", jpeg(), qos=1)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        return decoded_items, num_bytes, longest_s

    with running_broker(tmp_path) as broker:
        items, num_bytes, lag_s = asyncio.run(run(broker))
    assert lag_s < 0.5
    assert num_bytes < 50e6
    frames = [item for item in items if isinstance(item, Frame)]
    rejected = [item for item in items if isinstance(item, RejectedFrame)]
    assert {frame.camera_key for frame in frames} == {"cam|96x80"}
    assert len(rejected) < 5_000
    assert any("not listed" in item.detail for item in rejected)


@pytest.mark.network
def test_images_are_handed_over_undecoded_and_each_topic_is_a_lane(tmp_path: Path) -> None:
    async def run(broker: Broker) -> list[Received]:
        items: list[Received] = []
        source = source_of(broker, "sfm/+/frame")
        receiving = asyncio.create_task(source.receive(items.append))
        await until(lambda: bool(items))
        await publish(broker, ("sfm/a/frame", jpeg()), ("sfm/b/frame", jpeg()[:-2]))
        await until(lambda: len(items) == 3)
        receiving.cancel()
        await asyncio.wait((receiving,))
        return items

    with running_broker(tmp_path) as broker:
        _, *arrivals = asyncio.run(run(broker))
    lanes = {arrival.lane: arrival for arrival in arrivals if isinstance(arrival, Arrival)}
    assert set(lanes) == {"sfm/a/frame", "sfm/b/frame"}
    assert lanes["sfm/a/frame"].num_bytes == len(jpeg())
    assert isinstance(lanes["sfm/a/frame"].decode(), Frame)
    assert isinstance(lanes["sfm/b/frame"].decode(), RejectedFrame)


# -- brokers --------------------------------------------------------------------------------------


@pytest.mark.network
def test_a_broker_that_is_killed_and_started_again_is_found(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "cam")) as received:
            await publish(broker, ("cam", jpeg()))
            await received.until_num(1)
            broker.kill()
            await until(lambda: SourceState.LOST in received.states)
            broker.start()
            await until(lambda: received.states[-1] is SourceState.CONNECTED)
            await publish(broker, ("cam", jpeg()))
            await received.until_num(2)
        return received

    with running_broker(tmp_path) as broker:
        received = asyncio.run(run(broker))
    connected, lost = SourceState.CONNECTED, SourceState.LOST
    assert received.states == [connected, lost, connected]
    assert [frame.name for frame in received.frames] == [
        "camera01/000000.jpg",
        "camera01/000001.jpg",
    ]


@pytest.mark.network
def test_a_wrong_password_ends_the_source_with_one_clear_line(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Collected:
        source = source_of(broker, "cam", who=f"{USER}:wrong@")
        async with reading(source) as received:
            assert received.reading is not None
            await asyncio.wait_for(received.reading, HANG_S)
        return received

    with running_broker(tmp_path, *password_options(tmp_path)) as broker:
        received = asyncio.run(run(broker))
    [notice] = received.items
    assert isinstance(notice, SourceNotice)
    assert notice.state is SourceState.REFUSED
    assert "not authorized" in notice.detail
    assert "wrong" not in notice.detail


@pytest.mark.network
def test_tls_password_and_client_certificate_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    made = make_certificates(tmp_path)
    config = mqtt_config(
        f"mqtt.ca_file={made.authority}",
        f"mqtt.client_certificate={made.client}",
        f"mqtt.client_key={made.client_key}",
    )
    options = [*made.options(asks_client=True), *password_options(tmp_path)]
    tls = made.trusting()
    tls.load_cert_chain(made.client, made.client_key)

    async def run(broker: Broker) -> Collected:
        source = source_of(broker, "cam", config=config, scheme="mqtts", who=f"{USER}@")
        async with reading(source) as received:
            async with client_of(
                broker, username=USER, password=PASSWORD, tls_context=tls
            ) as camera:
                await camera.publish("cam", jpeg(), qos=1)
            await received.until_num(1)
        return received

    with running_broker(tmp_path, *options) as broker:
        received = asyncio.run(run(broker))
    assert received.states == [SourceState.CONNECTED]
    assert len(received.frames) == 1


@pytest.mark.network
def test_a_source_gives_up_after_so_long_without_a_frame_even_when_junk_comes(
    tmp_path: Path,
) -> None:
    patience_s = 2 * HANG_S  # on the clock of the event loop, which leaps

    async def run(broker: Broker) -> Collected:
        config = mqtt_config(f"live_sources.give_up_after_s={patience_s}")
        async with reading(source_of(broker, "cam", config=config)) as received:
            assert received.reading is not None
            await publish(broker, ("cam", b"junk"))
            await received.until_num(0, 1)
            leap(0.9 * patience_s)
            await publish(broker, ("cam", b"junk"))
            await received.until_num(0, 2)
            assert received.states == [SourceState.CONNECTED]
            leap(0.1 * patience_s)
            await asyncio.wait((received.reading,))
        return received

    with running_broker(tmp_path) as broker, asyncio.Runner(loop_factory=LeapingLoop) as runner:
        received = runner.run(run(broker))
    assert received.states == [SourceState.CONNECTED, SourceState.ENDED]
    assert received.rejected


def test_closing_a_source_that_looks_for_its_broker_takes_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadline_module, "_CANCELLING_S", 2 * HANG_S)
    wait = [f"live_sources.retry_{which}_s={2 * HANG_S}" for which in ("first", "max")]

    async def run() -> None:
        source = open_mqtt_source(
            "mqtt://127.0.0.1:1/cam", config=mqtt_config(*wait), next_frame_id=lambda: FrameId(1)
        )
        frames = items_of(source)
        notice = await anext(frames)
        assert isinstance(notice, SourceNotice)
        assert notice.state is SourceState.LOST
        await asyncio.wait_for(frames.aclose(), HANG_S)

    asyncio.run(run())


@pytest.mark.network
def test_a_folder_played_by_the_tool_arrives_with_capture_times(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}.jpg").write_bytes(jpeg(shade=50 * number))

    async def run(broker: Broker) -> Collected:
        async with reading(source_of(broker, "sfm/+/frame")) as received:
            address = f"mqtt://127.0.0.1:{broker.port}/sfm/+/frame"
            tool = await asyncio.create_subprocess_exec(
                sys.executable, TOOL, photos, address, "--rate", "20", "--camera", "a",
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            said, _ = await tool.communicate()
            assert b"3 sent, 0 missed" in said
            await received.until_num(3)
        return received

    with running_broker(tmp_path) as broker:
        frames = asyncio.run(run(broker)).frames
    assert {frame.camera_key for frame in frames} == {"sfm/a/frame|96x80"}
    times_s = [frame.captured_at_s for frame in frames]
    assert times_s[2] - times_s[0] == pytest.approx(0.1, abs=0.05)
