"""Who gets a session."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.phone.sessions import AWAY_S, UNUSED_S, Refusal, Session, Sessions


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def opened(max_sessions: int = 2) -> tuple[Sessions, Clock]:
    clock = Clock()
    return Sessions(max_sessions=max_sessions, clock=clock), clock


def admitted(sessions: Sessions, *, connected: bool = True) -> Session:
    session = sessions.admit(sessions.secret, token=None)
    assert isinstance(session, Session)
    sessions.set_connected(session, connected)
    return session


def test_the_secret_lets_in_and_nothing_else_does() -> None:
    sessions, _ = opened()
    assert isinstance(sessions.admit(sessions.secret, token=None), Session)
    for wrong in (None, "", sessions.secret[:-1], sessions.secret + "x", "ä" * 32, "\ud800"):
        assert sessions.admit(wrong, token=None) is Refusal.NOT_INVITED


def test_secrets_are_long_and_new_each_time() -> None:
    secrets = {opened()[0].secret for _ in range(5)}
    assert len(secrets) == 5
    assert min(map(len, secrets)) >= 32


def test_a_device_comes_back_by_its_session_without_the_secret() -> None:
    sessions, _ = opened()
    session = admitted(sessions)
    assert sessions.admit(None, token=session.token) is session
    assert sessions.admit("wrong", token=session.token) is session
    assert sessions.find(session.token) is session
    assert sessions.find(None) is None
    assert sessions.find("ä") is None


def test_a_reload_with_the_invitation_opens_no_second_session() -> None:
    sessions, _ = opened(max_sessions=1)
    session = admitted(sessions)
    assert sessions.admit(sessions.secret, token=session.token) is session


def test_devices_have_different_sessions_and_numbers() -> None:
    sessions, _ = opened()
    one, two = admitted(sessions), admitted(sessions)
    assert one.token != two.token
    assert (one.number, two.number) == (1, 2)


def test_no_more_devices_than_sessions() -> None:
    sessions, _ = opened()
    admitted(sessions)
    admitted(sessions)
    assert sessions.admit(sessions.secret, token=None) is Refusal.FULL


def test_who_has_been_away_for_long_makes_room_for_a_newcomer() -> None:
    sessions, clock = opened()
    here, gone = admitted(sessions), admitted(sessions)
    sessions.set_connected(gone, False)
    clock.now_s = AWAY_S - 1.0
    assert sessions.admit(sessions.secret, token=None) is Refusal.FULL
    clock.now_s = AWAY_S
    newcomer = admitted(sessions)
    assert newcomer.number == 3
    assert sessions.has(here)
    assert not sessions.has(gone)
    assert sessions.admit(None, token=gone.token) is Refusal.NOT_INVITED


def test_who_is_connected_keeps_the_session() -> None:
    sessions, clock = opened(max_sessions=1)
    admitted(sessions)
    clock.now_s = 100.0 * AWAY_S
    assert sessions.admit(sessions.secret, token=None) is Refusal.FULL


def test_who_only_loaded_the_page_makes_room_soon_and_before_others() -> None:
    sessions, clock = opened(max_sessions=3)
    gone = admitted(sessions)
    sessions.set_connected(gone, False)
    previews = [admitted_unused(sessions) for _ in range(2)]
    clock.now_s = UNUSED_S - 1.0
    assert sessions.admit(sessions.secret, token=None) is Refusal.FULL
    clock.now_s = UNUSED_S
    admitted(sessions)
    admitted(sessions)
    assert sessions.has(gone)
    assert not any(sessions.has(preview) for preview in previews)
    assert sessions.admit(sessions.secret, token=None) is Refusal.FULL


def admitted_unused(sessions: Sessions) -> Session:
    session = sessions.admit(sessions.secret, token=None)
    assert isinstance(session, Session)
    return session
