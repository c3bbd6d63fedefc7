"""Upstream's own code, measured on the same pairs with the same weights."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.matchers.mast3r.images import PATCH_PX
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.reciprocal import fast_reciprocal_matches
from adapters.matchers.mast3r.upstream import build_upstream
from mast3r_bench.figures import Agreement, PairFigures, UpstreamFigures
from mast3r_bench.measuring import Stage

_SUBSAMPLE = 8  # px between seeds, upstream's default
_BLOCK = 2**13  # scores at a time along each side, as its README has it


class Upstream:
    """Upstream's path, called as its README shows, with this project's weights.

    Args:
        exact: a network in float32.
        root: the folder of upstream's checkout.
        images: (F, 3, H, W) as the network reads them.
        stage: where and how long it is measured.
    """

    def __init__(self, exact: Mast3rNetwork, root: Path, images: Tensor, stage: Stage) -> None:
        # Weights lie as upstream's own loading would leave them.
        state = {name: weight.contiguous() for name, weight in exact.state_dict().items()}
        with said_on_stderr():
            network = build_upstream(exact.shape, state, root=root, device=stage.device.name)
            self._inference = importlib.import_module("dust3r.inference").inference
            self._fast_nn = importlib.import_module("mast3r.fast_nn").fast_reciprocal_NNs
        self._model = network._model
        self._stage = stage
        size = np.array([images.shape[2:]], np.int32)
        self._views = [
            {"img": image[None].cpu(), "true_shape": size, "idx": idx, "instance": str(idx)}
            for idx, image in enumerate(images)
        ]

    def forward(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Both images of each pair to descriptors (B, H, W, D) of both."""
        views = [(self._views[first], self._views[second]) for first, second in pairs]
        output = self._inference(
            views, self._model, self._stage.device.name, batch_size=len(pairs), verbose=False
        )
        return output["pred1"]["desc"], output["pred2"]["desc"]

    def match(self, descriptors1: Tensor, descriptors2: Tensor) -> tuple[Any, Any]:
        """Matches (M, 2), (M, 2), whole px, of descriptors (H, W, D) of two images."""
        found: tuple[Any, Any] = self._fast_nn(
            descriptors1,
            descriptors2,
            subsample_or_initxy1=_SUBSAMPLE,
            device=self._stage.device.name,
            dist="dot",
            block_size=_BLOCK,
        )
        return found

    def measure(
        self, pairs: Sequence[tuple[int, int]], *, ours: PairFigures, with_points: PairFigures
    ) -> UpstreamFigures:
        """Forward and matching of pairs, compared with this project's figures for them."""
        probe = self._stage.probe

        def work() -> None:
            with probe.span("forward"):
                descriptors = self.forward(pairs)
            with probe.span("matching"):
                for maps in zip(*descriptors, strict=True):
                    self.match(*maps)

        self._stage.forget_peak()
        with said_on_stderr(), tf32(True):
            timing = self._stage.measure(work, items=len(pairs))
        seconds = probe.seconds()
        return UpstreamFigures(
            batch=len(pairs),
            per_pair=timing,
            pairs_per_s=1.0 / timing.median_s,
            matching_share=seconds["matching"] / (seconds["matching"] + seconds["forward"]),
            ratio=timing.median_s * ours.pairs_per_s,
            ratio_with_points=timing.median_s * with_points.pairs_per_s,
            ratio_with_encoding=timing.median_s * ours.pairs_per_s_with_encoding,
            cpu_ratio=timing.cpu_s / ours.per_pair.cpu_s,
            cpu_ratio_with_points=timing.cpu_s / with_points.per_pair.cpu_s,
            memory=self._stage.memory(),
        )

    def agreement(
        self, exact: Mast3rNetwork, images: Tensor, pairs: Sequence[tuple[int, int]]
    ) -> Agreement:
        """The same scheme on descriptors that each network made from the same weights."""
        grid = (images.shape[2] // PATCH_PX, images.shape[3] // PATCH_PX)
        num = {"ours": 0, "upstream": 0, "both": 0, "either": 0, "searched": 0, "any": 0}
        difference = 0.0
        for first, second in pairs:
            with said_on_stderr(), tf32(False):
                tokens1, tokens2 = (exact.encode(images[[idx]]) for idx in (first, second))
                views = exact.decode(tokens1, tokens2, grid1=grid, grid2=grid, with_points=False)
                own = [view.descriptors[0] for view in views]
                given = [maps[0] for maps in self.forward([(first, second)])]
                theirs = as_set(*self.match(*given))
                moved = [maps.to(own[0]) for maps in given]
                ours, searched = native_matches(*own), native_matches(*moved)
            for one, other in zip(own, moved, strict=True):
                difference = max(difference, float((one - other).abs().max()))
            num["ours"] += len(ours)
            num["upstream"] += len(theirs)
            num["both"] += len(ours & theirs)
            num["either"] += len(ours | theirs)
            num["searched"] += len(searched & theirs)
            num["any"] += len(searched | theirs)
        return Agreement(
            num_pairs=len(pairs),
            num_ours=num["ours"],
            num_upstream=num["upstream"],
            share=num["both"] / max(num["either"], 1),
            share_same_descriptors=num["searched"] / max(num["any"], 1),
            max_descriptor_difference=difference,
        )


def native_matches(descriptors1: Tensor, descriptors2: Tensor) -> set[tuple[int, ...]]:
    """This project's matches of two images."""
    found = fast_reciprocal_matches(descriptors1, descriptors2, subsample=_SUBSAMPLE)
    return as_set(found.first_xy, found.second_xy)


def as_set(first_xy: Any, second_xy: Any) -> set[tuple[int, ...]]:
    """Matches (M, 2), (M, 2) to compare."""
    ends = [each.cpu() if isinstance(each, Tensor) else each for each in (first_xy, second_xy)]
    return {tuple(row) for row in np.concatenate(ends, axis=1).tolist()}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round what float32 products read to 10 bits."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, was_allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = was_allowed


@contextmanager
def said_on_stderr() -> Iterator[None]:
    """Keeps what upstream prints out of the figures, and its warnings out of sight."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
