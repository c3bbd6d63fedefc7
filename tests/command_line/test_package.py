"""What is installed works from any folder: the clone that tools/setup links to, and a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from engine.config import load_config, preset_paths
from tests.support.paths import ROOT
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.slow

BUILD_INPUT = ("pyproject.toml", "README.md", "LICENSE", "engine", "adapters", "configs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A livesfm program, the folder that its packages are in, and where it is run."""

    program: Path
    packages: Path
    work: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(str(self.program), *arguments, folder=self.work)

    def evaluates(self, code: str) -> str:
        done = run(str(self.program.with_name("python")), "-c", code, folder=self.work)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=folder,
        env={**environment, "COLUMNS": "200", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def checked(*command: str, folder: Path) -> None:
    done = run(*command, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without a network, by the build backend in this environment."""
    copy, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_INPUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name)
        else:
            shutil.copy(source, copy / name)
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    checked(sys.executable, *build, str(copy), folder=copy)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own, which finds the other packages in this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    checked(sys.executable, "-m", "venv", "--without-pip", str(folder), folder=folder.parent)
    python = folder / "bin" / "python"
    install = ("-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel))
    checked(sys.executable, *install, folder=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file is a folder; the .pth files in that folder, such as the link to the
    # clone, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    work = tmp_path_factory.mktemp("work")
    return Installed(program=folder / "bin" / "livesfm", packages=packages, work=work)


@pytest.fixture(scope="module")
def from_clone(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The editable package of this environment."""
    program = Path(sysconfig.get_path("scripts"), "livesfm")
    return Installed(program=program, packages=ROOT, work=tmp_path_factory.mktemp("work"))


@pytest.fixture(params=["from_wheel", "from_clone"])
def installed(request: pytest.FixtureRequest) -> Installed:
    found: Installed = request.getfixturevalue(request.param)
    return found


def test_a_wheel_holds_all_files_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    packaged = {
        path.relative_to(ROOT).as_posix().replace("adapters/api/livesfm/", "livesfm/")
        for package in ("engine", "adapters")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    presets = {f"engine/presets/{path.name}" for path in preset_paths().values()}
    assert names == packaged | presets
    typed = {"engine/py.typed", "adapters/py.typed", "livesfm/py.typed"}
    assert typed <= names  # else what livesfm has from the engine is Any to a program's mypy
    assert "adapters/phone/page/page.html" in names
    assert "adapters/report/page/report.html.jinja" in names


def test_the_packages_are_the_installed_ones(installed: Installed) -> None:
    code = (
        "import adapters as a, engine as b, livesfm as c; print(*(m.__file__ for m in (a, b, c)))"
    )
    *files, api = (Path(name) for name in installed.evaluates(code).split())
    assert [path.parent.parent for path in files] == [installed.packages] * 2
    assert api.parent.parent in {installed.packages, installed.packages / "adapters/api"}


def test_named_presets_are_found_from_another_folder(installed: Installed) -> None:
    names = ",".join(preset_paths())
    code = "from engine.config import preset_paths; print(*preset_paths(), sep=',')"
    assert installed.evaluates(code) == names
    code = "from engine.config import *; print(dump_config(load_config(['{}'])))"
    for name in preset_paths():
        dumped: Mapping[str, object] = yaml.safe_load(installed.evaluates(code.format(name)))
        assert dumped == load_config([name]).model_dump(mode="json")


def test_an_unknown_preset_is_refused_from_another_folder(installed: Installed) -> None:
    done = installed.run("run", "synthetic:town", "--config", "drones")
    assert done.returncode == 2
    assert "did you mean drone? Presets: default, drone, " in done.stderr


def test_a_run_with_a_named_preset_writes_its_folder_where_it_is_started(
    installed: Installed,
) -> None:
    town = "synthetic:town?path=lawnmower&width=240&height=180&frames=60"
    quick = ("sources.max_frames=10", "dense.enabled=false")
    sets = [word for one in quick for word in ("--set", one)]
    done = installed.run(
        *("run", town, "--config", "drone_video", "--view", "none", "--quiet", *sets)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = yaml.safe_load((installed.work / "runs/town/config.yaml").read_text("utf-8"))
    expected = load_config(["drone_video"], quick)
    assert written == expected.model_dump(mode="json")
    assert (installed.work / "runs/town/summary.json").exists()


def test_the_phone_page_is_read_from_another_folder(installed: Installed) -> None:
    code = """
from adapters.phone.static_files import read_static_files
from engine.config import load_config
print(len(read_static_files(load_config(["phone"]).phone).files))
"""
    assert int(installed.evaluates(code)) > 3


def test_the_doctor_and_the_version_work_from_another_folder(installed: Installed) -> None:
    assert installed.run("--version").stdout.startswith("livesfm ")
    done = installed.run("doctor", "--config", "mast3r")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pycolmap" in done.stdout


def test_the_advice_for_a_wheel_names_packages_and_no_program_of_a_clone(
    from_wheel: Installed,
) -> None:
    code = "from adapters.install_advice import how_to_install; print(how_to_install('mqtt'))"
    advice = from_wheel.evaluates(code)
    assert advice.startswith(f"{from_wheel.program.with_name('python')} -m pip install 'aiomqtt")
