"""The oracle's matches are true, degraded by no less and no more than configured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from adapters.town import oracle as oracle_module
from adapters.town.oracle import OracleMatcher, OraclePlaces, TrueView
from engine.config import DenseMatchingConfig, OracleConfig
from engine.geometry import transform_points
from engine.types import (
    NO_ROW,
    BoolArray,
    Features,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    MatchRequest,
    PairMatches,
)
from tests.support import true_scene
from tests.support.true_scene import (
    FOCAL_PX,
    HEIGHT,
    WIDTH,
    frame_of,
    is_hidden,
    points_at,
    project,
    true_view,
)

SIZE = (WIDTH, HEIGHT)
DENSE = DenseMatchingConfig(max_corners=300, max_keypoints=5000)
LOOKING_BACK = 4  # the camera that sees nothing of what the others see
EXACT = OracleConfig(noise_px=0.0, outlier_ratio=0.0, depth_noise_ratio=0.0)


class Asked:
    """An oracle of the scene, and the tables it made of its frames."""

    def __init__(self, config: OracleConfig = EXACT, *, seed: int = 0, **settings: Any) -> None:
        self.truths: list[int] = []
        self.oracle = OracleMatcher(
            config.model_copy(update=settings), dense=DENSE, truth=self._truth, seed=seed
        )
        self.features = [
            self.oracle.describe(frame_of(index)) for index in range(len(true_scene.POSES))
        ]

    def _truth(self, index: int) -> TrueView:
        self.truths.append(index)
        return true_view(index)

    def request(
        self,
        first: int,
        second: int,
        *,
        rows1: Int64Array | None = None,
        rows2: Int64Array | None = None,
        wants_pointmaps: bool = False,
    ) -> MatchRequest:
        """Two frames by their indices, all rows by default."""
        one, other = self.features[first], self.features[second]
        return MatchRequest(
            pair=ImagePair(one.frame_id, other.frame_id),
            first=one,
            second=other,
            query_rows1=np.arange(len(one)) if rows1 is None else rows1,
            query_rows2=np.arange(len(other)) if rows2 is None else rows2,
            wants_pointmaps=wants_pointmaps,
        )

    def match(self, first: int, second: int, **more: Any) -> PairMatches:
        (matches,) = self.oracle.match([self.request(first, second, **more)])
        return matches


class Landings:
    """The matches of one direction, against the truth."""

    def __init__(self, asked: Asked, matches: PairMatches, *, first: int, second: int) -> None:
        is_there = matches.matches_idx[:, 0] != NO_ROW
        self.rows = matches.matches_idx[is_there, 0]
        self.confidence = matches.confidence[is_there]
        self.depths_m = matches.depths_m[is_there]
        self.points = points_at(first, asked.features[first].keypoints_xy[self.rows])
        self.ends_xy = matches.points2_xy[is_there]
        self.errors_xy = self.ends_xy - project(second, self.points)

    @property
    def errors_px(self) -> Float64Array:
        return np.asarray(np.linalg.norm(self.errors_xy, axis=1))


def landings(asked: Asked, *, first: int = 0, second: int = 2, **more: Any) -> Landings:
    """What becomes of the first frame's keypoints in the second."""
    return Landings(asked, asked.match(first, second, **more), first=first, second=second)


def is_visible(asked: Asked, *, first: int, second: int) -> BoolArray:
    """(N,) whether the first frame's keypoints show what is clearly in sight of the second."""
    points = points_at(first, asked.features[first].keypoints_xy)
    seen = np.flatnonzero(np.isfinite(points).all(axis=1))
    seen = seen[points[seen, 1] < 25.0]
    ends_xy = project(second, points[seen])
    seen = seen[((ends_xy > 1.0) & (ends_xy < np.array(SIZE) - 1.0)).all(axis=1)]
    return np.asarray(np.isin(np.arange(len(points)), seen[~is_hidden(second, points[seen])]))


# -- the truth ------------------------------------------------------------------------------------


def test_keypoints_end_where_the_scene_shows_them_in_the_other_image() -> None:
    there = landings(Asked())
    assert len(there.rows) > 2000
    assert np.quantile(there.errors_px, 0.98) < 1e-3
    assert there.errors_px.max() < 0.3  # where ground and wall meet within a pixel


def test_both_directions_are_looked_up() -> None:
    asked = Asked()
    matches = asked.match(0, 2)
    is_back = matches.matches_idx[:, 0] == NO_ROW
    rows = matches.matches_idx[is_back, 1]
    assert is_back.sum() > 2000
    truth_xy = project(0, points_at(2, asked.features[2].keypoints_xy[rows]))
    errors_px = np.linalg.norm(matches.points1_xy[is_back] - truth_xy, axis=1)
    assert np.quantile(errors_px, 0.98) < 1e-3


@pytest.mark.parametrize("second", [1, 2, 3])
def test_nearly_everything_in_sight_is_matched(second: int) -> None:
    asked = Asked()
    visible = is_visible(asked, first=0, second=second)
    matched = np.zeros(len(visible), bool)
    matched[landings(asked, second=second).rows] = True
    assert visible.sum() > 1500
    assert matched[visible].mean() > 0.96  # the rest is at edges


@pytest.mark.parametrize("second", [1, 2, 3])
def test_what_the_wall_hides_is_not_matched(second: int) -> None:
    asked = Asked()
    points = points_at(0, asked.features[0].keypoints_xy)
    on_ground = np.flatnonzero(np.abs(points[:, 2]) < 1e-6)
    hidden = on_ground[is_hidden(second, points[on_ground])]
    assert len(hidden) > 20
    assert not np.isin(hidden, landings(asked, second=second).rows).any()


def test_the_sky_is_matched_with_nothing() -> None:
    asked = Asked()
    in_sky = np.flatnonzero(~np.isfinite(points_at(0, asked.features[0].keypoints_xy)).all(axis=1))
    there = landings(asked)
    assert len(in_sky) > 1000
    assert not np.isin(in_sky, there.rows).any()
    assert np.isfinite(points_at(2, there.ends_xy)).all()


def test_images_without_overlap_have_no_matches() -> None:
    matches = Asked(OracleConfig()).match(0, LOOKING_BACK, wants_pointmaps=True)
    assert len(matches) == 0
    assert matches.matches_idx.shape == matches.points1_xy.shape == (0, 2)
    assert matches.focal_px[0] > 0


def test_only_requested_rows_are_looked_up() -> None:
    asked = Asked()
    rows1, rows2 = np.arange(7, 5000, 9)[:400], np.arange(2000, 2300)
    matches = asked.match(0, 2, rows1=rows1, rows2=rows2)
    found1, found2 = (rows[rows != NO_ROW] for rows in matches.matches_idx.T)
    assert 100 < len(found1) < 400
    assert 100 < len(found2) <= 300
    assert np.isin(found1, rows1).all()
    assert np.isin(found2, rows2).all()
    nothing = np.empty(0, np.int64)
    assert len(asked.match(0, 2, rows1=nothing, rows2=nothing)) == 0


# -- how it is spoilt -----------------------------------------------------------------------------


@pytest.mark.parametrize("noise_px", [0.3, 1.0, 2.5])
def test_ends_are_as_noisy_as_configured(noise_px: float) -> None:
    there = landings(Asked(noise_px=noise_px))
    assert len(there.rows) > 2000
    for errors_px in there.errors_xy.T:
        assert 0.93 * noise_px < errors_px.std() < 1.07 * noise_px
        assert abs(errors_px.mean()) < 0.1 * noise_px
    assert abs(np.corrcoef(there.errors_xy.T)[0, 1]) < 0.1


@pytest.mark.parametrize("outlier_ratio", [0.0, 0.1, 0.4, 1.0])
def test_as_many_matches_as_configured_end_anywhere(outlier_ratio: float) -> None:
    there = landings(Asked(outlier_ratio=outlier_ratio))
    is_wrong = there.errors_px > 0.02
    assert abs(is_wrong.mean() - outlier_ratio) < 0.03
    if outlier_ratio:
        wrong_xy = there.ends_xy[is_wrong]
        assert ((wrong_xy >= 0) & (wrong_xy <= SIZE)).all()
        assert np.abs(wrong_xy.mean(axis=0) / SIZE - 0.5).max() < 0.1
        assert (wrong_xy.std(axis=0) / SIZE > 0.25).all()


@pytest.mark.parametrize("exposed_ratio", [0.0, 0.5, 1.0])
def test_confidence_gives_away_as_many_outliers_as_configured(exposed_ratio: float) -> None:
    there = landings(Asked(outlier_ratio=0.4, exposed_outlier_ratio=exposed_ratio))
    is_wrong = there.errors_px > 0.02
    is_doubtful = there.confidence < 0.5
    assert ((there.confidence >= 0.0) & (there.confidence <= 1.0)).all()
    assert not is_doubtful[~is_wrong].any()
    assert abs(is_doubtful[is_wrong].mean() - exposed_ratio) < 0.06


def test_whole_regions_are_dropped_in_both_images() -> None:
    holey = Asked(dropped_ratio=0.3)
    everything, kept = landings(Asked()), landings(holey)
    assert 0.3 < len(kept.rows) / len(everything.rows) < 0.7  # 0.7 in each of the images
    keypoints_xy = holey.features[0].keypoints_xy
    for before_xy, after_xy in (
        (keypoints_xy[everything.rows], keypoints_xy[kept.rows]),
        (everything.ends_xy, kept.ends_xy),
    ):
        is_lost = (cell_counts(before_xy) > 20) & (cell_counts(after_xy) == 0)
        assert is_lost.sum() >= 5, "some cells have lost everything"


def cell_counts(points_xy: Float64Array) -> Int64Array:
    """How many points (N, 2) each of 8 x 8 cells of the image holds, (64,)."""
    columns, lines = (points_xy * 8 / SIZE).astype(int).T
    return np.bincount(8 * lines + columns, minlength=64)


def test_a_frame_loses_the_same_regions_whatever_it_is_matched_with() -> None:
    asked = Asked(dropped_ratio=0.3)
    lost = []
    for second in (1, 2):
        visible = is_visible(asked, first=0, second=second)
        seen = cell_counts(asked.features[0].keypoints_xy[visible])
        kept = cell_counts(asked.features[0].keypoints_xy[landings(asked, second=second).rows])
        lost.append((seen > 10) & (kept == 0))
    # What is lost in all pairs is the frame's own; the others lose some more.
    assert (lost[0] & lost[1]).sum() >= 5


def test_when_everything_is_dropped_nothing_is_matched() -> None:
    assert len(Asked(dropped_ratio=1.0).match(0, 2)) == 0


# -- depths and focal lengths ---------------------------------------------------------------------


@pytest.mark.parametrize("noise_ratio", [0.0, 0.05, 0.2])
def test_depths_are_as_noisy_as_configured(noise_ratio: float) -> None:
    there = landings(Asked(depth_noise_ratio=noise_ratio))
    for index, depths_m in zip((0, 2), there.depths_m.T, strict=True):
        true_m = transform_points(true_scene.POSES[index], there.points)[:, 2]
        relative = depths_m / true_m - 1.0
        assert 0.93 * noise_ratio <= relative.std() < 1.07 * noise_ratio + 1e-3
        assert abs(relative.mean()) < 0.01
        assert (depths_m >= 0).all()


def test_depths_of_the_way_back_belong_to_their_images() -> None:
    asked = Asked()
    matches = asked.match(0, 3)
    is_back = matches.matches_idx[:, 0] == NO_ROW
    points = points_at(3, asked.features[3].keypoints_xy[matches.matches_idx[is_back, 1]])
    for index, depths_m in zip((0, 3), matches.depths_m[is_back].T, strict=True):
        true_m = transform_points(true_scene.POSES[index], points)[:, 2]
        assert np.abs(depths_m / true_m - 1.0).max() < 1e-2


def test_depths_are_left_out_when_configured() -> None:
    matches = Asked(reports_depths=False).match(0, 2)
    assert len(matches) > 2000
    assert not matches.depths_m.any()


def test_focal_lengths_are_returned_where_they_are_wanted() -> None:
    asked = Asked()
    assert asked.match(0, 2).focal_px == (0.0, 0.0)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    focal_px = [asked.match(*pair, wants_pointmaps=True).focal_px for pair in pairs]
    ratios = np.array(focal_px).ravel() / FOCAL_PX
    assert 0.005 < ratios.std() < 0.04
    assert np.abs(ratios - 1.0).max() < 0.1
    secret = Asked(reports_focal_length=False)
    assert secret.match(0, 2, wants_pointmaps=True).focal_px == (0.0, 0.0)


# -- repeating ------------------------------------------------------------------------------------


def same(one: PairMatches, other: PairMatches) -> bool:
    names = ("matches_idx", "points1_xy", "points2_xy", "confidence", "depths_m")
    return one.focal_px == other.focal_px and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in names
    )


def test_a_pair_is_spoilt_in_the_same_way_however_often_and_in_whatever_order() -> None:
    asked, again = Asked(OracleConfig()), Asked(OracleConfig())
    requests = [asked.request(0, 1), asked.request(0, 2), asked.request(1, 2)]
    batch = asked.oracle.match(requests)
    assert [matches.pair for matches in batch] == [request.pair for request in requests]
    backwards = [again.match(1, 2), again.match(0, 2), again.match(0, 1), again.match(0, 2)]
    assert all(map(same, batch, (backwards[2], backwards[1], backwards[0])))
    assert same(backwards[1], backwards[3])


def test_another_seed_spoils_in_another_way() -> None:
    one, other = (landings(Asked(OracleConfig(), seed=seed), second=1) for seed in (1, 2))
    assert np.array_equal(one.rows, other.rows)
    assert (one.ends_xy != other.ends_xy).all()


def test_the_truth_of_a_frame_is_rendered_once_while_it_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked()
    for pair in ((0, 1), (0, 2), (1, 2), (0, 1)):
        asked.match(*pair)
    assert asked.truths == [0, 1, 2]
    monkeypatch.setattr(oracle_module, "_MAX_VIEWS_KEPT", 2)
    asked.match(0, 3)
    asked.match(0, 3)
    assert asked.truths == [0, 1, 2, 3]
    asked.match(1, 2)
    assert asked.truths == [0, 1, 2, 3, 1, 2]


# -- views ----------------------------------------------------------------------------------------


def test_depths_on_a_plane_are_exact_between_pixels_and_unknown_across_edges() -> None:
    points_xy = np.random.default_rng(0).uniform((0.5, 0.5), (319.5, 239.5), (4000, 2))
    depths = true_view(1).depths_at(points_xy)
    points = points_at(1, points_xy)
    is_sky, is_known = ~np.isfinite(points).all(axis=1), np.isfinite(depths)
    true_depths = transform_points(true_scene.POSES[1], points[is_known])[:, 2]
    assert not is_known[is_sky].any()
    assert is_known[~is_sky].mean() > 0.9
    errors = np.abs(depths[is_known] / true_depths - 1.0)
    assert np.quantile(errors, 0.98) < 1e-5
    assert errors.max() < 0.02


def test_a_pixel_has_its_depth_at_its_centre() -> None:
    view = true_view(0)
    columns, lines = np.array([10, 200, 319, 0]), np.array([230, 239, 239, 239])
    depths = view.depths_at(np.column_stack([columns, lines]) + 0.5)
    assert np.allclose(depths, view.depth_m[lines, columns])


def test_what_a_view_shows_is_projected_back_to_where_it_was() -> None:
    view = true_view(3)
    points_xy = np.random.default_rng(1).uniform((0.0, 100.0), SIZE, (500, 2))
    points, depths = view.points_in_world(points_xy)
    is_known = np.isfinite(depths)
    projected_xy, projected_depths = view.project(points[is_known])
    assert is_known.sum() > 400
    assert np.abs(projected_xy - points_xy[is_known]).max() < 1e-9
    assert np.allclose(projected_depths, depths[is_known])
    assert view.is_inside(projected_xy).all()
    assert view.size == SIZE


def test_a_view_does_not_change_and_may_hold_sky() -> None:
    given = np.full((4, 5), np.inf, np.float32)
    view = TrueView(depth_m=given, cam_from_world=np.eye(4)[:3], intrinsics=(5.0, 5.0, 2.5, 2.0))
    with pytest.raises(ValueError, match="read-only"):
        view.depth_m[0, 0] = 1.0
    with pytest.raises(ValueError, match="cam_from_world"):
        TrueView(depth_m=given, cam_from_world=np.eye(4), intrinsics=(5.0, 5.0, 2.5, 2.0))


# -- places ---------------------------------------------------------------------------------------


def places_with(indices: Sequence[int]) -> tuple[OraclePlaces, list[Features]]:
    asked = Asked()
    places = OraclePlaces(asked.oracle)
    for index in indices:
        places.add(asked.features[index])
    return places, asked.features


def ids(hits: list[tuple[FrameId, float]]) -> list[int]:
    return [int(frame_id) for frame_id, _ in hits]


def test_places_are_ranked_by_what_they_share() -> None:
    places, _ = places_with(range(5))
    hits = places.query(FrameId(1), exclude=(), limit=10)
    assert ids(hits) == [2, 3, 4], "the nearer, the more; the one that faces back not at all"
    scores = [score for _, score in hits]
    assert scores == sorted(scores, reverse=True)
    assert 0.5 < scores[-1] < scores[0] <= 1.0
    assert places.query(FrameId(5), exclude=(), limit=10) == []


def test_places_are_limited_and_excluded() -> None:
    places, _ = places_with(range(5))
    assert ids(places.query(FrameId(1), exclude=(), limit=1)) == [2]
    assert ids(places.query(FrameId(1), exclude={FrameId(2), FrameId(9)}, limit=10)) == [3, 4]
    assert places.query(FrameId(1), exclude=(), limit=0) == []


def test_a_place_is_added_once_and_before_it_is_queried() -> None:
    places, features = places_with([0, 1])
    with pytest.raises(ValueError, match="keyframe 2 was added before"):
        places.add(features[1])
    with pytest.raises(KeyError):
        places.query(FrameId(3), exclude=(), limit=3)
    places.add(features[2])
    assert ids(places.query(FrameId(3), exclude=(), limit=3)) == [2, 1]


def test_a_frame_that_shows_only_sky_is_like_no_other() -> None:
    def truth(index: int) -> TrueView:
        view = true_view(index)
        if index == 1:
            sky = np.full_like(view.depth_m, np.inf)
            return TrueView(
                depth_m=sky, cam_from_world=view.cam_from_world, intrinsics=view.intrinsics
            )
        return view

    oracle = OracleMatcher(EXACT, dense=DENSE, truth=truth, seed=0)
    places = OraclePlaces(oracle)
    for index in (0, 1, 2):
        places.add(oracle.describe(frame_of(index)))
    assert ids(places.query(FrameId(1), exclude=(), limit=5)) == [3]
