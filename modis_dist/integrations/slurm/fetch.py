"""Copy the results of a submission to a local folder and fill an MLflow database there."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from modis_dist.config.parse import digest
from modis_dist.integrations.mlflow.store import default_uri, network_problem, sqlite_path
from modis_dist.integrations.mlflow.sync import describe, sync, was_delivered
from modis_dist.integrations.slurm.submission import load, study_of
from modis_dist.runtime.errors import UserError
from modis_dist.runtime.lock import LOCK, locked
from modis_dist.runtime.text import shown
from modis_dist.study import manifest

# Checkpoints, simulated data and files of the cluster: the copy is a study without a submission.
NOT_COPIED = ("last", "scripts", "submission.json", "ray-*", "store-*", "mlflow*", ".*", LOCK)
BEST = "best"  # folder with the best model of a trial; the delivered model is in ``model``
Models = Literal["chosen", "all"]
Progress = Callable[[str, int, int], None]  # stage, amount done, total


def fetch(
    out: Path, destination: Path, *, models: Models, announce: Callable[[int, int], None], progress: Progress
) -> tuple[int, list[str]]:
    """Copy new results of a submission and fill the MLflow database in the copy.

    May be repeated while the study runs. ``announce`` is called with the number of files and bytes before they are
    copied. Returns the number of copied files and the problems with MLflow. Raises ``UserError`` if the destination
    cannot be used, ``DataError`` if nothing was submitted from ``out``.
    """
    load(out)
    if destination.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--to: {shown(str(destination))} is inside {shown(str(out))}; use another folder")
    if (destination / manifest.FILE).exists() and _study_in(destination) != _study_in(out):
        raise UserError(f"--to: {shown(str(destination))} contains another study; use another folder")
    destination.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(destination, patience_s=0):
        copies = {path: destination / path.relative_to(out) for path in _files(out, models)}
        stamps = {path: _stamp(path) for path in copies}
        new = {path: stamp for path, stamp in stamps.items() if stamp and stamp != _stamp(copies[path])}
        announce(len(new), sum(size for size, _ in new.values()))
        for number, path in enumerate(new, start=1):
            _copy(path, copies[path])
            progress("files", number, len(new))
    return len(new), _fill(destination, out, progress)  # without the lock, which would mark the study as running


def _fill(copy: Path, out: Path, progress: Progress) -> list[str]:
    """Fill the MLflow database of the copy, unless a server has everything from the jobs; return the problems."""
    uri = study_of(out).sweep.mlflow.tracking_uri
    if uri is not None and sqlite_path(uri) is None and was_delivered(out, uri):
        return []
    if problem := network_problem(copy):
        return [f"no database: {problem}; fetch to a local disk, e.g. of your own computer, to see the metrics"]
    uri = default_uri(copy)
    try:
        return list(sync(copy, uri, progress=lambda done, total: progress("MLflow", done, total)).problems)
    except Exception as error:
        return [f"{describe(error, copy, uri)}; rerun the same command"]


def _files(out: Path, models: Models) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(out):
        skipped = {BEST} if models == "chosen" and Path(folder).parent.name == "trials" else set()
        subfolders[:] = sorted(name for name in subfolders if not _is_excluded(name) and name not in skipped)
        yield from (Path(folder) / name for name in sorted(names) if not _is_excluded(name))


def _is_excluded(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in NOT_COPIED)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return size and modification time of a file; None if there is none."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _copy(path: Path, copy: Path) -> None:
    """Copy a file atomically, private and with its times; a file that was replaced is copied by the next call."""
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        shutil.copy2(path, temporary)
        temporary.chmod(0o600)
        temporary.replace(copy)
    except FileNotFoundError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


def _study_in(folder: Path) -> str:
    listed = manifest.load(folder / manifest.FILE)
    return digest([listed.study, listed.fingerprint])
