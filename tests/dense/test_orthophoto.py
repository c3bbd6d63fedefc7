"""Keyframes' images laid onto the surface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import engine.dense.orthophoto as orthophoto_module
from engine.dense.orthophoto import Orthophoto, OrthoView, sharpness_of, usable_image
from engine.dense.surface import GroundGrid, Surface
from engine.types import Float64Array, FrameId, Uint8Array
from tests.support.boxed_ground import SIZE, colour_at, depth_map, pose_above

_CELL = 0.25
_GRID = GroundGrid(cell=_CELL, west=-40, north=40, num_columns=80, num_lines=80)  # 20 m wide
_RED = np.array([200, 20, 20], np.uint8)  # of the box's sides and of what images show wrongly


def test_what_images_show_lies_where_it_is() -> None:
    images = _images([pose_above(x, y, 12.0) for x in (-5.0, 0.0, 5.0) for y in (-6.0, 0.0, 6.0)])
    x, y, pixels = _made(images, _flat())
    shown = pixels[..., 3] == 255
    error = np.abs(pixels[..., :3].astype(int) - colour_at(x, y))
    assert shown.mean() > 0.97
    assert np.median(error[shown]) <= 1
    assert np.percentile(error[shown], 99) <= 4
    shifted = np.abs(pixels[:, 1:, :3].astype(int) - colour_at(x, y)[:, :-1])
    assert np.median(shifted) > np.median(error[shown]) + 2  # one pixel off is seen


def test_a_box_stands_where_it_stands_and_hides_what_is_behind_it() -> None:
    left, right = pose_above(-3.0, 0.0, 16.0), pose_above(3.0, 0.0, 16.0)
    x, y, both = _made(_images([left, right], has_box=True), _with_box())
    _, _, one = _made(_images([left], has_box=True), _with_box())
    on_top = (np.abs(x) < 1.7) & (np.abs(y) < 1.7)
    error = np.abs(both[..., :3].astype(int) - colour_at(x, y)).max(axis=-1)
    assert (both[on_top, 3] == 255).all()
    assert np.percentile(error[on_top], 95) <= 6
    # The box is 3 m high: from 3 m to the left and 16 m up it hides the ground to x = 3.15.
    behind = (x > 2.3) & (x < 2.8) & (np.abs(y) < 1.5)
    assert (one[behind, 3] == 0).all()
    assert (both[behind, 3] == 255).all()
    assert np.percentile(error[behind], 95) <= 6
    before = (x > -3.0) & (x < -2.3) & (np.abs(y) < 1.5)
    assert (one[before, 3] == 255).all()


def test_the_view_from_above_goes_before_a_slanted_or_blurred_one() -> None:
    above, slanted = pose_above(0.0, 0.0, 12.0), pose_above(0.0, -9.0, 12.0, tilt_deg=35.0)
    images = _images([above, slanted])
    images[1] = (images[1][0], _painted(images[1][1]))
    _, _, pixels = _made(images, _flat())
    middle = pixels[75:85, 75:85, :3].astype(int)
    assert np.abs(middle - _RED).max(axis=-1).min() > 60
    images[0] = (replace(images[0][0], sharpness=0.3), images[0][1])
    _, _, pixels = _made(images, _flat())
    assert np.abs(pixels[75:85, 75:85, :3].astype(int) - _RED).max() < 60


def test_seams_are_blended() -> None:
    images = _images([pose_above(-3.0, 0.0, 12.0), pose_above(3.0, 0.0, 12.0)])
    grey = [np.full((*SIZE[::-1], 3), value, np.uint8) for value in (100, 160)]
    images = [(view, _opaque(image)) for (view, _), image in zip(images, grey, strict=True)]
    _, _, pixels = _made(images, _flat())
    line = pixels[80, 50:110, 0].astype(int)
    assert line[0] < 110
    assert line[-1] > 150
    assert np.diff(line).max() < 20
    assert (np.diff(line) >= 0).all()


def test_what_may_not_be_used_leaves_no_trace_where_another_view_shows_the_place() -> None:
    images = _images([pose_above(0.0, 0.0, 12.0), pose_above(1.0, 0.0, 12.5)])
    masked = _painted(images[0][1])
    masked[..., 3] = 0
    _, _, pixels = _made([(images[0][0], masked), images[1]], _flat())
    assert np.abs(pixels[60:100, 60:100, :3].astype(int) - _RED).max(axis=-1).min() > 40
    _, _, alone = _made([(images[0][0], masked)], _flat())
    assert (alone[..., 3] == 0).all()


def test_only_tiles_that_changed_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    render = orthophoto_module._render

    def counted(*args: Any) -> Uint8Array:
        made.append(args)
        return render(*args)

    monkeypatch.setattr(orthophoto_module, "_render", counted)
    grid = GroundGrid(cell=_CELL, west=-300, north=100, num_columns=600, num_lines=200)
    flat = Surface(
        grid=grid,
        heights=np.zeros((200, 600), np.float32),
        is_measured=np.ones((200, 600), bool),
    )
    poses = [pose_above(x, 0.0, 40.0) for x in (-50.0, -20.0, 20.0, 50.0)]
    images = _images(poses)
    orthophoto = Orthophoto(px_per_cell=2)
    _update(orthophoto, flat, images)
    num_all = len(made)
    assert num_all >= 8
    made.clear()
    _update(orthophoto, flat, images)
    assert not made

    moved = _images([*poses[:-1], pose_above(50.5, 0.0, 40.0)])
    _update(orthophoto, flat, moved)
    assert 0 < len(made) < num_all
    made.clear()
    barely = _images([*poses[:-1], pose_above(50.5 + 1e-6, 0.0, 40.0)])
    _update(orthophoto, flat, barely)
    assert len(made) <= 1
    made.clear()

    heights = flat.heights.copy()
    heights[100, 20] = 3.0
    _update(orthophoto, replace(flat, heights=heights), barely)
    assert 1 <= len(made) <= 2


def test_an_image_that_cannot_be_read_costs_only_itself() -> None:
    images = _images([pose_above(0.0, 0.0, 12.0), pose_above(1.0, 0.0, 12.5)])
    orthophoto = Orthophoto()
    orthophoto.update(
        _flat(),
        [view for view, _ in images],
        lambda view: images[1][1] if view.frame_id == 2 else None,
    )
    assert (orthophoto.image(_GRID)[1][..., 3] == 255).mean() > 0.3


def test_no_view_and_no_height_give_a_picture_of_nothing() -> None:
    unknown = replace(_flat(), heights=np.full((80, 80), np.nan, np.float32))
    images = _images([pose_above(0.0, 0.0, 12.0)])
    for surface, some in ((_flat(), []), (unknown, images)):
        assert (_made(some, surface)[2] == 0).all()


def test_black_beside_the_lens_is_not_used_and_a_hole_in_the_depth_hardly() -> None:
    whole = depth_map(pose_above(0.0, 0.0, 12.0))
    depth, colors = whole.depth.copy(), whole.colors.copy()
    depth[:40], colors[:40] = 0.0, 0
    depth[80:, 100:] = 0.0
    image = usable_image(replace(whole, depth=depth, colors=colors))
    assert (image[:25, :, 3] == 0).all()
    assert (image[50:70, :, 3] == 255).all()
    assert (image[100:, 120:, 3] > 0).all()
    assert image[100:, 120:, 3].max() < 64
    assert np.array_equal(image[..., :3], colors)


@pytest.mark.parametrize("gain", [0.6, 1.0])
def test_sharpness_falls_with_blur_and_not_with_light(gain: float) -> None:
    rng = np.random.default_rng(0)
    sharp = (rng.integers(0, 200, (60, 80, 1)) * gain).astype(np.uint8).repeat(3, axis=2)
    blurred = sharp.copy()
    for axis in (0, 1):
        blurred = blurred // 2 + np.roll(blurred, 1, axis=axis) // 2
    assert sharpness_of(blurred) < 0.8 * sharpness_of(sharp)
    reference = rng.integers(0, 200, (60, 80, 1)).astype(np.uint8).repeat(3, axis=2)
    assert sharpness_of(sharp) == pytest.approx(sharpness_of(reference), rel=0.1)


_Images = list[tuple[OrthoView, Uint8Array]]


def _images(poses: Sequence[Float64Array], *, has_box: bool = False) -> _Images:
    images = []
    for i, pose in enumerate(poses):
        seen = depth_map(pose, has_box=has_box)
        view = OrthoView(
            frame_id=FrameId(i + 1),
            version=1,
            pinhole=seen.pinhole,
            size=SIZE,
            cam_from_ground=pose,
        )
        images.append((view, _opaque(seen.colors)))
    return images


def _opaque(colors: Uint8Array) -> Uint8Array:
    return np.dstack([colors, np.full(colors.shape[:2], 255, np.uint8)])


def _painted(image: Uint8Array) -> Uint8Array:
    painted = image.copy()
    painted[..., :3] = _RED
    return painted


def _flat() -> Surface:
    return Surface(
        grid=_GRID, heights=np.zeros((80, 80), np.float32), is_measured=np.ones((80, 80), bool)
    )


def _with_box() -> Surface:
    x, y = np.meshgrid(*_GRID.centers())
    heights = np.where((np.abs(x) < 2) & (np.abs(y) < 2), 3.0, 0.0).astype(np.float32)
    return replace(_flat(), heights=heights)


def _update(orthophoto: Orthophoto, surface: Surface, images: _Images) -> None:
    pixels = {view.frame_id: image for view, image in images}
    views = [view for view, _ in images]
    orthophoto.update(surface, views, lambda v: pixels[v.frame_id])


def _made(images: _Images, surface: Surface) -> tuple[Float64Array, Float64Array, Uint8Array]:
    """East and north of the pixels (H, W) each, and the orthophoto."""
    orthophoto = Orthophoto(px_per_cell=2)
    _update(orthophoto, surface, images)
    grid, pixels = orthophoto.image(surface.grid)
    x, y = np.meshgrid(*grid.centers())
    return x, y, pixels
