"""Images of a texture that is known everywhere, so that any view of it is exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.types import Features, Float64Array, Frame, FrameId, Uint8Array

_NUM_WAVES = 80
_SHORTEST_WAVE_PX, _LONGEST_WAVE_PX = 9.0, 60.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texture:
    """A sum of plane waves over the image plane."""

    frequencies: Float64Array  # (W, 2) radians per px
    phases: Float64Array  # (W,)

    def image(self, width: int, height: int, *, image_from_texture: Float64Array) -> Uint8Array:
        """An RGB view of the texture.

        Args:
            width: px.
            height: px.
            image_from_texture: (2, 3) affine map of COLMAP pixel coordinates.
        """
        linear = np.linalg.inv(image_from_texture[:, :2])
        frequencies = self.frequencies @ linear
        phases = self.phases - frequencies @ image_from_texture[:, 2]
        # cos(a + b) as a product of matrices instead of one cosine for each pixel and wave.
        along_x = frequencies[:, :1] * (np.arange(width) + 0.5) + phases[:, None]
        along_y = frequencies[:, 1:] * (np.arange(height) + 0.5)
        waves = np.cos(along_y).T @ np.cos(along_x) - np.sin(along_y).T @ np.sin(along_x)
        contrast = 50.0 / np.sqrt(len(self.phases) / 2.0)
        grey = np.clip(np.rint(127.5 + contrast * waves), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)


def random_texture(seed: int = 0) -> Texture:
    """A texture that looks different everywhere and has structure of many sizes."""
    rng = np.random.default_rng((seed, 20))
    lengths = rng.uniform(np.log(_SHORTEST_WAVE_PX), np.log(_LONGEST_WAVE_PX), _NUM_WAVES)
    angles = rng.uniform(0.0, np.pi, _NUM_WAVES)
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    return Texture(
        frequencies=2.0 * np.pi / np.exp(lengths)[:, None] * directions,
        phases=rng.uniform(0.0, 2.0 * np.pi, _NUM_WAVES),
    )


def similarity_about(
    center_xy: tuple[float, float],
    *,
    scale: float = 1.0,
    angle_rad: float = 0.0,
    shift_xy: tuple[float, float] = (0.0, 0.0),
) -> Float64Array:
    """The map (2, 3) that turns and scales about a point, then shifts."""
    cosine, sine = scale * np.cos(angle_rad), scale * np.sin(angle_rad)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    center = np.array(center_xy)
    return np.column_stack([linear, center - linear @ center + shift_xy])


def transformed(points_xy: Float64Array, b_from_a: Float64Array) -> Float64Array:
    """Points (N, 2) under an affine map (2, 3)."""
    moved: Float64Array = points_xy @ b_from_a[:, :2].T + b_from_a[:, 2]
    return moved


def frame_of(
    pixels: Uint8Array,
    *,
    frame_id: int = 1,
    captured_at_s: float | None = None,
    camera_key: str = "camera",
) -> Frame:
    """A frame that shows ``pixels``."""
    return Frame(
        frame_id=FrameId(frame_id),
        camera_key=camera_key,
        source="synthetic",
        index=frame_id - 1,
        name=f"{frame_id:06d}.jpg",
        captured_at_s=frame_id / 30.0 if captured_at_s is None else captured_at_s,
        received_at_s=float(frame_id),
        pixels=pixels,
    )


def features_at(keypoints_xy: Float64Array, *, frame_id: int = 1) -> Features:
    """Features that are nothing but places."""
    num = len(keypoints_xy)
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=keypoints_xy,
        descriptors=np.zeros((num, 128), np.uint8),
        scales=np.ones(num, np.float32),
        colors=np.zeros((num, 3), np.uint8),
    )
