"""Changing lenses: the map by a recognised lens, and whether it replaces the present one."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

from engine.estimators.lenses import camera_focal_px, lens_kind
from engine.events import LensRecognised
from engine.mapping.camera_changes.lens_recognition import RecognisedLens
from engine.mapping.cameras.cameras import (
    CameraCalibration,
    CameraChange,
    InitialCamera,
    recognised_camera,
)
from engine.mapping.journal_changes import JournalChanges
from engine.mapping.maps.restarts import MapBuilder
from engine.mapping.model.camera_priors import RECOGNISED_SIGMA_RATIO, CameraPrior
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.pair_matching import PairMatching
from engine.types import CalibrationOrigin

_SAME_LENS_RATIO = 0.8  # of the keyframes of a map that another focal length must bring in again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LensChange:
    """A map by a recognised lens, which is to take the place of the present one."""

    camera_key: str
    change: CameraChange
    sparse_map: SparseMap
    event: LensRecognised  # to be emitted then


class LensChanges:
    """Builds maps by recognised lenses, from pairs that are verified with these.

    Args:
        cameras: of the run.
        builder: builds maps.
        matching: verifies pairs.
        journal: gets the pairs that change.
    """

    def __init__(
        self,
        *,
        cameras: CameraCalibration,
        builder: MapBuilder,
        matching: PairMatching,
        journal: JournalChanges,
    ) -> None:
        self._cameras = cameras
        self._builder = builder
        self._matching = matching
        self._journal = journal

    def change(self, present: SparseMap, found: RecognisedLens) -> LensChange | None:
        """Rebuilds a map with the lens that was recognised for one of its cameras.

        Args:
            present: the map; it stays as it is.
            found: the lens.

        Returns:
            None when the present lens brings in more keyframes; pairs are as they were then.
        """
        camera_key = found.camera_key
        former = copy.deepcopy(present.camera(camera_key))
        camera = recognised_camera(found.camera)
        prior = CameraPrior.of(
            camera,
            origin=CalibrationOrigin.RECOGNISED,
            focal_sigma_ratio=RECOGNISED_SIGMA_RATIO,
        )
        change = CameraChange(cameras={camera_key: InitialCamera(camera=camera, prior=prior)})
        is_other_kind = lens_kind(camera) is not lens_kind(former)
        if is_other_kind:
            self._verify_again(present, camera_key, change)
        rebuilt = self._builder.rebuilt(present, change, poses=found.poses)
        enough = _SAME_LENS_RATIO * present.num_registered
        if is_other_kind:  # the present map may hold keyframes where they are not
            enough = min(enough, len(found.poses))
        if rebuilt.num_registered < enough:
            if is_other_kind:
                self._verify_again(present, camera_key)
            return None
        event = LensRecognised(
            camera_key=camera_key,
            model=camera.model_name,
            focal_px=camera_focal_px(rebuilt.camera(camera_key)),
            former_model=former.model_name,
            former_focal_px=camera_focal_px(former),
            gain_ratio=found.gain_ratio if math.isfinite(found.gain_ratio) else None,
        )
        return LensChange(camera_key=camera_key, change=change, sparse_map=rebuilt, event=event)

    def _verify_again(
        self, sparse_map: SparseMap, camera_key: str, change: CameraChange | None = None
    ) -> None:
        """Verifies the pairs of a camera with its lens as it changes, or as it is in the map."""
        intrinsics = self._cameras.wide_intrinsics(sparse_map, change=change)
        self._journal.add_pairs(*self._matching.verify_again(intrinsics, camera_key=camera_key))
