#!/usr/bin/env python3
"""Plays clips to live runs at a steady rate and measures how late poses and keyframes are.

    .venv/bin/python tools/bench_live.py town=synthetic:town --work /tmp/live
    .venv/bin/python tools/bench_live.py walk=walk.mp4 --rate 15 --by mqtt --work /tmp/live
    .venv/bin/python tools/bench_live.py --work /tmp/live --show     # the table of former figures

Each clip is played at each rate, by MQTT (JPEG files through a mosquitto of this program's own), by
RTMP (H.264, pushed by ffmpeg to the listening engine) and by the Python API (arrays, added to a
live run in this process), with its calibration unknown and, where one is given, known. By MQTT and
RTMP the command line makes a map of it in a process of its own; what is measured is read from its
``events.jsonl``. By the API poses are timed where the program gets them: from ``add_frame`` to
``on_event``. The figures:

- from arrival to pose, and from arrival to a registered keyframe, of what arrived after the first
  map; and how long frames before it waited for theirs;
- what was dropped, by reason, and what never got a pose;
- how long frames waited before tracking took them;
- the first map, in seconds of capture (from the first frame to the newest one that had arrived, and
  to the newest keyframe in it) and of the clock;
- ATE of keyframes in percent of the extent, where the true poses are given (TUM, by index).

``live.json`` in the work folder holds the figures, with the machine's load; a Markdown table is
printed. Linux, mosquitto and ffmpeg.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zlib  # noqa: F401 - before pycolmap, which brings its own
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import yaml
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from publish_frames import Player, Shot, read_shots

from adapters.evaluate import absolute_error, read_tum
from adapters.launch import count_frame_ids
from adapters.mqtt.connection import MqttAddress, MqttLink, keep_connected
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.config import load_config
from engine.events import EarlyMapMade, Event, FramePosed, FrameReceived, MapInitialized
from engine.geometry import camera_center
from engine.types import SourceState

TOWN = "synthetic:town"
TOPIC = "bench/camera/frame"
FIGURES = "live.json"
JPEG_QUALITY = 90
TIMEOUT_S = 60.0  # to connect, and to finish after the last frame
SILENCE_S = 4.0  # after which a run ends by itself
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What is played."""

    name: str
    source: str
    shots: tuple[Shot, ...]
    calibration: Path | None
    truth: Mapping[int, np.ndarray]  # camera centres by index; empty: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run."""

    clip: Clip
    rate_hz: float
    transport: str  # mqtt, rtmp or api
    is_known: bool  # whether the calibration is given

    @property
    def name(self) -> str:
        """For folders and tables."""
        known = "known" if self.is_known else "unknown"
        return f"{self.clip.name}-{self.rate_hz:g}-{self.transport}-{known}"


# -- clips ----------------------------------------------------------------------------------------


def read_clip(
    name: str,
    source: str,
    *,
    calibration: str | None,
    truth: str | None,
    max_frames: int,
    work: Path,
) -> Clip:
    """Reads the frames of a clip, as a former call kept them; of the town, its truth as well."""
    config = load_config(
        settings=[
            f"sources.max_frames={max_frames}",
            f"runtime.keyframe_jpeg_quality={JPEG_QUALITY}",
        ]
    )
    folder = work / f"{name}-{max_frames}"
    if not folder.is_dir():
        folder.mkdir()
        for index, shot in enumerate(asyncio.run(read_shots(source, config=config))):
            (folder / f"{index:06d}.jpg").write_bytes(shot.jpeg)
    clip = Clip(
        name=name,
        source=source,
        shots=tuple(
            Shot(jpeg=path.read_bytes(), properties=()) for path in sorted(folder.iterdir())
        ),
        calibration=None if calibration is None else Path(calibration).resolve(),
        truth={} if truth is None else true_centers(Path(truth)),
    )
    if not source.startswith(TOWN):
        return clip
    town = SyntheticTown(parse_town_spec(source), next_frame_id=count_frame_ids())
    centers = {i: camera_center(pose) for i, (_, pose) in enumerate(town.ground_truth())}
    file = work / f"{name}.cameras.txt"
    size = f"{town.options.width} {town.options.height}"
    file.write_text(f"1 PINHOLE {size} {' '.join(map(str, town.intrinsics))}\n")
    return replace(clip, calibration=clip.calibration or file, truth=clip.truth or centers)


def true_centers(path: Path) -> dict[int, np.ndarray]:
    """Camera centres by index, from TUM lines whose times are indices."""
    poses = read_tum(path)
    centers = (camera_center(pose) for pose in poses.cam_from_world)
    return dict(zip(poses.timestamps_s.round().astype(int).tolist(), centers, strict=True))


def encode(clip: Clip, path: Path, *, rate_hz: float) -> None:
    """Writes a clip as H.264 of a rate, without frames that wait for later ones."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(rate_hz))
        stream.height, stream.width = _pixels(clip.shots[0]).shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "crf": "18",
            "preset": "veryfast",
            "tune": "zerolatency",
            "g": str(round(rate_hz)),
        }
        for shot in clip.shots:
            frame = av.VideoFrame.from_ndarray(_pixels(shot), format="bgr24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _pixels(shot: Shot) -> NDArray[np.uint8]:
    """The image (H, W, 3) BGR."""
    import cv2

    return np.asarray(cv2.imdecode(np.frombuffer(shot.jpeg, np.uint8), cv2.IMREAD_COLOR), np.uint8)


# -- a live run -----------------------------------------------------------------------------------


def measure(case: Case, work: Path, *, livesfm: str, options: Sequence[str]) -> dict[str, Any]:
    """Plays a clip to a run; returns the figures."""
    run = work / "runs" / case.name
    shutil.rmtree(run, ignore_errors=True)
    load_before, handed = os.getloadavg()[0], {}
    match case.transport:
        case "mqtt":
            play_by_mqtt(case, run, work=work, livesfm=livesfm, options=options)
        case "rtmp":
            play_by_rtmp(case, run, work=work, livesfm=livesfm, options=options)
        case _:
            handed = {"pose_ms": percentiles_ms(play_by_api(case, run, options=options))}
    return {
        "case": case.name,
        "num_played": len(case.clip.shots),
        **figures_of(run),
        **handed,
        "ate_percent": ate_percent(run, case.clip.truth),
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "options": list(options),
    }


@contextmanager
def running(
    case: Case, run: Path, address: str, *, livesfm: str, options: Sequence[str]
) -> Iterator[None]:
    """A run that listens while the context is open, and has ended by itself afterwards.

    Raises:
        RuntimeError: it does not listen, does not end or broke off.
    """
    command = [livesfm, "run", address, "--out", str(run), "--view", "none", "--quiet", *options]
    command += ["--set", f"live_sources.give_up_after_s={SILENCE_S}"]
    if case.is_known:
        command += ["--calibration", str(case.clip.calibration)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_until_listening(process, run, case)
        yield
        _, errors = process.communicate(timeout=TIMEOUT_S)
        if process.returncode not in (0, 3):
            raise RuntimeError(f"{case.name}: {errors.decode(errors='replace')[-500:]}")
    finally:
        process.kill()
        process.wait()


def wait_until_listening(process: subprocess.Popen[bytes], run: Path, case: Case) -> None:
    """Returns once a run receives: MQTT says so, RTMP's port is open soon after the start."""
    wanted = '"SourceChanged"' if case.transport == "mqtt" else '"SourceOpened"'
    give_up_s = time.monotonic() + TIMEOUT_S
    events = run / "events.jsonl"
    while not (events.exists() and wanted in events.read_text()):
        if process.poll() is not None or time.monotonic() > give_up_s:
            raise RuntimeError(f"{case.name}: the run does not listen")
        time.sleep(0.1)
    time.sleep(1.0)


def play_by_mqtt(
    case: Case, run: Path, *, work: Path, livesfm: str, options: Sequence[str]
) -> None:
    """Publishes a clip on a broker that a run reads."""
    with broker(work) as port:
        address = f"mqtt://127.0.0.1:{port}/{TOPIC.replace('/camera/', '/+/')}"
        with running(case, run, address, livesfm=livesfm, options=options):
            asyncio.run(publish(case, f"mqtt://127.0.0.1:{port}/{TOPIC}"))


async def publish(case: Case, address: str) -> None:
    """Publishes the frames of a clip at its rate."""
    link = MqttLink(MqttAddress.parse(address), config=load_config())
    player = Player(case.clip.shots, topic=TOPIC, rate_hz=case.rate_hz, loop_s=0.0)

    def ignore(state: SourceState, detail: str) -> None:
        del state, detail

    await keep_connected(link, player.play, report=ignore, client=link.client)
    if player.num_missed:
        raise RuntimeError(f"{case.name}: {player.num_missed} frames were not sent in time")


@contextmanager
def broker(work: Path) -> Iterator[int]:
    """The port of a mosquitto on loopback."""
    port = free_port()
    settings = work / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        raise SystemExit("mosquitto is not installed")
    quiet = subprocess.DEVNULL
    with subprocess.Popen([program, "-c", str(settings)], stdout=quiet, stderr=quiet) as process:
        try:
            yield port
        finally:
            process.kill()


def play_by_rtmp(
    case: Case, run: Path, *, work: Path, livesfm: str, options: Sequence[str]
) -> None:
    """Pushes a clip to a run that listens."""
    video = work / f"{case.clip.name}-{len(case.clip.shots)}-{case.rate_hz:g}.mp4"
    if not video.exists():
        encode(case.clip, video, rate_hz=case.rate_hz)
    url = f"rtmp://127.0.0.1:{free_port()}/live"
    with running(case, run, f"{url}?listen=1", livesfm=livesfm, options=options):
        push = ["ffmpeg", "-loglevel", "error", "-re", "-i", str(video), "-c", "copy", "-f", "flv"]
        subprocess.run([*push, url], check=True, timeout=600.0)


def play_by_api(case: Case, run: Path, *, options: Sequence[str]) -> list[float]:
    """Adds the frames of a clip to a live run of this process, as arrays.

    Returns:
        Seconds from `add_frame` to the pose, of frames that were added after the first map.
    """
    import livesfm

    parser = argparse.ArgumentParser(prog="--by api")
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    given = parser.parse_args(options)
    overrides: dict[str, object] = {
        key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in given.settings)
    }
    if case.is_known:
        overrides["cameras.calibrations"] = [str(case.clip.calibration)]
    poses = HandedPoses()
    with livesfm.open_run(
        run, config=given.config, overrides=overrides, on_event=poses.hear
    ) as opened:
        begin_s = time.monotonic()
        for index, shot in enumerate(case.clip.shots):
            rgb = np.ascontiguousarray(_pixels(shot)[:, :, ::-1])
            due_s = index / case.rate_hz
            time.sleep(max(begin_s + due_s - time.monotonic(), 0.0))
            poses.added_at_s.append(time.monotonic())
            opened.add_frame(rgb, captured_at_s=due_s)
        opened.finish()
    return poses.latencies_s()


class HandedPoses:
    """When frames were added to a run, and when a program got their poses."""

    def __init__(self) -> None:
        self.added_at_s: list[float] = []  # by index
        self._index_of: dict[int, int] = {}
        self._posed_at_s: dict[int, float] = {}  # by index
        self._map_at_s = float("inf")

    def hear(self, event: Event) -> None:
        """Takes an event of the run, on a thread of it."""
        now_s = time.monotonic()
        match event:
            case FrameReceived():
                self._index_of[event.frame_id] = event.index
            case FramePosed() if event.is_first:
                self._posed_at_s[self._index_of[event.frame_id]] = now_s
            case EarlyMapMade() | MapInitialized():
                self._map_at_s = min(self._map_at_s, now_s)

    def latencies_s(self) -> list[float]:
        """Of frames that were added after the first map."""
        return [
            posed_at_s - self.added_at_s[index]
            for index, posed_at_s in self._posed_at_s.items()
            if self.added_at_s[index] >= self._map_at_s
        ]


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# -- figures --------------------------------------------------------------------------------------


def figures_of(run: Path) -> dict[str, Any]:
    """What the events of a run say of latencies, drops and the first map."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    received = {one["frame_id"]: one for one in by_kind.get("FrameReceived", [])}
    posed = by_kind.get("FramePosed", [])
    first_posed = {one["frame_id"]: one for one in reversed(posed) if one["is_first"]}
    registered = {one["frame_id"]: one for one in reversed(posed) if one["is_keyframe"]}
    maps = [*by_kind.get("EarlyMapMade", []), *by_kind.get("MapInitialized", [])]
    map_at_s = maps[0]["at_s"] if maps else float("inf")
    early = {i for i, one in received.items() if one["at_s"] < map_at_s}
    return {
        "num_received": summary["frames_received"],
        "dropped": dropped_by_reason(by_kind.get("FrameDropped", [])),
        "num_without_pose": len(received.keys() - first_posed.keys()),
        "num_keyframes": summary["keyframes"],
        "num_registered": summary["registered_keyframes"],
        "pose_ms": percentiles_ms(latencies(first_posed, without=early)),
        "keyframe_ms": percentiles_ms(latencies(registered, without=early)),
        "pose_before_map_ms": percentiles_ms(latencies(first_posed, only=early)),
        "queue_ms": percentiles_ms(queue_ages(received, first_posed, without=early)),
        "queue_before_map_ms": percentiles_ms(queue_ages(received, first_posed, only=early)),
        "first_map": first_map(maps, received, posed),
        "num_maps": len(maps),
        "verdict": summary["verdict"]["level"],
        "loop_lag_ms": summary["loop_lag_ms"],
        "cpu_s": round(summary["cpu_s"], 1),
        "peak_rss_mb": round(summary["peak_rss_mb"]),
    }


def dropped_by_reason(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Frames that were not used."""
    dropped: Counter[str] = Counter()
    for one in events:
        dropped[one["reason"]] += one["num_frames"]
    return dict(sorted(dropped.items()))


def latencies(
    posed: Mapping[int, dict[str, Any]],
    *,
    only: Collection[int] | None = None,
    without: Collection[int] = (),
) -> list[float]:
    """Seconds from arrival to a pose."""
    return [
        one["latency_s"]
        for frame_id, one in posed.items()
        if frame_id not in without and (only is None or frame_id in only)
    ]


def queue_ages(
    received: Mapping[int, dict[str, Any]],
    posed: Mapping[int, dict[str, Any]],
    *,
    only: Collection[int] | None = None,
    without: Collection[int] = (),
) -> list[float]:
    """Seconds from arrival until a frame that got a pose was taken and decoded."""
    return [
        received[frame_id]["at_s"] - (one["at_s"] - one["latency_s"])
        for frame_id, one in posed.items()
        if frame_id in received and frame_id not in without and (only is None or frame_id in only)
    ]


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """Percentiles in ms; None of nothing."""
    if not seconds:
        return None
    values = np.percentile(seconds, list(PERCENTILES.values())) * 1000.0
    return {name: round(float(value), 1) for name, value in zip(PERCENTILES, values, strict=True)}


def first_map(
    maps: Sequence[dict[str, Any]],
    received: Mapping[int, dict[str, Any]],
    posed: Sequence[dict[str, Any]],
) -> dict[str, float] | None:
    """When the first map came, in seconds after the first frame; None without one."""
    if not maps or not received:
        return None
    map_at_s = maps[0]["at_s"]
    begin = min(received.values(), key=lambda one: one["captured_at_s"])
    arrived = [one["captured_at_s"] for one in received.values() if one["at_s"] <= map_at_s]
    in_map = [one for one in posed if one["is_keyframe"]]
    first_at_s = in_map[0]["at_s"] if in_map else map_at_s
    held = [one for one in in_map if one["at_s"] <= first_at_s + 0.1]
    newest = max((one["captured_at_s"] for one in held), default=float("nan"))
    return {
        "clock_s": round(map_at_s - begin["at_s"], 2),
        "capture_s": round(max(arrived) - begin["captured_at_s"], 2),
        "newest_keyframe_s": round(newest - begin["captured_at_s"], 2),
    }


def ate_percent(run: Path, truth: Mapping[int, np.ndarray]) -> float | None:
    """RMSE of the centres of keyframes in percent of the extent; None where it is not known."""
    model = run / "latest" / "sparse" / "0"
    if not truth or not model.is_dir():
        return None
    reconstruction = pycolmap.Reconstruction(str(model))
    with (run / "frames.csv").open(newline="") as file:
        index_of = {row["name"]: int(row["index"]) for row in csv.DictReader(file)}
    estimated, reference = [], []
    for image_id in reconstruction.reg_image_ids():
        image = reconstruction.image(image_id)
        index = index_of.get(image.name, -1)
        if index in truth:
            estimated.append(image.projection_center())
            reference.append(truth[index])
    if len(estimated) < 3:
        return None
    error = absolute_error(np.array(estimated), np.array(reference))
    return None if error is None else round(error.rmse_percent_of_extent, 4)


# -- the table ------------------------------------------------------------------------------------

HEAD = (
    "| clip, Hz, by, calibration | dropped | pose p50, p95, p99, max ms | keyframe p50, p95, p99 ms"
    " | before the map: p95, max s | queue p95 ms | first map: captured, keyframe, clock s"
    " | without pose | keyframes | ATE % | loop p99, max ms | CPU s | load |"
)


def row(figures: Mapping[str, Any]) -> str:
    """A row of the table."""
    pose, keyframe = figures["pose_ms"] or {}, figures["keyframe_ms"] or {}
    before, queue = figures["pose_before_map_ms"] or {}, figures["queue_ms"] or {}
    start = figures["first_map"] or {}
    lag = figures["loop_lag_ms"]
    cells = [
        figures["case"],
        f"{sum(figures['dropped'].values())} of {figures['num_played']} {figures['dropped'] or ''}",
        ", ".join(f"{pose.get(name, float('nan')):.0f}" for name in PERCENTILES),
        ", ".join(f"{keyframe.get(name, float('nan')):.0f}" for name in ("p50", "p95", "p99")),
        ", ".join(f"{before.get(name, float('nan')) / 1000.0:.1f}" for name in ("p95", "max")),
        f"{queue.get('p95', float('nan')):.0f}",
        ", ".join(str(start.get(k)) for k in ("capture_s", "newest_keyframe_s", "clock_s")),
        str(figures["num_without_pose"]),
        f"{figures['num_registered']} of {figures['num_keyframes']}, {figures['verdict']}",
        str(figures["ate_percent"]),
        f"{lag['p99']}, {lag['max']}",
        str(figures["cpu_s"]),
        ", ".join(str(one) for one in figures["load"]),
    ]
    return "| " + " | ".join(cells) + " |"


def show(figures: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table."""
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for one in figures:
        print(row(one))


# -- the command line -----------------------------------------------------------------------------


def named(specs: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a mapping."""
    pairs = [spec.partition("=") for spec in specs]
    if any(not (name and value) for name, _, value in pairs):
        raise SystemExit("expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """The runs that were asked for."""
    calibrations, truths = named(arguments.calibration), named(arguments.truth)
    for name, source in named(arguments.clip).items():
        clip = read_clip(
            name,
            source,
            calibration=calibrations.get(name),
            truth=truths.get(name),
            max_frames=arguments.max_frames,
            work=arguments.work,
        )
        for rate_hz in arguments.rate:
            for transport in arguments.by:
                for known in arguments.known:
                    if known == "known" and clip.calibration is None:
                        continue
                    yield Case(
                        clip=clip, rate_hz=rate_hz, transport=transport, is_known=known == "known"
                    )


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line; what it does not know goes to ``livesfm run``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options, such as --config phone, are those of livesfm run.",
    )
    parser.add_argument("clip", nargs="*", help="NAME=VIDEO, NAME=FOLDER or NAME=synthetic:town")
    parser.add_argument("--calibration", nargs="*", default=[], help="NAME=FILE of a clip")
    parser.add_argument("--truth", nargs="*", default=[], help="NAME=FILE, TUM by index")
    parser.add_argument("--rate", nargs="*", type=float, default=[15.0, 30.0], help="frames/s")
    parser.add_argument(
        "--by", nargs="*", choices=("mqtt", "rtmp", "api"), default=["mqtt", "rtmp"]
    )
    parser.add_argument(
        "--known", nargs="*", choices=("known", "unknown"), default=["known", "unknown"]
    )
    parser.add_argument("--max-frames", type=int, default=1000, help="of each clip")
    parser.add_argument("--work", type=Path, required=True, help="clips, runs and figures")
    parser.add_argument("--show", action="store_true", help="only print the former figures")
    parser.add_argument(
        "--livesfm",
        default=str(Path(sys.executable).with_name("livesfm")),
        help="the program that is measured",
    )
    return parser.parse_known_args()


def main() -> int:
    """Measures what the command line names."""
    arguments, options = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / FIGURES
    kept = json.loads(file.read_text()) if file.exists() else {}
    for case in () if arguments.show else cases_of(arguments):
        figures = measure(case, arguments.work, livesfm=arguments.livesfm, options=options)
        kept[case.name] = figures
        file.write_text(json.dumps(kept, indent=1))
        print(row(figures), file=sys.stderr)
    show(list(kept.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
