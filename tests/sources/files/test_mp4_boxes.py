"""MP4 and MOV files without their index."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters.sources.files.mp4_boxes import lacks_index
from adapters.sources.files.video_file import VideoFile
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.types import FrameId
from tests.support.small_videos import write_video

FTYP = b"\0\0\0\x14ftypqt  \0\0\0\0qt  "
CUT = b"\0\x10\0\0mdat" + bytes(500)  # of which the most is missing
LARGE = b"\0\0\0\x01mdat" + (616).to_bytes(8) + bytes(600)
TO_THE_END = b"\0\0\0\0mdat" + bytes(500)
MOOV = b"\0\0\0\x08moov"


@pytest.mark.parametrize(
    ("data", "is_without"),
    [
        (FTYP + CUT, True),
        (FTYP + LARGE, True),
        (FTYP + TO_THE_END, True),
        (CUT, True),
        (FTYP + LARGE + MOOV, False),
        (FTYP + MOOV + CUT, False),
        (FTYP, False),
        (b"no video at all, nor anything near", False),
        (b"", False),
    ],
)
def test_an_index_is_missed_only_where_pictures_are(
    data: bytes, is_without: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.mov"
    path.write_bytes(data)
    assert lacks_index(path) is is_without


def without_index(data: bytes) -> bytes:
    """An MP4 file without its boxes of this type, wherever they are."""
    kept, place = b"", 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4])
        assert size >= 8
        box = data[place : place + size]
        kept += b"" if box[4:8] == b"moov" else box
        place += size
    assert len(kept) < len(data)
    return kept


def test_a_video_that_was_cut_off_is_refused_with_what_is_missing_and_what_to_do(
    tmp_path: Path,
) -> None:
    path = write_video(tmp_path / "a.mp4", 9)
    path.write_bytes(without_index(path.read_bytes()))
    with pytest.raises(SourceError, match=r"no index \(moov\): .* copy it again, or let a tool"):
        VideoFile(path, config=SourcesConfig(), next_frame_id=lambda: FrameId(1))


def test_a_file_that_is_gone_lacks_nothing(tmp_path: Path) -> None:
    assert not lacks_index(tmp_path / "none.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")  # is not waited for
    assert not lacks_index(tmp_path / "pipe.mp4")
