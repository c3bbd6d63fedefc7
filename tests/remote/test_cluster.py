"""Runs whose work is done by a Ray cluster: the same result, also when parts of it are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters.cli import DOUBTED, NOTHING_MADE
from adapters.matchers.sift import SiftMatcher
from adapters.remote.adjustments import RemoteAdjuster
from adapters.remote.open_remote import (
    open_remote_mast3r,
    open_remote_sift,
    open_remote_solver,
)
from adapters.remote.plain_maps import map_to_plain
from adapters.remote.sift import RemoteSift
from adapters.remote.tasks import RemoteTasks
from engine.config import load_config
from engine.geometry import skew
from engine.mapping.model.bundle_adjustment import adjust_copy, start_global_adjustment
from engine.types import EpipolarGuide, Features, Frame, FrameId, ImagePair, MatchRequest
from engine.window_types import WindowStatus
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.ray_clusters import RayCluster
from tests.support.small_batches import batch, rows_of, write_datasets
from tests.support.synthetic import SyntheticWorld, grown_map, straight_path
from tests.support.textured_images import frame_of, random_texture, similarity_about
from tests.support.window_scenes import arc_scene

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.xdist_group("ray")]


WIDTH, HEIGHT = 320, 240
NO_ROWS = np.empty(0, np.int64)
WAIT_S = 90.0  # for what comes by itself; no test passes by it


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """One for all: starting it takes longer than most of what is tested with it."""
    with RayCluster(cpus=8) as running:
        yield running


def frames(num: int) -> list[Frame]:
    texture = random_texture()
    return [
        frame_of(
            texture.image(
                WIDTH,
                HEIGHT,
                image_from_texture=similarity_about(
                    (WIDTH / 2, HEIGHT / 2), angle_rad=0.03 * number
                ),
            ),
            frame_id=number,
        )
        for number in range(1, num + 1)
    ]


def requests_of(tables: list[Features]) -> list[MatchRequest]:
    newest = tables[-1]
    return [
        MatchRequest(
            pair=ImagePair(table.frame_id, newest.frame_id),
            first=table,
            second=newest,
            query_rows1=NO_ROWS,
            query_rows2=NO_ROWS,
        )
        for table in tables[:-1]
    ]


def opened(cluster: RayCluster, **remote: object) -> RemoteSift:
    settings = {"address": cluster.address, "matchers": 2, "stall_s": 4.0} | remote
    config = load_config(settings=[f"remote.{name}={value}" for name, value in settings.items()])
    return open_remote_sift(config, config.sift)


def wait_until(is_so: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < ends_s, "it never came to be"
        time.sleep(0.1)


def assert_same(matcher: RemoteSift, num: int) -> None:
    """Describes and matches as SIFT does here, to the bit."""
    local = SiftMatcher(load_config().sift)
    described = [(matcher.describe(one), local.describe(one)) for one in frames(num)]
    for there, here in described:
        for name in ("keypoints_xy", "descriptors", "scales", "colors"):
            assert np.array_equal(getattr(there, name), getattr(here, name))
    requests = requests_of([there for there, _ in described])
    guide = EpipolarGuide(
        rays1=np.tile([0.0, 0.0, 1.0], (len(requests[0].first), 1)),
        rays2=np.tile([0.0, 0.0, 1.0], (len(requests[0].second), 1)),
        essential=skew(np.array([1.0, 0.0, 0.0])),
        max_angle_rad=0.5,
    )
    requests.append(replace(requests[0], guide=guide))
    for there_found, here_found in zip(matcher.match(requests), local.match(requests), strict=True):
        assert len(here_found) > 20
        assert np.array_equal(there_found.matches_idx, here_found.matches_idx)
        assert np.array_equal(there_found.confidence, here_found.confidence)


def test_a_cluster_describes_and_matches_to_the_bit_and_each_descriptor_table_travels_once(
    cluster: RayCluster,
) -> None:
    matcher = opened(cluster)
    try:
        assert_same(matcher, 4)
        figures = matcher.figures()
    finally:
        matcher.close()
    assert (figures["described_there"], figures["described_here"]) == (4, 0)
    assert (figures["matched_there"], figures["matched_here"]) == (4, 0)
    bytes_sent = figures["bytes_sent"]
    assert isinstance(bytes_sent, dict)
    assert 0 < bytes_sent["describe"] < 4 * WIDTH * HEIGHT * 3  # PNG of the pixels
    assert bytes_sent["match"] < 100_000  # a guide: descriptors stay where they were made


def test_what_was_begun_ahead_is_used_and_the_rest_is_counted(cluster: RayCluster) -> None:
    matcher = opened(cluster)
    try:
        first, second, third = frames(3)
        matcher.describe_ahead(second)
        tables = [matcher.describe(one) for one in (first, second, third)]
        requests = requests_of(tables)
        matcher.match_ahead(FrameId(3), requests)
        wait_until(lambda: matcher.figures()["pairs_ahead"] == 2)
        (found,) = matcher.match(requests[:1])
        matcher.forget_ahead(FrameId(3))
        figures = matcher.figures()
    finally:
        matcher.close()
    assert np.array_equal(
        found.matches_idx, SiftMatcher(load_config().sift).match(requests[:1])[0].matches_idx
    )
    assert (figures["pairs_ahead_used"], figures["pairs_ahead_unused"]) == (1, 1)
    assert figures["described_there"] == 3
    assert figures["keyframes_in_flight_max"] in (1, 2)  # the first, and the second ahead


def test_a_worker_that_is_killed_changes_nothing(cluster: RayCluster) -> None:
    matcher = opened(cluster)
    try:
        assert_same(matcher, 2)
        for pid in cluster.workers():
            os.kill(pid, signal.SIGKILL)
        assert_same(matcher, 3)  # by others, or here
        wait_until(lambda: _is_done_there(matcher))
    finally:
        matcher.close()


def test_a_cluster_that_is_lost_is_done_without_and_used_again_when_it_is_back() -> None:
    with RayCluster(cpus=2) as cluster:
        matcher = opened(cluster)
        said: list[str] = []
        matcher.report_to(said.append)
        try:
            assert_same(matcher, 2)
            cluster.kill_all()
            assert_same(matcher, 3)
            assert matcher.figures()["described_here"] != 0
            wait_until(lambda: len(said) > 0)
            cluster.start_head()
            wait_until(lambda: _is_done_there(matcher))
        finally:
            matcher.close()
    assert said[0].startswith("the cluster is away")
    assert said[-1] == "the cluster is back"


def test_a_cluster_that_stands_still_is_done_without(cluster: RayCluster) -> None:
    matcher = opened(cluster)
    try:
        assert_same(matcher, 2)
        stopped = cluster.workers()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert_same(matcher, 2)
            assert matcher.figures()["described_here"] != 0
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: _is_done_there(matcher))
    finally:
        matcher.close()


def test_windows_and_adjustments_of_a_cluster_have_the_bits_of_those_here(
    cluster: RayCluster,
) -> None:
    matcher = opened(cluster, matchers=1)
    problem = arc_scene().problem()
    sparse_map = grown_map(SyntheticWorld(straight_path(6), noise_px=1.0))
    adjust = RemoteAdjuster(RemoteTasks(matcher.cluster), least_observations=0)
    solve = open_remote_solver(matcher)
    assert solve is not None
    try:
        there = solve(problem)
        adjusted_there = adjust_copy(
            start_global_adjustment(sparse_map), max_iterations=9, num_threads=1, adjust=adjust
        )
        figures = matcher.figures()
        wait_until(lambda: len(cluster.task_workers()) > 0)
        for pid in cluster.task_workers():
            os.kill(pid, signal.SIGKILL)
        after_kill = solve(problem)  # by another process, or here
    finally:
        matcher.close()
    here = solve_window(problem, config=WindowSolverConfig())
    for estimate in (there, after_kill):
        assert estimate.status is WindowStatus.SOLVED
        for name in ("cam_from_world", "points3D_in_world", "is_inlier", "focal_px"):
            assert np.array_equal(getattr(estimate, name), getattr(here, name)), name
    adjusted_here = adjust_copy(
        start_global_adjustment(sparse_map), max_iterations=9, num_threads=1
    )
    expected = map_to_plain(adjusted_here.reconstruction, adjusted_here.calibration)
    got = map_to_plain(adjusted_there.reconstruction, adjusted_there.calibration)
    for name in expected:
        assert np.array_equal(got[name], expected[name]), name
    assert (figures["windows_there"], figures["windows_here"]) == (1, 0)
    assert (figures["adjustments_there"], figures["adjustments_here"]) == (1, 0)


def test_where_no_cpu_is_free_windows_are_solved_here_at_once(cluster: RayCluster) -> None:
    matcher = opened(cluster, matchers=1, solver_cpus=99)
    solve = open_remote_solver(matcher)
    assert solve is not None
    try:
        estimate = solve(arc_scene().problem())
        figures = matcher.figures()
    finally:
        matcher.close()
    assert estimate.status is WindowStatus.SOLVED
    assert (figures["windows_there"], figures["windows_here"]) == (0, 1)


def test_mast3r_matches_to_the_bit_and_tokens_travel_once(
    cluster: RayCluster, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from adapters.matchers.mast3r.open_matcher import mast3r_opener
    from tests.support.mast3r_weights import unpacked_mini_checkpoint

    config = load_config(
        settings=[
            f"remote.address={cluster.address}",
            "remote.matchers=2",
            f"mast3r.checkpoint={unpacked_mini_checkpoint(tmp_path)}",
            "mast3r.image_edge_px=64",
            "mast3r.precision=float32",
            "mast3r.device=cpu",
            "mast3r.batch_pairs=1",
            "mast3r.reciprocal_tolerance_px=20",
            "dense_matching.max_keypoints=64",
            "dense_matching.max_corners=32",
        ]
    )
    local = mast3r_opener(config.mast3r, dense=config.dense_matching)()
    matcher, places = open_remote_mast3r(config)
    try:
        shown = frames(4)
        tables = [matcher.describe(one) for one in shown]
        for one, table in zip(shown, tables, strict=True):
            assert np.array_equal(table.keypoints_xy, local.describe(one).keypoints_xy)
            places.add(table)
        requests = [
            replace(request, query_rows1=np.arange(40), query_rows2=np.arange(40))
            for number in range(2, 5)
            for request in requests_of(tables[:number])
        ]
        matcher.match_ahead(FrameId(5), requests[3:])
        wait_until(lambda: matcher.figures()["pairs_prepared"] == 3)
        num_matches = 0
        for wants_points in (False, True):
            asked = [replace(request, wants_pointmaps=wants_points) for request in requests]
            for there, here in zip(matcher.match(asked), local.match(asked), strict=True):
                num_matches += len(here)
                for name in ("matches_idx", "points1_xy", "points2_xy", "confidence", "depths_m"):
                    assert np.array_equal(getattr(there, name), getattr(here, name))
                assert there.focal_px == here.focal_px
        figures = matcher.figures()
        similar = places.query(FrameId(1), exclude=(), limit=3)
    finally:
        matcher.close()
    assert num_matches > 10
    assert figures["matched_there"] == 12
    assert figures["states_made"] == 4
    assert 0 < figures["tokens_sent"] <= 4  # type: ignore[operator]  # to the other worker
    assert figures["tokens_sent_again"] == 0
    assert all(score > 0 for _, score in similar)


def test_without_a_cluster_a_run_begins_here() -> None:
    config = load_config(settings=["remote.address=127.0.0.1:9", "remote.connect_timeout_s=1.0"])
    matcher = open_remote_sift(config, config.sift)
    try:
        said: list[str] = []
        matcher.report_to(said.append)
        assert_same(matcher, 2)
        assert matcher.figures()["described_here"] == 2
    finally:
        matcher.close()
    assert len(said) == 1
    assert "work is done here until it answers" in said[0]


@pytest.mark.usefixtures("towns_painted_once")
def test_a_batch_makes_its_runs_as_tasks(cluster: RayCluster, tmp_path: Path) -> None:
    good, broken = write_datasets(tmp_path)
    done = batch(
        good, broken, out=tmp_path / "runs", settings=[f"remote.address={cluster.address}"]
    )
    assert done.returncode == NOTHING_MADE, done.stdout
    rows = rows_of(done)
    assert rows["good"][:2] == ["4", "4"]
    assert rows["broken"][:2] == ["0", "0"]
    again = batch(good, out=tmp_path / "runs", settings=[f"remote.address={cluster.address}"])
    assert again.returncode == DOUBTED
    assert rows_of(again)["good"] == rows["good"]


def _is_done_there(matcher: RemoteSift) -> bool:
    before = matcher.figures()["described_there"]
    matcher.describe(frames(1)[0])
    return matcher.figures()["described_there"] != before
