from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from engine.output.files import link_or_copy


def refusing(number: int) -> object:
    def refused(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    return refused


def test_a_second_place_of_a_file_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    link_or_copy(tmp_path / "file", tmp_path / "second")
    assert (tmp_path / "second").samefile(tmp_path / "file")


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EACCES]
)
def test_a_file_is_copied_where_the_system_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "file").write_bytes(b"data")
    os.utime(tmp_path / "file", (5.0, 5.0))
    monkeypatch.setattr(os, "link", refusing(number))
    link_or_copy(tmp_path / "file", tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == b"data"
    assert (tmp_path / "second").stat().st_mtime == 5.0
    assert not (tmp_path / "second").samefile(tmp_path / "file")


def test_no_file_is_replaced_and_no_full_disk_is_filled_with_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "second").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        link_or_copy(tmp_path / "file", tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == b"mine"
    monkeypatch.setattr(os, "link", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        link_or_copy(tmp_path / "file", tmp_path / "third")
    assert not (tmp_path / "third").exists()
