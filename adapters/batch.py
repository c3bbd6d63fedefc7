"""Many datasets, a run for each: one after the other here, or as tasks of a Ray cluster.

A run is a process of its own. What is done already is not done again: a run that has ended is left
as it is, and one that was cut off goes on. Where a batch is stopped, its run stops and saves its
map; on a cluster runs are killed, and go on from what they had written. A run ends with the process
that started it, so that whoever goes on with it finds the folder free.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.bound_process import bound_to_this_process
from adapters.install_advice import missing_package
from adapters.remote.connecting import connect
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

END_OF_SOURCES = "end_of_sources"  # in the summary of a run that came to its end
_MAX_SUMMARY_BYTES = 10_000_000
_MAX_LINE_BYTES = 100_000  # of an event
_MAX_FIRST_EVENTS = 100  # among which is the opening of the source
_LAST_BYTES = 10_000  # of what a run writes
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
        return _summary_of(self.folder).get("stopped_by") == END_OF_SOURCES

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
    exit_code: int | None  # of the run; None: it was done before
    summary: dict[str, Any]  # empty: there is none
    error: str = ""  # the last line that it wrote, where it made no map

    @property
    def has_map(self) -> bool:
        """Whether it came to its end with a map, be it a doubtful one."""
        is_whole = self.summary.get("stopped_by") == END_OF_SOURCES
        return is_whole and bool(self.summary.get("registered_keyframes"))

    @property
    def is_good(self) -> bool:
        """Whether the verdict on its map is good."""
        return self._level == "good"

    @property
    def _level(self) -> str:
        verdict = self.summary.get("verdict")
        return str(verdict.get("level") if isinstance(verdict, dict) else verdict)

    @property
    def row(self) -> tuple[str, ...]:
        """Cells of the table: name, keyframes, registered, error in px, wall seconds, verdict."""
        figures = self.summary
        error_px = figures.get("mean_reprojection_error_px")
        words = self._level
        if not self.has_map:
            words = self.error or ("no map" if figures else f"exit code {self.exit_code}")
        wall_s = figures.get("wall_s")
        return (
            self.name,
            str(figures.get("keyframes", "-")),
            str(figures.get("registered_keyframes", "-")),
            "-" if error_px is None else f"{error_px:.2f}",
            "-" if wall_s is None else f"{wall_s:.0f}",
            words,
        )


COLUMNS = ("dataset", "keyframes", "registered", "px", "wall s", "verdict")


def plan_batch(
    sources: Sequence[str],
    *,
    out: Path,
    arguments: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> list[BatchRun]:
    """A run for each source, in folders of their names in ``out``.

    A folder that another source's run has is left to it, whichever of the sources are given again
    and in whichever order.

    Args:
        sources: folders and videos.
        out: folder of the runs.
        arguments: of each run.
        files: names of files in the folders, or beside the videos, by the option of a run that
            takes one. A line in the log names sources without one.

    Raises:
        ConfigError: a source does not exist, or none has a file of a name.
    """
    runs: dict[str, BatchRun] = {}
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise ConfigError(f"{source}: does not exist")
        absolute = str(path.resolve())
        stem = path.resolve().name if path.is_dir() else path.stem
        name, number = stem, 1
        while name in runs or _source_of(out / name) not in ("", absolute):
            number += 1
            name = f"{stem}_{number}"
        runs[name] = BatchRun(
            name=name,
            source=absolute,
            folder=(out / name).resolve(),
            arguments=(*arguments, *_arguments_of(path.resolve(), files or {})),
        )
    for option, name in (files or {}).items():
        without = [run.source for run in runs.values() if option not in run.arguments]
        if len(without) == len(runs):
            raise ConfigError(f"{option} {name}: there is no such file in any of the folders")
        for source in without:
            logger.warning("%s: has no %s, and is mapped without", source, name)
    return list(runs.values())


def _arguments_of(path: Path, files: Mapping[str, str]) -> Iterator[str]:
    """The options of a run whose files are there, with these."""
    folder = path if path.is_dir() else path.parent
    for option, name in files.items():
        if (folder / name).is_file():
            yield from (option, str(folder / name))


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
        yield _result(run, *make_run(run))


def make_run(run: BatchRun) -> tuple[int, str]:
    """Makes a run, or goes on with it; returns its exit code and the last line that it wrote.

    Raises:
        KeyboardInterrupt: this process was interrupted; the run has stopped and saved its map.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            bound_to_this_process([sys.executable, "-m", "adapters.cli", *run.command]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the batch, which passes it on once
        )
        try:
            exit_code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            _wait_for_end(process)
            raise
        except BaseException:
            process.kill()
            process.wait()
            raise
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_BYTES))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return exit_code, lines[-1][:200] if lines else ""


def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Waits for a run that was asked to stop; whoever interrupts once more kills it."""
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def _run_there(runs: Sequence[BatchRun], address: str) -> Iterator[BatchResult]:
    if importlib.util.find_spec("ray") is None:
        raise missing_package("remote.address", package="ray", extra="ray")
    try:
        connect(address)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise ConfigError(f"remote.address={address}: {error}") from error
    import ray

    try:
        task = ray.remote(num_cpus=1, max_retries=3)(make_run)
        waiting = {task.remote(run): run for run in runs}
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


def _source_of(folder: Path) -> str:
    """The source that a run was started with; "": there is no run, or it opened none."""
    try:
        with (folder / "events.jsonl").open("rb") as file:
            lines = [file.readline(_MAX_LINE_BYTES) for _ in range(_MAX_FIRST_EVENTS)]
    except OSError:
        return ""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "SourceOpened":
            return str(event.get("address"))
    return ""


def _summary_of(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        if path.stat().st_size > _MAX_SUMMARY_BYTES:
            return {}
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
