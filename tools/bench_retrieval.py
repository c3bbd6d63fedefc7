#!/usr/bin/env python3
"""Measures place recognition on a video or an image folder.

Keyframes are taken at a fixed interval and described with SIFT. Each one asks for earlier keyframes
that look alike; those less than a minimal gap back are left out, as neighbours in a video are
always alike. An answer is true when the reference poses say that the two cameras stood close and
looked the same way, or, without a reference, when enough matches survive epipolar verification.

    tools/bench_retrieval.py video.mp4 --reference groundtruth.txt --every 8
    tools/bench_retrieval.py photos/ --min-gap 0 --min-inliers 20

For each vocabulary size the table has the recall (share of keyframes with a true earlier place for
which one is among the first answers), the precision (share of true ones among those answers), and
CPU times. Set OPENBLAS_NUM_THREADS=1 for times of a single thread.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import RetrievalConfig
from engine.matching.place_recognition import PlaceRecognizer, Vocabulary
from engine.types import Features, Float32Array, Float64Array, FrameId, Uint8Array

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one recognizer achieved."""

    recall: float
    precision: float
    num_asked: int
    add_ms: float  # median over the last quarter
    query_ms: float  # median over the last quarter
    mean_ms: float  # add and query, learning included
    max_ms: float


class VladBaseline:
    """Plain VLAD with intra-normalisation, for comparison, with the words of `Vocabulary`."""

    def __init__(self, config: RetrievalConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._descriptors: list[Uint8Array] = []
        self._vectors: list[Float32Array] = []
        self._vocabulary: Vocabulary | None = None
        self._learn_at = config.first_vocabulary_at

    def add(self, features: Features) -> None:
        """Makes a keyframe known."""
        self._descriptors.append(features.descriptors[: self._config.max_descriptors])
        num = len(self._descriptors)
        if num >= self._learn_at and num <= self._config.max_vocabulary_keyframes:
            rng = np.random.default_rng(self._seed)
            every = max(sum(map(len, self._descriptors)) // 20_000, 1)
            sample = np.concatenate([values[::every] for values in self._descriptors])
            num_words = self._config.num_words
            self._vocabulary = Vocabulary.learn(sample, num_words=num_words, rng=rng)
            self._vectors = [self._vector(values) for values in self._descriptors]
            self._learn_at = 2 * num
        elif self._vocabulary is not None:
            self._vectors.append(self._vector(self._descriptors[-1]))

    def query(
        self, frame_id: FrameId, *, exclude: Sequence[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes most like the newest one; ids count from 1."""
        if self._vocabulary is None:
            return []
        scores = np.array(self._vectors) @ self._vectors[frame_id - 1]
        scores[[other - 1 for other in (*exclude, frame_id)]] = -1.0
        best = np.argsort(-scores, kind="stable")[:limit]
        return [(FrameId(int(idx) + 1), float(scores[idx])) for idx in best if scores[idx] > -1.0]

    def _vector(self, descriptors: Uint8Array) -> Float32Array:
        assert self._vocabulary is not None
        words = self._vocabulary.words
        values = descriptors.astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        projected = (values - self._vocabulary.mean) @ self._vocabulary.axes
        nearest = (projected @ words.T - 0.5 * (words * words).sum(axis=1)).argmax(axis=1)
        sums = np.zeros_like(words)
        np.add.at(sums, nearest, projected - words[nearest])
        sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
        vector: Float32Array = sums.ravel() / np.linalg.norm(sums)
        return vector


def read_gray(source: Path, *, every: int) -> Iterator[tuple[int, Uint8Array]]:
    """Every n-th frame of a video, or image of a folder, with its index."""
    if source.is_dir():
        for idx, path in enumerate(sorted(source.iterdir())):
            image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            if image is not None and idx % every == 0:
                yield idx, image
        return
    with av.open(str(source)) as container:
        for idx, frame in enumerate(container.decode(video=0)):
            if idx % every == 0:
                yield idx, frame.to_ndarray(format="gray")


def describe(image: Uint8Array, *, frame_id: FrameId, num_features: int) -> Features:
    """SIFT, strongest first, RootSIFT scaled to bytes."""
    sift = cv2.SIFT.create(nfeatures=num_features, contrastThreshold=0.01)
    keypoints, raw = sift.detectAndCompute(image, None)
    if raw is None:
        keypoints, raw = (), np.zeros((0, 128), np.float32)
    order = np.argsort([-point.response for point in keypoints], kind="stable")[:num_features]
    order = order.astype(np.int64)
    shares = raw[order] / np.maximum(raw[order].sum(axis=1, keepdims=True), 1e-9)
    return Features(
        frame_id=frame_id,
        keypoints_xy=np.array([keypoints[i].pt for i in order]).reshape(-1, 2) + 0.5,
        descriptors=np.clip(np.round(512 * np.sqrt(shares)), 0, 255).astype(np.uint8),
        scales=np.array([keypoints[i].size for i in order], np.float32),
        colors=np.zeros((len(order), 3), np.uint8),
    )


def truth_from_poses(
    reference: Path, indices: Sequence[int], *, max_distance: float, max_angle_deg: float
) -> BoolArray:
    """(N, N): both poses known, centres close and viewing directions alike.

    ``reference`` is in TUM format, camera-to-world, with the frame index as timestamp.
    """
    rows = np.atleast_2d(np.loadtxt(reference))
    row_of = {round(float(row[0])): row for row in rows}
    centers = np.full((len(indices), 3), np.nan)
    directions = np.full((len(indices), 3), np.nan)
    for idx, frame_idx in enumerate(indices):
        if frame_idx in row_of:
            x, y, z, w = row_of[frame_idx][4:8]
            centers[idx] = row_of[frame_idx][1:4]
            directions[idx] = 2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)
    distances = np.linalg.norm(centers[:, None] - centers[None], axis=2)
    alike = directions @ directions.T > np.cos(np.radians(max_angle_deg))
    truth: BoolArray = (distances < max_distance) & alike
    return truth


def truth_from_matches(described: Sequence[Features], *, min_inliers: int) -> BoolArray:
    """(N, N): pairs that keep enough matches under a fundamental matrix; looks at all pairs."""
    truth = np.zeros((len(described), len(described)), np.bool_)
    unit = []
    for features in described:
        values = features.descriptors[:1500].astype(np.float32)
        unit.append(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9))
    for one, other in itertools.combinations(range(len(described)), 2):
        rows1, rows2 = mutual_matches(unit[one], unit[other])
        if len(rows1) < max(min_inliers, 8):
            continue
        points1 = described[one].keypoints_xy[rows1]
        points2 = described[other].keypoints_xy[rows2]
        num_inliers = count_epipolar_inliers(points1, points2)
        truth[one, other] = truth[other, one] = num_inliers >= min_inliers
    return truth


def count_epipolar_inliers(points1_xy: Float64Array, points2_xy: Float64Array) -> int:
    """Matches within 1.5 px of the best fundamental matrix."""
    try:
        _, mask = cv2.findFundamentalMat(points1_xy, points2_xy, cv2.USAC_MAGSAC, 1.5, 0.999, 2000)
    except cv2.error:  # OpenCV 5 raises on degenerate points instead of finding nothing
        return 0
    return 0 if mask is None else int(mask.sum())


def mutual_matches(
    unit1: Float32Array, unit2: Float32Array
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows that are each other's nearest and pass Lowe's ratio test at 0.8."""
    if len(unit1) < 2 or len(unit2) < 2:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    cosines = unit1 @ unit2.T
    rows = np.arange(len(unit1))
    best = cosines.argmax(axis=1)
    mutual = cosines.argmax(axis=0)[best] == rows
    first = cosines[rows, best].copy()
    cosines[rows, best] = -1.0
    kept = np.flatnonzero(mutual & (1 - first < 0.8**2 * (1 - cosines.max(axis=1))))
    return kept, best[kept]


def measure(
    recognizer: PlaceRecognizer | VladBaseline,
    described: Sequence[Features],
    truth: BoolArray,
    *,
    min_gap: int,
    limit: int,
) -> Figures:
    """Adds keyframe after keyframe and asks each for earlier places."""
    hits, shares, adding_s, asking_s = [], [], [], []
    for row, features in enumerate(described):
        started_s = time.process_time()
        recognizer.add(features)
        added_s = time.process_time()
        recent = [FrameId(other + 1) for other in range(max(row - min_gap, 0), row)]
        answers = recognizer.query(features.frame_id, exclude=recent, limit=limit)
        asking_s.append(time.process_time() - added_s)
        adding_s.append(added_s - started_s)
        if answers and truth[row, : max(row - min_gap, 0)].any():
            found = [bool(truth[row, frame_id - 1]) for frame_id, _ in answers]
            hits.append(any(found))
            shares.append(np.mean(found))
    quarter = max(len(described) // 4, 1)
    total_ms = 1e3 * (np.array(adding_s) + np.array(asking_s))
    return Figures(
        recall=float(np.mean(hits)) if hits else float("nan"),
        precision=float(np.mean(shares)) if hits else float("nan"),
        num_asked=len(hits),
        add_ms=1e3 * float(np.median(adding_s[-quarter:])),
        query_ms=1e3 * float(np.median(asking_s[-quarter:])),
        mean_ms=float(total_ms.mean()),
        max_ms=float(total_ms.max()),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="video file or image folder")
    parser.add_argument("--reference", type=Path, help="TUM poses, camera-to-world, by frame index")
    parser.add_argument("--every", type=int, default=1, help="keyframe interval in frames")
    parser.add_argument("--first", type=int, default=0, help="keyframes left out at the start")
    parser.add_argument("--min-gap", type=int, default=20, help="keyframes between two places")
    parser.add_argument("--limit", type=int, default=4, help="answers looked at")
    parser.add_argument("--max-distance", type=float, default=0.4, help="in reference units")
    parser.add_argument("--max-angle-deg", type=float, default=25.0)
    parser.add_argument("--min-inliers", type=int, default=40, help="truth without a reference")
    parser.add_argument("--num-features", type=int, default=2000)
    parser.add_argument("--max-descriptors", type=int, default=1000)
    parser.add_argument("--num-words", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--max-vocabulary-keyframes", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1, help="runs averaged")
    return parser.parse_args()


def main() -> None:
    """Describes the keyframes once and prints one row per recognizer."""
    arguments = parse_arguments()
    cv2.setNumThreads(1)
    images = read_gray(arguments.source, every=arguments.every)
    indices: list[int] = []
    described: list[Features] = []
    for idx, image in itertools.islice(images, arguments.first, None):
        frame_id = FrameId(len(indices) + 1)
        indices.append(idx)
        described.append(describe(image, frame_id=frame_id, num_features=arguments.num_features))
    truth = find_truth(arguments, indices, described)
    print(f"{len(indices)} keyframes of {arguments.source.name}")
    print("recognizer      recall@n  precision@n  asked   add ms  query ms   mean ms    max ms")
    for is_baseline, num_words in itertools.product((True, False), arguments.num_words):
        runs = measure_seeds(arguments, described, truth, num_words=num_words, vlad=is_baseline)
        print(table_row(f"{'VLAD' if is_baseline else 'ours'} {num_words}", runs))


def find_truth(
    arguments: argparse.Namespace, indices: Sequence[int], described: Sequence[Features]
) -> BoolArray:
    """(N, N) from the reference poses where there are some, else from matches."""
    if arguments.reference is None:
        return truth_from_matches(described, min_inliers=arguments.min_inliers)
    return truth_from_poses(
        arguments.reference,
        indices,
        max_distance=arguments.max_distance,
        max_angle_deg=arguments.max_angle_deg,
    )


def measure_seeds(
    arguments: argparse.Namespace,
    described: Sequence[Features],
    truth: BoolArray,
    *,
    num_words: int,
    vlad: bool,
) -> list[Figures]:
    """One measurement per seed."""
    config = RetrievalConfig(
        num_words=num_words,
        max_descriptors=arguments.max_descriptors,
        max_vocabulary_keyframes=arguments.max_vocabulary_keyframes,
    )
    runs = []
    for seed in range(arguments.seeds):
        recognizer = (VladBaseline if vlad else PlaceRecognizer)(config, seed=seed)
        limits = {"min_gap": arguments.min_gap, "limit": arguments.limit}
        runs.append(measure(recognizer, described, truth, **limits))
    return runs


def table_row(label: str, runs: Sequence[Figures]) -> str:
    """The mean of some runs as text."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(run, name) for run in runs]))

    return (
        f"{label:14s} {mean('recall'):9.3f} {mean('precision'):12.3f} {runs[0].num_asked:6d}"
        f" {mean('add_ms'):8.2f} {mean('query_ms'):9.2f} {mean('mean_ms'):9.2f}"
        f" {mean('max_ms'):9.1f}"
    )


if __name__ == "__main__":
    main()
