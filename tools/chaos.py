#!/usr/bin/env python3
"""Breaks everything around a live run, at random, and checks that its map is right all the same.

    .venv/bin/python tools/chaos.py --minutes 10 --seed 1 --work /tmp/chaos
    .venv/bin/python tools/chaos.py --minutes 3              # the quick one

A flight over the synthetic town comes at 10 Hz through an MQTT broker on loopback; a second camera
(MJPEG), an RTMP listener and a phone page are open beside it. Meanwhile, as the seed says:

- frames are truncated, black, sent twice, of another size, no images at all, or have a clock that
  jumped; telemetry is garbage; the broker is killed and comes back;
- the MJPEG camera sends noise and hangs up; strangers send garbage to the phone page and the RTMP
  listener, or connect and say nothing;
- the matcher raises and hangs, the solvers raise, the mapper raises, views raise and hang;
- the database is locked by others, the disk is slow, the process is stopped for a while;
- in the end two signals come at once.

The run is a process of its own, so that a crash is seen. It must end by itself with exit code 0,
every frame must be counted (received = keyframes + tracked + dropped, by reason), and the flight
must be within ``--max-ate`` percent of the truth. The exit code is 0 if so. Needs mosquitto.
"""

from __future__ import annotations

import argparse
import csv
import http.server
import json
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LOOPBACK = "127.0.0.1"
RATE_HZ = 10.0
TOPIC = "chaos/drone/frame"
START_S = time.time()  # capture time of the first frame
WIDTH, NUM_BITS, BIT_HEIGHT_PX = 640, 16, 8  # of a frame, and of the number in its top edge
MAX_CALL_S = 2.0  # after which a call has hung in this run
END_TIMEOUT_S = 900.0
NUM_SIGNALS_TOGETHER = 2
INJECTED = "injected.json"  # what the run's own process was given


# -- the run --------------------------------------------------------------------------------------


class Chance:
    """Decides by a seed what breaks, and counts it. For any thread."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def happens(self, what: str, ratio: float, *, at_most: int = 1_000_000) -> bool:
        """Whether it does this time."""
        with self._lock:
            does = self._random.random() < ratio and self.counts[what] < at_most
            self.counts[what] += does
            return does


class BrokenView:
    """Raises after some events, or hangs."""

    def __init__(self, chance: Chance, *, what: str, breaks: Callable[[], None]) -> None:
        self._chance = chance
        self._what = what
        self._breaks = breaks

    def show_frame(self, *_: object) -> None:
        """Shows nothing."""

    def show_map(self, *_: object) -> None:
        """Shows nothing."""

    def show_event(self, _: object) -> None:
        """Breaks at some event."""
        if self._chance.happens(self._what, 0.02, at_most=1):
            self._breaks()

    def close(self) -> None:
        """Does nothing."""


def _raise() -> None:
    raise RuntimeError("chaos")


def _hang() -> None:
    threading.Event().wait()


def _break_engine(chance: Chance) -> None:
    """Has parts of the engine and what it is given break in this process."""
    from adapters import launch
    from engine.mapping import background_jobs
    from engine.mapping.mapper import Mapper
    from engine.output.files import LineFile
    from engine.windows.model import WindowSolverConfig
    from engine.windows.solver import solve_window

    def matching(config: Any, sources: Any) -> Any:
        return _ChaosMatcher(launch._sift(config, sources), chance), None

    def solver(*_: object) -> Any:
        def solve(problem: Any) -> Any:
            if chance.happens("window solver raises", 0.3):
                _raise()
            return solve_window(problem, WindowSolverConfig())

        return solve

    def views(*_: object) -> list[BrokenView]:
        return [
            BrokenView(chance, what="view hangs", breaks=_hang),
            BrokenView(chance, what="view raises", breaks=_raise),
        ]

    adjust, add_keyframe, append = (
        background_jobs.adjust_copy,
        Mapper.add_keyframe,
        LineFile.append,
    )

    def adjust_or_raise(*args: Any, **kwargs: Any) -> Any:
        if chance.happens("global bundle adjustment raises", 0.3):
            _raise()
        return adjust(*args, **kwargs)

    def add_and_raise(self: Mapper, *args: Any, **kwargs: Any) -> Any:
        step = add_keyframe(self, *args, **kwargs)
        if chance.happens("mapper raises, half done", 0.02, at_most=3):
            _raise()
        return step

    def append_slowly(self: LineFile, line: str) -> Any:
        if chance.happens("slow disk (writes of 0.2 s)", 0.002):
            time.sleep(0.2)
        return append(self, line)

    launch._matching = matching
    launch._window_solver = solver
    launch._open_views = views  # type: ignore[assignment]
    background_jobs.adjust_copy = adjust_or_raise
    Mapper.add_keyframe = add_and_raise  # type: ignore[method-assign]
    LineFile.append = append_slowly  # type: ignore[method-assign]


class _ChaosMatcher:
    """A matcher that raises and hangs now and then."""

    def __init__(self, matcher: Any, chance: Chance) -> None:
        self._matcher = matcher
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)

    def describe(self, frame: Any) -> Any:
        if self._chance.happens("matcher raises in describing", 0.02):
            _raise()
        if self._chance.happens("matcher hangs in describing", 0.01, at_most=2):
            _hang()
        return self._matcher.describe(frame)

    def match(self, requests: Sequence[Any]) -> Any:
        if requests and self._chance.happens("matcher raises in matching", 0.05):
            _raise()
        if requests and self._chance.happens("matcher hangs in matching", 0.01, at_most=1):
            _hang()
        return self._matcher.match(requests)


def run_engine(arguments: argparse.Namespace) -> int:
    """Runs the engine in this process; returns the exit code of the run."""
    from adapters.cli import _finish
    from adapters.launch import LaunchOptions, launch
    from adapters.views.view_mode import ViewMode
    from engine.config import load_config

    chance = Chance(f"engine {arguments.seed}")
    _break_engine(chance)
    settings = [
        f"faults.max_call_s={MAX_CALL_S}",
        "faults.max_hangs=10",
        "faults.max_map_rebuilds=5",
        "live_sources.read_timeout_s=2",
        "live_sources.retry_max_s=2",
        "sources.min_image_edge_px=128",
    ]
    options = LaunchOptions(
        sources=tuple(arguments.source),
        path=arguments.work / "run",
        overwrite=True,
        view_mode=ViewMode.NONE,
        show_progress=False,
    )
    outcome = launch(load_config(["drone_video"], settings), options)
    (arguments.work / INJECTED).write_text(json.dumps(chance.counts))
    _finish(outcome)


# -- around it ------------------------------------------------------------------------------------


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


@dataclass(kw_only=True)
class Broker:
    """A mosquitto that can be killed and started again on its port."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and returns when it listens."""
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            raise SystemExit("chaos needs mosquitto")
        lines = [f"listener {self.port} {LOOPBACK}", "persistence false", "allow_anonymous true"]
        config = self.folder / "mosquitto.conf"
        config.write_text("\n".join([*lines, "user root"]) + "\n")
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([program, "-c", str(config)], stdout=log, stderr=log)
        while self._process.poll() is None:
            with suppress(OSError):
                socket.create_connection((LOOPBACK, self.port)).close()
                return
            time.sleep(0.05)
        raise SystemExit(f"mosquitto does not start, see {self.folder / 'mosquitto.log'}")

    def kill(self) -> None:
        """Kills it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Flight:
    """The town's flight as JPEG files, and where they were taken.

    Args:
        num_frames: of the flight.
        seed: of the town.
        folder: takes the files.
    """

    def __init__(self, num_frames: int, *, seed: int, folder: Path) -> None:
        from adapters.town.source import SyntheticTown, parse_town_spec

        self._town = SyntheticTown(
            parse_town_spec(f"synthetic:town?frames={num_frames}&seed={seed}"),
            next_frame_id=lambda: 1,  # type: ignore[arg-type,return-value]
        )
        self.num_frames = num_frames
        self._folder = folder

    def draw(self) -> None:
        """Draws all frames; drawn while they are sent, they would come late."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for index in range(self.num_frames):
            jpeg = encoded(stamped(self._town.render(index).pixels, index))
            self._path(index).write_bytes(jpeg)

    def jpeg(self, index: int) -> bytes:
        """One frame, with its number in its top edge; it was drawn."""
        return self._path(index).read_bytes()

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.jpg"

    def centers(self) -> Any:
        """True camera centres of all frames, (N, 3)."""
        from engine.geometry import camera_center

        return np.array([camera_center(pose) for _, pose in self._town.ground_truth()])


def stamped(pixels: Any, number: int) -> Any:
    """An image with a number in its top edge, black and white fields for its bits.

    Clocks jump here, and frames are lost: nothing else says which frame one is.
    """
    pixels = pixels.copy()
    width = pixels.shape[1] // NUM_BITS
    for bit in range(NUM_BITS):
        level = 255 if number >> bit & 1 else 0
        pixels[:BIT_HEIGHT_PX, bit * width : (bit + 1) * width] = level
    return pixels


def number_in(path: Path) -> int:
    """The number in an image's top edge; -1 where it cannot be read, or is of another size."""
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None or image.shape[1] != WIDTH:
        return -1
    width = WIDTH // NUM_BITS
    fields = (
        image[1 : BIT_HEIGHT_PX - 2, bit * width + 4 : (bit + 1) * width - 4].mean()
        for bit in range(NUM_BITS)
    )
    return sum(1 << bit for bit, level in enumerate(fields) if level > 127)


def captured_at_s(index: int) -> float:
    """The true capture time of a frame."""
    return START_S + index / RATE_HZ


def encoded(pixels: Any) -> bytes:
    """RGB pixels (H, W, 3) as a JPEG."""
    import cv2

    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return bytes(data)


class Sender:
    """Publishes the flight, and what is wrong with some of its frames."""

    def __init__(self, flight: Flight, chance: Chance, *, port: int, seed: int) -> None:
        import paho.mqtt.client as mqtt

        self._flight = flight
        self._chance = chance
        self._random = random.Random(f"sender {seed}")
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.reconnect_delay_set(min_delay=1, max_delay=2)
        self._client.connect_async(LOOPBACK, port)
        self._client.loop_start()

    def send(self, index: int) -> None:
        """Sends a frame, or what becomes of it."""
        jpeg, time_s = self._flight.jpeg(index), captured_at_s(index)
        chance = self._chance
        wrong = next((what for what, ratio in _WRONG.items() if chance.happens(what, ratio)), None)
        if wrong is not None:
            self._publish(*self._spoiled(wrong, jpeg, time_s))
            return
        if chance.happens("frame sent twice", 0.03):
            self._publish(jpeg, time_s)
        if chance.happens("telemetry garbage", 0.02):
            topic = TOPIC.replace("frame", "telemetry")
            self._client.publish(topic, self._random.choice(_TELEMETRY))
        self._publish(jpeg, time_s)

    def _spoiled(self, wrong: str, jpeg: bytes, time_s: float) -> tuple[bytes, float]:
        """What is sent in the place of a frame."""
        match wrong:
            case "frame truncated":
                return jpeg[: self._random.randrange(2, len(jpeg) // 2)], time_s
            case "frame black":
                return encoded(np.zeros((480, 640, 3), np.uint8)), time_s
            case "frame too small":
                return encoded(np.full((64, 64, 3), 90, np.uint8)), time_s
            case "frame of another size":
                return self._noise((320, 240)), time_s
            case "clock jumps":
                return jpeg, time_s + self._random.uniform(-7200.0, 7200.0)
        return self._random.randbytes(3000), time_s

    def close(self) -> None:
        """Stops sending."""
        self._client.loop_stop()
        self._client.disconnect()

    def _publish(self, payload: bytes, time_s: float) -> None:
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        if not self._client.is_connected():
            self._chance.counts["frames lost with the broker"] += 1
            return
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.UserProperty = [("t_capture", f"{time_s:.6f}")]
        self._client.publish(TOPIC, payload, properties=properties)

    def _noise(self, size: tuple[int, int]) -> bytes:
        width, height = size
        pixels = np.random.default_rng(self._random.randrange(10**9)).integers(
            0, 255, (height, width, 3), np.uint8
        )
        return encoded(pixels)


_WRONG = {  # with a frame, and in how many of them
    "frame truncated": 0.02,
    "frame is no image": 0.02,
    "frame black": 0.01,
    "frame too small": 0.01,
    "frame of another size": 0.005,
    "clock jumps": 0.01,
}
_TELEMETRY: tuple[bytes, ...] = (
    b"{",
    b'{"lat": NaN, "lon": 1e308}',
    b'{"lat": "north"}',
    b"\xff\xfe",
    b"[" * 2000,
    json.dumps({"lat": 48.0, "lon": 11.0, "alt": -1e9}).encode(),
)


class NoiseCamera:
    """An MJPEG camera that sends noise and garbage, hangs up, or falls silent."""

    def __init__(self, chance: Chance, *, seed: int) -> None:
        rng, chooser = np.random.default_rng(seed), random.Random(f"camera {seed}")

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=part")
                self.end_headers()
                with suppress(OSError):
                    while not chance.happens("MJPEG camera hangs up", 0.1):
                        part = encoded(rng.integers(0, 255, (240, 320, 3), np.uint8))
                        if chance.happens("MJPEG part garbage", 0.3):
                            part = chooser.randbytes(2000)
                        if chance.happens("MJPEG camera silent for 4 s", 0.05):
                            time.sleep(4.0)
                        head = f"--part\r\nContent-Type: image/jpeg\r\nContent-Length: {len(part)}"
                        self.wfile.write(head.encode() + b"\r\n\r\n" + part + b"\r\n")
                        time.sleep(1.5)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it is seen."""
        return f"http://{LOOPBACK}:{self._server.server_port}/video"


class Strangers:
    """What others do to the run: ports, database, process and broker."""

    def __init__(
        self,
        chance: Chance,
        *,
        process: subprocess.Popen[bytes],
        broker: Broker,
        ports: Sequence[int],
        database: Path,
        seed: int,
    ) -> None:
        self._chance = chance
        self._process = process
        self._broker = broker
        self._ports = ports
        self._database = database
        self._random = random.Random(f"strangers {seed}")
        self._silent: list[socket.socket] = []

    def act(self) -> None:
        """Does something, or not; called ten times a second. Blocks for seconds now and then."""
        chance = self._chance
        if chance.happens("garbage to phone page or RTMP", 0.05):
            self._send(self._random.choice(_GARBAGE) or self._random.randbytes(5000))
        if chance.happens("silent connection", 0.02):
            self._connect_silently()
        if chance.happens("process stopped for a second", 0.003):
            self._process.send_signal(signal.SIGSTOP)
            time.sleep(1.0)
            self._process.send_signal(signal.SIGCONT)
        if chance.happens("database locked for 2 s", 0.004):
            self._lock_database()
        if chance.happens("broker killed", 0.001, at_most=2):
            self._broker.kill()
            time.sleep(1.0)
            self._broker.start()

    def _send(self, payload: bytes) -> None:
        with suppress(OSError):
            address = (LOOPBACK, self._random.choice(self._ports))
            with socket.create_connection(address, timeout=0.5) as connection:
                connection.sendall(payload)

    def _connect_silently(self) -> None:
        with suppress(OSError):
            address = (LOOPBACK, self._random.choice(self._ports))
            self._silent.append(socket.create_connection(address, timeout=0.5))
        for connection in self._silent[:-30]:
            connection.close()

    def _lock_database(self) -> None:
        with suppress(sqlite3.Error):
            connection = sqlite3.connect(self._database, timeout=1.0)
            try:
                connection.execute("BEGIN IMMEDIATE")
                time.sleep(2.0)
            finally:
                connection.close()


_GARBAGE = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 500, b"\x03" * 1537)


# -- what came of it ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a run had to be, and was or was not."""

    checks: dict[str, bool]
    lines: list[str]

    @property
    def is_good(self) -> bool:
        """Whether all of it was."""
        return all(self.checks.values())


def error_percent(run: Path, centers: Any) -> tuple[float, int]:
    """ATE of the flight's keyframes in the map, in percent of the extent, and how many they are."""
    import pycolmap

    from adapters.evaluate import absolute_error

    model = pycolmap.Reconstruction(str(run / "latest" / "sparse" / "0"))
    estimated, reference = [], []
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        number = number_in(run / "images" / image.name)
        if image.name.startswith("source1/") and 0 <= number < len(centers):
            estimated.append(image.projection_center())
            reference.append(centers[number])
    error = absolute_error(np.array(estimated), np.array(reference))
    return float("inf") if error is None else error.rmse_percent_of_extent, len(estimated)


def judge(work: Path, flight: Flight, *, returncode: int, max_ate_percent: float) -> Verdict:
    """Checks what a run left."""
    run = work / "run"
    summary = json.loads((run / "summary.json").read_text())
    with (run / "frames.csv").open(newline="") as file:
        statuses = Counter(row["status"] for row in csv.DictReader(file))
    received, num_tracked = summary["frames_received"], statuses["tracked"]
    counted = summary["keyframes"] + num_tracked + sum(summary["frames_dropped"].values())
    ate_percent, num_compared = error_percent(run, flight.centers())
    log = (work / "run.log").read_text(errors="replace")
    checks = {
        f"ended by itself (exit code {returncode})": returncode in (0, 3),
        "no crash": "Fatal Python error" not in log and returncode >= 0,
        f"all counted ({received} received, {counted} counted)": received == counted,
        "all written": summary["failed_writes"] == 0,
        f"ATE {ate_percent:.3f} % <= {max_ate_percent:g} %": ate_percent <= max_ate_percent,
    }
    lines = [
        f"keyframes {summary['keyframes']}, registered {summary['registered_keyframes']}, of the"
        f" flight {num_compared}; tracked {num_tracked}",
        f"dropped {json.dumps(summary['frames_dropped'])}",
        f"faults {json.dumps(summary['faults'])}",
        f"verdict {summary['verdict']['level']}; {summary['cpu_s']:.0f} CPU s",
    ]
    return Verdict(checks=checks, lines=lines)


def table(counts: Counter[str]) -> Iterator[str]:
    """The faults that were given, as lines."""
    yield "| fault | times |"
    yield "|---|---|"
    for what, count in sorted(counts.items()):
        yield f"| {what} | {count} |"


@contextmanager
def started_run(
    work: Path, sources: Sequence[str], *, seed: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The run in a process of its own; what it prints goes to a file."""
    arguments = [part for source in sources for part in ("--source", source)]
    command = [sys.executable, "-X", "faulthandler", __file__, "--engine"]
    command += ["--work", str(work), "--seed", str(seed), *arguments]
    with (work / "run.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def play(
    sender: Sender, strangers: Strangers, process: subprocess.Popen[bytes], *, num_frames: int
) -> None:
    """Sends the flight at its rate, while strangers do their part on another thread."""
    is_over = threading.Event()

    def disturb() -> None:
        while not is_over.wait(0.1):
            strangers.act()

    disturbing = threading.Thread(target=disturb, daemon=True)
    disturbing.start()
    started_s = time.monotonic()
    for index in range(num_frames):
        time.sleep(max(0.0, started_s + index / RATE_HZ - time.monotonic()))
        if process.poll() is not None:
            break
        sender.send(index)
    is_over.set()
    disturbing.join()


def main() -> int:
    """Runs the chaos and prints what came of it; 0 if the run held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--max-ate", type=float, default=0.5, help="percent of the extent")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--source", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        return run_engine(arguments)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    num_frames = round(60 * RATE_HZ * arguments.minutes)
    flight = Flight(num_frames, seed=arguments.seed, folder=work / "frames")
    flight.draw()
    chance = Chance(f"around {arguments.seed}")
    broker = Broker(folder=work)
    broker.start()
    phone, rtmp = free_port(), free_port()
    camera = NoiseCamera(chance, seed=arguments.seed)
    sources = [
        f"mqtt://{LOOPBACK}:{broker.port}/{TOPIC}",
        camera.url,
        f"phone://{LOOPBACK}:{phone}",
        f"rtmp://{LOOPBACK}:{rtmp}/live?listen=1",
    ]
    try:
        with started_run(work, sources, seed=arguments.seed) as process:
            while not (work / "run" / "database.db").exists() and process.poll() is None:
                time.sleep(0.2)
            time.sleep(3.0)  # it connects
            sender = Sender(flight, chance, port=broker.port, seed=arguments.seed)
            time.sleep(1.0)
            strangers = Strangers(
                chance,
                process=process,
                broker=broker,
                ports=(phone, rtmp),
                database=work / "run" / "database.db",
                seed=arguments.seed,
            )
            play(sender, strangers, process, num_frames=flight.num_frames)
            time.sleep(2.0)
            for number in (signal.SIGINT, signal.SIGTERM):
                process.send_signal(number)
                chance.counts["signals, two for one request"] += 1
            process.wait(timeout=END_TIMEOUT_S)
            sender.close()
    finally:
        broker.kill()
    own = work / INJECTED
    chance.counts.update(json.loads(own.read_text()) if own.exists() else {})
    for line in table(chance.counts):
        print(line)
    verdict = judge(work, flight, returncode=process.returncode, max_ate_percent=arguments.max_ate)
    for line in verdict.lines:
        print(line)
    for what, is_so in verdict.checks.items():
        print(f"{'yes' if is_so else 'NO '}  {what}")
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
