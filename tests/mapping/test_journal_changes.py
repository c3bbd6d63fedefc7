"""The journal gets each keyframe once, and what changed of earlier ones since the last step."""

from __future__ import annotations

from dataclasses import replace

from engine.mapping.journal_changes import JournalChanges
from engine.types import ImagePair
from tests.support.synthetic import SyntheticWorld, straight_path

WORLD = SyntheticWorld(straight_path(4))
FIRST, SECOND, THIRD, LAST = WORLD.frame_ids
CAMERA = WORLD.camera(LAST).as_colmap()


def test_a_record_has_its_own_pairs_as_such_and_others_as_changed() -> None:
    journal = JournalChanges()
    own = WORLD.verified_pair(THIRD, LAST)
    other = WORLD.verified_pair(FIRST, SECOND)
    journal.add_pairs([own, other])
    record = journal.record(WORLD.keyframe(LAST), camera=CAMERA, pairs=[own])
    assert record.pairs == (own,)
    assert record.changed_pairs == (other,)
    assert journal.take_pairs() == ()


def test_what_changes_twice_is_handed_over_as_it_is_last() -> None:
    journal, pair = JournalChanges(), ImagePair(FIRST, SECOND)
    table = WORLD.keyframe(FIRST).features
    moved = replace(table, keypoints_xy=table.keypoints_xy + 1.0)
    journal.add_table(table)
    journal.add_table(moved)
    journal.add_pairs([], lost=[pair])
    journal.add_pairs([WORLD.verified_pair(FIRST, SECOND)])
    record = journal.record(WORLD.keyframe(LAST), camera=CAMERA, pairs=[])
    assert record.moved == (moved,)
    assert [one.num_inliers > 0 for one in record.changed_pairs] == [True]
    assert journal.record(WORLD.keyframe(LAST), camera=CAMERA, pairs=[]).moved == ()


def test_a_pair_that_is_lost_is_handed_over_without_matches() -> None:
    journal, pair = JournalChanges(), ImagePair(FIRST, SECOND)
    journal.add_pairs([WORLD.verified_pair(FIRST, SECOND)])
    journal.add_pairs([], lost=[pair])
    (lost,) = journal.take_pairs()
    assert lost.pair == pair
    assert lost.num_inliers == 0


def test_cameras_are_copies() -> None:
    journal, camera = JournalChanges(), WORLD.camera(FIRST).as_colmap()
    journal.add_camera(FIRST, camera)
    focal_px = camera.focal_length
    camera.focal_length = 2.0 * focal_px
    assert journal.take_cameras()[FIRST].focal_length == focal_px
    assert journal.take_cameras() == {}
