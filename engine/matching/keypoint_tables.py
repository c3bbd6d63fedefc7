"""Keypoint tables: dense matches are selected, and their ends become keypoints shared by images.

A dense matcher finds the place of one image's keypoint anywhere in another image. Long tracks need
the places found from several images to be one keypoint. So each keyframe owns one table of
keypoints (``Features``), and the end of a match becomes, in this order:

1. the keypoint that a third keyframe already matched to the other end, if it is near by; when that
   one is elsewhere the match contradicts it, and is left out;
2. the nearest keypoint within ``merge_radius_px``;
3. the free row of the cell it falls into, which moves there and stays;
4. nothing, when the cell's row is taken: one keypoint a cell keeps matches spread over the image
   and makes images that see the same things agree on the same keypoints.

No keypoint under an image's mask is looked up, and no match ends there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import DenseMatchingConfig
from engine.geometry import image_scale, spread_over_image, usable_at
from engine.types import (
    NO_ROW,
    BoolArray,
    Features,
    Float32Array,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    PackedMask,
    PairMatches,
    Uint8Array,
    VerifiedPair,
)

Size = tuple[int, int]  # width and height in px

_RASTER_STEPS = 2  # raster cells per merge radius: nearest keypoints are found to half a cell


def select_matches(
    matches: PairMatches, *, sizes: tuple[Size, Size], config: DenseMatchingConfig
) -> PairMatches:
    """Selects the matches worth verifying: confident, not at an image's edge, and spread out.

    Dense matchers match every pixel. At the edges they see half of what they compare; and
    verification samples better from matches that are spread over the image.

    Args:
        matches: all matches of a pair.
        sizes: of the first and of the second image.
        config: thresholds.
    """
    wanted = matches.confidence >= config.min_confidence
    for points_xy, size in zip((matches.points1_xy, matches.points2_xy), sizes, strict=True):
        wanted &= _is_inside(points_xy, size=size, border_px=config.border_px * image_scale(*size))
    order = np.flatnonzero(wanted)
    order = order[np.argsort(-matches.confidence[order], kind="stable")]
    chosen = spread_over_image(
        matches.points1_xy[order], size=sizes[0], limit=config.max_matches_per_pair
    )
    return matches.take(order[chosen])


def _is_inside(points_xy: Float64Array, *, size: Size, border_px: float) -> BoolArray:
    upper = np.asarray(size) - border_px
    return np.asarray(((points_xy >= border_px) & (points_xy <= upper)).all(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TablePlaces:
    """Where the rows (N,) of a table are."""

    keypoints_xy: Float64Array  # (N, 2) px
    is_free: BoolArray  # (N,)
    is_elsewhere: BoolArray  # (N,) than where their colour is from
    is_changed: bool  # since its features were asked for


class KeypointTable:
    """The keypoints of one keyframe; free rows are claimed as matches need them.

    Args:
        features: the table as the matcher made it.
        size: width and height of the image in px.
        config: radii, which scale with the image.
        mask: of the image; None: all of it may be used.
        grid: columns and lines of the free rows at first, where some of them were claimed already;
            None: all of them are there.
    """

    def __init__(
        self,
        features: Features,
        *,
        size: Size,
        config: DenseMatchingConfig,
        mask: PackedMask | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self._features = features
        self._packed_mask = mask
        self._mask: BoolArray | None = None  # unpacked
        self._size = size
        self._merge_radius_px = config.merge_radius_px * image_scale(*size)
        self._expected_radius_px = config.expected_radius_px * image_scale(*size)
        self._row_of_cell = (
            _row_of_cell(features)
            if grid is None
            else _row_of_cell_claimed(features, size=size, grid=grid)
        )
        self._may_move = self.grid != (0, 0)
        own = np.copy if self._may_move else np.asarray  # what never changes is shared
        self._keypoints_xy: Float64Array = own(features.keypoints_xy)
        self._is_free: BoolArray = own(features.is_free)
        self._colors: Uint8Array = own(features.colors)
        self._is_elsewhere = np.zeros(len(features), np.bool_)  # than where its colour is from
        self._num_matches = np.zeros(len(features) if self._may_move else 0, np.int64)
        self._depths_m: Float32Array | None = None  # until a matcher gives some
        self._raster: NDArray[np.int32] | None = None
        self._is_dense = bool(self._is_free.any())
        self._is_changed = False

    @property
    def depths_m(self) -> Float32Array:
        """The latest depth a matcher gave each row, (N,); 0: unknown."""
        if self._depths_m is None:
            return np.zeros(len(self._keypoints_xy), np.float32)
        return self._depths_m

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and lines of the free rows at first; (0, 0): there were none."""
        lines, columns = self._row_of_cell.shape
        return columns, lines

    def restore(self, *, num_matches: Int64Array, depths_m: Float32Array | None) -> None:
        """Goes on with how many verified matches rows have, (N,), and with known depths (N,)."""
        self._num_matches = num_matches
        if depths_m is not None:
            self._depths_m = np.asarray(depths_m, np.float32).copy()

    def features(self) -> Features:
        """The current table."""
        if self._is_changed:
            self._features = Features(
                frame_id=self._features.frame_id,
                keypoints_xy=self._keypoints_xy.copy(),
                descriptors=self._features.descriptors,
                scales=self._features.scales,
                colors=self._colors.copy(),
                is_free=self._is_free.copy(),
                descriptor_kind=self._features.descriptor_kind,
                num_described=self._features.num_described,
            )
            self._is_changed = False
        return self._features

    def drop_descriptors(self) -> Features:
        """Lets go of the descriptors; returns the table without them."""
        self._features = self.features().without_descriptors()
        return self._features

    def query_rows(self, limit: int) -> Int64Array:
        """At most ``limit`` rows to look up in another image, spread over this one.

        Keypoints with many matches come first, to make their tracks longer, then those without,
        then free rows, in whose cells nothing was found yet. A sparse matcher uses all rows.
        """
        if not self._is_dense:
            return np.arange(len(self._keypoints_xy))
        order = np.lexsort((-self._num_matches, self._is_free))
        order = order[self.is_usable(self._keypoints_xy[order])]
        chosen = spread_over_image(self._keypoints_xy[order], size=self._size, limit=limit)
        return np.sort(order[chosen])

    def add_matches(self, rows: Int64Array, *, depths_m: Float32Array) -> None:
        """Counts verified matches of rows, and keeps the depths that are known, (M,), (M,)."""
        self._fix(rows)
        self.count_matches(rows)
        known = depths_m > 0
        if known.any():
            self._depths_m = self.depths_m
            self._depths_m[rows[known]] = depths_m[known]

    def count_matches(self, rows: Int64Array) -> None:
        """Counts verified matches of rows (M,), where free rows make a choice of them."""
        if self._may_move:
            np.add.at(self._num_matches, rows, 1)

    def take_colors(
        self, rows: Int64Array, *, other: KeypointTable, other_rows: Int64Array
    ) -> None:
        """Copies colours of matched rows, (M,) in ``other``, to those of rows (M,) that moved.

        A row that moved has the colour of its cell's centre, which may be far away. Where both ends
        moved, it keeps that one.
        """
        stale = self._is_elsewhere[rows] & ~other._is_elsewhere[other_rows]
        if stale.any():
            self._colors[rows[stale]] = other._colors[other_rows[stale]]
            self._is_elsewhere[rows[stale]] = False
            self._is_changed = True

    def place(self, points_xy: Float64Array, *, expected_rows: Int64Array) -> Int64Array:
        """Assigns ends of matches to rows; (M,) rows, NO_ROW for ends that are left out.

        Args:
            points_xy: (M, 2) px, the most trusted first.
            expected_rows: (M,) the rows that third keyframes lead to; NO_ROW: to none.
        """
        rows = np.full(len(points_xy), NO_ROW, np.int64)
        is_expected = expected_rows != NO_ROW
        near = self._is_within(points_xy, expected_rows, radius_px=self._expected_radius_px)
        rows[near] = expected_rows[near]
        unknown = np.flatnonzero(~is_expected)
        rows[unknown] = self._nearest_rows(points_xy[unknown])
        unassigned = unknown[rows[unknown] == NO_ROW]
        rows[unassigned] = self._claim(points_xy[unassigned])
        # Of those whose cell was taken just before, some lie beside what took it.
        unassigned = unassigned[rows[unassigned] == NO_ROW]
        rows[unassigned] = self._nearest_rows(points_xy[unassigned])
        return rows

    def places(self) -> TablePlaces:
        """Where the rows are now, for `take_back`."""
        own = np.copy if self._may_move else np.asarray  # what never changes is shared
        return TablePlaces(
            keypoints_xy=own(self._keypoints_xy),
            is_free=own(self._is_free),
            is_elsewhere=own(self._is_elsewhere),
            is_changed=self._is_changed,
        )

    def take_back(self, places: TablePlaces) -> None:
        """Puts the rows back to where they were, whatever was fixed or placed since."""
        if not self._may_move:
            return
        if not np.array_equal(self._is_free, places.is_free):
            self._raster = None  # shows rows that are free again
        self._keypoints_xy = places.keypoints_xy
        self._is_free = places.is_free
        self._is_elsewhere = places.is_elsewhere
        self._is_changed = places.is_changed

    def is_usable(self, points_xy: Float64Array) -> BoolArray:
        """Whether points (N, 2) px lie beside the image's mask, (N,)."""
        if self._packed_mask is None:
            return np.ones(len(points_xy), np.bool_)
        if self._mask is None:
            self._mask = self._packed_mask.unpacked()
        return usable_at(self._mask, points_xy)

    def drop_raster(self) -> None:
        """Frees a few MB; made anew, the raster prefers the nearest of crowded keypoints again."""
        self._raster = self._mask = None

    def _is_within(
        self, points_xy: Float64Array, rows: Int64Array, *, radius_px: float
    ) -> BoolArray:
        """Whether points (M, 2) lie near their rows (M,); never where that is NO_ROW."""
        is_within: BoolArray = rows != NO_ROW
        offsets = points_xy[is_within] - self._keypoints_xy[rows[is_within]]
        is_within[is_within] = np.einsum("md,md->m", offsets, offsets) <= radius_px**2
        return is_within

    def _nearest_rows(self, points_xy: Float64Array) -> Int64Array:
        """The fixed row nearest to each point within the merge radius, NO_ROW for none."""
        if self._raster is None:
            self._raster = np.full(self._raster_shape, NO_ROW, np.int32)
            self._paint(np.flatnonzero(~self._is_free))
        cells = self._raster_cells(points_xy)
        rows = self._raster[cells[:, 1], cells[:, 0]].astype(np.int64)
        rows[~self._is_within(points_xy, rows, radius_px=self._merge_radius_px)] = NO_ROW
        return rows

    def _claim(self, points_xy: Float64Array) -> Int64Array:
        """Moves the free rows of the points' cells to them; NO_ROW where the row is taken."""
        rows = np.full(len(points_xy), NO_ROW, np.int64)
        if not self._row_of_cell.size:
            return rows
        num_cells = np.array(self._row_of_cell.shape[::-1])
        cells = np.clip((points_xy / self._size * num_cells).astype(np.int64), 0, num_cells - 1)
        wanted = self._row_of_cell[cells[:, 1], cells[:, 0]]
        open_idx = np.flatnonzero(self._is_free[wanted])
        _, first_of_row = np.unique(wanted[open_idx], return_index=True)
        taken_idx = open_idx[first_of_row]
        rows[taken_idx] = wanted[taken_idx]
        self._keypoints_xy[rows[taken_idx]] = points_xy[taken_idx]
        self._is_elsewhere[rows[taken_idx]] = True
        self._fix(rows[taken_idx])
        return rows

    def fix_where_looked_up(self, rows: Int64Array, points_xy: Float64Array) -> Int64Array:
        """Fixes rows (M,) that were looked up at points (M, 2); NO_ROW for those that moved since.

        A free row that was looked up for several images may be claimed by the matches of the first.
        """
        stayed = self._is_within(points_xy, rows, radius_px=self._merge_radius_px)
        self._fix(rows[stayed])
        return np.where(stayed, rows, NO_ROW)

    def _fix(self, rows: Int64Array) -> None:
        """Makes free ones of rows (M,) stay where they stand."""
        newly = rows[self._is_free[rows]]
        if not len(newly):
            return
        self._is_free[newly] = False
        self._is_changed = True
        if self._raster is not None:
            self._paint(newly)

    @property
    def _raster_shape(self) -> tuple[int, int]:
        step_px = self._merge_radius_px / _RASTER_STEPS
        return int(self._size[1] / step_px) + 1, int(self._size[0] / step_px) + 1

    def _raster_cells(self, points_xy: Float64Array) -> Int64Array:
        height, width = self._raster_shape
        cells = (points_xy * (_RASTER_STEPS / self._merge_radius_px)).astype(np.int64)
        return np.clip(cells, 0, (width - 1, height - 1))

    def _paint(self, rows: Int64Array) -> None:
        """Marks the surroundings of rows on the raster, the farthest cells first."""
        assert self._raster is not None
        cells = self._raster_cells(self._keypoints_xy[rows])
        height, width = self._raster_shape
        reach = range(-_RASTER_STEPS, _RASTER_STEPS + 1)
        offsets = [(x, y) for x in reach for y in reach if x * x + y * y <= _RASTER_STEPS**2 + 1]
        for x, y in sorted(offsets, key=lambda offset: -(offset[0] ** 2 + offset[1] ** 2)):
            columns, lines = cells[:, 0] + x, cells[:, 1] + y
            inside = (columns >= 0) & (columns < width) & (lines >= 0) & (lines < height)
            self._raster[lines[inside], columns[inside]] = rows[inside]


class KeypointTables:
    """The keypoint tables of all keyframes of a run. One thread at a time.

    Memory: about 45 bytes a keypoint, and one of tables without free rows.
    """

    def __init__(self, config: DenseMatchingConfig) -> None:
        self._config = config
        self._tables: dict[FrameId, KeypointTable] = {}
        self._changed: set[FrameId] = set()  # of which there are other facts now

    def add(
        self,
        features: Features,
        *,
        size: Size,
        mask: PackedMask | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Adds a keyframe's table.

        Args:
            features: the table.
            size: width and height of the image in px.
            mask: of the image.
            grid: of the free rows, where some were claimed already; see `KeypointTable.grid`.
        """
        table = KeypointTable(features, size=size, config=self._config, mask=mask, grid=grid)
        self._tables[features.frame_id] = table
        if table.grid != (0, 0):
            self._changed.add(features.frame_id)

    def take_facts(self) -> dict[str, Any]:
        """What features and pairs do not say of tables with free rows, as far as it changed."""
        changed, self._changed = sorted(self._changed), set()
        facts: dict[str, Any] = {}
        for frame_id in changed:
            table = self._tables[frame_id]
            facts[f"grid/{frame_id}"] = list(table.grid)
            if table.depths_m.any():
                facts[f"depths/{frame_id}"] = table.depths_m.copy()
        return facts

    def restore(self, facts: Mapping[str, Any], pairs: Iterable[VerifiedPair]) -> None:
        """Counts the matches of tables with free rows, and gives them the depths that are known.

        Args:
            facts: as `take_facts` gave them, of all tables.
            pairs: all verified pairs.
        """
        num_matches = {
            frame_id: np.zeros(len(table.depths_m), np.int64)
            for frame_id, table in self._tables.items()
            if table.grid != (0, 0)
        }
        for verified in pairs:
            ends = (verified.pair.first, verified.pair.second)
            for frame_id, rows in zip(ends, verified.inlier_matches_idx.T, strict=True):
                if frame_id in num_matches:
                    num_matches[frame_id][rows] += 1  # a pair has each row once
        for frame_id, counts in num_matches.items():
            depths_m = facts.get(f"depths/{frame_id}")
            self._tables[frame_id].restore(num_matches=counts, depths_m=depths_m)

    def features(self, frame_id: FrameId) -> Features:
        """A keyframe's current table."""
        return self._tables[frame_id].features()

    def drop_descriptors(self, frame_id: FrameId) -> Features:
        """Lets go of a keyframe's descriptors; returns its table without them."""
        return self._tables[frame_id].drop_descriptors()

    def depths_m(self, frame_id: FrameId) -> Float32Array:
        """The latest depth a matcher gave each keypoint of a keyframe, (N,); 0: unknown."""
        return self._tables[frame_id].depths_m

    def query_rows(self, frame_id: FrameId) -> Int64Array:
        """Rows of a keyframe to look up in another one."""
        return self._tables[frame_id].query_rows(self._config.max_query_points)

    def beside_masks(self, matches: PairMatches) -> PairMatches:
        """The matches of a pair none of whose ends lies under the mask of its image."""
        first, second = self._tables[matches.pair.first], self._tables[matches.pair.second]
        is_usable = first.is_usable(matches.points1_xy) & second.is_usable(matches.points2_xy)
        return matches if is_usable.all() else matches.take(np.flatnonzero(is_usable))

    def rows_of(
        self, matches: PairMatches, *, expected: Int64Array, min_rows: int = 0
    ) -> Int64Array:
        """The verified matches of a pair as keypoints of both, each at most once, (K, 2).

        Args:
            matches: those that passed verification.
            expected: (E, 2) rows of both keyframes that third keyframes matched to one keypoint;
                of several for one row the last counts.
            min_rows: the fewest that are of use.

        Returns:
            The rows; none where there are fewer than ``min_rows``: then no table changed.
        """
        matches = matches.take(np.argsort(-matches.confidence, kind="stable"))
        first, second = self._tables[matches.pair.first], self._tables[matches.pair.second]
        ends_xy = (matches.points1_xy, matches.points2_xy)
        before = first.places(), second.places()
        rows = matches.matches_idx.copy()
        for side, table in enumerate((first, second)):
            # Before anything is placed: a row looked up where it stood must not move.
            rows[:, side] = table.fix_where_looked_up(rows[:, side], ends_xy[side])
        for side, table in enumerate((first, second)):
            to_place = np.flatnonzero(rows[:, side] == NO_ROW)
            points_xy = ends_xy[side]
            links = expected if side == 0 else expected[:, ::-1]
            rows[to_place, side] = table.place(
                points_xy[to_place],
                expected_rows=_expected_ends(links, rows[to_place, 1 - side]),
            )
        kept = _one_to_one(rows)
        if len(kept) < min_rows:
            for table, places in zip((first, second), before, strict=True):
                table.take_back(places)
            return rows[:0]
        rows = rows[kept]
        for side, (table, other) in enumerate(((first, second), (second, first))):
            depths_m = matches.depths_m[kept, side]
            table.add_matches(rows[:, side], depths_m=depths_m)
            if depths_m.any():
                self._changed.add(matches.pair.first if side == 0 else matches.pair.second)
            table.take_colors(rows[:, side], other=other, other_rows=rows[:, 1 - side])
        return rows

    def count_matches(self, pair: ImagePair, rows: Int64Array) -> None:
        """Counts verified matches (M, 2) of keypoints that stand where they are."""
        for frame_id, own in zip((pair.first, pair.second), rows.T, strict=True):
            self._tables[frame_id].count_matches(own)

    def drop_rasters(self) -> None:
        """Frees what ``rows_of`` reuses within a batch of pairs, a few MB a table."""
        for table in self._tables.values():
            table.drop_raster()


def _row_of_cell(features: Features) -> Int64Array:
    """The free row of each cell of the grid, (lines, columns); (0, 0) without free rows.

    Raises:
        ValueError: the free rows are not one regular grid.
    """
    free = np.flatnonzero(features.is_free)
    points_xy = features.keypoints_xy[free]
    columns, lines = len(np.unique(points_xy[:, 0])), len(np.unique(points_xy[:, 1]))
    if columns * lines != len(free):
        raise ValueError(f"keyframe {features.frame_id}: its free rows are not a regular grid")
    in_order = free[np.lexsort((points_xy[:, 0], points_xy[:, 1]))]
    return np.asarray(in_order.reshape(lines, columns))


def _row_of_cell_claimed(features: Features, *, size: Size, grid: tuple[int, int]) -> Int64Array:
    """The same of a grid some of whose rows were claimed; the rows of their cells are not free."""
    columns, lines = grid
    if not columns * lines:
        return np.empty((0, 0), np.int64)
    fixed = features.fixed_rows
    rows = np.full((lines, columns), fixed[0] if len(fixed) else 0, np.int64)
    free = np.flatnonzero(features.is_free)
    cells = (features.keypoints_xy[free] / size * grid).astype(np.int64)
    rows[cells[:, 1], cells[:, 0]] = free
    return rows


def _expected_ends(links: Int64Array, other_rows: Int64Array) -> Int64Array:
    """Where links (E, 2) from own rows to other rows lead from the other rows, NO_ROW: nowhere."""
    if not len(links):
        return np.full(len(other_rows), NO_ROW, np.int64)
    own_of_other = np.full(max(links[:, 1].max(), other_rows.max(initial=0)) + 2, NO_ROW, np.int64)
    own_of_other[links[:, 1]] = links[:, 0]
    # NO_ROW indexes the last entry, which belongs to no row.
    return np.asarray(own_of_other[other_rows])


def _one_to_one(rows: Int64Array) -> Int64Array:
    """Which of the matches (M, 2), best first, to keep so that no keypoint has two; ascending."""
    kept = np.flatnonzero((rows != NO_ROW).all(axis=1))
    for side in range(2):
        _, first = np.unique(rows[kept, side], return_index=True)
        kept = np.sort(kept[first])
    return kept
