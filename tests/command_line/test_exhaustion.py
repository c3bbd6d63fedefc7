"""Limits of the process: raised, refused, or said in a line."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.exhaustion import exhaustion_in_words, provide_descriptors
from engine.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.waiting import HANG_S


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
        (ImportError("libx.so: cannot open: Too many open files"), "ulimit -n"),
    ],
)
def test_what_is_used_up_is_said_also_where_it_led_to_another_error(
    error: Exception, words: str
) -> None:
    assert words in exhaustion_in_words(error)
    try:
        try:
            raise error
        finally:
            raise AttributeError("half made")
    except AttributeError as after:
        assert words in exhaustion_in_words(after)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "No such file"), RuntimeError("a bug"), ImportError("no x")]
)
def test_other_errors_are_none_of_this(error: Exception) -> None:
    assert not exhaustion_in_words(error)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((64, 4096), (1024, 4096)),
        ((20, -1), (1024, -1)),
        ((64, 64), (64, 64)),
        ((4096, 4096), None),
    ],
)
def test_a_low_limit_of_open_files_is_raised_as_far_as_it_may(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    was_set: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: was_set.append(values))
    provide_descriptors()
    assert was_set == ([] if expected in {None, limits} else [expected])


def test_a_limit_too_low_for_any_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (24, 24))
    with pytest.raises(ConfigError, match=r"only 24 files may be open .* a run needs 40"):
        provide_descriptors()


@pytest.mark.slow
def test_a_run_imports_nothing_any_more(tmp_path: Path) -> None:
    program = """
import sys
from adapters.cli import app
from engine.run.engine import Engine
run, loaded = Engine.run, set()
async def counted(engine):
    loaded.update(sys.modules)
    outcome = await run(engine)
    new = set(sys.modules) - loaded
    print("NEW", sorted(name for name in new if not name.startswith("adapters.town")))
    return outcome
Engine.run = counted
app(sys.argv[1:])
"""
    source, out = "synthetic:town?frames=8&width=320&height=240", str(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", program, "run", source, "--view", "none", "--out", out, "-q"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NEW")]
    assert line == "NEW []", done.stderr
