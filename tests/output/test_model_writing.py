from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap
import pytest

from engine.output import model_writing
from engine.output.model_writing import MODEL_FILES, write_model


@pytest.fixture
def model() -> pycolmap.Reconstruction:
    """A model of nine images, of which one has no pose."""
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs = 3
    options.num_frames_per_rig = 3
    options.num_points3D = 80
    model = pycolmap.synthesize_dataset(options)
    model.deregister_frame(model.image(4).frame_id)
    model.update_point_3d_errors()
    return model


@pytest.mark.parametrize("slice_keypoints", [1, 200, 10**6])
def test_the_files_are_those_that_colmap_writes_at_once(
    tmp_path: Path,
    model: pycolmap.Reconstruction,
    slice_keypoints: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_writing, "_SLICE_KEYPOINTS", slice_keypoints)
    at_once = tmp_path / "at_once"
    at_once.mkdir()
    model.write_binary(at_once)
    write_model(model, tmp_path / "sliced")
    assert {path.name for path in (tmp_path / "sliced").iterdir()} == set(MODEL_FILES)
    for name in MODEL_FILES:
        assert (tmp_path / "sliced" / name).read_bytes() == (at_once / name).read_bytes()


def test_a_model_that_was_written_is_as_it_was(
    tmp_path: Path, model: pycolmap.Reconstruction
) -> None:
    write_model(model, tmp_path / "first")
    assert model.is_valid()
    assert model.num_reg_images() == 8
    write_model(model, tmp_path / "second")
    for name in MODEL_FILES:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_no_call_writes_many_more_keypoints_than_a_slice_has(
    tmp_path: Path, model: pycolmap.Reconstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Counted(pycolmap.Reconstruction):
        def write_binary(self, output_dir: Path) -> None:  # type: ignore[override]
            images = [self.image(image_id) for image_id in self.reg_image_ids()]
            sizes.append(sum(image.num_points2D() for image in images))
            super().write_binary(output_dir)

    monkeypatch.setattr(model_writing, "_SLICE_KEYPOINTS", 200)
    monkeypatch.setattr(pycolmap, "Reconstruction", Counted)
    num_keypoints = [model.image(image_id).num_points2D() for image_id in model.reg_image_ids()]
    write_model(Counted(model), tmp_path / "sliced")
    assert sizes[0] == 0
    assert np.sum(sizes) == np.sum(num_keypoints)
    assert 1 < len(sizes) - 1 < len(num_keypoints)
    assert max(sizes) < 200 + max(num_keypoints)
