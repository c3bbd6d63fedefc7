"""Reads ``bundle.out`` and ``list.txt`` by the manual of Bundler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.types import Float64Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BundlerCamera:
    """A camera: it looks along its negative z, y up."""

    image: str  # path, as in list.txt
    focal_px: float
    k1: float
    k2: float
    rotation: Float64Array  # (3, 3)
    translation: Float64Array  # (3,)

    @property
    def center(self) -> Float64Array:
        return np.asarray(-self.rotation.T @ self.translation)

    def project(self, point: Float64Array) -> Float64Array:
        """Pixels from the middle of the image, y up (2,)."""
        seen = self.rotation @ point + self.translation
        p = -seen[:2] / seen[2]
        r2 = float(p @ p)
        return np.asarray(self.focal_px * (1 + self.k1 * r2 + self.k2 * r2**2) * p)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BundlerPoint:
    """A point and its views: camera and place in its image."""

    xyz: Float64Array  # (3,)
    color: tuple[int, ...]
    views: list[tuple[int, Float64Array]]


def read_bundler(folder: Path) -> tuple[list[BundlerCamera], list[BundlerPoint]]:
    """The cameras and points of a folder; fails where it is not as the manual says."""
    images = [line.split() for line in (folder / "list.txt").read_text().splitlines()]
    lines = iter((folder / "bundle.out").read_text(encoding="ascii").splitlines())
    assert next(lines) == "# Bundle file v0.3"
    num_cameras, num_points = map(int, next(lines).split())
    assert len(images) == num_cameras
    cameras = []
    for image, zero, focal_px in images:
        assert zero == "0"
        f, k1, k2 = _numbers(next(lines))
        assert abs(f - float(focal_px)) < 1e-3
        rotation = np.array([_numbers(next(lines)) for _ in range(3)])
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        translation = np.array(_numbers(next(lines)))
        camera = BundlerCamera(
            image=image, focal_px=f, k1=k1, k2=k2, rotation=rotation, translation=translation
        )
        cameras.append(camera)
    points = []
    for _ in range(num_points):
        xyz = np.array(_numbers(next(lines)))
        color = tuple(int(word) for word in next(lines).split())
        count, *words = next(lines).split()
        assert len(words) == 4 * int(count)
        views = [
            (int(words[4 * n]), np.array([float(words[4 * n + 2]), float(words[4 * n + 3])]))
            for n in range(int(count))
        ]
        points.append(BundlerPoint(xyz=xyz, color=color, views=views))
    assert not list(lines)
    return cameras, points


def _numbers(line: str) -> list[float]:
    return [float(word) for word in line.split()]
