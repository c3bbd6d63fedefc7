"""Who may use the page: one secret in the invitation, a session for each device that came with it.

The secret is in the URL only once. At the first page load the device gets a token of its own in
a cookie, and the page takes the secret out of the address bar: reloading works on that device, and
nobody learns the secret by looking over a shoulder. So many devices may use the invitation. When
there are as many, a newcomer gets the place of a device that has been away for long; if there is
none, it is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

_SECRET_BYTES = 24
UNUSED_S = 10.0  # without ever a connection, likewise; the page connects as soon as it is loaded
AWAY_S = 120.0  # without a connection, before somebody else may have the place


class Refusal(Enum):
    """Why a device gets no session."""

    NOT_INVITED = auto()
    FULL = auto()


@dataclass(slots=True, kw_only=True)
class Session:
    """One device."""

    number: int  # 1, 2, 3, ... in order of arrival; never given twice
    token: str  # secret of this device
    last_seen_s: float
    is_connected: bool = False
    was_connected: bool = False  # False: it loaded the page, as a preview of the link does


class Sessions:
    """The sessions of all devices; for one thread."""

    def __init__(self, *, max_sessions: int, clock: Callable[[], float]) -> None:
        """Makes a new secret.

        Args:
            max_sessions: at the same time.
            clock: seconds that never go back.
        """
        self.secret = secrets.token_urlsafe(_SECRET_BYTES)
        self._max_sessions = max_sessions
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._num_opened = 0

    def find(self, token: str | None) -> Session | None:
        """The session of a device that was admitted before."""
        if token is None:
            return None
        # Every token is compared in constant time, so that answers do not show how much was right.
        found = [session for known, session in self._sessions.items() if _is_same(known, token)]
        return found[0] if found else None

    def admit(self, secret: str | None, *, token: str | None) -> Session | Refusal:
        """The session of a device that loads the page: its own, or a new one for the secret."""
        session = self.find(token)
        if session is None:
            if secret is None or not _is_same(self.secret, secret):
                return Refusal.NOT_INVITED
            if len(self._sessions) >= self._max_sessions and not self._end_longest_away():
                return Refusal.FULL
            session = self._open()
        session.last_seen_s = self._clock()
        return session

    def set_connected(self, session: Session, is_connected: bool) -> None:
        """Registers that a device connected or left."""
        session.is_connected = is_connected
        session.was_connected = session.was_connected or is_connected
        session.last_seen_s = self._clock()

    def has(self, session: Session) -> bool:
        """Whether the session was not ended for somebody else's."""
        return session.token in self._sessions

    def _open(self) -> Session:
        self._num_opened += 1
        session = Session(
            number=self._num_opened,
            token=secrets.token_urlsafe(_SECRET_BYTES),
            last_seen_s=self._clock(),
        )
        self._sessions[session.token] = session
        return session

    def _end_longest_away(self) -> bool:
        """Ends the session of who has been away longest, if that is long enough."""
        away = [session for session in self._sessions.values() if not session.is_connected]
        if not away:
            return False
        # Who never connected goes first: the preview of a link in a chat loads the page, too.
        longest = min(away, key=lambda session: (session.was_connected, session.last_seen_s))
        patience_s = AWAY_S if longest.was_connected else UNUSED_S
        if self._clock() - longest.last_seen_s < patience_s:
            return False
        del self._sessions[longest.token]
        return True


def _is_same(secret: str, given: str) -> bool:
    return secrets.compare_digest(secret.encode(), given.encode("utf-8", "replace"))
