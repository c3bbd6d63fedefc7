"""Batched triangulation: which views have a say, what outliers do, and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.windows.model import WindowModel, WindowSolverConfig
from engine.windows.triangulation import (
    TrackPoints,
    TriangulationOptions,
    _draws,
    triangulate_tracks,
    triangulate_window,
)
from tests.support.window_scenes import FOCAL_PX, HEIGHT, WIDTH, WindowScene, arc_scene

OPTIONS = TriangulationOptions(max_angle_rad=0.01, min_parallax_rad=0.02)


def arrays(scene: WindowScene, tracks_xy: Any = None) -> tuple[Any, Any, Any]:
    """Points on the image planes, visibility and cameras of a scene, of NumPy."""
    tracks_xy = scene.tracks_xy if tracks_xy is None else tracks_xy
    plane_xy = np.nan_to_num((tracks_xy - (WIDTH / 2, HEIGHT / 2)) / FOCAL_PX)
    return plane_xy, scene.is_visible.copy(), scene.poses.copy()


def tensors(scene: WindowScene, tracks_xy: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of PyTorch."""
    plane_xy, is_visible, cameras = map(torch.from_numpy, arrays(scene, tracks_xy))
    return plane_xy, is_visible, cameras


def errors(found: TrackPoints, scene: WindowScene) -> Any:
    """(V,) distances of valid points from the true ones."""
    return np.linalg.norm((found.points3D_in_world - scene.points)[found.is_valid], axis=1)


def test_exact_tracks_give_the_true_points_however_many_views_see_them() -> None:
    scene = arc_scene(14, seen_ratio=0.5)
    assert np.ptp(scene.is_visible.sum(axis=0)) > 8
    found = triangulate_tracks(*arrays(scene), options=OPTIONS)
    assert found.is_valid.mean() > 0.98
    assert errors(found, scene).max() < 1e-9
    assert (found.is_inlier == scene.is_visible & found.is_valid).all()


def test_noise_moves_points_by_about_what_it_should() -> None:
    scene = arc_scene(noise_px=0.5)
    found = triangulate_tracks(*arrays(scene), options=OPTIONS)
    assert 1e-3 < np.median(errors(found, scene)) < 8e-3  # half a pixel is 3e-3 at this range


def test_outliers_are_told_and_do_not_move_the_points() -> None:
    scene = arc_scene(num_points=600)
    moved_xy, is_moved = scene.with_outliers(ratio=0.3)
    found = triangulate_tracks(*arrays(scene, moved_xy), options=OPTIONS)
    num_good = (scene.is_visible & ~is_moved).sum(axis=0)
    is_inlier = found.is_inlier
    assert (
        is_inlier[:, num_good >= 4][(scene.is_visible & ~is_moved)[:, num_good >= 4]].mean() > 0.99
    )
    assert is_inlier[is_moved].mean() < 0.05  # two wrong ones can agree by chance
    assert np.median(errors(found, scene)) < 1e-9


def test_views_that_do_not_see_a_track_have_no_say_in_it() -> None:
    scene = arc_scene()
    plane_xy, is_visible, cameras = arrays(scene)
    found = triangulate_tracks(plane_xy, is_visible, cameras, options=OPTIONS)
    junk = np.where(is_visible[..., None], plane_xy, 1e4)
    behind = np.concatenate([cameras, cameras[:1]])  # a camera that looks away and sees nothing
    behind[-1, [0, 2]] *= -1.0
    again = triangulate_tracks(
        np.concatenate([junk, junk[:1]]),
        np.concatenate([is_visible, np.zeros_like(is_visible[:1])]),
        behind,
        options=OPTIONS,
    )
    np.testing.assert_allclose(
        again.points3D_in_world, found.points3D_in_world, rtol=1e-7, atol=1e-7
    )
    assert (again.is_inlier[:-1] == found.is_inlier).all()
    assert not again.is_inlier[-1].any()


def test_rays_that_are_nearly_parallel_make_no_point() -> None:
    strict = replace(OPTIONS, min_parallax_rad=2.2)  # more than between the outermost cameras
    found = triangulate_tracks(*arrays(arc_scene()), options=strict)
    assert not found.is_valid.any()


@pytest.mark.parametrize(("slope", "meets"), [(0.25, True), (-0.25, False)])
def test_rays_that_meet_behind_the_cameras_make_no_point(slope: float, meets: bool) -> None:
    cameras = np.tile(np.eye(3, 4), (2, 1, 1))
    cameras[:, 0, 3] = [1.0, -1.0]  # left, right
    plane_xy = np.array([[[slope, 0.0]], [[-slope, 0.0]]])
    is_visible = np.ones((2, 1), np.bool_)
    found = triangulate_tracks(plane_xy, is_visible, cameras, options=OPTIONS)
    assert found.is_valid.tolist() == [meets]


def test_tracks_seen_once_make_no_point() -> None:
    scene = arc_scene()
    plane_xy, is_visible, cameras = arrays(scene)
    is_visible[1:] = False
    found = triangulate_tracks(plane_xy, is_visible, cameras, options=OPTIONS)
    assert not found.is_valid.any()
    assert not found.is_inlier.any()


def test_a_good_guess_wins_where_most_pairs_are_wrong() -> None:
    scene = arc_scene(12, seen_ratio=1.0)
    moved_xy, _ = scene.with_outliers(ratio=0.65)
    few = replace(OPTIONS, num_hypotheses=2)
    alone = triangulate_tracks(*arrays(scene, moved_xy), options=few)
    guess = scene.points.copy()
    guess[::2] = np.nan  # half of the tracks have none
    helped = triangulate_tracks(*arrays(scene, moved_xy), options=few, guess_in_world=guess)
    assert helped.is_inlier[:, 1::2].sum() > 1.3 * alone.is_inlier[:, 1::2].sum()
    assert (helped.points3D_in_world[::2] == alone.points3D_in_world[::2]).all()


def test_the_same_tracks_give_the_same_points() -> None:
    inputs = arrays(arc_scene(12, noise_px=0.5))
    first, second = (triangulate_tracks(*inputs, options=OPTIONS) for _ in range(2))
    assert (first.points3D_in_world == second.points3D_in_world).all()


@pytest.mark.parametrize("seed", [0, 7])
def test_pairs_of_views_are_drawn_as_torch_draws_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.rand((2, 50, 12), generator=generator, dtype=torch.float64).numpy()
    assert (_draws((2, 50, 12), seed=seed) == expected).all()


@pytest.mark.parametrize("with_guess", [False, True])
@pytest.mark.parametrize(("num_views", "seen_ratio"), [(5, 0.9), (14, 0.5), (25, 1.0)])
def test_tensors_of_pytorch_give_the_points_of_numpy(
    num_views: int, seen_ratio: float, with_guess: bool
) -> None:
    scene = arc_scene(num_views, noise_px=0.5, seen_ratio=seen_ratio)
    moved_xy, _ = scene.with_outliers(ratio=0.2)
    guess = scene.points + 0.01 if with_guess else None
    found = triangulate_tracks(*arrays(scene, moved_xy), options=OPTIONS, guess_in_world=guess)
    again = triangulate_tracks(
        *tensors(scene, moved_xy),
        options=OPTIONS,
        guess_in_world=None if guess is None else torch.from_numpy(guess),
    )
    assert all(
        isinstance(array, np.ndarray)
        for array in (found.points3D_in_world, found.is_inlier, found.is_valid)
    )
    assert found.is_valid.mean() > 0.9
    assert (again.is_valid.numpy() == found.is_valid).all()
    assert (again.is_inlier.numpy() == found.is_inlier).all()
    np.testing.assert_allclose(
        again.points3D_in_world.numpy()[found.is_valid],
        found.points3D_in_world[found.is_valid],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.slow
@pytest.mark.parametrize("with_guess", [False, True])
def test_gradients_agree_with_finite_differences(with_guess: bool) -> None:
    scene = arc_scene(5, num_points=6, noise_px=1.0, seen_ratio=0.9)
    moved_xy, _ = scene.with_outliers(ratio=0.1)
    plane_xy, is_visible, cameras = tensors(scene, moved_xy)
    guess = torch.from_numpy(scene.points.copy()) if with_guess else None

    def points(plane_xy: Tensor, cameras: Tensor) -> Tensor:
        found = triangulate_tracks(
            plane_xy, is_visible, cameras, options=OPTIONS, guess_in_world=guess
        )
        assert found.is_valid.sum() >= 4
        valid: Tensor = found.points3D_in_world[found.is_valid]
        return valid

    inputs = (plane_xy.requires_grad_(), cameras.requires_grad_())
    assert torch.autograd.gradcheck(points, inputs)
    gradient, _ = torch.autograd.grad(points(*inputs).sum(), inputs)
    assert (gradient[is_visible].abs().amax(dim=1) > 1e-3).float().mean() > 0.7
    assert (gradient[~is_visible] == 0).all()


def test_gradients_lead_to_the_true_tracks() -> None:
    scene = arc_scene(6, num_points=40, seen_ratio=1.0)
    plane_xy, is_visible, cameras = tensors(scene)
    noise = 1e-3 * torch.randn(plane_xy.shape, generator=torch.Generator().manual_seed(0))
    learned = (plane_xy + noise.double()).requires_grad_()
    losses = []
    for _ in range(40):
        found = triangulate_tracks(learned, is_visible, cameras, options=OPTIONS)
        truth = torch.from_numpy(scene.points)[found.is_valid]
        loss = (found.points3D_in_world[found.is_valid] - truth).square().sum()
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, learned)
        learned = (learned - 0.003 * gradient).requires_grad_()
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.gpu
def test_the_gpu_finds_the_same_points() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    inputs = tensors(arc_scene(12, noise_px=0.5))
    on_cpu = triangulate_tracks(*inputs, options=OPTIONS)
    on_gpu = triangulate_tracks(*(tensor.cuda() for tensor in inputs), options=OPTIONS)
    torch.testing.assert_close(on_gpu.points3D_in_world.cpu(), on_cpu.points3D_in_world)


def test_points_of_a_window_that_agree_already_stay_to_the_bit() -> None:
    scene = arc_scene(noise_px=0.3)
    model = WindowModel.of(scene.problem(focal_px=np.array([FOCAL_PX])), min_score=0.0)
    model.cam_from_world, model.is_posed[:] = scene.poses.copy(), True
    config = WindowSolverConfig()
    triangulate_window(model, max_angle_rad=0.01, config=config)
    before = model.points3D_in_world.copy()
    before[::3] = np.nan
    model.points3D_in_world = before.copy()
    triangulate_window(model, max_angle_rad=0.01, config=config)
    has_stayed = np.isfinite(before[:, 0])
    assert (model.points3D_in_world[has_stayed] == before[has_stayed]).all()
    assert model.has_point[~has_stayed].all()
