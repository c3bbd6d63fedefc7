"""Pair matching: the pairs that the scene graph proposes are matched and verified."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import (
    CoarseToFineConfig,
    DenseMatchingConfig,
    SecondMatcherConfig,
    TwoViewConfig,
)
from engine.errors import InferenceError
from engine.estimators.lenses import camera_of
from engine.estimators.two_view_geometry import PairVerifier, VerifiedMatches
from engine.matching.coarse_to_fine import CoarseToFine
from engine.matching.descriptor_store import DescriptorStore
from engine.matching.keypoint_tables import KeypointTables, select_matches
from engine.matching.overlays import Overlay, OverlayMask, Overlays
from engine.matching.scene_graph import SceneGraph
from engine.ports import PairMatcher
from engine.types import (
    NO_ROW,
    BoolArray,
    Features,
    Float32Array,
    FrameId,
    ImagePair,
    Int32Array,
    Int64Array,
    Intrinsics,
    Keyframe,
    MatchRequest,
    PairCandidate,
    PairMatches,
    PairReason,
    Uint32Array,
    VerifiedPair,
)

_SAME_GEOMETRY_SHARE = 0.9  # of a pair's matches: those left keep the geometry of all
logger = logging.getLogger(__name__)

_MAX_PLACES = 4  # further ones that a keyframe without a place is matched with
_MAX_AGAIN = 2  # keyframes whose matching failed that are matched again with the next one
_MAX_WAITING = 100  # of those; the oldest are matched no more
_MAX_TENTATIVE = 500  # pairs whose matches are kept, the latest: some MB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatchedKeyframe:
    """What matching the newest keyframe gave."""

    frame_id: FrameId
    pairs: tuple[VerifiedPair, ...]  # with earlier keyframes, those that hold
    changed_features: tuple[Features, ...]  # keypoint tables that changed, of any keyframe
    focal_lengths_px: tuple[tuple[FrameId, float], ...]  # that the matcher saw in keyframes
    failure: str | None = None  # of the matcher, in words
    overlays: tuple[Overlay, ...] = ()  # that cover more of a camera's image than before
    changed_pairs: tuple[VerifiedPair, ...] = ()  # earlier ones, without matches under overlays
    lost_pairs: tuple[ImagePair, ...] = ()  # earlier ones that do not hold without those
    found_pairs: tuple[VerifiedPair, ...] = ()  # of earlier keyframes that had no place
    tried_pairs: tuple[ImagePair, ...] = ()  # that do not hold
    num_given_up_early: int = 0  # of these: after their largest keypoints were matched
    other_matches: tuple[VerifiedPair, ...] = ()  # more of weak pairs, by a second matcher

    @property
    def has_lost_matches(self) -> bool:
        """Whether earlier pairs have fewer matches than before."""
        return bool(self.changed_pairs or self.lost_pairs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tentative:
    """What a matcher gave for a pair, verified or not."""

    matches_idx: Int32Array  # (M, 2)
    confidence: Float32Array  # (M,)
    reason: PairReason


class PairMatching:
    """Matches pairs that the scene graph proposes, verifies them and records the verified ones.

    Every pair tried is recorded in the graph, so none is tried twice. Keypoints of dense matchers
    move as matches claim them (see ``keypoint_tables``): the graph always has the present ones, and
    ``MatchedKeyframe`` holds those that changed.

    One thread matches a keyframe; between two keyframes the mapper's asks what overlays cover, for
    all matches of a pair, and to verify pairs again. Nobody does while a keyframe is matched.

    Args:
        graph: proposes pairs and keeps the verified ones.
        matcher: matches them.
        two_view: thresholds of the verification.
        dense: thresholds for dense matches that become keypoints.
        coarse_to_fine: when pairs with many keypoints are given up early.
        descriptors: keeps the descriptors of keyframes; None: all are kept in memory.
        second: how pairs of a second matcher are verified; None: there is none.
    """

    def __init__(
        self,
        graph: SceneGraph,
        matcher: PairMatcher,
        *,
        two_view: TwoViewConfig,
        dense: DenseMatchingConfig,
        coarse_to_fine: CoarseToFineConfig,
        descriptors: DescriptorStore | None = None,
        second: SecondMatcherConfig | None = None,
    ) -> None:
        self._descriptors = descriptors
        self._graph = graph
        self._matcher = matcher
        self._two_view = two_view
        self._second_two_view = two_view
        if second is not None:
            self._second_two_view = two_view.model_copy(
                update={"max_error_px": second.max_error_px}
            )
        self._of_second: list[PairMatches] = []  # that wait to be verified
        self._other_matches: list[VerifiedPair] = []  # of pairs that the graph has otherwise
        self._dense = dense
        self._tables = KeypointTables(dense)
        self._overlays = Overlays()
        self._changed: dict[FrameId, Features] = {}
        self._seen_focal_lengths: list[tuple[FrameId, float]] = []
        self._intrinsics: Mapping[str, Intrinsics] = {}
        self._to_match_again: deque[FrameId] = deque(maxlen=_MAX_WAITING)  # their matching failed
        self._tentative: dict[ImagePair, _Tentative] = {}  # of sparse matches, the latest last
        self._tried: list[ImagePair] = []  # pairs that do not hold, of the keyframe matched now
        self._num_given_up_early = 0  # of these: after their largest keypoints were matched
        self._in_part_changed: set[FrameId] = set()  # keyframes that have others matched in part
        self._coarse_to_fine = CoarseToFine(
            matcher,
            coarse_to_fine,
            verifier=self._verifier,
            verify_coarse=self._verify_coarse,
            num_pairs=lambda frame_id: len(graph.neighbors(frame_id)),
        )

    @property
    def matches_everything(self) -> bool:
        """Whether the matcher gives matches that agree also for images that share nothing."""
        return self._matcher.matches_everything

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Adds a keyframe to the scene graph, and its keypoint table here.

        Raises:
            ValueError: the graph holds it already.
        """
        self._graph.add_keyframe(keyframe)
        size = (keyframe.width, keyframe.height)
        self._tables.add(keyframe.features, size=size, mask=keyframe.mask)
        self._keep_descriptors(keyframe.features)
        self._overlays.add_keyframe(keyframe)

    # -- what a run that goes on needs ------------------------------------------------------------

    def take_facts(self) -> dict[str, Any]:
        """What keyframes and pairs do not say, as far as it changed since the last call."""
        changed, self._in_part_changed = sorted(self._in_part_changed), set()
        in_part = {f"in part/{i}": self._graph.tried_in_part(i) for i in changed}
        others = self._overlays.take_facts() | self._coarse_to_fine.take_facts()
        return self._tables.take_facts() | others | in_part

    def restore_keyframe(self, keyframe: Keyframe, facts: Mapping[str, Any]) -> None:
        """Adds a keyframe of a run that goes on, with its keypoint table as it was last.

        Args:
            keyframe: the keyframe.
            facts: as `take_facts` gave them, of all keyframes.

        Raises:
            ValueError: the graph holds it already.
        """
        columns, lines = facts.get(f"grid/{keyframe.frame_id}", (0, 0))
        num_described = len(keyframe.features) - columns * lines
        if columns * lines and keyframe.features.descriptors.size:
            features = replace(keyframe.features, num_described=num_described)
            keyframe = replace(keyframe, features=features)
        self._graph.add_keyframe(keyframe)
        size = (keyframe.width, keyframe.height)
        self._tables.add(keyframe.features, size=size, mask=keyframe.mask, grid=(columns, lines))
        self._keep_descriptors(keyframe.features)
        self._overlays.add_keyframe(keyframe)

    def restore_matches(
        self, frame_id: FrameId, pairs: Sequence[VerifiedPair], tried: Iterable[ImagePair]
    ) -> MatchedKeyframe:
        """Records what matching a keyframe gave before, without matching it again.

        Args:
            frame_id: a keyframe that was added.
            pairs: its verified pairs with keyframes added before.
            tried: pairs that were matched, verified or not.
        """
        for pair in tried:
            self._graph.record_tried(pair)
        for verified in pairs:
            self._graph.record_pair(verified)
        return MatchedKeyframe(
            frame_id=frame_id, pairs=tuple(pairs), changed_features=(), focal_lengths_px=()
        )

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with the facts of all keyframes, which were restored with their matches."""
        for frame_id in self._graph.keyframe_ids:
            for other in facts.get(f"in part/{frame_id}", ()):
                self._graph.record_tried(ImagePair.of(frame_id, FrameId(other)), in_part=True)
        self._tables.restore(facts, self._graph.all_edges())
        self._overlays.restore(facts)
        self._coarse_to_fine.restore(facts, self._graph.keyframe_ids)

    # -- overlays -------------------------------------------------------------------------------

    def covers(self, frame_id: FrameId) -> BoolArray:
        """Which keypoints (N,) of a keyframe lie under an overlay of its camera."""
        keyframe = self._graph.keyframe(frame_id)
        return self._overlays.covers(keyframe, keyframe.features.keypoints_xy)

    def overlay_masks(self) -> list[OverlayMask]:
        """What overlays leave of the images of all keyframes whose cameras have some."""
        keyframes = (self._graph.keyframe(frame_id) for frame_id in self._graph.keyframe_ids)
        return self._overlays.masks(keyframes)

    # -- matching -------------------------------------------------------------------------------

    def match_keyframe(
        self,
        frame_id: FrameId,
        *,
        wants_pointmaps: bool = False,
        intrinsics: Mapping[str, Intrinsics] | None = None,
        lost_ids: Sequence[FrameId] = (),
    ) -> MatchedKeyframe:
        """Matches the newest keyframe against what its graph chooses, and around those that fit.

        Args:
            frame_id: a keyframe that was added.
            wants_pointmaps: whether depths and focal lengths are of use.
            intrinsics: of the cameras, by key, as they are at present; pairs with a wide lens are
                verified on its rays. None: as before.
            lost_ids: earlier keyframes without a place, which are matched with what looks alike.

        Returns:
            The pairs that hold; when the matcher fails, those that held before it did, and why.
        """
        if intrinsics is not None:
            self._intrinsics = intrinsics
        failure = None
        found: list[VerifiedPair] = []
        try:
            pairs = self._match_in_two_rounds(frame_id, wants_pointmaps=wants_pointmaps)
            found += self._match_failed_again(wants_pointmaps=wants_pointmaps)
            found += self.verify_second()
            for lost_id in lost_ids:
                places = self._graph.choose_places(lost_id, limit=_MAX_PLACES)
                found += self.match_pairs(places, wants_pointmaps=wants_pointmaps, in_full=True)
        except InferenceError as error:
            pairs, failure = self._failed(frame_id), str(error) or type(error).__name__
        overlays = self._overlays.update()
        changed_pairs, lost_pairs = self._leave_out_covered() if overlays else ([], [])
        return self._matched(
            frame_id,
            pairs,
            found=found,
            failure=failure,
            overlays=overlays,
            changed_pairs=changed_pairs,
            lost_pairs=lost_pairs,
        )

    # -- a second matcher -------------------------------------------------------------------------

    def second_requests(self, pairs: Iterable[ImagePair]) -> list[MatchRequest]:
        """What a second matcher gets of pairs: tables as they are now, keypoints to look up."""
        return [
            MatchRequest(
                pair=pair,
                first=self._graph.keyframe(pair.first).features.without_descriptors(),
                second=self._graph.keyframe(pair.second).features.without_descriptors(),
                query_rows1=self._tables.query_rows(pair.first),
                query_rows2=self._tables.query_rows(pair.second),
            )
            for pair in pairs
        ]

    def add_second(self, matched: Iterable[PairMatches]) -> None:
        """Takes what a second matcher found; it is verified with the next keyframe."""
        self._of_second += matched

    def verify_second(self) -> list[VerifiedPair]:
        """Verifies what a second matcher found, together with what the first one did.

        Pairs that the first one verified stay as they are: what holds instead is kept for
        `MatchedKeyframe.other_matches`.

        Returns:
            Pairs that were not verified before.
        """
        waiting, self._of_second = self._of_second, []
        found = []
        for matches in waiting:
            if not len(matches):
                continue
            weak = self._graph.edge(matches.pair)
            both = matches if weak is None else self._with_inliers_of(weak, matches)
            min_rows = 0 if weak is None else weak.num_inliers + 1
            verified = self._verify(both, reason=PairReason.SECOND, min_rows=min_rows)
            if verified is None:
                continue
            if weak is None:
                self._graph.record_pair(verified)
                found.append(verified)
            else:
                self._other_matches.append(verified)
        if waiting:
            self._tables.drop_rasters()
        return found

    def _with_inliers_of(self, verified: VerifiedPair, matches: PairMatches) -> PairMatches:
        """A pair's matches, and before them those that it is verified by."""
        rows = verified.inlier_matches_idx.astype(np.int64)
        first, second = (
            self._graph.keyframe(i).features for i in (matches.pair.first, matches.pair.second)
        )
        return PairMatches(
            pair=matches.pair,
            matches_idx=np.concatenate([rows, matches.matches_idx]),
            points1_xy=np.concatenate([first.keypoints_xy[rows[:, 0]], matches.points1_xy]),
            points2_xy=np.concatenate([second.keypoints_xy[rows[:, 1]], matches.points2_xy]),
            confidence=np.concatenate([np.ones(len(rows), np.float32), matches.confidence]),
        )

    def found_late(self, frame_id: FrameId, found: Sequence[VerifiedPair]) -> MatchedKeyframe:
        """Pairs that were found after the last keyframe, and what changed with them.

        Args:
            frame_id: the last keyframe.
            found: what `verify_second` gave.
        """
        return self._matched(frame_id, (), failure=None, found=found)

    def give_up(self, frame_id: FrameId, *, failure: str) -> MatchedKeyframe:
        """What matching the newest keyframe gave until it broke.

        Args:
            frame_id: the keyframe; it is matched again with the next one.
            failure: what broke, in words.
        """
        return self._matched(frame_id, self._failed(frame_id), failure=failure)

    def _matched(
        self,
        frame_id: FrameId,
        pairs: Sequence[VerifiedPair],
        *,
        failure: str | None,
        found: Sequence[VerifiedPair] = (),
        overlays: tuple[Overlay, ...] = (),
        changed_pairs: Sequence[VerifiedPair] = (),
        lost_pairs: Sequence[ImagePair] = (),
    ) -> MatchedKeyframe:
        """What matching a keyframe gave, and what changed with it since the last one."""
        tried, self._tried = tuple(self._tried), []
        given_up_early, self._num_given_up_early = self._num_given_up_early, 0
        pairs, found = self._as_they_are_now(pairs), self._as_they_are_now(found)
        own = {verified.pair for verified in pairs}
        others, self._other_matches = tuple(self._other_matches), []
        changed, self._changed = tuple(self._changed.values()), {}
        seen, self._seen_focal_lengths = tuple(self._seen_focal_lengths), []
        return MatchedKeyframe(
            frame_id=frame_id,
            pairs=tuple(pairs),
            changed_features=changed,
            focal_lengths_px=seen,
            failure=failure,
            overlays=overlays,
            changed_pairs=tuple(one for one in changed_pairs if one.pair not in own),
            lost_pairs=tuple(one for one in lost_pairs if frame_id not in (one.first, one.second)),
            found_pairs=tuple(one for one in found if one.pair not in own),
            tried_pairs=tried,
            num_given_up_early=given_up_early,
            other_matches=others,
        )

    def _failed(self, frame_id: FrameId) -> list[VerifiedPair]:
        """Plans to match a keyframe again whose matching failed; returns the pairs that it has."""
        self._to_match_again.append(frame_id)
        return list(self._graph.verified_pairs(frame_id))

    def _match_failed_again(self, *, wants_pointmaps: bool) -> list[VerifiedPair]:
        """Matches keyframes whose matching failed once more, now that a later one's did not."""
        found: list[VerifiedPair] = []
        for _ in range(min(len(self._to_match_again), _MAX_AGAIN)):
            frame_id = self._to_match_again.popleft()
            try:
                found += self._match_in_two_rounds(frame_id, wants_pointmaps=wants_pointmaps)
            except InferenceError:  # reported by the matcher; later keyframes may still match it
                break
        return found

    def _as_they_are_now(self, pairs: Sequence[VerifiedPair]) -> list[VerifiedPair]:
        """Those of some pairs that still hold, with their present matches."""
        now = (self._graph.edge(verified.pair) for verified in pairs)
        return [verified for verified in now if verified is not None]

    def _match_in_two_rounds(
        self, frame_id: FrameId, *, wants_pointmaps: bool
    ) -> list[VerifiedPair]:
        verified = self.match_pairs(
            self._graph.choose_pairs(frame_id), wants_pointmaps=wants_pointmaps
        )
        expanded = self._graph.expand_pairs(frame_id, verified)
        return verified + self.match_pairs(expanded, wants_pointmaps=wants_pointmaps)

    def match_pairs(
        self,
        candidates: Sequence[PairCandidate],
        *,
        wants_pointmaps: bool = False,
        in_full: bool = False,
    ) -> list[VerifiedPair]:
        """Matches and verifies candidates; returns the verified ones, in order.

        Args:
            candidates: the pairs.
            wants_pointmaps: whether depths and focal lengths are of use.
            in_full: whether none is given up after its largest keypoints were matched.

        Raises:
            InferenceError: the matcher failed.
        """
        asked = self._requests(candidates, wants_pointmaps=wants_pointmaps)
        reasons = {candidate.pair: candidate.reason for candidate, _ in asked}

        def verify(
            matches: PairMatches, *, inlier_ratio: float | None = None
        ) -> VerifiedPair | None:
            verified = self._verify(matches, reason=reasons[matches.pair])
            if verified is not None:
                if inlier_ratio is not None:
                    num_matches = round(verified.num_inliers / inlier_ratio)
                    verified = replace(verified, num_matches=num_matches)
                self._graph.record_pair(verified)
            return verified

        matched = self._coarse_to_fine.match(
            [request for _, request in asked], verify=verify, in_full=in_full
        )
        for one in matched:
            pair = one.matches.pair
            self._keep(one.matches, reason=reasons[pair])
            if one.verified is None:
                self._graph.record_tried(pair, in_part=one.is_in_part)
                self._tried.append(pair)
                self._num_given_up_early += one.is_in_part
            if in_full or one.is_in_part:
                self._in_part_changed.update((pair.first, pair.second))
        self._tables.drop_rasters()
        return [one.verified for one in matched if one.verified is not None]

    def all_matches(self, verified: VerifiedPair) -> Uint32Array:
        """Rows (M, 2) of a pair's matches before verification; its own where they are not kept.

        None of them lies under an overlay.
        """
        kept = self._tentative.get(verified.pair)
        rows = verified.inlier_matches_idx if kept is None else kept.matches_idx.astype(np.uint32)
        is_covered = self.covers(verified.pair.first)[rows[:, 0]]
        is_covered |= self.covers(verified.pair.second)[rows[:, 1]]
        return rows[~is_covered]

    def verify_again(
        self, intrinsics: Mapping[str, Intrinsics], *, camera_key: str
    ) -> tuple[list[VerifiedPair], list[ImagePair]]:
        """Verifies the pairs of a camera once more, whose lens turned out to be another one.

        The graph gets the edges that hold now, with their matches, and loses those that do not.
        Pairs whose matches are not kept stay as they are.

        Args:
            intrinsics: of the cameras, as for `match_keyframe`.
            camera_key: the camera, by its calibration key.

        Returns:
            The pairs that hold now, and those that do not hold any more.
        """
        self._intrinsics = intrinsics
        holding, lost = [], []
        for pair, kept in self._tentative.items():
            first, second = self._graph.keyframe(pair.first), self._graph.keyframe(pair.second)
            if camera_key not in (first.calibration_key, second.calibration_key):
                continue
            rows = kept.matches_idx.astype(np.int64)
            matches = PairMatches(
                pair=pair,
                matches_idx=rows,
                points1_xy=first.features.keypoints_xy[rows[:, 0]],
                points2_xy=second.features.keypoints_xy[rows[:, 1]],
                confidence=kept.confidence,
            )
            verified = self._verify(matches, reason=kept.reason)
            if verified is not None:
                self._graph.record_pair(verified)
                holding.append(verified)
            elif self._graph.edge(pair) is not None:
                self._graph.remove_pair(pair)
                lost.append(pair)
        return holding, lost

    def _keep(self, matches: PairMatches, *, reason: PairReason) -> None:
        """Keeps the matches of keypoints for a while: verification may have had the wrong lens."""
        if (matches.matches_idx == NO_ROW).any() or len(matches) < self._two_view.min_inliers:
            return
        self._tentative[matches.pair] = _Tentative(
            matches_idx=matches.matches_idx.astype(np.int32),
            confidence=matches.confidence,
            reason=reason,
        )
        if len(self._tentative) > _MAX_TENTATIVE:
            del self._tentative[next(iter(self._tentative))]

    def depths_m(self, frame_id: FrameId) -> Float32Array:
        """Depths in metres that the matcher gave a keyframe's keypoints, (N,); 0: unknown."""
        return self._tables.depths_m(frame_id)

    def _features_of(self, frame_id: FrameId) -> Features:
        features = self._graph.keyframe(frame_id).features
        return (
            features if self._descriptors is None else self._descriptors.with_descriptors(features)
        )

    def _keep_descriptors(self, features: Features) -> None:
        """Keeps the descriptors of a new keyframe, and lets go of others where there are many."""
        if self._descriptors is None:
            return
        self._descriptors.add(features)
        for frame_id in self._descriptors.make_room():
            self._graph.replace_features(self._tables.drop_descriptors(frame_id))

    def _requests(
        self, candidates: Sequence[PairCandidate], *, wants_pointmaps: bool
    ) -> list[tuple[PairCandidate, MatchRequest]]:
        """Candidates with what the matcher gets of them; those without descriptors are left out."""
        requests = []
        for candidate in candidates:
            try:
                requests.append((candidate, self._request(candidate.pair, wants_pointmaps)))
            except InferenceError as error:  # it stays untried, and may be proposed again
                logger.error("%s: not matched: %s", candidate.pair, error)
        return requests

    def _request(self, pair: ImagePair, wants_pointmaps: bool) -> MatchRequest:
        return MatchRequest(
            pair=pair,
            first=self._features_of(pair.first).described(),
            second=self._features_of(pair.second).described(),
            query_rows1=self._tables.query_rows(pair.first),
            query_rows2=self._tables.query_rows(pair.second),
            wants_pointmaps=wants_pointmaps,
        )

    def _verify(
        self, matches: PairMatches, *, reason: PairReason, min_rows: int = 0
    ) -> VerifiedPair | None:
        """The verified pair, if it holds by enough matches of keypoints; else no table changes."""
        first, second = (self._graph.keyframe(i) for i in (matches.pair.first, matches.pair.second))
        sizes = ((first.width, first.height), (second.width, second.height))
        is_dense = bool((matches.matches_idx == NO_ROW).any())
        if is_dense:
            matches = self._tables.beside_masks(matches)
            matches = select_matches(matches, sizes=sizes, config=self._dense)
        two_view = self._second_two_view if reason is PairReason.SECOND else self._two_view
        verifier = self._verifier(matches.pair, two_view=two_view)
        matches, verified = self._overlays.verify(matches, first, second, verifier=verifier)
        if verified is None:
            return None
        min_rows = max(min_rows, self._two_view.min_inliers)
        if is_dense:
            rows = self._rows_of(verified, min_rows=min_rows)
        else:
            rows = self._counted(verified, min_rows=min_rows)
        if not len(rows):
            return None
        seen = zip((first.frame_id, second.frame_id), matches.focal_px, strict=True)
        self._seen_focal_lengths += [
            (i, focal_px) for i, focal_px in seen if 0.0 < focal_px < math.inf
        ]
        return VerifiedPair(
            pair=matches.pair,
            reason=reason,
            inlier_matches_idx=rows.astype(np.uint32),
            # Several dense matches may merge into one of two keypoints: the inlier ratio is kept.
            num_matches=round(len(rows) * len(matches) / len(verified.inliers)),
            fundamental=verified.fundamental,
            homography_inlier_ratio=verified.homography_inlier_ratio,
            cam2_from_cam1=verified.cam2_from_cam1,
        )

    def _verify_coarse(self, matches: PairMatches) -> VerifiedMatches | None:
        """Coarse matches that agree; nothing is learned from them."""
        _, verified = self._overlays.verify(
            matches,
            self._graph.keyframe(matches.pair.first),
            self._graph.keyframe(matches.pair.second),
            verifier=self._verifier(matches.pair),
            learns=False,
        )
        return verified

    def _verifier(self, pair: ImagePair, *, two_view: TwoViewConfig | None = None) -> PairVerifier:
        """Verifies by a fundamental matrix, or on rays where a lens is wide."""
        first, second = self._graph.keyframe(pair.first), self._graph.keyframe(pair.second)
        lenses = [self._intrinsics.get(keyframe.calibration_key) for keyframe in (first, second)]
        cameras = None
        if lenses[0] and lenses[1] and (lenses[0].is_wide or lenses[1].is_wide):
            cameras = camera_of(lenses[0]), camera_of(lenses[1])
        return PairVerifier(
            image_size=(max(first.width, second.width), max(first.height, second.height)),
            config=two_view or self._two_view,
            cameras=cameras,
        )

    def _leave_out_covered(self) -> tuple[list[VerifiedPair], list[ImagePair]]:
        """Takes matches under overlays from all pairs; returns those that changed, and were lost.

        A pair that loses many is verified anew: they may have bent its geometry.
        """
        changed, lost = [], []
        is_covered = {frame_id: self.covers(frame_id) for frame_id in self._graph.keyframe_ids}
        for verified in self._graph.all_edges():
            pair, rows = verified.pair, verified.inlier_matches_idx
            is_open = ~(is_covered[pair.first][rows[:, 0]] | is_covered[pair.second][rows[:, 1]])
            if is_open.all():
                continue
            remaining = self._without(verified, is_open)
            if remaining is None:
                self._graph.remove_pair(pair)
                lost.append(pair)
            else:
                self._graph.record_pair(remaining)
                changed.append(remaining)
        return changed, lost

    def _without(self, verified: VerifiedPair, is_open: BoolArray) -> VerifiedPair | None:
        """A verified pair with some of its matches (M,) only; None when too few agree."""
        rows = verified.inlier_matches_idx[is_open]
        if len(rows) < self._two_view.min_inliers:
            return None
        if is_open.mean() >= _SAME_GEOMETRY_SHARE:
            return replace(verified, inlier_matches_idx=rows)
        first, second = (
            self._graph.keyframe(i) for i in (verified.pair.first, verified.pair.second)
        )
        found = self._verifier(verified.pair).verify(
            PairMatches(
                pair=verified.pair,
                matches_idx=rows.astype(np.int64),
                points1_xy=first.features.keypoints_xy[rows[:, 0]],
                points2_xy=second.features.keypoints_xy[rows[:, 1]],
                confidence=np.ones(len(rows), np.float32),
            )
        )
        if found is None:
            return None
        return replace(
            verified,
            inlier_matches_idx=found.inliers.matches_idx.astype(np.uint32),
            num_matches=round(verified.num_matches * float(is_open.mean())),
            fundamental=found.fundamental,
            homography_inlier_ratio=found.homography_inlier_ratio,
            cam2_from_cam1=found.cam2_from_cam1,
        )

    def _counted(self, verified: VerifiedMatches, *, min_rows: int) -> Int64Array:
        """Verified matches of keypoints, (K, 2), which are counted; none if fewer than wanted."""
        rows = verified.inliers.matches_idx
        if len(rows) < min_rows:
            return rows[:0]
        self._tables.count_matches(verified.inliers.pair, rows)
        return rows

    def _rows_of(self, verified: VerifiedMatches, *, min_rows: int) -> Int64Array:
        """Verified dense matches as keypoints of both, (K, 2); none if fewer than wanted."""
        pair = verified.inliers.pair
        rows = self._tables.rows_of(
            verified.inliers, expected=self._expected_rows(pair), min_rows=min_rows
        )
        for frame_id in (pair.first, pair.second):
            features = self._tables.features(frame_id)
            if features is not self._graph.keyframe(frame_id).features:
                self._graph.replace_features(features)
                self._changed[frame_id] = features
        return rows

    def _expected_rows(self, pair: ImagePair) -> Int64Array:
        """Rows (E, 2) of a pair that third keyframes' verified pairs relate, of the newest last."""
        common = set(self._graph.neighbors(pair.first)) & set(self._graph.neighbors(pair.second))
        links = []
        for third in sorted(common):
            from_first = self._matched_rows(pair.first, third)
            to_second = self._matched_rows(third, pair.second)
            _, of_first, of_second = np.intersect1d(
                from_first[:, 1], to_second[:, 0], assume_unique=True, return_indices=True
            )
            links.append(np.column_stack([from_first[of_first, 0], to_second[of_second, 1]]))
        return np.concatenate(links) if links else np.empty((0, 2), np.int64)

    def _matched_rows(self, one: FrameId, other: FrameId) -> Int64Array:
        """Matched rows (M, 2) of a verified pair, those of ``one`` first."""
        verified = self._graph.edge(ImagePair.of(one, other))
        assert verified is not None, "neighbours share a verified pair"
        rows = verified.inlier_matches_idx.astype(np.int64)
        return rows if one < other else rows[:, ::-1]
