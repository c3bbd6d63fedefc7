"""Recognising lenses: what an uncalibrated camera has, once its map looks wrong or its name says.

An ordinary start costs nothing here. Small maps by several lenses (`lens_search.py`) compete only
where a camera's calibration is nobody's word, and the map doubts it: few keyframes fit (unless
those that do are many, and show no trace of a wrong lens), the focal length has gone far from where
it began, distortion bends the image like a fisheye's, neighbouring keypoints have large errors in
common. A camera with the name of an action camera is searched in any case, since those switch
between both kinds. A search is a job beside the map, which goes on with the present lens; what it
found is compared with the camera as the map has it by then.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pycolmap

from engine.camera_models import CAMERA_MODELS, LensKind
from engine.config import CamerasConfig, InitializationConfig
from engine.cpu_time import Stage, charged_to
from engine.estimators.camera_limits import corner_displacement, lens_flaw
from engine.estimators.lenses import lens_kind
from engine.geometry import image_scale
from engine.mapping.cameras.cameras import cameras_in
from engine.mapping.cameras.lens_search import (
    LensFit,
    LensFits,
    LensHypothesis,
    fit_lenses,
)
from engine.mapping.maps.restarts import best_connected
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import Residuals, SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import (
    CalibrationOrigin,
    Float64Array,
    FrameId,
    Keyframe,
    Uint32Array,
    VerifiedPair,
)

_MIN_CONNECTED = 7  # keyframes that match others: fewer tell lenses apart badly
_SEARCHED_KEYFRAMES = 8
_MAX_SEARCHES = 3  # of a camera
_MORE_TO_SEARCH = 1.5  # times the keyframes of the last search
_MIN_CONNECTED_WITHOUT_MAP = 10
_MANY_MISSING_RATIO = 0.25  # of the keyframes that match others
_MIN_MISSING = 3
# Mean of the latest keyframes, at an edge of 1000 px: by less no other lens can fit clearly better.
_LEAST_ERROR_PX = 0.35
_SHARED_RATIO = 0.5  # of their squared errors, which neighbours have in common: more than noise
# Likewise, of enough keyframes: wrong lenses give 0.28 and more, right ones 0.02 to 0.2.
_LEAST_SHARED_RATIO = 0.2
_ENOUGH_FITTING = 9  # keyframes
_NEIGHBOR_CELLS = 32  # across the image's longer edge; keypoints in one are neighbours
_SAME_KEYPOINT_PX = 2.0  # keypoints as close as this have one noise
_MIN_NEIGHBORS = 50  # pairs of them
_MAX_CONNECTED_FOR_ERRORS = 18
_FAR_FOCAL_FACTOR = 1.4  # from where the focal length began
_BENT_DISPLACEMENT = 0.05  # of the image's corner by distortion
_NEW_FOCAL_FACTOR = 1.12  # from the map's focal length: worth building anew
_SAME_FOCAL_FACTOR = 1.1
_CLEAR_SIGMAS = 2.0  # of as many observations as fit, that a lens of another kind must have more
_MAX_FISHEYE_K = 1.0 / 6.0  # tan(theta) is about theta (1 + theta^2 / 3): beyond, a perspective
_EQUAL_GAIN_RATIO = 0.97  # of the best: fits as well
_MIN_POSED_RATIO = 0.6  # of the searched keyframes
_MAX_FISHEYE_FOCAL_RATIO = 1.1  # of the edge: in a narrower view no fisheye shows
_PERSPECTIVE_RATIOS = (0.45, 0.9, 1.8, 3.6)  # focal lengths tried, of the edge
_FISHEYE_RATIOS = (0.4, 0.7)

_FISHEYE_TO_TRY = "SIMPLE_RADIAL_FISHEYE"
_UNPROVEN = (
    CalibrationOrigin.ASSUMED,
    CalibrationOrigin.TWO_VIEW_GEOMETRIES,
    CalibrationOrigin.RECOGNISED,
)

FindMatches = Callable[[VerifiedPair], Uint32Array]  # (M, 2) rows of all its matches


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecognisedLens:
    """A lens that explains a camera's keyframes better than the present one."""

    camera_key: str
    camera: pycolmap.Camera
    poses: Mapping[
        FrameId, Float64Array
    ]  # (3, 4) of some of its keyframes, in a world of their own
    former_model: str
    gain_ratio: float  # how much better it fits than any of the former kind; 1: it is of that kind


@dataclass(slots=True)
class _Searches:
    """What was searched of one camera."""

    num: int = 0
    num_connected: int = 0  # at the last one
    focal_px: float | None = None  # that it confirmed or found


class LensRecognition:
    """Decides when lenses are searched, and what a search says.

    Args:
        cameras: the model of ordinary cameras, and whether lenses are searched at all.
        initialization: thresholds of starting.
        growth: thresholds of growing.
        graph: holds keyframes and pairs.
        new_map: makes an empty map.
        all_matches: the matches of a pair, verified or not.
        seed: of the estimation of relative poses.
    """

    def __init__(
        self,
        cameras: CamerasConfig,
        *,
        initialization: InitializationConfig,
        growth: GrowthConfig,
        graph: SceneGraph,
        new_map: Callable[[], SparseMap],
        all_matches: FindMatches,
        seed: int,
    ) -> None:
        self._model = cameras.model
        self._is_wanted = cameras.recognise_lenses
        self._initialization = initialization
        self._growth = growth
        self._graph = graph
        self._new_map = new_map
        self._all_matches = all_matches
        self._seed = seed
        self._searches: dict[str, _Searches] = {}
        self._searched = "", 0  # the camera searched last, and its connected keyframes then
        self._num_connected_at_errors: dict[str, int] = {}  # when errors were small, or searched

    def facts(self) -> dict[str, Any]:
        """What was searched, and examined."""
        return {
            "searches": {key: asdict(done) for key, done in self._searches.items()},
            "num_at_errors": dict(self._num_connected_at_errors),
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with `facts`."""
        self._searches = {key: _Searches(**done) for key, done in facts["searches"].items()}
        self._num_connected_at_errors = dict(facts["num_at_errors"])

    def doubted(self, sparse_map: SparseMap) -> str | None:
        """A camera whose lens should be searched now."""
        if not self._is_wanted or CAMERA_MODELS[self._model].kind is not LensKind.PERSPECTIVE:
            return None  # the latter somebody has chosen
        connected = self._graph.connected_by_calibration.items()
        return next((key for key, ids in connected if self._is_doubted(sparse_map, key, ids)), None)

    def search(self, sparse_map: SparseMap, camera_key: str) -> Callable[[], LensFits]:
        """The search of a camera's lens, on frozen keyframes and pairs, for any one thread.

        `conclude` takes what it finds. A search of which nothing comes counts as none.

        Args:
            sparse_map: the map; need not be initialised.
            camera_key: the doubted camera.
        """
        self._searched = camera_key, self._num_connected(camera_key)
        pairs = self._graph.edges_of(camera_key)
        frame_ids = best_connected(pairs, size=_SEARCHED_KEYFRAMES)
        return functools.partial(
            _search,
            [self._graph.keyframe(i) for i in self._graph.keyframe_ids if i in frame_ids],
            [
                replace(pair, inlier_matches_idx=self._all_matches(pair))
                for pair in pairs
                if pair.pair.first in frame_ids and pair.pair.second in frame_ids
            ],
            self._hypotheses(sparse_map.camera(camera_key)),
            new_map=self._new_map,
            initialization=self._initialization,
            growth=self._growth,
            seed=self._seed,
        )

    def conclude(self, sparse_map: SparseMap, found: LensFits) -> RecognisedLens | None:
        """What the search that began last says of its camera, as the map has it by now.

        Returns:
            None when the present lens is as good, or nothing is clear.
        """
        camera_key, num_connected = self._searched
        present = sparse_map.camera(camera_key)
        chosen = choice(found.fits, kind=lens_kind(present))
        done = self._searches.setdefault(camera_key, _Searches())
        done.num += 1
        done.num_connected = num_connected
        self._num_connected_at_errors[camera_key] = num_connected
        if chosen is None:
            return None
        done.focal_px = float(chosen.fit.camera.mean_focal_length())
        is_same = (
            lens_kind(chosen.fit.camera) is lens_kind(present)
            and camera_key in cameras_in(sparse_map)
            and _factor(done.focal_px, present.mean_focal_length()) < _NEW_FOCAL_FACTOR
        )
        if is_same:
            return None
        return RecognisedLens(
            camera_key=camera_key,
            camera=chosen.fit.camera,
            poses=chosen.fit.poses,
            former_model=present.model_name,
            gain_ratio=chosen.gain_ratio,
        )

    def _num_connected(self, camera_key: str) -> int:
        return len(self._graph.connected_by_calibration.get(camera_key, ()))

    def _is_doubted(
        self, sparse_map: SparseMap, camera_key: str, connected: Sequence[FrameId]
    ) -> bool:
        done = self._searches.get(camera_key, _Searches())
        enough = max(_MIN_CONNECTED, _MORE_TO_SEARCH * done.num_connected)
        if len(connected) < enough or done.num >= _MAX_SEARCHES:
            return False
        prior = sparse_map.camera_prior(camera_key)
        hint = self._graph.keyframe(connected[0]).intrinsics_prior
        is_named = hint is not None and hint.is_fisheye and not prior.origin.is_given
        if prior.is_constant or not (is_named or prior.origin in _UNPROVEN):
            return False
        return (is_named and not done.num) or self._looks_wrong(sparse_map, camera_key, connected)

    def _looks_wrong(
        self, sparse_map: SparseMap, camera_key: str, connected: Sequence[FrameId]
    ) -> bool:
        """Whether the map of a camera's connected keyframes speaks against its lens."""
        num_registered = sum(1 for i in connected if sparse_map.is_registered(i))
        if not num_registered:
            return len(connected) >= _MIN_CONNECTED_WITHOUT_MAP
        many = max(_MIN_MISSING, _MANY_MISSING_RATIO * len(connected))
        if len(connected) - num_registered >= many:
            return not self._is_fitting(sparse_map, camera_key, connected)
        camera = sparse_map.camera(camera_key)
        searched_px = self._searches.get(camera_key, _Searches()).focal_px
        began_px = searched_px or sparse_map.camera_prior(camera_key).focal_px
        if _factor(camera.mean_focal_length(), began_px) > _FAR_FOCAL_FACTOR:
            return True
        if searched_px is not None:
            return False  # what else there is to see a search has seen
        if abs(corner_displacement(camera)) > _BENT_DISPLACEMENT:
            return True
        return self._has_large_errors(sparse_map, camera_key, connected)

    def _is_fitting(
        self, sparse_map: SparseMap, camera_key: str, connected: Sequence[FrameId]
    ) -> bool:
        """Whether many keyframes of a camera fit its lens, so that another thing keeps others out.

        What a lens does to a keypoint it does to its neighbours, too.
        """
        fitting = [i for i in connected if sparse_map.is_registered(i)][-_ENOUGH_FITTING:]
        if len(fitting) < _ENOUGH_FITTING:
            return False
        residuals = [sparse_map.residuals(frame_id) for frame_id in fitting]
        cell_px = _cell_px(sparse_map.camera(camera_key))
        return shared_error_ratio(residuals, cell_px=cell_px) < _LEAST_SHARED_RATIO

    def _has_large_errors(
        self, sparse_map: SparseMap, camera_key: str, connected: Sequence[FrameId]
    ) -> bool:
        """Whether the latest keyframes of a camera fit the map badly; examined now and then.

        Only while the map is small: a wrong lens shows early, drift comes later. What a lens does
        to a keypoint it does to its neighbours, too; the noise of keypoints is their own. Where
        errors are large, they are examined again until a search has concluded.
        """
        examined = self._num_connected_at_errors.get(camera_key, 0)
        if not _MORE_TO_SEARCH * examined <= len(connected) <= _MAX_CONNECTED_FOR_ERRORS:
            return False
        camera = sparse_map.camera(camera_key)
        latest = [i for i in connected[-_SEARCHED_KEYFRAMES:] if sparse_map.is_registered(i)]
        residuals = [sparse_map.residuals(frame_id) for frame_id in latest]
        errors_px = np.concatenate([one.errors_px for one in residuals] or [np.zeros(0)])
        errors_px = errors_px[np.isfinite(errors_px)]
        least_px = _LEAST_ERROR_PX * image_scale(camera.width, camera.height)
        is_large = (
            float(errors_px.sum()) > least_px * len(errors_px)
            and shared_error_ratio(residuals, cell_px=_cell_px(camera)) > _SHARED_RATIO
        )
        if not is_large:
            self._num_connected_at_errors[camera_key] = len(connected)
        return is_large

    def _hypotheses(self, present: pycolmap.Camera) -> list[LensHypothesis]:
        edge_px = max(present.width, present.height)
        return [
            LensHypothesis(model=model, focal_px=ratio * edge_px)
            for model, ratios in (
                (self._model, _PERSPECTIVE_RATIOS),
                (_FISHEYE_TO_TRY, _FISHEYE_RATIOS),
            )
            for ratio in ratios
        ]


def _cell_px(camera: pycolmap.Camera) -> float:
    """The edge of the square in which keypoints of a camera are neighbours."""
    return max(camera.width, camera.height) / _NEIGHBOR_CELLS


def shared_error_ratio(residuals: Sequence[Residuals], *, cell_px: float) -> float:
    """How much of the squared reprojection errors neighbouring keypoints have in common.

    About 0 where errors are the noise of each keypoint, up to 1 where the model of the camera bends
    the image: the correlation of the offsets of neighbours.

    Args:
        residuals: of some keyframes, each by itself.
        cell_px: keypoints in one square cell of this size are neighbours.

    Returns:
        0 where too few keypoints have neighbours.
    """
    couples = [_neighboring_offsets(one, cell_px=cell_px) for one in residuals]
    first = np.concatenate([one for one, _ in couples]) if couples else np.empty((0, 2))
    second = np.concatenate([other for _, other in couples]) if couples else np.empty((0, 2))
    squares = 0.5 * float((first**2).sum() + (second**2).sum())
    if len(first) < _MIN_NEIGHBORS or squares == 0.0:
        return 0.0
    return float((first * second).sum()) / squares


def _neighboring_offsets(
    residuals: Residuals, *, cell_px: float
) -> tuple[Float64Array, Float64Array]:
    """The offsets (K, 2) of keypoints, and (K, 2) of a neighbour of each, in one image."""
    is_finite = np.isfinite(residuals.offsets_xy).all(axis=1)
    keypoints_xy, offsets_xy = residuals.keypoints_xy[is_finite], residuals.offsets_xy[is_finite]
    cells = np.floor(keypoints_xy / cell_px)
    order = np.lexsort((cells[:, 0], cells[:, 1]))
    keypoints_xy, offsets_xy, cells = keypoints_xy[order], offsets_xy[order], cells[order]
    apart_px = np.linalg.norm(np.diff(keypoints_xy, axis=0), axis=1)
    is_couple = (np.diff(cells, axis=0) == 0.0).all(axis=1) & (apart_px > _SAME_KEYPOINT_PX)
    return offsets_xy[:-1][is_couple], offsets_xy[1:][is_couple]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A fit to believe."""

    fit: LensFit
    gain_ratio: float


def choice(fits: Sequence[LensFit], *, kind: LensKind) -> Choice | None:
    """The fit to believe, best fits first: of the present kind unless another is clearly better.

    Both kinds can have the same images: distortion turns a fisheye into a perspective, and the
    other way round. Which of them fits a little better says as much of the rest of the distortion
    as of the kind; so a fisheye closer to a perspective than to equal angles is no evidence, and
    neither are a few observations more, as many as chance may give.

    None when nothing fits, or fits of the present kind that are as good differ in focal length: a
    plane seen head-on, a turn, too little motion.
    """
    same = [fit for fit in fits if lens_kind(fit.camera) is kind]
    others = [
        fit for fit in fits if lens_kind(fit.camera) is not kind and not _is_like_perspective(fit)
    ]
    if others and (not same or _is_clearly_better(others[0], same[0])):
        ratio = others[0].gain / same[0].gain if same else math.inf
        return Choice(fit=others[0], gain_ratio=ratio) if _is_clear(others) else None
    return Choice(fit=same[0], gain_ratio=1.0) if same and _is_clear(same) else None


def _is_clearly_better(one: LensFit, other: LensFit) -> bool:
    return one.gain - other.gain > _CLEAR_SIGMAS * math.sqrt(other.gain)


def _is_like_perspective(fit: LensFit) -> bool:
    """Whether a fisheye's distortion makes it one in name only."""
    camera = fit.camera
    if lens_kind(camera) is not LensKind.FISHEYE:
        return False
    return float(camera.params[camera.extra_params_idxs()[0]]) > _MAX_FISHEYE_K


def _is_clear(fits: Sequence[LensFit]) -> bool:
    best = fits[0]
    return all(
        _factor(fit.camera.mean_focal_length(), best.camera.mean_focal_length())
        < _SAME_FOCAL_FACTOR
        for fit in fits
        if fit.gain >= _EQUAL_GAIN_RATIO * best.gain
    )


@charged_to(Stage.LENS_SEARCH)
def _search(
    keyframes: Sequence[Keyframe],
    pairs: Sequence[VerifiedPair],
    hypotheses: Sequence[LensHypothesis],
    *,
    new_map: Callable[[], SparseMap],
    initialization: InitializationConfig,
    growth: GrowthConfig,
    seed: int,
) -> LensFits:
    """How lenses that can exist fit some keyframes; the job of another thread."""
    fits = fit_lenses(
        keyframes,
        pairs,
        hypotheses,
        new_map=new_map,
        initialization=initialization,
        growth=growth,
        seed=seed,
    )
    return LensFits(
        fits=tuple(fit for fit in fits if _is_possible(fit, num_keyframes=len(keyframes)))
    )


def _is_possible(fit: LensFit, *, num_keyframes: int) -> bool:
    camera = fit.camera
    if lens_flaw(camera) or len(fit.poses) < _MIN_POSED_RATIO * num_keyframes:
        return False
    edge_px = max(camera.width, camera.height)
    is_fisheye = lens_kind(camera) is LensKind.FISHEYE
    return not is_fisheye or camera.mean_focal_length() <= _MAX_FISHEYE_FOCAL_RATIO * edge_px


def _factor(one_px: float, other_px: float) -> float:
    """The larger of two focal lengths over the smaller one."""
    return float(np.exp(abs(np.log(one_px / other_px))))
