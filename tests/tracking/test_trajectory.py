"""A pose for every frame: moved keyframes, interpolation, and cameras side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from engine.geometry import camera_center, compose_poses, interpolate_poses, invert_pose
from engine.tracking.trajectory import KeyframeState, Trajectory
from engine.types import Features, Float64Array, FrameId, FramePose, Keyframe, TrackedFrame
from tests.support.two_view_scenes import pose_at

FIRST_POSE = pose_at((1.0, 2.0, 3.0), rotation_vector=(0.1, -0.4, 0.2))
MOTION = pose_at((0.3, 0.0, 0.1), rotation_vector=(0.0, 0.2, 0.0))  # tracked from keyframe


def keyframe(number: int, *, captured_at_s: float | None = None, camera: str = "a") -> Keyframe:
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


def xs(poses: list[FramePose]) -> list[float]:
    """Where the cameras stand along x, in order."""
    return [round(float(camera_center(pose.cam_from_world)[0]), 9) for pose in poses]


@pytest.fixture
def one_keyframe() -> Trajectory:
    """Keyframe 1 and frame 2, which moved from it by `MOTION`."""
    trajectory = Trajectory()
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    trajectory.set_relative_pose(frame, cam_from_keyframe=MOTION, scale=1.0)
    return trajectory


# -- frames on their keyframes --------------------------------------------------------------------


def test_an_empty_map_gives_no_poses(one_keyframe: Trajectory) -> None:
    assert one_keyframe.poses({}) == []
    assert one_keyframe.num_without_own_pose({}) == 2
    assert Trajectory().poses(states({1: FIRST_POSE})) == []


def test_every_frame_comes_with_what_is_known_of_it(one_keyframe: Trajectory) -> None:
    first, second = one_keyframe.poses(states({1: FIRST_POSE}))
    assert (first.frame_id, first.index, first.captured_at_s, first.is_keyframe) == (1, 10, 1, True)
    assert (second.frame_id, second.index, second.captured_at_s) == (2, 20, 2.0)
    assert not second.is_keyframe
    assert len(one_keyframe) == 2
    assert one_keyframe.num_without_own_pose(states({1: FIRST_POSE})) == 0


def test_a_frame_follows_its_keyframe_when_it_moves(one_keyframe: Trajectory) -> None:
    for keyframe_pose in (FIRST_POSE, pose_at((-7.0, 0.0, 1.0), rotation_vector=(2.0, 1.0, 0.0))):
        first, second = one_keyframe.poses(states({1: keyframe_pose}))
        assert np.array_equal(first.cam_from_world, keyframe_pose)
        assert np.allclose(second.cam_from_world, compose_poses(MOTION, keyframe_pose))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_frame_keeps_its_share_of_a_map_that_is_rescaled(
    one_keyframe: Trajectory, scale: float
) -> None:
    _, frame = one_keyframe.poses(states({1: FIRST_POSE}, scale=scale))
    moved = compose_poses(frame.cam_from_world, invert_pose(FIRST_POSE))
    assert np.allclose(moved[:, :3], MOTION[:, :3])
    assert np.allclose(moved[:, 3], scale * MOTION[:, 3])


def test_a_motion_is_kept_at_the_scale_it_was_found_at() -> None:
    trajectory = Trajectory()
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    trajectory.set_relative_pose(frame, cam_from_keyframe=MOTION, scale=4.0)
    for now, ratio in ((4.0, 1.0), (1.0, 0.25)):
        _, pose = trajectory.poses(states({1: FIRST_POSE}, scale=now))
        moved = compose_poses(pose.cam_from_world, invert_pose(FIRST_POSE))
        assert np.allclose(moved[:, 3], ratio * MOTION[:, 3])


def test_a_motion_that_is_found_again_replaces_the_first() -> None:
    trajectory = Trajectory()
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    for x in (1.0, 5.0):
        trajectory.set_relative_pose(frame, cam_from_keyframe=at_x(x), scale=1.0)
    assert xs(trajectory.poses(states({1: at_x(0.0)}))) == [0.0, 5.0]


def test_what_was_found_is_not_changed_by_its_finder() -> None:
    trajectory = Trajectory()
    trajectory.add_keyframe(keyframe(1))
    frame = tracked(2, of=1)
    trajectory.add_tracked(frame)
    motion = MOTION.copy()
    trajectory.set_relative_pose(frame, cam_from_keyframe=motion, scale=2.0)
    assert np.array_equal(motion, MOTION)


# -- frames without a pose of their own -----------------------------------------------------------


def test_a_frame_without_a_pose_lies_between_its_neighbours_by_time() -> None:
    trajectory = Trajectory()
    trajectory.add_keyframe(keyframe(1, captured_at_s=10.0))
    trajectory.add_tracked(tracked(2, of=1, captured_at_s=11.0))
    trajectory.add_tracked(tracked(3, of=1, captured_at_s=13.0))
    trajectory.add_keyframe(keyframe(4, captured_at_s=14.0))
    second_pose = compose_poses(MOTION, FIRST_POSE)
    known = states({1: FIRST_POSE, 4: second_pose})
    _, early, late, _ = trajectory.poses(known)

    assert trajectory.num_without_own_pose(known) == 2
    for frame, fraction in ((early, 0.25), (late, 0.75)):
        between = interpolate_poses(FIRST_POSE, second_pose, fraction=fraction)
        assert np.allclose(frame.cam_from_world, between)


def test_beyond_the_ends_the_nearest_pose_is_taken() -> None:
    trajectory = Trajectory()
    for number in range(1, 7):
        trajectory.add_keyframe(keyframe(number))
    poses = trajectory.poses(states({3: at_x(3.0), 4: at_x(4.0)}))
    assert xs(poses) == [3.0, 3.0, 3.0, 4.0, 4.0, 4.0]


def test_a_keyframe_that_left_the_map_and_its_frames_are_interpolated() -> None:
    trajectory = Trajectory()
    for number in (1, 3, 5):
        trajectory.add_keyframe(keyframe(number))
        frame = tracked(number + 1, of=number)
        trajectory.add_tracked(frame)
        trajectory.set_relative_pose(frame, cam_from_keyframe=at_x(1.0), scale=1.0)
    everything = {1: at_x(1.0), 3: at_x(30.0), 5: at_x(5.0)}
    assert xs(trajectory.poses(states(everything))) == [1.0, 2.0, 30.0, 31.0, 5.0, 6.0]
    del everything[3]
    assert xs(trajectory.poses(states(everything))) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert trajectory.num_without_own_pose(states(everything)) == 2


def test_frames_of_one_time_or_of_a_clock_that_jumps_stay_between_their_neighbours() -> None:
    trajectory = Trajectory()
    for number, captured_at_s in enumerate((5.0, 5.0, 5.0, 9.0, 1.0, 2.0), start=1):
        trajectory.add_keyframe(keyframe(number, captured_at_s=captured_at_s))
    known = states({1: at_x(1.0), 3: at_x(3.0), 6: at_x(6.0)})
    assert xs(trajectory.poses(known)) == [1.0, 1.0, 3.0, 3.0, 3.0, 6.0]


@pytest.mark.parametrize(("captured_at_s", "x"), [((1.0, 9.0, 2.0), 3.0), ((5.0, 1.0, 9.0), 1.0)])
def test_a_time_beyond_both_neighbours_does_not_lead_beyond_them(
    captured_at_s: tuple[float, float, float], x: float
) -> None:
    trajectory = Trajectory()
    for number, time_s in enumerate(captured_at_s, start=1):
        trajectory.add_keyframe(keyframe(number, captured_at_s=time_s))
    assert xs(trajectory.poses(states({1: at_x(1.0), 3: at_x(3.0)}))) == [1.0, x, 3.0]


def test_two_cameras_side_by_side_are_not_mixed() -> None:
    trajectory = Trajectory()
    for number in range(1, 11):
        camera = "ab"[number % 2]
        trajectory.add_keyframe(keyframe(number, camera=camera))
    left = {1: at_x(1.0), 9: at_x(9.0)}
    right = {2: at_x(102.0), 10: at_x(110.0)}
    poses = trajectory.poses(states(left | right))

    assert [pose.frame_id for pose in poses] == list(range(1, 11))
    assert xs(poses) == [1.0, 102.0, 3.0, 104.0, 5.0, 106.0, 7.0, 108.0, 9.0, 110.0]


def test_a_tracked_frame_belongs_to_the_camera_of_its_keyframe() -> None:
    trajectory = Trajectory()
    trajectory.add_keyframe(keyframe(1, camera="a"))
    trajectory.add_keyframe(keyframe(2, camera="b"))
    trajectory.add_tracked(tracked(3, of=1))
    trajectory.add_tracked(tracked(4, of=2))
    assert xs(trajectory.poses(states({1: at_x(1.0), 2: at_x(2.0)}))) == [1.0, 2.0, 1.0, 2.0]


def test_a_camera_without_any_pose_borrows_from_those_around_it() -> None:
    trajectory = Trajectory()
    for number in range(1, 6):  # photos, each with a calibration of its own
        trajectory.add_keyframe(keyframe(number, camera=f"photo {number}"))
    poses = trajectory.poses(states({1: at_x(1.0), 3: at_x(3.0), 5: at_x(5.0)}))
    assert xs(poses) == [1.0, 2.0, 3.0, 4.0, 5.0]
