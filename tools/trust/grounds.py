"""A survey flight in lines over flat ground, looking straight down, with exact truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engine.geometry import quat_xyzw_from_rotation, rotation_from_vector
from engine.types import Float64Array, Uint8Array
from trust.inputs import ExifTags, Input, Kit, Maker, write_jpeg

SIZE = (960, 720)  # px
NUM_LINES, NUM_IN_LINE = 6, 8
OVERLAP_RATIO = 0.6  # along the lines and across
PIXEL_M = 0.05  # of an image, on the ground
TEXEL_M = 0.04
MARGIN_M = 8.0  # of the texture around what a camera sees without jitter
SENSOR_MM = 13.2  # width
EXIF_ERROR_RATIO = 0.02
_NOISE_SIGMA = 1.5  # grey levels
_FEWER_KEYPOINTS = ("--set", "sift.max_features=2000")  # there is detail everywhere
_OCTAVES = ((6, 0.3), (40, 0.25), (220, 0.25), (1100, 0.2))  # cells an edge, weight
_NUM_SHAPES = 4000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Photo:
    """A pose over the ground, which lies at z = 0; z is up."""

    world_from_cam: Float64Array  # (3, 3)
    center: Float64Array  # (3,) m


def survey(*, focal_px: float, jitter_deg: float, seed: int) -> Iterator[Photo]:
    """The photos in their order; the nose is forward, so that every other line is turned."""
    rng = np.random.default_rng(seed)
    step_x, step_y = (edge * PIXEL_M * (1 - OVERLAP_RATIO) for edge in SIZE)
    for line in range(NUM_LINES):
        for number in range(NUM_IN_LINE):
            is_back = line % 2 == 1
            along = NUM_IN_LINE - 1 - number if is_back else number
            turn = np.pi if is_back else 0.0
            jitter = rotation_from_vector(np.radians(rng.normal(scale=jitter_deg, size=3)))
            cos, sin = np.cos(turn), np.sin(turn)
            down = np.array([[cos, sin, 0], [sin, -cos, 0], [0, 0, -1.0]])
            yield Photo(
                world_from_cam=down @ jitter,
                center=np.array([line * step_x, along * step_y, focal_px * PIXEL_M]),
            )


def ground_texture(seed: int) -> Uint8Array:
    """Detail of all sizes on the ground that the survey sees, (H, W, 3)."""
    import cv2

    rng = np.random.default_rng(seed)
    step_x, step_y = (edge * PIXEL_M * (1 - OVERLAP_RATIO) for edge in SIZE)
    edges_m = (
        (NUM_LINES - 1) * step_x + SIZE[0] * PIXEL_M + 2 * MARGIN_M,
        (NUM_IN_LINE - 1) * step_y + SIZE[1] * PIXEL_M + 2 * MARGIN_M,
    )
    width, height = (round(edge / TEXEL_M) for edge in edges_m)
    image = np.zeros((height, width, 3), np.float32)
    for cells, weight in _OCTAVES:
        noise = rng.random((cells, cells, 3), dtype=np.float32)
        image += weight * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    texture = np.clip(image * 255, 0, 255).astype(np.uint8)
    for _ in range(_NUM_SHAPES):
        corner = rng.integers(0, (width, height))
        size = rng.integers(4, 60, 2)
        color = tuple(int(value) for value in rng.integers(20, 236, 3))
        thickness = -1 if rng.random() < 0.6 else 2
        cv2.rectangle(
            texture, corner.tolist(), (corner + size).tolist(), color, thickness=thickness
        )
    return texture


def ground_seen(texture: Uint8Array, photo: Photo, *, focal_px: float) -> Uint8Array:
    """The image of a photo without noise, (H, W, 3)."""
    import cv2

    width, height = SIZE
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    rays = np.stack([x / focal_px, y / focal_px, np.ones_like(x)], axis=-1)
    in_world = rays @ photo.world_from_cam.T
    distance = -photo.center[2] / in_world[..., 2]
    low_x, low_y = (-edge * PIXEL_M / 2 - MARGIN_M for edge in SIZE)
    column = (photo.center[0] + distance * in_world[..., 0] - low_x) / TEXEL_M - 0.5
    row = (photo.center[1] + distance * in_world[..., 1] - low_y) / TEXEL_M - 0.5
    return np.asarray(
        cv2.remap(
            texture,
            column.astype(np.float32),
            row.astype(np.float32),
            interpolation=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        ),
        dtype=np.uint8,
    )


def nadir_survey(*, has_exif: bool = False, is_given: bool = False) -> Maker:
    """A maker of the survey; the focal length is unknown, in EXIF, or given on the command line."""
    return partial(_make, has_exif=has_exif, is_given=is_given)


def _make(kit: Kit, folder: Path, *, has_exif: bool, is_given: bool) -> Input:
    variation = kit.variation
    focal_px = variation.ground_focal_ratio * SIZE[0]
    texture = ground_texture(variation.ground_seed)
    rng = np.random.default_rng(variation.ground_seed)
    exif = _exif(focal_px) if has_exif else None
    lines = []
    photos = survey(
        focal_px=focal_px, jitter_deg=variation.ground_jitter_deg, seed=variation.ground_seed
    )
    for number, photo in enumerate(photos):
        clean = ground_seen(texture, photo, focal_px=focal_px)
        noisy = np.round(clean + rng.normal(scale=_NOISE_SIGMA, size=clean.shape))
        pixels = np.clip(noisy, 0, 255).astype(np.uint8)
        write_jpeg(folder / "images" / f"{number:03d}.jpg", pixels, exif=exif)
        values = (*photo.center, *quat_xyzw_from_rotation(photo.world_from_cam))
        lines.append(f"{number} {' '.join(f'{value:.9g}' for value in values)}\n")
    (folder / "truth.txt").write_text("".join(lines), encoding="utf-8")
    given = ("--set", f"cameras.focal_px={focal_px:g}") if is_given else ()
    return Input(
        source="images",
        arguments=("--config", "drone", *_FEWER_KEYPOINTS, *given),
        truth="truth.txt",
        focal_px=focal_px,
    )


def _exif(focal_px: float) -> ExifTags:
    """Focal length in tenths of a millimetre, as cameras write it, too long by a little."""
    focal_mm = focal_px / SIZE[0] * SENSOR_MM * (1 + EXIF_ERROR_RATIO)
    return ExifTags(
        make="Survey",
        model="S1",
        focal_length_mm=round(focal_mm, 1),
        focal_plane_px_per_cm=round(SIZE[0] / SENSOR_MM * 10, 3),
    )
