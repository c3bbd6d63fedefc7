"""Programs that end with the process that starts them, also where that is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Python that becomes the program after it asked Linux to end it with the thread that started it,
# see prctl(2). A function that runs between fork and exec would not be safe in a process with
# threads.
_BECOME_BOUND = """
import os, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
except (ImportError, OSError, AttributeError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def bound_to_this_process(command: Sequence[str]) -> list[str]:
    """A command that does the same, and on Linux is killed when the thread that starts it ends.

    Args:
        command: the path of a program, and its arguments.
    """
    if sys.platform != "linux" or not sys.executable:
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BECOME_BOUND, str(os.getpid()), *command]
