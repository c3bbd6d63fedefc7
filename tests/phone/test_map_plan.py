"""The map from above, and how it gets from the views thread to the phones."""

from __future__ import annotations

import asyncio
import base64
import json
import threading

import numpy as np
import pytest

from adapters.phone.feedback import DecodedPicture
from adapters.phone.feedback_view import FeedbackChannel, FeedbackView
from adapters.phone.map_plan import draw_plan, plan_axes
from engine.dense_types import DenseChunk, DenseCloud, GroundPicture
from engine.events import FramePosed, FrameReceived, KeyframeAdded, MainMapChanged, RunStarted
from engine.geometry import rotation_from_vector
from engine.types import Float64Array, FrameId, MapView
from tests.support.waiting import HANG_S

UP = np.array([0.0, 0.0, 1.0])


def pose(center: Float64Array, *, heading_rad: float, pitch_rad: float = 0.0) -> Float64Array:
    """A camera over a world with z up; 0 heads along y, pitch > 0 looks down."""
    ahead = np.array([-np.sin(heading_rad), np.cos(heading_rad), 0.0])
    forward = np.cos(pitch_rad) * ahead - np.sin(pitch_rad) * UP
    right = np.cross(ahead, UP)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.column_stack([rotation, -rotation @ center])


def walk(num: int = 40, *, pitch_rad: float = 0.4, bend: float = 1.5) -> Float64Array:
    """Cameras on a bent path at about eye level; (num, 3, 4)."""
    angles = np.linspace(0.0, bend, num)
    heights = 1.6 + 0.02 * np.sin(7.0 * angles)
    centers = np.stack([10.0 * np.cos(angles), 10.0 * np.sin(angles), heights], axis=1)
    return np.stack(
        [
            pose(center, heading_rad=angle, pitch_rad=pitch_rad)
            for center, angle in zip(centers, angles, strict=True)
        ]
    )


def map_view(
    cam_from_world: Float64Array, points: Float64Array | None = None, *, version: int = 1
) -> MapView:
    points = np.zeros((0, 3)) if points is None else points
    num = len(cam_from_world)
    return MapView(
        version=version,
        keyframe_ids=np.arange(1, num + 1),
        cam_from_world=cam_from_world,
        focal_px=np.full(num, 500.0),
        image_sizes=np.tile([640, 480], (num, 1)),
        points3D_in_world=points.astype(np.float32),
        colors=np.tile(np.array([200, 100, 50], np.uint8), (len(points), 1)),
        chunk_ids=np.ones(len(points), np.int64),
        edges=np.zeros((0, 2), np.int64),
        edge_reasons=(),
    )


def scattered(num: int = 3000, *, extent: float = 15.0) -> Float64Array:
    return np.random.default_rng(0).uniform(-extent, extent, (num, 3)) * [1.0, 1.0, 0.1]


def up_of(axes: Float64Array) -> Float64Array:
    return np.cross(axes[0], -axes[1])


# -- axes -----------------------------------------------------------------------------------------


def test_the_first_camera_heads_to_the_upper_edge() -> None:
    axes = plan_axes(walk(), up_in_world=(0.0, 0.0, 1.0))
    assert axes == pytest.approx(np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]), abs=1e-9)


@pytest.mark.parametrize("pitch_rad", [0.0, 0.7, 1.2, np.pi / 2])
def test_a_camera_that_looks_down_heads_where_its_picture_s_top_is(pitch_rad: float) -> None:
    axes = plan_axes(walk(pitch_rad=pitch_rad), up_in_world=(0.0, 0.0, 1.0))
    assert axes[1] == pytest.approx([0.0, -1.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("pitch_rad", [0.0, 0.5, 1.0])
def test_a_level_path_tells_which_way_is_up_however_cameras_are_pitched(pitch_rad: float) -> None:
    axes = plan_axes(walk(pitch_rad=pitch_rad), up_in_world=None)
    assert up_of(axes) @ UP > np.cos(np.deg2rad(3.0))


def test_a_straight_path_is_taken_as_level() -> None:
    cameras = np.stack(
        [pose(np.array([0.0, y, 1.5]), heading_rad=0.0, pitch_rad=0.5) for y in range(20)]
    )
    assert up_of(plan_axes(cameras, up_in_world=None)) @ UP > np.cos(np.deg2rad(3.0))


def test_a_path_up_a_wall_does_not_lay_the_wall_down() -> None:
    angles = np.linspace(0.0, 6.0, 30)
    centers = np.stack([3.0 * np.cos(angles), np.zeros(30), 3.0 * np.sin(angles)], axis=1)
    cameras = np.stack([pose(center, heading_rad=0.0) for center in centers])
    assert up_of(plan_axes(cameras, up_in_world=None)) @ UP > 0.9


def test_two_cameras_at_one_place_are_enough_for_axes() -> None:
    cameras = np.stack([pose(np.zeros(3), heading_rad=0.0)] * 2)
    axes = plan_axes(cameras, up_in_world=None)
    assert axes @ axes.T == pytest.approx(np.eye(2), abs=1e-9)


# -- picture --------------------------------------------------------------------------------------


def test_an_empty_map_has_no_plan() -> None:
    assert draw_plan(map_view(walk()[:0]), up_in_world=None) is None


def test_the_path_lies_inside_the_picture_and_like_in_the_world() -> None:
    plan = draw_plan(map_view(walk(), scattered()), up_in_world=(0.0, 0.0, 1.0))
    assert plan is not None
    height, width = plan.cells.shape[:2]
    assert max(height, width) <= 60
    assert (plan.path_xy > 0).all()
    assert (plan.path_xy < (width, height)).all()
    start, end = plan.place((10.0, 0.0, 1.6)), plan.place((0.7, 9.97, 1.6))
    assert start == pytest.approx(tuple(plan.path_xy[0]), abs=0.01)
    assert end[0] < start[0], "the walk bends to the left"
    assert end[1] < start[1], "and goes ahead, which is up"
    assert plan.direction((0.0, 5.0, 3.0)) == pytest.approx((0.0, -1.0))
    assert plan.direction((0.0, 0.0, 1.0)) == (0.0, -1.0)


def test_cells_with_points_have_their_colour_and_others_are_clear() -> None:
    cluster = np.array([[5.0, 5.0, 0.0]]) + 0.01 * scattered(50)
    plan = draw_plan(map_view(walk(), cluster), up_in_world=(0.0, 0.0, 1.0))
    assert plan is not None
    column, row = np.floor(plan.place((5.0, 5.0, 0.0))).astype(int)
    assert plan.cells[row, column, :3].tolist() == [200, 100, 50]
    assert plan.cells[row, column, 3] > 200
    assert (plan.cells[:, :, 3] == 0).mean() > 0.8


def test_dense_points_fill_cells_with_their_colours() -> None:
    cluster = np.array([[5.0, 5.0, 0.0]]) + 0.5 * scattered(500, extent=1.0)
    chunk = DenseChunk(
        frame_id=FrameId(1),
        version=1,
        xyz_in_cam=cluster.astype(np.float32),
        colors=np.tile(np.array([10, 20, 250], np.uint8), (500, 1)),
    )
    dense = DenseCloud(chunks=(chunk,), world_from_chunk=np.eye(4)[None, :3])
    without = draw_plan(map_view(walk()), up_in_world=(0.0, 0.0, 1.0))
    plan = draw_plan(map_view(walk()), up_in_world=(0.0, 0.0, 1.0), dense=dense)
    assert without is not None
    assert not without.cells.any()
    assert plan is not None
    column, row = np.floor(plan.place((5.0, 5.0, 0.0))).astype(int)
    assert plan.cells[row, column].tolist() == [10, 20, 250, 245]
    assert (plan.cells[:, :, 3] == 0).mean() > 0.8


def test_what_is_still_to_be_filmed_is_red_and_places_beyond_the_plan_are_left_out() -> None:
    holes = np.array([[5.0, 5.0, 0.0], [5.5, 5.0, 0.0], [900.0, 5.0, 0.0]], np.float32)
    plan = draw_plan(map_view(walk()), up_in_world=(0.0, 0.0, 1.0), holes_in_world=holes)
    assert plan is not None
    column, row = np.floor(plan.place((5.0, 5.0, 0.0))).astype(int)
    assert plan.cells[row, column].tolist() == [232, 72, 60, 255]
    assert 1 <= (plan.cells[:, :, 3] > 0).sum() <= 2


def test_far_points_do_not_shrink_the_plan() -> None:
    near = scattered()
    far = np.concatenate([near, [[1e6, -1e6, 0.0], [-1e7, 1e3, 5.0]]])
    plan, with_far = (
        draw_plan(map_view(walk(), points), up_in_world=(0.0, 0.0, 1.0)) for points in (near, far)
    )
    assert plan is not None
    assert with_far is not None
    assert with_far.path_xy == pytest.approx(plan.path_xy, rel=0.05)


def test_a_single_place_has_a_plan() -> None:
    plan = draw_plan(map_view(walk()[:1]), up_in_world=None)
    assert plan is not None
    assert np.isfinite(plan.path_xy).all()


def test_a_turned_world_gives_the_same_plan() -> None:
    rotation = rotation_from_vector(np.array([0.4, -1.1, 0.7]))
    cameras, points = walk(), scattered()
    turned = cameras.copy()
    turned[:, :, :3] = cameras[:, :, :3] @ rotation.T
    plan = draw_plan(map_view(cameras, points), up_in_world=None)
    other = draw_plan(map_view(turned, points @ rotation.T), up_in_world=None)
    assert plan is not None
    assert other is not None
    assert other.path_xy == pytest.approx(plan.path_xy, abs=1e-2)


# -- the channel ----------------------------------------------------------------------------------


def test_what_the_views_thread_tells_reaches_the_loop_and_nobody_waits() -> None:
    channel = FeedbackChannel()
    view = FeedbackView(channel)

    def tell() -> None:
        view.show_event(RunStarted(at_s=0.0, sources=("phone",), matcher="sift"))
        view.show_map(map_view(walk(), scattered()))
        view.show_map(map_view(walk()[:0]))
        view.close()

    async def run() -> None:
        changed = asyncio.Event()
        tell()  # before anybody listens
        channel.open(changed.set)
        assert changed.is_set()
        assert channel.plan_version == 1
        changed.clear()
        thread = threading.Thread(target=tell)
        thread.start()
        async with asyncio.timeout(HANG_S):
            while channel.plan_version < 2:
                changed.clear()
                await changed.wait()
        thread.join()
        channel.close()

    asyncio.run(run())
    tell()  # the loop is gone
    assert channel.plan_version == 2


def test_a_closed_loop_is_no_error() -> None:
    channel = FeedbackChannel()

    async def open_only() -> None:
        channel.open(lambda: None)

    asyncio.run(open_only())
    channel.put(RunStarted(at_s=0.0, sources=("phone",), matcher="sift"))


def test_states_and_plans_are_json_and_speak_of_the_same_places() -> None:
    channel = FeedbackChannel()
    cameras = walk()

    async def run() -> None:
        channel.open(lambda: None)
        picture = DecodedPicture(
            index=0, phone=2, frame_id=FrameId(3), blur=None, up_in_camera=None
        )
        channel.feedback.add_decoded(picture)
        center = (-cameras[2, :, :3].T @ cameras[2, :, 3]).tolist()
        for event in (
            FrameReceived(at_s=1.0, frame_id=FrameId(3), index=0, captured_at_s=1.0),
            KeyframeAdded(
                camera_key="camera",
                at_s=1.0,
                frame_id=FrameId(3),
                index=0,
                is_photo=False,
                name="k",
                captured_at_s=1.0,
                num_keypoints=9,
            ),
            FramePosed(
                camera_key="camera",
                at_s=1.1,
                frame_id=FrameId(3),
                captured_at_s=1.0,
                cam_center_in_world=tuple(center),
                world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
                is_keyframe=True,
                is_first=True,
                latency_s=0.1,
            ),
        ):
            channel.put(event)
        assert channel.state_record(2)["here"] is None, "there is no plan yet"
        await asyncio.sleep(0)
        FeedbackView(channel).show_map(map_view(cameras, scattered()))
        await asyncio.sleep(0)

    asyncio.run(run())
    state = json.loads(json.dumps(channel.state_record(2)))
    plan = json.loads(json.dumps(channel.plan_record(known_version=0)))
    assert state["plan"] == plan["version"] == 1
    own = next(path for path in plan["paths"] if path["phone"] == 2)
    assert own["places"] == [pytest.approx(state["here"], abs=0.02)]
    assert np.hypot(*state["heading"]) == pytest.approx(1.0, abs=0.02)
    assert len(base64.b64decode(plan["cells"])) == plan["width"] * plan["height"] * 4
    assert channel.plan_record(known_version=1) is None


def test_holes_of_a_former_world_are_not_drawn_into_a_new_one() -> None:
    channel = FeedbackChannel()
    view = FeedbackView(channel)
    holes = GroundPicture(
        vertices_in_world=np.zeros((0, 0, 3), np.float32),
        texture=np.zeros((1, 1, 4), np.uint8),
        u_in_texture=np.zeros(0),
        v_in_texture=np.zeros(0),
        holes_in_world=walk()[:1, :, 3].astype(np.float32),
        thin_in_world=np.zeros((0, 3), np.float32),
        coverage="",
    )
    changed = MainMapChanged(
        at_s=1.0, former_map_number=1, num_registered=20, num_registered_in_former=10
    )

    async def run() -> list[object]:
        channel.open(lambda: None)
        cells = []
        view.show_map(map_view(walk(), scattered()))
        cells.append(await newest_cells())
        view.show_ground(holes)
        cells.append(await newest_cells())
        view.show_event(changed)
        view.show_map(map_view(walk(), scattered()))
        return [*cells, await newest_cells()]

    async def newest_cells() -> object:
        await asyncio.sleep(0)
        record = channel.plan_record(known_version=0)
        assert record is not None
        return record["cells"]

    without, with_holes, in_new_world = asyncio.run(run())
    assert with_holes != without
    assert in_new_world == without


def test_long_paths_are_thinned_and_keep_their_end() -> None:
    channel = FeedbackChannel()
    cameras = walk(2301)

    async def run() -> None:
        channel.open(lambda: None)
        FeedbackView(channel).show_map(map_view(cameras))
        await asyncio.sleep(0)

    asyncio.run(run())
    record = channel.plan_record(known_version=0)
    assert record is not None
    places = record["paths"][0]["places"]
    assert len(places) <= 501
    plan = draw_plan(map_view(cameras), up_in_world=None)
    assert plan is not None
    assert places[-1] == pytest.approx(plan.path_xy[-1], abs=0.01)
