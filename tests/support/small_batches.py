"""Batches of small datasets by the real command, in a process of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from adapters.town.source import SyntheticTown, TownOptions
from engine.types import FrameId
from tests.support.paths import ROOT

NUM_PHOTOS = 4
_QUICK = ("dense.enabled=false", "report.enabled=false", "window.enabled=false")


def write_datasets(folder: Path) -> tuple[Path, Path]:
    """Two folders of photos: ``good``, overlapping ones, and ``broken``, none that can be read."""
    ids = itertools.count(1)
    options = TownOptions(path="lawnmower", num_frames=60, width=320, height=240)
    town = SyntheticTown(options, next_frame_id=lambda: FrameId(next(ids)))
    good, broken = folder / "good", folder / "broken"
    good.mkdir()
    for number in range(NUM_PHOTOS):
        assert cv2.imwrite(str(good / f"{number}.jpg"), town.render(number).pixels[:, :, ::-1])
    broken.mkdir()
    (broken / "0.jpg").write_text("no picture")
    return good, broken


def batch_command(*datasets: Path, out: Path, settings: Sequence[str] = ()) -> list[str]:
    """The command that makes a run of each."""
    given = [f"--set={one}" for one in (*_QUICK, *settings)]
    names = [str(one) for one in datasets]
    return [sys.executable, "-m", "adapters.cli", "batch", *names, "--out", str(out), *given]


def batch(
    *datasets: Path, out: Path, settings: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Makes a run of each; returns how that ended, with all that was written."""
    return subprocess.run(
        batch_command(*datasets, out=out, settings=settings),
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """The cells of its table, by dataset."""
    lines = [line.strip("\u2502 ") for line in done.stdout.splitlines() if "\u2502" in line]
    cells = [[cell.strip() for cell in line.split("\u2502")] for line in lines]
    return {name: others for name, *others in cells if name}
