"""Recorded work of the network: the same results, bounded, and given up where it fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from adapters.matchers.mast3r.graphs import CudaRecorder, GraphedNetwork, Recording, Work
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.network import Mast3rNetwork
from tests.support.mast3r_weights import MINI, formula_network

GRID = (2, 3)
NUM_TOKENS = GRID[0] * GRID[1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass
class Recorded:
    """Work over tensors of its own, which the next replay writes over, as a CUDA graph's."""

    work: Work
    inputs: list[Tensor]
    results: list[Tensor]
    num_replays: int = 0

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self.num_replays += 1
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        for kept, made in zip(self.results, self.work(*self.inputs), strict=True):
            kept.copy_(made)
        return [result.clone() for result in self.results]


@dataclass
class Recorder:
    has_room: bool = True
    fails: bool = False
    recorded: list[Recorded] = field(default_factory=list)

    def record(self, work: Work, inputs: Sequence[Tensor]) -> Recording:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        kept = [tensor.clone() for tensor in inputs]
        self.recorded.append(Recorded(work, kept, list(work(*kept))))
        return self.recorded[-1]


@pytest.fixture(scope="module")
def network() -> Mast3rNetwork:
    return formula_network(MINI)


def images(num: int, *, seed: int, grid: tuple[int, int] = GRID) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((num, 3, 16 * grid[0], 16 * grid[1]), generator=generator) * 2 - 1


def tokens(num: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num, NUM_TOKENS, MINI.encoder_dim), generator=generator)


def decoded(
    network: Mast3rNetwork | GraphedNetwork, *, num: int, seed: int, with_points: bool = False
) -> tuple[ViewOutput, ViewOutput]:
    first, second = tokens(num, seed=seed), tokens(num, seed=seed + 1)
    return network.decode(first, second, grid1=GRID, grid2=GRID, with_points=with_points)


def parts(views: Sequence[ViewOutput]) -> list[Tensor | None]:
    names = "descriptors", "descriptor_confidence", "points3D", "confidence"
    return [getattr(view, name) for view in views for name in names]


@pytest.mark.parametrize("with_points", [False, True])
def test_what_is_replayed_is_what_the_network_says_of_the_inputs_given(
    network: Mast3rNetwork, with_points: bool
) -> None:
    recorder = Recorder()
    graphed = GraphedNetwork(network, recorder=recorder)
    for seed in range(4):
        torch.testing.assert_close(
            graphed.encode(images(2, seed=seed)), network.encode(images(2, seed=seed))
        )
        found = parts(decoded(graphed, num=2, seed=seed, with_points=with_points))
        expected = parts(decoded(network, num=2, seed=seed, with_points=with_points))
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    assert [one.num_replays for one in recorder.recorded] == [3, 3]


def test_results_stay_when_other_inputs_follow(network: Mast3rNetwork) -> None:
    graphed = GraphedNetwork(network, recorder=Recorder())
    graphed.encode(images(1, seed=0))
    first = graphed.encode(images(1, seed=1))
    before = first.clone()
    graphed.encode(images(1, seed=2))
    assert torch.equal(first, before)


def test_each_size_is_recorded_at_its_second_use(network: Mast3rNetwork) -> None:
    recorder = Recorder()
    graphed = GraphedNetwork(network, recorder=recorder)
    graphed.encode(images(1, seed=0))
    graphed.encode(images(2, seed=0))
    graphed.encode(images(1, seed=0, grid=(3, 2)))
    assert recorder.recorded == []
    graphed.encode(images(2, seed=1))
    assert [one.inputs[0].shape for one in recorder.recorded] == [(2, 3, 32, 48)]


def test_many_images_at_once_are_not_recorded(network: Mast3rNetwork) -> None:
    recorder = Recorder()
    graphed = GraphedNetwork(network, recorder=recorder)
    for seed in range(3):
        graphed.encode(images(5, seed=seed))
    assert recorder.recorded == []


def test_nothing_is_recorded_where_there_is_no_room(network: Mast3rNetwork) -> None:
    recorder = Recorder(has_room=False)
    graphed = GraphedNetwork(network, recorder=recorder)
    for seed in range(3):
        graphed.encode(images(1, seed=seed))
    assert recorder.recorded == []


def test_a_device_that_records_nothing_is_tried_once_and_the_network_goes_on(
    network: Mast3rNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    graphed = GraphedNetwork(network, recorder=Recorder(fails=True))
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            torch.testing.assert_close(
                graphed.encode(images(1, seed=seed)), network.encode(images(1, seed=seed))
            )
    (record,) = caplog.records
    assert record.getMessage() == (
        "MASt3R runs without CUDA graphs, slower for single pairs: operation not permitted when"
        " stream is capturing"
    )


def test_so_many_sizes_are_recorded_and_later_ones_run_as_they_are(network: Mast3rNetwork) -> None:
    recorder = Recorder()
    graphed = GraphedNetwork(network, recorder=recorder)
    sizes = [(rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3, 4, 5)]
    for grid in sizes:  # more than are recorded
        for seed in range(2):
            graphed.encode(images(1, seed=seed, grid=grid))
    assert len(recorder.recorded) == 12
    last = images(1, seed=2, grid=sizes[-1])
    torch.testing.assert_close(graphed.encode(last), network.encode(last))
    assert len(recorder.recorded) == 12
    graphed.encode(images(1, seed=2, grid=sizes[0]))
    assert recorder.recorded[0].num_replays == 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_replays_what_the_network_says(num: int, dtype: torch.dtype) -> None:
    network = formula_network(MINI).to("cuda", dtype)
    graphed = GraphedNetwork(network, recorder=CudaRecorder("cuda"))
    for seed in range(4):
        pixels = images(num, seed=seed).cuda()
        torch.testing.assert_close(graphed.encode(pixels), network.encode(pixels), rtol=0, atol=0)
        first, second = (tokens(num, seed=10 + seed + k).cuda().to(dtype) for k in range(2))
        views = [
            each.decode(first, second, grid1=GRID, grid2=GRID, with_points=True)
            for each in (graphed, network)
        ]
        for one, other in zip(parts(views[0]), parts(views[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
