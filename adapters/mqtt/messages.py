"""MQTT messages: a run's events and figures as JSON objects on topics below a prefix."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from adapters.live.run_counters import RunCounters
from adapters.mqtt.globe_place import GlobePlace
from engine.events import (
    CameraDoubted,
    CommandTaken,
    Event,
    FaultOccurred,
    FramePosed,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    MainMapChanged,
    SnapshotWritten,
    SourceChanged,
    VerdictChanged,
    Warned,
)
from engine.geometry import rotation_from_quat_xyzw
from engine.types import FrameId, RunCommand, Verdict


class Channel(StrEnum):
    """Topics below the prefix."""

    STATUS = "status"  # retained; also the last will
    POSE = "pose"
    KEYFRAME = "keyframe"
    SNAPSHOT = "snapshot"  # retained
    POINTS = "points"  # binary, see map_points.py
    POINTS_REQUEST = "points/request"  # read, not written
    COVERAGE = "coverage"  # retained; GeoJSON (RFC 7946)
    METRICS = "metrics"
    EVENT = "event"
    COMMAND = "command"  # read, not written


class RunState(StrEnum):
    """The state of a run."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    OFFLINE = "offline"  # published by the broker when the run's connection is gone


_MAX_COMMAND_BYTES = 1_024
_LASTING = {Channel.STATUS, Channel.SNAPSHOT, Channel.COVERAGE}  # retained for later subscribers


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One JSON object for one topic."""

    channel: Channel
    payload: str

    @classmethod
    def of(cls, channel: Channel, record: Mapping[str, Any]) -> Message:
        """The message of a record on a channel."""
        return cls(channel=channel, payload=json.dumps(record, separators=(",", ":")))

    @property
    def is_lasting(self) -> bool:
        """Whether the broker retains it for later subscribers, and acknowledges it."""
        return self.channel in _LASTING


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What messages say besides their events."""

    names: Mapping[FrameId, str] = field(default_factory=dict)  # of frames
    place: GlobePlace | None = None  # of the main map
    snapshot_base_url: str = ""


def messages_of(event: Event, context: Context) -> tuple[Message, ...]:
    """The messages of an event; none for events that are not published.

    Positions are of the camera's centre, and rotations lead from the camera's axes (x right,
    y down, z forward) to the world's. The world is the map's, its unit and axes arbitrary; once the
    map has a place, ``georeference`` says where the centre is.
    """
    match event:
        case FramePosed():
            pose = Message.of(Channel.POSE, _pose(event, context))
            if not event.is_keyframe:
                return (pose,)
            return pose, Message.of(Channel.KEYFRAME, _keyframe_pose(event, context))
        case KeyframeAdded() | FrameRegistered():
            return (Message.of(Channel.KEYFRAME, event.as_record()),)
        case SnapshotWritten():
            return (Message.of(Channel.SNAPSHOT, _snapshot(event, context.snapshot_base_url)),)
        case (
            SourceChanged()
            | FaultOccurred()
            | Georeferenced()
            | CameraDoubted()
            | MainMapChanged()
            | VerdictChanged()
            | Warned()
            | CommandTaken()
        ):
            return (Message.of(Channel.EVENT, event.as_record()),)
    return ()


def _pose(event: FramePosed, context: Context) -> dict[str, Any]:
    return {
        "frame_id": event.frame_id,
        "name": context.names.get(event.frame_id, ""),
        "camera": event.camera_key,
        "captured_at_s": event.captured_at_s,
        "position": event.cam_center_in_world,
        "quaternion_xyzw": event.world_from_cam_quat_xyzw,
        "georeference": _georeference(event, context),
        "is_keyframe": event.is_keyframe,
        "is_first": event.is_first,
        "map": event.map_number,
        "latency_s": round(event.latency_s, 6),
    }


def _keyframe_pose(event: FramePosed, context: Context) -> dict[str, Any]:
    rotation = rotation_from_quat_xyzw(np.array(event.world_from_cam_quat_xyzw)).T
    shift = -rotation @ np.array(event.cam_center_in_world)
    return {
        "event": "KeyframePosed",
        "frame_id": event.frame_id,
        "name": context.names.get(event.frame_id, ""),
        "camera": event.camera_key,
        "captured_at_s": event.captured_at_s,
        "cam_from_world": np.column_stack([rotation, shift]).tolist(),
        "cam_center_in_world": event.cam_center_in_world,
        "georeference": _georeference(event, context),
        "map": event.map_number,
    }


def _georeference(event: FramePosed, context: Context) -> dict[str, Any] | None:
    """Where the camera is on the globe, as far as the map's place is known."""
    if context.place is None or event.map_number != 0:
        return None
    return context.place.on_globe(event.cam_center_in_world)


def _snapshot(event: SnapshotWritten, base_url: str) -> dict[str, Any]:
    path = os.path.abspath(event.path)
    record = {**event.as_record(), "path": path}
    if base_url:
        own = "/".join(quote(part, safe="") for part in Path(path).parts[-3:])
        record["url"] = f"{base_url.rstrip('/')}/{own}"
    return record


def status_message(
    state: RunState, *, run: str, verdict: Verdict | None = None, **more: object
) -> Message:
    """The message of a run's state, with the verdict on its map, where known, and more figures."""
    said = {} if verdict is None else {"verdict": verdict.as_record()}
    return Message.of(Channel.STATUS, {"state": state, "run": run, **said, **more})


def refused_command() -> Message:
    """The reply to an unknown command."""
    known = ", ".join(RunCommand)
    return Message.of(
        Channel.EVENT, {"event": "CommandRefused", "detail": f"no such command; there are {known}"}
    )


def refused_points(detail: str) -> Message:
    """The reply to a request for points that are not sent."""
    return Message.of(Channel.EVENT, {"event": "PointsRefused", "detail": detail})


def read_command(payload: bytes) -> RunCommand | None:
    """Parses a command: its name, or a JSON object with it under ``command``; None: neither."""
    if len(payload) > _MAX_COMMAND_BYTES:
        return None
    try:
        text = payload.decode().strip()
        record = json.loads(text) if text.startswith("{") else {"command": text}
        return RunCommand(str(record.get("command")).lower())
    except (ValueError, RecursionError):
        return None


def metrics_message(counters: RunCounters, *, lost_messages: int) -> Message:
    """The message of a run's figures; latencies are of the latest few hundred frames."""
    latency_s = counters.latency_percentiles_s()
    record: dict[str, object] = {
        "frames": counters.frames_received,
        "posed": counters.frames_posed,
        "dropped": dict(counters.dropped_by_reason),
        "keyframes": counters.keyframes,
        "registered": counters.registered,
        "points": counters.points3D,
        "snapshots": counters.snapshots,
        "latency_median_s": round(latency_s[0], 6) if latency_s else None,
        "latency_p95_s": round(latency_s[1], 6) if latency_s else None,
        "reprojection_error_px": counters.reprojection_error_px,
        "lost_messages": lost_messages,
    }
    return Message.of(Channel.METRICS, record)
