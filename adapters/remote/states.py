"""What states of keyframes are made from, for each dense matcher; how pairs are matched here."""

from __future__ import annotations

import numpy as np

from adapters.remote.messages import Message
from adapters.town.oracle import OracleMatcher
from engine.types import Frame, FrameId, MatchRequest, PairMatches


class OracleStates:
    """A `StateSource`: the state of a keyframe is the index of its frame.

    Args:
        oracle: matches here.
    """

    def __init__(self, oracle: OracleMatcher) -> None:
        self._oracle = oracle
        self._index_of: dict[str, int] = {}

    @property
    def name(self) -> str:
        """Of the matcher."""
        return self._oracle.name

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too."""
        return self._oracle.matches_everything

    def keep(self, frame: Frame) -> None:
        """Keeps the index."""
        self._index_of[str(frame.frame_id)] = frame.index
        self._oracle.know(FrameId(frame.frame_id), index=frame.index)

    def provide(self, key: str) -> Message | None:
        """The state."""
        index = self._index_of.get(key)
        if index is None:
            return None
        return Message(kind="", arrays={"state": np.array([index], np.int64)})

    def match_here(self, request: MatchRequest) -> PairMatches:
        """Matches a pair."""
        (matched,) = self._oracle.match([request])
        return matched
