"""MASt3R matcher: the engine's dense matcher; keyframes encoded once, pairs decoded in batches.

Leroy, Cabon and Revaud, "Grounding Image Matching in 3D with MASt3R" (2024).
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from adapters.images.dense_keypoints import dense_features
from adapters.matchers.mast3r.architecture import Grid
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.images import (
    PATCH_PX,
    NetworkImage,
    normalise,
    plan_image,
    prepare_image,
)
from adapters.matchers.mast3r.pair_matches import (
    DecodedPairs,
    ImageFrame,
    PointMap,
    match_pairs,
    no_matches,
)
from adapters.matchers.mast3r.token_store import TokensOfRun, TokenStore
from engine.dense_types import SeenDepth
from engine.errors import InferenceError
from engine.types import Features, Frame, FrameId, ImagePair, MatchRequest, PairMatches

if TYPE_CHECKING:
    from engine.config import DenseMatchingConfig, Mast3rConfig

logger = logging.getLogger(__name__)

_BYTES_PER_MB = 1_000_000
# PyTorch has an error of its own for a GPU's memory alone. That of a processor, of pinned memory
# and of CUDA's libraries runs out with one that only its message reveals.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|STATUS_ALLOC_FAILED", re.IGNORECASE)


class PairNetwork(Protocol):
    """The network, ours or upstream's."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB from -1 to 1, to tokens (B, N, E)."""

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        """Tokens (B, N1, E), (B, N2, E) of two views to their outputs; points in view 1."""


class TokenPlaceIndex(Protocol):
    """A place index that gets the tokens of keyframes when they are described."""

    def put_tokens(self, frame_id: FrameId, tokens: Tensor) -> None:
        """Keeps a keyframe's (N, E) tokens until it is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where the network runs."""

    name: str  # cpu, cuda or cuda:N
    dtype: torch.dtype  # of weights and tokens
    num_threads: int = 1  # of inference on a CPU

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU of CUDA."""
        return self.name.startswith("cuda")


def open_token_store(config: Mast3rConfig, device: Device) -> TokenStore:
    """An empty store with the configured limits."""
    return TokenStore(
        device=device.name,
        dtype=device.dtype,
        device_limit_bytes=config.device_cache_mb * _BYTES_PER_MB,
        host_limit_bytes=config.host_cache_mb * _BYTES_PER_MB,
    )


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error says that the device, or the processor beside it, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(
        _NO_MEMORY.search(str(error))
    )


class Mast3rMatcher:
    """``PairMatcher`` over a MASt3R network.

    The network works for one thread at a time; encoded keyframes are kept in a bounded store.

    Args:
        config: how images are matched, and how much memory that may take.
        dense: the keypoint tables it makes.
        network: encodes and decodes.
        device: where it does so.
        places: gets each keyframe's tokens; None: nothing does.
        is_metric: whether the network's points are in metres.
        tokens: where encoded keyframes are kept; None: in a store of its own.
    """

    def __init__(
        self,
        config: Mast3rConfig,
        *,
        dense: DenseMatchingConfig,
        network: PairNetwork,
        device: Device,
        places: TokenPlaceIndex | None,
        is_metric: bool,
        tokens: TokensOfRun | None = None,
    ) -> None:
        self._config = config
        self._dense = dense
        self._network = network
        self._device = device
        self._places = places
        self._is_metric = is_metric
        self._images: dict[FrameId, ImageFrame] = {}
        self._tokens = open_token_store(config, device) if tokens is None else tokens
        self._batch_pairs = config.batch_pairs
        self._inference = Lock()

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return "mast3r"

    @property
    def peak_gpu_mb(self) -> float:
        """The most memory PyTorch ever held on the GPU; 0 without one."""
        if not self._device.is_cuda:
            return 0.0
        return torch.cuda.max_memory_allocated(self._device.name) / _BYTES_PER_MB

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do."""
        return True

    @property
    def batch_pairs(self) -> int:
        """Pairs decoded together: fewer than configured after memory ran out."""
        return self._batch_pairs

    def describe(self, frame: Frame) -> Features:
        """Encodes a keyframe and gives it corners and a grid of free rows.

        Raises:
            InferenceError: the device has no room for one image, or its tokens cannot be kept.
        """
        image = prepare_image(frame.pixels, edge_px=self._config.image_edge_px)
        try:
            self.encode(frame.frame_id, image, original_size=(frame.width, frame.height))
        except InferenceError as error:
            raise InferenceError(f"{frame.name}: {error}") from error
        return dense_features(frame, self._dense)

    def encode(
        self, frame_id: FrameId, image: NetworkImage, *, original_size: tuple[int, int]
    ) -> None:
        """Encodes a keyframe's image; from then on it can be matched.

        Args:
            frame_id: the keyframe.
            image: as the network takes it.
            original_size: width and height of its original in px.

        Raises:
            InferenceError: the device has no room for one image, or its tokens cannot be kept.
        """
        try:
            with self._one_at_a_time():
                pixels = torch.tensor(image.pixels, device=self._device.name)[None]
                tokens = self._network.encode(normalise(pixels))[0]
            self._tokens.put(frame_id, tokens)
            if self._places is not None:
                self._places.put_tokens(frame_id, tokens)
        except (RuntimeError, MemoryError) as error:
            self._tokens.discard(frame_id)  # they are not needed
            if not is_out_of_memory(error):
                raise
            raise InferenceError(f"{self._device.name} has no room to encode it") from error
        self._images[frame_id] = ImageFrame(
            mapping=image.mapping,
            grid=(image.height // PATCH_PX, image.width // PATCH_PX),
            original_size=original_size,
        )

    def tokens(self, frame_id: FrameId) -> tuple[Tensor, tuple[int, int]]:
        """The tokens (N, E) of an encoded keyframe, and width and height of its original in px.

        Raises:
            InferenceError: they cannot be read back.
            KeyError: it is not encoded.
        """
        (tokens,) = self._tokens.get([frame_id])
        return tokens, self._images[frame_id].original_size

    def take_tokens(
        self, frame_id: FrameId, tokens: Tensor, *, original_size: tuple[int, int]
    ) -> None:
        """Takes the tokens (N, E) of a keyframe that was encoded elsewhere.

        Raises:
            InferenceError: they cannot be kept.
            ValueError: they are not of an image of that size.
        """
        plan = plan_image(original_size, edge_px=self._config.image_edge_px)
        grid = (plan.size[1] // PATCH_PX, plan.size[0] // PATCH_PX)
        if len(tokens) != grid[0] * grid[1]:
            raise ValueError(f"{len(tokens)} tokens for a grid of {grid}")
        self._tokens.put(frame_id, tokens)
        self._images[frame_id] = ImageFrame(
            mapping=plan.mapping, grid=grid, original_size=original_size
        )

    def is_encoded(self, frame_id: FrameId) -> bool:
        """Whether a keyframe can be matched."""
        return frame_id in self._images

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches each pair; pairs of images of the same sizes are decoded together.

        When the device runs out of memory, batches are halved from then on.

        Raises:
            InferenceError: there is no room for a single pair, or tokens cannot be read back.
            KeyError: a keyframe was not described here.
        """
        matched: list[PairMatches] = [no_matches(request) for request in requests]
        groups: defaultdict[tuple[Grid, Grid, bool], list[int]] = defaultdict(list)
        for idx, request in enumerate(requests):
            groups[*self._grids(request), request.wants_pointmaps].append(idx)
        for group in groups.values():
            done = 0
            while done < len(group):
                batch = group[done : done + self._batch_pairs]
                found = self._match_or_halve([requests[idx] for idx in batch])
                if found is not None:
                    for idx, matches in zip(batch, found, strict=True):
                        matched[idx] = matches
                    done += len(batch)
        return matched

    def seen_depth(self, frame_id: FrameId, neighbour_id: FrameId) -> SeenDepth | None:
        """The depth of a keyframe by its pointmap beside another one, where it is confident.

        Raises:
            InferenceError: there is no room for a single pair, or tokens cannot be read back.
        """
        if not (self.is_encoded(frame_id) and self.is_encoded(neighbour_id)):
            return None
        image = self._images[frame_id]
        try:
            with self._one_at_a_time():
                tokens1, tokens2 = self._tokens.get([frame_id, neighbour_id])
                view, _ = self._network.decode(
                    tokens1[None],
                    tokens2[None],
                    grid1=image.grid,
                    grid2=self._images[neighbour_id].grid,
                    with_points=True,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InferenceError(f"{self._device.name} has no room for a single pair") from error
        points = PointMap.of(view, 0)
        if points is None:
            return None
        return SeenDepth(
            depth=points.confident_depth(),
            scale_xy=image.mapping.scale_xy,
            offset_xy=image.mapping.offset_xy,
        )

    def _match_or_halve(self, requests: Sequence[MatchRequest]) -> list[PairMatches] | None:
        """The matches of a batch; None when it must be tried again with a smaller one."""
        try:
            with self._one_at_a_time():
                return self._match_batch(requests)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(requests) == 1:
                raise InferenceError(
                    f"{self._device.name} has no room for a single pair"
                ) from error
        if self._device.is_cuda:
            torch.cuda.empty_cache()
        if self._batch_pairs == self._config.batch_pairs:
            logger.warning(
                "%s has no room for %d pairs at once; going on with smaller batches",
                self._device.name,
                len(requests),
            )
        self._batch_pairs = max(1, len(requests) // 2)
        return None

    def _match_batch(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Decodes and matches pairs whose images have the same two sizes."""
        pairs = [request.pair for request in requests]
        decoded = self._decode(pairs, wants_points=requests[0].wants_pointmaps)
        return match_pairs(requests, decoded, config=self._config)

    def decode(self, pair: ImagePair, *, wants_points: bool) -> DecodedPairs:
        """What the network says of a pair of encoded keyframes, which `match_decoded` takes."""
        with self._one_at_a_time():
            return self._decode([pair], wants_points=wants_points)

    def match_decoded(self, request: MatchRequest, decoded: DecodedPairs) -> PairMatches:
        """Matches a pair that was decoded before."""
        with self._one_at_a_time():
            (matched,) = match_pairs([request], decoded, config=self._config)
        return matched

    def _decode(self, pairs: Sequence[ImagePair], *, wants_points: bool) -> DecodedPairs:
        grid1, grid2 = self._images[pairs[0].first].grid, self._images[pairs[0].second].grid
        tokens1 = torch.stack(self._tokens.get([pair.first for pair in pairs]))
        tokens2 = torch.stack(self._tokens.get([pair.second for pair in pairs]))
        first_leads = self._network.decode(
            tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=wants_points
        )
        second_leads = None
        if self._config.symmetric:
            second, first = self._network.decode(
                tokens2, tokens1, grid1=grid2, grid2=grid1, with_points=wants_points
            )
            second_leads = first, second
        return DecodedPairs(
            images1=[self._images[pair.first] for pair in pairs],
            images2=[self._images[pair.second] for pair in pairs],
            first_leads=first_leads,
            second_leads=second_leads,
            is_metric=self._is_metric,
        )

    def _grids(self, request: MatchRequest) -> tuple[Grid, Grid]:
        return self._images[request.pair.first].grid, self._images[request.pair.second].grid

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Gives one thread the network, and on a CPU the cores that the network may use."""
        with self._inference:
            if self._device.is_cuda or self._device.num_threads == 1:
                yield
                return
            num_threads = torch.get_num_threads()
            torch.set_num_threads(self._device.num_threads)
            try:
                yield
            finally:
                torch.set_num_threads(num_threads)
