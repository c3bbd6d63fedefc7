"""What a run goes on from: configuration, sources and their roles."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from adapters.cli import REFUSED, app
from adapters.open_source import open_source, photos_together
from adapters.resume import _config_of, addresses_of, begin_from, ended_programs, go_on, roles_of
from engine.config import Config, dump_config, load_config
from engine.errors import ConfigError, JournalError
from engine.output.recovery import FormerRun, FormerSource
from engine.output.run_folder import FRAMES_HEADER, RunFolder
from engine.output.run_lock import LOCK_NAME, RunState, run_state
from engine.output.statistics import RunStatistics
from engine.ports import Source
from engine.run.ingestion import SourceRole
from engine.types import PROGRAM_LABEL, FrameId, Received, TakenFrames
from tests.output.test_recovery import frame, stored
from tests.support.fake_runs import FakeLiveSource, FakeSource


def former_source(
    label: str, *, address: str = "", prefix: str = "", live: bool = False
) -> FormerSource:
    return FormerSource(
        label=label,
        address=address,
        prefix=prefix,
        is_live=live,
        taken=TakenFrames(names={4: "000004.jpg"}, captured_at_s={4: 0.4}),
    )


def former_run(path: Path, sources: Sequence[FormerSource]) -> FormerRun:
    return FormerRun(
        stored=stored(path, [frame(1, "keyframe")], keyframes=(1,)),
        sources=tuple(sources),
        frames=(),
        lost=(),
        num_again=0,
        without_image=(),
        lay_again="",
        statistics=RunStatistics(),
        ended_at_s=1.0,
        part=2,
        next_frame_id=FrameId(2),
    )


# -- sources --------------------------------------------------------------------------------------


def test_a_new_run_names_its_sources_only_where_there_are_several() -> None:
    one, other = FakeSource(happenings=[], label="a"), FakeSource(happenings=[], label="b")
    assert [role.prefix for role in roles_of(["a"], [one], None)] == [""]
    assert [role.prefix for role in roles_of(["a", "b"], [one, other], None)] == [
        "source1",
        "source2",
    ]


def test_what_opens_a_source_again_is_a_whole_path_or_an_address_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    specs = {
        "photos": os.path.realpath("photos"),
        "rtsp://me:secret@c/s": "",
        "rtmp://0.0.0.0/live?listen=1": "rtmp://0.0.0.0/live?listen=1",
        "synthetic:town?seed=0": "synthetic:town",
    }
    labels = ["photos", "rtsp://c/s", "rtmp://0.0.0.0/live?listen=1", "synthetic:town"]
    sources = [FakeSource(happenings=[], label=label) for label in labels]
    roles = roles_of(list(specs), sources, None)
    assert [role.address for role in roles] == list(specs.values())


def test_a_source_of_before_goes_on_as_it_was_called_and_a_new_one_gets_the_next_number(
    tmp_path: Path,
) -> None:
    former = former_run(tmp_path, [former_source("a.mp4", address="/x/a.mp4")])
    sources = [FakeSource(happenings=[], label="b.mp4"), FakeSource(happenings=[], label="a.mp4")]
    new, same = roles_of(["b.mp4", "a.mp4"], sources, former)
    assert (new.prefix, new.label, new.taken.names) == ("source2", "b.mp4", {})
    assert (same.prefix, same.label, same.part) == ("", "a.mp4", 2)
    assert same.taken.next_index == 5


def test_a_file_is_the_same_under_another_path(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    spec = str(tmp_path / "a.mp4")
    address = os.path.realpath(spec)
    former = former_run(tmp_path, [former_source("../a.mp4", address=address, prefix="source1")])
    (role,) = roles_of([spec], [FakeSource(happenings=[], label=spec)], former)
    assert (role.label, role.prefix) == ("../a.mp4", "source1")


def test_photos_named_one_by_one_go_on_by_what_is_kept_of_them_or_named_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [tmp_path / "card" / f"{number}.jpg" for number in range(3)]
    photos[0].parent.mkdir()
    for number, photo in enumerate(photos):
        cv2.imwrite(str(photo), np.full((80, 96, 3), 50 * number, np.uint8))
    monkeypatch.chdir(tmp_path)

    def opened(address: str) -> Source:
        ids = itertools.count(1)
        return open_source(address, config=Config(), next_frame_id=lambda: FrameId(next(ids)))

    (address,) = photos_together(["card/0.jpg", "card/2.jpg"])
    (role,) = roles_of([address], [opened(address)], None)
    assert role.label == "card"
    monkeypatch.chdir("/")
    former = former_run(
        tmp_path,
        [
            FormerSource(
                label=role.label,
                address=role.address,
                prefix="",
                is_live=False,
                taken=TakenFrames(names={0: "0.jpg"}, captured_at_s={0: 0.0}),
            )
        ],
    )
    (kept,) = addresses_of(former)
    again = opened(kept)
    (role,) = roles_of([kept], [again], former)
    assert (role.label, role.prefix, role.part) == ("card", "", 2)
    assert again.info.num_frames == 1
    monkeypatch.chdir(tmp_path)
    (more,) = photos_together(["card/0.jpg", "card/1.jpg", "card/2.jpg"])
    again = opened(more)
    (role,) = roles_of([more], [again], former)
    assert (role.label, role.part, again.info.num_frames) == ("card", 2, 2)


def test_a_live_source_is_no_file_of_that_name(tmp_path: Path) -> None:
    former = former_run(tmp_path, [former_source("a")])
    (role,) = roles_of(["a"], [FakeLiveSource(happenings=[], label="a")], former)
    assert (role.prefix, role.part) == ("source2", 1)


def test_a_recording_is_not_added_to_a_run(tmp_path: Path) -> None:
    for name in ("recording.json", "config.yaml"):
        (tmp_path / name).touch()
    replay = f"replay:{tmp_path}"
    for words in (["resume", "run", replay], ["run", replay, "--onto", "run", "--out", "other"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == REFUSED
        assert "cannot be added to another one" in result.stderr


def test_a_run_that_repeated_a_recording_asks_for_another_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (role,) = roles_of([f"replay:{tmp_path}"], [FakeSource(happenings=[], label="images")], None)
    assert role.address == f"replay:{tmp_path.resolve()}"
    former = former_run(tmp_path, [former_source("images", address=role.address)])
    with pytest.raises(ConfigError, match="name one: livesfm resume"):
        addresses_of(former)
    assert "which repeats a whole run" in caplog.text
    assert "secret" not in caplog.text


def test_addresses_with_secrets_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = former_source("rtsp://c/s", live=True)
    shown = former_source("camera:0", address="camera:0", live=True)
    assert addresses_of(former_run(tmp_path, [hidden, shown])) == ["camera:0"]
    assert "rtsp://c/s: its address held a secret" in caplog.text
    with pytest.raises(ConfigError, match="name one: livesfm resume"):
        addresses_of(former_run(tmp_path, [hidden]))


@pytest.mark.parametrize("is_live", [True, False])
def test_the_source_of_a_program_goes_on_as_one_that_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_live: bool
) -> None:
    program = former_source(PROGRAM_LABEL, live=is_live)
    former = former_run(tmp_path, [former_source("a", address="/a"), program])
    assert addresses_of(former) == ["/a"]
    assert addresses_of(former_run(tmp_path, [program])) == []
    assert "secret" not in caplog.text
    (ended,) = ended_programs(former)
    (role,) = roles_of([""], [ended], former)
    assert (role.label, role.address, role.taken.next_index) == (PROGRAM_LABEL, "", 5)

    async def given() -> list[Received]:
        return [one async for one in ended.frames()]

    assert asyncio.run(given()) == []


def test_roles_may_get_an_address() -> None:
    assert SourceRole(label="a").with_address("/a").address == "/a"


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_that_a_run_is_writing_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config_text=dump_config(load_config()))
    try:
        with pytest.raises(ConfigError, match="a run is writing there"):
            go_on(tmp_path / "run", overlays=[], settings=[])
    finally:
        folder.close()


def test_what_cannot_be_read_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = RunFolder.create(path, config_text=dump_config(load_config()))
    (path / "database.db").write_bytes(b"no database at all, but as long as the header of one")
    folder.close()
    (path / LOCK_NAME).write_text('{"pid": 0, "host": "here", "started_at": "then"}')
    os.utime(path / LOCK_NAME, (0, 0))
    before = sorted(path.iterdir())
    with pytest.raises(JournalError):
        go_on(path, overlays=[], settings=[])
    assert sorted(path.iterdir()) == before
    assert run_state(path)[0] is RunState.INTERRUPTED


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="run"):
            go_on(path, overlays=[], settings=[])


@pytest.mark.parametrize("name", ["run", "link", ""])
def test_a_run_is_not_replaced_by_one_that_begins_with_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    RunFolder.create(path, config_text=dump_config(load_config())).close()
    (tmp_path / "link").symlink_to(path)
    before = sorted(path.iterdir())
    with pytest.raises(ConfigError, match="is or holds the run to begin with"):
        begin_from(path, tmp_path / name, overwrite=True, overlays=[], settings=[])
    assert sorted(path.iterdir()) == before


# -- configuration --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = load_config((), ["sift.max_features=123"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return tmp_path


def test_a_run_goes_on_with_its_own_configuration_and_what_may_change(run: Path) -> None:
    config = _config_of(run, overlays=[], settings=["snapshots.keep=3"])
    assert (config.sift.max_features, config.snapshots.keep) == (123, 3)


def test_what_contradicts_the_stored_keyframes_is_refused_in_words(run: Path) -> None:
    with pytest.raises(ConfigError, match="matching.matcher=oracle: the keyframes of .* with sift"):
        _config_of(run, overlays=[], settings=["matching.matcher=oracle"])


def test_the_topics_of_a_recording_cannot_change(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"sources\.topics=.*/left/\*.*it cannot change"):
        _config_of(run, overlays=[], settings=["sources.topics=[/left/*]"])


def test_a_matcher_that_keeps_more_than_the_files_is_refused(tmp_path: Path) -> None:
    config = load_config((), ["matching.matcher=oracle"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match="cannot go on"):
        _config_of(tmp_path, overlays=[], settings=[])


def test_a_folder_without_configuration_is_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="begin it anew"):
        _config_of(tmp_path, overlays=[], settings=[])


def test_an_empty_configuration_is_named(run: Path) -> None:
    (run / "frames.csv").write_text(",".join(FRAMES_HEADER))
    (run / "config.yaml").write_bytes(b"")
    with pytest.raises(ConfigError, match="config.yaml: is empty"):
        go_on(run, overlays=[], settings=[])
