"""Ground control: the map of a finished run laid onto surveyed points that are marked in images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from engine.config import Config
from engine.errors import ConfigError
from engine.estimators.marked_points import MarkedPoint, locate_marked_point
from engine.events import ControlPointsUsed
from engine.geo.control_points import ControlFit, PlacedPoint, lay_onto_control_points
from engine.geo.map_change import Anchors, MapChange
from engine.geo.map_shift import MapShift
from engine.geometry import camera_center, transform_points
from engine.mapping.stored_state import StoredModel
from engine.output.former_place import (
    BY_POSITIONS,
    FormerPlace,
    origin_record,
    place_by_positions,
)
from engine.output.georeferencing_later import Laid, refuse_unfinished, scale_words, write_laid
from engine.output.placement_doubts import (
    control_against_positions,
    control_disagreement,
    control_unchecked,
    far_move,
    wrong_bars,
)
from engine.output.run_lock import RunLock
from engine.output.snapshots import read_models
from engine.types import (
    METRES,
    ControlPoint,
    Float64Array,
    GpsFix,
    ImageMark,
    ScaleBar,
    VerdictLevel,
    VerdictReason,
)

_MAX_NAMED = 8  # in a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """What came of it, in lines for people."""

    lines: tuple[str, ...]
    snapshot: Path
    doubts: tuple[VerdictReason, ...] = ()  # about the place, now in the run's verdict
    remarks: tuple[str, ...] = ()  # sentences on it that are no doubts, likewise


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Located:
    """A point whose marks put it in the map."""

    point: ControlPoint
    marked: MarkedPoint
    image_names: tuple[str, ...]  # of the marks

    @property
    def num_images(self) -> int:
        return int(self.marked.agrees.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Marks:
    """The points of a survey in the first map of a run."""

    located: Mapping[str, _Located]  # by name
    problems: Mapping[str, str]  # why others are not there
    images_elsewhere: Mapping[str, str]  # images of marks that are not in the map, and why
    centers: Float64Array  # (C, 3) of all cameras of the map
    downwards: Float64Array  # (C, 3) the sum of their y and z axes

    @property
    def surveyed(self) -> list[_Located]:
        return [one for one in self.located.values() if one.point.fix is not None]

    def lines(self) -> list[str]:
        """What is left out, and why."""
        by_reason: dict[str, list[str]] = {}
        for name, why in self.images_elsewhere.items():
            by_reason.setdefault(why, []).append(name)
        lines = [
            f"marks in images that {why}: {_listed(names)}" for why, names in by_reason.items()
        ]
        lines += [f"not used: {name}: {why}" for name, why in self.problems.items()]
        for name, one in self.located.items():
            for image, error_px, agrees in zip(
                one.image_names, one.marked.residuals_px, one.marked.agrees, strict=True
            ):
                if not agrees:
                    lines.append(
                        f"not used: the mark of {name} in {image}: it is {error_px:.0f} px from"
                        " where the others have it"
                    )
        return lines


def survey_run(
    run: Path,
    points: Sequence[ControlPoint],
    *,
    bars: Sequence[ScaleBar],
    config: Config,
    arguments: Sequence[str] = (),
) -> Surveyed:
    """Lays the first map of a finished run onto control points and writes it as its next snapshot.

    Trajectories, ``summary.json`` and ``events.jsonl`` go with it. A scale bar gives the unit of a
    map without a place; where control points or positions place the map it is compared only.

    Args:
        run: a run folder that no run writes to.
        points: marks name images as the run does.
        bars: between points of these names.
        config: of the run.
        arguments: of the command line, kept for a run that goes on.

    Raises:
        ConfigError: the points do not fit the map, in words; or a run writes there, was
            interrupted there, or has no map.
        SnapshotError: the snapshot cannot be read or written.
    """
    is_surveyed = any(point.fix is not None for point in points)
    if not (is_surveyed or bars):
        raise ConfigError("no point of the file is surveyed, and there is no scale bar")
    lock = RunLock.acquire(run)
    try:
        refuse_unfinished(run, lock)
        models = read_models(run / "latest")
        marks = _marks_in(models, points, seed=config.runtime.seed)
        former = json.loads((run / "latest" / "snapshot.json").read_bytes()).get("georeference")
        if is_surveyed:
            laid, lines = _laid_onto_points(
                marks,
                bars,
                before=place_by_positions(models[0], former),
                was_in_metres=former is not None or _summary_of(run).get("unit") == METRES,
                config=config,
            )
        elif former is not None:
            laid, lines = _compared(run, marks, bars, former)
        else:
            laid, lines = _scaled(marks, bars)
        is_moved = is_surveyed or former is None
        path, products = write_laid(
            run, models, laid, config=config, arguments=arguments if is_moved else None
        )
    finally:
        lock.let_go()
    lines += [*marks.lines(), *([products] if products else []), f"written as {path}"]
    doubts = tuple(one for one in laid.doubts if one.level is not VerdictLevel.GOOD)
    remarks = tuple(one.sentence for one in laid.doubts if one.level is VerdictLevel.GOOD)
    return Surveyed(lines=tuple(lines), snapshot=path, doubts=doubts, remarks=remarks)


def _marks_in(
    models: Sequence[StoredModel], points: Sequence[ControlPoint], *, seed: int
) -> _Marks:
    reconstruction = models[0].reconstruction
    images = _images_by_name(reconstruction)
    elsewhere = {
        name: f"are in another map (sparse/{number})"
        for number, model in enumerate(models[1:], start=1)
        for name in _images_by_name(model.reconstruction)
    }
    located, problems, missing = {}, {}, {}
    for point in points:
        inside = [mark for mark in point.marks if mark.image_name in images]
        for mark in point.marks:
            if mark.image_name not in images:
                missing[mark.image_name] = elsewhere.get(mark.image_name, "are not in the map")
        found = _located(inside, images, reconstruction, seed=seed)
        if isinstance(found, str):
            problems[point.name] = found
        else:
            names = tuple(mark.image_name for mark in inside)
            located[point.name] = _Located(point=point, marked=found, image_names=names)
    poses = np.array([image.cam_from_world().matrix() for image in images.values()])
    return _Marks(
        located=located,
        problems=problems,
        images_elsewhere=missing,
        centers=camera_center(poses),
        downwards=poses[:, 1, :3] + poses[:, 2, :3],
    )


def _images_by_name(reconstruction: pycolmap.Reconstruction) -> dict[str, pycolmap.Image]:
    images = (reconstruction.image(i) for i in reconstruction.reg_image_ids())
    return {image.name: image for image in images}


def _located(
    marks: Sequence[ImageMark],
    images: Mapping[str, pycolmap.Image],
    reconstruction: pycolmap.Reconstruction,
    *,
    seed: int,
) -> MarkedPoint | str:
    own = [images[mark.image_name] for mark in marks]
    cameras = [reconstruction.camera(image.camera_id) for image in own]
    for mark, camera in zip(marks, cameras, strict=True):
        if not (0.0 <= mark.xy[0] <= camera.width and 0.0 <= mark.xy[1] <= camera.height):
            return (
                f"its mark at {mark.xy[0]:g}, {mark.xy[1]:g} is outside {mark.image_name}, which"
                f" has {camera.width} x {camera.height} px"
            )
    return locate_marked_point(
        np.array([mark.xy for mark in marks], np.float64).reshape(-1, 2),
        cameras,
        np.array([image.cam_from_world().matrix() for image in own]).reshape(-1, 3, 4),
        seed=seed,
    )


def _laid_onto_points(
    marks: _Marks,
    bars: Sequence[ScaleBar],
    *,
    before: FormerPlace | None,
    was_in_metres: bool,
    config: Config,
) -> tuple[Laid, list[str]]:
    surveyed = marks.surveyed
    placed = [
        PlacedPoint(point=one.point, place=one.marked.place, covariance=one.marked.covariance)
        for one in surveyed
    ]
    fit = lay_onto_control_points(
        placed,
        downwards=marks.downwards,
        config=config.georeference,
        seed=config.runtime.seed,
    )
    if isinstance(fit, str):
        left_out = marks.lines()
        raise ConfigError("; ".join([fit, *left_out] if surveyed else [*left_out, fit]))
    onto = fit.georeference.enu_from_map
    used_places_m = _scale_of(onto) * np.array([one.marked.place for one in surveyed])[fit.is_used]
    scale_std_ratio = _scale_std_ratio(used_places_m, rmse_m=fit.georeference.rmse_m)
    bar_records = _bar_records(marks, bars, onto, scale_std_ratio=scale_std_ratio)
    origin = fit.georeference.origin
    shift = None if before is None else before.shift_of(marks.centers, onto, onto=origin)
    change = None
    if before is not None and shift is not None and not shift.is_far:
        change = before.change_by(marks.centers, onto, now=_anchors(surveyed, fit))
    record = {
        **_record(surveyed, fit, marks, bar_records),
        **({} if before is None else {BY_POSITIONS: before.as_record()}),
        **({} if shift is None else {"moved_from_positions": _shift_record(shift, change)}),
    }
    check_errors_m = fit.errors_m[[one.point.is_check for one in surveyed]]
    rejected = _rejected(surveyed, fit)
    laid = Laid(
        onto_from_former=onto,
        origin=fit.georeference.origin,
        georeference=record,
        summary={
            "georeferenced": True,
            "georeference": record,
            "not_georeferenced": "",
            "unit": METRES,
            "metres_per_map_unit": 1.0,
        },
        has_control=True,  # at least three of them have heights
        doubts=(*_doubts(surveyed, fit, shift, change), *wrong_bars(bar_records)),
        event=ControlPointsUsed(
            num_control=int(fit.is_used.sum()),
            num_check=len(check_errors_m),
            rejected=tuple(rejected),
            rmse_m=fit.georeference.rmse_m,
            check_rmse_m=_rms(check_errors_m) if len(check_errors_m) else None,
            metres_per_map_unit=fit.georeference.metres_per_map_unit,
        ),
    )
    lines = _lines(surveyed, fit, rejected, was_in_metres=was_in_metres)
    return laid, [*lines, *_shift_lines(shift, origin), *_bar_lines(bar_records)]


def _anchors(surveyed: Sequence[_Located], fit: ControlFit) -> Anchors:
    """What holds a map that was laid onto control points."""
    placed = np.array([one.marked.place for one in surveyed])[fit.is_used]
    return Anchors(
        places_m=transform_points(fit.georeference.enu_from_map, placed),
        error_m=fit.expected_m,
        num_independent=len(placed),
    )


def _doubts(
    surveyed: Sequence[_Located],
    fit: ControlFit,
    shift: MapShift | None,
    change: MapChange | None,
) -> tuple[VerdictReason, ...]:
    """What speaks against the place by control points, and remarks."""
    num_control = sum(not one.point.is_check for one in surveyed)
    against = control_against_positions(change, num_control=num_control)
    apart = control_disagreement(
        fit.georeference.rmse_m, expected_m=fit.expected_m, num_control=num_control
    )
    doubts = (*_far(shift), *against, *apart)
    if doubts:
        return doubts
    return control_unchecked(
        num_control=int(fit.is_used.sum()), num_check=len(surveyed) - num_control
    )


def _far(shift: MapShift | None) -> tuple[VerdictReason, ...]:
    return far_move(
        shift,
        by="control points",
        from_where="positions",
        likely="the first line of their file probably names another coordinate system than that of"
        " its points (UTM zone, hemisphere, datum)",
    )


def _shift_record(shift: MapShift, change: MapChange | None) -> dict[str, object]:
    turned = {} if change is None else _change_record(change)
    return {
        "horizontal_m": round(shift.horizontal_m, 3),
        "up_m": None if shift.up_m is None else round(shift.up_m, 3),
        "is_far": shift.is_far,
        **turned,
    }


def _change_record(change: MapChange) -> dict[str, object]:
    """Tilt, turn and scale against positions, each with one standard deviation."""
    tilt, turn, scale = change.tilt_rad, change.turn_rad, change.scale_ratio
    return {
        "tilt_deg": round(math.degrees(tilt.value), 3),
        "tilt_std_deg": round(math.degrees(tilt.std), 3),
        "turn_deg": round(math.degrees(turn.value), 3),
        "turn_std_deg": round(math.degrees(turn.std), 3),
        "scale_ratio": round(scale.value, 5),
        "scale_std_ratio": round(scale.std, 5),
    }


def _shift_lines(shift: MapShift | None, origin: GpsFix) -> list[str]:
    """How far control points and positions are apart, and what is the likely cause if far."""
    if shift is None:
        return [
            "positions had not placed the map, so that nothing checks the file's coordinate system:"
            f" by it the map is at latitude {origin.latitude_deg:.5f}, longitude"
            f" {origin.longitude_deg:.5f}"
        ]
    lines = [f"the cameras are {shift.words} from where positions had them"]
    if not shift.is_far and shift.is_far_up:
        lines.append(
            "heights of the file and of positions may be above different levels (the ellipsoid, the"
            " sea, the place of the start), or in different units"
        )
    return lines


def _record(
    surveyed: Sequence[_Located],
    fit: ControlFit,
    marks: _Marks,
    bar_records: Sequence[Mapping[str, Any]],
) -> dict[str, object]:
    """The ``georeference`` of ``snapshot.json`` and ``summary.json``; lengths in metres."""
    found = fit.georeference
    control = [one.point.name for one in surveyed if not one.point.is_check]
    return {
        "origin": origin_record(found.origin),
        "axes": "east, north, up in metres from the origin",
        "metres_per_map_unit": found.metres_per_map_unit,
        "num_positions": found.num_inliers,
        "rmse_m": found.rmse_m,
        "rejected": _rejected(surveyed, fit),
        "residuals_m": dict(zip(control, np.round(found.residuals_m, 4).tolist(), strict=True)),
        "expected_m": round(fit.expected_m, 4),
        "gcp": [
            {
                "name": one.point.name,
                "is_check": one.point.is_check,
                "is_used": bool(is_used),
                "num_images": one.num_images,
                "residual_px": round(one.marked.residual_px, 3),
                "error_m": [None if np.isnan(x) else round(x, 4) for x in error_m.tolist()],
            }
            for one, error_m, is_used in zip(surveyed, fit.errors_m, fit.is_used, strict=True)
        ],
        "gcp_left_out": dict(marks.problems),
        "scale_bars": list(bar_records),
    }


def _rejected(surveyed: Sequence[_Located], fit: ControlFit) -> list[str]:
    """Names of control points that contradict the others."""
    rows = zip(surveyed, fit.is_used, strict=True)
    return [one.point.name for one, is_used in rows if not (is_used or one.point.is_check)]


def _lines(
    surveyed: Sequence[_Located], fit: ControlFit, rejected: Sequence[str], *, was_in_metres: bool
) -> list[str]:
    found = fit.georeference
    is_check = np.array([one.point.is_check for one in surveyed], np.bool_)
    lines = [
        f"map laid onto {found.num_inliers} control points: {_errors(fit.errors_m[fit.is_used])};"
        f" {scale_words(found.metres_per_map_unit, was_in_metres=was_in_metres)}"
    ]
    if is_check.any():
        number = int(is_check.sum())
        points = "check point" if number == 1 else "check points"
        lines.append(f"{number} {points}: {_errors(fit.errors_m[is_check])}")
    for one, error_m in zip(surveyed, fit.errors_m, strict=True):
        if one.point.name in rejected:
            lines.append(
                f"not used: control point {one.point.name} contradicts the others:"
                f" {_errors(error_m[None])}"
            )
    return lines


def _errors(errors_m: Float64Array) -> str:
    """Root mean squares in words."""
    horizontal_m = _rms(errors_m[:, :2])
    heights_m = errors_m[~np.isnan(errors_m[:, 2]), 2:]
    vertical = f", {_rms(heights_m):.3f} m vertically" if len(heights_m) else ""
    return f"{horizontal_m:.3f} m horizontally{vertical}"


def _rms(errors_m: Float64Array) -> float:
    """Of lengths of the rows (N, K); what is not known counts for nothing."""
    return float(np.sqrt((np.nan_to_num(errors_m) ** 2).sum(axis=1).mean()))


def _bar_records(
    marks: _Marks,
    bars: Sequence[ScaleBar],
    onto_from_former: Float64Array,
    *,
    scale_std_ratio: float,
) -> list[dict[str, Any]]:
    """Scale bars as the map has them once it was moved.

    Args:
        marks: in the map before.
        bars: between points of these.
        onto_from_former: (3, 4) the similarity that moves it, into metres.
        scale_std_ratio: one standard deviation of its scale by what placed it.
    """
    metres_per_unit = _scale_of(onto_from_former)
    records = []
    for bar in bars:
        measured_m = metres_per_unit * _length(marks, bar)
        marks_std_m = metres_per_unit * _length_std(marks, bar)
        records.append(
            {
                "ends": [bar.first, bar.second],
                "length_m": bar.length_m,
                "in_map_m": round(measured_m, 4),
                "error_m": round(measured_m - bar.length_m, 4),
                "std_m": round(math.hypot(marks_std_m, scale_std_ratio * measured_m), 4),
            }
        )
    return records


def _length(marks: _Marks, bar: ScaleBar) -> float:
    """The length of a bar in the map.

    Raises:
        ConfigError: one of its ends is not in the map.
    """
    for name in (bar.first, bar.second):
        if name not in marks.located:
            why = marks.problems.get(name, "there is no such point")
            raise ConfigError("; ".join([f"--scale-bar: {name}: {why}", *marks.lines()]))
    first, second = (marks.located[name].marked.place for name in (bar.first, bar.second))
    length = float(np.linalg.norm(first - second))
    if not length > 0.0:
        raise ConfigError(f"--scale-bar: {bar.first} and {bar.second} are one point in the map")
    return length


def _length_std(marks: _Marks, bar: ScaleBar) -> float:
    """One standard deviation of the length of a bar in the map, by the marks of its ends."""
    first, second = (marks.located[name].marked for name in (bar.first, bar.second))
    along = second.place - first.place
    along /= np.linalg.norm(along)
    variance = float(along @ (first.covariance + second.covariance) @ along)
    return math.sqrt(max(variance, 0.0))  # rounding makes tiny ones negative


def _scale_of(onto_from_former: Float64Array) -> float:
    """The factor of a similarity (3, 4)."""
    return float(np.cbrt(np.linalg.det(onto_from_former[:, :3])))


def _scale_std_ratio(places_m: Float64Array, *, rmse_m: float) -> float:
    """One standard deviation of the scale of a map whose errors may all go along with it.

    Args:
        places_m: (N, 3) in the map, of what lies at positions or control points.
        rmse_m: how far it is from these, root mean square.
    """
    spread_m = _rms(places_m - places_m.mean(axis=0))
    return rmse_m / max(spread_m, float(np.finfo(np.float64).tiny))


def _bar_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"scale bar {' to '.join(one['ends'])}: {one['in_map_m']:.4g} m in the map,"
        f" {one['length_m']:.4g} m measured"
        for one in records
    ]


def _compared(
    run: Path, marks: _Marks, bars: Sequence[ScaleBar], former: Mapping[str, Any]
) -> tuple[Laid, list[str]]:
    """A map that has a place keeps it, and its unit."""
    here = np.eye(3, 4)
    scale_std_ratio = _scale_std_ratio(marks.centers, rmse_m=float(former["rmse_m"]))
    records = _bar_records(marks, bars, here, scale_std_ratio=scale_std_ratio)
    summary = _summary_of(run).get("georeference") or former
    laid = Laid(
        onto_from_former=here,
        origin=GpsFix(**former["origin"]),
        georeference=former,
        summary={"georeference": {**summary, "scale_bars": records}},
        doubts=wrong_bars(records),
        is_moved=False,
    )
    return laid, ["the map has its unit from positions already", *_bar_lines(records)]


def _scaled(marks: _Marks, bars: Sequence[ScaleBar]) -> tuple[Laid, list[str]]:
    """The unit of a map without a place becomes the metre, by the bars' whole length."""
    metres_per_unit = sum(bar.length_m for bar in bars) / sum(_length(marks, bar) for bar in bars)
    onto = metres_per_unit * np.eye(3, 4)
    records = _bar_records(marks, bars, onto, scale_std_ratio=0.0)  # it is theirs
    laid = Laid(
        onto_from_former=onto,
        origin=None,
        georeference=None,
        summary={"unit": METRES, "metres_per_map_unit": 1.0, "scale_bars": records},
    )
    words = f"map scaled by {metres_per_unit:.4g}: its unit is the metre, its axes are as before"
    return laid, [words, *_bar_lines(records)]


def _summary_of(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
