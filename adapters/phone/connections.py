"""The line to one phone: what it says, what it is told, and when it is there.

A phone talks over a WebSocket. Where a browser refuses that, it posts the same messages and reads
the answers: Safari does not extend to WebSockets the exception that a person made for a self-signed
certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.phone.feedback import Advice
from adapters.phone.messages import MAX_TEXT_BYTES
from adapters.phone.phone_session import Intake, Phone
from adapters.phone.sessions import Admission, Seat
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
_STATE_GAP_S = 0.2  # between two states told to a phone
_SEND_TIMEOUT_S = 5.0
_FAREWELL_S = 1.5


@dataclass(slots=True, kw_only=True)
class _Told:
    """What went out on one connection."""

    num_left: int  # pictures of the phone that had left before it began
    last_left: int = -1
    version: int = -1
    plan_version: int = 0
    state_at_s: float = 0.0


class Line:
    """Listens to one phone and tells it of the run; for the event loop."""

    def __init__(self, seat: Seat, *, intake: Intake, admission: Admission) -> None:
        self.seat = seat
        self.phone = Phone(seat.number, intake)
        self.phone.changed = self.wake
        self._intake = intake
        self._live = intake.config.live_sources
        self._admission = admission
        self._news = asyncio.Event()
        self._socket: web.WebSocketResponse | None = None
        self._posted = asyncio.Event()
        self._posting: asyncio.Task[None] | None = None  # while the phone posts
        self._was_told_end = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    def open(self, failed: Callable[[BaseException], None]) -> None:
        """Begins to decode; ``failed`` is told when that breaks in a way that must not be."""

        def on_done(work: asyncio.Task[None]) -> None:
            if not work.cancelled() and (error := work.exception()) is not None:
                failed(error)

        self._work = asyncio.create_task(self.phone.work(), name=f"decode {self.phone.name}")
        self._work.add_done_callback(on_done)

    async def close(self) -> None:
        """Ends what runs for the phone."""
        tasks = [task for task in (self._work, self._posting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """There may be something to tell."""
        self._news.set()

    async def say_farewell(self) -> None:
        """Waits a moment for the phone to hear that the run ended."""
        socket = self._socket
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_FAREWELL_S):
                if socket is not None:
                    told = _Told(num_left=self.phone.num_left)
                    await socket.send_str(json.dumps(self._untold(told, at_once=True)))
                    await socket.close(code=CLOSED_ENDED, message=b"ended")
                elif self._posting is not None:
                    await self._was_told_end.wait()

    # -- over a WebSocket -------------------------------------------------------------------------

    async def talk(self, socket: web.WebSocketResponse) -> None:
        """Serves a connection to its end; a newer one of the same phone takes its place."""
        former, self._socket = self._socket, socket
        if former is not None:
            await former.close(code=CLOSED_REPLACED, message=b"opened again")
        await self._came()
        telling = asyncio.create_task(self._tell(socket), name=f"tell {self.phone.name}")
        try:
            why = await self._listen(socket)
        finally:
            telling.cancel()
            await asyncio.wait((telling,))
            is_last = self._socket is socket
            if is_last:
                self._socket = None
        if is_last:
            await self._left(why)

    async def _listen(self, socket: web.WebSocketResponse) -> str:
        """Takes messages until the connection ends; says why it did."""
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
                await self.phone.take_binary(message.data)
            elif message.type is WSMsgType.TEXT:
                await self.phone.take_text(message.data)
            else:
                code = getattr(message.data, "code", socket.close_code)  # of an error, or a close
                if code == _CLOSED_TOO_BIG:
                    await self.phone.refuse_oversized()
                return _why_closed(code)
            if self.phone.is_babbling:
                await socket.close(code=_CLOSED_NONSENSE, message=b"no such message")
                return "it sent nothing that makes sense"

    async def _tell(self, socket: web.WebSocketResponse) -> None:
        """Tells one connection what is new, until cancelled or it breaks."""
        told = _Told(num_left=self.phone.num_left)
        waking: asyncio.TimerHandle | None = None
        try:
            self._news.set()
            while True:
                await self._news.wait()
                self._news.clear()
                if waking is not None:
                    waking.cancel()
                if untold := self._untold(told):
                    async with asyncio.timeout(_SEND_TIMEOUT_S):
                        await socket.send_str(json.dumps(untold))
                if told.version != self._intake.desk.version:
                    waking = asyncio.get_running_loop().call_later(_STATE_GAP_S, self._news.set)
        except (ConnectionError, TimeoutError):
            await socket.close(code=_CLOSED_SLOW, message=b"too slow")
        finally:
            if waking is not None:
                waking.cancel()

    # -- over plain requests ----------------------------------------------------------------------

    async def answer(self, body: bytes, *, is_picture: bool, known_plan: int) -> dict[str, Any]:
        """Takes one posted message, or none, and says what is new."""
        self._posted.set()
        if self._posting is None:
            self._posting = asyncio.create_task(
                self._watch_posts(), name=f"posts of {self.phone.name}"
            )
            await self._came()
        if is_picture:
            await self.phone.take_binary(body)
        elif body:
            await self.phone.take_text(body[: MAX_TEXT_BYTES + 1].decode("utf-8", "replace"))
        answer = self._untold(_Told(num_left=0, plan_version=known_plan), at_once=True)
        if answer["state"]["advice"] == Advice.ENDED:
            self._was_told_end.set()
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
        await self._left("it sends nothing any more")

    # -- both -------------------------------------------------------------------------------------

    def _untold(self, told: _Told, *, at_once: bool = False) -> dict[str, Any]:
        """What the phone was not told yet and may be told now; noted as told."""
        now_s = asyncio.get_running_loop().time()
        desk = self._intake.desk
        untold: dict[str, Any] = {}
        num_left = self.phone.num_left - told.num_left
        if num_left != told.last_left:
            told.last_left = untold["left"] = num_left
        if desk.version == told.version:
            return untold
        if at_once or now_s - told.state_at_s >= _STATE_GAP_S:
            told.version, told.state_at_s = desk.version, now_s
            untold["state"] = desk.state_record(self.phone.number)
            plan = desk.plan_record(known_version=told.plan_version)
            if plan is not None:
                told.plan_version = desk.plan_version
                untold["plan"] = plan
        return untold

    async def _came(self) -> None:
        self._admission.connected(self.seat, True)
        await self._notice(SourceState.CONNECTED, f"phone {self.phone.number} is there")

    async def _left(self, why: str) -> None:
        self._admission.connected(self.seat, False)
        await self._notice(SourceState.LOST, f"phone {self.phone.number} left: {why}")

    async def _notice(self, state: SourceState, detail: str) -> None:
        await self._intake.put(SourceNotice(source=self._intake.label, state=state, detail=detail))


def _why_closed(code: int | None) -> str:
    if code == _CLOSED_TOO_BIG:
        return "it sent more than live_sources.max_payload_mb"
    if code in (None, _ABNORMAL):
        return "the connection broke"
    return "the page was closed"
