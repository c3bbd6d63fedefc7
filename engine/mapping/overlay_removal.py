"""Overlays in maps: what is burned into pictures, and found late, leaves the maps that hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.events import OverlayFound
from engine.mapping.maps.components import Components
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.overlays import Overlay
from engine.matching.pair_matching import MatchedKeyframe, PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink

_REPORTED_GROWTH = 1.25  # times the share of the image when an overlay was reported last
_MIN_MAP = 2  # keyframes; one alone is no map


class OverlayRemoval:
    """Takes out of maps what overlays had, and reports these.

    Args:
        graph: knows pairs that maps may not use; is kept up to date with the main map.
        matching: knows what overlays cover.
        min_inliers: points that hold a keyframe in its place.
        emit: takes the events.
    """

    def __init__(
        self, *, graph: SceneGraph, matching: PairMatching, min_inliers: int, emit: EventSink
    ) -> None:
        self._graph = graph
        self._matching = matching
        self._min_inliers = min_inliers
        self._emit = emit
        self._shares: dict[str, float] = {}  # of cameras' images, as reported last

    def facts(self) -> dict[str, float]:
        """Shares of cameras' images as they were emitted last."""
        return dict(self._shares)

    def restore(self, facts: Mapping[str, float]) -> None:
        """Goes on with `facts`."""
        self._shares = dict(facts)

    def report(self, overlays: Sequence[Overlay]) -> None:
        """Emits overlays that are new, or cover much more than when they were emitted last."""
        for overlay in overlays:
            if overlay.share < _REPORTED_GROWTH * self._shares.get(overlay.camera_key, 0.0):
                continue
            self._shares[overlay.camera_key] = overlay.share
            self._emit(
                OverlayFound(
                    camera_key=overlay.camera_key,
                    share=overlay.share,
                    boxes=overlay.boxes,
                    num_keyframes=overlay.num_keyframes,
                )
            )

    def take_out(
        self, matched: MatchedKeyframe, main: SparseMap, *, components: Components
    ) -> float:
        """Takes points under overlays, and matches there, out of all maps.

        Args:
            matched: has the earlier pairs that lost matches.
            main: the main map.
            components: the others.

        Returns:
            The share of the main map's observations that it lost.
        """
        in_doubt = [o.pair for o in matched.changed_pairs if self._graph.is_held_back(o.pair)]
        covered = {i: np.flatnonzero(self._matching.covers(i)) for i in self._graph.keyframe_ids}
        lost = [*matched.lost_pairs, *in_doubt]
        share = main.replace_pairs(
            matched.changed_pairs,
            lost,
            covered_rows={i: covered[i] for i in main.registered_ids},
        )
        components.leave_out(matched.changed_pairs, lost, covered_rows=covered)
        return share

    def take_out_adrift(self, main: SparseMap) -> None:
        """Takes keyframes out of the main map that too few points hold; all if one is left."""
        adrift = [
            frame_id
            for frame_id in main.registered_ids
            if np.count_nonzero(main.point3D_ids(frame_id) >= 0) < self._min_inliers
        ]
        if main.num_registered - len(adrift) < _MIN_MAP:
            adrift = list(main.registered_ids)
        main.deregister(adrift)
        for frame_id in adrift:
            self._graph.set_registered(frame_id, False)
