"""The verified pairs of a map: by keyframe for posing, and as COLMAP's correspondence graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pycolmap

from engine.errors import MapError
from engine.types import FrameId, ImagePair, VerifiedPair


class MatchGraph:
    """Keyframes and their verified pairs, each two keyframes once.

    COLMAP's correspondence graph grows along and is never finalised, which would end its growth.
    """

    def __init__(self) -> None:
        self._correspondences = pycolmap.CorrespondenceGraph()
        self._neighbors: dict[FrameId, dict[FrameId, VerifiedPair]] = {}

    @classmethod
    def of(cls, num_keypoints: Mapping[FrameId, int], pairs: Sequence[VerifiedPair]) -> MatchGraph:
        """A graph of keyframes, with how many keypoints each has, and pairs between them."""
        graph = cls()
        for frame_id, num in num_keypoints.items():
            graph.add_keyframe(frame_id, (), num_keypoints=num)
        graph._add(pairs)
        return graph

    def copy(self) -> MatchGraph:
        """A graph whose pairs may be distrusted alone; both share COLMAP's.

        Only one of the two may take further keyframes and pairs.
        """
        twin = MatchGraph()
        twin._correspondences = self._correspondences
        twin._neighbors = {i: dict(neighbors) for i, neighbors in self._neighbors.items()}
        return twin

    def pairs(self) -> list[VerifiedPair]:
        """All pairs that are trusted, in order of their second keyframe."""
        return [
            pair
            for frame_id, neighbors in self._neighbors.items()
            for other, pair in neighbors.items()
            if other < frame_id
        ]

    @property
    def correspondence_graph(self) -> pycolmap.CorrespondenceGraph:
        """COLMAP's view of it, for its managers; distrusted pairs stay in it."""
        return self._correspondences

    def neighbors(self, frame_id: FrameId) -> Mapping[FrameId, VerifiedPair]:
        """Keyframes with a verified pair to this one."""
        return self._neighbors[frame_id]

    def add_keyframe(
        self, frame_id: FrameId, pairs: Sequence[VerifiedPair], *, num_keypoints: int
    ) -> None:
        """Adds a keyframe with its pairs to keyframes added before.

        Raises:
            MapError: the keyframe is known, or a pair does not join it to a known one, or comes
                twice; nothing is added.
        """
        if frame_id in self._neighbors:
            raise MapError(f"keyframe {frame_id} was added before")
        self._check(frame_id, pairs)
        self._correspondences.add_image(frame_id, num_keypoints)
        self._neighbors[frame_id] = {}
        self._add(pairs)

    def add_pairs(self, pairs: Sequence[VerifiedPair]) -> None:
        """Adds pairs between keyframes added before; a distrusted one is trusted again.

        Raises:
            MapError: a keyframe is unknown, or a pair comes twice; nothing is added.
        """
        checked: set[ImagePair] = set()
        for verified in pairs:
            pair = verified.pair
            if not {pair.first, pair.second} <= self._neighbors.keys():
                raise MapError(f"{pair} does not join keyframes of this map")
            if pair in checked or pair.second in self._neighbors[pair.first]:
                raise MapError(f"{pair} was added before")
            checked.add(pair)
        self._add(pairs)

    def distrust(self, pair: ImagePair) -> None:
        """Takes a pair from its keyframes' neighbours; COLMAP's graph forgets nothing."""
        for frame_id, other in ((pair.first, pair.second), (pair.second, pair.first)):
            del self._neighbors[frame_id][other]

    def _check(self, frame_id: FrameId, pairs: Sequence[VerifiedPair]) -> None:
        """Refuses pairs that do not join a new keyframe to known ones, each once."""
        known = self._neighbors.keys() | {frame_id}
        checked: set[ImagePair] = set()
        for verified in pairs:
            pair = verified.pair
            ends = {pair.first, pair.second}
            if frame_id not in ends:
                raise MapError(f"{pair} does not join the new keyframe {frame_id}")
            if not ends <= known:
                raise MapError(f"{pair} does not join keyframes of this map")
            if pair in checked:
                raise MapError(f"{pair} was added before")
            checked.add(pair)

    def _add(self, pairs: Sequence[VerifiedPair]) -> None:
        for verified in pairs:
            first, second = verified.pair.first, verified.pair.second
            # COLMAP's graph has those that were distrusted, and takes no pair twice.
            if not self._correspondences.num_matches_between_images(first, second):
                geometry = pycolmap.TwoViewGeometry()
                geometry.config = int(pycolmap.TwoViewGeometryConfiguration.UNCALIBRATED)
                geometry.inlier_matches = verified.inlier_matches_idx
                self._correspondences.add_two_view_geometry(first, second, geometry)
            self._neighbors[first][second] = verified
            self._neighbors[second][first] = verified
