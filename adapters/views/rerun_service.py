"""Rerun service: the ports and processes of live Rerun viewers.

Everything listens on ``views.bind`` only, by default the loopback interface; Rerun's own default is
every interface. Viewers started here send no usage statistics.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import IO
from urllib.parse import quote

from adapters.live.listening import free_address
from adapters.screen import has_screen
from adapters.views.viewer_process import ViewerProcess
from engine.config import ViewsConfig
from engine.errors import ConfigError

STARTUP_TIMEOUT_S = 10.0
WINDOW_STARTUP_S = 0.5  # in which one that cannot open has ended
_POLL_S = 0.05
_TCP_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An address of this machine that nothing listens on yet."""

    ip: str
    port: int

    @property
    def bracketed_ip(self) -> str:
        """The address as written before a port."""
        return f"[{self.ip}]" if ":" in self.ip else self.ip

    @property
    def host(self) -> str:
        """The host that a client on this machine connects to, as written in a URL."""
        if ip_address(self.ip).is_unspecified:  # every interface: a client names one of them
            return "[::1]" if ":" in self.ip else "127.0.0.1"
        return self.bracketed_ip


class LiveServer:
    """The server in this process from which viewers fetch a run, also from its past.

    Viewers pull the recording because a pushed one is lost for good when the connection breaks
    once.

    Attributes:
        sink: receives the recording; it listens as soon as it is a recording's sink.
        grpc_url: what a viewer program connects to.
        url: the page for browsers; None until it is served.
    """

    def __init__(self, config: ViewsConfig, *, with_page: bool) -> None:
        """Uses the configured ports for a page, else any free one.

        Raises:
            ConfigError: an address cannot be listened on, or there is no screen for a window.
        """
        import rerun as rr

        if not with_page:
            _require_screen()
        grpc_port = config.grpc_port if with_page else 0
        self._grpc = free_endpoint(config.bind, grpc_port, port_setting="views.grpc_port")
        self._page = (
            free_endpoint(config.bind, config.web_port, port_setting="views.web_port")
            if with_page
            else None
        )
        self._web_viewer: WebViewer | None = None
        self._window: ViewerProcess | None = None
        self.grpc_url = f"rerun+http://{self._grpc.host}:{self._grpc.port}/proxy"
        self.url: str | None = None
        self.sink = rr.GrpcServerSink(
            bind_ip=self._grpc.bracketed_ip,
            port=self._grpc.port,
            server_memory_limit=f"{config.memory_limit_mb}MiB",
        )

    @property
    def has_viewers(self) -> bool:
        """Whether a viewer is connected, as far as the system says."""
        return has_clients(self._grpc.port)

    def start_viewer(self) -> None:
        """Serves the page or opens a window.

        Raises:
            ConfigError: there is no viewer program, or it does not start.
        """
        if self._page is None:
            self._window = open_native_viewer(self.grpc_url, bind=self._grpc.ip)
        else:
            self._web_viewer = WebViewer.start(self.grpc_url, endpoint=self._page)
            self.url = self._web_viewer.url

    def stop(self) -> None:
        """Stops serving the page, and closes the window."""
        if self._web_viewer is not None:
            self._web_viewer.stop()
        if self._window is not None:
            self._window.stop()


def has_clients(port: int, *, tables: Sequence[Path] = _TCP_TABLES) -> bool:
    """Whether somebody is connected to a port of this machine, by the system's tables.

    The columns of ``/proc/net/tcp`` are those of proc_pid_net(5); elsewhere nobody knows, and the
    answer is no.
    """
    local, connected = f":{port:04X}", "01"
    for table in tables:
        with suppress(OSError):
            rows = [line.split() for line in table.read_text().splitlines()[1:]]
            if any(len(r) > 3 and r[1].endswith(local) and r[3] == connected for r in rows):
                return True
    return False


def free_endpoint(bind: str, port: int, *, port_setting: str) -> Endpoint:
    """Checks that a server can listen, since Rerun only logs a line and loses all data.

    Args:
        bind: name or address of an interface of this machine.
        port: the wanted port; 0: any free one.
        port_setting: the configuration key of the port, for the message.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine's.
    """
    try:
        ip, free_port = free_address(bind, port)
    except OSError as error:
        reason = error.strerror or str(error)
        is_taken = error.errno == errno.EADDRINUSE
        advice = f"; take another port: --set {port_setting}=N" if is_taken else ""
        raise ConfigError(
            f"views.bind, {port_setting}: cannot listen on {bind}, port {port}: {reason}{advice}"
        ) from error
    return Endpoint(ip=ip, port=free_port)


def open_native_viewer(grpc_url: str, *, bind: str) -> ViewerProcess:
    """Opens a viewer window on a live recording; it ends with this process.

    Raises:
        ConfigError: there is no viewer program, or it does not start.
    """
    command = [
        *(viewer_program(), "--hide-welcome-screen"),
        *("--bind", bind, "--connect", grpc_url),
    ]
    with tempfile.TemporaryFile() as output:
        window = ViewerProcess(command, environment=viewer_environment(), output=output)
        if window.wait(WINDOW_STARTUP_S) and window.has_failed:
            raise ConfigError(f"the viewer does not start: {_last_line(output)}")
    return window


class WebViewer:
    """A process that serves the viewer's page to browsers."""

    def __init__(self, process: ViewerProcess, *, url: str) -> None:
        self._process = process
        self.url = url

    @classmethod
    def start(cls, grpc_url: str, *, endpoint: Endpoint) -> WebViewer:
        """Starts the server and returns when its page can be opened.

        Raises:
            ConfigError: there is no viewer program, or it does not start.
        """
        with tempfile.TemporaryFile() as output:
            process = ViewerProcess(
                [
                    *(viewer_program(), "--serve-web", "--bind", endpoint.ip),
                    *("--web-viewer-port", str(endpoint.port), grpc_url),
                ],
                environment=viewer_environment(),
                output=output,
            )
            page = f"http://{endpoint.host}:{endpoint.port}/?url={quote(grpc_url, safe='')}"
            viewer = cls(process, url=page)
            if not _answers(process, endpoint):
                viewer.stop()
                raise ConfigError(f"the web viewer does not start: {_last_line(output)}")
        return viewer

    def stop(self) -> None:
        """Ends the process."""
        self._process.stop()


def viewer_program() -> str:
    """Path of the viewer program in the installed rerun-sdk.

    The program itself and not the ``rerun`` command: that is a wrapper, and ending a wrapper leaves
    the viewer running.

    Raises:
        ConfigError: this rerun-sdk comes without it.
    """
    package = importlib.util.find_spec("rerun_cli")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent
        for name in ("Rerun.app/Contents/MacOS/Rerun", "rerun", "rerun.exe"):
            if (folder / name).is_file():
                return str(folder / name)
    raise ConfigError("the installed rerun-sdk has no viewer program; use the view 'record'")


def viewer_environment() -> dict[str, str]:
    """Environment for the viewer program, in which it sends no usage statistics."""
    return {**os.environ, "CI": "1"}


def _require_screen() -> None:
    if not has_screen():
        raise ConfigError("the view 'spawn' needs a screen; use 'serve' or 'record' instead")


def _answers(process: ViewerProcess, endpoint: Endpoint) -> bool:
    give_up_at_s = time.monotonic() + STARTUP_TIMEOUT_S
    host = endpoint.host.strip("[]")
    while process.is_running and time.monotonic() < give_up_at_s:
        try:
            with socket.create_connection((host, endpoint.port), timeout=1.0):
                return True
        except OSError:
            time.sleep(_POLL_S)
    return False


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
