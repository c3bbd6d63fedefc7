"""The slot of a job in flight: when its result is due, and when it is dropped."""

from __future__ import annotations

import pytest

from engine.mapping.jobs import JobKind, JobResult, JobSlot, MapJob


def job(kind: JobKind = JobKind.WINDOW) -> MapJob:
    def run() -> JobResult:
        raise AssertionError("a slot runs nothing")

    return MapJob(kind=kind, run=run)


def test_a_slot_is_free_until_a_job_starts_and_once_it_is_released() -> None:
    slot, one = JobSlot(merge_after_keyframes=1), job()
    assert slot.is_free
    assert slot.start(one) is one
    assert not slot.is_free
    assert slot.release(one)
    assert slot.is_free
    assert not slot.release(one)


@pytest.mark.parametrize("merge_after", [0, 1, 3])
def test_a_job_is_due_a_fixed_number_of_keyframes_after_its_start(merge_after: int) -> None:
    slot, one = JobSlot(merge_after_keyframes=merge_after), job()
    slot.count_keyframe()  # before the start they do not count
    slot.start(one)
    for _ in range(merge_after):
        assert slot.due is None
        slot.count_keyframe()
    assert slot.due is one
    slot.count_keyframe()
    assert slot.due is one  # until it is released
    slot.release(one)
    assert slot.due is None


def test_an_abandoned_job_is_never_due_and_its_result_is_refused() -> None:
    slot, one, other = JobSlot(merge_after_keyframes=1), job(), job()
    slot.start(one)
    slot.abandon()
    slot.count_keyframe()
    assert slot.is_free
    assert slot.due is None
    slot.start(other)
    assert not slot.release(one)
    assert not slot.is_free
    assert slot.release(other)
