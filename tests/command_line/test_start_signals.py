"""Signals before the event loop of a run takes them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters import launch as launch_module
from adapters.cli import app
from adapters.launch import LaunchOptions, launch
from adapters.start_signals import start_signals
from adapters.views.view_mode import ViewMode
from engine.config import Config
from engine.run.engine import StoppedBy
from tests.support.fake_runs import Written

QUIET = Config.model_validate({"views": {"recording": False}})
TOWN = "synthetic:town?frames=3&width=160&height=120"
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def options(path: Path, *, overwrite: bool = False) -> LaunchOptions:
    return LaunchOptions(
        sources=(TOWN,),
        path=path,
        overwrite=overwrite,
        view_mode=ViewMode.NONE,
        show_progress=False,
    )


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_before_anything_is_written_interrupts(number: signal.Signals) -> None:
    former = [signal.getsignal(one) for one in NUMBERS]
    with pytest.raises(KeyboardInterrupt, match=number.name), start_signals():
        send(number)
    assert [signal.getsignal(one) for one in NUMBERS] == former


def test_signals_that_were_held_are_one_request_to_the_run() -> None:
    asked: list[str] = []
    with start_signals() as signals:
        signals.hold()
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert asked == []
        signals.hand_to(lambda: asked.append("stop"))
        assert asked == ["stop"]
        send(signal.SIGINT)
    assert asked == ["stop"]


def test_a_signal_after_the_hand_over_reaches_the_run() -> None:
    asked: list[str] = []
    with start_signals() as signals:
        signals.hold()
        signals.hand_to(lambda: asked.append("stop"))
        send(signal.SIGHUP)
    assert asked == ["stop"]


def test_what_is_ignored_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with start_signals():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_off_the_main_thread_signals_are_left_to_others() -> None:
    handlers: list[Any] = []

    def look() -> None:
        with start_signals():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_a_signal_while_a_run_is_opened_leaves_the_former_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(QUIET, options(tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*") if path.is_file()}

    def interrupted(*_: Any) -> None:
        send(signal.SIGINT)

    monkeypatch.setattr(launch_module, "_camera_masks", interrupted)
    command = ["run", TOWN, "--out", str(tmp_path / "run"), "--overwrite", "--view", "none", "-q"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert "stopped before anything was written" in result.output
    assert before == {path: path.read_bytes() for path in before}


def test_a_signal_while_the_folder_is_made_gives_a_run_that_ended_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = launch_module._run_folder

    def interrupted(*args: Any) -> Any:
        send(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(launch_module, "_run_folder", interrupted)
    outcome = launch(QUIET, options(tmp_path / "run"))
    assert outcome.stopped_by is StoppedBy.SIGNAL
    written = Written.by(outcome)
    assert written.summary["stopped_by"] == "signal"
    assert len(written.rows) <= 1
