"""A focal length from how many pairs agree with each other by it.

With a wrong focal length relative poses are wrong, turns do not close, and third views do not fit:
fewer triplets hold. Pairs that are wrong themselves agree with none, so they hardly have a vote,
while fundamental matrices of them tell any focal length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pycolmap

from engine.estimators.two_view_geometry import estimate_focal_length
from engine.matching.pair_agreement import PairAgreement
from engine.matching.scene_graph import SceneGraph
from engine.types import VerifiedPair

_RATIOS = np.geomspace(0.6, 1.0 / 0.6, 9)  # of the assumed focal length
_MAX_PAIRS = 60  # the strongest, which vote
_MIN_AGREED = 3  # pairs: one triplet
_NEAR_BEST = 0.9  # of the most agreed pairs: as good as the best
_MORE_TO_VOTE = 1.5  # times the pairs at the last vote
_MIN_PAIRS = 6


class FocalVotes:
    """Lets the pairs of a camera vote for its focal length.

    Args:
        graph: holds the pairs.
        agreement: tests them.
    """

    def __init__(self, *, graph: SceneGraph, agreement: PairAgreement) -> None:
        self._graph = graph
        self._agreement = agreement
        self._assumed: dict[str, pycolmap.Camera] = {}
        self._num_pairs: dict[str, int] = {}  # at the last vote
        self._found_px: dict[str, float | None] = {}

    def focal_px(
        self, camera_key: str, camera_of: Callable[[str], pycolmap.Camera]
    ) -> float | None:
        """The focal length by which most pairs agree; None where they say nothing.

        Counted anew when half as many pairs more have come, and remembered until then.

        Args:
            camera_key: a camera of unknown focal length, by its calibration key.
            camera_of: all cameras.
        """
        if camera_key not in self._assumed:
            self._assumed[camera_key] = copy.deepcopy(camera_of(camera_key))
        pairs = self._pairs(camera_key)
        enough = max(_MIN_PAIRS, _MORE_TO_VOTE * self._num_pairs.get(camera_key, 0))
        if len(pairs) >= enough:
            self._num_pairs[camera_key] = len(pairs)
            self._found_px[camera_key] = self._vote(camera_key, pairs, camera_of)
        return self._found_px.get(camera_key)

    def _vote(
        self,
        camera_key: str,
        pairs: list[VerifiedPair],
        camera_of: Callable[[str], pycolmap.Camera],
    ) -> float | None:
        assumed = self._assumed[camera_key]
        by_geometry = estimate_focal_length(pairs, width=assumed.width, height=assumed.height)
        tried = assumed.mean_focal_length() * _RATIOS
        strongest = sorted(pairs, key=lambda one: (-self._agreement.strength(one), one.pair))[
            :_MAX_PAIRS
        ]

        def num_agreed(focal_px: float) -> int:
            camera = copy.deepcopy(assumed)
            focal_idxs = set(camera.focal_length_idxs())
            camera.params = [
                focal_px if idx in focal_idxs else float(value)
                for idx, value in enumerate(assumed.params)
            ]
            return self._agreement.num_agreed_with(
                lambda key: camera if key == camera_key else camera_of(key), pairs=strongest
            )

        counts = np.array([num_agreed(focal_px) for focal_px in tried.tolist()])
        most = int(counts.max())
        num_by_geometry = 0 if by_geometry is None else num_agreed(by_geometry)
        if by_geometry is not None and num_by_geometry >= _NEAR_BEST * max(most, _MIN_AGREED):
            return by_geometry
        is_near_best = counts >= _NEAR_BEST * most
        if most < _MIN_AGREED or is_near_best.all():
            return None
        return float(np.exp(np.log(tried[is_near_best]).mean()))

    def _pairs(self, camera_key: str) -> list[VerifiedPair]:
        return [
            one
            for one in self._graph.all_edges()
            if all(
                self._graph.keyframe(i).calibration_key == camera_key
                for i in (one.pair.first, one.pair.second)
            )
        ]
