"""A whole run that is served: viewers that come late, hang or die."""

from __future__ import annotations

import asyncio
import functools
import signal
import subprocess
from pathlib import Path

import pytest

import engine.run.dense as dense_module
import engine.run.engine as engine_module
from adapters.views.rerun_service import viewer_program
from adapters.views.rerun_view import RerunView
from adapters.views.view_mode import ViewMode
from engine.config import ViewsConfig
from engine.dense_types import DenseCloud
from engine.run.dense import CpuBudget, DenseMaking
from tests.support.fake_runs import (
    FakeSource,
    WorldMatcher,
    Written,
    engine_of,
    frames_of,
    trajectory_lines,
    world_of,
)
from tests.support.flat_depth import made
from tests.support.waiting import HANG_S, block_until

NUM_FRAMES = 16
NUM_SHOWN = NUM_FRAMES // 2  # at least: the newest are still adjusted, others wait for the end
WORLD = world_of(NUM_FRAMES)
DENSE = "/world/dense/"

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(autouse=True)
def _flat_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth costs nothing, and nothing of it is left out."""
    monkeypatch.setattr(dense_module, "estimate_depth", made)
    monkeypatch.setattr(CpuBudget, "has_room_for", lambda self, cpu_s: True)
    timeless = functools.partial(DenseMaking, clock=lambda: 0.0)
    monkeypatch.setattr(engine_module, "DenseMaking", timeless)


class Viewer:
    """A viewer of its own process that saves what it gets."""

    def __init__(self, view: RerunView, path: Path) -> None:
        assert view.viewer_command is not None
        url = view.viewer_command.split()[-1]
        command = [viewer_program(), "--bind", "127.0.0.1", "--save", str(path), "--connect", url]
        self.path = path
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def is_connected(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def dense_points(path: Path) -> dict[str, int]:
    """How many points of each keyframe a viewer was sent last, where there are any."""
    from rerun.chunk import RrdReader

    num_points: dict[str, int] = {}
    try:
        chunks = list(RrdReader(path).stream())
    except (ValueError, RuntimeError):  # nothing, or half of something, was written so far
        return num_points
    for chunk in chunks:
        if not chunk.entity_path.startswith(DENSE):
            continue
        batch = chunk.to_record_batch()
        if "Points3D:positions" in batch.schema.names:
            for positions in batch.column("Points3D:positions"):
                if positions.is_valid:
                    num_points[chunk.entity_path] = len(positions.as_py())
    return {path: num for path, num in num_points.items() if num}


def shown_clouds(view: RerunView) -> list[DenseCloud]:
    """What a view is shown of the dense map from now on, as a list that grows."""
    clouds: list[DenseCloud] = []
    show = view.show_dense

    def watched(cloud: DenseCloud) -> None:
        clouds.append(cloud)
        show(cloud)

    view.show_dense = watched  # type: ignore[method-assign]
    return clouds


@pytest.mark.filterwarnings("ignore:RRD file has no footer")
def test_who_comes_late_sees_the_whole_dense_map_beside_viewers_that_hang_and_die(
    tmp_path: Path,
) -> None:
    config = ViewsConfig(grpc_port=0, web_port=0)
    view = RerunView.open("test", mode=ViewMode.SERVE, recording_path=None, config=config)
    viewers: list[Viewer] = []
    clouds = shown_clouds(view)
    fetched: dict[str, int] = {}

    def come(name: str) -> Viewer:
        viewers.append(Viewer(view, tmp_path / f"{name}.rrd"))
        block_until(viewers[-1].is_connected, what=f"the viewer {name}")
        return viewers[-1]

    def hang_and_die() -> None:
        come("hanging").process.send_signal(signal.SIGSTOP)
        come("dying").end()

    def come_late() -> None:
        late = come("late")

        def has_all() -> bool:
            fetched.clear()
            fetched.update(dense_points(late.path))
            chunks = clouds[-1].chunks if clouds else ()
            whole = {
                f"{DENSE}keyframe_{one.frame_id:06d}": len(one.colors)
                for one in chunks
                if len(one.colors)
            }
            return len(whole) >= NUM_SHOWN and fetched == whole

        block_until(has_all, what="the whole dense map")

    async def in_thread_of_its_own(use: str) -> None:
        await asyncio.to_thread({"some": hang_and_die, "late": come_late}[use])

    frames = frames_of(WORLD)
    source = FakeSource(
        happenings=[
            *frames[:8],
            functools.partial(in_thread_of_its_own, "some"),
            *frames[8:],
            functools.partial(in_thread_of_its_own, "late"),
        ]
    )
    engine = engine_of(
        tmp_path / "run",
        matcher=WorldMatcher(world=WORLD),
        sources=[source],
        settings=("views.max_map_hz=20", "views.max_map_time_ratio=1.0"),
        views=[view],
    )
    try:
        outcome = asyncio.run(asyncio.wait_for(engine.run(), 4 * HANG_S))
    finally:
        for viewer in viewers:
            viewer.end()
    assert len(viewers) == 3
    assert len(fetched) >= NUM_SHOWN
    assert sum(fetched.values()) > 2500
    written = Written.by(outcome)
    assert outcome.num_registered == NUM_FRAMES
    assert written.summary["dense"]["keyframes_with_depth"] == NUM_FRAMES
    assert not [one for one in written.of_kind("Warned") if "view" in one["message"]]

    alone = engine_of(
        tmp_path / "alone",
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames_of(WORLD))],
    )
    unseen = asyncio.run(alone.run())
    ways = [trajectory_lines(one.path / "trajectory.txt") for one in (outcome, unseen)]
    assert ways[0] == ways[1], "viewers change nothing of the map"
