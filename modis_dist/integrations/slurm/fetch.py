"""Bringing the results of a submission home: copied, and MLflow filled there by one writer from the journals."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modis_dist.config.parse import digest, load_run
from modis_dist.execution.run_pack import Pack
from modis_dist.execution.trial import Trial
from modis_dist.integrations.mlflow import apart as mlflow_apart
from modis_dist.integrations.mlflow.mirror import BackgroundMirror
from modis_dist.integrations.mlflow.store import NETWORK, default_uri, file_system, sqlite_path, was_delivered
from modis_dist.integrations.slurm.submission import load, study_of
from modis_dist.runtime.errors import UserError, shown
from modis_dist.runtime.lock import LOCK, locked
from modis_dist.study import manifest, telling
from modis_dist.study.interfaces import Mirror
from modis_dist.study.manifest import Manifest, unique
from modis_dist.study.monitor import Monitor, Silent

# Checkpoints, simulated data, what is of that machine, and the list of jobs: the copy is a study without a cluster.
LEFT_THERE = ("last", "scripts", "submission.json", "ray-*", "store-*", "mlflow*", ".*", LOCK)
BEST = "best"  # of each trial its best model; that of the chosen one is in ``model`` too
Models = Literal["chosen", "all"]
MLFLOW_S = 3600.0  # for MLflow to take everything


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
        return Fetched(len(wanted), tuple(_curves(home, out, told)))


def _curves(home: Path, out: Path, told: Callable[[str, int, int], None]) -> list[str]:
    """Fill MLflow at home, unless a server has all of it from the jobs, or the disk does not do; what went wrong."""
    uri = study_of(out).sweep.mlflow.uri
    if uri is not None and sqlite_path(uri) is None and was_delivered(out, uri):
        return []
    kind = file_system(home)
    if kind in NETWORK:
        why = (
            f"{shown(str(home))} is on a network file system ({kind}), where its SQLite would be damaged: it was "
            "left out; fetch to a local disk, e.g. of your own computer, to see the curves"
        )
        return [why]
    return _fill(home, out, told)


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


def _fill(home: Path, out: Path, told: Callable[[str, int, int], None]) -> list[str]:
    """Tell MLflow at home all that the copied files hold; returns what went wrong."""
    study, listed = study_of(home), manifest.load(home / "manifest.json")
    experiment = study.sweep.mlflow.experiment or study.name
    made = mlflow_apart.MirrorApart(
        uri=default_uri(home), experiment=experiment, study=digest([study.name, str(out)])[:16], folder=home
    )
    mirror = BackgroundMirror(made)
    try:
        telling.begin(mirror, study, listed)
        packs = _packs(home, listed)
        for number, (pack, stage) in enumerate(packs, start=1):
            _tell(mirror, home, pack, stage)
            told("MLflow", number, len(packs))
        summary = home / "summary.json"
        if summary.exists():
            telling.finish(mirror, json.loads(summary.read_text()), out=home)
        else:
            mirror.finish(status="KILLED", metrics={}, artifacts=[], model=None)  # until it is fetched again
    finally:
        problems = mirror.close(MLFLOW_S)
    return problems


def _tell(mirror: Mirror, home: Path, pack: Pack, stage: str) -> None:
    for trial in pack.trials:
        telling.declare(mirror, trial, stage=stage)
    Monitor([pack], out=home, feed=mirror, display=Silent()).look()
    for trial in pack.trials:
        telling.end(mirror, trial, out=home)


def _packs(home: Path, listed: Manifest) -> list[tuple[Pack, str]]:
    """Every pack with its stage."""
    trials = {trial.id: trial for trial in unique(listed.trials)}
    again = {trial.id: trial for ids in listed.refit_packs for name in ids if (trial := _refit(home, listed, name))}
    search = [(Pack(tuple(trials[name] for name in ids)), "search") for ids in listed.packs]
    refits = [
        (Pack(tuple(again[name] for name in ids)), "refit") for ids in listed.refit_packs if set(ids) <= set(again)
    ]
    return [*search, *refits]


def _refit(home: Path, listed: Manifest, name: str) -> Trial | None:
    """The refit of an id; None where it has not begun."""
    path = home / "trials" / name / "run.yaml"
    if not path.exists():
        return None
    epochs = load_run(path).optim.epochs
    known = (manifest.refit(trial, listed.fingerprint, epochs=epochs) for trial in listed.trials)
    return next((trial for trial in known if trial.id == name), None)
