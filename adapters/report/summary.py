"""The figures of a run's ``summary.json``, checked: what an older run lacks has its default."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.types import FrameId, Verdict, VerdictLevel, VerdictReason

_MAX_CHARS = 100  # of an error, which may quote the file
_MAX_NUMBER = 1e12  # in any unit; squares and sums of them are still numbers

Kind = TypeVar("Kind", bound=BaseModel)
Number = Annotated[float, Field(ge=-_MAX_NUMBER, le=_MAX_NUMBER)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ReasonRecord(_Record):
    """A reason of the verdict."""

    kind: str = ""
    level: VerdictLevel = VerdictLevel.GOOD
    sentence: str = ""
    frame_ids: tuple[int, ...] = ()


class VerdictRecord(_Record):
    """The verdict on the map."""

    level: VerdictLevel
    reasons: tuple[ReasonRecord, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The same as the engine has it."""
        return Verdict(
            level=self.level,
            reasons=tuple(
                VerdictReason(
                    kind=one.kind,
                    level=one.level,
                    sentence=one.sentence,
                    frame_ids=tuple(map(FrameId, one.frame_ids)),
                )
                for one in self.reasons
            ),
        )


class LatencyRecord(_Record):
    """Times from arrival to pose."""

    p50: Number | None = None
    p95: Number | None = None
    max: Number | None = None


class LatenciesRecord(_Record):
    """Latencies of keyframes and of all frames, ms."""

    keyframes: LatencyRecord = LatencyRecord()
    frames: LatencyRecord = LatencyRecord()


class LeftOutRecord(_Record):
    """Files that a source did not take."""

    source: str = ""
    kind: str = ""
    reason: str = ""
    num_files: int = 0
    example: str = ""


class PairsRecord(_Record):
    """Pairs that were matched."""

    verified: int = 0
    rejected: int = 0


class MapRecord(_Record):
    """One of the maps, in the order of ``sparse/N``."""

    registered_keyframes: int = 0
    num_points3D: int = 0
    mean_reprojection_error_px: Number | None = None
    first_keyframe: str = ""
    last_keyframe: str = ""
    frames_with_pose: int = 0
    georeferenced: bool = False


class CameraRecord(_Record):
    """A camera's calibration in the map, and where it began."""

    key: str
    model: str = ""
    width: int = 0
    height: int = 0
    params: tuple[Number, ...] = ()
    focal_px: Number = 0.0
    fov_deg: Number | None = None
    registered_keyframes: int = 0
    origin: str = ""
    prior_focal_px: Number = 0.0
    prior_sigma_ratio: Number = 0.0
    observed_sigma_ratio: Number | None = None
    moved_ratio: Number = 0.0
    is_constant: bool = False
    is_held: bool = False
    doubts: tuple[str, ...] = ()


class OriginRecord(_Record):
    """The origin of a map's east, north, up."""

    latitude_deg: Number
    longitude_deg: Number
    altitude_m: Number | None = None


class GroundPointRecord(_Record):
    """A ground point and how far off the map puts it; a check point took no part in placing it."""

    name: str
    is_check: bool = False
    is_used: bool = True  # False of a control point: it contradicts the others
    num_images: int = 0
    residual_px: Number | None = None
    error_m: tuple[Number | None, Number | None, Number | None] | None = None  # east, north, up


class ScaleBarRecord(_Record):
    """A known length, and that in the map."""

    ends: tuple[str, str]
    length_m: Number
    in_map_m: Number
    error_m: Number


class MovedRecord(_Record):
    """How far control points have the cameras from where positions had them."""

    horizontal_m: Number
    up_m: Number | None = None  # None: not known
    is_far: bool = False  # farther than positions can be wrong


class GeoreferenceRecord(_Record):
    """Where the map lies on the globe, and the positions that say so."""

    origin: OriginRecord
    metres_per_map_unit: Number | None = None
    num_positions: int = 0
    rmse_m: Number | None = None
    rejected: tuple[str, ...] = ()
    residuals_m: dict[str, Number | None] = Field(default_factory=dict)  # -1: no usable position
    offsets_enu_m: dict[str, tuple[Number | None, Number | None, Number | None]] = Field(
        default_factory=dict
    )  # from the position to the camera in the map
    gcp: tuple[GroundPointRecord, ...] = ()  # where there are some, they placed the map
    moved_from_positions: MovedRecord | None = None  # by them; None: there were no positions
    gcp_left_out: dict[str, str] = Field(default_factory=dict)  # why, by the point
    scale_bars: tuple[ScaleBarRecord, ...] = ()


class StretchRecord(_Record):
    """Successive keyframes of one camera."""

    camera_key: str = ""
    frame_ids: tuple[int, ...] = ()
    num_missing: int = 0
    num_apart: int = 0
    turned_deg: Number = 0.0


class WrittenDense(_Record):
    """The dense map as it was written last."""

    points: int = 0


class DenseRecord(_Record):
    """The dense map."""

    keyframes_with_depth: int = 0
    keyframes_without: dict[str, int] = Field(default_factory=dict)
    written: WrittenDense | None = None
    products_in_former_frame: bool = False  # the map was laid out later, and they are not there


class OverlayRecord(_Record):
    """What is fixed to a camera's image."""

    share: Number = 0.0


class Summary(_Record):
    """The figures of a run."""

    verdict: VerdictRecord | None = None
    frames_received: int = 0
    frames_dropped: dict[str, int] = Field(default_factory=dict)
    left_out: tuple[LeftOutRecord, ...] = ()
    keyframes: int = 0
    time_to_first_map_s: Number | None = None
    latency_ms: LatenciesRecord = LatenciesRecord()
    pairs: PairsRecord = PairsRecord()
    loops_closed: int = 0
    global_ba_runs: int = 0
    overlays: dict[str, OverlayRecord] = Field(default_factory=dict)
    faults: dict[str, int] = Field(default_factory=dict)
    registered_keyframes: int = 0
    num_points3D: int = 0  # noqa: N815 - as in the file
    num_observations: int = 0
    mean_track_length: Number | None = None
    mean_reprojection_error_px: Number | None = None
    frames_interpolated: int = 0
    frames_without_pose: int = 0
    maps: tuple[MapRecord, ...] = ()
    georeference: GeoreferenceRecord | None = None
    not_georeferenced: str | None = None
    gps_rmse_m: Number | None = None
    unit: str = ""  # of lengths in the map
    scale_bars: tuple[ScaleBarRecord, ...] = ()  # of a map without a place
    cameras: tuple[CameraRecord, ...] = ()
    turning: tuple[StretchRecord, ...] = ()
    lost: tuple[StretchRecord, ...] = ()
    peak_rss_mb: Number | None = None
    peak_gpu_mb: Number | None = None
    wall_s: Number | None = None
    cpu_s: Number | None = None
    cpu_by_stage_s: dict[str, Number] = Field(default_factory=dict)
    stopped_by: str = ""
    dense: DenseRecord = DenseRecord()
    not_saved: tuple[str, ...] = ()


class _SnapshotModel(_Record):
    is_georeferenced: bool = False
    num_registered: int = 0
    num_points3D: int = 0  # noqa: N815 - as in the file
    num_observations: int = 0
    mean_track_length: Number | None = None
    mean_reprojection_error_px: Number | None = None


class _Snapshot(_Record):
    georeference: GeoreferenceRecord | None = None
    models: tuple[_SnapshotModel, ...] = ()


def read_summary(data: bytes) -> Summary:
    """The figures in a ``summary.json``.

    Raises:
        ValueError: it does not hold a run's figures.
    """
    return _read(Summary, data)


def read_snapshot(data: bytes) -> Summary:
    """What the ``snapshot.json`` of a run without a summary says of its first map.

    Raises:
        ValueError: it does not hold what is said of a snapshot.
    """
    snapshot = _read(_Snapshot, data)
    if not snapshot.models:
        return Summary()
    first = snapshot.models[0]
    return Summary(
        georeference=snapshot.georeference if first.is_georeferenced else None,
        registered_keyframes=first.num_registered,
        num_points3D=first.num_points3D,
        num_observations=first.num_observations,
        mean_track_length=first.mean_track_length,
        mean_reprojection_error_px=first.mean_reprojection_error_px,
    )


def _read(kind: type[Kind], data: bytes) -> Kind:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}"[:_MAX_CHARS]) from error
