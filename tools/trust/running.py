"""One `livesfm run` as a process: its command, exit code and CPU seconds."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_REFUSED = 2
_UNKNOWN_OPTION = re.compile(r"No such option|unknown (key|setting|section)|[Ee]xtra inputs", re.S)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that has ended."""

    exit_code: int
    cpu_s: float
    output: str

    @property
    def is_not_possible(self) -> bool:
        """Whether this version of LiveSfM does not know what was asked for."""
        return self.exit_code == _REFUSED and bool(_UNKNOWN_OPTION.search(self.output))

    @property
    def last_line(self) -> str:
        """What the process said last."""
        lines = [line.strip(" │") for line in self.output.splitlines()]
        return next((line for line in reversed(lines) if re.search(r"\w", line)), "")


def run_process(command: Sequence[str], *, cwd: Path | None = None) -> Finished:
    """Runs a command to its end, with one thread for each library unless the caller says more."""
    environment = {name: "1" for name in _THREADS} | dict(os.environ)
    before = _children_cpu_s()
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT_S,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        code, output = 124, f"no end after {TIMEOUT_S} s"
    return Finished(exit_code=code, cpu_s=_children_cpu_s() - before, output=output)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
