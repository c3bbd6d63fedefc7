"""Opening a matcher in a cluster: where that is refused or broken off no process is left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters.remote import cluster as cluster_module
from adapters.remote import open_remote
from adapters.remote.cluster import Cluster
from adapters.remote.open_remote import open_remote_mast3r, open_remote_sift
from engine.config import Config, load_config
from engine.errors import ConfigError
from tests.support.fake_cluster import FakeProcesses


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> FakeProcesses:
    """Of a cluster that never answers."""
    processes = FakeProcesses(is_up=False)
    stand_in = SimpleNamespace(
        Popen=processes,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(cluster_module, "subprocess", stand_in)
    monkeypatch.setattr(open_remote, "_refuse_without_ray", lambda: None)
    return processes


def config_of(*settings: str) -> Config:
    return load_config(
        settings=["remote.address=nowhere:1", "remote.connect_timeout_s=0.01", *settings]
    )


def test_a_run_that_cannot_begin_without_the_cluster_leaves_no_process_behind(
    processes: FakeProcesses, tmp_path: Path
) -> None:
    config = config_of(f"mast3r.checkpoint={tmp_path / 'elsewhere.pth'}")
    with pytest.raises(ConfigError, match="nowhere:1"):
        open_remote_mast3r(config)
    assert all(one.has_ended for one in processes.all)


def test_a_run_that_is_interrupted_while_it_connects_leaves_no_process_behind(
    processes: FakeProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Cluster.start

    def start_until_interrupted(self: Cluster) -> bool:
        start(self)
        processes.wait_for_one()
        raise KeyboardInterrupt

    monkeypatch.setattr(Cluster, "start", start_until_interrupted)
    config = config_of()
    with pytest.raises(KeyboardInterrupt):
        open_remote_sift(config, config.sift)
    assert processes.all
    assert all(one.has_ended for one in processes.all)
