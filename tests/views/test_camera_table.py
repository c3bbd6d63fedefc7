"""The table of cameras that viewers show."""

from __future__ import annotations

from adapters.views.camera_table import camera_table
from engine.types import CalibrationOrigin, CameraFigures


def figures(*, key: str = "phone|1920x1080", doubts: tuple[str, ...] = ()) -> CameraFigures:
    return CameraFigures(
        camera_key=key,
        model="SIMPLE_RADIAL",
        width=1920,
        height=1080,
        params=(1500.0, 960.0, 540.0, 0.01),
        focal_px=1500.0,
        fov_deg=65.2,
        num_registered=17,
        origin=CalibrationOrigin.EXIF_35MM,
        prior_focal_px=1470.0,
        prior_sigma_ratio=0.053,
        observed_sigma_ratio=0.01,
        is_constant=False,
        is_held=bool(doubts),
        doubts=doubts,
    )


def test_a_row_for_each_camera() -> None:
    lines = camera_table([figures(), figures(key="other")]).splitlines()
    assert len(lines) == 4
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 8
    assert "phone/1920x1080" in lines[2]  # a bar would begin another cell
    for cell in ("SIMPLE_RADIAL", "1500 px |", "65°", "exif 35mm, ±5%", "+2.0%", "17"):
        assert cell in lines[2]


def test_doubts_stand_below_the_table_with_their_camera() -> None:
    table = camera_table([figures(doubts=("k1 is 14.3", "held"))])
    assert "1500 px (held)" in table
    assert table.endswith("**phone|1920x1080**: k1 is 14.3\n\n**phone|1920x1080**: held")


def test_no_cameras_no_table() -> None:
    assert camera_table([]) == ""
