"""Who gets a seat."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.phone.sessions import AWAY_S, Admission, Refusal, Seat


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def admission(max_seats: int = 2) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(max_seats=max_seats, clock=clock), clock


def seated(door: Admission, *, connected: bool = True) -> Seat:
    seat = door.admit(door.secret, session=None)
    assert isinstance(seat, Seat)
    door.connected(seat, connected)
    return seat


def test_the_secret_lets_in_and_nothing_else_does() -> None:
    door, _ = admission()
    assert isinstance(door.admit(door.secret, session=None), Seat)
    for wrong in (None, "", door.secret[:-1], door.secret + "x", "ä" * 32, "\ud800"):
        assert door.admit(wrong, session=None) is Refusal.NOT_INVITED


def test_secrets_are_long_and_new_each_time() -> None:
    secrets = {admission()[0].secret for _ in range(5)}
    assert len(secrets) == 5
    assert min(map(len, secrets)) >= 32


def test_a_device_comes_back_by_its_session_without_the_secret() -> None:
    door, _ = admission()
    seat = seated(door)
    assert door.admit(None, session=seat.session) is seat
    assert door.admit("wrong", session=seat.session) is seat
    assert door.seat_of(seat.session) is seat
    assert door.seat_of(None) is None
    assert door.seat_of("ä") is None


def test_a_reload_with_the_invitation_takes_no_second_seat() -> None:
    door, _ = admission(max_seats=1)
    seat = seated(door)
    assert door.admit(door.secret, session=seat.session) is seat


def test_devices_have_different_sessions_and_numbers() -> None:
    door, _ = admission()
    one, two = seated(door), seated(door)
    assert one.session != two.session
    assert (one.number, two.number) == (1, 2)


def test_no_more_devices_than_seats() -> None:
    door, _ = admission()
    seated(door)
    seated(door)
    assert door.admit(door.secret, session=None) is Refusal.FULL


def test_who_has_been_away_for_long_gives_the_seat_to_a_newcomer() -> None:
    door, clock = admission()
    here, gone = seated(door), seated(door)
    door.connected(gone, False)
    clock.now_s = AWAY_S - 1.0
    assert door.admit(door.secret, session=None) is Refusal.FULL
    clock.now_s = AWAY_S
    newcomer = seated(door)
    assert newcomer.number == 3
    assert door.has(here)
    assert not door.has(gone)
    assert door.admit(None, session=gone.session) is Refusal.NOT_INVITED


def test_who_is_connected_keeps_the_seat() -> None:
    door, clock = admission(max_seats=1)
    seated(door)
    clock.now_s = 100.0 * AWAY_S
    assert door.admit(door.secret, session=None) is Refusal.FULL
