"""Limits of recordings and of what a live server remembers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from adapters.views.rerun_limits import RecordingLimit, RedrawSchedule


def test_a_recording_is_full_once_its_file_is_large_enough_and_stays_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "recording.rrd"
    limit = RecordingLimit(path, max_mb=1)
    assert not limit.is_full
    path.write_bytes(bytes(999_999))
    assert not limit.is_full
    path.write_bytes(bytes(1_000_000))
    with caplog.at_level(logging.WARNING):
        assert limit.is_full
        path.write_bytes(b"")
        assert limit.is_full
    assert len(caplog.records) == 1


@pytest.mark.parametrize("max_mb", [0, 1])
def test_without_a_file_or_a_limit_nothing_is_ever_full(tmp_path: Path, max_mb: int) -> None:
    path = tmp_path / "recording.rrd"
    path.write_bytes(bytes(3_000_000))
    assert not RecordingLimit(path if max_mb == 0 else None, max_mb=max_mb).is_full


def test_everything_is_sent_again_before_the_server_drops_it() -> None:
    redraws = RedrawSchedule(memory_limit_mb=10)
    assert not redraws.take_due()
    redraws.add_sent_bytes(3_900_000)
    assert not redraws.take_due()
    redraws.add_sent_bytes(200_000)
    assert redraws.take_due()
    assert not redraws.take_due()
