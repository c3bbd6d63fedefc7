"""MQTT outbox: the bounded queue of messages to publish, in which the newest win."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from adapters.mqtt.messages import Channel, Message

_MAX_WAITING_POSES = 64
_MAX_WAITING_OTHERS = 512


class Outbox:
    """Messages that wait to be published. Called from any thread; never blocks.

    When too many wait, the oldest are dropped and counted. Lasting messages are kept after they
    were taken: a broker that restarts has lost them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._poses: deque[Message] = deque()
        self._others: deque[Message] = deque()
        self._lasting: dict[Channel, Message] = {}
        self._num_lost = 0

    @property
    def num_lost(self) -> int:
        """Messages that were not published: too many waited, or the connection broke."""
        return self._num_lost

    def put(self, message: Message) -> None:
        """Adds a message; a lasting one replaces the former one on its topic."""
        with self._lock:
            if message.is_lasting:
                self._lasting[message.channel] = message
                self._others = deque(
                    other for other in self._others if other.channel is not message.channel
                )
            is_pose = message.channel is Channel.POSE
            waiting = self._poses if is_pose else self._others
            if len(waiting) >= (_MAX_WAITING_POSES if is_pose else _MAX_WAITING_OTHERS):
                waiting.popleft()
                self._num_lost += 1
            waiting.append(message)

    def take(self) -> Message | None:
        """Removes and returns the next message, poses last; None when there is none."""
        with self._lock:
            for waiting in (self._others, self._poses):
                if waiting:
                    return waiting.popleft()
        return None

    def repeat_lasting(self) -> None:
        """Queues lasting messages again, before all others."""
        with self._lock:
            others = (other for other in self._others if not other.is_lasting)
            self._others = deque([*self._lasting.values(), *others])

    def count_lost(self) -> None:
        """Counts a message that was taken but not published."""
        with self._lock:
            self._num_lost += 1


class Throttle:
    """A rate limit: so many a second, and as many at once after a pause. For one thread."""

    def __init__(self, rate_hz: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate_hz = rate_hz
        self._clock = clock
        self._left = max(1.0, rate_hz)
        self._at_s = clock()

    def allows(self) -> bool:
        """Whether the next one is within the limit; it counts if so."""
        now_s = self._clock()
        most = max(1.0, self.rate_hz)
        self._left = min(most, self._left + self.rate_hz * (now_s - self._at_s))
        self._at_s = now_s
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
