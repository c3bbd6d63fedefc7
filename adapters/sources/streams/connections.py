"""Connections by TCP and TLS that wait no longer than they may, and what is wrong with them."""

from __future__ import annotations

import errno
import http.client
import math
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from adapters.sources.streams.patience import Patience, StreamError

if TYPE_CHECKING:
    from adapters.sources.streams.stream_address import StreamAddress
    from engine.config import LiveSourcesConfig

Result = TypeVar("Result")

_ENDED = "the connection broke: the other side ended it"
_WORDS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
    (socket.gaierror, "no connection: the host's name is unknown ({0.strerror})"),
    (UnicodeError, "no connection: there is no host of such a name"),
    (
        ssl.SSLCertVerificationError,
        "no connection: its certificate is not trusted ({0.verify_message})",
    ),
    (ssl.SSLError, "no connection: what answers speaks no TLS ({0.reason})"),
    (http.client.RemoteDisconnected, "connected, but the server hung up without an answer"),
    (http.client.IncompleteRead, _ENDED),
    (ConnectionResetError, _ENDED),
    (BrokenPipeError, _ENDED),
)


def connected(host: str, port: int, patience: Patience) -> socket.socket:
    """A connection to a server, which does not block.

    Raises:
        OSError: to none of its addresses.
        StreamError: that took too long.
    """
    error = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for num_left, (family, kind, protocol, _, address) in zip(
        range(len(places), 0, -1), places, strict=True
    ):
        # One that says nothing, as where IPv6 leads nowhere, leaves time for those behind it.
        at_most_s = math.inf if num_left == 1 else patience.left_s / num_left
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            status = connection.connect_ex(address)
            if status == errno.EINPROGRESS:
                if patience.wait_for(connection, to_write=True, at_most_s=at_most_s):
                    status = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                else:
                    status = errno.ETIMEDOUT
        except BaseException:
            connection.close()
            raise
        if not status:
            return connection
        connection.close()
        error = OSError(status, os.strerror(status))
    raise error


def secured(
    connection: socket.socket, host: str, *, tls: ssl.SSLContext, patience: Patience
) -> ssl.SSLSocket:
    """The same connection after TLS's handshake.

    Raises:
        OSError: the server does not prove who it is, or speaks no TLS.
        StreamError: that took too long.
    """
    secure = tls.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
    try:
        retried(secure.do_handshake, secure, patience)
    except BaseException:
        secure.close()
        raise
    return secure


def retried(
    call: Callable[[], Result],
    connection: socket.socket,
    patience: Patience,
    *,
    writes: bool = False,
) -> Result:
    """What a call on a socket gives as soon as it would not block.

    Raises:
        StreamError: that took too long.
        Whatever the call raises.
    """
    while True:
        try:
            return call()
        except ssl.SSLWantReadError:
            patience.wait_for(connection)
        except ssl.SSLWantWriteError:
            patience.wait_for(connection, to_write=True)
        except BlockingIOError:
            patience.wait_for(connection, to_write=writes)


def tls_context(config: LiveSourcesConfig) -> ssl.SSLContext:
    """Which servers are trusted.

    Raises:
        StreamError: the file of certificates cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=config.ca_file or None)
    except (OSError, ValueError) as error:
        raise StreamError(
            f"live_sources.ca_file: {config.ca_file}: holds no certificates that can be read",
            is_refused=True,
        ) from error
    if not config.verify_certificates:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextmanager
def in_words() -> Iterator[None]:
    """Raises what goes wrong with a connection as a StreamError that says what."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StreamError(words_of(error)) from error


def words_of(error: Exception) -> str:
    """What is wrong with a connection, without its address."""
    for kind, words in _WORDS:
        if isinstance(error, kind):
            return words.format(error)
    if isinstance(error, OSError):
        return f"no connection: {error.strerror or type(error).__name__}"
    return f"connected, but its answer is no HTTP ({type(error).__name__})"


def why_not_connected(
    address: StreamAddress, *, config: LiveSourcesConfig, stop: threading.Event
) -> str:
    """Why FFmpeg, which does not say, has no stream of a server: how far we come ourselves."""
    if not address.host:
        return f"no picture within {config.open_timeout_s:g} s"
    patience = Patience(stop, silence_s=config.read_timeout_s)
    patience.limit(config.open_timeout_s, too_late="no connection: nothing answers there")
    try:
        with in_words(), connected(address.host, address.port, patience) as connection:
            if address.is_secure:
                secured(
                    connection, address.host, tls=tls_context(config), patience=patience
                ).close()
    except StreamError as error:
        return error.loss.detail
    return f"connected, but no stream came within {config.open_timeout_s:g} s, or it was broken off"
