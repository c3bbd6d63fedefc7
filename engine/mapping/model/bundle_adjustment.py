"""Bundle adjustment: local around a keyframe, global on a copy beside the growing map.

Local adjustment holds the interpreter lock (COLMAP's adjuster does), so it is kept small. Global
adjustment runs on a private copy in another thread, without the lock; its result is merged back
under whatever the map gained meanwhile. Large maps are adjusted by a share of their points.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pycolmap

from engine.config import GlobalBundleAdjustmentConfig, LocalBundleAdjustmentConfig
from engine.cpu_time import Stage, charged_to
from engine.estimators.adjustment_options import adjust_in_slices, adjustment_options
from engine.events import BundleAdjusted
from engine.geometry import compose_poses, invert_pose, transform_points
from engine.mapping.model.adjustment_share import AdjustmentShare
from engine.mapping.model.calibration_control import (
    MIN_KEYFRAMES_FOR_DISTORTION,
    CalibrationControl,
)
from engine.mapping.model.local_reconstruction import LocalReconstruction
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId

_PRINCIPAL_POINT_ITERATIONS = 30
_LOCAL_FUNCTION_TOLERANCE = 1e-4
_GLOBAL_FUNCTION_TOLERANCE = 1e-5
_MIN_SHARED_POINTS = 10  # a neighbour sharing fewer would only add unknowns


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAdjustment:
    """What a local adjustment did."""

    keyframe_ids: tuple[FrameId, ...]
    num_changed: int  # observations completed, merged or filtered


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GlobalAdjustment:
    """A private copy of the map for global adjustment; one thread at a time may use it."""

    reconstruction: pycolmap.Reconstruction
    keyframe_ids: tuple[FrameId, ...]  # registered when the copy was made
    keypoints_xy: Mapping[FrameId, Float64Array]  # (N, 2) px, of these keyframes
    calibration: CalibrationControl  # of the copy
    error_before_px: float
    started_s: float  # monotonic
    share: AdjustmentShare | None = None  # None: the copy has all points

    def reduced(self) -> GlobalAdjustment:
        """With the share of its points alone that are adjusted, where it is large.

        The others are taken out of the copy; what was reduced before is returned as it is.
        """
        if self.share is not None or not AdjustmentShare.is_worthwhile(self.reconstruction):
            return self
        return replace(self, share=AdjustmentShare(self.reconstruction, self.keypoints_xy))

    def complete(self) -> None:
        """Has the points outside the share follow, once that is adjusted."""
        if self.share is not None:
            self.share.follow()


class GlobalAdjuster(Protocol):
    """Adjusts whole maps. Called from any one thread at a time; blocks for as long as it takes."""

    def __call__(
        self,
        reconstruction: pycolmap.Reconstruction,
        *,
        calibration: CalibrationControl,
        max_iterations: int,
        num_threads: int,
    ) -> None:
        """Adjusts a reconstruction in place; see `adjust_globally`."""
        ...


class GlobalAdjustmentSchedule:
    """Decides when the map has grown enough for another global adjustment."""

    def __init__(self, config: GlobalBundleAdjustmentConfig) -> None:
        self._config = config
        self._num_registered_at_last = 2

    def should(self, num_registered: int) -> bool:
        """Whether the map grew by the configured ratio since the last one."""
        return num_registered >= self._num_registered_at_last * self._config.growth_ratio

    def done(self, num_registered: int) -> None:
        """Takes this size as that of the latest one."""
        self._num_registered_at_last = max(2, num_registered)


@charged_to(Stage.LOCAL_ADJUSTMENT)
def adjust_locally(
    sparse_map: SparseMap,
    frame_id: FrameId,
    *,
    config: LocalBundleAdjustmentConfig,
) -> LocalAdjustment:
    """Refines a keyframe and its best covisible neighbours, then completes, merges and filters.

    Keyframes outside that see the same points stay fixed, and so do those two of the neighbours
    that share least. A map of local keyframes only is held by two of them.

    Args:
        sparse_map: the map; the calling thread owns it.
        frame_id: a registered keyframe.
        config: sizes.
    """
    local = _local_keyframes(sparse_map, frame_id, num=config.num_keyframes)
    num_changed = 0
    for _ in range(config.num_passes):
        _solve_locally(sparse_map, local, config=config)
        num_changed += sparse_map.complete_and_merge(frame_id)
        num_changed += sparse_map.filter_touched([frame_id])
    return LocalAdjustment(keyframe_ids=tuple(local), num_changed=num_changed)


def _local_keyframes(sparse_map: SparseMap, frame_id: FrameId, *, num: int) -> list[FrameId]:
    covisible = sparse_map.covisibility(frame_id)
    best = [other for other, shared in covisible.items() if shared >= _MIN_SHARED_POINTS]
    return [frame_id, *best[: num - 1]]


def _solve_locally(
    sparse_map: SparseMap,
    local: Sequence[FrameId],
    *,
    config: LocalBundleAdjustmentConfig,
) -> None:
    if sparse_map.num_registered <= len(local):
        _solve_small(sparse_map, local, config=config)
    elif LocalReconstruction.is_worthwhile(sparse_map, local):
        part = LocalReconstruction(sparse_map, local)
        _solve_within(
            part.reconstruction,
            local,
            points=part.points,
            options=_local_options(sparse_map, config),
        )
        part.write_back()
    else:
        _solve_within(
            sparse_map.reconstruction,
            local,
            points=_points_of(sparse_map, local),
            options=_local_options(sparse_map, config),
        )


def _solve_within(
    reconstruction: pycolmap.Reconstruction,
    local: Sequence[FrameId],
    *,
    points: Sequence[int],
    options: pycolmap.BundleAdjustmentOptions,
) -> None:
    """Adjusts keyframes of a larger map, or of the part of it around them.

    A calibration shared with keyframes outside is not for a few of them to decide.
    """
    problem = _local_problem(local, points)
    # The newest keyframe is never held: what it is seen with holds it.
    for frame_id in local[1:][-2:]:
        problem.set_constant_rig_from_world_pose(reconstruction.image(frame_id).frame_id)
    for camera_id in sorted({int(reconstruction.image(i).camera_id) for i in local}):
        problem.set_constant_cam_intrinsics(camera_id)
    options.refine_focal_length = False
    pycolmap.create_default_bundle_adjuster(options, problem, reconstruction).solve()


def _solve_small(
    sparse_map: SparseMap,
    local: Sequence[FrameId],
    *,
    config: LocalBundleAdjustmentConfig,
) -> None:
    """Adjusts a map of local keyframes only, with its calibrations."""
    reconstruction = sparse_map.reconstruction
    problem = _local_problem(local, _points_of(sparse_map, local))
    problem.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    options = _local_options(sparse_map, config)
    camera_ids = {int(reconstruction.image(i).camera_id) for i in local}

    def solve(constant_camera_ids: Collection[int], *, refine_focal_length: bool) -> None:
        for camera_id in sorted(camera_ids):
            if camera_id in constant_camera_ids:
                problem.set_constant_cam_intrinsics(camera_id)
            else:
                problem.set_variable_cam_intrinsics(camera_id)
        options.refine_focal_length = refine_focal_length
        pycolmap.create_default_bundle_adjuster(options, problem, reconstruction).solve()

    sparse_map.calibration.adjust(reconstruction, solve)


def _local_problem(
    local: Sequence[FrameId], points: Sequence[int]
) -> pycolmap.BundleAdjustmentConfig:
    problem = pycolmap.BundleAdjustmentConfig()
    for frame_id in local:
        problem.add_image(frame_id)
    for point3D_id in points:
        problem.add_variable_point(point3D_id)
    return problem


def _local_options(
    sparse_map: SparseMap, config: LocalBundleAdjustmentConfig
) -> pycolmap.BundleAdjustmentOptions:
    options = adjustment_options(
        max_iterations=config.max_iterations, function_tolerance=_LOCAL_FUNCTION_TOLERANCE
    )
    options.refine_extra_params = sparse_map.num_registered >= MIN_KEYFRAMES_FOR_DISTORTION
    return options


def _points_of(sparse_map: SparseMap, local: Sequence[FrameId]) -> list[int]:
    """The points the newest keyframe observes: those its pose depends on."""
    ids = sparse_map.point3D_ids(local[0])
    return sorted(int(i) for i in np.unique(ids[ids >= 0]))


@charged_to(Stage.GLOBAL_ADJUSTMENT)
def start_global_adjustment(sparse_map: SparseMap) -> GlobalAdjustment:
    """Copies the map for a global adjustment on another thread."""
    frame_ids = tuple(sparse_map.registered_ids)
    return GlobalAdjustment(
        reconstruction=sparse_map.copy_reconstruction(),
        keyframe_ids=frame_ids,
        keypoints_xy={i: sparse_map.keyframe(i).features.keypoints_xy for i in frame_ids},
        calibration=sparse_map.calibration.copy(),
        error_before_px=sparse_map.mean_reprojection_error_px(),
        started_s=time.monotonic(),
    )


@charged_to(Stage.GLOBAL_ADJUSTMENT)
def adjust_copy(
    adjustment: GlobalAdjustment,
    *,
    max_iterations: int,
    num_threads: int,
    adjust: GlobalAdjuster | None = None,
) -> GlobalAdjustment:
    """Adjusts a private copy of a map; returns what is to be merged.

    Args:
        adjustment: the copy; if it is large, points are taken out of it.
        max_iterations: of the solver.
        num_threads: of the solver.
        adjust: does it; None: `adjust_globally`.
    """
    reduced = adjustment.reduced()
    (adjust or adjust_globally)(
        reduced.reconstruction,
        calibration=reduced.calibration,
        max_iterations=max_iterations,
        num_threads=num_threads,
    )
    reduced.complete()
    return reduced


@charged_to(Stage.GLOBAL_ADJUSTMENT)
def adjust_globally(
    reconstruction: pycolmap.Reconstruction,
    *,
    calibration: CalibrationControl,
    max_iterations: int,
    num_threads: int,
) -> None:
    """Adjusts a reconstruction in place, calibrations within what priors and lenses allow.

    Args:
        reconstruction: the map or a copy; the calling thread owns it.
        calibration: the priors of its cameras; takes what is found out about them.
        max_iterations: of the solver.
        num_threads: of the solver.
    """

    def solve(constant_camera_ids: Collection[int], *, refine_focal_length: bool) -> None:
        solve_globally(
            reconstruction,
            constant_camera_ids=constant_camera_ids,
            max_iterations=max_iterations,
            num_threads=num_threads,
            refine_focal_length=refine_focal_length,
        )

    calibration.adjust(reconstruction, solve)


def solve_globally(
    reconstruction: pycolmap.Reconstruction,
    *,
    constant_camera_ids: Collection[int],
    max_iterations: int,
    num_threads: int,
    refine_focal_length: bool = True,
) -> None:
    """Adjusts every pose, point and calibration of a reconstruction in place.

    The gauge is held by two cameras, so position, orientation and scale stay comparable with the
    map a copy was taken from. The interpreter lock is released; where some calibrations are
    constant and others are not, between slices only: just COLMAP's configurable adjuster does that.
    """
    options = adjustment_options(
        max_iterations=max_iterations,
        function_tolerance=_GLOBAL_FUNCTION_TOLERANCE,
        num_threads=num_threads,
    )
    used = {int(reconstruction.image(i).camera_id) for i in reconstruction.reg_image_ids()}
    constant = used.intersection(constant_camera_ids)
    refined = used - constant
    options.refine_focal_length = bool(refined) and refine_focal_length
    options.refine_extra_params = (
        bool(refined) and reconstruction.num_reg_frames() >= MIN_KEYFRAMES_FOR_DISTORTION
    )
    if not refined or not constant:
        pycolmap.bundle_adjustment(reconstruction, options)
        return
    problem = pycolmap.BundleAdjustmentConfig()
    for image_id in reconstruction.reg_image_ids():
        problem.add_image(image_id)
    for camera_id in sorted(constant):
        problem.set_constant_cam_intrinsics(camera_id)
    problem.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    adjust_in_slices(options, problem, reconstruction)


@charged_to(Stage.GLOBAL_ADJUSTMENT)
def refine_principal_point(sparse_map: SparseMap, calibration_key: str) -> None:
    """Adjusts a map with the principal point of one camera free, all else of calibrations held."""
    reconstruction = sparse_map.reconstruction
    camera_id = sparse_map.camera(calibration_key).camera_id
    problem = pycolmap.BundleAdjustmentConfig()
    for image_id in reconstruction.reg_image_ids():
        problem.add_image(image_id)
    for other_id in sorted(reconstruction.cameras):
        if other_id != camera_id:
            problem.set_constant_cam_intrinsics(other_id)
    problem.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    options = adjustment_options(
        max_iterations=_PRINCIPAL_POINT_ITERATIONS, function_tolerance=_GLOBAL_FUNCTION_TOLERANCE
    )
    options.refine_focal_length = False
    options.refine_extra_params = False
    options.refine_principal_point = True
    adjust_in_slices(options, problem, reconstruction)
    sparse_map.filter_all()


@charged_to(Stage.GLOBAL_ADJUSTMENT)
def merge_global_adjustment(sparse_map: SparseMap, adjusted: GlobalAdjustment) -> BundleAdjusted:
    """Brings an adjusted copy back under the map as it is now.

    Keyframes and points of the copy take the adjusted values. What was added meanwhile moves
    rigidly, and with the local change of scale, with the keyframe it hangs on: the newest one of
    the copy for keyframes, the first one of its track for points. A map that holds no keyframe of
    the copy any more stays as it is.

    Returns:
        The event to emit.
    """
    adjusted_ids = set(adjusted.keyframe_ids)
    kept = [i for i in adjusted.keyframe_ids if sparse_map.is_registered(i)]
    added = [i for i in sparse_map.registered_ids if i not in adjusted_ids]
    if kept:
        _bring_back(sparse_map, adjusted, kept=kept, added=added)
        sparse_map.calibration.take_states(adjusted.calibration)
    return BundleAdjusted(
        num_keyframes=len(kept),
        num_points3D=sparse_map.num_points3D,
        reprojection_error_before_px=adjusted.error_before_px,
        reprojection_error_after_px=sparse_map.mean_reprojection_error_px(),
        keyframes_added_meanwhile=len(added),
        elapsed_s=time.monotonic() - adjusted.started_s,
    )


def _bring_back(
    sparse_map: SparseMap,
    adjusted: GlobalAdjustment,
    *,
    kept: Sequence[FrameId],
    added: Sequence[FrameId],
) -> None:
    copy = adjusted.reconstruction
    others = {} if adjusted.share is None else adjusted.share.others
    moves = _Moves(sparse_map, copy, kept)
    for point3D_id, point in sparse_map.reconstruction.points3D.items():
        if copy.exists_point3D(point3D_id):
            point.xyz = copy.point3D(point3D_id).xyz
        elif point3D_id in others:
            point.xyz = others[point3D_id]
        else:
            anchor = FrameId(int(point.track.element(0).image_id))
            point.xyz = moves.point(point.xyz, anchor=anchor)
    for frame_id in added:
        sparse_map.set_pose(frame_id, moves.pose(sparse_map.cam_from_world(frame_id)))
    for frame_id in kept:
        sparse_map.set_pose(frame_id, moves.pose_after(frame_id))
    # Cameras without a keyframe in the copy may have been calibrated meanwhile.
    for camera_id in sorted({int(copy.image(i).camera_id) for i in kept}):
        sparse_map.reconstruction.camera(camera_id).params = copy.camera(camera_id).params.tolist()
    sparse_map.filter_all()


class _Moves:
    """How the surroundings of each adjusted keyframe moved.

    The motion is each keyframe's own; the change of scale is that around the newest of them, where
    what was added meanwhile lies.
    """

    def __init__(
        self, sparse_map: SparseMap, copy: pycolmap.Reconstruction, kept: Sequence[FrameId]
    ) -> None:
        self._before = {i: sparse_map.cam_from_world(i) for i in kept}
        self._after = {i: np.asarray(copy.image(i).cam_from_world().matrix()) for i in kept}
        self._newest = kept[-1]
        self._scale = _scale_change(sparse_map, copy, self._newest)

    def pose_after(self, frame_id: FrameId) -> Float64Array:
        """The adjusted pose of a keyframe of the copy."""
        return self._after[frame_id]

    def pose(self, cam_from_world: Float64Array) -> Float64Array:
        """A pose given before the adjustment, moved with the newest keyframe of the copy."""
        relative = compose_poses(cam_from_world, invert_pose(self._before[self._newest]))
        relative[:, 3] *= self._scale
        return compose_poses(relative, self._after[self._newest])

    def point(self, xyz: Float64Array, *, anchor: FrameId) -> Float64Array:
        """A point given before the adjustment, moved with a keyframe that observes it."""
        known = anchor if anchor in self._before else self._newest
        in_cam = transform_points(self._before[known], xyz[None]) * self._scale
        return np.asarray(transform_points(invert_pose(self._after[known]), in_cam)[0])


def _scale_change(sparse_map: SparseMap, copy: pycolmap.Reconstruction, frame_id: FrameId) -> float:
    """How depths in front of a keyframe changed: median of after / before over shared points."""
    ids = sparse_map.point3D_ids(frame_id)
    shared = [int(i) for i in ids[ids >= 0] if copy.exists_point3D(int(i))]
    if not shared:
        return 1.0
    before = transform_points(
        sparse_map.cam_from_world(frame_id), sparse_map.points3D_in_world(shared)
    )
    after = transform_points(
        np.asarray(copy.image(frame_id).cam_from_world().matrix()),
        np.array([copy.point3D(i).xyz for i in shared]),
    )
    usable = (before[:, 2] > 0) & (after[:, 2] > 0)
    if not usable.any():
        return 1.0
    change = float(np.median(after[usable, 2] / before[usable, 2]))
    return change if 0.0 < change < np.inf else 1.0
