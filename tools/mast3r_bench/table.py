"""The figures as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mast3r_bench.figures import Memory, Report, Timing

_FILE_WIDTH = 160  # characters; a terminal has its own


def show(report: Report) -> None:
    """Prints the table and what does not fit in it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(
        f"{report.device}, torch {report.torch}, {report.precision}, {report.num_threads} CPU"
        f" threads; {report.weights}; {report.width} x {report.height} px,"
        f" {report.queries} queries each way",
        f"matrix products: {report.matrix_tflops:.3g} TFLOPS; encode {report.encode_gflop:.0f}"
        f" GFLOP, pair {report.pair_gflop:.0f}, with points {report.pair_with_points_gflop:.0f}",
        sep="\n",
        highlight=False,
    )
    console.print(table_of(report))
    console.print(
        f"Shares are of {report.pairs_per_keyframe} pairs with one encode: encoder, decoder, heads"
        " (points + descriptors + outputs), matching.",
        highlight=False,
    )
    if report.upstream:
        best = max(each.pairs_per_s for each in report.upstream)
        for with_points, label in ((False, "without points"), (True, "with points")):
            ours = max(each.pairs_per_s for each in report.pairs if each.with_points == with_points)
            console.print(f"Best batch of each, {label}: {ours / best:.2f} x upstream's pairs/s.")
    if report.agreement is not None:
        agreement = report.agreement
        console.print(
            f"Reciprocal matches in float32: {agreement.share:.2%} of"
            f" {agreement.num_upstream} (upstream) and {agreement.num_ours} coincide,"
            f" {agreement.share_same_descriptors:.2%} on the same descriptors, which differ by"
            f" {agreement.max_descriptor_difference:.1e} at most.",
            highlight=False,
        )


def table_of(report: Report) -> Table:
    """One row per measurement."""
    table = Table()
    for column in ("", "batch", "ms each", "least - most", "CPU ms", "per s", "x upstream"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for column in ("of matrix rate", "peak MB", "enc / dec / heads / match %"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("describe", "1", *timing_cells(report.describe))
    for encode in report.encodes:
        table.add_row("encode", str(encode.batch), *timing_cells(encode.per_keyframe))
    upstream = {each.batch: each for each in report.upstream}
    for pairs in report.pairs:
        beside = upstream.get(pairs.batch)
        ratio = beside and (beside.ratio_with_points if pairs.with_points else beside.ratio)
        table.add_row(
            "pair with points" if pairs.with_points else "pair",
            str(pairs.batch)
            + (f" by {pairs.decoded_together}" if pairs.decoded_together < pairs.batch else ""),
            *timing_cells(pairs.per_pair),
            f"{ratio:.2f}" if ratio else "",
            f"{pairs.matrix_rate_share:.1%}",
            memory_cell(pairs.memory),
            shares_cell(pairs.shares),
        )
    for each in report.upstream:
        matching = each.matching_share
        table.add_row(
            "upstream's pair",
            str(each.batch),
            *timing_cells(each.per_pair),
            "1",
            "",
            memory_cell(each.memory),
            f"{100 * (1 - matching):.0f} forward / {100 * matching:.0f}",
        )
    return table


def timing_cells(timing: Timing) -> tuple[str, ...]:
    """Median, spread, CPU time and rate of one item."""
    return (
        f"{1e3 * timing.median_s:.2f}",
        f"{1e3 * timing.least_s:.2f} - {1e3 * timing.most_s:.2f}",
        f"{1e3 * timing.cpu_s:.1f}",
        f"{1 / timing.median_s:.4g}",
    )


def memory_cell(memory: Memory) -> str:
    """The GPU's, or the process's."""
    return f"{memory.allocated_mb or memory.peak_rss_mb:.0f}"


def shares_cell(shares: dict[str, float]) -> str:
    """Percent; the heads with what they consist of."""
    percent = {part: 100 * share for part, share in shares.items()}
    heads = [percent[part] for part in ("points_head", "descriptors_head", "outputs")]
    parts = "+".join(f"{part:.0f}" for part in heads)
    return (
        f"{percent['encoder']:.0f} / {percent['decoder']:.0f} / {sum(heads):.0f} ({parts}) /"
        f" {percent['matching']:.0f}"
    )
