"""The early map of a video: frames get poses before the map starts, which is as without it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config import Config, InitializationConfig, MatchingConfig, WindowConfig
from engine.events import (
    CameraCalibrated,
    EarlyMapMade,
    MapInitialized,
    MetricScaleEstimated,
    OverlayFound,
)
from engine.geometry import camera_center, transform_points
from engine.mapping.maps import early_map
from engine.mapping.maps.restarts import MapBuilder
from engine.matching.pair_matching import PairMatching
from engine.types import Float32Array, FrameId, Keyframe, RegistrationStatus
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import (
    FakeMatcher,
    PoseErrors,
    SyntheticCamera,
    SyntheticWorld,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
    turning_path,
)

EVERY = 3
NUM_FRAMES = 22


class Video(MapperRun):
    """A mapper fed with every third frame of a world as a keyframe, and the others as tracked."""

    def __init__(
        self,
        world: SyntheticWorld,
        *,
        angle_deg: float = 3.0,
        min_angle_deg: float = 6.0,
        is_photo: bool = False,
        **matching: Any,
    ) -> None:
        settings = InitializationConfig(
            early_triangulation_angle_deg=angle_deg, min_triangulation_angle_deg=min_angle_deg
        )
        super().__init__(
            Config(
                initialization=settings,
                window=WindowConfig(enabled=False),
                matching=MatchingConfig(**matching),
            ),
            matcher=FakeMatcher(world=world),
            graph=scene_graph(exhaustive_below=4),
        )
        self.world = world
        self._is_photo = is_photo
        self._num_fed = 0

    def feed(self, num_frames: int) -> Video:
        """Feeds the next frames."""
        for frame_id in range(self._num_fed + 1, self._num_fed + num_frames + 1):
            keyframe_id = frame_id - (frame_id - 1) % EVERY
            if frame_id == keyframe_id:
                self.add_keyframe(self.keyframe(frame_id))
            else:
                self.add_frame(self.world.tracked(frame_id, keyframe_id=keyframe_id))
        self._num_fed += num_frames
        return self

    def keyframe(self, frame_id: int) -> Keyframe:
        """A frame as the front end describes it."""
        return replace(self.world.keyframe(frame_id), is_photo=self._is_photo)

    @property
    def posed_ids(self) -> list[int]:
        """Frames whose pose was reported."""
        return sorted(pose.frame_id for pose in self.poses)

    def errors(self) -> PoseErrors:
        """Of the poses as they were reported first."""
        return pose_errors({one.frame_id: one.cam_from_world for one in self.poses}, self.world)


@pytest.fixture(scope="module")
def known() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES, step=0.6), noise_px=0.5)


@pytest.fixture(scope="module")
def unknown() -> SyntheticWorld:
    path = straight_path(NUM_FRAMES, step=0.6)
    return SyntheticWorld(path, cameras=[SyntheticCamera()], noise_px=0.5)


def test_two_keyframes_of_a_known_camera_give_frames_their_poses(known: SyntheticWorld) -> None:
    video = Video(known).feed(EVERY)
    assert video.poses == []
    video.feed(1)
    (made,) = video.emitted(EarlyMapMade)
    assert (made.first, made.second, made.num_registered) == (1, 4, 2)
    assert video.posed_ids == [1, 2, 3, 4]  # those before it, too
    video.feed(2)
    assert video.posed_ids == [1, 2, 3, 4, 5, 6]
    assert 1e-5 < video.errors().rmse_ratio < 0.02
    assert video.errors().max_rotation_rad < 0.03


def test_an_early_map_asks_for_no_larger_angle_than_the_map_does(known: SyntheticWorld) -> None:
    video = Video(known, angle_deg=60.0, min_angle_deg=3.0).feed(EVERY + 1)
    assert len(video.emitted(EarlyMapMade)) == 1


def test_keyframes_join_the_early_map_until_the_map_starts(known: SyntheticWorld) -> None:
    video = Video(known).feed(2 * EVERY + 1)
    assert video.posed_ids == list(range(1, 2 * EVERY + 2))
    assert len(video.emitted(EarlyMapMade)) == 1
    assert not video.emitted(MapInitialized)
    assert video.mapper.view().keyframe_ids.tolist() == [1, 4, 7]
    video.feed(EVERY)
    assert len(video.emitted(MapInitialized)) == 1
    assert video.registered_ids == [1, 4, 7, 10]


def test_an_unknown_focal_length_needs_a_third_keyframe(unknown: SyntheticWorld) -> None:
    video = Video(unknown).feed(EVERY + 1)
    assert video.poses == []
    video.feed(EVERY)
    (made,) = video.emitted(EarlyMapMade)
    assert made.num_registered == 3
    assert 1e-5 < video.errors().rmse_ratio < 0.05


def test_where_three_keyframes_do_not_tell_the_focal_length_there_is_no_early_map() -> None:
    path = straight_path(NUM_FRAMES, step=0.1)  # seen from nearly the same direction
    world = SyntheticWorld(path, cameras=[SyntheticCamera()], noise_px=1.0)
    video = Video(world, angle_deg=0.5).feed(2 * EVERY + 1)
    assert not video.emitted(EarlyMapMade)
    known = SyntheticWorld(path, noise_px=1.0)
    assert Video(known, angle_deg=0.5).feed(2 * EVERY + 1).emitted(EarlyMapMade)


@pytest.mark.parametrize("is_known", [True, False])
def test_the_map_is_the_same_without_an_early_one(
    is_known: bool, known: SyntheticWorld, unknown: SyntheticWorld
) -> None:
    world = known if is_known else unknown
    early, late = Video(world).feed(NUM_FRAMES), Video(world, angle_deg=0.0).feed(NUM_FRAMES)
    assert early.emitted(EarlyMapMade)
    assert not late.emitted(EarlyMapMade)
    early.end()
    late.end()
    assert early.registered_ids == late.registered_ids
    assert early.sparse_map.num_points3D == late.sparse_map.num_points3D
    assert early.figures.cameras[0].focal_px == pytest.approx(late.figures.cameras[0].focal_px)
    errors = [pose_errors(poses_of(one.sparse_map), world).rmse_ratio for one in (early, late)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert [e.how for e in early.emitted(CameraCalibrated)] == [
        e.how for e in late.emitted(CameraCalibrated)
    ]
    errors = [
        pose_errors({p.frame_id: p.cam_from_world for p in one.trajectory}, world).rmse_ratio
        for one in (early, late)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_the_map_lies_where_the_early_one_did(known: SyntheticWorld) -> None:
    video = Video(known).feed(2 * EVERY + 1)
    before = [(pose.frame_id, pose.cam_from_world) for pose in video.poses if pose.is_keyframe]
    assert len(before) == 3
    video.feed(EVERY)
    after = poses_of(video.sparse_map)
    assert {pose.world_number for pose in video.poses} == {0}
    for frame_id, cam_from_world in before:
        assert np.allclose(after[frame_id], cam_from_world, atol=0.05)


# -- one gauge in a world --------------------------------------------------------------------------


METRES_PER_UNIT = 3.0  # of the world


def give_depths(
    world: SyntheticWorld, monkeypatch: pytest.MonkeyPatch, *, metres_per_unit: float
) -> None:
    """Lets matching give the true depths of all keypoints; 0 m per unit: none is known."""

    def depths_m(_: PairMatching, frame_id: FrameId) -> Float32Array:
        points = world.points[world.view(frame_id).point_ids]
        depths = transform_points(world.pose(frame_id), points)[:, 2]
        return (metres_per_unit * depths).astype(np.float32)

    monkeypatch.setattr(PairMatching, "depths_m", depths_m)


def test_where_maps_are_in_metres_the_early_one_is_and_the_map_lies_in_its_place(
    known: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_depths(known, monkeypatch, metres_per_unit=METRES_PER_UNIT)
    video = Video(known, metric_scale="apply").feed(3 * EVERY + 1)
    assert video.emitted(EarlyMapMade)
    assert len(video.emitted(MapInitialized)) == 1
    (estimated,) = video.emitted(MetricScaleEstimated)
    assert estimated.is_applied
    assert {pose.world_number for pose in video.poses} == {0}
    poses = {pose.frame_id: pose.cam_from_world for pose in video.poses}
    for since in (1, 4, 7):  # by the early map, across, and by the map
        ids = FrameId(since), FrameId(since + EVERY)
        (one, other), (true_one, true_other) = (
            [camera_center(source[i]) for i in ids]
            for source in (poses, {i: known.pose(i) for i in ids})
        )
        true_m = METRES_PER_UNIT * np.linalg.norm(true_other - true_one)
        assert np.linalg.norm(other - one) == pytest.approx(true_m, rel=0.03)


def test_where_maps_are_in_metres_and_no_depth_is_known_there_is_no_early_map(
    known: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_depths(known, monkeypatch, metres_per_unit=0.0)
    video = Video(known, metric_scale="apply").feed(3 * EVERY + 1)
    assert not video.emitted(EarlyMapMade)
    assert video.emitted(MapInitialized)


def register_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no keyframe join the early map, so that a fuller one takes its place."""
    refused = SimpleNamespace(status=RegistrationStatus.TOO_FEW_INLIERS)
    monkeypatch.setattr(early_map, "register_and_refine", lambda *_, **__: refused)


def test_a_fuller_early_map_lies_where_the_former_did(
    known: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_nothing(monkeypatch)
    video = Video(known).feed(2 * EVERY)
    video.feed(1)
    assert [made.num_registered for made in video.emitted(EarlyMapMade)] == [2, 3]
    assert {pose.world_number for pose in video.poses} == {0}
    assert video.posed_ids == list(range(1, 2 * EVERY + 2))
    assert 1e-5 < video.errors().rmse_ratio < 0.02
    video.feed(EVERY)
    assert {pose.world_number for pose in video.poses} == {0}
    assert 1e-5 < video.errors().rmse_ratio < 0.02


def test_an_early_map_that_cannot_be_placed_onto_the_former_begins_a_world(
    known: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_nothing(monkeypatch)
    video = Video(known).feed(2 * EVERY)
    monkeypatch.setattr(MapBuilder, "place", lambda *_, **__: False)
    video.feed(1)
    assert [made.num_registered for made in video.emitted(EarlyMapMade)] == [2, 3]
    worlds = {pose.frame_id: pose.world_number for pose in video.poses}
    assert set(list(worlds.values())[:-1]) == {0}
    assert worlds[FrameId(2 * EVERY + 1)] == 1
    video.feed(EVERY)  # nor can the map
    assert len(video.emitted(MapInitialized)) == 1
    assert video.poses[-1].world_number == 2


def test_what_starts_after_overlays_took_the_early_map_begins_a_world(
    known: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = Video(known).feed(2 * EVERY + 1)
    assert {pose.world_number for pose in video.poses} == {0}
    grid = video.matching._overlays._grid(known.keyframe(1))
    cover = np.zeros_like(grid._is_covered)
    cover[:, -cover.shape[1] // 20 :] = True
    monkeypatch.setattr(grid, "_cover", lambda: cover)
    monkeypatch.setattr(grid, "_keyframes", {(0, 0): {FrameId(1)}})
    video.feed(EVERY)
    assert video.emitted(OverlayFound)
    assert len(video.emitted(MapInitialized)) == 1
    worlds = {pose.frame_id: pose.world_number for pose in video.poses}
    assert {worlds[FrameId(i)] for i in range(1, 2 * EVERY + 2)} == {0}
    assert worlds[FrameId(3 * EVERY + 1)] == 1


def test_photos_and_who_does_not_want_it_have_no_early_map(known: SyntheticWorld) -> None:
    assert Video(known, is_photo=True).feed(2 * EVERY + 1).poses == []
    assert Video(known, angle_deg=0.0).feed(2 * EVERY + 1).poses == []


def test_a_camera_that_only_turns_has_no_early_map() -> None:
    world = SyntheticWorld(turning_path(NUM_FRAMES), noise_px=0.5)
    video = Video(world).feed(NUM_FRAMES)
    assert not video.emitted(EarlyMapMade)
    assert video.poses == []


def test_nothing_of_an_early_map_is_kept_where_no_map_can_start(known: SyntheticWorld) -> None:
    video = Video(known, min_angle_deg=89.0).feed(NUM_FRAMES)
    assert video.emitted(EarlyMapMade)
    assert set(video.world.frame_ids) == set(video.posed_ids)
    assert not video.emitted(MapInitialized)
    video.end()
    assert video.figures.counts.num_registered == 0
    assert video.mapper.trajectories() == []
