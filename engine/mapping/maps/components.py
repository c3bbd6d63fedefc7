"""The maps of a run beside the main one: started where keyframes fit nowhere, grown, and joined.

A keyframe that the main map does not take is tried in the maps beside it. Where none takes it
either, and it makes a sound pair with others that wait, a map starts from the pair at once and
grows like the main one: a component. When pairs across two maps show how they lie to each other
(see ``map_merging``), the smaller one is moved into the larger one. The main map is the fullest: a
poor start loses to a component that becomes clearly fuller, and then joins it or is taken apart.

Every keyframe is in one map at most, and nothing is done while all of them find their place in the
main map. What is done for one keyframe is bounded: few starts, and joining is tried again only when
there is more to go by. (Several models at once, merged where they share points: Schönberger and
Frahm, CVPR 2016; the maps of a visual SLAM system: Campos et al., ORB-SLAM3, T-RO 2021.)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config import RegistrationConfig
from engine.estimators.lenses import camera_focal_px
from engine.events import (
    ComponentJoined,
    ComponentStarted,
    FrameRegistered,
    MainMapChanged,
    MisplacementFound,
)
from engine.mapping.cameras.cameras import CameraChange
from engine.mapping.maps.map_merging import MergedMap, find_similarity, merge_maps, take_apart
from engine.mapping.maps.restarts import MapBuilder
from engine.mapping.model.bundle_adjustment import GlobalAdjustmentSchedule
from engine.mapping.model.calibration_control import CalibrationState
from engine.mapping.model.growth import (
    GrowthConfig,
    adjust_in_place,
    grow_fully,
    register_and_refine,
)
from engine.mapping.model.sparse_map import Registration, SparseMap
from engine.mapping.places.misplacement import MisplacementRepair
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import (
    Features,
    FrameId,
    ImagePair,
    Int64Array,
    LostStretch,
    RegistrationStatus,
    VerifiedPair,
)

MAIN = 0  # the number of the main map
_MIN_KEYFRAMES = 3  # of a component
_MIN_ESTABLISHED = 5  # keyframes of a component that gives up none of them alone
_MAX_COMPONENTS = 8
_MAX_STARTED_FROM = 12  # newest waiting keyframes
_CLEARLY_FULLER = 1.25  # times the keyframes of the main map
_FULLER_BY = 3  # keyframes, at least
_MIN_PAIRS_ACROSS = 2  # between maps that are joined
_ENOUGH_PAIRS_ACROSS = 6  # with which further ones are not looked for
_ALIKE_LOG = 0.15  # of the factor between two focal lengths of one camera
_SURE_SIGMA_RATIO = 0.1  # of a focal length
_MORE_TO_JOIN = 1.25  # times the inliers across at the last try


@dataclass(slots=True, kw_only=True, eq=False)
class _Component:
    """A map beside the main one."""

    number: int
    world_number: int
    sparse_map: SparseMap
    schedule: GlobalAdjustmentSchedule
    misplacements: MisplacementRepair = field(default_factory=MisplacementRepair)
    tried: dict[int, int] = field(default_factory=dict)  # inliers across, by number of the other


class Components:
    """Owns the maps of a run beside the main one, and decides which of all is the main one.

    Calls that may change the main map get it and return it, or the one that takes its place.

    Args:
        is_growing: whether keyframes that fit nowhere start maps while the run goes on.
        registration: how many points a keyframe needs, and how many are tried again.
        growth: thresholds of growing while the run goes on.
        final_growth: thresholds of growing at its end.
        graph: holds all keyframes and pairs; is kept up to date with the components.
        builder: builds maps.
        emit: takes the events.
    """

    def __init__(
        self,
        *,
        is_growing: bool,
        registration: RegistrationConfig,
        growth: GrowthConfig,
        final_growth: GrowthConfig,
        graph: SceneGraph,
        builder: MapBuilder,
        emit: EventSink,
    ) -> None:
        self._is_growing = is_growing
        self._registration = registration
        self._growth = growth
        self._final_growth = final_growth
        self._graph = graph
        self._builder = builder
        self._emit = emit
        self._components: list[_Component] = []
        self._num_worlds = 1
        self._main_world = 0
        self._came_lost: dict[FrameId, None] = {}  # keyframes that the main map did not take
        self._to_look_for: list[FrameId] = []  # of them, not yet matched with further places
        self._num_looked_for = 0  # keyframes of components, in turn

    # -- what a run that goes on needs ------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Numbers, and keyframes that came without a place; the maps are in snapshots."""
        return {
            "num_worlds": self._num_worlds,
            "main_world": self._main_world,
            "worlds": {str(one.number): one.world_number for one in self._components},
            "came_lost": list(self._came_lost),
            "to_look_for": list(self._to_look_for),
            "num_looked_for": self._num_looked_for,
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with `facts`; what was tried to join maps is tried again."""
        self._num_worlds = max(self._num_worlds, facts["num_worlds"])
        self._main_world = facts["main_world"]
        for one in self._components:
            one.world_number = facts["worlds"].get(str(one.number), one.world_number)
        self._came_lost.update(dict.fromkeys(FrameId(i) for i in facts["came_lost"]))
        self._to_look_for = [FrameId(i) for i in facts["to_look_for"]]
        self._num_looked_for = facts["num_looked_for"]

    def restore_map(self, sparse_map: SparseMap, *, number: int) -> None:
        """Adds a map of a run that goes on, under its number, as one that is adjusted."""
        self._add(sparse_map, number=number, world_number=number)

    # -- what there is --------------------------------------------------------------------------

    @property
    def maps(self) -> list[SparseMap]:
        """The maps beside the main one, the fullest first."""
        return [one.sparse_map for one in self._fullest_first()]

    def numbered(self, main: SparseMap) -> Iterator[tuple[int, SparseMap]]:
        """All maps with their numbers, the main one first."""
        yield MAIN, main
        for one in self._components:
            yield one.number, one.sparse_map

    def world_number(self, number: int) -> int:
        """The number of a map's world, which the map keeps when another one leads; 0 is the first.

        Args:
            number: the map's.
        """
        return self._main_world if number == MAIN else self._numbered(number).world_number

    def begin_world(self) -> None:
        """Gives the main map a world of its own: it lies otherwise than the one before it."""
        self._main_world = self._num_worlds
        self._num_worlds += 1

    def holding(self, main: SparseMap, frame_id: FrameId) -> tuple[int, SparseMap] | None:
        """The number and the map in which a keyframe is registered; None: it has no place."""
        for number, sparse_map in self.numbered(main):
            if sparse_map.is_registered(frame_id):
                return number, sparse_map
        return None

    @property
    def established_ids(self) -> set[FrameId]:
        """Keyframes of components that are joined to other maps as a whole, or not at all."""
        return {
            frame_id
            for one in self._components
            if one.sparse_map.num_registered >= _MIN_ESTABLISHED
            for frame_id in one.sparse_map.registered_ids
        }

    def apart_ids(self, main: SparseMap, *, is_final: bool) -> set[FrameId]:
        """Keyframes that the main map need not hold, since they have their place in a component.

        At the end only those count whose cameras the images calibrate there, and as in the main
        map: others may be apart because their lens is another one.
        """
        if not is_final:
            return {i for one in self._components for i in one.sparse_map.registered_ids}
        alike: set[FrameId] = set()
        for one in self._components:
            keyframes = [one.sparse_map.keyframe(i) for i in one.sparse_map.registered_ids]
            keys = {
                key
                for key in {keyframe.calibration_key for keyframe in keyframes}
                if _is_sure(one.sparse_map.camera_state(key))
                and abs(math.log(_focal_px(one.sparse_map, key) / _focal_px(main, key)))
                <= _ALIKE_LOG
            }
            alike.update(k.frame_id for k in keyframes if k.calibration_key in keys)
        return alike

    def lost_stretches(self, main: SparseMap) -> tuple[LostStretch, ...]:
        """Successive keyframes of each camera that the main map did not take when they came."""
        by_camera: dict[str, list[FrameId]] = {}
        for frame_id in self._graph.keyframe_ids:
            by_camera.setdefault(self._graph.keyframe(frame_id).camera_key, []).append(frame_id)
        stretches = []
        for camera_key, frame_ids in by_camera.items():
            for first, last in _runs([i in self._came_lost for i in frame_ids]):
                before = self._graph.keyframe(frame_ids[max(first - 1, 0)])
                after = frame_ids[last + 1] if last + 1 < len(frame_ids) else None
                lost = tuple(frame_ids[first : last + 1])
                places = [self.holding(main, i) for i in lost]
                stretches.append(
                    LostStretch(
                        camera_key=camera_key,
                        frame_ids=lost,
                        begins_at_s=before.captured_at_s,
                        ends_at_s=after and self._graph.keyframe(after).captured_at_s,
                        num_missing=sum(place is None for place in places),
                        num_apart=sum(place is not None and place[0] != MAIN for place in places),
                    )
                )
        return tuple(stretches)

    # -- a keyframe -----------------------------------------------------------------------------

    def to_look_for(self) -> tuple[FrameId, ...]:
        """A keyframe without a place, else one of a component, to be matched with similar ones.

        Each keyframe without a place that no pair joins to a map, the newest first; then those of
        components that few pairs join to other maps, in turn.
        """
        waiting = [i for i in self._to_look_for if self._graph.map_number(i) is None]
        self._to_look_for = waiting[-_MAX_STARTED_FROM:]
        if self._to_look_for:
            return (self._to_look_for.pop(),)
        if not self._is_growing:
            return ()
        num_across: Counter[int] = Counter()
        for numbers, (num_pairs, _) in self._inliers_across().items():
            num_across.update(dict.fromkeys(numbers, num_pairs))
        apart = [
            frame_id
            for one in self._components
            if num_across[one.number] < _ENOUGH_PAIRS_ACROSS
            for frame_id in one.sparse_map.registered_ids
        ]
        if not apart:
            return ()
        self._num_looked_for += 1
        return (apart[self._num_looked_for % len(apart)],)

    def replace_features(self, features: Features) -> None:
        """Puts a keyframe's present keypoint table in place of a former one, where it is held."""
        for one in self._components:
            if one.sparse_map.holds(features.frame_id):
                one.sparse_map.replace_features(features)

    def add_pairs(self, pairs: Sequence[VerifiedPair]) -> None:
        """Adds pairs of earlier keyframes that were not known to hold until now."""
        for one in self._components:
            held = one.sparse_map.holds
            one.sparse_map.add_pairs(
                [
                    pair
                    for pair in pairs
                    if held(pair.pair.first)
                    and held(pair.pair.second)
                    and pair.pair.second not in one.sparse_map.neighbors(pair.pair.first)
                ]
            )

    def leave_out(
        self,
        changed: Sequence[VerifiedPair],
        lost: Collection[ImagePair],
        *,
        covered_rows: Mapping[FrameId, Int64Array],
    ) -> None:
        """Takes out of all components what overlays had; what holds too little any more is dropped.

        Args:
            changed: pairs that have other matches now.
            lost: pairs that do not hold any more.
            covered_rows: the keypoints under overlays, by keyframe.
        """
        for one in list(self._components):
            ids = one.sparse_map.registered_ids
            one.sparse_map.replace_pairs(
                changed,
                lost,
                covered_rows={i: covered_rows[i] for i in ids},
            )
            min_inliers = self._registration.min_inliers
            self._take_out(
                one,
                [
                    i
                    for i in ids
                    if np.count_nonzero(one.sparse_map.point3D_ids(i) >= 0) < min_inliers
                ],
            )

    def add_keyframe(self, main: SparseMap, frame_id: FrameId) -> SparseMap:
        """Finds a place for a keyframe that the main map did not take, and joins what can be.

        Args:
            main: holds the keyframe, registered or not.
            frame_id: the newest keyframe.
        """
        if not self._is_growing:
            return main
        if not main.is_registered(frame_id):
            self._came_lost[frame_id] = None
            number = (
                self._graph.map_number(frame_id)
                or self._register(main, frame_id)
                or self._start(main, frame_id)
            )
            if number is None and not self._has_pairs_with_maps(frame_id):
                self._to_look_for.append(frame_id)
        if not self._components:
            return main
        return self._settled(main, config=self._growth, is_final=False)

    def claim(self, main: SparseMap, frame_id: FrameId) -> bool:
        """Registers a new keyframe in a component before the main map tries it.

        That is done where its pairs lead there rather than to the main map: a single wrong pair
        with the main map must not draw it there.
        """
        if not self._components:
            return False
        inliers = self._inliers_by_map(frame_id)
        if inliers.most_common(1)[0][0] == MAIN:
            return False
        return self._register(main, frame_id) is not None

    def _has_pairs_with_maps(self, frame_id: FrameId) -> bool:
        return any(
            self._graph.map_number(i) is not None
            for pair in self._builder.pairs_of(frame_id)
            for i in (pair.pair.first, pair.pair.second)
        )

    def _inliers_by_map(self, frame_id: FrameId) -> Counter[int]:
        """Inliers of a keyframe's pairs with each map's keyframes; always has the main map."""
        inliers: Counter[int] = Counter({MAIN: 0})
        for pair in self._builder.pairs_of(frame_id):
            other = pair.pair.other(frame_id)
            number = self._graph.map_number(other)
            if number is not None:
                inliers[number] += pair.num_inliers
        return inliers

    def _register(self, main: SparseMap, frame_id: FrameId) -> int | None:
        """Registers a keyframe in the component that its pairs lead to; returns its number."""
        for number, _ in self._inliers_by_map(frame_id).most_common():
            if number == MAIN:
                continue
            one = self._numbered(number)
            self._builder.complete(one.sparse_map, like=main, frame_ids=[frame_id])
            if self._grow_by(one, frame_id, is_retry=False):
                self._refine(main, one, frame_id)
                return number
        return None

    def _refine(self, main: SparseMap, one: _Component, frame_id: FrameId) -> None:
        """What follows when a component grew: misplacement, keyframes that wait, adjustment."""
        self._repair_misplaced(one, frame_id)
        limit = self._registration.max_retries_per_keyframe
        elsewhere = {i for i in self._graph.keyframe_ids if self._graph.map_number(i) is not None}
        for waiting in self._graph.retry_candidates(
            limit, map_number=one.number, exclude=elsewhere | one.sparse_map.undecided_ids
        ):
            self._builder.complete(one.sparse_map, like=main, frame_ids=[waiting])
            self._grow_by(one, waiting, is_retry=True)
        settings = self._growth.global_bundle_adjustment
        num_registered = one.sparse_map.num_registered
        if num_registered <= settings.synchronous_until and one.schedule.should(num_registered):
            one.schedule.done(num_registered)
            adjust_in_place(one.sparse_map, config=self._growth)

    def _repair_misplaced(self, one: _Component, frame_id: FrameId) -> None:
        repair = one.misplacements.repair(
            one.sparse_map, [frame_id], config=self._growth, exclude=self._elsewhere(one)
        )
        if repair is None:
            return
        misplacement = repair.misplacement
        self._builder.distrust(misplacement.misleading)
        self._replace(one, repair.sparse_map)
        self._emit(
            MisplacementFound(
                keyframe_ids=misplacement.keyframe_ids,
                evidence_first=misplacement.evidence.first,
                evidence_second=misplacement.evidence.second,
            )
        )

    def _grow_by(self, one: _Component, frame_id: FrameId, *, is_retry: bool) -> bool:
        started_s = time.monotonic()
        registration = register_and_refine(one.sparse_map, frame_id, config=self._growth)
        if registration.status is not RegistrationStatus.REGISTERED:
            return False
        elapsed_s = time.monotonic() - started_s
        self._report(one, frame_id, registration, is_retry=is_retry, elapsed_s=elapsed_s)
        return True

    def _report(
        self,
        one: _Component,
        frame_id: FrameId,
        registration: Registration,
        *,
        is_retry: bool,
        elapsed_s: float,
    ) -> None:
        self._update_graph(one, frame_id)
        self._emit(
            FrameRegistered(
                frame_id=frame_id,
                num_inliers=registration.num_inliers,
                num_correspondences=registration.num_correspondences,
                num_registered=one.sparse_map.num_registered,
                num_points3D=one.sparse_map.num_points3D,
                is_retry=is_retry,
                elapsed_s=elapsed_s,
                map_number=one.number,
            )
        )

    def _start(self, main: SparseMap, frame_id: FrameId) -> int | None:
        """Starts a component from a keyframe's pairs with others that wait; returns its number."""
        if len(self._components) >= _MAX_COMPONENTS:
            return None
        waiting = self._waiting_with(frame_id)
        if len(waiting) < _MIN_KEYFRAMES:
            return None
        pairs = [
            pair
            for pair in self._builder.pairs_of(frame_id)
            if {pair.pair.first, pair.pair.second} <= waiting
        ]
        built = self._builder.component(main, waiting, pairs)
        if built is None or built.sparse_map.num_registered < _MIN_KEYFRAMES:
            return None
        one = self._added(built.sparse_map)
        self._emit(
            ComponentStarted(
                map_number=one.number,
                first=built.pair.first,
                second=built.pair.second,
                num_registered=built.sparse_map.num_registered,
                num_points3D=built.sparse_map.num_points3D,
            )
        )
        return one.number

    def _waiting_with(self, frame_id: FrameId) -> set[FrameId]:
        """The newest keyframes without a place that pairs among them join to a keyframe."""
        waiting = [i for i in self._graph.keyframe_ids if self._graph.map_number(i) is None]
        return self._joined_with({frame_id}, among=set(waiting[-_MAX_STARTED_FROM:]))

    def _joined_with(self, frame_ids: Collection[FrameId], *, among: set[FrameId]) -> set[FrameId]:
        """Keyframes that pairs join to some, over any number of those given."""
        joined, front = set(frame_ids), sorted(frame_ids)
        while front:
            pairs = self._builder.pairs_of(front.pop())
            ends = {i for pair in pairs for i in (pair.pair.first, pair.pair.second)}
            fresh = (ends & among) - joined
            joined |= fresh
            front += sorted(fresh)
        return joined

    # -- joining --------------------------------------------------------------------------------

    def _settled(self, main: SparseMap, *, config: GrowthConfig, is_final: bool) -> SparseMap:
        """Joins maps as long as some can be; the fullest becomes the main one."""
        self.release(main)
        main = self.lead(main, is_final=is_final)
        while (joined := self._join_once(main, config=config, is_final=is_final)) is not None:
            main = self.lead(joined, is_final=is_final)
        return main

    def _join_once(
        self, main: SparseMap, *, config: GrowthConfig, is_final: bool
    ) -> SparseMap | None:
        """Joins two maps; returns the main map then, None when there are no two to join."""
        across = self._inliers_across()
        for (number, onto_number), (num_pairs, num_inliers) in sorted(across.items()):
            one = self._numbered(number)
            onto = None if onto_number == MAIN else self._numbered(onto_number)
            tried = one.tried.get(onto_number, 0)
            if num_pairs < _MIN_PAIRS_ACROSS or num_inliers < max(1, _MORE_TO_JOIN * tried):
                continue
            one.tried[onto_number] = num_inliers
            joined = self._joined(
                main, one, onto, num_pairs=num_pairs, config=config, is_final=is_final
            )
            if joined is not None:
                return joined
        return None

    def _joined(
        self,
        main: SparseMap,
        one: _Component,
        onto: _Component | None,
        *,
        num_pairs: int,
        config: GrowthConfig,
        is_final: bool,
    ) -> SparseMap | None:
        """Moves the smaller of two maps into the larger one; None when they do not fit.

        A map that many pairs join to another one, and that does not fit it as a whole, is taken
        apart; so are small ones. Where it fits in two ways, both maps wait for more, and at the end
        each of its keyframes finds its own place, if it can.
        """
        if onto is not None and onto.sparse_map.num_registered < one.sparse_map.num_registered:
            one, onto = onto, one
        target = main if onto is None else onto.sparse_map
        moved_ids = one.sparse_map.registered_ids
        self._builder.complete(target, like=main, frame_ids=moved_ids)
        alignment = find_similarity(target, one.sparse_map, registration=self._registration)
        merged = None
        is_ambiguous = alignment is not None and alignment.is_ambiguous
        if is_ambiguous and not is_final:
            return None
        if alignment is not None:
            merged = merge_maps(
                target,
                one.sparse_map,
                alignment=alignment,
                registration=self._registration,
                config=config,
            )
        if merged is None and (is_ambiguous or num_pairs >= max(_MIN_ESTABLISHED, len(moved_ids))):
            merged = take_apart(target, one.sparse_map, config=config)
        if merged is None:
            return None
        self._leave(one, merged)
        self._emit(
            ComponentJoined(
                map_number=one.number,
                into_map_number=MAIN if onto is None else onto.number,
                keyframe_ids=merged.moved_ids,
                num_inliers=merged.num_inliers,
                num_registered=merged.sparse_map.num_registered,
            )
        )
        if onto is None:
            for frame_id in merged.moved_ids:
                self._graph.set_registered(frame_id, True)
            return merged.sparse_map
        onto.tried.clear()
        self._replace(onto, merged.sparse_map)
        return main

    def _leave(self, one: _Component, merged: MergedMap) -> None:
        """Takes keyframes out of a component that another map has now."""
        self._take_out(one, [i for i in merged.moved_ids if one.sparse_map.is_registered(i)])

    def _inliers_across(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Between components and other maps: numbers of pairs and of their inliers."""
        num_pairs: Counter[tuple[int, int]] = Counter()
        num_inliers: Counter[tuple[int, int]] = Counter()
        for one in self._components:
            for frame_id in one.sparse_map.registered_ids:
                for pair in self._builder.pairs_of(frame_id):
                    other = pair.pair.other(frame_id)
                    number = self._graph.map_number(other)
                    if number is not None and number < one.number:
                        num_pairs[one.number, number] += 1
                        num_inliers[one.number, number] += pair.num_inliers
        return {key: (num, num_inliers[key]) for key, num in num_pairs.items()}

    def lead(self, main: SparseMap, *, is_final: bool) -> SparseMap:
        """Makes the fullest component the main map when it is clearly fuller than that.

        Args:
            main: the main map, which is a component afterwards if it is not the fullest.
            is_final: whether a single keyframe more is enough.
        """
        if not self._components:
            return main
        fullest = self._fullest_first()[0]
        num_registered = fullest.sparse_map.num_registered
        enough = max(_CLEARLY_FULLER * main.num_registered, main.num_registered + _FULLER_BY)
        if num_registered < (main.num_registered + 1 if is_final else enough):
            return main
        self._emit(
            MainMapChanged(
                former_map_number=fullest.number,
                num_registered=num_registered,
                num_registered_in_former=main.num_registered,
            )
        )
        fullest.world_number, self._main_world = self._main_world, fullest.world_number
        new_main = fullest.sparse_map
        self._builder.complete(new_main, like=main)
        fullest.sparse_map = main
        fullest.schedule.done(main.num_registered)
        for one in self._components:
            one.tried.clear()
        self._update_graph_of_all(fullest)
        self._take_out(fullest, [])
        for frame_id in new_main.registered_ids:
            self._graph.set_registered(frame_id, True)
        return new_main

    # -- keeping up with the main map -----------------------------------------------------------

    def release(self, main: SparseMap) -> None:
        """Takes keyframes that the main map holds now out of all components."""
        for one in list(self._components):
            twice = [i for i in one.sparse_map.registered_ids if main.is_registered(i)]
            if twice:
                self._take_out(one, twice)

    def change_cameras(self, main: SparseMap, change: CameraChange) -> None:
        """Rebuilds components whose cameras become others, each where it stands.

        Args:
            main: has the changed cameras already.
            change: the cameras.
        """
        for one in list(self._components):
            keyframes = [one.sparse_map.keyframe(i) for i in one.sparse_map.registered_ids]
            if any(
                keyframe.frame_id in change.calibration_keys
                or keyframe.calibration_key in change.cameras
                for keyframe in keyframes
            ):
                self._builder.complete(one.sparse_map, like=main, frame_ids=())
                rebuilt = self._builder.rebuilt(one.sparse_map, change, is_whole=False)
                self._replace(one, rebuilt)

    def clear(self) -> None:
        """Drops all components."""
        for one in list(self._components):
            self._take_out(one, one.sparse_map.registered_ids)

    # -- adjustment -----------------------------------------------------------------------------

    def due_for_adjustment(self) -> SparseMap | None:
        """A component that grew enough to be adjusted on another thread, if there is one.

        It counts as adjusted from now on.
        """
        for one in self._components:
            num_registered = one.sparse_map.num_registered
            if one.schedule.should(num_registered):
                one.schedule.done(num_registered)
                return one.sparse_map
        return None

    # -- the end of a run -----------------------------------------------------------------------

    def grow_finally(self, main: SparseMap) -> SparseMap:
        """Registers in components what can be, with the thresholds of the end, and joins them.

        Small ones that nothing joins are dropped: their keyframes may fit alone, or together anew.
        """
        for one in list(self._components):
            waiting = [i for i in self._graph.keyframe_ids if self._graph.map_number(i) is None]
            self._builder.complete(one.sparse_map, like=main, frame_ids=waiting)
            started_s = time.monotonic()
            grown = grow_fully(
                one.sparse_map, config=self._final_growth, exclude=self._elsewhere(one)
            )
            each_s = (time.monotonic() - started_s) / max(1, len(grown))
            for frame_id, registration in grown.items():
                self._report(one, frame_id, registration, is_retry=True, elapsed_s=each_s)
            one.tried.clear()
        main = self._settled(main, config=self._final_growth, is_final=True)
        for one in list(self._components):
            if one.sparse_map.num_registered < _MIN_ESTABLISHED:
                self._take_out(one, one.sparse_map.registered_ids)
        return main

    def num_rebuilds_wanted(self, main: SparseMap) -> int:
        """How many whole maps are to be built from other starts at the end: one at most.

        One, where keyframes have no place in any map, or pairs join maps that did not fit.
        """
        held = {i for _, one in self.numbered(main) for i in one.registered_ids}
        is_missing = any(i not in held for i in self._graph.connected_ids)
        return int(is_missing or bool(self._inliers_across()))

    def finish(self, main: SparseMap, *, min_keyframes: int) -> None:
        """Adjusts the components once more; those of fewer keyframes are dropped.

        One that misses keyframes which its pairs lead to is built anew from all of them, and
        replaced where that holds more.
        """
        for one in list(self._components):
            self._build_anew(main, one)
            if one.sparse_map.num_registered < min_keyframes:
                self._take_out(one, one.sparse_map.registered_ids)
                continue
            one.sparse_map.retriangulate()
            adjust_in_place(one.sparse_map, config=self._final_growth)

    def _build_anew(self, main: SparseMap, one: _Component) -> None:
        held = set(one.sparse_map.registered_ids)
        waiting = {i for i in self._graph.keyframe_ids if self._graph.map_number(i) is None}
        around = self._joined_with(held, among=waiting | held)
        if around == held:
            return
        built = self._builder.separate(main, around)
        if built is None or built.sparse_map.num_registered <= len(held):
            return
        self._replace(one, built.sparse_map)

    def add_separate(self, sparse_maps: Sequence[SparseMap]) -> None:
        """Adds maps that were built at the end of what no map held."""
        for sparse_map in sparse_maps:
            self._added(sparse_map)

    # -- inside ---------------------------------------------------------------------------------

    def _added(self, sparse_map: SparseMap) -> _Component:
        number = self._num_worlds
        return self._add(sparse_map, number=number, world_number=number)

    def _add(self, sparse_map: SparseMap, *, number: int, world_number: int) -> _Component:
        one = _Component(
            number=number,
            world_number=world_number,
            sparse_map=sparse_map,
            schedule=GlobalAdjustmentSchedule(self._growth.global_bundle_adjustment),
        )
        self._num_worlds = max(self._num_worlds, number + 1)
        one.schedule.done(sparse_map.num_registered)
        self._components.append(one)
        self._update_graph_of_all(one)
        return one

    def _replace(self, one: _Component, sparse_map: SparseMap) -> None:
        """Makes a map that of a component, without the keyframes that other maps hold."""
        lost = [i for i in one.sparse_map.registered_ids if not sparse_map.is_registered(i)]
        elsewhere = [
            i
            for i in sparse_map.registered_ids
            if self._graph.map_number(i) not in (None, one.number)
        ]
        one.sparse_map = sparse_map
        self._take_out(one, elsewhere, lost=lost)
        if one in self._components:
            self._update_graph_of_all(one)

    def _take_out(
        self,
        one: _Component,
        frame_ids: Collection[FrameId],
        *,
        lost: Collection[FrameId] = (),
    ) -> None:
        """Takes keyframes out of a component, and drops it when it holds too few then."""
        one.sparse_map.deregister(frame_ids)
        remaining = one.sparse_map.registered_ids
        gone = {*frame_ids, *lost}
        if len(remaining) < _MIN_KEYFRAMES:
            gone |= set(remaining)
            self._components.remove(one)
        for frame_id in gone:
            if self._graph.map_number(frame_id) == one.number:
                self._graph.set_registered(frame_id, False)

    def _update_graph_of_all(self, one: _Component) -> None:
        one.sparse_map.count_covisibility()
        for frame_id in one.sparse_map.registered_ids:
            self._update_graph(one, frame_id)

    def _update_graph(self, one: _Component, frame_id: FrameId) -> None:
        if not one.sparse_map.is_registered(frame_id):
            self._graph.set_registered(frame_id, False)
            return
        self._graph.set_registered(frame_id, True, map_number=one.number)
        self._graph.set_covisibility(frame_id, one.sparse_map.covisibility(frame_id))

    def _elsewhere(self, one: _Component) -> set[FrameId]:
        """Keyframes that another map holds."""
        return {
            i
            for i in self._graph.keyframe_ids
            if self._graph.map_number(i) not in (None, one.number)
        }

    def _fullest_first(self) -> list[_Component]:
        return sorted(
            self._components,
            key=lambda one: (-one.sparse_map.num_registered, -one.sparse_map.num_points3D),
        )

    def _numbered(self, number: int) -> _Component:
        return next(one for one in self._components if one.number == number)


def _is_sure(state: CalibrationState | None) -> bool:
    """Whether observations alone tell a focal length well."""
    return state is not None and state.hold is None and state.focal_sigma_ratio <= _SURE_SIGMA_RATIO


def _focal_px(sparse_map: SparseMap, calibration_key: str) -> float:
    return camera_focal_px(sparse_map.camera(calibration_key))


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First and last index of each run of true values."""
    first = None
    for idx, flag in enumerate([*flags, False]):
        if flag and first is None:
            first = idx
        elif not flag and first is not None:
            yield first, idx - 1
            first = None
