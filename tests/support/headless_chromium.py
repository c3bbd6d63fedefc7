"""A phone for tests: headless Chromium with a camera that plays a clip, led by DevTools."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.waiting import HANG_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--ignore-certificate-errors",
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--mute-audio",
)


class Tab:
    """One tab, over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read(), name="devtools")
        self.complaints: list[str] = []  # errors on the console, and exceptions

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        call_id = next(self._ids)
        answer = self._answers[call_id] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": call_id, "method": method, "params": params})
        async with asyncio.timeout(HANG_S):
            reply = await answer
        assert "error" not in reply, f"{method}: {reply['error']}"
        result: dict[str, Any] = reply["result"]
        return result

    async def open(self, url: str, *, before: str = "") -> None:
        """Loads a page; ``before`` is JavaScript that runs before the page's own."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        reply = await self.call("Page.navigate", url=url)
        assert "errorText" not in reply, reply
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return reply["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits for a JavaScript expression to be true."""
        try:
            async with asyncio.timeout(HANG_S):
                while not await self.evaluate(f"Boolean({expression})"):  # noqa: ASYNC110
                    await asyncio.sleep(0.03)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {expression}\n{text}\n{self.complaints}") from None

    async def click(self, selector: str) -> None:
        """Clicks in the middle of an element, as a finger does."""
        box = await self.evaluate(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    async def hold(self, width: int, height: int) -> None:
        """Makes the tab a phone's screen."""
        angle, kind = (0, "portraitPrimary") if height > width else (90, "landscapePrimary")
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=True,
            screenOrientation={"type": kind, "angle": angle},
        )

    async def screenshot(self) -> bytes:
        reply = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(reply["data"])

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            reply = json.loads(message.data)
            if "id" in reply:
                self._answers.pop(reply["id"]).set_result(reply)
            elif reply["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(reply["params"]["exceptionDetails"]))
            elif reply["method"] == "Log.entryAdded":
                entry = reply["params"]["entry"]
                if entry["level"] == "error":
                    self.complaints.append(entry["text"])


@asynccontextmanager
async def chromium(folder: Path, *, clip: Path | None = None) -> AsyncIterator[Tab]:
    """Starts the browser with an empty tab; its camera sees ``clip`` (.mjpeg), in a loop."""
    assert CHROMIUM is not None
    flags = [*FLAGS, f"--user-data-dir={folder}"]
    if clip is not None:
        flags.append(f"--use-file-for-fake-video-capture={clip}")
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *flags,
        "about:blank",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with aiohttp.ClientSession() as session:
            port = await _devtools_port(folder)
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                targets = await answer.json()
            url = next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page")
            async with session.ws_connect(url, max_msg_size=64 << 20) as socket:
                tab = Tab(socket)
                try:
                    yield tab
                finally:
                    await tab.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        async with asyncio.timeout(HANG_S):
            await process.wait()


async def _devtools_port(folder: Path) -> int:
    file = folder / "DevToolsActivePort"
    async with asyncio.timeout(HANG_S):
        while True:
            with contextlib.suppress(OSError, ValueError, IndexError):
                return int(file.read_text(encoding="ascii").splitlines()[0])
            await asyncio.sleep(0.03)
