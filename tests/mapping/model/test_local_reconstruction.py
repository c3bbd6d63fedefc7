"""Local bundle adjustment in a small reconstruction of its own is that in the whole map."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import LocalBundleAdjustmentConfig
from engine.mapping.model import local_reconstruction
from engine.mapping.model.bundle_adjustment import adjust_locally
from engine.mapping.model.local_reconstruction import LocalReconstruction
from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId
from tests.support.synthetic import SyntheticWorld, grown_map, poses_of, straight_path

NUM = 14


@pytest.fixture(scope="module")
def grown() -> SparseMap:
    """A map whose last keyframes still have the errors of being posed one by one."""
    world = SyntheticWorld(straight_path(NUM), noise_px=1.0)
    return grown_map(world, wrong_ratio=0.05)


def _positions(sparse_map: SparseMap) -> dict[int, np.ndarray]:
    points = sparse_map.reconstruction.points3D
    return {int(point3D_id): np.array(point.xyz) for point3D_id, point in points.items()}


def test_a_part_of_a_map_is_adjusted_as_the_map_would_be(
    grown: SparseMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = grown.registered_ids[-1]
    whole, by_part = grown.copy(), grown.copy()
    config = LocalBundleAdjustmentConfig()
    in_whole = adjust_locally(whole, newest, config=config)
    monkeypatch.setattr(local_reconstruction, "_PASSES_PER_COPY", 0)
    in_part = adjust_locally(by_part, newest, config=config)

    assert in_part == in_whole
    moved = [
        np.abs(whole.cam_from_world(i) - grown.cam_from_world(i)).max() for i in poses_of(grown)
    ]
    assert max(moved) > 1e-4  # there was something to adjust
    for frame_id, pose in poses_of(whole).items():
        np.testing.assert_allclose(by_part.cam_from_world(frame_id), pose, rtol=0, atol=1e-10)
    expected, found = _positions(whole), _positions(by_part)
    assert found.keys() == expected.keys()
    for point3D_id, position in expected.items():
        np.testing.assert_allclose(found[point3D_id], position, rtol=0, atol=1e-8)


def test_a_part_holds_no_more_than_local_adjustment_needs(grown: SparseMap) -> None:
    local = grown.registered_ids[:-5:-1]
    part = LocalReconstruction(grown, local)

    observing = set(grown.covisibility(local[0])) | set(local)
    images = part.reconstruction.images
    assert {i for i in images if images[i].has_pose} == observing
    observed = {int(i) for frame_id in local for i in grown.point3D_ids(frame_id) if i >= 0}
    assert part.reconstruction.num_points3D() == len(observed) < grown.num_points3D
    own = grown.point3D_ids(local[0])
    assert len(part.points) == len(np.unique(own[own >= 0]))


def test_points_that_others_observe_stay_where_they_are(grown: SparseMap) -> None:
    sparse_map = grown.copy()
    local = sparse_map.registered_ids[NUM // 2 : NUM // 2 + 3]
    before = _positions(sparse_map)
    part = LocalReconstruction(sparse_map, local)
    for point3D_id in part.reconstruction.point3D_ids():
        part.reconstruction.point3D(point3D_id).xyz += 1.0
    part.write_back()

    moved = {i for i, xyz in _positions(sparse_map).items() if not np.array_equal(xyz, before[i])}
    assert moved == {i for i in before if _is_for_these_to_decide(sparse_map, i, local)}


def _is_for_these_to_decide(sparse_map: SparseMap, point3D_id: int, local: list[FrameId]) -> bool:
    elements = sparse_map.reconstruction.point3D(point3D_id).track.elements
    observing = {int(element.image_id) for element in elements}
    return local[0] in observing or observing <= set(local)


def test_a_small_map_is_adjusted_in_place_and_a_large_one_is_not(
    grown: SparseMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = grown.registered_ids[-3:]
    assert not LocalReconstruction.is_worthwhile(grown, local)
    monkeypatch.setattr(local_reconstruction, "_PASSES_PER_COPY", 0.1)
    assert LocalReconstruction.is_worthwhile(grown, local)
