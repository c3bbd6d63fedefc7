"""Stands for the cluster processes of a run: threads at the other end of the same sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

from adapters.remote.hosted import HostedMatcher, HostedSift, States
from adapters.remote.messages import Array, Channel, Message
from engine.config import Config

WAIT_S = 60.0  # for what comes by itself; no test passes by it
AWAY_S = 1e9  # since the cluster answered last

Reply = Callable[[Message], Message | None]


class FakeProcess:
    """A cluster process; what a `Popen` has of it, and what it sends.

    Args:
        number: of its end of the socket.
        reply: to a call; None: nothing is sent.
        vectors: that recognize the places of states, by their keys; None: nothing is sent.
        is_up: whether the cluster answers from the beginning.
    """

    def __init__(
        self,
        number: int,
        *,
        reply: Reply,
        vectors: Callable[[str], Array] | None = None,
        is_up: bool = True,
    ) -> None:
        self.channel = Channel(socket.socket(fileno=os.dup(number)))
        self.received: list[Message] = []
        self.vectors = vectors
        self._reply = reply
        self._is_up = is_up
        self._thread = threading.Thread(target=self._run, name="fake process", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the run closed its end."""
        return not self._thread.is_alive()

    def calls(self, method: str) -> list[Message]:
        """The calls of a method that came."""
        return [one for one in self.received if one.fields.get("method") == method]

    def answers(self, *, silent_s: float = 0.0) -> None:
        """Says when the cluster answered last."""
        fields = {"silent_s": silent_s, "num_up": 1, "figures": {}}
        self.channel.send(Message(kind="alive", fields=fields))

    def wait(self, timeout: float | None = None) -> int:
        """As `Popen.wait`."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("fake", timeout or 0.0)
        return 0

    def kill(self) -> None:
        """As `Popen.kill`."""
        self.channel.close()

    def _run(self) -> None:
        while (message := self.channel.receive()) is not None:
            self.received.append(message)
            if message.kind == "open" and self._is_up:
                self.answers()
            elif message.kind == "call" and (reply := self._reply(message)) is not None:
                self.channel.send(reply)
            elif message.kind == "state" and message.number and self.vectors is not None:
                arrays = {"vector": self.vectors(message.fields["key"])}
                self.channel.send(Message(kind="result", number=message.number, arrays=arrays))
        self.channel.close()


class FakeProcesses:
    """Starts cluster processes where `subprocess.Popen` would.

    Args:
        reply: of each process to a call.
        vectors: as of `FakeProcess`.
        is_up: whether the cluster answers from the beginning.
    """

    def __init__(
        self,
        reply: Reply = lambda call: None,
        *,
        vectors: Callable[[str], Array] | None = None,
        is_up: bool = True,
    ) -> None:
        self.all: list[FakeProcess] = []
        self._reply = reply
        self._vectors = vectors
        self._is_up = is_up
        self._started = threading.Event()

    def wait_for_one(self) -> None:
        """Waits until a process was started."""
        assert self._started.wait(WAIT_S)

    def __call__(self, command: Sequence[str], **_: object) -> FakeProcess:
        process = FakeProcess(
            int(command[-1]), reply=self._reply, vectors=self._vectors, is_up=self._is_up
        )
        self.all.append(process)
        self._started.set()
        return process


def result(call: Message, fields: dict[str, object] | None = None) -> Message:
    """A result without arrays."""
    return Message(kind="result", number=call.number, fields=fields or {})


def sift_worker(config: Config) -> Reply:
    """Replies as a worker that holds SIFT, and has the descriptors that it made."""
    states = States(max_bytes=10**9)
    matcher: HostedMatcher = HostedSift(config, states=states)

    def reply(message: Message) -> Message:
        fields, arrays = message.fields["call"], message.arrays
        if message.fields["method"] == "describe":
            fields, arrays = matcher.describe(fields, arrays)
            states.put(str(fields["key"]), arrays["descriptors"])
            return Message(kind="result", number=message.number, fields=fields, arrays=arrays)
        rows: dict[str, Any] = {}
        for number, (first, second, own) in enumerate(fields["pairs"]):
            start = f"{number}."
            guide = {k.removeprefix(start): a for k, a in arrays.items() if k.startswith(start)}
            _, found = matcher.match((first, second), own, guide)
            rows |= {f"{start}{name}": array for name, array in found.items()}
        return Message(kind="result", number=message.number, arrays=rows)

    return reply
