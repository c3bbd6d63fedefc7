"""Depth without images: as deep everywhere as the median point of the keyframe."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.dense.depth import DepthOptions, SeeDepth
from engine.dense_types import DenseImage, DepthEstimate, DepthMap, DepthProblem, DepthStatus
from engine.geometry import compose_poses, invert_pose, transform_points
from engine.types import FrameId

EDGE_PX = 64


def flat_depth(problem: DepthProblem) -> DepthMap:
    """A depth map as deep everywhere as the median point of its keyframe."""
    view = problem.view
    depths = transform_points(view.cam_from_world, view.points3D_in_world)[:, 2]
    shape = (EDGE_PX * 3 // 4, EDGE_PX)
    neighbours = problem.neighbours[:2]
    return DepthMap(
        frame_id=view.frame_id,
        pinhole=np.array([50.0, 50.0, shape[1] / 2, shape[0] / 2]),
        depth=np.full(shape, np.median(depths), np.float32),
        relative_error=np.full(shape, 0.002, np.float32),
        num_agreeing=np.full(shape, 2, np.uint8),
        colors=np.full((*shape, 3), 128, np.uint8),
        neighbour_ids=np.array([one.frame_id for one in neighbours], np.int64),
        neighbour_from_keyframe=np.array(
            [
                compose_poses(one.cam_from_world, invert_pose(view.cam_from_world))
                for one in neighbours
            ]
        ),
    )


def made(
    problem: DepthProblem,
    images: Mapping[FrameId, DenseImage],
    options: DepthOptions,
    see_depth: SeeDepth | None = None,
) -> DepthEstimate:
    """An estimate that always succeeds, whatever the images show."""
    del images, options, see_depth
    return DepthEstimate(
        status=DepthStatus.MADE, reason="flat", depth_map=flat_depth(problem), cpu_s=0.001
    )
