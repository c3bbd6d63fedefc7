"""What a run's map was laid onto after its end, so that a resume can say how to do it again.

Positions that came later are no part of the run: whatever maps again has no place for them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from engine.regular_files import read_regular_file

LAID_ONTO = "laid_onto.json"
_MAX_BYTES = 2**20


def record_of(arguments: Sequence[str]) -> bytes:
    """The file's contents: the arguments of ``livesfm georeference RUN``."""
    return f"{json.dumps({'arguments': list(arguments)})}\n".encode()


def command_to_lay_again(run: Path) -> str:
    """The command that lays the run's map onto those positions again; "" where there are none."""
    try:
        data = read_regular_file(run / LAID_ONTO, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return ""
    except OSError:
        data = b""
    try:
        arguments = [str(one) for one in json.loads(data)["arguments"]]
    except (ValueError, KeyError, TypeError):  # damaged, and yet there were positions
        arguments = ["--positions", "FILE"]
    return shlex.join(["livesfm", "georeference", str(run), *arguments])
