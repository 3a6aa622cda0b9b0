"""What the jobs of an array do: each task trains one pack; the last job chooses, refits and tests."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.errors import Interrupted, RunFailed
from modis_dist.launch import submission as kept
from modis_dist.launch.job_notes import noted, read_note
from modis_dist.launch.queue import QueueUnknown, requeue
from modis_dist.sweep.execute import Pack, attempt, load_pack, save_pack, unfinished
from modis_dist.sweep.local import LocalExecutor, crashed
from modis_dist.sweep.resources import cores
from modis_dist.train.ports import NullReporter
from modis_dist.train.signals import Flag, on_signal


@contextmanager
def job(out: Path, name: str, site: Site) -> Iterator[None]:
    """The work of one job: noted, and queued again where it was interrupted."""
    submission = kept.load(out)
    if submission.code != kept.code():
        logging.getLogger(__name__).warning(
            "this program (%s) is not the one that submitted (%s, version %s); figures may differ",
            kept.code(),
            submission.code,
            submission.version,
        )
    try:
        with noted(kept.folder_of(out) / kept.STATUS / f"{name}.json", code=kept.code(), requeues=site.requeues):
            yield
    except Interrupted:
        if site.executor == "slurm":
            _queued_again()
        raise


def _queued_again() -> None:
    try:
        again = requeue()
    except QueueUnknown as error:
        logging.getLogger(__name__).warning("not queued again: %s", error)
    else:
        logging.getLogger(__name__).warning("queued again" if again else "Slurm has decided what becomes of this job")


def threads_of(study: Study, site: Site) -> int:
    """CPU threads of a pack: what the study says, or all that a task is given."""
    return min(study.sweep.resources.cpus or site.cpus, cores())


def train_pack(out: Path, number: int) -> None:
    """Train the pack of a number to its end, or continue it.

    Raises ``Interrupted`` after a signal, with its state saved, and ``RunFailed`` where it crashed.
    """
    submission, study, site = kept.load(out), kept.study_of(out), kept.site_of(out)
    flag = Flag()
    with job(out, f"pack-{number}", site), on_signal(flag.set):
        pack = kept.packs_of(out, submission)[number]
        if not unfinished(out, [pack]):
            return
        threads = load_pack(save_pack(out, pack, threads=threads_of(study, site)))[1]
        torch.set_num_threads(pack.trials[0].run.trainer.threads or threads)
        reason = attempt(pack, out=out, store=Path(submission.store), reporter=NullReporter(), stop=flag)
        if reason is not None:
            raise RunFailed(reason)


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
                f"of time or requeues); `modis-dist resume {out}` sends them again, what is done is not trained twice"
            )
        return reasons | dict(self._here.execute(here, out=out, store=store))

    def _crash_of(self, pack: Pack) -> str | None:
        """Why the array's task could not train a pack; None where it was ended from outside."""
        path = kept.folder_of(self._out) / kept.STATUS / f"pack-{self._numbers[pack.id]}.json"
        note = read_note(path)
        return note.reason if note is not None and note.state == "failed" else None
