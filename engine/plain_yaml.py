"""YAML to plain data: numbers, words, lists and mappings, in bounded time and memory.

Aliases are refused, because a few lines of them stand for any amount of data; they have no use in
the files that are read here.
"""

from __future__ import annotations

from typing import Any

import yaml

_MAX_CHARS = 200  # of what PyYAML says: it may quote the file


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes a node as the base class does; an alias is an error."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are refused")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def load_plain_yaml(text: str, *, loader: type[PlainLoader] = PlainLoader) -> Any:
    """What a YAML text holds.

    Args:
        text: one document.
        loader: knows the tags of the format.

    Raises:
        ValueError: it is no YAML, or holds what is refused; the words are one line.
    """
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 - a safe loader, see above
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "no YAML"
        raise ValueError(place + _in_a_line(problem)) from error
    except RecursionError as error:
        raise ValueError("brackets in brackets, too deep to read") from error
    # Constructors of numbers, dates and the like fail on values that only look like one.
    except ValueError as error:
        raise ValueError(f"a value cannot be read: {_in_a_line(str(error))}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError("a value is not of the type that its tag says") from error


def _in_a_line(words: str) -> str:
    shown = words.partition(";")[0][:_MAX_CHARS]
    return "".join(char if char.isprintable() else "?" for char in shown)
