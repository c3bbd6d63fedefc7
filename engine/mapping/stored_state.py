"""What the journal keeps of a run besides its keyframes and pairs, and all that it gives back.

The mapper hands over what changed with each `MappingStep`; a run that goes on gets a `StoredRun`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from numpy.typing import NDArray

from engine.mapping.model.camera_priors import CameraPrior
from engine.types import (
    Float64Array,
    FrameId,
    GpsReading,
    ImagePair,
    Keyframe,
    VerifiedPair,
    freeze_field,
)

# A small state by name: what JSON can write (numbers to the bit, NaN too), or an array of numbers.
# None stands for a state that is not there any more.
Fact = str | float | bool | list[Any] | dict[str, Any] | NDArray[np.generic] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredKeyframe:
    """A keyframe as its source gave it, with its keypoint table as it was last."""

    keyframe: Keyframe
    camera_id: int  # COLMAP's, of the calibration that it had last
    source: str  # the source as the user named it, without credentials
    has_image: bool = True  # whether its image file is there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredCalibration:
    """A camera of the run: as it entered the map, as it was last, and what is known of it."""

    camera: pycolmap.Camera  # as it was last
    initial: pycolmap.Camera  # as it entered the map
    prior: CameraPrior


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRelativePose:
    """Where a frame between keyframes was, by its keyframe."""

    frame_id: FrameId
    keyframe_id: FrameId
    index: int
    captured_at_s: float
    cam_from_keyframe: Float64Array | None  # (3, 4), translation at scale 1; None: not posed yet

    def __post_init__(self) -> None:
        if self.cam_from_keyframe is not None:
            freeze_field(self, "cam_from_keyframe", (3, 4), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFrame:
    """A frame that arrived, or one that never got pixels."""

    frame_id: FrameId | None  # None: it was rejected
    camera_key: str | None
    source: str  # the source as the user named it, without credentials
    index: int
    name: str
    captured_at_s: float
    status: str | None  # as in frames.csv; None: the run ended before its turn came


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredModel:
    """A map as a snapshot has it; the main one is the first of a snapshot."""

    reconstruction: pycolmap.Reconstruction  # only registered keyframes, images by frame id
    record: Mapping[str, Any] = field(default_factory=dict)  # see `MapCopy`; empty: not kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRun:
    """One consistent moment of a run, as its journal has it; lists in the order of recording."""

    path: Path
    keyframes: tuple[StoredKeyframe, ...]
    pairs: tuple[VerifiedPair, ...]  # as last written; in the order in which they became edges
    tried: tuple[ImagePair, ...]  # matched, verified or not
    cameras: Mapping[int, pycolmap.Camera]  # as last written, by COLMAP's id
    calibrations: Mapping[str, StoredCalibration]  # by calibration key, in order of arrival
    relative_poses: tuple[StoredRelativePose, ...]
    snapshots: tuple[Path, ...]  # the latest one first; its maps may be older than the rest
    frames: tuple[StoredFrame, ...]
    gps_readings: tuple[GpsReading, ...]  # that came beside the frames
    facts: Mapping[str, Fact] = field(default_factory=dict)
    next_frame_id: FrameId = FrameId(1)  # larger than all that were given
