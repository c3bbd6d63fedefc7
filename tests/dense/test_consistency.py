"""Depth maps of several keyframes compared: votes, and what others see through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.dense.consistency import OtherDepth, compare_depths, with_agreement
from engine.dense_types import DepthMap
from engine.geometry import compose_poses, invert_pose
from engine.types import Float64Array, FrameId
from tests.support.depth_scenes import BOX, PINHOLE, WALL, Rectangle, pose_at, render

KEYFRAME = pose_at((0.0, 0.0, 0.0))
SCENE = [WALL, BOX]


def true_map(scene: list[Rectangle], pose: Float64Array, *, error: float = 0.003) -> DepthMap:
    rendered = render(scene, pose, PINHOLE)
    known = np.isfinite(rendered.depth)
    return DepthMap(
        frame_id=FrameId(1),
        pinhole=np.array(PINHOLE.params),
        depth=np.where(known, rendered.depth, 0.0),
        relative_error=np.where(known, error, 0.0),
        num_agreeing=known.astype(np.uint8),
        colors=rendered.pixels,
        neighbour_ids=np.array([2]),
        neighbour_from_keyframe=np.zeros((1, 3, 4)),
    )


def other_at(center: tuple[float, float, float], scene: list[Rectangle]) -> OtherDepth:
    pose = pose_at(center)
    return OtherDepth(
        depth_map=true_map(scene, pose),
        other_from_keyframe=compose_poses(pose, invert_pose(KEYFRAME)),
    )


def test_true_depth_maps_agree_where_both_see_and_nobody_sees_through() -> None:
    others = [other_at((0.8, 0.0, 0.0), SCENE), other_at((-0.8, 0.1, 0.3), SCENE)]
    depth_map = true_map(SCENE, KEYFRAME)
    agreement = compare_depths(depth_map, others)
    assert agreement.num_agreeing.shape == depth_map.depth.shape
    assert (agreement.num_agreeing == 2).mean() > 0.6
    assert (agreement.num_agreeing >= 1).mean() > 0.93
    assert (agreement.num_through > 0).mean() < 0.005
    kept = with_agreement(depth_map, agreement)
    assert (kept.depth > 0).mean() > 0.99
    assert kept.num_agreeing.max() == 3


def test_a_moving_object_in_one_map_is_seen_through_by_the_others() -> None:
    passer = Rectangle(corner=(-0.5, -0.6, 3.0), right=(1.0, 0, 0), down=(0, 1.2, 0), seed=9)
    depth_map = true_map([WALL, passer], KEYFRAME)
    others = [other_at((0.8, 0.0, 0.0), [WALL]), other_at((-0.8, 0.0, 0.0), [WALL])]
    is_passer = depth_map.depth < 3.2
    assert is_passer.mean() > 0.1
    kept = with_agreement(depth_map, compare_depths(depth_map, others))
    assert (kept.depth[is_passer] > 0).mean() < 0.05
    assert (kept.depth[~is_passer] > 0).mean() > 0.97
    by_passer_itself = compare_depths(
        true_map([WALL], KEYFRAME),
        [replace(others[0], depth_map=true_map([WALL, passer], pose_at((0.8, 0.0, 0.0))))],
    )
    assert (by_passer_itself.num_through > 0).mean() < 0.005  # hidden is not contradicted


def test_wrong_depth_is_not_agreed_on_and_noise_within_its_error_is() -> None:
    depth_map = true_map(SCENE, KEYFRAME)
    others = [other_at((0.8, 0.0, 0.0), SCENE)]
    true = compare_depths(depth_map, others).num_agreeing
    far = replace(depth_map, depth=depth_map.depth * np.float32(1.05))
    assert (compare_depths(far, others).num_agreeing > 0).mean() < 0.02
    near = replace(depth_map, depth=depth_map.depth * np.float32(0.93))
    agreement = compare_depths(near, others)
    assert (agreement.num_agreeing > 0).mean() < 0.02
    assert (agreement.num_through[true > 0] > 0).mean() > 0.9
    rng = np.random.default_rng(0)
    noise = 1.0 + 0.003 * rng.normal(size=depth_map.depth.shape)
    noisy = replace(depth_map, depth=depth_map.depth * noise.astype(np.float32))
    assert (compare_depths(noisy, others).num_agreeing > 0).sum() > 0.95 * (true > 0).sum()


def test_two_images_have_one_vote_between_them_whichever_map_was_made_of_both() -> None:
    depth_map, other = true_map(SCENE, KEYFRAME), other_at((0.8, 0.0, 0.0), SCENE)
    agrees = compare_depths(depth_map, [other]).num_agreeing > 0
    assert agrees.mean() > 0.5
    of_neighbour = replace(
        other, depth_map=replace(other.depth_map, frame_id=FrameId(depth_map.neighbour_ids[0]))
    )
    assert not compare_depths(depth_map, [of_neighbour]).num_agreeing.any()
    # Where the neighbour's own image did not agree, its map is a vote of its own.
    bits = np.ones_like(depth_map.num_agreeing)
    bits[:, :80] = 0
    partly = replace(depth_map, agreeing_bits=bits)
    assert np.array_equal(
        compare_depths(partly, [of_neighbour]).num_agreeing > 0, agrees & (bits == 0)
    )
    near = replace(partly, depth=depth_map.depth * np.float32(0.93))
    assert compare_depths(near, [of_neighbour]).num_through.any()


def test_maps_behind_one_another_or_empty_say_nothing() -> None:
    depth_map = true_map(SCENE, KEYFRAME)
    behind = OtherDepth(
        depth_map=depth_map, other_from_keyframe=pose_at((0.0, 0.0, 0.0), yaw_deg=180.0)
    )
    empty = OtherDepth(
        depth_map=replace(
            depth_map,
            depth=np.zeros_like(depth_map.depth),
            num_agreeing=np.zeros_like(depth_map.num_agreeing),
        ),
        other_from_keyframe=pose_at((0.1, 0.0, 0.0)),
    )
    agreement = compare_depths(depth_map, [behind, empty])
    assert not agreement.num_agreeing.any()
    assert not agreement.num_through.any()
    assert np.array_equal(with_agreement(depth_map, agreement).depth, depth_map.depth)
