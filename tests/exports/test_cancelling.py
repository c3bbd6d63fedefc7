from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.exports.export import ExportFormat, export
from adapters.exports.job import ExportCancelledError, Progress
from adapters.exports.terminal import cancelled_by_signals, progress_shown
from engine.errors import SnapshotError
from tests.support.placed_runs import make_placed_run

LONG = [kind for kind in ExportFormat if kind is not ExportFormat.TUM]  # one small file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_placed_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", LONG)
def test_progress_counts_up_to_the_end(run: Path, tmp_path: Path, kind: ExportFormat) -> None:
    reported: dict[str, list[Progress]] = {}

    def note(progress: Progress) -> None:
        reported.setdefault(progress.what, []).append(progress)

    export(run, tmp_path / "out", formats=[kind], progress=note)
    assert reported
    for own in reported.values():
        done = [one.done for one in own]
        assert done == sorted(done) and done[0] == 0
        assert {one.total for one in own} == {own[-1].done}


@pytest.mark.parametrize("kind", LONG)
def test_a_cancelled_export_leaves_nothing_wherever_it_was(
    run: Path, tmp_path: Path, kind: ExportFormat
) -> None:
    asked = 0

    def cancelled_at(number: int) -> Callable[[], bool]:
        def is_cancelled() -> bool:
            nonlocal asked
            asked += 1
            return asked == number

        return is_cancelled

    export(run, tmp_path / "whole", formats=[kind], is_cancelled=cancelled_at(-1))
    times = asked
    for number in {1, max(1, times // 2), times}:
        asked = 0
        with pytest.raises(ExportCancelledError, match="nothing is left of it"):
            export(run, tmp_path / "out", formats=[kind], is_cancelled=cancelled_at(number))
        assert {path.name for path in tmp_path.iterdir()} == {"run", "whole"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_an_export_and_what_it_did_before_is_done_again(
    run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    former = signal.getsignal(number)

    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            os.kill(os.getpid(), number)

    with cancelled_by_signals() as is_cancelled, pytest.raises(ExportCancelledError):
        export(
            run,
            tmp_path / "out",
            formats=[ExportFormat.ODM],
            progress=interrupt,
            is_cancelled=is_cancelled,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert signal.getsignal(number) is former


def test_a_second_signal_leaves_at_once_and_leaves_nothing_either(
    run: Path, tmp_path: Path
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with cancelled_by_signals() as is_cancelled, pytest.raises(KeyboardInterrupt):
        export(
            run,
            tmp_path / "out",
            formats=[ExportFormat.UNDISTORT],
            progress=interrupt,
            is_cancelled=is_cancelled,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_progress_writes_nothing_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_shown() as show:
        show(Progress(what="images", done=0, total=2))
        show(Progress(what="images", done=2, total=2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", list(ExportFormat))
def test_a_full_disk_leaves_nothing_half_written(
    run: Path, tmp_path: Path, kind: ExportFormat
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(SnapshotError):
            export(run, tmp_path / "out", formats=[kind])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
