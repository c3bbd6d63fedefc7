"""The parts of a mapper, and which settings each of them gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pycolmap

from engine.config import Config
from engine.mapping.background_jobs import BackgroundJobs
from engine.mapping.camera_changes.camera_crops import CameraCrops
from engine.mapping.camera_changes.camera_splits import CameraSplits
from engine.mapping.camera_changes.lens_change import LensChanges
from engine.mapping.camera_changes.lens_recognition import LensRecognition
from engine.mapping.cameras.cameras import CameraCalibration
from engine.mapping.cameras.focal_votes import FocalVotes
from engine.mapping.frame_posing import FramePoser
from engine.mapping.journal_changes import JournalChanges
from engine.mapping.keyframe_reports import KeyframeReports
from engine.mapping.maps.components import Components
from engine.mapping.maps.early_map import EarlyMap
from engine.mapping.maps.restarts import MapBuilder
from engine.mapping.model.bundle_adjustment import GlobalAdjuster
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.overlay_removal import OverlayRemoval
from engine.mapping.places.loop_closing import LoopClosing
from engine.mapping.places.misplacement import MisplacementRepair
from engine.mapping.places.pair_evidence import PairEvidence
from engine.mapping.places.strict_posing import StrictPosing
from engine.mapping.places.turning import TurningWatch
from engine.mapping.pose_reports import PoseReports
from engine.mapping.positions.georeferencing import FixAt, Georeferencing
from engine.mapping.positions.metric_scale import MetricUnit
from engine.mapping.products import MapProducts
from engine.mapping.registering import Registering
from engine.mapping.verdict.verdict_watch import VerdictWatch
from engine.mapping.windows.window_merging import WindowMergeConfig
from engine.mapping.windows.window_schedule import WindowRefinement
from engine.matching.pair_agreement import PairAgreement
from engine.matching.pair_matching import PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink, WindowSolver


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapperParts:
    """All that a mapper uses, beside the main map."""

    growth: GrowthConfig  # thresholds while frames arrive
    final_growth: GrowthConfig  # and at the end
    agreement: PairAgreement
    evidence: PairEvidence
    calibrate: Callable[[SparseMap], None]  # cameras of unknown focal length, from pairs
    cameras: CameraCalibration
    builder: MapBuilder
    early: EarlyMap
    components: Components
    registering: Registering
    strict_posing: StrictPosing
    turning: TurningWatch
    misplacements: MisplacementRepair
    loops: LoopClosing
    overlays: OverlayRemoval
    splits: CameraSplits
    crops: CameraCrops
    lenses: LensRecognition
    lens_changes: LensChanges
    windows: WindowRefinement
    jobs: BackgroundJobs
    poser: FramePoser
    georeferencing: Georeferencing
    metric_unit: MetricUnit
    keyframe_reports: KeyframeReports
    pose_reports: PoseReports
    journal: JournalChanges
    products: MapProducts
    verdicts: VerdictWatch


def assemble(
    config: Config,
    *,
    graph: SceneGraph,
    matching: PairMatching,
    camera_of: Callable[[str], pycolmap.Camera],
    emit: EventSink,
    solve_window: WindowSolver,
    fix_at: FixAt,
    adjust: GlobalAdjuster | None,
) -> MapperParts:
    """Makes the parts of a mapper.

    Args:
        config: the whole configuration; each part gets its own section.
        graph: holds all keyframes and pairs.
        matching: holds the keypoint tables.
        camera_of: the camera of the main map by its calibration key.
        emit: takes the events.
        solve_window: solves windows of keyframes.
        fix_at: the GPS position of a camera (by its key) at a capture time.
        adjust: adjusts maps beside the growing one; None: the engine does.
    """
    registration, seed = config.registration, config.runtime.seed
    growth = _growth_config(config, is_final=False)
    final_growth = _growth_config(config, is_final=True)
    new_map = functools.partial(empty_map, config)

    # Cameras and pairs.
    cameras = CameraCalibration(config.cameras, emit=emit)
    agreement = PairAgreement(
        config.agreement,
        graph=graph,
        camera_of=camera_of,
        matches_everything=matching.matches_everything,
        seed=seed,
    )
    votes = FocalVotes(graph=graph, agreement=agreement)

    def calibrate(sparse_map: SparseMap, *, is_trial: bool = False) -> None:
        agreed = votes if agreement.is_asked_for else None
        cameras.calibrate_from_pairs(sparse_map, graph, votes=agreed, is_trial=is_trial)

    # Maps.
    turning = TurningWatch(
        graph=graph,
        emit=emit,
        is_refused=config.initialization.refuse_turning,
        may_zoom=config.cameras.split,
    )
    builder = MapBuilder(
        initialization=config.initialization,
        window=config.window,
        growth=growth,
        final_growth=final_growth,
        graph=graph,
        cameras=cameras,
        new_map=new_map,
        solve_window=solve_window,
        calibrate=calibrate,
        calibrate_trial=functools.partial(calibrate, is_trial=True),
        turning=turning,
        seed=seed,
    )
    components = Components(
        is_growing=config.rescue.grow_components,
        registration=registration,
        growth=growth,
        final_growth=final_growth,
        graph=graph,
        builder=builder,
        emit=emit,
    )
    windows = WindowRefinement(
        config.window,
        merging=WindowMergeConfig(
            window=config.window,
            registration=registration,
            local_bundle_adjustment=config.local_bundle_adjustment,
        ),
        graph=graph,
        solve=solve_window,
        emit=emit,
    )

    # What leaves the mapper.
    poser = FramePoser(
        registration=registration,
        seed=seed,
        max_interpolation_s=config.frame_tracking.max_interpolation_s,
    )
    georeferencing = Georeferencing(
        config.georeference,
        final_iterations=config.global_bundle_adjustment.final_iterations,
        runtime=config.runtime,
        fix_at=fix_at,
        emit=emit,
    )
    keyframe_reports = KeyframeReports(emit=emit)
    strict_posing = StrictPosing(graph=graph, registration=registration, growth=growth, seed=seed)
    journal = JournalChanges()
    metric_unit = MetricUnit(config.matching.metric_scale, depths_m=matching.depths_m, emit=emit)

    return MapperParts(
        growth=growth,
        final_growth=final_growth,
        agreement=agreement,
        evidence=PairEvidence(agreement),
        calibrate=calibrate,
        cameras=cameras,
        builder=builder,
        early=EarlyMap(
            config.initialization,
            growth=growth,
            graph=graph,
            builder=builder,
            metric_unit=metric_unit,
        ),
        components=components,
        registering=Registering(
            max_retries=registration.max_retries_per_keyframe,
            growth=growth,
            graph=graph,
            components=components,
            strict_posing=strict_posing,
            reports=keyframe_reports,
        ),
        strict_posing=strict_posing,
        turning=turning,
        misplacements=MisplacementRepair(),
        loops=LoopClosing(
            config.loops,
            growth=final_growth,
            min_inliers=registration.min_inliers,
            seed=seed,
            emit=emit,
        ),
        overlays=OverlayRemoval(
            graph=graph, matching=matching, min_inliers=registration.min_inliers, emit=emit
        ),
        splits=CameraSplits(graph=graph, cameras=cameras, builder=builder, emit=emit),
        crops=CameraCrops(graph=graph, builder=builder, growth=growth, emit=emit),
        lenses=LensRecognition(
            config.cameras,
            initialization=config.initialization,
            growth=final_growth,
            graph=graph,
            new_map=new_map,
            all_matches=matching.all_matches,
            seed=seed,
        ),
        lens_changes=LensChanges(
            cameras=cameras, builder=builder, matching=matching, journal=journal
        ),
        windows=windows,
        jobs=BackgroundJobs(
            config.global_bundle_adjustment,
            config.window,
            windows=windows,
            solve_window=solve_window,
            num_threads=config.runtime.num_threads,
            adjust=adjust,
        ),
        poser=poser,
        georeferencing=georeferencing,
        metric_unit=metric_unit,
        keyframe_reports=keyframe_reports,
        pose_reports=PoseReports(emit=emit),
        journal=journal,
        products=MapProducts(
            graph=graph, cameras=cameras, poser=poser, georeferencing=georeferencing
        ),
        verdicts=VerdictWatch(graph=graph, emit=emit),
    )


def empty_map(config: Config) -> SparseMap:
    """A map without cameras and keyframes."""
    return SparseMap(
        triangulation=config.triangulation,
        registration=config.registration,
        seed=config.runtime.seed,
        has_bounds=config.cameras.bounds,
    )


def _growth_config(config: Config, *, is_final: bool) -> GrowthConfig:
    """Thresholds of growing: while frames arrive, or at the end, when no better ones can come."""
    registration, settings = config.registration, config.global_bundle_adjustment
    if is_final:
        settings = settings.model_copy(update={"max_iterations": settings.final_iterations})
    return GrowthConfig(
        min_inlier_ratio=(
            registration.min_inlier_ratio if is_final else registration.sure_inlier_ratio
        ),
        local_bundle_adjustment=config.local_bundle_adjustment,
        global_bundle_adjustment=settings,
        num_threads=config.runtime.num_threads,
        is_final=is_final,
    )
