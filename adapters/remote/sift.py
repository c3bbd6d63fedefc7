"""SIFT on other machines; what they do not do is done here, with the same result to the bit.

Descriptors go to the cluster once, by their digest; matches come back as rows. The image of a
keyframe goes there once: as JPEG where it came so, else as PNG, which is lossless.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.matchers.sift import SiftMatcher
from adapters.remote.ahead import AheadWork
from adapters.remote.cluster import Call, Cluster, ClusterAwayError
from adapters.remote.frames import frame_to_plain
from adapters.remote.hosted import key_of
from adapters.remote.messages import Message
from adapters.remote.plain import from_plain, to_plain
from engine.config import RemoteConfig, SiftConfig
from engine.errors import InferenceError
from engine.types import Features, Frame, FrameId, MatchRequest, PairMatches, Uint8Array

Keys = tuple[str, str]  # of the descriptors of a pair

_PAIRS_PER_CALL = 4  # a pair takes no longer than a call does


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A pair in a call."""

    call: Call
    number: int  # of the pair in the call


class RemoteSift:
    """A `PairMatcher` and `WorksAhead`.

    Args:
        config: of the cluster.
        sift: of the matcher.
        local: does what the cluster does not.
        cluster: makes the cluster, which asks for descriptors by their keys.
    """

    def __init__(
        self,
        config: RemoteConfig,
        *,
        sift: SiftConfig,
        local: SiftMatcher,
        cluster: Callable[[Callable[[str], Message | None]], Cluster],
    ) -> None:
        self._sift = sift
        self._local = local
        self.cluster = cluster(self._provide)
        self._ahead = AheadWork(config, self.cluster)
        self._keys = _Keys()
        self._lean_before: dict[str, Uint8Array] = {}  # descriptors, by camera
        self._described: dict[FrameId, Future[Call | None]] = {}  # ahead
        self._asked: dict[Keys, _Asked] = {}  # ahead
        self._asked_for: dict[FrameId, list[Keys]] = {}

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return self._local.name

    @property
    def peak_gpu_mb(self) -> float:
        """0: everything runs on processors."""
        return 0.0

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do not."""
        return False

    @property
    def keyframes_ahead(self) -> int:
        """Keyframes whose work the cluster may have at once, before their turn."""
        return self._ahead.num_keyframes

    # -- describing -------------------------------------------------------------------------------

    def describe_ahead(self, frame: Frame) -> None:
        """Begins to describe a frame, unless that needs the one before it."""
        if self._sift.lean_features or not self.cluster.is_usable():
            return
        describing = self._ahead.submit(lambda: self._begin_to_describe(frame, is_ahead=True))
        if describing is not None:
            with self._ahead.lock:
                self._described[frame.frame_id] = describing

    def _described_ahead(self, frame_id: FrameId) -> Call | None:
        """The call that describes a frame, waited for while it is being sent; None: there is none.

        One that is not being sent yet never will be.
        """
        with self._ahead.lock:
            describing = self._described.pop(frame_id, None)
        return None if describing is None or describing.cancel() else describing.result()

    def describe(self, frame: Frame) -> Features:
        """As `SiftMatcher.describe`.

        Raises:
            InferenceError: OpenCV could not work on the image.
        """
        described = self._describe_there(frame)
        self._ahead.count("described_here" if described is None else "described_there")
        features, lean = described or self._local.describe_after(
            frame, self._lean_before.get(frame.camera_key)
        )
        if lean is not None:
            self._lean_before[frame.camera_key] = np.asarray(lean, np.uint8)
        return features

    def _describe_there(self, frame: Frame) -> tuple[Features, Uint8Array | None] | None:
        """A frame's table and its lean descriptors; None where the cluster does not give them."""
        call = self._described_ahead(frame.frame_id)
        if not self.cluster.is_usable():
            return None
        try:
            if call is None:
                call = self._begin_to_describe(frame)
            self.cluster.make_urgent(call)
            message = self.cluster.result(call)
            features = from_plain(Features, message.fields, message.arrays)
            key = str(message.fields["key"])
        except ClusterAwayError:
            return None
        except (InferenceError, KeyError, ValueError) as error:
            self.cluster.report_refusal("describe", f"{frame.name}: {error}")
            return None
        self._keys.add(features.descriptors, key)
        self.cluster.know(key)
        return features, message.arrays.get("lean")

    def _begin_to_describe(self, frame: Frame, *, is_ahead: bool = False) -> Call:
        fields, arrays = frame_to_plain(frame)
        before = self._lean_before.get(frame.camera_key)
        if before is not None:
            arrays["before"] = before
        call = self.cluster.call("describe", fields, arrays, stage="describe", is_ahead=is_ahead)
        return self._ahead.track(frame.frame_id, call)

    # -- matching ---------------------------------------------------------------------------------

    def match_ahead(self, frame_id: FrameId, requests: Sequence[MatchRequest]) -> None:
        """Begins with pairs of a keyframe."""
        self._ahead.begin(frame_id, lambda: self._match_ahead(frame_id, requests))

    def _match_ahead(self, frame_id: FrameId, requests: Sequence[MatchRequest]) -> None:
        pairs = [self._keys_of(request) for request in requests if _can_match(request)]
        with self._ahead.lock:
            pairs = [keys for keys in dict.fromkeys(pairs) if keys not in self._asked]
        for start in range(0, len(pairs), _PAIRS_PER_CALL):
            if self._ahead.has_turn(frame_id):
                return
            some = pairs[start : start + _PAIRS_PER_CALL]
            call = self._begin_to_match(frame_id, some, [None] * len(some), is_ahead=True)
            with self._ahead.lock:
                self._ahead.count_locked("pairs_ahead", len(some))
                for number, keys in enumerate(some):
                    self._asked[keys] = _Asked(call=call, number=number)
                    self._asked_for.setdefault(frame_id, []).append(keys)

    def forget_ahead(self, frame_id: FrameId) -> None:
        """Ends what was begun for a frame."""
        self._forget(frame_id)
        self._ahead.submit(lambda: self._forget(frame_id))  # after what is being begun for it

    def _forget(self, frame_id: FrameId) -> None:
        with self._ahead.lock:
            describing = self._described.pop(frame_id, None)
            left = [
                keys
                for keys in self._asked_for.pop(frame_id, ())
                if self._asked.pop(keys, None) is not None
            ]
        if describing is not None:
            describing.cancel()
        self._ahead.count("pairs_ahead_unused", len(left))

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """As `SiftMatcher.match`."""
        for request in requests:
            self._ahead.turn_came(request.pair.second)
        begun = self._begin_all(requests) if self.cluster.is_usable() else {}
        matched: list[PairMatches] = []
        for number, request in enumerate(requests):
            found = self._result(request, begun[number]) if number in begun else None
            if found is None:
                (found,) = self._local.match([request])
                self._ahead.count("matched_here")
            matched.append(found)
        return matched

    def _begin_all(self, requests: Sequence[MatchRequest]) -> dict[int, _Asked]:
        """Begins with all that can be matched there, by their places; some were begun ahead."""
        begun: dict[int, _Asked] = {}
        new: list[int] = []
        for number, request in enumerate(requests):
            if not _can_match(request):
                continue
            with self._ahead.lock:
                asked = None
                if request.guide is None:
                    asked = self._asked.pop(self._keys_of(request), None)
            if asked is None:
                new.append(number)
            else:
                begun[number] = asked
                self.cluster.make_urgent(asked.call)
        self._ahead.count("pairs_ahead_used", len(begun))
        for start in range(0, len(new), _PAIRS_PER_CALL):
            some = new[start : start + _PAIRS_PER_CALL]
            call = self._begin_to_match(
                requests[some[0]].pair.second,
                [self._keys_of(requests[number]) for number in some],
                [requests[number] for number in some],
            )
            begun |= {number: _Asked(call=call, number=place) for place, number in enumerate(some)}
        return begun

    def _begin_to_match(
        self,
        frame_id: FrameId,
        pairs: Sequence[Keys],
        requests: Sequence[MatchRequest | None],
        *,
        is_ahead: bool = False,
    ) -> Call:
        fields: list[list[object]] = []
        arrays: dict[str, Any] = {}
        for number, (keys, request) in enumerate(zip(pairs, requests, strict=True)):
            guide = None if request is None else request.guide
            own_fields, own_arrays = ({}, {}) if guide is None else to_plain(guide)
            fields.append([*keys, own_fields])
            arrays |= {f"{number}.{name}": array for name, array in own_arrays.items()}
        call = self.cluster.call(
            "match",
            {"pairs": fields},
            arrays,
            stage="match",
            keys=list(dict.fromkeys(key for keys in pairs for key in keys)),
            is_ahead=is_ahead,
        )
        return self._ahead.track(frame_id, call)

    def _result(self, request: MatchRequest, asked: _Asked) -> PairMatches | None:
        """The matches of a pair; None where the cluster does not give them."""
        try:
            arrays = self.cluster.result(asked.call).arrays
            found = PairMatches.of_rows(
                request,
                matches_idx=arrays[f"{asked.number}.rows"],
                confidence=arrays[f"{asked.number}.confidence"],
            )
        except ClusterAwayError:
            return None
        except (InferenceError, KeyError, ValueError, IndexError) as error:
            self.cluster.report_refusal("match", f"{request.pair}: {error}")
            return None
        self._ahead.count("matched_there")
        return found

    def _keys_of(self, request: MatchRequest) -> Keys:
        return self._keys.of(request.first.descriptors), self._keys.of(request.second.descriptors)

    def _provide(self, key: str) -> Message | None:
        descriptors = self._keys.descriptors(key)
        return None if descriptors is None else Message(kind="", arrays={"state": descriptors})

    # -- the run ----------------------------------------------------------------------------------

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


class _Keys:
    """Keys of descriptors by their digest, which is taken once. For any thread."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[weakref.ref[Uint8Array], str]] = {}
        self._arrays: weakref.WeakValueDictionary[str, Uint8Array] = weakref.WeakValueDictionary()

    def of(self, descriptors: Uint8Array) -> str:
        """The key of descriptors (N, D)."""
        number = id(descriptors)
        known = self._by_id.get(number)
        if known is not None and known[0]() is descriptors:
            return known[1]
        key = key_of(descriptors)
        self.add(descriptors, key)
        return key

    def add(self, descriptors: Uint8Array, key: str) -> None:
        """Takes descriptors whose key is known."""
        number = id(descriptors)

        def forget(gone: weakref.ref[Uint8Array]) -> None:
            if (kept := self._by_id.get(number)) is not None and kept[0] is gone:
                del self._by_id[number]

        self._by_id[number] = weakref.ref(descriptors, forget), key
        self._arrays[key] = descriptors

    def descriptors(self, key: str) -> Uint8Array | None:
        """Descriptors by their key, where somebody still has them."""
        return self._arrays.get(key)


def _can_match(request: MatchRequest) -> bool:
    """Whether a pair has so many keypoints that a matcher is needed."""
    return len(request.first) > 0 and len(request.second) > 1
