"""Windows that are solved on other machines; what they do not solve is solved here."""

from __future__ import annotations

from adapters.remote.cluster import Cluster, ClusterAwayError
from adapters.remote.plain import from_plain, to_plain
from engine.ports import WindowSolver
from engine.window_types import WindowEstimate, WindowProblem


class RemoteWindowSolver:
    """A `WindowSolver`.

    Args:
        cluster: solves windows, as tasks.
        local: solves those that the cluster does not.
    """

    def __init__(self, cluster: Cluster, local: WindowSolver) -> None:
        self._cluster = cluster
        self._local = local

    def __call__(self, problem: WindowProblem) -> WindowEstimate:
        """Solves a window."""
        if not self._cluster.is_usable():
            return self._local(problem)
        fields, arrays = to_plain(problem)
        try:
            call = self._cluster.call("window", fields, arrays, stage="windows")
            message = self._cluster.result(call)
            return from_plain(WindowEstimate, message.fields, message.arrays)
        except (ClusterAwayError, TypeError, ValueError):
            return self._local(problem)
