"""Lenses: viewing rays of every camera model, and which cameras are far from a pinhole."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.camera_models import CAMERA_MODEL_NAMES, CAMERA_MODELS, LensKind
from engine.estimators.lenses import (
    border_rays,
    camera_focal_px,
    camera_of,
    corner_rays,
    fisheye_focal_px,
    image_grid,
    intrinsics_of,
    is_far_from_pinhole,
    is_wide,
    principal_point,
    unit_rays,
    uses_rays,
    viewing_rays,
)

WIDTH, HEIGHT = 1000, 750


def camera(model: str, *, focal_px: float = 500.0) -> pycolmap.Camera:
    return pycolmap.Camera.create_from_model_name(1, model, focal_px, WIDTH, HEIGHT)


def test_the_table_of_models_is_colmaps() -> None:
    members = set(pycolmap.CameraModelId.__members__) - {"INVALID"}
    assert set(CAMERA_MODEL_NAMES) == set(CAMERA_MODELS) == members
    for name, model in CAMERA_MODELS.items():
        colmaps = camera(name)
        assert len(colmaps.params) == model.num_params, name
        num_sizes = 2 if colmaps.is_spherical() else len(colmaps.focal_length_idxs())
        assert num_sizes == model.num_positive, name
        assert colmaps.is_spherical() == (model.kind is LensKind.SPHERICAL), name
        assert colmaps.is_perspective_fisheye() == (model.kind is LensKind.FISHEYE), name


@pytest.mark.parametrize("model", CAMERA_MODEL_NAMES)
def test_rays_of_every_model_are_projected_back_to_their_points(model: str) -> None:
    lens = camera(model)
    points_xy = 0.998 * image_grid(WIDTH, HEIGHT, per_edge=8) + 0.5
    rays = unit_rays(lens, points_xy)
    assert np.linalg.norm(rays, axis=1) == pytest.approx(1.0)
    assert np.asarray(lens.img_from_cam(rays)) == pytest.approx(points_xy, abs=1e-6)
    assert np.cross(viewing_rays(lens, points_xy), rays) == pytest.approx(0.0, abs=1e-9)


def test_border_rays_go_to_the_corners_and_the_middles_of_the_edges() -> None:
    lens = camera("SIMPLE_RADIAL")
    seen_xy = np.asarray(lens.img_from_cam(border_rays(lens)))
    on_edge = [(x, y) for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0) if (x, y) != (0.5, 0.5)]
    assert seen_xy == pytest.approx(np.array(on_edge) * (WIDTH, HEIGHT), abs=1e-6)
    narrow = camera("OPENCV_FISHEYE", focal_px=250.0)  # its image ends before the corners
    assert np.isnan(border_rays(narrow)).any()


def test_a_fisheye_has_no_ray_where_colmap_projects_none_back() -> None:
    lens = camera("OPENCV_FISHEYE", focal_px=250.0)  # its image ends at 90 degrees, 393 px out
    center_x, center_y = principal_point(lens)
    points_xy = np.array([[center_x + 385.0, center_y], [center_x + 420.0, center_y]])
    assert np.isfinite(unit_rays(lens, points_xy)).all(axis=1).tolist() == [True, False]
    assert unit_rays(lens, np.empty((0, 2))).shape == (0, 3)


@pytest.mark.parametrize("model", CAMERA_MODEL_NAMES)
def test_the_focal_length_is_px_per_angle_about_the_axis(model: str) -> None:
    lens = camera(model)
    axis = np.array([principal_point(lens)])
    step = unit_rays(lens, axis + (1.0, 0.0)) - unit_rays(lens, axis)
    assert 1.0 / np.linalg.norm(step) == pytest.approx(camera_focal_px(lens), rel=1e-3)


def test_fisheyes_and_spheres_are_wide_whatever_their_parameters() -> None:
    kinds = {name: (is_wide(camera(name)), uses_rays(camera(name))) for name in CAMERA_MODELS}
    assert kinds["SIMPLE_RADIAL"] == kinds["FULL_OPENCV"] == (False, False)
    assert kinds["EUCM"] == kinds["FOV"] == kinds["DIVISION"] == (False, True)
    assert kinds["SIMPLE_FISHEYE"] == kinds["EQUIRECTANGULAR"] == (True, True)


def test_a_lens_is_far_from_a_pinhole_when_it_bends_some_pixel_beyond_the_bound() -> None:
    def radial(k: float) -> pycolmap.Camera:
        params = (800.0, WIDTH / 2, HEIGHT / 2, k)
        return pycolmap.Camera(model="SIMPLE_RADIAL", width=WIDTH, height=HEIGHT, params=params)

    assert not is_far_from_pinhole(radial(0.0))
    assert not is_far_from_pinhole(radial(0.005))  # 2.4 px in the corners
    assert is_far_from_pinhole(radial(0.01))
    assert is_far_from_pinhole(radial(-0.3))
    assert is_far_from_pinhole(radial(-3.0))  # some pixels have no place on z = 1 at all
    assert not is_far_from_pinhole(camera("EUCM"))  # starts as a pinhole
    assert is_far_from_pinhole(camera("SIMPLE_FISHEYE"))


def test_the_guess_at_a_fisheye_is_118_degrees_across_the_longer_edge() -> None:
    lens = camera("SIMPLE_FISHEYE", focal_px=fisheye_focal_px(WIDTH, HEIGHT))
    sides = unit_rays(lens, np.array([[0.0, HEIGHT / 2], [WIDTH, HEIGHT / 2]]))
    assert np.degrees(np.arccos(sides[0] @ sides[1])) == pytest.approx(118.0)


def test_corners_are_drawn_where_a_wide_lens_sees_them() -> None:
    assert np.isnan(corner_rays(camera("SIMPLE_RADIAL"))).all()
    assert not corner_rays(camera("EQUIRECTANGULAR")).any()
    lens = camera("SIMPLE_FISHEYE")
    corners_xy = np.array([(0, 0), (WIDTH, 0), (WIDTH, HEIGHT), (0, HEIGHT)], np.float64)
    assert np.asarray(lens.img_from_cam(corner_rays(lens))) == pytest.approx(corners_xy)


def test_a_corner_outside_the_image_circle_is_drawn_at_its_border() -> None:
    circular = camera("SIMPLE_FISHEYE", focal_px=240.0)  # 90 degrees are 377 px out
    rays = corner_rays(circular)
    assert np.linalg.norm(rays, axis=1) == pytest.approx(1.0)
    assert np.degrees(np.arccos(rays[:, 2])) == pytest.approx(88.0, abs=2.0)


def test_frozen_intrinsics_are_the_cameras_own() -> None:
    lens = camera("RADIAL_FISHEYE")
    twin = camera_of(intrinsics_of(lens, is_wide=True))
    assert (twin.model, twin.width, twin.height) == (lens.model, WIDTH, HEIGHT)
    assert twin.params.tolist() == lens.params.tolist()
