"""Viewers end with the process that started them, also when that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from adapters.views.viewer_process import ViewerProcess
from tests.support.waiting import block_until

# A viewer says its process id, then waits for ever.
VIEWER = ["import os, sys, time", "open(sys.argv[1], 'w').write(str(os.getpid()))"]


def command(path: Path, *, lines: list[str] = VIEWER) -> list[str]:
    return [sys.executable, "-c", "\n".join([*lines, "time.sleep(600)"]), str(path)]


def viewer_of(path: Path) -> psutil.Process:
    """The viewer, once it has said its process id."""
    block_until(lambda: path.exists() and path.read_text(), what="the viewer")
    return psutil.Process(int(path.read_text()))


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_viewer_runs_until_it_is_stopped(tmp_path: Path) -> None:
    started = ViewerProcess(command(tmp_path / "pid"), environment=os.environ)
    viewer = viewer_of(tmp_path / "pid")
    assert started.is_running
    started.stop()
    assert not started.is_running
    assert has_ended(viewer)


def test_a_viewer_that_ends_by_itself_is_seen_to(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as output:
        broken = [sys.executable, "-c", "print('out of order', flush=True); raise SystemExit(3)"]
        started = ViewerProcess(broken, environment=os.environ, output=output)
        block_until(lambda: not started.is_running, what="the end")
    assert started.has_failed
    assert "out of order" in (tmp_path / "output").read_text()
    started.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_viewer_ends_with_the_process_that_started_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    program = [
        "import os, sys, time",
        "from adapters.views.viewer_process import ViewerProcess",
        "started = ViewerProcess(sys.argv[1:], environment=os.environ)",
        "time.sleep(600)",
    ]
    run = subprocess.Popen(
        [sys.executable, "-c", "\n".join(program), *command(tmp_path / "pid")],
        cwd=Path(__file__).resolve().parents[2],
    )
    viewer = viewer_of(tmp_path / "pid")
    watcher = viewer.parent()
    assert watcher is not None
    run.send_signal(number)
    run.wait()
    block_until(lambda: has_ended(viewer) and has_ended(watcher), what="the viewer's end")
