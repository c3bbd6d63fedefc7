"""A worker: a process somewhere in the cluster that holds matchers, as a Ray actor.

It calls one matcher at a time, in turn for the runs that share it. What fails in a matcher is part
of the reply, so that an error of Ray always means that the worker, or the way to it, is broken.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters.remote.fair_turns import FairTurns
from adapters.remote.hosted import HostedMatcher, open_hosted
from adapters.remote.messages import Array, Arrays, Fields
from adapters.remote.plain import Plain, from_plain, to_plain
from adapters.remote.plain_maps import changes_to_plain, map_from_plain
from engine.errors import InferenceError
from engine.window_types import WindowProblem

Reply = Plain
HEALTH = "health"  # threads of a worker for these calls alone
State = tuple[str, Sequence[Any]]  # key and, in a list, so that Ray does not fetch it, where it is

_MAX_RUNS = 64  # whose matchers are kept; those used last
_RUN_IDLE_S = 600.0  # a run without calls for so long may have been killed: it is forgotten
_FETCH_TIMEOUT_S = 20.0
_POLL_PERIOD_S = 5.0


class MatcherWorker:
    """Matchers of several runs, all of one kind and with one setting.

    Args:
        spec: which matcher, as JSON.
        idle_s: it ends after so long without a call; 0: never.
    """

    def __init__(self, spec: str, idle_s: float = 0.0) -> None:
        self._open = open_hosted(json.loads(spec))
        self._runs: OrderedDict[str, tuple[HostedMatcher, float]] = OrderedDict()  # used at, in s
        self._turns = FairTurns()
        self._opening = threading.Lock()
        self._called_at_s = time.monotonic()
        if idle_s:
            threading.Thread(target=self._end_when_idle, args=(idle_s,), daemon=True).start()

    def hello(self) -> dict[str, Any]:
        """Which version of LiveSfM it runs."""
        return {"version": code_version()}

    def ping(self) -> None:
        """Answers, also while all threads that match are in use: called on those of `HEALTH`."""
        self._called_at_s = time.monotonic()

    def describe(self, run: str, fields: Fields, arrays: Arrays) -> tuple[Reply, Array | None]:
        """Describes an image.

        Returns:
            A reply with its keypoints, and apart from it its descriptors, which stay here until a
            worker asks for them.
        """
        reply = self._reply(run, lambda matcher: matcher.describe(fields, arrays))
        return reply, reply[1].get("descriptors")

    def encode(self, run: str, key: str, image: Sequence[Any]) -> tuple[Reply, Array | None]:
        """Makes the state of a keyframe from its image.

        Returns:
            A reply with what recognizes its place, and apart from it the state, which stays here
            until another worker asks for it.
        """
        made: list[Array] = []

        def encode(matcher: HostedMatcher) -> Reply:
            fields, arrays = _fetch(image[0])
            state, vector = matcher.encode(key, fields, arrays)
            made.append(state)
            return {}, {"vector": vector}

        reply = self._reply(run, encode)
        return reply, made[0] if made else None

    def match(self, run: str, fields: Fields, arrays: Arrays, states: Sequence[State]) -> Reply:
        """Matches pairs whose states it has, or can get."""

        def match(matcher: HostedMatcher) -> Reply:
            all_fields: dict[str, Any] = {"pairs": []}
            all_arrays: dict[str, Any] = {}
            for number, (first, second, own_fields) in enumerate(fields["pairs"]):
                start = f"{number}."
                own = {k[len(start) :]: a for k, a in arrays.items() if k.startswith(start)}
                found = matcher.match((first, second), own_fields, own)
                all_fields["pairs"].append(found[0])
                all_arrays |= {f"{start}{name}": array for name, array in found[1].items()}
            return all_fields, all_arrays

        return self._reply(run, match, states=states)

    def prepare(self, run: str, keys: tuple[str, str], states: Sequence[State]) -> Reply:
        """Begins with a pair that will probably be asked for."""

        def prepare(matcher: HostedMatcher) -> Reply:
            return {"evicted": matcher.prepare(keys)}, {}

        return self._reply(run, prepare, states=states, is_ahead=True)

    def forget(self, run: str) -> None:
        """Forgets the matcher of a run that has ended."""
        with self._opening:
            self._runs.pop(run, None)

    def _reply(
        self,
        run: str,
        use: Callable[[HostedMatcher], Reply],
        *,
        states: Sequence[State] = (),
        is_ahead: bool = False,
    ) -> Reply:
        """Uses the matcher of a run; what is missing and what fails is named in the reply."""
        self._called_at_s = time.monotonic()
        try:
            matcher = self._matcher(run)
            # Not in turn: others may match meanwhile.
            got = {key: _fetch(place[0]) for key, place in states if not matcher.holds(key)}
            with self._turns.turn(run, is_ahead=is_ahead):
                missing, fetched = _take(matcher, states, got)
                if missing:
                    return {"missing": missing}, {}
                fields, arrays = use(matcher)
        except InferenceError as error:
            return {"failed": str(error)}, {}
        except Exception:  # a task boundary: the run decides what follows
            return {"failed": traceback.format_exc(limit=-3)}, {}
        finally:
            self._called_at_s = time.monotonic()
        return fields | {"fetched": fetched}, arrays

    def _matcher(self, run: str) -> HostedMatcher:
        """The matcher of a run, new where it was forgotten: states are fetched again then."""
        now_s = time.monotonic()
        with self._opening:
            known = self._runs.pop(run, None)
            self._runs[run] = (self._open() if known is None else known[0]), now_s
            while len(self._runs) > 1:
                oldest, (_, used_at_s) = next(iter(self._runs.items()))
                if len(self._runs) <= _MAX_RUNS and now_s - used_at_s < _RUN_IDLE_S:
                    break
                del self._runs[oldest]
            return self._runs[run][0]

    def _end_when_idle(self, idle_s: float) -> None:
        import ray

        while time.monotonic() - self._called_at_s < idle_s:
            time.sleep(min(_POLL_PERIOD_S, idle_s))
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def run_task(task: str, version: str, fields: Fields, arrays: Arrays) -> Reply:
    """Does a task; a node with another version of LiveSfM does not.

    Raises:
        RuntimeError: this is one.
    """
    if version != code_version():
        raise RuntimeError(f"a node of the cluster has LiveSfM {code_version()}")
    return TASKS[task](fields, arrays)


def _solve_window(fields: Fields, arrays: Arrays) -> Reply:
    """Solves a window with the engine's own solver."""
    from engine.windows.model import WindowSolverConfig
    from engine.windows.solver import solve_window as solve

    problem = from_plain(WindowProblem, fields, arrays)
    return to_plain(solve(problem, config=WindowSolverConfig()))


def _adjust_map(fields: Fields, arrays: Arrays) -> Reply:
    """Adjusts a map as the engine does."""
    from engine.mapping.model.bundle_adjustment import adjust_globally

    reconstruction, calibration = map_from_plain(arrays)
    adjust_globally(
        reconstruction,
        calibration=calibration,
        max_iterations=int(fields["max_iterations"]),
        num_threads=int(fields["num_threads"]),
    )
    return {}, changes_to_plain(reconstruction, calibration, arrays)


TASKS: Mapping[str, Callable[[Fields, Arrays], Reply]] = {
    "window": _solve_window,
    "adjust": _adjust_map,
}


@functools.cache
def code_version() -> str:
    """The version of LiveSfM, and of its files: only the same code gives the same results."""
    digest = hashlib.sha256()
    for package in ("engine", "adapters"):
        root = Path(importlib.import_module(package).__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{version('livesfm')}+{digest.hexdigest()[:12]}"


def _take(
    matcher: HostedMatcher, states: Sequence[State], got: Mapping[str, Any]
) -> tuple[list[str], list[tuple[str, int]]]:
    """Gives a matcher what it lacks; returns keys of states lost, and those taken, in bytes."""
    matcher.reserve([key for key, _ in states])
    missing, taken = [], []
    for key, place in states:
        if matcher.holds(key):
            continue
        state = got[key] if key in got else _fetch(place[0])  # it was evicted meanwhile
        if state is None:
            missing.append(key)
        else:
            matcher.take(key, state)
            taken.append((key, int(state.nbytes)))
    return missing, taken


def _fetch(place: Any) -> Any:
    """An object of the cluster; None where it is lost, or was never made."""
    if place is None:
        return None
    import ray

    try:
        return ray.get(place, timeout=_FETCH_TIMEOUT_S)
    except ray.exceptions.RayError:  # its owner or its node is gone, or the way to it
        return None
