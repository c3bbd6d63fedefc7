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
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":  # elsewhere the option would let two servers share the port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceError(f"{label}: cannot listen there: {reason}") from error


def reachable_host(host: str) -> str:
    """What others put into a URL to reach a host; all addresses have one that is likely."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        address = lan_address()
    return f"[{address}]" if address.version == 6 else str(address)
