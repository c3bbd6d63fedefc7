"""Global bundle adjustment on other machines; what they do not do is done here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.remote.messages import Arrays, Fields
from adapters.remote.plain_maps import map_to_plain, take_changes
from adapters.remote.tasks import RemoteTasks

if TYPE_CHECKING:
    import pycolmap

    from engine.mapping.model.calibration_control import CalibrationControl

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

            def read(_: Fields, changes: Arrays) -> bool:
                take_changes(reconstruction, calibration, arrays=arrays, changes=changes)
                return True

            if self._tasks.result("adjust", limits, arrays, stage="adjustments", read=read):
                return
        adjust_globally(reconstruction, calibration=calibration, **limits)
