"""Which files of a folder are its photos, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.sources.files import photo_search
from adapters.sources.files.photo_search import FoundImages, find_images
from engine.errors import SourceError


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def names_of(found: FoundImages) -> list[str]:
    return [str(file) for file in found.files]


def counts_of(found: FoundImages) -> dict[tuple[str, str], int]:
    return {(one.kind, one.reason): one.num_files for one in found.left_out}


def test_photos_of_a_card_are_found_from_its_root(tmp_path: Path) -> None:
    write(tmp_path, "DCIM/100MEDIA/DJI_0002.JPG", "DCIM/101MEDIA/DJI_0003.JPG")
    write(tmp_path, "DCIM/100MEDIA/DJI_0010.JPG", "MISC/THM/100/DJI_0002.THM")
    found = find_images(tmp_path)
    assert names_of(found) == [
        "DCIM/100MEDIA/DJI_0002.JPG",
        "DCIM/100MEDIA/DJI_0010.JPG",
        "DCIM/101MEDIA/DJI_0003.JPG",
    ]
    assert counts_of(found) == {(".thm", "no photo"): 1}


def test_photos_of_a_folder_and_its_subfolders_are_taken_together(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "more/b.HEIC", "more/yet/c.avif")
    assert names_of(find_images(tmp_path)) == ["a.jpg", "more/b.HEIC", "more/yet/c.avif"]
    assert find_images(tmp_path).words == ""


def test_everything_left_out_is_counted_by_kind_and_reason_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, "0.jpg", "1.jpg", "1.DNG", "2.dng", "a.MOV", "b.mov", "c.gif", "notes.txt")
    write(tmp_path, ".0.jpg", ".DS_Store", "thumbnails/0.jpg", "thumbnails/1.jpg", "flight.srt")
    found = find_images(tmp_path)
    assert names_of(found) == ["0.jpg", "1.jpg", "2.dng"]
    assert counts_of(found) == {
        (".dng", "the raw of a photo that is taken"): 1,
        (".mov", "a video is a source of its own"): 2,
        (".gif", "cannot be read: save it as JPEG"): 1,
        (".jpg", "hidden"): 1,
        (".jpg", "copies or masks in thumbnails/"): 2,
        (".txt", "no photo"): 1,
        (".srt", "no photo"): 1,
    }
    assert {one.kind for one in found.left_out if not one.is_missed} == {".jpg", ".txt", ".srt"}
    assert found.words == (
        "12 files: 3 taken; left out: 1 .dng (the raw of a photo that is taken); 1 .gif (cannot be"
        " read: save it as JPEG); 1 .jpg (hidden); 2 .mov (a video is a source of its own); 2 .jpg"
        " (copies or masks in thumbnails/); 2 .srt, .txt (no photo)"
    )


@pytest.mark.parametrize("missing", ["is_heif_available", "is_raw_available"])
def test_kinds_whose_package_is_missing_are_named_with_what_installs_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_search, missing, lambda: False)
    suffix, package = {
        "is_heif_available": (".heic", "pillow-heif"),
        "is_raw_available": (".dng", "rawpy"),
    }[missing]
    write(tmp_path, "0.jpg", f"1{suffix}", f"2{suffix.upper()}")
    found = find_images(tmp_path)
    assert names_of(found) == ["0.jpg"]
    ((kind, reason),) = counts_of(found)
    assert kind == suffix
    assert reason.startswith(f"needs {package}: ")
    (tmp_path / "0.jpg").unlink()
    for path in (tmp_path, tmp_path / f"1{suffix}"):
        with pytest.raises(SourceError, match=f"needs {package}: "):
            find_images(path)


def test_a_raw_photo_is_taken_where_its_twin_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_search, "is_heif_available", lambda: False)
    write(tmp_path, "0.heic", "0.dng")
    assert names_of(find_images(tmp_path)) == ["0.dng"]


def test_images_of_a_data_set_are_found_and_what_lies_beside_them_is_counted(
    tmp_path: Path,
) -> None:
    write(tmp_path, "images/a.jpg", "images/left/b.jpg", "images_4/a.jpg", "extra/c.jpg")
    write(tmp_path, "masks/a.jpg.png", "sparse/0/cameras.bin")
    found = find_images(tmp_path)
    assert found.root == tmp_path / "images"
    assert names_of(found) == ["a.jpg", "left/b.jpg"]
    assert counts_of(found) == {
        (".bin", "no photo"): 1,
        (".jpg", "beside images/ of a data set"): 1,
        (".jpg", "copies or masks in images_4/"): 1,
    }


def test_runs_in_the_folder_of_the_photos_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "runs/one/images/a.jpg", "runs/one/frames.csv")
    write(tmp_path, "runs/one/snapshots/000001/snapshot.json", "runs/note.jpg")
    found = find_images(tmp_path)
    assert names_of(found) == ["a.jpg", "runs/note.jpg"]
    assert {one.reason for one in found.left_out} == {"in the folder of a run"}
    assert not any(one.is_missed for one in found.left_out)


def test_copies_are_taken_where_there_is_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "thumbnails/a.jpg", "notes.txt")
    assert names_of(find_images(tmp_path)) == ["thumbnails/a.jpg"]


def test_a_folder_without_photos_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, "DCIM/a.mp4", "DCIM/b.MP4")
    with pytest.raises(SourceError, match=r"it holds 2 \.mp4 \(a video is a source of its own\)"):
        find_images(tmp_path)


def test_folders_that_links_lead_around_are_entered_once(tmp_path: Path) -> None:
    write(tmp_path, "one/a.jpg")
    (tmp_path / "one" / "back").symlink_to(tmp_path)
    assert names_of(find_images(tmp_path)) == ["one/a.jpg"]
