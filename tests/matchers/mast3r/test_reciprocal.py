"""The published reciprocal scheme: the reference implementation's very matches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adapters.matchers.mast3r.correspondences import (
    Correspondences,
    correspondences_of_both_decodes,
    correspondences_of_decode,
)
from adapters.matchers.mast3r.reciprocal import (
    Distance,
    ReciprocalMatches,
    fast_reciprocal_matches,
    grid_xy,
)
from tests.support.paths import GOLDEN

GOLDEN_FILE = GOLDEN / "mast3r" / "fast_nn.npz"
Golden = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(GOLDEN_FILE) as file:
        return {name: file[name] for name in file.files}


def tensors(golden: Golden, *names: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(golden[name]) for name in names)


def pair_of(golden: Golden, first: str, second: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(golden[first]), torch.from_numpy(golden[second])


def match_golden(golden: Golden, **settings: Any) -> ReciprocalMatches:
    return fast_reciprocal_matches(*pair_of(golden, "desc1", "desc2"), **settings)


def check(matches: ReciprocalMatches | Correspondences, golden: Golden, name: str) -> None:
    np.testing.assert_array_equal(matches.first_xy, golden[f"{name}_xy1"])
    np.testing.assert_array_equal(matches.second_xy, golden[f"{name}_xy2"])


# -- golden data ----------------------------------------------------------------------------------


# Blocks so small that a row is cut up are tried from few seeds, as each takes many steps.
@pytest.mark.parametrize(
    ("max_block_scores", "subsample"),
    [*itertools.product([None, 97**2], [8, 4, 2, 1]), (128, 8), (128, 4)],
)
@pytest.mark.parametrize("distance", ["dot", "l2"])
def test_seeds_of_every_spacing_end_in_the_reference_s_matches(
    golden: Golden, distance: Distance, subsample: int, max_block_scores: int | None
) -> None:
    matches = match_golden(
        golden, subsample=subsample, distance=distance, max_block_scores=max_block_scores
    )
    check(matches, golden, f"fast_{distance}_s{subsample}")


def test_pixels_are_row_major_positions(golden: Golden) -> None:
    matches = match_golden(golden)
    width1, width2 = golden["desc1"].shape[1], golden["desc2"].shape[1]
    first_idx = matches.first_xy @ [1, width1]
    second_idx = matches.second_xy @ [1, width2]
    np.testing.assert_array_equal(first_idx, golden["fast_dot_s8_idx1"])
    np.testing.assert_array_equal(second_idx, golden["fast_dot_s8_idx2"])


def test_random_descriptors_take_the_same_long_ways(golden: Golden) -> None:
    matches = fast_reciprocal_matches(*pair_of(golden, "rand1", "rand2"), subsample=2)
    check(matches, golden, "rand_s2")


@pytest.mark.parametrize("tolerance", [0, 3, 5])
def test_explicit_seeds_make_one_trip_and_may_end_near_their_start(
    golden: Golden, tolerance: int
) -> None:
    seeds_xy = np.column_stack([golden["tol_init_x"], golden["tol_init_y"]])
    matches = match_golden(golden, seeds_xy=seeds_xy, pixel_tolerance=tolerance)
    check(matches, golden, f"tol{tolerance}")


def test_the_basin_holds_where_every_visited_pixel_lands(golden: Golden) -> None:
    matches = match_golden(golden, with_basin=True)
    # The reference appends one entry for seeds that have no match.
    np.testing.assert_array_equal(matches.basin_idx, golden["basin_s8"][:-1])
    check(matches, golden, "fast_dot_s8")


@pytest.mark.parametrize(("name", "tolerance"), [("nonsym", 0), ("nonsym_tol5", 5)])
def test_one_decode_gives_the_reference_s_correspondences(
    golden: Golden, name: str, tolerance: int
) -> None:
    found = correspondences_of_decode(
        pair_of(golden, "desc1", "desc2"),
        pair_of(golden, "qonf1", "qonf2"),
        pixel_tolerance=tolerance,
    )
    check(found, golden, name)
    np.testing.assert_array_equal(found.confidence, golden[f"{name}_conf"])


def test_two_decodes_give_the_reference_s_correspondences(golden: Golden) -> None:
    found = correspondences_of_both_decodes(
        [pair_of(golden, "desc1", "desc2"), pair_of(golden, "sym_desc12", "sym_desc22")],
        [pair_of(golden, "qonf1", "qonf2"), pair_of(golden, "sym_qonf12", "sym_qonf22")],
    )
    check(found, golden, "sym")
    np.testing.assert_allclose(found.confidence, golden["sym_conf"], rtol=1e-6)


# -- the scheme -----------------------------------------------------------------------------------


def test_matches_are_mutual_nearest_and_come_once(golden: Golden) -> None:
    first, second = (maps.flatten(0, 1) for maps in tensors(golden, "desc1", "desc2"))
    nearest = (first @ second.T).argmax(dim=1).numpy()
    nearest_back = (second @ first.T).argmax(dim=1).numpy()
    np.testing.assert_array_equal(nearest, golden["brute_nnA"])
    np.testing.assert_array_equal(nearest_back, golden["brute_nnB"])
    matches = match_golden(golden, subsample=1)
    first_idx = matches.first_xy @ [1, golden["desc1"].shape[1]]
    second_idx = matches.second_xy @ [1, golden["desc2"].shape[1]]
    assert len(np.unique(first_idx)) == len(first_idx)
    np.testing.assert_array_equal(nearest[first_idx], second_idx)
    np.testing.assert_array_equal(nearest_back[second_idx], first_idx)


def test_seeds_that_still_move_after_the_last_round_give_nothing(golden: Golden) -> None:
    one_round = match_golden(golden, subsample=2, max_iterations=1)
    assert 0 < len(one_round.first_xy) < len(golden["fast_dot_s2_xy1"])
    assert len(match_golden(golden, max_iterations=0).first_xy) == 0


def test_repeated_seeds_count_once_and_no_seeds_give_nothing(golden: Golden) -> None:
    seeds_xy = grid_xy(56, 40, spacing=8)
    once = match_golden(golden, seeds_xy=seeds_xy)
    twice = match_golden(golden, seeds_xy=np.concatenate([seeds_xy, seeds_xy]))
    assert len(once.first_xy) > 0
    np.testing.assert_array_equal(once.first_xy, twice.first_xy)
    assert len(match_golden(golden, seeds_xy=np.empty((0, 2), np.int64)).first_xy) == 0


def test_l2_distinguishes_descriptors_of_any_length() -> None:
    # The nearest of (1, 0) is (1.1, 0), though (5, 0) has the larger product.
    first = torch.tensor([[[1.0, 0.0], [5.0, 0.3]]])
    second = torch.tensor([[[5.0, 0.0], [1.1, 0.0], [0.0, 9.0]]])
    matches = fast_reciprocal_matches(first, second, subsample=1, distance="l2")
    assert matches.first_xy.tolist() == [[0, 0], [1, 0]]
    assert matches.second_xy.tolist() == [[1, 0], [0, 0]]


def test_a_tolerance_without_seeds_is_refused(golden: Golden) -> None:
    with pytest.raises(ValueError, match="explicit seeds"):
        match_golden(golden, pixel_tolerance=3)


@pytest.mark.parametrize("seed_xy", [(-1, 0), (0, -1), (56, 0), (0, 40)])
def test_seeds_outside_the_image_are_refused(golden: Golden, seed_xy: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside the image of 56 x 40 px"):
        match_golden(golden, seeds_xy=[seed_xy])


def test_both_views_of_one_image_match_every_seed_to_itself(golden: Golden) -> None:
    (maps,) = tensors(golden, "desc1")
    matches = fast_reciprocal_matches(maps, maps)
    np.testing.assert_array_equal(matches.first_xy, grid_xy(56, 40, spacing=8))
    np.testing.assert_array_equal(matches.second_xy, matches.first_xy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_matches(golden: Golden) -> None:
    first, second = pair_of(golden, "desc1", "desc2")
    matches = fast_reciprocal_matches(first.cuda(), second.cuda(), subsample=4)
    check(matches, golden, "fast_dot_s4")
