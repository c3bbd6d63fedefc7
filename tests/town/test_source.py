"""The synthetic town: geometry against an independent ray caster, motion, loops and the source."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.town import renderer as town_renderer
from adapters.town.flight import PathName, fly
from adapters.town.renderer import TownRenderer
from adapters.town.source import (
    RenderedFrame,
    SyntheticTown,
    TownOptions,
    parse_town_spec,
)
from adapters.town.world import (
    GROUND_HALF_WIDTH_M,
    BoxKind,
    TownLayout,
    lay_out_town,
)
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.types import Float32Array, Float64Array, Frame, FrameId
from tests.support.painted_towns import PAINT_TEXTURES
from tests.support.received import Decoded, items_of

WIDTH, HEIGHT = 320, 240
TINY = 64
TANGENTS = (0.5 / 0.58, 0.375 / 0.58)
PATHS: tuple[PathName, ...] = ("flight", "orbit", "lawnmower", "street")

pytestmark = pytest.mark.usefixtures("towns_painted_once")


def make_town(options: TownOptions) -> SyntheticTown:
    counter = itertools.count(1)
    return SyntheticTown(options, next_frame_id=lambda: FrameId(next(counter)))


@pytest.fixture(scope="module")
def town() -> SyntheticTown:
    return make_town(TownOptions(width=WIDTH, height=HEIGHT))


@pytest.fixture(scope="module")
def tiny_town() -> SyntheticTown:
    return make_town(TownOptions(width=TINY, height=TINY, num_frames=4, fps=10.0))


@pytest.fixture(scope="module")
def tiny_renderer() -> TownRenderer:
    return TownRenderer(
        lay_out_town(0),
        seed=0,
        size=(TINY, TINY),
        intrinsics=(40.0, 40.0, TINY / 2, TINY / 2),
        noise_sigma=0.0,
    )


def centers_of(poses: Float64Array) -> Float64Array:
    return np.asarray(-np.einsum("nji,nj->ni", poses[:, :, :3], poses[:, :, 3]))


@cache
def poses_of(path: PathName, *, layout: TownLayout, num_frames: int = 300) -> Float64Array:
    return fly(path, layout, num_frames=num_frames, tangents=TANGENTS)


def pixel_centers(width: int, height: int) -> Float64Array:
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def unproject(
    points_xy: Float64Array,
    depth: Float64Array,
    *,
    cam_from_world: Float64Array,
    intrinsics: tuple[float, ...],
) -> Float64Array:
    rays = (points_xy - intrinsics[2:]) / intrinsics[:2]
    points = np.concatenate([rays, np.ones((len(rays), 1))], axis=1) * depth[:, None]
    return np.asarray((points - cam_from_world[:, 3]) @ cam_from_world[:, :3])


def project(
    points: Float64Array, *, cam_from_world: Float64Array, intrinsics: tuple[float, ...]
) -> tuple[Float64Array, Float64Array]:
    in_cam = points @ cam_from_world[:, :3].T + cam_from_world[:, 3]
    points_xy = in_cam[:, :2] / in_cam[:, 2:] * intrinsics[:2] + intrinsics[2:]
    return points_xy, in_cam[:, 2]


def cast(center: Float64Array, directions: Float64Array, bounds: Float64Array) -> Float64Array:
    """Depth of the first box or ground hit, one ray at a time, by clipping the ray to slabs."""
    depths = []
    for direction in directions:
        best = -center[2] / direction[2] if direction[2] < 0 else np.inf
        for low, high in bounds:
            to_low, to_high = (low - center) / direction, (high - center) / direction
            enter = np.minimum(to_low, to_high).max()
            leave = np.maximum(to_low, to_high).min()
            if 0 < enter <= leave:
                best = min(best, enter)
        depths.append(best)
    return np.array(depths)


def inside(points_xy: Float64Array, width: int, height: int) -> NDArray[np.bool_]:
    within = (points_xy >= 1) & (points_xy <= (width - 1, height - 1))
    return np.asarray(within.all(axis=1))


def covisible_ratio(renderer: TownRenderer, one: Float64Array, other: Float64Array) -> float:
    """The share of pixels of one view whose surface the other sees too."""
    intrinsics = (40.0, 40.0, TINY / 2, TINY / 2)
    depth_one = renderer.draw(one, index=0)[1].astype(float).ravel()
    depth_other = renderer.draw(other, index=0)[1].astype(float)
    seen = np.isfinite(depth_one)
    points = unproject(
        pixel_centers(TINY, TINY)[seen], depth_one[seen], cam_from_world=one, intrinsics=intrinsics
    )
    points_xy, depth = project(points, cam_from_world=other, intrinsics=intrinsics)
    valid = inside(points_xy, TINY, TINY) & (depth > 0)
    columns, rows = points_xy[valid].astype(int).T
    agrees = np.abs(depth_other[rows, columns] / depth[valid] - 1) < 0.05
    return float(agrees.sum() / len(depth_one))


@pytest.mark.slow
def test_depth_is_that_of_an_independent_ray_caster(town: SyntheticTown) -> None:
    rng = np.random.default_rng(0)
    for index in (0, 130, 290):
        frame = town.render(index)
        columns, rows = rng.integers(0, WIDTH, 150), rng.integers(0, HEIGHT, 150)
        points_xy = np.stack([columns + 0.5, rows + 0.5], axis=1)
        points = unproject(
            points_xy,
            np.ones(150),
            cam_from_world=frame.cam_from_world,
            intrinsics=town.intrinsics,
        )
        center = centers_of(frame.cam_from_world[None])[0]
        expected = cast(center, points - center, town.layout.bounds)
        rendered = frame.depth[rows, columns]
        hits = center + (points - center) * np.where(np.isfinite(expected), expected, 0.0)[:, None]
        in_town = np.isfinite(expected) & (np.abs(hits[:, :2]) < GROUND_HALF_WIDTH_M).all(axis=1)
        assert in_town.sum() > 80
        # A ray may pass an edge within a rounding error; more than one in a hundred does not.
        assert np.mean(np.abs(rendered[in_town] / expected[in_town] - 1) < 1e-4) > 0.99
        assert (rendered[np.isinf(expected)] > 500).all()


@pytest.mark.slow
def test_corners_of_boxes_are_drawn_where_they_project(town: SyntheticTown) -> None:
    frame = town.render(60)
    corners = np.concatenate([box.corners_in_world for box in town.layout.boxes])
    points_xy, depth = project(
        corners, cam_from_world=frame.cam_from_world, intrinsics=town.intrinsics
    )
    valid = inside(points_xy, WIDTH, HEIGHT) & (depth > 0)
    num_seen = 0
    for (x, y), corner_depth in zip(points_xy[valid], depth[valid], strict=True):
        around = frame.depth[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2]
        assert around.min() < corner_depth * 1.02
        num_seen += bool(np.abs(around / corner_depth - 1).min() < 0.003)
    assert num_seen > 0.5 * valid.sum() > 200


@pytest.mark.slow
def test_pixels_carried_by_depth_and_pose_look_the_same_in_another_frame(
    town: SyntheticTown,
) -> None:
    import cv2

    for first, second in ((20, 25), (120, 126), (270, 276)):
        one, other = town.render(first), town.render(second)
        points_xy, depth, one_xy = carried(town, one, other)
        x, y = (points_xy.astype(np.float32)[None] - np.float32(0.5)).transpose(2, 0, 1)
        depth_there = cv2.remap(other.depth, x, y, cv2.INTER_NEAREST)[0]
        visible = np.abs(depth_there / depth - 1) < 0.01
        assert visible.mean() > 0.8
        there = cv2.remap(other.pixels, x, y, cv2.INTER_LINEAR)[0].astype(float)
        here = one.pixels[one_xy[:, 1].astype(int), one_xy[:, 0].astype(int)].astype(float)
        difference = np.abs(there - here).mean(axis=1)[visible]
        # Sensor noise alone is about 2 grey levels; a shift of one pixel makes about 6.
        assert 1.0 < np.median(difference) < 4.5
        assert np.corrcoef(there[visible].mean(axis=1), here[visible].mean(axis=1))[0, 1] > 0.95


def carried(
    town: SyntheticTown, one: RenderedFrame, other: RenderedFrame
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Where the other frame sees the first one's pixels: position, depth, position in the first."""
    one_xy = pixel_centers(WIDTH, HEIGHT)[::3]
    one_depth = one.depth.astype(float).ravel()[::3]
    near = one_depth < 300
    points = unproject(
        one_xy[near],
        one_depth[near],
        cam_from_world=one.cam_from_world,
        intrinsics=town.intrinsics,
    )
    points_xy, depth = project(
        points, cam_from_world=other.cam_from_world, intrinsics=town.intrinsics
    )
    valid = inside(points_xy, WIDTH, HEIGHT) & (depth > 0)
    return points_xy[valid], depth[valid], one_xy[near][valid]


@pytest.mark.slow
def test_sift_matches_eight_frames_apart_agree_with_the_ground_truth(town: SyntheticTown) -> None:
    import cv2

    sift = cv2.SIFT.create(1500, contrastThreshold=0.01)

    def described(frame: RenderedFrame) -> tuple[Float64Array, Float32Array]:
        keypoints, descriptors = sift.detectAndCompute(
            cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2GRAY), None
        )
        keypoints_xy = np.array([keypoint.pt for keypoint in keypoints]) + 0.5
        return keypoints_xy, np.asarray(descriptors, np.float32)

    for index in (10, 35, 100, 180, 216, 240, 285):
        one, other = town.render(index), town.render(index + 8)
        (one_xy, one_descriptors), (other_xy, other_descriptors) = described(one), described(other)
        neighbours = cv2.BFMatcher().knnMatch(one_descriptors, other_descriptors, k=2)
        matches = [
            best for best, next_best in neighbours if best.distance < 0.8 * next_best.distance
        ]
        from_xy = one_xy[[match.queryIdx for match in matches]]
        to_xy = other_xy[[match.trainIdx for match in matches]]
        depth = one.depth[from_xy[:, 1].astype(int), from_xy[:, 0].astype(int)].astype(float)
        solid = np.isfinite(depth)
        points = unproject(
            from_xy[solid],
            depth[solid],
            cam_from_world=one.cam_from_world,
            intrinsics=town.intrinsics,
        )
        expected_xy, _ = project(
            points, cam_from_world=other.cam_from_world, intrinsics=town.intrinsics
        )
        is_correct = np.linalg.norm(expected_xy - to_xy[solid], axis=1) < 2.0
        assert is_correct.sum() >= 100
        assert is_correct.mean() > 0.8


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_another_town(
    tiny_town: SyntheticTown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(town_renderer, "_paint_textures", PAINT_TEXTURES)
    again = make_town(tiny_town.options)
    for index in (3, 0):  # in any order
        one, other = tiny_town.render(index), again.render(index)
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.depth, other.depth)
        assert np.array_equal(one.cam_from_world, other.cam_from_world)
    elsewhere = make_town(TownOptions(width=TINY, height=TINY, num_frames=4, fps=10.0, seed=1))
    assert elsewhere.layout != tiny_town.layout
    difference = elsewhere.render(0).pixels.astype(float) - tiny_town.render(0).pixels
    assert np.abs(difference).mean() > 10


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_town_has_many_houses_of_different_heights_and_no_two_boxes_overlap(seed: int) -> None:
    layout = lay_out_town(seed)
    houses = [box for box in layout.boxes if box.kind is BoxKind.HOUSE]
    assert len(houses) >= 30
    assert len({round(house.z_max, 3) for house in houses}) >= 25
    assert min(house.z_max for house in houses) < 8
    assert max(house.z_max for house in houses) > 14
    bounds = layout.bounds
    assert (bounds[:, 0] < bounds[:, 1]).all()
    common_low = np.maximum(bounds[:, None, 0], bounds[None, :, 0])
    common_high = np.minimum(bounds[:, None, 1], bounds[None, :, 1])
    overlaps = (common_high - common_low > 1e-9).all(axis=2)
    assert overlaps.sum() == len(bounds)  # each with itself


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_camera_keeps_clear_of_everything(path: PathName, seed: int) -> None:
    layout = lay_out_town(seed)
    centers = centers_of(poses_of(path, layout=layout))
    low, high = layout.bounds[:, 0], layout.bounds[:, 1]
    outside = np.maximum(np.maximum(low - centers[:, None], centers[:, None] - high), 0.0)
    assert np.linalg.norm(outside, axis=2).min() > 2.0
    assert centers[:, 2].min() > 2.0


@pytest.mark.parametrize("path", PATHS)
def test_motion_between_frames_is_smooth_and_never_a_pure_rotation(path: PathName) -> None:
    poses = poses_of(path, layout=lay_out_town(0))
    rotation = np.einsum("nij,nkj->nik", poses[1:, :, :3], poses[:-1, :, :3])
    traces = np.clip((np.trace(rotation, axis1=1, axis2=2) - 1) / 2, -1, 1)
    steps = np.linalg.norm(np.diff(centers_of(poses), axis=0), axis=1)
    assert np.rad2deg(np.arccos(traces)).max() < 3.5
    assert 0.3 < steps.min() <= steps.max() < 4.0
    assert np.abs(np.diff(steps) / steps[1:]).max() < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("path", "median_px"), [("flight", 8.9), ("orbit", 5.8), ("street", 8.0)])
def test_optical_flow_is_even_and_small_enough_to_follow(
    tiny_renderer: TownRenderer, path: PathName, median_px: float
) -> None:
    poses = poses_of(path, layout=lay_out_town(0))
    intrinsics = (TINY * 0.58, TINY * 0.58, TINY / 2, TINY / 2)
    points_xy = pixel_centers(TINY, TINY)
    flows = []
    for index in range(0, len(poses) - 1, 12):
        depth = tiny_renderer.draw(poses[index], index=0)[1].astype(float).ravel()
        seen = np.isfinite(depth)
        points = unproject(
            points_xy[seen], depth[seen], cam_from_world=poses[index], intrinsics=intrinsics
        )
        moved_xy, _ = project(points, cam_from_world=poses[index + 1], intrinsics=intrinsics)
        flow = np.median(np.linalg.norm(moved_xy - points_xy[seen], axis=1))
        flows.append(flow * 640 / TINY)
    assert np.median(flows) == pytest.approx(median_px, rel=0.2)
    assert max(flows) < 15
    assert min(flows) > 2


@pytest.mark.parametrize(
    ("path", "early", "late", "least"),
    [
        ("flight", 48, 206, 0.6),  # the orbit closes
        ("flight", 0, 120, 0.3),  # it sees the strips again
        ("flight", 8, 30, 0.5),  # strips overlap
        ("orbit", 0, 276, 0.7),
        ("lawnmower", 0, 299, 0.8),
        ("street", 0, 270, 0.6),
    ],
)
def test_paths_come_back_to_places_seen_before(
    tiny_renderer: TownRenderer, path: PathName, early: int, late: int, least: float
) -> None:
    poses = poses_of(path, layout=lay_out_town(0))
    assert covisible_ratio(tiny_renderer, poses[late], poses[early]) > least


def test_a_flight_leaves_the_view_it_started_with(tiny_renderer: TownRenderer) -> None:
    poses = poses_of("flight", layout=lay_out_town(0))
    assert covisible_ratio(tiny_renderer, poses[0], poses[290]) < 0.3


def test_fewer_frames_fly_the_whole_path_faster() -> None:
    layout = lay_out_town(0)
    many, few = (poses_of("orbit", layout=layout, num_frames=num) for num in (121, 41))
    assert np.allclose(many[::3], few, atol=1e-9)


def test_the_source_yields_all_frames_in_order_with_exact_calibration(
    tiny_town: SyntheticTown,
) -> None:
    async def collect() -> list[Decoded]:
        return [item async for item in items_of(tiny_town)]

    frames = [frame for frame in asyncio.run(collect()) if isinstance(frame, Frame)]
    assert (tiny_town.info.num_frames, tiny_town.info.is_live, tiny_town.info.is_sequence) == (
        4,
        False,
        True,
    )
    assert [frame.frame_id for frame in frames] == [1, 2, 3, 4]
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert [frame.name for frame in frames] == [f"{index:06d}.jpg" for index in range(4)]
    assert [frame.captured_at_s for frame in frames] == [0.0, 0.1, 0.2, 0.3]
    assert {frame.camera_key for frame in frames} == {"town"}
    assert {frame.source for frame in frames} == {tiny_town.info.label}
    assert all(np.array_equal(f.pixels, tiny_town.render(f.index).pixels) for f in frames)
    prior = frames[0].intrinsics_prior
    assert prior is not None
    assert (prior.camera_model, prior.params) == ("PINHOLE", tiny_town.intrinsics)
    assert tiny_town.intrinsics == (prior.focal_px, prior.focal_px, TINY / 2, TINY / 2)
    times, poses = zip(*tiny_town.ground_truth(), strict=True)
    assert list(times) == [frame.captured_at_s for frame in frames]
    assert np.array_equal(poses[2], tiny_town.render(2).cam_from_world)


def test_frames_drawn_from_several_threads_are_the_same(tiny_town: SyntheticTown) -> None:
    """One thread draws the frames of the source while another asks for their depths."""
    one_by_one = [tiny_town.render(index) for index in range(4)]
    other = make_town(tiny_town.options)
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(other.render, [0, 1, 2, 3] * 3))
    for index, rendered in enumerate(at_once):
        assert np.array_equal(rendered.pixels, one_by_one[index % 4].pixels)
        assert np.array_equal(rendered.depth, one_by_one[index % 4].depth)


def test_closing_the_source_early_stops_it(tiny_town: SyntheticTown) -> None:
    async def take_one() -> list[int]:
        frames = tiny_town.frames()
        taken = [(await anext(frames)).index]
        await frames.aclose()
        return taken + [frame.index async for frame in frames]

    assert asyncio.run(take_one()) == [0]


def test_a_spec_sets_every_option_and_reads_back() -> None:
    spec = "synthetic:town?seed=3&frames=120&width=320&height=200&fps=10.0&path=orbit&noise=0.5"
    options = parse_town_spec(spec)
    assert options == TownOptions(
        seed=3, num_frames=120, width=320, height=200, fps=10.0, path="orbit", noise_sigma=0.5
    )
    assert options.spec == spec
    assert parse_town_spec("synthetic:town") == TownOptions()
    assert TownOptions().spec == "synthetic:town"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("synthetic:twon", "did you mean synthetic:town"),
        ("synthetic:town?frmes=3", "unknown key: frmes; did you mean frames?"),
        ("synthetic:town?path=orbits", "did you mean orbit?"),
        ("synthetic:town?frames=many", "frames=many: expected a whole number"),
        ("synthetic:town?frames=1", "frames=1: expected 2 to"),
        ("synthetic:town?fps=nan", "fps=nan: expected"),
        ("synthetic:town?fps=fast", "fps=fast: expected a number"),
        ("synthetic:town?width=100000", "width=100000: expected 64 to 4096"),
        ("synthetic:town?seed", "seed: expected a whole number"),
        ("synthetic:town?seed=1&seed=2", "seed is given twice"),
        ("synthetic:town?seed=-1", "seed=-1: expected 0"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_in_clear_words(spec: str, words: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_town_spec(spec)
    assert words in str(caught.value)
    assert spec in str(caught.value)


@pytest.mark.slow
def test_the_configuration_takes_some_frames_of_the_flight() -> None:
    options = TownOptions(num_frames=20, width=160, height=120)
    config = SourcesConfig(every_nth_frame=3, max_frames=4)
    town = SyntheticTown(options, next_frame_id=lambda: FrameId(1), config=config)

    whole = SyntheticTown(options, next_frame_id=lambda: FrameId(1)).ground_truth()
    assert town.info.num_frames == 4
    assert [time_s for time_s, _ in town.ground_truth()] == [whole[i][0] for i in (0, 3, 6, 9)]


@pytest.mark.slow
def test_a_blank_wall_hides_some_frames_and_nothing_else() -> None:
    options = "synthetic:town?frames=6&width=64&height=64&noise=2"
    plain = make_town(parse_town_spec(options))
    walled = make_town(parse_town_spec(f"{options}&blank_from=2&blank=3"))
    for index in range(6):
        rendered, expected = walled.render(index), plain.render(index)
        np.testing.assert_array_equal(rendered.cam_from_world, expected.cam_from_world)
        if index in (2, 3, 4):
            assert not np.isfinite(rendered.depth).any()
            assert 1.5 < rendered.pixels.std() < 2.5
        else:
            np.testing.assert_array_equal(rendered.pixels, expected.pixels)
    assert walled.info.label.endswith("blank_from=2&blank=3")
