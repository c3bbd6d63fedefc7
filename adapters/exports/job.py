"""What every writer of an export's format gets: the map, its run, the folder, and progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from adapters.exports.place import MapPlace
from engine.errors import ConfigError, EngineError
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

Item = TypeVar("Item")


class ExportCancelledError(EngineError):
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
    place: MapPlace | None = None  # where the map lies; None: in its own frame and unit
    upright_from_map: Float64Array | None = None  # (3, 3) by which the map was turned; None: not
    doubted: frozenset[str] = frozenset()  # names of keyframes that were taken out of the map
    progress: Callable[[Progress], None] = no_progress
    is_cancelled: Callable[[], bool] = never_cancelled  # from any thread, such as Event.is_set
    notes: list[str] = field(default_factory=list)  # what writers say of their files, in sentences

    def images(self) -> list[pycolmap.Image]:
        """The map's images, in order of their ids."""
        images = self.reconstruction.images.values()
        return sorted(images, key=lambda image: image.image_id)

    def each(self, what: str, items: Collection[Item]) -> Iterator[Item]:
        """Items one by one, with progress reported before each and at the end.

        Raises:
            ExportCancelledError: the export was cancelled before the next item.
        """
        listed = list(items)
        for rows in self.each_slice(what, len(listed), size=1):
            yield from listed[rows]

    def each_slice(self, what: str, total: int, *, size: int) -> Iterator[slice]:
        """Slices of things that are written some at once, as `each` does.

        Raises:
            ExportCancelledError: the export was cancelled before the next slice.
        """
        for done in range(0, total, size):
            self.check()
            self.progress(Progress(what=what, done=done, total=total))
            yield slice(done, min(done + size, total))
        self.progress(Progress(what=what, done=total, total=total))

    def check(self) -> None:
        """Raises ExportCancelledError where the export was cancelled."""
        if self.is_cancelled():
            raise ExportCancelledError("the export was cancelled; nothing is left of it")

    def needed_place(self, option: str) -> MapPlace:
        """Where the map lies.

        Raises:
            ConfigError: it has no place on the globe, which the option needs.
        """
        if self.place is None:
            raise ConfigError(
                f"{option} needs a map with a place on the globe:"
                f" livesfm georeference {self.run} --positions FILE gives it one"
            )
        return self.place
