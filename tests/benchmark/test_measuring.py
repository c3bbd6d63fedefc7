from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

from adapters.benchmark.measuring import Usage, last_line, measure
from engine.errors import ConfigError

HANG_S = 300.0  # a guard, no measure
PYTHON = [sys.executable, "-I", "-S", "-c"]
BURN = "import time\nwhile time.process_time() < {}: pass\n"


def measured(
    tmp_path: Path, program: str, *, limit_s: float = 600.0, num_threads: int = 1
) -> Usage | None:
    return measure(
        [*PYTHON, program],
        result=tmp_path / "usage.json",
        log=tmp_path / "log.txt",
        watched=tmp_path / "watched",
        num_threads=num_threads,
        limit_s=limit_s,
    )


def usage_of(tmp_path: Path, program: str) -> Usage:
    usage = measured(tmp_path, program)
    assert usage is not None
    return usage


def test_cpu_is_that_of_the_command_and_its_children(tmp_path: Path) -> None:
    child = BURN.format(0.3)
    usage = usage_of(
        tmp_path,
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
        + BURN.format(0.2),
    )
    assert usage.exit_code == 0
    assert 0.5 <= usage.cpu_s <= 1.0
    assert usage.wall_s >= 0.4


def test_memory_is_that_of_the_command_and_not_of_who_runs_it(tmp_path: Path) -> None:
    own = bytearray(64 * 2**20)  # of this process
    small = usage_of(tmp_path, "pass")
    large = usage_of(tmp_path, "data = bytearray(96 * 2**20)")
    assert len(own) > 0
    assert small.peak_rss_mb < 40.0
    assert 96.0 < large.peak_rss_mb < 140.0


def test_the_exit_code_is_kept_and_what_was_said_is_in_the_log(tmp_path: Path) -> None:
    usage = usage_of(tmp_path, "import sys\nprint('first', flush=True)\nsys.exit('the last word')")
    assert usage.exit_code == 1
    assert last_line(tmp_path / "log.txt") == "the last word"


def test_a_signal_that_ends_a_command_is_its_exit_code(tmp_path: Path) -> None:
    usage = usage_of(tmp_path, "import os\nos.abort()")
    assert usage.exit_code == -6


def test_a_program_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file"):
        measure(
            [str(tmp_path / "nowhere")],
            result=tmp_path / "usage.json",
            log=tmp_path / "log.txt",
            watched=None,
            num_threads=1,
            limit_s=600.0,
        )


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="ends of processes cannot be awaited")
def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\nchild.wait()"
    )
    assert measured(tmp_path, program, limit_s=2.0) is None
    said = last_line(tmp_path / "log.txt")
    assert not said or _ends(int(said))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")
def test_cpu_is_sampled_with_the_size_of_a_file(tmp_path: Path) -> None:
    program = f"file = open({str(tmp_path / 'watched')!r}, 'w', buffering=1)\n" + (
        "import time\nfor number in range(8):\n"
        "    file.write('12345678\\n')\n"
        "    while time.process_time() < 0.1 * (number + 1): pass\n"
    )
    usage = usage_of(tmp_path, program)
    assert usage.samples
    cpu_s = [sample.cpu_s for sample in usage.samples]
    sizes = [sample.num_bytes for sample in usage.samples]
    assert cpu_s == sorted(cpu_s)
    assert cpu_s[-1] <= usage.cpu_s + 0.02
    assert sizes == sorted(sizes)
    assert sizes[-1] % 9 == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processors cannot be chosen")
def test_a_command_runs_on_as_many_processors_as_it_may(tmp_path: Path) -> None:
    usage_of(tmp_path, "import os\nprint(len(os.sched_getaffinity(0)))")
    assert last_line(tmp_path / "log.txt") == "1"


def _ends(pid: int) -> bool:
    """Whether a process has ended, or does so without more being done; it may not be reaped."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], HANG_S)[0])
    finally:
        os.close(descriptor)
