"""Points of the map in messages: chunks of the newest snapshot's points, each a PLY file.

A chunk is binary little-endian PLY with ``x y z`` as float and ``red green blue`` as uchar, which
any reader of PLY takes; its comments say which chunk of how many it is, and of which world.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from adapters.mqtt.telemetry import read_json, read_number
from engine.model_files import ModelFileError, read_points
from engine.regular_files import read_regular_file
from engine.types import Float64Array, Uint8Array

_POINTS_PER_CHUNK = 8_000  # 15 bytes each: below 128 kB, the limit of some brokers
_MAX_REQUEST_BYTES = 1_024
_MAX_ID_CHARS = 64
_MAX_RECORD_BYTES = 2**28
_VERTEX: DTypeLike = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PointsRequest:
    """What somebody asked for."""

    request_id: str = ""  # given back with each chunk
    max_points: int | None = None  # None: as many as are sent at most


def read_request(payload: bytes) -> PointsRequest | None:
    """A request: nothing, or a JSON object with ``id`` and ``max_points``; None: neither."""
    if not payload.strip():
        return PointsRequest()
    record = read_json(payload) if len(payload) <= _MAX_REQUEST_BYTES else None
    if record is None:
        return None
    request_id = str(record.get("id", ""))[:_MAX_ID_CHARS]
    number = read_number(record, "max_points")
    if not request_id.isprintable() or (number is not None and number < 1.0):
        return None
    return PointsRequest(
        request_id=request_id, max_points=None if number is None else int(min(number, 1e9))
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapPoints:
    """Points of a snapshot, and what is said of them."""

    positions: Float64Array  # (P, 3)
    colors: Uint8Array  # (P, 3) RGB
    comments: tuple[str, ...]

    @property
    def num_chunks(self) -> int:
        """How many messages they take; one at least."""
        return max(1, -(-len(self.positions) // _POINTS_PER_CHUNK))

    def chunks(self) -> Iterator[bytes]:
        """The messages."""
        for number in range(self.num_chunks):
            rows = slice(number * _POINTS_PER_CHUNK, (number + 1) * _POINTS_PER_CHUNK)
            vertices = np.zeros(len(self.positions[rows]), _VERTEX)
            vertices["xyz"], vertices["rgb"] = self.positions[rows], self.colors[rows]
            yield self._head(number, len(vertices)).encode() + vertices.tobytes()

    def _head(self, number: int, num_vertices: int) -> str:
        comments = (f"chunk {number + 1} of {self.num_chunks}", *self.comments)
        return "\n".join(
            [
                "ply",
                "format binary_little_endian 1.0",
                *(f"comment {text}" for text in comments),
                f"element vertex {num_vertices}",
                *(f"property float {axis}" for axis in "xyz"),
                *(f"property uchar {color}" for color in ("red", "green", "blue")),
                "end_header\n",
            ]
        )


def read_map_points(snapshot: Path, request: PointsRequest, *, max_points: int) -> MapPoints | str:
    """The points of a snapshot's first map, or in words why there are none. Blocking.

    Of more than are sent, so many spread evenly over all.
    """
    try:
        data = read_regular_file(snapshot / "snapshot.json", max_bytes=_MAX_RECORD_BYTES)
        record: dict[str, Any] = json.loads(data)
        positions, colors = read_points(snapshot / "sparse" / "0" / "points3D.bin")
        world = _world_comments(record)
    except (OSError, ModelFileError, ValueError, KeyError, IndexError, TypeError) as error:
        return f"the newest snapshot cannot be read: {type(error).__name__}"
    num_all = len(positions)
    num = min(num_all, max_points, request.max_points or max_points)
    rows = np.linspace(0, max(num_all - 1, 0), num).astype(np.int64)
    comments = [f"snapshot {record['sequence']}", f"points {num} of {num_all}", *world]
    if request.request_id:
        comments.append(f"request {request.request_id}")
    return MapPoints(positions=positions[rows], colors=colors[rows], comments=tuple(comments))


def _world_comments(record: dict[str, Any]) -> list[str]:
    """Where the points are, and how the poses of the other topics come there."""
    georeference = record.get("georeference")
    similarity = record["maps"][0].get("enu_from_map") if record.get("maps") else None
    if georeference is None:
        comments = ["world of the map"]
    else:
        origin = georeference["origin"]
        height = origin["altitude_m"] or 0.0
        place = f"{origin['latitude_deg']!r} {origin['longitude_deg']!r} {height!r}"
        comments = [f"world east north up in metres of latitude longitude altitude {place}"]
    if similarity is not None:
        numbers = " ".join(repr(float(x)) for x in np.array(similarity).ravel())
        comments.append(f"enu_from_map {numbers}")
    return comments
