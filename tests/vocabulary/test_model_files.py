"""Model files of strangers: whole and consistent, or refused before COLMAP reads them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from engine.model_files import (
    CAMERA_MODEL_OF_ID,
    ModelFileError,
    check_model_files,
    is_safe_image_name,
    read_points,
)

FILES = ("cameras.bin", "rigs.bin", "frames.bin", "images.bin", "points3D.bin")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model with two cameras."""
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs = 2
    options.num_frames_per_rig = 3
    options.num_points3D = 12
    options.num_points2D_without_point3D = 2
    folder = tmp_path_factory.mktemp("model")
    pycolmap.synthesize_dataset(options).write_binary(folder)
    return {name: (folder / name).read_bytes() for name in FILES}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_what_colmap_writes_passes(whole: dict[str, bytes], tmp_path: Path) -> None:
    check_model_files(write(tmp_path, whole))
    pycolmap.Reconstruction().write_binary(tmp_path)
    check_model_files(tmp_path)


def test_rigs_of_several_cameras_pass(tmp_path: Path) -> None:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig = 2, 3, 4
    pycolmap.synthesize_dataset(options).write_binary(tmp_path)
    check_model_files(tmp_path)


def test_models_are_counted_as_colmap_counts_them() -> None:
    ids = {
        int(member.value): name
        for name, member in pycolmap.CameraModelId.__members__.items()
        if name != "INVALID"
    }
    assert dict(enumerate(CAMERA_MODEL_OF_ID)) == ids


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_refused(whole: dict[str, bytes], tmp_path: Path, name: str) -> None:
    data = whole[name]
    write(tmp_path, whole)
    for length in range(0, len(data), max(len(data) // 60, 1)):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(ModelFileError, match=name):
            check_model_files(tmp_path)
    for wrong in (data + b"\0", b"\xff" * 8 + data[8:], struct.pack("<Q", 2**40) + data[8:]):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(ModelFileError, match=name):
            check_model_files(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelFileError, match=f"{name}: No such file"):
        check_model_files(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (("cameras.bin", 12), struct.pack("<i", 99), "unknown model 99"),
        (("cameras.bin", 12), struct.pack("<i", -1), "unknown model -1"),
        (("cameras.bin", 16), struct.pack("<Q", 2**60), "px"),
        (("cameras.bin", 16), struct.pack("<Q", 0), "px"),
        (("cameras.bin", 16), struct.pack("<QQ", 2**17, 2**17), "px"),
        (("cameras.bin", 32), struct.pack("<d", np.nan), "not finite"),
        (("cameras.bin", 32), struct.pack("<d", -1.0), "not above 0"),
        (("cameras.bin", 8), struct.pack("<I", 7), "unknown camera|camera"),
        (("images.bin", 12), struct.pack("<4d", 0, 0, 0, 0), "rotation"),
        (("images.bin", 44), struct.pack("<d", 1e308), "absurdly large"),
        (("images.bin", 44), struct.pack("<d", np.inf), "not finite"),
        (("images.bin", 8), struct.pack("<I", 77), "unknown|once"),
        (("points3D.bin", 16), struct.pack("<d", np.nan), "not finite"),
        (("points3D.bin", 16), struct.pack("<d", -1e308), "absurdly large"),
        (("points3D.bin", 8), struct.pack("<Q", 10**9), "another one"),
        (("points3D.bin", 59), struct.pack("<I", 999), "unknown image"),
        (("points3D.bin", 63), struct.pack("<I", 2**31), "unknown keypoints"),
        (("frames.bin", 12), struct.pack("<I", 99), "unknown rig"),
        (("rigs.bin", 12), struct.pack("<I", 0), "rig"),
        (("rigs.bin", 12), struct.pack("<I", 2**31), "cut short"),
    ],
)
def test_what_refers_to_nothing_or_is_no_number_is_refused(
    whole: dict[str, bytes], tmp_path: Path, field: tuple[str, int], value: bytes, words: str
) -> None:
    name, place = field
    data = bytearray(whole[name])
    data[place : place + len(value)] = value
    with pytest.raises(ModelFileError, match=words):
        check_model_files(write(tmp_path, {**whole, name: bytes(data)}))


def test_what_passes_is_read_by_colmap_whatever_bytes_were_changed(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    num_refused = 0
    for number in range(150):
        name = FILES[number % len(FILES)]
        data = bytearray(whole[name])
        for place in random.integers(0, len(data), random.integers(1, 4)):
            data[place] = random.integers(256)
        write(tmp_path, {**whole, name: bytes(data)})
        try:
            check_model_files(tmp_path)
        except ModelFileError:
            num_refused += 1
        else:
            assert pycolmap.Reconstruction(tmp_path).num_images() == 6
    assert 50 < num_refused < 150


@pytest.mark.parametrize(
    "name", ["a.jpg", "left/a.jpg", "caf\u00e9/\u65e5\u672c.jpg", "...jpg", "-x.jpg", "a b.png"]
)
def test_names_below_the_folder_of_images_are_safe(name: str) -> None:
    assert is_safe_image_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "//a",
        "../a",
        "a/../b",
        "a/..",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "a\nb",
        "a\0",
    ],
)
def test_names_that_lead_elsewhere_are_not(name: str) -> None:
    assert not is_safe_image_name(name)
    assert not is_safe_image_name("x" * 1001)


def test_points_are_read_without_their_tracks(tmp_path: Path) -> None:
    reconstruction = pycolmap.synthesize_dataset(pycolmap.SyntheticDatasetOptions())
    reconstruction.write_binary(tmp_path)
    positions, colors = read_points(tmp_path / "points3D.bin")
    points = reconstruction.points3D
    assert len(positions) == len(points) > 10
    by_place = {tuple(point.xyz): tuple(point.color) for point in points.values()}
    assert {
        tuple(place): tuple(color)
        for place, color in zip(positions.tolist(), colors.tolist(), strict=True)
    } == by_place
    data = (tmp_path / "points3D.bin").read_bytes()
    for bad in (data[:-1], data + b"x", b"\xff" * 8 + data[8:]):
        (tmp_path / "points3D.bin").write_bytes(bad)
        with pytest.raises(ModelFileError):
            read_points(tmp_path / "points3D.bin")
