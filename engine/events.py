"""Events of a run: ids and numbers only, one JSON object per line in ``events.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engine.types import (
    DropReason,
    FrameId,
    LeftOut,
    PairReason,
    RegistrationStatus,
    RunCommand,
    SourceState,
    Verdict,
)

ALSO_AN_EVENT = {"is_also_an_event": True}
"""``extra`` of log lines whose words an event has, too: views of events leave the lines out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of every event. Whoever emits one leaves ``at_s`` to the sink, which stamps it."""

    at_s: float = math.nan  # monotonic, from the start of the run

    def as_record(self) -> dict[str, Any]:
        """The event as a JSON-able mapping, its class name under ``event``."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """The engine is ready for frames."""

    sources: tuple[str, ...]
    matcher: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResumed(Event):
    """A run goes on from what it left on disk, or a new run from what another one left."""

    sources: tuple[str, ...]  # of this part; those of former parts among them go on
    matcher: str
    num_keyframes: int  # that were restored
    num_registered: int  # of them in the map
    num_frames_again: int  # of former parts, received but not finished; read again where possible
    onto: str = ""  # the other run, by its path; "": the run itself goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOpened(Event):
    """A source takes part in the run; who resumes the run opens it again by this."""

    source: str  # its label
    address: str  # that opens it again; "": it holds a secret, which no file keeps
    prefix: str  # of its frames' names and its cameras' keys; "": none
    is_live: bool
    fingerprint: str  # changes with the files that it reads; "": unknown
    recording: str = ""  # folder where what it sends is kept; "": it is not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChanged(Event):
    """A source connected, was lost, was refused or ended, or leaves files out."""

    source: str
    state: SourceState
    detail: str
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandTaken(Event):
    """A viewer's or a client's command was accepted."""

    command: RunCommand


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameReceived(Event):
    """A frame arrived and is readable."""

    frame_id: FrameId
    index: int
    captured_at_s: float
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameDropped(Event):
    """A frame was not used."""

    frame_id: FrameId | None  # None: it never became a frame
    source: str
    index: int
    name: str
    captured_at_s: float
    reason: DropReason
    detail: str
    num_frames: int = 1  # that it stands for: itself, and others before it that are not listed


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePosed(Event):
    """A frame has its first pose, or a keyframe that was tracked before has its pose in the map.

    A frame that is due as a keyframe is tracked from the last one first, like any other: that
    takes milliseconds, and mapping it many more.
    """

    frame_id: FrameId
    camera_key: str
    captured_at_s: float
    cam_center_in_world: tuple[float, float, float]
    world_from_cam_quat_xyzw: tuple[float, float, float, float]
    is_keyframe: bool
    is_first: bool  # pose of the frame
    latency_s: float  # from arrival
    map_number: int = 0  # of the map whose world it is: 0 is the main one; not the N of sparse/N


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyframeAdded(Event):
    """A frame became a keyframe."""

    frame_id: FrameId
    camera_key: str
    index: int  # of the frame in its source, from 0
    name: str
    is_photo: bool
    captured_at_s: float
    num_keypoints: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairVerified(Event):
    """A pair passed geometric verification."""

    first: FrameId
    second: FrameId
    reason: PairReason
    num_matches: int
    num_inliers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsRejected(Event):
    """Pairs did not pass verification when a keyframe was matched."""

    frame_id: FrameId
    num_pairs: int
    num_given_up_early: int  # of these: after their largest keypoints were matched


@dataclass(frozen=True, slots=True, kw_only=True)
class WeakPairsMatched(Event):
    """A second matcher gets pairs of keyframes that the first one hardly matches."""

    matcher: str
    num_pairs: int
    num_left_out: int  # further ones that it has no room for now, each counted once in a run


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraCalibrated(Event):
    """A camera's calibration was initialised, or the map has changed it since by some percent."""

    camera_key: str
    model: str  # COLMAP's name
    focal_px: float
    how: str  # the origin of its first calibration, see `CalibrationOrigin`
    focal_sigma_ratio: float  # how surely it was known at first; one standard deviation
    is_refined: bool = False  # the focal length is the map's by now


@dataclass(frozen=True, slots=True, kw_only=True)
class LensRecognised(Event):
    """A camera's keyframes show another lens than it was taken for; its map was built anew."""

    camera_key: str
    model: str  # COLMAP's name
    focal_px: float
    former_model: str
    former_focal_px: float
    gain_ratio: (
        float | None
    )  # how much better it fits than the former kind; None: that fits nowhere


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraDoubted(Event):
    """A camera is not what cameras are, or its calibration is held; once for each reason."""

    camera_key: str
    reason: str  # one sentence with the value and the bound
    is_held: bool  # bundle adjustment leaves the calibration alone for now


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraSplit(Event):
    """A camera whose keyframes contradict one calibration has several."""

    camera_key: str
    calibration_keys: tuple[str, ...]
    focal_px: tuple[float, ...]  # of each calibration
    frame_ids: tuple[FrameId, ...]  # the camera's keyframes
    calibration_idx: tuple[int, ...]  # of each keyframe, in calibration_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoomSearched(Event):
    """Keyframes seem to be zoomed: maps with focal lengths of their own are tried, a while long."""

    camera_key: str
    frame_ids: tuple[FrameId, ...]  # keyframes that seem to be zoomed against the others


@dataclass(frozen=True, slots=True, kw_only=True)
class CropFound(Event):
    """A camera's images are crops of another one's: its principal point is off their middle."""

    camera_key: str
    whole_camera_key: str
    focal_px: float
    principal_point_xy: tuple[float, float]  # px


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricScaleEstimated(Event):
    """The length of the map's unit was estimated from the matcher's depths."""

    metres_per_map_unit: float  # before it was applied
    num_depths: int
    spread_ratio: float  # of single depths around the scale
    is_applied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyMapMade(Event):
    """Few keyframes of a video became a map by which frames get poses until the run's map starts.

    Emitted again where another one takes its place.
    """

    first: FrameId
    second: FrameId
    num_registered: int
    num_points3D: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MapInitialized(Event):
    """A map was initialised: the first one, or a better one after a poor start."""

    first: FrameId
    second: FrameId
    num_points3D: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRegistered(Event):
    """A keyframe was registered in the map, or in one beside it."""

    frame_id: FrameId
    num_inliers: int
    num_correspondences: int
    num_registered: int
    num_points3D: int
    is_retry: bool
    elapsed_s: float
    map_number: int = 0  # 0 is the main map


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationFailed(Event):
    """A keyframe could not be registered yet; it stays in the scene graph and is tried again."""

    frame_id: FrameId
    status: RegistrationStatus
    num_inliers: int
    num_correspondences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MisplacementFound(Event):
    """Keyframes were taken out of the map: a strong pair contradicts where weak ones put them."""

    keyframe_ids: tuple[FrameId, ...]
    evidence_first: FrameId
    evidence_second: FrameId


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentStarted(Event):
    """Keyframes that fit nowhere in the map became a map of their own, which grows beside it."""

    map_number: int  # as poses in it have
    first: FrameId  # the pair that it starts from
    second: FrameId
    num_registered: int
    num_points3D: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentJoined(Event):
    """A map that grew beside another one was moved into it; both are one map now."""

    map_number: int  # of the map that was moved
    into_map_number: int
    keyframe_ids: tuple[FrameId, ...]  # that came in
    num_inliers: int  # matches between both that agree on how they lie; 0: each came in by itself
    num_registered: int  # afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class MainMapChanged(Event):
    """A map that grew beside the main one is fuller, and is the main map now."""

    former_map_number: int  # that it had; the former main map has it now
    num_registered: int
    num_registered_in_former: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayFound(Event):
    """Parts of a camera's image show nothing of the world: a logo, text, dirt on the lens.

    They are masked from now on, and what the map had of them was taken out. Emitted again when they
    cover a quarter more.
    """

    camera_key: str
    share: float  # of the image
    boxes: tuple[tuple[int, int, int, int], ...]  # left, top, right, bottom in px; largest first
    num_keyframes: int  # of the camera by then


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraTurning(Event):
    """A stretch of keyframes shows a camera that turns without moving: it tells no depth.

    Emitted as soon as a stretch is long enough, and again when it has become half as long again.
    """

    camera_key: str
    first: FrameId  # keyframe
    last: FrameId
    num_keyframes: int
    turned_deg: float  # from keyframe to keyframe
    is_whole: bool  # whether all keyframes of the camera that match others turn, here or elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopClosed(Event):
    """A part of the map that was left long ago is seen again, and both visits share points now."""

    first: FrameId
    second: FrameId
    num_inliers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopCorrected(Event):
    """Pairs contradicted the map; its parts were moved until their matches are common points."""

    first: FrameId  # of the pair with most matches among them
    second: FrameId
    num_pairs: int  # that contradicted the map and agree with it now
    error_before_px: float  # median of their matches, at an edge of 1000 px
    error_after_px: float
    scale_ratio: float  # by which the part of the second keyframe was scaled against the first's
    rotation_rad: float  # by which it was turned
    moved_map: float  # by which its camera was moved, in units of the map
    num_points_merged: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRefused(Event):
    """Pairs contradict the map, and no correction of it holds: it stays as it is."""

    first: FrameId  # of the pair with most matches among them
    second: FrameId
    num_pairs: int
    error_px: float  # median of their matches, at an edge of 1000 px
    reason: str  # one sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleAdjusted(Event):
    """A global bundle adjustment was merged into the map."""

    num_keyframes: int
    num_points3D: int
    reprojection_error_before_px: float
    reprojection_error_after_px: float
    keyframes_added_meanwhile: int
    elapsed_s: float


class WindowPurpose(StrEnum):
    """Why a window was solved."""

    BOOTSTRAP = "bootstrap"  # no pair of keyframes gave a first map
    RESOLVE = "resolve"  # the newest keyframes, now and then
    RESCUE = "rescue"  # keyframes that the map misses
    FINAL = "final"  # keyframes that fit worst, at the end


class WindowVerdict(StrEnum):
    """What was done with a window's result."""

    MERGED = "merged"
    NOT_BETTER = "not_better"
    NOT_SOLVED = "not_solved"
    STALE = "stale"  # the map that it refers to was replaced


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSolved(Event):
    """A window of keyframes was solved; figures are of its keyframes in the map."""

    purpose: WindowPurpose
    verdict: WindowVerdict
    reason: str
    keyframe_ids: tuple[FrameId, ...]
    num_registered: int  # keyframes that it brought into the map
    num_observations_before: int
    num_observations_after: int
    error_before_px: float
    error_after_px: float
    moved_map: float  # the farthest that a camera moved, in units of the map
    elapsed_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Georeferenced(Event):
    """The map was aligned to GPS positions: east, north, up in metres from an origin."""

    origin_latitude_deg: float
    origin_longitude_deg: float
    origin_altitude_m: float | None  # None: no position has an altitude
    metres_per_map_unit: float
    num_fixes: int  # that agree with the map
    rmse_m: float  # of those, over camera centres
    rejected_ids: tuple[FrameId, ...]  # keyframes whose GPS disagrees with the map; left out
    # Row by row, the similarity (3, 4) from the world of the poses of events; (): of former parts
    enu_from_map: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPointsUsed(Event):
    """The map was laid onto ground control points after the run's end."""

    num_control: int  # that the map is laid onto
    num_check: int  # that are compared only
    rejected: tuple[str, ...]  # names of those that contradict the others
    rmse_m: float  # of those used
    check_rmse_m: float | None  # None: no check points
    metres_per_map_unit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotWritten(Event):
    """A COLMAP model is on disk."""

    sequence: int
    path: str  # of its folder
    num_keyframes: int
    num_points3D: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolderMoved(Event):
    """The run goes on in another folder: its own was renamed, deleted, or cannot be written."""

    former_path: str
    path: str
    reason: str
    num_images_lost: int  # of keyframes; they are in neither folder


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpaceLow(Event):
    """Too little is free on the disk of the run: no new frames are taken, and the map is saved."""

    free_mb: float
    reserve_mb: float  # that must stay free


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictChanged(Event):
    """The map is trusted more or less than before, or for other reasons."""

    verdict: Verdict
    is_final: bool = False  # of a map that will not change; else of what there is so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something is degraded; the run goes on."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthEstimated(Event):
    """A keyframe had its turn in the dense map."""

    frame_id: FrameId
    status: str  # of `engine.dense_types.DepthStatus`; not_written: it did not get onto the disk
    reason: str  # a sentence with the figures that decided
    num_points: int  # that the dense map got
    is_again: bool  # it had depth before, and was moved by more than that depth's error
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMapWritten(Event):
    """The dense map of all keyframes is on disk."""

    path: str
    num_keyframes: int
    num_points: int
    verdict: str  # on the map, one word
    cpu_s: float


class RunPart(StrEnum):
    """A part of a run that may break without ending it."""

    SOURCE = "reading a source"
    DECODING = "decoding"
    DESCRIBING = "describing"
    TRACKING = "tracking"
    MATCHING = "matching"
    SECOND_MATCHING = "matching by the second matcher"
    PLACES = "place recognition"
    MAPPING = "mapping"
    ADJUSTMENT = "global bundle adjustment"
    WINDOW = "solving a window"
    LENS_SEARCH = "searching a lens"
    DENSE = "the dense map"
    TRAINING = "the training folder"
    VIEW = "a view"
    WRITING = "writing"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMeasured(Event):
    """What the run spent its time on since the last such event; every other second."""

    period_s: float
    cpu_s: dict[str, float]  # CPU seconds by stage, see `engine.cpu_time.Stage`
    loop_late_s: float  # the latest that the event loop woke up
    queue_wait_s: dict[str, float]  # the longest in each queue


class FaultKind(StrEnum):
    """How a part of a run broke."""

    RAISED = "raised"
    HUNG = "hung"  # a call was given up because it did not return in time


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOccurred(Event):
    """A part of the run raised or hung; the run goes on, unless it is strict."""

    part: RunPart
    kind: FaultKind
    detail: str  # what was raised, in a line
    consequence: str  # what the run does about it, in words
    num_faults: int  # of the part so far, this one included
    frame_id: FrameId | None = None  # that it concerns


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """Everything is written."""

    stopped_by: str  # end_of_sources, signal, command, full_disk or failure
    num_keyframes: int
    num_registered: int  # in the map
    num_in_other_maps: tuple[int, ...] = ()  # keyframes of each map apart from it


def event_of_record(record: Mapping[str, Any]) -> Event | None:
    """The event that a line of ``events.jsonl`` records; None where it is of no known kind."""
    kind = _kinds().get(str(record.get("event")))
    if kind is None:
        return None
    fields = {key: value for key, value in record.items() if key != "event"}
    try:
        return kind.validate_python(fields)
    except ValidationError:  # of another version, or a figure that was not finite
        return None


@cache
def _kinds() -> Mapping[str, TypeAdapter[Event]]:
    return {kind.__name__: TypeAdapter(kind) for kind in Event.__subclasses__()}
