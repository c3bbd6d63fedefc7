"""Rows about maps: pairs that lie, turns, loops, breaks, poses, and what is said of the map."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from engine.types import Float64Array
from trust import flights, places, rooms, sets, zooms
from trust.bench import Bench, Case, Check, Outcome, Row, count_check, percent_check
from trust.inputs import Kit, Maker
from trust.scoring import (
    ate_percent,
    frames,
    keyframe_rows,
    largest_map,
    map_folders,
    registered_centers,
    registered_names,
    true_centers,
)
from trust.trajectories import invented_poses, num_keyframe_poses
from trust.verdicts import GOOD, NO_VERDICT, ranges_named, seconds_named

TOWN_PERCENT = 0.5
WRONG_FOCAL_RATIOS = (0.85, 1.15)
DECEIVED_RATIO, DECEIVED_FRAMES = 0.1, 36
DECEIVED_PERCENT, DECEIVED_FACTOR = 0.06, 1.2
WALK_FACTOR, WALK_PERCENT = 1.2, 0.05
TIME_LOST_TOLERANCE = 0.3  # of the time that a verdict names
FRAMES_LOST_TOLERANCE = 20
_AS_PHOTOS = ("--set", "frame_tracking.mode=photos", "--set", "sources.every_nth_frame=4")
_TURNING = (r"\bturn", r"rotat", r"on the spot")
_TRUTH = {"fox": "groundtruth.txt", "kitchen": "reference_colmap.txt"}


def map_rows(num_seeds: int) -> list[Row]:
    """Every row about maps, in the table's order."""
    return [
        *recorded_rows(),
        *sparse_rows(),
        *deceived_rows(num_seeds),
        *lookalike_rows(num_seeds),
        parquet_row(),
        drifting_loop_row(),
        *turning_rows(),
        *interrupted_rows(),
        *two_flights_rows(),
        one_map_row(),
        *barren_rows(),
        *invented_rows(),
        *good_rows(num_seeds),
        *cure_rows(),
    ]


# Pairs


def recorded_rows() -> list[Row]:
    """Matches of learned matchers, whose pairs match whether they share anything or not."""
    bars = {
        ("kitchen", "aliked"): 12,
        ("kitchen", "xfeat"): 9,
        ("fox", "aliked"): 7,
        ("fox", "xfeat"): 7,
    }
    rows = []
    for (name, features), bar in bars.items():
        judge = partial(_judge_places, least_right=bar)
        case = _recorded_case(name, features)
        rows.append(Row(name=case.name, cases=(case,), judge=judge))
        judge = partial(_judge_places, least_right=0)
        for label, arguments in _wrong_focal_lengths(name).items():
            cases = tuple(
                replace(
                    case,
                    name=f"{case.name}-{label}-x{ratio:g}",
                    input_name=case.name,
                    arguments=given,
                )
                for ratio, given in arguments.items()
            )
            rows.append(Row(name=f"{case.name}-{label}", cases=cases, judge=judge))
    return rows


def _recorded_case(name: str, features: str) -> Case:
    every = {"kitchen": "every2nd", "fox": "every8th"}[name]
    matching = {"aliked": "aliked_lightglue", "xfeat": "xfeat_lighterglue"}[features]
    file = f"{name}_{every}_{matching}.npz"
    return Case(
        name=f"recorded-{name}-{features}", make=sets.recorded(name, file, truth=_TRUTH[name])
    )


def _wrong_focal_lengths(name: str) -> dict[str, dict[float, tuple[str, str]]]:
    """Arguments of focal lengths that are off: where none is known, and given ones."""
    focal_px = sets.RECORDED_FOCAL_PX[name]
    focal_ratio = focal_px / sets.RECORDED_EDGE_PX[name]
    return {
        "focal-assumed": {
            ratio: ("--set", f"cameras.default_focal_ratio={ratio * focal_ratio:.4f}")
            for ratio in WRONG_FOCAL_RATIOS
        },
        "focal-given": {
            ratio: ("--set", f"cameras.focal_px={ratio * focal_px:.1f}")
            for ratio in WRONG_FOCAL_RATIOS
        },
    }


def sparse_rows() -> list[Row]:
    """Few images of a set with SIFT: as many right as the version before, or as COLMAP's mapper."""
    rows = []
    for nth, right in ((3, 17), (5, 7), (7, 8), (8, 7)):
        make = sets.every_nth("fox", nth, offset=0, config="phone", truth=_TRUTH["fox"])
        rows.append(_sparse_row(f"fox-every-{nth}", make, right))
    for offset, label, right in ((0, "even", 7), (1, "odd", 2)):
        make = sets.every_nth("kitchen", 2, offset=offset, config=None, truth=_TRUTH["kitchen"])
        rows.append(_sparse_row(f"kitchen-{label}", make, right))
    return rows


def _sparse_row(name: str, make: Maker, right: int) -> Row:
    reference = Case(name=f"{name}-reference", input_name=name, make=make, is_reference=True)
    return Row(
        name=name,
        cases=(Case(name=name, make=make),),
        judge=partial(_judge_sparse, right=right, reference=reference),
    )


def _judge_sparse(
    bench: Bench, outcomes: Sequence[Outcome], *, right: int, reference: Case
) -> list[Check]:
    (outcome,) = outcomes
    if bench.baseline is not None:
        before = bench.outcome(reference).placement()
        right = before.num_right if before else 0
    return _judge_places(bench, outcomes, least_right=right)[:1]


def _judge_places(bench: Bench, outcomes: Sequence[Outcome], *, least_right: int) -> list[Check]:
    """So many cameras at their places, and none elsewhere."""
    checks = []
    for outcome in outcomes:
        found = outcome.placement()
        registered = outcome.score.num_registered if outcome.score else 0
        label = f"cameras at their places, of {registered} registered ({outcome.said.level})"
        right, wrong = (found.num_right, found.num_wrong) if found else (0, 0)
        checks.append(count_check(outcome, right, label=label, at_least=least_right))
        label = f"cameras elsewhere {' '.join(found.wrong) if found else ''}".strip()
        checks.append(count_check(outcome, wrong, label=label, at_most=0))
    return checks


def deceived_rows(num_seeds: int) -> list[Row]:
    """Dense true matches of the town, and false ones that agree on a geometry."""
    return [
        _deceived_row(name, is_admitted=is_admitted, num_seeds=num_seeds)
        for name, is_admitted in (("false-pairs-admitted", True), ("false-pairs-denied", False))
    ]


def _deceived_row(name: str, *, is_admitted: bool, num_seeds: int) -> Row:
    town = flights.town_seen_outward(
        DECEIVED_FRAMES,
        arguments=(
            "--config",
            "oracle",
            *("--set", "frame_tracking.mode=photos"),
            *("--set", "scene_graph.exhaustive_below=100"),
            *("--set", "dense_matching.max_query_points=600"),
        ),
    )
    admitted = "yes" if is_admitted else "no"

    def cases(ratio: float, prefix: str) -> tuple[Case, ...]:
        return tuple(
            Case(
                name=f"{prefix}-{seed}",
                input_name="false-pairs",
                make=town,
                arguments=("--set", f"runtime.seed={seed}"),
                matcher=f"deceived:{ratio:g}:{seed}:{admitted}",
            )
            for seed in range(num_seeds)
        )

    return Row(
        name=name,
        cases=(*cases(DECEIVED_RATIO, name), *cases(0.0, f"{name}-none")),
        judge=_judge_deceived,
    )


def _judge_deceived(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    half = len(outcomes) // 2
    deceived, clean = outcomes[:half], outcomes[half:]
    medians = _median(map(_ate_if_enough, deceived)), _median(map(_ate_if_enough, clean))
    bar = max(DECEIVED_FACTOR * medians[1], DECEIVED_PERCENT)
    figures = ", ".join(f"{_ate_if_enough(each):.3g}" for each in outcomes)
    return [
        Check(
            label=f"median ATE %, without false pairs {medians[1]:.3g} (all: {figures})",
            figure=f"{medians[0]:.3g}",
            bar=f"<= {bar:.3g}",
            is_ok=medians[0] <= bar,
        ),
        *(_no_false_loop(each) for each in deceived),
    ]


def lookalike_rows(num_seeds: int) -> list[Row]:
    """Twenty houses around a plaza that show one facade, or are equal altogether."""
    kinds = {"lookalikes": flights.Lookalikes.FACADE, "lookalikes-equal": flights.Lookalikes.EQUAL}
    return [
        Row(
            name=name,
            cases=tuple(
                Case(name=f"{name}-{seed}", make=flights.lookalike_town(kind, seed=seed))
                for seed in range(num_seeds)
            ),
            judge=_judge_lookalikes,
        )
        for name, kind in kinds.items()
    ]


def _judge_lookalikes(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    return [check for each in outcomes for check in (_town_check(each), _no_false_loop(each))]


def _no_false_loop(outcome: Outcome) -> Check:
    """No two keyframes share points of the map that are truly in different places."""
    reconstruction = largest_map(outcome.run)
    loops = None
    if reconstruction is not None and outcome.known.views is not None:
        views = places.TrueViews.load(outcome.folder / outcome.known.views)
        loops = places.false_loops(reconstruction, keyframe_rows(outcome.run), views)
    shown = " ".join(f"{first}+{second}" for first, second in (loops or [])[:3])
    return count_check(
        outcome,
        None if loops is None else len(loops),
        label=f"pairs of keyframes joined by what differs {shown}".strip(),
        at_most=0,
    )


# Loops


def parquet_row() -> Row:
    """A repetitive floor, out and back."""
    case = Case(name="parquet", make=sets.set_as_it_is("parquet", config="phone"))
    return Row(name="parquet", cases=(case,), judge=_judge_parquet)


def _judge_parquet(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    (outcome,) = outcomes
    floor = bench.floor(outcome.run) or {}
    level = outcome.said.level
    first_s, last_s, end_s = _times_of_main_map(outcome)
    return [
        _at_most(outcome, floor.get("angle_deg"), 2.0, f"floor bends by, degrees ({level})"),
        _at_most(outcome, floor.get("height_drift_pct"), 8.0, "height drifts by, %"),
        count_check(
            outcome,
            outcome.score.num_registered if outcome.score else None,
            label="keyframes in that map",
            at_least=84,
        ),
        _at_most(outcome, first_s, 1.0, "first keyframe of that map, s"),
        _at_most(outcome, end_s - last_s, 1.0, f"last keyframe before the end at {end_s:.1f} s, s"),
    ]


def _times_of_main_map(outcome: Outcome) -> tuple[float, float, float]:
    """Times of the first and last keyframe of the fullest map, and of the last frame, s."""
    times = {row["name"]: float(row["captured_at_s"]) for row in frames(outcome.run)}
    reconstruction = largest_map(outcome.run)
    names = registered_centers(reconstruction) if reconstruction is not None else {}
    posed = [times[name] for name in names]
    return (
        min(posed, default=math.inf),
        max(posed, default=-math.inf),
        max(times.values(), default=0.0),
    )


def drifting_loop_row() -> Row:
    """A circuit of 400 keyframes whose scale shrinks to 0.9 on the way."""
    return Row(name="drifting-loop", cases=(), judge=_judge_drifting_loop)


def _judge_drifting_loop(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    found = bench.drifting_loop(bench.kit.variation.order_seed) or {}
    before, after = found.get("before_percent"), found.get("after_percent")
    return [
        Check(
            label=f"ATE % after the loop is closed, before {_shown(before)}",
            figure=_shown(after),
            bar=f"<= {TOWN_PERCENT}",
            is_ok=after is not None and after <= TOWN_PERCENT,
        )
    ]


# Turning


def turning_rows() -> list[Row]:
    """Cameras that turn and do not move."""
    rows = [Row(name="turning-room", cases=(_turned_room(),), judge=_judge_turning)]
    for amplitude in (0.25, 0.5):
        way = partial(flights.turning, amplitude_rad=amplitude)
        name = f"turning-town-{amplitude:g}"
        unknown = Case(name=f"{name}-unknown", make=flights.clip_input(way))
        turned = (
            unknown,
            replace(unknown, name=f"{name}-photos", input_name=unknown.name, arguments=_AS_PHOTOS),
            Case(name=f"{name}-given", make=flights.clip_input(way, is_given=True)),
        )
        rows.append(Row(name=name, cases=turned, judge=_judge_turning))
    num_turned = flights.TURN_AFTER_WALK_FRAMES
    cases = (
        Case(
            name="walk-then-turn",
            make=flights.clip_input(partial(flights.walk, num_turned=num_turned)),
        ),
        Case(name="walk", make=flights.clip_input(flights.walk)),
    )
    return [*rows, Row(name="walk-then-turn", cases=cases, judge=_judge_walk)]


def _turned_room(*settings: str, name: str = "turning-room") -> Case:
    return Case(
        name=name, input_name="turning-room", make=rooms.room_turned_in(), settings=settings
    )


def _judge_turning(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    checks = []
    for each in outcomes:
        registered = each.score.num_registered if each.score else 0
        checks += [
            count_check(each, registered, label="keyframes in a map", at_most=0),
            Check(
                label="exit code",
                figure=str(each.finished.exit_code),
                bar="1",
                is_ok=each.finished.exit_code == 1,
                case=each.case.name,
            ),
            _said_check(each, _TURNING, label="the words"),
        ]
    return checks


def _judge_walk(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    """The map of the walk is as accurate as without the turn at its end."""
    turned, alone = outcomes
    errors = [_ate_of_walk(each) for each in outcomes]
    bar = WALK_FACTOR * (errors[1] if errors[1] is not None else math.inf)
    registered = [_num_of_walk(each) for each in outcomes]
    return [
        _at_most(
            turned,
            errors[0],
            max(bar, WALK_PERCENT) if math.isfinite(bar) else WALK_PERCENT,
            f"ATE % of the walk, without the turn {_shown(errors[1])} ({turned.said.shown()})",
        ),
        count_check(
            turned,
            registered[0],
            label="keyframes of the walk in the map",
            at_least=registered[1] or 1,
        ),
        Check(
            label="verdict of the walk alone",
            figure=alone.said.shown(),
            bar=GOOD,
            is_ok=alone.said.level == GOOD,
            case=alone.case.name,
        ),
    ]


def _walked(outcome: Outcome) -> dict[str, int]:
    rows = keyframe_rows(outcome.run)
    return {name: index for name, index in rows.items() if index < flights.WALK_FRAMES}


def _ate_of_walk(outcome: Outcome) -> float | None:
    reconstruction = largest_map(outcome.run)
    if reconstruction is None:
        return None
    walked = _walked(outcome)
    centers = registered_centers(reconstruction)
    truth = true_centers(outcome.known, outcome.folder, outcome.run)
    return ate_percent({name: centers[name] for name in walked if name in centers}, truth)


def _num_of_walk(outcome: Outcome) -> int | None:
    reconstruction = largest_map(outcome.run)
    if reconstruction is None:
        return None
    return len(_walked(outcome).keys() & registered_centers(reconstruction).keys())


# Breaks


def interrupted_rows() -> list[Row]:
    """A jump, a blackout, and an old street again; over the roofs and in the streets."""
    return [
        Row(
            name=name,
            cases=(Case(name=name, make=flights.clip_input(way)),),
            judge=partial(_judge_interrupted, way=way),
        )
        for name, way in (
            ("interrupted", flights.interrupted),
            ("interrupted-street", partial(flights.interrupted, is_low=True)),
        )
    ]


def _judge_interrupted(
    bench: Bench, outcomes: Sequence[Outcome], *, way: Callable[[Kit], flights.Clip]
) -> list[Check]:
    (outcome,) = outcomes
    said = outcome.said
    lost = _times_lost(said.words, first=flights.first_black(way(bench.kit)))
    return [
        _one_map(outcome),
        _town_check(outcome),
        Check(
            label=f"the time lost is said ({said.shown()})",
            figure=", ".join(lost) or "not said",
            bar=f"{flights.BLACKOUT_S} s",
            is_ok=bool(lost),
            case=outcome.case.name,
        ),
    ]


def _times_lost(words: str, *, first: int) -> list[str]:
    """What of a text says how long, or in which frames from the first on, nothing was seen."""
    last = first + flights.BLACKOUT_S * flights.RATE_HZ
    limit_s = TIME_LOST_TOLERANCE * flights.BLACKOUT_S
    near = FRAMES_LOST_TOLERANCE
    named = [
        f"{seconds:g} s"
        for seconds in seconds_named(words)
        if abs(seconds - flights.BLACKOUT_S) <= limit_s
    ]
    return named + [
        f"{low} to {high}"
        for low, high in ranges_named(words)
        if abs(low - first) <= near and abs(high - last) <= near
    ]


def two_flights_rows() -> list[Row]:
    """Two clips in one run, whose halves of the town overlap or do not."""
    given = ("--set", f"cameras.focal_px={flights.FOCAL_PX:g}")
    overlap = flights.two_flights((-38.0, -8.0), (10.0, 40.0))
    disjoint = flights.two_flights((-52.0, -40.0), (40.0, 52.0))
    together = Case(name="two-flights", make=overlap, arguments=given)
    unknown = Case(name="two-flights-unknown", input_name="two-flights", make=overlap)
    apart = Case(name="two-flights-apart", make=disjoint, arguments=given)
    return [
        Row(name="two-flights", cases=(together,), judge=_judge_together),
        Row(name="two-flights-unknown", cases=(unknown,), judge=_judge_together),
        Row(name="two-flights-apart", cases=(apart,), judge=_judge_apart),
    ]


def _judge_together(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    (outcome,) = outcomes
    return [_one_map(outcome), _town_check(outcome)]


def _judge_apart(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    """Two maps, each of one flight, both in the run's folder and said of."""
    (outcome,) = outcomes
    maps = [registered_names(folder) for folder in map_folders(outcome.run)]
    sources = [{name.partition("/")[0] for name in names} for names in maps]
    truth = true_centers(outcome.known, outcome.folder, outcome.run)
    errors = [ate_percent(centers, truth) for centers in _centers_of_maps(outcome)]
    level = outcome.said.level
    return [
        Check(
            label="maps, and the sources of each",
            figure=f"{len(maps)}: {' | '.join(' '.join(sorted(each)) for each in sources)}",
            bar="2, one source each",
            is_ok=len(maps) == 2 and sources[0] != sources[1] and all(map(_is_one, sources)),
        ),
        *(
            _at_most(outcome, error, TOWN_PERCENT, f"ATE % of map {number}")
            for number, error in enumerate(errors)
        ),
        Check(
            label=f"verdict ({outcome.said.shown()})",
            figure=level,
            bar="doubtful",
            is_ok=level == "doubtful",
        ),
    ]


def _is_one(names: set[str]) -> bool:
    return len(names) == 1


def _centers_of_maps(outcome: Outcome) -> list[Mapping[str, Float64Array]]:
    import pycolmap

    return [
        registered_centers(pycolmap.Reconstruction(folder)) for folder in map_folders(outcome.run)
    ]


def one_map_row() -> Row:
    """All that a run leaves speaks of the same map."""
    case = Case(name="lady-painted", make=sets.lady_painted_over)
    return Row(name="one-map", cases=(case,), judge=_judge_one_map)


def _judge_one_map(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    (outcome,) = outcomes
    folders = map_folders(outcome.run)
    counts = {
        "summary": outcome.said.num_registered,
        "sparse/0": len(registered_names(folders[0])) if folders else None,
        "trajectory.txt": num_keyframe_poses(outcome.run),
        "terminal": outcome.said.num_registered_at_last,
    }
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [
        Check(
            label="keyframes of the map, by whom",
            figure=shown,
            bar="the same",
            is_ok=len(set(counts.values())) == 1,
        ),
        count_check(outcome, counts["summary"], label="keyframes in the summary", at_least=46),
    ]


def barren_rows() -> list[Row]:
    """Sets with hardly any texture or overlap: as much of a map as before, and words that help."""
    bars = {"seafloor": (None, 30, 11), "thermal": ("drone", 0, 0), "cake": (None, 0, 0)}
    return [
        Row(
            name=name,
            cases=(Case(name=name, make=sets.set_as_it_is(name, config=config)),),
            judge=partial(_judge_barren, least_in_all=in_all, least_in_one=in_one),
        )
        for name, (config, in_all, in_one) in bars.items()
    ]


def _judge_barren(
    bench: Bench, outcomes: Sequence[Outcome], *, least_in_all: int, least_in_one: int
) -> list[Check]:
    (outcome,) = outcomes
    sizes = [len(registered_names(folder)) for folder in map_folders(outcome.run)]
    said = outcome.said
    return [
        Check(
            label=f"keyframes in each map, {sum(sizes)} in all",
            figure="+".join(map(str, sizes)) or "none",
            bar=f">= {least_in_all}, {least_in_one} in one",
            is_ok=sum(sizes) >= least_in_all and max(sizes, default=0) >= least_in_one,
        ),
        Check(
            label="what is said",
            figure=said.shown(),
            bar="a sentence, not good",
            is_ok=bool(said.sentences) and said.level not in (GOOD, NO_VERDICT),
        ),
    ]


# Poses


def invented_rows() -> list[Row]:
    """Lines of trajectories that nothing measured."""
    cases = (
        Case(name="seafloor", make=sets.set_as_it_is("seafloor")),
        Case(name="lady", make=sets.lady),
        Case(name="lady-painted", make=sets.lady_painted_over),
        Case(name="cut", make=flights.clip_input(flights.cut)),
    )
    return [Row(name=f"poses-{case.name}", cases=(case,), judge=_judge_invented) for case in cases]


def _judge_invented(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    checks = []
    for each in outcomes:
        found = invented_poses(each.run, are_photos=not each.known.source.endswith(".mp4"))
        label = f"invented of {found.num_lines} lines {' '.join(found.names[:3])}".strip()
        checks.append(count_check(each, found.number, label=label, at_most=0))
    return checks


# Verdicts


def good_rows(num_seeds: int) -> list[Row]:
    """Maps that are called good, and are."""
    configs = {
        "fox": ("phone", "groundtruth.txt"),
        "redkitchen": ("phone", None),
        "sceaux": (None, None),
        "kitchen": (None, "reference_colmap.txt"),
        "seneca": ("drone", None),
        "brighton": ("drone", None),
        "temple": (None, "groundtruth.txt"),
        "lund": (None, None),
        "copr": ("drone", None),
        "hotel": ("phone", None),
    }
    rows = [
        _good_row(f"good-{name}", {name: sets.set_as_it_is(name, config=config, truth=truth)})
        for name, (config, truth) in configs.items()
    ]
    for label, is_reversed in (("shuffled", False), ("reversed", True)):
        make = sets.reordered("fox", is_reversed=is_reversed, config="phone", truth=_TRUTH["fox"])
        rows.append(_good_row(f"good-fox-{label}", {f"fox-{label}": make}))
    demo = flights.town_path("flight", seed=0, num_frames=300)
    rows.append(_good_row("good-demo", {"demo": demo}))
    for path, num_frames in flights.PATHS.items():
        makers = {
            f"town-{path}-{seed}": flights.town_path(path, seed=seed, num_frames=num_frames)
            for seed in range(num_seeds)
        }
        rows.append(_good_row(f"good-town-{path}", makers))
    return rows


def _good_row(name: str, makers: Mapping[str, Maker]) -> Row:
    cases = tuple(Case(name=case, make=make) for case, make in makers.items())
    return Row(name=name, cases=cases, judge=_judge_good)


def _judge_good(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    checks = []
    for each in outcomes:
        checks.append(
            Check(
                label="verdict",
                figure=each.said.shown(),
                bar=GOOD,
                is_ok=each.said.level == GOOD,
                case=each.case.name,
            )
        )
    return checks


def cure_rows() -> list[Row]:
    """Maps that go wrong when a cure is turned off, and what is said of them then."""
    lens = rooms.room_seen_by(_named_fisheye, exif=rooms.ACTION_CAMERA)
    zoom_without_split = ("cameras.split=false",)
    cures: list[tuple[str, str, Maker, tuple[str, ...], tuple[str, ...]]] = [
        (
            "overlays",
            "lady",
            sets.lady,
            ("two_view.find_overlays=false",),
            (r"logo", r"fixed to", r"overlay", r"burned", r"\bstay", r"same place in"),
        ),
        (
            "bounds",
            "lady",
            sets.lady,
            ("cameras.bounds=false", "two_view.find_overlays=false"),
            (r"focal", r"distort", r"calibrat", r"\blens", r"logo", r"fixed to", r"\bstay"),
        ),
        (
            "bounds-zoom",
            "zoom-photos",
            zooms.photos_zoomed,
            ("cameras.bounds=false", *zoom_without_split),
            (r"zoom", r"focal", r"distort", r"calibrat", r"\blens"),
        ),
        (
            "split",
            "zoom-photos",
            zooms.photos_zoomed,
            zoom_without_split,
            (r"zoom", r"focal", r"distort", r"calibrat", r"\blens"),
        ),
        (
            "lenses",
            "room-fisheye-named",
            lens,
            ("cameras.recognise_lenses=false",),
            (r"fisheye", r"\blens", r"distort", r"wide"),
        ),
        (
            "agreement-aliked",
            "recorded-kitchen-aliked",
            _recorded_case("kitchen", "aliked").make,
            ("agreement.mode=off",),
            (r"\bpairs?\b", r"agree", r"contradict", r"confirm"),
        ),
        (
            "agreement-xfeat",
            "recorded-kitchen-xfeat",
            _recorded_case("kitchen", "xfeat").make,
            ("agreement.mode=off",),
            (r"\bpairs?\b", r"agree", r"contradict", r"confirm"),
        ),
        (
            "loops",
            "parquet",
            sets.set_as_it_is("parquet", config="phone"),
            ("loops.correct=false",),
            (r"loop", r"drift", r"bent", r"bend", r"join", r"contradict", r"same place"),
        ),
        (
            "turning",
            "turning-room",
            rooms.room_turned_in(),
            ("initialization.refuse_turning=false",),
            _TURNING,
        ),
    ]
    return [
        Row(
            name=f"off-{cure}",
            cases=(Case(name=f"off-{cure}", input_name=input_name, make=make, settings=settings),),
            judge=partial(_judge_cure, patterns=patterns),
        )
        for cure, input_name, make, settings, patterns in cures
    ]


def _named_fisheye(kit: Kit) -> rooms.Lens:
    return rooms.fisheye_lens(kit.variation.fisheye_deg, kit.variation.fisheye_distortion)


def _judge_cure(
    bench: Bench, outcomes: Sequence[Outcome], *, patterns: tuple[str, ...]
) -> list[Check]:
    (outcome,) = outcomes
    level = outcome.said.level
    found = outcome.placement()
    truth = f"{found.num_wrong} of {found.num_judged} elsewhere" if found else "truth unknown"
    registered = outcome.score.num_registered if outcome.score else 0
    unknown = ", ".join(outcome.unknown_settings)
    return [
        Check(
            label=f"verdict, {registered} registered, {truth}"
            + (f"; no such setting: {unknown}" if unknown else ""),
            figure=level,
            bar=f"not {GOOD}",
            is_ok=level not in (GOOD, NO_VERDICT),
        ),
        Check(
            label="the verdict names the cause",
            figure=outcome.said.shown(),
            bar=_in_words(patterns),
            is_ok=outcome.said.names(*patterns),
            case=outcome.case.name,
        ),
    ]


def _said_check(outcome: Outcome, patterns: tuple[str, ...], *, label: str) -> Check:
    """Whether the verdict's sentences, or the terminal where there are none, name something."""
    said = outcome.said
    is_named = said.names(*patterns) or replace(said, sentences=(said.terminal,)).names(*patterns)
    last_line = said.terminal.strip().rpartition("\n")[2]
    return Check(
        label=label,
        figure=said.shown() if said.sentences else f"{said.level}: {last_line}",
        bar=_in_words(patterns),
        is_ok=is_named,
        case=outcome.case.name,
    )


def _in_words(patterns: tuple[str, ...]) -> str:
    return " or ".join(pattern.replace(r"\b", "") for pattern in patterns)


# Figures


def _town_check(outcome: Outcome) -> Check:
    ate = outcome.score.ate_percent if outcome.score else None
    score = outcome.score
    registered = f"{score.num_registered}/{score.num_keyframes}" if score else "0"
    label = f"ATE %, {registered} registered ({outcome.said.level})"
    return percent_check(outcome, ate, bar=TOWN_PERCENT, label=label)


def _one_map(outcome: Outcome) -> Check:
    return count_check(
        outcome, outcome.score.num_maps if outcome.score else None, label="maps", at_most=1
    )


def _at_most(outcome: Outcome, value: float | None, bar: float, label: str) -> Check:
    return Check(
        label=label,
        figure=_shown(value),
        bar=f"<= {bar:.3g}",
        is_ok=value is not None and value <= bar,
        case=outcome.case.name,
    )


def _shown(value: float | None) -> str:
    return "no map" if value is None else f"{value:.3g}"


def _ate_if_enough(outcome: Outcome) -> float:
    score = outcome.score
    if score is None or not score.is_enough or score.ate_percent is None:
        return math.inf
    return score.ate_percent


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
