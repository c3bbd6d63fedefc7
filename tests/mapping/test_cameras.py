"""The cameras of a run: their first calibration, and what pairs add to it."""

from __future__ import annotations

import dataclasses

import pytest

from engine.config import CamerasConfig, RegistrationConfig, TriangulationConfig
from engine.errors import MapError
from engine.events import CameraCalibrated, Event
from engine.mapping.cameras import CameraCalibration
from engine.mapping.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import IntrinsicsPrior
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
ASSUMED_FOCAL_PX = 850.0  # 0.85 of the longer edge


class Cameras:
    """The cameras of a run and what they told."""

    def __init__(self, config: CamerasConfig | None = None) -> None:
        self.told: list[CameraCalibrated] = []
        self.calibration = CameraCalibration(
            config or CamerasConfig(), emit=self._emit, clock=lambda: 1.5
        )

    def _emit(self, event: Event) -> None:
        assert isinstance(event, CameraCalibrated)
        self.told.append(event)

    @property
    def origins(self) -> list[tuple[str, str]]:
        return [(event.camera_key, event.how) for event in self.told]


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


def met(world: SyntheticWorld, cameras: Cameras) -> SparseMap:
    sparse_map = empty_map()
    for frame_id in world.frame_ids:
        cameras.calibration.meet(world.keyframe(frame_id), sparse_map)
    return sparse_map


# -- the first calibration ------------------------------------------------------------------------


def test_each_camera_is_met_and_told_once() -> None:
    exif = SyntheticCamera(key="exif", prior=IntrinsicsPrior(focal_px=820.0))
    world = world_of(SyntheticCamera.known("known"), exif, UNKNOWN)
    cameras = Cameras()
    sparse_map = met(world, cameras)
    assert cameras.origins == [("known", "known"), ("exif", "exif"), ("unknown", "assumed")]
    assert [event.focal_px for event in cameras.told] == [FOCAL_PX, 820.0, ASSUMED_FOCAL_PX]
    assert {event.at_s for event in cameras.told} == {1.5}
    assert sparse_map.camera("known").params.tolist() == list(EXACT_CAMERA)
    assert [sparse_map.camera_id(key) for key in ("known", "exif", "unknown")] == [1, 2, 3]


def test_only_known_calibrations_are_constant_unless_all_are_fixed() -> None:
    world = world_of(SyntheticCamera.known("known"), UNKNOWN)
    for config, constant in (
        (CamerasConfig(), {1}),
        (CamerasConfig(refine_known_intrinsics=True), set()),
        (CamerasConfig(intrinsics="fixed"), {1, 2}),
    ):
        cameras = Cameras(config)
        sparse_map = met(world, cameras)
        assert cameras.calibration.constant_ids(sparse_map) == constant


def test_copies_do_not_reach_the_map() -> None:
    cameras = Cameras()
    sparse_map = met(world_of(SyntheticCamera.known("one"), UNKNOWN), cameras)
    copies = cameras.calibration.copies(sparse_map)
    assert [copy.camera_id for copy in copies] == [1, 2]
    copies[0].params = [1.0, 2.0, 3.0, 4.0]
    assert sparse_map.camera("one").params.tolist() == list(EXACT_CAMERA)


def test_a_new_map_gets_all_cameras_as_calibrated_now() -> None:
    cameras = Cameras()
    present = met(world_of(SyntheticCamera.known("one"), UNKNOWN), cameras)
    present.set_camera_params("unknown", (612.0, 500.0, 375.0, 0.02))
    fresh = empty_map()
    cameras.calibration.add_all(fresh, like=present)
    assert fresh.camera("unknown").params.tolist() == [612.0, 500.0, 375.0, 0.02]
    assert fresh.camera_id("unknown") == present.camera_id("unknown")
    fresh.set_camera_params("unknown", UNKNOWN.params)
    assert present.camera("unknown").mean_focal_length() == 612.0


def test_a_calibration_that_does_not_fit_its_model_is_not_met() -> None:
    prior = IntrinsicsPrior(focal_px=800.0, camera_model="PINHOLE", params=(800.0, 500.0))
    cameras, sparse_map = Cameras(), empty_map()
    keyframe = world_of(SyntheticCamera(prior=prior)).keyframe(1)
    with pytest.raises(MapError):
        cameras.calibration.meet(keyframe, sparse_map)
    with pytest.raises(KeyError):
        sparse_map.camera("camera")
    cameras.calibration.meet(dataclasses.replace(keyframe, intrinsics_prior=None), sparse_map)
    assert cameras.origins == [("camera", "assumed")]


# -- from pairs -----------------------------------------------------------------------------------


def test_pairs_tell_the_focal_length_of_a_camera_nobody_knows() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map, graph = met(world, cameras), graph_of(world)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert cameras.origins == [("unknown", "assumed"), ("unknown", "two_view_geometries")]
    focal_px = sparse_map.camera("unknown").mean_focal_length()
    assert focal_px == cameras.told[-1].focal_px
    assert abs(focal_px - 600.0) < 0.03 * 600.0
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert len(cameras.told) == 2  # nothing new


def test_pairs_of_two_cameras_tell_each_its_own() -> None:
    other = dataclasses.replace(UNKNOWN, key="other", params=(1000.0, 500.0, 375.0, 0.0))
    world, cameras = world_of(UNKNOWN, other, num_frames=12), Cameras()
    sparse_map = met(world, cameras)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph_of(world))
    for camera in (UNKNOWN, other):
        focal_px = sparse_map.camera(camera.key).mean_focal_length()
        assert abs(focal_px - camera.params[0]) < 0.05 * camera.params[0]


def test_a_calibration_from_elsewhere_is_left_alone() -> None:
    exif = dataclasses.replace(UNKNOWN, key="exif", prior=IntrinsicsPrior(focal_px=700.0))
    known = SyntheticCamera.known("known")
    world, cameras = world_of(exif, known), Cameras()
    sparse_map = met(world, cameras)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph_of(world))
    assert sparse_map.camera("exif").mean_focal_length() == 700.0
    assert sparse_map.camera("known").mean_focal_length() == FOCAL_PX
    assert len(cameras.told) == 2


def test_pairs_have_no_say_once_the_map_holds_the_camera() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    present = map_of_keyframes(world)
    grow(present, world, world.frame_ids)
    cameras.calibration.meet(world.keyframe(1), empty_map())
    present.set_camera_params("unknown", (640.0, 500.0, 375.0, 0.0))
    cameras.calibration.calibrate_from_pairs(present, graph_of(world))
    assert present.camera("unknown").mean_focal_length() == 640.0


def test_pairs_that_do_not_tell_leave_the_assumption() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map, graph = met(world, cameras), scene_graph()
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert sparse_map.camera("unknown").mean_focal_length() == ASSUMED_FOCAL_PX
    assert len(cameras.told) == 1


# -- what a matcher sees --------------------------------------------------------------------------


def test_what_a_matcher_sees_counts_before_pairs() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map, graph = met(world, cameras), graph_of(world)
    for focal_px in (500.0, 610.0, 605.0, 5000.0, 590.0):
        cameras.calibration.note_seen("unknown", focal_px)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert cameras.origins == [("unknown", "assumed"), ("unknown", "pointmaps")]
    assert sparse_map.camera("unknown").mean_focal_length() == 605.0, "the median"
    assert cameras.told[-1].focal_px == 605.0
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert len(cameras.told) == 2  # nothing new
    cameras.calibration.note_seen("unknown", 615.0)
    cameras.calibration.calibrate_from_pairs(sparse_map, graph)
    assert cameras.told[-1].focal_px == 607.5


def test_what_is_seen_of_one_camera_tells_nothing_of_another() -> None:
    other = dataclasses.replace(UNKNOWN, key="other", params=(1000.0, 500.0, 375.0, 0.0))
    world, cameras = world_of(UNKNOWN, other), Cameras()
    sparse_map = met(world, cameras)
    cameras.calibration.note_seen("other", 990.0)
    cameras.calibration.calibrate_from_pairs(sparse_map, scene_graph())
    assert sparse_map.camera("other").mean_focal_length() == 990.0
    assert sparse_map.camera("unknown").mean_focal_length() == ASSUMED_FOCAL_PX


def test_only_the_latest_sights_count() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    sparse_map = met(world, cameras)
    for focal_px in [900.0] * 600 + [600.0] * 300:
        cameras.calibration.note_seen("unknown", focal_px)
    cameras.calibration.calibrate_from_pairs(sparse_map, scene_graph())
    assert sparse_map.camera("unknown").mean_focal_length() == 600.0  # 300 of the last 500


def test_a_calibration_from_elsewhere_is_better_than_what_is_seen() -> None:
    exif = dataclasses.replace(UNKNOWN, key="exif", prior=IntrinsicsPrior(focal_px=700.0))
    known = SyntheticCamera.known("known")
    cameras = Cameras()
    sparse_map = met(world_of(exif, known), cameras)
    for key in ("exif", "known"):
        cameras.calibration.note_seen(key, 640.0)
        assert not cameras.calibration.is_unknown(key, sparse_map)
    cameras.calibration.calibrate_from_pairs(sparse_map, scene_graph())
    assert sparse_map.camera("exif").mean_focal_length() == 700.0
    assert sparse_map.camera("known").mean_focal_length() == FOCAL_PX


def test_a_camera_is_unknown_until_the_map_holds_one_of_its_keyframes() -> None:
    world, cameras = world_of(UNKNOWN), Cameras()
    present = map_of_keyframes(world)
    cameras.calibration.meet(world.keyframe(1), empty_map())
    assert cameras.calibration.is_unknown("unknown", present)
    grow(present, world, world.frame_ids)
    assert not cameras.calibration.is_unknown("unknown", present)
    present.set_camera_params("unknown", (640.0, 500.0, 375.0, 0.0))
    cameras.calibration.note_seen("unknown", 615.0)
    cameras.calibration.calibrate_from_pairs(present, graph_of(world))
    assert present.camera("unknown").mean_focal_length() == 640.0
