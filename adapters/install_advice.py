"""How to install the packages of an extra, for the way LiveSfM is installed here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import sys
from pathlib import Path

from engine.errors import AdapterUnavailableError

_DISTRIBUTION = "livesfm"
_ROOT = Path(__file__).resolve().parents[1]  # of the clone, where this is one


def installed_version() -> str:
    """The version of the installed distribution, or "unknown" where none is installed."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def missing_package(adapter: str, *, package: str, extra: str) -> AdapterUnavailableError:
    """The error of an adapter whose package is not installed, with how to install its extra.

    Args:
        adapter: what needs the package, as a user calls it.
        package: the name of the package.
        extra: the extra of the distribution that brings the package.
    """
    return AdapterUnavailableError(
        adapter, package=package, extra=extra, how_to_install=how_to_install(extra)
    )


def how_to_install(extra: str) -> str:
    """The shell command that installs an extra of LiveSfM here.

    In the environment that ``tools/setup`` made it is that program, which keeps to the tested
    versions. In any other environment it names the packages, because LiveSfM itself need not be on
    a package index.
    """
    setup = _ROOT / "tools" / "setup"
    if setup.is_file() and Path(sys.prefix).resolve() == _ROOT / ".venv":
        here = Path.cwd()
        shown = setup.relative_to(here) if setup.is_relative_to(here) else setup
        return shlex.join([str(shown), extra])
    return how_to_install_packages(*_requirements(extra))


def how_to_install_packages(*requirements: str) -> str:
    """The shell command that installs packages into the environment of this interpreter."""
    return shlex.join([*_installer(), *requirements])


def _installer() -> list[str]:
    if importlib.util.find_spec("pip") is None and _was_installed_by("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install"]


def _was_installed_by(installer: str) -> bool:
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return (distribution.read_text("INSTALLER") or "").strip() == installer


def _requirements(extra: str) -> list[str]:
    """What the distribution requires for the extra; the distribution itself where none is here."""
    try:
        required = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [f"{_ROOT}[{extra}]"]
    marker = re.compile(rf"""\bextra\s*==\s*['"]{re.escape(extra)}['"]""")
    parts = [requirement.partition(";") for requirement in required]
    return [name.strip() for name, _, condition in parts if marker.search(condition)]
