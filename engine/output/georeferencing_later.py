"""Georeferencing afterwards: the map of a finished run laid onto positions that came later."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from engine.config import Config
from engine.errors import ConfigError
from engine.geo.clock_offset import estimate_clock_offset
from engine.geo.georeference import (
    Georeference,
    GeoreferenceRefused,
    better_order,
    estimate_georeference,
    median_fix,
    positions_in_enu,
    sim3d_of,
    swapped,
)
from engine.geo.gps_tracks import GpsTracks
from engine.geometry import (
    camera_center,
    compose_poses,
    quat_xyzw_from_rotation,
    rotation_from_quat_xyzw,
)
from engine.mapping.positions.georeferencing import Placement
from engine.mapping.steps import MapCopy
from engine.mapping.stored_state import StoredModel
from engine.output.files import write_atomically
from engine.output.run_lock import RunLock
from engine.output.snapshots import next_sequence, read_models, write_snapshot
from engine.types import Float64Array, FrameId, GpsFix, GpsReading


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LaidOut:
    """What came of it."""

    placement: Placement
    clock_offset_s: float | None  # None: the positions go by names
    snapshot: Path
    has_products: bool  # dense ones, which stay where they are

    @property
    def words(self) -> str:
        """In a line."""
        found = self.placement.georeference
        offset_s = self.clock_offset_s
        offset = "" if offset_s is None else f", clock offset {offset_s:.2f} s"
        products = "; products/ stays in the former frame" if self.has_products else ""
        return (
            f"map laid onto {found.num_inliers} positions: {found.rmse_m:.2f} m rms, unit"
            f" {found.metres_per_map_unit:.4g} m{offset}; written as {self.snapshot}{products}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Keyframes:
    """The keyframes of the map, in order of time."""

    frame_ids: tuple[FrameId, ...]
    names: tuple[str, ...]
    times_s: Float64Array  # (N,)
    cam_from_map: Float64Array  # (N, 3, 4)


def georeference_run(
    run: Path,
    *,
    times_s: Mapping[str, float],
    fix_of: Callable[[str], GpsFix | None] | None = None,
    track: Sequence[tuple[float, GpsFix]] = (),
    clock_offset_s: float | None = None,
    config: Config,
) -> LaidOut:
    """Lays the map of a finished run onto positions and writes it as the run's next snapshot.

    The final trajectory and ``summary.json`` follow. The first map is laid out; those apart from it
    stay as they are.

    Args:
        run: a run folder that no run writes to.
        times_s: capture times by the names of frames.
        fix_of: positions by the names of keyframes; None: by the track.
        track: times and positions, in order of time.
        clock_offset_s: what to add to the frames' times to get the track's; None: the one at which
            the track has the shape of the camera's path.
        config: of the run.

    Raises:
        ConfigError: the positions do not fit the map, in words; or a run writes there.
        SnapshotError: the snapshot cannot be read or written.
    """
    lock = RunLock.acquire(run)
    try:
        models = read_models(run / "latest")
        keyframes = _keyframes_of(models[0].reconstruction, times_s)
        if fix_of is not None:
            clock_offset_s, fixes = None, [fix_of(name) for name in keyframes.names]
        else:
            if clock_offset_s is None:
                clock_offset_s = _offset_of(keyframes, track)
            fixes = _fixes_at(keyframes.times_s + clock_offset_s, track, config=config)
        placement = _placed(keyframes, fixes, config=config)
        path = _write(run, models, placement, config=config)
    finally:
        lock.release()
    return LaidOut(
        placement=placement,
        clock_offset_s=clock_offset_s,
        snapshot=path,
        has_products=any((run / "products").glob("*")),
    )


def _keyframes_of(
    reconstruction: pycolmap.Reconstruction, times_s: Mapping[str, float]
) -> _Keyframes:
    images = [reconstruction.image(i) for i in reconstruction.reg_image_ids()]
    known = sorted(
        (image for image in images if image.name in times_s),
        key=lambda image: (times_s[image.name], image.name),
    )
    return _Keyframes(
        frame_ids=tuple(FrameId(image.image_id) for image in known),
        names=tuple(image.name for image in known),
        times_s=np.array([times_s[image.name] for image in known]),
        cam_from_map=np.array([image.cam_from_world().matrix() for image in known]),
    )


def _fixes_at(
    times_s: Float64Array, track: Sequence[tuple[float, GpsFix]], *, config: Config
) -> list[GpsFix | None]:
    readings = GpsTracks(max_gap_s=config.georeference.max_gap_s)
    for time_s, fix in track:
        readings.add(GpsReading(source="", camera_key=None, captured_at_s=time_s, fix=fix))
    return [readings.fix_at("", time_s) for time_s in times_s.tolist()]


def _offset_of(keyframes: _Keyframes, track: Sequence[tuple[float, GpsFix]]) -> float:
    """The clock offset, in the order of latitude and longitude that explains more."""
    track_times_s = np.array([time_s for time_s, _ in track])
    given = [fix for _, fix in track]
    orders = [given]
    if any(fix.is_order_unsure for fix in given):
        orders.append([swapped(fix) for fix in given])
    found = [
        estimate_clock_offset(
            keyframes.times_s,
            camera_center(keyframes.cam_from_map),
            track_times_s,
            positions_in_enu(fixes, origin=median_fix(fixes)),
        )
        for fixes in orders
    ]
    offsets = [one for one in found if not isinstance(one, str)]
    if not offsets:
        raise ConfigError(f"the positions cannot be laid onto the frames: {found[0]}")
    return min(offsets, key=lambda one: one.unexplained_ratio).offset_s


def _placed(keyframes: _Keyframes, fixes: Sequence[GpsFix | None], *, config: Config) -> Placement:
    rows = [row for row, fix in enumerate(fixes) if fix is not None]
    given = [fix for fix in fixes if fix is not None]
    if len(given) < config.georeference.min_fixes:
        raise ConfigError(
            f"{len(given)} of {len(fixes)} keyframes have a position,"
            f" {config.georeference.min_fixes} are needed"
        )

    def estimate(of: Sequence[GpsFix]) -> Georeference | GeoreferenceRefused:
        return estimate_georeference(
            keyframes.cam_from_map[rows], of, config=config.georeference, seed=config.runtime.seed
        )

    found = estimate(given)
    if any(fix.is_order_unsure for fix in given):
        found = better_order(found, estimate([swapped(fix) for fix in given]))
    if not isinstance(found, Georeference):
        raise ConfigError(f"the map cannot be laid onto the positions: {found.detail}")
    return Placement(
        georeference=found,
        frame_ids=tuple(keyframes.frame_ids[row] for row in rows),
        names=tuple(keyframes.names[row] for row in rows),
    )


def _write(
    run: Path, models: Sequence[StoredModel], placement: Placement, *, config: Config
) -> Path:
    """Writes the moved map as the next snapshot, and what tells of it."""
    enu_from_map = placement.georeference.enu_from_map
    copies = []
    for number, model in enumerate(models):
        record: Mapping[str, Any] = model.record
        if number == 0:
            model.reconstruction.transform(sim3d_of(enu_from_map))
            whole = enu_from_map
            if (former := record.get("enu_from_map")) is not None:
                whole = compose_poses(enu_from_map, np.array(former))
            record = {**record, "enu_from_map": whole.tolist()}
        copies.append(
            MapCopy(
                reconstruction=model.reconstruction,
                is_in_metres=record.get("enu_from_map") is not None,
                record=record,
            )
        )
    former_entries = json.loads((run / "latest" / "snapshot.json").read_bytes())
    entries = {
        key: value
        for key, value in former_entries.items()
        if key not in {"sequence", "models", "maps"}
    }
    written = write_snapshot(
        run,
        copies,
        sequence=next_sequence(run),
        entries={**entries, "georeference": placement.as_record()},
        config=config.snapshots.model_copy(update={"min_track_length": 2}),
    )
    _move_trajectory(run / "trajectory.txt", enu_from_map)
    _tell_summary(run / "summary.json", placement)
    return written.path


def _move_trajectory(path: Path, enu_from_map: Float64Array) -> None:
    """Writes the poses of a TUM file, where there is one, in metres."""
    if not path.is_file():
        return
    lines = [
        line if line.startswith("#") or not line else _moved(line, enu_from_map)
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _moved(line: str, enu_from_map: Float64Array) -> str:
    """A line of a TUM file, ``time tx ty tz qx qy qz qw`` of the camera in its world, moved."""
    time, *cells = line.split()
    values = np.array([float(cell) for cell in cells])
    scaled = enu_from_map[:, :3]
    position = scaled @ values[:3] + enu_from_map[:, 3]
    rotation = scaled / np.cbrt(np.linalg.det(scaled)) @ rotation_from_quat_xyzw(values[3:7])
    numbers = np.concatenate([position, quat_xyzw_from_rotation(rotation)])
    return " ".join([time, *(f"{number:.12g}" for number in numbers.tolist())])


def _tell_summary(path: Path, placement: Placement) -> None:
    """Puts the georeference into ``summary.json``, where there is one."""
    if not path.is_file():
        return
    record = {
        **json.loads(path.read_text(encoding="utf-8")),
        "georeferenced": True,
        "georeference": placement.as_record(with_residuals=True),
        "not_georeferenced": "",
        "gps_rmse_m": placement.georeference.rmse_m,
    }
    write_atomically(path, f"{json.dumps(record, indent=2)}\n".encode())
