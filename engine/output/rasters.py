"""Images and heights of the ground as files, each replaced in one step.

In a UTM grid they are cloud-optimised GeoTIFFs (rasterio, of the extra ``survey``); in any other
frame, and without the extra, PNG with a world file. What is beside a PNG is in it, too, as text:
files beside it are taken away before it is replaced and written after it, so that nobody reads
them with another image. What there was of the other kind goes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.dense.surface import GroundGrid
from engine.output.files import (
    TEMPORARY_PREFIX,
    flush_to_disk,
    write_atomically,
    written_atomically,
)
from engine.types import Float32Array, Float64Array, GpsFix, Uint8Array

if TYPE_CHECKING:
    from engine.geo.utm import UtmGrid

_NO_HEIGHT = -9999.0
_BLOCK_PX = 256
_PNG_HEIGHT_STEPS = 65535
_BEHIND_IHDR = 33  # bytes of a PNG: its signature, and the chunk that comes first
_SIDE_SUFFIXES = (".pgw", ".txt")  # of files beside a PNG


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterPlace:
    """Where a raster lies: its grid, and about which origin that is, if any."""

    grid: GroundGrid
    utm: UtmGrid | None  # about whose origin it lies
    origin: GpsFix | None = None  # None: the grid is in units of the map
    description: str = ""  # kept in the file, such as the verdict on the map

    @property
    def words(self) -> str:
        """What the coordinates of the grid are."""
        if self.utm is not None:
            return f"easting and northing, m, EPSG:{self.utm.epsg}"
        if self.origin is None:
            return "units of the map, in a plane along its ground"
        latitude, longitude = self.origin.latitude_deg, self.origin.longitude_deg
        return f"m east and north of latitude {latitude:.8f}, longitude {longitude:.8f}"

    @property
    def height_words(self) -> str:
        """What heights are above."""
        if self.origin is None and self.utm is None:
            return "units of the map, above a plane along its ground"
        if self.origin is None or self.origin.altitude_m is None:
            return "m above the origin, whose altitude is unknown"
        if self.utm is None:
            return f"m above a plane through the origin, at altitude {self.origin.altitude_m:.3f}"
        return "m above the ellipsoid, as far as altitudes of positions are"


def write_orthophoto(stem: Path, rgba: Uint8Array, place: RasterPlace) -> Path:
    """Writes an orthophoto (H, W, 4), whose alpha is 0 where nothing is shown.

    Args:
        stem: the path without its suffix, in a folder that exists.
        rgba: RGBA, the first line in the north.
        place: of it.

    Returns:
        The path of the file.

    Raises:
        OSError: it cannot be written; the former image is untouched.
        ImportError: it lies in a UTM grid and rasterio is not installed.
    """
    if place.utm is None:
        return _write_png(stem, rgba[:, :, [2, 1, 0, 3]], place)
    bands = np.moveaxis(rgba, 2, 0)
    return _write_geotiff(stem.with_suffix(".tif"), bands, place, place.utm)


def write_heights(stem: Path, heights: Float32Array, place: RasterPlace) -> Path:
    """Writes heights (H, W), NaN where unknown: in a UTM grid above the ellipsoid.

    Where the altitude of the origin is unknown they are above that, less the ellipsoid's curvature.

    A PNG has 16 bits from the lowest to the highest, 0 where unknown; its text says what they are.

    Args:
        stem: the path without its suffix, in a folder that exists.
        heights: in the ground's frame, the first line in the north.
        place: of them.

    Returns:
        The path of the file.

    Raises:
        OSError: it cannot be written; the former image is untouched.
        ImportError: it lies in a UTM grid and rasterio is not installed.
    """
    if place.utm is None:
        return _write_height_png(stem, heights, place)
    x, y = place.grid.centers()
    drop = place.utm.drop_m(*np.meshgrid(x, y))
    above = np.where(np.isnan(heights), _NO_HEIGHT, heights + place.utm.origin[2] + drop)
    bands = above.astype(np.float32)[None]
    path = stem.with_suffix(".tif")
    words = "; ".join(one for one in (place.description, f"heights: {place.height_words}") if one)
    described = replace(place, description=words)
    return _write_geotiff(path, bands, described, place.utm, nodata=_NO_HEIGHT)


def remove_raster(stem: Path) -> None:
    """Removes a raster of either kind, if there is one, and what is beside it."""
    for suffix in (".tif", ".png", *_SIDE_SUFFIXES):
        stem.with_suffix(suffix).unlink(missing_ok=True)


def _write_geotiff(
    path: Path,
    bands: NDArray[Any],
    place: RasterPlace,
    utm: UtmGrid,
    *,
    nodata: float | None = None,
) -> Path:
    import rasterio
    from rasterio.enums import ColorInterp
    from rasterio.transform import Affine

    grid = place.grid
    left, _, _, upper = grid.bounds
    profile = {
        "driver": "COG",
        "width": grid.num_columns,
        "height": grid.num_lines,
        "count": len(bands),
        "dtype": bands.dtype.name,
        "crs": f"EPSG:{utm.epsg}",
        "transform": Affine(
            grid.cell, 0.0, utm.origin[0] + left, 0.0, -grid.cell, utm.origin[1] + upper
        ),
        "nodata": nodata,
        "compress": "DEFLATE",
        "level": 1,  # of 9: an orthophoto is written at every snapshot, and hardly gets smaller
        "predictor": "YES",
        "blocksize": _BLOCK_PX,
        "bigtiff": "IF_SAFER",
    }
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        with rasterio.open(temporary, "w", **profile) as raster:
            if len(bands) == 4:
                raster.colorinterp = [
                    ColorInterp.red,
                    ColorInterp.green,
                    ColorInterp.blue,
                    ColorInterp.alpha,
                ]
            raster.update_tags(TIFFTAG_IMAGEDESCRIPTION=place.description)
            raster.write(bands)
        flush_to_disk(temporary)
        temporary.replace(path)
    except _gdal_errors() as error:
        raise OSError(None, f"{error}") from error
    finally:
        for leftover in path.parent.glob(f"{temporary.name}*"):
            leftover.unlink(missing_ok=True)
    for suffix in (".png", *_SIDE_SUFFIXES):
        path.with_suffix(suffix).unlink(missing_ok=True)
    return path


def _gdal_errors() -> tuple[type[Exception], ...]:
    """What rasterio raises: also GDAL's own errors, for which it has no public name."""
    from rasterio.errors import RasterioError

    try:
        from rasterio._err import CPLE_BaseError
    except ImportError:
        return (RasterioError,)
    return RasterioError, CPLE_BaseError


def _write_png(
    stem: Path,
    pixels: NDArray[Any],
    place: RasterPlace,
    *,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """A PNG, and beside it a world file: six lines that place its pixels; and texts, if any."""
    import cv2

    path, grid = stem.with_suffix(".png"), place.grid
    done, data = cv2.imencode(".png", pixels)
    if not done:
        raise OSError(None, "the image cannot be encoded as PNG")
    left, _, _, upper = grid.bounds
    rows: Float64Array = np.array(
        [grid.cell, 0.0, 0.0, -grid.cell, left + grid.cell / 2, upper - grid.cell / 2]
    )
    numbers = [f"{value:.12g}" for value in rows]
    about = {"Description": place.description, "Coordinates": place.words, **(texts or {})}
    with written_atomically(path) as file:
        file.write(_with_texts(data.tobytes(), {**about, "World file": " ".join(numbers)}))
        for suffix in _SIDE_SUFFIXES:
            stem.with_suffix(suffix).unlink(missing_ok=True)
    write_atomically(stem.with_suffix(".pgw"), "".join(f"{one}\n" for one in numbers).encode())
    if texts:
        lines = [*texts.values(), place.description, f"coordinates: {place.words}"]
        write_atomically(stem.with_suffix(".txt"), "".join(f"{one}\n" for one in lines).encode())
    stem.with_suffix(".tif").unlink(missing_ok=True)
    return path


def _with_texts(png: bytes, texts: Mapping[str, str]) -> bytes:
    """A PNG with texts (chunks tEXt, section 11.3.3.2 of its specification), by keyword."""
    chunks = []
    for keyword, text in texts.items():
        body = b"tEXt" + f"{keyword}\0{text}".encode("latin-1", "replace")
        chunks.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
    return png[:_BEHIND_IHDR] + b"".join(chunks) + png[_BEHIND_IHDR:]


def _write_height_png(stem: Path, heights: Float32Array, place: RasterPlace) -> Path:
    known = ~np.isnan(heights)
    lowest = float(heights[known].min()) if known.any() else 0.0
    highest = float(heights[known].max()) if known.any() else 0.0
    step = max(highest - lowest, 1e-9) / (_PNG_HEIGHT_STEPS - 1)
    steps = np.where(known, 1 + np.rint((heights - lowest) / step), 0).astype(np.uint16)
    formula = f"height = {lowest - step:.9g} + {step:.9g} * value, unknown where value is 0"
    texts = {"Heights": f"{formula}; {place.height_words}"}
    return _write_png(stem, steps, place, texts=texts)
