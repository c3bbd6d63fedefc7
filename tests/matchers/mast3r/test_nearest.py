"""Nearest descriptors: the right ones, whatever the blocks, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from adapters.matchers.mast3r.nearest import choose_block, nearest_rows

LEAST = 128  # the smallest block that there is


@pytest.fixture
def scores_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of scores of every product that is made."""
    sizes: list[int] = []
    product = torch.bmm

    def spy(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        sizes.append(left.shape[0] * left.shape[1] * right.shape[2])
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "bmm", spy)
    yield sizes


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(queries: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from the whole score matrix."""
    best = torch.matmul(queries, targets.transpose(-1, -2)).max(dim=-1)
    return best.indices, best.values


@pytest.mark.parametrize("num_targets", [1, 5, 127, 128, 129, 1000, 4096, 4097, 9000])
@pytest.mark.parametrize("max_block_scores", [None, LEAST, 1000, 100_000])
def test_blocks_find_what_the_whole_matrix_says(
    num_targets: int, max_block_scores: int | None
) -> None:
    queries, targets = rows(37, 24), rows(num_targets, 24, seed=1)
    idx, score = nearest_rows(queries, targets, max_block_scores=max_block_scores)
    expected_idx, expected_score = plain(queries, targets)
    torch.testing.assert_close(idx, expected_idx)
    torch.testing.assert_close(score, expected_score)


@pytest.mark.parametrize("max_block_scores", [None, LEAST, 5000, 40_000])
def test_every_pair_of_a_batch_searches_its_own_targets(max_block_scores: int | None) -> None:
    queries, targets = rows(5, 20, 8), rows(5, 700, 8, seed=1)
    idx, score = nearest_rows(queries, targets, max_block_scores=max_block_scores)
    for pair in range(5):
        alone = nearest_rows(queries[pair], targets[pair])
        torch.testing.assert_close(idx[pair], alone[0])
        torch.testing.assert_close(score[pair], alone[1])


@pytest.mark.parametrize("max_block_scores", [None, LEAST, 3 * LEAST, 10_000])
@pytest.mark.parametrize("places", [(3, 4), (3, 130), (127, 128), (5, 5000), (4095, 9998)])
def test_the_first_of_equal_targets_wins(
    places: tuple[int, int], max_block_scores: int | None
) -> None:
    targets = torch.zeros(10_000, 4)
    targets[list(places)] = torch.tensor([0.0, 0.0, 2.0, 0.0])
    queries = torch.eye(4)
    idx, score = nearest_rows(queries, targets, max_block_scores=max_block_scores)
    assert idx.tolist() == [0, 0, places[0], 0]
    assert score.tolist() == [0.0, 0.0, 2.0, 0.0]


def test_scores_below_zero_have_a_best_one_too() -> None:
    targets = -torch.arange(300.0, 0.0, -1.0)[:, None]
    idx, score = nearest_rows(torch.ones(2, 1), targets)
    assert idx.tolist() == [299, 299]
    assert score.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("max_block_scores", [LEAST, 5000, 2**16])
def test_no_more_scores_exist_at_a_time_than_allowed(
    scores_made: list[int], max_block_scores: int
) -> None:
    nearest_rows(rows(3, 100, 8), rows(3, 1000, 8), max_block_scores=max_block_scores)
    assert sum(scores_made) == 3 * 100 * 1000
    assert max(scores_made) <= max_block_scores


@pytest.mark.parametrize("num_pairs", [1, 32])
@pytest.mark.parametrize("exponent", [16, 20, 26])
@pytest.mark.parametrize("max_block_targets", [4096, 16384])
def test_blocks_for_full_images_use_what_they_may_and_leave_room_for_the_second_look(
    num_pairs: int, exponent: int, max_block_targets: int
) -> None:
    block = choose_block(
        num_pairs=num_pairs,
        num_queries=2048,
        num_targets=512 * 384,
        num_components=24,
        max_block_scores=2**exponent,
        max_block_targets=max_block_targets,
    )
    num_scores = block.num_pairs * block.num_queries * block.num_targets
    assert 2 ** (exponent - 1) < num_scores <= 2**exponent or block.num_queries == 2048
    assert block.num_pairs * block.num_queries * LEAST * 24 <= 2**exponent
    assert block.num_targets % LEAST == 0


def test_a_block_too_small_for_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="max_block_scores: 127, expected at least 128"):
        nearest_rows(rows(2, 4), rows(3, 4), max_block_scores=127)


def test_without_targets_there_is_nothing_to_find() -> None:
    with pytest.raises(ValueError, match="targets"):
        nearest_rows(rows(2, 4), torch.empty(0, 4))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 5, 4)])
def test_without_queries_nothing_is_found(shape: tuple[int, ...]) -> None:
    queries = torch.empty(shape)
    targets = torch.ones(*shape[:-2], 7, 4)
    idx, score = nearest_rows(queries, targets)
    assert idx.shape == score.shape == shape[:-1]


def test_tensors_of_an_inference_and_of_a_training_run_are_taken() -> None:
    queries, targets = rows(5, 4), rows(300, 4, seed=1)
    expected = plain(queries, targets)[0]
    with torch.inference_mode():
        made = queries.clone(), targets.clone()
    assert torch.equal(nearest_rows(*made)[0], expected)
    assert torch.equal(nearest_rows(queries.requires_grad_(), targets)[0], expected)
    with torch.inference_mode():
        assert torch.equal(nearest_rows(queries, targets)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("max_block_scores", [None, 2**16])
def test_a_gpu_finds_the_same(max_block_scores: int | None) -> None:
    queries, targets = rows(3, 200, 24), rows(3, 10_000, 24, seed=1)
    idx, score = nearest_rows(queries.cuda(), targets.cuda(), max_block_scores=max_block_scores)
    expected_idx, expected_score = nearest_rows(queries, targets)
    assert (idx.cpu() == expected_idx).float().mean() > 0.99
    torch.testing.assert_close(score.cpu(), expected_score, rtol=1e-3, atol=1e-3)
