"""A folder of photos, or one photo, as a source."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from pathlib import Path, PurePosixPath

from adapters.sources.blocking import iterate_in_thread
from adapters.sources.exif import intrinsics_prior
from adapters.sources.image_bytes import DecodedImage, RefusedImage, decode_image
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.ports import FrameIds
from engine.types import DropReason, Frame, RejectedFrame

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"})
_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})


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
            next_frame_id: gives out frame ids; called on this source's thread.
            single_camera_per_size: images of one subfolder, camera model, focal length and size
                share a camera; False: each image has its own.

        Raises:
            SourceError: the path is missing, cannot be read, or holds no image file.
        """
        self._label = str(path)
        self._config = config
        self._next_frame_id = next_frame_id
        self._single_camera_per_size = single_camera_per_size
        self._root, self._files = _find_images(path)
        self._frame_names = _frame_names(self._files)

    @property
    def label(self) -> str:
        """The path as the user gave it."""
        return self._label

    @property
    def is_live(self) -> bool:
        """False: files wait."""
        return False

    @property
    def is_sequence(self) -> bool:
        """False: photos may be taken from anywhere."""
        return False

    @property
    def num_frames(self) -> int:
        """How many files will be taken; some may turn out unreadable."""
        num_taken = len(range(0, len(self._files), self._config.every_nth_frame))
        return min(num_taken, self._config.max_frames or num_taken)

    def frames(self) -> AsyncGenerator[Frame | RejectedFrame, None]:
        """Yields the photos in order; reads and decodes one at a time, on a thread of its own."""
        return iterate_in_thread(self._read, name=f"images {self._root.name}")

    def _read(self, stop: threading.Event) -> Generator[Frame | RejectedFrame, None, None]:
        del stop  # a step is one image: there is nothing to interrupt
        previous = b""
        num_readable = 0
        for index in range(0, len(self._files), self._config.every_nth_frame):
            data, image = self._load(index, previous=previous)
            if isinstance(image, RefusedImage):
                yield self._rejected(index, image)
                continue
            previous = data
            yield self._frame(index, image)
            num_readable += 1
            if num_readable == self._config.max_frames:
                return

    def _load(self, index: int, *, previous: bytes) -> tuple[bytes, DecodedImage | RefusedImage]:
        """The bytes of a file and what they hold; ``previous`` are those of the image before."""
        try:
            data = (self._root / self._files[index]).read_bytes()
        except OSError as error:
            detail = error.strerror or str(error)
            return b"", RefusedImage(reason=DropReason.UNREADABLE, detail=detail)
        if data and data == previous:
            detail = "the same bytes as the image before"
            return data, RefusedImage(reason=DropReason.DUPLICATE, detail=detail)
        return data, decode_image(data, config=self._config)

    def _frame(self, index: int, image: DecodedImage) -> Frame:
        height, width = image.pixels.shape[:2]
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=self._camera_key(index, image),
            source=self._label,
            index=index,
            name=self._frame_names[index],
            captured_at_s=float(index),
            received_at_s=time.monotonic(),
            pixels=image.pixels,
            jpeg=image.jpeg,
            gps=image.exif.gps,
            intrinsics_prior=intrinsics_prior(image.exif, width=width, height=height),
        )

    def _rejected(self, index: int, image: RefusedImage) -> RejectedFrame:
        return RejectedFrame(
            source=self._label,
            index=index,
            name=str(_printable(self._files[index])),
            captured_at_s=float(index),
            reason=image.reason,
            detail=image.detail,
        )

    def _camera_key(self, index: int, image: DecodedImage) -> str:
        if not self._single_camera_per_size:
            return self._frame_names[index]
        height, width = image.pixels.shape[:2]
        exif = image.exif
        subfolder = "/".join(_printable(self._files[index]).parts[:-1])
        camera = f"{exif.make} {exif.model}".strip()
        focal = f"{exif.focal_length_mm:g}mm" if exif.focal_length_mm else ""
        return "|".join(part for part in (subfolder, camera, focal, f"{width}x{height}") if part)


def _find_images(path: Path) -> tuple[Path, Sequence[PurePosixPath]]:
    """The folder that holds the images, and their paths in it, in natural order."""
    try:
        if path.is_dir():
            files = _images_in(path) or _images_in_subfolders(path)
            if not files:
                raise SourceError(f"{path}: no image in this folder ({_suffixes()})")
            return path, sorted(files, key=_natural_key)
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


def _natural_key(file: PurePosixPath) -> tuple[tuple[tuple[str | int, ...], ...], str]:
    """Orders img2 before img10; text and numbers alternate, so like is compared with like."""
    parts = (re.split("([0-9]+)", part.casefold()) for part in file.parts)
    keys = tuple(
        tuple(int(piece) if place % 2 else piece for place, piece in enumerate(part))
        for part in parts
    )
    return keys, str(file)


def _frame_names(files: Sequence[PurePosixPath]) -> dict[int, str]:
    """A unique relative name for each file's keyframe image, by index.

    Keyframe images are JPEG files: a JPEG keeps its name, any other image changes its extension,
    and gets another one behind it where that name belongs to a JPEG (a.png, a.jpg -> a.png.jpg).
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    jpegs_first = sorted(range(len(files)), key=lambda index: not _is_jpeg(files[index]))
    for index in jpegs_first:
        names[index] = next(name for name in _possible_names(files[index]) if name not in taken)
        taken.add(names[index])
    return names


def _possible_names(file: PurePosixPath) -> Iterator[str]:
    name = _printable(file)
    yield str(name if _is_jpeg(file) else name.with_suffix(".jpg"))
    yield f"{name}.jpg"
    yield from (f"{name}.{number}.jpg" for number in itertools.count(2))


def _is_jpeg(file: PurePosixPath) -> bool:
    return file.suffix.lower() in _JPEG_SUFFIXES


def _printable(file: PurePosixPath) -> PurePosixPath:
    """The path with what no text file or other system can carry replaced by an underscore."""
    chars = (char if char.isprintable() and char != "\\" else "_" for char in str(file))
    return PurePosixPath("".join(chars))
