"""Votes of fundamental matrices on zooms and principal points, and changes of scale."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from engine.estimators.calibration_votes import GuessedView, cost_of, vote_on
from engine.estimators.scale_change import measure_scale_change
from engine.types import FrameId, VerifiedPair
from tests.support.synthetic import (
    FOCAL_PX,
    HEIGHT,
    WIDTH,
    SyntheticCamera,
    SyntheticWorld,
    round_path,
    turning_path,
)

CENTRE = (WIDTH / 2, HEIGHT / 2)
NUM_FRAMES = 6


def world_of(cameras: Sequence[SyntheticCamera]) -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM_FRAMES, turns=0.12), cameras=cameras)


def camera(
    *, zoom: float = 1.0, principal_point_xy: tuple[float, float] = CENTRE
) -> SyntheticCamera:
    return SyntheticCamera(params=(zoom * FOCAL_PX, *principal_point_xy, 0.0))


def pairs_of(world: SyntheticWorld) -> list[VerifiedPair]:
    return [world.verified_pair(*ends) for ends in itertools.combinations(world.frame_ids, 2)]


def views(
    world: SyntheticWorld, *, even: GuessedView, odd: GuessedView
) -> Mapping[FrameId, GuessedView]:
    """A guess for frames 2, 4, ... and one for frames 1, 3, ..."""
    return {i: odd if i % 2 else even for i in world.frame_ids}


def test_the_right_zoom_costs_nothing_and_gives_the_focal_length() -> None:
    world = world_of([camera(), camera(zoom=1.5)])
    pairs = pairs_of(world)
    wide = GuessedView(zoom=1.0, principal_point_xy=CENTRE)
    edge_px = max(WIDTH, HEIGHT)
    costs = {}
    for zoom in (0.8, 1.0, 1.2, 1.5, 1.8):
        zoomed = GuessedView(zoom=zoom, principal_point_xy=CENTRE)
        vote = vote_on(pairs, views(world, even=zoomed, odd=wide), edge_px=edge_px)
        assert vote is not None
        costs[zoom] = vote.cost
        if zoom == 1.5:
            assert vote.focal_px == pytest.approx(FOCAL_PX, rel=0.05)
    assert min(costs, key=costs.__getitem__) == 1.5
    assert costs[1.5] < 0.5 * costs[1.2] < 0.5 * costs[1.0]


def test_the_right_principal_point_costs_least() -> None:
    cropped_xy = (CENTRE[0] + 60.0, CENTRE[1])
    world = world_of([camera(), camera(principal_point_xy=cropped_xy)])
    pairs = pairs_of(world)
    centred = GuessedView(zoom=1.0, principal_point_xy=CENTRE)
    costs = [
        cost_of(
            pairs,
            views(
                world,
                even=GuessedView(zoom=1.0, principal_point_xy=(CENTRE[0] + off_px, CENTRE[1])),
                odd=centred,
            ),
            focal_px=FOCAL_PX,
        )
        for off_px in (-60.0, 0.0, 60.0, 120.0)
    ]
    known = [cost for cost in costs if cost is not None]
    assert len(known) == len(costs)
    assert int(np.argmin(known)) == 2
    assert known[2] < 1e-6


def test_pairs_that_a_plane_explains_have_no_vote() -> None:
    world = SyntheticWorld(turning_path(NUM_FRAMES))
    view = GuessedView(zoom=1.0, principal_point_xy=CENTRE)
    guess = views(world, even=view, odd=view)
    assert vote_on(pairs_of(world), guess, edge_px=WIDTH) is None
    assert cost_of(pairs_of(world), guess, focal_px=FOCAL_PX) is None


@pytest.mark.parametrize("zoom", [0.5, 1.0, 1.3, 2.0])
def test_a_zoom_changes_all_distances_alike(zoom: float) -> None:
    rng = np.random.default_rng(0)
    points_xy = rng.uniform(0.0, 500.0, (100, 2))
    noise_px = rng.normal(scale=0.3, size=points_xy.shape)
    change = measure_scale_change(points_xy, zoom * points_xy + 40.0 + noise_px)
    assert change is not None
    assert change.log_ratio == pytest.approx(np.log(zoom), abs=0.01)
    assert 0.0 < change.spread < 0.02


def test_a_motion_spreads_the_change_of_scale() -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-5.0, 5.0, (200, 2)), rng.uniform(5.0, 20.0, 200)])
    nearer = points - (0.0, 0.0, 2.0)
    change = measure_scale_change(
        500.0 * points[:, :2] / points[:, 2:], 500.0 * nearer[:, :2] / nearer[:, 2:]
    )
    assert change is not None
    assert change.log_ratio > 0.1
    assert change.spread > 0.1


@pytest.mark.parametrize("num", [0, 1, 4])
def test_points_in_one_place_show_no_change_of_scale(num: int) -> None:
    assert measure_scale_change(np.ones((num, 2)), np.ones((num, 2))) is None
