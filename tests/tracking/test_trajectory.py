"""Poses that were measured: moved keyframes, short gaps, several maps, cameras side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from engine.geometry import camera_center, compose_poses, interpolate_poses, invert_pose
from engine.tracking.trajectory import KeyframeState, Trajectory
from engine.types import (
    Features,
    Float64Array,
    FrameId,
    FramePose,
    Keyframe,
    PoseKind,
    TrackedFrame,
)
from tests.support.two_view_scenes import pose_at

FIRST_POSE = pose_at((1.0, 2.0, 3.0), rotation_vector=(0.1, -0.4, 0.2))
MOTION = pose_at((0.3, 0.0, 0.1), rotation_vector=(0.0, 0.2, 0.0))  # tracked from keyframe


def keyframe(
    number: int, *, captured_at_s: float | None = None, camera: str = "a", is_photo: bool = False
) -> Keyframe:
    features = Features(
        frame_id=FrameId(number),
        keypoints_xy=np.empty((0, 2)),
        descriptors=np.empty((0, 128), np.uint8),
        scales=np.empty(0, np.float32),
        colors=np.empty((0, 3), np.uint8),
    )
    return Keyframe(
        frame_id=FrameId(number),
        camera_key=camera,
        index=10 * number,
        name=f"{number}.jpg",
        width=640,
        height=480,
        captured_at_s=float(number) if captured_at_s is None else captured_at_s,
        received_at_s=0.0,
        features=features,
        is_photo=is_photo,
    )


def tracked(number: int, *, of: int, captured_at_s: float | None = None) -> TrackedFrame:
    return TrackedFrame(
        frame_id=FrameId(number),
        keyframe_id=FrameId(of),
        index=10 * number,
        captured_at_s=float(number) if captured_at_s is None else captured_at_s,
        received_at_s=0.0,
        keypoint_idx=np.empty(0, np.int64),
        points_xy=np.empty((0, 2)),
    )


def states(
    poses: Mapping[int, Float64Array], *, scale: float = 1.0
) -> dict[FrameId, KeyframeState]:
    return {
        FrameId(number): KeyframeState(cam_from_world=pose, scale=scale)
        for number, pose in poses.items()
    }


def at_x(x: float) -> Float64Array:
    return pose_at((x, 0.0, 0.0))


def poses_in_map(
    trajectory: Trajectory, keyframes: Mapping[FrameId, KeyframeState]
) -> list[FramePose]:
    (poses,) = trajectory.poses([keyframes])
    return poses


def by_frame(poses: list[FramePose]) -> dict[int, tuple[float, PoseKind]]:
    """Where the cameras stand along x, and how they got there."""
    return {pose.frame_id: (x, pose.kind) for pose, x in zip(poses, xs(poses), strict=True)}


def xs(poses: list[FramePose]) -> list[float]:
    """Where the cameras stand along x, in order."""
    return [round(float(camera_center(pose.cam_from_world)[0]), 9) for pose in poses]


@pytest.fixture
def one_keyframe() -> Trajectory:
    """Keyframe 1 and frame 2, which moved from it by `MOTION`."""
    trajectory = Trajectory(max_interpolation_s=1.0)
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    trajectory.set_relative_pose(frame, cam_from_keyframe=MOTION, scale=1.0)
    return trajectory


# -- frames on their keyframes --------------------------------------------------------------------


def test_without_keyframes_in_a_map_there_are_no_poses(one_keyframe: Trajectory) -> None:
    assert one_keyframe.poses([]) == []
    assert one_keyframe.poses([{}, {}]) == [[], []]
    assert Trajectory(max_interpolation_s=1.0).poses([states({1: FIRST_POSE})]) == [[]]


def test_every_frame_comes_with_what_is_known_of_it(one_keyframe: Trajectory) -> None:
    first, second = poses_in_map(one_keyframe, states({1: FIRST_POSE}))
    assert (first.frame_id, first.index, first.captured_at_s, first.is_keyframe) == (1, 10, 1, True)
    assert (second.frame_id, second.index, second.captured_at_s) == (2, 20, 2.0)
    assert not second.is_keyframe
    assert (first.kind, second.kind) == (PoseKind.KEYFRAME, PoseKind.TRACKED)
    assert len(one_keyframe) == 2


def test_a_frame_follows_its_keyframe_when_it_moves(one_keyframe: Trajectory) -> None:
    for keyframe_pose in (FIRST_POSE, pose_at((-7.0, 0.0, 1.0), rotation_vector=(2.0, 1.0, 0.0))):
        first, second = poses_in_map(one_keyframe, states({1: keyframe_pose}))
        assert np.array_equal(first.cam_from_world, keyframe_pose)
        assert np.allclose(second.cam_from_world, compose_poses(MOTION, keyframe_pose))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_frame_keeps_its_share_of_a_map_that_is_rescaled(
    one_keyframe: Trajectory, scale: float
) -> None:
    _, frame = poses_in_map(one_keyframe, states({1: FIRST_POSE}, scale=scale))
    moved = compose_poses(frame.cam_from_world, invert_pose(FIRST_POSE))
    assert np.allclose(moved[:, :3], MOTION[:, :3])
    assert np.allclose(moved[:, 3], scale * MOTION[:, 3])


def test_a_motion_is_kept_at_the_scale_it_was_found_at() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    trajectory.set_relative_pose(frame, cam_from_keyframe=MOTION, scale=4.0)
    for now, ratio in ((4.0, 1.0), (1.0, 0.25)):
        _, pose = poses_in_map(trajectory, states({1: FIRST_POSE}, scale=now))
        moved = compose_poses(pose.cam_from_world, invert_pose(FIRST_POSE))
        assert np.allclose(moved[:, 3], ratio * MOTION[:, 3])


def test_a_motion_that_is_found_again_replaces_the_first() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    for x in (1.0, 5.0):
        trajectory.set_relative_pose(frame, cam_from_keyframe=at_x(x), scale=1.0)
    assert xs(poses_in_map(trajectory, states({1: at_x(0.0)}))) == [0.0, 5.0]


def test_what_was_found_is_not_changed_by_its_finder() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    motion = MOTION.copy()
    trajectory.set_relative_pose(frame, cam_from_keyframe=motion, scale=2.0)
    assert np.array_equal(motion, MOTION)


# -- frames without a pose of their own -----------------------------------------------------------


def video(
    *times_s: float, max_interpolation_s: float = 1.0, tracked_ids: tuple[int, ...] = ()
) -> Trajectory:
    """Frames 1, 2, ... at some times; those tracked are so from the frame before, unposed."""
    trajectory = Trajectory(max_interpolation_s=max_interpolation_s)
    for number, captured_at_s in enumerate(times_s, start=1):
        if number in tracked_ids:
            trajectory.add_tracked(tracked(number, of=number - 1, captured_at_s=captured_at_s))
        else:
            trajectory.add_keyframe(keyframe(number, captured_at_s=captured_at_s))
    return trajectory


def test_a_frame_without_a_pose_lies_between_keyframes_close_in_time() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    trajectory.add_keyframe(keyframe(1, captured_at_s=10.0))
    trajectory.add_tracked(tracked(2, of=1, captured_at_s=10.2))
    trajectory.add_tracked(tracked(3, of=1, captured_at_s=10.6))
    trajectory.add_keyframe(keyframe(4, captured_at_s=10.8))
    second_pose = compose_poses(MOTION, FIRST_POSE)
    _, early, late, _ = poses_in_map(trajectory, states({1: FIRST_POSE, 4: second_pose}))

    for frame, fraction in ((early, 0.25), (late, 0.75)):
        between = interpolate_poses(FIRST_POSE, second_pose, fraction=fraction)
        assert np.allclose(frame.cam_from_world, between)
        assert frame.kind is PoseKind.INTERPOLATED


@pytest.mark.parametrize(
    ("last_s", "max_s", "is_posed"),
    [(1.0, 1.0, True), (1.01, 1.0, False), (3.0, 3.0, True), (0.2, 0.0, False)],
)
def test_no_frame_lies_between_keyframes_that_are_further_apart_than_configured(
    last_s: float, max_s: float, *, is_posed: bool
) -> None:
    trajectory = video(0.0, 0.1, last_s, max_interpolation_s=max_s)
    poses = by_frame(poses_in_map(trajectory, states({1: at_x(0.0), 3: at_x(1.0)})))
    assert (2 in poses) == is_posed
    assert poses.keys() >= {1, 3}


def test_it_is_the_keyframes_that_must_be_close_and_the_nearest_poses_that_it_lies_between() -> (
    None
):
    trajectory = video(0.0, 0.2, 0.4, 0.6, 1.0, tracked_ids=(2, 3, 4))
    trajectory.set_relative_pose(tracked(2, of=1), cam_from_keyframe=at_x(5.0), scale=1.0)
    trajectory.set_relative_pose(tracked(4, of=1), cam_from_keyframe=at_x(7.0), scale=1.0)
    poses = by_frame(poses_in_map(trajectory, states({1: at_x(0.0), 5: at_x(9.0)})))
    assert poses[3] == (6.0, PoseKind.INTERPOLATED)
    assert poses[2] == (5.0, PoseKind.TRACKED)

    slow = video(0.0, 0.2, 0.4, 0.6, 1.5, tracked_ids=(2, 3, 4))
    slow.set_relative_pose(tracked(2, of=1), cam_from_keyframe=at_x(5.0), scale=1.0)
    slow.set_relative_pose(tracked(4, of=1), cam_from_keyframe=at_x(7.0), scale=1.0)
    assert list(by_frame(poses_in_map(slow, states({1: at_x(0.0), 5: at_x(9.0)})))) == [1, 2, 4, 5]


def test_beyond_the_ends_there_is_no_pose() -> None:
    trajectory = video(0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert list(by_frame(poses_in_map(trajectory, states({3: at_x(3.0), 4: at_x(4.0)})))) == [3, 4]


def test_a_break_in_a_video_gives_no_poses() -> None:
    """Three seconds without texture between two parts of one map."""
    times_s = [0.1 * number for number in range(50)]
    trajectory = video(*times_s, tracked_ids=tuple(range(11, 41)))
    registered = [*range(1, 11), *range(41, 51)]
    poses = poses_in_map(trajectory, states({number: at_x(number) for number in registered}))
    assert [pose.frame_id for pose in poses] == registered


@pytest.mark.parametrize(("turn_rad", "is_posed"), [(0.45, True), (0.55, False), (1.57, False)])
def test_a_camera_that_turned_far_meanwhile_gives_no_poses_in_between(
    turn_rad: float, *, is_posed: bool
) -> None:
    trajectory = video(0.0, 0.1, 0.2)
    turned = pose_at((1.0, 0.0, 0.0), rotation_vector=(0.0, turn_rad, 0.0))
    poses = poses_in_map(trajectory, states({1: at_x(0.0), 3: turned}))
    assert [pose.frame_id for pose in poses] == ([1, 2, 3] if is_posed else [1, 3])


def test_photos_are_never_interpolated() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    for number in (1, 2, 3):
        trajectory.add_keyframe(keyframe(number, captured_at_s=0.1 * number, is_photo=True))
    poses = poses_in_map(trajectory, states({1: at_x(1.0), 3: at_x(3.0)}))
    assert [pose.frame_id for pose in poses] == [1, 3]


def test_a_keyframe_that_left_the_map_lies_between_its_neighbours_and_so_do_its_frames() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    for number in (1, 3, 5):
        trajectory.add_keyframe(keyframe(number, captured_at_s=0.1 * number))
        frame = tracked(number + 1, of=number, captured_at_s=0.1 * number + 0.1)
        trajectory.add_tracked(frame)
        trajectory.set_relative_pose(frame, cam_from_keyframe=at_x(1.0), scale=1.0)
    everything = {1: at_x(1.0), 3: at_x(30.0), 5: at_x(5.0)}
    assert xs(poses_in_map(trajectory, states(everything))) == [1.0, 2.0, 30.0, 31.0, 5.0, 6.0]
    del everything[3]
    poses = poses_in_map(trajectory, states(everything))
    assert xs(poses) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    kinds = [pose.kind for pose in poses]
    assert kinds[2:4] == [PoseKind.INTERPOLATED] * 2
    assert PoseKind.INTERPOLATED not in kinds[:2] + kinds[4:]


def test_a_keyframe_outside_the_map_keeps_the_pose_that_it_was_tracked_to() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    trajectory.set_relative_pose(frame, cam_from_keyframe=at_x(1.0), scale=1.0)
    trajectory.add_keyframe(keyframe(2))
    _, second = poses_in_map(trajectory, states({1: at_x(0.0)}))
    assert second.is_keyframe
    assert second.kind is PoseKind.TRACKED


@pytest.mark.parametrize(
    "times_s",
    [(5.0, 5.0, 5.0), (0.0, 0.9, 0.5), (0.5, 0.1, 0.9), (9.0, 5.0, 1.0), (5.0, 5.2, 1.0)],
    ids=["stopped", "late", "early", "backwards", "jumped back"],
)
def test_a_clock_that_jumps_gives_no_pose(times_s: tuple[float, float, float]) -> None:
    trajectory = video(*times_s)
    assert xs(poses_in_map(trajectory, states({1: at_x(1.0), 3: at_x(3.0)}))) == [1.0, 3.0]


def test_two_cameras_side_by_side_are_not_mixed() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    for number in range(1, 11):
        trajectory.add_keyframe(
            keyframe(number, captured_at_s=0.1 * number, camera="ab"[number % 2])
        )
    left = {1: at_x(1.0), 9: at_x(9.0)}
    right = {2: at_x(102.0), 10: at_x(110.0)}
    poses = poses_in_map(trajectory, states(left | right))

    assert [pose.frame_id for pose in poses] == list(range(1, 11))
    assert xs(poses) == [1.0, 102.0, 3.0, 104.0, 5.0, 106.0, 7.0, 108.0, 9.0, 110.0]


def test_a_camera_without_any_pose_gets_none_from_others() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    for number in range(1, 6):
        camera = "without" if number == 3 else "with"
        trajectory.add_keyframe(keyframe(number, captured_at_s=0.1 * number, camera=camera))
    trajectory.add_tracked(tracked(6, of=3, captured_at_s=0.35))
    poses = poses_in_map(trajectory, states({1: at_x(1.0), 5: at_x(5.0)}))
    assert [pose.frame_id for pose in poses] == [1, 2, 4, 5]


# -- several maps ---------------------------------------------------------------------------------


def test_frames_are_in_the_map_of_their_keyframe() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    for number in (1, 3, 5):
        trajectory.add_keyframe(keyframe(number))
        frame = tracked(number + 1, of=number)
        trajectory.add_tracked(frame)
        trajectory.set_relative_pose(frame, cam_from_keyframe=at_x(1.0), scale=1.0)
    maps = [states({3: at_x(3.0)}), states({1: at_x(100.0), 5: at_x(500.0)}, scale=2.0)]
    first, second = trajectory.poses(maps)
    assert by_frame(first) == {3: (3.0, PoseKind.KEYFRAME), 4: (4.0, PoseKind.TRACKED)}
    assert list(by_frame(second)) == [1, 2, 5, 6]
    assert xs(second) == [100.0, 102.0, 500.0, 502.0]


def test_no_frame_lies_between_two_maps() -> None:
    trajectory = video(0.0, 0.1, 0.2, 0.3, 0.4)
    maps = [states({1: at_x(1.0), 3: at_x(3.0)}), states({5: at_x(5.0)})]
    first, second = trajectory.poses(maps)
    assert [pose.frame_id for pose in first] == [1, 2, 3]
    assert [pose.frame_id for pose in second] == [5]


def test_a_keyframe_of_another_map_in_between_leaves_no_gap_to_close() -> None:
    trajectory = video(0.0, 0.1, 0.2, 0.3, 0.4)
    maps = [states({1: at_x(1.0), 5: at_x(5.0)}), states({3: at_x(3.0)})]
    first, second = trajectory.poses(maps)
    assert [pose.frame_id for pose in first] == [1, 5]
    assert [pose.frame_id for pose in second] == [3]


# -- gaps -----------------------------------------------------------------------------------------


def gaps_of(trajectory: Trajectory, *registered: int) -> list[tuple[int, int, float]]:
    """Between which frames, and how long."""
    found = trajectory.gaps([FrameId(number) for number in registered])
    return [(g.before, g.after, round(g.ends_at_s - g.begins_at_s, 3)) for g in found]


def test_a_time_without_any_pose_is_a_gap() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    for number in (1, 5, 9, 12):
        trajectory.add_keyframe(keyframe(number, captured_at_s=0.1 * number + 10.0 * (number > 5)))
        trajectory.add_tracked(
            tracked(number + 1, of=number, captured_at_s=0.1 * number + 0.1 + 10.0 * (number > 5))
        )
        motion = tracked(number + 1, of=number)
        trajectory.set_relative_pose(motion, cam_from_keyframe=MOTION, scale=1.0)
    assert gaps_of(trajectory, 1, 5, 9, 12) == [(6, 9, 10.3)]
    assert gaps_of(trajectory, 1, 5) == []  # the video may have ended there
    assert gaps_of(trajectory, 1, 12) == [(2, 12, 11.0)]


@pytest.mark.parametrize(
    ("prefix", "num_dropped", "is_overload"),
    [("", 4, True), ("", 3, False), ("cam", 4, False), ("source1", 4, False)],
)
def test_a_gap_is_one_of_the_computer_where_most_of_its_frames_were_dropped_for_overload(
    prefix: str, num_dropped: int, is_overload: bool
) -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    held = [*range(1, 41), *range(81, 121)]
    for number in sorted([*held, 45, 55, 65]):  # those three have no place
        trajectory.add_keyframe(keyframe(number, captured_at_s=0.1 * number))
    dropped_at_s = np.array([2.0] * 9 + [5.0 + 0.1 * number for number in range(num_dropped)])
    found = trajectory.gaps([FrameId(one) for one in held], overload_at_s={prefix: dropped_at_s})
    assert [(gap.before, gap.after, gap.is_overload) for gap in found] == [(40, 81, is_overload)]


def test_a_frame_that_was_read_again_later_has_its_place_among_the_others() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    times_s = {number: 5.0 + 0.1 * number for number in range(1, 200)}
    for number, captured_at_s in times_s.items():
        if number not in (20, 21):
            trajectory.add_keyframe(keyframe(number, captured_at_s=captured_at_s))
    again = replace(keyframe(200, captured_at_s=times_s[20]), index=10 * 20)
    trajectory.add_keyframe(again)
    unposed = replace(tracked(201, of=200, captured_at_s=times_s[21]), index=10 * 21)
    trajectory.add_tracked(unposed)
    trajectory.add_keyframe(replace(keyframe(202, captured_at_s=5.0 + 20.0), index=10 * 200))
    registered = {i: at_x(float(i)) for i in (*times_s, 200, 202) if i not in (20, 21)}
    assert gaps_of(trajectory, *registered) == []
    poses = {one.frame_id: one for one in poses_in_map(trajectory, states(registered))}
    assert poses[FrameId(201)].kind is PoseKind.INTERPOLATED


def test_photos_and_other_cameras_leave_no_gaps() -> None:
    trajectory = Trajectory(max_interpolation_s=1.0)
    for number in (1, 2, 3):
        trajectory.add_keyframe(keyframe(number, captured_at_s=60.0 * number, is_photo=True))
        trajectory.add_keyframe(keyframe(number + 10, captured_at_s=60.0 * number, camera="slow"))
    assert gaps_of(trajectory, 1, 2, 3, 11, 12, 13) == []
