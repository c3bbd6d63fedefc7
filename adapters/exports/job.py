"""What every writer of an export's format gets: the map, its run, the folder, and progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from engine.errors import EngineError

if TYPE_CHECKING:
    import pycolmap

Item = TypeVar("Item")


class ExportCancelled(EngineError):
    """An export was cancelled; nothing of it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a part of an export is."""

    what: str  # the things that are counted, such as "images"
    done: int
    total: int


def no_progress(progress: Progress) -> None:
    """Reports nothing."""


def never_cancelled() -> bool:
    """For exports that nobody can cancel."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportJob:
    """A map on its way into a folder."""

    run: Path
    reconstruction: pycolmap.Reconstruction  # of one map; writers leave it as it is
    to: Path  # becomes the export when all writers are done
    map_number: int = 0  # N of sparse/N
    progress: Callable[[Progress], None] = no_progress
    is_cancelled: Callable[[], bool] = never_cancelled  # from any thread, such as Event.is_set

    def images(self) -> list[pycolmap.Image]:
        """The map's images, in order of their ids."""
        images = self.reconstruction.images.values()
        return sorted(images, key=lambda image: image.image_id)

    def each(self, what: str, items: Collection[Item]) -> Iterator[Item]:
        """Items one by one, with progress reported before the first and after each.

        Raises:
            ExportCancelled: the export was cancelled before the next item.
        """
        for batch in self.each_batch(what, list(items), size=1):
            yield from batch

    def each_batch(
        self, what: str, items: Sequence[Item], *, size: int
    ) -> Iterator[Sequence[Item]]:
        """Like `each`, some items at once.

        Raises:
            ExportCancelled: the export was cancelled before the next items.
        """
        for done in range(0, len(items), size):
            self.check()
            self.progress(Progress(what=what, done=done, total=len(items)))
            yield items[done : done + size]
        self.progress(Progress(what=what, done=len(items), total=len(items)))

    def check(self) -> None:
        """Raises ExportCancelled where the export was cancelled."""
        if self.is_cancelled():
            raise ExportCancelled("the export was cancelled; nothing is left of it")
