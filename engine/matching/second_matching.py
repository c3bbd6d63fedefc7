"""Second matching: a few pairs of keyframes that the first matcher hardly matches.

A learned matcher finds matches where the first one gives up, and also where there are none. So it
gets only keyframes that are weak, as the scene graph has them; their pairs are few and bounded; and
a map uses none of them that a third keyframe does not confirm (see `pair_agreement`). Until then,
what the first matcher found stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import SecondMatcherConfig
from engine.geometry import grid_over_image
from engine.matching.scene_graph import SceneGraph
from engine.ports import PairMatcher, SecondMatcher
from engine.types import Features, Frame, FrameId, ImagePair, MatchRequest, PairMatches


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondChoice:
    """Pairs to be matched now."""

    pairs: tuple[ImagePair, ...]
    num_left_out: int = 0  # further pairs that have no room now, each counted once in a run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SecondMatches:
    """What the second matcher found, not yet verified."""

    matches: tuple[PairMatches, ...]


class SecondMatching:
    """Chooses pairs for the second matcher, each of them once, and has them matched.

    The mapping thread chooses between two keyframes; any other one matches.

    Args:
        config: how many.
        graph: knows what is weak, and what may fit it.
        matcher: matches keyframes that it holds.
    """

    def __init__(
        self, config: SecondMatcherConfig, *, graph: SceneGraph, matcher: SecondMatcher
    ) -> None:
        self._config = config
        self._graph = graph
        self._matcher = matcher
        self._tried: set[ImagePair] = set()
        self._left_out: set[ImagePair] = set()  # that had no room once
        self._num_tried: Counter[FrameId] = Counter()  # pairs chosen for a weak keyframe
        self._room = 0.0  # in pairs, what the video has earned and not used
        self._latest_s: dict[str, float] = {}  # capture time of the newest keyframe by camera
        self._final_room = config.final_pairs

    def choose(self, *, is_final: bool = False) -> SecondChoice:
        """The pairs to be matched beside the next keyframe, of the newest weak keyframes first.

        Nothing is looked at while there is no room.

        Args:
            is_final: whether no keyframe comes any more; then all those are looked at that no map
                holds.
        """
        keyframe_ids = self._graph.keyframe_ids
        room = self._earned_room(keyframe_ids, is_final=is_final)
        if room <= 0:
            return SecondChoice(pairs=())
        looked_at = keyframe_ids[-self._config.look_back :]
        if is_final:
            looked_at = [i for i in keyframe_ids if self._graph.map_number(i) is None]
        wanted: dict[ImagePair, FrameId] = {}
        for frame_id in reversed(looked_at):
            if len(wanted) > room + self._config.pairs_per_keyframe:
                break  # enough is left out
            for pair in self._wanted(frame_id):
                wanted.setdefault(pair, frame_id)
        chosen = list(wanted)[:room]
        self._tried.update(chosen)
        self._num_tried.update(wanted[pair] for pair in chosen)
        self._room -= len(chosen)
        self._final_room -= len(chosen) if is_final else 0
        left_out = wanted.keys() - self._tried - self._left_out
        self._left_out |= left_out
        return SecondChoice(pairs=tuple(chosen), num_left_out=len(left_out))

    @property
    def name(self) -> str:
        """The matcher's name."""
        return self._matcher.name

    def match(self, requests: Sequence[MatchRequest]) -> SecondMatches:
        """Matches pairs. On a thread of its own: it may take seconds.

        Raises:
            InferenceError: they cannot be matched.
        """
        return SecondMatches(matches=tuple(self._matcher.match(requests)))

    def _earned_room(self, keyframe_ids: Sequence[FrameId], *, is_final: bool) -> int:
        """Pairs that may be matched now."""
        limit = self._config.pairs_at_once
        if not keyframe_ids or is_final:
            return min(limit, self._final_room)
        newest = self._graph.keyframe(keyframe_ids[-1])
        before_s = self._latest_s.get(newest.camera_key)
        self._latest_s[newest.camera_key] = newest.captured_at_s
        if newest.is_photo or before_s is None:
            self._room = limit
        else:
            earned = self._config.pairs_per_s * max(0.0, newest.captured_at_s - before_s)
            self._room = min(limit, self._room + earned)
        return int(self._room)

    def _wanted(self, frame_id: FrameId) -> list[ImagePair]:
        """Pairs of a keyframe that are worth trying; none if it is not weak, or had its share."""
        left = self._config.pairs_per_keyframe - self._num_tried[frame_id]
        if left <= 0 or not self._matcher.holds(frame_id):
            return []
        if not self._graph.is_weak(
            frame_id,
            min_pairs=self._config.min_strong_pairs,
            min_inliers=self._config.strong_inliers,
        ):
            return []
        return self._graph.second_pairs(
            frame_id,
            limit=min(left, self._config.pairs_at_once),
            min_inliers=self._config.strong_inliers,
            is_open=lambda other: (
                self._matcher.holds(other) and ImagePair.of(frame_id, other) not in self._tried
            ),
        )


class DescriberForBoth:
    """Describes keyframes by the first matcher, with room for what a second one finds.

    Args:
        first: describes.
        second: keeps the image.
        config: how much room.
    """

    def __init__(
        self, first: PairMatcher, second: SecondMatcher, config: SecondMatcherConfig
    ) -> None:
        self._first = first
        self._second = second
        self._config = config

    def describe(self, frame: Frame) -> Features:
        """The keypoints of the first matcher, then free rows on a grid.

        Raises:
            InferenceError: the first matcher cannot describe the frame.
        """
        features = self._first.describe(frame)
        self._second.keep(frame)
        size = (frame.width, frame.height)
        points_xy = grid_over_image(size, num=self._config.free_keypoints)
        columns, lines = points_xy.astype(np.int64).T
        return features.with_free_rows(points_xy, frame.pixels[lines, columns])
