"""Rerun geography: the GPS track of frames on the viewer's map of the world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.views.rerun_blueprint import Color
from engine.types import GpsFix

if TYPE_CHECKING:
    from rerun import RecordingStream

_TRACK_COLOR: Color = (255, 193, 84, 255)
_HERE_COLOR: Color = (255, 255, 255, 255)
_MIN_STEP_DEG = 2e-6  # about 0.2 m
_MAX_FIXES = 4096  # then every second one is left out


class GeographyDrawing:
    """Draws the GPS positions of frames as a track that ends at the newest one."""

    def __init__(self, recording: RecordingStream) -> None:
        self._recording = recording
        self._track_deg: list[tuple[float, float]] = []

    def draw(self, fix: GpsFix) -> None:
        """Adds the position of the newest frame."""
        import rerun as rr

        here_deg = fix.latitude_deg, fix.longitude_deg
        radii = rr.Radius.ui_points(6.0)
        self._recording.log(
            "geo/here", rr.GeoPoints(lat_lon=[here_deg], radii=radii, colors=[_HERE_COLOR])
        )
        if self._track_deg and _step_deg(self._track_deg[-1], here_deg) < _MIN_STEP_DEG:
            return
        self._track_deg.append(here_deg)
        if len(self._track_deg) > _MAX_FIXES:
            del self._track_deg[1:-1:2]
        track = rr.GeoLineStrings(
            lat_lon=[self._track_deg], colors=[_TRACK_COLOR], radii=rr.Radius.ui_points(1.5)
        )
        self._recording.log("geo/track", track)


def _step_deg(one_deg: tuple[float, float], other_deg: tuple[float, float]) -> float:
    return max(abs(one - other) for one, other in zip(one_deg, other_deg, strict=True))
