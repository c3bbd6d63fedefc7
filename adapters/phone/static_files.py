"""The page's files, from the package."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from engine.config import PhoneConfig

_TYPES = {"css": "text/css", "js": "text/javascript"}
_FILES = ("page.css", "page.js", "camera.js", "link.js", "plan.js", "sensors.js")


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """One file of the page."""

    text: str
    content_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFiles:
    """The page as phones get it."""

    page: str
    notice_page: str
    files: Mapping[str, StaticFile]

    def notice(self, *, title: str, text: str) -> str:
        """A page that says one thing."""
        page = self.notice_page.replace("{title}", html.escape(title))
        return page.replace("{text}", html.escape(text))


def read_static_files(config: PhoneConfig) -> StaticFiles:
    """Reads the page, which then asks its camera for what ``config`` says. Blocking."""
    folder = resources.files(__package__) / "page"

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    settings = {
        "{edge_px}": str(config.image_edge_px),
        "{rate_hz}": f"{config.max_rate_hz:g}",
        "{jpeg_quality}": str(config.jpeg_quality),
    }
    page = read("page.html")
    for key, value in settings.items():
        page = page.replace(key, value)
    files = {
        name: StaticFile(text=read(name), content_type=_TYPES[name.rpartition(".")[2]])
        for name in _FILES
    }
    return StaticFiles(page=page, notice_page=read("notice.html"), files=files)
