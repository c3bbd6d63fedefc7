"""A viewer's process that ends with this one, however this one ends.

The viewer is started by a watcher: this file, run as a program. It holds the reading end of a pipe
whose writing end only this process has. When that is closed, by `ViewerProcess.stop` or by the
system because this process was killed, the watcher ends the viewer. That way is the same on Linux
and macOS.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

STOP_TIMEOUT_S = 5.0


class ViewerProcess:
    """A viewer that runs until `stop`, until it ends by itself, or as long as this process.

    Args:
        command: the program of the viewer with its arguments.
        environment: of the viewer.
        output: a file for what it prints; None: nowhere.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        output: IO[bytes] | None = None,
    ) -> None:
        printed = subprocess.DEVNULL if output is None else output
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            start_new_session=True,  # Ctrl-C is for the engine, which drains first
        )

    @property
    def is_running(self) -> bool:
        """Whether the viewer has not ended."""
        return self._watcher.poll() is None

    def stop(self) -> None:
        """Ends the viewer and waits for its end."""
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        try:
            self._watcher.wait(timeout=2 * STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._watcher.kill()
            self._watcher.wait()

    def wait(self, timeout_s: float) -> bool:
        """Whether the viewer ended within so many seconds. Blocks."""
        try:
            self._watcher.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def has_failed(self) -> bool:
        """Whether the viewer ended with an error."""
        return bool(self._watcher.poll())


def _watch(command: Sequence[str]) -> int:
    """Runs a viewer until it ends or standard input does; returns its exit code."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as viewer:
        # A signal to the watcher is one to the viewer.
        signal.signal(signal.SIGTERM, lambda number, _: viewer.send_signal(number))
        threading.Thread(target=_end_with_input, args=(viewer,), daemon=True).start()
        return abs(viewer.wait())


def _end_with_input(viewer: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 1):
        continue
    viewer.terminate()
    try:
        viewer.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        viewer.kill()


if __name__ == "__main__":
    sys.exit(_watch(sys.argv[1:]))
