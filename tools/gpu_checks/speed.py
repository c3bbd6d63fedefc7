"""How fast MASt3R runs on a device, and how much memory it takes, with random weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mast3r_bench.inputs import TINY, random_network
from mast3r_bench.measuring import Probe, Stage, matrix_rate_tflops

from adapters.matchers.mast3r.architecture import VIT_LARGE, Grid
from adapters.matchers.mast3r.graphs import GraphedNetwork, graphed_on
from adapters.matchers.mast3r.images import PATCH_PX
from adapters.matchers.mast3r.matcher import Device, is_out_of_memory
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.pair_matches import look_up_both_ways
from adapters.matchers.mast3r.second import gpu_budget

WITH_POINTS = "the same with points"
_TOLERANCE_PX = 1.0
_ANY_GPU_MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions:
    """What is measured, and how long."""

    size: tuple[int, int]  # width and height of images, network px
    queries: int  # of each image, looked up in the other one
    batches: tuple[int, ...]
    seconds: float  # least time of a measurement
    is_small: bool  # a small network in place of ViT-L


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFigure:
    """One piece of work, a batch at a time."""

    what: str
    precision: str
    batch: int
    per_s: float | None  # images or pairs; None: the device has no room for the batch
    allocated_mb: float  # the most that PyTorch held on the GPU meanwhile; 0 without one
    reserved_mb: float


def measure_speed(device: Device, options: SpeedOptions) -> tuple[float, list[SpeedFigure]]:
    """The rate of matrix products, TFLOPS, and figures of encoding and matching, in one type."""
    stage = Stage(device=device, probe=Probe(device), seconds=options.seconds, repeats=1)
    matrix_tflops = matrix_rate_tflops(stage, tiny=options.is_small)
    shape = TINY if options.is_small else VIT_LARGE
    network = graphed_on(device.name, random_network(shape, device=device.name, dtype=device.dtype))
    figures = []
    for batch in options.batches:
        work = {
            "encode": _encoding(network, device, options, batch=batch),
            "decode and match": _matching(network, device, options, batch=batch, points=False),
            WITH_POINTS: _matching(network, device, options, batch=batch, points=True),
        }
        figures += [_measure(stage, what, run, batch=batch) for what, run in work.items()]
    del network, work
    _free(device)
    return matrix_tflops, figures


def stated_mb(options: SpeedOptions) -> float:
    """What LiveSfM states that the network takes in bfloat16, with one pair; see `gpu_budget`."""
    budget = gpu_budget(
        TINY if options.is_small else VIT_LARGE,
        edge_px=max(options.size),
        num_queries=options.queries,
        bytes_per_value=torch.bfloat16.itemsize,
        max_mb=_ANY_GPU_MB,
        wanted_cache_mb=0,
    )
    return (budget.weights + budget.working) / 1e6


def taken_mb(device_name: str, options: SpeedOptions) -> float:
    """The most that is held in bfloat16 with one image or pair, as a second matcher runs them."""
    device = Device(name=device_name, dtype=torch.bfloat16)
    stage = Stage(device=device, probe=Probe(device), seconds=0.0, repeats=1)
    shape = TINY if options.is_small else VIT_LARGE
    network = random_network(shape, device=device.name, dtype=device.dtype)
    stage.forget_peak()
    _encoding(network, device, options, batch=1)()
    _matching(network, device, options, batch=1, points=False)()
    return stage.memory().allocated_mb


def _encoding(
    network: Mast3rNetwork | GraphedNetwork, device: Device, options: SpeedOptions, *, batch: int
) -> Callable[[], object]:
    return lambda: network.encode(_images(device, options, num=batch))


def _matching(
    network: Mast3rNetwork | GraphedNetwork,
    device: Device,
    options: SpeedOptions,
    *,
    batch: int,
    points: bool,
) -> Callable[[], object]:
    """Decodes pairs whose images are encoded, and looks keypoints of both up in the other one."""
    width, height = options.size
    grid: Grid = (height // PATCH_PX, width // PATCH_PX)
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand((batch, options.queries, 2), generator=generator).double().numpy()
    queries_xy = list(queries * options.size)

    def run() -> None:
        tokens = torch.zeros(
            (batch, grid[0] * grid[1], network.shape.encoder_dim),
            device=device.name,
            dtype=device.dtype,
        ).normal_()
        views = network.decode(tokens, tokens.flip(1), grid1=grid, grid2=grid, with_points=points)
        look_up_both_ways(queries_xy, queries_xy, *views, tolerance_px=_TOLERANCE_PX)

    return run


def _images(device: Device, options: SpeedOptions, *, num: int) -> torch.Tensor:
    width, height = options.size
    return torch.empty((num, 3, height, width), device=device.name).uniform_(-1.0, 1.0)


def _measure(stage: Stage, what: str, run: Callable[[], object], *, batch: int) -> SpeedFigure:
    """Times a batch; one that the device has no room for has no rate."""
    stage.forget_peak()
    per_s = None
    try:
        per_s = 1.0 / stage.measure(run, items=batch).median_s
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    memory = stage.memory()
    _free(stage.device)
    return SpeedFigure(
        what=what,
        precision=str(stage.device.dtype).removeprefix("torch."),
        batch=batch,
        per_s=per_s,
        allocated_mb=memory.allocated_mb,
        reserved_mb=memory.reserved_mb,
    )


def _free(device: Device) -> None:
    gc.collect()
    if device.is_cuda:
        torch.cuda.empty_cache()
