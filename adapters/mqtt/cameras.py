"""The cameras behind an MQTT source's topics: their keys, their clocks and their positions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from adapters.live.capture_clock import CaptureClock
from adapters.mqtt.telemetry import Telemetry, Unreadable, shape_of
from adapters.mqtt.topics import Levels, printable
from engine.types import GpsReading, LeftOut, SourceNotice, SourceState

_MAX_RECENT = 32  # positions kept for a camera whose first frame is yet to come


@dataclass(slots=True, kw_only=True, eq=False)
class Camera:
    """One sender of images of one size."""

    key: str
    number: int  # in order of appearance, from 1
    levels: Levels  # of its topic
    clock: CaptureClock = field(default_factory=CaptureClock)
    captured_at_s: float = 0.0  # of its newest frame


class Cameras:
    """At most so many cameras; one that shows up is there for the rest of the run."""

    def __init__(self, max_cameras: int) -> None:
        self._max_cameras = max_cameras
        self._of_key: dict[str, Camera] = {}

    def may_be_one(self, levels: Levels) -> bool:
        """Whether images of a topic may be taken: it is known, or there is room for it."""
        return len(self._of_key) < self._max_cameras or bool(self.at(levels))

    def at(self, levels: Levels | None) -> list[Camera]:
        """The cameras of a topic so far; None: of all topics."""
        return [
            camera for camera in self._of_key.values() if levels is None or camera.levels == levels
        ]

    def find(self, topic: str, width: int, height: int) -> Camera | None:
        """The camera that sends images of this size on this topic, when it is known."""
        return self._of_key.get(_key(topic, width, height))

    def add(self, topic: str, levels: Levels, width: int, height: int) -> Camera | None:
        """Makes room for a new camera, or says None when there is none."""
        if len(self._of_key) >= self._max_cameras:
            return None
        camera = Camera(key=_key(topic, width, height), number=len(self._of_key) + 1, levels=levels)
        self._of_key[camera.key] = camera
        return camera


def _key(topic: str, width: int, height: int) -> str:
    return f"{printable(topic)}|{width}x{height}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sighting:
    telemetry: Telemetry
    arrived_at_s: float


class Positions:
    """Positions that come beside the frames, put on the clocks of the cameras they belong to."""

    def __init__(
        self,
        *,
        source: str,
        cameras: Cameras,
        max_topics: int,
        put: Callable[[GpsReading | SourceNotice], None],
    ) -> None:
        """Starts without any.

        Args:
            source: the source's label.
            cameras: those known so far.
            max_topics: positions on more topics are left out until their cameras show up.
            put: takes readings, and notices of what is not read.
        """
        self._source = source
        self._cameras = cameras
        self._max_topics = max_topics
        self._put = put
        self._recent: dict[Levels | None, deque[_Sighting]] = {}
        self._num_unreadable: Counter[Unreadable] = Counter()
        self._examples: dict[Unreadable, str] = {}

    def add(self, telemetry: Telemetry, *, levels: Levels | None, arrived_at_s: float) -> None:
        """Takes a position of the cameras of a topic; None: of all."""
        sighting = _Sighting(telemetry=telemetry, arrived_at_s=arrived_at_s)
        if levels in self._recent or len(self._recent) < self._max_topics:
            recent = self._recent.setdefault(levels, deque(maxlen=_MAX_RECENT))
            recent.append(sighting)
        for camera in self._cameras.at(levels):
            self._emit_reading(sighting, camera)

    def catch_up(self, camera: Camera) -> None:
        """Gives a camera that appeared just now the positions from before its first frame."""
        for levels in (camera.levels, None):
            for sighting in self._recent.get(levels, ()):
                self._emit_reading(sighting, camera)

    def count_unreadable(self, why: Unreadable, payload: bytes) -> None:
        """Counts a message without a position, and reports those of its kind.

        The first one, the tenth, the hundredth and so on, with the names and types of the first:
        what it says may be nobody's business.
        """
        self._num_unreadable[why] += 1
        if why not in self._examples:
            self._examples[why] = shape_of(payload)
        if not _is_power_of_ten(number := self._num_unreadable[why]):
            return
        example = self._examples[why]
        messages = "a message" if number == 1 else f"{number} messages"
        self._put(
            SourceNotice(
                source=self._source,
                state=SourceState.CONNECTED,
                detail=f"{messages} of telemetry left out, which {why}: {example}",
                left_out=tuple(
                    LeftOut(
                        kind="telemetry",
                        reason=reason,
                        num_files=count,
                        example=self._examples[reason],
                        is_missed=reason is not Unreadable.NO_FIX,
                    )
                    for reason, count in self._num_unreadable.items()
                ),
            )
        )

    def _emit_reading(self, sighting: _Sighting, camera: Camera) -> None:
        fix = sighting.telemetry.position.fix
        time_s = camera.clock.on_this_clock(
            sighting.telemetry.sender_time_s, arrived_at_s=sighting.arrived_at_s
        )
        reading = GpsReading(
            source=self._source, camera_key=camera.key, captured_at_s=time_s, fix=fix
        )
        self._put(reading)


def _is_power_of_ten(number: int) -> bool:
    return str(number).rstrip("0") == "1"
