"""The real page in a real browser, whose camera plays a clip."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engine.events import (
    Event,
    FramePosed,
    FrameReceived,
    KeyframeAdded,
    MapInitialized,
    RunFinished,
    VerdictChanged,
)
from engine.ports import ShowsMap
from engine.types import Frame, FrameId, MapView, Verdict, VerdictLevel
from tests.support.headless_chromium import CHROMIUM, Tab, chromium
from tests.support.phone_clients import Listening, listening
from tests.support.verdicts import verdict_of
from tests.support.waiting import HANG_S

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

CLIP_SIZE = (640, 480)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of a square that moves over noise; JPEGs one after the other are an .mjpeg."""
    path = tmp_path_factory.mktemp("clip") / "clip.mjpeg"
    noise = np.random.default_rng(0).integers(90, 160, (60, 80, 3), np.uint8)
    background = cv2.resize(noise, CLIP_SIZE, interpolation=cv2.INTER_CUBIC)
    with path.open("wb") as file:
        for step in range(30):
            picture = background.copy()
            cv2.rectangle(picture, (20 + 15 * step, 180), (120 + 15 * step, 280), (30, 60, 230), -1)
            file.write(cv2.imencode(".jpg", picture)[1].tobytes())
    return path


def run(story: Coroutine[Any, Any, None]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(HANG_S):
            await story

    asyncio.run(in_time())


async def start(tab: Tab, heard: Listening, *, before: str = "") -> None:
    await tab.hold(412, 915)
    await tab.open(heard.source.url, before=before)
    await tab.click("#start")


def title_is(title: str) -> str:
    return f"document.querySelector('#title').textContent === '{title}'"


def posed(frame: Frame) -> list[Event]:
    """What the engine tells of a frame that goes well."""
    frame_id, captured_at_s = frame.frame_id, frame.captured_at_s
    return [
        FrameReceived(at_s=1.0, frame_id=frame_id, index=frame.index, captured_at_s=captured_at_s),
        KeyframeAdded(
            camera_key="camera",
            at_s=1.0,
            frame_id=frame_id,
            index=0,
            is_photo=False,
            name=frame.name,
            captured_at_s=captured_at_s,
            num_keypoints=100,
        ),
        MapInitialized(at_s=1.0, first=FrameId(1), second=FrameId(2), num_points3D=1234, attempt=1),
        FramePosed(
            camera_key="camera",
            at_s=1.1,
            frame_id=frame_id,
            captured_at_s=captured_at_s,
            cam_center_in_world=(1.0, 0.0, 0.0),
            world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
            is_keyframe=True,
            is_first=True,
            latency_s=0.1,
        ),
    ]


def small_map() -> MapView:
    poses = np.tile(np.eye(3, 4), (4, 1, 1))
    poses[:, 0, 3] = -np.arange(4.0)
    points = np.random.default_rng(0).uniform(-3, 3, (500, 3)).astype(np.float32)
    return MapView(
        version=1,
        keyframe_ids=np.arange(1, 5),
        cam_from_world=poses,
        focal_px=np.full(4, 500.0),
        image_sizes=np.tile(CLIP_SIZE, (4, 1)),
        points3D_in_world=points,
        colors=np.full((500, 3), 200, np.uint8),
        chunk_ids=np.ones(500, np.int64),
        edges=np.zeros((0, 2), np.int64),
        edge_reasons=(),
    )


async def story_of_a_phone(folder: Path, clip: Path) -> None:
    async with chromium(folder, clip=clip) as tab, listening("phone.max_rate_hz=15") as heard:
        await tab.call("Browser.grantPermissions", permissions=["geolocation", "sensors"])
        await tab.call(
            "Emulation.setGeolocationOverride",
            latitude=47.37,
            longitude=8.54,
            accuracy=4,
            altitude=408,
        )
        await tab.call("DeviceOrientation.setDeviceOrientationOverride", alpha=0, beta=80, gamma=0)
        await start(tab, heard)
        assert "token" not in await tab.evaluate("location.href"), "the secret is out of sight"
        await heard.until(lambda: len(heard.frames) >= 8 and bool(heard.readings))

        frame = heard.frames[-1]
        assert frame.camera_key == "phone1|640x480"
        assert frame.jpeg is not None
        assert frame.jpeg.startswith(b"\xff\xd8")
        gaps_s = np.diff([one.captured_at_s for one in heard.frames])
        assert (gaps_s > 0.0).all()
        assert 0.03 < float(np.median(gaps_s)) < 0.3
        red = (frame.pixels[:, :, 0] > 180) & (frame.pixels[:, :, 2] < 90)
        assert 4000 < red.sum() < 20000, "the square of the clip is in the picture"
        assert heard.readings[0].fix.altitude_m == 408.0
        up = heard.source._feedback.feedback._up_of[heard.frames[-1].frame_id]
        assert up == pytest.approx((0.0, -np.sin(np.deg2rad(80)), -np.cos(np.deg2rad(80))))

        view = heard.source.feedback_view()
        for event in posed(heard.frames[-1]):
            view.show_event(event)
        assert isinstance(view, ShowsMap)
        view.show_map(small_map())
        await tab.until(title_is("Mapping"))
        assert await tab.evaluate("document.querySelector('#points').textContent") == "1,234"
        await tab.until(PLAN_IS_DRAWN)
        assert await tab.evaluate("document.querySelector('#doubt').hidden")
        verdict = verdict_of(VerdictLevel.DOUBTFUL)
        (reason,) = verdict.reasons
        filmed = replace(reason, frame_ids=(heard.frames[-1].frame_id, frame.frame_id))
        view.show_event(VerdictChanged(verdict=replace(verdict, reasons=(filmed,))))
        await tab.until("!document.querySelector('#doubt').hidden")
        doubt = await tab.evaluate("document.querySelector('#doubt').innerText")
        assert doubt.startswith("Part of the map may be wrong filmed 0 s ago")
        assert "10 to 15 turn on the spot: film this part again while walking" in doubt
        view.show_event(VerdictChanged(verdict=Verdict()))
        await tab.until("document.querySelector('#doubt').hidden")

        num_connected = heard.notices.count("connected: phone 1 is there")
        (connection,) = heard.server._connections.values()
        assert connection._socket is not None
        await connection._socket.close(code=1012)  # as a network that breaks
        await heard.until(
            lambda: heard.notices.count("connected: phone 1 is there") == num_connected + 1
        )
        num_frames = len(heard.frames)
        await heard.until(lambda: len(heard.frames) > num_frames + 2)

        await tab.click("#pause")
        await tab.until(title_is("Paused"))
        await tab.click("#pause")
        await tab.until(title_is("Mapping"))

        view.show_event(
            RunFinished(at_s=9.0, stopped_by="signal", num_keyframes=9, num_registered=8)
        )
        await heard.server.stop()
        await tab.until("!document.querySelector('#cover').hidden")
        assert "The run has ended" in await tab.evaluate("document.body.innerText")
        assert await tab.evaluate("document.querySelector('#camera').srcObject.active") is False
        assert tab.complaints == []
        assert {one.reason for one in heard.rejected} <= {"overload"}


PLAN_IS_DRAWN = """(() => {
  const plan = document.querySelector('#plan');
  const pixels = plan.getContext('2d').getImageData(0, 0, plan.width, plan.height).data;
  return pixels.filter((value, at) => at % 4 === 3 && value > 0).length > 1000;
})()"""


@pytest.mark.slow
def test_a_phone_sends_frames_and_shows_the_run_to_its_end(tmp_path: Path, clip: Path) -> None:
    run(story_of_a_phone(tmp_path, clip))


NO_WEBSOCKETS = """
window.WebSocket = class {
  constructor() { setTimeout(() => this.onclose?.({ code: 1006 }), 5); }
  close() {}
};
"""


async def story_without_websockets(folder: Path, clip: Path) -> None:
    async with chromium(folder, clip=clip) as tab, listening() as heard:
        await start(tab, heard, before=NO_WEBSOCKETS)
        await heard.until(lambda: len(heard.frames) >= 8)
        assert all(connection._socket is None for connection in heard.server._connections.values())
        view = heard.source.feedback_view()
        for event in posed(heard.frames[-1]):
            view.show_event(event)
        assert isinstance(view, ShowsMap)
        view.show_map(small_map())
        await tab.until(title_is("Mapping"))
        await tab.until(PLAN_IS_DRAWN)
        await heard.server.stop()
        await tab.until("!document.querySelector('#cover').hidden")
        assert "The run has ended" in await tab.evaluate("document.body.innerText")
        refused = [one for one in tab.complaints if "ERR_CONNECTION_REFUSED" in one]
        assert tab.complaints == refused, "frames on their way when the server stopped"


@pytest.mark.slow
def test_a_browser_that_refuses_websockets_sends_frames_too(tmp_path: Path, clip: Path) -> None:
    run(story_without_websockets(tmp_path, clip))


NO_CAMERA = """
navigator.mediaDevices.getUserMedia = async () => {
  throw new DOMException("no", "NotAllowedError");
};
"""


async def story_without_a_camera(folder: Path) -> None:
    async with chromium(folder) as tab, listening() as heard:
        await start(tab, heard, before=NO_CAMERA)
        await tab.until("document.querySelector('#cover-title').textContent === 'No camera'")
        assert "Allow it" in await tab.evaluate("document.body.innerText")
        await tab.call("Page.navigate", url=f"{heard.base}/?token=wrong")
        await tab.until("document.readyState === 'complete'")
        assert await tab.evaluate("document.title") == "LiveSfM"
        await tab.call("Network.clearBrowserCookies")
        await tab.call("Page.navigate", url=f"{heard.base}/?token=wrong&again")
        await tab.until("document.body?.innerText.includes('needs an invitation')")
        assert heard.frames == []


@pytest.mark.slow
def test_a_camera_that_is_not_allowed_and_a_wrong_token_are_told_in_words(tmp_path: Path) -> None:
    run(story_without_a_camera(tmp_path))
