"""What a process may use: checked before a run, and in words where it is used up."""

from __future__ import annotations

import errno
import resource

from engine.errors import ConfigError

MIN_DESCRIPTORS = 40  # files, sockets and pipes of a run; live sources and viewers take more
_WANTED_DESCRIPTORS = 1024

_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_NO_MEMORY = "out of memory: the system, or a limit (ulimit -v), gives no more"
_NO_DESCRIPTORS = "too many open files: raise the limit (ulimit -n)"
_LOADING = {  # what the loader of libraries says
    "failed to map segment": _NO_MEMORY,
    "annot allocate memory": _NO_MEMORY,
    "Too many open files": _NO_DESCRIPTORS,
}


def provide_descriptors() -> None:
    """Raises the limit of open files where it is low and may be raised.

    Raises:
        ConfigError: it is too low for any run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _WANTED_DESCRIPTORS:
        return
    is_bounded = hard != resource.RLIM_INFINITY
    allowed = min(hard, _WANTED_DESCRIPTORS) if is_bounded else _WANTED_DESCRIPTORS
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < MIN_DESCRIPTORS:
        raise ConfigError(
            f"only {allowed} files may be open at a time here (ulimit -n); a run needs"
            f" {MIN_DESCRIPTORS}"
        )


def exhaustion_in_words(error: BaseException) -> str:
    """What was used up, where an error or one that led to it says so; else ""."""
    seen: BaseException | None = error
    while seen is not None:
        if words := _words(seen):
            return words
        seen = seen.__cause__ or seen.__context__
    return ""


def _words(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return _NO_MEMORY
    if isinstance(error, OSError):
        return _NO_DESCRIPTORS if error.errno in _OUT_OF_DESCRIPTORS else _memory(error)
    # What Python and the loader of libraries say, who have no number for it.
    text = str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "no more threads: the system, or a limit of memory or processes, gives no more"
    if isinstance(error, ImportError):
        return next((words for said, words in _LOADING.items() if said in text), "")
    return ""


def _memory(error: OSError) -> str:
    return _NO_MEMORY if error.errno == errno.ENOMEM else ""
