"""Places of keyframes whose vectors do not come at once: the cluster was away, or is slow."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from adapters.remote import cluster as cluster_module
from adapters.remote import places as places_module
from adapters.remote import states as states_module
from adapters.remote.cluster import Cluster
from adapters.remote.dense import RemoteDense
from adapters.remote.messages import Message
from adapters.remote.places import RemotePlaces
from engine.config import DenseMatchingConfig, load_config
from engine.errors import InferenceError
from engine.types import Features, Float32Array, Frame, FrameId, MatchRequest, PairMatches
from tests.support.fake_cluster import WAIT_S, FakeProcesses
from tests.support.textured_images import frame_of

THERE = np.array([1.0, 0.0, 0.5], np.float32)
HERE = np.array([0.0, 1.0, 0.5], np.float32)


def table(frame_id: int) -> Features:
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=np.zeros((0, 2)),
        descriptors=np.zeros((0, 0), np.uint8),
        scales=np.zeros(0, np.float32),
        colors=np.zeros((0, 3), np.uint8),
    )


class Vectors:
    """Makes vectors while it is not away."""

    def __init__(self) -> None:
        self.is_away = False
        self.broken: set[int] = set()
        self.asked: list[int] = []

    def __call__(self, frame_id: FrameId) -> Float32Array | None:
        self.asked.append(frame_id)
        if self.is_away or frame_id in self.broken:
            return None
        vector = np.zeros(8, np.float32)
        vector[int(frame_id) % 3] = 1.0  # keyframes 3 apart show the same place
        return vector


def similar_to(places: RemotePlaces, frame_id: int) -> list[int]:
    return [int(one) for one, _ in places.query(FrameId(frame_id), exclude=(), limit=9)]


def test_keyframes_of_an_absence_are_recognized_once_the_cluster_is_back() -> None:
    vectors = Vectors()
    places = RemotePlaces(vectors)
    for frame_id in range(1, 4):
        places.add(table(frame_id))
    vectors.is_away = True
    for frame_id in range(4, 7):
        with pytest.raises(InferenceError):
            places.add(table(frame_id))
    assert similar_to(places, 4) == []
    vectors.is_away = False
    places.add(table(7))
    assert similar_to(places, 7) == [1, 4]
    assert similar_to(places, 5) == [2]
    assert not places._pending


def test_a_keyframe_whose_vector_never_comes_is_asked_for_a_few_times_only() -> None:
    vectors = Vectors()
    vectors.broken = {1}
    places = RemotePlaces(vectors)
    with pytest.raises(InferenceError):
        places.add(table(1))
    for frame_id in range(2, 10):
        places.add(table(frame_id))
    assert vectors.asked.count(1) == places_module._MAX_TRIES
    assert not places._pending


def test_keyframes_that_wait_for_their_vector_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "_MAX_PENDING", 2)
    vectors = Vectors()
    vectors.is_away = True
    places = RemotePlaces(vectors)
    for frame_id in range(1, 5):
        with pytest.raises(InferenceError):
            places.add(table(frame_id))
    assert list(places._pending) == [3, 4]


class Images:
    """A `StateSource` of images, which may make vectors here."""

    name = "mast3r"
    matches_everything = True

    def __init__(self) -> None:
        self.here: Float32Array | None = None
        self._kept: set[str] = set()

    def keep(self, frame: Frame) -> None:
        self._kept.add(str(frame.frame_id))

    def provide(self, key: str) -> Message | None:
        image = {"image": np.zeros(4, np.uint8)}
        return Message(kind="", arrays=image) if key in self._kept else None

    def place_vector_here(self, frame_id: FrameId) -> Float32Array | None:
        return self.here

    def match_here(self, request: MatchRequest) -> PairMatches:
        raise InferenceError("not here")

    def close(self) -> None:
        """Keeps no file."""


@pytest.fixture
def processes() -> FakeProcesses:
    return FakeProcesses(vectors=lambda key: THERE, is_up=False)


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.fixture
def matcher(
    processes: FakeProcesses, images: Images, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteDense]:
    """Over a cluster that does not answer yet."""
    stand_in = SimpleNamespace(
        Popen=processes,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(cluster_module, "subprocess", stand_in)
    config = load_config(
        settings=["remote.address=nowhere:1", "remote.stall_s=600", "remote.connect_timeout_s=0.01"]
    ).remote
    matcher = RemoteDense(
        config,
        dense=DenseMatchingConfig(),
        source=images,
        cluster=lambda provide: Cluster(config, spec={}, provide=provide),
    )
    assert not matcher.cluster.start()
    yield matcher
    matcher.close()


def come_up(matcher: RemoteDense, processes: FakeProcesses) -> None:
    processes.wait_for_one()
    processes.all[0].answers()
    with matcher.cluster._changed:
        assert matcher.cluster._changed.wait_for(matcher.cluster._is_usable, WAIT_S)


def frame(frame_id: int) -> Frame:
    return frame_of(np.full((48, 64, 3), 90, np.uint8), frame_id=frame_id)


def test_the_vector_of_a_keyframe_described_during_an_absence_is_made_there_afterwards(
    matcher: RemoteDense, processes: FakeProcesses
) -> None:
    matcher.describe(frame(1))
    assert matcher.place_vector(FrameId(1)) is None
    come_up(matcher, processes)
    vector = matcher.place_vector(FrameId(1))
    assert vector is not None
    assert np.array_equal(vector, THERE)
    figures = matcher.figures()
    assert (figures["places_failed"], figures["places_there"]) == (1, 1)


def test_during_an_absence_vectors_are_made_here_if_they_can_be(
    matcher: RemoteDense, images: Images
) -> None:
    images.here = HERE
    matcher.describe(frame(1))
    vector = matcher.place_vector(FrameId(1))
    assert vector is not None
    assert np.array_equal(vector, HERE)
    assert matcher.figures()["places_here"] == 1


def test_a_keyframe_whose_place_nobody_asks_for_is_not_kept(
    matcher: RemoteDense, processes: FakeProcesses
) -> None:
    come_up(matcher, processes)
    matcher.describe(frame(1))
    matcher.forget_ahead(FrameId(1))
    assert not matcher._states


def test_a_vector_that_is_none_is_not_taken_from_the_cluster(
    matcher: RemoteDense, processes: FakeProcesses
) -> None:
    come_up(matcher, processes)
    processes.all[0].vectors = lambda key: np.array([np.nan, 1.0], np.float32)
    matcher.describe(frame(1))
    assert matcher.place_vector(FrameId(1)) is None


def test_images_of_the_latest_keyframes_are_kept_and_the_first_removal_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(states_module, "_FILE_BYTES", 1)  # a file for each
    monkeypatch.setattr(states_module, "_MAX_FILES", 2)
    states = states_module.Mast3rStates(None)
    for frame_id in range(1, 5):
        states.keep(frame(frame_id))
    kept = [key for key in "1234" if states.provide(key) is not None]
    states.close()
    assert kept == ["3", "4"]
    assert caplog.text.count("not kept any more") == 1


def test_mast3r_makes_the_same_vector_here_as_a_worker_does(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from adapters.matchers.mast3r.open_matcher import mast3r_opener
    from adapters.remote.hosted_mast3r import mast3r_hosts
    from adapters.remote.states import Mast3rStates
    from tests.support.mast3r_weights import unpacked_mini_checkpoint

    config = load_config(
        settings=[
            f"mast3r.checkpoint={unpacked_mini_checkpoint(tmp_path)}",
            "mast3r.image_edge_px=64",
            "mast3r.precision=float32",
            "mast3r.device=cpu",
        ]
    )
    here = Mast3rStates(mast3r_opener(config.mast3r, dense=config.dense_matching))
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    here.keep(frame_of(pixels, frame_id=1))
    image = here.provide("1")
    assert image is not None
    _, there = mast3r_hosts(config)().encode("1", image.fields, image.arrays)
    vector = here.place_vector_here(FrameId(1))
    assert vector is not None
    assert np.array_equal(vector, there)
    assert here.place_vector_here(FrameId(2)) is None
    here.close()
