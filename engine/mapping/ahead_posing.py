"""Poses of live frames that come while a keyframe is added to the map, by frozen keyframes.

Adding a keyframe takes as long as the map needs, and a live frame must not wait for it. What posing
needs of the keyframes that frames are tracked from is copied before, so another thread can do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.config import RegistrationConfig
from engine.geometry import compose_poses, invert_pose
from engine.mapping.frame_posing import estimate_frame_pose
from engine.types import Float64Array, FrameId, FramePose, Int64Array, TrackedFrame


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PosingReference:
    """A registered keyframe and its points, as they were at a moment."""

    keyframe_id: FrameId
    camera_key: str
    camera: pycolmap.Camera  # a private copy
    cam_from_world: Float64Array  # (3, 4)
    row_of_keypoint: Int64Array  # (N,) row in points3D_in_world, -1 for none
    points3D_in_world: Float64Array  # (P, 3)
    map_number: int
    world_number: int


class AheadPoser:
    """Poses frames by the latest references; on any thread, one call after the other.

    Args:
        registration: of the search for a pose.
        seed: of that search.
    """

    def __init__(self, registration: RegistrationConfig, *, seed: int) -> None:
        self._registration = registration
        self._seed = seed
        self._references: Mapping[FrameId, PosingReference] = {}
        self._last: tuple[FrameId, Float64Array] | None = None  # keyframe, cam_from_keyframe

    def take(self, references: Sequence[PosingReference]) -> None:
        """Takes references in place of those before."""
        self._references = {one.keyframe_id: one for one in references}

    def pose(
        self, tracked: TrackedFrame, *, fallback: TrackedFrame | None
    ) -> tuple[FramePose, str] | None:
        """The pose of a frame and the key of its camera; None where no reference gives one.

        Args:
            tracked: the frame as tracked from its keyframe.
            fallback: the same as tracked from the keyframe before.
        """
        for one in (tracked, fallback):
            reference = None if one is None else self._references.get(one.keyframe_id)
            if one is not None and reference is not None:
                return self._pose(one, reference)
        return None

    def _pose(
        self, tracked: TrackedFrame, reference: PosingReference
    ) -> tuple[FramePose, str] | None:
        rows = reference.row_of_keypoint[tracked.keypoint_idx]
        seen = rows >= 0
        start = reference.cam_from_world
        if self._last is not None and self._last[0] == reference.keyframe_id:
            start = compose_poses(self._last[1], start)
        found = estimate_frame_pose(
            tracked.points_xy[seen],
            reference.points3D_in_world[rows[seen]],
            camera=reference.camera,
            start=start,
            registration=self._registration,
            seed=self._seed,
        )
        if found is None:
            return None
        cam_from_keyframe = compose_poses(
            found.cam_from_world, invert_pose(reference.cam_from_world)
        )
        self._last = reference.keyframe_id, np.asarray(cam_from_keyframe)
        pose = FramePose(
            frame_id=tracked.frame_id,
            index=tracked.index,
            captured_at_s=tracked.captured_at_s,
            cam_from_world=found.cam_from_world,
            is_keyframe=False,
            map_number=reference.map_number,
            world_number=reference.world_number,
        )
        return pose, reference.camera_key
