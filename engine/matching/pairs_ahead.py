"""Pairs that will probably be matched when the turn of a keyframe comes that waits.

The scene graph chooses pairs when a keyframe's turn comes, by the map as it is then. Most of them
are known before: all, while there are few keyframes; those at the gaps in time; and pairs like
those of the keyframe that was matched last, each moved on by as many keyframes. A matcher that
works elsewhere begins with these, which changes no result: what is not asked for is thrown away.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from engine.config import CoarseToFineConfig, SceneGraphConfig
from engine.matching.coarse_to_fine import is_coarse_first, largest_rows
from engine.ports import WorksAhead
from engine.types import Features, FrameId, ImagePair, Keyframe, MatchRequest

_NO_ROWS = np.empty(0, np.int64)


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    """The latest keyframes of a camera."""

    frame_ids: list[FrameId] = field(default_factory=list)  # all of them
    matched_at: int = -1  # the place of that which was matched last; -1: none was
    partners: tuple[FrameId, ...] = ()  # of that


class PairsAhead:
    """Has a matcher begin with pairs of keyframes that wait, of so many as may be ahead.

    Of each keyframe either `keyframe_matched` or `keyframe_dropped` follows `keyframe_waits`.

    Memory: the tables of the keyframes that wait and of the latest, and a few numbers for each.

    Args:
        config: how the scene graph chooses pairs.
        coarse_to_fine: which keypoints of a pair are matched first.
        matcher: begins with them.
        num_before: keyframes of former parts of the run.
    """

    def __init__(
        self,
        config: SceneGraphConfig,
        *,
        coarse_to_fine: CoarseToFineConfig,
        matcher: WorksAhead,
        num_before: int = 0,
    ) -> None:
        self._config = config
        self._coarse_to_fine = coarse_to_fine
        self._matcher = matcher
        self._num_added = num_before
        self._sequences: dict[str, _Sequence] = {}
        self._places: dict[FrameId, tuple[str, int]] = {}  # camera, place in its sequence
        self._features: OrderedDict[FrameId, Features] = OrderedDict()  # the latest
        self._largest: dict[FrameId, Features] = {}  # their largest keypoints, where needed
        self._num_kept = 2 * max(config.exhaustive_below, *config.temporal_offsets, 1)
        self._waiting: deque[Keyframe] = deque()  # that the matcher has not begun with
        self._begun: set[FrameId] = set()  # keyframes that it has; those matched are removed

    def keyframe_waits(self, keyframe: Keyframe) -> None:
        """Takes a keyframe whose turn comes after those before it."""
        self._waiting.append(keyframe)
        self._begin()

    def keyframe_matched(self, frame_id: FrameId, pairs: Collection[ImagePair]) -> None:
        """Takes which pairs of a keyframe were matched."""
        for keyframe in self._take_waiting(frame_id):
            self._add(keyframe)  # later ones are matched with it
            self._evict()
        self._end(frame_id)
        if frame_id in self._places:
            camera_key, place = self._places[frame_id]
            sequence = self._sequences[camera_key]
            sequence.matched_at = place
            sequence.partners = tuple(
                pair.other(frame_id) for pair in pairs if frame_id in (pair.first, pair.second)
            )
        self._begin()

    def keyframe_dropped(self, frame_id: FrameId) -> None:
        """Takes that a keyframe is not matched, nor are later ones with it."""
        self._take_waiting(frame_id)
        if self._features.pop(frame_id, None) is not None:
            self._largest.pop(frame_id, None)
            self._num_added -= 1
        self._end(frame_id)
        self._begin()

    def _take_waiting(self, frame_id: FrameId) -> list[Keyframe]:
        """Removes a keyframe whose turn came before the matcher could begin with it."""
        taken = [one for one in self._waiting if one.frame_id == frame_id]
        for keyframe in taken:
            self._waiting.remove(keyframe)
        return taken

    def _end(self, frame_id: FrameId) -> None:
        self._begun.discard(frame_id)
        self._matcher.forget_ahead(frame_id)

    def _begin(self) -> None:
        while self._waiting and len(self._begun) < self._matcher.keyframes_ahead:
            keyframe = self._waiting.popleft()
            partners = self._partners(keyframe)
            self._add(keyframe)
            self._begun.add(keyframe.frame_id)
            requests = [self._request(self._features[keyframe.frame_id], one) for one in partners]
            self._evict()  # not before: the oldest may be a partner
            self._matcher.match_ahead(keyframe.frame_id, requests)

    def _partners(self, keyframe: Keyframe) -> list[FrameId]:
        """Earlier keyframes whose tables are kept, likely ones first."""
        if self._num_added < self._config.exhaustive_below:
            return list(reversed(self._features))
        sequence = self._sequences.get(keyframe.camera_key) or _Sequence()
        ids = sequence.frame_ids
        likely = [ids[-gap] for gap in sorted(self._config.temporal_offsets) if gap <= len(ids)]
        if sequence.matched_at >= 0:
            step = len(ids) - sequence.matched_at
            likely += [self._moved_on(partner, step) for partner in sequence.partners]
        return [one for one in dict.fromkeys(likely) if one in self._features]

    def _moved_on(self, frame_id: FrameId, step: int) -> FrameId:
        """The keyframe so many after another one in its sequence; itself where there is none."""
        camera_key, place = self._places.get(frame_id, ("", -1))
        ids = self._sequences[camera_key].frame_ids if camera_key in self._sequences else []
        return ids[place + step] if place >= 0 and place + step < len(ids) else frame_id

    def _add(self, keyframe: Keyframe) -> None:
        frame_id, camera_key = keyframe.frame_id, keyframe.camera_key
        sequence = self._sequences.setdefault(camera_key, _Sequence())
        self._places[frame_id] = camera_key, len(sequence.frame_ids)
        sequence.frame_ids.append(frame_id)
        self._features[frame_id] = keyframe.features.described()
        self._num_added += 1

    def _evict(self) -> None:
        while len(self._features) > self._num_kept:
            self._largest.pop(self._features.popitem(last=False)[0], None)

    def _request(self, features: Features, other_id: FrameId) -> MatchRequest:
        other = self._features[other_id]
        pair = ImagePair.of(features.frame_id, other_id)
        first, second = (other, features) if pair.first == other_id else (features, other)
        request = MatchRequest(
            pair=pair,
            first=first,
            second=second,
            query_rows1=_NO_ROWS,
            query_rows2=_NO_ROWS,
        )
        if not is_coarse_first(request, self._coarse_to_fine):
            return request
        return replace(request, first=self._largest_of(first), second=self._largest_of(second))

    def _largest_of(self, features: Features) -> Features:
        frame_id = features.frame_id
        if frame_id not in self._largest:
            rows = largest_rows(features, self._coarse_to_fine)
            self._largest[frame_id] = features.take(rows)
        return self._largest[frame_id]
