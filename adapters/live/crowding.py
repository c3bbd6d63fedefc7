"""Whose connection ends where there are too many: nobody keeps the others out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def oldest_of_most_crowded(waiting: Sequence[tuple[Item, str]]) -> tuple[Item, str]:
    """The oldest from the address that most are from, and that address.

    Args:
        waiting: at least one, with its address, oldest first.
    """
    ((crowded, _),) = Counter(address for _, address in waiting).most_common(1)
    return next(item for item, address in waiting if address == crowded), crowded
