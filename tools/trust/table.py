"""Rows as they are kept, one JSON object a line, and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trust.bench import Check, Outcome

_COLUMNS = ("row", "what", "figure", "bar", "", "registered", "cameras", "CPU s", "exit", "command")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of a row."""

    name: str
    command: str
    exit_code: int
    cpu_s: float
    last_line: str
    registered: int | None
    keyframes: int | None
    maps: int | None
    points: int | None
    ate_percent: float | None
    cameras: tuple[str, ...]

    @staticmethod
    def of(outcome: Outcome) -> RunRecord:
        """What is kept of a run."""
        score, finished = outcome.score, outcome.finished
        return RunRecord(
            name=outcome.case.name,
            command=outcome.command,
            exit_code=finished.exit_code,
            cpu_s=round(finished.cpu_s, 2),
            last_line=finished.last_line,
            registered=score.num_registered if score else None,
            keyframes=score.num_keyframes if score else None,
            maps=score.num_maps if score else None,
            points=score.num_points3D if score else None,
            ate_percent=score.ate_percent if score else None,
            cameras=tuple(str(camera) for camera in score.cameras) if score else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRecord:
    """A measured row."""

    name: str
    checks: tuple[Check, ...]
    runs: tuple[RunRecord, ...]

    @staticmethod
    def of(name: str, checks: Sequence[Check], outcomes: Sequence[Outcome]) -> RowRecord:
        """What is kept of a row."""
        runs = tuple(RunRecord.of(outcome) for outcome in outcomes)
        return RowRecord(name=name, checks=tuple(checks), runs=runs)

    @property
    def is_ok(self) -> bool:
        """Whether every figure keeps to its bar."""
        return all(check.is_ok for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Files of measured rows: NAME.jsonl, one JSON object a line, and NAME.md, the table."""

    folder: Path
    order: Sequence[str]  # names of all rows, as the table has them

    def read(self, name: str) -> dict[str, RowRecord]:
        """The rows kept, by their names; none where there is no file."""
        path = self.folder / f"{name}.jsonl"
        if not path.is_file():
            return {}
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [_record_of(json.loads(line)) for line in lines]
        return {record.name: record for record in records}

    def write(self, name: str, records: Mapping[str, RowRecord]) -> None:
        """Writes rows in the table's order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ordered = [records[row] for row in self.order if row in records]
        lines = "".join(f"{json.dumps(asdict(record))}\n" for record in ordered)
        (self.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (self.folder / f"{name}.md").write_text(table_of(ordered) + "\n", encoding="utf-8")


def table_of(
    records: Sequence[RowRecord],
    *,
    beside: Mapping[str, RowRecord] | None = None,
    beside_name: str | None = None,
    with_head: bool = True,
) -> str:
    """A Markdown table, a line for each figure; ``beside`` adds the figures of other runs."""
    columns = list(_COLUMNS)
    if beside_name:
        columns.insert(3, beside_name)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"] if with_head else []
    for record in records:
        other = (beside or {}).get(record.name)
        for number, check in enumerate(record.checks):
            cells = _cells(record, check)
            if beside_name:
                is_known = other is not None and number < len(other.checks)
                cells.insert(3, other.checks[number].figure if other and is_known else "-")
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _record_of(record: Mapping[str, Any]) -> RowRecord:
    return RowRecord(
        name=record["name"],
        checks=tuple(Check(**check) for check in record["checks"]),
        runs=tuple(
            RunRecord(**{**run, "cameras": tuple(run["cameras"])}) for run in record["runs"]
        ),
    )


def _cells(record: RowRecord, check: Check) -> list[str]:
    run = next((run for run in record.runs if run.name == check.case), None)
    run = run or next(iter(record.runs), None)
    figures = [record.name, check.label, check.figure, check.bar, "ok" if check.is_ok else "NOT"]
    if run is None:
        return [*figures, "", "", "", "", ""]
    registered = "-" if run.registered is None else f"{run.registered}/{run.keyframes}"
    return [
        *figures,
        registered,
        "; ".join(run.cameras),
        f"{run.cpu_s:.0f}",
        str(run.exit_code),
        f"`{run.command}`",
    ]
