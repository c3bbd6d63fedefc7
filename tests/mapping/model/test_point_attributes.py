"""Colours of points and the keyframes that made them, as points come and go."""

from __future__ import annotations

import numpy as np
import pytest

from engine.mapping.model.point_attributes import PointAttributes
from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId
from tests.support.synthetic import SyntheticWorld, grown_map, straight_path

WORLD = SyntheticWorld(straight_path(6))


@pytest.fixture
def sparse_map() -> SparseMap:
    return grown_map(WORLD)


def attributes_of(sparse_map: SparseMap) -> PointAttributes:
    """Empty attributes of the points of a map, which keeps its own."""
    keyframes = {frame_id: sparse_map.keyframe(frame_id) for frame_id in sparse_map.keyframe_ids}
    return PointAttributes(sparse_map.reconstruction, keyframes)


def test_new_points_get_the_colour_of_their_first_keypoint(sparse_map: SparseMap) -> None:
    for point in sparse_map.reconstruction.points3D.values():
        point.color = np.zeros(3, np.uint8)
    attributes = attributes_of(sparse_map)
    attributes.assign(sparse_map.reconstruction.point3D_ids())
    cloud = attributes.cloud()
    assert len(attributes) == len(cloud.colors) == sparse_map.num_points3D
    for row, point in enumerate(sparse_map.reconstruction.points3D.values()):
        element = point.track.element(0)
        point_id = int(WORLD.view(element.image_id).point_ids[element.point2D_idx])
        assert tuple(cloud.colors[row].tolist()) == WORLD.color(point_id)
        assert cloud.first_keyframe_ids[row] == element.image_id
        np.testing.assert_allclose(cloud.points3D_in_world[row], point.xyz, rtol=1e-5, atol=1e-5)


def test_attributes_are_assigned_once(sparse_map: SparseMap) -> None:
    ids = sorted(sparse_map.reconstruction.point3D_ids())
    attributes = attributes_of(sparse_map)
    attributes.assign(ids[:5], made_by=FrameId(6))
    attributes.assign(ids, made_by=FrameId(2))
    makers = attributes.cloud().first_keyframe_ids.tolist()
    assert sorted(makers) == [2] * (len(ids) - 5) + [6] * 5


def test_points_that_are_deleted_already_are_left_out(sparse_map: SparseMap) -> None:
    attributes = attributes_of(sparse_map)
    ids = sorted(sparse_map.reconstruction.point3D_ids())
    attributes.assign([*ids[:3], 10**9])
    assert len(attributes) == 3


def test_attributes_do_not_outgrow_the_points(sparse_map: SparseMap) -> None:
    attributes = attributes_of(sparse_map)
    for _ in range(12):
        attributes.assign(sparse_map.reconstruction.point3D_ids())
        for point3D_id in list(sparse_map.reconstruction.point3D_ids()):
            sparse_map.reconstruction.point3D(point3D_id).xyz += (50.0, 0.0, 0.0)
        sparse_map.filter_all()
        for frame_id in WORLD.frame_ids:
            sparse_map.triangulate(frame_id)
        attributes.assign(sparse_map.reconstruction.point3D_ids())
        assert len(attributes) <= 2 * sparse_map.num_points3D + 1000
    newest = max(sparse_map.reconstruction.point3D_ids())
    assert newest > 2000 > 2 * sparse_map.num_points3D  # so many were made
    assert len(attributes.cloud().colors) == sparse_map.num_points3D
