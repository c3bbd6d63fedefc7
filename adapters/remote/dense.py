"""Dense matchers on other machines: states are made there, and pairs go where these are.

A keyframe's table needs no network, and is made where the run is; so a keyframe never waits for the
cluster. Its state is made from its image meanwhile, on the worker with least to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

import numpy as np

from adapters.images.dense_keypoints import dense_features
from adapters.remote.ahead import AheadWork
from adapters.remote.cluster import Call, Cluster, ClusterAwayError, inference_error
from adapters.remote.messages import Message
from adapters.remote.plain import from_plain, to_plain
from engine.config import DenseMatchingConfig, RemoteConfig
from engine.errors import InferenceError
from engine.types import Features, Float32Array, Frame, FrameId, MatchRequest, PairMatches

Keys = tuple[str, str]  # of the states of a pair

_SEND_TIMEOUT_S = 10.0


class StateSource(Protocol):
    """What the states of keyframes are made from, kept for when the cluster lost them."""

    @property
    def name(self) -> str:
        """Of the matcher."""

    @property
    def matches_everything(self) -> bool:
        """Whether the matcher gives matches that agree also for images that share nothing."""

    def keep(self, frame: Frame) -> None:
        """Keeps what the state of a keyframe is made from.

        Raises:
            InferenceError: it cannot be kept.
        """

    def provide(self, key: str) -> Message | None:
        """It, or the state itself; None where it was never kept."""

    def place_vector_here(self, frame_id: FrameId) -> Float32Array | None:
        """What recognizes a keyframe's place, (E,), made on this machine; None: it cannot be."""

    def match_here(self, request: MatchRequest) -> PairMatches:
        """Matches a pair on this machine.

        Raises:
            InferenceError: the matcher cannot run here.
        """

    def close(self) -> None:
        """Removes what it keeps."""


class RemoteDense:
    """A `PairMatcher` and `WorksAhead` over a dense matcher.

    Args:
        config: of the cluster.
        dense: the keypoint tables.
        source: keeps what states are made from, and matches here what the cluster does not.
        cluster: makes the cluster, which asks for states by their keys.
    """

    def __init__(
        self,
        config: RemoteConfig,
        *,
        dense: DenseMatchingConfig,
        source: StateSource,
        cluster: Callable[[Callable[[str], Message | None]], Cluster],
    ) -> None:
        self._dense = dense
        self._source = source
        self.cluster = cluster(source.provide)
        self._ahead = AheadWork(config, self.cluster)
        self._begun: dict[FrameId, list[Keys]] = {}  # ahead
        self._states: dict[FrameId, Future[Call | None]] = {}  # that are being made

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return self._source.name

    @property
    def peak_gpu_mb(self) -> float:
        """0: no GPU of this machine is used."""
        return 0.0

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too."""
        return self._source.matches_everything

    @property
    def keyframes_ahead(self) -> int:
        """Keyframes whose work the cluster may have at once, before their turn."""
        return self._ahead.num_keyframes

    def describe_ahead(self, frame: Frame) -> None:
        """Nothing: describing takes little, and states are made ahead of all matching."""

    def describe(self, frame: Frame) -> Features:
        """Makes a keyframe's table, and has its state made.

        Raises:
            InferenceError: its image cannot be kept.
        """
        self._source.keep(frame)
        if self._is_usable():
            making = self._ahead.submit(lambda: self._make_state(frame.frame_id))
            if making is not None:
                self._states[frame.frame_id] = making
        self._ahead.count("described_here")
        return dense_features(frame, self._dense)

    def _make_state(self, frame_id: FrameId) -> Call | None:
        key = str(frame_id)
        made_from = self._source.provide(key)
        if made_from is None or "state" in made_from.arrays:
            return None
        return self._ahead.track(frame_id, self.cluster.make_state(key, made_from))

    def place_vector(self, frame_id: FrameId) -> Float32Array | None:
        """What recognizes a keyframe's place, (E,), by the cluster, else by this machine.

        It may be asked for again: a keyframe that was described while the cluster was away has its
        state made there when it is back.

        Returns:
            None where neither can make it now.
        """
        vector = self._place_vector_there(frame_id)
        if vector is None:
            vector = self._source.place_vector_here(frame_id)
            self._ahead.count("places_here" if vector is not None else "places_failed")
        else:
            self._ahead.count("places_there")
        return vector

    def _place_vector_there(self, frame_id: FrameId) -> Float32Array | None:
        making = self._states.pop(frame_id, None)
        try:
            call = None if making is None else making.result(_SEND_TIMEOUT_S)
            if call is None and self._is_usable():
                call = self._make_state(frame_id)
            if call is None:
                return None
            vector = np.asarray(self.cluster.result(call).arrays["vector"], np.float32)
            if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
                raise ValueError("what came is no vector")
        except (ClusterAwayError, TimeoutError):
            return None
        except (KeyError, ValueError) as error:
            self.cluster.report_refusal("describe", f"the place of keyframe {frame_id}: {error}")
            return None
        return vector

    def match_ahead(self, frame_id: FrameId, requests: Sequence[MatchRequest]) -> None:
        """Begins with pairs of a keyframe: with what of them does not depend on tables."""
        pairs = [_keys_of(request) for request in requests]

        def prepare() -> None:
            with self._ahead.lock:
                if self._ahead.has_turn(frame_id) or not pairs:
                    return
                self._begun[frame_id] = pairs
                self._ahead.prepares(frame_id)
                self._ahead.count_locked("pairs_ahead", len(pairs))
                sent = list(pairs)
            self.cluster.prepare(sent)

        self._ahead.begin(frame_id, prepare)

    def forget_ahead(self, frame_id: FrameId) -> None:
        """Ends what was begun for a frame."""
        self._states.pop(frame_id, None)
        left = self._forget(frame_id)
        self._ahead.submit(lambda: self.cluster.drop([*left, *self._forget(frame_id)]))

    def _forget(self, frame_id: FrameId) -> list[Keys]:
        """Forgets what was begun for a frame; returns the pairs that nobody asked for."""
        with self._ahead.lock:
            self._ahead.ends(frame_id)
            left = self._begun.pop(frame_id, [])
            self._ahead.count_locked("pairs_ahead_unused", len(left))
        return left

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches each pair.

        Raises:
            InferenceError: the cluster does not do it, nor can this machine.
        """
        for request in requests:
            self._ahead.turn_came(request.pair.second)
        calls = [self._begin(request) for request in requests] if self._is_usable() else []
        matched = []
        for number, request in enumerate(requests):
            found = self._result(calls[number], request) if calls else None
            if found is None:
                try:
                    found = self._source.match_here(request)
                except InferenceError as error:
                    away = ClusterAwayError(f"{self.cluster.trouble or 'it is away'}; {error}")
                    raise inference_error(away) from error
                self._ahead.count("matched_here")
            matched.append(found)
        return matched

    def _is_usable(self) -> bool:
        return self.cluster.is_usable()

    def _begin(self, request: MatchRequest) -> Call:
        keys = _keys_of(request)
        with self._ahead.lock:
            for pairs in self._begun.values():
                if keys in pairs:
                    pairs.remove(keys)
                    self._ahead.count_locked("pairs_ahead_used")
        slim = replace(request, first=_slim(request.first), second=_slim(request.second))
        fields, arrays = to_plain(slim)
        call = self.cluster.call(
            "match",
            {"pairs": [[*keys, fields]]},
            {f"0.{name}": array for name, array in arrays.items()},
            stage="match",
            keys=keys,
        )
        return self._ahead.track(request.pair.second, call)

    def _result(self, call: Call, request: MatchRequest) -> PairMatches | None:
        """The matches of a pair; None where the cluster does not give them."""
        try:
            message = self.cluster.result(call)
            (fields,) = message.fields["pairs"]
            arrays = {name.removeprefix("0."): one for name, one in message.arrays.items()}
            found = from_plain(PairMatches, fields, arrays)
            if found.pair != request.pair:
                raise ValueError(f"the matches of {found.pair} came")
        except ClusterAwayError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            self.cluster.report_refusal("match", f"{request.pair}: {error}")
            return None
        self._ahead.count("matched_there")
        return found

    def report_to(self, warn: Callable[[str], None]) -> None:
        """Gets warnings when the cluster is away, when it is back, and when it refuses work."""
        self.cluster.report_to(warn)

    def figures(self) -> dict[str, object]:
        """What was sent, awaited and counted."""
        return self._ahead.figures() | self.cluster.figures()

    def close(self) -> None:
        """Ends the connection."""
        self._ahead.close()
        self.cluster.close()
        self._source.close()


def _keys_of(request: MatchRequest) -> Keys:
    return str(request.pair.first), str(request.pair.second)


def _slim(features: Features) -> Features:
    """A table without what no dense matcher looks at."""
    num = len(features)
    return replace(
        features,
        descriptors=np.zeros((num, 0), np.uint8),
        scales=np.zeros(num, np.float32),
        colors=np.zeros((num, 3), np.uint8),
    )
