"""What states of keyframes are made from, for each dense matcher; how pairs are matched here."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.remote.frames import frame_from_plain, frame_to_plain
from adapters.remote.messages import Message
from adapters.town.oracle import OracleMatcher
from engine.errors import EngineError, InferenceError
from engine.types import Float32Array, Frame, FrameId, MatchRequest, PairMatches

if TYPE_CHECKING:
    from adapters.matchers.mast3r.matcher import Mast3rMatcher


class Mast3rStates:
    """A `StateSource`: states are made from images, which are kept in a temporary file.

    Args:
        open_here: opens the matcher on this machine; None: it cannot run here.
    """

    def __init__(self, open_here: Callable[[], Mast3rMatcher] | None) -> None:
        self._open_here = open_here
        self._here: Mast3rMatcher | None = None
        self._file = tempfile.TemporaryFile(prefix="livesfm-images-")  # noqa: SIM115 - as long as this
        self._parts: dict[str, tuple[int, int, dict[str, Any]]] = {}  # start, bytes, fields
        self._lock = threading.Lock()
        self._opening = threading.Lock()  # one thread matches while another compares places

    @property
    def name(self) -> str:
        """Of the matcher."""
        return "mast3r"

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do."""
        return True

    def keep(self, frame: Frame) -> None:
        """Keeps the image.

        Raises:
            InferenceError: the disk is full.
        """
        fields, arrays = frame_to_plain(replace(frame, mask=None))
        image = arrays["image"]
        with self._lock:
            try:
                start = self._file.seek(0, os.SEEK_END)
                self._file.write(image.data)
            except OSError as error:
                raise InferenceError(f"{frame.name}: cannot be kept: {error.strerror}") from error
            self._parts[str(frame.frame_id)] = start, image.nbytes, fields

    def provide(self, key: str) -> Message | None:
        """The image."""
        with self._lock:
            if key not in self._parts:
                return None
            start, num_bytes, fields = self._parts[key]
            self._file.seek(start)
            image = np.frombuffer(self._file.read(num_bytes), np.uint8)
        return Message(kind="", fields=fields, arrays={"image": image})

    def match_here(self, request: MatchRequest) -> PairMatches:
        """Matches a pair on this machine.

        Raises:
            InferenceError: the matcher cannot run here.
        """
        here = self._matcher_here()
        for frame_id in (request.pair.first, request.pair.second):
            self._encode_here(here, frame_id)
        (matched,) = here.match([request])
        return matched

    def place_vector_here(self, frame_id: FrameId) -> Float32Array | None:
        """The mean of a keyframe's tokens, as workers make it; None: it cannot be made here."""
        from adapters.matchers.mast3r.retrieval import pooled_vector

        try:
            here = self._matcher_here()
            self._encode_here(here, frame_id)
            tokens, _ = here.tokens(frame_id)
        except (InferenceError, KeyError):
            return None
        return pooled_vector(tokens)

    def _matcher_here(self) -> Mast3rMatcher:
        """The matcher on this machine, which the first call opens.

        Raises:
            InferenceError: it cannot run here.
        """
        with self._opening:
            if self._here is not None:
                return self._here
            if self._open_here is None:
                raise InferenceError("mast3r does not run on this machine")
            try:
                self._here = self._open_here()
            except EngineError as error:
                self._open_here = None
                raise InferenceError(str(error)) from error
            return self._here

    def _encode_here(self, here: Mast3rMatcher, frame_id: FrameId) -> None:
        image = None if here.is_encoded(frame_id) else self.provide(str(frame_id))
        if image is not None:
            here.describe(frame_from_plain(image.fields, image.arrays))

    def close(self) -> None:
        """Removes the file."""
        with self._lock:
            self._parts.clear()
            self._file.close()


class OracleStates:
    """A `StateSource`: the state of a keyframe is what is true of its image.

    Args:
        oracle: matches here.
    """

    def __init__(self, oracle: OracleMatcher) -> None:
        self._oracle = oracle
        self._known: set[str] = set()

    @property
    def name(self) -> str:
        """Of the matcher."""
        return self._oracle.name

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too."""
        return self._oracle.matches_everything

    def keep(self, frame: Frame) -> None:
        """Keeps which frame of the town it is."""
        self._known.add(str(frame.frame_id))
        self._oracle.know(FrameId(frame.frame_id), index=frame.index)

    def provide(self, key: str) -> Message | None:
        """The state."""
        if key not in self._known:
            return None
        truth = self._oracle.view(FrameId(int(key)))
        return Message(kind="", arrays={"state": truth.to_bytes()})

    def place_vector_here(self, frame_id: FrameId) -> Float32Array | None:
        """None: places are compared by the truth."""
        return None

    def match_here(self, request: MatchRequest) -> PairMatches:
        """Matches a pair."""
        (matched,) = self._oracle.match([request])
        return matched

    def close(self) -> None:
        """Nothing: it keeps no file."""
