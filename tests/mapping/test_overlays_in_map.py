"""What turns out not to be in the world leaves the map and the pairs verified before."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import Config
from engine.events import MapInitialized, OverlayFound
from engine.types import BoolArray, FrameId
from tests.support.mapper_runs import MapperRun
from tests.support.overlays import OverlaidWorld, marks
from tests.support.synthetic import (
    HEIGHT,
    WIDTH,
    FakeMatcher,
    SyntheticWorld,
    pose_errors,
    scene_graph,
    straight_path,
)


class Run(MapperRun):
    """A mapper over a world."""

    def __init__(self, world: SyntheticWorld) -> None:
        self.world = world
        super().__init__(Config(), matcher=FakeMatcher(world=world), graph=scene_graph())

    def feed(self, frame_ids: range) -> Run:
        for frame_id in frame_ids:
            self.add_keyframe(self.world.keyframe(frame_id))
        return self

    def mask_right_of(self, left_px: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets the next keyframe find an overlay over the right of all images."""
        grid = self.matching._overlays._grid(self.world.keyframe(1))
        cover = np.zeros_like(grid._is_covered)
        cover[:, int(left_px / WIDTH * cover.shape[1]) :] = True
        monkeypatch.setattr(grid, "_cover", lambda: cover)
        monkeypatch.setattr(grid, "_keyframes", {(0, 0): {FrameId(1)}})

    def observed_rows(self, frame_id: FrameId) -> BoolArray:
        """Which keypoints (N,) of a keyframe observe a point."""
        return np.asarray(self.sparse_map.point3D_ids(frame_id) >= 0)

    def num_observed_in(self, is_inside: dict[FrameId, BoolArray]) -> int:
        return sum(
            int(self.observed_rows(frame_id)[is_inside[frame_id]].sum())
            for frame_id in self.registered_ids
        )

    @property
    def error_ratio(self) -> float:
        poses = {i: self.sparse_map.cam_from_world(i) for i in self.registered_ids}
        return pose_errors(poses, self.world).max_ratio


def test_no_point_of_an_overlay_is_in_the_map() -> None:
    world = OverlaidWorld(straight_path(14), fixed_xy=marks((700, 40, 960, 160)), noise_px=0.5)
    run = Run(world).feed(range(1, 15))
    run.end()
    assert run.emitted(OverlayFound)
    assert run.registered_ids == world.frame_ids
    is_mark = {i: np.isin(world.view(i).point_ids, world.fixed_ids) for i in world.frame_ids}
    assert run.num_observed_in(is_mark) == 0
    assert run.figures.num_observations > 500
    assert 0.0 < run.error_ratio < 0.02


@pytest.mark.parametrize(
    ("left_px", "is_built_anew"), [(930, False), (650, True)], ids=["little", "much"]
)
def test_what_is_masked_late_leaves_the_map(
    left_px: int, is_built_anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SyntheticWorld(straight_path(14), noise_px=0.5)
    run = Run(world).feed(range(1, 12))
    inside = {i: world.view(i).points_xy[:, 0] > left_px for i in world.frame_ids}
    assert run.num_observed_in(inside) > 20
    num_maps = len(run.emitted(MapInitialized))

    run.mask_right_of(left_px, monkeypatch)
    run.feed(range(12, 13))

    (found,) = run.emitted(OverlayFound)
    assert found.share == pytest.approx(1.0 - left_px / WIDTH, abs=0.02)
    assert found.boxes[0][2:] == (WIDTH, HEIGHT)
    assert run.registered_ids == world.frame_ids[:12]
    assert run.num_observed_in(inside) == 0
    assert (len(run.emitted(MapInitialized)) > num_maps) == is_built_anew
    changed = run.records[-1].changed_pairs
    assert {FrameId(12)}.isdisjoint(
        {i for one in changed for i in (one.pair.first, one.pair.second)}
    )
    assert len(changed) > 10
    for verified in changed:
        rows1, rows2 = verified.inlier_matches_idx.T
        assert not inside[verified.pair.first][rows1].any()
        assert not inside[verified.pair.second][rows2].any()

    run.feed(range(13, 15))
    run.end()
    assert run.registered_ids == world.frame_ids
    assert run.num_observed_in(inside) == 0
    assert 0.0 < run.error_ratio < 0.03


def test_what_starts_after_all_of_a_map_was_masked_begins_a_world(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(SyntheticWorld(straight_path(16), noise_px=0.5)).feed(range(1, 8))
    assert run.registered_ids
    run.mask_right_of(0.0, monkeypatch)
    run.feed(range(8, 9))
    assert not run.registered_ids
    assert {pose.world_number for pose in run.poses} == {0}
    monkeypatch.undo()
    num_posed = len(run.poses)
    run.feed(range(9, 17))
    assert len(run.registered_ids) > 8
    assert {pose.world_number for pose in run.poses[num_posed:]} == {1}
