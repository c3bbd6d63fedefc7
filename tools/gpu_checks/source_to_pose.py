"""How many frames a second a run poses with MASt3R on a device, from the source to the pose.

Random weights match nothing, and a run without matches has no map to pose frames in. So each
keyframe and pair costs what MASt3R takes for it, by random weights, and gets the matches that an
oracle knows of the synthetic town. The town is drawn before the run begins.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mast3r_bench.inputs import TINY, random_network

from adapters.matchers.mast3r.architecture import VIT_LARGE
from adapters.matchers.mast3r.graphs import graphed_on
from adapters.matchers.mast3r.matcher import Device, Mast3rMatcher

if TYPE_CHECKING:
    from engine.config import Config
    from engine.ports import PairMatcher, PlaceIndex
    from engine.types import Features, Frame, MatchRequest, PairMatches

_CORE = ("pydantic", "yaml", "cv2", "pycolmap", "networkx", "onnxruntime", "threadpoolctl", "rich")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseFigures:
    """What a run over the town gave."""

    num_frames: int
    num_keyframes: int
    num_registered: int
    pairs_per_keyframe: int
    frames_per_s: float  # from the first frame that came to the last that was posed
    keyframes_per_s: float
    peak_gpu_mb: float


class CostlyOracle:
    """The oracle's answers, at what MASt3R takes for the same questions.

    Args:
        oracle: answers.
        costly: is asked as well.
    """

    def __init__(self, oracle: PairMatcher, costly: Mast3rMatcher) -> None:
        self._oracle = oracle
        self._costly = costly

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return "oracle, at MASt3R's cost"

    @property
    def peak_gpu_mb(self) -> float:
        """The most memory PyTorch ever held on the GPU."""
        return self._costly.peak_gpu_mb

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: the oracle's do not."""
        return self._oracle.matches_everything

    def describe(self, frame: Frame) -> Features:
        """As the oracle does; the network encodes."""
        self._costly.describe(frame)
        return self._oracle.describe(frame)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """As the oracle does; the network decodes, and the same points are looked up."""
        self._costly.match(requests)
        return self._oracle.match(requests)


class _NoPlaces:
    def put_tokens(self, frame_id: Any, tokens: Any) -> None:
        """Places are the oracle's."""


def missing_packages() -> list[str]:
    """What a run needs and is not installed here."""
    missing = []
    for name in _CORE:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


def measure_poses(
    device: Device, *, size: tuple[int, int], num_frames: int, num_pairs: int, is_small: bool
) -> PoseFigures:
    """Runs over the town, drawn at ``size``, width and height in px; the view is off.

    Args:
        device: where the network runs.
        size: of the images and of what the network sees.
        num_frames: of the flight; fewer fly it faster, so more of them become keyframes.
        num_pairs: that a keyframe is matched with.
        is_small: a small network in place of ViT-L.
    """
    from adapters import launch
    from adapters.views.view_mode import ViewMode
    from engine.config import load_config

    config = load_config(
        ["oracle"],
        [
            f"scene_graph.pairs_per_keyframe={num_pairs}",
            "scene_graph.exhaustive_below=0",
            f"mast3r.image_edge_px={max(size)}",
            f"mast3r.batch_pairs={num_pairs}",
        ],
    )
    open_usual = launch._matching
    launch._matching = functools.partial(_open_matching, device=device, is_small=is_small)
    try:
        with tempfile.TemporaryDirectory(prefix="livesfm-gpu-check-") as folder:
            options = launch.LaunchOptions(
                sources=(f"synthetic:town?frames={num_frames}&width={size[0]}&height={size[1]}",),
                path=Path(folder) / "run",
                overwrite=False,
                view_mode=ViewMode.NONE,
                show_progress=False,
            )
            outcome = launch.launch(config, options)
            took_s = _span_s(outcome.path / "events.jsonl")
    finally:
        launch._matching = open_usual
    return PoseFigures(
        num_frames=num_frames,
        num_keyframes=outcome.num_keyframes,
        num_registered=outcome.num_registered,
        pairs_per_keyframe=num_pairs,
        frames_per_s=num_frames / took_s,
        keyframes_per_s=outcome.num_keyframes / took_s,
        peak_gpu_mb=outcome.summary["peak_gpu_mb"],
    )


def _open_matching(
    config: Config, sources: Sequence[Any], *, device: Device, is_small: bool
) -> tuple[PairMatcher, PlaceIndex | None]:
    """The oracle at MASt3R's cost, in place of the configured matcher; draws the town."""
    from adapters import launch

    town = sources[0]
    town.render = functools.cache(town.render)
    for index in range(town.options.num_frames):
        town.render(index)
    oracle, places = launch._oracle(config, sources)
    shape = TINY if is_small else VIT_LARGE
    costly = Mast3rMatcher(
        config.mast3r,
        dense=config.dense_matching,
        network=graphed_on(
            device.name, random_network(shape, device=device.name, dtype=device.dtype)
        ),
        device=device,
        places=_NoPlaces(),
        is_metric=True,
    )
    return CostlyOracle(oracle, costly), places


def _span_s(events: Path) -> float:
    """Seconds from the first frame that came to the last that got its first pose.

    The first keyframes also wait for CUDA's kernels to be loaded.
    """
    came_at_s, posed_at_s = [], [0.0]
    with events.open() as lines:
        for record in map(json.loads, lines):
            if record["event"] == "FrameReceived":
                came_at_s.append(record["at_s"])
            elif record["event"] == "FramePosed" and record["is_first"]:
                posed_at_s.append(record["at_s"])
    return max(posed_at_s[-1] - came_at_s[0], 1e-9)
