"""An export on the terminal: bars of its progress, and signals that cancel it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from adapters.exports.job import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def progress_shown() -> Iterator[Callable[[Progress], None]]:
    """Yields what shows progress: a bar for each kind of thing, gone at the end.

    Nothing is shown where standard error is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(file=sys.stderr, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def show(progress: Progress) -> None:
            if progress.what not in tasks:
                tasks[progress.what] = bars.add_task(progress.what, total=progress.total)
            bars.update(tasks[progress.what], completed=progress.done)

        yield show


@contextmanager
def cancelled_by_signals() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGINT, SIGTERM or SIGHUP came; a second one raises KeyboardInterrupt.

    What is ignored stays ignored. Signals belong to the main thread: on any other none is taken.
    """
    cancelled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancelled.is_set
        return

    def take(number: int, frame: FrameType | None) -> None:
        del frame
        if cancelled.is_set():
            raise KeyboardInterrupt(signal.Signals(number).name)
        cancelled.set()

    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    former = {number: signal.signal(number, take) for number in taken}
    try:
        yield cancelled.is_set
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
