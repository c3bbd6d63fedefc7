from __future__ import annotations

import json
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters import cli
from adapters.benchmark import benchmark
from adapters.benchmark.benchmark import JSON_FILE, MARKDOWN_FILE, Plan, plan_of, run_benchmark
from adapters.benchmark.measuring import measure
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.config import SourcesConfig
from engine.errors import ConfigError
from engine.types import FrameId
from tests.support.benchmark_runs import ring, write_run, write_tum
from tests.support.small_videos import picture

NUM = 6

# A program that behaves like `livesfm run`: it copies what a run left to where --out says.
PROGRAM = """#!{python}
import shutil, sys
shutil.copytree({run!r}, sys.argv[sys.argv.index("--out") + 1], symlinks=True)
sys.exit({exit_code})
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A dataset of photos with the poses of `ring`."""
    import cv2

    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for number in range(NUM):
        cv2.imwrite(str(folder / "images" / f"{number:03d}.jpg"), picture(number))
    write_tum(folder / "groundtruth.txt", dict(enumerate(ring(NUM))))
    return folder


def fake_program(tmp_path: Path, *, exit_code: int = 0, name: str = "livesfm") -> Path:
    run = tmp_path / "left"
    if not run.exists():
        write_run(run, ring(NUM))
    program = tmp_path / name
    program.write_text(PROGRAM.format(python=sys.executable, run=str(run), exit_code=exit_code))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def plan(paths: list[Path], *, out: Path, baseline: Path | None = None, **options: Any) -> Plan:
    given: dict[str, Any] = {
        "configs": ["default", "phone"],
        "settings": [],
        "peers": ["none"],
        "only": ["baseline-*"],
        "references": [],
        "num_runs": 2,
        "num_threads": 1,
        "peer_step": None,
        "overwrite": False,
        "keep": False,
        "limit_s": 600.0,
    }
    return plan_of(paths, out=out, baseline=baseline, **given | options)


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / JSON_FILE).read_text())
    return record


def runs_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    (dataset,) = record_of(out)["datasets"]
    return {pipeline["name"]: pipeline["runs"] for pipeline in dataset["pipelines"]}


def test_pipelines_take_turns_and_all_runs_are_scored(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def noted(command: list[str], **options: Any) -> Any:
        order.append("phone" if "phone" in command else "default")
        return measure(command, **options)

    monkeypatch.setattr(benchmark, "measure", noted)
    out = tmp_path / "out"
    page = run_benchmark(plan([photos], out=out, baseline=fake_program(tmp_path)))
    assert order == ["default", "phone"] * 2
    assert page == out / MARKDOWN_FILE
    runs = runs_of(out)
    assert list(runs) == ["baseline-default", "baseline-phone"]
    for each in runs.values():
        assert [run["round_number"] for run in each] == [1, 2]
        assert [run["failure"] for run in each] == ["", ""]
        assert [run["figures"]["num_right"] for run in each] == [NUM, NUM]
    assert record_of(out)["is_complete"]
    assert "baseline-phone" in page.read_text()


def test_work_is_deleted_unless_it_is_to_be_kept(tmp_path: Path, photos: Path) -> None:
    program = fake_program(tmp_path)
    run_benchmark(plan([photos], out=tmp_path / "out", baseline=program, num_runs=1))
    assert not (tmp_path / "out" / "work").exists()
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 2
    run_benchmark(plan([photos], out=tmp_path / "kept", baseline=program, num_runs=1, keep=True))
    kept = tmp_path / "kept" / "work" / "set" / "baseline-phone-1" / "run"
    assert (kept / "trajectory.txt").is_file()


def test_a_folder_that_holds_something_else_is_refused_and_stays_as_it_is(
    tmp_path: Path, photos: Path
) -> None:
    own = tmp_path / "project" / "work" / "own.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no benchmark"):
            plan([photos], out=tmp_path / "project", only=[], overwrite=overwrite)
    assert own.read_text() == "mine"


def test_a_benchmark_deletes_only_what_it_made(tmp_path: Path, photos: Path) -> None:
    program, out = fake_program(tmp_path), tmp_path / "out"
    run_benchmark(plan([photos], out=out, baseline=program, num_runs=1))
    own = out / "work" / "own.txt"
    own.parent.mkdir()
    own.write_text("mine")
    run_benchmark(plan([photos], out=out, baseline=program, num_runs=1, overwrite=True))
    assert [path.name for path in (out / "work").iterdir()] == ["own.txt"]


def test_an_interrupted_benchmark_keeps_what_was_measured(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([True, True, True, False])

    def interrupted(command: list[str], **options: Any) -> Any:
        if not next(left):
            raise KeyboardInterrupt
        return measure(command, **options)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(plan([photos], out=out, baseline=fake_program(tmp_path)))
    runs = runs_of(out)
    assert [len(each) for each in runs.values()] == [2, 1]
    assert not record_of(out)["is_complete"]
    assert "Interrupted" in (out / MARKDOWN_FILE).read_text()
    assert not (out / "work").exists()


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    program = fake_program(tmp_path, exit_code=7)
    run_benchmark(plan([photos], out=out, baseline=program, num_runs=1))
    for (run,) in runs_of(out).values():
        assert run["failure"].startswith("exit code 7")
        assert run["figures"]["cpu_s"] > 0.0
    assert record_of(out)["is_complete"]


def test_a_run_that_takes_too_long_has_no_figures(tmp_path: Path, photos: Path) -> None:
    program = tmp_path / "livesfm"
    program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    program.chmod(0o755)
    out = tmp_path / "out"
    run_benchmark(
        plan([photos], out=out, baseline=program, num_runs=1, configs=["phone"], limit_s=0.3)
    )
    ((run,),) = runs_of(out).values()
    assert run["failure"] == "killed after 0 s"
    assert run["figures"] is None


def test_what_cannot_be_measured_is_refused_before_anything_runs(
    tmp_path: Path, photos: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--only leaves no pipeline"):
        plan([photos], out=out, only=["nothing"])
    with pytest.raises(ConfigError, match="no such program"):
        plan([photos], out=out, baseline=tmp_path / "nowhere")
    foreign = tmp_path / "foreign.txt"
    write_tum(foreign, {1000.0: ring(1)[0]})
    with pytest.raises(ConfigError, match=r"foreign\.txt: none of its 1 timestamps"):
        plan([photos], out=out, references=[f"set={foreign}"])
    with pytest.raises(ConfigError, match="two datasets have one name"):
        plan([photos, photos / "images"], out=out, only=[])
    out.mkdir()
    (out / JSON_FILE).touch()
    with pytest.raises(ConfigError, match="--overwrite replaces it"):
        plan([photos], out=out, only=[])
    assert plan([photos], out=out, only=[], overwrite=True).num_threads == 1


def test_the_command_prints_where_the_report_is(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    program = fake_program(tmp_path)
    given = ["--baseline", str(program), "--only", "baseline-*", "--runs", "1", "--out", str(out)]
    former = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(cli.app, ["benchmark", str(photos), "--peers", "none", *given])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / MARKDOWN_FILE)
    assert signal.getsignal(signal.SIGTERM) is former
    progress = [one for one in caplog.records if one.name == benchmark.__name__]
    assert [one.levelname for one in progress] == ["INFO"]
    assert progress[0].message == "set, round 1 of 1: baseline-default"
    again = CliRunner().invoke(cli.app, ["benchmark", str(photos), "--out", str(out)])
    assert again.exit_code == cli.REFUSED
    assert "--overwrite" in again.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("towns_painted_once")
def test_the_town_goes_through_livesfm_and_through_colmap(tmp_path: Path) -> None:
    import cv2

    folder = tmp_path / "town"
    (folder / "images").mkdir(parents=True)
    town = SyntheticTown(
        parse_town_spec("synthetic:town"),
        next_frame_id=lambda: FrameId(1),
        config=SourcesConfig(),
    )
    poses = {}
    for number, index in enumerate(range(0, 48, 6)):
        rendered = town.render(index)
        small = cv2.resize(rendered.pixels, (320, 240), interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / "images" / f"{number:03d}.jpg"), bgr)
        poses[float(number)] = rendered.cam_from_world
    write_tum(folder / "groundtruth.txt", poses)
    out = tmp_path / "out"
    run_benchmark(
        plan(
            [folder],
            out=out,
            configs=["phone"],
            peers=["colmap-exhaustive-incremental-500", "colmap-sequential-global-500"],
            only=[],
            num_runs=1,
        )
    )
    runs = runs_of(out)
    assert list(runs) == [
        "livesfm-phone",
        "colmap-exhaustive-incremental-500",
        "colmap-sequential-global-500",
    ]
    for name, (run,) in runs.items():
        assert run["failure"] == "", name
        figures = run["figures"]
        assert figures["num_given"] == figures["num_referenced"] == len(poses)
        assert figures["num_right"] >= len(poses) - 1
        assert figures["ate_percent"] < 1.0
        assert figures["auc_5_deg"] > 0.8
        assert figures["cpu_s"] > 0.5
        assert figures["peak_rss_mb"] > 100.0
        assert (figures["ate_causal"] is not None) == name.startswith("livesfm")
    assert set(runs["colmap-sequential-global-500"][0]["stages_cpu_s"]) == {
        "extract",
        "match",
        "map",
    }
