"""Overlays: what is in a camera's pictures and not in the world, kept out of verified pairs.

Each camera has an `OverlayGrid`. What it covers is left out before a pair is verified; what only
one pair shows to be fixed to the camera is left out of that pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.estimators.stationary_matches import (
    MotionEvidence,
    judge_by_motion,
    verify_by_motion,
)
from engine.estimators.two_view_geometry import PairVerifier, VerifiedMatches
from engine.tracking.overlay_grid import OverlayGrid
from engine.types import BoolArray, Float64Array, ImagePair, Keyframe, PairMatches

_GROWTH_RATIO = 1.1  # times the keyframes at the last change of a camera's cover

CameraSize = tuple[str, int, int]  # camera key, width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """The parts of a camera's image that overlays cover."""

    camera_key: str
    share: float  # of the image
    boxes: tuple[tuple[int, int, int, int], ...]  # left, top, right, bottom in px; largest first
    num_keyframes: int  # of the camera by now


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OverlayMask:
    """What a camera's overlays leave of its images, and which images these are."""

    mask: BoolArray  # (H, W), True where a pixel may be used
    image_names: tuple[str, ...]


class Overlays:
    """The overlays of all cameras. One thread at a time."""

    def __init__(self) -> None:
        self._grids: dict[CameraSize, OverlayGrid] = {}
        self._num_keyframes: dict[CameraSize, int] = {}
        self._next_change: dict[CameraSize, float] = {}  # keyframes of the camera by then
        self._num_at_facts: dict[CameraSize, int] = {}  # keyframes when facts were taken last
        self._counted: set[ImagePair] = set()  # pairs whose matches count as evidence

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Counts a keyframe of its camera."""
        camera = _camera(keyframe)
        self._num_keyframes[camera] = self._num_keyframes.get(camera, 0) + 1

    def covers(self, keyframe: Keyframe, points_xy: Float64Array) -> BoolArray:
        """Which points (N, 2) of a keyframe lie under an overlay of its camera."""
        found = self._grids.get(_camera(keyframe))
        if found is None or not found.share:
            return np.zeros(len(points_xy), np.bool_)
        return found.covers(points_xy)

    def masks(self, keyframes: Iterable[Keyframe]) -> list[OverlayMask]:
        """What overlays leave of the images of keyframes; nothing of cameras without any."""
        names: dict[CameraSize, list[str]] = {}
        for keyframe in keyframes:
            names.setdefault(_camera(keyframe), []).append(keyframe.name)
        return [
            OverlayMask(mask=self._grids[camera].mask(), image_names=tuple(named))
            for camera, named in names.items()
            if camera in self._grids and self._grids[camera].share
        ]

    def take_facts(self) -> dict[str, Any]:
        """What was found out by camera and size, for a run that goes on.

        Of a camera with evidence, and only when its cover grew, or it has a tenth more keyframes
        than when it was taken last: counts change with every pair.
        """
        facts: dict[str, Any] = {}
        for camera, grid in self._grids.items():
            num = self._num_keyframes.get(camera, 0)
            grew = self._next_change.get(camera, 0.0) == num * _GROWTH_RATIO
            is_due = num > self._num_at_facts.get(camera, 0) * _GROWTH_RATIO
            if not grid.is_empty and (grew or is_due):
                self._num_at_facts[camera] = num
                counts, seen_in = grid.state()
                facts[f"overlay counts/{_name(camera)}"] = counts
                facts[f"overlay/{_name(camera)}"] = {
                    "keyframes": seen_in,
                    "next_change": self._next_change.get(camera, 0.0),
                }
        return facts

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with the facts of cameras whose keyframes were added; others are left out."""
        for camera in self._num_keyframes:
            counts = facts.get(f"overlay counts/{_name(camera)}")
            found = facts.get(f"overlay/{_name(camera)}")
            if counts is not None and found is not None:
                self._grids[camera] = OverlayGrid(camera[1:])
                self._grids[camera].restore(counts, found["keyframes"])
                self._next_change[camera] = float(found["next_change"])

    def verify(
        self,
        matches: PairMatches,
        first: Keyframe,
        second: Keyframe,
        *,
        verifier: PairVerifier,
        learns: bool = True,
    ) -> tuple[PairMatches, VerifiedMatches | None]:
        """Verifies a pair's matches without those of overlays, and learns from what it finds.

        Args:
            matches: tentative matches.
            first: the first keyframe of the pair.
            second: the second.
            verifier: of the pair.
            learns: whether what stays counts as evidence, unless some of the pair counts already.

        Returns:
            The matches that may show the world, and those of them that agree on one geometry.
        """
        if not verifier.config.find_overlays:
            return matches, verifier.verify(matches)
        is_covered = self.covers(first, matches.points1_xy)
        is_covered |= self.covers(second, matches.points2_xy)
        visible = matches.take(~is_covered) if is_covered.any() else matches
        if _camera(first) != _camera(second):
            return visible, verifier.verify(visible)
        grid = self._grid(first)
        learns = learns and matches.pair not in self._counted
        found = verify_by_motion(visible, verifier=verifier)
        verified: VerifiedMatches | None
        if found is None:
            visible = grid.without_suspects(visible, image_size=verifier.image_size)
            verified = verifier.verify(visible)
        else:
            verified, judged = found
            if learns:
                self._count(grid, visible, judged)
            visible = visible.take(~judged.is_fixed)
            verified = self._without_suspects(verified, grid, verifier=verifier)
        if learns and verified is not None and grid.has_evidence:
            rest = [matches.take(is_covered)] if is_covered.any() else []
            for group in [*rest, verified.inliers] if found is None else rest:
                evidence = judge_by_motion(group, verified, verifier=verifier)
                if evidence is not None:
                    self._count(grid, group, evidence)
        return visible, verified

    def _count(self, grid: OverlayGrid, matches: PairMatches, judged: MotionEvidence) -> None:
        grid.add(matches.pair, matches, judged)
        self._counted.add(matches.pair)

    def _without_suspects(
        self, verified: VerifiedMatches, grid: OverlayGrid, *, verifier: PairVerifier
    ) -> VerifiedMatches | None:
        """Verified matches without those that stay where some did before; None if few are left."""
        inliers = grid.without_suspects(verified.inliers, image_size=verifier.image_size)
        if len(inliers) < verifier.config.min_inliers:
            return None
        return replace(verified, inliers=inliers)

    def update(self) -> tuple[Overlay, ...]:
        """The overlays of the cameras whose cover grew.

        A cover does not change again before its camera has a tenth more keyframes.
        """
        for grid in self._grids.values():
            grid.update_suspects()
        grown = [camera for camera in self._due() if self._grids[camera].update_cover()]
        for camera in grown:
            self._next_change[camera] = self._num_keyframes[camera] * _GROWTH_RATIO
        return tuple(
            Overlay(
                camera_key=camera[0],
                share=self._grids[camera].share,
                boxes=self._grids[camera].boxes(),
                num_keyframes=self._num_keyframes[camera],
            )
            for camera in grown
        )

    def _due(self) -> list[CameraSize]:
        return [
            camera
            for camera in self._grids
            if self._num_keyframes.get(camera, 0) >= self._next_change.get(camera, 0.0)
        ]

    def _grid(self, keyframe: Keyframe) -> OverlayGrid:
        camera = _camera(keyframe)
        if camera not in self._grids:
            self._grids[camera] = OverlayGrid((keyframe.width, keyframe.height))
        return self._grids[camera]


def _name(camera: CameraSize) -> str:
    camera_key, width, height = camera
    return f"{camera_key}/{width}x{height}"


def _camera(keyframe: Keyframe) -> CameraSize:
    return keyframe.camera_key, keyframe.width, keyframe.height
