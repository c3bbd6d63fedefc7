"""Log lines: notable events as lines of text, the same in every view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from adapters.live.run_counters import RunCounters
from adapters.live.verdict_words import in_words, level_in_words, verdict_lines
from engine.events import (
    BundleAdjusted,
    CameraCalibrated,
    CameraDoubted,
    CameraSplit,
    CameraTurning,
    CommandTaken,
    ComponentJoined,
    ComponentStarted,
    CropFound,
    DenseMapWritten,
    EarlyMapMade,
    Event,
    FaultOccurred,
    FrameDropped,
    Georeferenced,
    LensRecognised,
    LoopClosed,
    LoopCorrected,
    LoopRefused,
    MainMapChanged,
    MapInitialized,
    MetricScaleEstimated,
    OverlayFound,
    RegistrationFailed,
    RunFinished,
    RunStarted,
    SnapshotWritten,
    SourceChanged,
    VerdictChanged,
    Warned,
    WindowSolved,
    WindowVerdict,
    ZoomSearched,
)
from engine.types import RegistrationStatus, SourceState, VerdictLevel

FAULTS_LOGGED_EACH = 1  # of one part
DROPS_LOGGED_EACH = 10  # of one reason; from then on a line whenever their number has doubled

BOXES_NAMED = 3

_MOST_SHOWN_PX = 9999.0  # of an error: points behind a camera are off by more


class LogLevel(StrEnum):
    """The level of a log line."""

    INFO = "INFO"
    WARNING = "WARN"
    ERROR = "ERROR"


_LEVEL_OF_VERDICT = {
    VerdictLevel.GOOD: LogLevel.INFO,
    VerdictLevel.DOUBTFUL: LogLevel.WARNING,
    VerdictLevel.WRONG: LogLevel.ERROR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of a view's log."""

    level: LogLevel
    text: str  # where it has several lines, the first says what matters most


def log_line_of(event: Event, counters: RunCounters) -> LogLine | None:
    """The log line of an event, or None when it is routine.

    Args:
        event: any event of a run.
        counters: the counts of the run, this event included: a live source that drops thousands of
            frames gets a line for the first ones and then for every doubling. They name keyframes.
    """
    match event:
        case FrameDropped():
            return _dropped(event, counters.dropped_by_reason[event.reason])
        case CameraTurning():
            turning = (
                f"camera {event.camera_key}: turns without moving from"
                f" {counters.name_of(event.first)} to {counters.name_of(event.last)}, which tells"
                " no depth: film this part again while walking"
            )
            return LogLine(level=LogLevel.WARNING, text=turning)
        case CameraDoubted() | Warned() | VerdictChanged():
            return _doubt(event)
        case FaultOccurred():
            return _fault(event)
        case SourceChanged():
            is_bad = event.state in (SourceState.LOST, SourceState.REFUSED)
            is_bad |= any(one.is_missed for one in event.left_out)
            level = LogLevel.WARNING if is_bad else LogLevel.INFO
            return LogLine(level=level, text=f"{event.source}: {event.state}: {event.detail}")
        case _:
            kinds = (_milestone, _camera, _zoom, _mapping, _other_map, _refinement)
            line = next((text for kind in kinds if (text := kind(event, counters))), None)
            return LogLine(level=LogLevel.INFO, text=line) if line else None


def _doubt(event: CameraDoubted | Warned | VerdictChanged) -> LogLine:
    match event:
        case CameraDoubted():
            doubt = f"camera {event.camera_key}: {event.reason}"
            return LogLine(level=LogLevel.WARNING, text=doubt)
        case Warned():
            return LogLine(level=LogLevel.WARNING, text=event.message)
        case VerdictChanged():
            return LogLine(level=_LEVEL_OF_VERDICT[event.verdict.level], text=_verdict(event))


def _fault(event: FaultOccurred) -> LogLine | None:
    if not _is_shown(event.num_faults, shown_each=FAULTS_LOGGED_EACH):
        return None
    total = f" ({event.num_faults:,} times so far)" if event.num_faults > 1 else ""
    text = f"{event.part} failed{total}: {event.detail}; {event.consequence}"
    return LogLine(level=LogLevel.ERROR, text=text)


def _verdict(event: VerdictChanged) -> str:
    """The level and the gravest reason in the first line, the other reasons below it."""
    level, reasons = event.verdict.level, event.verdict.reasons
    verdict = "verdict" if event.is_final else "so far the map is"
    if not reasons:
        return f"{verdict} {level}"
    others = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    below = verdict_lines(replace(event.verdict, reasons=reasons[1:]))[1:]
    return "\n".join(
        [f"{verdict} {level_in_words(event.verdict)}: {reasons[0].sentence}{others}", *below]
    )


def _dropped(event: FrameDropped, num_dropped: int) -> LogLine | None:
    if not _is_shown(num_dropped, shown_each=DROPS_LOGGED_EACH):
        return None
    total = f" ({num_dropped:,} so far)" if num_dropped > 1 else ""
    detail = f": {event.detail}" if event.detail else ""
    text = f"dropped {event.name} as {event.reason}{detail}{total}"
    return LogLine(level=LogLevel.WARNING, text=text)


def _is_shown(number: int, *, shown_each: int) -> bool:
    """Whether the one of this number is: the first ones, then whenever it has doubled."""
    is_power_of_two = number & (number - 1) == 0
    return number <= shown_each or is_power_of_two


def _milestone(event: Event, _: RunCounters) -> str | None:
    match event:
        case RunStarted():
            return f"started: {', '.join(event.sources)} with {event.matcher}"
        case SnapshotWritten():
            return (
                f"snapshot {event.sequence:06d}: {event.num_keyframes} keyframes, "
                f"{event.num_points3D:,} points"
            )
        case DenseMapWritten():
            doubt = f" of a {event.verdict} map" if event.verdict != VerdictLevel.GOOD else ""
            return f"{event.num_points:,} dense points of {event.num_keyframes} keyframes{doubt}"
        case CommandTaken():
            return f"asked to: {event.command}"
        case RunFinished():
            why = event.stopped_by.replace("_", " ")
            num, num_all = event.num_registered, event.num_keyframes
            return f"finished ({why}): {num}/{num_all} registered{_other_maps(event)}"
    return None


def _other_maps(event: RunFinished) -> str:
    sizes = event.num_in_other_maps
    return f", {in_words(sizes)} in maps apart from it" if sizes else ""


def _camera(event: Event, _: RunCounters) -> str | None:
    match event:
        case CameraCalibrated():
            how = "as in the map" if event.is_refined else event.how.replace("_", " ")
            return f"camera {event.camera_key}: focal length {event.focal_px:.0f} px ({how})"
        case LensRecognised():
            return (
                f"camera {event.camera_key}: its lens is recognised as {event.model} with"
                f" {event.focal_px:.0f} px, instead of {event.former_model} with"
                f" {event.former_focal_px:.0f} px"
            )
        case CropFound():
            x, y = event.principal_point_xy
            whole = event.whole_camera_key
            return f"camera {event.camera_key} is a crop of {whole}: centre at {x:.0f}, {y:.0f} px"
        case OverlayFound():
            return (
                f"camera {event.camera_key}: {100 * event.share:.1f} % of its image is masked, "
                f"which shows nothing of the world: {_boxes(event.boxes)}"
            )
    return None


def _zoom(event: Event, _: RunCounters) -> str | None:
    match event:
        case ZoomSearched():
            return (
                f"camera {event.camera_key}: {len(event.frame_ids)} keyframes seem to be zoomed;"
                " maps with a focal length of their own are tried"
            )
        case CameraSplit():
            parts = ", ".join(
                f"{event.calibration_idx.count(idx)} keyframes at {focal_px:.0f} px"
                for idx, focal_px in enumerate(event.focal_px)
            )
            return f"camera {event.camera_key} has several focal lengths: {parts}"
    return None


def _mapping(event: Event, counters: RunCounters) -> str | None:
    match event:
        case EarlyMapMade() | MapInitialized():
            return _started(event, counters)
        case RegistrationFailed():
            return (
                f"{counters.name_of(event.frame_id)} waits for more keyframes around it:"
                f" {_evidence(event)}"
            )
        case LoopClosed():
            return f"loop closed: {_both(event, counters)}, {event.num_inliers} inliers"
        case LoopCorrected():
            before_px = f"{min(event.error_before_px, _MOST_SHOWN_PX):.0f}"
            return (
                f"map corrected between {_both(event, counters)}: {event.num_pairs} "
                f"pairs off by {before_px} px agree with it now, to {event.error_after_px:.1f} px"
            )
        case LoopRefused():
            return (
                f"{event.num_pairs} pairs, such as {_both(event, counters)}, "
                f"contradict the map, which stays: {event.reason}"
            )
    return None


def _other_map(event: Event, counters: RunCounters) -> str | None:
    match event:
        case ComponentStarted():
            return (
                f"a second map grows from {_both(event, counters)}, with {event.num_registered}"
                " keyframes: it is joined where it comes to overlap with the first"
            )
        case ComponentJoined():
            return (
                f"a second map with {len(event.keyframe_ids)} keyframes was joined:"
                f" {event.num_registered} are in one map now"
            )
        case MainMapChanged():
            return (
                f"another map holds more and is the map now: {event.num_registered} keyframes"
                f" instead of {event.num_registered_in_former}"
            )
    return None


def _started(event: EarlyMapMade | MapInitialized, counters: RunCounters) -> str:
    words = f"map started from {_both(event, counters)}: {event.num_points3D:,} points"
    if isinstance(event, EarlyMapMade):
        return f"early {words}"
    return words if event.attempt <= 1 else f"{words}, attempt {event.attempt}"


def _both(
    event: EarlyMapMade
    | MapInitialized
    | LoopClosed
    | LoopCorrected
    | LoopRefused
    | ComponentStarted,
    counters: RunCounters,
) -> str:
    """The two keyframes of a pair."""
    return f"{counters.name_of(event.first)} and {counters.name_of(event.second)}"


def _boxes(boxes: Sequence[tuple[int, int, int, int]]) -> str:
    """Where boxes are, the first few of them: left, top and size in px."""
    named = [
        f"{right - left} x {bottom - top} px at {left}, {top}"
        for left, top, right, bottom in boxes[:BOXES_NAMED]
    ]
    return ", ".join(named) + (", ..." if len(boxes) > BOXES_NAMED else "")


def _refinement(event: Event, _: RunCounters) -> str | None:
    match event:
        case BundleAdjusted():
            before_px, after_px = (
                event.reprojection_error_before_px,
                event.reprojection_error_after_px,
            )
            errors = f"{before_px:.2f} to {after_px:.2f} px"
            return f"global bundle adjustment of {event.num_keyframes} keyframes: {errors}"
        case MetricScaleEstimated():
            applied = "; it is in metres now" if event.is_applied else ""
            return f"a unit of the map is {event.metres_per_map_unit:.4g} m by depths seen{applied}"
        case Georeferenced():
            left_out = f", {len(event.rejected_ids)} left out" if event.rejected_ids else ""
            return (
                f"map laid onto {event.num_fixes} GPS positions{left_out}: "
                f"{event.rmse_m:.2f} m rms; snapshots are in metres (a map unit is"
                f" {event.metres_per_map_unit:.4g} m)"
            )
        case WindowSolved() if event.verdict is WindowVerdict.MERGED:
            # Windows that change nothing are routine.
            return (
                f"window of {len(event.keyframe_ids)} keyframes ({event.purpose}): {event.reason}"
            )
    return None


def _evidence(event: RegistrationFailed) -> str:
    if event.status is RegistrationStatus.TOO_FEW_CORRESPONDENCES:
        return "too few matches with the map so far"
    evidence = f"{event.num_inliers} of {event.num_correspondences} matches agree"
    if event.status is RegistrationStatus.CONTRADICTED:
        return f"{evidence}, and stronger pairs contradict them"
    if event.status is RegistrationStatus.AMBIGUOUS:
        return f"{evidence}, and pairs show another place as well"
    return evidence
