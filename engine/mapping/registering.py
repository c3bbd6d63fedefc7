"""Registering keyframes in the main map: the newest, those that wait, and all that can be.

Each is reported, and the scene graph is kept up to date with its place.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from engine.mapping.keyframe_reports import KeyframeReports
from engine.mapping.maps.components import Components
from engine.mapping.model.growth import GrowthConfig, grow_fully, register_and_refine
from engine.mapping.model.sparse_map import Registration, SparseMap
from engine.mapping.places.strict_posing import StrictPosing
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId, RegistrationStatus

_FEW = 4  # keyframes whose covisibility is cheaper counted one by one


class Registering:
    """Registers keyframes in the main map and refines it around them.

    Args:
        max_retries: keyframes that are tried again after one was registered.
        growth: thresholds of growing while the run goes on.
        graph: knows which keyframes wait; is kept up to date.
        components: the maps beside; keyframes of established ones are left to them.
        strict_posing: registers keyframes that no agreed pair joins to the map.
        reports: of keyframes.
    """

    def __init__(
        self,
        *,
        max_retries: int,
        growth: GrowthConfig,
        graph: SceneGraph,
        components: Components,
        strict_posing: StrictPosing,
        reports: KeyframeReports,
    ) -> None:
        self._max_retries = max_retries
        self._growth = growth
        self._graph = graph
        self._components = components
        self._strict_posing = strict_posing
        self._reports = reports

    def register(self, main: SparseMap, frame_id: FrameId, *, begun_s: float) -> bool:
        """Registers the newest keyframe; returns whether it found its place.

        Args:
            main: the main map.
            frame_id: the keyframe.
            begun_s: when it came; monotonic.
        """
        registration = register_and_refine(main, frame_id, config=self._growth)
        self._report(main, frame_id, registration, started_s=begun_s, is_retry=False)
        return registration.status is RegistrationStatus.REGISTERED

    def retry_waiting(self, main: SparseMap) -> None:
        """Tries keyframes that failed before, those with the best pairs into the map first.

        Those that have two places as before are passed over, so that others get their turn.
        """
        left_out = {*self._components.established_ids, *main.undecided_ids}
        for frame_id in self._graph.retry_candidates(self._max_retries, exclude=left_out):
            started_s = time.monotonic()
            registration = register_and_refine(main, frame_id, config=self._growth)
            if registration.status is RegistrationStatus.REGISTERED:
                self._report(main, frame_id, registration, started_s=started_s)

    def pose_strictly(self, main: SparseMap, *, again: bool = False) -> None:
        """Registers keyframes that no agreed pair joins to the map, where that is proven.

        Args:
            main: the main map.
            again: whether those are tried again that the map has not changed around.
        """
        started_s = time.monotonic()
        posed = self._strict_posing.register_waiting(main, again=again)
        for frame_id, registration in posed.items():
            self._report(main, frame_id, registration, started_s=started_s)

    def register_all(self, main: SparseMap, *, config: GrowthConfig) -> None:
        """Registers everything that can be."""
        started_s = time.monotonic()
        grown = grow_fully(main, config=config, exclude=self._components.established_ids)
        each_s = (time.monotonic() - started_s) / max(1, len(grown))
        for frame_id, registration in grown.items():
            self._report(main, frame_id, registration, started_s=time.monotonic() - each_s)

    def update_graph(self, main: SparseMap, frame_ids: Iterable[FrameId]) -> None:
        """Brings the scene graph up to date with the places of keyframes in all maps."""
        asked = list(frame_ids)
        if len(asked) > _FEW:
            main.count_covisibility()
        for frame_id in asked:
            holding = self._components.holding(main, frame_id)
            if holding is None:
                self._graph.set_registered(frame_id, False)
                continue
            number, sparse_map = holding
            self._graph.set_registered(frame_id, True, map_number=number)
            self._graph.set_covisibility(frame_id, sparse_map.covisibility(frame_id))

    def _report(
        self,
        main: SparseMap,
        frame_id: FrameId,
        registration: Registration,
        *,
        started_s: float,
        is_retry: bool = True,
    ) -> None:
        if registration.status is RegistrationStatus.REGISTERED:
            self.update_graph(main, [frame_id])
        self._reports.report_registration(
            frame_id, registration, sparse_map=main, started_s=started_s, is_retry=is_retry
        )
