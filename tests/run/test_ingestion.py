"""Reading sources, and decoding what is taken from them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engine.errors import SourceError
from engine.run.engine import RunOutcome, StoppedBy
from engine.run.ingestion import SourceRole, until_stopped
from engine.types import (
    Arrival,
    BoolArray,
    CalibrationOrigin,
    DropReason,
    Frame,
    GpsFix,
    GpsReading,
    IntrinsicsPrior,
    RejectedFrame,
    TakenFrames,
)
from tests.support.fake_runs import (
    FakeLiveSource,
    FakeSource,
    Happening,
    WorldMatcher,
    Written,
    engine_of,
    frame_of,
    rejected,
    world_of,
)
from tests.support.synthetic import HEIGHT, WIDTH
from tests.support.waiting import HANG_S

NUM_FRAMES = 12


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S), debug=True)


def frames(first: int, last: int) -> list[Frame]:
    world = world_of(NUM_FRAMES)
    return [frame_of(i, world=world) for i in range(first, last + 1)]


def matcher(**options: Any) -> WorldMatcher:
    return WorldMatcher(world=world_of(NUM_FRAMES), **options)


def run_source(
    path: Path, source: FakeSource | FakeLiveSource, *settings: str, **options: Any
) -> tuple[RunOutcome, Written]:
    options = {"matcher": matcher(), **options}
    engine = engine_of(path, sources=[source], settings=settings, **options)
    outcome = asyncio.run(asyncio.wait_for(engine.run(), HANG_S))
    return outcome, Written.by(outcome)


class Decoding:
    """Arrivals that record in which order, and on which threads, they were decoded."""

    def __init__(self, *, unreadable: Sequence[int] = ()) -> None:
        self.unreadable = unreadable
        self.indices: list[int] = []
        self.threads: set[str] = set()

    def of(self, frame: Frame, *, before: Callable[[], None] = lambda: None) -> Arrival:
        waiting = Arrival.of(frame)

        def decode() -> Frame | RejectedFrame:
            before()
            self.indices.append(frame.index)
            self.threads.add(threading.current_thread().name)
            if frame.index in self.unreadable:
                return waiting.rejected(DropReason.UNREADABLE, "damaged")
            return frame

        return replace(waiting, decode=decode)


# -- decoding -------------------------------------------------------------------------------------


def test_arrivals_are_decoded_in_order_on_a_thread_of_their_own(tmp_path: Path) -> None:
    decoding = Decoding(unreadable=[2])
    source = FakeSource(happenings=[decoding.of(frame) for frame in frames(1, 6)])
    _, written = run_source(tmp_path / "run", source)
    assert decoding.indices == list(range(6))
    assert {name.partition("_")[0] for name in decoding.threads} == {"decoding"}
    assert written.statuses == ["keyframe"] * 2 + ["dropped:unreadable"] + ["keyframe"] * 3
    (event,) = written.of_kind("FrameDropped")
    assert (event["frame_id"], event["index"], event["detail"]) == (None, 2, "damaged")


def test_what_a_live_source_drops_is_never_decoded(tmp_path: Path) -> None:
    decoding = Decoding()
    describing, all_given = threading.Event(), threading.Event()

    def hold_up(frame: Frame) -> None:
        describing.set()
        assert all_given.wait(HANG_S)

    async def until_describing() -> None:
        assert await asyncio.to_thread(describing.wait, HANG_S)

    async def end() -> None:
        all_given.set()

    arrivals = [decoding.of(frame) for frame in frames(1, NUM_FRAMES)]
    source = FakeLiveSource(happenings=[arrivals[0], until_describing, *arrivals[1:], end])
    _, written = run_source(
        tmp_path / "run",
        source,
        "sources.frame_queue_size=2",
        matcher=matcher(before_describing=hold_up),
    )
    assert decoding.indices == [0, NUM_FRAMES - 2, NUM_FRAMES - 1]
    dropped = written.of_kind("FrameDropped")
    assert [event["index"] for event in dropped] == list(range(1, NUM_FRAMES - 2))
    assert {(event["frame_id"], event["reason"]) for event in dropped} == {(None, "overload")}
    assert written.summary["frames_received"] == NUM_FRAMES


def test_the_next_frame_of_a_file_is_decoded_while_one_is_tracked(tmp_path: Path) -> None:
    decoding, second_is_decoded = Decoding(), threading.Event()

    def describe(frame: Frame) -> None:
        assert second_is_decoded.wait(HANG_S)

    first, second, *others = frames(1, 6)
    happenings: list[Happening] = [
        decoding.of(first),
        decoding.of(second, before=second_is_decoded.set),
        *(decoding.of(frame) for frame in others),
    ]
    _, written = run_source(
        tmp_path / "run",
        FakeSource(happenings=happenings),
        matcher=matcher(before_describing=describe),
    )
    assert written.statuses == ["keyframe"] * 6


def test_an_unexpected_error_of_decoding_costs_one_frame(tmp_path: Path) -> None:
    def break_down() -> None:
        raise ZeroDivisionError("of the test")

    decoding = Decoding()
    before = [decoding.of(frame) for frame in frames(1, 6)]
    (broken,) = (decoding.of(frame, before=break_down) for frame in frames(7, 7))
    after = [decoding.of(frame) for frame in frames(8, NUM_FRAMES)]
    outcome, written = run_source(
        tmp_path / "run", FakeSource(happenings=[*before, broken, *after])
    )
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert [fault["part"] for fault in written.of_kind("FaultOccurred")] == ["decoding"]
    assert written.statuses[:7] == [*["keyframe"] * 6, "dropped:failed"]
    assert written.statuses[7:] == ["keyframe"] * (NUM_FRAMES - 7)
    (dropped,) = written.of_kind("FrameDropped")
    assert (dropped["index"], dropped["detail"]) == (6, "ZeroDivisionError: of the test")


# -- the end of a source --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FakeSource, FakeLiveSource])
def test_a_source_ends_after_so_many_readable_frames(tmp_path: Path, kind: Any) -> None:
    decoding, matching = Decoding(unreadable=[1]), matcher()

    async def until_taken() -> None:
        while len(matching.described) < 3:  # noqa: ASYNC110 - the matcher has no event
            await asyncio.sleep(0.005)

    arrivals = [decoding.of(frame) for frame in frames(1, 8)]
    source = kind(happenings=[*arrivals[:4], until_taken, *arrivals[4:]])
    outcome, written = run_source(
        tmp_path / "run", source, "sources.max_frames=3", matcher=matching
    )
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert written.statuses == ["keyframe", "dropped:unreadable", "keyframe", "keyframe"]
    assert decoding.indices == [0, 1, 2, 3]
    (ended,) = written.of_kind("SourceChanged")
    assert (ended["state"], ended["detail"]) == ("ended", "3 frames were taken, as configured")


def test_what_was_read_beyond_the_last_frame_is_forgotten(tmp_path: Path) -> None:
    source = FakeSource(happenings=[*frames(1, 4), rejected(4), *frames(6, 9)], num_frames=4)
    _, written = run_source(tmp_path / "run", source, "sources.max_frames=4")
    assert written.statuses == ["keyframe"] * 4
    assert written.of_kind("SourceChanged") == []  # its end was known


@pytest.mark.parametrize("kind", [FakeSource, FakeLiveSource])
def test_a_source_of_which_a_former_part_took_all_gives_no_more(tmp_path: Path, kind: Any) -> None:
    taken = TakenFrames(names={i: f"{i:06d}.jpg" for i in range(3)}, captured_at_s={})
    _, written = run_source(
        tmp_path / "run",
        kind(happenings=frames(4, 8)),
        "sources.max_frames=3",
        roles=[SourceRole(label="fake", taken=taken, part=2)],
    )
    assert written.statuses == []


# -- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("altitude_m", [1e300, -1e160, float("nan")])
def test_positions_that_cannot_be_are_left_out_and_counted_and_the_run_ends_well(
    tmp_path: Path, altitude_m: float
) -> None:
    seen: dict[int, GpsFix | None] = {}

    def describe(frame: Frame) -> None:
        seen[frame.index] = frame.gps

    world = world_of(NUM_FRAMES)
    given = [
        replace(frame, gps=world.gps(frame.frame_id, metres_per_unit=20.0))
        for frame in frames(1, NUM_FRAMES)
    ]
    assert given[3].gps is not None
    given[3] = replace(given[3], gps=replace(given[3].gps, altitude_m=altitude_m))
    given[5] = replace(given[5], gps=GpsFix(latitude_deg=1e300, longitude_deg=8.0))
    outcome, written = run_source(
        tmp_path / "run",
        FakeSource(happenings=given),
        matcher=matcher(before_describing=describe),
    )
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert given[3].gps is not None
    assert seen[3] == replace(given[3].gps, altitude_m=None)
    assert seen[5] is None
    assert seen[4] == given[4].gps
    assert len([words for words in written.warnings() if words.startswith("2 positions")]) == 1
    assert len(written.of_kind("Georeferenced")) > 0


def test_a_frame_gets_the_positions_that_came_before_it_and_no_others(tmp_path: Path) -> None:
    def reading(index: int, *, latitude_deg: float) -> GpsReading:
        fix = GpsFix(latitude_deg=latitude_deg, longitude_deg=8.0, altitude_m=400.0)
        return GpsReading(source="fake", camera_key=None, captured_at_s=0.1 * index, fix=fix)

    seen: dict[int, float | None] = {}

    def describe(frame: Frame) -> None:
        seen[frame.index] = None if frame.gps is None else frame.gps.latitude_deg

    happenings: list[Happening] = [
        *frames(1, 1),
        reading(0, latitude_deg=1.0),
        *frames(2, 2),
        reading(2, latitude_deg=3.0),
        *frames(3, 4),
    ]
    run_source(
        tmp_path / "run",
        FakeSource(happenings=happenings),
        matcher=matcher(before_describing=describe),
    )
    assert seen == {0: None, 1: 1.0, 2: 3.0, 3: 3.0}


def test_positions_that_decoding_brings_count_for_the_frame_itself(tmp_path: Path) -> None:
    fix = GpsFix(latitude_deg=5.0, longitude_deg=8.0, altitude_m=400.0)
    (frame,) = frames(1, 1)
    latitudes: list[float | None] = []

    class Source(FakeLiveSource):
        async def receive(self, sink: Any) -> None:
            def find_position() -> None:
                sink(
                    GpsReading(
                        source="fake",
                        camera_key=frame.camera_key,
                        captured_at_s=frame.captured_at_s,
                        fix=fix,
                    )
                )

            sink(Decoding().of(frame, before=find_position))

    def describe(frame: Frame) -> None:
        latitudes.append(None if frame.gps is None else frame.gps.latitude_deg)

    source = Source(happenings=[])
    run_source(tmp_path / "run", source, matcher=matcher(before_describing=describe))
    assert latitudes == [5.0]


# -- calibrations ---------------------------------------------------------------------------------


class Calibrations:
    """Those of a user who gave one for the first camera, and one for none."""

    def __init__(self) -> None:
        self.num_asked = 0

    def calibrated(self, frame: Frame) -> Frame:
        prior = IntrinsicsPrior(focal_px=321.0, origin=CalibrationOrigin.FILE)
        return replace(frame, camera_key=f"{frame.camera_key}|turned", intrinsics_prior=prior)

    def take_warnings(self) -> list[str]:
        self.num_asked += 1
        return ["one does not fit"] if self.num_asked == 2 else []

    def unused(self) -> list[str]:
        return ["one was for no camera"]


def test_frames_come_with_the_calibrations_given_and_misfits_are_said_once(tmp_path: Path) -> None:
    described: list[Frame] = []
    _, written = run_source(
        tmp_path / "run",
        FakeSource(happenings=frames(1, 4)),
        matcher=matcher(before_describing=described.append),
        calibrations=Calibrations(),
    )
    priors = [frame.intrinsics_prior for frame in described]
    assert [prior.focal_px for prior in priors if prior is not None] == [321.0] * 4
    assert {frame.camera_key for frame in described} == {"camera|turned"}
    assert written.warnings() == ["one does not fit", "one was for no camera"]


# -- until stopped --------------------------------------------------------------------------------


class Numbers:
    """Counts up to a number, then ends or waits forever."""

    def __init__(self, *, last: int, waits: bool = False) -> None:
        self.last = last
        self.waits = waits
        self.is_waiting = asyncio.Event()
        self.is_closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(1, self.last + 1):
                yield number
            if self.waits:
                self.is_waiting.set()
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


def test_everything_is_passed_on_without_a_stop() -> None:
    async def test() -> None:
        numbers = Numbers(last=5)
        assert [n async for n in until_stopped(numbers.items(), asyncio.Event())] == [1, 2, 3, 4, 5]
        assert numbers.is_closed

    run(test())


def test_a_stop_interrupts_waiting_for_the_next_item() -> None:
    async def test() -> None:
        numbers, stop = Numbers(last=2, waits=True), asyncio.Event()

        async def stop_when_it_waits() -> None:
            await numbers.is_waiting.wait()
            stop.set()

        stopping = asyncio.create_task(stop_when_it_waits())
        assert [n async for n in until_stopped(numbers.items(), stop)] == [1, 2]
        assert numbers.is_closed
        await stopping

    run(test())


def test_after_a_stop_nothing_more_is_asked_for() -> None:
    async def test() -> None:
        numbers, stop = Numbers(last=5), asyncio.Event()
        taken = []
        async for number in until_stopped(numbers.items(), stop):
            taken.append(number)
            if number == 3:
                stop.set()
        assert taken == [1, 2, 3]
        assert numbers.is_closed

    run(test())


def test_what_the_items_raise_comes_through() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise KeyError("fx")

    async def test() -> None:
        taken = []
        with pytest.raises(KeyError, match="fx"):
            async for number in until_stopped(failing(), asyncio.Event()):
                taken.append(number)
        assert taken == [1]

    run(test())


def test_cancelling_closes_the_items() -> None:
    async def test() -> None:
        numbers = Numbers(last=1, waits=True)

        async def read() -> None:
            async for _ in until_stopped(numbers.items(), asyncio.Event()):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        for _ in range(5):
            await asyncio.sleep(0)
        assert numbers.is_closed

    run(test())


# -- masks ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class FakeMasks:
    """Masks of cameras by their keys; a key without one raises, as a mask that does not fit."""

    masks: dict[str, BoolArray]
    refused: frozenset[str] = frozenset()

    def mask_of(self, frame: Frame) -> BoolArray | None:
        if frame.camera_key in self.refused:
            raise SourceError(f"the mask of {frame.camera_key} does not fit {frame.width} px")
        return self.masks.get(frame.camera_key)

    def unused(self) -> list[str]:
        return ["nobody's mask"]


def mask_without(rows: slice) -> BoolArray:
    mask = np.ones((HEIGHT, WIDTH), np.bool_)
    mask[rows] = False
    return mask


def stored_masks(run: Path) -> dict[str, BoolArray]:
    """The masks of a run by their names."""
    stored = {}
    for path in (run / "masks").rglob("*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        stored[str(path.relative_to(run / "masks"))] = np.asarray(mask) > 0
    return stored


def test_the_mask_of_a_camera_comes_on_top_of_its_frames_own(tmp_path: Path) -> None:
    own, of_camera = mask_without(slice(0, 100)), mask_without(slice(700, 750))
    first, second, third = frames(1, 3)
    happenings = [replace(first, mask=own), second, replace(third, camera_key="other")]
    masks = FakeMasks(masks={"camera": of_camera})
    _, written = run_source(tmp_path / "run", FakeSource(happenings=happenings), masks=masks)
    stored = stored_masks(tmp_path / "run")
    assert sorted(stored) == ["000000.jpg.png", "000001.jpg.png"]
    assert np.array_equal(stored["000000.jpg.png"], own & of_camera)
    assert np.array_equal(stored["000001.jpg.png"], of_camera)
    assert written.warnings() == ["nobody's mask"]


def test_cameras_of_several_sources_are_masked_by_their_keys_in_the_run(tmp_path: Path) -> None:
    sources = [FakeSource(happenings=[frame]) for frame in frames(1, 2)]
    masks = FakeMasks(masks={"source2|camera": mask_without(slice(0, 9))})
    engine = engine_of(tmp_path / "run", sources=sources, matcher=matcher(), masks=masks)
    asyncio.run(asyncio.wait_for(engine.run(), HANG_S))
    assert sorted(stored_masks(tmp_path / "run")) == ["source2/000001.jpg.png"]


@pytest.mark.parametrize("kind", [FakeSource, FakeLiveSource])
def test_a_source_ends_when_its_cameras_mask_does_not_fit_the_first_frame(
    tmp_path: Path, kind: Any
) -> None:
    masks = FakeMasks(masks={}, refused=frozenset({"camera"}))
    source = kind(happenings=frames(1, 6))
    outcome, written = run_source(tmp_path / "run", source, masks=masks)
    words = f"the mask of camera does not fit {WIDTH} px"
    assert words in written.warnings()
    assert "dropped:bad_mask" in written.statuses
    assert "keyframe" not in written.statuses
    assert words in [event["detail"] for event in written.of_kind("FrameDropped")]
    assert (outcome.stopped_by, outcome.num_keyframes) == (StoppedBy.END_OF_SOURCES, 0)


def test_later_frames_whose_mask_does_not_fit_are_dropped_and_the_source_goes_on(
    tmp_path: Path,
) -> None:
    happenings = frames(1, 6)
    happenings[2] = replace(happenings[2], camera_key="upright")
    masks = FakeMasks(masks={}, refused=frozenset({"upright"}))
    _, written = run_source(tmp_path / "run", FakeSource(happenings=happenings), masks=masks)
    assert written.statuses == ["keyframe"] * 2 + ["dropped:bad_mask"] + ["keyframe"] * 3


def test_masks_that_leave_next_to_nothing_are_doubted_at_once_and_counted_at_the_end(
    tmp_path: Path,
) -> None:
    masks = [slice(0, 735), slice(0, 750), slice(0, 100), slice(0, 750)]
    happenings = [
        replace(frame, mask=mask_without(rows))
        for frame, rows in zip(frames(1, 4), masks, strict=True)
    ]
    _, written = run_source(tmp_path / "run", FakeSource(happenings=happenings))
    first, last = written.warnings()
    assert first == (
        "the mask of 000000.jpg leaves 2.0% of the image: black is left out, anything else is "
        "used; is it the wrong way round?"
    )
    assert last == "3 of 4 masks leave less than 5% of their image, 2 of them nothing"
