"""The rows of the table: what each is made from, and what its figures must be."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from trust import overlays, rooms, zooms
from trust.bench import Bench, Case, Check, Outcome, Row, percent_check
from trust.inputs import ExifTags, Kit, Maker
from trust.rooms import Lens

OVERLAY_RATIO = 1.2  # of the clean median that an overlay may cost


def all_rows(*, num_seeds: int) -> dict[str, Row]:
    """Every row by its name, in the table's order."""
    rows = [*overlay_rows(num_seeds), *zoom_rows(), *room_rows()]
    return {row.name: row for row in rows}


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
        "fisheye-named": lambda kit: rooms.fisheye_lens(kit.variation.fisheye_deg),
        "fisheye-wide": lambda kit: rooms.fisheye_lens(kit.variation.wide_fisheye_deg),
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
