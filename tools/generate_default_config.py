#!/usr/bin/env python3
"""Writes configs/default.yaml: every setting of engine/config.py with its default and its words.

    .venv/bin/python tools/generate_default_config.py

The words of a setting are the string below it, those of a section the docstring of its class.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import Config, Section

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "engine" / "config.py"
DEFAULT = ROOT / "configs" / "default.yaml"
WIDTH = 100  # characters of a line

_HEADER = """\
Every setting with its built-in default, so this file changes nothing. To change something, write a
small file with only that in it and pass it with --config FILE, or pass single values:
--set sift.max_features=2048. The other files here are such files; --config phone finds phone.yaml
from any folder. Precedence: built-in defaults < --config, in their order < --set. Each run writes
what it used to config.yaml of its folder.

Units are in the names: _px pixels of the original image, _s seconds, _deg degrees, _hz per second,
_m metres, _mb megabytes, _ratio a share in 0..1. "Edge" is the longer side of an image.

tools/generate_default_config.py writes this file from engine/config.py."""


def default_config_text() -> str:
    """The text of configs/default.yaml as engine/config.py has it."""
    words = _words_of_classes()
    config = Config()
    blocks = [_comment(_HEADER)]
    for name in Config.model_fields:
        section: Section = getattr(config, name)
        blocks.append("\n".join(_section_lines(name, section, words[type(section).__name__])))
    return "\n\n".join(blocks) + "\n"


def _section_lines(name: str, section: Section, words: dict[str, str]) -> Iterator[str]:
    yield _comment(words[""])
    yield f"{name}:"
    for key, value in section.model_dump(mode="json").items():
        yield _comment(words[key], indent="  ")
        yield f"  {key}: {_yaml(value)}"


def _words_of_classes() -> dict[str, dict[str, str]]:
    """What is said of each class, under "", and of each of its attributes.

    Raises:
        SystemExit: nothing is said of a setting.
    """
    module = ast.parse(SETTINGS.read_text(encoding="utf-8"))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return {node.name: _words_of_class(node) for node in classes if node.name != "Config"}


def _words_of_class(node: ast.ClassDef) -> dict[str, str]:
    words = {"": ast.get_docstring(node) or ""}
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))):
                words[statement.target.id] = " ".join(text.split())
            case _:
                sys.exit(f"{SETTINGS}:{statement.lineno}: no string below says what this does")
    return words


def _comment(text: str, *, indent: str = "") -> str:
    """The text as comment lines, its paragraphs kept apart."""
    mark = f"{indent}# "
    paragraphs = [
        textwrap.fill(
            " ".join(paragraph.split()),
            WIDTH,
            initial_indent=mark,
            subsequent_indent=mark,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for paragraph in text.split("\n\n")
    ]
    return f"\n{indent}#\n".join(paragraphs)


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=WIDTH)
    return text.removesuffix("...\n").strip()


if __name__ == "__main__":
    DEFAULT.write_text(default_config_text(), encoding="utf-8")
