"""Which tracking addresses are taken, and how this process gets ready to use one.

Knows files, locks and addresses; must not know runs, trials or metrics.
"""

import fcntl
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from modis_dist.runtime.errors import ConfigError, shown
from modis_dist.runtime.file_systems import NETWORK, file_system
from modis_dist.runtime.files import write_json

KEY = "sweep.mlflow.uri"
DATABASE = "mlflow.db"
DELIVERY = "mlflow-delivery.json"
MAGIC = b"SQLite format 3\0"
SERVERS = ("http", "https", "postgresql", "mysql", "mssql", "databricks")

# For us no model is ever loaded through MLflow, so nothing it holds may run. The mirror tries again by itself, so a
# single request need not last for minutes.
FORCED = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # results stand there, as JSON where asked for
}
PREFERRED = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def default_uri(folder: Path) -> str:
    """A SQLite file in a folder."""
    return f"sqlite:///{folder.absolute()}/{DATABASE}"


def checked(uri: str) -> str:
    """The same address. Raises ``ConfigError`` for one that MLflow refuses or that would be damaged."""
    if find_spec("mlflow") is None:
        _refuse("mlflow is not installed; `pip install mlflow`, or leave the tracking out")
    scheme = re.match(r"([a-z]+)(\+\w+)?:", uri)
    kind = scheme[1] if scheme else "file"
    if kind == "sqlite":
        _check_sqlite(uri)
    elif kind == "file":
        _refuse(
            f"MLflow no longer takes folders of files (got {shown(uri)}); use sqlite:////path/{DATABASE} or http://host:port"
        )
    elif kind not in SERVERS:
        _refuse(f"unknown kind of address {shown(without_password(uri))}; known: sqlite, {', '.join(SERVERS)}")
    return uri


def note_delivery(folder: Path, uri: str | None) -> None:
    """Write down in a study's folder that MLflow has all of it, at an address; None: that it has not."""
    if uri is None:
        (folder / DELIVERY).unlink(missing_ok=True)
    else:
        write_json(folder / DELIVERY, {"uri": without_password(uri)})


def was_delivered(folder: Path, uri: str) -> bool:
    """Whether MLflow has all of a study at an address."""
    path = folder / DELIVERY
    return path.exists() and bool(json.loads(path.read_text())["uri"] == without_password(uri))


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address, or None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The address as it may be shown."""
    return re.sub(r"//([^/@:]*):[^/]*@", r"//\1:***@", uri)


def scrubbed(text: str, uri: str) -> str:
    """A message without the password of the address, whole or alone."""
    secret = re.search(r"//[^/@:]*:([^/]*)@", uri)
    text = text.replace(uri, without_password(uri))
    return text.replace(secret[1], "***") if secret and secret[1] else text


def environment() -> dict[str, str]:
    """The environment MLflow must find, here before it is imported and in every process we start for it."""
    return PREFERRED | dict(os.environ) | FORCED


def prepare() -> None:
    """To be called before MLflow is imported. What it warns of in its own code is for its authors."""
    os.environ.update(environment())
    warnings.filterwarnings("ignore", module=r"mlflow\.")


def connect(uri: str) -> Any:
    """An ``MlflowClient``; a new SQLite file is private, and made by one process at a time, whole or not at all."""
    prepare()
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(uri, registry_uri=uri)
    with _locked(path.with_name(f".{path.name}.lock")):
        if _is_new(path):
            with _replacing(path) as unfinished:
                _make_tables(f"sqlite:///{unfinished}")
        return _make_tables(uri)


def _make_tables(uri: str) -> Any:
    """A client of the database, whose tables are there."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    client.search_experiments(max_results=1)  # makes, checks or migrates them
    return client


def _is_new(path: Path) -> bool:
    """Whether there is no file or an empty one. Raises ``ConfigError`` for a file that is something else."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start not in (b"", MAGIC):
        _refuse(f"{shown(str(path))} is not a SQLite database; move it away or choose another folder")
    return not start


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Another file that takes the path's place once it is made: MLflow cannot go on with half of its tables."""
    for leftover in path.parent.glob(f".{path.name}.new-*"):
        leftover.unlink()
    unfinished = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")  # MLflow remembers addresses
    os.close(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    yield unfinished
    unfinished.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None or not path.is_absolute():
        _refuse(f"a SQLite address needs an absolute path, sqlite:////path/{DATABASE} (got {shown(uri)})")
    if set("?%") & set(str(path)):
        _refuse(f"a SQLite path cannot hold ? or % (got {shown(str(path))}); choose another folder")
    if not path.parent.is_dir():
        _refuse(f"folder {shown(str(path.parent))} is not there; create it")
    kind = file_system(path.parent)
    if kind in NETWORK:
        _refuse(
            f"{shown(str(path))} is on a network file system ({kind}), where SQLite gets damaged; "
            f"use a local disk (sqlite:////local/{DATABASE}) or a server (http://host:port)"
        )


def _refuse(problem: str) -> NoReturn:
    raise ConfigError([problem], source=KEY)
