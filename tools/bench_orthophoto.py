"""How far the orthophoto and the surface model of a georeferenced run are from its sparse map.

Around points of the sparse map, patches of the orthophoto are compared with the image that sees the
point most from above, laid flat at the point's height.

Usage: .venv/bin/python tools/bench_orthophoto.py RUN  (of `livesfm run SOURCE --config drone`)
"""

from __future__ import annotations

import argparse
import json
import zlib  # noqa: F401 - before pycolmap, which brings its own
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import rasterio

from engine.geo.utm import UtmGrid, utm_grid
from engine.types import GpsFix

_HALF_PX, _REACH_PX = 12, 12  # of patches, and how far they are looked for
_LEAST_CONTRAST, _LEAST_SCORE = 12.0, 0.75
_MIN_TRACK = 4
_MAX_HIDDEN = 0.02  # of a patch's surroundings


def main() -> None:
    """Prints offsets in metres."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    model = pycolmap.Reconstruction(str(run / "latest" / "sparse" / "0"))
    origin = json.loads((run / "latest" / "snapshot.json").read_text())["georeference"]["origin"]
    names = ("latitude_deg", "longitude_deg", "altitude_m")
    grid = utm_grid(GpsFix(**{name: origin[name] for name in names}))
    with rasterio.open(run / "products" / "orthophoto.tif") as raster:
        orthophoto, place, epsg = raster.read(), raster.transform, raster.crs.to_epsg()
    print(f"EPSG:{epsg}, {place.a} m a pixel, {np.mean(orthophoto[3] > 0):.1%} shown")
    offsets_m = _offsets_m(run, model, grid, orthophoto, place)
    print(f"points on the orthophoto: {len(offsets_m)}, off by {_percentiles(offsets_m)}")
    with rasterio.open(run / "products" / "dsm.tif") as raster:
        heights, place = raster.read(1, masked=True).filled(np.nan), raster.transform
    errors_m = np.abs(_height_errors_m(model, grid, heights, place))
    print(f"points on the surface: {len(errors_m)}, off by {_percentiles(errors_m)}")


def _percentiles(values: np.ndarray) -> str:
    median, most, nearly_all = np.percentile(values, [50, 80, 95]) if len(values) else [np.nan] * 3
    return f"{median:.2f} m median, {most:.2f} m 80th and {nearly_all:.2f} m 95th percentile"


def _offsets_m(
    run: Path,
    model: pycolmap.Reconstruction,
    grid: UtmGrid,
    orthophoto: np.ndarray,
    place: rasterio.Affine,
) -> np.ndarray:
    grey = cv2.cvtColor(np.moveaxis(orthophoto[:3], 0, 2), cv2.COLOR_RGB2GRAY)
    hidden = orthophoto[3] == 0
    images = {
        number: cv2.imread(str(run / "images" / image.name), cv2.IMREAD_GRAYSCALE)
        for number, image in model.images.items()
    }
    enu_from_grid = np.linalg.inv(grid.grid_from_enu[:, :3])
    found, size = [], _HALF_PX + _REACH_PX
    for point in model.points3D.values():
        in_grid = grid.grid_from_enu[:, :3] @ point.xyz
        column, line = ~place * tuple(in_grid[:2] + grid.origin[:2])
        top, left = round(line) - size, round(column) - size
        around = slice(max(top, 0), top + 2 * size), slice(max(left, 0), left + 2 * size)
        if point.track.length() < _MIN_TRACK or grey[around].shape != (2 * size, 2 * size):
            continue
        columns, lines = np.meshgrid(
            np.arange(left + _REACH_PX, left + _REACH_PX + 2 * _HALF_PX) + 0.5,
            np.arange(top + _REACH_PX, top + _REACH_PX + 2 * _HALF_PX) + 0.5,
        )
        x, y = place * (columns, lines)
        level = np.full_like(x, in_grid[2])
        flat = np.stack([x - grid.origin[0], y - grid.origin[1], level], axis=-1)
        patch = _seen(model, images, point, flat.reshape(-1, 3) @ enu_from_grid.T)
        if hidden[around].mean() > _MAX_HIDDEN or patch.std() < _LEAST_CONTRAST:
            continue
        score = cv2.matchTemplate(grey[around], patch, cv2.TM_CCOEFF_NORMED)
        if score.max() > _LEAST_SCORE:
            shift = np.array(np.unravel_index(score.argmax(), score.shape)) - _REACH_PX
            found.append(np.linalg.norm(shift) * place.a)
    return np.array(found)


def _seen(
    model: pycolmap.Reconstruction,
    images: dict[int, np.ndarray],
    point: pycolmap.Point3D,
    places: np.ndarray,
) -> np.ndarray:
    """What the image that sees a point most from above shows at places (N, 3) around it."""

    def steepness(number: int) -> float:
        ray = model.image(number).projection_center() - point.xyz
        return float(ray[2] / np.linalg.norm(ray))

    number = max((element.image_id for element in point.track.elements), key=steepness)
    image = model.image(number)
    cam_from_world = image.cam_from_world().matrix()
    in_cam = places @ cam_from_world[:, :3].T + cam_from_world[:, 3]
    xy = np.asarray(model.camera(image.camera_id).img_from_cam(in_cam)) - 0.5
    x, y = xy.astype(np.float32).T.reshape(2, 2 * _HALF_PX, 2 * _HALF_PX)
    return cv2.remap(images[number], x, y, cv2.INTER_LINEAR)


def _height_errors_m(
    model: pycolmap.Reconstruction, grid: UtmGrid, heights: np.ndarray, place: rasterio.Affine
) -> np.ndarray:
    points = [p for p in model.points3D.values() if p.track.length() >= _MIN_TRACK]
    xyz = np.array([point.xyz for point in points])
    in_grid = xyz @ grid.grid_from_enu[:, :3].T
    columns, lines = ~place * tuple((in_grid[:, :2] + grid.origin[:2]).T)
    inside = (columns >= 0) & (columns < heights.shape[1]) & (lines >= 0)
    inside &= lines < heights.shape[0]
    in_grid, columns, lines = in_grid[inside], columns[inside], lines[inside]
    true = in_grid[:, 2] + grid.origin[2] + grid.drop_m(in_grid[:, 0], in_grid[:, 1])
    errors = heights[lines.astype(int), columns.astype(int)] - true
    return errors[~np.isnan(errors)]


if __name__ == "__main__":
    main()
