"""``livesfm report``, and the report that a run leaves when it ends."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapters import cli
from adapters.launch import report_at_end
from adapters.report import report as report_module
from engine.config import Config
from tests.support.reported_runs import ReportedRun, noisy_model


@pytest.fixture
def run(tmp_path: Path) -> ReportedRun:
    return ReportedRun(tmp_path / "field", noisy_model(6, 40))


def livesfm(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_the_command_writes_the_page_and_says_where(run: ReportedRun) -> None:
    result = livesfm("report", str(run.path))
    assert result.exit_code == 0, result.output
    page = run.path / "report.html"
    assert result.stdout.strip() == str(page)
    assert b"This map is good" in page.read_bytes()
    assert not list(run.path.glob(".*report*"))


def test_a_former_page_is_replaced_even_where_it_is_a_link(
    run: ReportedRun, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("mine")
    (run.path / "report.html").symlink_to(other)
    assert livesfm("report", str(run.path)).exit_code == 0
    assert other.read_text() == "mine"
    assert not (run.path / "report.html").is_symlink()


def test_open_shows_it_in_the_browser(run: ReportedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert livesfm("report", str(run.path), "--open").exit_code == 0
    assert shown == [(run.path / "report.html").resolve().as_uri()]


def test_a_killed_run_has_a_page_and_a_hint(run: ReportedRun) -> None:
    (run.path / "summary.json").unlink()
    (run.path / ".lock").write_text("{}")
    result = livesfm("report", str(run.path))
    assert result.exit_code == 0
    assert f"livesfm resume {run.path}" in result.stderr
    assert b"Unfinished run" in (run.path / "report.html").read_bytes()


@pytest.mark.parametrize("what", ["empty", "missing", "file"])
def test_what_is_no_run_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "file":
        path.write_text("no run")
    result = livesfm("report", str(path))
    assert result.exit_code == cli.REFUSED
    assert len(result.stderr.strip().splitlines()) == 1
    assert "is not the folder of a run" in result.stderr


def test_a_run_leaves_its_report_unless_told_otherwise(run: ReportedRun) -> None:
    off = Config.model_validate({"report": {"enabled": False}})
    report_at_end(off, run.path)
    assert not (run.path / "report.html").exists()
    report_at_end(Config(), run.path)
    assert (run.path / "report.html").is_file()


def test_a_report_that_cannot_be_made_costs_the_run_nothing(
    run: ReportedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(path: Path) -> bytes:
        raise RuntimeError(f"nothing goes with {path.name}")

    monkeypatch.setattr(report_module, "report_page", broken)
    with caplog.at_level(logging.ERROR):
        report_at_end(Config(), run.path)
    assert "no report could be made" in caplog.text
    assert "nothing goes with field" in caplog.text
    assert not (run.path / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(
    run: ReportedRun, caplog: pytest.LogCaptureFixture
) -> None:
    (run.path / "report.html").mkdir()
    (run.path / "report.html" / "mine").write_text("kept")
    report_at_end(Config(), run.path)
    assert "the report cannot be written" in caplog.text
    assert (run.path / "report.html" / "mine").read_text() == "kept"
