"""The ground in Rerun: a mesh of what is known, with a texture, and what is badly covered."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import rerun as rr

from adapters.views.rerun_ground import GroundDrawing, surface_mesh
from engine.dense_types import GroundPicture


def ground() -> GroundPicture:
    """A grid of 5 x 4 vertices, one of which is unknown and one without a picture."""
    x, y = np.meshgrid(np.arange(5.0), np.arange(4.0))
    vertices = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.float32)
    vertices[0, 0] = np.nan
    texture = np.full((8, 10, 4), 200, np.uint8)
    texture[6:, 8:, 3] = 0
    return GroundPicture(
        vertices_in_world=vertices,
        texture=texture,
        u_in_texture=(np.arange(5) + 0.5) / 5,
        v_in_texture=(np.arange(4) + 0.5) / 4,
        holes_in_world=np.array([[1.0, 2.0, 0.0]], np.float32),
        thin_in_world=np.zeros((0, 3), np.float32),
        coverage="{}",
    )


def test_squares_with_an_unknown_corner_or_without_a_picture_are_left_out() -> None:
    vertices, texcoords, triangles = surface_mesh(ground())
    assert len(vertices) == len(texcoords) == 5 * 4 - 2
    assert len(triangles) == 2 * (4 * 3 - 2)
    assert np.isfinite(vertices).all()
    corners = vertices[triangles]
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2)
    assert sides.max() < 1.5


def test_vertices_have_their_place_in_the_texture() -> None:
    vertices, texcoords, _ = surface_mesh(ground())
    assert np.allclose(texcoords, (vertices[:, :2] + 0.5) / [5.0, 4.0])


def test_a_picture_moves_with_its_world() -> None:
    similarity = np.column_stack([2.0 * np.eye(3), [1.0, 0.0, -1.0]])
    moved = ground().moved(similarity)
    assert np.allclose(moved.holes_in_world, [[3.0, 4.0, -1.0]])
    assert np.isnan(moved.vertices_in_world[0, 0]).all()
    assert np.allclose(moved.vertices_in_world[3, 4], [9.0, 6.0, -1.0])


def test_surface_and_coverage_are_entities_of_their_own() -> None:
    logged: list[str] = []

    class LogOnly:
        def log(self, entity: str, *drawn: Any) -> None:
            logged.append(entity)

    num_bytes = GroundDrawing(cast(rr.RecordingStream, LogOnly())).draw(ground())
    assert logged == ["world/ground", "world/coverage/holes", "world/coverage/thin"]
    assert 500 < num_bytes < 2000
