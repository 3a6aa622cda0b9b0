"""Fixtures: one cluster for all tests of a process, and its environment."""

from collections.abc import Iterator

import pytest

from tests.real_slurm.cluster import Cluster, missing_requirements, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, n1 and n2, of four CPUs and two GPUs each; tests that revive what they kill share it."""
    if reason := missing_requirements():
        pytest.skip(reason)
    with running() as cluster:
        yield cluster


@pytest.fixture
def in_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with its environment set as on a login node."""
    for name in ("SLURM_CONF", "MUNGE_SOCKET", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    return cluster
