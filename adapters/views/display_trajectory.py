"""Display trajectory: the path of the camera through every frame of a map that moves."""

from __future__ import annotations

import numpy as np

from adapters.views.display_parts import Part, split_parts
from engine.types import Float32Array, Float64Array, Int64Array

FRAMES_PER_PART = 128
MAX_STEP_RATIO = 20.0  # a step this many times the median one is a gap, not a motion


class DisplayTrajectory:
    """Positions of all frames, in order of their ids.

    A frame's position is reported once, when it is posed. Bundle adjustment, loop closures and new
    starts move the map afterwards: every frame is shifted by its neighbouring keyframes'
    displacements, linearly in between. So the path always runs through the current keyframes.
    """

    def __init__(self) -> None:
        self._reported: dict[int, tuple[float, float, float]] = {}
        self._tail: list[tuple[float, float, float]] = []
        self._keyframe_ids: Int64Array = np.zeros(0, dtype=np.int64)
        self._keyframe_centers: Float64Array = np.zeros((0, 3))

    def add(self, frame_id: int, center_in_world: tuple[float, float, float]) -> None:
        """Adds the first known position of a frame."""
        self._reported[frame_id] = center_in_world
        self._tail.append(center_in_world)

    def forget(self) -> None:
        """Forgets all frames: another map takes the place of the one that they were posed in."""
        self._reported.clear()
        self._tail.clear()

    def move(self, keyframe_ids: Int64Array, centers_in_world: Float64Array) -> None:
        """Sets the keyframes (K,) and their current positions (K, 3) in the map."""
        order = np.argsort(keyframe_ids)
        self._keyframe_ids = keyframe_ids[order]
        self._keyframe_centers = centers_in_world[order]

    def positions(self) -> tuple[Int64Array, Float64Array]:
        """Frame ids (N,), ascending, and the current positions (N, 3) of all posed frames."""
        ids = np.array(sorted(self._reported), dtype=np.int64)
        reported = np.array([self._reported[frame_id] for frame_id in ids.tolist()]).reshape(-1, 3)
        shared, rows, keyframe_rows = np.intersect1d(
            ids, self._keyframe_ids, assume_unique=True, return_indices=True
        )
        if not len(shared):
            return ids, reported
        displacements = self._keyframe_centers[keyframe_rows] - reported[rows]
        shifts = [np.interp(ids, shared, displacements[:, axis]) for axis in range(3)]
        return ids, reported + np.stack(shifts, axis=1)

    def parts(self) -> dict[int, Part]:
        """The path as segments (M, 2, 3), in parts of consecutive frames; gaps are left out."""
        ids, positions = self.positions()
        if len(ids) < 2:
            return {}
        steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        moving = steps[steps > 0.0]
        joined = steps <= MAX_STEP_RATIO * (float(np.median(moving)) if len(moving) else 0.0)
        segments = np.stack([positions[:-1], positions[1:]], axis=1).astype(np.float32)
        return split_parts(ids[1:][joined] // FRAMES_PER_PART, segments[joined])

    def tail(self) -> Float32Array:
        """The frames posed since the parts were drawn last, as a polyline (M, 3)."""
        return np.array(self._tail, dtype=np.float32).reshape(-1, 3)

    def cut_tail(self) -> None:
        """Starts a new tail where the old one ends."""
        del self._tail[:-1]
