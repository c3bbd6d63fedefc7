"""How long live views stay after their run."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest

from adapters.views.rerun_service import has_clients
from adapters.views.staying import StayingViews


class FakeView:
    """A view whose viewers leave one after the other, each time it is asked."""

    url = "http://127.0.0.1:9090"

    def __init__(self, *, num_looks: int = 0) -> None:
        self.num_looks = num_looks
        self.has_ended = False

    @property
    def has_viewers(self) -> bool:
        self.num_looks -= 1
        return self.num_looks >= 0

    def end(self) -> None:
        self.has_ended = True


class Waits:
    """Counts how often it was waited; the n-th wait is broken off by a signal."""

    def __init__(self, *, signal_at: int, number: signal.Signals = signal.SIGINT) -> None:
        self.num = 0
        self._signal_at = signal_at
        self._number = number

    def __call__(self, seconds: float) -> None:
        assert seconds > 0.0
        self.num += 1
        if self.num == self._signal_at:
            signal.raise_signal(self._number)


def stayed(
    is_wanted: bool | None,
    *,
    num_looks: int = 0,
    was_stopped: bool = False,
    is_on_terminal: bool = True,
    number: signal.Signals = signal.SIGINT,
) -> int:
    """How often a view waited, at most five times, before it ended."""
    view, waits = FakeView(num_looks=num_looks), Waits(signal_at=5, number=number)
    views = StayingViews(is_wanted, is_on_terminal=is_on_terminal, sleep=waits)
    views.add(view)
    views.stay(was_stopped=was_stopped)
    assert view.has_ended
    return waits.num


def test_on_a_terminal_a_view_stays_until_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    assert stayed(None) == 5
    words = capsys.readouterr().err.splitlines()
    assert words == ["the run has ended; the view stays until Ctrl-C:", FakeView.url]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_ends_a_program_ends_the_view(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    assert stayed(None, number=number) == 5
    assert signal.getsignal(number) is former


def test_who_stopped_the_run_has_seen_enough_unless_he_says_otherwise() -> None:
    assert stayed(None, was_stopped=True) == 0
    assert stayed(True, was_stopped=True) == 5


def test_a_view_that_is_not_to_stay_ends_with_the_run() -> None:
    assert stayed(False, num_looks=9) == 0


def test_without_a_terminal_a_view_stays_as_long_as_somebody_looks() -> None:
    assert stayed(None, is_on_terminal=False) == 0
    assert stayed(None, is_on_terminal=False, num_looks=3) == 2  # once more when the run ends
    assert stayed(True, is_on_terminal=False) == 5


def test_a_run_without_a_live_view_does_not_wait() -> None:
    waits = Waits(signal_at=1)
    StayingViews(True, is_on_terminal=True, sleep=waits).stay(was_stopped=False)
    assert waits.num == 0


@pytest.mark.network
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's tables")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_system_knows_who_is_connected(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        assert not has_clients(port)
        with socket.create_connection((host, port)):
            accepted, _ = server.accept()
            assert has_clients(port)
            accepted.close()


def test_where_the_system_keeps_no_tables_nobody_is_connected(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("sl local_address\n 0:\n")
    assert not has_clients(9090, tables=[tmp_path / "none", tmp_path / "broken"])
