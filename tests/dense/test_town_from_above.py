"""A flight over the town: dense points, surface and orthophoto against the town itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest

from adapters.town.renderer import TownRenderer
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.dense.consistency import OtherDepth
from engine.dense.fusion import fuse
from engine.dense.keyframe_points import keyframe_points, shown_by
from engine.dense.orthophoto import Orthophoto, OrthoView, usable_image
from engine.dense.surface import GroundGrid, Surface, SurfaceBuilder, round_cell
from engine.dense_types import DensePoints, DepthMap
from engine.geometry import camera_center, compose_poses, invert_pose, transform_points
from engine.types import BoolArray, Float32Array, Float64Array, FrameId, Uint8Array
from tests.support.boxed_ground import in_world
from tests.support.dense_points import concatenate

_SPEC = "synthetic:town?frames=200&path=lawnmower&seed=1&width=320&height=240"
_EVERY_NTH = 8
_NOISE = 0.0025  # of depth: what matching leaves
_PATCH_PX, _REACH_PX = 24, 4
_ABOVE_M = 4000.0  # of the camera that sees the town straight from above
_LEVEL_M = 0.5  # ground and streets, without cars

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("towns_painted_once")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Flight:
    """What a flight gives, with depth as matching gives it."""

    town: SyntheticTown
    maps: list[DepthMap]
    poses: list[Float64Array]
    fused: DensePoints
    surface: Surface
    grid: GroundGrid
    orthophoto: Uint8Array  # (H, W, 4)
    true_pixels: Uint8Array  # (H, W, 3) the town from above
    true_heights: Float32Array  # (H, W)


@pytest.fixture(scope="module")
def flight() -> _Flight:
    town = SyntheticTown(
        parse_town_spec(_SPEC), next_frame_id=(FrameId(i) for i in itertools.count(1)).__next__
    )
    rendered = [town.render(i) for i in range(0, town.options.num_frames, _EVERY_NTH)]
    poses = [one.cam_from_world for one in rendered]
    maps = [_depth_map(town, i, one.pixels, one.depth) for i, one in enumerate(rendered)]
    fused = concatenate(list(fuse(_chunk(maps, poses, i) for i in range(len(maps)))))
    builder = SurfaceBuilder(round_cell(float(np.median(fused.sampling))))
    builder.add(fused.xyz.astype(np.float64))
    surface = builder.surface()
    assert surface is not None
    views = [
        OrthoView(
            frame_id=one.frame_id,
            version=1,
            pinhole=one.pinhole,
            size=(town.options.width, town.options.height),
            cam_from_ground=pose,
        )
        for one, pose in zip(maps, poses, strict=True)
    ]
    orthophoto = Orthophoto()
    orthophoto.update(surface, views, lambda view: usable_image(maps[view.frame_id - 1]))
    grid, pixels = orthophoto.image(surface.grid)
    true_pixels, true_heights = _from_above(town, grid)
    return _Flight(
        town=town,
        maps=maps,
        poses=poses,
        fused=fused,
        surface=surface,
        grid=grid,
        orthophoto=pixels,
        true_pixels=true_pixels,
        true_heights=true_heights,
    )


def test_dense_points_lie_on_the_town_without_double_surfaces(flight: _Flight) -> None:
    voxel = float(np.median(flight.fused.sampling))
    xyz = flight.fused.xyz.astype(np.float64)
    distance = flight.town.layout.distances_m(xyz)
    assert np.mean(distance <= 2 * voxel) >= 0.98
    assert np.median(distance) > 0.02  # the noise is there
    assert len(xyz) > 20_000


def test_the_orthophoto_shows_streets_where_they_are_and_all_that_was_seen(
    flight: _Flight,
) -> None:
    true_pixels, true_heights = flight.true_pixels, flight.true_heights
    shown = flight.orthophoto[..., 3] > 0
    offsets_px = _offsets_px(flight.orthophoto, true_pixels, (true_heights < _LEVEL_M) & shown)
    assert len(offsets_px) > 30
    assert np.median(offsets_px) <= 0.3
    assert np.percentile(offsets_px, 90) <= 1.0
    seen = _num_views(flight, true_heights) >= 3
    assert np.mean(shown[seen]) >= 0.98
    error = np.abs(flight.orthophoto[..., :3].astype(int) - true_pixels).mean(axis=-1)
    assert np.median(error[shown & seen]) < 12


def test_heights_are_those_of_roofs_and_streets(flight: _Flight) -> None:
    measured = flight.surface.is_measured
    error = np.abs(flight.surface.heights - flight.true_heights[::2, ::2])[measured]
    assert np.median(error) < 0.3 * flight.surface.grid.cell
    assert np.mean(error < 2 * flight.surface.grid.cell) > 0.94


def _depth_map(
    town: SyntheticTown, index: int, pixels: Uint8Array, depth: Float32Array
) -> DepthMap:
    rng = np.random.default_rng(index)
    noise = cv2.GaussianBlur(rng.normal(size=depth.shape), (0, 0), 1.5)
    known = np.isfinite(depth) & (depth < 150.0)
    noisy = np.where(known, depth, 0.0) * (1.0 + _NOISE / noise.std() * noise)
    return DepthMap(
        frame_id=FrameId(index + 1),
        pinhole=np.array(town.intrinsics),
        depth=noisy.astype(np.float32),
        relative_error=np.where(known, np.float32(_NOISE), np.float32(0.0)),
        num_agreeing=np.where(known, np.uint8(2), np.uint8(0)),
        colors=pixels,
        neighbour_ids=np.array([1000, 1001]),
        neighbour_from_keyframe=np.broadcast_to(np.eye(4)[:3], (2, 3, 4)),
    )


def _chunk(maps: list[DepthMap], poses: list[Float64Array], i: int) -> DensePoints:
    """The points that a keyframe adds to those of the four nearest before it, in the world."""
    distances = np.linalg.norm(camera_center(np.array(poses)) - camera_center(poses[i]), axis=1)
    nearest = np.argsort(distances[:i], kind="stable")[:4]
    others = [
        OtherDepth(
            depth_map=maps[j], other_from_keyframe=compose_poses(poses[j], invert_pose(poses[i]))
        )
        for j in nearest
    ]
    points = keyframe_points(maps[i])
    is_new = shown_by(points, maps[i], others) == 0
    return in_world(
        DensePoints(
            xyz=points.xyz[is_new],
            colors=points.colors[is_new],
            normals=points.normals[is_new],
            sampling=points.sampling[is_new],
            num_views=points.num_views[is_new],
        ),
        poses[i],
    )


def _from_above(town: SyntheticTown, grid: GroundGrid) -> tuple[Uint8Array, Float32Array]:
    """The town's pixels and heights on a grid, seen from so high that all rays are vertical."""
    left, lower, right, upper = grid.bounds
    focal = _ABOVE_M / grid.cell
    size = grid.num_columns, grid.num_lines
    renderer = TownRenderer(
        town.layout,
        seed=town.options.seed,
        size=size,
        intrinsics=(focal, focal, size[0] / 2, size[1] / 2),
        noise_sigma=0.0,
    )
    rotation = np.diag([1.0, -1.0, -1.0])
    center = np.array([(left + right) / 2, (lower + upper) / 2, _ABOVE_M])
    pixels, depth = renderer.draw(np.column_stack([rotation, -rotation @ center]), index=0)
    return pixels, np.asarray(_ABOVE_M - depth, np.float32)


def _offsets_px(made: Uint8Array, true: Uint8Array, usable: BoolArray) -> Float64Array:
    """How far patches (N,) of level ground with something to see are from where they belong."""
    grey, true_grey = (
        cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2GRAY)
        for image in (made, true)
    )
    found = []
    size, reach = _PATCH_PX, _REACH_PX
    for top in range(reach, len(grey) - size - reach, size // 2):
        for left in range(reach, grey.shape[1] - size - reach, size // 2):
            part = slice(top, top + size), slice(left, left + size)
            if usable[part].mean() < 0.95 or grey[part].std() < 6:
                continue
            around = true_grey[top - reach : top + size + reach, left - reach : left + size + reach]
            score = cv2.matchTemplate(around, grey[part], cv2.TM_CCOEFF_NORMED)
            line, column = np.unravel_index(score.argmax(), score.shape)
            if score.max() > 0.6 and 0 < line < 2 * reach and 0 < column < 2 * reach:
                shift = (
                    column - reach + _peak(score[line, column - 1 : column + 2]),
                    line - reach + _peak(score[line - 1 : line + 2, column]),
                )
                found.append(np.hypot(*shift))
    return np.array(found)


def _peak(scores: np.ndarray[Any, Any]) -> float:
    """Where a parabola through three scores has its top, from the middle one."""
    before, middle, after = (float(score) for score in scores)
    return (before - after) / (2.0 * (before - 2.0 * middle + after))


def _num_views(flight: _Flight, heights: Float32Array) -> Float64Array:
    """By how many keyframes each pixel (H, W) of the ground is truly seen."""
    x, y = np.meshgrid(*flight.grid.centers())
    places = np.stack([x, y, heights], axis=-1).reshape(-1, 3).astype(np.float64)
    num = np.zeros(len(places))
    for one, pose in zip(flight.maps, flight.poses, strict=True):
        in_cam = transform_points(pose, places)
        xy = in_cam[:, :2] / in_cam[:, 2:] * one.pinhole[:2] + one.pinhole[2:]
        size = np.array(one.depth.shape[::-1])
        column, line = np.clip(xy, 0, size - 1).astype(int).T
        inside = ((xy >= 0) & (xy < size)).all(axis=1)
        num += inside & (np.abs(one.depth[line, column] / in_cam[:, 2] - 1.0) < 0.02)
    return num.reshape(heights.shape)
