"""What waits to be journalled, in which order it is, and what is lost."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Sequence

import numpy as np
import pytest

from engine.errors import JournalError
from engine.mapping.steps import KeyframeRecord, MappingStep
from engine.mapping.stored_state import StoredRelativePose
from engine.output import moments
from engine.output.journal import Moment, NewKeyframe
from engine.output.moments import MomentQueue
from engine.types import FrameId, GpsFix, GpsReading, MapCounts
from tests.support.fake_runs import JPEG, frame_of, rejected, world_of

WORLD = world_of(4)
STEP = MappingStep(record=None, new_poses=(), jobs=(), due=(), counts=MapCounts(), view=None)
READING = GpsReading(
    source="flight",
    camera_key=None,
    captured_at_s=0.0,
    fix=GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=3.0),
)


def locked() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


class FakeClock:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(moments, "time", fake)
    return fake


class FakeJournal:
    """Takes moments, or refuses them for now or for ever."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.is_full = False
        self.is_full_without_keyframe = False
        self.refused: set[FrameId] = set()  # keyframes
        self.is_locked = False
        self.num_beats = 0
        self.errors: list[JournalError] = []
        self.queue = MomentQueue(self.write, failed=self.errors.append, beat=self.beat)

    def beat(self) -> None:
        """Counts the signs of life."""
        self.num_beats += 1

    def write(self, moment: Moment) -> None:
        """Takes a moment."""
        if self.is_locked:
            raise JournalError("locked") from locked()
        if self.is_full or (self.is_full_without_keyframe and moment.keyframe is None):
            raise JournalError("full") from sqlite3.OperationalError("disk is full")
        if moment.keyframe and moment.keyframe.keyframe.frame_id in self.refused:
            raise JournalError("taken") from sqlite3.IntegrityError("the name is taken")
        self.moments.append(moment)

    def add_keyframe(
        self, frame_id: int, *, with_pairs: Sequence[int] = (), image_bytes: bytes = JPEG
    ) -> None:
        """Adds a step with a keyframe."""
        keyframe = dataclasses.replace(WORLD.keyframe(1), frame_id=FrameId(frame_id))
        pair = WORLD.verified_pair(1, 2)
        pairs = tuple(
            dataclasses.replace(
                pair,
                pair=dataclasses.replace(pair.pair, first=FrameId(i), second=FrameId(frame_id)),
            )
            for i in with_pairs
        )
        camera = WORLD.camera(1).as_colmap()
        record = KeyframeRecord(keyframe=keyframe, camera=camera, pairs=pairs, moved=())
        new = NewKeyframe(
            keyframe=keyframe, camera=camera, source="photos", image_bytes=image_bytes
        )
        step = dataclasses.replace(STEP, record=record, facts={"newest": frame_id})
        self.queue.add_step(step, keyframe=new)

    @property
    def keyframe_ids(self) -> list[int]:
        """Of the keyframes that it took."""
        return [one.keyframe.keyframe.frame_id for one in self.moments if one.keyframe]


def test_what_happens_between_keyframes_is_written_with_the_next_one() -> None:
    journal = FakeJournal()
    queue = journal.queue
    queue.add_frame(frame_of(1, world=WORLD))
    queue.add_frame(rejected(2), status="dropped:unreadable")
    queue.add_reading(READING)
    pose = StoredRelativePose(
        frame_id=FrameId(3),
        keyframe_id=FrameId(1),
        index=2,
        captured_at_s=0.3,
        cam_from_keyframe=np.eye(4)[:3],
    )
    for value in (1, 2):
        queue.add_step(dataclasses.replace(STEP, relative_poses=(pose,), facts={"turn": value}))
    assert journal.moments == []
    queue.settle_frame(FrameId(1), status="keyframe")
    journal.add_keyframe(1)
    (moment,) = journal.moments
    assert [one.status for one in moment.frames] == [None, "dropped:unreadable", "keyframe"]
    assert moment.gps_readings == (READING,)
    assert moment.relative_poses == (pose, pose)
    assert moment.facts == {"turn": 2, "newest": 1}


def test_many_frames_without_a_keyframe_do_not_wait_for_one() -> None:
    journal = FakeJournal()
    for frame_id in range(1, 1001):
        journal.queue.add_frame(frame_of(frame_id))
    assert len(journal.moments) >= 3
    journal.queue.flush()
    assert [one.frame_id for moment in journal.moments for one in moment.frames] == list(
        range(1, 1001)
    )


def test_pairs_that_changed_without_a_keyframe_are_written_at_once() -> None:
    journal = FakeJournal()
    pair = WORLD.verified_pair(1, 2)
    journal.queue.add_step(dataclasses.replace(STEP, changed_pairs=(pair,), facts={"a": 1}))
    (moment,) = journal.moments
    assert (moment.pairs, moment.facts) == ((pair,), {"a": 1})


def test_moments_wait_for_room_and_come_in_order() -> None:
    journal = FakeJournal()
    journal.is_full = True
    for frame_id in range(1, 6):
        journal.add_keyframe(frame_id)
    assert journal.queue.num_unwritten == 5
    journal.is_full = False
    journal.queue.flush()
    assert journal.keyframe_ids == [1, 2, 3, 4, 5]
    assert (journal.queue.num_unwritten, journal.queue.num_lost) == (0, 0)


def test_when_too_many_wait_the_oldest_keyframes_are_lost() -> None:
    journal = FakeJournal()
    journal.is_full = True
    for frame_id in range(1, 301):
        journal.add_keyframe(frame_id, with_pairs=[1] if frame_id > 1 else [])
    num_waiting = journal.queue.num_unwritten
    assert num_waiting < 100
    assert journal.queue.num_lost == 300 - num_waiting
    journal.is_full = False
    journal.add_keyframe(301, with_pairs=[1, 300])
    assert journal.keyframe_ids == list(range(301 - num_waiting, 302))


def test_when_too_many_wait_only_keyframes_are_lost_and_nothing_else() -> None:
    journal = FakeJournal()
    journal.is_full = True
    early = dataclasses.replace(STEP, facts={"early": 1, "newest": 0})
    journal.queue.add_reading(READING)
    journal.queue.add_step(early)
    for frame_id in range(1, 301):
        journal.queue.add_frame(frame_of(frame_id))
        journal.add_keyframe(frame_id, with_pairs=[1] if frame_id > 1 else [])
    journal.is_full = False
    journal.queue.flush()
    assert journal.queue.num_unwritten == 0
    frame_ids = [one.frame_id for moment in journal.moments for one in moment.frames]
    assert frame_ids == list(range(1, 301))
    assert [one for moment in journal.moments for one in moment.gps_readings] == [READING]
    facts: dict[str, object] = {}
    for moment in journal.moments:
        facts |= moment.facts
    assert facts == {"early": 1, "newest": 300}
    assert len(journal.moments[0].pairs) == 1  # those of lost keyframes are lost with them


def test_another_program_is_waited_for_with_signs_of_life_and_not_for_ever(
    clock: FakeClock,
) -> None:
    journal = FakeJournal()
    journal.is_locked = True
    for frame_id in range(1, 71):
        journal.add_keyframe(frame_id)
    assert clock.now_s == pytest.approx(600.0, abs=1.0)
    assert journal.num_beats == pytest.approx(1200, abs=2)
    assert 0 < journal.queue.num_lost < 10
    assert sum("has held database.db for 600 s" in str(error) for error in journal.errors) == 1
    journal.queue.flush(wait_s=10.0)
    assert clock.now_s == pytest.approx(610.0, abs=2.0)
    journal.is_locked = False
    journal.queue.flush()
    assert len(journal.keyframe_ids) == 70 - journal.queue.num_lost
    journal.is_locked = True  # again, and it is waited for as long again
    for frame_id in range(71, 141):
        journal.add_keyframe(frame_id)
    assert clock.now_s == pytest.approx(1210.0, abs=3.0)


def test_large_images_that_wait_are_bounded_by_their_bytes() -> None:
    journal = FakeJournal()
    journal.is_full = True
    photo = bytes(12_000_000)
    for frame_id in range(1, 41):
        journal.add_keyframe(frame_id, image_bytes=photo)
    assert 10 < journal.queue.num_unwritten <= 256 // 12
    assert journal.queue.num_lost == 40 - journal.queue.num_unwritten
    journal.queue.add_reading(READING)
    journal.add_keyframe(41, image_bytes=bytes(300_000_000))
    assert journal.queue.num_unwritten == 1  # the latest is kept, however large
    journal.is_full = False
    journal.queue.flush()
    assert journal.keyframe_ids == [41]


def test_the_rest_of_a_moment_whose_keyframe_is_refused_waits_for_room() -> None:
    journal = FakeJournal()
    journal.refused = {FrameId(1)}
    journal.is_full_without_keyframe = True
    journal.add_keyframe(1)
    assert (journal.queue.num_lost, journal.queue.num_unwritten) == (1, 1)
    journal.is_full_without_keyframe = False
    journal.add_keyframe(2)
    assert [moment.facts["newest"] for moment in journal.moments] == [1, 2]


def test_a_keyframe_that_is_refused_is_lost_and_the_rest_of_its_moment_is_not() -> None:
    journal = FakeJournal()
    journal.refused = {FrameId(2)}
    for frame_id in (1, 2, 3):
        journal.add_keyframe(frame_id, with_pairs=range(1, frame_id))
    assert journal.keyframe_ids == [1, 3]
    assert [moment.facts["newest"] for moment in journal.moments] == [1, 2, 3]
    assert [len(moment.pairs) for moment in journal.moments] == [0, 0, 2]
    assert journal.queue.num_lost == 1


def test_a_keyframe_whose_image_cannot_be_encoded_is_lost_alone() -> None:
    journal = FakeJournal()
    journal.add_keyframe(1)
    keyframe = dataclasses.replace(WORLD.keyframe(1), frame_id=FrameId(2))
    record = KeyframeRecord(
        keyframe=keyframe,
        camera=WORLD.camera(1).as_colmap(),
        pairs=(WORLD.verified_pair(1, 2),),
        moved=(),
    )
    journal.queue.add_step(dataclasses.replace(STEP, record=record, facts={"a": 1}))
    journal.add_keyframe(3, with_pairs=[1, 2])
    assert journal.keyframe_ids == [1, 3]
    assert journal.moments[1].facts == {"a": 1}
