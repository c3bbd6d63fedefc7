from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.output.run_folder import RunFolder
from engine.output.run_lock import RunLock, RunState, run_state

HOLD = """
import sys
from pathlib import Path
from engine.output.run_lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdin is not None
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def write_lock(path: Path, *, pid: int, host: str, age_s: float) -> None:
    """A lock that a run on some host left, last set some seconds ago."""
    record = {"pid": pid, "host": host, "started_at": "2026-01-01T00:00:00+00:00"}
    (path / ".lock").write_text(json.dumps(record))
    at_s = time.time() - age_s
    os.utime(path / ".lock", (at_s, at_s))


def test_a_folder_tells_a_running_run_from_a_killed_one_and_one_that_ended(tmp_path: Path) -> None:
    assert run_state(tmp_path) == (RunState.ENDED, None)
    with held_by_another_process(tmp_path) as holder:
        state, named = run_state(tmp_path)
        assert state is RunState.RUNNING
        assert named is not None and named.pid == holder.pid
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert run_state(tmp_path) == (RunState.INTERRUPTED, named)
    lock = RunLock.acquire(tmp_path)
    assert lock.interrupted == named
    lock.release()
    assert run_state(tmp_path) == (RunState.ENDED, None)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_process_holds_is_refused_in_words_that_name_it(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path) as holder:
        with pytest.raises(ConfigError, match=f"a run is writing there .process {holder.pid}, "):
            RunLock.acquire(tmp_path)
        assert (tmp_path / ".lock").exists()
    RunLock.acquire(tmp_path).release()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(
    tmp_path: Path, *, overwrite: bool
) -> None:
    first = RunFolder.create(tmp_path / "run", config_text="a: 1\n")
    with pytest.raises(ConfigError, match="a run is writing there"):
        RunFolder.create(tmp_path / "run", config_text="b: 2\n", overwrite=overwrite)
    assert (tmp_path / "run" / "config.yaml").read_text().endswith("\na: 1\n")
    first.close()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        RunFolder.create(tmp_path / "run", config_text="b: 2\n")
    RunFolder.create(tmp_path / "run", config_text="b: 2\n", overwrite=True).close()


def test_of_runs_that_start_at_once_in_one_folder_one_is_made(tmp_path: Path) -> None:
    create = (
        "import sys; from pathlib import Path; from engine.output.run_folder import RunFolder\n"
        "sys.stdin.readline()\n"
        "try: RunFolder.create(Path(sys.argv[1]), config_text=''); print('made', flush=True)\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
        "sys.stdin.read()"
    )
    starting = [
        subprocess.Popen(
            [sys.executable, "-c", create, str(tmp_path / "new" / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in starting:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stdout.readline().strip() for process in starting if process.stdout]
    for process in starting:
        process.communicate("")
    assert sorted(said) == ["ConfigError", "ConfigError", "made"]


def test_an_interrupted_run_is_refused_as_such_and_may_be_overwritten(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config_text="")
    run.close()
    write_lock(run.path, pid=1, host="drone", age_s=1e6)
    with pytest.raises(ConfigError, match="holds a run that was interrupted"):
        RunFolder.create(run.path, config_text="")
    again = RunFolder.create(run.path, config_text="", overwrite=True)
    assert run_state(run.path)[0] is RunState.RUNNING
    again.close()


def test_a_run_on_another_host_that_does_not_show_its_lock_here_is_known_by_its_time(
    tmp_path: Path,
) -> None:
    write_lock(tmp_path, pid=1, host="drone", age_s=5.0)
    with pytest.raises(ConfigError, match="process 1 on drone, since 2026-01-01"):
        RunLock.acquire(tmp_path)
    write_lock(tmp_path, pid=1, host="drone", age_s=600.0)
    lock = RunLock.acquire(tmp_path)
    assert lock.interrupted is not None and lock.interrupted.host == "drone"
    os.utime(tmp_path / ".lock", (0, 0))
    lock.beat()
    assert (tmp_path / ".lock").stat().st_mtime > 1e9
    lock.release()


def test_without_locks_of_the_file_system_a_dead_process_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = RunLock.acquire(tmp_path)
    assert run_state(tmp_path)[0] is RunState.RUNNING
    with pytest.raises(ConfigError, match="a run is writing there"):
        RunLock.acquire(tmp_path)
    lock.release()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_lock(tmp_path, pid=ended.pid, host=os.uname().nodename, age_s=1.0)
    assert run_state(tmp_path)[0] is RunState.INTERRUPTED
    RunLock.acquire(tmp_path).release()


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", b"[]", b"\xff", b'{"pid": 1, "host": "\\u001b[2J", "started_at": ""}'],
    ids=["empty", "text", "list", "binary", "escapes"],
)
def test_a_lock_that_says_nothing_is_of_an_interrupted_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    assert run_state(tmp_path) == (RunState.INTERRUPTED, None)
    RunLock.acquire(tmp_path).release()


def test_a_lock_knows_that_it_is_not_in_its_folder_any_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock.acquire(run)
    assert lock.is_in_place
    run.rename(tmp_path / "moved")
    assert not lock.is_in_place
    run.mkdir()
    other = RunLock.acquire(run)
    assert not lock.is_in_place
    lock.release()  # takes nothing from the other run
    assert other.is_in_place
    other.release()


def test_a_folder_that_cannot_be_locked_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be locked: No such file or directory"):
        RunLock.acquire(tmp_path / "nowhere")
