"""Addresses that a source listens at: whether it can, and what others call them."""

from __future__ import annotations

import ipaddress
import os
import socket

from adapters.live.addresses import lan_address
from engine.errors import SourceError


def refuse_taken_address(host: str, port: int, *, label: str) -> None:
    """Makes sure, before a run begins, that its source will be able to listen.

    Raises:
        SourceError: the port is taken, or the address is not one of this computer's.
    """
    try:
        free_address(host, port)
    except OSError as error:
        raise cannot_listen(label, error) from error


def refuse_taken_datagrams(host: str, port: int, *, label: str) -> None:
    """The same for a source that receives datagrams.

    Raises:
        SourceError: the port is taken, or the address is not one of this computer's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # no host has such a name
        raise cannot_listen(label, error) from error


def cannot_listen(label: str, error: Exception) -> SourceError:
    """The error of a source that cannot listen where it is to."""
    return SourceError(f"{label}: cannot listen there: {getattr(error, 'strerror', '') or error}")


def free_address(host: str, port: int) -> tuple[str, int]:
    """The address and port at which a server can listen; port 0 stands for any free one.

    Raises:
        OSError: the port is taken, or the host is not this computer.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError as error:  # no host has such a name
        raise OSError(str(error)) from error
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # elsewhere the option would let two servers share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen(1)
        ip, free_port = probe.getsockname()[:2]
    return ip, free_port


def reachable_host(host: str) -> str:
    """What others put into a URL to reach a host; all addresses have one that is likely."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        address = lan_address()
    return f"[{address}]" if address.version == 6 else str(address)
