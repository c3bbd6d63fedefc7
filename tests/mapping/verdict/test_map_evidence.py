"""Evidence about a map: right ones are undisputed, wrong places and turning show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.estimators.pair_fit import PairFits, PairSamples, fit_pairs
from engine.geometry import camera_center, rotation_from_vector
from engine.mapping.model.calibration_control import wanted_focal
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.verdict.flying_height import flying_height_m, flying_height_of_model_m
from engine.mapping.verdict.map_evidence import Beside, MapEvidence, gather
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId, ImagePair
from tests.support.placed_maps import placed
from tests.support.synthetic import (
    FLIGHT_HEIGHT,
    SyntheticWorld,
    ground,
    grown_map,
    map_of_keyframes,
    round_path,
    scene_graph,
    straight_path,
    turning_path,
)

MOVED = FrameId(7)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(round_path(12, turns=0.4), noise_px=0.4)


def graph_of(sparse_map: SparseMap) -> SceneGraph:
    """The keyframes and pairs of a map as a scene graph."""
    graph = scene_graph()
    for frame_id in sparse_map.keyframe_ids:
        graph.add_keyframe(sparse_map.keyframe(frame_id))
    for frame_id in sparse_map.keyframe_ids:
        for other, verified in sparse_map.neighbors(frame_id).items():
            if other < frame_id:
                graph.record_pair(verified)
    return graph


def evidence_of(sparse_map: SparseMap) -> MapEvidence:
    return gather(sparse_map, graph_of(sparse_map), Beside())


def move(sparse_map: SparseMap, frame_id: FrameId, shift: tuple[float, float, float]) -> None:
    """Puts a keyframe elsewhere, turned as before."""
    pose = sparse_map.cam_from_world(frame_id)
    center = camera_center(pose) + np.array(shift)
    sparse_map.set_pose(frame_id, np.column_stack([pose[:, :3], -pose[:, :3] @ center]))


@pytest.mark.parametrize("wrong_ratio", [0.0, 0.15])
def test_a_right_map_is_undisputed(world: SyntheticWorld, wrong_ratio: float) -> None:
    evidence = evidence_of(grown_map(world, wrong_ratio=wrong_ratio))
    assert evidence.pairs.num_pairs >= 20
    assert evidence.pairs.disputed_ratio < 0.05
    assert max(place.disputed_ratio for place in evidence.places) < 0.2
    assert min(place.parallax_px for place in evidence.places) > 10.0
    assert evidence.unplaced == ()


def test_a_keyframe_in_the_wrong_place_is_disputed_by_its_own_pairs(world: SyntheticWorld) -> None:
    sparse_map = grown_map(world)
    move(sparse_map, MOVED, (0.0, 0.0, 1.5))
    places = {place.keyframe.frame_id: place for place in evidence_of(sparse_map).places}
    assert places[MOVED].disputed_ratio > 0.8
    assert places[MOVED].num_pairs >= 3
    far = [place for i, place in places.items() if abs(i - MOVED) > 5]
    assert max(place.disputed_ratio for place in far) < 0.2


@pytest.mark.parametrize(
    ("gain", "explained", "ratio"),
    [(8.0, 1.0, 0.0), (14.0, 0.95, 0.175), (40.0, 0.8, 0.5), (120.0, 0.8, 1.0), (14.0, 0.4, 1.0)],
)
def test_pairs_speak_against_a_place_as_clearly_as_they_prefer_another(
    world: SyntheticWorld,
    monkeypatch: pytest.MonkeyPatch,
    gain: float,
    explained: float,
    ratio: float,
) -> None:
    """As where somebody walks before the camera: a few matches are of what moves."""

    def fit(samples: PairSamples) -> PairFits:
        fits = fit_pairs(samples)
        num, width = fits.errors_px.shape
        num_explained = explained * samples.is_used.sum(axis=1, keepdims=True)
        return replace(
            fits,
            errors_px=np.where(np.arange(width) < num_explained, 0.5, 9.0),
            swung_rad=np.full(num, 0.2),
            gain=np.full(num, gain),
        )

    monkeypatch.setattr("engine.mapping.verdict.map_evidence.fit_pairs", fit)
    evidence = evidence_of(grown_map(world))
    assert [place.disputed_ratio for place in evidence.places] == pytest.approx([ratio] * 12)
    assert evidence.pairs.disputed_ratio == float(gain > 10.0)


def test_where_two_halves_of_a_map_do_not_fit_places_are_disputed(world: SyntheticWorld) -> None:
    sparse_map = grown_map(world)
    turn = rotation_from_vector(np.radians([0.0, 0.0, 4.0]))
    for frame_id in sparse_map.registered_ids[6:]:
        pose = sparse_map.cam_from_world(frame_id)
        sparse_map.set_pose(frame_id, np.column_stack([pose[:, :3] @ turn, pose[:, 3]]))
    evidence = evidence_of(sparse_map)
    assert evidence.pairs.disputed_ratio > 0.1
    disputed = [place.disputed_ratio for place in evidence.places]
    assert max(disputed[5:7]) > 0.5
    assert max(disputed[:2] + disputed[-2:]) < 0.2


def test_a_wrong_focal_length_is_disputed() -> None:
    world = SyntheticWorld(round_path(12, turns=0.4), noise_px=0.4)
    sparse_map = grown_map(world)
    key = sparse_map.keyframe(FrameId(1)).calibration_key
    focal_px, *others = (float(value) for value in sparse_map.camera(key).params)
    sparse_map.set_camera_params(key, [1.3 * focal_px, *others])
    assert evidence_of(sparse_map).pairs.disputed_ratio > 0.4


def test_pairs_that_no_third_view_confirms_contradict_a_map_less() -> None:
    sparse_map = grown_map(SyntheticWorld(round_path(12, turns=0.4), noise_px=0.4))
    for frame_id in (FrameId(4), FrameId(9)):
        move(sparse_map, frame_id, (0.0, 0.0, 1.5))
    graph = graph_of(sparse_map)
    proven = gather(sparse_map, graph, Beside(is_agreed=lambda pair: True))
    unproven = gather(sparse_map, graph, Beside(is_agreed=lambda pair: False))
    trusted = gather(sparse_map, graph, Beside(is_agreed=lambda pair: False, confirms_pairs=False))
    assert proven.pairs.is_contested
    assert proven.pairs.disputed_ratio == trusted.pairs.disputed_ratio > 0.19
    assert unproven.pairs.disputed_ratio < 0.6 * proven.pairs.disputed_ratio
    assert max(place.num_confirming for place in unproven.places) == 0.0
    assert max(place.num_confirming for place in proven.places) >= 2.0
    assert max(place.proven_disputed_ratio for place in unproven.places) == 0.0
    assert max(place.proven_disputed_ratio for place in proven.places) > 0.5


def test_a_growing_map_asks_third_views_of_pairs_that_contradict_it_alone() -> None:
    sparse_map = grown_map(SyntheticWorld(round_path(12, turns=0.4), noise_px=0.4))
    for frame_id in (FrameId(4), FrameId(9)):
        move(sparse_map, frame_id, (0.0, 0.0, 1.5))
    graph = graph_of(sparse_map)
    asked: set[ImagePair] = set()

    def agrees(pair: ImagePair) -> bool:
        asked.add(pair)
        return pair.first != 4

    growing = gather(sparse_map, graph, Beside(is_agreed=agrees), asks_of_all=False)
    assert asked and all({4, 9} & {pair.first, pair.second} for pair in asked)
    at_its_end = gather(sparse_map, graph, Beside(is_agreed=agrees))
    assert not all({4, 9} & {pair.first, pair.second} for pair in asked)
    assert growing.pairs == at_its_end.pairs
    for one, other in zip(growing.places, at_its_end.places, strict=True):
        assert one.proven_disputed_ratio == other.proven_disputed_ratio
        assert one.num_confirming >= other.num_confirming


def test_third_views_are_not_asked_about_a_right_map(world: SyntheticWorld) -> None:
    def refuse(pair: ImagePair) -> bool:
        raise AssertionError(pair)

    sparse_map = grown_map(world)
    evidence = gather(sparse_map, graph_of(sparse_map), Beside(is_agreed=refuse))
    assert not evidence.pairs.is_contested


def test_the_images_want_the_focal_length_that_a_held_camera_should_have(
    world: SyntheticWorld,
) -> None:
    sparse_map = grown_map(world)
    key = sparse_map.keyframe(FrameId(1)).calibration_key
    camera = sparse_map.camera(key)
    right = wanted_focal(sparse_map.reconstruction, camera.camera_id)
    assert right is not None
    assert right.num_sigmas < 2.0
    focal_px, *others = (float(value) for value in camera.params)
    sparse_map.set_camera_params(key, [0.93 * focal_px, *others])
    wanted = wanted_focal(sparse_map.reconstruction, camera.camera_id)
    assert wanted is not None
    assert wanted.change > 0.02


def test_a_camera_that_turned_shows_no_parallax() -> None:
    world = SyntheticWorld(turning_path(8), noise_px=0.3)
    sparse_map = grown_map(SyntheticWorld(straight_path(8), noise_px=0.3))
    turned = evidence_of(posed_as(world))
    assert max(place.parallax_px for place in turned.places) < 2.0
    assert min(place.parallax_px for place in evidence_of(sparse_map).places) > 5.0


def posed_as(world: SyntheticWorld) -> SparseMap:
    """A map without points whose keyframes are where they were."""
    sparse_map = map_of_keyframes(world)
    sparse_map.place({frame_id: world.pose(frame_id) for frame_id in world.frame_ids})
    return sparse_map


def test_a_map_without_keyframes_has_no_places(world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(world)
    evidence = evidence_of(sparse_map)
    assert evidence.places == ()
    assert len(evidence.unplaced) == len(world.frame_ids)
    assert evidence.num_verified_pairs > 20


@pytest.mark.parametrize(("is_upside_down", "ratio"), [(False, 0.0), (True, 1.0)])
def test_a_map_upside_down_on_its_positions_looks_at_the_sky(
    world: SyntheticWorld, is_upside_down: bool, ratio: float
) -> None:
    sparse_map = posed_as(world)
    ids = sparse_map.registered_ids
    ahead = np.mean([sparse_map.cam_from_world(frame_id)[2, :3] for frame_id in ids], axis=0)
    # Rows of a rotation into east, north, up whose up is along the mean optical axis, or against.
    up = ahead / np.linalg.norm(ahead) * (1.0 if is_upside_down else -1.0)
    east = np.cross(up, (0.3, 0.5, 0.8))
    east /= np.linalg.norm(east)
    rotation = np.stack([east, np.cross(up, east), up])
    placement = placed(sparse_map, np.column_stack([3.0 * rotation, np.zeros(3)]))
    evidence = gather(sparse_map, graph_of(sparse_map), Beside(placement=placement))
    assert evidence.looks_up_ratio == ratio
    assert evidence.num_positions == len(ids)


@pytest.mark.parametrize(
    ("looks_down", "relief", "is_flight"),
    [(6.0, 0.5, True), (6.0, 5.0, False), (1.0, 0.5, False)],
    ids=["a survey", "hills", "a view ahead"],
)
def test_the_flying_height_is_that_of_cameras_that_look_down_on_flat_ground(
    looks_down: float, relief: float, is_flight: bool
) -> None:
    poses = straight_path(6, looks_down=looks_down)
    sparse_map = posed_as(SyntheticWorld(poses, points=ground(poses, relief=relief)))
    for frame_id in sparse_map.registered_ids:
        sparse_map.triangulate(frame_id)
    height_m = flying_height_m(sparse_map, placed(sparse_map, 3.0 * np.eye(3, 4)))
    assert (height_m is not None) is is_flight
    if height_m is not None:
        assert height_m == pytest.approx(3.0 * (FLIGHT_HEIGHT - relief / 2.0), rel=0.1)
    assert flying_height_m(sparse_map, None) is None
    stored = flying_height_of_model_m(sparse_map.reconstruction, 3.0 * np.eye(3, 4))
    assert stored == (None if height_m is None else pytest.approx(height_m, rel=0.02))
