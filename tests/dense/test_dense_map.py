"""The dense map follows its keyframes, wherever a map puts them, in whatever unit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import engine.dense.dense_map as dense_map_module
from engine.dense.dense_map import DenseMap, SmallDepth
from engine.dense_types import (
    DenseCloud,
    DensePoints,
    DenseView,
    DepthMap,
    DepthProblem,
    KeyframePoses,
)
from engine.errors import JournalError
from engine.estimators.lenses import border_rays, camera_of
from engine.geometry import compose_poses, invert_pose, pose_in_other_world, rotation_from_vector
from engine.types import Float32Array, Float64Array, FrameId, Int64Array, Intrinsics

DISTANCE = 6.0  # of a wall, square to the cameras
SHAPE = (96, 128)
FOCAL_PX = 100.0
NUM_KEYFRAMES = 6
CAMERA = Intrinsics(model="PINHOLE", width=128, height=96, params=(FOCAL_PX, FOCAL_PX, 64.0, 48.0))


class MemoryStorage:
    """A storage without a disk, which may be full."""

    def __init__(self) -> None:
        self.kept: dict[FrameId, tuple[DepthMap, DensePoints, SmallDepth]] = {}
        self.is_full = False

    def frame_ids(self) -> list[FrameId]:
        return sorted(self.kept)

    def write(self, depth_map: DepthMap, points: DensePoints, small: SmallDepth) -> None:
        if self.is_full:
            raise JournalError("full")
        self.kept[depth_map.frame_id] = depth_map, points, small

    def depth_map(self, frame_id: FrameId) -> DepthMap | None:
        return self.kept[frame_id][0] if frame_id in self.kept else None

    def points(self, frame_id: FrameId) -> DensePoints | None:
        return self.kept[frame_id][1] if frame_id in self.kept else None

    def small(self, frame_id: FrameId) -> SmallDepth | None:
        return self.kept[frame_id][2] if frame_id in self.kept else None


def poses_of(frame_ids: Int64Array, cam_from_world: Float64Array) -> KeyframePoses:
    rays = np.tile(border_rays(camera_of(CAMERA)), (len(frame_ids), 1, 1))
    return KeyframePoses(
        frame_ids=frame_ids,
        cam_from_world=cam_from_world,
        focal_px=np.full(len(frame_ids), FOCAL_PX),
        border_rays=rays,
    )


def along_a_wall() -> KeyframePoses:
    """Cameras that pass a wall and look at it."""
    poses = np.tile(np.eye(4)[:3], (NUM_KEYFRAMES, 1, 1))
    poses[:, 0, 3] = -0.7 * np.arange(NUM_KEYFRAMES)
    return poses_of(np.arange(1, NUM_KEYFRAMES + 1), poses)


def problem_of(frame_id: int, poses: KeyframePoses) -> DepthProblem:
    by_id = poses.by_id()
    others = sorted(by_id.keys() - {frame_id}, key=lambda other: abs(other - frame_id))
    return DepthProblem(
        view=view_of(frame_id, by_id[frame_id]),
        neighbours=tuple(view_of(other, by_id[other]) for other in others),
    )


def view_of(frame_id: int, cam_from_world: Float64Array) -> DenseView:
    return DenseView(
        frame_id=FrameId(frame_id),
        intrinsics=CAMERA,
        cam_from_world=cam_from_world,
        points3D_ids=np.zeros(0, np.int64),
        keypoints_xy=np.zeros((0, 2)),
        points3D_in_world=np.zeros((0, 3)),
    )


def depth_of(problem: DepthProblem, *, distance: float = DISTANCE) -> DepthMap:
    """What a perfect matcher makes of the wall."""
    used = problem.neighbours[:2]
    world_from_own = invert_pose(problem.view.cam_from_world)
    return DepthMap(
        frame_id=problem.view.frame_id,
        pinhole=np.array([FOCAL_PX, FOCAL_PX, 64.0, 48.0]),
        depth=np.full(SHAPE, distance, np.float32),
        relative_error=np.full(SHAPE, 0.002, np.float32),
        num_agreeing=np.full(SHAPE, 2, np.uint8),
        colors=np.full((*SHAPE, 3), 90, np.uint8),
        neighbour_ids=np.array([one.frame_id for one in used]),
        neighbour_from_keyframe=np.array(
            [compose_poses(one.cam_from_world, world_from_own) for one in used]
        ),
    )


def grown(storage: MemoryStorage | None = None) -> DenseMap:
    """The dense map of all keyframes along the wall."""
    dense_map = DenseMap(storage or MemoryStorage())
    poses = along_a_wall()
    for frame_id in poses.frame_ids.tolist():
        problem = problem_of(frame_id, poses)
        dense_map.add(depth_of(problem), problem)
    return dense_map


def all_points(dense_map: DenseMap, poses: KeyframePoses) -> DensePoints:
    parts = list(dense_map.points(dense_map.placed(poses)))
    assert parts
    return replace(
        parts[0],
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("xyz", "colors", "normals", "sampling", "num_views")
        },
    )


def cells_of(xyz: Float32Array) -> set[tuple[float, ...]]:
    """Cells of the wall in which points (P, 3) lie."""
    return {*map(tuple, np.floor(xyz[:, :2] / 0.25))}


def seen_by(frame_ids: list[int], poses: KeyframePoses) -> set[tuple[float, ...]]:
    """Cells of the wall that have points by the depth of some keyframe alone."""
    cells: set[tuple[float, ...]] = set()
    for frame_id in frame_ids:
        alone, problem = DenseMap(MemoryStorage()), problem_of(frame_id, poses)
        alone.add(depth_of(problem), problem)
        cells |= cells_of(all_points(alone, poses).xyz)
    return cells


def shown_in_views(cloud: DenseCloud) -> set[tuple[float, ...]]:
    """Cells of the wall that views show."""
    return cells_of(
        np.concatenate(
            [
                chunk.xyz_in_cam @ world[:, :3].T + world[:, 3]
                for chunk, world in zip(cloud.chunks, cloud.world_from_chunk, strict=True)
            ]
        ).astype(np.float32)
    )


def test_points_lie_on_the_surface_and_no_part_of_it_is_there_twice() -> None:
    dense_map = grown()
    points = all_points(dense_map, along_a_wall())
    assert np.abs(points.xyz[:, 2] - DISTANCE).max() < 1e-4
    cells = np.unique(np.floor(points.xyz[:, :2] / 0.25), axis=0)
    per_cell = len(points.xyz) / len(cells)
    pixels_of_a_cell = (0.25 * FOCAL_PX / DISTANCE) ** 2
    assert 0.1 * pixels_of_a_cell < per_cell < 1.5 * pixels_of_a_cell
    assert dense_map.num_points == len(points.xyz)


def test_points_follow_a_map_that_is_moved_turned_and_scaled() -> None:
    dense_map, poses = grown(), along_a_wall()
    similarity = np.column_stack(
        [2.5 * rotation_from_vector(np.array([0.3, -0.5, 0.2])), [10.0, -4.0, 3.0]]
    )
    moved = replace(poses, cam_from_world=pose_in_other_world(poses.cam_from_world, similarity))
    before, after = all_points(dense_map, poses), all_points(dense_map, moved)
    expected = before.xyz @ similarity[:, :3].T + similarity[:, 3]
    assert np.abs(after.xyz - expected).max() < 1e-3
    assert np.allclose(after.sampling, 2.5 * before.sampling, rtol=1e-3)
    assert np.allclose(np.linalg.norm(after.normals, axis=1), 1.0, atol=1e-4)
    assert not any(one.is_outdated for one in dense_map.placed(moved))


def test_a_part_of_the_map_that_is_moved_takes_its_points_along() -> None:
    """As a loop that closes does: the last keyframes come to lie elsewhere, together."""
    dense_map, poses = grown(), along_a_wall()
    shift = np.column_stack([np.eye(3), [0.0, 0.0, 4.0]])
    late = poses.cam_from_world.copy()
    late[3:] = pose_in_other_world(late[3:], shift)
    placed = dense_map.placed(replace(poses, cam_from_world=late))
    depths = {
        one.frame_id: one.world_from_chunk[2, 3] for one in placed if one.frame_id in (1, 2, 5, 6)
    }
    assert depths == pytest.approx({1: 0.0, 2: 0.0, 5: 4.0, 6: 4.0})
    outdated = {one.frame_id for one in placed if one.is_outdated}
    assert outdated
    assert not outdated & {FrameId(1), FrameId(6)}, "their neighbours moved with them"


def test_small_adjustments_leave_depth_as_it_is() -> None:
    dense_map, poses = grown(), along_a_wall()
    rng = np.random.default_rng(0)
    moved = poses.cam_from_world.copy()
    moved[:, :, 3] += 2e-4 * rng.standard_normal((NUM_KEYFRAMES, 3))
    placed = dense_map.placed(replace(poses, cam_from_world=moved))
    assert len(placed) == NUM_KEYFRAMES
    assert not any(one.is_outdated for one in placed)
    scales = [np.cbrt(np.linalg.det(one.world_from_chunk[:, :3])) for one in placed]
    assert np.abs(np.array(scales) - 1.0).max() < 2e-3


@pytest.mark.parametrize(
    ("model", "params", "is_other"),
    [
        ("PINHOLE", (100.2, 100.2, 64.0, 48.0), False),
        ("PINHOLE", (103.0, 103.0, 64.0, 48.0), True),
        ("PINHOLE", (97.0, 97.0, 64.0, 48.0), True),
        ("PINHOLE", (100.0, 97.0, 64.0, 48.0), True),
        ("PINHOLE", (100.0, 100.0, 64.1, 48.0), False),
        ("PINHOLE", (100.0, 100.0, 66.0, 48.0), True),
        ("SIMPLE_RADIAL", (100.0, 64.0, 48.0, 1e-4), False),
        ("SIMPLE_RADIAL", (100.0, 64.0, 48.0, 0.05), True),
        ("OPENCV_FISHEYE", (100.0, 100.0, 64.0, 48.0, 0.0, 0.0, 0.0, 0.0), True),
    ],
)
def test_another_lens_makes_depth_outdated_whichever_parameter_it_is(
    model: str, params: tuple[float, ...], is_other: bool
) -> None:
    dense_map, poses = grown(), along_a_wall()
    rays = poses.border_rays.copy()
    rays[2:4] = border_rays(camera_of(Intrinsics(model=model, width=128, height=96, params=params)))
    placed = dense_map.placed(replace(poses, border_rays=rays))
    assert [one.frame_id for one in placed if one.is_outdated] == ([3, 4] if is_other else [])


def test_keyframes_that_left_the_map_are_left_out_until_they_are_back() -> None:
    dense_map, poses = grown(), along_a_wall()
    few = poses_of(poses.frame_ids[:4], poses.cam_from_world[:4])
    assert [one.frame_id for one in dense_map.placed(few)] == [1, 2, 3, 4]
    assert len(dense_map.placed(poses)) == NUM_KEYFRAMES


def test_a_keyframe_whose_neighbours_left_is_not_shown_and_to_be_made_again() -> None:
    dense_map, poses = grown(), along_a_wall()
    alone = poses_of(poses.frame_ids[:1], poses.cam_from_world[:1])
    (placed,) = dense_map.placed(alone)
    assert placed.frame_id == 1
    assert placed.is_outdated
    assert placed.is_wrong
    assert dense_map.cloud([placed]).chunks == ()


def test_a_file_that_cannot_be_read_any_more_is_made_again_and_hides_nothing_meanwhile() -> None:
    storage = MemoryStorage()
    dense_map, poses = grown(storage), along_a_wall()
    shown = shown_in_views(dense_map.cloud(dense_map.placed(poses)))
    del storage.kept[FrameId(2)]
    others = seen_by([1, 3, 4, 5, 6], poses)
    for _ in range(2):  # it is found on the way, then known
        assert cells_of(all_points(dense_map, poses).xyz) == others
    placed = dense_map.placed(poses)
    assert [one.frame_id for one in placed if one.is_outdated] == [2]
    assert dense_map.frame_ids == [1, 3, 4, 5, 6]
    assert dense_map.num_points == len(all_points(dense_map, poses).xyz)
    assert shown_in_views(dense_map.cloud(placed)) == shown
    problem = problem_of(2, poses)
    dense_map.add(depth_of(problem), problem)
    assert not any(one.is_outdated for one in dense_map.placed(poses))
    assert len(dense_map.frame_ids) == NUM_KEYFRAMES


@pytest.mark.parametrize("again", [[1, 2, 3], [3], [6, 5, 4, 3, 2, 1], [1, 1, 1]])
def test_depth_that_is_made_again_leaves_the_whole_surface_there(again: list[int]) -> None:
    dense_map, poses = grown(), along_a_wall()
    num_points, everywhere = dense_map.num_points, seen_by(poses.frame_ids.tolist(), poses)
    for frame_id in again:
        problem = problem_of(frame_id, poses)
        dense_map.add(depth_of(problem), problem)
        placed = dense_map.placed(poses)
        points = all_points(dense_map, poses)
        assert cells_of(points.xyz) == everywhere
        assert shown_in_views(dense_map.cloud(placed)) == everywhere
        assert dense_map.num_points == len(points.xyz)
        assert dense_map.num_points < 2 * num_points
        assert np.abs(points.xyz[:, 2] - DISTANCE).max() < 1e-4
    assert sorted(dense_map.frame_ids) == list(range(1, NUM_KEYFRAMES + 1))


@pytest.mark.parametrize("wrong", [{1}, {1, 2}, {2, 4, 6}])
def test_what_others_have_seen_too_stays_when_a_keyframe_is_wrong_or_has_left(
    wrong: set[int],
) -> None:
    dense_map, poses = grown(), along_a_wall()
    right = [i for i in poses.frame_ids.tolist() if i not in wrong]
    placed = [replace(one, is_wrong=one.frame_id in wrong) for one in dense_map.placed(poses)]
    before = {one.frame_id: one for one in dense_map.cloud(dense_map.placed(poses)).chunks}
    points = np.concatenate([part.xyz for part in dense_map.points(placed)])
    cloud = dense_map.cloud(placed)
    assert cells_of(points) == seen_by(right, poses) == shown_in_views(cloud)
    for chunk in cloud.chunks:
        former = before[chunk.frame_id]
        is_same = len(chunk.xyz_in_cam) == len(former.xyz_in_cam)
        assert is_same == (chunk.version == former.version)
    gone = [one for one in placed if not one.is_wrong]
    assert shown_in_views(dense_map.cloud(gone)) == seen_by(right, poses)
    back = dense_map.cloud(dense_map.placed(poses))
    assert [len(one.xyz_in_cam) for one in back.chunks] == [
        len(one.xyz_in_cam) for one in before.values()
    ]


def test_keyframes_that_move_apart_show_what_both_have_seen_in_both_places() -> None:
    dense_map, poses = grown(), along_a_wall()
    shift = np.column_stack([np.eye(3), [0.0, 0.0, 4.0]])
    late = poses.cam_from_world.copy()
    late[3:] = pose_in_other_world(late[3:], shift)
    placed = [
        replace(one, is_wrong=False)
        for one in dense_map.placed(replace(poses, cam_from_world=late))
    ]
    points = np.concatenate([part.xyz for part in dense_map.points(placed)])
    is_moved = np.abs(points[:, 2] - DISTANCE - 4.0) < 1e-3
    assert seen_by([5, 6], poses) <= cells_of(points[is_moved])


def test_a_run_that_goes_on_knows_to_whom_points_are_left() -> None:
    storage = MemoryStorage()
    dense_map, poses = grown(storage), along_a_wall()
    restored = DenseMap(storage)
    restored.restore(before=FrameId(NUM_KEYFRAMES + 1))
    assert restored.num_points == dense_map.num_points
    problem = problem_of(1, poses)
    restored.add(depth_of(problem), problem)
    points = all_points(restored, poses)
    assert cells_of(points.xyz) == seen_by(poses.frame_ids.tolist(), poses)


def test_a_full_disk_costs_the_keyframe_its_depth_and_nothing_else() -> None:
    storage = MemoryStorage()
    dense_map, poses = grown(storage), along_a_wall()
    storage.is_full = True
    problem = problem_of(3, poses)
    with pytest.raises(JournalError):
        dense_map.add(depth_of(problem), problem)
    placed = dense_map.placed(poses)
    assert [one.frame_id for one in placed] == [1, 2, 4, 5, 6]


def test_what_was_stored_is_used_again() -> None:
    storage = MemoryStorage()
    before, poses = grown(storage), along_a_wall()
    restored = DenseMap(storage)
    restored.restore(before=FrameId(5))
    assert restored.frame_ids == [1, 2, 3, 4]
    ours = [one for one in before.placed(poses) if one.frame_id < 5]
    cloud, former = restored.cloud(restored.placed(poses)), before.cloud(ours)
    assert np.array_equal(cloud.world_from_chunk, former.world_from_chunk)
    for one, other in zip(cloud.chunks, former.chunks, strict=True):
        assert np.array_equal(one.xyz_in_cam, other.xyz_in_cam)


def test_views_get_a_bounded_sample_and_old_chunks_are_thinned_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense_map_module, "_MAX_CHUNK_POINTS", 500)
    monkeypatch.setattr(dense_map_module, "_MAX_SHOWN_POINTS", 1100)
    dense_map, poses = grown(), along_a_wall()
    cloud = dense_map.cloud(dense_map.placed(poses))
    sizes = [len(chunk.xyz_in_cam) for chunk in cloud.chunks]
    assert 550 < sum(sizes) <= 1100
    assert min(sizes) > 50
    assert max(sizes[:-1]) < sizes[-1]
    versions = [chunk.version for chunk in cloud.chunks]
    assert len(set(versions)) == len(versions)
