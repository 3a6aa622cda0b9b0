"""Training one pack of a sweep, wherever that happens: in this process, in a Ray worker, in a SLURM task.

A pack's folder is locked while it is trained, so that two processes never write to it. A trial is done when its
``result.json`` is there, which is written last; whatever dies before is done again from the last checkpoint.
"""

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from modis_dist.config.run import Run
from modis_dist.data.store.arrays import FeatureStorage
from modis_dist.data.store.reader import Store
from modis_dist.evaluate.evaluation import Baselines, evaluate_training, write_interim_result
from modis_dist.evaluate.results import (
    RESULT,
    HeldOut,
    Result,
    read_interim_result,
    read_result,
    write_result,
    write_run,
)
from modis_dist.execution.resource_errors import enough_memory, sound_disk
from modis_dist.execution.trial import Trial, sequence_digest
from modis_dist.report.trial import draw
from modis_dist.runtime.errors import ConfigError, DiskFailed, Interrupted, ModisError, RankLost, shown
from modis_dist.runtime.files import clear_leftovers, remove_folder, write_json, write_text
from modis_dist.runtime.lock import locked
from modis_dist.train.callbacks import Reporter, Stop
from modis_dist.train.journal import JournalWriter
from modis_dist.train.loop import Ports, fit
from modis_dist.train.placement import storage_of
from modis_dist.train.prepare import Cohort, Prepared, data_key, load_cohort, prepare
from modis_dist.train.process_group import ALONE, RankSpec, join_process_group
from modis_dist.train.progress import Progress
from modis_dist.train.stack import Member

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Pack:
    """Trials that are trained as one stack."""

    trials: tuple[Trial, ...]
    judged_on: HeldOut = "validation"
    probe: bool = True
    until: int | None = None  # epoch at which it waits to be compared with others; None: to its end, 0: no further

    @property
    def ids(self) -> list[str]:
        """The ids of its trials."""
        return [trial.id for trial in self.trials]

    @property
    def id(self) -> str:
        """Name of the pack's folder."""
        return sequence_digest(self.ids)


def trial_folder(out: Path, trial: Trial) -> Path:
    """Where a trial's results are."""
    return out / "trials" / trial.id


def pack_folder(out: Path, pack: Pack) -> Path:
    """Where a pack's last checkpoint and journal are."""
    return out / "packs" / pack.id


def journal_file(out: Path, pack: Pack) -> Path:
    """Where a pack's records are."""
    return pack_folder(out, pack) / JOURNAL


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
    settings = {"judged_on": pack.judged_on, "probe": pack.probe, "until": pack.until, "threads": threads}
    write_json(path, settings | {"trials": [trial.as_tree() for trial in pack.trials]})
    return folder


def load_pack(folder: Path) -> tuple[Pack, int]:
    """The pack that ``save_pack`` wrote, and its CPU threads."""
    content = json.loads((folder / "pack.json").read_text())
    trials = tuple(Trial.from_tree(tree, source=str(folder)) for tree in content["trials"])
    return Pack(trials, content["judged_on"], content["probe"], content["until"]), content["threads"]


def attempt(
    pack: Pack, *, out: Path, store: Path, reporter: Reporter, stop: Stop, seat: RankSpec = ALONE
) -> str | None:
    """``run_pack`` for an executor: what goes wrong with one pack must not end the others.

    Returns why it crashed, or None. ``Interrupted`` and ``RankLost`` are passed on, and ``DiskFailed``: no other pack,
    and no member of this one alone, would fare better.
    """
    try:
        run_pack(pack, out=out, store=store, reporter=reporter, stop=stop, seat=seat)
    except (Interrupted, RankLost, DiskFailed):
        raise
    except Exception as error:
        return note_crash(pack, error, out=out)
    return None


def note_crash(pack: Pack, error: Exception, *, out: Path) -> str:
    """Keep the traceback of a crash in ``error.txt``; returns it in one line."""
    with suppress(OSError):  # the disk may be what is wrong
        write_text(pack_folder(out, pack) / "error.txt", "".join(traceback.format_exception(error)))
    return str(error) if isinstance(error, ModisError) else f"{type(error).__name__}: {shown(str(error))}"


def unfinished(out: Path, packs: Sequence[Pack]) -> list[Pack]:
    """The packs with a trial that has no result yet, and is not as far as they are to be trained."""
    return [p for p in packs if not all(_is_there(trial_folder(out, t), p.until) for t in p.trials)]


def _is_there(folder: Path, until: int | None) -> bool:
    if read_result(folder) is not None or until is None:
        return read_result(folder) is not None
    standing = read_interim_result(folder)
    return (standing["epochs"] if standing else 0) >= until


def forget_last(out: Path, pack: Pack) -> None:
    """Remove the last checkpoint of a pack whose trials all have their results."""
    folder = pack_folder(out, pack)
    remove_folder(folder / "last")
    clear_leftovers(folder)


def run_pack(pack: Pack, *, out: Path, store: Path, reporter: Reporter, stop: Stop, seat: RankSpec = ALONE) -> None:
    """Train a pack to its end, or as far as it is to be trained, or continue it; of several ranks the first writes.

    Raises what ``fit`` raises.
    """
    folder, run = pack_folder(out, pack), pack.trials[0].run
    device = chosen_device(run)
    with enough_memory(folder, run, stacked=len(pack.trials)), ExitStack() as held:
        members = _members(pack, out=out, store=store)
        held.enter_context(sound_disk(folder))
        with join_process_group(seat, device=device) as world:
            journal = world.first(lambda: held.enter_context(_begun(folder, members)))
            ports = Ports(journal, reporter, stop) if journal else Ports(stop=stop)
            pruned = _pruned(pack, out)
            progress = fit(
                members, folder=folder, device=device, ports=ports, world=world, until=pack.until, pruned=pruned
            )
        if journal is None:
            return
        baselines = Baselines()
        for member, one in zip(members, progress, strict=True):
            if one.status == "running":
                write_interim_result(member, one, evaluated_on=pack.judged_on)
            elif read_result(member.folder) is None:
                result = _concluded(member, one, pack, device=device, baselines=baselines)
                journal.event(member.trial, kind="end", values={"status": one.status, "epochs": one.epochs})
                write_result(member.folder, result)
        if not unfinished(out, [replace(pack, until=None)]):
            forget_last(out, pack)


@contextmanager
def _begun(folder: Path, members: Sequence[Member]) -> Iterator[JournalWriter]:
    """The journal of a pack whose folder is locked and whose members have theirs."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder), JournalWriter(folder / JOURNAL) as journal:
        for member in members:
            write_run(member.folder, member.run)
            clear_leftovers(member.folder)
        yield journal


def _pruned(pack: Pack, out: Path) -> dict[str, str]:
    """Why trials of a pack were pruned, by id."""
    results = [result for trial in pack.trials if (result := read_result(trial_folder(out, trial))) is not None]
    return {result["trial"]: str(result["reason"]) for result in results if result["status"] == "pruned"}


def prune(pack: Pack, reasons: Mapping[str, str], *, out: Path) -> None:
    """Give the trials of a pack that are not trained any further their result: how they stand, and why they leave."""
    folder = pack_folder(out, pack)
    leaving = [t for t in pack.trials if t.id in reasons and read_result(trial_folder(out, t)) is None]
    standing = {t.id: read_interim_result(trial_folder(out, t)) for t in leaving}
    if not any(standing.values()):
        return
    with locked(folder):
        with JournalWriter(journal_file(out, pack)) as journal:
            for trial in leaving:
                if (held := standing[trial.id]) is not None:  # else it crashed
                    journal.event(trial.id, kind="end", values={"status": "pruned", "epochs": held["epochs"]})
                    write_result(trial_folder(out, trial), held | {"status": "pruned", "reason": reasons[trial.id]})
        if not unfinished(out, [replace(pack, until=None)]):
            forget_last(out, pack)


def reopen(trials: Sequence[Trial], packs: Sequence[Pack], *, out: Path) -> None:
    """Forget that trials were pruned; these packs of theirs begin again, for the state of the pruned is gone."""
    for pack in packs:
        with locked(pack_folder(out, pack)):
            remove_folder(pack_folder(out, pack) / "last")
    for trial in trials:
        (trial_folder(out, trial) / RESULT).unlink(missing_ok=True)


def _concluded(member: Member, progress: Progress, pack: Pack, *, device: torch.device, baselines: Baselines) -> Result:
    """The result of a member, with the figures of a refit drawn."""
    result = evaluate_training(
        member, progress, evaluated_on=pack.judged_on, probe=pack.probe, baselines=baselines, device=device
    )
    if pack.judged_on == "test":
        draw(member, result)
    return result


def chosen_device(run: Run) -> torch.device:
    """The device a run asks for. Raises ``ConfigError`` where it is not there, or has not the precision asked for."""
    asked, there = run.trainer.device, "with --ray, start the command on a node that has one"
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if asked == "auto" else asked)
    if run.trainer.precision == "fp16" and device.type != "cuda":
        raise ConfigError([f"trainer.precision: fp16 needs a GPU; say bf16, or fp32; {there}"], source=run.name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        problem = f"trainer.device: {asked} asked for, this machine has {count} GPU(s); {there}"
        raise ConfigError([problem], source=run.name)
    return device


def kinds_of_data(pack: Pack) -> int:
    """How many sets of rows, labels and features the trials of a pack learn from."""
    return len({data_key(trial.run, "") for trial in pack.trials})


def _members(pack: Pack, *, out: Path, store: Path) -> list[Member]:
    cohort = cohort_of(store, pack.trials[0].run, kinds=kinds_of_data(pack))
    prepared: dict[str, Prepared] = {}
    members = []
    for trial in pack.trials:
        key = data_key(trial.run, cohort.selection.fingerprint)
        if key not in prepared:
            prepared[key] = prepare(trial.run, cohort, test=pack.judged_on == "test")
        members.append(Member(trial.id, trial.run, prepared[key], trial_folder(out, trial)))
    return members


def cohort_of(store: Path, run: Run, *, kinds: int = 1) -> Cohort:
    """The data of a run, kept for the next pack of this process; this one learns from so many ``kinds`` of them."""
    place = storage_of(run, _opened(store), kinds=kinds)
    return _cohort(store, run.data.model_dump_json(include={"modalities", "classes"}), place)


@lru_cache(maxsize=1)
def _cohort(store: Path, data: str, place: FeatureStorage) -> Cohort:
    chosen = Run.model_validate({"data": {}}).data.model_validate_json(data)
    return load_cohort(_opened(store), chosen, place=place)


@lru_cache(maxsize=1)
def _opened(store: Path) -> Store:
    return Store.open(store)
