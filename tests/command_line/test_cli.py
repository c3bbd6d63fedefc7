from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import NoReturn

import pytest
from typer.testing import CliRunner, Result

from adapters import cli, install_advice
from adapters.doctor import Finding
from adapters.install_advice import installed_version
from adapters.launch import LaunchOptions
from adapters.sources.files.photo_list import PhotoList, photo_list_of
from adapters.views.view_mode import ViewMode
from engine.config import Config, load_config
from engine.errors import AdapterUnavailableError, ConfigError, EngineError, SourceError
from engine.output.run_folder import FRAMES_HEADER
from engine.run.engine import RunOutcome, StoppedBy
from engine.types import Verdict, VerdictLevel, VerdictReason
from tests.support.paths import ROOT
from tests.support.verdicts import verdict_of
from tests.support.waiting import HANG_S

COMMANDS = [
    *("run", "resume", "demo", "evaluate", "export", "georeference", "report", "benchmark"),
    *("batch", "doctor"),
]


def livesfm(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


class Launches:
    """Takes the place of running: remembers what was asked, and answers as told."""

    def __init__(self) -> None:
        self.asked: list[tuple[Config, LaunchOptions]] = []
        self.answer: EngineError | None = None
        self.num_keyframes, self.num_registered = 10, 9
        self.stopped_by = StoppedBy.END_OF_SOURCES
        self.verdict = Verdict()
        self.num_in_other_maps: tuple[int, ...] = ()
        self.not_saved: tuple[str, ...] = ()
        self.asked_path: Path | None = None
        self.unopened: tuple[str, ...] = ()
        self.summary: dict[str, object] = {}

    def __call__(self, config: Config, options: LaunchOptions) -> RunOutcome:
        self.asked.append((config, options))
        if self.answer is not None:
            raise self.answer
        return RunOutcome(
            path=options.path,
            stopped_by=self.stopped_by,
            num_keyframes=self.num_keyframes,
            num_registered=self.num_registered,
            summary=self.summary,
            verdict=self.verdict,
            num_in_other_maps=self.num_in_other_maps,
            not_saved=self.not_saved,
            asked_path=self.asked_path,
            unopened=self.unopened,
        )

    @property
    def config(self) -> Config:
        return self.asked[-1][0]

    @property
    def options(self) -> LaunchOptions:
        return self.asked[-1][1]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launches:
    """No run is started, whatever the sources; the current folder is empty."""
    fake = Launches()
    monkeypatch.setattr(cli, "refuse_unknown_sources", lambda specs: None)
    monkeypatch.setattr(cli, "_launch", fake)
    monkeypatch.chdir(tmp_path)
    return fake


# -- asking ---------------------------------------------------------------------------------------


def test_files_of_positions_come_by_whole_paths_after_those_of_the_configuration(
    launches: Launches,
) -> None:
    result = livesfm(
        *("run", "photos", "--positions", "geo.txt"), *("--set", "telemetry.positions=[/a.csv]")
    )
    assert result.exit_code == 0
    assert launches.config.telemetry.positions == ("/a.csv", os.path.abspath("geo.txt"))


def test_calibrations_come_after_those_of_the_configuration(launches: Launches) -> None:
    result = livesfm(
        *("run", "photos", "--calibration", "a.yml", "--calibration", "left*=b.yml#1"),
        *("--set", "cameras.calibrations=[c.yml]"),
    )
    assert result.exit_code == 0
    assert launches.config.cameras.calibrations == ("c.yml", "a.yml", "left*=b.yml#1")


def test_a_run_is_asked_for_with_the_defaults(launches: Launches) -> None:
    result = livesfm("run", "photos")
    assert result.exit_code == 0
    assert launches.config == Config()
    assert launches.options == LaunchOptions(
        sources=("photos",),
        path=Path("runs/photos"),
        overwrite=False,
        view_mode=ViewMode.RECORD,
        show_progress=True,
    )


def test_every_option_of_a_run_arrives(launches: Launches) -> None:
    result = livesfm("run", "a", "b", "--out=there", "--view=none", "--overwrite", "--quiet")
    assert result.exit_code == 0
    assert launches.options == LaunchOptions(
        sources=("a", "b"),
        path=Path("there"),
        overwrite=True,
        view_mode=ViewMode.NONE,
        show_progress=False,
    )


def test_masks_are_settings_of_cameras(launches: Launches) -> None:
    Path("x=y.png").touch()
    result = livesfm(
        *("run", "photos", "--mask", "legs: ä.png", "--mask", "left*=a=b.png"),
        *("--mask", "x=y.png", "--set", "cameras.masks={c: d}"),
    )
    assert result.exit_code == 0
    assert launches.config.cameras.masks == {"*": "x=y.png", "left*": "a=b.png"}


def test_several_files_and_settings_are_laid_over_each_other(launches: Launches) -> None:
    Path("one.yaml").write_text("sift:\n  max_features: 100\n  max_ratio: 0.7\n")
    Path("two.yaml").write_text("sift:\n  max_features: 200\n")
    result = livesfm(
        *("run", "photos", "--config", "one.yaml", "-c", "two.yaml"),
        *("--set", "sift.max_ratio=0.9", "--set", "scene_graph.temporal_offsets=[1, 5]"),
        *("--set", "runtime.seed=3"),
    )
    assert result.exit_code == 0
    sift = launches.config.sift
    assert (sift.max_features, sift.max_ratio) == (200, 0.9)
    assert launches.config.scene_graph.temporal_offsets == (1, 5)
    assert launches.config.runtime.seed == 3


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("synthetic:town", "town"),
        ("synthetic:town?frames=60&path=orbit", "town"),
        ("rtsp://user:secret@camera.local/stream", "stream"),
        ("rtsp://user:secret@camera.local", "camera.local"),
        ("camera:0", "camera-0"),
        ("phone://0.0.0.0:8443", "phone"),
        ("mqtts://user:secret@broker:8883/site/+/frame", "site"),
        ("mqtt://broker/farm/north/frame", "farm-north"),
        ("mqtt://broker/+/frame", "mqtt"),
        ("rtsp://camera.local/", "camera.local"),
        ("???", "run"),
        ("x" * 5000, "x" * 100),
    ],
)
def test_the_folder_is_named_after_the_address_without_options_and_credentials(
    launches: Launches, source: str, name: str
) -> None:
    livesfm("run", source)
    assert launches.options.path == Path("runs", name)


@pytest.mark.parametrize(
    ("made", "source", "name"),
    [
        ("holiday/photos", "holiday/photos", "photos"),
        ("holiday/images", "holiday/images/", "holiday"),
        ("holiday/video.mp4", "holiday/video.mp4", "holiday"),
        ("my clip.v2.mp4", "my clip.v2.mp4", "my-clip.v2"),
        ("photos.2024", "photos.2024", "photos.2024"),
        ("Fjällräven é", "Fjällräven é", "Fjällräven-é"),
        ("here/photos", "here/photos/../photos/.", "photos"),
    ],
)
def test_the_folder_is_named_after_the_path(
    launches: Launches, made: str, source: str, name: str
) -> None:
    path = Path(made)
    if path.suffix == ".mp4":
        path.parent.mkdir(exist_ok=True)
        path.touch()
    else:
        path.mkdir(parents=True)
    livesfm("run", source)
    assert launches.options.path == Path("runs", name)


def test_the_folder_is_named_after_a_link_and_not_after_what_it_points_to(
    launches: Launches,
) -> None:
    Path("recording").mkdir()
    Path("recording/video.mp4").touch()
    Path("walk.mp4").symlink_to("recording/video.mp4")
    livesfm("run", "walk.mp4")
    assert launches.options.path == Path("runs/walk")


def test_photos_of_a_folder_that_the_shell_names_are_one_source_with_its_name(
    launches: Launches, tmp_path: Path
) -> None:
    photos = [tmp_path / "100APPLE" / name for name in ("a.jpg", "b.HEIC")]
    photos[0].parent.mkdir()
    for photo in photos:
        photo.touch()
    assert livesfm("run", *map(str, photos)).exit_code == 0
    (spec,) = launches.options.sources
    assert photo_list_of(spec) == PhotoList(
        folder=tmp_path / "100APPLE", files=(PurePosixPath("a.jpg"), PurePosixPath("b.HEIC"))
    )
    assert launches.options.path == Path("runs/100APPLE")


def test_a_folder_that_exists_is_left_alone_and_the_next_name_taken(launches: Launches) -> None:
    Path("runs/photos").mkdir(parents=True)
    livesfm("run", "photos")
    assert launches.options.path == Path("runs/photos-2")


def test_the_demo_replaces_its_last_run_unless_asked_not_to(launches: Launches) -> None:
    launches.num_registered = 0  # nothing to evaluate
    livesfm("demo", "--quiet")
    assert launches.options.sources == ("synthetic:town",)
    assert launches.options.path == Path("runs/demo")
    assert launches.options.overwrite
    assert not launches.options.show_progress
    livesfm("demo", "--no-overwrite")
    assert not launches.options.overwrite


# -- answering ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_registered", "stopped_by", "code", "words"),
    [
        (9, StoppedBy.END_OF_SOURCES, 0, "9 of 10 keyframes registered\n"),
        (2, StoppedBy.SIGNAL, 0, "2 of 10 keyframes registered\n"),
        (0, StoppedBy.END_OF_SOURCES, 1, "no map could be made"),
        (0, StoppedBy.SIGNAL, 1, "no map could be made"),
        (9, StoppedBy.FAILURE, 1, "the run broke off, see the errors above"),
        (9, StoppedBy.FULL_DISK, 1, "the run ended early because the disk is nearly full"),
    ],
)
def test_the_exit_code_tells_whether_something_useful_was_made(
    launches: Launches, num_registered: int, stopped_by: StoppedBy, code: int, words: str
) -> None:
    launches.num_registered, launches.stopped_by = num_registered, stopped_by
    result = livesfm("run", "photos", "--out", "there")
    assert result.exit_code == code
    last_line = result.stdout.splitlines(keepends=True)[-1]
    assert last_line.startswith("there: ")
    assert words in last_line


def test_the_exit_code_and_the_last_line_tell_what_is_not_on_disk(launches: Launches) -> None:
    launches.not_saved = ("the final map", "summary.json")
    result = livesfm("run", "photos", "--out", "there")
    assert result.exit_code == 1
    last = result.stdout.splitlines()[-1]
    assert last == ("there: 9 of 10 keyframes registered; NOT SAVED: the final map, summary.json")
    launches.not_saved, launches.asked_path = (), Path("gone")
    result = livesfm("run", "photos", "--out", "there")
    assert result.exit_code == 1
    assert "; it is not in gone, see above" in result.stdout.splitlines()[-1]


def test_a_signal_that_a_native_module_turned_into_another_error_is_still_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(*_: object) -> NoReturn:
        try:
            raise KeyboardInterrupt("SIGINT")
        except KeyboardInterrupt as interrupt:
            raise ImportError("numpy.core.multiarray failed to import") from interrupt

    monkeypatch.setattr(cli, "_launch", load)
    result = livesfm("run", str(tmp_path), "--out", str(tmp_path / "there"))
    assert result.exit_code == cli.INTERRUPTED
    assert "stopped before anything was written" in result.stderr


def test_the_last_lines_say_what_the_dense_map_came_to(launches: Launches, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "products").mkdir(parents=True)
    for name in ("orthophoto.tif", "dense.ply"):
        (run / "products" / name).touch()
    launches.summary = {
        "dense": {"keyframes_with_depth": 7, "keyframes_without": {"budget": 2, "end_of_run": 1}}
    }
    shown = " ".join(livesfm("run", "photos", "--out", str(run), "--overwrite").output.split())
    assert "depth of 7 keyframes in" in shown
    assert "(dense.ply, orthophoto.tif); 3 more: livesfm resume" in shown
    launches.summary = {"dense": {"keyframes_with_depth": 0, "keyframes_without": {"budget": 3}}}
    assert "dense map" not in livesfm("run", "photos", "--out", str(run), "--overwrite").output


@pytest.mark.parametrize(
    ("name", "figures", "words"),
    [
        ("orthophoto.tif", {"written": {"epsg": 32615}}, "GeoTIFFs in EPSG:32615"),
        ("orthophoto.png", {"written": {"epsg": None}}, "for GeoTIFFs in UTM: INSTALL survey"),
        ("orthophoto.png", {"products_in_former_frame": True}, ""),
        ("dense.ply", {}, ""),
    ],
)
def test_the_line_of_the_dense_map_names_the_crs_or_how_to_get_geotiffs(
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    figures: dict[str, object],
    words: str,
) -> None:
    monkeypatch.setattr(install_advice, "how_to_install", "INSTALL {}".format)
    products = Path("run/products")
    products.mkdir(parents=True)
    (products / name).touch()
    dense = {"keyframes_with_depth": 7, "keyframes_without": {}}
    launches.summary = {"georeference": {"origin": {}}, "dense": {**dense, **figures}}
    lines = livesfm("run", "photos", "--out", "run", "--overwrite").output.splitlines()
    (line,) = (line for line in lines if line.startswith("dense map: "))
    assert words in line
    assert ("GeoTIFF" in line) is bool(words)
    assert ("livesfm resume run" in line) is words.startswith("for")
    launches.summary["georeference"] = None
    output = livesfm("run", "photos", "--out", "run", "--overwrite").output
    assert "for GeoTIFFs" not in output


def test_the_last_lines_count_what_was_not_used(launches: Launches) -> None:
    launches.summary = {"frames_dropped": {}, "left_out": []}
    assert "dropped" not in livesfm("run", "photos", "--out", "there").output
    left_out = {"source": "photos", "reason": "no photo", "example": "a", "is_missed": True}
    launches.summary = {
        "frames_dropped": {"unreadable": 3, "failed": 1},
        "left_out": [
            {**left_out, "kind": ".psd", "num_files": 2},
            {**left_out, "kind": ".gif", "num_files": 1},
            {**left_out, "kind": ".txt", "num_files": 7, "is_missed": False},
            {**left_out, "kind": "telemetry", "num_files": 1},
        ],
    }
    lines = livesfm("run", "photos", "--out", "there").output.splitlines()
    counted = "4 frames dropped, 3 files left out, 1 telemetry message left out"
    assert f"{counted}: see there/summary.json" in lines
    Path("there").mkdir()
    Path("there/report.html").touch()
    launches.summary["left_out"] = []
    lines = livesfm("run", "photos", "--out", "there", "--overwrite").output.splitlines()
    assert "4 frames dropped: see the report" in lines


def test_a_recording_is_looked_at_in_a_browser_where_there_is_no_screen(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Path("run/recording.rrd")
    recording.parent.mkdir()
    recording.touch()
    for has_screen in (True, False):
        monkeypatch.setattr(cli, "has_screen", lambda has_screen=has_screen: has_screen)
        output = livesfm("run", "photos", "--out", "run").stdout
        (line,) = [line for line in output.splitlines() if line.startswith("look at it again")]
        assert f"rerun {recording}" in line
        assert line.endswith(f"rerun --web-viewer {recording}") is not has_screen


def test_the_last_lines_say_why_a_map_is_not_georeferenced(launches: Launches) -> None:
    launches.summary = {"not_georeferenced": "0 of its 18 keyframes have a position"}
    lines = livesfm("run", "photos").output.splitlines()
    assert "not georeferenced: 0 of its 18 keyframes have a position" in lines
    launches.summary = {"not_georeferenced": ""}
    assert "georeferenced" not in livesfm("run", "photos").output


def test_the_folder_of_a_run_to_which_nothing_came_is_deleted(
    launches: Launches, tmp_path: Path
) -> None:
    def left_after(*, num_received: int) -> tuple[int, list[str]]:
        for name in ("there/images", "there/snapshots"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / "events.jsonl").write_text("")
        launches.num_keyframes = launches.num_registered = 0
        launches.summary = {"frames_received": num_received}
        result = livesfm("run", "rtsp://a", "--out", "there")
        return result.exit_code, os.listdir(tmp_path)

    assert left_after(num_received=0) == (cli.NOTHING_MADE, [])
    assert left_after(num_received=1) == (cli.NOTHING_MADE, ["there"])
    (tmp_path / "there" / "thesis.tex").write_text("years of work")
    assert left_after(num_received=0) == (cli.NOTHING_MADE, ["there"])
    assert os.listdir(tmp_path / "there") == ["thesis.tex"]


def test_a_source_that_could_not_be_opened_is_in_the_last_line(launches: Launches) -> None:
    launches.unopened = ("b.mp4",)
    result = livesfm("run", "a.mp4", "b.mp4", "--out", "there")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].endswith("; not opened, see above: b.mp4")


@pytest.mark.parametrize("level", [VerdictLevel.DOUBTFUL, VerdictLevel.WRONG])
def test_a_map_that_is_not_good_has_an_exit_code_of_its_own_and_says_why(
    launches: Launches, level: VerdictLevel
) -> None:
    launches.verdict = verdict_of(level)
    result = livesfm("run", "photos", "--out", "there")
    assert result.exit_code == cli.DOUBTED == 3
    *_, verdict, reason, last = result.stdout.splitlines()
    assert verdict == f"verdict: {level}"
    assert reason == f"  - {launches.verdict.reasons[0].sentence}"
    assert last == "there: 9 of 10 keyframes registered"


def test_a_good_map_is_said_to_be_good(launches: Launches) -> None:
    result = livesfm("run", "photos", "--out", "there")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "verdict: good"


def test_few_reasons_are_printed_and_the_rest_counted(launches: Launches) -> None:
    launches.verdict = verdict_of(*[VerdictLevel.DOUBTFUL] * 8)
    result = livesfm("run", "photos", "--out", "there")
    lines = result.stdout.splitlines()
    assert len([line for line in lines if "turn on the spot" in line]) == 5
    assert "  - 3 more in there/summary.json" in lines


def test_sentences_are_wrapped_for_people(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches.verdict = verdict_of(VerdictLevel.DOUBTFUL, VerdictLevel.DOUBTFUL)
    monkeypatch.setattr(cli, "_terminal_width", lambda: 60)
    lines = livesfm("run", "photos", "--out", "there").stdout.splitlines()[1:-1]
    assert max(map(len, lines)) <= 60
    assert [line[:4] for line in lines] == ["  - ", "    ", "  - ", "    "]
    whole = " ".join(line.strip() for line in lines[:2]).removeprefix("- ")
    assert whole == launches.verdict.reasons[0].sentence


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((), "9 of 10 keyframes registered"),
        ((19,), "9 of 10 keyframes registered; another map holds 19 (sparse/1)"),
        (
            (8, 6, 5),
            "9 of 10 keyframes registered; other maps hold 8, 6 and 5 (sparse/1 to sparse/3)",
        ),
    ],
)
def test_the_last_line_says_how_many_keyframes_each_map_holds(
    launches: Launches, sizes: tuple[int, ...], words: str
) -> None:
    launches.num_in_other_maps = sizes
    launches.verdict = verdict_of(VerdictLevel.DOUBTFUL)
    assert livesfm("run", "photos", "--out", "there").stdout.splitlines()[-1] == f"there: {words}"


@pytest.mark.parametrize("num_reasons", [1, 2])
def test_why_there_is_no_map_is_said_in_the_words_of_the_verdict(
    launches: Launches, num_reasons: int
) -> None:
    launches.num_registered = 0
    launches.verdict = verdict_of(*[VerdictLevel.WRONG] * num_reasons)
    result = livesfm("run", "photos", "--out", "there")
    assert result.exit_code == cli.NOTHING_MADE
    *above, last = result.stdout.splitlines()
    sentences = [reason.sentence for reason in launches.verdict.reasons]
    assert last.endswith(f"; no map could be made: {sentences[0]}")
    listed = [line.removeprefix("  - ") for line in above]
    assert listed == (["no map:", *sentences] if num_reasons > 1 else [])


def test_a_sentence_that_says_itself_that_there_is_no_map_does_not_say_it_twice(
    launches: Launches,
) -> None:
    launches.num_registered = 0
    reason = VerdictReason(
        kind="no_map", level=VerdictLevel.WRONG, sentence="no map: the images show little"
    )
    launches.verdict = Verdict(level=VerdictLevel.WRONG, reasons=(reason,))
    output = livesfm("run", "photos", "--out", "there").stdout
    assert output == (
        "there: 0 of 10 keyframes registered; no map could be made: the images show little\n"
    )


def test_a_good_map_may_come_with_a_hint(launches: Launches) -> None:
    hint = verdict_of(VerdictLevel.GOOD)
    launches.verdict = hint
    result = livesfm("run", "photos", "--out", "there")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:2] == [
        "verdict: good, with a remark",
        f"  - {hint.reasons[0].sentence}",
    ]


def test_the_demo_prints_the_accuracy_of_a_doubtful_map(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[Path] = []
    monkeypatch.setattr(cli, "_print_evaluation", lambda run, reference: evaluated.append(run))
    launches.verdict = verdict_of(VerdictLevel.DOUBTFUL)
    assert livesfm("demo", "--quiet").exit_code == cli.DOUBTED
    assert evaluated == [Path("runs/demo")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("there: exists and is not empty"), 2),
        (SourceError("photos: no such file or folder"), 1),
        (
            AdapterUnavailableError(
                "MQTT", package="aiomqtt", extra="mqtt", how_to_install="get it"
            ),
            2,
        ),
    ],
    ids=["refused", "no source", "no adapter"],
)
def test_an_error_is_one_line_and_an_exit_code(
    launches: Launches, error: EngineError, code: int
) -> None:
    launches.answer = error
    result = livesfm("run", "photos")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"livesfm: {error}\n"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sift.max_feature=5", "unknown key of sift: max_feature; did you mean max_features?"),
        ("shift.max_features=5", "unknown section: shift; did you mean sift?"),
        ("sift.max_features=-5", "sift.max_features"),
        ("sift.max_features", "expected section.key=value"),
    ],
)
def test_a_setting_that_does_not_exist_or_fit_is_refused(
    launches: Launches, setting: str, words: str
) -> None:
    result = livesfm("run", "photos", "--set", setting)
    assert result.exit_code == cli.REFUSED
    assert words in result.stderr
    assert launches.asked == []


def test_a_configuration_file_that_is_not_there_is_refused(launches: Launches) -> None:
    result = livesfm("run", "photos", "--config", "none.yaml")
    assert result.exit_code == cli.REFUSED
    assert "none.yaml: cannot be read: No such file or directory" in result.stderr


def test_a_preset_is_asked_for_by_its_name(launches: Launches) -> None:
    assert livesfm("run", "synthetic:town", "--config", "phone").exit_code == 0
    assert launches.config == load_config(["phone"])
    result = livesfm("run", "synthetic:town", "--config", "phon")
    assert result.exit_code == cli.REFUSED
    assert "unknown preset: phon; did you mean phone?" in result.stderr


def test_only_a_page_can_stay(launches: Launches) -> None:
    refused = livesfm("run", "a.mp4", "--view-stays")
    assert refused.exit_code == cli.REFUSED
    assert "--view-stays: goes with --view serve only" in refused.output
    both = livesfm("run", "a.mp4", "--view", "serve", "--view-stays", "--no-view-stays")
    assert both.exit_code == cli.REFUSED
    assert livesfm("run", "a.mp4", "--view", "serve", "--no-view-stays").exit_code == 0
    assert launches.options.staying is not None
    assert livesfm("run", "a.mp4").exit_code == 0
    assert launches.options.staying is None


def test_an_unknown_view_is_refused_with_the_known_ones(launches: Launches) -> None:
    result = livesfm("run", "photos", "--view", "hologram")
    assert result.exit_code == cli.REFUSED
    assert all(mode in result.stderr for mode in ViewMode)


def test_a_run_needs_a_source(launches: Launches) -> None:
    result = livesfm("run")
    assert result.exit_code == cli.REFUSED
    assert "SOURCE" in result.stderr


# -- the other commands ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_in_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = livesfm(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert "…" not in result.stdout, "a word is too long for its column"
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_without_a_command_all_of_them_are_listed() -> None:
    result = livesfm()
    for command in COMMANDS:
        assert command in result.output


def test_the_doctor_is_content_here() -> None:
    result = livesfm("doctor")
    assert result.exit_code == 0, result.output
    assert "pycolmap" in result.stdout


def test_the_doctor_fails_when_the_core_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [Finding(part="pycolmap", is_ready=False, detail="missing")]
    monkeypatch.setattr("adapters.doctor.examine", lambda _: broken)
    result = livesfm("doctor")
    assert result.exit_code == cli.NOTHING_MADE
    assert "missing" in result.stdout


def test_evaluating_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = livesfm("evaluate", str(tmp_path))
    assert result.exit_code in {cli.NOTHING_MADE, cli.REFUSED}
    assert result.stderr.startswith("livesfm: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [("evaluate",), ("export", "--to", "out", "--ply"), ("resume",)],
    ids=lambda command: command[0],
)
def test_a_run_of_a_newer_version_is_refused_in_one_line(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "config.yaml").write_text("# LiveSfM run folder, format 99\nnobody: knows\n")
    (tmp_path / "frames.csv").write_text(",".join(FRAMES_HEADER) + "\n")
    result = livesfm(command[0], str(tmp_path), *command[1:])
    assert result.exit_code == 2
    assert "newer version of LiveSfM (run format 99" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_of_an_older_version_is_read_and_resume_refuses_it_in_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.yaml").write_text("of_then: 1\n")
    (tmp_path / "frames.csv").write_text(",".join(FRAMES_HEADER) + "\n")
    resumed = livesfm("resume", str(tmp_path))
    assert resumed.exit_code == 2
    assert "older version of LiveSfM" in resumed.stderr
    assert resumed.stderr.count("\n") == 1
    exported = livesfm("export", str(tmp_path), "--to", str(tmp_path / "out"), "--ply")
    assert "has no snapshot to export" in exported.stderr  # it has no map, and that is all


def test_an_export_says_what_it_could_write(tmp_path: Path) -> None:
    result = livesfm("export", str(tmp_path), "--to", str(tmp_path / "out"))
    assert result.exit_code == cli.REFUSED
    assert "--undistort, --ply, --nerfstudio, --tum" in result.stderr


def test_an_export_of_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = livesfm("export", str(tmp_path), "--to", str(tmp_path / "out"), "--ply")
    assert result.exit_code in {cli.NOTHING_MADE, cli.REFUSED}
    assert result.stderr.startswith("livesfm: ")
    assert not (tmp_path / "out").exists()


def test_the_version_can_be_asked_for() -> None:
    result = livesfm("--version")
    assert (result.exit_code, result.stdout) == (0, f"livesfm {installed_version()}\n")


def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "adapters.cli", "--version"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    assert done.stdout == f"livesfm {installed_version()}\n"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["livesfm", ""], COMMANDS),
        (["livesfm", "ev"], ["evaluate"]),
    ],
)
def test_a_shell_completes_commands(typed: list[str], completed: list[str]) -> None:
    words = {
        "_LIVESFM_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
    result = CliRunner().invoke(cli.app, [], env=words, prog_name="livesfm")
    assert result.stdout.split() == completed


def test_the_program_logs_warnings_to_standard_error() -> None:
    program = """
import logging, sys
sys.argv = ["livesfm", "--help"]
from adapters.cli import main
try:
    main()
except SystemExit:
    logging.getLogger("engine.test").info("not told")
    logging.getLogger("engine.test").warning("told")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    assert done.stderr == "livesfm: told\n"


def test_figures_can_be_asked_for_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Evaluation:
        has_map = True

        def as_record(self) -> dict[str, object]:
            return {"run": "ä", "ate": 0.5}

    monkeypatch.setattr("adapters.evaluate.evaluate", lambda run, reference: Evaluation())
    result = livesfm("evaluate", str(tmp_path), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"run": "ä", "ate": 0.5}


def test_evaluating_a_run_without_a_map_prints_the_figures_says_so_and_is_no_success(
    tmp_path: Path,
) -> None:
    header = "frame_id,source,index,name,captured_at_s,status,pose,map"
    rows = [f"{index + 1},photos,{index},{index}.jpg,{index},keyframe,none," for index in range(3)]
    (tmp_path / "frames.csv").write_text("\n".join([header, *rows, ""]))
    poses = [f"{index} {index} 0 0 0 0 0 1" for index in range(3)]
    (tmp_path / "groundtruth.txt").write_text("\n".join(poses))
    result = livesfm("evaluate", str(tmp_path), "--json")
    assert result.exit_code == cli.NOTHING_MADE
    assert json.loads(result.stdout)["num_registered_keyframes"] == 0
    assert result.stderr == f"livesfm: {tmp_path}: has no map, so there is nothing to compare\n"
