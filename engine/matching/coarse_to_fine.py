"""Photos have many keypoints: their pairs are matched by the largest ones first.

A coarse pass over the largest keypoints of two photos costs a tenth of matching all of them. By it
there are three kinds of pairs:

- Pairs whose coarse matches agree on a geometry are matched again, all keypoints, near the epipolar
  planes of that geometry only (guided matching).
- Pairs with hardly any coarse match show nothing in common. They are given up.
- In between are weak pairs. They are matched in full, the most promising first, while one of their
  keyframes has few pairs; where both have enough, they are given up too.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from engine.config import CoarseToFineConfig
from engine.cpu_time import Stage, charged_to
from engine.estimators.two_view_geometry import PairVerifier, VerifiedMatches
from engine.ports import PairMatcher
from engine.types import (
    Features,
    FrameId,
    ImagePair,
    Int64Array,
    MatchRequest,
    PairMatches,
    VerifiedPair,
)

_MIN_SPARED = 3.0  # fewer times as many products as the coarse pass: all are matched at once
_GUIDE_TOLERANCE = 8.0  # times the error of a match: the coarse geometry is not exact
_MAX_COARSE_KEPT = 64  # keyframes whose largest keypoints are kept: 16 MB
_FAILED = "weak failed/"  # before the id of a keyframe


class Verify(Protocol):
    """Verifies the matches of a pair, and adds it to the scene graph where it holds."""

    def __call__(
        self, matches: PairMatches, *, inlier_ratio: float | None = None
    ) -> VerifiedPair | None:
        """The verified pair, or None.

        Args:
            matches: of the pair.
            inlier_ratio: what it would be of matches that nothing guided; None: as found.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatchedPair:
    """What matching a pair gave."""

    matches: PairMatches
    verified: VerifiedPair | None  # None: it does not hold
    is_in_part: bool = False  # given up after the coarse pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Coarse:
    """A pair after its coarse pass."""

    request: MatchRequest
    matches: PairMatches
    verified: VerifiedMatches | None


class CoarseToFine:
    """Matches and verifies batches of pairs, those of photos by their largest keypoints first.

    Args:
        matcher: matches them.
        config: how many keypoints, and when weak pairs are matched in full.
        verifier: the verifier of a pair.
        verify_coarse: verifies coarse matches; nothing is learned from them.
        num_pairs: how many verified pairs a keyframe has.
    """

    def __init__(
        self,
        matcher: PairMatcher,
        config: CoarseToFineConfig,
        *,
        verifier: Callable[[ImagePair], PairVerifier],
        verify_coarse: Callable[[PairMatches], VerifiedMatches | None],
        num_pairs: Callable[[FrameId], int],
    ) -> None:
        self._matcher = matcher
        self._config = config
        self._verifier = verifier
        self._verify_coarse = verify_coarse
        self._num_pairs = num_pairs
        self._num_failed: Counter[FrameId] = Counter()  # weak pairs of a keyframe
        self._changed: set[FrameId] = set()  # keyframes of which more failed
        self._largest: OrderedDict[FrameId, tuple[Features, Int64Array]] = OrderedDict()

    def take_facts(self) -> dict[str, int]:
        """How many weak pairs of keyframes failed, as far as it changed since the last call."""
        changed, self._changed = sorted(self._changed), set()
        return {f"{_FAILED}{frame_id}": self._num_failed[frame_id] for frame_id in changed}

    def restore(self, facts: Mapping[str, Any], frame_ids: Iterable[FrameId]) -> None:
        """Goes on with the facts of keyframes, as `take_facts` gave them."""
        for frame_id in frame_ids:
            self._num_failed[frame_id] = int(facts.get(f"{_FAILED}{frame_id}", 0))

    def match(
        self, requests: Sequence[MatchRequest], *, verify: Verify, in_full: bool = False
    ) -> list[MatchedPair]:
        """Matches and verifies pairs; the results are in their order.

        Args:
            requests: the pairs.
            verify: called once or twice with the matches of a pair, and not where it is given up.
            in_full: whether all keypoints are matched at once.

        Raises:
            InferenceError: the matcher failed.
        """
        photos = [] if in_full else [one for one in requests if is_coarse_first(one, self._config)]
        pairs = {one.pair for one in photos}
        done = self._match_in_full([one for one in requests if one.pair not in pairs], verify)
        if not photos:
            return list(done.values())
        coarse = self._match_coarsely(photos)
        done |= self._match_guided([one for one in coarse if one.verified is not None], verify)
        done |= self._match_weak([one for one in coarse if one.request.pair not in done], verify)
        return [done[request.pair] for request in requests]

    def _match_in_full(
        self, requests: Sequence[MatchRequest], verify: Verify
    ) -> dict[ImagePair, MatchedPair]:
        return {
            one.pair: MatchedPair(matches=one, verified=verify(one))
            for one in self._match(requests)
        }

    def _match_coarsely(self, requests: Sequence[MatchRequest]) -> list[_Coarse]:
        largest = [(self._largest_of(one.first), self._largest_of(one.second)) for one in requests]
        found = self._match(
            [
                replace(request, first=first, second=second)
                for request, ((first, _), (second, _)) in zip(requests, largest, strict=True)
            ]
        )
        coarse = []
        for request, one, ((_, rows1), (_, rows2)) in zip(requests, found, largest, strict=True):
            idx = one.matches_idx
            matches = replace(
                one, matches_idx=np.column_stack([rows1[idx[:, 0]], rows2[idx[:, 1]]])
            )
            verified = self._verify_coarse(matches)
            coarse.append(_Coarse(request=request, matches=matches, verified=verified))
        return coarse

    def _match_guided(
        self, coarse: Sequence[_Coarse], verify: Verify
    ) -> dict[ImagePair, MatchedPair]:
        """Pairs that hold, from all keypoints; those that do not hold so are not among them."""
        verifiers = [self._verifier(one.request.pair) for one in coarse]
        found = self._match(
            [_guided(one, verifier) for one, verifier in zip(coarse, verifiers, strict=True)]
        )
        done = {}
        for one, verifier, guided in zip(coarse, verifiers, found, strict=True):
            assert one.verified is not None
            # What the coarse pass found far from its geometry may be fixed to the camera, or agree
            # with another lens.
            distances_px = verifier.distances_px(one.verified, one.matches)
            is_far = distances_px > _GUIDE_TOLERANCE * verifier.max_error_px
            matches = _joined(guided, one.matches.take(is_far))
            inlier_ratio = len(one.verified.inliers) / len(one.matches)
            verified = verify(matches, inlier_ratio=inlier_ratio)
            if verified is not None:
                done[guided.pair] = MatchedPair(matches=matches, verified=verified)
        return done

    def _match_weak(self, weak: Sequence[_Coarse], verify: Verify) -> dict[ImagePair, MatchedPair]:
        """Pairs with few coarse matches, or none that agree: matched in full while needed."""
        done: dict[ImagePair, MatchedPair] = {}
        for one in sorted(weak, key=lambda one: -len(one.matches)):
            pair = one.request.pair
            ends = (pair.first, pair.second)
            if len(one.matches) >= self._config.min_coarse_matches and any(map(self._lacks, ends)):
                done |= self._match_in_full([one.request], verify)
                if done[pair].verified is None:
                    self._num_failed.update(ends)
                    self._changed.update(ends)
            else:
                done[pair] = MatchedPair(matches=one.matches, verified=None, is_in_part=True)
        return done

    def _lacks(self, frame_id: FrameId) -> bool:
        """Whether a keyframe has few pairs, those that failed in full counted."""
        num_pairs, num_failed = self._num_pairs(frame_id), self._num_failed[frame_id]
        return num_pairs + num_failed < self._config.enough_pairs

    @charged_to(Stage.MATCH)
    def _match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        return self._matcher.match(requests)

    def _largest_of(self, features: Features) -> tuple[Features, Int64Array]:
        """The largest keypoints of a photo, which change least between views, and their rows.

        None of them is lost where an image is seen from afar or is blurred.
        """
        frame_id = features.frame_id
        kept = self._largest.pop(frame_id, None)
        if kept is None:
            rows = largest_rows(features, self._config)
            kept = features.take(rows), rows
        self._largest[frame_id] = kept
        if len(self._largest) > _MAX_COARSE_KEPT:
            self._largest.popitem(last=False)
        return kept


def is_coarse_first(request: MatchRequest, config: CoarseToFineConfig) -> bool:
    """Whether a pair has so many keypoints that a coarse pass pays for itself."""
    first, second = request.first, request.second
    if first.is_free.any() or second.is_free.any() or not config.num_keypoints:
        return False
    return len(first) * len(second) > _MIN_SPARED * config.num_keypoints**2


def largest_rows(features: Features, config: CoarseToFineConfig) -> Int64Array:
    """Rows of the largest keypoints, largest first."""
    return np.argsort(-features.scales, kind="stable")[: config.num_keypoints]


def _guided(coarse: _Coarse, verifier: PairVerifier) -> MatchRequest:
    """The request of a pair, guided by what its coarse matches agree on."""
    assert coarse.verified is not None
    guide = verifier.guide(
        coarse.verified,
        coarse.request.first.keypoints_xy,
        coarse.request.second.keypoints_xy,
        max_error_px=_GUIDE_TOLERANCE * verifier.max_error_px,
    )
    return replace(coarse.request, guide=guide)


def _joined(guided: PairMatches, others: PairMatches) -> PairMatches:
    """Guided matches, and those of others whose keypoints have no match among them."""
    is_new = ~(
        np.isin(others.matches_idx[:, 0], guided.matches_idx[:, 0])
        | np.isin(others.matches_idx[:, 1], guided.matches_idx[:, 1])
    )
    others = others.take(is_new)
    return replace(
        guided,
        matches_idx=np.concatenate([guided.matches_idx, others.matches_idx]),
        points1_xy=np.concatenate([guided.points1_xy, others.points1_xy]),
        points2_xy=np.concatenate([guided.points2_xy, others.points2_xy]),
        confidence=np.concatenate([guided.confidence, others.confidence]),
        depths_m=np.concatenate([guided.depths_m, others.depths_m]),
    )
