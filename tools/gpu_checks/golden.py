"""MASt3R on a device against golden data: the network's stages, and matches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.matchers.mast3r.architecture import VIT_LARGE
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.query_matching import match_query_batch
from adapters.matchers.mast3r.reciprocal import fast_reciprocal_matches
from tests.support.mast3r_weights import TINY, formula_network, golden, intermediate_values

# RMS differences from upstream's float32 on a CPU, as a share of the RMS of what is compared. The
# order of sums differs from device to device; points are exponentials, and differ most.
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_COMPARED = re.compile(r"(enc|dec|dpt_raw|pts3d|conf|desc|desc_conf)(\d)(_\d+)?(_s\d+)?")
_SPACINGS = (8, 4, 2, 1)  # px between seeds
_LEAST_SHARE = 0.995  # of matches: equal scores may be told apart otherwise elsewhere
_QUERY_STEP = 2  # px between queries
_MAX_SHIFT_PX = 0.02
_TOLERANCE_PX = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCheck:
    """One comparison."""

    what: str
    value: float
    limit: float
    is_right: bool


@contextmanager
def full_float32() -> Iterator[None]:
    """Lets a GPU multiply float32 in full; cuDNN's convolutions round to 10 bits by default."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, was_allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = was_allowed


def check_networks(
    device: str, dtypes: list[torch.dtype], *, is_small: bool
) -> Iterator[GoldenCheck]:
    """Encoder, decoder and heads of the golden networks in each type; small: the tiny one alone."""
    sets = [(TINY, ("tiny_LL", "tiny_PP", "tiny_LP"))]
    if not is_small:
        sets.append((VIT_LARGE, ("vitl_formula_LL",)))
    for shape, names in sets:
        network = formula_network(shape)
        for dtype in dtypes:
            network = network.to(device, dtype) if dtype is dtypes[0] else network.to(dtype)
            for name in names:
                with full_float32():
                    yield from _check_stages(network, name)


def check_matching(device: str) -> Iterator[GoldenCheck]:
    """The published scheme against upstream's matches, and look-ups against those on a CPU."""
    case = golden("fast_nn")
    first, second = case["desc1"], case["desc2"]
    with full_float32():
        for spacing in _SPACINGS:
            name = f"fast_dot_s{spacing}"
            found = fast_reciprocal_matches(
                first.to(device), second.to(device), subsample=spacing, distance="dot"
            )
            expected = _rows(case[f"{name}_xy1"].numpy(), case[f"{name}_xy2"].numpy())
            share = _shared(_rows(found.first_xy, found.second_xy), expected)
            yield _at_least(f"match {name}: share of upstream's", share)
        yield from _check_queries(first, second, device)


def _check_stages(network: Mast3rNetwork, name: str) -> Iterator[GoldenCheck]:
    """The largest difference of each stage, of both views."""
    device = next(network.parameters()).device
    case = golden(name)
    on_device = {key: value.to(device) for key, value in case.items() if key.startswith("img")}
    values = intermediate_values(network, {**case, **on_device})
    differences: dict[str, list[float]] = {}
    for key, expected in case.items():
        match = _COMPARED.fullmatch(key)
        if match is not None:
            step = int((match[4] or "_s1")[2:])
            value = values["".join(part or "" for part in match.groups()[:3])]
            difference = _relative_rms(value[:, ::step, ::step], expected)
            differences.setdefault(match[1], []).append(difference)
    precision, limit = str(network.dtype).removeprefix("torch."), _LIMITS[network.dtype]
    for stage, all_of_stage in differences.items():
        difference = float(np.max(all_of_stage))  # no number where one is none
        yield GoldenCheck(
            what=f"{name} {precision} {stage}: RMS difference",
            value=difference,
            limit=limit,
            is_right=difference <= limit,
        )


def _check_queries(first: Tensor, second: Tensor, device: str) -> Iterator[GoldenCheck]:
    height, width = first.shape[:2]
    grid = np.stack(
        np.meshgrid(np.arange(0, width, _QUERY_STEP), np.arange(0, height, _QUERY_STEP))
    )
    queries_xy = grid.reshape(2, -1).T + 0.5
    found = []
    for where in ("cpu", device):
        maps = [each[None].to(where) for each in (first, second)]
        ones = [torch.ones(each.shape[:3], device=where) for each in maps]
        found += match_query_batch(
            [queries_xy], maps[0], ones[0], maps[1], ones[1], tolerance_px=_TOLERANCE_PX
        )
    expected, here = ({*one.query_idx.tolist()} for one in found)
    yield _at_least("match queries: share of a CPU's", _shared(here, expected))
    common, of_cpu, of_device = np.intersect1d(
        found[0].query_idx, found[1].query_idx, return_indices=True
    )
    shifts_px = np.abs(found[0].points_xy[of_cpu] - found[1].points_xy[of_device]).max(axis=1)
    shift_px = float(np.quantile(shifts_px, _LEAST_SHARE)) if len(common) else float("nan")
    yield GoldenCheck(
        what="match queries: px from where a CPU finds them",
        value=shift_px,
        limit=_MAX_SHIFT_PX,
        is_right=shift_px <= _MAX_SHIFT_PX,
    )


def _relative_rms(value: Tensor, expected: Tensor) -> float:
    exact = expected.double()
    difference = value.cpu().double() - exact
    return float(difference.square().mean().sqrt() / exact.square().mean().sqrt())


def _at_least(what: str, share: float) -> GoldenCheck:
    return GoldenCheck(what=what, value=share, limit=_LEAST_SHARE, is_right=share >= _LEAST_SHARE)


def _rows(first_xy: Any, second_xy: Any) -> set[tuple[int, ...]]:
    return {tuple(row) for row in np.concatenate([first_xy, second_xy], axis=1).tolist()}


def _shared(found: set[Any], expected: set[Any]) -> float:
    """What both have as a share of what either has."""
    return len(found & expected) / max(len(found | expected), 1)
