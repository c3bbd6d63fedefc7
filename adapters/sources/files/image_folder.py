"""A folder of photos, a list of them, or one photo, as a source."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from adapters.images.decoding import read_image_header
from adapters.live.blocking import iterate_in_thread
from adapters.sources.files.mask_files import MASKS_FOLDER, MaskFiles
from adapters.sources.files.photo_files import (
    PhotoReader,
    is_jpeg,
    known_frame_names,
    possible_frame_names,
)
from adapters.sources.files.photo_list import PhotoList
from adapters.sources.files.photo_search import FoundImages, find_images, find_listed
from adapters.sources.files.position_files import NamedPositions, PhotoPositions
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.events import ALSO_AN_EVENT
from engine.ports import FrameIds
from engine.regular_files import read_regular_file
from engine.types import (
    Arrival,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    SourceState,
    TakenFrames,
)

logger = logging.getLogger(__name__)

Item = Arrival | RejectedFrame | SourceNotice

_MAX_NAMED = 3  # photos in a message


class ImageFolder:
    """Photos in natural order of their names, each worth a keyframe.

    A folder stands for its photos and those in its subfolders; each subfolder is a camera of its
    own, but for the numbered ones of a camera's card. Where one of them is ``images``, and others
    hold masks or the same photos at a smaller size (``images_2``), it stands for that one alone.
    What is left out is reported first. Files are read when their turn comes.

    Photos that are named one by one are taken as if they alone lay in the folder that holds all of
    them, in the order of their names on the command line.

    Photos may have masks, see ``MaskFiles``.
    """

    def __init__(
        self,
        photos: Path | PhotoList,
        *,
        config: SourcesConfig,
        next_frame_id: FrameIds,
        single_camera_per_size: bool,
        positions: NamedPositions | None = None,
        photos_beside: Iterable[Path] = (),
    ) -> None:
        """Lists the images.

        Args:
            photos: a folder, one image file, or several.
            config: limits on what is taken.
            next_frame_id: gives out frame ids; called on the thread that decodes.
            single_camera_per_size: images of one subfolder, camera model, focal length and size
                share a camera; False: each image has its own.
            positions: of photos by their names, which win over EXIF; None: there are none.
            photos_beside: those of the run's other sources, for which the names may be too.

        Raises:
            SourceError: the path is missing, cannot be read, or holds no image file.
        """
        self._config = config
        self._next_frame_id = next_frame_id
        self._single_camera_per_size = single_camera_per_size
        self._is_list = isinstance(photos, PhotoList)
        if isinstance(photos, PhotoList):
            found, path = find_listed(photos), photos.folder
        else:
            found, path = find_images(photos), photos
        self._root, self._files = found.root, found.files
        self._named = positions
        self._positions = self._positions_by_file(photos_beside)
        self._found = found
        self._masks = _find_masks(found)
        self._frame_names = _frame_names(self._files)
        # Positions of the files to be read, and the index of each.
        self._indices = {i: i for i in range(0, len(self._files), config.every_nth_frame)}
        self._label = str(path)

    @property
    def info(self) -> SourceInfo:
        """Photos, as many as there are left to be read."""
        num_left = len(self._indices)
        return SourceInfo(
            label=self._label,
            is_live=False,
            is_sequence=False,
            num_frames=min(num_left, self._config.max_frames or num_left),
        )

    @property
    def fingerprint(self) -> str:
        """A number of size and time for each file."""
        return " ".join(_file_fingerprint(self._root / file) for file in self._files)

    def leave_out(self, taken: TakenFrames) -> list[str]:
        """Leaves out photos by their names; what is new in the folder comes behind."""
        positions = {name: position for position, name in self._frame_names.items()}
        for position, file in enumerate(self._files):
            for name in known_frame_names(file):
                positions.setdefault(name, position)
        found = {index: positions[name] for index, name in taken.names.items() if name in positions}
        self._indices = {i: i for i in self._indices if i not in set(found.values())}
        has_moved = any(index != position for index, position in found.items())
        if has_moved or not taken.names.keys().isdisjoint(self._indices.values()):
            first = taken.next_index
            self._indices = {i: first + number for number, i in enumerate(self._indices)}
        return self._oddities(taken, found)

    def _oddities(self, taken: TakenFrames, found: Mapping[int, int]) -> list[str]:
        """Which photos that were taken are gone or have changed."""
        gone = [name for index, name in taken.names.items() if index not in found]
        if self._is_list:
            gone = []  # they are not named this time
        before = dict(enumerate(taken.fingerprint.split()))
        changed = [
            taken.names[index]
            for index, position in found.items()
            if index in before
            and before[index] != _file_fingerprint(self._root / self._files[position])
        ]
        said = ((gone, "gone; the run keeps its image"), (changed, "another file than before"))
        return [f"{self._label}: {_some_of(names)}: {what}" for names, what in said if names]

    def frames(self) -> AsyncGenerator[Item, None]:
        """Yields the photos in order; reads one at a time, on a thread of its own."""
        return iterate_in_thread(self._read, name=f"images {self._root.name}")

    def image_sizes(self) -> Iterator[tuple[int, int]]:
        """The sizes of its images as stored, from their headers."""
        for position in self._indices:
            try:
                file = self._root / self._files[position]
                data = read_regular_file(file, max_bytes=self._config.max_image_bytes)
            except OSError:
                continue  # it is counted when its turn comes
            header = read_image_header(data)
            if header is not None:
                yield header.width, header.height

    def _positions_by_file(self, photos_beside: Iterable[Path]) -> PhotoPositions | None:
        """The positions of its photos by their paths in the folder; None: there are no files."""
        if self._named is None:
            return None
        paths = {PurePosixPath((self._root / file).absolute()): file for file in self._files}
        beside = (PurePosixPath(photo.absolute()) for photo in photos_beside)
        found = self._named.among([*paths, *beside])
        own = {paths[path]: fix for path, fix in found.by_photo.items() if path in paths}
        return replace(found, by_photo=own)

    def _words_of_positions(self) -> str:
        """How many photos have a position in files of their own; empty where there are none."""
        if self._named is None or self._positions is None:
            return ""
        num_named = len(self._positions.by_photo)
        words = f"{num_named} of {len(self._files)} photos are named in the files of positions"
        words = "; ".join(filter(None, (words, self._named.words, self._positions.words)))
        if not num_named:
            logger.warning("%s: %s", self._label, words, extra=ALSO_AN_EVENT)
        return words

    def _read(self, stop: threading.Event) -> Generator[Item, None, None]:
        del stop  # a step is one image: there is nothing to interrupt
        label, left_out = self.info.label, self._found.left_out
        if left_out:
            yield SourceNotice(
                source=label,
                state=SourceState.CONNECTED,
                detail=self._found.words,
                left_out=left_out,
            )
        if words := self._words_of_positions():
            yield SourceNotice(source=label, state=SourceState.CONNECTED, detail=words)
        if words := self._masks.words(num_photos=len(self._files)):
            yield SourceNotice(source=label, state=SourceState.CONNECTED, detail=words)
        photos = PhotoReader(
            self._root,
            label=label,
            config=self._config,
            next_frame_id=self._next_frame_id,
            single_camera_per_size=self._single_camera_per_size,
            masks=self._masks,
            files=self._files,
            positions=None if self._positions is None else self._positions.by_photo,
        )
        for position, index in self._indices.items():
            name = self._frame_names[position]
            photo = photos.read(self._files[position], index=index, frame_name=name)
            if words := photos.new_words():
                yield SourceNotice(source=label, state=SourceState.CONNECTED, detail=words)
            yield photo


def _find_masks(found: FoundImages) -> MaskFiles:
    """The masks of images.

    Raises:
        SourceError: their folder cannot be read.
    """
    try:
        return MaskFiles(found.root, found.files)
    except OSError as error:
        folder = found.root / MASKS_FOLDER
        raise SourceError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _file_fingerprint(path: Path) -> str:
    """Eight digits that change with a file's size and time."""
    try:
        status = path.stat()
    except OSError:
        return "-"
    return f"{zlib.crc32(f'{status.st_size} {status.st_mtime_ns}'.encode()):08x}"


def _some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more}"


def _frame_names(files: Sequence[PurePosixPath]) -> dict[int, str]:
    """A relative name for each file's keyframe image, by index; JPEG files choose first.

    They are unique whatever the case of letters.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    jpegs_first = sorted(range(len(files)), key=lambda index: not is_jpeg(files[index]))
    for index in jpegs_first:
        names[index] = next(
            name for name in possible_frame_names(files[index]) if name.casefold() not in taken
        )
        taken.add(names[index].casefold())
    return names
