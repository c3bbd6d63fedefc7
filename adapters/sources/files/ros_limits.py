"""How much memory and disk a ROS recording may take when it is unpacked, by what it declares."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import SourceError
from engine.plain_yaml import load_plain_yaml
from engine.regular_files import read_regular_file

if TYPE_CHECKING:
    from rosbags.highlevel import AnyReader

_MAX_UNPACKED_BYTES = 4 * 2**30  # of files that are compressed as a whole
_MAX_CHUNK_BYTES = 2**30  # recorders make chunks of a few MB
_MAX_METADATA_BYTES = 64 * 2**20
_PART_BYTES = 2**20
_MAX_FRAME_HEADER_BYTES = 18  # of zstd (RFC 8878, section 3.1.1)


def refuse_large_files(folder: Path, *, metadata: str) -> None:
    """Refuses a folder whose files rosbags would unpack to more than there is room for.

    rosbags unpacks files that are compressed as a whole below the folder for temporary files.

    Args:
        folder: of the recording.
        metadata: the name of the file in it that says how it is compressed.

    Raises:
        SourceError: unpacked, the files are larger than 4 GiB or half of what is free there.
        OSError: a file cannot be read.
        ValueError: the metadata are broken; further errors of what rosbags reads, too.
    """
    text = read_regular_file(folder / metadata, max_bytes=_MAX_METADATA_BYTES).decode()
    if "compression_mode" not in text:
        return
    about = load_plain_yaml(text)["rosbag2_bagfile_information"]
    if str(about.get("compression_mode")).lower() != "file":
        return
    below = tempfile.gettempdir()
    limit = left = min(_MAX_UNPACKED_BYTES, shutil.disk_usage(below).free // 2)
    for one in about["relative_file_paths"]:
        left -= _unpacked_bytes(folder / Path(one).name, at_most=left)
        if left < 0:
            raise SourceError(
                f"{folder}: its files are compressed as a whole, and larger than"
                f" {limit / 1e9:.3g} GB when they are unpacked below {below}; unpack them first:"
                " ros2 bag convert"
            )


def refuse_large_chunks(reader: AnyReader, *, path: Path, max_image_bytes: int) -> None:
    """Refuses an opened recording that declares a chunk too large to unpack in memory.

    Raises:
        SourceError: a chunk is larger than 1 GiB and than the largest image.
    """
    limit = max(_MAX_CHUNK_BYTES, max_image_bytes)
    largest = max(_chunk_sizes(reader), default=0)
    if largest > limit:
        raise SourceError(
            f"{path}: has a chunk of {largest / 1e9:.3g} GB; {limit / 1e9:.3g} GB are the most"
        )


def _unpacked_bytes(path: Path, *, at_most: int) -> int:
    """The size of a zstd file when it is unpacked, as it says or, up to a limit, counted."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    with path.open("rb") as file:
        start = file.read(_MAX_FRAME_HEADER_BYTES)
    declared = zstd.get_frame_info(start).decompressed_size
    if declared is not None and declared > at_most:
        return declared
    num_bytes = 0  # counted in any case: a file may hold more frames than the first
    with zstd.open(path, "rb") as unpacked:
        while num_bytes <= at_most and (part := unpacked.read(_PART_BYTES)):
            num_bytes += len(part)
    return num_bytes


def _chunk_sizes(reader: AnyReader) -> Iterator[int]:
    """Bytes of all chunks unpacked, as they are declared."""
    for one in reader.readers:
        if hasattr(one, "chunk_infos"):
            yield from _chunk_sizes_of_ros1(one)
            continue
        storage: Any = getattr(one, "storage", one)
        for part in getattr(storage, "storages", [storage]):
            for chunk in getattr(part, "chunks", ()):
                yield chunk.uncompressed_size


def _chunk_sizes_of_ros1(bag: Any) -> Iterator[int]:
    from rosbags.rosbag1.reader import Header

    with bag.path.open("rb") as file:
        for chunk in bag.chunk_infos:
            file.seek(chunk.pos)
            yield Header.read(file).get_uint32("size")
