#!/usr/bin/env python3
"""Measures how keyframes a minute grow with the workers of a cluster, beside the map.

    .venv/bin/python tools/bench_remote.py --address HOST:PORT --matchers 4 --set oracle.pair_s=1

Keyframes wait, are matched at the gaps in time of `scene_graph.temporal_offsets` in their order, as
the engine asks for it, and go nowhere: what is measured is sending, waiting and the order of work.
The oracle sleeps for each pair. Prints JSON: keyframes and pairs a minute after the first few
keyframes, the digest of all matches (which must not depend on the workers), and the matcher's own
figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters.remote.dense import RemoteDense
from adapters.remote.open_remote import open_remote_oracle
from adapters.town.oracle import OracleMatcher, TrueView
from engine.config import Config, load_config
from engine.matching.pairs_ahead import PairsAhead
from engine.types import Features, Frame, FrameId, ImagePair, Keyframe, MatchRequest

WIDTH, HEIGHT = 320, 240
WARM_UP = 4  # keyframes that are not measured: they have few pairs


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", required=True)
    parser.add_argument("--matchers", type=int, required=True)
    parser.add_argument("--keyframes", type=int, default=24)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    settings = [f"remote.address={arguments.address}", f"remote.matchers={arguments.matchers}"]
    config = load_config(["oracle"], [*settings, *arguments.set])
    oracle = OracleMatcher(config.oracle, dense=config.dense_matching, truth=truth, seed=0)
    matcher = open_remote_oracle(config, oracle)
    try:
        print(json.dumps(measure(matcher, config, num=arguments.keyframes)))
    finally:
        matcher.close()


def truth(index: int) -> TrueView:
    """A camera that moves along a wall."""
    pose = np.eye(3, 4)
    pose[0, 3] = -0.2 * index
    return TrueView(
        depth_m=np.full((HEIGHT, WIDTH), 10.0, np.float32),
        cam_from_world=pose,
        intrinsics=(300.0, 300.0, WIDTH / 2, HEIGHT / 2),
    )


def measure(matcher: RemoteDense, config: Config, *, num: int) -> dict[str, object]:
    """Has keyframes matched, and measures how long each took."""
    graph, queries = config.scene_graph, np.arange(256)
    graph = graph.model_copy(update={"exhaustive_below": 0})
    ahead = PairsAhead(graph, coarse_to_fine=config.coarse_to_fine, matcher=matcher)
    tables: list[Features] = []
    for index in range(num):
        frame = frame_of(index)
        tables.append(matcher.describe(frame))
        ahead.keyframe_waits(keyframe_of(frame, tables[-1]))
    digest, ends_s, num_pairs = hashlib.sha256(), [], 0
    for newest, table in enumerate(tables):
        others = [tables[newest - gap] for gap in graph.temporal_offsets if gap <= newest]
        requests = [
            MatchRequest(
                pair=ImagePair.of(other.frame_id, table.frame_id),
                first=other,
                second=table,
                query_rows1=queries,
                query_rows2=queries,
            )
            for other in others
        ]
        for found in matcher.match(requests):
            digest.update(found.matches_idx.tobytes() + found.points2_xy.tobytes())
        ahead.keyframe_matched(table.frame_id, [request.pair for request in requests])
        ends_s.append(time.monotonic())
        num_pairs += len(requests) if newest > WARM_UP else 0
    minutes = (ends_s[-1] - ends_s[WARM_UP]) / 60.0
    return {
        "keyframes_per_minute": round((num - 1 - WARM_UP) / minutes, 2),
        "pairs_per_minute": round(num_pairs / minutes, 1),
        "digest": digest.hexdigest()[:16],
        **matcher.figures(),
    }


def frame_of(index: int) -> Frame:
    """A frame of noise, in which corners are found."""
    noise = np.random.default_rng(index).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    return Frame(
        frame_id=FrameId(index + 1),
        camera_key="camera",
        source="bench",
        index=index,
        name=f"{index:06d}.png",
        captured_at_s=float(index),
        received_at_s=0.0,
        pixels=noise,
    )


def keyframe_of(frame: Frame, features: Features) -> Keyframe:
    """The keyframe of a frame."""
    return Keyframe(
        frame_id=frame.frame_id,
        camera_key=frame.camera_key,
        index=frame.index,
        name=frame.name,
        width=WIDTH,
        height=HEIGHT,
        captured_at_s=frame.captured_at_s,
        received_at_s=0.0,
        features=features,
    )


if __name__ == "__main__":
    main()
