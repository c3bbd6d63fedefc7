"""What COLMAP's files lack of a map's cameras goes through JSON and back."""

from __future__ import annotations

import json
import math

import pytest

from engine.mapping.model.calibration_control import CalibrationState, Hold
from engine.mapping.model.map_record import camera_records, prior_of, state_of
from tests.support.synthetic import SyntheticWorld, map_of_keyframes, straight_path


@pytest.mark.parametrize(
    "state",
    [
        None,
        CalibrationState(num_keyframes=3, focal_sigma_ratio=math.inf),
        CalibrationState(
            num_keyframes=9,
            focal_sigma_ratio=0.2,
            hold=Hold.UNCERTAIN,
            holds_distortion=True,
            reason="the images say nothing",
        ),
    ],
)
def test_cameras_are_read_as_they_were_written(state: CalibrationState | None) -> None:
    sparse_map = map_of_keyframes(SyntheticWorld(straight_path(3)))
    if state is not None:
        sparse_map.calibration.set_state(1, state)
    written = json.dumps(camera_records(sparse_map), allow_nan=False)
    record = json.loads(written)["camera"]
    assert record["camera_id"] == 1
    assert prior_of(record) == sparse_map.camera_prior("camera")
    assert state_of(record) == state
