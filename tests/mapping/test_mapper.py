"""The mapper driven by hand: keyframes and tracked frames in; a map, steps and events out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pytest

from engine.config import (
    CamerasConfig,
    Config,
    GlobalBundleAdjustmentConfig,
    InitializationConfig,
    MatchingConfig,
    RescueConfig,
    RuntimeConfig,
    WindowConfig,
)
from engine.errors import MapError
from engine.events import (
    BundleAdjusted,
    CameraCalibrated,
    ComponentStarted,
    EarlyMapMade,
    Event,
    FramePosed,
    FrameRegistered,
    KeyframeAdded,
    LoopClosed,
    MainMapChanged,
    MapInitialized,
    MetricScaleEstimated,
    PairVerified,
    RegistrationFailed,
    Warned,
    WindowPurpose,
    WindowSolved,
    WindowVerdict,
)
from engine.geometry import camera_center, quat_xyzw_from_rotation
from engine.mapping.jobs import FinishedJob, JobKind, MapJob
from engine.mapping.mapper import Mapper
from engine.mapping.windows import window_schedule
from engine.mapping.windows.window_merging import WindowMerge
from engine.matching.scene_graph import SceneGraph
from engine.ports import PairMatcher
from engine.types import (
    Features,
    FrameId,
    GpsFix,
    ImagePair,
    IntrinsicsPrior,
    Keyframe,
    RegistrationStatus,
    TrackedFrame,
)
from tests.support.dense_world import DenseFakeMatcher, dense_graph
from tests.support.mapper_runs import MapperRun
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
NO_COMPONENTS = RescueConfig(grow_components=False)
NO_EARLY_MAP = CONFIG.model_copy(
    update={"initialization": InitializationConfig(early_triangulation_angle_deg=0.0)}
)
GRAPH: dict[str, Any] = {
    "exhaustive_below": 4,
    "temporal_offsets": (1, 2, 3, 4, 6),
    "pairs_per_keyframe": 10,
}


class Run(MapperRun):
    """A mapper fed with frames of a world.

    Args:
        world: what is seen.
        config: of the mapper.
        matcher_settings: of the fake matcher.
    """

    def __init__(
        self, world: SyntheticWorld, *, config: Config = CONFIG, **matcher_settings: Any
    ) -> None:
        self.world = world
        matcher, graph = self._matching(matcher_settings)
        super().__init__(config, matcher=matcher, graph=graph)

    def _matching(self, settings: dict[str, Any]) -> tuple[PairMatcher, SceneGraph]:
        return FakeMatcher(world=self.world, **settings), scene_graph(**GRAPH)

    def keyframe(self, frame_id: int, *, gps: GpsFix | None = None) -> Keyframe:
        """A frame as the front end describes it."""
        return self.world.keyframe(frame_id, gps=gps)

    @property
    def is_initialized(self) -> bool:
        """Whether there is a map."""
        return self.sparse_map.num_registered > 0

    def feed(self, frame_ids: Iterable[int], *, keyframe_every: int = 1, gps: bool = False) -> Self:
        """Feeds frames; each n-th is a keyframe, those between are tracked from it."""
        keyframe_id = 0
        for number, frame_id in enumerate(frame_ids):
            if number % keyframe_every == 0:
                keyframe_id = frame_id
                fix = self.world.gps(frame_id) if gps else None
                self.add_keyframe(self.keyframe(frame_id, gps=fix))
            else:
                self.add_frame(self.world.tracked(frame_id, keyframe_id=keyframe_id))
        return self

    def feed_until_a_job(self, frame_ids: Iterator[int]) -> MapJob:
        """Feeds keyframes until a job is handed out."""
        while not self.jobs:
            self.feed([next(frame_ids)])
        return self.jobs[0]

    def finish(self) -> Self:
        """Finishes the map."""
        self.end()
        return self

    def errors(self) -> PoseErrors:
        """Of the poses in the map."""
        return pose_errors(poses_of(self.sparse_map), self.world)


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
    assert mapped_video.figures.counts.num_keyframes == len(KEYFRAMES)
    errors = mapped_video.errors()
    assert 1e-5 < errors.rmse_ratio < 1e-3
    assert errors.max_rotation_rad < 0.01
    assert 0.4 < mapped_video.sparse_map.mean_reprojection_error_px() < 0.65
    assert mapped_video.sparse_map.reconstruction.is_valid()


def test_every_frame_of_a_video_has_its_pose(mapped_video: Run, video: SyntheticWorld) -> None:
    trajectory = mapped_video.trajectory
    assert [pose.frame_id for pose in trajectory] == video.frame_ids
    assert [pose.is_keyframe for pose in trajectory] == [i in KEYFRAMES for i in video.frame_ids]
    assert mapped_video.figures.num_interpolated_frames == 0
    errors = pose_errors({pose.frame_id: pose.cam_from_world for pose in trajectory}, video)
    assert 1e-5 < errors.rmse_ratio < 3e-3


def test_each_frame_is_reported_once_when_its_pose_is_known(
    mapped_video: Run, video: SyntheticWorld
) -> None:
    reported = [pose.frame_id for pose in mapped_video.poses]
    assert sorted(reported) == video.frame_ids
    assert [event.frame_id for event in mapped_video.emitted(FramePosed)] == reported
    assert mapped_video.mapper.report().new_poses == ()
    late = reported[reported.index(FrameId(16)) :]  # frames wait only until there is a map
    assert late == sorted(late)


def test_poses_as_first_reported_are_already_good(mapped_video: Run, video: SyntheticWorld) -> None:
    first = {pose.frame_id: pose.cam_from_world for pose in mapped_video.poses}
    assert 1e-5 < pose_errors(first, video).rmse_ratio < 1e-2


def test_events_come_in_a_sensible_order(mapped_video: Run) -> None:
    events = mapped_video.events
    assert isinstance(events[0], CameraCalibrated)
    assert all(math.isnan(event.at_s) for event in events)  # the sink stamps them
    (initialized,) = mapped_video.emitted(MapInitialized)
    assert initialized.attempt == 1
    added = [event.frame_id for event in mapped_video.emitted(KeyframeAdded)]
    assert added == KEYFRAMES
    for kind, frame_ids_of in ORDERED:
        for event in mapped_video.emitted(kind):
            before = events[: events.index(event)]
            known = {e.frame_id for e in before if isinstance(e, KeyframeAdded)}
            assert set(frame_ids_of(event)) <= known
    registered = mapped_video.emitted(FrameRegistered)
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


def test_keyframes_and_pairs_are_reported_with_their_figures(
    mapped_video: Run, video: SyntheticWorld
) -> None:
    for added in mapped_video.emitted(KeyframeAdded):
        keyframe = video.keyframe(added.frame_id)
        assert (added.name, added.camera_key) == (keyframe.name, keyframe.camera_key)
        assert added.captured_at_s == keyframe.captured_at_s
        assert added.num_keypoints == len(keyframe.features)
    edges = {edge.pair: edge for edge in mapped_video.graph.edges()}
    for event in mapped_video.emitted(PairVerified):
        edge = edges.pop(ImagePair(event.first, event.second))
        assert (event.reason, event.num_matches) == (edge.reason, edge.num_matches)
        assert event.num_inliers == edge.num_inliers
    assert edges == {}


def test_a_map_and_what_enters_it_are_reported_with_their_figures(path: SyntheticWorld) -> None:
    never = GlobalBundleAdjustmentConfig(growth_ratio=10.0)
    config = CONFIG.model_copy(update={"global_bundle_adjustment": never})
    fed = Run(path, config=config).feed([1, 2, 3, 4])
    (initialized,) = fed.emitted(MapInitialized)
    assert initialized.num_points3D == fed.sparse_map.num_points3D
    num_visible = fed.sparse_map.num_visible_points(FrameId(4))
    assert num_visible > 0
    fed.feed([5])
    (registered,) = fed.emitted(FrameRegistered)
    assert (registered.frame_id, registered.num_registered) == (5, 5)
    assert registered.num_points3D == fed.sparse_map.num_points3D
    assert 50 < registered.num_inliers <= registered.num_correspondences
    assert not registered.is_retry
    assert registered.elapsed_s > 0.0


def test_a_pose_is_reported_by_its_centre_its_orientation_and_its_latency(
    path: SyntheticWorld,
) -> None:
    fed = Run(path).feed([1, 2, 3, 4])
    received_at_s = time.monotonic() - 3.0
    (pose,) = fed.add_keyframe(
        dataclasses.replace(path.keyframe(5), received_at_s=received_at_s)
    ).new_poses
    event = fed.emitted(FramePosed)[-1]
    assert (event.frame_id, event.captured_at_s, event.camera_key) == (5, 0.5, "camera")
    assert (event.is_keyframe, event.is_first) == (True, True)
    assert event.cam_center_in_world == tuple(camera_center(pose.cam_from_world))
    quat_xyzw = quat_xyzw_from_rotation(pose.cam_from_world[:, :3].T)
    assert event.world_from_cam_quat_xyzw == tuple(quat_xyzw)
    assert 3.0 <= event.latency_s <= time.monotonic() - received_at_s


def test_a_step_counts_keyframes_and_shows_the_map_where_that_is_wanted(
    path: SyntheticWorld,
) -> None:
    fed = Run(path, config=NO_EARLY_MAP)
    for frame_id in (1, 2, 3):
        step = fed.add_keyframe(path.keyframe(frame_id), wants_view=True)
        assert (step.counts.num_keyframes, step.counts.num_registered) == (frame_id, 0)
        assert step.view is None  # there is no map
    assert fed.add_keyframe(path.keyframe(4)).view is None  # nobody wants it
    step = fed.add_keyframe(path.keyframe(5), wants_view=True)
    assert (step.counts.num_keyframes, step.counts.num_registered) == (5, 5)
    assert step.view is not None
    assert step.view.keyframe_ids.tolist() == [1, 2, 3, 4, 5]
    for later in (
        fed.mapper.add_frame(path.tracked(6, keyframe_id=5), wants_view=True),
        fed.mapper.report(wants_view=True),
        fed.mapper.finish(wants_view=True),
    ):
        assert later.record is None
        assert later.view is not None


def test_the_view_shows_the_map_as_it_is(mapped_video: Run) -> None:
    view, sparse_map = mapped_video.mapper.view(), mapped_video.sparse_map
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
    view = Run(video, config=NO_EARLY_MAP).feed([1, 4]).mapper.view()
    assert view.keyframe_ids.shape == (0,)
    assert view.cam_from_world.shape == (0, 3, 4)
    assert view.points3D_in_world.shape == (0, 3)
    assert view.edges.tolist() == [[1, 4]]


def test_the_record_of_a_keyframe_holds_copies(video: SyntheticWorld) -> None:
    fed = Run(video).feed(KEYFRAMES[:6])
    record = fed.records[-1]
    assert record.keyframe.frame_id == KEYFRAMES[5]
    assert {pair.pair.second for pair in record.pairs} == {KEYFRAMES[5]}
    assert len(record.pairs) >= 3
    assert record.moved == ()
    record.camera.params = [1.0, 2.0, 3.0, 4.0]
    fed.mapper.cameras()[0].params = [1.0, 2.0, 3.0, 4.0]
    assert fed.sparse_map.camera("camera").params.tolist() == list(EXACT_CAMERA)


# -- adjusting ------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_map_to_the_last_bit(
    mapped_video: Run, video: SyntheticWorld
) -> None:
    again = Run(video).feed(video.frame_ids, keyframe_every=KEYFRAME_EVERY).finish()
    merged = [event for event in again.emitted(BundleAdjusted) if event.keyframes_added_meanwhile]
    assert merged
    for one, other in zip(mapped_video.trajectory, again.trajectory, strict=True):
        assert np.array_equal(one.cam_from_world, other.cam_from_world)
    views = mapped_video.mapper.view(), again.mapper.view()
    assert np.array_equal(views[0].points3D_in_world, views[1].points3D_in_world)
    assert np.array_equal(views[0].chunk_ids, views[1].chunk_ids)


def test_small_maps_are_adjusted_at_once_and_larger_ones_on_a_copy(mapped_video: Run) -> None:
    *grown, final = mapped_video.emitted(BundleAdjusted)
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
    job = fed.feed_until_a_job(frame_ids)
    assert job.kind is JobKind.GLOBAL_ADJUSTMENT
    assert fed.due == ()
    step = fed.add_keyframe(video.keyframe(next(frame_ids)))
    assert step.jobs == step.due == ()  # one at a time
    step = fed.add_keyframe(video.keyframe(next(frame_ids)))
    assert step.jobs == ()
    assert step.due == (job,)
    version, num_adjusted = fed.mapper.view().version, len(fed.emitted(BundleAdjusted))
    to_match = fed.begin_keyframe(video.keyframe(next(frame_ids)))
    (merged,) = fed.emitted(BundleAdjusted)[num_adjusted:]
    assert merged.keyframes_added_meanwhile == 2
    assert fed.mapper.view().version > version
    assert job not in fed.match_and_add(to_match).due


def test_a_job_that_takes_longer_stays_due_and_is_merged_later(video: SyntheticWorld) -> None:
    fed = Run(video)
    frame_ids = iter(KEYFRAMES)
    job = fed.feed_until_a_job(frame_ids)
    for _ in range(2):
        fed.feed([next(frame_ids)])
    for _ in range(2):
        begun = fed.mapper.begin_keyframe(video.keyframe(next(frame_ids)))  # nothing is finished
        assert fed.match_and_add(begun).due == (job,)
    fed.feed([next(frame_ids)])
    merged = [event for event in fed.emitted(BundleAdjusted) if event.keyframes_added_meanwhile]
    assert [event.keyframes_added_meanwhile for event in merged] == [4]


def test_a_job_that_failed_changes_nothing_and_another_one_may_start(video: SyntheticWorld) -> None:
    fed = Run(video)
    frame_ids = iter(KEYFRAMES)
    job = fed.feed_until_a_job(frame_ids)
    before = poses_of(fed.sparse_map)
    failed = FinishedJob(job=job, result=None)
    begun = fed.mapper.begin_keyframe(video.keyframe(next(frame_ids)), [failed])
    after = poses_of(fed.sparse_map)
    assert all(np.array_equal(before[i], after[i]) for i in before)
    fed.match_and_add(begun)
    fed.feed(frame_ids)
    assert job not in fed.due
    assert [one.kind for one in fed.jobs[1:]].count(JobKind.GLOBAL_ADJUSTMENT) >= 1


def test_a_window_of_the_newest_keyframes_is_solved_beside_the_map(path: SyntheticWorld) -> None:
    window = WindowConfig(
        size=4,
        num_older=4,
        interval=3,
        min_keyframes=8,
        merge_after_keyframes=2,
        weak_fit_ratio=10.0,
    )
    fed = Run(path, config=CONFIG.model_copy(update={"window": window}))
    while not (jobs := [job for job in fed.jobs if job.kind is JobKind.WINDOW]):
        fed.feed([len(fed.records) + 1])
    num_keyframes = len(fed.records)
    assert num_keyframes == 8
    fed.feed([num_keyframes + 1])
    assert jobs[0] not in fed.due
    fed.feed([num_keyframes + 2])
    assert jobs[0] in fed.due
    assert fed.emitted(WindowSolved) == []
    fed.feed([num_keyframes + 3])
    solved = fed.emitted(WindowSolved)[0]
    assert solved.purpose is WindowPurpose.RESOLVE
    assert solved.keyframe_ids == tuple(range(1, num_keyframes + 1))
    assert jobs[0] not in fed.due


def test_a_window_in_flight_at_the_end_is_merged(path: SyntheticWorld) -> None:
    window = WindowConfig(
        size=4, num_older=4, min_keyframes=8, merge_after_keyframes=100, weak_fit_ratio=10.0
    )
    config = CONFIG.model_copy(update={"window": window})
    fed = Run(path, config=config).feed(path.frame_ids)
    assert [job.kind for job in fed.jobs].count(JobKind.WINDOW) == 1
    assert fed.emitted(WindowSolved) == []
    fed.finish()
    assert fed.emitted(WindowSolved)[0].purpose is WindowPurpose.RESOLVE
    assert fed.registered_ids == path.frame_ids


def test_the_end_stops_at_the_first_window_that_makes_the_map_no_better(
    path: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = WindowConfig(size=3, num_older=3, interval=100, max_final=4)
    fed = Run(path, config=CONFIG.model_copy(update={"window": window})).feed(path.frame_ids)
    for frame_id in (FrameId(3), FrameId(9)):  # far from each other
        pose = fed.sparse_map.cam_from_world(frame_id).copy()
        pose[:, 3] += (0.02, 0.0, 0.0)
        fed.sparse_map.set_pose(frame_id, pose)
    monkeypatch.setattr(Mapper, "_repair_finally", lambda self: None)
    monkeypatch.setattr(
        window_schedule,
        "try_window",
        lambda sparse_map, job, estimate, *, config: WindowMerge(
            verdict=WindowVerdict.NOT_BETTER,
            reason="none is",
            before=sparse_map.fit([]),
            after=sparse_map.fit([]),
        ),
    )
    fed.finish()
    (solved,) = fed.emitted(WindowSolved)
    assert solved.purpose is WindowPurpose.FINAL


def test_an_adjustment_at_once_is_a_change_of_the_map(video: SyntheticWorld) -> None:
    """Views and tracked frames must not go on with the points as they were."""
    fed = Run(video)
    num_more = set()
    for frame_id in KEYFRAMES[:6]:
        version, num_before = fed.mapper.view().version, len(fed.emitted(BundleAdjusted))
        assert fed.add_keyframe(video.keyframe(frame_id)).jobs == ()
        num_adjusted = len(fed.emitted(BundleAdjusted)) - num_before
        # The keyframe itself is a change, too, once it is in the map.
        num_more.add((num_adjusted, fed.mapper.view().version - version))
    assert num_more == {(0, 1), (1, 2)}


def test_the_result_of_a_job_that_is_not_in_flight_is_dropped(video: SyntheticWorld) -> None:
    fed = Run(video)
    frame_ids = iter(KEYFRAMES)
    job = fed.feed_until_a_job(frame_ids)
    before, num_adjusted = fed.mapper.view(), len(fed.emitted(BundleAdjusted))
    foreign = FinishedJob(job=MapJob(kind=job.kind, run=job.run), result=job.run())
    begun = fed.mapper.begin_keyframe(video.keyframe(next(frame_ids)), [foreign])
    assert fed.mapper.view().version == before.version
    assert np.array_equal(fed.mapper.view().points3D_in_world, before.points3D_in_world)
    assert len(fed.emitted(BundleAdjusted)) == num_adjusted
    fed.match_and_add(begun)
    fed.feed([next(frame_ids)])
    assert fed.due == (job,)  # it is still in flight


def test_an_adjustment_that_comes_after_the_end_is_dropped(video: SyntheticWorld) -> None:
    fed = Run(video)
    frame_ids = iter(KEYFRAMES)
    job = fed.feed_until_a_job(frame_ids)
    fed.mapper.finish()
    poses = poses_of(fed.sparse_map)
    fed.mapper.begin_keyframe(video.keyframe(next(frame_ids)), [fed.run_job(job)])
    after = poses_of(fed.sparse_map)
    assert all(np.array_equal(poses[i], after[i]) for i in poses)


@pytest.mark.slow
def test_a_closed_loop_is_reported_and_adjusted() -> None:
    world = SyntheticWorld(round_path(26, turns=26 / 24), noise_px=0.5)
    mapped = run(world)
    loop = mapped.emitted(LoopClosed)[0]
    assert loop.first <= 3
    assert loop.second >= 22
    edge = mapped.graph.edge(ImagePair(loop.first, loop.second))
    assert edge is not None
    assert loop.num_inliers == edge.num_inliers > 0
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
    assert not fed.is_initialized
    assert fed.trajectory == []
    assert fed.mapper.report().new_poses == ()
    fed.feed([4])
    assert fed.is_initialized
    assert {pose.frame_id for pose in fed.poses} == set(fed.registered_ids)


def test_few_keyframes_make_a_map_at_the_end(path: SyntheticWorld) -> None:
    mapped = Run(path).feed([1, 2, 3]).finish()
    assert mapped.registered_ids == [1, 2, 3]
    assert len(mapped.emitted(MapInitialized)) == 1


@pytest.mark.slow
def test_missing_keyframes_are_rescued_at_the_end(path: SyntheticWorld) -> None:
    config = CONFIG.model_copy(update={"rescue": NO_COMPONENTS})
    mapped = Run(path, config=config, dropped=splits_after(4)).feed(path.frame_ids)
    assert mapped.registered_ids == path.frame_ids[:4]
    mapped.finish()
    assert mapped.registered_ids == path.frame_ids[4:]
    attempts = mapped.emitted(MapInitialized)
    assert [event.attempt for event in attempts] == [1, 2]
    assert attempts[0].second <= 4 < attempts[1].first
    failed = mapped.emitted(RegistrationFailed)
    assert {event.frame_id for event in failed} == set(path.frame_ids[4:])
    for event in failed:
        assert event.status is RegistrationStatus.TOO_FEW_CORRESPONDENCES
        assert (event.num_inliers, event.num_correspondences) == (0, 0)
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


def test_a_bent_map_that_stays_keeps_what_it_distrusts(path: SyntheticWorld) -> None:
    fed = Run(path).feed(path.frame_ids[:6])
    mapper, before = fed.mapper, fed.registered_ids
    wrong = ImagePair(FrameId(1), FrameId(3))
    mapper._builder.distrust([wrong])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapper._builder, "first", lambda present, newest: None)
        mapper._build_anew([], because="overlays held much of it")
    assert fed.registered_ids == before
    assert mapper._builder.distrusted == {wrong}
    (warning,) = fed.emitted(Warned)
    assert "may be bent, since overlays held much of it" in warning.message


@pytest.mark.slow
def test_a_rescue_that_holds_less_changes_nothing(path: SyntheticWorld) -> None:
    mapped = run(path, dropped=splits_after(10))
    assert mapped.registered_ids == path.frame_ids[:10]
    assert len(mapped.emitted(MapInitialized)) == 1
    assert [pose.frame_id for pose in mapped.trajectory] == path.frame_ids[:10]
    assert mapped.figures.num_interpolated_frames == 0
    assert mapped.figures.num_frames_without_pose == 4


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
    stale = fed.feed_until_a_job(frame_ids)
    while not fed.emitted(MainMapChanged):
        fed.feed([next(frame_ids)])
    poses = poses_of(fed.sparse_map)
    fed.mapper.begin_keyframe(path.keyframe(next(frame_ids)), [fed.run_job(stale)])
    after = poses_of(fed.sparse_map)
    assert all(np.array_equal(poses[i], after[i]) for i in poses)


@pytest.mark.slow
def test_keyframes_of_repeated_structure_are_where_they_belong_in_the_end() -> None:
    """Two places look alike; the way between them is flown last."""
    poses = straight_path(18)
    points, looks_like = repeated_place(ground(poses), x_range=(3.0, 27.0), shift=24.0, ratio=0.4)
    world = SyntheticWorld(poses, points=points, looks_like=looks_like, noise_px=0.5)
    order = [*range(1, 7), *range(13, 19), *range(7, 13)]
    mapped = Run(world).feed(order)
    assert mapped.emitted(ComponentStarted)  # they grow apart where matches say two things
    mapped.finish()
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


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
    assert not mapped.is_initialized
    assert mapped.figures.counts.num_keyframes == len(useless.world.poses)
    assert mapped.trajectory == []
    assert mapped.poses == []
    assert mapped.mapper.view().points3D_in_world.shape == (0, 3)
    assert mapped.figures.gps_rmse_m is None
    assert mapped.figures.num_frames_without_pose == len(useless.world.poses)
    assert mapped.figures.maps == ()
    assert mapped.emitted(MapInitialized) == []


# -- a matcher that fails -------------------------------------------------------------------------


def feed_with_failures(fed: Run, frame_ids: Sequence[int]) -> list[int]:
    """Feeds keyframes; returns those at which the matcher failed."""
    failed = []
    for frame_id in frame_ids:
        num_warned = len(fed.emitted(Warned))
        fed.feed([frame_id])
        warnings = [event.message for event in fed.emitted(Warned)[num_warned:]]
        if warnings:
            assert warnings == [f"{frame_id:06d}.jpg: out of memory"]
            failed.append(frame_id)
        record = fed.records[-1]
        assert record.keyframe.frame_id == frame_id
        assert record.camera.width == 1000
        known = fed.sparse_map.neighbors(FrameId(frame_id))
        assert {id(pair) for pair in record.pairs} == {id(pair) for pair in known.values()}
    return failed


@pytest.mark.parametrize("failing", [[0], [6], [14, 15, 16], [25]])
def test_a_failure_of_the_matcher_costs_its_keyframe_some_pairs_only(
    path: SyntheticWorld, failing: list[int]
) -> None:
    fed = Run(path, fails=failing)
    failed = feed_with_failures(fed, path.frame_ids)
    assert len(failed) >= 1
    assert fed.sparse_map.keyframe_ids == path.frame_ids == fed.graph.keyframe_ids
    fed.finish()
    missing = set(path.frame_ids) - set(fed.registered_ids)
    assert missing <= {failed[-1]}  # the last ones may have no pairs from later keyframes
    assert 1e-5 < fed.errors().rmse_ratio < 2e-3


def test_a_matcher_that_always_fails_makes_no_map(path: SyntheticWorld) -> None:
    fed = Run(path, fails=range(1000))
    assert feed_with_failures(fed, path.frame_ids) == path.frame_ids
    fed.finish()
    assert not fed.is_initialized
    assert fed.figures.counts.num_keyframes == len(path.frame_ids)


# -- cameras --------------------------------------------------------------------------------------


def camera_of(mapped: Run, key: str = "camera") -> list[float]:
    params: list[float] = mapped.sparse_map.camera(key).params.tolist()
    return params


def test_a_known_calibration_stays_as_it_is(mapped_video: Run) -> None:
    assert camera_of(mapped_video) == list(EXACT_CAMERA)
    assert [event.how for event in mapped_video.emitted(CameraCalibrated)] == ["known"]


def test_a_known_calibration_is_refined_when_asked_for(path: SyntheticWorld) -> None:
    config = CONFIG.model_copy(update={"cameras": CamerasConfig(refine_known_intrinsics=True)})
    params = camera_of(run(path, config=config))
    assert params != list(EXACT_CAMERA)
    assert abs(params[0] - FOCAL_PX) < 0.01 * FOCAL_PX


def test_a_focal_length_from_exif_is_refined() -> None:
    prior = IntrinsicsPrior(focal_px=1.15 * FOCAL_PX)
    world = SyntheticWorld(straight_path(14), noise_px=0.5, cameras=[SyntheticCamera(prior=prior)])
    mapped = run(world)
    reported = mapped.emitted(CameraCalibrated)
    assert [event.how for event in reported] == ["exif", "exif"]
    assert [event.is_refined for event in reported] == [False, True]
    assert reported[0].focal_px == 1.15 * FOCAL_PX
    assert abs(reported[1].focal_px - FOCAL_PX) < 0.03 * FOCAL_PX
    assert abs(camera_of(mapped)[0] - FOCAL_PX) < 0.01 * FOCAL_PX
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


def test_a_camera_nobody_knows_is_calibrated_from_its_pairs() -> None:
    camera = SyntheticCamera(params=(600.0, 500.0, 375.0, 0.0))
    world = SyntheticWorld(straight_path(14), noise_px=0.3, cameras=[camera])
    mapped = run(world)
    reported = mapped.emitted(CameraCalibrated)
    assert [event.how for event in reported] == ["assumed", "two_view_geometries"]
    assert reported[0].focal_px == 850.0
    assert abs(reported[1].focal_px - 600.0) < 0.1 * 600.0
    assert abs(camera_of(mapped)[0] - 600.0) < 0.01 * 600.0
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


def test_a_configured_calibration_stays_when_fixed(path: SyntheticWorld) -> None:
    cameras = CamerasConfig(params=(1.01 * FOCAL_PX, 500.0, 375.0, 0.0), intrinsics="fixed")
    mapped = run(path, config=CONFIG.model_copy(update={"cameras": cameras}))
    assert camera_of(mapped) == [1.01 * FOCAL_PX, 500.0, 375.0, 0.0]
    assert mapped.registered_ids == path.frame_ids


@pytest.mark.slow
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
    assert [camera.camera_id for camera in mapped.mapper.cameras()] == [1, 2]
    assert 1e-5 < mapped.errors().rmse_ratio < 2e-3


@pytest.mark.slow
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
    reported = [event for event in mapped.emitted(CameraCalibrated) if event.camera_key == "phone"]
    assert [event.how for event in reported][:2] == ["assumed", "two_view_geometries"]
    assert mapped.registered_ids == world.frame_ids
    mapped.finish()
    assert abs(camera_of(mapped, "phone")[0] - 1400.0) < 0.02 * 1400.0
    assert camera_of(mapped) == list(EXACT_CAMERA)
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


# -- a dense matcher ------------------------------------------------------------------------------


class DenseRun(Run):
    """The same with a dense matcher, whose keypoints move as matches claim them."""

    def _matching(self, settings: dict[str, Any]) -> tuple[PairMatcher, SceneGraph]:
        self.dense_matcher = DenseFakeMatcher(world=self.world, **settings)
        return self.dense_matcher, dense_graph(**GRAPH)

    def keyframe(self, frame_id: int, *, gps: GpsFix | None = None) -> Keyframe:
        """A frame with a dense matcher's table."""
        assert gps is None
        return self.dense_matcher.keyframe(frame_id)


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


@pytest.mark.slow
def test_dense_matches_make_a_map(mapped_densely: DenseRun, dense_world: SyntheticWorld) -> None:
    assert mapped_densely.registered_ids == dense_world.frame_ids
    errors = mapped_densely.errors()
    assert 1e-5 < errors.rmse_ratio < 2e-3
    assert errors.max_rotation_rad < 0.01
    reconstruction = mapped_densely.sparse_map.reconstruction
    assert reconstruction.is_valid()
    assert 0.3 < mapped_densely.sparse_map.mean_reprojection_error_px() < 0.9
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
    sparse_map = mapped_densely.sparse_map
    for frame_id in dense_world.frame_ids:
        keypoints_xy = mapped_densely.graph.keyframe(frame_id).features.keypoints_xy
        assert np.array_equal(recorded[frame_id].keypoints_xy, keypoints_xy)
        assert np.array_equal(sparse_map.keyframe(frame_id).features.keypoints_xy, keypoints_xy)
        points2D = sparse_map.reconstruction.image(frame_id).points2D
        assert np.array_equal([point.xy for point in points2D], keypoints_xy)


def test_a_record_holds_each_table_that_moved_once(mapped_densely: DenseRun) -> None:
    for record in mapped_densely.records:
        moved = [features.frame_id for features in record.moved]
        assert record.keyframe.frame_id not in moved
        assert len(set(moved)) == len(moved)


@pytest.mark.slow
def test_the_same_dense_matches_give_the_same_map_to_the_last_bit(
    mapped_densely: DenseRun, dense_world: SyntheticWorld
) -> None:
    again = dense_run(dense_world, noise_px=0.5, wrong_ratio=0.1, metres_per_unit=METRES_PER_UNIT)
    for frame_id, pose in poses_of(mapped_densely.sparse_map).items():
        assert np.array_equal(again.sparse_map.cam_from_world(frame_id), pose)


@pytest.mark.slow
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
            mapped.add_frame(tracked(frame_id, keyframe_id=keyframe_id))
    mapped.finish()
    trajectory = mapped.trajectory
    assert [pose.frame_id for pose in trajectory] == world.frame_ids
    assert mapped.figures.num_interpolated_frames == 0
    errors = pose_errors({pose.frame_id: pose.cam_from_world for pose in trajectory}, world)
    assert 1e-5 < errors.rmse_ratio < 5e-3


@pytest.mark.slow
def test_a_dense_matcher_that_fails_costs_its_keyframe_some_pairs_only(
    dense_world: SyntheticWorld,
) -> None:
    fed = DenseRun(dense_world, fails=[6, 12])
    failed = feed_with_failures(fed, dense_world.frame_ids)
    fed.finish()
    assert len(failed) >= 1
    assert set(dense_world.frame_ids) - set(fed.registered_ids) <= {failed[-1]}
    assert 1e-5 < fed.errors().rmse_ratio < 2e-3
    for frame_id in dense_world.frame_ids:
        features = fed.sparse_map.keyframe(frame_id).features
        kept_xy = fed.graph.keyframe(frame_id).features.keypoints_xy
        assert np.array_equal(features.keypoints_xy, kept_xy)


# -- metric scale ---------------------------------------------------------------------------------


def metres_per_unit_of(mapped: Run) -> float:
    """Of the map, by the true flight."""
    centers = camera_center(np.array(list(poses_of(mapped.sparse_map).values())))
    true_centers = METRES_PER_UNIT * camera_center(mapped.world.poses)
    scaling = similarity(centers, true_centers)
    return float(np.cbrt(np.linalg.det(scaling[:, :3])))


def test_the_scale_is_reported_and_left_alone(mapped_densely: DenseRun) -> None:
    (reported,) = mapped_densely.emitted(MetricScaleEstimated)
    assert not reported.is_applied
    assert reported.num_depths > 200
    assert 0.03 < reported.spread_ratio < 0.08
    (initialized,) = mapped_densely.emitted(MapInitialized)
    order = mapped_densely.events
    assert order.index(reported) < order.index(initialized)
    scale = mapped_densely.figures.metres_per_map_unit
    assert scale is not None
    assert abs(scale / metres_per_unit_of(mapped_densely) - 1.0) < 0.01
    assert abs(metres_per_unit_of(mapped_densely) - 1.0) > 0.2, "nobody made it metres"


@pytest.mark.slow
@pytest.mark.parametrize("has_early_map", [True, False])
def test_a_map_is_made_metric_when_asked_for(
    has_early_map: bool, dense_world: SyntheticWorld
) -> None:
    config = with_metric_scale("apply")
    if not has_early_map:
        starts = config.initialization.model_copy(update={"early_triangulation_angle_deg": 0.0})
        config = config.model_copy(update={"initialization": starts})
    mapped = dense_run(dense_world, config=config, metres_per_unit=METRES_PER_UNIT)
    assert bool(mapped.emitted(EarlyMapMade)) == has_early_map
    (reported,) = mapped.emitted(MetricScaleEstimated)
    assert reported.is_applied
    # It is placed onto an early map that is in metres already.
    assert (abs(reported.metres_per_map_unit - 1.0) < 0.1) == has_early_map
    assert abs(metres_per_unit_of(mapped) - 1.0) < 0.02
    scale = mapped.figures.metres_per_map_unit
    assert scale is not None
    assert abs(scale - 1.0) < 0.02
    assert mapped.registered_ids == dense_world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 2e-3
    # Poses were in metres from the first one on.
    first = {pose.frame_id: pose.cam_from_world for pose in mapped.poses}
    length = np.linalg.norm(camera_center(first[FrameId(16)]) - camera_center(first[FrameId(1)]))
    truth = METRES_PER_UNIT * np.linalg.norm(
        np.diff(camera_center(dense_world.poses)[[0, 15]], axis=0)
    )
    assert abs(length / truth - 1.0) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("metric_scale", ["report", "apply"])
def test_without_depths_there_is_no_scale(
    dense_world: SyntheticWorld, metric_scale: Literal["report", "apply"]
) -> None:
    mapped = dense_run(dense_world, config=with_metric_scale(metric_scale))
    assert mapped.emitted(MetricScaleEstimated) == []
    assert mapped.figures.metres_per_map_unit is None
    assert len(mapped.registered_ids) == len(dense_world.frame_ids)


def test_the_scale_is_not_looked_for_when_switched_off(dense_world: SyntheticWorld) -> None:
    mapped = DenseRun(dense_world, config=with_metric_scale("off"), metres_per_unit=METRES_PER_UNIT)
    mapped.feed(dense_world.frame_ids[:8])
    assert mapped.is_initialized
    assert mapped.emitted(MetricScaleEstimated) == []
    assert mapped.figures.metres_per_map_unit is None


# -- focal lengths a matcher sees -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("uses", [True, False])
def test_a_camera_nobody_knows_is_calibrated_by_what_the_matcher_sees(uses: bool) -> None:
    camera = SyntheticCamera(params=(600.0, 500.0, 375.0, 0.0))
    world = SyntheticWorld(straight_path(14), cameras=[camera])
    config = CONFIG.model_copy(update={"matching": MatchingConfig(use_focal_lengths=uses)})
    mapped = dense_run(world, config=config, noise_px=0.3, tells_focal_length=True)
    reported = mapped.emitted(CameraCalibrated)
    assert [event.how for event in reported] == [
        "assumed",
        "pointmaps" if uses else "two_view_geometries",
    ]
    assert reported[1].focal_px == 600.0 if uses else abs(reported[1].focal_px - 600.0) < 60.0
    assert abs(camera_of(mapped)[0] - 600.0) < 0.01 * 600.0
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3


@pytest.mark.slow
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
    (initialized,) = mapped.emitted(MapInitialized)
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
    assert mapped.records[-1].keyframe.frame_id == 13
    pairs = {pair.pair for pair in mapped.records[-1].pairs}
    assert ImagePair(FrameId(13), FrameId(14)) in pairs
    mapped.finish()
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


@pytest.mark.slow
def test_the_distance_to_gps_is_a_figure_in_metres() -> None:
    world = SyntheticWorld(straight_path(14), noise_px=0.5)
    mapped = Run(world).feed(world.frame_ids, gps=True).finish()
    rmse_m = mapped.figures.gps_rmse_m
    assert rmse_m is not None
    assert 1e-4 < rmse_m < 0.01 * world.extent
    without = Run(world).feed(world.frame_ids[:6]).finish()
    assert without.figures.gps_rmse_m is None


def test_a_tracked_frame_waits_for_its_keyframe(path: SyntheticWorld) -> None:
    """Frames between keyframes that come before the map are posed with it, each once."""
    world = SyntheticWorld(straight_path(13, step=0.6), noise_px=0.3)
    fed = Run(world, config=NO_EARLY_MAP).feed(range(1, 10), keyframe_every=3)
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


def test_a_camera_that_does_not_fit_its_model_leaves_the_mapper_as_it_was(
    path: SyntheticWorld,
) -> None:
    fed = Run(path).feed([1, 2, 3, 4])
    prior = IntrinsicsPrior(focal_px=800.0, camera_model="SIMPLE_RADIAL", params=(800.0,))
    wrong = dataclasses.replace(
        path.keyframe(5), camera_key="wrong", calibration_key="wrong", intrinsics_prior=prior
    )
    with pytest.raises(MapError):
        fed.add_keyframe(wrong)
    assert fed.figures.counts.num_keyframes == 4
    fed.feed([5])
    assert fed.registered_ids == [1, 2, 3, 4, 5]


def test_a_frame_is_first_posed_as_tracked_and_again_when_it_is_a_keyframe_of_the_map(
    video: SyntheticWorld,
) -> None:
    fed = Run(video).feed([1, 4, 7, 10])
    fed.add_frame(video.tracked(13, keyframe_id=10))
    fed.feed([13])
    reported = [event for event in fed.emitted(FramePosed) if event.frame_id == 13]
    assert [(event.is_first, event.is_keyframe) for event in reported] == [
        (True, False),
        (False, True),
    ]
    assert [pose.frame_id for pose in fed.poses].count(FrameId(13)) == 1
    trajectory = [pose for pose in fed.trajectory if pose.frame_id == 13]
    assert [pose.is_keyframe for pose in trajectory] == [True]


def test_while_a_keyframe_is_matched_frames_after_it_are_posed_by_the_one_before(
    video: SyntheticWorld,
) -> None:
    fed = Run(video).feed([1, 4, 7, 10])
    begun = fed.begin_keyframe(video.keyframe(13))
    step = fed.add_frame(
        video.tracked(14, keyframe_id=13), fallback=video.tracked(14, keyframe_id=10)
    )
    assert [pose.frame_id for pose in step.new_poses] == [14]
    assert step.record is None
    assert [pose.frame_id for pose in fed.match_and_add(begun).new_poses] == [13]
    assert pose_errors(poses_of(fed.sparse_map), video).rmse_ratio < 1e-3


def test_frames_behind_a_keyframe_that_was_left_out_are_posed_by_the_one_before(
    video: SyntheticWorld,
) -> None:
    fed = Run(video).feed([1, 4, 7, 10])
    step = fed.add_frame(
        video.tracked(14, keyframe_id=13), fallback=video.tracked(14, keyframe_id=10)
    )
    assert [pose.frame_id for pose in step.new_poses] == [14]
    (posed,) = [pose for pose in fed.trajectory if pose.frame_id == 14]
    np.testing.assert_allclose(posed.cam_from_world, step.new_poses[0].cam_from_world, atol=1e-6)
