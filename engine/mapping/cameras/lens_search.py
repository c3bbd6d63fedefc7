"""Which lens took some keyframes: small maps by several lenses compete, and the best fit wins.

Two views agree with many calibrations. Tracks over a few more views do not: with a wrong lens, part
of the matches finds no point that all views agree on. Each lens gets its own chance from matches
that nothing has verified, since verification by fundamental matrices prefers perspectives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pycolmap

from engine.config import InitializationConfig
from engine.geometry import image_scale, spread_over_image
from engine.mapping.model.bundle_adjustment import solve_globally
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.growth import GrowthConfig, grow_fully
from engine.mapping.model.initialization import InitialPair, initialize, relative_pose_of
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, Int64Array, Keyframe, VerifiedPair

_MAX_KEYPOINTS = 250  # of a keyframe: what they leave open, more would leave open, too
_MIN_KEYFRAMES = 4  # of a small map: fewer views bend to any lens
_EXAMINED_PAIRS = 6  # the best ones, whose relative pose is estimated under each lens
_MAX_STARTS = 2  # of them, that each lens may start from
_ENOUGH_RATIO = 0.6  # of the keyframes registered: no other start is tried
_MIN_INLIERS = 40  # of a pair to start from
_MIN_ANGLE_RAD = float(np.radians(1.5))  # between its rays: a wrong focal length makes them small
_SATURATION_ANGLE_RAD = float(np.radians(16.0))  # wider is no better
_FIT_BOUND_PX = 1.5  # at an edge of 1000 px: an observation this far off does not fit
_HOPELESS_GAIN_RATIO = 0.5  # of the best first fit
_REFINED_PER_KIND = 2  # lenses of one model that get a second map
_NEAR_FOCAL_FACTOR = 1.28  # lenses of one model this close become the same one
_REFINING_PASSES = 2  # of completing tracks and adjusting


@dataclass(frozen=True, slots=True, kw_only=True)
class LensHypothesis:
    """A lens to try: COLMAP's model and the focal length to start from."""

    model: str
    focal_px: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LensFit:
    """How well one lens explains some keyframes."""

    camera: pycolmap.Camera  # as adjusted
    poses: Mapping[FrameId, Float64Array]  # (3, 4) of the keyframes that registered
    gain: float  # sum of 1 - (error / bound)^2 over the observations below the bound


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LensFits:
    """What the search of a camera's lens found."""

    fits: tuple[LensFit, ...] = ()  # of lenses that can exist, best first


def fit_lenses(
    keyframes: Sequence[Keyframe],
    pairs: Sequence[VerifiedPair],
    hypotheses: Sequence[LensHypothesis],
    *,
    new_map: Callable[[], SparseMap],
    initialization: InitializationConfig,
    growth: GrowthConfig,
    seed: int,
) -> list[LensFit]:
    """Builds small maps by each lens; returns how the best ones fit, best first.

    Each lens is held while its map grows and set free then: few keyframes let a focal length run
    away, all of them together bring it home. The best lenses of each kind get a second map, which
    starts from what the first one made of them.

    Args:
        keyframes: of one camera.
        pairs: among them, with all their matches, verified or not.
        hypotheses: lenses to try.
        new_map: makes an empty map.
        initialization: thresholds of starting.
        growth: thresholds of growing.
        seed: of the estimation of relative poses.
    """
    chosen, reduced = _reduced(keyframes, pairs)

    def fit(camera: pycolmap.Camera, num_passes: int) -> LensFit | None:
        sparse_map = _small_map(
            chosen,
            reduced,
            camera,
            num_passes=num_passes,
            new_map=new_map,
            initialization=initialization,
            growth=growth,
            seed=seed,
        )
        return None if sparse_map is None else _fit_of(sparse_map, chosen)

    first = chosen[0]
    cameras = [
        pycolmap.Camera.create_from_model_name(
            1, hypothesis.model, hypothesis.focal_px, first.width, first.height
        )
        for hypothesis in hypotheses
    ]
    coarse = [found for camera in cameras if (found := fit(camera, 0)) is not None]
    near = [found.camera for found in _worth_refining(coarse)]
    fine = [found for camera in near if (found := fit(camera, _REFINING_PASSES)) is not None]
    return sorted(fine, key=lambda found: -found.gain)


def _worth_refining(fits: Sequence[LensFit]) -> list[LensFit]:
    """The best fits of each model that differ in focal length, best first."""
    chosen: list[LensFit] = []
    for fit in sorted(fits, key=lambda fit: -fit.gain):
        same_model = [c for c in chosen if c.camera.model_name == fit.camera.model_name]
        is_known = any(_is_near(fit.camera, c.camera) for c in same_model)
        is_hopeless = bool(chosen) and fit.gain < _HOPELESS_GAIN_RATIO * chosen[0].gain
        if not (is_known or is_hopeless or len(same_model) >= _REFINED_PER_KIND):
            chosen.append(fit)
    return chosen


def _is_near(one: pycolmap.Camera, other: pycolmap.Camera) -> bool:
    ratio = float(one.mean_focal_length() / other.mean_focal_length())
    return 1.0 / _NEAR_FOCAL_FACTOR < ratio < _NEAR_FOCAL_FACTOR


def _small_map(
    keyframes: Sequence[Keyframe],
    pairs: Sequence[VerifiedPair],
    camera: pycolmap.Camera,
    *,
    num_passes: int,
    new_map: Callable[[], SparseMap],
    initialization: InitializationConfig,
    growth: GrowthConfig,
    seed: int,
) -> SparseMap | None:
    """The map of keyframes by one lens; None when no pair starts one."""
    empty = _with_keyframes(new_map(), keyframes, pairs, camera)
    best: SparseMap | None = None
    for initial in _initial_pairs(empty, pairs, seed=seed):
        sparse_map = _with_keyframes(new_map(), keyframes, pairs, camera)
        if not initialize(
            sparse_map,
            initial,
            config=initialization,
            max_iterations=growth.global_bundle_adjustment.max_iterations,
        ):
            continue
        grow_fully(sparse_map, config=growth)
        if best is None or sparse_map.num_registered > best.num_registered:
            best = sparse_map
        if best.num_registered >= _ENOUGH_RATIO * len(keyframes):
            break
    if best is None or best.num_registered < _MIN_KEYFRAMES:
        return None
    _adjust_freely(best, config=growth)
    for _ in range(num_passes):
        best.retriangulate()
        _adjust_freely(best, config=growth)
    return best


def _adjust_freely(sparse_map: SparseMap, *, config: GrowthConfig) -> None:
    """Adjusts all of a map, its lens too, whatever comes of it: a bad one shows by its fit."""
    solve_globally(
        sparse_map.reconstruction,
        constant_camera_ids=(),
        max_iterations=config.global_bundle_adjustment.max_iterations,
        num_threads=config.num_threads,
    )
    sparse_map.filter_all()


def _initial_pairs(
    sparse_map: SparseMap, pairs: Sequence[VerifiedPair], *, seed: int
) -> list[InitialPair]:
    """Pairs to start from: unlike those of a map to keep, they may be narrow, and may only turn."""
    best_first = sorted(pairs, key=lambda pair: (-pair.initial_pair_score, pair.pair))
    found = []
    for verified in best_first[:_EXAMINED_PAIRS]:
        relative = relative_pose_of(sparse_map, verified, seed=seed)
        if relative is None or relative.num_inliers < _MIN_INLIERS:
            continue
        angle = relative.median_triangulation_angle_rad
        if angle < _MIN_ANGLE_RAD:
            continue
        score = relative.num_inliers * min(angle, _SATURATION_ANGLE_RAD)
        found.append(InitialPair(pair=verified.pair, relative_pose=relative, score=score))
    found.sort(key=lambda initial: (-initial.score, initial.pair))
    return found[:_MAX_STARTS]


def _with_keyframes(
    sparse_map: SparseMap,
    keyframes: Sequence[Keyframe],
    pairs: Sequence[VerifiedPair],
    camera: pycolmap.Camera,
) -> SparseMap:
    """The map with keyframes and pairs, none registered, and one camera that nobody knows."""
    prior = CameraPrior.assumed(camera, is_constant=True)
    sparse_map.add_camera(keyframes[0].calibration_key, copy.deepcopy(camera), prior=prior)
    order = {keyframe.frame_id: number for number, keyframe in enumerate(keyframes)}
    pairs_of: dict[FrameId, list[VerifiedPair]] = {frame_id: [] for frame_id in order}
    for pair in pairs:
        pairs_of[max(pair.pair.first, pair.pair.second, key=order.__getitem__)].append(pair)
    for keyframe in keyframes:
        sparse_map.add_keyframe(keyframe, pairs_of[keyframe.frame_id])
    return sparse_map


def _fit_of(sparse_map: SparseMap, keyframes: Sequence[Keyframe]) -> LensFit:
    first = keyframes[0]
    registered = sparse_map.registered_ids
    bound_px = _FIT_BOUND_PX * image_scale(first.width, first.height)
    return LensFit(
        camera=copy.deepcopy(sparse_map.camera(first.calibration_key)),
        poses={i: sparse_map.cam_from_world(i) for i in registered},
        gain=sparse_map.fit(registered, bound_px=bound_px).gain,
    )


# -- less of everything ---------------------------------------------------------------------------


def _reduced(
    keyframes: Sequence[Keyframe], pairs: Sequence[VerifiedPair]
) -> tuple[list[Keyframe], list[VerifiedPair]]:
    """Keyframes with their most matched keypoints, spread over the image, and pairs of those."""
    kept = {keyframe.frame_id: _kept_rows(keyframe, pairs) for keyframe in keyframes}
    small = [
        replace(keyframe, features=keyframe.features.take(kept[keyframe.frame_id]))
        for keyframe in keyframes
    ]
    return small, [_reduced_pair(pair, kept) for pair in pairs]


def _kept_rows(keyframe: Keyframe, pairs: Sequence[VerifiedPair]) -> Int64Array:
    """Rows of at most so many keypoints, those that most pairs match before others, ascending."""
    num_matches = np.zeros(len(keyframe.features), np.int64)
    for pair in pairs:
        num_matches[_rows_in(pair, keyframe.frame_id)] += 1
    most_first = np.argsort(-num_matches, kind="stable")
    most_first = most_first[num_matches[most_first] > 0]
    chosen = spread_over_image(
        keyframe.features.keypoints_xy[most_first],
        size=(keyframe.width, keyframe.height),
        limit=_MAX_KEYPOINTS,
    )
    return np.sort(most_first[chosen])


def _rows_in(pair: VerifiedPair, frame_id: FrameId) -> Int64Array:
    column = 0 if pair.pair.first == frame_id else 1
    if frame_id not in (pair.pair.first, pair.pair.second):
        return np.empty(0, np.int64)
    return pair.inlier_matches_idx[:, column].astype(np.int64)


def _reduced_pair(pair: VerifiedPair, kept: Mapping[FrameId, Int64Array]) -> VerifiedPair:
    rows = pair.inlier_matches_idx.astype(np.int64)
    ends = (kept[pair.pair.first], kept[pair.pair.second])
    is_kept = np.isin(rows[:, 0], ends[0]) & np.isin(rows[:, 1], ends[1])
    renumbered = [np.searchsorted(end, rows[is_kept, i]) for i, end in enumerate(ends)]
    return replace(pair, inlier_matches_idx=np.column_stack(renumbered).astype(np.uint32))
