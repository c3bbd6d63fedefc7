"""Verdicts on maps, for those who show them."""

from __future__ import annotations

from engine.types import FrameId, Verdict, VerdictLevel, VerdictReason


def verdict_of(*levels: VerdictLevel) -> Verdict:
    """A verdict with a reason of each level, gravest first."""
    reasons = tuple(
        VerdictReason(
            kind=f"kind_{number}",
            level=level,
            sentence=f"frames {number}0 to {number}5 turn on the spot: film this part again while"
            " walking, and keep what you have filmed in view",
            frame_ids=(FrameId(10 * number), FrameId(10 * number + 5)),
        )
        for number, level in enumerate(levels, start=1)
    )
    return Verdict(level=levels[0] if levels else VerdictLevel.GOOD, reasons=reasons)
