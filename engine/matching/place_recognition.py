"""Place recognition over keyframe descriptors, learned from the run itself.

A keyframe becomes one signature: its strongest descriptors are assigned to visual words, the
residuals of each word are summed, and the signs of the sum are kept, 64 bits per word. Two
keyframes are compared word by word with a selective function of the Hamming distance. This is the
binarised aggregated selective match kernel (Tolias, Avrithis and Jegou, "To aggregate or not to
aggregate: selective match kernels for image search", ICCV 2013, ASMK*), the descendant of VLAD
(Jegou, Douze, Schmid and Perez, CVPR 2010). One bit string per word weighs every word alike however
many descriptors fall into it, which is what intra-normalisation does for VLAD (Arandjelovic and
Zisserman, CVPR 2013), so repeated structure does not drown the rest of the image.

No file is needed: principal axes and words come from the keyframes seen so far, and are learned
again each time the number of keyframes doubles, once they are asked for. They are learned from all
keyframes but the last two before they are used. A query of one of these has another thread begin,
so that the keyframe that needs them seldom waits; by which words keyframes are compared does not
depend on the timing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.config import RetrievalConfig
from engine.cpu_time import Stage, charged_to
from engine.types import Features, Float32Array, FrameId, Int64Array, Uint8Array

_SIGNATURE_BITS = 64  # per word: one machine word, so comparing is one xor and one popcount
_SELECTIVITY = 3.0  # exponent of the match kernel, the paper's alpha
_TRAINING_DESCRIPTORS = 20_000  # learned from at most so many, spread over all keyframes
_SEEDING_DESCRIPTORS_PER_WORD = 8  # for k-means++; Lloyd's iterations use all
_MAX_COMPARED = 1000  # keyframes that a query is compared with by all of its words
_NUM_FIRST_WORDS = 32  # by which the likeliest are chosen among more
_LEARNED_AHEAD = 2  # keyframes between those that words are learned from and the first use
_LLOYD_ITERATIONS = 3  # more do not raise recall: the residuals make up for rough words

BoolArray = NDArray[np.bool_]
Uint64Array = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vocabulary:
    """Principal axes of the descriptors and visual words along them."""

    mean: Float32Array  # (D,) of the normalised descriptors
    axes: Float32Array  # (D, B) columns, B = min(D, 64)
    words: Float32Array  # (K, B)

    @classmethod
    def learn(
        cls, descriptors: Uint8Array, *, num_words: int, rng: np.random.Generator
    ) -> Vocabulary:
        """Learns from (N, D) descriptors, N >= num_words."""
        normalised = _normalise(descriptors)
        mean = normalised.mean(axis=0)
        normalised -= mean
        # eigh sorts ascending; the last columns carry most of the variance
        axes = np.linalg.eigh(normalised.T @ normalised)[1][:, : -_SIGNATURE_BITS - 1 : -1]
        axes = np.ascontiguousarray(axes)
        words = _k_means(normalised @ axes, num_words=num_words, rng=rng)
        return cls(mean=mean, axes=axes, words=words)

    def signature(self, descriptors: Uint8Array) -> tuple[Uint64Array, BoolArray]:
        """Aggregates (N, D) descriptors into one bit string per word.

        Returns:
            (K,) signs of the summed residuals of each word, and (K,) which words occur at all.
        """
        centred: Float32Array = _normalise(descriptors) - self.mean
        projected = centred @ self.axes
        word_idx = _nearest(projected, words=self.words)
        num_words, num_bits = self.words.shape
        residuals: Float32Array = projected - self.words[word_idx]
        occupied, sums = _sums_by_word(residuals, word_idx=word_idx)
        packed = np.zeros((num_words, _SIGNATURE_BITS // 8), np.uint8)
        packed[occupied, : -(-num_bits // 8)] = np.packbits(sums > 0, axis=1)
        return packed.view(np.uint64)[:, 0], np.isin(np.arange(num_words), occupied)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A vocabulary that is to be learned."""

    num_learned_from: int  # keyframes, the first ones
    used_from: int  # keyframes there are when it replaces the one before


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LearnedVocabulary:
    """A vocabulary, and the signatures of the keyframes (N,) that it was learned from."""

    vocabulary: Vocabulary
    bits: Uint64Array  # (N, K) by word
    occupied: BoolArray  # (N, K) which words occur


class PlaceRecognizer:
    """Finds the keyframes that are most similar to a given one.

    A query is compared with up to 1000 keyframes by all of its words. Of more, it is compared with
    the 1000 not excluded that are most similar by 32 of them, so a further one costs it little.

    Queries return nothing before ``first_vocabulary_at`` keyframes were added. Vocabulary and
    signatures are made again at each doubling from there on, up to ``max_vocabulary_keyframes``,
    so a keyframe costs a bounded share of that work. A vocabulary is learned from the keyframes up
    to two before its doubling alone, and only where queries come: many keyframes added at once, as
    those of a run that is resumed, cost one. One thread at a time.

    Memory: 9 bytes per word and keyframe, and copies of each keyframe's strongest descriptors,
    which are released once the vocabulary is final.

    Args:
        config: size and times of the vocabulary.
        seed: of what is random in learning.
        thread: learns beside whoever asks; None, or a busy one: whoever asks does, when it is due.
    """

    def __init__(
        self, config: RetrievalConfig, *, seed: int, thread: Executor | None = None
    ) -> None:
        self._config = config
        self._seed = seed
        self._thread = thread
        self._frame_ids: list[FrameId] = []
        self._rows: dict[FrameId, int] = {}
        self._num_values = 0  # of a descriptor; 0: none came yet
        self._descriptors: list[Uint8Array] = []  # of each keyframe, while words may change
        self._learn_at = config.first_vocabulary_at
        self._plans: list[_Plan] = []  # the earliest first
        self._learning: tuple[_Plan, Future[_LearnedVocabulary]] | None = None  # on the thread
        self._vocabulary: Vocabulary | None = None
        self._kernel = np.zeros(0, np.float32)  # (B + 1,) similarity at each Hamming distance
        self._bits = np.zeros((0, config.num_words), np.uint64)  # rows grow by doubling
        self._occupied = np.zeros((0, config.num_words), np.bool_)
        self._num_occupied = np.zeros(0, np.int64)  # words

    @charged_to(Stage.PLACES)
    def add(self, features: Features) -> None:
        """Adds a keyframe; ``features`` come strongest first.

        Raises:
            ValueError: the keyframe was added before, or its descriptors have another length.
        """
        frame_id, descriptors = features.frame_id, features.descriptors
        if frame_id in self._rows:
            raise ValueError(f"keyframe {frame_id} was added before")
        self._num_values = self._num_values or descriptors.shape[1]
        if descriptors.shape[1] != self._num_values:
            raise ValueError(f"keyframe {frame_id}: descriptors of {descriptors.shape[1]} values")
        if not self._may_learn:
            self._replace_vocabulary_if_due()
        self._rows[frame_id] = len(self._frame_ids)
        self._frame_ids.append(frame_id)
        # A copy: what they are a part of may be let go of.
        strongest = descriptors[: self._config.max_descriptors].copy()
        if self._may_learn or self._plans:
            self._descriptors.append(strongest)
        if self._may_learn:
            self._plan_learning()
        self._describe([strongest])

    @charged_to(Stage.PLACES)
    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The added keyframes that are most similar to one of them.

        Args:
            frame_id: an added keyframe; never part of its own result.
            exclude: keyframes to leave out; unknown ones are ignored.
            limit: length of the result at most.

        Returns:
            Keyframes and scores in (0, 1], best first, of equal ones the one added first. A score
            is the cosine that all words would have to share to make the pair as similar.
            Empty before the first vocabulary.

        Raises:
            KeyError: the keyframe was never added.
        """
        row = self._rows[frame_id]
        self._replace_vocabulary_if_due()
        self._learn_ahead()
        if self._vocabulary is None:
            return []
        excluded = [row, *(self._rows[other] for other in exclude if other in self._rows)]
        scores = self._scores(row, excluded=excluded)
        best = np.argsort(-scores, kind="stable")[:limit]
        return [(self._frame_ids[idx], float(scores[idx])) for idx in best if scores[idx] > 0.0]

    @property
    def _may_learn(self) -> bool:
        is_first = self._vocabulary is None and not self._plans
        return is_first or self._learn_at <= self._config.max_vocabulary_keyframes

    def _plan_learning(self) -> None:
        """Plans new words shortly before a doubling, unless there is too little to learn from."""
        num_keyframes = len(self._frame_ids)
        if num_keyframes + _LEARNED_AHEAD < self._learn_at:
            return
        used_from = num_keyframes + _LEARNED_AHEAD
        share = math.ceil(self._training_size / num_keyframes)
        if sum(min(len(one), share) for one in self._descriptors) < self._config.num_words:
            return
        self._plans.append(_Plan(num_learned_from=num_keyframes, used_from=used_from))
        self._learn_at = 2 * used_from

    def _learn_ahead(self) -> None:
        """Begins with the words that the next keyframes need, on the thread."""
        if self._thread is not None and self._learning is None and self._plans:
            (plan,) = self._plans  # what was due is used by now
            self._learning = plan, self._thread.submit(self._learn, plan, self._learned_from(plan))

    def _replace_vocabulary_if_due(self) -> None:
        """Takes the words of the latest doubling, and makes the signatures that are missing."""
        due = [plan for plan in self._plans if plan.used_from <= len(self._frame_ids)]
        if not due:
            return
        plan, self._plans = due[-1], self._plans[len(due) :]
        learned = self._take_learned(plan)
        self._vocabulary = learned.vocabulary
        num_bits = learned.vocabulary.words.shape[1]
        cosines = 1.0 - 2.0 * np.arange(num_bits + 1) / num_bits
        self._kernel = (np.maximum(cosines, 0.0) ** _SELECTIVITY).astype(np.float32)
        self._reserve(len(self._frame_ids))
        self._bits[: plan.num_learned_from] = learned.bits
        self._occupied[: plan.num_learned_from] = learned.occupied
        self._num_occupied[: plan.num_learned_from] = np.count_nonzero(learned.occupied, axis=1)
        self._describe(self._descriptors[plan.num_learned_from :])
        if not self._may_learn and not self._plans:
            self._descriptors.clear()

    def _take_learned(self, plan: _Plan) -> _LearnedVocabulary:
        """The words of a plan, from the thread if it has begun with them."""
        learning, self._learning = self._learning, None
        if learning is not None and not learning[1].cancel() and learning[0] is plan:
            return learning[1].result()
        return self._learn(plan, self._learned_from(plan))

    def _learned_from(self, plan: _Plan) -> Sequence[Uint8Array]:
        """The descriptors (N, D) of each keyframe that a vocabulary is learned from."""
        return tuple(self._descriptors[: plan.num_learned_from])

    def _learn(self, plan: _Plan, descriptors: Sequence[Uint8Array]) -> _LearnedVocabulary:
        """Learns words; reads nothing that changes, for any thread."""
        rng = np.random.default_rng((self._seed, plan.num_learned_from))
        sample = _sample(descriptors, limit=self._training_size, rng=rng)
        vocabulary = Vocabulary.learn(sample, num_words=self._config.num_words, rng=rng)
        signatures = [vocabulary.signature(values) for values in descriptors]
        return _LearnedVocabulary(
            vocabulary=vocabulary,
            bits=np.stack([bits for bits, _ in signatures]),
            occupied=np.stack([occupied for _, occupied in signatures]),
        )

    @property
    def _training_size(self) -> int:
        return max(_TRAINING_DESCRIPTORS, _SEEDING_DESCRIPTORS_PER_WORD * self._config.num_words)

    def _describe(self, descriptors: Sequence[Uint8Array]) -> None:
        """Fills the signatures of the newest keyframes."""
        if self._vocabulary is None:
            return
        num_keyframes = len(self._frame_ids)
        self._reserve(num_keyframes)
        first = num_keyframes - len(descriptors)
        for row, values in enumerate(descriptors, start=first):
            self._bits[row], self._occupied[row] = self._vocabulary.signature(values)
            self._num_occupied[row] = np.count_nonzero(self._occupied[row])

    def _reserve(self, num_rows: int) -> None:
        missing = num_rows - len(self._bits)
        if missing > 0:
            extra = max(missing, len(self._bits))
            self._bits = np.pad(self._bits, ((0, extra), (0, 0)))
            self._occupied = np.pad(self._occupied, ((0, extra), (0, 0)))
            self._num_occupied = np.pad(self._num_occupied, (0, extra))

    def _scores(self, row: int, *, excluded: Sequence[int]) -> Float32Array:
        """Similarity of one keyframe to all, (num keyframes,); 0 to those that are not likely.

        Excluded rows have 0, too, and take no place among the likely ones.
        """
        num_keyframes = len(self._frame_ids)
        words = np.flatnonzero(self._occupied[row])
        if num_keyframes <= _MAX_COMPARED:
            scores = self._similarities(row, slice(num_keyframes), words=words)
            scores[excluded] = 0.0
            return scores
        first_words = words[:: max(1, len(words) // _NUM_FIRST_WORDS)]
        roughly = self._similarities(row, slice(num_keyframes), words=first_words)
        roughly[excluded] = -1.0
        likeliest = np.argpartition(-roughly, _MAX_COMPARED)[:_MAX_COMPARED]
        scores = np.zeros(num_keyframes, np.float32)
        scores[likeliest] = self._similarities(row, likeliest, words=words)
        scores[excluded] = 0.0
        return scores

    def _similarities(
        self, row: int, rows: slice | NDArray[np.intp], *, words: NDArray[np.intp]
    ) -> Float32Array:
        """Similarity (M,) of one keyframe to some by some of its words."""
        bits = np.take(self._bits[rows], words, axis=1)
        occupied = np.take(self._occupied[rows], words, axis=1)
        similarities = self._kernel[np.bitwise_count(bits ^ self._bits[row, words])]
        totals = np.einsum("kw,kw->k", similarities, occupied, dtype=np.float32)
        norms = np.sqrt(np.maximum(self._num_occupied[rows] * len(words), 1))
        scores: Float32Array = np.power(totals / norms, 1.0 / _SELECTIVITY).astype(np.float32)
        return scores


def _normalise(descriptors: Uint8Array) -> Float32Array:
    values = descriptors.astype(np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", values, values))
    values /= np.maximum(norms, 1.0)[:, None]
    return values


def _sample(
    descriptors: Sequence[Uint8Array], *, limit: int, rng: np.random.Generator
) -> Uint8Array:
    """At most ``limit`` rows, the same number from each keyframe that has so many."""
    share = math.ceil(limit / len(descriptors))
    chosen = [
        values if len(values) <= share else values[np.sort(rng.permutation(len(values))[:share])]
        for values in descriptors
    ]
    return np.concatenate(chosen)


def _nearest(points: Float32Array, *, words: Float32Array) -> Int64Array:
    """Row of the nearest word of each point, (N,)."""
    affinity: Float32Array = points @ words.T
    affinity -= 0.5 * np.einsum("kd,kd->k", words, words)
    nearest: Int64Array = affinity.argmax(axis=1)
    return nearest


def _sums_by_word(values: Float32Array, *, word_idx: Int64Array) -> tuple[Int64Array, Float32Array]:
    """Words that occur, ascending, and the sum of the rows of each."""
    order = np.argsort(word_idx, kind="stable")
    occupied, starts = np.unique(word_idx[order], return_index=True)
    if not len(occupied):
        return occupied, values[:0]
    return occupied, np.add.reduceat(values[order], starts, axis=0)


def _k_means(points: Float32Array, *, num_words: int, rng: np.random.Generator) -> Float32Array:
    """Lloyd's k-means from k-means++ seeds (Arthur and Vassilvitskii, SODA 2007); (K, B) words."""
    num_seeding = min(len(points), _SEEDING_DESCRIPTORS_PER_WORD * num_words)
    words = _k_means_seeds(rng.permutation(points)[:num_seeding], num_words=num_words, rng=rng)
    for _ in range(_LLOYD_ITERATIONS):
        word_idx = _nearest(points, words=words)
        occupied, sums = _sums_by_word(points, word_idx=word_idx)
        counts = np.bincount(word_idx, minlength=num_words)[occupied]
        words[occupied] = sums / counts[:, None].astype(np.float32)
    return words


def _k_means_seeds(
    points: Float32Array, *, num_words: int, rng: np.random.Generator
) -> Float32Array:
    squared_norms = np.einsum("nd,nd->n", points, points)
    seeds = np.empty((num_words, points.shape[1]), np.float32)
    nearest = np.full(len(points), np.inf, np.float32)
    chosen = 0
    for idx in range(num_words):
        seeds[idx] = points[chosen]
        distances = squared_norms - 2.0 * (points @ seeds[idx]) + squared_norms[chosen]
        np.minimum(nearest, np.maximum(distances, 0.0), out=nearest)
        cumulated = np.cumsum(nearest, dtype=np.float64)
        chosen = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
        chosen = min(chosen, len(points) - 1)
    return seeds
