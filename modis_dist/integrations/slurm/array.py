"""What the jobs of an array do: each task trains one pack; the last job chooses, refits and tests."""

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.execution.local import LocalExecutor
from modis_dist.execution.resource_errors import is_gpu_error, is_training_error
from modis_dist.execution.resources import cores
from modis_dist.execution.run_pack import (
    Pack,
    crash_reasons,
    load_pack,
    record_crash,
    run_pack,
    save_pack,
    study_layout,
    unfinished_packs,
)
from modis_dist.integrations.slurm import submission as kept
from modis_dist.integrations.slurm.job_notes import PackFailed, noted, read_note
from modis_dist.integrations.slurm.job_script import STATUS
from modis_dist.integrations.slurm.queue import QueueUnknown, requeue
from modis_dist.runtime.errors import Interrupted, MachineFailed, NodeFailed, RunFailed, shown
from modis_dist.runtime.signals import Flag, on_signal
from modis_dist.runtime.version import code
from modis_dist.study.interfaces import Executor

ASK_AGAIN_S = 2.0
FAULTS = 2  # of machines, after which a job is queued again by itself
FEW = 4  # packs that the last job trains one after the other; more are sent as an array


@contextmanager
def job(out: Path, name: str, site: Site) -> Iterator[Flag]:
    """The work of one job: noted, and queued again where it was interrupted, or failed by its machine a few times.

    Yields what signals set while nobody else listens; with ``StopBetweenPacks`` an executor looks at it.
    """
    submission = kept.load(out)
    if submission.code != code():
        logging.getLogger(__name__).warning(
            "this program (%s) is not the one that submitted (%s, version %s); figures may differ",
            code(),
            submission.code,
            submission.version,
        )
    path = kept.folder_of(out) / STATUS / f"{name}.json"
    try:
        with noted(path, code=code(), requeues=site.requeues):
            _has_its_gpus(kept.study_of(out), site)
            flag = Flag()
            with on_signal(flag.set):
                yield flag
    except Interrupted:
        if site.executor == "slurm":
            _queued_again(site.warning_s / 2)
        raise
    except MachineFailed as error:
        note = read_note(path)
        if site.executor == "slurm" and note is not None and note.faults <= FAULTS and note.starts <= site.requeues:
            logging.getLogger(__name__).warning("%s", error)
            node = os.environ.get("SLURMD_NODENAME") if isinstance(error, NodeFailed) else None
            with _deaf():
                _queued_again(site.warning_s / 2, without=node)
        raise


@contextmanager
def _deaf() -> Iterator[None]:
    """Not ended, nor programs begun here, by the signal that Slurm sends a job which it queues again."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _queued_again(patience_s: float, *, without: str | None = None) -> None:
    """Ask Slurm for it, again where it does not answer, while there may be time; ``without`` a node."""
    log, end = logging.getLogger(__name__), time.monotonic() + patience_s
    while True:
        try:
            log.warning("queued again" if requeue(without=without) else "Slurm has decided what becomes of this job")
            return
        except QueueUnknown as error:
            if time.monotonic() > end:
                log.warning("not queued again: %s", error)
                return
        time.sleep(ASK_AGAIN_S)


def _has_its_gpus(study: Study, site: Site) -> None:
    """Raise ``NodeFailed`` where a job was given GPUs and sees none: it would train on the processor."""
    if site.gpus and study.trainer.device != "cpu" and not torch.cuda.is_available():
        raise NodeFailed(
            "the profile asks for GPUs and PyTorch sees none in this job; `modis-dist doctor` in a job says why, "
            "`trainer.device: cpu` does without"
        )


def threads_of(study: Study, site: Site) -> int:
    """CPU threads of a pack: what the study says, or all that a task is given."""
    return min(study.sweep.resources.cpus or site.cpus, cores())


def train_pack(out: Path, number: int) -> None:
    """Train the pack of a number to its end, or continue it.

    Raises ``Interrupted`` after a signal, with its state saved, ``PackFailed`` where the training itself crashed,
    ``NodeFailed`` where a GPU did, and what else goes wrong as it is: the same pack is sent again, with its checkpoint.
    """
    submission, study, site = kept.load(out), kept.study_of(out), kept.site_of(out)
    with job(out, f"pack-{number}", site) as flag:
        pack = kept.packs_of(out, submission)[number]
        if not unfinished_packs(out, [pack]):
            return
        threads = load_pack(save_pack(out, pack, threads=threads_of(study, site)))[1]
        try:
            run_pack(pack, study_layout(out, pack), store=Path(submission.store), stop=flag, threads=threads)
        except Exception as error:
            if is_training_error(error):
                raise PackFailed(record_crash(pack, error, out=out)) from error
            if is_gpu_error(error):
                raise NodeFailed(f"{type(error).__name__}: {shown(str(error))}") from error
            raise


class StopBetweenPacks(AbstractContextManager["StopBetweenPacks"]):
    """An executor that begins nothing more once a signal came between two of its turns."""

    def __init__(self, executor: Executor, flag: Flag) -> None:
        self._executor, self._flag = executor, flag
        self.slots, self.threads = executor.slots, executor.threads

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to stop."""

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """See ``Executor.execute``."""
        if reason := self._flag.requested():
            raise Interrupted(f"{reason}; what is done is kept")
        return self._executor.execute(packs, out=out, store=store)


class AfterArray(AbstractContextManager["AfterArray"]):
    """The executor of the last job: packs of the array were trained by others; refits it trains here."""

    def __init__(self, out: Path) -> None:
        self._out = out
        submission, study, site = kept.load(out), kept.study_of(out), kept.site_of(out)
        self._numbers = {pack.id: n for n, pack in enumerate(kept.packs_of(out, submission))}
        resources = study.sweep.resources.model_copy(update={"cpus": threads_of(study, site)})
        self._here = LocalExecutor(resources)
        self.slots, self.threads = self._here.slots, self._here.threads

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to stop."""

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """See ``Executor.execute``. Raises ``RunFailed`` where packs of the array neither ended nor crashed.

        So it does where many members of crashed packs are to be trained alone: an array trains them together.
        """
        reasons: dict[str, str] = {}
        lost, here = [], []
        for pack in packs:
            if pack.id not in self._numbers:
                here.append(pack)
            elif (why := self._crash_of(pack)) is not None:
                reasons |= crash_reasons(pack, why, out=out)
            else:
                lost.append(pack)
        if lost:
            raise RunFailed(
                f"{len(lost)} of {len(packs)} packs of the array are not done and did not crash by themselves "
                f"(cancelled, killed, lost, out of time or requeues, or a fault of machine, disk or data; `modis-dist "
                f"status {out}` says why); `modis-dist resume {out}` sends them again from their last checkpoints"
            )
        if len(alone := [pack for pack in here if pack.judged_on == "validation"]) > FEW:
            raise RunFailed(
                f"{len(alone)} trials of packs that crashed are to be trained one by one; `modis-dist resume {out}` "
                "sends them as an array, what is done is not trained twice"
            )
        return reasons | dict(self._here.execute(here, out=out, store=store))

    def _crash_of(self, pack: Pack) -> str | None:
        """Why the array's task could not train a pack; None where that was no fault of the training."""
        note = read_note(kept.folder_of(self._out) / STATUS / f"pack-{self._numbers[pack.id]}.json")
        return note.reason if note is not None and note.state == "failed" else None
