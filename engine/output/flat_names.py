"""Flat names: one file name without folders for each image, as trainers need them.

Trainers take the last part of a name, cut it at its first dot, read it byte by byte (3DGS and its
reader of ``images.bin``) or split lines at spaces (``images.txt``). So a name here is ASCII without
spaces, has one dot, and its stem is unique whatever the case of letters.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

IMAGE_NAMES = "image_names.csv"  # which frame each image of a training set is

_OTHER = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_STEM_CHARS = 100  # file systems have 255 for all of a name
_PNG = ".png"


class FlatNames:
    """Gives each image a flat name, and always the same one.

    Args:
        given: names that were given before, by key.
        taken: stems that must not be given, such as those of files that are there.
    """

    def __init__(self, given: Mapping[str, str] | None = None, taken: Iterable[str] = ()) -> None:
        self._given = dict(given or {})
        stems = {PurePosixPath(name).stem for name in self._given.values()}
        self._taken = {stem.casefold() for stem in (*stems, *taken)}

    @property
    def given(self) -> Mapping[str, str]:
        """All names, by key, in the order in which they were given."""
        return self._given

    def of(self, name: str, *, key: str | None = None) -> str:
        """The flat name of an image: ``sub/dir/IMG 1.JPG`` becomes ``sub-dir-IMG_1.jpg``.

        Args:
            name: of the image.
            key: of the file, where an image has several; None: the name.
        """
        key = name if key is None else key
        if key not in self._given:
            path = PurePosixPath(name)
            suffix = _PNG if path.suffix.lower() == _PNG else ".jpg"
            self._given[key] = self._unique("-".join(path.with_suffix("").parts)) + suffix
        return self._given[key]

    def _unique(self, wanted: str) -> str:
        plain = unicodedata.normalize("NFKD", wanted).encode("ascii", "ignore").decode()
        stem = _OTHER.sub("_", plain)[-_MAX_STEM_CHARS:].strip("_-") or "image"
        unique, number = stem, 1
        while unique.casefold() in self._taken:
            number += 1
            unique = f"{stem}-{number}"
        self._taken.add(unique.casefold())
        return unique


def table_of(header: Iterable[str], rows: Iterable[Iterable[object]]) -> bytes:
    """A CSV table as a file has it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")
