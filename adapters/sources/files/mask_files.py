"""Mask files of photos: which belong to which, by COLMAP's names and others in use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from adapters.images.decoding import DecodedImage, RefusedImage
from adapters.images.masks import MASK_SUFFIXES, decode_mask, fit_mask
from engine.config import SourcesConfig
from engine.regular_files import read_regular_file
from engine.types import BoolArray, DropReason

MASKS_FOLDER = "masks"


class MaskFiles:
    """The masks of a folder's photos, from the folder ``masks`` inside it or beside it.

    The mask of ``left/a.jpg`` is ``masks/left/a.jpg.png``, as COLMAP has it, or else
    ``masks/left/a.png`` or another image of the photo's name there.
    """

    def __init__(self, photos_folder: Path, photos: Sequence[PurePosixPath]) -> None:
        """Lists the masks; reads none of them.

        Args:
            photos_folder: the folder of the photos.
            photos: their paths in it.

        Raises:
            OSError: a folder cannot be read.
        """
        self.folder = photos_folder / MASKS_FOLDER  # the first with a mask of any photo
        self._file_of: dict[PurePosixPath, PurePosixPath] = {}
        self._unused: list[PurePosixPath] = []
        beside = Path(os.path.abspath(photos_folder)).parent / MASKS_FOLDER
        for folder in (photos_folder / MASKS_FOLDER, beside):
            if folder.is_dir() and not folder.samefile(photos_folder) and not self._file_of:
                self._assign(folder, photos)

    def __len__(self) -> int:
        return len(self._file_of)

    def words(self, *, num_photos: int) -> str:
        """What was found, in a line; empty without masks."""
        if not self._file_of and not self._unused:
            return ""
        without = num_photos - len(self._file_of)
        words = [f"{len(self._file_of)} of {num_photos} photos have a mask in {self.folder}"]
        if without:
            words.append("the others are used whole")
        if self._unused:
            words.append(
                f"{len(self._unused)} masks belong to no photo, the first {self._unused[0]}"
            )
        return "; ".join(words)

    def mask_of(
        self, photo: PurePosixPath, image: DecodedImage, *, config: SourcesConfig
    ) -> BoolArray | None | RefusedImage:
        """The mask (H, W) of a decoded photo; None where it has none.

        A photo whose mask cannot be read or is not of its size is refused, as COLMAP does: what
        the mask was to keep out of the map must not come in silently.
        """
        file = self._file_of.get(photo)
        if file is None:
            return None
        try:
            data = read_regular_file(self.folder / file, max_bytes=config.max_image_bytes)
        except OSError as error:
            return _refused(file, f"cannot be read: {error.strerror or error}")
        mask = decode_mask(data, config=config)
        if isinstance(mask, str):
            return _refused(file, mask)
        height, width = image.pixels.shape[:2]
        fitted = fit_mask(mask, size=(width, height), orientation=image.exif.orientation)
        return _refused(file, fitted) if isinstance(fitted, str) else fitted

    def _assign(self, folder: Path, photos: Sequence[PurePosixPath]) -> None:
        """Finds the masks of photos in a folder."""
        files = _images_below(folder, photos)
        if not files:
            return
        self.folder = folder
        for photo in photos:
            named = (file for file in _possible_masks(photo) if file in files)
            if (file := next(named, None)) is not None:
                self._file_of[photo] = file
        self._unused = sorted(files - set(self._file_of.values()))


def _images_below(folder: Path, photos: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """The image files of a folder, and of its subfolders that photos lie in, too."""
    subfolders = {PurePosixPath(), *(photo.parent for photo in photos)}
    return {
        subfolder / entry.name
        for subfolder in subfolders
        if (folder / subfolder).is_dir()
        for entry in (folder / subfolder).iterdir()
        if not entry.name.startswith(".") and entry.suffix.lower() in MASK_SUFFIXES
    }


def _possible_masks(photo: PurePosixPath) -> Iterator[PurePosixPath]:
    """Names of a photo's mask, best first."""
    for suffix in _suffixes():
        yield photo.with_name(photo.name + suffix)  # a.jpg.png
    for suffix in _suffixes():
        yield photo.with_suffix(suffix)  # a.png, a.jpg
    for suffix in _suffixes():
        for ending in ("_mask", ".mask"):
            yield photo.with_name(f"{photo.stem}{ending}{suffix}")


def _suffixes() -> Iterator[str]:
    yield from MASK_SUFFIXES
    yield from (suffix.upper() for suffix in MASK_SUFFIXES)


def _refused(file: PurePosixPath, why: str) -> RefusedImage:
    return RefusedImage(reason=DropReason.BAD_MASK, detail=f"its mask {file} {why}")
