"""What is fixed to the camera is found over its keyframes, and what is in the world is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from engine.config import CoarseToFineConfig, DenseMatchingConfig, TwoViewConfig
from engine.matching.overlays import Overlay
from engine.matching.pair_matching import MatchedKeyframe, PairMatching
from engine.types import Float64Array, PairCandidate, PairReason, VerifiedPair
from tests.support.overlays import OverlaidWorld, marks
from tests.support.synthetic import (
    HEIGHT,
    WIDTH,
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    ground,
    look_at,
    round_path,
    scene_graph,
    straight_path,
    turning_path,
)

LOGO_BOX = (780.0, 40.0, 960.0, 120.0)
LOGO = marks(LOGO_BOX)
TEXT = np.vstack([marks((20, y, 420, y + 12), num=60, seed=y) for y in (30, 60, 90)])


class Run:
    """Keyframes of a world matched one after the other."""

    def __init__(
        self, world: SyntheticWorld, *, wrong_ratio: float = 0.05, **two_view: Any
    ) -> None:
        self.graph = scene_graph()
        self.matching = PairMatching(
            self.graph,
            FakeMatcher(world=world, wrong_ratio=wrong_ratio),
            two_view=TwoViewConfig(**two_view),
            dense=DenseMatchingConfig(),
            coarse_to_fine=CoarseToFineConfig(),
        )
        self.world = world
        self.matched: list[MatchedKeyframe] = []

    def feed(self, frame_ids: Iterable[int]) -> Run:
        for frame_id in frame_ids:
            keyframe = self.world.keyframe(frame_id)
            self.matching.add_keyframe(keyframe)
            self.matched.append(self.matching.match_keyframe(keyframe.frame_id))
        return self

    @property
    def overlays(self) -> list[Overlay]:
        return [overlay for matched in self.matched for overlay in matched.overlays]

    @property
    def pairs(self) -> list[VerifiedPair]:
        return self.graph.edges()

    def num_fixed(self, pair: VerifiedPair) -> int:
        """Matches of a verified pair that are of marks."""
        assert isinstance(self.world, OverlaidWorld)
        ids = self.world.view(pair.pair.first).point_ids[pair.inlier_matches_idx[:, 0]]
        return int(np.isin(ids, self.world.fixed_ids).sum())

    def covered_ratio(self, frame_id: int, box: tuple[float, float, float, float]) -> float:
        """Share of a keyframe's keypoints in a box that are covered."""
        keyframe = self.world.keyframe(frame_id)
        xy = keyframe.features.keypoints_xy
        inside = ((xy >= box[:2]) & (xy <= box[2:])).all(axis=1)
        return float(self.matching.covers(keyframe.frame_id)[inside].mean())


@pytest.mark.parametrize("fixed_xy", [LOGO, TEXT], ids=["logo", "text"])
@pytest.mark.parametrize("path", [straight_path, turning_path], ids=["flight", "turn"])
def test_an_overlay_is_found_within_six_keyframes(
    fixed_xy: Float64Array, path: Callable[[int], Float64Array]
) -> None:
    run = Run(OverlaidWorld(path(8), fixed_xy=fixed_xy, noise_px=0.5)).feed(range(1, 7))
    assert run.overlays
    run.feed([7, 8])
    found = run.overlays[-1]
    is_covered = run.matching._overlays.covers(run.world.keyframe(8), fixed_xy)
    assert is_covered.mean() > 0.9
    taken = np.zeros((HEIGHT, WIDTH), np.bool_)
    for left, top, right, bottom in found.boxes:
        taken[top:bottom, left:right] = True
    around = np.zeros_like(taken)
    for x, y in fixed_xy.astype(int):
        around[max(y - 12, 0) : y + 12, max(x - 12, 0) : x + 12] = True
    assert (taken & around).sum() > 0.6 * (taken | around).sum()
    assert 0.5 * around.mean() < found.share < 1.5 * around.mean()
    assert found.num_keyframes in (4, 5, 6, 7, 8)


def test_no_match_of_an_overlay_stays_in_any_pair() -> None:
    run = Run(OverlaidWorld(straight_path(10), fixed_xy=LOGO, noise_px=0.5)).feed(range(1, 11))
    clean = Run(SyntheticWorld(straight_path(10), noise_px=0.5)).feed(range(1, 11))
    assert sum(run.num_fixed(pair) for pair in run.pairs) == 0
    missing = {pair.pair for pair in clean.pairs} - {pair.pair for pair in run.pairs}
    assert len(missing) <= 2  # weak ones: fewer wrong matches than right ones make a difference
    total, total_clean = (sum(p.num_inliers for p in one.pairs) for one in (run, clean))
    assert total > 0.9 * total_clean


def test_nothing_is_masked_when_that_is_not_wanted() -> None:
    world = OverlaidWorld(straight_path(6), fixed_xy=LOGO, noise_px=0.5)
    run = Run(world, find_overlays=False).feed(range(1, 7))
    assert run.overlays == []
    assert len(run.pairs) == 6 * 5 // 2


def test_a_pair_that_shares_only_the_overlay_does_not_hold_once_it_is_known() -> None:
    there, elsewhere = straight_path(8), straight_path(8) + np.array([[0, 0, 0, 500.0]] * 3)
    world = OverlaidWorld(
        np.concatenate([there, elsewhere]),
        fixed_xy=marks(LOGO_BOX, num=120),
        points=SyntheticWorld(there).points,
    )
    run = Run(world, wrong_ratio=0.0).feed(range(1, 11))
    assert len(world.matches(run.pairs[0].pair)) > 0
    assert all(pair.pair.second <= 8 for pair in run.pairs)


def test_matches_that_a_pair_lost_are_reported_with_the_keyframe_that_showed_it() -> None:
    world = OverlaidWorld(straight_path(9), fixed_xy=LOGO, noise_px=0.5)
    still = [1, 1, 1]  # the first three see the same, so their marks are matched as all else
    world.poses[:3] = world.poses[still]
    run = Run(world).feed([1, 2, 3])
    assert sum(run.num_fixed(pair) for pair in run.pairs) > 0
    run.feed(range(4, 10))
    assert sum(run.num_fixed(pair) for pair in run.pairs) == 0
    changed = [pair.pair for matched in run.matched for pair in matched.changed_pairs]
    assert {(1, 2), (1, 3), (2, 3)} <= {(pair.first, pair.second) for pair in changed}


def test_what_was_fixed_for_a_while_is_uncovered_when_the_world_moves_there() -> None:
    path = straight_path(20, step=1.0)
    world = OverlaidWorld(
        path,
        points=ground(path, density=1.5),
        fixed_xy=marks((300, 300, 500, 420)),
        seen_in=range(1, 9),
    )
    run = Run(world).feed(range(1, 9))
    box = (320.0, 320.0, 480.0, 400.0)
    assert run.covered_ratio(8, box) > 0.8
    run.feed(range(9, 21))
    assert run.covered_ratio(20, box) < 0.1


def test_each_camera_has_overlays_of_its_own() -> None:
    cameras = (SyntheticCamera.known("left"), SyntheticCamera.known("right"))
    world = OverlaidWorld(
        straight_path(16, step=1.0),
        fixed_xy=LOGO,
        seen_in=range(1, 17, 2),
        cameras=cameras,
        noise_px=0.5,
    )
    run = Run(world).feed(range(1, 17))
    assert {overlay.camera_key for overlay in run.overlays} == {"left"}
    assert run.matching.covers(world.keyframe(15).frame_id).any()
    assert not run.matching.covers(world.keyframe(16).frame_id).any()


def around_an_object(num: int) -> Float64Array:
    """Poses that circle an object and face its middle."""
    angles = np.linspace(0.0, 2.0, num)
    centers = np.column_stack([9 * np.cos(angles), 9 * np.sin(angles), np.full(num, 4.0)])
    return np.array([look_at(center, np.array([0.0, 0.0, 1.0])) for center in centers])


def straight_ahead(num: int) -> Float64Array:
    """Poses that move along their own axis without turning."""
    first = look_at(np.array([0.0, 0.0, 2.0]), np.array([50.0, 0.0, 2.0]))
    poses = np.repeat(first[None], num, axis=0)
    poses[:, 2, 3] -= 0.8 * np.arange(num)
    return poses


def object_points(num: int = 350) -> Float64Array:
    return np.random.default_rng(5).uniform((-2.5, -2.5, 0.0), (2.5, 2.5, 3.0), (num, 3))


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(SyntheticWorld(straight_path(14), noise_px=0.5), id="flight"),
        pytest.param(SyntheticWorld(round_path(14), noise_px=0.5), id="round"),
        pytest.param(SyntheticWorld(turning_path(14), noise_px=0.5), id="turn"),
        pytest.param(
            SyntheticWorld(around_an_object(12), points=object_points(), noise_px=0.5),
            id="around an object before black",
        ),
        pytest.param(
            SyntheticWorld(straight_ahead(14), noise_px=0.5, density=2.0), id="straight ahead"
        ),
        pytest.param(
            SyntheticWorld(np.repeat(straight_path(1), 10, axis=0), noise_px=0.3), id="tripod"
        ),
        pytest.param(SyntheticWorld(straight_path(14, step=0.01), noise_px=0.3), id="nearly still"),
    ],
)
def test_nothing_is_masked_where_there_is_no_overlay(world: SyntheticWorld) -> None:
    run = Run(world).feed(world.frame_ids)
    assert run.overlays == []
    assert all(not run.matching.covers(frame_id).any() for frame_id in world.frame_ids)


def test_a_tripod_before_marks_is_as_one_without() -> None:
    poses = np.repeat(straight_path(1), 8, axis=0)
    run = Run(OverlaidWorld(poses, fixed_xy=LOGO, noise_px=0.3)).feed(range(1, 9))
    assert run.overlays == []
    assert len(run.pairs) == 8 * 7 // 2
    assert all(pair.homography_inlier_ratio > 0.9 for pair in run.pairs)


def test_an_object_that_the_camera_follows_is_not_masked() -> None:
    """Its distance and place in the image vary a little, as those of somebody who walks ahead."""
    poses = straight_path(16, step=1.0)
    world = SyntheticWorld(poses, noise_px=0.5)
    body = marks((450, 250, 550, 500), num=80)

    class Following(OverlaidWorld):
        def view(self, frame_id: int):  # type: ignore[no-untyped-def]
            sway = np.random.default_rng(frame_id).normal(scale=6.0, size=2)
            stretch = 1.0 + np.random.default_rng(100 + frame_id).normal(scale=0.03)
            self.fixed_xy = (body - (500, 375)) * stretch + (500, 375) + sway
            return super().view(frame_id)

    following = Following(poses, fixed_xy=body, points=world.points, noise_px=0.5)
    run = Run(following).feed(range(1, 17))
    assert sum(overlay.share for overlay in run.overlays[-1:]) < 0.002


def test_what_overlays_cover_stays_covered_in_a_run_that_goes_on() -> None:
    world = OverlaidWorld(straight_path(12), fixed_xy=LOGO, noise_px=0.5)
    before = Run(world)
    facts: dict[str, Any] = {}
    for frame_id in range(1, 10):
        before.feed([frame_id])
        facts |= before.matching.take_facts()
    assert before.covered_ratio(9, LOGO_BOX) > 0.9

    again = Run(world)
    for frame_id in before.graph.keyframe_ids:
        again.matching.restore_keyframe(world.keyframe(frame_id), facts)
        pairs = [one for one in before.pairs if one.pair.second == frame_id]
        again.matching.restore_matches(frame_id, pairs, [])
    again.matching.restore(facts)
    assert again.covered_ratio(9, LOGO_BOX) > 0.9
    again.feed([10, 11, 12])
    assert again.covered_ratio(12, LOGO_BOX) > 0.9
    newest = [one for one in again.pairs if one.pair.second >= 10]
    assert len(newest) >= 6
    assert not any(map(again.num_fixed, newest))


def test_a_pair_that_is_verified_again_counts_once() -> None:
    world = OverlaidWorld(straight_path(3), fixed_xy=LOGO, noise_px=0.5)
    run = Run(world).feed([1, 2, 3])
    (grid,) = run.matching._overlays._grids.values()
    before, _ = grid.state()
    assert before.any()
    again = PairCandidate(pair=run.pairs[0].pair, reason=PairReason.EXHAUSTIVE, score=1.0)
    run.matching.match_pairs([again], in_full=True)
    np.testing.assert_array_equal(grid.state()[0], before)


def test_cameras_without_overlays_have_nothing_to_tell() -> None:
    run = Run(SyntheticWorld(straight_path(6), noise_px=0.5)).feed(range(1, 7))
    assert run.matching.take_facts() == {}
