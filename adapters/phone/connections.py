"""The connection to one phone: what it sends, what is sent to it, and when it is there.

A phone talks over a WebSocket. Where a browser refuses that, it posts the same messages and reads
the answers: Safari does not extend to WebSockets the exception that a person made for a self-signed
certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.phone.feedback import Advice
from adapters.phone.messages import MAX_TEXT_BYTES
from adapters.phone.phone_session import PhoneContext, PhoneSession
from adapters.phone.sessions import Session, Sessions
from engine.types import SourceNotice, SourceState

if TYPE_CHECKING:
    from aiohttp import web

# Close codes of the page's own; it connects again after any other.
CLOSED_REPLACED = 4000  # the same device opened the page again
CLOSED_ENDED = 4001
_CLOSED_NONSENSE = 1008  # RFC 6455: policy violation
_CLOSED_TOO_BIG = 1009
_CLOSED_SLOW = 1011
_ABNORMAL = 1006
_STATE_GAP_S = 0.2  # between two states sent to a phone
_SEND_TIMEOUT_S = 5.0
_FAREWELL_S = 1.5


@dataclass(slots=True, kw_only=True)
class _Sent:
    """What went out on one connection."""

    num_left: int  # pictures of the phone that had left before it began
    last_left: int = -1
    version: int = -1
    plan_version: int = 0
    state_at_s: float = 0.0


class PhoneConnection:
    """Receives from one phone and sends it the state of the run; for the event loop."""

    def __init__(self, session: Session, *, context: PhoneContext, sessions: Sessions) -> None:
        """Starts without a connection.

        Args:
            session: the phone's.
            context: what it shares with others.
            sessions: all of them.
        """
        self.session = session
        self.phone = PhoneSession(session.number, context)
        self.phone.changed = self.wake
        self._context = context
        self._live = context.config.live_sources
        self._sessions = sessions
        self._has_changed = asyncio.Event()
        self._socket: web.WebSocketResponse | None = None
        self._posted = asyncio.Event()
        self._posting: asyncio.Task[None] | None = None  # while the phone posts
        self._was_sent_end = asyncio.Event()

    async def close(self) -> None:
        """Ends what runs for the phone."""
        if self._posting is not None:
            self._posting.cancel()
            await asyncio.gather(self._posting, return_exceptions=True)

    def wake(self) -> None:
        """There may be something to send."""
        self._has_changed.set()

    async def send_end(self) -> None:
        """Waits a moment for the phone to learn that the run ended."""
        socket = self._socket
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_FAREWELL_S):
                if socket is not None:
                    sent = _Sent(num_left=self.phone.num_left)
                    await socket.send_str(json.dumps(self._update(sent, at_once=True)))
                    await socket.close(code=CLOSED_ENDED, message=b"ended")
                elif self._posting is not None:
                    await self._was_sent_end.wait()

    # -- over a WebSocket -------------------------------------------------------------------------

    async def serve(self, socket: web.WebSocketResponse) -> None:
        """Serves a connection to its end; a newer one of the same phone takes its place."""
        former, self._socket = self._socket, socket
        if former is not None:
            await former.close(code=CLOSED_REPLACED, message=b"opened again")
        self._connected()
        sending = asyncio.create_task(self._send(socket), name=f"send {self.phone.name}")
        try:
            why = await self._receive(socket)
        finally:
            sending.cancel()
            await asyncio.wait((sending,))
            is_last = self._socket is socket
            if is_last:
                self._socket = None
        if is_last:
            self._left(why)

    async def _receive(self, socket: web.WebSocketResponse) -> str:
        """Takes messages until the connection ends; returns why it did."""
        from aiohttp import WSMsgType

        timeout_s: float | None = self._live.open_timeout_s
        while True:
            try:
                message = await socket.receive(timeout=timeout_s)
            except TimeoutError:
                await socket.close(code=_CLOSED_NONSENSE, message=b"silent")
                return "it said nothing"
            timeout_s = None  # from now on the heartbeat watches
            if message.type is WSMsgType.BINARY:
                self.phone.take_binary(message.data)
            elif message.type is WSMsgType.TEXT:
                self.phone.take_text(message.data)
            else:
                code = getattr(message.data, "code", socket.close_code)  # of an error, or a close
                if code == _CLOSED_TOO_BIG:
                    self.phone.refuse_oversized()
                return _why_closed(code)
            if self.phone.is_babbling:
                await socket.close(code=_CLOSED_NONSENSE, message=b"no such message")
                return "it sent nothing that makes sense"

    async def _send(self, socket: web.WebSocketResponse) -> None:
        """Sends what has changed over one connection, until cancelled or it breaks."""
        sent = _Sent(num_left=self.phone.num_left)
        waking: asyncio.TimerHandle | None = None
        try:
            self._has_changed.set()
            while True:
                await self._has_changed.wait()
                self._has_changed.clear()
                if waking is not None:
                    waking.cancel()
                if update := self._update(sent):
                    async with asyncio.timeout(_SEND_TIMEOUT_S):
                        await socket.send_str(json.dumps(update))
                if sent.version != self._context.feedback.version:
                    loop = asyncio.get_running_loop()
                    waking = loop.call_later(_STATE_GAP_S, self._has_changed.set)
        except (ConnectionError, TimeoutError):
            await socket.close(code=_CLOSED_SLOW, message=b"too slow")
        finally:
            if waking is not None:
                waking.cancel()

    # -- over plain requests ----------------------------------------------------------------------

    def answer(self, body: bytes, *, is_picture: bool, known_plan: int) -> dict[str, Any]:
        """Takes one posted message, or none, and returns what has changed."""
        self._posted.set()
        if self._posting is None:
            self._posting = asyncio.create_task(
                self._watch_posts(), name=f"posts of {self.phone.name}"
            )
            self._connected()
        if is_picture:
            self.phone.take_binary(body)
        elif body:
            self.phone.take_text(body[: MAX_TEXT_BYTES + 1].decode("utf-8", "replace"))
        answer = self._update(_Sent(num_left=0, plan_version=known_plan), at_once=True)
        if answer["state"]["advice"] == Advice.ENDED:
            self._was_sent_end.set()
        return answer

    async def _watch_posts(self) -> None:
        """Notices when the phone posts nothing any more."""
        silence_s = 2.0 * self._live.read_timeout_s
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(silence_s):
                    await self._posted.wait()
                self._posted.clear()
        self._posting = None
        self._left("it sends nothing any more")

    # -- both -------------------------------------------------------------------------------------

    def _update(self, sent: _Sent, *, at_once: bool = False) -> dict[str, Any]:
        """What was not sent on a connection yet and may be now; it counts as sent."""
        now_s = asyncio.get_running_loop().time()
        feedback = self._context.feedback
        update: dict[str, Any] = {}
        num_left = self.phone.num_left - sent.num_left
        if num_left != sent.last_left:
            sent.last_left = update["left"] = num_left
        if feedback.version == sent.version:
            return update
        if at_once or now_s - sent.state_at_s >= _STATE_GAP_S:
            sent.version, sent.state_at_s = feedback.version, now_s
            update["state"] = feedback.state_record(self.phone.number)
            plan = feedback.plan_record(known_version=sent.plan_version)
            if plan is not None:
                sent.plan_version = feedback.plan_version
                update["plan"] = plan
        return update

    def _connected(self) -> None:
        self._sessions.set_connected(self.session, True)
        self._report(SourceState.CONNECTED, f"phone {self.phone.number} is there")

    def _left(self, why: str) -> None:
        self._sessions.set_connected(self.session, False)
        self._report(SourceState.LOST, f"phone {self.phone.number} left: {why}")

    def _report(self, state: SourceState, detail: str) -> None:
        self._context.sink(SourceNotice(source=self._context.label, state=state, detail=detail))


def _why_closed(code: int | None) -> str:
    if code == _CLOSED_TOO_BIG:
        return "it sent more than live_sources.max_payload_mb"
    if code in (None, _ABNORMAL):
        return "the connection broke"
    return "the page was closed"
