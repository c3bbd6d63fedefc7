"""Whether a run shows that many of its verified pairs are wrong, whatever its matcher says.

The map is what most pairs agree on. A strong pair that contradicts it, and that no third view
confirms, is most likely wrong. Repeated structure gives a few of them; a matcher that verifies
pairs which share nothing gives them at a steady rate.
"""

from __future__ import annotations

from engine.mapping.misplacement import contradicted_pairs, strong_pairs
from engine.mapping.sparse_map import SparseMap
from engine.matching.pair_agreement import PairAgreement
from engine.types import FrameId, ImagePair

_MIN_WRONG = 5  # strong pairs
_MIN_WRONG_RATIO = 0.01  # of the strong pairs


class PairEvidence:
    """Counts strong pairs that contradict the map and are not agreed.

    Args:
        agreement: tests pairs.
    """

    def __init__(self, agreement: PairAgreement) -> None:
        self._agreement = agreement
        self._strong: set[ImagePair] = set()
        self._wrong: set[ImagePair] = set()

    @property
    def num_wrong(self) -> int:
        """Strong pairs that are most likely wrong."""
        return len(self._wrong)

    def add(self, sparse_map: SparseMap, frame_id: FrameId) -> bool:
        """Examines the pairs of a keyframe that was registered.

        Returns:
            Whether maps should use agreed pairs only from now on.
        """
        if not self._agreement.may_be_required:
            return False
        self._strong.update(one.pair for one in strong_pairs(sparse_map, frame_id))
        for verified in contradicted_pairs(sparse_map, frame_id):
            if self._agreement.is_agreed(verified.pair):
                self._wrong.discard(verified.pair)
            else:
                self._wrong.add(verified.pair)
        return len(self._wrong) >= max(_MIN_WRONG, _MIN_WRONG_RATIO * len(self._strong))
