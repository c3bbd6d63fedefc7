"""A synthetic world shared by tests: a camera over rolling ground whose points have identities.

World axes: x east, y north, z up; lengths in units of the map, a tenth of the flight height each.
Points are seen within the field of view and a range, so tracks have realistic lengths. What a point
looks like (its descriptor) is separate from what it is: in a world with a repeated place, points of
two places look the same, and their geometry agrees, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pycolmap

from engine.config import (
    RegistrationConfig,
    RetrievalConfig,
    SceneGraphConfig,
    TriangulationConfig,
)
from engine.errors import InferenceError
from engine.geometry import camera_center, compose_poses, invert_pose, skew, transform_points
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.place_recognition import PlaceRecognizer
from engine.matching.scene_graph import SceneGraph
from engine.types import (
    Features,
    Float64Array,
    Frame,
    FrameId,
    GpsFix,
    ImagePair,
    Int64Array,
    IntrinsicsPrior,
    Keyframe,
    MatchRequest,
    PairMatches,
    PairReason,
    RegistrationStatus,
    TrackedFrame,
    Uint8Array,
    Uint32Array,
    VerifiedPair,
)

FLIGHT_HEIGHT = 10.0
LOOKS_DOWN = 1.0  # tangent of the angle below the horizon
MAX_RANGE = 20.0
DENSITY = 0.6  # points per unit of area: about a hundred in a view
RELIEF = 4.0  # height of the ground's points above zero
WIDTH, HEIGHT = 1000, 750
FOCAL_PX = 800.0
MIN_PAIR_MATCHES = 18  # fewer do not pass verification
EXACT_CAMERA = (FOCAL_PX, WIDTH / 2, HEIGHT / 2, 0.0)  # SIMPLE_RADIAL

_EQUATOR_METRES_PER_DEGREE = (110_574.2727, 111_319.4908)  # of latitude and longitude, at 0, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticCamera:
    """A camera, SIMPLE_RADIAL by default, and the prior that its source gives."""

    key: str = "camera"
    width: int = WIDTH
    height: int = HEIGHT
    params: tuple[float, ...] = EXACT_CAMERA
    model: str = "SIMPLE_RADIAL"
    prior: IntrinsicsPrior | None = None

    @classmethod
    def known(cls, key: str = "camera", *, focal_px: float = FOCAL_PX) -> SyntheticCamera:
        """A camera whose source knows its calibration completely."""
        params = (focal_px, WIDTH / 2, HEIGHT / 2, 0.0)
        prior = IntrinsicsPrior(focal_px=focal_px, camera_model="SIMPLE_RADIAL", params=params)
        return cls(key=key, params=params, prior=prior)

    def as_colmap(self) -> pycolmap.Camera:
        """The true camera."""
        return pycolmap.Camera(
            model=self.model, width=self.width, height=self.height, params=self.params
        )

    @property
    def sees_all_around(self) -> bool:
        """Whether its image is the whole sphere."""
        return bool(self.as_colmap().is_spherical())


# -- paths and ground -----------------------------------------------------------------------------


def look_at(center: Float64Array, target: Float64Array) -> Float64Array:
    """The level pose (3, 4) of a camera at ``center`` that faces ``target``."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.column_stack([rotation, -rotation @ center])


def straight_path(num: int, *, step: float = 2.0, looks_down: float = LOOKS_DOWN) -> Float64Array:
    """Poses (num, 3, 4) flying east, swaying a little, looking ahead and down."""
    along = step * np.arange(num)
    centers = np.column_stack(
        [along, 0.8 * np.sin(along / 3.0), FLIGHT_HEIGHT + 0.6 * np.cos(along / 2.0)]
    )
    headings = np.asarray(0.15 * np.sin(along / 4.0))
    return _looking_ahead(centers, headings, looks_down=looks_down)


def round_path(num: int, *, radius: float = 12.0, turns: float = 1.0) -> Float64Array:
    """Poses (num, 3, 4) on a circle, looking along it and down; one turn closes the loop."""
    angles = turns * 2.0 * np.pi * np.arange(num) / num
    height = FLIGHT_HEIGHT + 0.6 * np.cos(3.0 * angles)
    centers = np.column_stack([radius * np.cos(angles), radius * np.sin(angles), height])
    return _looking_ahead(centers, np.asarray(angles + np.pi / 2.0))


def turning_path(num: int) -> Float64Array:
    """Poses (num, 3, 4) of a camera that turns on the spot."""
    return _looking_ahead(
        np.tile((10.0, 0.0, FLIGHT_HEIGHT), (num, 1)), np.asarray(0.12 * np.arange(num))
    )


def _looking_ahead(
    centers: Float64Array, headings: Float64Array, *, looks_down: float = LOOKS_DOWN
) -> Float64Array:
    downwards = np.full(len(headings), -looks_down)
    aims = np.column_stack([np.cos(headings), np.sin(headings), downwards])
    return np.array([look_at(c, c + aim) for c, aim in zip(centers, aims, strict=True)])


def ground(
    poses: Float64Array, *, seed: int = 0, density: float = DENSITY, relief: float = RELIEF
) -> Float64Array:
    """Points (P, 3) on the rolling ground around a path, ``density`` per unit of area."""
    rng = np.random.default_rng((seed, 1))
    centers = camera_center(poses)
    low, high = centers[:, :2].min(axis=0) - MAX_RANGE, centers[:, :2].max(axis=0) + MAX_RANGE
    num = int(density * np.prod(high - low))
    heights = relief * rng.random(num)
    return np.column_stack([rng.uniform(low, high, (num, 2)), heights])


# -- the world ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """What one frame sees; rows belong together."""

    point_ids: Int64Array  # (N,) which points
    points_xy: Float64Array  # (N, 2) px


class SyntheticWorld:
    """Frames 1, 2, 3, ... at given poses over given points.

    Args:
        poses: (F, 3, 4) cam_from_world of each frame.
        points: (P, 3); by default the ground around the path.
        density: of that ground's points.
        looks_like: (P,) the look of each point; by default each has its own.
        cameras: the cameras of the frames, taken in turn.
        camera_idx: which of them took each frame, when they do not take turns.
        noise_px: standard deviation of keypoints.
        max_range: how far points are seen.
        seed: of everything random.
    """

    def __init__(
        self,
        poses: Float64Array,
        *,
        points: Float64Array | None = None,
        density: float = DENSITY,
        looks_like: Int64Array | None = None,
        cameras: Sequence[SyntheticCamera] = (SyntheticCamera.known(),),
        camera_idx: Sequence[int] | None = None,
        noise_px: float = 0.0,
        max_range: float = MAX_RANGE,
        seed: int = 0,
    ) -> None:
        self.poses = poses
        self.points = ground(poses, seed=seed, density=density) if points is None else points
        self.looks_like = np.arange(len(self.points)) if looks_like is None else looks_like
        turns = [number % len(cameras) for number in range(len(poses))]
        self._cameras = [cameras[idx] for idx in camera_idx or turns]
        self._noise_px = noise_px
        self._max_range = max_range
        self._seed = seed
        rng = np.random.default_rng((seed, 2))
        self._descriptors = _random_descriptors(rng, len(self.points))
        self._colors = rng.integers(1, 256, (len(self.points), 3)).astype(np.uint8)
        self._views: dict[FrameId, View] = {}

    @property
    def frame_ids(self) -> list[FrameId]:
        """All frames in order."""
        return [FrameId(i) for i in range(1, len(self.poses) + 1)]

    @property
    def homography_inlier_ratio(self) -> float:
        """What one homography explains in every pair: nearly all of a plane or after a turn."""
        heights, centers = self.points[:, 2], camera_center(self.poses)
        is_simple = np.ptp(heights) < 0.01 or np.ptp(centers, axis=0).max() < 0.01
        return 0.95 if is_simple else 0.3

    @property
    def extent(self) -> float:
        """The diagonal of the box around the camera centres."""
        centers = camera_center(self.poses)
        return float(np.linalg.norm(np.ptp(centers, axis=0)))

    def pose(self, frame_id: int) -> Float64Array:
        """The true cam_from_world (3, 4) of a frame."""
        pose: Float64Array = self.poses[frame_id - 1]
        return pose

    def camera(self, frame_id: int) -> SyntheticCamera:
        """The camera of a frame."""
        return self._cameras[frame_id - 1]

    def color(self, point_id: int) -> tuple[int, int, int]:
        """The colour of a point."""
        red, green, blue = self._colors[point_id].tolist()
        return red, green, blue

    def view(self, frame_id: int) -> View:
        """What a frame sees, in an order of its own, with its noise."""
        key = FrameId(frame_id)
        if key not in self._views:
            rng = np.random.default_rng((self._seed, 3, frame_id))
            seen = self._project(self.pose(frame_id), self.camera(frame_id))
            order = rng.permutation(len(seen.point_ids))
            noise_px = rng.normal(scale=self._noise_px, size=(len(order), 2))
            self._views[key] = View(
                point_ids=seen.point_ids[order], points_xy=seen.points_xy[order] + noise_px
            )
        return self._views[key]

    def keyframe(self, frame_id: int, *, gps: GpsFix | None = None) -> Keyframe:
        """A frame as the front end would hand it to mapping."""
        view, camera = self.view(frame_id), self.camera(frame_id)
        rng = np.random.default_rng((self._seed, 4, frame_id))
        clean = self._descriptors[self.looks_like[view.point_ids]].astype(np.float64)
        noisy = clean + rng.normal(scale=4.0, size=clean.shape)
        features = Features(
            frame_id=FrameId(frame_id),
            keypoints_xy=view.points_xy,
            descriptors=np.clip(np.round(noisy), 0, 255).astype(np.uint8),
            scales=np.full(len(view.point_ids), 4.0, np.float32),
            colors=self._colors[view.point_ids],
        )
        return Keyframe(
            frame_id=FrameId(frame_id),
            camera_key=camera.key,
            index=frame_id - 1,
            name=f"{frame_id:06d}.jpg",
            width=camera.width,
            height=camera.height,
            captured_at_s=0.1 * frame_id,
            received_at_s=0.1 * frame_id,
            features=features,
            gps=gps,
            intrinsics_prior=camera.prior,
        )

    def tracked(self, frame_id: int, *, keyframe_id: int) -> TrackedFrame:
        """A frame between keyframes: where the keyframe's points are in it."""
        own, keyframe = self.view(frame_id), self.view(keyframe_id)
        _, own_rows, keyframe_rows = np.intersect1d(
            own.point_ids, keyframe.point_ids, return_indices=True
        )
        return TrackedFrame(
            frame_id=FrameId(frame_id),
            keyframe_id=FrameId(keyframe_id),
            index=frame_id - 1,
            captured_at_s=0.1 * frame_id,
            received_at_s=0.1 * frame_id,
            keypoint_idx=keyframe_rows,
            points_xy=own.points_xy[own_rows],
        )

    def gps(self, frame_id: int, *, metres_per_unit: float = 1.0) -> GpsFix:
        """The exact fix of a frame, the world's origin lying at 0 north, 0 east."""
        east_m, north_m, up_m = (metres_per_unit * camera_center(self.pose(frame_id))).tolist()
        per_latitude, per_longitude = _EQUATOR_METRES_PER_DEGREE
        return GpsFix(
            latitude_deg=north_m / per_latitude,
            longitude_deg=east_m / per_longitude,
            altitude_m=up_m,
        )

    def matches(self, pair: ImagePair) -> Uint32Array:
        """Rows (M, 2) of keypoints that look the same, in a fixed order."""
        first, second = self.view(pair.first), self.view(pair.second)
        _, rows1, rows2 = np.intersect1d(
            self.looks_like[first.point_ids],
            self.looks_like[second.point_ids],
            return_indices=True,
        )
        return np.column_stack([rows1, rows2]).astype(np.uint32)

    def verified_pair(
        self,
        one: int,
        other: int,
        *,
        wrong_ratio: float = 0.0,
        among: Collection[int] | None = None,
    ) -> VerifiedPair:
        """A pair as verification would pass it, with the true fundamental matrix.

        Args:
            one: a frame.
            other: another frame.
            wrong_ratio: share of the matches that are wrong.
            among: the points that may be matched; None for all.
        """
        pair = ImagePair.of(FrameId(one), FrameId(other))
        matches = self.matches(pair)
        if among is not None:
            matched = self.view(pair.first).point_ids[matches[:, 0]]
            matches = matches[np.isin(matched, list(among))]
        rng = np.random.default_rng((self._seed, 5, pair.first, pair.second))
        return VerifiedPair(
            pair=pair,
            reason=PairReason.EXHAUSTIVE,
            inlier_matches_idx=spoil_matches(matches, wrong_ratio=wrong_ratio, rng=rng),
            num_matches=len(matches),
            fundamental=self._fundamental(pair),
            homography_inlier_ratio=self.homography_inlier_ratio,
        )

    def _project(self, cam_from_world: Float64Array, camera: SyntheticCamera) -> View:
        in_cam = transform_points(cam_from_world, self.points)
        in_front = (in_cam[:, 2] > 0.5) | camera.sees_all_around
        near = in_front & (np.linalg.norm(in_cam, axis=1) < self._max_range)
        point_ids = np.flatnonzero(near)
        points_xy = np.asarray(camera.as_colmap().img_from_cam(in_cam[point_ids]))
        inside = ((points_xy > 0) & (points_xy < (camera.width, camera.height))).all(axis=1)
        return View(point_ids=point_ids[inside], points_xy=points_xy[inside])

    def _fundamental(self, pair: ImagePair) -> Float64Array:
        second_from_first = compose_poses(
            self.pose(pair.second), invert_pose(self.pose(pair.first))
        )
        essential = skew(second_from_first[:, 3]) @ second_from_first[:, :3]
        first_inverse, second_inverse = (
            np.linalg.inv(self.camera(i).as_colmap().calibration_matrix())
            for i in (pair.first, pair.second)
        )
        fundamental: Float64Array = second_inverse.T @ essential @ first_inverse
        return fundamental


class Photos(SyntheticWorld):
    """Frames of which nothing says that one was taken soon after another."""

    def keyframe(self, frame_id: int, *, gps: GpsFix | None = None) -> Keyframe:
        """A frame as the front end would hand it to mapping."""
        return replace(super().keyframe(frame_id, gps=gps), is_photo=True)


def repeated_place(
    points: Float64Array, *, x_range: tuple[float, float], shift: float, ratio: float, seed: int = 0
) -> tuple[Float64Array, Int64Array]:
    """Makes one place look like another: wallpaper, a facade, a row of the same chairs.

    Args:
        points: (P, 3).
        x_range: the place that is repeated, between two eastings.
        shift: how far east its copy stands.
        ratio: share of the copy's points that look like the original's; they replace others there.
        seed: which.

    Returns:
        Points (P, 3) and (P,) the look of each.
    """
    rng = np.random.default_rng((seed, 6))
    is_original = (points[:, 0] >= x_range[0]) & (points[:, 0] < x_range[1])
    is_copy = (points[:, 0] >= x_range[0] + shift) & (points[:, 0] < x_range[1] + shift)
    originals, copies = np.flatnonzero(is_original), np.flatnonzero(is_copy)
    num = int(ratio * min(len(originals), len(copies)))
    originals, copies = rng.permutation(originals)[:num], rng.permutation(copies)[:num]
    points, looks_like = points.copy(), np.arange(len(points))
    points[copies] = points[originals] + (shift, 0.0, 0.0)
    looks_like[copies] = originals
    return points, looks_like


def spoil_matches(
    matches: Uint32Array, *, wrong_ratio: float, rng: np.random.Generator
) -> Uint32Array:
    """Sends a share of the matches (M, 2) to keypoints of other matches."""
    num_wrong = int(wrong_ratio * len(matches))
    spoiled = matches.copy()
    wrong = rng.permutation(len(matches))[:num_wrong]
    spoiled[wrong, 1] = np.roll(spoiled[wrong, 1], 1)
    return spoiled


def _random_descriptors(rng: np.random.Generator, num: int) -> Uint8Array:
    """(num, 128) bytes as RootSIFT gives them: sparse histograms, 512 times the root of a share."""
    shares = rng.gamma(0.4, size=(num, 128))
    roots = np.sqrt(shares / shares.sum(axis=1, keepdims=True))
    descriptors: Uint8Array = np.clip(np.round(512 * roots), 0, 255).astype(np.uint8)
    return descriptors


# -- matching -------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class FakeMatcher:
    """Matches keyframes by the look of their points.

    ``dropped`` says which pairs find nothing; ``fails`` on which calls (0, 1, ...) matching raises.
    """

    world: SyntheticWorld
    wrong_ratio: float = 0.0
    dropped: Callable[[ImagePair], bool] = lambda pair: False
    fails: Collection[int] = ()
    calls: list[list[ImagePair]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "fake"

    @property
    def peak_gpu_mb(self) -> float:
        return 0.0

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do not."""
        return False

    def describe(self, frame: Frame) -> Features:
        raise InferenceError(f"{frame.name}: synthetic keyframes come described")

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        self.calls.append([request.pair for request in requests])
        if len(self.calls) - 1 in self.fails:
            raise InferenceError("out of memory")
        return [self._match(request) for request in requests]

    def _match(self, request: MatchRequest) -> PairMatches:
        pair = request.pair
        matches = self.world.matches(pair)
        if self.dropped(pair):
            matches = matches[:0]
        rng = np.random.default_rng((7, pair.first, pair.second))
        return PairMatches.of_rows(
            request,
            matches_idx=spoil_matches(matches, wrong_ratio=self.wrong_ratio, rng=rng),
            confidence=np.ones(len(matches), np.float32),
        )


def scene_graph(**settings: Any) -> SceneGraph:
    """A scene graph with real place recognition; ``settings`` of its section."""
    places = RetrievalConfig(num_words=64, first_vocabulary_at=6)
    recognizer = PlaceRecognizer(places, seed=0)
    return SceneGraph(SceneGraphConfig(**settings), recognizer=recognizer)


# -- maps -----------------------------------------------------------------------------------------


def map_of_keyframes(
    world: SyntheticWorld,
    *,
    frame_ids: Sequence[int] | None = None,
    max_gap: int = 5,
    wrong_ratio: float = 0.0,
    skips: Callable[[ImagePair], bool] = lambda pair: False,
    given_pairs: Sequence[VerifiedPair] = (),
    is_constant: bool = True,
    triangulation: TriangulationConfig | None = None,
) -> SparseMap:
    """A map with keyframes and pairs, none of them registered.

    Args:
        world: what they see.
        frame_ids: the keyframes in order of adding; by default all frames.
        max_gap: keyframes with at most so many others between them may make pairs.
        wrong_ratio: share of wrong matches in each pair.
        skips: pairs left out.
        given_pairs: more of them, of keyframes whose own pair is left out.
        is_constant: whether bundle adjustment must not change the calibrations.
        triangulation: thresholds.
    """
    sparse_map = SparseMap(
        triangulation=triangulation or TriangulationConfig(),
        registration=RegistrationConfig(),
        seed=0,
    )
    added: list[FrameId] = []
    camera_keys: set[str] = set()
    for frame_id in map(FrameId, frame_ids or world.frame_ids):
        camera = world.camera(frame_id)
        if camera.key not in camera_keys:
            colmap = camera.as_colmap()
            prior = CameraPrior.assumed(colmap, is_constant=is_constant)
            sparse_map.add_camera(camera.key, colmap, prior=prior)
            camera_keys.add(camera.key)
        pairs = [
            world.verified_pair(frame_id, other, wrong_ratio=wrong_ratio)
            for other in added
            if abs(other - frame_id) <= max_gap and not skips(ImagePair.of(frame_id, other))
            if len(world.matches(ImagePair.of(frame_id, other))) >= MIN_PAIR_MATCHES
        ]
        added.append(frame_id)
        pairs += [
            verified
            for verified in given_pairs
            if frame_id in (verified.pair.first, verified.pair.second)
            and {verified.pair.first, verified.pair.second} <= set(added)
        ]
        sparse_map.add_keyframe(world.keyframe(frame_id), pairs)
    return sparse_map


def add_unused_pair(sparse_map: SparseMap, verified: VerifiedPair) -> None:
    """Joins two keyframes of a map by a pair of whose matches it has made no use.

    So is a pair whose matches contradict the map when its second keyframe comes.
    """
    sparse_map._matches._add([verified])


def grow(sparse_map: SparseMap, world: SyntheticWorld, frame_ids: Sequence[int]) -> None:
    """Registers keyframes in the given order, the first two at their true distance."""
    first, second, *others = map(FrameId, frame_ids)
    second_from_first = compose_poses(world.pose(second), invert_pose(world.pose(first)))
    sparse_map.initialize(first, second, second_from_first=second_from_first)
    for frame_id in others:
        registration = sparse_map.register(frame_id, min_inlier_ratio=0.25)
        assert registration.status is RegistrationStatus.REGISTERED, (frame_id, registration)
        sparse_map.triangulate(frame_id)


def grown_map(world: SyntheticWorld, **settings: Any) -> SparseMap:
    """A map in which all frames are registered in order; ``settings`` of `map_of_keyframes`."""
    sparse_map = map_of_keyframes(world, **settings)
    grow(sparse_map, world, sparse_map.keyframe_ids)
    return sparse_map


def poses_of(sparse_map: SparseMap) -> dict[FrameId, Float64Array]:
    """The poses (3, 4) of the registered keyframes."""
    return {i: sparse_map.cam_from_world(i) for i in sparse_map.registered_ids}


# -- errors ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseErrors:
    """Errors of poses after the best similarity."""

    rmse_ratio: float  # of camera centres, of the extent of the true ones
    max_ratio: float
    max_rotation_rad: float


def pose_errors(estimated: Mapping[FrameId, Float64Array], world: SyntheticWorld) -> PoseErrors:
    """Compares poses (3, 4) with the true ones."""
    frame_ids = sorted(estimated)
    poses = np.array([estimated[i] for i in frame_ids])
    true_poses = np.array([world.pose(i) for i in frame_ids])
    true_from_estimated = similarity(camera_center(poses), camera_center(true_poses))
    placed = camera_center(poses) @ true_from_estimated[:, :3].T + true_from_estimated[:, 3]
    errors = np.linalg.norm(placed - camera_center(true_poses), axis=1)
    extent = float(np.linalg.norm(np.ptp(camera_center(true_poses), axis=0)))
    rotation = true_from_estimated[:, :3] / np.cbrt(np.linalg.det(true_from_estimated[:, :3]))
    differences = true_poses[:, :, :3] @ rotation @ np.swapaxes(poses[:, :, :3], 1, 2)
    cosines = (np.trace(differences, axis1=1, axis2=2) - 1.0) / 2.0
    return PoseErrors(
        rmse_ratio=float(np.sqrt((errors**2).mean())) / extent,
        max_ratio=float(errors.max()) / extent,
        max_rotation_rad=float(np.arccos(np.clip(cosines, -1.0, 1.0)).max()),
    )


def similarity(points_in_a: Float64Array, points_in_b: Float64Array) -> Float64Array:
    """The similarity (3, 4) that best maps points (N, 3) of a to b (Umeyama, 1991)."""
    mean_a, mean_b = points_in_a.mean(axis=0), points_in_b.mean(axis=0)
    centred_a, centred_b = points_in_a - mean_a, points_in_b - mean_b
    left, values, right = np.linalg.svd(centred_b.T @ centred_a)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    rotation = left @ np.diag(signs) @ right
    scale = float((values * signs).sum() / (centred_a**2).sum())
    return np.column_stack([scale * rotation, mean_b - scale * rotation @ mean_a])
