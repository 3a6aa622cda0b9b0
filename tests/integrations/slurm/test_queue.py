"""Slurm's queue: states of jobs, refusals, missing answers."""

import os
from collections import Counter
from pathlib import Path

import pytest

from modis_dist.integrations.slurm import queue, slurm_commands
from modis_dist.integrations.slurm.queue import Job, QueueUnknown, SlurmQueue, requeue
from modis_dist.runtime.errors import RunFailed, UserError
from tests.integrations.slurm.fake_slurm import SACCT, FakeSlurm

DOWN = "squeue: error: Unable to contact slurm controller (connect failure)\n"
LATE = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n"
SCRIPT = "#!/bin/bash\n#SBATCH --array=0-2%2\ntrue\n"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr(queue.time, "sleep", lambda _: None)
    monkeypatch.setattr(queue, "LATE_S", 0.5)
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out" / "scripts").mkdir(parents=True)
    return tmp_path / "out"


def sent(folder: Path, *after: str) -> str:
    return SlurmQueue().submit(SCRIPT, folder=folder, mark="modis-1", tasks=[0, 1, 2], after=after)


# --- asking -----------------------------------------------------------------------------------------------------


def test_live_jobs_come_from_squeue_and_ended_ones_from_sacct(slurm: FakeSlurm) -> None:
    slurm.put("7", "RUNNING", tasks=[5, 6], nodes="n1")
    slurm.put("8", "PENDING", reason="Dependency")
    slurm.put("9", "RUNNING")  # another study's
    slurm.set_answers(
        sacct=[SACCT, "7_0|COMPLETED|n2", "7_1|CANCELLED by 0|None assigned", "7_[5-9%2]|FAILED|n3", "8|FAILED|"]
    )
    jobs = SlurmQueue().jobs(["7", "8"])
    assert {name: (job.state, job.live) for name, job in jobs.items()} == {
        "7_0": ("COMPLETED", False),
        "7_1": ("CANCELLED", False),
        "7_5": ("RUNNING", True),
        "7_6": ("RUNNING", True),
        "8": ("PENDING", True),
        **{f"7_{task}": ("FAILED", False) for task in (7, 8, 9)},
    }
    assert jobs["7_5"].nodes == "n1" and jobs["7_0"].nodes == "n2"
    assert jobs["8"].reason == "Dependency" and jobs["7_5"].reason == ""
    assert Counter(job.state for job in jobs.values()) == {
        "COMPLETED": 1,
        "CANCELLED": 1,
        "RUNNING": 2,
        "FAILED": 3,
        "PENDING": 1,
    }


def test_a_job_that_is_pending_again_after_a_node_failure_is_live(slurm: FakeSlurm) -> None:
    slurm.put("7", "PENDING", reason="BeginTime")
    slurm.set_answers(sacct=[SACCT, "7|NODE_FAIL|n1"])
    assert SlurmQueue().jobs(["7"]) == {"7": Job("7", "PENDING", "BeginTime", "")}
    assert SlurmQueue().jobs(["7"])["7"].live


@pytest.mark.parametrize("lost", ["RUNNING", "PENDING", "REQUEUED"])
def test_a_job_that_is_live_in_sacct_only_is_left_out(lost: str, slurm: FakeSlurm) -> None:
    slurm.set_answers(sacct=[SACCT, f"7|{lost}|n1", "8|COMPLETED|n1"])
    assert {name: job.state for name, job in SlurmQueue().jobs(["7", "8"]).items()} == {"8": "COMPLETED"}


@pytest.mark.parametrize("answer", ["Slurm accounting storage is disabled\n", [], [SACCT]])
def test_without_accounting_jobs_come_from_squeue(answer: str | list[str], slurm: FakeSlurm) -> None:
    slurm.put("7", "RUNNING", tasks=[0])
    slurm.set_answers(sacct=answer)
    assert set(SlurmQueue().jobs(["7"])) == {"7_0"}


def test_without_sacct_jobs_come_from_squeue(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.put("7", "RUNNING")
    (slurm.bin / "sacct").unlink()
    monkeypatch.setenv("PATH", str(slurm.bin))
    assert set(SlurmQueue().jobs(["7"])) == {"7"}


def test_without_job_ids_slurm_is_not_queried(slurm: FakeSlurm) -> None:
    assert SlurmQueue().jobs([]) == {}
    SlurmQueue().cancel([])
    assert not slurm.calls("squeue") and not slurm.calls("sacct") and not slurm.calls("scancel")


@pytest.mark.parametrize(
    "state",
    [
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
        "RESIZING",
        "SIGNALING",
    ],
)
def test_a_job_in_this_state_is_live(state: str) -> None:
    assert Job("1", state).live


@pytest.mark.parametrize(
    "state",
    [
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
        "REVOKED",
    ],
)
def test_a_job_in_this_state_has_ended(state: str) -> None:
    assert not Job("1", state).live


def test_the_state_is_unknown_while_the_controller_is_down(slurm: FakeSlurm) -> None:
    slurm.set_answers(squeue=DOWN, sacct=[SACCT, "7|FAILED|n1"])
    with pytest.raises(QueueUnknown) as caught:
        SlurmQueue().jobs(["7"])
    assert "Unable to contact slurm controller (connect failure)" in str(caught.value)
    assert caught.value.exit_code == RunFailed.exit_code


def test_the_state_is_unknown_if_a_command_hangs_or_is_missing(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_commands, "TIMEOUT_S", 0.2)
    (slurm.bin / "squeue").write_text("#!/bin/sh\nexec sleep 20\n")
    with pytest.raises(QueueUnknown, match="squeue"):
        SlurmQueue().marked("modis-1")
    (slurm.bin / "squeue").unlink()
    monkeypatch.setenv("PATH", str(slurm.bin))
    with pytest.raises(QueueUnknown, match="squeue"):
        SlurmQueue().marked("modis-1")


# --- submitting -------------------------------------------------------------------------------------------------


def test_a_script_is_submitted_unchanged_and_no_pickle_is_written(slurm: FakeSlurm, folder: Path) -> None:
    assert sent(folder) == "1000" and sent(folder, "5", "6") == "1001"
    first, second = slurm.jobs["1000"], slurm.jobs["1001"]
    assert first["text"] == SCRIPT and first["tasks"] == [0, 1, 2]
    assert first["chdir"] == str(folder) and first["comment"] == "modis-1" and "dependency" not in first
    assert second["dependency"] == "afterany:5:6"
    assert any(path.read_text() == SCRIPT for path in (folder / "scripts").rglob("*.sh"))
    assert not list(folder.rglob("*.pkl")) and not list(folder.rglob("*pickle*"))


def test_a_refusal_of_sbatch_is_quoted(slurm: FakeSlurm, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: bad name\n"
    slurm.set_answers(sbatch=[refusal])
    with pytest.raises(UserError) as caught:
        sent(folder)
    assert str(caught.value) == "sbatch: invalid partition specified: nope; Batch job submission failed: bad name"
    assert not slurm.jobs and capsys.readouterr() == ("", "")


def test_a_job_that_was_accepted_although_sbatch_timed_out_is_found_by_its_mark(slurm: FakeSlurm, folder: Path) -> None:
    slurm.put("999", "RUNNING", tasks=[0, 1])
    slurm.set_answers(sbatch=[f"+{LATE}"])
    assert sent(folder) == "1000"
    assert len(slurm.calls("sbatch")) == 1 and set(slurm.jobs) == {"999", "1000"}


def test_a_job_whose_id_sbatch_does_not_print_is_found_by_its_mark(slurm: FakeSlurm, folder: Path) -> None:
    genuine = slurm.bin / "sbatch"
    genuine.write_text(genuine.read_text().replace("Submitted batch job", "thank you for"))
    assert sent(folder) == "1000" and len(slurm.calls("sbatch")) == 1


def test_a_job_that_timed_out_and_never_appears_was_not_submitted(slurm: FakeSlurm, folder: Path) -> None:
    slurm.set_answers(sbatch=[LATE])
    with pytest.raises(UserError, match=r"Socket timed out on send/recv operation"):
        sent(folder)


def test_if_sbatch_and_squeue_do_not_answer_the_submission_is_unknown(slurm: FakeSlurm, folder: Path) -> None:
    slurm.set_answers(sbatch=[f"+{LATE}"], squeue=DOWN)
    with pytest.raises(QueueUnknown, match="Socket timed out"):
        sent(folder)


@pytest.mark.parametrize("program", ["sbatch", "squeue", "scancel", "scontrol", "srun"])
def test_without_slurm_nothing_is_submitted_and_the_local_profile_is_named(
    program: str, slurm: FakeSlurm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.bin / program).unlink()
    monkeypatch.setenv("PATH", str(slurm.bin))
    with pytest.raises(UserError, match=f"{program} .*PATH.*--cluster cluster/local.yaml") as caught:
        sent(folder)
    assert caught.value.exit_code == 2 and not slurm.jobs


def test_sbatch_variables_do_not_override_the_script(
    slurm: FakeSlurm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    genuine = slurm.bin / "sbatch"
    genuine.rename(slurm.bin / "genuine")
    genuine.write_text('#!/bin/sh\n[ -z "${SBATCH_PARTITION+set}" ] && exec "$(dirname "$0")/genuine" "$@"\n')
    genuine.chmod(0o700)
    (slurm.bin / "genuine").write_text(
        (slurm.bin / "genuine").read_text().replace("Path(sys.argv[0]).name", "'sbatch'")
    )
    assert sent(folder) == "1000" and os.environ["SBATCH_PARTITION"] == "other"


# --- queueing again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "requeued"),
    [("RUNNING", True), ("PENDING", False), ("COMPLETING", False), ("CANCELLED", False)],
)
def test_only_a_running_job_is_requeued(
    state: str, requeued: bool, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    slurm.put("7", state)
    assert requeue() is requeued
    assert (["requeue", "7"] in slurm.calls("scontrol")) is requeued


def test_a_cancelled_job_is_not_requeued(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert requeue() is False and not slurm.calls("scontrol")


def test_the_task_with_the_id_of_its_array_requeues_only_itself(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    slurm.put("7", "RUNNING", tasks=[0, 1, 2])
    assert requeue() is True
    assert slurm.calls("scontrol") == [["requeue", "7_2"]] and slurm.calls("squeue")[0][2] == "7_2"
