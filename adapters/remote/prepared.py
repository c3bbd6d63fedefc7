"""What a worker made of pairs before it was asked to match them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

_MAX_MATCHED = 4096

Made = TypeVar("Made")


class Prepared(Generic[Made]):
    """What was made ahead of pairs, the latest.

    A pair may be matched while its preparation still waits for its turn: that is late then.

    Args:
        max_pairs: how many are kept.
    """

    def __init__(self, *, max_pairs: int) -> None:
        self._max_pairs = max_pairs
        self._made: OrderedDict[tuple[str, str], Made] = OrderedDict()
        self._matched: OrderedDict[tuple[str, str], None] = OrderedDict()

    def take(self, keys: tuple[str, str]) -> Made | None:
        """What was made of a pair that is matched now; None: nothing."""
        self._matched[keys] = None
        if len(self._matched) > _MAX_MATCHED:
            self._matched.popitem(last=False)
        return self._made.pop(keys, None)

    def is_late(self, keys: tuple[str, str]) -> bool:
        """Whether a pair was matched before."""
        return keys in self._matched

    def put(self, keys: tuple[str, str], made: Made) -> int:
        """Keeps what was made of a pair; returns how many others were evicted for it."""
        self._made[keys] = made
        if len(self._made) <= self._max_pairs:
            return 0
        self._made.popitem(last=False)
        return 1
