"""The hemispheres of photos whose EXIF does not name them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from adapters.images.decoding import read_image_header
from adapters.images.drone_tags import with_drone_tags
from adapters.images.exif import Exif, read_exif
from adapters.images.heif import is_heif
from engine.config import SourcesConfig
from engine.events import ALSO_AN_EVENT
from engine.regular_files import read_regular_file, read_regular_head
from engine.types import GpsFix

logger = logging.getLogger(__name__)

_MAX_LOOKED_AT = 200  # other photos
_HEAD_BYTES = 1 << 20  # of a photo: JPEG has its tags at the start, and so do most TIFF files


class Hemispheres:
    """Gives positions without letters the signs of the other photos of their source.

    Or those that the configuration names. One thread reads the photos, any may ask for positions of
    those that were read.
    """

    def __init__(
        self, root: Path, files: Sequence[PurePosixPath], *, label: str, config: SourcesConfig
    ) -> None:
        """Looks at nothing yet.

        Args:
            root: the folder of the photos.
            files: the photos, by their paths in it.
            label: the source as the user named it.
            config: hemispheres, where they are known, and limits on what is read.
        """
        self._root = root
        self._files = files
        self._label = label
        self._config = config
        self._signs = _signs_of(config.hemispheres)
        self._is_answered = self._signs is not None
        self._words = ""

    def read(self, data: bytes) -> None:
        """Looks at the other photos, once, if a photo needs it; before its position is asked for.

        Args:
            data: the file of the photo.
        """
        if self._is_answered:
            return
        is_jpeg = data.startswith(b"\xff\xd8")
        exif = _exif_of(data[:_HEAD_BYTES] if is_jpeg else data)
        if exif is not None and exif.gps is None and exif.unsigned_gps is not None:
            self._signs = self._look()
            self._is_answered = True

    def new_words(self) -> str:
        """From which photo the hemispheres are, once; empty: nothing new."""
        words, self._words = self._words, ""
        return words

    def position_of(self, exif: Exif) -> tuple[GpsFix | None, str]:
        """The position of a photo, and why there is none although its tags speak of one."""
        unsigned = exif.unsigned_gps
        if exif.gps is not None or unsigned is None:
            return exif.gps, exif.position_problem
        if self._signs is None:
            return None, f"{exif.position_problem}; sources.hemispheres=NE, NW, SE or SW says them"
        north, east = self._signs
        latitude_deg, longitude_deg = unsigned.latitude_deg, unsigned.longitude_deg
        if not set(exif.hemispheres) & {"N", "S"}:
            latitude_deg *= north
        if not set(exif.hemispheres) & {"E", "W"}:
            longitude_deg *= east
        return replace(unsigned, latitude_deg=latitude_deg, longitude_deg=longitude_deg), ""

    def _look(self) -> tuple[int, int] | None:
        for file in self._files[:_MAX_LOOKED_AT]:
            fix = self._signed_fix_in(self._root / file)
            if fix is None:
                continue
            signs = (-1 if fix.latitude_deg < 0.0 else 1, -1 if fix.longitude_deg < 0.0 else 1)
            letters = ("S" if signs[0] < 0 else "N", "W" if signs[1] < 0 else "E")
            self._words = (
                f"positions without letters are taken for {' and '.join(letters)}, as that of"
                f" {file} is"
            )
            logger.warning("%s: %s", self._label, self._words, extra=ALSO_AN_EVENT)
            return signs
        return None

    def _signed_fix_in(self, path: Path) -> GpsFix | None:
        """The position of a photo by the head of its file, as far as that has it."""
        try:
            data = read_regular_head(path, num_bytes=_HEAD_BYTES)
            if is_heif(data):  # its tags lie anywhere
                data = read_regular_file(path, max_bytes=self._config.max_image_bytes)
        except OSError:
            return None
        exif = _exif_of(data)
        return None if exif is None else exif.gps


def _signs_of(hemispheres: str) -> tuple[int, int] | None:
    if not hemispheres:
        return None
    return 1 if hemispheres[0] == "N" else -1, 1 if hemispheres[1] == "E" else -1


def _exif_of(data: bytes) -> Exif | None:
    header = read_image_header(data)
    return None if header is None else with_drone_tags(read_exif(header.exif_block), header.xmp)
