"""Lenses that nobody described: fisheyes and long lenses are found, ordinary cameras stay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from engine.camera_models import LensKind
from engine.config import CamerasConfig, Config, RuntimeConfig, SnapshotsConfig
from engine.events import LensRecognised, SnapshotWritten
from engine.mapping.camera_changes.lens_recognition import (
    LensRecognition,
    choice,
    shared_error_ratio,
)
from engine.mapping.cameras.lens_search import LensFit, LensFits
from engine.mapping.jobs import FinishedJob, JobKind, MapJob
from engine.mapping.mapper import Mapper
from engine.mapping.model.sparse_map import Residuals, SparseMap
from engine.output.recorder import Recorder
from engine.output.run_folder import RunFolder
from engine.types import Float64Array, IntrinsicsPrior
from tests.support.fake_runs import frame_of
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import (
    HEIGHT,
    WIDTH,
    FakeMatcher,
    PoseErrors,
    SyntheticCamera,
    SyntheticWorld,
    look_at,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
)

NUM_KEYFRAMES = 10
WRONG_RATIO = 0.1  # of the matches


def camera(
    focal_px: float,
    k: float = 0.0,
    *,
    model: str = "SIMPLE_RADIAL",
    prior: IntrinsicsPrior | None = None,
) -> SyntheticCamera:
    return SyntheticCamera(model=model, params=(focal_px, WIDTH / 2, HEIGHT / 2, k), prior=prior)


def fisheye(degrees_across: float) -> SyntheticCamera:
    focal_px = WIDTH / 2 / math.radians(degrees_across / 2)
    return camera(focal_px, model="SIMPLE_RADIAL_FISHEYE")


def flight(
    taken_with: SyntheticCamera, *, noise_px: float = 0.4, num_keyframes: int = NUM_KEYFRAMES
) -> SyntheticWorld:
    return SyntheticWorld(
        straight_path(num_keyframes), cameras=[taken_with], noise_px=noise_px, density=1.0
    )


def around_an_object(focal_px: float) -> SyntheticWorld:
    """A long lens on an arc around a ball of points."""
    angles = np.linspace(-0.3, 0.3, NUM_KEYFRAMES)
    centers = 14.0 * np.column_stack([np.cos(angles), np.sin(angles), 0.1 * np.sin(3 * angles)])
    rng = np.random.default_rng(3)
    directions: Float64Array = rng.normal(size=(500, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return SyntheticWorld(
        np.array([look_at(center, np.zeros(3)) for center in centers]),
        points=2.0 * directions * rng.random((500, 1)) ** (1 / 3),
        cameras=[camera(focal_px)],
        noise_px=0.4,
    )


class Run(MapperRun):
    """A mapper fed with the first frames of a world, by default all, not finished."""

    def __init__(
        self,
        world: SyntheticWorld,
        *,
        config: Config | None = None,
        num_keyframes: int | None = None,
        failing: JobKind | None = None,
    ) -> None:
        matcher = FakeMatcher(world=world, wrong_ratio=WRONG_RATIO)
        super().__init__(config or Config(), matcher=matcher, graph=scene_graph())
        self.world = world
        self._failing = failing
        for frame_id in world.frame_ids[:num_keyframes]:
            self.add_keyframe(world.keyframe(frame_id))

    def run_job(self, job: MapJob) -> FinishedJob:
        if job.kind is not self._failing:
            return super().run_job(job)
        self._running.pop(job.kind)
        return FinishedJob(job=job, result=None)

    @property
    def model(self) -> str:
        return str(self.sparse_map.camera("camera").model_name)

    @property
    def focal_px(self) -> float:
        return float(self.sparse_map.camera("camera").mean_focal_length())

    @property
    def recognised(self) -> list[LensRecognised]:
        return self.emitted(LensRecognised)

    def errors(self) -> PoseErrors:
        return pose_errors(poses_of(self.sparse_map), self.world)


@pytest.mark.slow
@pytest.mark.parametrize("degrees_across", [110.0, 150.0])
def test_a_fisheye_that_nobody_named_is_recognised_while_frames_arrive(
    degrees_across: float,
) -> None:
    world = flight(fisheye(degrees_across))
    mapped = Run(world)
    (recognised,) = mapped.recognised
    true_px = float(world.camera(1).params[0])
    assert (recognised.former_model, recognised.model) == ("SIMPLE_RADIAL", "RADIAL_FISHEYE")
    assert abs(recognised.focal_px - true_px) < 0.02 * true_px
    assert recognised.gain_ratio is None or recognised.gain_ratio > 1.03
    assert mapped.model == "RADIAL_FISHEYE"
    assert mapped.registered_ids == world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3
    mapped.end()
    assert abs(mapped.focal_px - true_px) < 0.005 * true_px
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


@pytest.mark.slow
def test_a_lens_is_searched_beside_the_map_and_changes_before_the_keyframe_after_next() -> None:
    world = flight(fisheye(130.0))
    mapped = Run(world, num_keyframes=0)
    num_fed = 0
    while not mapped.jobs:
        num_fed += 1
        mapped.add_keyframe(world.keyframe(world.frame_ids[num_fed - 1]))
    (job,) = mapped.jobs
    assert job.kind is JobKind.LENS_SEARCH
    assert not mapped.due
    lenses = mapped.mapper._lenses
    assert lenses.facts()["searches"] == {}  # a run that goes on would begin it again
    mapped.add_keyframe(world.keyframe(world.frame_ids[num_fed]))
    assert mapped.due == (job,)
    assert mapped.model == "SIMPLE_RADIAL"
    mapped.begin_keyframe(world.keyframe(world.frame_ids[num_fed + 1]))
    assert mapped.model == "RADIAL_FISHEYE"
    assert mapped.registered_ids == world.frame_ids[: num_fed + 1]
    assert lenses.facts()["searches"]["camera"]["num"] == 1


def test_a_search_that_failed_counts_and_is_not_begun_again_at_once() -> None:
    world = flight(fisheye(130.0))
    mapped = Run(world, num_keyframes=0, failing=JobKind.LENS_SEARCH)
    for frame_id in world.frame_ids:
        mapped.add_keyframe(world.keyframe(frame_id))
    assert [job.kind for job in mapped.jobs] == [JobKind.LENS_SEARCH]
    assert mapped.model == "SIMPLE_RADIAL"
    assert not mapped.recognised


class Bent:
    """What a map would say of keypoints that a wrong lens bends, and of one that does not show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, offset_px: float = 3.0) -> None:
        self.offset_px = offset_px
        self._keypoints = np.random.default_rng(5).uniform((0.0, 0.0), (WIDTH, HEIGHT), (500, 2))
        monkeypatch.setattr(SparseMap, "residuals", lambda self_, frame_id: self.residuals())

    def residuals(self) -> Residuals:
        offsets = np.full((500, 2), self.offset_px)
        offsets[0] = np.inf
        return Residuals(keypoints_xy=self._keypoints, offsets_xy=offsets)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_search_that_was_abandoned_is_begun_again(
    is_resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = Run(flight(camera(800.0)))
    Bent(monkeypatch)
    lenses = mapped.mapper._lenses
    lenses.restore({"searches": {}, "num_at_errors": {}})
    assert lenses.doubted(mapped.sparse_map) == "camera"
    lenses.search(mapped.sparse_map, "camera")
    if is_resumed:  # while the search is in flight
        lenses.restore(lenses.facts())
    assert lenses.doubted(mapped.sparse_map) == "camera"
    lenses.search(mapped.sparse_map, "camera")
    assert lenses.conclude(mapped.sparse_map, LensFits()) is None
    assert lenses.doubted(mapped.sparse_map) is None


def test_a_point_that_does_not_project_says_nothing_of_a_lens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mapped = Run(flight(camera(800.0)))
    Bent(monkeypatch, offset_px=0.01)
    lenses = mapped.mapper._lenses
    lenses.restore({"searches": {}, "num_at_errors": {}})
    assert lenses.doubted(mapped.sparse_map) is None
    assert lenses.facts()["num_at_errors"] == {"camera": NUM_KEYFRAMES}


@pytest.mark.parametrize(
    ("num_registered", "is_bent", "is_doubted"),
    [(9, False, False), (9, True, True), (8, False, True)],
)
def test_keyframes_that_wait_speak_against_a_lens_unless_many_others_fit_it(
    num_registered: int, *, is_bent: bool, is_doubted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = flight(camera(800.0), num_keyframes=13)
    mapped = Run(world)
    if is_bent:
        Bent(monkeypatch)
    mapped.sparse_map.deregister(world.frame_ids[num_registered:])
    lenses = mapped.mapper._lenses
    lenses.restore({"searches": {}, "num_at_errors": {"camera": 13}})  # not examined again
    assert lenses.doubted(mapped.sparse_map) == ("camera" if is_doubted else None)


def failing_search(*args: object, **kwargs: object) -> LensFits:
    raise ValueError("no lens for this")


@pytest.mark.slow
def test_a_search_that_raises_ends_neither_finishing_nor_a_resumed_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = flight(fisheye(130.0))
    first = Run(world, failing=JobKind.LENS_SEARCH)
    assert JobKind.LENS_SEARCH in [job.kind for job in first.jobs]
    monkeypatch.setattr("engine.mapping.camera_changes.lens_recognition.fit_lenses", failing_search)
    resumed = Run(world, num_keyframes=0)
    resumed.restore(first.stored.run())
    assert resumed.registered_ids == first.registered_ids

    first.mapper._lenses.restore({"searches": {}, "num_at_errors": {}})
    first.end()
    assert first.mapper._lenses.facts()["searches"]["camera"]["num"] == 1
    assert first.model == "SIMPLE_RADIAL"


def test_without_a_map_the_lenses_of_all_cameras_are_searched_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting, searched = ["first", "second"], []

    def search(self: LensRecognition, sparse_map: SparseMap, camera_key: str) -> object:
        searched.append(camera_key)
        return LensFits

    monkeypatch.setattr(
        LensRecognition, "doubted", lambda self, sparse_map: next(iter(waiting), None)
    )
    monkeypatch.setattr(LensRecognition, "search", search)
    monkeypatch.setattr(Mapper, "_take_lens", lambda self, found: waiting.pop(0))
    mapped = Run(flight(camera(800.0)), num_keyframes=0)
    mapped.end()
    assert searched == ["first", "second"]


def test_no_lens_is_searched_when_that_is_not_wanted() -> None:
    cameras = CamerasConfig(recognise_lenses=False)
    mapped = Run(flight(fisheye(110.0)), config=Config(cameras=cameras))
    assert not mapped.recognised
    assert mapped.model == "SIMPLE_RADIAL"


@pytest.mark.slow
def test_the_journal_and_snapshots_agree_on_a_recognised_lens(tmp_path: Path) -> None:
    world = flight(fisheye(150.0))
    mapped = MapperRun(
        Config(), matcher=FakeMatcher(world=world, wrong_ratio=WRONG_RATIO), graph=scene_graph()
    )
    recorder = Recorder(
        RunFolder.create(tmp_path, config_text="{}"),
        snapshots=SnapshotsConfig(),
        runtime=RuntimeConfig(),
        emit=mapped._emit,
    )
    num_journaled = {}  # matches of pairs, as written at first
    for frame_id in world.frame_ids:
        frame = frame_of(frame_id)
        recorder.frame_arrived(frame)
        step = mapped.add_keyframe(replace(world.keyframe(frame_id), name=frame.name))
        assert step.record is not None
        own = {frame_id}
        assert not any(own & {p.pair.first, p.pair.second} for p in step.record.changed_pairs)
        for verified in step.record.pairs:
            num_journaled[verified.pair] = verified.num_inliers
        recorder.step_taken(step, frame)
    assert mapped.emitted(LensRecognised)
    recorder.snapshot(mapped.mapper.snapshot().copies, entries={})
    recorder.close()
    assert recorder.num_failed_writes == 0

    (snapshot,) = mapped.emitted(SnapshotWritten)
    in_snapshot = pycolmap.Reconstruction(Path(snapshot.path) / "sparse" / "0")
    with pycolmap.Database.open(tmp_path / "database.db") as database:
        (camera,) = database.read_all_cameras()
        assert camera.model_name == "RADIAL_FISHEYE"
        assert camera.camera_id in in_snapshot.cameras
        assert in_snapshot.cameras[camera.camera_id].model_name == camera.model_name
        for frame_id in world.frame_ids:
            image = database.read_image(frame_id)
            assert image.camera_id == in_snapshot.image(frame_id).camera_id
            assert image.name == in_snapshot.image(frame_id).name
        edges = {verified.pair: verified for verified in mapped.graph.edges()}
        for pair in num_journaled.keys() | edges.keys():
            rows = database.read_matches(pair.first, pair.second)
            expected = edges[pair].inlier_matches_idx if pair in edges else np.empty((0, 2))
            np.testing.assert_array_equal(rows, expected)
    changed = [one for one, number in num_journaled.items() if edges[one].num_inliers != number]
    assert len(changed) > 5  # what was verified again


@pytest.mark.slow
def test_a_long_lens_is_found_while_frames_arrive() -> None:
    mapped = Run(around_an_object(2600.0))
    assert abs(mapped.focal_px - 2600.0) < 0.03 * 2600.0
    assert mapped.registered_ids == mapped.world.frame_ids
    assert 1e-5 < mapped.errors().rmse_ratio < 3e-3
    assert {event.model for event in mapped.recognised} <= {"SIMPLE_RADIAL"}


@pytest.mark.slow
@pytest.mark.parametrize(("k", "noise_px"), [(0.0, 1.0), (-0.15, 0.4), (-0.15, 1.0)])
def test_an_ordinary_camera_stays_a_perspective_with_noise_and_distortion(
    k: float, noise_px: float
) -> None:
    world = flight(camera(800.0, k), noise_px=noise_px)
    mapped = Run(world)
    mapped.end()
    assert mapped.model == "SIMPLE_RADIAL"
    assert all(event.model == "SIMPLE_RADIAL" for event in mapped.recognised)
    assert abs(mapped.focal_px - 800.0) < 0.03 * 800.0
    assert 1e-5 < mapped.errors().rmse_ratio < 2e-3


def test_a_start_that_looks_right_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(
        "engine.mapping.camera_changes.lens_recognition.LensRecognition.search",
        lambda self, sparse_map, camera_key: searched.append(camera_key),
    )
    mapped = Run(flight(camera(800.0)))
    mapped.end()
    assert searched == []
    assert mapped.registered_ids == mapped.world.frame_ids


@pytest.mark.slow
def test_a_camera_named_like_an_action_camera_may_be_set_to_perspective() -> None:
    hint = IntrinsicsPrior(focal_px=0.0, is_fisheye=True)
    mapped = Run(flight(camera(560.0, prior=hint)))
    (recognised,) = mapped.recognised
    assert (recognised.former_model, recognised.model) == ("RADIAL_FISHEYE", "SIMPLE_RADIAL")
    assert abs(mapped.focal_px - 560.0) < 0.02 * 560.0
    assert 1e-5 < mapped.errors().rmse_ratio < 1e-3


@pytest.mark.parametrize(
    ("cameras", "prior"),
    [
        (CamerasConfig(focal_px=816.0), None),
        (CamerasConfig(intrinsics="fixed"), None),
        (CamerasConfig(), IntrinsicsPrior(focal_px=816.0)),
        (CamerasConfig(model="OPENCV_FISHEYE"), None),
    ],
)
def test_a_lens_that_somebody_vouched_for_is_not_searched(
    cameras: CamerasConfig, prior: IntrinsicsPrior | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []
    monkeypatch.setattr(
        "engine.mapping.camera_changes.lens_recognition.LensRecognition.search",
        lambda self, sparse_map, camera_key: searched.append(camera_key),
    )
    lens = fisheye(130.0)
    taken_with = SyntheticCamera(model=lens.model, params=lens.params, prior=prior)
    Run(flight(taken_with), config=Config(cameras=cameras))
    assert searched == []


# -- errors that speak against a lens --------------------------------------------------------------


@pytest.mark.parametrize(
    ("bent_px", "noise_px", "low", "high"),
    [
        (0.0, 0.3, -0.1, 0.1),
        (0.0, 2.0, -0.1, 0.1),  # however large
        (2.0, 0.3, 0.8, 1.0),
        (2.0, 2.0, 0.2, 0.5),  # 1 px^2 of bending in the mean, and 4 of noise
    ],
)
def test_errors_that_neighbours_share_are_told_from_noise(
    bent_px: float, noise_px: float, low: float, high: float
) -> None:
    rng = np.random.default_rng(5)
    residuals = []
    for _ in range(4):
        keypoints = rng.uniform((0.0, 0.0), (WIDTH, HEIGHT), size=(500, 2))
        radii = keypoints / (WIDTH / 2, HEIGHT / 2) - 1.0
        noise = rng.normal(scale=noise_px / math.sqrt(2.0), size=(500, 2))
        residuals.append(
            Residuals(
                keypoints_xy=np.vstack([keypoints, keypoints[:100]]),
                offsets_xy=np.vstack([bent_px * radii + noise, (bent_px * radii + noise)[:100]]),
            )
        )
    shared = shared_error_ratio(residuals, cell_px=WIDTH / 32)
    assert low < shared < high


def test_few_neighbours_say_nothing_of_a_lens() -> None:
    keypoints = np.random.default_rng(5).uniform((0.0, 0.0), (WIDTH, HEIGHT), size=(30, 2))
    bent = Residuals(keypoints_xy=keypoints, offsets_xy=np.ones((30, 2)))
    assert shared_error_ratio([bent], cell_px=WIDTH / 32) == 0.0
    assert shared_error_ratio([], cell_px=WIDTH / 32) == 0.0


# -- which of two kinds ---------------------------------------------------------------------------


def fit_of(model: str, k: float, gain: float) -> LensFit:
    """A fit of a lens with a focal length of half the width."""
    made = pycolmap.Camera(
        model=model, width=WIDTH, height=HEIGHT, params=[WIDTH / 2, WIDTH / 2, HEIGHT / 2, k]
    )
    return LensFit(camera=made, poses={}, gain=gain)


@pytest.mark.parametrize(
    ("k", "gain", "is_believed"),
    [
        (0.0, 1120.0, True),
        (0.0, 1034.0, False),  # as chance may give
        (0.4, 1120.0, False),  # a perspective in all but name
        (-0.05, 1070.0, True),
    ],
)
def test_a_fisheye_must_be_one_and_fit_clearly_better(
    k: float, gain: float, is_believed: bool
) -> None:
    fisheye_fit = fit_of("SIMPLE_RADIAL_FISHEYE", k, gain)
    perspective_fit = fit_of("SIMPLE_RADIAL", -0.1, 1000.0)
    chosen = choice([fisheye_fit, perspective_fit], kind=LensKind.PERSPECTIVE)
    assert chosen is not None
    assert chosen.fit is (fisheye_fit if is_believed else perspective_fit)


def test_few_observations_tell_lenses_apart_worse_than_many() -> None:
    for gain, is_believed in ((100.0, False), (2000.0, True)):
        fits = [
            fit_of("SIMPLE_RADIAL_FISHEYE", 0.0, 1.1 * gain),
            fit_of("SIMPLE_RADIAL", -0.1, gain),
        ]
        chosen = choice(fits, kind=LensKind.PERSPECTIVE)
        assert chosen is not None
        assert (chosen.fit is fits[0]) == is_believed


def test_what_a_fisheye_in_name_only_fits_says_nothing_against_the_present_kind() -> None:
    bent = fit_of("SIMPLE_RADIAL_FISHEYE", 0.4, 1000.0)
    assert choice([bent], kind=LensKind.PERSPECTIVE) is None
    kept = choice([bent, fit_of("SIMPLE_RADIAL", 0.0, 1000.0)], kind=LensKind.FISHEYE)
    assert kept is not None and kept.fit is bent
