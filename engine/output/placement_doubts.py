"""What speaks against a place that a map was given after its end, in the run's verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.geo.map_change import MapChange
from engine.geo.map_shift import MapShift
from engine.types import Verdict, VerdictLevel, VerdictReason

_MOVED_FAR = "place_moved_far"
_SCALE_BAR = "scale_bar_contradicts"
_CONTROL_BENDS = "control_contradicts_positions"
_CONTROL_DISAGREES = "control_disagrees"
_CONTROL_UNCHECKED = "control_unchecked"
_OF_MOVE = frozenset({_MOVED_FAR, _CONTROL_BENDS, _CONTROL_DISAGREES, _CONTROL_UNCHECKED})
_SUSPICIOUS = 3.0  # times the error that surveying and marking account for
_LEAST_CONTROL = 3  # points, which fit any map but for their distances
_ENOUGH_TO_FIND = 5  # control points, of which a wrong one can be found
_GRAVITY = (VerdictLevel.GOOD, VerdictLevel.DOUBTFUL, VerdictLevel.WRONG)
_BAR_RATIO = 0.02  # of its length, of marking and measuring
_BAR_TIMES = 4.0  # the standard deviation of its length in the map


def far_move(
    shift: MapShift | None, *, by: str, from_where: str, likely: str
) -> tuple[VerdictReason, ...]:
    """The doubt about a map that was moved further than positions can be wrong, if it was.

    Args:
        shift: how far it was moved; None: it had no place.
        by: what moved it, plural.
        from_where: what had it elsewhere.
        likely: what is the likely cause, a clause.
    """
    if shift is None or not shift.is_far:
        return ()
    reason = VerdictReason(
        kind=_MOVED_FAR,
        level=VerdictLevel.DOUBTFUL,
        sentence=f"{by} put the cameras {shift.words} from where {from_where} had them, and"
        f" positions are hardly ever that wrong: {likely}",
    )
    return (reason,)


def control_against_positions(
    change: MapChange | None, *, num_control: int
) -> tuple[VerdictReason, ...]:
    """The doubt about control points that tilt, turn or scale a map as its positions deny, if so.

    Args:
        change: of the map by them; None: there were no positions, or they are far away anyway.
        num_control: points that were given.
    """
    if change is None or not change.is_clear:
        return ()
    tilt, turn, scale = change.tilt_rad, change.turn_rad, change.scale_ratio
    size = f"{100.0 * abs(scale.value):.1f} %"
    done = [
        (tilt, f"tilt the map by {_degrees(tilt.value)}", _degrees(tilt.std)),
        (
            turn,
            f"turn the map by {_degrees(abs(turn.value))} about the vertical",
            _degrees(turn.std),
        ),
        (
            scale,
            f"make the map {size} {'larger' if scale.value > 0.0 else 'smaller'}",
            f"{100.0 * scale.std:.1f} %",
        ),
    ]
    clear = [(what, certain) for one, what, certain in done if one.is_clear]
    reason = VerdictReason(
        kind=_CONTROL_BENDS,
        level=VerdictLevel.DOUBTFUL,
        sentence=(
            "the control points contradict the positions of the cameras: they"
            f" {' and '.join(what for what, _ in clear)}, and positions leave open"
            f" {' and '.join(certain for _, certain in clear)} (one standard deviation): a point is"
            f" probably surveyed or written down wrongly; {_help_to_find(num_control)}"
        ),
    )
    return (reason,)


def control_disagreement(
    rmse_m: float, *, expected_m: float, num_control: int
) -> tuple[VerdictReason, ...]:
    """The doubt about control points that no map fits as well as they are surveyed and marked.

    Args:
        rmse_m: of the points that placed the map.
        expected_m: what surveying and marking account for, likewise.
        num_control: points that were given.
    """
    if rmse_m <= _SUSPICIOUS * expected_m:
        return ()
    reason = VerdictReason(
        kind=_CONTROL_DISAGREES,
        level=VerdictLevel.DOUBTFUL,
        sentence=(
            f"the control points disagree by {rmse_m:.2g} m, more than surveying and marking"
            f" account for ({expected_m:.2g} m): the map is bent, or a point is wrong;"
            f" {_help_to_find(num_control)}"
        ),
    )
    return (reason,)


def control_unchecked(*, num_control: int, num_check: int) -> tuple[VerdictReason, ...]:
    """The remark that nothing checks the control points of a map, if so.

    Args:
        num_control: points that placed the map.
        num_check: points that are compared only.
    """
    if num_control > _LEAST_CONTROL or num_check:
        return ()
    reason = VerdictReason(
        kind=_CONTROL_UNCHECKED,
        level=VerdictLevel.GOOD,
        sentence="three control points leave nothing to check them by: a wrong height tilts the"
        f" map, and the errors stay small; {_help_to_find(num_control)}",
    )
    return (reason,)


def _degrees(angle_rad: float) -> str:
    return f"{math.degrees(angle_rad):.1f} degrees"


def _help_to_find(num_control: int) -> str:
    """What helps to find a wrong control point."""
    checks = "points named CHK, which are only compared, show how far the map is off"
    if num_control >= _ENOUGH_TO_FIND:
        return f"check their heights and the coordinate system; {checks}"
    return f"with five or more points the wrong one can be found, and {checks}"


def wrong_bars(bars: Sequence[Mapping[str, Any]]) -> tuple[VerdictReason, ...]:
    """The doubts about scale bars that a map contradicts whose unit is not theirs.

    Args:
        bars: their records: names of their ends; length, error, and the standard deviation of the
            length in the map by what marks and places leave open, metres.
    """
    return tuple(
        VerdictReason(
            kind=_SCALE_BAR,
            level=VerdictLevel.DOUBTFUL,
            sentence=f"the scale bar from {' to '.join(bar['ends'])} is {bar['in_map_m']:.4g} m in"
            f" the map and was measured as {bar['length_m']:.4g} m: its ends are marked wrongly, or"
            " what gave the map its unit is wrong",
        )
        for bar in bars
        if abs(bar["error_m"]) > max(_BAR_RATIO * bar["length_m"], _BAR_TIMES * bar["std_m"])
    )


def with_doubts(verdict: Verdict, doubts: Sequence[VerdictReason], *, is_moved: bool) -> Verdict:
    """A run's verdict with these doubts about its place, instead of those of a former one.

    Args:
        verdict: as it was.
        doubts: what speaks against the place as it is now.
        is_moved: whether that is another one; else what is doubted about the move there stays.
    """
    outdated = {_SCALE_BAR, *_OF_MOVE} if is_moved else {_SCALE_BAR}
    others = [reason for reason in verdict.reasons if reason.kind not in outdated]
    reasons = sorted([*doubts, *others], key=lambda one: -_GRAVITY.index(one.level))
    level = max((one.level for one in reasons), key=_GRAVITY.index, default=VerdictLevel.GOOD)
    return Verdict(level=level, reasons=tuple(reasons))
