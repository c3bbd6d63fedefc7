"""The Ray cluster that tests of this room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ray_clusters import RayCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """One for all: starting it takes longer than most of what is tested with it."""
    pytest.importorskip("ray")
    with RayCluster(cpus=8) as running:
        yield running
