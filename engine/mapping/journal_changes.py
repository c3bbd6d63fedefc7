"""What the journal of a run keeps: each keyframe once, and what changed of earlier ones since."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import numpy as np
import pycolmap

from engine.mapping.cameras.cameras import InitialCamera
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.steps import KeyframeRecord
from engine.mapping.stored_state import Fact, StoredCalibration
from engine.types import Features, FrameId, ImagePair, Keyframe, PairReason, VerifiedPair


class JournalChanges:
    """Collects what the journal does not have yet, until a step hands it over."""

    def __init__(self) -> None:
        self._tables: dict[FrameId, Features] = {}  # keypoint tables
        self._pairs: dict[ImagePair, VerifiedPair] = {}
        self._cameras: dict[FrameId, pycolmap.Camera] = {}
        self._tried: list[ImagePair] = []
        self._calibrations: dict[str, tuple[InitialCamera, list[float]]] = {}  # as last taken
        self._facts: dict[str, Fact] = {}  # as last taken

    def add_table(self, features: Features) -> None:
        """Adds the keypoint table of an earlier keyframe as it is now."""
        self._tables[features.frame_id] = features

    def add_pairs(self, changed: Iterable[VerifiedPair], lost: Iterable[ImagePair] = ()) -> None:
        """Adds pairs that the journal may have, as they are now.

        Args:
            changed: pairs with other matches.
            lost: pairs that do not hold any more.
        """
        self._pairs.update((verified.pair, verified) for verified in changed)
        self._pairs.update((pair, _without_matches(pair)) for pair in lost)

    def add_camera(self, frame_id: FrameId, camera: pycolmap.Camera) -> None:
        """Adds the camera of a keyframe, which is another one now or has another model."""
        self._cameras[frame_id] = copy.deepcopy(camera)

    def add_tried(self, pairs: Iterable[ImagePair]) -> None:
        """Adds pairs that were matched and do not hold."""
        self._tried += pairs

    def take_tried(self) -> tuple[ImagePair, ...]:
        """Hands over pairs that do not hold."""
        tried, self._tried = tuple(self._tried), []
        return tried

    def changed_calibrations(
        self, initial: Mapping[str, InitialCamera], sparse_map: SparseMap
    ) -> dict[str, StoredCalibration]:
        """Cameras that are new, or have another calibration than at the last call, as copies.

        Args:
            initial: all cameras as they entered the map, by key.
            sparse_map: has their present calibrations.
        """
        changed = {}
        for camera_key, one in initial.items():
            camera = sparse_map.camera(camera_key)
            present = (one, list(camera.params))
            if self._calibrations.get(camera_key) == present:
                continue
            self._calibrations[camera_key] = present
            changed[camera_key] = StoredCalibration(
                camera=copy.deepcopy(camera), initial=copy.deepcopy(one.camera), prior=one.prior
            )
        return changed

    def changed_facts(self, present: Mapping[str, Fact]) -> dict[str, Fact]:
        """Those of all facts of one kind that are new or changed since the last call.

        Args:
            present: facts that JSON can write; no arrays.
        """
        changed = {
            name: value
            for name, value in present.items()
            if name not in self._facts or self._facts[name] != value
        }
        self._facts.update(changed)
        return changed

    def record(
        self, keyframe: Keyframe, *, camera: pycolmap.Camera, pairs: Iterable[VerifiedPair]
    ) -> KeyframeRecord:
        """Hands over the newest keyframe, and the tables and pairs of others.

        Args:
            keyframe: the newest one.
            camera: its camera; is copied.
            pairs: all pairs that it has.
        """
        frame_id = keyframe.frame_id
        tables, self._tables = tuple(self._tables.values()), {}
        return KeyframeRecord(
            keyframe=keyframe,
            camera=copy.deepcopy(camera),
            pairs=tuple(pairs),
            moved=tables,
            changed_pairs=tuple(
                one
                for one in self.take_pairs()
                if frame_id not in (one.pair.first, one.pair.second)
            ),
        )

    def take_pairs(self) -> tuple[VerifiedPair, ...]:
        """Hands over the pairs; those that do not hold any more have no matches."""
        pairs, self._pairs = tuple(self._pairs.values()), {}
        return pairs

    def take_cameras(self) -> dict[FrameId, pycolmap.Camera]:
        """Hands over the cameras, as copies."""
        cameras, self._cameras = self._cameras, {}
        return cameras


def _without_matches(pair: ImagePair) -> VerifiedPair:
    return VerifiedPair(
        pair=pair,
        reason=PairReason.TEMPORAL,
        inlier_matches_idx=np.empty((0, 2), np.uint32),
        num_matches=0,
        fundamental=np.zeros((3, 3)),
        homography_inlier_ratio=0.0,
    )
