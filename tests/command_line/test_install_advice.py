"""What a user is advised to type works in the environment that it is read in."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

import pytest

from adapters import install_advice
from adapters.install_advice import (
    how_to_install,
    how_to_install_packages,
    installed_version,
    missing_package,
)
from engine.errors import AdapterUnavailableError
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = sorted(PROJECT["optional-dependencies"].keys() - {"dev"})
PIP = [sys.executable, "-m", "pip", "install"]


@pytest.fixture
def another_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not the .venv that tools/setup made."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))


def not_installed(_: str) -> NoReturn:
    raise importlib.metadata.PackageNotFoundError("livesfm")


def requirements_in(command: str) -> set[frozenset[str]]:
    """Each requirement as the set of its bounds, the first with the name before it."""
    words = shlex.split(command)
    assert words[: len(PIP)] == PIP
    return {normalised(word) for word in words[len(PIP) :]}


def normalised(requirement: str) -> frozenset[str]:
    name = requirement.replace("<", " ").replace(">", " ").split()[0]
    return frozenset([name, *requirement.removeprefix(name).split(",")])


def test_in_the_environment_of_a_clone_the_advice_is_its_setup_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    monkeypatch.chdir(ROOT)
    assert how_to_install("mqtt") == "tools/setup mqtt"
    monkeypatch.chdir(tmp_path)
    assert how_to_install("mqtt") == shlex.join([str(ROOT / "tools" / "setup"), "mqtt"])


@pytest.mark.usefixtures("another_environment")
@pytest.mark.parametrize("extra", EXTRAS)
def test_elsewhere_the_advice_names_the_packages_of_the_extra_as_they_are_required(
    extra: str,
) -> None:
    required = PROJECT["optional-dependencies"][extra]
    assert requirements_in(how_to_install(extra)) == {normalised(name) for name in required}


@pytest.mark.usefixtures("another_environment")
def test_elsewhere_without_an_installed_distribution_the_advice_installs_the_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert how_to_install("mqtt") == shlex.join([*PIP, f"{ROOT}[mqtt]"])


@pytest.mark.parametrize(
    ("installer", "command"),
    [("uv", ["uv", "pip", "install", "--python", sys.executable]), ("pip", PIP)],
)
def test_an_environment_without_pip_is_extended_by_what_made_it(
    monkeypatch: pytest.MonkeyPatch, installer: str, command: list[str]
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str:
            assert name == "INSTALLER"
            return f"{installer}\n"

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    assert how_to_install_packages("a>=1", "b") == shlex.join([*command, "a>=1", "b"])


def test_the_error_of_a_missing_package_names_it_and_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(install_advice, "how_to_install", lambda extra: f"get {extra}")
    error = missing_package("MQTT", package="aiomqtt", extra="mqtt")
    assert isinstance(error, AdapterUnavailableError)
    assert str(error) == "MQTT needs the package aiomqtt: get mqtt"
    assert (error.package, error.extra) == ("aiomqtt", "mqtt")


def test_the_version_is_that_of_the_installed_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_version() == PROJECT["version"]
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert installed_version() == "unknown"
