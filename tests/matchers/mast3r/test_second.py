"""MASt3R as a second matcher: encodes what is matched, and takes no more memory than it states."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.matchers.mast3r.architecture import VIT_LARGE, Grid
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.matcher import Device, Mast3rMatcher
from adapters.matchers.mast3r.nearest import CUDA_BLOCK_SCORES
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.open_matcher import within_budget
from adapters.matchers.mast3r.query_matching import match_query_batch
from adapters.matchers.mast3r.second import GpuBudget, Mast3rSecond, gpu_budget
from engine.config import DenseMatchingConfig, Mast3rConfig, SecondMatcherConfig
from engine.errors import ConfigError, InferenceError
from engine.types import (
    NO_ROW,
    Features,
    FrameId,
    ImagePair,
    MatchRequest,
    Uint8Array,
)
from tests.support.patch_network import PatchNetwork
from tests.support.textured_images import frame_of, random_texture, similarity_about

SIZE = (160, 128)
EDGE_PX = 128
SHIFT_PX = (12.0, -6.0)
TEXTURES = [random_texture(seed) for seed in range(3)]


class CountingNetwork(PatchNetwork):
    """Counts what it encodes."""

    def __init__(self) -> None:
        self.num_encoded = 0
        self.batches: list[int] = []

    def encode(self, images: Tensor) -> Tensor:
        self.num_encoded += len(images)
        return super().encode(images)

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        assert not with_points
        self.batches.append(len(tokens1))
        return super().decode(tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=with_points)


def second_over(network: PatchNetwork, *, max_kept_images: int = 10) -> Mast3rSecond:
    matcher = Mast3rMatcher(
        Mast3rConfig(image_edge_px=EDGE_PX, batch_pairs=1),
        dense=DenseMatchingConfig(),
        network=network,
        device=Device(name="cpu", dtype=torch.float32),
        places=None,
        is_metric=False,
    )
    return Mast3rSecond(matcher, image_edge_px=EDGE_PX, max_kept_images=max_kept_images)


def picture(shift_xy: tuple[float, float]) -> Uint8Array:
    motion = similarity_about((0.0, 0.0))
    motion[:, 2] += shift_xy
    layers = [one.image(*SIZE, image_from_texture=motion)[:, :, 0] for one in TEXTURES]
    return np.stack(layers, axis=2)


def table(frame_id: int, *, num: int = 40) -> Features:
    rng = np.random.default_rng(frame_id)
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=rng.uniform(30.0, np.array(SIZE) - 30.0, (num, 2)),
        descriptors=np.zeros((num, 0), np.uint8),
        scales=np.ones(num, np.float32),
        colors=np.zeros((num, 3), np.uint8),
    )


def request(first: int, second: int) -> MatchRequest:
    rows = np.arange(40)
    return MatchRequest(
        pair=ImagePair(FrameId(first), FrameId(second)),
        first=table(first),
        second=table(second),
        query_rows1=rows,
        query_rows2=rows,
    )


def test_keyframes_are_encoded_when_they_are_matched_first_and_once() -> None:
    network = CountingNetwork()
    second = second_over(network)
    for number in range(1, 6):
        second.keep(frame_of(picture((number, 0.0)), frame_id=number))
    assert network.num_encoded == 0
    second.match([request(1, 2)])
    assert network.num_encoded == 2
    second.match([request(1, 3), request(2, 3)])
    assert network.num_encoded == 3
    assert network.batches == [1, 1, 1]


def test_packed_images_match_where_they_should() -> None:
    second = second_over(PatchNetwork())
    second.keep(frame_of(picture((0.0, 0.0)), frame_id=1))
    second.keep(frame_of(picture(SHIFT_PX), frame_id=2))
    (matches,) = second.match([request(1, 2)])
    assert len(matches) >= 40  # of 80 queries
    moved = matches.points2_xy - matches.points1_xy
    assert np.median(np.linalg.norm(moved - SHIFT_PX, axis=1)) < 1.0
    assert ((matches.matches_idx == NO_ROW).sum(axis=1) == 1).all()


def test_the_latest_images_are_kept_and_others_are_said_to_be_gone() -> None:
    second = second_over(PatchNetwork(), max_kept_images=2)
    for number in (1, 2, 3):
        second.keep(frame_of(picture((number, 0.0)), frame_id=number))
    assert [second.holds(FrameId(number)) for number in (1, 2, 3, 4)] == [False, True, True, False]
    with pytest.raises(InferenceError, match="keyframe 1 is not kept any more"):
        second.match([request(1, 2)])


# -- memory of a GPU ------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made within that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._storages: dict[int, list[int]] = {}  # bytes, and tensors that share them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self._add(one)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._storages.setdefault(storage._cdata, [storage.nbytes(), 0])
        if not known[1]:
            self.now += known[0]
            self.peak = max(self.peak, self.now)
        known[1] += 1
        weakref.finalize(tensor, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        known = self._storages[key]
        known[1] -= 1
        if not known[1]:
            self.now -= known[0]
            del self._storages[key]


def budget_of(
    *, max_mb: int = SecondMatcherConfig().max_gpu_mb, num_bytes: int = 2, queries: int = 2048
) -> GpuBudget:
    config = Mast3rConfig()
    return gpu_budget(
        VIT_LARGE,
        edge_px=config.image_edge_px,
        num_queries=queries,
        bytes_per_value=num_bytes,
        max_mb=max_mb,
        wanted_cache_mb=config.device_cache_mb,
    )


def test_the_public_network_takes_less_than_a_card_of_8_gb_has_by_default() -> None:
    budget = budget_of()
    assert 1_377_000_000 < budget.weights < 1_378_000_000
    assert budget.cache == Mast3rConfig().device_cache_mb * 1_000_000
    total = budget.weights + budget.working + budget.cache
    assert 3_500_000_000 < total <= 6_000_000_000


@pytest.mark.parametrize("is_decoding", [False, True])
def test_one_image_and_one_pair_take_less_than_stated(is_decoding: bool) -> None:
    grid = (32, 32)  # a square image is the largest
    with torch.device("meta"):
        network = Mast3rNetwork(VIT_LARGE).to(torch.bfloat16)
        image = torch.empty(1, 3, 512, 512)
        tokens = torch.empty(1, 1024, VIT_LARGE.encoder_dim, dtype=torch.bfloat16)
    with LiveBytes() as live:
        if is_decoding:
            views = network.decode(tokens, tokens, grid1=grid, grid2=grid, with_points=False)
            assert len(views) == 2
        else:
            network.encode(image)
    working = budget_of(queries=0).working
    assert 0.2 * working < live.peak < 0.9 * working


def test_looking_keypoints_up_takes_less_than_stated() -> None:
    num, edge = 64, 512
    generator = torch.Generator().manual_seed(0)
    maps = torch.nn.functional.normalize(torch.rand((1, edge, edge, 4), generator=generator), dim=3)
    ones = torch.ones((1, edge, edge))
    queries_xy = np.random.default_rng(0).uniform(0.0, edge, (num, 2))
    with LiveBytes() as live:
        match_query_batch(  # both ways at once
            [queries_xy, queries_xy],
            maps.expand(2, -1, -1, -1),
            ones.expand(2, -1, -1),
            maps.expand(2, -1, -1, -1),
            ones.expand(2, -1, -1),
            tolerance_px=1.0,
            max_block_scores=CUDA_BLOCK_SCORES,
        )
    stated = budget_of(queries=num).working - budget_of(queries=0).working
    assert 0.3 * stated < live.peak < 0.8 * stated


def test_a_card_with_little_memory_keeps_fewer_keyframes_and_a_smaller_one_is_refused() -> None:
    small = budget_of(max_mb=2400)
    assert 0 < small.cache < budget_of().cache
    assert small.weights + small.working + small.cache <= 2_400_000_000
    with pytest.raises(ConfigError, match="take .* MB in 4 bytes a weight"):
        budget_of(max_mb=2400, num_bytes=4)


def test_what_is_left_of_the_gpu_s_share_is_for_encoded_keyframes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    config, dense = Mast3rConfig(), DenseMatchingConfig()

    def cache_mb(max_gpu_mb: int) -> int:
        settings = SecondMatcherConfig(max_gpu_mb=max_gpu_mb)
        given = within_budget(config, VIT_LARGE, torch.bfloat16, second=settings, dense=dense)
        assert given.batch_pairs == config.batch_pairs
        return given.device_cache_mb

    assert cache_mb(6000) == config.device_cache_mb
    assert "of 6000 MB of the GPU the weights may take 1377" in caplog.text
    assert 0 < cache_mb(2500) < 1000
    with pytest.raises(ConfigError, match="second.max_gpu_mb=1500"):
        cache_mb(1500)
