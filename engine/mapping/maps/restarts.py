"""Building maps from the scene graph: the first one, others from other starts, separate ones.

Each start builds a whole map and places it onto the present one by the keyframes they share.
Whether it replaces the present one is for the mapper to decide.

Where no pair of keyframes can start a map, a window of the best connected ones can: sparse photos
and slow flights have pairs that are all too narrow, too flat, or too weak alone. (VGGSfM solves all
frames of a window at once: Wang, Karaev, Rupprecht and Novotny, CVPR 2024.)
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx
import numpy as np
import pycolmap

from engine.config import InitializationConfig, WindowConfig
from engine.events import WindowPurpose
from engine.geometry import similarity_between_poses
from engine.mapping.cameras.cameras import CameraCalibration, CameraChange, with_focal_length
from engine.mapping.model.growth import GrowthConfig, adjust_in_place, grow_fully
from engine.mapping.model.initialization import (
    InitialPair,
    has_enough_points,
    initialize,
    rank_initial_pairs,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.turning import TurningWatch
from engine.mapping.windows.window_selection import Window, WindowJob, window_problem
from engine.matching.scene_graph import SceneGraph
from engine.ports import WindowSolver
from engine.types import Float64Array, FrameId, ImagePair, VerifiedPair
from engine.window_types import WindowEstimate, WindowStatus

_GOOD_START_RATIO = 0.8  # of the keyframes that match any: no other first pair is tried
_STRONG_START_RATIO = 0.8  # of the keyframes that match any: no window is tried
_MORE_FOR_A_WINDOW = 1.25  # times the keyframes at the last window that was tried
_MIN_COMMON_TO_PLACE = 2  # keyframes; one fixes no scale
_REBUILD_PASSES = 2  # adjustments of a map whose cameras changed, before it grows
_MIN_VALID = 5  # keyframes that a window poses: with fewer a pair does as well
_MAX_EARLY_STARTS = 2  # pairs tried for an early map
_MAX_COMPONENT_STARTS = 2  # pairs tried for a map of keyframes that fit nowhere
_MANY_KEYFRAMES = (
    100  # of so many, maps at the end grow to half as many in all before another start
)
_POINTS_PER_INLIER = 3  # of those that a first pair needs: a window sees more


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltMap:
    """A map and what it was built from."""

    sparse_map: SparseMap
    pair: ImagePair  # what it started from, or the strongest pair of the window
    initial: InitialPair | None  # None: it started from a window
    is_placed: bool = False  # onto the map that was there: both are in one world


class MapBuilder:
    """Builds maps from the scene graph and remembers what was tried.

    Args:
        initialization: when a first map is tried.
        window: whether and how large a window may give the first one.
        growth: thresholds of growing.
        final_growth: thresholds of growing at the end of a run.
        graph: holds all keyframes and pairs.
        cameras: holds all cameras.
        new_map: makes an empty map.
        solve_window: solves windows.
        calibrate: gives cameras of unknown focal length of a map one from their pairs.
        calibrate_trial: the same for a map that is not the run's; nothing is reported.
        turning: knows which pairs and maps tell no depth.
        seed: of the estimation of relative poses.
    """

    def __init__(
        self,
        *,
        initialization: InitializationConfig,
        window: WindowConfig,
        growth: GrowthConfig,
        final_growth: GrowthConfig,
        graph: SceneGraph,
        cameras: CameraCalibration,
        new_map: Callable[[], SparseMap],
        solve_window: WindowSolver,
        calibrate: Callable[[SparseMap], None],
        calibrate_trial: Callable[[SparseMap], None],
        turning: TurningWatch,
        seed: int,
    ) -> None:
        self._turning = turning
        self._initialization = initialization
        self._window = window
        self._growth = growth
        self._final_growth = final_growth
        self._graph = graph
        self._cameras = cameras
        self._new_map = new_map
        self._solve_window = solve_window
        self._calibrate = calibrate
        self._calibrate_trial = calibrate_trial
        self._seed = seed
        self._all_pairs_were_tried = False
        self._num_keyframes_at_bootstrap = 0
        self._tried_at_end: set[ImagePair] = set()
        self._distrusted: set[ImagePair] = set()

    @property
    def distrusted(self) -> frozenset[ImagePair]:
        """Pairs that maps do not get, since they misled one."""
        return frozenset(self._distrusted)

    def distrust(self, pairs: Iterable[ImagePair]) -> None:
        """Leaves pairs that misled a map out of all maps to come."""
        self._distrusted.update(pairs)

    def facts(self) -> dict[str, Any]:
        """What was tried while the run went on, and which pairs misled maps."""
        return {
            "all_pairs_were_tried": self._all_pairs_were_tried,
            "num_keyframes_at_bootstrap": self._num_keyframes_at_bootstrap,
            "distrusted": [[pair.first, pair.second] for pair in sorted(self._distrusted)],
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with `facts`; what the end of a run tries is tried again."""
        self._all_pairs_were_tried = facts["all_pairs_were_tried"]
        self._num_keyframes_at_bootstrap = facts["num_keyframes_at_bootstrap"]
        self._distrusted = {ImagePair(*pair) for pair in facts["distrusted"]}

    def start_over(self) -> SparseMap:
        """Forgets what was tried; returns a map of all keyframes, none registered.

        Its cameras are as they were before any map.
        """
        self._all_pairs_were_tried = False
        self._num_keyframes_at_bootstrap = 0
        self._tried_at_end.clear()
        self._distrusted.clear()
        fresh = self._new_map()
        self._cameras.add_all_anew(fresh)
        return self._filled(fresh, self._graph.keyframe_ids, calibration_keys={})

    def first(self, present: SparseMap, newest: Sequence[VerifiedPair]) -> BuiltMap | None:
        """Builds the first map, once there are enough keyframes and some of them make a sound one.

        Args:
            present: the map without registered keyframes; it holds the cameras.
            newest: pairs of the newest keyframe; those of older ones are tried only once.
        """
        if len(self._graph.keyframe_ids) < self._initialization.min_keyframes:
            return None
        pairs = newest if self._all_pairs_were_tried else self._pairs()
        self._all_pairs_were_tried = True
        self._calibrate(present)
        built = self._from_pairs(present, pairs)
        num_connected = len(self._graph.connected_ids)
        # Small windows are easily wrong, and cost as much as they gain.
        if num_connected < max(
            self._window.size, _MORE_FOR_A_WINDOW * self._num_keyframes_at_bootstrap
        ):
            return built
        self._num_keyframes_at_bootstrap = num_connected
        return self._or_from_window(built, present, config=self._growth)

    def early(self, present: SparseMap) -> BuiltMap | None:
        """Builds a map of few keyframes from a pair at a small angle; nothing is remembered.

        Args:
            present: the map without registered keyframes; it holds the cameras, and stays as it is.
        """
        wanted = self._initialization
        angle_deg = min(wanted.early_triangulation_angle_deg, wanted.min_triangulation_angle_deg)
        settings = wanted.model_copy(update={"min_triangulation_angle_deg": angle_deg})
        start = self._with(present, self._graph.keyframe_ids)
        self._calibrate_trial(start)
        ranked = rank_initial_pairs(
            start,
            self._pairs(),
            config=settings,
            seed=self._seed,
            only_turns=lambda verified: self._turning.only_turns(start, verified),
        )
        return self._best(
            lambda: self._with(start, self._graph.keyframe_ids),
            itertools.islice(ranked, _MAX_EARLY_STARTS),
            config=self._growth,
        )

    def place(self, sparse_map: SparseMap, *, onto: SparseMap) -> bool:
        """Moves a map onto another by the keyframes in both; returns whether they are enough."""
        return _place(sparse_map, onto=onto)

    def first_at_end(self, present: SparseMap) -> BuiltMap | None:
        """Builds the first map of few keyframes, from any pair, when no more of them will come."""
        self._calibrate(present)
        built = self._from_pairs(present, self._pairs())
        return self._or_from_window(built, present, config=self._growth)

    def another_at_end(self, present: SparseMap) -> BuiltMap | None:
        """Builds a map from a start not tried here before, while keyframes are missing."""
        if present.num_registered == len(self._graph.connected_ids):
            return None
        pairs = self._pairs_outside(present) or self._pairs()
        num_connected = len(self._graph.connected_ids)
        built = self._from_pairs(
            present,
            self._in_larger_parts(pairs, present.num_registered),
            max_grown=num_connected // 2 if num_connected > _MANY_KEYFRAMES else None,
        )
        if built is not None:
            self._tried_at_end.add(built.pair)
        return built

    def separate(self, present: SparseMap, frame_ids: Collection[FrameId]) -> BuiltMap | None:
        """Builds a map of some keyframes alone, in a frame of its own; it holds no others.

        Args:
            present: holds the cameras.
            frame_ids: keyframes that have no place in ``present``.
        """
        ranked = self._ranked(present, self._pairs_among(frame_ids))
        built = self._best(
            lambda: self._with(present, frame_ids), ranked, config=self._final_growth
        )
        return self._or_from_window(built, present, config=self._final_growth, only=frame_ids)

    def component(
        self, present: SparseMap, frame_ids: Collection[FrameId], pairs: Sequence[VerifiedPair]
    ) -> BuiltMap | None:
        """Builds a map of few keyframes that have no place while the run goes on.

        Args:
            present: holds the cameras, and all keyframes.
            frame_ids: the keyframes.
            pairs: that it may start from.
        """
        ranked = self._ranked(present, pairs)
        return self._best(
            lambda: self._with(present, frame_ids),
            itertools.islice(ranked, _MAX_COMPONENT_STARTS),
            config=self._growth,
        )

    def complete(
        self,
        sparse_map: SparseMap,
        *,
        like: SparseMap,
        frame_ids: Collection[FrameId] | None = None,
    ) -> None:
        """Adds keyframes that a map lacks, with their pairs among those that it holds.

        Args:
            sparse_map: gets them, unregistered, and the cameras that it lacks.
            like: holds all cameras.
            frame_ids: the keyframes; by default all.
        """
        self._cameras.complete(sparse_map, like=like)
        wanted = set(self._graph.keyframe_ids if frame_ids is None else frame_ids)
        for frame_id in self._graph.keyframe_ids:
            if frame_id not in wanted or sparse_map.holds(frame_id):
                continue
            pairs = [
                pair
                for pair in self.pairs_of(frame_id)
                if sparse_map.holds(pair.pair.first) or sparse_map.holds(pair.pair.second)
            ]
            sparse_map.add_keyframe(self._graph.keyframe(frame_id), pairs)

    def pairs_of(self, frame_id: FrameId) -> list[VerifiedPair]:
        """The pairs of a keyframe that maps may use."""
        return [
            pair
            for pair in self._graph.verified_pairs(frame_id)
            if not (pair.pair in self._distrusted or self._graph.is_held_back(pair.pair))
        ]

    def rebuilt(
        self,
        present: SparseMap,
        change: CameraChange,
        *,
        poses: Mapping[FrameId, Float64Array] | None = None,
        is_whole: bool = True,
    ) -> SparseMap:
        """The present map with changed cameras: triangulated anew, adjusted and grown.

        It is placed onto the present one by the keyframes that both hold.

        Args:
            present: the map; it stays as it is.
            change: its cameras that become others.
            poses: where keyframes are placed first, (3, 4) each; all others are registered anew. By
                default those registered stay where they are.
            is_whole: whether it gets all keyframes of the run, or those of the present map only.
                Keyframes of other maps stay there, unless their own calibration becomes another.
        """
        chosen = self._graph.keyframe_ids if is_whole else present.keyframe_ids
        sparse_map = self._with(present, chosen, change=change)
        if poses is None:
            poses = {i: present.cam_from_world(i) for i in present.registered_ids}
        sparse_map.place(poses)
        for frame_id in sorted(poses):
            sparse_map.triangulate(frame_id)
        for _ in range(_REBUILD_PASSES):
            adjust_in_place(sparse_map, config=self._growth)
            sparse_map.retriangulate()
        elsewhere = {
            i
            for i in chosen
            if self._graph.map_number(i) is not None
            and not (present.is_registered(i) or i in change.calibration_keys)
        }
        grow_fully(sparse_map, config=self._growth, exclude=elsewhere)
        adjust_in_place(sparse_map, config=self._growth)
        _place(sparse_map, onto=present)
        return sparse_map

    def anew(self, present: SparseMap, change: CameraChange) -> SparseMap | None:
        """A map with changed cameras from its best first pair, placed onto the present one."""
        start = self._with(present, self._graph.keyframe_ids, change=change)
        ranked = self._ranked(start, self._pairs())
        built = self._best(
            lambda: self._with(present, self._graph.keyframe_ids, change=change),
            ranked,
            config=self._growth,
        )
        if built is None:
            return None
        _place(built.sparse_map, onto=present)
        return built.sparse_map

    def _from_pairs(
        self,
        present: SparseMap,
        pairs: Sequence[VerifiedPair],
        *,
        max_grown: int | None = None,
    ) -> BuiltMap | None:
        ranked = self._ranked(present, pairs, excluded=self._tried_at_end)
        built = self._best(
            lambda: self._with(present, self._graph.keyframe_ids),
            ranked,
            config=self._growth,
            max_grown=max_grown,
        )
        if built is None:
            return None
        return replace(built, is_placed=_place(built.sparse_map, onto=present))

    def _ranked(
        self,
        sparse_map: SparseMap,
        pairs: Sequence[VerifiedPair],
        *,
        excluded: Collection[ImagePair] = (),
    ) -> Iterator[InitialPair]:
        return rank_initial_pairs(
            sparse_map,
            pairs,
            config=self._initialization,
            seed=self._seed,
            excluded=excluded,
            only_turns=lambda verified: self._turning.only_turns(sparse_map, verified),
        )

    def _best(
        self,
        new_map: Callable[[], SparseMap],
        initial_pairs: Iterable[InitialPair],
        *,
        config: GrowthConfig,
        max_grown: int | None = None,
    ) -> BuiltMap | None:
        return build_best_map(
            new_map,
            initial_pairs,
            initialization=self._initialization,
            config=config,
            max_grown=max_grown,
            is_refused=self._turning.explains,
        )

    def _or_from_window(
        self,
        built: BuiltMap | None,
        present: SparseMap,
        *,
        config: GrowthConfig,
        only: Collection[FrameId] | None = None,
    ) -> BuiltMap | None:
        """A map from a window instead of a weak one, when it holds more keyframes."""
        enough = _STRONG_START_RATIO * len(self._graph.connected_ids if only is None else only)
        num_registered = 0 if built is None else built.sparse_map.num_registered
        if num_registered >= enough or not (self._window.enabled and self._window.bootstrap):
            return built
        if self._turning.is_all:
            return built  # there is nothing that a window could start from
        chosen = self._graph.keyframe_ids if only is None else only
        from_window = bootstrap_map(
            self._graph,
            self._pairs_among(chosen),
            new_map=lambda: self._with(present, chosen),
            unknown_cameras=self._cameras.unknown_keys(present),
            size=self._window.size + self._window.num_older,
            solve=self._solve_window,
            initialization=self._initialization,
            config=config,
        )
        if from_window is None or from_window.sparse_map.num_registered <= num_registered:
            return built
        return built if self._turning.explains(from_window.sparse_map) else from_window

    def _with(
        self,
        present: SparseMap,
        frame_ids: Collection[FrameId],
        *,
        change: CameraChange | None = None,
    ) -> SparseMap:
        """A map with keyframes and their pairs, none registered, cameras as calibrated now."""
        fresh = self._new_map()
        self._cameras.add_all(fresh, like=present, change=change)
        keys = {} if change is None else change.calibration_keys
        return self._filled(fresh, frame_ids, calibration_keys=keys)

    def _filled(
        self,
        fresh: SparseMap,
        frame_ids: Collection[FrameId],
        *,
        calibration_keys: Mapping[FrameId, str],
    ) -> SparseMap:
        """A map after keyframes and the pairs among them were added to it."""
        chosen = set(frame_ids)
        order = {i: number for number, i in enumerate(self._graph.keyframe_ids) if i in chosen}
        pairs_of: dict[FrameId, list[VerifiedPair]] = {frame_id: [] for frame_id in order}
        for pair in self._pairs_among(chosen):
            # Frames of several sources need not come in the order of their ids.
            later = max(pair.pair.first, pair.pair.second, key=order.__getitem__)
            pairs_of[later].append(pair)
        for frame_id, pairs in pairs_of.items():
            keyframe = self._graph.keyframe(frame_id)
            calibration_key = calibration_keys.get(frame_id, keyframe.calibration_key)
            fresh.add_keyframe(replace(keyframe, calibration_key=calibration_key), pairs)
        return fresh

    def _pairs(self) -> list[VerifiedPair]:
        return [pair for pair in self._graph.edges() if pair.pair not in self._distrusted]

    def _pairs_among(self, frame_ids: Collection[FrameId]) -> list[VerifiedPair]:
        inside = set(frame_ids)
        return [p for p in self._pairs() if p.pair.first in inside and p.pair.second in inside]

    def _in_larger_parts(self, pairs: Sequence[VerifiedPair], num: int) -> list[VerifiedPair]:
        """The pairs from which pairs lead to more keyframes than a number, so that a map may."""
        parts = _connected_parts(self._pairs())
        larger = set().union(*(part for part in parts if len(part) > num))
        return [pair for pair in pairs if pair.pair.first in larger]

    def _pairs_outside(self, present: SparseMap) -> list[VerifiedPair]:
        """Pairs of which the present map does not hold both keyframes."""
        return [
            pair
            for pair in self._pairs()
            if not (
                present.is_registered(pair.pair.first) and present.is_registered(pair.pair.second)
            )
        ]


def _connected_parts(pairs: Iterable[VerifiedPair]) -> list[set[FrameId]]:
    """Keyframes by parts that no pair joins."""
    joined: networkx.Graph[FrameId] = networkx.Graph()
    joined.add_edges_from((one.pair.first, one.pair.second) for one in pairs)
    return [set(part) for part in networkx.connected_components(joined)]


def _place(sparse_map: SparseMap, *, onto: SparseMap) -> bool:
    """Moves a map onto another by the poses of the keyframes that both hold.

    Returns:
        Whether they hold enough.
    """
    common = [i for i in sparse_map.registered_ids if onto.is_registered(i)]
    if len(common) < _MIN_COMMON_TO_PLACE:
        return False
    poses, onto_poses = (
        np.array([one.cam_from_world(i) for i in common]) for one in (sparse_map, onto)
    )
    onto_from_map = similarity_between_poses(poses, onto_poses)
    if onto_from_map is None:
        return False
    sparse_map.reconstruction.transform(pycolmap.Sim3d(onto_from_map))
    return True


# -- from a pair ----------------------------------------------------------------------------------


def build_best_map(
    new_map: Callable[[], SparseMap],
    initial_pairs: Iterable[InitialPair],
    *,
    initialization: InitializationConfig,
    config: GrowthConfig,
    is_refused: Callable[[SparseMap], bool] = lambda _: False,
    max_grown: int | None = None,
) -> BuiltMap | None:
    """Builds maps from the given pairs until one holds most keyframes; returns the fullest.

    Args:
        new_map: makes a map with all keyframes and pairs, none registered.
        initial_pairs: pairs to start from, best first.
        initialization: thresholds of starting.
        config: thresholds of growing.
        is_refused: which maps are none, however many keyframes they hold.
        max_grown: no other map is built when all of them have so many keyframes together.

    Returns:
        None when no pair makes a sound map.
    """
    best: BuiltMap | None = None
    num_grown = 0
    may_be_fuller = (one for one in initial_pairs if best is None or _reaches_more(one, best))
    may_be_built = itertools.takewhile(
        lambda _: max_grown is None or num_grown < max_grown, may_be_fuller
    )
    for built in _built_maps(new_map, may_be_built, initialization=initialization, config=config):
        num_grown += built.sparse_map.num_registered
        if best is not None and _fullness(built) <= _fullness(best):
            continue
        if is_refused(built.sparse_map):
            continue
        best = built
        num_matched = sum(1 for i in built.sparse_map.keyframe_ids if built.sparse_map.neighbors(i))
        if built.sparse_map.num_registered >= _GOOD_START_RATIO * num_matched:
            break
    return best


def _reaches_more(initial: InitialPair, best: BuiltMap) -> bool:
    """Whether pairs lead from a start to as many keyframes as a map holds."""
    sparse_map, first = best.sparse_map, initial.pair.first
    if sparse_map.is_registered(first):
        return True
    reached, waiting = {first}, [first]
    while waiting:
        new = sparse_map.neighbors(waiting.pop()).keys() - reached
        reached |= new
        waiting += new
    return len(reached) >= sparse_map.num_registered


def _built_maps(
    new_map: Callable[[], SparseMap],
    initial_pairs: Iterable[InitialPair],
    *,
    initialization: InitializationConfig,
    config: GrowthConfig,
) -> Iterator[BuiltMap]:
    max_iterations = config.global_bundle_adjustment.max_iterations
    for initial in initial_pairs:
        sparse_map = new_map()
        if not initialize(
            sparse_map, initial, config=initialization, max_iterations=max_iterations
        ):
            continue
        grow_fully(sparse_map, config=config)
        enough = min(3, len(sparse_map.keyframe_ids))
        if sparse_map.num_registered < enough:
            continue
        adjust_in_place(sparse_map, config=config)
        if has_enough_points(sparse_map, initialization):
            yield BuiltMap(sparse_map=sparse_map, pair=initial.pair, initial=initial)


def _fullness(built: BuiltMap) -> tuple[int, int]:
    return built.sparse_map.num_registered, built.sparse_map.num_points3D


# -- from a window --------------------------------------------------------------------------------


def bootstrap_map(
    graph: SceneGraph,
    pairs: Sequence[VerifiedPair],
    *,
    new_map: Callable[[], SparseMap],
    unknown_cameras: Collection[str],
    size: int,
    solve: WindowSolver,
    initialization: InitializationConfig,
    config: GrowthConfig,
) -> BuiltMap | None:
    """Builds a map from a window of the best connected keyframes.

    Args:
        graph: holds the keyframes.
        pairs: verified pairs that may be used.
        new_map: makes a map with all keyframes and pairs, none registered.
        unknown_cameras: keys of cameras whose focal length the window has to find.
        size: keyframes of the window at most.
        solve: solves windows.
        initialization: thresholds of starting.
        config: thresholds of growing.

    Returns:
        None when the window cannot be solved, or what grows from it is no sound map.
    """
    frame_ids = best_connected(pairs, size=size)
    if len(frame_ids) < _MIN_VALID:
        return None
    sparse_map = new_map()
    window = Window(
        frame_ids=tuple(i for i in graph.keyframe_ids if i in frame_ids),
        free_ids=frozenset(frame_ids),
        purpose=WindowPurpose.BOOTSTRAP,
    )
    problem = window_problem(graph, sparse_map, window, unknown_cameras=unknown_cameras)
    if problem is None:
        return None
    job = WindowJob(window=window, problem=problem, started_s=time.monotonic())
    estimate = solve(problem)
    if estimate.status is not WindowStatus.SOLVED or estimate.is_valid.sum() < _MIN_VALID:
        return None
    _start_from_window(sparse_map, graph, job, estimate, unknown_cameras=unknown_cameras)
    grow_fully(sparse_map, config=config)
    adjust_in_place(sparse_map, config=config)
    if (
        sparse_map.num_registered < _MIN_VALID
        or sparse_map.num_points3D < _POINTS_PER_INLIER * initialization.min_inliers
    ):
        return None
    strongest = max(_among(pairs, frame_ids), key=lambda pair: (pair.num_inliers, pair.pair))
    return BuiltMap(sparse_map=sparse_map, pair=strongest.pair, initial=None)


def _start_from_window(
    sparse_map: SparseMap,
    graph: SceneGraph,
    job: WindowJob,
    estimate: WindowEstimate,
    *,
    unknown_cameras: Collection[str],
) -> None:
    """Sets the focal lengths and poses that the window found; then triangulates."""
    frame_ids = job.window.frame_ids
    for frame_id, camera_idx in zip(frame_ids, job.problem.camera_idx, strict=True):
        camera_key = graph.keyframe(frame_id).calibration_key
        if camera_key in unknown_cameras:
            focal_px = float(estimate.focal_px[camera_idx])
            params = with_focal_length(sparse_map.camera(camera_key), focal_px)
            sparse_map.set_camera_params(camera_key, params)
    valid = [idx for idx in range(len(frame_ids)) if estimate.is_valid[idx]]
    sparse_map.place({frame_ids[idx]: estimate.cam_from_world[idx] for idx in valid})
    for idx in valid:
        sparse_map.triangulate(frame_ids[idx])
    sparse_map.filter_all()


def best_connected(pairs: Sequence[VerifiedPair], *, size: int) -> set[FrameId]:
    """Keyframes joined one by one to the strongest pair, each by most inliers to those before."""
    if not pairs:
        return set()
    strongest = max(pairs, key=lambda pair: (pair.initial_pair_score, pair.pair)).pair
    chosen = {strongest.first, strongest.second}
    while len(chosen) < size:
        links: Counter[FrameId] = Counter()
        for pair in pairs:
            ends = {pair.pair.first, pair.pair.second}
            if len(ends & chosen) == 1:
                links[(ends - chosen).pop()] += pair.num_inliers
        if not links:
            break
        chosen.add(max(links, key=lambda i: (links[i], -i)))
    return chosen


def _among(pairs: Sequence[VerifiedPair], frame_ids: Collection[FrameId]) -> list[VerifiedPair]:
    return [pair for pair in pairs if {pair.pair.first, pair.pair.second} <= set(frame_ids)]
