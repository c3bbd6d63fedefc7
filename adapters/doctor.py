"""What is installed and what can run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.install_advice import how_to_install
from adapters.screen import has_screen

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    part: str
    is_ready: bool
    detail: str
    is_optional: bool = False  # the default run works without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a matcher needs besides its code."""

    matcher: str
    setting: str  # section.key=value of the configuration that names them
    path: Path | None  # where the configuration says they are
    licence: str
    how_to_get: str  # a command

    @property
    def is_there(self) -> bool:
        """Whether something lies where they should be."""
        return self.path is not None and self.path.exists()

    def note(self) -> str:
        """What a user must know of them, in lines to copy from."""
        lines = [f"matcher {self.matcher}: {self.licence}"]
        if not self.is_there:
            lines.append(f"To get them:\n  {self.how_to_get}")
        return "\n".join(lines)


_CORE = {  # distribution: what it is for
    "numpy": "arrays",
    "array-api-compat": "arrays of NumPy or PyTorch in windows",
    "pycolmap": "map and bundle adjustment",
    "opencv-python-headless": "SIFT and optical flow",
    "onnxruntime": "matching of SIFT's descriptors",
    "threadpoolctl": "sharing the cores",
    "networkx": "scene graph",
    "ifaddr": "addresses of this machine",
    "Jinja2": "report.html",
    "av": "video files",
    "pillow": "AVIF photos",
    "pillow-heif": "HEIC photos",
    "rerun-sdk": "live view and recording",
    "pydantic": "configuration",
    "PyYAML": "configuration",
    "typer": "command line",
    "rich": "progress on the terminal",
    "watchfiles": "watched folders",
}
_EXTRAS = {  # distribution: the extra that brings it
    "matplotlib": "benchmark",
    "aiomqtt": "mqtt",
    "aiohttp": "phone",
    "cryptography": "phone",
    "segno": "phone",
    "rawpy": "raw",
    "ray": "ray",
    "rosbags": "ros",
    "laspy": "survey",
    "lazrs": "survey",
    "pyproj": "survey",
    "rasterio": "survey",
    "safetensors": "mast3r",
    "torch": "mast3r",
}


def examine(weights: Sequence[Weights] = ()) -> list[Finding]:
    """Looks at the interpreter, the packages, the processor and the matchers.

    Args:
        weights: what matchers need that do not come with LiveSfM.
    """
    learned = [_learned_matcher(needed) for needed in weights]
    parts = [_python(), *_packages(), *_extras(), _processor(), _gpu(), _sift(), *learned]
    return [*parts, _srt(), _viewer()]


def findings_table(findings: list[Finding]) -> Table:
    """The findings for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="livesfm doctor")
    table.add_column("part")
    table.add_column("ready")
    table.add_column("detail")
    for finding in findings:
        table.add_row(finding.part, "yes" if finding.is_ready else "no", escape(finding.detail))
    return table


def is_core_ready(findings: list[Finding]) -> bool:
    """Whether the default run works."""
    return all(finding.is_ready for finding in findings if not finding.is_optional)


def _python() -> Finding:
    version = platform.python_version()
    return Finding(part="Python", is_ready=sys.version_info >= (3, 11), detail=version)


def _packages() -> list[Finding]:
    findings = []
    for name, purpose in _CORE.items():
        version = _version(name)
        detail = f"{version}, {purpose}" if version else f"missing: {purpose} needs it"
        findings.append(Finding(part=name, is_ready=version is not None, detail=detail))
    return findings


def _extras() -> list[Finding]:
    """What some sources and views need besides."""
    findings = []
    for name, extra in _EXTRAS.items():
        version = _version(name)
        detail = f"{version}, {extra}" if version else f"missing: {how_to_install(extra)}"
        findings.append(
            Finding(part=name, is_ready=version is not None, is_optional=True, detail=detail)
        )
    return findings


def _processor() -> Finding:
    return Finding(
        part="processor",
        is_ready=True,
        detail=f"{platform.machine()}, {os.cpu_count()} cores; every stage runs on it",
    )


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        ready, detail = False, "torch is not installed; only the learned matchers use a GPU"
    else:
        import torch

        ready = torch.cuda.is_available()
        detail = (
            torch.cuda.get_device_name()
            if ready
            else "no CUDA device; only the learned matchers are slow without one"
        )
    return Finding(part="GPU", is_ready=ready, detail=detail, is_optional=True)


def _sift() -> Finding:
    ready = all(_version(name) is not None for name in ("opencv-python-headless", "onnxruntime"))
    return Finding(
        part="matcher sift", is_ready=ready, detail="no weights needed; free to use (Apache-2.0)"
    )


def _learned_matcher(needed: Weights) -> Finding:
    if needed.path is None:
        detail = f"its weights are not configured: --set {needed.setting}=PATH"
    else:
        detail = f"weights {needed.path}" + ("" if needed.is_there else ", which is not there")
    return Finding(
        part=f"matcher {needed.matcher}",
        is_ready=needed.is_there and _version("torch") is not None,
        detail=detail,
        is_optional=True,
    )


def _srt() -> Finding:
    if _version("av") is None:
        ready, detail = False, "PyAV is missing"
    else:
        from adapters.sources.streams.srt_program import srt_in_words

        ready, detail = srt_in_words()
    return Finding(part="srt:// streams", is_ready=ready, detail=detail, is_optional=True)


def _viewer() -> Finding:
    if importlib.util.find_spec("rerun_cli") is None:
        problem = "the installed rerun-sdk has no viewer program"
    elif not has_screen():
        problem = "no screen here: --view serve shows the run in a browser"
    else:
        return _viewer_window(is_ready=True, detail="--view spawn opens it")
    return _viewer_window(is_ready=False, detail=problem)


def _viewer_window(*, is_ready: bool, detail: str) -> Finding:
    return Finding(part="viewer window", is_ready=is_ready, detail=detail, is_optional=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
