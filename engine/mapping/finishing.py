"""The end of a run: what the growing map could not place is tried once more, then all is adjusted.

What cannot be joined to the map, but holds together, becomes a map of its own: a flight over two
fields that nothing connects gives two maps, and not one with half of the frames missing.
"""

from __future__ import annotations

import networkx

from engine.config import Config
from engine.mapping.cameras import CameraCalibration
from engine.mapping.current_map import CurrentMap
from engine.mapping.georeferencing import Georeferencing
from engine.mapping.growth import GrowthConfig
from engine.mapping.restarts import MapStarts
from engine.mapping.sparse_map import SparseMap
from engine.mapping.window_schedule import WindowWork
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId

_MIN_SEPARATE = 5  # keyframes of a map of its own
_MAX_SEPARATE_MAPS = 8


class MapEnd:
    """Finishes a map.

    Args:
        config: the whole configuration.
        current: the map, and what replaces it.
        starts: builds maps.
        windows: rescues and improves by windows.
        georeferencing: lays the map onto GPS.
        cameras: knows which cameras must not change.
        graph: knows keyframes and pairs.
    """

    def __init__(
        self,
        config: Config,
        *,
        current: CurrentMap,
        starts: MapStarts,
        windows: WindowWork,
        georeferencing: Georeferencing,
        cameras: CameraCalibration,
        graph: SceneGraph,
    ) -> None:
        self._config = config
        self._current = current
        self._starts = starts
        self._windows = windows
        self._georeferencing = georeferencing
        self._cameras = cameras
        self._graph = graph

    def finish(self) -> list[SparseMap]:
        """Registers what is left, rescues what is missing, adjusts all.

        Returns:
            Maps of keyframes that have no place in the run's map, the fullest first.
        """
        current = self._current
        growth = current.growth_config()
        if not current.is_initialized:
            current.adopt_if_fuller(self._starts.first_at_end(current.sparse_map, config=growth))
        if not current.is_initialized:
            return []
        current.grow(growth)
        self._rescue(growth)
        current.grow(current.growth_config(final=True))
        self._rescue_by_windows()
        self._improve_by_windows()
        current.note_metric_scale()
        self._adjust_finally()
        self._georeference()
        return self._separate_maps(current.growth_config(final=True))

    def _rescue(self, config: GrowthConfig) -> None:
        """Tries other starts while keyframes are missing."""
        for _ in range(self._config.rescue.final_rebuilds):
            built = self._starts.another_at_end(self._current.sparse_map, config=config)
            if built is None:
                return
            self._current.adopt_if_fuller(built)

    def _rescue_by_windows(self) -> None:
        """Solves stretches of missing keyframes as windows of their own while some come in."""
        while (merge := self._windows.rescue(self._current.sparse_map)) is not None:
            self._current.take_over(merge)
            self._current.grow(self._current.growth_config(final=True))

    def _improve_by_windows(self) -> None:
        """Solves the weakest parts of the map once more."""
        tried: set[FrameId] = set()
        for _ in range(self._config.window.max_final):
            merge = self._windows.improve(self._current.sparse_map, tried=tried)
            if merge is None:
                return
            self._current.take_over(merge)

    def _adjust_finally(self) -> None:
        config = self._current.growth_config(final=True)
        for _ in range(self._config.global_bundle_adjustment.final_passes):
            self._current.sparse_map.retriangulate()
            self._current.adjust(config)

    def _georeference(self) -> None:
        sparse_map = self._current.sparse_map
        constant_ids = self._cameras.constant_ids(sparse_map)
        self._georeferencing.adjust(sparse_map, constant_camera_ids=constant_ids)
        self._georeferencing.update(sparse_map, is_final=True)

    def _separate_maps(self, config: GrowthConfig) -> list[SparseMap]:
        maps: list[SparseMap] = []
        if not self._config.rescue.separate_maps:
            return maps
        waiting = self._missing_stretches()
        while waiting and len(maps) < _MAX_SEPARATE_MAPS:
            stretch = waiting.pop(0)
            built = self._starts.apart(self._current.sparse_map, stretch, config=config)
            if built is None or built.sparse_map.num_registered < _MIN_SEPARATE:
                continue
            maps.append(built.sparse_map)
            waiting += self._stretches(stretch - set(built.sparse_map.registered_ids))
        return sorted(maps, key=lambda one: -one.num_registered)

    def _missing_stretches(self) -> list[set[FrameId]]:
        sparse_map = self._current.sparse_map
        return self._stretches(
            {i for i in self._graph.keyframe_ids if not sparse_map.is_registered(i)}
        )

    def _stretches(self, frame_ids: set[FrameId]) -> list[set[FrameId]]:
        """Keyframes that verified pairs among them join, the largest stretch first."""
        joined: networkx.Graph[FrameId] = networkx.Graph()
        joined.add_edges_from(
            (edge.pair.first, edge.pair.second)
            for edge in self._graph.edges()
            if edge.pair.first in frame_ids and edge.pair.second in frame_ids
        )
        stretches = [set(stretch) for stretch in networkx.connected_components(joined)]
        large = [stretch for stretch in stretches if len(stretch) >= _MIN_SEPARATE]
        return sorted(large, key=lambda stretch: (-len(stretch), min(stretch)))
