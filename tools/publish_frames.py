#!/usr/bin/env python3
"""Plays a folder of photos, a video or synthetic:town as a camera on an MQTT broker.

    .venv/bin/python tools/publish_frames.py walk.mp4 mqtt://localhost/site/+/frame --rate 10
    .venv/bin/python tools/publish_frames.py synthetic:town mqtts://pilot@broker/a --ca-file ca.pem

A message is a JPEG file as it is; its MQTT 5 user properties hold the capture time, and position
and focal length where the source knows them. Frames are read first, then published at a steady
rate; those that are due while the broker is away are lost, as a camera's would be. With --loop-s
they are played forward and backward, so that the picture never jumps. The password of the user in
the address stands in the address, or in LIVESFM_MQTT_PASSWORD.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters.mqtt.connection import MqttAddress, MqttLink, keep_connected
from adapters.open_source import open_source
from engine.config import Config, load_config
from engine.errors import EngineError, SourceError
from engine.ports import LiveSource
from engine.types import Arrival, Frame, FrameId, SourceState

if TYPE_CHECKING:
    import aiomqtt
    from paho.mqtt.properties import Properties

EXPIRY_S = 2  # a frame that waited longer on the broker is of no use


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """A frame, ready to be sent."""

    jpeg: bytes
    properties: tuple[tuple[str, str], ...]  # user properties


class Player:
    """Publishes shots at their times; one that no connection takes is lost."""

    def __init__(self, shots: Sequence[Shot], *, topic: str, rate_hz: float, loop_s: float) -> None:
        self._due = enumerate(_endless(shots) if loop_s else shots)
        self._topic = topic
        self._rate_hz = rate_hz
        self._loop_s = loop_s
        self._started_s: float | None = None
        self.num_sent = 0
        self.num_missed = 0

    async def play(self, client: aiomqtt.Client) -> None:
        """Goes on where the time is; returns at the end."""
        if self._started_s is None:
            self._started_s = time.monotonic()
        for number, shot in self._due:
            due_s = self._started_s + number / self._rate_hz
            if self._loop_s and due_s > self._started_s + self._loop_s:
                return
            late_s = time.monotonic() - due_s
            if late_s > 1.0:  # the connection was away
                self.num_missed += 1
                continue
            await asyncio.sleep(max(0.0, -late_s))
            self.num_missed += 1  # until it is through
            await client.publish(self._topic, shot.jpeg, properties=_properties(shot))
            self.num_missed -= 1
            self.num_sent += 1


def _endless(shots: Sequence[Shot]) -> Iterator[Shot]:
    """There and back again; the frames at the ends come once."""
    return itertools.cycle([*shots, *shots[-2:0:-1]])


def _properties(shot: Shot) -> Properties:
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = [("t_capture", f"{time.time():.6f}"), *shot.properties]
    properties.ContentType = "image/jpeg"
    properties.MessageExpiryInterval = EXPIRY_S
    return properties


async def read_shots(spec: str, *, config: Config) -> list[Shot]:
    """All frames of a source that can wait, or as many as configured."""
    ids = itertools.count(1)
    source = open_source(spec, config=config, next_frame_id=lambda: FrameId(next(ids)))
    if isinstance(source, LiveSource):
        raise SourceError(f"{source.info.label}: only files can be played")
    shots: list[Shot] = []
    quality = config.runtime.keyframe_jpeg_quality
    async with aclosing(source.frames()) as items:
        async for item in items:
            if isinstance(item, Arrival):
                shot = await asyncio.to_thread(_shot, item, quality=quality)
                shots += [] if shot is None else [shot]
            if len(shots) == config.sources.max_frames > 0:
                break
    return shots


def _shot(arrival: Arrival, *, quality: int) -> Shot | None:
    """The frame as it is played; None when it is unreadable."""
    import cv2

    frame = arrival.decode()
    if not isinstance(frame, Frame):
        return None
    jpeg = frame.jpeg
    if jpeg is None:
        bgr = cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2BGR)
        _, buffer = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
        jpeg = buffer.tobytes()
    properties: dict[str, float] = {}
    if frame.intrinsics_prior is not None:
        properties["focal_px"] = frame.intrinsics_prior.focal_px
    if frame.gps is not None:
        properties["lat"], properties["lon"] = frame.gps.latitude_deg, frame.gps.longitude_deg
        properties["alt"] = frame.gps.altitude_m
    return Shot(
        jpeg=jpeg, properties=tuple((name, repr(value)) for name, value in properties.items())
    )


def _report(state: SourceState, detail: str) -> None:
    print(f"{state}: {detail}", file=sys.stderr)


async def publish(arguments: argparse.Namespace) -> int:
    """The exit code."""
    config = load_config(
        settings=[
            f"sources.max_frames={arguments.max_frames}",
            f"runtime.keyframe_jpeg_quality={arguments.quality}",
            f"mqtt.ca_file={arguments.ca_file}",
        ]
    )
    address = MqttAddress.parse(arguments.address)
    topic = address.topic.replace("+", arguments.camera)
    link = MqttLink(address, config=config)
    shots = await read_shots(arguments.source, config=config)
    if not shots:
        print(f"{arguments.source}: no frames", file=sys.stderr)
        return 1
    print(f"{len(shots)} frames to {address.broker}/{topic} at {arguments.rate:g} Hz")
    player = Player(shots, topic=topic, rate_hz=arguments.rate, loop_s=arguments.loop_s)
    await keep_connected(link, player.play, report=_report, client=link.client)
    print(f"{player.num_sent} sent, {player.num_missed} missed")
    return 0 if player.num_sent else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder, an image, a video or synthetic:town")
    parser.add_argument("address", help="mqtt(s)://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC")
    parser.add_argument("--rate", type=float, default=10.0, help="frames a second")
    parser.add_argument("--camera", default="camera", help="stands in for + in the topic")
    parser.add_argument("--loop-s", type=float, default=0.0, help="play for so long; 0: once")
    parser.add_argument("--max-frames", type=int, default=3_000, help="read at most so many")
    parser.add_argument("--quality", type=int, default=85, help="of JPEGs that are made here")
    parser.add_argument("--ca-file", default="''", help="certificates that sign the broker's")
    return parser.parse_args()


def main() -> int:
    """Plays what the command line names."""
    try:
        return asyncio.run(publish(parse_arguments()))
    except (EngineError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
