"""Which neighbours a keyframe is matched with."""

from __future__ import annotations

from engine.dense.neighbours import rank_neighbours
from tests.support.depth_scenes import WALL, pose_at, problem_of

KEYFRAME = pose_at((0.0, 0.0, 0.0))


def ranked(*centers: tuple[float, float, float], num_points: int = 150) -> list[int]:
    poses = [KEYFRAME, *(pose_at(center) for center in centers)]
    problem, _, _ = problem_of([WALL], poses, num_points=num_points)
    return [view.frame_id - 2 for view in rank_neighbours(problem)]


def test_a_useful_angle_comes_before_a_tiny_and_a_huge_one() -> None:
    assert ranked((0.2, 0.0, 0.0), (0.9, 0.0, 0.0), (2.5, 0.0, 0.0))[0] == 1


def test_the_second_lies_on_another_side() -> None:
    assert ranked((0.9, 0.0, 0.0), (1.0, 0.0, 0.0), (-0.8, 0.0, 0.0))[1] == 2


def test_no_parallax_other_scales_and_few_shared_points_are_of_no_use() -> None:
    assert ranked((0.0, 0.0, 0.0), (0.02, 0.0, 0.0)) == []
    assert ranked((0.5, 0.0, -8.0)) == []
    assert ranked((0.9, 0.0, 0.0), num_points=10) == []
