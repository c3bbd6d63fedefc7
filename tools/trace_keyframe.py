#!/usr/bin/env python3
"""Traces a run and reports how far the work for one keyframe is spread over the engine.

    tools/trace_keyframe.py
    tools/trace_keyframe.py photos/ --config configs/phone.yaml
    tools/trace_keyframe.py --repository ANOTHER_CHECKOUT --json

The run is an ordinary one without views. The work for a keyframe is what the mapping thread does
from the hand-off that brings the keyframe to the one that brings the next, without the hand-offs of
tracked frames in between. Modules that hold values and formulas only are left out. Figures are
medians over the keyframes that arrive after the first map, with their range; the last one is left
out, since the end of the run follows it. A second table holds what the source files alone show.

Another checkout is traced by the Python of its own .venv; its threads and packages must have the
names that the constants below hold.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

OWN_REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = "synthetic:town?frames=150"
PACKAGE = "engine"
MAPPING_THREAD = "mapping"  # prefix of its name
# Those whose work counts as done for a keyframe; others solve on copies or show.
KEYFRAME_THREADS = ("MainThread", "tracking", "matching", "mapping", "io")
VALUE_MODULES = ("engine.types", "engine.geometry", "engine.config", "engine.events")
HANDS_OVER = ("ThreadOwned.call.<locals>.", "CallWatch.")
KEYFRAME_TYPE, TRACKED_TYPE = "Keyframe", "TrackedFrame"
NUM_CALLS_WITH_INPUT = 3  # a hand-off's input is an argument of one of its first calls
POSE_ESTIMATION = "absolute_pose"  # in the name of what pycolmap does to register a keyframe


@dataclass(slots=True, kw_only=True)
class HandOff:
    """What the mapping thread did in one call from the event loop."""

    entry: str = ""  # the first function of the package
    keyframe_id: int | None = None  # of the keyframe that it brought
    is_tracked_frame: bool = False
    num_calls: int = 0
    switches: int = 0  # calls from one module into another
    modules: set[str] = dataclasses.field(default_factory=set)
    functions: set[str] = dataclasses.field(default_factory=set)
    frames_to_pose_estimation: int | None = None


@dataclass(slots=True, kw_only=True)
class KeyframeTrace:
    """The work for one keyframe."""

    frame_id: int
    hand_offs: list[HandOff] = dataclasses.field(default_factory=list)
    modules: set[str] = dataclasses.field(default_factory=set)  # on any thread
    functions: set[str] = dataclasses.field(default_factory=set)

    def figures(self) -> dict[str, int | None]:
        """One figure for each row of the table; None where the keyframe has none."""
        modules = {module for each in self.hand_offs for module in each.modules}
        functions = {function for each in self.hand_offs for function in each.functions}
        depths = (each.frames_to_pose_estimation for each in self.hand_offs)
        return {
            "modules_on_mapping_thread": len(modules),
            "functions_on_mapping_thread": len(functions),
            "module_switches": sum(each.switches for each in self.hand_offs),
            "modules_on_all_threads": len(modules | self.modules),
            "functions_on_all_threads": len(functions | self.functions),
            "hand_offs": len(self.hand_offs),
            "frames_to_pycolmap": next((depth for depth in depths if depth is not None), None),
        }


class Tracer:
    """Profiles all threads of a process.

    Args:
        package: the package whose modules and functions count.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._prefix = f"{package}."
        self._hand_off: HandOff | None = None
        self.keyframes: list[KeyframeTrace] = []

    def install(self) -> None:
        """Profiles this thread and all that start later, and marks calls handed to executors."""
        submit = concurrent.futures.ThreadPoolExecutor.submit

        def submit_marked(
            executor: Any, call: Callable[..., Any], /, *args: Any, **kwargs: Any
        ) -> Any:
            return submit(executor, functools.partial(self._run_marked, call), *args, **kwargs)

        concurrent.futures.ThreadPoolExecutor.submit = submit_marked  # type: ignore[method-assign]
        threading.setprofile(self._choose_profile)
        self._choose_profile()

    def _run_marked(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not threading.current_thread().name.startswith(MAPPING_THREAD):
            return call(*args, **kwargs)
        self._hand_off = HandOff()
        try:
            return call(*args, **kwargs)
        finally:
            self._keep(self._hand_off)
            self._hand_off = None

    def _choose_profile(self, *_: object) -> None:
        """Profiles the running thread as its name asks for."""
        name = threading.current_thread().name
        if name.startswith(MAPPING_THREAD):
            sys.setprofile(self._profile_mapping)
        elif name.startswith(KEYFRAME_THREADS):
            sys.setprofile(self._profile_beside)
        else:
            sys.setprofile(None)

    def _keep(self, hand_off: HandOff) -> None:
        if hand_off.keyframe_id is None and not hand_off.is_tracked_frame and self.keyframes:
            self.keyframes[-1].hand_offs.append(hand_off)

    # -- what the interpreter calls -------------------------------------------------------------

    def _profile_beside(self, frame: FrameType, event: str, arg: object) -> None:
        """Profiles threads beside the mapping thread."""
        if event == "call" and self.keyframes and (module := self._module(frame)) is not None:
            keyframe = self.keyframes[-1]
            keyframe.modules.add(module)
            if not is_nameless(frame.f_code):
                keyframe.functions.add(f"{module}.{frame.f_code.co_qualname}")

    def _profile_mapping(self, frame: FrameType, event: str, arg: object) -> None:
        hand_off = self._hand_off
        if hand_off is None:
            return
        if event == "call":
            module = self._module(frame)
            if module is not None:
                self._enter(hand_off, frame, module)
        elif event == "c_call" and hand_off.frames_to_pose_estimation is None:
            name, module = getattr(arg, "__name__", ""), getattr(arg, "__module__", None) or ""
            if POSE_ESTIMATION in name and module.startswith("pycolmap"):
                hand_off.frames_to_pose_estimation = self._depth(frame)

    def _enter(self, hand_off: HandOff, frame: FrameType, module: str) -> None:
        if is_nameless(frame.f_code):
            return
        name = f"{module}.{frame.f_code.co_qualname}"
        hand_off.entry = hand_off.entry or name
        hand_off.num_calls += 1
        if hand_off.num_calls <= NUM_CALLS_WITH_INPUT:
            self._look_for_input(hand_off, frame)
        caller = self._caller(frame)
        hand_off.switches += caller is not None and self._module(caller) != module
        hand_off.modules.add(module)
        hand_off.functions.add(name)

    def _look_for_input(self, hand_off: HandOff, frame: FrameType) -> None:
        """Learns from the arguments of a call whether a keyframe or a tracked frame came."""
        if hand_off.keyframe_id is not None or hand_off.is_tracked_frame:
            return
        code = frame.f_code
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            value = frame.f_locals.get(name)
            type_name = type(value).__name__
            if type_name == TRACKED_TYPE:
                hand_off.is_tracked_frame = True
            elif type_name == KEYFRAME_TYPE:
                frame_id = int(value.frame_id)  # type: ignore[union-attr]
                if not any(each.frame_id == frame_id for each in self.keyframes):
                    hand_off.keyframe_id = frame_id
                    self.keyframes.append(KeyframeTrace(frame_id=frame_id, hand_offs=[hand_off]))

    # -- frames ---------------------------------------------------------------------------------

    def _module(self, frame: FrameType) -> str | None:
        """The module of the package that holds a frame's code; None where it does not count."""
        name: str = frame.f_globals.get("__name__", "")
        is_counted = name.startswith(self._prefix) and name not in VALUE_MODULES
        return name if is_counted and not frame.f_code.co_filename.startswith("<") else None

    def _caller(self, frame: FrameType) -> FrameType | None:
        """The nearest frame of the package below."""
        below = frame.f_back
        while below is not None and self._module(below) is None:
            below = below.f_back
        return below

    def _depth(self, frame: FrameType) -> int:
        """Named functions of the package from the hand-off to a frame, both ends counted."""
        depth, each = 0, frame if self._module(frame) is not None else self._caller(frame)
        while each is not None:
            depth += not is_nameless(each.f_code)
            each = self._caller(each)
        return depth


def is_nameless(code: CodeType) -> bool:
    """Whether code is a lambda or a comprehension, or what hands a call to the mapping thread."""
    return code.co_name.startswith("<") or code.co_qualname.startswith(HANDS_OVER)


# -- a traced run ---------------------------------------------------------------------------------


def trace_run(run: Path, arguments: Sequence[str], *, package: str) -> dict[str, Any]:
    """Runs LiveSfM in this process with its threads profiled; what was found, for JSON.

    Args:
        run: where the run folder is to be.
        arguments: of ``livesfm run``, its source first.
        package: the package whose modules and functions count.
    """
    from adapters.cli import DOUBTED, main

    tracer = Tracer(package)
    sys.argv = ["livesfm", "run", *arguments, "--out", str(run), "--view", "none", "--quiet"]
    tracer.install()
    try:
        main()
    except SystemExit as ended:
        if ended.code not in (None, 0, DOUBTED):
            raise
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    after_map = ids_after_first_map(run / "events.jsonl")
    counted = [each for each in tracer.keyframes[:-1] if each.frame_id in after_map]
    entries = Counter(hand_off.entry for each in counted for hand_off in each.hand_offs)
    return {
        "num_keyframes": len(counted),
        "figures": [each.figures() for each in counted],
        "entries": dict(entries.most_common()),
    }


def ids_after_first_map(events: Path) -> set[int]:
    """Frame ids of the keyframes that were added after the first map of a run."""
    has_map, found = False, set()
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        has_map |= event["event"] == "MapInitialized"
        if has_map and event["event"] == "KeyframeAdded":
            found.add(int(event["frame_id"]))
    return found


def trace_repository(repository: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Traces a run of a checkout by that checkout's own Python."""
    python = repository / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory(prefix="livesfm-trace-") as folder:
        found = Path(folder) / "trace.json"
        command = [
            str(python) if python.exists() else sys.executable,
            str(Path(__file__).resolve()),
            *arguments,
            f"--repository={repository}",
            f"--trace-into={found}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return result


# -- the source files alone -----------------------------------------------------------------------


def static_figures(repository: Path, *, package: str) -> dict[str, Any]:
    """Sizes of a checkout, and the longest chain of imports inside its package."""
    root = repository / package
    chain = longest_chain(import_graph(repository, package=package))
    return {
        "modules": len(modules_of(repository, package=package)),
        "top_entries": sum(
            path.suffix == ".py"
            and path.name != "__init__.py"
            or path.is_dir()
            and any(path.glob("*.py"))
            for path in root.iterdir()
        ),
        "longest_import_chain": len(chain),
        "chain": chain,
        "code_lines": count_lines(repository / name for name in (package, "adapters")),
        "test_lines": count_lines([repository / "tests"]),
        "readme_bytes": (repository / "README.md").stat().st_size,
    }


def modules_of(repository: Path, *, package: str) -> dict[str, Path]:
    """The files of a package's modules by their dotted names; packages themselves left out."""
    paths = sorted((repository / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(repository).with_suffix("").parts): path
        for path in paths
        if path.name != "__init__.py"
    }


def import_graph(repository: Path, *, package: str) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports when it is loaded."""
    modules = modules_of(repository, package=package)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {each for each in imported_names(tree.body) if each in modules} - {name}
    return graph


def imported_names(statements: Iterable[ast.stmt]) -> Iterable[str]:
    """Dotted names that a module's top-level imports may mean."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)


def longest_chain(graph: Mapping[str, set[str]]) -> list[str]:
    """The longest way along imports, from the importing end.

    Raises:
        ValueError: imports go round in a circle.
    """
    found: dict[str, list[str]] = {}
    open_names: set[str] = set()

    def chain_from(name: str) -> list[str]:
        if name in open_names:
            raise ValueError(f"{name} imports itself by way of others")
        if name not in found:
            open_names.add(name)
            chains = [chain_from(each) for each in sorted(graph[name])]
            found[name] = [name, *max(chains, key=len, default=[])]
            open_names.remove(name)
        return found[name]

    return max((chain_from(name) for name in sorted(graph)), key=len, default=[])


def count_lines(folders: Iterable[Path]) -> int:
    """Lines of all Python files below some folders."""
    return sum(
        path.read_text(encoding="utf-8").count("\n")
        for folder in folders
        for path in folder.rglob("*.py")
    )


# -- the report -----------------------------------------------------------------------------------

TRACED_ROWS = {
    "modules_on_mapping_thread": "modules entered on the mapping thread",
    "functions_on_mapping_thread": "functions called on the mapping thread",
    "module_switches": "calls into another module on the mapping thread",
    "modules_on_all_threads": "modules entered, all threads but the solving ones",
    "functions_on_all_threads": "functions called, the same threads",
    "hand_offs": "hand-offs to the mapping thread",
    "frames_to_pycolmap": "functions from the hand-off to pycolmap, registering",
}
STATIC_ROWS = {
    "modules": f"modules in {PACKAGE}/",
    "top_entries": f"modules and packages at the top of {PACKAGE}/",
    "longest_import_chain": f"modules in the longest import chain of {PACKAGE}/",
    "code_lines": f"lines of {PACKAGE}/ and adapters/",
    "test_lines": "lines of tests/",
    "readme_bytes": "bytes of README.md",
}


def summarize(figures: Sequence[Mapping[str, int | None]]) -> dict[str, dict[str, float] | None]:
    """Median and range of each traced figure; None where no keyframe has one."""
    summary: dict[str, dict[str, float] | None] = {}
    for name in TRACED_ROWS:
        values = [value for each in figures if (value := each[name]) is not None]
        summary[name] = (
            {"median": statistics.median(values), "min": min(values), "max": max(values)}
            if values
            else None
        )
    return summary


def print_report(report: Mapping[str, Any]) -> None:
    """Prints both tables, and what is handed to the mapping thread."""
    print(f"one keyframe, of {report['num_keyframes']} after the first map")
    for name, title in TRACED_ROWS.items():
        row = report["keyframe"][name]
        text = "-" if row is None else f"{row['median']:g} ({row['min']:g} to {row['max']:g})"
        print(f"  {title:52s} {text}")
    print("calls handed to the mapping thread, per keyframe")
    for entry, count in report["entries"].items():
        print(f"  {entry:52s} {count / max(1, report['num_keyframes']):.2f}")
    print("source files")
    for name, title in STATIC_ROWS.items():
        print(f"  {title:52s} {report['source'][name]:,}")
    print("longest import chain: " + " > ".join(report["source"]["chain"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Traces the work for one keyframe of a run.")
    parser.add_argument("source", nargs="?", default=SOURCE, help=f"default {SOURCE}")
    parser.add_argument("--config", action="append", default=[], help="as of livesfm run")
    parser.add_argument("--set", action="append", default=[], help="as of livesfm run")
    parser.add_argument("--repository", type=Path, default=OWN_REPOSITORY, help="a checkout")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--trace-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    run_arguments = [
        options.source,
        *(f"--config={each}" for each in options.config),
        *(f"--set={each}" for each in options.set),
    ]
    repository = options.repository.resolve()
    if options.trace_into is not None:
        sys.path.insert(0, str(repository))
        run = options.trace_into.with_name("run")
        traced = trace_run(run, run_arguments, package=PACKAGE)
        options.trace_into.write_text(json.dumps(traced), encoding="utf-8")
        return
    traced = trace_repository(repository, run_arguments)
    report = {
        "num_keyframes": traced["num_keyframes"],
        "keyframe": summarize(traced["figures"]),
        "entries": traced["entries"],
        "source": static_figures(repository, package=PACKAGE),
    }
    if options.json:
        print(json.dumps(report))
    else:
        print_report(report)


if __name__ == "__main__":
    main()
