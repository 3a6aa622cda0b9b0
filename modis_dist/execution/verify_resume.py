"""Check that a killed training resumes with bit-identical results, on the user's own data and machine.

The run is trained for a few epochs in a separate process, then again in processes that are killed (SIGKILL) at random
optimiser steps, each resuming from the last checkpoint.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from modis_dist.data.open_store import open_store
from modis_dist.execution.resources import cores, this_machine, worker_mistakes
from modis_dist.execution.run_pack import LAST, Pack, chosen_device, prepare_members, trained
from modis_dist.execution.single import single_layout
from modis_dist.execution.trial import ONLY_CONDITION, Trial
from modis_dist.runtime.errors import ConfigError, DataError, ModisError, RankLost, RunFailed
from modis_dist.runtime.files import write_text
from modis_dist.runtime.processes import end_with_parent, signals_blocked
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Reporter
from modis_dist.train.checkpoint import Checkpoint
from modis_dist.train.journal import JOURNAL, JournalReader, report_epochs
from modis_dist.train.loader import steps_per_epoch
from modis_dist.train.process_group import RankSpec, rendezvous_file

ERROR_FILE = "error.txt"
POLL_S = 0.2


@dataclass(frozen=True)
class VerificationResult:
    """The outcome of a verification."""

    epochs: int
    steps: int  # optimiser steps of the uninterrupted training
    kills: tuple[int, ...]  # the steps after which a process was killed
    tensors: int  # compared
    differences: tuple[str, ...]  # the first of them; empty if the trainings are bit-identical

    @property
    def equal(self) -> bool:
        """Return whether the trainings are bit-identical."""
        return not self.differences


def verify(
    run: Run, *, source: str, epochs: int, kills: int, seed: int, folder: Path, reporter: Reporter
) -> VerificationResult:
    """Train ``run`` for some epochs with and without kills, both below ``folder``, and compare the checkpoints.

    Raises ``ConfigError`` or ``DataError`` for what cannot be trained, ``RunFailed`` if the training fails. No process
    of a training outlives the call, whatever it raises.
    """
    device, workers = chosen_device(run).type, run.trainer.workers
    cluster = this_machine() if device == "cuda" else this_machine().without_gpus()
    problems = worker_mistakes(workers, threads=run.trainer.threads or 1, device=device, cluster=cluster)
    if workers > 1 and problems:
        raise ConfigError(problems, source=source)
    store = open_store(run.data, out=folder, source=source)
    settings = {
        "data.store": str(store.path),
        "data.simulate": None,
        "optim.epochs": epochs,
        "trainer.early_stopping": None,
        "trainer.checkpoint_every": 1,
        **({"trainer.log_every": 1} if workers > 1 else {}),  # several ranks check for a stop once per logging window
    }
    short = build(Run, with_settings(to_tree(run), settings, source=source), source=source)
    pack = Pack((Trial("verified", ONLY_CONDITION, 0, {}, None, 0, short),))
    steps = _count_steps(pack, store.path)
    if kills >= steps:
        raise ConfigError([f"{epochs} epochs have only {steps} steps; lower --kills or raise --epochs"], source=source)
    kill_steps = tuple(sorted(random.Random(seed).sample(range(1, steps), kills)))
    uninterrupted, killed = folder / "uninterrupted", folder / "killed"
    _train_in_processes(pack, uninterrupted, reporter, epochs_before=0)
    for step in kill_steps:
        _train_in_processes(pack, killed, reporter, epochs_before=epochs, kill_step=step)
    _train_in_processes(pack, killed, reporter, epochs_before=epochs)
    last = checkpoint.latest(uninterrupted / LAST)
    assert last is not None, "a finished training has saved"
    compared = sum(len(tensors) for tensors in checkpoint.load(last).tensors.values())
    return VerificationResult(epochs, steps, kill_steps, compared, tuple(differences(killed, uninterrupted)))


def _count_steps(pack: Pack, store: Path) -> int:
    """Return the optimiser steps of a run. Raises as ``prepare_members``."""
    (member,) = prepare_members(pack, {"verified": Path()}, store=store)
    optim, rows = member.run.optim, member.prepared.train.rows()
    return optim.epochs * steps_per_epoch(rows, batch_size=optim.batch_size, epoch_length=optim.epoch_length)


# --- processes ----------------------------------------------------------------------------------------------


class KillAfter:
    """Kills a process, this one or another rank, after a number of optimiser steps; passed as a ``Stop``."""

    def __init__(self, steps: int, pid_file: Path) -> None:
        self._steps_left = steps
        self._pid_file = pid_file

    def requested(self) -> str | None:
        """Return None, or never return."""
        self._steps_left -= 1
        if self._steps_left == 0:
            os.kill(int(self._pid_file.read_text()), signal.SIGKILL)
        return None


def _train_in_processes(
    pack: Pack, folder: Path, reporter: Reporter, *, epochs_before: int, kill_step: int | None = None
) -> None:
    """Start or resume a training in processes, to its end or until one is killed after step ``kill_step``.

    With several ranks, a different rank is killed each time. ``epochs_before`` epochs are reported as already done.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    last, (trial,) = checkpoint.latest(folder / LAST), pack.trials
    steps_left = 0 if kill_step is None else kill_step - (checkpoint.load(last).step if last else 0)
    workers = trial.run.trainer.workers
    victim = (kill_step or 0) % workers
    with TemporaryDirectory(dir=folder, prefix="ranks-") as name:
        shared = Path(name)
        specs = [RankSpec(rank, workers, rendezvous_file(shared)) for rank in range(workers)]
        start, stop = get_context("spawn").Process, KillAfter(steps_left, shared / str(victim))
        ranks = [start(target=_train, args=(pack, folder, spec, shared, stop), daemon=True) for spec in specs]
        with _killed_at_end(ranks):
            with signals_blocked({signal.SIGINT}):  # stays blocked in the ranks: this process handles Ctrl-C for all
                for rank in ranks:
                    rank.start()
            epochs, reader = 2 * trial.run.optim.epochs, JournalReader(folder / JOURNAL)
            while any(rank.exitcode is None for rank in ranks):  # if one dies, the others notice and exit
                connection.wait([rank.sentinel for rank in ranks if rank.exitcode is None], POLL_S)
                report_epochs(reader.new(), reporter, epochs=epochs, epochs_before=epochs_before)
    codes = [rank.exitcode for rank in ranks]
    if (steps_left and codes[victim] == -signal.SIGKILL) or (not steps_left and not any(codes)):
        return
    error = folder / ERROR_FILE
    if error.exists():
        raise (DataError if DataError.exit_code in codes else RunFailed)(error.read_text())
    raise RunFailed(f"{trial.run.name}: the training processes ended with {codes} (out of memory?)")


@contextmanager
def _killed_at_end(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """Kill these processes when the block ends, however it ends: none writes anything afterwards."""
    try:
        yield
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()


def _train(pack: Pack, folder: Path, spec: RankSpec, shared: Path, stop: KillAfter) -> None:
    """Train as one rank, in a separate process, to the end or until a rank is killed."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and kills this process
    (shared / str(spec.rank)).write_text(str(os.getpid()))
    (trial,) = pack.trials
    assert trial.run.data.store is not None
    try:
        if spec.size > 1 and chosen_device(trial.run).type == "cuda":
            torch.cuda.set_device(spec.rank)
        layout, store = single_layout(folder, trial), Path(trial.run.data.store)
        with trained(pack, layout, store=store, stop=stop, threads=max(1, cores() // spec.size), spec=spec) as stack:
            if stack is not None and stack.progress[0].status == "failed":
                raise RunFailed(f"{trial.run.name}: the training fails without kills too: {stack.progress[0].reason}")
    except RankLost:
        sys.exit(RankLost.exit_code)  # expected after a kill
    except ModisError as error:
        write_text(folder / ERROR_FILE, str(error))
        sys.exit(error.exit_code)


# --- comparing ----------------------------------------------------------------------------------------------


def differences(left: Path, right: Path) -> list[str]:
    """Return the names of the values that are not bit-identical in the checkpoints of two folders, metrics first.

    Raises ``DataError`` if one is damaged.
    """
    names: list[str] = []
    for part in ("last", "best"):
        a, b = (checkpoint.latest(folder / part) for folder in (left, right))
        if a is not None and b is not None:
            names += [f"{part}: {name}" for name in _checkpoint_differences(checkpoint.load(a), checkpoint.load(b))]
        elif a != b:
            names.append(f"{part}: is missing in {left if a is None else right}")
    return names


def _checkpoint_differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    if a.step != b.step:
        yield f"step {a.step} against {b.step}"
    yield from _value_differences(a.state, b.state)
    for file in sorted({*a.tensors, *b.tensors}):
        left, right = a.tensors.get(file, {}), b.tensors.get(file, {})
        for name in sorted({*left, *right}):
            if name not in left or name not in right or not _bit_identical(left[name], right[name]):
                yield f"{file}/{name}"


def _value_differences(a: Any, b: Any, *path: str) -> Iterator[str]:
    """Yield the leaves of two JSON values that differ; rows of a history are named by their epoch."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {**a, **b}:
            yield from _value_differences(a.get(key), b.get(key), *path, key)
    elif isinstance(a, list) and isinstance(b, list):
        for index, (x, y) in enumerate(zip_longest(a, b)):
            row = x or y
            is_epoch = isinstance(row, Mapping) and "train/total_g" in row
            yield from _value_differences(x, y, *path, f"epoch {row['epoch']:.0f}" if is_epoch else str(index))
    elif json.dumps(a) != json.dumps(b):
        yield f"{' '.join(path)}: {a} against {b}"


def _bit_identical(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
