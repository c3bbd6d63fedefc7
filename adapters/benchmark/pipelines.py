"""The pipelines that get a dataset: LiveSfM by its configurations, and COLMAP's own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from adapters.benchmark import colmap_pipeline
from adapters.benchmark.colmap_pipeline import Mapper, Pairs, Request
from adapters.benchmark.datasets import Dataset, PeerImages
from engine.config import Config, load_config
from engine.errors import ConfigError

DEFAULT_CONFIG = "default"
OWN_FEATURES = "ours"  # in the name of a peer: as many as LiveSfM takes

_PEER = re.compile(
    rf"colmap-({'|'.join(Pairs)})-({'|'.join(Mapper)})(?:-({OWN_FEATURES}|[1-9][0-9]*))?"
)

Option = TypeVar("Option")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSfm:
    """LiveSfM with a configuration."""

    name: str
    config: str  # preset or file; `DEFAULT_CONFIG`: none
    settings: tuple[str, ...]
    program: tuple[str, ...]  # the command line of this version, or of another one

    @property
    def watched(self) -> str:
        """The file in the work folder that shows how far it is."""
        return "run/events.jsonl"

    def command(self, dataset: Dataset, work: Path) -> list[str]:
        """The command line that makes ``work/run``."""
        config = [] if self.config == DEFAULT_CONFIG else ["--config", self.config]
        settings = [part for setting in self.settings for part in ("--set", setting)]
        return [
            *(*self.program, "run", str(dataset.source), *config, *settings),
            *("--out", str(work / "run"), "--view", "none", "--quiet"),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Colmap:
    """A pipeline of pycolmap with COLMAP's defaults but for the number of features."""

    name: str
    pairs: Pairs
    mapper: Mapper
    num_features: int | None  # None: COLMAP's default

    @property
    def watched(self) -> str:
        """No file: how much is done shows at its end."""
        return ""

    def command(self, images: PeerImages, work: Path, *, num_threads: int) -> list[str]:
        """The command line that makes ``work/sparse``; writes its request."""
        request = Request(
            root=str(images.root),
            names=images.names,
            work=str(work),
            pairs=self.pairs,
            mapper=self.mapper,
            num_features=self.num_features,
            camera_mode=images.camera_mode,
            num_threads=num_threads,
        )
        path = work / "request.json"
        path.write_text(json.dumps(asdict(request)), encoding="utf-8")
        return [sys.executable, "-P", str(colmap_pipeline.__file__), str(path)]


Pipeline = LiveSfm | Colmap


def own_program() -> tuple[str, ...]:
    """The command line of the LiveSfM that this is."""
    return (sys.executable, "-P", "-m", "adapters.cli")


def pipelines_for(
    dataset: Dataset,
    *,
    configs: Sequence[str],
    settings: Sequence[str],
    peers: Sequence[str],
    baseline: Path | None,
    only: Sequence[str],
) -> list[Pipeline]:
    """The pipelines that a dataset goes through: LiveSfM's and peers by turns.

    Args:
        dataset: what they get.
        configs: ``[DATASET=]CONFIG`` each.
        settings: of LiveSfM, in all of them.
        peers: ``[DATASET=]PEER`` each; none: what fits the dataset, see `default_peers`.
        baseline: the ``livesfm`` program of another version, which gets every configuration too.
        only: patterns of names; none: all.

    Raises:
        ConfigError: a configuration cannot be read, or a peer does not exist.
    """
    chosen = options_for(dataset.name, configs) or [DEFAULT_CONFIG]
    named = options_for(dataset.name, peers) or default_peers(dataset)
    ours: list[Pipeline] = []
    num_features: list[int] = []
    for config in chosen:
        loaded = load_config([] if config == DEFAULT_CONFIG else [config], settings)
        num_features.append(_num_features(loaded, is_video=dataset.is_video))
        name = Path(config).stem
        ours.append(_live(f"livesfm-{name}", config, settings, program=own_program()))
        if baseline is not None:
            program = (str(baseline),)
            ours.append(_live(f"baseline-{name}", config, settings, program=program))
    theirs = [each for peer in named if peer != "none" for each in _peers(peer, num_features)]
    by_name = {pipeline.name: pipeline for pipeline in by_turns(ours, theirs)}
    return [
        pipeline
        for name, pipeline in by_name.items()
        if not only or any(fnmatchcase(name, pattern) for pattern in only)
    ]


def options_for(name: str, options: Sequence[str]) -> list[str]:
    """The values of ``[DATASET=]VALUE`` for a dataset; those that name it win over the others."""
    parts = [option.partition("=") for option in options]
    named = [value for pattern, equals, value in parts if equals and fnmatchcase(name, pattern)]
    return named or [pattern for pattern, equals, _ in parts if not equals]


def default_peers(dataset: Dataset) -> list[str]:
    """Sequential pairs for videos, all pairs for photos; COLMAP's features and LiveSfM's."""
    pairs = Pairs.SEQUENTIAL if dataset.is_video else Pairs.EXHAUSTIVE
    names = [f"colmap-{pairs}-{mapper}" for mapper in Mapper]
    return [each for name in names for each in (name, f"{name}-{OWN_FEATURES}")]


def by_turns(ours: Sequence[Pipeline], theirs: Sequence[Pipeline]) -> list[Pipeline]:
    """Ours, a peer, ours, a peer, ...; then what is left of the longer list."""
    num = min(len(ours), len(theirs))
    mixed = [each for pair in zip(ours, theirs, strict=False) for each in pair]
    return [*mixed, *ours[num:], *theirs[num:]]


def _live(name: str, config: str, settings: Sequence[str], *, program: tuple[str, ...]) -> LiveSfm:
    return LiveSfm(name=name, config=config, settings=tuple(settings), program=program)


def _num_features(config: Config, *, is_video: bool) -> int:
    return config.sift.max_features_in_video if is_video else config.sift.max_features


def _peers(name: str, num_features: Sequence[int]) -> list[Colmap]:
    """The pipelines of a peer's name: several where LiveSfM takes several numbers of features.

    COLMAP's own number is left to it.
    """
    match = _PEER.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"{name}: is no peer; use none or colmap-PAIRS-MAPPER[-FEATURES], PAIRS one of"
            f" {', '.join(Pairs)}, MAPPER one of {', '.join(Mapper)}, FEATURES a number or"
            f" {OWN_FEATURES}"
        )
    pairs, mapper, features = match.groups()
    default = _colmap_features()
    asked: Sequence[int | None] = (
        [None]
        if features is None
        else num_features
        if features == OWN_FEATURES
        else [int(features)]
    )
    base = f"colmap-{pairs}-{mapper}"
    return [
        Colmap(
            name=base if num in (None, default) else f"{base}-{num}",
            pairs=Pairs(pairs),
            mapper=Mapper(mapper),
            num_features=None if num == default else num,
        )
        for num in dict.fromkeys(asked)
    ]


def _colmap_features() -> int:
    import pycolmap

    return int(pycolmap.FeatureExtractionOptions().sift.max_num_features)
