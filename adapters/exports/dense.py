"""Dense points of a run in the world of a map of its latest snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapters.exports.dense_ply import (
    DensePlyHeader,
    header_of_moved,
    read_dense_ply_header,
    read_moved_vertices,
    similarity_onto,
)
from adapters.exports.job import ExportJob
from engine.errors import ConfigError, SnapshotError
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

DENSE_PLY = Path("products", "dense.ply")  # in a run
_FRAME = "as sparse/0 of the run's latest snapshot"
_AT_ONCE = 200_000  # points


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunDensePoints:
    """The dense points of a run, and where they lie in the world of its map."""

    path: Path
    header: DensePlyHeader
    map_from_dense: Float64Array  # (3, 4) similarity

    def batches(self, job: ExportJob) -> Iterator[NDArray[np.void]]:
        """The points in the map's world, some at once: ``xyz``, ``normal`` and ``rgb`` of each.

        Raises:
            ExportCancelledError: the export was cancelled.
            OSError: the file cannot be read.
            SnapshotError: it is not whole any more.
        """
        with self.path.open("rb") as file:
            file.seek(self.header.num_bytes)
            for rows in job.each_slice("dense points", self.header.num_points, size=_AT_ONCE):
                num = rows.stop - rows.start
                try:
                    yield read_moved_vertices(file, num, self.map_from_dense)
                except ValueError as error:
                    raise SnapshotError(f"{self.path}: {error}") from error


def open_dense(
    run: Path, reconstruction: pycolmap.Reconstruction, *, map_number: int
) -> RunDensePoints:
    """The dense points of a run, to be laid beside the cameras of a map.

    They are of a former snapshot where the run was placed on the globe later, or broke off.

    Raises:
        ConfigError: the run has none, they cannot be read, where they lie is not known, or they are
            of another map.
    """
    path = run / DENSE_PLY
    if map_number:
        raise ConfigError(f"{run}: dense points are of map 0 only")
    if not path.is_file():
        raise ConfigError(f"{run}: has no {DENSE_PLY}; dense.enabled=true makes it")
    try:
        header = read_dense_ply_header(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not header.cam_from_world:
        raise ConfigError(
            f"{path}: does not say where cameras are in its world, so that it cannot be laid beside"
            " those of the latest snapshot"
        )
    poses = {
        image_id: reconstruction.image(image_id).cam_from_world().matrix()
        for image_id in reconstruction.reg_image_ids()
    }
    onto = similarity_onto(header, poses)
    if onto is None:
        raise ConfigError(f"{path}: is of another map than the latest snapshot's sparse/0")
    return RunDensePoints(path=path, header=header, map_from_dense=onto)


def write_dense(job: ExportJob, dense: RunDensePoints, to: Path) -> None:
    """Writes dense points as a PLY file of the same form.

    Raises:
        ExportCancelledError: the export was cancelled.
        OSError: a file cannot be read or written.
        SnapshotError: the run's file is not whole any more.
    """
    with to.open("wb") as file:
        file.write(header_of_moved(dense.header, frame=_FRAME))
        for vertices in dense.batches(job):
            file.write(vertices.tobytes())
