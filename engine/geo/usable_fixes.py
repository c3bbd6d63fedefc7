"""Which GPS fixes a camera on Earth can have."""

from __future__ import annotations

from dataclasses import replace

from engine.types import GpsFix

_LOWEST_M, _HIGHEST_M = -12_000.0, 100_000.0  # of altitudes: the deepest sea, and space
_MAX_ACCURACY_M = 1e7  # a fix that says less than on which half of the globe says nothing


def usable_fix(fix: GpsFix) -> GpsFix | None:
    """A fix without an altitude that cannot be; None where its position cannot be.

    Values that are not finite cannot be. A latitude may be a longitude where the order is unsure.
    """
    max_latitude_deg = 180.0 if fix.is_order_unsure else 90.0
    if not (abs(fix.latitude_deg) <= max_latitude_deg and abs(fix.longitude_deg) <= 180.0):
        return None
    if fix.accuracy_m is not None and not fix.accuracy_m <= _MAX_ACCURACY_M:
        return None
    vertical_m = fix.vertical_accuracy_m
    is_vague = vertical_m is not None and not vertical_m <= _MAX_ACCURACY_M
    is_high = fix.altitude_m is not None and not _LOWEST_M <= fix.altitude_m <= _HIGHEST_M
    if is_vague or is_high:
        return replace(fix, altitude_m=None, vertical_accuracy_m=None)
    return fix


def is_usable_fix(fix: GpsFix) -> bool:
    """Whether all values of a fix can be."""
    return usable_fix(fix) is fix
