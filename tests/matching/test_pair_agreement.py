"""Pairs are agreed when a third view confirms them, and held back before where that is required."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace

import pycolmap
import pytest

from engine.config import AgreementConfig, load_config
from engine.matching.pair_agreement import PairAgreement
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId, ImagePair, PairReason, VerifiedPair
from tests.support.false_pairs import false_pair
from tests.support.synthetic import SyntheticWorld, round_path, scene_graph, straight_path

WORLD = SyntheticWorld(straight_path(6), density=1.0, noise_px=0.4)
FAR = SyntheticWorld(round_path(24), density=1.0, noise_px=0.4)


def pair(one: int, other: int) -> ImagePair:
    return ImagePair.of(FrameId(one), FrameId(other))


class Run:
    """A scene graph whose keyframes come one by one, and what their pairs confirm."""

    def __init__(
        self, world: SyntheticWorld = WORLD, *, mode: str = "auto", matches_everything: bool = True
    ) -> None:
        self.world = world
        self.graph: SceneGraph = scene_graph()
        self.camera = world.camera(1).as_colmap()
        self.num_asked = 0
        self.agreement = PairAgreement(
            AgreementConfig(mode=mode),  # type: ignore[arg-type]
            graph=self.graph,
            camera_of=self._camera_of,
            matches_everything=matches_everything,
            seed=0,
        )

    def add(
        self, frame_id: int, *, with_ids: Collection[int] = (), false: Sequence[VerifiedPair] = ()
    ) -> set[ImagePair]:
        """Adds a keyframe with right and false pairs; returns the pairs that became agreed."""
        self.graph.add_keyframe(self.world.keyframe(frame_id))
        for other in with_ids:
            self.graph.record_pair(self.world.verified_pair(other, frame_id))
        for verified in false:
            self.graph.record_pair(verified)
        return {one.pair for one in self.agreement.add_pairs(FrameId(frame_id))}

    def usable(self) -> set[ImagePair]:
        return {one.pair for one in self.graph.edges()}

    def _camera_of(self, calibration_key: str) -> pycolmap.Camera:
        self.num_asked += 1
        return self.camera


def test_two_views_wait_for_a_third_one_that_confirms_all_three_pairs() -> None:
    run = Run()
    run.add(1)

    assert run.add(2, with_ids=[1]) == set()
    assert run.usable() == set()
    assert run.graph.connected_ids == []
    assert run.add(3, with_ids=[1, 2]) == {pair(1, 2), pair(1, 3), pair(2, 3)}
    assert run.usable() == {pair(1, 2), pair(1, 3), pair(2, 3)}
    assert run.graph.connected_ids == [1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_images_that_share_nothing_are_held_back_for_good(seed: int) -> None:
    run = Run(FAR)
    false: set[ImagePair] = set()
    for frame_id in range(1, 13):
        near = [other for other in range(max(1, frame_id - 2), frame_id)]
        wrong = [
            false_pair(FAR, other, frame_id, seed=seed) for other in range(1, max(1, frame_id - 7))
        ]
        false.update(one.pair for one in wrong)
        run.add(frame_id, with_ids=near, false=wrong)

    assert len(false) >= 10
    assert not false & run.usable()
    assert false <= {one.pair for one in run.graph.all_edges()}
    assert run.usable() == {one.pair for one in run.graph.all_edges()} - false


def test_a_pair_that_is_agreed_already_takes_no_triplet_from_its_neighbours() -> None:
    run = Run()
    run.add(1)
    run.add(2)
    run.add(4, with_ids=[1, 2])
    run.graph.record_pair(WORLD.verified_pair(1, 2))
    assert run.add(3, with_ids=[1, 2]) == {pair(1, 2), pair(1, 3), pair(2, 3)}

    agreed = run.agreement.add_pairs(FrameId(2))

    assert {one.pair for one in agreed} == {pair(1, 4), pair(2, 4)}


def test_pairs_are_tested_again_when_the_focal_length_has_moved() -> None:
    run = Run(FAR)
    right = list(run.camera.params)
    run.camera.params = [3.0 * right[0], *right[1:]]
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[1, 2])
    before = run.usable()
    run.camera.params = right
    agreed = run.add(4, with_ids=[2, 3])

    assert before == set()
    assert agreed == {pair(1, 2), pair(1, 3), pair(2, 3), pair(2, 4), pair(3, 4)}


def test_a_pair_whose_matches_are_others_now_is_tested_again() -> None:
    run = Run()
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[1, 2])
    run.graph.record_pair(false_pair(WORLD, 1, 3))

    assert run.agreement.test_again([pair(1, 3)]) == []
    assert pair(1, 3) not in run.usable()
    assert pair(1, 2) in run.usable()


def test_where_it_is_not_required_pairs_are_tested_when_somebody_asks() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[1, 2], false=[])

    assert run.num_asked == 0
    assert run.usable() == {pair(1, 2), pair(1, 3), pair(2, 3)}
    assert run.agreement.usable(run.graph.all_edges()) == run.graph.all_edges()
    assert run.agreement.is_agreed(pair(1, 2))
    assert not run.agreement.is_agreed(pair(1, 4))
    assert run.num_asked > 0


def test_a_run_may_require_it_later() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[1, 2])
    run.add(4, with_ids=[2, 3], false=[false_pair(WORLD, 1, 4)])

    assert run.agreement.may_be_required
    run.agreement.require()
    assert run.agreement.is_required
    assert run.usable() == {pair(1, 2), pair(1, 3), pair(2, 3), pair(2, 4), pair(3, 4)}


def test_switched_off_it_confirms_nothing_and_holds_nothing_back() -> None:
    run = Run(mode="off")
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[1, 2])

    assert not run.agreement.is_required
    assert not run.agreement.may_be_required
    assert not run.agreement.is_agreed(pair(1, 2))
    assert len(run.usable()) == 3


def test_the_word_off_is_a_mode() -> None:
    assert load_config(settings=["agreement.mode=off"]).agreement.mode == "off"
    assert load_config(settings=["matching.metric_scale=off"]).matching.metric_scale == "off"


def test_most_pairs_agree_by_the_right_focal_length() -> None:
    run = Run(FAR)
    run.add(1)
    for frame_id in range(2, 7):
        run.add(frame_id, with_ids=range(max(1, frame_id - 2), frame_id))

    def num_agreed(ratio: float) -> int:
        camera = copy.deepcopy(run.camera)
        camera.params = [ratio * run.camera.params[0], *run.camera.params[1:]]
        return run.agreement.num_agreed_with(lambda key: camera, pairs=run.graph.all_edges())

    assert num_agreed(1.0) == len(run.graph.all_edges())
    assert num_agreed(3.0) < 0.5 * num_agreed(1.0)


def test_what_was_agreed_stays_so_in_a_run_that_goes_on() -> None:
    run = Run()
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[1, 2])
    run.add(4, with_ids=[2, 3], false=[false_pair(WORLD, 1, 4)])
    agreed = run.agreement.take_agreed()
    assert agreed == {2: [1], 3: [1, 2], 4: [2, 3]}
    assert run.agreement.take_agreed() == {}

    again = Run()
    for frame_id in (1, 2, 3, 4):
        again.graph.add_keyframe(again.world.keyframe(frame_id))
    for verified in run.graph.all_edges():
        again.graph.record_pair(verified)
    again.agreement.restore(
        run.agreement.facts(),
        [pair(first, second) for second, others in agreed.items() for first in others],
    )
    assert again.usable() == run.usable()
    assert again.num_asked == 0
    assert again.add(5, with_ids=[3, 4]) == run.add(5, with_ids=[3, 4])


# -- pairs of a second matcher --------------------------------------------------------------------


def of_second(verified: VerifiedPair) -> VerifiedPair:
    return replace(verified, reason=PairReason.SECOND)


def test_pairs_of_a_second_matcher_wait_for_a_third_view_and_others_do_not() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    run.add(2, with_ids=[1])
    assert run.usable() == {pair(1, 2)}
    assert not run.agreement.is_asked_for
    run.add(3, false=[of_second(WORLD.verified_pair(1, 3))])
    assert run.agreement.is_asked_for
    assert run.usable() == {pair(1, 2)}
    run.add(4, with_ids=[1, 3])
    assert run.usable() == {one.pair for one in run.graph.all_edges()}
    assert run.agreement.is_agreed(pair(1, 3))


@pytest.mark.parametrize("seed", range(3))
def test_false_pairs_of_a_second_matcher_are_held_back_for_good(seed: int) -> None:
    run = Run(FAR, matches_everything=False)
    false: set[ImagePair] = set()
    for frame_id in range(1, 13):
        near = [other for other in range(max(1, frame_id - 2), frame_id)]
        wrong = [
            of_second(false_pair(FAR, other, frame_id, seed=seed))
            for other in range(1, max(1, frame_id - 7))
        ]
        false.update(one.pair for one in wrong)
        run.add(frame_id, with_ids=near, false=wrong)
    assert len(false) >= 10
    assert run.usable() == {one.pair for one in run.graph.all_edges()} - false


def test_what_was_held_back_of_a_second_matcher_is_so_in_a_run_that_goes_on() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[2], false=[of_second(false_pair(WORLD, 1, 3, seed=0))])
    again = Run(matches_everything=False)
    for frame_id in (1, 2, 3):
        again.graph.add_keyframe(WORLD.keyframe(frame_id))
    for verified in run.graph.all_edges():
        again.graph.record_pair(verified)
    again.agreement.restore(run.agreement.facts(), [])
    assert again.usable() == run.usable() == {pair(1, 2), pair(2, 3)}


def test_a_weak_pair_gets_the_matches_of_a_second_matcher_once_a_third_view_confirms_them() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    weak = false_pair(WORLD, 1, 2, seed=0)
    run.add(2, false=[weak])
    better = of_second(WORLD.verified_pair(1, 2))
    assert run.agreement.take_instead([better]) == []
    assert run.graph.edge(pair(1, 2)) is weak
    assert run.usable() == {pair(1, 2)}  # as it was
    run.add(3, with_ids=[1, 2])
    assert run.agreement.take_instead([better]) == [better]
    assert run.graph.edge(pair(1, 2)) is better
    assert run.agreement.is_agreed(pair(1, 2))
    assert run.usable() == {pair(1, 2), pair(1, 3), pair(2, 3)}


def test_weak_pairs_that_confirm_each_other_are_replaced_together() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    run.add(2, false=[false_pair(WORLD, 1, 2, seed=0)])
    run.add(3, false=[false_pair(WORLD, 1, 3, seed=1), false_pair(WORLD, 2, 3, seed=2)])
    better = [of_second(WORLD.verified_pair(*both)) for both in ((1, 2), (1, 3), (2, 3))]
    assert run.agreement.take_instead(better[:2]) == []
    assert run.agreement.take_instead(better) == better


def test_nothing_is_kept_of_other_matches_that_wait_no_more() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    run.add(2, false=[false_pair(WORLD, 1, 2, seed=0)])
    run.add(3, false=[false_pair(WORLD, 1, 3, seed=1)])
    better = [of_second(WORLD.verified_pair(*both)) for both in ((1, 2), (1, 3))]
    assert run.agreement.take_instead(better) == []
    assert run.agreement.take_instead(better[1:]) == []
    assert set(run.agreement._instead) == {pair(1, 3)}


def test_a_pair_that_is_agreed_keeps_its_matches() -> None:
    run = Run(matches_everything=False)
    run.add(1)
    run.add(2, with_ids=[1])
    run.add(3, with_ids=[1, 2])
    own = run.graph.edge(pair(1, 2))
    assert run.agreement.take_instead([of_second(WORLD.verified_pair(1, 2))]) == []
    assert run.graph.edge(pair(1, 2)) is own
