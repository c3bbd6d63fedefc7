"""Messages: plain arrays survive the way, anything else is refused."""

from __future__ import annotations

import json
import socket
import struct
import threading
from typing import Any

import numpy as np
import pytest

from adapters.remote.frames import frame_from_plain, frame_to_plain
from adapters.remote.messages import BrokenMessageError, Channel, Message, decode, encode
from adapters.remote.plain import from_plain, to_plain
from engine.errors import InferenceError
from engine.types import EpipolarGuide, FrameId, ImagePair, MatchRequest, PairMatches
from tests.support.textured_images import frame_of, random_texture


def sent(message: Message) -> Message:
    """A message as the other end gets it."""
    _, header, *bodies = encode(message)
    return decode(bytes(header), bytearray(b"".join(bytes(part) for part in bodies)))


def header_of(*arrays: list[Any]) -> bytes:
    return json.dumps(
        {"kind": "k", "number": 1, "fields": {}, "arrays": [list(one) for one in arrays]}
    ).encode()


@pytest.mark.parametrize("kind", ["u1", "b1", "i4", "i8", "f4", "f8"])
def test_arrays_of_every_type_and_shape_come_as_they_were_sent(kind: str) -> None:
    arrays = {
        "a": np.arange(24).reshape(2, 3, 4).astype(kind),
        "empty": np.zeros((3, 0), kind),
        "sliced": np.arange(20).astype(kind)[::2],
    }
    got = sent(Message(kind="call", number=7, fields={"x": [1, None, "y"]}, arrays=arrays))
    assert (got.kind, got.number, got.fields) == ("call", 7, {"x": [1, None, "y"]})
    for name, array in arrays.items():
        assert got.arrays[name].dtype == array.dtype
        assert np.array_equal(got.arrays[name], array)
        assert got.arrays[name].shape == array.shape


def test_an_array_of_objects_is_not_sent() -> None:
    with pytest.raises(BrokenMessageError, match="object"):
        encode(Message(kind="call", arrays={"a": np.array([{}, []], object)}))


@pytest.mark.parametrize(
    ("header", "num_bytes"),
    [
        (b"\x80\x04.", 0),  # a pickle
        (b"[]", 0),
        (b"{}", 0),
        (header_of(["a", "O", [1]]), 8),
        (header_of(["a", "<f8", [-1]]), 8),
        (header_of(["a", "<f8", [2]]), 8),
        (header_of(["a", "<f8", [1]]), 9),
        (header_of(["a", "<f8", [2**62, 2**62]]), 8),
        (header_of(["a", "|u1", [1, 1, 1, 1, 1]]), 1),
        (header_of(["a", "|V8", [1]]), 8),
    ],
)
def test_what_is_no_message_is_refused(header: bytes, num_bytes: int) -> None:
    with pytest.raises(BrokenMessageError):
        decode(header, bytearray(num_bytes))


def test_a_channel_ends_with_its_other_end_and_refuses_absurd_lengths() -> None:
    ours, theirs = socket.socketpair()
    channel, other = Channel(ours), Channel(theirs)
    message = Message(kind="call", arrays={"a": np.zeros(3_000_000, np.uint8)})
    sending = threading.Thread(target=channel.send, args=(message,))
    sending.start()
    received = other.receive()
    sending.join()
    assert received is not None
    assert received.num_bytes == 3_000_000
    ours.sendall(struct.pack("<IQ", 2**31, 2**60))
    with pytest.raises(BrokenMessageError, match="a message of"):
        other.receive()
    channel.close()
    assert other.receive() is None
    other.close()


def test_products_with_products_in_them_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    found = PairMatches(
        pair=ImagePair(FrameId(3), FrameId(9)),
        matches_idx=rng.integers(0, 9, (5, 2)),
        points1_xy=rng.random((5, 2)),
        points2_xy=rng.random((5, 2)),
        confidence=rng.random(5).astype(np.float32),
        focal_px=(1.5, 2.5),
    )
    fields, arrays = to_plain(found)
    back = from_plain(PairMatches, json.loads(json.dumps(fields)), arrays)
    assert (back.pair, back.focal_px) == (found.pair, found.focal_px)
    assert np.array_equal(back.points2_xy, found.points2_xy)
    guide = EpipolarGuide(
        rays1=rng.random((4, 3)), rays2=rng.random((2, 3)), essential=np.eye(3), max_angle_rad=0.1
    )
    fields, arrays = to_plain(guide)
    assert from_plain(EpipolarGuide, fields, arrays).max_angle_rad == 0.1
    with pytest.raises(ValueError, match="MatchRequest"):
        from_plain(MatchRequest, fields, arrays)


def test_an_image_that_came_without_jpeg_has_the_same_pixels_elsewhere() -> None:
    pixels = random_texture().image(160, 120, image_from_texture=np.eye(2, 3)).copy()
    pixels[..., 1] //= 2
    frame = frame_of(pixels)
    fields, arrays = frame_to_plain(frame)
    assert fields["is_png"]
    assert arrays["image"].nbytes < frame.pixels.nbytes
    there = frame_from_plain(json.loads(json.dumps(fields)), arrays)
    assert np.array_equal(there.pixels, frame.pixels)
    with pytest.raises(InferenceError, match="other pixels"):
        frame_from_plain(fields | {"sum": fields["sum"] ^ 1}, arrays)
