"""HTTP servers on loopback that answer as cameras, file servers and worse do, for tests."""

from __future__ import annotations

import base64
import hashlib
import http.server
import re
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tests.support.stream_servers import LOOPBACK

Request = http.server.BaseHTTPRequestHandler
Answer = Callable[[Request], None]


class HttpServer:
    """Answers each path in a way of its own, until the context ends."""

    def __init__(
        self,
        answers: Mapping[str, Answer],
        *,
        host: str = LOOPBACK,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.answers = dict(answers)
        self.requests: list[tuple[str, dict[str, str]]] = []  # path and header
        self.stopping = threading.Event()
        self._server = http.server.ThreadingHTTPServer((host, 0), self._handler())
        self._server.daemon_threads = True
        self._scheme = "http" if context is None else "https"
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def url(self, path: str, *, user: str = "") -> str:
        at = f"{user}@" if user else ""
        host, port = self._server.server_address[:2]
        return f"{self._scheme}://{at}{host!s}:{port}{path}"

    def __enter__(self) -> HttpServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def hold(self, _: Request | None = None) -> None:
        """Says nothing more until the end."""
        self.stopping.wait()

    def _handler(self) -> type[Request]:
        server = self

        class Handler(Request):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.close_connection = True
                server.requests.append((self.path, dict(self.headers.items())))
                answer = server.answers.get(self.path.partition("?")[0])
                with suppress(OSError):  # whoever asked has gone
                    if answer is None:
                        self.send_error(404)
                    else:
                        answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def head(request: Request, status: int = 200, **fields: object) -> None:
    """Sends a header; names of fields have _ for -, and an empty field is left out."""
    request.send_response(status)
    for name, value in fields.items():
        if value != "":
            request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()


def body(data: bytes, content_type: str = "", *, with_length: bool = True) -> Answer:
    """The same bytes for everybody."""

    def answer(request: Request) -> None:
        head(request, Content_Type=content_type, Content_Length=len(data) if with_length else "")
        request.wfile.write(data)

    return answer


def file_in_ranges(data: bytes, content_type: str = "") -> Answer:
    """A file of which parts can be asked for (RFC 9110, section 14)."""

    def answer(request: Request) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted is None:
            body(data, content_type)(request)
            return
        begin, end = int(wanted[1]), int(wanted[2]) + 1 if wanted[2] else len(data)
        part = data[begin:end]
        place = f"bytes {begin}-{begin + len(part) - 1}/{len(data)}"
        head(request, 206, Content_Length=len(part), Content_Range=place)
        request.wfile.write(part)

    return answer


def status(code: int, **fields: object) -> Answer:
    """An answer without a body."""
    return lambda request: head(request, code, Content_Length=0, **fields)


def moved(to: str, code: int = 302) -> Answer:
    return status(code, Location=to)


def parts(
    server: Callable[[], HttpServer],
    pictures: Sequence[bytes],
    *,
    content_type: str = "multipart/x-mixed-replace; boundary=part",
    boundary: bytes = b"--part",
    with_length: bool = True,
    with_first_boundary: bool = True,
    is_chunked: bool = False,
    more: bytes = b"",
) -> Answer:
    """MJPEG as cameras send it, and then nothing more.

    ``more`` stands in the header of each part.
    """

    def answer(request: Request) -> None:
        encoding = "chunked" if is_chunked else ""
        head(request, Content_Type=content_type, Transfer_Encoding=encoding)
        for number, picture in enumerate(pictures):
            line = boundary + b"\r\n" if number or with_first_boundary else b""
            length = b"Content-Length: %d\r\n" % len(picture) if with_length else b""
            data = line + b"Content-Type: image/jpeg\r\n" + length + more + b"\r\n" + picture
            data += b"\r\n"
            request.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if is_chunked else data)
            if server().stopping.wait(0.02):
                return
        server().hold()

    return answer


def digest_protected(
    user: str,
    password: str,
    answer: Answer,
    *,
    algorithm: str = "MD5",
    before: Sequence[str] = (),
    qop: str = "auth",
) -> Answer:
    """Lets in who knows the password, by qop=auth of RFC 7616.

    ``before`` are challenges that come before its own.
    """
    realm, nonce = "camera", "0a1b2c"
    name = algorithm.replace("-", "")

    def hashed(*texts: str) -> str:
        return hashlib.new(name, ":".join(texts).encode(), usedforsecurity=False).hexdigest()

    def check(request: Request) -> None:
        fields = dict(re.findall(r'(\w+)="?([^",]+)"?', request.headers.get("Authorization", "")))
        expected = hashed(
            hashed(user, realm, password),
            nonce,
            fields.get("nc", ""),
            fields.get("cnonce", ""),
            "auth",
            hashed("GET", request.path),
        )
        if fields.get("response") == expected and fields.get("uri") == request.path:
            answer(request)
        else:
            challenge = (
                f'Digest realm="{realm}", nonce="{nonce}", qop="{qop}", algorithm={algorithm}'
            )
            request.send_response(401)
            for one in (*before, challenge):
                request.send_header("WWW-Authenticate", one)
            request.send_header("Content-Length", "0")
            request.end_headers()

    return check


def basic_protected(user: str, password: str, answer: Answer) -> Answer:
    """Lets in who knows the password (RFC 7617)."""
    expected = base64.b64encode(f"{user}:{password}".encode()).decode()

    def check(request: Request) -> None:
        if request.headers.get("Authorization") == f"Basic {expected}":
            answer(request)
        else:
            status(401, WWW_Authenticate='Basic realm="camera"')(request)

    return check
