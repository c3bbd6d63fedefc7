"""Cameras whose keyframes contradict one focal length: what shows it, and where they are split.

A zoom changes the size of everything in the image by one factor; a motion changes that of near
things more than that of far ones. So a change of scale without spread raises a suspicion, and says
which keyframes would share a focal length (their zoom level). The fundamental matrices then vote on
the levels (`estimators/calibration_votes.py`), and only a map that fits clearly better with them is
believed: its focal lengths, which are free, must come out at the levels, and not together. Over a
large jump few pairs hold, and may not vote; then maps try it where keyframes stay out, beside a map
built alike without a split. What remains unconfirmed or outside is doubted, with its keyframes;
where a map that starts at the levels brings their focal lengths together, or fits their keyframes
clearly worse than the one without, they are none.
"""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx
import numpy as np

from engine.estimators.calibration_votes import (
    CalibrationVote,
)
from engine.estimators.lenses import camera_focal_px
from engine.estimators.scale_change import ScaleChange, measure_scale_change
from engine.events import CameraSplit, ZoomSearched
from engine.frame_names import named
from engine.mapping.camera_changes.trial_maps import (
    MAX_ANEW,
    ChangedMap,
    candidate_map,
    changed_map,
    estimated,
    fits_better,
    may_change,
)
from engine.mapping.camera_changes.zoom_levels import (
    LEVEL_GAP,
    MIN_APART,
    ZoomLevel,
    ZoomVotes,
    join_levels,
    joined_to_few,
    largest_first,
    levels_of,
    nearest_levels,
    zoomed_ids,
)
from engine.mapping.cameras.cameras import (
    CameraCalibration,
    CameraChange,
    InitialCamera,
    with_focal_length,
)
from engine.mapping.maps.restarts import MapBuilder
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import (
    FrameId,
    ImagePair,
    Keyframe,
    Uint32Array,
    VerifiedPair,
)

_NUM_WATCHED = 5  # pairs of a new keyframe that are measured
_MIN_INLIERS = 30  # of a pair that shows a zoom
_MIN_JUMP = 0.07  # log of the factor by which a zoom shows
_MIN_JUMP_SPREADS = 2.5  # interquartile ranges of the change of scale
_WEAK_JUMP_SPREADS = 5.0  # where few matches hold, over a large jump
_LEAST_SPREAD = 0.02  # of a change of scale
_MAX_MISS = 0.3  # log of the factor by which a level is missed; more counts no worse
_MIN_KEYFRAMES = 6  # of a camera, before it is examined
_MORE_TO_EXAMINE = 1.3  # times the keyframes at the last time
_MAX_OFF_LEVEL = 0.2  # log of the factor by which a focal length may miss its level
_MAX_OFF_SHARE = 0.5  # of a level's log, where that is more: over large jumps motion adds most
_MAX_TRIALS = 3  # maps that refine the levels of one vote
_MIN_LARGE_JUMP = 0.3  # log of the factor by which levels differ that maps try without a vote
_MIN_KEYFRAMES_PER_LEVEL = 2  # then
_ZOOM_SHARES = (0.8, 1.0)  # of the change of scale: a part of it is motion
_DEFAULT_FOCAL_RATIO = 0.8  # of the longer image edge
_BETTER_UNVOTED_RATIO = 1.15  # of how well keyframes fit a map built alike without a split
_REGROUP_RATIO = 1.1  # times the inliers of its present calibration, and
_REGROUP_INLIERS = 5  # so many more, for a keyframe to take another one
_ILL_ERROR_RATIO = 1.3  # times the typical error of a camera's keyframes
_FAILURES_TO_DOUBT = 3  # times that the pairs voted for a split and no map confirmed it


class _Unconfirmed(enum.Enum):
    """What maps that do not confirm zoom levels say of them."""

    OPEN = enum.auto()  # nothing
    DENIED = enum.auto()  # there are none


class CameraSplits:
    """Watches the pairs of a run for zooms, and splits the cameras that are found to have one.

    Args:
        graph: holds all keyframes and pairs.
        cameras: reports cameras to doubt.
        builder: builds the maps that try a split.
        emit: takes the events.
    """

    def __init__(
        self,
        *,
        graph: SceneGraph,
        cameras: CameraCalibration,
        builder: MapBuilder,
        emit: EventSink,
    ) -> None:
        self._graph = graph
        self._cameras = cameras
        self._builder = builder
        self._emit = emit
        self._changes: dict[ImagePair, tuple[Uint32Array, ScaleChange | None]] = {}
        self._source_key: dict[str, str] = {}  # of each calibration that a split made
        self._suspected: set[str] = set()
        self._num_examined: dict[str, int] = {}
        self._num_failed: Counter[str] = Counter()
        self._unconfirmed: dict[str, list[FrameId]] = {}  # zoomed keyframes by the pairs alone

    # -- what a run that goes on needs ------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What was split, and examined; changes of scale are measured again."""
        return {
            "source_key": dict(self._source_key),
            "suspected": sorted(self._suspected),
            "num_examined": dict(self._num_examined),
            "num_failed": dict(self._num_failed),
            "unconfirmed": {key: list(ids) for key, ids in self._unconfirmed.items()},
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with `facts`."""
        self._source_key = dict(facts["source_key"])
        self._suspected = set(facts["suspected"])
        self._num_examined = dict(facts["num_examined"])
        self._num_failed = Counter(facts["num_failed"])
        self._unconfirmed = {
            key: [FrameId(i) for i in ids] for key, ids in facts["unconfirmed"].items()
        }

    # -- a new keyframe -------------------------------------------------------------------------

    def watch(self, present: SparseMap, pairs: Sequence[VerifiedPair]) -> None:
        """Looks whether the pairs of a new keyframe show a zoom that its calibration denies."""
        strongest = sorted(pairs, key=lambda pair: -pair.num_inliers)[:_NUM_WATCHED]
        for pair in strongest:
            first, second = (self._graph.keyframe(i) for i in (pair.pair.first, pair.pair.second))
            source_key = self._source_of(first.calibration_key)
            if source_key != self._source_of(second.calibration_key):
                continue
            change = self._change(pair)
            if change is None:
                continue
            focal1_px, focal2_px = (
                camera_focal_px(present.camera(one.calibration_key)) for one in (first, second)
            )
            jump = abs(change.log_ratio - math.log(focal2_px / focal1_px))
            is_strong = pair.num_inliers >= _MIN_INLIERS
            if (is_strong and jump > max(_MIN_JUMP, _MIN_JUMP_SPREADS * change.spread)) or (
                jump > max(_MIN_LARGE_JUMP, _WEAK_JUMP_SPREADS * change.spread)
            ):
                self._suspected.add(source_key)

    def calibration_key(
        self, present: SparseMap, keyframe: Keyframe, pairs: Sequence[VerifiedPair]
    ) -> str:
        """The calibration of a split camera that fits a new keyframe best; else its own.

        The one that poses it clearly best in the map. Where several do, its pairs say how much it
        is zoomed against keyframes whose calibration is known.
        """
        source_key = keyframe.calibration_key
        keys = [source_key, *(k for k, source in self._source_key.items() if source == source_key)]
        if len(keys) < 2:
            return source_key
        neighbors = {pair.pair.other(keyframe.frame_id): pair for pair in pairs}
        inliers = {
            key: present.num_pose_inliers(keyframe, key, neighbors=neighbors) for key in keys
        }
        best, second = sorted(keys, key=lambda key: -inliers[key])[:2]
        if _poses_better(inliers[best], inliers[second]):
            return best
        levels = {key: math.log(camera_focal_px(present.camera(key))) for key in keys}
        costs = dict.fromkeys(keys, 0.0)
        for pair in sorted(pairs, key=lambda one: (-one.num_inliers, one.pair))[:_NUM_WATCHED]:
            is_first = pair.pair.first == keyframe.frame_id
            other = self._graph.keyframe(pair.pair.second if is_first else pair.pair.first)
            change = self._change(pair)
            if change is None or other.calibration_key not in levels:
                continue
            log_ratio = -change.log_ratio if is_first else change.log_ratio
            for key, level in levels.items():
                miss = abs(level - levels[other.calibration_key] - log_ratio)
                costs[key] += _sureness(pair, change) * min(miss, _MAX_MISS)
        latest = self._latest_key(keyframe)
        return min(keys, key=lambda key: (costs[key], key != latest))

    def _latest_key(self, keyframe: Keyframe) -> str:
        """The calibration of the keyframe before, of the same camera."""
        keys = [
            before.calibration_key
            for before in map(self._graph.keyframe, self._graph.keyframe_ids)
            if before.camera_key == keyframe.camera_key and before.frame_id != keyframe.frame_id
        ]
        return keys[-1] if keys else keyframe.calibration_key

    # -- examining a camera ---------------------------------------------------------------------

    def find(
        self, present: SparseMap, *, is_final: bool = False, apart: Collection[FrameId] = ()
    ) -> ChangedMap | None:
        """Splits a suspected camera when a map confirms it.

        Args:
            present: the map; it stays as it is.
            apart: keyframes that it does not hold for other reasons than a zoom.
            is_final: whether no more keyframes will come; else a camera is examined again only when
                it has many more than at the last time.
        """
        split_before = set(self._source_key.values()) if is_final else set()
        for source_key in sorted(self._suspected | split_before):
            frame_ids = self._keyframes_of(source_key)
            num_before = self._num_examined.get(source_key, 0)
            enough = 1 + num_before if is_final else _MORE_TO_EXAMINE * num_before
            if len(frame_ids) < max(_MIN_KEYFRAMES, enough):
                continue
            self._num_examined[source_key] = len(frame_ids)
            if not may_change(present, source_key):
                continue
            self._unconfirmed.pop(source_key, None)
            found = self._examine(present, source_key, frame_ids, apart=apart)
            if found is not None:
                self._suspected.discard(source_key)
                return found
        for source_key, zoomed in self._unconfirmed.items():
            if is_final or self._num_failed[source_key] >= _FAILURES_TO_DOUBT:
                self._doubt(source_key, zoomed)
        return None

    def _examine(
        self,
        present: SparseMap,
        source_key: str,
        frame_ids: Sequence[FrameId],
        *,
        apart: Collection[FrameId],
    ) -> ChangedMap | None:
        pairs = self._comparable(present, frame_ids)
        guesses = [self._levels(pairs, only_jumps=only_jumps) for only_jumps in (True, False)]
        voted = self._voted(present, source_key, guesses, pairs)
        if voted is not None and self._are_present(voted[0]):
            return None
        if voted is not None:
            levels, vote = voted
            found = self._confirmed(present, source_key, levels, focal_px=vote.focal_px)
            if isinstance(found, ChangedMap):
                return found
            if found is _Unconfirmed.DENIED:
                voted = None
                self._num_failed.pop(source_key, None)
                self._cameras.remove_zoom_doubt(source_key)
        unplaced = self._unplaced(present, guesses[0], pairs, apart=apart)
        if unplaced is not None:
            found_unvoted = self._confirmed_unvoted(present, source_key, unplaced)
            if found_unvoted is not None:
                return found_unvoted
        suspected = unplaced or (voted[0] if voted is not None else [])
        if suspected:
            self._num_failed[source_key] += 1
            self._unconfirmed[source_key] = zoomed_ids(suspected)
        return None

    def _comparable(self, present: SparseMap, frame_ids: Sequence[FrameId]) -> list[VerifiedPair]:
        """The pairs of keyframes that pairs join to those of the map, or else to most others.

        A zoom is relative: nothing compares keyframes that no pairs join.
        """
        pairs = self._graph.edges_among(frame_ids)
        held = present.registered_ids
        joined = networkx.Graph((one.pair.first, one.pair.second) for one in pairs)
        joined.add_edges_from(itertools.pairwise(held))
        parts = networkx.connected_components(joined)
        chosen = max(parts, key=lambda part: (len(part.intersection(held)), len(part)), default=())
        return [one for one in pairs if one.pair.first in chosen]

    def _confirmed(
        self,
        present: SparseMap,
        source_key: str,
        levels: Sequence[ZoomLevel],
        *,
        focal_px: float,
    ) -> ChangedMap | _Unconfirmed:
        """The camera split as a map confirms it: at the levels, or at those that it keeps apart."""
        for _ in range(_MAX_TRIALS):
            zoomed = zoomed_ids(levels)
            change = self._split(present, source_key, levels, focal_px=focal_px)
            candidate = candidate_map(self._builder, present, change, changed=zoomed)
            if candidate is None:
                return _Unconfirmed.OPEN
            if self._is_denied(candidate, present, source_key, levels):
                return _Unconfirmed.DENIED
            if not fits_better(candidate, present, changed=zoomed):
                return _Unconfirmed.OPEN
            trial = ChangedMap(sparse_map=candidate, change=change)
            if self._is_split(trial.sparse_map, source_key, levels):
                return self._taken(source_key, levels, trial)
            levels, focal_px = self._levels_in(trial.sparse_map, source_key, levels)
            if len(levels) < 2:
                return _Unconfirmed.OPEN
        return _Unconfirmed.OPEN

    def _unplaced(
        self,
        present: SparseMap,
        guess: Sequence[ZoomLevel],
        pairs: Sequence[VerifiedPair],
        *,
        apart: Collection[FrameId],
    ) -> list[ZoomLevel] | None:
        """What the present map holds and levels far from it that it does not; None without such.

        Few pairs hold over a large jump, and they may all be too flat or too weak to vote. What the
        map holds has one focal length there, so that the surest pair to the others tells the jump.
        """
        levels = list(guess)
        while len(levels) > 1:
            one, other = nearest_levels(levels)
            if other.log_zoom - one.log_zoom >= _MIN_LARGE_JUMP:
                break
            levels = join_levels(levels, one, other)
        out = set(_unplaced_ids(present, levels, apart=apart))
        held = {i for one in levels for i in one.frame_ids}.difference(out, apart)
        keys = {self._graph.keyframe(i).calibration_key for i in out | held}
        if min(len(out), len(held)) < _MIN_KEYFRAMES_PER_LEVEL or len(keys) > 1:
            return None
        jumps = [
            (
                _sureness(pair, change),
                change.log_ratio if pair.pair.second in out else -change.log_ratio,
            )
            for pair in pairs
            if (pair.pair.first in out) != (pair.pair.second in out)
            and (change := self._change(pair)) is not None
            and _is_jump(change)
        ]
        _, jump = max(jumps, default=(0.0, 0.0))
        if abs(jump) < _MIN_LARGE_JUMP:
            return None
        return [
            ZoomLevel(frame_ids=tuple(sorted(held)), log_zoom=0.0),
            ZoomLevel(frame_ids=tuple(sorted(out)), log_zoom=jump),
        ]

    def _confirmed_unvoted(
        self, present: SparseMap, source_key: str, levels: Sequence[ZoomLevel]
    ) -> ChangedMap | None:
        """The camera split at levels on which the pairs do not agree, when that brings them in.

        A map without the split from the same focal length shows what the split alone does.
        """
        one_level = ZoomLevel(
            frame_ids=tuple(sorted(i for one in levels for i in one.frame_ids)), log_zoom=0.0
        )
        zoomed = zoomed_ids(levels)
        self._emit(ZoomSearched(camera_key=source_key, frame_ids=tuple(zoomed)))
        for focal_px, share, anew in itertools.product(
            self._starts_px(present, source_key), _ZOOM_SHARES, (False, True)
        ):
            if anew and present.num_registered > MAX_ANEW:
                continue
            guess = [replace(one, log_zoom=share * one.log_zoom) for one in levels]
            tried = functools.partial(
                self._trial, present, source_key, focal_px=focal_px, changed=zoomed, anew=anew
            )
            trial = tried(guess)
            if (
                trial is None
                or not fits_better(trial.sparse_map, present, changed=zoomed)
                or not self._is_split(trial.sparse_map, source_key, guess)
            ):
                continue
            control = tried([one_level])
            if control is None or _brings_in(trial, control, zoomed):
                return self._taken(source_key, guess, trial)
        return None

    def _starts_px(self, present: SparseMap, source_key: str) -> list[float]:
        """Focal lengths from which a map is tried."""
        camera = present.camera(source_key)
        starts_px: list[float] = []
        for focal_px in (
            camera_focal_px(camera),
            _DEFAULT_FOCAL_RATIO * max(camera.width, camera.height),
        ):
            if all(abs(math.log(focal_px / one)) > _MIN_LARGE_JUMP for one in starts_px):
                starts_px.append(focal_px)
        return starts_px

    def _trial(
        self,
        present: SparseMap,
        source_key: str,
        levels: Sequence[ZoomLevel],
        *,
        focal_px: float,
        changed: Collection[FrameId],
        anew: bool,
    ) -> ChangedMap | None:
        """A map with a camera at zoom levels: anew, or around what does not change."""
        change = self._split(present, source_key, levels, focal_px=focal_px)
        candidate = changed_map(self._builder, present, change, changed=changed, anew=anew)
        return None if candidate is None else ChangedMap(sparse_map=candidate, change=change)

    def _taken(self, source_key: str, levels: Sequence[ZoomLevel], trial: ChangedMap) -> ChangedMap:
        """Keeps in mind and reports that a camera is split."""
        self._report(source_key, levels, trial.sparse_map)
        self._cameras.remove_zoom_doubt(source_key)
        others = {key: of for key, of in self._source_key.items() if of != source_key}
        split_off = [key for key in trial.change.cameras if key != source_key]
        self._source_key = {**others, **dict.fromkeys(split_off, source_key)}
        return trial

    def _levels_in(
        self, candidate: SparseMap, source_key: str, levels: Sequence[ZoomLevel]
    ) -> tuple[list[ZoomLevel], float]:
        """The levels by the focal lengths of a map, near ones as one, and the first one's, px."""
        focals_px = [
            camera_focal_px(candidate.camera(key)) for key in _keys(source_key, len(levels))
        ]
        found = [
            replace(level, log_zoom=math.log(focal_px))
            for level, focal_px in zip(levels, focals_px, strict=True)
        ]
        while len(found) > 1:
            one, other = nearest_levels(found)
            if other.log_zoom - one.log_zoom > _MAX_OFF_LEVEL:
                break
            found = join_levels(found, one, other)
        first = largest_first(found)[0].frame_ids
        focal_px = next(math.exp(one.log_zoom) for one in found if one.frame_ids == first)
        return largest_first(found), focal_px

    def _levels(self, pairs: Sequence[VerifiedPair], *, only_jumps: bool) -> list[ZoomLevel]:
        """Zoom levels by the changes of scale.

        The pairs with the surest changes join the keyframes to a tree. Along it all changes count,
        or only jumps, so that walking towards things, which changes the scale a little each time,
        adds up to none.
        """
        joined: networkx.Graph[FrameId] = networkx.Graph()
        for pair in pairs:
            change = self._change(pair)
            if change is None:
                continue
            is_jump = _is_jump(change)
            jump = change.log_ratio if is_jump or not only_jumps else 0.0
            first, second = pair.pair.first, pair.pair.second
            joined.add_edge(first, second, sureness=_sureness(pair, change), jump=jump, first=first)
        tree = networkx.maximum_spanning_tree(joined, weight="sureness")
        log_zoom: dict[FrameId, float] = {}
        for root in sorted(tree):
            if root in log_zoom:
                continue
            log_zoom[root] = 0.0
            for one, other in networkx.bfs_edges(tree, root):
                edge = tree.edges[one, other]
                sign = 1.0 if edge["first"] == one else -1.0
                log_zoom[other] = log_zoom[one] + sign * edge["jump"]
        return levels_of(log_zoom)

    def _are_present(self, levels: Sequence[ZoomLevel]) -> bool:
        """Whether keyframes share a calibration where they share a level, and only there."""
        keys = [{self._graph.keyframe(i).calibration_key for i in one.frame_ids} for one in levels]
        return all(len(one) == 1 for one in keys) and len(set.union(*keys)) == len(levels)

    def _voted(
        self,
        present: SparseMap,
        source_key: str,
        guesses: Sequence[Sequence[ZoomLevel]],
        pairs: Sequence[VerifiedPair],
    ) -> tuple[list[ZoomLevel], CalibrationVote] | None:
        """The levels that the pairs vote for, when that is clearly better than the present."""
        camera = present.camera(source_key)
        votes = ZoomVotes(pairs, camera)
        frame_ids = sorted({i for level in guesses[0] for i in level.frame_ids})
        keys = {i: self._graph.keyframe(i).calibration_key for i in frame_ids}
        base_px = camera_focal_px(camera)
        now = largest_first(
            [
                ZoomLevel(
                    frame_ids=tuple(i for i, own in keys.items() if own == key),
                    log_zoom=math.log(camera_focal_px(present.camera(key)) / base_px),
                )
                for key in sorted(set(keys.values()))
            ]
        )
        without = votes.on(now)
        if without is None:
            return None
        # A guess that the pairs like less than what there is comes from a motion.
        options = [
            votes.agreed(levels)
            for levels in map(joined_to_few, guesses)
            if (vote := votes.on(levels)) is not None and vote.cost < without.cost
        ]
        if len(now) > 1:
            options.append(votes.agreed(now))
        voted = [(vote, levels) for levels in options if (vote := votes.on(levels)) is not None]
        if not voted:
            return None
        best, levels = min(voted, key=lambda option: option[0].cost)
        is_better = len(levels) > 1 and votes.prefer(levels, to=now)
        return (levels, best) if is_better else None

    def regroup(self, present: SparseMap) -> ChangedMap | None:
        """Gives keyframes of split cameras the calibration that poses them best in the map.

        Pairs of one keyframe alone say little of its zoom; the points of a map say more. Points
        that a wrong one bent say nothing, but the keyframe then fits them ill: it is tried, too.
        """
        moved: dict[FrameId, str] = {}
        unsure: dict[FrameId, str] = {}
        for source_key in sorted(set(self._source_key.values())):
            keys = [source_key, *(k for k, one in self._source_key.items() if one == source_key)]
            frame_ids = self._keyframes_of(source_key)
            errors_px = {
                i: present.fit([i]).mean_error_px for i in frame_ids if present.is_registered(i)
            }
            typical_px = float(np.median(list(errors_px.values()))) if errors_px else 0.0
            for frame_id in frame_ids:
                own = self._graph.keyframe(frame_id).calibration_key
                keyframe = self._graph.keyframe(frame_id)
                inliers = {key: present.num_pose_inliers(keyframe, key) for key in keys}
                best = max((key for key in keys if key != own), key=inliers.__getitem__)
                is_ill = errors_px.get(frame_id, 0.0) > _ILL_ERROR_RATIO * typical_px
                if _poses_better(inliers[best], inliers[own]):
                    moved[frame_id] = best
                elif is_ill and not _poses_better(inliers[own], inliers[best]):
                    unsure[frame_id] = best
        for calibration_keys in ({**moved, **unsure}, moved) if unsure else (moved,):
            regrouped = self._regrouped(present, calibration_keys)
            if regrouped is not None:
                return regrouped
        return None

    def _regrouped(
        self, present: SparseMap, calibration_keys: Mapping[FrameId, str]
    ) -> ChangedMap | None:
        """A map in which keyframes have other calibrations; None when they fit no better there."""
        if not calibration_keys:
            return None
        change = CameraChange(cameras={}, calibration_keys=calibration_keys)
        changed = sorted(calibration_keys)
        for anew in (False, True) if present.num_registered <= MAX_ANEW else (False,):
            candidate = changed_map(self._builder, present, change, changed=changed, anew=anew)
            if candidate is not None and fits_better(candidate, present, changed=changed):
                return ChangedMap(sparse_map=candidate, change=change)
        return None

    def _split(
        self,
        present: SparseMap,
        source_key: str,
        levels: Sequence[ZoomLevel],
        *,
        focal_px: float,
    ) -> CameraChange:
        cameras: dict[str, InitialCamera] = {}
        calibration_keys: dict[FrameId, str] = {}
        for number, level in enumerate(levels, start=1):
            key = _key(source_key, number)
            camera = copy.deepcopy(present.camera(source_key))
            camera.params = with_focal_length(camera, focal_px * math.exp(level.log_zoom))
            cameras[key] = estimated(camera)
            calibration_keys.update(dict.fromkeys(level.frame_ids, key))
        return CameraChange(cameras=cameras, calibration_keys=calibration_keys)

    def _is_split(self, candidate: SparseMap, source_key: str, levels: Sequence[ZoomLevel]) -> bool:
        """Whether the focal lengths that a map found are apart as the levels are."""
        base_px = camera_focal_px(candidate.camera(source_key))
        offsets = [
            (math.log(camera_focal_px(candidate.camera(key)) / base_px), level)
            for key, level in zip(_keys(source_key, len(levels)), levels, strict=True)
            if level is not levels[0] and any(map(candidate.is_registered, level.frame_ids))
        ]
        return bool(offsets) and all(
            abs(offset) > MIN_APART
            and abs(offset - level.log_zoom)
            < max(_MAX_OFF_LEVEL, _MAX_OFF_SHARE * abs(level.log_zoom))
            for offset, level in offsets
        )

    def _is_denied(
        self,
        candidate: SparseMap,
        present: SparseMap,
        source_key: str,
        levels: Sequence[ZoomLevel],
    ) -> bool:
        """Whether a map that starts at levels speaks against them.

        The present map, with one focal length, holds the keyframes that would be zoomed, and fits
        them clearly better; or the focal lengths come together, and these keyframes are held.
        """
        zoomed = zoomed_ids(levels)
        if not all(map(present.is_registered, zoomed)):
            return False
        if fits_better(present, candidate, changed=zoomed):
            return True
        focals_px = [
            camera_focal_px(candidate.camera(key)) for key in _keys(source_key, len(levels))
        ]
        is_together = math.log(max(focals_px) / min(focals_px)) < MIN_APART
        return is_together and all(map(candidate.is_registered, zoomed))

    # -- reporting ------------------------------------------------------------------------------

    def _report(self, source_key: str, levels: Sequence[ZoomLevel], candidate: SparseMap) -> None:
        keys = _keys(source_key, len(levels))
        level_of = {i: number for number, level in enumerate(levels) for i in level.frame_ids}
        self._emit(
            CameraSplit(
                camera_key=source_key,
                calibration_keys=tuple(keys),
                frame_ids=tuple(sorted(level_of)),
                calibration_idx=tuple(level_of[i] for i in sorted(level_of)),
                focal_px=tuple(camera_focal_px(candidate.camera(key)) for key in keys),
            )
        )

    def _doubt(self, source_key: str, zoomed: Sequence[FrameId]) -> None:
        self._cameras.add_zoom_doubt(
            source_key,
            f"keyframes seem to be zoomed ({self._named(zoomed)}), and no map confirms it",
        )

    def _named(self, frame_ids: Sequence[FrameId]) -> str:
        keyframes = [self._graph.keyframe(i) for i in self._graph.keyframe_ids]
        camera_keys = {self._graph.keyframe(i).camera_key for i in frame_ids}
        return named(frame_ids, [one for one in keyframes if one.camera_key in camera_keys])

    def report_missing(self, present: SparseMap) -> None:
        """Doubts split cameras of which keyframes stay out of the map; when nothing more comes."""
        for source_key in sorted(set(self._source_key.values())):
            missing = [
                i
                for i in self._graph.keyframe_ids
                if self._source_of(self._graph.keyframe(i).calibration_key) == source_key
                and not present.is_registered(i)
            ]
            if missing:
                self._cameras.add_missing_doubt(
                    source_key,
                    "its focal length changes, and keyframes stay out of the map"
                    f" ({self._named(missing)})",
                )

    # -- small questions ------------------------------------------------------------------------

    def _source_of(self, calibration_key: str) -> str:
        """The calibration that another one was split from, or itself."""
        return self._source_key.get(calibration_key, calibration_key)

    def _keyframes_of(self, source_key: str) -> list[FrameId]:
        return [
            i
            for i in self._graph.connected_ids
            if self._source_of(self._graph.keyframe(i).calibration_key) == source_key
        ]

    def _change(self, pair: VerifiedPair) -> ScaleChange | None:
        """The change of scale from the first keyframe of a pair to the second."""
        matches_idx, change = self._changes.get(pair.pair, (None, None))
        if matches_idx is not pair.inlier_matches_idx:  # never measured, or verified anew since
            rows1, rows2 = pair.inlier_matches_idx.T
            change = measure_scale_change(
                self._graph.keyframe(pair.pair.first).features.keypoints_xy[rows1],
                self._graph.keyframe(pair.pair.second).features.keypoints_xy[rows2],
            )
            self._changes[pair.pair] = pair.inlier_matches_idx, change
        return change


def _keys(source_key: str, num_levels: int) -> list[str]:
    """The calibrations of a camera's levels, the first of which keeps its own."""
    return [_key(source_key, number) for number in range(1, num_levels + 1)]


def _key(source_key: str, number: int) -> str:
    return source_key if number == 1 else f"{source_key}#{number}"


def _unplaced_ids(
    present: SparseMap, levels: Sequence[ZoomLevel], *, apart: Collection[FrameId]
) -> list[FrameId]:
    """Keyframes of the levels that a map mostly does not hold, leaving out those apart."""
    asked = [[i for i in level.frame_ids if i not in apart] for level in levels]
    return [
        frame_id
        for frame_ids in asked
        if 2 * sum(map(present.is_registered, frame_ids)) < len(frame_ids)
        for frame_id in frame_ids
    ]


def _brings_in(trial: ChangedMap, control: ChangedMap, frame_ids: Sequence[FrameId]) -> bool:
    """Whether keyframes fit a map clearly better than one built alike, without a split."""
    gain, control_gain = (one.sparse_map.fit(frame_ids).gain for one in (trial, control))
    return (
        trial.sparse_map.num_registered >= control.sparse_map.num_registered
        and gain > _BETTER_UNVOTED_RATIO * control_gain
    )


def _sureness(pair: VerifiedPair, change: ScaleChange) -> float:
    """How surely a pair says by how much one image is larger than the other."""
    return math.sqrt(pair.num_inliers) / (_LEAST_SPREAD + change.spread)


def _is_jump(change: ScaleChange) -> bool:
    """Whether everything changes its size alike."""
    return abs(change.log_ratio) > max(LEVEL_GAP, _MIN_JUMP_SPREADS * change.spread)


def _poses_better(num_inliers: int, num_others: int) -> bool:
    """Whether a calibration poses a keyframe clearly better than another one."""
    return num_inliers > _REGROUP_RATIO * num_others + _REGROUP_INLIERS
