"""Cameras that are crops of another one: where their principal point is.

Images of which some were cropped come with two sizes, and so as two cameras. A crop on one side
leaves the principal point off the middle of what remains. Where two cameras have the same width or
height, the fundamental matrices vote on where in the larger image the smaller one lay, both having
one focal length; a map that fits clearly better confirms it, and refines the principal point.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.camera_models import LensKind
from engine.estimators.calibration_votes import CalibrationVote, GuessedView, vote_on
from engine.estimators.lenses import camera_focal_px, lens_kind
from engine.events import CropFound
from engine.mapping.camera_changes.trial_maps import (
    ChangedMap,
    candidate_map,
    estimated,
    fits_better,
    may_change,
)
from engine.mapping.cameras.cameras import CameraChange, with_focal_length
from engine.mapping.maps.restarts import MapBuilder
from engine.mapping.model.bundle_adjustment import refine_principal_point
from engine.mapping.model.growth import GrowthConfig, adjust_in_place
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import FrameId, VerifiedPair

_MIN_CROP_RATIO = 0.03  # of the larger image's edge
_MIN_KEYFRAMES = 3  # of each of the two cameras
_MIN_KEYFRAMES_TOGETHER = 8
_MAX_EXAMINED = 4  # pairs of cameras at one time
_MORE_TO_EXAMINE = 1.4  # times the keyframes at the last time
_SHIFTS = np.linspace(-1.0, 1.0, 9)  # of the cut off part: from one side to the other
_MIN_SHIFT = 0.4
_REFINEMENTS = 3  # of principal point and everything else by turns
_BETTER_VOTE_RATIO = 0.985  # of the cost of the votes with a principal point in the middle
_MAX_SHIFT = 1.2  # where a map may put it: beyond the larger image's middle there is no crop
_MAX_VOTING_PAIRS = 200  # the strongest ones


class CameraCrops:
    """Looks among the cameras of a run for crops of others.

    Args:
        graph: holds all keyframes and pairs.
        builder: builds the maps that try a crop.
        growth: thresholds of adjusting them.
        emit: takes the events.
    """

    def __init__(
        self, *, graph: SceneGraph, builder: MapBuilder, growth: GrowthConfig, emit: EventSink
    ) -> None:
        self._graph = graph
        self._builder = builder
        self._growth = growth
        self._emit = emit
        self._num_examined: dict[tuple[str, str], int] = {}
        self._found: dict[str, str] = {}  # crops, and what they are crops of

    def facts(self) -> dict[str, Any]:
        """What was examined, and found."""
        return {
            "num_examined": [[*keys, num] for keys, num in self._num_examined.items()],
            "found": dict(self._found),
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with `facts`."""
        self._num_examined = {(whole, crop): num for whole, crop, num in facts["num_examined"]}
        self._found = dict(facts["found"])

    def find(self, present: SparseMap, *, is_final: bool = False) -> ChangedMap | None:
        """Builds a map in which a camera is a crop of another, when the pairs and the map agree.

        Args:
            present: the map; it stays as it is.
            is_final: whether no more keyframes will come; else cameras are examined again only when
                they have many more than at the last time.
        """
        keyframes = self._keyframes()
        for whole, crop in self._due(present, keyframes, is_final=is_final)[:_MAX_EXAMINED]:
            self._num_examined[whole, crop] = len(keyframes[whole]) + len(keyframes[crop])
            found = self._examine(present, whole, crop, keyframes)
            if found is not None:
                self._found[crop] = whole
                return found
        return None

    def _due(
        self, present: SparseMap, keyframes: Mapping[str, Sequence[FrameId]], *, is_final: bool
    ) -> list[tuple[str, str]]:
        """Pairs of a whole and its possible crop to be examined, those of most keyframes first."""
        due = []
        for whole, crop in itertools.permutations(sorted(keyframes), 2):
            num = len(keyframes[whole]) + len(keyframes[crop])
            num_before = self._num_examined.get((whole, crop), 0)
            enough = 1 + num_before if is_final else _MORE_TO_EXAMINE * num_before
            if (
                num >= max(_MIN_KEYFRAMES_TOGETHER, enough)
                and crop not in self._found
                and _may_be_crop(present, whole, crop)
            ):
                due.append((-num, whole, crop))
        return [(whole, crop) for _, whole, crop in sorted(due)]

    def refined(self, present: SparseMap) -> SparseMap:
        """The map with the principal points of the crops found refined, when it fits no worse."""
        for crop, whole in sorted(self._found.items()):
            candidate = present.copy()
            self._refine(candidate, whole, crop)
            all_ids = present.keyframe_ids
            if (
                _is_plausible(candidate, whole, crop)
                and candidate.fit(all_ids).gain >= present.fit(all_ids).gain
            ):
                present = candidate
        return present

    def _refine(self, sparse_map: SparseMap, whole: str, crop: str) -> None:
        """Finds the principal point of a crop, which has the lens of the whole images."""
        for _ in range(_REFINEMENTS):
            lens, camera = sparse_map.camera(whole), sparse_map.camera(crop)
            point_xy = camera.principal_point_x, camera.principal_point_y
            if lens.model_name == camera.model_name:
                sparse_map.set_camera_params(crop, lens.params.tolist())
                camera.principal_point_x, camera.principal_point_y = point_xy
            refine_principal_point(sparse_map, crop)
            adjust_in_place(sparse_map, config=self._growth)

    def _keyframes(self) -> dict[str, Sequence[FrameId]]:
        """Keyframes with pairs, by calibration, where there are enough of them."""
        keyframes = self._graph.connected_by_calibration
        return {key: ids for key, ids in keyframes.items() if len(ids) >= _MIN_KEYFRAMES}

    def _examine(
        self,
        present: SparseMap,
        whole: str,
        crop: str,
        keyframes: Mapping[str, Sequence[FrameId]],
    ) -> ChangedMap | None:
        voted = self._voted(present, whole, crop, keyframes)
        if voted is None:
            return None
        vote, offset_xy = voted
        change = _change(present, whole, crop, focal_px=vote.focal_px, offset_xy=offset_xy)
        candidate = candidate_map(self._builder, present, change, changed=keyframes[crop])
        if candidate is None:
            return None
        self._refine(candidate, whole, crop)
        if not _is_plausible(candidate, whole, crop) or not fits_better(
            candidate, present, changed=keyframes[crop]
        ):
            return None
        camera = candidate.camera(crop)
        self._emit(
            CropFound(
                camera_key=crop,
                whole_camera_key=whole,
                focal_px=camera_focal_px(camera),
                principal_point_xy=(
                    float(camera.principal_point_x),
                    float(camera.principal_point_y),
                ),
            )
        )
        return ChangedMap(sparse_map=candidate, change=change)

    def _voted(
        self,
        present: SparseMap,
        whole: str,
        crop: str,
        keyframes: Mapping[str, Sequence[FrameId]],
    ) -> tuple[CalibrationVote, tuple[float, float]] | None:
        """The best vote, and by how much the crop's principal point is off its middle, px."""
        pairs = self._strongest_among([*keyframes[whole], *keyframes[crop]])
        larger, smaller = present.camera(whole), present.camera(crop)
        cut_xy = (larger.width - smaller.width, larger.height - smaller.height)
        whole_view = GuessedView(zoom=1.0, principal_point_xy=(larger.width / 2, larger.height / 2))

        def vote(shift: float, zoom: float = 1.0) -> CalibrationVote | None:
            point_xy = (
                smaller.width / 2 + shift * cut_xy[0] / 2,
                smaller.height / 2 + shift * cut_xy[1] / 2,
            )
            crop_view = GuessedView(zoom=zoom, principal_point_xy=point_xy)
            views = {
                **dict.fromkeys(keyframes[whole], whole_view),
                **dict.fromkeys(keyframes[crop], crop_view),
            }
            return vote_on(pairs, views, edge_px=max(larger.width, larger.height))

        ratio = camera_focal_px(smaller) / camera_focal_px(larger)
        centred = [one for one in (vote(0.0), vote(0.0, ratio)) if one is not None]
        shifted = [(one, float(shift)) for shift in _SHIFTS if (one := vote(shift)) is not None]
        if not centred or not shifted:
            return None
        best, shift = min(shifted, key=lambda option: option[0].cost)
        limit = _BETTER_VOTE_RATIO * min(one.cost for one in centred)
        if abs(shift) < _MIN_SHIFT or best.cost > limit:
            return None
        return best, (shift * cut_xy[0] / 2, shift * cut_xy[1] / 2)

    def _strongest_among(self, frame_ids: Sequence[FrameId]) -> list[VerifiedPair]:
        pairs = self._graph.edges_among(frame_ids)
        pairs.sort(key=lambda pair: (-pair.num_inliers, pair.pair))
        return pairs[:_MAX_VOTING_PAIRS]


def _may_be_crop(present: SparseMap, whole: str, crop: str) -> bool:
    """Whether a camera's images may be what is left of another one's, cut along one axis."""
    larger, smaller = present.camera(whole), present.camera(crop)
    cuts = (larger.width - smaller.width, larger.height - smaller.height)
    is_cut = min(cuts) == 0 and max(cuts) >= _MIN_CROP_RATIO * max(larger.width, larger.height)
    return is_cut and may_change(present, crop) and lens_kind(larger) is LensKind.PERSPECTIVE


def _change(
    present: SparseMap, whole: str, crop: str, *, focal_px: float, offset_xy: tuple[float, float]
) -> CameraChange:
    larger, smaller = copy.deepcopy(present.camera(whole)), copy.deepcopy(present.camera(crop))
    changed = {}
    if may_change(present, whole):
        larger.params = with_focal_length(larger, focal_px)
        changed[whole] = estimated(larger)
    smaller.params = with_focal_length(smaller, camera_focal_px(larger))
    smaller.principal_point_x += offset_xy[0]
    smaller.principal_point_y += offset_xy[1]
    changed[crop] = estimated(smaller)
    return CameraChange(cameras=changed)


def _is_plausible(candidate: SparseMap, whole: str, crop: str) -> bool:
    """Whether the larger image has its middle where the principal point of its crop is."""
    larger, smaller = candidate.camera(whole), candidate.camera(crop)
    cut_px = max(larger.width - smaller.width, larger.height - smaller.height)
    off_px = math.hypot(
        smaller.principal_point_x - smaller.width / 2,
        smaller.principal_point_y - smaller.height / 2,
    )
    return off_px <= _MAX_SHIFT * cut_px / 2
