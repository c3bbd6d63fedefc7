"""What the bench of MASt3R finds out."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("encoder", "decoder", "points_head", "descriptors_head", "outputs", "matching")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a piece of work took, over some runs, in seconds of one item."""

    median_s: float
    least_s: float
    most_s: float
    cpu_s: float  # median of all threads' CPU time
    num_runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The most memory held, in MB of 10^6 bytes; of a GPU 0 without one."""

    allocated_mb: float
    reserved_mb: float  # by PyTorch, on the GPU
    peak_rss_mb: float  # of the process so far


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeFigures:
    """Encoding of keyframes, by the network alone."""

    batch: int
    per_keyframe: Timing
    busy_s: float  # mean of a keyframe by the clock of the shares


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """Matching of directed pairs whose keyframes are encoded."""

    batch: int
    decoded_together: int  # fewer than the batch when memory ran out
    with_points: bool
    per_pair: Timing
    pairs_per_s: float
    pairs_per_s_with_encoding: float  # when a keyframe is encoded for every so many pairs
    num_matches: float  # mean of a pair
    shares: dict[str, float]  # of PARTS, that encoding included; sum to 1
    network_tflops: float  # the decoder's and the heads' work, over the time of the whole pair
    matrix_rate_share: float  # of what large matrix products reach
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamFigures:
    """Upstream's code on the same pairs; ratios above 1 say that this project's is faster."""

    batch: int
    per_pair: Timing
    pairs_per_s: float
    matching_share: float
    ratio: float  # of pairs per second, cached encodings here
    ratio_with_points: float
    ratio_with_encoding: float  # without points, a keyframe encoded for every so many pairs
    cpu_ratio: float  # of CPU seconds a pair, for a CPU that others use too
    cpu_ratio_with_points: float
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Reciprocal matches, both networks in float32 with the same weights; TF32 is off."""

    num_pairs: int
    num_ours: int
    num_upstream: int
    share: float  # of all matches that either has, those that both have
    share_same_descriptors: float  # the same, when both search upstream's descriptors
    max_descriptor_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All figures of a run."""

    device: str
    torch: str
    precision: str
    num_threads: int  # of a CPU
    weights: str
    width: int
    height: int
    queries: int  # of each image, looked up in the other one
    pairs_per_keyframe: int  # for each of which a keyframe is encoded
    matrix_tflops: float  # of large square products in the precision; on a CPU by CPU time
    encode_gflop: float
    pair_gflop: float
    pair_with_points_gflop: float
    describe: Timing  # a whole keyframe: resized, encoded alone, corners found
    encodes: list[EncodeFigures]
    pairs: list[PairFigures]
    upstream: list[UpstreamFigures]
    agreement: Agreement | None
