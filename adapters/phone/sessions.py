"""Who may use the page: one secret in the invitation, one seat for each device that came with it.

The secret is in the URL only once. At the first page load the device gets a session of its own in
a cookie, and the page takes the secret out of the address bar: reloading works on that device, and
nobody learns the secret by looking over a shoulder. As many devices as there are seats may use the
invitation. When all seats are taken, a newcomer gets the seat of a device that has been away for
long; if there is none, it is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

_SECRET_BYTES = 24
AWAY_S = 120.0  # without a connection, before somebody else may have the seat


class Refusal(Enum):
    """Why a device gets no seat."""

    NOT_INVITED = auto()
    FULL = auto()


@dataclass(slots=True, kw_only=True)
class Seat:
    """One device."""

    number: int  # 1, 2, 3, ... in order of arrival; never given twice
    session: str  # secret of this device
    last_seen_s: float
    is_connected: bool = False


class Admission:
    """Gives out seats; for one thread."""

    def __init__(self, *, max_seats: int, clock: Callable[[], float]) -> None:
        self.secret = secrets.token_urlsafe(_SECRET_BYTES)
        self._max_seats = max_seats
        self._clock = clock
        self._seats: dict[str, Seat] = {}
        self._num_given = 0

    def seat_of(self, session: str | None) -> Seat | None:
        """The seat of a device that was admitted before."""
        if session is None:
            return None
        # Every seat is compared in constant time, so that answers do not tell how much was right.
        found = [seat for known, seat in self._seats.items() if _is_same(known, session)]
        return found[0] if found else None

    def admit(self, secret: str | None, *, session: str | None) -> Seat | Refusal:
        """A seat for a device that loads the page: its own again, or a new one for the secret."""
        seat = self.seat_of(session)
        if seat is None:
            if secret is None or not _is_same(self.secret, secret):
                return Refusal.NOT_INVITED
            if len(self._seats) >= self._max_seats and not self._free_seat():
                return Refusal.FULL
            seat = self._new_seat()
        seat.last_seen_s = self._clock()
        return seat

    def connected(self, seat: Seat, is_connected: bool) -> None:
        """Notes that a device came or went."""
        seat.is_connected = is_connected
        seat.last_seen_s = self._clock()

    def has(self, seat: Seat) -> bool:
        """Whether the seat was not given to somebody else."""
        return seat.session in self._seats

    def _new_seat(self) -> Seat:
        self._num_given += 1
        seat = Seat(
            number=self._num_given,
            session=secrets.token_urlsafe(_SECRET_BYTES),
            last_seen_s=self._clock(),
        )
        self._seats[seat.session] = seat
        return seat

    def _free_seat(self) -> bool:
        """Takes the seat of who has been away longest, if that is long enough."""
        away = [seat for seat in self._seats.values() if not seat.is_connected]
        if not away:
            return False
        longest = min(away, key=lambda seat: seat.last_seen_s)
        if self._clock() - longest.last_seen_s < AWAY_S:
            return False
        del self._seats[longest.session]
        return True


def _is_same(secret: str, given: str) -> bool:
    return secrets.compare_digest(secret.encode(), given.encode("utf-8", "replace"))
