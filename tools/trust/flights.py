"""Clips of the town that no flight of the product has: turns, jumps, blackouts, look-alikes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from adapters.town import renderer
from adapters.town.flight import PathName, fly, poses_from_path
from adapters.town.paint import Side
from adapters.town.source import SyntheticTown, parse_town_spec
from adapters.town.world import (
    PLAZA,
    Box,
    BoxKind,
    Rect,
    TownLayout,
    block_rect,
    lay_out_town,
)
from engine.geometry import invert_pose, quat_xyzw_from_rotation, rotation_from_vector
from engine.types import BoolArray, Float32Array, Float64Array, FrameId, Uint8Array
from trust.inputs import Input, Kit, Maker, write_video

SIZE = (640, 480)  # px
FOCAL_PX = 0.58 * SIZE[0]  # as the town's own camera
RATE_HZ = 10
NOISE_SIGMA = 1.5  # grey levels
CONFIG = ("--config", "drone_video")
NUM_LOOKALIKES = 20
_LOOKALIKE_EDGE_M, _LOOKALIKE_HEIGHT_M, _LOOKALIKE_GAP_M = 10.5, 9.0, 1.2
_LOOKALIKES_IN_BLOCK = 4
_GRID = (24, 32)  # rows and columns of the points that say what a frame sees
_BLANK_LEVEL = 0  # of a frame that shows nothing
_SMOOTHING_FRAMES = 4.0
_INTRINSICS = (FOCAL_PX, FOCAL_PX, SIZE[0] / 2, SIZE[1] / 2)
_TANGENTS = (SIZE[0] / 2 / FOCAL_PX, SIZE[1] / 2 / FOCAL_PX)

TURN_FRAMES = 60  # of a camera that turns on a point
WALK_FRAMES, WALK_FLOWN = 130, 320  # frames taken of the walk around the plaza, and of all of it
TURN_AFTER_WALK_RAD, TURN_AFTER_WALK_FRAMES = 0.9, 50
BLACKOUT_S, CUT_S = 10, 3
PATHS: dict[PathName, int] = {"flight": 200, "orbit": 150, "lawnmower": 120, "street": 200}
_STEP_M, _STREET_STEP_M = 1.6, 0.7  # between frames of a flight, and in a street
_TURN_FRAMES = 24  # of a quarter turn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A camera's way through a town."""

    cam_from_world: Float64Array  # (N, 3, 4) metres
    is_black: BoolArray  # (N,) frames that show nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Town:
    """A town and how it is painted."""

    seed: int
    has_lookalikes: bool = False

    def layout(self) -> TownLayout:
        """Where everything stands."""
        layout = lay_out_town(self.seed)
        return with_lookalikes(layout, seed=self.seed) if self.has_lookalikes else layout

    def renderer(self) -> renderer.TownRenderer:
        """Paints the town, which takes seconds."""
        layout = self.layout()
        paint = renderer._paint_textures

        def painted(layout: TownLayout, *, seed: int, width: int) -> list[Uint8Array]:
            textures = paint(layout, seed=seed, width=width)
            return one_facade(textures, layout) if self.has_lookalikes else textures

        with mock.patch.object(renderer, "_paint_textures", painted):
            return renderer.TownRenderer(
                layout,
                seed=self.seed,
                size=SIZE,
                intrinsics=_INTRINSICS,
                noise_sigma=NOISE_SIGMA,
            )


def with_lookalikes(layout: TownLayout, *, seed: int) -> TownLayout:
    """The town with twenty equal houses, four in each of five blocks around the plaza."""
    column, row = PLAZA
    around = [(column - 1, row), (column + 1, row), (column, row - 1), (column, row + 1)]
    corners = [(column - 1, row - 1), (column + 1, row - 1), (column + 1, row + 1)]
    rng = np.random.default_rng((seed, 11))
    blocks = [block_rect(*each) for each in (*around, corners[int(rng.integers(len(corners)))])]

    def is_replaced(box: Box) -> bool:
        return box.kind in (BoxKind.HOUSE, BoxKind.ROOFTOP) and any(
            block.x_min <= box.footprint.x_min <= block.x_max
            and block.y_min <= box.footprint.y_min <= block.y_max
            for block in blocks
        )

    equal = [house for block in blocks for house in _equal_houses(block)]
    return TownLayout(boxes=(*(box for box in layout.boxes if not is_replaced(box)), *equal))


def _equal_houses(block: Rect) -> Iterable[Box]:
    middle = np.array([block.x_min + block.x_max, block.y_min + block.y_max]) / 2
    reach = (_LOOKALIKE_EDGE_M + _LOOKALIKE_GAP_M) / 2
    for x, y in ((-reach, -reach), (reach, -reach), (-reach, reach), (reach, reach)):
        low = middle + (x, y) - _LOOKALIKE_EDGE_M / 2
        high = low + _LOOKALIKE_EDGE_M
        yield Box(
            kind=BoxKind.HOUSE,
            footprint=Rect(*map(float, (*low, *high))),
            z_min=0.0,
            z_max=_LOOKALIKE_HEIGHT_M,
        )


def one_facade(textures: Sequence[Uint8Array], layout: TownLayout) -> list[Uint8Array]:
    """The textures of a town whose last houses all show one facade on all four walls."""
    sides = list(Side)
    num_sides = len(sides)
    first = (len(layout.boxes) - NUM_LOOKALIKES) * num_sides
    facade = textures[first + sides.index(Side.SOUTH)]
    roof = textures[first + sides.index(Side.TOP)]
    changed = list(textures)
    for idx in range(first, first + NUM_LOOKALIKES * num_sides):
        side = sides[(idx - first) % num_sides]
        if side is Side.TOP:
            changed[idx] = roof
        elif side is not Side.BOTTOM:
            changed[idx] = facade
    return changed


# Ways


def first_black(clip: Clip) -> int:
    """The first frame that shows nothing."""
    return int(np.argmax(clip.is_black))


def turning(kit: Kit, amplitude_rad: float) -> Clip:
    """A camera on a point of the town that turns to one side, to the other, and back."""
    x, y, z, yaw, pitch = kit.variation.turning_place
    swing = amplitude_rad * np.sin(2 * np.pi * np.arange(TURN_FRAMES) / (TURN_FRAMES - 1))
    rows = np.tile([x, y, z, yaw, pitch], (TURN_FRAMES, 1))
    rows[:, 3] += np.degrees(swing)
    return _seen(poses_from_path(rows))


def walk(kit: Kit, *, num_turned: int = 0) -> Clip:
    """A walk around the plaza, at whose end the camera may turn where it stands."""
    layout = lay_out_town(kit.variation.town_seed)
    poses = fly("street", layout, num_frames=WALK_FLOWN, tangents=_TANGENTS)[:WALK_FRAMES]
    end = poses[-1]
    center = invert_pose(end)[:, 3]
    angles = np.linspace(0.0, kit.variation.turn_after_walk_rad, num_turned + 1)[1:]
    turned = []
    for angle in angles:
        rotation = end[:, :3] @ rotation_from_vector(np.array([0.0, 0.0, angle]))
        turned.append(np.column_stack([rotation, -rotation @ center]))
    return _seen(np.concatenate([poses, np.array(turned).reshape(-1, 3, 4)]))


def interrupted(kit: Kit, *, is_low: bool = False) -> Clip:
    """Up a street, a sudden turn, 10 s of black while the camera moves on, and the street again.

    Args:
        kit: the variation's turn.
        is_low: in the streets, looking ahead; else over the roofs, looking down.
    """
    turn = kit.variation.jump_deg
    (west, south, east, north), height, pitch, step_m = (
        ((0.0, -46.0, 30.0, 0.0), 5.0, -6.0, _STREET_STEP_M)
        if is_low
        else ((-13.0, -45.0, 22.0, 32.0), 42.0, -52.0, _STEP_M)
    )

    def line(*corners: tuple[float, float, float], num_frames: int | None = None) -> Float64Array:
        rows = [(x, y, height, yaw, pitch) for x, y, yaw in corners]
        pieces = [
            _line(start, end, num_frames=num_frames, step_m=step_m)
            for start, end in zip(rows, rows[1:], strict=False)
        ]
        return np.concatenate(pieces)

    there = line((west, south, 0.0), (west, north, 0.0))
    aside = line((west, north, turn), (east, north, turn))
    num_black = BLACKOUT_S * RATE_HZ
    dark = line((east, north, turn), (east, south, 270.0), num_frames=num_black)
    back = line((east, south, 270.0), (west + 2.0, south, 270.0))
    around = line((west + 2.0, south, 270.0), (west, south, 360.0), num_frames=_TURN_FRAMES)
    again = line((west, south, 360.0), (west, north, 360.0))
    corner = line((west, north, 360.0), (west + 2.0, north, 360.0 + turn), num_frames=_TURN_FRAMES)
    on = line((west + 2.0, north, 360.0 + turn), (east, north, 360.0 + turn))
    after = _smoothed(np.concatenate([back, around, again, corner, on]))
    rows = np.concatenate([_smoothed(there), _smoothed(aside), dark, after])
    is_black = np.zeros(len(rows), np.bool_)
    first = len(there) + len(aside)
    is_black[first : first + num_black] = True
    return Clip(cam_from_world=poses_from_path(rows), is_black=is_black)


def cut(kit: Kit) -> Clip:
    """A flight over the roofs with 3 s of black while the camera moves on."""
    layout = lay_out_town(kit.variation.town_seed)
    poses = fly("lawnmower", layout, num_frames=180, tangents=_TANGENTS)
    is_black = np.zeros(len(poses), np.bool_)
    first = kit.variation.cut_from
    is_black[first : first + CUT_S * RATE_HZ] = True
    return Clip(cam_from_world=poses, is_black=is_black)


def strip_pair(kit: Kit, lines_x_m: tuple[float, float], *, height_m: float = 30.0) -> Clip:
    """North along one line over the town and back along another, looking north and down."""
    first, second = lines_x_m
    south, north = -32.0, 28.0
    corners = [(first, south), (first, north), (second, north), (second, south)]
    rows = [
        _line((*start, height_m, 0.0, -58.0), (*end, height_m, 0.0, -58.0))
        for start, end in zip(corners, corners[1:], strict=False)
    ]
    return _seen(poses_from_path(_smoothed(np.concatenate(rows))))


def around_the_plaza(kit: Kit, town: Town) -> Clip:
    """Around the plaza and a little more, facing across it, in a town of look-alikes."""
    return _seen(fly("street", town.layout(), num_frames=240, tangents=_TANGENTS))


def _line(
    start: Sequence[float],
    end: Sequence[float],
    *,
    num_frames: int | None = None,
    step_m: float = _STEP_M,
) -> Float64Array:
    """Rows of a path (N, 5) at an even pace, without the end."""
    length_m = float(np.linalg.norm(np.subtract(end[:3], start[:3])))
    wanted = num_frames or max(2, round(length_m / step_m))
    return np.linspace(start, end, wanted, endpoint=False)


def _smoothed(rows: Float64Array) -> Float64Array:
    """A Gaussian along the path (N, 5); the ends stay in place."""
    reach = int(3 * _SMOOTHING_FRAMES)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SMOOTHING_FRAMES) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(rows, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded.T], axis=1)


def _seen(cam_from_world: Float64Array) -> Clip:
    return Clip(cam_from_world=cam_from_world, is_black=np.zeros(len(cam_from_world), np.bool_))


# Inputs


def clip_input(
    way: Callable[[Kit], Clip], *, config: tuple[str, ...] = CONFIG, is_given: bool = False
) -> Maker:
    """A maker of a clip of the town; ``is_given``: its focal length is on the command line."""
    given = ("--set", f"cameras.focal_px={FOCAL_PX:g}") if is_given else ()
    return partial(_make_clip, way=way, arguments=(*config, *given))


def _make_clip(
    kit: Kit, folder: Path, *, way: Callable[[Kit], Clip], arguments: tuple[str, ...]
) -> Input:
    town = Town(seed=kit.variation.town_seed)
    write_clip(folder, "clip", way(kit), town)
    return Input(
        source="clip.mp4",
        arguments=arguments,
        truth="clip.txt",
        views="clip.npz",
        focal_px=FOCAL_PX,
    )


def lookalike_town(seed: int) -> Maker:
    """A maker of a walk around the plaza of a town where twenty houses are equal."""
    return partial(_make_lookalikes, seed=seed)


def _make_lookalikes(kit: Kit, folder: Path, *, seed: int) -> Input:
    town = Town(seed=100 * kit.variation.town_seed + seed, has_lookalikes=True)
    write_clip(folder, "clip", around_the_plaza(kit, town), town)
    return Input(
        source="clip.mp4",
        arguments=CONFIG,
        truth="clip.txt",
        views="clip.npz",
        focal_px=FOCAL_PX,
    )


def two_flights(first_x_m: tuple[float, float], second_x_m: tuple[float, float]) -> Maker:
    """A maker of two clips, each of two lines over the town."""
    return partial(_make_two_flights, lines_x_m=(first_x_m, second_x_m))


def _make_two_flights(
    kit: Kit, folder: Path, *, lines_x_m: tuple[tuple[float, float], tuple[float, float]]
) -> Input:
    town = Town(seed=kit.variation.town_seed)
    for name, lines in zip(("first", "second"), lines_x_m, strict=True):
        write_clip(folder, name, strip_pair(kit, lines), town)
    return Input(
        source="first.mp4",
        more_sources=("second.mp4",),
        arguments=CONFIG,
        truth="first.txt",
        more_truths=("second.txt",),
        focal_px=FOCAL_PX,
    )


def town_path(
    path: PathName,
    *,
    seed: int,
    num_frames: int,
    arguments: tuple[str, ...] = (),
    has_views: bool = False,
) -> Maker:
    """A maker that points to a flight of the product's own town.

    Args:
        path: which one.
        seed: of the town.
        num_frames: of the whole path.
        arguments: of the run.
        has_views: whether to render all frames for what they see.
    """
    return partial(
        _make_town_path,
        path=path,
        seed=seed,
        num_frames=num_frames,
        arguments=arguments,
        has_views=has_views,
    )


def _make_town_path(
    kit: Kit,
    folder: Path,
    *,
    path: PathName,
    seed: int,
    num_frames: int,
    arguments: tuple[str, ...],
    has_views: bool,
) -> Input:
    seed += 100 * kit.variation.town_seed
    spec = f"synthetic:town?path={path}&seed={seed}&frames={num_frames}&fps={RATE_HZ}"
    town = SyntheticTown(parse_town_spec(spec), next_frame_id=lambda: FrameId(1))
    poses = np.array([pose for _, pose in town.ground_truth()])
    write_truth(folder / "truth.txt", poses)
    if has_views:
        depths = (town.render(index).depth for index in range(len(poses)))
        _write_views(folder / "truth.npz", depths, poses)
    return Input(
        source=spec,
        arguments=arguments,
        truth="truth.txt",
        views="truth.npz" if has_views else None,
        focal_px=town.intrinsics[0],
    )


def write_clip(folder: Path, name: str, clip: Clip, town: Town) -> None:
    """Writes ``NAME.mp4``, its truth ``NAME.txt`` and what its frames see, ``NAME.npz``."""
    drawing = town.renderer()
    frames, depths = [], []
    for index, pose in enumerate(clip.cam_from_world):
        pixels, depth = drawing.draw(pose, index=index)
        if clip.is_black[index]:
            pixels, depth = np.full_like(pixels, _BLANK_LEVEL), np.full_like(depth, np.inf)
        frames.append(pixels)
        depths.append(_on_grid(depth))
    write_video(folder / f"{name}.mp4", frames, rate_hz=RATE_HZ)
    write_truth(folder / f"{name}.txt", clip.cam_from_world)
    _write_views(folder / f"{name}.npz", depths, clip.cam_from_world)


def write_truth(path: Path, cam_from_world: Float64Array) -> None:
    """Writes poses (N, 3, 4) in TUM format, timestamps 0, 1, 2, ..."""
    lines = []
    for index, pose in enumerate(cam_from_world):
        world_from_cam = invert_pose(pose)
        quat_xyzw = quat_xyzw_from_rotation(world_from_cam[:, :3])
        values = (*world_from_cam[:, 3], *quat_xyzw)
        lines.append(f"{index} {' '.join(f'{value:.9g}' for value in values)}\n")
    path.write_text("".join(lines), encoding="utf-8")


def _on_grid(depth: Float32Array) -> Float32Array:
    """Depths at the middles of the grid's cells."""
    if depth.shape == _GRID:
        return depth
    rows, columns = (
        ((np.arange(number) + 0.5) * size / number).astype(np.intp)
        for number, size in zip(_GRID, depth.shape, strict=True)
    )
    return np.asarray(depth[np.ix_(rows, columns)])


def _write_views(path: Path, depths: Iterable[Float32Array], cam_from_world: Float64Array) -> None:
    on_grid = np.array([_on_grid(depth) for depth in depths])
    np.savez_compressed(
        path, depths_m=on_grid, cam_from_world=cam_from_world, intrinsics=_INTRINSICS, size=SIZE
    )
