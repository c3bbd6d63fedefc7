"""Console view: a panel of a run's figures in the terminal, with log lines above it."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from logging import LogRecord
from threading import Lock
from typing import TYPE_CHECKING, TextIO

from adapters.live.run_counters import RunCounters
from adapters.views.log_lines import LogLevel, LogLine, log_line_of
from engine.events import ALSO_AN_EVENT, Event
from engine.types import Frame, FramePose, MapCounts, VerdictLevel

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_HZ = 4.0
PLAIN_INTERVAL_S = 2.0  # between status lines where nothing can be redrawn
PANEL_WIDTH = 88  # narrower on narrower terminals
BAR_WIDTH = 30

_MARKS = {LogLevel.WARNING: ("warning: ", "yellow"), LogLevel.ERROR: ("error: ", "red")}
_VERDICT_STYLES = {
    VerdictLevel.GOOD: "green",
    VerdictLevel.DOUBTFUL: "yellow",
    VerdictLevel.WRONG: "bold red",
}


class ConsoleView:
    """The progress of a run on a terminal, or as plain lines where the stream is none.

    Attributes:
        console: the console that is drawn to; log handlers that write to it write above the panel.
    """

    def __init__(
        self,
        total_frames: int | None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts drawing.

        Args:
            total_frames: how many frames will come, where that is known.
            stream: where to write; standard error by default.
            clock: seconds, monotonic.
        """
        from rich.console import Console
        from rich.live import Live

        self.console: Console = Console(file=stream or sys.stderr, highlight=False)
        self._total_frames = total_frames
        self._clock = clock
        self._started_s = clock()
        self._next_line_s = self._started_s + PLAIN_INTERVAL_S
        self._counters = RunCounters()
        self._last_status = ""
        self._lock = Lock()  # the panel is drawn by a thread of its own
        self._live: Live | None = None
        self._is_closed = False
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._panel, console=self.console, refresh_per_second=REFRESH_HZ
            )
            self._live.start()

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Shows nothing: a terminal has no pictures."""

    def show_counts(self, counts: MapCounts) -> None:
        """Shows how large the map is."""
        with self._lock:
            self._counters.update_counts(counts)

    def show_event(self, event: Event) -> None:
        """Counts the event and writes its log line, if it has one."""
        with self._lock:
            self._counters.update(event)
            log_line = log_line_of(event, self._counters)
        if log_line is not None:
            self._write_log_line(log_line)
        if self._live is None and self._clock() >= self._next_line_s:
            self._write_status()

    def shows_as_event(self, record: LogRecord) -> bool:
        """Whether a line that is logged says what an event says, which is written here."""
        return not self._is_closed and ALSO_AN_EVENT.items() <= vars(record).items()

    def close(self) -> None:
        """Draws the last figures and leaves them on the screen."""
        self._is_closed = True
        if self._live is not None:
            self._live.stop()
        elif status_line(self._counters, self._total_frames) != self._last_status:
            self._write_status()

    def _write_log_line(self, log_line: LogLine) -> None:
        from rich.text import Text

        text, *_ = log_line.text.splitlines() or [""]  # the run's last lines have the rest
        elapsed, (mark, style) = f"{self._elapsed()}  ", _MARKS.get(log_line.level, ("", ""))
        text = f"{elapsed}{mark}{text}"
        if self._live is not None:
            text = self._wrapped(text, indent=len(elapsed))
        line = Text(text)
        line.stylize("bright_black", 0, len(elapsed))
        line.stylize(style, len(elapsed), len(elapsed) + len(mark))
        self._print(line)

    def _wrapped(self, text: str, *, indent: int) -> str:
        """Text in lines of the terminal; words that are longer, as addresses are, stay whole."""
        lines = textwrap.wrap(
            text,
            width=self.console.width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return "\n".join(lines)

    def _write_status(self) -> None:
        self._next_line_s = self._clock() + PLAIN_INTERVAL_S
        self._last_status = status_line(self._counters, self._total_frames)
        self._print(f"{self._elapsed()}  {self._last_status}")

    def _print(self, line: RenderableType) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def _elapsed(self) -> str:
        return format_elapsed(self._clock() - self._started_s)

    def _panel(self) -> RenderableType:
        with self._lock:
            return build_panel(
                self._counters, total_frames=self._total_frames, elapsed=self._elapsed()
            )


def format_elapsed(elapsed_s: float) -> str:
    """Minutes and seconds, and hours when there are any."""
    minutes, seconds = divmod(int(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def status_line(counters: RunCounters, total_frames: int | None) -> str:
    """All figures in one line of plain text."""
    received = f"{counters.frames_received}"
    frames = f"{received}/{total_frames}" if total_frames else received  # 0: none to come
    median, high = format_latency(counters)
    latency = [f"latency {median} (p95 {high})"] if counters.has_live_source else []
    parts = [
        f"received {frames} frames",
        f"keyframes {counters.keyframes}",
        f"registered {counters.registered}",
        f"points {counters.points3D}",
        f"error {format_error(counters)}",
        *latency,
        f"dropped {format_drops(counters)}",
        f"loops {counters.loops}",
        f"snapshots {counters.snapshots}",
        f"verdict {format_verdict(counters)}",
    ]
    return "  ".join(parts)


def format_error(counters: RunCounters) -> str:
    """Mean reprojection error of the last global bundle adjustment."""
    error_px = counters.reprojection_error_px
    return "-" if error_px is None else f"{error_px:.2f} px"


def format_latency(counters: RunCounters) -> tuple[str, str]:
    """Median and 95th percentile of the time from arrival to pose."""
    percentiles_s = counters.latency_percentiles_s()
    if percentiles_s is None:
        return "-", "-"
    median_s, high_s = percentiles_s
    return f"{1e3 * median_s:.0f} ms", f"{1e3 * high_s:.0f} ms"


def format_drops(counters: RunCounters) -> str:
    """Dropped frames, by reason."""
    by_reason = counters.dropped_by_reason.most_common()
    reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason)
    return f"{counters.dropped} ({reasons})" if reasons else "0"


def format_verdict(counters: RunCounters) -> str:
    """The level of the verdict; nothing is said before there is a map."""
    has_map = counters.registered > 0
    return counters.verdict.level.value if has_map or counters.verdict.reasons else "-"


def build_panel(counters: RunCounters, *, total_frames: int | None, elapsed: str) -> RenderableType:
    """The figures as a panel with four lines."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel

    return Panel(
        Group(_frames_line(counters, total_frames), _figures(counters), _verdict_line(counters)),
        title="[bold]LiveSfM[/bold]",
        title_align="left",
        subtitle=elapsed,
        subtitle_align="right",
        border_style="bright_black",
        box=box.ROUNDED,
        padding=(0, 1),
        width=PANEL_WIDTH,
    )


def _frames_line(counters: RunCounters, total_frames: int | None) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    received = counters.frames_received
    line = Table.grid(padding=(0, 2))
    text = Text(f"{received:,}", style="bold", no_wrap=True, overflow="ellipsis")
    if total_frames:
        text.append(f" of {total_frames:,}", style="not bold")
    text.append(" received", style="not bold bright_black")
    if counters.dropped:
        text.append(f"   dropped {format_drops(counters)}", style="not bold yellow")
    if not total_frames:  # unknown, or none is to come
        line.add_row(text)
    else:
        line.add_row(ProgressBar(max(total_frames, 1), received, width=BAR_WIDTH), text)
    return line


def _figures(counters: RunCounters) -> RenderableType:
    from rich.table import Table

    median, high = format_latency(counters)
    is_live = counters.has_live_source
    grid = Table.grid(padding=(0, 1, 0, 0))
    for value_width in (6, 10, 9, 3) if is_live else (6, 10, 3):
        grid.add_column(style="bright_black", no_wrap=True)
        grid.add_column(style="bold", no_wrap=True, min_width=value_width)
    grid.add_row(
        *("keyframes", f"{counters.keyframes:,}"),
        *("points", f"{counters.points3D:,}"),
        *(("latency", median) if is_live else ()),
        *("snapshots", f"{counters.snapshots:,}"),
    )
    grid.add_row(
        *("registered", f"{counters.registered:,}"),
        *("error", format_error(counters)),
        *(("p95", high) if is_live else ()),
        *("loops", f"{counters.loops:,}"),
    )
    return grid


def _verdict_line(counters: RunCounters) -> RenderableType:
    """The verdict with the gravest of its reasons, as far as there is room."""
    from rich.text import Text

    reasons = counters.verdict.reasons
    style = _VERDICT_STYLES[counters.verdict.level]
    line = Text("verdict    ", style="bright_black", no_wrap=True, overflow="ellipsis")
    line.append(format_verdict(counters), style=style)
    if reasons:
        line.append(f"  {reasons[0].sentence}", style="default")
    return line
