"""What a run's map is laid onto after its end, so that a resume can do it, or do it again.

Positions that came later are no part of the run: whatever maps again has no place for them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from engine.regular_files import read_regular_file

LAID_ONTO = "laid_onto.json"
_MAX_BYTES = 2**20


def record_of(arguments: Sequence[str]) -> bytes:
    """The file's contents: the arguments of ``livesfm georeference RUN``."""
    return f"{json.dumps({'arguments': list(arguments)})}\n".encode()


def arguments_to_lay_again(run: Path) -> list[str] | None:
    """The arguments of the command that lays the run's map again; None where it was not laid.

    Raises:
        ConfigError: they cannot be read.
    """
    path = run / LAID_ONTO
    try:
        data = read_regular_file(path, max_bytes=_MAX_BYTES)
        return [str(one) for one in json.loads(data)["arguments"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged") from error


def command_to_lay_again(run: Path) -> str:
    """The command that lays the run's map onto those positions again; "" where there are none."""
    try:
        arguments = arguments_to_lay_again(run)
    except ConfigError:  # and yet there were positions
        arguments = ["--positions", "FILE"]
    if arguments is None:
        return ""
    return shlex.join(["livesfm", "georeference", str(run), *arguments])
