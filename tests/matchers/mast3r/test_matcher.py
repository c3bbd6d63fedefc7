"""The MASt3R matcher over a network without weights: what it matches, where, and what it costs."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.matchers.mast3r.architecture import Grid
from adapters.matchers.mast3r.checkpoint import load_checkpoint
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.images import PixelMapping
from adapters.matchers.mast3r.matcher import Device, Mast3rMatcher, PairNetwork
from engine.config import DenseMatchingConfig, Mast3rConfig, TwoViewConfig
from engine.errors import InferenceError
from engine.estimators.two_view_geometry import verify_matches
from engine.matching.keypoint_tables import select_matches
from engine.ports import PairMatcher, SeesDepth
from engine.types import (
    NO_ROW,
    Features,
    Float64Array,
    FrameId,
    ImagePair,
    MatchRequest,
    PairMatches,
    Uint8Array,
)
from tests.support.mast3r_weights import unpacked_mini_checkpoint
from tests.support.patch_network import (
    FOCAL_RATIO,
    LEFT_DEPTH,
    RIGHT_DEPTH,
    PatchNetwork,
    true_points3D,
)
from tests.support.textured_images import frame_of, random_texture, similarity_about, transformed

Size = tuple[int, int]  # width and height in px
NUM_QUERIES = 200
TEXTURES = [random_texture(seed) for seed in range(3)]
DENSE = DenseMatchingConfig(max_corners=256, max_keypoints=512)
SMALL: dict[str, Any] = {"image_edge_px": 128}


class Places:
    """Keeps the ids of keyframes whose tokens it got."""

    def __init__(self) -> None:
        self.frame_ids: list[FrameId] = []

    def put_tokens(self, frame_id: FrameId, tokens: Tensor) -> None:
        assert tokens.ndim == 2
        self.frame_ids.append(frame_id)


class WatchedNetwork(PatchNetwork):
    """Counts what is asked of it, and has memory for few pairs only."""

    def __init__(
        self,
        *,
        max_pairs: int = 1000,
        can_encode: bool = True,
        full: Exception | None = None,
    ) -> None:
        self.num_encoded = 0
        self.decoded: list[tuple[int, bool]] = []  # pairs, and whether points were asked for
        self.num_threads: list[int] = []
        self._max_pairs = max_pairs
        self._can_encode = can_encode
        self._full = full or torch.OutOfMemoryError("no memory left")

    def encode(self, images: Tensor) -> Tensor:
        if not self._can_encode:
            raise self._full
        self.num_encoded += len(images)
        self.num_threads.append(torch.get_num_threads())
        return super().encode(images)

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        if len(tokens1) > self._max_pairs:
            raise self._full
        self.decoded.append((len(tokens1), with_points))
        return super().decode(tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=with_points)


class TurningNetwork(PatchNetwork):
    """Takes every second image for the first one, turned by half a circle."""

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        first, _ = super().decode(
            tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=with_points
        )
        return first, ViewOutput(
            descriptors=first.descriptors.flip(1, 2),
            descriptor_confidence=first.descriptor_confidence.flip(1, 2),
            points3D=None,
            confidence=None,
        )


def new_matcher(
    network: PairNetwork | None = None, *, is_metric: bool = False, **settings: Any
) -> Mast3rMatcher:
    return Mast3rMatcher(
        Mast3rConfig(**settings),
        dense=DENSE,
        network=network or PatchNetwork(),
        device=Device(name="cpu", dtype=torch.float32),
        places=Places(),
        is_metric=is_metric,
    )


def picture(
    size: Size, image_from_texture: Float64Array | None = None, *, is_grey: bool = False
) -> Uint8Array:
    """A view of a coloured texture that differs everywhere."""
    motion = similarity_about((0.0, 0.0)) if image_from_texture is None else image_from_texture
    channels = [TEXTURES[0]] * 3 if is_grey else TEXTURES
    return np.stack(
        [each.image(*size, image_from_texture=motion)[:, :, 0] for each in channels], axis=2
    )


def queries(features: Features, num: int = NUM_QUERIES) -> Any:
    return np.linspace(0, len(features) - 1, min(num, len(features))).astype(np.int64)


def request_for(first: Features, second: Features, **changes: Any) -> MatchRequest:
    given: dict[str, Any] = {
        "pair": ImagePair(first.frame_id, second.frame_id),
        "first": first,
        "second": second,
        "query_rows1": queries(first),
        "query_rows2": queries(second),
        **changes,
    }
    return MatchRequest(**given)


def described(matcher: Mast3rMatcher, images: Sequence[Uint8Array]) -> list[Features]:
    return [
        matcher.describe(frame_of(pixels, frame_id=number))
        for number, pixels in enumerate(images, start=1)
    ]


def match_two(
    matcher: Mast3rMatcher, first: Uint8Array, second: Uint8Array, **changes: Any
) -> tuple[MatchRequest, PairMatches]:
    request = request_for(*described(matcher, [first, second]), **changes)
    (matches,) = matcher.match([request])
    return request, matches


def assert_same(ones: Sequence[PairMatches], others: Sequence[PairMatches]) -> None:
    """Equal up to rounding, which may differ with the size of a batch."""
    assert [one.pair for one in ones] == [other.pair for other in others]
    for one, other in zip(ones, others, strict=True):
        by_rows = [
            {tuple(rows): n for n, rows in enumerate(each.matches_idx.tolist())}
            for each in (one, other)
        ]
        common = sorted(by_rows[0].keys() & by_rows[1].keys())
        assert len(common) >= 0.99 * max(len(one), len(other))
        left = one.take(np.array([by_rows[0][rows] for rows in common], np.int64))
        right = other.take(np.array([by_rows[1][rows] for rows in common], np.int64))
        np.testing.assert_allclose(left.points1_xy, right.points1_xy, rtol=0, atol=0.01)
        np.testing.assert_allclose(left.points2_xy, right.points2_xy, rtol=0, atol=0.01)
        np.testing.assert_allclose(left.confidence, right.confidence, rtol=0, atol=1e-3)
        np.testing.assert_allclose(left.depths_m, right.depths_m, rtol=0, atol=0.1)
        np.testing.assert_allclose(one.focal_px, other.focal_px, rtol=1e-3)


# -- where matches lie ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Two images of one picture, and how the first one's px become the second one's."""

    sizes: tuple[Size, Size]
    motion: Float64Array  # (2, 3)
    edge_px: int = 256
    is_grey: bool = False

    def images(self) -> list[Uint8Array]:
        still = similarity_about((0.0, 0.0))
        return [
            picture(size, motion, is_grey=self.is_grey)
            for size, motion in zip(self.sizes, (still, self.motion), strict=True)
        ]

    @property
    def network_px(self) -> float:
        """How many px of the second image a px of the network is."""
        return max(self.sizes[1]) / self.edge_px


SCENES = {
    "video": Scene(
        sizes=((900, 600), (900, 600)),
        motion=similarity_about((450, 300), scale=1.03, angle_rad=0.03, shift_xy=(37.3, -21.8)),
        edge_px=512,
    ),
    "other size": Scene(
        sizes=((900, 600), (640, 480)),
        motion=similarity_about((0, 0), scale=640 / 900, shift_xy=(-11.7, 23.4)),
        edge_px=384,
    ),
    "landscape and portrait": Scene(
        sizes=((600, 400), (400, 600)), motion=similarity_about((0, 0), shift_xy=(-97.4, 103.6))
    ),
    "panorama": Scene(
        sizes=((1200, 300), (1200, 300)),
        motion=similarity_about((600, 150), scale=0.98, shift_xy=(55.5, 9.1)),
    ),
    "smallest": Scene(
        sizes=((64, 64), (64, 64)),
        motion=similarity_about((0, 0), shift_xy=(5.3, -3.6)),
        edge_px=128,
    ),
    "grey": Scene(
        sizes=((400, 300), (400, 300)),
        motion=similarity_about((200, 150), angle_rad=-0.05, shift_xy=(-12.3, 17.9)),
        is_grey=True,
    ),
}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_matches_lie_where_the_motion_puts_them_in_px_of_the_originals(scene: Scene) -> None:
    request, matches = match_two(new_matcher(image_edge_px=scene.edge_px), *scene.images())
    assert len(matches) > 0.3 * (len(request.query_rows1) + len(request.query_rows2))
    errors = (matches.points2_xy - transformed(matches.points1_xy, scene.motion)) / scene.network_px
    is_right = np.linalg.norm(errors, axis=1) < 2.0
    assert is_right.mean() > 0.85
    assert np.median(np.linalg.norm(errors, axis=1)) < 0.3
    assert np.abs(np.median(errors[is_right], axis=0)).max() < 0.04
    for points_xy, size in zip((matches.points1_xy, matches.points2_xy), scene.sizes, strict=True):
        assert ((points_xy >= 0) & (points_xy <= size)).all()


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_each_match_begins_at_a_keypoint_that_was_asked_for_exactly(scene: Scene) -> None:
    request, matches = match_two(new_matcher(**SMALL), *scene.images())
    rows = matches.matches_idx
    assert ((rows == NO_ROW).sum(axis=1) == 1).all()
    for side, points_xy, features, asked in (
        (0, matches.points1_xy, request.first, request.query_rows1),
        (1, matches.points2_xy, request.second, request.query_rows2),
    ):
        own = rows[:, side] != NO_ROW
        assert own.any()
        assert np.isin(rows[own, side], asked).all()
        np.testing.assert_array_equal(points_xy[own], features.keypoints_xy[rows[own, side]])
    assert ((matches.confidence >= 0) & (matches.confidence <= 1)).all()


TURNED_SIZE = (900, 600)  # 1.875 px to a px of a network image 480 px wide, and nothing is cut off


def turned_errors(**settings: Any) -> tuple[PairMatches, Float64Array]:
    """Matches of an image and the image turned by half a circle, and their errors in network px.

    Unlike shifts a turn doubles what is wrong with pixels that are taken for their corners.
    """
    pixels = picture(TURNED_SIZE)
    matcher = new_matcher(TurningNetwork(), image_edge_px=480, **settings)
    _, matches = match_two(matcher, pixels, pixels)
    return matches, (matches.points2_xy - (TURNED_SIZE - matches.points1_xy)) / 1.875


def test_no_half_pixel_is_lost_on_the_way_to_the_network_and_back() -> None:
    matches, errors = turned_errors()
    assert len(matches) > NUM_QUERIES
    assert np.median(np.abs(errors)) < 0.1
    assert np.abs(errors.mean(axis=0)).max() < 0.02


def test_half_a_pixel_lost_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PixelMapping.to_network
    monkeypatch.setattr(
        PixelMapping, "to_network", lambda self, points_xy: right(self, points_xy) - 0.5
    )
    _, errors = turned_errors()
    np.testing.assert_allclose(errors[: NUM_QUERIES // 2].mean(axis=0), 0.5, atol=0.1)


@pytest.mark.slow
def test_the_published_scheme_ends_at_pixel_centres_beside_all_keypoints() -> None:
    matches, errors = turned_errors(scheme="fast_reciprocal")
    assert len(matches) > 500
    assert (matches.matches_idx == NO_ROW).all()
    for points_xy in (matches.points1_xy, matches.points2_xy):
        whole = points_xy / 1.875 - 0.5
        np.testing.assert_allclose(whole, np.rint(whole), atol=1e-9)
    assert np.median(np.abs(errors)) < 1e-9  # the very pixel, turned
    assert ((matches.confidence >= 0) & (matches.confidence <= 1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_published_scheme_follows_a_motion(symmetric: bool) -> None:
    scene = SCENES["grey"]
    matcher = new_matcher(image_edge_px=256, scheme="fast_reciprocal", symmetric=symmetric)
    _, matches = match_two(matcher, *scene.images())
    errors = (matches.points2_xy - transformed(matches.points1_xy, scene.motion)) / scene.network_px
    assert len(matches) > 300
    assert np.median(np.linalg.norm(errors, axis=1)) < 0.6
    assert np.abs(np.median(errors, axis=0)).max() < 0.1


# -- nothing in common ----------------------------------------------------------------------------


def num_verified(matches: PairMatches, sizes: tuple[Size, Size]) -> int:
    selected = select_matches(matches, sizes=sizes, config=DenseMatchingConfig())
    verified = verify_matches(selected, image_size=sizes[0], config=TwoViewConfig())
    return 0 if verified is None else len(verified.inliers)


def noise(size: Size, *, seed: int) -> Uint8Array:
    width, height = size
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return blocks.repeat(4, axis=0).repeat(4, axis=1)


def test_images_without_overlap_have_no_matches_that_hold() -> None:
    sizes = ((400, 300), (300, 400))
    elsewhere = similarity_about((0, 0), shift_xy=(5000.0, -7000.0))
    for images in (
        [noise(size, seed=seed) for seed, size in enumerate(sizes)],
        [picture(sizes[0]), picture(sizes[1], elsewhere)],
    ):
        # Of two places that are anything but alike, each may still be the other's nearest.
        request, matches = match_two(new_matcher(image_edge_px=256), *images)
        assert len(matches) < 0.7 * (len(request.query_rows1) + len(request.query_rows2))
        assert num_verified(matches, sizes) == 0
    scene = SCENES["grey"]
    _, matches = match_two(new_matcher(image_edge_px=256), *scene.images())
    assert num_verified(matches, scene.sizes) > 100, "nothing ever holds"


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_image_of_one_colour_matches_nothing_with_confidence(value: int) -> None:
    blank = np.full((300, 400, 3), value, np.uint8)
    sizes = ((400, 300), (400, 300))
    for images in ((blank, blank), (blank, picture(sizes[0])), (picture(sizes[0]), blank)):
        _, matches = match_two(new_matcher(**SMALL), *images)
        assert not (matches.confidence > 0).any()
        assert num_verified(matches, sizes) == 0


@pytest.mark.parametrize("scheme", ["queries", "fast_reciprocal"])
def test_the_same_image_twice_matches_itself(scheme: str) -> None:
    pixels = picture((320, 240))
    _, matches = match_two(new_matcher(**SMALL, scheme=scheme), pixels, pixels)
    assert len(matches) > 100
    assert np.abs(matches.points1_xy - matches.points2_xy).max() < 2.5 * 0.5 + 1e-6


def test_no_requests_have_no_answers_and_no_queries_no_matches() -> None:
    matcher = new_matcher(**SMALL)
    assert matcher.match([]) == []
    none = np.empty(0, np.int64)
    pixels = picture((200, 150))
    _, matches = match_two(matcher, pixels, pixels, query_rows1=none, query_rows2=none)
    assert len(matches) == 0
    _, matches = match_two(matcher, pixels, pixels, query_rows1=none)
    assert len(matches) > 10
    assert (matches.matches_idx[:, 0] == NO_ROW).all()


def test_a_network_of_random_weights_is_answered_for_too(tmp_path: Path) -> None:
    network = load_checkpoint(
        unpacked_mini_checkpoint(tmp_path), device="cpu", dtype=torch.float32
    ).network
    for settings in ({}, {"symmetric": True}, {"scheme": "fast_reciprocal"}):
        matcher = new_matcher(network, image_edge_px=96, **settings)
        _, matches = match_two(
            matcher, picture((200, 150)), picture((150, 200)), wants_pointmaps=True
        )
        assert ((matches.confidence >= 0) & (matches.confidence <= 1)).all()
        assert (matches.depths_m == 0).all()


# -- the depth that it sees -----------------------------------------------------------------------


class ConfidentNetwork(PatchNetwork):
    """Is sure of the points of the left half of every image."""

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        views = super().decode(tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=with_points)
        for view in views:
            if view.confidence is not None:
                view.confidence[:, :, : view.confidence.shape[2] // 2] = 4.0
        return views


def test_the_depth_of_a_keyframe_is_that_of_its_pointmap_where_it_is_sure() -> None:
    matcher = new_matcher(ConfidentNetwork(), image_edge_px=96)
    one, other = described(matcher, [picture((200, 150)), picture((150, 200))])
    seen = matcher.seen_depth(one.frame_id, other.frame_id)
    assert seen is not None
    height, width = seen.depth.shape
    true = true_points3D(height, width)[:, :, 2].numpy()
    assert np.allclose(seen.depth[:, : width // 2], true[:, : width // 2])
    assert not seen.depth[:, width // 2 :].any()
    corners = np.array([[0.0, 0.0], [width, height]]) * seen.scale_xy + seen.offset_xy
    assert (corners[0] >= 0).all()
    assert (corners[1] <= [200, 150]).all()
    assert (corners[1] - corners[0] > [180, 130]).all()


def test_a_network_of_random_weights_sees_depth_or_none(tmp_path: Path) -> None:
    network = load_checkpoint(
        unpacked_mini_checkpoint(tmp_path), device="cpu", dtype=torch.float32
    ).network
    matcher = new_matcher(network, image_edge_px=96)
    one, other = described(matcher, [picture((200, 150)), picture((150, 200))])
    seen = matcher.seen_depth(one.frame_id, other.frame_id)
    assert seen is not None
    assert seen.depth.shape == (64, 96)
    assert (seen.depth >= 0).all()
    assert matcher.seen_depth(one.frame_id, FrameId(99)) is None


def test_depth_that_there_is_no_room_for_is_an_error_of_the_pair() -> None:
    matcher = new_matcher(WatchedNetwork(max_pairs=0), image_edge_px=96)
    one, other = described(matcher, [picture((200, 150)), picture((150, 200))])
    with pytest.raises(InferenceError, match="no room for a single pair"):
        matcher.seen_depth(one.frame_id, other.frame_id)


# -- the contract ---------------------------------------------------------------------------------


def test_it_is_a_pair_matcher_to_the_engine() -> None:
    matcher: PairMatcher = new_matcher(**SMALL)  # checked by mypy
    assert isinstance(matcher, SeesDepth)
    assert matcher.name == "mast3r"
    assert matcher.peak_gpu_mb == 0.0


def test_a_keyframe_starts_with_corners_and_free_rows_on_a_grid() -> None:
    (features,) = described(new_matcher(**SMALL), [picture((320, 240))])
    assert features.frame_id == 1
    assert len(features) <= DENSE.max_keypoints
    assert 50 < len(features.fixed_rows) <= DENSE.max_corners
    assert features.is_free.sum() > 100
    assert ((features.keypoints_xy > 0) & (features.keypoints_xy < (320, 240))).all()


def test_a_keyframe_is_encoded_once_however_many_pairs_it_has() -> None:
    network, places = WatchedNetwork(), Places()
    matcher = Mast3rMatcher(
        Mast3rConfig(**SMALL),
        dense=DENSE,
        network=network,
        device=Device(name="cpu", dtype=torch.float32),
        places=places,
        is_metric=False,
    )
    features = described(matcher, [picture((160, 120))] * 4)
    for _ in range(2):
        matcher.match([request_for(one, features[3]) for one in features[:3]])
    assert network.num_encoded == 4
    assert places.frame_ids == [1, 2, 3, 4]
    assert sum(num for num, _ in network.decoded) == 6


MIXED_SIZES = [(160, 120), (120, 160), (160, 120), (240, 60), (120, 160), (160, 120)]


def mixed_images() -> list[Uint8Array]:
    return [
        picture(size, similarity_about((0, 0), shift_xy=(3.0 * n, -2.0 * n)))
        for n, size in enumerate(MIXED_SIZES)
    ]


def all_requests(features: Sequence[Features], **changes: Any) -> list[MatchRequest]:
    """Every pair, in an order that mixes sizes."""
    pairs = [(a, b) for b in range(len(features)) for a in range(b)]
    shuffled = np.random.default_rng(0).permutation(len(pairs))
    return [request_for(features[pairs[n][0]], features[pairs[n][1]], **changes) for n in shuffled]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["queries", "fast_reciprocal"])
def test_pairs_of_all_sizes_are_answered_in_order_as_if_asked_one_by_one(scheme: str) -> None:
    network = WatchedNetwork()
    matcher = new_matcher(network, **SMALL, scheme=scheme, subsample=4)
    requests = all_requests(described(matcher, mixed_images()))
    together = matcher.match(requests)
    assert [matches.pair for matches in together] == [request.pair for request in requests]
    # Landscapes and portraits in any order, and each of both before and after the panorama.
    assert len(network.decoded) == 8
    alone = [matcher.match([request])[0] for request in requests]
    if scheme == "queries":
        assert_same(together, alone)
    else:
        nums = [(len(one), len(other)) for one, other in zip(together, alone, strict=True)]
        assert all(abs(one - other) <= 0.02 * other for one, other in nums)
    assert sum(len(matches) > 30 for matches in together) >= 4


def test_batches_are_as_large_as_configured() -> None:
    network = WatchedNetwork()
    matcher = new_matcher(network, **SMALL, batch_pairs=4)
    matcher.match(all_requests(described(matcher, [picture((160, 120))] * 5)))
    assert [num for num, _ in network.decoded] == [4, 4, 2]
    assert matcher.batch_pairs == 4


def test_pairs_that_want_points_are_decoded_apart_from_those_that_do_not() -> None:
    network = WatchedNetwork()
    matcher = new_matcher(network, **SMALL)
    features = described(matcher, [picture((160, 120))] * 4)
    requests = [
        request_for(features[a], features[b], wants_pointmaps=wants)
        for (a, b), wants in (((0, 1), True), ((1, 2), False), ((2, 3), True), ((0, 3), False))
    ]
    found = matcher.match(requests)
    assert sorted(network.decoded) == [(2, False), (2, True)]
    assert [matches.focal_px[0] > 0 for matches in found] == [True, False, True, False]


def test_a_keyframe_that_was_not_described_is_a_key_error() -> None:
    features = described(new_matcher(**SMALL), [picture((160, 120))] * 2)
    matcher = new_matcher(**SMALL)
    described(matcher, [picture((160, 120))])
    with pytest.raises(KeyError):
        matcher.match([request_for(*features)])


def test_describing_a_frame_again_replaces_it() -> None:
    matcher = new_matcher(**SMALL)
    described(matcher, [picture((160, 120)), picture((120, 160))])
    features = described(matcher, [picture((120, 160)), picture((240, 60))])
    (matches,) = matcher.match([request_for(*features)])
    assert (matches.points1_xy <= (120, 160)).all()
    assert (matches.points2_xy <= (240, 60)).all()


@pytest.mark.slow
def test_one_thread_describes_while_another_matches() -> None:
    images = mixed_images()
    alone = new_matcher(**SMALL)
    requests = all_requests(described(alone, images))
    matcher = new_matcher(**SMALL)
    described(matcher, images)
    more = [frame_of(picture((160, 120)), frame_id=number) for number in range(10, 30)]
    describing = threading.Thread(target=lambda: [matcher.describe(frame) for frame in more])
    describing.start()
    found = matcher.match(requests)
    describing.join()
    assert_same(found, alone.match(requests))


def test_the_network_alone_gets_more_threads_of_the_processor() -> None:
    network, before = WatchedNetwork(), torch.get_num_threads()
    matcher = Mast3rMatcher(
        Mast3rConfig(**SMALL),
        dense=DENSE,
        network=network,
        device=Device(name="cpu", dtype=torch.float32, num_threads=before + 1),
        places=Places(),
        is_metric=False,
    )
    described(matcher, [picture((160, 120))])
    assert network.num_threads == [before + 1]
    assert torch.get_num_threads() == before


# -- points ---------------------------------------------------------------------------------------


def true_depths(points_xy: Float64Array, width: int) -> Float64Array:
    return LEFT_DEPTH + (RIGHT_DEPTH - LEFT_DEPTH) * points_xy[:, 0] / width


# Cut by the network: from 171 px high to 160, unevenly; not at all; from 170 px wide to 160.
POINT_SIZES = [(900, 600), (512, 384), (400, 602)]


@pytest.mark.parametrize("size", POINT_SIZES)
def test_the_focal_length_is_in_px_of_the_original(size: Size) -> None:
    pixels = picture(size)
    matcher = new_matcher(image_edge_px=256)
    _, matches = match_two(matcher, pixels, pixels, wants_pointmaps=True)
    assert matches.focal_px[0] == pytest.approx(FOCAL_RATIO * max(size), rel=0.01)
    assert matches.focal_px[1] == 0.0  # its points are in the other camera
    assert (matches.depths_m == 0).all()  # no metres


def test_both_focal_lengths_are_known_when_both_images_lead() -> None:
    sizes = [(900, 600), (400, 602)]
    matcher = new_matcher(image_edge_px=256, symmetric=True)
    _, matches = match_two(matcher, *(picture(size) for size in sizes), wants_pointmaps=True)
    expected = [FOCAL_RATIO * max(size) for size in sizes]
    np.testing.assert_allclose(matches.focal_px, expected, rtol=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
def test_depths_are_returned_where_points_are_metric(symmetric: bool) -> None:
    scene = SCENES["video"]
    matcher = new_matcher(image_edge_px=256, is_metric=True, symmetric=symmetric)
    _, matches = match_two(matcher, *scene.images(), wants_pointmaps=True)
    one_px = (RIGHT_DEPTH - LEFT_DEPTH) / 256
    first, second = (true_depths(xy, 900) for xy in (matches.points1_xy, matches.points2_xy))
    np.testing.assert_allclose(matches.depths_m[:, 0], first, atol=one_px)
    if symmetric:
        np.testing.assert_allclose(matches.depths_m[:, 1], second, atol=one_px)
    else:
        assert (matches.depths_m[:, 1] == 0).all()


def test_points_that_nobody_wants_are_not_asked_for() -> None:
    network = WatchedNetwork()
    matcher = new_matcher(network, **SMALL, is_metric=True, symmetric=True)
    pixels = picture((160, 120))
    _, matches = match_two(matcher, pixels, pixels)
    assert network.decoded == [(1, False), (1, False)]
    assert matches.focal_px == (0.0, 0.0)
    assert (matches.depths_m == 0).all()


def test_both_orders_give_more_matches() -> None:
    scene, nums = SCENES["grey"], []
    for symmetric in (False, True):
        _, matches = match_two(new_matcher(**SMALL, symmetric=symmetric), *scene.images())
        nums.append(len(matches))
    assert nums[1] > nums[0] > 50


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_device_out_of_memory_is_given_smaller_batches_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plenty, network = new_matcher(**SMALL), WatchedNetwork(max_pairs=2)
    matcher = new_matcher(network, **SMALL, batch_pairs=8)
    images = [
        picture((160, 120), similarity_about((0, 0), shift_xy=(2.0 * n, n))) for n in range(5)
    ]
    requests = all_requests(described(plenty, images))
    described(matcher, images)
    with caplog.at_level(logging.WARNING):
        found = matcher.match(requests)
        assert matcher.batch_pairs == 2
        again = matcher.match(requests)
    (record,) = caplog.records
    assert record.getMessage() == (
        "cpu has no room for 8 pairs at once; going on with smaller batches"
    )
    assert [num for num, _ in network.decoded] == [2] * 10
    for each in (found, again):
        assert_same(each, plenty.match(requests))


def test_a_batch_that_was_not_full_is_halved_from_what_it_was() -> None:
    network = WatchedNetwork(max_pairs=1)
    matcher = new_matcher(network, **SMALL, batch_pairs=8)
    features = described(matcher, [picture((160, 120))] * 3)
    assert len(matcher.match(all_requests(features))) == 3
    assert matcher.batch_pairs == 1


@pytest.mark.parametrize(
    "full",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError("Unable to allocate 4 bytes"),
    ],
)
def test_whoever_has_no_memory_left_is_given_smaller_batches(full: Exception) -> None:
    matcher = new_matcher(WatchedNetwork(max_pairs=1, full=full), **SMALL)
    features = described(matcher, [picture((160, 120))] * 3)
    assert len(matcher.match(all_requests(features))) == 3
    assert matcher.batch_pairs == 1
    with pytest.raises(InferenceError, match="has no room to encode it"):
        described(new_matcher(WatchedNetwork(can_encode=False, full=full)), [picture((160, 120))])


def test_an_error_that_is_not_about_memory_is_not_hidden() -> None:
    broken = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    matcher = new_matcher(WatchedNetwork(max_pairs=0, full=broken), **SMALL)
    features = described(matcher, [picture((160, 120))] * 2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matcher.match(all_requests(features))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        described(new_matcher(WatchedNetwork(can_encode=False, full=broken)), [picture((80, 60))])


def test_no_room_for_a_single_pair_is_an_inference_error() -> None:
    matcher = new_matcher(WatchedNetwork(max_pairs=0), **SMALL)
    features = described(matcher, [picture((160, 120))] * 3)
    with pytest.raises(InferenceError, match="cpu has no room for a single pair"):
        matcher.match(all_requests(features))


def test_no_room_to_encode_is_an_inference_error_that_names_the_image() -> None:
    matcher = new_matcher(WatchedNetwork(can_encode=False), **SMALL)
    with pytest.raises(InferenceError, match=r"000001\.jpg: cpu has no room to encode it"):
        described(matcher, [picture((160, 120))])


def test_no_room_for_what_a_place_is_known_by_is_an_inference_error() -> None:
    class FullPlaces(Places):
        def put_tokens(self, frame_id: FrameId, tokens: Tensor) -> None:
            raise torch.OutOfMemoryError("no memory left")

    matcher = Mast3rMatcher(
        Mast3rConfig(**SMALL),
        dense=DENSE,
        network=PatchNetwork(),
        device=Device(name="cpu", dtype=torch.float32),
        places=FullPlaces(),
        is_metric=False,
    )
    with pytest.raises(InferenceError, match=r"000001\.jpg: cpu has no room"):
        described(matcher, [picture((160, 120))])


@pytest.mark.slow
def test_keyframes_without_room_in_memory_are_matched_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    network = WatchedNetwork()
    matcher, roomy = new_matcher(network, **SMALL, host_cache_mb=0), new_matcher(**SMALL)
    images = mixed_images()
    requests = all_requests(described(roomy, images))
    described(matcher, images)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(images)
    for _ in range(2):
        assert_same(matcher.match(requests), roomy.match(requests))
    assert network.num_encoded == len(images)
