"""From what a network says of pairs to matches: rows, px, depths and focal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.images import PATCH_PX, PixelMapping, prepare_image
from adapters.matchers.mast3r.pair_matches import (
    DecodedPairs,
    ImageFrame,
    Views,
    match_pairs,
    no_matches,
)
from engine.config import Mast3rConfig
from engine.types import (
    NO_ROW,
    Float64Array,
    FrameId,
    ImagePair,
    MatchRequest,
    PairMatches,
)
from tests.support.textured_images import features_at

Size = tuple[int, int]  # width and height in px
WIDTH, HEIGHT = 64, 48  # of network images
ORIGINAL_SIZE = (128, 98)  # 2 px to a px of the network, and its last two lines are cut off
SHIFT = (5, 3)  # whole network px
# Between pixels whose descriptors have nothing in common, sub-pixels are noise.
NOISY: dict[str, Any] = {"reciprocal_tolerance_px": 2.0}


def image_of(size: Size = ORIGINAL_SIZE) -> ImageFrame:
    """How an image of that size is shown to the network."""
    prepared = prepare_image(np.zeros((size[1], size[0], 3), np.uint8), edge_px=WIDTH)
    assert (prepared.width, prepared.height) == (WIDTH, HEIGHT)
    return ImageFrame(
        mapping=prepared.mapping,
        grid=(HEIGHT // PATCH_PX, WIDTH // PATCH_PX),
        original_size=size,
    )


def view(
    shift_xy: tuple[int, int] = (0, 0),
    *,
    confidence: float = 1.0,
    points3D: Float64Array | None = None,
    seed: int = 0,
) -> ViewOutput:
    """Every pixel has a descriptor of its own; shifts go around the edges."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn((1, HEIGHT, WIDTH, 24), generator=generator)
    maps = torch.nn.functional.normalize(maps, dim=3).roll(shift_xy[::-1], dims=(1, 2))
    ones = torch.ones((1, HEIGHT, WIDTH))
    return ViewOutput(
        descriptors=maps,
        descriptor_confidence=confidence * ones,
        points3D=None if points3D is None else torch.from_numpy(points3D).float()[None],
        confidence=None if points3D is None else ones,
    )


def joined(views: Sequence[ViewOutput]) -> ViewOutput:
    """Views of several images as a batch."""
    return ViewOutput(
        descriptors=torch.cat([each.descriptors for each in views]),
        descriptor_confidence=torch.cat([each.descriptor_confidence for each in views]),
        points3D=None,
        confidence=None,
    )


def request(
    keypoints1_xy: Float64Array, keypoints2_xy: Float64Array, **changes: Any
) -> MatchRequest:
    given: dict[str, Any] = {
        "pair": ImagePair(FrameId(1), FrameId(2)),
        "first": features_at(keypoints1_xy, frame_id=1),
        "second": features_at(keypoints2_xy, frame_id=2),
        "query_rows1": np.arange(len(keypoints1_xy)),
        "query_rows2": np.arange(len(keypoints2_xy)),
        **changes,
    }
    return MatchRequest(**given)


def keypoints(num: int = 30, *, seed: int = 0, size: Size = ORIGINAL_SIZE) -> Float64Array:
    """Centres of network px, and so of sharp descriptors, in px of the original."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation((WIDTH - 20) * (HEIGHT - 20))[:num]
    whole_xy = np.column_stack([chosen % (WIDTH - 20), chosen // (WIDTH - 20)]) + 10
    return image_of(size).mapping.to_original(whole_xy + 0.5)


def matched(
    asked: MatchRequest,
    first_leads: Views,
    second_leads: Views | None = None,
    *,
    is_metric: bool = False,
    sizes: tuple[Size, Size] = (ORIGINAL_SIZE, ORIGINAL_SIZE),
    **settings: Any,
) -> PairMatches:
    decoded = DecodedPairs(
        images1=[image_of(sizes[0])],
        images2=[image_of(sizes[1])],
        first_leads=first_leads,
        second_leads=second_leads,
        is_metric=is_metric,
    )
    (matches,) = match_pairs([asked], decoded, config=Mast3rConfig(**{**NOISY, **settings}))
    return matches


# -- ends -----------------------------------------------------------------------------------------


def test_queries_of_both_images_are_found_in_the_other_one() -> None:
    asked = request(keypoints(30), keypoints(20, seed=1))
    matches = matched(asked, (view(), view(SHIFT)))
    expected = [[row, NO_ROW] for row in range(30)] + [[NO_ROW, row] for row in range(20)]
    assert matches.matches_idx.tolist() == expected
    assert matches.pair == asked.pair
    moved_px = matches.points2_xy - matches.points1_xy
    np.testing.assert_allclose(np.median(moved_px, axis=0), 2.0 * np.array(SHIFT), atol=0.15)
    np.testing.assert_allclose(moved_px - 2.0 * np.array(SHIFT), 0.0, atol=1.0)
    np.testing.assert_array_equal(matches.points1_xy[:30], asked.first.keypoints_xy)
    np.testing.assert_array_equal(matches.points2_xy[30:], asked.second.keypoints_xy)


def test_only_the_rows_asked_for_are_looked_up() -> None:
    rows1, rows2 = np.array([3, 17, 29]), np.array([0, 8])
    asked = request(keypoints(30), keypoints(20, seed=1), query_rows1=rows1, query_rows2=rows2)
    matches = matched(asked, (view(), view(SHIFT)))
    assert matches.matches_idx.tolist() == [
        [3, NO_ROW],
        [17, NO_ROW],
        [29, NO_ROW],
        [NO_ROW, 0],
        [NO_ROW, 8],
    ]


def test_a_keypoint_stays_where_it_is_to_the_last_bit() -> None:
    size = (1000, 751)  # 15.625 original px to a network px: there and back is not exact
    keypoints_xy = keypoints(200, size=size) + np.random.default_rng(0).uniform(-2, 2, (200, 2))
    mapping = image_of(size).mapping
    assert not np.array_equal(mapping.to_original(mapping.to_network(keypoints_xy)), keypoints_xy)
    asked = request(keypoints_xy, keypoints_xy)
    matches = matched(asked, (view(), view()), sizes=(size, size))
    for side, points_xy in enumerate((matches.points1_xy, matches.points2_xy)):
        own = matches.matches_idx[:, side] != NO_ROW
        assert own.sum() > 150
        rows = matches.matches_idx[own, side]
        np.testing.assert_array_equal(points_xy[own], keypoints_xy[rows])


def test_keypoints_that_the_network_does_not_see_find_nothing() -> None:
    # 120 px become 60, of which 6 are cut off above and 6 below.
    prepared = prepare_image(np.zeros((120, 128, 3), np.uint8), edge_px=WIDTH)
    image = ImageFrame(mapping=prepared.mapping, grid=(3, 4), original_size=(128, 120))
    keypoints_xy = np.array([[64.0, 5.0], [65.0, 61.0], [64.0, 115.0]])
    decoded = DecodedPairs(
        images1=[image],
        images2=[image],
        first_leads=(view(), view()),
        second_leads=None,
        is_metric=False,
    )
    asked = request(keypoints_xy, keypoints_xy[:0])
    (matches,) = match_pairs([asked], decoded, config=Mast3rConfig(**NOISY))
    assert matches.matches_idx.tolist() == [[1, NO_ROW]]


def test_both_decodes_are_asked() -> None:
    asked = request(keypoints(10), keypoints(10, seed=1))
    matches = matched(asked, (view(), view(SHIFT)), (view(seed=1), view((-5, 4), seed=1)))
    assert len(matches) == 40
    moved = np.rint((matches.points2_xy - matches.points1_xy) / 2.0).astype(int)
    found = {tuple(shift) for shift in moved.tolist()}
    assert {SHIFT, (-5, 4)} <= found
    assert (moved == SHIFT).all(axis=1).sum() >= 18
    assert (moved == (-5, 4)).all(axis=1).sum() >= 18


def test_each_pair_of_a_batch_has_its_own_maps_and_px() -> None:
    sizes, shifts = [(128, 98), (640, 480)], [(5, 3), (-4, 2)]
    requests = [
        request(
            keypoints(15 + 5 * n, size=size),
            keypoints(10, size=size),
            pair=ImagePair(FrameId(1), FrameId(2 + n)),
        )
        for n, size in enumerate(sizes)
    ]
    decoded = DecodedPairs(
        images1=[image_of(size) for size in sizes],
        images2=[image_of(size) for size in sizes],
        first_leads=(
            joined([view(seed=n) for n in range(2)]),
            joined([view(shift, seed=n) for n, shift in enumerate(shifts)]),
        ),
        second_leads=None,
        is_metric=False,
    )
    found = match_pairs(requests, decoded, config=Mast3rConfig(**NOISY))
    assert [len(matches) for matches in found] == [25, 30]
    for asked, matches, size, shift in zip(requests, found, sizes, shifts, strict=True):
        assert matches.pair == asked.pair
        moved_px = np.median(matches.points2_xy - matches.points1_xy, axis=0)
        np.testing.assert_allclose(moved_px, np.array(shift) * size[0] / WIDTH, rtol=0.05)


def test_a_pair_with_nothing_in_common_has_empty_matches() -> None:
    asked = request(keypoints(), keypoints())
    matches = no_matches(asked)
    assert (matches.pair, len(matches), matches.focal_px) == (asked.pair, 0, (0.0, 0.0))


@pytest.mark.parametrize("scheme", ["queries", "fast_reciprocal"])
def test_images_without_keypoints_are_no_error(scheme: str) -> None:
    none = np.empty((0, 2))
    matches = matched(request(none, none), (view(), view(SHIFT)), scheme=scheme)
    assert (len(matches) > 0) == (scheme == "fast_reciprocal")


# -- the published scheme -------------------------------------------------------------------------


def test_seeds_match_centres_of_pixels_beside_all_keypoints() -> None:
    asked = request(keypoints(), keypoints())
    matches = matched(asked, (view(), view(SHIFT)), scheme="fast_reciprocal", subsample=4)
    assert len(matches) >= (WIDTH // 4) * (HEIGHT // 4)
    assert (matches.matches_idx == NO_ROW).all()
    mapping = image_of().mapping
    first, second = (
        mapping.to_network(points_xy) for points_xy in (matches.points1_xy, matches.points2_xy)
    )
    np.testing.assert_allclose(first % 1.0, 0.5)
    np.testing.assert_allclose(second - first - SHIFT, np.rint(second - first - SHIFT), atol=1e-9)
    around = np.mod(np.rint(second - first - SHIFT), (WIDTH, HEIGHT))
    assert (around == 0).all()


def test_confidence_grows_from_none_to_one() -> None:
    asked = request(keypoints(), keypoints())
    views = view(confidence=3.0), view(SHIFT, confidence=8.0)
    by_seeds = matched(asked, views, scheme="fast_reciprocal")
    np.testing.assert_allclose(by_seeds.confidence, 3.0 / 4.0)  # the smaller one of both ends
    mean = np.sqrt(24.0)
    for matches in (matched(asked, views), matched(asked, views, views, scheme="fast_reciprocal")):
        np.testing.assert_allclose(matches.confidence, mean / (1.0 + mean), rtol=1e-5)
    nothing = view(confidence=0.0), view(SHIFT, confidence=0.0)
    assert (matched(asked, nothing).confidence == 0).all()


@pytest.mark.parametrize("scheme", ["queries", "fast_reciprocal"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_confidence_beyond_all_bounds_is_full(scheme: str, symmetric: bool) -> None:
    views = view(confidence=np.inf), view(SHIFT, confidence=np.inf)
    asked = request(keypoints(), keypoints())
    matches = matched(asked, views, views if symmetric else None, scheme=scheme)
    assert len(matches) > 50
    np.testing.assert_allclose(matches.confidence, 1.0)


@pytest.mark.parametrize("scheme", ["queries", "fast_reciprocal"])
def test_what_is_no_number_is_no_match_to_trust(scheme: str) -> None:
    asked = request(keypoints(), keypoints())
    sound = view(SHIFT)
    no_confidence = replace(view(), descriptor_confidence=torch.full((1, HEIGHT, WIDTH), torch.nan))
    no_descriptors = replace(view(), descriptors=torch.full((1, HEIGHT, WIDTH, 24), torch.nan))
    matches = matched(asked, (no_confidence, sound), scheme=scheme)
    assert (matches.confidence == 0).all()
    assert len(matched(asked, (no_descriptors, sound), scheme=scheme)) <= 1


# -- points ---------------------------------------------------------------------------------------


def points_seen(
    mapping: PixelMapping, *, focal_px: float, size: Size, depth: float
) -> Float64Array:
    """Points (H, W, 3) of a plane in front of a camera with that focal length in original px."""
    x, y = np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5
    network_xy = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    rays_xy = (mapping.to_original(network_xy) - np.array(size) / 2.0) / focal_px
    depths = depth * (1.0 + network_xy[:, :1] / WIDTH)
    points = np.column_stack([rays_xy * depths, depths])
    return points.reshape(HEIGHT, WIDTH, 3)


def both_lead(focal_px: tuple[float, float], *, size: Size) -> tuple[Views, Views]:
    """Views of both decodes; what each says of the other image is in another camera."""
    mapping = image_of(size).mapping
    own1, own2, elsewhere = (
        points_seen(mapping, focal_px=focal, size=size, depth=depth)
        for focal, depth in ((focal_px[0], 2.0), (focal_px[1], 5.0), (1.0, 77.0))
    )
    return (
        (view(points3D=own1), view(SHIFT, points3D=elsewhere)),
        (view(points3D=elsewhere), view(SHIFT, points3D=own2)),
    )


@pytest.mark.parametrize("size", [(128, 98), (640, 480), (1000, 751)])
def test_focal_lengths_are_in_px_of_the_originals(size: Size) -> None:
    focal_px = (1.1 * size[0], 0.8 * size[0])
    first_leads, second_leads = both_lead(focal_px, size=size)
    asked = request(keypoints(size=size), keypoints(size=size))
    matches = matched(asked, first_leads, second_leads, sizes=(size, size))
    np.testing.assert_allclose(matches.focal_px, focal_px, rtol=1e-3)
    matches = matched(asked, first_leads, sizes=(size, size))
    np.testing.assert_allclose(matches.focal_px, (focal_px[0], 0.0), rtol=1e-3)


def test_depths_are_those_of_each_image_in_its_own_camera() -> None:
    first_leads, second_leads = both_lead((140.0, 100.0), size=ORIGINAL_SIZE)
    asked = request(keypoints(), keypoints())
    matches = matched(asked, first_leads, second_leads, is_metric=True)
    for side, (points_xy, depth) in enumerate(
        ((matches.points1_xy, 2.0), (matches.points2_xy, 5.0))
    ):
        x = image_of().mapping.to_network(points_xy)[:, 0]
        expected = depth * (1.0 + (np.floor(x) + 0.5) / WIDTH)
        np.testing.assert_allclose(matches.depths_m[:, side], expected, rtol=1e-5)


def test_without_metres_there_are_no_depths() -> None:
    first_leads, second_leads = both_lead((140.0, 100.0), size=ORIGINAL_SIZE)
    matches = matched(request(keypoints(), keypoints()), first_leads, second_leads)
    assert (matches.depths_m == 0).all()
    assert min(matches.focal_px) > 0


@pytest.mark.parametrize("depth", [np.nan, np.inf, -np.inf, -1.0, 0.0])
def test_points_that_cannot_be_are_unknown(depth: float) -> None:
    points3D = np.ones((HEIGHT, WIDTH, 3))
    points3D[:, :, 2] = depth
    matches = matched(
        request(keypoints(), keypoints()),
        (view(points3D=points3D), view(SHIFT, points3D=points3D)),
        is_metric=True,
    )
    assert len(matches) > 50
    assert (matches.depths_m == 0).all()
    assert matches.focal_px == (0.0, 0.0)


def test_some_points_that_cannot_be_are_unknown_alone() -> None:
    first_leads, _ = both_lead((140.0, 100.0), size=ORIGINAL_SIZE)
    assert first_leads[0].points3D is not None
    first_leads[0].points3D[:, : HEIGHT // 2] = torch.nan
    matches = matched(request(keypoints(60), keypoints(60)), first_leads, is_metric=True)
    is_below = image_of().mapping.to_network(matches.points1_xy)[:, 1] >= HEIGHT // 2
    assert 10 < is_below.sum() < len(matches) - 10
    np.testing.assert_array_equal(matches.depths_m[:, 0] > 0, is_below)
    assert matches.focal_px[0] == pytest.approx(140.0, rel=1e-3)
