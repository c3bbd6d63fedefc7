"""Descriptors beyond the limit leave memory once they are written, and come back as they were."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InferenceError
from engine.matching.descriptor_store import DescriptorStore
from engine.types import Features, FrameId, Uint8Array

NUM, LENGTH = 10, 128


def features(frame_id: int) -> Features:
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=np.full((NUM, 2), float(frame_id)),
        descriptors=np.full((NUM, LENGTH), frame_id, np.uint8),
        scales=np.ones(NUM, np.float32),
        colors=np.zeros((NUM, 3), np.uint8),
    )


class Written:
    """What the journal has, and how often it was asked."""

    def __init__(self) -> None:
        self.descriptors: dict[FrameId, Uint8Array] = {}
        self.num_reads = 0

    def __call__(self, frame_id: FrameId) -> Uint8Array | None:
        self.num_reads += 1
        return self.descriptors.get(frame_id)


def store_of(num: int, written: Written) -> DescriptorStore:
    return DescriptorStore(max_bytes=num * NUM * LENGTH, read=written)


def test_those_used_longest_ago_leave_memory_and_come_back_to_the_bit() -> None:
    written = Written()
    store = store_of(2, written)
    let_go: list[int] = []
    for frame_id in range(1, 6):
        table = features(frame_id)
        written.descriptors[table.frame_id] = table.descriptors.copy()
        store.add(table)
        if frame_id == 2:
            store.with_descriptors(features(1))  # used again
        let_go += store.make_room()
        assert store.num_bytes <= 2 * NUM * LENGTH
    assert let_go == [2, 1, 3]
    again = store.with_descriptors(features(2).without_descriptors())
    assert (again.descriptors == 2).all()
    assert again.descriptors.shape == (NUM, LENGTH)
    assert (again.keypoints_xy == 2.0).all()


def test_nothing_is_read_while_all_of_it_fits() -> None:
    written = Written()
    store = store_of(5, written)
    for frame_id in range(1, 6):
        store.add(features(frame_id))
        assert not store.make_room()
    assert store.with_descriptors(features(3)).descriptors.size
    assert not written.num_reads


@pytest.mark.parametrize("shape", [None, (NUM, LENGTH - 1), (NUM - 1, LENGTH)])
def test_what_is_not_written_as_it_is_stays_in_memory(shape: tuple[int, int] | None) -> None:
    written = Written()
    if shape is not None:
        written.descriptors[FrameId(1)] = np.zeros(shape, np.uint8)
    store = store_of(1, written)
    for frame_id in (1, 2):
        store.add(features(frame_id))
    assert not store.make_room()
    assert store.num_bytes == 2 * NUM * LENGTH
    assert store.with_descriptors(features(1)).descriptors.size


def test_descriptors_that_cannot_be_read_back_fail_the_pair_alone() -> None:
    written = Written()
    store = store_of(1, written)
    for frame_id in (1, 2):
        written.descriptors[FrameId(frame_id)] = features(frame_id).descriptors
        store.add(features(frame_id))
    assert store.make_room() == [1]
    written.descriptors.clear()  # the disk is gone
    with pytest.raises(InferenceError, match="cannot be read back"):
        store.with_descriptors(features(1).without_descriptors())
    assert store.with_descriptors(features(2)).descriptors.size


def test_tables_without_descriptors_cost_nothing() -> None:
    store = store_of(1, Written())
    for frame_id in range(1, 50):
        store.add(features(frame_id).without_descriptors())
    assert not store.num_bytes
    assert not store.make_room()
    assert not store.with_descriptors(features(7).without_descriptors()).descriptors.size


def test_one_that_was_never_written_keeps_no_other_in_memory() -> None:
    written = Written()
    store = store_of(1, written)
    for frame_id in range(1, 6):
        if frame_id != 1:
            written.descriptors[FrameId(frame_id)] = features(frame_id).descriptors
        store.add(features(frame_id))
        store.make_room()
    assert store.num_bytes <= 2 * NUM * LENGTH  # the first, and one within the limit
    assert store.with_descriptors(features(1)).descriptors.size
