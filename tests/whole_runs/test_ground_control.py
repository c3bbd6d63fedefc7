"""A flight over the town that is laid onto its ground control points at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from adapters import cli
from adapters.town.source import SyntheticTown, TownOptions
from engine.config import SourcesConfig
from engine.geo.georeference import places_on_globe
from engine.types import Float64Array, FrameId, GpsFix

OPTIONS = TownOptions(path="lawnmower", num_frames=30, width=320, height=240)
ORIGIN = GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=430.0)
NOISE_PX = 0.5
WRONG, WRONG_BY_M = "P2", 3.0
NUM_CONTROL, NUM_CHECK = 7, 3

pytestmark = pytest.mark.usefixtures("towns_painted_once")


def town() -> SyntheticTown:
    return SyntheticTown(OPTIONS, next_frame_id=lambda: FrameId(1), config=SourcesConfig())


def marked_points() -> list[tuple[Float64Array, dict[str, Float64Array]]]:
    """Places on the ground, 15 m apart at least, and where at least five images show each."""
    flown = town()
    fx, fy, cx, cy = flown.intrinsics
    poses = [pose for _, pose in flown.ground_truth()]
    centers = np.array([-pose[:, :3].T @ pose[:, 3] for pose in poses])
    rng = np.random.default_rng(5)
    found: list[tuple[Float64Array, dict[str, Float64Array]]] = []
    while len(found) < NUM_CONTROL + NUM_CHECK:
        place = np.append(rng.uniform(centers[:, :2].min(axis=0), centers[:, :2].max(axis=0)), 0.0)
        marks = {}
        for index, pose in enumerate(poses):
            x, y, depth = pose[:, :3] @ place + pose[:, 3]
            xy = np.array([fx * x / depth + cx, fy * y / depth + cy])
            if (
                depth > 1.0
                and (xy > 4.0).all()
                and (xy < (OPTIONS.width - 4, OPTIONS.height - 4)).all()
            ):
                marks[f"{index:06d}.jpg"] = xy
        is_apart = all(np.linalg.norm(place - other) > 15.0 for other, _ in found)
        if len(marks) >= 5 and is_apart:
            found.append((place, marks))
    return found


def write_gcp(path: Path, *, wrong: str = "") -> None:
    points = marked_points()
    rng = np.random.default_rng(0)
    on_globe = places_on_globe(np.array([place for place, _ in points]), origin=ORIGIN)
    rows = ["EPSG:4326"]
    for number, ((_, marks), (latitude, longitude, height)) in enumerate(
        zip(points, on_globe.tolist(), strict=True)
    ):
        name = f"P{number}" if number < NUM_CONTROL else f"CHK{number}"
        up_m = WRONG_BY_M if name == wrong else 0.0
        for image, xy in marks.items():
            x, y = xy + rng.normal(scale=NOISE_PX, size=2)
            geo = f"{longitude:.10f} {latitude:.10f} {height + up_m:.3f}"
            rows.append(f"{geo} {x:.2f} {y:.2f} {image} {name}")
    path.write_text("\n".join(rows))


def reconstruct(out: Path, gcp: Path) -> Result:
    source = (
        f"synthetic:town?path={OPTIONS.path}&frames={OPTIONS.num_frames}"
        f"&width={OPTIONS.width}&height={OPTIONS.height}"
    )
    command = ["run", source, "--out", str(out), "--view", "none", "--quiet", "--gcp", str(gcp)]
    command += ["--set", "dense.enabled=false"]
    return CliRunner().invoke(cli.app, command)


def gcp_of(out: Path) -> list[dict[str, Any]]:
    found = json.loads((out / "summary.json").read_text())["georeference"]["gcp"]
    return list(found)


@pytest.mark.slow
def test_a_flight_over_the_town_is_laid_onto_its_ground_control(tmp_path: Path) -> None:
    out, gcp = tmp_path / "run", tmp_path / "gcp_list.txt"
    write_gcp(gcp)
    result = reconstruct(out, gcp)
    assert result.exit_code == 0, result.output
    assert f"map laid onto {NUM_CONTROL} control points" in result.output
    checks_m = np.array([one["error_m"] for one in gcp_of(out) if one["is_check"]])
    assert checks_m.shape == (NUM_CHECK, 3)
    rms_m = float(np.sqrt((checks_m**2).sum(axis=1).mean()))
    assert 0.002 < rms_m < 0.5  # a pixel is a fifth of a metre on the ground
    write_gcp(gcp, wrong=WRONG)
    again = CliRunner().invoke(cli.app, ["georeference", str(out), "--gcp", str(gcp)])
    assert again.exit_code == 0, again.output
    (wrong,) = [one for one in gcp_of(out) if not (one["is_used"] or one["is_check"])]
    assert wrong["name"] == WRONG
    assert wrong["error_m"][2] == pytest.approx(-WRONG_BY_M, abs=1.0)
    assert f"control point {WRONG} contradicts the others" in again.output
    gcp.write_text("nothing")
    refused = reconstruct(tmp_path / "other", gcp)
    assert refused.exit_code == cli.REFUSED
    assert not (tmp_path / "other").exists()
