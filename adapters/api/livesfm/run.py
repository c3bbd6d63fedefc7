"""A run on threads of its own, and what a program does with it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from adapters.calibrations.by_camera import CalibrationsByCamera
from adapters.launch import (
    LaunchOptions,
    count_frame_ids,
    limit_library_threads,
    open_engine,
    report_at_end,
)
from adapters.native_log import descriptor_captured
from adapters.views.view_mode import ViewMode
from engine.config import Config, load_config
from engine.errors import ConfigError, FolderTakenError
from engine.events import Event
from engine.types import (
    BoolArray,
    DropReason,
    GpsFix,
    IntrinsicsPrior,
    MapCounts,
    MapView,
    RunCommand,
    Uint8Array,
    Verdict,
)
from livesfm.arguments import (
    checked_camera,
    checked_fix,
    checked_overrides,
    checked_prior,
    checked_time,
    plain_value,
)
from livesfm.frames import HandedFrame, HandedPosition, LiveFrames, RunEndedError, WaitingFrames
from livesfm.poses import CollectingView, MapKeepingView, Pose

if TYPE_CHECKING:
    import pycolmap

    from engine.run.engine import RunOutcome

logger = logging.getLogger(__name__)

DEFAULT_CAMERA = "camera"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended."""

    path: Path  # of the run folder
    verdict: Verdict  # how far the map can be trusted
    num_keyframes: int
    num_registered: int  # in the map
    stopped_by: str
    not_saved: tuple[str, ...]  # what the disk does not have, in words
    frames_dropped: Mapping[str, int]  # by reason
    summary: Mapping[str, Any] = field(repr=False)  # as in summary.json


def open_run(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    overrides: Mapping[str, object] | None = None,
    lossless: bool = False,
    photos: bool = False,
    overwrite: bool = False,
    record: bool = False,
    keep_map: bool = False,
    on_event: Callable[[Event], None] | None = None,
    on_end: Callable[[], None] | None = None,
) -> Run:
    """Opens a run, which begins at once.

    Args:
        path: of the run folder, new or empty.
        config: a preset (``phone``, ``drone``, ...) or a YAML file; several, of which later win.
        overrides: settings by ``section.key``; they win over the files.
        lossless: `Run.add_frame` waits while the engine is behind, and no frame is dropped. Else
            the newest frame of each camera wins, and drops are events.
        photos: each frame is a photo, in any order, and becomes a keyframe; the run is lossless.
            Else the frames of a camera are a video, of which some become keyframes.
        overwrite: a former run in the folder is replaced.
        record: a Rerun recording is written into the folder.
        keep_map: the run copies its map now and then, for `Run.map`.
        on_event: is called with every event, on a thread of the run; it must not block. What it
            raises goes to the log.
        on_end: is called once when the run has ended, by itself or not, on the thread of the run.

    Raises:
        TypeError: `config` is no path and no sequence of paths, or `overrides` is no mapping from
            strings to values that JSON has, NumPy's numbers and paths among them.
        ConfigError: a setting is wrong, or the folder cannot be used.
        AdapterUnavailableError: a package that a setting asks for is missing.
        JournalError: the folder cannot be written.
    """
    resolved = load_config(_overlays(config), _settings({} if overrides is None else overrides))
    return Run(
        resolved,
        path=Path(path),
        is_lossless=lossless or photos,
        are_photos=photos,
        overwrite=overwrite,
        is_recorded=record,
        keeps_map=keep_map,
        on_event=on_event,
        on_end=on_end,
    )


class Run:
    """A run that a program feeds; made by `open_run`. For any thread.

    As a context manager it ends the run: `finish` where the block ended, `stop` where it raised.
    A run that is still open when the interpreter exits is stopped and saved.
    OpenCV and BLAS get one thread a call in the whole process, and lines that native libraries
    write to the terminal go to Python's logging while runs last.
    """

    def __init__(
        self,
        config: Config,
        *,
        path: Path,
        is_lossless: bool,
        are_photos: bool,
        overwrite: bool,
        is_recorded: bool,
        keeps_map: bool,
        on_event: Callable[[Event], None] | None,
        on_end: Callable[[], None] | None,
    ) -> None:
        from engine.run.event_loop import RunRequests

        limit_library_threads()
        self._is_lossless = is_lossless
        next_frame_id = count_frame_ids()
        self._frames: WaitingFrames | LiveFrames
        if is_lossless:
            self._frames = WaitingFrames(
                config.sources, next_frame_id=next_frame_id, are_photos=are_photos
            )
        else:
            self._frames = LiveFrames(config.sources, next_frame_id=next_frame_id)
        view = MapKeepingView if keeps_map else CollectingView
        self._view = view(origin_of=self._frames.origin_of, listen=on_event)
        self._requests = RunRequests()
        given = config.cameras.calibrations
        options = LaunchOptions(
            sources=(self._frames.info.label,),
            path=path,
            overwrite=overwrite,
            view_mode=ViewMode.RECORD if is_recorded else ViewMode.NONE,
            show_progress=False,
        )
        try:
            engine = open_engine(
                config,
                options,
                [self._frames],
                calibrations=CalibrationsByCamera.read(given) if given else None,
                views=[self._view],
                requests=self._requests,
            )
        except FolderTakenError as error:
            raise ConfigError(f"{error.reason}, or overwrite=True") from error
        self._config = config
        self._path = path
        self._outcome: RunOutcome | None = None
        self._error: BaseException | None = None
        self._has_ended = threading.Event()
        self._is_raised = False  # so that nobody misses it
        self._on_end = on_end
        self._thread = threading.Thread(target=self._run, args=(engine.run,), name="livesfm")
        self._thread.start()
        _AT_EXIT.add(self)

    # -- in -------------------------------------------------------------------------------------

    def add_frame(
        self,
        image: Uint8Array | bytes | bytearray | memoryview,
        *,
        captured_at_s: float | None = None,
        camera: str = DEFAULT_CAMERA,
        gps: GpsFix | None = None,
        intrinsics: IntrinsicsPrior | None = None,
        mask: BoolArray | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Adds a frame.

        Args:
            image: (H, W, 3) uint8 RGB, upright, which is copied; or the bytes of an encoded image,
                a bytearray or a memoryview of them, which is copied.
            captured_at_s: when it was taken, on the camera's clock, later than the camera's frame
                before it unless they are photos; by default now.
            camera: frames of one camera share a lens, and are a video, in order, unless they are
                photos.
            gps: where it was taken.
            intrinsics: what is known of the lens; looked at with the first frame of a camera.
            mask: (H, W), True where a pixel may be used.
            timeout_s: of a lossless run, how long to wait for room; None: for ever.

        Returns:
            The frame's index in the run, 0, 1, 2, ...

        Raises:
            TypeError: another argument is not of its type.
            ValueError: the image or the mask is no such array, the image has no bytes, a number is
                not finite or out of its range, the lens has no such parameters, the camera's name
                is no text, or the frame is not later than the camera's frame before it and they
                are no photos.
            TimeoutError: a lossless run had no room in time; the frame was not added.
            RunEndedError: the run takes no more frames.
        """
        handed = handed_frame(
            image,
            captured_at_s=captured_at_s,
            camera=camera,
            gps=gps,
            intrinsics=intrinsics,
            mask=mask,
        )
        return self._frames.add(handed, timeout_s=timeout_s)

    def add_position(self, fix: GpsFix, *, captured_at_s: float, camera: str | None = None) -> None:
        """Adds a GPS position beside the frames.

        Args:
            fix: the position.
            captured_at_s: when it was measured, on the clock of the frames.
            camera: whose position it is; None: of all cameras.

        Raises:
            TypeError: an argument is not of its type.
            ValueError: the time is not finite, the position is none on the globe, or the camera's
                name is no text.
            RunEndedError: the run takes no more.
        """
        self._frames.add(handed_position(fix, captured_at_s=captured_at_s, camera=camera))

    # -- out ------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The run folder; once the run has ended, where it lies by then."""
        return self._path if self._outcome is None else self._outcome.path

    @property
    def is_going_on(self) -> bool:
        """Whether the run has not ended yet."""
        return not self._has_ended.is_set()

    @property
    def counts(self) -> MapCounts:
        """How large the map is."""
        return self._view.counts

    @property
    def verdict(self) -> Verdict | None:
        """How far the map can be trusted: of a run that has ended, that of its `RunResult`.

        While the map grows it is judged now and then. This is as it was when its level or the kinds
        of its reasons changed last; None: they did not, and nothing speaks against the map so far.
        A doubt may pass as more is filmed.
        """
        return self._view.verdict if self._outcome is None else self._outcome.verdict

    @property
    def map(self) -> MapView | None:
        """The newest map for `keep_map` runs; None before there is one."""
        return self._view.map if isinstance(self._view, MapKeepingView) else None

    def new_poses(self, *, repeated: bool = False) -> list[Pose]:
        """Poses since the last call; of over 100,000 the oldest are forgotten.

        They come in the order in which they are known, which is that of capture but where a map
        starts or points were lost: then a frame comes behind later ones.

        Args:
            repeated: those of keyframes in the map are among them where a frame had one before
                by following points; `Pose.is_first` is False for them.
        """
        return self._view.take_poses(repeated=repeated)

    def new_events(self) -> list[Event]:
        """Events since the last call, in order, drops among them; kept like poses."""
        return self._view.take_events()

    def request_snapshot(self) -> None:
        """Has a snapshot written now; an event says when it is on the disk."""
        self._requests(RunCommand.SNAPSHOT)

    def reconstruction(self, number: int = 0) -> pycolmap.Reconstruction | None:
        """The newest snapshot on the disk, read; after `finish` the final one.

        Args:
            number: of the map; 0 is the main one.

        Returns:
            A reconstruction of the caller's own; None while there is none.
        """
        import pycolmap

        # Resolved once: the link moves with each snapshot, and a model is several files.
        folder = (self.path / "latest").resolve() / "sparse" / str(number)
        if not (folder / "cameras.bin").exists():
            return None
        return pycolmap.Reconstruction(folder)

    # -- the end --------------------------------------------------------------------------------

    def finish(self) -> RunResult:
        """Adds nothing more, waits until everything is mapped and saved, and returns how it ended.

        Raises:
            Exception: what ended the run; what was saved until then is in the folder.
        """
        self._frames.end()
        self._wait()
        if self._error is not None:
            self._is_raised = True
            raise self._error
        if self._outcome is None:
            raise RunEndedError("the run ended without a result")
        outcome = self._outcome
        return RunResult(
            path=outcome.path,
            verdict=outcome.verdict,
            num_keyframes=outcome.num_keyframes,
            num_registered=outcome.num_registered,
            stopped_by=outcome.stopped_by.value,
            not_saved=outcome.not_saved,
            frames_dropped=outcome.summary["frames_dropped"],
            summary=outcome.summary,
        )

    def stop(self) -> None:
        """Ends the run early: nothing more is taken, what has arrived is mapped and saved.

        What broke in the run goes to the log; `finish` raises it.
        """
        # A lossless run reads to the end what it has accepted; a paused one has to go on for that.
        self._requests(RunCommand.RESUME if self._is_lossless else RunCommand.STOP)
        self._frames.end()
        self._wait()
        if self._error is not None and not self._is_raised:
            logger.error("%s: the run broke", self._path, exc_info=self._error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.stop()

    def _run(self, run: Callable[[], Any]) -> None:
        """The thread of the run."""
        try:
            with _NATIVE_LOG:
                runner = asyncio.Runner()
                try:
                    self._outcome = runner.run(run())
                finally:
                    if self._outcome is None or not self._outcome.num_hangs:
                        runner.close()  # else it would wait for what hangs
                report_at_end(self._config, self._outcome.path)
                if self._outcome.summary["frames_dropped"]:
                    logger.warning("%s: %s", self.path, _drops_in_words(self._outcome.summary))
        except BaseException as error:  # noqa: BLE001 - `finish` raises it
            self._error = error
        finally:
            self._frames.end(self._error)
            self._has_ended.set()
            if self._on_end is not None:
                try:
                    self._on_end()
                except Exception:  # a task boundary: it is not of the run
                    logger.exception("on_end failed")

    def _wait(self) -> None:
        """Waits until the run has ended."""
        # Not the thread: one Ctrl-C in `join` has Python 3.11 and 3.12 take it for ended.
        self._has_ended.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join()


class _SharedNativeLog:
    """The capture of native log lines, once for all runs of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_runs = 0
        self._captured = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_runs:
                self._captured.enter_context(descriptor_captured())
            self._num_runs += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_runs -= 1
            if not self._num_runs:
                self._captured.close()


class _RunsAtExit:
    """Ends the runs that are still open when the interpreter exits, before their executors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._is_registered = False

    def add(self, run: Run) -> None:
        """Takes a run that has begun."""
        with self._lock:
            self._runs.add(run)
            if not self._is_registered:
                # atexit would be too late: concurrent.futures shuts its executors before, with this
                # very function, and the last one that is registered is called first.
                threading._register_atexit(self._end_all)  # type: ignore[attr-defined]
                os.register_at_fork(after_in_child=self._forget)
                self._is_registered = True

    def _forget(self) -> None:
        """Forgets the runs in a child of the process, which has their objects and no threads."""
        self._lock = threading.Lock()
        self._runs = weakref.WeakSet()

    def _end_all(self) -> None:
        with self._lock:
            runs = [run for run in self._runs if run.is_going_on]
        for run in runs:
            logger.warning("%s: the run is ended, for the program ends", run.path)
            run.stop()


_NATIVE_LOG = _SharedNativeLog()
_AT_EXIT = _RunsAtExit()


def handed_frame(
    image: Uint8Array | bytes | bytearray | memoryview,
    *,
    captured_at_s: float | None,
    camera: str,
    gps: GpsFix | None,
    intrinsics: IntrinsicsPrior | None,
    mask: BoolArray | None,
) -> HandedFrame:
    """A frame to add, with copies of the caller's arrays; see `Run.add_frame`.

    Raises:
        TypeError: another argument is not of its type.
        ValueError: the image or the mask is no such array, the image has no bytes, a number is not
            finite or out of its range, the lens has no such parameters, or the camera's name is no
            text.
    """
    own = _encoded_or_rgb(image)
    return HandedFrame(
        image=own,
        camera=checked_camera(camera),
        captured_at_s=None if captured_at_s is None else checked_time(captured_at_s),
        gps=None if gps is None else checked_fix(gps, name="gps"),
        intrinsics=None if intrinsics is None else checked_prior(intrinsics),
        mask=None if mask is None else _mask_of(mask, own),
    )


def handed_position(fix: GpsFix, *, captured_at_s: float, camera: str | None) -> HandedPosition:
    """A position to add; see `Run.add_position`.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: the time is not finite, the position is none on the globe, or the camera's name
            is no text.
    """
    return HandedPosition(
        fix=checked_fix(fix, name="fix"),
        captured_at_s=checked_time(captured_at_s),
        camera=None if camera is None else checked_camera(camera),
    )


def _drops_in_words(summary: Mapping[str, Any]) -> str:
    dropped: dict[str, int] = summary["frames_dropped"]
    reasons = ", ".join(f"{reason} {num}" for reason, num in sorted(dropped.items()))
    num, num_received = sum(dropped.values()), summary["frames_received"]
    words = f"{num} of {num_received} frames were dropped: {reasons}"
    if DropReason.OVERLOAD in dropped:
        words += "; the engine was behind: add fewer a second, or open the run with lossless=True"
    return words


def _overlays(config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Presets and YAML files.

    Raises:
        TypeError: they are none.
    """
    given = [config] if isinstance(config, str | os.PathLike) else config
    if isinstance(given, Mapping | Set):
        raise TypeError(
            f"config: expected a preset or a path, or several, got {type(given).__name__}; settings"
            " by section.key are overrides="
        )
    try:
        return [os.fsdecode(one) for one in given]
    except TypeError as error:
        raise TypeError(f"config: expected a preset or a path, or several: {error}") from error


def _settings(overrides: Mapping[str, object]) -> list[str]:
    """``section.key=value`` of each setting.

    Raises:
        TypeError: they are no mapping from strings to values that JSON has.
    """
    settings = []
    for key, value in checked_overrides(overrides).items():
        try:
            settings.append(f"{key}={json.dumps(value, default=plain_value)}")
        except (TypeError, ValueError) as error:
            raise TypeError(f"overrides: {key}: {error}") from error
    return settings


def _encoded_or_rgb(image: Uint8Array | bytes | bytearray | memoryview) -> Uint8Array | bytes:
    """The bytes of an encoded image, or a copy of an array (H, W, 3).

    Raises:
        TypeError: it is None or the name of a file.
        ValueError: it is no such array, or there are no bytes.
    """
    if image is None:
        raise TypeError(
            "image: expected an array or the bytes of an encoded image, got None, which OpenCV"
            " returns where it cannot read"
        )
    if isinstance(image, str | os.PathLike):
        raise TypeError(
            f"image: expected an array or the bytes of an encoded image, got"
            f" {type(image).__name__}: those of a file are Path(...).read_bytes()"
        )
    if isinstance(image, bytes | bytearray) or (isinstance(image, memoryview) and image.ndim == 1):
        if not len(image):
            raise ValueError("image: empty, expected the bytes of an encoded image")
        return bytes(image)
    return _rgb(np.asarray(image))


def _rgb(image: Uint8Array) -> Uint8Array:
    """A copy of an image (H, W, 3).

    Raises:
        ValueError: it is no such array.
    """
    array = np.array(image, order="C", copy=True)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        grey = "; of a grey image: cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)"
        raise ValueError(
            f"image: expected (H, W, 3) uint8, got {array.shape} {array.dtype}"
            + (grey if array.ndim == 2 else "")
        )
    return array


def _mask_of(mask: BoolArray, image: Uint8Array | bytes) -> BoolArray:
    """A copy of a mask (H, W).

    Raises:
        ValueError: it is no such array, or not of the image's size.
    """
    array = np.array(mask, copy=True)
    if array.dtype != np.bool_ or array.ndim != 2:
        raise ValueError(f"mask: expected (H, W) bool, got {array.shape} {array.dtype}")
    if not isinstance(image, bytes) and array.shape != np.shape(image)[:2]:
        raise ValueError(f"mask: {array.shape} is not of the image's size {np.shape(image)[:2]}")
    return array
