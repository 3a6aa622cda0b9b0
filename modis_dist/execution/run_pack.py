"""Run one training: for `tune` (in this process, a Ray worker or a Slurm task), `train` and `verify-resume`.

A pack's folder is locked while it is trained, so that two processes never write to it. A trial is done when its
``result.json`` exists, which is written last; a pack whose process dies resumes from its last checkpoint.
"""

import json
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from modis_dist.config.run import Data, Run
from modis_dist.data.store.arrays import FeatureStorage
from modis_dist.data.store.reader import Store
from modis_dist.evaluate.baseline import Baseline
from modis_dist.evaluate.evaluation import evaluate_training, write_interim_result
from modis_dist.evaluate.results import HeldOut, read_interim_result, read_result, write_result, write_run
from modis_dist.execution.resource_errors import disk_errors, is_crash, machine_errors
from modis_dist.execution.trial import Trial, sequence_digest
from modis_dist.report.trial import draw
from modis_dist.runtime.errors import ConfigError, ModisError
from modis_dist.runtime.files import clear_leftovers, remove_folder, write_json, write_text
from modis_dist.runtime.lock import PATIENCE_S, locked
from modis_dist.runtime.text import shown
from modis_dist.train import cpu_settings
from modis_dist.train.callbacks import Callbacks, NullReporter, Reporter, Stop
from modis_dist.train.journal import JOURNAL, JournalWriter
from modis_dist.train.loop import fit
from modis_dist.train.placement import storage_of
from modis_dist.train.prepare import Cohort, Prepared, data_key, load_cohort, prepare, shape
from modis_dist.train.process_group import ALONE, RankSpec, join_process_group
from modis_dist.train.progress import Progress
from modis_dist.train.stack import Member

LAST = "last"
SILENT = NullReporter()


@dataclass(frozen=True)
class Pack:
    """Trials that are trained as one stack."""

    trials: tuple[Trial, ...]
    evaluated_on: HeldOut = "validation"
    probe: bool = True
    until: int | None = None  # epoch of the next rung; None: train to the end, 0: do not train

    @property
    def ids(self) -> list[str]:
        """Return the ids of the pack's trials."""
        return [trial.id for trial in self.trials]

    @property
    def id(self) -> str:
        """Return the name of the pack's folder."""
        return sequence_digest(self.ids)


@dataclass(frozen=True)
class Layout:
    """The folders of a pack and its trials, and the files they keep beside results and best models."""

    pack: Path  # holds the lock, the journal and the last checkpoint
    trials: Mapping[str, Path]  # by trial id
    figures: bool  # draw figures for every trial
    keep_last: bool  # keep the last checkpoint when all trials have their results
    lock_patience_s: float = PATIENCE_S


# --- the packs of a study -----------------------------------------------------------------------------------


def trial_folder(out: Path, trial: Trial) -> Path:
    """Return the folder of a trial's results."""
    return out / "trials" / trial.id


def pack_folder(out: Path, pack: Pack) -> Path:
    """Return the folder of a pack's last checkpoint and journal."""
    return out / "packs" / pack.id


def journal_file(out: Path, pack: Pack) -> Path:
    """Return the journal of a pack."""
    return pack_folder(out, pack) / JOURNAL


def study_layout(out: Path, pack: Pack) -> Layout:
    """Return the layout of a pack in a study's folder; figures are drawn for refits only."""
    trials = {trial.id: trial_folder(out, trial) for trial in pack.trials}
    return Layout(pack_folder(out, pack), trials, figures=pack.evaluated_on == "test", keep_last=False)


def save_pack(out: Path, pack: Pack, *, threads: int) -> Path:
    """Write ``pack.json`` for the process that trains the pack; return the pack's folder.

    The number of CPU threads stays that of the first start: it affects rounding, and a resumed pack must give
    bit-identical results.
    """
    folder = pack_folder(out, pack)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "pack.json"
    if path.exists():
        threads = json.loads(path.read_text())["threads"]
    settings = {"evaluated_on": pack.evaluated_on, "probe": pack.probe, "until": pack.until, "threads": threads}
    write_json(path, settings | {"trials": [trial.as_tree() for trial in pack.trials]})
    return folder


def load_pack(folder: Path) -> tuple[Pack, int]:
    """Return the pack that ``save_pack`` wrote, and its CPU threads."""
    content = json.loads((folder / "pack.json").read_text())
    trials = tuple(Trial.from_tree(tree, source=str(folder)) for tree in content["trials"])
    return Pack(trials, content["evaluated_on"], content["probe"], content["until"]), content["threads"]


def unfinished_packs(out: Path, packs: Sequence[Pack]) -> list[Pack]:
    """Return the packs with a trial that has no result and has not reached the pack's ``until``."""
    return [pack for pack in packs if not all(_is_trained(trial_folder(out, t), pack.until) for t in pack.trials)]


def _is_trained(folder: Path, until: int | None) -> bool:
    if read_result(folder) is not None or until is None:
        return read_result(folder) is not None
    interim = read_interim_result(folder)
    return (interim["epochs"] if interim else 0) >= until


def remove_last_if_done(folder: Path, trials: Iterable[Path]) -> None:
    """Remove the last checkpoint from a pack's folder if all its trials have their results, in folders ``trials``."""
    if all(read_result(trial) is not None for trial in trials):
        remove_folder(folder / LAST)
        clear_leftovers(folder)


# --- running ------------------------------------------------------------------------------------------------


def try_pack(
    pack: Pack,
    *,
    out: Path,
    store: Path,
    stop: Stop,
    threads: int | None = None,
    spec: RankSpec = ALONE,
    resubmittable: bool = False,
) -> str | None:
    """Run a pack of a study; return its crash reason, or None. A crash of one pack does not end the others.

    Raises the errors that are not a crash (``is_crash``): the pack stays unfinished and resumes from its checkpoint.
    """
    try:
        run_pack(pack, study_layout(out, pack), store=store, stop=stop, threads=threads, spec=spec)
    except Exception as error:
        if is_crash(error, resubmittable=resubmittable):
            return _record_crash(pack, error, out=out)
        raise
    return None


def _record_crash(pack: Pack, error: Exception, *, out: Path) -> str:
    """Write the traceback of a crash to ``error.txt``; return the error as one line."""
    with suppress(OSError):  # the disk may be the cause
        write_text(pack_folder(out, pack) / "error.txt", "".join(traceback.format_exception(error)))
    return str(error) if isinstance(error, ModisError) else f"{type(error).__name__}: {shown(str(error))}"


def crash_reasons(pack: Pack, reason: str | None, *, out: Path) -> dict[str, str]:
    """Return the reason, by id, for every trial of a crashed pack that has no result."""
    if reason is None:
        return {}
    return {trial.id: reason for trial in pack.trials if read_result(trial_folder(out, trial)) is None}


def run_pack(
    pack: Pack,
    layout: Layout,
    *,
    store: Path,
    stop: Stop,
    reporter: Reporter = SILENT,
    threads: int | None = None,
    spec: RankSpec = ALONE,
) -> None:
    """Train a pack to its end or to ``pack.until``, or resume it; then write the result of every trial.

    Collective: every rank calls it with the same pack; only rank 0 writes. ``threads``: CPU threads if the run
    sets none. Raises the errors of ``fit``.
    """
    with trained(pack, layout, store=store, stop=stop, reporter=reporter, threads=threads, spec=spec) as stack:
        if stack is None:
            return
        baselines: dict[str, Baseline] = {}
        for member, progress in zip(stack.members, stack.progress, strict=True):
            if progress.status == "running":
                write_interim_result(member, progress, evaluated_on=pack.evaluated_on)
            elif read_result(member.folder) is None:
                result = evaluate_training(
                    member,
                    progress,
                    evaluated_on=pack.evaluated_on,
                    probe=pack.probe,
                    baselines=baselines,
                    device=stack.device,
                )
                if layout.figures:
                    draw(member, result)
                end = {"status": progress.status, "epochs": progress.epochs}
                stack.journal.event(member.trial, kind="end", values=end)
                write_result(member.folder, result)
        if not layout.keep_last:
            remove_last_if_done(layout.pack, layout.trials.values())


@dataclass(frozen=True)
class TrainedStack:
    """The members of a pack after ``fit``, on rank 0."""

    members: Sequence[Member]
    progress: Sequence[Progress]
    journal: JournalWriter
    device: torch.device


@contextmanager
def trained(
    pack: Pack,
    layout: Layout,
    *,
    store: Path,
    stop: Stop,
    reporter: Reporter = SILENT,
    threads: int | None = None,
    spec: RankSpec = ALONE,
) -> Iterator[TrainedStack | None]:
    """Train a pack; yield the stack while its folder is still locked, None on ranks other than 0.

    A failed GPU, an out-of-memory error and a full disk raise ``RunFailed`` with a fix, also inside the ``with`` block.
    """
    run = pack.trials[0].run
    device = chosen_device(run)
    cpu_settings.use(run.trainer.threads or threads)
    with machine_errors(layout.pack, run, stacked=len(pack.trials)), ExitStack() as stack:
        members = prepare_members(pack, layout.trials, store=store)
        stack.enter_context(disk_errors(layout.pack))
        with join_process_group(spec, device=device) as world:
            journal = world.only_on_rank_0(lambda: stack.enter_context(_open_journal(layout, members)))
            progress = fit(
                members,
                folder=layout.pack,
                device=device,
                callbacks=Callbacks(journal, reporter, stop) if journal else Callbacks(stop=stop),
                world=world,
                until=pack.until,
                pruned=_pruned(layout.trials.values()),
            )
        yield TrainedStack(members, progress, journal, device) if journal else None


@contextmanager
def _open_journal(layout: Layout, members: Sequence[Member]) -> Iterator[JournalWriter]:
    """Lock the pack's folder, write every member's ``run.yaml`` and open the journal."""
    layout.pack.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(layout.pack, patience_s=layout.lock_patience_s), JournalWriter(layout.pack / JOURNAL) as journal:
        for member in members:
            write_run(member.folder, member.run)
            clear_leftovers(member.folder)
        yield journal


def _pruned(folders: Iterable[Path]) -> dict[str, str]:
    """Return the reasons for pruning by trial id."""
    results = [result for folder in folders if (result := read_result(folder)) is not None]
    return {result["trial"]: str(result["reason"]) for result in results if result["status"] == "pruned"}


def chosen_device(run: Run) -> torch.device:
    """Return the device of a run. Raises ``ConfigError`` if it is missing or does not support the precision."""
    requested, advice = run.trainer.device, "with --ray, start the command on a node that has one"
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if requested == "auto" else requested)
    if run.trainer.precision == "fp16" and device.type != "cuda":
        raise ConfigError([f"trainer.precision: fp16 needs a GPU; use bf16 or fp32; {advice}"], source=run.name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        problem = f"trainer.device: {requested} requested, this machine has {count} GPU(s); {advice}"
        raise ConfigError([problem], source=run.name)
    return device


# --- data ---------------------------------------------------------------------------------------------------


def prepare_members(pack: Pack, folders: Mapping[str, Path], *, store: Path) -> list[Member]:
    """Return the members of a pack with their prepared data; members with the same data share it.

    Raises ``DataError`` or ``ConfigError`` for data and networks that cannot be trained, before anything is written.
    """
    cohort = cohort_of(store, pack.trials[0].run, kinds=kinds_of_data(pack))
    prepared: dict[str, Prepared] = {}
    members = []
    for trial in pack.trials:
        key = data_key(trial.run, cohort.selection.fingerprint)
        if key not in prepared:
            prepared[key] = prepare(trial.run, cohort, test=pack.evaluated_on == "test")
            sizes = {name: len(pipeline.features_out) for name, pipeline in prepared[key].pipelines.items()}
            shape(trial.run, sizes, len(prepared[key].classes))
        members.append(Member(trial.id, trial.run, prepared[key], folders[trial.id]))
    return members


def kinds_of_data(pack: Pack) -> int:
    """Return the number of different sets of rows, labels and features that the trials of a pack train on."""
    return len({data_key(trial.run, "") for trial in pack.trials})


def cohort_of(store: Path, run: Run, *, kinds: int = 1) -> Cohort:
    """Return the data of a run, cached for the next pack of this process; ``kinds`` as in ``storage_of``."""
    storage = storage_of(run, _opened(store), kinds=kinds)
    return _cohort(store, run.data.model_dump_json(include={"modalities", "classes"}), storage)


@lru_cache(maxsize=1)
def _cohort(store: Path, data: str, storage: FeatureStorage) -> Cohort:
    return load_cohort(_opened(store), Data.model_validate_json(data), storage=storage)


@lru_cache(maxsize=1)
def _opened(store: Path) -> Store:
    return Store.open(store)
