"""The options that every bundle adjustment of the engine begins with."""

from __future__ import annotations

import pycolmap


def adjustment_options(
    *,
    max_iterations: int,
    function_tolerance: float,
    loss_scale_px: float = 1.0,
    num_threads: int = 1,
) -> pycolmap.BundleAdjustmentOptions:
    """Options of COLMAP's adjusters with a soft L1 loss; which intrinsics change is the caller's.

    Args:
        max_iterations: steps of the solver.
        function_tolerance: relative change of the cost at which it stops.
        loss_scale_px: errors beyond it count linearly.
        num_threads: of the solver.
    """
    options = pycolmap.BundleAdjustmentOptions(print_summary=False)
    options.ceres.loss_function_type = pycolmap.LossFunctionType.SOFT_L1
    options.ceres.loss_function_scale = loss_scale_px
    options.ceres.solver_options.max_num_iterations = max_iterations
    options.ceres.solver_options.function_tolerance = function_tolerance
    options.ceres.solver_options.num_threads = num_threads
    return options
