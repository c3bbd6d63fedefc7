"""The options that every bundle adjustment of the engine begins with, and long ones in slices."""

from __future__ import annotations

import pycolmap

_RESIDUALS_OF_SLICE = 400_000  # times steps of one call, some 0.2 CPU s
_LEAST_STEPS = 2  # of a call: each begins with a careful step


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


def adjust_in_slices(
    options: pycolmap.BundleAdjustmentOptions,
    problem: pycolmap.BundleAdjustmentConfig,
    reconstruction: pycolmap.Reconstruction,
) -> None:
    """Adjusts what a configuration says, in place, in several calls where it is large.

    COLMAP's configurable adjuster holds the interpreter lock in each call; between two of them
    other threads get it. The solver begins each with a small trust region again.
    """
    num_left = options.ceres.solver_options.max_num_iterations
    num_residuals = max(1, problem.num_residuals(reconstruction))
    num_steps = max(_LEAST_STEPS, _RESIDUALS_OF_SLICE // num_residuals)
    options.ceres.solver_options.max_num_iterations = min(num_steps, num_left)
    adjuster = pycolmap.create_default_bundle_adjuster(options, problem, reconstruction)
    not_yet = pycolmap.BundleAdjustmentTerminationType.NO_CONVERGENCE
    while adjuster.solve().termination_type == not_yet and num_left > num_steps:
        num_left -= num_steps
        # The adjuster has a copy of the options.
        adjuster.options.ceres.solver_options.max_num_iterations = min(num_steps, num_left)
