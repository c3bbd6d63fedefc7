"""The path through every frame on a map that moves."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.views.display_trajectory import FRAMES_PER_PART, DisplayTrajectory
from engine.types import Float64Array


def straight_walk(trajectory: DisplayTrajectory, num_frames: int) -> Float64Array:
    """Reports frames 1, 2, 3, ... one unit apart along x; returns their positions."""
    positions = np.column_stack([np.arange(1.0, num_frames + 1), np.zeros((num_frames, 2))])
    for frame_id, (x, y, z) in enumerate(positions.tolist(), start=1):
        trajectory.add(frame_id, (x, y, z))
    return positions


def test_the_path_runs_through_the_keyframes_after_the_map_moved() -> None:
    trajectory = DisplayTrajectory()
    reported = straight_walk(trajectory, 21)
    keyframe_ids = np.array([1, 11, 21])
    moved = reported[[0, 10, 20]] + [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 4.0, 0.0]]
    trajectory.move(keyframe_ids, moved)
    ids, positions = trajectory.positions()

    assert ids.tolist() == list(range(1, 22))
    assert np.allclose(positions[[0, 10, 20]], moved)
    assert positions[5, 1] == pytest.approx(0.5)  # half way between two keyframes
    assert positions[15, 1] == pytest.approx(2.5)


def test_frames_before_the_first_and_after_the_last_keyframe_move_with_them() -> None:
    trajectory = DisplayTrajectory()
    straight_walk(trajectory, 10)
    trajectory.move(np.array([4, 6]), np.array([[4.0, 1.0, 0.0], [6.0, 2.0, 0.0]]))
    _, positions = trajectory.positions()

    assert np.allclose(positions[:4, 1], 1.0)
    assert np.allclose(positions[5:, 1], 2.0)


def test_frames_of_a_map_that_another_one_replaced_are_no_part_of_the_path() -> None:
    trajectory = DisplayTrajectory()
    straight_walk(trajectory, 10)
    trajectory.forget()
    trajectory.add(4, (50.0, 0.0, 0.0))
    trajectory.add(5, (51.0, 0.0, 0.0))
    ids, positions = trajectory.positions()

    assert ids.tolist() == [4, 5]
    assert positions[:, 0].tolist() == [50.0, 51.0]
    assert trajectory.tail()[:, 0].tolist() == [50.0, 51.0]


def test_keyframes_may_come_in_any_order() -> None:
    trajectory = DisplayTrajectory()
    straight_walk(trajectory, 3)
    trajectory.move(np.array([3, 1]), np.array([[3.0, 9.0, 0.0], [1.0, 5.0, 0.0]]))
    _, positions = trajectory.positions()

    assert positions[:, 1].tolist() == [5.0, 7.0, 9.0]


def test_a_gap_is_left_open() -> None:
    trajectory = DisplayTrajectory()
    straight_walk(trajectory, 10)
    trajectory.add(11, (500.0, 0.0, 0.0))
    trajectory.add(12, (501.0, 0.0, 0.0))
    (part,) = trajectory.parts().values()

    assert len(part.positions) == 10  # 9 steps, not the jump, 1 step
    assert np.linalg.norm(np.diff(part.positions, axis=1), axis=2).max() == pytest.approx(1.0)


def test_a_long_path_comes_in_parts_that_join() -> None:
    trajectory = DisplayTrajectory()
    positions = straight_walk(trajectory, 2 * FRAMES_PER_PART)
    parts = trajectory.parts()
    segments = np.concatenate([part.positions for part in parts.values()])

    assert len(parts) == 3
    assert np.allclose(segments[:, 0], positions[:-1])
    assert np.allclose(segments[:, 1], positions[1:])


def test_a_standing_camera_and_a_single_frame_give_a_path() -> None:
    trajectory = DisplayTrajectory()
    trajectory.add(1, (0.0, 0.0, 0.0))
    assert trajectory.parts() == {}
    trajectory.add(2, (0.0, 0.0, 0.0))
    assert len(trajectory.parts()[0].positions) == 1


def test_the_tail_starts_where_the_drawn_path_ends() -> None:
    trajectory = DisplayTrajectory()
    straight_walk(trajectory, 5)
    assert len(trajectory.tail()) == 5
    trajectory.cut_tail()
    trajectory.add(6, (6.0, 0.0, 0.0))

    assert trajectory.tail()[:, 0].tolist() == [5.0, 6.0]
