"""Three views of one scene agree, and no others do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.estimators.three_view import (
    MAX_CYCLE_RAD,
    MIN_INLIERS,
    ThreeViewAgreement,
    View,
    cycle_angle_rad,
    three_view_agreement,
)
from engine.geometry import compose_poses, invert_pose, rotation_from_vector
from engine.types import Float64Array, FrameId, ImagePair, Int64Array
from tests.support.false_pairs import random_geometry_matches
from tests.support.synthetic import (
    SyntheticCamera,
    SyntheticWorld,
    ground,
    round_path,
    spoil_matches,
    straight_path,
)

LONG_LENS = SyntheticCamera(params=(1900.0, 320.0, 240.0, 0.0))
FISHEYE = SyntheticCamera(model="OPENCV_FISHEYE", params=(260.0, 260.0, 320.0, 240.0, 0, 0, 0, 0))


def room(rng: np.random.Generator, num: int = 1500) -> Float64Array:
    """Points (num, 3) on the walls and the floor of a room, 12 by 12 and 5 high."""
    points = rng.uniform((-6.0, -6.0, 0.0), (6.0, 6.0, 5.0), (num, 3))
    side = rng.integers(0, 5, num)
    points[side == 0, 0], points[side == 1, 0] = -6.0, 6.0
    points[side == 2, 1], points[side == 3, 1] = -6.0, 6.0
    points[side == 4, 2] = 0.0
    return points


def world(kind: str) -> SyntheticWorld:
    """Three views of a kind of scene."""
    path = straight_path(3)
    if kind == "plane":
        return SyntheticWorld(path, points=ground(path, density=1.0, relief=0.0), noise_px=0.5)
    if kind == "room":
        points = room(np.random.default_rng(3))
        centred = round_path(24, radius=2.0)[:3]
        return SyntheticWorld(centred, points=points, noise_px=0.5)
    if kind == "long lens":
        points = ground(path, density=9.0)
        return SyntheticWorld(path, points=points, cameras=(LONG_LENS,), noise_px=0.5)
    if kind == "fisheye":
        return SyntheticWorld(path, density=1.0, cameras=(FISHEYE,), noise_px=0.5)
    return SyntheticWorld(path, density=1.0, noise_px=0.5)


def rows(of: SyntheticWorld, one: int, other: int) -> Int64Array:
    return of.matches(ImagePair.of(FrameId(one), FrameId(other))).astype(np.int64)


def relative(of: SyntheticWorld, one: int, other: int) -> Float64Array:
    return compose_poses(of.pose(other), invert_pose(of.pose(one)))


def agreement(
    of: SyntheticWorld,
    *,
    matches_ab: Int64Array | None = None,
    matches_ac: Int64Array | None = None,
    matches_bc: Int64Array | None = None,
    b_from_a: Float64Array | None = None,
) -> ThreeViewAgreement:
    """Frames 1, 2 and 3, with the true matches and pose where no others are given."""
    first, second, third = (
        View.of(of.camera(i).as_colmap(), of.view(i).points_xy) for i in (1, 2, 3)
    )
    return three_view_agreement(
        (first, second, third),
        matches_ab=rows(of, 1, 2) if matches_ab is None else matches_ab,
        matches_ac=rows(of, 1, 3) if matches_ac is None else matches_ac,
        matches_bc=rows(of, 2, 3) if matches_bc is None else matches_bc,
        b_from_a=relative(of, 1, 2) if b_from_a is None else b_from_a,
        seed=0,
    )


@pytest.mark.parametrize("kind", ["ground", "plane", "room", "long lens", "fisheye"])
def test_three_views_of_one_scene_agree(kind: str) -> None:
    found = agreement(world(kind))

    assert found.holds
    assert found.num_inliers >= 3 * MIN_INLIERS
    assert found.share > 0.95


def test_the_length_of_the_baseline_does_not_matter() -> None:
    scene = world("ground")
    pose = relative(scene, 1, 2)
    pose[:, 3] *= 1000.0

    assert agreement(scene, b_from_a=pose).holds


def test_some_wrong_matches_do_not_hide_that_three_views_agree() -> None:
    scene = world("ground")
    rng = np.random.default_rng(1)
    spoiled = [
        spoil_matches(rows(scene, a, b).astype(np.uint32), wrong_ratio=0.1, rng=rng).astype(
            np.int64
        )
        for a, b in ((1, 2), (1, 3), (2, 3))
    ]

    found = agreement(scene, matches_ab=spoiled[0], matches_ac=spoiled[1], matches_bc=spoiled[2])

    assert found.holds
    assert found.share < 1.0  # the wrong ones are seen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("false", ["ab", "ac", "bc"])
def test_no_three_views_agree_when_one_pair_has_a_geometry_of_its_own(
    false: str, seed: int
) -> None:
    scene = world("ground")
    ends = {"ab": (1, 2), "ac": (1, 3), "bc": (2, 3)}[false]
    wrong = random_geometry_matches(
        *(scene.view(i).points_xy for i in ends),
        camera=scene.camera(1),
        num=150,
        rng=np.random.default_rng(seed),
    ).astype(np.int64)
    assert len(wrong) >= 25

    found = agreement(scene, **{f"matches_{false}": wrong})  # type: ignore[arg-type]

    assert not found.holds


def test_views_that_share_hardly_any_point_are_not_posed() -> None:
    scene = world("ground")

    found = agreement(scene, matches_ac=rows(scene, 1, 3)[:3], matches_bc=rows(scene, 2, 3)[:3])

    assert found == ThreeViewAgreement(num_inliers=0, share=0.0)


def test_right_poses_turn_back_to_where_they_began() -> None:
    scene = world("ground")

    angle = cycle_angle_rad(relative(scene, 1, 2), relative(scene, 2, 3), relative(scene, 1, 3))

    assert angle == pytest.approx(0.0, abs=1e-6)


def test_a_wrong_turn_does_not_end_where_it_began() -> None:
    scene = world("ground")
    turn = np.column_stack([rotation_from_vector(np.array([0.0, 0.5, 0.0])), np.zeros(3)])
    wrong = compose_poses(turn, relative(scene, 1, 3))

    angle = cycle_angle_rad(relative(scene, 1, 2), relative(scene, 2, 3), wrong)

    assert angle == pytest.approx(0.5, abs=1e-6)
    assert angle > MAX_CYCLE_RAD == math.radians(15.0)
