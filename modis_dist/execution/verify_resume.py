"""Whether a run that is killed ends with the bits of one that is not: tried, on the user's own data and machine.

The run is trained for a few epochs in a process of its own, then again in processes that die by SIGKILL at random
optimiser steps, each continuing from what the one before had saved.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from modis_dist.config.parse import build, to_tree, with_settings
from modis_dist.config.run import Run
from modis_dist.data.store.open_store import open_store
from modis_dist.data.store.reader import Store
from modis_dist.execution.resource_errors import enough_memory, sound_disk
from modis_dist.execution.resources import cores, this_machine, workers_mistakes
from modis_dist.execution.run_pack import chosen_device
from modis_dist.runtime.errors import ConfigError, DataError, ModisError, RankLost, RunFailed
from modis_dist.runtime.files import write_text
from modis_dist.runtime.processes import end_with_parent, signals_blocked
from modis_dist.train import checkpoint, cpu_settings
from modis_dist.train.callbacks import Callbacks, NullTracker, Reporter
from modis_dist.train.checkpoint import Checkpoint, Tensors
from modis_dist.train.journal import JournalReader, JournalWriter
from modis_dist.train.loader import steps_per_epoch
from modis_dist.train.loop import fit
from modis_dist.train.placement import storage_of
from modis_dist.train.prepare import load_cohort, prepare, shape
from modis_dist.train.process_group import RankSpec, join_process_group, rendezvous_file
from modis_dist.train.stack import Member

REFUSED = "refused.txt"
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Verdict:
    """What came of it."""

    epochs: int
    steps: int  # optimiser steps of the undisturbed training
    kills: tuple[int, ...]  # the steps after which a process was killed
    tensors: int  # compared
    differences: tuple[str, ...]  # the first things that differ, none where all is equal

    @property
    def equal(self) -> bool:
        """Whether every bit is."""
        return not self.differences


def verify(run: Run, *, source: str, epochs: int, kills: int, seed: int, folder: Path, reporter: Reporter) -> Verdict:
    """Train ``run`` for some epochs with and without being killed, both below ``folder``, and compare.

    Raises ``ConfigError`` or ``DataError`` for what cannot be trained, ``RunFailed`` where the training fails. Whatever
    else is raised in this process on the way, no process of a training outlives it.
    """
    device, workers = chosen_device(run).type, run.trainer.workers
    cluster = this_machine() if device == "cuda" else this_machine().without_gpus()
    problems = workers_mistakes(workers, threads=run.trainer.threads or 1, device=device, cluster=cluster)
    if workers > 1 and problems:
        raise ConfigError(problems, source=source)
    store = open_store(run.data, out=folder, source=source)
    settings = {
        "data.store": str(store.path),
        "data.simulate": None,
        "optim.epochs": epochs,
        "trainer.early_stopping": None,
        "trainer.checkpoint_every": 1,
        **({"trainer.log_every": 1} if run.trainer.workers > 1 else {}),  # several ranks ask once in a window
    }
    short = build(Run, with_settings(to_tree(run), settings, source=source), source=source)
    steps = _steps(short, store)
    if kills >= steps:
        raise ConfigError([f"{epochs} epochs have only {steps} steps; lower --kills or raise --epochs"], source=source)
    moments = tuple(sorted(random.Random(seed).sample(range(1, steps), kills)))
    calm, killed = folder / "calm", folder / "killed"
    _live(short, calm, reporter, before=0)
    for moment in moments:
        _live(short, killed, reporter, before=epochs, die_at=moment)
    _live(short, killed, reporter, before=epochs)
    compared = sum(len(part) for part in checkpoint.load(_last(calm)).tensors.values())
    return Verdict(epochs, steps, moments, compared, tuple(differences(killed, calm)))


def _steps(run: Run, store: Store) -> int:
    """Optimiser steps of a run, after everything has been tried that its data may refuse."""
    prepared = prepare(run, load_cohort(store, run.data, place=storage_of(run, store)))
    shape(run, {m: len(p.features_out) for m, p in prepared.pipelines.items()}, len(prepared.classes))
    optim = run.optim
    rows = prepared.train.rows()
    return optim.epochs * steps_per_epoch(rows, batch_size=optim.batch_size, epoch_ends=optim.epoch_ends)


# --- lives --------------------------------------------------------------------------------------------------


class KillAfter:
    """A stop port that kills a process, its own or another rank's, after some optimiser steps."""

    def __init__(self, steps: int, victim: Path) -> None:
        self._left = steps
        self._victim = victim  # holds its process id

    def requested(self) -> str | None:
        """None, or no answer at all."""
        self._left -= 1
        if self._left == 0:
            os.kill(int(self._victim.read_text()), signal.SIGKILL)
        return None


def _live(run: Run, folder: Path, reporter: Reporter, *, before: int, die_at: int | None = None) -> None:
    """The processes of one training, which start or continue it, to its end or to a death after step ``die_at``.

    Of several ranks one dies, another each time. ``before`` is the number of epochs shown as done by others.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = checkpoint.latest(folder / "last")
    left = 0 if die_at is None else die_at - (checkpoint.load(found).step if found else 0)
    workers = run.trainer.workers
    victim = (die_at or 0) % workers
    with TemporaryDirectory(dir=folder, prefix="ranks-") as name:
        place = Path(name)
        seats = [RankSpec(rank, workers, rendezvous_file(place)) for rank in range(workers)]
        start, end = get_context("spawn").Process, (left, place / str(victim))
        ranks = [start(target=_train, args=(run, folder, seat, place, end), daemon=True) for seat in seats]
        with _ended(ranks):
            with signals_blocked({signal.SIGINT}):  # as they go on: a Ctrl-C is obeyed here, for all
                for rank in ranks:
                    rank.start()
            _watch(ranks, folder, reporter, before=before, epochs=2 * run.optim.epochs)
    ended = [rank.exitcode for rank in ranks]
    if (left and ended[victim] == -signal.SIGKILL) or (not left and not any(ended)):
        return
    refused = folder / REFUSED
    if refused.exists():
        raise (DataError if DataError.exit_code in ended else RunFailed)(refused.read_text())
    raise RunFailed(f"{run.name}: processes that trained it ended with {ended} (out of memory?)")


@contextmanager
def _ended(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """However the block ends, none of these processes writes anything after it."""
    try:
        yield
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()


def _watch(ranks: Sequence[BaseProcess], folder: Path, reporter: Reporter, *, before: int, epochs: int) -> None:
    """Until all ranks have ended; where one dies the others notice, and end."""
    reader = JournalReader(folder / "journal.jsonl")
    while any(rank.exitcode is None for rank in ranks):
        connection.wait([rank.sentinel for rank in ranks if rank.exitcode is None], SECONDS_BETWEEN_LOOKS)
        for record in reader.new():
            if record["kind"] == "metrics":
                done = before + record["step"]
                reporter.progress(epoch=done, epochs=epochs, active=1, headline=record["values"])


def _train(run: Run, folder: Path, seat: RankSpec, place: Path, end: tuple[int, Path]) -> None:
    """In the process: train, until a rank is killed after some steps, or to the end where these are 0."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends this process
    (place / str(seat.rank)).write_text(str(os.getpid()))
    try:
        cpu_settings.use(run.trainer.threads or max(1, cores() // seat.size))
        with enough_memory(folder, run), sound_disk(folder), ExitStack() as stack:
            tracker = stack.enter_context(JournalWriter(folder / "journal.jsonl")) if seat.rank == 0 else NullTracker()
            assert run.data.store is not None
            store = Store.open(Path(run.data.store))
            prepared = prepare(run, load_cohort(store, run.data, place=storage_of(run, store)))
            member, device = Member("verified", run, prepared, folder), chosen_device(run)
            if seat.size > 1 and device.type == "cuda":
                torch.cuda.set_device(seat.rank)
            with join_process_group(seat, device=device) as world:
                callbacks = Callbacks(tracker, stop=KillAfter(*end))
                (progress,) = fit([member], folder=folder, device=device, callbacks=callbacks, world=world)
            if progress.status == "failed":
                raise RunFailed(f"{run.name}: the training itself fails: {progress.reason}")
    except RankLost:
        sys.exit(RankLost.exit_code)  # as wanted
    except ModisError as error:
        write_text(folder / REFUSED, str(error))
        sys.exit(error.exit_code)


def _last(folder: Path) -> Path:
    found = checkpoint.latest(folder / "last")
    assert found is not None, "a finished training has saved"
    return found


# --- comparing ----------------------------------------------------------------------------------------------


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs, bit for bit, between the checkpoints in two folders of one training; figures before tensors.

    Raises ``DataError`` where one is damaged.
    """
    found: list[str] = []
    for part in ("last", "best"):
        one, other = (checkpoint.latest(folder / part) for folder in (ours, theirs))
        if one is not None and other is not None:
            found += [f"{part}: {what}" for what in _between(checkpoint.load(one), checkpoint.load(other))]
        elif one != other:
            found.append(f"{part}: is missing in {ours if one is None else theirs}")
    return found


def _between(one: Checkpoint, other: Checkpoint) -> Iterator[str]:
    if one.step != other.step:
        yield f"step {one.step} against {other.step}"
    yield from _in_values(one.state, other.state)
    for file in sorted({*one.tensors, *other.tensors}):
        yield from (f"{file}/{name}" for name in _in_tensors(one.tensors.get(file, {}), other.tensors.get(file, {})))


def _in_values(one: Any, other: Any, *where: str) -> Iterator[str]:
    """Leaves of two JSON values that differ; the rows of a history are called by their epoch."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from _in_values(one.get(key), other.get(key), *where, key)
    elif isinstance(one, list) and isinstance(other, list):
        for place, (a, b) in enumerate(zip_longest(one, other)):
            row = a or b
            name = f"epoch {row['epoch']:.0f}" if isinstance(row, Mapping) and "train/total_g" in row else str(place)
            yield from _in_values(a, b, *where, name)
    elif json.dumps(one) != json.dumps(other):
        yield f"{' '.join(where)}: {one} against {other}"


def _in_tensors(one: Tensors, other: Tensors) -> Iterator[str]:
    for name in sorted({*one, *other}):
        if name not in one or name not in other or not _same_bits(one[name], other[name]):
            yield name


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
