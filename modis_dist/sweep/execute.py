"""Training one pack of a sweep, wherever that happens: in this process, in a Ray worker, in a SLURM task.

A pack's folder is locked while it is trained, so that two processes never write to it. A trial is done when its
``result.json`` is there, which is written last; whatever dies before is done again from the last checkpoint.
"""

import fcntl
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from modis_dist.config.run import Run
from modis_dist.data.store import Store
from modis_dist.errors import ConfigError, DataError, Interrupted, ModisError, RunFailed, shown
from modis_dist.files import clear_leftovers, remove_folder, write_json, write_text
from modis_dist.report.trial import draw
from modis_dist.sweep.manifest import Trial, sequence_digest
from modis_dist.train.journal import JournalWriter
from modis_dist.train.loop import Member, Ports, fit
from modis_dist.train.outcome import Baselines, Judged, conclude, read_result, write_result, write_run
from modis_dist.train.ports import Reporter, Stop
from modis_dist.train.prepare import Cohort, Prepared, data_key, load_cohort, prepare
from modis_dist.train.state import Progress

LOCK_PATIENCE_S = 60.0  # a worker that outlived its killed driver notices within this time


@dataclass(frozen=True)
class Pack:
    """Trials that are trained as one stack."""

    trials: tuple[Trial, ...]
    judged_on: Judged = "validation"
    probe: bool = True

    @property
    def id(self) -> str:
        """Name of the pack's folder."""
        return sequence_digest([trial.id for trial in self.trials])


def trial_folder(out: Path, trial: Trial) -> Path:
    """Where a trial's results are."""
    return out / "trials" / trial.id


def pack_folder(out: Path, pack: Pack) -> Path:
    """Where a pack's last checkpoint and journal are."""
    return out / "packs" / pack.id


def journal_file(out: Path, pack: Pack) -> Path:
    """Where a pack's records are."""
    return pack_folder(out, pack) / "journal.jsonl"


def save_pack(out: Path, pack: Pack, *, threads: int) -> Path:
    """Write what a pack is into its folder, for whichever process trains it; returns the folder.

    CPU threads stay those of its first start: sums are rounded by how they are shared out, and a pack that continues
    is to end with the very numbers it would have had.
    """
    folder = pack_folder(out, pack)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "pack.json"
    if path.exists():
        threads = load_pack(folder)[1]
    trials = [trial.as_tree() for trial in pack.trials]
    write_json(path, {"judged_on": pack.judged_on, "probe": pack.probe, "threads": threads, "trials": trials})
    return folder


def load_pack(folder: Path) -> tuple[Pack, int]:
    """The pack that ``save_pack`` wrote, and its CPU threads."""
    content = json.loads((folder / "pack.json").read_text())
    trials = tuple(Trial.from_tree(tree, source=str(folder)) for tree in content["trials"])
    return Pack(trials, content["judged_on"], content["probe"]), content["threads"]


def attempt(pack: Pack, *, out: Path, store: Path, reporter: Reporter, stop: Stop) -> str | None:
    """``run_pack`` for an executor: what goes wrong with one pack must not end the others.

    Returns why it crashed, or None; the traceback is kept in ``error.txt``. ``Interrupted`` is passed on.
    """
    try:
        run_pack(pack, out=out, store=store, reporter=reporter, stop=stop)
    except Interrupted:
        raise
    except Exception as error:
        with suppress(OSError):  # the disk may be what is wrong
            write_text(pack_folder(out, pack) / "error.txt", traceback.format_exc())
        return str(error) if isinstance(error, ModisError) else f"{type(error).__name__}: {shown(str(error))}"
    return None


def unfinished(out: Path, packs: Sequence[Pack]) -> list[Pack]:
    """The packs with a trial that has no result yet."""
    return [p for p in packs if any(read_result(trial_folder(out, t)) is None for t in p.trials)]


def forget_last(out: Path, pack: Pack) -> None:
    """Remove the last checkpoint of a pack whose trials all have their results."""
    folder = pack_folder(out, pack)
    remove_folder(folder / "last")
    clear_leftovers(folder)


def run_pack(pack: Pack, *, out: Path, store: Path, reporter: Reporter, stop: Stop) -> None:
    """Train a pack to its end, or continue it. Raises what ``fit`` raises."""
    folder = pack_folder(out, pack)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = pack.trials[0].run
    with locked(folder), enough_memory(folder, run, stacked=len(pack.trials)):
        device = chosen_device(run)
        members = _members(pack, out=out, store=store)
        with sound_disk(folder), JournalWriter(journal_file(out, pack)) as journal:
            progress = fit(members, folder=folder, device=device, ports=Ports(journal, reporter, stop))
            baselines = Baselines()
            for member, one in zip(members, progress, strict=True):
                if read_result(member.folder) is None:
                    result = _concluded(member, one, pack, device=device, baselines=baselines)
                    journal.event(member.trial, kind="end", values={"status": one.status, "epochs": one.epochs})
                    write_result(member.folder, result)
        forget_last(out, pack)


def _concluded(
    member: Member, progress: Progress, pack: Pack, *, device: torch.device, baselines: Baselines
) -> dict[str, Any]:
    """The result of a member, with the figures of a refit drawn."""
    result = conclude(member, progress, judged_on=pack.judged_on, probe=pack.probe, baselines=baselines, device=device)
    if pack.judged_on == "test":
        draw(member, result)
    return result


def chosen_device(run: Run) -> torch.device:
    """The device a run asks for. Raises ``ConfigError`` where it is not there."""
    asked = run.trainer.device
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(asked)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError([f"trainer.device: {asked} asked for, this machine has {count} GPU(s)"], source=run.name)
    return device


@contextmanager
def enough_memory(folder: Path, run: Run, *, stacked: int = 1) -> Iterator[None]:
    """Turn what a machine without memory raises into ``RunFailed`` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        size = f"optim.batch_size {run.optim.batch_size}" + f" and {stacked} trials in a stack" * (stacked > 1)
        smaller = "lower it" + " or sweep.packing.max_trials" * (stacked > 1)
        why = shown(str(error).partition("\n")[0])
        raise RunFailed(f"{folder}: out of memory with {size}; {smaller}, or take a larger machine ({why})") from error


@contextmanager
def sound_disk(folder: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises into ``RunFailed`` that says what to do."""
    try:
        yield
    except (ConnectionError, TimeoutError):  # no disk's
        raise
    except OSError as error:
        where = shown(str(error.filename)) if error.filename else folder
        why = error.strerror or error
        raise RunFailed(f"{where}: {why}; make room or mend the disk, then the same command continues") from error


def _out_of_memory(error: Exception) -> bool:
    """PyTorch has a type for a GPU that is full, and only words for a machine that is."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def locked(folder: Path, *, patience_s: float = LOCK_PATIENCE_S) -> Iterator[None]:
    """Hold a folder's lock, and clear it. Raises ``DataError`` where another process keeps it beyond the patience."""
    with (folder / "lock").open("a") as file:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DataError(f"{folder}: another process is training here; wait for it or stop it") from None
                time.sleep(0.2)
        clear_leftovers(folder)
        yield


def _members(pack: Pack, *, out: Path, store: Path) -> list[Member]:
    cohort = cohort_of(store, pack.trials[0].run)
    prepared: dict[str, Prepared] = {}
    members = []
    for trial in pack.trials:
        key = data_key(trial.run, cohort.selection.fingerprint)
        if key not in prepared:
            prepared[key] = prepare(trial.run, cohort, test=pack.judged_on == "test")
        folder = trial_folder(out, trial)
        write_run(folder, trial.run)
        clear_leftovers(folder)
        members.append(Member(trial.id, trial.run, prepared[key], folder))
    return members


def cohort_of(store: Path, run: Run) -> Cohort:
    """The data of a run, kept in memory for the next pack of this process."""
    return _cohort(store, run.data.model_dump_json(include={"modalities", "classes"}))


@lru_cache(maxsize=1)
def _cohort(store: Path, data: str) -> Cohort:
    return load_cohort(Store.open(store), Run.model_validate({"data": {}}).data.model_validate_json(data))
