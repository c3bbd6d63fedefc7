"""Sections about how well the map agrees with itself: calibration, residuals, links, tracks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adapters.report import charts, pictures, plan, svg
from adapters.report.content import Figure, Section, Table
from adapters.report.map_figures import MAX_RESIDUAL_KEYFRAMES, KeyframeResiduals, MapFigures
from adapters.report.run_record import RunRecord
from adapters.report.summary import CameraRecord
from adapters.report.words import (
    MISSING,
    count,
    fixed,
    listed,
    number,
    percent,
    plain,
    short,
)
from engine.types import BoolArray, Float64Array, Int64Array, Uint8Array

_MAX_CAMERAS = 12
_MAX_WORST = 8
_GRID = (16, 12)  # cells of an image along its longer and its shorter side
_LEAST_IN_CELL = 4  # observations
_IMAGE_ROOM = (340.0, 255.0)  # of the drawing, across and down
_MATRIX_CELLS = 240  # of the match graph, along a side
_MAX_LINKS = 1_500  # that are drawn on the plan
_FEW_LINKS = 3  # of a keyframe, from which its place is not confirmed
_MAX_TRACK = 20
_ORIGINS = {
    "configured": "the settings",
    "file": "a calibration file",
    "known": "the source",
    "exif": "EXIF",
    "exif_35mm": "EXIF, 35 mm equivalent",
    "pointmaps": "the matcher",
    "two_view_geometries": "pairs of images",
    "recognised": "trial maps by several lenses",
    "assumed": "a usual lens",
}
_BLUE = (47, 111, 219)


# -- calibration --------------------------------------------------------------------------------


def cameras_section(record: RunRecord) -> Section:
    """The cameras' calibrations, and where they began."""
    cameras = record.summary.cameras
    if not cameras:
        return Section(
            key="cameras",
            title="Cameras",
            missing=("No calibration: summary.json has no cameras.",),
        )
    shown = cameras[:_MAX_CAMERAS]
    rows = [
        (
            _camera_name(one),
            f"{one.model}, {one.width:,} x {one.height:,} px",
            f"{number(one.focal_px, 5)} px",
            f"{number(one.prior_focal_px, 5)} px by {_ORIGINS.get(one.origin, plain(one.origin))}",
            _moved(one),
            percent(one.observed_sigma_ratio) if one.observed_sigma_ratio is not None else MISSING,
            f"{fixed(one.fov_deg, 1)}°" if one.fov_deg is not None else MISSING,
            f"{one.registered_keyframes:,}",
        )
        for one in shown
    ]
    params = [
        (_camera_name(one), ", ".join(f"{value:.6g}" for value in one.params)) for one in shown
    ]
    note = f"{len(cameras) - len(shown):,} more are in summary.json." * (len(cameras) > len(shown))
    return Section(
        key="cameras",
        title="Cameras",
        words=tuple(
            f"{_camera_name(one)}: {short(doubt, at_most=300)}."
            for one in shown
            for doubt in one.doubts
        ),
        figures=(_calibration_figure(shown),) if any(map(_is_refined, shown)) else (),
        tables=(
            Table(
                title="Calibration in the map, against what was known before",
                head=(
                    *("camera", "model", "focal length", "before", "change"),
                    *("sigma", "view", "keyframes"),
                ),
                rows=tuple(rows),
                note=note,
                needs_map=True,
                is_text=True,
            ),
            Table(
                title="Parameters in COLMAP's order",
                head=("camera", "parameters"),
                rows=tuple(params),
                needs_map=True,
                is_text=True,
            ),
        ),
    )


def _camera_name(camera: CameraRecord) -> str:
    return short(camera.key.replace("|", " · "), at_most=60) or "the camera"


def _moved(camera: CameraRecord) -> str:
    if camera.is_constant:
        return "held as given"
    change = f"{100.0 * camera.moved_ratio:+.1f} %"
    return f"{change}, held" if camera.is_held else change


def _is_refined(camera: CameraRecord) -> bool:
    return not camera.is_constant and camera.prior_focal_px > 0.0


def _calibration_figure(cameras: Sequence[CameraRecord]) -> Figure:
    """Focal lengths of the map over what was known before."""
    refined = [one for one in cameras if _is_refined(one)]
    reach = max(
        max(
            abs(one.moved_ratio) + (one.observed_sigma_ratio or 0.0),
            min(one.prior_sigma_ratio, 1.0),
        )
        for one in refined
    )
    reach = max(1.1 * reach, 0.005)
    row_height, foot = 34.0, 34.0
    height = row_height * len(refined) + foot

    def x(ratio: float) -> float:
        return 20.0 + (max(-reach, min(ratio, reach)) + reach) / (2 * reach) * 320.0

    parts = []
    for ratio, _ in svg.ticks(-reach, reach, at_most=5):
        parts.append(svg.line(x(ratio), 0, x(ratio), height - foot, class_="grid"))
        parts.append(
            svg.text(
                x(ratio),
                height - foot + 15,
                f"{100 * ratio:+.3g} %" if ratio else "0 %",
                anchor="middle",
            )
        )
    for row, one in enumerate(refined):
        y = row * row_height + 22.0
        low, high = x(-one.prior_sigma_ratio), x(one.prior_sigma_ratio)
        parts.append(svg.text(20, y - 11, _camera_name(one), class_="ink"))
        parts.append(
            svg.element("rect", x=low, y=y - 6, width=max(high - low, 1), height=12, class_="band")
        )
        sigma = one.observed_sigma_ratio or 0.0
        ends = x(one.moved_ratio - sigma), x(one.moved_ratio + sigma)
        parts.append(svg.line(ends[0], y, ends[1], y, class_="curve s1"))
        parts.append(svg.circle(x(one.moved_ratio), y, 4, class_="dot s1"))
    parts.append(
        svg.text(340, height - 4, "change of the focal length", anchor="end", class_="dim name")
    )
    return Figure(
        title="Focal lengths against what was known before",
        picture=svg.drawing(
            *parts, width=360, height=height, label="Focal lengths of the map over those before it"
        ),
        caption="The band is what was known before, the dot what the map says, each with one"
        " standard deviation.",
        legend=(("band", "before"), ("dot s1", "in the map")),
    )


# -- residuals ----------------------------------------------------------------------------------


def residuals_section(record: RunRecord) -> Section:
    """Reprojection errors by keyframe and by place in the image."""
    figures = record.map
    if figures is None or not any(len(one.xy) for one in figures.residuals):
        return Section(
            key="residuals",
            title="Residuals",
            missing=("No residuals: there is no map to measure them in.",),
        )
    measured = [one for one in figures.residuals if len(one.xy)]
    words = []
    if len(figures.frame_ids) > MAX_RESIDUAL_KEYFRAMES:
        words.append(
            f"Measured in {len(figures.residuals):,} of {len(figures.frame_ids):,} keyframes,"
            " evenly spread over the run."
        )
    return Section(
        key="residuals",
        title="Residuals",
        words=tuple(words),
        figures=(
            _errors_over_keyframes(record, figures, measured),
            *_errors_in_image(record, measured),
        ),
        tables=(_worst(record, measured),),
    )


def _errors_over_keyframes(
    record: RunRecord, figures: MapFigures, measured: Sequence[KeyframeResiduals]
) -> Figure:
    order = _order_of(record, figures)
    x = np.array([order[one.frame_id] for one in measured], np.float64)
    mean = np.array([one.errors_px.mean() for one in measured])
    high = np.array([np.percentile(one.errors_px, 90) for one in measured])
    placed = set(figures.frame_ids.tolist())
    absent = np.array([place for i, place in order.items() if i not in placed], np.float64)
    legend = [("curve s1", "mean"), ("curve s2", "90th percentile")]
    legend += [("mark wrong", "not in this map")] * bool(len(absent))
    return Figure(
        title="Reprojection error by keyframe",
        picture=charts.course(
            x,
            [("s2", high), ("s1", mean)],
            x_words="keyframe, in order of arrival",
            y_words="px",
            label=f"Reprojection errors of {len(measured):,} keyframes, means from"
            f" {fixed(float(mean.min()))} to {fixed(float(mean.max()))} px",
            marks=absent,
        ),
        legend=tuple(legend),
        caption=f"{count(len(absent), 'keyframe')} of {len(order):,} "
        f"{'is' if len(absent) == 1 else 'are'} not in this map."
        if len(absent)
        else "",
    )


def _order_of(record: RunRecord, figures: MapFigures) -> dict[int, int]:
    """The places of all keyframes in their order of arrival, from 1."""
    ids = sorted(set(record.events.keyframes) | set(figures.frame_ids.tolist()))
    return {frame_id: place for place, frame_id in enumerate(ids, start=1)}


def _errors_in_image(record: RunRecord, measured: Sequence[KeyframeResiduals]) -> Iterator[Figure]:
    """Mean residual vectors by place in the image, of the cameras with most keyframes."""
    by_camera: dict[tuple[int, tuple[int, int]], list[KeyframeResiduals]] = defaultdict(list)
    for one in measured:
        by_camera[one.camera_id, one.size].append(one)
    most = sorted(by_camera.items(), key=lambda item: -len(item[1]))[:2]
    for (_, size), own in most:
        yield _image_figure(size, own, name=f" ({len(own)} keyframes)" if len(most) > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cells:
    """Means of residuals by place in an image. C: its cells, line by line."""

    columns: int
    lines: int
    is_known: BoolArray  # (C,) enough observations lie there
    mean_xy: Float64Array  # (C, 2) px, of the vectors from observation to projection
    error_px: Float64Array  # (C,) mean of their lengths


def _cells_of(size: tuple[int, int], own: Sequence[KeyframeResiduals]) -> _Cells:
    width, height = size
    columns, lines = _GRID if width >= height else _GRID[::-1]
    xy = np.concatenate([one.xy for one in own])
    offsets = np.concatenate([one.offsets_xy for one in own])
    column = np.clip((xy[:, 0] / width * columns).astype(np.int64), 0, columns - 1)
    row = np.clip((xy[:, 1] / height * lines).astype(np.int64), 0, lines - 1)
    cell, num_cells = row * columns + column, columns * lines
    num = np.bincount(cell, minlength=num_cells)
    values = [offsets[:, 0], offsets[:, 1], np.linalg.norm(offsets, axis=1)]
    sums = np.stack([np.bincount(cell, one, minlength=num_cells) for one in values], axis=1)
    means = sums / np.maximum(num, 1)[:, None]
    return _Cells(
        columns=columns,
        lines=lines,
        is_known=num >= _LEAST_IN_CELL,
        mean_xy=means[:, :2],
        error_px=means[:, 2],
    )


def _image_figure(size: tuple[int, int], own: Sequence[KeyframeResiduals], *, name: str) -> Figure:
    cells = _cells_of(size, own)
    scale = min(_IMAGE_ROOM[0] / size[0], _IMAGE_ROOM[1] / size[1])
    edge, tall = scale * size[0] / cells.columns, scale * size[1] / cells.lines
    longest = float(np.linalg.norm(cells.mean_xy[cells.is_known], axis=1).max(initial=0.0))
    enlarged = 0.9 * min(edge, tall) / longest if longest > 0.0 else 1.0
    top = float(cells.error_px[cells.is_known].max(initial=0.0)) or 1.0
    parts = []
    for place in np.flatnonzero(cells.is_known).tolist():
        x, y = 10 + place % cells.columns * edge, 1 + place // cells.columns * tall
        shade = 1 + min(int(4 * cells.error_px[place] / top), 3)
        parts.append(
            svg.element("rect", x=x, y=y, width=edge, height=tall, class_=f"heat heat{shade}")
        )
        middle_x, middle_y = x + edge / 2, y + tall / 2
        dx, dy = (enlarged * cells.mean_xy[place]).tolist()
        parts.append(
            svg.line(middle_x, middle_y, middle_x + dx, middle_y + dy, class_="arrow thin")
        )
        parts.append(svg.circle(middle_x, middle_y, 0.9, class_="dot ink"))
    width, height = edge * cells.columns, tall * cells.lines
    parts.append(svg.element("rect", x=10, y=1, width=width, height=height, class_="frame"))
    return Figure(
        title=f"Residuals in the image{name}",
        picture=svg.drawing(
            *parts,
            width=360,
            height=height + 2,
            label="Mean residuals by place in the image, as arrows and shades",
        ),
        caption=f"Mean of each place, from observation to projection: the longest arrow is"
        f" {number(longest, 2)} px. Darker places have larger errors, up to {fixed(top)} px on"
        " average. Arrows that turn around the middle or point outwards together show a lens that"
        " the model does not fit.",
    )


def _worst(record: RunRecord, measured: Sequence[KeyframeResiduals]) -> Table:
    worst = sorted(measured, key=lambda one: -float(one.errors_px.mean()))[:_MAX_WORST]
    return Table(
        title="Keyframes with the largest errors",
        head=("keyframe", "mean error, px", "90th percentile, px", "observations"),
        rows=tuple(
            (
                short(record.name_of(one.frame_id), at_most=60),
                fixed(float(one.errors_px.mean())),
                fixed(float(np.percentile(one.errors_px, 90))),
                f"{one.num_observations:,}",
            )
            for one in worst
        ),
        needs_map=True,
    )


# -- links --------------------------------------------------------------------------------------


def links_section(record: RunRecord) -> Section:
    """Which keyframes are joined by verified matches, and how strongly."""
    inliers = record.events.inliers
    if not inliers:
        why = record.missing.get("events.jsonl", "has no verified pair")
        return Section(key="links", title="Match graph", missing=(f"events.jsonl {why}.",))
    ids = sorted(set(record.events.keyframes) | {i for pair in inliers for i in pair})
    degree = Counter(i for pair in inliers for i in pair)
    weak = [i for i in ids if degree[i] < _FEW_LINKS]
    strengths = np.array(list(inliers.values()))
    pairs = record.summary.pairs
    rejected = f", {pairs.rejected:,} were matched and rejected" if pairs.rejected else ""
    words = [
        f"{count(len(inliers), 'pair')} of keyframes share verified matches{rejected}. Pairs"
        f" share {count(int(np.median(strengths)), 'match', 'matches')} in the median; a keyframe"
        f" is joined to {number(2 * len(inliers) / len(ids), 3)} others on average."
    ]
    if record.events.num_loops:
        words.append(f"{count(record.events.num_loops, 'loop')} closed.")
    if weak:
        names = [record.name_of(i) for i in weak]
        words.append(
            f"Joined to fewer than {_FEW_LINKS} others, so that little confirms their place:"
            f" {listed(names, at_most=8)}."
        )
    return Section(
        key="links",
        title="Match graph",
        words=tuple(words),
        figures=(_matrix(ids, inliers), *_links_on_plan(record, inliers)),
    )


def _matrix(ids: Sequence[int], inliers: dict[tuple[int, int], int]) -> Figure:
    """All pairs as a picture: how many matches keyframes share, or the strongest of several."""
    place = {frame_id: row for row, frame_id in enumerate(ids)}
    per_cell = max(1, -(-len(ids) // _MATRIX_CELLS))
    edge = -(-len(ids) // per_cell)
    strength: Int64Array = np.zeros((edge, edge), np.int64)
    rows = np.array([[place[i] // per_cell, place[j] // per_cell] for i, j in inliers])
    values = np.array(list(inliers.values()))
    for one, other in ((0, 1), (1, 0)):
        np.maximum.at(strength, (rows[:, one], rows[:, other]), values)
    enlarged = max(1, 480 // edge)
    picture: Uint8Array = np.zeros((edge, edge, 4), np.uint8)
    picture[..., :3] = _BLUE
    share = np.log1p(strength) / np.log1p(max(int(strength.max()), 1))
    picture[..., 3] = np.where(strength > 0, 40 + 215 * share, 0).astype(np.uint8)
    picture = np.repeat(np.repeat(picture, enlarged, axis=0), enlarged, axis=1)
    left, top, side = 40.0, 6.0, 300.0
    parts = [
        svg.element("rect", x=left, y=top, width=side, height=side, class_="frame"),
        svg.element(
            "image",
            href=pictures.data_uri(picture, is_drawing=True),
            x=left,
            y=top,
            width=side,
            height=side,
        ),
    ]
    for value, number_words in svg.ticks(1, len(ids), at_most=6):
        at = (value - 0.5) / (edge * per_cell) * side
        parts.append(svg.text(left - 5, top + at + 4, number_words, anchor="end"))
        parts.append(svg.text(left + at, top + side + 15, number_words, anchor="middle"))
    parts.append(
        svg.text(
            left + side,
            top + side + 30,
            "keyframe, in order of arrival",
            anchor="end",
            class_="dim name",
        )
    )
    several = f" A cell stands for {per_cell} keyframes and has their strongest pair." * (
        per_cell > 1
    )
    return Figure(
        title="Who matches whom",
        picture=svg.drawing(
            *parts,
            width=360,
            height=top + side + 34,
            label=f"Matrix of {len(inliers):,} pairs of {len(ids):,} keyframes",
        ),
        caption=f"Darker: more verified matches, up to {int(values.max()):,}. The diagonal are"
        f" neighbours in time; marks away from it join places seen again.{several}",
        needs_map=False,
    )


def _links_on_plan(record: RunRecord, inliers: dict[tuple[int, int], int]) -> Iterator[Figure]:
    figures = record.map
    if figures is None or len(figures.frame_ids) < 2:
        return
    frame = plan.plan_of(record, figures, has_points=False)
    strongest = f"The strongest {_MAX_LINKS:,} of {len(inliers):,} pairs. " * (
        len(inliers) > _MAX_LINKS
    )
    yield Figure(
        title="Pairs from above",
        picture=frame.drawing(
            *plan.links(frame, figures, inliers, at_most=_MAX_LINKS),
            *plan.cameras(frame, record, figures, flagged=set()),
            label="Pairs of keyframes as lines, from above",
        ),
        caption=f"{strongest}Thicker: more verified matches.",
    )


# -- tracks -------------------------------------------------------------------------------------


def tracks_section(record: RunRecord) -> Section | None:
    """How many keyframes see a point; None without a map."""
    figures = record.map
    if figures is None or not len(figures.track_lengths):
        return None
    lengths = figures.track_lengths
    of_all = f" (of {len(lengths):,} of {figures.num_points3D:,} points)" * (
        len(lengths) < figures.num_points3D
    )
    share = float(np.mean(lengths >= 3))
    mean = record.summary.mean_track_length
    average = f" On average {fixed(mean)} keyframes see a point." if mean is not None else ""
    figure = Figure(
        title="Track lengths",
        picture=charts.count_histogram(
            Counter(lengths.tolist()),
            x_words=f"keyframes that see a point; the last bar: {_MAX_TRACK} or more"
            if int(lengths.max()) > _MAX_TRACK
            else "keyframes that see a point",
            y_words="points",
            label=f"Histogram of the track lengths of {len(lengths):,} points",
            at_most=_MAX_TRACK,
        ),
        caption=f"{percent(share, 3)} of the points are seen by three keyframes or more"
        f"{of_all}.{average}",
    )
    return Section(
        key="tracks", title="Tracks", figures=(figure, *_seen_per_keyframe(record, figures))
    )


def _seen_per_keyframe(record: RunRecord, figures: MapFigures) -> Iterator[Figure]:
    measured = figures.residuals
    order = _order_of(record, figures)
    x: Float64Array = np.array([order[one.frame_id] for one in measured], np.float64)
    seen = np.array([one.num_observations for one in measured], np.float64)
    yield Figure(
        title="Points seen by keyframe",
        picture=charts.course(
            x,
            [("s1", seen)],
            x_words="keyframe, in order of arrival",
            y_words="points",
            label=f"Points seen by {len(measured):,} keyframes, from {int(seen.min()):,} to"
            f" {int(seen.max()):,}",
        ),
        caption="Where few points hold a keyframe, its place is uncertain.",
    )
