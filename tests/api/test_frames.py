"""Frames that a program hands over: their numbers, and what becomes of them when a run ends."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from livesfm.frames import HandedFrame, WaitingFrames

from adapters.launch import count_frame_ids
from engine.config import SourcesConfig
from engine.types import Arrival, BoolArray, DropReason, Frame, RejectedFrame

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
