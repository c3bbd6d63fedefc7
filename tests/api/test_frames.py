"""Frames that a program hands over: their numbers, and what becomes of them when a run ends."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from livesfm.frames import (
    HandedFrame,
    HandedPosition,
    LiveFrames,
    RunEndedError,
    WaitingFrames,
)

from adapters.launch import count_frame_ids
from engine.config import SourcesConfig
from engine.types import Arrival, BoolArray, DropReason, Frame, GpsFix, Received, RejectedFrame

RGB = np.full((240, 320, 3), 128, np.uint8)
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
    for _ in range(4):
        frames.add(handed("front"))
    assert frames.add_if_room(handed("front")) is None
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        frames.add(handed("front"), timeout_s=0.01)
    with ThreadPoolExecutor(1) as thread:
        adding = thread.submit(frames.add, handed("front"))
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


@pytest.mark.parametrize("at_s", [math.nan, math.inf])
def test_times_that_are_not_finite_are_refused(at_s: float) -> None:
    with pytest.raises(ValueError, match="captured_at_s"):
        handed("front", at_s=at_s)


def test_positions_that_are_not_finite_are_refused() -> None:
    for name in ("latitude_deg", "longitude_deg", "altitude_m", "accuracy_m"):
        bad: dict[str, Any] = {name: math.nan}
        fix = replace(GpsFix(latitude_deg=1.0, longitude_deg=2.0), **bad)
        with pytest.raises(ValueError, match=name):
            HandedPosition(fix=fix, camera=None, captured_at_s=0.0)
        with pytest.raises(ValueError, match=name):
            HandedFrame(image=RGB, camera="front", captured_at_s=0.0, gps=fix)
