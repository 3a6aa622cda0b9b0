"""Jobs of a submission: tasks of an array, each training one pack, the job after the array, and an allocation."""

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.execution.local import LocalExecutor
from modis_dist.execution.resources import Cluster, Node, cores
from modis_dist.execution.run_pack import (
    Pack,
    crash_reasons,
    load_pack,
    save_pack,
    try_pack,
    unfinished_packs,
)
from modis_dist.integrations.ray.existing_cluster import ray_at
from modis_dist.integrations.ray.multi_node import ray_on_nodes
from modis_dist.integrations.ray.private_cluster import PrivateRay, RayBackend
from modis_dist.integrations.slurm.folder import folder_of
from modis_dist.integrations.slurm.job_script import STATUS, python
from modis_dist.integrations.slurm.job_status import PackFailed, read_job_status, record_job_status
from modis_dist.integrations.slurm.queue import QueueUnknown, requeue
from modis_dist.integrations.slurm.submission import load, packs_of, site_of, study_of
from modis_dist.runtime.errors import Interrupted, MachineFailed, NodeFailed, RunFailed
from modis_dist.runtime.signals import Flag, on_signal
from modis_dist.runtime.version import code
from modis_dist.study.interfaces import Executor

RETRY_S = 2.0
MACHINE_FAULTS = 2  # after which a job is still requeued automatically
MAX_ALONE = 4  # trials of crashed packs that the last job trains; more are sent as an array


@contextmanager
def job(out: Path, name: str, site: Site) -> Iterator[Flag]:
    """Run the work of one job: write its status file; requeue it if it is interrupted, or its machine failed.

    Yields the flag that signals set; ``StopBetweenPacks`` makes an executor check it.
    """
    submission, log = load(out), logging.getLogger(__name__)
    if submission.code != code():
        log.warning(
            "the source code (%s) differs from that of the submission (%s, version %s); metrics may differ",
            code(),
            submission.code,
            submission.version,
        )
    path = folder_of(out) / STATUS / f"{name}.json"
    try:
        with record_job_status(path, code=code(), requeues=site.requeues):
            _require_gpus(study_of(out), site)
            flag = Flag()
            with on_signal(flag.set):
                yield flag
    except Interrupted:
        if site.executor == "slurm":
            _requeue(site.warning_s / 2)
        raise
    except MachineFailed as error:
        job_status = read_job_status(path)
        if (
            site.executor == "slurm"
            and job_status is not None
            and job_status.faults <= MACHINE_FAULTS
            and job_status.starts <= site.requeues
        ):
            log.warning("%s", error)
            node = os.environ.get("SLURMD_NODENAME") if isinstance(error, NodeFailed) else None
            with _sigterm_ignored():
                _requeue(site.warning_s / 2, exclude=node)
        raise


@contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Ignore SIGTERM, also in child processes: Slurm sends it to a job that is requeued."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _requeue(patience_s: float, *, exclude: str | None = None) -> None:
    """Ask Slurm to requeue this job; retry while it does not answer."""
    log, end = logging.getLogger(__name__), time.monotonic() + patience_s
    while True:
        try:
            log.warning("requeued" if requeue(exclude=exclude) else "not requeued: Slurm has already ended this job")
            return
        except QueueUnknown as error:
            if time.monotonic() > end:
                log.warning("not requeued: %s", error)
                return
        time.sleep(RETRY_S)


def _require_gpus(study: Study, site: Site) -> None:
    """Raise ``NodeFailed`` if the profile requests GPUs and the job sees none: it would train on the CPU."""
    if site.gpus and study.trainer.device != "cpu" and not torch.cuda.is_available():
        raise NodeFailed(
            "the profile requests GPUs and PyTorch sees none in this job; run `modis-dist doctor` in a job, or set "
            "`trainer.device: cpu`"
        )


def threads_of(study: Study, site: Site) -> int:
    """Return the CPU threads of a pack: ``sweep.resources.cpus``, or all cores of the task."""
    return min(study.sweep.resources.cpus or site.cpus, cores())


def train_pack(out: Path, number: int) -> None:
    """Train or resume the pack with a number.

    Raises ``Interrupted`` after a signal, with a checkpoint saved; ``PackFailed`` if the training failed;
    ``NodeFailed`` if a GPU failed; other errors unchanged, after which `resume` submits the pack again.
    """
    submission, study, site = load(out), study_of(out), site_of(out)
    with job(out, f"pack-{number}", site) as flag:
        pack = packs_of(out, submission)[number]
        if not unfinished_packs(out, [pack]):
            return
        threads = load_pack(save_pack(out, pack, threads=threads_of(study, site)))[1]
        store = Path(submission.store)
        reason = try_pack(pack, out=out, store=store, stop=flag, threads=threads, resubmittable=True)
        if reason is not None:
            raise PackFailed(reason)


class StopBetweenPacks:
    """An executor that starts no more packs once a signal has set the flag."""

    def __init__(self, executor: Executor, flag: Flag) -> None:
        self._executor, self._flag = executor, flag
        self.slots, self.threads = executor.slots, executor.threads

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        if reason := self._flag.requested():
            raise Interrupted(f"{reason}; finished trials are kept")
        return self._executor.execute(packs, out=out, store=store)


class AfterArray:
    """Executor of the last job: tasks trained the packs of the array; this job trains the refit."""

    def __init__(self, out: Path) -> None:
        self._out = out
        submission, study, site = load(out), study_of(out), site_of(out)
        self._numbers = {pack.id: n for n, pack in enumerate(packs_of(out, submission))}
        resources = study.sweep.resources.model_copy(update={"cpus": threads_of(study, site)})
        self._local = LocalExecutor(resources)
        self.slots, self.threads = self._local.slots, self._local.threads

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train the packs that are not in the array; return crash reasons by trial id.

        Raises ``RunFailed`` if packs of the array neither finished nor crashed, or if many trials of crashed packs must
        be retried alone, which an array does in parallel.
        """
        reasons: dict[str, str] = {}
        incomplete, local_packs = [], []
        for pack in packs:
            if pack.id not in self._numbers:
                local_packs.append(pack)
            elif (reason := self._crash_of(pack)) is not None:
                reasons |= crash_reasons(pack, reason, out=out)
            else:
                incomplete.append(pack)
        if incomplete:
            raise RunFailed(
                f"{len(incomplete)} of {len(packs)} packs of the array are unfinished (cancelled, killed, out of time, "
                f"requeue limit, or an error of machine, disk or data; see `modis-dist status {out}`); "
                f"`modis-dist resume {out}` resumes them from their last checkpoints"
            )
        if len(retries := [pack for pack in local_packs if pack.evaluated_on == "validation"]) > MAX_ALONE:
            raise RunFailed(
                f"{len(retries)} trials of packs that crashed must be retried alone; `modis-dist resume {out}` submits "
                "them as an array and keeps finished trials"
            )
        return reasons | dict(self._local.execute(local_packs, out=out, store=store))

    def _crash_of(self, pack: Pack) -> str | None:
        """Return the reason the training of a pack failed; None if it did not."""
        job_status = read_job_status(folder_of(self._out) / STATUS / f"pack-{self._numbers[pack.id]}.json")
        return job_status.reason if job_status is not None and job_status.state == "pack_failed" else None


@contextmanager
def ray_of_job(out: Path, site: Site) -> Iterator[RayBackend]:
    """Start Ray in this job: on one node it listens on loopback only, on several it requires a token."""
    if site.nodes == 1:
        yield PrivateRay(Cluster("this job", (Node(min(site.cpus, cores()), site.gpus),)))
        return
    with (
        ray_on_nodes(folder_of(out), nodes=site.nodes, cpus=site.cpus, gpus=site.gpus, python=python(site)) as address,
        ray_at(address) as backend,
    ):
        yield backend
