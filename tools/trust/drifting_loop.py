"""Closes a circuit whose scale shrank on the way, and prints how far off it was and is.

A camera drives around a block between facades, 400 keyframes. Its map is that of the truth but for
a similarity that shrinks steadily to 0.9, so that the ends lie far apart; the true pairs between
the ends contradict it. There are no images: keypoints are projected points, with noise.

Usage: drifting_loop.py [--seed N] [--keyframes N] [--scale S] -> one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np
import pycolmap

from engine.config import Config, GlobalBundleAdjustmentConfig
from engine.events import Event
from engine.geometry import camera_center, transform_points
from engine.mapping.model.growth import GrowthConfig, adjust_in_place
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.loop_closing import LoopClosing
from engine.types import (
    Features,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    PairReason,
    VerifiedPair,
)

_WIDTH, _HEIGHT, _FOCAL_PX = 640, 480, 400.0
_STEP_M = 1.0  # between keyframes
_EYE_M = 1.7
_STREET_M = 6.0  # from its middle to the facades
_FACADE_M = 9.0  # their height
_DENSITY = 0.9  # points per square metre
_RANGE_M = (1.5, 22.0)
_NOISE_PX = 0.5
_MAX_GAP = 5  # keyframes between which there are pairs along the way
_NUM_ENDS = 12  # keyframes at either end that see each other
_MIN_MATCHES = 25
_NUM_ADJUSTMENTS = 2
_CAMERA_KEY = "camera"


def circuit(num: int) -> Float64Array:
    """Poses (num, 3, 4) along a circle, which the last ones begin to drive again; looking ahead."""
    radius = _STEP_M * (num - _NUM_ENDS) / (2.0 * np.pi)
    angles = _STEP_M * np.arange(num) / radius
    sways = 0.4 * np.sin(angles * 17.0)
    reach = radius + sways
    centers = np.column_stack(
        [reach * np.cos(angles), reach * np.sin(angles), _EYE_M + 0.1 * np.sin(angles * 23.0)]
    )
    headings = angles + np.pi / 2.0 + 0.15 * np.sin(angles * 11.0)
    forward = np.column_stack([np.cos(headings), np.sin(headings), np.zeros(num)])
    down = np.tile((0.0, 0.0, -1.0), (num, 1))
    rotations = np.stack([np.cross(down, forward), down, forward], axis=1)
    return np.concatenate([rotations, -rotations @ centers[:, :, None]], axis=2)


def street(num: int, rng: np.random.Generator) -> Float64Array:
    """Points (P, 3) on the street of the circuit and on the facades along it."""
    radius = _STEP_M * (num - _NUM_ENDS) / (2.0 * np.pi)
    parts = []
    for reach in (radius - _STREET_M, radius + _STREET_M):
        count = int(_DENSITY * 2.0 * np.pi * reach * _FACADE_M)
        parts.append((rng.normal(reach, 0.3, count), rng.uniform(0.0, _FACADE_M, count)))
    count = int(_DENSITY * 4.0 * np.pi * radius * _STREET_M)
    across = rng.uniform(-_STREET_M, _STREET_M, count)
    parts.append((radius + across, np.zeros(count)))
    reach, height = (np.concatenate(column) for column in zip(*parts, strict=True))
    angles = rng.uniform(0.0, 2.0 * np.pi, len(reach))
    return np.column_stack([reach * np.cos(angles), reach * np.sin(angles), height])


def drifted(poses: Float64Array, *, scale: float) -> Float64Array:
    """Poses (N, 3, 4) whose steps shrink steadily, to ``scale`` at the end."""
    centers = camera_center(poses)
    scales = scale ** (np.arange(len(poses)) / (len(poses) - 1))
    steps = scales[:-1, None] * np.diff(centers, axis=0)
    moved = np.concatenate([centers[:1], centers[0] + np.cumsum(steps, axis=0)])
    return np.concatenate([poses[:, :, :3], -poses[:, :, :3] @ moved[:, :, None]], axis=2)


def _views(
    poses: Float64Array, points: Float64Array, camera: pycolmap.Camera, rng: np.random.Generator
) -> Iterator[tuple[Int64Array, Float64Array]]:
    """What each keyframe sees: points (N,) and where, (N, 2) px."""
    for cam_from_world in poses:
        in_cam = transform_points(cam_from_world, points)
        near = (in_cam[:, 2] > _RANGE_M[0]) & (np.linalg.norm(in_cam, axis=1) < _RANGE_M[1])
        seen = np.flatnonzero(near)
        points_xy = np.asarray(camera.img_from_cam(in_cam[seen]))
        points_xy = points_xy + rng.normal(scale=_NOISE_PX, size=points_xy.shape)
        inside = ((points_xy > 0) & (points_xy < (_WIDTH, _HEIGHT))).all(axis=1)
        yield seen[inside], points_xy[inside]


def _keyframe(number: int, points_xy: Float64Array) -> Keyframe:
    frame_id = FrameId(number + 1)
    features = Features(
        frame_id=frame_id,
        keypoints_xy=points_xy,
        descriptors=np.zeros((len(points_xy), 128), np.uint8),
        scales=np.ones(len(points_xy), np.float32),
        colors=np.zeros((len(points_xy), 3), np.uint8),
    )
    return Keyframe(
        frame_id=frame_id,
        camera_key=_CAMERA_KEY,
        index=number,
        name=f"{number:06d}.jpg",
        width=_WIDTH,
        height=_HEIGHT,
        captured_at_s=float(number),
        received_at_s=float(number),
        features=features,
    )


def _pair(first: int, second: int, seen: list[Int64Array]) -> VerifiedPair | None:
    _, rows1, rows2 = np.intersect1d(seen[first], seen[second], return_indices=True)
    if len(rows1) < _MIN_MATCHES:
        return None
    return VerifiedPair(
        pair=ImagePair(FrameId(first + 1), FrameId(second + 1)),
        reason=PairReason.EXHAUSTIVE,
        inlier_matches_idx=np.column_stack([rows1, rows2]).astype(np.uint32),
        num_matches=len(rows1),
        fundamental=np.zeros((3, 3)),
        homography_inlier_ratio=0.3,
    )


def drifted_map(poses: Float64Array, *, scale: float, seed: int) -> SparseMap:
    """A map of the circuit that drifted, with the pairs between its ends, of which it made no use.

    Args:
        poses: (N, 3, 4) the true ones.
        scale: of the last keyframe against the first.
        seed: of points and noise.
    """
    config = Config()
    rng = np.random.default_rng(seed)
    camera = pycolmap.Camera(
        model="SIMPLE_RADIAL",
        width=_WIDTH,
        height=_HEIGHT,
        params=[_FOCAL_PX, _WIDTH / 2, _HEIGHT / 2, 0.0],
    )
    sparse_map = SparseMap(
        triangulation=config.triangulation, registration=config.registration, seed=0
    )
    sparse_map.add_camera(_CAMERA_KEY, camera)
    num = len(poses)
    seen: list[Int64Array] = []
    for number, (point_ids, points_xy) in enumerate(_views(poses, street(num, rng), camera, rng)):
        seen.append(point_ids)
        near = range(max(0, number - _MAX_GAP), number)
        ends = range(_NUM_ENDS) if number >= num - _NUM_ENDS else range(0)
        pairs = (_pair(other, number, seen) for other in sorted({*near, *ends}))
        sparse_map.add_keyframe(
            _keyframe(number, points_xy), [pair for pair in pairs if pair is not None]
        )
    moved = drifted(poses, scale=scale)
    sparse_map.place({FrameId(number + 1): pose for number, pose in enumerate(moved)})
    for frame_id in sparse_map.registered_ids:
        sparse_map.triangulate(frame_id)
    sparse_map.filter_all()
    return sparse_map


def ate_percent(sparse_map: SparseMap, poses: Float64Array) -> float:
    """Root mean square of camera centres after the best similarity, % of the circuit's extent."""
    frame_ids = sparse_map.registered_ids
    found = camera_center(np.array([sparse_map.cam_from_world(i) for i in frame_ids]))
    true = camera_center(poses[np.array(frame_ids) - 1])
    fitted = pycolmap.estimate_sim3d(found, true)
    if fitted is None:
        return float("inf")
    offsets = transform_points(np.asarray(fitted.matrix()), found) - true
    extent = float(np.linalg.norm(np.ptp(camera_center(poses), axis=0)))
    return 100.0 * float(np.sqrt((offsets**2).sum(axis=1).mean())) / extent


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keyframes", type=int, default=400)
    parser.add_argument("--scale", type=float, default=0.9)
    given = parser.parse_args()
    pycolmap.logging.minloglevel = 2
    config = Config()
    growth = GrowthConfig(
        min_inlier_ratio=config.registration.min_inlier_ratio,
        local_bundle_adjustment=config.local_bundle_adjustment,
        global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
        num_threads=1,
    )
    poses = circuit(given.keyframes)
    sparse_map = drifted_map(poses, scale=given.scale, seed=given.seed)
    figures: dict[str, object] = {"before_percent": round(ate_percent(sparse_map, poses), 4)}
    events: list[Event] = []
    loops = LoopClosing(
        config.loops,
        growth=growth,
        min_inliers=config.registration.min_inliers,
        seed=config.runtime.seed,
        emit=events.append,
    )
    closed = loops.correct(sparse_map, is_final=True) or sparse_map
    for _ in range(_NUM_ADJUSTMENTS):
        closed.retriangulate()
        adjust_in_place(closed, config=growth)
    figures["after_percent"] = round(ate_percent(closed, poses), 4)
    figures["registered"] = closed.num_registered
    figures["events"] = [
        {key: value for key, value in event.as_record().items() if key != "at_s"}
        for event in events
    ]
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    main()
