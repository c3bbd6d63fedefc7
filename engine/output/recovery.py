"""Recovery: what a former part of a run left besides its map, for a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.events import (
    Event,
    FrameDropped,
    FrameReceived,
    KeyframeAdded,
    RunFinished,
    RunResumed,
    SourceOpened,
    event_of_record,
)
from engine.mapping.stored_state import StoredFrame, StoredRun
from engine.output.laid_onto import command_to_lay_again
from engine.output.run_folder import KEYFRAME_STATUS, TRACKED_STATUS, dropped_status
from engine.output.statistics import RunStatistics
from engine.regular_files import read_regular_file
from engine.types import PROGRAM_LABEL, DropReason, FrameId, TakenFrames

_MAX_EVENTS_BYTES = 2**32  # some 200 an event
_STOPPED = dropped_status(DropReason.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormerSource:
    """A source of a former part of the run, and what was taken from it."""

    label: str
    address: str  # that opens it again; "": it held a secret
    prefix: str  # of its frames' names and its cameras' keys; "": none
    is_live: bool
    taken: TakenFrames  # by the names that the source gives

    @property
    def is_of_program(self) -> bool:
        """Whether a program added the frames; nothing opens such a source again."""
        return _is_of_program(self.label, self.address)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormerRun:
    """All that a run needs to go on in its folder."""

    stored: StoredRun  # without poses of frames that are read again
    sources: tuple[FormerSource, ...]  # in the order in which they first took part
    frames: tuple[StoredFrame, ...]  # that are finished, in order of arrival
    lost: tuple[StoredFrame, ...]  # on their way when the run was cut off; not read again
    num_again: int  # frames of files that arrived and are read again
    without_image: tuple[str, ...]  # names of keyframes whose images are not there, or are empty
    lay_again: str  # the command for positions that came after the end; "": none did
    statistics: RunStatistics  # has counted what is finished
    ended_at_s: float  # on the clock of the events
    part: int  # the number of the part that begins now: 2 is the first resumed one
    next_frame_id: FrameId  # larger than all that were given

    @property
    def next_source_number(self) -> int:
        """Of the next source that the run has not had before, from 1."""
        return len(self.sources) + 1


def recover_run(stored: StoredRun) -> FormerRun:
    """Reads the events of a run that ended or was killed, and sees which frames are finished.

    Finished are keyframes in the journal, and frames that were tracked or dropped. A frame of a
    file is read again when the run stopped before its turn, or when it was tracked and its pose is
    lost with the process: it waited for one, or no keyframe came after it. A frame of a live source
    or a program that was on its way is dropped.
    """
    events = list(_read_events(stored.path / "events.jsonl"))
    opened = _sources(stored, events)
    once = {one.source for one in opened if _gives_once(one)}
    has_ended = bool(events) and isinstance(events[-1], RunFinished)
    finished = tuple(_finished_frames(stored, once=once, has_ended=has_ended))
    stopped_ids = {one.frame_id for one in finished if one.status == _STOPPED} - {None}
    reported = {one.frame_id for one in events if isinstance(one, FrameDropped)}
    statistics = RunStatistics()
    for event in _finished_events(events, finished, once=once):
        statistics(event)
    statistics.add_without_events(
        num_received=sum(one.frame_id is not None for one in finished),
        num_keyframes=sum(one.status == KEYFRAME_STATUS for one in finished),
    )
    finished_ids = {one.frame_id for one in finished}
    poses = tuple(one for one in stored.relative_poses if one.frame_id in finished_ids)
    return FormerRun(
        stored=replace(stored, relative_poses=poses),
        sources=tuple(_former_source(one, finished, stored.frames) for one in opened),
        frames=finished,
        lost=tuple(
            one
            for one in finished
            if one.source in once and one.frame_id in stopped_ids and one.frame_id not in reported
        ),
        num_again=len(_places(stored.frames) - _places(finished)),
        without_image=tuple(o.keyframe.name for o in stored.keyframes if not o.has_image),
        lay_again=command_to_lay_again(stored.path),
        statistics=statistics,
        ended_at_s=max((event.at_s for event in events), default=0.0),
        part=2 + sum(isinstance(event, RunResumed) for event in events),
        next_frame_id=_next_frame_id(stored, events),
    )


def _read_events(path: Path) -> Iterator[Event]:
    """The events that are whole and known."""
    try:
        data = read_regular_file(path, max_bytes=_MAX_EVENTS_BYTES)
    except OSError:
        return
    for line in data.split(b"\n"):  # other characters that end a line may stand in a name
        event = event_of_record(_record_of(line))
        if event is not None:
            yield event


def _record_of(line: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(line.decode(errors="replace"))
    except ValueError:  # a power cut may leave half a line
        return {}
    return record if isinstance(record, dict) else {}


def _sources(stored: StoredRun, events: Sequence[Event]) -> list[SourceOpened]:
    """The sources of all parts, each once as it was opened last, in order of first appearance."""
    opened = {(one.source, one.prefix): one for one in events if isinstance(one, SourceOpened)}
    if opened:
        return list(opened.values())
    labels = list(dict.fromkeys(frame.source for frame in stored.frames))  # its events are gone
    return [
        SourceOpened(
            source=label,
            address="" if label == PROGRAM_LABEL else label,
            prefix=f"source{number}" if len(labels) > 1 else "",
            is_live="://" in label or label.startswith("camera:"),
            fingerprint="",
        )
        for number, label in enumerate(labels, start=1)
    ]


def _is_of_program(label: str, address: str) -> bool:
    return label == PROGRAM_LABEL and not address  # a file of that name has one


def _gives_once(opened: SourceOpened) -> bool:
    """Whether frames of the source do not come again."""
    return opened.is_live or _is_of_program(opened.source, opened.address)


def _finished_frames(
    stored: StoredRun, *, once: Iterable[str], has_ended: bool
) -> Iterator[StoredFrame]:
    """Frames of which nothing is to be done any more, in order of arrival.

    Args:
        stored: the run.
        once: sources that give each frame once.
        has_ended: the run was not cut off.
    """
    keyframe_ids = {one.keyframe.frame_id for one in stored.keyframes}
    is_posed: dict[FrameId | None, bool] = {
        one.frame_id: one.cam_from_keyframe is not None for one in stored.relative_poses
    }
    last_keyframes = {one.source: one.keyframe.frame_id for one in stored.keyframes}
    for frame in stored.frames:
        comes_once = frame.source in once
        is_lost = frame.status is None or (
            frame.status == KEYFRAME_STATUS and frame.frame_id not in keyframe_ids
        )
        if is_lost:
            is_finished = comes_once
        elif frame.status == TRACKED_STATUS:
            is_last = (frame.frame_id or 0) > last_keyframes.get(frame.source, 0)
            is_finished = comes_once or has_ended or is_posed.get(frame.frame_id, not is_last)
        else:
            is_finished = comes_once or frame.status != _STOPPED
        if is_finished:
            yield replace(frame, status=_STOPPED) if is_lost else frame


def _places(frames: Iterable[StoredFrame]) -> set[tuple[str, str]]:
    """The sources and names of frames, of which each may have arrived in several parts."""
    return {(one.source, one.name) for one in frames}


def _finished_events(
    events: Iterable[Event], finished: Iterable[StoredFrame], *, once: Iterable[str]
) -> Iterator[Event]:
    """The events but for those of frames that are read again."""
    status_of = {one.frame_id: one.status for one in finished if one.frame_id is not None}
    rejected = {(one.source, one.name) for one in finished if one.frame_id is None}
    for event in events:
        match event:
            case FrameReceived() if event.frame_id not in status_of:
                continue
            case KeyframeAdded() if status_of.get(event.frame_id) != KEYFRAME_STATUS:
                continue
            case FrameDropped() if event.source not in once:
                name = (event.source, event.name)
                if event.frame_id in status_of or name in rejected:
                    rejected.discard(name)
                    yield event
            case _:
                yield event


def _former_source(
    opened: SourceOpened, finished: Iterable[StoredFrame], arrived: Iterable[StoredFrame]
) -> FormerSource:
    """A source and what is not to be taken from it again.

    Of a live source or a program that is all that arrived: the frames do not come again.
    """
    start = f"{opened.prefix}/" if opened.prefix else ""
    own = [
        frame
        for frame in (arrived if _gives_once(opened) else finished)
        if frame.source == opened.source and frame.name.startswith(start)
    ]
    return FormerSource(
        label=opened.source,
        address=opened.address,
        prefix=opened.prefix,
        is_live=opened.is_live,
        taken=TakenFrames(
            names={frame.index: frame.name.removeprefix(start) for frame in own},
            captured_at_s={frame.index: frame.captured_at_s for frame in own},
            fingerprint=opened.fingerprint,
        ),
    )


def _next_frame_id(stored: StoredRun, events: Iterable[Event]) -> FrameId:
    """One more than any id that was given; events may know of frames that the journal missed."""
    received = (event.frame_id for event in events if isinstance(event, FrameReceived))
    return FrameId(max((int(stored.next_frame_id), *(frame_id + 1 for frame_id in received))))
