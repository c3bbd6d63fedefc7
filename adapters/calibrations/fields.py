"""YAML of calibration files: parsed to plain data, and read field by field.

Nothing but numbers, words, lists and mappings comes out of a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from engine.errors import ConfigError
from engine.plain_yaml import PlainLoader, load_plain_yaml

Fields = Mapping[str, Any]

_OPENCV_HEADER = re.compile(r"\A\ufeff?%YAML[: ][0-9.]+[ \t]*\r?\n")


class _OpenCVLoader(PlainLoader):
    """YAML with the tags of OpenCV's matrices."""


def _matrix_of(loader: _OpenCVLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


for _name in ("opencv-matrix", "opencv-nd-matrix"):
    _OpenCVLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _matrix_of)


def parse_fields(text: str, *, origin: str) -> Fields:
    """The mapping that a YAML text holds, with OpenCV's header or without.

    Raises:
        ConfigError: it is no YAML, holds what is refused, or is no mapping.
    """
    try:
        loaded = load_plain_yaml(_OPENCV_HEADER.sub("", text), loader=_OpenCVLoader)
    except ValueError as error:
        raise ConfigError(f"{origin}: is not readable YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{origin}: holds no calibration")
    return {str(key): value for key, value in loaded.items()}


def first_of(fields: Fields, names: Sequence[str]) -> Any:
    """The value of the first of these names that the fields have, in any spelling; else None."""
    by_name = {_plain(key): value for key, value in reversed(list(fields.items()))}
    return next((by_name[name] for name in map(_plain, names) if name in by_name), None)


def sections_of(fields: Fields) -> dict[str, Fields]:
    """The mappings among the values, by name."""
    return {
        name: {str(key): value for key, value in section.items()}
        for name, section in fields.items()
        if isinstance(section, dict)
    }


def numbers(value: Any, *, what: str, origin: str) -> list[float]:
    """All numbers of a value, row by row: a number, a list, a list of lists, or a matrix.

    Raises:
        ConfigError: something in it is no number, or a matrix does not hold what it says.
    """
    if isinstance(value, Mapping):
        return _matrix(value, what=what, origin=origin)
    if isinstance(value, list):
        return [n for part in value for n in numbers(part, what=what, origin=origin)]
    try:
        if isinstance(value, bool) or value is None:
            raise TypeError
        if isinstance(value, str):
            value = value.replace(".Nan", "nan").replace(".Inf", "inf")  # as OpenCV spells them
        return [float(value)]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{origin}: {what} holds {_short(value)}, which is no number") from error


def whole_number(value: Any, *, what: str, origin: str) -> int:
    """A whole number.

    Raises:
        ConfigError: it is none.
    """
    found = numbers(value, what=what, origin=origin)
    if len(found) != 1 or not found[0].is_integer():
        raise ConfigError(f"{origin}: {what} is {_short(value)}, which is no whole number")
    return int(found[0])


def _matrix(value: Mapping[Any, Any], *, what: str, origin: str) -> list[float]:
    """The values of a matrix written as rows, cols and data."""
    if "data" not in value:
        raise ConfigError(f"{origin}: {what} is no matrix")
    data = numbers(value["data"], what=what, origin=origin)
    sides = [value["rows"], value["cols"]] if {"rows", "cols"} <= value.keys() else None
    sides = value.get("sizes", sides)
    if sides is not None:
        shape = [int(n) for n in numbers(sides, what=f"the size of {what}", origin=origin)]
        if math.prod(shape) != len(data):
            raise ConfigError(
                f"{origin}: {what} says {' x '.join(map(str, shape))} and holds {len(data)} numbers"
            )
    return data


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
