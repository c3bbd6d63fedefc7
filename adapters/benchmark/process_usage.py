"""A program that runs a command and writes what the command used, measured from outside.

    python -I -S process_usage.py RESULT WATCHED NUM_THREADS COMMAND...

The kernel counts a process's peak memory from what its parent had when it began, so this parent is
small: it loads nothing but the standard library. The command
runs on at most NUM_THREADS processors. RESULT becomes a JSON object:

    exit_code   of the command; minus the signal that ended it
    user_s, system_s  CPU of the command and of all its children that ended
    wall_s
    peak_rss_bytes  of its largest process
    samples     [wall_s, cpu_s, bytes of the file WATCHED] of the command's process, each
                `SAMPLE_S`; none where there is no /proc
"""

import json
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SAMPLE_S = 0.25


def main(arguments: list[str]) -> None:
    """Runs the command to its end."""
    result, watched, num_threads, *command = arguments
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(num_threads)])
    samples: list[tuple[float, float, int]] = []
    began = time.monotonic()
    try:
        pid = os.posix_spawnp(command[0], command, os.environ)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    for _ in _until_end(pid):
        cpu_s = _cpu_s(pid)
        if cpu_s is not None:
            samples.append((time.monotonic() - began, cpu_s, _num_bytes(watched)))
    _, status, usage = os.wait4(pid, 0)
    wall_s = time.monotonic() - began
    unit = 1 if sys.platform == "darwin" else 1024
    record = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "wall_s": wall_s,
        "peak_rss_bytes": usage.ru_maxrss * unit,
        "samples": samples,
    }
    Path(result).write_text(json.dumps(record), encoding="utf-8")


def _until_end(pid: int) -> Iterator[None]:
    """Yields each `SAMPLE_S` until the process ends."""
    if not hasattr(os, "pidfd_open"):
        return
    descriptor = os.pidfd_open(pid)
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        while not ended.poll(1000 * SAMPLE_S):
            yield
    finally:
        os.close(descriptor)


def _cpu_s(pid: int) -> float | None:
    """CPU seconds of a process so far."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _num_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


if __name__ == "__main__":
    main(sys.argv[1:])
