"""Camera table: the cameras of a map as a table in Markdown, with what is doubted about them."""

from __future__ import annotations

from collections.abc import Sequence

from engine.types import CameraFigures

_COLUMNS = ("camera", "model", "focal length", "view", "from", "moved", "keyframes")
_HEAD = f"| {' | '.join(_COLUMNS)} |\n|{len(_COLUMNS) * '---|'}"


def camera_table(cameras: Sequence[CameraFigures]) -> str:
    """The table, and below it a line for each doubt; "" without cameras."""
    if not cameras:
        return ""
    rows = [_row(camera) for camera in cameras]
    doubts = [f"**{camera.camera_key}**: {doubt}" for camera in cameras for doubt in camera.doubts]
    return "\n\n".join(["\n".join([_HEAD, *rows]), *doubts])


def _row(camera: CameraFigures) -> str:
    state = " (held)" if camera.is_held else " (fixed)" if camera.is_constant else ""
    cells = (
        camera.camera_key.replace("|", "/"),
        camera.model,
        f"{camera.focal_px:.0f} px{state}",
        f"{camera.fov_deg:.0f}°",
        f"{camera.origin.value.replace('_', ' ')}, ±{camera.prior_sigma_ratio:.0%}",
        f"{camera.moved_ratio:+.1%}",
        f"{camera.num_registered}",
    )
    return f"| {' | '.join(cells)} |"
