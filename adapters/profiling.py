"""Where each thread of a run spends its CPU time, by function, in files that ``pstats`` reads.

Sampled: again and again, what a thread's CPU clock advanced is charged to the functions that the
thread is in. So it is right however long a call keeps the interpreter lock, and native code counts
as the Python function that calls it; what is short gets its part on average. Functions of one name
in one file count as one. Costs 3 to 5 % of the CPU time of a run.
"""

from __future__ import annotations

import faulthandler
import marshal
import os
import re
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from engine.cpu_time import accounts, charge_thread_to

_PERIOD_S = 0.03

_THREAD = re.compile(rb"^(?:Thread|Current thread) 0x([0-9a-f]+)")
_FRAME = re.compile(rb'^  File "(.*)", line (\d+) in (.*)$')

Function = tuple[str, int, str]  # file, line, name: as in pstats
Stack = tuple[tuple[str, int, str], ...]  # file, line, function; from the one that runs outwards


@dataclass(slots=True, eq=False)
class _Figures:
    """What ``pstats`` keeps of a function, or of one function called by another."""

    num_samples: int = 0
    own_s: float = 0.0
    total_s: float = 0.0
    callers: dict[Function, _Figures] = field(default_factory=dict)

    def as_row(self) -> tuple[int, int, float, float]:
        return self.num_samples, self.num_samples, self.own_s, self.total_s


class Profile:
    """The samples of a run, by thread."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[Stack, float]] = defaultdict(lambda: defaultdict(float))
        self._num_samples: dict[str, Counter[Stack]] = defaultdict(Counter)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the profile
        charge_thread_to(None)  # so that the calling thread is among those that are sampled
        self._used_s = {account: account.used_s() for account in accounts()}

    def sample(self) -> None:
        """Charges what each thread has used since the last sample to where it is."""
        stacks = self._stacks()
        for account in accounts():
            used_s = account.used_s()
            spent_s = used_s - self._used_s.get(account, 0.0)
            stack = stacks.get(account.thread_ident)
            if spent_s <= 0.0 or not stack:
                continue
            self._used_s[account] = used_s
            self._seconds[account.thread_name][stack] += spent_s
            self._num_samples[account.thread_name][stack] += 1

    def write(self, folder: Path) -> list[Path]:
        """Writes a file for each thread, named after it; returns them.

        Raises:
            OSError: one cannot be written.
        """
        folder.mkdir(exist_ok=True)
        written = []
        for name, seconds in sorted(self._seconds.items()):
            path = folder / f"{name.replace(' ', '_')}.prof"
            figures = _by_function(seconds, self._num_samples[name])
            rows = {
                function: (*one.as_row(), {who: by.as_row() for who, by in one.callers.items()})
                for function, one in figures.items()
            }
            path.write_bytes(marshal.dumps(rows))
            written.append(path)
        return written

    def close(self) -> None:
        """Takes no more samples."""
        self._file.close()

    def _stacks(self) -> dict[int, Stack]:
        """Where all threads are, by their identity.

        By ``faulthandler``: walking frames of other threads in Python is not safe, since they go on
        meanwhile.
        """
        file = self._file.fileno()
        os.lseek(file, 0, os.SEEK_SET)
        faulthandler.dump_traceback(file, all_threads=True)
        size = os.lseek(file, 0, os.SEEK_CUR)
        os.lseek(file, 0, os.SEEK_SET)
        return _parsed(os.read(file, size))


@contextmanager
def profiled() -> Iterator[Profile]:
    """Samples the threads of a run while the context is open."""
    profile, has_ended = Profile(), threading.Event()

    def work() -> None:
        while not has_ended.wait(_PERIOD_S):
            profile.sample()

    thread = threading.Thread(target=work, name="profiler", daemon=True)
    thread.start()
    try:
        yield profile
    finally:
        has_ended.set()
        thread.join()
        profile.close()


def _parsed(dump: bytes) -> dict[int, Stack]:
    stacks: dict[int, list[tuple[str, int, str]]] = {}
    stack: list[tuple[str, int, str]] = []
    for line in dump.splitlines():
        if found := _FRAME.match(line):
            path, number, name = found.groups()
            stack.append((os.fsdecode(path), int(number), os.fsdecode(name)))
        elif found := _THREAD.match(line):
            stack = stacks.setdefault(int(found[1], 16), [])
    return {ident: tuple(frames) for ident, frames in stacks.items()}


def _by_function(
    seconds: Mapping[Stack, float], num_samples: Counter[Stack]
) -> dict[Function, _Figures]:
    first_lines: dict[tuple[str, str], int] = {}
    for stack in seconds:
        for path, line, name in stack:
            first_lines[path, name] = min(line, first_lines.get((path, name), line))
    figures: dict[Function, _Figures] = defaultdict(_Figures)
    for stack, spent_s in seconds.items():
        functions = [(path, first_lines[path, name], name) for path, _, name in stack]
        figures[functions[0]].own_s += spent_s
        for function in set(functions):
            figures[function].num_samples += num_samples[stack]
            figures[function].total_s += spent_s
        for place, (callee, caller) in enumerate(zip(functions, functions[1:], strict=False)):
            by = figures[callee].callers.setdefault(caller, _Figures())
            if (callee, caller) in zip(functions[:place], functions[1:place], strict=False):
                continue  # a recursion, which counts once
            by.num_samples += num_samples[stack]
            by.own_s += spent_s if place == 0 else 0.0
            by.total_s += spent_s
    return figures
