"""Windows that are solved on other machines; what they do not solve is solved here."""

from __future__ import annotations

import functools

from adapters.remote.plain import from_plain, to_plain
from adapters.remote.tasks import RemoteTasks
from engine.ports import WindowSolver
from engine.window_types import WindowEstimate, WindowProblem


class RemoteWindowSolver:
    """A `WindowSolver`.

    Args:
        tasks: solve windows.
        local: solves those that the cluster does not.
    """

    def __init__(self, tasks: RemoteTasks, local: WindowSolver) -> None:
        self._tasks = tasks
        self._local = local

    def __call__(self, problem: WindowProblem) -> WindowEstimate:
        """Solves a window."""
        fields, arrays = to_plain(problem)
        solved = self._tasks.result(
            "window",
            fields,
            arrays,
            stage="windows",
            read=functools.partial(from_plain, WindowEstimate),
        )
        return self._local(problem) if solved is None else solved
