"""Fixtures: one cluster for all tests of a process, and its environment."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_slurm.cluster import Cluster, missing_requirements, running
from tests.real_slurm.studies import command, write_study
from tests.study.toy_study import BARE, write_store


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


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a study and, in ``home``, the results of a local run."""
    folder = tmp_path_factory.mktemp("studies")
    study = write_study(folder / "study.yaml", write_store(folder / "store"))
    command("tune", str(study), "--out", str(folder / "home"), program=BARE)
    return folder
