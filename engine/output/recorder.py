"""Recorder: writes tables, journal, snapshots and figures of a run on one thread.

A full disk degrades the run and is reported; it never ends it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pycolmap

from engine.config import RuntimeConfig, SnapshotsConfig
from engine.errors import JournalError, SnapshotError
from engine.events import Event, SnapshotWritten, Warned
from engine.mapping.steps import KeyframeRecord, MapCopy, MappingStep
from engine.matching.overlays import OverlayMask
from engine.output.journal import Journal, NewKeyframe, encode_keyframe_image, encode_mask
from engine.output.moments import MomentQueue
from engine.output.run_folder import (
    KEYFRAME_STATUS,
    MASKS_FOLDER,
    TRACKED_STATUS,
    RunFolder,
    dropped_status,
    live_trajectory_name,
)
from engine.output.snapshots import JsonValue, next_sequence, write_snapshot
from engine.ports import EventSink
from engine.types import (
    BoolArray,
    DropReason,
    Float64Array,
    Frame,
    FrameId,
    FramePose,
    GpsReading,
    RejectedFrame,
)

logger = logging.getLogger(__name__)


class Recorder:
    """Writes tables, journal and snapshots of a run. One thread calls it after construction.

    What cannot be written is counted, and reported once per kind in the log and as a ``Warned``
    event; the run goes on, and later writes are tried again.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        snapshots: SnapshotsConfig,
        runtime: RuntimeConfig,
        emit: EventSink,
    ) -> None:
        self._folder = folder
        self._journal = Journal.open(folder.path)
        self._moments = MomentQueue(
            self._journal.write, failed=functools.partial(self._report_failed, "database.db")
        )
        self._snapshots = snapshots
        self._runtime = runtime
        self._emit = emit
        self._sequence = next_sequence(folder.path)
        self._mask: tuple[BoolArray, bytes] | None = None  # the last one, and as a file
        self._warned: set[str] = set()
        self._num_failed_writes = 0

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def num_failed_writes(self) -> int:
        """Writes that failed and, of those that are tried again, did not succeed until now."""
        return self._num_failed_writes + self._moments.num_lost + self._moments.num_unwritten

    def count_failed_write(self) -> None:
        """Counts a write that broke in a way that nobody expected."""
        self._num_failed_writes += 1

    def frame_arrived(self, frame: Frame | RejectedFrame) -> None:
        """Adds a frame to ``frames.csv``."""
        self._guard("frames.csv", lambda: self._folder.frame_arrived(frame))
        status = dropped_status(frame.reason) if isinstance(frame, RejectedFrame) else None
        self._moments.add_frame(frame, status=status)

    def frame_dropped(self, frame_id: FrameId, reason: DropReason) -> None:
        """Writes the status of a frame that was dropped."""
        self._settle(frame_id, dropped_status(reason))

    def frame_tracked(self, frame_id: FrameId) -> None:
        """Writes the status of a frame between keyframes."""
        self._settle(frame_id, TRACKED_STATUS)

    def gps_reading(self, reading: GpsReading) -> None:
        """Journals a position that came beside the frames."""
        self._moments.add_reading(reading)

    def step_taken(self, step: MappingStep, frame: Frame | None = None) -> None:
        """Journals what a step of the mapper changed, as one moment, and settles its keyframe.

        Args:
            step: of the mapper.
            frame: that of the step's record, if it has one.
        """
        keyframe = None
        if step.record is not None and frame is not None:
            self._settle(frame.frame_id, KEYFRAME_STATUS)
            keyframe = self._new_keyframe(frame, step.record)
        self._moments.add_step(step, keyframe=keyframe)

    def keyframe_added(self, frame: Frame, record: KeyframeRecord) -> None:
        """Journals a keyframe alone, whose step broke, and settles its frame."""
        self._settle(frame.frame_id, KEYFRAME_STATUS)
        self._moments.add_record(record, keyframe=self._new_keyframe(frame, record))

    def cameras_calibrated(self, cameras: Iterable[pycolmap.Camera]) -> None:
        """Journals the current calibrations of cameras."""
        self._moments.add_cameras(cameras)

    def overlays_masked(self, masks: Iterable[OverlayMask]) -> None:
        """Takes what overlays cover out of the masks of keyframe images; makes those missing."""
        for of_camera in masks:
            for name in of_camera.image_names:
                self._guard(
                    MASKS_FOLDER, functools.partial(self._mask_overlays, name, of_camera.mask)
                )

    def events(self, events: Iterable[Event]) -> None:
        """Appends events to ``events.jsonl``."""
        for event in events:
            self._guard("events.jsonl", functools.partial(self._folder.append_event, event))

    def live_poses(self, poses: Iterable[FramePose]) -> None:
        """Appends poses as first reported to the live trajectories of their worlds."""
        for pose in poses:
            self._guard(
                live_trajectory_name(pose.world_number),
                functools.partial(self._folder.append_live_pose, pose),
            )

    def snapshot(self, copies: Sequence[MapCopy], *, entries: Mapping[str, JsonValue]) -> None:
        """Writes a snapshot of private copies of the maps and emits ``SnapshotWritten``."""
        try:
            written = write_snapshot(
                self._folder.path,
                copies,
                sequence=self._sequence,
                entries=entries,
                config=self._snapshots,
            )
        except SnapshotError as error:
            # The folder may be in place and only its link missing: its number stays taken.
            self._sequence = max(self._sequence, next_sequence(self._folder.path))
            self._failed("snapshots", error)
            return
        self._sequence += 1
        self._emit(
            SnapshotWritten(
                sequence=written.sequence,
                path=str(written.path),
                num_keyframes=written.first.num_registered,
                num_points3D=written.first.num_points3D,
                elapsed_s=written.elapsed_s,
            )
        )

    def trajectories(self, poses: Sequence[Sequence[FramePose]]) -> None:
        """Writes the final poses of each map."""
        self._guard("trajectory.txt", lambda: self._folder.write_trajectories(poses))

    def groundtruth(self, rows: Sequence[tuple[float, Float64Array]]) -> None:
        """Writes the true poses of a source that has them."""
        self._guard("groundtruth.txt", lambda: self._folder.write_groundtruth(rows))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Writes the figures of the run."""
        self._guard("summary.json", lambda: self._folder.write_summary(figures))

    def close(self) -> None:
        """Writes what is pending, closes the files and lets go of the folder."""
        self._moments.flush()
        self._guard("database.db", self._journal.close)
        self._guard("frames.csv", self._folder.close)

    def _new_keyframe(self, frame: Frame, record: KeyframeRecord) -> NewKeyframe | None:
        """A keyframe with its files; None if these cannot be encoded."""
        try:
            return NewKeyframe(
                keyframe=record.keyframe,
                camera=record.camera,
                source=frame.source,
                image_bytes=encode_keyframe_image(
                    frame, quality=self._runtime.keyframe_jpeg_quality
                ),
                mask_bytes=self._encoded(frame.mask),
            )
        except JournalError as error:
            self._failed("database.db", error)
            return None

    def _encoded(self, mask: BoolArray | None) -> bytes | None:
        """A frame's mask as a file; frames that share one have it encoded once."""
        if mask is None:
            return None
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, encode_mask(mask)
        return self._mask[1]

    def _mask_overlays(self, image_name: str, mask: BoolArray) -> None:
        given = self._journal.read_mask(image_name)
        data = self._encoded(mask) if given is None else encode_mask(given & mask)
        if data is not None:
            self._journal.write_mask(image_name, data)

    def _settle(self, frame_id: FrameId, status: str) -> None:
        self._guard("frames.csv", lambda: self._folder.frame_settled(frame_id, status=status))
        self._moments.settle_frame(frame_id, status=status)

    def _guard(self, what: str, write: Callable[[], None]) -> bool:
        """Calls ``write``; returns whether it succeeded."""
        try:
            write()
        except JournalError as error:
            self._failed(what, error)
            return False
        return True

    def _failed(self, what: str, error: Exception) -> None:
        self._num_failed_writes += 1
        self._report_failed(what, error)

    def _report_failed(self, what: str, error: Exception) -> None:
        if what in self._warned:
            logger.debug("%s", error)
            return
        self._warned.add(what)
        message = f"{error}; the run goes on, more of this kind is only counted"
        logger.error("%s", message)
        self._emit(Warned(message=message))
