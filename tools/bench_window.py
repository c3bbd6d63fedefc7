#!/usr/bin/env python3
"""Measures the window solver on a recorded window and on windows of an image folder.

The recorded window holds the tracks of 16 photos, rough initial cameras and the poses of two
independent reconstructions. It is solved twice, with one focal length for all frames and with one
for each; reprojection error, counts and CPU time are those of the shared one. Windows of a folder
start from nothing but the images: SIFT, ratio test, epipolar verification and union-find make
tracks, two-view geometry the first cameras.

    tools/bench_window.py
    tools/bench_window.py --json
    tools/bench_window.py --images photos/ --reference groundtruth.txt --sizes 8 16 25
    tools/bench_window.py --vggsfm CHECKOUT

Where upstream's VGGSfM is installed, or a checkout of it is named, it solves the same windows; the
JSON object then holds the same keys once more under ``upstream``. What it needs besides the tracks,
initial cameras for windows that start from nothing, is our solution's.

Centre errors are those after the best similarity, in percent of the largest distance of a reference
centre from their mean. All runs use one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters.launch import limit_library_threads
from adapters.matchers.sift import SiftMatcher
from adapters.native_log import native_log_captured
from adapters.windows.vggsfm import open_vggsfm
from engine.config import SiftConfig, TwoViewConfig, WindowConfig
from engine.estimators.two_view_geometry import verify_matches
from engine.geometry import camera_center, invert_pose, rotation_from_quat_xyzw
from engine.ports import WindowSolver
from engine.types import (
    BoolArray,
    Features,
    Float64Array,
    Frame,
    FrameId,
    ImagePair,
    Int64Array,
    MatchRequest,
)
from engine.window_types import WindowEstimate, WindowProblem, WindowStatus
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden/vggsfm_window/window16.npz"
NUM_TIMED = 3  # the fastest counts: the machine has other things to do


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tracks:
    """Tracks through the frames of a folder."""

    tracks_xy: Float64Array  # (S, N, 2)
    is_visible: BoolArray  # (S, N)


# -- the recorded window --------------------------------------------------------------------------


def golden_problem(
    golden: Mapping[str, Any],
    *,
    shares_focal: bool = True,
    with_outliers: bool = False,
    with_poses: bool = True,
    with_focal: bool = True,
) -> WindowProblem:
    """The recorded window as a problem.

    Its pixels have their origin at the centre of the first one, COLMAP's at its corner. The
    principal point stays where the recording has it, half a pixel further in COLMAP's convention
    less half a pixel of the images' centre: at the centre.

    Args:
        golden: the arrays of the file.
        shares_focal: whether all frames share a camera, or have one each.
        with_outliers: the tracks of which a fifth of the observations was moved by 20 to 200 px.
        with_poses: whether it starts from the rough poses, or from nothing.
        with_focal: whether it starts from the rough focal length, or from none.
    """
    is_visible = golden["vis"].astype(np.bool_)
    num_frames = len(is_visible)
    num_cameras = 1 if shares_focal else num_frames
    tracks_xy = golden["tri_out_tracks" if with_outliers else "tracks"]
    return WindowProblem(
        tracks_xy=tracks_xy.astype(np.float64) + 0.5,
        is_visible=is_visible,
        image_sizes=np.tile(golden["image_size"], (num_cameras, 1)),
        camera_idx=np.zeros(num_frames, np.int64) if shares_focal else np.arange(num_frames),
        focal_px=np.full(num_cameras, float(golden["init_focal"]) if with_focal else 0.0),
        cam_from_world=golden["init_extrinsics"] if with_poses else None,
    )


def native_solver(problem: WindowProblem) -> WindowEstimate:
    """The engine's own solver."""
    return solve_window(problem, WindowSolverConfig())


def upstream_solver(root: Path | None) -> WindowSolver | None:
    """Upstream's VGGSfM; None where it is neither installed nor named.

    Raises:
        ConfigError: it is there, and cannot be used.
    """
    if root is None and importlib.util.find_spec("vggsfm") is None:
        return None
    config = WindowConfig(solver="vggsfm", vggsfm_root="" if root is None else str(root))
    return open_vggsfm(config, first_solver=native_solver)


def measure_golden(
    path: Path, *, solve: WindowSolver = native_solver, num_timed: int = NUM_TIMED
) -> dict[str, float | None]:
    """The figures of the recorded window."""
    golden = dict(np.load(path))
    reference = golden["ref_ngp_extrinsics"]
    if num_timed > 1:
        solve(golden_problem(golden))  # warms up
    shared, cpu_s = timed(golden_problem(golden), solve=solve, num_timed=num_timed)
    own, own_cpu_s = timed(
        golden_problem(golden, shares_focal=False), solve=solve, num_timed=num_timed
    )
    moved = solve(golden_problem(golden, with_outliers=True))
    is_good = golden["vis"].astype(np.bool_) & ~golden["tri_out_is_outlier"].astype(np.bool_)
    return {
        "mean_reprojection_px": shared.mean_reprojection_px,
        "num_observations": shared.num_observations,
        "num_points": shared.num_points,
        "centre_error_median_pct_shared_focal": median_error_pct(shared, reference),
        "centre_error_median_pct_per_frame_focal": median_error_pct(own, reference),
        "cpu_s": cpu_s,
        "mean_reprojection_px_per_frame_focal": own.mean_reprojection_px,
        "num_observations_per_frame_focal": own.num_observations,
        "num_points_per_frame_focal": own.num_points,
        "cpu_s_per_frame_focal": own_cpu_s,
        "centre_error_median_pct_with_outliers": median_error_pct(moved, reference),
        "good_kept_pct_with_outliers": 100.0 * float(moved.is_inlier[is_good].mean()),
        "wrong_kept_with_outliers": int((moved.is_inlier & ~is_good).sum()),
    }


def timed(
    problem: WindowProblem, *, solve: WindowSolver, num_timed: int
) -> tuple[WindowEstimate, float]:
    """A solution, and the CPU time of the whole process for the fastest of some."""
    cpu_s = []
    for _ in range(num_timed):
        started_s = time.process_time()
        estimate = solve(problem)
        cpu_s.append(time.process_time() - started_s)
    return estimate, min(cpu_s)


def median_error_pct(estimate: WindowEstimate, reference: Float64Array) -> float | None:
    """Median centre error of a window against reference poses (S, 3, 4); None: it is not solved."""
    if estimate.status is not WindowStatus.SOLVED:
        return None
    return float(np.median(centre_errors_pct(estimate.cam_from_world, reference)))


def centre_errors_pct(
    cam_from_world: Float64Array, reference: Float64Array, *, num_reweightings: int = 0
) -> Float64Array:
    """(S,) errors of camera centres after the similarity that fits them best.

    Args:
        cam_from_world: (S, 3, 4).
        reference: (S, 3, 4), in a frame of reference of its own.
        num_reweightings: steps from least squares towards least distances, which frames that are
            altogether wrong do not pull.
    """
    centers, wanted = camera_center(cam_from_world), camera_center(reference)
    radius = float(np.linalg.norm(wanted - wanted.mean(axis=0), axis=1).max())
    weights = np.ones(len(centers))
    for _ in range(1 + num_reweightings):
        wanted_from_centers = similarity_of(centers, wanted, weights=weights)
        placed = centers @ wanted_from_centers[:, :3].T + wanted_from_centers[:, 3]
        errors = np.linalg.norm(placed - wanted, axis=1)
        weights = 1.0 / (errors + 1e-4 * radius)
    return np.asarray(100.0 * errors / radius)


def similarity_of(
    points_in_a: Float64Array, points_in_b: Float64Array, *, weights: Float64Array
) -> Float64Array:
    """The similarity (3, 4) that best maps points (N, 3) of a to b (Umeyama, 1991)."""
    share = (weights / weights.sum())[:, None]
    mean_a, mean_b = (share * points_in_a).sum(axis=0), (share * points_in_b).sum(axis=0)
    centred_a, centred_b = points_in_a - mean_a, points_in_b - mean_b
    left, values, right = np.linalg.svd((share * centred_b).T @ centred_a)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    rotation = left @ np.diag(signs) @ right
    scale = float((values * signs).sum() / (share * centred_a**2).sum())
    return np.column_stack([scale * rotation, mean_b - scale * rotation @ mean_a])


# -- windows of a folder --------------------------------------------------------------------------


def describe_folder(
    folder: Path, *, matcher: SiftMatcher, limit: int
) -> tuple[list[Features], tuple[int, int]]:
    """The keypoints of the first images of a folder, by name, and the size of the last one."""
    size = (0, 0)
    described: list[Features] = []
    for path in itertools.islice(sorted(folder.iterdir()), limit):
        image = cv2.imread(str(path))
        if image is None:
            continue
        index, size = len(described), (image.shape[1], image.shape[0])
        frame = Frame(
            frame_id=FrameId(index + 1),
            camera_key="folder",
            source=str(folder),
            index=index,
            name=path.name,
            captured_at_s=float(index),
            received_at_s=0.0,
            pixels=cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
        )
        described.append(matcher.describe(frame))
    return described, size


def match_all(
    described: Sequence[Features], *, matcher: SiftMatcher, image_size: tuple[int, int]
) -> dict[tuple[int, int], Int64Array]:
    """Verified matches (M, 2), rows of the keypoints, of all pairs of frames."""
    verified = {}
    for one, other in itertools.combinations(range(len(described)), 2):
        first, second = described[one], described[other]
        request = MatchRequest(
            pair=ImagePair(first.frame_id, second.frame_id),
            first=first,
            second=second,
            query_rows1=np.arange(len(first)),
            query_rows2=np.arange(len(second)),
        )
        (matches,) = matcher.match([request])
        found = verify_matches(matches, image_size=image_size, config=TwoViewConfig())
        if found is not None:
            verified[one, other] = found.inliers.matches_idx
    return verified


def tracks_of(
    described: Sequence[Features],
    verified: Mapping[tuple[int, int], Int64Array],
    *,
    num_frames: int,
) -> Tracks:
    """Tracks of the first frames by union-find; those with two keypoints of one frame are out."""
    starts = np.cumsum([0, *(len(features) for features in described)])
    parent = np.arange(starts[-1])

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = int(parent[node])
        return node

    for (one, other), rows in verified.items():
        if other < num_frames:
            for row1, row2 in rows.tolist():
                parent[root(int(starts[one]) + row1)] = root(int(starts[other]) + row2)
    roots = np.array([root(node) for node in range(int(starts[num_frames]))])
    frame_idx = np.repeat(np.arange(num_frames), np.diff(starts[: num_frames + 1]))
    points_xy = np.concatenate([features.keypoints_xy for features in described[:num_frames]])
    _, track, length = np.unique(roots, return_inverse=True, return_counts=True)
    per_frame = np.zeros((num_frames, len(length)), np.int64)
    np.add.at(per_frame, (frame_idx, track), 1)
    is_track = (length >= 2) & (per_frame.max(axis=0) == 1)
    tracks_xy = np.full((num_frames, len(length), 2), np.nan)
    tracks_xy[frame_idx, track] = points_xy
    return Tracks(tracks_xy=tracks_xy[:, is_track], is_visible=per_frame[:, is_track] > 0)


def read_poses(path: Path) -> dict[int, Float64Array]:
    """Poses cam_from_world (3, 4) by frame index, of a TUM file of camera-to-world poses."""
    poses = {}
    for row in np.atleast_2d(np.loadtxt(path)):
        world_from_cam = np.column_stack([rotation_from_quat_xyzw(row[4:8]), row[1:4]])
        poses[round(float(row[0]))] = invert_pose(world_from_cam)
    return poses


def folder_problems(folder: Path, *, sizes: Sequence[int]) -> list[WindowProblem]:
    """Windows of the first images of a folder."""
    matcher = SiftMatcher(SiftConfig())
    described, image_size = describe_folder(folder, matcher=matcher, limit=max(sizes))
    verified = match_all(described, matcher=matcher, image_size=image_size)
    problems = []
    for size in sizes:
        tracks = tracks_of(described, verified, num_frames=min(size, len(described)))
        problem = WindowProblem(
            tracks_xy=tracks.tracks_xy,
            is_visible=tracks.is_visible,
            image_sizes=np.array([image_size]),
        )
        problems.append(problem)
    return problems


def measure_folder(
    problems: Sequence[WindowProblem],
    *,
    reference: Path | None,
    solve: WindowSolver = native_solver,
) -> list[dict[str, Any]]:
    """One row for each window."""
    poses = {} if reference is None else read_poses(reference)
    return [folder_row(problem, solve(problem), poses) for problem in problems]


def folder_row(
    problem: WindowProblem, estimate: WindowEstimate, poses: Mapping[int, Float64Array]
) -> dict[str, Any]:
    """The figures of one window; centre errors where there are reference poses."""
    row: dict[str, Any] = {
        "num_frames": problem.num_frames,
        "num_tracks": problem.num_tracks,
        "status": str(estimate.status),
        "reason": estimate.reason,
        "num_valid_frames": int(estimate.is_valid.sum()),
        "mean_reprojection_px": estimate.mean_reprojection_px,
        "num_observations": estimate.num_observations,
        "num_points": estimate.num_points,
        "focal_px": float(estimate.focal_px[0]),
        "cpu_s": estimate.cpu_s,
    }
    known = [idx for idx in np.flatnonzero(estimate.is_valid).tolist() if idx in poses]
    if estimate.status is WindowStatus.SOLVED and len(known) >= 4:
        errors_pct = centre_errors_pct(
            estimate.cam_from_world[known],
            np.array([poses[idx] for idx in known]),
            num_reweightings=50,
        )
        row |= {
            "centre_error_median_pct": float(np.median(errors_pct)),
            "centre_error_max_pct": float(errors_pct.max()),
            "num_within_2_pct": int((errors_pct < 2.0).sum()),
            "num_compared": len(known),
        }
    return row


# -- the command ----------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="the recorded window")
    parser.add_argument("--images", type=Path, help="a folder of images to make windows of")
    parser.add_argument("--reference", type=Path, help="TUM poses, camera-to-world, by frame index")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 25])
    parser.add_argument("--vggsfm", type=Path, help="a checkout of upstream's VGGSfM")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the figures."""
    options = parse_arguments(arguments)
    limit_library_threads()
    started_s = time.monotonic()
    upstream = upstream_solver(options.vggsfm)
    with native_log_captured():
        figures: dict[str, Any] = measure_golden(options.golden)
        problems = (
            [] if options.images is None else folder_problems(options.images, sizes=options.sizes)
        )
        if problems:
            figures["windows"] = measure_folder(problems, reference=options.reference)
        if upstream is not None:
            figures["upstream"] = measure_golden(options.golden, solve=upstream, num_timed=1)
        if upstream is not None and problems:
            figures["upstream"]["windows"] = measure_folder(
                problems, reference=options.reference, solve=upstream
            )
    if options.json:
        print(json.dumps(figures))
        return
    print_figures(figures)
    print(f"({time.monotonic() - started_s:.1f} s)")


def print_figures(figures: Mapping[str, Any], *, prefix: str = "") -> None:
    """One line for each figure and each window."""
    for name, value in figures.items():
        if name == "windows":
            for row in value:
                cells = (
                    f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                )
                print(prefix + ", ".join(cells))
        elif name == "upstream":
            print_figures(value, prefix="upstream ")
        else:
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{prefix + name:51s} {text}")


if __name__ == "__main__":
    main()
