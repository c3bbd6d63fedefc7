"""The map of a run laid onto GPS: in what leaves the run, and when positions are wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.config import Config, GeoreferenceConfig, RuntimeConfig
from engine.events import Event, Georeferenced, Warned
from engine.geo.georeference import median_fix, positions_in_enu, swapped
from engine.geometry import camera_center
from engine.mapping.positions.georeferencing import Georeferencing, Placement
from engine.types import Float64Array, FrameId, GpsFix
from tests.mapping.maps.test_separate_maps import two_fields
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import (
    FakeMatcher,
    SyntheticWorld,
    grow,
    map_of_keyframes,
    round_path,
    scene_graph,
    straight_path,
)

METRES_PER_UNIT = 4.0
NUM_FRAMES = 20


class PlacedRun(MapperRun):
    """A finished map of a world whose keyframes have GPS positions."""

    def __init__(
        self,
        world: SyntheticWorld,
        *,
        shifted: Collection[int] = (),
        fix_at: Callable[[str, float], GpsFix | None] | None = None,
        seen_at: Collection[int] = (),
        as_received: Callable[[int, GpsFix], GpsFix | None] = lambda _, fix: fix,
        **settings: Any,
    ) -> None:
        """Runs to the end; after the frames ``seen_at`` a snapshot is taken."""
        self.world = world
        options: dict[str, Any] = {} if fix_at is None else {"fix_at": fix_at}
        super().__init__(
            Config(georeference=GeoreferenceConfig(**settings)),
            matcher=FakeMatcher(world=world),
            graph=scene_graph(),
            **options,
        )
        for frame_id in world.frame_ids:
            fix = true_fix(world, frame_id)
            if frame_id in shifted:
                fix = dataclasses.replace(fix, latitude_deg=fix.latitude_deg + 80.0 / 110_574.0)
            received = as_received(frame_id, fix)
            keyframe = world.keyframe(frame_id, gps=None if fix_at else received)
            problem = "it is bad" if received is None else ""
            self.add_keyframe(dataclasses.replace(keyframe, gps_problem=problem))
            if frame_id in seen_at:
                self.mapper.snapshot()
        self.end()

    @property
    def placement(self) -> Placement | None:
        """Where the map was last found to lie."""
        return self.figures.placement

    def errors_m(self, reconstruction: pycolmap.Reconstruction) -> Float64Array:
        """Distances of camera centres to where they were, both east, north, up of the origin."""
        placement = self.placement
        assert placement is not None
        ids = sorted(reconstruction.reg_image_ids())
        centers = [reconstruction.image(i).projection_center() for i in ids]
        fixes = [true_fix(self.world, i) for i in ids]
        true_m = positions_in_enu(fixes, origin=placement.georeference.origin)
        return np.asarray(np.linalg.norm(np.array(centers) - true_m, axis=1))


def the_copy(run: PlacedRun) -> tuple[pycolmap.Reconstruction, Placement | None]:
    """The copy of a run without separate maps, and where it lies."""
    snapshot = run.mapper.snapshot()
    (copy,) = snapshot.copies
    return copy.reconstruction, snapshot.placement


def true_fix(world: SyntheticWorld, frame_id: int) -> GpsFix:
    return world.gps(frame_id, metres_per_unit=METRES_PER_UNIT)


@pytest.fixture(scope="module")
def loop() -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM_FRAMES), noise_px=0.5)


@pytest.fixture(scope="module")
def placed(loop: SyntheticWorld) -> PlacedRun:
    return PlacedRun(loop)


@pytest.mark.slow
def test_copies_of_the_map_are_in_metres_east_north_up(placed: PlacedRun) -> None:
    copy, placement = the_copy(placed)
    errors_m = placed.errors_m(copy)
    assert placement is not None
    assert len(errors_m) == NUM_FRAMES
    assert 1e-4 < errors_m.max() < 0.3  # 0.5 px at 40 m height is 2.5 cm
    map_extent = np.ptp(
        [placed.sparse_map.cam_from_world(i)[:, 3] for i in placed.world.frame_ids], axis=0
    )
    assert np.linalg.norm(map_extent) > 0.0
    assert placed.figures.gps_rmse_m == placement.georeference.rmse_m


def test_the_final_trajectory_is_in_the_frame_of_the_snapshots(placed: PlacedRun) -> None:
    copy, _ = the_copy(placed)
    for pose in placed.trajectory:
        expected = copy.image(pose.frame_id).projection_center()
        assert camera_center(pose.cam_from_world) == pytest.approx(expected, abs=1e-6)


def test_the_placement_is_reported_when_it_is_first_known_or_final(placed: PlacedRun) -> None:
    last = placed.emitted(Georeferenced)[-1]
    assert (last.num_fixes, last.rejected_ids) == (NUM_FRAMES, ())
    assert 0.0 < last.rmse_m < 0.3
    assert placed.placement is not None
    record = placed.placement.as_record(with_residuals=True)
    assert record["rejected"] == []
    residuals_m = record["residuals_m"]
    assert isinstance(residuals_m, dict)
    assert len(residuals_m) == NUM_FRAMES
    offsets_m = record["offsets_enu_m"]
    assert isinstance(offsets_m, dict)
    lengths_m = [math.hypot(*offset) for offset in offsets_m.values()]
    assert lengths_m == pytest.approx(list(residuals_m.values()), abs=2e-3)
    assert not placed.emitted(Warned)


@pytest.mark.slow
def test_positions_that_cannot_be_used_are_named_beside_those_that_place_the_map(
    loop: SyntheticWorld,
) -> None:
    run = PlacedRun(loop, as_received=lambda i, fix: None if i in (3, 7) else fix)
    assert run.placement is not None
    (warning,) = run.emitted(Warned)
    names = ", ".join(loop.keyframe(FrameId(i)).name for i in (3, 7))
    assert warning.message == (
        f"2 keyframes have no GPS position that can be used, it is bad: {names}"
    )


@pytest.mark.slow
def test_shifted_positions_are_named_and_bend_nothing(loop: SyntheticWorld) -> None:
    shifted = (3, 7, 8, 13, 18)
    run = PlacedRun(loop, shifted=shifted)
    copy, placement = the_copy(run)
    assert placement is not None
    assert placement.rejected_ids == shifted
    assert run.emitted(Georeferenced)[-1].rejected_ids == shifted
    assert run.errors_m(copy).max() < 0.4
    (warning,) = run.emitted(Warned)
    assert warning.message.startswith("the GPS positions of 5 keyframes disagree with the map")
    assert all(loop.keyframe(i).name in warning.message for i in shifted)


@pytest.mark.slow
def test_without_the_wish_for_metres_maps_keep_their_frame(loop: SyntheticWorld) -> None:
    run = PlacedRun(loop, metric_map=False)
    copy, placement = the_copy(run)
    assert placement is not None
    for frame_id in loop.frame_ids:
        own = run.sparse_map.cam_from_world(frame_id)
        np.testing.assert_array_equal(copy.image(frame_id).cam_from_world().matrix(), own)


def test_it_can_be_turned_off(loop: SyntheticWorld) -> None:
    run = PlacedRun(loop, enabled=False)
    assert run.placement is None
    assert run.emitted(Georeferenced) == []


@pytest.mark.slow
def test_positions_beside_the_frames_place_the_map_too(loop: SyntheticWorld) -> None:
    def fix_at(camera_key: str, captured_at_s: float) -> GpsFix | None:
        assert camera_key == "camera"
        return true_fix(loop, round(captured_at_s / 0.1))

    run = PlacedRun(loop, fix_at=fix_at)
    copy, _ = the_copy(run)
    assert run.errors_m(copy).max() < 0.3


@pytest.mark.slow
@pytest.mark.slow
def test_positions_without_altitude_place_the_map_horizontally(loop: SyntheticWorld) -> None:
    run = PlacedRun(loop, as_received=lambda _, fix: dataclasses.replace(fix, altitude_m=None))
    assert run.placement is not None
    copy, placement = the_copy(run)
    assert placement is not None
    assert not placement.georeference.has_heights
    origin = placement.as_record()["origin"]
    assert isinstance(origin, dict)
    assert origin["altitude_m"] is None
    ids = sorted(copy.reg_image_ids())
    centers = np.array([copy.image(i).projection_center() for i in ids])
    fixes = [true_fix(loop, i) for i in ids]
    true_m = positions_in_enu(fixes, origin=placement.georeference.origin)
    assert np.abs(centers[:, :2] - true_m[:, :2]).max() < 0.5
    heights_m = centers[:, 2] - true_m[:, 2]
    assert np.ptp(heights_m) < 1.0  # but for a constant
    assert run.figures.not_georeferenced == ""


@pytest.mark.slow
@pytest.mark.parametrize("is_swapped", [False, True])
def test_the_map_decides_which_number_is_the_latitude(
    is_swapped: bool, loop: SyntheticWorld
) -> None:
    def received(_: int, fix: GpsFix) -> GpsFix:
        unsure = dataclasses.replace(fix, is_order_unsure=True)
        return swapped(unsure) if is_swapped else unsure

    run = PlacedRun(loop, as_received=received)
    assert run.placement is not None
    origin = run.placement.georeference.origin
    assert origin.latitude_deg == pytest.approx(true_fix(loop, 1).latitude_deg, abs=0.01)
    assert run.placement.georeference.rmse_m < 0.3
    copy, _ = the_copy(run)
    assert run.errors_m(copy).max() < 0.3


def test_a_map_with_too_few_positions_says_why_it_has_no_place(loop: SyntheticWorld) -> None:
    run = PlacedRun(loop, as_received=lambda frame_id, fix: fix if frame_id < 4 else None)
    assert run.placement is None
    why = "3 of its 20 keyframes have a position, 6 are needed; 17 cannot be used: it is bad"
    assert run.figures.not_georeferenced == why
    messages = [warned.message for warned in run.emitted(Warned)]
    assert messages == [f"the map is not georeferenced: {why}"]


def test_maps_that_nothing_joins_are_placed_by_the_same_origin() -> None:
    run = PlacedRun(two_fields(14, 10, noise_px=0.3), max_error_m=5.0)
    snapshot = run.mapper.snapshot()
    assert snapshot.placement is not None
    assert len(snapshot.copies) == 2
    for copy in snapshot.copies:
        assert copy.is_in_metres
        assert (
            run.errors_m(copy.reconstruction).max() < 2.0
        )  # straight paths, turned about by level cameras


def test_a_map_without_positions_stays_where_it_is() -> None:
    world = SyntheticWorld(straight_path(8))
    run = PlacedRun(world, fix_at=lambda camera_key, captured_at_s: None)
    assert run.placement is None
    assert run.figures.gps_rmse_m is None
    copy, placement = the_copy(run)
    assert placement is None
    first = run.sparse_map.cam_from_world(FrameId(1))
    np.testing.assert_array_equal(copy.image(1).cam_from_world().matrix(), first)


@pytest.mark.slow
def test_a_bent_map_is_pulled_straight_before_its_positions_are_judged() -> None:
    world = SyntheticWorld(round_path(40, radius=30.0, turns=0.5), density=1.0, noise_px=1.0)
    exact: dict[str, Any] = {"max_error_m": 0.08, "accuracy_m": 0.02, "vertical_accuracy_m": 0.02}
    assert PlacedRun(world, adjust=False, **exact).placement is None
    pulled = PlacedRun(world, **exact)
    placement = pulled.placement
    assert placement is not None
    assert placement.rejected_ids == ()
    copy, _ = the_copy(pulled)
    assert 0.005 < pulled.errors_m(copy).mean() < 0.05


@pytest.mark.slow
def test_a_frame_s_own_position_is_not_replaced_by_one_beside_it(loop: SyntheticWorld) -> None:
    def elsewhere(camera_key: str, captured_at_s: float) -> GpsFix | None:
        return GpsFix(latitude_deg=50.0, longitude_deg=9.0, altitude_m=0.0)

    run = PlacedRun(loop)
    run.mapper._georeferencing._fix_at = elsewhere
    copy, placement = the_copy(run)
    assert placement is not None
    assert run.errors_m(copy).max() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seen_at", [range(7, NUM_FRAMES + 1), [13]])
def test_when_snapshots_are_taken_changes_no_bit_of_the_map(
    loop: SyntheticWorld, placed: PlacedRun, seen_at: Collection[int]
) -> None:
    seen = PlacedRun(loop, seen_at=seen_at)
    first, again = (the_copy(run) for run in (placed, seen))
    assert first[1] is not None
    assert again[1] is not None
    assert again[1].georeference.origin == first[1].georeference.origin
    for frame_id in loop.frame_ids:
        expected = first[0].image(frame_id).cam_from_world().matrix()
        np.testing.assert_array_equal(again[0].image(frame_id).cam_from_world().matrix(), expected)


def test_the_origin_is_where_the_first_few_different_positions_were(placed: PlacedRun) -> None:
    first = [true_fix(placed.world, frame_id) for frame_id in range(1, 7)]
    assert placed.placement is not None
    assert placed.placement.georeference.origin == median_fix(first)
    assert "first_fixes" in placed.mapper._georeferencing.facts()


@pytest.mark.slow
def test_a_placement_that_moves_the_map_is_emitted_again(loop: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(loop)
    grow(sparse_map, loop, loop.frame_ids[:12])
    by_time = {loop.keyframe(i).captured_at_s: true_fix(loop, i) for i in loop.frame_ids}
    emitted: list[Georeferenced] = []
    receiver = {"north_m": 0.0}

    def fix_at(camera_key: str, captured_at_s: float) -> GpsFix:
        fix = by_time[captured_at_s]
        return dataclasses.replace(
            fix, latitude_deg=fix.latitude_deg + receiver["north_m"] / 110_574.0
        )

    def emit(event: Event) -> None:
        assert isinstance(event, Georeferenced)
        emitted.append(event)

    georeferencing = Georeferencing(
        GeoreferenceConfig(),
        final_iterations=1,
        runtime=RuntimeConfig(),
        fix_at=fix_at,
        emit=emit,
    )
    for north_m in (0.0, 0.5, 0.9, 1.8, 2.4, 2.4):
        receiver["north_m"] = north_m
        assert georeferencing.update(sparse_map) is not None
    assert len(emitted) == 2  # the first, and the one 1.8 m from it
    shifts_m = [event.enu_from_map[7] for event in emitted]
    assert shifts_m[1] - shifts_m[0] == pytest.approx(1.8, abs=0.01)
    georeferencing.update(sparse_map, is_final=True)
    assert len(emitted) == 3
