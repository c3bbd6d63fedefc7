"""A run published on MQTT: topics, commands, and brokers that are absent, gone or mute."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import numpy as np
import pycolmap
import pytest

from adapters.mqtt import view as view_module
from adapters.mqtt.connection import PASSWORD_VARIABLE, MqttLink
from adapters.mqtt.map_points import MapPoints, PointsRequest, read_map_points, read_request
from adapters.mqtt.messages import Channel, Context, Message, messages_of, read_command
from adapters.mqtt.outbox import Outbox, Throttle
from adapters.mqtt.view import MqttView
from engine.config import Config
from engine.dense_types import GroundPicture
from engine.errors import ConfigError
from engine.events import (
    CameraDoubted,
    CommandTaken,
    Event,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    MainMapChanged,
    PairVerified,
    RunFinished,
    RunStarted,
    SnapshotWritten,
    SourceChanged,
    SourceOpened,
    VerdictChanged,
    Warned,
)
from engine.types import DropReason, FrameId, PairReason, RunCommand, SourceState, VerdictLevel
from tests.support.fake_runs import frame_of
from tests.support.mqtt_broker import (
    PASSWORD,
    USER,
    Broker,
    client_of,
    free_port,
    make_certificates,
    mqtt_config,
    password_options,
    running_broker,
)
from tests.support.paths import ROOT
from tests.support.verdicts import verdict_of
from tests.support.waiting import HANG_S, block_until, until

PREFIX = "sfm/run"


def posed(frame_id: int, *, is_keyframe: bool = False) -> FramePosed:
    return FramePosed(
        camera_key="camera",
        at_s=1.0,
        frame_id=FrameId(frame_id),
        captured_at_s=1.79e9 + frame_id,
        cam_center_in_world=(1.0, 2.0, 3.0),
        world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
        is_keyframe=is_keyframe,
        is_first=True,
        latency_s=0.05,
    )


def received(frame_id: int, *, name: str) -> FrameReceived:
    return FrameReceived(
        at_s=0.0, frame_id=FrameId(frame_id), index=frame_id - 1, captured_at_s=0.0, name=name
    )


def snapshot(sequence: int) -> SnapshotWritten:
    return SnapshotWritten(
        at_s=2.0,
        sequence=sequence,
        path=f"runs/x/snapshots/{sequence:06d}",
        num_keyframes=10,
        num_points3D=1000,
        elapsed_s=0.1,
    )


def finished() -> RunFinished:
    return RunFinished(at_s=9.0, stopped_by="signal", num_keyframes=10, num_registered=9)


class Heard:
    """What a subscriber has heard below the prefix, by topic."""

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = defaultdict(list)
        self.retained: set[str] = set()

    def take(self, message: aiomqtt.Message) -> None:
        channel = message.topic.value.removeprefix(f"{PREFIX}/")
        is_binary = channel == Channel.POINTS
        payload = message.payload
        self.records[channel].append(payload if is_binary else json.loads(payload or b"null"))
        if message.retain:
            self.retained.add(channel)

    def states(self) -> list[str]:
        return [record["state"] for record in self.records["status"]]

    async def until(self, channel: str, num: int = 1) -> list[Any]:
        await until(lambda: len(self.records[channel]) >= num)
        return self.records[channel]


@asynccontextmanager
async def listening(broker: Broker, **options: Any) -> AsyncIterator[Heard]:
    heard = Heard()

    async def listen(client: aiomqtt.Client) -> None:
        async for message in client.messages:
            heard.take(message)

    async with client_of(broker, **options) as client:
        await client.subscribe(f"{PREFIX}/#")
        task = asyncio.create_task(listen(client))
        yield heard
        task.cancel()
        await asyncio.wait((task,))


def config_for(port: int, *settings: str, scheme: str = "mqtt", who: str = "") -> Config:
    publish = f"mqtt.publish={scheme}://{who}127.0.0.1:{port}/{PREFIX}"
    return mqtt_config(publish, *settings)


@pytest.fixture(autouse=True)
def _last_messages_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that is closed waits for a broker as long as a slow machine takes."""
    for limit in ("_LAST_MESSAGES_S", "_CLOSE_TIMEOUT_S"):
        monkeypatch.setattr(view_module, limit, HANG_S)


@contextmanager
def view_of(config: Config, control: Any = None) -> Iterator[MqttView]:
    view = MqttView.open(config, run_path=Path("runs/x"), control=control)
    try:
        yield view
    finally:
        view.close()


def live_source() -> SourceOpened:
    return SourceOpened(source="a", address="", prefix="", is_live=True, fingerprint="")


# -- published messages ---------------------------------------------------------------------------


@pytest.mark.network
def test_a_run_is_published_topic_by_topic(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Heard:
        async with listening(broker) as heard:
            with view_of(config_for(broker.port)) as view:
                await heard.until("status")
                view.show_event(RunStarted(at_s=0.0, sources=("mqtt://h/t",), matcher="sift"))
                view.show_event(live_source())
                view.show_event(received(1, name="a.jpg"))
                view.show_event(
                    KeyframeAdded(
                        camera_key="camera",
                        at_s=0.1,
                        frame_id=FrameId(1),
                        index=0,
                        is_photo=False,
                        name="a.jpg",
                        captured_at_s=1.0,
                        num_keypoints=5,
                    )
                )
                view.show_event(posed(1, is_keyframe=True))
                view.show_event(snapshot(1))
                view.show_event(Warned(at_s=1.0, message="dark"))
                view.show_frame(frame_of(1), None)
                for channel in ("keyframe", "pose", "snapshot", "event"):
                    await heard.until(channel, 2 if channel == "keyframe" else 1)
                view.show_event(VerdictChanged(verdict=verdict_of(VerdictLevel.DOUBTFUL)))
                await heard.until("status", 3)
                view.show_event(finished())
            await heard.until("status", 4)
        return heard

    with running_broker(tmp_path) as broker:
        records = asyncio.run(run(broker)).records
    states = [record["state"] for record in records["status"]]
    assert states == ["running", "running", "running", "stopped"]
    assert [record["sources"] for record in records["status"][1:3]] == [["mqtt://h/t"]] * 2
    assert records["status"][3]["registered"] == 9
    levels = [record["verdict"]["level"] for record in records["status"][1:]]
    assert levels == ["good", "doubtful", "doubtful"]
    (reason,) = records["status"][3]["verdict"]["reasons"]
    assert reason["sentence"].startswith("frames 10 to 15 turn on the spot")
    assert records["pose"] == [
        {
            "frame_id": 1,
            "name": "a.jpg",
            "camera": "camera",
            "captured_at_s": 1.79e9 + 1,
            "position": [1.0, 2.0, 3.0],
            "quaternion_xyzw": [0.0, 0.0, 0.0, 1.0],
            "georeference": None,
            "is_keyframe": True,
            "is_first": True,
            "map": 0,
            "latency_s": 0.05,
        }
    ]
    assert records["keyframe"][0]["event"] == "KeyframeAdded"
    assert records["keyframe"][1] == {
        "event": "KeyframePosed",
        "frame_id": 1,
        "name": "a.jpg",
        "camera": "camera",
        "captured_at_s": 1.79e9 + 1,
        "cam_from_world": [[1.0, 0.0, 0.0, -1.0], [0.0, 1.0, 0.0, -2.0], [0.0, 0.0, 1.0, -3.0]],
        "cam_center_in_world": [1.0, 2.0, 3.0],
        "georeference": None,
        "map": 0,
    }
    assert "url" not in records["snapshot"][0]
    assert records["snapshot"][0]["sequence"] == 1
    assert Path(records["snapshot"][0]["path"]).is_absolute()
    warned, changed = records["event"]
    assert warned == {"event": "Warned", "at_s": 1.0, "message": "dark"}
    assert (changed["event"], changed["verdict"]["level"]) == ("VerdictChanged", "doubtful")
    assert records["metrics"][-1]["posed"] == 1
    assert records["metrics"][-1]["latency_median_s"] == 0.05


@pytest.mark.network
def test_figures_come_once_a_second(tmp_path: Path) -> None:
    async def run(broker: Broker) -> list[Any]:
        async with listening(broker) as heard:
            with view_of(config_for(broker.port)) as view:
                await heard.until("metrics")
                for index in range(3):
                    view.show_event(
                        FrameReceived(
                            at_s=0.0, frame_id=FrameId(index), index=index, captured_at_s=0.0
                        )
                    )
                    view.show_event(
                        FrameDropped(
                            at_s=0.0,
                            frame_id=None,
                            source="s",
                            index=index,
                            name="x",
                            captured_at_s=0.0,
                            reason=DropReason.OVERLOAD,
                            detail="",
                        )
                    )
                return await heard.until("metrics", 2)

    with running_broker(tmp_path) as broker:
        first, second = asyncio.run(run(broker))[:2]
    assert (first["frames"], first["dropped"], first["latency_p95_s"]) == (0, {}, None)
    assert (second["frames"], second["dropped"]) == (6, {"overload": 3})


def ground(coverage: str) -> GroundPicture:
    return GroundPicture(
        vertices_in_world=np.zeros((0, 0, 3), np.float32),
        texture=np.zeros((1, 1, 4), np.uint8),
        u_in_texture=np.zeros(0),
        v_in_texture=np.zeros(0),
        holes_in_world=np.zeros((0, 3), np.float32),
        thin_in_world=np.zeros((0, 3), np.float32),
        coverage=coverage,
    )


@pytest.mark.network
def test_who_comes_late_learns_the_state_and_the_newest_snapshot(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Heard:
        with view_of(config_for(broker.port)) as view:
            async with listening(broker) as early:
                for sequence in (1, 2, 3):
                    view.show_event(snapshot(sequence))
                view.show_ground(ground('{"type":"FeatureCollection","features":[]}'))
                view.show_ground(ground(""))  # nothing is known of it
                await until(lambda: early.records["snapshot"][-1:] != [])
                await until(lambda: early.records["snapshot"][-1]["sequence"] == 3)
            async with listening(broker) as late:
                await late.until("status")
                await late.until("snapshot")
                await late.until("coverage")
        return late

    with running_broker(tmp_path) as broker:
        late = asyncio.run(run(broker))
    assert {"status", "snapshot", "coverage"} <= late.retained
    assert late.records["snapshot"][0]["sequence"] == 3
    assert late.records["coverage"] == [{"type": "FeatureCollection", "features": []}]


# -- places on the globe, snapshots elsewhere, points ----------------------------------------------


def georeferenced(*enu_from_map: float) -> Georeferenced:
    return Georeferenced(
        at_s=0.0,
        origin_latitude_deg=47.0,
        origin_longitude_deg=8.0,
        origin_altitude_m=430.0,
        metres_per_map_unit=2.0,
        num_fixes=9,
        rmse_m=0.5,
        rejected_ids=(),
        enu_from_map=enu_from_map,
    )


def records_of(view: MqttView, channel: Channel) -> list[Any]:
    """What waits to be published on a channel."""
    records = []
    while (message := view._outbox.take()) is not None:
        if message.channel is channel:
            records.append(json.loads(message.payload))
    return records


def test_poses_of_a_map_with_a_place_say_where_the_camera_is() -> None:
    turned = (0.0, -2.0, 0.0, 100.0, 2.0, 0.0, 0.0, 200.0, 0.0, 0.0, 2.0, -5.0)  # (1, 2, 3) ->
    with view_of(config_for(free_port())) as view:  # -> (96, 202, 1)
        view.show_event(posed(1))
        view.show_event(georeferenced(*turned))
        view.show_event(posed(2))
        view.show_event(dataclasses.replace(posed(3), map_number=1))
        view.show_event(
            MainMapChanged(former_map_number=1, num_registered=5, num_registered_in_former=4)
        )
        view.show_event(posed(4))
        view.show_event(georeferenced())  # of a run before this version
        view.show_event(posed(5))
        places = [record["georeference"] for record in records_of(view, Channel.POSE)]
    assert [place is None for place in places] == [True, False, True, True, True]
    place = places[1]
    assert place["latitude_deg"] == pytest.approx(47.0 + 202.0 / 111_170.0, abs=2e-6)
    assert place["longitude_deg"] == pytest.approx(8.0 + 96.0 / 76_050.0, abs=2e-5)
    assert place["altitude_m"] == pytest.approx(431.0, abs=0.01)


def test_a_keyframe_s_place_is_published_whatever_the_rate_of_poses() -> None:
    with view_of(config_for(free_port(), "mqtt.max_pose_hz=1")) as view:
        for frame_id in range(1, 9):
            view.show_event(received(frame_id, name=f"{frame_id}.jpg"))
            view.show_event(posed(frame_id, is_keyframe=True))
        names = [record["name"] for record in records_of(view, Channel.KEYFRAME)]
    assert names == [f"{frame_id}.jpg" for frame_id in range(1, 9)]


def test_a_snapshot_has_a_url_where_a_server_shows_the_runs() -> None:
    base = "mqtt.snapshot_base_url=https://maps.example.org/runs/"
    with view_of(config_for(free_port(), base)) as view:
        view.show_event(dataclasses.replace(snapshot(3), path="runs/a #b/snapshots/000003"))
        (record,) = records_of(view, Channel.SNAPSHOT)
    assert record["url"] == "https://maps.example.org/runs/a%20%23b/snapshots/000003"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("maps/runs", "expected a URL"),
        ("https://me:hunter2@h/runs", "no password"),
        ("https://h/runs?token=hunter2", "no [?]"),
        ("https://h/a b", "expected a URL"),
        ("https://[h", "expected a URL"),
    ],
)
def test_a_url_that_is_none_is_refused_without_what_it_holds(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        MqttView.open(
            config_for(1, f"mqtt.snapshot_base_url={url}"), run_path=Path("x"), control=None
        )
    assert "hunter2" not in str(refusal.value)


NUM_POINTS = 20_000
ENU_FROM_MAP = [[2.0, 0.0, 0.0, 5.0], [0.0, 2.0, 0.0, 6.0], [0.0, 0.0, 2.0, 7.0]]


def write_snapshot_of_points(folder: Path) -> SnapshotWritten:
    """A snapshot as far as points go, with COLMAP's file."""
    model = folder / "run" / "snapshots" / "000002" / "sparse" / "0"
    model.mkdir(parents=True)
    reconstruction = pycolmap.Reconstruction()
    for index in range(NUM_POINTS):
        reconstruction.add_point3D(
            np.array([index, -index, 0.25]), pycolmap.Track(), np.array([index % 256, 1, 2])
        )
    reconstruction.write_binary(model)
    origin = {"latitude_deg": 47.0, "longitude_deg": 8.0, "altitude_m": None}
    record = {
        "sequence": 2,
        "georeference": {"origin": origin},
        "maps": [{"enu_from_map": ENU_FROM_MAP}],
    }
    snapshot_folder = model.parents[1]
    (snapshot_folder / "snapshot.json").write_text(json.dumps(record))
    return dataclasses.replace(snapshot(2), path=str(snapshot_folder))


PLY_TYPES = {"float": "<f4", "uchar": "u1"}


def read_ply(payload: bytes) -> tuple[list[str], Any]:
    """Comments and vertices of a chunk, as its header describes them."""
    head, _, body = payload.partition(b"end_header\n")
    lines = head.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    rows = [line.split() for line in lines if line.startswith("property")]
    vertices = np.frombuffer(body, np.dtype([(name, PLY_TYPES[kind]) for _, kind, name in rows]))
    assert f"element vertex {len(vertices)}" in lines
    comments = [line.removeprefix("comment ") for line in lines if line.startswith("comment")]
    return comments, vertices


@pytest.mark.network
def test_points_come_in_chunks_when_they_are_asked_for(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Heard:
        async with listening(broker) as heard, client_of(broker) as client:
            with view_of(config_for(broker.port)) as view:
                await heard.until("status")
                await client.publish(f"{PREFIX}/points/request", b"", qos=1)
                await heard.until("event")  # there are none yet
                view.show_event(written)
                await heard.until("snapshot")
                request = json.dumps({"id": "me-1", "max_points": 12_000})
                await client.publish(f"{PREFIX}/points/request", request, qos=1)
                await heard.until("points", 2)
                await client.publish(f"{PREFIX}/points/request", b"", qos=1)
                await heard.until("points", 5)
        return heard

    written = write_snapshot_of_points(tmp_path)
    with running_broker(tmp_path) as broker:
        heard = asyncio.run(run(broker))
    refused = heard.records["event"][0]
    assert refused == {"event": "PointsRefused", "detail": "there is no snapshot yet"}
    payloads = heard.records["points"]
    assert max(map(len, payloads)) < 128_000
    assert "points" not in heard.retained
    chunks = [read_ply(payload) for payload in payloads]
    assert [len(vertices) for _, vertices in chunks] == [8_000, 4_000, 8_000, 8_000, 4_000]
    numbers = " ".join(repr(x) for row in ENU_FROM_MAP for x in row)
    assert chunks[1][0] == [
        "chunk 2 of 2",
        "snapshot 2",
        "points 12000 of 20000",
        "world east north up in metres of latitude longitude altitude 47.0 8.0 0.0",
        f"enu_from_map {numbers}",
        "request me-1",
    ]
    whole = np.concatenate([vertices for _, vertices in chunks[2:]])
    assert sorted(whole["x"].tolist()) == list(range(NUM_POINTS))
    np.testing.assert_array_equal(whole["y"], -whole["x"])
    np.testing.assert_array_equal(whole["red"], whole["x"] % 256)
    assert set(whole["z"].tolist()) == {0.25}
    spread = np.concatenate([vertices for _, vertices in chunks[:2]])["x"]
    assert (spread.min(), spread.max()) == (0, NUM_POINTS - 1)


@pytest.mark.network
def test_requests_for_points_are_one_at_a_time_and_can_be_forbidden(tmp_path: Path) -> None:
    async def run(broker: Broker, *settings: str) -> Heard:
        async with listening(broker) as heard, client_of(broker) as client:
            with view_of(config_for(broker.port, *settings)) as view:
                await heard.until("status")
                view.show_event(written)
                await heard.until("snapshot")
                for payload in (b"7", *[b""] * 40):
                    await client.publish(f"{PREFIX}/points/request", payload, qos=1)
                await heard.until("points/request", 41)
                await heard.until("metrics", 2)  # so the view had its turn
        return heard

    written = write_snapshot_of_points(tmp_path)
    with running_broker(tmp_path) as broker:
        allowed = asyncio.run(run(broker))
        forbidden = asyncio.run(run(broker, "mqtt.max_points=0"))
    details = [record["detail"] for record in allowed.records["event"]]
    assert details[0].startswith("neither empty nor a JSON object")
    assert any("ask again later" in detail for detail in details[1:])
    assert len(details) < 30  # not one for each
    assert not forbidden.records["points"]
    assert not forbidden.records["event"]


def test_a_snapshot_that_is_gone_or_damaged_is_no_points(tmp_path: Path) -> None:
    folder = Path(write_snapshot_of_points(tmp_path).path)
    whole = read_map_points(folder, PointsRequest(), max_points=5)
    assert isinstance(whole, MapPoints)
    points = folder / "sparse" / "0" / "points3D.bin"
    points.write_bytes(points.read_bytes()[:-3])
    for _ in range(2):
        found = read_map_points(folder, PointsRequest(), max_points=5)
        assert isinstance(found, str)
        assert str(tmp_path) not in found
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("payload", "request_"),
    [
        (b"", PointsRequest()),
        (b" {} ", PointsRequest()),
        (b'{"id": 7, "max_points": 5}', PointsRequest(request_id="7", max_points=5)),
        (b'{"max_points": 0}', None),
        (b'{"id": "a\\nelement vertex 9"}', None),
        (b"all", None),
        (b'{"id": "' + b"x" * 2_000 + b'"}', None),
    ],
)
def test_a_request_is_empty_or_a_json_object(
    payload: bytes, request_: PointsRequest | None
) -> None:
    assert read_request(payload) == request_


DYING = """
import signal, sys
from pathlib import Path
from adapters.mqtt.view import MqttView
from engine.config import load_config
config = load_config(settings=[f"mqtt.publish={sys.argv[1]}"])
MqttView.open(config, run_path=Path("x"), control=None)
signal.pause()
"""


@pytest.mark.network
def test_the_broker_says_offline_when_the_run_dies(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Heard:
        async with listening(broker) as heard:
            address = f"mqtt://127.0.0.1:{broker.port}/{PREFIX}"
            dying = await asyncio.create_subprocess_exec(
                sys.executable, "-c", DYING, address, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
            try:
                await heard.until("status")
            finally:
                dying.kill()
                await dying.wait()
            await heard.until("status", 2)
        return heard

    with running_broker(tmp_path) as broker:
        assert asyncio.run(run(broker)).states() == ["running", "offline"]


# -- commands -------------------------------------------------------------------------------------


@pytest.mark.network
def test_commands_reach_the_run_and_others_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    taken: list[RunCommand] = []
    who = {"username": USER, "password": PASSWORD}

    async def run(broker: Broker) -> Heard:
        config = config_for(broker.port, "mqtt.commands=true", who=f"{USER}@")
        topic = f"{PREFIX}/command"
        async with client_of(broker, **who) as client:
            await client.publish(topic, "stop", qos=1, retain=True)  # from an earlier day
        with view_of(config, control=taken.append):
            async with client_of(broker, **who) as client:
                await until_subscribed(client)
                for text in ("snapshot", ' {"command": "pause"} ', "RESUME", "format c:", "stop"):
                    await client.publish(topic, text, qos=1)
                async with client_of(broker, **who) as listener:
                    await listener.subscribe(f"{PREFIX}/event")
                    await client.publish(topic, b"\xff" * 2_000, qos=1)
                    heard = Heard()
                    async with asyncio.timeout(HANG_S):
                        async for message in listener.messages:
                            heard.take(message)
                            break
        return heard

    async def until_subscribed(client: aiomqtt.Client) -> None:
        await client.subscribe(f"{PREFIX}/metrics")
        async with asyncio.timeout(HANG_S):
            await anext(aiter(client.messages))

    with running_broker(tmp_path, *password_options(tmp_path)) as broker:
        heard = asyncio.run(run(broker))
    assert taken == [
        RunCommand.SNAPSHOT,
        RunCommand.PAUSE,
        RunCommand.RESUME,
        RunCommand.STOP,
    ]
    assert heard.records["event"][0]["event"] == "CommandRefused"


@pytest.mark.network
def test_commands_are_not_heard_unless_they_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    taken: list[RunCommand] = []
    who = {"username": USER, "password": PASSWORD}

    async def run(broker: Broker) -> None:
        config = config_for(broker.port, who=f"{USER}@")
        async with listening(broker, **who) as heard, client_of(broker, **who) as client:
            with view_of(config, control=taken.append):
                await heard.until("status")
                await client.publish(f"{PREFIX}/command", '{"command": "stop"}', qos=1)
                await heard.until("command")
                await heard.until("metrics", 2)  # so the view had its turn

    with running_broker(tmp_path, *password_options(tmp_path)) as broker:
        asyncio.run(run(broker))
    assert taken == []


@pytest.mark.parametrize(
    ("who", "password"), [("", None), ("", PASSWORD), (f"{USER}@", None), (f"{USER}@", "")]
)
def test_commands_from_just_anybody_are_refused_when_the_view_is_opened(
    who: str, password: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    if password is not None:
        monkeypatch.setenv(PASSWORD_VARIABLE, password)
    config = config_for(1, "mqtt.commands=true", who=who)
    with pytest.raises(ConfigError, match=r"mqtt\.commands.*LIVESFM_MQTT_PASSWORD"):
        MqttView.open(config, run_path=Path("x"), control=lambda _: None)


@pytest.mark.parametrize(
    ("payload", "command"),
    [
        (b"snapshot", RunCommand.SNAPSHOT),
        (b" Stop\n", RunCommand.STOP),
        (b'{"command": "pause", "who": "me"}', RunCommand.PAUSE),
        (b"", None),
        (b"rm -rf", None),
        (b"{}", None),
        (b"{", None),
        (b'{"command": ["stop"]}', None),
        (b"\xff\xfe", None),
        (b'{"a":' * 200, None),
        (b"stop" + b" " * 5_000, None),
    ],
)
def test_a_command_is_a_word_or_a_json_object(payload: bytes, command: RunCommand | None) -> None:
    assert read_command(payload) is command


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mqtt://u:hunter2@h/x", "no password"),
        ("mqtt://h", "not an address"),
        ("mqtt://h/a/+", "wildcards"),
        ("mqtt://h//", "prefix"),
        ("http://u:hunter2@h/x", "not an address"),
    ],
)
def test_an_address_that_cannot_be_published_to_is_refused(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        MqttView.open(
            mqtt_config(f"mqtt.publish={address}"), run_path=Path("x"), control=lambda _: None
        )
    assert "hunter2" not in str(refusal.value)


# -- brokers --------------------------------------------------------------------------------------


def show_many(view: MqttView, num: int) -> None:
    """Shows so many poses and warnings; hangs where they wait for a broker that never answers."""
    for index in range(num):
        for event in (posed(index), Warned(at_s=0.0, message="x" * 100)):
            view.show_event(event)


def test_an_absent_broker_costs_nothing_and_logs_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[MqttLink] = []
    make_client = MqttLink.client

    def client(link: MqttLink, **options: Any) -> AbstractAsyncContextManager[aiomqtt.Client]:
        tries.append(link)
        return make_client(link, **options)

    monkeypatch.setattr(MqttLink, "client", client)
    with (
        caplog.at_level(logging.WARNING),
        view_of(config_for(free_port()), control=lambda _: None) as view,
    ):
        show_many(view, 3_000)
        block_until(lambda: len(tries) >= 4, what="tries to connect")
    assert len(caplog.records) == 1
    assert "Connection refused" in caplog.records[0].getMessage()


def test_a_broker_that_accepts_and_says_nothing_costs_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with view_of(config_for(port, f"live_sources.open_timeout_s={2 * HANG_S}")) as view:
            show_many(view, 1_000)


@pytest.mark.network
def test_a_broker_that_stops_reading_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is halted, not killed: the connection stays and its buffers fill."""
    for limit in ("_LAST_MESSAGES_S", "_CLOSE_TIMEOUT_S"):
        monkeypatch.setattr(view_module, limit, 0.1)
    with (
        running_broker(tmp_path) as broker,
        halted(broker) as halt,
        view_of(config_for(broker.port)) as view,
    ):
        asyncio.run(until_heard(broker, "status"))
        halt()
        show_many(view, 5_000)


@contextmanager
def halted(broker: Broker) -> Iterator[Callable[[], None]]:
    """Gives what halts a broker, which goes on in the end."""
    yield lambda: broker.signal(signal.SIGSTOP)
    broker.signal(signal.SIGCONT)


async def until_heard(broker: Broker, channel: str) -> None:
    async with listening(broker) as heard:
        await heard.until(channel)


@pytest.mark.network
def test_a_broker_that_starts_again_learns_what_lasts(tmp_path: Path) -> None:
    async def run(broker: Broker) -> Heard:
        with view_of(config_for(broker.port)) as view:
            async with listening(broker) as early:
                view.show_event(snapshot(7))
                await early.until("snapshot")
            broker.kill()
            view.show_event(CommandTaken(at_s=3.0, command=RunCommand.PAUSE))
            broker.start()
            async with listening(broker) as late:
                await until(lambda: late.states()[-1:] == ["paused"])
                await late.until("snapshot")
                view.show_event(CommandTaken(at_s=4.0, command=RunCommand.RESUME))
                await until(lambda: late.states()[-1] == "running")
        return late

    with running_broker(tmp_path) as broker:
        late = asyncio.run(run(broker))
    assert late.records["snapshot"][0]["sequence"] == 7


@pytest.mark.network
def test_a_wrong_password_is_logged_with_one_line_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "hunter2")
    with (
        running_broker(tmp_path, *password_options(tmp_path)) as broker,
        caplog.at_level(logging.INFO),
        view_of(config_for(broker.port, who=f"{USER}@")) as view,
    ):
        asyncio.run(until(lambda: bool(caplog.records)))
        block_until(lambda: view._is_over, what="the end of trying")
        show_many(view, 100)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "not authorized" in record.getMessage()
    assert "hunter2" not in record.getMessage()


@pytest.mark.network
def test_it_speaks_over_tls_with_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    made = make_certificates(tmp_path)
    options = [*made.options(), *password_options(tmp_path)]
    who = {"username": USER, "password": PASSWORD, "tls_context": made.trusting()}

    async def run(broker: Broker) -> Heard:
        config = config_for(
            broker.port, f"mqtt.ca_file={made.authority}", scheme="mqtts", who=f"{USER}@"
        )
        async with listening(broker, **who) as heard:
            with view_of(config) as view:
                await heard.until("status")
                view.show_event(posed(1))
                await heard.until("pose")
            await heard.until("status", 2)
        return heard

    with running_broker(tmp_path, *options) as broker:
        assert asyncio.run(run(broker)).states() == ["running", "stopped"]


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "channel"),
    [
        (posed(1), Channel.POSE),
        (
            FrameRegistered(
                at_s=0.0,
                frame_id=FrameId(1),
                num_inliers=1,
                num_correspondences=2,
                num_registered=3,
                num_points3D=4,
                is_retry=False,
                elapsed_s=0.1,
            ),
            Channel.KEYFRAME,
        ),
        (snapshot(1), Channel.SNAPSHOT),
        (
            SourceChanged(at_s=0.0, source="s", state=SourceState.LOST, detail="d"),
            Channel.EVENT,
        ),
        (
            CameraDoubted(at_s=0.0, camera_key="c", reason="k is 14.3", is_held=True),
            Channel.EVENT,
        ),
        (
            Georeferenced(
                at_s=0.0,
                origin_latitude_deg=1.0,
                origin_longitude_deg=2.0,
                origin_altitude_m=3.0,
                metres_per_map_unit=4.0,
                num_fixes=5,
                rmse_m=0.5,
                rejected_ids=(FrameId(1),),
            ),
            Channel.EVENT,
        ),
        (
            PairVerified(
                at_s=0.0,
                first=FrameId(1),
                second=FrameId(2),
                reason=PairReason.TEMPORAL,
                num_matches=1,
                num_inliers=1,
            ),
            None,
        ),
    ],
)
def test_each_event_has_its_topic_or_none(event: Event, channel: Channel | None) -> None:
    messages = messages_of(event, Context())
    assert [message.channel for message in messages] == ([] if channel is None else [channel])
    for message in messages:
        assert isinstance(json.loads(message.payload), dict)


def pose_message(number: int) -> Message:
    return Message.of(Channel.POSE, {"n": number})


def test_an_outbox_is_bounded_the_newest_stay_and_the_others_are_counted() -> None:
    outbox = Outbox()
    for number in range(1_000):
        outbox.put(pose_message(number))
        outbox.put(Message.of(Channel.EVENT, {"n": number}))
    taken = []
    while (message := outbox.take()) is not None:
        taken.append(message)
    assert len(taken) + outbox.num_lost == 2_000
    assert len(taken) < 1_000
    assert taken[-1] == pose_message(999)
    assert {message.channel for message in taken} == {Channel.POSE, Channel.EVENT}


def test_an_outbox_repeats_lasting_messages_the_newest_of_each_topic() -> None:
    outbox = Outbox()
    for number in range(3):
        outbox.put(Message.of(Channel.STATUS, {"n": number}))
    assert outbox.take() == Message.of(Channel.STATUS, {"n": 2})
    assert outbox.take() is None
    outbox.put(pose_message(1))
    outbox.repeat_lasting()
    outbox.repeat_lasting()
    assert outbox.take() == Message.of(Channel.STATUS, {"n": 2})
    assert outbox.take() == pose_message(1)
    assert outbox.take() is None
    assert outbox.num_lost == 0


def test_poses_pass_at_the_configured_rate() -> None:
    now_s = 0.0
    throttle = Throttle(10.0, clock=lambda: now_s)
    passed = 0
    for step in range(1_000):  # ten seconds at 100 Hz
        now_s = step / 100.0
        passed += throttle.allows()
    assert 100 <= passed <= 111  # the burst of the start included


def test_each_camera_has_its_own_share_of_poses() -> None:
    with view_of(config_for(free_port(), "mqtt.max_pose_hz=5")) as view:
        for frame_id in range(1, 41):
            camera_key = "left" if frame_id % 2 else "right"
            view.show_event(dataclasses.replace(posed(frame_id), camera_key=camera_key))
        waiting = []
        while (message := view._outbox.take()) is not None:
            if message.channel is Channel.POSE:
                waiting.append(json.loads(message.payload)["camera"])
        assert 5 <= waiting.count("left") <= 6
        assert 5 <= waiting.count("right") <= 6
