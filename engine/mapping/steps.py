"""What the mapper returns: frozen values and private copies, for any thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.types import (
    CameraFigures,
    Features,
    FrameId,
    FramePose,
    ImagePair,
    Intrinsics,
    Keyframe,
    LostStretch,
    MapCounts,
    MapView,
    TurningStretch,
    Verdict,
    VerifiedPair,
)

if TYPE_CHECKING:
    import pycolmap

    from engine.dense_types import KeyframePoses
    from engine.mapping.ahead_posing import PosingReference
    from engine.mapping.jobs import MapJob
    from engine.mapping.positions.georeferencing import Placement
    from engine.mapping.stored_state import Fact, StoredCalibration, StoredRelativePose


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyframeToMatch:
    """A keyframe that the mapper holds and that is to be matched next."""

    frame_id: FrameId
    wants_pointmaps: bool  # whether the matcher's depths and focal lengths are of use
    intrinsics: Mapping[str, Intrinsics] = field(  # of all cameras by key; empty: none is wide
        default_factory=dict
    )
    lost_ids: tuple[FrameId, ...] = ()  # earlier ones without a place, to be looked for once more


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframeRecord:
    """What the journal keeps of a keyframe."""

    keyframe: Keyframe
    camera: pycolmap.Camera  # a copy
    pairs: tuple[VerifiedPair, ...]
    moved: tuple[Features, ...]  # keypoint tables of other keyframes that changed meanwhile
    changed_pairs: tuple[VerifiedPair, ...] = ()  # of other keyframes; without matches if lost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappingStep:
    """What one call of the mapper did."""

    record: KeyframeRecord | None  # None: no keyframe was added
    new_poses: tuple[FramePose, ...]  # each frame once, as first reported
    jobs: tuple[MapJob, ...]  # to start now, on another thread
    due: tuple[MapJob, ...]  # jobs whose results must be merged before the next keyframe
    counts: MapCounts
    view: MapView | None  # for viewers, where it was asked for and there is a map
    # Keyframes whose camera is another one now, or has another model, with copies of these.
    recalibrated: Mapping[FrameId, pycolmap.Camera] = field(default_factory=dict)
    changed_pairs: tuple[VerifiedPair, ...] = ()  # that no record has; without matches if lost
    # What the journal keeps with it, as far as it changed since the step before.
    tried: tuple[ImagePair, ...] = ()  # pairs that were matched and do not hold
    calibrations: Mapping[str, StoredCalibration] = field(default_factory=dict)  # copies, by key
    relative_poses: tuple[StoredRelativePose, ...] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)  # small states by name
    references: tuple[PosingReference, ...] = ()  # to pose frames by, while the map changes

    @property
    def has_changes(self) -> bool:
        """Whether the journal gets something of it besides a record."""
        return bool(
            self.recalibrated
            or self.changed_pairs
            or self.tried
            or self.calibrations
            or self.relative_poses
            or self.facts
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapCopy:
    """A private copy of a map, to be written."""

    reconstruction: pycolmap.Reconstruction
    is_in_metres: bool  # east, north, up of the run's origin; else in the map's own frame and unit
    record: Mapping[str, Any] = field(default_factory=dict)  # for JSON, what COLMAP's files lack


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapSnapshot:
    """Private copies of the map and of those apart from it, and where they lie on the globe."""

    copies: tuple[MapCopy, ...]
    placement: Placement | None
    counts: MapCounts
    poses: KeyframePoses  # of the main map, in the world of its copy
    verdict: Verdict  # on the main map


@dataclass(frozen=True, slots=True, kw_only=True)
class OneMapFigures:
    """The figures of one of a run's maps."""

    num_registered: int
    num_points3D: int
    mean_reprojection_error_px: float
    first_name: str  # of its keyframes, in order of arrival
    last_name: str
    num_posed_frames: int  # keyframes, tracked and interpolated ones
    is_georeferenced: bool  # whether its place on the globe is known

    def as_record(self) -> dict[str, object]:
        """The record in JSON files."""
        return {
            "registered_keyframes": self.num_registered,
            "num_points3D": self.num_points3D,
            "mean_reprojection_error_px": self.mean_reprojection_error_px,
            "first_keyframe": self.first_name,
            "last_keyframe": self.last_name,
            "frames_with_pose": self.num_posed_frames,
            "georeferenced": self.is_georeferenced,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapFigures:
    """The figures of the map that a run reports, and of those apart from it."""

    counts: MapCounts
    num_points3D: int
    num_observations: int
    mean_track_length: float
    mean_reprojection_error_px: float
    num_interpolated_frames: int  # in all maps
    num_frames_without_pose: int  # in any map; of those that were not dropped
    placement: Placement | None
    gps_rmse_m: float | None
    metres_per_map_unit: float | None
    cameras: tuple[CameraFigures, ...] = ()
    lost: tuple[LostStretch, ...] = ()  # stretches of keyframes that fitted nowhere when they came
    turning: tuple[TurningStretch, ...] = ()  # where a camera turns without moving
    verdict: Verdict = field(default_factory=Verdict)  # how far the map can be trusted
    not_georeferenced: str = ""  # why, where there are positions
    maps: tuple[OneMapFigures, ...] = ()  # the map first, in the order of a snapshot's
