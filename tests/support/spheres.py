"""Spherical images of smooth noise, and the noise by directions."""

from __future__ import annotations

import numpy as np

from engine.types import Float64Array, Uint8Array

SPHERE_HEIGHT = 240


def smooth_noise(directions: Float64Array, *, seed: int) -> Float64Array:
    """Texture of all sizes on the sphere, (..., 3) in 0..255, of directions (..., 3)."""
    rng = np.random.default_rng(seed)
    values = np.zeros((*directions.shape[:-1], 3))
    for scale in (1.0, 2.0, 4.0, 9.0, 20.0):
        for _ in range(6):
            waves = rng.normal(size=(3, 3)) * scale
            values += np.cos(directions @ waves + rng.uniform(0, 6.28, 3)) / np.sqrt(scale)
    scaled = 128.0 + 40.0 * values / values.std()
    return np.asarray(np.clip(scaled, 0, 255))


def sphere(*, seed: int = 0, noise: float = 0.0, height: int = SPHERE_HEIGHT) -> Uint8Array:
    """An equirectangular image."""
    width = 2 * height
    longitude, latitude = np.meshgrid(
        (np.arange(width) + 0.5) / width * 2 * np.pi, (np.arange(height) + 0.5) / height * np.pi
    )
    directions = np.stack(
        [np.sin(latitude) * np.cos(longitude), np.sin(latitude) * np.sin(longitude)]
        + [np.cos(latitude)],
        axis=-1,
    )
    pixels = smooth_noise(directions, seed=seed)
    pixels += np.random.default_rng(seed).normal(scale=noise, size=pixels.shape)
    return np.asarray(np.clip(pixels, 0, 255).astype(np.uint8))
