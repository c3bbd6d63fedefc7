"""When the main map is adjusted in the background, and whose results are still of use."""

from __future__ import annotations

import pytest

from engine.config import (
    GlobalBundleAdjustmentConfig,
    LocalBundleAdjustmentConfig,
    RegistrationConfig,
    WindowConfig,
)
from engine.mapping.background_jobs import BackgroundJobs
from engine.mapping.cameras.lens_search import LensFits
from engine.mapping.jobs import FinishedJob
from engine.mapping.model.bundle_adjustment import GlobalAdjustment
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.windows.window_merging import WindowMergeConfig
from engine.mapping.windows.window_schedule import WindowRefinement
from engine.window_types import WindowEstimate, WindowProblem
from tests.support.synthetic import SyntheticWorld, grown_map, scene_graph, straight_path

ADJUSTMENT = GlobalBundleAdjustmentConfig(
    growth_ratio=1.5, synchronous_until=4, merge_after_keyframes=2
)


def no_solver(problem: WindowProblem) -> WindowEstimate:
    raise AssertionError("no window is due")


def jobs() -> BackgroundJobs:
    window = WindowConfig(enabled=False)
    windows = WindowRefinement(
        window,
        merging=WindowMergeConfig(
            window=window,
            registration=RegistrationConfig(),
            local_bundle_adjustment=LocalBundleAdjustmentConfig(),
        ),
        graph=scene_graph(),
        solve=no_solver,
        emit=lambda event: None,
    )
    return BackgroundJobs(
        ADJUSTMENT, window, windows=windows, solve_window=no_solver, num_threads=1
    )


@pytest.fixture(scope="module")
def sparse_map() -> SparseMap:
    return grown_map(SyntheticWorld(straight_path(6)))


def test_an_adjustment_is_due_once_for_each_growth_and_for_a_loop(sparse_map: SparseMap) -> None:
    background = jobs()
    assert background.take_due_adjustment(sparse_map)
    assert not background.take_due_adjustment(sparse_map)
    background.set_adjusted(sparse_map.num_registered - 1)
    assert not background.take_due_adjustment(sparse_map)  # it grew too little
    background.hasten_adjustment()
    assert background.take_due_adjustment(sparse_map)
    assert not background.take_due_adjustment(sparse_map)
    assert not background.is_small(sparse_map)


def test_a_result_is_due_after_some_keyframes_and_taken_once(sparse_map: SparseMap) -> None:
    background = jobs()
    job = background.start_adjustment(sparse_map)
    assert background.is_adjusting
    background.count_keyframe()
    due_early = background.due
    background.count_keyframe()
    assert (due_early, background.due) == ((), (job,))
    finished = FinishedJob(job=job, result=job.run())
    result = background.take_result(finished)
    assert isinstance(result, GlobalAdjustment)
    assert result.keyframe_ids == tuple(sparse_map.registered_ids)
    assert not background.is_adjusting
    assert background.take_result(finished) is None


def test_results_of_abandoned_and_of_failed_jobs_are_of_no_use(sparse_map: SparseMap) -> None:
    background = jobs()
    abandoned = background.start_adjustment(sparse_map)
    background.abandon()
    assert not background.is_adjusting
    assert background.take_result(FinishedJob(job=abandoned, result=abandoned.run())) is None
    failed = background.start_adjustment(sparse_map)
    assert background.take_result(FinishedJob(job=failed, result=None)) is None
    assert not background.is_adjusting


def test_the_search_of_a_lens_outlives_the_map_and_one_that_failed_has_found_nothing() -> None:
    background, found = jobs(), LensFits()
    searching = background.start_search(lambda: found)
    background.abandon()  # what holds copies of the map
    assert background.is_searching
    assert background.take_result(FinishedJob(job=searching, result=searching.run())) is found
    failed = background.start_search(lambda: found)
    background.count_keyframe()
    assert background.due == (failed,)
    result = background.take_result(FinishedJob(job=failed, result=None))
    assert isinstance(result, LensFits) and not result.fits
    abandoned = background.start_search(lambda: found)
    background.abandon_search()
    assert not background.is_searching
    assert background.take_result(FinishedJob(job=abandoned, result=None)) is None


def test_an_adjustment_of_the_main_map_goes_into_the_present_one(sparse_map: SparseMap) -> None:
    background, later = jobs(), sparse_map.copy()
    background.start_adjustment(sparse_map)
    assert background.adjusted_map(later) is later
    background.abandon()
    background.start_adjustment(sparse_map, is_component=True)
    assert background.adjusted_map(later) is sparse_map
