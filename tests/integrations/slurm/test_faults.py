"""Failures of jobs by cause (training, machine, environment) and their consequences."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modis_dist.cli.job import finish
from modis_dist.execution import run_pack
from modis_dist.execution.local import LocalExecutor
from modis_dist.execution.run_pack import Pack, save_pack
from modis_dist.integrations.ray import head_watch, multi_node, tune
from modis_dist.integrations.slurm import jobs as array_job
from modis_dist.integrations.slurm import submission, submit
from modis_dist.integrations.slurm.job_status import JobStatus, read_job_status
from modis_dist.integrations.slurm.submission import load
from modis_dist.integrations.slurm.submission_status import submission_status
from modis_dist.runtime.errors import DataError, DiskFailed, Interrupted, MachineFailed, NodeFailed, RunFailed
from modis_dist.runtime.files import write_json
from modis_dist.study import manifest
from modis_dist.study.plan import plan
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.stack import Member
from tests.integrations.slurm.fake_slurm import SACCT, FakeSlurm
from tests.integrations.slurm.toy_submission import planned, site, study, submitted
from tests.study.toy_study import run_toy_study

SURROUNDINGS = {
    "a full quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x"),
    "a lock that is held": DataError("packs/x: another process trains here"),
    "no memory of the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
    "no memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    "a bug": KeyError("mrna"),
}
OF_GPU = {
    "an ECC error": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    "a library of the GPU": RuntimeError("cuBLAS error: CUBLAS_STATUS_EXECUTION_FAILED"),
    "the accelerator": torch.AcceleratorError("device failure"),
}
OF_TRAINING = {
    "algebra": torch.linalg.LinAlgError("linalg.cholesky: not positive-definite"),
    "a distribution": ValueError("Expected parameter scale to satisfy the constraint GreaterThan"),
    "a shape": RuntimeError("The size of tensor a (3) must match"),
}


@pytest.fixture(autouse=True)
def in_job(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the tests as job 7 on node n1 of a partition of nine nodes."""
    slurm.put("7", "RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    has_nodes(slurm, 9)
    yield


def has_nodes(slurm: FakeSlurm, number: int) -> None:
    """Set the number of nodes of the partition."""
    (slurm.bin / "sinfo").write_text(f"#!/bin/sh\necho {number}\n")
    (slurm.bin / "sinfo").chmod(0o700)


def full(*_: object, **__: object) -> Any:
    """Fail like a write on a full disk."""
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x")


def job_status_of(out: Path, name: str) -> JobStatus:
    job_status = read_job_status(out / "submission" / "status" / f"{name}.json")
    assert job_status is not None
    return job_status


# --- errors of the training or not ------------------------------------------------------------------------------


def trained(error: Exception, out: Path, monkeypatch: pytest.MonkeyPatch) -> JobStatus:
    """Run the first pack, whose training raises ``error``, and return its status file."""

    def fit(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run_pack, "fit", fit)
    with pytest.raises((RunFailed, type(error))):
        array_job.train_pack(out, 0)
    return job_status_of(out, "pack-0")


@pytest.mark.parametrize("what", [*SURROUNDINGS, *OF_GPU])
def test_an_error_outside_the_training_leaves_a_pack_to_resume(
    what: str, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, out)
    job_status = trained((SURROUNDINGS | OF_GPU)[what], out, monkeypatch)
    assert job_status.state == "job_failed" and job_status.reason and not list(out.glob("packs/*/error.txt"))
    with pytest.raises(RunFailed, match="`modis-dist resume "):
        array_job.AfterArray(out).execute(submission.packs_of(out, load(out))[:1], out=out, store=store)


@pytest.mark.parametrize("what", OF_TRAINING)
def test_an_error_of_the_training_fails_its_pack(
    what: str, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, out)
    error = OF_TRAINING[what]
    job_status = trained(error, out, monkeypatch)
    (error_file,) = out.glob("packs/*/error.txt")
    assert job_status.state == "pack_failed"
    assert "Traceback" in error_file.read_text() and str(error) in error_file.read_text()
    pack = submission.packs_of(out, load(out))[0]
    failures = array_job.AfterArray(out).execute([pack], out=out, store=store)
    assert failures == {pack.trials[0].id: f"{type(error).__name__}: {error}"}


@pytest.mark.parametrize("state", ["OUT_OF_MEMORY", "FAILED", "NODE_FAIL", "CANCELLED by 0"])
def test_a_pack_whose_job_was_killed_is_left_to_resume(state: str, slurm: FakeSlurm, store: Path, out: Path) -> None:
    number = submitted(store, out).sent[0].number
    write_json(out / "submission" / "status" / "pack-1.json", vars(JobStatus("running", 1, None, "7", "n1", 0.0, "c")))
    slurm.end()
    slurm.set_answers(sacct=[SACCT, f"{number}_1|{state}|n1"])
    pack = submission.packs_of(out, load(out))[1]
    with pytest.raises(RunFailed, match=r"\b1 of 1 .*modis-dist resume"):
        array_job.AfterArray(out).execute([pack], out=out, store=store)


def test_a_full_quota_keeps_the_checkpoint_and_the_stack_together(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = plan(study(store, packing={"enabled": True}), out=out, slots=1, source="study.yaml", gpu=False)
    before = submit.submit(stacked, site(), form="array", out=out)
    genuine, updates = run_pack.fit, iter(range(99))

    def fit(members: Sequence[Member], *, callbacks: Callbacks, **settings: Any) -> Any:
        stop = SimpleNamespace(requested=lambda: "asked" if next(updates) > 4 else None)
        return genuine(members, callbacks=replace(callbacks, stop=stop), **settings)

    with monkeypatch.context() as patch:
        patch.setattr(run_pack, "fit", fit)
        with pytest.raises(Interrupted):
            array_job.train_pack(out, 0)
    saved = list(out.glob("packs/*/last/step-*"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", full)
        with pytest.raises(DiskFailed):
            array_job.train_pack(out, 0)
    assert saved and job_status_of(out, "pack-0").state == "job_failed"
    with pytest.raises(RunFailed, match="modis-dist resume"):
        finish(out)
    assert manifest.load(out / "manifest.json").packs == before.packs and len(before.packs[0]) == 4
    assert list(out.glob("packs/*/last/step-*")) == saved
    slurm.end()
    assert submit.resume(out).packs == before.packs


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x"), DiskFailed), *((e, NodeFailed) for e in OF_GPU.values())],
)
def test_a_full_disk_or_a_failed_gpu_ends_a_study_and_its_stack_resumes_together(
    error: Exception, raised: type[Exception], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise error

    out = tmp_path / "tuned"
    with monkeypatch.context() as patch:
        patch.setattr(run_pack, "fit", fit)
        with pytest.raises(raised, match=re.escape(str(error.args[1] if raised is DiskFailed else error))):
            run_toy_study(out, store, grid={}, probe=False)
    (stack,) = manifest.load(out / "manifest.json").packs
    assert len(stack) == 2 and not list(out.glob("packs/*/error.txt"))
    assert run_toy_study(out, store, grid={}, probe=False)["trials"]["done"] == 2
    assert manifest.load(out / "manifest.json").packs == (stack,)


def test_a_disk_error_in_a_ray_worker_is_not_a_crash(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack(planned(store, tmp_path).manifest.trials[:2])
    config = {"pack": str(save_pack(tmp_path, pack, threads=1)), "out": str(tmp_path), "store": str(store)}
    monkeypatch.setattr(run_pack, "fit", full)
    reported = tune.train_pack(config | {"storage": str(tmp_path), "workers": 1, "gpus": 0})
    assert reported["crashed"] is None and os.strerror(errno.EDQUOT) in reported["disk_error"]
    with pytest.raises(DiskFailed, match=os.strerror(errno.EDQUOT)):
        tune.raise_machine_failure([SimpleNamespace(metrics=m, error=None) for m in (None, reported)])
    tune.raise_machine_failure([SimpleNamespace(metrics={"pack": "x", "crashed": None}, error=None)])


def test_few_members_of_crashed_stacks_retry_in_the_last_job_many_by_resume(
    store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, out)
    executor, pack = array_job.AfterArray(out), submission.packs_of(out, load(out))[0]
    packs = [replace(pack, trials=(replace(pack.trials[0], id=f"t{number}"),)) for number in range(5)]
    trained_here: list[Pack] = []
    monkeypatch.setattr(LocalExecutor, "execute", lambda _, packs, **__: trained_here.extend(packs) or {})
    assert executor.execute(packs[:4], out=out, store=store) == {} and trained_here == packs[:4]
    with pytest.raises(RunFailed, match=r"\b5 .*`modis-dist resume "):
        executor.execute(packs, out=out, store=store)
    refits = [replace(pack, evaluated_on="test") for pack in packs]
    assert executor.execute(refits, out=out, store=store) == {} and trained_here[4:] == refits


# --- retry on another node ---------------------------------------------------------------------------------------


def fails(out: Path, error: Exception, **keys: Any) -> None:
    with pytest.raises(type(error)), array_job.job(out, "finish", site(**keys)):
        raise error


def test_a_job_on_a_failed_node_is_requeued_twice_without_that_node(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, out)
    fails(out, NodeFailed("PyTorch sees no GPU"))
    assert slurm.calls("scontrol") == [["requeue", "7"], ["update", "JobId=7", "ExcNodeList=n1"]]
    slurm.set_answers(jobs={"7": slurm.jobs["7"] | {"avoids": "n1"}})
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    fails(out, NodeFailed("PyTorch sees no GPU"))
    assert slurm.calls("scontrol")[2:] == [["requeue", "7"], ["update", "JobId=7", "ExcNodeList=n1,n2"]]
    fails(out, NodeFailed("PyTorch sees no GPU"))
    job_status = job_status_of(out, "finish")
    assert len(slurm.calls("scontrol")) == 4
    assert (job_status.state, job_status.starts, job_status.faults) == ("job_failed", 3, 3)


def test_no_node_is_excluded_in_a_small_partition_or_if_ray_was_lost(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    has_nodes(slurm, 2)
    fails(out, NodeFailed("PyTorch sees no GPU"))
    has_nodes(slurm, 9)
    fails(out, MachineFailed("Ray's own processes are gone"))
    assert slurm.calls("scontrol") == [["requeue", "7"]] * 2


def test_a_ray_that_does_not_start_or_is_lost_is_a_machine_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.setenv("SLURM_JOB_ID", "7")
        nodes = multi_node.ray_on_nodes(tmp_path, nodes=1, cpus=1, gpus=0, python=["python"])
        with pytest.raises(MachineFailed, match="Ray"), nodes:
            pytest.fail("Ray started")
    node = {"NodeID": "n", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 1}  # nothing listens at port 1
    context = SimpleNamespace(gcs_address="127.0.0.1:1", get_node_id=lambda: "n")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: context, nodes=lambda: [node]))
    monkeypatch.setattr(head_watch, "PATIENCE_S", 0.0)
    monkeypatch.setattr(head_watch.atexit, "register", lambda _: None)
    over = threading.Event()
    with pytest.raises(MachineFailed, match="Ray"):
        head_watch.while_ray_lives(over.wait)
    over.set()


def test_a_job_without_its_gpus_does_not_train_on_the_cpu_and_is_requeued(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    submitted(store, out)
    with pytest.raises(NodeFailed, match="PyTorch"), array_job.job(out, "finish", site(gpus=1)):
        pytest.fail("it began")
    assert slurm.calls("scontrol") == [["requeue", "7"], ["update", "JobId=7", "ExcNodeList=n1"]]
    status = submission_status(out)
    assert "PyTorch" in status.failed["finish"] and "modis-dist resume" not in status.advice, "its jobs are pending"
    slurm.end()
    assert "modis-dist resume" in submission_status(out).advice


def test_a_gpu_error_during_training_requeues_the_task_on_another_node(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, out)
    assert "uncorrectable ECC error" in str(trained(OF_GPU["an ECC error"], out, monkeypatch).reason)
    assert slurm.calls("scontrol") == [["requeue", "7"], ["update", "JobId=7", "ExcNodeList=n1"]]


def test_machine_failures_count_as_requeues(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    fails(out, MachineFailed("Ray's own processes are gone"), requeues=0)
    assert not slurm.calls("scontrol")


def test_sigterm_of_a_requeue_does_not_end_the_job_before_the_node_is_excluded(
    store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, out)

    def requeue(*, exclude: str | None) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return exclude is None

    monkeypatch.setattr(array_job, "requeue", requeue)
    before = signal.getsignal(signal.SIGTERM)
    fails(out, MachineFailed("Ray's own processes are gone"))
    assert signal.getsignal(signal.SIGTERM) is before
