"""The ground from above, in ``products/``: orthophoto, surface model, coverage.

They are replaced at snapshots, or removed where there is no ground any more. Of a georeferenced
map the first two lie in the UTM zone of its origin's longitude; without the packages for that, in
metres east and north of the origin. Of a map without positions they are in its own unit, and its
coverage is no GeoJSON, whose coordinates are longitudes and latitudes.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.dense.coverage import Coverage, coverage_geojson, coverage_of
from engine.dense.orthophoto import Orthophoto, OrthoView, sharpness_of, usable_image
from engine.dense.surface import (
    Surface,
    SurfaceBuilder,
    ground_from_world,
    round_cell,
    vertical_of,
)
from engine.dense_types import DensePoints, DepthMap, GroundPicture, KeyframePoses
from engine.geo.georeference import places_on_globe
from engine.geo.utm import UtmGrid, utm_grid
from engine.output.files import write_atomically
from engine.output.ground_picture import ground_picture
from engine.output.rasters import RasterPlace, remove_raster, write_heights, write_orthophoto
from engine.types import Float32Array, Float64Array, FrameId, GpsFix, Uint8Array

logger = logging.getLogger(__name__)

ORTHOPHOTO_STEM, HEIGHTS_STEM, COVERAGE_NAME = "orthophoto", "dsm", "coverage.geojson"
MAP_COVERAGE_NAME = "coverage.json"  # of a map that is not on the globe, where GeoJSON has to be
_POINTS_FOR_CELL = 1_000_000  # that decide on the size of a cell
_SURE_VIEWS = 3  # of a point; two alone may agree on what is not there
_SAME_VERTICAL_COSINE = 0.9986  # 3 degrees
_SHARPNESS_LIMITS = (0.5, 1.1)  # of what a keyframe's sharpness counts, compared to the median


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroundFrame:
    """A frame with x and y along the ground and z up, and where it lies."""

    from_world: Float64Array  # (3, 4) affine
    utm: UtmGrid | None  # about whose origin it lies
    origin: GpsFix | None  # of the world, if that is in metres east, north, up

    def points(self, points_in_world: Float32Array) -> Float64Array:
        """Points (P, 3) in this frame."""
        rotated = points_in_world.astype(np.float64) @ self.from_world[:, :3].T
        return np.asarray(rotated + self.from_world[:, 3])

    def coordinates(self, places: Float64Array) -> Float64Array:
        """Longitudes and latitudes (P, 2) of places (P, 2); without an origin as they are."""
        if self.origin is None:
            return places
        inverse = np.linalg.inv(self.from_world[:2, :2])
        enu = np.column_stack(
            [(places - self.from_world[:2, 3]) @ inverse.T, np.zeros(len(places))]
        )
        return places_on_globe(enu, origin=self.origin)[:, [1, 0]]

    def world_from_ground(self) -> Float64Array:
        """The affine map (3, 4) back to the world."""
        inverse = np.linalg.inv(self.from_world[:, :3])
        return np.column_stack([inverse, -inverse @ self.from_world[:, 3]])

    def camera(self, cam_from_world: Float64Array) -> Float64Array:
        """``cam_from_ground`` (3, 4) of a pose (3, 4); affine as this frame is."""
        inverse = np.linalg.inv(self.from_world[:, :3])
        linear = cam_from_world[:, :3] @ inverse
        return np.column_stack([linear, cam_from_world[:, 3] - linear @ self.from_world[:, 3]])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _View:
    """What stays in memory of a keyframe's image."""

    version: int
    pinhole: Float64Array  # (4,)
    size: tuple[int, int]
    sharpness: float


class GroundProducts:
    """Makes the products of the ground, and makes only those parts again that changed.

    One thread at a time.

    Args:
        read: the depth map of a keyframe, whose colours and pinhole are used.
    """

    def __init__(self, read: Callable[[FrameId], DepthMap | None]) -> None:
        self._read = read
        self._orthophoto = Orthophoto()
        self._views: dict[FrameId, _View] = {}
        self._up: Float64Array | None = None
        self._cell: float | None = None
        self._builder: SurfaceBuilder | None = None
        self._frame: GroundFrame | None = None
        self._has_said = False  # that packages are missing
        self.coverage: Coverage | None = None  # as it was written last
        self.picture: GroundPicture | None = None  # likewise, in the world
        self.epsg: int | None = None  # the CRS of the rasters written last; None: in none

    def collected(
        self, fused: Iterable[DensePoints], poses: KeyframePoses, *, origin: GpsFix | None
    ) -> Iterator[DensePoints]:
        """Passes on fused points, and makes the surface of them.

        Args:
            fused: in the world, parts of space.
            poses: of keyframes in the world.
            origin: of the world, if it is in metres east, north, up; None: it is in map units.
        """
        self._builder, waiting, num_waiting = None, [], 0
        for part in fused:
            if self._builder is None:
                waiting.append(part)
                num_waiting += len(part.xyz)
                if num_waiting >= _POINTS_FOR_CELL:
                    self._begin(waiting, poses, origin)
                    waiting = []
            else:
                self._add(part)
            yield part
        if waiting:
            self._begin(waiting, poses, origin)

    def write(
        self,
        folder: Path,
        poses: KeyframePoses,
        versions: Mapping[FrameId, int],
        *,
        comments: Sequence[str] = (),
    ) -> None:
        """Writes the products of the points that were collected last; without any, removes them.

        Args:
            folder: of the products; it exists.
            poses: of keyframes in the world.
            versions: of the depth maps that can be read, by keyframe.
            comments: on the map, such as its verdict; kept in the files that have room for them.

        Raises:
            OSError: they cannot be written; the former ones are untouched.
        """
        surface = None if self._builder is None else self._builder.surface()
        if surface is None or self._frame is None:
            self._remove(folder)
            return
        self._cell = surface.grid.cell
        words = "; ".join(comments)
        place = RasterPlace(
            grid=surface.grid, utm=self._frame.utm, origin=self._frame.origin, description=words
        )
        views = self._ortho_views(poses, versions, self._frame)
        write_heights(folder / HEIGHTS_STEM, surface.heights, place)
        coverage = self._write_coverage(
            folder,
            surface,
            [*views, *_views_without_depth(poses, views, self._frame)],
            self._frame,
            description=words,
        )
        self._orthophoto.update(surface, views, self._pixels)
        grid, pixels = self._orthophoto.image(surface.grid)
        write_orthophoto(folder / ORTHOPHOTO_STEM, pixels, replace(place, grid=grid))
        self.epsg = None if place.utm is None else place.utm.epsg
        self.picture = ground_picture(
            surface,
            pixels,
            self.coverage,
            world_from_ground=self._frame.world_from_ground(),
            geojson=coverage,
        )
        self._builder = None

    def _remove(self, folder: Path) -> None:
        """Removes products of a former world."""
        for stem in (ORTHOPHOTO_STEM, HEIGHTS_STEM):
            remove_raster(folder / stem)
        for name in (COVERAGE_NAME, MAP_COVERAGE_NAME):
            (folder / name).unlink(missing_ok=True)
        self.coverage = self.picture = self.epsg = None

    def _write_coverage(
        self,
        folder: Path,
        surface: Surface,
        views: Sequence[OrthoView],
        frame: GroundFrame,
        *,
        description: str,
    ) -> str:
        """Writes the coverage; returns it as GeoJSON, "" where it is none or not on the globe."""
        names = [COVERAGE_NAME, MAP_COVERAGE_NAME]
        self.coverage = coverage_of(surface, views)
        text = ""
        if self.coverage is not None:
            record = coverage_geojson(self.coverage, frame.coordinates)
            record["description"] = description
            if frame.origin is None:
                record["frame"] = "not on the globe: units of the map, in a plane along its ground"
            text = json.dumps(record, allow_nan=False)
            written = names.pop(0 if frame.origin is not None else 1)
            write_atomically(folder / written, f"{text}\n".encode())
        for name in names:
            (folder / name).unlink(missing_ok=True)
        return text if frame.origin is not None else ""

    def _begin(self, parts: list[DensePoints], poses: KeyframePoses, origin: GpsFix | None) -> None:
        """Decides on the frame and the cell by the first points."""
        self._frame = self._frame_of(parts, poses, origin)
        samplings = np.concatenate([part.sampling for part in parts])
        if not len(samplings):
            return
        self._cell = round_cell(float(np.median(samplings)), former=self._cell)
        self._builder = SurfaceBuilder(self._cell)
        for part in parts:
            self._add(part)

    def _add(self, part: DensePoints) -> None:
        if self._builder is not None and self._frame is not None:
            is_sure = part.num_views >= _SURE_VIEWS
            self._builder.add(self._frame.points(part.xyz), is_sure=is_sure)

    def _frame_of(
        self, parts: list[DensePoints], poses: KeyframePoses, origin: GpsFix | None
    ) -> GroundFrame:
        if origin is None:
            normals = np.concatenate([part.normals for part in parts])
            up = vertical_of(normals, towards=-poses.cam_from_world[:, 2, :3].sum(axis=0))
            if self._up is None or float(self._up @ up) < _SAME_VERTICAL_COSINE:
                self._up = up
            return GroundFrame(from_world=ground_from_world(self._up), utm=None, origin=None)
        utm = self._utm_grid(origin)
        from_world = np.eye(4)[:3] if utm is None else utm.grid_from_enu
        return GroundFrame(from_world=from_world, utm=utm, origin=origin)

    def _utm_grid(self, origin: GpsFix) -> UtmGrid | None:
        missing = [name for name in ("pyproj", "rasterio") if not importlib.util.find_spec(name)]
        if not missing:
            return utm_grid(origin)
        if not self._has_said:
            logger.warning(
                "%s missing: orthophoto and surface model are PNG with a world file, not GeoTIFF;"
                " the extra survey brings them (tools/setup survey)",
                " and ".join(missing),
            )
            self._has_said = True
        return None

    def _ortho_views(
        self, poses: KeyframePoses, versions: Mapping[FrameId, int], frame: GroundFrame
    ) -> list[OrthoView]:
        by_id = poses.by_id()
        wanted = [frame_id for frame_id in sorted(versions) if frame_id in by_id]
        self._views = {
            frame_id: view
            for frame_id in wanted
            if (view := self._view(frame_id, versions[frame_id])) is not None
        }
        usual = float(np.median([view.sharpness for view in self._views.values()] or [1.0]))
        return [
            OrthoView(
                frame_id=frame_id,
                version=view.version,
                pinhole=view.pinhole,
                size=view.size,
                cam_from_ground=frame.camera(by_id[frame_id]),
                sharpness=float(np.clip(view.sharpness / max(usual, 1e-9), *_SHARPNESS_LIMITS)),
            )
            for frame_id, view in self._views.items()
        ]

    def _view(self, frame_id: FrameId, version: int) -> _View | None:
        held = self._views.get(frame_id)
        if held is not None and held.version == version:
            return held
        depth_map = self._read(frame_id)
        if depth_map is None:
            return None
        height, width = depth_map.depth.shape
        return _View(
            version=version,
            pinhole=depth_map.pinhole,
            size=(width, height),
            sharpness=sharpness_of(depth_map.colors),
        )

    def _pixels(self, view: OrthoView) -> Uint8Array | None:
        depth_map = self._read(view.frame_id)
        return None if depth_map is None else usable_image(depth_map)


def _views_without_depth(
    poses: KeyframePoses, views: Sequence[OrthoView], frame: GroundFrame
) -> list[OrthoView]:
    """Keyframes that are no views yet: they cover the ground, too, though nobody made depth of it.

    What they show is that of the view whose camera has the most similar focal length.
    """
    focal_of = dict(zip(poses.frame_ids.tolist(), poses.focal_px.tolist(), strict=True))
    has_depth = {int(view.frame_id) for view in views}
    given = np.log([focal_of[view.frame_id] for view in views])
    most_similar = {
        focal_px: views[int(np.abs(given - math.log(focal_px)).argmin())]
        for focal_px in (set(focal_of.values()) if views else ())
    }
    return [
        replace(
            (like := most_similar[focal_of[frame_id]]),
            frame_id=FrameId(frame_id),
            pinhole=like.pinhole * [*2 * [focal_of[frame_id] / focal_of[like.frame_id]], 1.0, 1.0],
            cam_from_ground=frame.camera(pose),
        )
        for frame_id, pose in poses.by_id().items()
        if views and frame_id not in has_depth
    ]
