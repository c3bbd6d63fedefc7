"""The dense map beside mapping: its turns, its budget, and what breaks in it."""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.dense.dense_map as dense_map_module
import engine.output.dense_products as dense_products_module
import engine.run.dense as dense_module
import engine.run.engine as engine_module
from engine.dense_types import (
    DenseCloud,
    DensePoints,
    DepthEstimate,
    DepthProblem,
    DepthStatus,
)
from engine.errors import JournalError
from engine.mapping.mapper import Mapper
from engine.output.dense_products import DenseWorld
from engine.output.depth_store import DepthStore
from engine.output.ground_products import GroundProducts
from engine.output.recorder import Recorder
from engine.run.dense import CpuBudget, DenseMaking
from engine.run.engine import Engine, RunOutcome, StoppedBy
from engine.run.views import ViewDispatcher
from engine.types import FrameId
from tests.support.fake_runs import (
    FakeSource,
    WorldMatcher,
    Written,
    engine_of,
    frames_of,
    trajectory_lines,
)
from tests.support.flat_depth import made
from tests.support.synthetic import SyntheticWorld, straight_path

NUM_FRAMES = 14
WORLD = SyntheticWorld(straight_path(NUM_FRAMES))
Estimate = Callable[..., DepthEstimate]


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> Callable[[Estimate], None]:
    """Has runs estimate depth by another function."""

    def use(estimate: Estimate) -> None:
        monkeypatch.setattr(dense_module, "estimate_depth", estimate)

    use(made)
    return use


@pytest.fixture(autouse=True)
def _without_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run waits for depth however slow the machine is."""
    timeless = functools.partial(DenseMaking, clock=lambda: 0.0)
    monkeypatch.setattr(engine_module, "DenseMaking", timeless)


@pytest.fixture
def _without_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBudget, "has_room_for", lambda self, cpu_s: True)


def run(engine: Engine) -> tuple[RunOutcome, Written]:
    outcome = asyncio.run(engine.run())
    return outcome, Written.by(outcome)


def a_run(path: Path, *settings: str, **options: Any) -> tuple[RunOutcome, Written]:
    engine = engine_of(
        path,
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames_of(WORLD))],
        settings=settings,
        **options,
    )
    return run(engine)


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_every_registered_keyframe_gets_depth(tmp_path: Path) -> None:
    outcome, written = a_run(tmp_path / "run")
    events = written.of_kind("DepthEstimated")
    assert sorted(one["frame_id"] for one in events) == list(range(1, NUM_FRAMES + 1))
    assert {one["status"] for one in events} == {"made"}
    figures = written.summary["dense"]
    assert figures["keyframes_with_depth"] == outcome.num_registered == NUM_FRAMES
    assert figures["keyframes_without"] == {}
    assert figures["points"] == sum(one["num_points"] for one in events) > 1000
    names = sorted(path.name for path in (outcome.path / "dense").iterdir())
    assert names == [f"{number:06d}.npz" for number in range(1, NUM_FRAMES + 1)]


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_the_sparse_map_is_the_same_without_it(tmp_path: Path) -> None:
    without, _ = a_run(tmp_path / "without", "dense.enabled=false")
    with_it, _ = a_run(tmp_path / "with")
    assert not (without.path / "dense").exists()
    assert without.summary["dense"]["enabled"] is False
    for name in ("trajectory.txt", "latest/sparse/0/points3D.bin", "latest/sparse/0/images.bin"):
        assert (with_it.path / name).read_bytes() == (without.path / name).read_bytes()


@pytest.mark.usefixtures("estimates")
def test_keyframes_beyond_the_budget_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_asked = 0

    def has_room_for(self: CpuBudget, cpu_s: float) -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked <= 3

    monkeypatch.setattr(CpuBudget, "has_room_for", has_room_for)
    outcome, written = a_run(tmp_path / "run")
    figures = written.summary["dense"]
    assert 1 <= figures["keyframes_with_depth"] <= 3
    assert figures["keyframes_without"]["budget"] >= NUM_FRAMES - 3
    assert outcome.num_registered == NUM_FRAMES


@pytest.mark.usefixtures("_without_budget")
def test_what_raises_costs_one_keyframe(
    tmp_path: Path, estimates: Callable[[Estimate], None]
) -> None:
    def breaks_once(problem: DepthProblem, *others: Any) -> DepthEstimate:
        if problem.view.frame_id == 5:
            raise RuntimeError("broken")
        return made(problem, *others)

    estimates(breaks_once)
    outcome, written = a_run(tmp_path / "run")
    assert written.summary["dense"]["keyframes_with_depth"] == NUM_FRAMES - 1
    assert written.summary["dense"]["keyframes_without"] == {"failed": 1}
    (fault,) = written.of_kind("FaultOccurred")
    assert (fault["part"], fault["frame_id"]) == ("the dense map", 5)
    assert outcome.num_registered == NUM_FRAMES


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_a_map_that_hands_out_no_problem_costs_depth_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Mapper, **options: Any) -> None:
        raise RuntimeError("half changed")

    monkeypatch.setattr(Mapper, "dense_handout", breaks)
    outcome, written = a_run(tmp_path / "run")
    assert outcome.num_registered == NUM_FRAMES
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert written.summary["dense"]["keyframes_with_depth"] == 0
    faults = written.of_kind("FaultOccurred")
    assert {one["part"] for one in faults} == {"the dense map"}
    assert 1 <= len(faults) <= NUM_FRAMES + 2


@pytest.mark.usefixtures("_without_budget")
def test_what_hangs_is_given_up_and_called_no_more(
    tmp_path: Path, estimates: Callable[[Estimate], None]
) -> None:
    def waits(result: Any, limit_s: float) -> bool:
        """Hangs whatever makes depth."""
        try:
            return not isinstance(result.result(timeout=60.0), DepthEstimate)
        except Exception:  # noqa: BLE001 - whatever it raises is no hang
            return True

    estimates(made)
    outcome, written = a_run(tmp_path / "run", "faults.max_hangs=2", wait_for_call=waits)
    assert written.summary["dense"]["keyframes_with_depth"] == 0
    assert written.summary["dense"]["keyframes_without"]["failed"] == 2
    assert [one["kind"] for one in written.of_kind("FaultOccurred")] == ["hung", "hung"]
    assert outcome.num_registered == NUM_FRAMES


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_a_view_is_shown_all_of_it(tmp_path: Path) -> None:
    clouds: list[DenseCloud] = []

    class DenseView:
        def show_frame(self, frame: Any, pose: Any) -> None: ...

        def show_event(self, event: Any) -> None: ...

        def show_dense(self, cloud: DenseCloud) -> None:
            clouds.append(cloud)

        def close(self) -> None: ...

    outcome, _ = a_run(tmp_path / "run", views=[DenseView()])
    shown = clouds[-1]
    assert [chunk.frame_id for chunk in shown.chunks] == list(range(1, NUM_FRAMES + 1))
    centers = shown.world_from_chunk[:, :, 3]
    rows = [line.split() for line in trajectory_lines(outcome.path / "trajectory.txt")]
    final = np.array([[float(value) for value in row[1:4]] for row in rows])
    assert np.abs(centers - final).max() < 1e-6
    assert sum(len(chunk.xyz_in_cam) for chunk in shown.chunks) > 1000


def ply_header(path: Path) -> list[str]:
    """The lines of a PLY file before its points."""
    return path.read_bytes().partition(b"end_header")[0].decode("ascii").splitlines()


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_the_points_of_the_final_map_are_written(tmp_path: Path) -> None:
    outcome, written = a_run(tmp_path / "run")
    last = written.of_kind("DenseMapWritten")[-1]
    header = ply_header(outcome.path / "products" / "dense.ply")
    assert last["num_keyframes"] == NUM_FRAMES
    assert f"element vertex {last['num_points']}" in header
    assert f"comment verdict on the map: {outcome.verdict.level.value}" in header
    assert written.summary["dense"]["written"]["points"] == last["num_points"] > 500
    size = (outcome.path / "products" / "dense.ply").stat().st_size
    assert size > 27 * last["num_points"]


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_products_that_cost_too_much_beside_depth_wait_for_the_end_but_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_module, "_PRODUCT_SHARE", 0.0)
    monkeypatch.setattr(dense_module, "_MIN_FOR_PRODUCT", 1)
    _, written = a_run(tmp_path / "run", "snapshots.every_keyframes=3")
    assert len(written.of_kind("SnapshotWritten")) > 2
    products = written.of_kind("DenseMapWritten")
    assert len(products) <= 2
    assert products[-1]["num_keyframes"] == NUM_FRAMES


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_a_product_that_cannot_be_written_is_named_and_costs_no_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*args: Any, **kwargs: Any) -> int:
        raise JournalError("products/dense.ply: cannot be written: No space left on device")

    monkeypatch.setattr(dense_products_module, "write_dense_points", is_full)
    outcome, written = a_run(tmp_path / "run")
    assert outcome.num_registered == NUM_FRAMES
    assert "products/dense.ply" in outcome.not_saved
    assert written.summary["failed_writes"] >= 1
    assert (outcome.path / "latest").exists()
    assert not written.of_kind("DenseMapWritten")


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_depth_that_cannot_be_written_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*args: Any) -> None:
        raise JournalError("dense/000001.npz: cannot be written: No space left on device")

    monkeypatch.setattr(DepthStore, "write", is_full)
    outcome, written = a_run(tmp_path / "run")
    assert outcome.num_registered == NUM_FRAMES
    assert written.summary["dense"]["keyframes_without"] == {"not_written": NUM_FRAMES}
    assert written.summary["failed_writes"] == NUM_FRAMES


def test_what_the_map_moved_is_made_again_before_what_is_new_and_at_the_end_beyond_the_budget(
    tmp_path: Path, estimates: Callable[[Estimate], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every keyframe that has depth counts as moved; there is room for ten depth maps."""
    room = 10
    problems: list[FrameId] = []
    num_at_end: list[int] = []
    make_last = DenseMaking._make_last

    async def watched_end(self: DenseMaking) -> None:
        num_at_end.append(len(problems))
        await make_last(self)

    def watched(problem: DepthProblem, *args: Any) -> DepthEstimate:
        problems.append(problem.view.frame_id)
        return made(problem, *args)

    class Ten(CpuBudget):
        def has_room_for(self, cpu_s: float) -> bool:
            return len(problems) + cpu_s / dense_module._EXPECTED_CPU_S <= room

    estimates(watched)
    budget = Ten(0.5, used_s=lambda: 0.0, spent_s=lambda: 0.0)
    of_ten = functools.partial(DenseMaking, clock=lambda: 0.0, budget=budget)
    monkeypatch.setattr(engine_module, "DenseMaking", of_ten)
    monkeypatch.setattr(dense_module, "_SMOOTHING", 0.0)
    monkeypatch.setattr(dense_module, "_POINTS_CPU_S", 0.0)
    monkeypatch.setattr(dense_map_module, "_OUTDATED_ERROR_RATIO", -1.0)
    monkeypatch.setattr(DenseMaking, "_make_last", watched_end)
    _, written = a_run(tmp_path / "run")
    assert num_at_end[0] <= room
    figures = written.summary["dense"]
    times = Counter(problems)
    assert len(times) < room < len(problems)
    # How often before the end is by how far mapping is when depth is placed.
    assert set(times.values()) <= set(range(2, 2 + dense_module._MAX_AGAIN))
    assert figures["outdated"] == figures["keyframes_with_depth"]
    assert figures["keyframes_with_depth"] + figures["made_again"] == len(problems)
    assert figures["keyframes_without"]["budget"] == NUM_FRAMES - figures["keyframes_with_depth"]


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_depth_that_cannot_be_read_any_more_is_not_counted_as_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = DepthStore.points

    def is_broken(self: DepthStore, frame_id: FrameId) -> DensePoints | None:
        return None if frame_id == 3 else read(self, frame_id)

    monkeypatch.setattr(DepthStore, "points", is_broken)
    _, written = a_run(tmp_path / "run")
    figures = written.summary["dense"]
    assert figures["keyframes_with_depth"] == NUM_FRAMES - 1
    assert figures["keyframes_without"] == {"lost": 1}


@pytest.mark.usefixtures("_without_budget")
def test_a_keyframe_whose_depth_cannot_be_made_again_keeps_the_former_one(
    tmp_path: Path, estimates: Callable[[Estimate], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    times: Counter[FrameId] = Counter()

    def once(problem: DepthProblem, *args: Any) -> DepthEstimate:
        times[problem.view.frame_id] += 1
        if times[problem.view.frame_id] == 1:
            return made(problem, *args)
        status = DepthStatus.NOTHING_AGREES
        return DepthEstimate(status=status, reason="blurred", depth_map=None, cpu_s=0.0)

    estimates(once)
    monkeypatch.setattr(dense_map_module, "_OUTDATED_ERROR_RATIO", 0.0)
    monkeypatch.setattr(dense_map_module, "_UNCHANGED", 0.0)
    _, written = a_run(tmp_path / "run")
    assert max(times.values()) > 1
    figures = written.summary["dense"]
    assert figures["keyframes_with_depth"] == NUM_FRAMES
    assert figures["keyframes_without"] == {}


@pytest.mark.usefixtures("_without_budget")
def test_what_is_left_of_a_disk_is_for_the_sparse_map(
    tmp_path: Path, estimates: Callable[[Estimate], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders: list[Recorder] = []

    class WatchedRecorder(Recorder):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            recorders.append(self)

    num_made = 0

    def fills_the_disk(*args: Any) -> DepthEstimate:
        nonlocal num_made
        num_made += 1
        recorders[0].is_space_low |= num_made == 3
        return made(*args)

    estimates(fills_the_disk)
    monkeypatch.setattr(engine_module, "Recorder", WatchedRecorder)
    outcome, written = a_run(tmp_path / "run")
    figures = written.summary["dense"]
    assert num_made == 3
    assert figures["keyframes_with_depth"] == 2
    assert figures["keyframes_without"] == {"disk_space_low": NUM_FRAMES - 2}
    assert len(list((outcome.path / "dense").iterdir())) == 2
    assert not (outcome.path / "products").exists()
    assert outcome.not_saved == ("products/dense.ply",)
    assert outcome.num_registered == NUM_FRAMES


def test_a_budget_has_room_for_its_share() -> None:
    used, spent = [0.0], [0.0]
    budget = CpuBudget(0.25, used_s=lambda: used[0], spent_s=lambda: spent[0])
    used[0], spent[0] = 10.0, 2.0
    assert budget.has_room_for(0.5)
    assert not budget.has_room_for(2.0)
    spent[0] = 2.9
    assert not budget.has_room_for(0.2)
    used[0] = 12.0
    assert budget.has_room_for(0.1)


def test_what_a_run_before_used_is_no_part_of_the_budget() -> None:
    used, spent = [1000.0], [20.0]
    budget = CpuBudget(0.25, used_s=lambda: used[0], spent_s=lambda: spent[0])
    assert not budget.has_room_for(1.0)
    used[0] += 10.0
    assert budget.has_room_for(1.0)


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_the_summary_names_the_crs_of_the_orthophoto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_utm(run_path: Path, world: DenseWorld, ground: GroundProducts, versions: Any) -> None:
        ground.epsg = 32615

    monkeypatch.setattr(dense_module, "write_ground", in_utm)
    _, written = a_run(tmp_path / "run", "dense.orthophoto=true")
    assert written.summary["dense"]["written"]["epsg"] == 32615


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_an_orthophoto_that_fails_is_named_and_leaves_the_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any) -> None:
        raise RuntimeError("no such projection")

    monkeypatch.setattr(dense_module, "write_ground", breaks)
    outcome, written = a_run(tmp_path / "run", "dense.orthophoto=true")
    assert "no frame came with a position" in outcome.summary["not_georeferenced"]
    assert outcome.not_saved == ("products/: orthophoto, surface model or coverage",)
    assert written.of_kind("DenseMapWritten")[-1]["num_keyframes"] == NUM_FRAMES
    assert {one["detail"] for one in written.of_kind("FaultOccurred")} == {
        "RuntimeError: no such projection"
    }


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_products_that_break_are_named_as_not_saved_and_move_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any, **kwargs: Any) -> int:
        raise JournalError("products/dense.ply: cannot be written") from PermissionError(
            errno.EACCES, "Permission denied"
        )

    monkeypatch.setattr(dense_products_module, "write_dense_points", breaks)
    outcome, written = a_run(tmp_path / "run")
    assert outcome.path == tmp_path / "run"
    assert outcome.not_saved == ("products/dense.ply",)
    assert not written.of_kind("RunFolderMoved")
    assert len([one for one in written.warnings() if "dense.ply" in one]) == 1


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_depth_that_is_made_after_the_last_product_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_last = DenseMaking._make_last

    async def writes_first(self: DenseMaking) -> None:
        self._is_last_product = True
        await self._write_products()
        await make_last(self)

    monkeypatch.setattr(DenseMaking, "_make_last", writes_first)
    _, written = a_run(tmp_path / "run")
    products = written.of_kind("DenseMapWritten")
    assert products[-1]["num_keyframes"] == NUM_FRAMES
    assert products[-2]["num_keyframes"] < NUM_FRAMES


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_keyframes_that_the_end_does_not_wait_for_are_counted_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(step=100)
    late = functools.partial(DenseMaking, clock=lambda: float(next(ticks)))
    monkeypatch.setattr(engine_module, "DenseMaking", late)
    _, written = a_run(tmp_path / "run")
    (left_out,) = written.summary["dense"]["keyframes_without"].items()
    assert left_out[0] == "end_of_run"
    assert left_out[1] >= 3  # the newest ones never settle before


def num_products_before_the_end(path: Path) -> int:
    """Products of a run whose source does not end before there are any, or for a minute."""
    nums: list[int] = []

    async def waits() -> None:
        for _ in range(6000):
            if (path / "products" / "dense.ply").exists():
                break
            await asyncio.sleep(0.01)
        nums.append(int((path / "products" / "dense.ply").exists()))

    engine = engine_of(
        path,
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=[*frames_of(WORLD), waits])],
        settings=["snapshots.every_keyframes=3"],
    )
    run(engine)
    return nums[0]


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_products_are_written_while_more_depth_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next = DenseMaking._make_next

    async def always_more(self: DenseMaking, *, is_final: bool = False) -> bool:
        has_more = await make_next(self, is_final=is_final)
        return has_more or not self._is_ending

    monkeypatch.setattr(DenseMaking, "_make_next", always_more)
    assert num_products_before_the_end(tmp_path / "run") == 1


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_products_are_written_before_the_end_however_costly_they_were_thought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_module, "_POINTS_CPU_S", 1e6)
    assert num_products_before_the_end(tmp_path / "run") == 1


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_nothing_writes_once_the_run_has_let_go_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames_of(WORLD))],
    )
    ended_by: list[str] = []

    def is_dropped_meanwhile(*args: Any, between: Callable[[], None], **kwargs: Any) -> int:
        engine._dense.drop_what_waits()
        try:
            between()
        except Exception as error:
            ended_by.append(str(error))
            raise
        return 0

    monkeypatch.setattr(dense_products_module, "write_dense_points", is_dropped_meanwhile)
    outcome, written = run(engine)
    assert ended_by == ["it is stopped"]
    assert outcome.not_saved == ()
    assert not written.of_kind("DenseMapWritten")
    assert not written.of_kind("FaultOccurred")


@pytest.mark.usefixtures("_without_budget")
def test_what_is_dropped_is_counted_as_dropped(
    tmp_path: Path, estimates: Callable[[Estimate], None]
) -> None:
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames_of(WORLD))],
    )

    def drops(*args: Any) -> DepthEstimate:
        engine._dense.drop_what_waits()
        return made(*args)

    estimates(drops)
    _, written = run(engine)
    figures = written.summary["dense"]
    assert figures["keyframes_without"] == {"dropped": NUM_FRAMES}
    assert not list((tmp_path / "run").glob("dense/*"))


@pytest.mark.usefixtures("estimates", "_without_budget")
def test_a_disk_that_stalls_at_the_end_costs_the_products_and_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalls, goes_on = threading.Event(), threading.Event()

    def stall(*args: Any, between: Callable[[], None], **kwargs: Any) -> int:
        stalls.set()
        goes_on.wait(60.0)
        between()
        return 0

    def waits(result: Future[object], limit_s: float) -> bool:
        while not (result.done() or stalls.is_set()):
            wait([result], 0.01)
        return result.done()

    monkeypatch.setattr(dense_products_module, "write_dense_points", stall)
    monkeypatch.setattr(dense_module, "_MIN_FOR_PRODUCT", NUM_FRAMES + 1)  # not before the end
    outcome, written = a_run(tmp_path / "run", wait_for_call=waits)
    goes_on.set()
    assert "products/dense.ply" in outcome.not_saved
    assert outcome.num_hangs == 1
    assert outcome.num_registered == NUM_FRAMES
    assert "hung" in [one["kind"] for one in written.of_kind("FaultOccurred")]
    assert set(written.summary["dense"]["keyframes_without"]) <= {"hung"}


@pytest.mark.usefixtures("estimates")
def test_views_see_where_depth_lies_when_no_more_of_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_shown: list[int] = []
    monkeypatch.setattr(CpuBudget, "has_room_for", lambda self, cpu_s: False)
    monkeypatch.setattr(ViewDispatcher, "wants_dense", lambda self: True)
    monkeypatch.setattr(
        ViewDispatcher,
        "offer_dense",
        lambda self, cloud, **cost: num_shown.append(len(cloud.chunks)),
    )
    _, written = a_run(tmp_path / "run")
    assert len(num_shown) > 3
    assert written.summary["dense"]["keyframes_without"] == {"budget": NUM_FRAMES}


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError()])
def test_depth_of_a_run_before_that_cannot_be_restored_lets_the_run_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaks(self: DepthStore) -> list[FrameId]:
        raise error

    monkeypatch.setattr(DepthStore, "frame_ids", breaks)
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames_of(WORLD))],
    )

    async def go_on() -> None:
        await engine._dense.go_on(before=FrameId(5))
        await engine._abandon_all()

    asyncio.run(go_on())
    assert engine._dense.figures()["keyframes_with_depth"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("estimates")
def test_a_map_is_said_to_have_no_place_where_it_is_meant_to_have_one(tmp_path: Path) -> None:
    wanted = "dense.orthophoto=true"
    _, written = a_run(tmp_path / "wanted", wanted)
    assert "in map units and without north" in written.summary["not_georeferenced"]
    for number, off in enumerate(("dense.orthophoto=false", "georeference.enabled=false")):
        _, written = a_run(tmp_path / f"{number}", wanted, off)
        assert written.summary["not_georeferenced"] == ""
