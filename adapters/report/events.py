"""What a report needs of ``events.jsonl``, read line by line in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.report.summary import VerdictRecord
from engine.regular_files import regular_file_size

_MAX_FILE_BYTES = 2**33
_MAX_LINE_BYTES = 1_000_000
_MAX_KEYFRAMES = 100_000
_MAX_PAIRS = 2_000_000
_MAX_LATENCIES = 2**16  # of frames; of more every second one is kept, then every fourth, ...
_EVENT = b'{"event": "'


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyframeLine:
    """A keyframe as it came."""

    frame_id: int
    name: str
    index: int
    captured_at_s: float
    is_photo: bool
    num_keypoints: int


@dataclass(slots=True, kw_only=True)
class EventDigest:
    """The events of all parts of a run, in short."""

    sources: list[str] = field(default_factory=list)  # as the user named them
    matcher: str = ""
    is_live: bool = False
    is_finished: bool = False  # the last part came to its end
    num_parts: int = 0
    verdict: VerdictRecord | None = None  # the last one while the run went on
    keyframes: dict[int, KeyframeLine] = field(default_factory=dict)
    inliers: dict[tuple[int, int], int] = field(default_factory=dict)  # of verified pairs
    latencies: list[tuple[float, float]] = field(default_factory=list)  # s of the run; s
    num_loops: int = 0
    _latency_step: int = 1
    _num_posed: int = 0

    def wants_pose(self, line: bytes) -> bool:
        """Whether a pose has a latency that is worth a look: the first of a live frame."""
        return self.is_live and b'"is_first": true' in line

    def _begin(self, event: dict[str, Any]) -> None:
        self.num_parts += 1
        self.is_finished = False
        new = (str(one) for one in event["sources"])
        self.sources += [one for one in new if one not in self.sources]
        self.matcher = str(event["matcher"])

    def _open(self, event: dict[str, Any]) -> None:
        self.is_live = self.is_live or event["is_live"] is True

    def _end(self, event: dict[str, Any]) -> None:
        del event
        self.is_finished = True

    def _judge(self, event: dict[str, Any]) -> None:
        self.verdict = VerdictRecord.model_validate(event["verdict"])

    def _add_keyframe(self, event: dict[str, Any]) -> None:
        if len(self.keyframes) < _MAX_KEYFRAMES:
            line = KeyframeLine(
                frame_id=int(event["frame_id"]),
                name=str(event["name"]),
                index=int(event["index"]),
                captured_at_s=float(event["captured_at_s"]),
                is_photo=event["is_photo"] is True,
                num_keypoints=int(event["num_keypoints"]),
            )
            self.keyframes[line.frame_id] = line

    def _add_pair(self, event: dict[str, Any]) -> None:
        if len(self.inliers) < _MAX_PAIRS:
            pair = (int(event["first"]), int(event["second"]))
            self.inliers[min(pair), max(pair)] = int(event["num_inliers"])

    def _add_latency(self, event: dict[str, Any]) -> None:
        self._num_posed += 1
        if self._num_posed % self._latency_step == 0:
            self.latencies.append((float(event["at_s"]), float(event["latency_s"])))
        if len(self.latencies) >= _MAX_LATENCIES:
            self.latencies = self.latencies[::2]
            self._latency_step *= 2

    def _add_loop(self, event: dict[str, Any]) -> None:
        del event
        self.num_loops += 1


_TAKEN_BY: dict[bytes, Callable[[EventDigest, dict[str, Any]], None]] = {
    b"RunStarted": EventDigest._begin,
    b"RunResumed": EventDigest._begin,
    b"SourceOpened": EventDigest._open,
    b"RunFinished": EventDigest._end,
    b"VerdictChanged": EventDigest._judge,
    b"KeyframeAdded": EventDigest._add_keyframe,
    b"PairVerified": EventDigest._add_pair,
    b"FramePosed": EventDigest._add_latency,
    b"LoopClosed": EventDigest._add_loop,
}


def read_events(path: Path) -> EventDigest:
    """The events of a run; lines that are cut short or damaged count for nothing.

    Raises:
        OSError: the file cannot be read, or is no file.
    """
    digest = EventDigest()
    for kind, line in _lines(path):
        take = _TAKEN_BY.get(kind)
        if take is None or (kind == b"FramePosed" and not digest.wants_pose(line)):
            continue
        try:
            take(digest, json.loads(line))
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            continue
    return digest


def _lines(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The kind and the text of each event."""
    left = min(regular_file_size(path), _MAX_FILE_BYTES)
    with path.open("rb") as file:
        while left > 0 and (line := file.readline(_MAX_LINE_BYTES)):
            left -= len(line)
            if line.startswith(_EVENT):
                end = line.find(b'"', len(_EVENT))
                yield line[len(_EVENT) : end], line
