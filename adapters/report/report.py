"""The page of a run: reads what the run left and fills the template.

One HTML file that needs nothing else: pictures are in it as data URIs and SVG, there is no script,
and its content security policy allows none.
"""

from __future__ import annotations

import base64
import hashlib
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from adapters.install_advice import installed_version
from adapters.report.content import Section
from adapters.report.headline import headline_of, tiles_of
from adapters.report.map_sections import plan_section, positions_section, products_section
from adapters.report.quality_sections import (
    cameras_section,
    links_section,
    residuals_section,
    tracks_section,
)
from adapters.report.run_record import RunRecord, read_run
from adapters.report.run_sections import left_out_section, settings_section, time_section
from adapters.report.words import count, printable, short, without_secrets

if TYPE_CHECKING:
    from jinja2 import Environment

_PAGE = Path(__file__).with_name("page")
_FIRST_UNIX_TIME_S = 1e8  # capture times above it are dates


def report_page(run: Path) -> bytes:
    """The report of a run that ended, goes on or was killed.

    What is missing or damaged in the folder is named where it would be shown.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    record = read_run(run)
    style = (_PAGE / "report.css").read_text(encoding="utf-8")
    template = _environment().get_template("report.html.jinja")
    page: str = template.render(
        name=short(run.resolve().name, at_most=80),
        subtitle=_subtitle(record),
        headline=headline_of(record),
        tiles=tiles_of(record),
        sections=_sections(record),
        style=Markup(style),  # noqa: S704 - our own file
        style_hash=_hash_of(style),
        version=installed_version(),
    )
    return page.encode(errors="backslashreplace")


def _sections(record: RunRecord) -> list[Section]:
    sections = (
        plan_section(record),
        products_section(record),
        positions_section(record),
        cameras_section(record),
        residuals_section(record),
        links_section(record),
        tracks_section(record),
        left_out_section(record),
        time_section(record),
        settings_section(record),
    )
    return [section for section in sections if section is not None]


def _subtitle(record: RunRecord) -> str:
    """Sources and time of capture."""
    sources = record.events.sources or sorted({frame.source for frame in record.frames})
    shown = [short(without_secrets(one), at_most=80) for one in sources[:3]]
    more = [f"{len(sources) - 3} more"] if len(sources) > 3 else []
    times_s = [frame.captured_at_s for frame in record.frames]
    first_s, last_s = min(times_s, default=0.0), max(times_s, default=0.0)
    words = [", ".join([*shown, *more])] if shown else []
    words.append(count(len(record.frames), "frame"))
    if first_s > _FIRST_UNIX_TIME_S:
        days = dict.fromkeys(_day(one) for one in (first_s, last_s))
        words.append(f"captured {' to '.join(days)} (UTC)")
    return " · ".join(words)


def _day(time_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(time_s))
    except (OSError, OverflowError, ValueError):
        return "at an unknown time"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: object) -> object:
    """What the template writes of a value: of texts of others only what can be printed."""
    return printable(value) if type(value) is str else value


def _hash_of(style: str) -> str:
    """The style's hash as a content security policy names it (CSP level 3, section 6.7.3.3)."""
    digest = hashlib.sha256(style.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
