"""The facts that mapping tells: what happened to keyframes, pairs and the map, as events."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.events import (
    BundleAdjusted,
    FramePosed,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    LoopClosed,
    MapInitialized,
    MetricScaleEstimated,
    MisplacementFound,
    PairVerified,
    RegistrationFailed,
    Warned,
    WindowSolved,
)
from engine.geo.georeference import Georeference
from engine.geometry import camera_center, quat_xyzw_from_rotation
from engine.mapping.bundle_adjustment import GlobalMerge
from engine.mapping.metric_scale import MetricScale
from engine.mapping.misplacement import Misplacement
from engine.mapping.sparse_map import Registration, SparseMap
from engine.mapping.window_merging import WindowMerge
from engine.mapping.window_selection import SolvedWindow
from engine.ports import EventSink
from engine.types import FrameId, FramePose, ImagePair, Keyframe, VerifiedPair


class MappingFacts:
    """Puts facts into events.

    Args:
        emit: takes them.
        clock: seconds since the start of the run.
    """

    def __init__(self, *, emit: EventSink, clock: Callable[[], float]) -> None:
        self._emit = emit
        self._clock = clock

    def keyframe_added(self, keyframe: Keyframe) -> None:
        """A frame became a keyframe."""
        self._emit(
            KeyframeAdded(
                at_s=self._clock(),
                frame_id=keyframe.frame_id,
                camera_key=keyframe.camera_key,
                name=keyframe.name,
                captured_at_s=keyframe.captured_at_s,
                num_keypoints=len(keyframe.features),
            )
        )

    def pair_verified(self, verified: VerifiedPair) -> None:
        """A pair passed geometric verification."""
        self._emit(
            PairVerified(
                at_s=self._clock(),
                first=verified.pair.first,
                second=verified.pair.second,
                reason=verified.reason,
                num_matches=verified.num_matches,
                num_inliers=verified.num_inliers,
            )
        )

    def loop_closed(self, verified: VerifiedPair) -> None:
        """A pair joined parts of the scene graph that were far from each other."""
        self._emit(
            LoopClosed(
                at_s=self._clock(),
                first=verified.pair.first,
                second=verified.pair.second,
                num_inliers=verified.num_inliers,
            )
        )

    def map_initialized(self, pair: ImagePair, *, sparse_map: SparseMap, attempt: int) -> None:
        """A map started from a pair and is the map now."""
        self._emit(
            MapInitialized(
                at_s=self._clock(),
                first=pair.first,
                second=pair.second,
                num_points3D=sparse_map.num_points3D,
                attempt=attempt,
            )
        )

    def metric_scale_estimated(self, scale: MetricScale, *, is_applied: bool) -> None:
        """The length of the map's unit became known."""
        self._emit(
            MetricScaleEstimated(
                at_s=self._clock(),
                metres_per_map_unit=scale.metres_per_map_unit,
                num_depths=scale.num_depths,
                spread_ratio=scale.spread_ratio,
                is_applied=is_applied,
            )
        )

    def registered(
        self,
        frame_id: FrameId,
        registration: Registration,
        *,
        sparse_map: SparseMap,
        is_retry: bool,
        elapsed_s: float,
    ) -> None:
        """A keyframe got its place in the map."""
        self._emit(
            FrameRegistered(
                at_s=self._clock(),
                frame_id=frame_id,
                num_inliers=registration.num_inliers,
                num_correspondences=registration.num_correspondences,
                num_registered=sparse_map.num_registered,
                num_points3D=sparse_map.num_points3D,
                is_retry=is_retry,
                elapsed_s=elapsed_s,
            )
        )

    def registration_failed(self, frame_id: FrameId, registration: Registration) -> None:
        """A keyframe has no place in the map yet."""
        self._emit(
            RegistrationFailed(
                at_s=self._clock(),
                frame_id=frame_id,
                status=registration.status,
                num_inliers=registration.num_inliers,
                num_correspondences=registration.num_correspondences,
            )
        )

    def misplacement_found(self, misplacement: Misplacement) -> None:
        """Keyframes were taken out of the map."""
        self._emit(
            MisplacementFound(
                at_s=self._clock(),
                keyframe_ids=misplacement.keyframe_ids,
                evidence_first=misplacement.evidence.first,
                evidence_second=misplacement.evidence.second,
            )
        )

    def adjusted(self, merge: GlobalMerge, *, sparse_map: SparseMap) -> None:
        """The whole map was adjusted."""
        self._emit(
            BundleAdjusted(
                at_s=self._clock(),
                num_keyframes=merge.num_keyframes,
                num_points3D=sparse_map.num_points3D,
                reprojection_error_before_px=merge.error_before_px,
                reprojection_error_after_px=merge.error_after_px,
                keyframes_added_meanwhile=merge.keyframes_added_meanwhile,
                elapsed_s=merge.elapsed_s,
            )
        )

    def georeferenced(self, found: Georeference, *, rejected_ids: tuple[FrameId, ...]) -> None:
        """The map was laid onto GPS positions."""
        self._emit(
            Georeferenced(
                at_s=self._clock(),
                origin_latitude_deg=found.origin.latitude_deg,
                origin_longitude_deg=found.origin.longitude_deg,
                origin_altitude_m=found.origin.altitude_m,
                metres_per_map_unit=found.metres_per_map_unit,
                num_fixes=found.num_inliers,
                rmse_m=found.rmse_m,
                rejected_ids=rejected_ids,
            )
        )

    def warned(self, message: str) -> None:
        """Something is degraded; the run goes on."""
        self._emit(Warned(at_s=self._clock(), message=message))

    def window_solved(self, solved: SolvedWindow, merge: WindowMerge, *, elapsed_s: float) -> None:
        """A stretch of keyframes was solved as a whole."""
        self._emit(
            WindowSolved(
                at_s=self._clock(),
                purpose=solved.job.window.purpose,
                verdict=merge.verdict,
                reason=merge.reason,
                keyframe_ids=solved.job.window.frame_ids,
                num_registered=len(merge.registered),
                num_observations_before=merge.before.num_observations,
                num_observations_after=merge.after.num_observations,
                error_before_px=merge.before.mean_error_px,
                error_after_px=merge.after.mean_error_px,
                moved_map=merge.moved_map,
                elapsed_s=elapsed_s,
                cpu_s=solved.estimate.cpu_s,
            )
        )

    def posed(
        self, pose: FramePose, *, camera_key: str, received_at_s: float, is_first: bool = True
    ) -> None:
        """A frame has its first pose, or a keyframe has its place in the map."""
        x, y, z = camera_center(pose.cam_from_world).tolist()
        qx, qy, qz, qw = quat_xyzw_from_rotation(pose.cam_from_world[:, :3].T).tolist()
        self._emit(
            FramePosed(
                at_s=self._clock(),
                frame_id=pose.frame_id,
                camera_key=camera_key,
                captured_at_s=pose.captured_at_s,
                cam_center_in_world=(x, y, z),
                world_from_cam_quat_xyzw=(qx, qy, qz, qw),
                is_keyframe=pose.is_keyframe,
                is_first=is_first,
                latency_s=time.monotonic() - received_at_s,
            )
        )
