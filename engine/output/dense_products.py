"""Products of the dense map, in ``products/`` of the run folder, each replaced in one step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import DenseConfig
from engine.cpu_time import Stage, charged_to
from engine.dense.fusion import FusionLimits, fuse
from engine.dense_types import DensePoints, KeyframePoses
from engine.errors import JournalError
from engine.output.dense_ply import DENSE_PLY_NAME, write_dense_ply
from engine.output.run_folder import PRODUCTS_FOLDER
from engine.types import Verdict, VerdictLevel

if TYPE_CHECKING:
    from engine.mapping.positions.georeferencing import Placement

DENSE_PLY = f"{PRODUCTS_FOLDER}/{DENSE_PLY_NAME}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseWorld:
    """The world that products are in: that of a snapshot's main map."""

    poses: KeyframePoses
    placement: Placement | None  # on the globe
    is_in_metres: bool  # east, north, up of the placement's origin; else in the map's unit
    verdict: Verdict  # on the map


@charged_to(Stage.DENSE_FUSION)
def write_dense_points(
    run_path: Path, points: Iterable[DensePoints], world: DenseWorld, config: DenseConfig
) -> int:
    """Fuses points of keyframes and writes them to ``products/dense.ply``.

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
        return write_dense_ply(path, fused, comments=_comments(world))
    except OSError as error:
        raise JournalError(f"{path}: cannot be written: {error.strerror}") from error


def _comments(world: DenseWorld) -> list[str]:
    """Lines for the header: the frame, and what is said against the map."""
    frame = "map units, as in the snapshot's sparse/0"
    if world.is_in_metres and world.placement is not None:
        origin = world.placement.georeference.origin
        frame = (
            f"metres east, north, up from latitude {origin.latitude_deg:.8f},"
            f" longitude {origin.longitude_deg:.8f}, altitude {origin.altitude_m}"
        )
    lines = [f"frame: {frame}", f"verdict on the map: {world.verdict.level.value}"]
    if world.verdict.level is not VerdictLevel.GOOD:
        lines += [reason.sentence for reason in world.verdict.reasons]
    return lines
