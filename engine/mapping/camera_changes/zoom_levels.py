"""Zoom levels: keyframes of one camera by their focal length, and what their pairs vote for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pycolmap

from engine.estimators.calibration_votes import (
    CalibrationVote,
    GuessedView,
    cost_of,
    has_vote,
    vote_on,
)
from engine.types import FrameId, VerifiedPair

LEVEL_GAP = 0.07  # logs of focal lengths that differ by less are one level
MIN_APART = 0.04  # log of the factor between focal lengths that a map keeps apart

_MAX_LEVELS = 8
_JOINED_VOTE_RATIO = 1.05  # of the cost of the votes of the pairs concerned, to join levels
_TINY_COST = 1e-4  # below it pairs fit as well as they can
_MOVED_VOTE_RATIO = 0.8  # of the cost of a keyframe's votes that another level must have
_MAX_SWEEPS = 3  # over all keyframes, while some change their level
_BETTER_VOTE_RATIO = 0.93  # of the cost of the votes without a split
_MIN_VOTES_PER_LEVEL = 3  # pairs of keyframes that change their zoom, for each further level
_MAX_VOTE_COST = 0.11  # near the bound of the votes nothing fits
_MAX_VOTING_PAIRS = 400  # the strongest ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoomLevel:
    """Keyframes of one focal length, and the log of its ratio to that of the largest level."""

    frame_ids: tuple[FrameId, ...]
    log_zoom: float


def levels_of(log_zoom: Mapping[FrameId, float]) -> list[ZoomLevel]:
    """Keyframes by their zoom."""
    groups: list[list[FrameId]] = []
    for frame_id in sorted(log_zoom, key=lambda i: (log_zoom[i], i)):
        if groups and log_zoom[frame_id] - log_zoom[groups[-1][-1]] < LEVEL_GAP:
            groups[-1].append(frame_id)
        else:
            groups.append([frame_id])
    return [
        ZoomLevel(
            frame_ids=tuple(sorted(group)),
            log_zoom=float(np.mean([log_zoom[i] for i in group])),
        )
        for group in groups
    ]


def join_levels(levels: Sequence[ZoomLevel], one: ZoomLevel, other: ZoomLevel) -> list[ZoomLevel]:
    """Levels with two of them as one, at the zoom of their mean keyframe."""
    sizes = [len(one.frame_ids), len(other.frame_ids)]
    joined = ZoomLevel(
        frame_ids=tuple(sorted((*one.frame_ids, *other.frame_ids))),
        log_zoom=float(np.average([one.log_zoom, other.log_zoom], weights=sizes)),
    )
    return [level for level in levels if level not in (one, other)] + [joined]


def largest_first(levels: Sequence[ZoomLevel]) -> list[ZoomLevel]:
    """The largest level first, and zooms relative to it."""
    ordered = sorted(levels, key=lambda level: (-len(level.frame_ids), level.frame_ids))
    return [replace(one, log_zoom=one.log_zoom - ordered[0].log_zoom) for one in ordered]


def joined_to_few(levels: Sequence[ZoomLevel]) -> list[ZoomLevel]:
    """Levels with the nearest joined, until they are few enough to vote on each."""
    few = list(levels)
    while len(few) > _MAX_LEVELS:
        few = join_levels(few, *nearest_levels(few))
    return few


def nearest_levels(levels: Sequence[ZoomLevel]) -> tuple[ZoomLevel, ZoomLevel]:
    """The two levels of the most similar zoom, the smaller one first."""
    by_zoom = sorted(levels, key=lambda level: level.log_zoom)
    return min(itertools.pairwise(by_zoom), key=lambda two: two[1].log_zoom - two[0].log_zoom)


def zoomed_ids(levels: Sequence[ZoomLevel]) -> list[FrameId]:
    """Keyframes that are not in the first level."""
    return [frame_id for level in levels[1:] for frame_id in level.frame_ids]


class ZoomVotes:
    """The votes of a camera's strongest pairs on its zoom levels."""

    def __init__(self, pairs: Sequence[VerifiedPair], camera: pycolmap.Camera) -> None:
        strongest = sorted(pairs, key=lambda pair: (-pair.num_inliers, pair.pair))
        self._pairs = strongest[:_MAX_VOTING_PAIRS]
        self._edge_px = max(camera.width, camera.height)
        self._principal_point_xy = (
            float(camera.principal_point_x),
            float(camera.principal_point_y),
        )

    def on(self, levels: Sequence[ZoomLevel]) -> CalibrationVote | None:
        """The best common focal length for levels; None when no pair has a vote."""
        views = self._views(levels)
        return vote_on(self._among(views), views, edge_px=self._edge_px)

    def agreed(self, levels: list[ZoomLevel]) -> list[ZoomLevel]:
        """Levels that keyframes vote for, joined where the pairs do not mind; the largest first.

        A motion, too, changes the scale, and makes levels that are none.
        """
        while len(levels) > 1 and (vote := self.on(levels)) is not None:
            levels = self.settled(levels, focal_px=vote.focal_px)
            joined = self.joined(levels, focal_px=vote.focal_px) if len(levels) > 1 else None
            if joined is None:
                break
            levels = joined
        return largest_first(levels)

    def prefer(self, levels: Sequence[ZoomLevel], *, to: Sequence[ZoomLevel]) -> bool:
        """Whether the pairs of keyframes that change their zoom vote clearly for some levels."""
        vote, other_vote = self.on(levels), self.on(to)
        views, other_views = self._views(levels), self._views(to)
        changed = {
            i
            for i, view in views.items()
            if abs(math.log(view.zoom / other_views[i].zoom)) > MIN_APART
        }
        concerned = self._among(views, touching=changed)
        if vote is None or other_vote is None:
            return False
        cost = cost_of(concerned, views, focal_px=vote.focal_px)
        other_cost = cost_of(concerned, other_views, focal_px=other_vote.focal_px)
        return (
            cost is not None
            and other_cost is not None
            and sum(map(has_vote, concerned)) >= _MIN_VOTES_PER_LEVEL * (len(levels) - 1)
            and cost < min(_BETTER_VOTE_RATIO * other_cost, _MAX_VOTE_COST)
        )

    def joined(self, levels: Sequence[ZoomLevel], *, focal_px: float) -> list[ZoomLevel] | None:
        """The levels with those two joined that the votes mind least; None when they do mind."""
        by_zoom = sorted(levels, key=lambda level: level.log_zoom)
        options = []
        for one, other in itertools.pairwise(by_zoom):
            joined = join_levels(levels, one, other)
            rise = max(
                self._rise(levels, joined, touching=level.frame_ids, focal_px=focal_px)
                for level in (one, other)
            )
            options.append((rise, joined))
        rise, best = min(options, key=lambda option: option[0])
        return best if rise <= _JOINED_VOTE_RATIO else None

    def _rise(
        self,
        levels: Sequence[ZoomLevel],
        joined: Sequence[ZoomLevel],
        *,
        touching: Sequence[FrameId],
        focal_px: float,
    ) -> float:
        """By what factor joining levels raises the cost of the pairs of some keyframes."""
        views, joined_views = self._views(levels), self._views(joined)
        concerned = self._among(views, touching=set(touching))
        before = cost_of(concerned, views, focal_px=focal_px)
        after = cost_of(concerned, joined_views, focal_px=focal_px)
        return 1.0 if before is None or after is None else after / max(before, _TINY_COST)

    def settled(self, levels: Sequence[ZoomLevel], *, focal_px: float) -> list[ZoomLevel]:
        """The levels with each keyframe in the one that its pairs vote for."""
        level_of = {i: number for number, level in enumerate(levels) for i in level.frame_ids}
        views = self._views(levels)
        options = [self._view(level) for level in levels]
        pairs_of: dict[FrameId, list[VerifiedPair]] = {i: [] for i in views}
        for pair in self._among(views):
            pairs_of[pair.pair.first].append(pair)
            pairs_of[pair.pair.second].append(pair)
        for _ in range(_MAX_SWEEPS):
            moves = 0
            for frame_id, own in pairs_of.items():
                costs = []
                for view in options:
                    views[frame_id] = view
                    cost = cost_of(own, views, focal_px=focal_px)
                    costs.append(math.inf if cost is None else cost)
                best, present = int(np.argmin(costs)), level_of[frame_id]
                if costs[best] < _MOVED_VOTE_RATIO * costs[present]:
                    level_of[frame_id] = best
                    moves += 1
                views[frame_id] = options[level_of[frame_id]]
            if not moves:
                break
        settled = [
            replace(level, frame_ids=tuple(sorted(i for i in level_of if level_of[i] == number)))
            for number, level in enumerate(levels)
        ]
        return [level for level in settled if level.frame_ids]

    def _among(
        self, views: Mapping[FrameId, GuessedView], *, touching: Collection[FrameId] | None = None
    ) -> list[VerifiedPair]:
        """The pairs between some views; only those of given keyframes."""
        return [
            pair
            for pair in self._pairs
            if {pair.pair.first, pair.pair.second} <= views.keys()
            and (touching is None or pair.pair.first in touching or pair.pair.second in touching)
        ]

    def _views(self, levels: Sequence[ZoomLevel]) -> dict[FrameId, GuessedView]:
        return {frame_id: self._view(level) for level in levels for frame_id in level.frame_ids}

    def _view(self, level: ZoomLevel) -> GuessedView:
        zoom = math.exp(level.log_zoom)
        return GuessedView(zoom=zoom, principal_point_xy=self._principal_point_xy)
