"""What the jobs of an array do: each task trains one pack; the last job chooses, refits and tests."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.errors import Interrupted, RunFailed
from modis_dist.launch.jobs import submission as kept
from modis_dist.launch.jobs.notes import PackFailed, noted, read_note
from modis_dist.launch.jobs.queue import QueueUnknown, requeue
from modis_dist.launch.jobs.script import STATUS
from modis_dist.sweep.execute import Pack, attempt, load_pack, save_pack, unfinished
from modis_dist.sweep.local import LocalExecutor, crashed
from modis_dist.sweep.ports import Executor
from modis_dist.sweep.resources import cores
from modis_dist.train import processor
from modis_dist.train.ports import NullReporter
from modis_dist.train.signals import Flag, on_signal
from modis_dist.version import code

ASK_AGAIN_S = 2.0
DIED = frozenset({"FAILED", "OUT_OF_MEMORY"})  # as sacct and squeue tell of a task that nobody stopped


@contextmanager
def job(out: Path, name: str, site: Site) -> Iterator[Flag]:
    """The work of one job: noted, and queued again where it was interrupted.

    Yields what signals set while nobody else listens; with ``Listening`` an executor looks at it.
    """
    submission = kept.load(out)
    if submission.code != code():
        logging.getLogger(__name__).warning(
            "this program (%s) is not the one that submitted (%s, version %s); figures may differ",
            code(),
            submission.code,
            submission.version,
        )
    try:
        with noted(kept.folder_of(out) / STATUS / f"{name}.json", code=code(), requeues=site.requeues):
            _has_its_gpus(kept.study_of(out), site)
            flag = Flag()
            with on_signal(flag.set):
                yield flag
    except Interrupted:
        if site.executor == "slurm":
            _queued_again(site.warning_s / 2)
        raise


def _queued_again(patience_s: float) -> None:
    """Ask Slurm for it, again where it does not answer, while there may be time."""
    log, end = logging.getLogger(__name__), time.monotonic() + patience_s
    while True:
        try:
            log.warning("queued again" if requeue() else "Slurm has decided what becomes of this job")
            return
        except QueueUnknown as error:
            if time.monotonic() > end:
                log.warning("not queued again: %s", error)
                return
        time.sleep(ASK_AGAIN_S)


def _has_its_gpus(study: Study, site: Site) -> None:
    """Raise ``RunFailed`` where a job was given GPUs and sees none: it would train on the processor."""
    if site.gpus and study.trainer.device != "cpu" and not torch.cuda.is_available():
        raise RunFailed(
            "the profile asks for GPUs and PyTorch sees none in this job; `modis-dist doctor` in a job says why, "
            "`trainer.device: cpu` does without"
        )


def threads_of(study: Study, site: Site) -> int:
    """CPU threads of a pack: what the study says, or all that a task is given."""
    return min(study.sweep.resources.cpus or site.cpus, cores())


def train_pack(out: Path, number: int) -> None:
    """Train the pack of a number to its end, or continue it.

    Raises ``Interrupted`` after a signal, with its state saved, and ``RunFailed`` where it crashed.
    """
    submission, study, site = kept.load(out), kept.study_of(out), kept.site_of(out)
    with job(out, f"pack-{number}", site) as flag:
        pack = kept.packs_of(out, submission)[number]
        if not unfinished(out, [pack]):
            return
        threads = load_pack(save_pack(out, pack, threads=threads_of(study, site)))[1]
        processor.use(pack.trials[0].run.trainer.threads or threads)
        reason = attempt(pack, out=out, store=Path(submission.store), reporter=NullReporter(), stop=flag)
        if reason is not None:
            raise PackFailed(reason)


class Listening(AbstractContextManager["Listening"]):
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
        """See ``Executor.execute``. Raises ``RunFailed`` where packs of the array neither ended nor crashed."""
        reasons: dict[str, str] = {}
        lost, here = [], []
        for pack in packs:
            if pack.id not in self._numbers:
                here.append(pack)
            elif (why := self._crash_of(pack)) is not None:
                reasons |= crashed(pack, why, out=out)
            else:
                lost.append(pack)
        if lost:
            raise RunFailed(
                f"{len(lost)} of {len(packs)} packs of the array are not done and did not crash (cancelled, lost, out "
                f"of time or requeues; `modis-dist status {out}` says why); `modis-dist resume {out}` sends them "
                "again, what is done is not trained twice"
            )
        return reasons | dict(self._here.execute(here, out=out, store=store))

    def _crash_of(self, pack: Pack) -> str | None:
        """Why the array's task could not train a pack; None where it was ended from outside.

        One that had no time to say so was killed: by the kernel for want of memory, or by a fault of its own.
        """
        number = self._numbers[pack.id]
        note = read_note(kept.folder_of(self._out) / STATUS / f"pack-{number}.json")
        if note is None or note.state != "running":
            return note.reason if note is not None and note.state == "failed" else None
        state = self._state_of(number)
        return f"its job ended as {state}" if state in DIED else None

    def _state_of(self, number: int) -> str | None:
        """How the task of a pack stands, in Slurm's words; None where it is not known."""
        submission, site = kept.load(self._out), kept.site_of(self._out)
        for sent in submission.latest:
            if sent.kind == "array" and number - sent.first in sent.indices and sent.number is not None:
                name = f"{sent.number}_{number - sent.first}" if site.executor == "slurm" else sent.number
                found = kept.queue_of(site).jobs([sent.number]).get(name)
                return found.state if found else None
        return None
