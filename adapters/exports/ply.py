"""Points as a PLY file."""

from __future__ import annotations

from adapters.exports.job import ExportJob
from engine.errors import SnapshotError

POINTS_NAME = "points.ply"


def write_points(job: ExportJob) -> None:
    """Writes the map's points.

    Raises:
        SnapshotError: they cannot be written.
    """
    path = job.to / POINTS_NAME
    job.reconstruction.export_PLY(path)
    # pycolmap does not notice a full disk; a point takes three floats and three bytes.
    if path.stat().st_size < 15 * job.reconstruction.num_points3D():
        raise SnapshotError(f"{path.name} is cut short; the disk may be full")
