"""The soak: its clip, what it reads of a process, and what it says of samples."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.support.paths import TOOLS

TOOL = TOOLS / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def samples_of(
    soak: ModuleType, *, mb_per_keyframe: float, fds_per_keyframe: float = 0.0
) -> list[Any]:
    """A run of 600 keyframes whose memory has noise, and jumps now and then."""
    rng = np.random.default_rng(0)
    return [
        soak.Sample(
            at_s=0.1 * number,
            num_keyframes=number,
            num_waiting=int(rng.integers(0, 20)),
            rss_anon_mb=200 + mb_per_keyframe * number + rng.normal() + 80 * (number % 90 == 0),
            rss_mb=320 + mb_per_keyframe * number,
            num_threads=14 + int(rng.integers(0, 3)),
            num_fds=22 + int(rng.integers(0, 2)) + int(fds_per_keyframe * number),
            cpu_s=0.1 * number + 1e-4 * number * number,
        )
        for number in range(5, 605, 5)
    ]


def test_growth_is_found_in_spite_of_noise_and_jumps(soak: ModuleType) -> None:
    figures = soak.figures_of(samples_of(soak, mb_per_keyframe=0.2), first_keyframe=200)
    assert figures.mb_per_keyframe == pytest.approx(0.2, abs=0.01)
    is_kept, lines = soak.report(figures, max_mb=0.15)
    assert not is_kept
    assert sum(line.startswith("NO") for line in lines) == 1
    # From keyframe 200 on, tenths of 40 keyframes: 0.1 s and twice their middle's 1e-4 s.
    first_ms, last_ms = figures.cpu_ms_per_keyframe
    assert 140 < first_ms < 150
    assert 215 < last_ms < 220


def test_memory_that_stays_and_counts_that_go_up_and_down_are_good(soak: ModuleType) -> None:
    figures = soak.figures_of(samples_of(soak, mb_per_keyframe=0.02), first_keyframe=200)
    assert figures.mb_per_keyframe == pytest.approx(0.02, abs=0.01)
    assert figures.threads == (14, 16)
    is_kept, _ = soak.report(figures, max_mb=0.15)
    assert is_kept


def test_files_that_are_never_closed_are_found(soak: ModuleType) -> None:
    samples = samples_of(soak, mb_per_keyframe=0.02, fds_per_keyframe=0.01)
    figures = soak.figures_of(samples, first_keyframe=200)
    assert figures.more_fds >= 2
    is_kept, _ = soak.report(figures, max_mb=0.15)
    assert not is_kept


def test_a_run_that_is_too_short_has_no_figures(soak: ModuleType) -> None:
    with pytest.raises(ValueError, match="6 are needed"):
        soak.figures_of(samples_of(soak, mb_per_keyframe=0.1), first_keyframe=590)


def test_the_plot_shows_memory_and_its_line(soak: ModuleType) -> None:
    samples = samples_of(soak, mb_per_keyframe=0.2)
    image = soak.plot(samples, soak.figures_of(samples, first_keyframe=200))
    colors = {tuple(color) for color in image.reshape(-1, 3).tolist()}
    assert {soak._BLUE, soak._ORANGE, soak._GREEN} <= colors


def test_what_a_process_uses_is_read(soak: ModuleType, tmp_path: Path) -> None:
    progress = soak.Progress(tmp_path)
    sample = soak.sample_of(os.getpid(), at_s=0.0, progress=progress)
    assert 1 < sample.rss_anon_mb < sample.rss_mb
    assert sample.num_threads >= 1
    with (tmp_path / "open").open("w"):
        more = soak.sample_of(os.getpid(), at_s=0.0, progress=progress)
    assert more.num_fds == sample.num_fds + 1


def test_progress_is_counted_while_files_grow(soak: ModuleType, tmp_path: Path) -> None:
    progress = soak.Progress(tmp_path)
    progress.update()
    assert (progress.num_keyframes, progress.num_waiting) == (0, 0)
    lines = [json.dumps({"event": name}) + "\n" for name in ("FrameReceived",) * 3]
    added = json.dumps({"event": "KeyframeAdded"}) + "\n"
    with (tmp_path / "events.jsonl").open("w") as events:
        events.write("".join(lines) + added[:5])
        events.flush()
        (tmp_path / "frames.csv").write_text("header\n1,a,0,0.jpg,0,keyframe,,\n")
        progress.update()
        assert (progress.num_keyframes, progress.num_waiting) == (0, 2)
        events.write(added[5:])
    progress.update()
    assert (progress.num_keyframes, progress.num_waiting) == (1, 2)


def test_the_flight_covers_a_square_in_even_steps(soak: ModuleType) -> None:
    positions = soak.flight(900)
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    assert steps.max() <= soak.STEP_PX + 1e-9
    assert np.median(steps) == pytest.approx(soak.STEP_PX)
    width, height = np.ptp(positions, axis=0)
    assert 0.6 < width / height < 1.6


def test_frames_are_the_same_every_time_and_differ_along_the_flight(soak: ModuleType) -> None:
    positions = soak.flight(40)
    first, again = (soak.Ground(positions, seed=3).draw(20) for _ in range(2))
    assert np.array_equal(first, again)
    other = soak.Ground(positions, seed=3).draw(21)
    assert np.abs(first.astype(int) - other).mean() > 5


@pytest.mark.slow
def test_a_short_run_gives_figures(soak: ModuleType, tmp_path: Path) -> None:
    arguments = ["--keyframes", "24", "--every", "1", "--work", str(tmp_path)]
    former = signal.getsignal(signal.SIGTERM)
    soak.main([*arguments, "--features", "300", "--max-mb", "10"])
    assert signal.getsignal(signal.SIGTERM) is former
    samples = soak.read_samples(tmp_path / soak.FIGURES)
    assert 15 <= samples[-1].num_keyframes <= 40
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["registered_keyframes"] == summary["keyframes"]
    assert (tmp_path / "soak.png").stat().st_size > 1000
