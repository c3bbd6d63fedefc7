#!/usr/bin/env python3
"""Measures the journal alone: thread CPU time for each keyframe, and for reading all of them back.

    .venv/bin/python tools/bench_journal.py [NUM_KEYFRAMES]

A keyframe has 1,000 keypoints with descriptors, an image of 150 kB, eight verified pairs of 200
inliers, six pairs that did not hold, ten frames before it, and six small states.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zlib  # noqa: F401 - before pycolmap, which brings its own
from pathlib import Path

import numpy as np
import pycolmap

from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.stored_state import StoredCalibration, StoredFrame, StoredRelativePose
from engine.output.journal import Journal, Moment, NewKeyframe
from engine.output.run_format import format_line
from engine.output.stored_run import read_stored_run
from engine.types import (
    DescriptorKind,
    Features,
    FrameId,
    ImagePair,
    Keyframe,
    PairReason,
    VerifiedPair,
)

NUM_KEYPOINTS = 1000
NUM_PAIRS = 8
NUM_TRIED = 6
NUM_TRACKED = 10
IMAGE_BYTES = 150_000

RNG = np.random.default_rng(0)


def keyframe_of(number: int) -> Keyframe:
    """A keyframe with random keypoints."""
    features = Features(
        frame_id=FrameId(number),
        keypoints_xy=RNG.uniform(0, 480, (NUM_KEYPOINTS, 2)),
        descriptors=RNG.integers(0, 128, (NUM_KEYPOINTS, 128), dtype=np.uint8),
        scales=RNG.uniform(2, 30, NUM_KEYPOINTS).astype(np.float32),
        colors=RNG.integers(0, 256, (NUM_KEYPOINTS, 3), dtype=np.uint8),
        descriptor_kind=DescriptorKind.ROOT_SIFT,
    )
    return Keyframe(
        frame_id=FrameId(number),
        camera_key="camera",
        index=number,
        name=f"{number:06d}.jpg",
        width=640,
        height=480,
        captured_at_s=float(number),
        received_at_s=0.0,
        features=features,
    )


def pair_of(first: int, second: int) -> VerifiedPair:
    """A pair with random matches."""
    return VerifiedPair(
        pair=ImagePair(FrameId(first), FrameId(second)),
        reason=PairReason.TEMPORAL,
        inlier_matches_idx=RNG.integers(0, NUM_KEYPOINTS, (200, 2), dtype=np.uint32),
        num_matches=300,
        fundamental=RNG.normal(size=(3, 3)),
        homography_inlier_ratio=0.1,
    )


def moment_of(number: int, *, image_bytes: bytes) -> Moment:
    """A keyframe with all that comes with one."""
    camera = pycolmap.Camera.create_from_model_name(1, "SIMPLE_RADIAL", 500.0, 640, 480)
    first = 1_000_000 + NUM_TRACKED * number
    return Moment(
        keyframe=NewKeyframe(
            keyframe=keyframe_of(number), camera=camera, source="video", image_bytes=image_bytes
        ),
        pairs=tuple(pair_of(i, number) for i in range(max(1, number - NUM_PAIRS), number)),
        tried=tuple(
            ImagePair(FrameId(i), FrameId(number))
            for i in range(max(1, number - NUM_PAIRS - NUM_TRIED), number - NUM_PAIRS)
        ),
        calibrations={
            "camera": StoredCalibration(
                camera=camera, initial=camera, prior=CameraPrior.assumed(camera)
            )
        },
        frames=tuple(
            StoredFrame(
                frame_id=FrameId(first + i),
                camera_key="camera",
                source="video",
                index=first + i,
                name=f"{first + i}.jpg",
                captured_at_s=0.1 * i,
                status="tracked",
            )
            for i in range(NUM_TRACKED)
        ),
        relative_poses=tuple(
            StoredRelativePose(
                frame_id=FrameId(first + i),
                keyframe_id=FrameId(number),
                index=first + i,
                captured_at_s=0.1 * i,
                cam_from_keyframe=np.eye(4)[:3],
            )
            for i in range(NUM_TRACKED)
        ),
        facts={
            **{f"state/{i}": {"values": [0.5] * 20} for i in range(5)},
            f"scale/{number}": np.zeros(64),
        },
    )


def main() -> None:
    """Prints the figures."""
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    image_bytes = RNG.integers(0, 256, IMAGE_BYTES, dtype=np.uint8).tobytes()
    moments = [moment_of(number, image_bytes=image_bytes) for number in range(1, num + 1)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "config.yaml").write_text(format_line())
        journal = Journal.open(run)
        spent_ms = []
        for moment in moments:
            begun_s = time.thread_time()
            journal.write(moment)
            spent_ms.append(1e3 * (time.thread_time() - begun_s))
        journal.close()
        size_mb = (run / "database.db").stat().st_size / 1e6
        begun_s = time.thread_time()
        stored = read_stored_run(run)
        read_ms = 1e3 * (time.thread_time() - begun_s)
    print(f"{np.median(spent_ms):.2f} ms a keyframe (mean {np.mean(spent_ms):.2f}), CPU")
    print(f"{read_ms:.0f} ms to read {len(stored.keyframes)} keyframes, {size_mb:.1f} MB")


if __name__ == "__main__":
    main()
