"""Reads a map of OpenSfM by the formulas of its documentation ("Geometric models")."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from engine.types import Float64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSfmMap:
    """The only reconstruction of a ``reconstruction.json``, and the files beside it."""

    record: dict[str, Any]
    reference: dict[str, float]  # latitude, longitude, altitude
    tracks: list[tuple[str, str, float, float]]  # shot, point, x, y


def read_opensfm(folder: Path) -> OpenSfmMap:
    """The files in a folder; fails where they are not as documented."""
    [record] = json.loads((folder / "reconstruction.json").read_text())
    reference = json.loads((folder / "reference_lla.json").read_text())
    assert set(reference) == {"latitude", "longitude", "altitude"}
    header, *lines = (folder / "tracks.csv").read_text().splitlines()
    assert header == "OPENSFM_TRACKS_VERSION_v1"
    tracks = []
    for line in lines:
        shot, point, feature, x, y, scale, *rgb = line.split("\t")
        assert int(feature) >= 0 and float(scale) > 0 and len(rgb) == 3
        assert all(0 <= int(value) <= 255 for value in rgb)
        tracks.append((shot, point, float(x), float(y)))
    return OpenSfmMap(record=record, reference=reference, tracks=tracks)


def center_of(shot: dict[str, Any]) -> Float64Array:
    """The origin of a shot's camera in the world."""
    rotation = cv2.Rodrigues(np.array(shot["rotation"]))[0]
    return np.asarray(-rotation.T @ np.array(shot["translation"]))


def project(shot: dict[str, Any], camera: dict[str, Any], points: Float64Array) -> Float64Array:
    """Where points (P, 3) of the world are in an image, normalised (P, 2)."""
    rotation = cv2.Rodrigues(np.array(shot["rotation"]))[0]
    x, y, z = rotation @ points.T + np.array(shot["translation"])[:, None]
    kind = camera["projection_type"]
    if kind == "spherical":
        longitude, latitude = np.arctan2(x, z), np.arctan2(-y, np.hypot(x, z))
        return np.column_stack([longitude, -latitude]) / (2 * np.pi)
    k1, k2, k3 = (camera[name] for name in ("k1", "k2", "k3"))
    if kind == "brown":
        u, v = x / z, y / z
        r2 = u**2 + v**2
        radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
        p1, p2 = camera["p1"], camera["p2"]
        bent_u = u * radial + 2 * p1 * u * v + p2 * (r2 + 2 * u**2)
        bent_v = v * radial + 2 * p2 * u * v + p1 * (r2 + 2 * v**2)
    else:
        assert kind == "fisheye_opencv"
        r = np.hypot(x, y)
        angle = np.arctan2(r, z)
        bent = angle * (1 + k1 * angle**2 + k2 * angle**4 + k3 * angle**6 + camera["k4"] * angle**8)
        bent_u, bent_v = bent * x / r, bent * y / r
    return np.column_stack(
        [camera["focal_x"] * bent_u + camera["c_x"], camera["focal_y"] * bent_v + camera["c_y"]]
    )
