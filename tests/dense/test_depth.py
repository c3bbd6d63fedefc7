"""Depth maps of rendered scenes against the truth, and why there are none."""

from __future__ import annotations

import cv2
import numpy as np
import pycolmap
import pytest

from engine.camera_models import CAMERA_MODEL_NAMES
from engine.dense.depth import DepthOptions, estimate_depth
from engine.dense_types import DenseImage, DepthEstimate, DepthMap, DepthProblem, DepthStatus
from engine.errors import InferenceError
from engine.types import Float64Array, FrameId, Intrinsics
from tests.support.depth_scenes import (
    BOX,
    FISHEYE,
    GROUND,
    HEIGHT,
    PINHOLE,
    WALL,
    WIDTH,
    Rectangle,
    Rendered,
    pose_at,
    problem_of,
    relative_errors,
)

OPTIONS = DepthOptions(edge_px=512, num_neighbours=2)
KEYFRAME = pose_at((0.0, 0.0, 0.0))


def made(estimate: DepthEstimate) -> DepthMap:
    assert estimate.depth_map is not None, estimate.reason
    assert estimate.status is DepthStatus.MADE
    return estimate.depth_map


def assert_right(
    depth_map: DepthMap,
    truth: Rendered,
    intrinsics: Intrinsics = PINHOLE,
    *,
    median: float,
    within_2: float,
    filled: float,
) -> None:
    errors = relative_errors(depth_map, truth, intrinsics)
    assert np.median(errors) < median
    assert np.mean(errors < 0.02) > within_2
    assert len(errors) / depth_map.depth.size > filled


@pytest.mark.parametrize(
    "center", [(1.2, 0.0, 0.0), (-1.2, 0.0, 0.0), (0.0, 1.2, 0.0), (0.9, -0.8, 0.1)]
)
def test_depth_is_right_whatever_way_the_camera_moved_sideways(
    center: tuple[float, float, float],
) -> None:
    problem, images, truth = problem_of([WALL, BOX], [KEYFRAME, pose_at(center)])
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    assert_right(depth_map, truth, median=0.005, within_2=0.97, filled=0.5)


def test_forward_motion_gives_depth_but_at_the_point_flown_to() -> None:
    poses = [KEYFRAME, pose_at((0.05, 0.02, 2.0))]
    problem, images, truth = problem_of([WALL, BOX, GROUND], poses)
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    assert_right(depth_map, truth, median=0.007, within_2=0.9, filled=0.2)
    middle = depth_map.relative_error[55:65, 75:85]
    assert (middle == 0).mean() > 0.5  # no parallax there


def test_backward_motion_gives_depth() -> None:
    poses = [KEYFRAME, pose_at((0.05, 0.02, -2.0))]
    problem, images, truth = problem_of([WALL, BOX, GROUND], poses)
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    assert_right(depth_map, truth, median=0.007, within_2=0.9, filled=0.2)


def test_a_fisheye_gets_the_depth_of_its_middle() -> None:
    poses = [KEYFRAME, pose_at((1.5, 0.0, 0.0), yaw_deg=-6.0)]
    problem, images, truth = problem_of([WALL, BOX, GROUND], poses, FISHEYE)
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    assert_right(depth_map, truth, FISHEYE, median=0.01, within_2=0.95, filled=0.15)
    half_width = depth_map.depth.shape[1] / 2 / depth_map.pinhole[0]
    assert half_width == pytest.approx(1.0, abs=0.02)  # 90 degrees


def test_two_neighbours_agree_and_are_more_exact_than_one() -> None:
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0)), pose_at((-1.2, 0.05, 0.0))]
    problem, images, truth = problem_of([WALL, BOX], poses)
    both = made(estimate_depth(problem, images, OPTIONS))
    one = made(estimate_depth(problem, images, DepthOptions(edge_px=512, num_neighbours=1)))
    assert len(both.neighbour_ids) == 2
    assert len(one.neighbour_ids) == 1
    assert one.num_agreeing.max() == 1
    assert np.mean(both.num_agreeing[both.num_agreeing > 0] == 2) > 0.5
    agreed = both.num_agreeing == 2
    assert both.agreeing_bits is not None
    assert np.array_equal(
        np.bitwise_count(both.agreeing_bits)[both.depth > 0] == 2, agreed[both.depth > 0]
    )
    assert np.median(both.relative_error[agreed]) < np.median(one.relative_error[one.depth > 0])
    assert np.median(relative_errors(both, truth, PINHOLE)) < np.median(
        relative_errors(one, truth, PINHOLE)
    )


class _PartlyBroken(dict[FrameId, DenseImage]):
    """Images by keyframe, of which some cannot be read."""

    broken: tuple[FrameId, ...] = ()

    def __getitem__(self, frame_id: FrameId) -> DenseImage:
        if frame_id in self.broken:
            raise InferenceError(f"{frame_id}: the image cannot be read")
        return super().__getitem__(frame_id)


def test_a_neighbour_whose_image_cannot_be_read_is_as_if_it_were_missing() -> None:
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0)), pose_at((-1.2, 0.05, 0.0))]
    problem, whole, _ = problem_of([WALL, BOX], poses)
    images = _PartlyBroken(whole)
    first, second = (neighbour.frame_id for neighbour in problem.neighbours)
    images.broken = (first,)
    assert made(estimate_depth(problem, images, OPTIONS)).neighbour_ids.tolist() == [second]
    images.broken = (first, second)
    assert estimate_depth(problem, images, OPTIONS).status is DepthStatus.NO_IMAGE
    images.broken = (problem.view.frame_id,)
    with pytest.raises(InferenceError):
        estimate_depth(problem, images, OPTIONS)


def test_the_claimed_error_is_about_the_true_one() -> None:
    problem, images, truth = problem_of([WALL], [KEYFRAME, pose_at((1.2, 0.0, 0.0))])
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    errors = relative_errors(depth_map, truth, PINHOLE)
    ratio = errors / depth_map.relative_error[depth_map.depth > 0]
    assert 0.1 < np.median(ratio) < 1.2


def test_masked_pixels_have_no_depth_by_either_image() -> None:
    mask = np.ones((HEIGHT, WIDTH), np.bool_)
    mask[:, :60] = False
    other_mask = np.ones((HEIGHT, WIDTH), np.bool_)
    other_mask[70:] = False
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0))]
    problem, images, truth = problem_of([WALL, BOX], poses, masks=[mask, other_mask])
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    assert not (depth_map.depth[:, :59] > 0).any()
    assert not (depth_map.depth[72:] > 0).any()
    assert (depth_map.depth[:68, 80:130] > 0).mean() > 0.6
    assert np.mean(relative_errors(depth_map, truth, PINHOLE) < 0.02) > 0.97


def test_the_sky_has_no_depth() -> None:
    ground = Rectangle(corner=(-30.0, 1.4, -5.0), right=(60.0, 0, 0), down=(0, 0, 17.0), seed=3)
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0))]
    problem, images, truth = problem_of([ground, BOX], poses)
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    is_sky = ~np.isfinite(truth.depth)
    assert is_sky.mean() > 0.2
    far_off = cv2.erode(is_sky.astype(np.uint8), np.ones((13, 13))) > 0
    assert (depth_map.depth[far_off] > 0).mean() < 0.02
    assert (depth_map.depth[~is_sky] > 0).mean() > 0.4


def test_an_image_of_nothing_but_sky_has_no_depth_map() -> None:
    problem, images, _ = problem_of([WALL], [KEYFRAME, pose_at((1.2, 0.0, 0.0))])
    rng = np.random.default_rng(0)
    blank = {
        frame_id: DenseImage(
            pixels=np.clip(200 + rng.normal(size=(HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
        )
        for frame_id in images
    }
    estimate = estimate_depth(problem, blank, OPTIONS)
    assert estimate.status is DepthStatus.NOTHING_AGREES
    assert estimate.depth_map is None


def test_without_parallax_there_is_no_neighbour() -> None:
    for pose in (KEYFRAME, pose_at((0.0, 0.0, 0.0), yaw_deg=5.0), pose_at((0.01, 0.0, 0.0))):
        problem, images, _ = problem_of([WALL], [KEYFRAME, pose])
        assert estimate_depth(problem, images, OPTIONS).status is DepthStatus.NO_NEIGHBOUR


def test_too_few_points_and_missing_images_are_said() -> None:
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0))]
    problem, images, _ = problem_of([WALL], poses, num_points=8)
    assert estimate_depth(problem, images, OPTIONS).status is DepthStatus.TOO_FEW_POINTS
    problem, images, _ = problem_of([WALL], poses)
    for missing in images:
        others = {key: image for key, image in images.items() if key != missing}
        assert estimate_depth(problem, others, OPTIONS).status is DepthStatus.NO_IMAGE


def test_what_only_the_keyframe_sees_gets_no_wrong_depth() -> None:
    passer = Rectangle(corner=(-0.5, -0.6, 3.0), right=(1.0, 0, 0), down=(0, 1.2, 0), seed=9)
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0)), pose_at((-1.2, 0.0, 0.0))]
    problem, images, _ = problem_of([WALL], poses)
    _, with_passer, truth = problem_of([WALL, passer], poses[:1])
    images[FrameId(1)] = with_passer[FrameId(1)]
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    is_passer = truth.depth < 3.5
    assert is_passer.mean() > 0.1
    assert (depth_map.depth[is_passer] > 0).mean() < 0.25
    assert (depth_map.num_agreeing[is_passer] > 1).mean() < 0.05
    assert (depth_map.depth[~is_passer] > 0).mean() > 0.5


def noisy_pose(pose: Float64Array, degrees: float, rng: np.random.Generator) -> Float64Array:
    turn, _ = cv2.Rodrigues(rng.normal(size=3) * np.deg2rad(degrees))
    return np.asarray(turn @ pose)


def test_noise_in_poses_costs_exactness_and_is_not_hidden() -> None:
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0)), pose_at((-1.2, 0.05, 0.0))]
    rng = np.random.default_rng(1)
    claimed = [poses[0], *(noisy_pose(pose, 0.15, rng) for pose in poses[1:])]  # 0.3 px
    problem, images, truth = problem_of([WALL, BOX], poses, claimed_poses=claimed)
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    errors = relative_errors(depth_map, truth, PINHOLE)
    assert 0.002 < np.median(errors) < 0.03
    wrong = [poses[0], *(noisy_pose(pose, 3.0, rng) for pose in poses[1:])]
    problem, images, truth = problem_of([WALL, BOX], poses, claimed_poses=wrong)
    spoiled = estimate_depth(problem, images, OPTIONS).depth_map
    agreed = 0.0 if spoiled is None else float((spoiled.num_agreeing > 1).mean())
    assert agreed < 0.1


def test_a_smaller_image_serves_as_well() -> None:
    large = Intrinsics(model="PINHOLE", width=320, height=240, params=(260.0, 260.0, 160.0, 120.0))
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0))]
    problem, images, truth = problem_of([WALL, BOX], poses, large)
    by_large = made(estimate_depth(problem, images, DepthOptions(edge_px=160, num_neighbours=1)))
    halves = {
        key: DenseImage(
            pixels=image.pixels.reshape(120, 2, 160, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
        )
        for key, image in images.items()
    }
    by_halves = made(estimate_depth(problem, halves, DepthOptions(edge_px=160, num_neighbours=1)))
    assert by_large.depth.shape == by_halves.depth.shape == (120, 160)
    for depth_map in (by_large, by_halves):
        assert_right(depth_map, truth, large, median=0.005, within_2=0.97, filled=0.5)


def test_a_portrait_edge_is_bounded() -> None:
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0))]
    problem, images, _ = problem_of([WALL, BOX], poses)
    depth_map = made(estimate_depth(problem, images, DepthOptions(edge_px=96, num_neighbours=1)))
    assert depth_map.depth.shape == (72, 96)


def test_the_same_problem_has_the_same_depth_to_the_bit() -> None:
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0)), pose_at((-1.2, 0.05, 0.0))]
    problem, images, _ = problem_of([WALL, BOX], poses)
    first = made(estimate_depth(problem, images, OPTIONS))
    turned = DepthProblem(view=problem.view, neighbours=problem.neighbours)
    again = made(estimate_depth(turned, images, OPTIONS))
    assert np.array_equal(first.depth, again.depth)
    assert np.array_equal(first.num_agreeing, again.num_agreeing)


@pytest.mark.parametrize("name", CAMERA_MODEL_NAMES)
def test_every_lens_of_colmap_gets_a_right_depth_map(name: str) -> None:
    width, height = (480, 240) if name == "EQUIRECTANGULAR" else (WIDTH, HEIGHT)
    camera = pycolmap.Camera.create_from_model_name(1, name, 100.0, width, height)
    params = np.array(camera.params)
    if name in {"SIMPLE_RADIAL", "RADIAL"}:
        params[3] = -0.02
    lens = Intrinsics(model=name, width=width, height=height, params=tuple(map(float, params)))
    poses = [KEYFRAME, pose_at((1.2, 0.0, 0.0))]
    problem, images, truth = problem_of([WALL, BOX, GROUND], poses, lens, num_points=300)
    depth_map = made(estimate_depth(problem, images, OPTIONS))
    assert_right(depth_map, truth, lens, median=0.008, within_2=0.9, filled=0.25)
