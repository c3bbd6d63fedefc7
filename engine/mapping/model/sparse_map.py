"""The growing sparse map: the only owner of the COLMAP reconstruction.

The map grows COLMAP's own structures in place: a correspondence graph that is never finalised, an
``ObservationManager`` and an ``IncrementalTriangulator``. One thread owns a map; copies go to other
threads. COLMAP's "frame" (a posed rig) stays inside: each keyframe is the only image of its rig.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pycolmap

from engine.config import RegistrationConfig, TriangulationConfig
from engine.cpu_time import Stage, charged_to
from engine.errors import MapError
from engine.estimators.absolute_pose import (
    AbsolutePose,
    estimate_absolute_pose,
    reprojection_errors_px,
)
from engine.estimators.lenses import has_small_parameters
from engine.estimators.similarity import FAR
from engine.geometry import image_scale, pose_in_other_world, transform_points
from engine.mapping.model.calibration_control import CalibrationControl, CalibrationState
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.match_graph import MatchGraph
from engine.mapping.model.point_attributes import PointAttributes, PointCloud
from engine.matching.pair_strength import (
    PairStrength,
    PlaceSupport,
    cells_of,
    is_open,
    pair_strength,
    place_support,
)
from engine.types import (
    Features,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    RegistrationStatus,
    VerifiedPair,
)

_NO_POINT = -1
_ASKED_RATIO = 0.25  # of what agrees with a pose, that agrees with another one: it is asked
_NEAR_IN_TIME = 8  # keyframes of one camera: pairs with others may close a loop
_MAX_EXTRA_PARAM = 1.0  # COLMAP's default
_POINTS_AT_ONCE = 20_000  # in a call that holds the interpreter lock, for about 70 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What became of posing one keyframe."""

    status: RegistrationStatus
    num_inliers: int = 0
    num_correspondences: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well the keypoints of some keyframes agree with the map."""

    num_observations: int
    mean_error_px: float  # 0 without any
    gain: float  # sum of 1 - (error / bound)^2 over the observations below the bound


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Residuals:
    """The reprojection errors of a keyframe's observations, as offsets."""

    keypoints_xy: Float64Array  # (M, 2) px
    offsets_xy: Float64Array  # (M, 2) px, from the keypoints to their points; inf: none projects

    @property
    def errors_px(self) -> Float64Array:
        """The reprojection errors (M,)."""
        return np.asarray(np.linalg.norm(self.offsets_xy, axis=1))


class SparseMap:
    """Keyframes, their verified matches, and what has been reconstructed of them so far.

    Args:
        triangulation: thresholds of points.
        registration: thresholds of poses.
        seed: of everything random.
        has_bounds: whether what is known of cameras beforehand holds their calibration.
    """

    def __init__(
        self,
        *,
        triangulation: TriangulationConfig,
        registration: RegistrationConfig,
        seed: int,
        has_bounds: bool = True,
    ) -> None:
        self._triangulation = triangulation
        self._registration = registration
        self._seed = seed
        self._reconstruction = pycolmap.Reconstruction()
        self._matches = MatchGraph()
        self._keyframes: dict[FrameId, Keyframe] = {}
        self._registered: list[FrameId] = []  # sorted
        self._num_registered_of: Counter[str] = Counter()  # by calibration key
        self._camera_ids: dict[str, int] = {}
        self._calibration = CalibrationControl(is_bounded=has_bounds)
        self._point_attributes = PointAttributes(self._reconstruction, self._keyframes)
        self._point3D_ids: dict[FrameId, Int64Array] = {}  # until observations change
        self._covisibility: dict[FrameId, dict[FrameId, int]] = {}  # likewise
        self._strengths: dict[ImagePair, tuple[VerifiedPair, PairStrength]] = {}
        # Keyframes that two places were open for, and what was registered around them then.
        self._ambiguous: dict[FrameId, frozenset[FrameId]] = {}
        self._rebuild_managers()

    # -- what is in the map ---------------------------------------------------------------------

    @property
    def reconstruction(self) -> pycolmap.Reconstruction:
        """The live reconstruction, for bundle adjustment on the owner's thread only."""
        return self._reconstruction

    @property
    def num_points3D(self) -> int:
        """Number of points."""
        return int(self._reconstruction.num_points3D())

    @property
    def num_registered(self) -> int:
        """Number of registered keyframes."""
        return len(self._registered)

    def num_registered_of(self, camera_key: str) -> int:
        """Number of registered keyframes of a camera."""
        return self._num_registered_of[camera_key]

    @property
    def keyframe_ids(self) -> list[FrameId]:
        """All keyframes, registered or not, in order of arrival."""
        return list(self._keyframes)

    @property
    def registered_ids(self) -> list[FrameId]:
        """Registered keyframes in order of arrival."""
        return list(self._registered)

    def is_registered(self, frame_id: FrameId) -> bool:
        """Whether the keyframe has its place in the map."""
        place = bisect.bisect_left(self._registered, frame_id)
        return place < len(self._registered) and self._registered[place] == frame_id

    def keyframe(self, frame_id: FrameId) -> Keyframe:
        """The keyframe as it was added."""
        return self._keyframes[frame_id]

    def neighbors(self, frame_id: FrameId) -> Mapping[FrameId, VerifiedPair]:
        """Keyframes with a verified pair to this one."""
        return self._matches.neighbors(frame_id)

    @property
    def undecided_ids(self) -> set[FrameId]:
        """Keyframes that had two places when they were tried, and have no new neighbour since."""
        return {
            frame_id
            for frame_id, neighbor_ids in self._ambiguous.items()
            if self._registered_neighbors(frame_id) == neighbor_ids
        }

    def pair_strength(self, verified: VerifiedPair) -> float:
        """How much evidence a pair of the map is: its independent inliers (see `PairStrength`)."""
        return self._strength(verified).score

    def num_independent_inliers(self, verified: VerifiedPair) -> int:
        """Inliers of a pair, at most a few of each cell of the images."""
        return self._strength(verified).num_independent

    def cam_from_world(self, frame_id: FrameId) -> Float64Array:
        """The pose (3, 4) of a registered keyframe."""
        return np.asarray(self._reconstruction.image(frame_id).cam_from_world().matrix())

    def camera(self, camera_key: str) -> pycolmap.Camera:
        """The camera as calibrated now; change it only through ``set_camera_params``."""
        return self._reconstruction.camera(self._camera_ids[camera_key])

    def holds(self, frame_id: FrameId) -> bool:
        """Whether the keyframe was added, registered or not."""
        return frame_id in self._keyframes

    @property
    def camera_keys(self) -> list[str]:
        """The keys of all cameras, in order of adding."""
        return list(self._camera_ids)

    @property
    def constant_camera_ids(self) -> frozenset[int]:
        """COLMAP's ids of the cameras whose calibration bundle adjustment must not change."""
        return self._calibration.constant_camera_ids

    @property
    def calibration(self) -> CalibrationControl:
        """What is known of the cameras beforehand, and what adjustments found out about them."""
        return self._calibration

    def camera_prior(self, camera_key: str) -> CameraPrior:
        """What is known of a camera beforehand."""
        return self._calibration.priors[self._camera_ids[camera_key]]

    def camera_state(self, camera_key: str) -> CalibrationState | None:
        """What adjustments of the map found out about a camera; None: nothing yet."""
        return self._calibration.states.get(self._camera_ids[camera_key])

    def point3D_ids(self, frame_id: FrameId) -> Int64Array:
        """For each keypoint of a keyframe the point it observes, -1 for none; (N,), read-only."""
        if frame_id not in self._point3D_ids:
            self._point3D_ids[frame_id] = self._find_point3D_ids(frame_id)
        return self._point3D_ids[frame_id]

    def num_observations(self, frame_id: FrameId) -> int:
        """How many keypoints of a keyframe observe a point."""
        return int(self._reconstruction.image(frame_id).num_points3D)

    def points3D_in_world(self, point3D_ids: Iterable[int]) -> Float64Array:
        """Positions (N, 3) of points that exist."""
        point3D = self._reconstruction.point3D
        ids = point3D_ids.tolist() if isinstance(point3D_ids, np.ndarray) else point3D_ids
        rows = [point3D(point3D_id).xyz for point3D_id in ids]
        return np.array(rows) if rows else np.empty((0, 3))

    def observations(self, point3D_ids: Int64Array) -> Int64Array:
        """Who observes points (M,): (N, 3) place in the given ids, keyframe, and its keypoint."""
        point3D = self._reconstruction.point3D
        return np.array(
            [
                (place, element.image_id, element.point2D_idx)
                for place, point3D_id in enumerate(point3D_ids.tolist())
                for element in point3D(point3D_id).track.elements
            ],
            np.int64,
        ).reshape(-1, 3)

    def covisibility(self, frame_id: FrameId) -> Mapping[FrameId, int]:
        """How many points a keyframe shares with other registered ones, most first."""
        if frame_id not in self._covisibility:
            self._covisibility[frame_id] = self._count_covisibility(frame_id)
        return self._covisibility[frame_id]

    def count_covisibility(self) -> None:
        """Counts the covisibility of all registered keyframes at once, cheaper than one by one."""
        frame_ids = self.registered_ids
        if all(frame_id in self._covisibility for frame_id in frame_ids):
            return
        all_ids = [self.point3D_ids(frame_id) for frame_id in frame_ids]
        own_ids = [ids[ids != _NO_POINT] for ids in all_ids]
        observed = np.concatenate(own_ids)
        order = np.argsort(observed, kind="stable")
        observed = observed[order]
        observers = np.repeat(np.arange(len(own_ids)), [len(ids) for ids in own_ids])[order]
        for number, own in enumerate(own_ids):
            first = np.searchsorted(observed, own, side="left")
            lengths = np.searchsorted(observed, own, side="right") - first
            rows = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
            rows += np.arange(len(rows))  # of all observations of its points
            counts = np.bincount(observers[rows], minlength=len(frame_ids))
            counts[number] = 0
            seen = np.flatnonzero(counts)
            most_first = seen[np.argsort(-counts[seen], kind="stable")]
            self._covisibility[frame_ids[number]] = {
                frame_ids[k]: num
                for k, num in zip(most_first.tolist(), counts[most_first].tolist(), strict=True)
            }

    # -- growing --------------------------------------------------------------------------------

    def add_camera(
        self, camera_key: str, camera: pycolmap.Camera, *, prior: CameraPrior | None = None
    ) -> None:
        """Adds a camera under its key, as the only sensor of its own rig.

        Args:
            camera_key: names the camera.
            camera: its model, size and calibration; gets an id of this map.
            prior: what bundle adjustment must respect; by default that of a camera of which nothing
                is known.

        Raises:
            MapError: the camera was added before.
        """
        if camera_key in self._camera_ids:
            raise MapError(f"camera {camera_key} was added before")
        camera.camera_id = len(self._camera_ids) + 1
        self._reconstruction.add_camera_with_trivial_rig(camera)
        self._camera_ids[camera_key] = camera.camera_id
        self._calibration.set_prior(camera.camera_id, prior or CameraPrior.assumed(camera))

    def set_camera_params(self, camera_key: str, params: Sequence[float]) -> None:
        """Replaces a camera's calibration."""
        self.camera(camera_key).params = [float(value) for value in params]

    def set_camera_prior(self, camera_key: str, prior: CameraPrior) -> None:
        """Replaces what is known of a camera beforehand."""
        self._calibration.set_prior(self._camera_ids[camera_key], prior)

    def add_keyframe(self, keyframe: Keyframe, pairs: Sequence[VerifiedPair]) -> None:
        """Adds a keyframe, unregistered, with its verified pairs to keyframes added before.

        Raises:
            MapError: the keyframe is known, its camera is not, or a pair does not join it to a
                keyframe added before; the map is as it was.
        """
        frame_id = keyframe.frame_id
        if keyframe.calibration_key not in self._camera_ids:
            raise MapError(f"camera {keyframe.calibration_key} is unknown")
        self._matches.add_keyframe(frame_id, pairs, num_keypoints=len(keyframe.features))
        image = pycolmap.Image(
            name=keyframe.name,
            keypoints=keyframe.features.keypoints_xy,
            camera_id=self._camera_ids[keyframe.calibration_key],
            image_id=frame_id,
        )
        self._reconstruction.add_image_with_trivial_frame(image)
        features = keyframe.features.without_descriptors()
        self._keyframes[frame_id] = replace(keyframe, features=features)
        # The manager counts an image's correspondences when it is added: pairs come first.
        self._observations.add_image(frame_id)

    def add_pairs(self, pairs: Sequence[VerifiedPair]) -> None:
        """Adds pairs of keyframes added before, which were not known to hold until now.

        Where both keyframes are registered, their matches become points at once.

        Raises:
            MapError: a keyframe is unknown, or a pair was added before; the map is as it was.
        """
        if not pairs:
            return
        self._matches.add_pairs(pairs)
        self._rebuild_managers()  # COLMAP's counts an image's correspondences when it is made
        joined = {
            one.pair.second
            for one in pairs
            if self.is_registered(one.pair.first) and self.is_registered(one.pair.second)
        }
        for frame_id in sorted(joined):
            self.triangulate(frame_id)

    def replace_features(self, features: Features) -> None:
        """Puts a keyframe's present keypoint table in place of a former one.

        Only free rows, which no match names, may have moved meanwhile.

        Raises:
            MapError: the keyframe is unknown, or its table has another length.
        """
        keyframe = self._keyframes.get(features.frame_id)
        if keyframe is None or len(keyframe.features) != len(features):
            raise MapError(f"keyframe {features.frame_id} has no table of {len(features)} rows")
        before_xy, after_xy = keyframe.features.keypoints_xy, features.keypoints_xy
        points2D = self._reconstruction.image(features.frame_id).points2D
        for row in np.flatnonzero((before_xy != after_xy).any(axis=1)).tolist():
            points2D[row].xy = after_xy[row]
        self._keyframes[features.frame_id] = replace(
            keyframe, features=features.without_descriptors()
        )

    def initialize(
        self, first: FrameId, second: FrameId, *, second_from_first: Float64Array
    ) -> int:
        """Registers the first two keyframes and triangulates their matches.

        The first camera becomes the world frame; the baseline has the length of the given
        translation.

        Returns:
            The number of points made.

        Raises:
            MapError: the map is initialised already.
        """
        if self.num_registered:
            raise MapError("the map is initialised already")
        self._set_pose(first, np.eye(4)[:3])
        self._set_pose(second, second_from_first)
        options = self._triangulator_options()
        options.ignore_two_view_tracks = False
        self._triangulator.triangulate_image(options, first)
        self._assign_point_attributes(first)
        return self.num_points3D

    def register(
        self,
        frame_id: FrameId,
        *,
        min_inlier_ratio: float,
        neighbors: Mapping[FrameId, VerifiedPair] | None = None,
        is_credible: Callable[[Float64Array], bool] | None = None,
        decides: bool = False,
    ) -> Registration:
        """Poses a keyframe against the points its matches see, and extends their tracks to it.

        Repeated structure (wallpaper, facades) gives matches that agree on a wrong place.
        They compete with the right ones, so a low share of inliers is a warning. Drift gives two
        places, too: among them that counts which pairs with keyframes close in time agree with.

        Args:
            frame_id: a keyframe that is not registered.
            min_inlier_ratio: share of its matched keypoints that must agree on the pose.
            neighbors: the pairs whose matches pose it, by the other keyframe; by default all.
            is_credible: whether the keyframe may get a pose (3, 4).
            decides: whether the better one of two places is taken where it is open which is right;
                otherwise the keyframe waits.

        Raises:
            MapError: the keyframe is registered already.
        """
        self._check_registered([frame_id], is_registered=False)
        rows, point3D_ids = self._correspondences(frame_id, neighbors)
        num = len(rows)
        if num < self._registration.min_inliers:
            return Registration(
                status=RegistrationStatus.TOO_FEW_CORRESPONDENCES, num_correspondences=num
            )
        keyframe = self._keyframes[frame_id]
        pose = estimate_absolute_pose(
            keyframe.features.keypoints_xy[rows],
            self.points3D_in_world(point3D_ids),
            camera=self.camera(keyframe.calibration_key),
            config=self._registration,
            seed=self._seed,
        )
        num_inliers = 0 if pose is None else len(np.unique(rows[pose.inlier_mask]))
        enough = max(self._registration.min_inliers, min_inlier_ratio * len(np.unique(rows)))
        if pose is None or num_inliers < enough:
            return Registration(
                status=RegistrationStatus.TOO_FEW_INLIERS,
                num_inliers=num_inliers,
                num_correspondences=num,
            )
        if is_credible is not None and not is_credible(pose.cam_from_world):
            return Registration(
                status=RegistrationStatus.CONTRADICTED,
                num_inliers=num_inliers,
                num_correspondences=num,
            )

        def is_possible(rival: AbsolutePose) -> bool:
            return len(np.unique(rows[rival.inlier_mask])) >= enough and (
                is_credible is None or is_credible(rival.cam_from_world)
            )

        rival = self._rival_pose(frame_id, pose, rows=rows, point3D_ids=point3D_ids)
        better: AbsolutePose | None = pose
        if rival is not None:
            better = self._better_pose(frame_id, pose, rival, pairs=neighbors, decides=decides)
            if better is rival and not is_possible(rival):
                better = pose if decides else None
        if better is None:
            self._ambiguous[frame_id] = self._registered_neighbors(frame_id)
            return Registration(
                status=RegistrationStatus.AMBIGUOUS,
                num_inliers=num_inliers,
                num_correspondences=num,
            )
        pose, num_inliers = better, len(np.unique(rows[better.inlier_mask]))
        self._set_pose(frame_id, pose.cam_from_world)
        self._extend_tracks(
            frame_id, rows[pose.inlier_mask], point3D_ids=point3D_ids[pose.inlier_mask]
        )
        return Registration(
            status=RegistrationStatus.REGISTERED, num_inliers=num_inliers, num_correspondences=num
        )

    def num_pose_inliers(
        self,
        keyframe: Keyframe,
        calibration_key: str,
        *,
        neighbors: Mapping[FrameId, VerifiedPair] | None = None,
    ) -> int:
        """How many keypoints of a keyframe would agree on a pose if it had a camera of the map.

        Args:
            keyframe: in the map, or not yet.
            calibration_key: names the camera.
            neighbors: its verified pairs, by the other keyframe; by default those it was added
                with.
        """
        rows, point3D_ids = self._correspondences(keyframe.frame_id, neighbors)
        pose = estimate_absolute_pose(
            keyframe.features.keypoints_xy[rows],
            self.points3D_in_world(point3D_ids),
            camera=self.camera(calibration_key),
            config=self._registration,
            seed=self._seed,
        )
        return 0 if pose is None else len(np.unique(rows[pose.inlier_mask]))

    def place(self, poses: Mapping[FrameId, Float64Array]) -> None:
        """Puts keyframes where something else than the map says they are, registered or not.

        Their observations stay as they are, and those registered anew have none yet.

        Raises:
            MapError: a keyframe is unknown; the map is as it was.
        """
        unknown = [i for i in poses if i not in self._keyframes]
        if unknown:
            raise MapError(f"keyframe {unknown[0]} is not in the map")
        self._forget_observations()
        for frame_id, cam_from_world in poses.items():
            if self.is_registered(frame_id):
                self.set_pose(frame_id, cam_from_world)
            else:
                self._set_pose(frame_id, cam_from_world)

    def num_visible_points(self, frame_id: FrameId) -> int:
        """How many keypoints of a keyframe match a point of the map."""
        return len(np.unique(self._correspondences(frame_id)[0]))

    def visible_points(
        self, frame_id: FrameId, *, neighbors: Mapping[FrameId, VerifiedPair] | None = None
    ) -> tuple[Int64Array, Int64Array]:
        """Keypoints of a keyframe and ids of the points they match, (N,) each.

        Args:
            frame_id: the keyframe.
            neighbors: pairs of it, by the other keyframe; by default those that the map uses.
        """
        return self._correspondences(frame_id, neighbors)

    @charged_to(Stage.TRIANGULATE)
    def triangulate(self, frame_id: FrameId) -> int:
        """Continues tracks into a registered keyframe, makes points; returns observations made."""
        self._forget_observations()
        num = self._triangulator.triangulate_image(self._triangulator_options(), frame_id)
        self._assign_point_attributes(frame_id)
        return int(num)

    def take_model(self, model: pycolmap.Reconstruction) -> None:
        """Registers keyframes and adds points as a model of some keyframes of this map has them.

        Images are keyframes by their ids. Those that the map does not hold, or with another number
        of keypoints, are left out; so are points that fewer than two of the others observe.

        Raises:
            MapError: the map is initialised already.
        """
        if self.num_registered:
            raise MapError("the map is initialised already")
        taken = {
            frame_id
            for frame_id in sorted(FrameId(int(i)) for i in model.reg_image_ids())
            if frame_id in self._keyframes
            and model.image(frame_id).num_points2D() == len(self._keyframes[frame_id].features)
        }
        for frame_id in sorted(taken):
            self._set_pose(frame_id, np.asarray(model.image(frame_id).cam_from_world().matrix()))
        for point3D_id in sorted(model.point3D_ids()):
            point = model.point3D(point3D_id)
            track = _track_in(point.track, taken)
            if track.length() > 1:
                self._reconstruction.add_point3D(point.xyz, track, point.color)
        self._forget_observations()
        self._rebuild_managers()
        self._point_attributes.adopt(self._reconstruction.point3D_ids())

    # -- refining -------------------------------------------------------------------------------

    @charged_to(Stage.TRIANGULATE)
    def complete_and_merge(self, frame_id: FrameId) -> int:
        """Merges and completes the tracks touched since the last call; returns the changes."""
        self._forget_observations()
        options = self._triangulator_options()
        modified = self._triangulator.get_modified_points3D()
        num = self._triangulator.merge_tracks(options, modified)
        num += self._triangulator.complete_tracks(
            options, self._triangulator.get_modified_points3D()
        )
        num += self._triangulator.complete_image(options, frame_id)
        self._assign_point_attributes(frame_id)
        return int(num)

    @charged_to(Stage.TRIANGULATE)
    def filter_touched(self, frame_ids: Collection[FrameId]) -> int:
        """Removes bad observations of the given keyframes and of points touched lately."""
        self._forget_observations()
        max_error_px = self._max_error_px()
        min_angle_deg = self._triangulation.min_angle_deg
        num = self._observations.filter_points3D_in_images(
            max_error_px, min_angle_deg, set(frame_ids)
        )
        modified = {
            point3D_id
            for point3D_id in self._triangulator.get_modified_points3D()
            if self._reconstruction.exists_point3D(point3D_id)
        }
        num += self._observations.filter_points3D(max_error_px, min_angle_deg, modified)
        self._triangulator.clear_modified_points3D()
        return int(num)

    @charged_to(Stage.TRIANGULATE)
    def filter_all(self, *, gate: float = 1.0) -> int:
        """Removes bad observations everywhere; returns how many.

        Args:
            gate: times the usual threshold, for a map that is known to be off by more.
        """
        self._forget_observations()
        max_error_px = gate * self._max_error_px()
        min_angle_deg = self._triangulation.min_angle_deg
        if not self._is_large:
            return int(self._observations.filter_all_points3D(max_error_px, min_angle_deg))
        return sum(
            int(self._observations.filter_points3D(max_error_px, min_angle_deg, some))
            for some in self._points_in_slices()
        )

    @charged_to(Stage.TRIANGULATE)
    def merge_all(self, *, gate: float = 1.0) -> int:
        """Merges and completes all tracks; returns the changes.

        Args:
            gate: times the usual threshold, for a map that is known to be off by more.
        """
        self._forget_observations()
        options = self._triangulator_options(gate=gate)
        num = self._merge_all(options) + self._complete_all(options)
        self._triangulator.clear_modified_points3D()
        self._point_attributes.assign(self._reconstruction.point3D_ids())
        return num

    @charged_to(Stage.TRIANGULATE)
    def retriangulate(self) -> int:
        """Completes, merges and re-triangulates everything, as before a final adjustment."""
        self._forget_observations()
        options = self._triangulator_options()
        num = self._complete_all(options) + self._merge_all(options)
        num += int(self._triangulator.retriangulate(options))
        self._triangulator.clear_modified_points3D()
        self._point_attributes.assign(self._reconstruction.point3D_ids())
        return num

    def deregister(self, frame_ids: Collection[FrameId]) -> None:
        """Takes keyframes out of the map; they stay known with their matches.

        COLMAP's manager loses count of images added after their neighbours were registered, so the
        reconstruction is changed beneath it and the managers are made anew.

        Raises:
            MapError: one of them is not registered; the map is as it was.
        """
        self._check_registered(frame_ids, is_registered=True)
        self._forget_observations()
        for frame_id in frame_ids:
            self._reconstruction.deregister_frame(self._reconstruction.image(frame_id).frame_id)
            self._registered.remove(frame_id)
            self._num_registered_of[self._keyframes[frame_id].calibration_key] -= 1
        if frame_ids:
            self._rebuild_managers()

    def distrust_pair(self, pair: ImagePair) -> None:
        """Leaves a pair out of posing from now on.

        COLMAP's graph keeps its matches; triangulation tests each of them against the poses anyway.
        """
        self._matches.distrust(pair)

    def forget_pairs(self, pairs: Collection[ImagePair]) -> None:
        """Leaves pairs out of everything from now on; a copy of the map keeps its own.

        Observations that no other pair leads to are deleted.
        """
        gone = set(pairs)
        kept = [one for one in self._matches.pairs() if one.pair not in gone]
        num_keypoints = {i: len(keyframe.features) for i, keyframe in self._keyframes.items()}
        self._matches = MatchGraph.of(num_keypoints, kept)
        ends = {frame_id for pair in gone for frame_id in (pair.first, pair.second)}
        for point3D_id in sorted(self._reconstruction.point3D_ids()):
            elements = self._reconstruction.point3D(point3D_id).track.elements
            frame_ids = {FrameId(int(element.image_id)) for element in elements}
            if len(frame_ids & ends) < 2:
                continue
            # Numbers: an element is a view of the track, and another one after a deletion.
            alone = [
                (int(element.image_id), int(element.point2D_idx))
                for element in elements
                if element.image_id in ends
                and frame_ids.isdisjoint(self._matches.neighbors(FrameId(int(element.image_id))))
            ]
            if len(alone) >= len(elements) - 1:
                self._reconstruction.delete_point3D(point3D_id)
            else:
                for image_id, point2D_idx in alone:
                    self._reconstruction.delete_observation(image_id, point2D_idx)
        self._forget_observations()
        self._rebuild_managers()

    def replace_pairs(
        self,
        changed: Sequence[VerifiedPair],
        lost: Collection[ImagePair],
        *,
        covered_rows: Mapping[FrameId, Int64Array],
    ) -> float:
        """Takes matches and observations of keypoints that show nothing of the world out of a map.

        Args:
            changed: pairs of this map that have other matches now.
            lost: pairs that do not hold any more; others than this map's are left alone.
            covered_rows: the keypoints, by registered keyframe.

        Returns:
            The share of observations that were of such keypoints.
        """
        self._forget_observations()
        instead = {verified.pair: verified for verified in changed}
        gone = set(lost)
        pairs = [
            instead.get(verified.pair, verified)
            for verified in self._matches.pairs()
            if verified.pair not in gone
        ]
        num_keypoints = {i: len(keyframe.features) for i, keyframe in self._keyframes.items()}
        self._matches = MatchGraph.of(num_keypoints, pairs)
        num_before = self._reconstruction.compute_num_observations()
        num_covered = 0
        for frame_id, rows in covered_rows.items():
            point3D_ids = self.point3D_ids(frame_id)[rows]
            num_covered += int((point3D_ids != _NO_POINT).sum())
        for frame_id, rows in covered_rows.items():
            # Deleting the last but one observation of a point deletes the last one, too.
            still = self._find_point3D_ids(frame_id)[rows] != _NO_POINT
            for row in rows[still].tolist():
                self._reconstruction.delete_observation(frame_id, row)
        self._forget_observations()
        self._rebuild_managers()
        return num_covered / max(1, num_before)

    def scale(self, factor: float) -> None:
        """Makes all lengths of the map ``factor`` times as long, about the world's origin."""
        self._reconstruction.transform(
            pycolmap.Sim3d(np.column_stack([factor * np.eye(3), np.zeros(3)]))
        )

    def set_pose(self, frame_id: FrameId, cam_from_world: Float64Array) -> None:
        """Moves a registered keyframe.

        Raises:
            MapError: the pose is not finite; the solver would end the process over it.
        """
        if not np.isfinite(cam_from_world).all():
            raise MapError(f"the pose of keyframe {frame_id} is not finite")
        image = self._reconstruction.image(frame_id)
        self._reconstruction.frame(image.frame_id).set_cam_from_world(
            image.camera_id, pycolmap.Rigid3d(cam_from_world)
        )

    def mean_reprojection_error_px(self) -> float:
        """Mean over all observations; 0 for an empty map."""
        self._reconstruction.update_point_3d_errors()
        return float(self._reconstruction.compute_mean_reprojection_error())

    def fit(self, frame_ids: Iterable[FrameId], *, bound_px: float | None = None) -> Fit:
        """How well the registered ones of some keyframes agree with the map.

        Args:
            frame_ids: keyframes.
            bound_px: an observation this far off adds nothing to the gain; by default the threshold
                beyond which observations are filtered.
        """
        errors = [self.residuals(i).errors_px for i in frame_ids if self.is_registered(i)]
        errors_px = np.concatenate(errors) if errors else np.empty(0)
        bounded = np.minimum(errors_px / (bound_px or self._max_error_px()), 1.0)
        return Fit(
            num_observations=len(errors_px),
            mean_error_px=float(errors_px.mean()) if len(errors_px) else 0.0,
            gain=float((1.0 - bounded**2).sum()),
        )

    def residuals(self, frame_id: FrameId) -> Residuals:
        """Where a registered keyframe observes points, and how far from there they project."""
        point3D_ids = self.point3D_ids(frame_id)
        seen = np.flatnonzero(point3D_ids != _NO_POINT)
        keyframe = self._keyframes[frame_id]
        points = transform_points(
            self.cam_from_world(frame_id), self.points3D_in_world(point3D_ids[seen])
        )
        projected_xy = np.asarray(self.camera(keyframe.calibration_key).img_from_cam(points))
        keypoints_xy = keyframe.features.keypoints_xy[seen]
        offsets = projected_xy.reshape(-1, 2) - keypoints_xy
        return Residuals(keypoints_xy=keypoints_xy, offsets_xy=np.nan_to_num(offsets, nan=np.inf))

    def agreement(self, frame_id: FrameId) -> float:
        """How well a registered keyframe agrees with what its matches see of the map, 0..1.

        Of the keypoints that match points of the map, those that observe one count, each by
        1 - (error / bound)^2 (see `Fit.gain`). Drift shows twice: observations have larger errors,
        and those beyond the bound are no observations any more.
        """
        for other in self.neighbors(frame_id):
            if self.is_registered(other):
                self.point3D_ids(other)  # whole tables, since other keyframes are asked for, too
        num_visible = self.num_visible_points(frame_id)
        return self.fit([frame_id]).gain / num_visible if num_visible else 0.0

    def transform_parts(self, moved_from_map: Mapping[FrameId, Float64Array]) -> None:
        """Moves each registered keyframe by a similarity (3, 4) of its own, and points with them.

        A point goes where most keyframes that observe it would have it; observations of the others
        are left to be filtered.

        Raises:
            MapError: a registered keyframe has no similarity; the map is as it was.
        """
        frame_ids = self.registered_ids
        missing = [i for i in frame_ids if i not in moved_from_map]
        if missing:
            raise MapError(f"keyframe {missing[0]} would stay behind")
        placed: dict[int, list[Float64Array]] = {}
        for frame_id in frame_ids:
            ids = self.point3D_ids(frame_id)
            observed = np.unique(ids[ids != _NO_POINT])
            positions = transform_points(moved_from_map[frame_id], self.points3D_in_world(observed))
            for point3D_id, position in zip(observed.tolist(), positions, strict=True):
                placed.setdefault(point3D_id, []).append(position)
        for point3D_id, rows in placed.items():
            self._reconstruction.point3D(point3D_id).xyz = np.median(rows, axis=0)
        for frame_id in frame_ids:
            pose = pose_in_other_world(self.cam_from_world(frame_id), moved_from_map[frame_id])
            self.set_pose(frame_id, pose)
        self._forget_observations()

    # -- copies ---------------------------------------------------------------------------------

    def copy(self) -> SparseMap:
        """A map of its own to try something on.

        Both share the matches: only one of the two may take further keyframes and pairs. Each
        distrusts pairs of its own.
        """
        twin = SparseMap(
            triangulation=self._triangulation, registration=self._registration, seed=self._seed
        )
        twin._reconstruction = self.copy_reconstruction()
        twin._matches = self._matches.copy()
        twin._keyframes = dict(self._keyframes)
        twin._registered = list(self._registered)
        twin._num_registered_of = self._num_registered_of.copy()
        twin._camera_ids = dict(self._camera_ids)
        twin._calibration = self._calibration.copy()
        twin._point_attributes = self._point_attributes.copy_for(
            twin._reconstruction, twin._keyframes
        )
        twin._strengths = dict(self._strengths)
        twin._rebuild_managers()
        return twin

    def copy_reconstruction(self) -> pycolmap.Reconstruction:
        """A private copy for another thread."""
        return pycolmap.Reconstruction(self._reconstruction)

    def point_cloud(self) -> PointCloud:
        """All points as arrays."""
        return self._point_attributes.cloud()

    # -- inside ---------------------------------------------------------------------------------

    def _rebuild_managers(self) -> None:
        graph = self._matches.correspondence_graph
        self._observations = pycolmap.ObservationManager(self._reconstruction, graph)
        self._triangulator = pycolmap.IncrementalTriangulator(
            graph, self._reconstruction, self._observations
        )

    @property
    def _is_large(self) -> bool:
        """Whether a call of COLMAP on all points would hold the interpreter lock for too long."""
        return int(self._reconstruction.num_points3D()) > _POINTS_AT_ONCE

    def _points_in_slices(self) -> Iterator[set[int]]:
        """Ids of all points in turn; those that have gone when their turn comes are left out."""
        ids = sorted(self._reconstruction.point3D_ids())
        for start in range(0, len(ids), _POINTS_AT_ONCE):
            some = ids[start : start + _POINTS_AT_ONCE]
            yield {one for one in some if self._reconstruction.exists_point3D(one)}

    def _complete_all(self, options: pycolmap.IncrementalTriangulatorOptions) -> int:
        if not self._is_large:
            return int(self._triangulator.complete_all_tracks(options))
        return sum(
            int(self._triangulator.complete_tracks(options, some))
            for some in self._points_in_slices()
        )

    def _merge_all(self, options: pycolmap.IncrementalTriangulatorOptions) -> int:
        if not self._is_large:
            return int(self._triangulator.merge_all_tracks(options))
        return sum(
            int(self._triangulator.merge_tracks(options, some)) for some in self._points_in_slices()
        )

    def _strength(self, verified: VerifiedPair) -> PairStrength:
        known = self._strengths.get(verified.pair)
        if known is None or known[0] is not verified:
            pair = verified.pair
            ends = self._keyframes[pair.first], self._keyframes[pair.second]
            known = verified, pair_strength(verified, *ends)
            self._strengths[pair] = known
        return known[1]

    def _find_point3D_ids(self, frame_id: FrameId) -> Int64Array:
        image = self._reconstruction.image(frame_id)
        ids = np.full(image.num_points2D(), _NO_POINT, np.int64)
        observed = image.get_observation_point2D_idxs()
        points2D = image.points2D
        ids[observed] = [points2D[k].point3D_id for k in observed]
        ids.flags.writeable = False
        return ids

    def _forget_observations(self) -> None:
        """Drops what is known of who observes what, before or after it changes."""
        self._point3D_ids.clear()
        self._covisibility.clear()

    def _count_covisibility(self, frame_id: FrameId) -> dict[FrameId, int]:
        ids = self.point3D_ids(frame_id)
        point3D = self._reconstruction.point3D
        shared = Counter(
            element.image_id
            for point3D_id in ids[ids != _NO_POINT].tolist()
            for element in point3D(point3D_id).track.elements
        )
        del shared[frame_id]
        by_count = sorted(shared.items(), key=lambda item: (-item[1], item[0]))
        return {FrameId(other): count for other, count in by_count}

    def _check_registered(self, frame_ids: Collection[FrameId], *, is_registered: bool) -> None:
        for frame_id in frame_ids:
            if self.is_registered(frame_id) is not is_registered:
                state = "not registered" if is_registered else "registered already"
                raise MapError(f"keyframe {frame_id} is {state}")

    def _correspondences(
        self, frame_id: FrameId, neighbors: Mapping[FrameId, VerifiedPair] | None = None
    ) -> tuple[Int64Array, Int64Array]:
        """Keypoints of a keyframe and the points they match; unique (row, point) couples."""
        rows, ids, _ = self._matched_points(frame_id, neighbors)
        num_ids = ids.max(initial=0) + 1
        couples = np.unique(rows * num_ids + ids)  # one number for each couple
        return couples // num_ids, couples % num_ids

    def _matched_points(
        self, frame_id: FrameId, neighbors: Mapping[FrameId, VerifiedPair] | None
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Keypoints of a keyframe, the points that they match, and the pair of each match, (N,)."""
        rows: list[Int64Array] = []
        ids: list[Int64Array] = []
        if neighbors is None:
            neighbors = self._matches.neighbors(frame_id)
        for other, verified in sorted(neighbors.items()):
            if not self.is_registered(other):
                continue
            matches = verified.inlier_matches_idx.astype(np.int64)
            own, others = matches.T if verified.pair.first == frame_id else matches.T[::-1]
            point3D_ids = self._point3D_ids_at(other, others)
            seen = point3D_ids != _NO_POINT
            rows.append(own[seen])
            ids.append(point3D_ids[seen])
        if not rows:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        pair_idx = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
        return np.concatenate(rows), np.concatenate(ids), pair_idx

    def _rival_pose(
        self, frame_id: FrameId, pose: AbsolutePose, *, rows: Int64Array, point3D_ids: Int64Array
    ) -> AbsolutePose | None:
        """The pose that most matches far from another one agree with, if there are enough.

        Repeated structure gives several poses, each with matches of its own. Most keyframes have so
        few matches that do not agree that it is not asked.
        """
        keyframe = self._keyframes[frame_id]
        enough = _ASKED_RATIO * len(np.unique(rows[pose.inlier_mask]))
        if len(np.unique(rows[~pose.inlier_mask])) <= enough:
            return None
        errors = self._pose_errors(keyframe, pose, rows=rows, point3D_ids=point3D_ids)
        is_far = errors > FAR
        rival = estimate_absolute_pose(
            keyframe.features.keypoints_xy[rows[is_far]],
            self.points3D_in_world(point3D_ids[is_far]),
            camera=self.camera(keyframe.calibration_key),
            config=self._registration,
            seed=self._seed,
        )
        if rival is None or len(np.unique(rows[is_far][rival.inlier_mask])) <= enough:
            return None
        errors = self._pose_errors(keyframe, rival, rows=rows, point3D_ids=point3D_ids)
        return replace(rival, inlier_mask=errors < 1.0)

    def _better_pose(
        self,
        frame_id: FrameId,
        pose: AbsolutePose,
        rival: AbsolutePose,
        *,
        pairs: Mapping[FrameId, VerifiedPair] | None,
        decides: bool,
    ) -> AbsolutePose | None:
        """The pose that pairs agree with as a whole, None while that is open.

        Where it is, pairs with keyframes close in time decide: those with others may show that the
        map has drifted, which closing the loop corrects once the keyframe has its place.
        """
        pairs = self.neighbors(frame_id) if pairs is None else pairs
        pairs = {other: one for other, one in pairs.items() if self.is_registered(other)}
        all_of_them = self._supports(frame_id, (pose, rival), pairs)
        if not is_open(*all_of_them):
            return pose
        close_ids = self._close_in_time(frame_id)
        recent = {other: one for other, one in pairs.items() if other in close_ids}
        if len(recent) < len(pairs):
            own, others = self._supports(frame_id, (pose, rival), recent)
            if own.independent and not is_open(own, others):
                return pose
            if others.independent and not is_open(others, own):
                return rival
        if not decides:
            return None
        own, others = all_of_them
        return rival if others.independent > own.independent else pose

    def _supports(
        self,
        frame_id: FrameId,
        poses: tuple[AbsolutePose, AbsolutePose],
        pairs: Mapping[FrameId, VerifiedPair],
    ) -> tuple[PlaceSupport, PlaceSupport]:
        """How much pairs of a keyframe support two poses of it."""
        keyframe = self._keyframes[frame_id]
        rows, point3D_ids, pair_idx = self._matched_points(frame_id, pairs)
        cells = cells_of(keyframe, rows)
        first, second = (
            place_support(
                pair_idx,
                self._pose_errors(keyframe, one, rows=rows, point3D_ids=point3D_ids) < 1.0,
                keypoints=rows,
                cells=cells,
            )
            for one in poses
        )
        return first, second

    def _close_in_time(self, frame_id: FrameId) -> set[FrameId]:
        """Keyframes that its camera took not long before or after a keyframe; none of a photo."""
        keyframe = self._keyframes[frame_id]
        if keyframe.is_photo:
            return set()
        sequence = [i for i, k in self._keyframes.items() if k.camera_key == keyframe.camera_key]
        place = sequence.index(frame_id)
        return set(sequence[max(place - _NEAR_IN_TIME, 0) : place + _NEAR_IN_TIME + 1])

    def _registered_neighbors(self, frame_id: FrameId) -> frozenset[FrameId]:
        return frozenset(i for i in self.neighbors(frame_id) if self.is_registered(i))

    def _pose_errors(
        self, keyframe: Keyframe, pose: AbsolutePose, *, rows: Int64Array, point3D_ids: Int64Array
    ) -> Float64Array:
        """How far points project from keypoints, (N,), in units of what poses allow."""
        camera = self.camera(keyframe.calibration_key)
        errors_px = reprojection_errors_px(
            pose.cam_from_world,
            self.points3D_in_world(point3D_ids),
            points_xy=keyframe.features.keypoints_xy[rows],
            camera=camera,
        )
        allowed_px = self._registration.max_error_px * image_scale(camera.width, camera.height)
        return np.asarray(errors_px / allowed_px)

    def _point3D_ids_at(self, frame_id: FrameId, rows: Int64Array) -> Int64Array:
        """The points (M,) that some keypoints of a keyframe observe, -1 for none."""
        if frame_id in self._point3D_ids:
            return self._point3D_ids[frame_id][rows]
        # Asking for some keypoints only is a fraction of asking for all.
        points2D = self._reconstruction.image(frame_id).points2D
        ids = np.array([points2D[k].point3D_id for k in rows.tolist()], np.uint64)
        return np.where(ids == pycolmap.INVALID_POINT3D_ID, _NO_POINT, ids.astype(np.int64))

    def _extend_tracks(
        self, frame_id: FrameId, rows: Int64Array, *, point3D_ids: Int64Array
    ) -> None:
        """Adds inlier observations; a keypoint joins one track and a track one keypoint."""
        used_rows: set[int] = set()
        used_points: set[int] = set()
        for row, point3D_id in zip(rows.tolist(), point3D_ids.tolist(), strict=True):
            if row in used_rows or point3D_id in used_points:
                continue
            used_rows.add(row)
            used_points.add(point3D_id)
            self._observations.add_observation(point3D_id, pycolmap.TrackElement(frame_id, row))
            self._triangulator.add_modified_point3D(point3D_id)

    def _set_pose(self, frame_id: FrameId, cam_from_world: Float64Array) -> None:
        self._forget_observations()
        self.set_pose(frame_id, cam_from_world)
        self._observations.register_frame(self._reconstruction.image(frame_id).frame_id)
        bisect.insort(self._registered, frame_id)
        self._ambiguous.pop(frame_id, None)
        self._num_registered_of[self._keyframes[frame_id].calibration_key] += 1

    def _assign_point_attributes(self, frame_id: FrameId) -> None:
        self._point_attributes.assign(self._triangulator.get_modified_points3D(), made_by=frame_id)

    def _max_error_px(self) -> float:
        """The reprojection threshold at the size of the largest camera."""
        scale = max(
            (image_scale(c.width, c.height) for c in self._reconstruction.cameras.values()),
            default=1.0,
        )
        return float(self._triangulation.max_reprojection_error_px * scale)

    def _max_extra_param(self) -> float:
        """The largest distortion parameter of a camera that COLMAP triangulates with.

        Its bound is meant for the coefficients of an ordinary lens that adjustment made impossible.
        Those of other models are larger, and so may be what somebody measured.
        """
        constant = self.constant_camera_ids
        is_bounded = all(
            has_small_parameters(camera) and camera_id not in constant
            for camera_id, camera in self._reconstruction.cameras.items()
        )
        return _MAX_EXTRA_PARAM if is_bounded else math.inf

    def _triangulator_options(
        self, *, gate: float = 1.0
    ) -> pycolmap.IncrementalTriangulatorOptions:
        max_error_px = gate * self._max_error_px()
        options = pycolmap.IncrementalTriangulatorOptions(
            max_transitivity=self._triangulation.max_transitivity,
            merge_max_reproj_error=max_error_px,
            complete_max_reproj_error=max_error_px,
            min_angle=self._triangulation.min_angle_deg,
            ignore_two_view_tracks=self._triangulation.ignore_two_view_tracks,
            max_extra_param=self._max_extra_param(),
            random_seed=self._seed,
        )
        options.check()
        return options


def _track_in(track: pycolmap.Track, frame_ids: Collection[FrameId]) -> pycolmap.Track:
    """A track without the observations of other keyframes than some."""
    elements = track.elements
    kept = [element for element in elements if element.image_id in frame_ids]
    return track if len(kept) == len(elements) else pycolmap.Track(kept)
