#!/usr/bin/env python3
"""Measures what a keyframe costs the mapping thread as the map grows, by part.

    .venv/bin/python tools/bench_growth.py --keyframes 1000
    .venv/bin/python tools/bench_growth.py --keyframes 3000 --json growth.json

A camera that looks down flies over rolling ground in strips, back and forth; neighbouring strips
overlap, so that keyframes are joined to those of the strip before. Matches are known: points have
identities, and are seen with noise; some are not detected, some matches are wrong. Everything else
is the engine's own, on one thread and as a run calls it: the scene graph chooses the pairs, they
are verified, the mapper registers the keyframe, background jobs run when their results are due, and
frames between keyframes are posed.

Figures are milliseconds of thread CPU time a keyframe, in bins. What a part calls of another part
counts for that one only. ``stall`` is the longest that one call of the mapper took, background jobs
left out. The last lines compare bins: the cost at the end with that at 200 keyframes, and the
share of global bundle adjustment. The exit code is 0 if both are within ``--max-growth`` and
``--max-global``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
import zlib  # noqa: F401 - before pycolmap, which brings its own
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pycolmap
from numpy.typing import NDArray

import engine.mapping.mapper as mapper_module
from engine.config import Config, load_config
from engine.cpu_time import Stage
from engine.geometry import camera_center, transform_points
from engine.mapping import background_jobs
from engine.mapping.camera_changes.camera_crops import CameraCrops
from engine.mapping.camera_changes.camera_splits import CameraSplits
from engine.mapping.camera_changes.lens_recognition import LensRecognition
from engine.mapping.jobs import FinishedJob, JobKind, MapJob
from engine.mapping.journal_changes import JournalChanges
from engine.mapping.mapper import Mapper
from engine.mapping.maps import components
from engine.mapping.model import bundle_adjustment
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.loop_closing import LoopClosing
from engine.mapping.places.misplacement import MisplacementRepair
from engine.mapping.places.pair_evidence import PairEvidence
from engine.mapping.places.turning import TurningWatch
from engine.mapping.registering import Registering
from engine.mapping.verdict.verdict_watch import VerdictWatch
from engine.mapping.windows.window_schedule import WindowRefinement
from engine.matching.pair_matching import PairMatching
from engine.matching.place_recognition import PlaceRecognizer
from engine.matching.scene_graph import SceneGraph
from engine.run.event_loop import new_thread
from engine.types import (
    Features,
    Frame,
    FrameId,
    IntrinsicsPrior,
    Keyframe,
    MatchRequest,
    PairMatches,
    TrackedFrame,
)

SIZE = (640, 480)  # px
FOCAL_PX = 500.0
HEIGHT = 10.0  # of the flight; lengths are those of the ground
STEP = 1.6  # between keyframes
STRIP = 6.0  # between strips; an image shows 12.8 across
RELIEF = 2.5
DENSITY = 3.0  # points a unit of area; about 300 are seen
DETECTED_RATIO = 0.8  # of the points in view
NOISE_PX = 0.5
WRONG_RATIO = 0.05  # of the matches
BIN = 100  # keyframes

Pose = NDArray[np.float64]


# -- the flight -----------------------------------------------------------------------------------


class Flight:
    """Poses over ground whose points have identities; the keyframes of one camera.

    Args:
        num_keyframes: how many.
        num_between: frames between two keyframes.
        seed: of everything random.
    """

    def __init__(self, num_keyframes: int, *, num_between: int, seed: int) -> None:
        self.num_keyframes = num_keyframes
        self.num_between = num_between
        self._seed = seed
        self.poses = self._poses(num_keyframes * (num_between + 1))
        rng = np.random.default_rng((seed, 1))
        centers = camera_center(self.poses)[:, :2]
        low, high = centers.min(axis=0) - HEIGHT, centers.max(axis=0) + HEIGHT
        num_points = int(DENSITY * np.prod(high - low))
        xy = rng.uniform(low, high, (num_points, 2))
        self._points = np.column_stack([xy, RELIEF * rng.random(num_points)])
        shares = rng.gamma(0.4, size=(num_points, 128)).astype(np.float32)
        shares = 512 * np.sqrt(shares / shares.sum(axis=1, keepdims=True))
        self._looks = np.clip(np.round(shares), 0, 255).astype(np.uint8)
        cells = np.floor(self._points[:, :2]).astype(np.int64)
        self._cells: dict[tuple[int, int], list[int]] = {}
        for number, (column, row) in enumerate(cells.tolist()):
            self._cells.setdefault((column, row), []).append(number)
        self.point_ids: dict[FrameId, NDArray[np.int64]] = {}  # of the keypoints of keyframes

    def keyframe(self, number: int) -> Keyframe:
        """The keyframe of a number, from 0."""
        index = number * (self.num_between + 1)
        frame_id = FrameId(index + 1)
        ids, points_xy = self._view(index)
        rng = np.random.default_rng((self._seed, 2, index))
        looks = self._looks[ids] + rng.normal(scale=4.0, size=(len(ids), 128))
        self.point_ids[frame_id] = ids
        features = Features(
            frame_id=frame_id,
            keypoints_xy=points_xy,
            descriptors=np.clip(np.round(looks), 0, 255).astype(np.uint8),
            scales=np.full(len(ids), 4.0, np.float32),
            colors=np.full((len(ids), 3), 128, np.uint8),
        )
        params = (FOCAL_PX, SIZE[0] / 2, SIZE[1] / 2, 0.0)
        return Keyframe(
            frame_id=frame_id,
            camera_key="camera",
            index=index,
            name=f"{frame_id:06d}.jpg",
            width=SIZE[0],
            height=SIZE[1],
            captured_at_s=0.1 * index,
            received_at_s=0.1 * index,
            features=features,
            intrinsics_prior=IntrinsicsPrior(
                focal_px=FOCAL_PX, camera_model="SIMPLE_RADIAL", params=params
            ),
        )

    def tracked(self, number: int) -> list[TrackedFrame]:
        """The frames that follow a keyframe, tracked from it."""
        first = number * (self.num_between + 1)
        keyframe_id = FrameId(first + 1)
        return [
            self._tracked(index, keyframe_id)
            for index in range(first + 1, first + 1 + self.num_between)
        ]

    def _tracked(self, index: int, keyframe_id: FrameId) -> TrackedFrame:
        ids, points_xy = self._view(index)
        _, own, rows = np.intersect1d(ids, self.point_ids[keyframe_id], return_indices=True)
        return TrackedFrame(
            frame_id=FrameId(index + 1),
            keyframe_id=keyframe_id,
            index=index,
            captured_at_s=0.1 * index,
            received_at_s=0.1 * index,
            keypoint_idx=rows,
            points_xy=points_xy[own],
        )

    def _poses(self, num: int) -> Pose:
        """Poses (num, 3, 4) in strips of one square, swaying a little."""
        step = STEP / (self.num_between + 1)
        length = max(12 * STEP, (num * step * STRIP) ** 0.5)
        along = step * np.arange(num)
        strip, rest = np.divmod(along, length + STRIP)
        x = np.minimum(rest, length)
        x = np.where(strip % 2 == 0, x, length - x)
        y = STRIP * strip + np.maximum(rest - length, 0.0)
        z = HEIGHT + RELIEF / 2 + 0.4 * np.cos(along / 9.0)
        roll, pitch = 0.05 * np.sin(along / 5.0), 0.05 * np.cos(along / 7.0)
        yaw = 0.1 * np.sin(along / 11.0)
        return np.array(
            [
                _looking_down(np.array(center), roll=r, pitch=p, yaw=w)
                for *center, r, p, w in zip(x, y, z, roll, pitch, yaw, strict=True)
            ]
        )

    def _view(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Which points a frame detects, and where (N, 2) px."""
        pose = self.poses[index]
        column, row = np.floor(camera_center(pose)[:2]).astype(int).tolist()
        reach = int(np.ceil(HEIGHT))
        near = np.array(
            [
                point
                for x in range(column - reach, column + reach + 1)
                for y in range(row - reach, row + reach + 1)
                for point in self._cells.get((x, y), ())
            ]
        )
        rng = np.random.default_rng((self._seed, 3, index))
        in_cam = transform_points(pose, self._points[near])
        points_xy = FOCAL_PX * in_cam[:, :2] / in_cam[:, 2:] + np.array(SIZE) / 2
        points_xy += rng.normal(scale=NOISE_PX, size=points_xy.shape)
        is_seen = ((points_xy > 0) & (points_xy < SIZE)).all(axis=1)
        is_seen &= rng.random(len(near)) < DETECTED_RATIO
        chosen = rng.permutation(np.flatnonzero(is_seen))
        return near[chosen], points_xy[chosen]


def _looking_down(center: Pose, *, roll: float, pitch: float, yaw: float) -> Pose:
    """The pose (3, 4) of a camera above the ground, turned a little."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    axes = np.array([[cos, sin, 0.0], [sin, -cos, 0.0], [0.0, 0.0, -1.0]])
    tilt = np.array([[1.0, 0.0, pitch], [0.0, 1.0, roll], [-pitch, -roll, 1.0]])
    left, _, right = np.linalg.svd(tilt @ axes)
    rotation = left @ right
    return np.column_stack([rotation, -rotation @ center])


class KnownMatches:
    """Matches keypoints of the same point, some of them wrongly."""

    name = "known"
    peak_gpu_mb = 0.0
    matches_everything = False

    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def describe(self, frame: Frame) -> Features:
        """Not asked: keyframes come described."""
        raise NotImplementedError(frame.name)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches of each pair."""
        return [self._match(request) for request in requests]

    def _match(self, request: MatchRequest) -> PairMatches:
        ids = self._flight.point_ids
        pair = request.pair
        _, rows1, rows2 = np.intersect1d(ids[pair.first], ids[pair.second], return_indices=True)
        rng = np.random.default_rng((pair.first, pair.second))
        wrong = rng.permutation(len(rows1))[: int(WRONG_RATIO * len(rows1))]
        rows2[wrong] = np.roll(rows2[wrong], 1)
        return PairMatches.of_rows(
            request,
            matches_idx=np.column_stack([rows1, rows2]),
            confidence=np.ones(len(rows1), np.float32),
        )


# -- where the time goes --------------------------------------------------------------------------

GLOBAL = ("global BA: copy", "global BA: solve", "global BA: merge", "global BA: at once")
PARTS: tuple[tuple[str, object, str], ...] = (
    ("the benchmark's own", KnownMatches, "match"),
    ("verification", PairMatching, "_verify"),
    ("pairs chosen", SceneGraph, "choose_pairs"),
    ("pairs chosen", SceneGraph, "expand_pairs"),
    ("pairs chosen", SceneGraph, "choose_places"),
    ("graph", SceneGraph, "add_keyframe"),
    ("map: keyframe added", SparseMap, "add_keyframe"),
    ("registration", SparseMap, "register"),
    ("local BA: solve", bundle_adjustment, "_solve_locally"),
    ("triangulation, filtering", SparseMap, "triangulate"),
    ("triangulation, filtering", SparseMap, "complete_and_merge"),
    ("triangulation, filtering", SparseMap, "filter_touched"),
    ("graph", Registering, "update_graph"),
    ("waiting ones again", Registering, "retry_waiting"),
    ("misplacement", MisplacementRepair, "repair"),
    ("wrong pairs", PairEvidence, "examine"),
    ("turning", TurningWatch, "watch"),
    ("turning", TurningWatch, "explains"),
    ("cameras", CameraSplits, "watch"),
    ("cameras", CameraSplits, "find"),
    ("cameras", CameraCrops, "find"),
    ("cameras", LensRecognition, "doubted"),
    ("loops", LoopClosing, "watch"),
    ("loops", LoopClosing, "correct"),
    ("loops", LoopClosing, "report"),
    ("maps beside", components.Components, "add_keyframe"),
    ("maps beside", components.Components, "claim"),
    ("maps beside", components.Components, "release"),
    ("reports of poses", Mapper, "_report_changes"),
    ("journal's changes", Mapper, "_record"),
    ("journal's changes", Mapper, "_step"),
    ("journal's changes", JournalChanges, "record"),
    ("verdict", VerdictWatch, "watch"),
    ("frames between", Mapper, "add_frame"),
    ("windows", WindowRefinement, "start_if_due"),
    ("windows", WindowRefinement, "merge"),
    ("windows", background_jobs, "solve_job"),
    (GLOBAL[0], background_jobs, "start_global_adjustment"),
    (GLOBAL[1], background_jobs, "adjust_copy"),
    (GLOBAL[2], mapper_module, "merge_global_adjustment"),
    (GLOBAL[3], Mapper, "_adjust"),
)


class Clock:
    """Thread CPU time of parts, each without the parts that it calls."""

    def __init__(self) -> None:
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self._inside_s = [0.0]  # of the parts called by each part that runs

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Measures the functions of `PARTS` meanwhile."""
        with contextlib.ExitStack() as stack:
            for name, owner, attribute in PARTS:
                timed = self.timed(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time counts for a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began_s = time.thread_time()
            self._inside_s.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed_s = time.thread_time() - began_s
                self.spent_s[name] += elapsed_s - self._inside_s.pop()
                self._inside_s[-1] += elapsed_s

        return call


class Run:
    """A mapper fed as a run feeds it; jobs run on this thread when their results are due."""

    def __init__(self, config: Config, flight: Flight, clock: Clock) -> None:
        graph = SceneGraph(
            config.scene_graph,
            recognizer=PlaceRecognizer(
                config.retrieval,
                seed=config.runtime.seed,
                thread=new_thread("places", stage=Stage.PLACES),
            ),
        )
        self._matching = PairMatching(
            graph,
            KnownMatches(flight),
            two_view=config.two_view,
            dense=config.dense_matching,
            coarse_to_fine=config.coarse_to_fine,
        )
        self.mapper = Mapper(config, graph=graph, matching=self._matching, emit=lambda event: None)
        self._clock = clock
        self._due: tuple[MapJob, ...] = ()
        self._running: dict[JobKind, MapJob] = {}
        self.num_jobs: Counter[str] = Counter()
        self.stall_s: float = 0.0  # the longest call of the mapper since the last look

    def add(self, keyframe: Keyframe, tracked: Sequence[TrackedFrame]) -> None:
        """A keyframe and the frames that follow it."""
        due = [job for job in self._due if self._running.get(job.kind) is job]
        finished = [self._finished(job) for job in due]
        to_match = self._call(self.mapper.begin_keyframe, keyframe, finished)
        matched = self._clock.timed("matching", self._matching.match_keyframe)(
            to_match.frame_id,
            wants_pointmaps=to_match.wants_pointmaps,
            intrinsics=to_match.intrinsics,
            lost_ids=to_match.lost_ids,
        )
        step = self._call(self.mapper.add_keyframe, matched)
        self._running.update((job.kind, job) for job in step.jobs)
        self._due = step.due
        for frame in tracked:
            self._call(self.mapper.add_frame, frame)

    def finish(self) -> None:
        """The end of the run."""
        finished = [self._finished(job) for job in list(self._running.values())]
        self._call(self.mapper.finish, finished)

    def _finished(self, job: MapJob) -> FinishedJob:
        self._running.pop(job.kind, None)
        self.num_jobs[job.kind.value] += 1
        return FinishedJob(job=job, result=job.run())

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        began_s = time.thread_time()
        result = self._clock.timed("the rest of the mapper", function)(*args)
        self.stall_s = max(self.stall_s, time.thread_time() - began_s)
        return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Flies, and returns the figures of each bin."""
    settings = ["runtime.num_threads=1", *arguments.set]
    config = load_config(settings=settings)
    flight = Flight(arguments.keyframes, num_between=arguments.between, seed=arguments.seed)
    clock = Clock()
    run = Run(config, flight, clock)
    with clock.watching():
        bins, finish_s = fly(run, flight, clock, finish=arguments.finish)
    sparse_map = run.mapper._map
    centers = np.array(
        [camera_center(sparse_map.cam_from_world(i)) for i in sparse_map.registered_ids]
    )
    truth = camera_center(flight.poses[[i - 1 for i in sparse_map.registered_ids]])
    return {
        "bins": bins,
        "finish_s": finish_s,
        "registered": sparse_map.num_registered,
        "error_px": sparse_map.mean_reprojection_error_px(),
        "ate_ratio": aligned_error(centers, truth),
        "jobs": dict(run.num_jobs),
    }


def fly(
    run: Run, flight: Flight, clock: Clock, *, finish: bool
) -> tuple[list[dict[str, Any]], float]:
    """Adds all keyframes; returns the figures of each bin, and seconds of the end of the run."""
    bins = []
    before: defaultdict[str, float] = defaultdict(float)
    for number in range(flight.num_keyframes):
        run.add(flight.keyframe(number), flight.tracked(number))
        if (number + 1) % BIN == 0 or number + 1 == flight.num_keyframes:
            num = number % BIN + 1
            spent = {name: 1e3 * (s - before[name]) / num for name, s in clock.spent_s.items()}
            before = clock.spent_s.copy()
            stall_ms, run.stall_s = 1e3 * run.stall_s, 0.0
            bins.append(
                {
                    "num_keyframes": number + 1,
                    "ms": spent,
                    "stall_ms": stall_ms,
                    "num_points3D": run.mapper._map.num_points3D,
                }
            )
            print(f"{number + 1:6d} {total(spent):7.1f} ms, stall {stall_ms:6.0f} ms", flush=True)
    before_s = sum(clock.spent_s.values())
    if finish:
        run.finish()
    return bins, sum(clock.spent_s.values()) - before_s


def aligned_error(centers: Pose, truth: Pose) -> float:
    """RMSE after the best similarity, as a share of the extent of the flight (Umeyama 1991)."""
    a, b = centers - centers.mean(axis=0), truth - truth.mean(axis=0)
    left, singular, right = np.linalg.svd(b.T @ a)
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    scale = (singular * np.diag(sign)).sum() / (a**2).sum()
    errors = b - scale * a @ (left @ sign @ right).T
    return float(np.sqrt((errors**2).sum(axis=1).mean()) / np.linalg.norm(np.ptp(truth, axis=0)))


def total(spent_ms: Mapping[str, float]) -> float:
    """Milliseconds of all parts but the benchmark's own."""
    return sum(ms for name, ms in spent_ms.items() if name != "the benchmark's own")


# -- the report -----------------------------------------------------------------------------------


def table(bins: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: a part each, a column for some of the bins."""
    wanted = (200, 500, 1000, 2000, 3000, bins[-1]["num_keyframes"])
    shown = [one for one in bins if one["num_keyframes"] in wanted]
    names = list(dict.fromkeys(name for one in bins for name in one["ms"]))
    last = shown[-1]["ms"]
    names.sort(key=lambda name: -last.get(name, 0.0))
    width = max(map(len, names)) + 2
    lines = ["".ljust(width) + "".join(f"{one['num_keyframes']:9d}" for one in shown)]
    for name in names:
        lines.append(
            name.ljust(width) + "".join(f"{one['ms'].get(name, 0.0):9.2f}" for one in shown)
        )
    lines.append("all".ljust(width) + "".join(f"{total(one['ms']):9.2f}" for one in shown))
    lines.append("stall".ljust(width) + "".join(f"{one['stall_ms']:9.0f}" for one in shown))
    return lines


def compare(figures: dict[str, Any], arguments: argparse.Namespace) -> tuple[bool, list[str]]:
    """Whether the bars are kept, and lines that say so.

    Global bundle adjustment comes at sizes that grow by a ratio, so its cost a keyframe is that of
    the whole run, not of a bin.
    """
    bins = figures["bins"]
    of_all: defaultdict[str, float] = defaultdict(float)
    for number, one in enumerate(bins):
        num = one["num_keyframes"] - (bins[number - 1]["num_keyframes"] if number else 0)
        for name, ms in one["ms"].items():
            of_all[name] += ms * num
    share = sum(of_all[name] for name in GLOBAL) / total(of_all)
    rest = [total(one["ms"]) - sum(one["ms"].get(name, 0.0) for name in GLOBAL) for one in bins]
    early = np.mean(rest[1:3]) if len(rest) > 2 else rest[0]
    growth_ratio = float(np.mean(rest[-2:]) / early)
    checks = {
        f"cost of a keyframe at the end / at 200, global BA left out: {growth_ratio:.2f}"
        f" (bar {arguments.max_growth})": growth_ratio <= arguments.max_growth,
        f"global BA: {share:.1%} of all (bar {arguments.max_global:.0%})": share
        <= arguments.max_global,
    }
    lines = [f"{'yes' if is_so else 'NO '}  {what}" for what, is_so in checks.items()]
    return all(checks.values()), lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures; 0 if the bars are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keyframes", type=int, default=1000)
    parser.add_argument("--between", type=int, default=2, help="frames between two keyframes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--finish", action="store_true", help="also the end of the run")
    parser.add_argument("--json", type=Path, help="figures of all bins")
    parser.add_argument("--max-growth", type=float, default=1.3)
    parser.add_argument("--max-global", type=float, default=0.2)
    arguments = parser.parse_args(argv)
    pycolmap.logging.minloglevel = 2  # warnings, and what is worse
    figures = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    print(*table(figures["bins"]), sep="\n")
    print(
        f"{figures['registered']} of {arguments.keyframes} registered,"
        f" {figures['error_px']:.3f} px, {figures['ate_ratio']:.4%} of the extent;"
        f" jobs {figures['jobs']}; finish {figures['finish_s']:.1f} s"
    )
    is_kept, lines = compare(figures, arguments)
    print(*lines, sep="\n")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
