"""SIFT that a cluster does, to the bit, and each photo once; a thread stands for the cluster."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapters.matchers.sift import SiftMatcher
from adapters.remote import cluster as cluster_module
from adapters.remote import sift as sift_module
from adapters.remote.cluster import Cluster
from adapters.remote.frames import frame_to_plain
from adapters.remote.messages import Message
from adapters.remote.sift import RemoteSift
from engine.config import Config, load_config
from engine.errors import InferenceError
from engine.types import Features, Frame, ImagePair, MatchRequest
from tests.support.fake_cluster import AWAY_S, WAIT_S, FakeProcesses, Reply, sift_worker
from tests.support.textured_images import frame_of, random_texture, similarity_about

WIDTH, HEIGHT = 320, 240

Open = Callable[[Reply], tuple[RemoteSift, FakeProcesses]]


@pytest.fixture
def config() -> Config:
    settings = {"address": "nowhere:1", "stall_s": 600, "connect_timeout_s": WAIT_S}
    return load_config(settings=[f"remote.{name}={value}" for name, value in settings.items()])


@pytest.fixture
def opened(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens SIFT whose cluster replies as is given."""
    matchers: list[RemoteSift] = []

    def cluster(provide: Callable[[str], Message | None]) -> Cluster:
        return Cluster(config.remote, spec={}, provide=provide)

    def make(reply: Reply) -> tuple[RemoteSift, FakeProcesses]:
        processes = FakeProcesses(reply)
        stand_in = SimpleNamespace(
            Popen=processes,
            DEVNULL=subprocess.DEVNULL,
            TimeoutExpired=subprocess.TimeoutExpired,
        )
        monkeypatch.setattr(cluster_module, "subprocess", stand_in)
        local = SiftMatcher(config.sift)
        matchers.append(RemoteSift(config.remote, sift=config.sift, local=local, cluster=cluster))
        assert matchers[-1].cluster.start()
        return matchers[-1], processes

    yield make
    for one in matchers:
        one.close()


def frames(num: int) -> list[Frame]:
    texture = random_texture()
    center = (WIDTH / 2, HEIGHT / 2)
    turns = [similarity_about(center, angle_rad=0.03 * number) for number in range(num)]
    return [
        frame_of(texture.image(WIDTH, HEIGHT, image_from_texture=turn), frame_id=number)
        for number, turn in enumerate(turns, start=1)
    ]


def request_of(first: Features, second: Features) -> MatchRequest:
    nothing = np.empty(0, np.int64)
    return MatchRequest(
        pair=ImagePair(first.frame_id, second.frame_id),
        first=first,
        second=second,
        query_rows1=nothing,
        query_rows2=nothing,
    )


def test_a_cluster_describes_and_matches_as_sift_does_here(config: Config, opened: Open) -> None:
    matcher, _ = opened(sift_worker(config))
    local = SiftMatcher(config.sift)
    there = [matcher.describe(one) for one in frames(2)]
    here = [local.describe(one) for one in frames(2)]
    for one, other in zip(there, here, strict=True):
        for name in ("keypoints_xy", "descriptors", "scales", "colors"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    (found,) = matcher.match([request_of(*there)])
    (expected,) = local.match([request_of(*here)])
    assert len(expected) > 20
    assert np.array_equal(found.matches_idx, expected.matches_idx)
    figures = matcher.figures()
    assert (figures["described_there"], figures["matched_there"]) == (2, 1)


def test_a_photo_whose_turn_comes_while_it_is_being_sent_ahead_is_sent_once(
    config: Config, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher, processes = opened(sift_worker(config))
    (photo,) = frames(1)
    is_encoding, may_end = threading.Event(), threading.Event()

    def encode_slowly(frame: Frame) -> Any:
        is_encoding.set()
        may_end.wait(WAIT_S)
        return frame_to_plain(frame)

    monkeypatch.setattr(sift_module, "frame_to_plain", encode_slowly)
    matcher.describe_ahead(photo)
    assert is_encoding.wait(WAIT_S)
    described: list[Features] = []
    describing = threading.Thread(target=lambda: described.append(matcher.describe(photo)))
    describing.start()
    may_end.set()
    describing.join()
    assert len(described[0]) > 20
    assert len(processes.all[0].calls("describe")) == 1
    assert not matcher._described


def test_a_photo_that_is_forgotten_before_its_turn_is_not_kept(
    config: Config, opened: Open
) -> None:
    matcher, _ = opened(sift_worker(config))
    (photo,) = frames(1)
    matcher.describe_ahead(photo)
    matcher.forget_ahead(photo.frame_id)
    assert not matcher._described


def test_a_keyframe_is_in_flight_while_the_cluster_has_a_call_of_it_and_no_longer(
    config: Config, opened: Open
) -> None:
    worker = sift_worker(config)
    held: list[Message] = []

    def reply(call: Message) -> Message | None:
        if len(processes.all[0].calls("describe")) < 3:
            held.append(call)
            return None
        return worker(call)

    matcher, processes = opened(reply)
    photos = frames(5)
    calls = [matcher._begin_to_describe(photo) for photo in photos[:2]]
    while len(held) < 2:
        threading.Event().wait(0.001)
    for call in held:
        late = worker(call)
        assert late is not None
        processes.all[0].channel.send(late)
    for one in calls:
        one.result.result(WAIT_S)
    for photo in photos[2:]:
        matcher.describe(photo)  # one after the other, and none of them is matched
    assert matcher.figures()["keyframes_in_flight_max"] == 2


def test_pairs_that_are_begun_with_while_their_keyframe_is_forgotten_are_not_kept(
    config: Config, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher, _ = opened(sift_worker(config))
    first, second = (matcher.describe(one) for one in frames(2))
    is_sending, may_go_on = threading.Event(), threading.Event()
    begin, begun = matcher.cluster.call, []

    def begin_slowly(*arguments: Any, **more: Any) -> Any:
        is_sending.set()
        may_go_on.wait(WAIT_S)
        begun.append(begin(*arguments, **more))
        return begun[-1]

    monkeypatch.setattr(matcher.cluster, "call", begin_slowly)
    matcher.match_ahead(second.frame_id, [request_of(first, second)])
    assert is_sending.wait(WAIT_S)
    matcher.forget_ahead(second.frame_id)
    may_go_on.set()
    last = matcher._ahead.submit(lambda: None)
    assert last is not None
    last.result(WAIT_S)
    begun[0].result.result(WAIT_S)
    assert not matcher._asked
    assert not matcher._asked_for
    figures = matcher.figures()
    assert (figures["pairs_ahead"], figures["pairs_ahead_unused"]) == (1, 1)


def test_an_image_that_cannot_be_sent_is_described_here(
    config: Config, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher, _ = opened(sift_worker(config))

    def fails(frame: Frame) -> Any:
        raise InferenceError("cannot be encoded")

    monkeypatch.setattr(sift_module, "frame_to_plain", fails)
    assert len(matcher.describe(frames(1)[0])) > 20
    assert matcher.figures()["described_here"] == 1


def test_all_pairs_of_a_call_are_matched_though_the_cluster_was_away_for_the_first(
    config: Config, opened: Open
) -> None:
    worker = sift_worker(config)
    held: list[Message] = []

    def reply(call: Message) -> Message | None:
        if call.fields["method"] == "describe":
            return worker(call)
        held.append(call)
        processes.all[0].answers(silent_s=AWAY_S)
        return None

    matcher, processes = opened(reply)
    local = SiftMatcher(config.sift)
    described = [matcher.describe(one) for one in frames(3)]
    match_here = matcher._local.match

    def match_and_come_back(requests: list[MatchRequest]) -> Any:
        matched = match_here(requests)
        late = worker(held[0])
        assert late is not None
        processes.all[0].channel.send(late)
        processes.all[0].answers()
        return matched

    matcher._local.match = match_and_come_back  # type: ignore[method-assign, assignment]
    requests = [request_of(described[0], described[2]), request_of(described[1], described[2])]
    for found, expected in zip(matcher.match(requests), local.match(requests), strict=True):
        assert np.array_equal(found.matches_idx, expected.matches_idx)
    assert len(held) == 1
