"""Programs that end with the process that starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from adapters.bound_process import bound_to_this_process
from tests.support.paths import ROOT
from tests.support.waiting import block_until

_START = """
import subprocess, sys
from adapters.bound_process import bound_to_this_process
program = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
with subprocess.Popen(bound_to_this_process(program), start_new_session=True) as process:
    print(process.pid, flush=True)
    process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with another")
def test_a_program_ends_with_the_process_that_started_it_when_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _START], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as starter:
        try:
            assert starter.stdout is not None
            lines = [starter.stdout.readline() for _ in range(2)]  # in either order
            program = psutil.Process(int(next(line for line in lines if line != "here\n")))
            assert program.is_running()
        finally:
            starter.kill()
    block_until(lambda: not program.is_running(), what="the end of the program")


def test_a_program_gets_its_arguments_and_returns_its_exit_code(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b", "-c"]
    done = subprocess.run(
        bound_to_this_process(program), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (7, "['a b', '-c']\n")
