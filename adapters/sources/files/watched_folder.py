"""A folder in which photos appear, as a source."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Self

from adapters.live.backoff import Backoff
from adapters.live.deadline import GiveUpDeadline
from adapters.sources.files.arriving_files import ArrivingFile, ArrivingFiles
from adapters.sources.files.photo_files import (
    PhotoReader,
    known_frame_names,
    possible_frame_names,
)
from adapters.sources.files.photo_search import words_of
from engine.config import LiveSourcesConfig, SourcesConfig
from engine.errors import SourceError
from engine.ports import FrameIds
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    SourceState,
    TakenFrames,
)

logger = logging.getLogger(__name__)

Item = Arrival | RejectedFrame | SourceNotice

_LOOK_AGAIN_S = 2.0  # network folders report no changes
_GATHER_MS = 20  # changes that come so close are reported at once
_GATHER_AT_MOST_MS = 200


class WatchedFolder:
    """Photos that are in a folder, in natural order, and then those that appear in it.

    Nothing is lost when the engine is slow: files wait. Each path is taken once, when it is
    written (see ``ArrivingFiles``); what replaces it later is not. Whether a file that may still be
    written is a whole image shows when it is decoded, so photos are decoded here. When the folder
    vanishes, its return is awaited. It never ends by itself, unless ``give_up_after_s`` says so.
    """

    def __init__(
        self,
        path: Path,
        *,
        sources: SourcesConfig,
        live_sources: LiveSourcesConfig,
        next_frame_id: FrameIds,
        single_camera_per_size: bool,
    ) -> None:
        """Sees that the folder is there.

        Args:
            path: the folder; what is below its subfolders is left alone.
            sources: limits on what is taken.
            live_sources: how long to wait for what.
            next_frame_id: gives out frame ids.
            single_camera_per_size: images of one camera model, focal length and size share a
                camera; False: each image has its own.

        Raises:
            SourceError: there is no such folder.
        """
        self._path = path
        self.info = SourceInfo(
            label=f"watch:{path}", is_live=False, is_sequence=False, num_frames=None
        )
        self._sources = sources
        self._live_sources = live_sources
        self._next_frame_id = next_frame_id
        self._single_camera_per_size = single_camera_per_size
        self._taken = TakenFrames(names={}, captured_at_s={})
        try:
            if not path.is_dir():
                raise SourceError(f"{self.info.label}: no such folder")
        except OSError as error:
            raise SourceError(f"{self.info.label}: {error.strerror or error}") from error

    @property
    def fingerprint(self) -> str:
        """Nothing: photos that were taken may go."""
        return ""

    def leave_out(self, taken: TakenFrames) -> list[str]:
        """Leaves out photos by their names."""
        self._taken = taken
        return []

    async def frames(self) -> AsyncGenerator[Item, None]:
        """Yields the photos and news of the folder; reads and decodes on another thread."""
        files = ArrivingFiles(self._path, settle_s=self._live_sources.settle_s)
        every_nth_file = self._sources.every_nth_frame
        taking = _Taking(files, self._photos(), every_nth_file=every_nth_file, taken=self._taken)
        async with aclosing(self._found(files)) as found:
            async for item in found:
                if isinstance(item, SourceNotice):
                    yield item
                elif (photo := await asyncio.to_thread(taking.take, item)) is not None:
                    yield photo

    async def _found(
        self, files: ArrivingFiles
    ) -> AsyncGenerator[ArrivingFile | SourceNotice, None]:
        """Files whose turn it is, and news of the folder."""
        backoff = Backoff(
            first_s=self._live_sources.retry_first_s, max_s=self._live_sources.retry_max_s
        )
        is_there: bool | None = None  # not reported yet
        deadline = GiveUpDeadline(self._live_sources.give_up_after_s)
        async with _FolderWatch(self._path) as watch:
            found = await self._look_first(files)
            while deadline.left_s > 0.0:
                if is_there is not isinstance(found, list):
                    is_there = isinstance(found, list)
                    yield self._news(found)
                if isinstance(found, str):
                    await watch.wait(min(backoff.next_wait_s(), deadline.left_s))
                    found = await self._look(files)
                    continue
                backoff.reset()
                if left_out := files.new_left_out():
                    words = f"left out: {words_of(left_out)}"
                    notice = self._notice(SourceState.CONNECTED, words)
                    yield replace(notice, left_out=left_out)
                for file in found:
                    yield file
                    deadline.restart()
                if not found:
                    await watch.follow(files.folder_identity)
                    wait_s = min(files.settles_in_s(now_s=_now_s()), _LOOK_AGAIN_S)
                    await watch.wait(min(wait_s, deadline.left_s))
                found = await self._look(files)
        give_up_after_s = self._live_sources.give_up_after_s
        yield self._notice(SourceState.ENDED, f"no new file for {give_up_after_s:g} s")

    async def _look_first(self, files: ArrivingFiles) -> list[ArrivingFile] | str:
        """What is there already, in one list: formats without an end marker must settle first."""
        found = await self._look(files)
        if len(found) < files.num_unfinished:
            await asyncio.sleep(self._live_sources.settle_s)
            found = await self._look(files)
        return found

    async def _look(self, files: ArrivingFiles) -> list[ArrivingFile] | str:
        """The files whose turn it is, or why the folder cannot be read."""
        try:
            return await asyncio.to_thread(files.scan, now_s=_now_s())
        except OSError as error:
            return error.strerror or str(error)

    def _photos(self) -> PhotoReader:
        return PhotoReader(
            self._path,
            label=self.info.label,
            config=self._sources,
            next_frame_id=self._next_frame_id,
            single_camera_per_size=self._single_camera_per_size,
        )

    def _news(self, found: list[ArrivingFile] | str) -> SourceNotice:
        if isinstance(found, str):
            return self._notice(SourceState.LOST, f"the folder is gone: {found}")
        return self._notice(SourceState.CONNECTED, f"{len(found)} images are there")

    def _notice(self, state: SourceState, detail: str) -> SourceNotice:
        return SourceNotice(source=self.info.label, state=state, detail=detail)


def _now_s() -> float:
    """The monotonic clock of the event loop."""
    return asyncio.get_running_loop().time()


class _Taking:
    """Makes photos of files. Its methods belong to one thread at a time."""

    def __init__(
        self,
        files: ArrivingFiles,
        photos: PhotoReader,
        *,
        every_nth_file: int,
        taken: TakenFrames,
    ) -> None:
        self._files = files
        self._photos = photos
        self._every_nth_file = every_nth_file
        self._num_taken = taken.next_index
        self._before = set(taken.names.values())  # the files that they are of are not here yet
        self._frame_names = {name.casefold() for name in taken.names.values()}

    def take(self, arrived: ArrivingFile) -> Arrival | RejectedFrame | None:
        """The photo in a file; None when it is left out, or not whole yet after all."""
        if self._was_taken(PurePosixPath(arrived.name)):
            self._files.take(arrived)
            return None
        index = self._num_taken
        if index % self._every_nth_file:
            self._count(arrived)
            return None
        file = PurePosixPath(arrived.name)
        names = possible_frame_names(file)
        frame_name = next(name for name in names if name.casefold() not in self._frame_names)
        read = self._photos.read(file, index=index, frame_name=frame_name)
        photo = read.decode() if isinstance(read, Arrival) else read
        if isinstance(photo, Frame):
            self._frame_names.add(frame_name.casefold())
        elif photo.reason is DropReason.UNREADABLE and not arrived.is_settled:
            self._files.wait_for(arrived)
            return None
        self._count(arrived)
        return Arrival.of(photo) if isinstance(photo, Frame) else photo

    def _was_taken(self, file: PurePosixPath) -> bool:
        """Whether a former part of the run has the file, by the names that it may have there."""
        own = next((name for name in known_frame_names(file) if name in self._before), None)
        if own is None:
            return False
        self._before.remove(own)  # another file may have got a name of the same kind
        return True

    def _count(self, arrived: ArrivingFile) -> None:
        self._files.take(arrived)
        self._num_taken += 1


class _FolderWatch:
    """Wakes whoever waits when something changes in a folder; without it they wait longer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._followed: tuple[int, int] | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._end()

    async def follow(self, identity: tuple[int, int]) -> None:
        """Watches the folder from now on, if it is not the one that is watched already."""
        if identity == self._followed:
            return
        await self._end()
        self._followed = identity
        self._task = asyncio.create_task(self._watch(), name=f"watch {self._folder.name}")
        await asyncio.sleep(0)  # now it watches
        self._changed.set()  # what came before is to be found

    async def wait(self, at_most_s: float) -> None:
        """Waits for the next change."""
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._changed.wait()
        self._changed.clear()

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _watch(self) -> None:
        from watchfiles import awatch

        try:
            async for _ in awatch(
                self._folder,
                watch_filter=None,
                recursive=False,
                step=_GATHER_MS,
                debounce=_GATHER_AT_MOST_MS,
            ):
                self._changed.set()
        except (OSError, RuntimeError) as error:  # gone again, or the system watches no more
            logger.warning("%s: looked at every %g s: %s", self._folder, _LOOK_AGAIN_S, error)
