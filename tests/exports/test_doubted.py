"""Exports without keyframes whose places the verdict on their map doubts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from typer.testing import CliRunner

from adapters import cli
from adapters.exports.doubted import near_doubted
from adapters.exports.export import Export, ExportFormat, export
from adapters.exports.posed_frames import PosedFrame, without_doubted_frames
from engine.errors import ConfigError
from engine.mapping.verdict import verdict as verdict_rules
from engine.types import FrameId, PoseKind, Verdict, VerdictLevel, VerdictReason
from tests.support.plane_runs import PlaneRun, frame_name, make_plane_run

DOUBTED = 2  # the second of four keyframes
MISPLACED = VerdictReason(
    kind="misplaced",
    level=VerdictLevel.DOUBTFUL,
    sentence="its pairs contradict it",
    frame_ids=(FrameId(DOUBTED),),
)
BENT = VerdictReason(
    kind="bent",
    level=VerdictLevel.WRONG,
    sentence="the map is bent",
    frame_ids=(FrameId(1), FrameId(4)),
)
REMARK = VerdictReason(
    kind="unconfirmed", level=VerdictLevel.GOOD, sentence="a remark", frame_ids=(FrameId(1),)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PlaneRun:
    """Tests only copy its run."""
    return make_plane_run(tmp_path_factory.mktemp("plane"))


@pytest.fixture
def run(tmp_path: Path, made: PlaneRun) -> Path:
    return shutil.copytree(made.path, tmp_path / "run", symlinks=True)


def judged(run: Path, *reasons: VerdictReason) -> Path:
    verdict = Verdict(level=reasons[0].level if reasons else VerdictLevel.GOOD, reasons=reasons)
    (run / "summary.json").write_text(json.dumps({"verdict": verdict.as_record()}))
    return run


def exported(run: Path, *formats: ExportFormat, frames: str = "keyframes") -> Export:
    return export(run, run.parent / "out", formats=formats, frames=frames, is_without_doubted=True)


def doubtful(frame_ids: str) -> str:
    reason = f'{{"kind":"misplaced","level":"doubtful","sentence":"","frame_ids":{frame_ids}}}'
    return f'{{"verdict": {{"level": "doubtful", "reasons": [{reason}]}}}}'


def names_of(model: Path) -> set[str]:
    return {image.name for image in pycolmap.Reconstruction(model).images.values()}


def test_doubted_keyframes_are_in_no_file(made: PlaneRun, run: Path) -> None:
    formats = ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO, ExportFormat.TUM, ExportFormat.PLY
    done = exported(judged(run, MISPLACED), *formats)
    others = {frame_name(number) for number in made.keyframes if number != 8}
    assert done.num_images == len(others) == 3
    assert names_of(done.path / "sparse" / "0") == others
    assert {path.name for path in (done.path / "images").iterdir()} == others
    transforms = json.loads((done.path / "transforms.json").read_text())
    assert {Path(frame["file_path"]).name for frame in transforms["frames"]} == others
    model = pycolmap.Reconstruction(done.path / "sparse" / "0")
    assert (
        0 < model.num_points3D() < pycolmap.Reconstruction(run / "latest/sparse/0").num_points3D()
    )
    assert min(point.track.length() for point in model.points3D.values()) >= 2
    note, note_on_frames = done.notes  # a trajectory has all frames
    assert note == f"--without-doubted: 1 keyframe is not in it: {frame_name(8)}"
    assert "14 frames between them" in note_on_frames


def test_frames_that_hang_on_doubted_keyframes_go_with_them(made: PlaneRun, run: Path) -> None:
    done = exported(judged(run, MISPLACED), ExportFormat.UNDISTORT, ExportFormat.TUM, frames="all")
    kept = {0, *range(16, len(made.poses))}
    assert names_of(done.path / "sparse" / "0") == {frame_name(number) for number in kept}
    lines = (done.path / "trajectory.txt").read_text().splitlines()
    assert len(lines) == 1 + len(kept)
    num_between = len(made.poses) - len(kept) - 1
    (note,) = [one for one in done.notes if "next keyframes" in one]
    assert note.startswith(f"{num_between} frames between them")


def test_the_command_says_what_it_leaves_out(run: Path, tmp_path: Path) -> None:
    options = ["--to", str(tmp_path / "out"), "--ply", "--without-doubted"]
    done = CliRunner().invoke(cli.app, ["export", str(judged(run, MISPLACED)), *options])
    assert done.exit_code == 0, done.stderr
    assert f"--without-doubted: 1 keyframe is not in it: {frame_name(8)}" in done.stdout
    assert "3 images" in done.stdout


def test_each_kind_of_reason_either_doubts_places_or_the_map_as_a_whole() -> None:
    of_places = {
        *("misplaced", "misplaced_part", "weakly_joined", "unconfirmed"),
        *("few_points", "small_patch"),
    }
    of_the_whole = {
        *("bent", "pairs_contradict", "overlay", "turning", "few_keyframes", "several_maps"),
        *("missing_keyframes", "time_lost", "no_map", "broke_off", "camera_few_images"),
        *("camera_focal", "camera_lens", "gps_contradicts", "gps_rejected", "looks_up"),
    }
    kinds = set(re.findall(r'kind="(\w+)"', Path(verdict_rules.__file__).read_text()))
    assert kinds == of_places | of_the_whole
    reasons = [VerdictReason(kind=kind, level=VerdictLevel.DOUBTFUL, sentence="") for kind in kinds]
    assert {one.kind for one in reasons if one.is_of_places} == of_places


def test_frames_hang_on_the_keyframes_before_and_after_them() -> None:
    frames = ["a", None, "b", None, None, "c", None, "d", None]
    is_near = [False, True, True, True, True, False, True, True, True]
    assert near_doubted({"b", "d"}, frames) == is_near
    assert not any(near_doubted(set(), frames))


def test_what_leaving_keyframes_out_does_not_remedy_is_said(run: Path) -> None:
    done = exported(judged(run, BENT, MISPLACED, REMARK), ExportFormat.PLY)
    assert done.num_images == 3  # of the bent map, and of a remark, all stay
    assert any("doubted all the same: the map is bent" in note for note in done.notes)
    assert not any("remark" in note for note in done.notes)


def test_where_nothing_is_doubted_all_is_exported(run: Path) -> None:
    done = exported(judged(run, REMARK), ExportFormat.PLY)
    assert done.num_images == 4
    assert any("names no keyframe to leave out" in note for note in done.notes)


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        (None, "no verdict yet"),
        ("{", "cannot be read"),
        ("[]", "has no verdict"),
        ('{"verdict": null}', "has no verdict"),
        ('{"verdict": {"level": "splendid"}}', "cannot be read"),
        ('{"verdict": {}}', "has no verdict"),
        ('{"verdict": {"level": "doubtful", "reasons": []}}', "does not say what it doubts"),
        (doubtful("[[2]]"), "has no verdict"),
        (doubtful('["2"]'), "has no verdict"),
        (doubtful("[99]"), "of another map"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_without_a_verdict_nothing_is_left_out_in_silence(
    run: Path, summary: str | None, words: str
) -> None:
    if summary is not None:
        (run / "summary.json").write_text(summary)
    with pytest.raises(ConfigError, match=words):
        exported(run, ExportFormat.PLY)
    assert not (run.parent / "out").exists()


def test_a_verdict_that_leaves_no_map_is_refused(run: Path) -> None:
    all_but_one = tuple(FrameId(i) for i in (1, 2, 3))
    reason = VerdictReason(
        kind="few_points", level=VerdictLevel.WRONG, sentence="few", frame_ids=all_but_one
    )
    with pytest.raises(ConfigError, match="leaves 1 keyframe: no map"):
        exported(judged(run, reason), ExportFormat.PLY)


def test_what_is_left_in_parts_that_share_no_points_is_refused(run: Path) -> None:
    sparse = run / "latest" / "sparse" / "0"
    model = pycolmap.Reconstruction(sparse)
    for point3D_id, point in list(model.points3D.items()):
        ids = {one.image_id for one in point.track.elements}
        if min(ids) < DOUBTED < max(ids):
            model.delete_point3D(point3D_id)
    model.write_binary(sparse)
    with pytest.raises(ConfigError, match="falls into 2 parts: no map"):
        exported(judged(run, MISPLACED), ExportFormat.PLY)


def test_frames_of_another_camera_of_the_source_stay() -> None:
    def frame(name: str, index: int, kind: PoseKind) -> PosedFrame:
        return PosedFrame(
            name=name,
            source="bag",
            index=index,
            captured_at_s=0.1 * index,
            kind=kind,
            cam_from_world=np.eye(4)[:3],
        )

    kinds = [PoseKind.KEYFRAME, PoseKind.TRACKED, PoseKind.KEYFRAME]
    frames = [frame(f"{c}/{n}.jpg", 2 * n + (c == "r"), kinds[n]) for n in range(3) for c in "lr"]
    left = without_doubted_frames(frames, frozenset({"l/0.jpg"}))
    assert [one.name for one in left] == ["r/0.jpg", "r/1.jpg", "l/2.jpg", "r/2.jpg"]


def test_dense_points_are_of_doubted_keyframes_too(run: Path) -> None:
    with pytest.raises(ConfigError, match="also of doubted ones"):
        exported(judged(run, MISPLACED), ExportFormat.PLY, ExportFormat.DENSE)
