from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest

from adapters.native_log import handlers_writing_to, native_log_captured
from tests.support.paths import ROOT
from tests.support.waiting import HANG_S

GLOG = "{severity}20261123 01:07:45.352366 137602743600896 timer.cc:90] {message}\n"


def say(text: str) -> None:
    """Writes as a native library does: past Python."""
    os.write(2, text.encode())


@pytest.mark.parametrize(
    ("severity", "level"),
    [
        ("I", logging.DEBUG),
        ("W", logging.WARNING),
        ("E", logging.ERROR),
        ("F", logging.CRITICAL),
    ],
)
def test_native_log_lines_become_records_and_leave_the_terminal(
    severity: str,
    level: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    with native_log_captured():
        say(GLOG.format(severity=severity, message="Elapsed time: 0.001 [minutes]"))
    (record,) = [one for one in caplog.records if one.name == "adapters.native_log"]
    assert record.levelno == level
    assert record.message == "timer.cc:90] Elapsed time: 0.001 [minutes]"
    assert "Elapsed" not in capfd.readouterr().err


def test_everything_else_reaches_the_terminal_unchanged(capfd: pytest.CaptureFixture[str]) -> None:
    with native_log_captured():
        say("E is no severity without a date\n")
        say("half a ")
        say("line\nand no end")
    assert capfd.readouterr().err == "E is no severity without a date\nhalf a line\nand no end"


def test_a_recording_that_cannot_be_written_is_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    time = "\x1b[2m2026-11-26T21:58:40.091567Z\x1b[0m "
    with native_log_captured():
        say(
            f"{time}\x1b[31mERROR\x1b[0m \x1b[2mre_log_encoding::rrd::file_sink\x1b[0m\x1b[2m:"
            "\x1b[0m Failed to write log stream to r/a.rrd: No space left\n"
        )
        say(
            f"{time}\x1b[33m WARN\x1b[0m \x1b[2mre_log_encoding::rrd::encoder\x1b[0m\x1b[2m:\x1b[0m"
            " encoder couldn't be finished\n"
        )
        say("2026-11-26T21:58:40.092Z  WARN re_grpc_server: a client is slow\n")
    assert capfd.readouterr().err == ""
    assert [
        (record.levelno, record.message)
        for record in caplog.records
        if record.name == "adapters.native_log" and record.levelno > logging.DEBUG
    ] == [
        (
            logging.ERROR,
            "the recording ends here: Failed to write log stream to r/a.rrd: No space left",
        ),
        (logging.WARNING, "rerun: a client is slow"),
    ]


def test_native_log_lines_in_colours_leave_the_terminal_too(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    warning = GLOG.format(severity="W", message="a warning")
    with native_log_captured():
        say(f"\x1b[0;33m{warning}\x1b[m{GLOG.format(severity='I', message='all is well')}")
        say("not of a library\n")
    records = [one for one in caplog.records if one.name == "adapters.native_log"]
    assert [(one.levelno, one.message) for one in records] == [
        (logging.WARNING, "timer.cc:90] a warning"),
        (logging.DEBUG, "timer.cc:90] all is well"),
    ]
    assert capfd.readouterr().err == "not of a library\n"


def test_a_step_that_the_solver_tries_again_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    line = GLOG.format(severity="W", message="Linear solver failure. Failed to compute a step")
    with native_log_captured():
        say(line.replace("timer.cc:90", "levenberg_marquardt_strategy.cc:123"))
    (record,) = [one for one in caplog.records if one.name == "adapters.native_log"]
    assert record.levelno == logging.DEBUG


def test_a_native_log_line_without_an_end_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with native_log_captured():
        say(GLOG.format(severity="E", message="aborting").removesuffix("\n"))
    (record,) = [one for one in caplog.records if one.name == "adapters.native_log"]
    assert record.message == "timer.cc:90] aborting"


def test_afterwards_native_lines_go_where_they_went_before(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with native_log_captured():
        pass
    line = GLOG.format(severity="I", message="after")
    say(line)
    assert capfd.readouterr().err == line
    assert caplog.records == []


def test_an_error_inside_puts_everything_back(capfd: pytest.CaptureFixture[str]) -> None:
    former = sys.stderr
    with pytest.raises(ZeroDivisionError), native_log_captured():
        raise ZeroDivisionError
    assert sys.stderr is former
    say("as before\n")
    assert capfd.readouterr().err == "as before\n"


def test_a_child_that_keeps_the_descriptor_does_not_hold_up_the_end() -> None:
    program = """
        import os, subprocess, sys
        from adapters.native_log import native_log_captured
        with native_log_captured():
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert child.poll() is None, "the child ended first"
        child.communicate(b"\\n")
        print("done")
    """
    done = run_python(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_terminal_that_is_gone_does_not_stop_the_run() -> None:
    program = """
        import os, sys
        from adapters.native_log import native_log_captured
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        os.close(reading)
        with native_log_captured():
            for _ in range(3000):  # far more than a pipe holds
                os.write(2, b"x" * 100 + b"\\n")
        print("done")
        sys.stdout.flush()
        os._exit(0)
    """
    done = run_python(program)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_pythons_own_messages_pass_by_the_capture(capfd: pytest.CaptureFixture[str]) -> None:
    program = """
        import logging, sys
        from adapters.native_log import handlers_writing_to, native_log_captured
        logging.basicConfig(format="%(levelname)s %(message)s")
        former = sys.stderr
        with native_log_captured():
            assert handlers_writing_to(former) == []
            assert len(handlers_writing_to(sys.stderr)) == 1
            logging.warning("during")
            print("printed", file=sys.stderr)
        assert len(handlers_writing_to(former)) == 1
        logging.warning("after")
    """
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "WARNING during\nprinted\nWARNING after\n"


def test_the_capture_for_others_leaves_their_stderr_and_never_waits_for_itself() -> None:
    program = """
        import logging, os, sys
        from adapters.native_log import descriptor_captured
        logging.basicConfig(format="%(message).20s")
        former = sys.stderr
        with descriptor_captured():
            assert sys.stderr is former
            line = b"W20261126 21:58:40.091567 7 file.cc:9] " + b"x" * 100 + b"\\n"
            for _ in range(150):  # what is logged of it fills the pipe as well
                os.write(2, 20 * line)  # no more than a pipe keeps together
        assert sys.stderr is former
    """
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stderr == 3000 * "file.cc:9] xxxxxxxxx\n"


def test_a_process_without_a_terminal_has_nothing_captured() -> None:
    program = """
        import os
        from adapters.native_log import descriptor_captured
        os.close(2)
        with descriptor_captured():
            print("done")
    """
    done = run_python(program)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_only_handlers_of_that_stream_are_found() -> None:
    assert handlers_writing_to(sys.__stdout__ or sys.stdout) == []


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
