"""Multipart streams cut into parts, whatever their pieces, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from adapters.sources.streams.multipart import MultipartError, MultipartReader, OversizedPart

MAX_BYTES = 100_000


def part_of(content: bytes, *, with_length: bool, boundary: bytes = b"--part") -> bytes:
    length = b"Content-Length: %d\r\n" % len(content) if with_length else b""
    return boundary + b"\r\nContent-Type: image/jpeg\r\n" + length + b"\r\n" + content + b"\r\n"


def read(pieces: Iterable[bytes], *, announced: bytes = b"") -> list[bytes | OversizedPart]:
    """The parts; nothing more than a part and a piece is ever held."""
    reader = MultipartReader(max_part_bytes=MAX_BYTES, announced=announced)
    parts = []
    for piece in pieces:
        parts += list(reader.feed(piece))
        assert len(reader._data) <= MAX_BYTES + len(piece) + 20_000
    return parts


def pieces_of(stream: bytes, sizes: Iterator[int]) -> Iterator[bytes]:
    place = 0
    while place < len(stream):
        size = next(sizes)
        yield stream[place : place + size]
        place += size


@pytest.mark.parametrize("with_length", [True, False])
@pytest.mark.parametrize("boundary", [b"--part", b"--", b"----x y", b"--\xff"])
def test_parts_are_the_same_however_they_are_cut(with_length: bool, boundary: bytes) -> None:
    random = np.random.default_rng(0)
    contents = [random.bytes(size).replace(b"--", b"..") for size in (900, 1, 5000, 0, 77)]
    stream = b"\r\n".join(
        part_of(content, with_length=with_length, boundary=boundary) for content in contents
    )
    stream = b"\r\npreamble\r\n" + stream + boundary + b"\r\n"
    for sizes in (itertools.repeat(1), itertools.repeat(10**6), iter(lambda: 37, None)):
        parts = read(pieces_of(stream, sizes))
        assert [p.rstrip(b"\r\n") for p in parts if isinstance(p, bytes)] == [
            content.rstrip(b"\r\n") for content in contents
        ]


@pytest.mark.parametrize("with_length", [True, False])
@pytest.mark.parametrize("announced", [b"", b"part", b"--part"])
def test_a_stream_may_begin_without_a_boundary(with_length: bool, announced: bytes) -> None:
    contents = [b"\xff\xd8 one \n-- \xff\xd9", b"two", b"three"]
    if not announced.startswith(b"p"):
        contents[0] = contents[0].replace(b"--", b"..")  # nothing else tells where it ends
    stream = b"".join(part_of(content, with_length=with_length) for content in contents)
    stream = stream.removeprefix(b"--part\r\n") + b"--part--\r\n"
    for size in (1, 7, 10**6):
        parts = read(pieces_of(stream, itertools.repeat(size)), announced=announced)
        assert parts == contents


@pytest.mark.parametrize("length", [2**31 - 648, 10**17])
def test_a_part_that_says_it_is_huge_is_passed_over_unkept(length: int) -> None:
    header = b"--x\r\nContent-Length: %d\r\n\r\n" % length
    parts = read([header, *[bytes(65_536)] * 300])
    assert parts == [OversizedPart(num_bytes=length)]


def test_after_a_part_that_was_passed_over_the_next_one_comes() -> None:
    for with_length in (True, False):
        huge, next_one = (
            part_of(bytes(300_000), with_length=with_length),
            part_of(b"ok", with_length=with_length),
        )
        stream = huge + next_one + b"--part\r\n"
        assert read(pieces_of(stream, itertools.repeat(1000))) == [
            OversizedPart(num_bytes=300_000),
            b"ok",
        ]


def test_a_part_without_length_and_end_is_not_kept() -> None:
    assert read([b"--x\r\n\r\n", *[bytes(65_536)] * 300]) == []


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (b"", "no picture begins"),
        (b"\n" * 10, "no picture begins"),
        (b"--x\r\nA: ", "header of a picture does not end"),
        (b"--x\r\nContent-Length: 3\r\n\r\nabc", "no picture begins"),
    ],
)
@pytest.mark.parametrize("filling", [b"x" * 999, b"x\n" * 500, b"\r\r\r"])
def test_what_never_begins_or_ends_is_an_error_soon(
    begin: bytes, words: str, filling: bytes
) -> None:
    with pytest.raises(MultipartError, match=words):
        read([begin, *[filling] * 100_000])


@pytest.mark.parametrize(
    "header", [b"Content-Length: -5", b"Content-Length: x", b"Content-Length: 9" + b"9" * 50]
)
def test_a_length_that_is_none_is_not_believed(header: bytes) -> None:
    assert read([b"--x\r\n" + header + b"\r\n\r\nabc\r\n--x\r\n"]) == [b"abc"]


def test_noise_gives_parts_or_an_error_and_stays_small() -> None:
    random = np.random.default_rng(1)
    words = [b"--x\r\n", b"Content-Length: 9\r\n", b"\r\n", b"\n", b"--", b"x" * 40, b"\r\n--x\r\n"]
    for _ in range(300):
        stream = b"".join(words[i] for i in random.integers(0, len(words), 200))
        whole: list[bytes | OversizedPart] | None
        try:
            whole = read([stream])
        except MultipartError:
            whole = None
        if whole is not None:
            assert read(pieces_of(stream, itertools.repeat(7))) == whole
