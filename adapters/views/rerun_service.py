"""Rerun service: the ports and processes of live Rerun viewers.

Everything listens on ``views.bind`` only, by default the loopback interface; Rerun's own default is
every interface. Viewers started here send no usage statistics.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import IO
from urllib.parse import quote

from adapters.live.listening import free_address
from engine.config import ViewsConfig
from engine.errors import ConfigError

STARTUP_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
_POLL_S = 0.05


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
        self.grpc_url = f"rerun+http://{self._grpc.host}:{self._grpc.port}/proxy"
        self.url: str | None = None
        self.sink = rr.GrpcServerSink(
            bind_ip=self._grpc.bracketed_ip,
            port=self._grpc.port,
            server_memory_limit=f"{config.memory_limit_mb}MiB",
        )

    def start_viewer(self) -> None:
        """Serves the page or opens a window.

        Raises:
            ConfigError: there is no viewer program, or it does not start.
        """
        if self._page is None:
            open_native_viewer(self.grpc_url, bind=self._grpc.ip)
        else:
            self._web_viewer = WebViewer.start(self.grpc_url, endpoint=self._page)
            self.url = self._web_viewer.url

    def stop(self) -> None:
        """Stops serving the page; a window stays open."""
        if self._web_viewer is not None:
            self._web_viewer.stop()


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
        raise ConfigError(
            f"views.bind, {port_setting}: cannot listen on {bind}, port {port}: {reason}"
        ) from error
    return Endpoint(ip=ip, port=free_port)


def open_native_viewer(grpc_url: str, *, bind: str) -> None:
    """Opens a viewer window on a live recording; it outlives this process.

    Raises:
        ConfigError: there is no viewer program, or it does not start.
    """
    command = [
        *(viewer_program(), "--detach-process", "--hide-welcome-screen"),
        *("--bind", bind, "--connect", grpc_url),
    ]
    try:
        subprocess.run(
            command,
            env=viewer_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=STARTUP_TIMEOUT_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise ConfigError(f"the viewer does not start: {error}") from error


class WebViewer:
    """A process that serves the viewer's page to browsers."""

    def __init__(self, process: subprocess.Popen[bytes], *, url: str) -> None:
        self._process = process
        self.url = url

    @classmethod
    def start(cls, grpc_url: str, *, endpoint: Endpoint) -> WebViewer:
        """Starts the server and returns when its page can be opened.

        Raises:
            ConfigError: there is no viewer program, or it does not start.
        """
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [
                    *(viewer_program(), "--serve-web", "--bind", endpoint.ip),
                    *("--web-viewer-port", str(endpoint.port), grpc_url),
                ],
                env=viewer_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the engine, which drains first
            )
            page = f"http://{endpoint.host}:{endpoint.port}/?url={quote(grpc_url, safe='')}"
            viewer = cls(process, url=page)
            if not _answers(process, endpoint):
                viewer.stop()
                raise ConfigError(f"the web viewer does not start: {_last_line(output)}")
        return viewer

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not has_screen:
        raise ConfigError("the view 'spawn' needs a screen; use 'serve' or 'record' instead")


def _answers(process: subprocess.Popen[bytes], endpoint: Endpoint) -> bool:
    give_up_at_s = time.monotonic() + STARTUP_TIMEOUT_S
    host = endpoint.host.strip("[]")
    while process.poll() is None and time.monotonic() < give_up_at_s:
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
