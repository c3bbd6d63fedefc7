"""Clips of the town that no flight of the product has: turns, jumps, blackouts, look-alikes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from adapters.town import flight, renderer
from adapters.town.flight import PathName, fly, poses_from_path
from adapters.town.paint import Side, paint_box
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
_EQUAL_EDGE_M, _EQUAL_HEIGHT_M, _EQUAL_GAP_M = 10.5, 9.0, 1.2
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
_REPLACED_PATH: PathName = "orbit"  # by the outward flight
_RING_RADIUS_M, _RING_HEIGHT_M, _RING_PITCH_DEG = 37.0, 24.0, -18.0
_TURN_FRAMES = 24  # of a quarter turn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A camera's way through a town."""

    cam_from_world: Float64Array  # (N, 3, 4) metres
    is_black: BoolArray  # (N,) frames that show nothing


class Lookalikes(StrEnum):
    """Which houses of a town look the same."""

    NONE = "none"
    FACADE = "facade"  # the twenty around the plaza, each as large as ever, show one facade
    EQUAL = "equal"  # twenty of one size at like places, so that the town looks the same turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Town:
    """A town and how it is painted."""

    seed: int
    lookalikes: Lookalikes = Lookalikes.NONE

    def layout(self) -> TownLayout:
        """Where everything stands."""
        layout = lay_out_town(self.seed)
        if self.lookalikes is Lookalikes.EQUAL:
            return with_equal_houses(layout, seed=self.seed)
        return layout

    def renderer(self) -> renderer.TownRenderer:
        """Paints the town, which takes seconds."""
        layout = self.layout()
        paint = renderer._paint_textures

        def painted(layout: TownLayout, *, seed: int, width: int) -> list[Uint8Array]:
            textures = paint(layout, seed=seed, width=width)
            if self.lookalikes is Lookalikes.NONE:
                return textures
            return one_facade(textures, layout, seed=seed)

        with mock.patch.object(renderer, "_paint_textures", painted):
            return renderer.TownRenderer(
                layout,
                seed=self.seed,
                size=SIZE,
                intrinsics=_INTRINSICS,
                noise_sigma=NOISE_SIGMA,
            )


def with_equal_houses(layout: TownLayout, *, seed: int) -> TownLayout:
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
    reach = (_EQUAL_EDGE_M + _EQUAL_GAP_M) / 2
    for x, y in ((-reach, -reach), (reach, -reach), (-reach, reach), (reach, reach)):
        low = middle + (x, y) - _EQUAL_EDGE_M / 2
        high = low + _EQUAL_EDGE_M
        yield Box(
            kind=BoxKind.HOUSE,
            footprint=Rect(*map(float, (*low, *high))),
            z_min=0.0,
            z_max=_EQUAL_HEIGHT_M,
        )


def lookalike_houses(layout: TownLayout) -> list[int]:
    """The twenty houses nearest to the plaza, by their place in the layout."""
    plaza = block_rect(*PLAZA)
    middle = np.array([plaza.x_min + plaza.x_max, plaza.y_min + plaza.y_max]) / 2
    centers = layout.bounds[:, :, :2].mean(axis=1)
    nearest_first = np.argsort(np.linalg.norm(centers - middle, axis=1), kind="stable")
    houses = [int(idx) for idx in nearest_first if layout.boxes[idx].kind is BoxKind.HOUSE]
    return houses[:NUM_LOOKALIKES]


def one_facade(
    textures: Sequence[Uint8Array], layout: TownLayout, *, seed: int
) -> list[Uint8Array]:
    """The textures of a town with one facade on all walls of `lookalike_houses`.

    Every wall shows so much of it as it is wide and high, from its lower left corner on.
    """
    sides = list(Side)
    houses = lookalike_houses(layout)
    sizes = np.array([layout.bounds[idx, 1] - layout.bounds[idx, 0] for idx in houses])
    first_wall = textures[houses[0] * len(sides) + sides.index(Side.SOUTH)]
    edge, height = float(sizes[:, :2].max()), float(sizes[:, 2].max())
    largest = Box(kind=BoxKind.HOUSE, footprint=Rect(0.0, 0.0, edge, edge), z_min=0.0, z_max=height)
    texel_m = float(sizes[0, 0]) / first_wall.shape[1]
    facade = paint_box(largest, seed=seed, index=len(layout.boxes), texel_m=texel_m)
    walls = facade[sides.index(Side.SOUTH)]
    changed = list(textures)
    for house in houses:
        for number, side in enumerate(sides):
            if side not in (Side.TOP, Side.BOTTOM):
                idx = house * len(sides) + number
                rows, columns = textures[idx].shape[:2]
                changed[idx] = _cut(walls, rows, columns)
    return changed


def _cut(walls: Uint8Array, num_rows: int, num_columns: int) -> Uint8Array:
    """The lower left corner of a texture, whose rim goes on where it ends by rounding."""
    rows = np.arange(len(walls) - num_rows, len(walls)).clip(0, None)
    columns = np.arange(num_columns).clip(None, walls.shape[1] - 1)
    return np.ascontiguousarray(walls[np.ix_(rows, columns)])


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


def lookalike_town(lookalikes: Lookalikes, *, seed: int) -> Maker:
    """A maker of a walk around the plaza of a town where twenty houses look the same."""
    return partial(_make_lookalikes, lookalikes=lookalikes, seed=seed)


def _make_lookalikes(kit: Kit, folder: Path, *, lookalikes: Lookalikes, seed: int) -> Input:
    town = Town(seed=100 * kit.variation.town_seed + seed, lookalikes=lookalikes)
    write_clip(folder, "clip", around_the_plaza(kit, town), town)
    return Input(
        source="clip.mp4",
        arguments=CONFIG,
        truth="clip.txt",
        views="clip.npz",
        focal_px=FOCAL_PX,
    )


def two_flights(first_x_m: tuple[float, float], second_x_m: tuple[float, float]) -> Maker:
    """A maker of two clips, each of two lines over the town; their focal length is not known."""
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


def town_path(path: PathName, *, seed: int, num_frames: int) -> Maker:
    """A maker that points to a flight of the product's own town.

    Args:
        path: which one.
        seed: of the town.
        num_frames: of the whole path.
    """
    return partial(_make_town_path, path=path, seed=seed, num_frames=num_frames)


def _make_town_path(kit: Kit, folder: Path, *, path: PathName, seed: int, num_frames: int) -> Input:
    town = _open_town(path, seed=100 * kit.variation.town_seed + seed, num_frames=num_frames)
    write_truth(folder / "truth.txt", np.array([pose for _, pose in town.ground_truth()]))
    return Input(source=town.info.label, truth="truth.txt", focal_px=town.intrinsics[0])


def town_seen_outward(num_frames: int, *, arguments: tuple[str, ...]) -> Maker:
    """A maker that points to the product's town, flown through as in `outward_flight`.

    Args:
        num_frames: of the flight.
        arguments: of the run, which has to be in `outward_flight`, too.
    """
    return partial(_make_outward, num_frames=num_frames, arguments=arguments)


def _make_outward(kit: Kit, folder: Path, *, num_frames: int, arguments: tuple[str, ...]) -> Input:
    with outward_flight():
        town = _open_town(_REPLACED_PATH, seed=kit.variation.town_seed, num_frames=num_frames)
    poses = np.array([pose for _, pose in town.ground_truth()])
    write_truth(folder / "truth.txt", poses)
    depths = (town.render(index).depth for index in range(len(poses)))
    _write_views(folder / "truth.npz", depths, poses)
    return Input(
        source=town.info.label,
        arguments=arguments,
        truth="truth.txt",
        views="truth.npz",
        focal_px=town.intrinsics[0],
    )


def _open_town(path: PathName, *, seed: int, num_frames: int) -> SyntheticTown:
    spec = f"synthetic:town?path={path}&seed={seed}&frames={num_frames}&fps={RATE_HZ}"
    return SyntheticTown(parse_town_spec(spec), next_frame_id=lambda: FrameId(1))


@contextmanager
def outward_flight() -> Iterator[None]:
    """The town's orbit is a ring over its inner streets that looks outward, once around and on.

    On all flights of the product most frames share something; on this one, those of opposite sides
    share nothing.
    """
    bearing = np.linspace(180.0, 580.0, 81)
    angle = np.deg2rad(bearing)
    columns = [
        _RING_RADIUS_M * np.sin(angle),
        _RING_RADIUS_M * np.cos(angle),
        _RING_HEIGHT_M + np.sin(3 * angle),
        bearing,
        np.full_like(bearing, _RING_PITCH_DEG),
    ]
    rows = np.stack(columns, axis=1)
    with mock.patch.dict(flight._WAYPOINTS, {_REPLACED_PATH: lambda: rows}):
        yield


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
