"""A folder of photos, or one photo, as a source."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from pathlib import Path, PurePosixPath

from adapters.images.decoding import read_image_header
from adapters.live.blocking import iterate_in_thread
from adapters.sources.files.photo_files import (
    IMAGE_SUFFIXES,
    PhotoReader,
    is_jpeg,
    natural_key,
    possible_frame_names,
)
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.ports import FrameIds
from engine.types import Arrival, RejectedFrame, SourceInfo


class ImageFolder:
    """Photos in natural order of their names, each worth a keyframe.

    A folder without images of its own, but with images in its subfolders, stands for all of those;
    each subfolder is a camera of its own. Files are read when their turn comes.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: SourcesConfig,
        next_frame_id: FrameIds,
        single_camera_per_size: bool,
    ) -> None:
        """Lists the images.

        Args:
            path: a folder, or one image file.
            config: limits on what is taken.
            next_frame_id: gives out frame ids; called on the thread that decodes.
            single_camera_per_size: images of one subfolder, camera model, focal length and size
                share a camera; False: each image has its own.

        Raises:
            SourceError: the path is missing, cannot be read, or holds no image file.
        """
        self._config = config
        self._next_frame_id = next_frame_id
        self._single_camera_per_size = single_camera_per_size
        self._root, self._files = _find_images(path)
        self._frame_names = _frame_names(self._files)
        num_taken = len(range(0, len(self._files), config.every_nth_frame))
        self.info = SourceInfo(
            label=str(path),
            is_live=False,
            is_sequence=False,
            num_frames=min(num_taken, config.max_frames or num_taken),
        )

    def frames(self) -> AsyncGenerator[Arrival | RejectedFrame, None]:
        """Yields the photos in order; reads one at a time, on a thread of its own."""
        return iterate_in_thread(self._read, name=f"images {self._root.name}")

    def image_sizes(self) -> Iterator[tuple[int, int]]:
        """The sizes of its images as stored, from their headers."""
        for index in range(0, len(self._files), self._config.every_nth_frame):
            try:
                header = read_image_header((self._root / self._files[index]).read_bytes())
            except OSError:
                continue  # it is counted when its turn comes
            if header is not None:
                yield header.width, header.height

    def _read(self, stop: threading.Event) -> Generator[Arrival | RejectedFrame, None, None]:
        del stop  # a step is one image: there is nothing to interrupt
        photos = PhotoReader(
            self._root,
            label=self.info.label,
            config=self._config,
            next_frame_id=self._next_frame_id,
            single_camera_per_size=self._single_camera_per_size,
        )
        for index in range(0, len(self._files), self._config.every_nth_frame):
            yield photos.read(self._files[index], index=index, frame_name=self._frame_names[index])


def _find_images(path: Path) -> tuple[Path, Sequence[PurePosixPath]]:
    """The folder that holds the images, and their paths in it, in natural order."""
    try:
        if path.is_dir():
            files = _images_in(path) or _images_in_subfolders(path)
            if not files:
                raise SourceError(f"{path}: no image in this folder ({_suffixes()})")
            return path, sorted(files, key=natural_key)
        if not path.exists():
            raise SourceError(f"{path}: no such file or folder")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise SourceError(f"{path}: neither a folder nor an image ({_suffixes()})")
    return path.parent, [PurePosixPath(path.name)]


def _images_in(folder: Path) -> list[PurePosixPath]:
    return [
        PurePosixPath(entry.name)
        for entry in folder.iterdir()
        if not entry.name.startswith(".")
        and entry.suffix.lower() in IMAGE_SUFFIXES
        and (entry.is_file() or entry.is_symlink())  # a broken link is counted as unreadable
    ]


def _images_in_subfolders(folder: Path) -> list[PurePosixPath]:
    return [
        PurePosixPath(entry.name) / file
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.is_dir()
        for file in _images_in(entry)
    ]


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _frame_names(files: Sequence[PurePosixPath]) -> dict[int, str]:
    """A unique relative name for each file's keyframe image, by index; JPEG files choose first."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    jpegs_first = sorted(range(len(files)), key=lambda index: not is_jpeg(files[index]))
    for index in jpegs_first:
        names[index] = next(
            name for name in possible_frame_names(files[index]) if name not in taken
        )
        taken.add(names[index])
    return names
