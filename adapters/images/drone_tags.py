"""What drones write into the XMP of their photos: positions, and how sure they are.

DJI (``drone-dji``), Autel, Parrot and senseFly (``Camera``, as Pix4D defined it) use the same names
in namespaces of their own, as attributes or as elements; names decide here, namespaces do not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapters.images.exif import Exif
from engine.types import GpsFix

_NAMES = (
    "absolutealtitude|relativealtitude|gpslatitude|gpslongitude|gpslongtitude|gpsaltitude"
    "|rtkflag|rtkstdlat|rtkstdlon|rtkstdhgt|gpsxyaccuracy|gpszaccuracy"
)
_TAG = re.compile(
    rf"""[\w-]{{1,40}}:({_NAMES})\s{{0,8}}(?:=\s{{0,8}}["']([^"']{{1,64}})["']|>([^<]{{1,64}})<)""",
    re.IGNORECASE,
)
_MAX_XMP_BYTES = 2**18
_IN_ARC = re.compile(r"(\d{1,3}),(\d{1,2}(?:\.\d+)?)(?:,(\d{1,2}(?:\.\d+)?))?([NSEW])")  # of XMP
_RATIO = re.compile(r"([-+]?\d+(?:\.\d+)?)/(\d+)")
_RTK_FLOAT, _RTK_FIXED = 34, 50  # how RtkFlag counts solutions; less are none of RTK
_ALTITUDES_M = (-1000.0, 100_000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DroneTags:
    """The tags in use; None where one is absent or no number."""

    latitude_deg: float | None = None
    longitude_deg: float | None = None
    absolute_altitude_m: float | None = None  # above the sea, or as the drone counts it
    relative_altitude_m: float | None = None  # above the place of take-off
    accuracy_m: float | None = None  # horizontal, one standard deviation
    vertical_accuracy_m: float | None = None


def read_drone_tags(xmp: bytes) -> DroneTags:
    """The tags of an XMP packet; none of one that is damaged or none."""
    text = xmp[:_MAX_XMP_BYTES].decode("utf-8", errors="replace")
    found: dict[str, str] = {}
    for name, attribute, element in _TAG.findall(text):
        found.setdefault(name.lower(), (attribute or element).strip())
    accuracy_m, vertical_accuracy_m = _accuracies_m(found)
    return DroneTags(
        latitude_deg=_degrees(found.get("gpslatitude"), limit=90.0),
        longitude_deg=_degrees(found.get("gpslongitude", found.get("gpslongtitude")), limit=180.0),
        absolute_altitude_m=_altitude_m(found, "absolutealtitude", "gpsaltitude"),
        relative_altitude_m=_altitude_m(found, "relativealtitude"),
        accuracy_m=accuracy_m,
        vertical_accuracy_m=vertical_accuracy_m,
    )


def with_drone_tags(exif: Exif, xmp: bytes) -> Exif:
    """The tags with the position that EXIF and XMP give together.

    EXIF's goes first where it is whole. Its altitude of 0 beside another one in XMP is what
    cameras write that know none.
    """
    if not xmp:
        return exif
    tags = read_drone_tags(xmp)
    fix = exif.gps
    if fix is None:
        latitude_deg, longitude_deg = tags.latitude_deg, tags.longitude_deg
        if latitude_deg is None or longitude_deg is None or latitude_deg == longitude_deg == 0.0:
            return exif
        fix = GpsFix(
            latitude_deg=latitude_deg, longitude_deg=longitude_deg, altitude_m=exif.altitude_m
        )
    altitude_m = fix.altitude_m or tags.absolute_altitude_m
    if altitude_m is None:
        altitude_m = tags.relative_altitude_m if fix.altitude_m is None else fix.altitude_m
    fix = replace(
        fix,
        altitude_m=altitude_m,
        accuracy_m=tags.accuracy_m or fix.accuracy_m,
        vertical_accuracy_m=tags.vertical_accuracy_m,
    )
    return replace(exif, gps=fix, position_problem="")


def _accuracies_m(found: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Standard deviations, horizontal and vertical: of RTK, or those of Pix4D's names."""
    flag = _number(found.get("rtkflag"))
    if flag is not None and _RTK_FLOAT <= flag <= _RTK_FIXED:
        stated = [_positive(found.get(name)) for name in ("rtkstdlat", "rtkstdlon")]
        known = [value for value in stated if value is not None]
        return max(known, default=None), _positive(found.get("rtkstdhgt"))
    return _positive(found.get("gpsxyaccuracy")), _positive(found.get("gpszaccuracy"))


def _altitude_m(found: Mapping[str, str], *names: str) -> float | None:
    values = (_number(found.get(name)) for name in names)
    lowest_m, highest_m = _ALTITUDES_M
    return next((m for m in values if m is not None and lowest_m <= m <= highest_m), None)


def _degrees(text: str | None, *, limit: float) -> float | None:
    """Signed degrees, or degrees and minutes with a letter as XMP has them."""
    if text is None:
        return None
    in_arc = _IN_ARC.fullmatch(text)
    if in_arc is not None:
        degrees = sum(float(part or 0.0) / 60.0**i for i, part in enumerate(in_arc.groups()[:3]))
        degrees = -degrees if in_arc[4] in "SW" else degrees
    else:
        number = _number(text)
        if number is None:
            return None
        degrees = number
    return degrees if abs(degrees) <= limit else None


def _positive(text: str | None) -> float | None:
    value = _number(text)
    return value if value is not None and value > 0.0 else None


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    ratio = _RATIO.fullmatch(text)
    try:
        value = float(ratio[1]) / float(ratio[2]) if ratio is not None else float(text)
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None
