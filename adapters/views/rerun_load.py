"""Rerun: what a run spends its time on, and what waits, as curves in a tab of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.views.rerun_blueprint import LOAD_PLOTS
from engine.cpu_time import Stage
from engine.events import LoadMeasured

if TYPE_CHECKING:
    from rerun import RecordingStream

_STAGES = {
    "describe": (Stage.DECODE, Stage.DESCRIBE),
    "match": (Stage.MATCH, Stage.VERIFY, Stage.PLACES),
    "track": (Stage.TRACK, Stage.POSE_FRAMES),
    "map": (Stage.REGISTER, Stage.TRIANGULATE, Stage.LOCAL_ADJUSTMENT, Stage.MAPPING),
    "adjust": (Stage.GLOBAL_ADJUSTMENT, Stage.WINDOWS, Stage.LENS_SEARCH, Stage.VERDICT),
    "dense": (Stage.DENSE_DEPTH, Stage.DENSE_FUSION),
    "output": (Stage.JOURNAL, Stage.SNAPSHOTS, Stage.TABLES, Stage.VIEWS),
    "loop": (Stage.EVENT_LOOP,),
}


class LoadDrawing:
    """Draws the load of a run below ``load`` in a recording."""

    def __init__(self, recording: RecordingStream) -> None:
        """Styles the curves."""
        import rerun as rr

        self._recording = recording
        for plot in LOAD_PLOTS:
            for one in plot.metrics:
                style = rr.SeriesLines(names=one.label, colors=one.color, widths=1.5)
                recording.log(f"load/{one.name}", style, static=True)

    def draw(self, measured: LoadMeasured) -> None:
        """Draws one measurement at the time that the recording has."""
        import rerun as rr

        if measured.period_s <= 0.0:
            return
        for name, stages in _STAGES.items():
            used_s = sum(measured.cpu_s.get(stage, 0.0) for stage in stages)
            self._recording.log(f"load/cpu_{name}", rr.Scalars(used_s / measured.period_s))
        self._recording.log("load/late", rr.Scalars(1e3 * measured.loop_late_s))
        for queue, wait_s in measured.queue_wait_s.items():
            self._recording.log(f"load/wait_{queue}", rr.Scalars(1e3 * wait_s))
