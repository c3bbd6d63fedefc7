"""Messages between a run and its cluster process: names, numbers and plain arrays, no pickles.

A message is a header and a body. The header is JSON with the names, types and shapes of the arrays,
whose bytes are the body, one after the other. Before both come their lengths, two little-endian
unsigned integers of 4 and 8 bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Fields = Mapping[str, Any]  # values that JSON has
Arrays = Mapping[str, Array]

MAX_HEADER_BYTES = 1_000_000
MAX_BODY_BYTES = 1_000_000_000
_MAX_DIMENSIONS = 4
_LENGTHS = struct.Struct("<IQ")
_TYPES = {np.dtype(name) for name in ("u1", "b1", "<u2", "<i4", "<u4", "<i8", "<f4", "<f8")}


class BrokenMessageError(ValueError):
    """What came is no message; nothing after it can be read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Message:
    """A call, its result, or what else one end sends the other."""

    kind: str
    number: int = 0  # of the call
    fields: Fields = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def encode(message: Message) -> list[bytes | memoryview]:
    """The parts of a message, in order.

    Raises:
        BrokenMessageError: it is larger than messages may be, or an array is of another type.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
    for name, array in arrays.items():
        if array.dtype not in _TYPES or array.ndim > _MAX_DIMENSIONS:
            raise BrokenMessageError(f"{name}: arrays of {array.dtype} are not sent")
    header = json.dumps(
        {
            "kind": message.kind,
            "number": message.number,
            "fields": dict(message.fields),
            "arrays": [[name, one.dtype.str, list(one.shape)] for name, one in arrays.items()],
        }
    ).encode()
    if len(header) > MAX_HEADER_BYTES or message.num_bytes > MAX_BODY_BYTES:
        raise BrokenMessageError(f"{message.kind}: {message.num_bytes} bytes are too many")
    bodies = [one.reshape(-1).view(np.uint8).data for one in arrays.values() if one.size]
    return [_LENGTHS.pack(len(header), message.num_bytes), header, *bodies]


def decode(header: bytes, body: bytearray) -> Message:
    """A message by its two parts; its arrays are views of the body.

    Raises:
        BrokenMessageError: it is none.
    """
    try:
        described = json.loads(header)
        arrays, start = {}, 0
        for name, type_name, shape in described["arrays"]:
            kind = np.dtype(type_name)
            if kind not in _TYPES or len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0:
                raise BrokenMessageError(f"an array of {type_name} and shape {shape}")
            num = math.prod(int(length) for length in shape)
            if num * kind.itemsize > len(body) - start:
                raise BrokenMessageError("arrays are longer than the message")
            arrays[str(name)] = np.frombuffer(body, kind, num, start).reshape(shape)
            start += num * kind.itemsize
        if start != len(body):
            raise BrokenMessageError("arrays are shorter than the message")
        return Message(
            kind=str(described["kind"]),
            number=int(described["number"]),
            fields=dict(described["fields"]),
            arrays=arrays,
        )
    except (KeyError, TypeError, ValueError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error, BrokenMessageError):
            raise
        raise BrokenMessageError(f"no message: {error}") from error


class Channel:
    """Sends and receives messages over a socket of this machine. One thread receives; any send."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends a message; blocks while the other end does not read.

        Raises:
            BrokenMessageError: as `encode`.
            OSError: the other end is gone.
        """
        parts = encode(message)
        with self._sending:
            for part in parts:
                self._socket.sendall(part)

    def receive(self) -> Message | None:
        """The next message; None when the other end is gone.

        Raises:
            BrokenMessageError: something else came.
        """
        try:
            lengths = self._read(_LENGTHS.size)
            if lengths is None:
                return None
            num_header, num_body = _LENGTHS.unpack(bytes(lengths))
            if num_header > MAX_HEADER_BYTES or num_body > MAX_BODY_BYTES:
                raise BrokenMessageError(f"a message of {num_header} and {num_body} bytes")
            header = self._read(num_header)
            body = None if header is None else self._read(num_body)
        except OSError:
            return None
        return None if header is None or body is None else decode(bytes(header), body)

    def _read(self, num: int) -> bytearray | None:
        read = bytearray(num)
        view = memoryview(read)
        while view:
            received = self._socket.recv_into(view)
            if not received:
                return None
            view = view[received:]
        return read

    def close(self) -> None:
        """Closes the socket; who receives on it gets None."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
