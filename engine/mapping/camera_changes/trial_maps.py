"""Maps with changed cameras: how they are made, and whether they fit better."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pycolmap

from engine.camera_models import LensKind
from engine.estimators.lenses import lens_kind
from engine.mapping.cameras.cameras import CameraChange, InitialCamera
from engine.mapping.maps.restarts import MapBuilder
from engine.mapping.model.camera_priors import TWO_VIEW_SIGMA_RATIO, CameraPrior
from engine.mapping.model.sparse_map import SparseMap
from engine.types import CalibrationOrigin, FrameId

MAX_ANEW = 60  # keyframes of a map that is built anew to try a change

_BETTER_GAIN_RATIO = 1.05  # of how well zoomed keyframes fit the map without a split
_MIN_REGISTERED_RATIO = 0.9  # of the keyframes in the map without a split


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChangedMap:
    """A map in which cameras changed, and how."""

    sparse_map: SparseMap
    change: CameraChange


def may_change(present: SparseMap, calibration_key: str) -> bool:
    """Whether nobody vouched for a calibration, and its lens is one that the votes understand."""
    prior = present.camera_prior(calibration_key)
    is_perspective = lens_kind(present.camera(calibration_key)) is LensKind.PERSPECTIVE
    return is_perspective and not prior.is_constant and not prior.origin.is_given


def estimated(camera: pycolmap.Camera) -> InitialCamera:
    """A camera whose focal length comes from pairs."""
    prior = CameraPrior.of(
        camera,
        origin=CalibrationOrigin.TWO_VIEW_GEOMETRIES,
        focal_sigma_ratio=TWO_VIEW_SIGMA_RATIO,
    )
    return InitialCamera(camera=camera, prior=prior)


def candidate_map(
    builder: MapBuilder, present: SparseMap, change: CameraChange, *, changed: Collection[FrameId]
) -> SparseMap | None:
    """A map with changed cameras: anew, or where it is large around what stays as it was."""
    anew = present.num_registered <= MAX_ANEW
    return changed_map(builder, present, change, changed=changed, anew=anew)


def changed_map(
    builder: MapBuilder,
    present: SparseMap,
    change: CameraChange,
    *,
    changed: Collection[FrameId],
    anew: bool,
) -> SparseMap | None:
    """A map with changed cameras, anew or with keyframes that do not change where they are."""
    if anew:
        return builder.anew(present, change)
    kept = [i for i in present.registered_ids if i not in set(changed)]
    return builder.rebuilt(present, change, poses={i: present.cam_from_world(i) for i in kept})


def fits_better(candidate: SparseMap, present: SparseMap, *, changed: Sequence[FrameId]) -> bool:
    """Whether a map fits keyframes of changed cameras clearly better, and the others no worse.

    Where the present map holds none of them yet, any that holds some does.
    """
    all_ids = present.keyframe_ids
    return (
        candidate.num_registered >= _MIN_REGISTERED_RATIO * present.num_registered
        and candidate.fit(all_ids).gain >= present.fit(all_ids).gain
        and candidate.fit(changed).gain > _BETTER_GAIN_RATIO * present.fit(changed).gain
    )
