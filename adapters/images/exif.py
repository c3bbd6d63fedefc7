"""EXIF: orientation, focal length and GPS position from a photo's EXIF block.

The reader is our own because blocks in the wild are often damaged: it is bounds-checked, takes a
broken value for an absent one, and neither raises nor warns. It reads the few tags named below
(Exif 2.32, CIPA DC-008; TIFF 6.0, section 2).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.types import (
    EXIF_FOCAL_SIGMA_RATIO,
    BoolArray,
    CalibrationOrigin,
    GpsFix,
    IntrinsicsPrior,
    Uint8Array,
)

Value = str | tuple[float, ...]
Directory = Mapping[int, Value]
Pixels = TypeVar("Pixels", Uint8Array, BoolArray)

_IMAGE_WIDTH, _IMAGE_HEIGHT = 0x0100, 0x0101
_MAKE, _MODEL, _ORIENTATION = 0x010F, 0x0110, 0x0112
_EXIF_DIRECTORY, _GPS_DIRECTORY = 0x8769, 0x8825
_FOCAL_LENGTH, _DIGITAL_ZOOM_RATIO, _FOCAL_LENGTH_35MM = 0x920A, 0xA404, 0xA405
_PIXEL_X_DIMENSION, _PIXEL_Y_DIMENSION = 0xA002, 0xA003
_FOCAL_PLANE_X_RESOLUTION, _FOCAL_PLANE_RESOLUTION_UNIT = 0xA20E, 0xA210
_BODY_SERIAL, _LENS_MODEL, _LENS_SERIAL = 0xA431, 0xA434, 0xA435
_GPS_LATITUDE, _GPS_LONGITUDE, _GPS_ALTITUDE = 2, 4, 6  # each has its reference one below
_GPS_HORIZONTAL_ERROR = 31
_BELOW_REFERENCE = (1, 3)  # sea level; the ellipsoid (Exif 3.0)

_ASCII, _RATIONAL, _SRATIONAL = 2, 5, 10
_FORMATS = {1: "B", 3: "H", 4: "I", _RATIONAL: "II", 9: "i", _SRATIONAL: "ii", 11: "f", 12: "d"}
_MAX_COUNT = 512  # longer values (maker notes, tables) are none of ours

NO_LETTERS = "it has no letters N or S and E or W"  # or one of the two is missing

PLAUSIBLE_FOCAL_RATIOS = (0.2, 30.0)  # of the longer edge: a fisheye, the longest telephoto lens

# One standard deviation, of the focal length.
_EQUIVALENT_SIGMA_RATIO = 0.05  # of 35 mm equivalents, beside their rounding
_ROUNDING_MM = 0.5
_FOCAL_PLANE_SIGMA_RATIO = 0.04
_ZOOMED_SIGMA_RATIO = 0.15  # where digital zoom may be counted twice, or not
_CONTRADICTION = 0.15  # between tags, as a logarithm
_MAX_DIGITAL_ZOOM = 100.0

_FILM_DIAGONAL_MM = 43.27  # of the 36 x 24 mm frame
_UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # inch, cm; mm and um are out of the standard
_SENSOR_EDGE_MM = (2.0, 70.0)  # between a phone's and a medium format's

# Width in mm of the whole sensor, which the longer edge of the full-size image spans, by EXIF model
# in lower case. Only models whose files lack a 35 mm equivalent or give a misleading one.
_SENSOR_WIDTH_MM = {
    "canon powershot elph 300 hs": 6.17,
    "fc220": 6.17,  # Mavic Pro
    "fc300c": 6.17,  # Phantom 3 Standard
    "fc300s": 6.17,  # Phantom 3 Professional and Advanced
    "fc300x": 6.17,  # Phantom 3 Professional
    "fc330": 6.17,  # Phantom 4
    "fc350": 6.17,  # Inspire 1
    "fc550": 17.3,  # Zenmuse X5
    "fc6310": 13.2,  # Phantom 4 Pro
    "fc6310r": 13.2,  # Phantom 4 RTK
    "fc6310s": 13.2,  # Phantom 4 Pro V2
    "fc6510": 13.2,  # Zenmuse X4S
    "fc6520": 17.3,  # Zenmuse X5S
    "fc7203": 6.17,  # Mavic Mini
    "fc7303": 6.17,  # Mini 2
    "l1d-20c": 13.2,  # Mavic 2 Pro
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exif:
    """The tags in use; None, "" or upright where a tag is absent or broken."""

    make: str = ""
    model: str = ""
    serial: str = ""  # of the body
    lens: str = ""  # model of the lens, and its serial number
    orientation: int = 1  # 1..8, as EXIF counts them; 1: upright
    focal_length_mm: float | None = None
    focal_length_35mm: float | None = None  # equivalent on 36 x 24 mm film, by the diagonal
    focal_plane_px_per_mm: float | None = None  # in pixels of the size the camera recorded
    digital_zoom_ratio: float | None = None  # 1: none
    recorded_edge_px: float | None = None  # longer edge of the image when the camera recorded it
    gps: GpsFix | None = None
    unsigned_gps: GpsFix | None = None  # one that does not say in which hemispheres it lies
    hemispheres: str = ""  # of N, S, E, W those that the unsigned one has all the same
    altitude_m: float | None = None  # also where latitude and longitude are missing
    position_problem: str = ""  # why tags that speak of a place give no position

    @property
    def quarter_turns(self) -> int:
        """How many times ``upright`` turns the pixels by 90 degrees clockwise; 0 if mirrored."""
        return {6: 1, 3: 2, 8: 3}.get(self.orientation, 0)


def read_exif(block: bytes) -> Exif:
    """Reads an EXIF block: a TIFF structure, with or without the leading ``Exif`` marker."""
    tiff = _Tiff.open(block.removeprefix(b"Exif\0\0"))
    if tiff is None:
        return Exif()
    main = tiff.directory(tiff.first_offset)
    exif = tiff.directory(_pointer(main, _EXIF_DIRECTORY))
    orientation = int(_number(main, _ORIENTATION) or 1)
    position = _position(tiff.directory(_pointer(main, _GPS_DIRECTORY)))
    edges = (_positive(exif, _PIXEL_X_DIMENSION), _positive(exif, _PIXEL_Y_DIMENSION))
    return Exif(
        make=_text(main, _MAKE),
        model=_text(main, _MODEL),
        serial=_text(exif, _BODY_SERIAL),
        lens=f"{_text(exif, _LENS_MODEL)} {_text(exif, _LENS_SERIAL)}".strip(),
        orientation=orientation if orientation in range(1, 9) else 1,
        focal_length_mm=_positive(exif, _FOCAL_LENGTH),
        focal_length_35mm=_positive(exif, _FOCAL_LENGTH_35MM),
        focal_plane_px_per_mm=_focal_plane_px_per_mm(exif),
        digital_zoom_ratio=_digital_zoom_ratio(exif),
        recorded_edge_px=max((edge for edge in edges if edge), default=None),
        gps=position.fix,
        unsigned_gps=position.unsigned,
        hemispheres=position.hemispheres,
        altitude_m=position.altitude_m,
        position_problem=position.problem,
    )


def tiff_image_size(block: bytes) -> tuple[int, int] | None:
    """Width and height in px of the first image of a TIFF file, as stored."""
    tiff = _Tiff.open(block)
    if tiff is None:
        return None
    main = tiff.directory(tiff.first_offset)
    width, height = _positive(main, _IMAGE_WIDTH), _positive(main, _IMAGE_HEIGHT)
    return (int(width), int(height)) if width and height else None


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turns stored pixels (H, W, ...) the way EXIF ``orientation`` (1..8) says they are seen."""
    turns: Mapping[int, Callable[[Pixels], Pixels]] = {
        2: np.fliplr,
        3: lambda image: np.rot90(image, 2),
        4: np.flipud,
        5: lambda image: np.swapaxes(image, 0, 1),
        6: lambda image: np.rot90(image, -1),
        7: lambda image: np.rot90(np.swapaxes(image, 0, 1), 2),
        8: np.rot90,
    }
    return turns[orientation](pixels) if orientation in turns else pixels


def intrinsics_prior(exif: Exif, *, width: int, height: int) -> IntrinsicsPrior | None:
    """The focal length in px of an image of this size, or None where EXIF does not give one.

    The most trustworthy of: focal length and a sensor width we know; the 35 mm equivalent; focal
    length and the focal plane's resolution. A known sensor goes first because the 35 mm equivalent
    is a rounded integer, and some cameras give that of the whole sensor for images cropped to 16:9.
    Tags that contradict each other make it less sure. What no lens has is left out, and where
    nothing else remains the focal length is 0 and the doubt says why.
    """
    edge_px, diagonal_px = max(width, height), math.hypot(width, height)
    said = _focal_lengths(exif, edge_px=edge_px, diagonal_px=diagonal_px)
    shortest, longest = (ratio * edge_px for ratio in PLAUSIBLE_FOCAL_RATIOS)
    possible = [one for one in said if shortest <= one.focal_px <= longest]
    wrong = [one for one in said if one not in possible]
    doubt = (
        f"EXIF says a focal length of {wrong[0].focal_px:.4g} px, as no lens has" if wrong else ""
    )
    if not possible:
        return IntrinsicsPrior(focal_px=0.0, doubt=f"{doubt}; it is ignored") if wrong else None
    best = possible[0]
    spread = max(abs(math.log(one.focal_px / best.focal_px)) for one in possible)
    if spread > _CONTRADICTION:
        values = " and ".join(f"{one.focal_px:.0f}" for one in possible)
        doubt = doubt or f"tags of EXIF say focal lengths of {values} px"
    return IntrinsicsPrior(
        focal_px=best.focal_px,
        origin=best.origin,
        focal_sigma_ratio=max(best.sigma_ratio, spread),
        doubt=doubt,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _FocalLength:
    """A focal length that some tags give, and how surely."""

    focal_px: float
    sigma_ratio: float
    origin: CalibrationOrigin


def _focal_lengths(exif: Exif, *, edge_px: float, diagonal_px: float) -> list[_FocalLength]:
    """What the tags give, the most trustworthy first; values may be impossible.

    Digital zoom enlarges the middle of the sensor's image, and with it the focal length in px. The
    35 mm equivalent of most phones has it already.
    """
    zoom = exif.digital_zoom_ratio or 1.0
    doubt = _ZOOMED_SIGMA_RATIO if zoom != 1.0 else 0.0
    found = []
    known_sensor_mm = _SENSOR_WIDTH_MM.get(exif.model.lower())
    if exif.focal_length_mm and known_sensor_mm:
        focal_px = zoom * exif.focal_length_mm / known_sensor_mm * edge_px
        sigma = max(EXIF_FOCAL_SIGMA_RATIO, doubt)
        found.append(
            _FocalLength(focal_px=focal_px, sigma_ratio=sigma, origin=CalibrationOrigin.EXIF)
        )
    if exif.focal_length_35mm:
        focal_px = exif.focal_length_35mm / _FILM_DIAGONAL_MM * diagonal_px
        sigma = math.hypot(_EQUIVALENT_SIGMA_RATIO, _ROUNDING_MM / exif.focal_length_35mm)
        found.append(
            _FocalLength(
                focal_px=focal_px,
                sigma_ratio=max(min(sigma, 1.0), doubt),
                origin=CalibrationOrigin.EXIF_35MM,
            )
        )
    if exif.focal_length_mm and exif.focal_plane_px_per_mm:
        # The resolution counts pixels of the recorded size. Where software shrank the image and
        # the recorded size with it, but not the resolution, the sensor comes out impossibly small.
        sensor_mm = (exif.recorded_edge_px or edge_px) / exif.focal_plane_px_per_mm
        if _SENSOR_EDGE_MM[0] <= sensor_mm <= _SENSOR_EDGE_MM[1]:
            focal_px = zoom * exif.focal_length_mm / sensor_mm * edge_px
            sigma = max(_FOCAL_PLANE_SIGMA_RATIO, doubt)
            found.append(
                _FocalLength(focal_px=focal_px, sigma_ratio=sigma, origin=CalibrationOrigin.EXIF)
            )
    return found


def _focal_plane_px_per_mm(exif: Directory) -> float | None:
    per_unit = _positive(exif, _FOCAL_PLANE_X_RESOLUTION)
    unit_mm = _UNIT_MM.get(int(_number(exif, _FOCAL_PLANE_RESOLUTION_UNIT) or 2))
    return per_unit / unit_mm if per_unit and unit_mm else None


def _digital_zoom_ratio(exif: Directory) -> float | None:
    """How much of it there was; None where there was none, or no number says so."""
    ratio = _positive(exif, _DIGITAL_ZOOM_RATIO)
    return ratio if ratio is not None and 1.0 < ratio <= _MAX_DIGITAL_ZOOM else None


def _position(gps: Directory) -> _Position:
    """The position as far as the tags give it."""
    latitude = _degrees(gps, _GPS_LATITUDE, hemispheres="NS")
    longitude = _degrees(gps, _GPS_LONGITUDE, hemispheres="EW")
    altitude_m = _number(gps, _GPS_ALTITUDE)
    if altitude_m is not None and _number(gps, _GPS_ALTITUDE - 1) in _BELOW_REFERENCE:
        altitude_m = -altitude_m
    if _GPS_LATITUDE not in gps and _GPS_LONGITUDE not in gps:
        return _Position(altitude_m=altitude_m)
    if latitude is None or longitude is None:
        return _Position(altitude_m=altitude_m, problem="its tags give no latitude and longitude")
    if latitude.degrees == longitude.degrees == 0.0:  # what cameras write when they have no fix
        return _Position(altitude_m=altitude_m, problem="latitude and longitude are 0")
    fix = GpsFix(
        latitude_deg=latitude.degrees,
        longitude_deg=longitude.degrees,
        altitude_m=altitude_m,
        accuracy_m=_positive(gps, _GPS_HORIZONTAL_ERROR),
    )
    # A negative number among them, as it is stored, shows that both have their signs.
    has_signs = latitude.is_signed or longitude.is_signed
    if (latitude.letter and longitude.letter) or has_signs:
        return _Position(altitude_m=altitude_m, fix=fix)
    hemispheres = latitude.letter + longitude.letter
    return _Position(
        altitude_m=altitude_m, unsigned=fix, hemispheres=hemispheres, problem=NO_LETTERS
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Angle:
    degrees: float  # negative: south or west
    letter: str  # of its hemisphere; empty: none
    is_signed: bool  # negative as stored


@dataclass(frozen=True, slots=True, kw_only=True)
class _Position:
    altitude_m: float | None
    fix: GpsFix | None = None
    unsigned: GpsFix | None = None
    hemispheres: str = ""  # those of the unsigned one that are known
    problem: str = ""


def _degrees(gps: Directory, tag: int, *, hemispheres: str) -> _Angle | None:
    """Degrees, minutes and seconds (the last ones may be missing), negative in the second one.

    Some programs write negative numbers, with or without a letter.
    """
    parts = gps.get(tag, ())
    hemisphere = _text(gps, tag - 1).upper()[:1]
    if isinstance(parts, str) or not 1 <= len(parts) <= 3:
        return None
    if hemisphere and hemisphere not in hemispheres:
        return None
    degrees = sum(abs(part) / 60.0**place for place, part in enumerate(parts))
    if not 0.0 <= degrees <= (90.0 if hemispheres == "NS" else 180.0):  # refuses nan too
        return None
    is_signed = any(part < 0.0 for part in parts)
    is_negative = is_signed or hemisphere == hemispheres[1]
    return _Angle(
        degrees=-degrees if is_negative else degrees, letter=hemisphere, is_signed=is_signed
    )


def _pointer(directory: Directory, tag: int) -> int:
    return int(_number(directory, tag) or 0)


def _number(directory: Directory, tag: int) -> float | None:
    value = directory.get(tag)
    if not isinstance(value, tuple) or not value or not math.isfinite(value[0]):
        return None
    return value[0]


def _positive(directory: Directory, tag: int) -> float | None:
    value = _number(directory, tag)
    return value if value is not None and value > 0.0 else None


def _text(directory: Directory, tag: int) -> str:
    value = directory.get(tag)
    return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiff:
    """Bounds-checked access to a TIFF structure."""

    block: bytes
    byte_order: str  # as struct writes it
    first_offset: int

    @classmethod
    def open(cls, block: bytes) -> _Tiff | None:
        byte_order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
        if byte_order is None or len(block) < 8:
            return None
        (first_offset,) = struct.unpack_from(byte_order + "I", block, 4)
        return cls(block=block, byte_order=byte_order, first_offset=first_offset)

    def directory(self, offset: int) -> Directory:
        """The readable values of the directory at ``offset`` by tag; empty where there is none."""
        if offset < 8 or offset + 2 > len(self.block):
            return {}
        (num_entries,) = struct.unpack_from(self.byte_order + "H", self.block, offset)
        num_whole = min(num_entries, (len(self.block) - offset - 2) // 12)
        values: dict[int, Value] = {}
        for entry in range(offset + 2, offset + 2 + 12 * num_whole, 12):
            tag, kind, count = struct.unpack_from(self.byte_order + "HHI", self.block, entry)
            value = self._value(kind, count, entry + 8)
            if value is not None:
                values.setdefault(tag, value)
        return values

    def _value(self, kind: int, count: int, place: int) -> Value | None:
        pattern = "B" if kind == _ASCII else _FORMATS.get(kind)
        if pattern is None or not 0 < count <= _MAX_COUNT:
            return None
        whole = self.byte_order + pattern * count
        size = struct.calcsize(whole)
        if size > 4:
            (place,) = struct.unpack_from(self.byte_order + "I", self.block, place)
        if place + size > len(self.block):
            return None
        if kind == _ASCII:
            text = self.block[place : place + size].split(b"\0", 1)[0]
            return text.decode("utf-8", errors="replace").strip()
        numbers: tuple[Any, ...] = struct.unpack_from(whole, self.block, place)
        if kind in {_RATIONAL, _SRATIONAL}:
            over, under = numbers[::2], numbers[1::2]
            return tuple(a / b if b else math.nan for a, b in zip(over, under, strict=True))
        return tuple(float(number) for number in numbers)
