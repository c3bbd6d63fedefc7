"""CPU time is charged to the stage that a thread is in."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from engine.cpu_time import Stage, accounts, charge_thread_to, charged_to, cpu_by_stage

A_WHILE_S = 0.02


def compute(cpu_s: float = A_WHILE_S) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        sum(range(1000))


def used_by(work: Callable[[], None]) -> dict[Stage, float]:
    """What a thread that does some work uses, by stage; stages without any are left out."""
    before_s = cpu_by_stage()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    after_s = cpu_by_stage()
    return {one: after_s[one] - before_s[one] for one in Stage if after_s[one] > before_s[one]}


def test_each_stage_has_what_was_done_in_it_and_not_in_stages_within() -> None:
    @charged_to(Stage.LOCAL_ADJUSTMENT)
    def adjust() -> None:
        compute(2 * A_WHILE_S)

    def work() -> None:
        charge_thread_to(Stage.MAPPING)
        compute()
        with charged_to(Stage.REGISTER):
            compute()
            adjust()
            compute()
        charge_thread_to(None)
        compute(5 * A_WHILE_S)  # charged to nothing

    used_s = used_by(work)
    assert set(used_s) == {Stage.MAPPING, Stage.REGISTER, Stage.LOCAL_ADJUSTMENT}
    assert used_s[Stage.MAPPING] == pytest.approx(A_WHILE_S, rel=0.5)
    assert used_s[Stage.REGISTER] == pytest.approx(2 * A_WHILE_S, rel=0.5)
    assert used_s[Stage.LOCAL_ADJUSTMENT] == pytest.approx(2 * A_WHILE_S, rel=0.5)


@pytest.mark.parametrize("whole", [Stage.WINDOWS, Stage.VERDICT])
def test_what_windows_and_verdicts_call_is_charged_to_them(whole: Stage) -> None:
    def work() -> None:
        with charged_to(whole), charged_to(Stage.LOCAL_ADJUSTMENT):
            compute()

    assert set(used_by(work)) == {whole}


def test_waiting_costs_nothing() -> None:
    def work() -> None:
        with charged_to(Stage.JOURNAL):
            time.sleep(5 * A_WHILE_S)

    assert used_by(work).get(Stage.JOURNAL, 0.0) < A_WHILE_S


def test_a_stage_that_raises_is_left() -> None:
    def work() -> None:
        with pytest.raises(ValueError, match="broken"), charged_to(Stage.JOURNAL):
            raise ValueError("broken")
        compute()

    assert used_by(work).get(Stage.JOURNAL, 0.0) < A_WHILE_S


def test_a_thread_that_ends_within_a_stage_is_charged_to_its_end_and_then_forgotten() -> None:
    def work() -> None:
        charge_thread_to(Stage.TRACK)
        assert "short" in {one.thread_name for one in accounts()}
        compute()

    before_s = cpu_by_stage()[Stage.TRACK]
    for _ in range(3):
        thread = threading.Thread(target=work, name="short")
        thread.start()
        thread.join()
    assert cpu_by_stage()[Stage.TRACK] - before_s >= 3 * A_WHILE_S
    assert "short" not in {one.thread_name for one in accounts()}


def test_a_thread_has_no_account_before_it_enters_a_stage_and_leaving_is_silent() -> None:
    program = (
        "from engine.cpu_time import Stage, accounts, charge_thread_to\n"
        "print(len(accounts()))\n"
        "charge_thread_to(Stage.TRACK)\n"
        "print(len(accounts()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1"]
    assert done.stderr == ""


def test_what_a_thread_uses_is_seen_by_others_while_it_is_in_a_stage() -> None:
    has_computed, may_end = threading.Event(), threading.Event()

    def work() -> None:
        charge_thread_to(Stage.TRACK)
        compute()
        has_computed.set()
        may_end.wait()

    before_s = cpu_by_stage()[Stage.TRACK]
    thread = threading.Thread(target=work, name="seen")
    thread.start()
    has_computed.wait()
    meanwhile_s = cpu_by_stage()[Stage.TRACK] - before_s
    (account,) = [one for one in accounts() if one.thread_name == "seen"]
    stage = account.stage
    may_end.set()
    thread.join()

    assert meanwhile_s >= A_WHILE_S
    assert stage is Stage.TRACK
