"""The verdict as a report begins with it: its level, its reasons, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator

from adapters.live.verdict_words import level_in_words
from adapters.report.content import Headline, Reason, Tile
from adapters.report.run_record import RunRecord
from adapters.report.words import count, fixed, listed, number, shown_path
from engine.types import VerdictLevel

_RECORDING = "recording.rrd"
_WORDS = {
    VerdictLevel.GOOD: "Nothing was found that speaks against this map. That is evidence, not"
    " proof: check a known distance or a check point before the map is measured in.",
    VerdictLevel.DOUBTFUL: "Parts of this map may be wrong. Do not rely on it before the reasons"
    " below have been looked into.",
    VerdictLevel.WRONG: "Do not use this map: strong evidence says that cameras are not where it"
    " puts them. No figure or picture below can be relied on.",
}
_WARNINGS = {
    VerdictLevel.DOUBTFUL: "of a map judged doubtful",
    VerdictLevel.WRONG: "of a map judged wrong",
}
_NO_MAP = "No map was made: the sections below show what came in and what became of it."
_UNFINISHED = (
    "The run has not come to its end: it was killed, or it still goes on. What follows is its"
    " newest snapshot, without the adjustment that finishes a map."
)
# What helps, by the kind of a reason; its sentence says the rest.
_REMEDIES = {
    "overlay": "Paint what is fixed to the picture black in an image of the camera's size, and run"
    " again with --mask FILE.",
    "camera_focal": "Give the camera's calibration: --calibration FILE (COLMAP, OpenCV, ROS or"
    " Kalibr), or --set cameras.focal_px=VALUE.",
    "gps_contradicts": "Compare the section on positions: which of them disagree, and where.",
    "gps_rejected": "Compare the section on positions: which of them disagree, and where.",
    "place_moved_far": "Mend the file that the map was laid onto, if it is that, and lay the map"
    " again: livesfm georeference {run} --gcp FILE (or --positions FILE).",
    "control_disagrees": "Check the survey and the marks of the control points, give five or more,"
    " and lay the map again: livesfm georeference {run} --gcp FILE.",
    "scale_bar_contradicts": "Check the marks and the length of the scale bar, and compare another"
    " known distance.",
    "several_maps": "Film what joins the parts and add it: livesfm resume {run} SOURCE. Each part"
    " is exported by --map N.",
    "missing_keyframes": "Film what joins the missing keyframes to the rest, and add it: livesfm"
    " resume {run} SOURCE.",
    "pairs_contradict": "Film the places that the reasons name again, with more overlap, and add"
    " it: livesfm resume {run} SOURCE. It often settles what few images left open.",
}
_SAME_REMEDY = {
    "camera_lens": "camera_focal",
    "camera_uncertain": "camera_focal",
    "camera_unsure": "camera_focal",
    "camera_few_images": "camera_focal",
    "looks_up": "gps_contradicts",
    "control_contradicts_positions": "control_disagrees",
    **dict.fromkeys(
        ("misplaced", "misplaced_part", "weakly_joined", "unconfirmed", "small_patch"),
        "pairs_contradict",
    ),
}
_MADE_BY_RESUME = ("budget", "end_of_run")  # reasons of a keyframe without depth


def headline_of(record: RunRecord) -> Headline:
    """The beginning of the page."""
    verdict = record.verdict
    level = None if verdict is None else verdict.level
    reasons = tuple(
        Reason(
            level=one.level.value,
            sentence=f"{_capitalised(one.sentence).rstrip('.')}.",
            frames=_frames(record, one.frame_ids),
        )
        for one in (verdict.reasons if verdict is not None else ())
    )
    words = [*_unfinished(record), *_level_words(record), *_no_place_words(record)]
    return Headline(
        level=_shown_level(record),
        title=_title(record),
        words=" ".join(words),
        reasons=reasons,
        next_steps=tuple(_next_steps(record)),
        warning=_WARNINGS.get(level, "") if level is not None and record.has_map else "",
    )


def tiles_of(record: RunRecord) -> tuple[Tile, ...]:
    """The key figures."""
    summary = record.summary
    placed, total = _placed_of(record)
    tiles = [
        Tile(
            name="keyframes in the map",
            value=f"{placed:,} of {total:,}",
            level="" if placed == total else "doubtful",
        )
    ]
    num_points = summary.num_points3D or (record.map.num_points3D if record.map else 0)
    tiles.append(Tile(name="points", value=f"{num_points:,}", note=_dense_points(record)))
    if summary.mean_reprojection_error_px is not None and record.has_map:
        tiles.append(
            Tile(
                name="mean reprojection error",
                value=f"{fixed(summary.mean_reprojection_error_px)} px",
                note=f"of {summary.num_observations:,} observations",
            )
        )
    place = summary.georeference
    if place is not None:
        tiles.append(
            Tile(
                name="distance to control points" if place.gcp else "distance to positions",
                value=f"{number(place.rmse_m)} m",
                note=f"root mean square of {place.num_positions:,} used",
            )
        )
    tiles.append(
        Tile(
            name="frames received",
            value=f"{summary.frames_received or len(record.frames):,}",
            note=_dropped(record),
        )
    )
    return tuple(tiles)


def _placed_of(record: RunRecord) -> tuple[int, int]:
    """Keyframes in the map, and all of them."""
    keyframes = record.summary.keyframes or len(record.events.keyframes)
    placed = record.summary.registered_keyframes
    if not record.is_finished and record.map is not None:
        placed = len(record.map.frame_ids)
    return placed, max(keyframes, len(record.events.keyframes), placed)


def _dense_points(record: RunRecord) -> str:
    written = record.summary.dense.written
    return f"{written.points:,} in the dense map" if written is not None else ""


def _dropped(record: RunRecord) -> str:
    listed_ones = sum(frame.is_dropped for frame in record.frames)
    num = max(sum(record.summary.frames_dropped.values()), listed_ones)
    return f"{num:,} of them dropped" if num else "none dropped"


def _shown_level(record: RunRecord) -> str:
    verdict = record.verdict
    if not record.is_finished:
        is_bad = verdict is not None and verdict.level is VerdictLevel.WRONG
        return "wrong" if is_bad else "unfinished"
    if not record.has_map:
        return "none"
    return "unfinished" if verdict is None else verdict.level.value


def _title(record: RunRecord) -> str:
    verdict = record.verdict
    if not record.has_map:
        words = "no map"
    elif verdict is None:
        words = "no verdict"
    elif record.is_finished:
        words = f"this map is {level_in_words(verdict.verdict)}"
    else:
        words = f"the map is {verdict.level.value} so far"
    return _capitalised(words if record.is_finished else f"unfinished run: {words}")


def _unfinished(record: RunRecord) -> list[str]:
    return [] if record.is_finished else [_UNFINISHED]


def _level_words(record: RunRecord) -> list[str]:
    if not record.has_map:
        return [_NO_MAP]
    verdict = record.verdict
    if verdict is None:
        return ["Nothing is known of how good it is."]
    return [_WORDS[verdict.level]]


def _no_place_words(record: RunRecord) -> list[str]:
    why = record.summary.not_georeferenced
    return [f"It is not georeferenced: {why}."] if why and record.has_map else []


def _next_steps(record: RunRecord) -> Iterator[str]:
    run, verdict = shown_path(record.path), record.verdict
    if not record.is_finished:
        yield f"Where nothing writes there any more, end the run: livesfm resume {run}."
    if record.doubt is VerdictLevel.WRONG and record.has_map:
        yield (
            "Hand nothing over that was made from this map: no points, orthophoto, surface model or"
            " export."
        )
    if record.doubt is VerdictLevel.DOUBTFUL and record.has_map:
        has_recording = (record.path / _RECORDING).exists()
        with_viewer = f": rerun {run}/{_RECORDING}" if has_recording else ""
        yield (
            f"Look at the places that the reasons name{with_viewer}. Compare known distances or"
            " check points with the map."
        )
    kinds = [one.kind for one in verdict.reasons] if verdict is not None else []
    remedies = dict.fromkeys(_SAME_REMEDY.get(kind, kind) for kind in kinds)
    yield from (_REMEDIES[kind].format(run=run) for kind in remedies if kind in _REMEDIES)
    if record.summary.not_georeferenced:
        yield (
            "Positions that came later or in another file lay the map onto the globe: livesfm"
            f" georeference {run} --positions FILE."
        )
    without = record.summary.dense.keyframes_without
    num_left = sum(without.get(reason, 0) for reason in _MADE_BY_RESUME)
    if num_left and record.doubt is None:
        yield (
            f"Depth of {count(num_left, 'more keyframe')}: livesfm resume {run} --set"
            " dense.max_cpu_share=0.9."
        )


def _frames(record: RunRecord, frame_ids: tuple[int, ...]) -> str:
    if not frame_ids:
        return ""
    names = [record.name_of(frame_id) for frame_id in frame_ids]
    return f"{count(len(names), 'keyframe')}: {listed(names)}"


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
