"""Points refined where poses and calibrations are known."""

from __future__ import annotations

import numpy as np
import pycolmap

from engine.estimators.point_refinement import refine_points
from engine.geometry import transform_points
from engine.types import Float64Array, Int64Array
from tests.support.synthetic import EXACT_CAMERA, HEIGHT, WIDTH, straight_path

NUM_POINTS = 40
CAMERA = pycolmap.Camera(model="SIMPLE_RADIAL", width=WIDTH, height=HEIGHT, params=EXACT_CAMERA)


class Scene:
    """Points that poses of a flight see, each by two to six of them."""

    def __init__(self, *, noise_px: float = 0.0) -> None:
        rng = np.random.default_rng(1)
        poses = straight_path(6, step=1.0)
        self.points3D = rng.uniform((4.0, -4.0, 0.0), (14.0, 4.0, 3.0), (NUM_POINTS, 3))
        lengths = 2 + np.arange(NUM_POINTS) % 5
        self.first_rows: Int64Array = np.cumsum(lengths) - lengths
        self.of_point = np.repeat(np.arange(NUM_POINTS), lengths)
        self.poses = np.concatenate([poses[:length] for length in lengths])
        in_cams = [
            transform_points(pose, self.points3D[point][None])[0]
            for pose, point in zip(self.poses, self.of_point, strict=True)
        ]
        exact_xy = np.array(CAMERA.img_from_cam(np.array(in_cams)))
        self.points_xy = exact_xy + rng.normal(scale=noise_px, size=exact_xy.shape)

    def refined(self, points3D: Float64Array) -> Float64Array:
        return refine_points(
            points3D,
            self.first_rows,
            cams_from_world=self.poses,
            points_xy=self.points_xy,
            project=CAMERA.img_from_cam,
        )

    def distances(self, points3D: Float64Array) -> Float64Array:
        return np.asarray(np.linalg.norm(points3D - self.points3D, axis=1))


def test_points_that_are_off_come_to_where_they_are_seen() -> None:
    scene = Scene()
    off = scene.points3D + np.random.default_rng(2).normal(scale=0.3, size=(NUM_POINTS, 3))
    refined = scene.refined(off)
    assert scene.distances(off).max() > 0.5
    assert scene.distances(refined).max() < 1e-3


def test_noise_moves_points_as_far_as_their_rays_say() -> None:
    scene = Scene(noise_px=0.5)
    distances = scene.distances(scene.refined(scene.points3D))
    assert 1e-3 < np.median(distances) < 0.1
    long_tracks = np.arange(NUM_POINTS) % 5 >= 3
    assert np.median(distances[long_tracks]) < np.median(distances[~long_tracks])


def test_an_outlier_counts_for_little() -> None:
    scene = Scene()
    longest = int(np.argmax(np.arange(NUM_POINTS) % 5))
    scene.points_xy[scene.first_rows[longest]] += (40.0, 0.0)
    distances = scene.distances(scene.refined(scene.points3D))
    assert 1e-4 < distances[longest] < 0.2
    assert np.delete(distances, longest).max() < 1e-3


def test_a_point_that_no_camera_can_see_stays() -> None:
    scene = Scene()
    behind = scene.points3D.copy()
    behind[3] = (-50.0, 0.0, 30.0)
    refined = scene.refined(behind)
    assert np.array_equal(refined[3], behind[3])
    assert np.delete(scene.distances(refined), 3).max() < 1e-3
