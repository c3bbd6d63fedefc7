"""Following keypoints through images of known motion, and deciding on keyframes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.config import FrameTrackingConfig, TwoViewConfig
from engine.errors import InferenceError
from engine.tracking.frame_tracker import FrameTracker, KeyframeReason, NewKeyframe
from engine.types import Features, Float64Array, Frame, TrackedFrame, Uint8Array
from tests.support.dense_world import table_of
from tests.support.textured_images import (
    features_at,
    frame_of,
    random_texture,
    similarity_about,
    transformed,
)

WIDTH, HEIGHT = 320, 240
CENTER = (WIDTH / 2, HEIGHT / 2)
TEXTURE = random_texture()
STANDING_STILL = similarity_about(CENTER)

# Only what a test asks for makes keyframes.
PATIENT = FrameTrackingConfig(
    max_tracked_points=400,
    working_edge_px=640,
    min_tracked_points=30,
    max_flow_ratio=1.0,
    min_overlap_ratio=0.0,
    min_flow_ratio=0.01,
    max_gap_s=0.0,
)


def grid_of_points(width: int = WIDTH, height: int = HEIGHT, *, border: int = 40) -> Float64Array:
    """Points (N, 2) px all over an image, none at the centre of a pixel."""
    x, y = np.meshgrid(
        np.arange(border, width - border, 15.0), np.arange(border, height - border, 15.0)
    )
    return np.column_stack([x.ravel() + 0.13, y.ravel() + 0.77])


class Describer:
    """Finds the same points in every image that shows something; counts its calls."""

    def __init__(self, keypoints_xy: Float64Array | None = None) -> None:
        self._keypoints_xy = grid_of_points() if keypoints_xy is None else keypoints_xy
        self.num_calls = 0
        self.fails = False

    def __call__(self, frame: Frame) -> Features:
        self.num_calls += 1
        if self.fails:
            raise InferenceError("out of memory")
        has_texture = frame.pixels.std() > 1.0
        keypoints_xy = self._keypoints_xy if has_texture else np.empty((0, 2))
        return features_at(keypoints_xy, frame_id=frame.frame_id)


def tracker_with(
    config: FrameTrackingConfig = PATIENT,
    *,
    describe: Callable[[Frame], Features] | None = None,
    is_sequence: bool = True,
) -> FrameTracker:
    return FrameTracker(
        config,
        describe=describe or Describer(),
        is_sequence=is_sequence,
        two_view=TwoViewConfig(),
    )


def image(motion: Float64Array, *, width: int = WIDTH, height: int = HEIGHT) -> Uint8Array:
    return TEXTURE.image(width, height, image_from_texture=motion)


def flat_image() -> Uint8Array:
    return np.full((HEIGHT, WIDTH, 3), 90, np.uint8)


def zoom_and_shift(step: int) -> Float64Array:
    """A camera that comes a little closer and moves a little with every frame."""
    return similarity_about(CENTER, scale=1.003**step, shift_xy=(1.3 * step, -0.7 * step))


def sideways(step: int, *, px: float = 2.0) -> Float64Array:
    return similarity_about(CENTER, shift_xy=(px * step, 0.0))


def process(tracker: FrameTracker, frame: Frame) -> NewKeyframe | TrackedFrame:
    """Follows a frame and makes it a keyframe when one is due."""
    followed = tracker.follow(frame)
    keyframe = tracker.make_keyframe(frame, followed.due) if followed.due is not None else None
    result = keyframe or followed.tracked
    assert result is not None
    return result


def run(
    tracker: FrameTracker, images: Sequence[Uint8Array], *, seconds_apart: float = 1.0 / 30.0
) -> list[NewKeyframe | TrackedFrame]:
    return [
        process(tracker, frame_of(pixels, frame_id=number, captured_at_s=seconds_apart * number))
        for number, pixels in enumerate(images, start=1)
    ]


def reasons(results: Sequence[NewKeyframe | TrackedFrame]) -> list[str]:
    """Why each frame is a keyframe, '-' for the others."""
    return [result.reason.value if isinstance(result, NewKeyframe) else "-" for result in results]


def last_tracked(results: Sequence[NewKeyframe | TrackedFrame]) -> TrackedFrame:
    assert isinstance(results[-1], TrackedFrame)
    return results[-1]


# -- following ------------------------------------------------------------------------------------


def test_followed_points_agree_with_the_truth() -> None:
    results = run(tracker_with(), [image(zoom_and_shift(step)) for step in range(9)])
    keypoints_xy = grid_of_points()
    assert reasons(results) == ["first", *"-" * 8]
    for step, result in enumerate(results[1:], start=1):
        assert isinstance(result, TrackedFrame)
        true_xy = transformed(keypoints_xy[result.keypoint_idx], zoom_and_shift(step))
        errors_px = np.linalg.norm(result.points_xy - true_xy, axis=1)
        assert errors_px.max() < 0.3
        assert len(errors_px) > 0.95 * len(keypoints_xy)


def test_points_of_a_still_camera_stay_where_they_were_to_the_pixels_corner() -> None:
    tracked = last_tracked(run(tracker_with(), [image(STANDING_STILL)] * 3))
    keypoints_xy = grid_of_points()
    assert np.array_equal(tracked.keypoint_idx, np.arange(len(keypoints_xy)))
    assert np.abs(tracked.points_xy - keypoints_xy).max() < 1e-4


def test_pixels_start_at_the_corner_of_the_image() -> None:
    # An image that doubles doubles half a pixel, too.
    x, y = np.meshgrid(np.arange(8.0, 150.0, 7.0), np.arange(8.0, 110.0, 7.0))
    keypoints_xy = np.column_stack([x.ravel(), y.ravel()])
    zooms = [similarity_about((0.0, 0.0), scale=2.0 ** (step / 60)) for step in range(61)]
    tracker = tracker_with(describe=Describer(keypoints_xy))
    tracked = last_tracked(run(tracker, [image(zoom) for zoom in zooms]))
    errors_xy = tracked.points_xy - transformed(keypoints_xy[tracked.keypoint_idx], zooms[-1])
    assert len(errors_xy) > 150
    assert np.abs(np.median(errors_xy, axis=0)).max() < 0.15


@pytest.mark.parametrize(
    ("width", "height", "working_edge_px"),
    [(640, 480, 320), (480, 640, 320), (500, 333, 301)],
)
def test_points_are_in_pixels_of_the_original_image(
    width: int, height: int, working_edge_px: int
) -> None:
    config = PATIENT.model_copy(
        update={"working_edge_px": working_edge_px, "max_tracked_points": 1000}
    )
    keypoints_xy = grid_of_points(width, height, border=60)
    tracker = tracker_with(config, describe=Describer(keypoints_xy))

    def motion(step: int, *, texture_scale: float = 1.0) -> Float64Array:
        scale = texture_scale * 1.003**step
        return similarity_about((0.0, 0.0), scale=scale, shift_xy=(-1.0 * step, 0.5 * step))

    images = [
        image(motion(step, texture_scale=2.0), width=width, height=height) for step in range(5)
    ]
    tracked = last_tracked(run(tracker, images))
    errors_xy = tracked.points_xy - transformed(keypoints_xy[tracked.keypoint_idx], motion(4))
    assert len(errors_xy) > 0.95 * len(keypoints_xy)
    assert np.abs(np.median(errors_xy, axis=0)).max() < 0.05
    assert np.quantile(np.linalg.norm(errors_xy, axis=1), 0.99) < 0.3


def test_points_that_leave_the_image_are_lost_and_do_not_come_back() -> None:
    results = run(
        tracker_with(), [image(sideways(step, px=12.0)) for step in (0, 1, 2, 3, 4, 5, 4)]
    )
    numbers = [len(r.points_xy) for r in results if isinstance(r, TrackedFrame)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[4] == numbers[5]
    tracked = last_tracked(results)
    assert (tracked.points_xy[:, 0] < WIDTH).all()


def test_a_tracked_frame_names_its_keyframe_and_its_times() -> None:
    tracker = tracker_with()
    process(tracker, frame_of(image(STANDING_STILL), frame_id=5))
    tracked = process(tracker, frame_of(image(sideways(1)), frame_id=8, captured_at_s=0.25))
    assert isinstance(tracked, TrackedFrame)
    assert (tracked.frame_id, tracked.keyframe_id, tracked.index) == (8, 5, 7)
    assert (tracked.captured_at_s, tracked.received_at_s) == (0.25, 8.0)


def test_followed_points_are_spread_over_the_image_the_strongest_of_each_part() -> None:
    rng = np.random.default_rng(0)
    # The first 2000, the strongest, crowd one corner; the rest is everywhere.
    crowd_xy = rng.uniform((10.0, 10.0), (60.0, 60.0), (2000, 2))
    keypoints_xy = np.concatenate([crowd_xy, rng.uniform((5.0, 5.0), (315.0, 235.0), (1000, 2))])
    config = PATIENT.model_copy(update={"max_tracked_points": 300})
    tracker = tracker_with(config, describe=Describer(keypoints_xy))
    tracked = last_tracked(run(tracker, [image(STANDING_STILL)] * 2))

    assert 280 <= len(tracked.keypoint_idx) <= 300
    assert (np.diff(tracked.keypoint_idx) > 0).all()
    columns, rows = (4.0 * tracked.points_xy / (WIDTH, HEIGHT)).astype(int).T
    counts = np.bincount(4 * rows + columns, minlength=16)
    assert counts.min() >= 10
    in_crowd = tracked.keypoint_idx[tracked.keypoint_idx < 2000]
    assert 0 < len(in_crowd) < 60
    assert np.median(in_crowd) < 200  # the strongest of their cells


def with_free_rows(keypoints_xy: Float64Array) -> Callable[[Frame], Features]:
    """Describes frames by keypoints (N, 2) and a grid of free rows, as dense matchers do."""

    def describe(frame: Frame) -> Features:
        size = (frame.width, frame.height)
        return table_of(keypoints_xy, size=size, grid=(16, 12), frame_id=frame.frame_id)

    return describe


def test_free_rows_are_not_followed() -> None:
    keypoints_xy = grid_of_points()
    tracker = tracker_with(describe=with_free_rows(keypoints_xy))
    results = run(tracker, [image(STANDING_STILL)] * 2)
    assert isinstance(results[0], NewKeyframe)
    assert len(results[0].keyframe.features) == len(keypoints_xy) + 16 * 12
    assert last_tracked(results).keypoint_idx.tolist() == list(range(len(keypoints_xy)))


# -- keyframes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "is_sequence", "every_frame"),
    [
        ("auto", False, True),
        ("auto", True, False),
        ("photos", True, True),
        ("video", False, False),
    ],
)
def test_photos_are_all_keyframes(mode: str, is_sequence: bool, every_frame: bool) -> None:
    config = FrameTrackingConfig.model_validate(PATIENT.model_dump() | {"mode": mode})
    tracker = tracker_with(config, is_sequence=is_sequence)
    found = reasons(run(tracker, [image(sideways(step)) for step in range(3)]))
    assert found == (["photo"] * 3 if every_frame else ["first", "-", "-"])


def test_a_keyframe_carries_what_is_known_of_its_frame() -> None:
    frame = frame_of(image(STANDING_STILL), frame_id=3, camera_key="left")
    result = process(tracker_with(), frame)
    assert isinstance(result, NewKeyframe)
    keyframe = result.keyframe
    assert (keyframe.frame_id, keyframe.camera_key, keyframe.name) == (3, "left", "000003.jpg")
    assert (keyframe.width, keyframe.height, keyframe.index) == (WIDTH, HEIGHT, 2)
    assert (keyframe.captured_at_s, keyframe.received_at_s) == (0.1, 3.0)
    assert len(keyframe.features) == len(grid_of_points())


def test_parallax_makes_a_keyframe_and_is_counted_from_the_last_one() -> None:
    config = PATIENT.model_copy(update={"max_flow_ratio": 0.0275})  # 11 px of a diagonal of 400
    results = run(tracker_with(config), [image(sideways(step)) for step in range(13)])
    assert reasons(results) == ["first", *"-----", "parallax", *"-----", "parallax"]


def test_lost_overlap_makes_a_keyframe() -> None:
    config = PATIENT.model_copy(update={"min_overlap_ratio": 0.7})
    describer = Describer()
    results = run(
        tracker_with(config, describe=describer),
        [image(sideways(step, px=12.0)) for step in range(12)],
    )
    # Points start 40 px from the border and the columns leave one by one.
    first_lost = reasons(results).index("overlap")
    before = results[first_lost - 1]
    assert isinstance(before, TrackedFrame)
    assert 0.7 <= len(before.points_xy) / len(grid_of_points()) < 0.85
    assert describer.num_calls == len([r for r in results if isinstance(r, NewKeyframe)])


def test_few_points_left_make_a_keyframe_whatever_their_share() -> None:
    keypoints_xy = grid_of_points()[:40]  # the upper rows
    config = PATIENT.model_copy(update={"min_tracked_points": 30})
    images = [image(similarity_about(CENTER, shift_xy=(0.0, -12.0 * step))) for step in range(5)]
    results = run(tracker_with(config, describe=Describer(keypoints_xy)), images)
    assert "overlap" in reasons(results)


def test_time_makes_a_keyframe_of_a_moving_camera_only() -> None:
    config = PATIENT.model_copy(update={"max_gap_s": 2.0, "min_flow_ratio": 0.01})  # 4 px
    moving = [image(sideways(step)) for step in range(7)]
    found = reasons(run(tracker_with(config), moving, seconds_apart=0.75))
    assert found == ["first", "-", "-", "time", "-", "-", "time"]
    # Too slow to matter at first: the keyframe comes when the camera has moved.
    slow = [image(sideways(step, px=0.9)) for step in range(7)]
    found = reasons(run(tracker_with(config), slow, seconds_apart=0.75))
    assert found == ["first", "-", "-", "-", "-", "time", "-"]
    off = config.model_copy(update={"max_gap_s": 0.0})
    assert reasons(run(tracker_with(off), moving, seconds_apart=0.75)) == ["first", *"-" * 6]


def test_a_still_camera_never_makes_a_keyframe() -> None:
    describer = Describer()
    tracker = tracker_with(FrameTrackingConfig(), describe=describer)
    rng = np.random.default_rng(0)
    still = image(STANDING_STILL).astype(np.int64)
    noisy = [
        np.clip(still + rng.normal(scale=3.0, size=still.shape).round(), 0, 255).astype(np.uint8)
        for _ in range(20)
    ]
    assert reasons(run(tracker, noisy, seconds_apart=60.0)) == ["first", *"-" * 19]
    assert describer.num_calls == 1


def test_another_camera_or_image_size_starts_anew() -> None:
    tracker = tracker_with()
    still = image(STANDING_STILL)
    results = [
        process(tracker, frame_of(still, frame_id=1, camera_key="left")),
        process(tracker, frame_of(still, frame_id=2, camera_key="right")),
        process(tracker, frame_of(still[:-10], frame_id=3, camera_key="right")),
        process(tracker, frame_of(still[:-10], frame_id=4, camera_key="right")),
    ]
    assert reasons(results) == ["first", "camera", "camera", "-"]
    assert last_tracked(results).keyframe_id == 3


def test_another_size_starts_anew_though_flow_runs_on_images_of_one_size() -> None:
    config = PATIENT.model_copy(update={"working_edge_px": WIDTH})
    tracker = tracker_with(config)
    large = image(similarity_about((0.0, 0.0), scale=2.0), width=2 * WIDTH, height=2 * HEIGHT)
    results = run(tracker, [large, image(STANDING_STILL), image(STANDING_STILL)])
    assert reasons(results) == ["first", "camera", "-"]
    tracked = last_tracked(results)
    assert np.abs(tracked.points_xy - grid_of_points()[tracked.keypoint_idx]).max() < 1e-4


# -- images that give nothing ---------------------------------------------------------------------


def test_without_texture_there_is_one_keyframe_until_something_shows() -> None:
    describer = Describer()
    tracker = tracker_with(FrameTrackingConfig(), describe=describer)
    still = image(STANDING_STILL)
    results = run(tracker, [*[flat_image()] * 4, still, still])
    assert reasons(results) == ["first", "-", "-", "-", "overlap", "-"]
    assert [len(r.points_xy) for r in results if isinstance(r, TrackedFrame)][:3] == [0, 0, 0]


def test_free_rows_alone_make_no_keyframe_of_a_frame_without_texture() -> None:
    tracker = tracker_with(FrameTrackingConfig(), describe=with_free_rows(np.empty((0, 2))))
    assert reasons(run(tracker, [flat_image()] * 4)) == ["first", "-", "-", "-"]


def test_a_moment_without_texture_makes_no_keyframe_and_the_next_sight_one() -> None:
    tracker = tracker_with(FrameTrackingConfig())
    still = image(STANDING_STILL)
    results = run(tracker, [still, still, flat_image(), flat_image(), still, still])
    assert reasons(results) == ["first", "-", "-", "-", "overlap", "-"]
    assert last_tracked(results).keyframe_id == 5


def test_a_frame_that_cannot_be_described_is_an_error_and_the_next_one_is_not() -> None:
    config = PATIENT.model_copy(update={"max_flow_ratio": 0.01})
    describer = Describer()
    tracker = tracker_with(config, describe=describer)
    run(tracker, [image(STANDING_STILL)])
    describer.fails = True
    with pytest.raises(InferenceError):
        process(tracker, frame_of(image(sideways(3)), frame_id=2))
    describer.fails = False
    result = process(tracker, frame_of(image(sideways(4)), frame_id=3))
    assert isinstance(result, NewKeyframe)
    assert result.reason is KeyframeReason.PARALLAX


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (9, 16), (64, 64)])
def test_tiny_images_are_followed_without_a_fuss(shape: tuple[int, int]) -> None:
    height, width = shape
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    keypoints_xy = rng.uniform((0.0, 0.0), (width, height), (40, 2))
    tracker = tracker_with(PATIENT, describe=Describer(keypoints_xy))
    for result in run(tracker, [pixels] * 3)[1:]:
        points_xy = (
            result.points_xy
            if isinstance(result, TrackedFrame)
            else result.keyframe.features.keypoints_xy
        )
        assert ((points_xy >= 0.0) & (points_xy <= (width, height))).all()


def test_the_same_frames_give_the_same_bits() -> None:
    images = [image(zoom_and_shift(step)) for step in range(4)]
    one, other = (last_tracked(run(tracker_with(), images)) for _ in range(2))
    assert np.array_equal(one.points_xy, other.points_xy)
    assert np.array_equal(one.keypoint_idx, other.keypoint_idx)


# -- before a keyframe ----------------------------------------------------------------------------


def test_a_frame_that_is_due_as_a_keyframe_is_followed_before_it_is_described() -> None:
    describe = Describer()
    tracker = tracker_with(PATIENT.model_copy(update={"max_flow_ratio": 0.01}), describe=describe)
    process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
    followed = tracker.follow(frame_of(image(sideways(4)), frame_id=2))

    assert followed.due is KeyframeReason.PARALLAX
    assert followed.tracked is not None
    assert (followed.tracked.frame_id, followed.tracked.keyframe_id) == (2, 1)
    moved_xy = followed.tracked.points_xy - grid_of_points()[followed.tracked.keypoint_idx]
    assert np.median(moved_xy, axis=0) == pytest.approx([8.0, 0.0], abs=0.1)
    assert describe.num_calls == 1


def test_the_keyframe_before_is_followed_on_as_long_as_that_is_wanted() -> None:
    tracker = tracker_with(PATIENT.model_copy(update={"max_flow_ratio": 0.01}))
    process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
    process(tracker, frame_of(image(sideways(4)), frame_id=2))
    frames = [frame_of(image(sideways(4 + i, px=2.0)), frame_id=2 + i) for i in (1, 2, 3, 4)]

    for number, frame in enumerate(frames[:2], start=1):
        followed = tracker.follow(frame, wants_fallback=True)
        assert followed.tracked is not None
        assert followed.fallback is not None
        assert (followed.tracked.keyframe_id, followed.fallback.keyframe_id) == (2, 1)
        start_xy = grid_of_points()[followed.fallback.keypoint_idx]
        moved_xy = np.median(followed.fallback.points_xy - start_xy, axis=0)
        assert moved_xy == pytest.approx([8.0 + 2.0 * number, 0.0], abs=0.15)
    assert tracker.follow(frames[2], wants_fallback=False).fallback is None
    assert tracker.follow(frames[3], wants_fallback=True).fallback is None  # it lost its place


def test_a_first_frame_has_nothing_to_follow() -> None:
    followed = tracker_with().follow(frame_of(image(STANDING_STILL), frame_id=1))
    assert (followed.tracked, followed.due) == (None, KeyframeReason.FIRST)


# -- masks ----------------------------------------------------------------------------------------


def masked(frame: Frame, *, left_px: float) -> Frame:
    """A frame whose first columns are masked."""
    mask = np.ones((frame.height, frame.width), np.bool_)
    mask[:, : round(left_px)] = False
    return replace(frame, mask=mask)


@pytest.mark.parametrize("working_edge_px", [640, 200])
def test_points_that_come_under_a_mask_are_lost_and_do_not_come_back(working_edge_px: int) -> None:
    tracker = tracker_with(PATIENT.model_copy(update={"working_edge_px": working_edge_px}))
    process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
    keypoints_xy = grid_of_points()
    for frame_id, left_px in ((2, 100.0), (3, 150.0), (4, 0.0)):
        frame = frame_of(image(STANDING_STILL), frame_id=frame_id)
        tracked = process(tracker, masked(frame, left_px=left_px))
        assert isinstance(tracked, TrackedFrame)
        edge_px = max(left_px, 150.0 if frame_id == 4 else 0.0)
        assert np.array_equal(
            tracked.keypoint_idx, np.flatnonzero(np.floor(keypoints_xy[:, 0]) >= edge_px)
        )


def test_a_keyframe_keeps_its_mask_and_frames_that_share_one_share_it_in_memory() -> None:
    tracker = tracker_with(is_sequence=False)
    shared = masked(frame_of(image(STANDING_STILL)), left_px=40.0).mask
    keyframes = []
    for frame_id in (1, 2, 3):
        frame = replace(frame_of(image(STANDING_STILL), frame_id=frame_id), mask=shared)
        made = tracker.make_keyframe(frame, KeyframeReason.PHOTO)
        assert made is not None
        keyframes.append(made.keyframe)
    first = keyframes[0].mask
    assert first is not None and shared is not None
    assert np.array_equal(first.unpacked(), shared)
    assert all(keyframe.mask is first for keyframe in keyframes)


# -- overlays -------------------------------------------------------------------------------------


def turning(step: int) -> Float64Array:
    return similarity_about(CENTER, angle_rad=0.006 * step, shift_xy=(1.5 * step, -1.0 * step))


def with_patch(pixels: Uint8Array) -> Uint8Array:
    """The image with something fixed to the camera in its corner."""
    left, top, right, bottom = PATCH
    marked = pixels.copy()
    noise = np.random.default_rng(3).integers(0, 256, ((bottom - top) // 4, (right - left) // 4, 1))
    marked[top:bottom, left:right] = np.kron(noise, np.ones((4, 4, 1)))
    return marked


PATCH = (WIDTH - 84, 12, WIDTH - 12, 60)  # left, top, right, bottom


def followed_in_patch(is_marked: bool) -> list[int]:
    """How many points in the patch are followed from each keyframe."""
    config = FrameTrackingConfig(max_flow_ratio=0.03)
    tracker = tracker_with(config)
    counts: list[int] = []
    for number, step in enumerate(range(90), start=1):
        pixels = image(turning(step))
        frame = frame_of(with_patch(pixels) if is_marked else pixels, frame_id=number)
        result = process(tracker, frame)
        if isinstance(result, NewKeyframe):
            assert tracker._following is not None
            xy = tracker._following.start_xy
            inside = ((xy > PATCH[:2]) & (xy < PATCH[2:])).all(axis=1)
            counts.append(int(inside.sum()))
    return counts


def test_points_of_an_overlay_are_not_followed_once_it_is_known() -> None:
    counts = followed_in_patch(is_marked=True)
    assert len(counts) >= 8
    assert counts[0] >= 4
    assert counts[-1] <= 0.25 * counts[0]


def test_points_of_the_world_in_the_same_place_are_followed() -> None:
    counts = followed_in_patch(is_marked=False)
    assert len(counts) >= 8
    assert min(counts) == max(counts) >= 4


# -- sooner and later -----------------------------------------------------------------------------


def test_a_share_of_the_motion_makes_a_keyframe() -> None:
    diagonal_px = float(np.hypot(WIDTH, HEIGHT))
    config = PATIENT.model_copy(update={"max_flow_ratio": 8.0 / diagonal_px})
    for moved_px, share, due in (
        (3, 0.5, None),
        (5, 0.5, KeyframeReason.PARALLAX),
        (5, 1.0, None),
        (9, 1.0, KeyframeReason.PARALLAX),
        (9, 2.0, None),
    ):
        tracker = tracker_with(config)
        process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
        moved = frame_of(image(sideways(1, px=moved_px)), frame_id=2)
        assert tracker.follow(moved, motion_share=share).due is due


def test_a_share_of_the_time_makes_a_keyframe_of_a_slow_camera() -> None:
    config = PATIENT.model_copy(update={"max_gap_s": 2.0})
    for after_s, moved_px, share, due in (
        (0.9, 5, 0.5, None),
        (1.1, 5, 0.5, KeyframeReason.TIME),
        (1.1, 0, 0.5, None),  # it stands still
        (1.1, 5, 1.0, None),
    ):
        tracker = tracker_with(config)
        process(tracker, replace(frame_of(image(STANDING_STILL), frame_id=1), captured_at_s=0.0))
        moved = frame_of(image(sideways(1, px=moved_px)), frame_id=2)
        followed = tracker.follow(replace(moved, captured_at_s=after_s), motion_share=share)
        assert followed.due is due


# -- while a keyframe is described ----------------------------------------------------------------


def test_frames_are_followed_from_the_keyframe_before_while_one_is_described() -> None:
    tracker = tracker_with()
    process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
    keyframe = frame_of(image(sideways(2)), frame_id=2)
    tracker.follow(keyframe)
    begun = tracker.begin_keyframe(keyframe, KeyframeReason.PARALLAX)
    meanwhile = tracker.follow(frame_of(image(sideways(3)), frame_id=3)).tracked
    made = tracker.end_keyframe(begun, tracker.describe_keyframe(keyframe))
    after = tracker.follow(frame_of(image(sideways(4)), frame_id=4), wants_fallback=True)

    assert meanwhile is not None
    assert meanwhile.keyframe_id == 1
    assert made is not None
    assert (made.keyframe.frame_id, made.reason) == (2, KeyframeReason.PARALLAX)
    assert after.tracked is not None
    assert after.fallback is not None
    assert (after.tracked.keyframe_id, after.fallback.keyframe_id) == (2, 1)
    for tracked, steps in ((after.tracked, 2), (after.fallback, 4)):
        start_xy = grid_of_points()[tracked.keypoint_idx]
        moved = np.median(tracked.points_xy - start_xy, axis=0)
        np.testing.assert_allclose(moved, [2.0 * steps, 0.0], atol=0.1)


def test_a_keyframe_described_beside_frames_is_as_one_that_they_waited_for() -> None:
    images = [image(sideways(step)) for step in range(5)]
    results = []
    for is_beside in (False, True):
        tracker = tracker_with()
        process(tracker, frame_of(images[0], frame_id=1))
        keyframe = frame_of(images[1], frame_id=2)
        tracker.follow(keyframe)
        if is_beside:
            begun = tracker.begin_keyframe(keyframe, KeyframeReason.PARALLAX)
            tracker.follow(frame_of(images[2], frame_id=3))
            tracker.end_keyframe(begun, tracker.describe_keyframe(keyframe))
        else:
            tracker.make_keyframe(keyframe, KeyframeReason.PARALLAX)
            tracker.follow(frame_of(images[2], frame_id=3))
        tracked = tracker.follow(frame_of(images[3], frame_id=4)).tracked
        assert tracked is not None
        results.append(tracked)
    waited, beside = results
    assert np.array_equal(waited.keypoint_idx, beside.keypoint_idx)
    np.testing.assert_allclose(waited.points_xy, beside.points_xy, atol=1e-6)


def test_points_that_came_under_a_mask_while_their_keyframe_was_described_are_lost() -> None:
    tracker = tracker_with()
    process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
    keyframe = frame_of(image(STANDING_STILL), frame_id=2)
    tracker.follow(keyframe)
    begun = tracker.begin_keyframe(keyframe, KeyframeReason.TIME)
    tracker.follow(masked(frame_of(image(STANDING_STILL), frame_id=3), left_px=150.0))
    tracker.end_keyframe(begun, tracker.describe_keyframe(keyframe))
    tracked = tracker.follow(frame_of(image(STANDING_STILL), frame_id=4)).tracked
    assert tracked is not None
    assert tracked.keyframe_id == 2
    seen = np.floor(grid_of_points()[:, 0]) >= 150.0
    assert np.array_equal(tracked.keypoint_idx, np.flatnonzero(seen))


def test_a_keyframe_that_comes_after_another_camera_does_not_replace_it() -> None:
    tracker = tracker_with()
    process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
    keyframe = frame_of(image(sideways(2)), frame_id=2)
    tracker.follow(keyframe)
    begun = tracker.begin_keyframe(keyframe, KeyframeReason.PARALLAX)
    other = replace(frame_of(image(sideways(3)), frame_id=3), camera_key="other")
    tracker.make_keyframe(other, KeyframeReason.CAMERA)
    assert tracker.end_keyframe(begun, tracker.describe_keyframe(keyframe)) is not None
    later = replace(frame_of(image(sideways(4)), frame_id=4), camera_key="other")
    tracked = tracker.follow(later).tracked
    assert tracked is not None
    assert tracked.keyframe_id == 3


def test_an_earlier_keyframe_stays_the_fallback_while_the_last_one_is_mapped() -> None:
    tracker = tracker_with()
    process(tracker, frame_of(image(STANDING_STILL), frame_id=1))
    second, third = (
        frame_of(image(sideways(2)), frame_id=2),
        frame_of(image(sideways(4)), frame_id=4),
    )
    for keyframe in (second, third):
        tracker.follow(keyframe, wants_fallback=keyframe is third)
        begun = tracker.begin_keyframe(
            keyframe, KeyframeReason.PARALLAX, keeps_fallback=keyframe is third
        )
        tracker.end_keyframe(begun, tracker.describe_keyframe(keyframe))
    followed = tracker.follow(frame_of(image(sideways(5)), frame_id=5), wants_fallback=True)
    assert followed.tracked is not None
    assert followed.fallback is not None
    assert (followed.tracked.keyframe_id, followed.fallback.keyframe_id) == (4, 1)
