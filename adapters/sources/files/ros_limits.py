"""How much memory and disk a ROS recording may take when it is unpacked, by what it declares."""

from __future__ import annotations

import bz2
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


def bound_unindexed_chunks() -> None:
    """Has rosbags unpack chunks of MCAP files up to the size that they declare, at most 1 GiB.

    Its own functions unpack whatever is there before they compare sizes. Theirs are in a table.
    """
    from rosbags.rosbag2.storage_mcap import DECOMPRESSORS

    DECOMPRESSORS.update(lz4=_unpacked_lz4, zstd=_unpacked_zstd)


def refuse_large_chunks(reader: AnyReader, *, path: Path, max_image_bytes: int) -> None:
    """Refuses an opened recording whose chunks are too large to unpack in memory.

    Chunks that turn out to be larger than they declare break off when they are read.

    Raises:
        SourceError: a chunk is larger than 1 GiB and than the largest image, or than its file.
    """
    limit = max(_MAX_CHUNK_BYTES, max_image_bytes)
    for chunk in _chunks(reader):
        if chunk.size > limit:
            raise SourceError(
                f"{path}: has a chunk of {chunk.size / 1e9:.3g} GB; {limit / 1e9:.3g} GB are the"
                " most"
            )
        if chunk.packed_size > chunk.file_size:
            raise SourceError(f"{path}: is broken: it has a chunk that is larger than its file")


def message_unpacker(reader: AnyReader, *, at_most: int) -> Callable[[bytes], bytes]:
    """What makes messages of those that an opened recording gives from now on.

    Messages that are compressed one by one are given as they are, and unpacked here up to a size;
    of those that are larger one byte more is unpacked.
    """
    folders = [getattr(one, "storage", None) for one in reader.readers]
    packed = [
        folder
        for folder in folders
        if folder is not None and folder.metadata.compression_mode == "message"
    ]
    for folder in packed:
        folder.metadata = folder.metadata._replace(compression_mode=None)
    return functools.partial(_zstd_beginning, num_bytes=at_most + 1) if packed else bytes


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """What a chunk declares, in bytes."""

    size: int  # unpacked
    packed_size: int
    file_size: int


def _chunks(reader: AnyReader) -> Iterator[_Chunk]:
    """All chunks with an index; those of ROS 1 unpack no more from now on than they declare."""
    for one in reader.readers:
        if hasattr(one, "chunk_infos"):
            yield from _chunks_of_ros1(one)
            continue
        storage: Any = getattr(one, "storage", one)
        for part in getattr(storage, "storages", [storage]):
            file_size = os.stat(part.path).st_size
            for chunk in getattr(part, "chunks", ()):
                yield _Chunk(
                    size=chunk.uncompressed_size,
                    packed_size=chunk.chunk_start_offset + chunk.compressed_size,
                    file_size=file_size,
                )


def _chunks_of_ros1(bag: Any) -> Iterator[_Chunk]:
    from rosbags.rosbag1.reader import Header

    unpack = {"bz2": _unpacked_bz2, "lz4": _unpacked_lz4}
    file_size = os.stat(bag.path).st_size
    with bag.path.open("rb") as file:
        for info in bag.chunk_infos:
            file.seek(info.pos)
            header = Header.read(file)
            size, packing = header.get_uint32("size"), header.get_string("compression")
            chunk = bag.chunks[info.pos]
            if packing in unpack:
                bounded = functools.partial(unpack[packing], size=size)
                bag.chunks[info.pos] = chunk._replace(decompressor=bounded)
            yield _Chunk(size=size, packed_size=chunk.datapos + chunk.datasize, file_size=file_size)


def _unpacked_lz4(data: bytes, size: int) -> bytes:
    """A frame of so many bytes.

    Raises:
        ValueError: it holds more, or more than 1 GiB; further errors where it is broken.
    """
    from lz4.frame import LZ4FrameDecompressor  # type: ignore[import-untyped]

    return _of_size(LZ4FrameDecompressor().decompress(data, _bounded(size) + 1), size)


def _unpacked_bz2(data: bytes, size: int) -> bytes:
    """The same for bzip2."""
    return _of_size(bz2.BZ2Decompressor().decompress(data, _bounded(size) + 1), size)


def _unpacked_zstd(data: bytes, size: int) -> bytes:
    """The same for Zstandard, of several frames."""
    return _of_size(_zstd_beginning(data, num_bytes=_bounded(size) + 1), size)


def _zstd_beginning(data: bytes, *, num_bytes: int) -> bytes:
    """What is unpacked of frames, up to so many bytes."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    parts: list[bytes] = []
    while data and num_bytes > 0:
        decompressor = zstd.ZstdDecompressor()
        parts.append(decompressor.decompress(data, num_bytes))
        num_bytes -= len(parts[-1])
        data = decompressor.unused_data
    return b"".join(parts)


def _bounded(size: int) -> int:
    if size > _MAX_CHUNK_BYTES:
        raise ValueError(
            f"a chunk of {size / 1e9:.3g} GB; {_MAX_CHUNK_BYTES / 1e9:.3g} GB are the most"
        )
    return size


def _of_size(unpacked: bytes, size: int) -> bytes:
    if len(unpacked) > size:
        raise ValueError(f"a chunk is larger than the {size} bytes that it declares")
    return unpacked
