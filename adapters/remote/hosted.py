"""Matchers as a worker has them, one for each run: calls of plain arrays in, plain arrays out.

What a run's matcher needs of a keyframe is its state: descriptors of SIFT, tokens of MASt3R, for
the oracle the truth. It has a key: the digest of descriptors, else the frame's id.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from adapters.remote.frames import frame_from_plain
from adapters.remote.messages import Array, Arrays, Fields
from adapters.remote.plain import Plain, from_plain, to_plain
from adapters.remote.prepared import Prepared
from engine.config import Config
from engine.errors import InferenceError
from engine.types import (
    EpipolarGuide,
    Features,
    FrameId,
    ImagePair,
    MatchRequest,
    PairMatches,
)

_MAX_STATE_BYTES = 512_000_000
_MAX_PREPARED = 256  # pairs, of each run


class HostedMatcher(Protocol):
    """What a worker asks of a matcher. One thread at a time."""

    def describe(self, fields: Fields, arrays: Arrays) -> Plain:
        """Describes an image."""

    def encode(self, key: str, fields: Fields, arrays: Arrays) -> tuple[Array, Array]:
        """Makes the state of a keyframe from its image, keeps it, and returns it.

        Returns:
            The state, and a vector (E,) that recognizes its place.
        """

    def holds(self, key: str) -> bool:
        """Whether it has the state of a keyframe."""

    def reserve(self, keys: Sequence[str]) -> None:
        """Keeps the states that a call uses, those it has and those it takes, until the next."""

    def take(self, key: str, state: Array) -> None:
        """Takes the state of a keyframe that was made elsewhere."""

    def match(self, keys: tuple[str, str], fields: Fields, arrays: Arrays) -> Plain:
        """Matches a pair of keyframes whose states it has."""

    def prepare(self, keys: tuple[str, str]) -> int:
        """Does what it can of matching a pair before it is known what is asked for.

        Returns:
            Of how many others what was done is evicted; it is done once more when they are matched.
        """


class States:
    """Arrays by their keys, the latest used, up to a limit of memory.

    The limit is exceeded only by what one call uses. What is evicted is fetched again when a call
    needs it, which the cluster process counts.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._arrays: OrderedDict[str, Array] = OrderedDict()
        self._reserved: frozenset[str] = frozenset()
        self._num_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> Array:
        self._arrays.move_to_end(key)
        return self._arrays[key]

    def reserve(self, keys: Collection[str]) -> None:
        """Evicts none of these, also of those yet to be put, until others are reserved."""
        self._reserved = frozenset(keys)
        for key in keys:
            if key in self._arrays:
                self._arrays.move_to_end(key)

    def put(self, key: str, array: Array) -> None:
        """Keeps an array, and evicts those used longest ago where there is no room."""
        if key in self._arrays:
            return
        self._arrays[key] = array
        self._num_bytes += array.nbytes
        while self._num_bytes > self._max_bytes:
            oldest = next(iter(self._arrays))
            if oldest == key or oldest in self._reserved:
                return  # reserved ones are the newest
            self._num_bytes -= self._arrays.pop(oldest).nbytes


def open_hosted(spec: Mapping[str, Any]) -> Callable[[], HostedMatcher]:
    """What makes the matcher of each run, by what a run says about it.

    Args:
        spec: the name of the matcher, and the settings that it uses.

    Raises:
        ConfigError: they are wrong, or the matcher cannot be opened here.
    """
    config = Config.model_validate(spec["config"])
    match spec["matcher"]:
        case "sift":
            states = States(max_bytes=_MAX_STATE_BYTES)
            return lambda: HostedSift(config, states=states)
        case "mast3r":
            from adapters.remote.hosted_mast3r import mast3r_hosts

            return mast3r_hosts(config)
        case "oracle":
            return lambda: HostedOracle(config, states=States(max_bytes=_MAX_STATE_BYTES))
        case _:
            raise ValueError(f"no matcher that runs elsewhere: {spec['matcher']}")


class HostedSift:
    """SIFT; its state of a keyframe is its descriptors.

    Args:
        config: settings.
        states: of all runs, by digest.
    """

    def __init__(self, config: Config, *, states: States) -> None:
        from adapters.matchers.sift import SiftMatcher

        self._matcher = SiftMatcher(config.sift)
        self._states = states

    def describe(self, fields: Fields, arrays: Arrays) -> Plain:
        """Describes an image; with the descriptors of the lean pass, where there is one."""
        frame = frame_from_plain(fields, arrays)
        features, lean = self._matcher.describe_after(frame, arrays.get("before"))
        plain_fields, plain_arrays = to_plain(features)
        plain_fields["key"] = key_of(features.descriptors)
        return plain_fields, plain_arrays | ({} if lean is None else {"lean": lean})

    def encode(self, key: str, fields: Fields, arrays: Arrays) -> tuple[Array, Array]:
        """Descriptors are what it gets."""
        raise InferenceError("SIFT has no state but descriptors")

    def holds(self, key: str) -> bool:
        """Whether it has descriptors."""
        return key in self._states

    def reserve(self, keys: Sequence[str]) -> None:
        """Keeps the descriptors that a call uses."""
        self._states.reserve(keys)

    def take(self, key: str, state: Array) -> None:
        """Takes descriptors (N, D)."""
        self._states.put(key, state)

    def match(self, keys: tuple[str, str], fields: Fields, arrays: Arrays) -> Plain:
        """Rows of matches and their confidence; with a guide, near its epipolar planes only."""
        guide = from_plain(EpipolarGuide, fields, arrays) if fields else None
        found = self._matched(keys, guide)
        return {}, {"rows": found.matches_idx, "confidence": found.confidence}

    def prepare(self, keys: tuple[str, str]) -> int:
        """Nothing: what will be asked for of a pair is known, so that it is matched ahead."""
        return 0

    def _matched(self, keys: tuple[str, str], guide: EpipolarGuide | None) -> PairMatches:
        first, second = (
            _table(FrameId(number), self._states[key]) for number, key in enumerate(keys, start=1)
        )
        nothing = np.empty(0, np.int64)
        request = MatchRequest(
            pair=ImagePair(FrameId(1), FrameId(2)),
            first=first,
            second=second,
            query_rows1=nothing,
            query_rows2=nothing,
            guide=guide,
        )
        return self._matcher.match([request])[0]


class HostedOracle:
    """The oracle; its state of a keyframe is what is true of its image.

    Args:
        config: settings.
        states: of this run.
    """

    def __init__(self, config: Config, *, states: States) -> None:
        from adapters.town.oracle import OracleMatcher, TrueView

        def truth(frame_id: int) -> TrueView:
            return TrueView.from_bytes(states[str(frame_id)])

        self._states = states
        self._matcher = OracleMatcher(
            config.oracle, dense=config.dense_matching, truth=truth, seed=config.runtime.seed
        )
        self._prepared: Prepared[bool] = Prepared(max_pairs=_MAX_PREPARED)

    def describe(self, fields: Fields, arrays: Arrays) -> Plain:
        """Its tables need no truth, and are made where the run is."""
        raise InferenceError("the oracle describes where the run is")

    def encode(self, key: str, fields: Fields, arrays: Arrays) -> tuple[Array, Array]:
        """The truth is what it gets."""
        raise InferenceError("the oracle has no state but the truth")

    def holds(self, key: str) -> bool:
        """Whether it knows the truth."""
        return key in self._states

    def reserve(self, keys: Sequence[str]) -> None:
        """Keeps the truth that a call uses."""
        self._states.reserve(keys)

    def take(self, key: str, state: Array) -> None:
        """Takes the truth, as bytes."""
        self._states.put(key, state)
        self._matcher.know(FrameId(int(key)), index=int(key))

    def match(self, keys: tuple[str, str], fields: Fields, arrays: Arrays) -> Plain:
        """The matches of a pair."""
        request = from_plain(MatchRequest, fields, arrays)
        is_prepared = bool(self._prepared.take(keys))
        return to_plain(self._matcher.match_pair(request, is_prepared=is_prepared))

    def prepare(self, keys: tuple[str, str]) -> int:
        """Takes the time that a pair takes."""
        if self._prepared.is_late(keys):
            return 0
        self._matcher.prepare()
        return self._prepared.put(keys, True)


def key_of(descriptors: Array) -> str:
    """The key of descriptors (N, D)."""
    digest = hashlib.blake2b(np.ascontiguousarray(descriptors).data, digest_size=16)
    return f"{digest.hexdigest()}-{len(descriptors)}"


def _table(frame_id: FrameId, descriptors: Array) -> Features:
    """A keypoint table of which only descriptors count."""
    num = len(descriptors)
    return Features(
        frame_id=frame_id,
        keypoints_xy=np.zeros((num, 2)),
        descriptors=descriptors,
        scales=np.ones(num, np.float32),
        colors=np.zeros((num, 3), np.uint8),
    )
