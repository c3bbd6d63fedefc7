from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapters.benchmark.references import ReferenceKind, find_reference
from adapters.evaluate import has_pose
from engine.errors import ConfigError
from engine.geometry import camera_center
from tests.support.benchmark_runs import ring, rows, write_model, write_tum

METRES_PER_DEGREE = 111_300.0  # of latitude, to a percent


def test_poses_in_tum_format_are_those_of_the_index(tmp_path: Path) -> None:
    poses = ring(5)
    write_tum(tmp_path / "groundtruth.txt", {0: poses[0], 3: poses[3]})
    reference = find_reference([tmp_path], asked=None)
    assert reference is not None
    found = reference.of(rows([f"{number}.jpg" for number in range(5)]))
    assert has_pose(found.cam_from_world).tolist() == [True, False, False, True, False]
    assert found.cam_from_world[3] == pytest.approx(poses[3], abs=1e-9)
    assert found.has_rotations
    assert found.num_frames == 2


def test_a_model_has_the_poses_of_names_and_of_unique_last_parts(tmp_path: Path) -> None:
    poses = ring(4)
    model = {
        "images/a.jpg": poses[0],
        "left/b.jpg": poses[1],
        "right/b.jpg": poses[2],
        "c.jpg": poses[3],
    }
    write_model(tmp_path / "sparse" / "0", model)
    reference = find_reference([tmp_path], asked=None)
    assert reference is not None
    assert reference.kind is ReferenceKind.MODEL
    found = reference.of(rows(["a.jpg", "b.jpg", "right/b.jpg", "photos/c.jpg", "d.jpg"]))
    assert has_pose(found.cam_from_world).tolist() == [True, False, True, True, False]
    assert found.cam_from_world[0] == pytest.approx(poses[0], abs=1e-9)
    assert found.cam_from_world[2] == pytest.approx(poses[2], abs=1e-9)


def test_gps_positions_are_metres_east_north_and_up(tmp_path: Path) -> None:
    table = "name,lat,lon,alt\na.jpg,45.0,8.0,100\nb.jpg,45.001,8.0,100\nc.jpg,45.0,8.0,130\n"
    (tmp_path / "gps.csv").write_text(table)
    reference = find_reference([tmp_path], asked=None)
    assert reference is not None
    found = reference.of(rows(["a.jpg", "b.jpg", "c.jpg"]))
    assert not found.has_rotations
    centers = camera_center(found.cam_from_world)
    north = 0.001 * METRES_PER_DEGREE
    assert centers[1] - centers[0] == pytest.approx([0.0, north, 0.0], abs=0.01 * north)
    assert centers[2] - centers[0] == pytest.approx([0.0, 0.0, 30.0], abs=0.01)
    assert found.extent == pytest.approx(np.hypot(north, 30.0), rel=0.01)


def test_measured_references_win_over_models(tmp_path: Path) -> None:
    write_tum(tmp_path / "reference_colmap.txt", {0: ring(1)[0]})
    assert _name(tmp_path) == "reference_colmap.txt"
    write_model(tmp_path / "sparse" / "0", {"a.jpg": ring(1)[0]})
    assert _name(tmp_path) == "0"
    (tmp_path / "gps.csv").touch()
    assert _name(tmp_path) == "gps.csv"
    (tmp_path / "groundtruth.txt").touch()
    assert _name(tmp_path) == "groundtruth.txt"


def test_where_nothing_lies_there_is_no_reference(tmp_path: Path) -> None:
    assert find_reference([tmp_path], asked=None) is None


def test_a_reference_of_other_frames_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", {"a.jpg": ring(1)[0]})
    reference = find_reference([], asked=tmp_path / "model")
    assert reference is not None
    with pytest.raises(ConfigError, match="names none of the 1 frames"):
        reference.of(rows(["b.jpg"]))


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("gps.csv", "name,lat,lon\na,1,2\n", "no column alt"),
        ("gps.csv", "name,lat,lon,alt\na,1,north,3\n", "no table of GPS positions"),
        ("gps.csv", "name,lat,lon,alt\n", "names none"),
        ("groundtruth.txt", "1 2 3\n", "expected 8 numbers"),
    ],
)
def test_a_reference_that_cannot_be_read_is_refused(
    tmp_path: Path, file: str, text: str, words: str
) -> None:
    (tmp_path / file).write_text(text)
    reference = find_reference([tmp_path], asked=None)
    assert reference is not None
    with pytest.raises(ConfigError, match=words):
        reference.of(rows(["a"]))


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {"a.jpg": ring(1)[0]})
    (folder / "images.bin").write_bytes(b"\1")
    reference = find_reference([], asked=folder)
    assert reference is not None
    with pytest.raises(ConfigError, match="not a whole COLMAP model"):
        reference.of(rows(["a.jpg"]))


def _name(folder: Path) -> str:
    found = find_reference([folder], asked=None)
    assert found is not None
    return found.path.name
