from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from rich.console import Console

from adapters import evaluate as evaluate_module
from adapters.evaluate import (
    Evaluation,
    ReferenceClock,
    TrajectoryScore,
    absolute_error,
    evaluate,
    evaluation_table,
    read_tum,
    recall_auc,
    relative_pose_errors_deg,
)
from engine.errors import ConfigError
from engine.geometry import (
    camera_center,
    compose_poses,
    invert_pose,
    quat_xyzw_from_rotation,
    rotation_from_vector,
)
from engine.types import Float64Array
from tests.support.paths import REAL_SETS

DATA = REAL_SETS
FPS = 25.0


def flight(num: int, *, seed: int = 0) -> Float64Array:
    """Poses (num, 3, 4) along a curve, each looking another way."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 4, num)
    centers = np.column_stack([3 * np.cos(angles), angles, 2 * np.sin(angles)])
    rotations = [rotation_from_vector(vector) for vector in rng.normal(scale=0.7, size=(num, 3))]
    return np.array([pose_at(r, c) for r, c in zip(rotations, centers, strict=True)])


def pose_at(rotation: Float64Array, center: Float64Array) -> Float64Array:
    """cam_from_world of a camera at ``center``."""
    return np.column_stack([rotation, -rotation @ center])


def moved(poses: Float64Array, *, scale: float, seed: int = 3) -> Float64Array:
    """The same flight in another world: turned, shifted and scaled."""
    rng = np.random.default_rng(seed)
    turn, shift = rotation_from_vector(rng.normal(size=3)), rng.normal(scale=10, size=3)
    return np.array(
        [
            pose_at(pose[:, :3] @ turn.T, scale * turn @ camera_center(pose) + shift)
            for pose in poses
        ]
    )


def shaken(poses: Float64Array, *, sigma: float, seed: int = 5) -> Float64Array:
    """Centres with Gaussian noise of ``sigma`` along each axis."""
    rng = np.random.default_rng(seed)
    return np.array(
        [pose_at(p[:, :3], camera_center(p) + rng.normal(scale=sigma, size=3)) for p in poses]
    )


def write_tum(path: Path, poses: Mapping[float, Float64Array]) -> Path:
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for timestamp_s, cam_from_world in poses.items():
        world_from_cam = invert_pose(cam_from_world)
        values = (*world_from_cam[:, 3], *quat_xyzw_from_rotation(world_from_cam[:, :3]))
        lines.append(f"{timestamp_s:.9f} " + " ".join(f"{value:.12g}" for value in values))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_run(
    run: Path,
    poses: Float64Array,
    *,
    statuses: Sequence[str] | None = None,
    live: Float64Array | None = None,
    source: str = "clip.mp4",
) -> Path:
    """A run of a video of `FPS`; a row of NaN in ``poses`` is a frame without a pose."""
    run.mkdir()
    rows = ["frame_id,source,index,name,captured_at_s,status"]
    for index, status in enumerate(statuses or ["keyframe"] * len(poses)):
        name = f"{index:06d}.jpg"
        rows.append(f"{index + 1},{source},{index},{name},{index / FPS:.9f},{status}")
    (run / "frames.csv").write_text("\n".join(rows) + "\n")
    for file_name, trajectory in (("trajectory.txt", poses), ("trajectory_live.txt", live)):
        if trajectory is not None:
            posed = {i / FPS: p for i, p in enumerate(trajectory) if np.isfinite(p).all()}
            write_tum(run / file_name, posed)
    return run


def by_index(poses: Float64Array) -> dict[float, Float64Array]:
    return {float(index): pose for index, pose in enumerate(poses)}


def by_time(poses: Float64Array) -> dict[float, Float64Array]:
    return {index / FPS: pose for index, pose in enumerate(poses)}


def final_of(evaluation: Evaluation) -> TrajectoryScore:
    assert evaluation.final is not None
    return evaluation.final


def test_a_perfect_run_in_another_world_has_no_error(tmp_path: Path) -> None:
    truth = flight(40)
    run = make_run(tmp_path / "run", moved(truth, scale=0.25))
    reference = write_tum(tmp_path / "truth.txt", by_time(truth))
    final = final_of(evaluate(run, reference))
    assert final.absolute is not None
    assert final.absolute.rmse < 1e-6
    assert final.absolute.scale == pytest.approx(4.0, rel=1e-6)
    assert final.absolute.rmse_rigid > 0.5  # a quarter of the size
    assert final.auc_5_deg == pytest.approx(1.0, abs=1e-4)
    assert final.num_poses == final.num_compared == 40
    assert final.posed_ratio == 1.0


@pytest.mark.parametrize(
    ("unit", "scale", "is_shown"),
    [("metres", 1.0, True), ("metres", 0.25, False), ("map units", 1.0, False), (None, 1.0, False)],
)
def test_the_error_without_scaling_is_shown_only_where_map_and_reference_are_in_metres(
    tmp_path: Path, unit: str | None, scale: float, is_shown: bool
) -> None:
    truth = flight(30)
    run = make_run(tmp_path / "run", moved(truth, scale=scale))
    if unit is not None:
        (run / "summary.json").write_text(json.dumps({"unit": unit}))
    evaluation = evaluate(run, write_tum(tmp_path / "truth.txt", by_time(truth)))
    table = evaluation_table(evaluation)
    rows = list(table.columns[0].cells)
    assert ("ATE without scaling" in rows) == is_shown
    assert "ATE after Sim(3)" in rows
    assert evaluation.unit == (unit or "map units")
    words = "metres" if unit == "metres" else "units of its own"
    assert str(table.caption).endswith(f"the map is in {words}")


def test_a_metric_run_has_no_rigid_error(tmp_path: Path) -> None:
    truth = flight(30)
    run = make_run(tmp_path / "run", moved(truth, scale=1.0))
    final = final_of(evaluate(run, write_tum(tmp_path / "truth.txt", by_time(truth))))
    assert final.absolute is not None
    assert final.absolute.rmse_rigid < 1e-6
    assert final.absolute.scale == pytest.approx(1.0)


def test_noise_of_the_centres_comes_out_as_the_error() -> None:
    sigma, num = 0.02, 200
    truth = flight(num)
    error = absolute_error(
        camera_center(moved(shaken(truth, sigma=sigma), scale=7.0)), camera_center(truth)
    )
    assert error is not None
    # Seven of the 3 N degrees of freedom go into the alignment.
    expected = sigma * np.sqrt(3 * (1 - 7 / (3 * num)))
    assert 0.93 * expected < error.rmse < 1.07 * expected
    extent = np.linalg.norm(np.ptp(camera_center(truth), axis=0))
    assert error.rmse_percent_of_extent == pytest.approx(100 * error.rmse / extent)
    assert 2 * sigma < error.max < 6 * sigma
    assert error.scale == pytest.approx(1 / 7, rel=0.01)


def test_alignment_agrees_with_pycolmap() -> None:
    truth = camera_center(flight(50))
    estimate = camera_center(moved(shaken(flight(50), sigma=0.3), scale=2.0))
    error = absolute_error(estimate, truth)
    assert error is not None
    similarity = pycolmap.estimate_sim3d(estimate, truth)
    rigid = pycolmap.estimate_rigid3d(estimate, truth)
    assert similarity is not None
    assert rigid is not None
    by_similarity = np.array([similarity * center for center in estimate]) - truth
    by_rigid = np.array([rigid * center for center in estimate]) - truth
    assert error.scale == pytest.approx(similarity.scale)
    assert error.rmse == pytest.approx(np.sqrt((by_similarity**2).sum(axis=1).mean()))
    assert error.rmse_rigid == pytest.approx(np.sqrt((by_rigid**2).sum(axis=1).mean()))


def test_a_mirrored_map_is_not_aligned_away() -> None:
    truth = camera_center(flight(50))
    error = absolute_error(truth * [1, 1, -1], truth)
    assert error is not None
    assert error.rmse_percent_of_extent > 5


def test_a_flight_along_one_line_is_scored() -> None:
    truth = np.outer(np.arange(10.0), [1.0, 2.0, -1.0])
    estimate = 3 * truth @ rotation_from_vector(np.array([0.3, 0.2, 0.9])).T + 5
    error = absolute_error(estimate, truth)
    assert error is not None
    assert error.rmse < 1e-9
    assert error.scale == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("estimate", "reference"),
    [
        (np.eye(3)[:2], np.eye(3)[:2]),
        (np.zeros((5, 3)), np.arange(15.0).reshape(5, 3)),
        (np.arange(15.0).reshape(5, 3), np.ones((5, 3))),
    ],
)
def test_two_frames_or_no_motion_have_no_absolute_error(
    estimate: Float64Array, reference: Float64Array
) -> None:
    assert absolute_error(estimate, reference) is None


def test_the_area_is_that_under_the_steps_of_recall() -> None:
    assert recall_auc(np.array([0.0, 0.0]), threshold_deg=5) == 1.0
    assert recall_auc(np.array([2.5]), threshold_deg=5) == 0.5
    assert recall_auc(np.array([1.0, 4.0, 9.0, 180.0]), threshold_deg=5) == (0.8 + 0.2) / 4
    assert recall_auc(np.array([1.0, 4.0, 9.0, 180.0]), threshold_deg=10) == pytest.approx(
        (0.9 + 0.6 + 0.1) / 4
    )
    assert recall_auc(np.array([5.0]), threshold_deg=5) == 0.0
    assert recall_auc(np.zeros(0), threshold_deg=5) == 0.0


def test_a_turned_camera_is_wrong_by_its_angle_in_all_its_pairs() -> None:
    truth = flight(3)
    estimate = truth.copy()
    turn = rotation_from_vector(np.radians([0.0, 4.0, 0.0]))
    estimate[0] = pose_at(turn @ truth[0, :, :3], camera_center(truth[0]))
    errors = relative_pose_errors_deg(estimate, truth)  # pairs 0-1, 0-2, 1-2
    # Direction is seen from the second camera, so the turn of the first leaves it alone.
    np.testing.assert_allclose(errors, [4, 4, 0], atol=1e-5)


def test_a_misplaced_camera_is_wrong_by_the_angle_of_its_direction() -> None:
    centers = np.array([[0.0, 0, 0], [1.0, 0, 0], [0, 0, 5.0]])
    truth = np.array([pose_at(np.eye(3), center) for center in centers])
    estimate = truth.copy()
    aside = np.array([np.cos(np.radians(20)), np.sin(np.radians(20)), 0])
    estimate[1] = pose_at(np.eye(3), aside)
    errors = relative_pose_errors_deg(estimate, truth)
    assert errors[0] == pytest.approx(20)
    assert errors[1] == pytest.approx(0, abs=1e-6)
    assert 0 < errors[2] < 20


def test_missing_and_motionless_poses_are_failures_and_a_still_reference_is_not() -> None:
    truth = flight(4)
    truth[3] = pose_at(truth[3, :, :3], camera_center(truth[2]))  # turns on the spot
    estimate = truth.copy()
    estimate[0] = np.nan
    estimate[1] = pose_at(truth[1, :, :3], camera_center(truth[2]))  # where the third is
    errors = relative_pose_errors_deg(estimate, truth)  # 01 02 03 12 13 23
    np.testing.assert_allclose(errors[:5], 180)
    assert errors[5] == pytest.approx(0, abs=1e-5)


def test_relative_errors_do_not_depend_on_the_world() -> None:
    truth = flight(12)
    estimate = shaken(truth, sigma=0.1)
    here = relative_pose_errors_deg(estimate, truth)
    there = relative_pose_errors_deg(moved(estimate, scale=9.0), moved(truth, scale=0.1, seed=8))
    np.testing.assert_allclose(here, there, atol=1e-5)
    assert len(here) == 12 * 11 / 2
    assert here.min() > 0


def test_frames_without_a_pose_lower_the_area(tmp_path: Path) -> None:
    truth = flight(20)
    poses = truth.copy()
    poses[[3, 4, 5, 6, 7]] = np.nan
    run = make_run(tmp_path / "run", poses, live=truth)
    evaluation = evaluate(run, write_tum(tmp_path / "truth.txt", by_time(truth)))
    final = final_of(evaluation)
    assert (final.num_poses, final.num_compared) == (15, 15)
    assert final.posed_ratio == 0.75
    assert final.absolute is not None
    assert final.absolute.rmse < 1e-6
    assert final.auc_30_deg == pytest.approx((15 * 14) / (20 * 19), abs=1e-4)
    assert evaluation.live is not None
    assert evaluation.live.auc_30_deg == pytest.approx(1.0, abs=1e-4)


def test_dropped_frames_are_frames_without_a_pose(tmp_path: Path) -> None:
    truth = flight(10)
    statuses = ["keyframe"] * 9 + ["dropped:overload"]
    run = make_run(tmp_path / "run", truth, statuses=statuses)
    evaluation = evaluate(run, write_tum(tmp_path / "truth.txt", by_time(truth)))
    assert (evaluation.num_frames, evaluation.num_keyframes) == (10, 9)
    assert final_of(evaluation).num_poses == 9
    assert final_of(evaluation).auc_5_deg == pytest.approx((9 * 8) / (10 * 9), abs=1e-4)


def test_the_clock_with_more_matching_frames_is_used(tmp_path: Path) -> None:
    truth = flight(60)
    run = make_run(tmp_path / "run", moved(truth, scale=2.0))
    for poses, clock in (
        (by_index(truth), ReferenceClock.INDEX),
        (by_time(truth), ReferenceClock.CAPTURE_TIME),
    ):
        evaluation = evaluate(run, write_tum(tmp_path / "truth.txt", poses))
        assert evaluation.clock == clock
        assert evaluation.num_referenced_frames == 60
        error = final_of(evaluation).absolute
        assert error is not None
        assert error.rmse < 1e-6


def test_a_reference_with_a_clock_of_its_own_may_differ_a_little(tmp_path: Path) -> None:
    truth = flight(20)
    run = make_run(tmp_path / "run", truth)
    late = {time_s + 0.004: pose for time_s, pose in by_time(truth).items()}
    assert evaluate(run, write_tum(tmp_path / "a.txt", late)).num_referenced_frames == 20


def test_a_reference_of_part_of_the_frames_judges_only_those(tmp_path: Path) -> None:
    truth = flight(20)
    run = make_run(tmp_path / "run", truth)
    part = {time_s: pose for i, (time_s, pose) in enumerate(by_time(truth).items()) if i % 2}
    evaluation = evaluate(run, write_tum(tmp_path / "a.txt", part))
    assert evaluation.num_referenced_frames == final_of(evaluation).num_compared == 10
    assert final_of(evaluation).num_poses == 20
    assert final_of(evaluation).auc_5_deg == pytest.approx(1.0, abs=1e-4)


def test_long_runs_are_sampled_evenly_and_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = flight(90)
    poses = truth.copy()
    poses[45:] = np.nan
    run = make_run(tmp_path / "run", poses)
    reference = write_tum(tmp_path / "truth.txt", by_time(truth))
    whole = final_of(evaluate(run, reference)).auc_30_deg
    monkeypatch.setattr(evaluate_module, "MAX_FRAMES_IN_PAIRS", 30)
    sampled = [final_of(evaluate(run, reference)).auc_30_deg for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert sampled[0] == pytest.approx((15 * 14) / (30 * 29), abs=1e-4)
    assert sampled[0] == pytest.approx(whole, abs=0.01)


def test_how_many_frames_have_a_pose_and_how_they_got_it_is_said(tmp_path: Path) -> None:
    truth = flight(8)
    run = make_run(tmp_path / "run", truth)
    reference = write_tum(tmp_path / "truth.txt", by_time(truth))
    without = evaluate(run, reference)
    assert (without.num_poses, without.num_in_other_maps) == ({}, 0)
    assert "have a pose" not in str(evaluation_table(without).caption)

    header, *rows = (run / "frames.csv").read_text().splitlines()
    poses = ["keyframe,0", "tracked,0", "interpolated,0", "tracked,0", "keyframe,1", "tracked,1"]
    lines = [f"{row},{pose}" for row, pose in zip(rows, [*poses, "none,", ","], strict=True)]
    (run / "frames.csv").write_text("\n".join([f"{header},pose,map", *lines]) + "\n")
    evaluation = evaluate(run, reference)
    assert evaluation.num_poses == {"keyframe": 2, "tracked": 3, "interpolated": 1, "none": 1}
    assert evaluation.num_in_other_maps == 2
    words = (
        "; 6 have a pose (2 keyframe, 3 tracked, 1 interpolated), 2 of them in other maps,"
        " 1 have none;"
    )
    assert words in str(evaluation_table(evaluation).caption)


def test_registered_keyframes_are_those_of_the_map(tmp_path: Path) -> None:
    truth = flight(5)
    statuses = ["keyframe", "tracked", "keyframe", "keyframe", "keyframe"]
    run = make_run(tmp_path / "run", truth, statuses=statuses)
    reference = write_tum(tmp_path / "truth.txt", by_time(truth))
    assert evaluate(run, reference).registered_ratio == 0.0
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_frames_per_rig = 1, 3
    model = pycolmap.synthesize_dataset(options)
    for index, image in zip((0, 2, 3), model.images.values(), strict=True):
        image.name = f"{index:06d}.jpg"
    (run / "latest" / "sparse" / "0").mkdir(parents=True)
    model.write_binary(run / "latest" / "sparse" / "0")
    evaluation = evaluate(run, reference)
    assert (evaluation.num_registered_keyframes, evaluation.num_keyframes) == (3, 4)
    assert evaluation.registered_ratio == 0.75


def test_a_run_that_ended_early_has_only_its_live_score(tmp_path: Path) -> None:
    truth = flight(6)
    run = make_run(tmp_path / "run", truth, live=truth)
    (run / "trajectory.txt").unlink()
    evaluation = evaluate(run, write_tum(tmp_path / "truth.txt", by_time(truth)))
    assert evaluation.final is None
    assert evaluation.live is not None


def test_a_trajectory_without_poses_is_scored_as_nothing(tmp_path: Path) -> None:
    truth = flight(6)
    run = make_run(tmp_path / "run", np.full_like(truth, np.nan))
    final = final_of(evaluate(run, write_tum(tmp_path / "truth.txt", by_time(truth))))
    assert (final.num_poses, final.absolute, final.auc_30_deg) == (0, None, 0.0)


def test_the_table_and_the_record_hold_the_figures(tmp_path: Path) -> None:
    truth = flight(30)
    run = make_run(tmp_path / "run", shaken(truth, sigma=0.05))
    evaluation = evaluate(run, write_tum(tmp_path / "truth.txt", by_index(truth)))
    error = final_of(evaluation).absolute
    assert error is not None
    record = json.loads(json.dumps(evaluation.as_record(), allow_nan=False))
    assert record["clock"] == "index"
    assert record["final"]["absolute"]["rmse"] == error.rmse
    assert record["live"] is None
    text = io.StringIO()
    Console(file=text, width=120).print(evaluation_table(evaluation))
    assert f"{error.rmse:.4g}" in text.getvalue()
    assert "30 (100.0%)" in text.getvalue()
    assert "by index" in " ".join(text.getvalue().split()), "lines are wrapped where paths are long"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1 2 3 0 0 0 1\n1 2 3\n", r"a\.txt:2: expected 8 numbers, found 3"),
        ("time,latitude,longitude\n", "time x y z qx qy qz qw`; how far .* GPS .* report"),
        ("0 1 2 three 0 0 0 1\n", r"a\.txt:1: could not convert .*three"),
        ("0 1 2 nan 0 0 0 1\n", r"a\.txt:1: is not a pose"),
        ("# header\n\n0 1 2 3 0 0 0 0\n", r"a\.txt:3: is not a pose"),
    ],
)
def test_a_line_that_is_no_pose_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_tum(tmp_path / "a.txt")


def test_files_that_are_missing_or_binary_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_tum(tmp_path / "gone.txt")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match="not a text file"):
        read_tum(tmp_path / "photo.jpg")


def test_trajectories_are_sorted_and_inverted_on_reading(tmp_path: Path) -> None:
    poses = flight(3)
    unsorted = {2.0: poses[2], 0.0: poses[0], 1.0: poses[1]}
    read = read_tum(write_tum(tmp_path / "a.txt", unsorted))
    np.testing.assert_array_equal(read.timestamps_s, [0, 1, 2])
    np.testing.assert_allclose(read.cam_from_world, poses, atol=1e-9)


def test_a_reference_that_matches_no_frame_is_refused(tmp_path: Path) -> None:
    truth = flight(4)
    run = make_run(tmp_path / "run", truth)
    reference = write_tum(tmp_path / "a.txt", {1e9 + i: pose for i, pose in enumerate(truth)})
    with pytest.raises(ConfigError, match="none of its 4 timestamps"):
        evaluate(run, reference)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    reference = write_tum(tmp_path / "a.txt", by_index(flight(3)))
    with pytest.raises(ConfigError, match="not the folder of a run"):
        evaluate(tmp_path, reference)
    (tmp_path / "frames.csv").write_text("index,name\n0,a.jpg\n")
    with pytest.raises(ConfigError, match="not the table"):
        evaluate(tmp_path, reference)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "has no column captured_at_s"),
        ("frame_id\n1\n", "has no column captured_at_s"),
        ("source,index,name,captured_at_s,status\na,0\n", "a row is cut short"),
        ("source,index,name,captured_at_s,status\na,0,b,nan,keyframe\n", "the time of b is nan"),
        (f"source,index,name,captured_at_s,status\na,{'9' * 5000},b,1,keyframe\n", "digits"),
        (f"source,index,name,captured_at_s,status\n{'x' * 200_000},0,b,1,k\n", "field limit"),
    ],
)
def test_a_table_of_frames_that_is_none_says_what_is_wrong(
    tmp_path: Path, table: str, words: str
) -> None:
    reference = write_tum(tmp_path / "a.txt", by_index(flight(3)))
    (tmp_path / "frames.csv").write_text(table)
    with pytest.raises(ConfigError, match=f"is not the table of a run's frames: .*{words}"):
        evaluate(tmp_path, reference)


@pytest.mark.parametrize("number", ["nan", "inf", "1e308", "-1e200", "1e16"])
@pytest.mark.parametrize("column", [0, 1, 3])
def test_poses_that_are_absurdly_far_away_are_refused(
    tmp_path: Path, number: str, column: int
) -> None:
    truth = flight(4)
    run = make_run(tmp_path / "run", truth)
    reference = write_tum(tmp_path / "a.txt", by_index(truth))
    for path in (reference, run / "trajectory.txt"):
        whole = path.read_text()
        words = whole.splitlines()[-1].split()
        words[column] = number
        path.write_text(f"{whole}{' '.join(words)}\n")
        with pytest.raises(ConfigError, match=f"{path.name}:[0-9]+: is not a pose"):
            evaluate(run, reference)
        path.write_text(whole)
    assert evaluate(run, reference).final is not None


def test_the_reference_of_a_real_set_is_read_on_its_index_clock(tmp_path: Path) -> None:
    reference = DATA / "redkitchen" / "groundtruth.txt"
    if not reference.is_file():
        pytest.skip("the RedKitchen set is not beside the repository")
    truth = read_tum(reference).cam_from_world
    assert len(truth) == 1000
    turned = compose_poses(truth, np.column_stack([np.eye(3), np.ones(3)]))
    evaluation = evaluate(make_run(tmp_path / "run", turned), reference)
    assert evaluation.clock == ReferenceClock.INDEX
    error = final_of(evaluation).absolute
    assert error is not None
    assert error.rmse_rigid < 1e-6
    assert final_of(evaluation).auc_5_deg > 0.9999
