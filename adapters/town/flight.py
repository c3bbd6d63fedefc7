"""Flights over the synthetic town: smooth camera paths at an even optical flow."""

from __future__ import annotations

from typing import Literal

import numpy as np

from adapters.town.world import PLAZA, BoxKind, TownLayout, block_rect
from engine.types import Float64Array

PathName = Literal["flight", "orbit", "lawnmower", "street"]

_STEP = 1.0  # spacing of the dense path: metres, or degrees where the camera only turns
_SMOOTHING_STEPS = 10.0  # corners are rounded over about so many steps
_PROBE_EVERY = 4  # dense poses between two measurements of optical flow
_PACE_SMOOTHING_PROBES = 4.0  # how gently the pace follows the scene

_STREET_LOOP_M = 18.5  # from the plaza's middle to the middle of its streets

# Rows of a path: x, y, z in metres, yaw in degrees clockwise from north, pitch in degrees, up > 0.


def fly(
    path: PathName, layout: TownLayout, *, num_frames: int, tangents: tuple[float, float]
) -> Float64Array:
    """The poses of a flight.

    The whole path is flown whatever ``num_frames``; fewer frames move faster.

    Args:
        path: which one.
        layout: the scene in view, which sets the speed.
        num_frames: at least 2.
        tangents: of half the horizontal and vertical field of view.

    Returns:
        ``cam_from_world``, (num_frames, 3, 4).
    """
    dense = _smoothed(_densified(_WAYPOINTS[path]()))
    progress = _progress(dense, layout, tangents=tangents)
    wanted = np.linspace(0.0, progress[-1], num_frames)
    rows = np.stack([np.interp(wanted, progress, column) for column in dense.T], axis=1)
    return poses_from_path(rows)


def poses_from_path(path: Float64Array) -> Float64Array:
    """``cam_from_world`` (N, 3, 4) of path rows (N, 5), the horizon level."""
    yaw, pitch = np.deg2rad(path[:, 3]), np.deg2rad(path[:, 4])
    zero = np.zeros_like(yaw)
    right = np.stack([np.cos(yaw), -np.sin(yaw), zero], axis=1)
    forward = np.stack(
        [np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)], axis=1
    )
    rotation = np.stack([right, np.cross(forward, right), forward], axis=1)
    translation = -np.einsum("nij,nj->ni", rotation, path[:, :3])
    return np.concatenate([rotation, translation[:, :, None]], axis=2)


def _orbit_rows(
    *,
    radius: tuple[float, float],
    height: tuple[float, float],
    bearings_deg: tuple[float, float],
    target_z: float = 4.0,
) -> Float64Array:
    """A helix facing the town's centre; bearings are the camera's, seen from there."""
    num_rows = int(abs(bearings_deg[1] - bearings_deg[0]) / 5) + 1
    bearing = np.linspace(*bearings_deg, num_rows)
    reach, z = np.linspace(*radius, num_rows), np.linspace(*height, num_rows)
    x, y = reach * np.sin(np.deg2rad(bearing)), reach * np.cos(np.deg2rad(bearing))
    pitch = -np.rad2deg(np.arctan2(z - target_z, reach))
    return np.stack([x, y, z, bearing - 180.0, pitch], axis=1)


def _orbit_waypoints() -> Float64Array:
    return _orbit_rows(radius=(80.0, 80.0), height=(50.0, 50.0), bearings_deg=(180.0, 570.0))


def _lawnmower_waypoints() -> Float64Array:
    return np.array(
        [
            (-28.0, -34.0, 68.0, 0.0, -72.0),
            (-28.0, 30.0, 68.0, 0.0, -72.0),
            (2.0, 30.0, 68.0, 0.0, -68.0),
            (2.0, -34.0, 68.0, 0.0, -68.0),
            (30.0, -34.0, 66.0, 0.0, -72.0),
            (30.0, 30.0, 66.0, 0.0, -72.0),
            (-14.0, 4.0, 66.0, 0.0, -70.0),
            (-28.0, -32.0, 68.0, 0.0, -72.0),
        ]
    )


def _street_waypoints() -> Float64Array:
    """In the streets around the plaza, facing across it, a little more than once around."""
    plaza = block_rect(*PLAZA)
    x, y = (plaza.x_min + plaza.x_max) / 2, (plaza.y_min + plaza.y_max) / 2
    bearing = np.linspace(225.0, 225.0 + 400.0, 81)
    across, along = np.sin(np.deg2rad(bearing)), np.cos(np.deg2rad(bearing))
    reach = _STREET_LOOP_M / (np.abs(across) ** 4 + np.abs(along) ** 4) ** 0.25
    height = 5.0 + 1.2 * np.sin(np.deg2rad(2.0 * bearing))
    pitch = np.full_like(bearing, -9.0)
    columns = [x + reach * across, y + reach * along, height, bearing - 180.0, pitch]
    return np.stack(columns, axis=1)


def _flight_waypoints() -> Float64Array:
    """Strips over the roofs, once around the town, then down into the main street."""
    strips = np.array(
        [
            (-13.0, -26.0, 76.0, 0.0, -66.0),
            (-13.0, 4.0, 76.0, 0.0, -66.0),
            (12.0, 4.0, 76.0, 0.0, -66.0),
            (12.0, -30.0, 73.0, 0.0, -61.0),
            (8.0, -52.0, 66.0, -1.0, -49.0),
        ]
    )
    around = _orbit_rows(radius=(60.0, 60.0), height=(63.0, 52.0), bearings_deg=(185.0, 540.0))
    street = np.array(
        [
            (0.0, -76.0, 26.0, 360.0, -20.0),
            (0.0, -66.0, 10.0, 360.0, -11.0),
            (0.0, -56.0, 6.5, 361.0, -8.0),
            (0.0, -27.0, 6.5, 366.0, -8.0),
        ]
    )
    return np.concatenate([strips, around, street])


_WAYPOINTS = {
    "flight": _flight_waypoints,
    "orbit": _orbit_waypoints,
    "lawnmower": _lawnmower_waypoints,
    "street": _street_waypoints,
}


def _densified(waypoints: Float64Array) -> Float64Array:
    lengths = np.linalg.norm(np.diff(waypoints, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    wanted = np.linspace(0.0, along[-1], int(along[-1] / _STEP) + 2)
    return np.stack([np.interp(wanted, along, column) for column in waypoints.T], axis=1)


def _smoothed(rows: Float64Array, sigma: float = _SMOOTHING_STEPS) -> Float64Array:
    """A Gaussian along the path (N, D), odd reflection at the ends so that they stay in place."""
    reach = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(rows, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded.T], axis=1)


def _progress(
    dense: Float64Array, layout: TownLayout, *, tangents: tuple[float, float]
) -> Float64Array:
    """Optical flow gathered up to each dense row, (N,), in units of the focal length."""
    houses = TownLayout(boxes=tuple(box for box in layout.boxes if box.kind is BoxKind.HOUSE))
    probe_idx = np.arange(0, len(dense) - 1, _PROBE_EVERY)
    pace = np.array(
        [_median_flow(dense[i : i + 2], houses.bounds, tangents=tangents) for i in probe_idx]
    )
    pace = _smoothed(pace[:, None], _PACE_SMOOTHING_PROBES)[:, 0]
    per_step = np.interp(np.arange(len(dense) - 1), probe_idx, pace)
    return np.concatenate([[0.0], np.cumsum(per_step)])


def _median_flow(
    two_rows: Float64Array, bounds: Float64Array, *, tangents: tuple[float, float]
) -> float:
    """Median motion in the image between two near poses, in units of the focal length."""
    first, second = poses_from_path(two_rows)
    across, down = np.meshgrid(np.linspace(-0.95, 0.95, 9), np.linspace(-0.95, 0.95, 7))
    rays = np.stack(
        [across.ravel() * tangents[0], down.ravel() * tangents[1], np.ones(across.size)], axis=1
    )
    center = two_rows[0, :3]
    directions = rays @ first[:, :3]
    depth = _hit_depth(center, directions, bounds=bounds)
    rays, directions, depth = (array[np.isfinite(depth)] for array in (rays, directions, depth))
    points = center + directions * depth[:, None]
    seen = points @ second[:, :3].T + second[:, 3]
    motion = seen[:, :2] / seen[:, 2:] - rays[:, :2]
    return float(np.median(np.linalg.norm(motion, axis=1)))


def _hit_depth(
    center: Float64Array, directions: Float64Array, *, bounds: Float64Array
) -> Float64Array:
    """Where rays (R, 3) from ``center`` first hit a box or the ground, (R,) in ray lengths."""
    with np.errstate(divide="ignore", invalid="ignore"):
        to_planes = (bounds[None] - center) / directions[:, None, None, :]  # (R, B, 2, 3)
        enter = to_planes.min(axis=2).max(axis=2)
        leave = to_planes.max(axis=2).min(axis=2)
        to_ground = -center[2] / directions[:, 2]
    to_box = np.where((enter > 0) & (enter <= leave), enter, np.inf).min(axis=1)
    depth: Float64Array = np.minimum(to_box, np.where(to_ground > 0, to_ground, np.inf))
    return depth
