"""Intrinsics evidence: what the observations of a reconstruction say about a camera's calibration.

The information is that of bundle adjustment about the focal length and the distortion with poses
and points free, by Schur's complement (Triggs et al., Bundle Adjustment - A Modern Synthesis,
1999), on a few clusters of keyframes around a camera. It is next to nothing where the geometry says
nothing: planes seen head-on, small turns, hardly any parallax.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.camera_models import LensKind
from engine.estimators.lenses import lens_kind
from engine.geometry import image_scale
from engine.types import Float64Array, Int64Array

_NUM_CLUSTERS = 3
_CLUSTER_SIZE = 8  # keyframes
_POINTS_PER_CLUSTER = 150
_MIN_SHARED = 12  # points that a keyframe of a cluster sees of those of its first one
_MIN_FRAMES = 2
_LEAST_SCALE_PX = 1.0  # errors beyond it, or beyond the median error, count linearly
_MAX_ERROR_SCALES = 6.0  # farther observations are left out

# Errors of real images do not average out as formal covariances have it: they are alike for
# neighbouring points and frames. Standard deviations are as much larger.
_NOISE_FLOOR_PX = 0.3  # at an edge of 1000 px
_INFLATION = 5.0

_RELATIVE_STEP = 1e-6  # of numeric derivatives
_WIDE_CORNER_RAD = 1.2  # from the axis, at most, where the distortion of wide lenses is looked at
_DAMPING = 1e-9  # of normalised information: what is less is the gauge


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntrinsicsEvidence:
    """Information about the refined parameters of one camera, and the step it asks for.

    The parameters: the logarithm of the focal length; where a model has two, the logarithm of their
    ratio; then the distortion in COLMAP's order.
    """

    information: Float64Array  # (P, P) inverse covariance
    step: Float64Array  # (P,) from the present calibration to the one that fits best
    num_observations: int

    @property
    def focal_sigma_ratio(self) -> float:
        """One standard deviation of the focal length with the distortion free; inf: unknown."""
        return sigma_of(self.information, 0)


def sigma_of(information: Float64Array, idx: int) -> float:
    """One standard deviation of a parameter with the others free; inf where nothing is known."""
    others = np.delete(np.arange(len(information)), idx)
    own = float(information[idx, idx])
    if len(others):
        coupling = information[idx, others]
        rest = information[np.ix_(others, others)]
        own -= float(coupling @ np.linalg.pinv(rest, hermitian=True) @ coupling)
    return float("inf") if own <= 0.0 else own**-0.5


def refined_params(camera: pycolmap.Camera) -> Float64Array:
    """The parameters (P,) of `IntrinsicsEvidence` as a camera has them."""
    focal_px = np.array([camera.params[idx] for idx in camera.focal_length_idxs()])
    ratios = [np.log(focal_px[0] / focal_px[1])] if len(focal_px) == 2 else []
    extra = [camera.params[idx] for idx in camera.extra_params_idxs()]
    return np.array([np.log(focal_px).mean(), *ratios, *extra], np.float64)


def params_of(camera: pycolmap.Camera, refined: Float64Array) -> list[float]:
    """COLMAP's parameters of a camera with other refined ones."""
    params = [float(value) for value in camera.params]
    focal_idxs = list(camera.focal_length_idxs())
    num_focal = len(focal_idxs)
    halves = (0.5, -0.5) if num_focal == 2 else (0.0,)
    ratio = float(refined[1]) if num_focal == 2 else 0.0
    for idx, half in zip(focal_idxs, halves, strict=True):
        params[idx] = float(np.exp(refined[0] + half * ratio))
    for idx, value in zip(camera.extra_params_idxs(), refined[num_focal:].tolist(), strict=True):
        params[idx] = value
    return params


def distortion_sigmas(camera: pycolmap.Camera, displacement: float) -> Float64Array:
    """For each distortion parameter the change that moves the corner by a share of its distance."""
    corner_px = np.array([camera.width, camera.height]) / 2.0
    tangent = corner_px / float(camera.mean_focal_length())
    farthest = float(np.linalg.norm(tangent))
    is_perspective = lens_kind(camera) is LensKind.PERSPECTIVE
    angle = math.atan(farthest) if is_perspective else min(farthest, _WIDE_CORNER_RAD)
    direction = tangent / np.linalg.norm(tangent)
    ray = np.array([[*(np.sin(angle) * direction), np.cos(angle)]])
    derivatives = np.nan_to_num(np.linalg.norm(_intrinsics_jacobian(camera, ray), axis=1)[0])
    num_focal = len(camera.focal_length_idxs())
    moved_px = displacement * float(np.linalg.norm(corner_px))
    return np.asarray(moved_px / np.maximum(derivatives[num_focal:], 1e-12))


def measure_evidence(
    reconstruction: pycolmap.Reconstruction, camera_id: int
) -> IntrinsicsEvidence | None:
    """What the observations say about one camera's calibration; None without any that do.

    Observations so bad that nothing can be computed from them say nothing.

    Args:
        reconstruction: registered keyframes and points; only read.
        camera_id: a camera with a focal length.
    """
    camera = reconstruction.camera(camera_id)
    num_params = len(camera.focal_length_idxs()) + len(camera.extra_params_idxs())
    information, gradient = np.zeros((num_params, num_params)), np.zeros(num_params)
    squares, num_observations, freedom = 0.0, 0, 0
    for cluster in _clusters(reconstruction, camera_id):
        try:
            reduced = cluster.reduced(camera_id)
        except np.linalg.LinAlgError:
            continue
        information += reduced.information
        gradient += reduced.gradient
        squares += reduced.squares
        num_observations += len(cluster.points_xy)
        freedom += cluster.freedom
    if freedom <= num_params or not (np.isfinite(information).all() and math.isfinite(squares)):
        return None
    step = np.linalg.pinv(information, hermitian=True) @ gradient
    scale = image_scale(camera.width, camera.height)
    variance = max(0.0, squares - float(gradient @ step)) / freedom
    variance = _INFLATION**2 * max(variance, (_NOISE_FLOOR_PX * scale) ** 2)
    return IntrinsicsEvidence(
        information=information / variance, step=step, num_observations=num_observations
    )


# -- clusters -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reduced:
    """Normal equations of the calibration with poses and points eliminated, in px."""

    information: Float64Array  # (P, P)
    gradient: Float64Array  # (P,)
    squares: float  # sum of squared residuals that poses and points leave


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cluster:
    """Observations of some points by a few keyframes, most of them of one camera."""

    cameras: tuple[pycolmap.Camera, ...]  # (S,) of the keyframes
    cam_from_world: Float64Array  # (S, 3, 4)
    points3D_in_world: Float64Array  # (N, 3)
    frame_idx: Int64Array  # (M,)
    point_idx: Int64Array  # (M,) ascending
    points_xy: Float64Array  # (M, 2)

    @property
    def freedom(self) -> int:
        """Measurements beyond what poses and points take."""
        taken = 6 * len(self.cam_from_world) + 3 * len(self.points3D_in_world) - 7
        return 2 * len(self.points_xy) - taken

    def reduced(self, camera_id: int) -> _Reduced:
        """Normal equations of one camera's calibration, points and then poses eliminated."""
        pose = self.cam_from_world[self.frame_idx]
        in_cam = np.einsum("mij,mj->mi", pose[:, :, :3], self.points3D_in_world[self.point_idx])
        in_cam += pose[:, :, 3]
        residuals, by_cam, by_params = self._linearised(in_cam, camera_id)
        by_pose = np.concatenate([np.cross(in_cam[:, None, :], by_cam), by_cam], axis=2)
        by_point = by_cam @ pose[:, :, :3]
        errors = np.nan_to_num(np.linalg.norm(residuals, axis=1), nan=np.inf)
        scale_px = max(_LEAST_SCALE_PX, float(np.median(errors)))
        is_good = (errors < _MAX_ERROR_SCALES * scale_px) & np.isfinite(by_cam).all(axis=(1, 2))
        is_good &= np.isfinite(by_params).all(axis=(1, 2))
        weights = np.zeros(len(errors))
        weights[is_good] = (1.0 + (errors[is_good] / scale_px) ** 2) ** -0.25
        scaled = [
            np.nan_to_num(block) * weights[:, None, None]
            for block in (by_pose, by_point, by_params)
        ]
        return self._eliminate(*scaled, residuals=np.nan_to_num(residuals) * weights[:, None])

    def _linearised(
        self, in_cam: Float64Array, camera_id: int
    ) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Residuals (M, 2), and derivatives by the points and by one camera's calibration."""
        num_params = max(
            len(refined_params(one)) for one in self.cameras if one.camera_id == camera_id
        )
        residuals, by_cam = np.empty((len(in_cam), 2)), np.empty((len(in_cam), 2, 3))
        by_params = np.zeros((len(in_cam), 2, num_params))
        ids = np.array([one.camera_id for one in self.cameras])[self.frame_idx]
        for camera in {one.camera_id: one for one in self.cameras}.values():
            own = np.flatnonzero(ids == camera.camera_id)
            residuals[own] = self.points_xy[own] - _project(camera, in_cam[own])
            by_cam[own] = _point_jacobian(camera, in_cam[own])
            if camera.camera_id == camera_id:
                by_params[own] = _intrinsics_jacobian(camera, in_cam[own])
        return residuals, by_cam, by_params

    def _eliminate(
        self,
        by_pose: Float64Array,
        by_point: Float64Array,
        by_params: Float64Array,
        *,
        residuals: Float64Array,
    ) -> _Reduced:
        num_frames, num_points = len(self.cam_from_world), len(self.points3D_in_world)
        num_poses = 6 * num_frames
        width = num_poses + by_params.shape[2]
        rows = np.zeros((len(residuals), 2, width + 1))  # poses, calibration, residuals
        columns = 6 * self.frame_idx[:, None] + np.arange(6)
        rows[np.arange(len(rows))[:, None, None], np.arange(2)[None, :, None], columns[:, None]] = (
            by_pose
        )
        rows[:, :, num_poses:width] = by_params
        rows[:, :, width] = residuals
        starts = np.searchsorted(self.point_idx, np.arange(num_points))
        to_points = np.swapaxes(by_point, 1, 2)
        of_points = np.add.reduceat(to_points @ by_point, starts)
        coupling = np.add.reduceat(to_points @ rows, starts)
        traces = np.trace(of_points, axis1=1, axis2=2)
        of_points += (_DAMPING * traces + 1e-300)[:, None, None] * np.eye(3)
        flat = rows.reshape(-1, width + 1)
        normal = flat.T @ flat
        solved = np.linalg.solve(of_points, coupling)
        normal -= coupling.reshape(-1, width + 1).T @ solved.reshape(-1, width + 1)
        return _without_poses(normal, num_poses)


def _without_poses(normal: Float64Array, num_poses: int) -> _Reduced:
    """Eliminates poses from normal equations whose last row and column are the residuals'."""
    poses, rest = slice(0, num_poses), slice(num_poses, None)
    scale = 1.0 / np.sqrt(np.maximum(np.diag(normal)[poses], 1e-12))
    of_poses = normal[poses, poses] * scale[:, None] * scale
    coupling = normal[poses, rest] * scale[:, None]
    inverse = np.linalg.pinv(of_poses, rcond=_DAMPING, hermitian=True)
    reduced = normal[rest, rest] - coupling.T @ inverse @ coupling
    return _Reduced(
        information=reduced[:-1, :-1], gradient=reduced[:-1, -1], squares=float(reduced[-1, -1])
    )


def _clusters(reconstruction: pycolmap.Reconstruction, camera_id: int) -> list[_Cluster]:
    """Clusters around keyframes of a camera that are spread over the run."""
    frames = sorted(
        int(i)
        for i in reconstruction.reg_image_ids()
        if reconstruction.image(i).camera_id == camera_id
    )
    if not frames:
        return []
    num = 1 if len(frames) <= _CLUSTER_SIZE else _NUM_CLUSTERS
    places = np.linspace(0, len(frames) - 1, 2 * num + 1)[1::2].round().astype(int)
    found = [_cluster_around(reconstruction, frames[place], camera_id) for place in places]
    return [cluster for cluster in found if cluster is not None]


def _cluster_around(
    reconstruction: pycolmap.Reconstruction, seed_id: int, camera_id: int
) -> _Cluster | None:
    """Points of a keyframe, and keyframes that see many of them, of its camera where it can be."""
    seed = reconstruction.image(seed_id)
    seen = seed.get_observation_point2D_idxs()
    stride = max(1, len(seen) // _POINTS_PER_CLUSTER)
    points2D = seed.points2D
    points = [reconstruction.point3D(points2D[k].point3D_id) for k in seen[::stride]]
    tracks = [
        [(element.image_id, element.point2D_idx) for element in point.track.elements]
        for point in points
    ]
    shared = Counter(image_id for track in tracks for image_id, _ in track)
    images = _spread(shared, reconstruction, camera_id)
    if len(images) < _MIN_FRAMES:
        return None
    place = {image_id: idx for idx, image_id in enumerate(images)}
    observed = {image_id: reconstruction.image(image_id).points2D for image_id in images}
    rows: list[tuple[int, int]] = []
    points_xy: list[Float64Array] = []
    kept: list[Float64Array] = []
    for point, track in zip(points, tracks, strict=True):
        inside = [(image_id, k) for image_id, k in track if image_id in place]
        if len(inside) < _MIN_FRAMES:
            continue
        rows += [(place[image_id], len(kept)) for image_id, _ in inside]
        points_xy += [observed[image_id][k].xy for image_id, k in inside]
        kept.append(point.xyz)
    if len(kept) < _MIN_SHARED:
        return None
    frame_idx, point_idx = np.array(rows).T
    poses = [reconstruction.image(image_id).cam_from_world().matrix() for image_id in images]
    return _Cluster(
        cameras=tuple(
            reconstruction.camera(reconstruction.image(image_id).camera_id) for image_id in images
        ),
        cam_from_world=np.array(poses),
        points3D_in_world=np.array(kept),
        frame_idx=frame_idx,
        point_idx=point_idx,
        points_xy=np.array(points_xy),
    )


def _spread(
    shared: Counter[int], reconstruction: pycolmap.Reconstruction, camera_id: int
) -> list[int]:
    """Keyframes of a camera, from those that share all points to those that share just enough.

    Others stand in where it has too few.
    """
    enough = [image_id for image_id, num in shared.most_common() if num >= _MIN_SHARED]
    own = [i for i in enough if reconstruction.image(i).camera_id == camera_id]
    others = [i for i in enough if reconstruction.image(i).camera_id != camera_id]
    places = np.linspace(0, len(own) - 1, min(len(own), _CLUSTER_SIZE)).round().astype(int)
    return [own[place] for place in places] + others[: _CLUSTER_SIZE - len(places)]


# -- derivatives ----------------------------------------------------------------------------------


def _project(camera: pycolmap.Camera, in_cam: Float64Array) -> Float64Array:
    return np.asarray(camera.img_from_cam(in_cam), np.float64).reshape(-1, 2)


def _point_jacobian(camera: pycolmap.Camera, in_cam: Float64Array) -> Float64Array:
    """(M, 2, 3) derivatives of the projections by the points in the camera's frame."""
    steps = _RELATIVE_STEP * np.linalg.norm(in_cam, axis=1)
    columns = []
    for axis in np.eye(3):
        moved = steps[:, None] * axis
        difference = _project(camera, in_cam + moved) - _project(camera, in_cam - moved)
        columns.append(difference / (2.0 * steps[:, None]))
    return np.stack(columns, axis=2)


def _intrinsics_jacobian(camera: pycolmap.Camera, in_cam: Float64Array) -> Float64Array:
    """(M, 2, P) derivatives of the projections by the refined parameters."""
    present = refined_params(camera)
    columns = []
    for idx in range(len(present)):
        step = np.zeros(len(present))
        step[idx] = _RELATIVE_STEP
        ahead, behind = (_moved(camera, present + sign * step) for sign in (1.0, -1.0))
        difference = _project(ahead, in_cam) - _project(behind, in_cam)
        columns.append(difference / (2.0 * _RELATIVE_STEP))
    return np.stack(columns, axis=2)


def _moved(camera: pycolmap.Camera, refined: Float64Array) -> pycolmap.Camera:
    return pycolmap.Camera(
        model=camera.model_name,
        width=camera.width,
        height=camera.height,
        params=params_of(camera, refined),
    )
