"""This project's matcher, measured as a run uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapters.matchers.mast3r.architecture import Grid, NetworkShape
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.images import PATCH_PX
from adapters.matchers.mast3r.matcher import Mast3rMatcher
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.retrieval import PooledPlaceIndex
from engine.config import DenseMatchingConfig, Mast3rConfig
from engine.matching.keypoint_tables import KeypointTable
from engine.types import Features, Frame, ImagePair, MatchRequest
from mast3r_bench.figures import PARTS, EncodeFigures, PairFigures, Timing
from mast3r_bench.inputs import network_images
from mast3r_bench.measuring import Probe, Stage


class ProbedNetwork:
    """The network as the matcher sees it; the parts of a decode are timed."""

    def __init__(self, network: Mast3rNetwork, probe: Probe) -> None:
        self._network = network
        self._probe = probe
        for head in (network.downstream_head1, network.downstream_head2):
            probe.watch(head, "heads")
            probe.watch(head.dpt, "points_head")
            probe.watch(head.head_local_features, "descriptors_head")

    def encode(self, images: Tensor) -> Tensor:
        """As the network's."""
        with self._probe.span("encoder"):
            return self._network.encode(images)

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        """As the network's."""
        with self._probe.span("decode"):
            return self._network.decode(
                tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=with_points
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """The matcher's measurements."""

    stage: Stage
    network: ProbedNetwork
    frames: list[Frame]
    pairs: list[tuple[int, int]]  # positions of frames
    queries: int
    size: tuple[int, int]

    def open_matcher(self, batch: int) -> Mast3rMatcher:
        """The matcher as a run opens it."""
        return Mast3rMatcher(
            Mast3rConfig(image_edge_px=max(self.size), batch_pairs=batch),
            dense=self.dense,
            network=self.network,
            device=self.stage.device,
            places=PooledPlaceIndex(),
            is_metric=True,
        )

    @property
    def dense(self) -> DenseMatchingConfig:
        """The keypoint tables."""
        return DenseMatchingConfig(
            max_query_points=self.queries, max_keypoints=max(4096, self.queries)
        )

    def describe(self) -> Timing:
        """A keyframe as the engine hands it over."""
        matcher = self.open_matcher(1)
        return self.stage.measure(lambda: matcher.describe(self.frames[0]))

    def encode(self, batch: int) -> EncodeFigures:
        """The network's encoder on images that lie on the device."""
        chosen = [self.frames[idx % len(self.frames)] for idx in range(batch)]
        images = network_images(chosen, self.stage.device)
        timing = self.stage.measure(lambda: self.network.encode(images), items=batch)
        busy_s = self.stage.probe.seconds()["encoder"] / (timing.num_runs * batch)
        return EncodeFigures(batch=batch, per_keyframe=timing, busy_s=busy_s)

    def match(
        self,
        matcher: Mast3rMatcher,
        requests: Sequence[MatchRequest],
        *,
        gflop: float,
        matrix_tflops: float,
        encoder_s: float,
    ) -> PairFigures:
        """Requests whose keyframes were described, answered at once."""
        num_found: list[int] = []

        def work() -> None:
            with self.stage.probe.span("match"):
                matched = matcher.match(requests)
            num_found[:] = [len(found) for found in matched]

        self.stage.forget_peak()
        timing = self.stage.measure(work, items=len(requests))
        sums = self.stage.probe.seconds()
        seconds = {part: total / (timing.num_runs * len(requests)) for part, total in sums.items()}
        pairs_per_s = 1.0 / timing.median_s
        tflops = gflop / self.stage.busy_s(timing) / 1e3
        with_encoding = 1.0 / (1.0 + encoder_s / seconds["match"])
        return PairFigures(
            batch=len(requests),
            decoded_together=min(len(requests), matcher.batch_pairs),
            with_points=requests[0].wants_pointmaps,
            per_pair=timing,
            pairs_per_s=pairs_per_s,
            pairs_per_s_with_encoding=pairs_per_s * with_encoding,
            num_matches=float(np.mean(num_found)),
            shares=shares_of(seconds, encoder_s=encoder_s),
            network_tflops=tflops,
            matrix_rate_share=tflops / matrix_tflops,
            memory=self.stage.memory(),
        )

    def requests(self, tables: Sequence[Features], *, num: int) -> list[MatchRequest]:
        """The first pairs, with the queries that the engine would ask for."""
        rows = [
            KeypointTable(table, size=self.size, config=self.dense).query_rows(self.queries)
            for table in tables
        ]
        return [
            MatchRequest(
                pair=ImagePair(tables[first].frame_id, tables[second].frame_id),
                first=tables[first],
                second=tables[second],
                query_rows1=rows[first],
                query_rows2=rows[second],
            )
            for first, second in self.pairs[:num]
        ]


def shares_of(seconds: dict[str, float], *, encoder_s: float) -> dict[str, float]:
    """What each part takes of a pair and of the encoding that comes with it."""
    points_s, descriptors_s = seconds.get("points_head", 0.0), seconds["descriptors_head"]
    of_parts = (
        encoder_s,
        seconds["decode"] - seconds["heads"],
        points_s,
        descriptors_s,
        seconds["heads"] - points_s - descriptors_s,
        seconds["match"] - seconds["decode"],
    )
    return {part: own / sum(of_parts) for part, own in zip(PARTS, of_parts, strict=True)}


def count_gflop(shape: NetworkShape, *, size: tuple[int, int]) -> tuple[float, float, float]:
    """Work of an encode, and of a decode without and with points; a multiplication counts as 2.

    Counted on a network without memory, in which nothing is computed.
    """
    grid = (size[1] // PATCH_PX, size[0] // PATCH_PX)
    with torch.device("meta"):
        network = Mast3rNetwork(shape)
        images = torch.empty(1, 3, size[1], size[0])
        tokens = torch.empty(1, grid[0] * grid[1], shape.encoder_dim)
    counts = []
    for with_points in (None, False, True):
        with FlopCounterMode(display=False) as counter:
            if with_points is None:
                network.encode(images)
            else:
                network.decode(tokens, tokens, grid1=grid, grid2=grid, with_points=with_points)
        counts.append(counter.get_total_flops() / 1e9)
    return counts[0], counts[1], counts[2]
