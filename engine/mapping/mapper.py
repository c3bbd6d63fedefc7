"""The incremental mapper: a keyframe in, one frozen `MappingStep` out. No I/O, no asyncio.

What happens to a keyframe, in order::

    begin_keyframe    results of background jobs that are due are merged, another lens among them;
                      graph and cameras grow
    (matching)        PairMatching, on any one thread: the pairs with earlier keyframes that hold
    add_keyframe      what overlays had is taken out; the first map is made, or the keyframe is
                      registered and its surroundings are refined, misplaced keyframes are taken
                      out, waiting ones are tried again; what fits nowhere grows as a map beside
                      it; cameras that zoom or are crops change, and the map with them; small maps
                      are adjusted, copies of larger ones are handed out as jobs, and so are
                      searches of lenses that the map doubts

`add_frame` poses the frames between keyframes, and `finish` registers what is left, rescues what is
missing and adjusts everything. One thread makes a mapper and calls it; what it returns is frozen or
a private copy. (The loop is that of incremental structure from motion: Snavely et al., SIGGRAPH
2006; Schönberger and Frahm, CVPR 2016.)
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pycolmap

from engine.config import Config
from engine.events import (
    EarlyMapMade,
    MapInitialized,
    MisplacementFound,
    Warned,
    WeakPairsMatched,
)
from engine.mapping.ahead_posing import PosingReference
from engine.mapping.assembly import assemble, empty_map
from engine.mapping.camera_changes.lens_change import LensChange
from engine.mapping.cameras.cameras import (
    CameraChange,
)
from engine.mapping.cameras.lens_search import LensFits
from engine.mapping.depth_problems import DenseHandout, hand_out
from engine.mapping.jobs import FinishedJob, JobKind, MapJob, run_here
from engine.mapping.maps.components import MAIN
from engine.mapping.maps.restarts import BuiltMap
from engine.mapping.maps.separate_maps import MIN_SEPARATE, build_separate_maps
from engine.mapping.model.bundle_adjustment import (
    GlobalAdjuster,
    GlobalAdjustment,
    merge_global_adjustment,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.model.whole_adjustment import adjust_until_settled, adjust_whole
from engine.mapping.places.misplacement import Repair
from engine.mapping.positions.georeferencing import FixAt, no_fix
from engine.mapping.restoring import EventGate, Restoring, present_facts, taken_facts
from engine.mapping.steps import (
    KeyframeRecord,
    KeyframeToMatch,
    MapFigures,
    MappingStep,
    MapSnapshot,
)
from engine.mapping.stored_state import Fact, StoredCalibration, StoredModel, StoredRun
from engine.mapping.verdict.map_evidence import Beside
from engine.mapping.verdict.patch_evidence import beyond_patches
from engine.mapping.windows.window_merging import WindowMerge
from engine.matching.overlays import OverlayMask
from engine.matching.pair_matching import MatchedKeyframe, PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.matching.second_matching import SecondMatches, SecondMatching
from engine.ports import EventSink, WindowSolver
from engine.types import (
    Contradiction,
    Float64Array,
    FrameId,
    FramePose,
    ImagePair,
    Keyframe,
    MapCounts,
    MapView,
    TrackedFrame,
    VerifiedPair,
)
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window as solve

_NUM_MAPS = "num maps"  # the fact's name
_BENT_SHARE = 0.1  # of a map's observations that overlays had: it is built anew
_KEPT_RATIO = 0.5  # of the keyframes of a bent map that the new one needs at least
_MAX_LOOP_CORRECTIONS = 2  # at the end: pairs that the first refutes hide others
_MAX_INSTEAD = 50  # pairs whose other matches are kept, the latest
_MAX_REPAIRS = 5  # misplacements at the end that are tried to put right


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
        second: matches pairs of weak keyframes besides; None: nothing does.
        adjust: adjusts maps beside the growing one; None: the engine does.
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
        second: SecondMatching | None = None,
        adjust: GlobalAdjuster | None = None,
    ) -> None:
        self._config = config
        self._graph = graph
        self._second = second
        self._matching = matching
        self._emit = EventGate(emit)
        self._map = empty_map(config)
        self._parts = parts = assemble(
            config,
            graph=graph,
            matching=matching,
            camera_of=self._camera,
            emit=self._emit,
            solve_window=solve_window or functools.partial(solve, config=WindowSolverConfig()),
            fix_at=fix_at,
            adjust=adjust,
        )
        # Pairs that maps may use.
        self._agreement = parts.agreement
        self._evidence = parts.evidence
        self._overlays = parts.overlays
        # Maps, and keyframes in them.
        self._growth, self._final_growth = parts.growth, parts.final_growth
        self._builder = parts.builder
        self._early = parts.early  # until the map starts
        self._components = parts.components
        self._registering = parts.registering
        self._turning = parts.turning
        self._misplacements = parts.misplacements
        self._loops = parts.loops
        self._windows = parts.windows
        self._jobs = parts.jobs
        # Cameras.
        self._cameras = parts.cameras
        self._calibrate_from_pairs = parts.calibrate
        self._splits = parts.splits
        self._crops = parts.crops
        self._lenses = parts.lenses
        self._lens_changes = parts.lens_changes
        # What leaves the mapper.
        self._poser = parts.poser
        self._georeferencing = parts.georeferencing
        self._metric_unit = parts.metric_unit
        self._keyframe_reports = parts.keyframe_reports
        self._pose_reports = parts.pose_reports
        self._journal = parts.journal
        self._products = parts.products
        self._verdicts = parts.verdicts

        self._instead: dict[ImagePair, VerifiedPair] = {}  # other matches of weak pairs
        self._num_maps = 0  # adopted so far, each fuller than the one before
        self._contradictions: tuple[Contradiction, ...] = ()  # of pairs to the final map
        self._version = 0  # of the map, for viewers
        self._begun_s = 0.0  # monotonic, when the newest keyframe came

    # -- a run that goes on ---------------------------------------------------------------------

    def restore(
        self, stored: StoredRun, models: Sequence[StoredModel] = (), *, wants_view: bool = False
    ) -> MappingStep:
        """Goes on where a run before stopped, as if it had not; before the first keyframe.

        Nothing is described or matched. Keyframes that came after the models were written are
        registered with their stored pairs, as they were when they came; without models the whole
        map is built anew from them. What the run before has emitted is not emitted again.

        Args:
            stored: what is known of the run.
            models: of its latest snapshot, the main map first.
            wants_view: whether viewers want to see the map.
        """
        restoring = Restoring(
            stored,
            parts=self._parts,
            graph=self._graph,
            matching=self._matching,
            new_map=functools.partial(empty_map, self._config),
        )
        running: dict[JobKind, MapJob] = {}
        with self._emit.closed():
            for again in restoring.begin(self._map, models):
                due = [job for job in self._jobs.due if running.get(job.kind) is job]
                self._merge([run_here(job) for job in due])
                restoring.take(again.keyframe, self._map)
                frame_id = again.keyframe.frame_id
                self._map_keyframe(
                    self._matching.restore_matches(frame_id, again.pairs, again.tried)
                )
                running.update((job.kind, job) for job in self._start_jobs())
            restoring.end(self._map)
        facts: Mapping[str, Any] = stored.facts
        self._num_maps = max(self._num_maps, facts.get(_NUM_MAPS, 0))
        self._report_changes()
        self._verdicts.watch(self._map, self._evidence_beside)  # views are shown no better one
        jobs = tuple(job for job in running.values() if self._jobs.is_in_flight(job))
        return self._step(jobs=jobs, wants_view=wants_view)

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
        self._georeferencing.add_keyframe(keyframe)
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

    def _posing_references(self) -> tuple[PosingReference, ...]:
        """The newest keyframes that a map holds of each camera in use, copied."""
        references = []
        for camera_key, frame_id in self._pose_reports.latest_keyframes:
            number, sparse_map = self._components.holding(self._map, frame_id) or (
                MAIN,
                self._shown_map,
            )
            if not sparse_map.is_registered(frame_id):
                continue
            rows, points = self._poser.points(frame_id, sparse_map)
            calibration_key = sparse_map.keyframe(frame_id).calibration_key
            references.append(
                PosingReference(
                    keyframe_id=frame_id,
                    camera_key=camera_key,
                    camera=copy.deepcopy(sparse_map.camera(calibration_key)),
                    cam_from_world=sparse_map.cam_from_world(frame_id).copy(),
                    row_of_keypoint=rows,
                    points3D_in_world=points,
                    map_number=number,
                    world_number=self._components.world_number(number),
                )
            )
        return tuple(references)

    def add_keyframe(
        self, matched: MatchedKeyframe, *, wants_view: bool = False, wants_references: bool = False
    ) -> MappingStep:
        """Adds the keyframe that was matched to the map and registers it, or starts a map.

        A keyframe whose matching failed is added with the pairs that held before, and registered
        when others bring it in.

        Args:
            matched: what matching the keyframe that began last gave.
            wants_view: whether viewers want to see the map.
            wants_references: whether frames may have to be posed while the next one is added.
        """
        self._map_keyframe(matched)
        record, jobs = self._record(matched.frame_id), self._start_jobs()
        self._verdicts.watch(self._map, self._evidence_beside)
        step = self._step(record=record, jobs=jobs, wants_view=wants_view)
        return replace(step, references=self._posing_references()) if wants_references else step

    def _map_keyframe(self, matched: MatchedKeyframe) -> None:
        """Brings a keyframe that was matched into the map, and what follows from it."""
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
            if not (self._is_initialized or self._turning.is_all):
                self._add_early(frame_id)
            self._split_cameras()
            self._report_changes()
        elif self._map.is_registered(frame_id):
            self._report_changes()  # a map built anew holds it already
        else:
            self._calibrate_from_pairs(self._map)
            if not self._components.claim(self._map, frame_id) and self._registering.register(
                self._map, frame_id, begun_s=self._begun_s
            ):
                self._settle(frame_id)
            self._take_lead(self._components.add_keyframe(self._map, frame_id))
            self._pose_strictly()
            self._split_cameras()
            self._report_changes()

    def rebuild(
        self, frame_id: FrameId | None = None, *, without_its_pairs: bool = False
    ) -> MappingStep:
        """Builds the map anew from the scene graph, after a call raised and left it half changed.

        Keyframes, pairs and keypoint tables are those of the graph; cameras begin as before any
        map. Jobs in flight and maps apart are dropped: what the map does not take starts them
        again.

        Args:
            frame_id: the newest keyframe, which `add_keyframe` did not add whole.
            without_its_pairs: leaves its pairs out of all maps, as one of them may be what raises.

        Returns:
            The step that `add_keyframe` owed, with the record of that keyframe.
        """
        self._start_over()
        self._jobs.abandon_matching()  # nobody waits for it any more
        if frame_id is not None and without_its_pairs:
            self._builder.distrust(one.pair for one in self._graph.verified_pairs(frame_id))
        self._replace_map(self._builder.first(self._map, self._graph.edges()))
        if self._is_initialized:
            self._registering.register_all(self._map, config=self._growth)
            self._adjust()
        self._report_changes()
        record = None if frame_id is None else self._record(frame_id)
        return self._step(record=record, wants_view=False)

    def _add_early(self, frame_id: FrameId) -> None:
        """Adds a keyframe to the early map, or makes that, while the map cannot start."""
        has_former = self._early.sparse_map is not None
        built = self._early.add_keyframe(self._map, frame_id)
        if built is None:
            return
        if has_former:
            if not built.is_placed:
                self._components.begin_world()
            self._poser.pose_anew(built.sparse_map)
        self._emit(
            EarlyMapMade(
                first=built.pair.first,
                second=built.pair.second,
                num_registered=built.sparse_map.num_registered,
                num_points3D=built.sparse_map.num_points3D,
            )
        )

    def _replace_early(self, sparse_map: SparseMap) -> bool:
        """Places a map that starts onto the early one, or begins a world; returns if there was one.

        The early one is dropped.
        """
        early = self._early.sparse_map
        if early is None or not sparse_map.num_registered:
            return False
        is_placed = self._builder.place(sparse_map, onto=early)
        if not (is_placed and self._metric_unit.is_metric(sparse_map)):
            self._components.begin_world()
        self._early.clear()
        return True

    def _drop_early(self) -> None:
        """Drops the early map, by which poses were reported: what comes lies otherwise."""
        if self._early.sparse_map is not None:
            self._early.clear()
            self._components.begin_world()

    def _settle(self, frame_id: FrameId) -> None:
        """What follows where the newest keyframe found its place: others find theirs by it."""
        self._repair_misplaced(frame_id)
        self._registering.retry_waiting(self._map)
        self._loops.watch(self._map, frame_id)
        self._correct_loops()
        self._loops.report(self._map)

    def _require_agreement(self) -> None:
        """Builds the map anew from agreed pairs, since the run shows that many pairs are wrong."""
        self._agreement.require()
        self._warn(
            f"{self._evidence.num_wrong} pairs contradict the map, and no third image confirms"
            " them: the map is built anew, and from now on only from pairs that one confirms"
        )
        self._build_anew(self._graph.edges(), because="many of its pairs are wrong")

    def _leave_out_overlays(self, matched: MatchedKeyframe) -> bool:
        """Takes what is not in the world out of the map, and adjusts what remains.

        Returns:
            Whether so much was taken out that the map may be bent; then it is not adjusted.
        """
        self._overlays.report(matched.overlays)
        if not matched.has_lost_matches:
            return False
        self._drop_early()
        had_map = self._is_initialized
        self._journal.add_pairs(matched.changed_pairs, matched.lost_pairs)
        self._jobs.abandon_search()  # its pairs are as they were
        agreed = self._agreement.test_again(one.pair for one in matched.changed_pairs)
        share = self._overlays.take_out(matched, self._map, components=self._components)
        self._let_in(agreed)
        if not self._is_initialized:
            if had_map:
                self._components.begin_world()
            return False
        self._jobs.abandon()  # their copies hold what was taken out
        self._overlays.take_out_adrift(self._map)
        if not self._is_initialized:
            self._take_lead(self._components.lead(self._map, is_final=True))
        if not self._is_initialized:
            self._components.begin_world()
        if share > _BENT_SHARE:
            return True
        self._adjust()
        return False

    def _build_anew(self, newest: Sequence[VerifiedPair], *, because: str) -> None:
        """Builds a map from the pairs as they are now, in place of one that others bent.

        Args:
            newest: pairs of the newest keyframe.
            because: what is wrong with the map, if it has to stay.
        """
        bent, distrusted = self._map, self._builder.distrusted
        self._map = self._builder.start_over()
        built = self._builder.first(self._map, newest)
        num_needed = _KEPT_RATIO * bent.num_registered
        if built is None or built.sparse_map.num_registered < num_needed:
            if bent.num_registered:
                self._map = bent
                self._builder.distrust(distrusted)  # they misled this very map
                self._warn(
                    f"the map of {bent.num_registered} keyframes may be bent, since {because};"
                    " no other one holds half as many"
                )
            return
        self._components.clear()
        self._components.begin_world()
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
        self._replace_tables(matched, but=matched.frame_id)
        self._keyframe_reports.report_pairs([*matched.pairs, *matched.found_pairs])
        self._keyframe_reports.report_rejected(
            matched.frame_id,
            num_pairs=len(matched.tried_pairs),
            num_given_up_early=matched.num_given_up_early,
        )
        self._journal.add_pairs(matched.found_pairs)
        self._journal.add_tried(matched.tried_pairs)
        keyframe = self._graph.keyframe(matched.frame_id)
        calibration_key = self._splits.calibration_key(self._map, keyframe, matched.pairs)
        self._graph.set_calibration_key(keyframe.frame_id, calibration_key)
        if self._agreement.is_asked_for:
            self._calibrate_from_pairs(self._map)
        agreed = self._agreement.add_pairs(keyframe.frame_id)
        usable = self._agreement.usable(matched.pairs)
        self._map.add_keyframe(self._graph.keyframe(keyframe.frame_id), usable)
        late = self._let_in_found(matched.found_pairs, agreed)
        late += self._take_instead(matched.other_matches)
        self._report_loop([*usable, *late])
        self._jobs.count_keyframe()
        return replace(matched, pairs=(*usable, *late))

    def _replace_tables(self, matched: MatchedKeyframe, *, but: FrameId | None = None) -> None:
        """Replaces the keypoint tables that matching changed in all maps; one may not be there."""
        for features in matched.changed_features:
            if features.frame_id != but:
                self._journal.add_table(features)
                self._map.replace_features(features)
                self._components.replace_features(features)

    def _take_instead(self, others: Sequence[VerifiedPair]) -> list[VerifiedPair]:
        """Gives weak pairs the matches of a second matcher that third views confirm by now.

        Returns:
            Those that have others now.
        """
        self._instead.update((one.pair, one) for one in others)
        while len(self._instead) > _MAX_INSTEAD:
            del self._instead[next(iter(self._instead))]
        if not self._instead:
            return []
        taken = self._agreement.take_instead(list(self._instead.values()))
        for one in taken:
            del self._instead[one.pair]
        if taken:
            self._keyframe_reports.report_pairs(taken)
            self._journal.add_pairs(taken)
            none = dict.fromkeys(self._graph.keyframe_ids, np.zeros(0, np.int64))
            self._map.replace_pairs(taken, (), covered_rows={})
            self._components.leave_out(taken, (), covered_rows=none)
        return taken

    def _let_in_found(
        self, found: Sequence[VerifiedPair], agreed: Sequence[VerifiedPair] = ()
    ) -> list[VerifiedPair]:
        """Adds pairs of earlier keyframes to all maps, and others that they confirm or are agreed.

        Returns:
            Those that the map did not use before.
        """
        ids = sorted({i for one in found for i in (one.pair.first, one.pair.second)})
        confirmed = [one for frame_id in ids for one in self._agreement.add_pairs(frame_id)]
        return self._let_in([*self._agreement.usable(found), *agreed, *confirmed])

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
            self._jobs.hasten_adjustment()
            self._loops.add_loop(loop)

    def _repair_misplaced(self, frame_id: FrameId) -> None:
        """Puts keyframes right that pairs of one keyframe show to be misplaced."""
        num_put_off = self._misplacements.num_put_off
        repair = self._misplacements.repair(
            self._map,
            [frame_id],
            config=self._growth,
            exclude=self._components.established_ids,
        )
        if repair is not None:
            self._take_repair(repair)
        elif num_put_off == 0 < self._misplacements.num_put_off:
            self._warn(
                "pairs contradict the places of keyframes in a large map: it is repaired when it"
                " has grown by a tenth since the last time, and at the end"
            )

    def _take_repair(self, repair: Repair) -> None:
        """Makes a map in which misplaced keyframes have other places the map."""
        self._set_map(repair.sparse_map)
        misplacement = repair.misplacement
        self._builder.distrust(misplacement.misleading)
        self._jobs.abandon()  # they hold the keyframes in the wrong place
        self._emit(
            MisplacementFound(
                keyframe_ids=misplacement.keyframe_ids,
                evidence_first=misplacement.evidence.first,
                evidence_second=misplacement.evidence.second,
            )
        )

    def _pose_strictly(self, *, again: bool = False) -> None:
        if self._agreement.is_required:
            self._registering.pose_strictly(self._map, again=again)

    def _grow_without_wrong_pairs(self) -> None:
        """Builds the map anew and grows it, when what it holds by now shows many wrong pairs."""
        if self._evidence.examine(self._map):
            self._require_agreement()
            self._registering.register_all(self._map, config=self._growth)

    def _replace_map(self, built: BuiltMap | None) -> None:
        """Makes a built map the map when it holds more keyframes."""
        if built is None or built.sparse_map.num_registered <= self._map.num_registered:
            return
        if self._is_initialized and not built.is_placed:
            self._components.begin_world()
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
        """Makes a map that was built otherwise the main one, also in place of an early one."""
        is_in_place_of_early = self._replace_early(sparse_map)
        self._set_map(sparse_map)
        self._misplacements.forget()
        self._metric_unit.update(self._map)
        if is_in_place_of_early:
            self._poser.pose_anew(self._map)
        self._jobs.abandon()
        self._jobs.set_adjusted(self._map.num_registered)

    def _set_map(
        self, sparse_map: SparseMap, *, changed: Collection[FrameId] | None = None
    ) -> None:
        """Makes another map the main one; components and scene graph follow.

        Jobs in flight hold copies of the former one: whoever moved its keyframes abandons them.

        Args:
            sparse_map: the map.
            changed: keyframes that have other places or neighbours in it; by default all.
        """
        self._map = sparse_map
        self._components.release(sparse_map)
        asked = sparse_map.keyframe_ids if changed is None else changed
        self._registering.update_graph(sparse_map, asked)

    def _start_over(self) -> None:
        """Makes a map of all keyframes, none registered, the only one."""
        self._early.clear()
        self._components.clear()
        self._components.begin_world()
        for frame_id in self._graph.keyframe_ids:
            self._graph.set_registered(frame_id, False)
        self._map = self._builder.start_over()
        self._misplacements.forget()
        self._jobs.abandon()
        self._jobs.abandon_search()
        self._jobs.set_adjusted(0)

    def _take_lead(self, sparse_map: SparseMap) -> None:
        """Makes the map that components lead to the main one, if it is another one now."""
        if sparse_map is not self._map:
            self._adopt(sparse_map)
            self._georeferencing.update(self._map)  # it lies elsewhere than the former one
            self._jobs.hasten_adjustment()  # large maps that were joined are not adjusted

    def _correct_loops(self, *, is_final: bool = False) -> None:
        """Makes a map that agrees with pairs which contradicted it the map."""
        corrected = self._loops.correct(self._map, is_final=is_final)
        if corrected is None:
            return
        self._set_map(corrected)
        self._jobs.abandon()  # they hold the map as it was
        self._jobs.set_adjusted(self._map.num_registered)
        self._registering.retry_waiting(self._map)

    def _discard_turning(self, *, is_final: bool = False) -> None:
        """Takes back a map that a camera turning without moving explains."""
        if not self._is_initialized or not self._turning.explains(self._map, is_final=is_final):
            return
        self._warn(
            f"the map of {self._map.num_registered} keyframes is none: the camera turns without"
            " moving, and turns show no depth"
        )
        self._start_over()

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
            self._set_map(self._crops.refined(self._map), changed=())

    def _replace_cameras(self, change: CameraChange, sparse_map: SparseMap) -> None:
        """Makes a map built with changed cameras the map, whatever it holds."""
        self._jobs.abandon_search()  # it may be of keyframes that have another camera now
        self._cameras.adopt(change)
        for frame_id, calibration_key in change.calibration_keys.items():
            self._graph.set_calibration_key(frame_id, calibration_key)
            self._journal.add_camera(frame_id, sparse_map.camera(calibration_key))
        self._adopt(sparse_map)
        self._components.change_cameras(sparse_map, change)

    def _recognise_lenses(self) -> None:
        """Searches all lenses that the map doubts on this thread; at the end of a run.

        A search that raises has found nothing.
        """
        while (search := self._lens_search()) is not None:
            found = run_here(MapJob(kind=JobKind.LENS_SEARCH, run=search)).result
            self._take_lens(found if isinstance(found, LensFits) else LensFits())

    def _lens_search(self) -> Callable[[], LensFits] | None:
        """The search of a lens that the map doubts, if there is one."""
        if self._turning.is_all:
            return None  # turns fit many lenses
        camera_key = self._lenses.doubted(self._map)
        return None if camera_key is None else self._lenses.search(self._map, camera_key)

    def _take_lens(self, found: LensFits) -> None:
        """Builds the map anew with the lens that a search found, if it shows another one."""
        lens = self._lenses.conclude(self._map, found)
        if (
            lens is None
            or self._turning.is_all
            or self._turning.explains(self._map, poses=lens.poses)
        ):
            return
        change = self._lens_changes.change(self._map, lens)
        if change is not None:
            self._change_lens(change)
            self._report_changes()

    def _change_lens(self, lens: LensChange) -> None:
        """Makes a map by a recognised lens the map."""
        self._num_maps += 1
        self._replace_cameras(lens.change, lens.sparse_map)
        for frame_id in self._graph.keyframe_ids:
            if self._graph.keyframe(frame_id).calibration_key == lens.camera_key:
                self._journal.add_camera(frame_id, lens.sparse_map.camera(lens.camera_key))
        self._emit(lens.event)

    # -- a frame between keyframes --------------------------------------------------------------

    def add_frame(
        self,
        tracked: TrackedFrame,
        *,
        fallback: TrackedFrame | None = None,
        wants_view: bool = False,
        reported: FramePose | None = None,
    ) -> MappingStep:
        """Poses a frame between keyframes, at once or when its keyframe is registered.

        Args:
            tracked: the frame as tracked from its keyframe.
            fallback: the same as tracked from the keyframe before, for a first pose while the map
                does not hold the newer one.
            wants_view: whether viewers want to see the map; not while a keyframe is matched.
            reported: its first pose, where it has one already and that was reported.
        """
        has_keyframe = self._pose_reports.has_keyframe
        if fallback is not None and not has_keyframe(tracked.keyframe_id):
            tracked, fallback = fallback, None  # its keyframe was left out
        self._pose_reports.add_frame(tracked)
        if reported is not None:
            self._pose_reports.add_reported(reported)
        number, sparse_map = self._map_for(tracked, fallback)
        pose = self._poser.add_tracked(
            tracked, sparse_map if sparse_map.num_registered else None, fallback=fallback
        )
        if pose is not None:
            world_number = self._components.world_number(number)
            self._pose_reports.report_tracked(
                [(tracked, pose)], map_number=number, world_number=world_number
            )
        return self._step(wants_view=wants_view, is_of_frame=True)

    def _map_for(
        self, tracked: TrackedFrame, fallback: TrackedFrame | None
    ) -> tuple[int, SparseMap]:
        """The map with a frame's keyframe, else with that of its fallback, and its number."""
        for one in (tracked, fallback):
            if one is not None:
                holding = self._components.holding(self._map, one.keyframe_id)
                if holding is not None:
                    return holding
        return MAIN, self._shown_map

    # -- background jobs ------------------------------------------------------------------------

    def _start_jobs(self) -> tuple[MapJob, ...]:
        jobs = [self._start_second(), self._start_search()]
        if self._is_initialized:
            jobs += [self._start_adjustment(), self._jobs.start_window(self._map)]
        return tuple(job for job in jobs if job is not None)

    def _start_search(self) -> MapJob | None:
        """A job that searches a lens that the map doubts, if there is one and none runs."""
        search = None if self._jobs.is_searching else self._lens_search()
        return None if search is None else self._jobs.start_search(search)

    def _start_adjustment(self) -> MapJob | None:
        """A job for a copy of a map that is due; a small main map is adjusted here instead."""
        if self._jobs.is_adjusting:
            return None
        if not self._jobs.take_due_adjustment(self._map):
            component = self._components.due_for_adjustment()
            if component is None:
                return None
            return self._jobs.start_adjustment(component, is_component=True)
        if not self._jobs.is_small(self._map):
            return self._jobs.start_adjustment(self._map)
        self._adjust()
        self._report_changes()
        return None

    def _merge(self, finished: Sequence[FinishedJob]) -> None:
        """Brings results of jobs into the map; those that were abandoned are dropped."""
        for one in finished:
            result = self._jobs.take_result(one)
            if isinstance(result, GlobalAdjustment):
                adjusted = self._jobs.adjusted_map(self._map)
                if adjusted in (self._map, *self._components.maps):  # not joined meanwhile
                    self._emit(merge_global_adjustment(adjusted, result))
                self._report_changes()
            elif isinstance(result, SecondMatches):
                self._matching.add_second(result.matches)
            elif isinstance(result, LensFits):
                self._take_lens(result)
            elif result is not None and self._take_over(self._windows.merge(self._map, result)):
                self._registering.retry_waiting(self._map)
                self._report_changes()

    def _take_over(self, merge: WindowMerge) -> bool:
        """Makes the map that a window made better the map, if there is one."""
        if merge.better_map is None:
            return False
        self._set_map(merge.better_map, changed=merge.registered)
        return True

    def _adjust(self) -> None:
        """Adjusts the whole map on this thread."""
        self._emit(adjust_whole(self._map, config=self._growth))

    # -- a second matcher -----------------------------------------------------------------------

    def _start_second(self, *, is_final: bool = False) -> MapJob | None:
        """A job that matches pairs of weak keyframes, when there are some and none runs."""
        if self._second is None or self._jobs.is_matching:
            return None
        choice = self._second.choose(is_final=is_final)
        if not choice.pairs:
            return None
        self._emit(
            WeakPairsMatched(
                matcher=self._second.name,
                num_pairs=len(choice.pairs),
                num_left_out=choice.num_left_out,
            )
        )
        requests = self._matching.second_requests(choice.pairs)
        return self._jobs.start_matching(functools.partial(self._second.match, requests))

    def match_last(self, finished: Sequence[FinishedJob]) -> MappingStep:
        """Takes what a second matcher found of keyframes so far; after the last one.

        Args:
            finished: all jobs that were in flight.

        Returns:
            A step with what the second matcher is to try next, if anything; then it is called
            again.
        """
        self._merge(finished)
        found = self._matching.verify_second()
        if self._graph.keyframe_ids:
            self._take_late(self._matching.found_late(self._graph.keyframe_ids[-1], found))
        job = self._start_second(is_final=True)
        return self._step(jobs=() if job is None else (job,), wants_view=False)

    def _take_late(self, matched: MatchedKeyframe) -> None:
        """Brings pairs that were found after the last keyframe into the map."""
        self._replace_tables(matched)
        self._keyframe_reports.report_pairs(matched.found_pairs)
        self._journal.add_pairs(matched.found_pairs)
        late = self._let_in_found(matched.found_pairs)
        late += self._take_instead(matched.other_matches)
        self._report_loop(late)
        if self._is_initialized:
            self._registering.retry_waiting(self._map)
        else:
            self._replace_map(self._builder.first(self._map, late))
        self._report_changes()

    # -- the end of a run -----------------------------------------------------------------------

    def finish(
        self,
        finished: Sequence[FinishedJob] = (),
        *,
        overload_at_s: Mapping[str, Float64Array] | None = None,
        wants_view: bool = False,
    ) -> MappingStep:
        """Registers what is left after the last frame, rescues what is missing, adjusts all.

        Args:
            finished: jobs to merge.
            overload_at_s: capture times of frames that were dropped because the engine was behind,
                by the source's prefix of its cameras' keys; None: of none.
            wants_view: whether the step holds what viewers show.
        """
        self._keyframe_reports.report_blank()
        self._merge(finished)
        self._jobs.abandon()  # merged after the last adjustment they would undo it
        self._discard_turning(is_final=True)
        if not self._is_initialized:
            self._replace_map(self._builder.first_at_end(self._map))
        self._split_cameras(is_final=True)
        if not self._is_initialized:
            self._recognise_lenses()
        if self._is_initialized:
            self._registering.register_all(self._map, config=self._growth)
            self._grow_without_wrong_pairs()
            self._recognise_lenses()
            self._correct_loops(is_final=True)
            self._take_lead(self._components.grow_finally(self._map))
            self._rescue_by_restarts()
            self._grow_without_wrong_pairs()
            self._registering.register_all(self._map, config=self._final_growth)
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
                self._repair_finally()
                self._correct_loops(is_final=True)
                self._adjust_finally()
                self._georeferencing.adjust(self._map)
            self._georeferencing.update(self._map, is_final=True)
            self._contradictions = beyond_patches(
                self._map,
                self._loops.contradictions(self._map, is_confirmed=self._agreement.is_agreed),
            )
        else:
            self._turning.conclude(self._map)
            self._drop_early()
        self._splits.report_missing(self._map)
        self._poser.pose_again(self._maps)
        self._report_changes(is_final=True)
        self._verdicts.judge(
            self._map, self._evidence_beside(is_final=True, overload_at_s=overload_at_s)
        )
        return self._step(wants_view=wants_view)

    def _evidence_beside(
        self, *, is_final: bool = False, overload_at_s: Mapping[str, Float64Array] | None = None
    ) -> Beside:
        """What the map does not know of itself, for its verdict."""
        return Beside(
            other_maps=self._components.maps,
            cameras=self._cameras.figures(self._map) if self._is_initialized else (),
            contradictions=self._contradictions if is_final else (),
            turning=self._turning.stretches,
            gaps=self._poser.gaps(self._maps, overload_at_s=overload_at_s) if is_final else (),
            placement=self._georeferencing.placement,
            gps_contradiction=self._georeferencing.contradiction,
            searches_lenses=self._config.cameras.recognise_lenses,
            confirms_pairs=self._config.agreement.mode != "off",
            is_agreed=self._agreement.is_agreed,
        )

    def _adopt_fullest(self) -> bool:
        """Makes the separate map that holds most keyframes the map, if it holds more than that."""
        former = self._map
        self._take_lead(self._components.lead(former, is_final=True))
        return self._map is not former

    def _adjust_finally(self) -> None:
        """Adjusts everything until it settles."""
        num_passes = self._config.global_bundle_adjustment.final_passes
        settings = self._final_growth
        for event in adjust_until_settled(self._map, config=settings, num_passes=num_passes):
            self._emit(event)

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
            self._registering.register_all(self._map, config=self._final_growth)

    def _repair_finally(self) -> None:
        """Puts misplaced keyframes right, as long as there are some."""
        repairs = self._misplacements.repair_all(
            self._map,
            config=self._final_growth,
            max_tries=_MAX_REPAIRS,
            exclude=self._components.established_ids,
        )
        for repair in repairs:
            self._take_repair(repair)

    def _improve_by_windows(self) -> None:
        """Solves the weakest parts of the map once more, as long as that makes it better."""
        tried: set[FrameId] = set()
        for _ in range(self._config.window.max_final):
            merge = self._windows.improve(self._map, tried=tried)
            if merge is None or not self._take_over(merge):
                return

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
        numbered = dict(self._components.numbered(self._map))
        maps = self._maps or [self._map]
        numbers = [next(n for n, one in numbered.items() if one is own) for own in maps]
        return self._products.snapshot(
            maps, numbers=numbers, counts=self._counts(), verdict=self._verdicts.verdict
        )

    def dense_handout(
        self,
        *,
        done: Collection[FrameId],
        again: Sequence[FrameId] = (),
        is_final: bool = False,
        wants_problem: bool = True,
        wants_new: bool = True,
        wants_poses: bool = False,
    ) -> DenseHandout:
        """What the dense map is made of next, see `hand_out`; at any time, also while matching."""
        return hand_out(
            self._map,
            done=done,
            again=again,
            is_final=is_final,
            wants_problem=wants_problem,
            wants_new=wants_new,
            wants_poses=wants_poses,
        )

    def view(self) -> MapView:
        """A frozen picture of the map and the scene graph, for viewers."""
        return self._products.view(self._shown_map, version=self._version)

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
            lost=self._components.lost_stretches(self._map),
        )

    def last_step(self, frame_id: FrameId) -> MappingStep:
        """The step of the newest keyframe where neither adding it nor building anew gave one."""
        return self._step(record=self._record(frame_id), wants_view=False)

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
        is_of_frame: bool = False,
    ) -> MappingStep:
        """What was done since the last step, and is to be kept.

        Args:
            record: of the keyframe that was added.
            jobs: to start.
            wants_view: whether viewers want to see the map.
            is_of_frame: whether only a frame was posed; another thread may have the graph then.
        """
        view = self.view() if wants_view and self._shown_map.num_registered else None
        facts: dict[str, Fact] = dict(self._poser.take_facts())
        calibrations: dict[str, StoredCalibration] = {}
        if not is_of_frame:
            present = {**present_facts(self._parts), _NUM_MAPS: self._num_maps}
            facts |= self._journal.changed_facts(present)
            facts |= taken_facts(self._parts, self._matching)
            calibrations = self._journal.changed_calibrations(self._cameras.initial, self._map)
        return MappingStep(
            record=record,
            recalibrated=self._journal.take_cameras(),
            changed_pairs=self._journal.take_pairs(),
            new_poses=self._pose_reports.take_new(),
            jobs=jobs,
            due=self._jobs.due,
            counts=self._counts(),
            view=view,
            tried=self._journal.take_tried(),
            calibrations=calibrations,
            relative_poses=self._poser.take_relative_poses(),
            facts=facts,
        )

    def _counts(self) -> MapCounts:
        return MapCounts(
            num_keyframes=self._pose_reports.num_keyframes,
            num_registered=self._map.num_registered,
            num_points3D=self._map.num_points3D,
            has_map=self._shown_map.num_registered > 0,
        )

    # -- reporting ------------------------------------------------------------------------------

    def _report_changes(self, *, is_final: bool = False) -> None:
        """Reports cameras, and poses that became known, after the map changed."""
        self._version += 1
        self._poser.forget_points()
        if not self._is_initialized:
            self._report_poses(MAIN, self._shown_map)
            return
        self._cameras.report(self._map, is_final=is_final)
        self._components.release(self._map)
        for number, sparse_map in self._components.numbered(self._map):
            self._report_poses(number, sparse_map)

    def _report_poses(self, number: int, sparse_map: SparseMap) -> None:
        """Reports keyframes that are new in a map, and frames that waited for them."""
        numbers = {"map_number": number, "world_number": self._components.world_number(number)}
        self._pose_reports.report_keyframes(sparse_map, **numbers)
        posed = self._poser.pose_pending(sparse_map)
        self._pose_reports.report_tracked(posed, **numbers)

    def _warn(self, message: str) -> None:
        self._emit(Warned(message=message))

    # -- small questions ------------------------------------------------------------------------

    @property
    def _is_initialized(self) -> bool:
        return self._map.num_registered > 0

    @property
    def _shown_map(self) -> SparseMap:
        """The map by which frames get poses: the early one until the run's map starts."""
        early = self._early.sparse_map
        return self._map if early is None or self._is_initialized else early

    def _camera(self, calibration_key: str) -> pycolmap.Camera:
        return self._map.camera(calibration_key)

    @property
    def _maps(self) -> list[SparseMap]:
        """The map, and those of what nothing joins to it; empty without a map."""
        return [self._map, *self._components.maps] if self._is_initialized else []
