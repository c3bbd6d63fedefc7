"""The figures of ``summary.json``: what the events told, the map, and what the process took."""

from __future__ import annotations

import resource
import sys
from typing import Any

from engine.mapping.mapper import MappingPipeline
from engine.output.statistics import RunStatistics


def summary_figures(
    statistics: RunStatistics, pipeline: MappingPipeline, *, wall_s: float, stopped_by: str
) -> dict[str, Any]:
    """The figures of a run; the mapping thread calls it, or nobody else uses the map any more.

    Args:
        statistics: has seen every event.
        pipeline: the map as it is saved.
        wall_s: how long the run took.
        stopped_by: what ended it.
    """
    sparse_map = pipeline.sparse_map
    reconstruction = sparse_map.reconstruction
    scale = pipeline.metric_scale()
    placement = pipeline.placement
    return {
        **statistics.figures(),
        "registered_keyframes": sparse_map.num_registered,
        "num_points3D": sparse_map.num_points3D,
        "num_observations": reconstruction.compute_num_observations(),
        "mean_track_length": reconstruction.compute_mean_track_length(),
        "mean_reprojection_error_px": sparse_map.mean_reprojection_error_px(),
        "frames_interpolated": pipeline.num_interpolated_frames(),
        "components": int(pipeline.is_initialized) + len(pipeline.separate_maps),
        "georeferenced": placement is not None,
        "georeference": None if placement is None else placement.as_record(with_residuals=True),
        "gps_rmse_m": pipeline.gps_rmse_m(),
        "metres_per_map_unit": scale.metres_per_map_unit if scale else None,
        "peak_rss_mb": _peak_rss_mb(),
        "wall_s": wall_s,
        "cpu_s": _cpu_s(),
        "stopped_by": stopped_by,
    }


def _cpu_s() -> float:
    """CPU seconds of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0 * 1024.0 if sys.platform == "darwin" else 1024.0)
