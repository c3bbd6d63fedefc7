"""Poses of tracked frames on a real sparse map: exact, late, rescaled, replaced."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.config import RegistrationConfig
from engine.estimators.absolute_pose import AbsolutePose, refine_absolute_pose
from engine.geometry import camera_center, compose_poses, invert_pose, rotation_from_vector
from engine.mapping import frame_posing
from engine.mapping.frame_posing import FramePoser
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, FramePose, PoseKind, TrackedFrame
from tests.support.synthetic import (
    SyntheticCamera,
    SyntheticWorld,
    grow,
    map_of_keyframes,
    straight_path,
)

NUM_FRAMES = 13
KEYFRAMES = (1, 4, 7, 10, 13)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES, step=0.6), density=1.0)


@pytest.fixture(scope="module")
def noisy_world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES, step=0.6), density=1.0, noise_px=0.5)


@pytest.fixture
def sparse_map(world: SyntheticWorld) -> SparseMap:
    return map_with(world, KEYFRAMES)


def map_with(world: SyntheticWorld, registered: tuple[int, ...]) -> SparseMap:
    """A map that knows all keyframes, those given registered."""
    sparse_map = map_of_keyframes(world, frame_ids=KEYFRAMES, max_gap=9)
    grow(sparse_map, world, registered)
    return sparse_map


def poser_with(world: SyntheticWorld) -> FramePoser:
    poser = FramePoser(registration=RegistrationConfig(), seed=0, max_interpolation_s=1.0)
    for frame_id in KEYFRAMES:
        poser.add_keyframe(world.keyframe(frame_id))
    return poser


def true_pose(world: SyntheticWorld, frame_id: int) -> Float64Array:
    """The pose (3, 4) in the map, whose world frame is the first camera."""
    return compose_poses(world.pose(frame_id), invert_pose(world.pose(1)))


def keyframe_before(frame_id: int) -> int:
    return max(keyframe_id for keyframe_id in KEYFRAMES if keyframe_id <= frame_id)


def tracked_frames(world: SyntheticWorld) -> list[TrackedFrame]:
    """All frames between keyframes, in order."""
    return [
        world.tracked(frame_id, keyframe_id=keyframe_before(frame_id))
        for frame_id in world.frame_ids
        if frame_id not in KEYFRAMES
    ]


def largest_error(poses: list[FramePose], world: SyntheticWorld) -> float:
    """Of all elements of all poses."""
    true_poses = np.array([true_pose(world, pose.frame_id) for pose in poses])
    return float(np.abs(np.array([pose.cam_from_world for pose in poses]) - true_poses).max())


def own_poses(poser: FramePoser, sparse_map: SparseMap) -> dict[FrameId, Float64Array]:
    return {
        pose.frame_id: pose.cam_from_world
        for pose in poser.trajectories([sparse_map])[0]
        if not pose.is_keyframe
    }


def frames_without_estimate(poser: FramePoser, sparse_map: SparseMap) -> list[int]:
    """Frames that are interpolated or have no pose."""
    (poses,) = poser.trajectories([sparse_map])
    estimated = {pose.frame_id for pose in poses if pose.kind is not PoseKind.INTERPOLATED}
    return [frame_id for frame_id in range(1, NUM_FRAMES + 1) if frame_id not in estimated]


def spoiled(tracked: TrackedFrame, *, ratio: float) -> TrackedFrame:
    """The frame with a share of its points anywhere."""
    rng = np.random.default_rng(tracked.frame_id)
    points_xy = tracked.points_xy.copy()
    wrong = rng.permutation(len(points_xy))[: round(ratio * len(points_xy))]
    points_xy[wrong] = rng.uniform(0.0, 700.0, (len(wrong), 2))
    return dataclasses.replace(tracked, points_xy=points_xy)


# -- poses ----------------------------------------------------------------------------------------


def test_frames_of_registered_keyframes_are_posed_at_once(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = poser_with(world)
    poses = [poser.add_tracked(tracked, sparse_map) for tracked in tracked_frames(world)]
    known = [pose for pose in poses if pose is not None]

    assert len(known) == len(poses) == NUM_FRAMES - len(KEYFRAMES)
    assert largest_error(known, world) < 1e-6
    assert not any(pose.is_keyframe for pose in known)
    assert poser.pose_pending(sparse_map) == []
    trajectory = poser.trajectories([sparse_map])[0]
    assert [pose.frame_id for pose in trajectory] == [*KEYFRAMES, *(p.frame_id for p in known)]
    assert largest_error(trajectory, world) < 1e-6
    assert {pose.kind for pose in trajectory} == {PoseKind.KEYFRAME, PoseKind.TRACKED}
    assert poser.num_frames == NUM_FRAMES


def test_poses_are_as_good_as_the_points(noisy_world: SyntheticWorld) -> None:
    sparse_map = map_with(noisy_world, KEYFRAMES)
    poser = poser_with(noisy_world)
    poses = [poser.add_tracked(tracked, sparse_map) for tracked in tracked_frames(noisy_world)]
    known = [pose for pose in poses if pose is not None]

    assert len(known) == len(poses)
    assert 1e-4 < largest_error(known, noisy_world) < 0.05


def test_wrongly_followed_points_do_not_move_a_frame(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = poser_with(world)
    for tracked in tracked_frames(world):
        pose = poser.add_tracked(spoiled(tracked, ratio=0.3), sparse_map)
        assert pose is not None
        assert largest_error([pose], world) < 0.01


def test_a_frame_far_from_its_keyframe_is_found_without_those_between(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    pose = poser_with(world).add_tracked(world.tracked(12, keyframe_id=1), sparse_map)
    assert pose is not None
    assert largest_error([pose], world) < 1e-6


def test_a_frame_is_searched_from_the_pose_of_the_one_before(
    world: SyntheticWorld, sparse_map: SparseMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Float64Array] = []

    def watched(start: Float64Array, **arguments: Any) -> AbsolutePose | None:
        starts.append(start)
        return refine_absolute_pose(start, **arguments)

    monkeypatch.setattr(frame_posing, "refine_absolute_pose", watched)
    poser = poser_with(world)
    for tracked in tracked_frames(world)[:3]:
        poser.add_tracked(tracked, sparse_map)
    # Frames 2 and 3 follow keyframe 1, frame 5 the next one.
    expected = [true_pose(world, frame_id) for frame_id in (1, 2, 4)]
    assert np.allclose(starts, expected, atol=1e-6)


def test_a_frame_that_lost_its_points_is_interpolated(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = poser_with(world)
    tracked = world.tracked(2, keyframe_id=1)
    few = dataclasses.replace(
        tracked, keypoint_idx=tracked.keypoint_idx[:11], points_xy=tracked.points_xy[:11]
    )
    nonsense = spoiled(world.tracked(3, keyframe_id=1), ratio=1.0)
    assert poser.add_tracked(few, sparse_map) is None
    assert poser.add_tracked(nonsense, sparse_map) is None

    assert poser.pose_pending(sparse_map) == []
    (poses,) = poser.trajectories([sparse_map])
    interpolated = [pose.frame_id for pose in poses if pose.kind is PoseKind.INTERPOLATED]
    assert interpolated == [2, 3]
    centers = [camera_center(own_poses(poser, sparse_map)[FrameId(i)]) for i in (2, 3)]
    ends = [camera_center(true_pose(world, i)) for i in (1, 4)]
    for center, fraction in zip(centers, (1.0 / 3.0, 2.0 / 3.0), strict=True):
        assert np.allclose(center, (1.0 - fraction) * ends[0] + fraction * ends[1], atol=1e-6)


def test_keypoints_without_a_point_do_not_disturb(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    assert (sparse_map.point3D_ids(FrameId(1)) < 0).any()
    tracked = world.tracked(2, keyframe_id=1)
    seen = sparse_map.point3D_ids(FrameId(1))[tracked.keypoint_idx] >= 0
    points_xy = np.where(seen[:, None], tracked.points_xy, 1.0)
    pose = poser_with(world).add_tracked(
        dataclasses.replace(tracked, points_xy=points_xy), sparse_map
    )
    assert pose is not None
    assert largest_error([pose], world) < 1e-6


def test_points_that_cannot_be_undistorted_do_not_disturb() -> None:
    # Bent so far that nothing maps to the corners.
    camera = SyntheticCamera(params=(800.0, 500.0, 375.0, -0.3))
    world = SyntheticWorld(straight_path(NUM_FRAMES, step=0.6), density=1.0, cameras=[camera])
    sparse_map = map_with(world, KEYFRAMES)
    tracked = world.tracked(2, keyframe_id=1)
    points_xy = tracked.points_xy.copy()
    points_xy[::10] = 0.0
    assert np.isnan(np.asarray(camera.as_colmap().cam_from_img(points_xy[:1]))).all()
    pose = poser_with(world).add_tracked(
        dataclasses.replace(tracked, points_xy=points_xy), sparse_map
    )
    assert pose is not None
    assert largest_error([pose], world) < 1e-3


def test_points_of_keyframes_in_use_are_read_once_and_few_are_kept(
    world: SyntheticWorld, sparse_map: SparseMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    poser, read = poser_with(world), list[FrameId]()
    read_points = poser._read_points

    def reading(frame_id: FrameId, sparse_map: SparseMap) -> Any:
        read.append(frame_id)
        return read_points(frame_id, sparse_map)

    monkeypatch.setattr(poser, "_read_points", reading)
    keyframe_ids = [FrameId(i) for i in KEYFRAMES]
    for frame_id in 3 * keyframe_ids:
        poser.points(frame_id, sparse_map)
    assert read == keyframe_ids
    monkeypatch.setattr(frame_posing, "_MAX_POINT_TABLES", 4)
    poser.forget_points()
    read.clear()
    for number in (0, 1, 2, 3, 0, 4, 0, 1):  # the fifth takes the place of that used longest ago
        poser.points(keyframe_ids[number], sparse_map)
    assert read == [keyframe_ids[number] for number in (0, 1, 2, 3, 4, 1)]


def test_the_same_frames_give_the_same_bits(noisy_world: SyntheticWorld) -> None:
    def run() -> list[Float64Array]:
        sparse_map = map_with(noisy_world, KEYFRAMES)
        poser = poser_with(noisy_world)
        poses = [
            poser.add_tracked(spoiled(tracked, ratio=0.3), sparse_map)
            for tracked in tracked_frames(noisy_world)
        ]
        return [pose.cam_from_world for pose in poses if pose is not None]

    one, other = run(), run()
    assert len(one) == NUM_FRAMES - len(KEYFRAMES)
    assert np.array_equal(one, other)


# -- waiting --------------------------------------------------------------------------------------


def test_frames_wait_for_the_map_and_for_their_keyframe(world: SyntheticWorld) -> None:
    poser = poser_with(world)
    frames = tracked_frames(world)
    assert [poser.add_tracked(tracked, None) for tracked in frames] == [None] * len(frames)

    sparse_map = map_with(world, (1, 4, 7))
    early = poser.pose_pending(sparse_map)
    assert [tracked.frame_id for tracked, _ in early] == [2, 3, 5, 6, 8, 9]
    assert frames_without_estimate(poser, sparse_map) == [10, 11, 12, 13]  # 10 and 13 are keyframes
    assert poser.pose_pending(sparse_map) == []

    sparse_map.register(FrameId(10), min_inlier_ratio=0.25)
    sparse_map.triangulate(FrameId(10))
    poser.forget_points()
    late = poser.pose_pending(sparse_map)
    assert [tracked.frame_id for tracked, _ in late] == [11, 12]
    assert poser.pose_pending(sparse_map) == []
    assert [tracked.frame_id for tracked, _ in early + late] == [
        pose.frame_id for _, pose in early + late
    ]
    assert largest_error([pose for _, pose in early + late], world) < 1e-6


def test_a_frame_of_a_keyframe_outside_the_map_waits(world: SyntheticWorld) -> None:
    poser = poser_with(world)
    sparse_map = map_with(world, (1, 4, 7))
    assert poser.add_tracked(world.tracked(11, keyframe_id=10), sparse_map) is None
    ((waiting, _),) = poser.pose_pending(map_with(world, (1, 4, 7, 10)))
    assert waiting.frame_id == 11


def test_the_oldest_of_too_many_waiting_frames_are_interpolated_in_the_end(
    world: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_posing, "_MAX_PENDING_FRAMES", 3)
    poser = poser_with(world)
    frames = tracked_frames(world)
    for tracked in frames:
        poser.add_tracked(tracked, None)

    sparse_map = map_with(world, KEYFRAMES)
    posed = poser.pose_pending(sparse_map)
    assert [tracked.frame_id for tracked, _ in posed] == [t.frame_id for t in frames[-3:]]
    assert len(frames_without_estimate(poser, sparse_map)) == len(frames) - 3
    assert len(poser.trajectories([sparse_map])[0]) == NUM_FRAMES


def test_without_a_map_there_is_no_trajectory(world: SyntheticWorld) -> None:
    poser = poser_with(world)
    poser.add_tracked(world.tracked(2, keyframe_id=1), None)
    empty = map_of_keyframes(world, frame_ids=KEYFRAMES)
    assert poser.trajectories([empty])[0] == []
    assert poser.num_frames == len(KEYFRAMES) + 1


# -- a map that changes ---------------------------------------------------------------------------


def posed_poser(world: SyntheticWorld, sparse_map: SparseMap) -> FramePoser:
    """A poser that posed every frame on the map."""
    poser = poser_with(world)
    for tracked in tracked_frames(world):
        assert poser.add_tracked(tracked, sparse_map) is not None
    return poser


def test_frames_follow_a_map_that_is_moved_turned_and_rescaled(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = posed_poser(world, sparse_map)
    before = own_poses(poser, sparse_map)
    rotation = rotation_from_vector(np.array([0.3, -0.2, 1.0]))
    offset = np.array([5.0, -1.0, 2.0])
    sparse_map.reconstruction.transform(pycolmap.Sim3d(2.0, pycolmap.Rotation3d(rotation), offset))
    poser.forget_points()
    after = own_poses(poser, sparse_map)

    assert before.keys() == after.keys()
    for frame_id, pose in before.items():
        expected = 2.0 * rotation @ camera_center(pose) + offset
        assert np.allclose(camera_center(after[frame_id]), expected, atol=1e-9)
        assert np.allclose(after[frame_id][:, :3], pose[:, :3] @ rotation.T, atol=1e-9)


def test_frames_posed_before_and_after_a_rescaling_agree(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = poser_with(world)
    early, late = world.tracked(2, keyframe_id=1), world.tracked(3, keyframe_id=1)
    assert poser.add_tracked(early, sparse_map) is not None
    sparse_map.reconstruction.transform(pycolmap.Sim3d(2.0, pycolmap.Rotation3d(), np.zeros(3)))
    poser.forget_points()
    pose = poser.add_tracked(late, sparse_map)
    assert pose is not None

    for frame_id, own in own_poses(poser, sparse_map).items():
        truth = true_pose(world, frame_id)
        assert np.allclose(camera_center(own), 2.0 * camera_center(truth), atol=1e-6)
    # The first report was in the scale of its time, and so is the second.
    assert np.allclose(pose.cam_from_world[:, 3], 2.0 * true_pose(world, 3)[:, 3], atol=1e-6)


def test_new_points_of_a_keyframe_do_not_move_its_frames(world: SyntheticWorld) -> None:
    sparse_map = map_with(world, (1, 4, 7))
    poser = poser_with(world)
    for tracked in tracked_frames(world)[:6]:
        assert poser.add_tracked(tracked, sparse_map) is not None
    before = own_poses(poser, sparse_map)
    num_before = int((sparse_map.point3D_ids(FrameId(7)) >= 0).sum())
    for frame_id in (FrameId(10), FrameId(13)):
        sparse_map.register(frame_id, min_inlier_ratio=0.25)
        sparse_map.triangulate(frame_id)
    poser.forget_points()
    after = own_poses(poser, sparse_map)

    assert (sparse_map.point3D_ids(FrameId(7)) >= 0).sum() > 1.2 * num_before
    for frame_id, pose in before.items():
        assert np.allclose(after[frame_id], pose, atol=1e-9)


def test_frames_keep_their_scale_when_points_go_and_tracks_are_made_anew(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = posed_poser(world, sparse_map)
    reconstruction = sparse_map.reconstruction
    for point3D_id in list(reconstruction.point3D_ids()):
        point = reconstruction.point3D(point3D_id)
        elements = [(e.image_id, e.point2D_idx) for e in point.track.elements]
        xyz, color = point.xyz.copy(), point.color.copy()
        reconstruction.delete_point3D(point3D_id)
        if point3D_id % 3:
            track = pycolmap.Track([pycolmap.TrackElement(*element) for element in elements])
            reconstruction.add_point3D(xyz, track, color)
    reconstruction.transform(pycolmap.Sim3d(3.0, pycolmap.Rotation3d(), np.zeros(3)))
    sparse_map._forget_observations()
    poser.forget_points()

    for frame_id, pose in own_poses(poser, sparse_map).items():
        truth = true_pose(world, frame_id)
        assert np.allclose(camera_center(pose), 3.0 * camera_center(truth), atol=1e-6)


def test_frames_follow_their_keyframe_into_a_map_that_has_other_points_of_it(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = posed_poser(world, sparse_map)
    lost: set[int] = set()
    for frame_id, reference in poser._references.items():
        lost.update(sparse_map.point3D_ids(frame_id)[reference.keypoint_idx].tolist())
    for point3D_id in lost - {-1}:
        sparse_map.reconstruction.delete_point3D(point3D_id)
    sparse_map.reconstruction.transform(pycolmap.Sim3d(3.0, pycolmap.Rotation3d(), np.zeros(3)))
    sparse_map._forget_observations()
    poser.forget_points()

    for frame_id, pose in own_poses(poser, sparse_map).items():
        keyframe = 3.0 * camera_center(true_pose(world, keyframe_before(frame_id)))
        step = camera_center(pose) - keyframe
        true_step = 3.0 * camera_center(true_pose(world, frame_id)) - keyframe
        assert 0.7 < np.linalg.norm(step) / np.linalg.norm(true_step) < 1.4


def test_a_point_behind_its_keyframe_does_not_tell_the_scale(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    keyframe_from_map = sparse_map.cam_from_world(FrameId(4))
    ids = sparse_map.point3D_ids(FrameId(4))
    for point3D_id in ids[ids >= 0][::5].tolist():
        point = sparse_map.reconstruction.point3D(point3D_id)
        point.xyz = 2.0 * camera_center(keyframe_from_map) - point.xyz
    poser = poser_with(world)
    assert poser.add_tracked(world.tracked(5, keyframe_id=4), sparse_map) is not None
    sparse_map.reconstruction.transform(pycolmap.Sim3d(2.0, pycolmap.Rotation3d(), np.zeros(3)))
    poser.forget_points()

    (pose,) = own_poses(poser, sparse_map).values()
    expected = 2.0 * camera_center(true_pose(world, 5))
    assert np.allclose(camera_center(pose), expected, atol=1e-6)


def test_frames_keep_their_place_when_the_map_is_replaced(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = posed_poser(world, sparse_map)
    # Grown from the other end: ids of points say nothing about those of the first map.
    other = map_with(world, KEYFRAMES[::-1])
    poser.forget_points()
    last_from_first = compose_poses(world.pose(13), invert_pose(world.pose(1)))

    for frame_id, pose in own_poses(poser, other).items():
        in_first = compose_poses(pose, last_from_first)
        assert np.abs(in_first - true_pose(world, frame_id)).max() < 1e-5


def test_facts_of_keyframes_that_no_frame_is_posed_from_in_a_new_map_are_not_taken(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = poser_with(world)
    poser.points(FrameId(1), sparse_map)  # without a frame of its own
    poser.add_tracked(world.tracked(5, keyframe_id=4), sparse_map)
    poser.pose_anew(sparse_map)
    assert set(poser.take_facts()) == {"scale/4"}


# -- before the keyframe is in the map ------------------------------------------------------------


def test_a_frame_that_waits_gets_its_first_pose_from_the_keyframe_before(
    world: SyntheticWorld,
) -> None:
    sparse_map = map_with(world, (1, 4, 7))
    poser = poser_with(world)
    tracked = world.tracked(11, keyframe_id=10)
    pose = poser.add_tracked(tracked, sparse_map, fallback=world.tracked(11, keyframe_id=7))
    assert pose is not None
    assert largest_error([pose], world) < 1e-6
    larger_map = map_with(world, (1, 4, 7, 10))
    ((posed, better),) = poser.pose_pending(larger_map)
    assert posed is tracked
    assert largest_error([better], world) < 1e-6
    assert poser.pose_pending(larger_map) == []


def test_without_the_keyframe_before_in_the_map_it_only_waits(world: SyntheticWorld) -> None:
    sparse_map = map_with(world, (1, 4))
    poser = poser_with(world)
    fallback = world.tracked(11, keyframe_id=7)
    assert poser.add_tracked(world.tracked(11, keyframe_id=10), sparse_map) is None
    assert (
        poser.add_tracked(world.tracked(12, keyframe_id=10), sparse_map, fallback=fallback) is None
    )
    posed = poser.pose_pending(map_with(world, (1, 4, 10)))
    assert [tracked.frame_id for tracked, _ in posed] == [11, 12]


# -- another calibration --------------------------------------------------------------------------


def test_frames_whose_keyframe_gets_another_focal_length_are_posed_again(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    key = sparse_map.keyframe(FrameId(4)).calibration_key
    right = sparse_map.camera(key).params.tolist()
    sparse_map.set_camera_params(key, [0.7 * right[0], *right[1:]])
    poser = poser_with(world)
    assert poser.add_tracked(world.tracked(5, keyframe_id=4), sparse_map) is not None
    assert np.abs(own_poses(poser, sparse_map)[FrameId(5)] - true_pose(world, 5)).max() > 1e-3

    sparse_map.set_camera_params(key, right)
    poser.pose_again([sparse_map])
    assert np.abs(own_poses(poser, sparse_map)[FrameId(5)] - true_pose(world, 5)).max() < 1e-5


def test_frames_whose_focal_length_stays_keep_their_pose(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    poser = posed_poser(world, sparse_map)
    before = own_poses(poser, sparse_map)
    poser.pose_again([sparse_map])
    after = own_poses(poser, sparse_map)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[i], after[i]) for i in before)


# -- going on --------------------------------------------------------------------------------------


def test_a_keyframe_that_was_tracked_first_stays_a_keyframe(
    world: SyntheticWorld, sparse_map: SparseMap
) -> None:
    former = poser_with(world)
    for frame_id in (2, 4):
        former.add_tracked(world.tracked(frame_id, keyframe_id=1), sparse_map)
    former.add_keyframe(world.keyframe(4))
    poser = poser_with(world)
    poser.restore(former.take_facts(), former.take_relative_poses())
    (poses,) = poser.trajectories([sparse_map])
    (expected,) = former.trajectories([sparse_map])
    assert {one.frame_id for one in poses if one.is_keyframe} == set(KEYFRAMES)
    assert {one.frame_id for one in poses} == {one.frame_id for one in expected}
