#!/usr/bin/env python3
"""Measures the MASt3R matcher on a GPU or a CPU, beside upstream's own code where that is given.

    tools/bench_mast3r.py                               # random weights: the work is the same
    tools/bench_mast3r.py --upstream ~/mast3r           # a checkout of upstream's, with submodules
    tools/bench_mast3r.py --device cpu --precision bfloat16 --batches 1
    tools/bench_mast3r.py --checkpoint checkpoints/MASt3R_... --images photos/

Pairs go through `Mast3rMatcher.match`, as in a run: tokens are cached, each pair is decoded once,
and points of both images are looked up in the other one. Upstream's path is that of its README:
`inference`, which encodes both images of each pair, then `fast_reciprocal_NNs`, in float32 with
TF32 as its import sets it. Upstream needs einops, huggingface_hub, scipy and tqdm besides.

Every figure is the median over repeated runs after a warm-up. On a GPU, parts are timed by CUDA
events; on a CPU, shares and rates of arithmetic are by CPU time, which holds on a shared machine
where wall time does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a run, and before PyTorch looks

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mast3r_bench.figures import PairFigures, Report
from mast3r_bench.inputs import (
    TINY,
    closest_pairs,
    make_frames,
    network_images,
    random_network,
)
from mast3r_bench.measuring import Probe, Stage, device_name, matrix_rate_tflops
from mast3r_bench.native import Bench, ProbedNetwork, count_gflop
from mast3r_bench.upstream import Upstream

from adapters.matchers.mast3r.architecture import VIT_LARGE, NetworkShape
from adapters.matchers.mast3r.checkpoint import load_checkpoint
from adapters.matchers.mast3r.images import PATCH_PX
from adapters.matchers.mast3r.matcher import Device
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.open_matcher import choose_device
from engine.config import Mast3rConfig, SceneGraphConfig
from engine.errors import EngineError

GPU_AGREEMENT_PAIRS, CPU_AGREEMENT_PAIRS = 8, 1


def run(arguments: argparse.Namespace) -> Report:
    """Measures everything that is asked for."""
    device = choose_device(Mast3rConfig(device=arguments.device, precision=arguments.precision))
    if device.is_cuda:
        torch.cuda.set_device(torch.device(device.name).index or 0)
    else:
        device = replace(device, num_threads=arguments.threads or device.num_threads)
        torch.set_num_threads(device.num_threads)
    stage = Stage(
        device=device, probe=Probe(device), seconds=arguments.seconds, repeats=arguments.repeats
    )
    batches = arguments.batches or ([1, 8, 32] if device.is_cuda else [1])
    pairs = closest_pairs(max(batches))
    print_progress(f"{device_name(device)}: {len(pairs)} pairs")
    num_frames = 1 + max(second for _, second in pairs)
    frames = make_frames(num_frames, size=arguments.size, folder=arguments.images)
    network = make_network(arguments, device)
    bench = Bench(
        stage=stage,
        network=ProbedNetwork(network, stage.probe),
        frames=frames,
        pairs=pairs,
        queries=arguments.queries,
        size=arguments.size,
    )
    report = measure_matcher(bench, network.shape, batches, arguments=arguments)
    if arguments.upstream is None:
        return report
    is_exact = device.dtype == torch.float32
    exact = network if is_exact else make_network(arguments, replace(device, dtype=torch.float32))
    return compare(report, bench, exact, root=arguments.upstream)


def make_network(arguments: argparse.Namespace, device: Device) -> Mast3rNetwork:
    """The network of the checkpoint, or a random one."""
    if arguments.checkpoint is not None:
        checkpoint = load_checkpoint(arguments.checkpoint, device=device.name, dtype=device.dtype)
        return checkpoint.network
    shape = TINY if arguments.tiny else VIT_LARGE
    return random_network(shape, device=device.name, dtype=device.dtype)


def measure_matcher(
    bench: Bench, shape: NetworkShape, batches: Sequence[int], *, arguments: argparse.Namespace
) -> Report:
    """This project's figures."""
    stage = bench.stage
    print_progress("matrix products")
    matrix_tflops = matrix_rate_tflops(stage, tiny=arguments.tiny)
    encode_gflop, *pair_gflop = count_gflop(shape, size=bench.size)
    print_progress("encoding")
    describe = bench.describe()
    encodes = [bench.encode(batch) for batch in sorted({1, *batches})]
    per_keyframe = SceneGraphConfig().pairs_per_keyframe
    num_queries, figures = measure_pairs(
        bench,
        batches,
        pair_gflop=pair_gflop,
        matrix_tflops=matrix_tflops,
        encoder_s=encodes[0].busy_s / per_keyframe,  # alone, as keyframes come
    )
    random = "random weights, tiny" if arguments.tiny else "random weights, ViT-L"
    return Report(
        device=device_name(stage.device),
        torch=torch.__version__,
        precision=str(stage.device.dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        weights=random if arguments.checkpoint is None else str(arguments.checkpoint),
        width=bench.size[0],
        height=bench.size[1],
        queries=num_queries,
        pairs_per_keyframe=per_keyframe,
        matrix_tflops=matrix_tflops,
        encode_gflop=encode_gflop,
        pair_gflop=pair_gflop[False],
        pair_with_points_gflop=pair_gflop[True],
        describe=describe,
        encodes=encodes,
        pairs=figures,
        upstream=[],
        agreement=None,
    )


def measure_pairs(
    bench: Bench,
    batches: Sequence[int],
    *,
    pair_gflop: Sequence[float],
    matrix_tflops: float,
    encoder_s: float,
) -> tuple[int, list[PairFigures]]:
    """How many points are looked up each way, and each batch without and with points.

    Args:
        bench: what is measured.
        batches: numbers of pairs.
        pair_gflop: work of a pair without and with points.
        matrix_tflops: of large matrix products.
        encoder_s: a pair's share of encoding a keyframe.
    """
    figures: list[PairFigures] = []
    num_queries = 0
    for batch in batches:
        matcher = bench.open_matcher(batch)
        tables = [matcher.describe(frame) for frame in bench.frames]
        requests = bench.requests(tables, num=batch)
        num_queries = max(len(request.query_rows1) for request in requests)
        for with_points in (False, True):
            print_progress(
                f"matching {batch} at once, {'with' if with_points else 'without'} points"
            )
            figures.append(
                bench.match(
                    matcher,
                    [replace(request, wants_pointmaps=with_points) for request in requests],
                    gflop=pair_gflop[with_points],
                    matrix_tflops=matrix_tflops,
                    encoder_s=encoder_s,
                )
            )
    return num_queries, figures


def compare(report: Report, bench: Bench, exact: Mast3rNetwork, *, root: Path) -> Report:
    """The report with upstream's figures in it."""
    images = network_images(bench.frames, bench.stage.device)
    upstream = Upstream(exact, root, images, bench.stage)
    figures = []
    for plain, with_points in zip(report.pairs[::2], report.pairs[1::2], strict=True):
        print_progress(f"upstream, {plain.batch} at once")
        pairs = bench.pairs[: plain.batch]
        try:
            figures.append(upstream.measure(pairs, ours=plain, with_points=with_points))
        except torch.OutOfMemoryError:
            print_progress(f"upstream has no room for {plain.batch} pairs at once")
    print_progress("agreement")
    num = GPU_AGREEMENT_PAIRS if bench.stage.device.is_cuda else CPU_AGREEMENT_PAIRS
    agreement = upstream.agreement(exact, images, bench.pairs[:num])
    return replace(report, upstream=figures, agreement=agreement)


def print_progress(text: str) -> None:
    """What is being done, for who waits."""
    print(f"bench_mast3r: {text}", file=sys.stderr, flush=True)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in px, whole patches."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: expected WIDTHxHEIGHT")
    size = int(width), int(height)
    if any(edge % PATCH_PX or not 64 <= edge <= 2048 for edge in size):
        raise argparse.ArgumentTypeError(f"{text}: expected multiples of 16 from 64 to 2048")
    return size


def parse_batches(text: str) -> list[int]:
    """Different numbers of pairs, rising."""
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: expected numbers like 1,8,32")
    return sorted({int(number) for number in numbers})


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options given, by default those of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="auto", help="cuda, cuda:1 or cpu; else what there is")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "bfloat16", "float32", "float16")
    )
    parser.add_argument("--size", type=parse_size, default=(512, 384), help="network px")
    parser.add_argument("--batches", type=parse_batches, help="1,8,32 on a GPU, 1 on a CPU")
    parser.add_argument("--checkpoint", type=Path, help="file or folder; else random weights")
    parser.add_argument("--upstream", type=Path, help="checkout of github.com/naver/mast3r")
    parser.add_argument("--images", type=Path, help="folder of photos; else a synthetic flight")
    parser.add_argument("--queries", type=int, default=2048, help="points looked up each way")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a measurement")
    parser.add_argument("--repeats", type=int, default=3, help="least runs of a measurement")
    parser.add_argument("--threads", type=int, help="of a CPU; else all cores")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try this tool")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measures, and prints the table or the JSON object."""
    arguments = parse_arguments(given)
    try:
        report = run(arguments)
    except EngineError as error:
        sys.exit(f"bench_mast3r: {error}")
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        from mast3r_bench.table import show  # rich is not needed for JSON

        show(report)


if __name__ == "__main__":
    main()
