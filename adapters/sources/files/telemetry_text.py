"""Positions in subtitles, as drones write them beside a video or into it.

What drones are known to write, one block of text to a frame or a second:

    [latitude: 47.376900] [longitude: 8.541700] [rel_alt: 30.100 abs_alt: 430.200]
    [latitude : 47.376900] [longtitude : 8.541700] [altitude: 430.200012]
    GPS(8.5417,47.3769,19) BAROMETER:30.1
    GPS(8.5417,47.3769,19) Hb: 30.1m Hs: 2.0m
    GPS(47.3769,8.5417,0.0M) BAROMETER:30.1M
    F/2.8, SS 206.14, ISO 100, EV 0, GPS (8.5417, 47.3769, 15), D 2.09m, H 30.10m
    GPS(E: 8.541700, N: 47.376900, 430.20m)
    RTK(E: 8.541700, N: 47.376900, 430.20m)

Most put the longitude first where nothing names it, some the latitude; some write radians.
"""

from __future__ import annotations

import codecs
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.config import TelemetryOrder
from engine.types import GpsFix

_TIMING = re.compile(r"^\s*(\d{1,6}):(\d\d):(\d\d)(?:[,.](\d{1,3}))?\s*-->")
_NUMBER = r"([-+]?\d{1,9}(?:\.\d{1,15})?)"
_NAMES = "latitude|longitude|longtitude|abs_alt|rel_alt|altitude"
# Of text in lower case, which is searched several times faster than text in any case.
_NAMED = re.compile(rf"\b({_NAMES})\s{{0,4}}[:=]\s{{0,4}}{_NUMBER}(?=m?(?![\w.]))(?!,\d)")
_TUPLE = re.compile(r"\b(?:gps|rtk)\s?\(([^()]{1,100})\)")
_IN_TUPLE = re.compile(rf"\s*(?:([nsew])\s?:?\s?)?{_NUMBER}\s*(m?)\s*")
_ABOVE_START = (
    re.compile(rf"\bbarometer\s?:\s?{_NUMBER}"),
    re.compile(rf"\bhb\s?:\s?{_NUMBER}"),
    re.compile(rf"\bh\s{_NUMBER}\s?m\b"),
)
_SPEAKS_OF_PLACES = re.compile(r"\blatitude\b|\b(?:gps|rtk)\s?\(")

_LONGITUDES = ("longitude", "longtitude")  # the second is how some drones spell it
_MAX_BLOCK_CHARS = 4096
_ALTITUDES_M = (-1000.0, 20_000.0)
_LONG_STAND_S = 1.5  # receivers repeat themselves for up to a second anyway
_STAND_STEP_S = 1.0
_NEAR_DEG = 1.0  # from the container's own position, which counts to a degree


class AltitudeKind(StrEnum):
    """What the altitudes of a track are counted from."""

    ABSOLUTE = "absolute"  # sea level, to the accuracy of the drone's barometer
    UNNAMED = "unnamed"  # the drone does not say
    RELATIVE = "relative"  # the place of take-off
    NONE = "no"  # there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBlock:
    """What a subtitle track shows from a time on."""

    time_s: float  # of the video
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedFix:
    """A position at a time of the video."""

    time_s: float
    fix: GpsFix


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """The positions of a subtitle track, and what could not be used."""

    fixes: tuple[TimedFix, ...]  # in order of time, each time once
    altitude: AltitudeKind  # of all of them that have one
    num_blocks: int  # that speak of a place
    num_unusable: int  # of these, for what reason ever
    problem: str  # the most frequent reason; "" where there is none
    order: str = ""  # how it was decided whether latitude or longitude comes first

    @property
    def is_any(self) -> bool:
        """Whether the track speaks of places at all."""
        return self.num_blocks > 0


def read_telemetry(
    blocks: Iterable[TextBlock],
    *,
    order: TelemetryOrder = "auto",
    near_deg: tuple[float, float] | None = None,
) -> Telemetry:
    """Takes the positions out of subtitles.

    A block that cannot be used is counted and left out. All altitudes are of one kind, the best
    that most positions have; a position that lacks it has none. Where a receiver repeats itself,
    only its first word counts, so that a camera moves evenly between one position and the next; a
    long stand is repeated.

    Args:
        blocks: of the track.
        order: which of two numbers without a name or a letter is the latitude. "auto": by their
            range, by ``near_deg``, or else the fixes are marked as of unsure order.
        near_deg: latitude and longitude of a place near by, as the video's container has it.
    """
    places: list[_Place] = []
    problems: Counter[str] = Counter()
    for block in blocks:
        text = block.text[:_MAX_BLOCK_CHARS].lower()
        if not _SPEAKS_OF_PLACES.search(text):
            continue
        place = _place_in(block.time_s, text)
        if isinstance(place, str):
            problems[place] += 1
        else:
            places.append(place)
    num_blocks = len(places) + problems.total()
    kind = _common_altitude(places)
    places, how = _ordered(_in_degrees(places), order=order, near_deg=near_deg)
    usable = [place for place in places if abs(place.latitude_deg) <= 90.0]
    if len(usable) < len(places):
        problems["latitude or longitude out of range"] += len(places) - len(usable)
    in_order = {place.time_s: place for place in sorted(usable, key=lambda place: place.time_s)}
    fixes = [place.timed_fix(kind) for place in in_order.values()]
    return Telemetry(
        fixes=tuple(_without_repetitions(fixes)),
        altitude=kind,
        num_blocks=num_blocks,
        num_unusable=problems.total(),
        problem=problems.most_common(1)[0][0] if problems else "",
        order=how,
    )


def blocks_of_srt(text: str) -> Iterator[TextBlock]:
    """The blocks of a SubRip file, whatever stands between them."""
    time_s: float | None = None
    lines: list[str] = []
    for line in text.splitlines():
        timing = _TIMING.match(line)
        if timing is None:
            lines.append(line)
            continue
        if time_s is not None:
            yield TextBlock(time_s=time_s, text="\n".join(lines))
        hours, minutes, seconds, fraction = timing.groups(default="0")
        whole_s = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        time_s, lines = whole_s + int(fraction) / 10.0 ** len(fraction), []
    if time_s is not None:
        yield TextBlock(time_s=time_s, text="\n".join(lines))


def text_of_file(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark."""
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_wide else "utf-8-sig", errors="replace")


def text_of_packet(data: bytes, *, is_mov_text: bool) -> str:
    """The text of one packet of a subtitle track.

    ``mov_text`` (3GPP TS 26.245, section 5.17) puts the length before it, two bytes, and styles
    behind it.
    """
    if is_mov_text:
        data = data[2 : 2 + int.from_bytes(data[:2], "big")]
    return data.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A position with all its altitudes."""

    time_s: float
    latitude_deg: float
    longitude_deg: float
    altitudes_m: dict[AltitudeKind, float]
    is_ordered: bool  # whether names or letters say which number is which; False: longitude first
    is_order_unsure: bool = False

    def swapped(self) -> _Place:
        """With the numbers the other way round."""
        return replace(self, latitude_deg=self.longitude_deg, longitude_deg=self.latitude_deg)

    def timed_fix(self, kind: AltitudeKind) -> TimedFix:
        fix = GpsFix(
            latitude_deg=self.latitude_deg,
            longitude_deg=self.longitude_deg,
            altitude_m=self.altitudes_m.get(kind),
            is_order_unsure=self.is_order_unsure,
        )
        return TimedFix(time_s=self.time_s, fix=fix)


def _place_in(time_s: float, text: str) -> _Place | str:
    """The position in a block, or why there is none."""
    named = {name: float(value) for name, value in _NAMED.findall(text)}
    latitude_deg = named.get("latitude")
    longitude_deg = next((named[name] for name in _LONGITUDES if name in named), None)
    altitudes_m = _named_altitudes(named, text)
    is_ordered = True
    if latitude_deg is None or longitude_deg is None:
        found = _numbers_of_tuple(text)
        if found is None:
            return "no latitude and longitude that can be read"
        longitude_deg, latitude_deg, altitude_m, is_ordered = found
        if altitude_m is not None:
            altitudes_m.setdefault(AltitudeKind.UNNAMED, altitude_m)
    if latitude_deg == longitude_deg == 0.0:
        return "the receiver had no fix"
    smaller, larger = sorted((abs(latitude_deg), abs(longitude_deg)))
    if smaller > 90.0 or larger > 180.0:
        return "latitude or longitude out of range"
    lowest_m, highest_m = _ALTITUDES_M
    possible_m = {kind: m for kind, m in altitudes_m.items() if lowest_m <= m <= highest_m}
    return _Place(
        time_s=time_s,
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        altitudes_m=possible_m,
        is_ordered=is_ordered,
    )


def _named_altitudes(named: dict[str, float], text: str) -> dict[AltitudeKind, float]:
    altitudes_m = {
        kind: named[name]
        for kind, name in (
            (AltitudeKind.ABSOLUTE, "abs_alt"),
            (AltitudeKind.UNNAMED, "altitude"),
            (AltitudeKind.RELATIVE, "rel_alt"),
        )
        if name in named
    }
    for pattern in () if altitudes_m else _ABOVE_START:
        found = pattern.search(text)
        if found is not None:
            altitudes_m.setdefault(AltitudeKind.RELATIVE, float(found[1]))
    return altitudes_m


def _numbers_of_tuple(text: str) -> tuple[float, float, float | None, bool] | None:
    """Longitude, latitude, altitude of GPS(...) or RTK(...), and whether letters name them.

    Without letters the first is taken for the longitude. The third one is the number of satellites
    where it is whole, and an altitude otherwise. Of several the last one with numbers counts: RTK
    stands behind GPS.
    """
    for inside in reversed(_TUPLE.findall(text)):
        parts = [_IN_TUPLE.fullmatch(part) for part in inside.split(",")]
        if len(parts) < 2 or parts[0] is None or parts[1] is None:
            continue
        angles = {part[1]: float(part[2]) for part in parts[:2] if part is not None}
        third = parts[2] if len(parts) > 2 else None
        is_length = third is not None and not third[1] and bool(third[3] or "." in third[2])
        altitude_m = float(third[2]) if third is not None and is_length else None
        latitude, longitude = (_by_letter(angles, letters) for letters in ("ns", "ew"))
        if latitude is not None and longitude is not None:
            return longitude, latitude, altitude_m, True
        return float(parts[0][2]), float(parts[1][2]), altitude_m, False
    return None


def _by_letter(angles: Mapping[str, float], letters: str) -> float | None:
    """The angle in one of two hemispheres, negative in the second."""
    for letter, sign in zip(letters, (1.0, -1.0), strict=True):
        if letter in angles:
            return sign * angles[letter]
    return None


def _in_degrees(places: list[_Place]) -> list[_Place]:
    """Places of a track in degrees, which some firmware writes in radians.

    All of them within half a turn of zero, by radians, would lie in the Gulf of Guinea by degrees,
    where there is no land.
    """
    if not places or any(
        min(abs(place.latitude_deg), abs(place.longitude_deg)) > math.pi / 2.0
        or max(abs(place.latitude_deg), abs(place.longitude_deg)) > math.pi
        for place in places
    ):
        return places
    return [
        replace(
            place,
            latitude_deg=math.degrees(place.latitude_deg),
            longitude_deg=math.degrees(place.longitude_deg),
        )
        for place in places
    ]


def _ordered(
    places: list[_Place], *, order: TelemetryOrder, near_deg: tuple[float, float] | None
) -> tuple[list[_Place], str]:
    """Places with the latitude where it belongs, and in words how that was found out."""
    open_ones = [place for place in places if not place.is_ordered]
    if not open_ones:
        return places, ""
    is_latitude_first, how = _decided(open_ones, order=order, near_deg=near_deg)
    return [
        place
        if place.is_ordered
        else replace(place.swapped() if is_latitude_first else place, is_order_unsure=not how)
        for place in places
    ], how


def _decided(
    places: Sequence[_Place], *, order: TelemetryOrder, near_deg: tuple[float, float] | None
) -> tuple[bool, str]:
    """Whether the latitude comes first, and why; "": nothing says."""
    if order != "auto":
        return order == "latitude_first", f"{order.replace('_', ' ')}, as configured"
    num_first = sum(abs(place.longitude_deg) > 90.0 for place in places)  # that must be longitudes
    num_second = sum(abs(place.latitude_deg) > 90.0 for place in places)
    if num_first != num_second:
        is_latitude_first = num_second > num_first
        name = "latitude" if is_latitude_first else "longitude"
        return is_latitude_first, f"{name} first, by their range"
    if near_deg is None:
        return False, ""
    far_deg = [
        max(
            abs(place.latitude_deg - near_deg[0]),
            abs((place.longitude_deg - near_deg[1] + 180.0) % 360.0 - 180.0),
        )
        for place in (places[0], places[0].swapped())
    ]
    if min(far_deg) > _NEAR_DEG or max(far_deg) <= _NEAR_DEG:
        return False, ""
    name = "latitude" if far_deg[1] < far_deg[0] else "longitude"
    return name == "latitude", f"{name} first, by the position of the video file"


def _common_altitude(places: Sequence[_Place]) -> AltitudeKind:
    """The best kind that at least half of the places have, else the most frequent one.

    Zeros do not count while there is anything else: some drones write them for want of a value.
    """
    given = [(kind, m) for place in places for kind, m in place.altitudes_m.items()]
    counts = Counter(kind for kind, m in given if m) or Counter(kind for kind, _ in given)
    for kind in AltitudeKind:
        if 2 * counts[kind] >= len(places) > 0:
            return kind
    return counts.most_common(1)[0][0] if counts else AltitudeKind.NONE


def _without_repetitions(fixes: Sequence[TimedFix]) -> Iterator[TimedFix]:
    for _, equal in itertools.groupby(fixes, key=lambda timed: timed.fix):
        repeated = list(equal)
        yield repeated[0]
        if repeated[-1].time_s - repeated[0].time_s <= _LONG_STAND_S:
            continue
        kept_at_s = repeated[0].time_s
        for timed in repeated[1:]:
            if timed.time_s - kept_at_s >= _STAND_STEP_S or timed is repeated[-1]:
                kept_at_s = timed.time_s
                yield timed
