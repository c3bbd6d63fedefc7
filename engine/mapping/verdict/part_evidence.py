"""How surely the parts of a map are joined: which pairs hold them in place, which contradict it.

A part may agree with itself in every pair and still stand in the wrong place, or be of the wrong
size: what says so are the few pairs between it and the rest, which drown among all others. So a map
is divided where little holds it together, by its maximum spanning tree of pairs that agree with it,
and each part is judged by the pairs across alone. A part moved along the line of motion, or of
another size, may contradict no epipolar line; but then what both sides show are different points of
the map. (Spanning trees of pair evidence: Snavely et al.,
CVPR 2008; measurements that contradict each other show which are wrong: Zach et al., CVPR 2010.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx
import numpy as np

from engine.estimators.lenses import camera_focal_px, unit_rays
from engine.estimators.pair_fit import PairSamples, epipolar_errors_px
from engine.geometry import compose_poses, image_scale, invert_pose
from engine.mapping.model.sparse_map import SparseMap
from engine.types import (
    BoolArray,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    VerifiedPair,
)

_NUM_MATCHES = 32  # of a pair that are looked at, spread over all
_MIN_INLIERS = 15  # of a pair that counts
_INLYING_PX = 3.0  # from the epipolar lines, at an image edge of 1000 px
_MIN_INLYING_RATIO = 0.5  # of the matches, or the pair contradicts the map
_MIN_CONTRADICTING = 2  # pairs across: one alone may be false
_CONTESTED_RATIO = 0.5  # of the evidence across, that contradicts, nearly as strong as what holds
_NEARLY_AS_STRONG = 0.7  # times as strong
_LONE_CONTRADICTING = 3  # pairs that do, against a single one that holds, however strong it is
_OUTWEIGHED_RATIO = 0.2  # likewise, that is stronger than what holds
_CLEARLY_STRONGER = 1.2  # times as strong
NUM_ASKED = 8  # pairs that contradict, strongest first, whether a third view confirms them
_UNPROVEN_WEIGHT = 0.25  # of one that none confirms
_LEAST_JOINED = 3  # keyframes of a part whose joint must be firm; fewer are held by their own pairs
_MIN_WITH_POINT = 40  # matches across that observe a point on either side
_TORN_RATIO = 0.4  # of them, that observe the same point on both sides
# Likewise, of one keyframe: its points vary more, as a blurred one's do. Right ones have 0.38 and
# more; of 384 that were moved, 0.3 finds one less than 0.4.
_LONE_TORN_RATIO = 0.3
_THIN_RATIO = 0.6  # of the evidence that commonly holds one keyframe, in all pairs across together
_WEAK_RATIO = 0.5  # likewise, in the strongest of them


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestedPart:
    """Keyframes whose place, relative to all others of the map, pairs across contradict."""

    frame_ids: tuple[FrameId, ...]  # the fewer ones: these, or all others, may be misplaced
    num_pairs: int  # across
    num_contradicting: int  # of them
    contradicting_ratio: float  # of their evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class TornPart:
    """Keyframes that share few points with all others of the map, though pairs across agree."""

    frame_ids: tuple[FrameId, ...]  # the fewer ones: these, or all others, may be misplaced
    common_ratio: float  # of the matches across that observe points, that observe common ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinJoint:
    """Keyframes that little evidence joins to all others of the map, whatever it says."""

    frame_ids: tuple[FrameId, ...]  # the fewer ones
    num_pairs: int  # across
    strength_ratio: float  # of their evidence, to what commonly holds one keyframe


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsEvidence:
    """What is known of the joints of a map."""

    contested: ContestedPart | None = None  # the largest
    torn: TornPart | None = None  # the one with the fewest common points
    thin: ThinJoint | None = None  # the weakest


def examine_parts(
    sparse_map: SparseMap,
    pairs: Sequence[VerifiedPair],
    *,
    views: Views,
    is_agreed: Callable[[ImagePair], bool] | None = None,
    num_asked: int = NUM_ASKED,
) -> PartsEvidence:
    """Looks for parts of a map that the pairs across contradict, or hardly hold.

    Args:
        sparse_map: the map.
        pairs: of its registered keyframes.
        views: of the keyframes of these pairs.
        is_agreed: whether a third view confirms a pair; None: all count in full.
        num_asked: of how many pairs of a part that is asked.
    """
    counting = [pair for pair in pairs if pair.num_inliers >= _MIN_INLIERS]
    if not counting:
        return PartsEvidence()
    looked_at = _LookedAt.of(sparse_map, counting, views)
    contested: list[ContestedPart] = []
    torn: list[TornPart] = []
    thin: list[ThinJoint] = []
    for part in looked_at.parts():
        place = looked_at.contested(part, is_agreed, num_asked=num_asked)
        if place is not None:
            contested.append(place)
        if (stranger := looked_at.torn(part)) is not None:
            torn.append(stranger)
        if (joint := looked_at.thin(part)) is not None:
            thin.append(joint)
    return PartsEvidence(
        contested=max(contested, key=lambda one: len(one.frame_ids), default=None),
        torn=min(torn, key=lambda one: one.common_ratio, default=None),
        thin=min(thin, key=lambda one: one.strength_ratio, default=None),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LookedAt:
    """Pairs (B,) of a map, and what a look at their matches says."""

    frame_ids: list[FrameId]  # registered
    pairs: Sequence[VerifiedPair]
    ends: Int64Array  # (B, 2) indices of keyframes
    strengths: Float64Array  # (B,) independent inliers
    holding: Float64Array  # (B,) the same, less where no surface shows itself to both so well
    agrees: BoolArray  # (B,) with the map
    num_with_point: Int64Array  # (B,) of the matches, those that observe a point on either side
    num_common: Int64Array  # (B,) of these, those that observe the same point on both sides

    @classmethod
    def of(cls, sparse_map: SparseMap, pairs: Sequence[VerifiedPair], views: Views) -> _LookedAt:
        frame_ids = sparse_map.registered_ids
        index = {frame_id: number for number, frame_id in enumerate(frame_ids)}
        rows = [some_matches(one, _NUM_MATCHES) for one in pairs]
        errors_px, cosines = _look(views, pairs, rows)
        points = _observed(sparse_map, pairs, rows)
        strengths = np.array([sparse_map.num_independent_inliers(one) for one in pairs], np.float64)
        return cls(
            frame_ids=frame_ids,
            pairs=pairs,
            ends=np.array([(index[one.pair.first], index[one.pair.second]) for one in pairs]),
            strengths=strengths,
            holding=strengths * ((1.0 + cosines) / 2.0) ** 2,
            agrees=(errors_px < _INLYING_PX).mean(axis=1) >= _MIN_INLYING_RATIO,
            num_with_point=(points >= 0).any(axis=0).sum(axis=1),
            num_common=((points[0] >= 0) & (points[0] == points[1])).sum(axis=1),
        )

    def parts(self) -> Iterator[BoolArray]:
        """Parts of the map, as masks of keyframes; all others are the rest.

        They are what is left when one pair of the maximum spanning tree is cut, what no pair that
        agrees with the map joins, and each keyframe alone.
        """
        yield from np.eye(len(self.frame_ids), dtype=np.bool_)
        graph: networkx.Graph[int] = networkx.Graph()
        graph.add_nodes_from(range(len(self.frame_ids)))
        for number in np.flatnonzero(self.agrees).tolist():
            first, second = self.ends[number].tolist()
            graph.add_edge(first, second, weight=self.strengths[number])
        tree = networkx.maximum_spanning_tree(graph)
        components = sorted(networkx.connected_components(tree), key=len)
        for component in components[:-1]:
            yield self._mask(component)
        for first, second, data in list(tree.edges(data=True)):
            tree.remove_edge(first, second)
            yield self._mask(networkx.node_connected_component(tree, first))
            tree.add_edge(first, second, **data)

    def _mask(self, members: set[int]) -> BoolArray:
        """The smaller one of a part and the rest."""
        mask = np.zeros(len(self.frame_ids), np.bool_)
        mask[list(members)] = True
        return mask if 2 * len(members) <= len(mask) else ~mask

    def _across(self, part: BoolArray) -> BoolArray:
        return np.asarray(part[self.ends[:, 0]] != part[self.ends[:, 1]])

    def _ids(self, part: BoolArray) -> tuple[FrameId, ...]:
        return tuple(self.frame_ids[number] for number in np.flatnonzero(part).tolist())

    def contested(
        self, part: BoolArray, is_agreed: Callable[[ImagePair], bool] | None, *, num_asked: int
    ) -> ContestedPart | None:
        """What contradicts the place of a part; None where what holds it is stronger."""
        across = self._across(part)
        held, contradicting = across & self.agrees, np.flatnonzero(across & ~self.agrees)
        if len(contradicting) < _MIN_CONTRADICTING:
            return None
        strongest_first = contradicting[np.argsort(-self.strengths[contradicting], kind="stable")]
        against = self.strengths[strongest_first]
        if not _is_contested(self.strengths[held], against):
            return None
        if is_agreed is not None:
            asked = strongest_first[:num_asked].tolist()
            proven = [is_agreed(self.pairs[k].pair) for k in asked]
            weights = np.full(len(against), np.mean(np.where(proven, 1.0, _UNPROVEN_WEIGHT)))
            weights[: len(proven)] = np.where(proven, 1.0, _UNPROVEN_WEIGHT)
            against = weights * against
            if not _is_contested(self.strengths[held], against):
                return None
        return ContestedPart(
            frame_ids=self._ids(part),
            num_pairs=int(across.sum()),
            num_contradicting=len(contradicting),
            contradicting_ratio=float(against.sum() / (against.sum() + self.strengths[held].sum())),
        )

    def torn(self, part: BoolArray) -> TornPart | None:
        """How few points a part shares with the rest; None where they are enough, or unknown."""
        held = self._across(part) & self.agrees
        num_with_point = int(self.num_with_point[held].sum())
        ratio = float(self.num_common[held].sum()) / max(1, num_with_point)
        bound = _LONE_TORN_RATIO if np.count_nonzero(part) == 1 else _TORN_RATIO
        if num_with_point < _MIN_WITH_POINT or ratio >= bound:
            return None
        return TornPart(frame_ids=self._ids(part), common_ratio=ratio)

    def thin(self, part: BoolArray) -> ThinJoint | None:
        """How little joins a part to the rest; None where it is enough, or the part is small."""
        if np.count_nonzero(part) < _LEAST_JOINED:
            return None
        held = self._across(part) & self.agrees
        common = self._common_strength()
        if not common or self.strengths[held].max(initial=0.0) >= _WEAK_RATIO * common:
            return None
        ratio = float(self.holding[held].sum()) / common
        if ratio >= _THIN_RATIO:
            return None
        return ThinJoint(frame_ids=self._ids(part), num_pairs=int(held.sum()), strength_ratio=ratio)

    def _common_strength(self) -> float:
        """The strength of the strongest pair of a keyframe, of the middle one."""
        strongest = np.zeros(len(self.frame_ids))
        for column in self.ends[self.agrees].T:
            np.maximum.at(strongest, column, self.strengths[self.agrees])
        return float(np.median(strongest))


def _is_contested(held: Float64Array, against: Float64Array) -> bool:
    ratio = against.sum() / max(float(against.sum() + held.sum()), 1e-9)
    strongest, strongest_held = against.max(initial=0.0), held.max(initial=0.0)
    is_lone = len(held) <= 1 and len(against) >= _LONE_CONTRADICTING
    return bool(
        (ratio >= _CONTESTED_RATIO and (is_lone or strongest >= _NEARLY_AS_STRONG * strongest_held))
        or (ratio >= _OUTWEIGHED_RATIO and strongest >= _CLEARLY_STRONGER * strongest_held)
    )


def some_matches(verified: VerifiedPair, num: int) -> Int64Array:
    """The keypoints (2, M) of so many matches of a pair, spread over all; few come repeatedly."""
    rows = verified.inlier_matches_idx[spread(verified.num_inliers, num)]
    return rows.astype(np.int64).T


@functools.lru_cache(maxsize=4096)
def spread(num: int, num_chosen: int) -> Int64Array:
    """So many indices of ``num`` things, from the first to the last."""
    indices = np.linspace(0, num - 1, num_chosen).astype(np.int64)
    indices.setflags(write=False)
    return indices


def _observed(
    sparse_map: SparseMap, pairs: Sequence[VerifiedPair], rows: Sequence[Int64Array]
) -> Int64Array:
    """The points (2, B, M) that both sides of matches (2, M) observe, -1 for none."""
    points = np.zeros((2, len(pairs), _NUM_MATCHES), np.int64)
    for number, (one, (rows1, rows2)) in enumerate(zip(pairs, rows, strict=True)):
        points[0, number] = sparse_map.point3D_ids(one.pair.first)[rows1]
        points[1, number] = sparse_map.point3D_ids(one.pair.second)[rows2]
    return points


def _look(
    views: Views, pairs: Sequence[VerifiedPair], rows: Sequence[Int64Array]
) -> tuple[Float64Array, Float64Array]:
    """Errors (B, M) of matches (2, M) at an edge of 1000 px, and how far apart their rays point.

    Returns:
        Sampson errors under the map's poses, 0 where a match has no viewing ray; and the median
        cosine (B,) of the angle between the two rays of a match in the world.
    """
    rays = np.zeros((2, len(pairs), _NUM_MATCHES, 3))
    cam2_from_cam1 = np.zeros((len(pairs), 3, 4))
    focal_px = np.zeros(len(pairs))
    for number, (one, (rows1, rows2)) in enumerate(zip(pairs, rows, strict=True)):
        first, second = views[one.pair.first], views[one.pair.second]
        rays[0, number], rays[1, number] = first.rays[rows1], second.rays[rows2]
        cam2_from_cam1[number] = compose_poses(
            second.cam_from_world, invert_pose(first.cam_from_world)
        )
        focal_px[number] = np.sqrt(first.scaled_focal_px * second.scaled_focal_px)
    has_rays = np.isfinite(rays.sum(axis=(0, -1)))
    rays[:, ~has_rays] = (0.0, 0.0, 1.0)
    samples = PairSamples(
        rays1=rays[0],
        rays2=rays[1],
        is_used=has_rays,
        cam2_from_cam1=cam2_from_cam1,
        focal_px=focal_px,
    )
    turned = rays[0] @ np.swapaxes(cam2_from_cam1[:, :, :3], 1, 2)
    cosines = np.median((turned * rays[1]).sum(axis=-1), axis=1)
    return np.where(has_rays, epipolar_errors_px(samples), 0.0), cosines


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframeView:
    """A registered keyframe as the map has it."""

    keyframe: Keyframe
    rays: Float64Array  # (N, 3) of its keypoints
    focal_px: float
    scale: float  # of thresholds in px
    cam_from_world: Float64Array  # (3, 4)

    @property
    def scaled_focal_px(self) -> float:
        """The focal length at an image edge of 1000 px."""
        return self.focal_px / self.scale

    @classmethod
    def of(cls, sparse_map: SparseMap, frame_id: FrameId) -> KeyframeView:
        """The view of a keyframe."""
        keyframe = sparse_map.keyframe(frame_id)
        camera = sparse_map.camera(keyframe.calibration_key)
        return cls(
            keyframe=keyframe,
            rays=unit_rays(camera, keyframe.features.keypoints_xy),
            focal_px=camera_focal_px(camera),
            scale=image_scale(camera.width, camera.height),
            cam_from_world=sparse_map.cam_from_world(frame_id),
        )


Views = Mapping[FrameId, KeyframeView]


def views_of(sparse_map: SparseMap, pairs: Iterable[VerifiedPair]) -> Views:
    """The views of the keyframes of some pairs."""
    ids = {frame_id for one in pairs for frame_id in (one.pair.first, one.pair.second)}
    return {frame_id: KeyframeView.of(sparse_map, frame_id) for frame_id in ids}
