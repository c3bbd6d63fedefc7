"""Photos that are named one by one, as a shell names those of a folder: one source of photos."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from engine.errors import SourceError

_SCHEME = "photos:"  # before the list, as one address


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoList:
    """Files of one folder and its subfolders, in the order in which they are taken."""

    folder: Path  # as the user named it
    files: tuple[PurePosixPath, ...]  # in the folder; no one twice
    num_repeated: int = 0  # files that were named once more

    @property
    def address(self) -> str:
        """What opens it as a source."""
        files = [str(file) for file in self.files]
        content = {"folder": str(self.folder), "files": files, "repeated": self.num_repeated}
        return _SCHEME + json.dumps(content, separators=(",", ":"))

    @property
    def paths(self) -> list[Path]:
        """Of its files."""
        return [self.folder / file for file in self.files]

    def resolved(self) -> PhotoList:
        """The same files, wherever the program is started."""
        return replace(self, folder=Path(os.path.realpath(self.folder)), num_repeated=0)


def photo_list_of(address: str) -> PhotoList | None:
    """The list that an address is of; None: it is another address.

    Raises:
        SourceError: it begins as that of a list does and is none.
    """
    if not address.startswith(_SCHEME) or os.path.exists(address):
        return None
    try:
        content = json.loads(address.removeprefix(_SCHEME))
        files = tuple(PurePosixPath(file) for file in content["files"])
        folder, num_repeated = Path(content["folder"]), int(content["repeated"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{_SCHEME} is no list of photos; name the photos themselves") from error
    return PhotoList(folder=folder, files=files, num_repeated=num_repeated)
