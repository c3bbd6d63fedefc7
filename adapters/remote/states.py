"""What states of keyframes are made from, for each dense matcher; how pairs are matched here."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.remote.frames import frame_from_plain, frame_to_plain
from adapters.remote.messages import Message
from adapters.town.oracle import OracleMatcher
from engine.errors import EngineError, InferenceError
from engine.types import Float32Array, Frame, FrameId, MatchRequest, PairMatches, Uint8Array

if TYPE_CHECKING:
    from adapters.matchers.mast3r.matcher import Mast3rMatcher


logger = logging.getLogger(__name__)

_FILE_BYTES = 256_000_000  # of images; the next ones go into another file
_MAX_FILES = 32  # then the oldest is removed


class Mast3rStates:
    """A `StateSource`: states are made from images, which are kept in temporary files.

    The images of the latest keyframes, some 8 GB of them, are kept. A keyframe without one is still
    matched by a worker that has its state, but it can neither be encoded here nor anew there.

    Args:
        open_here: opens the matcher on this machine; None: it cannot run here.
    """

    def __init__(self, open_here: Callable[[], Mast3rMatcher] | None) -> None:
        self._open_here = open_here
        self._here: Mast3rMatcher | None = None
        self._files: deque[_ImageFile] = deque()  # the newest at the end
        self._file_of: dict[str, _ImageFile] = {}
        self._has_warned = False
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
                if not self._files or self._files[-1].num_bytes >= _FILE_BYTES:
                    self._files.append(_ImageFile())
                self._files[-1].put(str(frame.frame_id), fields, image)
            except OSError as error:
                raise InferenceError(f"{frame.name}: cannot be kept: {error.strerror}") from error
            self._file_of[str(frame.frame_id)] = self._files[-1]
            while len(self._files) > _MAX_FILES:
                self._remove_oldest()

    def _remove_oldest(self) -> None:
        oldest = self._files.popleft()
        for key in oldest.keys:
            self._file_of.pop(key, None)
        oldest.close()
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the images of the first keyframes are not kept any more; those whose tokens the"
                " cluster loses are matched no more"
            )

    def provide(self, key: str) -> Message | None:
        """The image."""
        with self._lock:
            if key not in self._file_of:
                return None
            return self._file_of[key].get(key)

    def match_here(self, request: MatchRequest) -> PairMatches:
        """Matches a pair on this machine.

        Raises:
            InferenceError: the matcher cannot run here.
        """
        here = self._matcher_here()
        for frame_id in (request.pair.first, request.pair.second):
            self._encode_here(here, frame_id)
            if not here.is_encoded(frame_id):
                raise InferenceError(f"the image of keyframe {frame_id} is not kept")
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
        """Removes the files."""
        with self._lock:
            self._file_of.clear()
            while self._files:
                self._files.popleft().close()


class _ImageFile:
    """Images in a temporary file.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="livesfm-images-")  # noqa: SIM115 - as long as this
        self._parts: dict[str, tuple[int, int, dict[str, Any]]] = {}  # start, bytes, fields
        self.num_bytes = 0

    @property
    def keys(self) -> Collection[str]:
        """Of the keyframes whose images it has."""
        return self._parts.keys()

    def put(self, key: str, fields: dict[str, Any], image: Uint8Array) -> None:
        """Writes an image, as `frame_to_plain` makes it.

        Raises:
            OSError: the disk is full.
        """
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(image.data)
        self._file.flush()  # a full disk is found here, not when it is read
        self._parts[key] = start, image.nbytes, fields
        self.num_bytes = start + image.nbytes

    def get(self, key: str) -> Message:
        """An image."""
        start, num_bytes, fields = self._parts[key]
        self._file.seek(start)
        image = np.frombuffer(self._file.read(num_bytes), np.uint8)
        return Message(kind="", fields=fields, arrays={"image": image})

    def close(self) -> None:
        """Removes the file."""
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
