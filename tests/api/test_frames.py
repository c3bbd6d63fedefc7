"""Frames that a program hands over: their numbers, and what becomes of them when a run ends."""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from livesfm.frames import (
    HandedFrame,
    LiveFrames,
    RunEndedError,
    WaitingFrames,
)
from livesfm.run import handed_frame, handed_position

from adapters.launch import count_frame_ids
from engine.config import SourcesConfig
from engine.types import (
    Arrival,
    BoolArray,
    DropReason,
    Frame,
    GpsFix,
    IntrinsicsPrior,
    Received,
    RejectedFrame,
)

RGB = np.full((240, 320, 3), 128, np.uint8)
FIX = GpsFix(latitude_deg=1.0, longitude_deg=2.0)
JPEG = cv2.imencode(".jpg", RGB)[1].tobytes()


def waiting_frames() -> WaitingFrames:
    return WaitingFrames(SourcesConfig(), next_frame_id=count_frame_ids())


def handed(
    camera: str, image: bytes = JPEG, *, at_s: float = 0.0, mask: BoolArray | None = None
) -> HandedFrame:
    return HandedFrame(image=image, camera=camera, captured_at_s=at_s, mask=mask)


def decoded(frames: WaitingFrames, one: HandedFrame) -> Frame | RejectedFrame:
    arrival = frames._arrival(one)
    assert isinstance(arrival, Arrival)
    return arrival.decode()


def test_a_mask_that_does_not_fit_its_encoded_image_costs_that_frame_alone() -> None:
    frames = waiting_frames()
    refused = decoded(frames, handed("front", mask=np.ones((2, 3), np.bool_)))
    assert isinstance(refused, RejectedFrame)
    assert refused.reason is DropReason.BAD_MASK
    assert "its mask is 3 x 2 px, the image 320 x 240" in refused.detail
    after = decoded(frames, handed("back"))
    assert isinstance(after, Frame)
    assert frames.origin_of(after.frame_id) == ("back", 1)


def test_a_frame_that_fails_leaves_the_origins_of_later_ones_right() -> None:
    frames = waiting_frames()
    bad = HandedFrame(image=RGB[:, :, :1], camera="front", captured_at_s=0.0)
    with pytest.raises(ValueError, match="pixels"):
        decoded(frames, bad)
    after = decoded(frames, handed("back"))
    assert isinstance(after, Frame)
    assert frames.origin_of(after.frame_id) == ("back", 1)


# -- the end --------------------------------------------------------------------------------------


def test_closing_the_iterator_ends_what_may_be_added_and_leaves_what_was_not_read() -> None:
    frames = waiting_frames()
    for number in range(3):
        frames.add(handed("front", at_s=number))

    async def read_one() -> None:
        reading = frames.frames()
        item = await anext(reading)
        assert isinstance(item, Arrival)
        assert item.index == 0
        await reading.aclose()

    asyncio.run(read_one())
    with pytest.raises(RunEndedError):
        frames.add(handed("front"))
    assert [one.captured_at_s for one in frames.take_unread() if isinstance(one, Arrival)] == [1, 2]
    assert frames.take_unread() == []


def test_who_waits_for_room_learns_that_the_run_has_ended_and_why() -> None:
    frames = waiting_frames()
    for number in range(4):
        frames.add(handed("front", at_s=float(number)))
    assert frames.add_if_room(handed("front")) is None
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        frames.add(handed("front"), timeout_s=0.01)
    with ThreadPoolExecutor(1) as thread:
        adding = thread.submit(frames.add, handed("front", at_s=4.0))
        frames.end(cause := OSError("the disk is gone"))
        with pytest.raises(RunEndedError) as raised:
            adding.result()
    assert raised.value.__cause__ is cause


def test_a_live_source_that_the_run_does_not_receive_any_more_takes_no_more() -> None:
    frames = LiveFrames(SourcesConfig(), next_frame_id=count_frame_ids())
    received: list[Received] = []

    async def receive_one() -> None:
        receiving = asyncio.create_task(frames.receive(received.append))
        await asyncio.to_thread(frames.add, handed("front"))
        receiving.cancel()
        await asyncio.wait((receiving,))

    asyncio.run(receive_one())
    with pytest.raises(RunEndedError):
        frames.add(handed("front"))
    assert len(received) == 1
    frames.end()  # its loop has closed


# -- what is refused at the call ------------------------------------------------------------------


@pytest.mark.parametrize("at_s", [math.nan, math.inf, 10**400])
def test_times_that_are_not_finite_are_refused(at_s: float) -> None:
    with pytest.raises(ValueError, match="captured_at_s"):
        added(captured_at_s=at_s)
    with pytest.raises(ValueError, match="captured_at_s"):
        handed_position(FIX, captured_at_s=at_s, camera=None)


@pytest.mark.parametrize("at_s", [1.7e12, 1.7e18])
def test_times_in_milliseconds_or_nanoseconds_are_refused(at_s: float) -> None:
    with pytest.raises(ValueError, match="expected seconds, not milliseconds or nanoseconds"):
        added(captured_at_s=at_s)


@pytest.mark.parametrize("image", ["a.jpg", Path("a.jpg")])
def test_the_name_of_a_file_is_no_image(image: Any) -> None:
    with pytest.raises(TypeError, match=r"^image: .* Path\(\.\.\.\)\.read_bytes\(\)"):
        added(image=image)


def test_none_which_opencv_returns_for_what_it_cannot_read_is_no_image() -> None:
    with pytest.raises(TypeError, match="^image: .* got None"):
        added(image=None)


def test_a_grey_image_is_refused_with_what_makes_it_rgb() -> None:
    with pytest.raises(ValueError, match=r"got \(240, 320\) uint8; .*cv2\.COLOR_GRAY2RGB"):
        added(image=RGB[:, :, 0])
    with pytest.raises(ValueError, match=r"got \(240, 320, 1\) uint8$"):
        added(image=RGB[:, :, :1])


@pytest.mark.parametrize("image", [b"", bytearray(), memoryview(b"")])
def test_no_bytes_are_no_image(image: Any) -> None:
    with pytest.raises(ValueError, match="^image: empty"):
        added(image=image)


def test_positions_that_are_not_finite_are_refused() -> None:
    for name in ("latitude_deg", "longitude_deg", "altitude_m", "accuracy_m"):
        bad: dict[str, Any] = {name: math.nan}
        with pytest.raises(ValueError, match=f"fix.{name}"):
            handed_position(replace(FIX, **bad), captured_at_s=0.0, camera=None)
        with pytest.raises(ValueError, match=f"gps.{name}"):
            added(gps=replace(FIX, **bad))


def test_positions_beyond_the_globe_are_refused() -> None:
    for name, number in (("latitude_deg", 120.0), ("longitude_deg", -180.5)):
        bad: dict[str, Any] = {name: number}
        with pytest.raises(ValueError, match=f"fix.{name}: {number} is not between"):
            handed_position(replace(FIX, **bad), captured_at_s=0.0, camera=None)
        with pytest.raises(ValueError, match=f"gps.{name}: {number} is not between"):
            added(gps=replace(FIX, **bad))
    unsure = replace(FIX, latitude_deg=120.0, is_order_unsure=True)
    assert added(gps=unsure).gps == unsure


def test_a_focal_length_may_be_unknown_beside_the_kind_of_lens() -> None:
    prior = IntrinsicsPrior(focal_px=0.0, camera_model="OPENCV_FISHEYE")
    assert added(intrinsics=prior).intrinsics == prior


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("camera", 3),
        ("captured_at_s", "soon"),
        ("captured_at_s", True),
        ("gps", (1, 2)),
        ("gps", GpsFix(latitude_deg="1", longitude_deg=2.0)),  # type: ignore[arg-type]
        ("intrinsics", "x"),
        ("intrinsics", IntrinsicsPrior(focal_px="long")),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_type_are_named_at_the_call(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{name}"):
        added(**{name: value})


def test_positions_of_another_type_are_named_at_the_call() -> None:
    wrong: Any = (1, 2)
    with pytest.raises(TypeError, match="^fix: expected a GpsFix"):
        handed_position(wrong, captured_at_s=0.0, camera=None)
    wrong = 3
    with pytest.raises(TypeError, match="^camera"):
        handed_position(FIX, captured_at_s=0.0, camera=wrong)


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        ("focal_px", IntrinsicsPrior(focal_px=math.nan)),
        ("focal_px", IntrinsicsPrior(focal_px=-3.0)),
        ("focal_sigma_ratio", IntrinsicsPrior(focal_px=300.0, focal_sigma_ratio=0.0)),
        ("camera_model", IntrinsicsPrior(focal_px=1.0, camera_model="HOLE")),
        ("params", IntrinsicsPrior(focal_px=1.0, params=(300.0, 160.0, 120.0))),
        ("params", IntrinsicsPrior(focal_px=1.0, camera_model="PINHOLE", params=(300.0,))),
        (
            "params",
            IntrinsicsPrior(
                focal_px=1.0, camera_model="SIMPLE_PINHOLE", params=(0.0, 160.0, 120.0)
            ),
        ),
    ],
)
def test_what_no_lens_has_is_refused_at_the_call(name: str, prior: IntrinsicsPrior) -> None:
    with pytest.raises(ValueError, match=f"^intrinsics.{name}"):
        added(intrinsics=prior)


def test_the_name_of_a_camera_is_text_that_a_file_can_hold() -> None:
    with pytest.raises(ValueError, match="^camera"):
        added(camera="\ud800")


def test_numbers_of_numpy_become_plain_ones() -> None:
    fix = GpsFix(latitude_deg=np.float32(1.0), longitude_deg=np.int64(2))  # type: ignore[arg-type]
    params: Any = np.array([300.0, 160.0, 120.0], np.float32)
    prior = IntrinsicsPrior(focal_px=300.0, camera_model="SIMPLE_PINHOLE", params=params)
    frame = added(captured_at_s=np.int64(3), gps=fix, intrinsics=prior)
    assert frame.gps is not None
    assert frame.intrinsics is not None
    numbers = [frame.captured_at_s, frame.gps.latitude_deg, *(frame.intrinsics.params or ())]
    assert {type(one) for one in numbers} == {float}
    json.dumps([asdict(frame.gps), asdict(frame.intrinsics)])


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_of_an_encoded_image_may_come_in_any_container(kind: type) -> None:
    buffer = bytearray(JPEG)
    frame = added(image=kind(buffer))
    buffer[:] = bytes(len(buffer))
    assert frame.image == JPEG
    assert np.array_equal(added(image=RGB.data).image, RGB)


def added(**arguments: Any) -> HandedFrame:
    """What `add_frame` makes of its arguments."""
    usual = {
        "image": RGB,
        "captured_at_s": 0.0,
        "camera": "front",
        "gps": None,
        "intrinsics": None,
        "mask": None,
    }
    return handed_frame(**{**usual, **arguments})
