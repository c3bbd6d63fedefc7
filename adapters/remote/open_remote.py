"""Opens what of a run is to be done elsewhere, by its configuration."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any

from adapters.install_advice import missing_package
from adapters.matchers.sift import SiftMatcher
from adapters.remote.cluster import Cluster
from adapters.remote.dense import RemoteDense
from adapters.remote.messages import Message
from adapters.remote.sift import RemoteSift
from adapters.remote.states import OracleStates
from adapters.town.oracle import OraclePlaces, open_oracle
from adapters.town.source import SyntheticTown
from engine.config import Config, SiftConfig
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_SECTIONS = {"sift": ("sift",), "oracle": ("oracle", "dense_matching", "runtime", "sources")}


def open_remote_sift(config: Config, sift: SiftConfig) -> RemoteSift:
    """SIFT in the cluster, connected.

    Raises:
        AdapterUnavailableError: Ray is missing.
    """
    opener = _Opener(config.model_copy(update={"sift": sift}), "sift")
    matcher = RemoteSift(config.remote, sift=sift, local=SiftMatcher(sift), cluster=opener.make)
    opener.connect(has_local=True)
    return matcher


def open_remote_oracle(config: Config, town: SyntheticTown) -> tuple[RemoteDense, OraclePlaces]:
    """The oracle in the cluster, connected, and how it finds places.

    Raises:
        AdapterUnavailableError: Ray is missing.
    """
    oracle = open_oracle(config, town)
    opener = _Opener(config, "oracle", {"address": town.info.label})
    matcher = RemoteDense(
        config.remote,
        dense=config.dense_matching,
        source=OracleStates(oracle),
        cluster=opener.make,
    )
    opener.connect(has_local=True)
    return matcher, OraclePlaces(oracle)


class _Opener:
    """Makes the cluster of a matcher, and connects to it.

    Args:
        config: the resolved configuration.
        name: of the matcher.
        more: what its workers get to know besides settings.

    Raises:
        AdapterUnavailableError: Ray is missing.
    """

    def __init__(self, config: Config, name: str, more: Mapping[str, Any] | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise missing_package("remote.address", package="ray", extra="ray")
        self._config = config
        sections = {key: getattr(config, key).model_dump(mode="json") for key in _SECTIONS[name]}
        self._spec = {"matcher": name, "config": sections, **(more or {})}
        self._cluster: Cluster | None = None

    def make(self, provide: Callable[[str], Message | None]) -> Cluster:
        """The cluster, not yet connected."""
        self._cluster = Cluster(self._config.remote, spec=self._spec, provide=provide)
        return self._cluster

    def connect(self, *, has_local: bool) -> None:
        """Connects; where that takes too long the run begins without it, if it can.

        Raises:
            ConfigError: it cannot.
        """
        assert self._cluster is not None, "it is made first"
        if self._cluster.start():
            return
        words = f"remote.address={self._config.remote.address}: {self._cluster.trouble}"
        if not has_local:
            self._cluster.close()
            raise ConfigError(words)
        logger.warning("%s; work is done here until the cluster answers", words)
