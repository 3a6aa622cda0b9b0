"""Tracking URIs: checks, the environment that MLflow needs, the database of a run folder and the lock of its writer.

Independent of runs, trials and metrics.
"""

import fcntl
import os
import re
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from modis_dist.runtime.errors import ConfigError, DataError
from modis_dist.runtime.file_systems import NETWORK, file_system
from modis_dist.runtime.text import shown

KEY = "sweep.mlflow.tracking_uri"
DATABASE = "mlflow.db"
WRITER_LOCK = ".mlflow-sync.lock"
MAGIC = b"SQLite format 3\0"
SERVERS = ("http", "https", "postgresql", "mysql", "mssql", "databricks")

# This package loads no model through MLflow.
FORCED = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is for results
}
PREFERRED = {  # the follower retries, so a single request may fail early
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Busy(DataError):
    """Another process sends this run folder to MLflow."""


def default_uri(folder: Path) -> str:
    """Return the tracking URI of the SQLite file in a run folder."""
    return f"sqlite:///{folder.absolute()}/{DATABASE}"


def checked(uri: str) -> str:
    """Return the tracking URI. Raises ``ConfigError`` if MLflow refuses it or SQLite would be damaged."""
    if find_spec("mlflow") is None:
        _refuse("mlflow is not installed; `pip install mlflow` or set sweep.mlflow.enabled=false")
    scheme = re.match(r"([a-z]+)(\+\w+)?:", uri)
    kind = scheme[1] if scheme else "file"
    if kind == "sqlite":
        _check_sqlite(uri)
    elif kind == "file":
        _refuse(
            f"MLflow no longer supports file stores (got {shown(uri)}); use sqlite:////path/{DATABASE} or http://host:port"
        )
    elif kind not in SERVERS:
        _refuse(f"unknown scheme in {shown(without_password(uri))}; use one of sqlite, {', '.join(SERVERS)}")
    return uri


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """Return a tracking URI with its password masked."""
    return re.sub(r"//([^/@:]*):[^/]*@", r"//\1:***@", uri)


def scrubbed(text: str, uri: str) -> str:
    """Return a message without the password of a tracking URI."""
    secret = re.search(r"//[^/@:]*:([^/]*)@", uri)
    text = text.replace(uri, without_password(uri))
    return text.replace(secret[1], "***") if secret and secret[1] else text


def environment() -> dict[str, str]:
    """Return the environment variables for MLflow, to be set before it is imported or started."""
    return PREFERRED | dict(os.environ) | FORCED


def prepare() -> None:
    """Set the environment for MLflow and silence warnings about its own code; call this before importing MLflow."""
    os.environ.update(environment())
    warnings.filterwarnings("ignore", module=r"mlflow\.")


def connect(uri: str) -> Any:
    """Return an ``MlflowClient``. A new SQLite file is private, and created atomically by one process at a time."""
    prepare()
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(uri, registry_uri=uri)
    with _locked(path.with_name(f".{path.name}.lock"), wait=True):
        if _is_new(path):
            with _replacing(path) as unfinished:
                _make_tables(f"sqlite:///{unfinished}")
        return _make_tables(uri)


def _make_tables(uri: str) -> Any:
    """Return a client of a database after its tables are created."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    client.search_experiments(max_results=1)  # creates, checks or migrates them
    return client


def _is_new(path: Path) -> bool:
    """Return whether a database file is missing or empty. Raises ``ConfigError`` if it is not a SQLite database."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start not in (b"", MAGIC):
        _refuse(f"{shown(str(path))} is not a SQLite database; move it away or choose another folder")
    return not start


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` at the end: MLflow cannot repair partially created tables."""
    for leftover in path.parent.glob(f".{path.name}.new-*"):
        leftover.unlink()
    unfinished = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")  # MLflow caches stores by URI
    os.close(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    yield unfinished
    unfinished.replace(path)


@contextmanager
def only_writer(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the process that sends a run folder to MLflow. Raises ``Busy`` if taken, unless ``wait``."""
    with _locked(folder / WRITER_LOCK, wait=wait):
        yield


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(f"{shown(str(path.parent))}: another process is sending this study to MLflow") from None
        yield


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None or not path.is_absolute():
        _refuse(f"the path of a SQLite URI must be absolute (got {shown(uri)}); use sqlite:////path/{DATABASE}")
    if set("?%") & set(str(path)):
        _refuse(f"a SQLite path cannot contain ? or % (got {shown(str(path))}); choose another folder")
    if not path.parent.is_dir():
        _refuse(f"folder {shown(str(path.parent))} does not exist; create it")
    if problem := network_problem(path.parent):
        _refuse(f"{problem}; use a local disk (sqlite:////local/{DATABASE}) or a server (http://host:port)")


def network_problem(folder: Path) -> str | None:
    """Return why a folder cannot hold a SQLite database: it is on a network file system; None if it is local."""
    kind = file_system(folder)
    if kind not in NETWORK:
        return None
    return f"{shown(str(folder))} is on a network file system ({kind}), which can corrupt SQLite databases"


def _refuse(problem: str) -> NoReturn:
    raise ConfigError([problem], source=KEY)
