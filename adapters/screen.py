"""Whether this machine has a screen for windows."""

from __future__ import annotations

import os
import sys


def has_screen() -> bool:
    """Whether windows can open, as far as the environment says; only Linux may have none."""
    if not sys.platform.startswith("linux"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
