"""SIFT: where keypoints lie, what descriptors are, and which matches are made."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from adapters.matchers import byte_products, sift
from adapters.matchers.sift import SiftMatcher
from engine.config import SiftConfig
from engine.errors import InferenceError
from engine.geometry import skew, usable_at
from engine.types import (
    BoolArray,
    EpipolarGuide,
    Features,
    Float64Array,
    Frame,
    FrameId,
    ImagePair,
    MatchRequest,
    PairMatches,
    Uint8Array,
)
from tests.support.textured_images import (
    frame_of,
    random_texture,
    similarity_about,
    transformed,
)

WIDTH, HEIGHT = 320, 240
CENTER = (WIDTH / 2, HEIGHT / 2)
TEXTURE = random_texture()
NUM_COMPONENTS = 128
LEAN = {"lean_features": 8192, "min_lean_matches": 60}


def matcher(**settings: Any) -> SiftMatcher:
    return SiftMatcher(SiftConfig(**settings))


def blobs_image(
    centers_xy: Sequence[tuple[float, float]],
    *,
    sigma_px: float,
    amplitudes: Sequence[float] = (80.0,),
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Uint8Array:
    """Soft bright blobs at places in COLMAP's pixels."""
    x, y = np.arange(size[0]) + 0.5, np.arange(size[1])[:, None] + 0.5
    grey = np.full((size[1], size[0]), 100.0)
    for (center_x, center_y), amplitude in zip(
        centers_xy, np.resize(amplitudes, len(centers_xy)), strict=True
    ):
        squares = (x - center_x) ** 2 + (y - center_y) ** 2
        grey += amplitude * np.exp(-squares / (2.0 * sigma_px**2))
    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)


def texture_image(
    motion: Float64Array | None = None, *, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Uint8Array:
    still = similarity_about(CENTER)
    return TEXTURE.image(*size, image_from_texture=still if motion is None else motion)


def features_with(descriptors: Any, *, frame_id: int = 1) -> Features:
    rows = np.asarray(descriptors, dtype=np.uint8).reshape(-1, NUM_COMPONENTS)
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=np.zeros((len(rows), 2)),
        descriptors=rows,
        scales=np.ones(len(rows), np.float32),
        colors=np.zeros((len(rows), 3), np.uint8),
    )


def random_descriptors(num: int, *, seed: int = 0) -> Uint8Array:
    """Bytes (num, 128) over the whole range that descriptors have."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 128, (num, NUM_COMPONENTS)).astype(np.uint8)


def unit(component: int, *, length: int = 100) -> list[int]:
    """A descriptor with one component."""
    return [length if k == component else 0 for k in range(NUM_COMPONENTS)]


def match(first: Any, second: Any, **settings: Any) -> PairMatches:
    """Matches two sets of descriptors."""
    request = request_of(features_with(first), features_with(second, frame_id=2))
    (matches,) = matcher(**settings).match([request])
    return matches


def request_of(first: Features, second: Features) -> MatchRequest:
    return MatchRequest(
        pair=ImagePair(first.frame_id, second.frame_id),
        first=first,
        second=second,
        query_rows1=np.arange(len(first)),
        query_rows2=np.arange(len(second)),
    )


def rows_of(matches: PairMatches) -> list[tuple[int, int]]:
    return [(int(first), int(second)) for first, second in matches.matches_idx]


# -- keypoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_px", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("center", [(160.0, 120.0), (160.5, 119.5), (150.25, 110.8)])
def test_a_blob_is_found_at_its_place_in_colmaps_pixels(
    center: tuple[float, float], sigma_px: float
) -> None:
    features = matcher().describe(frame_of(blobs_image([center], sigma_px=sigma_px)))
    assert len(features) >= 1
    assert np.abs(features.keypoints_xy[0] - center).max() < 0.05
    assert 1.6 * sigma_px < features.scales[0] < 2.0 * sigma_px


@pytest.mark.parametrize(
    ("size", "working_edge_px"), [((640, 480), 320), ((480, 640), 320), ((500, 401), 333)]
)
def test_a_blob_is_found_in_pixels_of_the_original_image(
    size: tuple[int, int], working_edge_px: int
) -> None:
    for center in ((300.25, 200.5), (200.0, 250.7)):
        image = blobs_image([center], sigma_px=6.0, size=size)
        features = matcher(working_edge_px=working_edge_px).describe(frame_of(image))
        assert len(features) >= 1
        assert np.abs(features.keypoints_xy[0] - center).max() < 0.1
        assert 9.6 < features.scales[0] < 12.0


@pytest.mark.parametrize("upscaling", [1.0, 1.3, 1.6, 2.0])
def test_a_blob_is_found_at_its_place_however_far_the_image_is_upscaled(upscaling: float) -> None:
    for center in ((650.25, 310.8), (500.0, 290.7)):
        image = blobs_image([center], sigma_px=6.0, size=(1300, 600))
        features = matcher(upscaling=upscaling).describe(frame_of(image))
        assert len(features) >= 1
        assert np.abs(features.keypoints_xy[0] - center).max() < 0.1
        assert 9.6 < features.scales[0] < 12.0


def test_the_less_an_image_is_upscaled_the_fewer_and_larger_its_keypoints_are() -> None:
    large = frame_of(texture_image(size=(1300, 300)))
    found = [matcher(upscaling=ratio).describe(large) for ratio in (2.0, 1.6, 1.0)]
    assert len(found[0]) > 1.05 * len(found[2]) > 100
    smallest_px = [float(features.scales.min()) for features in found]
    assert smallest_px[0] < smallest_px[1] < smallest_px[2]


def test_a_small_image_is_doubled_in_any_case() -> None:
    small = frame_of(texture_image(size=(640, 200)))
    found = [matcher(upscaling=ratio).describe(small) for ratio in (2.0, 1.0)]
    assert len(found[0]) > 100
    assert np.array_equal(found[0].keypoints_xy, found[1].keypoints_xy)


def test_the_strongest_keypoint_comes_first() -> None:
    places = [(60.0, 60.0), (200.0, 60.0), (60.0, 180.0), (200.0, 180.0)]
    image = blobs_image(places, sigma_px=3.0, amplitudes=(40.0, 100.0, 20.0, 70.0))
    features = matcher().describe(frame_of(image))
    _, first_seen = np.unique(features.keypoints_xy.round().astype(int), axis=0, return_index=True)
    found = [tuple(features.keypoints_xy[k].round()) for k in sorted(first_seen)]
    assert found[:4] == [places[1], places[3], places[0], places[2]]


def test_only_so_many_keypoints_are_kept_and_they_are_the_strongest() -> None:
    frame = frame_of(texture_image())
    everything = matcher(max_features=5000).describe(frame)
    few = matcher(max_features=50).describe(frame)
    assert len(everything) > 200
    assert len(few) == 50
    assert np.array_equal(few.keypoints_xy, everything.keypoints_xy[:50])
    assert np.array_equal(few.descriptors, everything.descriptors[:50])


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (3, 3), (12, 20), (HEIGHT, WIDTH)])
def test_an_image_without_texture_has_no_features(shape: tuple[int, int]) -> None:
    features = matcher().describe(frame_of(np.full((*shape, 3), 200, np.uint8)))
    assert len(features) == 0
    assert features.descriptors.shape == (0, NUM_COMPONENTS)
    assert features.frame_id == 1


def test_an_image_is_as_bright_as_the_eye_sees_it() -> None:
    # Red rises where blue falls, so that the luminance of Rec. 601 stays.
    image = np.full((HEIGHT, WIDTH, 3), 128.0)
    rise = blobs_image([CENTER], sigma_px=4.0, amplitudes=[100.0])[:, :, 0] - 100.0
    image[:, :, 0] += 0.114 * 2.0 * rise
    image[:, :, 2] -= 0.299 * 2.0 * rise
    as_seen = np.rint(image).astype(np.uint8)
    assert len(matcher().describe(frame_of(as_seen))) == 0
    assert len(matcher().describe(frame_of(as_seen[:, :, ::-1]))) > 0


def test_an_image_opencv_cannot_take_is_an_inference_error() -> None:
    with pytest.raises(InferenceError, match=r"000001\.jpg"):
        matcher().describe(frame_of(np.empty((0, 0, 3), np.uint8)))


def test_what_opencv_raises_is_an_inference_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def detectAndCompute(self, *_: Any) -> None:  # noqa: N802
            raise cv2.error("out of memory")

    broken = matcher()
    monkeypatch.setattr(broken._full, "_detectors", {True: Broken()})
    with pytest.raises(InferenceError, match="out of memory"):
        broken.describe(frame_of(texture_image()))


def test_keypoints_carry_the_colour_of_their_pixel() -> None:
    image = blobs_image([(60.0, 60.0), (200.0, 150.0)], sigma_px=3.0)
    image[:, :130] //= np.array([1, 2, 4], np.uint8)
    image[:, 130:] //= np.array([4, 2, 1], np.uint8)
    for working_edge_px in (WIDTH, WIDTH // 2):
        features = matcher(working_edge_px=working_edge_px).describe(frame_of(image))
        assert len(features) >= 2
        columns, rows = features.keypoints_xy.astype(int).T
        assert np.array_equal(features.colors, image[rows, columns])
        assert len(np.unique(features.colors[:, 0] > features.colors[:, 2])) == 2


def test_descriptors_are_root_sift_in_signed_bytes() -> None:
    features = matcher().describe(frame_of(texture_image()))
    assert features.descriptors.max() <= 127
    assert features.descriptors.max() > 40
    # The root of shares that sum to one has length one: 256 bytes, but for rounding.
    lengths = np.linalg.norm(features.descriptors.astype(np.float64), axis=1)
    assert np.abs(lengths / 256.0 - 1.0).max() < 0.03


def test_a_descriptor_of_one_direction_only_is_cut_off_at_the_largest_byte() -> None:
    raw = np.zeros((2, NUM_COMPONENTS), np.float32)
    raw[0, 5] = 500.0
    bytes_ = sift._root_sift_bytes(raw)
    assert bytes_[0].tolist() == unit(5, length=127)
    assert bytes_[1].tolist() == [0] * NUM_COMPONENTS


def test_the_same_image_gives_the_same_features() -> None:
    frame = frame_of(texture_image())
    used_before = matcher()
    used_before.describe(frame_of(texture_image(similarity_about(CENTER, scale=1.3))))
    one, other = matcher().describe(frame), used_before.describe(frame)
    for name in ("keypoints_xy", "descriptors", "scales", "colors"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


# -- matching images ------------------------------------------------------------------------------


def lean_of(frame: Frame, **settings: Any) -> Features:
    """A frame as it is described after one that shows the same."""
    sift_matcher = matcher(**(LEAN | settings))
    sift_matcher.describe(frame)
    return sift_matcher.describe(frame)


def test_lean_descriptors_are_much_like_full_ones_of_the_same_keypoints() -> None:
    frame = frame_of(texture_image())
    full, lean = matcher(upscaling=2.0).describe(frame), lean_of(frame)
    for name in ("keypoints_xy", "scales", "colors"):
        assert np.array_equal(getattr(lean, name), getattr(full, name))
    products = (full.descriptors.astype(np.int64) * lean.descriptors).sum(axis=1)
    assert not np.array_equal(full.descriptors, lean.descriptors)
    assert np.median(products) > 0.9 * 256**2


def test_what_overlaps_with_the_keyframe_before_is_described_leanly_and_all_else_in_full() -> None:
    elsewhere = random_texture(1).image(WIDTH, HEIGHT, image_from_texture=similarity_about(CENTER))
    sift_matcher = matcher(lean_features=150, min_lean_matches=60)
    images = (texture_image(), texture_image(), elsewhere, elsewhere, texture_image())
    nums = [len(sift_matcher.describe(frame_of(image))) for image in images]
    full_nums = [len(matcher().describe(frame_of(image))) for image in images]
    assert min(full_nums) > 150
    assert nums == [full_nums[0], 150, full_nums[2], 150, full_nums[4]]


@pytest.mark.parametrize(("usable", "is_lean"), [(0.9, True), (0.5, False)])
def test_keyframes_of_which_a_mask_leaves_little_are_described_in_full(
    usable: float, is_lean: bool
) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[:, : round(usable * WIDTH)] = True
    frame = replace(frame_of(texture_image()), mask=mask)
    in_full = len(matcher().describe(frame))
    assert in_full > 150
    nums = len(lean_of(frame, lean_features=150, min_lean_matches=60))
    assert nums == (150 if is_lean else in_full)


def test_each_camera_has_a_keyframe_before_of_its_own() -> None:
    elsewhere = random_texture(1).image(WIDTH, HEIGHT, image_from_texture=similarity_about(CENTER))
    left, right = frame_of(texture_image()), replace(frame_of(elsewhere), camera_key="right")
    sift_matcher = matcher(lean_features=150, min_lean_matches=60)
    nums = [len(sift_matcher.describe(frame)) for frame in (left, right, left, right)]
    assert min(nums[:2]) > 150
    assert nums[2:] == [150, 150]


def test_an_image_without_texture_is_described_in_full_each_time() -> None:
    plain = frame_of(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    assert len(lean_of(plain)) == 0


@pytest.mark.parametrize("is_lean", [False, True])
@pytest.mark.parametrize(
    ("angle_rad", "scale"), [(0.0, 1.0), (0.6, 1.0), (np.pi / 2, 1.0), (-2.0, 0.75), (0.2, 1.5)]
)
def test_matches_of_a_turned_and_scaled_image_agree_with_the_truth(
    angle_rad: float, scale: float, is_lean: bool
) -> None:
    motion = similarity_about(CENTER, angle_rad=angle_rad, scale=scale, shift_xy=(3.3, -4.6))
    describe = lean_of if is_lean else matcher().describe
    first = describe(frame_of(texture_image()))
    second = describe(frame_of(texture_image(motion), frame_id=2))
    (matches,) = matcher().match([request_of(first, second)])
    rows1, rows2 = matches.matches_idx.T
    true_xy = transformed(first.keypoints_xy[rows1], motion)
    errors_px = np.linalg.norm(second.keypoints_xy[rows2] - true_xy, axis=1)

    assert len(matches) > 60
    assert (errors_px < 1.5).mean() > 0.9
    assert np.median(errors_px) < 0.3
    # Right on average, too: a shift would turn with the image.
    good = errors_px < 1.5
    offsets_xy = second.keypoints_xy[rows2[good]] - true_xy[good]
    assert np.abs(np.median(offsets_xy, axis=0)).max() < 0.06


def test_images_of_different_things_hardly_match() -> None:
    sift_matcher = matcher()
    first = sift_matcher.describe(frame_of(texture_image()))
    elsewhere = random_texture(1).image(WIDTH, HEIGHT, image_from_texture=similarity_about(CENTER))
    second = sift_matcher.describe(frame_of(elsewhere, frame_id=2))
    (matches,) = sift_matcher.match([request_of(first, second)])
    assert len(matches) < 0.05 * min(len(first), len(second))


def test_each_pair_is_answered_in_order() -> None:
    first, second, third = (
        features_with(random_descriptors(20, seed=seed), frame_id=seed + 1) for seed in range(3)
    )
    requests = [request_of(second, third), request_of(first, second), request_of(first, third)]
    answers = matcher().match(requests)
    assert [answer.pair for answer in answers] == [request.pair for request in requests]
    assert matcher().match([]) == []
    assert matcher().name == "sift"


# -- matching descriptors -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_first", "num_second"), [(0, 0), (0, 5), (5, 0), (5, 1), (0, 1)])
def test_nothing_to_compare_gives_no_matches(num_first: int, num_second: int) -> None:
    matches = match(random_descriptors(num_first), random_descriptors(num_second, seed=1))
    assert matches.matches_idx.shape == (0, 2)
    assert len(matches.confidence) == 0


def test_one_keypoint_matches_its_own_among_others() -> None:
    descriptors = random_descriptors(9)
    assert rows_of(match(descriptors[4], descriptors)) == [(0, 4)]
    assert rows_of(match(unit(3), [unit(3), unit(4)])) == [(0, 0)]


def test_descriptors_find_themselves_in_another_order() -> None:
    descriptors = random_descriptors(200)
    order = np.random.default_rng(1).permutation(200)
    matches = match(descriptors, descriptors[order])
    assert [order[second] for _, second in rows_of(matches)] == list(range(200))
    assert np.array_equal(matches.confidence, np.ones(200, np.float32))


def test_the_ratio_test_asks_for_a_clear_winner() -> None:
    target = np.array([unit(0), unit(1)])
    # 30 towards the second: squared distances 30^2 and 100^2 + 70^2.
    query = np.array([100, 30, *[0] * 126])
    ratio = np.sqrt(900.0 / 14900.0)
    (confidence,) = match(query, target, max_ratio=ratio + 0.01).confidence
    assert confidence == pytest.approx(1.0 - ratio)
    assert len(match(query, target, max_ratio=ratio - 0.01)) == 0


def test_the_same_thing_twice_is_no_winner() -> None:
    target = [unit(0), unit(0), unit(1)]
    assert len(match(unit(0), target, max_ratio=1.0)) == 0


def test_a_match_must_be_the_best_in_both_directions() -> None:
    second = [unit(0), [90, 120, *[0] * 126]]
    # The first prefers the second target, and is preferred by the first one to the second.
    first = [[127, 60, *[0] * 126], unit(0)]
    assert rows_of(match(first, second, mutual=False)) == [(1, 0)]
    assert rows_of(match(first, second, mutual=True)) == []
    assert rows_of(match(first[1:], second, mutual=True)) == [(0, 0)]


def test_a_target_is_matched_once_to_the_nearest() -> None:
    near, nearer, far = ([100, k, *[0] * 126] for k in (8, 4, 20))
    target = [unit(0), unit(5)]
    assert rows_of(match([near, nearer, far], target, mutual=False)) == [(1, 0)]
    assert rows_of(match([near, near], target, mutual=False)) == [(0, 0)]


def test_rows_are_ascending_and_unique_on_both_sides() -> None:
    rng = np.random.default_rng(2)
    second = random_descriptors(300, seed=3)
    noise = rng.integers(-30, 31, (300, NUM_COMPONENTS))
    first = np.clip(second[rng.integers(0, 300, 300)].astype(int) + noise, 0, 127)
    for mutual in (False, True):
        rows = np.array(rows_of(match(first, second, mutual=mutual)))
        assert len(rows) > 100
        assert (np.diff(rows[:, 0]) > 0).all()
        assert len(np.unique(rows[:, 1])) == len(rows)


def test_matches_are_those_of_a_plain_search() -> None:
    rng = np.random.default_rng(4)
    second = random_descriptors(250, seed=5)
    noise = rng.integers(-40, 41, (200, NUM_COMPONENTS))
    first = np.clip(second[rng.permutation(250)[:200]].astype(int) + noise, 0, 127)
    wide1, wide2 = first.astype(np.int64), second.astype(np.int64)
    products = wide1 @ wide2.T
    squares = ((wide1[:, None] - wide2[None]) ** 2).sum(axis=2)
    expected = []
    for row in range(200):
        best, runner_up = np.argsort(-products[row], kind="stable")[:2]
        is_clear = squares[row, best] < 0.8**2 * squares[row, runner_up]
        if is_clear and products[:, best].argmax() == row:
            expected.append((row, int(best)))

    assert len(expected) > 150
    assert rows_of(match(first, second, max_ratio=0.8, mutual=True)) == expected


# -- the same matches however they are computed ---------------------------------------------------


@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_working_in_blocks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    first = random_descriptors(90)
    second = np.clip(first.astype(int) + 9, 0, 127)[::-1]
    whole = match(first, second)
    monkeypatch.setattr(byte_products, "_BLOCK_PRODUCTS", 1)
    monkeypatch.setattr(byte_products, "_MIN_BLOCK_ROWS", block_rows)
    blocked = match(first, second)
    assert len(whole) > 80
    assert np.array_equal(whole.matches_idx, blocked.matches_idx)
    assert np.array_equal(whole.confidence, blocked.confidence)


def test_matches_do_not_depend_on_the_pairs_before() -> None:
    one = matcher()
    rng = np.random.default_rng(6)
    requests = []
    for num in (700, 40, 300, 700):
        first = random_descriptors(num, seed=num)
        second = np.clip(first.astype(int) + rng.integers(-40, 41, first.shape), 0, 127)
        requests.append(request_of(features_with(first), features_with(second, frame_id=2)))
    together = one.match(requests)
    for request, matches in zip(requests, together, strict=True):
        (alone,) = matcher().match([request])
        assert len(alone) > 20
        assert np.array_equal(matches.matches_idx, alone.matches_idx)
        assert np.array_equal(matches.confidence, alone.confidence)


def test_one_thread_describes_while_another_matches() -> None:
    one = matcher(max_features=300)
    frame = frame_of(texture_image())
    features = one.describe(frame)
    request = request_of(
        features_with(features.descriptors), features_with(features.descriptors, frame_id=2)
    )
    (matches,) = one.match([request])
    with ThreadPoolExecutor(2) as pool:
        described = pool.submit(lambda: [one.describe(frame) for _ in range(8)])
        matched = pool.submit(lambda: [one.match([request])[0] for _ in range(40)])
        for again in described.result():
            assert np.array_equal(again.descriptors, features.descriptors)
        for found in matched.result():
            assert np.array_equal(found.matches_idx, matches.matches_idx)


# -- masks ----------------------------------------------------------------------------------------


def half_mask(width: int = WIDTH, height: int = HEIGHT) -> BoolArray:
    """The left half is out."""
    mask = np.ones((height, width), np.bool_)
    mask[:, : width // 2] = False
    return mask


def masked_frame(pixels: Uint8Array, mask: BoolArray) -> Frame:
    return replace(frame_of(pixels), mask=mask)


def test_no_keypoint_lies_under_the_mask_and_the_others_are_as_without_it() -> None:
    pixels, mask = texture_image(), half_mask()
    whole = matcher().describe(frame_of(pixels))
    masked = matcher().describe(masked_frame(pixels, mask))
    beside = usable_at(mask, whole.keypoints_xy)
    assert 0.3 < beside.mean() < 0.7
    np.testing.assert_array_equal(masked.keypoints_xy, whole.keypoints_xy[beside])
    np.testing.assert_array_equal(masked.descriptors, whole.descriptors[beside])


def test_the_strongest_are_chosen_among_those_beside_the_mask() -> None:
    pixels, mask = texture_image(), half_mask()
    beside = matcher().describe(masked_frame(pixels, mask))
    limit = len(beside) - 5
    limited = matcher(max_features=limit).describe(masked_frame(pixels, mask))
    np.testing.assert_array_equal(limited.keypoints_xy, beside.keypoints_xy[:limit])


def test_masks_hold_to_the_pixel_where_sift_works_on_a_smaller_image() -> None:
    rng = np.random.default_rng(3)
    mask = rng.random((HEIGHT, WIDTH)) < 0.5
    masked = matcher(working_edge_px=200).describe(masked_frame(texture_image(), mask))
    assert len(masked) > 20
    assert usable_at(mask, masked.keypoints_xy).all()


def test_an_image_that_is_all_masked_has_no_keypoints() -> None:
    nothing = np.zeros((HEIGHT, WIDTH), np.bool_)
    assert len(matcher().describe(masked_frame(texture_image(), nothing))) == 0


# -- guided matching ------------------------------------------------------------------------------


def test_a_guided_search_finds_what_a_plain_one_does_near_the_geometry_and_nothing_else() -> None:
    shift_px = 20
    shift = similarity_about(CENTER, shift_xy=(shift_px, 0.0))
    first = matcher().describe(frame_of(texture_image()))
    second = matcher().describe(frame_of(texture_image(shift), frame_id=2))
    request = request_of(first, second)
    rays1, rays2 = (
        np.column_stack([(one.keypoints_xy - CENTER) / WIDTH, np.ones(len(one))])
        for one in (first, second)
    )
    max_angle_rad = 3.0 / WIDTH
    guide = EpipolarGuide(
        rays1=rays1 / np.linalg.norm(rays1, axis=1, keepdims=True),
        rays2=rays2 / np.linalg.norm(rays2, axis=1, keepdims=True),
        essential=skew(np.array([1.0, 0.0, 0.0])),  # rows match rows
        max_angle_rad=max_angle_rad,
    )
    (plain,) = matcher().match([request])
    (guided,) = matcher().match([replace(request, guide=guide)])
    is_near = np.abs(plain.points1_xy[:, 1] - plain.points2_xy[:, 1]) < 1.0
    assert is_near.sum() > 100
    expected = {row for row, near in zip(rows_of(plain), is_near, strict=True) if near}
    found = set(rows_of(guided))
    assert len(found & expected) >= 0.97 * len(expected)
    assert len({row for row, _ in found}) == len({row for _, row in found}) == len(found)


def test_a_guide_that_leads_nowhere_gives_no_matches() -> None:
    first, second = (matcher().describe(frame_of(texture_image(), frame_id=i)) for i in (1, 2))
    nowhere = np.full((len(first), 3), np.nan)
    guide = EpipolarGuide(
        rays1=nowhere, rays2=nowhere, essential=skew(np.ones(3)), max_angle_rad=0.01
    )
    (found,) = matcher().match([replace(request_of(first, second), guide=guide)])
    assert len(found) == 0
