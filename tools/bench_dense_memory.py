#!/usr/bin/env python3
"""Measures memory, disk and CPU of a dense map as it grows, with the depth maps of a finished run.

    tools/bench_dense_memory.py RUN --keyframes 1000 --work /tmp/grown

The run's depth maps, as they are stored, are added again and again under new numbers, each time at
another place, until the dense map has so many keyframes. As a run does, views are shown all of it
every few keyframes, and its points are fused into one file at the end. Memory is ``RssAnon`` of
this process, from ``/proc``: Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters.launch import limit_library_threads
from adapters.run_files import read_model
from engine.config import DenseConfig
from engine.dense.dense_map import DenseMap
from engine.dense_types import DenseView, DepthMap, DepthProblem, KeyframePoses, first_param
from engine.estimators.lenses import border_rays
from engine.geometry import camera_center
from engine.output.dense_products import DENSE_PLY, DenseWorld, write_dense_points
from engine.output.depth_store import DepthStore
from engine.output.run_folder import DENSE_FOLDER
from engine.types import Float64Array, FrameId, Intrinsics, Verdict

NUM_NEIGHBOURS = 6
SHOWN_EVERY = 10  # keyframes
STEP_RATIO = 1.5  # of the extent of the run's cameras, between two places


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """A keyframe of the grown dense map."""

    view: DenseView
    rays: Float64Array  # (8, 3) to the border of its image


def keyframes(folder: Path) -> Iterator[tuple[Placed, DepthMap]]:
    """The run's keyframes with depth, at one place after the other, without an end."""
    store, model = DepthStore(lambda: folder), read_model(folder / "latest" / "sparse" / "0")
    ids = [i for i in store.frame_ids() if i in model.images]
    if not ids:
        raise SystemExit(f"{folder}: its dense map has no keyframe")
    poses = {i: np.asarray(model.image(i).cam_from_world().matrix()) for i in ids}
    extent = float(np.ptp(camera_center(np.array(list(poses.values()))), axis=0).max())
    round_number = 0
    while True:
        shift = np.array([STEP_RATIO * extent * round_number, 0.0, 0.0])
        first_id = round_number * (max(ids) + 1)
        for i in ids:
            stored = store.depth_map(i)
            if stored is None:
                raise SystemExit(f"{folder}: the depth of keyframe {i} cannot be read")
            camera = model.camera(model.image(i).camera_id)
            pose = poses[i].copy()
            pose[:, 3] -= pose[:, :3] @ shift
            frame_id = FrameId(first_id + i)
            view = DenseView(
                frame_id=frame_id,
                intrinsics=Intrinsics(
                    model=camera.model.name,
                    width=camera.width,
                    height=camera.height,
                    params=tuple(map(float, camera.params)),
                ),
                cam_from_world=pose,
                points3D_ids=np.zeros(0, np.int64),
                keypoints_xy=np.zeros((0, 2)),
                points3D_in_world=np.zeros((0, 3)),
            )
            moved = replace(
                stored, frame_id=frame_id, neighbour_ids=stored.neighbour_ids + first_id
            )
            yield Placed(view=view, rays=border_rays(camera)), moved
        round_number += 1


def all_poses(added: list[Placed]) -> KeyframePoses:
    """Where all keyframes are."""
    return KeyframePoses(
        frame_ids=np.array([one.view.frame_id for one in added], np.int64),
        cam_from_world=np.array([one.view.cam_from_world for one in added]),
        focal_px=np.array([first_param(one.view.intrinsics.params) for one in added]),
        border_rays=np.array([one.rays for one in added]),
    )


def rss_mb() -> float:
    """Anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


def grow(run: Path, work: Path, num_keyframes: int) -> Iterator[dict[str, Any]]:
    """Figures with a tenth, half and all of the keyframes, then of their points in one file."""
    (work / DENSE_FOLDER).mkdir(parents=True)
    dense_map = DenseMap(DepthStore(lambda: work))
    source = keyframes(run)
    added: list[Placed] = []
    watched = {max(1, num_keyframes // 10), max(1, num_keyframes // 2), num_keyframes}
    begun_mb, add_s, peak_mb = rss_mb(), 0.0, 0.0
    while len(added) < num_keyframes:
        one, depth_map = next(source)
        neighbours = tuple(other.view for other in reversed(added[-NUM_NEIGHBOURS:]))
        since_s = time.thread_time()
        dense_map.add(depth_map, DepthProblem(view=one.view, neighbours=neighbours))
        add_s += time.thread_time() - since_s
        added.append(one)
        if len(added) % SHOWN_EVERY and len(added) not in watched:
            continue
        since_s = time.thread_time()
        cloud = dense_map.cloud(dense_map.placed(all_poses(added)))
        show_s = time.thread_time() - since_s
        peak_mb = max(peak_mb, rss_mb())
        if len(added) in watched:
            yield {
                "keyframes": len(added),
                "mb": round(rss_mb() - begun_mb, 1),
                "peak_mb": round(peak_mb - begun_mb, 1),
                "points": dense_map.num_points,
                "shown_points": sum(len(chunk.xyz_in_cam) for chunk in cloud.chunks),
                "ms_to_add": round(1e3 * add_s / len(added), 1),
                "ms_to_place_all": round(1e3 * show_s, 1),
            }
    yield fused(dense_map, all_poses(added), work, begun_mb)


def fused(dense_map: DenseMap, poses: KeyframePoses, work: Path, begun_mb: float) -> dict[str, Any]:
    """Figures of the points of all keyframes in one file."""
    peaks = [0.0]
    since_s = time.thread_time()
    num_points = write_dense_points(
        work,
        dense_map.points(dense_map.placed(poses)),
        DenseWorld(poses=poses, origin=None, verdict=Verdict()),
        DenseConfig(),
        between=lambda: peaks.append(rss_mb()),
    )
    stored = sum(path.stat().st_size for path in (work / DENSE_FOLDER).iterdir())
    num = len(poses.frame_ids)
    return {
        "fused_points": num_points,
        "peak_mb": round(max(peaks) - begun_mb, 1),
        "ms_a_keyframe": round(1e3 * (time.thread_time() - since_s) / num, 1),
        "file_mb": round((work / DENSE_PLY).stat().st_size / 1e6, 1),
        "stored_mb_a_keyframe": round(stored / 1e6 / num, 2),
    }


def main() -> None:
    """Prints a line of JSON a size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--keyframes", type=int, default=1000)
    parser.add_argument("--work", type=Path, required=True, help="a new folder, deleted at the end")
    options = parser.parse_args()
    limit_library_threads()
    cv2.setNumThreads(1)
    options.work.mkdir(parents=True)
    try:
        for figures in grow(options.run, options.work, options.keyframes):
            print(json.dumps(figures), flush=True)
    finally:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
