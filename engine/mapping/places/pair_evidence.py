"""Whether a run shows that many of its verified pairs are wrong, whatever its matcher says.

The map is what most pairs agree on. A pair with much evidence that contradicts it, and that no
third view confirms, is most likely wrong. Repeated structure gives a few of them; a matcher that
verifies pairs which share nothing gives them at a steady rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.mapping.model.place_evidence import CONTRADICTION_PX, epipolar_error_px
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.pair_agreement import PairAgreement
from engine.matching.pair_strength import pair_strength
from engine.types import FrameId, ImagePair, VerifiedPair

_MIN_INDEPENDENT = 30  # inliers, of a pair that counts
_MAX_SHARED_RATIO = 0.1  # of a pair's inliers seen as common points: a pair with more is in use
_MIN_WRONG = 3  # pairs
_MIN_WRONG_RATIO = 0.01  # of the pairs that count


class PairEvidence:
    """Counts pairs that contradict the map and are not agreed.

    Args:
        agreement: tests pairs.
    """

    def __init__(self, agreement: PairAgreement) -> None:
        self._agreement = agreement
        self._examined: set[FrameId] = set()
        self._num_counting = 0
        self._contradicting: list[ImagePair] = []

    def facts(self) -> dict[str, Any]:
        """What was counted by now."""
        return {
            "num_counting": self._num_counting,
            "contradicting": [[pair.first, pair.second] for pair in self._contradicting],
        }

    def restore(self, facts: Mapping[str, Any], examined: Iterable[FrameId]) -> None:
        """Goes on with `facts`, and with the keyframes whose pairs they count."""
        self._examined = set(examined)
        self._num_counting = facts["num_counting"]
        self._contradicting = [ImagePair(*pair) for pair in facts["contradicting"]]

    @property
    def num_wrong(self) -> int:
        """Pairs that are most likely wrong."""
        return sum(not self._agreement.is_agreed(pair) for pair in self._contradicting)

    def examine(self, sparse_map: SparseMap) -> bool:
        """Examines the pairs of keyframes that are registered and were not at the last call.

        Returns:
            Whether maps should use agreed pairs only from now on.
        """
        if not self._agreement.may_be_required:
            return False
        for frame_id in sparse_map.registered_ids:
            if frame_id not in self._examined:
                self._examine(sparse_map, frame_id)
                self._examined.add(frame_id)
        many = max(_MIN_WRONG, _MIN_WRONG_RATIO * self._num_counting)
        if len(self._contradicting) < many:
            return False
        # The map may have been repaired, or be another one than when they were examined.
        self._contradicting = [
            pair for pair in self._contradicting if _still_contradicts(sparse_map, pair)
        ]
        return len(self._contradicting) >= many and self.num_wrong >= many

    def _examine(self, sparse_map: SparseMap, frame_id: FrameId) -> None:
        """Examines the pairs of a keyframe with those examined before."""
        shared = sparse_map.covisibility(frame_id)
        for other, verified in sparse_map.neighbors(frame_id).items():
            if other not in self._examined or not sparse_map.is_registered(other):
                continue
            self._num_counting += 1
            is_in_use = shared.get(other, 0) >= _MAX_SHARED_RATIO * verified.num_inliers
            if (
                not is_in_use
                and _is_spread(sparse_map, verified)
                and _contradicts(sparse_map, verified)
            ):
                self._contradicting.append(verified.pair)


def _is_spread(sparse_map: SparseMap, verified: VerifiedPair) -> bool:
    first, second = (sparse_map.keyframe(i) for i in (verified.pair.first, verified.pair.second))
    return pair_strength(verified, first, second).num_independent >= _MIN_INDEPENDENT


def _contradicts(sparse_map: SparseMap, verified: VerifiedPair) -> bool:
    """Whether the map's poses put a pair's matches far from their epipolar lines."""
    return epipolar_error_px(sparse_map, verified) > CONTRADICTION_PX


def _still_contradicts(sparse_map: SparseMap, pair: ImagePair) -> bool:
    """The same of a pair whose keyframes the map may not hold any more, nor the pair itself."""
    if not (sparse_map.is_registered(pair.first) and sparse_map.is_registered(pair.second)):
        return False
    verified = sparse_map.neighbors(pair.first).get(pair.second)
    return verified is not None and _contradicts(sparse_map, verified)
