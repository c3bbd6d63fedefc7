"""What a map's verdict rests on: how far pairs, points, places and cameras speak for it.

The pairs are asked independently of what the map made of them: their own matches say which relative
pose they prefer, wherever the map put points, and however many of them it dropped. Few pairs of
each keyframe are enough, so that a map of hundreds of keyframes is examined in some hundredths of a
second. Only where they contradict the map, third views are asked which of them are proven.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from engine.estimators.pair_fit import PairFits, PairSamples, fit_pairs
from engine.geometry import compose_poses, invert_pose
from engine.mapping.model.calibration_control import WantedFocal, wanted_focal
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import Placement
from engine.mapping.verdict.flying_height import flying_height_m
from engine.mapping.verdict.part_evidence import (
    NUM_ASKED,
    PartsEvidence,
    Views,
    examine_parts,
    some_matches,
    spread,
    views_of,
)
from engine.mapping.verdict.patch_evidence import HeldByPatch, find_held_by_patch
from engine.matching.scene_graph import SceneGraph
from engine.types import (
    BoolArray,
    CameraFigures,
    Contradiction,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    PoseGap,
    TurningStretch,
    VerifiedPair,
)

PAIRS_PER_KEYFRAME = 7  # examined, spread from its strongest pair to its weakest
_LOOKED_AT = 4  # times as many pairs are looked at
_MAX_MATCHES = 40  # of a pair that are examined, spread over all
_MIN_MATCHES = 18  # with viewing rays
_SWUNG_RAD = np.radians(5.0)  # another direction of motion than the map's
_TURNED_RAD = np.radians(5.0 / 3.0)  # another turn
_MIN_GAIN = 10.0  # logarithm of the likelihood ratio from which a better pose is no chance
# Likewise, from which a pair speaks in full against the places of its ends. By 60 to 120, as many
# of 1,240 keyframes that were moved are found, and none of right maps; counted in full from 10 on,
# keyframes of two right maps are doubted.
_CLEAR_GAIN = 80.0
_INLYING_PX = 3.0  # from the epipolar lines, at an image edge of 1000 px
_MIN_INLYING_SHARE = 0.5  # of a pair's matches
DISPUTED_RATIO = 0.19  # of the weight of pairs, that contradict the map: it is doubtful
_UNPROVEN_WEIGHT = 0.25  # of a pair that contradicts the map, and no third view confirms
_PARALLAX_QUANTILE = 0.8  # of a keyframe's pairs
_STAYED_PX = 1.5  # matches that moved less stay in the image, at an image edge of 1000 px
_MOVING_PX = 5.0  # median motion of the others from which a pair moves
_MIN_VIEWS = 3  # of a camera that say something of its focal length
_FAR_KEYFRAMES = 20  # from one keyframe to another that is far away in time
_FAR_RATIO = 0.2  # of all keyframes, likewise
FOCAL_UNSURE = frozenset({"uncertain", "unsure"})  # kinds of doubt: how unsure a focal length is
_SKYWARD_RAD = np.radians(20.0)  # above the horizon: a camera that looks up


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceEvidence:
    """What is known of the place of one registered keyframe.

    Pairs that contradict the map, and that no third view confirms, have less weight where third
    views were asked. One that the map explains nearly as well as another pose counts by a part
    against the place, and by the rest for it.
    """

    keyframe: Keyframe
    num_points: int  # of the map that it observes
    num_pairs: int  # examined
    num_confirming: float  # of them that do not contradict the map, and are proven where asked
    disputed_ratio: float  # of their weight, against the place; of each as much as it is clear
    proven_disputed_ratio: float  # likewise, of those alone that a third view confirms
    parallax_px: float  # what turning alone leaves of the motion in most of its pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsEvidence:
    """What the pairs of the map's keyframes say of it as a whole.

    Here each that contradicts the map counts by its weight, however clearly it does.
    """

    num_pairs: int = 0  # examined
    is_contested: bool = False  # so many contradict the map that third views were asked
    disputed_ratio: float = 0.0  # of their weight, of pairs that contradict the map
    disputed_inlying_ratio: float = 0.0  # of the matches of those pairs, that the map explains
    num_far: int = 0  # pairs of keyframes far apart in time
    far_disputed_ratio: float = 0.0  # of their weight
    stays_ratio: float = 0.0  # of matches of moving pairs, of those that stay in the image
    stays_unexplained_ratio: float = 0.0  # likewise, which the map does not explain


@dataclass(frozen=True, slots=True, kw_only=True)
class MapEvidence:
    """What is known of a map, and of what stands beside it."""

    keyframes: tuple[Keyframe, ...]  # all, in order of arrival
    places: tuple[PlaceEvidence, ...]  # of registered ones, in order of arrival
    pairs: PairsEvidence = field(default_factory=PairsEvidence)
    parts: PartsEvidence = field(default_factory=PartsEvidence)
    held_by_patch: tuple[HeldByPatch, ...] = ()
    num_verified_pairs: int = 0  # of all keyframes
    other_maps: tuple[tuple[FrameId, ...], ...] = ()  # their keyframes
    cameras: tuple[CameraFigures, ...] = ()
    wanted_focals: Mapping[str, WantedFocal] = field(default_factory=dict)  # of held cameras
    contradictions: tuple[Contradiction, ...] = ()  # pairs whose points the map has twice
    turning: tuple[TurningStretch, ...] = ()
    gaps: tuple[PoseGap, ...] = ()  # of videos, without any pose
    num_positions: int = 0  # that the map was laid onto, or contradict it
    gps_contradiction: str = ""  # how positions contradict the map; "" where they do not
    num_rejected_positions: int = 0
    looks_up_ratio: float = 0.0  # of registered keyframes on the globe that look at the sky
    flying_height_m: float | None = None  # see `flying_height`; None, too, where focals are sure
    searches_lenses: bool = True
    confirms_pairs: bool = True  # whether pairs are asked to agree with each other

    @property
    def unplaced(self) -> tuple[Keyframe, ...]:
        """Keyframes without a place in any map."""
        placed = {place.keyframe.frame_id for place in self.places}.union(*self.other_maps)
        return tuple(one for one in self.keyframes if one.frame_id not in placed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What else is known when a map is judged."""

    other_maps: Sequence[SparseMap] = ()
    cameras: tuple[CameraFigures, ...] = ()
    contradictions: tuple[Contradiction, ...] = ()  # pairs whose points the map has twice
    turning: tuple[TurningStretch, ...] = ()
    gaps: tuple[PoseGap, ...] = ()
    placement: Placement | None = None
    gps_contradiction: str = ""  # how positions contradict the map
    searches_lenses: bool = True
    confirms_pairs: bool = True
    is_agreed: Callable[[ImagePair], bool] | None = None  # a third view confirms a pair; None: all


def gather(
    sparse_map: SparseMap,
    graph: SceneGraph,
    beside: Beside,
    *,
    pairs_per_keyframe: int = PAIRS_PER_KEYFRAME,
    num_asked: int = NUM_ASKED,
    asks_of_all: bool = True,
) -> MapEvidence:
    """Collects the evidence about a map, which may be empty.

    Args:
        sparse_map: the map.
        graph: all keyframes, and the pairs that maps may use.
        beside: what else is known.
        pairs_per_keyframe: how many pairs of each keyframe are examined, at least.
        num_asked: how many pairs that contradict a part are confirmed by third views, at most.
        asks_of_all: whether third views are asked of all pairs where many contradict the map, or of
            those alone that do, which takes less time.
    """
    ids = sparse_map.registered_ids
    pairs = graph.edges_among(ids)
    ranked = _strongest_first(pairs, ids)
    chosen = _chosen_pairs(pairs, ranked, per_keyframe=pairs_per_keyframe)
    looked_at = _chosen_pairs(pairs, ranked, per_keyframe=_LOOKED_AT * pairs_per_keyframe)
    views = views_of(sparse_map, [*chosen, *looked_at])
    examined = _Examined.of(sparse_map, chosen, views)
    is_agreed = beside.is_agreed if beside.confirms_pairs else None
    if is_agreed is not None:
        examined = examined.weighed_anew(is_agreed, asks_of_all=asks_of_all)
    placement = beside.placement
    keyframes = tuple(graph.keyframe(i) for i in graph.keyframe_ids)
    return MapEvidence(
        keyframes=keyframes,
        places=tuple(_place(sparse_map, graph.keyframe(i), examined) for i in ids),
        pairs=examined.summary(graph),
        parts=examine_parts(
            sparse_map,
            looked_at,
            views=views,
            is_agreed=is_agreed,
            num_asked=num_asked,
        ),
        held_by_patch=find_held_by_patch(sparse_map, keyframes, looked_at, placement),
        num_verified_pairs=len(graph.edges()),
        other_maps=tuple(tuple(one.registered_ids) for one in beside.other_maps),
        cameras=beside.cameras,
        wanted_focals=_wanted_focals(sparse_map, beside.cameras),
        contradictions=beside.contradictions,
        turning=beside.turning,
        gaps=beside.gaps,
        num_positions=0 if placement is None else len(placement.frame_ids),
        gps_contradiction=beside.gps_contradiction,
        num_rejected_positions=0 if placement is None else len(placement.rejected_ids),
        looks_up_ratio=_looks_up_ratio(sparse_map, placement),
        flying_height_m=(
            flying_height_m(sparse_map, placement)
            if any(FOCAL_UNSURE.intersection(camera.doubt_kinds) for camera in beside.cameras)
            else None
        ),
        searches_lenses=beside.searches_lenses,
        confirms_pairs=beside.confirms_pairs,
    )


def _wanted_focals(
    sparse_map: SparseMap, cameras: Sequence[CameraFigures]
) -> dict[str, WantedFocal]:
    """What the images say of focal lengths that adjustments leave alone, by camera."""
    asked = [
        camera.camera_key
        for camera in cameras
        if (camera.is_held or camera.is_constant) and camera.num_registered >= _MIN_VIEWS
    ]
    wanted = {
        key: wanted_focal(sparse_map.reconstruction, sparse_map.camera(key).camera_id)
        for key in asked
    }
    return {key: one for key, one in wanted.items() if one is not None}


def _place(sparse_map: SparseMap, keyframe: Keyframe, examined: _Examined) -> PlaceEvidence:
    has_it = (examined.ends == keyframe.frame_id).any(axis=1)
    weights = examined.full_weights[has_it]
    return PlaceEvidence(
        keyframe=keyframe,
        num_points=int(sparse_map.reconstruction.image(keyframe.frame_id).num_points3D),
        num_pairs=int(has_it.sum()),
        num_confirming=(
            float(np.count_nonzero(examined.is_agreed[has_it] & ~examined.is_disputed[has_it]))
            if examined.is_contested
            else int(has_it.sum()) * (1.0 - _mean(examined.clearness[has_it], weights))
        ),
        disputed_ratio=_mean(examined.clearness[has_it], examined.weights[has_it]),
        proven_disputed_ratio=_mean(
            examined.clearness[has_it] * examined.is_agreed[has_it], weights
        ),
        parallax_px=(
            float(np.quantile(examined.fits.parallax_px[has_it], _PARALLAX_QUANTILE))
            if has_it.any()
            else 0.0
        ),
    )


def _strongest_first(
    pairs: Sequence[VerifiedPair], frame_ids: Sequence[FrameId]
) -> list[list[int]]:
    """The indices of each keyframe's pairs that have enough matches, the strongest first."""
    of_keyframe: dict[FrameId, list[int]] = {frame_id: [] for frame_id in frame_ids}
    sizes = [pair.num_inliers for pair in pairs]
    for number in sorted(range(len(pairs)), key=lambda number: -sizes[number]):
        if sizes[number] >= _MIN_MATCHES:
            of_keyframe[pairs[number].pair.first].append(number)
            of_keyframe[pairs[number].pair.second].append(number)
    return list(of_keyframe.values())


def _chosen_pairs(
    pairs: Sequence[VerifiedPair], ranked: Sequence[Sequence[int]], *, per_keyframe: int
) -> list[VerifiedPair]:
    """Some pairs of each keyframe, from its strongest to its weakest, in the order given."""
    chosen = {
        numbers[k]
        for numbers in ranked
        for k in spread(len(numbers), min(len(numbers), per_keyframe)).tolist()
    }
    return [pairs[number] for number in sorted(chosen)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Examined:
    """Pairs (B,) of a map, and what their matches say."""

    ends: Int64Array  # (B, 2) frame ids
    full_weights: Float64Array  # (B,) independent inliers
    weights: Float64Array  # (B,) less of pairs that contradict the map unproven
    inlying: Float64Array  # (B,) share of the matches that the map explains
    fits: PairFits
    is_disputed: BoolArray  # (B,)
    clearness: Float64Array  # (B,) how clearly a pair contradicts the map, 0 to 1
    is_agreed: BoolArray  # (B,) a third view confirms it; all where none was asked
    is_contested: bool  # third views were asked
    num_matches: Float64Array  # (B,) examined, of pairs that move; 0 of others
    num_stay: Float64Array  # (B,) of them, that stay in the image
    num_stay_unexplained: Float64Array  # (B,) of those, that the map does not explain

    @classmethod
    def of(cls, sparse_map: SparseMap, pairs: Sequence[VerifiedPair], views: Views) -> _Examined:
        sampled = [
            sample for pair in pairs if (sample := _Sample.of(pair, views, sparse_map)) is not None
        ]
        samples = PairSamples(
            rays1=_stacked([one.rays1 for one in sampled]),
            rays2=_stacked([one.rays2 for one in sampled]),
            is_used=np.array(
                [np.arange(_MAX_MATCHES) < len(one.rays1) for one in sampled], np.bool_
            ).reshape(-1, _MAX_MATCHES),
            cam2_from_cam1=np.array([one.cam2_from_cam1 for one in sampled]).reshape(-1, 3, 4),
            focal_px=np.array([one.focal_px for one in sampled]),
        )
        fits = fit_pairs(samples)
        lies = (fits.errors_px < _INLYING_PX) & samples.is_used
        inlying = lies.sum(axis=1) / np.maximum(samples.is_used.sum(axis=1), 1)
        is_better = (fits.swung_rad > _SWUNG_RAD) | (fits.turned_rad > _TURNED_RAD)
        motion = _padded([one.motion_px for one in sampled])
        stays = (motion < _STAYED_PX) & samples.is_used
        moves = np.array([_moves(one.motion_px) for one in sampled], np.bool_)
        weights = np.array([one.weight for one in sampled])
        is_disputed = (is_better & (fits.gain > _MIN_GAIN)) | (inlying < _MIN_INLYING_SHARE)
        return cls(
            ends=np.array([(one.pair.first, one.pair.second) for one in sampled], np.int64).reshape(
                -1, 2
            ),
            full_weights=weights,
            weights=weights,
            inlying=inlying,
            fits=fits,
            is_disputed=is_disputed,
            # Many pairs contradict a right map by a little, where something moves before the camera
            # or images are blurred.
            clearness=is_disputed
            * np.where(
                inlying < _MIN_INLYING_SHARE, 1.0, np.clip(fits.gain / _CLEAR_GAIN, 0.0, 1.0)
            ),
            is_agreed=np.ones(len(sampled), np.bool_),
            is_contested=False,
            num_matches=np.where(moves, samples.is_used.sum(axis=1), 0).astype(np.float64),
            num_stay=np.where(moves, stays.sum(axis=1), 0).astype(np.float64),
            num_stay_unexplained=np.where(moves, (stays & ~lies).sum(axis=1), 0).astype(np.float64),
        )

    def weighed_anew(
        self, is_agreed: Callable[[ImagePair], bool], *, asks_of_all: bool
    ) -> _Examined:
        """With less weight for pairs that contradict the map, and that no third view confirms.

        A verified pair alone may be wrong itself. Asking takes some ms each, so pairs are asked
        where many of them contradict. Pairs that are not asked count as confirmed.
        """
        if _share(self.is_disputed, self.full_weights) < DISPUTED_RATIO:
            return self
        pairs = [ImagePair.of(FrameId(int(a)), FrameId(int(b))) for a, b in self.ends]
        asked = np.full(len(pairs), asks_of_all) | self.is_disputed
        agreed = np.array(
            [not asks or is_agreed(pair) for pair, asks in zip(pairs, asked, strict=True)], np.bool_
        )
        is_unproven = self.is_disputed & ~agreed
        return replace(
            self,
            is_agreed=agreed,
            is_contested=True,
            weights=np.where(is_unproven, _UNPROVEN_WEIGHT, 1.0) * self.full_weights,
        )

    def summary(self, graph: SceneGraph) -> PairsEvidence:
        """All pairs together."""
        order = {frame_id: number for number, frame_id in enumerate(graph.keyframe_ids)}
        gaps = np.array([order[FrameId(int(b))] - order[FrameId(int(a))] for a, b in self.ends])
        is_far = np.abs(gaps) >= max(_FAR_KEYFRAMES, _FAR_RATIO * len(order))
        num_matches = max(1.0, float(self.num_matches.sum()))
        return PairsEvidence(
            num_pairs=len(self.ends),
            is_contested=self.is_contested,
            disputed_ratio=_share(self.is_disputed, self.weights),
            disputed_inlying_ratio=(
                float(np.median(self.inlying[self.is_disputed])) if self.is_disputed.any() else 0.0
            ),
            num_far=int(is_far.sum()),
            far_disputed_ratio=_share(self.is_disputed[is_far], self.weights[is_far]),
            stays_ratio=float(self.num_stay.sum()) / num_matches,
            stays_unexplained_ratio=float(self.num_stay_unexplained.sum()) / num_matches,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sample:
    """Some matches (M,) of a pair of registered keyframes."""

    pair: ImagePair
    rays1: Float64Array  # (M, 3)
    rays2: Float64Array  # (M, 3)
    motion_px: Float64Array  # (M,) in the image, at an image edge of 1000 px
    cam2_from_cam1: Float64Array  # (3, 4) of the map
    focal_px: float  # at an image edge of 1000 px
    weight: float

    @classmethod
    def of(cls, verified: VerifiedPair, views: Views, sparse_map: SparseMap) -> _Sample | None:
        """A sample of a pair; None where too few matches have viewing rays."""
        first, second = views[verified.pair.first], views[verified.pair.second]
        rows1, rows2 = some_matches(verified, min(verified.num_inliers, _MAX_MATCHES))
        points1_xy = first.keyframe.features.keypoints_xy[rows1]
        points2_xy = second.keyframe.features.keypoints_xy[rows2]
        rays1, rays2 = first.rays[rows1], second.rays[rows2]
        is_seen = np.isfinite(rays1.sum(axis=1) + rays2.sum(axis=1))
        if np.count_nonzero(is_seen) < _MIN_MATCHES:
            return None
        scale = max(first.scale, second.scale)
        offsets = points2_xy[is_seen] - points1_xy[is_seen]
        is_same_view = first.keyframe.camera_key == second.keyframe.camera_key
        return cls(
            pair=verified.pair,
            rays1=rays1[is_seen],
            rays2=rays2[is_seen],
            motion_px=(
                np.hypot(offsets[:, 0], offsets[:, 1]) / scale
                if is_same_view
                else np.full(len(offsets), np.inf)
            ),
            cam2_from_cam1=compose_poses(second.cam_from_world, invert_pose(first.cam_from_world)),
            focal_px=math.sqrt(first.focal_px * second.focal_px) / scale,
            weight=float(sparse_map.num_independent_inliers(verified)),
        )


def _stacked(rays: Sequence[Float64Array]) -> Float64Array:
    """Rays (M, 3) of each pair as one array (B, N, 3), filled up with the optical axis."""
    stacked = np.zeros((len(rays), _MAX_MATCHES, 3))
    stacked[..., 2] = 1.0
    for row, one in zip(stacked, rays, strict=True):
        row[: len(one)] = one
    return stacked


def _padded(values: Sequence[Float64Array]) -> Float64Array:
    """Values (M,) of each pair as one array (B, N), filled up with infinity."""
    padded = np.full((len(values), _MAX_MATCHES), np.inf)
    for row, one in zip(padded, values, strict=True):
        row[: len(one)] = one
    return padded


def _moves(motion_px: Float64Array) -> bool:
    """Whether the matches of a pair that do not stay moved clearly."""
    others_px = motion_px[(motion_px >= _STAYED_PX) & np.isfinite(motion_px)]
    return len(others_px) > 0 and bool(np.median(others_px) >= _MOVING_PX)


def _share(which: BoolArray, weights: Float64Array) -> float:
    """The share of the weight (B,) that some have; 0 where there is none."""
    return _mean(which.astype(np.float64), weights)


def _mean(values: Float64Array, weights: Float64Array) -> float:
    """The mean of values (B,) by their weights (B,); 0 where there is none."""
    return float((values * weights).sum() / max(float(weights.sum()), 1e-9))


def _looks_up_ratio(sparse_map: SparseMap, placement: Placement | None) -> float:
    """The share of cameras that look at the sky; 0 for a map that lies nowhere on the globe."""
    ids = sparse_map.registered_ids
    if placement is None or not ids:
        return 0.0
    enu_from_map = placement.georeference.enu_from_map[:, :3]
    axes = np.array([sparse_map.cam_from_world(i)[2, :3] for i in ids]) @ enu_from_map.T
    elevations = np.arcsin(axes[:, 2] / np.maximum(np.linalg.norm(axes, axis=1), 1e-12))
    return float((elevations > _SKYWARD_RAD).mean())
