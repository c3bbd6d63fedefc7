"""The bench: makes inputs once, runs LiveSfM on them, and keeps what came of it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trust.inputs import Input, Kit, Maker, make_once
from trust.places import Placement, placement
from trust.running import Finished, run_process
from trust.scoring import MapScore, largest_map, registered_centers, score_run, true_centers
from trust.verdicts import GOOD, NO_VERDICT, Said, said_by

_RUN_MATCHER = Path(__file__).with_name("run_matcher.py")
VARIED = "-vary"  # before the seed, in names of runs with other parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An input and how LiveSfM is run on it."""

    name: str  # of the run's folder
    make: Maker
    input_name: str = ""  # of the input's folder, where it is not the run's name
    arguments: tuple[str, ...] = ()  # besides the input's own
    matcher: str | None = None  # of `run_matcher.py`; None: the input's
    settings: tuple[str, ...] = ()  # left out where the version does not know them
    is_reference: bool = False  # run once, by the version to compare with, and kept

    @property
    def input_folder(self) -> str:
        """The name of the input's folder."""
        return self.input_name or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOnDisk:
    """How the run of a folder ended, in a file beside the folder."""

    finished: Finished
    unknown_settings: tuple[str, ...] = ()  # that the version does not know: run without them

    def save(self, run: Path) -> None:
        """Writes the record, and the terminal's text beside it."""
        _beside(run, ".json").write_text(json.dumps(asdict(self)), encoding="utf-8")
        _beside(run, ".log").write_text(self.finished.output, encoding="utf-8")

    @staticmethod
    def load(run: Path) -> RunOnDisk | None:
        """Reads the record that `save` wrote; None where there is none."""
        path = _beside(run, ".json")
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return RunOnDisk(
            finished=Finished(**record["finished"]),
            unknown_settings=tuple(record["unknown_settings"]),
        )


def _beside(run: Path, suffix: str) -> Path:
    return run.with_name(f"{run.name}{suffix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A case that was run."""

    case: Case
    known: Input
    folder: Path  # of the input
    run: Path
    command: str
    finished: Finished
    score: MapScore | None  # None: no map
    unknown_settings: tuple[str, ...] = ()  # that this version does not know: run without them

    @property
    def said(self) -> Said:
        """The verdict and the words on the terminal."""
        return said_by(self.run, self.finished.output)

    def placement(self) -> Placement | None:
        """Which cameras of the fullest map are right; None: too few have a true place."""
        reconstruction = largest_map(self.run)
        if reconstruction is None or self.known.truth is None:
            return None
        truth = true_centers(self.known, self.folder, self.run)
        return placement(registered_centers(reconstruction), truth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One figure and its bar."""

    label: str
    figure: str
    bar: str
    is_ok: bool
    case: str = ""  # the run that the line describes; "": the row's first


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: its runs, and how they are judged."""

    name: str
    cases: tuple[Case, ...]
    judge: Callable[[Bench, Sequence[Outcome]], list[Check]]


@dataclass(kw_only=True)
class Bench:
    """Where inputs and runs are, and which LiveSfM is measured."""

    kit: Kit
    inputs: Path
    runs: Path
    livesfm: str
    baseline: str | None = None  # the version to compare with
    check: Path | None = None  # folder of accept.py
    prefix: tuple[str, ...] = ()  # starts every run
    repeats: int = 3  # of CPU measurements
    keeps_runs: bool = False  # judges runs that are there and does not run them again
    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the runs and of what is kept of them."""
        return self.runs.name

    def floor(self, run: Path) -> dict[str, Any] | None:
        """What parquet_floor.py measures in a run; None where it is not at hand or finds no map."""
        if self.check is None:
            return None
        return self._figures_of(self.check.resolve() / "parquet_floor.py", str(run))

    def drifting_loop(self, seed: int) -> dict[str, Any] | None:
        """What drifting_loop.py measures of the program's own parts; None where it cannot."""
        script = Path(__file__).with_name("drifting_loop.py")
        return self._figures_of(script, "--seed", str(seed), prefix=self.prefix)

    def _figures_of(
        self, script: Path, *arguments: str, prefix: tuple[str, ...] = ()
    ) -> dict[str, Any] | None:
        """The JSON object that a script prints last, run by the Python of the program."""
        python = Path(self.livesfm).absolute().with_name("python")
        finished = run_process([*prefix, str(python), str(script), *arguments])
        lines = [line for line in finished.output.splitlines() if line.startswith("{")]
        found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
        return found

    def measure(self, row: Row) -> tuple[list[Check], list[Outcome]]:
        """Runs a row's cases and judges them."""
        outcomes = [self.outcome(case) for case in row.cases]
        refused = [each for each in outcomes if each.finished.is_not_possible]
        if refused:
            figure = f"not possible: {refused[0].finished.last_line}"
            return [Check(label="run", figure=figure, bar="possible", is_ok=False)], outcomes
        checks = [*row.judge(self, outcomes), *called_good_checks(outcomes)]
        return [*checks, *broken_checks(outcomes)], outcomes

    def outcome(self, case: Case) -> Outcome:
        """Runs a case, once for all rows that have it."""
        if case.name not in self._outcomes:
            self._outcomes[case.name] = self._run(case)
        return self._outcomes[case.name]

    def input(self, case: Case) -> tuple[Input, Path]:
        """The input of a case and its folder, made if need be."""
        folder = self.inputs / case.input_folder
        return make_once(case.make, self.kit, folder), folder

    def command(self, case: Case, *, livesfm: str, run: Path) -> list[str]:
        """What a case is run by."""
        known, folder = self.input(case)
        settings = (part for setting in case.settings for part in ("--set", setting))
        given = [*known.command(folder), *case.arguments, *settings]
        program = [livesfm]
        if matcher := case.matcher or known.matcher:
            python = Path(livesfm).absolute().with_name("python")
            program = [str(python), str(_RUN_MATCHER), matcher]
        return [*program, "run", *given, "--out", str(run), "--overwrite", "--view", "none", "-q"]

    def shown(self, command: Sequence[str]) -> str:
        """A command as the table has it: LiveSfM by its name, folders by what they hold."""
        start = command.index("run")
        program = ["livesfm"] if start == 1 else [_RUN_MATCHER.name, *command[2:start]]
        text = shlex.join([*program, *command[start:]])
        for folder, name in (
            (self.inputs, "INPUTS"),
            (self.runs, "RUNS"),
            (self.kit.data, "DATA"),
        ):
            text = text.replace(str(folder), name)
        return text.replace(" --overwrite --view none -q", " --view none")

    def export(self, outcome: Outcome) -> Path:
        """The folder that ``export --undistort`` of a run writes; absent where it fails."""
        folder = self.runs / f"{outcome.case.name}-export"
        shutil.rmtree(folder, ignore_errors=True)
        command = ["export", str(outcome.run), "--to", str(folder), "--undistort"]
        run_process([*self.prefix, self.livesfm, *command])
        return folder

    def accept(self, name: str) -> list[tuple[bool, str, str, str]]:
        """What accept.py prints of a set: whether it is good, label, figure and bar.

        It is run by the Python beside the program that is measured, in the folder of its presets.
        """
        if self.check is None:
            return []
        program = Path(self.livesfm).absolute()
        script = [str(program.parent / "python"), str(self.check.resolve() / "accept.py"), name]
        out = ["--out", str(self.runs / "accept")]
        finished = run_process([*self.prefix, *script, *out], cwd=program.parents[2])
        return [line for line in map(accept_line, finished.output.splitlines()) if line]

    def cpu_seconds(self, case: Case) -> tuple[list[float], list[float]]:
        """Of the program that is measured and of the baseline, run by turns."""
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.repeats):
            for seconds, livesfm in zip(times, (self.livesfm, self.baseline), strict=True):
                run = self.runs / case.name
                command = self.command(case, livesfm=livesfm or self.livesfm, run=run)
                seconds.append(run_process([*self.prefix, *command]).cpu_s)
        return times

    def _run(self, case: Case) -> Outcome:
        run = self._run_folder(case)
        livesfm = (self.baseline if case.is_reference else None) or self.livesfm
        command = self.command(case, livesfm=livesfm, run=run)
        known, folder = self.input(case)
        kept = RunOnDisk.load(run) if case.is_reference or self.keeps_runs else None
        done = kept or self._run_afresh(case, command, livesfm=livesfm, run=run)
        return Outcome(
            case=case,
            known=known,
            folder=folder,
            run=run,
            command=self.shown(command),
            finished=done.finished,
            score=score_run(known, folder, run),
            unknown_settings=done.unknown_settings,
        )

    def _run_afresh(self, case: Case, command: list[str], *, livesfm: str, run: Path) -> RunOnDisk:
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        done = RunOnDisk(finished=run_process([*self.prefix, *command]))
        if done.finished.is_not_possible and case.settings:
            command = self.command(replace(case, settings=()), livesfm=livesfm, run=run)
            finished = run_process([*self.prefix, *command])
            done = RunOnDisk(finished=finished, unknown_settings=case.settings)
        done.save(run)
        return done

    def _run_folder(self, case: Case) -> Path:
        """References are kept beside the runs of the versions that are compared with them."""
        return (self.references if case.is_reference else self.runs) / case.name

    @property
    def references(self) -> Path:
        """The folder of the runs of the version to compare with."""
        _, _, drawn = self.runs.name.partition(VARIED)
        return self.runs.with_name("baseline" + (f"{VARIED}{drawn}" if drawn else ""))


def broken_checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """One check that fails for each run that broke off, and none for others."""
    return [
        Check(
            label="the run broke off",
            figure=each.finished.last_line,
            bar="ends",
            is_ok=False,
            case=each.case.name,
        )
        for each in outcomes
        if "Traceback" in each.finished.output
    ]


def called_good_checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """That no map with a camera elsewhere is called good, of runs whose truth is known.

    A version without verdicts calls every map good.
    """
    known = [each for each in outcomes if each.known.truth is not None]
    if not known:
        return []
    called_good = [each for each in known if each.said.level in (GOOD, NO_VERDICT)]
    wrong = [
        f"{each.case.name}: {found.num_wrong} of {found.num_judged}, "
        f"up to {found.worst_percent:.3g} %"
        for each in called_good
        if (found := each.placement()) is not None and found.num_wrong
    ]
    return [
        Check(
            label=f"maps of {len(known)} that are called good with cameras elsewhere "
            f"{'; '.join(wrong)}".strip(),
            figure=str(len(wrong)),
            bar="<= 0",
            is_ok=not wrong,
        )
    ]


def accept_line(line: str) -> tuple[bool, str, str, str] | None:
    """A line of accept.py: the verdict, set, label, figure, comparison and bar."""
    found = re.fullmatch(r"(ok |NOT)  (\S+)\s+(.*?)\s+(\S+) (<=|>=) (\S+)", line)
    if found:
        verdict, _, label, figure, comparison, bar = found.groups()
        return verdict == "ok ", label, figure, f"{comparison} {bar}"
    if line.startswith("NOT"):
        return False, "run", line.removeprefix("NOT").strip(), "scored"
    return None


def percent_check(
    outcome: Outcome, value: float | None, *, bar: float, label: str = "ATE %"
) -> Check:
    """A figure in percent that must not exceed its bar, of a run that registered enough."""
    score = outcome.score
    is_enough = score is not None and score.is_enough
    return Check(
        label=label,
        figure="no map" if score is None else "-" if value is None else f"{value:.4g}",
        bar=f"<= {bar:.3g}",
        is_ok=is_enough and value is not None and value <= bar,
        case=outcome.case.name,
    )


def count_check(
    outcome: Outcome,
    value: int | None,
    *,
    label: str,
    at_least: int | None = None,
    at_most: int | None = None,
) -> Check:
    """A count with a bar on one side."""
    is_ok = value is not None
    if value is not None:
        is_ok = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return Check(
        label=label,
        figure="no map" if value is None else str(value),
        bar=f">= {at_least}" if at_least is not None else f"<= {at_most}",
        is_ok=is_ok,
        case=outcome.case.name,
    )
