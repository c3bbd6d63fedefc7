"""Asks HTTP servers for what they send, in bounded time and memory.

Redirects are followed, but never from https to http, to another scheme, or from a public server
into a private network (after the address spaces of "Private Network Access", W3C WICG). Passwords
go to the server of the address alone.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from adapters.install_advice import installed_version
from adapters.sources.streams.connections import (
    connected,
    in_words,
    retried,
    secured,
    tls_context,
)
from adapters.sources.streams.patience import Patience, StreamError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from engine.config import LiveSourcesConfig

_MAX_STEPS = 10  # redirects and challenges
_MOVED = frozenset({301, 302, 303, 307, 308})
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"
_READ_BYTES = 1 << 16
_BEGIN_BYTES = 16  # that tell most kinds of files apart
_CONTENT_RANGE = re.compile(r"bytes\s+([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}(?![0-9])|\*)")
_ENDLESS_BYTES = frozenset({2**31 - 1, 2**32 - 1, 2**63 - 1})  # as some say of live streams
_HASHES = {"MD5": "md5", "SHA-256": "sha256"}  # of Digest
_LOOPBACK, _PRIVATE, _PUBLIC = range(3)


class HttpAnswer:
    """What a server sends after its header. Whoever has it closes it."""

    def __init__(self, response: http.client.HTTPResponse, *, url: str) -> None:
        """Takes a response of status 200 or 206 from a URL."""
        self._response = response
        self._begin = b""
        self.url = url  # after redirects
        headers = response.headers
        self.content_type = headers.get_content_type() if "Content-Type" in headers else ""
        boundary = headers.get_param("boundary")
        self.boundary = boundary if isinstance(boundary, str) else ""  # as a server announces it
        place = _place_of(response)  # servers may send the whole, or another part
        self.begins_at, self.num_bytes = place  # of the whole; None: unknown

    def begin(self) -> bytes:
        """The first bytes, which are read again afterwards.

        Raises:
            StreamError: they do not come.
        """
        while len(self._begin) < _BEGIN_BYTES and (more := self._read_some()):
            self._begin += more
        return self._begin

    def read(self, num_bytes: int = _READ_BYTES) -> bytes:
        """What has come, at most so many bytes; waits for the first of them. b"": the end.

        Raises:
            StreamError: nothing more comes.
        """
        if self._begin:
            data, self._begin = self._begin[:num_bytes], self._begin[num_bytes:]
            return data
        return self._read_some(num_bytes)

    def _read_some(self, num_bytes: int = _READ_BYTES) -> bytes:
        with in_words():
            data = self._response.read1(num_bytes)
        if not data and self._response.length:
            raise StreamError("the connection broke: the other side ended it")
        return data

    def close(self) -> None:
        """Ends the connection."""
        self._response.close()


class HttpClient:
    """Requests to the server that an address names, and to where it leads."""

    def __init__(self, url: str, *, config: LiveSourcesConfig, patience: Patience) -> None:
        """Takes the address; nothing is connected yet.

        Args:
            url: http or https, perhaps with a user and a password.
            config: which certificates are trusted.
            patience: how long may be waited.
        """
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        self.url = parts._replace(netloc=place).geturl()
        self._origin = _origin(urlsplit(self.url))
        self._patience = patience
        self._tls = tls_context(config)
        self._space: int | None = None  # of the first server; others may be no more private
        self._password = (
            None
            if parts.username is None
            else (unquote(parts.username), unquote(parts.password or ""))
        )
        self._challenge = ""  # how the server wants the password
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        if self._password is not None:
            whole = parts._replace(netloc=place, path="/", query="", fragment="").geturl()
            passwords.add_password(None, whole, *self._password)
        self._digest = _Digest(passwords)

    def open(self, url: str = "", *, begin: int = 0, end: int | None = None) -> HttpAnswer:
        """The answer to a request, after redirects.

        Args:
            url: by default the address.
            begin: the first byte wanted.
            end: the byte behind the last one wanted; None: all.

        Raises:
            StreamError: there is none, with the reason in words.
        """
        url = url or self.url
        was_challenged = False
        for _ in range(_MAX_STEPS):
            parts = _checked(url)
            response = self._ask(parts, begin=begin, end=end)
            is_taken = False
            try:
                if response.status in _MOVED:
                    url = _moved(url, response)
                    continue
                is_asked = response.status == HTTPStatus.UNAUTHORIZED and self._password is not None
                if is_asked:
                    self._refuse_others(parts)
                if is_asked and not was_challenged:
                    was_challenged = True
                    self._challenge = _challenge_of(response)
                    continue
                _refuse_status(response)
                with in_words():
                    answer = HttpAnswer(response, url=url)
                is_taken = True
                return answer
            finally:
                if not is_taken:
                    response.close()
        raise StreamError("connected, but its redirects do not end")

    def _ask(self, parts: SplitResult, *, begin: int, end: int | None) -> http.client.HTTPResponse:
        connection = _Connection(parts, patience=self._patience, tls=self._tls, check=self._check)
        target = quote(parts._replace(scheme="", netloc="", fragment="").geturl(), _URL_CHARACTERS)
        headers = {
            "User-Agent": f"LiveSfM/{installed_version()}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if begin or end is not None:
            headers["Range"] = f"bytes={begin}-{'' if end is None else end - 1}"
        with in_words():
            if self._challenge and _origin(parts) == self._origin:
                headers["Authorization"] = self._authorization(parts)
            try:
                connection.request("GET", target or "/", headers=headers)
                return connection.getresponse()
            except BaseException:
                connection.close()
                raise

    def _authorization(self, parts: SplitResult) -> str:
        """The password in the form that the server wants (RFC 7617, RFC 7616)."""
        scheme = self._challenge.partition(" ")[0]
        if fields := _digest_fields(self._challenge):
            request = urllib.request.Request(parts.geturl())
            return f"Digest {self._digest.get_authorization(request, fields)}"
        if scheme.lower() == "basic":
            user, password = self._password or ("", "")
            return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"
        raise StreamError(
            f"connected, but it wants the password in a way that is not known: {scheme[:20]!r}",
            is_refused=True,
        )

    def _refuse_others(self, parts: SplitResult) -> None:
        """Keeps the password from servers that the address does not name.

        Raises:
            StreamError: this is one.
        """
        scheme, host, port = _origin(parts)
        if (scheme, host, port) != self._origin:
            raise StreamError(
                f"connected, but it leads to {scheme}://{host}:{port}, which wants a password;"
                " only the server of the address is given it: name that one",
                is_refused=True,
            )

    def _check(self, connection: socket.socket, host: str) -> None:
        """Refuses servers more private than the one that leads to them."""
        space = _space_of(connection.getpeername()[0])
        if self._space is None:
            self._space = space
        if space < self._space:  # the same name, too: it may be another computer's by now
            raise StreamError(
                f"connected, but it leads to {host}, which is in a private network: refused"
            )


class _Digest(urllib.request.HTTPDigestAuthHandler):
    """Answers challenges by Digest, with SHA-256, too."""

    def get_algorithm_impls(
        self, algorithm: str
    ) -> tuple[Callable[[str], str], Callable[[str, str], str]]:
        """How texts are hashed, and a secret with a text (RFC 7616, section 3.3)."""
        name = _HASHES[algorithm.upper()]

        def hashed(text: str) -> str:
            return hashlib.new(name, text.encode(), usedforsecurity=False).hexdigest()

        return hashed, lambda secret, text: hashed(f"{secret}:{text}")


class _Connection(http.client.HTTPConnection):
    """A connection that waits no longer than it may."""

    def __init__(
        self,
        parts: SplitResult,
        *,
        patience: Patience,
        tls: ssl.SSLContext,
        check: Callable[[socket.socket, str], None],
    ) -> None:
        self._is_secure = parts.scheme == "https"
        self.default_port = 443 if self._is_secure else 80
        super().__init__(parts.hostname or "", parts.port or self.default_port)
        self.response_class = _Response
        self._patience = patience
        self._tls = tls
        self._check = check

    def connect(self) -> None:
        """Connects to the first of the host's addresses that answers."""
        connection = connected(self.host, self.port, self._patience)
        try:
            self._check(connection, self.host)
            if self._is_secure:
                connection = secured(connection, self.host, tls=self._tls, patience=self._patience)
        except BaseException:
            connection.close()
            raise
        self.sock = _PatientSocket(connection, self._patience)


class _Response(http.client.HTTPResponse):
    """A response that may lack its status line, as of cameras that leave it out (HTTP/0.9)."""

    def begin(self) -> None:
        """Reads the header."""
        first = self.fp.peek(1)[:5]
        if b"HTTP/".startswith(first):
            super().begin()
            return
        self.code = self.status = HTTPStatus.OK
        self.reason, self.version = "OK", 9
        self.headers = self.msg = http.client.HTTPMessage()
        self.chunked, self.length, self.will_close = False, None, True


class _PatientSocket:
    """What ``http.client`` needs of a socket."""

    def __init__(self, connection: socket.socket, patience: Patience) -> None:
        self._connection = connection
        self._patience = patience
        self._is_read = False  # by a file, which closes it

    def sendall(self, data: Buffer) -> None:
        """Sends everything."""
        left = memoryview(data)
        while left:
            send = functools.partial(self._connection.send, left)
            left = left[retried(send, self._connection, self._patience, writes=True) :]

    def makefile(self, _mode: str) -> io.BufferedReader:
        """A file that reads from the socket, and closes it."""
        self._is_read = True
        return io.BufferedReader(_PatientReads(self._connection, self._patience), _READ_BYTES)

    def close(self) -> None:
        """Closes it, unless a file reads from it."""
        if not self._is_read:
            self._connection.close()


class _PatientReads(io.RawIOBase):
    """Bytes from a socket."""

    def __init__(self, connection: socket.socket, patience: Patience) -> None:
        super().__init__()
        self._connection = connection
        self._patience = patience

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Waits for the next bytes; not for ever, even where some are always there."""
        self._patience.check(time.monotonic())
        return retried(lambda: self._connection.recv_into(buffer), self._connection, self._patience)

    def close(self) -> None:
        """Ends the connection."""
        if not self.closed:
            self._connection.close()
        super().close()


def _origin(parts: SplitResult) -> tuple[str, str, int]:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port


def _checked(url: str) -> SplitResult:
    """The parts of an address that may be asked.

    Raises:
        StreamError: it is none.
    """
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0
    except ValueError:
        has_port = False
    if not has_port or not parts.hostname or parts.scheme not in {"http", "https"}:
        scheme = url.partition(":")[0][:20]
        raise StreamError(f"connected, but it leads to what is no address of HTTP ({scheme!r})")
    return parts


def _moved(url: str, response: http.client.HTTPResponse) -> str:
    """Where a redirect leads."""
    to = response.getheader("Location")
    if not to:
        raise StreamError("connected, but it redirects to nowhere")
    with in_words():
        target = urljoin(url, to)
        parts = urlsplit(target)
    if url.startswith("https:") and parts.scheme == "http":
        raise StreamError("connected, but it redirects from https to http: refused")
    # A user and a password in there are those of whoever redirects.
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _challenge_of(response: http.client.HTTPResponse) -> str:
    """How a server wants the password: of the ways known, the first that does not show it."""
    challenges = [one.strip() for one in response.headers.get_all("WWW-Authenticate") or []]
    digests = [one for one in challenges if _digest_fields(one)]
    basic = [one for one in challenges if one.lower().startswith("basic")]
    return next(iter([*digests, *basic, *challenges]), "")


def _digest_fields(challenge: str) -> dict[str, str]:
    """What a challenge by Digest says (RFC 7616); nothing where it is none that can be answered."""
    scheme, _, rest = challenge.partition(" ")
    if scheme.lower() != "digest":
        return {}
    try:
        fields = urllib.request.parse_keqv_list(urllib.request.parse_http_list(rest))
    except (ValueError, IndexError):  # without a value, or with an empty one
        return {}
    fields = {name.lower(): value for name, value in fields.items()}
    ways = [way.strip().lower() for way in fields.pop("qop", "").split(",")]
    is_known = "realm" in fields and "nonce" in fields and ("auth" in ways or ways == [""])
    if not is_known or fields.get("algorithm", "MD5").upper() not in _HASHES:
        return {}
    return {**fields, "qop": "auth"} if "auth" in ways else fields


def _refuse_status(response: http.client.HTTPResponse) -> None:
    """Refuses an answer that holds nothing of what was asked for.

    Raises:
        StreamError: with the status in words.
    """
    status = response.status
    with suppress(ValueError):
        named = f"{status} {HTTPStatus(status).phrase}"
        match HTTPStatus(status):
            case HTTPStatus.OK | HTTPStatus.PARTIAL_CONTENT:
                return
            case HTTPStatus.UNAUTHORIZED:
                raise StreamError(
                    f"connected, but not allowed in: wrong or no password ({named})",
                    is_refused=True,
                )
            case HTTPStatus.FORBIDDEN:
                raise StreamError(f"connected, but not allowed in ({named})", is_refused=True)
            case HTTPStatus.NOT_FOUND | HTTPStatus.GONE:
                raise StreamError(f"connected, but nothing is found at this path ({named})")
            case _:
                raise StreamError(f"connected, but the server says: {named}")
    raise StreamError(f"connected, but the server says: {status}")


def _place_of(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where in the whole a body begins, and how long the whole is; None: that is unknown."""
    part = _CONTENT_RANGE.match(response.getheader("Content-Range", ""))
    if response.status == HTTPStatus.PARTIAL_CONTENT and part is not None:
        return int(part[1]), None if part[2] == "*" else int(part[2])
    return 0, None if response.length in _ENDLESS_BYTES else response.length


def _space_of(address: str) -> int:
    """How many can reach an address: this computer alone, its networks, or everybody."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    if ip.is_loopback or ip.is_unspecified:
        return _LOOPBACK
    return _PUBLIC if ip.is_global else _PRIVATE
