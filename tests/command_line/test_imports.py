"""Importing is free: no side effects, and no package that is not needed yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT, TOOLS
from tests.support.waiting import HANG_S

OPTIONAL = ["aiohttp", "aiomqtt", "matplotlib"]  # extras
SLOW_TO_LOAD = ["av", "cv2", "onnxruntime", "pycolmap", "rerun", "torch"]
OF_RUNS = ["numpy"]  # what a command that starts nothing does without
NETWORKS = ("adapters.matchers.mast3r.", "adapters.remote.hosted_mast3r")  # need torch at once

# Imports modules in an interpreter of its own, with some packages missing, and tells what changed.
# What the core's packages do when they are loaded is not the project's: they are loaded before.
PROBE = """
import asyncio, importlib, json, logging, os, random, signal, sys, threading, warnings

request = json.loads(sys.argv[1])


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in request["blocked"]:
            raise ImportError(f"{name} is blocked by the test")


def state():
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "environment": dict(os.environ),
        "folder": [os.getcwd(), os.listdir()],
        "search path": list(sys.path),
        "log handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "signals": [repr(signal.getsignal(which)) for which in (signal.SIGINT, signal.SIGTERM)],
        "warning filters": len(warnings.filters),
        "random numbers": hash(random.getstate()),
    }


sys.meta_path.insert(0, Blocker())
for name in request["loaded_before"]:
    importlib.import_module(name)
before = state()
failed = {}
for name in request["modules"]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
after = state()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps({"failed": failed, "changed": changed}))
"""

HELP = """
import json, sys

sys.argv = ["livesfm", *json.loads(sys.argv[1])]
from adapters.cli import main
try:
    main()
except SystemExit as stop:
    packages = {name.partition(".")[0] for name in sys.modules}
    print(json.dumps({"status": stop.code, "packages": sorted(packages)}))
"""


def module_names(folder: str) -> list[str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in dotted]


def is_network(name: str) -> bool:
    return name.startswith(NETWORKS)


def run_python(program: str, request: object, *, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter whose current folder is ``folder``."""
    return subprocess.run(
        [sys.executable, "-B", "-c", program, json.dumps(request)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def probe(folder: Path, **request: Any) -> dict[str, Any]:
    done = run_python(PROBE, request, folder=folder)
    assert done.returncode == 0, done.stderr
    *said, report = done.stdout.splitlines()
    assert (said, done.stderr) == ([], ""), "importing says something"
    result: dict[str, Any] = json.loads(report)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "loaded_before", "blocked"),
    [
        (
            "engine",
            ["cv2", "networkx", "numpy", "pycolmap", "pydantic", "yaml"],
            [*OPTIONAL, "av", "rerun", "rich", "torch", "typer"],
        ),
        (
            "adapters",
            ["numpy", "pydantic", "typer", "yaml"],
            [*OPTIONAL, *SLOW_TO_LOAD, "rich"],
        ),
    ],
)
def test_every_module_imports_without_side_effects_and_without_what_it_uses_later(
    tmp_path: Path, package: str, loaded_before: list[str], blocked: list[str]
) -> None:
    modules = [name for name in module_names(package) if not is_network(name)]
    assert len(modules) > 1
    report = probe(tmp_path, modules=modules, loaded_before=loaded_before, blocked=blocked)
    assert report["failed"] == {}
    assert report["changed"] == {}


@pytest.mark.slow
def test_every_module_of_networks_imports_without_side_effects_beside_torch(
    tmp_path: Path,
) -> None:
    modules = list(filter(is_network, module_names("adapters")))
    assert len(modules) > 1
    blocked = [*OPTIONAL, *SLOW_TO_LOAD, "rich"]
    blocked.remove("torch")
    report = probe(
        tmp_path,
        modules=modules,
        loaded_before=["numpy", "pydantic", "torch", "typer", "yaml"],
        blocked=blocked,
    )
    assert report["failed"] == {}
    assert report["changed"] == {}


def test_the_probe_sees_blocked_packages_and_side_effects(tmp_path: Path) -> None:
    (tmp_path / "needs_torch.py").write_text("import torch\n")
    (tmp_path / "noisy.py").write_text(
        "import logging, os\nlogging.basicConfig()\nos.environ['NOISY'] = '1'\nopen('made', 'w')\n"
    )
    report = probe(tmp_path, modules=["needs_torch", "noisy"], loaded_before=[], blocked=["torch"])
    assert report["failed"] == {"needs_torch": "torch is blocked by the test"}
    assert set(report["changed"]) == {"environment", "folder", "log handlers"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["demo", "--help"]], ids=" ".join
)
def test_help_answers_without_loading_what_only_a_run_needs(
    tmp_path: Path, arguments: list[str]
) -> None:
    done = run_python(HELP, arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *text, report = done.stdout.splitlines()
    answer = json.loads(report)
    assert answer["status"] == 0
    assert "Usage" in "\n".join(text)
    assert not {*SLOW_TO_LOAD, *OPTIONAL, *OF_RUNS} & set(answer["packages"])


@pytest.mark.parametrize("source", ["missing.mp4", "gopher://x"])
def test_a_source_that_does_not_exist_is_refused_without_loading_what_only_a_run_needs(
    tmp_path: Path, source: str
) -> None:
    done = run_python(HELP, ["run", source], folder=tmp_path)
    (report,) = done.stdout.splitlines()
    answer = json.loads(report)
    assert answer["status"] == 2
    assert done.stderr.startswith(f"livesfm: {source.partition(':')[0]}: ")
    assert not {*SLOW_TO_LOAD, *OPTIONAL, *OF_RUNS} & set(answer["packages"])


COMPRESSES = "import zlib; len(zlib.compress(bytes(100_000)))"


@pytest.mark.parametrize("first", ["livesfm", "engine.mapping.mapper", "adapters.cli"])
def test_what_compresses_still_works_once_pycolmap_is_loaded(first: str) -> None:
    program = [sys.executable, "-W", "error", "-c", f"import {first}, pycolmap; {COMPRESSES}"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_tools_that_read_models_load_zlib_first() -> None:
    texts = {path.name: path.read_text() for path in TOOLS.glob("*.py")}
    readers = {name: text for name, text in texts.items() if "\nimport pycolmap" in text}
    assert len(readers) > 3
    assert [name for name, text in readers.items() if "\nimport zlib" not in text] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only the wheel for Linux exports its zlib")
def test_pycolmap_that_was_imported_before_zlib_is_warned_of() -> None:
    program = [sys.executable, "-c", "import pycolmap, livesfm"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "RuntimeWarning: pycolmap was imported before zlib" in done.stderr
