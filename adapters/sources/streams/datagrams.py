"""Waits for datagrams that hold MPEG-TS, before FFmpeg receives them.

FFmpeg does not say whether nobody sends, or whether it finds nothing in what is sent.
"""

from __future__ import annotations

import socket
import threading
from urllib.parse import parse_qs, urlsplit

from adapters.sources.streams.patience import OutOfPatienceError, Patience, StreamError
from adapters.sources.streams.stream_address import StreamAddress, is_multicast

_SYNC = 0x47  # the first byte of a packet (ISO/IEC 13818-1, section 2.4.3.2)
_PACKET_BYTES = 188
_MAX_BYTES = 65_536
_TRIES = 20  # datagrams that may be of another sender
_SHOWN_BYTES = 8


def await_transport_stream(address: StreamAddress, *, stop: threading.Event) -> None:
    """Waits until MPEG-TS comes to an address.

    Raises:
        StreamError: nobody sends, or something else comes.
        OSError: nothing can be received there.
    """
    patience = Patience(stop, silence_s=address.max_wait_s)
    patience.limit(address.max_wait_s, too_late="nobody came")
    with _receiving(address) as receiving:
        data = b""
        try:
            for _ in range(_TRIES):
                patience.wait_for(receiving)
                data = receiving.recv(_MAX_BYTES)
                if holds_transport_stream(data):
                    return
        except OutOfPatienceError as error:
            if not data:
                raise StreamError(error.loss.detail, is_nobody=True) from error
    raise StreamError(f"what comes is no MPEG-TS: it begins with {data[:_SHOWN_BYTES].hex(' ')}")


def holds_transport_stream(data: bytes) -> bool:
    """Whether packets of MPEG-TS lie in a datagram, one behind the other, from some place on."""
    starts = range(min(_PACKET_BYTES, len(data)))
    return len(data) >= _PACKET_BYTES and any(
        all(byte == _SYNC for byte in data[start::_PACKET_BYTES]) for start in starts
    )


def _receiving(address: StreamAddress) -> socket.socket:
    """A socket that receives what is sent to an address of this computer, or to a group."""
    family, *_, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)[0]
    receiving = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if is_multicast(address.host):
            receiving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _join(receiving, family, address)
        receiving.bind(place)
    except BaseException:
        receiving.close()
        raise
    return receiving


def _join(receiving: socket.socket, family: socket.AddressFamily, address: StreamAddress) -> None:
    group = socket.inet_pton(family, address.host)
    if family == socket.AF_INET6:
        receiving.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + bytes(4))
        return
    own = parse_qs(urlsplit(address.url).query).get("localaddr", ["0.0.0.0"])[0]
    receiving.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + socket.inet_aton(own))
