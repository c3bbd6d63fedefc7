"""Native log: lines that native libraries write to the terminal go to Python's logging.

COLMAP's library writes information lines straight to file descriptor 2, whatever its log level is
set to, in the midst of the progress panel; so does Rerun's when its file cannot be written. While a
run lasts, that descriptor leads through a thread that hands such lines to Python's logging and
passes everything else on unchanged.
"""

from __future__ import annotations

import logging
import os
import queue
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
# Rerun's: time, severity, the module of its code, ": ", message; in colours as well.
_RERUN_LINE = re.compile(
    rb"^%b\d{4}-\d\d-\d\dT[\d:.]+Z%b +%b *([A-Z]+)%b +%b(re_\w+(?:::\w+)*)%b:%b (.*)$"
    % ((_COLOUR,) * 7)
)
_RERUN_FILE_FAILS = b"Failed to write log stream to "
_RERUN_FILE_MODULES = (b"re_log_encoding", b"re_sdk::recording_stream")  # say more of the same
_RERUN_LEVELS = {b"ERROR": logging.ERROR, b"WARN": logging.WARNING}
_LEVELS = {
    b"I": logging.DEBUG,
    b"W": logging.WARNING,
    b"E": logging.ERROR,
    b"F": logging.CRITICAL,
}


@contextmanager
def native_log_captured() -> Iterator[None]:
    """Sends native log lines to ``logging`` while the context lasts; what is routine as DEBUG.

    Python's own ``sys.stderr`` is replaced by a stream that writes to the terminal directly: for a
    process of our own.
    """
    former = sys.stderr
    former.flush()
    stream = os.fdopen(os.dup(_STDERR), "w", buffering=1, encoding="utf-8", errors="replace")
    sys.stderr = stream
    handlers = handlers_writing_to(former)
    for handler in handlers:
        handler.setStream(stream)
    try:
        with descriptor_captured():
            yield
    finally:
        for handler in handlers:
            handler.setStream(former)
        if sys.stderr is stream:
            sys.stderr = former
        with suppress(OSError):  # the terminal may be gone
            stream.close()


@contextmanager
def descriptor_captured() -> Iterator[None]:
    """The same for a process that is others': ``sys.stderr`` stays what it is.

    What Python writes to the descriptor passes through the thread, too. Where the process has no
    descriptor 2, nothing is captured.
    """
    try:
        terminal = os.dup(_STDERR)
    except OSError:
        yield
        return
    reading, writing = os.pipe()
    os.dup2(writing, _STDERR)
    # Two threads: a handler may write to this very pipe, which has to be emptied meanwhile.
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=call, args=args, name="native log", daemon=True)
        for call, args in ((_log_all, (lines,)), (_pass_on, (reading, terminal, lines)))
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        os.dup2(terminal, _STDERR)
        for thread in threads:  # a handler may be writing to the pipe, so that is read until last
            os.write(writing, _END)  # a child may hold the pipe open, so its end is no sign
            thread.join()
        os.close(writing)
        os.close(terminal)


def handlers_writing_to(stream: TextIO) -> list[logging.StreamHandler[TextIO]]:
    """The handlers of the root logger that write to a stream."""
    return [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]


def _pass_on(reading: int, terminal: int, known: queue.SimpleQueue[bytes | None]) -> None:
    """Hands over lines of the libraries until the first end, writes others until the second."""
    does_log = True
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            text = line.removesuffix(_END)
            if does_log and (_GLOG_LINE.match(text) or _RERUN_LINE.match(text)):
                known.put(text)
            else:
                with suppress(OSError):  # the terminal may be gone; who writes must not block
                    os.write(terminal, text)
            if len(text) < len(line):
                if not does_log:
                    return
                known.put(None)
                does_log = False


def _log_all(lines: queue.SimpleQueue[bytes | None]) -> None:
    while (line := lines.get()) is not None:
        if not _log_glog(line):
            _log_rerun(line)


def _log_glog(line: bytes) -> bool:
    """Whether a line is of COLMAP's library, and was logged."""
    known = _GLOG_LINE.match(line)
    if known is None:
        return False
    severity, message = known.groups()
    level = logging.DEBUG if message.startswith(_ROUTINE) else _LEVELS[severity]
    logger.log(level, "%s", message.decode(errors="replace"))
    return True


def _log_rerun(line: bytes) -> bool:
    """Whether a line is of Rerun's library, and was logged: one line where its file fails."""
    known = _RERUN_LINE.match(line)
    if known is None:
        return False
    severity, module, message = known.groups()
    words = message.decode(errors="replace")
    if message.startswith(_RERUN_FILE_FAILS):
        logger.error("the recording ends here: %s", words)
    elif module.startswith(_RERUN_FILE_MODULES):
        logger.debug("%s", words)
    else:
        logger.log(_RERUN_LEVELS.get(severity, logging.DEBUG), "rerun: %s", words)
    return True
