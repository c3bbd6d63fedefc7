"""Sections about the run: what was left out, time, settings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapters.install_advice import installed_version
from adapters.report import charts
from adapters.report.content import Figure, Section, Table
from adapters.report.run_record import RunRecord
from adapters.report.summary import LatencyRecord, StretchRecord
from adapters.report.words import (
    MISSING,
    count,
    listed,
    milliseconds,
    number,
    percent,
    plain,
    seconds,
    short,
    shown_path,
    without_secrets,
)
from engine.config import Config

_MAX_ROWS = 20
_MAX_SETTINGS = 80
_NUM_BINS = 60  # of latencies over a run
_LEAST_CPU_S = 0.005
_DROPS = {
    "unreadable": "cannot be decoded",
    "too_small": "too small",
    "too_large": "too large",
    "duplicate": "a copy of another",
    "overload": "came faster than the computer keeps up",
    "bad_mask": "their mask cannot be used",
    "failed": "nothing could be described in them",
    "paused": "came during a pause",
    "stopped": "the run ended before their turn",
}
_NO_DEPTH = {
    "budget": "the share of CPU time for depth was spent",
    "end_of_run": "the run ended",
    "too_few_points": "too few points of the map in them",
    "no_neighbour": "no neighbour at a useful angle",
    "no_image": "their image cannot be read",
    "nothing_agrees": "no depth passed the checks",
    "failed": "it could not be computed",
    "lost": "it was made, and its file cannot be read any more",
    "not_written": "it was made, and could not be written to the disk",
    "hung": "too many computations did not end in time",
    "dropped": "a second signal ended the run at once",
    "disk_space_low": "too little disk space was left",
}
_ENDS = {
    "end_of_sources": "at the end of its sources",
    "signal": "on request (signal)",
    "command": "on request",
    "full_disk": "early, because the disk was nearly full",
    "failure": "by a failure",
}


# -- what was left out --------------------------------------------------------------------------


def left_out_section(record: RunRecord) -> Section:
    """Everything that came and is not in the map, by kind and reason."""
    summary = record.summary
    tables = [
        *_dropped(record),
        *_left_out(record),
        *_keyframes_apart(record),
        *_stretches("Keyframes that fit nowhere when they came", summary.lost, record),
        *_stretches("Stretches where the camera turned without moving", summary.turning, record),
        *_without_depth(record),
        *_fixed_to_image(record),
        *_faults(record),
    ]
    words = []
    if summary.frames_without_pose:
        words.append(f"{count(summary.frames_without_pose, 'frame')} got no pose.")
    if summary.not_saved:
        words.append(f"Not saved: {listed(summary.not_saved)}.")
    place = summary.georeference
    if place is not None and place.rejected:
        what = count(len(place.rejected), "control point" if place.gcp else "position")
        words.append(f"{what} did not agree with the map and placed nothing.")
    words += [f"{name} {why}." for name, why in sorted(record.missing.items())]
    if not (tables or words):
        words.append("Nothing: every frame that came was used, and every keyframe is in the map.")
    return Section(
        key="left-out", title="What was left out", words=tuple(words), tables=tuple(tables)
    )


def _dropped(record: RunRecord) -> Iterator[Table]:
    """Frames that were dropped: how many by the figures, which by the table of frames."""
    examples: dict[str, list[str]] = defaultdict(list)
    numbers: Counter[str] = Counter()
    for frame in record.frames:
        if frame.is_dropped:
            reason = frame.status.partition(":")[2]
            numbers[reason] += 1
            if len(examples[reason]) < 4:
                examples[reason].append(frame.name)
    numbers.update(
        {
            reason: num - numbers[reason]
            for reason, num in record.summary.frames_dropped.items()
            if num > numbers[reason]
        }
    )
    if numbers:
        yield Table(
            title="Frames that were dropped",
            head=("reason", "frames", "such as"),
            rows=tuple(
                (
                    _DROPS.get(reason, plain(short(reason, at_most=40))),
                    f"{num:,}",
                    listed(examples[reason][:3]) or MISSING,
                )
                for reason, num in numbers.most_common(_MAX_ROWS)
            ),
            is_text=True,
        )


def _left_out(record: RunRecord) -> Iterator[Table]:
    left_out = record.summary.left_out
    if left_out:
        yield Table(
            title="Files that the sources did not take",
            head=("source", "kind", "files", "reason", "such as"),
            rows=tuple(
                (
                    short(without_secrets(one.source), at_most=40),
                    short(one.kind, at_most=20) or "no suffix",
                    f"{one.num_files:,}",
                    short(one.reason, at_most=160),
                    short(one.example.rpartition("/")[2], at_most=60),
                )
                for one in left_out[:_MAX_ROWS]
            ),
            note=_more(len(left_out)),
            is_text=True,
        )


def _keyframes_apart(record: RunRecord) -> Iterator[Table]:
    if record.map is None or not record.events.keyframes:
        return
    placed = set(record.map.frame_ids.tolist())
    apart = [i for i in sorted(record.events.keyframes) if i not in placed]
    if apart:
        names = [record.name_of(i) for i in apart]
        yield Table(
            title="Keyframes that are not in the map",
            head=("keyframes", "which"),
            rows=((f"{len(apart):,}", listed(names, at_most=24)),),
            note="Maps beside it, if there are any, hold some of them."
            * (len(record.summary.maps) > 1),
            is_text=True,
        )


def _stretches(title: str, found: tuple[StretchRecord, ...], record: RunRecord) -> Iterator[Table]:
    rows = []
    for one in found[:_MAX_ROWS]:
        if not one.frame_ids:
            continue
        ends = [record.name_of(i) for i in (one.frame_ids[0], one.frame_ids[-1])]
        what = f"turned by {number(one.turned_deg)}°" if one.turned_deg else _became_of(one)
        span = " to ".join(dict.fromkeys(short(end, at_most=40) for end in ends))
        rows.append((span, f"{len(one.frame_ids):,}", what))
    if rows:
        yield Table(
            title=title,
            head=("keyframes", "number", "what became of them"),
            rows=tuple(rows),
            note=_more(len(found)),
            is_text=True,
        )


def _became_of(stretch: StretchRecord) -> str:
    """Where keyframes of a stretch have their places now."""
    if not (stretch.num_missing or stretch.num_apart):
        return "all have their place in the map now"
    return f"{stretch.num_missing:,} in no map now, {stretch.num_apart:,} in another map"


def _without_depth(record: RunRecord) -> Iterator[Table]:
    without = record.summary.dense.keyframes_without
    if without:
        yield Table(
            title="Keyframes without depth",
            head=("reason", "keyframes"),
            rows=tuple(
                (_NO_DEPTH.get(reason, plain(short(reason, at_most=40))), f"{num:,}")
                for reason, num in sorted(without.items(), key=lambda item: -item[1])
            ),
        )


def _fixed_to_image(record: RunRecord) -> Iterator[Table]:
    overlays = record.summary.overlays
    if overlays:
        yield Table(
            title="Left out because it is fixed to the image: logos, text, dirt",
            head=("camera", "share of the image"),
            rows=tuple(
                (short(key, at_most=60), percent(one.share))
                for key, one in list(overlays.items())[:_MAX_ROWS]
            ),
        )


def _faults(record: RunRecord) -> Iterator[Table]:
    faults = record.summary.faults
    if faults:
        yield Table(
            title="What broke while the run went on",
            head=("part", "times"),
            rows=tuple(
                (short(plain(part), at_most=60), f"{num:,}") for part, num in faults.items()
            ),
            note="See FaultOccurred in events.jsonl.",
        )


def _more(num: int) -> str:
    return f"{num - _MAX_ROWS:,} more are in summary.json." if num > _MAX_ROWS else ""


# -- time ---------------------------------------------------------------------------------------


def time_section(record: RunRecord) -> Section:
    """How long things took, and what the processor was busy with."""
    summary = record.summary
    stages = [
        (stage, spent) for stage, spent in summary.cpu_by_stage_s.items() if spent >= _LEAST_CPU_S
    ]
    stages.sort(key=lambda one: -one[1])
    facts = [
        ("duration", seconds(summary.wall_s)),
        ("CPU time", seconds(summary.cpu_s)),
        ("first map after", seconds(summary.time_to_first_map_s)),
        ("most memory", f"{number(summary.peak_rss_mb)} MB" if summary.peak_rss_mb else MISSING),
    ]
    if summary.peak_gpu_mb:
        facts.append(("most GPU memory", f"{number(summary.peak_gpu_mb)} MB"))
    known = tuple(fact for fact in facts if fact[1] != MISSING)
    figures = []
    if stages:
        figures.append(
            Figure(
                title="CPU time by stage",
                picture=charts.bars(
                    [(plain(stage), spent, seconds(spent)) for stage, spent in stages[:16]],
                    label="CPU seconds by stage, the largest first",
                ),
                needs_map=False,
            )
        )
    tables = [Table(title="The run", head=("what", "value"), rows=known)] if known else []
    if record.events.is_live:
        tables += _latency_table(record)
        figures += _latency_figure(record)
    missing = () if known else ("No times: summary.json has none.",)
    return Section(
        key="time", title="Time", figures=tuple(figures), tables=tuple(tables), missing=missing
    )


def _latency_table(record: RunRecord) -> Iterator[Table]:
    latency = record.summary.latency_ms
    rows = [
        _latency_row("frames, to a pose", latency.frames),
        _latency_row("keyframes, to their place in the map", latency.keyframes),
    ]
    yield Table(
        title="Latency from arrival",
        head=("of", "median", "95th percentile", "largest"),
        rows=tuple(rows),
    )


def _latency_row(name: str, latency: LatencyRecord) -> tuple[str, ...]:
    return (name, *(milliseconds(value) for value in (latency.p50, latency.p95, latency.max)))


def _latency_figure(record: RunRecord) -> Iterator[Figure]:
    latencies = np.array(record.events.latencies).reshape(-1, 2)
    if len(latencies) < 2:
        return
    edges = np.linspace(latencies[:, 0].min(), latencies[:, 0].max() + 1e-9, _NUM_BINS + 1)
    places = np.clip(np.searchsorted(edges, latencies[:, 0], side="right") - 1, 0, _NUM_BINS - 1)
    known = np.unique(places)
    median = np.array([np.median(latencies[places == one, 1]) for one in known])
    largest = np.array([latencies[places == one, 1].max() for one in known])
    yield Figure(
        title="Latency over the run",
        picture=charts.course(
            (edges[:-1] + edges[1:])[known] / 2,
            [("s2", 1000 * largest), ("s1", 1000 * median)],
            x_words="s since the start",
            y_words="ms",
            label="Median and largest latency of frames over the run",
        ),
        legend=(("curve s1", "median"), ("curve s2", "largest")),
        needs_map=False,
    )


# -- settings -----------------------------------------------------------------------------------


def settings_section(record: RunRecord) -> Section:
    """What was run, by which version, and with which settings that are not the defaults."""
    sources = [short(without_secrets(one), at_most=200) for one in record.events.sources]
    facts = [
        ("folder of the run", short(shown_path(record.path))),
        *(("source", one) for one in sources[:_MAX_ROWS]),
        ("matcher", record.events.matcher or MISSING),
        ("parts", f"{record.events.num_parts:,}, resumed or begun from another run"),
        (
            "ended",
            _ENDS.get(record.summary.stopped_by, plain(record.summary.stopped_by) or MISSING),
        ),
        ("report by", f"LiveSfM {installed_version()}"),
    ]
    if record.events.num_parts < 2:
        facts = [fact for fact in facts if fact[0] != "parts"]
    changed = list(_changed(record.config, Config().model_dump(mode="json")))
    rows = [
        (short(name), short(_value(value)), short(_value(default)))
        for name, value, default in changed[:_MAX_SETTINGS]
    ]
    tables = [Table(title="The run", head=("what", "value"), rows=tuple(facts), is_text=True)]
    if rows:
        tables.append(
            Table(
                title="Settings that are not the defaults",
                head=("setting", "here", "default"),
                rows=tuple(rows),
                note=f"{len(changed) - len(rows):,} more are in config.yaml."
                * (len(changed) > len(rows)),
                is_text=True,
            )
        )
    words = () if rows or "config.yaml" in record.missing else ("All settings are the defaults.",)
    missing = [
        f"config.yaml {why}." for name, why in record.missing.items() if name == "config.yaml"
    ]
    return Section(
        key="settings",
        title="Run and settings",
        words=words,
        tables=tuple(tables),
        missing=tuple(missing),
    )


def _changed(
    config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Settings with another value than the default: name, value, default."""
    for section, values in config.items():
        known = defaults.get(section)
        if not isinstance(values, Mapping) or not isinstance(known, Mapping):
            yield str(section), values, MISSING
            continue
        for name, value in values.items():
            if name not in known or value != known[name]:
                yield f"{section}.{name}", value, known.get(name, MISSING)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, dict):
        pairs = (f"{key}: {_value(one)}" for key, one in value.items())
        return ", ".join(pairs) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return without_secrets(str(value)) if value not in ("", None) else "none"
