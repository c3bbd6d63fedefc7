"""What a phone shows the person who holds it: events of the run in, advice out. No I/O, no clock.

Times are those of the events, so advice follows from these and nothing else.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from adapters.phone.doubt_words import doubt_in_words
from adapters.phone.messages import Direction
from adapters.phone.motion_blur import MotionBlur
from engine.events import (
    BundleAdjusted,
    CommandTaken,
    EarlyMapMade,
    Event,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    MainMapChanged,
    MapInitialized,
    RegistrationFailed,
    RunFinished,
    VerdictChanged,
)
from engine.types import DropReason, FrameId, RunCommand, Verdict, VerdictLevel

LOST_AFTER_S = 2.0  # without a pose while frames arrive, on top of the usual wait for one
_GAP_S = 1.0  # between frames: the phone sent none
_MAX_USUAL_WAIT_S = 3.0  # a wait beyond it is the loss itself
_BEHIND_WAIT_S = 1.5  # for a pose, from which on a person should wait for the computer
_BEHIND_DROP_RATIO = 0.75
_MIN_RECENT, _MAX_RECENT = 12, 24  # frames that make a ratio
_BLUR_RATIO = 0.35  # of the sharpness that this camera reached lately
_MAX_SHIFT_RATIO = 0.12  # of the picture's width between two pictures; optical flow loses more
_RECENT_PICTURES = 5
_USUAL_PICTURES = 80
_MIN_USUAL_PICTURES = 15
_RECENT_KEYFRAMES = 5
_MAX_FAILURES = 3  # of the recent keyframes
_FEW_INLIERS = 35  # median of the recent keyframes
_MAX_REMEMBERED = 4000  # frames


Key = TypeVar("Key")
Value = TypeVar("Value")


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
    verdict: VerdictLevel  # on the whole map
    doubt: str  # the gravest reason for it and what helps, without frames; empty: none
    doubt_age_s: float | None  # since this phone filmed what it is about; None: it did not
    num_frames: int  # of this phone that reached the engine
    num_keyframes: int  # of the run
    num_registered: int
    num_points3D: int
    position_in_world: Direction | None  # of the newest frame with a pose
    heading_in_world: Direction | None  # where that frame heads
    lost_at_in_world: Direction | None  # only while lost


@dataclass(slots=True, kw_only=True)
class _PhoneProgress:
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
    blurs: deque[MotionBlur] = field(default_factory=lambda: deque(maxlen=_USUAL_PICTURES))
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
            self.missing_since_s += gap_s  # no place was searched for meanwhile

    def posed(self, event: FramePosed) -> None:
        if event.is_first:
            self.was_dropped.append(False)
            self.waits_s.append(event.latency_s)
        received_at_s = self.received_at_s.get(event.frame_id)
        if received_at_s is None or received_at_s < (self.posed_at_s or 0.0):
            return  # an older frame got its pose late
        self.posed_at_s = self.missing_since_s = received_at_s
        if event.map_number != 0:
            self.position = self.heading = None  # it is in a map apart, nobody knows where
            return
        self.position = event.cam_center_in_world
        self.heading = _heading(event.world_from_cam_quat_xyzw)

    @property
    def usual_wait_s(self) -> float:
        if not self.waits_s:
            return 0.0
        return min(statistics.median(self.waits_s), _MAX_USUAL_WAIT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivedPicture:
    """A picture of a phone waits for the engine."""

    index: int  # in the source
    phone: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedPicture:
    """A picture that does not wait any more, because its turn came."""

    index: int  # in the source
    phone: int
    frame_id: FrameId | None  # None: it could not be used
    blur: MotionBlur | None
    up_in_camera: Direction | None


class RunFeedback:
    """Follows a run and says what each phone should show.

    Pictures come before the engine's events about their frames. What is remembered is bounded, but
    for a number for each keyframe. One thread at a time.
    """

    def __init__(self, *, source: str = "") -> None:
        """Begins before the run.

        Args:
            source: the label of the phones' source.
        """
        self.version = 0  # grows with everything that may change a state
        self._source = source
        self._phone_of_index: OrderedDict[int, int] = OrderedDict()  # of pictures that wait
        self._phones: dict[int, _PhoneProgress] = {}
        self._phone_of: OrderedDict[FrameId, int] = OrderedDict()
        self._up_of: OrderedDict[FrameId, Direction] = OrderedDict()
        self._up_sum = (0.0, 0.0, 0.0)
        self._num_ups = 0
        self._keyframes_of: dict[FrameId, int] = {}
        self._num_keyframes = 0
        self._num_registered = 0
        self._num_points3D = 0
        self._map_since_s: float | None = None
        self._verdict = Verdict()
        self._is_paused = False
        self._has_ended = False

    @property
    def up_in_world(self) -> Direction | None:
        """The direction away from the ground, once phones have sent it often enough."""
        return self._up_sum if self._num_ups >= 10 else None

    def phone_of_keyframe(self, frame_id: FrameId) -> int:
        """The phone that took a keyframe; 0: none of them."""
        return self._keyframes_of.get(frame_id, 0)

    def add_arrived(self, picture: ArrivedPicture) -> None:
        """Adds a picture that waits; if it is dropped, the engine is behind."""
        _remember(self._phone_of_index, picture.index, picture.phone)

    def add_decoded(self, picture: DecodedPicture) -> None:
        """Adds a picture that the engine decoded, before its events about the frame."""
        self._phone_of_index.pop(picture.index, None)
        if picture.frame_id is None:
            return
        _remember(self._phone_of, picture.frame_id, picture.phone)
        if picture.up_in_camera is not None:
            _remember(self._up_of, picture.frame_id, picture.up_in_camera)
        if picture.blur is not None:
            self._progress(picture.phone).blurs.append(picture.blur)

    def take(self, event: Event) -> None:
        """Takes one event."""
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
        progress = self._progress(phone)
        advice, hint = self._advice(progress)
        return PhoneState(
            advice=advice,
            hint=hint,
            verdict=self._verdict.level,
            doubt=doubt_in_words(self._verdict.reasons[0]) if self._verdict.reasons else "",
            doubt_age_s=self._doubt_age_s(progress),
            num_frames=progress.num_frames,
            num_keyframes=self._num_keyframes,
            num_registered=self._num_registered,
            num_points3D=self._num_points3D,
            position_in_world=progress.position,
            heading_in_world=progress.heading,
            lost_at_in_world=progress.position if advice is Advice.LOST else None,
        )

    def _doubt_age_s(self, progress: _PhoneProgress) -> float | None:
        frame_ids = self._verdict.reasons[0].frame_ids if self._verdict.reasons else ()
        times_s = [progress.received_at_s[i] for i in frame_ids if i in progress.received_at_s]
        return progress.newest_at_s - max(times_s) if times_s else None

    def _progress(self, phone: int) -> _PhoneProgress:
        return self._phones.setdefault(phone, _PhoneProgress())

    def _progress_of(
        self, event: FrameReceived | FrameDropped | FramePosed | KeyframeAdded
    ) -> _PhoneProgress | None:
        """The phone that a frame is of, or a picture that was dropped before it became one."""
        phone: int | None = None
        if event.frame_id is not None:
            phone = self._phone_of.get(event.frame_id)
        elif isinstance(event, FrameDropped) and event.source == self._source:
            phone = self._phone_of_index.pop(event.index, None)
        return None if phone is None else self._progress(phone)

    def _take_frame_fact(
        self, event: FrameReceived | FrameDropped | FramePosed | KeyframeAdded
    ) -> None:
        if isinstance(event, KeyframeAdded):
            self._num_keyframes += 1
            self._keyframes_of[event.frame_id] = self._phone_of.get(event.frame_id, 0)
        progress = self._progress_of(event)
        if progress is None:
            return
        match event:
            case FrameReceived():
                progress.remember(event.frame_id, event.at_s)
            case FrameDropped(reason=DropReason.OVERLOAD):
                progress.was_dropped.append(True)
            case FramePosed():
                progress.posed(event)
                self._add_up(event)
        self._update_lost(progress)

    def _take_map_fact(self, event: Event) -> None:
        match event:
            case EarlyMapMade() | MapInitialized():
                self._map_since_s = event.at_s
                self._num_registered = 2
                self._num_points3D = event.num_points3D
                self._forget_places()
            case FrameRegistered():
                if event.map_number == 0:
                    self._num_registered = event.num_registered
                    self._num_points3D = event.num_points3D
                self._outcome(event.frame_id, num_inliers=event.num_inliers)
            case BundleAdjusted():
                self._num_points3D = event.num_points3D
            case MainMapChanged():
                self._num_registered = event.num_registered
                self._forget_places()
            case VerdictChanged():
                self._verdict = event.verdict
            case Georeferenced():
                self._forget_places()

    def _take_command(self, command: RunCommand) -> None:
        if command in (RunCommand.PAUSE, RunCommand.RESUME):
            self._is_paused = command is RunCommand.PAUSE
            for progress in self._phones.values():
                progress.missing_since_s = None  # no frame was taken meanwhile

    def _forget_places(self) -> None:
        """The map has another frame of reference: what was said in the old one is void."""
        self._up_sum, self._num_ups = (0.0, 0.0, 0.0), 0
        for progress in self._phones.values():
            progress.position = progress.heading = None

    def _outcome(self, frame_id: FrameId, *, num_inliers: int) -> None:
        phone = self._phone_of.get(frame_id)
        if phone is not None:
            self._progress(phone).inliers.append(num_inliers)

    def _add_up(self, event: FramePosed) -> None:
        up = self._up_of.pop(event.frame_id, None)
        if up is not None:
            turned = _rotated(event.world_from_cam_quat_xyzw, up)
            x, y, z = (total + part for total, part in zip(self._up_sum, turned, strict=True))
            self._up_sum = x, y, z
            self._num_ups += 1

    def _update_lost(self, progress: _PhoneProgress) -> None:
        if self._map_since_s is None or progress.missing_since_s is None:
            progress.is_lost = False
            return
        without_s = progress.newest_at_s - max(progress.missing_since_s, self._map_since_s)
        progress.is_lost = without_s > LOST_AFTER_S + progress.usual_wait_s

    def _advice(self, progress: _PhoneProgress) -> tuple[Advice, str]:
        if self._has_ended:
            return Advice.ENDED, "You can close this page"
        if self._is_paused:
            return Advice.PAUSED, "The run takes no pictures for now"
        if not progress.num_frames:
            return Advice.WAITING, "The first pictures are on their way"
        if self._map_since_s is None:
            if not self._num_keyframes:
                return Advice.HOLD_STILL, "Point the camera at what you want to map"
            return Advice.BEGIN, "A few steps sideways, so that the map can begin"
        return self._mapping_advice(progress)

    def _mapping_advice(self, progress: _PhoneProgress) -> tuple[Advice, str]:
        if progress.is_lost and progress.position is None:
            return Advice.JOIN, "Point the camera at something that is on the map"
        if progress.is_lost:
            return Advice.LOST, "Go back to the mark on the map and look the same way"
        too_fast = _why_too_fast(progress)
        if too_fast:
            return Advice.SLOWER, too_fast
        if _is_behind(progress):
            return Advice.HOLD_STILL, "The computer is catching up"
        return Advice.MAPPING, "Keep going at this pace"


def _remember(remembered: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Adds an entry, and forgets the oldest beyond so many."""
    remembered[key] = value
    while len(remembered) > _MAX_REMEMBERED:
        remembered.popitem(last=False)


def _why_too_fast(progress: _PhoneProgress) -> str:
    """What suffers from the speed; empty when nothing does."""
    if _is_blurred(progress.blurs):
        return "The picture is blurred"
    if _moves_fast(progress.blurs):
        return "The picture changes too quickly"
    if _fails_often(progress.inliers):
        return "Keep more of what you saw in the picture"
    return ""


def _is_blurred(blurs: Iterable[MotionBlur]) -> bool:
    values = [blur.sharpness for blur in blurs]
    if len(values) < _MIN_USUAL_PICTURES:
        return False
    usual = sorted(values)[len(values) * 3 // 4]
    return statistics.median(values[-_RECENT_PICTURES:]) < _BLUR_RATIO * usual


def _moves_fast(blurs: deque[MotionBlur]) -> bool:
    recent = list(blurs)[-_RECENT_PICTURES:]
    shifts = [blur.shift_ratio for blur in recent if blur.shift_ratio is not None]
    return len(shifts) >= 3 and statistics.median(shifts) > _MAX_SHIFT_RATIO


def _fails_often(inliers: deque[int]) -> bool:
    """Inliers of the recent keyframes; 0: not registered."""
    if len(inliers) < _RECENT_KEYFRAMES:
        return False
    failures = sum(not count for count in inliers)
    return failures >= _MAX_FAILURES or statistics.median(inliers) < _FEW_INLIERS


def _is_behind(progress: _PhoneProgress) -> bool:
    if progress.usual_wait_s > _BEHIND_WAIT_S:
        return True
    enough = len(progress.was_dropped) >= _MIN_RECENT
    return enough and sum(progress.was_dropped) > _BEHIND_DROP_RATIO * len(progress.was_dropped)


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
