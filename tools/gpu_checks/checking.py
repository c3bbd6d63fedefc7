"""The command: golden data, speed, memory and a run, in this order; each figure on one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from mast3r_bench.measuring import device_name

from adapters.matchers.mast3r.matcher import Device
from gpu_checks.golden import GoldenCheck, check_matching, check_networks
from gpu_checks.source_to_pose import measure_poses, missing_packages
from gpu_checks.speed import SpeedFigure, SpeedOptions, measure_speed, stated_mb, taken_mb

_PRECISIONS = (torch.bfloat16, torch.float32)
_SIZE = (512, 384)  # px
_SMALL_SIZE = (96, 64)  # px
_NUM_PAIRS = 4
_WRONG, _NO_DEVICE = 1, 2


def main(given: Sequence[str] | None = None) -> int:
    """Checks and measures what is asked for; returns the exit code."""
    arguments = parse_arguments(given)
    try:
        torch.zeros(1, device=arguments.device).item()
    except (AssertionError, RuntimeError) as error:  # by PyTorch's build
        print(f"gpu_check: {arguments.device} is not usable here: {error}", file=sys.stderr)
        return _NO_DEVICE
    report = check(arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
    return 0 if report["is_right"] else _WRONG


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, as one record; each is printed as it comes unless JSON is asked for."""

    def say(line: str) -> None:
        print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    name = device_name(Device(name=arguments.device, dtype=torch.float32))
    say(f"{name}, torch {torch.__version__}")
    golden = []
    checks = (
        check_networks(arguments.device, list(_PRECISIONS[::-1]), is_small=arguments.small),
        check_matching(arguments.device),
    )
    for one in (one for some in checks for one in some):
        golden.append(one)
        say(_line_of(one))
    if Device(name=arguments.device, dtype=torch.float32).is_cuda:
        golden.append(_check_memory(arguments))
        say(_line_of(golden[-1]))
    speed, rates = _measure_speed(arguments, say)
    poses = None if arguments.no_poses else _measure_poses(arguments, say)
    return {
        "device": name,
        "torch": torch.__version__,
        "is_right": all(one.is_right for one in golden),
        "golden": [asdict(one) for one in golden],
        "matrix_tflops": rates,
        "speed": [asdict(one) for one in speed],
        "source_to_pose": poses,
    }


def _line_of(one: GoldenCheck) -> str:
    return f"{'right' if one.is_right else 'WRONG'}  {one.what} {one.value:.3g} ({one.limit:g})"


def _check_memory(arguments: argparse.Namespace) -> GoldenCheck:
    """Whether a second matcher takes no more of the GPU than it is said to."""
    options = _speed_options(arguments)
    taken, stated = taken_mb(arguments.device, options), stated_mb(options)
    return GoldenCheck(
        what="one pair in bfloat16: MB", value=taken, limit=stated, is_right=taken <= stated
    )


def _speed_options(arguments: argparse.Namespace) -> SpeedOptions:
    return SpeedOptions(
        size=_SMALL_SIZE if arguments.small else _SIZE,
        queries=arguments.queries,
        batches=tuple(arguments.batches),
        seconds=arguments.seconds,
        is_small=arguments.small,
    )


def _measure_speed(
    arguments: argparse.Namespace, say: Any
) -> tuple[list[SpeedFigure], dict[str, float]]:
    options = _speed_options(arguments)
    say(f"{options.size[0]} x {options.size[1]} px, {options.queries} queries each way")
    figures: list[SpeedFigure] = []
    rates = {}
    for dtype in _PRECISIONS:
        device = Device(name=arguments.device, dtype=dtype, num_threads=torch.get_num_threads())
        precision = str(dtype).removeprefix("torch.")
        rates[precision], measured = measure_speed(device, options)
        say(f"{precision}: matrix products {rates[precision]:.3g} TFLOPS")
        for one in measured:
            rate = "no room" if one.per_s is None else f"{one.per_s:.4g} a second"
            memory = f", {one.allocated_mb:.0f} MB" * (one.allocated_mb > 0)
            say(f"{precision}: {one.what}, {one.batch} at once: {rate}{memory}")
        figures += measured
    return figures, rates


def _measure_poses(arguments: argparse.Namespace, say: Any) -> dict[str, Any] | None:
    missing = missing_packages()
    if missing:
        say(f"source to pose: left out, LiveSfM is not installed here ({', '.join(missing)})")
        return None
    figures = measure_poses(
        Device(name=arguments.device, dtype=_PRECISIONS[0], num_threads=torch.get_num_threads()),
        size=(256, 192) if arguments.small else _SIZE,
        num_frames=arguments.frames,
        num_pairs=_NUM_PAIRS,
        is_small=arguments.small,
    )
    say(
        f"source to pose: {figures.frames_per_s:.3g} frames a second,"
        f" {figures.keyframes_per_s:.3g} of them keyframes with {figures.pairs_per_keyframe} pairs;"
        f" {figures.num_registered} of {figures.num_keyframes} keyframes registered"
    )
    return asdict(figures)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options given, by default those of the command line."""
    parser = argparse.ArgumentParser(description="Checks MASt3R on a GPU.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--small", action="store_true", help="small networks and images, to try it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, _NUM_PAIRS, 16])
    parser.add_argument("--queries", type=int, default=2048, help="points looked up each way")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a measurement")
    parser.add_argument("--frames", type=int, default=150, help="of the run from source to pose")
    parser.add_argument("--no-poses", action="store_true", help="leaves that run out")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(given)
