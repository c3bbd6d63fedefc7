"""Which verified pairs agree with each other, and whether maps may use those that do not.

A verified pair is a hypothesis: matchers that match everything find an epipolar geometry also for
images that share nothing. A pair is agreed when one triplet of keyframes holds it, see
`engine.estimators.three_view`; it stays so. What agrees is proven; what does not may be right, too:
two views alone have no third one. So agreement is required where a matcher says that it matches
everything, or where the run shows it, and of each pair that a second matcher found; elsewhere it
only orders what is trusted first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycolmap

from engine.config import AgreementConfig
from engine.estimators.lenses import camera_focal_px
from engine.estimators.three_view import (
    MAX_CYCLE_RAD,
    View,
    cycle_angle_rad,
    three_view_agreement,
)
from engine.estimators.two_view_geometry import estimate_relative_pose
from engine.geometry import image_scale
from engine.matching.pair_strength import pair_strength
from engine.matching.scene_graph import SceneGraph
from engine.types import (
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    PairReason,
    VerifiedPair,
)

_MAX_TRIPLETS = 8  # tried for a pair, of those whose turns close
_MAX_FOCAL_CHANGE = 1.03  # a factor; pairs not agreed are tested again beyond it
_RELATIVE_POSE_ERROR_PX = 3.0  # at an image edge of 1000 px
_MAX_TRIALS = 300  # of a relative pose: verified matches hardly need as many
_MAX_MATCHES = 500  # of a pair that its relative pose is estimated from, spread over all
_NUM_BASES = 2  # pairs of a triplet whose points the third view is posed against
_MAX_VIEWS = 512  # whose rays are kept, the latest
_SAME_PARAMS = 0.003  # of a camera, as a ratio: its rays are about the same


_Triplet = tuple["_Known", "_Known", "_Known"]
CameraOf = Callable[[str], pycolmap.Camera]  # by calibration key, as calibrated at present


@dataclass(slots=True, eq=False)
class _Known:
    """What is known of one pair, for as long as its matches stay the same."""

    verified: VerifiedPair
    score: float
    is_agreed: bool = False
    second_from_first: Float64Array | None = None  # (3, 4) at the focal lengths below
    focal_px: tuple[float, float] | None = None  # None: not estimated yet
    tested: set[FrameId] = field(default_factory=set)  # third keyframes, at these focal lengths


class PairAgreement:
    """Keeps which pairs are agreed, and tests triplets of keyframes for it.

    It is for the thread that has the scene graph: the mapper's, but for the time between
    `begin_keyframe` and `add_keyframe`. Answers cost nothing where they are known, and a few ms
    where a pair has to be tested first.

    Args:
        config: whether agreement is required.
        graph: keyframes and verified pairs.
        camera_of: the camera of a calibration key, as calibrated at present.
        matches_everything: whether the matcher says so.
        seed: of everything random.
    """

    def __init__(
        self,
        config: AgreementConfig,
        *,
        graph: SceneGraph,
        camera_of: CameraOf,
        matches_everything: bool,
        seed: int,
    ) -> None:
        self._mode = config.mode
        self._is_required = config.mode == "required" or (
            config.mode == "auto" and matches_everything
        )
        self._has_second = False  # pairs of a second matcher, once there are some
        self._graph = graph
        self._camera_of = camera_of
        self._seed = seed
        self._known: dict[ImagePair, _Known] = {}
        self._instead: dict[ImagePair, _Known] = {}  # of pairs that the graph has otherwise
        self._views: dict[FrameId, _CachedView] = {}
        self._tested_at_px: dict[str, float] = {}  # focal lengths when all pairs were tested last
        self._changed: set[FrameId] = set()  # keyframes of whose pairs others are agreed now

    # -- questions ------------------------------------------------------------------------------

    @property
    def is_required(self) -> bool:
        """Whether maps may use agreed pairs only, whatever matcher found them."""
        return self._is_required

    @property
    def is_asked_for(self) -> bool:
        """Whether some pairs have to be agreed, so that focal lengths matter before any map."""
        return self._is_required or self._has_second

    @property
    def may_be_required(self) -> bool:
        """Whether it is not, but would be if the run showed that many pairs are wrong."""
        return self._mode == "auto" and not self._is_required

    def is_agreed(self, pair: ImagePair) -> bool:
        """Whether a third view confirms a verified pair; False where agreement is switched off.

        Where agreement is not required, the pair is tested now, unless the same keyframes were
        tested before.
        """
        if self._mode == "off":
            return False
        known = self._update(pair)
        if known is None:
            return False
        if not (known.is_agreed or self._is_required):
            self._agree([known])
        return known.is_agreed

    def usable(self, pairs: Iterable[VerifiedPair]) -> list[VerifiedPair]:
        """Those of some verified pairs that maps may use: all, or the agreed ones if required."""
        return [one for one in pairs if not self._must_agree(one) or self.is_agreed(one.pair)]

    def _must_agree(self, verified: VerifiedPair) -> bool:
        return self._is_required or verified.reason is PairReason.SECOND

    def strength(self, verified: VerifiedPair) -> float:
        """Independent inliers of a verified pair, see `PairStrength.score`."""
        return self._known_of(verified).score

    # -- what a run that goes on needs ------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What is known besides the agreed pairs."""
        return {"is_required": self._is_required, "tested_at_px": dict(self._tested_at_px)}

    def take_agreed(self) -> dict[FrameId, list[FrameId]]:
        """Agreed pairs as far as they changed: of a keyframe, all those with smaller ids."""
        changed, self._changed = sorted(self._changed), set()
        return {
            frame_id: [
                other
                for other in self._graph.neighbors(frame_id)
                if other < frame_id and self._is_known_agreed(ImagePair(other, frame_id))
            ]
            for frame_id in changed
        }

    def restore(self, facts: Mapping[str, Any], agreed: Iterable[ImagePair]) -> None:
        """Goes on with what a run knew; the graph has its pairs, and holds back those not agreed.

        Args:
            facts: as `facts` gave them.
            agreed: pairs; those that the graph does not have are left out.
        """
        self._is_required |= self._mode == "auto" and bool(facts["is_required"])
        self._tested_at_px = dict(facts["tested_at_px"])
        for pair in agreed:
            verified = self._graph.edge(pair)
            if verified is not None:
                self._known_of(verified).is_agreed = True
        for verified in self._graph.all_edges():
            self._has_second |= verified.reason is PairReason.SECOND
            if self._must_agree(verified) and not self._known_of(verified).is_agreed:
                self._graph.hold_back(verified.pair)

    def _is_known_agreed(self, pair: ImagePair) -> bool:
        known = self._known.get(pair)
        return known is not None and known.is_agreed

    # -- testing --------------------------------------------------------------------------------

    def add_pairs(self, frame_id: FrameId) -> list[VerifiedPair]:
        """Tests what the pairs of a keyframe confirm, of those that must be agreed.

        What nothing confirms is held back in the scene graph. It is tested again with keyframes to
        come, and when focal lengths have moved.

        Returns:
            The pairs that became agreed, of this keyframe or of earlier ones.
        """
        own = self._graph.verified_pairs(frame_id)
        self._has_second |= any(one.reason is PairReason.SECOND for one in own)
        if not self.is_asked_for:
            return []
        if self._has_moved():
            return self.test_all()
        beside = set(self._graph.neighbors(frame_id))
        pairs = {ImagePair.of(frame_id, other) for other in beside}
        among = ((one, other) for one in beside for other in beside & {*self._graph.neighbors(one)})
        pairs.update(ImagePair(*both) for both in among if both[0] < both[1])
        return self._agree_and_hold_back(pairs)

    def take_instead(self, others: Sequence[VerifiedPair]) -> list[VerifiedPair]:
        """Puts other matches of pairs into the scene graph, where a third view confirms them.

        All are tested at once, since they may confirm each other. Pairs that are agreed as they are
        stay so.

        Args:
            others: of pairs that the graph has, all that wait; what is known of any else is let go.

        Returns:
            Those that the graph has now.
        """
        waiting = {one.pair for one in others}
        self._instead = {pair: one for pair, one in self._instead.items() if pair in waiting}
        before: dict[ImagePair, tuple[_Known, bool]] = {}
        for one in others:
            if self._graph.edge(one.pair) is None or self.is_agreed(one.pair):
                self._instead.pop(one.pair, None)
                continue
            known = self._update(one.pair)
            assert known is not None, "the graph has it"
            before[one.pair] = known, self._graph.is_held_back(one.pair)
        tried = [one for one in others if one.pair in before]
        for one in tried:
            self._graph.record_pair(one)
            if one.pair in self._instead:  # what it was tested with is known
                self._known[one.pair] = self._instead.pop(one.pair)
        self._agree_and_hold_back(one.pair for one in tried)
        taken = []
        for one in tried:
            if self._is_known_agreed(one.pair):
                taken.append(one)
                continue
            self._instead[one.pair] = self._known[one.pair]
            self._known[one.pair], was_held_back = before[one.pair]
            self._graph.record_pair(self._known[one.pair].verified)
            if not was_held_back:
                self._graph.release(one.pair)
        return taken

    def test_again(self, pairs: Iterable[ImagePair]) -> list[VerifiedPair]:
        """Tests pairs whose matches are others now, of those that must be agreed.

        Returns:
            The pairs that became agreed. Others of those given may be agreed no more.
        """
        if not self.is_asked_for:
            return []
        return self._agree_and_hold_back(pairs)

    def require(self) -> None:
        """Lets maps use agreed pairs only from now on, since the run shows that many are wrong."""
        self._is_required = True
        self.test_all()

    def test_all(self) -> list[VerifiedPair]:
        """Tests all pairs that must be agreed and are not, at the present focal lengths.

        Returns:
            The pairs that became agreed.
        """
        self._tested_at_px = self._focal_lengths_px()
        return self._agree_and_hold_back(verified.pair for verified in self._graph.all_edges())

    def num_agreed_with(self, camera_of: CameraOf, *, pairs: Sequence[VerifiedPair]) -> int:
        """How many of some pairs would be agreed with other cameras."""
        other = PairAgreement(
            AgreementConfig(mode="required"),
            graph=self._graph,
            camera_of=camera_of,
            matches_everything=True,
            seed=self._seed,
        )
        inside = {frame_id for one in pairs for frame_id in (one.pair.first, one.pair.second)}
        chosen = [other._known_of(one) for one in pairs]
        other._agree(chosen, among=inside)
        return sum(known.is_agreed for known in chosen)

    def _agree_and_hold_back(self, pairs: Iterable[ImagePair]) -> list[VerifiedPair]:
        present = [
            known
            for pair in pairs
            if (known := self._update(pair)) is not None and self._must_agree(known.verified)
        ]
        for known in present:
            if not known.is_agreed:
                self._graph.hold_back(known.verified.pair)
        agreed = self._agree(present)
        for verified in agreed:
            self._graph.release(verified.pair)
        return agreed

    def _agree(
        self, pairs: Sequence[_Known], *, among: Collection[FrameId] | None = None
    ) -> list[VerifiedPair]:
        """Tests pairs, strongest first; returns those that became agreed, of any triplet."""
        agreed: list[VerifiedPair] = []
        for known in sorted(pairs, key=lambda one: (-one.score, one.verified.pair)):
            if known.is_agreed:
                continue
            num_tried = 0
            for third, triplet in self._triplets(known, among=among):
                if known.is_agreed or num_tried >= _MAX_TRIPLETS:
                    break
                _mark_tested(third, triplet)
                if not self._closes(triplet):
                    continue
                num_tried += 1
                if self._holds(third, triplet):
                    agreed += [one.verified for one in triplet if not one.is_agreed]
                    for one in triplet:
                        one.is_agreed = True
                        self._changed.add(one.verified.pair.second)
        return agreed

    def _triplets(
        self, known: _Known, *, among: Collection[FrameId] | None = None
    ) -> list[tuple[FrameId, _Triplet]]:
        """Third keyframes of a pair that it was not tested with, and the three pairs.

        The triplet whose weakest pair is strongest comes first.
        """
        pair = known.verified.pair
        self._pose(known)
        common = set(self._graph.neighbors(pair.first)) & set(self._graph.neighbors(pair.second))
        found = []
        for third in common - known.tested:
            if among is not None and third not in among:
                continue
            others = [self._update(ImagePair.of(third, end)) for end in (pair.first, pair.second)]
            assert others[0] is not None and others[1] is not None, "neighbours share a pair"
            found.append((third, (known, others[0], others[1])))
        return sorted(found, key=lambda one: (-min(other.score for other in one[1][1:]), one[0]))

    def _closes(self, triplet: _Triplet) -> bool:
        """Whether the turns of three pairs lead back to where they began."""
        poses = {}
        for one in triplet:
            pose = self._pose(one)
            if pose is None:
                return False
            poses[one.verified.pair] = pose
        first, second, third = sorted(poses)  # (a, b), (a, c), (b, c)
        return cycle_angle_rad(poses[first], poses[third], poses[second]) < MAX_CYCLE_RAD

    def _holds(self, third: FrameId, triplet: _Triplet) -> bool:
        """Whether a third view agrees with one of the two strongest pairs of three."""
        ids = {triplet[0].verified.pair.first, triplet[0].verified.pair.second, third}
        strongest = sorted(triplet, key=lambda one: (-one.score, one.verified.pair))
        for base in strongest[:_NUM_BASES]:
            a, b = base.verified.pair.first, base.verified.pair.second
            (c,) = ids - {a, b}
            assert base.second_from_first is not None, "its turn was compared"
            agreement = three_view_agreement(
                (self._view(a), self._view(b), self._view(c)),
                matches_ab=self._rows(a, b),
                matches_ac=self._rows(a, c),
                matches_bc=self._rows(b, c),
                b_from_a=base.second_from_first,
                seed=self._seed,
            )
            if agreement.holds:
                return True
        return False

    # -- what is known --------------------------------------------------------------------------

    def _update(self, pair: ImagePair) -> _Known | None:
        """What is known of a pair; forgotten when its matches are others now, or gone."""
        verified = self._graph.edge(pair)
        if verified is None:
            if self._known.pop(pair, None) is not None:
                self._changed.add(pair.second)
            return None
        return self._known_of(verified)

    def _known_of(self, verified: VerifiedPair) -> _Known:
        known = self._known.get(verified.pair)
        if known is None or known.verified is not verified:
            strength = pair_strength(
                verified,
                self._graph.keyframe(verified.pair.first),
                self._graph.keyframe(verified.pair.second),
            )
            if known is not None and known.is_agreed:
                self._changed.add(verified.pair.second)
            known = _Known(verified=verified, score=strength.score)
            self._known[verified.pair] = known
        return known

    def _pose(self, known: _Known) -> Float64Array | None:
        """The relative pose (3, 4) of a pair at the present focal lengths; None: it has none."""
        pair = known.verified.pair
        cameras = [self._camera(frame_id) for frame_id in (pair.first, pair.second)]
        focal_px = (camera_focal_px(cameras[0]), camera_focal_px(cameras[1]))
        if known.focal_px is not None and all(
            _factor(*both) <= _MAX_FOCAL_CHANGE
            for both in zip(focal_px, known.focal_px, strict=True)
        ):
            return known.second_from_first
        known.focal_px = focal_px
        known.tested.clear()
        known.second_from_first = known.verified.cam2_from_cam1
        if known.second_from_first is None:
            known.second_from_first = self._estimated(known.verified, *cameras)
        return known.second_from_first

    def _estimated(
        self, verified: VerifiedPair, camera1: pycolmap.Camera, camera2: pycolmap.Camera
    ) -> Float64Array | None:
        rows = verified.inlier_matches_idx.astype(np.int64)
        if len(rows) > _MAX_MATCHES:
            rows = rows[np.linspace(0, len(rows) - 1, _MAX_MATCHES).astype(np.int64)]
        first, second = (
            self._graph.keyframe(i) for i in (verified.pair.first, verified.pair.second)
        )
        relative = estimate_relative_pose(
            first.features.keypoints_xy[rows[:, 0]],
            second.features.keypoints_xy[rows[:, 1]],
            camera1=camera1,
            camera2=camera2,
            max_error_px=_RELATIVE_POSE_ERROR_PX * image_scale(first.width, first.height),
            seed=self._seed,
            max_num_trials=_MAX_TRIALS,
        )
        return None if relative is None else relative.cam2_from_cam1

    def _rows(self, one: FrameId, other: FrameId) -> Int64Array:
        """Matched rows (M, 2) of a pair, those of ``one`` first."""
        rows = self._known[ImagePair.of(one, other)].verified.inlier_matches_idx.astype(np.int64)
        return rows if one < other else rows[:, ::-1]

    def _camera(self, frame_id: FrameId) -> pycolmap.Camera:
        return self._camera_of(self._graph.keyframe(frame_id).calibration_key)

    def _view(self, frame_id: FrameId) -> View:
        keyframe, camera = self._graph.keyframe(frame_id), self._camera(frame_id)
        cached = self._views.pop(frame_id, None)
        if cached is None or not cached.is_of(keyframe, camera):
            cached = _CachedView.of(keyframe, camera)
        self._views[frame_id] = cached
        if len(self._views) > _MAX_VIEWS:
            del self._views[next(iter(self._views))]
        return cached.view

    def _focal_lengths_px(self) -> dict[str, float]:
        keys = {self._graph.keyframe(i).calibration_key for i in self._graph.keyframe_ids}
        return {key: camera_focal_px(self._camera_of(key)) for key in keys}

    def _has_moved(self) -> bool:
        """Whether a focal length is far from where all pairs were tested last."""
        return any(
            _factor(focal_px, self._tested_at_px.setdefault(key, focal_px)) > _MAX_FOCAL_CHANGE
            for key, focal_px in self._focal_lengths_px().items()
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CachedView:
    """The view of a keyframe, for as long as its keypoints and its camera stay about the same."""

    view: View
    keypoints_xy: Float64Array
    model: str
    params: Float64Array

    @classmethod
    def of(cls, keyframe: Keyframe, camera: pycolmap.Camera) -> _CachedView:
        private = copy.deepcopy(camera)
        points_xy = keyframe.features.keypoints_xy
        return cls(
            view=View.of(private, points_xy),
            keypoints_xy=points_xy,
            model=private.model_name,
            params=np.array(private.params),
        )

    def is_of(self, keyframe: Keyframe, camera: pycolmap.Camera) -> bool:
        return (
            self.keypoints_xy is keyframe.features.keypoints_xy
            and self.model == camera.model_name
            and np.allclose(self.params, camera.params, rtol=_SAME_PARAMS, atol=_SAME_PARAMS)
        )


def _mark_tested(third: FrameId, triplet: _Triplet) -> None:
    """Marks three pairs, the first of which the third keyframe is not in, as tested together."""
    pair = triplet[0].verified.pair
    for one, left_out in zip(triplet, (third, pair.second, pair.first), strict=True):
        one.tested.add(left_out)


def _factor(one: float, other: float) -> float:
    return max(one, other) / min(one, other)
