"""Profiles of runs: CPU seconds by thread and function."""

from __future__ import annotations

import io
import pstats
import threading
import time
from pathlib import Path

import pytest

from adapters.profiling import Profile, profiled
from engine.cpu_time import Stage, charge_thread_to

A_WHILE_S = 0.2


def compute(cpu_s: float) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        sum(range(1000))


def compute_much() -> None:
    compute(2 * A_WHILE_S)


def compute_little() -> None:
    compute(A_WHILE_S)


def work() -> None:
    charge_thread_to(Stage.TRACK)
    compute_much()
    compute_little()
    time.sleep(0.1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pstats.Stats]:
    folder = tmp_path_factory.mktemp("run") / "profile"
    with profiled() as profile:
        thread = threading.Thread(target=work, name="at work")
        thread.start()
        thread.join()
    return {one.stem: pstats.Stats(str(one), stream=io.StringIO()) for one in profile.write(folder)}


def total_s(stats: pstats.Stats, name: str) -> float:
    return sum(row[3] for (_, _, one), row in stats.stats.items() if one == name)  # type: ignore[attr-defined]


def test_each_function_has_the_cpu_time_of_what_it_calls(files: dict[str, pstats.Stats]) -> None:
    stats = files["at_work"]
    assert total_s(stats, "compute_much") == pytest.approx(2 * A_WHILE_S, rel=0.3)
    assert total_s(stats, "compute_little") == pytest.approx(A_WHILE_S, rel=0.3)
    assert total_s(stats, "work") == pytest.approx(3 * A_WHILE_S, rel=0.2)


def test_time_is_shared_out_among_callers_and_waiting_is_none(
    files: dict[str, pstats.Stats],
) -> None:
    stats = files["at_work"]
    (rows,) = [row for (_, _, one), row in stats.stats.items() if one == "compute"]  # type: ignore[attr-defined]
    by_caller = {name: row[3] for (_, _, name), row in rows[4].items()}
    assert set(by_caller) == {"compute_much", "compute_little"}
    assert sum(by_caller.values()) == pytest.approx(rows[3])
    assert stats.total_tt == pytest.approx(3 * A_WHILE_S, rel=0.2)  # type: ignore[attr-defined]


def test_a_function_that_calls_itself_counts_once(tmp_path: Path) -> None:
    profile = Profile()

    def sample_at_the_end() -> None:
        compute(A_WHILE_S)
        profile.sample()

    def outer(depth: int) -> None:
        if depth:
            outer(depth - 1)
        else:
            sample_at_the_end()

    outer(3)
    profile.close()
    (name,) = [path for path in profile.write(tmp_path / "p") if "Main" in path.name]
    stats = pstats.Stats(str(name), stream=io.StringIO())
    assert total_s(stats, "outer") == pytest.approx(stats.total_tt)  # type: ignore[attr-defined]
    assert stats.total_tt >= A_WHILE_S  # type: ignore[attr-defined]
