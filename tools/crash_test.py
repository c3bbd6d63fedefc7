#!/usr/bin/env python3
"""Kills runs at random moments, resumes them, and checks that nothing was lost.

    .venv/bin/python tools/crash_test.py --kills 60 --work /tmp/crash
    .venv/bin/python tools/crash_test.py --kills 6 --case town       # the quick one
    .venv/bin/python tools/crash_test.py --case fox --fox FOLDER     # images/ and groundtruth.txt

A case is run once without interruption. Then runs of it are killed with SIGKILL and resumed, also
killed while they resume, until they end by themselves. A moment to kill at is a random length of
events.jsonl, or the moment at which a snapshot is being written, an adjustment was merged or a loop
was closed; the seed says which. After each kill and each end it is checked that

- the database is sound, and the latest snapshot a whole model with all its images;
- no keyframe that the journal held before is missing, nor its image;
- no frame is there twice, and of a file none is missing in the end;
- the run ends by itself, and its error against the truth is not much larger than without kills.

The live case pushes frames of the town by RTMP at a steady rate; those that come while nobody
listens are lost, as a drone's are. Each bears its number in its top edge, by which its true place
is known. FFmpeg must be installed for it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zlib  # noqa: F401 - before pycolmap, which brings its own
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pycolmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters.evaluate import absolute_error, read_tum
from engine.geometry import camera_center

TIMEOUT_S = 900.0
POLL_S = 0.003
MAX_KILLS_OF_A_RUN = 4
MIN_ERROR_PERCENT = 0.02  # of the extent; what is below is as good as this
WORSE_RATIO = 1.10
KINDS = ("moment", "moment", "snapshot", "adjustment", "restoring")
LOOP_KINDS = ("loop", "loop", "snapshot", "adjustment", "restoring")
EVENT_OF_KIND = {"adjustment": b'"BundleAdjusted"', "loop": b'"LoopClosed"'}

NUM_LIVE_FRAMES, LIVE_RATE_HZ = 120, 4.0
NUM_BITS, BIT_HEIGHT_PX = 10, 8  # of the number in a live frame's top edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run."""

    name: str
    source: str
    arguments: tuple[str, ...]
    num_frames: int | None  # of a file; None: live
    truth: Path | None  # TUM, by index; None: by the number in the frame's top edge
    path: str = "flight"  # of the town
    kinds: tuple[str, ...] = KINDS  # of moments to kill at


@dataclass(slots=True, kw_only=True)
class Trial:
    """A run that was killed and resumed until it ended."""

    kinds: list[str] = field(default_factory=list)
    num_keyframes: int = 0
    num_registered: int = 0
    num_again: int = 0
    error_percent: float | None = None
    faults: list[str] = field(default_factory=list)


# -- running and killing --------------------------------------------------------------------------


def command(case: Case, run: Path, *, is_new: bool) -> list[str]:
    """The command line that begins a run or goes on with it."""
    livesfm = str(Path(sys.executable).with_name("livesfm"))
    if not is_new:
        return [livesfm, "resume", str(run), "--quiet", "--view", "none"]
    where = ["--out", str(run), "--quiet", "--view", "none"]
    return [livesfm, "run", case.source, *case.arguments, *where]


def run_to_end(case: Case, run: Path, *, is_new: bool) -> tuple[int, str]:
    """Exit code and what was printed."""
    done = subprocess.run(
        command(case, run, is_new=is_new),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def run_and_kill(
    case: Case, run: Path, *, is_new: bool, kind: str, num_bytes: int, rng: random.Random
) -> tuple[bool, int, str]:
    """Whether it was killed, else its exit code, and what it printed."""
    with subprocess.Popen(
        command(case, run, is_new=is_new),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        is_due = killing_moment(run, kind=kind, num_bytes=num_bytes, rng=rng)
        ends_at_s = time.monotonic() + TIMEOUT_S
        while process.poll() is None:
            if next(is_due) or time.monotonic() > ends_at_s:
                process.kill()
                process.wait()
                return True, process.returncode, ""
            time.sleep(POLL_S)
        printed = process.stdout.read() if process.stdout else ""
        return False, process.returncode, printed


def killing_moment(run: Path, *, kind: str, num_bytes: int, rng: random.Random) -> Iterator[bool]:
    """At each call whether the moment to kill has come."""
    events, snapshots = run / "events.jsonl", run / "snapshots"
    began = size_of(events)
    if kind == "restoring":
        due_at_s = time.monotonic() + rng.uniform(0.3, 3.0)
        while True:
            yield time.monotonic() >= due_at_s
    if kind == "snapshot":
        num_before = rng.randrange(1, 4)
        known = {entry.name for entry in snapshots.iterdir()} if snapshots.is_dir() else set()
        while True:
            names = {one.name for one in snapshots.iterdir()} if snapshots.is_dir() else set()
            new = names - known
            is_writing = any(name.startswith(".tmp-") for name in new)
            yield is_writing and len(new) >= num_before
    if kind in EVENT_OF_KIND:
        wanted = 1 if kind == "loop" else rng.randrange(1, 4)
        while True:
            yield size_of(events) > began and count_after(events, began, kind) >= wanted
    due_bytes = began + rng.randrange(0, max(num_bytes - began, num_bytes // 4))
    while True:
        yield size_of(events) >= max(due_bytes, 1)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def count_after(events: Path, position: int, kind: str) -> int:
    """How many events of a kind stand behind a position."""
    with events.open("rb") as file:
        file.seek(position)
        return file.read().count(EVENT_OF_KIND[kind])


# -- what is checked ------------------------------------------------------------------------------


def keyframes_of(run: Path) -> dict[int, str]:
    """The keyframes that the journal holds: names by id."""
    if not (run / "database.db").exists():
        return {}
    with closing(sqlite3.connect(run / "database.db")) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "images" not in tables:
            return {}
        return dict(connection.execute("SELECT image_id, name FROM images"))


def faults_of_folder(run: Path, *, before: dict[int, str]) -> list[str]:
    """What is wrong in a run folder after a kill or at the end."""
    faults = []
    if (run / "database.db").exists():
        with closing(sqlite3.connect(run / "database.db")) as connection:
            (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            faults.append(f"database: {verdict}")
    keyframes = keyframes_of(run)
    missing = [name for frame_id, name in before.items() if keyframes.get(frame_id) != name]
    if missing:
        faults.append(f"{len(missing)} keyframes of before are missing: {missing[:3]}")
    faults += [
        f"{name}: no image" for name in keyframes.values() if not size_of(run / "images" / name)
    ]
    twice = [name for name, count in Counter(keyframes.values()).items() if count > 1]
    if twice:
        faults.append(f"keyframes twice: {twice[:3]}")
    return faults + faults_of_latest(run, names=set(keyframes.values()))


def faults_of_latest(run: Path, *, names: set[str]) -> list[str]:
    """What is wrong with the latest snapshot, if there is one."""
    latest = run / "latest"
    if not latest.is_symlink():
        return []
    faults = []
    for model in sorted((latest / "sparse").iterdir()):
        try:
            reconstruction = pycolmap.Reconstruction(str(model))
        except Exception as error:  # a broken file of a model: pycolmap raises many kinds
            faults.append(f"latest/{model.name}: {error}")
            continue
        for image in reconstruction.images.values():
            if image.name not in names or not size_of(latest / "images" / image.name):
                faults.append(f"latest/{model.name}: {image.name} is not in the journal")
    return faults


def faults_of_frames(run: Path, case: Case) -> list[str]:
    """What is wrong with frames.csv at the end."""
    rows = frame_rows(run)
    faults = []
    seen = Counter((row["source"], row["index"]) for row in rows)
    if twice := [key for key, count in seen.items() if count > 1]:
        faults.append(f"frames twice: {twice[:3]}")
    if case.num_frames is not None and len(seen) != case.num_frames:
        faults.append(f"{len(seen)} of {case.num_frames} frames in frames.csv")
    keyframes = {row["name"] for row in rows if row["status"] == "keyframe"}
    if keyframes != set(keyframes_of(run).values()):
        faults.append("frames.csv and the journal have different keyframes")
    stopped = [row["name"] for row in rows if row["status"] == "dropped:stopped"]
    if case.num_frames is not None and stopped:
        faults.append(f"stopped and never read: {stopped[:3]}")
    return faults


def frame_rows(run: Path) -> list[dict[str, str]]:
    """The rows of frames.csv."""
    with (run / "frames.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def error_percent(run: Path, case: Case, truth: dict[int, np.ndarray]) -> tuple[float | None, int]:
    """ATE of the keyframes in the map in percent of the extent, and how many those are."""
    model = run / "latest" / "sparse" / "0"
    if not model.is_dir():
        return None, 0
    reconstruction = pycolmap.Reconstruction(str(model))
    index_of = {row["name"]: int(row["index"]) for row in frame_rows(run)}
    estimated, reference = [], []
    for image_id in reconstruction.reg_image_ids():
        image = reconstruction.image(image_id)
        index = index_of.get(image.name, -1)
        if case.truth is None:
            index = number_in(run / "images" / image.name)
        if index in truth:
            estimated.append(image.projection_center())
            reference.append(truth[index])
    if len(estimated) < 3:
        return None, reconstruction.num_reg_images()
    error = absolute_error(np.array(estimated), np.array(reference))
    percent = None if error is None else error.rmse_percent_of_extent
    return percent, reconstruction.num_reg_images()


# -- the live case --------------------------------------------------------------------------------


def stamped(pixels: np.ndarray, number: int) -> np.ndarray:
    """An image with a number in its top edge, black and white fields for its bits."""
    pixels = pixels.copy()
    width = pixels.shape[1] // NUM_BITS
    for bit in range(NUM_BITS):
        level = 255 if number >> bit & 1 else 0
        pixels[:BIT_HEIGHT_PX, bit * width : (bit + 1) * width] = level
    return pixels


def number_in(path: Path) -> int:
    """The number in an image's top edge; -1 where the image cannot be read."""
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        return -1
    width = image.shape[1] // NUM_BITS
    fields = (
        image[1 : BIT_HEIGHT_PX - 2, bit * width + 4 : (bit + 1) * width - 4].mean()
        for bit in range(NUM_BITS)
    )
    return sum(1 << bit for bit, level in enumerate(fields) if level > 127)


def make_live_video(path: Path) -> None:
    """Frames of the town with their numbers, as a video whose every frame stands alone."""
    import av

    from adapters.launch import count_frame_ids
    from adapters.town.source import SyntheticTown, parse_town_spec

    options = parse_town_spec(f"synthetic:town?frames={NUM_LIVE_FRAMES}")
    town = SyntheticTown(options, next_frame_id=count_frame_ids())
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(LIVE_RATE_HZ))
        stream.width, stream.height, stream.pix_fmt = options.width, options.height, "yuv420p"
        stream.options = {"crf": "16", "g": "1", "tune": "zerolatency"}
        for index in range(NUM_LIVE_FRAMES):
            pixels = stamped(town.render(index).pixels, index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def town_truth(num_frames: int, *, path: str) -> dict[int, np.ndarray]:
    """True camera centres by index."""
    from adapters.launch import count_frame_ids
    from adapters.town.source import SyntheticTown, parse_town_spec

    options = parse_town_spec(f"synthetic:town?frames={num_frames}&path={path}")
    town = SyntheticTown(options, next_frame_id=count_frame_ids())
    return {index: camera_center(pose) for index, (_, pose) in enumerate(town.ground_truth())}


@contextmanager
def pushing(case: Case, work: Path) -> Iterator[None]:
    """Pushes the live video while the context is open, from where time has got to."""
    if case.num_frames is not None:
        yield
        return
    script = (
        "import subprocess, sys, time\n"
        "video, url, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])\n"
        "began = None\n"
        "while began is None or time.monotonic() < began + seconds:\n"
        "    skipped = 0.0 if began is None else time.monotonic() - began\n"
        "    tried = time.monotonic()\n"
        "    done = subprocess.run(['ffmpeg', '-loglevel', 'quiet', '-re', '-ss', str(skipped),\n"
        "        '-i', video, '-c', 'copy', '-f', 'flv', url])\n"
        "    if began is None and time.monotonic() > tried + 1.0:\n"
        "        began = tried\n"
        "    time.sleep(0.2)\n"
    )
    seconds = NUM_LIVE_FRAMES / LIVE_RATE_HZ
    url = case.source.partition("?")[0]
    pusher = subprocess.Popen(
        [sys.executable, "-c", script, str(work / "live.mp4"), url, str(seconds)],
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(pusher.pid, signal.SIGKILL)  # FFmpeg is a child of its own
        pusher.wait()


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# -- the test -------------------------------------------------------------------------------------


def make_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    small = ("--set", "sift.max_features_in_video=1500", "--set", "snapshots.every_keyframes=4")
    loops = ("--set", "global_bundle_adjustment.synchronous_until=8")
    cases = []
    if "town" in arguments.case:
        source = f"synthetic:town?frames={arguments.town_frames}"
        cases.append(
            Case(
                name="town",
                source=source,
                arguments=("--config", "drone_video", *small, *loops),
                num_frames=arguments.town_frames,
                truth=Path(),
            )
        )
    if "orbit" in arguments.case:  # comes back to where it began
        cases.append(
            Case(
                name="orbit",
                source=f"synthetic:town?frames={arguments.town_frames}&path=orbit",
                arguments=("--config", "drone_video", *small, *loops),
                num_frames=arguments.town_frames,
                truth=Path(),
                path="orbit",
                kinds=LOOP_KINDS,
            )
        )
    if "fox" in arguments.case:
        if arguments.fox is None:
            raise SystemExit("--case fox needs --fox FOLDER with images/ and groundtruth.txt")
        images = sorted((arguments.fox / "images").iterdir())
        features = ("--set", "sift.max_features=2000", "--set", "snapshots.every_keyframes=4")
        cases.append(
            Case(
                name="fox",
                source=str(arguments.fox / "images"),
                arguments=("--config", "phone", *features, *loops),
                num_frames=len(images),
                truth=arguments.fox / "groundtruth.txt",
            )
        )
    if "rtmp" in arguments.case:
        cases.append(
            Case(
                name="rtmp",
                source=f"rtmp://127.0.0.1:{free_port()}/live?listen=1",
                arguments=(
                    "--config",
                    "drone_video",
                    *small,
                    *loops,
                    "--set",
                    "live_sources.give_up_after_s=12",
                ),
                num_frames=None,
                truth=None,
            )
        )
    return cases


def truth_of(case: Case) -> dict[int, np.ndarray]:
    """True camera centres by index."""
    if case.name == "fox" and case.truth is not None:
        poses = read_tum(case.truth)
        return {
            round(float(at_s)): camera_center(pose)
            for at_s, pose in zip(poses.timestamps_s, poses.cam_from_world, strict=True)
        }
    return town_truth(case.num_frames or NUM_LIVE_FRAMES, path=case.path)


def try_once(
    case: Case, run: Path, *, num_kills: int, num_bytes: int, rng: random.Random, work: Path
) -> Trial:
    """Begins a run, kills it so many times at most, and has it end."""
    trial = Trial()
    before: dict[int, str] = {}
    with pushing(case, work):
        is_over = False
        while not is_over:
            is_new = not (run / "config.yaml").exists()
            if is_new:
                shutil.rmtree(run, ignore_errors=True)
            if len(trial.kinds) < num_kills:
                kind = rng.choice([one for one in case.kinds if not is_new or one != "restoring"])
                was_killed, code, printed = run_and_kill(
                    case, run, is_new=is_new, kind=kind, num_bytes=num_bytes, rng=rng
                )
                if was_killed:
                    trial.kinds.append(("resume/" if not is_new else "") + kind)
                is_over = not was_killed
            else:
                code, printed = run_to_end(case, run, is_new=is_new)
                is_over = True
            trial.faults += faults_of_folder(run, before=before)
            before = keyframes_of(run) if run.is_dir() else {}
    if code not in (0, 3):
        trial.faults.append(f"exit code {code}: {printed.strip()[-400:]}")
        return trial
    trial.faults += faults_of_frames(run, case)
    trial.num_keyframes = len(before)
    trial.num_again = sum(
        record["num_frames_again"] for record in records_of(run) if record["event"] == "RunResumed"
    )
    return trial


def records_of(run: Path) -> list[dict[str, object]]:
    """The lines of events.jsonl; each must be whole."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_case(case: Case, *, num_kills: int, rng: random.Random, work: Path) -> int:
    """Prints a table of a case; returns how many faults there were."""
    truth = truth_of(case)
    whole = work / f"{case.name}-whole"
    if not (whole / "summary.json").exists():
        shutil.rmtree(whole, ignore_errors=True)
        with pushing(case, work):
            code, printed = run_to_end(case, whole, is_new=True)
        if code not in (0, 3):
            raise SystemExit(f"{case.name}: does not run without kills either: {printed}")
    error, num_registered = error_percent(whole, case, truth)
    num_keyframes = len(keyframes_of(whole))
    print(f"\n{case.name}: {num_registered} of {num_keyframes} keyframes, ATE {error} % whole")
    print("kills, at              | keyframes | in the map | again | ATE %  | ratio | faults")
    limit = WORSE_RATIO * max(error or 0.0, MIN_ERROR_PERCENT)
    num_done, num_faults, number = 0, 0, 0
    while num_done < num_kills:
        number += 1
        run = work / f"{case.name}-{number:03d}"
        shutil.rmtree(run, ignore_errors=True)
        trial = try_once(
            case,
            run,
            num_kills=min(rng.randrange(1, MAX_KILLS_OF_A_RUN + 1), num_kills - num_done),
            num_bytes=size_of(whole / "events.jsonl"),
            rng=rng,
            work=work,
        )
        trial.error_percent, trial.num_registered = error_percent(run, case, truth)
        if trial.error_percent is None or trial.error_percent > limit:
            trial.faults.append("less exact than without kills")
        num_done += len(trial.kinds)
        num_faults += len(trial.faults)
        print(row_of(trial, error), flush=True)
        if not trial.faults:
            shutil.rmtree(run)
    print(f"{case.name}: {num_done} kills in {number} runs, {num_faults} faults", flush=True)
    return num_faults


def row_of(trial: Trial, whole_percent: float | None) -> str:
    """A row of the table."""
    ratio = (trial.error_percent or 0.0) / max(whole_percent or 0.0, MIN_ERROR_PERCENT)
    percent = "-" if trial.error_percent is None else f"{trial.error_percent:.4f}"
    return (
        f"{len(trial.kinds)} {', '.join(trial.kinds) or 'none'} | {trial.num_keyframes}"
        f" | {trial.num_registered} | {trial.num_again} | {percent} | {ratio:.2f}"
        f" | {'; '.join(trial.faults) or 'none'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="in all, divided among the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case", nargs="+", default=["town", "orbit", "rtmp"], help="town, orbit, fox, rtmp"
    )
    parser.add_argument("--fox", type=Path, help="folder with images/ and groundtruth.txt")
    parser.add_argument("--town-frames", type=int, default=120)
    parser.add_argument("--work", type=Path, default=Path("runs/crash_test"))
    parsed = parser.parse_args(arguments)
    parsed.work.mkdir(parents=True, exist_ok=True)
    cases = make_cases(parsed)
    if any(case.num_frames is None for case in cases) and not (parsed.work / "live.mp4").exists():
        make_live_video(parsed.work / "live.mp4")
    rng = random.Random(parsed.seed)
    num_each = -(-parsed.kills // len(cases))
    num_faults = sum(
        test_case(case, num_kills=num_each, rng=rng, work=parsed.work) for case in cases
    )
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
