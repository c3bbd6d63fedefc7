"""How keyframes are named to people: photos by file, frames of a video by number and time.

Frames count from 0, as in ``frames.csv`` and in the names of their images.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from engine.types import FrameId, Keyframe

_MAX_NAMED = 3  # stretches that one sentence names
_UTC = " UTC"
_FIRST_UNIX_TIME_S = 1e8  # three years: no video is that long
END_UNIX_TIME_S = 253_402_300_800  # of the year 9999; clocks that count otherwise say more


def stretches(frame_ids: Iterable[FrameId], keyframes: Sequence[Keyframe]) -> list[list[Keyframe]]:
    """Some keyframes by runs without a gap, of one camera each, in order of arrival.

    Args:
        frame_ids: those to name.
        keyframes: all, in order of arrival.
    """
    wanted = set(frame_ids)
    found: list[list[Keyframe]] = []
    open_runs: dict[str, list[Keyframe]] = {}
    for keyframe in keyframes:
        if keyframe.frame_id not in wanted:
            open_runs.pop(keyframe.camera_key, None)
        elif keyframe.camera_key in open_runs:
            open_runs[keyframe.camera_key].append(keyframe)
        else:
            open_runs[keyframe.camera_key] = [keyframe]
            found.append(open_runs[keyframe.camera_key])
    return found


def named(frame_ids: Iterable[FrameId], keyframes: Sequence[Keyframe]) -> str:
    """Some keyframes in words, the longest runs first where there are many.

    Args:
        frame_ids: those to name.
        keyframes: all, in order of arrival.
    """
    runs = stretches(frame_ids, keyframes)
    longest = sorted(runs, key=len, reverse=True)[:_MAX_NAMED]
    has_cameras = len({one.camera_key for one in keyframes}) > 1
    words = [_run_in_words(run, has_cameras=has_cameras) for run in runs if run in longest]
    num_more = sum(len(run) for run in runs) - sum(len(run) for run in longest)
    more = [f"{num_more} more"] if num_more else []
    return " and ".join([", ".join(words), *more] if more else [", ".join(words)])


def frame_in_words(*, index: int, name: str, is_photo: bool) -> str:
    """One keyframe in words."""
    return f"photo {name}" if is_photo else f"frame {index}"


def clock(seconds: float) -> str:
    """When a frame was captured: minutes and seconds of a video, or the time of day in UTC.

    Args:
        seconds: since the beginning of the video; of a live source since 1970.
    """
    whole = max(0, round(seconds))
    if _FIRST_UNIX_TIME_S <= whole < END_UNIX_TIME_S:
        return f"{time.strftime('%H:%M:%S', time.gmtime(whole))}{_UTC}"
    return f"{whole // 60}:{whole % 60:02d}"


def clock_span(begins_at_s: float, ends_at_s: float) -> str:
    """From when to when frames were captured, as `clock` says it."""
    first, last = clock(begins_at_s), clock(ends_at_s)
    if last.endswith(_UTC):
        first = first.removesuffix(_UTC)
    return f"from {first} to {last}"


def _run_in_words(run: Sequence[Keyframe], *, has_cameras: bool) -> str:
    first, last = run[0], run[-1]
    where = f" of {first.camera_key}" if has_cameras else ""
    if len(run) == 1:
        one = frame_in_words(index=first.index, name=first.name, is_photo=first.is_photo)
        return f"{one}{where}"
    if first.is_photo:
        return f"photos {first.name} to {last.name}{where}"
    return f"frames {first.index} to {last.index}{where}"
