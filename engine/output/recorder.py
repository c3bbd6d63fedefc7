"""Recorder: writes tables, journal, snapshots and figures of a run on one thread.

What cannot be written is reported and tried again; what is not on disk at the end is named.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pycolmap

from engine.config import RuntimeConfig, SnapshotsConfig
from engine.cpu_time import Stage, charged_to
from engine.errors import JournalError, SnapshotError
from engine.events import ALSO_AN_EVENT, DiskSpaceLow, Event, SnapshotWritten, Warned
from engine.mapping.steps import KeyframeRecord, MapCopy, MappingStep
from engine.matching.overlays import OverlayMask
from engine.output.disk import Trouble, free_bytes, reserve_bytes, trouble_of
from engine.output.folder_check import FolderCheck
from engine.output.journal import Journal, NewKeyframe, encode_keyframe_image, encode_mask
from engine.output.moments import MAX_LOCKED_S, MomentQueue
from engine.output.run_folder import (
    KEYFRAME_STATUS,
    MASKS_FOLDER,
    TRACKED_STATUS,
    RunFolder,
    dropped_status,
    live_trajectory_name,
)
from engine.output.snapshots import (
    JsonValue,
    WrittenSnapshot,
    is_latest,
    next_sequence,
    write_snapshot,
)
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

_SNAPSHOTS = "snapshots"
_SUMMARY = "summary.json"
_RECORDING = "recording.rrd"
_DOCUMENTS = {_SNAPSHOTS: "the final map"}  # for people, where it is not the file's name


class Recorder:
    """Writes tables, journal and snapshots of a run. One thread calls it after construction.

    What cannot be written is counted, and reported once per kind in the log and as a ``Warned``
    event; the run goes on, and what failed is tried again now and then and at the end. A folder
    that is renamed is followed; a run whose folder is lost goes on in another one.
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
            self._journal.write,
            failed=functools.partial(self._report_failed, "database.db"),
            beat=folder.beat,
        )
        self._snapshots = snapshots
        self._runtime = runtime
        self._emit = emit
        self._sequence = next_sequence(folder.path)
        self._mask: tuple[BoolArray, bytes] | None = None  # the last one, and as a file
        self._warned: set[str] = set()
        self._check = FolderCheck(folder, self._journal, emit=emit, reserve=self._reserve_bytes)
        self._documents: dict[str, Callable[[], None]] = {}  # by file: what writes it
        self._unsaved: set[str] = set()  # documents that are to be written again
        self._written: WrittenSnapshot | None = None  # the newest snapshot
        self._num_keypoints = self._journal.num_keypoints()  # of all keyframes
        self._misses_images = False
        self._has_recording = False
        self._is_locked = False  # another program holds the database
        self._is_disk_failing = False  # some write failed on account of the disk
        self.is_space_low = False  # no new frames should be taken
        self._num_failed_writes = 0
        self._num_broken = 0
        self._lost_products: set[str] = set()  # that are not on disk as they should be

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def num_failed_writes(self) -> int:
        """Writes that failed and, of those that are tried again, did not succeed until now."""
        return self._num_failed_writes + self._moments.num_lost + self._moments.num_unwritten

    # -- the folder and its disk ----------------------------------------------------------------

    def look(self) -> None:
        """Looks after the folder and its disk, and tries again what could not be written.

        To be called every few seconds; costs some file system calls.
        """
        self._folder.beat()
        self._check_folder()
        self._check_space()
        self._write_again()

    def count_failed_write(self) -> None:
        """Counts a write that broke in a way that nobody expected; it is missing."""
        self._num_broken += 1
        self._num_failed_writes += 1

    def product_failed(self, name: str, error: Exception) -> None:
        """Counts a product, which the map does without, that is not on disk; the run goes on.

        Args:
            name: of the product, in words that `not_saved` has.
            error: why; it says nothing about what the run needs of the folder.
        """
        self._lost_products.add(name)
        self._num_failed_writes += 1
        if name in self._warned:
            logger.debug("%s: %s", name, error)
            return
        self._warned.add(name)
        is_said = isinstance(error, JournalError)
        words = str(error) if is_said else f"{name} cannot be written: {_reason_of(error)}"
        self._warn(f"{words}; the map itself is not concerned")

    def product_written(self, name: str) -> None:
        """A product is on disk as it should be."""
        self._lost_products.discard(name)

    def not_saved(self) -> tuple[str, ...]:
        """What the run has and the disk has not, in words for people."""
        words = [f"{number} lines of {name}" for name, number in self._folder.unwritten().items()]
        if num_changes := self._moments.num_unwritten + self._moments.num_lost:
            words.append(f"{num_changes} changes of database.db")
        if self._num_broken:
            words.append(f"{self._num_broken} writes that broke, see the errors above")
        words += sorted(_DOCUMENTS.get(name, name) for name in self._unsaved)
        if _SNAPSHOTS not in self._unsaved and self._is_final_lost():
            words.append(_DOCUMENTS[_SNAPSHOTS])
        if num_missing := len(self._images_missing()):
            words.append(f"{num_missing} image{'s' * (num_missing > 1)} of the map")
        words += sorted(self._lost_products)
        if self._has_recording and not (self.path / _RECORDING).exists():
            words.append(_RECORDING)
        return tuple(words)

    def _check_folder(self) -> None:
        """Follows the folder, or makes again what was deleted."""
        self._has_recording |= (self.path / _RECORDING).exists()
        if self._check.check():
            self._note_missing_documents()

    def _rescue(self, reason: str, *, is_last_try: bool = False) -> None:
        if self._check.rescue(reason, is_last_try=is_last_try):
            self._note_missing_documents()

    def _note_missing_documents(self) -> None:
        self._sequence = next_sequence(self.path)
        self._unsaved |= {name for name in self._documents if not self._is_there(name)}

    def _is_there(self, document: str) -> bool:
        if document == _SNAPSHOTS:
            return not self._is_final_lost()
        return (self.path / document).exists()

    def _is_final_lost(self) -> bool:
        """Whether the final snapshot was written and is not `latest` any more."""
        return (
            _SNAPSHOTS in self._documents
            and self._written is not None
            and not is_latest(self.path, self._written.sequence)
        )

    def _images_missing(self) -> list[str]:
        names = self._written.image_names if self._written else ()
        return [name for name in names if not (self.path / "images" / name).exists()]

    def _check_images(self) -> None:
        """Reports, once, that images of the newest snapshot are not on disk."""
        if self._misses_images or self._moments.num_unwritten:
            return
        if missing := self._images_missing():
            self._misses_images = True
            self._warn(
                f"{self.path}: {len(missing)} images that the map names are not there, such as"
                f" {missing[0]}"
            )

    def _reserve_bytes(self) -> int:
        return reserve_bytes(self.path, self._runtime, num_keypoints=self._num_keypoints)

    def _check_space(self) -> None:
        free, reserve = free_bytes(self.path), self._reserve_bytes()
        if self.is_space_low or free is None or free >= reserve:
            return
        self.is_space_low = True
        self._emit(DiskSpaceLow(free_mb=round(free / 1e6, 1), reserve_mb=round(reserve / 1e6, 1)))
        self._warn(
            f"only {free / 1e6:.1f} MB are free on the disk of {self.path}, and saving the map"
            f" needs {reserve / 1e6:.1f} MB (runtime.min_free_mb): no more frames are taken, and"
            " the map is finished"
        )

    def _write_again(self) -> None:
        for name in sorted(self._unsaved):
            try:
                self._documents[name]()
            except (JournalError, SnapshotError) as error:
                logger.debug("%s", error)
            else:
                self._unsaved.discard(name)
        if self._moments.num_unwritten:
            self._moments.flush()
        if self._is_locked and not self._moments.num_unwritten:
            self._is_locked = False
            what = "what still waited" if self._moments.num_lost else "all that waited"
            self._warn(f"database.db can be written again, and {what} is in it")
        if self._folder.unwritten():
            try:
                self._folder.write_waiting()
            except JournalError as error:
                logger.debug("%s", error)

    # -- what is written ------------------------------------------------------------------------

    def go_on(self) -> None:
        """Begins to write in the folder of a run whose map is restored; see ``RunFolder.go_on``.

        Raises:
            JournalError: a file cannot be written.
        """
        self._folder.go_on()

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

    @charged_to(Stage.JOURNAL)
    def step_taken(self, step: MappingStep, frame: Frame | None = None) -> None:
        """Journals what a step of the mapper changed, as one moment, and settles its keyframe.

        Args:
            step: of the mapper.
            frame: that of the step's record, if it has one.
        """
        keyframe = None
        if step.record is not None and frame is not None:
            self._check_folder()
            self._num_keypoints += len(step.record.keyframe.features)
            self._settle(frame.frame_id, KEYFRAME_STATUS)
            keyframe = self._new_keyframe(frame, step.record)
        self._moments.add_step(step, keyframe=keyframe)

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

    @charged_to(Stage.SNAPSHOTS)
    def snapshot(self, copies: Sequence[MapCopy], *, entries: Mapping[str, JsonValue]) -> None:
        """Writes a snapshot of private copies of the maps and emits ``SnapshotWritten``."""
        self._check_folder()
        write = functools.partial(self._write_snapshot, copies, entries=entries)
        if entries.get("is_final"):
            self._document(_SNAPSHOTS, write)
        else:
            self._guard(_SNAPSHOTS, write)
        self._check_images()

    def _write_snapshot(
        self, copies: Sequence[MapCopy], *, entries: Mapping[str, JsonValue]
    ) -> None:
        try:
            self._written = write_snapshot(
                self.path,
                copies,
                sequence=self._sequence,
                entries=entries,
                config=self._snapshots,
            )
        except SnapshotError:
            # The folder may be in place and only its link missing: its number stays taken.
            self._sequence = max(self._sequence, next_sequence(self.path))
            raise
        self._sequence += 1
        self._emit(
            SnapshotWritten(
                sequence=self._written.sequence,
                path=str(self._written.path),
                num_keyframes=self._written.first.num_registered,
                num_points3D=self._written.first.num_points3D,
                elapsed_s=self._written.elapsed_s,
            )
        )

    def trajectories(self, poses: Sequence[Sequence[FramePose]]) -> None:
        """Writes the final poses of each map."""
        self._document("trajectory.txt", lambda: self._folder.write_trajectories(poses))

    def groundtruth(self, rows: Sequence[tuple[float, Float64Array]]) -> None:
        """Writes the true poses of a source that has them."""
        self._document("groundtruth.txt", lambda: self._folder.write_groundtruth(rows))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Writes the figures of the run, which name what is not saved."""

        def write() -> None:
            missing = [words for words in self.not_saved() if words != _SUMMARY]
            self._folder.write_summary({**figures, "not_saved": missing})

        self._document(_SUMMARY, write)

    def finish(self) -> tuple[str, ...]:
        """Writes all that is pending, if need be in another folder; returns what is not saved.

        The files stay open, and the folder the run's.
        """
        self._finish_writing()
        if self._is_disk_failing and (
            self._unsaved or self._folder.unwritten() or self._moments.num_unwritten
        ):
            self._rescue("cannot be written to the end", is_last_try=True)
            self._finish_writing()
        self._check_images()
        missing = self.not_saved()
        if missing and _SUMMARY in self._documents:
            self._guard(_SUMMARY, self._documents[_SUMMARY])
        return missing

    def close(self) -> tuple[str, ...]:
        """Closes the files and lets go of the folder; returns what is not saved."""
        self._guard("database.db", self._journal.close)
        missing = self.not_saved()
        self._guard("frames.csv", self._folder.close)
        return missing

    def abandon(self) -> None:
        """Closes the files without writing anything; the run in the folder stays what it was."""
        self._guard("database.db", self._journal.close)
        self._folder.abandon()

    def _finish_writing(self) -> None:
        self._check_folder()
        self._moments.flush(wait_s=MAX_LOCKED_S)
        self._write_again()
        if "frames.csv" not in self._documents or "frames.csv" in self._unsaved:
            self._document("frames.csv", self._folder.settle_all)

    def _document(self, name: str, write: Callable[[], None]) -> None:
        """Writes a file as a whole; it is written again where it fails or is lost later."""
        self._documents[name] = write
        self._unsaved.discard(name)
        if not self._guard(name, write):
            self._unsaved.add(name)

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
        except (JournalError, SnapshotError) as error:
            self._failed(what, error)
            return False
        return True

    def _failed(self, what: str, error: Exception) -> None:
        self._num_failed_writes += 1
        self._report_failed(what, error)

    def _report_failed(self, what: str, error: Exception) -> None:
        trouble = trouble_of(error)
        if trouble is Trouble.LOCKED:
            if not self._is_locked:
                self._is_locked = True
                self._warn(
                    f"{self.path / 'database.db'} is locked by another program: what is to be"
                    " written waits for it, and the run goes on"
                )
        elif what in self._warned:
            logger.debug("%s", error)
        else:
            self._warned.add(what)
            self._warn(f"{error}; the run goes on, more of this kind is only counted")
        match trouble:
            case Trouble.UNUSABLE:
                self._is_disk_failing = True
                self._rescue(f"cannot be written any more ({_reason_of(error)})")
            case Trouble.MISSING:
                self._is_disk_failing = True
                self._check_folder()
            case Trouble.FULL:
                self._is_disk_failing = True
            case _:
                pass

    def _warn(self, message: str) -> None:
        logger.error("%s", message, extra=ALSO_AN_EVENT)
        self._emit(Warned(message=message))


def _reason_of(error: BaseException) -> str:
    """What the system says about a failed write."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
