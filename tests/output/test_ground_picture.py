"""The ground as views show it."""

from __future__ import annotations

import numpy as np
import pytest

from engine.dense.surface import GroundGrid, Surface
from engine.output.ground_picture import ground_picture


@pytest.mark.parametrize(("num_lines", "num_columns"), [(1190, 1001), (600, 1193), (7, 5)])
def test_vertices_lie_on_their_place_in_the_texture_up_to_the_last_cells(
    num_lines: int, num_columns: int
) -> None:
    grid = GroundGrid(cell=0.5, west=-20, north=30, num_columns=num_columns, num_lines=num_lines)
    left, lower, right, upper = grid.bounds
    shape = num_lines, num_columns
    picture = ground_picture(
        Surface(grid=grid, heights=np.zeros(shape, np.float32), is_measured=np.ones(shape, bool)),
        np.full((*shape, 4), 255, np.uint8),
        None,
        world_from_ground=np.eye(4)[:3],
        geojson="",
    )
    vertices = picture.vertices_in_world
    assert max(vertices.shape[:2]) <= 200
    x = left + picture.u_in_texture * (right - left)
    y = upper - picture.v_in_texture * (upper - lower)
    np.testing.assert_allclose(vertices[:, :, 0], np.broadcast_to(x, vertices.shape[:2]), atol=1e-3)
    np.testing.assert_allclose(
        vertices[:, :, 1].T, np.broadcast_to(y, vertices.shape[1::-1]), atol=1e-3
    )
    ends = vertices[[0, -1], [0, -1], :2]
    np.testing.assert_allclose(ends, [[left + 0.25, upper - 0.25], [right - 0.25, lower + 0.25]])
