"""Images and heights of the ground as files, each replaced in one step.

In a UTM grid they are cloud-optimised GeoTIFFs (rasterio, of the extra ``survey``); in any other
frame, and without the extra, PNG with a world file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.dense.surface import GroundGrid
from engine.output.files import TEMPORARY_PREFIX, flush_to_disk, write_atomically
from engine.types import Float32Array, Float64Array, Uint8Array

if TYPE_CHECKING:
    from engine.geo.utm import UtmGrid

_NO_HEIGHT = -9999.0
_BLOCK_PX = 256
_PNG_HEIGHT_STEPS = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterPlace:
    """Where a raster lies: its grid, and the UTM grid about whose origin that is, if any."""

    grid: GroundGrid
    utm: UtmGrid | None
    description: str = ""  # kept in a GeoTIFF


def write_orthophoto(stem: Path, rgba: Uint8Array, place: RasterPlace) -> Path:
    """Writes an orthophoto (H, W, 4), whose alpha is 0 where nothing is shown.

    Args:
        stem: the path without its suffix, in a folder that exists.
        rgba: RGBA, the first line in the north.
        place: of it.

    Returns:
        The path of the file.

    Raises:
        OSError: it cannot be written; the former one is untouched.
        ImportError: it lies in a UTM grid and rasterio is not installed.
    """
    if place.utm is None:
        return _write_png(stem, cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA), place.grid)
    bands = np.moveaxis(rgba, 2, 0)
    return _write_geotiff(stem.with_suffix(".tif"), bands, place, place.utm)


def write_heights(stem: Path, heights: Float32Array, place: RasterPlace) -> Path:
    """Writes heights (H, W), NaN where unknown: above the ellipsoid in a UTM grid.

    A PNG has 16 bits from the lowest to the highest, 0 where unknown; its text says what they are.

    Args:
        stem: the path without its suffix, in a folder that exists.
        heights: in the ground's frame, the first line in the north.
        place: of them.

    Returns:
        The path of the file.

    Raises:
        OSError: it cannot be written; the former one is untouched.
        ImportError: it lies in a UTM grid and rasterio is not installed.
    """
    if place.utm is None:
        return _write_height_png(stem, heights, place.grid)
    x, y = place.grid.centers()
    drop = place.utm.drop_m(*np.meshgrid(x, y))
    above = np.where(np.isnan(heights), _NO_HEIGHT, heights + place.utm.origin[2] + drop)
    bands = above.astype(np.float32)[None]
    path = stem.with_suffix(".tif")
    return _write_geotiff(path, bands, place, place.utm, nodata=_NO_HEIGHT)


def _write_geotiff(
    path: Path,
    bands: NDArray[Any],
    place: RasterPlace,
    utm: UtmGrid,
    *,
    nodata: float | None = None,
) -> Path:
    import rasterio
    from rasterio._err import CPLE_BaseError  # some of GDAL's errors come as they are
    from rasterio.enums import ColorInterp
    from rasterio.errors import RasterioError
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
    except (RasterioError, CPLE_BaseError) as error:
        raise OSError(None, f"{error}") from error
    finally:
        for leftover in path.parent.glob(f"{temporary.name}*"):
            leftover.unlink(missing_ok=True)
    return path


def _write_png(stem: Path, pixels: NDArray[Any], grid: GroundGrid) -> Path:
    """A PNG, and beside it a world file: six lines that place its pixels."""
    path = stem.with_suffix(".png")
    done, data = cv2.imencode(".png", pixels)
    if not done:
        raise OSError(None, "the image cannot be encoded as PNG")
    left, _, _, upper = grid.bounds
    rows: Float64Array = np.array(
        [grid.cell, 0.0, 0.0, -grid.cell, left + grid.cell / 2, upper - grid.cell / 2]
    )
    write_atomically(stem.with_suffix(".pgw"), "".join(f"{v:.12g}\n" for v in rows).encode())
    write_atomically(path, data.tobytes())
    return path


def _write_height_png(stem: Path, heights: Float32Array, grid: GroundGrid) -> Path:
    known = ~np.isnan(heights)
    lowest = float(heights[known].min()) if known.any() else 0.0
    highest = float(heights[known].max()) if known.any() else 0.0
    step = max(highest - lowest, 1e-9) / (_PNG_HEIGHT_STEPS - 1)
    steps = np.where(known, 1 + np.rint((heights - lowest) / step), 0).astype(np.uint16)
    path = _write_png(stem, steps, grid)
    text = f"height = {lowest - step:.9g} + {step:.9g} * value, unknown where value is 0\n"
    write_atomically(stem.with_suffix(".txt"), text.encode())
    return path
