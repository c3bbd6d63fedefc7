"""The products that pass between the stages: what they check and that they never change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.types import (
    NO_ROW,
    Features,
    Frame,
    FrameId,
    FramePose,
    GpsFix,
    ImagePair,
    Keyframe,
    MapView,
    MatchRequest,
    PackedMask,
    PairMatches,
    PairReason,
    TrackedFrame,
    VerifiedPair,
    frozen_array,
)

ONE, TWO = FrameId(1), FrameId(2)


def frame(**changes: Any) -> Frame:
    fields: dict[str, Any] = {
        "frame_id": ONE,
        "camera_key": "camera",
        "source": "folder",
        "index": 0,
        "name": "a.jpg",
        "captured_at_s": 0.0,
        "received_at_s": 0.0,
        "pixels": np.zeros((30, 40, 3), np.uint8),
    }
    return Frame(**fields | changes)


def features(**changes: Any) -> Features:
    fields: dict[str, Any] = {
        "frame_id": ONE,
        "keypoints_xy": np.zeros((5, 2)),
        "descriptors": np.zeros((5, 128), np.uint8),
        "scales": np.ones(5, np.float32),
        "colors": np.zeros((5, 3), np.uint8),
    }
    return Features(**fields | changes)


def keyframe() -> Keyframe:
    return Keyframe(
        frame_id=ONE,
        camera_key="camera",
        index=0,
        name="a.jpg",
        width=40,
        height=30,
        captured_at_s=0.0,
        received_at_s=0.0,
        features=features(),
    )


def tracked_frame(**changes: Any) -> TrackedFrame:
    fields: dict[str, Any] = {
        "frame_id": TWO,
        "keyframe_id": ONE,
        "index": 1,
        "captured_at_s": 0.0,
        "received_at_s": 0.0,
        "keypoint_idx": np.arange(3),
        "points_xy": np.zeros((3, 2)),
    }
    return TrackedFrame(**fields | changes)


def pair_matches(**changes: Any) -> PairMatches:
    fields: dict[str, Any] = {
        "pair": ImagePair(ONE, TWO),
        "matches_idx": np.zeros((4, 2), np.int64),
        "points1_xy": np.zeros((4, 2)),
        "points2_xy": np.zeros((4, 2)),
        "confidence": np.ones(4, np.float32),
    }
    return PairMatches(**fields | changes)


def match_request(**changes: Any) -> MatchRequest:
    fields: dict[str, Any] = {
        "pair": ImagePair(ONE, TWO),
        "first": features(keypoints_xy=np.arange(10.0).reshape(5, 2)),
        "second": features(frame_id=TWO, keypoints_xy=np.arange(20.0, 30.0).reshape(5, 2)),
        "query_rows1": np.arange(5),
        "query_rows2": np.arange(3),
    }
    return MatchRequest(**fields | changes)


def verified_pair(**changes: Any) -> VerifiedPair:
    fields: dict[str, Any] = {
        "pair": ImagePair(ONE, TWO),
        "reason": PairReason.TEMPORAL,
        "inlier_matches_idx": np.zeros((4, 2), np.uint32),
        "num_matches": 6,
        "fundamental": np.eye(3),
        "homography_inlier_ratio": 0.5,
    }
    return VerifiedPair(**fields | changes)


def frame_pose(**changes: Any) -> FramePose:
    fields: dict[str, Any] = {
        "frame_id": ONE,
        "index": 0,
        "captured_at_s": 0.0,
        "cam_from_world": np.eye(4)[:3],
        "is_keyframe": True,
    }
    return FramePose(**fields | changes)


def map_view(**changes: Any) -> MapView:
    fields: dict[str, Any] = {
        "version": 1,
        "keyframe_ids": np.array([1, 2]),
        "cam_from_world": np.zeros((2, 3, 4)),
        "focal_px": np.ones(2),
        "image_sizes": np.ones((2, 2), np.int64),
        "points3D_in_world": np.zeros((7, 3), np.float32),
        "colors": np.zeros((7, 3), np.uint8),
        "chunk_ids": np.ones(7, np.int64),
        "edges": np.array([[1, 2]]),
        "edge_reasons": (PairReason.GPS,),
    }
    return MapView(**fields | changes)


PRODUCTS: list[Callable[..., Any]] = [
    frame,
    features,
    tracked_frame,
    match_request,
    pair_matches,
    verified_pair,
    frame_pose,
    map_view,
]


# -- arrays ---------------------------------------------------------------------------------------


def test_an_array_that_fits_is_not_copied_and_cannot_be_written_through() -> None:
    given = np.zeros((4, 2))
    frozen = frozen_array("points_xy", given, (None, 2), np.float64)

    assert np.shares_memory(frozen, given)
    with pytest.raises(ValueError, match="read-only"):
        frozen[0, 0] = 1.0
    given[0, 0] = 1.0  # who made the array may still use it


def test_anything_array_like_becomes_an_array_of_the_wanted_kind() -> None:
    frozen = frozen_array("colors", [[1, 2, 3]], (None, 3), np.uint8)
    assert frozen.dtype == np.uint8
    assert frozen.tolist() == [[1, 2, 3]]
    assert frozen_array("ids", [], (None,), np.int64).dtype == np.int64
    assert frozen_array("columns", np.zeros((3, 2)).T, (2, 3), np.float64).flags.c_contiguous


@pytest.mark.parametrize("shape", [(3,), (3, 3), (1, 3, 2)])
def test_a_wrong_shape_is_refused_with_the_fields_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"points_xy: shape \(.*\), expected \(None, 2\)"):
        frozen_array("points_xy", np.zeros(shape), (None, 2), np.float64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    for dtype in (np.float64, np.float32, np.int64):
        with pytest.raises(ValueError, match="scales: holds values"):
            frozen_array("scales", [1.0, value], (None,), dtype)


@pytest.mark.parametrize(
    ("value", "dtype"), [(-1, np.uint32), (256, np.uint8), (0.5, np.int64), (2**32, np.uint32)]
)
def test_whole_numbers_never_wrap_or_lose_their_fraction(value: float, dtype: type) -> None:
    with pytest.raises(ValueError, match="rows: holds values that u?int.* cannot hold"):
        frozen_array("rows", np.array([0, value]), (None,), dtype)


# -- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", PRODUCTS)
def test_the_arrays_of_a_product_are_read_only(make: Callable[..., Any]) -> None:
    product = make()
    arrays = [
        value
        for field in dataclasses.fields(product)
        if isinstance(value := getattr(product, field.name), np.ndarray)
    ]
    assert arrays
    assert not any(array.flags.writeable for array in arrays)


@pytest.mark.parametrize("make", [*PRODUCTS, keyframe])
def test_a_product_cannot_be_changed_and_is_itself_only(make: Callable[..., Any]) -> None:
    product = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(product, dataclasses.fields(product)[0].name, 3)
    assert product == product  # noqa: PLR0124
    assert product != make()  # comparing arrays would be costly and ambiguous
    assert len({product, make()}) == 2


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (frame, {"pixels": np.zeros((30, 40), np.uint8)}),
        (frame, {"pixels": np.zeros((30, 40, 4), np.uint8)}),
        (features, {"keypoints_xy": np.zeros((4, 2))}),
        (features, {"descriptors": np.zeros((4, 128), np.uint8)}),
        (features, {"scales": np.ones(6, np.float32)}),
        (features, {"colors": np.zeros((5, 4), np.uint8)}),
        (features, {"is_free": np.zeros(4, bool)}),
        (match_request, {"query_rows1": np.zeros((3, 2), np.int64)}),
        (match_request, {"query_rows2": np.array([0.5])}),
        (tracked_frame, {"points_xy": np.zeros((2, 2))}),
        (pair_matches, {"confidence": np.ones(3, np.float32)}),
        (pair_matches, {"matches_idx": np.zeros((4, 3), np.int64)}),
        (pair_matches, {"points1_xy": np.zeros((3, 2))}),
        (pair_matches, {"points2_xy": np.full((4, 2), np.nan)}),
        (pair_matches, {"depths_m": np.zeros((4, 1), np.float32)}),
        (pair_matches, {"depths_m": np.full((4, 2), np.inf)}),
        (verified_pair, {"fundamental": np.full((3, 3), np.nan)}),
        (verified_pair, {"inlier_matches_idx": np.zeros((4, 3), np.uint32)}),
        (frame_pose, {"cam_from_world": np.eye(4)}),
        (map_view, {"focal_px": np.ones(3)}),
        (map_view, {"cam_from_world": np.zeros((2, 4, 4))}),
        (map_view, {"colors": np.zeros((6, 3), np.uint8)}),
        (map_view, {"chunk_ids": np.ones(8, np.int64)}),
        (map_view, {"edge_reasons": ()}),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    make: Callable[..., Any], changes: dict[str, Any]
) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match="shape|holds values"):
        make(**changes)
    assert getattr(make(), name) is not None  # without the change it is made


def test_products_have_their_sizes() -> None:
    assert (frame().width, frame().height) == (40, 30)
    assert len(features()) == 5
    assert len(pair_matches()) == 4
    assert verified_pair().num_inliers == 4


def test_products_may_be_empty() -> None:
    nothing = features(
        keypoints_xy=np.empty((0, 2)),
        descriptors=np.empty((0, 128)),
        scales=np.empty(0),
        colors=np.empty((0, 3)),
    )
    assert len(nothing) == 0
    assert nothing.fixed_rows.tolist() == []
    empty = np.empty((0, 2))
    no_matches = {"matches_idx": empty, "points1_xy": empty, "points2_xy": empty}
    assert len(pair_matches(**no_matches, confidence=np.empty(0))) == 0
    assert len(tracked_frame(keypoint_idx=[], points_xy=np.empty((0, 2))).points_xy) == 0


# -- keypoints and matches ------------------------------------------------------------------------


def test_keypoints_are_fixed_unless_they_are_said_to_be_free() -> None:
    assert features().is_free.tolist() == [False] * 5
    assert features().fixed_rows.tolist() == [0, 1, 2, 3, 4]
    some_free = features(is_free=np.array([False, True, True, False, True]))
    assert some_free.fixed_rows.tolist() == [0, 3]
    assert features(is_free=np.ones(5, bool)).fixed_rows.tolist() == []


@pytest.mark.parametrize("rows", [[-2, 0], [3, -7]])
def test_a_match_ends_at_keypoints_or_beside_them(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="rows below -1"):
        pair_matches(matches_idx=np.array([[0, 0], rows, [1, NO_ROW], [NO_ROW, 2]]))
    beside = [[0, 0], [NO_ROW, NO_ROW], [1, NO_ROW], [NO_ROW, 2]]
    assert len(pair_matches(matches_idx=np.array(beside))) == 4


def test_depths_that_are_not_given_are_unknown() -> None:
    assert pair_matches().depths_m.tolist() == [[0.0, 0.0]] * 4
    assert pair_matches().focal_px == (0.0, 0.0)


def test_matches_of_rows_end_at_their_keypoints() -> None:
    request = match_request()
    rows = np.array([[0, 4], [3, 1]], np.uint32)
    matches = PairMatches.of_rows(request, matches_idx=rows, confidence=np.ones(2, np.float32))
    assert matches.pair == request.pair
    assert matches.matches_idx.tolist() == rows.tolist()
    assert np.array_equal(matches.points1_xy, request.first.keypoints_xy[[0, 3]])
    assert np.array_equal(matches.points2_xy, request.second.keypoints_xy[[4, 1]])


def test_some_of_the_matches_keep_everything_that_belongs_to_them() -> None:
    matches = pair_matches(
        matches_idx=np.arange(8).reshape(4, 2),
        points1_xy=np.arange(8.0).reshape(4, 2),
        points2_xy=np.arange(8.0).reshape(4, 2) + 100.0,
        confidence=np.arange(4) / 4,
        depths_m=np.arange(8.0).reshape(4, 2) + 200.0,
        focal_px=(700.0, 800.0),
    )
    by_rows, by_mask = matches.take(np.array([3, 1])), matches.take(np.array([0, 1, 0, 1], bool))
    assert by_rows.matches_idx.tolist() == [[6, 7], [2, 3]]
    assert by_mask.matches_idx.tolist() == [[2, 3], [6, 7]]
    for taken in (by_rows, by_mask):
        firsts = taken.matches_idx[:, 0]
        assert np.array_equal(taken.points1_xy[:, 0], firsts)
        assert np.array_equal(taken.points2_xy[:, 0], firsts + 100)
        assert np.array_equal(taken.depths_m[:, 0], firsts + 200)
        assert np.array_equal(taken.confidence, firsts / 8)
        assert (taken.pair, taken.focal_px) == (matches.pair, (700.0, 800.0))


# -- pairs ----------------------------------------------------------------------------------------


def test_a_pair_is_ordered_and_never_a_loop() -> None:
    assert ImagePair.of(TWO, ONE) == ImagePair.of(ONE, TWO) == ImagePair(ONE, TWO)
    assert (ImagePair(ONE, TWO).other(ONE), ImagePair(ONE, TWO).other(TWO)) == (TWO, ONE)
    for first, second in ((TWO, ONE), (ONE, ONE)):
        with pytest.raises(ValueError, match="ordered and never a loop"):
            ImagePair(first, second)


def test_pairs_sort_by_their_first_then_their_second_keyframe() -> None:
    pairs = [ImagePair(FrameId(a), FrameId(b)) for a, b in ((2, 3), (1, 9), (1, 2))]
    assert [(pair.first, pair.second) for pair in sorted(pairs)] == [(1, 2), (1, 9), (2, 3)]


def test_fixes_are_values() -> None:
    here = GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=3.0)
    assert here == GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=3.0)
    assert hash(here) == hash(dataclasses.replace(here))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (7, 640)])
def test_a_packed_mask_is_the_same_when_unpacked(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size)
    mask = rng.random(size) < 0.5
    packed = PackedMask.of(mask)
    assert (packed.height, packed.width) == size
    assert np.array_equal(packed.unpacked(), mask)
    assert packed.num_usable() == mask.sum()


def test_a_mask_of_blobs_takes_little_memory() -> None:
    mask = np.ones((3000, 4000), np.bool_)
    mask[400:900, 1000:3000] = False
    assert len(PackedMask.of(mask).data) < mask.size / 500


def test_a_frames_mask_has_the_size_of_its_pixels() -> None:
    frame = dict(
        frame_id=FrameId(1),
        camera_key="c",
        source="s",
        index=0,
        name="a.jpg",
        captured_at_s=0.0,
        received_at_s=0.0,
        pixels=np.zeros((4, 6, 3), np.uint8),
    )
    made = Frame(**frame, mask=np.ones((4, 6), np.bool_))  # type: ignore[arg-type]
    assert made.mask is not None and not made.mask.flags.writeable
    with pytest.raises(ValueError, match="mask"):
        Frame(**frame, mask=np.ones((6, 4), np.bool_))  # type: ignore[arg-type]
