"""Keyframes that a small patch of their image alone holds are found, unless something confirms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import Placement
from engine.mapping.verdict.map_evidence import Beside, gather
from engine.mapping.verdict.patch_evidence import (
    beyond_patches,
    find_held_by_patch,
    patch_ratio,
)
from engine.mapping.verdict.verdict import judge
from engine.types import (
    Contradiction,
    Float64Array,
    FrameId,
    GpsFix,
    Keyframe,
    PackedMask,
    VerdictLevel,
)
from tests.mapping.verdict.test_map_evidence import graph_of, move
from tests.mapping.verdict.test_part_evidence import pairs_of
from tests.support.placed_maps import placed
from tests.support.synthetic import (
    HEIGHT,
    WIDTH,
    Photos,
    SyntheticWorld,
    grow,
    grown_map,
    look_at,
    map_of_keyframes,
    straight_path,
)

NUM, HELD = 10, FrameId(5)
PATCH, WIDE = 35, 300  # keypoints nearest to each other
METRES_PER_UNIT = 3.0
FOCAL_PX = 800.0


def patch_of(world: SyntheticWorld, num: int) -> list[int]:
    """So many points around one place in the fifth frame."""
    view = world.view(HELD)
    offsets = view.points_xy - np.median(view.points_xy, axis=0)
    nearest = np.argsort(np.linalg.norm(offsets, axis=1))[:num]
    return [int(point_id) for point_id in view.point_ids[nearest]]


def map_of_two_parts(world: SyntheticWorld, *, num: int) -> SparseMap:
    """A map whose first and last five keyframes match each other around one place alone."""
    patch = patch_of(world, num)
    sparse_map = map_of_keyframes(
        world,
        skips=lambda pair: pair.first <= HELD < pair.second,
        given_pairs=[
            world.verified_pair(one, other, among=patch) for one in (3, 4, 5) for other in (6, 7)
        ],
    )
    grow(sparse_map, world, sparse_map.keyframe_ids)
    return sparse_map


def map_with_patch(world: SyntheticWorld, *, num: int = PATCH) -> SparseMap:
    """A map whose fifth keyframe matches the others in so many keypoints around one place alone."""
    patch = patch_of(world, num)
    sparse_map = map_of_keyframes(
        world,
        skips=lambda pair: HELD in (pair.first, pair.second),
        given_pairs=[world.verified_pair(HELD, HELD + gap, among=patch) for gap in (-2, -1, 1, 2)],
    )
    grow(sparse_map, world, sparse_map.keyframe_ids)
    return sparse_map


@pytest.fixture(scope="module")
def photos() -> SyntheticWorld:
    return Photos(straight_path(NUM), density=6.0, noise_px=0.3)


@pytest.fixture(scope="module")
def of_photos(photos: SyntheticWorld) -> SparseMap:
    return map_with_patch(photos)


@pytest.fixture
def of_video() -> SparseMap:
    return map_with_patch(SyntheticWorld(straight_path(NUM), density=6.0, noise_px=0.3))


def held_ids(sparse_map: SparseMap, placement: Placement | None = None) -> list[FrameId]:
    keyframes = [sparse_map.keyframe(i) for i in sparse_map.keyframe_ids]
    held = find_held_by_patch(sparse_map, keyframes, pairs_of(sparse_map), placement)
    return [frame_id for one in held for frame_id in one.frame_ids]


def placed_but_for_one(sparse_map: SparseMap, *, residual_m: float) -> Placement:
    """The map on the globe, where the position of the fifth keyframe is so far from it."""
    residuals_m = np.where(np.array(sparse_map.registered_ids) == HELD, residual_m, 0.5)
    enu_from_map = np.column_stack([METRES_PER_UNIT * np.eye(3), np.zeros(3)])
    return placed(sparse_map, enu_from_map, residuals_m)


def test_a_photo_that_one_small_patch_holds_makes_a_map_doubtful(of_photos: SparseMap) -> None:
    verdict = judge(gather(of_photos, graph_of(of_photos), Beside()))
    (reason,) = (one for one in verdict.reasons if one.kind == "small_patch")
    assert reason.level is VerdictLevel.DOUBTFUL
    assert reason.frame_ids == (HELD,)
    assert "photo 000005.jpg" in reason.sentence


def test_photos_that_much_of_their_images_holds_are_not_doubted(photos: SyntheticWorld) -> None:
    assert held_ids(map_with_patch(photos, num=WIDE)) == []
    assert held_ids(grown_map(photos)) == []


class MaskedPhotos(Photos):
    """Photos; of the fifth, a mask leaves the middle: a window to look through."""

    def __init__(self, *args: Any, num_left_px: int, **kwargs: Any) -> None:
        self.num_left_px = num_left_px
        super().__init__(*args, **kwargs)

    def keyframe(self, frame_id: int, *, gps: GpsFix | None = None) -> Keyframe:
        keyframe = super().keyframe(frame_id, gps=gps)
        mask = np.zeros((HEIGHT, WIDTH), np.bool_)
        left, top = (WIDTH - self.num_left_px) // 2, (HEIGHT - self.num_left_px) // 2
        mask[top : top + self.num_left_px, left : left + self.num_left_px] = True
        return replace(keyframe, mask=PackedMask.of(mask)) if frame_id == HELD else keyframe


@pytest.mark.parametrize(
    ("num_left_px", "num", "is_held"), [(HEIGHT, 90, True), (370, 90, False), (60, PATCH, True)]
)
def test_what_fills_the_part_of_an_image_that_a_mask_leaves_is_no_small_patch_unless_that_is_tiny(
    num_left_px: int, num: int, is_held: bool
) -> None:
    masked = MaskedPhotos(straight_path(NUM), density=6.0, noise_px=0.3, num_left_px=num_left_px)
    assert held_ids(map_with_patch(masked, num=num)) == ([HELD] if is_held else [])


@pytest.mark.parametrize(("residual_m", "is_confirmed"), [(1.0, True), (8.0, False), (40.0, False)])
def test_a_position_confirms_a_photo_where_it_is_much_surer_than_the_map_is_large(
    of_photos: SparseMap, residual_m: float, is_confirmed: bool
) -> None:
    held = held_ids(of_photos, placed_but_for_one(of_photos, residual_m=residual_m))
    assert held == ([] if is_confirmed else [HELD])


def test_positions_of_other_photos_confirm_nothing(of_photos: SparseMap) -> None:
    placement = placed_but_for_one(of_photos, residual_m=math.inf)
    others = [row for row, frame_id in enumerate(placement.frame_ids) if frame_id != HELD]
    found = placement.georeference
    beside = replace(
        placement,
        frame_ids=tuple(placement.frame_ids[row] for row in others),
        georeference=replace(
            found,
            residuals_m=found.residuals_m[others],
            weights=found.weights[others],
            is_inlier=found.is_inlier[others],
            offsets_enu_m=found.offsets_enu_m[others],
        ),
    )
    assert held_ids(of_photos, beside) == [HELD]


def test_keyframes_of_a_video_are_confirmed_by_those_before_and_after(of_video: SparseMap) -> None:
    assert held_ids(of_video) == []


def test_keyframes_of_a_video_that_stand_elsewhere_than_those_around_them_are_doubted(
    of_video: SparseMap,
) -> None:
    move(of_video, HELD, (0.0, 3.0, 0.0))
    assert held_ids(of_video) == [HELD]


def test_keyframes_of_a_video_are_not_confirmed_where_the_camera_was_lost(
    of_video: SparseMap,
) -> None:
    of_video.deregister([FrameId(HELD + 1)])
    assert held_ids(of_video) == [HELD]


def test_a_small_object_before_nothing_is_not_doubted() -> None:
    angles = 0.12 * np.arange(NUM)
    centers = np.column_stack([12.0 * np.cos(angles), 12.0 * np.sin(angles), 4.0 + 0.0 * angles])
    poses = np.array([look_at(center, np.zeros(3)) for center in centers])
    points = np.random.default_rng(1).uniform(-0.9, 0.9, (120, 3))
    sparse_map = grown_map(Photos(poses, points=points, noise_px=0.1))
    keypoints_xy = sparse_map.keyframe(HELD).features.keypoints_xy
    assert patch_ratio(keypoints_xy, usable_px=WIDTH * HEIGHT, focal_px=FOCAL_PX) < 0.04
    assert held_ids(sparse_map) == []


def square(half_px: float, *, num: int = 400) -> Float64Array:
    """Keypoints (num, 2) px in a square in the middle of an image."""
    middle_xy = np.array([WIDTH / 2, HEIGHT / 2])
    rng = np.random.default_rng(2)
    keypoints_xy: Float64Array = middle_xy + rng.uniform(-half_px, half_px, (num, 2))
    return keypoints_xy


def ratio_of(keypoints_xy: Float64Array, *, focal_px: float = FOCAL_PX) -> float:
    return patch_ratio(keypoints_xy, usable_px=WIDTH * HEIGHT, focal_px=focal_px)


def test_a_few_keypoints_elsewhere_make_no_patch_larger() -> None:
    patch_xy = square(50.0)
    strays_xy = np.random.default_rng(3).uniform(0.0, HEIGHT, (12, 2))
    with_strays = ratio_of(np.vstack([patch_xy, strays_xy]))
    assert 0.008 < ratio_of(patch_xy) < 0.0134
    assert with_strays < 0.0134


def test_very_few_keypoints_say_nothing_of_what_they_span() -> None:
    assert math.isnan(ratio_of(square(300.0, num=5)))
    assert ratio_of(square(300.0, num=6)) > 0.0


def test_a_part_of_a_panorama_counts_as_much_as_an_image_of_it_would() -> None:
    panorama_focal_px = WIDTH / (2.0 * np.pi)
    sixty_degrees, ten_degrees = (np.radians(a) * panorama_focal_px / 2.0 for a in (60.0, 10.0))
    assert ratio_of(square(sixty_degrees), focal_px=panorama_focal_px) > 0.3
    assert ratio_of(square(ten_degrees), focal_px=panorama_focal_px) < 0.03


def test_a_long_lens_is_judged_by_its_image() -> None:
    assert ratio_of(square(300.0), focal_px=30_000.0) > 0.3


@pytest.mark.parametrize(("num", "is_kept"), [(PATCH, False), (WIDE, True)])
def test_a_small_patch_that_is_elsewhere_in_the_map_contradicts_nothing(
    photos: SyntheticWorld, num: int, is_kept: bool
) -> None:
    sparse_map = grown_map(photos)
    verified = photos.verified_pair(HELD, HELD + 1, among=patch_of(photos, num))
    contradiction = Contradiction(pair=verified.pair, num_matches=num, error_px=90.0)
    found = beyond_patches(sparse_map, [(verified, contradiction)])
    assert found == ((contradiction,) if is_kept else ())


def test_a_patch_that_fills_the_other_image_contradicts_a_map(photos: SyntheticWorld) -> None:
    sparse_map = grown_map(photos)
    verified = photos.verified_pair(HELD, HELD + 1, among=patch_of(photos, PATCH))
    near = sparse_map.keyframe(FrameId(HELD + 1))
    rows = verified.inlier_matches_idx[:, 1]
    center_xy = near.features.keypoints_xy[rows].mean(axis=0)
    offsets_xy = near.features.keypoints_xy[rows] - center_xy
    keypoints_xy = np.array(near.features.keypoints_xy)
    keypoints_xy[rows] = (WIDTH / 2, HEIGHT / 2) + 15.0 * offsets_xy
    enlarged = replace(near, features=replace(near.features, keypoints_xy=keypoints_xy))
    contradiction = Contradiction(pair=verified.pair, num_matches=PATCH, error_px=90.0)

    class Enlarged:
        """The map with that keyframe."""

        def keyframe(self, frame_id: FrameId) -> Keyframe:
            return enlarged if frame_id == near.frame_id else sparse_map.keyframe(frame_id)

        def __getattr__(self, name: str) -> object:
            return getattr(sparse_map, name)

    found = beyond_patches(cast(SparseMap, Enlarged()), [(verified, contradiction)])
    assert found == (contradiction,)
