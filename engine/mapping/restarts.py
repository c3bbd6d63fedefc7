"""Starting maps: the first one, another instead of a poor one, others while keyframes are missing.

Each start builds a whole map from the scene graph and places it onto the present one by the
keyframes they share. Whether it replaces it is for the caller to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import pycolmap

from engine.config import InitializationConfig, RescueConfig, WindowConfig
from engine.geometry import similarity_between_poses
from engine.mapping.cameras import CameraCalibration
from engine.mapping.growth import BuiltMap, GrowthConfig, build_best_map, rank_initial_pairs
from engine.mapping.sparse_map import SparseMap
from engine.mapping.window_bootstrap import bootstrap_map
from engine.matching.scene_graph import SceneGraph
from engine.ports import WindowSolver
from engine.types import FrameId, ImagePair, VerifiedPair

_MORE_TO_RESTART = 1.25  # times the keyframes seen at the last restart
_STRONG_START_RATIO = 0.8  # of the keyframes that match any: no window is tried
_MIN_COMMON_TO_PLACE = 2  # keyframes; one tells no scale


class MapStarts:
    """Builds maps from the scene graph and remembers what was tried.

    Args:
        initialization: when a first map is tried.
        rescue: when another one is.
        window: whether and how large a window may give the first one.
        graph: knows all keyframes and pairs.
        cameras: knows all cameras.
        new_map: makes an empty map.
        solve_window: solves windows.
    """

    def __init__(
        self,
        *,
        initialization: InitializationConfig,
        rescue: RescueConfig,
        window: WindowConfig,
        graph: SceneGraph,
        cameras: CameraCalibration,
        new_map: Callable[[], SparseMap],
        solve_window: WindowSolver,
    ) -> None:
        self._initialization = initialization
        self._rescue = rescue
        self._window = window
        self._solve_window = solve_window
        self._num_keyframes_at_bootstrap = 0
        self._graph = graph
        self._cameras = cameras
        self._new_map = new_map
        self._all_pairs_were_tried = False
        self._num_restarts = 0
        self._num_keyframes_at_restart = 0
        self._tried_at_end: set[ImagePair] = set()
        self._distrusted: set[ImagePair] = set()

    def distrust(self, pairs: Iterable[ImagePair]) -> None:
        """Leaves pairs that misled a map out of all maps to come."""
        self._distrusted.update(pairs)

    def first(
        self, present: SparseMap, newest: Sequence[VerifiedPair], *, config: GrowthConfig
    ) -> BuiltMap | None:
        """The first map, once there are enough keyframes and some of them make a sound one.

        Args:
            present: the map without registered keyframes; it knows the cameras.
            newest: pairs of the newest keyframe; those of older ones are tried only once.
            config: thresholds.
        """
        if len(self._graph.keyframe_ids) < self._initialization.min_keyframes:
            return None
        pairs = newest if self._all_pairs_were_tried else self._pairs()
        self._all_pairs_were_tried = True
        self._cameras.calibrate_from_pairs(present, self._graph)
        built = self._build(present, pairs, config=config)
        num_connected = len(self._graph.connected_ids)
        # Small windows are easily wrong, and cost as much as they tell.
        if num_connected < max(
            self._window.size, _MORE_TO_RESTART * self._num_keyframes_at_bootstrap
        ):
            return built
        self._num_keyframes_at_bootstrap = num_connected
        return self._or_from_window(built, present, config=config)

    def first_at_end(self, present: SparseMap, *, config: GrowthConfig) -> BuiltMap | None:
        """The first map when no more keyframes will come: few are enough, all pairs are tried."""
        self._cameras.calibrate_from_pairs(present, self._graph)
        built = self._build(present, self._pairs(), config=config)
        return self._or_from_window(built, present, config=config)

    def instead_of_poor(self, present: SparseMap, *, config: GrowthConfig) -> BuiltMap | None:
        """A map from another start when most keyframes do not fit the present one.

        Tried each time a quarter more keyframes came, up to the configured number.
        """
        num_seen = len(self._graph.connected_ids)
        if (
            present.num_registered >= self._rescue.restart_below_registered_ratio * num_seen
            or num_seen < self._rescue.restart_min_keyframes
            or num_seen < _MORE_TO_RESTART * self._num_keyframes_at_restart
            or self._num_restarts >= self._rescue.max_restarts
        ):
            return None
        self._num_restarts += 1
        self._num_keyframes_at_restart = num_seen
        return self._build(present, self._pairs_outside(present), config=config)

    def another_at_end(self, present: SparseMap, *, config: GrowthConfig) -> BuiltMap | None:
        """A map from a start not tried here before, while the present one misses keyframes."""
        if present.num_registered == len(self._graph.connected_ids):
            return None
        pairs = self._pairs_outside(present) or self._pairs()
        built = self._build(present, pairs, config=config)
        if built is not None:
            self._tried_at_end.add(built.pair)
        return built

    def apart(
        self, present: SparseMap, frame_ids: Collection[FrameId], *, config: GrowthConfig
    ) -> BuiltMap | None:
        """A map of some keyframes alone, in a frame of its own; it knows no others.

        Args:
            present: knows the cameras.
            frame_ids: keyframes that have no place in ``present``.
            config: thresholds.
        """
        ranked = rank_initial_pairs(present, self._pairs_among(frame_ids), config=config)
        built = build_best_map(lambda: self._with(present, frame_ids), ranked, config=config)
        return self._or_from_window(built, present, config=config, only=frame_ids)

    def _build(
        self, present: SparseMap, pairs: Sequence[VerifiedPair], *, config: GrowthConfig
    ) -> BuiltMap | None:
        ranked = rank_initial_pairs(present, pairs, config=config, excluded=self._tried_at_end)
        built = build_best_map(
            lambda: self._with(present, self._graph.keyframe_ids), ranked, config=config
        )
        if built is not None:
            _place(built.sparse_map, onto=present)
        return built

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
        if num_registered >= enough:
            return built
        chosen = self._graph.keyframe_ids if only is None else only
        from_window = self._bootstrap(present, chosen, config=config)
        if from_window is None or from_window.sparse_map.num_registered <= num_registered:
            return built
        return from_window

    def _bootstrap(
        self, present: SparseMap, frame_ids: Collection[FrameId], *, config: GrowthConfig
    ) -> BuiltMap | None:
        """A map from a window of the best connected of some keyframes."""
        if not (self._window.enabled and self._window.bootstrap):
            return None
        return bootstrap_map(
            self._graph,
            self._pairs_among(frame_ids),
            new_map=lambda: self._with(present, frame_ids),
            unknown_cameras=self._cameras.unknown_keys(present),
            size=self._window.size + self._window.num_older,
            solve=self._solve_window,
            config=config,
        )

    def _with(self, present: SparseMap, frame_ids: Collection[FrameId]) -> SparseMap:
        """A map with keyframes and their pairs, none registered, cameras as calibrated now."""
        fresh = self._new_map()
        self._cameras.add_all(fresh, like=present)
        chosen = set(frame_ids)
        order = {i: number for number, i in enumerate(self._graph.keyframe_ids) if i in chosen}
        pairs_of: dict[FrameId, list[VerifiedPair]] = {frame_id: [] for frame_id in order}
        for pair in self._pairs_among(chosen):
            # Frames of several sources need not come in the order of their ids.
            later = max(pair.pair.first, pair.pair.second, key=order.__getitem__)
            pairs_of[later].append(pair)
        for frame_id, pairs in pairs_of.items():
            fresh.add_keyframe(self._graph.keyframe(frame_id), pairs)
        return fresh

    def _pairs(self) -> list[VerifiedPair]:
        return [pair for pair in self._graph.edges() if pair.pair not in self._distrusted]

    def _pairs_among(self, frame_ids: Collection[FrameId]) -> list[VerifiedPair]:
        inside = set(frame_ids)
        return [p for p in self._pairs() if p.pair.first in inside and p.pair.second in inside]

    def _pairs_outside(self, present: SparseMap) -> list[VerifiedPair]:
        """Pairs of which the present map does not hold both keyframes."""
        return [
            pair
            for pair in self._pairs()
            if not (
                present.is_registered(pair.pair.first) and present.is_registered(pair.pair.second)
            )
        ]


def _place(sparse_map: SparseMap, *, onto: SparseMap) -> None:
    """Moves a map onto another by the poses of the keyframes that both hold."""
    common = [i for i in sparse_map.registered_ids if onto.is_registered(i)]
    if len(common) < _MIN_COMMON_TO_PLACE:
        return
    poses, onto_poses = (
        np.array([one.cam_from_world(i) for i in common]) for one in (sparse_map, onto)
    )
    onto_from_map = similarity_between_poses(poses, onto_poses)
    if onto_from_map is not None:
        sparse_map.reconstruction.transform(pycolmap.Sim3d(onto_from_map))
