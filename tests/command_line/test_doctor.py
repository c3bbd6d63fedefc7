from __future__ import annotations

import io
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console

from adapters import doctor
from adapters.doctor import Finding, Weights, examine, findings_table, is_core_ready
from adapters.install_advice import how_to_install
from adapters.sources.streams import srt_program
from tests.support.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def finding(part: str) -> Finding:
    (found,) = [one for one in examine() if one.part == part]
    return found


def text_of(findings: list[Finding]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(findings_table(findings))
    return stream.getvalue()


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    original = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name in missing else original(name)
    )


def test_this_environment_is_ready() -> None:
    assert is_core_ready(examine())


def test_what_the_core_needs_is_what_the_package_installs() -> None:
    required = {re.split("[<>=]", name)[0] for name in PYPROJECT["project"]["dependencies"]}
    assert set(doctor._CORE) == required


@pytest.mark.parametrize("package", sorted(doctor._CORE))
def test_a_missing_package_of_the_core_is_told_with_what_needs_it(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    without(monkeypatch, package)
    found = finding(package)
    assert not found.is_ready
    assert doctor._CORE[package] in found.detail
    assert not is_core_ready(examine())


def test_every_extra_for_users_is_looked_for() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    required = {
        re.split("[<>=]", name)[0]
        for extra in extras.keys() - {"dev", "vggsfm"}
        for name in extras[extra]
    }
    assert set(doctor._EXTRAS) == required


@pytest.mark.parametrize("package", sorted(doctor._EXTRAS))
def test_a_missing_package_of_an_extra_is_told_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert any(name.startswith(package) for name in extras[doctor._EXTRAS[package]])
    without(monkeypatch, package)
    found = finding(package)
    assert not found.is_ready
    assert how_to_install(doctor._EXTRAS[package]) in found.detail
    assert is_core_ready(examine())


@pytest.mark.parametrize("package", ["opencv-python-headless", "onnxruntime", "torch"])
def test_sift_needs_opencv_and_onnxruntime_and_no_torch(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    without(monkeypatch, package)
    assert finding("matcher sift").is_ready is (package == "torch")


def test_an_old_python_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert not doctor._python().is_ready


def test_a_gpu_is_told_and_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not finding("GPU").is_ready
    assert is_core_ready(examine())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU 9000")
    assert finding("GPU").is_ready
    assert finding("GPU").detail == "Test GPU 9000"


@pytest.mark.parametrize(
    ("display", "has_viewer", "is_ready", "word"),
    [
        (":0", True, True, "spawn"),
        ("", True, False, "--view serve"),
        (":0", False, False, "no viewer program"),
    ],
)
def test_a_viewer_window_needs_a_screen_and_the_program(
    monkeypatch: pytest.MonkeyPatch, display: str, has_viewer: bool, is_ready: bool, word: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_viewer else None)
    found = doctor._viewer()
    assert found.is_ready is is_ready
    assert word in found.detail


def test_the_table_has_a_row_for_every_finding() -> None:
    findings = examine()
    text = text_of(findings)
    assert all(one.part in text for one in findings)
    assert findings_table(findings).row_count == len(findings)


def weights_at(path: Path | None) -> Weights:
    return Weights(
        matcher="net",
        setting="net.checkpoint",
        path=path,
        licence="Free for penguins.",
        how_to_get="fetch net --to folder",
    )


def test_a_matcher_without_weights_says_how_to_name_and_get_them(tmp_path: Path) -> None:
    for path in (None, tmp_path / "none.pth"):
        (found,) = [one for one in examine([weights_at(path)]) if one.part == "matcher net"]
        assert not found.is_ready
        assert is_core_ready(examine([weights_at(path)]))
        assert "Free for penguins." in weights_at(path).note()
        assert "\n  fetch net --to folder" in weights_at(path).note()
    assert "net.checkpoint=PATH" in text_of(examine([weights_at(None)]))
    assert f"{path}, which is not there" in found.detail


def test_a_matcher_whose_weights_are_there_is_ready_and_tells_their_licence(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(b"weights")
    (found,) = [one for one in examine([weights_at(path)]) if one.part == "matcher net"]
    assert found.is_ready
    assert found.detail == f"weights {path}"
    assert weights_at(path).note() == "matcher net: Free for penguins."


def test_srt_is_received_by_a_program_that_knows_it_or_what_does_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for knows in (True, False):
        monkeypatch.setattr(srt_program, "_ffmpeg_knows_srt", lambda: False)
        monkeypatch.setattr(srt_program, "_program_knows_srt", lambda knows=knows: knows)
        found = finding("srt:// streams")
        assert (found.is_ready, found.is_optional) == (knows, True)
        assert ("apt install ffmpeg" in found.detail) is not knows
