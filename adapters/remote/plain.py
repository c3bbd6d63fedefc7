"""The engine's frozen products as plain values: fields that JSON has, and arrays."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from enum import Enum
from typing import Any, TypeVar

import numpy as np

from adapters.remote.messages import Arrays, Fields

Plain = tuple[dict[str, Any], dict[str, Any]]  # fields and arrays
Product = TypeVar("Product")


def to_plain(product: object) -> Plain:
    """A product of arrays, numbers, words, enums, tuples of these, and such products.

    Returns:
        Its fields and its arrays, by the names of its fields; those of a product in it begin with
        its name and a dot.
    """
    fields: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for one in dataclasses.fields(product):  # type: ignore[arg-type]  # a dataclass
        value = getattr(product, one.name)
        if isinstance(value, np.ndarray):
            arrays[one.name] = value
        elif dataclasses.is_dataclass(value):
            fields[one.name] = True  # it is there
            inner_fields, inner_arrays = to_plain(value)
            fields |= {f"{one.name}.{name}": inner for name, inner in inner_fields.items()}
            arrays |= {f"{one.name}.{name}": inner for name, inner in inner_arrays.items()}
        else:
            fields[one.name] = value.value if isinstance(value, Enum) else value
    return fields, arrays


def from_plain(kind: type[Product], fields: Fields, arrays: Arrays, *, at: str = "") -> Product:
    """A product from what `to_plain` made of one.

    Args:
        kind: the class of the product.
        fields: its fields.
        arrays: its arrays.
        at: what their names begin with.

    Raises:
        ValueError: they are not those of such a product.
    """
    values: dict[str, Any] = {}
    hints = _hints(kind)  # type: ignore[arg-type]  # classes are hashable
    for one in dataclasses.fields(kind):  # type: ignore[arg-type]  # a dataclass
        name, hint = f"{at}{one.name}", hints[one.name]
        if name in arrays:
            values[one.name] = arrays[name]
        elif name in fields:
            values[one.name] = _value(hint, fields, arrays, name=name)
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"no {kind.__name__}: {error}") from error


def _value(hint: Any, fields: Fields, arrays: Arrays, *, name: str) -> Any:
    value = fields[name]
    if value is None:
        return None
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, fields, arrays, at=f"{name}.")  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a product's fields, without None."""
    return {name: _without_none(hint) for name, hint in typing.get_type_hints(kind).items()}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [one for one in typing.get_args(hint) if one is not types.NoneType]
        return kinds[0] if len(kinds) == 1 else hint
    return hint
