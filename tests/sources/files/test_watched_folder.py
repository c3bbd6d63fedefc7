"""Folders in which photos appear."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from adapters.sources.files import watched_folder
from adapters.sources.files.arriving_files import ArrivingFile, ArrivingFiles
from adapters.sources.files.watched_folder import WatchedFolder
from engine.config import LiveSourcesConfig, SourcesConfig
from engine.errors import SourceError
from engine.types import DropReason, Frame, FrameId, RejectedFrame, SourceNotice, SourceState
from tests.support.received import Decoded as Item
from tests.support.received import items_of
from tests.support.waiting import HANG_S, LeapingLoop, leap, until

PATIENCE_S = 1e3  # on the clock of the event loop, which leaps
QUICK: dict[str, float] = {"settle_s": 0.15, "retry_first_s": 0.05, "retry_max_s": 0.1}

Doing = Callable[[], Awaitable[None]]


def encoded(suffix: str = ".jpg", shade: int = 100, *, size: tuple[int, int] = (96, 80)) -> bytes:
    image = np.full((size[1], size[0], 3), shade, np.uint8)
    data: bytes = cv2.imencode(suffix, image)[1].tobytes()
    return data


def write(path: Path, shade: int = 100) -> None:
    path.write_bytes(encoded(path.suffix.lower(), shade))


def rename_into(path: Path, shade: int = 100) -> None:
    """As programs do that know how to hand over a file."""
    temporary = path.with_name(f".{path.name}.part")
    write(temporary.with_suffix(path.suffix), shade)
    temporary.with_suffix(path.suffix).rename(path)


def watch(path: Path, *, live: dict[str, Any] | None = None, **limits: Any) -> WatchedFolder:
    ids = itertools.count(1)
    return WatchedFolder(
        path,
        sources=SourcesConfig(**limits),
        live_sources=LiveSourcesConfig(**{**QUICK, **(live or {})}),
        next_frame_id=lambda: FrameId(next(ids)),
        single_camera_per_size=True,
    )


def read(
    folder: WatchedFolder,
    *,
    until: Callable[[list[Item]], bool] = lambda items: False,
    after: Callable[[Item], None] = lambda item: None,
    doing: Doing | None = None,
) -> list[Item]:
    """What comes until the end or until enough has come, while something is being done."""

    async def collect() -> list[Item]:
        items: list[Item] = []
        async with aclosing(items_of(folder)) as arriving:
            task = asyncio.ensure_future(doing()) if doing is not None else None
            async for item in arriving:
                items.append(item)
                after(item)
                if until(items):
                    break
            if task is not None:
                await task
        return items

    with asyncio.Runner(loop_factory=LeapingLoop, debug=True) as runner:
        return runner.run(collect())


def leap_later(duration_s: float) -> None:
    """Lets time pass once the next file is waited for."""
    asyncio.get_running_loop().call_soon(leap, duration_s)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the folder was looked at."""
    times_s: list[float] = []
    scan = ArrivingFiles.scan

    def remember(files: ArrivingFiles, *, now_s: float) -> list[ArrivingFile]:
        found = scan(files, now_s=now_s)
        times_s.append(now_s)
        return found

    monkeypatch.setattr(ArrivingFiles, "scan", remember)
    return times_s


@pytest.fixture
def _only_signs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is looked at when something changes, and not from time to time."""
    monkeypatch.setattr(watched_folder, "_LOOK_AGAIN_S", 2 * HANG_S)


only_signs_count = pytest.mark.usefixtures("_only_signs_count")


async def until_looked_at(looks: list[float], times: int) -> None:
    """Waits until the folder was looked at so often again."""
    num_before = len(looks)
    await until(lambda: len(looks) >= num_before + times)


def photos_of(items: Sequence[Item]) -> list[Frame | RejectedFrame]:
    return [item for item in items if isinstance(item, Frame | RejectedFrame)]


def names_of(items: Sequence[Item]) -> list[str]:
    return [photo.name for photo in photos_of(items)]


def states_of(items: Sequence[Item]) -> list[SourceState]:
    return [item.state for item in items if isinstance(item, SourceNotice)]


def num_photos(num: int) -> Callable[[list[Item]], bool]:
    return lambda items: len(photos_of(items)) == num


def then(doing: Callable[[], None]) -> Callable[[Item], None]:
    """Does something once the folder is watched."""

    def after(item: Item) -> None:
        if isinstance(item, SourceNotice) and item.state is SourceState.CONNECTED:
            doing()

    return after


def test_photos_that_are_there_come_first_and_in_natural_order_then_those_that_arrive(
    tmp_path: Path,
) -> None:
    for number, name in enumerate(["img10.jpg", "img2.bmp", "img1.jpg"]):
        write(tmp_path / name, 50 * number)
    folder = watch(tmp_path)
    assert folder.info.label == f"watch:{tmp_path}"
    assert (folder.info.is_live, folder.info.is_sequence, folder.info.num_frames) == (
        False,
        False,
        None,
    )

    def arrive(item: Item) -> None:
        if isinstance(item, Frame) and item.index == 2:
            rename_into(tmp_path / "img0.jpg", 200)
        if isinstance(item, Frame) and item.index == 3:
            rename_into(tmp_path / "img00.jpg", 220)

    items = read(folder, after=arrive, until=num_photos(5))
    frames = [item for item in items if isinstance(item, Frame)]
    assert names_of(items) == ["img1.jpg", "img2.bmp.jpg", "img10.jpg", "img0.jpg", "img00.jpg"]
    assert [frame.index for frame in frames] == list(range(5))
    assert [frame.frame_id for frame in frames] == list(range(1, 6))
    assert [frame.captured_at_s for frame in frames] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert {frame.source for frame in frames} == {folder.info.label}
    assert {frame.camera_key for frame in frames} == {"96x80"}
    assert frames[0].jpeg == (tmp_path / "img1.jpg").read_bytes()
    assert states_of(items) == [SourceState.CONNECTED]
    notice = items[0]
    assert isinstance(notice, SourceNotice)
    assert (notice.source, notice.detail) == (folder.info.label, "3 images are there")


@only_signs_count
def test_a_renamed_file_comes_at_once(tmp_path: Path) -> None:
    def arrive() -> None:
        rename_into(tmp_path / "a.jpg")

    folder = watch(tmp_path, live={"settle_s": 2 * HANG_S})
    items = read(folder, after=then(arrive), until=num_photos(1))
    assert names_of(items) == ["a.jpg"]


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_a_slow_writer_is_waited_for(tmp_path: Path, suffix: str, looks: list[float]) -> None:
    data = encoded(suffix)
    is_watched = asyncio.Event()

    async def write_slowly() -> None:
        await is_watched.wait()
        for end in range(0, len(data) + len(data) // 8, len(data) // 8):
            (tmp_path / f"a{suffix}").write_bytes(data[:end])
            if end < len(data):
                await until_looked_at(looks, 1)
                leap(0.6 * PATIENCE_S)
        if suffix == ".bmp":  # which has no end marker
            await until_looked_at(looks, 1)
            leap(PATIENCE_S)

    folder = watch(tmp_path, live={"settle_s": PATIENCE_S})
    items = read(folder, doing=write_slowly, after=then(is_watched.set), until=num_photos(1))
    (photo,) = photos_of(items)
    assert isinstance(photo, Frame)
    assert int(photo.pixels.mean()) == pytest.approx(100, abs=1)


def test_a_writer_that_stops_half_way_gives_a_counted_drop(tmp_path: Path) -> None:
    def write_half() -> None:
        (tmp_path / "a.jpg").write_bytes(encoded()[:400])

    items = read(watch(tmp_path), after=then(write_half), until=num_photos(1))
    (rejected,) = photos_of(items)
    assert isinstance(rejected, RejectedFrame)
    assert (rejected.reason, rejected.name) == (DropReason.UNREADABLE, "a.jpg")


def test_what_looks_whole_and_is_not_gets_time_to_be_completed(
    tmp_path: Path, looks: list[float]
) -> None:
    data = encoded()
    is_watched = asyncio.Event()

    async def write_thumbnail_first() -> None:
        await is_watched.wait()
        (tmp_path / "a.jpg").write_bytes(data[:200] + b"\xff\xd9")
        await until_looked_at(looks, 2)
        (tmp_path / "a.jpg").write_bytes(data)

    folder = watch(tmp_path, live={"settle_s": PATIENCE_S})
    items = read(
        folder, doing=write_thumbnail_first, after=then(is_watched.set), until=num_photos(1)
    )
    (photo,) = photos_of(items)
    assert isinstance(photo, Frame)
    assert photo.index == 0


def test_hidden_files_temporaries_and_subfolders_are_left_alone(tmp_path: Path) -> None:
    for name in (".hidden.jpg", "a.jpg.part", "~a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(encoded())
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jpg")
    folder = watch(tmp_path, live={"give_up_after_s": PATIENCE_S})
    items = read(folder, after=then(lambda: leap_later(PATIENCE_S)))
    assert photos_of(items) == []
    assert states_of(items) == [SourceState.CONNECTED, SourceState.ENDED]


def test_each_kind_that_is_left_out_is_reported_when_it_first_comes(tmp_path: Path) -> None:
    write(tmp_path / "0.jpg")
    for name in ("0.DNG", "1.dng", "notes.txt"):
        (tmp_path / name).write_text(name)

    async def add() -> None:
        (tmp_path / "a.mov").write_text("a video")
        write(tmp_path / "1.jpg", 50)

    items = read(
        watch(tmp_path),
        after=lambda item: None,
        until=lambda items: sum(isinstance(item, Frame) for item in items) == 2,
        doing=add,
    )
    reports = [item for item in items if isinstance(item, SourceNotice) and item.left_out]
    last = {(one.kind, one.reason): one.num_files for one in reports[-1].left_out}
    assert last == {
        (".dng", "raw photos are not watched for"): 2,
        (".mov", "a video is a source of its own"): 1,
        (".txt", "no photo"): 1,
    }
    assert len(reports) <= 2


def test_a_path_is_taken_once_even_when_it_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", 10)

    def replace(item: Item) -> None:
        if isinstance(item, Frame) and item.index == 0:
            rename_into(tmp_path / "a.jpg", 200)
            rename_into(tmp_path / "b.jpg", 90)
        if isinstance(item, Frame) and item.index == 1:
            leap_later(PATIENCE_S)

    folder = watch(tmp_path, live={"give_up_after_s": PATIENCE_S})
    assert names_of(read(folder, after=replace)) == ["a.jpg", "b.jpg"]


def test_frame_names_stay_unique_whatever_arrives(tmp_path: Path) -> None:
    def arrive(item: Item) -> None:
        later = {0: "a.jpg", 1: "a.bmp", 2: "a\n.jpg", 3: "a\x07.jpg"}
        index = getattr(item, "index", -1)
        if index in later:
            rename_into(tmp_path / later[index], 40 * index)

    rename_into(tmp_path / "a.png", 250)
    names = names_of(read(watch(tmp_path), after=arrive, until=num_photos(5)))
    assert names == ["a.png.jpg", "a.jpg", "a.bmp.jpg", "a_.jpg", "a_.jpg.jpg"]


def test_the_same_bytes_again_are_a_duplicate(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    write(tmp_path / "b.jpg")
    first, second = photos_of(read(watch(tmp_path), until=num_photos(2)))
    assert isinstance(first, Frame)
    assert isinstance(second, RejectedFrame)
    assert second.reason is DropReason.DUPLICATE


def test_only_every_nth_file_is_taken(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path / f"{number}.jpg", 20 * number)
    items = read(watch(tmp_path, every_nth_frame=3), until=num_photos(3))
    assert names_of(items) == ["0.jpg", "3.jpg", "6.jpg"]


def test_giving_up_counts_from_the_last_file(tmp_path: Path) -> None:
    def arrive(number: int) -> None:
        leap(0.6 * PATIENCE_S)
        rename_into(tmp_path / f"{number}.jpg", 50 * number)

    def let_time_pass(item: Item) -> None:
        index = getattr(item, "index", -1)
        if index < 3:
            asyncio.get_running_loop().call_soon(arrive, index + 1)
        else:
            leap_later(PATIENCE_S)

    items = read(watch(tmp_path, live={"give_up_after_s": PATIENCE_S}), after=let_time_pass)
    assert len(photos_of(items)) == 4
    assert items[-1] == SourceNotice(
        source=f"watch:{tmp_path}", state=SourceState.ENDED, detail="no new file for 1000 s"
    )


def test_a_folder_that_vanishes_is_lost_and_its_return_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jpg", 10)

    def happen(item: Item) -> None:
        if isinstance(item, Frame) and item.index == 0:
            shutil.rmtree(folder)
        if isinstance(item, SourceNotice) and item.state is SourceState.LOST:
            folder.mkdir()
            write(folder / "b.jpg", 90)
        if isinstance(item, Frame) and item.index == 1:
            rename_into(folder / "c.jpg", 200)

    items = read(watch(folder), after=happen, until=num_photos(3))
    assert names_of(items) == ["a.jpg", "b.jpg", "c.jpg"]
    states = [SourceState.CONNECTED, SourceState.LOST, SourceState.CONNECTED]
    assert states_of(items) == states
    lost = [item for item in items if isinstance(item, SourceNotice)][1]
    assert lost.detail == "the folder is gone: No such file or directory"


def test_a_folder_that_never_comes_back_is_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()

    def vanish() -> None:
        folder.rename(tmp_path / "away")

    def happen(item: Item) -> None:
        then(vanish)(item)
        if isinstance(item, SourceNotice) and item.state is SourceState.LOST:
            leap_later(PATIENCE_S)

    items = read(watch(folder, live={"give_up_after_s": PATIENCE_S}), after=happen)
    states = [SourceState.CONNECTED, SourceState.LOST, SourceState.ENDED]
    assert states_of(items) == states


@only_signs_count
def test_another_folder_in_the_place_of_the_watched_one_is_watched_in_its_turn(
    tmp_path: Path, looks: list[float]
) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    write(folder / "a.jpg", 10)
    write(other / "b.jpg", 90)

    num_looks_when_came: dict[int, int] = {}

    def came(item: Item) -> None:
        if isinstance(item, Frame):
            num_looks_when_came[item.index] = len(looks)

    async def until_watched_after(index: int) -> None:
        """The folder is watched before it is looked at for the second time."""
        await until(lambda: len(looks) >= num_looks_when_came.get(index, len(looks)) + 2)

    async def swap() -> None:
        await until_watched_after(0)
        folder.rename(tmp_path / "away")
        other.rename(folder)
        await until_watched_after(1)
        rename_into(folder / "c.jpg", 200)

    assert names_of(read(watch(folder), doing=swap, after=came, until=num_photos(3))) == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
    ]


@pytest.mark.parametrize("name", ["missing", "file.jpg", "x" * 400])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "file.jpg")
    with pytest.raises(SourceError, match=f"watch:.*{name}: "):
        watch(tmp_path / name)


def test_a_system_that_cannot_watch_is_told_once_and_the_folder_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("file watch limit reached")

    monkeypatch.setattr("watchfiles.awatch", refuse)
    monkeypatch.setattr("adapters.sources.files.watched_folder._LOOK_AGAIN_S", 0.1)

    async def arrive() -> None:
        await asyncio.sleep(0.3)
        rename_into(tmp_path / "a.jpg")

    assert names_of(read(watch(tmp_path), doing=arrive, until=num_photos(1))) == ["a.jpg"]
    assert caplog.text.count("file watch limit reached") == 1


def test_files_wait_for_a_slow_consumer(tmp_path: Path) -> None:
    async def arrive() -> None:
        for number in range(10):
            rename_into(tmp_path / f"{number}.jpg", 20 * number)
            await asyncio.sleep(0.01)

    items = read(
        watch(tmp_path), doing=arrive, after=lambda item: time.sleep(0.03), until=num_photos(10)
    )
    assert sorted(names_of(items)) == [f"{number}.jpg" for number in range(10)]
    assert all(isinstance(photo, Frame) for photo in photos_of(items))


@only_signs_count
def test_closing_does_not_wait_for_the_next_file(tmp_path: Path) -> None:
    async def leave() -> None:
        arriving = watch(tmp_path).frames()
        assert isinstance(await anext(arriving), SourceNotice)
        waiting = asyncio.ensure_future(anext(arriving))
        await asyncio.sleep(0.3)
        waiting.cancel()
        await asyncio.wait((waiting,))
        await asyncio.wait_for(arriving.aclose(), HANG_S)

    asyncio.run(leave(), debug=True)


def test_a_file_that_may_not_be_read_is_a_counted_drop(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    write(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").chmod(0)
    (rejected,) = photos_of(read(watch(tmp_path), until=num_photos(1)))
    assert isinstance(rejected, RejectedFrame)
    assert "Permission denied" in rejected.detail
