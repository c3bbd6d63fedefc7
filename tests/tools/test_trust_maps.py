"""The trust bench on maps: places, loops, trajectories, verdicts, and matchers that lie."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest

from adapters.town.paint import Side
from adapters.town.world import BoxKind, lay_out_town
from engine.geometry import camera_center, rotation_from_vector
from engine.types import Features, Float64Array, Frame, FrameId, ImagePair, MatchRequest
from tests.support.paths import TOOLS

MODULES = ("flights", "inputs", "matchers", "places", "trajectories", "variation", "verdicts")
INTRINSICS = (371.2, 371.2, 320.0, 240.0)
SIZE = (640, 480)


@pytest.fixture(scope="module")
def trust() -> Iterator[Any]:
    """The modules of the tool's package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield SimpleNamespace(
            **{name: importlib.import_module(f"trust.{name}") for name in MODULES}
        )


# Places


def by_name(centers: Float64Array) -> dict[str, Float64Array]:
    return {f"{number:03d}.jpg": center for number, center in enumerate(centers)}


def moved(centers: Float64Array) -> Float64Array:
    """The same cameras in another frame of reference and scale."""
    rotation = rotation_from_vector(np.array([0.4, -1.0, 0.3]))
    return 0.3 * centers @ rotation.T + (5.0, -2.0, 1.0)


@pytest.mark.parametrize("num_cameras", [13, 60])
def test_cameras_at_wrong_places_do_not_bend_the_fit_of_the_others(
    trust: Any, num_cameras: int
) -> None:
    rng = np.random.default_rng(2)
    true = rng.uniform(-1.0, 1.0, (num_cameras, 3))
    found = moved(true)
    found[:4] += moved(rng.uniform(-1.0, 1.0, (4, 3)))
    placement = trust.places.placement(by_name(found), by_name(true))
    assert placement.wrong == ("000.jpg", "001.jpg", "002.jpg", "003.jpg")
    assert (placement.num_right, placement.num_wrong) == (num_cameras - 4, 4)
    assert placement.worst_percent > 2.0


def test_cameras_two_percent_off_are_right_and_three_percent_off_are_not(trust: Any) -> None:
    true = np.random.default_rng(3).uniform(-1.0, 1.0, (20, 3))
    extent = np.linalg.norm(np.ptp(true, axis=0))
    found = true.copy()
    found[0, 0] += 0.015 * extent
    found[1, 0] += 0.03 * extent
    placement = trust.places.placement(by_name(moved(found)), by_name(true))
    assert placement.wrong == ("001.jpg",)


def test_two_cameras_are_not_judged(trust: Any) -> None:
    centers = by_name(np.eye(3)[:2])
    assert trust.places.placement(centers, centers) is None


def floor_views(trust: Any, centers_x: list[float]) -> Any:
    """Cameras 10 m above flat ground that look straight down."""
    down = np.diag([1.0, -1.0, -1.0])
    poses = [np.column_stack([down, -down @ (x, 0.0, 10.0)]) for x in centers_x]
    return trust.places.TrueViews(
        depths_m=np.full((len(poses), 24, 32), 10.0),
        cam_from_world=np.array(poses),
        intrinsics=np.array(INTRINSICS),
        size=np.array(SIZE, float),
    )


def test_what_a_frame_sees_is_found_by_its_depth(trust: Any) -> None:
    views = floor_views(trust, [3.0])
    points, depths = views.points_seen(0, np.array([[320.0, 240.0], [320.0 + 37.12, 240.0]]))
    np.testing.assert_allclose(points, [[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]], atol=1e-9)
    np.testing.assert_allclose(depths, 10.0)


@pytest.mark.parametrize("is_false", [False, True])
def test_keyframes_joined_by_points_of_different_places_are_a_false_loop(
    trust: Any, is_false: bool
) -> None:
    rng = np.random.default_rng(1)
    floor = np.column_stack([rng.uniform(-3.0, 3.0, (40, 2)), np.zeros(40)])
    views = floor_views(trust, [0.0, 1.0])
    camera = pycolmap.Camera(
        camera_id=1, model="PINHOLE", width=SIZE[0], height=SIZE[1], params=INTRINSICS
    )
    reconstruction = pycolmap.Reconstruction()
    reconstruction.add_camera_with_trivial_rig(camera)
    for index, pose in enumerate(views.cam_from_world):
        in_cam = floor @ pose[:, :3].T + pose[:, 3]
        image = pycolmap.Image(
            name=f"{index}.jpg",
            keypoints=in_cam[:, :2] / in_cam[:, 2:] * INTRINSICS[:2] + INTRINSICS[2:],
            camera_id=1,
            image_id=index + 1,
        )
        reconstruction.add_image_with_trivial_frame(
            image, pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:, :3]), pose[:, 3])
        )
    for row, xyz in enumerate(floor):
        elements = [pycolmap.TrackElement(image_id, row) for image_id in (1, 2)]
        reconstruction.add_point3D(xyz, pycolmap.Track(elements))
    truth = floor_views(trust, [0.0, 21.0]) if is_false else views
    found = trust.places.false_loops(reconstruction, {"0.jpg": 0, "1.jpg": 1}, truth)
    assert found == ([("0.jpg", "1.jpg")] if is_false else [])


# Trajectories


def write_run(
    folder: Path, *, keyframes: list[int], tracked: list[int], lines: list[int], rate_hz: float
) -> Path:
    """A run of ten frames that registered all but the last of ``keyframes``."""
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig = 1, 1
    options.num_frames_per_rig, options.num_points3D = len(keyframes) - 1, 20
    reconstruction = pycolmap.synthesize_dataset(options)
    images = sorted(reconstruction.images.values(), key=lambda image: image.name)
    for index, image in zip(keyframes, images, strict=False):
        image.name = f"{index:06d}.jpg"
    (folder / "latest" / "sparse" / "0").mkdir(parents=True)
    reconstruction.write(folder / "latest" / "sparse" / "0")
    times = [f"{index / rate_hz:g}" for index in range(10)]
    with (folder / "frames.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("frame_id", "source", "index", "name", "captured_at_s", "status"))
        for index, time in enumerate(times):
            status = "keyframe" if index in keyframes else "tracked"
            writer.writerow((index + 1, "v.mp4", index, f"{index:06d}.jpg", time, status))
    events = [
        {"event": "FramePosed", "frame_id": index + 1, "is_keyframe": False} for index in tracked
    ]
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in events))
    text = "".join(f"{times[index]} 0 0 0 0 0 0 1\n" for index in lines)
    (folder / "trajectory.txt").write_text(f"# a comment\n{text}")
    return folder


def test_poses_of_registered_and_tracked_frames_are_measured(trust: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path, keyframes=[0, 5, 9], tracked=[2, 7], lines=[0, 2, 5, 7], rate_hz=2.0)
    found = trust.trajectories.invented_poses(run, are_photos=False)
    assert (found.num_lines, found.names) == (4, ())
    assert trust.trajectories.num_keyframe_poses(run) == 2


def test_poses_beyond_the_ends_and_across_long_gaps_are_invented(
    trust: Any, tmp_path: Path
) -> None:
    run = write_run(
        tmp_path, keyframes=[0, 2, 6, 9], tracked=[], lines=[0, 1, 2, 4, 6, 8], rate_hz=2.0
    )
    found = trust.trajectories.invented_poses(run, are_photos=False)
    assert found.names == ("000004.jpg", "000008.jpg")  # 1 s apart is near enough, 2 s is not


def test_poses_of_photos_are_never_interpolated(trust: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path, keyframes=[0, 2, 9], tracked=[], lines=[0, 1, 2, 9], rate_hz=2.0)
    found = trust.trajectories.invented_poses(run, are_photos=True)
    assert found.names == ("000001.jpg", "000009.jpg")


# Verdicts


def test_what_a_run_says_is_read_from_its_summary_and_the_terminal(
    trust: Any, tmp_path: Path
) -> None:
    reason = {"kind": "x", "level": "doubtful", "sentence": "frames 210 to 260 turn on the spot"}
    verdict = {"level": "doubtful", "reasons": [reason]}
    (tmp_path / "summary.json").write_text(
        json.dumps({"registered_keyframes": 12, "verdict": verdict})
    )
    said = trust.verdicts.said_by(tmp_path, "run: 11 of 13 keyframes registered\n")
    assert (said.level, said.num_registered, said.num_registered_at_last) == ("doubtful", 12, 11)
    assert said.names(r"\bturn")
    assert not said.names("registered")
    assert said.shown() == "doubtful: frames 210 to 260 turn on the spot"


def test_a_run_without_a_verdict_says_none(trust: Any, tmp_path: Path) -> None:
    said = trust.verdicts.said_by(tmp_path, "")
    assert (said.level, said.sentences, said.num_registered) == ("none", (), None)
    named = trust.verdicts.said_by(tmp_path / "turning", f"{tmp_path / 'turning'}: no map\n")
    assert "turn" not in named.words
    assert said.num_registered_at_last is None


def test_lengths_of_time_and_ranges_are_found_in_words(trust: Any) -> None:
    assert trust.verdicts.seconds_named("9.8 s are lost, 3 seconds too, 12 stations") == [9.8, 3.0]
    assert trust.verdicts.ranges_named("frames 210 to 260 and 3-7") == [(210, 260), (3, 7)]


# Matchers


def features(frame_id: int, *, num_points: int, seed: int = 0) -> Features:
    rng = np.random.default_rng((seed, frame_id))
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=rng.uniform((0, 0), SIZE, (num_points, 2)),
        descriptors=np.zeros((num_points, 0), np.uint8),
        scales=np.ones(num_points, np.float32),
        colors=np.zeros((num_points, 3), np.uint8),
    )


def request(first: int, second: int, *, num_points: int = 800) -> MatchRequest:
    tables = [features(frame_id, num_points=num_points) for frame_id in (first, second)]
    rows = np.arange(num_points)
    return MatchRequest(
        pair=ImagePair(FrameId(first), FrameId(second)),
        first=tables[0],
        second=tables[1],
        query_rows1=rows,
        query_rows2=rows,
    )


def test_false_matches_agree_on_a_geometry_that_differs_from_pair_to_pair(trust: Any) -> None:
    deception = trust.matchers.Deception(ratio=1.0, seed=4, is_admitted=True)
    focal_x, focal_y, center_x, center_y = INTRINSICS
    matrix = np.array([[focal_x, 0, center_x], [0, focal_y, center_y], [0, 0, 1]])
    rotations = []
    for second in (2, 3):
        matches = deception.matches(request(1, second), intrinsics=INTRINSICS, size=SIZE)
        assert len(matches) == 150
        assert ((matches.points2_xy > -5) & (matches.points2_xy < np.add(SIZE, 5))).all()
        essential, mask = cv2.findEssentialMat(
            matches.points1_xy, matches.points2_xy, matrix, threshold=3.0
        )
        _, rotation, _, _ = cv2.recoverPose(
            essential, matches.points1_xy, matches.points2_xy, matrix, mask=mask.copy()
        )
        assert mask.sum() > 120
        rotations.append(rotation)
    again = deception.matches(request(1, 2), intrinsics=INTRINSICS, size=SIZE)
    first = deception.matches(request(1, 2), intrinsics=INTRINSICS, size=SIZE)
    np.testing.assert_array_equal(again.points2_xy, first.points2_xy)
    turn = np.degrees(np.arccos((np.trace(rotations[0].T @ rotations[1]) - 1) / 2))
    assert turn > 3.0


def test_so_many_of_the_pairs_are_concerned_in_either_order(trust: Any) -> None:
    deception = trust.matchers.Deception(ratio=0.1, seed=0, is_admitted=False)
    pairs = [(FrameId(one), FrameId(other)) for one in range(60) for other in range(one)]
    concerned = [deception.concerns(*pair) for pair in pairs]
    assert 0.07 < np.mean(concerned) < 0.13
    assert concerned == [deception.concerns(other, one) for one, other in pairs]


def test_recorded_matches_are_found_by_name_in_either_order(trust: Any, tmp_path: Path) -> None:
    matches = np.array([[0, 3], [2, 1]], np.uint16)
    points: dict[str, Any] = {
        f"keypoints_{name}": np.full((5, 2), 4.5, np.float32) for name in ("a.jpg", "b.jpg")
    }
    np.savez(tmp_path / "m.npz", **points | {"matches_a.jpg_b.jpg": matches})
    matcher = trust.matchers.RecordedMatcher(tmp_path / "m.npz")
    tables = [matcher.describe(frame(1, "sub/b.jpg")), matcher.describe(frame(2, "a.jpg"))]
    assert matcher.matches_everything
    empty = np.zeros(0, np.int64)
    (found,) = matcher.match(
        [
            MatchRequest(
                pair=ImagePair(FrameId(1), FrameId(2)),
                first=tables[0],
                second=tables[1],
                query_rows1=empty,
                query_rows2=empty,
            )
        ]
    )
    assert found.matches_idx.tolist() == [[3, 0], [1, 2]]
    places = trust.matchers.RecordedPlaces(matcher)
    for table in tables:
        places.add(table)
    assert places.query(FrameId(1), exclude=(), limit=3) == [(FrameId(2), 2 / 5)]


def frame(frame_id: int, name: str) -> Frame:
    return Frame(
        frame_id=FrameId(frame_id),
        camera_key="a",
        source="a",
        index=0,
        name=name,
        captured_at_s=0.0,
        received_at_s=0.0,
        pixels=np.zeros((12, 16, 3), np.uint8),
    )


# Flights


def kit(trust: Any) -> Any:
    return SimpleNamespace(variation=trust.variation.Variation())


def test_a_turning_camera_stays_where_it_is_and_turns_so_far(trust: Any) -> None:
    poses = trust.flights.turning(kit(trust), 0.25).cam_from_world
    assert np.ptp(camera_center(poses), axis=0).max() < 1e-9
    forward = poses[:, 2, :2] / np.linalg.norm(poses[:, 2, :2], axis=1, keepdims=True)
    angles = np.arccos(np.clip(forward @ forward[0], -1, 1))
    assert angles.max() == pytest.approx(0.25, abs=0.01)


def test_a_walk_with_a_turn_is_the_same_walk_and_ends_where_it_turns(trust: Any) -> None:
    alone = trust.flights.walk(kit(trust)).cam_from_world
    turned = trust.flights.walk(kit(trust), num_turned=10).cam_from_world
    np.testing.assert_array_equal(turned[: len(alone)], alone)
    centers = camera_center(turned)
    assert np.abs(centers[len(alone) :] - centers[len(alone) - 1]).max() < 1e-9
    turn = np.arccos((np.trace(turned[-1, :, :3] @ alone[-1, :, :3].T) - 1) / 2)
    assert turn == pytest.approx(0.9, abs=1e-6)


def test_the_interrupted_way_jumps_once_is_black_once_and_comes_back(trust: Any) -> None:
    clip = trust.flights.interrupted(kit(trust))
    seen = clip.cam_from_world[~clip.is_black]
    assert clip.is_black.sum() == 100
    between = seen[1:, :, :3] @ np.swapaxes(seen[:-1, :, :3], 1, 2)
    steps = np.arccos(np.clip((np.trace(between, axis1=1, axis2=2) - 1) / 2, -1, 1))
    assert (steps > np.radians(30)).sum() == 2  # the jump, and what the blackout hides
    centers = camera_center(seen)
    start = np.linalg.norm(centers - centers[0], axis=1)
    assert start[60:].min() < 4.0


def test_the_outward_flight_comes_round_and_looks_to_all_sides(trust: Any) -> None:
    flights = trust.flights
    with flights.outward_flight():
        town = flights._open_town("orbit", seed=0, num_frames=40)
    poses = np.array([pose for _, pose in town.ground_truth()])
    centers = camera_center(poses)[:, :2]
    outward = (centers / np.linalg.norm(centers, axis=1, keepdims=True) * poses[:, 2, :2]).sum(1)
    assert outward.min() > 0.9
    angles = np.unwrap(np.arctan2(centers[:, 0], centers[:, 1]))
    assert np.degrees(np.ptp(angles)) == pytest.approx(400.0, abs=2.0)
    assert np.degrees(np.abs(np.diff(angles))).max() < 25.0


def test_equal_houses_are_twenty_of_one_size_that_do_not_overlap(trust: Any) -> None:
    flights = trust.flights
    layout = flights.with_equal_houses(lay_out_town(3), seed=3)
    houses = layout.boxes[-flights.NUM_LOOKALIKES :]
    assert {box.kind for box in houses} == {BoxKind.HOUSE}
    bounds = replace(layout, boxes=houses).bounds
    assert len({tuple(size.round(6)) for size in bounds[:, 1] - bounds[:, 0]}) == 1
    low, high = bounds[:, None, 0, :2], bounds[None, :, 1, :2]
    overlaps = ((low < high) & (bounds[None, :, 0, :2] < bounds[:, None, 1, :2])).all(axis=2)
    assert overlaps.sum() == flights.NUM_LOOKALIKES  # each with itself
    assert len(flights.lookalike_houses(layout)) == flights.NUM_LOOKALIKES


def test_one_facade_is_on_all_walls_of_twenty_houses_and_nowhere_else(trust: Any) -> None:
    layout, sides = lay_out_town(3), list(Side)
    texel_m = 0.5
    textures = [
        np.full((max(2, round(rows / texel_m)), max(2, round(columns / texel_m)), 3), 7, np.uint8)
        for box in layout.boxes
        for rows, columns in [(box.z_max - box.z_min, box.footprint.x_max - box.footprint.x_min)]
        for _ in sides
    ]
    changed = trust.flights.one_facade(textures, layout, seed=3)
    houses = trust.flights.lookalike_houses(layout)
    walls = [
        house * len(sides) + number
        for house in houses
        for number, side in enumerate(sides)
        if side not in (Side.TOP, Side.BOTTOM)
    ]
    is_changed = [one is not other for one, other in zip(changed, textures, strict=True)]
    assert np.flatnonzero(is_changed).tolist() == sorted(walls)
    rows, columns = np.min([changed[idx].shape[:2] for idx in walls], axis=0)
    corners = {changed[idx][-rows:, :columns].tobytes() for idx in walls}
    assert len(corners) == 1
    assert all(changed[idx].shape == textures[idx].shape for idx in walls)
