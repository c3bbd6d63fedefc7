"""The cameras of a run: their first calibration, and what pairs add to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.config import CamerasConfig, RegistrationConfig, TriangulationConfig
from engine.errors import MapError
from engine.events import CameraCalibrated, Event
from engine.mapping.cameras.cameras import (
    CameraCalibration,
    InitialCamera,
    initial_camera,
    with_focal_length,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import CalibrationOrigin, Features, FrameId, IntrinsicsPrior, Keyframe
from tests.support.synthetic import (
    EXACT_CAMERA,
    FOCAL_PX,
    SyntheticCamera,
    SyntheticWorld,
    grow,
    map_of_keyframes,
    scene_graph,
    straight_path,
)

UNKNOWN = SyntheticCamera(key="unknown", params=(600.0, 500.0, 375.0, 0.0))
WIDTH, HEIGHT = 640, 480
KNOWN_PRIOR = IntrinsicsPrior(
    focal_px=500.0, camera_model="PINHOLE", params=(500.0, 501.0, 322.0, 239.0)
)
EXIF_PRIOR = IntrinsicsPrior(focal_px=600.0)
ASSUMED_FOCAL_PX = 850.0  # 0.85 of the longer edge


class Cameras:
    """The cameras of a run and what they emitted."""

    def __init__(self, config: CamerasConfig | None = None) -> None:
        self.emitted: list[CameraCalibrated] = []
        self.calibration = CameraCalibration(config or CamerasConfig(), emit=self._emit)

    def _emit(self, event: Event) -> None:
        assert isinstance(event, CameraCalibrated)
        self.emitted.append(event)

    @property
    def origins(self) -> list[tuple[str, str]]:
        return [(event.camera_key, event.how) for event in self.emitted]


def empty_map() -> SparseMap:
    return SparseMap(triangulation=TriangulationConfig(), registration=RegistrationConfig(), seed=0)


def world_of(*cameras: SyntheticCamera, num_frames: int = 8) -> SyntheticWorld:
    return SyntheticWorld(straight_path(num_frames), cameras=cameras)


def graph_of(world: SyntheticWorld) -> SceneGraph:
    """All keyframes, each with its pairs to the four before."""
    graph = scene_graph()
    for frame_id in world.frame_ids:
        graph.add_keyframe(world.keyframe(frame_id))
        for other in range(max(1, frame_id - 4), frame_id):
            graph.record_pair(world.verified_pair(other, frame_id))
    return graph


def map_with_cameras(world: SyntheticWorld, cameras: Cameras) -> SparseMap:
    sparse_map = empty_map()
    for frame_id in world.frame_ids:
        cameras.calibration.add(world.keyframe(frame_id), sparse_map)
    return sparse_map


# -- where the first calibration comes from -------------------------------------------------------


def keyframe_of(
    prior: IntrinsicsPrior | None, *, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Keyframe:
    features = Features(
        frame_id=FrameId(1),
        keypoints_xy=np.empty((0, 2)),
        descriptors=np.empty((0, 128), np.uint8),
        scales=np.empty(0, np.float32),
        colors=np.empty((0, 3), np.uint8),
    )
    return Keyframe(
        frame_id=FrameId(1),
        camera_key="camera",
        index=0,
        name="000001.jpg",
        width=size[0],
        height=size[1],
        captured_at_s=0.0,
        received_at_s=0.0,
        features=features,
        intrinsics_prior=prior,
    )


def initial(prior: IntrinsicsPrior | None, **settings: Any) -> InitialCamera:
    return initial_camera(keyframe_of(prior), CamerasConfig(**settings))


def test_without_any_word_the_focal_length_is_assumed_from_the_longer_edge() -> None:
    for size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
        assumed = initial_camera(
            keyframe_of(None, size=size),
            CamerasConfig(model="SIMPLE_RADIAL", default_focal_ratio=0.9),
        )
        assert assumed.prior.origin is CalibrationOrigin.ASSUMED
        assert not assumed.camera.has_prior_focal_length
        assert assumed.camera.model_name == "SIMPLE_RADIAL"
        assert assumed.camera.params.tolist() == [576.0, size[0] / 2, size[1] / 2, 0.0]
        assert (assumed.camera.width, assumed.camera.height) == size


def test_exif_gives_the_focal_length_of_the_configured_model() -> None:
    from_exif = initial(EXIF_PRIOR, model="OPENCV")
    assert from_exif.prior.origin is CalibrationOrigin.EXIF
    assert from_exif.camera.has_prior_focal_length
    assert from_exif.camera.params.tolist() == [600.0, 600.0, 320.0, 240.0, 0.0, 0.0, 0.0, 0.0]
    assert not from_exif.prior.is_constant


def test_a_configured_focal_length_wins_over_exif_but_not_over_a_whole_calibration() -> None:
    assert initial(EXIF_PRIOR, focal_px=700.0).camera.mean_focal_length() == 700.0
    assert initial(EXIF_PRIOR, focal_px=700.0).prior.origin is CalibrationOrigin.CONFIGURED
    assert initial(KNOWN_PRIOR, focal_px=700.0).camera.params.tolist() == list(
        KNOWN_PRIOR.params or ()
    )


def test_a_source_that_knows_everything_is_believed_and_left_alone() -> None:
    known = initial(KNOWN_PRIOR, model="SIMPLE_RADIAL")
    assert known.prior.origin is CalibrationOrigin.KNOWN
    assert known.prior.is_constant
    assert known.camera.has_prior_focal_length
    assert known.camera.model_name == "PINHOLE"
    assert known.camera.params.tolist() == [500.0, 501.0, 322.0, 239.0]


def test_a_configured_calibration_wins_over_everything() -> None:
    params = (510.0, 511.0, 320.0, 240.0)
    configured = initial(KNOWN_PRIOR, model="PINHOLE", params=params)
    assert configured.prior.origin is CalibrationOrigin.CONFIGURED
    assert configured.camera.params.tolist() == list(params)
    assert configured.camera.has_prior_focal_length
    assert not configured.prior.is_constant


@pytest.mark.parametrize("prior", [None, EXIF_PRIOR, KNOWN_PRIOR])
def test_fixed_intrinsics_are_fixed_whoever_gave_them(prior: IntrinsicsPrior | None) -> None:
    assert initial(prior, intrinsics="fixed").prior.is_constant
    assert not initial(prior, refine_known_intrinsics=True).prior.is_constant


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ("PINHOLE", (500.0, 320.0, 240.0)),
        ("PINHOLE", ()),
        ("SIMPLE_RADIAL", (500.0, 320.0, 240.0, 0.0, 0.0)),
        ("FISHY", (500.0, 320.0, 240.0)),
        ("INVALID", (500.0,)),
    ],
)
def test_a_calibration_that_does_not_fit_its_model_is_refused(
    model: str, params: tuple[float, ...]
) -> None:
    prior = IntrinsicsPrior(focal_px=500.0, camera_model=model, params=params)
    with pytest.raises(MapError, match=f"000001.jpg: .*{model}"):
        initial(prior)


@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "OPENCV"])
def test_another_focal_length_leaves_a_centred_camera_without_distortion(model: str) -> None:
    camera = pycolmap.Camera.create_from_model_name(1, model, 500.0, WIDTH, HEIGHT)
    camera.params = [value + 0.1 for value in camera.params]
    before = camera.params.tolist()
    params = with_focal_length(camera, 800.0)

    assert camera.params.tolist() == before
    camera.params = params
    assert camera.mean_focal_length() == 800.0
    pixels_xy = np.array([[WIDTH / 2, HEIGHT / 2], [WIDTH / 2 + 400.0, HEIGHT / 2]])
    assert np.allclose(camera.cam_from_img(pixels_xy), [[0.0, 0.0], [0.5, 0.0]])


# -- the cameras of a map --------------------------------------------------------------------------


def test_each_camera_is_met_and_told_once() -> None:
    exif = SyntheticCamera(key="exif", prior=IntrinsicsPrior(focal_px=820.0))
    world = world_of(SyntheticCamera.known("known"), exif, UNKNOWN)
    cameras = Cameras()
    sparse_map = map_with_cameras(world, cameras)
    assert cameras.origins == [("known", "known"), ("exif", "exif"), ("unknown", "assumed")]
    assert [event.focal_px for event in cameras.emitted] == [FOCAL_PX, 820.0, ASSUMED_FOCAL_PX]
    assert sparse_map.camera("known").params.tolist() == list(EXACT_CAMERA)
    ids = [sparse_map.camera(key).camera_id for key in ("known", "exif", "unknown")]
    assert ids == [1, 2, 3]


def test_only_known_calibrations_are_constant_unless_all_are_fixed() -> None:
    world = world_of(SyntheticCamera.known("known"), UNKNOWN)
    for config, constant in (
        (CamerasConfig(), {1}),
        (CamerasConfig(refine_known_intrinsics=True), set()),
        (CamerasConfig(intrinsics="fixed"), {1, 2}),
    ):
        cameras = Cameras(config)
        sparse_map = map_with_cameras(world, cameras)
        assert sparse_map.constant_camera_ids == constant
        fresh = empty_map()
        cameras.calibration.add_all(fresh, like=sparse_map)
        assert fresh.constant_camera_ids == constant


def test_copies_do_not_reach_the_map() -> None:
    cameras = Cameras()
    sparse_map = map_with_cameras(world_of(SyntheticCamera.known("one"), UNKNOWN), cameras)
    copies = cameras.calibration.copies(sparse_map)
    assert [copy.camera_id for copy in copies] == [1, 2]
    copies[0].params = [1.0, 2.0, 3.0, 4.0]
    assert sparse_map.camera("one").params.tolist() == list(EXACT_CAMERA)


def test_a_new_map_gets_all_cameras_as_calibrated_now() -> None:
    cameras = Cameras()
    present = map_with_cameras(world_of(SyntheticCamera.known("one"), UNKNOWN), cameras)
    present.set_camera_params("unknown", (612.0, 500.0, 375.0, 0.02))
    fresh = empty_map()
    cameras.calibration.add_all(fresh, like=present)
    assert fresh.camera("unknown").params.tolist() == [612.0, 500.0, 375.0, 0.02]
    assert fresh.camera("unknown").camera_id == present.camera("unknown").camera_id
    fresh.set_camera_params("unknown", UNKNOWN.params)
    assert present.camera("unknown").mean_focal_length() == 612.0


def test_a_camera_whose_calibration_does_not_fit_its_model_is_not_added() -> None:
    prior = IntrinsicsPrior(focal_px=800.0, camera_model="PINHOLE", params=(800.0, 500.0))
    cameras, sparse_map = Cameras(), empty_map()
    keyframe = world_of(SyntheticCamera(prior=prior)).keyframe(1)
    with pytest.raises(MapError):
        cameras.calibration.add(keyframe, sparse_map)
    with pytest.raises(KeyError):
        sparse_map.camera("camera")
    cameras.calibration.add(dataclasses.replace(keyframe, intrinsics_prior=None), sparse_map)
    assert cameras.origins == [("camera", "assumed")]


# -- from pairs -----------------------------------------------------------------------------------


def test_pairs_give_the_focal_length_of_a_camera_nobody_knows() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map, graph = map_with_cameras(world, cameras), graph_of(world)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert cameras.origins == [("unknown", "assumed"), ("unknown", "two_view_geometries")]
    focal_px = sparse_map.camera("unknown").mean_focal_length()
    assert focal_px == cameras.emitted[-1].focal_px
    assert abs(focal_px - 600.0) < 0.03 * 600.0
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert len(cameras.emitted) == 2  # nothing new


def test_pairs_of_two_cameras_give_each_its_own() -> None:
    other = dataclasses.replace(UNKNOWN, key="other", params=(1000.0, 500.0, 375.0, 0.0))
    world, cameras = world_of(UNKNOWN, other, num_frames=12), Cameras()
    sparse_map = map_with_cameras(world, cameras)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph_of(world))
    for camera in (UNKNOWN, other):
        focal_px = sparse_map.camera(camera.key).mean_focal_length()
        assert abs(focal_px - camera.params[0]) < 0.05 * camera.params[0]


def test_a_calibration_from_elsewhere_is_left_alone() -> None:
    exif = dataclasses.replace(UNKNOWN, key="exif", prior=IntrinsicsPrior(focal_px=700.0))
    known = SyntheticCamera.known("known")
    world, cameras = world_of(exif, known), Cameras()
    sparse_map = map_with_cameras(world, cameras)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph_of(world))
    assert sparse_map.camera("exif").mean_focal_length() == 700.0
    assert sparse_map.camera("known").mean_focal_length() == FOCAL_PX
    assert len(cameras.emitted) == 2


def test_pairs_have_no_say_once_the_map_holds_the_camera() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    present = map_of_keyframes(world)
    grow(present, world, world.frame_ids)
    cameras.calibration.add(world.keyframe(1), empty_map())
    present.set_camera_params("unknown", (640.0, 500.0, 375.0, 0.0))
    cameras.calibration.calibrate_from_pairs(present, graph_of(world))
    assert present.camera("unknown").mean_focal_length() == 640.0


def test_without_pairs_the_assumption_stays() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map, graph = map_with_cameras(world, cameras), scene_graph()
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert sparse_map.camera("unknown").mean_focal_length() == ASSUMED_FOCAL_PX
    assert len(cameras.emitted) == 1


# -- what a matcher sees --------------------------------------------------------------------------


def test_what_a_matcher_sees_counts_before_pairs() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map, graph = map_with_cameras(world, cameras), graph_of(world)
    for focal_px in (500.0, 610.0, 605.0, 5000.0, 590.0):
        cameras.calibration.add_focal_length("unknown", focal_px)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert cameras.origins == [("unknown", "assumed"), ("unknown", "pointmaps")]
    assert sparse_map.camera("unknown").mean_focal_length() == 605.0, "the median"
    assert cameras.emitted[-1].focal_px == 605.0
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert len(cameras.emitted) == 2  # nothing new
    cameras.calibration.add_focal_length("unknown", 615.0)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert cameras.emitted[-1].focal_px == 607.5


def test_what_is_seen_of_one_camera_says_nothing_of_another() -> None:
    other = dataclasses.replace(UNKNOWN, key="other", params=(1000.0, 500.0, 375.0, 0.0))
    world, cameras = world_of(UNKNOWN, other), Cameras()
    sparse_map = map_with_cameras(world, cameras)
    cameras.calibration.add_focal_length("other", 990.0)
    cameras.calibration.calibrate_from_pairs(sparse_map, scene_graph())
    assert sparse_map.camera("other").mean_focal_length() == 990.0
    assert sparse_map.camera("unknown").mean_focal_length() == ASSUMED_FOCAL_PX


def test_only_the_latest_sights_count() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map = map_with_cameras(world, cameras)
    for focal_px in [900.0] * 600 + [600.0] * 300:
        cameras.calibration.add_focal_length("unknown", focal_px)
    cameras.calibration.calibrate_from_pairs(sparse_map, scene_graph())
    assert sparse_map.camera("unknown").mean_focal_length() == 600.0  # 300 of the last 500


def test_a_calibration_from_elsewhere_is_better_than_what_is_seen() -> None:
    exif = dataclasses.replace(UNKNOWN, key="exif", prior=IntrinsicsPrior(focal_px=700.0))
    known = SyntheticCamera.known("known")
    cameras = Cameras()
    sparse_map = map_with_cameras(world_of(exif, known), cameras)
    for key in ("exif", "known"):
        cameras.calibration.add_focal_length(key, 640.0)
        assert not cameras.calibration.is_unknown(key, sparse_map)
    cameras.calibration.calibrate_from_pairs(sparse_map, scene_graph())
    assert sparse_map.camera("exif").mean_focal_length() == 700.0
    assert sparse_map.camera("known").mean_focal_length() == FOCAL_PX


def test_a_camera_is_unknown_until_the_map_holds_one_of_its_keyframes() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    present = map_of_keyframes(world)
    cameras.calibration.add(world.keyframe(1), empty_map())
    assert cameras.calibration.is_unknown("unknown", present)
    grow(present, world, world.frame_ids)
    assert not cameras.calibration.is_unknown("unknown", present)
    present.set_camera_params("unknown", (640.0, 500.0, 375.0, 0.0))
    cameras.calibration.add_focal_length("unknown", 615.0)
    cameras.calibration.calibrate_from_pairs(present, graph_of(world))
    assert present.camera("unknown").mean_focal_length() == 640.0
