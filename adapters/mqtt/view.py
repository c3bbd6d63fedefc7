"""MQTT view: publishes a run's poses, events and figures, and receives commands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapters.live.run_counters import RunCounters
from adapters.mqtt.connection import (
    PASSWORD_VARIABLE,
    MqttAddress,
    MqttLink,
    is_refusal,
    keep_connected,
)
from adapters.mqtt.globe_place import GlobePlace
from adapters.mqtt.map_points import MapPoints, PointsRequest, read_map_points, read_request
from adapters.mqtt.messages import (
    Channel,
    Context,
    Message,
    RunState,
    messages_of,
    metrics_message,
    read_command,
    refused_command,
    refused_points,
    status_message,
)
from adapters.mqtt.outbox import Outbox, Throttle
from engine.config import Config
from engine.dense_types import GroundPicture
from engine.errors import ConfigError
from engine.events import (
    CommandTaken,
    Event,
    FramePosed,
    FrameReceived,
    Georeferenced,
    MainMapChanged,
    RunFinished,
    RunStarted,
    SnapshotWritten,
    VerdictChanged,
)
from engine.ports import RunControl
from engine.types import Frame, FrameId, FramePose, MapCounts, RunCommand, SourceState

if TYPE_CHECKING:
    import aiomqtt

_METRICS_PERIOD_S = 1.0
_CLOSE_TIMEOUT_S = 2.0
_LAST_MESSAGES_S = 1.5  # of those, for the messages that still wait
_MAX_WAITING_COMMANDS = 32
_MAX_NAMES = 4_096  # of frames that may still get a pose
_MAX_REFUSALS_HZ = 5.0  # so that requests without end do not crowd out what else happens
_POINTS_PERIOD_S = 1.0  # between answers to requests for points
_KEY = "mqtt.publish"

logger = logging.getLogger(__name__)


class MqttView:
    """Publishes the events of a run below a prefix, on a thread and an event loop of its own.

    Topics are those of ``Channel``, payloads JSON objects. The broker may be absent, slow or gone:
    the run never waits for it. Messages that wait too long are dropped and counted under
    ``metrics``.
    """

    def __init__(
        self, link: MqttLink, *, config: Config, run_path: Path, control: RunControl | None
    ) -> None:
        """Uses a checked address; ``open`` checks it and starts the thread."""
        self._link = link
        self._prefix = link.address.topic.rstrip("/")
        self._run = str(run_path.absolute())
        self._control = control if config.mqtt.commands else None
        self._max_pose_hz = config.mqtt.max_pose_hz
        self._max_points = config.mqtt.max_points
        self._base_url = config.mqtt.snapshot_base_url
        self._names: dict[FrameId, str] = {}  # of the newest frames
        self._place: GlobePlace | None = None
        self._newest_snapshot: Path | None = None
        self._outbox = Outbox()
        self._throttles: dict[str, Throttle] = {}  # by camera
        self._state = RunState.RUNNING
        self._status: dict[str, object] = {}  # what else the last message of the state said
        self._lock = threading.Lock()  # of the two that follow
        self._counters = RunCounters()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_over = False  # nothing more can be published
        self._is_connected = False
        self._changed = asyncio.Event()  # these three belong to the loop
        self._closing = asyncio.Event()
        self._refusals = Throttle(_MAX_REFUSALS_HZ)
        self._requests: asyncio.Queue[PointsRequest] = asyncio.Queue(maxsize=1)
        self._is_started = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="mqtt view", daemon=True)

    @classmethod
    def open(cls, config: Config, *, run_path: Path, control: RunControl | None) -> MqttView:
        """Starts to publish a run; connecting goes on in the background.

        Args:
            config: with ``mqtt.publish`` set.
            run_path: of the run folder.
            control: receives commands, where ``mqtt.commands`` allows them.

        Raises:
            ConfigError: the address is invalid or holds a password, commands are allowed without a
                user and a password, or the URL of snapshots is none.
            AdapterUnavailableError: a package is missing.
        """
        address = _address_of(config)
        _check_base_url(config.mqtt.snapshot_base_url)
        link = MqttLink(address, config=config)
        view = cls(link, config=config, run_path=run_path, control=control)
        view._put(status_message(RunState.RUNNING, run=view._run))
        view._thread.start()
        view._is_started.wait()
        return view

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Nothing: images are not published."""

    def show_counts(self, counts: MapCounts) -> None:
        """Keeps how large the map is for the messages to come."""
        with self._lock:
            self._counters.update_counts(counts)

    def show_ground(self, ground: GroundPicture) -> None:
        """Queues how well the ground is covered."""
        if ground.coverage:
            self._put(Message(channel=Channel.COVERAGE, payload=ground.coverage))

    def show_event(self, event: Event) -> None:
        """Queues the messages of an event for publishing."""
        with self._lock:
            self._counters.update(event)
        self._learn(event)
        may_pass = not isinstance(event, FramePosed) or self._may_pass(event.camera_key)
        context = Context(names=self._names, place=self._place, snapshot_base_url=self._base_url)
        for message in messages_of(event, context):
            if may_pass or message.channel is not Channel.POSE:
                self._put(message)
        if (state := _state_after(event)) is not None:
            self._state, self._status = state, _figures(event)
            self._put_status()
        elif isinstance(event, VerdictChanged):
            self._put_status()

    def _learn(self, event: Event) -> None:
        """Keeps of an event what messages to come say."""
        match event:
            case FrameReceived():
                self._names[event.frame_id] = event.name
                if len(self._names) > _MAX_NAMES:
                    del self._names[next(iter(self._names))]
            case Georeferenced():
                self._place = GlobePlace.of(event)
            case MainMapChanged():
                self._place = None  # until it is known of this map
            case SnapshotWritten():
                self._newest_snapshot = Path(os.path.abspath(event.path))

    def close(self) -> None:
        """Publishes the end of the run if the broker is there, and disconnects, within 2 s.

        A broker that does not answer publishes it later, by the last will.
        """
        if self._counters.finished is None:
            self._state, self._status = RunState.STOPPED, {}
            self._put_status()
        self._call(self._closing.set)
        self._call(self._changed.set)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.debug("%s: did not close in time", self._link.address.broker)

    def _may_pass(self, camera_key: str) -> bool:
        """Whether the rate limit allows to publish a pose of a camera."""
        if camera_key not in self._throttles:
            self._throttles[camera_key] = Throttle(self._max_pose_hz)
        return self._throttles[camera_key].allows()

    def _put_status(self) -> None:
        """Queues the state of the run with the verdict on its map."""
        verdict = self._counters.verdict
        self._put(status_message(self._state, run=self._run, verdict=verdict, **self._status))

    def _put(self, message: Message) -> None:
        if not self._is_over:
            self._outbox.put(message)
            self._call(self._changed.set)

    def _call(self, callback: Callable[[], object]) -> None:
        """Schedules a callback on the loop, as long as it runs."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback)

    # -- on the view's thread -------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            asyncio.run(self._publish_until_closed())
        finally:
            self._is_over = True

    async def _publish_until_closed(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_started.set()
        connecting = asyncio.create_task(
            keep_connected(self._link, self._use, report=self._log_state, client=self._connection),
            name="connection",
        )
        closing = asyncio.create_task(self._closing.wait(), name="closing")
        await asyncio.wait((connecting, closing), return_when=asyncio.FIRST_COMPLETED)
        if self._is_connected:
            await asyncio.wait((connecting,), timeout=_LAST_MESSAGES_S)
        with self._lock:
            self._loop = None
        closing.cancel()
        if connecting.done():
            connecting.result()  # raises unexpected errors

    def _connection(self) -> AbstractAsyncContextManager[aiomqtt.Client]:
        import aiomqtt

        will = status_message(RunState.OFFLINE, run=self._run)
        return self._link.client(
            will=aiomqtt.Will(self._topic(will.channel), will.payload, qos=1, retain=True),
            max_queued_incoming=_MAX_WAITING_COMMANDS,
        )

    def _log_state(self, state: SourceState, detail: str) -> None:
        levels = {SourceState.LOST: logging.WARNING, SourceState.REFUSED: logging.ERROR}
        level = levels.get(state, logging.INFO)
        logger.log(level, "%s: %s: %s", self._link.address.label, state.value, detail)

    def _topic(self, channel: Channel) -> str:
        return f"{self._prefix}/{channel}"

    async def _use(self, client: aiomqtt.Client) -> None:
        """Publishes and reads until the connection breaks or the view is closed."""
        self._is_connected = True
        if self._control is not None:
            await self._subscribe(client, Channel.COMMAND)
        if self._max_points:
            await self._subscribe(client, Channel.POINTS_REQUEST)
        self._log_state(SourceState.CONNECTED, "publishing the run there")
        self._outbox.repeat_lasting()
        tasks = [
            asyncio.create_task(self._write(client), name="publish"),
            asyncio.create_task(self._read(client), name="commands"),
            asyncio.create_task(self._send_points(client), name="points"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._is_connected = False
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            task.result()

    async def _subscribe(self, client: aiomqtt.Client, channel: Channel) -> None:
        topic = self._topic(channel)
        codes = await client.subscribe(topic, qos=1)
        if any(is_refusal(code) for code in codes):
            logger.warning("%s: the broker does not let us read it", topic)

    async def _write(self, client: aiomqtt.Client) -> None:
        """Publishes queued messages, and figures once a second; ends when the view is closed."""
        loop = asyncio.get_running_loop()
        metrics_at_s = loop.time()
        while True:
            is_last = self._closing.is_set()
            if is_last or loop.time() >= metrics_at_s:
                metrics_at_s = loop.time() + _METRICS_PERIOD_S
                await self._publish(client, self._metrics())
            while (message := self._outbox.take()) is not None:
                await self._publish(client, message)
            if is_last:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(metrics_at_s):
                    await self._changed.wait()

    async def _publish(self, client: aiomqtt.Client, message: Message) -> None:
        import aiomqtt

        try:
            await client.publish(
                self._topic(message.channel),
                message.payload,
                qos=1 if message.is_lasting else 0,
                retain=message.is_lasting,
            )
        except aiomqtt.MqttError:
            if not message.is_lasting:  # those are published again
                self._outbox.count_lost()
            raise

    def _metrics(self) -> Message:
        with self._lock:
            return metrics_message(self._counters, lost_messages=self._outbox.num_lost)

    async def _read(self, client: aiomqtt.Client) -> None:
        """Reads commands; also without any to read, as it notices a broken connection."""
        async for message in client.messages:
            if message.retain:
                logger.warning("%s: what is from before is ignored", message.topic)
            elif message.topic.value == self._topic(Channel.POINTS_REQUEST):
                self._take_request(message.payload)
            else:
                self._take_command(message.payload)

    def _take_request(self, payload: bytes) -> None:
        """Queues a request for points; one may wait while another is answered."""
        request = read_request(payload)
        if request is None:
            self._refuse_points("neither empty nor a JSON object with id and max_points")
            return
        try:
            self._requests.put_nowait(request)
        except asyncio.QueueFull:
            self._refuse_points("another request is being answered; ask again later")

    def _refuse_points(self, why: str) -> None:
        """Says why no points come; of many refusals at once only the first few."""
        if self._refusals.allows():
            self._put(refused_points(why))

    async def _send_points(self, client: aiomqtt.Client) -> None:
        """Answers requests for points, one after the other."""
        while True:
            request = await self._requests.get()
            points = await self._points_for(request)
            if isinstance(points, str):
                self._refuse_points(points)
            else:
                for chunk in points.chunks():
                    await client.publish(self._topic(Channel.POINTS), chunk, qos=1)
            await asyncio.sleep(_POINTS_PERIOD_S)

    async def _points_for(self, request: PointsRequest) -> MapPoints | str:
        """The points of the newest snapshot, or why there are none."""
        if self._newest_snapshot is None:
            return "there is no snapshot yet"
        return await asyncio.to_thread(
            read_map_points, self._newest_snapshot, request, max_points=self._max_points
        )

    def _take_command(self, payload: bytes) -> None:
        command = read_command(payload)
        if self._control is None:
            return
        if command is None:
            logger.warning("%s: no such command", self._topic(Channel.COMMAND))
            self._put(refused_command())
            return
        logger.info("%s: %s", self._topic(Channel.COMMAND), command)
        self._control(command)


def _address_of(config: Config) -> MqttAddress:
    """The address to publish at, with the password from the environment.

    Raises:
        ConfigError: it is invalid or not allowed; messages hold no credentials.
    """
    try:
        address = MqttAddress.parse(config.mqtt.publish)
    except ValueError as error:
        raise ConfigError(f"{_KEY}: not an address of MQTT: {error}") from None
    if address.password is not None:
        # The configuration is written beside every run.
        raise ConfigError(f"{_KEY}: no password here, please; put it into {PASSWORD_VARIABLE}")
    if not address.topic.strip("/") or "+" in address.topic or "#" in address.topic:
        raise ConfigError(f"{_KEY}: the topic is a prefix, and so has no wildcards")
    if config.mqtt.commands and not (address.user and address.secret):
        raise ConfigError(
            f"mqtt.commands: only with a user in {_KEY} and a password in {PASSWORD_VARIABLE}: "
            "whoever may write there could stop the run"
        )
    return address


def _check_base_url(text: str) -> None:
    """Refuses what is no URL of a folder.

    Raises:
        ConfigError: it is none; the message does not hold it, as it may hold a password.
    """
    key = "mqtt.snapshot_base_url"
    if not text:
        return
    try:
        parts = urlsplit(text)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or not parts.scheme or not text.isprintable() or " " in text:
        raise ConfigError(f"{key}: expected a URL such as https://HOST/runs")
    if parts.username is not None or parts.password is not None:
        # The configuration is written beside every run.
        raise ConfigError(f"{key}: no user and no password here, please")
    if parts.query or parts.fragment:
        raise ConfigError(f"{key}: a URL of a folder has no ? and no #")


def _state_after(event: Event) -> RunState | None:
    """The state of the run after an event; None where it does not change."""
    match event:
        case RunStarted():
            return RunState.RUNNING
        case RunFinished():
            return RunState.STOPPED
        case CommandTaken(command=RunCommand.PAUSE):
            return RunState.PAUSED
        case CommandTaken(command=RunCommand.RESUME):
            return RunState.RUNNING
    return None


def _figures(event: Event) -> dict[str, object]:
    match event:
        case RunStarted():
            return {"sources": event.sources, "matcher": event.matcher}
        case RunFinished():
            return {
                "stopped_by": event.stopped_by,
                "keyframes": event.num_keyframes,
                "registered": event.num_registered,
                "in_other_maps": event.num_in_other_maps,
            }
    return {}
