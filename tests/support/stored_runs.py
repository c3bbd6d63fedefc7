"""What a journal would hold of a mapper's steps, and a mapper that goes on with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from engine.config import SnapshotsConfig
from engine.mapping.steps import KeyframeRecord, MappingStep, MapSnapshot
from engine.mapping.stored_state import (
    Fact,
    StoredCalibration,
    StoredKeyframe,
    StoredModel,
    StoredRelativePose,
    StoredRun,
)
from engine.output.snapshots import next_sequence, read_models, write_snapshot
from engine.types import Features, FrameId, ImagePair, Keyframe, VerifiedPair


class StoredSteps:
    """Keeps of a mapper's steps what the journal of a run keeps."""

    def __init__(self) -> None:
        self._keyframes: dict[FrameId, Keyframe] = {}
        self._pairs: dict[ImagePair, VerifiedPair] = {}
        self._tried: dict[ImagePair, None] = {}
        self._calibrations: dict[str, StoredCalibration] = {}
        self._relative: dict[FrameId, StoredRelativePose] = {}
        self._facts: dict[str, Fact] = {}

    def add(self, step: MappingStep) -> None:
        """Keeps what changed with a step."""
        if step.record is not None:
            self._add_record(step.record)
        self._calibrations.update(step.calibrations)
        for frame_id, camera in step.recalibrated.items():
            keyframe = self._keyframes[frame_id]
            key = self._key_of(camera)
            self._keyframes[frame_id] = replace(keyframe, calibration_key=key)
        self._add_pairs(step.changed_pairs)
        self._tried.update(dict.fromkeys(step.tried))
        self._relative.update((one.frame_id, one) for one in step.relative_poses)
        for name, fact in step.facts.items():
            if fact is None:
                self._facts.pop(name, None)
            else:
                self._facts[name] = _written(fact)

    def load(self, stored: StoredRun) -> None:
        """Begins with what is kept of a run before."""
        self._keyframes = {one.keyframe.frame_id: one.keyframe for one in stored.keyframes}
        self._pairs = {verified.pair: verified for verified in stored.pairs}
        self._tried = dict.fromkeys(stored.tried)
        self._calibrations = dict(stored.calibrations)
        self._relative = {one.frame_id: one for one in stored.relative_poses}
        self._facts = dict(stored.facts)

    def run(self, path: Path = Path()) -> StoredRun:
        """What is kept by now."""
        tried = {**self._tried, **dict.fromkeys(self._pairs)}
        return StoredRun(
            path=path,
            keyframes=tuple(
                StoredKeyframe(
                    keyframe=one,
                    camera_id=int(self._calibrations[one.calibration_key].camera.camera_id),
                    source="",
                )
                for one in self._keyframes.values()
            ),
            pairs=tuple(self._pairs.values()),
            tried=tuple(tried),
            cameras={int(one.camera.camera_id): one.camera for one in self._calibrations.values()},
            calibrations=dict(self._calibrations),
            relative_poses=tuple(self._relative.values()),
            snapshots=(),
            frames=(),
            gps_readings=(),
            facts=dict(self._facts),
        )

    def _add_record(self, record: KeyframeRecord) -> None:
        self._keyframes[record.keyframe.frame_id] = record.keyframe
        for features in record.moved:
            self._replace(features)
        self._add_pairs((*record.changed_pairs, *record.pairs))

    def _replace(self, features: Features) -> None:
        keyframe = self._keyframes[features.frame_id]
        self._keyframes[features.frame_id] = replace(keyframe, features=features)

    def _add_pairs(self, pairs: Iterable[VerifiedPair]) -> None:
        for verified in pairs:
            if verified.num_inliers:
                # Equal to the mapper's own, and yet another one, as what is read from a file.
                self._pairs[verified.pair] = copy.copy(verified)
            else:
                self._pairs.pop(verified.pair, None)
                self._tried[verified.pair] = None

    def _key_of(self, camera: pycolmap.Camera) -> str:
        return next(
            key
            for key, one in self._calibrations.items()
            if one.camera.camera_id == camera.camera_id
        )


def written_models(snapshot: MapSnapshot, folder: Path) -> tuple[StoredModel, ...]:
    """The models of a snapshot, written to a folder of snapshots and read back."""
    if not snapshot.counts.num_registered:
        return ()
    written = write_snapshot(
        folder,
        snapshot.copies,
        sequence=next_sequence(folder),
        entries={},
        config=SnapshotsConfig(),
    )
    return read_models(written.path)


def _written(fact: Fact) -> Any:
    """A fact as it is read from a file."""
    return fact.copy() if isinstance(fact, np.ndarray) else json.loads(json.dumps(fact))
