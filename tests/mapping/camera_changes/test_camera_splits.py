"""Cameras that zoom: split where frames contradict one focal length, and never otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.config import CamerasConfig, Config
from engine.estimators.calibration_votes import CalibrationVote
from engine.events import CameraDoubted, CameraSplit, ZoomSearched
from engine.mapping.camera_changes import camera_splits, trial_maps
from engine.mapping.camera_changes.zoom_levels import ZoomLevel
from engine.types import Float64Array, IntrinsicsPrior
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.synthetic import (
    EXACT_CAMERA,
    FLIGHT_HEIGHT,
    FOCAL_PX,
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    look_at,
    pose_errors,
    poses_of,
    round_path,
    scene_graph,
    straight_path,
)

pytestmark = pytest.mark.slow

NUM_FRAMES = 14
SHORT, LONG = 0.9 * FOCAL_PX, 1.35 * FOCAL_PX


def camera(focal_px: float, *, prior: IntrinsicsPrior | None = None) -> SyntheticCamera:
    return SyntheticCamera(params=(focal_px, *EXACT_CAMERA[1:]), prior=prior)


def world_of(
    focals_px: Sequence[float], *, poses: Float64Array | None = None, **settings: Any
) -> SyntheticWorld:
    """One camera whose frames have these focal lengths."""
    distinct = sorted(set(focals_px))
    return SyntheticWorld(
        straight_path(len(focals_px), step=1.2) if poses is None else poses,
        cameras=[camera(focal_px, **settings) for focal_px in distinct],
        camera_idx=[distinct.index(focal_px) for focal_px in focals_px],
        noise_px=0.3,
    )


def run(world: SyntheticWorld, *, config: Config = WITHOUT_WINDOWS) -> MapperRun:
    """Feeds all frames as keyframes and finishes."""
    mapped = MapperRun(config, matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in world.frame_ids:
        mapped.add_keyframe(world.keyframe(frame_id))
    mapped.end()
    return mapped


def focal_px(mapped: MapperRun, frame_id: int) -> float:
    keyframe = mapped.graph.keyframe(mapped.graph.keyframe_ids[frame_id - 1])
    return float(mapped.sparse_map.camera(keyframe.calibration_key).mean_focal_length())


@pytest.mark.parametrize(
    "focals_px",
    [
        pytest.param([SHORT, LONG] * 7, id="every other photo"),
        pytest.param([SHORT, SHORT, 1.3 * SHORT] * 5, id="every third photo, a little"),
        pytest.param([SHORT] * 8 + [1.6 * SHORT] * 6, id="a step in a video"),
    ],
)
def test_frames_that_contradict_one_focal_length_split_their_camera(
    focals_px: list[float],
) -> None:
    world = world_of(focals_px)
    mapped = run(world)

    assert mapped.emitted(CameraSplit)
    assert mapped.registered_ids == world.frame_ids
    for frame_id, expected_px in enumerate(focals_px, start=1):
        assert focal_px(mapped, frame_id) == pytest.approx(expected_px, rel=0.02)
    assert 1e-5 < pose_errors(poses_of(mapped.sparse_map), world).rmse_ratio < 3e-3
    (split, *_) = mapped.emitted(CameraSplit)
    assert split.camera_key == "camera"
    assert split.calibration_keys == ("camera", "camera#2")
    assert set(split.frame_ids) <= set(world.frame_ids)
    assert set(split.calibration_idx) == {0, 1}


def test_no_camera_is_split_when_that_is_not_wanted() -> None:
    cameras = CamerasConfig(split=False, recognise_lenses=False)
    mapped = run(
        world_of([SHORT, LONG] * 4), config=WITHOUT_WINDOWS.model_copy(update={"cameras": cameras})
    )
    assert not mapped.emitted(CameraSplit)
    assert focal_px(mapped, 1) == focal_px(mapped, 2)


def walking_towards(num: int) -> Float64Array:
    """A camera that walks straight towards what it sees."""
    target = np.array([30.0, 0.0, 1.0])
    centers = np.column_stack(
        [np.linspace(0.0, 16.0, num), 0.3 * np.sin(np.arange(num)), np.full(num, FLIGHT_HEIGHT)]
    )
    return np.array([look_at(center, target) for center in centers])


@pytest.mark.parametrize(
    "poses",
    [
        pytest.param(straight_path(NUM_FRAMES, step=1.2), id="forward flight"),
        pytest.param(round_path(NUM_FRAMES, turns=0.3), id="round flight"),
        pytest.param(walking_towards(NUM_FRAMES), id="walking towards things"),
    ],
)
def test_a_camera_that_only_moves_is_not_split(poses: Float64Array) -> None:
    mapped = run(world_of([SHORT] * NUM_FRAMES, poses=poses))
    assert not mapped.emitted(CameraSplit)
    assert not [event for event in mapped.emitted(CameraDoubted) if "zoomed" in event.reason]
    assert mapped.registered_ids == mapped.graph.keyframe_ids
    assert len({mapped.graph.keyframe(i).calibration_key for i in mapped.registered_ids}) == 1


def test_a_calibration_that_was_given_is_never_split() -> None:
    params = (SHORT, *EXACT_CAMERA[1:])
    prior = IntrinsicsPrior(focal_px=SHORT, camera_model="SIMPLE_RADIAL", params=params)
    mapped = run(world_of([SHORT, LONG] * 4, prior=prior))
    assert not mapped.emitted(CameraSplit)


def test_a_split_is_journaled_for_all_its_keyframes() -> None:
    world = world_of([SHORT, LONG] * 7)
    mapped = MapperRun(WITHOUT_WINDOWS, matcher=FakeMatcher(world=world), graph=scene_graph())
    cameras = {}
    for frame_id in world.frame_ids:
        step = mapped.add_keyframe(world.keyframe(frame_id))
        assert step.record is not None
        cameras[frame_id] = step.record.camera.camera_id
        cameras.update({i: one.camera_id for i, one in step.recalibrated.items()})
    cameras.update({i: one.camera_id for i, one in mapped.end().recalibrated.items()})
    reconstruction = mapped.sparse_map.reconstruction
    assert cameras == {i: reconstruction.image(i).camera_id for i in world.frame_ids}
    assert len(set(cameras.values())) == 2
    assert len(mapped.mapper.cameras()) == 2


def test_a_large_map_is_split_around_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_maps, "MAX_ANEW", 0)
    monkeypatch.setattr(camera_splits, "MAX_ANEW", 0)
    focals_px = [SHORT] * 8 + [1.6 * SHORT] * 6
    world = world_of(focals_px)
    mapped = run(world)
    assert mapped.emitted(CameraSplit)
    assert mapped.registered_ids == world.frame_ids
    assert focal_px(mapped, 14) / focal_px(mapped, 1) == pytest.approx(1.6, rel=0.01)
    assert 1e-5 < pose_errors(poses_of(mapped.sparse_map), world).rmse_ratio < 3e-3


def test_a_zoom_that_no_map_confirms_is_doubted_with_its_frames(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(camera_splits, "fits_better", lambda *maps, changed: False)
    mapped = run(world_of([SHORT, LONG] * 3))
    assert not mapped.emitted(CameraSplit)
    reasons = [event.reason for event in mapped.emitted(CameraDoubted)]
    (reason,) = [reason for reason in reasons if "zoomed" in reason]
    assert "(frame 0, frame 2, frame 4)" in reason or "(frame 1, frame 3, frame 5)" in reason
    (figures,) = mapped.figures.cameras
    assert reason in figures.doubts


def test_a_zoom_for_which_pairs_vote_is_not_doubted_any_more_when_a_map_denies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_of([SHORT] * 10)
    levels = [
        ZoomLevel(frame_ids=tuple(world.frame_ids[:6]), log_zoom=0.0),
        ZoomLevel(frame_ids=tuple(world.frame_ids[6:]), log_zoom=0.15),
    ]
    vote = CalibrationVote(focal_px=SHORT, cost=0.05)
    mapped = MapperRun(WITHOUT_WINDOWS, matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in world.frame_ids:
        mapped.add_keyframe(world.keyframe(frame_id))
    splits = mapped.mapper._splits
    monkeypatch.setattr(splits, "_voted", lambda *of: (levels, vote))
    splits._suspected.add("camera")
    splits._num_examined.clear()
    splits._num_failed["camera"] = 3
    splits._doubt("camera", world.frame_ids[6:])
    assert splits.find(mapped.sparse_map, is_final=True) is None
    assert splits.facts()["num_examined"] == {"camera": 10}
    assert splits.facts()["unconfirmed"] == splits.facts()["num_failed"] == {}
    (figures,) = mapped.mapper.figures().cameras
    assert "zoom" not in figures.doubt_kinds  # what was doubted when less was known


def test_a_large_jump_that_the_pairs_cannot_vote_on_is_tried_by_maps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(camera_splits.CameraSplits, "_voted", lambda *of: None)
    focals_px = [SHORT] * 8 + [2.0 * SHORT] * 6
    world = world_of(focals_px)
    mapped = run(world)
    assert mapped.emitted(CameraSplit)
    assert mapped.registered_ids == world.frame_ids
    assert focal_px(mapped, 14) / focal_px(mapped, 1) == pytest.approx(2.0, rel=0.02)
    assert 1e-5 < pose_errors(poses_of(mapped.sparse_map), world).rmse_ratio < 3e-3


def test_keyframes_with_a_place_in_another_map_do_not_make_their_level_unplaced() -> None:
    world = world_of([SHORT] * 6)
    mapped = run(world)
    level = ZoomLevel(frame_ids=tuple(world.frame_ids), log_zoom=0.0)
    apart = world.frame_ids[2:]
    mapped.sparse_map.deregister(apart)
    unplaced = camera_splits._unplaced_ids
    assert unplaced(mapped.sparse_map, [level], apart=()) == world.frame_ids
    assert unplaced(mapped.sparse_map, [level], apart=apart) == []
    assert unplaced(mapped.sparse_map, [level], apart=apart[3:]) == world.frame_ids[:5]


def test_a_large_jump_that_no_map_confirms_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_splits.CameraSplits, "_voted", lambda *of: None)
    monkeypatch.setattr(camera_splits, "fits_better", lambda *maps, changed: False)
    world = world_of([SHORT] * 6 + [2.0 * SHORT] * 4)
    mapped = run(world)
    assert not mapped.emitted(CameraSplit)
    reasons = [event.reason for event in mapped.emitted(CameraDoubted)]
    (reason,) = [reason for reason in reasons if "zoomed" in reason]
    assert "(frames 6 to 9)" in reason
    *_, searched = mapped.emitted(ZoomSearched)
    assert searched.frame_ids == tuple(world.frame_ids[6:])
    (figures,) = mapped.figures.cameras
    assert reason in figures.doubts


def test_keyframes_of_a_split_camera_that_stay_out_are_named() -> None:
    world = world_of([SHORT, LONG] * 6)
    mapped = MapperRun(WITHOUT_WINDOWS, matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in world.frame_ids:
        mapped.add_keyframe(world.keyframe(frame_id))
    mapped.sparse_map.deregister([world.frame_ids[-1]])
    mapped.mapper._splits.report_missing(mapped.sparse_map)
    reasons = [event.reason for event in mapped.emitted(CameraDoubted)]
    (reason,) = [reason for reason in reasons if "stay out" in reason]
    assert "(frame 11)" in reason
