"""What speaks against a place that a map was given after its end, in the run's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.geo.map_shift import MapShift
from engine.types import Verdict, VerdictLevel, VerdictReason

_MOVED_FAR = "place_moved_far"
_SCALE_BAR = "scale_bar_contradicts"
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
    outdated = {_SCALE_BAR, _MOVED_FAR} if is_moved else {_SCALE_BAR}
    others = [reason for reason in verdict.reasons if reason.kind not in outdated]
    reasons = sorted([*doubts, *others], key=lambda one: -_GRAVITY.index(one.level))
    level = max((one.level for one in reasons), key=_GRAVITY.index, default=VerdictLevel.GOOD)
    return Verdict(level=level, reasons=tuple(reasons))
