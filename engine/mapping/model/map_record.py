"""What COLMAP's files do not say of a map: which cameras are its own, and what is known of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.mapping.model.calibration_control import CalibrationState, Hold
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.sparse_map import SparseMap
from engine.types import CalibrationOrigin


def camera_records(sparse_map: SparseMap) -> dict[str, dict[str, Any]]:
    """The cameras of a map by calibration key, as JSON holds them."""
    return {key: _record(sparse_map, key) for key in sparse_map.camera_keys}


def prior_of(record: Mapping[str, Any]) -> CameraPrior:
    """What was known of a camera beforehand, from its record."""
    prior = record["prior"]
    return CameraPrior(
        **{
            **prior,
            "origin": CalibrationOrigin(prior["origin"]),
            "distortion": tuple(prior["distortion"]),
        }
    )


def state_of(record: Mapping[str, Any]) -> CalibrationState | None:
    """What adjustments had found out about a camera, from its record; None: nothing yet."""
    state = record["state"]
    if state is None:
        return None
    sigma = state["focal_sigma_ratio"]
    return CalibrationState(
        **{
            **state,
            "focal_sigma_ratio": math.inf if sigma is None else sigma,
            "hold": None if state["hold"] is None else Hold(state["hold"]),
        }
    )


def _record(sparse_map: SparseMap, camera_key: str) -> dict[str, Any]:
    state = sparse_map.camera_state(camera_key)
    return {
        "camera_id": int(sparse_map.camera(camera_key).camera_id),
        "prior": asdict(sparse_map.camera_prior(camera_key)),
        "state": None if state is None else _finite(asdict(state)),
    }


def _finite(state: dict[str, Any]) -> dict[str, Any]:
    sigma = state["focal_sigma_ratio"]
    return {**state, "focal_sigma_ratio": sigma if math.isfinite(sigma) else None}
