"""The map of a run as it is now: what enters it, what replaces it, and the graph told of both.

Maps are built, tried and adjusted by other modules; which one is the run's map, and which keyframes
the scene graph believes to be in it, is decided here alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.config import Config
from engine.mapping.bundle_adjustment import GlobalMerge
from engine.mapping.cameras import CameraCalibration
from engine.mapping.facts import MappingFacts
from engine.mapping.growth import (
    BuiltMap,
    GrowthConfig,
    adjust_in_place,
    grow_fully,
    register_and_refine,
)
from engine.mapping.metric_scale import MetricScale, estimate_metric_scale
from engine.mapping.misplacement import Misplacement, find_misplacement, take_out
from engine.mapping.sparse_map import Registration, SparseMap
from engine.mapping.window_merging import WindowMerge, WindowMergeConfig
from engine.matching.scene_graph import SceneGraph
from engine.types import Float32Array, FrameId, ImagePair, RegistrationStatus

_SAME_SCALE = 1.1  # a metric map whose unit is within this factor of a metre stays as it is

DepthsOf = Callable[[FrameId], Float32Array]


class CurrentMap:
    """The map and its place in the scene graph; for the mapping thread only.

    Args:
        config: the whole configuration.
        graph: is told which keyframes are in the map.
        cameras: knows which cameras must not change.
        facts: is told what happened.
        depths_m: depths that the matcher saw at the keypoints of a keyframe, NaN where none.
    """

    def __init__(
        self,
        config: Config,
        *,
        graph: SceneGraph,
        cameras: CameraCalibration,
        facts: MappingFacts,
        depths_m: DepthsOf,
    ) -> None:
        self._config = config
        self._graph = graph
        self._cameras = cameras
        self._facts = facts
        self._depths_m = depths_m
        self._map = self.new_map()
        self._num_maps = 0  # adopted so far, each better than the one before
        self._knows_metric_scale = False
        self._evidence_used: set[ImagePair] = set()

    @property
    def sparse_map(self) -> SparseMap:
        """The map."""
        return self._map

    @property
    def is_initialized(self) -> bool:
        """Whether there is a map."""
        return self._map.num_registered > 0

    def new_map(self) -> SparseMap:
        """An empty map of the run's settings."""
        return SparseMap(
            triangulation=self._config.triangulation,
            registration=self._config.registration,
            seed=self._config.runtime.seed,
        )

    def growth_config(self, *, final: bool = False) -> GrowthConfig:
        """Thresholds of growing: while frames arrive, or at the end, when no better ones can."""
        registration = self._config.registration
        settings = self._config.global_bundle_adjustment
        if final:
            settings = settings.model_copy(update={"max_iterations": settings.final_iterations})
        return GrowthConfig(
            initialization=self._config.initialization,
            min_inlier_ratio=(
                registration.min_inlier_ratio if final else registration.sure_inlier_ratio
            ),
            local_bundle_adjustment=self._config.local_bundle_adjustment,
            global_bundle_adjustment=settings,
            constant_camera_ids=self._cameras.constant_ids(self._map),
            num_threads=self._config.runtime.num_threads,
            seed=self._config.runtime.seed,
        )

    def window_merge_config(self) -> WindowMergeConfig:
        """Thresholds of merging a window."""
        return WindowMergeConfig(
            window=self._config.window,
            registration=self._config.registration,
            local_bundle_adjustment=self._config.local_bundle_adjustment,
            constant_camera_ids=self._cameras.constant_ids(self._map),
        )

    # -- growing --------------------------------------------------------------------------------

    def register(self, frame_id: FrameId, *, started_s: float, is_retry: bool = False) -> bool:
        """Tries to give a keyframe its place; whether it has one now."""
        registration = register_and_refine(self._map, frame_id, config=self.growth_config())
        is_registered = registration.status is RegistrationStatus.REGISTERED
        if is_registered or not is_retry:
            self._note(frame_id, registration, started_s=started_s, is_retry=is_retry)
        return is_registered

    def retry_waiting(self) -> None:
        """Tries keyframes that failed before, those with the best pairs into the map first."""
        limit = self._config.registration.max_retries_per_keyframe
        for frame_id in self._graph.retry_candidates(limit):
            self.register(frame_id, started_s=time.monotonic(), is_retry=True)

    def grow(self, config: GrowthConfig) -> None:
        """Registers everything that can be."""
        started_s = time.monotonic()
        grown = grow_fully(self._map, config=config)
        each_s = (time.monotonic() - started_s) / max(1, len(grown))
        for frame_id, registration in grown.items():
            self._note(frame_id, registration, started_s=time.monotonic() - each_s, is_retry=True)

    def repair(self, frame_id: FrameId) -> Misplacement | None:
        """Takes out keyframes that the new one shows to be misplaced; what was found, if anything.

        They are tried again; taking the same ones out twice for the same reason changes nothing.
        """
        misplacement = find_misplacement(self._map, frame_id)
        if misplacement is None or misplacement.evidence in self._evidence_used:
            return None
        self._evidence_used.add(misplacement.evidence)
        take_out(self._map, misplacement)
        for misplaced in misplacement.keyframe_ids:
            self._graph.set_registered(misplaced, False)
        self._facts.misplacement_found(misplacement)
        return misplacement

    # -- replacing ------------------------------------------------------------------------------

    def adopt_if_fuller(self, built: BuiltMap | None) -> bool:
        """Makes a built map the map when it holds more keyframes; whether it did."""
        if built is None or built.sparse_map.num_registered <= self._map.num_registered:
            return False
        self._evidence_used.clear()
        self._map = built.sparse_map
        self._num_maps += 1
        self.note_metric_scale()
        for frame_id in self._map.keyframe_ids:
            self._tell_graph(frame_id)
        self._facts.map_initialized(built.pair, sparse_map=self._map, attempt=self._num_maps)
        return True

    def take_over(self, merge: WindowMerge) -> None:
        """Makes the map that a window made better the map."""
        if merge.better_map is None:
            return
        self._map = merge.better_map
        for frame_id in merge.registered:
            self._tell_graph(frame_id)

    # -- adjusting ------------------------------------------------------------------------------

    def adjust(self, config: GrowthConfig) -> None:
        """Adjusts the whole map here and now."""
        started_s = time.monotonic()
        before_px = self._map.mean_reprojection_error_px()
        adjust_in_place(self._map, config=config)
        merge = GlobalMerge(
            num_keyframes=self._map.num_registered,
            keyframes_added_meanwhile=0,
            error_before_px=before_px,
            error_after_px=self._map.mean_reprojection_error_px(),
            elapsed_s=time.monotonic() - started_s,
        )
        self._facts.adjusted(merge, sparse_map=self._map)

    def metric_scale(self) -> MetricScale | None:
        """How long the map's unit is, as the matcher's depths have it; None when nothing tells."""
        if self._config.matching.metric_scale == "off":
            return None
        return estimate_metric_scale(self._map, self._depths_m)

    def note_metric_scale(self) -> None:
        """Tells, once it is known, how long the map's unit is, and makes it a metre when asked to.

        Later maps are placed onto the one before, and so have its scale, unless they share too
        little with it.
        """
        is_applied = self._config.matching.metric_scale == "apply"
        if self._knows_metric_scale and not is_applied:
            return
        scale = self.metric_scale()
        if scale is None:
            return
        has_its_scale = 1 / _SAME_SCALE < scale.metres_per_map_unit < _SAME_SCALE
        if self._knows_metric_scale and has_its_scale:
            return
        self._knows_metric_scale = True
        if is_applied:
            self._map.scale(scale.metres_per_map_unit)
        self._facts.metric_scale_estimated(scale, is_applied=is_applied)

    # -- helpers --------------------------------------------------------------------------------

    def _note(
        self, frame_id: FrameId, registration: Registration, *, started_s: float, is_retry: bool
    ) -> None:
        if registration.status is not RegistrationStatus.REGISTERED:
            self._facts.registration_failed(frame_id, registration)
            return
        self._tell_graph(frame_id)
        self._facts.registered(
            frame_id,
            registration,
            sparse_map=self._map,
            is_retry=is_retry,
            elapsed_s=time.monotonic() - started_s,
        )

    def _tell_graph(self, frame_id: FrameId) -> None:
        is_registered = self._map.is_registered(frame_id)
        self._graph.set_registered(frame_id, is_registered)
        if is_registered:
            self._graph.set_covisibility(frame_id, self._map.covisibility(frame_id))
