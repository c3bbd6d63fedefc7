"""The mapping state machine driven by hand: keyframes, tracked frames in; a map and facts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from engine.config import (
    CamerasConfig,
    Config,
    GlobalBundleAdjustmentConfig,
    MatchingConfig,
    RescueConfig,
    RuntimeConfig,
)
from engine.errors import InferenceError, MapError
from engine.events import (
    BundleAdjusted,
    CameraCalibrated,
    Event,
    FramePosed,
    FrameRegistered,
    KeyframeAdded,
    LoopClosed,
    MapInitialized,
    MetricScaleEstimated,
    MisplacementFound,
    PairVerified,
    RegistrationFailed,
)
from engine.geometry import camera_center
from engine.mapping.bundle_adjustment import GlobalAdjustment, solve_globally
from engine.mapping.mapper import KeyframeRecord, MappingPipeline
from engine.matching.scene_graph import SceneGraph
from engine.ports import PairMatcher
from engine.types import (
    Features,
    FrameId,
    FramePose,
    GpsFix,
    ImagePair,
    IntrinsicsPrior,
    Keyframe,
    RegistrationStatus,
    TrackedFrame,
)
from tests.support.dense_world import DenseFakeMatcher, dense_graph
from tests.support.synthetic import (
    EXACT_CAMERA,
    FOCAL_PX,
    FakeMatcher,
    PoseErrors,
    SyntheticCamera,
    SyntheticWorld,
    ground,
    pose_errors,
    poses_of,
    repeated_place,
    round_path,
    scene_graph,
    similarity,
    straight_path,
    turning_path,
)

CONFIG = Config(
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(
        synchronous_until=6, merge_after_keyframes=2
    ),
    runtime=RuntimeConfig(num_threads=1),
)
NO_RESTARTS = RescueConfig(max_restarts=0)
GRAPH: dict[str, Any] = {
    "exhaustive_below": 4,
    "temporal_offsets": (1, 2, 3, 4, 6),
    "pairs_per_keyframe": 10,
}


class Run:
    """A pipeline fed as the runtime feeds it, but on one thread."""

    def __init__(
        self, world: SyntheticWorld, *, config: Config = CONFIG, **matcher_settings: Any
    ) -> None:
        self.world = world
        self.config = config
        self.matcher: PairMatcher
        self.graph: SceneGraph
        self.matcher, self.graph = self._matching(matcher_settings)
        self.events: list[Event] = []
        self.poses: list[FramePose] = []
        self.pipeline = MappingPipeline(
            config,
            matcher=self.matcher,
            graph=self.graph,
            emit=self._emit,
            clock=lambda: float(len(self.events)),
        )
        self.adjustment: GlobalAdjustment | None = None

    def _matching(self, settings: dict[str, Any]) -> tuple[PairMatcher, SceneGraph]:
        return FakeMatcher(world=self.world, **settings), scene_graph(**GRAPH)

    def _keyframe(self, frame_id: int, *, gps: GpsFix | None) -> Keyframe:
        return self.world.keyframe(frame_id, gps=gps)

    def _emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def registered_ids(self) -> list[FrameId]:
        return self.pipeline.sparse_map.registered_ids

    def feed(self, frame_ids: Iterable[int], *, keyframe_every: int = 1, gps: bool = False) -> Run:
        """Feeds frames; each n-th is a keyframe, those between are tracked from it."""
        keyframe_id = 0
        for number, frame_id in enumerate(frame_ids):
            if number % keyframe_every == 0:
                keyframe_id = frame_id
                self._feed_keyframe(frame_id, gps=gps)
            else:
                tracked = self.world.tracked(frame_id, keyframe_id=keyframe_id)
                self.pipeline.add_tracked(tracked)
            self.poses += self.pipeline.take_new_poses()
        return self

    def finish(self) -> Run:
        if self.adjustment is not None:
            self.pipeline.merge(self.adjustment)
        self.pipeline.finish()
        self.poses += self.pipeline.take_new_poses()
        return self

    def told(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def errors(self) -> PoseErrors:
        return pose_errors(poses_of(self.pipeline.sparse_map), self.world)

    def _feed_keyframe(self, frame_id: int, *, gps: bool) -> None:
        if self.adjustment is not None and self.pipeline.merge_is_due:
            self.pipeline.merge(self.adjustment)
            self.adjustment = None
        fix = self.world.gps(frame_id) if gps else None
        self.pipeline.add_keyframe(self._keyframe(frame_id, gps=fix))
        started = self.pipeline.start_global_adjustment()
        if started is not None:
            solve(started)
            self.adjustment = started


def solve(adjustment: GlobalAdjustment) -> None:
    solve_globally(
        adjustment.reconstruction,
        constant_camera_ids=adjustment.constant_camera_ids,
        max_iterations=20,
        num_threads=1,
    )


def run(world: SyntheticWorld, **settings: Any) -> Run:
    """Feeds all frames as keyframes and finishes."""
    return Run(world, **settings).feed(world.frame_ids).finish()


# -- a video --------------------------------------------------------------------------------------

NUM_FRAMES = 43
KEYFRAME_EVERY = 3
KEYFRAMES = list(range(1, NUM_FRAMES + 1, KEYFRAME_EVERY))


@pytest.fixture(scope="module")
def video() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES, step=0.6), noise_px=0.5)


@pytest.fixture(scope="module")
def mapped_video(video: SyntheticWorld) -> Run:
    return Run(video).feed(video.frame_ids, keyframe_every=KEYFRAME_EVERY).finish()


def test_a_video_is_mapped_completely(mapped_video: Run) -> None:
    assert mapped_video.registered_ids == KEYFRAMES
    assert mapped_video.pipeline.num_keyframes == len(KEYFRAMES)
    errors = mapped_video.errors()
    assert 1e-5 < errors.rmse_ratio < 1e-3
    assert errors.max_rotation_rad < 0.01
    assert 0.4 < mapped_video.pipeline.sparse_map.mean_reprojection_error_px() < 0.65
    assert mapped_video.pipeline.sparse_map.reconstruction.is_valid()


def test_every_frame_of_a_video_has_its_pose(mapped_video: Run, video: SyntheticWorld) -> None:
    trajectory = mapped_video.pipeline.trajectory()
    assert [pose.frame_id for pose in trajectory] == video.frame_ids
    assert [pose.is_keyframe for pose in trajectory] == [i in KEYFRAMES for i in video.frame_ids]
    assert mapped_video.pipeline.num_interpolated_frames() == 0
    errors = pose_errors({pose.frame_id: pose.cam_from_world for pose in trajectory}, video)
    assert 1e-5 < errors.rmse_ratio < 3e-3


def test_each_frame_is_reported_once_when_its_pose_is_known(
    mapped_video: Run, video: SyntheticWorld
) -> None:
    reported = [pose.frame_id for pose in mapped_video.poses]
    assert sorted(reported) == video.frame_ids
    assert [event.frame_id for event in mapped_video.told(FramePosed)] == reported
    assert mapped_video.pipeline.take_new_poses() == []
    late = reported[reported.index(FrameId(16)) :]  # frames wait only until there is a map
    assert late == sorted(late)


def test_poses_as_first_reported_are_already_good(mapped_video: Run, video: SyntheticWorld) -> None:
    first = {pose.frame_id: pose.cam_from_world for pose in mapped_video.poses}
    assert 1e-5 < pose_errors(first, video).rmse_ratio < 1e-2


def test_events_come_in_a_sensible_order(mapped_video: Run) -> None:
    events = mapped_video.events
    assert isinstance(events[0], CameraCalibrated)
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    (initialized,) = mapped_video.told(MapInitialized)
    assert initialized.attempt == 1
    added = [event.frame_id for event in mapped_video.told(KeyframeAdded)]
    assert added == KEYFRAMES
    for kind, frame_ids_of in ORDERED:
        for event in mapped_video.told(kind):
            before = events[: events.index(event)]
            known = {e.frame_id for e in before if isinstance(e, KeyframeAdded)}
            assert set(frame_ids_of(event)) <= known
    registered = mapped_video.told(FrameRegistered)
    assert [event.num_registered for event in registered] == sorted(
        event.num_registered for event in registered
    )
    assert all(events.index(event) > events.index(initialized) for event in registered)
    assert registered[-1].num_registered == len(KEYFRAMES)


ORDERED: Sequence[tuple[type[Event], Callable[[Any], tuple[FrameId, ...]]]] = (
    (PairVerified, lambda event: (event.first, event.second)),
    (MapInitialized, lambda event: (event.first, event.second)),
    (FrameRegistered, lambda event: (event.frame_id,)),
)


def test_the_view_shows_the_map_as_it_is(mapped_video: Run) -> None:
    view, sparse_map = mapped_video.pipeline.view(), mapped_video.pipeline.sparse_map
    assert view.keyframe_ids.tolist() == sparse_map.registered_ids
    for row, frame_id in enumerate(sparse_map.registered_ids):
        np.testing.assert_array_equal(view.cam_from_world[row], sparse_map.cam_from_world(frame_id))
    assert set(view.focal_px.tolist()) == {FOCAL_PX}
    assert set(map(tuple, view.image_sizes.tolist())) == {(1000, 750)}
    assert len(view.points3D_in_world) == sparse_map.num_points3D > 300
    assert (view.colors > 0).any(axis=1).all()
    assert set(view.chunk_ids.tolist()) <= set(KEYFRAMES)
    edges = mapped_video.graph.edges()
    assert view.edges.tolist() == [[e.pair.first, e.pair.second] for e in edges]
    assert view.edge_reasons == tuple(e.reason for e in edges)


def test_the_view_of_no_map_is_empty(video: SyntheticWorld) -> None:
    view = Run(video).feed([1, 4]).pipeline.view()
    assert view.keyframe_ids.shape == (0,)
    assert view.cam_from_world.shape == (0, 3, 4)
    assert view.points3D_in_world.shape == (0, 3)
    assert view.edges.tolist() == [[1, 4]]


def test_the_record_of_a_keyframe_holds_copies(video: SyntheticWorld) -> None:
    fed = Run(video).feed(KEYFRAMES[:6])
    record = fed.pipeline.keyframe_record(FrameId(KEYFRAMES[5]))
    assert record.keyframe.frame_id == KEYFRAMES[5]
    assert {pair.pair.second for pair in record.pairs} == {KEYFRAMES[5]}
    assert len(record.pairs) >= 3
    assert record.moved == ()
    record.camera.params = [1.0, 2.0, 3.0, 4.0]
    fed.pipeline.cameras()[0].params = [1.0, 2.0, 3.0, 4.0]
    assert fed.pipeline.sparse_map.camera("camera").params.tolist() == list(EXACT_CAMERA)


# -- adjusting ------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_map_to_the_last_bit(
    mapped_video: Run, video: SyntheticWorld
) -> None:
    again = Run(video).feed(video.frame_ids, keyframe_every=KEYFRAME_EVERY).finish()
    merged = [event for event in again.told(BundleAdjusted) if event.keyframes_added_meanwhile]
    assert merged
    for one, other in zip(
        mapped_video.pipeline.trajectory(), again.pipeline.trajectory(), strict=True
    ):
        assert np.array_equal(one.cam_from_world, other.cam_from_world)
    views = mapped_video.pipeline.view(), again.pipeline.view()
    assert np.array_equal(views[0].points3D_in_world, views[1].points3D_in_world)
    assert np.array_equal(views[0].chunk_ids, views[1].chunk_ids)


def test_small_maps_are_adjusted_at_once_and_larger_ones_on_a_copy(mapped_video: Run) -> None:
    *grown, final = mapped_video.told(BundleAdjusted)
    meanwhile = {event.num_keyframes: event.keyframes_added_meanwhile for event in grown}
    assert len(meanwhile) >= 3
    assert all(num == 0 for size, num in meanwhile.items() if size <= 6)
    assert 2 in meanwhile.values()
    assert min(size for size, num in meanwhile.items() if num) > 6
    assert final.num_keyframes == len(KEYFRAMES)
    assert final.keyframes_added_meanwhile == 0
    assert final.reprojection_error_after_px <= final.reprojection_error_before_px


def test_a_result_is_merged_a_fixed_number_of_keyframes_later(video: SyntheticWorld) -> None:
    fed = Run(video)
    frame_ids = iter(KEYFRAMES)
    while fed.adjustment is None:
        fed.feed([next(frame_ids)])
    assert not fed.pipeline.merge_is_due
    fed.pipeline.add_keyframe(video.keyframe(next(frame_ids)))
    assert not fed.pipeline.merge_is_due
    assert fed.pipeline.start_global_adjustment() is None  # one at a time
    fed.pipeline.add_keyframe(video.keyframe(next(frame_ids)))
    assert fed.pipeline.merge_is_due
    version = fed.pipeline.view().version
    fed.pipeline.merge(fed.adjustment)
    assert fed.told(BundleAdjusted)[-1].keyframes_added_meanwhile == 2
    assert not fed.pipeline.merge_is_due
    assert fed.pipeline.view().version > version


def test_an_adjustment_at_once_is_a_change_of_the_map(video: SyntheticWorld) -> None:
    """Views and tracked frames must not go on with the points as they were."""
    fed = Run(video)
    for frame_id in KEYFRAMES[:6]:
        fed.pipeline.add_keyframe(video.keyframe(frame_id))
        version, num_told = fed.pipeline.view().version, len(fed.told(BundleAdjusted))
        assert fed.pipeline.start_global_adjustment() is None
        is_adjusted = len(fed.told(BundleAdjusted)) > num_told
        assert (fed.pipeline.view().version > version) is is_adjusted
    assert fed.told(BundleAdjusted)


def test_an_abandoned_or_foreign_adjustment_is_dropped(video: SyntheticWorld) -> None:
    fed = Run(video)
    frame_ids = iter(KEYFRAMES)
    while fed.adjustment is None:
        fed.feed([next(frame_ids)])
    fed.pipeline.abandon_adjustment()
    before = fed.pipeline.view()
    fed.pipeline.merge(fed.adjustment)
    assert fed.pipeline.view().version == before.version
    assert np.array_equal(fed.pipeline.view().points3D_in_world, before.points3D_in_world)
    assert not fed.pipeline.merge_is_due


def test_an_adjustment_that_comes_after_the_end_is_dropped(video: SyntheticWorld) -> None:
    fed = Run(video)
    frame_ids = iter(KEYFRAMES)
    while fed.adjustment is None:
        fed.feed([next(frame_ids)])
    fed.pipeline.finish()
    poses = poses_of(fed.pipeline.sparse_map)
    fed.pipeline.merge(fed.adjustment)
    after = poses_of(fed.pipeline.sparse_map)
    assert all(np.array_equal(poses[i], after[i]) for i in poses)


def test_a_closed_loop_is_told_and_adjusted() -> None:
    world = SyntheticWorld(round_path(26, turns=26 / 24), noise_px=0.5)
    mapped = run(world)
    loop = mapped.told(LoopClosed)[0]
    assert loop.first <= 3
    assert loop.second >= 22
    following = mapped.events[mapped.events.index(loop) :]
    assert any(isinstance(event, BundleAdjusted) for event in following)
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


# -- starting, restarting, rescuing ---------------------------------------------------------------


@pytest.fixture(scope="module")
def path() -> SyntheticWorld:
    return SyntheticWorld(straight_path(14), noise_px=0.5)


def splits_after(last: int) -> Callable[[ImagePair], bool]:
    """Drops all pairs between the first keyframes and the others."""
    return lambda pair: pair.first <= last < pair.second


def test_a_map_starts_as_soon_as_there_are_enough_keyframes(path: SyntheticWorld) -> None:
    fed = Run(path).feed([1, 2, 3])
    assert not fed.pipeline.is_initialized
    assert fed.pipeline.trajectory() == []
    assert fed.pipeline.take_new_poses() == []
    fed.feed([4])
    assert fed.pipeline.is_initialized
    assert {pose.frame_id for pose in fed.poses} == set(fed.registered_ids)


def test_few_keyframes_make_a_map_at_the_end(path: SyntheticWorld) -> None:
    mapped = Run(path).feed([1, 2, 3]).finish()
    assert mapped.registered_ids == [1, 2, 3]
    assert len(mapped.told(MapInitialized)) == 1


def test_a_poor_start_is_replaced_by_a_fuller_map(path: SyntheticWorld) -> None:
    mapped = Run(path, dropped=splits_after(4)).feed(path.frame_ids)
    attempts = mapped.told(MapInitialized)
    assert [event.attempt for event in attempts] == [1, 2]
    assert attempts[0].second <= 4 < attempts[1].first
    assert mapped.registered_ids == path.frame_ids[4:]
    failed = {event.frame_id for event in mapped.told(RegistrationFailed)}
    assert failed
    assert failed <= set(path.frame_ids[4:])
    assert all(
        event.status is RegistrationStatus.TOO_FEW_CORRESPONDENCES
        for event in mapped.told(RegistrationFailed)
    )
    assert sorted(pose.frame_id for pose in mapped.poses) == path.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


def test_missing_keyframes_are_rescued_at_the_end(path: SyntheticWorld) -> None:
    config = CONFIG.model_copy(update={"rescue": NO_RESTARTS})
    mapped = Run(path, config=config, dropped=splits_after(4)).feed(path.frame_ids)
    assert mapped.registered_ids == path.frame_ids[:4]
    mapped.finish()
    assert mapped.registered_ids == path.frame_ids[4:]
    assert mapped.told(MapInitialized)[-1].attempt == 2


def test_a_rescue_that_holds_less_changes_nothing(path: SyntheticWorld) -> None:
    mapped = run(path, dropped=splits_after(10))
    assert mapped.registered_ids == path.frame_ids[:10]
    assert len(mapped.told(MapInitialized)) == 1
    assert len(mapped.pipeline.trajectory()) == 14  # the others as near as they can be guessed
    assert mapped.pipeline.num_interpolated_frames() == 4


def test_an_adjustment_of_a_map_that_was_replaced_is_dropped(path: SyntheticWorld) -> None:
    config = CONFIG.model_copy(
        update={
            "global_bundle_adjustment": GlobalBundleAdjustmentConfig(
                synchronous_until=2, merge_after_keyframes=100, growth_ratio=1.01
            )
        }
    )
    fed = Run(path, config=config, dropped=splits_after(5))
    frame_ids = iter(path.frame_ids)
    while fed.adjustment is None:
        fed.feed([next(frame_ids)])
    stale = fed.adjustment
    while len(fed.told(MapInitialized)) < 2:
        fed.feed([next(frame_ids)])
    poses = poses_of(fed.pipeline.sparse_map)
    fed.pipeline.merge(stale)
    after = poses_of(fed.pipeline.sparse_map)
    assert all(np.array_equal(poses[i], after[i]) for i in poses)


def test_repeated_structure_is_found_out_and_put_right() -> None:
    """Two places look alike; the way between them is flown last."""
    poses = straight_path(18)
    points, looks_like = repeated_place(ground(poses), x_range=(3.0, 27.0), shift=24.0, ratio=0.4)
    world = SyntheticWorld(poses, points=points, looks_like=looks_like, noise_px=0.5)
    order = [*range(1, 7), *range(13, 19), *range(7, 13)]
    mapped = Run(world).feed(order)
    (found,) = mapped.told(MisplacementFound)
    assert set(found.keyframe_ids) == set(range(13, 19))
    mapped.finish()
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3
    again = [e.frame_id for e in mapped.told(FrameRegistered) if e.is_retry]
    assert set(range(13, 19)) <= set(again)


# -- nothing useful -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Useless:
    world: SyntheticWorld
    no_matches: bool = False


USELESS = {
    "nothing": Useless(SyntheticWorld(straight_path(3)[:0], points=np.zeros((1, 3)))),
    "one keyframe": Useless(SyntheticWorld(straight_path(1))),
    "two identical": Useless(SyntheticWorld(np.repeat(straight_path(1), 2, axis=0))),
    "standing still": Useless(SyntheticWorld(np.repeat(straight_path(1), 8, axis=0), noise_px=0.5)),
    "no matches": Useless(SyntheticWorld(straight_path(8)), no_matches=True),
    "no texture": Useless(SyntheticWorld(straight_path(8), points=np.empty((0, 3)))),
    "known camera turning": Useless(SyntheticWorld(turning_path(8), noise_px=0.5)),
    "unknown camera turning": Useless(
        SyntheticWorld(
            turning_path(8),
            noise_px=0.5,
            cameras=[SyntheticCamera(params=(680.0, 500.0, 375.0, 0.0))],
        )
    ),
}


@pytest.mark.parametrize("name", USELESS)
def test_what_cannot_be_mapped_ends_without_a_map_and_without_an_error(name: str) -> None:
    useless = USELESS[name]
    mapped = run(useless.world, dropped=lambda pair: useless.no_matches)
    assert not mapped.pipeline.is_initialized
    assert mapped.pipeline.num_keyframes == len(useless.world.poses)
    assert mapped.pipeline.trajectory() == []
    assert mapped.poses == []
    assert mapped.pipeline.view().points3D_in_world.shape == (0, 3)
    assert mapped.pipeline.gps_rmse_m() is None
    assert mapped.pipeline.num_interpolated_frames() == len(useless.world.poses)
    assert mapped.told(MapInitialized) == []


# -- a matcher that fails -------------------------------------------------------------------------


def feed_with_failures(fed: Run, frame_ids: Sequence[int]) -> list[int]:
    """Feeds keyframes as the runtime does; returns those at which the matcher failed."""
    failed = []
    for frame_id in frame_ids:
        try:
            fed.feed([frame_id])
        except InferenceError:
            failed.append(frame_id)
            fed.pipeline.start_global_adjustment()
        record = fed.pipeline.keyframe_record(FrameId(frame_id))
        assert record.camera.width == 1000
        known = fed.pipeline.sparse_map.neighbors(FrameId(frame_id))
        assert {id(pair) for pair in record.pairs} == {id(pair) for pair in known.values()}
    return failed


@pytest.mark.parametrize("failing", [[0], [6], [14, 15, 16], [25]])
def test_a_failure_of_the_matcher_costs_its_keyframe_some_pairs_only(
    path: SyntheticWorld, failing: list[int]
) -> None:
    fed = Run(path, fails=failing)
    failed = feed_with_failures(fed, path.frame_ids)
    assert len(failed) >= 1
    assert fed.pipeline.sparse_map.keyframe_ids == path.frame_ids == fed.graph.keyframe_ids
    fed.finish()
    missing = set(path.frame_ids) - set(fed.registered_ids)
    assert missing <= {failed[-1]}  # the last ones may have no pairs from later keyframes
    assert 1e-5 < fed.errors().rmse_ratio < 2e-3


def test_a_matcher_that_always_fails_makes_no_map(path: SyntheticWorld) -> None:
    fed = Run(path, fails=range(1000))
    assert feed_with_failures(fed, path.frame_ids) == path.frame_ids
    fed.finish()
    assert not fed.pipeline.is_initialized
    assert fed.pipeline.num_keyframes == len(path.frame_ids)


# -- cameras --------------------------------------------------------------------------------------


def camera_of(mapped: Run, key: str = "camera") -> list[float]:
    params: list[float] = mapped.pipeline.sparse_map.camera(key).params.tolist()
    return params


def test_a_known_calibration_stays_as_it_is(mapped_video: Run) -> None:
    assert camera_of(mapped_video) == list(EXACT_CAMERA)
    assert [event.how for event in mapped_video.told(CameraCalibrated)] == ["known"]


def test_a_known_calibration_is_refined_when_asked_for(path: SyntheticWorld) -> None:
    config = CONFIG.model_copy(update={"cameras": CamerasConfig(refine_known_intrinsics=True)})
    params = camera_of(run(path, config=config))
    assert params != list(EXACT_CAMERA)
    assert abs(params[0] - FOCAL_PX) < 0.01 * FOCAL_PX


def test_a_focal_length_from_exif_is_refined() -> None:
    prior = IntrinsicsPrior(focal_px=1.15 * FOCAL_PX)
    world = SyntheticWorld(straight_path(14), noise_px=0.5, cameras=[SyntheticCamera(prior=prior)])
    mapped = run(world)
    assert [event.how for event in mapped.told(CameraCalibrated)] == ["exif"]
    assert mapped.told(CameraCalibrated)[0].focal_px == 1.15 * FOCAL_PX
    assert abs(camera_of(mapped)[0] - FOCAL_PX) < 0.01 * FOCAL_PX
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


def test_a_camera_nobody_knows_is_calibrated_from_its_pairs() -> None:
    camera = SyntheticCamera(params=(600.0, 500.0, 375.0, 0.0))
    world = SyntheticWorld(straight_path(14), noise_px=0.3, cameras=[camera])
    mapped = run(world)
    told = mapped.told(CameraCalibrated)
    assert [event.how for event in told] == ["assumed", "two_view_geometries"]
    assert told[0].focal_px == 850.0
    assert abs(told[1].focal_px - 600.0) < 0.1 * 600.0
    assert abs(camera_of(mapped)[0] - 600.0) < 0.01 * 600.0
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


def test_a_configured_calibration_stays_when_fixed(path: SyntheticWorld) -> None:
    cameras = CamerasConfig(params=(1.01 * FOCAL_PX, 500.0, 375.0, 0.0), intrinsics="fixed")
    mapped = run(path, config=CONFIG.model_copy(update={"cameras": cameras}))
    assert camera_of(mapped) == [1.01 * FOCAL_PX, 500.0, 375.0, 0.0]
    assert mapped.registered_ids == path.frame_ids


def test_two_cameras_share_one_map() -> None:
    cameras = (
        SyntheticCamera.known("known"),
        SyntheticCamera(key="other", params=(700.0, 500.0, 375.0, 0.0)),
    )
    world = SyntheticWorld(straight_path(20, step=1.2), noise_px=0.3, cameras=cameras)
    mapped = run(world)
    assert mapped.registered_ids == world.frame_ids
    assert camera_of(mapped, "known") == list(EXACT_CAMERA)
    assert abs(camera_of(mapped, "other")[0] - 700.0) < 0.02 * 700.0
    assert [camera.camera_id for camera in mapped.pipeline.cameras()] == [1, 2]
    assert 1e-5 < mapped.errors().rmse_ratio < 2e-3


def test_an_unknown_camera_that_joins_late_is_calibrated_and_let_in() -> None:
    """A phone with a focal length that nobody guesses, when the map of a drone is under way."""
    phone = SyntheticCamera(key="phone", params=(1400.0, 500.0, 375.0, 0.0))
    poses = straight_path(24, step=1.2)
    world = SyntheticWorld(
        poses,
        points=ground(poses, density=2.0),
        cameras=(SyntheticCamera.known(), phone),
        camera_idx=[0] * 12 + [1] * 12,
        noise_px=0.3,
    )
    mapped = Run(world).feed(world.frame_ids)
    told = [event for event in mapped.told(CameraCalibrated) if event.camera_key == "phone"]
    assert [event.how for event in told][:2] == ["assumed", "two_view_geometries"]
    assert mapped.registered_ids == world.frame_ids
    mapped.finish()
    assert abs(camera_of(mapped, "phone")[0] - 1400.0) < 0.02 * 1400.0
    assert camera_of(mapped) == list(EXACT_CAMERA)
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


# -- a dense matcher ------------------------------------------------------------------------------


class DenseRun(Run):
    """The same with a dense matcher, whose keypoints move as matches claim them."""

    def __init__(self, world: SyntheticWorld, **settings: Any) -> None:
        super().__init__(world, **settings)
        self.records: list[KeyframeRecord] = []

    def _matching(self, settings: dict[str, Any]) -> tuple[PairMatcher, SceneGraph]:
        self.dense_matcher = DenseFakeMatcher(world=self.world, **settings)
        return self.dense_matcher, dense_graph(**GRAPH)

    def _keyframe(self, frame_id: int, *, gps: GpsFix | None) -> Keyframe:
        return self.dense_matcher.keyframe(frame_id)

    def _feed_keyframe(self, frame_id: int, *, gps: bool) -> None:
        try:
            super()._feed_keyframe(frame_id, gps=gps)
        finally:  # as the runtime does
            self.records.append(self.pipeline.keyframe_record(FrameId(frame_id)))


def dense_run(world: SyntheticWorld, **settings: Any) -> DenseRun:
    mapped = DenseRun(world, **settings)
    mapped.feed(world.frame_ids).finish()
    return mapped


def with_metric_scale(metric_scale: Literal["off", "report", "apply"]) -> Config:
    return CONFIG.model_copy(update={"matching": MatchingConfig(metric_scale=metric_scale)})


METRES_PER_UNIT = 6.5


@pytest.fixture(scope="module")
def dense_world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(16, step=1.2))


@pytest.fixture(scope="module")
def mapped_densely(dense_world: SyntheticWorld) -> DenseRun:
    return dense_run(dense_world, noise_px=0.5, wrong_ratio=0.1, metres_per_unit=METRES_PER_UNIT)


def test_dense_matches_make_a_map(mapped_densely: DenseRun, dense_world: SyntheticWorld) -> None:
    assert mapped_densely.registered_ids == dense_world.frame_ids
    errors = mapped_densely.errors()
    assert 1e-5 < errors.rmse_ratio < 2e-3
    assert errors.max_rotation_rad < 0.01
    reconstruction = mapped_densely.pipeline.sparse_map.reconstruction
    assert reconstruction.is_valid()
    assert 0.3 < mapped_densely.pipeline.sparse_map.mean_reprojection_error_px() < 0.9
    assert 4.5 < reconstruction.compute_mean_track_length() < 9.0


def test_graph_map_and_records_agree_on_where_keypoints_are(
    mapped_densely: DenseRun, dense_world: SyntheticWorld
) -> None:
    recorded: dict[FrameId, Features] = {}
    for record in mapped_densely.records:
        keyframe = record.keyframe
        assert keyframe.frame_id not in recorded
        assert all(moved.frame_id in recorded for moved in record.moved)
        recorded[keyframe.frame_id] = keyframe.features
        recorded.update((moved.frame_id, moved) for moved in record.moved)
    assert any(record.moved for record in mapped_densely.records)
    sparse_map = mapped_densely.pipeline.sparse_map
    for frame_id in dense_world.frame_ids:
        keypoints_xy = mapped_densely.graph.keyframe(frame_id).features.keypoints_xy
        assert np.array_equal(recorded[frame_id].keypoints_xy, keypoints_xy)
        assert np.array_equal(sparse_map.keyframe(frame_id).features.keypoints_xy, keypoints_xy)
        points2D = sparse_map.reconstruction.image(frame_id).points2D
        assert np.array_equal([point.xy for point in points2D], keypoints_xy)


def test_a_record_tells_of_tables_that_moved_once(mapped_densely: DenseRun) -> None:
    last = mapped_densely.records[-1]
    assert mapped_densely.pipeline.keyframe_record(last.keyframe.frame_id).moved == ()
    for record in mapped_densely.records:
        moved = [features.frame_id for features in record.moved]
        assert record.keyframe.frame_id not in moved
        assert len(set(moved)) == len(moved)


def test_the_same_dense_matches_give_the_same_map_to_the_last_bit(
    mapped_densely: DenseRun, dense_world: SyntheticWorld
) -> None:
    again = dense_run(dense_world, noise_px=0.5, wrong_ratio=0.1, metres_per_unit=METRES_PER_UNIT)
    for frame_id, pose in poses_of(mapped_densely.pipeline.sparse_map).items():
        assert np.array_equal(again.pipeline.sparse_map.cam_from_world(frame_id), pose)


def test_frames_between_are_tracked_by_keypoints_of_dense_tables() -> None:
    world = SyntheticWorld(straight_path(31, step=0.6))
    mapped = DenseRun(world, noise_px=0.3)

    def tracked(frame_id: int, *, keyframe_id: int) -> TrackedFrame:
        """Follows the corners that the keyframe's table starts with."""
        sparse = world.view(frame_id)
        fixed = mapped.dense_matcher.keyframe(keyframe_id).features.fixed_rows
        starts_xy = mapped.dense_matcher.keyframe(keyframe_id).features.keypoints_xy[fixed]
        ids = mapped.dense_matcher.point_ids(keyframe_id, starts_xy)
        _, places, rows = np.intersect1d(sparse.point_ids, ids, return_indices=True)
        return TrackedFrame(
            frame_id=FrameId(frame_id),
            keyframe_id=FrameId(keyframe_id),
            index=frame_id - 1,
            captured_at_s=0.1 * frame_id,
            received_at_s=0.1 * frame_id,
            keypoint_idx=fixed[rows],
            points_xy=sparse.points_xy[places],
        )

    for frame_id in world.frame_ids:
        keyframe_id = frame_id - (frame_id - 1) % 3
        if frame_id == keyframe_id:
            mapped.feed([frame_id])
        else:
            mapped.pipeline.add_tracked(tracked(frame_id, keyframe_id=keyframe_id))
    mapped.finish()
    trajectory = mapped.pipeline.trajectory()
    assert [pose.frame_id for pose in trajectory] == world.frame_ids
    assert mapped.pipeline.num_interpolated_frames() == 0
    errors = pose_errors({pose.frame_id: pose.cam_from_world for pose in trajectory}, world)
    assert 1e-5 < errors.rmse_ratio < 5e-3


def test_a_dense_matcher_that_fails_costs_its_keyframe_some_pairs_only(
    dense_world: SyntheticWorld,
) -> None:
    fed = DenseRun(dense_world, fails=[6, 9])
    failed = []
    for frame_id in dense_world.frame_ids:
        try:
            fed.feed([frame_id])
        except InferenceError:
            failed.append(frame_id)
    fed.finish()
    assert len(failed) == 2
    assert set(dense_world.frame_ids) - set(fed.registered_ids) <= {failed[-1]}
    assert 1e-5 < fed.errors().rmse_ratio < 2e-3
    for frame_id in dense_world.frame_ids:
        features = fed.pipeline.sparse_map.keyframe(frame_id).features
        assert features is fed.graph.keyframe(frame_id).features


# -- metric scale ---------------------------------------------------------------------------------


def metres_per_unit_of(mapped: Run) -> float:
    """Of the map, by the true flight."""
    centers = camera_center(np.array(list(poses_of(mapped.pipeline.sparse_map).values())))
    true_centers = METRES_PER_UNIT * camera_center(mapped.world.poses)
    scaling = similarity(centers, true_centers)
    return float(np.cbrt(np.linalg.det(scaling[:, :3])))


def test_the_scale_is_told_and_left_alone(mapped_densely: DenseRun) -> None:
    (told,) = mapped_densely.told(MetricScaleEstimated)
    assert not told.is_applied
    assert told.num_depths > 200
    assert 0.03 < told.spread_ratio < 0.08
    (initialized,) = mapped_densely.told(MapInitialized)
    order = mapped_densely.events
    assert order.index(told) < order.index(initialized)
    scale = mapped_densely.pipeline.metric_scale()
    assert scale is not None
    assert abs(scale.metres_per_map_unit / metres_per_unit_of(mapped_densely) - 1.0) < 0.01
    assert abs(metres_per_unit_of(mapped_densely) - 1.0) > 0.2, "nobody made it metres"


def test_a_map_is_made_metric_when_asked_for(dense_world: SyntheticWorld) -> None:
    mapped = dense_run(
        dense_world, config=with_metric_scale("apply"), metres_per_unit=METRES_PER_UNIT
    )
    (told,) = mapped.told(MetricScaleEstimated)
    assert told.is_applied
    assert abs(told.metres_per_map_unit - 1.0) > 0.2
    assert abs(metres_per_unit_of(mapped) - 1.0) < 0.02
    scale = mapped.pipeline.metric_scale()
    assert scale is not None
    assert abs(scale.metres_per_map_unit - 1.0) < 0.02
    assert mapped.registered_ids == dense_world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 2e-3
    # Poses were in metres from the first one on.
    first = {pose.frame_id: pose.cam_from_world for pose in mapped.poses}
    length = np.linalg.norm(camera_center(first[FrameId(16)]) - camera_center(first[FrameId(1)]))
    truth = METRES_PER_UNIT * np.linalg.norm(
        np.diff(camera_center(dense_world.poses)[[0, 15]], axis=0)
    )
    assert abs(length / truth - 1.0) < 0.03


@pytest.mark.parametrize("metric_scale", ["report", "apply"])
def test_without_depths_there_is_no_scale(
    dense_world: SyntheticWorld, metric_scale: Literal["report", "apply"]
) -> None:
    mapped = dense_run(dense_world, config=with_metric_scale(metric_scale))
    assert mapped.told(MetricScaleEstimated) == []
    assert mapped.pipeline.metric_scale() is None
    assert len(mapped.registered_ids) == len(dense_world.frame_ids)


def test_the_scale_is_not_looked_for_when_switched_off(dense_world: SyntheticWorld) -> None:
    mapped = DenseRun(dense_world, config=with_metric_scale("off"), metres_per_unit=METRES_PER_UNIT)
    mapped.feed(dense_world.frame_ids[:8])
    assert mapped.pipeline.is_initialized
    assert mapped.told(MetricScaleEstimated) == []
    assert mapped.pipeline.metric_scale() is None


# -- focal lengths a matcher sees -----------------------------------------------------------------


@pytest.mark.parametrize("uses", [True, False])
def test_a_camera_nobody_knows_is_calibrated_by_what_the_matcher_sees(uses: bool) -> None:
    camera = SyntheticCamera(params=(600.0, 500.0, 375.0, 0.0))
    world = SyntheticWorld(straight_path(14), cameras=[camera])
    config = CONFIG.model_copy(update={"matching": MatchingConfig(use_focal_lengths=uses)})
    mapped = dense_run(world, config=config, noise_px=0.3, tells_focal_length=True)
    told = mapped.told(CameraCalibrated)
    assert [event.how for event in told] == [
        "assumed",
        "pointmaps" if uses else "two_view_geometries",
    ]
    assert told[1].focal_px == 600.0 if uses else abs(told[1].focal_px - 600.0) < 60.0
    assert abs(camera_of(mapped)[0] - 600.0) < 0.01 * 600.0
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


def test_pointmaps_are_wanted_until_there_is_a_map_of_known_cameras(
    dense_world: SyntheticWorld,
) -> None:
    mapped = DenseRun(dense_world)
    mapped.feed(dense_world.frame_ids)
    wanted = [
        (max(request.pair.first, request.pair.second), request.wants_pointmaps)
        for call in mapped.dense_matcher.requests
        for request in call
    ]
    (initialized,) = mapped.told(MapInitialized)
    known = [event for event in mapped.events if isinstance(event, KeyframeAdded)]
    before = [
        e.frame_id for e in known if mapped.events.index(e) < mapped.events.index(initialized)
    ]
    assert {frame_id for frame_id, wants in wanted if wants} == set(before) - {1}
    assert {frame_id for frame_id, wants in wanted if not wants} == (
        set(dense_world.frame_ids) - set(before)
    )


# -- the rest -------------------------------------------------------------------------------------


def test_frames_of_several_sources_need_not_come_in_the_order_of_their_ids() -> None:
    world = SyntheticWorld(straight_path(14), noise_px=0.5)
    order = [2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13]
    mapped = Run(world).feed(order)
    pairs = {pair.pair for pair in mapped.pipeline.keyframe_record(FrameId(13)).pairs}
    assert ImagePair(FrameId(13), FrameId(14)) in pairs
    mapped.finish()
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


def test_the_distance_to_gps_is_told_in_metres() -> None:
    world = SyntheticWorld(straight_path(14), noise_px=0.5)
    mapped = Run(world).feed(world.frame_ids, gps=True).finish()
    rmse_m = mapped.pipeline.gps_rmse_m()
    assert rmse_m is not None
    assert 1e-4 < rmse_m < 0.01 * world.extent
    without = Run(world).feed(world.frame_ids[:6]).finish()
    assert without.pipeline.gps_rmse_m() is None


def test_a_tracked_frame_waits_for_its_keyframe(path: SyntheticWorld) -> None:
    """Frames between keyframes that come before the map are posed with it, each once."""
    world = SyntheticWorld(straight_path(13, step=0.6), noise_px=0.3)
    fed = Run(world).feed(range(1, 10), keyframe_every=3)
    assert fed.poses == []
    fed.feed([10])
    assert sorted(pose.frame_id for pose in fed.poses) == list(range(1, 11))
    waiting = [pose for pose in fed.poses if not pose.is_keyframe]
    errors = pose_errors({pose.frame_id: pose.cam_from_world for pose in waiting}, world)
    assert errors.max_ratio < 0.05


def test_a_keyframe_cannot_come_twice(path: SyntheticWorld) -> None:
    fed = Run(path).feed([1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="keyframe 5 was added before"):
        fed.feed([5])
    fed.feed([6])
    assert fed.registered_ids[-1] == 6


def test_a_camera_that_does_not_fit_its_model_leaves_the_pipeline_as_it_was(
    path: SyntheticWorld,
) -> None:
    fed = Run(path).feed([1, 2, 3, 4])
    prior = IntrinsicsPrior(focal_px=800.0, camera_model="SIMPLE_RADIAL", params=(800.0,))
    wrong = dataclasses.replace(path.keyframe(5), camera_key="wrong", intrinsics_prior=prior)
    with pytest.raises(MapError):
        fed.pipeline.add_keyframe(wrong)
    assert fed.pipeline.num_keyframes == 4
    fed.feed([5])
    assert fed.registered_ids == [1, 2, 3, 4, 5]


def test_a_frame_is_first_posed_as_followed_and_told_again_when_it_is_a_keyframe_of_the_map(
    video: SyntheticWorld,
) -> None:
    fed = Run(video).feed([1, 4, 7, 10])
    fed.pipeline.add_tracked(video.tracked(13, keyframe_id=10))
    fed.feed([13])
    told = [event for event in fed.told(FramePosed) if event.frame_id == 13]
    assert [(event.is_first, event.is_keyframe) for event in told] == [(True, False), (False, True)]
    assert [pose.frame_id for pose in fed.poses].count(FrameId(13)) == 1
    trajectory = [pose for pose in fed.pipeline.trajectory() if pose.frame_id == 13]
    assert [pose.is_keyframe for pose in trajectory] == [True]


def test_while_a_keyframe_is_matched_frames_after_it_are_posed_by_the_one_before(
    video: SyntheticWorld,
) -> None:
    fed = Run(video).feed([1, 4, 7, 10])
    fed.pipeline.meet_keyframe(video.keyframe(13))
    fed.pipeline.add_tracked(video.tracked(14, keyframe_id=13), video.tracked(14, keyframe_id=10))
    (early,) = fed.pipeline.take_new_poses()
    assert early.frame_id == 14
    fed.pipeline.map_keyframe(FrameId(13), fed.pipeline.match_keyframe(FrameId(13)), started_s=0.0)
    assert [pose.frame_id for pose in fed.pipeline.take_new_poses()] == [13]
    assert pose_errors(poses_of(fed.pipeline.sparse_map), video).rmse_ratio < 1e-3
