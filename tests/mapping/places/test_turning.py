"""Cameras that turn without moving: no map, the words, and walks that keep their maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.config import Config, InitializationConfig, SceneGraphConfig
from engine.events import CameraTurning
from engine.geometry import camera_center
from engine.types import Float64Array, FrameId, IntrinsicsPrior
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.synthetic import (
    FLIGHT_HEIGHT,
    FakeMatcher,
    PoseErrors,
    SyntheticCamera,
    SyntheticWorld,
    ground,
    look_at,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
)

CONFIG = WITHOUT_WINDOWS.model_copy(update={"scene_graph": SceneGraphConfig(exhaustive_below=6)})
UNKNOWN = SyntheticCamera()
KNOWN = SyntheticCamera.known()
BY_EXIF = SyntheticCamera(prior=IntrinsicsPrior(focal_px=800.0))
STEP_RAD = 0.14  # from one keyframe of a turn to the next
DENSITY = 1.5


class Run(MapperRun):
    """A mapper fed with the keyframes of a synthetic world.

    Args:
        world: what they see.
        config: of the mapper.
    """

    def __init__(self, world: SyntheticWorld, *, config: Config = CONFIG) -> None:
        self.world = world
        super().__init__(config, matcher=FakeMatcher(world=world), graph=scene_graph())

    def errors(self, frame_ids: Sequence[int]) -> PoseErrors:
        """Of the poses of some registered keyframes."""
        poses = poses_of(self.sparse_map)
        return pose_errors({FrameId(i): poses[FrameId(i)] for i in frame_ids}, self.world)


def run(world: SyntheticWorld, **settings: Any) -> Run:
    mapped = Run(world, **settings)
    for frame_id in world.frame_ids:
        mapped.add_keyframe(world.keyframe(frame_id))
    mapped.end()
    return mapped


def turn_at(pose: Float64Array, num: int, *, start_rad: float = STEP_RAD) -> Float64Array:
    """Poses (num, 3, 4) at the place of a pose, turned away from where it looks step by step."""
    center, forward = camera_center(pose), pose[2, :3]
    heading = np.arctan2(forward[1], forward[0])
    headings = heading + start_rad + STEP_RAD * np.arange(num)
    slope = forward[2] / np.hypot(*forward[:2])
    aims = np.column_stack([np.cos(headings), np.sin(headings), np.full(num, slope)])
    return np.array([look_at(center, center + aim) for aim in aims])


def world_of(poses: Float64Array, *, camera: SyntheticCamera = UNKNOWN, **kwargs: Any) -> Any:
    return SyntheticWorld(poses, density=DENSITY, noise_px=0.4, cameras=[camera], **kwargs)


WALK = straight_path(8)
TURN = turn_at(straight_path(1)[0], 9)


# -- only turns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("camera", [UNKNOWN, KNOWN, BY_EXIF], ids=["unknown", "known", "exif"])
def test_a_camera_that_only_turns_makes_no_map_and_is_said_to_turn(camera: SyntheticCamera) -> None:
    mapped = run(world_of(TURN, camera=camera))
    assert mapped.registered_ids == []
    (stretch,) = mapped.figures.turning
    assert stretch.is_whole
    assert stretch.frame_ids == tuple(mapped.world.frame_ids)
    assert stretch.turned_rad == pytest.approx(8 * STEP_RAD, rel=0.1)
    first, *_ = mapped.emitted(CameraTurning)
    assert (first.first, first.last, first.num_keyframes) == (1, 4, 4)
    assert len(mapped.emitted(CameraTurning)) <= 4


def test_turning_photos_in_any_order_make_no_map_and_are_said_to_turn() -> None:
    order = np.random.default_rng(3).permutation(len(TURN))
    mapped = run(world_of(TURN[order]))
    assert mapped.registered_ids == []
    assert [stretch.is_whole for stretch in mapped.figures.turning] == [True]


def test_a_camera_that_turns_and_zooms_makes_no_map_and_is_said_to_turn() -> None:
    num = 12
    focals_px = 700.0 * 1.06 ** np.arange(num)
    cameras = [SyntheticCamera(params=(focal_px, 500.0, 375.0, 0.0)) for focal_px in focals_px]
    world = SyntheticWorld(
        turn_at(straight_path(1)[0], num), density=6.0, noise_px=0.4, cameras=cameras
    )
    mapped = run(world)
    assert mapped.registered_ids == []
    assert [stretch.is_whole for stretch in mapped.figures.turning] == [True]


def test_turns_are_said_but_not_refused_where_they_are_not_to_be() -> None:
    settings = InitializationConfig(refuse_turning=False)
    mapped = run(world_of(TURN), config=CONFIG.model_copy(update={"initialization": settings}))
    assert [stretch.is_whole for stretch in mapped.figures.turning] == [True]


# -- walks with turns -----------------------------------------------------------------------------


def test_a_walk_that_ends_with_a_turn_keeps_its_map() -> None:
    poses = np.concatenate([WALK, turn_at(WALK[-1], 7)])
    mapped = run(world_of(poses))
    alone = run(world_of(WALK, points=mapped.world.points))
    walk = range(1, len(WALK) + 1)
    assert set(walk) <= set(mapped.registered_ids)
    assert 1e-6 < mapped.errors(walk).rmse_ratio < 1.5 * alone.errors(walk).rmse_ratio
    assert 1e-6 < mapped.errors(mapped.registered_ids).max_ratio < 0.02
    (stretch,) = mapped.figures.turning
    assert not stretch.is_whole
    assert stretch.first >= len(WALK) - 1
    assert stretch.last == len(poses)


def test_a_turn_before_a_walk_does_not_start_its_map() -> None:
    turn = turn_at(WALK[0], 7)[::-1]
    poses = np.concatenate([turn, WALK])
    mapped = run(world_of(poses))
    walk = range(len(turn) + 1, len(poses) + 1)
    assert set(walk) <= set(mapped.registered_ids)
    assert 1e-6 < mapped.errors(mapped.registered_ids).max_ratio < 0.02
    assert mapped.figures.turning[0].first == 1
    assert not mapped.figures.turning[0].is_whole


def test_a_turn_on_the_way_is_said_from_its_first_keyframe_to_its_last() -> None:
    turn = turn_at(WALK[3], 6)
    poses = np.concatenate([WALK[:4], turn, turn[::-1][1:], WALK[4:]])
    mapped = run(world_of(poses))
    (stretch,) = mapped.figures.turning
    assert abs(stretch.first - 4) <= 1
    assert abs(stretch.last - 15) <= 1
    assert {1, 2, 3, 4, 16, 17, 18, 19} <= set(mapped.registered_ids)
    assert 1e-6 < mapped.errors(mapped.registered_ids).max_ratio < 0.02


# -- cameras that move ----------------------------------------------------------------------------


def aside(num: int) -> Float64Array:
    """Poses (num, 3, 4) in a line over the ground, looking straight down."""
    down = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    centers = np.column_stack([1.2 * np.arange(num), np.zeros(num), np.full(num, FLIGHT_HEIGHT)])
    return np.array([np.column_stack([down, -down @ center]) for center in centers])


@pytest.mark.parametrize("camera", [UNKNOWN, BY_EXIF, KNOWN], ids=["unknown", "exif", "known"])
@pytest.mark.parametrize("relief", [0.0, 4.0], ids=["flat", "rolling"])
@pytest.mark.parametrize("poses", [straight_path(9), aside(9)], ids=["ahead", "nadir"])
def test_nothing_is_said_of_cameras_that_move(
    poses: Float64Array, relief: float, camera: SyntheticCamera
) -> None:
    points = ground(poses, density=DENSITY, relief=relief)
    mapped = run(world_of(poses, camera=camera, points=points))
    assert mapped.figures.turning == ()
    assert mapped.emitted(CameraTurning) == []


def test_a_camera_that_stands_still_is_not_said_to_turn() -> None:
    mapped = run(world_of(np.repeat(straight_path(1), 8, axis=0)))
    assert mapped.registered_ids == []
    assert mapped.figures.turning == ()
