"""Native log: lines that native libraries write to the terminal go to Python's logging.

COLMAP's library writes information lines straight to file descriptor 2, whatever its log level is
set to, in the midst of the progress panel. While a run lasts, that descriptor leads through a
thread that hands such lines to Python's logging and passes everything else on unchanged.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

logger = logging.getLogger(__name__)

_STDERR = 2
_END = b"\0end of the capture\n"
# glog: severity, date, time, thread, then "file:line] message"; on terminals in colours, which end
# only where the next line begins.
_COLOUR = rb"(?:\x1b\[[\d;]*m)*"
_GLOG_LINE = re.compile(
    rb"^%b([IWEF])\d{8} \d\d:\d\d:\d\d\.\d+ +\d+ ([^\]]*\] .*?)%b$" % (_COLOUR, _COLOUR)
)
_ROUTINE = b"levenberg_marquardt_strategy.cc"  # a step fails: Ceres tries a smaller one
_LEVELS = {
    b"I": logging.DEBUG,
    b"W": logging.WARNING,
    b"E": logging.ERROR,
    b"F": logging.CRITICAL,
}


@contextmanager
def native_log_captured() -> Iterator[None]:
    """Sends native log lines to ``logging`` while the context lasts; what is routine as DEBUG.

    Python's own ``sys.stderr`` keeps writing to the terminal directly.
    """
    sys.stderr.flush()
    terminal = os.dup(_STDERR)
    former = sys.stderr
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, encoding="utf-8", errors="replace")
    handlers = handlers_writing_to(former)
    for handler in handlers:
        handler.setStream(sys.stderr)
    reading, writing = os.pipe()
    os.dup2(writing, _STDERR)
    thread = threading.Thread(
        target=_pass_on, args=(reading, terminal), name="native log", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        with suppress(OSError):  # the terminal may be gone
            sys.stderr.flush()
        os.dup2(terminal, _STDERR)
        os.write(writing, _END)  # a child may hold the pipe open, so its end is no sign
        thread.join()
        os.close(writing)
        for handler in handlers:
            handler.setStream(former)
        with suppress(OSError):
            sys.stderr.close()
        sys.stderr = former
        os.close(terminal)


def handlers_writing_to(stream: TextIO) -> list[logging.StreamHandler[TextIO]]:
    """The handlers of the root logger that write to a stream."""
    return [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]


def _pass_on(reading: int, terminal: int) -> None:
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            text = line.removesuffix(_END)
            known = _GLOG_LINE.match(text)
            if known is not None:
                severity, message = known.groups()
                level = logging.DEBUG if message.startswith(_ROUTINE) else _LEVELS[severity]
                logger.log(level, "%s", message.decode(errors="replace"))
            else:
                with suppress(OSError):  # the terminal may be gone; who writes must not block
                    os.write(terminal, text)
            if len(text) < len(line):
                return
