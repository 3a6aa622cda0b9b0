"""What tests of every slice share."""

import os
import shutil
import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.shapes import check

# The same code gets the same answer, on a busy machine too.
# `pytest --hypothesis-profile=default` looks for new examples.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Files whose tests take minutes, in groups of about the same time; those on Slurm share one cluster.
LONG = (
    ("test_studies", "test_doctor", "test_cluster"),
    ("test_ray_train", "test_mlflow_fire", "test_given_ray"),
    ("test_ray_tune", "test_submitted", "test_mlflow_apart"),
)


check(False)  # tests of formulas turn it on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, on as many workers as there are: each worker of xdist begins with a block of the list."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    rank = {stem: (group, place) for group, stems in enumerate(LONG) for place, stem in enumerate(stems)}
    blocks: list[list[pytest.Item]] = [[] for _ in range(workers)]
    short = [item for item in items if item.path.stem not in rank]
    for item in sorted((item for item in items if item.path.stem in rank), key=lambda item: rank[item.path.stem]):
        blocks[rank[item.path.stem][0] % workers].append(item)
    for block in blocks:
        room = max(0, len(items) // workers - len(block))
        block += short[:room]
        del short[:room]
    items[:] = [*chain.from_iterable(blocks), *short]


@pytest.fixture(scope="session", autouse=True)
def _sigint_as_in_a_terminal() -> Iterator[None]:
    """Tests and the commands they start get SIGINT, also where these tests run in the background of a script.

    A shell without job control, as that of a scheduler, starts its background jobs with SIGINT ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MODIS_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared")
    return folder


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated store of 60 samples: classes "1" to "3", modalities methylation, expression and protein.

    One for all tests; copy it before changing it.
    """
    from modis_dist.config.run import Simulate
    from modis_dist.data.simulate import simulate

    store = tmp_path_factory.mktemp("toy") / "store"
    simulate(Simulate(samples=60, classes=3, seed=5), store)
    return store


@pytest.fixture(autouse=True)
def _mlflow_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies that run in the process of the tests tell MLflow from there, for a process apart loads it every time.

    Those that tests start as commands have a process for it, as users' studies do.
    """
    from modis_dist.integrations.mlflow import apart as mlflow_apart
    from modis_dist.integrations.mlflow import study as mlflow_study

    monkeypatch.setattr(mlflow_apart, "MirrorApart", mlflow_study.Mirror)


@pytest.fixture(scope="session", autouse=True)
def _mlflow_tables_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow makes the tables of the first database in the process of the tests; new ones there are copies of it.

    To make them takes seconds of every study. Commands that tests start have MLflow make theirs, as users' do.
    """
    from modis_dist.integrations.mlflow import store as mlflow_store

    make, first = mlflow_store._make_tables, tmp_path_factory.mktemp("mlflow") / "first.db"

    def copied(uri: str) -> Any:
        path = mlflow_store.sqlite_path(uri)
        new = path is not None and path.exists() and path.stat().st_size == 0
        if new and first.exists():
            shutil.copyfile(first, path)
        client = make(uri)
        if new and not first.exists():
            shutil.copyfile(path, first)
        return client

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_store, "_make_tables", copied)
        yield
