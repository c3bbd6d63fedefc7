#!/usr/bin/env python3
"""Runs thousands of keyframes through the whole engine and measures what grows with them.

    .venv/bin/python tools/soak.py --keyframes 3000 --work /tmp/soak
    .venv/bin/python tools/soak.py --keyframes 200 --work /tmp/soak     # the quick one
    .venv/bin/python tools/soak.py --work /tmp/soak --show              # figures of a former one

A clip is drawn of a flight in strips, back and forth, over ground that does not repeat, with roofs
at two heights; the strips overlap, so that the map grows and is joined to what was seen before. The
command line makes a map of it in a process of its own, whose memory, threads and open files
are read from ``/proc`` as keyframes are added. The caches are made small (``CACHES``), so that they
are full early.

Memory a keyframe is the slope of a robust line (Theil, Sen) through ``RssAnon`` after the caches
are full. Threads and open files have to be as many at the end as when the caches were full: the
least of the last third is not above the least of the first third. ``soak.png`` in the work folder
shows all of it. The exit code is 0 if memory grows by less than ``--max-mb`` a keyframe and the
others do not. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = (320, 240)  # px
FOCAL_PX = 190.0
RATE_HZ = 10.0
STEP_PX = 10.0  # of the ground between frames; about three frames become one keyframe
FRAMES_PER_KEYFRAME = 2.8
STRIP_PX = 110.0  # of the ground between strips
DEPTHS = (1.0, 0.88, 0.76)  # of the ground and of roofs, in units of the height
ROOF_CELL_PX = 40
MARGIN_PX = 400
CACHES = {
    "matching.max_descriptors_mb": 4,
    "views.memory_limit_mb": 32,
}
FIGURES = "samples.jsonl"


# -- the clip -------------------------------------------------------------------------------------


def flight(num_frames: int) -> NDArray[np.float64]:
    """Where the camera is over the ground, (N, 2) px: strips of one square, back and forth."""
    length = max(4 * STEP_PX, (num_frames * STEP_PX * STRIP_PX) ** 0.5)
    along = np.arange(num_frames) * STEP_PX
    turn = length + STRIP_PX
    strip, rest = np.divmod(along, turn)
    x = np.minimum(rest, length)
    x = np.where(strip % 2 == 0, x, length - x)
    y = strip * STRIP_PX + np.maximum(rest - length, 0.0)
    return np.column_stack([x, y])


class Ground:
    """Flat layers at several depths, each with a texture that does not repeat."""

    def __init__(self, positions: NDArray[np.float64], *, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._positions = positions
        self._layers = [
            (depth, *self._layer(rng, depth=depth, is_ground=depth == DEPTHS[0]))
            for depth in DEPTHS
        ]

    def draw(self, index: int) -> NDArray[np.uint8]:
        """The frame (H, W, 3) RGB from a position: exact for a pinhole camera that looks down."""
        import cv2

        image = np.zeros((SIZE[1], SIZE[0]), np.uint8)
        center = np.array([SIZE[0] / 2, SIZE[1] / 2]) - 0.5
        roll = 0.3 * np.sin(index / 37.0)
        rotation = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
        for depth, texture, mask in self._layers:
            origin = self._positions[index] / depth + MARGIN_PX
            matrix = np.column_stack([rotation, center - rotation @ origin])
            seen = cv2.warpAffine(texture, matrix, SIZE, flags=cv2.INTER_LINEAR)
            is_here = cv2.warpAffine(mask, matrix, SIZE, flags=cv2.INTER_LINEAR) > 127
            image[is_here] = seen[is_here]
        noise = np.random.default_rng((1, index)).normal(scale=1.5, size=image.shape)
        noisy = np.clip(np.round(image + noise), 0, 255).astype(np.uint8)
        return np.repeat(noisy[..., None], 3, axis=2)

    def _layer(
        self, rng: np.random.Generator, *, depth: float, is_ground: bool
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Texture and mask (H, W) of a layer, in px of the image."""
        import cv2

        width, height = (int(v) for v in self._positions.max(axis=0) / depth + 2 * MARGIN_PX)
        texture = np.zeros((height, width), np.float32)
        for cell, strength in ((4, 24.0), (9, 30.0), (25, 26.0)):
            coarse = rng.standard_normal((height // cell + 2, width // cell + 2), np.float32)
            texture += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        shape = (height // ROOF_CELL_PX + 1, width // ROOF_CELL_PX + 1)
        is_roof = (rng.random(shape) < 0.2).astype(np.uint8) * 255
        mask = cv2.resize(
            is_roof, (shape[1] * ROOF_CELL_PX, shape[0] * ROOF_CELL_PX), interpolation=0
        )[:height, :width]
        whole = np.full((height, width), 255, np.uint8) if is_ground else mask
        return np.clip(texture + 128, 0, 255).astype(np.uint8), np.asarray(whole, np.uint8)


def draw_clip(path: Path, *, num_frames: int, seed: int) -> None:
    """Writes the flight as H.264; of no other length is a clip that is there already."""
    import av

    length = path.with_suffix(".length")
    if path.exists() and length.exists() and length.read_text() == f"{num_frames} {seed}":
        return
    ground = Ground(flight(num_frames), seed=seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(RATE_HZ))
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "ultrafast"}
        for index in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ground.draw(index), "rgb24")))
        container.mux(stream.encode(None))
    length.write_text(f"{num_frames} {seed}")


# -- sampling -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A process at a moment."""

    at_s: float
    num_keyframes: int
    num_waiting: int  # frames that were received and are not settled
    rss_anon_mb: float
    rss_mb: float
    num_threads: int
    num_fds: int
    cpu_s: float  # user and system, since the process began


class Lines:
    """The lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_bytes = 0
        self._part = b""

    def new(self) -> list[bytes]:
        """Whole lines since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._num_bytes)
            read = file.read()
        self._num_bytes += len(read)
        *lines, self._part = (self._part + read).split(b"\n")
        return lines


class Progress:
    """How far a run is, by the files that it writes."""

    def __init__(self, run: Path) -> None:
        self._events = Lines(run / "events.jsonl")
        self._frames = Lines(run / "frames.csv")
        self._num_received = 0
        self._num_settled = -1  # the header
        self.num_keyframes = 0

    def update(self) -> None:
        """Reads what is new."""
        for line in self._events.new():
            event = json.loads(line)["event"]
            self.num_keyframes += event == "KeyframeAdded"
            self._num_received += event == "FrameReceived"
        self._num_settled += len(self._frames.new())

    @property
    def num_waiting(self) -> int:
        """Frames that were received and are neither keyframes nor tracked nor dropped."""
        return max(0, self._num_received - max(0, self._num_settled))


def sample_of(pid: int, *, at_s: float, progress: Progress) -> Sample | None:
    """What ``/proc`` says of a process; None: it has ended."""
    folder = Path("/proc") / str(pid)
    try:
        lines = (folder / "status").read_text().splitlines()
        ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        num_fds = len(list((folder / "fd").iterdir()))
    except OSError:
        return None
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    if "RssAnon" not in status:  # it has ended, and nobody has waited for it
        return None
    return Sample(
        at_s=at_s,
        num_keyframes=progress.num_keyframes,
        num_waiting=progress.num_waiting,
        rss_anon_mb=int(status["RssAnon"][0]) / 1024,
        rss_mb=int(status["VmRSS"][0]) / 1024,
        num_threads=int(status["Threads"][0]),
        num_fds=num_fds,
        cpu_s=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    )


def watch(process: subprocess.Popen[bytes], run: Path, *, every: int) -> Iterator[Sample]:
    """Samples a run each time that so many keyframes were added, until it ends."""
    progress = Progress(run)
    began_s, due = time.monotonic(), 1
    while process.poll() is None:
        progress.update()
        if progress.num_keyframes >= due:
            at_s = round(time.monotonic() - began_s, 2)
            sample = sample_of(process.pid, at_s=at_s, progress=progress)
            if sample is not None:
                yield sample
            due = progress.num_keyframes + every
        time.sleep(0.2)


# -- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the samples say."""

    num_keyframes: int
    first_keyframe: int  # of the line
    mb_per_keyframe: float
    rss_mb_per_keyframe: float
    at_start_mb: float  # where the line begins
    at_end_mb: float
    fds: tuple[int, int]  # least and most since the line begins
    threads: tuple[int, int]
    most_waiting: int
    more_fds: int  # of the least: last third over first third
    more_threads: int
    cpu_ms_per_keyframe: tuple[float, float]  # of the first and of the last tenth of the samples


def line_through(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and value at 0 of the line with the median slope (Theil 1950, Sen 1968)."""
    first, second = np.triu_indices(len(x), 1)
    run = x[second] - x[first]
    slopes = (y[second] - y[first])[run > 0] / run[run > 0]
    slope = float(np.median(slopes))
    return slope, float(np.median(y - slope * x))


def figures_of(samples: Sequence[Sample], *, first_keyframe: int) -> Figures:
    """The figures of a run, from a keyframe on.

    Raises:
        ValueError: fewer than six samples since then.
    """
    used = [sample for sample in samples if sample.num_keyframes >= first_keyframe]
    if len(used) < 6:
        raise ValueError(f"{len(used)} samples after keyframe {first_keyframe}; 6 are needed")
    x, anon, rss, fds, threads, waiting = (
        np.array([getattr(sample, name) for sample in used])
        for name in (
            "num_keyframes",
            "rss_anon_mb",
            "rss_mb",
            "num_fds",
            "num_threads",
            "num_waiting",
        )
    )
    slope, at_zero = line_through(x, anon)
    third, tenth = len(used) // 3, len(used) // 10 + 2
    return Figures(
        num_keyframes=int(x[-1]),
        first_keyframe=int(x[0]),
        mb_per_keyframe=slope,
        rss_mb_per_keyframe=line_through(x, rss)[0],
        at_start_mb=float(at_zero + slope * x[0]),
        at_end_mb=float(at_zero + slope * x[-1]),
        fds=(int(fds.min()), int(fds.max())),
        threads=(int(threads.min()), int(threads.max())),
        most_waiting=int(waiting.max()),
        more_fds=int(fds[-third:].min() - fds[:third].min()),
        more_threads=int(threads[-third:].min() - threads[:third].min()),
        cpu_ms_per_keyframe=(_cpu_ms(used[:tenth]), _cpu_ms(used[-tenth:])),
    )


def _cpu_ms(samples: Sequence[Sample]) -> float:
    """CPU milliseconds a keyframe between the first and the last sample."""
    first, last = samples[0], samples[-1]
    num = max(1, last.num_keyframes - first.num_keyframes)
    return 1e3 * (last.cpu_s - first.cpu_s) / num


def report(figures: Figures, *, max_mb: float) -> tuple[bool, list[str]]:
    """Whether the bars are kept, and lines that say so."""
    checks = {
        f"memory grows by {figures.mb_per_keyframe:.3f} MB a keyframe, from"
        f" {figures.at_start_mb:.0f} to {figures.at_end_mb:.0f} MB"
        f" (resident in all {figures.rss_mb_per_keyframe:.3f})": figures.mb_per_keyframe < max_mb,
        f"open files {figures.fds[0]} to {figures.fds[1]}, in the end"
        f" {figures.more_fds:+d}": figures.more_fds <= 0,
        f"threads {figures.threads[0]} to {figures.threads[1]}, in the end"
        f" {figures.more_threads:+d}": figures.more_threads <= 0,
    }
    lines = [f"keyframes {figures.first_keyframe} to {figures.num_keyframes}"]
    lines += [f"{'yes' if is_so else 'NO '}  {what}" for what, is_so in checks.items()]
    lines.append(f"frames that waited: {figures.most_waiting} at most")
    first_ms, last_ms = figures.cpu_ms_per_keyframe
    lines.append(
        f"CPU a keyframe: {first_ms:.0f} ms in the first tenth, {last_ms:.0f} ms in the last"
    )
    return all(checks.values()), lines


# -- the plot -------------------------------------------------------------------------------------

_PLOT_SIZE = (900, 420)
_PANELS = ((70, 20, 830, 250), (70, 300, 830, 390))  # left, top, right, bottom, px
_INK, _PALE = (60, 60, 60), (215, 215, 215)
_BLUE, _ORANGE, _GREEN = (31, 119, 180), (230, 120, 20), (44, 140, 60)  # RGB


def plot(samples: Sequence[Sample], figures: Figures) -> NDArray[np.uint8]:
    """Memory with its line, and threads and open files, over keyframes: (H, W, 3) RGB."""
    image = np.full((_PLOT_SIZE[1], _PLOT_SIZE[0], 3), 255, np.uint8)
    x = np.array([sample.num_keyframes for sample in samples])
    anon = np.array([sample.rss_anon_mb for sample in samples])
    memory = _Panel(image, _PANELS[0], x_max=x.max(), y_max=1.1 * anon.max())
    memory.curve(x, anon, _BLUE)
    line_x = np.array([figures.first_keyframe, figures.num_keyframes])
    memory.curve(line_x, np.array([figures.at_start_mb, figures.at_end_mb]), _ORANGE)
    memory.text(f"RssAnon, MB: {figures.mb_per_keyframe:.3f} MB a keyframe", row=0, color=_BLUE)
    fds = np.array([sample.num_fds for sample in samples])
    threads = np.array([sample.num_threads for sample in samples])
    counts = _Panel(image, _PANELS[1], x_max=x.max(), y_max=1.6 * max(fds.max(), threads.max()))
    counts.curve(x, fds, _GREEN)
    counts.curve(x, threads, _ORANGE)
    counts.text("open files", row=0, color=_GREEN)
    counts.text("threads", row=1, color=_ORANGE)
    return image


class _Panel:
    """Axes from 0 in a part of an image."""

    def __init__(
        self,
        image: NDArray[np.uint8],
        box: tuple[int, int, int, int],
        *,
        x_max: float,
        y_max: float,
    ) -> None:
        self._image = image
        self._box = box
        self._max = np.array([x_max, y_max], dtype=np.float64)
        self._grid()

    def curve(self, x: NDArray[Any], y: NDArray[Any], color: tuple[int, int, int]) -> None:
        import cv2

        points = np.round(self._places(x, y) * 8).astype(np.int32)
        cv2.polylines(self._image, [points], False, color, 2, cv2.LINE_AA, 3)

    def text(self, text: str, *, row: int, color: tuple[int, int, int]) -> None:
        left, top = self._box[:2]
        self._write(text, (left + 8, top + 16 + 16 * row), color)

    def _grid(self) -> None:
        import cv2

        left, _, right, bottom = self._box
        for value in _ticks(self._max[1], 4):
            y = int(self._places(np.array([0.0]), np.array([value]))[0, 1])
            cv2.line(self._image, (left, y), (right, y), _PALE, 1)
            self._write(f"{value:g}", (left - 50, y + 4), _INK)
        for value in _ticks(self._max[0], 8):
            x = int(self._places(np.array([value]), np.array([0.0]))[0, 0])
            cv2.line(self._image, (x, bottom), (x, bottom + 4), _INK, 1)
            self._write(f"{value:g}", (x - 12, bottom + 18), _INK)
        cv2.line(self._image, (left, bottom), (right, bottom), _INK, 1)

    def _places(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
        left, top, right, bottom = self._box
        share = np.column_stack([x, y]) / self._max
        return np.array([left, bottom]) + share * (right - left, top - bottom)

    def _write(self, text: str, at: tuple[int, int], color: tuple[int, int, int]) -> None:
        import cv2

        cv2.putText(self._image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, color, 1, cv2.LINE_AA)


def _ticks(largest: float, about: int) -> NDArray[np.float64]:
    """Round values from 0 to the largest."""
    rough = largest / about
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    return np.arange(0.0, largest + 1e-9, step)


# -- the whole ------------------------------------------------------------------------------------


def command(arguments: argparse.Namespace, clip: Path, run: Path) -> list[str]:
    """The run's command line."""
    given = {
        **CACHES,
        "sift.max_features_in_video": arguments.features,
        "cameras.model": "PINHOLE",
        "cameras.params": f"[{FOCAL_PX},{FOCAL_PX},{SIZE[0] / 2},{SIZE[1] / 2}]",
    }
    settings = [f"{key}={value}" for key, value in given.items()] + arguments.set
    parts = [str(Path(sys.executable).with_name("livesfm")), "run", str(clip), "--out", str(run)]
    parts += ["--view", arguments.view, "--quiet"]
    return parts + [part for setting in settings for part in ("--set", setting)]


def soak(arguments: argparse.Namespace) -> None:
    """Draws the clip, runs it and writes the samples."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    clip, run = work / "clip.mp4", work / "run"
    num_frames = round(FRAMES_PER_KEYFRAME * arguments.keyframes)
    draw_clip(clip, num_frames=num_frames, seed=arguments.seed)
    shutil.rmtree(run, ignore_errors=True)
    with (work / "run.log").open("wb") as log:
        process = subprocess.Popen(command(arguments, clip, run), stdout=log, stderr=log)
    try:
        with (work / FIGURES).open("w", buffering=1) as file:
            for sample in watch(process, run, every=arguments.every):
                file.write(json.dumps(asdict(sample)) + "\n")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    print(f"the run ended with exit code {process.returncode}")


def read_samples(path: Path) -> list[Sample]:
    """The samples of a former run."""
    names = {field.name for field in fields(Sample)}
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [Sample(**{name: row[name] for name in names}) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures; 0 if the bars are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keyframes", type=int, default=3000, help="about how many")
    parser.add_argument("--every", type=int, default=5, help="keyframes between two samples")
    parser.add_argument("--features", type=int, default=1000, help="keypoints a keyframe, at most")
    parser.add_argument("--warm-up", type=int, help="keyframes until caches are full; a third")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="section.key=value of the run")
    parser.add_argument("--view", default="none", choices=("none", "record", "serve"))
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    parser.add_argument("--max-mb", type=float, default=0.15, help="a keyframe")
    parser.add_argument("--show", action="store_true", help="figures of the run that is there")
    arguments = parser.parse_args(argv)
    work: Path = arguments.work
    if not arguments.show:
        former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run, too
        try:
            soak(arguments)
        finally:
            signal.signal(signal.SIGTERM, former)
    samples = read_samples(work / FIGURES)
    warm_up = arguments.warm_up
    if warm_up is None:
        warm_up = samples[-1].num_keyframes // 3 if samples else 0
    figures = figures_of(samples, first_keyframe=warm_up)
    import cv2

    cv2.imwrite(str(work / "soak.png"), plot(samples, figures)[..., ::-1])
    is_kept, lines = report(figures, max_mb=arguments.max_mb)
    print(*lines, sep="\n")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
