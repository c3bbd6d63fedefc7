"""Core data types: ids and the frozen products that pass between the stages; numpy only.

Arrays are checked when a product is made and are read-only afterwards. Pixels follow COLMAP: the
centre of the first pixel is (0.5, 0.5). Poses are ``cam_from_world``, camera axes x right, y down,
z forward.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NewType, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

FrameId = NewType("FrameId", int)  # 1, 2, 3, ... in order of arrival; equals COLMAP's image_id

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
Uint8Array = NDArray[np.uint8]
Uint32Array = NDArray[np.uint32]
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

METRES, MAP_UNITS = "metres", "map units"  # what lengths of a map are in

NO_ROW = -1  # in place of a row: the match ends beside the keypoint table


def frozen_array(
    name: str,
    values: Any,
    shape: tuple[int | None, ...],
    dtype: DTypeLike,
    *,
    finite: bool = True,
) -> NDArray[Any]:
    """Returns ``values`` as a read-only array of ``dtype``; copies only to convert.

    Args:
        name: the field's name, for the message.
        values: anything array-like.
        shape: the expected shape; None stands for any length.
        dtype: the wanted dtype.
        finite: whether floating values must be finite; else readers check them.

    Raises:
        ValueError: the shape differs, a floating value is not finite and has to be, or ``dtype``
            is an integer that cannot hold a value.
    """
    array = given = np.asarray(values)
    if given.dtype != dtype or not given.flags.c_contiguous:
        with np.errstate(invalid="ignore"):  # what does not survive the cast is refused below
            array = given.astype(dtype, order="C", copy=False)
    if array.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(array.shape, shape, strict=True)
    ):
        raise ValueError(f"{name}: shape {array.shape}, expected {shape}")
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: holds values that are not finite")
    if array.dtype.kind in "iu" and array is not given and not np.array_equal(array, given):
        raise ValueError(f"{name}: holds values that {array.dtype} cannot hold")
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


def freeze_field(
    product: object,
    name: str,
    shape: tuple[int | None, ...],
    dtype: DTypeLike,
    *,
    finite: bool = True,
) -> None:
    """Checks a field of a frozen product and makes it a read-only array, see ``frozen_array``."""
    array = frozen_array(name, getattr(product, name), shape, dtype, finite=finite)
    object.__setattr__(product, name, array)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpsFix:
    """A WGS84 position of the camera."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float | None = None  # None: not known, the position counts horizontally
    accuracy_m: float | None = None  # horizontal, one standard deviation; None: not reported
    vertical_accuracy_m: float | None = None  # one standard deviation; None: not reported
    is_provisional: bool = False  # of readings beside the frames; later ones may improve it
    is_order_unsure: bool = False  # latitude and longitude may be each other


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMark:
    """Where somebody marked a point in an image."""

    image_name: str
    xy: tuple[float, float]  # px from the upper left corner of the image


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPoint:
    """A point on the ground that was surveyed, and its marks in images."""

    name: str
    fix: GpsFix | None  # None: not surveyed, it only ends scale bars
    marks: tuple[ImageMark, ...]
    is_check: bool = False  # it is compared with the map, which is not laid onto it


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleBar:
    """A measured distance between two points."""

    first: str  # names of control points
    second: str
    length_m: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpsReading:
    """A position with a time of its own, beside the frames: telemetry, a phone's location.

    Frames of the same camera are joined to readings by capture time.
    """

    source: str  # the source as the user named it, without credentials
    camera_key: str | None  # None: of all cameras of the source
    captured_at_s: float  # on the clock of the source's frames
    fix: GpsFix


class SourceState(StrEnum):
    """The connection state of a live source."""

    CONNECTED = "connected"  # frames can come from now on
    LOST = "lost"  # the connection broke or frames stopped; it is tried again
    REFUSED = "refused"  # trying again is useless: wrong credentials, no such camera
    ENDED = "ended"  # nothing more will come


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Files of a source that it does not take, of one kind and for one reason."""

    kind: str  # the ending of their names, in lower case
    reason: str
    num_files: int
    example: str  # the path of the first
    is_missed: bool = True  # False: nobody would expect it to be taken


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceNotice:
    """A change of a source's state, or what it leaves out, for viewers and logs."""

    source: str  # the source as the user named it, without credentials
    state: SourceState
    detail: str  # a line for humans, without credentials
    left_out: tuple[LeftOut, ...] = ()


PROGRAM_LABEL = "python"  # of the source by which a program adds frames


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """What a source is, known before its first frame."""

    label: str  # the source as the user named it, without credentials
    is_live: bool  # frames come whether or not the engine keeps up, so the oldest are dropped
    is_sequence: bool  # consecutive frames are a video; False: every frame is a photo
    num_frames: int | None  # how many frames will come; None: nobody knows
    has_many_cameras: bool = False  # the frames of each are a sequence of their own; live: always


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenFrames:
    """Which frames of a source a run has taken already, before it is resumed.

    Taken are keyframes that the journal holds, and frames that were tracked or dropped; frames that
    arrived and were still on their way through the engine are not.
    """

    names: Mapping[int, str]  # of the frames by index, as the source names them
    captured_at_s: Mapping[int, float]  # by index
    fingerprint: str = ""  # of what the source read then, see `ResumableSource`; "": unknown

    @property
    def next_index(self) -> int:
        """One more than the largest index that was taken."""
        return max(self.names, default=-1) + 1


class RunCommand(StrEnum):
    """A command that a viewer or a client may send to a run."""

    SNAPSHOT = "snapshot"  # write one now
    PAUSE = "pause"  # take no frames for now: a file waits, frames of live sources are dropped
    RESUME = "resume"
    STOP = "stop"  # end the run as the first Ctrl-C does


class CalibrationOrigin(StrEnum):
    """The source of a camera's first calibration, most trusted first."""

    CONFIGURED = "configured"
    FILE = "file"  # a calibration file
    KNOWN = "known"  # given completely by the source
    EXIF = "exif"  # focal length and sensor
    EXIF_35MM = "exif_35mm"  # the rounded equivalent on 36 x 24 mm film
    POINTMAPS = "pointmaps"  # of a dense matcher
    TWO_VIEW_GEOMETRIES = "two_view_geometries"
    RECOGNISED = "recognised"  # small maps by several lenses competed
    ASSUMED = "assumed"

    @property
    def is_given(self) -> bool:
        """Whether somebody vouches for the calibration."""
        return self in {
            CalibrationOrigin.CONFIGURED,
            CalibrationOrigin.FILE,
            CalibrationOrigin.KNOWN,
        }


EXIF_FOCAL_SIGMA_RATIO = 0.02  # of focal lengths over a known sensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Intrinsics:
    """A camera's calibration, for any thread."""

    model: str  # COLMAP's name
    width: int
    height: int
    params: tuple[float, ...]  # in COLMAP's order for the model
    is_wide: bool = False  # whether its pairs are verified on viewing rays


@dataclass(frozen=True, slots=True, kw_only=True)
class IntrinsicsPrior:
    """What a source knows about its camera.

    ``params`` are in COLMAP's order for ``camera_model``; None unless all of them are known. A
    ``camera_model`` without them is a hint at the kind of lens.
    """

    focal_px: float  # 0: unknown
    camera_model: str | None = None
    params: tuple[float, ...] | None = None
    origin: CalibrationOrigin = CalibrationOrigin.EXIF
    focal_sigma_ratio: float = EXIF_FOCAL_SIGMA_RATIO  # one standard deviation, of the focal length
    is_fisheye: bool = False  # by the camera's name: a hint, the lens may be set to perspective
    doubt: str = ""  # a sentence on what is odd about it; "" where nothing is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMask:
    """A mask in little memory, for as long as its keyframe is of use."""

    width: int  # px
    height: int
    data: bytes  # a bit a pixel, line by line, deflated

    @classmethod
    def of(cls, mask: BoolArray) -> Self:
        """Packs a mask (H, W)."""
        height, width = mask.shape
        data = zlib.compress(np.packbits(mask).tobytes(), level=1)
        return cls(width=width, height=height, data=data)

    def unpacked(self) -> BoolArray:
        """The mask (H, W), True where a pixel may be used."""
        bits = np.frombuffer(zlib.decompress(self.data), np.uint8)
        num = self.width * self.height
        return np.unpackbits(bits, count=num).view(np.bool_).reshape(self.height, self.width)

    def num_usable(self) -> int:
        """How many pixels may be used."""
        return int(np.bitwise_count(np.frombuffer(zlib.decompress(self.data), np.uint8)).sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """One received image."""

    frame_id: FrameId
    camera_key: str  # frames of one camera share it, and are a sequence
    source: str  # the source as the user named it, without credentials
    index: int  # position in its source, 0-based
    name: str  # unique in the run; relative file name of the keyframe image
    captured_at_s: float  # the source's clock; a folder without times: the index
    received_at_s: float  # monotonic
    pixels: Uint8Array  # (H, W, 3) RGB, upright
    jpeg: bytes | None = None  # the bytes as received, when they decode to `pixels`
    gps: GpsFix | None = None
    gps_problem: str = ""  # why there is none, although something speaks of a position
    intrinsics_prior: IntrinsicsPrior | None = None
    quarter_turns: int = 0  # clockwise, by which stored pixels were turned to be upright
    mask: BoolArray | None = None  # (H, W), True where a pixel may be used; None: everywhere

    def __post_init__(self) -> None:
        freeze_field(self, "pixels", (None, None, 3), np.uint8)
        if self.mask is not None:
            freeze_field(self, "mask", self.pixels.shape[:2], np.bool_)

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])


class DropReason(StrEnum):
    """Why a received frame did not become part of the run."""

    UNREADABLE = "unreadable"
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    DUPLICATE = "duplicate"
    OVERLOAD = "overload"
    BAD_MASK = "bad_mask"  # its mask cannot be read, or is not of its size
    FAILED = "failed"  # readable, but the matcher could not describe it
    PAUSED = "paused"  # the run takes no frames for now
    STOPPED = "stopped"  # the run ended before the frame's turn came


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedFrame:
    """A frame that never got pixels, or none of use; counted and evented, never silent."""

    source: str
    index: int
    name: str
    captured_at_s: float
    reason: DropReason
    detail: str
    num_frames: int = 1  # that it stands for: itself, and others before it that are not listed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrival:
    """A frame as it arrived: still encoded, or decoded but not yet RGB. Some are never decoded.

    ``decode`` makes the frame of it or gives the reason why there is none. It blocks and is called
    at most once; one thread decodes all arrivals of a source, in order of arrival.
    """

    source: str  # the source as the user named it, without credentials
    index: int  # position in its source, 0-based
    name: str  # what the frame is called while it is not decoded
    captured_at_s: float  # the source's clock, as far as it is known before decoding
    num_bytes: int  # of memory that it holds until it is decoded
    decode: Callable[[], Frame | RejectedFrame]
    lane: str = ""  # of a live source: a newer arrival takes the place of an older one of its lane
    origin: str = ""  # printable: which of the cameras of a live source sent it

    @classmethod
    def of(cls, frame: Frame, *, lane: str = "") -> Arrival:
        """The arrival of a frame that has its pixels already."""
        return cls(
            source=frame.source,
            index=frame.index,
            name=frame.name,
            captured_at_s=frame.captured_at_s,
            num_bytes=frame.pixels.nbytes,
            decode=lambda: frame,
            lane=lane,
        )

    def rejected(self, reason: DropReason, detail: str) -> RejectedFrame:
        """The frame as one that does not become part of the run."""
        if self.origin:
            detail = f"{self.origin}: {detail}"
        return RejectedFrame(
            source=self.source,
            index=self.index,
            name=self.name,
            captured_at_s=self.captured_at_s,
            reason=reason,
            detail=detail,
        )


Received = Arrival | RejectedFrame | GpsReading | SourceNotice  # what comes from a source


class DescriptorKind(StrEnum):
    """What the bytes of descriptors mean."""

    ROOT_SIFT = "root_sift"  # RootSIFT (Arandjelovic and Zisserman, CVPR 2012) times 256, up to 127
    OTHER = "other"  # the matcher's own, or none


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingDecision:
    """What tracking did with a frame because of how far mapping was."""

    frame_id: FrameId
    is_behind: bool  # mapping was: the frame was followed from an earlier keyframe, too
    motion_share: float | None = None  # of what makes a keyframe; None: as `is_behind` asks for
    num_described: int | None = None  # keyframes by then; None: frames wait while one is described


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingDecision:
    """What mapping did with a keyframe because of what was there by then."""

    frame_id: FrameId
    merged: tuple[str, ...]  # kinds of the jobs whose results went into the map before it
    num_readings: int  # of positions beside frames, of all sources, that the map knew from then on
    num_posed: int  # frames that were posed while it was matched
    num_posed_beginning: int = 0  # items looked at before that, and posed by earlier keyframes
    num_posed_adding: int = 0  # and after it, likewise


TimingDecision = TrackingDecision | MappingDecision


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The keypoint table of one keyframe, with compact descriptors where the matcher has some.

    A dense matcher matches any pixel: its tables hold free rows, one to a cell of a regular grid
    over the image. A free row stands at the centre of its cell until a match claims it, moves there
    and stays. So a table never grows, and every row is a valid keypoint at all times.

    Where a second matcher helps, the free rows come after the ``num_described`` keypoints that the
    first one described; their descriptors are 0.
    """

    frame_id: FrameId
    keypoints_xy: Float64Array  # (N, 2) px of the original image
    descriptors: Uint8Array  # (N, D), compact; D may be 0
    scales: Float32Array  # (N,) px, diameter of the keypoint, twice its sigma in scale space
    colors: Uint8Array  # (N, 3) RGB at the keypoints
    is_free: BoolArray = field(  # (N,) rows that no match has claimed yet; empty stands for none
        default_factory=lambda: np.zeros(0, np.bool_)
    )
    descriptor_kind: DescriptorKind = DescriptorKind.OTHER
    num_described: int | None = None  # first rows, which have a descriptor; None: all

    def __post_init__(self) -> None:
        freeze_field(self, "keypoints_xy", (None, 2), np.float64)
        num = len(self.keypoints_xy)
        if self.num_described is not None and not 0 <= self.num_described <= num:
            raise ValueError(f"{self.num_described} of {num} keypoints are described")
        freeze_field(self, "descriptors", (num, None), np.uint8)
        freeze_field(self, "scales", (num,), np.float32)
        freeze_field(self, "colors", (num, 3), np.uint8)
        if not len(self.is_free):
            object.__setattr__(self, "is_free", np.zeros(num, np.bool_))
        freeze_field(self, "is_free", (num,), np.bool_)

    @property
    def fixed_rows(self) -> Int64Array:
        """Rows whose keypoints stay where they are, (F,)."""
        return np.flatnonzero(~self.is_free)

    def take(self, rows: Int64Array) -> Features:
        """Some of the keypoints (K,), described ones first, as a table in that order."""
        num = self.num_described
        return replace(
            self,
            num_described=None if num is None else int(np.count_nonzero(rows < num)),
            keypoints_xy=self.keypoints_xy[rows],
            descriptors=self.descriptors[rows],
            scales=self.scales[rows],
            colors=self.colors[rows],
            is_free=self.is_free[rows],
        )

    def described(self) -> Features:
        """The first keypoints, which have a descriptor; the table itself where all have one."""
        if self.num_described is None or not self.descriptors.size:
            return self
        return replace(self.take(np.arange(self.num_described)), num_described=None)

    def with_free_rows(self, points_xy: Float64Array, colors: Uint8Array) -> Features:
        """The same keypoints, then free rows at points (M, 2) px, of colours (M, 3) RGB.

        The points are a regular grid over the image.
        """
        num = len(points_xy)
        return replace(
            self,
            keypoints_xy=np.concatenate([self.keypoints_xy, points_xy]),
            descriptors=np.pad(self.descriptors, ((0, num), (0, 0))),
            scales=np.concatenate([self.scales, np.ones(num, np.float32)]),
            colors=np.concatenate([self.colors, colors]),
            is_free=np.concatenate([self.is_free, np.ones(num, np.bool_)]),
            num_described=len(self),
        )

    def without_descriptors(self) -> Features:
        """The same keypoints for who matches nothing."""
        return replace(self, descriptors=np.zeros((len(self), 0), np.uint8))

    def __len__(self) -> int:
        return len(self.keypoints_xy)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keyframe:
    """A frame that takes part in the map; carries no pixels.

    ``camera_key`` is the source's word for the camera, and never changes. ``calibration_key`` names
    the calibration that the keyframe shares with others: the camera's own, unless its frames
    contradict a single one.
    """

    frame_id: FrameId
    camera_key: str
    index: int
    name: str
    width: int
    height: int
    captured_at_s: float
    received_at_s: float
    features: Features  # none of its fixed rows lies under the mask
    gps: GpsFix | None = None
    gps_problem: str = ""  # why there is none, although something speaks of a position
    intrinsics_prior: IntrinsicsPrior | None = None
    mask: PackedMask | None = None  # None: the whole image may be used
    is_photo: bool = False  # whether frames before and after it may be of anywhere
    calibration_key: str = ""  # empty stands for the camera's key

    def __post_init__(self) -> None:
        if not self.calibration_key:
            object.__setattr__(self, "calibration_key", self.camera_key)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrackedFrame:
    """A frame between keyframes: where some of a keyframe's keypoints went."""

    frame_id: FrameId
    keyframe_id: FrameId  # the keyframe whose keypoints were followed
    index: int
    captured_at_s: float
    received_at_s: float
    keypoint_idx: Int64Array  # (M,) rows of the keyframe's keypoints
    points_xy: Float64Array  # (M, 2) px in this frame

    def __post_init__(self) -> None:
        freeze_field(self, "keypoint_idx", (None,), np.int64)
        freeze_field(self, "points_xy", (len(self.keypoint_idx), 2), np.float64)


@dataclass(frozen=True, slots=True, order=True)
class ImagePair:
    """Two keyframes, first < second."""

    first: FrameId
    second: FrameId

    def __post_init__(self) -> None:
        if self.first >= self.second:
            raise ValueError(f"an image pair is ordered and never a loop: {self}")

    @classmethod
    def of(cls, one: FrameId, other: FrameId) -> ImagePair:
        """The pair of two different keyframes, given in any order."""
        return cls(min(one, other), max(one, other))

    def other(self, frame_id: FrameId) -> FrameId:
        """The keyframe of the pair that a given one of its two is not."""
        return self.first if frame_id == self.second else self.second


class PairReason(StrEnum):
    """Why the scene graph proposed a pair."""

    TEMPORAL = "temporal"
    COVISIBLE = "covisible"
    RETRIEVED = "retrieved"
    GPS = "gps"
    EXHAUSTIVE = "exhaustive"
    SECOND = "second"  # matched by the second matcher, since the first one found too little


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCandidate:
    """A pair worth matching, best score first."""

    pair: ImagePair
    reason: PairReason
    score: float  # comparable within one reason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpipolarGuide:
    """The epipolar geometry of a pair that is known before all of its keypoints are matched.

    Rays are unit vectors, NaN where a keypoint has none. They need not be calibrated: any rays will
    do that the matrix relates.
    """

    rays1: Float64Array  # (N, 3) of first's keypoints
    rays2: Float64Array  # (M, 3) of second's
    essential: Float64Array  # (3, 3), ray2^T E ray1 = 0
    max_angle_rad: float  # of a match to its epipolar plane

    def __post_init__(self) -> None:
        freeze_field(self, "rays1", (None, 3), np.float64, finite=False)
        freeze_field(self, "rays2", (None, 3), np.float64, finite=False)
        freeze_field(self, "essential", (3, 3), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatchRequest:
    """A pair to match and, for dense matchers, the keypoints to look up in the other image."""

    pair: ImagePair
    first: Features
    second: Features
    query_rows1: Int64Array  # (Q1,) rows of first to look up in second; sparse matchers use all
    query_rows2: Int64Array  # (Q2,) rows of second to look up in first
    wants_pointmaps: bool = False  # whether to compute depths and focal lengths at extra cost
    guide: EpipolarGuide | None = None  # matches far from it are not needed

    def __post_init__(self) -> None:
        freeze_field(self, "query_rows1", (None,), np.int64)
        freeze_field(self, "query_rows2", (None,), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairMatches:
    """Tentative matches of a pair: points in both images, keypoints or beside them."""

    pair: ImagePair
    matches_idx: Int64Array  # (M, 2): row in first's keypoints, row in second's; NO_ROW: beside all
    points1_xy: Float64Array  # (M, 2) px in first; the keypoint's own where there is a row
    points2_xy: Float64Array  # (M, 2) px in second
    confidence: Float32Array  # (M,) in 0..1, higher is better
    depths_m: Float32Array = field(  # (M, 2) along each optical axis; 0: unknown; empty: all
        default_factory=lambda: np.zeros((0, 2), np.float32)
    )
    focal_px: tuple[float, float] = (0.0, 0.0)  # of both cameras, by the matcher; 0: unknown

    def __post_init__(self) -> None:
        freeze_field(self, "matches_idx", (None, 2), np.int64)
        num = len(self.matches_idx)
        freeze_field(self, "points1_xy", (num, 2), np.float64)
        freeze_field(self, "points2_xy", (num, 2), np.float64)
        freeze_field(self, "confidence", (num,), np.float32)
        if not len(self.depths_m):
            object.__setattr__(self, "depths_m", np.zeros((num, 2), np.float32))
        freeze_field(self, "depths_m", (num, 2), np.float32)
        if (self.matches_idx < NO_ROW).any():
            raise ValueError(f"matches_idx: rows below {NO_ROW}")

    def __len__(self) -> int:
        return len(self.matches_idx)

    @classmethod
    def of_rows(
        cls,
        request: MatchRequest,
        *,
        matches_idx: NDArray[np.integer[Any]],
        confidence: Float32Array,
    ) -> PairMatches:
        """Matches (M, 2) between keypoints of both images."""
        rows = matches_idx.astype(np.int64)
        return cls(
            pair=request.pair,
            matches_idx=rows,
            points1_xy=request.first.keypoints_xy[rows[:, 0]],
            points2_xy=request.second.keypoints_xy[rows[:, 1]],
            confidence=confidence,
        )

    def take(self, which: NDArray[Any]) -> PairMatches:
        """Some of the matches, by rows or a mask."""
        return replace(
            self,
            matches_idx=self.matches_idx[which],
            points1_xy=self.points1_xy[which],
            points2_xy=self.points2_xy[which],
            confidence=self.confidence[which],
            depths_m=self.depths_m[which],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VerifiedPair:
    """Geometrically verified matches of a pair."""

    pair: ImagePair
    reason: PairReason
    inlier_matches_idx: Uint32Array  # (M, 2)
    num_matches: int  # before verification
    fundamental: Float64Array  # (3, 3), x2^T F x1 = 0 in px, COLMAP convention; 0: verified on rays
    homography_inlier_ratio: float  # inliers that one plane or a pure rotation explains, 0..1
    cam2_from_cam1: Float64Array | None = None  # (3, 4), unit translation, when verified on rays

    def __post_init__(self) -> None:
        freeze_field(self, "inlier_matches_idx", (None, 2), np.uint32)
        freeze_field(self, "fundamental", (3, 3), np.float64)
        if self.cam2_from_cam1 is not None:
            freeze_field(self, "cam2_from_cam1", (3, 4), np.float64)

    @property
    def num_inliers(self) -> int:
        """Number of verified matches."""
        return len(self.inlier_matches_idx)

    @property
    def initial_pair_score(self) -> float:
        """How well a map can start from the pair: a score in inliers, the more the better.

        Inliers that a plane or a rotation does not explain count in full, and a tenth of those that
        it does.
        """
        return self.num_inliers * (1.1 - self.homography_inlier_ratio)


class RegistrationStatus(StrEnum):
    """The outcome of registering a keyframe."""

    REGISTERED = "registered"
    TOO_FEW_CORRESPONDENCES = "too_few_correspondences"
    TOO_FEW_INLIERS = "too_few_inliers"
    CONTRADICTED = "contradicted"  # by stronger pairs than those that agree with the pose
    AMBIGUOUS = "ambiguous"  # another pose is nearly as good: repeated structure


class PoseKind(StrEnum):
    """How a frame got its pose; ``frames.csv`` has it for every frame."""

    KEYFRAME = "keyframe"
    TRACKED = "tracked"  # estimated, relative to its keyframe
    INTERPOLATED = "interpolated"  # between two keyframes close in time
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FramePose:
    """The latest known pose of one frame."""

    frame_id: FrameId
    index: int
    captured_at_s: float
    cam_from_world: Float64Array  # (3, 4)
    is_keyframe: bool  # whether the frame is one, in a map or not
    kind: PoseKind = PoseKind.NONE  # NONE stands for that of a keyframe in a map, or of a tracked
    map_number: int = 0  # of the map whose world it is: 0 is the main one, others have their own
    world_number: int = 0  # likewise, but a map keeps it when it becomes the main one, or no more

    def __post_init__(self) -> None:
        freeze_field(self, "cam_from_world", (3, 4), np.float64)
        if self.kind is PoseKind.NONE:
            kind = PoseKind.KEYFRAME if self.is_keyframe else PoseKind.TRACKED
            object.__setattr__(self, "kind", kind)


class VerdictLevel(StrEnum):
    """How far a map can be trusted."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    WRONG = "wrong"


_OF_PLACES = frozenset(  # kinds of reasons for which single keyframes or parts may be misplaced
    {"misplaced", "misplaced_part", "weakly_joined", "unconfirmed", "few_points", "small_patch"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictReason:
    """Why a map is not simply good, and what to do about it."""

    kind: str  # one word or a few with underscores; the same for the same cause
    level: VerdictLevel  # that this reason alone would give
    sentence: str  # names cameras, frames or places, and what helps
    frame_ids: tuple[FrameId, ...] = ()  # that it is about, where it is about some

    @property
    def is_of_places(self) -> bool:
        """Whether it doubts the places of its keyframes, and not the map as a whole."""
        return self.kind in _OF_PLACES


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is said of a map as a whole: the worst of its reasons, which come gravest first."""

    level: VerdictLevel = VerdictLevel.GOOD
    reasons: tuple[VerdictReason, ...] = ()

    def as_record(self) -> dict[str, object]:
        """The record in JSON files."""
        return {
            "level": self.level.value,
            "reasons": [
                {
                    "kind": reason.kind,
                    "level": reason.level.value,
                    "sentence": reason.sentence,
                    "frame_ids": list(reason.frame_ids),
                }
                for reason in self.reasons
            ],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Verdict:
        """The verdict that such a record describes; of an empty one, good.

        Raises:
            KeyError: a reason lacks something.
            ValueError: a level is none.
        """
        return cls(
            level=VerdictLevel(record.get("level", VerdictLevel.GOOD)),
            reasons=tuple(
                VerdictReason(
                    kind=one["kind"],
                    level=VerdictLevel(one["level"]),
                    sentence=one["sentence"],
                    frame_ids=tuple(FrameId(i) for i in one.get("frame_ids", ())),
                )
                for one in record.get("reasons", ())
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LostStretch:
    """Successive keyframes of a camera that had no place in the main map when they came."""

    camera_key: str
    frame_ids: tuple[FrameId, ...]  # of the keyframes, in order of arrival
    begins_at_s: float  # capture time of the last keyframe before them, else of the first of them
    ends_at_s: float | None  # of the first keyframe with a place after them; None: none came
    num_missing: int  # of them have no place in any map now
    num_apart: int  # of them have their place in another map than the main one now

    @property
    def first(self) -> FrameId:
        """The keyframe that it begins with."""
        return self.frame_ids[0]

    @property
    def last(self) -> FrameId:
        """The keyframe that it ends with."""
        return self.frame_ids[-1]

    def as_record(self) -> dict[str, object]:
        """The record in JSON files."""
        return {
            "camera_key": self.camera_key,
            "frame_ids": list(self.frame_ids),
            "begins_at_s": self.begins_at_s,
            "ends_at_s": self.ends_at_s,
            "num_missing": self.num_missing,
            "num_apart": self.num_apart,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TurningStretch:
    """Successive keyframes of a camera that turns, or turns and zooms, without moving.

    Their pairs show no depth.
    """

    camera_key: str
    frame_ids: tuple[FrameId, ...]  # of the keyframes, in order of arrival
    turned_rad: float  # how far the camera turned, from keyframe to keyframe
    is_whole: bool  # whether all keyframes of the camera that match others turn, here or elsewhere

    @property
    def first(self) -> FrameId:
        """The keyframe that it begins with."""
        return self.frame_ids[0]

    @property
    def last(self) -> FrameId:
        """The keyframe that it ends with."""
        return self.frame_ids[-1]

    def as_record(self) -> dict[str, object]:
        """The record in JSON files."""
        return {
            "camera_key": self.camera_key,
            "frame_ids": list(self.frame_ids),
            "turned_deg": round(math.degrees(self.turned_rad), 1),
            "is_whole": self.is_whole,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseGap:
    """A time of a video of which no frame has a pose in any map."""

    camera_key: str
    before: FrameId  # the last frame with a pose
    after: FrameId  # the next one
    begins_at_s: float  # capture time of the frame before
    ends_at_s: float  # of the frame after
    is_overload: bool = False  # most frames between were dropped because the engine was behind


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraFigures:
    """A camera's calibration in the map, where it began, and what is doubted about it."""

    camera_key: str
    model: str  # COLMAP's name
    width: int
    height: int
    params: tuple[float, ...]  # in COLMAP's order
    focal_px: float  # px per unit of tangent, or of angle for wide models, about the axis
    fov_deg: float  # of the image's width
    num_registered: int  # keyframes of the camera in the map
    origin: CalibrationOrigin
    prior_focal_px: float  # 0: the model has none
    prior_sigma_ratio: float  # one standard deviation
    observed_sigma_ratio: float | None  # by the images alone; None: not measured, or they say none
    is_constant: bool  # nothing may change it
    is_held: bool  # adjustments leave its focal length alone for now, see the doubts
    doubts: tuple[str, ...]  # sentences
    doubt_kinds: tuple[str, ...] = ()  # of each, one word

    @property
    def is_unvouched(self) -> bool:
        """Whether nobody and no file says what its calibration is."""
        return self.origin in {
            CalibrationOrigin.POINTMAPS,
            CalibrationOrigin.TWO_VIEW_GEOMETRIES,
            CalibrationOrigin.RECOGNISED,
            CalibrationOrigin.ASSUMED,
        }

    @property
    def focal_ratio(self) -> float:
        """The focal length as a ratio of the longer edge."""
        return self.focal_px / max(self.width, self.height)

    @property
    def moved_ratio(self) -> float:
        """How far the focal length moved from its prior, as a ratio of that; 0 without one."""
        return self.focal_px / self.prior_focal_px - 1.0 if self.prior_focal_px > 0.0 else 0.0

    def as_record(self) -> dict[str, object]:
        """The record in JSON files."""
        return {
            "key": self.camera_key,
            "model": self.model,
            "width": self.width,
            "height": self.height,
            "params": [round(value, 9) for value in self.params],
            "focal_px": round(self.focal_px, 3),
            "focal_ratio": round(self.focal_ratio, 5),
            "fov_deg": round(self.fov_deg, 2),
            "registered_keyframes": self.num_registered,
            "origin": self.origin.value,
            "prior_focal_px": round(self.prior_focal_px, 3),
            "prior_sigma_ratio": round(self.prior_sigma_ratio, 5),
            "observed_sigma_ratio": self.observed_sigma_ratio,
            "moved_ratio": round(self.moved_ratio, 5),
            "is_constant": self.is_constant,
            "is_held": self.is_held,
            "doubts": list(self.doubts),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """A strong pair of registered keyframes whose matches the map puts far from each other."""

    pair: ImagePair
    num_matches: int  # with a point on both sides, not the same one
    error_px: float  # median over them, at an edge of 1000 px


@dataclass(frozen=True, slots=True, kw_only=True)
class MapCounts:
    """How large the map is."""

    num_keyframes: int = 0  # registered or not
    num_registered: int = 0
    num_points3D: int = 0
    has_map: bool = False  # frames get poses, be it by an early map, of which nothing is registered


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapView:
    """An immutable copy of the map for views; rows of the arrays belong together."""

    version: int  # grows with every change of the map
    keyframe_ids: Int64Array  # (K,) registered keyframes, in order of arrival
    cam_from_world: Float64Array  # (K, 3, 4)
    focal_px: Float64Array  # (K,)
    image_sizes: Int64Array  # (K, 2) width, height
    points3D_in_world: Float32Array  # (P, 3)
    colors: Uint8Array  # (P, 3) RGB
    chunk_ids: Int64Array  # (P,) the keyframe that made each point
    edges: Int64Array  # (E, 2) frame ids of verified pairs
    edge_reasons: tuple[PairReason, ...]  # (E,)
    corner_rays: Float64Array = field(  # (K, 4, 3) to the image corners of wide lenses, clockwise
        # from the upper left; NaN: as of a pinhole; 0: the image is all around; empty: all NaN
        default_factory=lambda: np.zeros((0, 4, 3))
    )
    cameras: tuple[CameraFigures, ...] = ()
    elapsed_s: float = 0.0  # CPU time of the thread that made it

    def __post_init__(self) -> None:
        freeze_field(self, "keyframe_ids", (None,), np.int64)
        num_keyframes = len(self.keyframe_ids)
        freeze_field(self, "cam_from_world", (num_keyframes, 3, 4), np.float64)
        freeze_field(self, "focal_px", (num_keyframes,), np.float64)
        freeze_field(self, "image_sizes", (num_keyframes, 2), np.int64)
        freeze_field(self, "points3D_in_world", (None, 3), np.float32)
        num_points = len(self.points3D_in_world)
        freeze_field(self, "colors", (num_points, 3), np.uint8)
        freeze_field(self, "chunk_ids", (num_points,), np.int64)
        if not len(self.corner_rays):
            object.__setattr__(self, "corner_rays", np.full((num_keyframes, 4, 3), np.nan))
        freeze_field(self, "corner_rays", (num_keyframes, 4, 3), np.float64, finite=False)
        freeze_field(self, "edges", (len(self.edge_reasons), 2), np.int64)
