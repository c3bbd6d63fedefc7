"""Pictures inside the page: small copies of products and keyframes as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from adapters.exports.dense_ply import read_dense_ply_header, similarity_onto
from adapters.report import svg
from engine.geometry import transform_points
from engine.regular_files import regular_file_size
from engine.types import BoolArray, Float32Array, Float64Array, Uint8Array

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from adapters.report.map_figures import MapFigures

_EDGE_PX = 1000  # of a picture
_QUALITY = 78
_MAX_PIXELS = 80_000_000  # of a raster that is decoded
_MAX_FILE_BYTES = 2**32
_PIXEL_SCALE, _GEO_KEYS = 33550, 34735  # GeoTIFF's tags (OGC 19-008r4, 7.1.2)
_PROJECTED_CRS = 3072  # its key of an EPSG code
_EPSG_CODES = range(1024, 32767)  # what that key may hold but for private codes
_NO_HEIGHT = -9999.0
_DENSE_EDGE_PX = 640
_MAX_DENSE_POINTS = 1_500_000  # that are drawn
_DENSE_BYTES = 27  # of a vertex
_SPLAT_PX = 1.6
_SUN_AZIMUTH, _SUN_HEIGHT = math.radians(315.0), math.radians(45.0)
_LOW, _MIDDLE, _HIGH = (62, 96, 138), (181, 190, 150), (226, 186, 140)  # colours of heights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Raster:
    """A product seen from above, made small."""

    values: Uint8Array | Float32Array  # (H, W, 4) RGBA, or (H, W) heights, NaN where unknown
    cell: float | None  # edge of a pixel of the file, m or map units; None: it does not say
    shown_cell: float | None  # of a pixel here
    size: tuple[int, int]  # of the file, px
    name: str  # of the file
    epsg: int | None  # the CRS of the file; None: it has none


def data_uri(pixels: Uint8Array, *, is_drawing: bool = False) -> str:
    """A picture (H, W, 3 or 4) as a data URI: WebP, or PNG where each pixel counts."""
    from PIL import Image

    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    if is_drawing:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=_QUALITY, method=2)
    kind = "png" if is_drawing else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_element(pixels: Uint8Array, *, label: str) -> Markup:
    """A picture as an HTML element; ``label`` says what it shows to those who do not see it."""
    height, width = pixels.shape[:2]
    return Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(
        data_uri(pixels), width, height, label
    )


def raster_element(
    pixels: Uint8Array, *, shown_cell: float | None, unit: str, label: str
) -> Markup:
    """A picture seen from above, with a scale bar below it where its cells have a size."""
    height, width = pixels.shape[:2]
    scale = 360.0 / width
    parts = [
        svg.element("image", href=data_uri(pixels), x=0, y=0, width=360, height=height * scale)
    ]
    base = height * scale
    if shown_cell is not None:
        base += 26.0
        parts.append(scale_bar(8.0, base - 8.0, units_per_length=shown_cell / scale, unit=unit))
    return svg.drawing(*parts, width=360, height=base, label=label)


def scale_bar(x: float, y: float, *, units_per_length: float, unit: str) -> Markup:
    """A bar of a round length, about a quarter of the drawing's width, with its length above."""
    length = svg.round_number(45.0 * units_per_length)
    across = length / units_per_length
    words = f"{length:g} {unit}" if length != 1 else f"1 {unit.removesuffix('s')}"
    d = f"M{x:.1f} {y - 4:.1f}V{y:.1f}H{x + across:.1f}V{y - 4:.1f}"
    bar = svg.element("path", d=d, class_="scale")
    return svg.element("g", bar, svg.text(x + across + 6, y + 1, words, class_="ink"))


def read_raster(stem: Path) -> Raster | None:
    """A small copy of a product, GeoTIFF or PNG; None: there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than a report can show, or damaged.
    """
    path = next(
        (one for suffix in (".tif", ".png") if (one := stem.with_suffix(suffix)).exists()), None
    )
    if path is None:
        return None
    from PIL import Image

    regular_file_size(path)  # refuses what is no file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=("TIFF", "PNG")) as image:
                return _small(image, path.name)
        except (Image.DecompressionBombError, SyntaxError) as error:
            raise ValueError(f"{path.name}: {error}") from error


def _small(image: PILImage.Image, name: str) -> Raster:
    width, height = size = image.size
    cell, epsg, lowest, step = _cell_of(image), _epsg_of(image), 0.0, 1.0
    if heights := re.search(
        r"height = (\S+) \+ (\S+) \* value", str(image.info.get("Heights", ""))
    ):
        lowest, step = float(heights[1]), float(heights[2])
    _seek_overview(image)
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{width} x {height} px are too many to show here")
    shrink = max(1, math.ceil(max(image.size) / _EDGE_PX))
    is_color = image.mode in ("RGBA", "RGB", "P", "LA")
    values = np.asarray(image.convert("RGBA") if is_color else image)
    shown_cell = None if cell is None else cell * width / image.width * shrink
    if is_color:
        return Raster(
            values=_shrunk_rgba(values, shrink),
            cell=cell,
            shown_cell=shown_cell,
            size=size,
            name=name,
            epsg=epsg,
        )
    known = values > (_NO_HEIGHT if image.mode == "F" else 0)
    metres = np.where(known, lowest + step * values.astype(np.float64), np.nan)
    return Raster(
        values=_shrunk_heights(metres, shrink).astype(np.float32),
        cell=cell,
        shown_cell=shown_cell,
        size=size,
        name=name,
        epsg=epsg,
    )


def _cell_of(image: PILImage.Image) -> float | None:
    """The edge of a pixel, by GeoTIFF's tag or the world file that a PNG holds as text."""
    scale = getattr(image, "tag_v2", {}).get(_PIXEL_SCALE)
    words = str(image.info.get("World file", "")).split()
    try:
        cell = float(scale[0]) if scale else float(words[0]) if words else math.nan
    except (IndexError, TypeError, ValueError):
        return None
    return cell if math.isfinite(cell) and cell > 0.0 else None


def _epsg_of(image: PILImage.Image) -> int | None:
    """The projected CRS that a GeoTIFF names; entries of its keys: key, tag, count, value."""
    numbers = getattr(image, "tag_v2", {}).get(_GEO_KEYS, ())
    if not isinstance(numbers, tuple):
        return None
    for key, tag, _, value in zip(*(numbers[i::4] for i in range(4)), strict=False):
        if key == _PROJECTED_CRS and tag == 0 and value in _EPSG_CODES:
            return int(value)
    return None


def _seek_overview(image: PILImage.Image) -> None:
    """Goes to the smallest overview of a TIFF that is still large enough."""
    best, area = 0, image.width * image.height
    for page in range(min(getattr(image, "n_frames", 1), 16)):
        image.seek(page)
        if max(image.size) >= _EDGE_PX and image.width * image.height < area:
            best, area = page, image.width * image.height
    image.seek(best)


def _blocks(values: Float64Array, shrink: int) -> Float64Array:
    """Blocks of ``shrink`` x ``shrink`` pixels (H, W, shrink * shrink, ...)."""
    height, width = (length // shrink * shrink for length in values.shape[:2])
    rest = values.shape[2:]
    cut = values[:height, :width].reshape(height // shrink, shrink, width // shrink, shrink, *rest)
    moved = np.moveaxis(cut, 1, 2)
    return np.asarray(moved.reshape(height // shrink, width // shrink, -1, *rest))


def _shrunk_rgba(rgba: Uint8Array, shrink: int) -> Uint8Array:
    if shrink == 1:
        return rgba
    blocks = _blocks(rgba.astype(np.float32), shrink)
    alpha = blocks[..., 3:]
    total = alpha.sum(axis=2)
    color = (blocks[..., :3] * alpha).sum(axis=2) / np.maximum(total, 1e-6)
    shrunk: Uint8Array = np.rint(np.concatenate([color, alpha.mean(axis=2)], axis=2)).astype(
        np.uint8
    )
    return shrunk


def _shrunk_heights(heights: Float64Array, shrink: int) -> Float64Array:
    if shrink == 1:
        return heights
    blocks = _blocks(heights, shrink)
    known = np.isfinite(blocks)
    total = np.where(known, blocks, 0.0).sum(axis=2)
    num = known.sum(axis=2)
    return np.where(num > 0, total / np.maximum(num, 1), np.nan)


def hillshade(heights: Float32Array, cell: float) -> tuple[Uint8Array, float, float]:
    """Heights as a picture (H, W, 4) lit from the north-west, and its lowest and highest height.

    Colours go from the 2nd to the 98th percentile. Shading: Horn, "Hill shading and the reflectance
    map", 1981.
    """
    known: BoolArray = np.isfinite(heights)
    if not known.any():
        raise ValueError("it holds no height")
    low, high = np.percentile(heights[known], [2.0, 98.0]).tolist()
    filled = np.where(known, heights, low)
    down, right = np.gradient(filled.astype(np.float64), cell)
    slope, aspect = np.arctan(np.hypot(right, down)), np.arctan2(-right, down)
    light = np.sin(_SUN_HEIGHT) * np.cos(slope)
    light += np.cos(_SUN_HEIGHT) * np.sin(slope) * np.cos(_SUN_AZIMUTH - aspect)
    share = np.clip((filled - low) / max(high - low, 1e-9), 0.0, 1.0)
    stops = np.array([_LOW, _MIDDLE, _HIGH], np.float64)
    color = np.stack([np.interp(share, [0.0, 0.5, 1.0], stops[:, i]) for i in range(3)], axis=-1)
    shaded = color * (0.45 + 0.75 * np.clip(light, 0.0, 1.0))[..., None]
    rgba = np.concatenate([np.clip(shaded, 0, 255), 255.0 * known[..., None]], axis=-1)
    return rgba.astype(np.uint8), low, high


def read_keyframe_image(path: Path) -> Uint8Array | None:
    """A keyframe's image (H, W, 3), made small; None: it cannot be read."""
    from PIL import Image

    try:
        if regular_file_size(path) > _MAX_FILE_BYTES:
            return None
        with Image.open(path) as image:
            image.draft("RGB", (_DENSE_EDGE_PX, _DENSE_EDGE_PX))
            if image.width * image.height > _MAX_PIXELS:
                return None
            small = image.convert("RGB")
            small.thumbnail((_DENSE_EDGE_PX, _DENSE_EDGE_PX))
            return np.asarray(small)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def dense_view(path: Path, figures: MapFigures, frame_id: int) -> Uint8Array | None:
    """Dense points as a keyframe sees them, (H, W, 4); None: they are of another world.

    Args:
        path: a run's ``dense.ply``.
        figures: the map.
        frame_id: a keyframe of it whose camera has a pinhole.

    Raises:
        OSError: the points cannot be read.
        ValueError: they are not those of a run, or the camera has no pinhole.
    """
    pinhole, (width, height) = figures.pinholes[frame_id], figures.sizes[frame_id]
    if not len(pinhole):
        raise ValueError("the camera has no pinhole")
    regular_file_size(path)
    header = read_dense_ply_header(path)
    poses = dict(zip(figures.frame_ids.tolist(), figures.cam_from_world, strict=True))
    onto = similarity_onto(header, poses)
    if onto is None or not header.num_points:
        return None
    step = max(1, -(-header.num_points // _MAX_DENSE_POINTS))
    rows = np.memmap(path, np.uint8, "r", header.num_bytes)[: header.num_points * _DENSE_BYTES]
    rows = np.array(rows.reshape(-1, _DENSE_BYTES)[::step])
    xyz = rows[:, :12].copy().view("<f4").astype(np.float64)
    in_cam = transform_points(poses[frame_id], transform_points(onto, xyz))
    scale = _DENSE_EDGE_PX / max(width, height)
    return _splatted(
        in_cam,
        rows[:, 24:],
        pinhole=pinhole * scale,
        size=(max(1, round(width * scale)), max(1, round(height * scale))),
    )


def _splatted(
    in_cam: Float64Array, colors: Uint8Array, *, pinhole: Float64Array, size: tuple[int, int]
) -> Uint8Array:
    """Points (N, 3) in a camera's frame as a picture: nearer ones hide those behind them."""
    width, height = size
    is_ahead = in_cam[:, 2] > 1e-9
    points, colors = in_cam[is_ahead], colors[is_ahead]
    x, y = (points[:, :2] / points[:, 2:] * pinhole[:2] + pinhole[2:]).T
    inside = (x > -2) & (x < width + 2) & (y > -2) & (y < height + 2)
    far_first = np.argsort(-points[inside, 2], kind="stable")
    x, y, shown = x[inside][far_first], y[inside][far_first], colors[inside][far_first]
    depth = points[inside, 2][far_first]
    picture, nearest = np.zeros((height, width, 4), np.uint8), np.full((height, width), np.inf)
    reach = np.arange(-math.floor(_SPLAT_PX), math.floor(_SPLAT_PX) + 1)
    for dy in reach:
        for dx in reach:
            column, row = (x + dx).astype(np.int64), (y + dy).astype(np.int64)
            ok = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            ok[ok] = depth[ok] <= nearest[row[ok], column[ok]]
            nearest[row[ok], column[ok]] = depth[ok]
            picture[row[ok], column[ok], :3] = shown[ok]
            picture[row[ok], column[ok], 3] = 255
    return picture
