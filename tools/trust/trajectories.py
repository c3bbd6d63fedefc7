"""Whether every line of a run's trajectories is a pose that was measured."""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trust.scoring import frames as frame_rows
from trust.scoring import map_folders, registered_names

MAX_GAP_S = 1.0  # between keyframes that a pose may be interpolated between
_SLACK_S = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class InventedPoses:
    """Lines of trajectories, and those among them that nothing measured."""

    num_lines: int
    names: tuple[str, ...]  # of frames whose pose is invented

    @property
    def number(self) -> int:
        """How many lines are invented."""
        return len(self.names)


def invented_poses(run: Path, *, are_photos: bool) -> InventedPoses:
    """Lines of ``trajectory.txt``, ``trajectory_1.txt``, ... that no map accounts for.

    A line is accounted for when its frame is a registered keyframe of that trajectory's map, was
    tracked while the run went on, or, in a video, lies between two keyframes of that map at most
    `MAX_GAP_S` apart. Only for runs of one source.
    """
    frames = _frames_by_time(run)
    tracked = _tracked_ids(run)
    maps = [registered_names(folder) for folder in map_folders(run)]
    num_lines, invented = 0, []
    for path in trajectory_files(run):
        lines = [frames[time] for time in _timestamps(path)]
        names = _map_of(lines, maps)
        times_s = sorted(float(frame["captured_at_s"]) for frame in lines if frame["name"] in names)
        num_lines += len(lines)
        for frame in lines:
            is_keyframe = frame["status"] == "keyframe"
            is_known = frame["name"] in names or (not is_keyframe and frame["frame_id"] in tracked)
            is_between = not are_photos and _is_between(float(frame["captured_at_s"]), times_s)
            if not (is_known or is_between):
                invented.append(frame["name"])
    return InventedPoses(num_lines=num_lines, names=tuple(invented))


def trajectory_files(run: Path) -> list[Path]:
    """``trajectory.txt`` and those of the other maps."""
    found = [
        path
        for path in run.glob("trajectory*.txt")
        if re.fullmatch(r"trajectory(_\d+)?", path.stem)
    ]
    return sorted(found)


def num_keyframe_poses(run: Path) -> int:
    """Keyframes among the lines of ``trajectory.txt``."""
    path = run / "trajectory.txt"
    if not path.is_file():
        return 0
    frames = _frames_by_time(run)
    return sum(frames[time]["status"] == "keyframe" for time in _timestamps(path))


def _frames_by_time(run: Path) -> dict[str, Mapping[str, str]]:
    return {row["captured_at_s"]: row for row in frame_rows(run)}


def _tracked_ids(run: Path) -> set[str]:
    """Frames that had a pose of their own before they were keyframes, or without."""
    with (run / "events.jsonl").open(encoding="utf-8") as file:
        events = (json.loads(line) for line in file)
        return {
            str(event["frame_id"])
            for event in events
            if event["event"] == "FramePosed" and not event["is_keyframe"]
        }


def _timestamps(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line and not line.startswith("#")]


def _map_of(lines: list[Mapping[str, str]], maps: list[set[str]]) -> set[str]:
    """The images of the map that holds most of a trajectory's keyframes."""
    names = {frame["name"] for frame in lines}
    return max(maps, key=lambda each: len(each & names), default=set())


def _is_between(time_s: float, keyframe_times_s: list[float]) -> bool:
    position = bisect(keyframe_times_s, time_s)
    if not 0 < position < len(keyframe_times_s):
        return False
    gap_s = keyframe_times_s[position] - keyframe_times_s[position - 1]
    return gap_s <= MAX_GAP_S + _SLACK_S
