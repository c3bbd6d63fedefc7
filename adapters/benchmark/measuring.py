"""Runs a command in a process of its own and measures it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.benchmark import process_usage
from engine.errors import ConfigError

_TAIL_BYTES = 2000  # of a log, for the words of a failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A process at a moment."""

    wall_s: float
    cpu_s: float
    num_bytes: int  # of the watched file


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a command used, with all its children."""

    exit_code: int  # minus the signal that ended it
    cpu_s: float  # user and system
    system_s: float
    wall_s: float
    peak_rss_mb: float  # of its largest process
    samples: tuple[Sample, ...]  # none where the system has no /proc


def measure(
    command: Sequence[str],
    *,
    result: Path,
    log: Path,
    watched: Path | None,
    num_threads: int,
    limit_s: float,
) -> Usage | None:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        result: where what it used is written.
        log: gets its output.
        watched: a file whose growth is sampled.
        num_threads: how many processors it may run on, of those of this process.
        limit_s: after this long it is killed.

    Returns:
        None where it was killed.

    Raises:
        ConfigError: the program cannot be started.
    """
    helper = [sys.executable, "-I", "-S", str(process_usage.__file__)]
    given = [str(result), "" if watched is None else str(watched), str(num_threads)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*helper, *given, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # signals of the terminal reach this process only
        )
        try:
            process.wait(timeout=limit_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise
    if process.returncode:
        raise ConfigError(f"cannot be measured: {last_line(log)}")
    record = json.loads(result.read_text(encoding="utf-8"))
    return Usage(
        exit_code=record["exit_code"],
        cpu_s=record["user_s"] + record["system_s"],
        system_s=record["system_s"],
        wall_s=record["wall_s"],
        peak_rss_mb=record["peak_rss_bytes"] / 2**20,
        samples=tuple(
            Sample(wall_s=wall_s, cpu_s=cpu_s, num_bytes=num_bytes)
            for wall_s, cpu_s, num_bytes in record["samples"]
        ),
    )


def usable_processors() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_line(log: Path) -> str:
    """The last line that a command wrote."""
    lines = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
