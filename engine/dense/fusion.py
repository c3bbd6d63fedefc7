"""Dense points of all keyframes, fused in the world: one point in each voxel of a surface.

Points are sorted into blocks of space, which are fused one after the other. So memory is bounded by
a share of the points; where there are many they lie in a temporary file.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.dense_types import DensePoints
from engine.types import BoolArray, Float32Array, Float64Array, Int64Array

logger = logging.getLogger(__name__)

_MIN_VOXEL_SAMPLINGS = 1 / 16  # no smaller: most blocks would hold one point, or have no number
_BLOCK_BITS = 8  # a block is 2^8 voxels wide
_PLACE_BITS = 3 * _BLOCK_BITS  # of a voxel in its block
_INDEX_BITS = 24  # of a point among those that are fused at once
_MAX_BLOCKS_AT_ONCE = 2 ** (63 - _PLACE_BITS - _INDEX_BITS)
_BLOCK_RANGE = 2**20  # blocks to either side of the world's origin, on each axis
_POINTS_AT_ONCE = 1 << 19
_SURFACE_VOXELS = 2  # voxels before and behind a surface whose points are laid onto it
_SAME_SURFACE_VOXELS = 0.5  # between points of neighbouring voxels after that
_SAME_SIDE_COSINE = 0.5  # of the normals of points on one surface
_MAX_VIEWS = 255
# Columns of what is averaged in a voxel.
_XYZ, _COLOR, _NORMAL, _SAMPLING, _NUM_VALUES = slice(0, 3), slice(3, 6), slice(6, 9), 9, 10
_RECORD = np.dtype(
    [
        ("xyz", np.float32, 3),
        ("normal", np.float32, 3),
        ("sampling", np.float32),
        ("chunk", np.int32),
        ("color", np.uint8, 3),
        ("num_views", np.uint8),
    ]
)

_Records = NDArray[Any]  # (P,) of _RECORD


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionLimits:
    """What fusion may use, and what it leaves out."""

    min_views: int = 2  # keyframes that have to agree on a point
    max_points: int = 20_000_000  # that come out: voxels are doubled until there are no more
    max_points_in_memory: int = 2_000_000  # 36 bytes each; more of them go to a file
    folder: Path | None = None  # of that file; None: the system's folder for temporary files


def fuse(
    chunks: Iterable[DensePoints],
    *,
    voxel_size: float | None = None,
    limits: FusionLimits = FusionLimits(),  # noqa: B008 - frozen
) -> Iterator[DensePoints]:
    """Fuses points of keyframes, block by block.

    Points of a voxel become one, the mean weighted by agreeing views over the square of the
    sampling. It is moved along its normal to the mean of what is up to two voxels before and
    behind it and faces the same way, so that a surface is one voxel thick.

    Args:
        chunks: points of one keyframe each, in the world. They are taken one after the other, once.
        voxel_size: map units, at least a sixteenth of the median of the points' sampling: that is
            taken, with a warning in the log, where it is less; None: that median.
        limits: bounds.

    Yields:
        Points of a part of space each, in the order of their place; the same chunks always give
        the same points.

    Raises:
        OSError: the temporary file cannot be written.
    """
    with _Spool(limits) as spool:
        for number, chunk in enumerate(chunks):
            spool.add(_records(chunk, number))
        size = _size_of_voxels(voxel_size, median_sampling=spool.median_sampling())
        if not spool.num_points or not size > 0.0:
            return
        blocks = _sort_into_blocks(spool, size)
        shift = _coarsening(spool, blocks, size, limits.max_points)
        for batch in _batches(blocks):
            grid = _Grid.of(spool.read(batch), size=size, shift=shift)
            fused = _fuse_records(grid, limits.min_views)
            if len(fused.xyz):
                yield fused


def _size_of_voxels(wanted: float | None, *, median_sampling: float) -> float:
    if wanted is None:
        return median_sampling
    least = median_sampling * _MIN_VOXEL_SAMPLINGS
    if wanted >= least:
        return wanted
    logger.warning(
        "dense points: cells of %g are far finer than the images sample the surface, %g; they are"
        " made %g wide",
        wanted,
        median_sampling,
        least,
    )
    return least


def _records(points: DensePoints, chunk: int) -> _Records:
    records = np.empty(len(points.xyz), _RECORD)
    records["xyz"] = points.xyz
    records["normal"] = points.normals
    records["sampling"] = points.sampling
    records["chunk"] = chunk
    records["color"] = points.colors
    records["num_views"] = points.num_views
    return records[points.sampling > 0.0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """Points of a chunk that lie in the same block of space."""

    block: int
    chunk: int  # of the spool
    start: int  # in the chunk
    num_points: int


class _Spool:
    """Chunks of points, in memory up to a limit and then in a temporary file."""

    def __init__(self, limits: FusionLimits) -> None:
        self._limits = limits
        self._in_memory: list[_Records | None] = []  # None: in the file
        self._starts: list[int] = []  # in the file, points
        self._sizes: list[int] = []
        self._samplings: list[Float32Array] = []  # a sample of each chunk's
        self._file: BinaryIO | None = None
        self._num_in_file = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def num_points(self) -> int:
        """Of all chunks."""
        return sum(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, records: _Records) -> None:
        """Appends a chunk."""
        fits = self.num_points - self._num_in_file + len(records)
        fits_in_memory = fits <= self._limits.max_points_in_memory
        self._sizes.append(len(records))
        self._starts.append(self._num_in_file)
        self._samplings.append(records["sampling"][::16].copy())
        self._in_memory.append(records if fits_in_memory else None)
        if not fits_in_memory:
            self._num_in_file += len(records)
            self.replace(len(self) - 1, records)

    def replace(self, chunk: int, records: _Records) -> None:
        """Puts as many other points in a chunk's place."""
        if self._in_memory[chunk] is not None:
            self._in_memory[chunk] = records
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._limits.folder)  # noqa: SIM115 - closed at exit
        self._file.seek(self._starts[chunk] * _RECORD.itemsize)
        self._file.write(records.tobytes())

    def chunk(self, chunk: int) -> _Records:
        """All points of a chunk."""
        return self._read(chunk, 0, self._sizes[chunk])

    def read(self, segments: Sequence[_Segment]) -> _Records:
        """Points of several segments, in their order."""
        return np.concatenate([self._read(s.chunk, s.start, s.num_points) for s in segments])

    def median_sampling(self) -> float:
        """Over a sixteenth of the points; 0 where there are none."""
        samplings = np.concatenate([*self._samplings, np.empty(0, np.float32)])
        return float(np.median(samplings)) if len(samplings) else 0.0

    def _read(self, chunk: int, start: int, num_points: int) -> _Records:
        in_memory = self._in_memory[chunk]
        if in_memory is not None:
            return in_memory[start : start + num_points]
        if self._file is None:
            raise ValueError("the file of a chunk is missing")
        self._file.seek((self._starts[chunk] + start) * _RECORD.itemsize)
        return np.frombuffer(self._file.read(num_points * _RECORD.itemsize), _RECORD)


def _sort_into_blocks(spool: _Spool, size: float) -> list[_Segment]:
    """Sorts the points of each chunk by their block; the segments, by block and then by chunk.

    Points further from the origin than blocks are numbered are left out.
    """
    segments = []
    for chunk in range(len(spool)):
        records = spool.chunk(chunk)
        blocks, is_near = _blocks_of(records["xyz"], size)
        order = np.argsort(np.where(is_near, blocks, -1), kind="stable")
        blocks = blocks[order]
        spool.replace(chunk, records[order])
        first = int(np.count_nonzero(~is_near))
        starts = first + np.flatnonzero(np.diff(blocks[first:], prepend=-1))
        ends = np.append(starts[1:], len(blocks))
        segments += [
            _Segment(block=int(blocks[start]), chunk=chunk, start=int(start), num_points=int(n))
            for start, n in zip(starts, ends - starts, strict=True)
        ]
    return sorted(segments, key=lambda segment: (segment.block, segment.chunk))


def _blocks_of(xyz: Float32Array, size: float) -> tuple[Int64Array, BoolArray]:
    """The number of each point's block (P,), and whether it has one."""
    place = _block_places(xyz, size) + _BLOCK_RANGE
    is_near = np.asarray(((place >= 0) & (place < 2 * _BLOCK_RANGE)).all(axis=1))
    return _packed(np.where(is_near[:, None], place, 0).astype(np.int64), bits=21), is_near


def _block_places(xyz: Float32Array, size: float) -> Float64Array:
    """Whole numbers (P, 3) of the block of each point.

    The world's origin lies in the middle of a block: often it lies on the ground, and a surface is
    not joined across the sides of blocks.
    """
    return np.asarray(np.floor(xyz.astype(np.float64) / (size * 2**_BLOCK_BITS) + 0.5))


def _packed(places: Int64Array, *, bits: int) -> Int64Array:
    """One number for three coordinates (P, 3) of so many bits."""
    return (places[:, 0] << (2 * bits)) | (places[:, 1] << bits) | places[:, 2]


def _batches(segments: Sequence[_Segment]) -> Iterator[list[_Segment]]:
    """Segments of whole blocks that are fused at once."""
    batch: list[_Segment] = []
    num_points = num_blocks = 0
    for segment in segments:
        is_new = not batch or segment.block != batch[-1].block
        is_full = num_points >= _POINTS_AT_ONCE or num_blocks >= _MAX_BLOCKS_AT_ONCE
        if batch and is_new and is_full:
            yield batch
            batch, num_points, num_blocks = [], 0, 0
        batch.append(segment)
        num_points += segment.num_points
        num_blocks += is_new
    if batch:
        yield batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grid:
    """Points of some blocks, sorted by voxel."""

    records: _Records
    keys: Int64Array  # (P,) ascending: the number of the block, then the place in it
    corners: Float64Array  # (B, 3) of the blocks, map units
    voxel_size: float
    bits: int  # of a place on each axis

    @classmethod
    def of(cls, records: _Records, *, size: float, shift: int) -> _Grid:
        """Points (P,) that come block by block, in voxels of ``size`` doubled ``shift`` times."""
        edge, bits = size * 2**_BLOCK_BITS, _BLOCK_BITS - shift
        place = _block_places(records["xyz"], size)
        is_first = np.append(True, (np.diff(place, axis=0) != 0).any(axis=1))
        corners = (place[is_first] - 0.5) * edge
        block = np.cumsum(is_first) - 1
        offset = (records["xyz"] - corners[block]) / (edge / 2**bits)
        inside = np.clip(offset.astype(np.int64), 0, 2**bits - 1)
        keys = (block << (3 * bits)) | _packed(inside, bits=bits)
        order = np.argsort(keys, kind="stable")
        return cls(
            records=records[order],
            keys=keys[order],
            corners=corners,
            voxel_size=edge / 2**bits,
            bits=bits,
        )


def _coarsening(spool: _Spool, segments: Sequence[_Segment], size: float, max_points: int) -> int:
    """How often voxels have to be doubled so that there are no more than ``max_points``."""
    if spool.num_points <= max_points:
        return 0
    shift = 0
    while shift < _BLOCK_BITS:
        grids = (
            _Grid.of(spool.read(batch), size=size, shift=shift) for batch in _batches(segments)
        )
        if sum(1 + int(np.count_nonzero(np.diff(grid.keys))) for grid in grids) <= max_points:
            break
        shift += 1
    return shift


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Voxels:
    """Voxels with points; rows of the arrays belong together."""

    keys: Int64Array  # (V,) ascending
    xyz: Float32Array  # (V, 3) from the corner of the block
    colors: Float32Array  # (V, 3)
    normals: Float32Array  # (V, 3) unit, or 0 where they cancel out
    sampling: Float32Array  # (V,)
    weights: Float32Array  # (V,)
    num_views: Int64Array  # (V,)


def _fuse_records(grid: _Grid, min_views: int) -> DensePoints:
    voxels = _laid_onto_surfaces(_voxels_of(grid), grid)
    kept = (voxels.num_views >= min_views) & ~_is_doubled(voxels, grid)
    corners = grid.corners[voxels.keys[kept] >> (3 * grid.bits)]
    return DensePoints(
        xyz=(corners + voxels.xyz[kept]).astype(np.float32),
        colors=np.rint(voxels.colors[kept]).astype(np.uint8),
        normals=voxels.normals[kept],
        sampling=voxels.sampling[kept],
        num_views=np.minimum(voxels.num_views[kept], _MAX_VIEWS).astype(np.uint8),
    )


def _voxels_of(grid: _Grid) -> _Voxels:
    """The mean of the points of each voxel; as many views as its best point has, or keyframes."""
    records = grid.records
    starts = np.flatnonzero(np.diff(grid.keys, prepend=-1))
    keyframe_starts = np.diff(records["chunk"], prepend=-1) != 0
    keyframe_starts[starts] = True
    num_keyframes = np.add.reduceat(keyframe_starts.astype(np.int64), starts)
    num_views = np.maximum.reduceat(records["num_views"], starts).astype(np.int64)
    weights = records["num_views"] / np.square(records["sampling"])
    corners = grid.corners[grid.keys >> (3 * grid.bits)]
    values = np.empty((len(records), _NUM_VALUES), np.float32)
    values[:, _XYZ] = records["xyz"] - corners
    values[:, _COLOR] = records["color"]
    values[:, _NORMAL] = records["normal"]
    values[:, _SAMPLING] = records["sampling"]
    return _mean_voxels(
        grid.keys[starts],
        starts,
        weights=weights,
        values=values,
        num_views=np.maximum(num_views, num_keyframes),
    )


def _mean_voxels(
    keys: Int64Array,
    starts: Int64Array,
    *,
    weights: Float32Array,
    values: Float32Array,
    num_views: Int64Array,
) -> _Voxels:
    """Voxels (V,) from values (P, 10) of points that are sorted by voxel."""
    total = np.add.reduceat(weights, starts)
    sums = np.add.reduceat(values * weights[:, None], starts, axis=0)
    mean = np.asarray(sums / total[:, None], np.float32)
    normals = mean[:, _NORMAL]
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return _Voxels(
        keys=keys,
        xyz=mean[:, _XYZ],
        colors=mean[:, _COLOR],
        normals=np.divide(normals, length, where=length > 0, out=np.zeros_like(normals)),
        sampling=mean[:, _SAMPLING],
        weights=total,
        num_views=num_views,
    )


def _laid_onto_surfaces(voxels: _Voxels, grid: _Grid) -> _Voxels:
    """Voxels after their points moved along their normals to the middle of their surface."""
    moved = _moved(voxels, grid)
    inside = np.clip((moved / grid.voxel_size).astype(np.int64), 0, 2**grid.bits - 1)
    block = voxels.keys >> (3 * grid.bits)
    keys = (block << (3 * grid.bits)) | _packed(inside, bits=grid.bits)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    values = np.column_stack([moved, voxels.colors, voxels.normals, voxels.sampling])
    return _mean_voxels(
        keys[order][starts],
        starts,
        weights=voxels.weights[order],
        values=values[order],
        num_views=np.maximum.reduceat(voxels.num_views[order], starts),
    )


def _moved(voxels: _Voxels, grid: _Grid) -> Float32Array:
    """Where the points (V, 3) go, from the corners of their blocks."""
    shift = np.zeros(len(voxels.keys), np.float32)
    total = voxels.weights.copy()
    for rows, found, distance in _before_and_behind(voxels, grid, steps=_SURFACE_VOXELS):
        shift[rows] += voxels.weights[found] * distance
        total[rows] += voxels.weights[found]
    return np.asarray(voxels.xyz + (shift / total)[:, None] * voxels.normals)


def _is_doubled(voxels: _Voxels, grid: _Grid) -> BoolArray:
    """Which voxels (V,) hold the same surface as one of greater weight before or behind them."""
    is_doubled = np.zeros(len(voxels.keys), bool)
    for rows, found, distance in _before_and_behind(voxels, grid, steps=1):
        weight, other = voxels.weights[rows], voxels.weights[found]
        is_less = (weight < other) | ((weight == other) & (rows < found))
        is_near = np.abs(distance) < _SAME_SURFACE_VOXELS * grid.voxel_size
        is_doubled[rows[is_less & is_near]] = True
    return is_doubled


def _before_and_behind(
    voxels: _Voxels, grid: _Grid, *, steps: int
) -> Iterator[tuple[Int64Array, Int64Array, Float32Array]]:
    """Rows of voxels, rows of those so many voxels along their normals, how far along they lie.

    Of voxels in the same block whose normals face the same way.
    """
    size, num_places = grid.voxel_size, 2**grid.bits
    block = voxels.keys >> (3 * grid.bits)
    for step in (*range(-steps, 0), *range(1, steps + 1)):
        place = np.floor(voxels.xyz / np.float32(size) + voxels.normals * np.float32(step))
        is_inside = ((place >= 0) & (place < num_places)).all(axis=1)
        inside = np.where(is_inside[:, None], place, 0).astype(np.int64)
        wanted = (block << (3 * grid.bits)) | _packed(inside, bits=grid.bits)
        found = np.minimum(np.searchsorted(voxels.keys, wanted), len(voxels.keys) - 1)
        is_other = is_inside & (voxels.keys[found] == wanted) & (voxels.keys != wanted)
        cosine = np.einsum("va,va->v", voxels.normals, voxels.normals[found])
        rows = np.flatnonzero(is_other & (cosine > _SAME_SIDE_COSINE))
        offset = voxels.xyz[found[rows]] - voxels.xyz[rows]
        yield rows, found[rows], np.einsum("va,va->v", offset, voxels.normals[rows])
