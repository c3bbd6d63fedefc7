from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap
import pytest

from adapters.exports.footprints import footprint_on_ground
from engine.geometry import rotation_from_vector
from engine.types import Float64Array
from tests.support.placed_runs import make_placed_run

HEIGHT_M = 40.0


def looking_down_by(
    pitch_deg: float, *, model: str = "PINHOLE", ground: Float64Array | None = None
) -> tuple[pycolmap.Image, pycolmap.Reconstruction]:
    """A camera above level ground that looks to the north, and down by an angle."""
    camera = pycolmap.Camera.create_from_model_name(1, model, 300.0, 400, 300)
    reconstruction = pycolmap.Reconstruction()
    reconstruction.add_camera_with_trivial_rig(camera)
    level = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    rotation = rotation_from_vector(np.array([np.radians(pitch_deg), 0.0, 0.0])) @ level
    center = np.array([5.0, -7.0, HEIGHT_M])
    pose = np.column_stack([rotation, -rotation @ center])
    if ground is None:
        ground = np.random.default_rng(0).uniform(-200, 200, (3000, 3)) * [1, 1, 0]
    in_cam = ground @ rotation.T + pose[:, 3]
    ground, in_cam = ground[in_cam[:, 2] > 1.0], in_cam[in_cam[:, 2] > 1.0]
    places_xy = np.asarray(camera.img_from_cam(in_cam)).reshape(-1, 2)
    rows = np.flatnonzero(((places_xy >= 0) & (places_xy < [400, 300])).all(axis=1))
    for image_id in (1, 2):
        image = pycolmap.Image(
            name=f"{image_id}.png", keypoints=places_xy[rows], camera_id=1, image_id=image_id
        )
        reconstruction.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
    for point2D_idx, row in enumerate(rows.tolist()):
        track = pycolmap.Track()
        track.add_element(1, point2D_idx)
        track.add_element(2, point2D_idx)
        reconstruction.add_point3D(ground[row], track, np.zeros(3, np.uint8))
    return reconstruction.image(1), reconstruction


def is_convex(outline: Float64Array) -> bool:
    edges = np.diff(np.vstack([outline, outline[:2]]), axis=0)[:, :2]
    turns = edges[:-1, 0] * edges[1:, 1] - edges[:-1, 1] * edges[1:, 0]
    return bool((turns >= -1e-9).all() or (turns <= 1e-9).all())


def test_a_camera_that_looks_straight_down_sees_a_rectangle() -> None:
    outline = footprint_on_ground(*looking_down_by(90.0))
    assert outline is not None
    size_m = np.array([400.0, 300.0]) / 300.0 * HEIGHT_M
    np.testing.assert_allclose(np.ptp(outline, axis=0), [*size_m, 0.0], atol=1e-6)
    np.testing.assert_allclose(outline.mean(axis=0), [5.0, -7.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("pitch_deg", [80.0, 60.0, 45.0])
def test_borders_of_an_oblique_image_are_those_of_its_footprint(pitch_deg: float) -> None:
    image, reconstruction = looking_down_by(pitch_deg)
    outline = footprint_on_ground(image, reconstruction)
    assert outline is not None
    places = np.array([image.project_point(place) for place in outline])
    off_px = np.minimum(np.abs(places), np.abs(places - [400, 300])).min(axis=1)
    assert off_px.max() < 1e-6


@pytest.mark.parametrize("pitch_deg", [25.0, 15.0, 8.0])
def test_a_footprint_ends_where_nothing_is_seen_before_the_horizon(pitch_deg: float) -> None:
    image, reconstruction = looking_down_by(pitch_deg)
    outline = footprint_on_ground(image, reconstruction)
    assert outline is not None
    assert is_convex(outline)
    center = image.projection_center()
    seen = np.array([point.xyz for point in reconstruction.points3D.values()])
    farthest_m = np.linalg.norm(seen - center, axis=1).max()
    assert np.linalg.norm((outline - center)[:, :2], axis=1).max() < 1.6 * farthest_m
    north = seen[:, 1] > np.percentile(seen[:, 1], 50)
    assert outline[:, 1].max() > seen[north][:, 1].mean()


@pytest.mark.parametrize("pitch_deg", [-10.0, -60.0])
def test_a_camera_that_looks_up_sees_no_ground(pitch_deg: float) -> None:
    ground = np.random.default_rng(0).uniform(-200, 200, (3000, 3)) + [0, 0, 250]
    assert footprint_on_ground(*looking_down_by(pitch_deg, ground=ground)) is None


def test_roofs_do_not_lift_the_ground_and_slopes_do() -> None:
    rng = np.random.default_rng(3)
    ground = rng.uniform(-60, 60, (3000, 3)) * [1, 1, 0]
    ground[:, 2] = 0.2 * ground[:, 0] - 0.1 * ground[:, 1]
    ground[:900, 2] += rng.uniform(4, 12, 900)
    outline = footprint_on_ground(*looking_down_by(90.0, ground=ground))
    assert outline is not None
    expected = 0.2 * outline[:, 0] - 0.1 * outline[:, 1]
    np.testing.assert_allclose(outline[:, 2], expected, atol=0.3)


def test_an_image_with_few_points_has_no_footprint(tmp_path: Path) -> None:
    few = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert footprint_on_ground(*looking_down_by(90.0, ground=few)) is None
    truth = make_placed_run(tmp_path / "run", models=("EQUIRECTANGULAR",))
    assert all(footprint_on_ground(image, truth) is None for image in truth.images.values())
