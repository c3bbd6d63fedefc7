"""The hemispheres of photos whose EXIF does not name them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from adapters.images.decoding import read_image_header
from adapters.images.drone_tags import with_drone_tags
from adapters.images.exif import Exif, read_exif
from engine.config import SourcesConfig
from engine.regular_files import read_regular_file
from engine.types import GpsFix

logger = logging.getLogger(__name__)

_MAX_LOOKED_AT = 200  # other photos


class Hemispheres:
    """Gives positions without letters the signs of the other photos of their source.

    Or those that the configuration names. One thread uses it.
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
        self._signs: tuple[int, int] | None = None  # of latitude and longitude
        self._was_asked = False

    def position_of(self, exif: Exif) -> tuple[GpsFix | None, str]:
        """The position of a photo, and why there is none although its tags speak of one."""
        unsigned = exif.unsigned_gps
        if exif.gps is not None or unsigned is None:
            return exif.gps, exif.position_problem
        if not self._was_asked:
            self._was_asked = True
            self._signs = self._look()
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
        configured = self._config.hemispheres
        if configured:
            return 1 if configured[0] == "N" else -1, 1 if configured[1] == "E" else -1
        for file in self._files[:_MAX_LOOKED_AT]:
            fix = self._signed_fix_in(self._root / file)
            if fix is None:
                continue
            signs = (-1 if fix.latitude_deg < 0.0 else 1, -1 if fix.longitude_deg < 0.0 else 1)
            letters = ("S" if signs[0] < 0 else "N") + ("W" if signs[1] < 0 else "E")
            logger.warning(
                "%s: positions without letters are taken for %s, as that of %s is",
                self._label,
                " and ".join(letters),
                file,
            )
            return signs
        return None

    def _signed_fix_in(self, path: Path) -> GpsFix | None:
        try:
            data = read_regular_file(path, max_bytes=self._config.max_image_bytes)
        except OSError:
            return None
        header = read_image_header(data)
        if header is None:
            return None
        return with_drone_tags(read_exif(header.exif_block), header.xmp).gps
