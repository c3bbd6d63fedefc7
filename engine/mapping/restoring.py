"""A run that goes on: graph, tables and maps as they were, without describing or matching again.

Keyframes and verified pairs come from the journal, maps from the latest snapshot. Keyframes after
that are added to the map with their stored pairs, by the way that new ones go. Of the rest of what
a mapper knows,

=======================  ==========================================================================
read back (facts)        what only the past shows, and what keeps later decisions as they would be:
                         whether pairs must be agreed, and which are; cameras as they began, splits,
                         crops, lenses searched; overlays; stretches that turn; pairs that misled
                         maps; keyframes posed strictly, or that came without a place; open loops;
                         the origin of the georeference; grids and depths of dense tables; how many
                         weak pairs of photos failed; relative poses of frames, with their scales;
                         frames of which no pose was reported
read back (snapshot)     places and points; calibrations with what adjustments found out; where maps
                         lie in metres, so that they keep their own frame and unit
follows again            visual words, strengths and relative poses of pairs, counts of matches,
                         covisibility, observations, where the map lies on the globe, what is odd
                         about cameras, single pairs that turn: the same input gives the same
begins anew              results of background jobs in flight (copies of a map that is gone);
                         schedules of adjustments and windows, as if one had just ended; what was
                         tried to put misplaced keyframes right and to join maps, which costs one
                         more try of each; matches before verification, so that a lens found later
                         verifies only newer pairs again; which pairs are evidence of overlays, so
                         that one that is verified again counts again; frames that wait for their
                         keyframe, which are interpolated at most; the verdict, which is judged at
                         once where the map is large enough
=======================  ==========================================================================
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pycolmap

from engine.events import Event
from engine.mapping.assembly import MapperParts
from engine.mapping.cameras.cameras import InitialCamera
from engine.mapping.model.map_record import prior_of, state_of
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.stored_state import Fact, StoredModel, StoredRun
from engine.matching.pair_matching import PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import FrameId, ImagePair, Keyframe, VerifiedPair

_AGREED = "agreed/"  # before the id of a keyframe
_TURNING = "turning/"  # before the key of a camera


class EventGate:
    """Passes events on, unless it is closed.

    Args:
        emit: takes the events.
    """

    def __init__(self, emit: EventSink) -> None:
        self._emit = emit
        self._is_closed = False

    def __call__(self, event: Event) -> None:
        """Passes an event on."""
        if not self._is_closed:
            self._emit(event)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Drops events meanwhile: a run before has emitted what they say."""
        self._is_closed = True
        try:
            yield
        finally:
            self._is_closed = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframeAgain:
    """A keyframe of a run before, with what its matching gave."""

    keyframe: Keyframe
    pairs: tuple[VerifiedPair, ...]  # with keyframes before it
    tried: tuple[ImagePair, ...]  # with keyframes before it, verified or not


# -- facts ----------------------------------------------------------------------------------------


def present_facts(parts: MapperParts) -> dict[str, Fact]:
    """The small states of a mapper's parts by name; those that keyframes come to one by one."""
    turning = parts.turning.facts()
    return {
        "agreement": parts.agreement.facts(),
        "builder": parts.builder.facts(),
        "cameras": parts.cameras.facts(),
        "components": parts.components.facts(),
        "crops": parts.crops.facts(),
        "georeference": parts.georeferencing.facts(),
        "lenses": parts.lenses.facts(),
        "loops": parts.loops.facts(),
        "metric unit": parts.metric_unit.is_known,
        "overlays": parts.overlays.facts(),
        "pair evidence": parts.evidence.facts(),
        "splits": parts.splits.facts(),
        "strictly posed": parts.strict_posing.facts(),
        "without pose": parts.pose_reports.facts(),
        **{f"{_TURNING}{camera_key}": found for camera_key, found in turning.items()},
    }


def taken_facts(parts: MapperParts, matching: PairMatching) -> dict[str, Fact]:
    """Facts of single keyframes and cameras, as far as they changed since the last call."""
    agreed = parts.agreement.take_agreed()
    return {
        **{f"{_AGREED}{frame_id}": list(others) for frame_id, others in agreed.items()},
        **matching.take_facts(),
    }


def _restore_decisions(parts: MapperParts, facts: Mapping[str, Any]) -> None:
    """What the parts must know before maps and keyframes come."""
    restores: dict[str, Callable[[Any], None]] = {
        "builder": parts.builder.restore,
        "crops": parts.crops.restore,
        "georeference": parts.georeferencing.restore,
        "lenses": parts.lenses.restore,
        "overlays": parts.overlays.restore,
        "splits": parts.splits.restore,
        "strictly posed": parts.strict_posing.restore,
    }
    for name, restore in restores.items():
        if name in facts:
            restore(facts[name])
    parts.metric_unit.restore(is_known=bool(facts.get("metric unit", False)))
    parts.turning.restore(_of_kind(_TURNING, facts))


def _of_kind(prefix: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a kind, by what follows its name."""
    return {
        name.removeprefix(prefix): one for name, one in facts.items() if name.startswith(prefix)
    }


# -- restoring ------------------------------------------------------------------------------------


class Restoring:
    """Brings the parts of a mapper, which are new, to where those of a run before were.

    First `begin`; then the mapper adds the keyframes that it gives; then `end`.

    Args:
        stored: what is known of the run.
        parts: of the mapper.
        graph: without keyframes yet.
        matching: fills the graph.
        new_map: makes an empty map.
    """

    def __init__(
        self,
        stored: StoredRun,
        *,
        parts: MapperParts,
        graph: SceneGraph,
        matching: PairMatching,
        new_map: Callable[[], SparseMap],
    ) -> None:
        self._stored = stored
        self._facts: Mapping[str, Any] = stored.facts
        self._parts = parts
        self._graph = graph
        self._matching = matching
        self._new_map = new_map

    def begin(self, main: SparseMap, models: Sequence[StoredModel]) -> list[KeyframeAgain]:
        """Restores all up to the last keyframe that a model holds.

        Args:
            main: the main map, empty; becomes the first model, with all cameras.
            models: of the latest snapshot.

        Returns:
            The keyframes after it, in order.
        """
        parts, facts = self._parts, self._facts
        _restore_decisions(parts, facts)
        self._add_cameras(main, models)
        keyframes = self._in_order()
        num_held = self._num_held(keyframes, models)
        for one in keyframes[:num_held]:
            self.take(one.keyframe, main)
            self._matching.restore_matches(one.keyframe.frame_id, one.pairs, one.tried)
        agreed = [
            ImagePair(FrameId(first), FrameId(int(second)))
            for second, others in _of_kind(_AGREED, facts).items()
            for first in others
        ]
        if "agreement" in facts:
            parts.agreement.restore(facts["agreement"], agreed)
        self._restore_maps(main, models)
        if "pair evidence" in facts:
            parts.evidence.restore(facts["pair evidence"], main.registered_ids)
        parts.jobs.set_adjusted(main.num_registered)
        parts.windows.restore(num_held)
        return keyframes[num_held:]

    def take(self, keyframe: Keyframe, main: SparseMap) -> None:
        """Takes a keyframe in, without its pairs, and not yet into the map.

        Args:
            keyframe: the keyframe, with its table as it was last.
            main: the main map, which gets its camera if it is new.
        """
        parts = self._parts
        # Latencies count from here: the clock of the former part is not that of this process.
        keyframe = replace(keyframe, received_at_s=time.monotonic())
        parts.cameras.add(keyframe, main)
        self._matching.restore_keyframe(keyframe, self._facts)
        parts.poser.add_keyframe(keyframe)
        parts.pose_reports.add_keyframe(keyframe)
        parts.keyframe_reports.report_added(keyframe)

    def end(self, main: SparseMap) -> None:
        """Restores what belongs to all keyframes, once they are there."""
        parts, facts = self._parts, self._facts
        self._matching.restore(facts)
        parts.poser.restore(facts, self._stored.relative_poses)
        if "components" in facts:
            parts.components.restore(facts["components"])
        if "loops" in facts:
            parts.loops.restore(facts["loops"], self._graph)
        posed = [o.frame_id for o in self._stored.relative_poses if o.cam_from_keyframe is not None]
        places = {
            frame_id: number
            for number, sparse_map in parts.components.numbered(main)
            for frame_id in sparse_map.registered_ids
        }
        parts.pose_reports.restore(facts.get("without pose", ()), posed, places)
        parts.georeferencing.update(main)
        parts.cameras.report(main)

    # -- keyframes ------------------------------------------------------------------------------

    def _in_order(self) -> list[KeyframeAgain]:
        """All keyframes, each with its pairs with those before it."""
        order = {o.keyframe.frame_id: number for number, o in enumerate(self._stored.keyframes)}

        def later(pair: ImagePair) -> FrameId:
            return max(pair.first, pair.second, key=order.__getitem__)

        pairs: dict[FrameId, list[VerifiedPair]] = defaultdict(list)
        tried: dict[FrameId, list[ImagePair]] = defaultdict(list)
        for verified in self._stored.pairs:
            if verified.num_inliers and {verified.pair.first, verified.pair.second} <= order.keys():
                pairs[later(verified.pair)].append(verified)
        for pair in self._stored.tried:
            if {pair.first, pair.second} <= order.keys():
                tried[later(pair)].append(pair)
        return [
            KeyframeAgain(
                keyframe=one.keyframe,
                pairs=tuple(pairs[one.keyframe.frame_id]),
                tried=tuple(tried[one.keyframe.frame_id]),
            )
            for one in self._stored.keyframes
        ]

    @staticmethod
    def _num_held(keyframes: Sequence[KeyframeAgain], models: Sequence[StoredModel]) -> int:
        """Keyframes up to the last one that a model holds."""
        held = {int(i) for model in models for i in model.reconstruction.reg_image_ids()}
        numbers = [n for n, one in enumerate(keyframes, start=1) if one.keyframe.frame_id in held]
        return max(numbers, default=0)

    # -- cameras --------------------------------------------------------------------------------

    def _add_cameras(self, main: SparseMap, models: Sequence[StoredModel]) -> None:
        """Gives the main map all cameras, as its model has them, else as they began."""
        first_keyframes: dict[str, Keyframe] = {}
        for one in self._stored.keyframes:
            first_keyframes.setdefault(one.keyframe.calibration_key, one.keyframe)
        initial = {
            camera_key: InitialCamera(camera=known.initial, prior=known.prior)
            for camera_key, known in self._stored.calibrations.items()
        }
        facts = self._facts.get("cameras", {})
        self._parts.cameras.restore(facts, initial, first_keyframes)
        for camera_key, began in self._parts.cameras.initial.items():
            main.add_camera(camera_key, copy.deepcopy(began.camera), prior=began.prior)
        for model in models[:1]:
            _calibrate_as_in(model, main, self._calibration_keys)

    @property
    def _calibration_keys(self) -> dict[FrameId, str]:
        keyframes = (one.keyframe for one in self._stored.keyframes)
        return {one.frame_id: one.calibration_key for one in keyframes}

    # -- maps -----------------------------------------------------------------------------------

    def _restore_maps(self, main: SparseMap, models: Sequence[StoredModel]) -> None:
        parts = self._parts
        parts.builder.complete(main, like=main)
        for model in models[:1]:
            self._fill(main, model)
        main.count_covisibility()
        parts.registering.update_graph(main, main.registered_ids)
        for number, model in enumerate(models[1:], start=1):
            beside = self._new_map()
            frame_ids = [FrameId(int(i)) for i in model.reconstruction.reg_image_ids()]
            parts.builder.complete(beside, like=main, frame_ids=frame_ids)
            _calibrate_as_in(model, beside, self._calibration_keys)
            self._fill(beside, model)
            if beside.num_registered:
                parts.components.restore_map(beside, number=model.record.get("number", number))

    def _fill(self, sparse_map: SparseMap, model: StoredModel) -> None:
        """Places keyframes and points of a map as its model has them.

        Keyframes whose camera became another one since then are left to be registered anew.
        """
        reconstruction = model.reconstruction
        moved = model.record.get("enu_from_map")
        if moved is not None:
            reconstruction.transform(pycolmap.Sim3d(moved).inverse())
        camera_ids = _camera_ids(model)
        sparse_map.take_model(reconstruction)
        sparse_map.deregister(
            [
                frame_id
                for frame_id in sparse_map.registered_ids
                if not _is_of_its_camera(sparse_map, frame_id, reconstruction, camera_ids)
            ]
        )


def _camera_ids(model: StoredModel) -> dict[str, int]:
    """COLMAP's ids of the cameras of a model, by key; empty where that is not kept."""
    return {key: one["camera_id"] for key, one in model.record.get("cameras", {}).items()}


def _is_of_its_camera(
    sparse_map: SparseMap,
    frame_id: FrameId,
    model: pycolmap.Reconstruction,
    camera_ids: Mapping[str, int],
) -> bool:
    """Whether a keyframe had its present camera in a model."""
    camera_key = sparse_map.keyframe(frame_id).calibration_key
    had = model.camera(model.image(frame_id).camera_id)
    is_same = had.model_name == sparse_map.camera(camera_key).model_name
    return is_same and camera_ids.get(camera_key, had.camera_id) == had.camera_id


def _calibrate_as_in(
    model: StoredModel, sparse_map: SparseMap, keys: Mapping[FrameId, str]
) -> None:
    """Gives the cameras of a map, but those of another lens by now, the calibrations of a model.

    Args:
        model: a map as it was.
        sparse_map: has the cameras.
        keys: the calibration key of each keyframe, for a model that does not say which is which.
    """
    had = model.reconstruction
    records = model.record.get("cameras", {})
    camera_ids = _camera_ids(model) or {
        keys[FrameId(int(i))]: had.image(i).camera_id for i in had.reg_image_ids() if i in keys
    }
    for camera_key, camera_id in camera_ids.items():
        if camera_key not in sparse_map.camera_keys or not had.exists_camera(camera_id):
            continue
        camera = sparse_map.camera(camera_key)
        if had.camera(camera_id).model_name != camera.model_name:
            continue
        sparse_map.set_camera_params(camera_key, had.camera(camera_id).params.tolist())
        if camera_key in records:
            sparse_map.set_camera_prior(camera_key, prior_of(records[camera_key]))
            state = state_of(records[camera_key])
            if state is not None:
                sparse_map.calibration.set_state(int(camera.camera_id), state)
