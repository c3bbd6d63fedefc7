"""Sections about where things are: plan, products, positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from markupsafe import Markup

from adapters.report import charts, pictures, plan, svg
from adapters.report.content import Figure, Section, Table
from adapters.report.map_figures import MapFigures
from adapters.report.run_record import RunRecord
from adapters.report.summary import (
    GeoreferenceRecord,
    GroundPointRecord,
    MovedRecord,
    ScaleBarRecord,
)
from adapters.report.words import MISSING, count, fixed, number, percent, short
from engine.errors import EngineError
from engine.types import MAP_UNITS, Float64Array

_MAX_ROWS = 20  # of a table
_CHECKS_SAY = "Check points took no part in placing the map: theirs is its accuracy."
_MAX_ARROWS = 400
_CHECK, _CONTROL = "check", "control"
_ARROW_LENGTH = 26.0  # of the longest usual one on the plan
_UNPLACED = {
    "m": "Without positions north is unknown.",
    MAP_UNITS: "Without positions north and scale are unknown.",
}
_ENLARGEMENTS = (1.0, 2.0, 5.0)


def plan_section(record: RunRecord) -> Section:
    """Cameras from above, and how well the ground is covered."""
    figures = record.map
    if figures is None or len(figures.frame_ids) < 2:
        return Section(
            key="plan", title="Plan", missing=(_no_map(record),), tables=tuple(_maps(record))
        )
    verdict = record.verdict
    flagged = plan.flagged_keyframes(verdict.reasons if verdict is not None else ())
    missing: list[str] = []
    coverage = _coverage(record, missing)
    covered = _coverage_figure(record, figures, coverage)
    words = _coverage_words(coverage) if covered is None else ""
    return Section(
        key="plan",
        title="Plan and coverage" if coverage is not None else "Plan",
        words=(words,) if words else (),
        figures=(
            _from_above(record, figures, flagged),
            covered or _from_the_side(record, figures),
        ),
        tables=tuple(_maps(record)),
        missing=tuple(missing),
    )


def _from_above(record: RunRecord, figures: MapFigures, flagged: set[int]) -> Figure:
    frame = plan.plan_of(record, figures)
    legend = [("camera", "keyframe"), ("ring", "the first one")]
    is_named = not flagged.isdisjoint(figures.frame_ids.tolist())
    legend += [("camera flagged", "named by the verdict")] * is_named
    north = "North is up." if record.is_georeferenced else _UNPLACED[record.unit]
    return Figure(
        title="Cameras from above",
        picture=frame.drawing(
            plan.points_picture(frame, figures),
            *plan.cameras(frame, record, figures, flagged=flagged),
            label=f"{count(len(figures.frame_ids), 'camera')} and the map's points from above",
        ),
        caption=f"{_extent(record, figures)} {north}".strip(),
        legend=tuple(legend),
    )


def _from_the_side(record: RunRecord, figures: MapFigures) -> Figure:
    frame = plan.side_of(record, figures)
    return Figure(
        title="Cameras from the side",
        picture=frame.drawing(
            plan.points_picture(frame, figures),
            *plan.cameras(frame, record, figures, flagged=set()),
            label=f"{count(len(figures.frame_ids), 'camera')} and the map's points from the side",
        ),
    )


def _coverage_figure(
    record: RunRecord, figures: MapFigures, coverage: plan.Coverage | None
) -> Figure | None:
    """How well the ground is seen; None where that cannot be placed beside the cameras."""
    if coverage is None or not (record.is_georeferenced and coverage.areas):
        return None
    frame = plan.plan_of(record, figures)
    names = {"good": "seen well", "thin": "seen thinly", "hole": "hole"}
    return Figure(
        title="Coverage of the ground",
        picture=frame.drawing(
            *plan.areas(frame, coverage),
            *plan.cameras(frame, record, figures, flagged=set()),
            label="Ground that is seen well, thinly or not at all, from above",
        ),
        caption=_coverage_words(coverage),
        legend=tuple(
            (f"area {key}", words) for key, words in names.items() if key in coverage.areas
        ),
    )


def _no_map(record: RunRecord) -> str:
    why = record.missing.get("latest/sparse/0")
    return f"No map to draw: latest/sparse/0 {why}." if why else "There is no map to draw."


def _extent(record: RunRecord, figures: MapFigures) -> str:
    if not record.is_georeferenced:
        return ""
    east, north, up = np.ptp(figures.centers, axis=0).tolist()
    return (
        f"The cameras span {number(east)} m from west to east, {number(north)} m from south to"
        f" north and {number(up)} m in height."
    )


def _coverage(record: RunRecord, missing: list[str]) -> plan.Coverage | None:
    place = record.summary.georeference
    try:
        return plan.read_coverage(record.path, place.origin if place is not None else None)
    except (OSError, ValueError) as error:
        missing.append(f"Coverage cannot be shown: {short(_why(error))}.")
        return None


def _coverage_words(coverage: plan.Coverage | None) -> str:
    """How much of the ground is seen how well; "" where that is not known."""
    if coverage is None or not coverage.shares:
        return ""
    words = {
        "good": "is seen well: by three keyframes or more, at 5 degrees or more, with a surface",
        "thin": "thinly: by fewer, from too near to each other, or without a surface",
        "hole": "not at all, between ground that is seen",
    }
    shares = [
        f"{percent(coverage.shares[key])} {words[key]}" for key in words if key in coverage.shares
    ]
    return f"Of the ground that was flown over {'; '.join(shares)}."


def _maps(record: RunRecord) -> Iterator[Table]:
    maps = record.summary.maps
    if len(maps) < 2:
        return
    yield Table(
        title="Parts that nothing joins are maps of their own",
        head=("map", "keyframes", "points", "error", "from", "to"),
        rows=tuple(
            (
                f"sparse/{number}",
                f"{one.registered_keyframes:,}",
                f"{one.num_points3D:,}",
                f"{fixed(one.mean_reprojection_error_px)} px",
                short(one.first_keyframe, at_most=40),
                short(one.last_keyframe, at_most=40),
            )
            for number, one in enumerate(maps[:_MAX_ROWS])
        ),
        note=_more(len(maps)),
    )


def _more(num: int) -> str:
    return f"{num - _MAX_ROWS:,} more are in summary.json." if num > _MAX_ROWS else ""


# -- products -----------------------------------------------------------------------------------

_FORMER_FRAME = (
    "The products lie in the former frame of the map: it was laid out later, and they could not be"
    " made again there."
)
_NO_GEOTIFF = (
    "Orthophoto and surface model are PNGs with world files, in metres east and north of the"
    " map's origin, because packages of the extra survey are missing. For GeoTIFFs in the UTM"
    " zone: tools/setup survey, then livesfm resume with this run."
)


def products_section(record: RunRecord) -> Section | None:
    """Pictures of what was made: orthophoto, surface, dense points; None where nothing was."""
    missing = [_FORMER_FRAME] * record.summary.dense.products_in_former_frame
    figures: list[Figure] = []
    for draw in (_orthophoto, _surface, _dense):
        try:
            figures += draw(record)
        except (OSError, ValueError, EngineError) as error:
            missing.append(f"{_PRODUCT_NAMES[draw]} cannot be shown: {short(_why(error))}.")
    if not (figures or missing):
        return None
    return Section(
        key="products",
        title="Products",
        words=(_NO_GEOTIFF,) * _lacks_geotiff(record),
        figures=tuple(figures),
        missing=tuple(missing),
    )


def _lacks_geotiff(record: RunRecord) -> bool:
    """Whether the orthophoto of a map with a place is a PNG."""
    is_placed = record.summary.georeference is not None
    is_former = record.summary.dense.products_in_former_frame
    return is_placed and not is_former and (record.path / "products" / "orthophoto.png").exists()


def _raster_in_words(raster: pictures.Raster, unit: str) -> str:
    """A raster's file, size, and where it lies."""
    width, height = raster.size
    cell = f", {number(raster.cell)} {unit} a pixel" if raster.cell is not None else ""
    crs = f", EPSG:{raster.epsg}" if raster.epsg is not None else ""
    return f"products/{raster.name}: {width:,} x {height:,} px{cell}{crs}."


def _orthophoto(record: RunRecord) -> list[Figure]:
    raster = pictures.read_raster(record.path / "products" / "orthophoto")
    if raster is None:
        return []
    return [
        Figure(
            title="Orthophoto",
            picture=pictures.raster_element(
                np.asarray(raster.values, np.uint8),
                shown_cell=raster.shown_cell,
                unit=record.unit,
                label="The orthophoto, small",
            ),
            caption=_raster_in_words(raster, record.unit),
        )
    ]


def _surface(record: RunRecord) -> list[Figure]:
    raster = pictures.read_raster(record.path / "products" / "dsm")
    if raster is None or raster.values.ndim != 2:
        return []
    heights = np.asarray(raster.values, np.float32)
    shaded, low, high = pictures.hillshade(heights, raster.shown_cell or 1.0)
    return [
        Figure(
            title="Surface model",
            picture=pictures.raster_element(
                shaded,
                shown_cell=raster.shown_cell,
                unit=record.unit,
                label="Heights of the surface, shaded",
            ),
            caption=f"{_raster_in_words(raster, record.unit)} From blue,"
            f" {fixed(low, 1)} {record.unit}, to light red, {fixed(high, 1)} {record.unit}; lit"
            " from the north-west.",
        )
    ]


def _dense(record: RunRecord) -> list[Figure]:
    """What a keyframe in the middle saw, and what the dense map holds there."""
    path, figures = record.path / "products" / "dense.ply", record.map
    if figures is None or not path.exists():
        return []
    row = len(figures.frame_ids) // 2
    frame_id, name = int(figures.frame_ids[row]), figures.names[row]
    drawn = pictures.dense_view(path, figures, frame_id)
    if drawn is None:
        raise ValueError("it is of another world than the newest snapshot")
    shown = short(record.name_of(frame_id), at_most=60)
    found = []
    image = pictures.read_keyframe_image(record.path / "images" / name)
    if image is not None:
        found.append(
            Figure(
                title="A keyframe",
                picture=pictures.image_element(image, label=f"The image of {shown}"),
                caption=f"{shown}, from the middle of the run.",
                needs_map=False,
            )
        )
    dense = Figure(
        title="The dense map, seen from there",
        picture=pictures.image_element(
            drawn, label=f"Dense points as the camera of {shown} sees them"
        ),
        caption="products/dense.ply; what is empty has no depth.",
    )
    return [*found, dense]


_PRODUCT_NAMES: dict[Callable[[RunRecord], list[Figure]], str] = {
    _orthophoto: "The orthophoto",
    _surface: "The surface model",
    _dense: "The dense map",
}


# -- positions ----------------------------------------------------------------------------------


def positions_section(record: RunRecord) -> Section | None:
    """How far the map lies from positions and ground points; None where there were none."""
    place = record.summary.georeference
    if place is None:
        why, bars = record.summary.not_georeferenced, record.summary.scale_bars
        if not (why or bars):
            return None
        return Section(
            key="positions",
            title="Scale" if bars and not why else "Positions",
            words=(f"The map is not on the globe: {why}.",) * bool(why),
            tables=tuple(_scale_bars(bars)),
        )
    offsets = {} if place.gcp else _offsets(place)
    figures: list[Figure] = []
    if record.map is not None and len(record.map.frame_ids) >= 2:
        figures += _offset_plan(record, record.map, place, offsets)
    figures += _offset_histograms(place, offsets)
    missing = [_NO_DIRECTIONS] if place.residuals_m and not (offsets or place.gcp) else []
    return Section(
        key="positions",
        title="Ground control points" if place.gcp else "Positions",
        words=tuple(_position_words(place)),
        figures=tuple(figures),
        tables=(
            *_position_table(place, offsets),
            *_ground_points(place),
            *_rejected(place),
            *_left_out_points(place),
            *_scale_bars(place.scale_bars),
        ),
        missing=tuple(missing),
    )


_NO_DIRECTIONS = "An older version wrote this run: it kept distances to positions, not directions."


def _position_words(place: GeoreferenceRecord) -> Iterator[str]:
    origin = place.origin
    height = f", altitude {fixed(origin.altitude_m, 1)} m" if origin.altitude_m is not None else ""
    yield (
        "The map is in metres east, north, up of latitude"
        f" {fixed(origin.latitude_deg, 7)}°, longitude {fixed(origin.longitude_deg, 7)}°{height}."
    )
    if place.gcp:
        yield f"{count(place.num_positions, 'control point')} placed it."
        if place.moved_from_positions is not None:
            yield _moved_words(place.moved_from_positions)
        return
    num = len(place.rejected)
    others = (
        f"; {count(num, 'position')} did not agree and {'was' if num == 1 else 'were'} left out"
        if num
        else ", and none disagreed"
    )
    yield f"{count(place.num_positions, 'position')} placed it{others}."


def _moved_words(moved: MovedRecord) -> str:
    """How far apart control points and positions are, with the likely cause if far."""
    height = f" and {number(moved.up_m)} m in height" if moved.up_m is not None else ""
    words = (
        f"The cameras lie {number(moved.horizontal_m)} m horizontally{height} from where positions"
        " had them"
    )
    if not moved.is_far:
        return f"{words}."
    return (
        f"{words}: positions are hardly that wrong, so that the file of the control points probably"
        " names another coordinate system than theirs (UTM zone, hemisphere, datum)."
    )


def _offsets(place: GeoreferenceRecord) -> dict[str, Float64Array]:
    """From position to camera, east, north, up (3,), NaN where not known; by keyframe."""
    return {
        name: np.array([math.nan if one is None else one for one in offset])
        for name, offset in place.offsets_enu_m.items()
        if offset[0] is not None and offset[1] is not None
    }


def _used(place: GeoreferenceRecord, offsets: dict[str, Float64Array]) -> Float64Array:
    """Offsets (N, 3) of the positions that placed the map."""
    rejected = set(place.rejected)
    used = [offset for name, offset in offsets.items() if name not in rejected]
    return np.array(used).reshape(-1, 3)


def _position_table(place: GeoreferenceRecord, offsets: dict[str, Float64Array]) -> Iterator[Table]:
    used = _used(place, offsets)
    if not len(used):
        return
    horizontal = np.hypot(used[:, 0], used[:, 1])
    rows = [
        _offset_row("horizontal", horizontal),
        *(
            _offset_row(name, used[:, axis][np.isfinite(used[:, axis])])
            for axis, name in enumerate(("east", "north", "up"))
        ),
    ]
    yield Table(
        title="From positions to cameras in the map, m",
        head=("direction", "mean", "root mean square", "largest"),
        rows=tuple(row for row in rows if row),
        note="Of the positions that placed the map. Positions as receivers report them scatter by"
        " metres, with RTK by centimetres: this is no accuracy of the map.",
        needs_map=True,
    )


def _offset_row(name: str, values: Float64Array) -> tuple[str, ...]:
    if not len(values):
        return ()
    rms = math.sqrt(float(np.mean(values**2)))
    return (name, fixed(float(values.mean())), fixed(rms), fixed(float(np.abs(values).max())))


def _offset_plan(
    record: RunRecord,
    figures: MapFigures,
    place: GeoreferenceRecord,
    offsets: dict[str, Float64Array],
) -> Iterator[Figure]:
    frame = plan.plan_of(record, figures, has_points=False)
    rows = [row for row, name in enumerate(figures.names) if name in offsets]
    if not rows:
        return
    used = _used(place, offsets)
    usual = np.percentile(np.hypot(used[:, 0], used[:, 1]), 95) if len(used) else 0.0
    factor = _enlargement(_ARROW_LENGTH / max(frame.length_per_unit * float(usual), 1e-9))
    parts = [svg.polyline(map(tuple, frame.places(figures.centers).tolist()), class_="way")]
    rejected, step = set(place.rejected), max(1, -(-len(rows) // _MAX_ARROWS))
    for row in rows:
        name = figures.names[row]
        if row % step and name not in rejected:
            continue
        center, offset = figures.centers[row], offsets[name]
        ((x1, y1),) = frame.places(center[None]).tolist()
        tip = f"{name}: {fixed(float(np.hypot(*offset[:2])))} m"
        if name in rejected:
            parts.append(svg.cross(x1, y1, 5.0, class_="mark wrong", title=tip))
            continue
        end = center - factor * np.array([offset[0], offset[1], 0.0])
        ((x2, y2),) = frame.places(end[None]).tolist()
        parts.append(svg.line(x1, y1, x2, y2, class_="arrow"))
        parts.append(svg.circle(x2, y2, 2.0, class_="dot s2", title=tip))
    legend = [("arrow", "from camera to position")]
    legend += [("mark wrong", "position left out")] * bool(rejected)
    yield Figure(
        title="Horizontal distances to positions",
        picture=frame.drawing(*parts, label="From each camera to its position, from above"),
        caption=f"From each camera in the map to its measured position, {_times(factor)}."
        " Lines that point the same way over a stretch show a drift or a late clock.",
        legend=tuple(legend),
    )


def _times(factor: float) -> str:
    """How much larger than in truth something is drawn."""
    return "at its true length" if factor == 1.0 else f"{factor:g} times as long"


def _enlargement(wanted: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above a positive value."""
    wanted = max(wanted, 1e-9)
    power = 10.0 ** math.floor(math.log10(wanted))
    return max(one * power for one in _ENLARGEMENTS if one * power <= wanted * (1 + 1e-9))


def _offset_histograms(
    place: GeoreferenceRecord, offsets: dict[str, Float64Array]
) -> Iterator[Figure]:
    used = _used(place, offsets)
    if place.gcp:
        return
    if not len(used):
        distances = [one for one in place.residuals_m.values() if one is not None and one >= 0.0]
        if distances:
            yield Figure(
                title="Distances to positions",
                picture=_histogram(np.array(distances), "m from position to camera"),
            )
        return
    yield Figure(
        title="Horizontal distances and vertical offsets",
        picture=Markup("").join(
            _histogram(values, x_words)
            for values, x_words in (
                (np.hypot(used[:, 0], used[:, 1]), "m from position to camera, horizontally"),
                (used[:, 2][np.isfinite(used[:, 2])], "m that the camera is above its position"),
            )
            if len(values)
        ),
        caption="Of the positions that placed the map.",
    )


def _histogram(values: Float64Array, x_words: str) -> Markup:
    return charts.histogram(
        values,
        x_words=x_words,
        y_words="positions",
        label=f"Histogram of {len(values):,} positions: {x_words}",
        num_bins=int(np.clip(math.sqrt(len(values)) * 2, 6, 30)),
    )


def _ground_points(place: GeoreferenceRecord) -> Iterator[Table]:
    if not place.gcp:
        return
    points = sorted(place.gcp, key=lambda one: (not one.is_check, one.name))
    rows = [
        (
            short(one.name, at_most=40),
            _kind_of(one),
            str(one.num_images),
            fixed(one.residual_px),
            *(fixed(error, 3) for error in one.error_m or (None, None, None)),
            fixed(_length(one), 3),
        )
        for one in points[: 2 * _MAX_ROWS]
    ]
    for is_check, name in ((True, "all check points, rms"), (False, "all control points, rms")):
        kind = _CHECK if is_check else _CONTROL
        own = [one for one in place.gcp if _kind_of(one) == kind and _length(one) is not None]
        if own:
            errors = np.array([one.error_m for one in own], np.float64)
            rms = np.sqrt(np.mean(errors**2, axis=0))
            rows.append(
                (
                    name,
                    kind,
                    MISSING,
                    MISSING,
                    *(fixed(float(one), 3) for one in rms),
                    fixed(float(np.linalg.norm(rms)), 3),
                )
            )
    num_more = len(points) - len(points[: 2 * _MAX_ROWS])
    notes = [
        *([_CHECKS_SAY] if any(one.is_check for one in points) else []),
        *([f"{num_more:,} more are in summary.json."] if num_more else []),
    ]
    yield Table(
        title="Ground points, m",
        head=("point", "kind", "images", "error in images, px", "east", "north", "up", "distance"),
        rows=tuple(rows),
        note=" ".join(notes),
        needs_map=True,
    )


def _kind_of(point: GroundPointRecord) -> str:
    """What a ground point was for."""
    if point.is_check:
        return _CHECK
    return _CONTROL if point.is_used else "control, not used"


def _left_out_points(place: GeoreferenceRecord) -> Iterator[Table]:
    left_out = list(place.gcp_left_out.items())
    if left_out:
        yield Table(
            title="Ground points that were left out",
            head=("point", "reason"),
            rows=tuple((short(name, at_most=40), short(why)) for name, why in left_out[:_MAX_ROWS]),
            note=_more(len(left_out)),
            is_text=True,
        )


def _scale_bars(bars: Sequence[ScaleBarRecord]) -> Iterator[Table]:
    if bars:
        yield Table(
            title="Scale bars, m",
            head=("between", "known", "in the map", "error"),
            rows=tuple(
                (
                    f"{short(one.ends[0], at_most=30)} and {short(one.ends[1], at_most=30)}",
                    *(fixed(value, 3) for value in (one.length_m, one.in_map_m, one.error_m)),
                )
                for one in bars[:_MAX_ROWS]
            ),
            note=_more(len(bars)),
            needs_map=True,
        )


def _length(point: GroundPointRecord) -> float | None:
    """How far a ground point is off."""
    if point.error_m is None or any(one is None for one in point.error_m):
        return None
    return math.hypot(*(one for one in point.error_m if one is not None))


def _rejected(place: GeoreferenceRecord) -> Iterator[Table]:
    if not place.rejected or place.gcp:
        return
    rows = []
    for name in place.rejected[:_MAX_ROWS]:
        distance = place.residuals_m.get(name)
        is_known = distance is not None and distance >= 0.0
        rows.append((short(name, at_most=60), f"{fixed(distance)} m" if is_known else MISSING))
    yield Table(
        title="Positions that were left out",
        head=("keyframe", "distance to the map"),
        rows=tuple(rows),
        note=_more(len(place.rejected)),
        needs_map=True,
    )


def _why(error: Exception) -> str:
    """An error in a line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split()) or type(error).__name__
