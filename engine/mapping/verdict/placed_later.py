"""The verdict on a map that was laid out after its end: advice that goes by its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.mapping.verdict.map_evidence import FOCAL_UNSURE
from engine.mapping.verdict.verdict import help_with_focal
from engine.types import Verdict, VerdictReason

_KINDS = frozenset(f"camera_{kind}" for kind in FOCAL_UNSURE)


def with_advice_of_place(
    verdict: Verdict,
    cameras: Sequence[Mapping[str, Any]],
    *,
    flying_height_m: float | None,
    has_control: bool,
) -> Verdict:
    """The verdict with what an unsure focal length is to the map where it lies now.

    Args:
        verdict: on the map.
        cameras: their records, see `CameraFigures.as_record`; reasons that name a doubt of none of
            them stay as they are.
        flying_height_m: of the map where it lies, see `flying_height_m`.
        has_control: it lies on control points with heights.
    """

    def renewed(reason: VerdictReason) -> VerdictReason:
        for camera, doubt in [(one, text) for one in cameras for text in one.get("doubts", ())]:
            name, found, _ = reason.sentence.partition(f": {doubt}; ")
            if found and name in ("the camera", f"camera {camera.get('key')}"):
                advice = help_with_focal(
                    observed_sigma_ratio=camera.get("observed_sigma_ratio"),
                    prior_sigma_ratio=camera["prior_sigma_ratio"],
                    flying_height_m=flying_height_m,
                    is_photos=None,
                    has_control=has_control,
                )
                return replace(reason, sentence=f"{name}{found}{advice}")
        return reason

    reasons = (renewed(one) if one.kind in _KINDS else one for one in verdict.reasons)
    return replace(verdict, reasons=tuple(reasons))
