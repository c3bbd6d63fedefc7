"""What publishers put into a message, to the bytes of one encoded image and its metadata.

There is no standard: plain scripts and Home Assistant send the image file itself or its base64
text, browsers a data URI, others a JSON object that holds either and says more. Which it is shows
in the first bytes. Text that stands where an image should is never taken for a path or an address.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from adapters.mqtt.telemetry import (
    MAX_KEYS,
    Position,
    read_json,
    read_number,
    read_position,
    read_time,
)

Properties = Mapping[str, str]  # MQTT 5 user properties

_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_BASE64_STARTS = (b"/9j/", b"iVBORw0KGgo")  # of the same
_DATA_URI_START = b"data:image/"
_IMAGE_NAMES = ("image", "imagebase64", "data")
_FOCAL_NAME = "focal_px"
_WHITESPACE = b" \t\r\n"
_LOOKED_AT_BYTES = 64


class PayloadKind(StrEnum):
    """How an image travels."""

    IMAGE = "image"
    BASE64 = "base64"
    DATA_URI = "data URI"
    JSON = "JSON"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What a message holds beside the image."""

    sender_time_s: float | None = None  # capture time on the sender's clock
    position: Position | None = None
    focal_px: float | None = None  # of the image as sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwrapped:
    """The bytes of an encoded image and what came with it."""

    image: bytes
    metadata: Metadata


def kind_of(payload: bytes) -> PayloadKind | None:
    """How a payload carries an image, by its first bytes; None when it carries none."""
    if payload.startswith(_IMAGE_STARTS):
        return PayloadKind.IMAGE
    start = payload[:_LOOKED_AT_BYTES].lstrip(_WHITESPACE)
    if start.startswith(_BASE64_STARTS):
        return PayloadKind.BASE64
    if start[: len(_DATA_URI_START)].lower() == _DATA_URI_START:
        return PayloadKind.DATA_URI
    return PayloadKind.JSON if start.startswith(b"{") else None


def unwrap(payload: bytes, properties: Properties) -> Unwrapped | str:
    """The image in a payload, or in words why there is none.

    What a JSON object holds wins over user properties of the same names.
    """
    kind = kind_of(payload)
    metadata = _metadata(properties)
    match kind:
        case None:
            return "neither an image nor base64 nor JSON" if payload else "empty"
        case PayloadKind.IMAGE:
            return Unwrapped(image=payload, metadata=metadata)
        case PayloadKind.BASE64 | PayloadKind.DATA_URI:
            image = _from_text(payload)
        case PayloadKind.JSON:
            record = read_json(payload)
            if record is None:
                return "no valid JSON object"
            metadata = _metadata({**properties, **record})
            text = _image_text(record)
            if text is None:
                return f"JSON without a text under {', '.join(_IMAGE_NAMES)}"
            image = _from_text(text)
    if image is None:
        return f"{kind} that holds no JPEG or PNG"
    return Unwrapped(image=image, metadata=metadata)


def _metadata(record: Mapping[str, object]) -> Metadata:
    focal_px = read_number(record, _FOCAL_NAME)
    return Metadata(
        sender_time_s=read_time(record),
        position=read_position(record),
        focal_px=focal_px if focal_px is not None and focal_px > 0.0 else None,
    )


def _image_text(record: Mapping[str, object]) -> bytes | None:
    """The text of an object that is an image: by its name, else by how it begins."""
    texts = (record.get(name) for name in _IMAGE_NAMES)
    named = next((text for text in texts if isinstance(text, str)), None)
    values = itertools.islice(record.values(), MAX_KEYS)
    starts = (text for text in values if isinstance(text, str) and _is_image_text(text))
    found = next(starts, None) if named is None else named
    return None if found is None else found.encode(errors="replace")


def _is_image_text(text: str) -> bool:
    start = text[:_LOOKED_AT_BYTES].encode(errors="replace")
    return kind_of(start) in {PayloadKind.BASE64, PayloadKind.DATA_URI}


def _from_text(text: bytes) -> bytes | None:
    """The image in base64 text or a data URI; None when the text is neither."""
    if kind_of(text) is PayloadKind.DATA_URI:
        head, comma, text = text.partition(b",")
        if not comma or not head.rstrip().lower().endswith(b";base64"):
            return None
    compact = text.translate(None, delete=_WHITESPACE).rstrip(b"=")
    try:
        image = base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error:
        return None
    return image if image.startswith(_IMAGE_STARTS) else None
