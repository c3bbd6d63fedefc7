"""Place recognition on synthetic places: sets of descriptors seen again with noise."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.config import RetrievalConfig
from engine.matching.place_recognition import PlaceRecognizer, Vocabulary
from engine.types import Features, FrameId, Uint8Array

P = ParamSpec("P")
T = TypeVar("T")

CONFIG = RetrievalConfig(
    num_words=64, max_descriptors=200, first_vocabulary_at=10, max_vocabulary_keyframes=40
)
NUM_SEEN = 100  # descriptors of a place in each view of it
NUM_CLUTTER = 60  # descriptors that no other image has


def make_features(frame_id: int, descriptors: NDArray[np.uint8]) -> Features:
    num = len(descriptors)
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=np.zeros((num, 2)),
        descriptors=descriptors,
        scales=np.ones(num, np.float32),
        colors=np.zeros((num, 3), np.uint8),
    )


def random_descriptors(rng: np.random.Generator, num: int, length: int = 128) -> Uint8Array:
    """Bytes as RootSIFT gives them: sparse histograms, 512 times the root of a share."""
    shares = rng.gamma(0.4, size=(num, length))
    roots = np.sqrt(shares / shares.sum(axis=1, keepdims=True))
    descriptors: Uint8Array = np.clip(np.round(512 * roots), 0, 255).astype(np.uint8)
    return descriptors


class World:
    """Places of 150 landmarks each; every view shows some of them, with noise, among clutter."""

    def __init__(self, *, seed: int, num_places: int, noise: float) -> None:
        self._rng = np.random.default_rng(seed)
        self._places = [random_descriptors(self._rng, 150) for _ in range(num_places)]
        self._noise = noise

    def view(self, place: int) -> Uint8Array:
        seen = self._rng.permutation(self._places[place])[:NUM_SEEN].astype(np.float64)
        seen += self._rng.normal(scale=self._noise, size=seen.shape)
        clutter = random_descriptors(self._rng, NUM_CLUTTER)
        both = np.concatenate([np.clip(np.round(seen), 0, 255).astype(np.uint8), clutter])
        return self._rng.permutation(both)


def recognizer_after(
    views: list[Uint8Array],
    *,
    config: RetrievalConfig = CONFIG,
    seed: int = 0,
    thread: Executor | None = None,
) -> PlaceRecognizer:
    recognizer = PlaceRecognizer(config, seed=seed, thread=thread)
    for frame_id, descriptors in enumerate(views, start=1):
        recognizer.add(make_features(frame_id, descriptors))
    return recognizer


def query(
    recognizer: PlaceRecognizer, frame_id: int, *, exclude: tuple[int, ...] = (), limit: int = 4
) -> list[tuple[FrameId, float]]:
    excluded = {FrameId(other) for other in exclude}
    return recognizer.query(FrameId(frame_id), exclude=excluded, limit=limit)


def recall_of_second_tour(*, noise: float, num_places: int = 30) -> float:
    """Share of places that their second view finds among the first four results."""
    world = World(seed=3, num_places=num_places, noise=noise)
    recognizer = recognizer_after([world.view(place) for place in range(num_places)])
    found = 0
    for place in range(num_places):
        frame_id = num_places + 1 + place
        recognizer.add(make_features(frame_id, world.view(place)))
        second_tour = tuple(range(num_places + 1, frame_id))
        hits = query(recognizer, frame_id, exclude=second_tour)
        found += FrameId(place + 1) in [hit for hit, _ in hits]
    return found / num_places


def test_a_place_seen_again_with_noise_is_among_the_first_four() -> None:
    assert recall_of_second_tour(noise=15.0) >= 0.95


def test_recall_falls_to_chance_when_noise_drowns_the_descriptors() -> None:
    assert recall_of_second_tour(noise=400.0) <= 0.4


def test_scores_fall_with_noise_towards_those_of_unrelated_places() -> None:
    place_scores = []
    for noise in (5.0, 15.0, 80.0):
        world = World(seed=5, num_places=12, noise=noise)
        views = [world.view(place) for place in range(12)] + [world.view(0)]
        scores = dict(query(recognizer_after(views), 13, limit=12))
        place_scores.append(scores.pop(FrameId(1)))
        assert 0.05 < max(scores.values()) < 0.2
    assert 0.3 < place_scores[0] < 0.6
    assert 0.2 < place_scores[1] < place_scores[0]
    assert place_scores[2] < 0.2


def test_an_identical_image_scores_one_and_comes_first() -> None:
    world = World(seed=1, num_places=15, noise=10.0)
    views = [world.view(place) for place in range(15)]
    hits = query(recognizer_after([*views, views[6]]), 16)
    assert hits[0][0] == 7
    assert hits[0][1] == pytest.approx(1.0, abs=1e-5)


def test_queries_return_nothing_before_the_first_vocabulary() -> None:
    world = World(seed=1, num_places=2, noise=5.0)
    recognizer = recognizer_after([world.view(0) for _ in range(9)])
    assert query(recognizer, 9) == []
    recognizer.add(make_features(10, world.view(0)))
    assert len(query(recognizer, 9)) == 4


def test_results_come_best_first_without_the_queried_and_the_excluded() -> None:
    world = World(seed=2, num_places=4, noise=10.0)
    recognizer = recognizer_after([world.view(idx % 4) for idx in range(24)])
    hits = query(recognizer, 24, exclude=(20, 16, 999), limit=50)
    scores = [score for _, score in hits]
    assert scores == sorted(scores, reverse=True)
    assert all(0.0 < score <= 1.0 for score in scores)
    assert {frame_id for frame_id, _ in hits}.isdisjoint({24, 20, 16, 999})
    assert [frame_id % 4 for frame_id, _ in hits[:3]] == [0, 0, 0]
    assert query(recognizer, 24, exclude=(20, 16, 999), limit=3) == hits[:3]
    assert query(recognizer, 24, limit=0) == []


def test_equal_scores_come_in_order_of_adding() -> None:
    world = World(seed=2, num_places=12, noise=5.0)
    views = [world.view(place) for place in range(12)]
    recognizer = recognizer_after([*views, views[3], views[3], views[3]])
    assert [frame_id for frame_id, _ in query(recognizer, 14, limit=3)] == [4, 13, 15]


def test_the_same_seed_gives_the_same_results() -> None:
    world = World(seed=4, num_places=10, noise=10.0)
    views = [world.view(idx % 10) for idx in range(30)]
    one, again, other = (recognizer_after(views, seed=seed) for seed in (7, 7, 8))
    assert query(one, 30, limit=30) == query(again, 30, limit=30)
    assert query(one, 30, limit=30) != query(other, 30, limit=30)


def test_words_are_learned_at_doublings_and_then_stay() -> None:
    world = World(seed=6, num_places=100, noise=10.0)
    recognizer = PlaceRecognizer(CONFIG, seed=0)
    changes, before = [], None
    for frame_id in range(1, 91):
        recognizer.add(make_features(frame_id, world.view(frame_id % 100)))
        pair_score = dict(query(recognizer, 1, exclude=tuple(range(3, 91)))).get(FrameId(2))
        if pair_score != before:
            changes.append(frame_id)
        before = pair_score
    assert changes == [10, 20, 40]


def test_only_the_strongest_descriptors_count() -> None:
    world = World(seed=8, num_places=12, noise=5.0)
    views = [world.view(place) for place in range(12)]
    config = CONFIG.model_copy(update={"max_descriptors": NUM_SEEN})
    longer = np.concatenate([views[0][:NUM_SEEN], world.view(5)])
    recognizer = recognizer_after([*views, longer], config=config)
    best, score = query(recognizer, 13)[0]
    assert best == 1
    assert score == pytest.approx(1.0, abs=1e-5)


def test_repeated_texture_does_not_outweigh_a_place() -> None:
    world = World(seed=9, num_places=12, noise=10.0)
    rng = np.random.default_rng(0)
    tile = random_descriptors(rng, 1).astype(np.float64)

    def tiled(place: int) -> Uint8Array:
        tiles = np.clip(tile + rng.normal(scale=5.0, size=(300, 128)), 0, 255).astype(np.uint8)
        return rng.permutation(np.concatenate([world.view(place), tiles]))

    views = [tiled(place) if place % 2 else world.view(place) for place in range(12)]
    config = CONFIG.model_copy(update={"max_descriptors": 1000})
    recognizer = recognizer_after([*views, tiled(0)], config=config)
    assert query(recognizer, 13)[0][0] == 1


def test_images_without_descriptors_are_neither_found_nor_find_anything() -> None:
    world = World(seed=10, num_places=12, noise=5.0)
    nothing = np.zeros((0, 128), np.uint8)
    recognizer = recognizer_after([nothing, *(world.view(place) for place in range(12)), nothing])
    assert query(recognizer, 14) == []
    assert 1 not in [frame_id for frame_id, _ in query(recognizer, 2, limit=20)]


def test_words_wait_until_there_are_enough_descriptors() -> None:
    rng = np.random.default_rng(0)
    twins = random_descriptors(rng, 5)
    recognizer = recognizer_after([twins, twins])
    found_at = []
    for frame_id in range(3, 17):
        recognizer.add(make_features(frame_id, random_descriptors(rng, 5)))
        if FrameId(2) in dict(query(recognizer, 1)):
            found_at.append(frame_id)
    # 13 keyframes of 5 descriptors are the first to fill 64 words, which are used from the 15th on
    assert found_at == [15, 16]


def test_images_that_are_all_the_same_do_not_disturb_learning() -> None:
    flat = np.full((80, 128), 45, np.uint8)
    recognizer = recognizer_after([flat] * 12)
    assert [frame_id for frame_id, _ in query(recognizer, 12)] == [1, 2, 3, 4]


def test_descriptors_shorter_than_a_signature_work_too() -> None:
    rng = np.random.default_rng(0)
    views = [random_descriptors(rng, 150, length=24) for _ in range(12)]
    again = np.concatenate([views[4][:100], random_descriptors(rng, 50, length=24)])
    assert query(recognizer_after([*views, again]), 13)[0][0] == 5


def test_a_keyframe_is_added_once_with_descriptors_of_one_length() -> None:
    rng = np.random.default_rng(0)
    recognizer = recognizer_after([random_descriptors(rng, 50) for _ in range(10)])
    with pytest.raises(ValueError, match="added before"):
        recognizer.add(make_features(3, random_descriptors(rng, 50)))
    with pytest.raises(ValueError, match="24 values"):
        recognizer.add(make_features(11, random_descriptors(rng, 50, length=24)))
    with pytest.raises(KeyError):
        query(recognizer, 11)


def test_keyframes_added_at_once_find_what_those_find_that_are_asked_one_by_one() -> None:
    world = World(seed=12, num_places=20, noise=10.0)
    views = [world.view(idx % 20) for idx in range(60)]
    asked = PlaceRecognizer(CONFIG, seed=0)
    for frame_id, descriptors in enumerate(views, start=1):
        asked.add(make_features(frame_id, descriptors))
        query(asked, frame_id)
    at_once = recognizer_after(views)
    hits = query(asked, 60, limit=30)
    assert len(hits) == 30
    assert query(at_once, 60, limit=30) == hits


class LateThread(Executor):
    """Runs calls when a test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(call(*args, **kwargs))

        self.waiting.append(run)
        return future

    def run_all(self) -> None:
        waiting, self.waiting = self.waiting, []
        for run in waiting:
            run()


@pytest.mark.parametrize("is_busy", [False, True])
def test_words_learned_on_another_thread_are_the_same_and_are_there_when_they_are_due(
    is_busy: bool,
) -> None:
    world = World(seed=4, num_places=15, noise=10.0)
    views = [world.view(idx % 15) for idx in range(45)]
    thread = LateThread()
    alone, beside = (PlaceRecognizer(CONFIG, seed=0, thread=each) for each in (None, thread))
    begun_at = []
    for frame_id, descriptors in enumerate(views, start=1):
        for recognizer in (alone, beside):
            recognizer.add(make_features(frame_id, descriptors))
        assert query(beside, frame_id) == query(alone, frame_id)
        if thread.waiting and not is_busy:
            begun_at.append(frame_id)
            thread.run_all()
    assert query(beside, 45)
    if not is_busy:
        assert begun_at == [8, 18, 38]


def test_no_query_learns_words_where_a_thread_had_two_keyframes_time_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(seed=4, num_places=15, noise=10.0)
    thread = LateThread()
    recognizer = PlaceRecognizer(CONFIG, seed=0, thread=thread)
    learn, num_learned_by_queries = Vocabulary.learn, 0

    def count(*args: Any, **kwargs: Any) -> Vocabulary:
        nonlocal num_learned_by_queries
        num_learned_by_queries += 1
        return learn(*args, **kwargs)

    for frame_id in range(1, 46):
        recognizer.add(make_features(frame_id, world.view(frame_id % 15)))
        with monkeypatch.context() as patch:
            patch.setattr(Vocabulary, "learn", count)
            query(recognizer, frame_id)
        if frame_id % 2:  # a keyframe later
            thread.run_all()
    assert num_learned_by_queries == 0
    assert query(recognizer, 45)


def test_keyframes_added_at_once_after_learning_began_get_the_words_of_their_doubling() -> None:
    world = World(seed=4, num_places=15, noise=10.0)
    views = [world.view(idx % 15) for idx in range(45)]
    thread = LateThread()
    beside = recognizer_after(views[:8], thread=thread)
    assert query(beside, 8) == []
    assert len(thread.waiting) == 1  # words that nobody will ask for
    for frame_id, descriptors in enumerate(views[8:], start=9):
        beside.add(make_features(frame_id, descriptors))
    assert query(beside, 45, limit=30) == query(recognizer_after(views), 45, limit=30)
    thread.run_all()  # the call was cancelled
    assert query(beside, 45, limit=30) == query(recognizer_after(views), 45, limit=30)


def test_words_are_learned_by_the_first_query_where_none_came_before() -> None:
    world = World(seed=4, num_places=15, noise=10.0)
    views = [world.view(idx % 15) for idx in range(31)]
    thread = LateThread()
    late = recognizer_after(views, thread=thread)
    assert thread.waiting == []
    assert query(late, 31)[0][0] in (1, 16)


def test_among_many_keyframes_a_place_is_found_as_among_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(seed=3, num_places=60, noise=8.0)
    recognizer = recognizer_after([world.view(place) for place in range(60)] * 2)
    all_compared = [query(recognizer, place) for place in range(1, 61)]
    monkeypatch.setattr("engine.matching.place_recognition._MAX_COMPARED", 20)
    few_compared = [query(recognizer, place) for place in range(1, 61)]

    for place, (before, after) in enumerate(zip(all_compared, few_compared, strict=True), start=1):
        assert after[0] == before[0]
        assert after[0][0] == 60 + place  # the same image again
    assert len(query(recognizer, 1, limit=200)) <= 20 < len(all_compared)


def test_keyframes_left_out_take_no_place_among_those_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(seed=3, num_places=40, noise=8.0)
    alike = [world.view(0)] * 30  # keyframes of the own map, more like the first than any other
    other = world.view(0)
    recognizer = recognizer_after([*alike, *(world.view(place) for place in range(1, 40)), other])
    monkeypatch.setattr("engine.matching.place_recognition._MAX_COMPARED", 20)
    own_map = tuple(range(1, 31))
    hits = query(recognizer, 1, exclude=own_map)
    assert hits[0][0] == 70
    assert not {frame_id for frame_id, _ in hits} & set(own_map)
