"""What a program hands over, checked where it does: a run must not break on it later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import PurePath
from typing import Any

import numpy as np

from engine.camera_models import CAMERA_MODELS
from engine.frame_names import END_UNIX_TIME_S
from engine.types import CalibrationOrigin, GpsFix, IntrinsicsPrior

_NUMBERS_OF_FIX = ("latitude_deg", "longitude_deg")
_NUMBERS_OR_NONE_OF_FIX = ("altitude_m", "accuracy_m", "vertical_accuracy_m")


def finite_number(value: object, *, name: str) -> float:
    """A number, NumPy's among them, as a float of Python.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: {number} is no finite number")
    return number


def checked_time(value: object) -> float:
    """A time in seconds as a float of Python.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or so large that it is not in seconds.
    """
    seconds = finite_number(value, name="captured_at_s")
    if seconds >= END_UNIX_TIME_S:
        raise ValueError(
            f"captured_at_s: {seconds:g} s is beyond the year 9999: expected seconds, not"
            " milliseconds or nanoseconds"
        )
    return seconds


def checked_camera(value: object) -> str:
    """The name of a camera.

    Raises:
        TypeError: it is no string.
        ValueError: no file can hold it: it has half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise TypeError(f"camera: expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"camera: {value!r} is no text: {error.reason}") from error
    return str(value)


def checked_fix(value: object, *, name: str) -> GpsFix:
    """A position with floats of Python.

    Raises:
        TypeError: it is no `GpsFix`, or has something else for a number.
        ValueError: a number is not finite, or the position is none on the globe.
    """
    if not isinstance(value, GpsFix):
        raise TypeError(f"{name}: expected a GpsFix, got {type(value).__name__}")
    given: dict[str, Any] = {one: getattr(value, one) for one in _NUMBERS_OF_FIX}
    for one in _NUMBERS_OR_NONE_OF_FIX:
        if getattr(value, one) is not None:
            given[one] = getattr(value, one)
    floats: dict[str, Any] = {
        one: finite_number(number, name=f"{name}.{one}") for one, number in given.items()
    }
    limits_deg = {"latitude_deg": 180.0 if value.is_order_unsure else 90.0, "longitude_deg": 180.0}
    for one, limit_deg in limits_deg.items():
        if abs(floats[one]) > limit_deg:
            raise ValueError(
                f"{name}.{one}: {floats[one]} is not between {-limit_deg:g} and {limit_deg:g}"
            )
    return replace(value, **floats)


def checked_prior(value: object) -> IntrinsicsPrior:
    """What is known of a lens, with floats of Python.

    Raises:
        TypeError: it is no `IntrinsicsPrior`, or has something else for a number.
        ValueError: a number is not finite, the focal length is below 0 or its deviation not above
            it, the model is not one of COLMAP's, or its parameters are not those of the model.
    """
    if not isinstance(value, IntrinsicsPrior):
        raise TypeError(f"intrinsics: expected an IntrinsicsPrior, got {type(value).__name__}")
    if not isinstance(value.origin, CalibrationOrigin):
        kind = type(value.origin).__name__
        raise TypeError(f"intrinsics.origin: expected a CalibrationOrigin, got {kind}")
    model = value.camera_model
    if model is not None and (not isinstance(model, str) or model not in CAMERA_MODELS):
        raise ValueError(f"intrinsics.camera_model: {model!r} is none of COLMAP's models")
    focal_px = finite_number(value.focal_px, name="intrinsics.focal_px")
    if focal_px < 0.0:
        raise ValueError(f"intrinsics.focal_px: {focal_px} is below 0; 0: unknown")
    sigma_ratio = finite_number(value.focal_sigma_ratio, name="intrinsics.focal_sigma_ratio")
    if sigma_ratio <= 0.0:
        raise ValueError(f"intrinsics.focal_sigma_ratio: {sigma_ratio} is not above 0")
    return replace(
        value,
        focal_px=focal_px,
        focal_sigma_ratio=sigma_ratio,
        params=None if value.params is None else _checked_params(value.params, model),
    )


def _checked_params(params: object, model: str | None) -> tuple[float, ...]:
    if not isinstance(params, tuple | list | np.ndarray):
        kind = type(params).__name__
        raise TypeError(f"intrinsics.params: expected a tuple of numbers, got {kind}")
    numbers = tuple(finite_number(one, name="intrinsics.params") for one in params)
    if model is None:
        raise ValueError("intrinsics.params: a camera_model is missing")
    wanted = CAMERA_MODELS[model]
    if len(numbers) != wanted.num_params or min(numbers[: wanted.num_positive]) <= 0.0:
        raise ValueError(
            f"intrinsics.params: {model} has {wanted.num_params}, the first"
            f" {wanted.num_positive} of them above 0, got {numbers}"
        )
    return numbers


def plain_value(value: object) -> object:
    """A setting's value that JSON has no notation for, as one that it has.

    Raises:
        TypeError: there is none.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no value of a setting")


def checked_overrides(overrides: object) -> Mapping[str, object]:
    """Settings by ``section.key``.

    Raises:
        TypeError: they are no mapping from strings.
    """
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise TypeError(
            f"overrides: expected a mapping by section.key, strings, got {overrides!r:.80}"
        )
    return overrides
