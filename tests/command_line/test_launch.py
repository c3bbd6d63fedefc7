from __future__ import annotations

import gc
import io
import logging
import os
import pstats
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest
import threadpoolctl
from PIL import Image
from typer.testing import CliRunner

from adapters import launch as launch_module
from adapters.cli import REFUSED, app
from adapters.install_advice import how_to_install
from adapters.launch import LaunchOptions, count_frame_ids, launch, limit_library_threads
from adapters.matchers.sift import SiftMatcher
from adapters.profiling import Profile
from adapters.town.oracle import OracleMatcher, OraclePlaces
from adapters.town.source import SyntheticTown, parse_town_spec
from adapters.views.console import ConsoleView
from adapters.views.rerun_view import RerunView
from adapters.views.view_mode import ViewMode
from engine.config import Config, LiveSourcesConfig
from engine.errors import AdapterUnavailableError, ConfigError, JournalError
from engine.output.journal import Journal
from engine.ports import FrameSource
from engine.run.engine import Engine, RunOutcome, StoppedBy
from engine.types import FrameId
from tests.support.fake_runs import FakeSource, Written, trajectory_lines
from tests.support.textured_images import frame_of as textured_frame

QUIET = Config.model_validate({"views": {"recording": False}})


@pytest.fixture(autouse=True)
def _library_threads_restored() -> Iterator[None]:
    """Launching limits the whole process; other tests must not notice."""
    former = os.environ.get("OMP_NUM_THREADS"), cv2.getNumThreads()
    with threadpoolctl.threadpool_limits():
        yield
    assert former[0] is not None  # conftest sets it, so launching did not
    cv2.setNumThreads(former[1])


def options(path: Path, *sources: str | Path, **changes: Any) -> LaunchOptions:
    given: dict[str, Any] = {
        "sources": tuple(str(source) for source in sources),
        "path": path,
        "overwrite": False,
        "view_mode": ViewMode.NONE,
        "show_progress": False,
        **changes,
    }
    return LaunchOptions(**given)


def calibrated_by(*specs: str, base: Config = QUIET) -> Config:
    cameras = base.cameras.model_copy(update={"calibrations": specs})
    return base.model_copy(update={"cameras": cameras})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photos without anything in common, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        rng = np.random.default_rng(number)
        texture = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        assert cv2.imwrite(str(folder / f"{number}.jpg"), texture)
    (folder / "2.jpg").write_text("no picture")
    return folder


# -- sources --------------------------------------------------------------------------------------


def test_photos_go_through_the_engine_into_the_run_folder(tmp_path: Path, photos: Path) -> None:
    outcome = launch(QUIET, options(tmp_path / "run", photos))
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert (outcome.num_keyframes, outcome.num_registered) == (2, 0)
    written = Written.by(outcome)
    assert written.statuses == ["keyframe", "keyframe", "dropped:unreadable"]
    assert written.events[0]["matcher"] == "sift"
    assert b"no map" in (outcome.path / "report.html").read_bytes()
    assert (outcome.path / "images" / "0.jpg").read_bytes() == (photos / "0.jpg").read_bytes()


def test_what_is_long_lived_is_left_out_of_garbage_collections_while_a_run_lasts(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_frozen: list[int] = []
    run = Engine.run

    async def watched(engine: Engine) -> RunOutcome:
        outcome = await run(engine)
        num_frozen.append(gc.get_freeze_count())
        return outcome

    monkeypatch.setattr(Engine, "run", watched)
    launch(QUIET, options(tmp_path / "run", photos))
    assert num_frozen[0] > 10_000, "at least all modules"
    assert gc.get_freeze_count() == 0


def test_a_profiled_run_says_where_each_thread_spent_its_time(tmp_path: Path, photos: Path) -> None:
    outcome = launch(QUIET, options(tmp_path / "run", photos, profile=True))

    names = {path.stem for path in (outcome.path / "profile").iterdir()}
    assert {"MainThread", "describing"} <= names
    stats = pstats.Stats(str(outcome.path / "profile" / "describing.prof"), stream=io.StringIO())
    assert stats.stats  # type: ignore[attr-defined]
    # Work of milliseconds may fall between two samples; the loop is there the whole time.
    stats = pstats.Stats(str(outcome.path / "profile" / "MainThread.prof"), stream=io.StringIO())
    files = {Path(file).name for file, _, _ in stats.stats}  # type: ignore[attr-defined]
    assert "launch.py" in files


def test_a_profile_that_cannot_be_written_does_not_cost_the_run(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Profile, "write", fail)
    outcome = launch(QUIET, options(tmp_path / "run", photos, profile=True))
    assert outcome.num_keyframes == 2
    (words,) = [record.message for record in caplog.records if "profile" in record.message]
    assert words.endswith("the profile cannot be written: No space left on device")


def test_images_that_show_nothing_are_keyframes_without_keypoints_and_said(
    tmp_path: Path, photos: Path
) -> None:
    rng = np.random.default_rng(0)
    for name, pixels in {
        "black": np.zeros((120, 160, 3), np.uint8),
        "grey": np.full((120, 160, 3), 2, np.uint8),
        "dark": rng.integers(0, 4, (120, 160, 3), dtype=np.uint8),
        "white": np.full((120, 160, 3), 255, np.uint8),
    }.items():
        assert cv2.imwrite(str(photos / f"{name}.png"), pixels)
    written = Written.by(launch(QUIET, options(tmp_path / "run", photos)))
    assert written.statuses.count("keyframe") == 6
    added = {event["name"]: event["num_keypoints"] for event in written.of_kind("KeyframeAdded")}
    blank = ["black.png.jpg", "dark.png.jpg", "grey.png.jpg", "white.png.jpg"]
    assert [name for name, num in added.items() if not num] == blank
    warnings = [words for words in written.warnings() if "no keypoints" in words]
    assert [words.partition(":")[0] for words in warnings] == [
        "black.png.jpg",
        "4 keyframes (black.png.jpg, dark.png.jpg, grey.png.jpg, ...)",
    ]


def test_sources_share_one_counter_of_frame_ids(tmp_path: Path, photos: Path) -> None:
    written = Written.by(launch(QUIET, options(tmp_path / "run", photos, photos)))
    ids = [int(row["frame_id"]) for row in written.rows if row["frame_id"]]
    assert sorted(ids) == [1, 2, 3, 4]
    next_frame_id = count_frame_ids()
    assert [next_frame_id(), next_frame_id()] == [FrameId(1), FrameId(2)]


def test_sources_that_are_there_but_cannot_be_read_are_refused_before_a_folder_is_made(
    tmp_path: Path,
) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    with pytest.raises(ConfigError) as refused:
        launch(QUIET, options(tmp_path / "run", text, tmp_path))
    assert f"{text}: not a readable video" in str(refused.value)
    assert f"{tmp_path}: no image in this folder" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_one_source_that_cannot_be_opened_does_not_stop_the_others(
    tmp_path: Path, photos: Path
) -> None:
    outcome = launch(QUIET, options(tmp_path / "run", "none.mp4", photos))
    written = Written.by(outcome)
    assert outcome.num_keyframes == 2
    assert written.events[0]["sources"] == ["none.mp4", str(photos)]
    assert written.warnings() == ["none.mp4: no such file or folder"]


def test_sources_of_which_none_exists_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.mp4: no such file or folder"):
        launch(QUIET, options(tmp_path / "run", "none.mp4", "carrier-pigeon:3"))
    assert not (tmp_path / "run").exists()


def told_by(outcome: RunOutcome) -> str:
    """All that the run wrote in words."""
    told = {".jsonl", ".csv", ".yaml", ".json"}
    return "".join(path.read_text() for path in outcome.path.iterdir() if path.suffix in told)


def test_credentials_of_a_source_nobody_knows_are_told_nowhere(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = launch(QUIET, options(tmp_path / "run", "pigeon://me:secret@host/x", photos))
    assert Written.by(outcome).events[0]["sources"] == ["pigeon", str(photos)]
    assert "secret" not in told_by(outcome) + caplog.text


@pytest.mark.network
def test_credentials_of_a_stream_are_told_nowhere(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:  # nothing listens there
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}/x"
        config = QUIET.model_copy(
            update={"live_sources": LiveSourcesConfig(give_up_after_s=2.0, open_timeout_s=0.5)}
        )
        source = f"rtsp://me:secret@{address}"
        outcome = launch(config, options(tmp_path / "run", source, photos))
    written = Written.by(outcome)
    assert written.events[0]["sources"] == [f"rtsp://{address}", str(photos)]
    assert {event["state"] for event in written.of_kind("SourceChanged")} == {"lost", "ended"}
    assert outcome.num_keyframes == 2
    assert "secret" not in told_by(outcome) + caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("towns_painted_once")
def test_calibrations_are_given_to_the_cameras_they_fit(tmp_path: Path, photos: Path) -> None:
    file = tmp_path / "camera.txt"
    file.write_text("1 OPENCV 320 240 300 302 158 121 0.1 0 0 0")  # of images twice as large
    other = tmp_path / "other.txt"
    other.write_text("1 PINHOLE 160 120 1 1 1 1")
    config = calibrated_by(str(file), f"right={other}")
    written = Written.by(launch(config, options(tmp_path / "run", photos)))
    (calibrated,) = written.of_kind("CameraCalibrated")
    assert (calibrated["how"], calibrated["focal_px"]) == ("file", 150.5)
    (warning,) = written.warnings()
    assert f"right={other}" in warning
    assert "160x120 (160 x 120)" in warning


def test_photos_turned_upright_get_the_calibration_of_their_sensor_turned_with_them(
    tmp_path: Path, photos: Path
) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # stored lying on its side
    Image.open(photos / "1.jpg").save(photos / "1.jpg", exif=exif, quality=95)
    file = tmp_path / "camera.txt"
    file.write_text("1 PINHOLE 160 120 150 152 70 65")
    outcome = launch(calibrated_by(str(file)), options(tmp_path / "run", photos))
    assert Written.by(outcome).warnings() == []
    with pycolmap.Database.open(outcome.path / "database.db") as database:
        params = sorted(tuple(camera.params.tolist()) for camera in database.read_all_cameras())
    assert params == [(150.0, 152.0, 70.0, 65.0), (152.0, 150.0, 120 - 65.0, 70.0)]


@pytest.mark.parametrize("pattern", ["", "*="])
def test_a_calibration_of_another_shape_is_refused_before_a_folder_is_made(
    pattern: str, tmp_path: Path, photos: Path
) -> None:
    file = tmp_path / "camera.txt"
    file.write_text("1 PINHOLE 160 90 150 150 80 45")
    with pytest.raises(ConfigError, match=r"160 x 90 px.* 160 x 120 px"):
        launch(calibrated_by(f"{pattern}{file}"), options(tmp_path / "run", photos))
    assert not (tmp_path / "run").exists()


def test_a_calibration_that_cannot_be_read_is_refused_before_a_folder_is_made(
    tmp_path: Path, photos: Path
) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yml: cannot be read"):
        launch(calibrated_by("missing.yml"), options(tmp_path / "run", photos))
    assert not (tmp_path / "run").exists()


def test_sources_whose_sizes_nobody_knows_are_not_refused(tmp_path: Path) -> None:
    file = tmp_path / "camera.txt"
    file.write_text("1 PINHOLE 160 90 150 150 80 45")
    (tmp_path / "empty").mkdir()
    config = calibrated_by(f"*={file}", base=QUIET)
    config = config.model_copy(
        update={"live_sources": LiveSourcesConfig(give_up_after_s=0.05)},
    )
    source = f"watch:{tmp_path / 'empty'}"
    written = Written.by(launch(config, options(tmp_path / "run", source)))
    assert any(f"*={file}" in warning for warning in written.warnings())


def test_only_a_source_that_knows_the_truth_gives_it(tmp_path: Path, photos: Path) -> None:
    outcome = launch(QUIET, options(tmp_path / "photos run", photos))
    assert not (outcome.path / "groundtruth.txt").exists()
    town = "synthetic:town?frames=2&width=64&height=64"
    outcome = launch(QUIET, options(tmp_path / "town run", town))
    assert len(trajectory_lines(outcome.path / "groundtruth.txt")) == 2
    assert parse_town_spec(town).num_frames == 2


@pytest.mark.parametrize("has_photos", [True, False])
def test_keypoints_are_leaner_when_there_are_only_videos(photos: Path, has_photos: bool) -> None:
    specs = ["synthetic:town", *([str(photos)] if has_photos else [])]
    sources = launch_module._open_sources(specs, Config())
    matcher, places = launch_module._matching(Config(), sources)
    assert isinstance(matcher, SiftMatcher)
    assert places is None, "found by what SIFT describes"
    sift = Config().sift
    expected = sift.max_features if has_photos else sift.max_features_in_video
    assert matcher._config.max_features == expected
    assert matcher._config.upscaling == (sift.upscaling if has_photos else 2.0)


def oracle_config(**settings: Any) -> Config:
    return Config.model_validate(
        {"matching": {"matcher": "oracle"}, "views": {"recording": False}, **settings}
    )


@pytest.mark.slow
@pytest.mark.usefixtures("towns_painted_once")
def test_the_oracle_is_told_the_truth_of_the_town() -> None:
    config = oracle_config(oracle={"noise_px": 0.0, "outlier_ratio": 0.0}, runtime={"seed": 5})
    (town,) = launch_module._open_sources(["synthetic:town?frames=4&width=64&height=64"], config)
    assert isinstance(town, SyntheticTown)
    matcher, places = launch_module._matching(config, [town])
    assert isinstance(matcher, OracleMatcher)
    assert isinstance(places, OraclePlaces)
    rendered = town.render(2)
    features = matcher.describe(textured_frame(rendered.pixels, frame_id=3))
    view = matcher.view(features.frame_id)
    assert np.array_equal(view.depth_m, rendered.depth)
    assert np.array_equal(view.cam_from_world, rendered.cam_from_world)
    assert view.intrinsics == town.intrinsics
    places.add(features)
    assert places.query(features.frame_id, exclude=(), limit=1) == []


TINY_TOWN = "synthetic:town?frames=2&width=64&height=64"


@pytest.mark.slow
@pytest.mark.parametrize(
    "specs", [["{photos}"], [TINY_TOWN, "{photos}"], [TINY_TOWN, TINY_TOWN]], ids=str
)
def test_the_oracle_refuses_sources_whose_truth_it_does_not_know(
    tmp_path: Path, photos: Path, specs: list[str]
) -> None:
    sources = [spec.format(photos=photos) for spec in specs]
    former = launch(QUIET, options(tmp_path / "run", photos)).path
    before = (former / "events.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="oracle knows the truth of one synthetic:town only"):
        launch(oracle_config(), options(tmp_path / "run", *sources, overwrite=True))
    assert (former / "events.jsonl").read_bytes() == before, "nothing was replaced for it"


def test_a_matcher_without_weights_is_refused_before_a_folder_is_made(
    tmp_path: Path, photos: Path
) -> None:
    config = Config.model_validate({"matching": {"matcher": "mast3r"}})
    with pytest.raises(ConfigError, match=r"mast3r\.checkpoint"):
        launch(config, options(tmp_path / "run", photos))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [
        ("mqtt://127.0.0.1/a/frame", "aiomqtt", "mqtt"),
        ("phone://127.0.0.1:18443", "aiohttp", "phone"),
        ("walk.mcap", "rosbags", "ros"),
    ],
)
def test_a_source_whose_package_is_missing_is_refused_with_what_installs_it(
    source: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "walk.mcap").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AdapterUnavailableError, match=f"needs the package {package}") as refused:
        launch(QUIET, options(tmp_path / "run", source))
    assert refused.value.extra == extra
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "extra"),
    [({"matching": {"matcher": "mast3r"}}, "mast3r"), ({"window": {"solver": "vggsfm"}}, "vggsfm")],
)
def test_what_needs_torch_is_refused_with_the_extra_that_brings_it(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AdapterUnavailableError, match="needs the package torch") as caught:
        launch(Config.model_validate(settings), options(tmp_path / "run", photos))
    assert caught.value.package == "torch"
    assert str(caught.value).endswith(how_to_install(extra))
    assert not (tmp_path / "run").exists()


# -- the run folder -------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_untouched(tmp_path: Path, photos: Path) -> None:
    launch(QUIET, options(tmp_path / "run", photos))
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        launch(QUIET, options(tmp_path / "run", photos))
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


def test_a_former_run_is_replaced_when_asked(tmp_path: Path, photos: Path) -> None:
    former = launch(QUIET, options(tmp_path / "run", photos))
    (former.path / "snapshots" / "000007").mkdir()
    outcome = launch(QUIET, options(tmp_path / "run", photos, overwrite=True))
    assert outcome.num_keyframes == 2
    assert list((outcome.path / "snapshots").iterdir()) == []
    assert len(Written.by(outcome).of_kind("RunStarted")) == 1


def test_a_foreign_folder_is_never_replaced(tmp_path: Path, photos: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        launch(QUIET, options(foreign, photos, overwrite=True))
    assert (foreign / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize("inside", ["", "images", "images/0.jpg"])
def test_a_run_that_is_its_own_source_is_never_replaced(
    tmp_path: Path, photos: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launch(QUIET, options(tmp_path / "run", photos)).path
    monkeypatch.chdir(run)
    with pytest.raises(ConfigError, match="lies in the run folder that would be replaced"):
        launch(QUIET, options(Path("../run"), run / inside, overwrite=True))
    assert (run / "images" / "0.jpg").is_file()


def test_a_watched_folder_inside_the_run_is_not_replaced_either(
    tmp_path: Path, photos: Path
) -> None:
    run = launch(QUIET, options(tmp_path / "run", photos)).path
    with pytest.raises(ConfigError, match="lies in the run folder that would be replaced"):
        launch(QUIET, options(run, f"watch:{run / 'images'}", overwrite=True))
    assert (run / "images" / "0.jpg").is_file()


def test_a_recording_that_cannot_be_made_costs_no_former_run(tmp_path: Path, photos: Path) -> None:
    run = launch(QUIET, options(tmp_path / "run", photos)).path
    for folder in (photos, tmp_path / "photos" / "0.jpg"):
        with pytest.raises(ConfigError, match="not empty|cannot be written"):
            launch(QUIET, options(run, photos, overwrite=True, record_input=folder))
        assert (run / "summary.json").is_file()


def test_a_run_says_where_what_it_receives_is_kept(tmp_path: Path, photos: Path) -> None:
    kept = tmp_path / "input"
    written = Written.by(launch(QUIET, options(tmp_path / "run", photos, record_input=kept)))
    (opened,) = written.of_kind("SourceOpened")
    assert opened["recording"] == str(kept)


def test_a_run_that_is_refused_leaves_no_recording(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        launch(QUIET, options(photos, photos, record_input=tmp_path / "input"))
    assert not (tmp_path / "input").exists()


def test_nor_is_it_replaced_by_a_run_that_begins_with_another_one(
    tmp_path: Path, photos: Path
) -> None:
    run, other = (launch(QUIET, options(tmp_path / name, photos)).path for name in ("run", "other"))
    words = ["run", str(run / "images"), "--onto", str(other), "--out", str(run), "--overwrite"]
    result = CliRunner().invoke(app, [*words, "--view=none", "--quiet"])
    assert result.exit_code == REFUSED
    assert (run / "summary.json").is_file()  # which is never copied


def test_a_run_that_is_refused_leaves_no_copy_of_the_run_it_begins_with(
    tmp_path: Path, photos: Path
) -> None:
    run = launch(QUIET, options(tmp_path / "run", photos)).path
    for words in (["--calibration", "nowhere.yml"], ["--set", "mqtt.publish=true"]):
        command = ["run", str(photos), "--onto", str(run), "--out", str(tmp_path / "other")]
        result = CliRunner().invoke(app, [*command, *words, "--view=none", "--quiet"])
        assert result.exit_code == REFUSED
        assert not (tmp_path / "other").exists()
    (run / "database.db").write_bytes(b"no database at all, but as long as the header of one")
    result = CliRunner().invoke(app, [*command, "--view=none", "--quiet"])
    assert result.exit_code != 0
    assert not (tmp_path / "other").exists()


def test_a_run_folder_in_the_folder_of_its_photos_is_fine(photos: Path) -> None:
    outcome = launch(QUIET, options(photos / "run", photos))
    assert outcome.num_keyframes == 2


# -- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "recording", "show_progress", "kinds"),
    [
        (ViewMode.NONE, True, False, []),
        (ViewMode.NONE, True, True, [ConsoleView]),
        (ViewMode.RECORD, True, False, [RerunView]),
        (ViewMode.RECORD, False, False, []),
        (ViewMode.RECORD, True, True, [RerunView, ConsoleView]),
    ],
)
def test_views_are_opened_as_asked(
    tmp_path: Path, mode: ViewMode, recording: bool, show_progress: bool, kinds: list[type]
) -> None:
    config = Config.model_validate({"views": {"recording": recording}})
    views = launch_module._open_views(
        config, options(tmp_path, view_mode=mode, show_progress=show_progress), []
    )
    assert [type(view) for view in views] == kinds
    for view in views:
        view.close()
    assert (tmp_path / "recording.rrd").exists() == (RerunView in kinds)


def test_the_progress_knows_how_many_frames_come_when_every_source_does(
    tmp_path: Path, photos: Path
) -> None:
    def total(*others: FrameSource) -> int | None:
        sources = [*launch_module._open_sources([str(photos), "none.mp4"], Config()), *others]
        asked = options(tmp_path, show_progress=True)
        (view,) = launch_module._open_views(Config(), asked, sources)
        view.close()
        assert isinstance(view, ConsoleView)
        return view._total_frames

    assert total(FakeSource(happenings=[], num_frames=9)) == 3 + 9
    assert total(FakeSource(happenings=[], num_frames=None)) is None


def test_a_warning_that_is_an_event_is_written_once(
    tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        given = options(tmp_path / "run", photos, "none.mp4", show_progress=True)
        launch(Config(), given)
    finally:
        logging.getLogger().removeHandler(handler)
    written = capfd.readouterr().err
    assert written.count("none.mp4: no such file or folder") == 1
    assert "warning: none.mp4: no such file or folder" in written


def test_log_lines_go_above_the_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        """Standard error as a terminal that takes everything."""

        encoding = "utf-8"

        def __init__(self) -> None:
            self.text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            pass

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        views = launch_module._open_views(Config(), options(tmp_path, show_progress=True), [])
        terminal.text = ""
        logging.getLogger("engine.test").warning("careful")
        drawn_after = terminal.text.partition("careful")[2]
        views[0].close()
    finally:
        logging.getLogger().removeHandler(handler)
    assert "LiveSfM" in drawn_after, "the panel is drawn again below the line"


@pytest.mark.parametrize("refusing", ["_second_matcher", "_window_solver", "_open_remote_views"])
def test_a_matcher_that_works_elsewhere_is_closed_when_the_run_is_refused(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    closed: list[bool] = []

    class Elsewhere(SiftMatcher):
        keyframes_ahead = 0

        def close(self) -> None:
            closed.append(True)

    for name in ("describe_ahead", "match_ahead", "forget_ahead", "report_to", "figures"):
        setattr(Elsewhere, name, lambda *_: None)

    def refuse(*_: Any) -> None:
        raise ConfigError("its weights are missing")

    monkeypatch.setattr(launch_module, "_sift", lambda config, _: Elsewhere(config.sift))
    monkeypatch.setattr(launch_module, refusing, refuse)
    with pytest.raises(ConfigError, match="weights"):
        launch(QUIET, options(tmp_path / "run", photos))
    assert closed == [True]
    assert not (tmp_path / "run").exists()


def test_views_are_closed_when_the_engine_cannot_be_made(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Watched:
        def close(self) -> None:
            closed.append(True)

    def fail(path: Path) -> Journal:
        raise JournalError(f"{path}: cannot be opened")

    monkeypatch.setattr(launch_module, "_open_views", lambda *_: [Watched()])
    monkeypatch.setattr(Journal, "open", fail)
    with pytest.raises(JournalError):
        launch(QUIET, options(tmp_path / "run", photos))
    assert closed == [True]


def test_a_view_that_cannot_be_opened_is_a_refused_request(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems always have a screen")
    with pytest.raises(ConfigError, match="screen"):
        launch(QUIET, options(tmp_path / "run", photos, view_mode=ViewMode.SPAWN))


# -- the process ----------------------------------------------------------------------------------


def test_libraries_work_on_one_thread_per_call() -> None:
    limit_library_threads()
    assert cv2.getNumThreads() == 1
    assert {pool["num_threads"] for pool in threadpoolctl.threadpool_info()} <= {1}
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_leaving_at_once_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    written: list[str] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "write", written.append)
    launch_module._leave_at_once(Path("run"))
    assert codes == [130]
    assert "\x1b[?25h" in written
