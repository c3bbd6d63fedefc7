"""Matches by query: where they lie, how exactly, which are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from adapters.matchers.mast3r.query_matching import (
    QueryMatches,
    match_query_batch,
)
from engine.types import Float64Array

WIDTH, HEIGHT = 128, 96
SIZE = np.array([WIDTH, HEIGHT])
NUM_COMPONENTS = 24
Field = Callable[[torch.Tensor], torch.Tensor]


def smooth_field(*, seed: int = 0, detail_px: float = 8.0) -> Field:
    """Unit descriptors that change smoothly over the plane, (..., D) of (..., 2) points."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(64, 2, generator=generator) / detail_px
    phases = 2 * math.pi * torch.rand(64, generator=generator)
    mixing = torch.randn(64, NUM_COMPONENTS, generator=generator)

    def at(points_xy: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(
            torch.cos(points_xy @ waves.T + phases) @ mixing, dim=-1
        )

    return at


def pixel_centers(width: int = WIDTH, height: int = HEIGHT) -> torch.Tensor:
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)


def view(
    field: Field,
    *,
    shift_xy: tuple[float, float] = (0.0, 0.0),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    noise: float = 0.0,
    seed: int = 9,
) -> torch.Tensor:
    """Descriptors (H, W, D) of an image in which the field's points lie ``shift_xy`` further."""
    maps = field(pixel_centers(*size) - torch.tensor(shift_xy))
    maps += noise * torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(maps, dim=2)


def queries(num: int = 400, *, margin_px: float = 12.0, seed: int = 0) -> Float64Array:
    rng = np.random.default_rng(seed)
    return rng.uniform(margin_px, SIZE - margin_px, (num, 2))


def ones(maps: torch.Tensor) -> torch.Tensor:
    return torch.ones(maps.shape[:-1])


def match_queries(
    queries_xy: Float64Array,
    descriptors_from: torch.Tensor,
    confidence_from: torch.Tensor,
    descriptors_to: torch.Tensor,
    confidence_to: torch.Tensor,
    *,
    tolerance_px: float,
    max_block_scores: int | None = None,
) -> QueryMatches:
    """A batch of one pair."""
    (found,) = match_query_batch(
        [queries_xy],
        descriptors_from[None],
        confidence_from[None],
        descriptors_to[None],
        confidence_to[None],
        tolerance_px=tolerance_px,
        max_block_scores=max_block_scores,
    )
    return found


def match(
    queries_xy: Float64Array,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    tolerance_px: float = 1.0,
) -> QueryMatches:
    return match_queries(
        queries_xy, first, ones(first), second, ones(second), tolerance_px=tolerance_px
    )


def same(left: QueryMatches, right: QueryMatches) -> bool:
    return (
        np.array_equal(left.query_idx, right.query_idx)
        and np.allclose(left.points_xy, right.points_xy, rtol=0, atol=1e-3)
        and np.allclose(left.confidence, right.confidence)
    )


# -- where matches lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("detail_px", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("shift_xy", [(0.0, 0.0), (3.37, -2.61), (-7.5, 4.25)])
def test_matches_of_a_shifted_field_lie_where_the_shift_puts_them(
    shift_xy: tuple[float, float], detail_px: float
) -> None:
    field, queries_xy = smooth_field(detail_px=detail_px), queries()
    found = match(queries_xy, view(field), view(field, shift_xy=shift_xy))
    assert len(found.query_idx) > 0.98 * len(queries_xy)
    errors_px = np.linalg.norm(
        found.points_xy - queries_xy[found.query_idx] - np.array(shift_xy), axis=1
    )
    assert np.median(errors_px) < 0.16  # a whole pixel's centre is 0.38 px off
    assert np.quantile(errors_px, 0.95) < 0.4


def test_sub_pixels_beat_whole_pixels_with_noise_too() -> None:
    field, queries_xy, shift_xy = smooth_field(), queries(800), np.array([3.37, -2.61])
    first, second = view(field, noise=0.01), view(field, shift_xy=(3.37, -2.61), noise=0.01, seed=8)
    found = match(queries_xy, first, second)
    true_xy = queries_xy[found.query_idx] + shift_xy
    whole_xy = np.floor(found.points_xy) + 0.5
    error_px = np.median(np.linalg.norm(found.points_xy - true_xy, axis=1))
    whole_error_px = np.median(np.linalg.norm(whole_xy - true_xy, axis=1))
    assert len(found.query_idx) > 700
    assert 0.02 < error_px < 0.6 * whole_error_px
    assert 0.3 < whole_error_px < 0.5


def test_pixel_centres_match_themselves() -> None:
    maps = view(smooth_field())
    centers_xy = pixel_centers().reshape(-1, 2)[::37].double().numpy()
    found = match(centers_xy, maps, maps)
    assert len(found.query_idx) == len(centers_xy)
    errors_px = np.abs(found.points_xy - centers_xy)
    assert np.median(errors_px) < 0.08
    assert errors_px.max() < 0.5


def test_points_on_the_border_stay_in_the_image_and_on_their_pixel() -> None:
    maps = view(smooth_field())
    edge_xy = np.array(
        [[0.0, 0.0], [WIDTH, HEIGHT], [0.5, 40.5], [60.5, HEIGHT - 0.5], [WIDTH - 0.5, 0.5]]
    )
    found = match(edge_xy, maps, maps)
    assert found.query_idx.tolist() == [0, 1, 2, 3, 4]
    centers_xy = np.clip(edge_xy, 0.5, SIZE - 0.5)
    np.testing.assert_array_equal(found.points_xy, centers_xy)


def test_images_of_different_sizes_match() -> None:
    field, queries_xy = smooth_field(), queries()
    second = view(field, shift_xy=(-20.0, 30.0), size=(80, 160))
    found = match(queries_xy, view(field), second)
    expected_xy = queries_xy + [-20.0, 30.0]
    visible = (expected_xy > 0.5).all(axis=1) & (expected_xy < [79.5, 159.5]).all(axis=1)
    assert 0.5 < visible.mean() < 0.9
    assert np.isin(np.flatnonzero(visible), found.query_idx).mean() > 0.98
    kept = np.isin(found.query_idx, np.flatnonzero(visible))
    errors_px = np.linalg.norm(found.points_xy - expected_xy[found.query_idx], axis=1)
    assert np.median(errors_px[kept]) < 0.1
    assert (~kept).sum() < 0.2 * (~visible).sum()


def test_images_narrower_than_the_refinement_are_taken() -> None:
    maps = torch.nn.functional.normalize(torch.eye(4)[None, :2] + 0.1, dim=2)  # 2 x 1 px
    found = match(np.array([[0.5, 0.5], [1.5, 0.5]]), maps, maps)
    np.testing.assert_array_equal(found.points_xy, [[0.5, 0.5], [1.5, 0.5]])


# -- what is refused ------------------------------------------------------------------------------


def test_a_pair_without_overlap_has_hardly_a_match() -> None:
    found = match(queries(1000), view(smooth_field(seed=1)), view(smooth_field(seed=2)))
    assert len(found.query_idx) < 50


def test_a_way_back_that_ends_elsewhere_refuses_the_match() -> None:
    field = smooth_field()
    first, second = view(field), view(field)
    # The first image shows its right half twice, the second time worse: the way back leads to
    # the better one.
    first = torch.cat([first, view(field, noise=0.03)[:, WIDTH // 2 :]], dim=1)
    queries_xy = queries(margin_px=16.0)
    repeated_xy = queries_xy[queries_xy[:, 0] > WIDTH / 2 + 8] + [WIDTH / 2, 0.0]
    assert len(match(queries_xy, first, second).query_idx) > 0.95 * len(queries_xy)
    assert len(match(repeated_xy, first, second).query_idx) < 0.1 * len(repeated_xy)


def test_the_tolerance_is_a_distance_in_pixels() -> None:
    field, queries_xy = smooth_field(), queries()
    first, second = view(field, noise=0.05), view(field, noise=0.05, seed=8)
    num = [
        len(match(queries_xy, first, second, tolerance_px=tolerance_px).query_idx)
        for tolerance_px in (0.0, 0.3, 1.0, 3.0, 1e9)
    ]
    assert num == sorted(num)
    assert num[0] == 0 < num[1] < num[2] < num[4] == len(queries_xy)


def test_queries_beyond_the_image_find_nothing() -> None:
    maps = view(smooth_field())
    beyond_xy = [[-0.1, 5.0], [WIDTH + 0.1, 5.0], [5.0, -3.0], [5.0, HEIGHT + 0.01], [1e9, -1e9]]
    found = match(np.array([*beyond_xy, [50.0, 50.0]]), maps, maps, tolerance_px=1e12)
    assert found.query_idx.tolist() == [5]


def test_no_queries_give_no_matches() -> None:
    maps = view(smooth_field())
    found = match(np.empty((0, 2)), maps, maps)
    assert len(found.query_idx) == len(found.confidence) == 0
    assert found.points_xy.shape == (0, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_descriptors_give_no_matches_rather_than_an_error(value: float) -> None:
    maps = view(smooth_field())
    found = match(queries(), torch.full_like(maps, value), maps)
    assert len(found.query_idx) == 0


# -- confidence -----------------------------------------------------------------------------------


def test_confidence_is_that_of_both_ends_between_nought_and_one() -> None:
    maps = view(smooth_field())
    first, second = torch.full(maps.shape[:2], 2.0), torch.full(maps.shape[:2], 8.0)
    first[40, 60], second[10, 20] = 0.0, math.inf
    centers_xy = np.array([[30.5, 30.5], [60.5, 40.5], [20.5, 10.5]])
    found = match_queries(centers_xy, maps, first, maps, second, tolerance_px=0.5)
    np.testing.assert_allclose(found.confidence, [4.0 / 5.0, 0.0, 1.0])


def test_matches_without_a_number_for_confidence_are_left_out() -> None:
    maps = view(smooth_field())
    broken = torch.full(maps.shape[:2], math.nan)
    found = match_queries(queries(), maps, broken, maps, ones(maps), tolerance_px=1.0)
    assert len(found.query_idx) == 0


# -- batches and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_block_scores", [None, 2**14])
def test_a_batch_gives_what_its_pairs_give_alone(max_block_scores: int | None) -> None:
    fields = [smooth_field(seed=seed) for seed in range(3)]
    first = torch.stack([view(field) for field in fields])
    second = torch.stack([view(field, shift_xy=(2.3, 1.1), size=(112, 96)) for field in fields])
    confidence = 0.5 + torch.rand(first.shape[:3], generator=torch.Generator().manual_seed(0))
    queries_xy = [queries(100, seed=1), np.empty((0, 2)), queries(37, seed=2)]
    found = match_query_batch(
        queries_xy,
        first,
        confidence,
        second,
        ones(second),
        tolerance_px=1.0,
        max_block_scores=max_block_scores,
    )
    assert [len(matches.query_idx) > 20 for matches in found] == [True, False, True]
    for pair, matches in enumerate(found):
        alone = match_queries(
            queries_xy[pair],
            first[pair],
            confidence[pair],
            second[pair],
            ones(second[pair]),
            tolerance_px=1.0,
        )
        assert same(matches, alone)


def test_an_empty_batch_is_an_empty_list() -> None:
    none = torch.empty(0, HEIGHT, WIDTH, NUM_COMPONENTS)
    assert match_query_batch([], none, ones(none), none, ones(none), tolerance_px=1.0) == []


def test_both_searches_stay_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    product = torch.bmm

    def spy(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        sizes.append(left.shape[0] * left.shape[1] * right.shape[2])
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "bmm", spy)
    maps = view(smooth_field())
    match_queries(
        queries(), maps, ones(maps), maps, ones(maps), tolerance_px=1.0, max_block_scores=2**14
    )
    assert sum(sizes) == 2 * 400 * WIDTH * HEIGHT
    assert max(sizes) <= 2**14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_matches() -> None:
    field, queries_xy = smooth_field(), queries()
    first, second = view(field), view(field, shift_xy=(3.37, -2.61))
    found = match(queries_xy, first, second)
    on_gpu = match_queries(
        queries_xy,
        first.cuda(),
        ones(first).cuda(),
        second.cuda(),
        ones(second).cuda(),
        tolerance_px=1.0,
    )
    common = np.intersect1d(found.query_idx, on_gpu.query_idx)
    assert len(common) > 0.98 * max(len(found.query_idx), len(on_gpu.query_idx))
