"""Work that any node of the cluster does, as tasks: plain arrays there, plain arrays back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from adapters.remote.cluster import Cluster, ClusterAwayError
from adapters.remote.messages import Arrays, Fields

Read = TypeVar("Read")

_LONG_S = 5.0  # waited for a task that the cluster did not do, which is not asked for a while
_PAUSE_S = 60.0


class RemoteTasks:
    """Asks a cluster for tasks, one after the other or from several threads.

    Args:
        cluster: does them.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._not_before_s = 0.0  # monotonic

    def result(
        self,
        task: str,
        fields: Fields,
        arrays: Arrays,
        *,
        stage: str,
        read: Callable[[Fields, Arrays], Read],
    ) -> Read | None:
        """What a task returns; None where the cluster does not do it, which is counted.

        Args:
            task: one of `worker.TASKS`.
            fields: of the task.
            arrays: of the task.
            stage: of the run, whose bytes and seconds it counts to.
            read: makes the result of what the task returned, fields and arrays; where it raises
                KeyError, TypeError or ValueError, the cluster did not do it.
        """
        began_s = time.monotonic()
        with self._lock:
            is_asked = began_s >= self._not_before_s and self._cluster.is_usable()
        if is_asked:
            try:
                message = self._cluster.result(
                    self._cluster.call(task, fields, arrays, stage=stage)
                )
                result = read(message.fields, message.arrays)
            except (KeyError, TypeError, ValueError) as error:
                self._cluster.report_refusal(stage, f"the result is broken: {error}")
            except ClusterAwayError:
                now_s = time.monotonic()
                if now_s - began_s > _LONG_S:
                    with self._lock:
                        self._not_before_s = now_s + _PAUSE_S
            else:
                self._cluster.count(f"{stage}_there")
                return result
        self._cluster.count(f"{stage}_here")
        return None
