from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest

from engine.config import WindowConfig
from engine.events import WindowPurpose
from engine.geometry import transform_points
from engine.mapping.model.sparse_map import Fit, SparseMap
from engine.mapping.windows.window_selection import (
    Window,
    WindowSchedule,
    make_job,
    missing_windows,
    newest_window,
    window_problem,
    worst_window,
)
from engine.types import FrameId
from tests.support.synthetic import HEIGHT, WIDTH, SyntheticCamera, SyntheticWorld, straight_path
from tests.support.window_maps import graph_and_map

NUM_FRAMES = 14
CONFIG = WindowConfig(size=4, num_older=3, interval=5, min_keyframes=10)
DISTORTED = SyntheticCamera(params=(800.0, WIDTH / 2, HEIGHT / 2, 0.05))


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES))


def ids(*frame_ids: int) -> tuple[FrameId, ...]:
    return tuple(FrameId(i) for i in frame_ids)


# -- when and which -------------------------------------------------------------------------------


def test_windows_are_due_at_intervals_that_grow_while_they_change_nothing() -> None:
    schedule = WindowSchedule(CONFIG)
    due = []
    for num_keyframes in range(1, 80):
        if schedule.should(num_keyframes):
            due.append(num_keyframes)
            schedule.done(num_keyframes)
            schedule.adapt(made_better=False)
    assert [later - sooner for sooner, later in pairwise(due)] == [10, 20, 20]
    schedule.adapt(made_better=True)
    assert schedule.should(due[-1] + CONFIG.interval)


def test_nothing_is_due_when_windows_are_off() -> None:
    schedule = WindowSchedule(CONFIG.model_copy(update={"enabled": False}))
    assert not any(schedule.should(num_keyframes) for num_keyframes in range(100))


def test_the_newest_window_holds_the_older_keyframes_that_share_most(
    world: SyntheticWorld,
) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    window = newest_window(graph, sparse_map, config=CONFIG)
    assert window.free_ids == set(world.frame_ids[-CONFIG.size :])
    assert window.frame_ids == tuple(world.frame_ids[-CONFIG.size - CONFIG.num_older :])
    assert window.purpose is WindowPurpose.RESOLVE


def test_missing_keyframes_make_windows_with_those_of_the_map_that_know_them(
    world: SyntheticWorld,
) -> None:
    alone = FrameId(9)
    graph, sparse_map = graph_and_map(
        world,
        registered=[1, 2, 3, 4, 5, 6, 12, 13][:6],
        skips=lambda pair: alone in (pair.first, pair.second),
    )
    first, second = missing_windows(graph, sparse_map, config=CONFIG)
    assert first.free_ids == {7, 8, 10, 11}  # 9 matches nothing
    assert second.free_ids == {12, 13, 14}
    assert set(first.frame_ids) - first.free_ids <= set(sparse_map.registered_ids)


def test_the_worst_window_stands_around_the_keyframe_that_fits_worst(
    world: SyntheticWorld,
) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    pose = sparse_map.cam_from_world(FrameId(6)).copy()
    pose[:, 3] += (0.05, 0.0, 0.0)
    sparse_map.set_pose(FrameId(6), pose)
    window = worst_window(graph, sparse_map, config=CONFIG, tried=())
    assert window is not None
    assert 6 in window.free_ids
    assert window.purpose is WindowPurpose.FINAL
    again = worst_window(graph, sparse_map, config=CONFIG, tried=world.frame_ids)
    assert again is None


@pytest.mark.parametrize(("error_px", "is_wanted"), [(0.7, False), (0.8, True)])
def test_a_keyframe_with_a_usual_error_is_not_solved_again(
    world: SyntheticWorld, monkeypatch: pytest.MonkeyPatch, *, error_px: float, is_wanted: bool
) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)

    def fit(_: SparseMap, frame_ids: Iterable[FrameId]) -> Fit:
        mean_error_px = error_px if FrameId(6) in tuple(frame_ids) else 0.5
        return Fit(num_observations=100, mean_error_px=mean_error_px, gain=90.0)

    monkeypatch.setattr(SparseMap, "fit", fit)
    window = worst_window(graph, sparse_map, config=CONFIG, tried=())
    assert (window is not None) == is_wanted


# -- what is asked --------------------------------------------------------------------------------


def test_a_job_holds_registered_keyframes_but_for_the_free_ones(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:12])
    window = Window(
        frame_ids=ids(9, 10, 11, 12, 13),
        free_ids=frozenset(ids(12, 13)),
        purpose=WindowPurpose.RESOLVE,
    )
    job = make_job(graph, sparse_map, window)
    assert job is not None
    problem = job.problem
    assert problem.is_held.tolist() == [True, True, True, False, False]
    assert problem.cam_from_world is not None
    assert np.array_equal(problem.cam_from_world[3], sparse_map.cam_from_world(FrameId(12)))
    assert np.isnan(problem.cam_from_world[4]).all()
    assert problem.is_calibrated.all()
    assert (problem.is_visible.sum(axis=0) >= 3).all()


def test_tracks_are_those_of_a_camera_without_distortion() -> None:
    world = SyntheticWorld(straight_path(6), cameras=(DISTORTED,))
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    window = Window(
        frame_ids=ids(1, 2, 3, 4), free_ids=frozenset(ids(4)), purpose=WindowPurpose.RESOLVE
    )
    problem = window_problem(graph, sparse_map, window)
    assert problem is not None
    view = world.view(2)
    in_cam = transform_points(world.pose(2), world.points[view.point_ids])
    pinhole_xy = 800.0 * in_cam[:, :2] / in_cam[:, 2:] + (WIDTH / 2, HEIGHT / 2)
    seen_xy = problem.tracks_xy[1, problem.is_visible[1]]
    distances = np.linalg.norm(seen_xy[:, None] - pinhole_xy[None], axis=2).min(axis=1)
    assert distances.max() < 1e-5
    moved = np.linalg.norm(view.points_xy - pinhole_xy, axis=1)
    assert moved.max() > 1.0  # the lens does bend


def test_cameras_that_nobody_knows_are_left_to_the_solver(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=[1, 2])
    window = Window(
        frame_ids=ids(1, 2, 3), free_ids=frozenset(ids(1, 2, 3)), purpose=WindowPurpose.BOOTSTRAP
    )
    problem = window_problem(graph, sparse_map, window, unknown_cameras=["camera"])
    assert problem is not None
    assert problem.focal_px.tolist() == [0.0]
    assert not problem.is_calibrated.any()


def test_a_window_that_hangs_on_too_little_asks_nothing(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=[1, 2])
    for frame_ids in (ids(2, 3, 4), ids(12, 13, 14)):
        window = Window(
            frame_ids=frame_ids, free_ids=frozenset(frame_ids[1:]), purpose=WindowPurpose.RESOLVE
        )
        assert make_job(graph, sparse_map, window) is None
    unconnected = Window(
        frame_ids=ids(1, 2, 14), free_ids=frozenset(ids(14)), purpose=WindowPurpose.RESCUE
    )
    assert make_job(graph, sparse_map, unconnected) is None
