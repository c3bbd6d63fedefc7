"""The dense map in Rerun: points are sent once, and transforms when keyframes move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import rerun as rr

from adapters.views.display_geometry import DisplayScale
from adapters.views.rerun_dense import DenseDrawing
from engine.dense_types import DenseChunk, DenseCloud
from engine.types import Float64Array, FrameId

SCALE = DisplayScale(center_in_world=np.zeros(3), extent_map=10.0, frustum_depth_map=0.2)
NUM_POINTS = 200


class LogOnly:
    """A recording that keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, type]] = []

    def log(self, entity: str, *drawn: Any) -> None:
        self.logged += [(entity.rpartition("/")[2], type(one)) for one in drawn]

    def take(self) -> list[tuple[str, type]]:
        logged, self.logged = self.logged, []
        return logged


def cloud(
    *, versions: tuple[int, ...] = (1, 2, 3), shift_map: float = 0.0, scale: float = 1.0
) -> DenseCloud:
    """Chunks of keyframes 1, 2, ... side by side; the last one is shifted and scaled."""
    poses = np.tile(np.eye(4)[:3], (len(versions), 1, 1))
    poses[:, 0, 3] = np.arange(len(versions))
    poses[-1, :, :3] *= scale
    poses[-1, 1, 3] += shift_map
    return DenseCloud(
        chunks=tuple(chunk(number + 1, version) for number, version in enumerate(versions)),
        world_from_chunk=poses,
    )


def chunk(frame_id: int, version: int) -> DenseChunk:
    rng = np.random.default_rng(frame_id)
    return DenseChunk(
        frame_id=FrameId(frame_id),
        version=version,
        xyz_in_cam=(rng.uniform(-1, 1, (NUM_POINTS, 3)) + [0, 0, 4]).astype(np.float32),
        colors=rng.integers(0, 256, (NUM_POINTS, 3), dtype=np.uint8),
    )


def drawing() -> tuple[DenseDrawing, LogOnly]:
    log = LogOnly()
    return DenseDrawing(cast(rr.RecordingStream, log)), log


def names_of(logged: list[tuple[str, type]], kind: type) -> list[str]:
    return [name for name, one in logged if one is kind]


def test_points_are_sent_once() -> None:
    dense, log = drawing()
    first_bytes = dense.draw(cloud(), scale=SCALE)
    names = [f"keyframe_00000{number}" for number in (1, 2, 3)]
    assert names_of(log.take(), rr.Points3D) == names
    assert 15 * 3 * NUM_POINTS <= first_bytes < 15 * 3 * NUM_POINTS + 1000
    assert dense.draw(cloud(), scale=SCALE) == 0
    assert log.take() == []


def test_a_keyframe_that_moves_costs_a_transform() -> None:
    dense, log = drawing()
    dense.draw(cloud(), scale=SCALE)
    log.take()
    assert dense.draw(cloud(shift_map=0.2 * SCALE.tolerance_map), scale=SCALE) == 0
    assert 0 < dense.draw(cloud(shift_map=5 * SCALE.tolerance_map), scale=SCALE) < 500
    assert log.take() == [("keyframe_000003", rr.Transform3D)]
    dense.draw(cloud(shift_map=5 * SCALE.tolerance_map, scale=1.1), scale=SCALE)
    assert log.take() == [("keyframe_000003", rr.Transform3D)]


def test_small_moves_add_up() -> None:
    dense, log = drawing()
    dense.draw(cloud(), scale=SCALE)
    log.take()
    for step in range(1, 5):
        dense.draw(cloud(shift_map=0.4 * step * SCALE.tolerance_map), scale=SCALE)
    assert log.take() == [("keyframe_000003", rr.Transform3D)]


def test_points_that_changed_are_sent_again_and_those_that_left_are_cleared() -> None:
    dense, log = drawing()
    dense.draw(cloud(), scale=SCALE)
    log.take()
    dense.draw(cloud(versions=(1, 9)), scale=SCALE)
    logged = log.take()
    assert names_of(logged, rr.Points3D) == ["keyframe_000002"]
    assert names_of(logged, rr.Clear) == ["keyframe_000003"]
    dense.draw(cloud(versions=(1, 9, 3)), scale=SCALE)
    assert names_of(log.take(), rr.Points3D) == ["keyframe_000003"]


def test_all_is_sent_again_for_viewers_that_come_late() -> None:
    dense, log = drawing()
    dense.draw(cloud(), scale=SCALE)
    log.take()
    dense.draw_all_again()
    dense.draw(cloud(), scale=SCALE)
    assert len(names_of(log.take(), rr.Points3D)) == 3


def test_points_far_outside_the_map_are_left_out() -> None:
    dense, _ = drawing()
    far: Float64Array = np.tile(np.eye(4)[:3], (1, 1, 1))
    far[0, 0, 3] = 1000.0
    shown = DenseCloud(chunks=(chunk(1, 1),), world_from_chunk=far)
    assert dense.draw(shown, scale=SCALE) < 15 * NUM_POINTS


def test_points_outside_the_map_are_drawn_once_it_has_grown_around_them() -> None:
    dense, log = drawing()
    far = np.tile(np.eye(4)[:3], (2, 1, 1))
    far[1, 0, 3] = 50.0
    shown = DenseCloud(chunks=(chunk(1, 1), chunk(2, 2)), world_from_chunk=far)
    assert dense.draw(shown, scale=SCALE) < 15 * NUM_POINTS + 1000
    log.take()
    assert dense.draw(shown, scale=SCALE) == 0
    assert dense.draw(shown, scale=replace(SCALE, extent_map=20.0)) > 15 * NUM_POINTS
    assert names_of(log.take(), rr.Points3D) == ["keyframe_000002"]
    assert dense.draw(shown, scale=replace(SCALE, extent_map=40.0)) == 0


def test_what_was_cleared_is_drawn_again() -> None:
    dense, log = drawing()
    dense.draw(cloud(), scale=SCALE)
    log.take()
    dense.clear()
    assert len(names_of(log.take(), rr.Clear)) == 3
    dense.draw(cloud(), scale=SCALE)
    assert len(names_of(log.take(), rr.Points3D)) == 3
