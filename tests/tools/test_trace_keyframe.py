"""The tracing of a keyframe: figures of a short run, and of source files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.paths import ROOT, TOOLS

TOOL = TOOLS / "trace_keyframe.py"
SHORT_RUN = "synthetic:town?frames=32&width=320&height=240"
LEAN = [f"--set={one}" for one in ("dense.enabled=false", "sources.max_frames=12")]


@pytest.fixture(scope="module")
def trace() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trace_keyframe", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trace_keyframe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of five modules: two at the top and three in rooms."""
    root = tmp_path_factory.mktemp("checkout")
    files = {
        "engine/__init__.py": "",
        "engine/types.py": "",
        "engine/config.py": "import engine.types\n",
        "engine/mapping/__init__.py": "",
        "engine/mapping/mapper.py": (
            "from typing import TYPE_CHECKING\n"
            "from engine.mapping.model import growth\n"
            "if TYPE_CHECKING:\n"
            "    from engine.run.engine import Engine\n"
        ),
        "engine/mapping/model/growth.py": "from engine.config import Config\n",
        "engine/run/__init__.py": "",
        "engine/run/engine.py": (
            "from engine.mapping.mapper import Mapper\nimport engine.types\nimport os\n"
        ),
        "adapters/cli.py": "print()\n\n",
        "tests/test_nothing.py": "\n",
        "README.md": "four",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "engine/README.md").write_text("no module")
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("towns_painted_once")
def test_a_short_run_has_a_figure_in_every_row(
    trace: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.main([SHORT_RUN, "--json", *LEAN])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["num_keyframes"] >= 3
    figures = report["keyframe"]
    assert figures.keys() == trace.TRACED_ROWS.keys()
    for name, row in figures.items():
        assert 1 <= row["min"] <= row["median"] <= row["max"], name
    on_mapping, anywhere = figures["modules_on_mapping_thread"], figures["modules_on_all_threads"]
    assert on_mapping["median"] < anywhere["median"] < report["source"]["modules"]
    assert figures["hand_offs"]["median"] == 2
    assert figures["frames_to_pycolmap"]["max"] <= 6
    assert any(name.startswith("engine.mapping.") for name in report["entries"])


def test_the_report_names_every_row_and_what_is_handed_over(
    trace: ModuleType, small_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"median": 2.5, "min": 2, "max": 4}
    trace.print_report(
        {
            "num_keyframes": 2,
            "keyframe": dict.fromkeys(trace.TRACED_ROWS, row) | {"frames_to_pycolmap": None},
            "entries": {"engine.mapping.mapper.Mapper.add_keyframe": 3},
            "source": trace.static_figures(small_package, package="engine"),
        }
    )
    printed = capsys.readouterr().out
    for title in (*trace.TRACED_ROWS.values(), *trace.STATIC_ROWS.values()):
        assert title in printed
    assert "2.5 (2 to 4)" in printed
    assert "Mapper.add_keyframe" in printed
    assert "1.50" in printed


def test_source_files_are_counted(trace: ModuleType, small_package: Path) -> None:
    figures = trace.static_figures(small_package, package="engine")
    assert figures["modules"] == 5
    assert figures["top_entries"] == 4  # types, config, mapping, run
    assert figures["code_lines"] == 11
    assert figures["test_lines"] == 1
    assert figures["readme_bytes"] == 4


def test_the_longest_chain_follows_imports_that_are_executed(
    trace: ModuleType, small_package: Path
) -> None:
    chain = trace.static_figures(small_package, package="engine")["chain"]
    assert chain == [
        "engine.run.engine",
        "engine.mapping.mapper",
        "engine.mapping.model.growth",
        "engine.config",
        "engine.types",
    ]


def test_imports_in_a_circle_are_an_error(trace: ModuleType) -> None:
    with pytest.raises(ValueError, match="imports itself"):
        trace.longest_chain({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_the_engine_has_no_circle_of_imports(trace: ModuleType) -> None:
    assert len(trace.longest_chain(trace.import_graph(ROOT, package="engine"))) > 1


def test_keyframes_count_from_the_first_map_on(trace: ModuleType, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    kinds = [("KeyframeAdded", 1), ("KeyframeAdded", 4), ("MapInitialized", 4), ("FramePosed", 5)]
    kinds += [("KeyframeAdded", 9), ("MapInitialized", 9), ("KeyframeAdded", 12)]
    events.write_text("".join(f'{{"event": "{kind}", "frame_id": {i}}}\n' for kind, i in kinds))
    assert trace.ids_after_first_map(events) == {9, 12}
