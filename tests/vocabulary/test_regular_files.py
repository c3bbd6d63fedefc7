"""Files of others are read whole, when they are files and fit."""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import regular_files
from engine.regular_files import read_regular_file, regular_file_size

MAX_BYTES = 10_000


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [a_fifo, a_socket, a_device, a_folder])
@pytest.mark.parametrize("is_linked", [False, True])
def test_what_is_no_file_is_refused_by_what_it_is_and_never_waited_for(
    tmp_path: Path, make: Callable[[Path], None], is_linked: bool
) -> None:
    path = tmp_path / "x"
    make(path)
    if is_linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    with pytest.raises(OSError, match=make.__name__.replace("_", " ").replace("fifo", "FIFO")):
        read_regular_file(path, max_bytes=MAX_BYTES)


def test_a_name_that_becomes_a_fifo_after_the_look_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    os.mkfifo(path)
    monkeypatch.setattr(regular_files, "regular_file_size", lambda _: 10)
    with pytest.raises(OSError, match="is a FIFO"):
        read_regular_file(path, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("num_bytes", [0, 1, MAX_BYTES - 1, MAX_BYTES])
def test_files_up_to_the_limit_are_read_whole(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(os.urandom(num_bytes))
    assert read_regular_file(path, max_bytes=MAX_BYTES) == path.read_bytes()
    assert regular_file_size(path) == num_bytes


def test_a_sparse_giant_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.jpg"
    with path.open("wb") as file:
        file.truncate(100 * 2**30)
    with pytest.raises(OSError, match="too large") as refused:
        read_regular_file(path, max_bytes=MAX_BYTES)
    assert refused.value.errno == errno.EFBIG


def test_a_file_that_grows_while_it_is_read_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grows.jpg"
    path.write_bytes(b"x" * 100)
    read = os.read

    def read_and_grow(descriptor: int, num_bytes: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"x" * 1000)
        return read(descriptor, num_bytes)

    monkeypatch.setattr(os, "read", read_and_grow)
    with pytest.raises(OSError, match="more than 0.01 MB"):
        read_regular_file(path, max_bytes=MAX_BYTES)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_file_without_a_size_is_read_to_its_end() -> None:
    path = Path("/proc/self/status")
    assert regular_file_size(path) == 0
    assert b"VmRSS" in read_regular_file(path, max_bytes=1_000_000)
    with pytest.raises(OSError, match="more than"):
        read_regular_file(path, max_bytes=100)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages as Linux does")
def test_a_file_that_does_not_fit_in_memory_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "big.tif"
    with path.open("wb") as file:
        file.truncate(2**40)
    former = resource.getrlimit(resource.RLIMIT_AS)
    num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    used = num_pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, former[1]))
    try:
        with pytest.raises(OSError, match="do not fit in memory") as refused:
            read_regular_file(path, max_bytes=2**41)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)
    assert refused.value.errno == errno.EFBIG


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 200)
    before = threading.active_count(), len(os.listdir("/dev/fd"))
    for _ in range(20):
        read_regular_file(path, max_bytes=MAX_BYTES)
        with pytest.raises(OSError, match="too large"):
            read_regular_file(path, max_bytes=100)
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == before
