"""What to tell the person who holds a phone: facts of the run in, advice out. No I/O, no clock.

Times are those of the events, so advice follows from what was told and nothing else.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.phone.messages import Direction
from adapters.phone.motion_blur import Look
from engine.events import (
    BundleAdjusted,
    CommandTaken,
    Event,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    MapInitialized,
    RegistrationFailed,
    RunFinished,
)
from engine.types import DropReason, FrameId, RunCommand

LOST_AFTER_S = 2.0  # without a pose while frames arrive, on top of the usual wait for one
_GAP_S = 1.0  # between frames: the phone sent none
_MAX_USUAL_WAIT_S = 3.0  # a wait beyond it is the loss itself
_BEHIND_WAIT_S = 1.5  # for a pose, from which on a person should wait for the computer
_BEHIND_DROP_RATIO = 0.75
_MIN_RECENT, _MAX_RECENT = 12, 24  # frames that make a ratio
_BLUR_RATIO = 0.35  # of the sharpness that this camera reached lately
_MAX_SHIFT_RATIO = 0.12  # of the picture's width between two pictures; optical flow loses more
_RECENT_LOOKS = 5
_USUAL_LOOKS = 80
_MIN_USUAL_LOOKS = 15
_RECENT_KEYFRAMES = 5
_MAX_FAILURES = 3  # of the recent keyframes
_FEW_INLIERS = 35  # median of the recent keyframes
_MAX_REMEMBERED = 4000  # frames


class Advice(StrEnum):
    """What the person should do or know."""

    WAITING = "waiting"
    HOLD_STILL = "hold_still"
    BEGIN = "begin"
    MAPPING = "mapping"
    SLOWER = "slower"
    JOIN = "join"
    LOST = "lost"
    PAUSED = "paused"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhoneState:
    """What one phone shows; places are in the map's world."""

    advice: Advice
    hint: str  # one short sentence
    num_frames: int  # of this phone that reached the engine
    num_keyframes: int  # of the run
    num_registered: int
    num_points3D: int
    position_in_world: Direction | None  # of the newest frame with a pose
    heading_in_world: Direction | None  # where that frame heads
    lost_at_in_world: Direction | None  # only while lost


@dataclass(slots=True, kw_only=True)
class _PhoneNews:
    """What is known of one phone; every collection is bounded."""

    num_frames: int = 0
    received_at_s: OrderedDict[FrameId, float] = field(default_factory=OrderedDict)
    newest_at_s: float = 0.0
    posed_at_s: float | None = None  # when the newest frame that has a pose was received
    missing_since_s: float | None = None  # the first frame that no pose came after
    is_lost: bool = False
    position: Direction | None = None
    heading: Direction | None = None
    waits_s: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    was_dropped: deque[bool] = field(default_factory=lambda: deque(maxlen=_MAX_RECENT))
    looks: deque[Look] = field(default_factory=lambda: deque(maxlen=_USUAL_LOOKS))
    inliers: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT_KEYFRAMES))

    def remember(self, frame_id: FrameId, at_s: float) -> None:
        self.num_frames += 1
        self.received_at_s[frame_id] = at_s
        if len(self.received_at_s) > _MAX_REMEMBERED:
            self.received_at_s.popitem(last=False)
        gap_s = at_s - self.newest_at_s
        self.newest_at_s = at_s
        if self.missing_since_s is None:
            self.missing_since_s = at_s
        elif gap_s > _GAP_S:
            self.missing_since_s += gap_s  # nobody looked for a place meanwhile

    def posed(self, event: FramePosed) -> None:
        if event.is_first:
            self.was_dropped.append(False)
            self.waits_s.append(event.latency_s)
        received_at_s = self.received_at_s.get(event.frame_id)
        if received_at_s is None or received_at_s < (self.posed_at_s or 0.0):
            return  # an older frame got its pose late
        self.posed_at_s = self.missing_since_s = received_at_s
        self.position = event.cam_center_in_world
        self.heading = _heading(event.world_from_cam_quat_xyzw)

    @property
    def usual_wait_s(self) -> float:
        if not self.waits_s:
            return 0.0
        return min(statistics.median(self.waits_s), _MAX_USUAL_WAIT_S)


class RunFeedback:
    """Follows a run and says what each phone should show.

    ``frame_made`` tells which frame came from which phone, before the engine's events about that
    frame. What is remembered is bounded, but for a number for each keyframe. One thread at a time.
    """

    def __init__(self) -> None:
        self.version = 0  # grows with everything that may change a state
        self._phones: dict[int, _PhoneNews] = {}
        self._phone_of: OrderedDict[FrameId, int] = OrderedDict()
        self._up_of: OrderedDict[FrameId, Direction] = OrderedDict()
        self._up_sum = (0.0, 0.0, 0.0)
        self._num_ups = 0
        self._keyframes_of: dict[FrameId, int] = {}
        self._num_keyframes = 0
        self._num_registered = 0
        self._num_points3D = 0
        self._map_since_s: float | None = None
        self._is_paused = False
        self._has_ended = False

    @property
    def up_in_world(self) -> Direction | None:
        """The direction away from the ground, once phones have told it often enough."""
        return self._up_sum if self._num_ups >= 10 else None

    def phone_of_keyframe(self, frame_id: FrameId) -> int:
        """The phone that took a keyframe; 0: none of them."""
        return self._keyframes_of.get(frame_id, 0)

    def frame_made(
        self, frame_id: FrameId, *, phone: int, look: Look | None, up_in_camera: Direction | None
    ) -> None:
        """A frame of a phone is on its way to the engine."""
        self._phone_of[frame_id] = phone
        if up_in_camera is not None:
            self._up_of[frame_id] = up_in_camera
        for remembered in (self._phone_of, self._up_of):
            while len(remembered) > _MAX_REMEMBERED:
                remembered.popitem(last=False)
        if look is not None:
            self._news(phone).looks.append(look)

    def take(self, event: Event) -> None:
        """Takes one fact."""
        self.version += 1
        match event:
            case FrameReceived() | FrameDropped() | FramePosed() | KeyframeAdded():
                self._take_frame_fact(event)
            case RegistrationFailed():
                self._outcome(event.frame_id, num_inliers=0)
            case CommandTaken():
                self._take_command(event.command)
            case RunFinished():
                self._has_ended = True
                self._num_registered = event.num_registered
            case _:
                self._take_map_fact(event)

    def end(self) -> None:
        """No phone will be listened to any more."""
        self.version += 1
        self._has_ended = True

    def state_of(self, phone: int) -> PhoneState:
        """What a phone should show now."""
        news = self._news(phone)
        advice, hint = self._advice(news)
        return PhoneState(
            advice=advice,
            hint=hint,
            num_frames=news.num_frames,
            num_keyframes=self._num_keyframes,
            num_registered=self._num_registered,
            num_points3D=self._num_points3D,
            position_in_world=news.position,
            heading_in_world=news.heading,
            lost_at_in_world=news.position if advice is Advice.LOST else None,
        )

    def _news(self, phone: int) -> _PhoneNews:
        return self._phones.setdefault(phone, _PhoneNews())

    def _news_of(self, frame_id: FrameId | None) -> _PhoneNews | None:
        phone = self._phone_of.get(frame_id) if frame_id is not None else None
        return None if phone is None else self._news(phone)

    def _take_frame_fact(
        self, event: FrameReceived | FrameDropped | FramePosed | KeyframeAdded
    ) -> None:
        if isinstance(event, KeyframeAdded):
            self._num_keyframes += 1
            self._keyframes_of[event.frame_id] = self._phone_of.get(event.frame_id, 0)
        news = self._news_of(event.frame_id)
        if news is None:
            return
        match event:
            case FrameReceived():
                news.remember(event.frame_id, event.at_s)
            case FrameDropped(reason=DropReason.OVERLOAD):
                news.was_dropped.append(True)
            case FramePosed():
                news.posed(event)
                self._add_up(event)
        self._update_lost(news)

    def _take_map_fact(self, event: Event) -> None:
        match event:
            case MapInitialized():
                self._map_since_s = event.at_s
                self._num_registered = 2
                self._num_points3D = event.num_points3D
                self._forget_places()
            case FrameRegistered():
                self._num_registered = event.num_registered
                self._num_points3D = event.num_points3D
                self._outcome(event.frame_id, num_inliers=event.num_inliers)
            case BundleAdjusted():
                self._num_points3D = event.num_points3D
            case Georeferenced():
                self._forget_places()

    def _take_command(self, command: RunCommand) -> None:
        if command in (RunCommand.PAUSE, RunCommand.RESUME):
            self._is_paused = command is RunCommand.PAUSE
            for news in self._phones.values():
                news.missing_since_s = None  # no frame was looked at meanwhile

    def _forget_places(self) -> None:
        """The map has another frame of reference: what was said in the old one is void."""
        self._up_sum, self._num_ups = (0.0, 0.0, 0.0), 0
        for news in self._phones.values():
            news.position = news.heading = None

    def _outcome(self, frame_id: FrameId, *, num_inliers: int) -> None:
        news = self._news_of(frame_id)
        if news is not None:
            news.inliers.append(num_inliers)

    def _add_up(self, event: FramePosed) -> None:
        up = self._up_of.pop(event.frame_id, None)
        if up is not None:
            turned = _rotated(event.world_from_cam_quat_xyzw, up)
            x, y, z = (total + part for total, part in zip(self._up_sum, turned, strict=True))
            self._up_sum = x, y, z
            self._num_ups += 1

    def _update_lost(self, news: _PhoneNews) -> None:
        if self._map_since_s is None or news.missing_since_s is None:
            news.is_lost = False
            return
        without_s = news.newest_at_s - max(news.missing_since_s, self._map_since_s)
        news.is_lost = without_s > LOST_AFTER_S + news.usual_wait_s

    def _advice(self, news: _PhoneNews) -> tuple[Advice, str]:
        if self._has_ended:
            return Advice.ENDED, "You can close this page"
        if self._is_paused:
            return Advice.PAUSED, "The run takes no pictures for now"
        if not news.num_frames:
            return Advice.WAITING, "The first pictures are on their way"
        if self._map_since_s is None:
            if not self._num_keyframes:
                return Advice.HOLD_STILL, "Point the camera at what you want to map"
            return Advice.BEGIN, "A few steps sideways, so that the map can begin"
        return self._mapping_advice(news)

    def _mapping_advice(self, news: _PhoneNews) -> tuple[Advice, str]:
        if news.is_lost and news.position is None:
            return Advice.JOIN, "Point the camera at something that is on the map"
        if news.is_lost:
            return Advice.LOST, "Go back to the mark on the map and look the same way"
        too_fast = _why_too_fast(news)
        if too_fast:
            return Advice.SLOWER, too_fast
        if _is_behind(news):
            return Advice.HOLD_STILL, "The computer is catching up"
        return Advice.MAPPING, "Keep going at this pace"


def _why_too_fast(news: _PhoneNews) -> str:
    """What suffers from the speed; empty when nothing does."""
    if _is_blurred(news.looks):
        return "The picture is blurred"
    if _moves_fast(news.looks):
        return "The picture changes too quickly"
    if _fails_often(news.inliers):
        return "Keep more of what you saw in the picture"
    return ""


def _is_blurred(looks: Iterable[Look]) -> bool:
    values = [look.sharpness for look in looks]
    if len(values) < _MIN_USUAL_LOOKS:
        return False
    usual = sorted(values)[len(values) * 3 // 4]
    return statistics.median(values[-_RECENT_LOOKS:]) < _BLUR_RATIO * usual


def _moves_fast(looks: deque[Look]) -> bool:
    recent = list(looks)[-_RECENT_LOOKS:]
    shifts = [look.shift_ratio for look in recent if look.shift_ratio is not None]
    return len(shifts) >= 3 and statistics.median(shifts) > _MAX_SHIFT_RATIO


def _fails_often(inliers: deque[int]) -> bool:
    """Inliers of the recent keyframes; 0: not registered."""
    if len(inliers) < _RECENT_KEYFRAMES:
        return False
    failures = sum(not count for count in inliers)
    return failures >= _MAX_FAILURES or statistics.median(inliers) < _FEW_INLIERS


def _is_behind(news: _PhoneNews) -> bool:
    if news.usual_wait_s > _BEHIND_WAIT_S:
        return True
    enough = len(news.was_dropped) >= _MIN_RECENT
    return enough and sum(news.was_dropped) > _BEHIND_DROP_RATIO * len(news.was_dropped)


def _heading(quat_xyzw: tuple[float, float, float, float]) -> Direction:
    """Where a camera heads: between its view and its upright, which no pitch turns around."""
    return _rotated(quat_xyzw, (0.0, -1.0, 1.0))


def _rotated(quat_xyzw: tuple[float, float, float, float], vector: Direction) -> Direction:
    """``vector`` turned by a unit quaternion: v + 2 q x (q x v + w v)."""
    qx, qy, qz, qw = quat_xyzw
    vx, vy, vz = vector
    ax, ay, az = (
        qy * vz - qz * vy + qw * vx,
        qz * vx - qx * vz + qw * vy,
        qx * vy - qy * vx + qw * vz,
    )
    return (
        vx + 2.0 * (qy * az - qz * ay),
        vy + 2.0 * (qz * ax - qx * az),
        vz + 2.0 * (qx * ay - qy * ax),
    )
