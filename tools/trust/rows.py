"""The rows of the table: what each is made from, and what its figures must be."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from trust import grounds, overlays, rooms, sets, zooms
from trust.bench import Bench, Case, Check, Outcome, Row, count_check, percent_check
from trust.inputs import ExifTags, Kit, Maker
from trust.map_rows import map_rows
from trust.rooms import Lens
from trust.scoring import difference_percent, held_cameras, num_masks

CPU_RATIO = 1.05
SET_DIFFERENCE_PERCENT = 1.0  # of the extent, between two versions on a set without truth
OVERLAY_RATIO = 1.2  # of the clean median that an overlay may cost


def all_rows(*, num_seeds: int) -> dict[str, Row]:
    """Every row by its name, in the table's order."""
    rows = [
        lady_row(),
        *overlay_rows(num_seeds),
        *zoom_rows(),
        *room_rows(),
        *nadir_rows(),
        temple_row(),
        masks_row(),
        *set_rows(),
        *map_rows(num_seeds),
        *accept_rows(),
        *cpu_rows(),
    ]
    return {row.name: row for row in rows}


def lady_row() -> Row:
    """The logo of a pan, against the same images with the logo painted over."""
    cases = (
        Case(name="lady", make=sets.lady),
        Case(name="lady-painted", make=sets.lady_painted_over),
    )
    return Row(name="lady", cases=cases, judge=_judge_lady)


def overlay_rows(num_seeds: int) -> list[Row]:
    """Text, clock and logo burned into the town and into fox, several times each."""
    return [
        _overlay_row("osd-town", overlays.town_clip, num_seeds=num_seeds, bar=0.06),
        _overlay_row("osd-fox", overlays.fox_photos, num_seeds=num_seeds, bar=0.13),
    ]


def zoom_rows() -> list[Row]:
    """Focal lengths, centres and sizes that change within an input."""
    return [
        _ate_row("zoom-exif", zooms.photos_zoomed_with_exif, bar=0.5),
        _ate_row("zoom-photos", zooms.photos_zoomed, bar=0.5),
        _ate_row("zoom-video", zooms.clip_zoomed_half_way, bar=0.5),
        _ate_row("crop", zooms.photos_cropped, bar=0.5),
        _ate_row("two-sizes", zooms.clip_of_two_sizes, bar=0.5),
        _ate_row("two-lenses", zooms.photos_of_two_lenses, bar=0.3),
        _ate_row("unchanged", zooms.photos_as_they_are, bar=0.3),
    ]


def room_rows() -> list[Row]:
    """Lenses: unknown, named by EXIF, and given by file."""
    lenses: dict[str, Callable[[Kit], Lens]] = {
        "pinhole": lambda kit: rooms.pinhole_lens(kit.variation.pinhole_deg),
        "pinhole-wide": lambda kit: rooms.pinhole_lens(kit.variation.wide_pinhole_deg),
        "fisheye-named": lambda kit: rooms.fisheye_lens(
            kit.variation.fisheye_deg, kit.variation.fisheye_distortion
        ),
        "fisheye-wide": lambda kit: rooms.fisheye_lens(
            kit.variation.wide_fisheye_deg, kit.variation.fisheye_distortion
        ),
        "panorama": lambda kit: rooms.panorama_lens(),
    }
    bars = {"pinhole": 0.05, "pinhole-wide": 0.05, "panorama": 1.0}
    tags: dict[str, ExifTags] = {"fisheye-named": rooms.ACTION_CAMERA}
    formats = {
        "colmap": rooms.write_colmap_line,
        "opencv": rooms.write_opencv_yaml,
        "kalibr": rooms.write_kalibr_yaml,
    }
    found = [
        _ate_row(
            f"room-{name}",
            rooms.room_seen_by(lens, exif=tags.get(name)),
            bar=bars.get(name, 0.3),
        )
        for name, lens in lenses.items()
    ]
    given = [
        _ate_row(
            f"room-{name}-{form}",
            rooms.room_seen_by(lenses[name], exif=tags.get(name), calibration=write),
            bar=0.1,
        )
        for name in ("fisheye-named", "fisheye-wide")
        for form, write in formats.items()
    ]
    return [*found, *given]


def nadir_rows() -> list[Row]:
    """Flat ground seen from straight above, which says little about the focal length."""
    makers = {
        "nadir-unknown": grounds.nadir_survey(),
        "nadir-exif": grounds.nadir_survey(has_exif=True),
        "nadir-given": grounds.nadir_survey(is_given=True),
    }
    return [
        Row(
            name=name,
            cases=(Case(name=name, make=make),),
            judge=partial(_judge_nadir, is_given=name == "nadir-given"),
        )
        for name, make in makers.items()
    ]


def temple_row() -> Row:
    """A narrow lens that no EXIF describes, while frames arrive."""
    make = sets.set_as_it_is("temple", truth="groundtruth.txt")
    return Row(name="temple", cases=(Case(name="temple", make=make),), judge=_judge_temple)


def masks_row() -> Row:
    """Half of every image is masked."""
    case = Case(name="masks", make=sets.fox_half_masked)
    return Row(name="masks", cases=(case,), judge=_judge_masks)


def set_rows() -> list[Row]:
    """Sets without truth: as many keyframes as before, where the version before has them."""
    return [
        _set_row("lund", None, 29),
        _set_row("copr", "drone", 38),
        _set_row("hotel", "phone", 60),
    ]


def accept_rows() -> list[Row]:
    """The bars of accept.py, a row for each of its sets."""
    return [
        Row(name=f"accept-{name}", cases=(), judge=partial(_judge_accept, name=name))
        for name in ("fox", "redkitchen", "sceaux", "kitchen", "seneca", "brighton", "cpu")
    ]


def cpu_rows() -> list[Row]:
    """CPU seconds against the version before."""
    configs = {"fox": "phone", "redkitchen": "phone", "seneca": "drone"}
    return [
        Row(
            name=f"cpu-{name}",
            cases=(),
            judge=partial(
                _judge_cpu,
                case=Case(name=f"cpu-{name}", make=sets.set_as_it_is(name, config=config)),
            ),
        )
        for name, config in configs.items()
    ]


def _judge_lady(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    logo, painted = outcomes
    score = logo.score
    num_seen = score.num_overlay_observations if score else None
    difference = difference_percent(logo.run, painted.run)
    label = (
        f"difference to the images with the logo painted over, {difference[1]} shared, %"
        if difference
        else "difference %"
    )
    return [
        count_check(
            logo,
            score.num_overlay_points if score else None,
            label=f"points of the map that stay in the logo's box ({num_seen} observations there)",
            at_most=0,
        ),
        count_check(
            logo,
            score.num_registered if score else None,
            label="keyframes in the largest map",
            at_least=38,
        ),
        percent_check(logo, difference[0] if difference else None, bar=2.0, label=label),
        count_check(
            painted,
            painted.score.num_registered if painted.score else None,
            label="keyframes with the logo painted over",
            at_least=38,
        ),
    ]


def _judge_nadir(bench: Bench, outcomes: Sequence[Outcome], *, is_given: bool) -> list[Check]:
    (outcome,) = outcomes
    score = outcome.score
    held = held_cameras(outcome.run)
    ate = _ate(outcome)
    label = f"focal length error % (held: {held}; ATE {'-' if ate is None else f'{ate:.3g}'} %)"
    error = score.focal_error_percent if score else None
    check = percent_check(outcome, error, bar=2.0 if is_given else 3.0, label=label)
    if held and not is_given and score is not None and score.is_enough:
        return [replace(check, bar=f"{check.bar} or held", is_ok=True)]
    return [check]


def _judge_temple(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    (outcome,) = outcomes
    score = outcome.score
    return [
        count_check(
            outcome, score.num_registered if score else None, label="registered", at_least=47
        ),
        percent_check(outcome, _ate(outcome), bar=0.08),
        _at_least_percent(
            outcome,
            score.timely_percent if score else None,
            bar=80.0,
            label="registered within 5 keyframes of their arrival, %",
        ),
    ]


def _judge_masks(bench: Bench, outcomes: Sequence[Outcome]) -> list[Check]:
    (outcome,) = outcomes
    score = outcome.score
    exported = bench.export(outcome)
    return [
        count_check(
            outcome, score.num_registered if score else None, label="registered", at_least=50
        ),
        percent_check(outcome, _ate(outcome), bar=0.2),
        count_check(
            outcome,
            score.num_masked_observations if score else None,
            label="observations under a mask",
            at_most=0,
        ),
        count_check(outcome, num_masks(outcome.run), label="masks in the run folder", at_least=50),
        count_check(outcome, num_masks(exported), label="masks in export --undistort", at_least=50),
    ]


def _set_row(name: str, config: str | None, registered: int) -> Row:
    make = sets.set_as_it_is(name, config=config)
    reference = Case(name=f"{name}-reference", input_name=name, make=make, is_reference=True)
    return Row(
        name=name,
        cases=(Case(name=name, make=make),),
        judge=partial(_judge_set, registered=registered, reference=reference),
    )


def _judge_set(
    bench: Bench, outcomes: Sequence[Outcome], *, registered: int, reference: Case
) -> list[Check]:
    """As many keyframes as ever, and centres where the version to compare with has them."""
    (outcome,) = outcomes
    score = outcome.score
    checks = [
        count_check(
            outcome,
            score.num_registered if score else None,
            label="registered",
            at_least=registered,
        )
    ]
    if bench.baseline is None:
        return checks
    found = difference_percent(outcome.run, bench.outcome(reference).run)
    value, shared = found or (None, 0)
    label = f"difference to the version before, {shared} shared, %"
    return [*checks, percent_check(outcome, value, bar=SET_DIFFERENCE_PERCENT, label=label)]


def _judge_accept(bench: Bench, outcomes: Sequence[Outcome], *, name: str) -> list[Check]:
    lines = bench.accept(name)
    return [
        Check(label=label, figure=figure, bar=bar, is_ok=is_ok)
        for is_ok, label, figure, bar in lines
    ] or [Check(label="accept.py", figure="not run: no --check", bar="run", is_ok=False)]


def _judge_cpu(bench: Bench, outcomes: Sequence[Outcome], *, case: Case) -> list[Check]:
    if bench.baseline is None:
        return [Check(label="CPU", figure="no --baseline", bar="run", is_ok=False)]
    times = bench.cpu_seconds(case)
    now, before = (statistics.median(each) for each in times)
    every = ", ".join(f"{one:.1f} / {other:.1f}" for one, other in zip(*times, strict=True))
    return [
        Check(
            label=f"CPU s, now / before, medians {now:.1f} / {before:.1f} ({every})",
            figure=f"{now / before:.3f}",
            bar=f"<= {CPU_RATIO}",
            is_ok=now <= CPU_RATIO * before,
        )
    ]


def _at_least_percent(outcome: Outcome, value: float | None, *, bar: float, label: str) -> Check:
    return Check(
        label=label,
        figure="no map" if value is None else f"{value:.3g}",
        bar=f">= {bar:.3g}",
        is_ok=value is not None and value >= bar,
        case=outcome.case.name,
    )


def _ate_row(name: str, make: Maker, *, bar: float) -> Row:
    return Row(name=name, cases=(Case(name=name, make=make),), judge=partial(_judge_ate, bar=bar))


def _judge_ate(bench: Bench, outcomes: Sequence[Outcome], *, bar: float) -> list[Check]:
    return [percent_check(each, _ate(each), bar=bar) for each in outcomes]


def _ate(outcome: Outcome) -> float | None:
    return outcome.score.ate_percent if outcome.score else None


def _overlay_row(
    name: str, maker_of: Callable[[int | None], Maker], *, num_seeds: int, bar: float
) -> Row:
    """The clean input with as many seeds of the run, then an overlay of each seed."""
    clean = tuple(
        Case(
            name=f"{name}-clean-{seed}",
            input_name=f"{name}-clean",
            make=maker_of(None),
            arguments=("--set", f"runtime.seed={seed}"),
        )
        for seed in range(num_seeds)
    )
    burned = tuple(
        Case(
            name=f"{name}-{seed}",
            make=maker_of(seed),
            arguments=("--set", f"runtime.seed={seed}"),
        )
        for seed in range(num_seeds)
    )
    return Row(name=name, cases=(*burned, *clean), judge=partial(_judge_overlays, bar=bar))


def _judge_overlays(bench: Bench, outcomes: Sequence[Outcome], *, bar: float) -> list[Check]:
    half = len(outcomes) // 2
    burned, clean = (_median_ate(part) for part in (outcomes[:half], outcomes[half:]))
    allowed = max(OVERLAY_RATIO * clean, bar)
    figures = ", ".join("-" if _ate(each) is None else f"{_ate(each):.3g}" for each in outcomes)
    return [
        Check(
            label=f"median ATE %, clean {clean:.4g} (all: {figures})",
            figure=f"{burned:.4g}",
            bar=f"<= {allowed:.3g}",
            is_ok=burned <= allowed,
        )
    ]


def _median_ate(outcomes: Sequence[Outcome]) -> float:
    """Infinite for a run without a map or with too few keyframes in it."""
    errors = []
    for each in outcomes:
        error = _ate(each)
        is_enough = each.score is not None and each.score.is_enough
        errors.append(error if is_enough and error is not None else float("inf"))
    return statistics.median(errors)
