"""One trained study and one empty MLflow database for all tests here."""

from pathlib import Path

import pytest

from modis_dist.integrations.mlflow import store as mlflow_store
from tests.integrations.mlflow.replay import Replay
from tests.study.toy_study import run_toy_study, write_store


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished study: a pack of two trials and a refit; it was never tracked."""
    folder = tmp_path_factory.mktemp("finished")
    run_toy_study(folder / "out", write_store(folder / "store"), "optim.epochs=6", folds=1, probe=False)
    return folder / "out"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to create."""
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow_store.connect(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def replay(finished: Path, empty_database: Path, tmp_path: Path) -> Replay:
    """The study, about to be written again in a folder with an empty database."""
    return Replay(finished, tmp_path / "out", database=empty_database)
