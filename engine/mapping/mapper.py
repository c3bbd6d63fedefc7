"""The incremental mapper: a keyframe in, one frozen `MappingStep` out. No I/O, no asyncio.

What happens to a keyframe, in order::

    begin_keyframe    results of background jobs that are due are merged; graph and cameras grow
    (matching)        PairMatching, on any one thread: the pairs with earlier keyframes that hold
    add_keyframe      what overlays had is taken out; the first map is made, or the keyframe is
                      registered and its surroundings are refined, misplaced keyframes are taken
                      out, waiting ones are tried again; what fits nowhere grows as a map beside
                      it; cameras that zoom, are crops or have another lens change, and the map with
                      them; small maps are adjusted, copies of larger ones are handed out as jobs

`add_frame` poses the frames between keyframes, and `finish` registers what is left, rescues what is
missing and adjusts everything. One thread makes a mapper and calls it; what it returns is frozen or
a private copy. (The loop is that of incremental structure from motion: Snavely et al., SIGGRAPH
2006; Schönberger and Frahm, CVPR 2016.)
"""

from __future__ import annotations

import copy
import functools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pycolmap

from engine.config import Config
from engine.estimators.lenses import camera_focal_px, lens_kind
from engine.events import (
    BundleAdjusted,
    LensRecognised,
    MapInitialized,
    MisplacementFound,
    OverlayFound,
    Warned,
)
from engine.mapping.bundle_adjustment import (
    GlobalAdjustment,
    GlobalAdjustmentSchedule,
    adjust_globally,
    merge_global_adjustment,
    start_global_adjustment,
)
from engine.mapping.camera_crops import CameraCrops
from engine.mapping.camera_priors import RECOGNISED_SIGMA_RATIO, CameraPrior
from engine.mapping.camera_splits import CameraSplits
from engine.mapping.cameras import (
    CameraCalibration,
    CameraChange,
    InitialCamera,
    recognised_camera,
)
from engine.mapping.components import MAIN, Components
from engine.mapping.contradictions import find_contradictions
from engine.mapping.focal_votes import FocalVotes
from engine.mapping.frame_posing import FramePoser
from engine.mapping.georeferencing import FixAt, Georeferencing, no_fix
from engine.mapping.growth import (
    GrowthConfig,
    adjust_in_place,
    grow_fully,
    register_and_refine,
)
from engine.mapping.jobs import FinishedJob, JobKind, JobSlot, MapJob
from engine.mapping.journal_changes import JournalChanges
from engine.mapping.keyframe_reports import KeyframeReports
from engine.mapping.lens_recognition import LensRecognition, RecognisedLens
from engine.mapping.loop_closing import LoopClosing
from engine.mapping.map_evidence import Beside
from engine.mapping.metric_scale import MetricUnit
from engine.mapping.misplacement import MisplacementRepair, Repair
from engine.mapping.pair_evidence import PairEvidence
from engine.mapping.pose_reports import PoseReports
from engine.mapping.products import MapProducts
from engine.mapping.restarts import BuiltMap, MapBuilder
from engine.mapping.separate_maps import MIN_SEPARATE, build_separate_maps
from engine.mapping.sparse_map import Registration, SparseMap
from engine.mapping.steps import (
    KeyframeRecord,
    KeyframeToMatch,
    MapCounts,
    MapFigures,
    MappingStep,
    MapSnapshot,
)
from engine.mapping.strict_posing import StrictPosing
from engine.mapping.turning import TurningWatch
from engine.mapping.verdict_watch import VerdictWatch
from engine.mapping.window_merging import WindowMerge, WindowMergeConfig
from engine.mapping.window_schedule import WindowRefinement, solve_job
from engine.matching.overlays import Overlay, OverlayMask
from engine.matching.pair_agreement import PairAgreement
from engine.matching.pair_matching import MatchedKeyframe, PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink, WindowSolver
from engine.types import (
    CalibrationOrigin,
    Contradiction,
    Float64Array,
    FrameId,
    FramePose,
    Keyframe,
    MapView,
    RegistrationStatus,
    TrackedFrame,
    VerifiedPair,
)
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window as solve

_MAX_FURTHER_PASSES = 5  # final adjustments beyond those configured
_CONVERGED_RATIO = 0.002  # of a focal length: a final adjustment that moves it less is the last
_BENT_SHARE = 0.1  # of a map's observations that overlays had: it is built anew
_REPORTED_GROWTH = 1.25  # times the share of the image when an overlay was reported last
_MIN_MAP = 2  # keyframes; one alone is no map
_KEPT_RATIO = 0.5  # of the keyframes of a bent map that the new one needs at least
_MAX_LOOP_CORRECTIONS = 2  # at the end: pairs that the first refutes hide others
_MAX_REPAIRS = 5  # misplacements at the end that are tried to put right
_SAME_LENS_RATIO = 0.8  # of the keyframes of a map that another focal length must bring in again


class Mapper:
    """Turns keyframes with their pairs into a growing map, and tracked frames into poses.

    The scene graph belongs to the mapper's thread too, except between `begin_keyframe` and
    `add_keyframe`: then it belongs to the thread that matches, and `add_frame` leaves it alone.

    Args:
        config: the whole configuration; each part gets its own section.
        graph: the scene graph, which `matching` fills.
        matching: holds the keypoint tables.
        emit: takes the events.
        solve_window: solves windows of keyframes; by default the engine's own solver.
        fix_at: the GPS position of a camera (by its key) at a capture time, from readings beside
            its frames.
    """

    def __init__(
        self,
        config: Config,
        *,
        graph: SceneGraph,
        matching: PairMatching,
        emit: EventSink,
        solve_window: WindowSolver | None = None,
        fix_at: FixAt = no_fix,
    ) -> None:
        self._config = config
        self._graph = graph
        self._matching = matching
        self._emit = emit
        self._map = self._new_map()
        self._num_maps = 0  # adopted so far, each fuller than the one before
        self._cameras = CameraCalibration(config.cameras, emit=emit)
        self._agreement = PairAgreement(
            config.agreement,
            graph=graph,
            camera_of=self._camera,
            matches_everything=matching.matches_everything,
            seed=config.runtime.seed,
        )
        self._evidence = PairEvidence(self._agreement)
        self._focal_votes = FocalVotes(graph=graph, agreement=self._agreement)
        self._poser = FramePoser(
            registration=config.registration,
            seed=config.runtime.seed,
            max_interpolation_s=config.frame_tracking.max_interpolation_s,
        )
        self._growth = _growth_config(config, is_final=False)
        self._final_growth = _growth_config(config, is_final=True)
        self._solve_window = solve_window or functools.partial(solve, config=WindowSolverConfig())
        self._turning = TurningWatch(
            graph=graph,
            emit=emit,
            is_refused=config.initialization.refuse_turning,
            may_zoom=config.cameras.split,
        )
        self._builder = MapBuilder(
            initialization=config.initialization,
            registration=config.registration,
            rescue=config.rescue,
            window=config.window,
            growth=self._growth,
            final_growth=self._final_growth,
            graph=graph,
            cameras=self._cameras,
            new_map=self._new_map,
            solve_window=self._solve_window,
            calibrate=self._calibrate_from_pairs,
            turning=self._turning,
            seed=config.runtime.seed,
        )
        self._components = Components(
            is_growing=config.rescue.grow_components,
            registration=config.registration,
            growth=self._growth,
            final_growth=self._final_growth,
            graph=graph,
            builder=self._builder,
            emit=emit,
        )
        self._lenses = LensRecognition(
            config.cameras,
            initialization=config.initialization,
            growth=self._final_growth,
            graph=graph,
            new_map=self._new_map,
            all_matches=matching.all_matches,
            seed=config.runtime.seed,
        )
        self._strict_posing = StrictPosing(
            graph=graph,
            registration=config.registration,
            growth=self._growth,
            seed=config.runtime.seed,
        )
        self._windows = WindowRefinement(
            config.window,
            merging=WindowMergeConfig(
                window=config.window,
                registration=config.registration,
                local_bundle_adjustment=config.local_bundle_adjustment,
            ),
            graph=graph,
            solve=self._solve_window,
            emit=emit,
        )
        self._georeferencing = Georeferencing(
            config.georeference,
            final_iterations=config.global_bundle_adjustment.final_iterations,
            runtime=config.runtime,
            fix_at=fix_at,
            emit=emit,
        )
        self._splits = CameraSplits(
            graph=graph, cameras=self._cameras, builder=self._builder, emit=emit
        )
        self._crops = CameraCrops(
            graph=graph, builder=self._builder, growth=self._growth, emit=emit
        )
        self._verdicts = VerdictWatch(graph=graph, emit=emit)
        self._loops = LoopClosing(
            config.loops,
            growth=self._final_growth,
            min_inliers=config.registration.min_inliers,
            seed=config.runtime.seed,
            emit=emit,
        )
        self._metric_unit = MetricUnit(
            config.matching.metric_scale, depths_m=matching.depths_m, emit=emit
        )
        self._keyframe_reports = KeyframeReports(emit=emit)
        self._pose_reports = PoseReports(emit=emit)
        self._journal = JournalChanges()
        self._products = MapProducts(
            graph=graph,
            cameras=self._cameras,
            poser=self._poser,
            georeferencing=self._georeferencing,
        )
        self._schedule = GlobalAdjustmentSchedule(config.global_bundle_adjustment)
        self._adjustment = JobSlot(
            merge_after_keyframes=config.global_bundle_adjustment.merge_after_keyframes
        )
        self._window = JobSlot(merge_after_keyframes=config.window.merge_after_keyframes)
        self._adjusted_component: SparseMap | None = None  # by the job in flight; None: the map
        self._loop_waits_for_adjustment = False
        self._misplacements = MisplacementRepair()
        self._overlay_shares: dict[str, float] = {}  # of cameras' images, as reported last
        self._contradictions: tuple[Contradiction, ...] = ()  # of pairs to the final map
        self._version = 0  # of the map, for viewers
        self._begun_s = 0.0  # monotonic, when the newest keyframe came

    # -- a keyframe -----------------------------------------------------------------------------

    def begin_keyframe(
        self, keyframe: Keyframe, finished: Sequence[FinishedJob] = ()
    ) -> KeyframeToMatch:
        """Merges results that are due, and adds a keyframe to the scene graph, not yet to the map.

        Frames tracked from it may come from now on. Its matching follows, then `add_keyframe`,
        before the next keyframe begins.

        Raises:
            MapError: what the source says of the camera does not fit its model; the keyframe is
                not added.
            ValueError: the keyframe was added before.
        """
        self._merge(finished)
        self._begun_s = time.monotonic()
        self._cameras.add(keyframe, self._map)
        self._matching.add_keyframe(keyframe)
        self._poser.add_keyframe(keyframe)
        self._pose_reports.add_keyframe(keyframe)
        self._keyframe_reports.report_added(keyframe)
        settings = self._config.matching
        wants_focal_length = settings.use_focal_lengths and self._cameras.is_unknown(
            keyframe.calibration_key, self._map
        )
        wants_depths = settings.metric_scale != "off" and not self._is_initialized
        return KeyframeToMatch(
            frame_id=keyframe.frame_id,
            wants_pointmaps=wants_focal_length or wants_depths,
            intrinsics=self._cameras.wide_intrinsics(self._map),
            lost_ids=self._components.to_look_for(),
        )

    def add_keyframe(self, matched: MatchedKeyframe, *, wants_view: bool = False) -> MappingStep:
        """Adds the keyframe that was matched to the map and registers it, or starts a map.

        A keyframe whose matching failed is added with the pairs that held before, and registered
        when others bring it in.

        Args:
            matched: what matching the keyframe that began last gave.
            wants_view: whether viewers want to see the map.
        """
        frame_id = matched.frame_id
        is_bent = self._leave_out_overlays(matched)
        matched = self._add_pairs(matched)
        if self._config.cameras.split:
            self._splits.watch(self._map, matched.pairs)
        self._turning.watch(self._map, frame_id)
        if self._turning.is_all:
            self._discard_turning()
        if is_bent:
            self._build_anew(matched.pairs, because="overlays held much of it")
        elif self._evidence.examine(self._map):
            self._require_agreement()
        if matched.failure is not None:
            self._warn(f"{self._graph.keyframe(frame_id).name}: {matched.failure}")
            self._report_changes()  # what overlays or wrong pairs held may have gone
        elif not self._is_initialized:
            self._replace_map(self._builder.first(self._map, matched.pairs))
            self._split_cameras()
            self._recognise_lenses()
            self._report_changes()
        elif self._map.is_registered(frame_id):
            self._report_changes()  # a map built anew holds it already
        else:
            self._calibrate_from_pairs(self._map)
            if not self._components.claim(self._map, frame_id):
                self._register(frame_id)
            self._take_lead(self._components.add_keyframe(self._map, frame_id))
            self._pose_strictly()
            self._split_cameras()
            self._recognise_lenses()
            if not self._config.rescue.grow_components:
                self._replace_map(self._builder.after_poor_start(self._map))
            self._report_changes()
        record, jobs = self._record(frame_id), self._start_jobs()
        self._verdicts.watch(self._map, self._evidence_beside)
        return self._step(record=record, jobs=jobs, wants_view=wants_view)

    def _register(self, frame_id: FrameId) -> None:
        """Registers the newest keyframe, and others that have been waiting for it."""
        registration = register_and_refine(self._map, frame_id, config=self._growth)
        self._report_registration(frame_id, registration, started_s=self._begun_s)
        if registration.status is RegistrationStatus.REGISTERED:
            self._repair_misplaced(frame_id)
            self._retry_waiting()
            self._loops.watch(self._map, frame_id)
            self._correct_loops()
            self._loops.report(self._map)

    def _require_agreement(self) -> None:
        """Builds the map anew from agreed pairs, since the run shows that many pairs are wrong."""
        self._agreement.require()
        self._warn(
            f"{self._evidence.num_wrong} pairs contradict the map, and nothing confirms"
            " them: the matcher matches what shares nothing, and from now on maps use only pairs"
            " that a third view confirms"
        )
        self._build_anew(self._graph.edges(), because="many of its pairs are wrong")

    def _leave_out_overlays(self, matched: MatchedKeyframe) -> bool:
        """Takes what is not in the world out of the map, and adjusts what remains.

        Returns:
            Whether so much was taken out that the map may be bent; then it is not adjusted.
        """
        self._report_overlays(matched.overlays)
        if not matched.has_lost_matches:
            return False
        self._journal.add_pairs(matched.changed_pairs, matched.lost_pairs)
        agreed = self._agreement.test_again(one.pair for one in matched.changed_pairs)
        in_doubt = [o.pair for o in matched.changed_pairs if self._graph.is_held_back(o.pair)]
        covered = {i: np.flatnonzero(self._matching.covers(i)) for i in self._graph.keyframe_ids}
        lost = [*matched.lost_pairs, *in_doubt]
        share = self._map.replace_pairs(
            matched.changed_pairs,
            lost,
            covered_rows={i: covered[i] for i in self._map.registered_ids},
        )
        self._components.leave_out(matched.changed_pairs, lost, covered_rows=covered)
        self._let_in(agreed)
        if not self._is_initialized:
            return False
        self._abandon_jobs()  # their copies hold what was taken out
        self._take_out_adrift()
        if share > _BENT_SHARE:
            return True
        self._adjust(self._growth)
        return False

    def _report_overlays(self, overlays: Sequence[Overlay]) -> None:
        """Emits overlays that are new, or cover much more than when they were emitted last."""
        for overlay in overlays:
            if overlay.share < _REPORTED_GROWTH * self._overlay_shares.get(overlay.camera_key, 0.0):
                continue
            self._overlay_shares[overlay.camera_key] = overlay.share
            self._emit(
                OverlayFound(
                    camera_key=overlay.camera_key,
                    share=overlay.share,
                    boxes=overlay.boxes,
                    num_keyframes=overlay.num_keyframes,
                )
            )

    def _take_out_adrift(self) -> None:
        """Takes out keyframes that too few points hold in their place, all if none is left beside.

        Of maps beside the main one the fullest takes the place of one that is empty then.
        """
        adrift = [
            frame_id
            for frame_id in self._map.registered_ids
            if np.count_nonzero(self._map.point3D_ids(frame_id) >= 0)
            < self._config.registration.min_inliers
        ]
        if self._map.num_registered - len(adrift) < _MIN_MAP:
            adrift = list(self._map.registered_ids)
        self._map.deregister(adrift)
        for frame_id in adrift:
            self._graph.set_registered(frame_id, False)
        if not self._is_initialized:
            self._take_lead(self._components.lead(self._map, is_final=True))

    def _build_anew(self, newest: Sequence[VerifiedPair], *, because: str) -> None:
        """Builds a map from the pairs as they are now, in place of one that others bent.

        Args:
            newest: pairs of the newest keyframe.
            because: what is wrong with the map, if it has to stay.
        """
        bent = self._map
        self._map = self._builder.start_over()
        built = self._builder.first(self._map, newest)
        num_needed = _KEPT_RATIO * bent.num_registered
        if built is None or built.sparse_map.num_registered < num_needed:
            if bent.num_registered:
                self._map = bent
                self._warn(
                    f"the map of {bent.num_registered} keyframes may be bent, since {because};"
                    " no other one holds half as many"
                )
            return
        self._components.clear()
        for frame_id in self._graph.keyframe_ids:
            self._graph.set_registered(frame_id, False)
        self._replace_map(built)

    def _add_pairs(self, matched: MatchedKeyframe) -> MatchedKeyframe:
        """Adds the keyframe and its pairs to the map, unregistered, and what changed with them.

        Returns:
            The same with the pairs that the map may use as of now, also between earlier keyframes.
        """
        for seen_id, focal_px in matched.focal_lengths_px:
            if self._config.matching.use_focal_lengths:
                camera_key = self._graph.keyframe(seen_id).camera_key
                self._cameras.add_focal_length(camera_key, focal_px)
        for features in matched.changed_features:
            if features.frame_id != matched.frame_id:
                self._journal.add_table(features)
                self._map.replace_features(features)
                self._components.replace_features(features)
        self._keyframe_reports.report_pairs([*matched.pairs, *matched.found_pairs])
        self._journal.add_pairs(matched.found_pairs)
        keyframe = self._graph.keyframe(matched.frame_id)
        calibration_key = self._splits.calibration_key(self._map, keyframe, matched.pairs)
        self._graph.set_calibration_key(keyframe.frame_id, calibration_key)
        if self._agreement.is_required:
            self._calibrate_from_pairs(self._map)
        agreed = self._agreement.add_pairs(keyframe.frame_id)
        usable = self._agreement.usable(matched.pairs)
        self._map.add_keyframe(self._graph.keyframe(keyframe.frame_id), usable)
        for frame_id in {
            i for one in matched.found_pairs for i in (one.pair.first, one.pair.second)
        }:
            agreed += self._agreement.add_pairs(frame_id)
        late = self._let_in([*self._agreement.usable(matched.found_pairs), *agreed])
        self._report_loop([*usable, *late])
        self._adjustment.count_keyframe()
        self._window.count_keyframe()
        return replace(matched, pairs=(*usable, *late))

    def _calibrate_from_pairs(self, sparse_map: SparseMap) -> None:
        votes = self._focal_votes if self._agreement.is_required else None
        self._cameras.calibrate_from_pairs(sparse_map, self._graph, votes=votes)

    def _let_in(self, agreed: Sequence[VerifiedPair]) -> list[VerifiedPair]:
        """Adds pairs that became agreed to all maps; returns those that the map did not use."""
        by_pair = {one.pair: one for one in agreed}
        late = [
            o for o in by_pair.values() if o.pair.second not in self._map.neighbors(o.pair.first)
        ]
        self._map.add_pairs(late)
        self._components.add_pairs(late)
        return late

    def _report_loop(self, pairs: Sequence[VerifiedPair]) -> None:
        loop = next((pair for pair in pairs if self._graph.is_loop(pair.pair)), None)
        if loop is not None:
            self._loop_waits_for_adjustment = True
            self._loops.add_loop(loop)

    def _repair_misplaced(self, frame_id: FrameId) -> None:
        """Puts keyframes right that pairs of one keyframe show to be misplaced."""
        repair = self._misplacements.repair(self._map, [frame_id], config=self._growth)
        if repair is not None:
            self._take_repair(repair)

    def _take_repair(self, repair: Repair) -> None:
        """Makes a map in which misplaced keyframes have other places the map."""
        self._map = repair.sparse_map
        misplacement = repair.misplacement
        self._builder.distrust(misplacement.misleading)
        self._abandon_jobs()  # they hold the keyframes in the wrong place
        for frame_id in self._map.keyframe_ids:
            self._update_graph(frame_id)
        self._emit(
            MisplacementFound(
                keyframe_ids=misplacement.keyframe_ids,
                evidence_first=misplacement.evidence.first,
                evidence_second=misplacement.evidence.second,
            )
        )

    def _retry_waiting(self) -> None:
        """Tries keyframes that failed before, those with the best pairs into the map first."""
        limit = self._config.registration.max_retries_per_keyframe
        elsewhere = self._components.established_ids
        for frame_id in self._graph.retry_candidates(limit, exclude=elsewhere):
            started_s = time.monotonic()
            registration = register_and_refine(self._map, frame_id, config=self._growth)
            if registration.status is RegistrationStatus.REGISTERED:
                self._report_registration(
                    frame_id, registration, started_s=started_s, is_retry=True
                )

    def _pose_strictly(self, *, again: bool = False) -> None:
        """Registers keyframes that no agreed pair joins to the map, where that is proven."""
        if not self._agreement.is_required:
            return
        started_s = time.monotonic()
        posed = self._strict_posing.register_waiting(self._map, again=again)
        for frame_id, registration in posed.items():
            self._report_registration(frame_id, registration, started_s=started_s, is_retry=True)

    def _grow_without_wrong_pairs(self) -> None:
        """Builds the map anew and grows it, when what it holds by now shows many wrong pairs."""
        if self._evidence.examine(self._map):
            self._require_agreement()
            self._grow(self._growth)

    def _grow(self, config: GrowthConfig) -> None:
        """Registers everything that can be."""
        started_s = time.monotonic()
        grown = grow_fully(self._map, config=config, exclude=self._components.established_ids)
        each_s = (time.monotonic() - started_s) / max(1, len(grown))
        for frame_id, registration in grown.items():
            self._report_registration(
                frame_id, registration, started_s=time.monotonic() - each_s, is_retry=True
            )

    def _replace_map(self, built: BuiltMap | None) -> None:
        """Makes a built map the map when it holds more keyframes."""
        if built is None or built.sparse_map.num_registered <= self._map.num_registered:
            return
        self._num_maps += 1
        self._adopt(built.sparse_map)
        self._emit(
            MapInitialized(
                first=built.pair.first,
                second=built.pair.second,
                num_points3D=self._map.num_points3D,
                attempt=self._num_maps,
            )
        )

    def _adopt(self, sparse_map: SparseMap) -> None:
        """Makes another map the main one."""
        self._map = sparse_map
        self._components.release(sparse_map)
        self._misplacements.forget()
        self._metric_unit.update(self._map)
        for frame_id in self._map.keyframe_ids:
            self._update_graph(frame_id)
        self._abandon_jobs()
        self._schedule.done(self._map.num_registered)

    def _take_lead(self, sparse_map: SparseMap) -> None:
        """Makes the map that components lead to the main one, if it is another one now."""
        if sparse_map is not self._map:
            self._adopt(sparse_map)
            self._loop_waits_for_adjustment = True  # large maps that were joined are not adjusted

    def _correct_loops(self, *, is_final: bool = False) -> None:
        """Makes a map that agrees with pairs which contradicted it the map."""
        corrected = self._loops.correct(self._map, is_final=is_final)
        if corrected is None:
            return
        self._map = corrected
        self._components.release(self._map)
        for frame_id in self._map.registered_ids:
            self._update_graph(frame_id)
        self._abandon_jobs()  # they hold the map as it was
        self._schedule.done(self._map.num_registered)
        self._retry_waiting()

    def _discard_turning(self, *, is_final: bool = False) -> None:
        """Takes back a map that a camera turning without moving explains."""
        if not self._is_initialized or not self._turning.explains(self._map, is_final=is_final):
            return
        self._warn(
            f"the map of {self._map.num_registered} keyframes is none: the camera turns without"
            " moving, and turns show no depth"
        )
        for frame_id in self._map.registered_ids:
            self._graph.set_registered(frame_id, False)
        self._map = self._builder.start_over()
        self._components.clear()
        self._misplacements.forget()
        self._abandon_jobs()
        self._schedule.done(0)

    def _split_cameras(self, *, is_final: bool = False) -> None:
        """Splits cameras that zoom and finds those that are crops, as long as there are some."""
        if not self._config.cameras.split:
            return
        apart = functools.partial(self._components.apart_ids, is_final=is_final)
        while (
            split := self._splits.find(self._map, is_final=is_final, apart=apart(self._map))
        ) is not None:
            self._replace_cameras(split.change, split.sparse_map)
        if is_final and (regrouped := self._splits.regroup(self._map)) is not None:
            self._replace_cameras(regrouped.change, regrouped.sparse_map)
        while (crop := self._crops.find(self._map, is_final=is_final)) is not None:
            self._replace_cameras(crop.change, crop.sparse_map)
        if is_final:
            self._map = self._crops.refined(self._map)

    def _replace_cameras(self, change: CameraChange, sparse_map: SparseMap) -> None:
        """Makes a map built with changed cameras the map, whatever it holds."""
        self._cameras.adopt(change)
        for frame_id, calibration_key in change.calibration_keys.items():
            self._graph.set_calibration_key(frame_id, calibration_key)
            self._journal.add_camera(frame_id, sparse_map.camera(calibration_key))
        self._adopt(sparse_map)
        self._components.change_cameras(sparse_map, change)

    def _recognise_lenses(self) -> None:
        """Searches lenses that the map doubts; builds it anew with those that are found."""
        if self._turning.is_all:
            return  # turns fit many lenses
        for camera_key in self._lenses.doubted(self._map):
            found = self._lenses.recognise(self._map, camera_key)
            if found is not None and not self._turning.explains(self._map, poses=found.poses):
                self._change_lens(camera_key, found)

    def _change_lens(self, camera_key: str, found: RecognisedLens) -> None:
        """Makes a recognised lens that of its camera, and a map with it the map."""
        former = copy.deepcopy(self._map.camera(camera_key))
        camera = recognised_camera(found.camera)
        prior = CameraPrior.of(
            camera,
            origin=CalibrationOrigin.RECOGNISED,
            focal_sigma_ratio=RECOGNISED_SIGMA_RATIO,
        )
        change = CameraChange(cameras={camera_key: InitialCamera(camera=camera, prior=prior)})
        is_other_kind = lens_kind(camera) is not lens_kind(former)
        if is_other_kind:
            self._verify_again(camera_key, change)
        rebuilt = self._builder.rebuilt(self._map, change, poses=found.poses)
        enough = _SAME_LENS_RATIO * self._map.num_registered
        if is_other_kind:  # the present map may hold keyframes where they are not
            enough = min(enough, len(found.poses))
        if rebuilt.num_registered < enough:  # the present lens brings in more keyframes
            if is_other_kind:
                self._verify_again(camera_key)
            return
        self._num_maps += 1
        self._replace_cameras(change, rebuilt)
        for frame_id in self._graph.keyframe_ids:
            if self._graph.keyframe(frame_id).calibration_key == camera_key:
                self._journal.add_camera(frame_id, rebuilt.camera(camera_key))
        self._emit(
            LensRecognised(
                camera_key=camera_key,
                model=camera.model_name,
                focal_px=camera_focal_px(rebuilt.camera(camera_key)),
                former_model=former.model_name,
                former_focal_px=camera_focal_px(former),
                gain_ratio=found.gain_ratio if math.isfinite(found.gain_ratio) else None,
            )
        )

    def _verify_again(self, camera_key: str, change: CameraChange | None = None) -> None:
        """Verifies the pairs of a camera with its lens as it changes, or as it is in the map."""
        intrinsics = self._cameras.wide_intrinsics(self._map, change=change)
        self._journal.add_pairs(*self._matching.verify_again(intrinsics, camera_key=camera_key))

    # -- a frame between keyframes --------------------------------------------------------------

    def add_frame(
        self,
        tracked: TrackedFrame,
        *,
        fallback: TrackedFrame | None = None,
        wants_view: bool = False,
    ) -> MappingStep:
        """Poses a frame between keyframes, at once or when its keyframe is registered.

        Args:
            tracked: the frame as tracked from its keyframe.
            fallback: the same as tracked from the keyframe before, for a first pose while the map
                does not hold the newer one.
            wants_view: whether viewers want to see the map; not while a keyframe is matched.
        """
        number, sparse_map = self._map_for(tracked, fallback)
        pose = self._poser.add_tracked(
            tracked, sparse_map if self._is_initialized else None, fallback=fallback
        )
        if pose is not None:
            self._pose_reports.report_tracked([(tracked, pose)], map_number=number)
        return self._step(wants_view=wants_view)

    def _map_for(
        self, tracked: TrackedFrame, fallback: TrackedFrame | None
    ) -> tuple[int, SparseMap]:
        """The map with a frame's keyframe, else with that of its fallback, and its number."""
        for one in (tracked, fallback):
            if one is not None:
                holding = self._components.holding(self._map, one.keyframe_id)
                if holding is not None:
                    return holding
        return MAIN, self._map

    # -- background jobs ------------------------------------------------------------------------

    def _start_jobs(self) -> tuple[MapJob, ...]:
        jobs = (self._start_global_adjustment(), self._start_window())
        return tuple(job for job in jobs if job is not None)

    def _start_global_adjustment(self) -> MapJob | None:
        """A job for a copy of the map, when one is due.

        Small maps are adjusted at once instead, since nothing waits long for them.
        """
        if not (self._adjustment.is_free and self._is_initialized):
            return None
        num_registered = self._map.num_registered
        if not (self._schedule.should(num_registered) or self._loop_waits_for_adjustment):
            component = self._components.due_for_adjustment()
            return (
                None if component is None else self._start_adjusting(component, is_component=True)
            )
        self._schedule.done(num_registered)
        self._loop_waits_for_adjustment = False
        settings = self._config.global_bundle_adjustment
        if num_registered <= settings.synchronous_until:
            self._adjust(self._growth)
            self._report_changes()
            return None
        return self._start_adjusting(self._map)

    def _start_adjusting(self, sparse_map: SparseMap, *, is_component: bool = False) -> MapJob:
        """A job for a copy of one of the maps."""
        self._adjusted_component = sparse_map if is_component else None
        settings = self._config.global_bundle_adjustment
        run = functools.partial(
            _solve_adjustment,
            start_global_adjustment(sparse_map),
            max_iterations=settings.max_iterations,
            num_threads=self._config.runtime.num_threads or os.cpu_count() or 1,
        )
        return self._adjustment.start(MapJob(kind=JobKind.GLOBAL_ADJUSTMENT, run=run))

    def _start_window(self) -> MapJob | None:
        """A job that solves a window of the newest keyframes, when one is due."""
        if not (self._window.is_free and self._is_initialized):
            return None
        window = self._windows.start_if_due(self._map)
        if window is None:
            return None
        run = functools.partial(solve_job, window, solve=self._solve_window)
        return self._window.start(MapJob(kind=JobKind.WINDOW, run=run))

    def _merge(self, finished: Sequence[FinishedJob]) -> None:
        """Brings results of jobs into the map; those that were abandoned are dropped."""
        for one in finished:
            slot = self._adjustment if one.job.kind is JobKind.GLOBAL_ADJUSTMENT else self._window
            if one.failure is not None:
                self._warn(f"{one.job.kind.value} failed: {one.failure}")
            if not slot.release(one.job) or one.result is None:
                continue
            if isinstance(one.result, GlobalAdjustment):
                component = self._adjusted_component
                adjusted = self._map if component is None else component
                if adjusted in (self._map, *self._components.maps):  # not joined meanwhile
                    self._emit(merge_global_adjustment(adjusted, one.result))
                self._report_changes()
            elif self._take_over(self._windows.merge(self._map, one.result)):
                self._retry_waiting()
                self._report_changes()

    def _take_over(self, merge: WindowMerge) -> bool:
        """Makes the map that a window made better the map, if there is one."""
        if merge.better_map is None:
            return False
        self._map = merge.better_map
        self._components.release(self._map)
        for frame_id in merge.registered:
            self._update_graph(frame_id)
        return True

    def _abandon_jobs(self) -> None:
        self._adjustment.abandon()
        self._window.abandon()

    def _adjust(self, config: GrowthConfig) -> None:
        """Adjusts the whole map on this thread."""
        started_s = time.monotonic()
        before_px = self._map.mean_reprojection_error_px()
        adjust_in_place(self._map, config=config)
        self._emit(
            BundleAdjusted(
                num_keyframes=self._map.num_registered,
                num_points3D=self._map.num_points3D,
                reprojection_error_before_px=before_px,
                reprojection_error_after_px=self._map.mean_reprojection_error_px(),
                keyframes_added_meanwhile=0,
                elapsed_s=time.monotonic() - started_s,
            )
        )

    # -- the end of a run -----------------------------------------------------------------------

    def finish(
        self, finished: Sequence[FinishedJob] = (), *, wants_view: bool = False
    ) -> MappingStep:
        """Registers what is left after the last frame, rescues what is missing, adjusts all."""
        self._keyframe_reports.report_blank()
        self._merge(finished)
        self._abandon_jobs()  # merged after the last adjustment they would undo it
        self._discard_turning(is_final=True)
        if not self._is_initialized:
            self._replace_map(self._builder.first_at_end(self._map))
        self._split_cameras(is_final=True)
        if self._is_initialized:
            self._grow(self._growth)
            self._grow_without_wrong_pairs()
            self._recognise_lenses()
            self._correct_loops(is_final=True)
            self._take_lead(self._components.grow_finally(self._map))
            self._rescue_by_restarts()
            self._grow_without_wrong_pairs()
            self._grow(self._final_growth)
            self._pose_strictly(again=True)
            self._rescue_by_windows()
            self._repair_finally()
            self._improve_by_windows()
            for _ in range(_MAX_LOOP_CORRECTIONS):
                self._correct_loops(is_final=True)
            self._metric_unit.update(self._map)
            self._adjust_finally()
            self._loops.report(self._map)
            self._georeferencing.adjust(self._map)
            self._components.release(self._map)
            self._components.finish(self._map, min_keyframes=MIN_SEPARATE)
            if self._config.rescue.separate_maps:
                held = (self._map, *self._components.maps)
                separate = build_separate_maps(self._builder, self._graph, held)
                self._components.add_separate(separate)
            else:
                self._components.clear()
            if self._adopt_fullest():
                self._adjust_finally()
                self._georeferencing.adjust(self._map)
            self._georeferencing.update(self._map, is_final=True)
            self._contradictions = tuple(one for _, one in find_contradictions(self._map))
        else:
            self._turning.conclude(self._map)
        self._splits.report_missing(self._map)
        self._poser.pose_again(self._maps)
        self._report_changes(is_final=True)
        self._verdicts.judge(self._map, self._evidence_beside(is_final=True))
        return self._step(wants_view=wants_view)

    def _evidence_beside(self, *, is_final: bool = False) -> Beside:
        """What the map does not know of itself, for its verdict."""
        return Beside(
            other_maps=self._components.maps,
            cameras=self._cameras.figures(self._map) if self._is_initialized else (),
            contradictions=self._contradictions if is_final else (),
            turning=self._turning.stretches,
            gaps=self._poser.gaps(self._maps) if is_final else (),
            placement=self._georeferencing.placement,
            gps_contradiction=self._georeferencing.contradiction,
            searches_lenses=self._config.cameras.recognise_lenses,
            confirms_pairs=self._config.agreement.mode != "off",
        )

    def _adopt_fullest(self) -> bool:
        """Makes the separate map that holds most keyframes the map, if it holds more than that."""
        former = self._map
        self._take_lead(self._components.lead(former, is_final=True))
        return self._map is not former

    def _adjust_finally(self) -> None:
        """Adjusts everything as often as configured; several cameras on while one still moves.

        They leave a narrow valley, in which the solver takes small steps.
        """
        num_passes = self._config.global_bundle_adjustment.final_passes
        num_more = _MAX_FURTHER_PASSES if len(self._focal_lengths_px()) > 1 else 0
        for number in range(num_passes + num_more):
            before_px = self._focal_lengths_px()
            self._map.retriangulate()
            self._adjust(self._final_growth)
            moved_ratio = np.abs(self._focal_lengths_px() / before_px - 1.0).max(initial=0.0)
            if number + 1 >= num_passes and moved_ratio < _CONVERGED_RATIO:
                return

    def _focal_lengths_px(self) -> Float64Array:
        keys = sorted({self._map.keyframe(i).calibration_key for i in self._map.registered_ids})
        return np.array([camera_focal_px(self._map.camera(key)) for key in keys])

    def _rescue_by_restarts(self) -> None:
        """Tries other starts while keyframes are missing from all maps."""
        settings = self._config.rescue
        num_rebuilds = settings.final_rebuilds
        if settings.grow_components:
            num_rebuilds = min(num_rebuilds, self._components.num_rebuilds_wanted(self._map))
        for _ in range(num_rebuilds):
            built = self._builder.another_at_end(self._map)
            if built is None:
                return
            self._replace_map(built)

    def _rescue_by_windows(self) -> None:
        """Solves missing keyframes as windows of their own, as long as some come in."""
        while (merge := self._windows.rescue(self._map)) is not None:
            self._take_over(merge)
            self._grow(self._final_growth)

    def _repair_finally(self) -> None:
        """Puts misplaced keyframes right, as long as there are some."""
        repairs = self._misplacements.repair_all(
            self._map, config=self._final_growth, max_tries=_MAX_REPAIRS
        )
        for repair in repairs:
            self._take_repair(repair)

    def _improve_by_windows(self) -> None:
        """Solves the weakest parts of the map once more."""
        tried: set[FrameId] = set()
        errors_px: dict[FrameId, float] = {}
        for _ in range(self._config.window.max_final):
            merge = self._windows.improve(self._map, tried=tried, errors_px=errors_px)
            if merge is None:
                return
            if self._take_over(merge):
                errors_px.clear()

    def report(self, *, wants_view: bool = False) -> MappingStep:
        """Returns what is not in any step yet, with nothing done; also for a run that broke off."""
        self._verdicts.end()
        return self._step(wants_view=wants_view)

    # -- products: copies, for any thread -------------------------------------------------------

    def trajectories(self) -> list[list[FramePose]]:
        """The present poses of the frames in each map, in order of arrival; empty without a map.

        Each in metres east, north, up once its map is georeferenced; the map comes first.
        """
        return self._products.trajectories(self._maps)

    def cameras(self) -> list[pycolmap.Camera]:
        """Copies of all cameras as calibrated at present."""
        return self._cameras.copies(self._map)

    def overlay_masks(self) -> list[OverlayMask]:
        """What overlays leave of the images of keyframes, by camera."""
        return self._matching.overlay_masks()

    def snapshot(self) -> MapSnapshot:
        """Copies of the map and of those apart from it, each in metres if it is georeferenced.

        Separate maps are placed by the same origin, if at all.
        """
        return self._products.snapshot(self._maps or [self._map], counts=self._counts())

    def view(self) -> MapView:
        """A frozen picture of the map and the scene graph, for viewers."""
        return self._products.view(self._map, version=self._version)

    def figures(self) -> MapFigures:
        """The figures of the map, and of those apart from it, that the summary of a run reports."""
        measured = self._products.figures(
            self._map,
            self._components.maps,
            counts=self._counts(),
            metres_per_map_unit=self._metric_unit.metres_per_map_unit(self._map),
        )
        return replace(
            measured,
            turning=self._turning.stretches,
            verdict=self._verdicts.verdict,
            contradictions=self._contradictions,
            lost=self._components.lost_stretches(self._map),
        )

    def _record(self, frame_id: FrameId) -> KeyframeRecord:
        """What the journal keeps of the newest keyframe, and of the tables that it changed."""
        keyframe = self._graph.keyframe(frame_id)
        return self._journal.record(
            keyframe,
            camera=self._map.camera(keyframe.calibration_key),
            pairs=self._graph.verified_pairs(frame_id),
        )

    def _step(
        self,
        *,
        record: KeyframeRecord | None = None,
        jobs: tuple[MapJob, ...] = (),
        wants_view: bool,
    ) -> MappingStep:
        view = self.view() if wants_view and self._is_initialized else None
        due = (self._adjustment.due, self._window.due)
        return MappingStep(
            record=record,
            recalibrated=self._journal.take_cameras(),
            changed_pairs=self._journal.take_pairs(),
            new_poses=self._pose_reports.take_new(),
            jobs=jobs,
            due=tuple(job for job in due if job is not None),
            counts=self._counts(),
            view=view,
        )

    def _counts(self) -> MapCounts:
        return MapCounts(
            num_keyframes=self._pose_reports.num_keyframes,
            num_registered=self._map.num_registered,
        )

    # -- reporting ------------------------------------------------------------------------------

    def _report_registration(
        self,
        frame_id: FrameId,
        registration: Registration,
        *,
        started_s: float,
        is_retry: bool = False,
    ) -> None:
        if registration.status is RegistrationStatus.REGISTERED:
            self._update_graph(frame_id)
        self._keyframe_reports.report_registration(
            frame_id,
            registration,
            sparse_map=self._map,
            started_s=started_s,
            is_retry=is_retry,
        )

    def _report_changes(self, *, is_final: bool = False) -> None:
        """Reports cameras, and poses that became known, after the map changed."""
        self._version += 1
        self._poser.forget_points()
        if not self._is_initialized:
            return
        self._cameras.report(self._map, is_final=is_final)
        self._components.release(self._map)
        for number, sparse_map in self._components.numbered(self._map):
            self._pose_reports.report_keyframes(sparse_map, map_number=number)
            posed = self._poser.pose_pending(sparse_map)
            self._pose_reports.report_tracked(posed, map_number=number)

    def _warn(self, message: str) -> None:
        self._emit(Warned(message=message))

    # -- small questions ------------------------------------------------------------------------

    @property
    def _is_initialized(self) -> bool:
        return self._map.num_registered > 0

    def _camera(self, calibration_key: str) -> pycolmap.Camera:
        return self._map.camera(calibration_key)

    @property
    def _maps(self) -> list[SparseMap]:
        """The map, and those of what nothing joins to it; empty without a map."""
        return [self._map, *self._components.maps] if self._is_initialized else []

    def _new_map(self) -> SparseMap:
        return SparseMap(
            triangulation=self._config.triangulation,
            registration=self._config.registration,
            seed=self._config.runtime.seed,
            has_bounds=self._config.cameras.bounds,
        )

    def _update_graph(self, frame_id: FrameId) -> None:
        """Brings the scene graph up to date with a keyframe's place in the map."""
        holding = self._components.holding(self._map, frame_id)
        if holding is None:
            self._graph.set_registered(frame_id, False)
            return
        number, sparse_map = holding
        self._graph.set_registered(frame_id, True, map_number=number)
        self._graph.set_covisibility(frame_id, sparse_map.covisibility(frame_id))


def _solve_adjustment(
    adjustment: GlobalAdjustment, *, max_iterations: int, num_threads: int
) -> GlobalAdjustment:
    """Adjusts a private copy of the map; the job of another thread."""
    adjust_globally(
        adjustment.reconstruction,
        calibration=adjustment.calibration,
        max_iterations=max_iterations,
        num_threads=num_threads,
    )
    return adjustment


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
    )
