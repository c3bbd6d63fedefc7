"""The house: which module may import what.

README.md draws the same table; change both together.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The engine's modules by floor, each with the packages from outside that it may import. A module
# imports engine modules from strictly lower floors only.
FLOORS = (
    {  # 0: the words
        "errors": "",
        "types": "numpy",
    },
    {  # 1: what adapters may see, too
        "capture_clock": "",
        "config": "pydantic yaml",
        "events": "",
        "geometry": "numpy",
        "ports": "",
        "window_types": "numpy",
    },
    {  # 2: single skills, and state that knows no map
        "cameras": "pycolmap",
        "dense_matches": "numpy",
        "estimators": "cv2 numpy pycolmap",
        "event_queue": "",
        "files": "",
        "frame_tracking": "cv2 numpy",
        "gps_track": "",
        "keypoint_tables": "numpy",
        "match_graph": "pycolmap",
        "memory": "",
        "point_notes": "numpy pycolmap",
        "retrieval": "numpy",
        "run_statistics": "numpy",
        "scene_graph": "networkx numpy",
        "similarity_fit": "numpy",
        "view_dispatch": "",
        "window_model": "numpy pycolmap",
        "window_tracks": "numpy",
    },
    {  # 3: the map, and what lasts
        "journal": "cv2 numpy pycolmap",
        "pair_matching": "numpy",
        "run_folder": "",
        "sparse_map": "numpy pycolmap",
        "trajectory": "numpy",
        "window_adjustment": "numpy pycolmap",
        "window_triangulation": "numpy torch",
    },
    {  # 4: work on the map
        "bundle_adjustment": "numpy pycolmap",
        "camera_calibration": "numpy pycolmap",
        "frame_posing": "numpy",
        "georeference": "numpy pycolmap",
        "map_consistency": "numpy networkx",
        "metric_scale": "numpy",
        "snapshots": "pycolmap",
        "window_initialization": "numpy",
        "windows": "numpy pycolmap",
    },
    {  # 5: that work put in order
        "map_growth": "numpy",
        "position_adjustment": "numpy pycolmap",
        "recorder": "pycolmap",
        "window_merging": "numpy",
        "window_solver": "numpy",
    },
    {  # 6: what it says, and maps that begin with a window
        "mapping_facts": "",
        "window_bootstrap": "",
    },
    {  # 7: the map of the run, beginning again, and windows of a run
        "current_map": "",
        "georeferencing": "numpy pycolmap",
        "map_starts": "numpy pycolmap",
        "window_work": "",
    },
    {  # 8: the end of a run
        "map_end": "networkx",
    },
    {  # 9: the mapping state machine
        "pipeline": "numpy pycolmap",
    },
    {  # 10: around the mapping
        "event_loop": "",
        "run_summary": "",
    },
    {  # 11: what goes in, and what is done with the map now and then
        "ingestion": "",
        "map_upkeep": "",
    },
    {  # 12: what waits between the stages of a run
        "mapping_items": "",
    },
    {  # 13: the stages
        "mapping_stage": "",
        "tracking_stage": "",
    },
    {  # 14: tasks, threads and signals
        "runtime": "",
    },
)
SIDEWAYS = {
    ("ports", "events"),
    ("ports", "window_types"),
}  # (importer, imported) on one floor: a port speaks of facts
KNOW_ASYNCIO = {
    *("event_loop", "ingestion", "map_upkeep", "mapping_items", "mapping_stage", "runtime")
}  # no other module does

# The adapters' families and modules, each with the packages from outside that it may import. They
# see engine floors up to ADAPTER_FLOOR, and nothing of each other.
ADAPTER_FLOOR = 1
ADAPTERS = {
    "matchers": "cv2 numpy torch",
    "sources": "aiohttp aiomqtt av cryptography cv2 numpy segno watchfiles",
    "views": "aiomqtt cv2 numpy rerun rich",
    "windows": "cv2 numpy pycolmap torch vggsfm",
    "mqtt_connection": "aiomqtt paho",
    "doctor": "rich torch",
    "evaluate": "numpy pycolmap rich",
    "export": "numpy pycolmap",
    "cli": "rich typer",
    "launch": "cv2 numpy threadpoolctl torch",
    "native_log": "",
}
SEE_EVERYTHING = {"cli", "launch"}  # they put a run together
SHARED = {"mqtt_connection"}  # what several families need; sees none of them
# Adapters import these where they use them: a command pays only for what it needs.
HEAVY = {
    "aiohttp",
    "aiomqtt",
    "av",
    "cryptography",
    "paho",
    "segno",
    "watchfiles",
    "cv2",
    "pycolmap",
    "rerun",
    "rich",
    "torch",
    "vggsfm",
    "kornia",
    "poselib",
}
# Its modules define networks, whose base classes must be there when they are read. So they import
# torch at once, and nobody outside imports them before a run asks for this matcher.
LOADED_LATE = "adapters.matchers.mast3r"
LOADS_AT_ONCE = {"torch"}  # nothing else

FLOOR_OF = {name: floor for floor, modules in enumerate(FLOORS) for name in modules}
PACKAGES_OF = {name: packages for modules in FLOORS for name, packages in modules.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name."""

    name: str  # absolute and dotted; leading dots when it is relative
    line: int
    at_module_level: bool  # runs when the module is imported

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.name.partition(".")[0]

    @property
    def part(self) -> str:
        """The second component: an engine module, an adapter family or an adapter module."""
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def is_from_outside(self) -> bool:
        """Whether it is neither the project's nor the standard library's."""
        return self.package not in {*sys.stdlib_module_names, "", "engine", "adapters"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One module of the project."""

    path: str  # in the repository
    name: str  # its key in the tables above
    imports: list[Import]

    @property
    def is_loaded_late(self) -> bool:
        """Whether it is imported as part of a package that nobody imports early."""
        return self.path.startswith(LOADED_LATE.replace(".", "/") + "/")


def imports_in(source: str) -> list[Import]:
    return list(_imports_below(ast.parse(source), at_module_level=True))


def _imports_below(node: ast.AST, *, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            origin = "." * child.level + (f"{child.module}." if child.module else "")
            names = [origin + alias.name for alias in child.names]
        else:
            inside = at_module_level and not _runs_later_or_never(child)
            yield from _imports_below(child, at_module_level=inside)
            continue
        for name in names:
            yield Import(name=name, line=child.lineno, at_module_level=at_module_level)


def _runs_later_or_never(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def engine_modules() -> list[Module]:
    return _modules("engine", name_of=lambda path: path.with_suffix("").as_posix())


def adapter_modules() -> list[Module]:
    return _modules("adapters", name_of=lambda path: path.with_suffix("").parts[0])


def _modules(folder: str, *, name_of: Callable[[Path], str]) -> list[Module]:
    """All modules below a folder, the packages' own files left out."""
    modules = [
        Module(
            path=path.relative_to(ROOT).as_posix(),
            name=name_of(path.relative_to(ROOT / folder)),
            imports=imports_in(path.read_text(encoding="utf-8")),
        )
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert modules, f"nothing to look at in {folder}"
    return modules


def assert_no_import(
    modules: list[Module], is_wrong: Callable[[Module, Import], bool], *, rule: str
) -> None:
    wrong = [
        f"{module.path}:{one.line} imports {one.name}"
        for module in modules
        for one in module.imports
        if is_wrong(module, one)
    ]
    assert not wrong, "\n".join([rule, *wrong])


def test_every_engine_module_has_a_floor_and_the_table_holds_no_other() -> None:
    existing = {module.name for module in engine_modules()}
    missing, gone = sorted(existing - set(FLOOR_OF)), sorted(set(FLOOR_OF) - existing)
    tables = "FLOORS in tests/test_architecture.py and README.md"
    assert not missing, f"give these engine modules a floor in {tables}: {missing}"
    assert not gone, f"these engine modules are gone, take them out of {tables}: {gone}"


def test_every_adapter_has_its_row_and_the_table_holds_no_other() -> None:
    existing = {module.name for module in adapter_modules()}
    missing, gone = sorted(existing - set(ADAPTERS)), sorted(set(ADAPTERS) - existing)
    tables = "ADAPTERS in tests/test_architecture.py and README.md"
    assert not missing, f"give these adapters a row in {tables}: {missing}"
    assert not gone, f"these adapters are gone, take them out of {tables}: {gone}"


def test_engine_modules_import_from_lower_floors_only() -> None:
    def is_wrong(module: Module, one: Import) -> bool:
        if one.package != "engine" or (module.name, one.part) in SIDEWAYS:
            return False
        return FLOOR_OF.get(one.part, len(FLOORS)) >= FLOOR_OF.get(module.name, len(FLOORS))

    assert_no_import(engine_modules(), is_wrong, rule="only downwards through FLOORS, please:")


def test_the_engine_never_imports_adapters() -> None:
    assert_no_import(
        engine_modules(),
        lambda _, one: one.package == "adapters",
        rule="what the engine needs of the outside comes through engine/ports.py:",
    )


def test_asyncio_stays_in_the_runtime_and_its_parts() -> None:
    assert_no_import(
        engine_modules(),
        lambda module, one: one.package == "asyncio" and module.name not in KNOW_ASYNCIO,
        rule=f"asyncio lives in {sorted(KNOW_ASYNCIO)} of the engine:",
    )


def test_engine_modules_import_the_packages_of_their_row_only() -> None:
    assert_no_import(
        engine_modules(),
        lambda module, one: (
            one.is_from_outside and one.package not in PACKAGES_OF.get(module.name, "").split()
        ),
        rule="packages that FLOORS does not give the module:",
    )


def test_adapters_import_the_packages_of_their_row_only() -> None:
    assert_no_import(
        adapter_modules(),
        lambda module, one: (
            one.is_from_outside and one.package not in ADAPTERS.get(module.name, "").split()
        ),
        rule="packages that ADAPTERS does not give the module:",
    )


def test_adapters_see_the_lowest_floors_only() -> None:
    low = {name for name, floor in FLOOR_OF.items() if floor <= ADAPTER_FLOOR}
    assert_no_import(
        adapter_modules(),
        lambda module, one: (
            module.name not in SEE_EVERYTHING and one.package == "engine" and one.part not in low
        ),
        rule=f"adapters may import {sorted(low)} of the engine:",
    )


def test_adapters_never_import_each_other() -> None:
    assert_no_import(
        adapter_modules(),
        lambda module, one: (
            module.name not in SEE_EVERYTHING
            and one.package == "adapters"
            and one.part not in {module.name, *SHARED}
        ),
        rule=f"adapters meet in {sorted(SEE_EVERYTHING)} only:",
    )


def test_adapters_import_heavy_packages_where_they_use_them() -> None:
    assert_no_import(
        adapter_modules(),
        lambda module, one: (
            one.package in HEAVY
            and one.at_module_level
            and not (module.is_loaded_late and one.package in LOADS_AT_ONCE)
        ),
        rule="import these inside functions, or for TYPE_CHECKING:",
    )


def test_what_defines_networks_is_imported_where_it_is_used() -> None:
    modules = adapter_modules()
    assert any(module.is_loaded_late for module in modules), f"{LOADED_LATE} is gone"
    assert_no_import(
        modules,
        lambda module, one: (
            f"{one.name}.".startswith(f"{LOADED_LATE}.")
            and one.at_module_level
            and not module.is_loaded_late
        ),
        rule=f"import {LOADED_LATE} inside functions, since it loads {sorted(LOADS_AT_ONCE)}:",
    )


def test_imports_are_absolute() -> None:
    assert_no_import(
        [*engine_modules(), *adapter_modules()],
        lambda _, one: one.name.startswith("."),
        rule="write the whole name:",
    )


def test_package_files_hold_a_docstring_and_nothing_else() -> None:
    for path in [*ROOT.glob("engine/**/__init__.py"), *ROOT.glob("adapters/**/__init__.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path} says nothing about its package"
        assert len(tree.body) == 1, f"{path} holds code"


def test_the_reader_of_imports_sees_every_kind() -> None:
    source = """
import os, numpy.linalg
from engine import types
from ..views import notes
from . import events
if TYPE_CHECKING:
    import rerun
try:
    import cv2
except ImportError:
    pass
class Reader:
    import av
    def read(self):
        with open("x"):
            from torch.nn import Module
"""
    found = {(one.name, one.line, one.at_module_level) for one in imports_in(source)}
    assert found == {
        ("os", 2, True),
        ("numpy.linalg", 2, True),
        ("engine.types", 3, True),
        ("..views.notes", 4, True),
        (".events", 5, True),
        ("rerun", 7, False),
        ("cv2", 9, True),
        ("av", 13, True),
        ("torch.nn.Module", 16, False),
    }
