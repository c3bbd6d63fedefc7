"""The verdict on a map in words: its level, and a line or more for each reason."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from engine.types import Verdict, VerdictLevel

MAX_REASONS = 5  # that are listed; the rest is counted
_BULLET = "  - "


def verdict_lines(verdict: Verdict, *, width: int | None = None, more_in: str = "") -> list[str]:
    """The level, and the gravest reasons below it.

    Args:
        verdict: the verdict.
        width: characters of a line, beyond which sentences go on in the next one; None: never.
        more_in: the file that names the reasons that are only counted.
    """
    lines = [f"verdict: {level_in_words(verdict)}"]
    for reason in verdict.reasons[:MAX_REASONS]:
        lines += _wrapped(reason.sentence, width=width)
    num_more = len(verdict.reasons) - MAX_REASONS
    if num_more > 0:
        where = f" in {more_in}" if more_in else ""
        lines.append(f"{_BULLET}{num_more} more{where}")
    return lines


def level_in_words(verdict: Verdict) -> str:
    """The level, and that what follows are remarks where the map is good all the same."""
    if verdict.level is not VerdictLevel.GOOD or not verdict.reasons:
        return str(verdict.level)
    return f"{verdict.level}, with {'a remark' if len(verdict.reasons) == 1 else 'remarks'}"


def in_words(numbers: Sequence[int]) -> str:
    """Numbers as a person lists them: 8, 6 and 5."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def verdict_document(verdict: Verdict) -> str:
    """The level and all reasons, in Markdown."""
    items = [f"- {reason.sentence}" for reason in verdict.reasons]
    return "\n".join([f"**The map is {level_in_words(verdict)}.**", "", *items])


def _wrapped(sentence: str, *, width: int | None) -> list[str]:
    if width is None:
        return [_BULLET + sentence]
    return textwrap.wrap(
        sentence,
        width=max(width, 2 * len(_BULLET)),
        initial_indent=_BULLET,
        subsequent_indent=" " * len(_BULLET),
        break_on_hyphens=False,
        break_long_words=False,  # paths are copied
    )
