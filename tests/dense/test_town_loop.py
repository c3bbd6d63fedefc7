"""Once around the town with drift, and the loop closed: dense points against the true surfaces."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from adapters.town.oracle import TrueView
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.dense.dense_map import DenseMap, PlacedKeyframe
from engine.dense.depth import DepthOptions, estimate_depth
from engine.dense_types import DenseImage, DenseView, DepthProblem, DepthStatus, KeyframePoses
from engine.estimators.lenses import border_rays, camera_of
from engine.geometry import (
    camera_center,
    invert_pose,
    pose_in_other_world,
    similarity_between_poses,
    transform_points,
)
from engine.output.depth_store import DepthStore
from engine.types import BoolArray, Float64Array, FrameId, Intrinsics

_SPEC = "synthetic:town?frames=30&path=orbit&width=320&height=240"
_NUM_POINTS = 300  # sparse ones, of each keyframe
_NUM_NEIGHBOURS = 6
_DRIFT = 0.8  # the scale at the end of the way around
_OPTIONS = DepthOptions(edge_px=320, num_neighbours=2)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("towns_painted_once")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Flight:
    """What a flight shows, and where it truly is."""

    town: SyntheticTown
    intrinsics: Intrinsics
    images: dict[FrameId, DenseImage]
    views: dict[FrameId, TrueView]
    points: Float64Array  # (P, 3) sparse ones, metres
    is_seen: dict[FrameId, BoolArray]  # (P,) by each keyframe

    @property
    def true_poses(self) -> dict[FrameId, Float64Array]:
        return {i: view.cam_from_world for i, view in self.views.items()}


@pytest.fixture(scope="module")
def flight() -> _Flight:
    ids = (FrameId(i) for i in itertools.count(1))
    town = SyntheticTown(parse_town_spec(_SPEC), next_frame_id=ids.__next__)
    focal_x, focal_y, center_x, center_y = town.intrinsics
    images, views, points = {}, {}, []
    rng = np.random.default_rng(0)
    for index in range(town.options.num_frames):
        frame, frame_id = town.render(index), FrameId(index + 1)
        images[frame_id] = DenseImage(pixels=frame.pixels)
        views[frame_id] = TrueView(
            depth_m=frame.depth,
            cam_from_world=frame.cam_from_world,
            intrinsics=town.intrinsics,
        )
        xy = rng.uniform((2.0, 2.0), np.array(views[frame_id].size) - 2.0, (_NUM_POINTS, 2))
        seen, depths = views[frame_id].points_in_world(xy)
        points.append(seen[np.isfinite(depths) & (depths < 200.0)])
    every = np.concatenate(points)
    return _Flight(
        town=town,
        intrinsics=Intrinsics(
            model="PINHOLE",
            width=town.options.width,
            height=town.options.height,
            params=(focal_x, focal_y, center_x, center_y),
        ),
        images=images,
        views=views,
        points=every,
        is_seen={i: _is_seen(view, every) for i, view in views.items()},
    )


def _is_seen(view: TrueView, points: Float64Array) -> BoolArray:
    xy, depths = view.project(points)
    inside = (depths > 0) & view.is_inside(xy)
    true = view.depths_at(np.where(inside[:, None], xy, 0.5))
    with np.errstate(invalid="ignore"):
        return np.asarray(inside & (np.abs(depths / true - 1.0) < 0.005))


def _drifted(poses: dict[FrameId, Float64Array]) -> dict[FrameId, Float64Array]:
    """Poses whose steps shrink steadily, to a share of their length at the end."""
    ids = sorted(poses)
    stacked = np.array([poses[i] for i in ids])
    centers = camera_center(stacked)
    scales = _DRIFT ** (np.arange(len(ids)) / (len(ids) - 1))
    steps = scales[:-1, None] * np.diff(centers, axis=0)
    moved = np.concatenate([centers[:1], centers[0] + np.cumsum(steps, axis=0)])
    return {
        i: np.column_stack([pose[:, :3], -pose[:, :3] @ center])
        for i, pose, center in zip(ids, stacked, moved, strict=True)
    }


def _problem(
    flight: _Flight, frame_id: FrameId, poses: dict[FrameId, Float64Array]
) -> DepthProblem:
    """The problem of a keyframe in a map with such poses; its points are where it sees them."""
    true = flight.views[frame_id].cam_from_world
    nearest = sorted(
        (i for i in poses if i != frame_id),
        key=lambda i: -int((flight.is_seen[i] & flight.is_seen[frame_id]).sum()),
    )[:_NUM_NEIGHBOURS]
    scale = _scale(flight, poses, frame_id, nearest[0])
    in_cam = transform_points(true, flight.points) * scale
    in_world = transform_points(invert_pose(poses[frame_id]), in_cam)

    def view(i: FrameId) -> DenseView:
        rows = np.flatnonzero(flight.is_seen[i] & flight.is_seen[frame_id])
        xy, _ = flight.views[i].project(flight.points[rows])
        return DenseView(
            frame_id=i,
            intrinsics=flight.intrinsics,
            cam_from_world=poses[i],
            points3D_ids=rows,
            keypoints_xy=xy,
            points3D_in_world=in_world[rows],
        )

    return DepthProblem(view=view(frame_id), neighbours=tuple(view(i) for i in nearest))


def _scale(
    flight: _Flight, poses: dict[FrameId, Float64Array], one: FrameId, other: FrameId
) -> float:
    """The unit of the map about a keyframe, in metres to the minus one."""
    drifted = camera_center(poses[one]) - camera_center(poses[other])
    true = camera_center(flight.true_poses[one]) - camera_center(flight.true_poses[other])
    return float(np.linalg.norm(drifted) / np.linalg.norm(true))


def _add(
    dense_map: DenseMap,
    flight: _Flight,
    frame_ids: list[FrameId],
    poses: dict[FrameId, Float64Array],
) -> list[FrameId]:
    """Those whose neighbours' depth contradicts their points, and that are left out."""
    left_out = []
    for frame_id in frame_ids:
        problem = _problem(flight, frame_id, poses)
        estimate = estimate_depth(problem, flight.images, _OPTIONS)
        if estimate.depth_map is None:
            assert estimate.status is DepthStatus.NOTHING_AGREES
            left_out.append(frame_id)
        else:
            dense_map.add(estimate.depth_map, problem)
    return left_out


def _placed(
    dense_map: DenseMap, flight: _Flight, poses: dict[FrameId, Float64Array]
) -> list[PlacedKeyframe]:
    ids = sorted(poses)
    rays = border_rays(camera_of(flight.intrinsics))
    return dense_map.placed(
        KeyframePoses(
            frame_ids=np.array(ids, np.int64),
            cam_from_world=np.array([poses[i] for i in ids]),
            focal_px=np.full(len(ids), flight.intrinsics.params[0]),
            border_rays=np.tile(rays, (len(ids), 1, 1)),
        )
    )


def _share_on_surfaces(
    dense_map: DenseMap, flight: _Flight, poses: dict[FrameId, Float64Array]
) -> float:
    """The share of points within two voxels of the true surface."""
    ids = sorted(poses)
    onto = similarity_between_poses(
        np.array([poses[i] for i in ids]), np.array([flight.true_poses[i] for i in ids])
    )
    assert onto is not None
    parts = list(dense_map.points(_placed(dense_map, flight, poses)))
    xyz = np.concatenate([part.xyz for part in parts]).astype(np.float64)
    voxel_m = float(np.median(np.concatenate([part.sampling for part in parts])))
    off_m = flight.town.layout.distances_m(transform_points(onto, xyz))
    assert len(xyz) > 20_000
    return float(np.mean(off_m <= 2.0 * voxel_m))


def test_after_a_loop_closure_there_are_no_double_surfaces(flight: _Flight, tmp_path: Path) -> None:
    poses = _drifted(flight.true_poses)
    dense_map = DenseMap(DepthStore(lambda: tmp_path))
    left_out = _add(dense_map, flight, sorted(poses), poses)
    assert set(left_out) < {1, 2, 3, 4, 27, 28, 29, 30}  # whose neighbours are across the loop
    assert _share_on_surfaces(dense_map, flight, poses) < 0.8

    # The loop is closed: also the unit of the map is another one.
    similarity = np.column_stack([1.7 * np.eye(3), [5.0, -3.0, 1.0]])
    closed = {
        i: pose_in_other_world(pose[None], similarity)[0] for i, pose in flight.true_poses.items()
    }
    outdated = [one.frame_id for one in _placed(dense_map, flight, closed) if one.is_outdated]
    assert len(outdated) < len(closed)
    assert not _add(dense_map, flight, [*outdated, *left_out], closed)
    assert not [one for one in _placed(dense_map, flight, closed) if one.is_wrong]
    assert _share_on_surfaces(dense_map, flight, closed) >= 0.98
