"""Rerun: the ground from above as a textured surface, and where it is still to be filmed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.dense_types import GroundPicture
from engine.types import Float32Array, Float64Array, Int64Array

if TYPE_CHECKING:
    from rerun import RecordingStream

HOLE_COLOR = (232, 72, 60)
THIN_COLOR = (240, 180, 72)
HOLE_RADIUS, THIN_RADIUS = 2.5, 1.2  # of a cell's mark, in ui points
_VERTEX_BYTES = 20


class GroundDrawing:
    """Draws the ground at ``world/ground``, and what is badly covered at ``world/coverage``."""

    def __init__(self, recording: RecordingStream) -> None:
        self._recording = recording
        self._is_drawn = False

    def clear(self) -> None:
        """Takes everything off the screen."""
        import rerun as rr

        if self._is_drawn:
            for entity in ("world/ground", "world/coverage"):
                self._recording.log(entity, rr.Clear(recursive=True))
        self._is_drawn = False

    def draw(self, ground: GroundPicture) -> int:
        """Draws all of it; returns about how many bytes that took."""
        import rerun as rr

        self._is_drawn = True
        vertices, texcoords, triangles = surface_mesh(ground)
        mesh = rr.Mesh3D(
            vertex_positions=vertices,
            vertex_texcoords=texcoords,
            triangle_indices=triangles,
            albedo_texture=ground.texture[:, :, :3],
        )
        self._recording.log("world/ground", mesh)
        for name, places, color, radius in (
            ("holes", ground.holes_in_world, HOLE_COLOR, HOLE_RADIUS),
            ("thin", ground.thin_in_world, THIN_COLOR, THIN_RADIUS),
        ):
            cells = rr.Points3D(places, colors=color, radii=rr.Radius.ui_points(radius))
            self._recording.log(f"world/coverage/{name}", cells)
        num_bytes = _VERTEX_BYTES * len(vertices) + triangles.nbytes
        return num_bytes + int(ground.texture[:, :, :3].size)


def surface_mesh(ground: GroundPicture) -> tuple[Float32Array, Float64Array, Int64Array]:
    """Vertices (V, 3), their places in the texture (V, 2), 0 to 1, and triangles (T, 3).

    Squares of the grid are left out where a corner is unknown, or has no picture.
    """
    height, width = ground.vertices_in_world.shape[:2]
    u, v = np.meshgrid(ground.u_in_texture, ground.v_in_texture)
    texture_height, texture_width = ground.texture.shape[:2]
    has_picture = ground.texture[
        (v * texture_height).astype(np.int64), (u * texture_width).astype(np.int64), 3
    ]
    vertices = ground.vertices_in_world.reshape(-1, 3)
    is_known = np.isfinite(vertices).all(axis=1) & (has_picture.reshape(-1) > 0)
    number = np.cumsum(is_known) - 1  # of a vertex among those that are known
    corner = np.arange(height * width).reshape(height, width)
    square = np.stack(
        [corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]], axis=-1
    ).reshape(-1, 4)
    square = number[square[is_known[square].all(axis=1)]]
    triangles = np.concatenate([square[:, [0, 1, 2]], square[:, [0, 2, 3]]])
    texcoords = np.column_stack([u.reshape(-1), v.reshape(-1)])
    return vertices[is_known], texcoords[is_known], triangles
