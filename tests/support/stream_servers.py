"""Servers and senders of live streams on loopback, for tests."""

from __future__ import annotations

import base64
import http.server
import shutil
import socket
import ssl
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from engine.types import Uint8Array
from tests.support.waiting import block_until

LOOPBACK = "127.0.0.1"
RTMP_MODULE = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
SYSTEM_PYTHON = "/usr/bin/python3"  # has GStreamer's bindings, which no package index has


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def texture(number: int = 0, *, size: tuple[int, int] = (160, 120)) -> Uint8Array:
    """Pixels (H, W, 3) RGB; ``size`` is width, height."""
    coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def jpeg(number: int = 0, *, size: tuple[int, int] = (160, 120)) -> bytes:
    data: bytes = cv2.imencode(".jpg", texture(number, size=size)[..., ::-1])[1].tobytes()
    return data


class MjpegServer:
    """Serves the same parts to everybody who asks, then says nothing more and stays connected."""

    def __init__(
        self,
        parts: Sequence[bytes] = (),
        *,
        pause_s: float = 0.01,
        user: str = "",
        port: int = 0,
        status: int = 200,
        with_length: bool = True,
        hangs_up: bool = False,
        before_part: Callable[[], object] = lambda: None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.parts = parts
        self.pause_s = pause_s
        self.user = user  # NAME:PASSWORD that has to be given
        self.status = status
        self.with_length = with_length
        self.hangs_up = hangs_up
        self.before_part = before_part  # may wait
        self.num_requests = 0
        self.stopping = threading.Event()
        self._server = http.server.ThreadingHTTPServer((LOOPBACK, port), self._handler())
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def url(self, *, scheme: str = "http", user: str = "") -> str:
        return f"{scheme}://{user}{'@' if user else ''}{LOOPBACK}:{self.port}/video"

    def close(self) -> None:
        """Drops everybody."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MjpegServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.num_requests += 1
                with suppress(OSError):  # whoever asked has gone
                    server._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        expected = base64.b64encode(self.user.encode()).decode()
        if self.user and request.headers.get("Authorization") != f"Basic {expected}":
            request.send_response(401)
            request.send_header("WWW-Authenticate", 'Basic realm="camera"')
            request.end_headers()
            return
        request.send_response(self.status)
        request.send_header("Content-Type", "multipart/x-mixed-replace; boundary=part")
        request.end_headers()
        if self.status != 200:
            return
        for part in self.parts:
            self.before_part()
            length = f"Content-Length: {len(part)}\r\n" if self.with_length else ""
            head = f"--part\r\nContent-Type: image/jpeg\r\n{length}\r\n"
            request.wfile.write(head.encode() + part + b"\r\n")
            if self.stopping.wait(self.pause_s):
                return
        if not self.hangs_up:
            self.stopping.wait()


@contextmanager
def raw_server(
    reply: bytes = b"", *, says_bye: bool = False, on_connection: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """A TCP server that answers everything with the same bytes; gives its port."""
    listener = socket.create_server((LOOPBACK, 0))
    clients: list[socket.socket] = []

    def answer(client: socket.socket) -> None:
        try:
            while client.recv(4096):
                client.sendall(reply)
                if says_bye:
                    client.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            clients.append(client)
            on_connection()
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()  # it may still accept one
        for client in clients:
            client.close()


def program(name: str) -> str:
    """Where a program is; skips the test where there is none."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"the program {name} is not installed")
    return path


def write_clip(
    path: Path, num_frames: int = 30, *, rate_hz: int = 15, size: tuple[int, int] = (160, 120)
) -> Path:
    """H.264 without reordered frames, a key frame every five; frame n shows ``texture(n)``."""
    options = {"preset": "ultrafast", "tune": "zerolatency", "g": "5", "crf": "10"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate_hz, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(texture(number, size=size), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def push(clip: Path, url: str, *, loops: bool = False) -> subprocess.Popen[bytes]:
    """ffmpeg sending a clip by RTMP at its own pace."""
    looping = ["-stream_loop", "-1"] if loops else []
    return subprocess.Popen(
        [program("ffmpeg"), "-loglevel", "error", "-re", *looping, "-i", str(clip)]
        + ["-c", "copy", "-f", "flv", url],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def running(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Ends a process with the context."""
    with ExitStack() as pipes:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipes.enter_context(pipe)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def pushing(clip: Path, url: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Sends a clip over and over by RTMP, and again when whoever listens is not there yet.

    Gives a list with the process that sends.
    """
    stop = threading.Event()
    current: list[subprocess.Popen[bytes]] = []

    def keep_pushing() -> None:
        while not stop.is_set():
            current[:] = [push(clip, url, loops=True)]
            current[0].wait()
            stop.wait(0.05)

    program("ffmpeg")
    thread = threading.Thread(target=keep_pushing)
    thread.start()
    try:
        yield current
    finally:
        stop.set()
        while thread.is_alive():
            for process in current:
                process.kill()
            thread.join(0.05)


@contextmanager
def rtmp_relay(folder: Path) -> Iterator[int]:
    """nginx that hands on what is pushed to it; gives its port."""
    if not RTMP_MODULE.exists():
        pytest.skip("nginx's RTMP module is not installed")
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(
        textwrap.dedent(f"""
        load_module {RTMP_MODULE};
        daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
        events {{}}
        rtmp {{ server {{ listen {LOOPBACK}:{port}; application live {{ live on; }} }} }}
        """)
    )
    command = [program("nginx"), "-p", str(folder), "-c", str(configuration)]
    with running(subprocess.Popen(command, stderr=subprocess.DEVNULL)):
        _await_port(port)
        yield port


_RTSP_SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
clip, port, user, password = sys.argv[1:]
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(port)
factory = GstRtspServer.RTSPMediaFactory()
pay = "h264parse ! rtph264pay name=pay0 pt=96 config-interval=1"
factory.set_launch(f"( filesrc location={clip} ! qtdemux ! {pay} )")
if user:
    auth = GstRtspServer.RTSPAuth()
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "user")
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_permission_for_role("user", "media.factory.access", True)
    permissions.add_permission_for_role("user", "media.factory.construct", True)
    factory.set_permissions(permissions)
server.get_mount_points().add_factory("/clip", factory)
server.attach(None)
GLib.MainLoop().run()
"""


@contextmanager
def rtsp_server(clip: Path, *, user: str = "", password: str = "", port: int = 0) -> Iterator[int]:
    """GStreamer serving a clip as rtsp://127.0.0.1:PORT/clip; gives its port."""
    needed = "import gi; gi.require_version('GstRtspServer', '1.0')"
    has_it = (
        Path(SYSTEM_PYTHON).exists()
        and not subprocess.run(
            [SYSTEM_PYTHON, "-c", needed], stderr=subprocess.DEVNULL, check=False
        ).returncode
    )
    if not has_it:
        pytest.skip("GStreamer's RTSP server with its Python bindings is not installed")
    port = port or free_port()
    command = [SYSTEM_PYTHON, "-c", _RTSP_SERVER, str(clip), str(port), user, password]
    with running(subprocess.Popen(command, stderr=subprocess.DEVNULL)):
        _await_port(port)
        yield port


def _await_port(port: int) -> None:
    block_until(lambda: _answers(port), what=f"a listener on port {port}")


def _answers(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), 1.0).close()
    except OSError:
        return False
    return True


def self_signed(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for loopback, and a server's context with it."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{LOOPBACK}"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context
