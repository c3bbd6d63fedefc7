"""Ports: protocols of the sources, matchers, solvers and views that adapters implement."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from typing import Protocol, runtime_checkable

from engine.dense_types import DenseCloud, GroundPicture, SeenDepth
from engine.events import Event
from engine.types import (
    BoolArray,
    Features,
    Float64Array,
    Frame,
    FrameId,
    FramePose,
    GpsReading,
    MapCounts,
    MapView,
    MatchRequest,
    PairMatches,
    Received,
    RejectedFrame,
    RunCommand,
    SourceInfo,
    SourceNotice,
    TakenFrames,
    TimingDecision,
)
from engine.window_types import WindowEstimate, WindowProblem


class FrameIds(Protocol):
    """Allocates frame ids, 1, 2, 3, ..., from one counter for all sources of a run."""

    def __call__(self) -> FrameId:
        """The next id. Called from several threads, possibly at the same time."""


class FrameSource(Protocol):
    """Where frames come from that can wait, such as files; nothing of it is dropped.

    ``frames`` runs on the event loop; blocking work goes to threads. It ends when the source is
    exhausted, and yields one item after the other, each when the engine has room for it. Closing
    the iterator (``aclose``) releases files and threads. Frames are yielded as ``Arrival`` before
    they are decoded, where that can be done later, and unreadable ones as ``RejectedFrame``;
    positions that come beside the frames as ``GpsReading``, each before the frames that it
    concerns; what watchers are to know as ``SourceNotice``. ``SourceError`` is only for a source
    that cannot be opened or read at all.
    """

    @property
    def info(self) -> SourceInfo:
        """What the source is; the same at all times."""

    def frames(self) -> AsyncGenerator[Received, None]:
        """Yields frames in order of capture."""


class ArrivalSink(Protocol):
    """Takes what a live source receives. Called from any thread; returns at once."""

    def __call__(self, item: Received, /) -> None:
        """Takes one item; an older arrival of its lane may be dropped for it, and is counted."""


@runtime_checkable
class LiveSource(Protocol):
    """Where frames come from that wait for nobody: streams, brokers, phones.

    What arrives goes into a sink at once and undecoded, from whichever thread received it: who
    receives never waits for the engine. The items are those of ``FrameSource``.
    """

    @property
    def info(self) -> SourceInfo:
        """What the source is; the same at all times."""

    async def receive(self, sink: ArrivalSink) -> None:
        """Receives until nothing can come any more; called once, on the event loop.

        What breaks is tried again. Cancelling releases sockets and threads; what a thread puts
        into the sink after that is ignored.

        Raises:
            SourceError: the source cannot be opened at all.
        """


Source = FrameSource | LiveSource


@runtime_checkable
class OffersFeedbackView(Protocol):
    """A source whose senders can show how the run goes, such as phones."""

    def feedback_view(self) -> View:
        """A view that sends the run's progress back to where the frames come from."""


@runtime_checkable
class InvitesSenders(Protocol):
    """A source that waits for others to connect."""

    def invitation(self) -> str:
        """Lines for the terminal: where and how to connect; empty when nobody has to."""


@runtime_checkable
class KnowsGroundTruth(Protocol):
    """A source that knows where its frames were taken."""

    def ground_truth(self) -> list[tuple[float, Float64Array]]:
        """Capture time and true ``cam_from_world`` (3, 4), metres, of every frame."""


@runtime_checkable
class AcceptsFrames(Protocol):
    """A source that can wait, and that has accepted frames from others before they are read.

    Whoever handed them over counts on them: what a run does not read is counted as stopped.
    """

    def take_unread(self) -> list[Received]:
        """Takes what was accepted and not yielded; called once its iterator is closed."""


@runtime_checkable
class ResumableSource(Protocol):
    """A source of files that leaves out what was taken before without reading all of it.

    Of any other source that can wait, frames are left out by their index as they come.
    """

    @property
    def fingerprint(self) -> str:
        """What changes when the files that it reads change; "" where they cannot be looked at."""

    def leave_out(self, taken: TakenFrames) -> list[str]:
        """Leaves out frames that were taken before; called before frames are asked for.

        Frames that are left keep the indices that they would have had, or have later ones.

        Returns:
            What is odd, in sentences: files that changed or are gone.
        """


@runtime_checkable
class RepeatsRun(Protocol):
    """A source that gives what a run received once more; all sources of a run are such, or none."""

    def decisions(self) -> Sequence[TimingDecision]:
        """What that run did because of its timing, in order."""

    def readings(self) -> Sequence[tuple[int, GpsReading]]:
        """The positions that it gives beside its frames, each with its place in the run's input."""


class InputRecording(Protocol):
    """Keeps what a run receives and when it acts on it, in order. One call at a time; blocking."""

    def add_frame(self, frame: Frame, *, source_idx: int) -> None:
        """Keeps a frame that was decoded, with its mask and calibration.

        Raises:
            JournalError: it cannot be written.
        """

    def add_report(
        self, report: RejectedFrame | GpsReading | SourceNotice, *, source_idx: int
    ) -> None:
        """Keeps what came beside the frames, or in the place of one.

        Raises:
            JournalError: it cannot be written.
        """

    def add_decision(self, decision: TimingDecision) -> None:
        """Keeps what the run did because of its timing.

        Raises:
            JournalError: it cannot be written.
        """

    def flush(self) -> None:
        """Waits until all of it is on the disk.

        Raises:
            JournalError: it cannot be written.
        """

    def close(self) -> None:
        """Closes the files."""


class CameraMasks(Protocol):
    """Masks that the user gave for whole cameras of the run. Called on the event loop."""

    def mask_of(self, frame: Frame) -> BoolArray | None:
        """The mask (H, W) of a frame's camera, read-only; None: it has none.

        True where a pixel may be used. Frames of one camera get the same object.

        Raises:
            SourceError: the camera's mask does not fit the frame.
        """

    def unused(self) -> list[str]:
        """Which masks were for no camera so far, in words."""


@runtime_checkable
class KnowsImageSizes(Protocol):
    """A source whose images can be measured before they arrive."""

    def image_sizes(self) -> Iterator[tuple[int, int]]:
        """Width and height of its images in px, upright or as stored; what is no image is left out.

        Reads files as it goes: who has seen enough stops.
        """


class CameraCalibrations(Protocol):
    """Calibrations that the user gave for cameras of the run. Called on the event loop."""

    def calibrated(self, frame: Frame) -> Frame:
        """The frame with the calibration of its camera, where one was given.

        It may come under another camera key: all frames of a key have the same calibration.
        """

    def take_warnings(self) -> list[str]:
        """What is wrong with calibrations for cameras seen since the last call."""

    def unused(self) -> list[str]:
        """Which calibrations were for no camera, and why; asked once, after the last frame."""


class PairMatcher(Protocol):
    """Describes keyframes and matches pairs of them. Blocking.

    A sparse matcher detects keypoints in each image and matches these. A dense one matches any
    pixel: it gives its keyframes free rows (see ``Features``), and a request names the keypoints to
    look up in the other image; such a match may end beside that image's keypoints.

    One thread describes and another matches, possibly at the same time: an implementation whose two
    methods share state guards it itself.
    """

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""

    @property
    def peak_gpu_mb(self) -> float:
        """The most memory it ever held on a GPU; 0 without one."""

    @property
    def matches_everything(self) -> bool:
        """Whether it gives matches that agree on a geometry also for images that share nothing.

        Learned matchers do. A map of theirs grows by pairs only that other pairs confirm.
        """

    def describe(self, frame: Frame) -> Features:
        """Makes the keypoint table of a keyframe, in px of the original image.

        None of its fixed rows lies under the frame's mask.

        Raises:
            InferenceError: the frame cannot be described.
        """

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches each pair; the result has one entry per request, in order, possibly with no rows.

        Raises:
            InferenceError: the batch cannot be matched.
        """


@runtime_checkable
class SeesDepth(Protocol):
    """A matcher that sees how deep whole images are, such as one that makes pointmaps."""

    def seen_depth(self, frame_id: FrameId, neighbour_id: FrameId) -> SeenDepth | None:
        """The depth of a keyframe as seen together with another one.

        Blocking; called by the thread of the dense map, while others describe and match.

        Returns:
            None where one of them was not described here, such as by the run before a resume.

        Raises:
            InferenceError: it cannot be computed.
        """


@runtime_checkable
class WorksAhead(Protocol):
    """A matcher that works elsewhere, and begins before it is asked.

    What it begins with changes no result. Each call of it ends by itself. These methods return at
    once, on any thread.
    """

    @property
    def keyframes_ahead(self) -> int:
        """Keyframes whose work it may have at once, before their turn."""

    def describe_ahead(self, frame: Frame) -> None:
        """Begins to describe a frame, which becomes a keyframe."""

    def match_ahead(self, frame_id: FrameId, requests: Sequence[MatchRequest]) -> None:
        """Begins with pairs of a keyframe that will probably be asked for.

        Tables of dense matchers may be others by then.
        """

    def forget_ahead(self, frame_id: FrameId) -> None:
        """Ends what was begun for a frame: a keyframe that was matched, or one that is dropped."""

    def report_to(self, warn: Callable[[str], None]) -> None:
        """Gets warnings, in words, when work is not done there, and when it is again."""

    def figures(self) -> dict[str, object]:
        """What was sent, awaited and counted, for `summary.json`."""

    def close(self) -> None:
        """Ends the connection; called once, after the last call."""


class SecondMatcher(Protocol):
    """Matches pairs in which the run's own matcher finds too little. Dense, blocking.

    It matches everything: a map uses none of its pairs that a third keyframe does not confirm. One
    thread keeps images while another matches.
    """

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""

    @property
    def peak_gpu_mb(self) -> float:
        """The most memory it ever held on a GPU; 0 without one."""

    def keep(self, frame: Frame) -> None:
        """Keeps what it needs of a keyframe's image; quick, as all keyframes come here."""

    def holds(self, frame_id: FrameId) -> bool:
        """Whether it has a keyframe's image. Called from any thread."""

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches each pair, of keyframes that it holds; as ``PairMatcher.match``.

        Raises:
            InferenceError: the batch cannot be matched.
        """


class WindowSolver(Protocol):
    """Solves windows. Called from any one thread at a time; blocks for as long as it takes."""

    def __call__(self, problem: WindowProblem) -> WindowEstimate:
        """Solves a window; failures are values, see ``WindowStatus``.

        Held poses stay as they are, and the frame of reference is theirs.
        """


class PlaceIndex(Protocol):
    """Place recognition: finds keyframes that show the same place. One thread at a time."""

    def add(self, features: Features) -> None:
        """Adds a keyframe.

        Raises:
            ValueError: it was added before.
        """

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes most like a given one and their scores in (0, 1], best first.

        Raises:
            KeyError: the keyframe was never added.
        """


class EventSink(Protocol):
    """Receives events. Called from any thread; must not block."""

    def __call__(self, event: Event) -> None:
        """Receives one event."""


class RunControl(Protocol):
    """Receives commands to a run. Called from any thread; returns at once."""

    def __call__(self, command: RunCommand) -> None:
        """Requests a command; events report its outcome."""


class View(Protocol):
    """Shows a run. All calls come from one thread, throttled, latest wins; may block briefly."""

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Shows the current image and, when known, where it was taken."""

    def show_event(self, event: Event) -> None:
        """Shows one event."""

    def close(self) -> None:
        """Writes what is pending and releases everything; called once."""


@runtime_checkable
class ShowsMap(Protocol):
    """A view that shows the map. Without one in a run, no map is copied for views."""

    def show_map(self, view: MapView) -> None:
        """Shows the map."""


@runtime_checkable
class ShowsCounts(Protocol):
    """A view that shows how large the map is."""

    def show_counts(self, counts: MapCounts) -> None:
        """Shows how large the map is."""


@runtime_checkable
class ShowsDense(Protocol):
    """A view that shows the dense map. Without one in a run, it is not copied for views."""

    def show_dense(self, cloud: DenseCloud) -> None:
        """Shows the dense map, in the world of the map that was shown last."""


@runtime_checkable
class ShowsGround(Protocol):
    """A view that shows the ground from above, and how well it is covered."""

    def show_ground(self, ground: GroundPicture) -> None:
        """Shows the ground, in the world of the map that was shown last."""
