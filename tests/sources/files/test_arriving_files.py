"""Which files of a folder are written and which are not."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from adapters.sources.files.arriving_files import ArrivingFile, ArrivingFiles

SETTLE_S = 0.5


def encoded(suffix: str, shade: int = 100) -> bytes:
    data: bytes = cv2.imencode(suffix, np.full((80, 96, 3), shade, np.uint8))[1].tobytes()
    return data


def looking_at(folder: Path) -> ArrivingFiles:
    return ArrivingFiles(folder, settle_s=SETTLE_S)


def names(arrived: list[ArrivingFile]) -> list[str]:
    return [file.name for file in arrived]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png"])
def test_a_file_that_ends_as_a_whole_image_is_there_at_once(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(encoded(suffix.lower()))
    (file,) = looking_at(tmp_path).scan(now_s=10.0)
    assert file == ArrivingFile(name=f"a{suffix}", is_settled=False)


@pytest.mark.parametrize("suffix", [".tif", ".bmp", ".webp"])
def test_a_file_without_an_end_marker_is_there_when_it_has_settled(
    tmp_path: Path, suffix: str
) -> None:
    (tmp_path / f"a{suffix}").write_bytes(encoded(suffix))
    files = looking_at(tmp_path)
    assert files.scan(now_s=10.0) == []
    assert files.num_unfinished == 1
    assert files.settles_in_s(now_s=10.2) == pytest.approx(0.3)
    assert files.scan(now_s=10.4) == []
    assert files.scan(now_s=10.5) == [ArrivingFile(name=f"a{suffix}", is_settled=True)]


def test_a_file_that_grows_or_is_touched_has_not_settled(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    files = looking_at(tmp_path)
    path.write_bytes(encoded(".jpg")[:300])
    assert files.scan(now_s=0.0) == []
    path.write_bytes(encoded(".jpg")[:400])
    assert files.scan(now_s=0.4) == []
    os.utime(path, ns=(1, 1))
    assert files.scan(now_s=0.8) == []
    assert files.scan(now_s=1.2) == []
    path.write_bytes(encoded(".jpg"))
    assert names(files.scan(now_s=1.25)) == ["a.jpg"]


def test_the_time_of_a_file_itself_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    path.write_bytes(encoded(".bmp"))
    os.utime(path, (0, 0))
    assert looking_at(tmp_path).scan(now_s=1e9) == []


def test_an_empty_file_is_waited_for_longer(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    files = looking_at(tmp_path)
    assert files.scan(now_s=0.0) == []
    assert files.scan(now_s=4.9) == []
    assert names(files.scan(now_s=5.0)) == ["a.jpg"]


def test_a_file_is_given_out_until_it_is_taken_and_never_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(".jpg"))
    files = looking_at(tmp_path)
    (file,) = files.scan(now_s=0.0)
    assert files.scan(now_s=0.0) == [file]
    files.take(file)
    assert files.scan(now_s=0.1) == []
    path.write_bytes(encoded(".jpg", 200))
    assert files.scan(now_s=9.0) == []
    path.unlink()
    assert files.scan(now_s=10.0) == []
    path.write_bytes(encoded(".jpg", 200))
    assert files.scan(now_s=20.0) == []
    assert files.num_unfinished == 0


def test_a_file_that_was_no_whole_image_comes_again_when_it_has_changed_or_settled(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8 a thumbnail ends here: \xff\xd9")
    files = looking_at(tmp_path)
    (file,) = files.scan(now_s=0.0)
    files.wait_for(file)
    assert files.scan(now_s=0.1) == []
    assert files.scan(now_s=0.5) == [ArrivingFile(name="a.jpg", is_settled=True)]
    path.write_bytes(encoded(".jpg"))
    assert files.scan(now_s=0.6) == [ArrivingFile(name="a.jpg", is_settled=False)]


def test_files_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("img10.jpg", "img9.jpg", "IMG1.jpg"):
        (tmp_path / name).write_bytes(encoded(".jpg"))
    assert names(looking_at(tmp_path).scan(now_s=0.0)) == ["IMG1.jpg", "img9.jpg", "img10.jpg"]


def test_hidden_and_temporary_files_folders_and_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in (".a.jpg", "~a.jpg", "a.jpg.part", "a.jpg~", "a.tmp", "a.txt", "a"):
        (tmp_path / name).write_bytes(encoded(".jpg"))
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "b.jpg").write_bytes(encoded(".jpg"))
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    files = looking_at(tmp_path)
    assert files.scan(now_s=0.0) == files.scan(now_s=60.0) == []
    assert files.num_unfinished == 0


def test_a_link_to_an_image_counts_as_the_image(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").write_bytes(encoded(".jpg"))
    (tmp_path / "a.jpg").symlink_to(tmp_path / "store" / "x")
    assert names(looking_at(tmp_path).scan(now_s=0.0)) == ["a.jpg"]


def test_a_folder_that_is_gone_is_an_error_and_another_in_its_place_has_another_identity(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    files = looking_at(folder)
    files.scan(now_s=0.0)
    before = files.folder_identity
    folder.rename(tmp_path / "away")
    with pytest.raises(OSError, match="No such file"):
        files.scan(now_s=0.0)
    folder.mkdir()
    files.scan(now_s=0.0)
    assert files.folder_identity != before
