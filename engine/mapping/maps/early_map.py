"""The early map of a video: frames get poses by it until the run's map starts.

Two keyframes suffice where the calibration is known. With an unknown focal length three do, where
they tell it; else one more is waited for. (Two views fit any focal length but for one constraint,
and what that gives is wrong by a fifth where the third view leaves a few percent.)

Nothing of it goes into the run's map. That starts from the best of more keyframes, as if there had
been none, and is placed onto it, so that both are in one world. So is a fuller early map that takes
the place of one. Where maps have to be in metres, the early one is, too.
"""

from __future__ import annotations

from dataclasses import replace

from engine.config import InitializationConfig
from engine.mapping.maps.restarts import BuiltMap, MapBuilder
from engine.mapping.model.growth import GrowthConfig, register_and_refine
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.metric_scale import MetricUnit
from engine.matching.scene_graph import SceneGraph
from engine.types import EXIF_FOCAL_SIGMA_RATIO, FrameId, RegistrationStatus

_MIN_KNOWN, _MIN_UNKNOWN = 2, 3  # keyframes
_MAX_KEYFRAMES = 12  # of which one is built: what moves so little has no map for long


class EarlyMap:
    """Makes and grows the early map.

    Args:
        initialization: when one is made.
        growth: thresholds of growing.
        graph: holds the keyframes.
        builder: builds maps.
        metric_unit: makes maps metric where they have to be.
    """

    def __init__(
        self,
        initialization: InitializationConfig,
        *,
        growth: GrowthConfig,
        graph: SceneGraph,
        builder: MapBuilder,
        metric_unit: MetricUnit,
    ) -> None:
        self._is_wanted = initialization.early_triangulation_angle_deg > 0.0
        self._growth = growth
        self._graph = graph
        self._builder = builder
        self._metric_unit = metric_unit
        self._map: SparseMap | None = None

    @property
    def sparse_map(self) -> SparseMap | None:
        """The map, if there is one."""
        return self._map

    def clear(self) -> None:
        """Drops it."""
        self._map = None

    def add_keyframe(self, present: SparseMap, frame_id: FrameId) -> BuiltMap | None:
        """Registers a keyframe in the map, or makes one; returns it where it is another one now.

        Args:
            present: the run's map, without registered keyframes; holds all cameras.
            frame_id: the newest keyframe.

        Returns:
            The map that was made, if one was, and whether it is placed onto the one before it.
        """
        if not self._is_wanted or self._graph.keyframe(frame_id).is_photo:
            return None
        if self._map is not None:
            self._builder.complete(self._map, like=present, frame_ids=[frame_id])
            registration = register_and_refine(self._map, frame_id, config=self._growth)
            if registration.status is RegistrationStatus.REGISTERED:
                return None
        built = self._built(present)
        if built is None or (
            self._map is not None and built.sparse_map.num_registered <= self._map.num_registered
        ):
            return None
        if not self._metric_unit.make_metric(built.sparse_map):
            return None
        built = replace(built, is_placed=self._place(built.sparse_map))
        self._map = built.sparse_map
        return built

    def _place(self, sparse_map: SparseMap) -> bool:
        """Places a map onto the present one, if there is one; returns whether that was possible."""
        if self._map is None or not self._builder.place(sparse_map, onto=self._map):
            return False
        if self._metric_unit.is_metric(sparse_map):
            return True
        self._metric_unit.make_metric(sparse_map)
        return False

    def _built(self, present: SparseMap) -> BuiltMap | None:
        """A map of all keyframes, where their calibration is known or told by it."""
        if not _MIN_KNOWN <= len(self._graph.keyframe_ids) <= _MAX_KEYFRAMES:
            return None
        if len(self._graph.keyframe_ids) < _MIN_UNKNOWN and not all(
            _is_known(present, self._graph.keyframe(i).calibration_key)
            for i in self._graph.keyframe_ids
        ):
            return None
        built = self._builder.early(present)
        return built if built is not None and _is_calibrated(built.sparse_map) else None


def _is_known(sparse_map: SparseMap, calibration_key: str) -> bool:
    """Whether a focal length is known before any map."""
    prior = sparse_map.camera_prior(calibration_key)
    return prior.is_constant or prior.focal_sigma_ratio <= EXIF_FOCAL_SIGMA_RATIO


def _is_calibrated(sparse_map: SparseMap) -> bool:
    """Whether the focal lengths of all registered keyframes are known, or told by the map."""
    keys = {sparse_map.keyframe(i).calibration_key for i in sparse_map.registered_ids}
    unknown = [key for key in keys if not _is_known(sparse_map, key)]
    if unknown and sparse_map.num_registered < _MIN_UNKNOWN:
        return False
    states = [sparse_map.camera_state(key) for key in unknown]
    return all(state is not None and state.hold is None for state in states)
