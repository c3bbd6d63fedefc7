"""Dense matches are selected, and their ends become keypoints: shared ones, else one to a cell."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.config import DenseMatchingConfig
from engine.matching.keypoint_tables import KeypointTable, KeypointTables, Size, select_matches
from engine.types import NO_ROW, Float64Array, FrameId, ImagePair, Int64Array, PairMatches
from tests.support.dense_world import table_of
from tests.support.textured_images import features_at

ONE, TWO, THREE = FrameId(1), FrameId(2), FrameId(3)
WIDTH, HEIGHT = SIZE = (1000, 750)
GRID = (20, 15)
CELL_PX = 50.0
CONFIG = DenseMatchingConfig(merge_radius_px=2.0, expected_radius_px=6.0)
SELECTION = DenseMatchingConfig(min_confidence=0.5, border_px=6.0, max_matches_per_pair=2000)
NOTHING_EXPECTED = np.empty((0, 2), np.int64)

Place = tuple[float, float]
# Keypoints of both keyframes, the fixed rows 0, 1, 2: none on the edge of a cell.
FIXED_XY = np.array([(110.0, 110.0), (310.0, 210.0), (610.0, 410.0)])


def tables_with(
    fixed_xy: Float64Array = FIXED_XY,
    *,
    size: tuple[int, int] = SIZE,
    config: DenseMatchingConfig = CONFIG,
) -> KeypointTables:
    """Three keyframes whose tables start alike."""
    tables = KeypointTables(config)
    for frame_id in (ONE, TWO, THREE):
        tables.add(table_of(fixed_xy, size=size, grid=GRID, frame_id=frame_id), size=size)
    return tables


def keypoints_xy(tables: KeypointTables, frame_id: FrameId) -> Float64Array:
    return tables.features(frame_id).keypoints_xy


def free_row(place: Place, *, num_fixed: int = len(FIXED_XY)) -> int:
    """The free row of the cell of a place, as tables start."""
    column, line = (int(v // CELL_PX) for v in place)
    return num_fixed + GRID[0] * line + column


def looked_up(
    tables: KeypointTables,
    rows: Sequence[int] | Int64Array,
    ends_xy: Sequence[Place] | Float64Array,
    *,
    confidence: Sequence[float] | None = None,
    own: FrameId = ONE,
    other: FrameId = TWO,
) -> PairMatches:
    """Matches of rows of one keyframe that end at places of another."""
    num, is_first = len(rows), own < other
    columns = (np.asarray(rows, np.int64), np.full(num, NO_ROW))
    points_xy = (
        keypoints_xy(tables, own)[columns[0]],
        np.asarray(ends_xy, np.float64).reshape(-1, 2),
    )
    return PairMatches(
        pair=ImagePair.of(own, other),
        matches_idx=np.column_stack(columns if is_first else columns[::-1]),
        points1_xy=points_xy[0 if is_first else 1],
        points2_xy=points_xy[1 if is_first else 0],
        confidence=np.asarray(confidence or np.linspace(1.0, 0.5, num), np.float32),
    )


def looked_up_back(
    tables: KeypointTables, rows: Sequence[int], ends_xy: Sequence[Place], **more: Any
) -> PairMatches:
    """Matches of rows of the second keyframe that end at places of the first."""
    return looked_up(tables, rows, ends_xy, **{"own": TWO, "other": ONE, **more})


def concatenated(*parts: PairMatches) -> PairMatches:
    names = ("matches_idx", "points1_xy", "points2_xy", "confidence", "depths_m")
    together: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    return dataclasses.replace(parts[0], **together)


def unknown(ends_xy: Float64Array) -> Int64Array:
    """Third keyframes lead nowhere from any of the ends."""
    return np.full(len(ends_xy), NO_ROW)


def place(
    tables: KeypointTables, matches: PairMatches, *, expected: Int64Array = NOTHING_EXPECTED
) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in tables.rows_of(matches, expected=expected)]


# -- selecting matches ----------------------------------------------------------------------------


def matches_at(points1_xy: Any, *, points2_xy: Any = None, confidence: Any = None) -> PairMatches:
    """Matches of row k of the first image; by default to the middle of the second one."""
    first_xy = np.asarray(points1_xy, np.float64).reshape(-1, 2)
    num = len(first_xy)
    return PairMatches(
        pair=ImagePair(FrameId(1), FrameId(2)),
        matches_idx=np.column_stack([np.arange(num), np.full(num, NO_ROW)]),
        points1_xy=first_xy,
        points2_xy=np.full((num, 2), 300.0) if points2_xy is None else points2_xy,
        confidence=np.asarray(np.ones(num) if confidence is None else confidence, np.float32),
        depths_m=np.column_stack([np.arange(num), np.arange(num) + 0.5]).astype(np.float32),
    )


def rows_kept(
    matches: PairMatches, *, sizes: tuple[Size, Size] = (SIZE, SIZE), **settings: Any
) -> list[int]:
    config = SELECTION.model_copy(update=settings)
    kept = select_matches(matches, sizes=sizes, config=config)
    rows: list[int] = kept.matches_idx[:, 0].tolist()
    return rows


def scattered(num: int, *, seed: int = 0) -> Float64Array:
    return np.random.default_rng(seed).uniform((20.0, 20.0), (980.0, 730.0), (num, 2))


def test_matches_are_kept_from_the_least_confidence_on() -> None:
    matches = matches_at(scattered(4), confidence=[0.5, 0.49, 1.0, 0.0])
    assert sorted(rows_kept(matches)) == [0, 2]
    assert sorted(rows_kept(matches, min_confidence=0.0)) == [0, 1, 2, 3]


INSIDE = [(6.0, 6.0), (994.0, 6.0), (6.0, 744.0), (994.0, 744.0), (500.0, 375.0)]
AT_THE_EDGE = [(5.9, 300.0), (300.0, 5.9), (994.1, 300.0), (300.0, 744.1), (-3.0, 300.0)]


@pytest.mark.parametrize("side", [1, 2])
def test_matches_at_the_edge_of_either_image_are_left_out(side: int) -> None:
    points_xy = np.array([*INSIDE, *AT_THE_EDGE])
    if side == 1:
        matches = matches_at(points_xy)
    else:
        matches = matches_at(np.full((10, 2), 300.0), points2_xy=points_xy)
    assert sorted(rows_kept(matches)) == [0, 1, 2, 3, 4]


def test_the_border_grows_with_each_image() -> None:
    matches = matches_at([(10.0, 300.0), (30.0, 300.0)], points2_xy=np.full((2, 2), 4.0))
    small = (500, 375)
    assert rows_kept(matches, sizes=((1000, 750), small)) == [0, 1]
    assert rows_kept(matches, sizes=((2000, 1500), small)) == [1]
    assert rows_kept(matches, sizes=((1000, 750), (1000, 750))) == []


def test_without_a_border_everything_inside_is_kept() -> None:
    matches = matches_at([(0.0, 0.0), (1000.0, 750.0), (1000.1, 3.0)])
    assert rows_kept(matches, border_px=0.0) == [0, 1]


def test_of_too_many_the_most_confident_of_each_part_of_the_image_are_kept() -> None:
    confidence = np.random.default_rng(1).uniform(0.5, 1.0, 3000).astype(np.float32)
    matches = matches_at(scattered(3000), confidence=confidence)
    rows = rows_kept(matches, max_matches_per_pair=288)
    assert len(rows) == 288
    columns, lines = (matches.points1_xy * 12 / SIZE).astype(int).T
    cells = 12 * lines + columns
    for cell in range(144):
        own = np.flatnonzero(cells == cell)
        best = own[np.argsort(-confidence[own])]
        kept = [row for row in rows if cells[row] == cell]
        assert set(kept) == set(best[: len(kept)].tolist())
        assert 1 <= len(kept) <= 3


def test_few_are_all_kept_the_most_confident_first() -> None:
    confidence = [0.6, 0.9, 0.5, 0.8]
    assert rows_kept(matches_at(scattered(4), confidence=confidence)) == [1, 3, 0, 2]


def test_what_belongs_to_a_match_stays_with_it() -> None:
    matches = matches_at(
        scattered(50), points2_xy=scattered(50, seed=2), confidence=np.linspace(0.0, 1.0, 50)
    )
    kept = select_matches(matches, sizes=(SIZE, SIZE), config=SELECTION)
    rows = kept.matches_idx[:, 0]
    assert 20 <= len(rows) <= 25
    for name in ("points1_xy", "points2_xy", "confidence", "depths_m"):
        assert np.array_equal(getattr(kept, name), getattr(matches, name)[rows])


def test_nothing_gives_nothing() -> None:
    assert rows_kept(matches_at([])) == []
    assert rows_kept(matches_at(scattered(3), confidence=np.zeros(3))) == []


# -- ends of matches ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [(0.0, 0.0), (1.8, 0.0), (0.0, -1.8), (-1.2, 1.2)])
def test_an_end_near_a_keypoint_becomes_that_keypoint_which_stays(offset: Place) -> None:
    tables = tables_with()
    end = (310.0 + offset[0], 210.0 + offset[1])
    assert place(tables, looked_up(tables, [0], [end])) == [(0, 1)]
    assert np.array_equal(keypoints_xy(tables, TWO)[:3], FIXED_XY)
    assert tables.features(TWO).fixed_rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("offset", [(2.1, 0.0), (0.0, -2.1), (1.6, 1.6)])
def test_an_end_beside_all_keypoints_claims_the_free_row_of_its_cell(offset: Place) -> None:
    tables = tables_with()
    end = (310.0 + offset[0], 210.0 + offset[1])
    row = free_row(end)
    assert place(tables, looked_up(tables, [0], [end])) == [(0, row)]
    assert keypoints_xy(tables, TWO)[row].tolist() == list(end)
    assert tables.features(TWO).fixed_rows.tolist() == [0, 1, 2, row]
    # From now on it is a keypoint as others are.
    end_near = (end[0] + 1.0, end[1])
    assert place(tables, looked_up(tables, [2], [end_near])) == [(2, row)]
    assert keypoints_xy(tables, TWO)[row].tolist() == list(end)


def test_both_images_are_treated_alike() -> None:
    ends = [(311.0, 210.0), (820.0, 330.0)]
    tables, mirror = tables_with(), tables_with()
    there = looked_up(tables, [0, 1], ends)
    assert place(tables, there) == [(0, 1), (1, free_row(ends[1]))]
    back = looked_up_back(mirror, [0, 1], ends)
    assert place(mirror, back) == [(1, 0), (free_row(ends[1]), 1)]
    assert np.array_equal(keypoints_xy(tables, TWO), keypoints_xy(mirror, ONE))


def test_one_cell_gives_one_keypoint_to_the_most_confident_match() -> None:
    tables = tables_with()
    ends = [(820.0, 330.0), (840.0, 340.0)]
    matches = looked_up(tables, [0, 1], ends, confidence=[0.6, 0.9])
    assert place(tables, matches) == [(1, free_row(ends[1]))]
    assert keypoints_xy(tables, TWO)[free_row(ends[0])].tolist() == [840.0, 340.0]


def test_an_end_beside_what_just_took_its_cell_becomes_that_keypoint() -> None:
    tables = tables_with()
    # Both rows of the first keyframe show one thing: only one of them can be its keypoint.
    ends = [(820.0, 330.0), (821.0, 330.0)]
    there = looked_up(tables, [0], ends[:1])
    back = looked_up_back(tables, [1], ends[1:])
    assert place(tables, there) == [(0, free_row(ends[0]))]
    assert place(tables, back) == [(free_row(ends[1]), 1)]
    both = looked_up(tables, [1, 2], ends)
    assert place(tables, both) == [(1, free_row(ends[0]))]


def test_ends_at_the_very_edge_of_the_image_have_their_cells() -> None:
    tables = tables_with()
    ends = [(0.0, 0.0), (1000.0, 750.0)]
    rows = [free_row((1.0, 1.0)), free_row((999.0, 749.0))]
    assert place(tables, looked_up(tables, [0, 1], ends)) == [(0, rows[0]), (1, rows[1])]
    assert keypoints_xy(tables, TWO)[rows].tolist() == [[0.0, 0.0], [1000.0, 750.0]]


@pytest.mark.parametrize(("edge_px", "merges"), [(500, False), (1000, True), (4000, True)])
def test_the_merge_radius_grows_with_the_image(edge_px: int, merges: bool) -> None:
    """1.5 px are within 2 px at an edge of 1000 px, and beyond 1 px at one of 500."""
    tables = tables_with(np.array([(210.0, 110.0)]), size=(edge_px, edge_px * 3 // 4))
    ((_, row),) = place(tables, looked_up(tables, [0], [(211.5, 110.0)]))
    assert (row == 0) == merges
    tables = tables_with(np.array([(210.0, 110.0)]), size=(edge_px, edge_px * 3 // 4))
    far_px = 2.1 * edge_px / 1000
    ((_, row),) = place(tables, looked_up(tables, [0], [(210.0 + far_px, 110.0)]))
    assert row > 0


def ends_near_keypoints(table: KeypointTable, rng: np.random.Generator) -> Float64Array:
    """Ends (N, 2) at up to 4 px from each keypoint that stays."""
    features = table.features()
    stay_xy = features.keypoints_xy[features.fixed_rows]
    angles, radii_px = rng.uniform((0.0, 0.0), (2.0 * np.pi, 4.0), (len(stay_xy), 2)).T
    offsets = radii_px[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    return np.asarray(np.clip(stay_xy + offsets, 0.0, SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("grows", [False, True], ids=["all at once", "one after the other"])
def test_ends_find_the_keypoint_next_to_them_and_none_beyond_the_radius(grows: bool) -> None:
    """Keypoints share a raster, so in a crowd of 5 % an end may miss a keypoint or its nearest."""
    rng = np.random.default_rng(0)
    crowd_xy = rng.uniform((0.0, 0.0), SIZE, (3000, 2))
    table = KeypointTable(
        table_of(crowd_xy[:1000] if grows else crowd_xy, size=SIZE, grid=(80, 60)),
        size=SIZE,
        config=CONFIG,
    )
    for some_xy in np.array_split(crowd_xy[1000:], 10) if grows else []:
        table.place(some_xy, expected_rows=unknown(some_xy))
    before = table.features()
    stay_xy = before.keypoints_xy[before.fixed_rows]
    ends_xy = ends_near_keypoints(table, rng)
    distances_px = np.linalg.norm(ends_xy[:, None] - stay_xy[None], axis=2)

    rows = table.place(ends_xy, expected_rows=unknown(ends_xy))
    is_known = np.isin(rows, before.fixed_rows)
    found_px = np.linalg.norm(ends_xy - before.keypoints_xy[rows], axis=1)[is_known]
    is_near = distances_px.min(axis=1) <= 2.0
    assert len(stay_xy) > 2000
    assert found_px.max() <= 2.0
    assert not is_known[~is_near].any()
    assert is_known[distances_px.min(axis=1) < 1.4].mean() > 0.98
    assert is_known[is_near].mean() > 0.95
    assert (found_px - distances_px.min(axis=1)[is_known] < 0.01).mean() > 0.95


def coloured(tables: KeypointTables, frame_id: FrameId, *, red: int) -> None:
    """Gives every keypoint of a keyframe that starts a colour of its image."""
    features = tables.features(frame_id)
    colors = np.full((len(features), 3), (red, 0, 0), np.uint8)
    tables.add(dataclasses.replace(features, colors=colors), size=SIZE)


def test_a_row_that_moved_has_the_colour_of_what_it_matches() -> None:
    tables = tables_with()
    coloured(tables, ONE, red=10)
    coloured(tables, TWO, red=20)
    end, moved = (820.0, 330.0), free_row((820.0, 330.0))
    assert place(tables, looked_up(tables, [0], [end])) == [(0, moved)]
    others = np.delete(tables.features(TWO).colors[:, 0], moved)
    assert tables.features(TWO).colors[moved, 0] == 10
    assert (others == 20).all()
    assert (tables.features(ONE).colors[:, 0] == 10).all(), "what stayed keeps its own"
    # Seen again, from another image, it keeps the colour that it has.
    coloured(tables, THREE, red=30)
    assert place(tables, looked_up(tables, [1], [end], own=TWO, other=THREE))
    assert tables.features(TWO).colors[moved, 0] == 10


# -- rows that third keyframes expect -------------------------------------------------------------


def test_an_end_near_the_expected_keypoint_becomes_it_whatever_is_nearer() -> None:
    fixed_xy = np.array([(110.0, 110.0), (310.0, 210.0), (314.0, 210.0)])
    for expected, row in ((NOTHING_EXPECTED, 2), (np.array([[0, 1]]), 1)):
        tables = tables_with(fixed_xy)
        matches = looked_up(tables, [0], [(314.5, 210.0)])
        assert place(tables, matches, expected=expected) == [(0, row)]


def test_an_end_far_from_the_expected_keypoint_contradicts_it_and_is_left_out() -> None:
    tables = tables_with()
    end = (310.0 + 6.1, 210.0)
    matches = looked_up(tables, [0, 2], [end, (610.0, 410.0)])
    assert place(tables, matches, expected=np.array([[0, 1]])) == [(2, 2)]
    assert tables.features(TWO).fixed_rows.tolist() == [0, 1, 2], "nothing was claimed for it"
    assert place(tables, matches) == [(0, free_row(end)), (2, 2)]


def test_what_is_expected_counts_in_both_directions() -> None:
    expected = np.array([[0, 1], [2, 0]])
    end = (313.0, 210.0)
    tables = tables_with()
    assert place(tables, looked_up(tables, [0], [end]), expected=expected) == [(0, 1)]
    assert place(tables, looked_up(tables, [1], [end]), expected=expected) == [(1, free_row(end))]
    tables = tables_with()
    back = looked_up_back(tables, [1], [(114.0, 110.0)])
    assert place(tables, back, expected=np.array([[0, 1]])) == [(0, 1)]


def test_of_several_expected_keypoints_the_last_counts() -> None:
    fixed_xy = np.array([(110.0, 110.0), (310.0, 210.0), (314.0, 210.0)])
    for order in ([1, 2], [2, 1]):
        tables = tables_with(fixed_xy)
        expected = np.array([[0, row] for row in order])
        assert place(tables, looked_up(tables, [0], [(312.0, 210.0)]), expected=expected) == [
            (0, order[-1])
        ]


def test_the_expected_radius_grows_with_the_image() -> None:
    for edge_px, follows in ((500, False), (2000, True)):
        tables = tables_with(np.array([(110.0, 110.0)]), size=(edge_px, edge_px * 3 // 4))
        matches = looked_up(tables, [0], [(115.0, 110.0)])  # 5 px beside it
        found = place(tables, matches, expected=np.array([[0, 0]]))
        assert found == ([(0, 0)] if follows else [])


# -- rows that were looked up ---------------------------------------------------------------------


def test_a_free_row_that_was_looked_up_stays_where_it_stood() -> None:
    tables = tables_with()
    row = free_row((820.0, 330.0))
    center = keypoints_xy(tables, ONE)[row].tolist()
    assert place(tables, looked_up(tables, [row], [(310.0, 210.0)])) == [(row, 1)]
    assert keypoints_xy(tables, ONE)[row].tolist() == center
    # An end elsewhere in its cell cannot move it.
    back = looked_up_back(tables, [0], [(820.0, 330.0)])
    assert place(tables, back) == []
    assert keypoints_xy(tables, ONE)[row].tolist() == center


def test_a_row_is_fixed_before_ends_of_the_same_matches_could_move_it() -> None:
    tables = tables_with()
    row = free_row((820.0, 330.0))
    there = looked_up(tables, [row], [(310.0, 210.0)], confidence=[0.5])
    back = looked_up_back(tables, [0], [(820.0, 330.0)], confidence=[1.0])
    assert place(tables, concatenated(back, there)) == [(row, 1)]
    assert keypoints_xy(tables, ONE)[row].tolist() == [825.0, 325.0]


def test_a_row_that_moved_since_it_was_looked_up_is_not_taken_for_its_former_place() -> None:
    """Pairs of a batch are looked up together; the first may claim what the second looked up."""
    tables = tables_with()
    row = free_row((820.0, 330.0))
    asked_before = looked_up(tables, [row, 0], [(310.0, 210.0), (110.0, 110.0)])
    claiming = looked_up_back(tables, [1], [(810.0, 340.0)], own=THREE)
    assert place(tables, claiming) == [(row, 1)]
    assert place(tables, asked_before) == [(0, 0)], "its cell is taken now"
    assert keypoints_xy(tables, ONE)[row].tolist() == [810.0, 340.0]


def test_a_row_that_moved_less_than_the_merge_radius_is_still_the_keypoint() -> None:
    tables = tables_with()
    row = free_row((820.0, 330.0))
    asked_before = looked_up(tables, [row], [(310.0, 210.0)])
    claiming = looked_up_back(tables, [1], [(826.0, 326.0)], own=THREE)
    assert place(tables, claiming) == [(row, 1)]
    assert place(tables, asked_before) == [(row, 1)]
    assert keypoints_xy(tables, ONE)[row].tolist() == [826.0, 326.0]


# -- laws -----------------------------------------------------------------------------------------


def random_matches(
    tables: KeypointTables, pair: tuple[FrameId, FrameId], rng: np.random.Generator
) -> PairMatches:
    """Rows of both tables that end anywhere in the other image, many of them at keypoints."""
    parts = []
    for own, other in (pair, pair[::-1]):
        rows = rng.choice(len(tables.features(own)), 150, replace=False)
        ends_xy = rng.uniform((0.0, 0.0), SIZE, (150, 2))
        at_keypoints_xy = rng.permutation(keypoints_xy(tables, other))[:75]
        ends_xy[::2] = np.clip(at_keypoints_xy + rng.normal(size=(75, 2)), 0.0, SIZE)
        parts.append(looked_up(tables, rows, ends_xy, own=own, other=other))
    both = concatenated(*parts)
    # Distinct ones: of the same confidence, the order decides.
    confidence = 0.5 + 0.5 * rng.permutation(len(both)) / len(both)
    return dataclasses.replace(both, confidence=confidence.astype(np.float32))


PAIRS = [(ONE, TWO), (ONE, THREE), (TWO, THREE), (ONE, TWO), (TWO, THREE)]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_matched_tables_keep_their_laws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = tables_with(rng.uniform((5.0, 5.0), (995.0, 745.0), (60, 2)))
    for pair in PAIRS:
        before = {i: tables.features(i) for i in (ONE, TWO, THREE)}
        matches = random_matches(tables, pair, rng)
        expected = rng.integers(0, len(before[ONE]), (40, 2))
        for side in range(2):  # only keypoints that stay are expected
            expected[:, side] = rng.choice(before[pair[side]].fixed_rows, 40)
        rows = tables.rows_of(matches, expected=expected)
        assert len(rows) > 50
        for side, frame_id in enumerate(pair):
            assert len(np.unique(rows[:, side])) == len(rows), "one to one"
            assert not tables.features(frame_id).is_free[rows[:, side]].any()
        for frame_id, former in before.items():
            now = tables.features(frame_id)
            assert len(now) == len(former)
            stayed = former.fixed_rows
            assert not now.is_free[stayed].any()
            assert np.array_equal(now.keypoints_xy[stayed], former.keypoints_xy[stayed])
            moved = np.flatnonzero((now.keypoints_xy != former.keypoints_xy).any(axis=1))
            assert former.is_free[moved].all()
            assert not now.is_free[moved].any()
            # Claimed rows are where matches ended, within their own cells.
            ends_xy = dict(zip(pair, (matches.points1_xy, matches.points2_xy), strict=True))
            ended = {tuple(xy) for xy in ends_xy.get(frame_id, np.empty((0, 2))).tolist()}
            assert {tuple(xy) for xy in now.keypoints_xy[moved].tolist()} <= ended
            shifts_px = np.abs(now.keypoints_xy[moved] - former.keypoints_xy[moved])
            assert not len(moved) or shifts_px.max() <= CELL_PX / 2 + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_a_pairs_matches_does_not_matter(seed: int) -> None:
    """Their confidence decides; matches of the same confidence go by their order."""
    outcomes = []
    for shuffle in (False, True):
        rng = np.random.default_rng(seed)
        tables = tables_with(rng.uniform((5.0, 5.0), (995.0, 745.0), (60, 2)))
        for pair in PAIRS[:3]:
            matches = random_matches(tables, pair, rng)
            if shuffle:
                order = np.random.default_rng((seed, 1)).permutation(len(matches))
                matches = matches.take(order)
            rows = tables.rows_of(matches, expected=NOTHING_EXPECTED)
            outcomes.append((rows, [tables.features(i).keypoints_xy for i in (ONE, TWO, THREE)]))
    for (rows, tables_xy), (shuffled_rows, shuffled_xy) in zip(
        outcomes[:3], outcomes[3:], strict=True
    ):
        assert np.array_equal(rows, shuffled_rows)
        assert np.array_equal(tables_xy, shuffled_xy)


def test_letting_rasters_go_hardly_changes_anything() -> None:
    """A raster made anew shows the nearest of crowded keypoints where it showed the newest."""
    rng = np.random.default_rng(3)
    kept = tables_with(rng.uniform((5.0, 5.0), (995.0, 745.0), (60, 2)))
    forgetful = copy.deepcopy(kept)
    for pair in PAIRS:
        matches = random_matches(kept, pair, rng)
        rows, others = set(place(kept, matches)), set(place(forgetful, matches))
        assert len(rows & others) > 0.95 * len(rows | others)
        forgetful.drop_rasters()


def test_a_keypoint_is_matched_once_by_the_most_confident_match() -> None:
    tables = tables_with()
    ends = [(310.5, 210.0), (310.0, 210.5), (110.0, 110.0)]
    matches = looked_up(tables, [0, 1, 2], ends, confidence=[0.6, 0.9, 0.7])
    assert place(tables, matches) == [(1, 1), (2, 0)]
    both_ways = concatenated(
        looked_up(tables, [0], [(310.0, 210.0)]), looked_up_back(tables, [1], [(110.0, 110.0)])
    )
    assert place(tables, both_ways) == [(0, 1)]


def test_matches_of_rows_in_both_images_are_taken_as_they_are() -> None:
    tables = tables_with()
    matches = looked_up(tables, [0, 1], [(0.0, 0.0), (0.0, 0.0)])
    rows = np.array([[0, 2], [1, 0]])
    matches = dataclasses.replace(
        matches, matches_idx=rows, points2_xy=keypoints_xy(tables, TWO)[rows[:, 1]]
    )
    assert place(tables, matches) == [(0, 2), (1, 0)]


def test_no_matches_give_no_rows() -> None:
    tables = tables_with()
    rows = tables.rows_of(looked_up(tables, [], []), expected=np.array([[0, 1]]))
    assert rows.shape == (0, 2)
    assert tables.features(ONE).fixed_rows.tolist() == [0, 1, 2]


# -- tables ---------------------------------------------------------------------------------------


def test_a_table_is_made_anew_only_when_it_changed() -> None:
    tables = tables_with()
    first, second = tables.features(ONE), tables.features(TWO)
    place(tables, looked_up(tables, [0], [(311.0, 210.0)]))
    assert tables.features(ONE) is first
    assert tables.features(TWO) is second
    place(tables, looked_up(tables, [0], [(820.0, 330.0)]))
    assert tables.features(ONE) is first
    changed = tables.features(TWO)
    assert changed is not second
    assert changed is tables.features(TWO)
    assert second.is_free[free_row((820.0, 330.0))], "what was handed out stays as it was"
    assert changed.descriptors.shape == second.descriptors.shape


def test_a_sparse_table_is_matched_but_never_grows_or_moves() -> None:
    tables = KeypointTables(CONFIG)
    for frame_id in (ONE, TWO):
        tables.add(features_at(FIXED_XY, frame_id=frame_id), size=SIZE)
    assert place(tables, looked_up(tables, [0, 1], [(311.0, 210.0), (820.0, 330.0)])) == [(0, 1)]
    assert np.array_equal(keypoints_xy(tables, TWO), FIXED_XY)
    assert tables.query_rows(ONE).tolist() == [0, 1, 2]


def test_a_table_without_keypoints_takes_no_match() -> None:
    tables = KeypointTables(CONFIG)
    tables.add(features_at(FIXED_XY, frame_id=1), size=SIZE)
    tables.add(features_at(np.empty((0, 2)), frame_id=2), size=SIZE)
    assert place(tables, looked_up(tables, [0], [(311.0, 210.0)])) == []
    assert tables.query_rows(TWO).tolist() == []


def test_free_rows_that_are_no_grid_are_refused() -> None:
    features = table_of(FIXED_XY, size=SIZE, grid=GRID, frame_id=7)
    crooked_xy = features.keypoints_xy.copy()
    crooked_xy[-1] += 1.0
    with pytest.raises(ValueError, match="keyframe 7: its free rows are not a regular grid"):
        KeypointTables(CONFIG).add(
            dataclasses.replace(features, keypoints_xy=crooked_xy), size=SIZE
        )


def test_depths_are_kept_where_they_are_known() -> None:
    tables = tables_with()
    assert tables.depths_m(ONE).tolist() == [0.0] * len(tables.features(ONE))
    ends = [(310.0, 210.0), (820.0, 330.0)]
    matches = looked_up(tables, [0, 1], ends)
    depths_m = np.array([[3.0, 4.0], [0.0, 6.0]], np.float32)
    place(tables, dataclasses.replace(matches, depths_m=depths_m))
    assert tables.depths_m(ONE)[:3].tolist() == [3.0, 0.0, 0.0]
    assert tables.depths_m(TWO)[[1, free_row(ends[1])]].tolist() == [4.0, 6.0]
    # The latest counts, but for unknown ones.
    place(tables, dataclasses.replace(matches, depths_m=depths_m[::-1]))
    assert tables.depths_m(ONE)[:3].tolist() == [3.0, 3.0, 0.0]
    assert tables.depths_m(TWO)[[1, free_row(ends[1])]].tolist() == [6.0, 4.0]


# -- rows to look up ------------------------------------------------------------------------------


def tables_asking_for(num: int, fixed_xy: Float64Array = FIXED_XY) -> KeypointTables:
    return tables_with(fixed_xy, config=CONFIG.model_copy(update={"max_query_points": num}))


def test_everything_is_looked_up_when_there_is_room() -> None:
    num = len(FIXED_XY) + GRID[0] * GRID[1]
    assert tables_asking_for(num).query_rows(ONE).tolist() == list(range(num))


def test_keypoints_are_looked_up_before_free_rows_of_their_part_of_the_image() -> None:
    rng = np.random.default_rng(0)
    fixed_xy = rng.uniform((5.0, 5.0), (995.0, 745.0), (100, 2))
    rows = tables_asking_for(144, fixed_xy).query_rows(ONE)
    assert len(rows) == 144
    assert (np.diff(rows) > 0).all()
    parts = (keypoints_xy(tables_with(fixed_xy), ONE) * 12 / SIZE).astype(int)
    parts_with_keypoints = {tuple(part) for part in parts[:100].tolist()}
    free = [tuple(part) for part in parts[rows[rows >= 100]].tolist()]
    assert free
    assert not parts_with_keypoints & set(free)


def test_keypoints_with_many_matches_are_looked_up_first() -> None:
    crowd_xy = np.array([(100.0 + 4.0 * k, 100.0) for k in range(10)])  # all in one part
    tables = tables_asking_for(1, crowd_xy)
    assert tables.query_rows(ONE).tolist() == [0]
    for row, times in ((6, 2), (3, 1)):
        for _ in range(times):
            place(tables, looked_up(tables, [row], [tuple(crowd_xy[row])]))
    assert tables.query_rows(ONE).tolist() == [6]
    assert tables.query_rows(TWO).tolist() == [6]
    assert tables.query_rows(THREE).tolist() == [0]
