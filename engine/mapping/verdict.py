"""The verdict on a map: how far it can be trusted, and why it is not simply good."""

from __future__ import annotations

from collections.abc import Iterator

from engine.mapping.map_evidence import MapEvidence
from engine.types import Verdict, VerdictLevel, VerdictReason

_LEVELS = (VerdictLevel.GOOD, VerdictLevel.DOUBTFUL, VerdictLevel.WRONG)


def judge(evidence: MapEvidence) -> Verdict:
    """Judges a map: the worst of its reasons is the level of the verdict."""
    reasons = sorted(_reasons(evidence), key=lambda reason: -_LEVELS.index(reason.level))
    level = reasons[0].level if reasons else VerdictLevel.GOOD
    return Verdict(level=level, reasons=tuple(reasons))


def _reasons(evidence: MapEvidence) -> Iterator[VerdictReason]:
    if evidence.separate_sizes:
        sizes = " and ".join(str(size) for size in evidence.separate_sizes)
        yield VerdictReason(
            kind="several_maps",
            level=VerdictLevel.DOUBTFUL,
            sentence=(
                f"nothing joins the map of {evidence.num_registered} keyframes to those of {sizes}"
                " beside it: film the way from one to the other in one go"
            ),
        )
