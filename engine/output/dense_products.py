"""Products of the dense map, in ``products/`` of the run folder, each replaced in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.config import DenseConfig
from engine.cpu_time import Stage, charged_to
from engine.dense.dense_map import DenseMap
from engine.dense.fusion import FusionLimits, fuse
from engine.dense_types import DensePoints, KeyframePoses
from engine.errors import JournalError
from engine.output.dense_ply import DENSE_PLY_NAME, camera_comments, write_dense_ply
from engine.output.ground_products import GroundProducts
from engine.output.run_folder import PRODUCTS_FOLDER
from engine.types import FrameId, GpsFix, Verdict, VerdictLevel

DENSE_PLY = f"{PRODUCTS_FOLDER}/{DENSE_PLY_NAME}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseWorld:
    """The world that products are in: that of a snapshot's main map."""

    poses: KeyframePoses
    origin: GpsFix | None  # of east, north, up in metres; None: the world is in the map's unit
    verdict: Verdict  # on the map


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WrittenPoints:
    """Points of a dense map that were written."""

    num_keyframes: int
    num_points: int
    versions: dict[FrameId, int]  # of the depth maps that are right


@charged_to(Stage.DENSE_FUSION)
def write_ground(
    run_path: Path, world: DenseWorld, ground: GroundProducts, versions: Mapping[FrameId, int]
) -> None:
    """Writes the products of the ground from the points that it collected last.

    Args:
        run_path: of the run folder.
        world: of the points.
        ground: has collected them.
        versions: of the depth maps, by keyframe.

    Raises:
        JournalError: they cannot be written; the former files are as they were.
    """
    folder = run_path / PRODUCTS_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        ground.write(folder, world.poses, versions, comments=_comments(world))
    except OSError as error:
        raise JournalError(f"{folder}: cannot be written: {error.strerror}") from error


@charged_to(Stage.DENSE_FUSION)
def write_dense_points(
    run_path: Path,
    points: Iterable[DensePoints],
    world: DenseWorld,
    config: DenseConfig,
    *,
    ground: GroundProducts | None = None,
    between: Callable[[], None] = lambda: None,
) -> int:
    """Fuses points of keyframes and writes them to ``products/dense.ply``.

    Args:
        run_path: of the run folder.
        points: of keyframes in the world.
        world: of the points.
        config: how they are fused.
        ground: collects the fused points, too.
        between: is called after each part of space, before the file replaces the former one; what
            it raises ends the writing.

    Returns:
        The number of points.

    Raises:
        JournalError: they cannot be written; the former file is as it was.
    """
    path = run_path / DENSE_PLY
    try:
        path.parent.mkdir(exist_ok=True)
        fused = fuse(
            points,
            voxel_size=config.voxel_size or None,
            limits=FusionLimits(folder=path.parent),
        )
        fused = _each(fused, between)
        if ground is not None:
            fused = ground.collected(fused, world.poses, origin=world.origin)
        comments = [*_comments(world), *camera_comments(world.poses)]
        return write_dense_ply(path, fused, comments=comments)
    except OSError as error:
        raise JournalError(f"{path}: cannot be written: {error.strerror}") from error


def write_points_of(
    dense_map: DenseMap,
    run_path: Path,
    world: DenseWorld,
    config: DenseConfig,
    *,
    ground: GroundProducts | None = None,
    between: Callable[[], None] = lambda: None,
) -> WrittenPoints:
    """Writes the points of a dense map where its keyframes are in a world.

    Args:
        dense_map: gives the points.
        run_path: of the run folder.
        world: of the points.
        config: how they are fused.
        ground: collects the fused points, too.
        between: is called before each keyframe and after each part of space; what it raises ends
            the writing.

    Raises:
        JournalError: they cannot be written; the former file is as it was.
    """
    placed = dense_map.placed(world.poses)
    num_points = write_dense_points(
        run_path,
        _before_each(dense_map.points(placed), between),
        world,
        config,
        ground=ground,
        between=between,
    )
    right = {one.frame_id for one in placed if not one.is_wrong}
    return WrittenPoints(
        num_keyframes=len(placed),
        num_points=num_points,
        versions={i: v for i, v in dense_map.depth_versions().items() if i in right},
    )


def _before_each(parts: Iterable[DensePoints], before: Callable[[], None]) -> Iterator[DensePoints]:
    for part in parts:
        before()
        yield part


def _each(parts: Iterable[DensePoints], between: Callable[[], None]) -> Iterator[DensePoints]:
    for part in parts:
        yield part
        between()


def _comments(world: DenseWorld) -> list[str]:
    """Lines for the header: the frame, and what is said against the map."""
    frame = "map units, as in the snapshot's sparse/0"
    if (origin := world.origin) is not None:
        frame = (
            f"metres east, north, up from latitude {origin.latitude_deg:.8f},"
            f" longitude {origin.longitude_deg:.8f}, altitude {origin.altitude_m}"
        )
    lines = [f"frame: {frame}", f"verdict on the map: {world.verdict.level.value}"]
    if world.verdict.level is not VerdictLevel.GOOD:
        lines += [reason.sentence for reason in world.verdict.reasons]
    return lines
