"""MASt3R as a second matcher: few pairs of few keyframes, on a card with little memory.

Images of all keyframes are kept small, as JPEG; a keyframe is encoded when it is matched for the
first time. Pairs are decoded one at a time. What the GPU holds is stated: the weights, what one
pair takes, and encoded keyframes in the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters.matchers.mast3r.architecture import NetworkShape
from adapters.matchers.mast3r.images import NetworkImage, PixelMapping, prepare_image
from adapters.matchers.mast3r.matcher import Mast3rMatcher
from adapters.matchers.mast3r.network import Mast3rNetwork
from engine.errors import ConfigError, InferenceError
from engine.types import Frame, FrameId, MatchRequest, PairMatches, Uint8Array

_JPEG_QUALITY = 95
_BYTES_PER_MB = 1_000_000
# Upper bounds of what one image or pair takes, counted on tensors in the tests of this room.
_VALUES_PER_PIXEL = 400  # of layers, descriptors and attention, in the type of the weights
_BYTES_PER_QUERY = 240_000  # of blocks of scores, and of descriptors that are scored again
_LIBRARY_BYTES = 128_000_000  # workspaces of CUDA's libraries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _KeptImage:
    """A keyframe's image as the network takes it, packed."""

    jpeg: Uint8Array  # (B,)
    mapping: PixelMapping
    original_size: tuple[int, int]  # width and height in px

    @classmethod
    def of(cls, frame: Frame, *, edge_px: int) -> _KeptImage:
        import cv2

        image = prepare_image(frame.pixels, edge_px=edge_px)
        _, jpeg = cv2.imencode(
            ".jpg",
            np.ascontiguousarray(image.pixels[:, :, ::-1]),
            [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY],
        )
        return cls(jpeg=jpeg, mapping=image.mapping, original_size=(frame.width, frame.height))

    def unpacked(self) -> NetworkImage:
        import cv2

        pixels = cv2.imdecode(self.jpeg, cv2.IMREAD_COLOR)
        assert pixels is not None, "it was packed here"
        return NetworkImage(
            pixels=np.ascontiguousarray(pixels[:, :, ::-1], np.uint8), mapping=self.mapping
        )


class Mast3rSecond:
    """``SecondMatcher`` over a MASt3R matcher that describes nothing.

    Args:
        matcher: encodes and matches.
        image_edge_px: longer edge of what the network sees.
        max_kept_images: the most keyframes whose images are kept, the latest.
    """

    def __init__(self, matcher: Mast3rMatcher, *, image_edge_px: int, max_kept_images: int) -> None:
        self._matcher = matcher
        self._image_edge_px = image_edge_px
        self._max_kept = max_kept_images
        self._kept: OrderedDict[FrameId, _KeptImage] = OrderedDict()

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return self._matcher.name

    @property
    def peak_gpu_mb(self) -> float:
        """The most memory PyTorch ever held on the GPU; 0 without one."""
        return self._matcher.peak_gpu_mb

    def keep(self, frame: Frame) -> None:
        """Keeps a keyframe's image, and lets go of the oldest beyond the limit."""
        self._kept[frame.frame_id] = _KeptImage.of(frame, edge_px=self._image_edge_px)
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)

    def holds(self, frame_id: FrameId) -> bool:
        """Whether a keyframe's image is kept."""
        return frame_id in self._kept

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches each pair; keyframes that were never matched are encoded first.

        Raises:
            InferenceError: an image is not kept any more, the device has no room, or tokens cannot
                be kept or read back.
        """
        for frame_id in sorted({i for one in requests for i in (one.pair.first, one.pair.second)}):
            if not self._matcher.is_encoded(frame_id):
                self._encode(frame_id)
        return self._matcher.match(requests)

    def _encode(self, frame_id: FrameId) -> None:
        kept = self._kept.get(frame_id)
        if kept is None:
            raise InferenceError(f"the image of keyframe {frame_id} is not kept any more")
        self._matcher.encode(frame_id, kept.unpacked(), original_size=kept.original_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBudget:
    """What a network takes of a GPU's memory, one pair at a time, in bytes."""

    weights: int
    working: int  # for one image or pair; an upper bound
    cache: int  # left for encoded keyframes


def gpu_budget(
    shape: NetworkShape,
    *,
    edge_px: int,
    num_queries: int,
    bytes_per_value: int,
    max_mb: int,
    wanted_cache_mb: int,
) -> GpuBudget:
    """What the parts may take, so that all of it stays below a limit.

    Args:
        shape: of the network.
        edge_px: longer edge of the images; square ones are the largest.
        num_queries: keypoints of an image that are looked up in another.
        bytes_per_value: of weights and tokens; 2 in bfloat16.
        max_mb: the limit, ``second.max_gpu_mb``.
        wanted_cache_mb: for encoded keyframes, if there is room.

    Raises:
        ConfigError: the weights and one pair take more.
    """
    with torch.device("meta"):
        network = Mast3rNetwork(shape)
    weights = sum(one.numel() for one in network.parameters()) * bytes_per_value
    working = (
        _VALUES_PER_PIXEL * bytes_per_value * edge_px**2
        + _BYTES_PER_QUERY * num_queries
        + _LIBRARY_BYTES
    )
    room = max_mb * _BYTES_PER_MB - weights - working
    if room < 0:
        needed_mb = -(-(weights + working) // _BYTES_PER_MB)
        raise ConfigError(
            f"second.max_gpu_mb={max_mb}: the network and one pair take {needed_mb} MB in"
            f" {bytes_per_value} bytes a weight"
        )
    return GpuBudget(
        weights=weights, working=working, cache=min(room, wanted_cache_mb * _BYTES_PER_MB)
    )
