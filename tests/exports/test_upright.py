from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from adapters.exports.upright import upright_of
from engine.errors import ConfigError
from engine.geometry import rotation_from_vector
from engine.types import Float64Array

UP_IN_MAP = np.array([0.3, -0.9, 0.3]) / np.linalg.norm([0.3, -0.9, 0.3])


def model_of(rotations: list[Float64Array]) -> pycolmap.Reconstruction:
    """Cameras (3, 3) from an upright world, in a map whose up is `UP_IN_MAP`."""
    first = np.cross([0.0, 0.0, 1.0], UP_IN_MAP)
    first /= np.linalg.norm(first)
    upright_from_map = np.stack([first, np.cross(UP_IN_MAP, first), UP_IN_MAP])
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(
        pycolmap.Camera.create_from_model_name(1, "PINHOLE", 300.0, 320, 240)
    )
    for image_id, rotation in enumerate(rotations, start=1):
        pose = np.column_stack([rotation @ upright_from_map, np.zeros(3)])
        image = pycolmap.Image(name=f"{image_id}.jpg", camera_id=1, image_id=image_id)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
    return model


def level(heading_rad: float, *, down_rad: float = 0.0, roll_rad: float = 0.0) -> Float64Array:
    """A camera from a world whose z is up."""
    north = np.array([(1.0, 0, 0), (0, 0, -1), (0, 1, 0)])  # rows: right, down, forward
    turned = north @ rotation_from_vector(np.array([0.0, 0.0, heading_rad]))
    pitched = rotation_from_vector(np.array([down_rad, 0.0, 0.0])) @ turned
    return np.asarray(rotation_from_vector(np.array([0.0, 0.0, roll_rad])) @ pitched, np.float64)


@pytest.mark.parametrize("down_deg", [-20, 0, 30, 60, 90])
def test_up_is_that_of_level_cameras_wherever_they_look(down_deg: float) -> None:
    numbers = np.random.default_rng(0)
    rotations = [
        level(heading, down_rad=np.radians(down_deg), roll_rad=numbers.normal(0.0, 0.03))
        for heading in np.linspace(0.0, 3.0, 20)
    ]
    upright = upright_of(model_of(rotations), is_on_globe=False)
    up = upright.upright_from_map @ UP_IN_MAP
    assert up[2] > np.cos(np.radians(3.0))
    turn = upright.upright_from_map
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1.0)


def test_cameras_that_all_look_one_way_are_taken_for_level_and_that_is_said() -> None:
    upright = upright_of(model_of([level(0.01 * k) for k in range(10)]), is_on_globe=False)
    assert (upright.upright_from_map @ UP_IN_MAP)[2] > 0.999
    assert "neither up nor down" in upright.words


def test_a_map_on_the_globe_stays_as_it_is() -> None:
    upright = upright_of(model_of([level(0.0)]), is_on_globe=True)
    np.testing.assert_array_equal(upright.upright_from_map, np.eye(3))


def test_cameras_held_anyhow_are_refused() -> None:
    numbers = np.random.default_rng(1)
    rotations = [rotation_from_vector(numbers.normal(size=3) * 2.0) for _ in range(30)]
    with pytest.raises(ConfigError, match="which way is up is not known"):
        upright_of(model_of(rotations), is_on_globe=False)
