"""Bringing the results of a submission home: copied, and MLflow filled there by one writer from the journals."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modis_dist.config.parse import digest
from modis_dist.integrations.mlflow.store import default_uri, sqlite_path
from modis_dist.integrations.mlflow.sync import describe, sync, was_delivered
from modis_dist.integrations.slurm.submission import load, study_of
from modis_dist.runtime.errors import UserError
from modis_dist.runtime.file_systems import NETWORK, file_system
from modis_dist.runtime.lock import LOCK, locked
from modis_dist.runtime.text import shown
from modis_dist.study import manifest

# Checkpoints, simulated data, what is of that machine, and the list of jobs: the copy is a study without a cluster.
LEFT_THERE = ("last", "scripts", "submission.json", "ray-*", "store-*", "mlflow*", ".*", LOCK)
BEST = "best"  # of each trial its best model; that of the chosen one is in ``model`` too
Models = Literal["chosen", "all"]


@dataclass(frozen=True)
class Fetched:
    """Result of a fetch."""

    files: int
    problems: tuple[str, ...]  # with MLflow


def fetch(
    out: Path,
    home: Path,
    *,
    models: Models,
    announced: Callable[[int, int], None],
    told: Callable[[str, int, int], None],
) -> Fetched:
    """Copy what is new of a submission's results to ``home`` and fill the MLflow store there.

    May be repeated while the study runs. ``announced`` is called with the files and bytes that are to be copied, before
    they are; ``told`` with a stage, what is done of it and what there is. Raises ``UserError`` where ``home`` cannot
    hold it, ``DataError`` where nothing was submitted from ``out``.
    """
    load(out)
    if home.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--to: {shown(str(home))} is inside {shown(str(out))}; take a folder elsewhere")
    if (home / "manifest.json").exists() and _study_in(home) != _study_in(out):
        raise UserError(f"--to: {shown(str(home))} holds another study; take another folder")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(home, patience_s=0):
        wanted = [path for path in _files(out, models) if not _same(path, home / path.relative_to(out))]
        announced(len(wanted), sum(map(_size, wanted)))
        for number, path in enumerate(wanted, start=1):
            _copy(path, home / path.relative_to(out))
            told("files", number, len(wanted))
    return Fetched(len(wanted), tuple(_curves(home, out, told)))  # without the lock: nobody trains here


def _curves(home: Path, out: Path, told: Callable[[str, int, int], None]) -> list[str]:
    """Fill MLflow at home, unless a server has all of it from the jobs, or the disk does not do; what went wrong."""
    uri = study_of(out).sweep.mlflow.tracking_uri
    if uri is not None and sqlite_path(uri) is None and was_delivered(out, uri):
        return []
    kind = file_system(home)
    if kind in NETWORK:
        why = (
            f"{shown(str(home))} is on a network file system ({kind}), where its SQLite would be damaged: it was "
            "left out; fetch to a local disk, e.g. of your own computer, to see the curves"
        )
        return [why]
    return _fill(home, told)


def _files(out: Path, models: Models) -> Iterator[Path]:
    for place, folders, names in os.walk(out):
        trial = Path(place).parent.name == "trials"
        folders[:] = sorted(n for n in folders if not _stays(n) and not (trial and n == BEST and models == "chosen"))
        yield from (Path(place) / name for name in sorted(names) if not _stays(name))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # its successor comes next time
        return 0


def _stays(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in LEFT_THERE)


def _same(path: Path, copy: Path) -> bool:
    """Return whether a copy has the size and modification time of the file."""
    try:
        one, other = path.stat(), copy.stat()
    except FileNotFoundError:
        return False
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _copy(path: Path, copy: Path) -> None:
    """As a whole, private, with the file's time. One that is gone by now is left out: its successor comes next time."""
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(path, temporary)
        shutil.copystat(path, temporary)
        temporary.chmod(0o600)
        temporary.replace(copy)
    except FileNotFoundError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


def _study_in(folder: Path) -> str:
    listed = manifest.load(folder / "manifest.json")
    return digest([listed.study, listed.fingerprint])


def _fill(home: Path, told: Callable[[str, int, int], None]) -> list[str]:
    """Send the copied study to the database at home; returns what went wrong."""
    uri = default_uri(home)
    try:
        result = sync(home, uri, progress=lambda done, total: told("MLflow", done, total))
    except Exception as error:
        return [f"{describe(error, home, uri)}; run the same command again"]
    return list(result.problems)
