"""Cameras that turn without moving: which stretches of keyframes, starts and maps that explains.

Matches of a turning camera tell no depth, and with a calibration that is a little wrong they still
make maps that look sound. Whether rotations explain many pairs at once
(`engine/estimators/turning.py`) is asked of the newest keyframes of each camera, of the pairs that
a map would start from, and of those pairs of a finished map whose keyframes are farthest apart.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from engine.estimators.turning import (
    FocalPrior,
    ImageShape,
    TurningPair,
    centred_points,
    fit_turning,
    nearest_turn_ratio,
    share_explained_by_turning,
)
from engine.estimators.two_view_geometry import epipolar_distances_px
from engine.events import CameraTurning
from engine.geometry import camera_center
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import (
    CalibrationOrigin,
    Float64Array,
    FrameId,
    ImagePair,
    Keyframe,
    TurningStretch,
    VerifiedPair,
)

_MIN_MATCHES = 30  # of a pair: fewer tell a turn from a motion badly
_MAX_MATCHES = 200  # that are looked at
_FEW_MATCHES = 64  # while keyframes come
_MIN_PAIRS = 3  # fewer do not tell a calibration
_NEAR_RATIO = 0.015  # of the edge: pairs farther from all turns of a grid do not turn
_NEAR_ZOOM_RATIO = 0.03  # the same for turns with zooms, which are guessed
_EXPLAINED_SHARE = 0.7  # of a pair's matches, for the pair to be explained
_EXPLAINED_PAIRS_RATIO = 0.85  # of all pairs
_MIN_TURN_RATIO = 0.1  # of the field of view, between the keyframes of some pair
_MIN_TURN_OF_ZOOM_RATIO = 0.3  # a motion towards a plane is a zoom, with a little shake
_ENOUGH_MOVED = 3  # pairs of a map that no turn explains: it has depth
_MIN_STRETCH = 4  # keyframes
_LOOKED_BACK = 8  # keyframes of a stretch that a new one is compared with
_FIRST_GAP = 3  # keyframes back in a stretch: the pair that is looked at first
_MAX_PAIRS = 12  # that are explained at once
_NUM_STRONG = 4  # of those
_MAX_PAIRS_PER_KEYFRAME = 3
_MORE_TO_EMIT = 1.5  # times the keyframes of a stretch when it was emitted last
_FOUND_SIGMA_RATIO = 0.03  # of a focal length that turns told, for those that follow
_MAX_PRIOR_SIGMAS = 3.0  # of a focal length from what is known of it,
_MAX_PRIOR_RATIO = 0.2  # unless it is this close
_MORE_PAUSE = 4  # times the keyframes between two tries of turns with zooms
_MORE_TO_TRY = 1.5  # times the keyframes of a run when turns were tried last, and told nothing

_KNOWN = (CalibrationOrigin.EXIF, CalibrationOrigin.EXIF_35MM, CalibrationOrigin.POINTMAPS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Explanation:
    """What rotations explain of some pairs."""

    explained: Float64Array  # (N,) share of each pair's matches
    angles_rad: Float64Array  # (N,)
    fov_rad: float  # of the narrowest view
    is_determined: bool  # whether the calibration is known, or the turns tell it
    zooms: bool
    focal_ratio: float  # of the narrowest view, of the longer edge

    @property
    def is_explained(self) -> bool:
        """Whether turns explain nearly all pairs."""
        share = float((self.explained >= _EXPLAINED_SHARE).mean())
        return share >= _EXPLAINED_PAIRS_RATIO

    @property
    def is_still(self) -> bool:
        """Whether the camera does not move, and may not even turn."""
        return self.is_determined and self.is_explained

    @property
    def is_turning(self) -> bool:
        """Whether the camera turns without moving."""
        least = _MIN_TURN_OF_ZOOM_RATIO if self.zooms else _MIN_TURN_RATIO
        return self.is_still and float(self.angles_rad.max()) >= least * self.fov_rad


@dataclass(slots=True)
class _Run:
    """The newest keyframes of a camera, as long as nothing shows that it moves."""

    frame_ids: list[FrameId] = field(default_factory=list)
    turned_rad: float = 0.0
    is_turning: bool = False  # as rotations explained the newest pairs
    zooms: bool = False
    focal: FocalPrior | None = None  # as the turns told it, where it does not zoom
    num_tried: int = 0  # keyframes when turns were tried last
    num_emitted: int = 0


class TurningWatch:
    """Watches whether cameras turn without moving.

    Args:
        graph: holds keyframes and pairs.
        emit: takes the events.
        is_refused: whether starts and maps that turns explain are refused.
        may_zoom: whether cameras may zoom while they turn.
    """

    def __init__(
        self, *, graph: SceneGraph, emit: EventSink, is_refused: bool, may_zoom: bool
    ) -> None:
        self._graph = graph
        self._emit = emit
        self._is_refused = is_refused
        self._may_zoom = may_zoom
        self._runs: dict[str, _Run] = {}
        self._latest: dict[str, deque[FrameId]] = {}  # keyframes of each camera
        self._until_zoom: dict[str, int] = {}  # keyframes to come until zooms are tried
        self._zoom_pause: dict[str, int] = {}
        self._stretches: dict[str, list[_Run]] = {}  # all that turned, by camera, the open one last
        self._restored_until: dict[str, FrameId] = {}  # keyframes that a run before has watched
        self._moved: set[ImagePair] = set()  # pairs that no turn without zoom explains
        self._only_turns: dict[tuple[ImagePair, int], bool] = {}
        self._may_be_turns: dict[tuple[ImagePair, int, bool], bool] = {}

    # -- what a run that goes on needs ------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """By camera, its newest keyframes and its stretches that turn.

        What single pairs show is found out again.
        """
        return {
            camera_key: self._facts_of(camera_key, run) for camera_key, run in self._runs.items()
        }

    def _facts_of(self, camera_key: str, run: _Run) -> dict[str, Any]:
        stretches = self._stretches.get(camera_key, [])
        return {
            "run": _record(run),
            "stretches": [_record(one) for one in stretches],
            "is_open": bool(stretches) and stretches[-1] is run,
            "latest": list(self._latest[camera_key]),
            "until_zoom": self._until_zoom.get(camera_key),
            "zoom_pause": self._zoom_pause.get(camera_key),
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with `facts`; keyframes that they name are not watched again."""
        for camera_key, found in facts.items():
            stretches = [_of_record(one) for one in found["stretches"]]
            if stretches:
                self._stretches[camera_key] = stretches
            run = stretches[-1] if found["is_open"] else _of_record(found["run"])
            self._runs[camera_key] = run
            self._latest[camera_key] = deque(found["latest"], maxlen=_LOOKED_BACK)
            self._restored_until[camera_key] = max(found["latest"])
            if found["until_zoom"] is not None:
                self._until_zoom[camera_key] = found["until_zoom"]
            if found["zoom_pause"] is not None:
                self._zoom_pause[camera_key] = found["zoom_pause"]

    # -- while keyframes come -------------------------------------------------------------------

    def watch(self, sparse_map: SparseMap, frame_id: FrameId) -> None:
        """Compares the newest keyframe with those before it; emits stretches that turn.

        Args:
            sparse_map: holds the keyframes and their cameras.
            frame_id: the newest keyframe; its pairs are in the graph.
        """
        camera_key = self._graph.keyframe(frame_id).camera_key
        if frame_id <= self._restored_until.get(camera_key, 0):
            return
        run = self._runs.setdefault(camera_key, _Run())
        self._latest.setdefault(camera_key, deque(maxlen=_LOOKED_BACK)).append(frame_id)
        self._runs[camera_key] = self._continued(sparse_map, run, frame_id)
        if self._runs[camera_key].is_turning:
            self._report(camera_key, self._runs[camera_key])
        else:
            self._try_zoom(sparse_map, camera_key)

    def _continued(self, sparse_map: SparseMap, run: _Run, frame_id: FrameId) -> _Run:
        """The run with a keyframe more, or one that begins with it."""
        near = [i for i in run.frame_ids[-_LOOKED_BACK:] if self._edge(i, frame_id) is not None]
        if not near:
            return _Run(frame_ids=[frame_id])
        if len(run.frame_ids) < _MIN_STRETCH - 1:
            run.frame_ids.append(frame_id)
            return run
        places = {i: back for back, i in enumerate(reversed(run.frame_ids), start=1)}
        looked_at = min(near, key=lambda i: (abs(places[i] - _FIRST_GAP), i))
        verified = self._edge(looked_at, frame_id)
        if verified is None or not self._may_turn(sparse_map, verified, zooms=run.zooms):
            self._note_motion(verified)
            return _Run(frame_ids=[frame_id])
        run.frame_ids.append(frame_id)
        if not run.is_turning and len(run.frame_ids) < _MORE_TO_TRY * run.num_tried:
            return run
        return self._tried(sparse_map, run, zooms=run.zooms)

    def _tried(self, sparse_map: SparseMap, run: _Run, *, zooms: bool) -> _Run:
        """A run after turns were tried on its newest keyframes; one that begins where they fail."""
        newest = run.frame_ids[-_LOOKED_BACK - 1 :]
        pairs = self._pairs_of_run(newest)
        run.num_tried = len(run.frame_ids)
        if len(pairs) < _MIN_PAIRS:
            return run
        if not (run.is_turning or zooms):  # of a camera that moves, mostly the widest pair tells
            widest = self._of_pairs(sparse_map, pairs[:1], zooms=False)
            if not widest.is_explained:
                self._note_motion(pairs[0])
                return _Run(frame_ids=run.frame_ids[-1:])
        found = self._of_pairs(sparse_map, pairs, zooms=zooms, focal=run.focal)
        if not found.is_turning and not (run.is_turning and found.is_still):
            # Explained by turns, but also by a motion before a plane: more keyframes may tell.
            is_open = found.is_explained and not run.is_turning
            if is_open:
                return run
            newest_id = run.frame_ids.pop()  # a stretch ends before it
            return _Run(frame_ids=[newest_id])
        if not run.is_turning:
            run.is_turning, run.zooms, run.frame_ids = True, zooms, newest
            if not zooms:
                run.focal = FocalPrior(ratio=found.focal_ratio, sigma_ratio=_FOUND_SIGMA_RATIO)
            camera_key = self._graph.keyframe(newest[-1]).camera_key
            self._stretches.setdefault(camera_key, []).append(run)
        run.turned_rad += self._turned_rad(
            newest if run.turned_rad == 0.0 else newest[-2:], pairs, found
        )
        return run

    def _note_motion(self, verified: VerifiedPair | None) -> None:
        if verified is not None:
            self._moved.add(verified.pair)

    def _try_zoom(self, sparse_map: SparseMap, camera_key: str) -> None:
        """Tries turns with zooms on the newest keyframes, less and less often."""
        if not self._may_zoom:
            return
        self._until_zoom[camera_key] = self._until_zoom.get(camera_key, _LOOKED_BACK) - 1
        latest = list(self._latest[camera_key])
        if self._until_zoom[camera_key] > 0 or _is_given(
            sparse_map, self._graph.keyframe(latest[-1])
        ):
            return
        pause = self._zoom_pause.get(camera_key, _LOOKED_BACK)
        self._zoom_pause[camera_key] = self._until_zoom[camera_key] = _MORE_PAUSE * pause
        pairs = self._pairs_of_run(latest)
        if len(pairs) < _MIN_PAIRS or not self._may_all_turn(sparse_map, pairs):
            return
        if self._of_pairs(sparse_map, pairs, zooms=False).is_explained:
            return  # there is no zoom
        run = self._tried(sparse_map, _Run(frame_ids=latest), zooms=True)
        if run.is_turning:
            self._runs[camera_key] = run
            self._report(camera_key, run)

    def _report(self, camera_key: str, run: _Run) -> None:
        num = len(run.frame_ids)
        if num < _MORE_TO_EMIT * run.num_emitted:
            return
        run.num_emitted = num
        stretch = self._stretch(camera_key, run)
        self._emit(
            CameraTurning(
                camera_key=camera_key,
                first=stretch.first,
                last=stretch.last,
                num_keyframes=num,
                turned_deg=math.degrees(stretch.turned_rad),
                is_whole=stretch.is_whole,
            )
        )

    def _edge(self, one: FrameId, other: FrameId) -> VerifiedPair | None:
        edge = self._graph.edge(ImagePair.of(one, other))
        return edge if edge is not None and edge.num_inliers >= _MIN_MATCHES else None

    def _pairs_of_run(self, frame_ids: Sequence[FrameId]) -> list[VerifiedPair]:
        """Pairs among successive keyframes: the widest, and those of neighbours."""
        found = [
            (later - earlier, edge)
            for earlier in range(len(frame_ids))
            for later in range(earlier + 1, len(frame_ids))
            if (edge := self._edge(frame_ids[earlier], frame_ids[later])) is not None
        ]
        found.sort(key=lambda item: -item[0])
        if len(found) <= _MAX_PAIRS:
            return [edge for _, edge in found]
        neighbours = [edge for gap, edge in found if gap == 1][-(_MAX_PAIRS // 2) :]
        wide = [edge for gap, edge in found if gap > 1]
        return wide[: _MAX_PAIRS - len(neighbours)] + neighbours

    @staticmethod
    def _turned_rad(
        frame_ids: Sequence[FrameId], pairs: Sequence[VerifiedPair], found: _Explanation
    ) -> float:
        angles = {one.pair: angle for one, angle in zip(pairs, found.angles_rad, strict=True)}
        steps = zip(frame_ids[:-1], frame_ids[1:], strict=True)
        return float(sum(angles.get(ImagePair.of(*step), 0.0) for step in steps))

    # -- what is known --------------------------------------------------------------------------

    @property
    def stretches(self) -> tuple[TurningStretch, ...]:
        """Where cameras turn without moving, by camera and in order of arrival."""
        return tuple(
            self._stretch(camera_key, run)
            for camera_key, runs in self._stretches.items()
            for run in runs
        )

    def _stretch(self, camera_key: str, run: _Run) -> TurningStretch:
        turning = {i for one in self._stretches[camera_key] for i in one.frame_ids}
        return TurningStretch(
            camera_key=camera_key,
            frame_ids=tuple(run.frame_ids),
            turned_rad=run.turned_rad,
            is_whole=all(
                i in turning
                for i in self._graph.connected_ids
                if self._graph.keyframe(i).camera_key == camera_key
            ),
        )

    def turns_between(self, one: FrameId, other: FrameId) -> bool:
        """Whether two keyframes lie in one stretch of a camera that turns without moving."""
        return any(
            one in run.frame_ids and other in run.frame_ids
            for runs in self._stretches.values()
            for run in runs
        )

    @property
    def is_all(self) -> bool:
        """Whether all keyframes that match others lie in stretches that turn."""
        if not self._stretches:
            return False
        turning = {i for runs in self._stretches.values() for run in runs for i in run.frame_ids}
        connected = self._graph.connected_ids
        return bool(connected) and turning.issuperset(connected)

    # -- starts and maps ------------------------------------------------------------------------

    def only_turns(self, sparse_map: SparseMap, verified: VerifiedPair) -> bool:
        """Whether no map may start from a pair, or be joined by it: a turn explains it.

        Args:
            sparse_map: holds the keyframes and their cameras.
            verified: the pair.
        """
        if not self._is_refused:
            return False
        if self.turns_between(verified.pair.first, verified.pair.second):
            return True
        key = (verified.pair, verified.num_inliers)
        if key not in self._only_turns:
            self._only_turns[key] = (
                _has_enough(verified)
                and self._may_turn(sparse_map, verified)
                and self._of_pairs(sparse_map, [verified], zooms=False).is_turning
            )
        return self._only_turns[key]

    def explains(
        self,
        sparse_map: SparseMap,
        *,
        poses: Mapping[FrameId, Float64Array] | None = None,
        is_final: bool = False,
    ) -> bool:
        """Whether a map is one of a camera that turns without moving, and so none.

        Those of its pairs count whose keyframes are farthest apart in it: where they are not, it
        has no depth.

        Args:
            sparse_map: the map.
            poses: (3, 4) of some keyframes in another map; by default of those registered.
            is_final: whether to look closely even where some of its pairs are known to move.
        """
        if not self._is_refused:
            return False
        if poses is None:
            poses = {i: sparse_map.cam_from_world(i) for i in sparse_map.registered_ids}
        if self.is_one_stretch(poses):
            return True
        if not is_final and self._num_moved(poses) >= _ENOUGH_MOVED:
            return False
        pairs = self._telling_pairs(poses)
        if len(pairs) < _MIN_PAIRS:
            return False
        if not is_final and self._show_motion(sparse_map, pairs):
            return False
        return self._are_turns(sparse_map, pairs) is not None

    def _show_motion(self, sparse_map: SparseMap, pairs: Sequence[VerifiedPair]) -> bool:
        """Whether enough of some pairs are no turns without zoom, each by itself."""
        num_moved = 0
        for verified in pairs:
            if not self._turns_alone(sparse_map, verified):
                self._note_motion(verified)
                num_moved += 1
            if num_moved >= _ENOUGH_MOVED:
                return True
        return False

    def _turns_alone(self, sparse_map: SparseMap, verified: VerifiedPair) -> bool:
        return (
            self._may_turn(sparse_map, verified)
            and self._of_pairs(sparse_map, [verified], zooms=False).is_explained
        )

    def conclude(self, sparse_map: SparseMap) -> None:
        """Looks at all keyframes at the end of a run without a map, whatever their order.

        Args:
            sparse_map: holds the keyframes and their cameras.
        """
        if self.is_all:
            return
        by_camera: dict[str, list[FrameId]] = {}
        for frame_id in self._graph.connected_ids:
            by_camera.setdefault(self._graph.keyframe(frame_id).camera_key, []).append(frame_id)
        for camera_key, frame_ids in by_camera.items():
            pairs = _weakest_homographies(
                [one for one in self._graph.edges_among(frame_ids) if _has_enough(one)]
            )
            if len(pairs) < _MIN_PAIRS or not self._may_all_turn(sparse_map, pairs):
                continue
            found = self._are_turns(sparse_map, pairs)
            if found is not None:
                run = _Run(
                    frame_ids=frame_ids,
                    turned_rad=float(found.angles_rad.max()),
                    is_turning=True,
                )
                self._stretches[camera_key] = [run]
                self._report(camera_key, run)

    def _num_moved(self, frame_ids: Collection[FrameId]) -> int:
        return sum(pair.first in frame_ids and pair.second in frame_ids for pair in self._moved)

    def is_one_stretch(self, frame_ids: Collection[FrameId]) -> bool:
        """Whether all of some keyframes lie in one stretch that turns."""
        return any(
            set(frame_ids) <= set(run.frame_ids)
            for runs in self._stretches.values()
            for run in runs
        )

    def _telling_pairs(self, poses: Mapping[FrameId, Float64Array]) -> list[VerifiedPair]:
        """Pairs whose keyframes are farthest apart, and strong ones, which join their zooms."""
        centers = {i: camera_center(pose) for i, pose in poses.items()}
        pairs = [one for one in self._graph.edges_among(centers) if _has_enough(one)]

        def distance(one: VerifiedPair) -> float:
            return float(np.linalg.norm(centers[one.pair.first] - centers[one.pair.second]))

        farthest = _few_of_each(
            sorted(pairs, key=lambda one: (-distance(one), one.pair)),
            limit=_MAX_PAIRS - _NUM_STRONG,
        )
        known = {one.pair for one in farthest}
        others = [one for one in pairs if one.pair not in known]
        strongest = sorted(others, key=lambda one: (-one.num_inliers, one.pair))
        return farthest + _few_of_each(strongest, limit=_NUM_STRONG)

    def _may_all_turn(self, sparse_map: SparseMap, pairs: Sequence[VerifiedPair]) -> bool:
        """A coarse look at pairs, which ends as soon as too many are no turns."""
        num_allowed = (1.0 - _EXPLAINED_PAIRS_RATIO) * len(pairs)
        num_moving = 0
        for verified in pairs:
            num_moving += not self._may_turn(sparse_map, verified, zooms=self._may_zoom)
            if num_moving > num_allowed:
                return False
        return True

    # -- one pair, and several ------------------------------------------------------------------

    def _may_turn(
        self, sparse_map: SparseMap, verified: VerifiedPair, *, zooms: bool = False
    ) -> bool:
        """A coarse look at whether a pair may be a turn, once for each pair."""
        key = (verified.pair, verified.num_inliers, zooms)
        if key not in self._may_be_turns:
            self._may_be_turns[key] = self._is_near_turn(sparse_map, verified, zooms=zooms)
        return self._may_be_turns[key]

    def _is_near_turn(self, sparse_map: SparseMap, verified: VerifiedPair, *, zooms: bool) -> bool:
        first, second = self._keyframes(verified)
        if _is_given(sparse_map, first) and _is_given(sparse_map, second):
            return self._of_given(sparse_map, verified) >= _EXPLAINED_SHARE
        shape = ImageShape.of(second.width, second.height)
        pair = _turning_pair(verified, first, second)
        if nearest_turn_ratio(pair, shape) < _NEAR_RATIO:
            return True
        return zooms and nearest_turn_ratio(replace(pair, lens2=1), shape) < _NEAR_ZOOM_RATIO

    def _are_turns(
        self, sparse_map: SparseMap, pairs: Sequence[VerifiedPair]
    ) -> _Explanation | None:
        """How turns explain pairs, with zooms where it takes them; None where they do not."""
        keyframes = [one for pair in pairs for one in self._keyframes(pair)]
        is_given = all(_is_given(sparse_map, one) for one in keyframes)
        for zooms in (False, True):
            if zooms and (is_given or not self._may_zoom):
                break
            found = self._of_pairs(sparse_map, pairs, zooms=zooms)
            if found.is_explained and not found.is_determined:
                found = self._of_pairs(sparse_map, pairs, zooms=zooms, max_matches=_MAX_MATCHES)
            if found.is_turning:
                return found
            if found.is_explained:
                return None  # by one focal length that is open: zooms would only hide that
        return None

    def _of_pairs(
        self,
        sparse_map: SparseMap,
        pairs: Sequence[VerifiedPair],
        *,
        zooms: bool,
        focal: FocalPrior | None = None,
        max_matches: int = _FEW_MATCHES,
    ) -> _Explanation:
        ends = [self._keyframes(one) for one in pairs]
        keyframes = [one for end in ends for one in end]
        names = [str(one.frame_id) if zooms else one.camera_key for one in keyframes]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        lenses = [numbers[name] for name in names]
        matched = [
            _turning_pair(one, *end, lens1=lenses[2 * idx], lens2=lenses[2 * idx + 1])
            for idx, (one, end) in enumerate(zip(pairs, ends, strict=True))
        ]
        fit = fit_turning(
            matched,
            shape=ImageShape.of(keyframes[0].width, keyframes[0].height),
            priors=[] if focal is None else [focal] * len(numbers),
            max_matches=max_matches,
        )
        explained = fit.explained
        if all(_is_given(sparse_map, one) for one in keyframes):
            shares = [self._of_given(sparse_map, one) for one in pairs]
            explained = np.minimum(explained, shares)
        contradicts = not zooms and any(
            _contradicts(sparse_map, one, focal_ratio=float(fit.focal_ratios[lens]))
            for lens, one in zip(lenses, keyframes, strict=True)
        )
        return _Explanation(
            explained=explained,
            angles_rad=fit.angles_rad,
            fov_rad=_field_of_view_rad(float(fit.focal_ratios.max())),
            is_determined=fit.is_determined and not contradicts,
            zooms=zooms,
            focal_ratio=float(fit.focal_ratios.max()),
        )

    def _of_given(self, sparse_map: SparseMap, verified: VerifiedPair) -> float:
        """Share of a calibrated pair's matches that a turn explains."""
        first, second = self._keyframes(verified)
        points1_xy, points2_xy = _matched_points(verified, first, second)
        share, _ = share_explained_by_turning(
            points1_xy,
            points2_xy,
            camera1=sparse_map.camera(first.calibration_key),
            camera2=sparse_map.camera(second.calibration_key),
            noise_px=_noise_px(verified, points1_xy, points2_xy),
        )
        return share

    def _keyframes(self, verified: VerifiedPair) -> tuple[Keyframe, Keyframe]:
        pair = verified.pair
        return self._graph.keyframe(pair.first), self._graph.keyframe(pair.second)


def _record(run: _Run) -> dict[str, Any]:
    """A run of keyframes as JSON holds it."""
    return {
        "frame_ids": list(run.frame_ids),
        "turned_rad": run.turned_rad,
        "is_turning": run.is_turning,
        "zooms": run.zooms,
        "focal": None if run.focal is None else asdict(run.focal),
        "num_tried": run.num_tried,
        "num_emitted": run.num_emitted,
    }


def _of_record(record: Mapping[str, Any]) -> _Run:
    focal = record["focal"]
    return _Run(
        **{
            **record,
            "frame_ids": [FrameId(i) for i in record["frame_ids"]],
            "focal": None if focal is None else FocalPrior(**focal),
        }
    )


def _has_enough(verified: VerifiedPair) -> bool:
    return verified.num_inliers >= _MIN_MATCHES


def _weakest_homographies(pairs: Sequence[VerifiedPair]) -> list[VerifiedPair]:
    return _few_of_each(sorted(pairs, key=lambda one: (-one.initial_pair_score, one.pair)))


def _few_of_each(pairs: Sequence[VerifiedPair], *, limit: int = _MAX_PAIRS) -> list[VerifiedPair]:
    """The first pairs, without more than a few of any keyframe."""
    counts: Counter[FrameId] = Counter()
    chosen = []
    for verified in pairs:
        ends = (verified.pair.first, verified.pair.second)
        if max(counts[end] for end in ends) >= _MAX_PAIRS_PER_KEYFRAME:
            continue
        counts.update(ends)
        chosen.append(verified)
        if len(chosen) == limit:
            break
    return chosen


def _turning_pair(
    verified: VerifiedPair, first: Keyframe, second: Keyframe, *, lens1: int = 0, lens2: int = 0
) -> TurningPair:
    points1_xy, points2_xy = _matched_points(verified, first, second)
    half_diagonal_px = math.hypot(second.width, second.height) / 2.0
    return TurningPair(
        points1=centred_points(points1_xy, width=first.width, height=first.height),
        points2=centred_points(points2_xy, width=second.width, height=second.height),
        lens1=lens1,
        lens2=lens2,
        noise=_noise_px(verified, points1_xy, points2_xy) / half_diagonal_px,
    )


def _matched_points(
    verified: VerifiedPair, first: Keyframe, second: Keyframe
) -> tuple[Float64Array, Float64Array]:
    """Some of the matched keypoints (M, 2), (M, 2) of a pair in px, spread over all."""
    num = verified.num_inliers
    chosen = np.linspace(0, num - 1, min(num, _MAX_MATCHES)).astype(np.int64)
    rows1, rows2 = verified.inlier_matches_idx[chosen].T
    return first.features.keypoints_xy[rows1], second.features.keypoints_xy[rows2]


def _noise_px(verified: VerifiedPair, points1_xy: Float64Array, points2_xy: Float64Array) -> float:
    """Median distance of a pair's matches from their epipolar lines; 0 for pairs on rays."""
    if verified.cam2_from_cam1 is not None:
        return 0.0
    return float(np.median(epipolar_distances_px(verified.fundamental, points1_xy, points2_xy)))


def _is_given(sparse_map: SparseMap, keyframe: Keyframe) -> bool:
    """Whether the whole calibration of a keyframe is known."""
    prior = sparse_map.camera_prior(keyframe.calibration_key)
    return prior.is_constant or prior.origin in (CalibrationOrigin.FILE, CalibrationOrigin.KNOWN)


def _contradicts(sparse_map: SparseMap, keyframe: Keyframe, *, focal_ratio: float) -> bool:
    """Whether a focal length is not the one that is known of a keyframe.

    What is known takes no part in finding it: before a plane it would seem to be found.
    """
    prior = sparse_map.camera_prior(keyframe.calibration_key)
    if not (prior.origin.is_given or prior.origin in _KNOWN) or prior.focal_px <= 0.0:
        return False
    known_ratio = prior.focal_px / max(keyframe.width, keyframe.height)
    bound = max(_MAX_PRIOR_SIGMAS * prior.focal_sigma_ratio, _MAX_PRIOR_RATIO)
    return abs(math.log(focal_ratio / known_ratio)) > bound


def _field_of_view_rad(focal_ratio: float) -> float:
    return 2.0 * math.atan(0.5 / focal_ratio)
