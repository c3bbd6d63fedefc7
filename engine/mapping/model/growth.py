"""Growing a map: one keyframe at a time, or everything that can be registered.

The same steps serve the live map, a restart from a better pair, and the rescue of missing keyframes
at the end of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

from engine.config import GlobalBundleAdjustmentConfig, LocalBundleAdjustmentConfig
from engine.cpu_time import Stage, charged_to
from engine.mapping.model.adjustment_share import AdjustmentShare
from engine.mapping.model.bundle_adjustment import (
    GlobalAdjustmentSchedule,
    adjust_copy,
    adjust_globally,
    adjust_locally,
    merge_global_adjustment,
    start_global_adjustment,
)
from engine.mapping.model.place_evidence import contradicting_neighbors
from engine.mapping.model.sparse_map import Registration, SparseMap
from engine.types import Float64Array, FrameId, RegistrationStatus, VerifiedPair


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthConfig:
    """The settings that growing a map needs."""

    min_inlier_ratio: float  # of a registration
    local_bundle_adjustment: LocalBundleAdjustmentConfig
    global_bundle_adjustment: GlobalBundleAdjustmentConfig
    num_threads: int
    is_final: bool = False  # whether nothing more comes: the better one of two places is taken


@charged_to(Stage.REGISTER)
def register_and_refine(
    sparse_map: SparseMap, frame_id: FrameId, *, config: GrowthConfig, decides: bool = False
) -> Registration:
    """Registers a keyframe, triangulates its matches and refines its surroundings.

    Many weak pairs with repeated structure may outvote a strong one. Where the strongest pairs
    contradict the pose that most matches agree on, they pose the keyframe alone, or it waits. Where
    they see too little of the map for that, nothing better is known, and it stays a hypothesis for
    the repair of misplacements.

    Args:
        sparse_map: the map.
        frame_id: a keyframe that is not registered.
        config: thresholds of growing.
        decides: see `SparseMap.register`.
    """
    contradicting: dict[FrameId, VerifiedPair] = {}

    def is_credible(cam_from_world: Float64Array) -> bool:
        contradicting.clear()
        contradicting.update(contradicting_neighbors(sparse_map, frame_id, cam_from_world))
        return not contradicting

    register = functools.partial(
        sparse_map.register,
        frame_id,
        min_inlier_ratio=config.min_inlier_ratio,
        decides=decides,
    )
    registration = register(is_credible=is_credible)
    if registration.status is RegistrationStatus.CONTRADICTED:
        by_strong_pairs = register(neighbors=dict(contradicting), is_credible=is_credible)
        if by_strong_pairs.status is RegistrationStatus.REGISTERED:
            registration = by_strong_pairs
        elif by_strong_pairs.status is RegistrationStatus.TOO_FEW_CORRESPONDENCES:
            registration = register()
    if registration.status is RegistrationStatus.REGISTERED:
        sparse_map.triangulate(frame_id)
        adjust_locally(sparse_map, frame_id, config=config.local_bundle_adjustment)
    return registration


def adjust_in_place(sparse_map: SparseMap, *, config: GrowthConfig) -> None:
    """Adjusts the whole map on the calling thread and filters it."""
    if AdjustmentShare.is_worthwhile(sparse_map.reconstruction):
        adjusted = adjust_copy(
            start_global_adjustment(sparse_map),
            max_iterations=config.global_bundle_adjustment.max_iterations,
            num_threads=config.num_threads,
        )
        merge_global_adjustment(sparse_map, adjusted)
        return
    adjust_globally(
        sparse_map.reconstruction,
        calibration=sparse_map.calibration,
        max_iterations=config.global_bundle_adjustment.max_iterations,
        num_threads=config.num_threads,
    )
    sparse_map.filter_all()


def grow_fully(
    sparse_map: SparseMap, *, config: GrowthConfig, exclude: Collection[FrameId] = ()
) -> dict[FrameId, Registration]:
    """Registers everything that can be, the keyframe seeing the most points next.

    The whole map is adjusted each time it grew by the configured ratio. At the end of a run, those
    that have two places come last, each in the better one.

    Args:
        sparse_map: the map.
        config: thresholds of growing.
        exclude: keyframes to leave out.

    Returns:
        The keyframes registered, in order.
    """
    schedule = GlobalAdjustmentSchedule(config.global_bundle_adjustment)
    schedule.done(sparse_map.num_registered)
    visible = {
        i: sparse_map.num_visible_points(i)
        for i in sparse_map.keyframe_ids
        if not (sparse_map.is_registered(i) or i in exclude)
    }
    registered: dict[FrameId, Registration] = {}
    ambiguous: dict[FrameId, int] = {}  # that have two places, and what they see
    while visible or ambiguous:
        decides = not any(visible.values())
        waiting = ambiguous if decides else visible
        if not waiting:
            break
        frame_id = max(waiting, key=lambda i: (waiting[i], -i))
        num_visible = waiting.pop(frame_id)
        registration = register_and_refine(sparse_map, frame_id, config=config, decides=decides)
        if registration.status is RegistrationStatus.AMBIGUOUS and config.is_final and not decides:
            ambiguous[frame_id] = num_visible
        if registration.status is not RegistrationStatus.REGISTERED:
            continue
        registered[frame_id] = registration
        for other in sparse_map.neighbors(frame_id):
            # A neighbour that failed before gets another chance: it sees more points now.
            if not (sparse_map.is_registered(other) or other in exclude):
                ambiguous.pop(other, None)
                visible[other] = sparse_map.num_visible_points(other)
        if schedule.should(sparse_map.num_registered):
            schedule.done(sparse_map.num_registered)
            adjust_in_place(sparse_map, config=config)
    return registered
