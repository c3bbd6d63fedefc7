"""Batches: a run for each dataset, nothing done twice."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from adapters import batch
from adapters.batch import BatchRun, plan_batch, run_batch
from adapters.cli import DOUBTED, INTERRUPTED, NOTHING_MADE
from engine.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.small_batches import NUM_PHOTOS, batch_command, rows_of, write_datasets
from tests.support.small_batches import batch as run_command
from tests.support.waiting import block_until

SUMMARY = {
    "stopped_by": "end_of_sources",
    "keyframes": 8,
    "registered_keyframes": 7,
    "mean_reprojection_error_px": 0.512,
    "wall_s": 12.3,
    "verdict": {"level": "good", "reasons": []},
}


@pytest.fixture(scope="module")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, towns_painted_once: None
) -> tuple[Path, Path]:
    return write_datasets(tmp_path_factory.mktemp("datasets"))


class Runs:
    """Stands for the command line: writes summaries, and knows what was asked for."""

    def __init__(self, *, fails: str = "") -> None:
        self.commands: list[list[str]] = []
        self._fails = fails

    def __call__(self, run: BatchRun) -> tuple[int, str]:
        command = run.command
        self.commands.append(list(command))
        if self._fails and any(self._fails in part for part in command):
            return 1, "livesfm: no images"
        folder = Path(command[1] if command[0] == "resume" else command[command.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if command[0] == "run":
            opened = {"event": "SourceOpened", "source": "site", "address": command[1]}
            (folder / "events.jsonl").write_text(
                f'{{"event": "RunStarted"}}\n{json.dumps(opened)}\n'
            )
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        return 0, "verdict: good"


def folders(tmp_path: Path, *names: str) -> list[str]:
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    return [str(tmp_path / name) for name in names]


def test_each_dataset_gets_a_run_of_its_name_and_two_of_one_name_get_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    monkeypatch.setattr(batch, "make_run", runs)
    sources = folders(tmp_path, "a/site", "b/site", "field")
    planned = plan_batch(sources, out=tmp_path / "runs", arguments=["--set=sift.max_features=9"])
    assert [run.name for run in planned] == ["site", "site_2", "field"]
    results = list(run_batch(planned))
    assert [result.row for result in results] == [
        (name, "8", "7", "0.51", "12", "good") for name in ("site", "site_2", "field")
    ]
    assert all(command[0] == "run" for command in runs.commands)
    assert all("--set=sift.max_features=9" in command for command in runs.commands)


def test_each_dataset_gets_its_own_files_of_positions_and_ground_control(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, without, clips = folders(tmp_path, "whole", "without", "clips")
    for path in (Path(whole, "geo.txt"), Path(whole, "gcp_list.txt"), Path(clips, "geo.txt")):
        path.touch()
    video = Path(clips, "clip.mp4")
    video.touch()
    files = {"--positions": "geo.txt", "--gcp": "gcp_list.txt"}
    planned = plan_batch(
        [whole, without, str(video)], out=tmp_path / "runs", arguments=["--set=x=1"], files=files
    )
    assert [run.arguments for run in planned] == [
        ("--set=x=1", "--positions", f"{whole}/geo.txt", "--gcp", f"{whole}/gcp_list.txt"),
        ("--set=x=1",),
        ("--set=x=1", "--positions", f"{clips}/geo.txt"),
    ]
    lines = [f"{without}: has no geo.txt", f"{without}: has no gcp_list.txt"]
    lines.append(f"{video}: has no gcp_list.txt")
    assert sorted(record.getMessage() for record in caplog.records) == sorted(
        f"{line}, and is mapped without" for line in lines
    )
    with pytest.raises(ConfigError, match="--gcp points.txt: there is no such file in any of"):
        plan_batch([whole, without], out=tmp_path / "runs", files={"--gcp": "points.txt"})


def test_datasets_of_one_name_keep_their_runs_in_whichever_order_they_are_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    monkeypatch.setattr(batch, "make_run", runs)
    out = tmp_path / "runs"
    first, second, third = folders(tmp_path, "a/site", "b/site", "c/site")
    list(run_batch(plan_batch([first, second], out=out)))
    planned = plan_batch([third, second, first], out=out)
    assert [run.name for run in planned] == ["site_3", "site_2", "site"]
    assert [run.is_done for run in planned] == [False, True, True]
    assert [run.name for run in plan_batch([second], out=out)] == ["site_2"]


def test_what_is_done_is_left_and_what_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_batch(folders(tmp_path, "a", "b", "c"), out=tmp_path / "runs")
    done, cut_off, new = planned
    for run, stopped_by in ((done, "end_of_sources"), (cut_off, "signal")):
        run.folder.mkdir(parents=True)
        (run.folder / "database.db").touch()
        (run.folder / "summary.json").write_text(json.dumps(SUMMARY | {"stopped_by": stopped_by}))
    runs = Runs()
    monkeypatch.setattr(batch, "make_run", runs)
    results = list(run_batch(planned))
    assert [result.exit_code for result in results] == [None, 0, 0]
    assert [command[:2] for command in runs.commands] == [
        ["resume", str(cut_off.folder)],
        ["run", new.source],
    ]


def test_a_dataset_that_cannot_be_reconstructed_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "make_run", Runs(fails="/bad"))
    planned = plan_batch(folders(tmp_path, "bad", "good"), out=tmp_path / "runs")
    bad, good = run_batch(planned)
    assert bad.row == ("bad", "-", "-", "-", "-", "livesfm: no images")
    assert good.row[-1] == "good"


@pytest.mark.parametrize(("level", "is_good"), [("good", True), ("doubtful", False)])
def test_a_map_is_good_where_its_verdict_is(level: str, is_good: bool) -> None:
    summary = SUMMARY | {"verdict": {"level": level, "reasons": []}}
    result = batch.BatchResult(name="a", exit_code=None, summary=summary)
    assert result.has_map
    assert result.is_good == is_good


def test_a_dataset_that_does_not_exist_is_refused_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: does not exist"):
        plan_batch([str(tmp_path / "nowhere")], out=tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_summary_that_is_none_is_no_reason_to_leave_a_run_out(
    tmp_path: Path, content: str
) -> None:
    run = BatchRun(name="a", source="a", folder=tmp_path, arguments=())
    (tmp_path / "summary.json").write_text(content)
    assert not run.is_done


@pytest.mark.slow
def test_the_command_makes_each_run_says_what_failed_and_does_nothing_twice(
    datasets: tuple[Path, Path], tmp_path: Path
) -> None:
    good, broken = datasets
    done = run_command(broken, good, out=tmp_path / "runs")
    assert done.returncode == NOTHING_MADE, done.stdout
    rows = rows_of(done)
    assert rows["good"][:2] == [str(NUM_PHOTOS), str(NUM_PHOTOS)]
    assert rows["broken"][:2] == ["0", "0"]
    assert "no map could be made" in done.stdout
    written = (tmp_path / "runs" / "good" / "summary.json").read_bytes()
    again = run_command(good, out=tmp_path / "runs")
    assert again.returncode == DOUBTED, again.stdout
    assert rows_of(again)["good"] == rows["good"]
    assert (tmp_path / "runs" / "good" / "summary.json").read_bytes() == written


@pytest.mark.slow
def test_a_batch_that_is_interrupted_saves_its_map_and_goes_on_with_it(
    datasets: tuple[Path, Path], tmp_path: Path
) -> None:
    good, _ = datasets
    out = tmp_path / "runs"
    process = subprocess.Popen(batch_command(good, out=out), cwd=ROOT)
    try:
        events = out / "good" / "events.jsonl"
        block_until(
            lambda: events.exists() and b"FrameReceived" in events.read_bytes(), what="a frame"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait() == INTERRUPTED
    finally:
        process.kill()
        process.wait()
    assert json.loads((out / "good" / "summary.json").read_text())["stopped_by"] == "signal"
    again = run_command(good, out=out)
    assert again.returncode == DOUBTED, again.stdout
    assert rows_of(again)["good"][0] == str(NUM_PHOTOS)
