"""Fixtures for tests of submissions: a store, fake Slurm commands, an output folder."""

from pathlib import Path

import pytest

from modis_dist.integrations.slurm import queue
from tests.integrations.slurm.fake_slurm import FakeSlurm
from tests.study.toy_study import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr(queue, "LATE_S", 0.2)
    monkeypatch.setattr(queue.time, "sleep", lambda _: None)
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
