#!/usr/bin/env python3
"""Replays several feeds at once, a run each, and measures how fairly a cluster serves them.

    .venv/bin/python tools/fleet.py walk.mp4 site.mp4 --work /tmp/fleet --set remote.address=auto
    .venv/bin/python tools/fleet.py synthetic:town --copies 4 --alone --work /tmp/fleet

Each feed is a `livesfm run` in a process of its own; all begin at once. With --alone each is run by
itself before. The table has keyframes, keyframes a minute (from the first to the last that was
added), ATE in percent of the extent where the true poses are known, and what the cluster did; below
it the slowest rate over the fastest. ``fleet.json`` in the work folder holds the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs all feeds and prints the table."""
    arguments = _arguments()
    feeds = [source for source in arguments.source for _ in range(arguments.copies)]
    names = [f"feed{number}" for number in range(1, len(feeds) + 1)]
    rows = []
    if arguments.alone:
        for name, source in zip(names, feeds, strict=True):
            folder = arguments.work / f"{name}_alone"
            start(source, folder, arguments).wait()
            rows.append(figures(folder, f"{name}, alone"))
    folders = [arguments.work / name for name in names]
    runs = [start(*one, arguments) for one in zip(feeds, folders, strict=True)]
    for run in runs:
        run.wait()
    together = [figures(*one) for one in zip(folders, names, strict=True)]
    rows += together
    rates = [row["keyframes_per_minute"] for row in together]
    fairness = min(rates) / max(rates) if all(rates) else 0.0
    print("| feed | keyframes | a minute | ATE % | matched there | here | MB sent | times away |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{one:.3g}" if isinstance(one, float) else str(one) for one in row.values()]
        print("| " + " | ".join(cells) + " |")
    print(f"slowest over fastest: {fairness:.2f}")
    report = {"feeds": rows, "slowest_over_fastest": fairness}
    (arguments.work / "fleet.json").write_text(json.dumps(report, indent=1))


def start(source: str, folder: Path, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Starts the run of a feed."""
    settings = [f"--set={one}" for one in arguments.set]
    command = ["run", source, "--out", str(folder), "--view", "none", "--quiet", "--overwrite"]
    presets = [f"--config={one}" for one in arguments.config]
    arguments.work.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "adapters.cli", *command, *presets, *settings],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def figures(folder: Path, name: str) -> dict[str, Any]:
    """What a run says of itself."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
    except OSError:
        summary = {}
    remote = summary.get("remote") or {}
    return {
        "feed": name,
        "keyframes": summary.get("registered_keyframes", 0),
        "keyframes_per_minute": rate(folder),
        "ate_percent": accuracy(folder),
        "matched_there": remote.get("matched_there", 0),
        "matched_here": remote.get("matched_here", 0),
        "mb_sent": sum(remote.get("bytes_sent", {}).values()) / 1e6,
        "times_away": remote.get("times_away", 0),
    }


def rate(folder: Path) -> float:
    """Keyframes a minute, from the first to the last that was added."""
    times = [event["at_s"] for event in events(folder) if event["event"] == "KeyframeAdded"]
    return 60.0 * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run."""
    try:
        lines = (folder / "events.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def accuracy(folder: Path) -> float | str:
    """ATE in percent of the extent; "-" where the true poses are not known."""
    reference = folder / "groundtruth.txt"
    if not reference.exists():
        return "-"
    final = evaluate(folder, reference).final
    if final is None or final.absolute is None:
        return "-"
    return final.absolute.rmse_percent_of_extent


def _arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", nargs="+", metavar="SOURCE")
    parser.add_argument("--copies", type=int, default=1, help="feeds of each source")
    parser.add_argument("--alone", action="store_true", help="each by itself first, too")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--config", action="append", default=[], help="preset of all runs")
    parser.add_argument("--set", action="append", default=[], help="setting of all runs")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
