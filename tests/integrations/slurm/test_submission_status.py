"""Status of submissions: jobs that never start, ended jobs, packs and their tasks."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modis_dist.cli import wait
from modis_dist.cli.main import run as command
from modis_dist.execution.trial import sequence_digest
from modis_dist.integrations.slurm import submit
from modis_dist.integrations.slurm.failure_reasons import why_never
from modis_dist.integrations.slurm.job_status import JobStatus, State
from modis_dist.integrations.slurm.submission import load
from modis_dist.integrations.slurm.submission_status import submission_status
from modis_dist.report.study_results import write_summary
from modis_dist.runtime.files import write_json
from modis_dist.train.journal import JournalWriter
from tests import toy_results
from tests.integrations.slurm.fake_slurm import SACCT, FakeSlurm
from tests.integrations.slurm.toy_submission import conclude, planned, site, submitted

NEVER = {
    "launch failed requeued held": "`scontrol release`",
    "JobHeldUser": "`scontrol release`",
    "QOSMaxWallDurationPerJobLimit": ": time ",
    "AssocMaxWallDurationPerJobLimit": ": time ",
    "PartitionTimeLimit": ": time ",
    "QOSMaxGRESPerJob": "change cpus, gpus, memory or nodes",
    "AssocMaxCpuPerJobLimit": "change cpus, gpus, memory or nodes",
    "QOSMinCpuNotSatisfied": "change cpus, gpus, memory or nodes",
    "AssocGrpCPUMinutesLimit": "set another account",
    "BadConstraints": "constraint",
    "InvalidAccount": "account",
}
PASSING = ["Priority", "Resources", "BeginTime", "Dependency", "JobArrayTaskLimit", "ReqNodeNotAvail", "None"]
PASSING += ["QOSMaxJobsPerUserLimit", "AssocGrpCPURunMinutesLimit", "QOSGrpNodeLimit", "QOSMaxCpuPerUserLimit"]
DOWN = "squeue: error: Unable to contact slurm controller (connect failure)\n"


def write_status(out: Path, name: str, state: State = "running", *, starts: int = 1, reason: str | None = None) -> None:
    path = out / "submission" / "status" / f"{name}.json"
    write_json(path, vars(JobStatus(state, starts, reason, "7", "n1", 0.0, load(out).code)))


# --- jobs that never start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", NEVER)
def test_a_permanent_reason_has_a_fix(reason: str) -> None:
    assert NEVER[reason] in str(why_never("PENDING", reason))


@pytest.mark.parametrize("reason", PASSING)
def test_a_temporary_reason_has_no_fix(reason: str) -> None:
    assert why_never("PENDING", reason) is None


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_held_job_never_starts(state: str) -> None:
    assert "`scontrol release`" in str(why_never(state, ""))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("PENDING", "launch failed requeued held"),
        ("PENDING", "QOSMaxWallDurationPerJobLimit"),
        ("REQUEUE_HOLD", "None"),
        ("SPECIAL_EXIT", "None"),
    ],
)
def test_a_study_whose_jobs_never_start_is_stuck_and_wait_exits_with_3(
    state: str, reason: str, slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    slurm.put("1000", state, tasks=[0, 1, 2], reason=reason)
    slurm.put("1001", "PENDING", tasks=[0], reason="Dependency")
    slurm.put("1002", "PENDING", reason="Dependency")
    status = submission_status(out)
    assert status.state == "stuck" and re.match(r"3 job.*: 1000_0: ", status.advice)
    assert f"modis-dist cancel {out}, then modis-dist resume {out} --cluster PROFILE.yaml" in status.advice
    assert command(["status", str(out), "--wait"]) == 3
    assert re.search(r"\b3 job.*: 1000_0: ", capsys.readouterr().err)


def test_a_job_that_never_starts_is_named_while_others_run(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    slurm.put("1000", "RUNNING", tasks=[0, 1, 2], nodes="n1")
    slurm.put("1001", "PENDING", tasks=[0], reason="BadConstraints")
    status = submission_status(out)
    assert status.state == "running" and status.advice.startswith("1 job(s) will not start: 1001_0: BadConstraints: ")
    assert "; wait; `modis-dist cancel" in status.advice
    slurm.put("1000", "PENDING", tasks=[0, 1, 2], reason="Priority")
    assert submission_status(out).state == "waiting"


# --- how jobs ended ---------------------------------------------------------------------------------------------


def allocation(store: Path, out: Path) -> None:
    submit.submit(planned(store, out), site(), form="allocation", out=out)


@pytest.mark.parametrize(("state", "what"), [("OUT_OF_MEMORY", "raise memory"), ("TIMEOUT", "raise warning_s")])
def test_an_allocation_that_slurm_ended_is_shown_with_the_key_to_change(
    state: str, what: str, slurm: FakeSlurm, store: Path, out: Path
) -> None:
    allocation(store, out)
    write_status(out, "allocation")
    slurm.end()
    slurm.set_answers(sacct=[SACCT, f"1000|{state}|n1"])
    status = submission_status(out)
    assert status.state == "stopped" and f"job {state}; " in status.failed["allocation"]
    assert what in status.failed["allocation"] and what in status.advice and "--cluster PROFILE.yaml" in status.advice


def test_tasks_without_status_files_hint_at_a_folder_that_nodes_do_not_see(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    slurm.end()
    slurm.set_answers(
        sacct=[SACCT, *(f"1000_{task}|FAILED|n1" for task in range(3)), "1001_0|FAILED|n1", "1002|CANCELLED|"]
    )
    status = submission_status(out)
    assert set(status.failed) == {f"pack-{number}" for number in range(4)}
    assert all(reason.startswith("job FAILED ") for reason in status.failed.values())
    assert str(out) in status.advice and "`srun ls`" in status.advice and "--out" in status.advice
    assert command(["status", str(out)]) == 0
    assert re.search(r"failed: .*\bpack-0: .*\bFAILED\b", capsys.readouterr().out)


def test_the_reason_of_a_job_precedes_slurms_state(slurm: FakeSlurm, store: Path, out: Path) -> None:
    allocation(store, out)
    write_status(out, "allocation", "job_failed", reason="Ray's own processes are gone")
    slurm.end()
    slurm.set_answers(sacct=[SACCT, "1000|OUT_OF_MEMORY|n1"])
    reason = submission_status(out).failed["allocation"]
    assert reason.startswith("Ray's own processes are gone; job OUT_OF_MEMORY; ") and "raise memory" in reason
    slurm.set_answers(sacct=[SACCT, "1000|FAILED|n1"])
    assert submission_status(out).failed["allocation"].startswith("Ray's own processes are gone (log: ")


@pytest.mark.parametrize(("kind", "warned"), [("tmpfs", True), ("ext4", True), ("nfs4", False), ("lustre", False)])
@pytest.mark.usefixtures("slurm")
def test_submit_and_dry_run_warn_of_local_file_systems(
    kind: str,
    warned: bool,
    store: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(submit, "file_system", lambda _: kind)
    submit.scripts_of(planned(store, out), site(), form="array", out=out)
    submitted(store, out)
    names = [f"{out} ({kind})" in text and f"{store} ({kind})" in text for text in caplog.messages]
    assert names == [True, True] * warned
    caplog.clear()
    submit.scripts_of(planned(store, out), site(executor="local"), form="array", out=out)
    assert not caplog.messages


# --- waiting ----------------------------------------------------------------------------------------------------


def test_status_wait_exits_with_the_code_of_the_study(
    slurm: FakeSlurm,
    store: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitted(store, out)

    def ends(_: float) -> None:
        slurm.end()
        conclude(out, [trial for pack in load(out).packs for trial in pack])
        write_summary(out, toy_results.summary(failures={"x": "loss is nan"}))

    monkeypatch.setattr(wait, "time", SimpleNamespace(sleep=ends))
    assert command(["status", str(out), "--wait", "--json"]) == 4
    captured = capsys.readouterr()
    assert (
        json.loads(captured.out)["failures"] == {"x": "loss is nan"}
        and "1 trial(s) failed (loss is nan)" in captured.err
    )


@pytest.mark.usefixtures("slurm")
def test_an_interrupted_wait_exits_with_75_and_names_the_commands(
    store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wait, "time", SimpleNamespace(sleep=interrupted))
    assert command(["status", str(out), "--wait"]) == 75
    stderr = capsys.readouterr().err
    assert (
        f"`modis-dist status {out} --wait`" in stderr
        and f"`modis-dist cancel {out}`" in stderr
        and "same command" not in stderr
    )


def test_wait_without_a_submission_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["status", str(tmp_path), "--wait"]) == 2
    assert f"--wait: {tmp_path}: " in capsys.readouterr().err


# --- packs and their tasks --------------------------------------------------------------------------------------


def write_killed_pack(out: Path, number: int, epochs: int) -> str:
    """Write a pack as a killed task leaves it: with a journal, and a lock of another machine."""
    (trial,) = load(out).packs[number]
    pack = sequence_digest([trial])
    folder = out / "packs" / pack
    folder.mkdir(parents=True)
    write_json(folder / "lock", {"pid": 1, "host": "n9", "started": time.time()})
    with JournalWriter(folder / "journal.jsonl") as journal:
        for epoch in range(1, epochs + 1):
            journal.metrics(trial, step=epoch, values={"train/total_g": 1.0})
    return pack


def states(out: Path) -> dict[str, Any]:
    return {pack.id: pack.state for pack in submission_status(out).study.packs}


def test_a_running_pack_is_shown_with_task_node_and_requeues_and_a_pending_one_is_not_running(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    first, last = write_killed_pack(out, 0, 2), write_killed_pack(out, 3, 3)
    write_status(out, "pack-0", starts=3)
    slurm.put("1000", "PENDING", tasks=[0, 1, 2], reason="BeginTime")
    assert states(out)[first] == states(out)[last] == "stopped" and submission_status(out).study.eta_s is None
    slurm.put("1000", "RUNNING", tasks=[0, 1, 2], nodes="n4")
    assert (states(out)[first], states(out)[last]) == ("running", "stopped")
    task = next(task for task in submission_status(out).tasks if task.pack == first)
    log = str(out / "submission" / "logs" / "1000_0.log")
    assert (task.job, task.state, task.node, task.restarts, task.log) == ("1000_0", "RUNNING", "n4", 2, log)
    assert command(["status", str(out)]) == 0
    stdout = " ".join(capsys.readouterr().out.split())
    assert "epoch 2 of 4" in stdout and "epoch 3 of 4" not in stdout
    assert re.search(r"\b1000_0 on n4, requeued 2\b", stdout)
    assert command(["status", str(out), "--json"]) == 0
    tasks = {each["pack"]: each for each in json.loads(capsys.readouterr().out)["submission"]["tasks"]}
    assert (tasks[first]["node"], tasks[last]["state"]) == ("n4", "PENDING") and len(tasks) == 4


def test_a_pack_is_not_called_stopped_while_the_queue_does_not_answer(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    pack = write_killed_pack(out, 0, 2)
    slurm.set_answers(squeue=DOWN)
    assert submission_status(out).state == "unknown" and states(out)[pack] == "running"
