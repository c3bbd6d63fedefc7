"""Which frames of a map are exported: ``--frames keyframes``, ``all`` or ``sharpest:N``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from engine.errors import ConfigError
from engine.geometry import invert_pose
from engine.types import Float64Array, Int64Array

_NEAR_RATIO = 0.5  # of the way to the next view: so far the sharpest frame may be from its own


class FrameKind(StrEnum):
    """Which frames."""

    KEYFRAMES = "keyframes"
    ALL = "all"  # that have a pose as good as keyframes have
    SHARPEST = "sharpest"  # some of these, spread over the views


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameChoice:
    """What ``--frames`` says."""

    kind: FrameKind = FrameKind.KEYFRAMES
    number: int = 0  # of the sharpest

    @classmethod
    def parse(cls, text: str) -> FrameChoice:
        """Reads ``keyframes``, ``all`` or ``sharpest:N``.

        Raises:
            ConfigError: it is none of them.
        """
        kind, colon, number = text.partition(":")
        if kind == FrameKind.SHARPEST and number.isdecimal() and int(number[:9]) > 0:
            return cls(kind=FrameKind.SHARPEST, number=int(number[:9]))
        if not colon and kind in (FrameKind.KEYFRAMES, FrameKind.ALL):
            return cls(kind=FrameKind(kind))
        raise ConfigError(
            f"--frames {text}: say keyframes, all, or sharpest:N, such as sharpest:200"
        )


def choose_sharpest(
    poses: Sequence[Float64Array], sharpness: Float64Array, *, depth_map: float, number: int
) -> list[int]:
    """Frames spread over all views, each the sharpest near its view.

    The views are spread first: each next one is the farthest from those before (Gonzalez, 1985),
    so that neither a camera that stands still nor one that comes back takes more than its share.
    Two views differ by the angle between them and by the way between them, in depths of the scene.

    Args:
        poses: cam_from_world (3, 4) of each frame.
        sharpness: (F,) of each frame.
        depth_map: how far away the scene is, in lengths of the map.
        number: of frames; all are taken where there are no more.

    Returns:
        Positions of the frames, ascending.
    """
    if len(poses) <= number:
        return list(range(len(poses)))
    views = _views(poses, depth_map=depth_map)
    centers, nearest, distances = _spread(views, number)
    chosen = []
    for cell, center in enumerate(centers.tolist()):
        to_others = np.linalg.norm(views[np.delete(centers, cell)] - views[center], axis=1)
        reach = _NEAR_RATIO * to_others.min() if len(to_others) else np.inf
        near = np.flatnonzero((nearest == cell) & (distances <= reach))
        near = np.union1d(near, [center])
        chosen.append(int(near[np.argmax(sharpness[near])]))
    return sorted(set(chosen))


def _views(poses: Sequence[Float64Array], *, depth_map: float) -> Float64Array:
    """Poses as points (F, 12) whose distances are angles, and ways in depths of the scene.

    Of two rotations by an angle the matrices differ by 2 sqrt(2) sin(angle / 2).
    """
    rows = []
    for cam_from_world in poses:
        center = invert_pose(cam_from_world)[:, 3] / depth_map
        rows.append(np.concatenate([cam_from_world[:, :3].ravel() / np.sqrt(2.0), center]))
    return np.array(rows)


def _spread(views: Float64Array, number: int) -> tuple[Int64Array, Int64Array, Float64Array]:
    """Points that are far from each other, fewer than asked for where points coincide.

    Returns:
        Their positions (number,); and of each point (F,) which of them is nearest, and how far.
    """
    chosen = [0]
    nearest = np.zeros(len(views), np.int64)
    distances = np.linalg.norm(views - views[0], axis=1)
    while len(chosen) < number and distances.max() > 0.0:
        newest = int(distances.argmax())
        to_newest = np.linalg.norm(views - views[newest], axis=1)
        is_nearer = to_newest < distances
        nearest[is_nearer] = len(chosen)
        distances = np.where(is_nearer, to_newest, distances)
        chosen.append(newest)
    return np.array(chosen), nearest, distances
