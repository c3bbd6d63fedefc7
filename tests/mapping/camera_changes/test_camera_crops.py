"""Cameras whose images are crops of another one's: found with their principal point, or left."""

from __future__ import annotations

import pytest

from engine.config import CamerasConfig
from engine.events import CropFound
from engine.types import IntrinsicsPrior
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.synthetic import (
    FOCAL_PX,
    HEIGHT,
    WIDTH,
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    pose_errors,
    poses_of,
    round_path,
    scene_graph,
)

pytestmark = pytest.mark.slow

NUM_FRAMES = 10
WHOLE = SyntheticCamera(key="whole", params=(FOCAL_PX, WIDTH / 2, HEIGHT / 2, 0.0))


def crop(
    *, left: int = 0, right: int = 0, top: int = 0, prior: IntrinsicsPrior | None = None
) -> SyntheticCamera:
    """The camera with strips of its image cut off, px."""
    return SyntheticCamera(
        key="crop",
        width=WIDTH - left - right,
        height=HEIGHT - top,
        params=(FOCAL_PX, WIDTH / 2 - left, HEIGHT / 2 - top, 0.0),
        prior=prior,
    )


def run(second: SyntheticCamera, *, split: bool = True) -> tuple[MapperRun, SyntheticWorld]:
    """Every other frame is of the second camera."""
    config = WITHOUT_WINDOWS.model_copy(update={"cameras": CamerasConfig(split=split)})
    world = SyntheticWorld(
        round_path(NUM_FRAMES, turns=0.25), cameras=(WHOLE, second), noise_px=0.3
    )
    mapped = MapperRun(config, matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in world.frame_ids:
        mapped.add_keyframe(world.keyframe(frame_id))
    mapped.end()
    return mapped, world


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(crop(right=WIDTH // 4), id="right"),
        pytest.param(crop(left=WIDTH // 5), id="left"),
        pytest.param(crop(top=HEIGHT // 4), id="top"),
    ],
)
def test_a_crop_on_one_side_is_found_with_its_principal_point(second: SyntheticCamera) -> None:
    mapped, world = run(second)
    (found,) = mapped.emitted(CropFound)
    assert (found.camera_key, found.whole_camera_key) == ("crop", "whole")
    camera = mapped.sparse_map.camera("crop")
    _, x, y, _ = second.params
    assert camera.principal_point_x == pytest.approx(x, abs=5.0)
    assert camera.principal_point_y == pytest.approx(y, abs=5.0)
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < pose_errors(poses_of(mapped.sparse_map), world).rmse_ratio < 2e-3


def test_a_crop_around_the_middle_stays_as_it_is() -> None:
    mapped, world = run(crop(left=WIDTH // 8, right=WIDTH // 8))
    assert not mapped.emitted(CropFound)
    camera = mapped.sparse_map.camera("crop")
    assert camera.principal_point_x == pytest.approx(camera.width / 2)
    assert pose_errors(poses_of(mapped.sparse_map), world).rmse_ratio < 2e-3


def test_no_crop_is_searched_when_that_is_not_wanted() -> None:
    mapped, _ = run(crop(right=WIDTH // 4), split=False)
    assert not mapped.emitted(CropFound)
    camera = mapped.sparse_map.camera("crop")
    assert camera.principal_point_x == pytest.approx(camera.width / 2)


def test_a_calibration_that_was_given_is_no_crop() -> None:
    second = crop(right=WIDTH // 4)
    prior = IntrinsicsPrior(focal_px=FOCAL_PX, camera_model="SIMPLE_RADIAL", params=second.params)
    mapped, world = run(crop(right=WIDTH // 4, prior=prior))
    assert not mapped.emitted(CropFound)
    assert pose_errors(poses_of(mapped.sparse_map), world).rmse_ratio < 2e-3
