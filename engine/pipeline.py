"""The mapping state machine: keyframes and tracked frames in; a map, poses and facts out.

No I/O and no asyncio: one thread calls it. Global bundle adjustment is handed out as a private copy
for another thread and merged a fixed number of keyframes later, so that the same input gives the
same map however fast the other thread was.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import pycolmap

from engine.bundle_adjustment import (
    GlobalAdjustment,
    GlobalAdjustmentSchedule,
    merge_global_adjustment,
    start_global_adjustment,
)
from engine.cameras import CalibrationOrigin, InitialCamera, initial_camera, with_focal_length
from engine.config import Config
from engine.estimators import estimate_focal_length
from engine.events import (
    BundleAdjusted,
    CameraCalibrated,
    FramePosed,
    FrameRegistered,
    KeyframeAdded,
    LoopClosed,
    MapInitialized,
    MisplacementFound,
    PairVerified,
    RegistrationFailed,
)
from engine.frame_posing import FramePoser
from engine.geometry import camera_center
from engine.georeference import gps_rmse_m
from engine.map_consistency import find_misplacement, take_out
from engine.map_growth import (
    BuiltMap,
    GrowthConfig,
    adjust_in_place,
    build_best_map,
    grow_fully,
    rank_initial_pairs,
    register_and_refine,
)
from engine.pair_matching import match_keyframe
from engine.ports import EventSink, PairMatcher
from engine.scene_graph import SceneGraph
from engine.sparse_map import Registration, SparseMap
from engine.types import (
    Float64Array,
    FrameId,
    FramePose,
    ImagePair,
    Keyframe,
    MapView,
    RegistrationStatus,
    TrackedFrame,
    VerifiedPair,
)

_MIN_COMMON_FOR_ALIGNMENT = 3


class MappingPipeline:
    """Turns keyframes into a growing map, and tracked frames into poses.

    Args:
        config: the whole configuration; each part is handed its own section.
        matcher: matches pairs of keyframes.
        graph: chooses pairs and keeps them.
        emit: takes facts.
        clock: seconds since the start of the run.
    """

    def __init__(
        self,
        config: Config,
        *,
        matcher: PairMatcher,
        graph: SceneGraph,
        emit: EventSink,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._matcher = matcher
        self._graph = graph
        self._emit = emit
        self._clock = clock
        self._cameras: dict[str, InitialCamera] = {}
        self._map = self._new_map()
        self._poser = FramePoser(
            tracking=config.frame_tracking,
            registration=config.registration,
            seed=config.runtime.seed,
        )
        self._schedule = GlobalAdjustmentSchedule(config.global_bundle_adjustment)
        self._in_flight: GlobalAdjustment | None = None
        self._keyframes_since_start = 0
        self._loop_waits_for_adjustment = False
        self._failed_starts: set[ImagePair] = set()
        self._num_starts = 0
        self._num_keyframes_at_restart = 0
        self._reported: set[FrameId] = set()
        self._new_poses: list[FramePose] = []
        self._version = 0

    # -- state ----------------------------------------------------------------------------------

    @property
    def sparse_map(self) -> SparseMap:
        """The map; for the mapping thread only."""
        return self._map

    @property
    def is_initialized(self) -> bool:
        """Whether there is a map."""
        return self._map.num_registered > 0

    @property
    def num_keyframes(self) -> int:
        """Keyframes seen, registered or not."""
        return len(self._graph.keyframe_ids)

    @property
    def merge_is_due(self) -> bool:
        """Whether the adjustment in flight must be merged before the next keyframe."""
        return (
            self._in_flight is not None
            and self._keyframes_since_start
            >= self._config.global_bundle_adjustment.merge_after_keyframes
        )

    def trajectory(self) -> list[FramePose]:
        """Today's pose of every frame, in order of arrival; empty without a map."""
        return self._poser.trajectory(self._map)

    def keyframe_record(self, frame_id: FrameId) -> tuple[pycolmap.Camera, list[VerifiedPair]]:
        """What is worth keeping of a keyframe: a copy of its camera, its pairs to older ones."""
        camera = copy.deepcopy(self._map.camera(self._graph.keyframe(frame_id).camera_key))
        pairs = self._graph.verified_pairs(frame_id)
        return camera, [pair for pair in pairs if pair.pair.second == frame_id]

    def cameras(self) -> list[pycolmap.Camera]:
        """Copies of all cameras as calibrated now."""
        return [copy.deepcopy(self._map.camera(key)) for key in self._cameras]

    def gps_rmse_m(self) -> float | None:
        """How far registered keyframes are from their GPS fixes; None without enough of them."""
        fixes = {i: self._map.keyframe(i).gps for i in self._map.registered_ids}
        known = {i: fix for i, fix in fixes.items() if fix is not None}
        return gps_rmse_m(_centers(self._map, list(known)), list(known.values()))

    def take_new_poses(self) -> list[FramePose]:
        """Poses that became known since the last call, each frame once, as first reported."""
        taken, self._new_poses = self._new_poses, []
        return taken

    def num_interpolated_frames(self) -> int:
        """Frames of the trajectory without a pose of their own."""
        return self._poser.num_interpolated(self._map)

    # -- input ----------------------------------------------------------------------------------

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Takes a keyframe into the scene graph and, when it fits, into the map.

        Raises:
            InferenceError: the matcher failed; the keyframe is in the graph without pairs.
        """
        started_s = time.monotonic()
        self._note_keyframe(keyframe)
        verified = match_keyframe(
            keyframe.frame_id,
            graph=self._graph,
            matcher=self._matcher,
            config=self._config.two_view,
        )
        self._note_pairs(verified)
        self._map.add_keyframe(keyframe, verified)
        self._keyframes_since_start += 1
        if self.is_initialized:
            self._register(keyframe.frame_id, started_s=started_s)
            self._restart_if_poor()
        elif self.num_keyframes >= self._config.initialization.min_keyframes:
            self._initialize(verified)
        self._after_change()

    def add_tracked(self, tracked: TrackedFrame) -> None:
        """Poses a frame between keyframes, now or when its keyframe is registered."""
        pose = self._poser.add_tracked(tracked, self._map if self.is_initialized else None)
        if pose is not None:
            self._report_pose(pose, received_at_s=tracked.received_at_s)

    def start_global_adjustment(self) -> GlobalAdjustment | None:
        """A copy of the map to adjust elsewhere, when one is due; None otherwise.

        Small maps are adjusted at once instead, since nothing waits long for them.
        """
        if self._in_flight is not None or not self.is_initialized:
            return None
        num_registered = self._map.num_registered
        if not (self._schedule.should(num_registered) or self._loop_waits_for_adjustment):
            return None
        self._schedule.done(num_registered)
        self._loop_waits_for_adjustment = False
        if num_registered <= self._config.global_bundle_adjustment.synchronous_until:
            self._adjust_here()
            return None
        self._in_flight = start_global_adjustment(
            self._map, constant_camera_ids=self._growth_config().constant_camera_ids
        )
        self._keyframes_since_start = 0
        return self._in_flight

    def merge(self, adjusted: GlobalAdjustment) -> None:
        """Brings an adjusted copy back under the map; dropped when the map was replaced."""
        if adjusted is not self._in_flight:
            return
        self._in_flight = None
        merged = merge_global_adjustment(self._map, adjusted)
        self._emit(
            BundleAdjusted(
                at_s=self._clock(),
                num_keyframes=merged.num_keyframes,
                num_points3D=self._map.num_points3D,
                reprojection_error_before_px=merged.error_before_px,
                reprojection_error_after_px=merged.error_after_px,
                keyframes_added_meanwhile=merged.keyframes_added_meanwhile,
                elapsed_s=merged.elapsed_s,
            )
        )
        self._after_change()

    def abandon_adjustment(self) -> None:
        """Forgets the adjustment in flight, which failed; the next one is due by growth."""
        self._in_flight = None

    def finish(self) -> None:
        """After the last frame: registers what is left, rescues what is missing, adjusts all."""
        if not self.is_initialized:
            self._initialize(self._graph.edges())
        if self.is_initialized:
            self._grow_existing(self._growth_config())
            self._rescue_missing()
            self._grow_existing(self._growth_config(final=True))
            self._final_adjustment()
        self._after_change()

    # -- the steps of add_keyframe --------------------------------------------------------------

    def _note_keyframe(self, keyframe: Keyframe) -> None:
        self._graph.add_keyframe(keyframe)
        self._poser.add_keyframe(keyframe)
        if keyframe.camera_key not in self._cameras:
            initial = initial_camera(keyframe, self._config.cameras)
            self._cameras[keyframe.camera_key] = initial
            self._map.add_camera(keyframe.camera_key, copy.deepcopy(initial.camera))
            self._emit_calibration(keyframe.camera_key, initial.camera, initial.origin)
        self._emit(
            KeyframeAdded(
                at_s=self._clock(),
                frame_id=keyframe.frame_id,
                name=keyframe.name,
                captured_at_s=keyframe.captured_at_s,
                num_keypoints=len(keyframe.features),
            )
        )

    def _note_pairs(self, verified: Sequence[VerifiedPair]) -> None:
        for pair in verified:
            self._emit(
                PairVerified(
                    at_s=self._clock(),
                    first=pair.pair.first,
                    second=pair.pair.second,
                    reason=pair.reason,
                    num_matches=pair.num_matches,
                    num_inliers=pair.num_inliers,
                )
            )
        loops = [pair for pair in verified if self._graph.is_loop(pair.pair)]
        for pair in loops[:1]:
            self._loop_waits_for_adjustment = True
            self._emit(
                LoopClosed(
                    at_s=self._clock(),
                    first=pair.pair.first,
                    second=pair.pair.second,
                    num_inliers=pair.num_inliers,
                )
            )

    def _register(self, frame_id: FrameId, *, started_s: float) -> None:
        registration = register_and_refine(self._map, frame_id, config=self._growth_config())
        self._note_registration(frame_id, registration, started_s=started_s, is_retry=False)
        if registration.status is RegistrationStatus.REGISTERED:
            self._repair(frame_id)
            self._retry_waiting()

    def _repair(self, frame_id: FrameId) -> None:
        """Takes out keyframes that the new one shows to be misplaced; they are tried again."""
        misplacement = find_misplacement(self._map, frame_id)
        if misplacement is None:
            return
        take_out(self._map, misplacement)
        # An adjustment in flight knows them in the wrong place.
        self._in_flight = None
        for misplaced in misplacement.keyframe_ids:
            self._graph.set_registered(misplaced, False)
        self._emit(
            MisplacementFound(
                at_s=self._clock(),
                keyframe_ids=misplacement.keyframe_ids,
                evidence_first=misplacement.evidence.first,
                evidence_second=misplacement.evidence.second,
            )
        )
        self._grow_existing(self._growth_config())

    def _retry_waiting(self) -> None:
        """Tries keyframes that failed before, those with the best pairs into the map first."""
        limit = self._config.registration.max_retries_per_keyframe
        for frame_id in self._graph.retry_candidates(limit):
            started_s = time.monotonic()
            registration = register_and_refine(self._map, frame_id, config=self._growth_config())
            if registration.status is RegistrationStatus.REGISTERED:
                self._note_registration(frame_id, registration, started_s=started_s, is_retry=True)

    def _note_registration(
        self, frame_id: FrameId, registration: Registration, *, started_s: float, is_retry: bool
    ) -> None:
        if registration.status is not RegistrationStatus.REGISTERED:
            self._emit(
                RegistrationFailed(
                    at_s=self._clock(),
                    frame_id=frame_id,
                    status=registration.status,
                    num_inliers=registration.num_inliers,
                    num_correspondences=registration.num_correspondences,
                )
            )
            return
        self._graph.set_registered(frame_id, True)
        self._graph.set_covisibility(frame_id, self._map.covisibility(frame_id))
        self._emit(
            FrameRegistered(
                at_s=self._clock(),
                frame_id=frame_id,
                num_inliers=registration.num_inliers,
                num_correspondences=registration.num_correspondences,
                num_registered=self._map.num_registered,
                num_points3D=self._map.num_points3D,
                is_retry=is_retry,
                elapsed_s=time.monotonic() - started_s,
            )
        )

    # -- starting and restarting ----------------------------------------------------------------

    def _initialize(self, pairs: Sequence[VerifiedPair]) -> None:
        """Starts the map from the best pair, when there is a sound one."""
        if (
            self._num_starts == 0
            and self.num_keyframes <= self._config.initialization.min_keyframes
        ):
            pairs = self._graph.edges()
        self._calibrate_from_pairs()
        built = self._build_from(pairs)
        if built is not None:
            self._adopt(built)

    def _restart_if_poor(self) -> None:
        """Builds another map when most keyframes do not fit this one; keeps the fuller."""
        settings = self._config.rescue
        num_seen = self.num_keyframes
        if (
            self._map.num_registered >= settings.restart_below_registered_ratio * num_seen
            or num_seen < settings.restart_min_keyframes
            or num_seen < 1.25 * self._num_keyframes_at_restart
            or self._num_starts > settings.max_restarts
        ):
            return
        self._num_keyframes_at_restart = num_seen
        self._num_starts += 1
        built = self._build_from(self._pairs_outside_map())
        if built is not None and built.sparse_map.num_registered > self._map.num_registered:
            self._adopt(built)

    def _rescue_missing(self) -> None:
        """At the end of a run: tries other starts while keyframes are missing."""
        for _ in range(self._config.rescue.final_rebuilds):
            if self._map.num_registered == self.num_keyframes:
                return
            built = self._build_from(self._pairs_outside_map() or self._graph.edges())
            if built is None:
                return
            self._failed_starts.add(built.initial.pair)
            if built.sparse_map.num_registered > self._map.num_registered:
                self._adopt(built)

    def _pairs_outside_map(self) -> list[VerifiedPair]:
        return [
            pair
            for pair in self._graph.edges()
            if not (
                self._map.is_registered(pair.pair.first)
                and self._map.is_registered(pair.pair.second)
            )
        ]

    def _build_from(self, pairs: Sequence[VerifiedPair]) -> BuiltMap | None:
        config = self._growth_config()
        ranked = rank_initial_pairs(self._map, pairs, config=config, excluded=self._failed_starts)
        return build_best_map(self._map_with_everything, ranked, config=config)

    def _adopt(self, built: BuiltMap) -> None:
        """Makes a built map the map, placed onto the old one by the keyframes they share."""
        self._num_starts += 1
        _align(built.sparse_map, to=self._map)
        self._in_flight = None
        self._map = built.sparse_map
        self._schedule.done(self._map.num_registered)
        for frame_id in self._map.keyframe_ids:
            is_registered = self._map.is_registered(frame_id)
            self._graph.set_registered(frame_id, is_registered)
            if is_registered:
                self._graph.set_covisibility(frame_id, self._map.covisibility(frame_id))
        self._emit(
            MapInitialized(
                at_s=self._clock(),
                first=built.initial.pair.first,
                second=built.initial.pair.second,
                num_points3D=self._map.num_points3D,
                attempt=self._num_starts,
            )
        )

    def _map_with_everything(self) -> SparseMap:
        """A map with every keyframe and pair, none registered, cameras as calibrated now."""
        fresh = self._new_map()
        for camera_key in self._cameras:
            fresh.add_camera(camera_key, copy.deepcopy(self._map.camera(camera_key)))
        pairs_of: dict[FrameId, list[VerifiedPair]] = {}
        for pair in self._graph.edges():
            pairs_of.setdefault(pair.pair.second, []).append(pair)
        for frame_id in self._graph.keyframe_ids:
            fresh.add_keyframe(self._graph.keyframe(frame_id), pairs_of.get(frame_id, []))
        return fresh

    def _new_map(self) -> SparseMap:
        return SparseMap(
            triangulation=self._config.triangulation,
            registration=self._config.registration,
            seed=self._config.runtime.seed,
        )

    def _calibrate_from_pairs(self) -> None:
        """Gives cameras nobody knows a focal length from their fundamental matrices."""
        for camera_key, initial in self._cameras.items():
            if initial.origin is not CalibrationOrigin.ASSUMED:
                continue
            camera = self._map.camera(camera_key)
            pairs = [
                pair
                for pair in self._graph.edges()
                if all(
                    self._graph.keyframe(i).camera_key == camera_key
                    for i in (pair.pair.first, pair.pair.second)
                )
            ]
            focal_px = estimate_focal_length(pairs, width=camera.width, height=camera.height)
            if focal_px is not None:
                self._map.set_camera_params(camera_key, with_focal_length(camera, focal_px))
                self._emit_calibration(camera_key, camera, CalibrationOrigin.TWO_VIEW_GEOMETRIES)

    # -- adjusting ------------------------------------------------------------------------------

    def _grow_existing(self, config: GrowthConfig) -> None:
        for frame_id, registration in grow_fully(self._map, config=config).items():
            self._note_registration(
                frame_id,
                registration,
                started_s=time.monotonic(),
                is_retry=True,
            )

    def _final_adjustment(self) -> None:
        settings = self._config.global_bundle_adjustment
        config = self._growth_config(final=True)
        for _ in range(settings.final_passes):
            self._map.retriangulate()
            self._adjust_here(config)

    def _adjust_here(self, config: GrowthConfig | None = None) -> None:
        started_s = time.monotonic()
        before_px = self._map.mean_reprojection_error_px()
        adjust_in_place(self._map, config=config or self._growth_config())
        self._emit(
            BundleAdjusted(
                at_s=self._clock(),
                num_keyframes=self._map.num_registered,
                num_points3D=self._map.num_points3D,
                reprojection_error_before_px=before_px,
                reprojection_error_after_px=self._map.mean_reprojection_error_px(),
                keyframes_added_meanwhile=0,
                elapsed_s=time.monotonic() - started_s,
            )
        )

    def _growth_config(self, *, final: bool = False) -> GrowthConfig:
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
            constant_camera_ids=frozenset(
                self._map.camera_id(key)
                for key, initial in self._cameras.items()
                if initial.is_constant
            ),
            num_threads=self._config.runtime.num_threads,
            seed=self._config.runtime.seed,
        )

    # -- output ---------------------------------------------------------------------------------

    def _after_change(self) -> None:
        """Reports poses that became known."""
        self._version += 1
        self._poser.forget_points()
        if not self.is_initialized:
            return
        for frame_id in self._map.registered_ids:
            if frame_id not in self._reported:
                keyframe = self._map.keyframe(frame_id)
                pose = FramePose(
                    frame_id=frame_id,
                    index=keyframe.index,
                    captured_at_s=keyframe.captured_at_s,
                    cam_from_world=self._map.cam_from_world(frame_id),
                    is_keyframe=True,
                )
                self._reported.add(frame_id)
                self._report_pose(pose, received_at_s=keyframe.received_at_s)
        for tracked, pose in self._poser.pose_pending(self._map):
            self._report_pose(pose, received_at_s=tracked.received_at_s)

    def _report_pose(self, pose: FramePose, *, received_at_s: float) -> None:
        self._new_poses.append(pose)
        x, y, z = camera_center(pose.cam_from_world).tolist()
        self._emit(
            FramePosed(
                at_s=self._clock(),
                frame_id=pose.frame_id,
                captured_at_s=pose.captured_at_s,
                cam_center_in_world=(x, y, z),
                is_keyframe=pose.is_keyframe,
                latency_s=time.monotonic() - received_at_s,
            )
        )

    def view(self) -> MapView:
        """An immutable picture of the map."""
        ids = self._map.registered_ids
        cameras = [self._map.camera(self._map.keyframe(i).camera_key) for i in ids]
        cloud = self._map.point_cloud()
        edges = self._graph.edges()
        poses = [self._map.cam_from_world(i) for i in ids]
        return MapView(
            version=self._version,
            keyframe_ids=np.array(ids, np.int64),
            cam_from_world=np.array(poses).reshape(-1, 3, 4),
            focal_px=np.array([camera.mean_focal_length() for camera in cameras]),
            image_sizes=np.array([(c.width, c.height) for c in cameras], np.int64).reshape(-1, 2),
            points3D_in_world=cloud.points3D_in_world,
            colors=cloud.colors,
            chunk_ids=cloud.first_keyframe_ids,
            edges=np.array([(e.pair.first, e.pair.second) for e in edges], np.int64).reshape(-1, 2),
            edge_reasons=tuple(edge.reason for edge in edges),
        )

    def _emit_calibration(
        self, camera_key: str, camera: pycolmap.Camera, origin: CalibrationOrigin
    ) -> None:
        self._emit(
            CameraCalibrated(
                at_s=self._clock(),
                camera_key=camera_key,
                focal_px=camera.mean_focal_length(),
                how=origin.value,
            )
        )


def _align(sparse_map: SparseMap, *, to: SparseMap) -> None:
    """Moves a new map onto an old one by the centres of the keyframes both hold."""
    common = [i for i in sparse_map.registered_ids if to.is_registered(i)]
    if len(common) < _MIN_COMMON_FOR_ALIGNMENT:
        return
    to_from_map = pycolmap.estimate_sim3d(_centers(sparse_map, common), _centers(to, common))
    if to_from_map is not None:
        sparse_map.reconstruction.transform(to_from_map)


def _centers(sparse_map: SparseMap, frame_ids: Sequence[FrameId]) -> Float64Array:
    centers = [camera_center(sparse_map.cam_from_world(i)) for i in frame_ids]
    return np.array(centers).reshape(-1, 3)
