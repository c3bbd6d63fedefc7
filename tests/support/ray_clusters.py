"""Ray clusters on loopback, of nodes that can be killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

_STORE_BYTES = 100_000_000
_START_TIMEOUT_S = 60.0


class RayCluster:
    """A head and further nodes; everything ends with the context.

    Args:
        num_nodes: how many, the head among them.
        cpus: that each of them claims to have.
    """

    def __init__(self, *, num_nodes: int = 1, cpus: int = 2) -> None:
        self._num_nodes = num_nodes
        self._cpus = cpus
        self._port = _free_port()
        self._token = secrets.token_hex(32)
        self._folder = Path(tempfile.mkdtemp(prefix="r"))  # sockets have short paths
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._former: dict[str, str | None] = {}

    @property
    def address(self) -> str:
        """For `remote.address`."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> RayCluster:
        for name, value in (("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", self._token)):
            self._former[name] = os.environ.get(name)
            os.environ[name] = value
        self.start_head()
        for _ in range(self._num_nodes - 1):
            self.add_node()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill_all()
        for name, value in self._former.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(self._folder, ignore_errors=True)

    def start_head(self) -> None:
        """Starts the head, which is also a node."""
        self._start("--head", f"--port={self._port}", "--include-dashboard=false")
        self._wait_for_port()

    def add_node(self) -> None:
        """Starts another node."""
        self._start(f"--address={self.address}")

    def kill_all(self) -> None:
        """Kills the head and all nodes at once, as a power cut does."""
        for pid in self.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self._nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        self._nodes.clear()

    def pids(self, *names: str) -> list[int]:
        """Processes of this cluster whose programs are called so."""
        return [
            pid
            for pid, command in _commands()
            if str(self._folder) in command
            and any(name in ("", Path(command.split("\0", 1)[0]).name) for name in names)
        ]

    def workers(self) -> list[int]:
        """Processes of its nodes that hold matchers."""
        return self._own("ray::MatcherWorker")

    def task_workers(self) -> list[int]:
        """Processes of its nodes that do tasks, or wait for some."""
        return self._own("ray::IDLE", "ray::run_task")

    def _own(self, *names: str) -> list[int]:
        raylets = set(self.pids("raylet"))
        return [
            pid
            for pid, command in _commands()
            if command.startswith(names) and _parent(pid) in raylets
        ]

    def _start(self, *arguments: str) -> None:
        folder = ("--temp-dir", str(self._folder)) if "--head" in arguments else ()
        self._nodes.append(
            subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("ray")),
                    "start",
                    *arguments,
                    *folder,
                    "--block",
                    f"--num-cpus={self._cpus}",
                    f"--object-store-memory={_STORE_BYTES}",
                    "--disable-usage-stats",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def _wait_for_port(self) -> None:
        ends_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < ends_s:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._port), timeout=1.0),
            ):
                return
            time.sleep(0.2)
        raise TimeoutError("the head of the cluster does not start")


def _commands() -> list[tuple[int, str]]:
    """Ids and command lines of the processes of this user."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.append((int(entry.name), (entry / "cmdline").read_text("utf-8", "replace")))
    return found


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
