from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from adapters.benchmark.datasets import find_dataset, images_for_peers
from engine.errors import ConfigError
from tests.support.small_videos import HEIGHT, WIDTH, picture, write_video


def write_images(folder: Path, *names: str, size: tuple[int, int] = (32, 24)) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((size[1], size[0], 3), np.uint8))
    return folder


@pytest.mark.parametrize("given", ["set", "set/images"])
def test_a_folder_stands_for_its_images_and_what_lies_beside_them(
    tmp_path: Path, given: str
) -> None:
    write_images(tmp_path / "set" / "images", "10.png", "9.png")
    (tmp_path / "set" / "groundtruth.txt").touch()
    dataset = find_dataset(tmp_path / given)
    assert dataset.name == "set"
    assert dataset.source == tmp_path / "set" / "images"
    assert not dataset.is_video
    assert dataset.names == ("9.png", "10.png"), "in LiveSfM's order"
    assert dataset.reference is not None
    assert dataset.reference.path == tmp_path / "set" / "groundtruth.txt"


def test_a_folder_of_images_takes_nothing_from_the_folder_around_it(tmp_path: Path) -> None:
    write_images(tmp_path / "set", "1.png")
    (tmp_path / "groundtruth.txt").touch()
    dataset = find_dataset(tmp_path / "set")
    assert dataset.name == "set"
    assert dataset.reference is None


@pytest.mark.parametrize("given", ["walk", "walk/clip.mp4"])
def test_the_only_video_of_a_folder_is_the_dataset(tmp_path: Path, given: str) -> None:
    (tmp_path / "walk").mkdir()
    video = write_video(tmp_path / "walk" / "clip.mp4", 2)
    (tmp_path / "walk" / "gps.csv").touch()
    dataset = find_dataset(tmp_path / given)
    assert dataset.source == video
    assert dataset.is_video
    assert dataset.name == ("walk" if given == "walk" else "clip")
    assert dataset.reference is not None


def test_what_holds_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither images nor a single video"):
        find_dataset(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        find_dataset(tmp_path / "nothing")


def test_a_reference_that_is_asked_for_wins(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "images", "1.png")
    (tmp_path / "set" / "groundtruth.txt").touch()
    asked = tmp_path / "other.txt"
    with pytest.raises(ConfigError, match=r"other\.txt"):
        find_dataset(tmp_path / "set", reference=asked)
    asked.touch()
    dataset = find_dataset(tmp_path / "set", reference=asked)
    assert dataset.reference is not None
    assert dataset.reference.path == asked


def test_peers_get_the_images_of_a_folder_where_they_are(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", "10.png", "9.png")
    images = images_for_peers(find_dataset(folder), step=5, folder=tmp_path / "unused")
    assert images.root == folder
    assert images.names == ["9.png", "10.png"]
    assert [frame.index for frame in images.frames] == [0, 1]
    assert images.step == 1
    assert not (tmp_path / "unused").exists()


def test_images_share_a_camera_as_far_as_their_sizes_allow(tmp_path: Path) -> None:
    def mode(folder: Path) -> str:
        return images_for_peers(find_dataset(folder), step=None, folder=tmp_path).camera_mode

    assert mode(write_images(tmp_path / "one", "1.png", "2.png")) == "SINGLE"
    assert mode(write_images(tmp_path / "two", "left/1.png", "right/1.png")) == "PER_FOLDER"
    write_images(tmp_path / "sizes", "1.png")
    assert mode(write_images(tmp_path / "sizes", "2.png", size=(24, 32))) == "AUTO"


def test_peers_get_every_so_many_frames_of_a_video(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", 10)
    images = images_for_peers(find_dataset(video), step=4, folder=tmp_path / "frames")
    assert [frame.index for frame in images.frames] == [0, 4, 8]
    assert [frame.captured_at_s for frame in images.frames] == pytest.approx([0, 4 / 30, 8 / 30])
    assert images.camera_mode == "SINGLE"
    assert images.step == 4
    for frame in images.frames:
        bgr = cv2.imread(str(images.root / frame.name))
        assert bgr is not None
        assert bgr.shape == (HEIGHT, WIDTH, 3)
        differences = np.abs(bgr[:, :, ::-1].astype(int) - picture(frame.index))
        assert differences[:, : WIDTH // 8].max() <= 2, "it is that frame"
        assert differences.mean() < 15.0, "in the right order of colours, but for H.264's loss"


def test_peers_get_about_three_frames_a_second_by_default(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", 25)
    images = images_for_peers(find_dataset(video), step=None, folder=tmp_path / "frames")
    assert images.step == 10
    assert images.in_words() == "every 10th frame, 3, cameras SINGLE"


def test_a_video_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "clip.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(ConfigError, match=r"clip\.mp4"):
        images_for_peers(find_dataset(broken), step=None, folder=tmp_path / "frames")
