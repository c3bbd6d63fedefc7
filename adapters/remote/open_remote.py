"""Opens what of a run is to be done elsewhere, by its configuration."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.install_advice import missing_package
from adapters.matchers.sift import SiftMatcher
from adapters.remote.adjustments import RemoteAdjuster
from adapters.remote.cluster import Cluster
from adapters.remote.dense import RemoteDense
from adapters.remote.messages import Message
from adapters.remote.places import RemotePlaces
from adapters.remote.sift import RemoteSift
from adapters.remote.states import Mast3rStates, OracleStates
from adapters.remote.tasks import RemoteTasks
from adapters.remote.windows import RemoteWindowSolver
from adapters.town.oracle import OracleMatcher
from engine.config import Config, SiftConfig
from engine.errors import ConfigError
from engine.ports import PairMatcher, WindowSolver

if TYPE_CHECKING:
    from adapters.matchers.mast3r.matcher import Mast3rMatcher

_SECTIONS = {
    "sift": ("sift",),
    "mast3r": ("mast3r", "dense_matching"),
    "oracle": ("oracle", "dense_matching", "runtime"),
}


def open_remote_sift(config: Config, sift: SiftConfig) -> RemoteSift:
    """SIFT in the cluster, connected.

    Raises:
        AdapterUnavailableError: Ray is missing.
    """
    opener = _Opener(config.model_copy(update={"sift": sift}), "sift")
    matcher = RemoteSift(config.remote, sift=sift, local=SiftMatcher(sift), cluster=opener.make)
    _connect(matcher, config, has_local=True)
    return matcher


def open_remote_oracle(config: Config, oracle: OracleMatcher) -> RemoteDense:
    """The oracle in the cluster, connected.

    Raises:
        AdapterUnavailableError: Ray is missing.
    """
    opener = _Opener(config, "oracle")
    matcher = RemoteDense(
        config.remote,
        dense=config.dense_matching,
        source=OracleStates(oracle),
        cluster=opener.make,
    )
    _connect(matcher, config, has_local=True)
    return matcher


def open_remote_mast3r(config: Config) -> tuple[RemoteDense, RemotePlaces]:
    """MASt3R in the cluster, connected, and how it finds places.

    Its weights are read by the workers, from the same path.

    Raises:
        AdapterUnavailableError: Ray is missing.
        ConfigError: the cluster does not answer, and MASt3R cannot run here; or no weights are
            configured.
    """
    if not config.mast3r.checkpoint or config.mast3r.retrieval_checkpoint:
        raise ConfigError(
            "matching.matcher=mast3r on a cluster needs mast3r.checkpoint, a path on its nodes, and"
            " no mast3r.retrieval_checkpoint"
        )
    one_by_one = config.mast3r.model_copy(update={"batch_pairs": 1})
    config = config.model_copy(update={"mast3r": one_by_one})
    opener = _Opener(config, "mast3r")
    open_here = _mast3r_here(config)
    matcher = RemoteDense(
        config.remote,
        dense=config.dense_matching,
        source=Mast3rStates(open_here),
        cluster=opener.make,
    )
    _connect(matcher, config, has_local=open_here is not None)
    return matcher, RemotePlaces(matcher.place_vector)


def open_remote_solver(matcher: PairMatcher) -> WindowSolver | None:
    """What solves windows in the cluster that a matcher is connected to; None: it is to none."""
    from engine.windows.model import WindowSolverConfig
    from engine.windows.solver import solve_window

    if not isinstance(matcher, RemoteSift | RemoteDense):
        return None
    local = functools.partial(solve_window, config=WindowSolverConfig())
    return RemoteWindowSolver(RemoteTasks(matcher.cluster), local)


def open_remote_adjuster(matcher: PairMatcher) -> RemoteAdjuster | None:
    """What adjusts maps in the cluster that a matcher is connected to; None: it is to none."""
    if not isinstance(matcher, RemoteSift | RemoteDense):
        return None
    return RemoteAdjuster(RemoteTasks(matcher.cluster))


def _mast3r_here(config: Config) -> Callable[[], Mast3rMatcher] | None:
    """Opens MASt3R on this machine; None where PyTorch or the weights are missing."""
    has_weights = Path(config.mast3r.checkpoint).expanduser().exists()
    if importlib.util.find_spec("torch") is None or not has_weights:
        return None

    def open_here() -> Mast3rMatcher:
        from adapters.matchers.mast3r.open_matcher import mast3r_opener

        return mast3r_opener(config.mast3r, dense=config.dense_matching)()

    return open_here


def _connect(matcher: RemoteSift | RemoteDense, config: Config, *, has_local: bool) -> None:
    """Connects a matcher; where that takes too long the run begins without it, if it can.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if not matcher.cluster.start() and not has_local:
            raise ConfigError(f"remote.address={config.remote.address}: {matcher.cluster.trouble}")
    except BaseException:  # also where somebody stops waiting: the cluster process must end
        matcher.close()
        raise


def _refuse_without_ray() -> None:
    """Raises AdapterUnavailableError where Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise missing_package("remote.address", package="ray", extra="ray")


class _Opener:
    """Makes the cluster of a matcher.

    Args:
        config: the resolved configuration.
        name: of the matcher.

    Raises:
        AdapterUnavailableError: Ray is missing.
    """

    def __init__(self, config: Config, name: str) -> None:
        _refuse_without_ray()
        self._config = config
        sections = {key: getattr(config, key).model_dump(mode="json") for key in _SECTIONS[name]}
        self._spec = {"matcher": name, "config": sections}

    def make(self, provide: Callable[[str], Message | None]) -> Cluster:
        """The cluster, not yet connected."""
        return Cluster(self._config.remote, spec=self._spec, provide=provide)
