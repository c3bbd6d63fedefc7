#!/usr/bin/env python3
"""Measures depth maps of finished runs: how right and complete they are, and what they cost.

Of each run folder, every keyframe gets a depth map from the final map. A share of the sparse
points is kept apart: depth is made without them and compared with those that three keyframes or
more see. Runs of the synthetic town are compared with its true depth, too.

    tools/bench_dense.py RUN...
    tools/bench_dense.py RUN... --edge 640 --neighbours 1 --every 4
    tools/bench_dense.py RUN... --pictures /tmp/depth

"Kept" is what at least two images beside the keyframe's own confirm: neighbours that it was
matched with, or depth maps of others that agree. "Alone" is complete by the depth map of one
keyframe, "all" by what any keyframe has kept of a surface. CPU is of one thread; images are
decoded before. "Surfaces" are the points of the run's own ``products/dense.ply`` against the town,
and "reported" is what its dense map cost in all, by its ``summary.json``.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters.exports.dense_ply import read_dense_ply_header, similarity_onto
from adapters.launch import limit_library_threads
from adapters.run_files import read_frame_rows, read_model
from adapters.town.oracle import TrueView
from adapters.town.source import SyntheticTown, parse_town_spec
from adapters.town.world import TownLayout
from engine.config import DenseConfig
from engine.dense.consistency import OtherDepth, compare_depths, with_agreement
from engine.dense.depth import DepthOptions, estimate_depth
from engine.dense_types import DenseImage, DenseView, DepthMap, DepthProblem
from engine.geometry import (
    camera_center,
    compose_poses,
    invert_pose,
    similarity_between_poses,
    transform_points,
)
from engine.output.dense_ply import DENSE_PLY_NAME
from engine.output.depth_store import DepthStore
from engine.types import BoolArray, Float64Array, FrameId, Int64Array, Intrinsics

NUM_NEIGHBOURS = 12  # offered
NUM_COMPARED = 4  # depth maps of others that a depth map is compared with
MIN_TRACK_LENGTH = 3  # of a sparse point that depth is compared with
MIN_ANGLE_RAD = np.deg2rad(3.0)  # of a surface that has to have a depth
PROFILED_EVERY = 4  # keyframes are done again for the CPU by stage
TRUTH_STEP_PX = 6  # of the pixels whose completeness is measured
VERTEX = np.dtype([("xyz", "<f4", 3), ("normal", "<f4", 3), ("rgb", "u1", 3)])  # of dense.ply
STAGES = {
    "neighbours": "rank_neighbours",
    "resize": "working_image",
    "rectify": "image",
    "match": "match_lines",
}


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A finished run."""

    folder: Path
    views: dict[FrameId, DenseView]
    names: dict[FrameId, str]
    track_lengths: dict[int, int]  # by point

    def image(self, frame_id: FrameId) -> DenseImage:
        """The image of a keyframe."""
        pixels = cv2.imread(str(self.folder / "images" / self.names[frame_id]))
        if pixels is None:
            raise SystemExit(f"{self.folder / 'images' / self.names[frame_id]}: not readable")
        return DenseImage(pixels=np.ascontiguousarray(pixels[..., ::-1], np.uint8))


@dataclass(slots=True, kw_only=True, eq=False)
class Errors:
    """Errors of depth relative to depth, signed, and standard deviations claimed."""

    relative: list[Float64Array] = field(default_factory=list)
    sigma: list[Float64Array] = field(default_factory=list)

    def add(self, relative: Float64Array, sigma: Float64Array) -> None:
        """Adds those of a keyframe."""
        self.relative.append(relative)
        self.sigma.append(sigma)

    def report(self) -> dict[str, float]:
        """What is reported of them, in percent."""
        if not sum(map(len, self.relative)):
            return {"num": 0}
        error, sigma = np.concatenate(self.relative), np.concatenate(self.sigma)
        size = np.abs(error)
        return {
            "num": len(size),
            "median": round(100 * float(np.median(size)), 3),
            "bias": round(100 * float(np.median(error)), 3),
            "within_2": round(100 * float(np.mean(size < 0.02)), 2),
            "within_3": round(100 * float(np.mean(size < 0.03)), 2),
            "median_sigmas": round(float(np.median(size / np.maximum(sigma, 1e-9))), 2),
        }


def read_run(folder: Path) -> Run:
    """The views of a run's last snapshot."""
    model = read_model(folder / "latest" / "sparse" / "0")
    views: dict[FrameId, DenseView] = {}
    for image in model.images.values():
        camera = model.camera(image.camera_id)
        seen = [point for point in image.points2D if point.has_point3D()]
        views[FrameId(image.image_id)] = DenseView(
            frame_id=FrameId(image.image_id),
            intrinsics=Intrinsics(
                model=camera.model.name,
                width=camera.width,
                height=camera.height,
                params=tuple(map(float, camera.params)),
            ),
            cam_from_world=np.asarray(image.cam_from_world().matrix()),
            points3D_ids=np.array([point.point3D_id for point in seen], np.int64),
            keypoints_xy=np.array([point.xy for point in seen], np.float64).reshape(-1, 2),
            points3D_in_world=np.array(
                [model.point3D(point.point3D_id).xyz for point in seen], np.float64
            ).reshape(-1, 3),
        )
    return Run(
        folder=folder,
        views=views,
        names={FrameId(image.image_id): image.name for image in model.images.values()},
        track_lengths={key: point.track.length() for key, point in model.points3D.items()},
    )


def without(view: DenseView, point_ids: Int64Array) -> DenseView:
    """A view without some of the map's points."""
    kept = ~np.isin(view.points3D_ids, point_ids)
    return DenseView(
        frame_id=view.frame_id,
        intrinsics=view.intrinsics,
        cam_from_world=view.cam_from_world,
        points3D_ids=view.points3D_ids[kept],
        keypoints_xy=view.keypoints_xy[kept],
        points3D_in_world=view.points3D_in_world[kept],
    )


def problems(run: Run, held_out: Int64Array) -> Iterator[DepthProblem]:
    """A problem for each keyframe, with the most covisible ones, without some points."""
    views = {frame_id: without(view, held_out) for frame_id, view in run.views.items()}
    for frame_id in sorted(views):
        own = views[frame_id].points3D_ids
        shared = Counter(
            {
                other: int(np.isin(view.points3D_ids, own).sum())
                for other, view in views.items()
                if other != frame_id
            }
        )
        best = [views[other] for other, num in shared.most_common(NUM_NEIGHBOURS) if num]
        yield DepthProblem(view=views[frame_id], neighbours=tuple(best))


def compared(maps: Mapping[FrameId, DepthMap], run: Run, problem: DepthProblem) -> DepthMap:
    """The depth map of a keyframe with the votes of those of its neighbours."""
    own = run.views[problem.view.frame_id].cam_from_world
    ids = [view.frame_id for view in problem.neighbours if view.frame_id in maps]
    others = [
        OtherDepth(
            depth_map=maps[other],
            other_from_keyframe=compose_poses(run.views[other].cam_from_world, invert_pose(own)),
        )
        for other in ids[:NUM_COMPARED]
    ]
    depth_map = maps[problem.view.frame_id]
    return with_agreement(depth_map, compare_depths(depth_map, others))


# -- what depth is compared with ------------------------------------------------------------------


def looked_up(depth_map: DepthMap, points_in_cam: Float64Array) -> tuple[Int64Array, Int64Array]:
    """Rows of the points (P, 3) that fall on pixels with a depth, and these pixels, flat."""
    focal_x, focal_y, center_x, center_y = depth_map.pinhole
    height, width = depth_map.depth.shape
    x, y, z = points_in_cam.T
    with np.errstate(divide="ignore", invalid="ignore"):
        column = np.nan_to_num(x / z * focal_x + center_x, nan=-1.0, posinf=-1.0, neginf=-1.0)
        line = np.nan_to_num(y / z * focal_y + center_y, nan=-1.0, posinf=-1.0, neginf=-1.0)
    inside = (z > 0) & (column >= 0) & (column < width) & (line >= 0) & (line < height)
    rows = np.flatnonzero(inside)
    pixels = line[rows].astype(np.int64) * width + column[rows].astype(np.int64)
    known = depth_map.depth.reshape(-1)[pixels] > 0
    return rows[known], pixels[known]


def compare_sparse(run: Run, depth_map: DepthMap, held_out: Int64Array, errors: Errors) -> None:
    """Adds the errors of a depth map at sparse points that were kept apart."""
    view = run.views[depth_map.frame_id]
    lengths = np.array([run.track_lengths[int(key)] for key in view.points3D_ids])
    rows = np.flatnonzero(np.isin(view.points3D_ids, held_out) & (lengths >= MIN_TRACK_LENGTH))
    points = transform_points(view.cam_from_world, view.points3D_in_world[rows])
    found, pixels = looked_up(depth_map, points)
    depth = depth_map.depth.reshape(-1)[pixels].astype(np.float64)
    sigma = depth_map.relative_error.reshape(-1)[pixels].astype(np.float64)
    errors.add(depth / points[found, 2] - 1.0, sigma)


@dataclass(slots=True, kw_only=True, eq=False)
class Town:
    """The truth of a run of the synthetic town."""

    views: dict[FrameId, TrueView]
    layout: TownLayout
    scale: float  # metres in a unit of the map
    errors: Errors = field(default_factory=Errors)
    num_surface: int = 0
    num_alone: int = 0
    num_all: int = 0

    def compare(self, depth_map: DepthMap) -> None:
        """Adds the errors of a depth map."""
        true = self.views[depth_map.frame_id]
        focal_x, focal_y, center_x, center_y = depth_map.pinhole
        lines, columns = np.nonzero(depth_map.depth)
        plane = np.column_stack([columns + 0.5 - center_x, lines + 0.5 - center_y])
        plane /= (focal_x, focal_y)
        true_focal = np.array(true.intrinsics[:2])
        depth = true.depths_at(plane * true_focal + true.intrinsics[2:])
        seen = np.isfinite(depth)
        own = depth_map.depth[lines, columns].astype(np.float64) * self.scale
        sigma = depth_map.relative_error[lines, columns].astype(np.float64)
        # What claims a depth in the sky is off without bound; across edges there is no truth.
        is_sky = ~np.isfinite(
            true.depth_m[
                np.clip(
                    (plane[:, 1] * true_focal[1] + true.intrinsics[3]).astype(int),
                    0,
                    true.size[1] - 1,
                ),
                np.clip(
                    (plane[:, 0] * true_focal[0] + true.intrinsics[2]).astype(int),
                    0,
                    true.size[0] - 1,
                ),
            ]
        )
        kept = seen | is_sky
        error = np.where(seen, own / np.where(seen, depth, 1.0) - 1.0, 10.0)
        self.errors.add(error[kept], sigma[kept])

    def complete(self, maps: Mapping[FrameId, DepthMap], frame_id: FrameId) -> None:
        """Counts the surfaces of a keyframe that have a depth."""
        own = self.views[frame_id]
        width, height = own.size
        steps_x = np.arange(TRUTH_STEP_PX / 2, width, TRUTH_STEP_PX)
        steps_y = np.arange(TRUTH_STEP_PX / 2, height, TRUTH_STEP_PX)
        grid = np.stack(np.meshgrid(steps_x, steps_y), axis=-1).reshape(-1, 2)
        points, depths = own.points_in_world(grid)
        points = points[np.isfinite(depths)]
        from_own = points - camera_center(own.cam_from_world)
        is_surface = np.zeros(len(points), np.bool_)
        is_found = np.zeros(len(points), np.bool_)
        for other_id, other in self.views.items():
            if other_id not in maps:
                continue
            if other_id == frame_id:
                alone = self._finds(maps[other_id], other, points)
                continue
            xy, depth = other.project(points)
            seen = (depth > 0) & other.is_inside(xy)
            true = other.depths_at(np.where(seen[:, None], xy, 0.5))
            seen &= np.isfinite(true) & (
                np.abs(depth / np.where(np.isfinite(true), true, 1.0) - 1) < 0.01
            )
            from_other = points - camera_center(other.cam_from_world)
            cosine = np.einsum("ij,ij->i", from_own, from_other) / (
                np.linalg.norm(from_own, axis=1) * np.linalg.norm(from_other, axis=1)
            )
            is_surface |= seen & (cosine < np.cos(MIN_ANGLE_RAD))
            is_found |= seen & self._finds(maps[other_id], other, points)
        self.num_surface += int(is_surface.sum())
        self.num_alone += int((is_surface & alone).sum())
        self.num_all += int((is_surface & (alone | is_found)).sum())

    def _finds(self, depth_map: DepthMap, view: TrueView, points: Float64Array) -> BoolArray:
        """Whether a depth map has points (P, 3), metres, to 2 percent."""
        in_cam = transform_points(view.cam_from_world, points)
        rows, pixels = looked_up(depth_map, in_cam)
        depth = depth_map.depth.reshape(-1)[pixels] * self.scale
        found = np.zeros(len(points), np.bool_)
        found[rows] = np.abs(depth / in_cam[rows, 2] - 1.0) < 0.02
        return found

    def report(self) -> dict[str, Any]:
        """Errors, and how complete the keyframes are."""
        return {
            **self.errors.report(),
            "complete_alone": round(100 * self.num_alone / max(1, self.num_surface), 1),
            "complete_all": round(100 * self.num_all / max(1, self.num_surface), 1),
        }


def true_town(run: Run) -> Town | None:
    """The truth of a run of the town; None of another run."""
    rows = {row.name: row for row in read_frame_rows(run.folder)}
    sources = {rows[name].source for name in run.names.values()}
    if not all(source.startswith("synthetic:") for source in sources):
        return None
    options = parse_town_spec(sources.pop())
    town = SyntheticTown(options, next_frame_id=iter(()).__next__)
    views: dict[FrameId, TrueView] = {}
    for frame_id, name in run.names.items():
        frame = town.render(rows[name].index)
        views[frame_id] = TrueView(
            depth_m=frame.depth,
            cam_from_world=frame.cam_from_world,
            intrinsics=town.intrinsics,
        )
    ids = sorted(views)
    onto = similarity_between_poses(
        np.stack([run.views[i].cam_from_world for i in ids]),
        np.stack([views[i].cam_from_world for i in ids]),
    )
    if onto is None:
        return None
    scale = float(np.cbrt(np.linalg.det(onto[:, :3])))
    return Town(views=views, layout=town.layout, scale=scale)


def compare_surfaces(run: Run, town: Town) -> dict[str, Any] | None:
    """How far the dense points that a run wrote are from the true surfaces; None without any."""
    path = run.folder / "products" / DENSE_PLY_NAME
    if not path.exists():
        return None
    header = read_dense_ply_header(path)
    vertices = np.fromfile(path, VERTEX, offset=header.num_bytes)
    true_poses = {int(i): view.cam_from_world for i, view in town.views.items()}
    onto = similarity_onto(header, true_poses)
    store = DepthStore(lambda: run.folder)
    stored = [points for i in store.frame_ids() if (points := store.points(i)) is not None]
    if onto is None or not stored:
        return None
    voxel_m = float(np.median(np.concatenate([one.sampling for one in stored]))) * town.scale
    off_m = town.layout.distances_m(transform_points(onto, vertices["xyz"].astype(np.float64)))
    return {
        "points": len(off_m),
        "voxel_m": round(voxel_m, 3),
        "median_m": round(float(np.median(off_m)), 3),
        "within_1_voxel": round(100 * float(np.mean(off_m <= voxel_m)), 2),
        "within_2_voxels": round(100 * float(np.mean(off_m <= 2 * voxel_m)), 2),
    }


def reported(folder: Path) -> dict[str, Any] | None:
    """What the run itself says: loops, keyframes with depth, CPU a keyframe and its share."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    dense, by_stage = summary["dense"], summary["cpu_by_stage_s"]
    num_made = dense["keyframes_with_depth"] + dense["made_again"]
    spent = {stage: by_stage[stage] for stage in ("dense_depth", "dense_fusion")}
    return {
        "loops_closed": summary["loops_closed"],
        "with_depth": dense["keyframes_with_depth"],
        "without": dense["keyframes_without"],
        "made_again": dense["made_again"],
        "cpu_ms": {stage: round(1e3 * used / max(1, num_made), 1) for stage, used in spent.items()},
        "cpu_share": round(100 * sum(spent.values()) / summary["cpu_s"], 1),
    }


# -- measuring ------------------------------------------------------------------------------------


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a run folder."""
    run = read_run(folder)
    rng = np.random.default_rng(0)
    all_ids = np.array(sorted(run.track_lengths), np.int64)
    held_out = all_ids[rng.random(len(all_ids)) < options.held_out]
    depth_options = DepthOptions(edge_px=options.edge, num_neighbours=options.neighbours)
    wanted = list(problems(run, held_out))
    maps: dict[FrameId, DepthMap] = {}
    statuses: Counter[str] = Counter()
    cpu_s: list[float] = []
    num_profiled = 0
    profile = cProfile.Profile(time.thread_time)
    images = {frame_id: run.image(frame_id) for frame_id in run.views}
    for problem in wanted[:: options.every]:
        estimate = estimate_depth(problem, images, depth_options)
        statuses[estimate.status] += 1
        cpu_s.append(estimate.cpu_s)
        if estimate.depth_map is not None:
            maps[problem.view.frame_id] = estimate.depth_map
    for problem in wanted[:: PROFILED_EVERY * options.every]:
        profile.runcall(estimate_depth, problem, images, depth_options)
        num_profiled += 1
    begun_s = time.thread_time()
    kept_maps = {
        problem.view.frame_id: compared(maps, run, problem)
        for problem in wanted
        if problem.view.frame_id in maps
    }
    compare_s = time.thread_time() - begun_s
    kept_maps = {key: confirmed(depth_map) for key, depth_map in kept_maps.items()}
    single, kept = Errors(), Errors()
    town = true_town(run)
    for frame_id, depth_map in maps.items():
        compare_sparse(run, depth_map, held_out, single)
        compare_sparse(run, kept_maps[frame_id], held_out, kept)
        if town is not None:
            town.compare(kept_maps[frame_id])
            town.complete(kept_maps, frame_id)
        if options.pictures is not None:
            draw(depth_map, kept_maps[frame_id], options.pictures / f"{folder.name}_{frame_id}.png")
    num = max(1, len(cpu_s))
    return {
        "run": folder.name,
        "statuses": dict(statuses),
        "sparse_single": single.report(),
        "sparse_kept": kept.report(),
        "town": None if town is None else town.report(),
        "surfaces": None if town is None else compare_surfaces(run, town),
        "reported": reported(folder),
        "filled": share(maps),
        "kept": share(kept_maps),
        "cpu_ms": round(1e3 * (sum(cpu_s) + compare_s) / num, 1),
        "cpu_ms_by_stage": {
            **by_stage(profile, num_profiled),
            "compare": round(1e3 * compare_s / num, 1),
        },
    }


def confirmed(depth_map: DepthMap) -> DepthMap:
    """What two images or more confirm."""
    is_kept = depth_map.num_agreeing >= 2
    return DepthMap(
        frame_id=depth_map.frame_id,
        pinhole=depth_map.pinhole,
        depth=depth_map.depth * is_kept,
        relative_error=depth_map.relative_error * is_kept,
        num_agreeing=depth_map.num_agreeing * is_kept,
        colors=depth_map.colors,
        neighbour_ids=depth_map.neighbour_ids,
        neighbour_from_keyframe=depth_map.neighbour_from_keyframe,
    )


def share(maps: Mapping[FrameId, DepthMap]) -> float:
    """The mean share of pixels with a depth, percent."""
    shares = [float((depth_map.depth > 0).mean()) for depth_map in maps.values()]
    return round(100 * float(np.mean(shares)), 1) if shares else 0.0


def by_stage(profile: cProfile.Profile, num: int) -> dict[str, float]:
    """CPU milliseconds a keyframe of the stages that are functions of their own."""
    spent = {stage: 0.0 for stage in STAGES}
    for (path, _, name), figures in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for stage, function in STAGES.items():
            if name == function and "dense" in path:
                spent[stage] += figures[3]
    return {stage: round(1e3 * seconds / num, 1) for stage, seconds in spent.items()}


def draw(depth_map: DepthMap, kept: DepthMap, path: Path) -> None:
    """Writes image, depth and what is kept of it side by side; near is red."""
    known = depth_map.depth > 0
    inverse = np.zeros(depth_map.depth.shape, np.float32)
    np.divide(1.0, depth_map.depth, out=inverse, where=known)
    low, high = np.percentile(inverse[known], [2, 98])
    levels = np.clip((inverse - low) / max(high - low, 1e-9) * 230 + 25, 0, 255).astype(np.uint8)
    colors = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)
    parts = [depth_map.colors[..., ::-1]]
    for is_shown in (known, kept.depth > 0):
        parts.append(np.where(is_shown[..., None], colors, 0).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.hstack(parts))


def main() -> None:
    """Prints a line a run, or all figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--edge", type=int, default=DenseConfig().edge_px, help="px")
    parser.add_argument("--neighbours", type=int, default=DenseConfig().neighbours)
    parser.add_argument("--held-out", type=float, default=0.3, help="share of sparse points")
    parser.add_argument("--every", type=int, default=1, help="only every so many keyframes")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of the depth maps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    limit_library_threads()
    cv2.setNumThreads(1)
    for folder in options.runs:
        figures = measure(folder, options)
        if options.json:
            print(json.dumps(figures))
        else:
            print(figures.pop("run"))
            for key, value in figures.items():
                print(f"    {key}: {value}")


if __name__ == "__main__":
    main()
