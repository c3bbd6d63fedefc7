"""Many datasets, a run for each: one after the other here, or as tasks of a Ray cluster.

A run is a process of its own. What is done already is not done again: a run that has ended is left
as it is, and one that was cut off goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.install_advice import missing_package
from adapters.remote.connecting import connect
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_MAX_SUMMARY_BYTES = 10_000_000
_WAIT_S = 1.0  # between looks for tasks that have ended


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRun:
    """A run to be made."""

    name: str
    source: str
    folder: Path
    arguments: tuple[str, ...]  # of `livesfm run`

    @property
    def is_done(self) -> bool:
        """Whether a former batch made it, to the end of its source."""
        return _summary_of(self.folder).get("stopped_by") == "end_of_sources"

    @property
    def command(self) -> list[str]:
        """What makes it, or goes on with it."""
        if (self.folder / "database.db").exists():
            return ["resume", str(self.folder), "--view", "none", "--quiet"]
        run = ["run", self.source, "--out", str(self.folder), "--view", "none", "--quiet"]
        return [*run, *self.arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """How a run ended."""

    name: str
    exit_code: int | None  # None: it was done before
    summary: dict[str, Any]  # empty: there is none
    error: str = ""  # the last line that it wrote, where it made no map

    @property
    def row(self) -> tuple[str, ...]:
        """Cells of the table: name, keyframes, registered, error in px, wall seconds, verdict."""
        if not self.summary:
            return (self.name, "-", "-", "-", "-", self.error or f"exit code {self.exit_code}")
        figures = self.summary
        error_px = figures.get("mean_reprojection_error_px")
        verdict = figures.get("verdict")
        return (
            self.name,
            str(figures.get("keyframes", "-")),
            str(figures.get("registered_keyframes", "-")),
            "-" if error_px is None else f"{error_px:.2f}",
            f"{figures.get('wall_s', 0.0):.0f}",
            str(verdict.get("level") if isinstance(verdict, dict) else verdict),
        )


COLUMNS = ("dataset", "keyframes", "registered", "px", "wall s", "verdict")


def plan_batch(
    sources: Sequence[str], *, out: Path, arguments: Sequence[str] = ()
) -> list[BatchRun]:
    """A run for each source, in folders of their names in ``out``.

    Raises:
        ConfigError: a source does not exist.
    """
    runs: dict[str, BatchRun] = {}
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise ConfigError(f"{source}: does not exist")
        stem = path.resolve().name if path.is_dir() else path.stem
        name, number = stem, 1
        while name in runs:
            number += 1
            name = f"{stem}_{number}"
        runs[name] = BatchRun(
            name=name,
            source=str(path.resolve()),
            folder=(out / name).resolve(),
            arguments=tuple(arguments),
        )
    return list(runs.values())


def run_batch(runs: Sequence[BatchRun], *, address: str = "") -> Iterator[BatchResult]:
    """Makes runs that are not done; yields each as it ends, those done before first.

    Args:
        runs: what to make.
        address: of a Ray cluster, whose nodes find sources and ``out`` under the same paths. "":
            they are made here, one after the other.

    Raises:
        AdapterUnavailableError: Ray is missing.
        ConfigError: the cluster does not answer.
    """
    for run in runs:
        if run.is_done:
            yield BatchResult(name=run.name, exit_code=None, summary=_summary_of(run.folder))
    left = [run for run in runs if not run.is_done]
    if address and left:
        yield from _run_there(left, address)
        return
    for run in left:
        yield _result(run, *run_process(run.command))


def run_process(command: Sequence[str]) -> tuple[int, str]:
    """Runs a command of livesfm; returns its exit code and the last line that it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "adapters.cli", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode, lines[-1][:200] if lines else ""


def _run_there(runs: Sequence[BatchRun], address: str) -> Iterator[BatchResult]:
    if importlib.util.find_spec("ray") is None:
        raise missing_package("remote.address", package="ray", extra="ray")
    try:
        connect(address)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise ConfigError(f"remote.address={address}: {error}") from error
    import ray

    try:
        task = ray.remote(num_cpus=1, max_retries=3)(run_process)
        waiting = {task.remote(run.command): run for run in runs}
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=_WAIT_S)
            for place in ended:
                run = waiting.pop(place)
                try:
                    exit_code, line = ray.get(place)
                except ray.exceptions.RayError as error:
                    exit_code, line = 1, f"the cluster lost it: {type(error).__name__}"
                yield _result(run, exit_code, line)
    finally:
        ray.shutdown()


def _result(run: BatchRun, exit_code: int, line: str) -> BatchResult:
    return BatchResult(
        name=run.name, exit_code=exit_code, summary=_summary_of(run.folder), error=line
    )


def _summary_of(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        if path.stat().st_size > _MAX_SUMMARY_BYTES:
            return {}
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
