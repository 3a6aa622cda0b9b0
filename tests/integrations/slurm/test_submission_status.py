"""What is told of a submission: of jobs that never start, of how jobs ended, of packs and who trains them."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modis_dist.cli import wait
from modis_dist.cli.main import run as command
from modis_dist.execution.trial import sequence_digest
from modis_dist.integrations.slurm import shared_fs, submit
from modis_dist.integrations.slurm.failure_reasons import why_never
from modis_dist.integrations.slurm.job_notes import Note, State
from modis_dist.integrations.slurm.submission import load
from modis_dist.integrations.slurm.submission_status import submission_status
from modis_dist.runtime.files import write_json
from modis_dist.train.journal import JournalWriter
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
    "AssocGrpCPUMinutesLimit": "hours of the account",
    "BadConstraints": "constraint",
    "InvalidAccount": "account",
}
PASSING = ["Priority", "Resources", "BeginTime", "Dependency", "JobArrayTaskLimit", "ReqNodeNotAvail", "None"]
PASSING += ["QOSMaxJobsPerUserLimit", "AssocGrpCPURunMinutesLimit", "QOSGrpNodeLimit", "QOSMaxCpuPerUserLimit"]
DOWN = "squeue: error: Unable to contact slurm controller (connect failure)\n"


def note(out: Path, name: str, state: State = "running", *, starts: int = 1, reason: str | None = None) -> None:
    path = out / "submission" / "status" / f"{name}.json"
    write_json(path, vars(Note(state, starts, reason, "7", "n1", 0.0, load(out).code)))


# --- jobs that never start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", NEVER)
def test_a_reason_that_does_not_pass_by_waiting_has_its_advice(reason: str) -> None:
    assert NEVER[reason] in str(why_never("PENDING", reason))


@pytest.mark.parametrize("reason", PASSING)
def test_a_reason_that_passes_by_waiting_has_none(reason: str) -> None:
    assert why_never("PENDING", reason) is None


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_job_that_is_held_after_it_failed_never_starts_by_itself(state: str) -> None:
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
def test_a_study_whose_jobs_never_start_is_stuck_and_waiting_for_it_ends_with_exit_code_3(
    state: str, reason: str, slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    slurm.put("1000", state, tasks=[0, 1, 2], reason=reason)
    slurm.put("1001", "PENDING", tasks=[0], reason="Dependency")
    slurm.put("1002", "PENDING", reason="Dependency")
    found = submission_status(out)
    assert found.state == "stuck" and found.advice.startswith("3 job(s) will not start: 1000_0: ")
    assert f"modis-dist cancel {out}, then modis-dist resume {out} --cluster PROFILE.yaml" in found.advice
    assert command(["status", str(out), "--wait"]) == 3
    assert "3 job(s) will not start: 1000_0: " in capsys.readouterr().err


def test_a_study_of_which_one_job_never_starts_goes_on_and_says_so(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    slurm.put("1000", "RUNNING", tasks=[0, 1, 2], nodes="n1")
    slurm.put("1001", "PENDING", tasks=[0], reason="BadConstraints")
    found = submission_status(out)
    assert found.state == "running" and found.advice.startswith("1 job(s) will not start: 1001_0: BadConstraints: ")
    assert "; wait; `modis-dist cancel" in found.advice
    slurm.put("1000", "PENDING", tasks=[0, 1, 2], reason="Priority")
    assert submission_status(out).state == "waiting"


# --- how jobs ended ---------------------------------------------------------------------------------------------


def allocation(store: Path, out: Path) -> None:
    submit.submit(planned(store, out), site(), form="allocation", out=out)


@pytest.mark.parametrize(("state", "what"), [("OUT_OF_MEMORY", "raise memory"), ("TIMEOUT", "raise warning_s")])
def test_an_allocation_that_slurm_ended_is_named_with_what_to_change(
    state: str, what: str, slurm: FakeSlurm, store: Path, out: Path
) -> None:
    allocation(store, out)
    note(out, "allocation")
    slurm.end()
    slurm.be(sacct=[SACCT, f"1000|{state}|n1"])
    found = submission_status(out)
    assert found.state == "stopped" and f"job {state}; " in found.failed["allocation"]
    assert what in found.failed["allocation"] and what in found.advice and "--cluster PROFILE.yaml" in found.advice


def test_tasks_that_failed_without_a_word_lead_to_the_question_whether_nodes_see_the_folder(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    slurm.end()
    slurm.be(sacct=[SACCT, *(f"1000_{task}|FAILED|n1" for task in range(3)), "1001_0|FAILED|n1", "1002|CANCELLED|"])
    found = submission_status(out)
    assert set(found.failed) == {f"pack-{number}" for number in range(4)}
    assert all(reason.startswith("job FAILED ") for reason in found.failed.values())
    assert str(out) in found.advice and "`srun ls`" in found.advice and "--out" in found.advice
    assert command(["status", str(out)]) == 0
    assert "failed: job pack-0: job FAILED" in capsys.readouterr().out


def test_a_reason_that_a_job_gave_itself_is_kept_beside_how_slurm_says_it_ended(
    slurm: FakeSlurm, store: Path, out: Path
) -> None:
    allocation(store, out)
    note(out, "allocation", "broken", reason="Ray's own processes are gone")
    slurm.end()
    slurm.be(sacct=[SACCT, "1000|OUT_OF_MEMORY|n1"])
    said = submission_status(out).failed["allocation"]
    assert said.startswith("Ray's own processes are gone; job OUT_OF_MEMORY; ") and "raise memory" in said
    slurm.be(sacct=[SACCT, "1000|FAILED|n1"])
    assert submission_status(out).failed["allocation"].startswith("Ray's own processes are gone (log: ")


@pytest.mark.parametrize(("kind", "said"), [("tmpfs", True), ("ext4", True), ("nfs4", False), ("lustre", False)])
@pytest.mark.usefixtures("slurm")
def test_folders_that_other_nodes_may_not_see_are_named_before_jobs_are_sent_and_in_the_dry_run(
    kind: str,
    said: bool,
    store: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shared_fs, "file_system", lambda _: kind)
    submit.scripts_of(planned(store, out), site(), form="array", out=out)
    submitted(store, out)
    names = [f"--out: {out} ({kind}) and the store: {store} ({kind})" in text for text in caplog.messages]
    assert names == [True, True] * said
    caplog.clear()
    submit.scripts_of(planned(store, out), site(executor="local"), form="array", out=out)
    assert not caplog.messages


# --- waiting ----------------------------------------------------------------------------------------------------


def test_waiting_can_be_taken_up_again_and_ends_with_the_exit_code_of_the_study(
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
        write_json(out / "summary.json", {"failures": {"x": "loss is nan"}})

    monkeypatch.setattr(wait, "time", SimpleNamespace(sleep=ends))
    assert command(["status", str(out), "--wait", "--json"]) == 4
    told = capsys.readouterr()
    assert json.loads(told.out) == {"failures": {"x": "loss is nan"}} and "1 trials failed (loss is nan)" in told.err


@pytest.mark.usefixtures("slurm")
def test_a_wait_that_is_interrupted_says_that_the_jobs_go_on_and_how_to_wait_again(
    store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wait, "time", SimpleNamespace(sleep=interrupted))
    assert command(["status", str(out), "--wait"]) == 75
    said = capsys.readouterr().err
    assert (
        f"`modis-dist status {out} --wait`" in said
        and f"`modis-dist cancel {out}`" in said
        and "same command" not in said
    )


def test_where_nothing_was_submitted_there_is_nothing_to_wait_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["status", str(tmp_path), "--wait"]) == 2
    assert f"--wait: {tmp_path}: " in capsys.readouterr().err


# --- packs and who trains them ----------------------------------------------------------------------------------


def left_by_a_lost_node(out: Path, number: int, epochs: int) -> str:
    """A pack as a killed task leaves it: with records, and its lock in the name of another machine."""
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


def test_a_pack_whose_task_waits_is_not_shown_as_running_and_one_that_runs_is_shown_with_task_node_and_requeues(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    first, last = left_by_a_lost_node(out, 0, 2), left_by_a_lost_node(out, 3, 3)
    note(out, "pack-0", starts=3)
    slurm.put("1000", "PENDING", tasks=[0, 1, 2], reason="BeginTime")
    assert states(out)[first] == states(out)[last] == "stopped" and submission_status(out).study.eta_s is None
    slurm.put("1000", "RUNNING", tasks=[0, 1, 2], nodes="n4")
    assert (states(out)[first], states(out)[last]) == ("running", "stopped")
    task = next(task for task in submission_status(out).tasks if task.pack == first)
    log = str(out / "submission" / "logs" / "1000_0.log")
    assert (task.job, task.state, task.node, task.restarts, task.log) == ("1000_0", "RUNNING", "n4", 2, log)
    assert command(["status", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "epoch 2 of 4" in said and "job 1000_0 on n4, requeued 2 times" in said and "epoch 3 of 4" not in said
    assert command(["status", str(out), "--json"]) == 0
    told = {each["pack"]: each for each in json.loads(capsys.readouterr().out)["submission"]["tasks"]}
    assert (told[first]["node"], told[last]["state"]) == ("n4", "PENDING") and len(told) == 4


def test_where_the_queue_is_silent_nobody_says_that_a_pack_does_not_run(
    slurm: FakeSlurm, store: Path, out: Path
) -> None:
    submitted(store, out)
    pack = left_by_a_lost_node(out, 0, 2)
    slurm.be(squeue=DOWN)
    assert submission_status(out).state == "unknown" and states(out)[pack] == "running"
