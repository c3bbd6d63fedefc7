"""Georeferencing afterwards: the map of a finished run laid onto positions that came later."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from engine.config import Config
from engine.errors import ConfigError, SnapshotError
from engine.events import Event
from engine.geo.clock_offset import estimate_clock_offset
from engine.geo.georeference import (
    Georeference,
    GeoreferenceRefused,
    better_order,
    estimate_georeference,
    median_fix,
    places_on_globe,
    positions_in_enu,
    sim3d_of,
    swapped,
)
from engine.geo.gps_tracks import GpsTracks
from engine.geo.usable_fixes import usable_fix
from engine.geometry import (
    camera_center,
    compose_poses,
    nearest_rotation,
    quat_xyzw_from_rotation,
    rotation_from_quat_xyzw,
)
from engine.mapping.positions.georeferencing import Placement
from engine.mapping.steps import MapCopy
from engine.mapping.stored_state import StoredModel
from engine.mapping.verdict.flying_height import flying_height_of_model_m
from engine.mapping.verdict.placed_later import with_advice_of_place
from engine.output.files import written_atomically
from engine.output.former_place import (
    BY_POSITIONS,
    FROM_FILES,
    FormerPlace,
    place_by_positions,
)
from engine.output.laid_onto import LAID_ONTO, record_of
from engine.output.placement_doubts import far_move, with_doubts
from engine.output.products_again import FORMER_FRAME, has_products, make_products_again
from engine.output.run_folder import trajectory_name
from engine.output.run_lock import RunLock
from engine.output.snapshots import (
    next_sequence,
    read_models,
    words_of_lost_latest,
    write_snapshot,
)
from engine.types import METRES, Float64Array, FrameId, GpsFix, GpsReading, Verdict, VerdictReason

_MAX_NAMED = 3  # positions in a line
_FRAME_HEAD = "# enu_from_map "  # of a trajectory: its frame, twelve numbers by rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LaidOut:
    """What came of it."""

    placement: Placement
    clock_offset_s: float | None  # None: the positions go by names
    snapshot: Path
    products: str  # what came of its products, in words; "": it has none
    was_in_metres: bool = False  # before it was laid out
    doubts: tuple[VerdictReason, ...] = ()  # about the place, now in the run's verdict

    @property
    def words(self) -> str:
        """In a line."""
        found = self.placement.georeference
        offset_s = self.clock_offset_s
        offset = "" if offset_s is None else f", clock offset {offset_s:.2f} s"
        products = f"; {self.products}" if self.products else ""
        left_out = f"; {words}" if (words := self._words_of_left_out()) else ""
        return (
            f"map laid onto {found.num_inliers} positions: {found.rmse_m:.2f} m rms,"
            f" {scale_words(found.metres_per_map_unit, was_in_metres=self.was_in_metres)}{offset};"
            f" written in metres as {self.snapshot}{left_out}{products}"
        )

    def _words_of_left_out(self) -> str:
        """Which positions the map denies; "": none."""
        names = self.placement.rejected_names
        if not names:
            return ""
        farthest_m = float(self.placement.georeference.residuals_m.max())
        disagree = "1 position disagrees" if len(names) == 1 else f"{len(names)} positions disagree"
        more = len(names) - _MAX_NAMED
        listed = ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        far = "" if math.isinf(farthest_m) else f" by up to {farthest_m:.0f} m"
        return f"{disagree} with the map{far}, not used: {listed}"


def scale_words(metres_per_map_unit: float, *, was_in_metres: bool) -> str:
    """What became of the scale of a map that is in metres now, in words."""
    if was_in_metres:
        return f"scale changed by {100.0 * (metres_per_map_unit - 1.0):+.2g} %"
    return f"a map unit was {metres_per_map_unit:.4g} m"


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
    arguments: Sequence[str] = (),
) -> LaidOut:
    """Lays the map of a finished run onto positions and writes it as the run's next snapshot.

    The final trajectories and ``summary.json`` go with it. The first map is laid out; one apart
    from it that was in metres before moves along with the origin, others stay as they are.

    Args:
        run: a run folder that no run writes to.
        times_s: capture times by the names of the frames that the positions are for.
        fix_of: positions by the names of keyframes; None: by the track.
        track: times and positions, in order of time.
        clock_offset_s: what to add to the frames' times to get the track's; None: the one at which
            the track has the shape of the camera's path.
        config: of the run.
        arguments: of the command line, kept for a run that goes on: it forgets the positions.

    Raises:
        ConfigError: the positions do not fit the map, in words; or a run writes there, was
            interrupted there, or has no map.
        SnapshotError: the snapshot cannot be read or written.
    """
    lock = RunLock.acquire(run)
    try:
        refuse_unfinished(run, lock)
        models = read_models(run / "latest")
        was_in_metres = models[0].record.get("enu_from_map") is not None
        keyframes = _keyframes_of(models[0].reconstruction, times_s)
        if fix_of is not None:
            given = [fix_of(name) for name in keyframes.names]
            clock_offset_s = None
            fixes = [None if fix is None else usable_fix(fix) for fix in given]
        else:
            usable = ((time_s, usable_fix(fix)) for time_s, fix in track)
            track = [(time_s, fix) for time_s, fix in usable if fix is not None]
            if not track:
                raise ConfigError("the track has no position that can be")
            if clock_offset_s is None:
                clock_offset_s = _offset_of(keyframes, track)
            fixes = _fixes_at(keyframes.times_s + clock_offset_s, track, config=config)
        placement = _placed(keyframes, fixes, config=config)
        former = json.loads((run / "latest" / "snapshot.json").read_bytes()).get("georeference")
        by_frames = place_by_positions(models[0], former)
        if by_frames is not None and by_frames.is_from_files:
            by_frames = None  # a file that mends a wrong one is not measured by it
        laid = _laid(placement, by_frames, centers=camera_center(keyframes.cam_from_map))
        path, products = write_laid(run, models, laid, config=config, arguments=arguments)
    finally:
        lock.let_go()
    return LaidOut(
        placement=placement,
        clock_offset_s=clock_offset_s,
        snapshot=path,
        products=products,
        was_in_metres=was_in_metres,
        doubts=laid.doubts,
    )


def refuse_unfinished(run: Path, lock: RunLock) -> None:
    """Refuses to lay out a run that is not at its end.

    Raises:
        ConfigError: it was interrupted, or has no map.
    """
    if lock.interrupted is not None:
        raise ConfigError(
            f"{run}: the run was interrupted and is unfinished; first end it: livesfm resume {run}"
        )
    if not (run / "latest" / "snapshot.json").is_file():
        raise ConfigError(f"{run}: the run has no map{words_of_lost_latest(run)}")


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
    """The positions at times, by those of the track before and after each."""
    readings = GpsTracks(max_gap_s=config.georeference.max_gap_s)
    after = np.searchsorted([time_s for time_s, _ in track], times_s)
    places = np.unique(np.concatenate([after - 1, after]).clip(0, len(track) - 1))
    for time_s, fix in (track[place] for place in places.tolist()):
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Laid:
    """Where the first map of a run is to lie, and what files say of it."""

    onto_from_former: Float64Array  # (3, 4) similarity from where its newest snapshot has it
    origin: GpsFix | None  # of east, north, up; None: it has a unit and no place
    georeference: Mapping[str, object] | None  # of snapshot.json
    summary: Mapping[str, object]  # what changes in summary.json
    event: Event | None = None  # appended to events.jsonl
    doubts: tuple[VerdictReason, ...] = ()  # about the place, and remarks, for the verdict
    is_moved: bool = True  # else it keeps its place, and what is doubted about that
    has_control: bool = False  # control points with heights hold it there


def _laid(placement: Placement, by_frames: FormerPlace | None, *, centers: Float64Array) -> Laid:
    """Where positions of files have the map, and what those of the frames say to that."""
    found = placement.georeference
    shift = None
    if by_frames is not None:
        shift = by_frames.shift_of(centers, found.enu_from_map, onto=found.origin)
    doubts = far_move(
        shift,
        by="the positions of the file",
        from_where="those of the frames",
        likely="the file may be of another flight or day, or its columns may be swapped",
    )
    kept = {} if by_frames is None else {BY_POSITIONS: by_frames.as_record()}
    return Laid(
        onto_from_former=found.enu_from_map,
        origin=found.origin,
        georeference={**placement.as_record(), FROM_FILES: True, **kept},
        doubts=doubts,
        summary={
            "georeferenced": True,
            "georeference": placement.as_record(with_residuals=True),
            "not_georeferenced": "",
            "gps_rmse_m": found.rmse_m,
            "unit": METRES,
            "metres_per_map_unit": 1.0,
        },
    )


def write_laid(
    run: Path,
    models: Sequence[StoredModel],
    laid: Laid,
    *,
    config: Config,
    arguments: Sequence[str] | None,
) -> tuple[Path, str]:
    """Writes the moved maps as the next snapshot, and with it the files that say where they lie.

    `latest` changes last: whatever fails before, another call does it all again. Then the products
    are made again in the new frame.

    Args:
        run: a run folder that nobody else writes to.
        models: of its newest snapshot; they are moved.
        laid: where the first of them is to lie.
        config: of the run.
        arguments: of the command line, kept for a run that goes on; None: those of before stay.

    Returns:
        The snapshot, and what came of the products, see `make_products_again`.

    Raises:
        SnapshotError: a file is damaged or cannot be written.
    """
    former_entries = json.loads((run / "latest" / "snapshot.json").read_bytes())
    places = _places(models, laid, former_entries)
    try:
        beside = {
            **({} if arguments is None else {run / LAID_ONTO: record_of(arguments)}),
            **_trajectories(run, places),
            **_summary(run, laid, reconstruction=models[0].reconstruction),
            **_events(run / "events.jsonl", laid.event),
        }
    except (OSError, ValueError, KeyError) as error:
        raise SnapshotError(f"{run}: a trajectory or summary.json is damaged: {error}") from error
    copies = []
    for model, place in zip(models, places, strict=True):
        if place.has_moved:
            model.reconstruction.transform(sim3d_of(place.onto_from_former))
        wanted = place.enu_from_map
        copies.append(
            MapCopy(
                reconstruction=model.reconstruction,
                is_in_metres=wanted is not None and laid.origin is not None,
                record={
                    **model.record,
                    "enu_from_map": None if wanted is None else wanted.tolist(),
                },
            )
        )
    entries = {
        key: value
        for key, value in former_entries.items()
        if key not in {"sequence", "models", "maps"}
    }
    written = write_snapshot(
        run,
        copies,
        sequence=next_sequence(run),
        entries={**entries, "georeference": laid.georeference},
        config=config.snapshots.model_copy(update={"min_track_length": 2}),
        before_latest=lambda: _replace_together(beside),
    )
    products = make_products_again(
        run, models[0].reconstruction, origin=laid.origin, config=config.dense
    )
    return written.path, products


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """Where a map lay, and where it lies; None: in its own frame and unit."""

    former: Float64Array | None  # (3, 4) enu_from_map
    enu_from_map: Float64Array | None  # (3, 4)

    @property
    def has_moved(self) -> bool:
        """Whether the two differ."""
        return self.former is not self.enu_from_map

    @property
    def onto_from_former(self) -> Float64Array:
        """The similarity (3, 4) from where it lay to where it lies."""
        return _onto(self.enu_from_map, self.former)


def _places(
    models: Sequence[StoredModel], laid: Laid, former_entries: Mapping[str, Any]
) -> list[_Place]:
    """The places of all maps.

    One beside the first that was placed before moves along with the origin; where that is not
    known, back into its own frame.
    """
    places = []
    for number, model in enumerate(models):
        record = model.record.get("enu_from_map")
        former = None if record is None else np.array(record, np.float64)
        moved = former
        if number == 0:
            moved = compose_poses(laid.onto_from_former, _or_identity(former))
        elif former is not None:
            change = _change_of_origin(former_entries, onto=laid.origin)
            moved = None if change is None else compose_poses(change, former)
        places.append(_Place(former=former, enu_from_map=moved))
    return places


def _change_of_origin(
    former_entries: Mapping[str, Any], *, onto: GpsFix | None
) -> Float64Array | None:
    """From metres east, north, up of a snapshot's origin to those of another; None: not known."""
    origin = (former_entries.get("georeference") or {}).get("origin")
    if origin is None or onto is None:
        return None
    far_m = 1000.0
    corners_m = np.vstack([np.zeros(3), far_m * np.eye(3)])
    on_globe = places_on_globe(corners_m, origin=GpsFix(**origin))
    fixes = [
        GpsFix(latitude_deg=latitude, longitude_deg=longitude, altitude_m=altitude)
        for latitude, longitude, altitude in on_globe.tolist()
    ]
    moved_m = positions_in_enu(fixes, origin=onto)
    axes = nearest_rotation(((moved_m[1:] - moved_m[0]) / far_m).T)
    return None if axes is None else np.column_stack([axes, moved_m[0]])


def _or_identity(enu_from_map: Float64Array | None) -> Float64Array:
    return np.eye(3, 4) if enu_from_map is None else enu_from_map


def _inverse(similarity: Float64Array) -> Float64Array:
    return np.asarray(sim3d_of(similarity).inverse().matrix())


def _onto(wanted: Float64Array | None, former: Float64Array | None) -> Float64Array:
    """The similarity (3, 4) from one frame of a map to another, each given by its own."""
    return compose_poses(_or_identity(wanted), _inverse(_or_identity(former)))


def _replace_together(contents: Mapping[Path, bytes]) -> None:
    """Writes all files beside their places, and then renames them there.

    Raises:
        OSError: they cannot be written; those that wait for their turn stay as they were.
    """
    with ExitStack() as stack:
        for path, data in contents.items():
            file = stack.enter_context(written_atomically(path))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _trajectories(run: Path, places: Sequence[_Place]) -> dict[Path, bytes]:
    """The TUM files of the maps that are there, as they are to be.

    One that was moved before says in its head from where: it need not be in the frame of `latest`.
    """
    contents = {}
    for number, place in enumerate(places):
        path = run / trajectory_name(number)
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        said = next((line for line in lines if line.startswith(_FRAME_HEAD)), None)
        former = place.former if said is None else _frame_of(said)
        onto_from_former = _onto(place.enu_from_map, former)
        head = [line for line in lines if line.startswith("#") and line != said]
        numbers = " ".join(f"{x!r}" for x in _or_identity(place.enu_from_map).ravel().tolist())
        rows = [_moved(line, onto_from_former) for line in lines if line and line[0] != "#"]
        text = "\n".join([*head, f"{_FRAME_HEAD}{numbers}", *rows])
        contents[path] = f"{text}\n".encode()
    return contents


def _frame_of(line: str) -> Float64Array:
    """The ``enu_from_map`` (3, 4) that the head of a trajectory says.

    Raises:
        ValueError: it is no similarity.
    """
    numbers = [float(cell) for cell in line.removeprefix(_FRAME_HEAD).split()]
    found = np.array(numbers).reshape(3, 4)
    if not (np.isfinite(found).all() and np.linalg.det(found[:, :3]) > 0.0):
        raise ValueError(f"no similarity: {line[:80]}")
    return found


def _moved(line: str, enu_from_map: Float64Array) -> str:
    """A line of a TUM file, ``time tx ty tz qx qy qz qw`` of the camera in its world, moved."""
    time, *cells = line.split()
    values = np.array([float(cell) for cell in cells])
    scaled = enu_from_map[:, :3]
    position = scaled @ values[:3] + enu_from_map[:, 3]
    rotation = scaled / np.cbrt(np.linalg.det(scaled)) @ rotation_from_quat_xyzw(values[3:7])
    numbers = np.concatenate([position, quat_xyzw_from_rotation(rotation)])
    return " ".join([time, *(f"{number:.12g}" for number in numbers.tolist())])


def _summary(
    run: Path, laid: Laid, *, reconstruction: pycolmap.Reconstruction
) -> dict[Path, bytes]:
    """The ``summary.json`` with changes, where there is one; products are not moved yet.

    Args:
        run: the run folder.
        laid: where its first map is to lie.
        reconstruction: the map, where it lies before.
    """
    path = run / "summary.json"
    if not path.is_file():
        return {}
    record = {**json.loads(path.read_text(encoding="utf-8")), **laid.summary}
    verdict = Verdict.from_record(record.get("verdict") or {})
    if laid.is_moved and laid.origin is not None:
        verdict = with_advice_of_place(
            verdict,
            record.get("cameras", ()),
            flying_height_m=flying_height_of_model_m(reconstruction, laid.onto_from_former),
            has_control=laid.has_control,
        )
    record["verdict"] = with_doubts(verdict, laid.doubts, is_moved=laid.is_moved).as_record()
    if has_products(run):
        record["dense"] = {**record.get("dense", {}), FORMER_FRAME: True}
    return {path: f"{json.dumps(record, indent=2)}\n".encode()}


def _events(path: Path, event: Event | None) -> dict[Path, bytes]:
    """The ``events.jsonl`` with one more event, at the time of the last one."""
    if event is None or not path.is_file():
        return {}
    lines = path.read_bytes().splitlines()
    at_s = json.loads(lines[-1]).get("at_s", 0.0) if lines else 0.0
    record = {**event.as_record(), "at_s": at_s}
    return {path: b"\n".join([*lines, json.dumps(record).encode(), b""])}
