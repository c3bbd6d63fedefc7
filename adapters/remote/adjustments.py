"""Global bundle adjustment on other machines; what they do not do is done here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from adapters.remote.plain_maps import map_to_plain, take_changes
from adapters.remote.tasks import RemoteTasks

if TYPE_CHECKING:
    import pycolmap

    from engine.mapping.model.calibration_control import CalibrationControl

logger = logging.getLogger(__name__)

_LEAST_OBSERVATIONS = 5_000  # a smaller map is adjusted here in the time that sending it takes


class RemoteAdjuster:
    """A `GlobalAdjuster`: maps go to a task and come back with the same bits as by one here.

    Args:
        tasks: adjust maps.
        least_observations: of a map that is sent.
    """

    def __init__(
        self, tasks: RemoteTasks, *, least_observations: int = _LEAST_OBSERVATIONS
    ) -> None:
        self._tasks = tasks
        self._least_observations = least_observations

    def __call__(
        self,
        reconstruction: pycolmap.Reconstruction,
        *,
        calibration: CalibrationControl,
        max_iterations: int,
        num_threads: int,
    ) -> None:
        """Adjusts a reconstruction in place; see `adjust_globally`."""
        from engine.mapping.model.bundle_adjustment import adjust_globally

        limits = {"max_iterations": max_iterations, "num_threads": num_threads}
        if reconstruction.compute_num_observations() >= self._least_observations:
            arrays = map_to_plain(reconstruction, calibration)
            adjusted = self._tasks.result("adjust", limits, arrays, stage="adjustments")
            if adjusted is not None:
                try:
                    take_changes(reconstruction, calibration, arrays=arrays, changes=adjusted[1])
                except (KeyError, TypeError, ValueError) as error:
                    logger.warning("an adjustment came back broken and is made here: %s", error)
                else:
                    return
        adjust_globally(reconstruction, calibration=calibration, **limits)
