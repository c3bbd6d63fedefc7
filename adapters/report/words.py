"""Numbers and names in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

MISSING = "–"
_MAX_CHARS = 120  # of a name
_HIDDEN = "…"
_NO_BREAK = "\u00a0"  # a space
_SECRET_WORDS = re.compile(r"((?:pass|pwd|token|key|secret|auth)\w*=)[^/&;]+", re.IGNORECASE)
# An address within a text, up to the punctuation behind it.
_ADDRESS = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]{0,30}://)(?P<rest>\S*[^\s:;,.!?)\]}>\"'])", re.IGNORECASE
)
# Users and passwords; these may hold slashes, behind a colon that is not that of a port.
_CREDENTIALS = re.compile(r"[^/?#@]*(?::(?!\d+(?:[/?#]|$)).*|[^/?#]*)@")


def number(value: float | None, digits: int = 3) -> str:
    """A number to some significant digits, without exponents for usual sizes."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0.0:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 1e-6:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(places, 0)}f}"


def fixed(value: float | None, places: int = 2) -> str:
    """A number with so many places behind the point."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(value, places) + 0.0:,.{places}f}"  # no minus before a zero


def count(value: int, one: str, many: str = "") -> str:
    """A number of things."""
    return f"{value:,} {one if value == 1 else many or f'{one}s'}"


def percent(ratio: float | None, digits: int = 2) -> str:
    """A share."""
    return MISSING if ratio is None else f"{number(100.0 * ratio, digits)}{_NO_BREAK}%"


def seconds(value: float | None) -> str:
    """A time span."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 120.0:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def milliseconds(value: float | None) -> str:
    """A latency."""
    if value is None:
        return MISSING
    return f"{value:,.0f} ms" if value < 10_000.0 else f"{value / 1000.0:,.1f} s"


def plain(name: str) -> str:
    """A name with spaces for underscores."""
    return name.replace("_", " ")


def printable(text: str) -> str:
    """A text without what must not be shown.

    Characters that cannot be printed, which may turn others around, are question marks; addresses
    in it lose users, passwords and queries.
    """
    shown = "".join(char if char.isprintable() or char == _NO_BREAK else "?" for char in text)
    return _ADDRESS.sub(_without_credentials, shown) if "://" in shown else shown


def _without_credentials(address: re.Match[str]) -> str:
    rest = address["rest"]
    credentials = _CREDENTIALS.match(rest)
    path, mark, query = rest[credentials.end() if credentials else 0 :].partition("?")
    path = _SECRET_WORDS.sub(rf"\1{_HIDDEN}", path)
    return f"{address['scheme']}{path}{mark}{_HIDDEN if query else ''}"


def short(text: str, *, at_most: int = _MAX_CHARS) -> str:
    """A text cut in its middle if it is long, in characters that can be printed."""
    shown = printable(text)
    if len(shown) <= at_most:
        return shown
    half = at_most // 2
    return f"{shown[:half]}{_HIDDEN}{shown[-half:]}"


def listed(names: Sequence[str], *, at_most: int = 5) -> str:
    """Some names, and how many more there are."""
    shown = [short(name, at_most=60) for name in names[:at_most]]
    num_more = len(names) - len(shown)
    return ", ".join([*shown, *([f"{num_more:,} more"] if num_more else [])])


def without_secrets(text: str) -> str:
    """A source or setting without credentials, and without folders that nobody asked about.

    Addresses lose users, passwords and queries; of an absolute path the last part stays.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        scheme, _, rest = text.partition("://")
        try:
            parts = urlsplit(text)
        except ValueError:
            return f"{scheme}://{_HIDDEN}"
        host = parts.netloc.rpartition("@")[2] or rest.rpartition("@")[2]
        path = _SECRET_WORDS.sub(rf"\1{_HIDDEN}", parts.path)
        return f"{scheme}://{host}{path}" if parts.netloc else f"{scheme}://{host}"
    pattern, equals, file = text.partition("=")
    if equals and file.startswith(("/", "~")):
        return f"{pattern}={without_secrets(file)}"
    if text.startswith(("/", "~")):
        return f"{_HIDDEN}/{Path(text).name}"
    return text


def shown_path(path: Path) -> str:
    """A path as it was typed; of an absolute one what is below the working directory, or the name.

    The folders above say who somebody is, and commands with the rest work where the page was made.
    """
    if not path.is_absolute():
        return str(path)
    here = Path.cwd()
    is_below = here in path.parents and here != here.parent  # the root has all folders below it
    return str(path.relative_to(here)) if is_below else path.name
