"""MASt3R as a worker has it; its state of a keyframe is the tokens of its image.

Pairs are decoded one at a time, so that what the network says of a pair does not depend on which
others were asked for with it: results are those of a run with ``mast3r.batch_pairs=1``.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence

import numpy as np
import torch

from adapters.matchers.mast3r.images import prepare_image
from adapters.matchers.mast3r.matcher import Mast3rMatcher
from adapters.matchers.mast3r.open_matcher import mast3r_opener
from adapters.matchers.mast3r.pair_matches import DecodedPairs
from adapters.matchers.mast3r.retrieval import pooled_vector
from adapters.remote.frames import frame_from_plain
from adapters.remote.messages import Array, Arrays, Fields
from adapters.remote.plain import Plain, from_plain, to_plain
from adapters.remote.prepared import Prepared
from engine.config import Config
from engine.errors import InferenceError
from engine.types import FrameId, ImagePair, MatchRequest

_MAX_PREPARED = 16  # decoded pairs of all runs, 50 MB each at 512 x 384
DecodedAhead = Prepared[tuple[bool, DecodedPairs]]  # with points or not, by run and keys

_HEAD = struct.Struct("<5I")  # type, width and height in px, number of tokens, their length
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def mast3r_hosts(config: Config) -> Callable[[], HostedMast3r]:
    """Loads the weights; returns what makes the matcher of each run.

    The limits of memory for tokens and for decoded pairs hold for all runs together.

    Raises:
        ConfigError: they cannot be used here.
    """
    new_matcher = mast3r_opener(config.mast3r, dense=config.dense_matching)
    prepared = DecodedAhead(max_pairs=_MAX_PREPARED)
    numbers = itertools.count()
    return lambda: HostedMast3r(
        new_matcher(),
        edge_px=config.mast3r.image_edge_px,
        number=next(numbers),
        prepared=prepared,
    )


class HostedMast3r:
    """MASt3R for one run.

    Args:
        matcher: does the work.
        edge_px: of the image that the network sees.
        number: of the run, another one for each.
        prepared: keeps the pairs that were decoded ahead, of all runs.
    """

    def __init__(
        self, matcher: Mast3rMatcher, *, edge_px: int, number: int, prepared: DecodedAhead
    ) -> None:
        self._matcher = matcher
        self._number = number
        self._edge_px = edge_px
        self._wants_points = False  # as the latest request
        self._prepared = prepared

    def describe(self, fields: Fields, arrays: Arrays) -> Plain:
        """Its tables need no network, and are made where the run is."""
        raise InferenceError("mast3r describes where the run is")

    def encode(self, key: str, fields: Fields, arrays: Arrays) -> tuple[Array, Array]:
        """Encodes an image; returns its tokens, and their mean at unit length (E,)."""
        frame = frame_from_plain(fields, arrays)
        frame_id, image = FrameId(int(key)), prepare_image(frame.pixels, edge_px=self._edge_px)
        size = (frame.width, frame.height)
        self._matcher.encode(frame_id, image, original_size=size)
        tokens, _ = self._matcher.tokens(frame_id)
        return state_of(tokens, size), pooled_vector(tokens)

    def holds(self, key: str) -> bool:
        """Whether a keyframe is encoded."""
        return self._matcher.is_encoded(FrameId(int(key)))

    def reserve(self, keys: Sequence[str]) -> None:
        """Nothing: the tokens that memory has no room for are on disk, none are evicted."""

    def take(self, key: str, state: Array) -> None:
        """Takes tokens that were made elsewhere."""
        tokens, size = tokens_of(state)
        self._matcher.take_tokens(FrameId(int(key)), tokens, original_size=size)

    def match(self, keys: tuple[str, str], fields: Fields, arrays: Arrays) -> Plain:
        """The matches of a pair."""
        request = from_plain(MatchRequest, fields, arrays)
        self._wants_points = request.wants_pointmaps
        with_points, decoded = self._prepared.take(self._own(keys)) or (False, None)
        if decoded is None or with_points != request.wants_pointmaps:
            decoded = self._matcher.decode(request.pair, wants_points=request.wants_pointmaps)
        return to_plain(self._matcher.match_decoded(request, decoded))

    def prepare(self, keys: tuple[str, str]) -> int:
        """Decodes a pair; returns how many decoded ones were evicted."""
        if self._prepared.is_late(self._own(keys)):
            return 0
        pair = ImagePair.of(FrameId(int(keys[0])), FrameId(int(keys[1])))
        decoded = self._matcher.decode(pair, wants_points=self._wants_points)
        return self._prepared.put(self._own(keys), (self._wants_points, decoded))

    def _own(self, keys: tuple[str, str]) -> tuple[str, str]:
        return f"{self._number}.{keys[0]}", keys[1]


def state_of(tokens: torch.Tensor, size: tuple[int, int]) -> Array:
    """Tokens (N, E) of an image of that size as bytes: a head, then their values in C order."""
    head = _HEAD.pack(_TYPES.index(tokens.dtype), *size, *tokens.shape)
    values = tokens.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
    return np.concatenate([np.frombuffer(head, np.uint8), values])


def tokens_of(state: Array) -> tuple[torch.Tensor, tuple[int, int]]:
    """Tokens (N, E) and the size of their image from what `state_of` made of them.

    Raises:
        ValueError: it is none.
    """
    try:
        kind, width, height, num, length = _HEAD.unpack_from(state.tobytes()[: _HEAD.size])
        values = torch.tensor(state[_HEAD.size :]).view(_TYPES[kind])
        return values.reshape(num, length), (width, height)
    except (struct.error, IndexError, RuntimeError) as error:
        raise ValueError(f"no tokens: {error}") from error
