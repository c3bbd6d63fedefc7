#!/usr/bin/env python3
"""Do pictures, cameras and maps tell the truth: what LiveSfM makes of known inputs, scored.

    .venv/bin/python tools/trust_bench.py --data DIR --cases DIR             # the whole table
    .venv/bin/python tools/trust_bench.py --data DIR --cases DIR --only zoom-exif room-pinhole
    .venv/bin/python tools/trust_bench.py --data DIR --cases DIR --make zoom-exif INPUTS
    .venv/bin/python tools/trust_bench.py --score INPUTS/zoom-exif RUN

DATA holds the image sets, CASES the script room.py. Inputs are made once and kept in WORK/inputs,
runs in WORK/runs/NAME. Rows are kept in WORK/NAME.jsonl and WORK/NAME.md, so that single rows can
be measured again, and two versions of LiveSfM compared by --beside NAME. With --vary SEED, the
inputs and names have -varySEED at their ends. Exits with 0 when all rows pass.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trust.bench import VARIED, Bench
from trust.inputs import Input, Kit
from trust.rows import all_rows
from trust.scoring import score_run
from trust.table import Kept, RowRecord, table_of
from trust.variation import Variation

_LIVESFM = Path(sys.executable).parent / "livesfm"


def main(given: Sequence[str] | None = None) -> None:
    """Measures, or makes or scores a single input."""
    arguments = parse_arguments(given)
    if arguments.score:
        print_score(*arguments.score)
        return
    bench = open_bench(arguments)
    rows = all_rows(num_seeds=arguments.seeds)
    if arguments.make:
        make(bench, arguments.make[0], num_seeds=arguments.seeds)
        return
    wanted = arguments.only or list(rows)
    unknown = set(wanted) - rows.keys()
    if unknown:
        sys.exit(f"trust_bench: no such row: {', '.join(sorted(unknown))}; {', '.join(rows)}")
    kept = Kept(folder=arguments.work, order=list(rows))
    for name in [] if arguments.show else wanted:
        print(f"trust_bench: {name}", file=sys.stderr, flush=True)
        record = RowRecord.of(name, *bench.measure(rows[name]))
        # Read again: another process may have measured other rows meanwhile.
        kept.write(bench.name, kept.read(bench.name) | {name: record})
        print(table_of([record], with_head=False), file=sys.stderr, flush=True)
    records = kept.read(bench.name)
    measured = [records[name] for name in wanted if name in records]
    beside = kept.read(arguments.beside) if arguments.beside else {}
    print(table_of(measured, beside=beside, beside_name=arguments.beside))
    sys.exit(0 if len(measured) == len(wanted) and all(each.is_ok for each in measured) else 1)


def open_bench(arguments: argparse.Namespace) -> Bench:
    """The bench that the options describe."""
    variation = Variation() if arguments.vary is None else Variation.drawn(arguments.vary)
    suffix = "" if arguments.vary is None else f"{VARIED}{arguments.vary}"
    inputs = Path(arguments.make[1]) if arguments.make else arguments.work / f"inputs{suffix}"
    return Bench(
        kit=Kit(
            data=arguments.data.resolve(), cases=arguments.cases.resolve(), variation=variation
        ),
        inputs=inputs.resolve(),
        runs=(arguments.work / "runs" / f"{arguments.name}{suffix}").resolve(),
        livesfm=str(arguments.livesfm),
        baseline=str(arguments.baseline) if arguments.baseline else None,
        check=arguments.check,
        prefix=tuple(shlex.split(arguments.prefix)),
        repeats=arguments.repeats,
        keeps_runs=arguments.keep,
    )


def make(bench: Bench, row_name: str, *, num_seeds: int) -> None:
    """Makes the inputs of a row and prints how to run them."""
    row = all_rows(num_seeds=num_seeds)[row_name]
    for case in row.cases:
        run = Path("RUN")
        print(shlex.join(bench.command(case, livesfm="livesfm", run=run)))


def print_score(input_folder: str, run: str) -> None:
    """Scores a run of an input; one JSON object."""
    folder = Path(input_folder).resolve()
    score = score_run(Input.load(folder), folder, Path(run))
    print(json.dumps(score.as_record() if score else None, indent=2))


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options given, by default those of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the image sets")
    parser.add_argument("--cases", type=Path, help="folder of room.py")
    parser.add_argument("--check", type=Path, help="folder of accept.py, for the rows of its bars")
    parser.add_argument("--work", type=Path, default=Path("runs/trust"), help="inputs and runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="these rows only")
    parser.add_argument("--livesfm", type=Path, default=_LIVESFM, help="the program to measure")
    parser.add_argument("--baseline", type=Path, help="the program to compare with")
    parser.add_argument("--name", default="this", help="of the runs and figures; one a version")
    parser.add_argument("--keep", action="store_true", help="judge again the runs that are there")
    parser.add_argument("--show", action="store_true", help="only print the rows kept as --name")
    parser.add_argument("--beside", metavar="NAME", help="figures to show beside these")
    parser.add_argument("--seeds", type=int, default=5, help="overlays of each kind")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs for CPU ratios")
    parser.add_argument("--vary", type=int, metavar="SEED", help="draw other parameters")
    parser.add_argument("--prefix", default="", help="a command that starts each run, such as nice")
    parser.add_argument("--make", nargs=2, metavar=("ROW", "DIR"), help="make its inputs only")
    parser.add_argument("--score", nargs=2, metavar=("INPUT", "RUN"), help="score one run only")
    arguments = parser.parse_args(given)
    if not arguments.score and not (arguments.data and arguments.cases):
        parser.error("--data and --cases are needed")
    return arguments


if __name__ == "__main__":
    main()
