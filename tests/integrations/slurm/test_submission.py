"""Submissions with fake Slurm commands: what is recorded, sent and refused. No job runs."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.integrations.slurm import queue, submission, submit
from modis_dist.integrations.slurm.form import allocation_slots, check_profile, form_of
from modis_dist.integrations.slurm.job_status import JobStatus, record_job_status
from modis_dist.integrations.slurm.queue import QueueUnknown, SlurmQueue
from modis_dist.integrations.slurm.submission import load
from modis_dist.integrations.slurm.submission_status import submission_status
from modis_dist.integrations.slurm.submit import chunks, jobs_of
from modis_dist.runtime.errors import ConfigError, DataError, UserError
from modis_dist.runtime.files import write_json
from modis_dist.study.plan import plan
from tests.integrations.slurm.fake_slurm import SACCT, FakeSlurm
from tests.integrations.slurm.toy_submission import (
    SINGLE,
    conclude,
    finish_packs,
    planned,
    rows,
    site,
    study,
    submitted,
)
from tests.study.toy_study import write_study

DOWN = "squeue: error: Unable to contact slurm controller (connect failure)\n"
LATE = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n"
REFUSED = "sbatch: error: Batch job submission failed: Invalid account\n"


class Killed(BaseException):
    """Simulated kill of the submitting process."""


# --- form -------------------------------------------------------------------------------------------------------

OPTUNA = {"grid": {}, "search": {"kind": "optuna"}, "space": {"objective.beta": {"low": 0.1, "high": 0.9}}}
TOGETHER = {
    "sweep.search": (OPTUNA, ()),
    "sweep.pruning": ({"pruning": {"min_epochs": 1}}, ()),
    "trainer.workers": ({"executor": "ray"}, ("trainer.workers=2",)),
}


@pytest.mark.parametrize("reason", TOGETHER)
def test_a_study_with_dependent_packs_needs_an_allocation(reason: str, store: Path) -> None:
    sweep, overrides = TOGETHER[reason]
    loaded = study(store, *overrides, **sweep)
    form, form_reason = form_of(loaded, site(), requested=None)
    assert form == "allocation" and reason in form_reason
    assert form_of(loaded, site(), requested="allocation")[0] == "allocation"
    with pytest.raises(UserError, match=f"--form array: .*{reason}"):
        form_of(loaded, site(), requested="array")
    with pytest.raises(UserError, match=f"sweep: .*{reason}.*`modis-dist tune`"):
        form_of(loaded, site(executor="local"), requested=None)


def test_a_study_that_fits_at_once_is_an_allocation_others_an_array(store: Path) -> None:
    loaded = study(store)
    form, reason = form_of(loaded, site(cpus=4), requested=None)
    assert form == "allocation" and "4 trials" in reason and "1 node(s)" in reason
    form, reason = form_of(loaded, site(cpus=3), requested=None)
    assert form == "array" and "4 trials" in reason and "3 at once" in reason
    form, reason = form_of(loaded, site(cpus=4), requested="array")
    assert form == "array" and "--form" in reason


def test_a_profile_with_several_gpus_means_an_allocation(store: Path) -> None:
    form, reason = form_of(study(store), site(gpus=4), requested=None)
    assert form == "allocation" and "4 GPUs" in reason
    with pytest.raises(UserError, match=r"--form array: .*\b4\b.* gpus: 1"):
        form_of(study(store), site(gpus=4), requested="array")
    assert form_of(study(store), site(gpus=1), requested=None)[0] == "array"


def test_a_local_profile_means_an_array(store: Path) -> None:
    form, reason = form_of(study(store), site(executor="local", cpus=64), requested=None)
    assert form == "array" and "trials" not in reason
    with pytest.raises(UserError, match=r"--form allocation: .*`modis-dist tune`"):
        form_of(study(store), site(executor="local"), requested="allocation")


def test_allocation_slots_are_counted_in_gpus_or_cores(store: Path) -> None:
    assert allocation_slots(study(store), site(gpus=4, cpus=8, nodes=3)) == 12
    assert allocation_slots(study(store), site(gpus=4, cpus=2, nodes=3)) == 6, "a slot needs a core"
    assert allocation_slots(study(store, resources={"gpus": 0.25}), site(gpus=4, cpus=32, nodes=2)) == 32
    assert allocation_slots(study(store, resources={"cpus": 4}), site(cpus=9, nodes=2)) == 4
    assert allocation_slots(study(store, resources={"cpus": 8}), site(cpus=4)) == 1


def test_trials_are_counted_over_conditions_folds_replicates_and_samples(store: Path) -> None:
    combined = {"conditions": {"a": {}, "b": {"objective.penalty_weight": 1.0}}, "folds": 2, "replicates": 3}
    space = {"objective.beta": {"low": 0.1, "high": 0.9}}
    drawn = combined | {"grid": {}, "space": space, "search": {"kind": "random", "configurations": 5}}
    for sweep, trials in ((combined, 24), (drawn, 60)):
        assert form_of(study(store, **sweep), site(cpus=trials), requested=None)[0] == "allocation"
        assert form_of(study(store, **sweep), site(cpus=trials - 1), requested=None)[0] == "array"


# --- numbers ----------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 300), max_size=60), st.integers(1, 40))
def test_every_pack_is_in_one_chunk_and_no_index_is_too_large(drawn: set[int], max_tasks: int) -> None:
    numbers = sorted(drawn)
    arrays = chunks(numbers, max_tasks)
    assert [first + index for first, indices in arrays for index in indices] == numbers
    assert all(indices[0] == 0 and max(indices) < max_tasks for _, indices in arrays)


@given(st.sets(st.integers(0, 300), max_size=60))
def test_the_number_of_arrays_is_minimal(drawn: set[int]) -> None:
    assert len(chunks(range(len(drawn)), 7)) == -(-len(drawn) // 7)


def test_an_array_has_a_finish_job_and_an_allocation_is_one_job() -> None:
    jobs = jobs_of("array", [0, 1, 2, 5], site(max_array=3))
    assert [(job.kind, job.first, job.indices) for job in jobs] == [
        ("array", 0, (0, 1, 2)),
        ("array", 5, (0,)),
        ("finish", 0, ()),
    ]
    assert [job.kind for job in jobs_of("array", [], site())] == ["finish"]
    assert [job.kind for job in jobs_of("allocation", [], site())] == ["allocation"]
    assert len({job.mark for job in jobs}) == 3 and all(job.number is None for job in jobs)


# --- sending ----------------------------------------------------------------------------------------------------


def test_chunks_wait_for_each_other_and_the_last_job_for_all(slurm: FakeSlurm, store: Path, out: Path) -> None:
    before = submitted(store, out)
    first, second, last = slurm.jobs.values()
    assert load(out) == before and before.numbers == ["1000", "1001", "1002"]
    assert "dependency" not in first and second["dependency"] == "afterany:1000"
    assert last["dependency"] == "afterany:1000:1001"
    assert first["tasks"] == [0, 1, 2] and second["tasks"] == [0] and "$((3 + SLURM_ARRAY_TASK_ID))" in second["text"]
    assert [job["comment"] for job in slurm.jobs.values()] == [sent.mark for sent in before.sent]
    assert {job["chdir"] for job in slurm.jobs.values()} == {str(out / "submission")}
    expected = {trial.id for trial in planned(store, out).manifest.trials}
    assert [len(pack) for pack in before.packs] == [1] * 4 and {
        trial for pack in before.packs for trial in pack
    } == expected


@pytest.mark.usefixtures("slurm")
def test_files_of_a_submission_are_private_and_not_pickles(store: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "study.yaml", store, **SINGLE)
    profile = tmp_path / "site.yaml"
    profile.write_text(yaml12.dump({"max_array": 3, "cpus": 1}))
    out = tmp_path / "deep" / "out"
    assert command(["submit", str(file), "--cluster", str(profile), "--out", str(out)]) == 0
    files = [out, *out.rglob("*")]
    assert len(files) > 10 and not [path for path in files if path.lstat().st_mode & 0o077 and not path.is_symlink()]
    assert not [path for path in files if "pickle" in path.name or path.suffix == ".pkl"]


def test_a_refused_submission_is_not_recorded_and_can_be_repeated(slurm: FakeSlurm, store: Path, out: Path) -> None:
    slurm.set_answers(sbatch=[REFUSED])
    with pytest.raises(UserError, match=r"sbatch: .*Invalid account"):
        submitted(store, out)
    assert load(out).sent == () and submission_status(out).state == "stopped"
    assert "`modis-dist submit`" in submission_status(out).advice
    assert len(submitted(store, out).sent) == 3 and len(slurm.jobs) == 3


def test_if_a_later_job_is_refused_the_earlier_ones_are_cancelled(slurm: FakeSlurm, store: Path, out: Path) -> None:
    slurm.set_answers(sbatch=[None, REFUSED])
    with pytest.raises(UserError, match="Invalid account"):
        submitted(store, out)
    assert load(out).sent == () and slurm.calls("scancel") == [["1000"]]
    assert len(submitted(store, out).sent) == 3


def test_a_job_that_timed_out_but_was_accepted_is_submitted_once(slurm: FakeSlurm, store: Path, out: Path) -> None:
    slurm.set_answers(sbatch=[f"+{LATE}"])
    assert submitted(store, out).numbers == ["1000", "1001", "1002"] == list(slurm.jobs)


def test_a_job_that_appears_long_after_a_timeout_is_found_by_its_mark(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "LATE_S", 0.1)
    monkeypatch.setattr(queue.time, "sleep", lambda _: None)
    slurm.set_answers(sbatch=[LATE])
    with pytest.raises(UserError, match=r"sbatch: .*timed out"):
        submitted(store, out)
    (doubtful,) = load(out).sent
    assert doubtful.number is None and submission_status(out).state == "stopped"
    slurm.put("1000", "PENDING", tasks=[0])
    slurm.set_answers(jobs={"1000": slurm.jobs["1000"] | {"comment": doubtful.mark}})
    with pytest.raises(UserError, match=r"\b1 .*\(1000_0\)"):
        submitted(store, out)
    assert load(out).numbers == ["1000"] and submit.cancel(out) == ["1000_0"] and not slurm.jobs


def test_while_a_submission_is_unknown_no_second_job_is_sent(slurm: FakeSlurm, store: Path, out: Path) -> None:
    slurm.set_answers(sbatch=[f"+{LATE}"], squeue=DOWN)
    for _ in range(2):
        with pytest.raises(QueueUnknown):
            submitted(store, out)
    assert [sent.number for sent in load(out).sent] == [None] and list(slurm.jobs) == ["1000"]
    slurm.set_answers(squeue=None)
    with pytest.raises(UserError, match=r"\b3 .*\(1000_0, 1000_1, 1000_2\)"):
        submitted(store, out)
    assert load(out).numbers == ["1000"] == list(slurm.jobs)


def test_after_a_kill_before_sbatch_the_same_command_sends_every_job_once(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> str:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SlurmQueue, "submit", killed)
        submitted(store, out)
    assert [sent.number for sent in load(out).sent] == [None]
    assert submitted(store, out).numbers == ["1000", "1001", "1002"] == list(slurm.jobs)


def test_after_a_kill_after_sbatch_the_job_is_found_by_its_mark_and_not_sent_twice(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = SlurmQueue.submit

    def killed(*given: Any, **named: Any) -> str:
        genuine(*given, **named)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SlurmQueue, "submit", killed)
        submitted(store, out)
    with pytest.raises(UserError, match=r"\(1000_0, "):
        submitted(store, out)
    assert load(out).numbers == ["1000"] == list(slurm.jobs)
    with pytest.raises(UserError, match=r"\(1000_0, "):
        submit.resume(out)
    slurm.end()
    finish_packs(out, [0, 1, 2])
    assert submit.resume(out).numbers == ["1000", "1001", "1002"]
    assert slurm.jobs["1001"]["tasks"] == [0] and "$((3 + " in slurm.jobs["1001"]["text"]


def test_a_second_submission_from_a_folder_is_refused(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    with pytest.raises(UserError, match=r"\(1000_0, .*`modis-dist status`.*`modis-dist cancel`"):
        submitted(store, out)
    slurm.end()
    with pytest.raises(UserError, match="`modis-dist resume`"):
        submitted(store, out)
    assert len(slurm.calls("sbatch")) == 3


def cli(tmp_path: Path, store: Path, out: Path, *options: str, **keys: Any) -> int:
    file = write_study(tmp_path / "study.yaml", store, **SINGLE)
    profile = tmp_path / "site.yaml"
    profile.write_text(yaml12.dump({"cpus": 1, "max_array": 3} | keys))
    return command(["submit", str(file), "--cluster", str(profile), "--out", str(out), *options])


def test_a_folder_with_a_percent_sign_is_refused_before_anything_is_written(
    slurm: FakeSlurm, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(tmp_path, store, tmp_path / "50%j") == 2
    assert "--out: " in (stderr := capsys.readouterr().err) and "%" in stderr
    assert not (tmp_path / "50%j").exists() and not slurm.jobs


@pytest.mark.parametrize("name", ["a b", "it's", "$(touch canary)", "a; touch canary", "a\ntouch canary", "-x", "Ü*?"])
def test_an_output_folder_may_have_any_name(
    name: str, slurm: FakeSlurm, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(tmp_path, store, tmp_path / name) == 0
    assert {job["chdir"] for job in slurm.jobs.values()} == {f"{tmp_path}/{name}/submission"}
    assert submission_status(tmp_path / name).state == "waiting" and not (tmp_path / "canary").exists()


def test_jobs_do_not_inherit_the_variables_of_an_outer_job(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CPU_BIND", "SLURM_MEM_PER_NODE", "SRUN_CPUS_PER_TASK", "SALLOC_PARTITION", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submitted(store, out)
    assert [job["environment"] for job in slurm.jobs.values()] == [["SLURM_CONF"]] * 3
    assert os.environ["SLURM_CPU_BIND"] == "x"


def test_without_slurm_no_submission_is_recorded(
    store: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli(tmp_path, store, out) == 2
    assert "sbatch" in capsys.readouterr().err
    assert load(out).sent == ()


def test_a_dry_run_prints_scripts_costs_and_refusals_and_submits_nothing(
    slurm: FakeSlurm, store: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set_answers(refuses="sbatch: error: Invalid job array specification\n")
    assert cli(tmp_path, store, out, "--dry-run", "--json", gpus=1, requeues=5) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["form"] == "array" and "1 at once" in output["reason"] and output["trials"] == 4
    assert list(output["scripts"]) == ["array.sh (first of 2)", "finish.sh"]
    assert f"job array {out} " in output["scripts"]["array.sh (first of 2)"]
    assert output["job_hours"] == pytest.approx(output["pack_seconds"] / 3600) and output["job_hours"] > 0
    assert (output["gpu_hours"], output["core_hours"]) == (None, None)  # this machine has no GPU to measure them on
    assert all(pack["steps_per_training"] > 0 for pack in output["packs"])
    arrays = next(finding for finding in output["findings"] if finding["check"] == "sbatch array.sh (first of 2)")
    assert arrays["level"] == "error" and arrays["message"] == "Invalid job array specification"
    command_line = slurm.calls("sbatch")[0]
    assert "--test-only" in command_line and "--array=0-2%10" in command_line
    assert not out.exists() and not slurm.jobs
    assert cli(tmp_path, store, out, "--dry-run", gpus=1) == 0
    stdout = capsys.readouterr().out
    assert "cost: GPU-hours unknown" in stdout
    assert cli(tmp_path, store, out, "--dry-run", "--json", cpus=3) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["core_hours"] == pytest.approx(3 * output["job_hours"]) and output["gpu_hours"] == 0
    assert cli(tmp_path, store, out, "--dry-run") == 0
    stdout = capsys.readouterr().out
    assert "core-hours, " in stdout and "#SBATCH --array=0-2%10" in stdout and "steps" in stdout


REFUSED_BY_PROFILE = {
    "sweep.resources.cpus: 8 requested, the profile has 4 core(s)": ({"resources": {"cpus": 8}}, ()),
    "sweep.resources.gpus: 0.5 requested, the profile has 0 GPU(s)": ({"resources": {"gpus": 0.5}}, ()),
    "trainer.device: cuda requested, the profile has 0 GPU(s); set gpus": ({}, ("trainer.device=cuda",)),
    "trainer.precision: fp16 needs a GPU, the profile has 0 GPU(s)": ({}, ("trainer.precision=fp16",)),
    "trainer.workers: 9 of 1 thread(s) requested, the profile has": ({"executor": "ray"}, ("trainer.workers=9",)),
}


@pytest.mark.parametrize("reason", REFUSED_BY_PROFILE)
def test_a_study_that_needs_more_than_the_profile_is_refused(reason: str, store: Path) -> None:
    sweep, overrides = REFUSED_BY_PROFILE[reason]
    with pytest.raises(ConfigError) as refused:
        check_profile(study(store, *overrides, **sweep), site(cpus=4), form="allocation")
    assert reason in str(refused.value)


def test_a_study_that_fits_the_profile_is_accepted(store: Path) -> None:
    check_profile(study(store, resources={"cpus": 4}), site(cpus=4), form="array")
    gpu = study(store, "trainer.device=cuda", "trainer.precision=fp16", resources={"gpus": 0.5})
    check_profile(gpu, site(cpus=4, gpus=1), form="array")
    check_profile(study(store, "trainer.workers=8", executor="ray"), site(cpus=4, nodes=2), form="allocation")


def test_a_study_that_needs_more_than_the_profile_is_refused_before_anything_is_written(
    slurm: FakeSlurm, store: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(tmp_path, store, out, "--set", "sweep.resources.cpus=3") == 2
    assert re.search(r"sweep\.resources\.cpus: 3 .*\b1\b", capsys.readouterr().err)
    assert not out.exists() and not slurm.jobs


# --- resume, cancel, status--------------------------------------------------------------------------------------


def test_resume_submits_what_is_not_done_and_resets_status_files(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    status_file = out / "submission" / "status" / "pack-1.json"
    status_file.write_text("{}")
    with pytest.raises(UserError, match=r"\(1000_0, "):
        submit.resume(out)
    assert status_file.exists()
    slurm.end()
    finish_packs(out, [0, 2])
    resumed = submit.resume(out)
    assert rows(resumed.sent[3:]) == [("array", 1, (0, 2)), ("finish", 0, ())]
    assert list(slurm.jobs) == ["1003", "1004"] == resumed.numbers[3:] and not status_file.exists()
    assert slurm.jobs["1004"]["dependency"] == "afterany:1003"


def test_a_refused_resume_keeps_the_status_files(slurm: FakeSlurm, store: Path, out: Path) -> None:
    before = submitted(store, out)
    status_file = out / "submission" / "status" / "pack-1.json"
    write_json(status_file, vars(JobStatus("pack_failed", 2, "out of memory", "7", "n1", 0.0, "c")))
    slurm.end()
    slurm.set_answers(sbatch=["sbatch: error: Batch job submission failed: Invalid account\n"])
    with pytest.raises(UserError, match="Invalid account"):
        submit.resume(out)
    log = out / "submission" / "logs" / "1000_1.log"
    assert (
        submission_status(out).failed == {"pack-1": f"out of memory (log: {log})"}
        and submission_status(out).restarts == 1
    )
    assert load(out).numbers == before.numbers


def test_resume_replaces_the_profile(
    slurm: FakeSlurm, store: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    slurm.end()
    other = tmp_path / "other.yaml"
    other.write_text(yaml12.dump({"memory": "64G", "time": "20:00:00", "python": ["python"]}))
    assert command(["resume", str(out), "--cluster", str(other)]) == 0
    assert all("--mem=64G\n" in job["text"] and "--time=20:00:00\n" in job["text"] for job in slurm.jobs.values())
    assert submission.site_of(out).memory == "64G"
    slurm.end()
    other.write_text(yaml12.dump({"executor": "local"}))
    assert command(["resume", str(out), "--cluster", str(other)]) == 2
    assert re.search(r"--cluster: .*\blocal\b", capsys.readouterr().err)
    assert submission.site_of(out).memory == "64G" and not slurm.jobs


def test_a_job_that_ends_before_python_starts_is_shown_with_its_last_line(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    folder = out / "submission"
    (folder / "status" / "pack-1.starting").touch()
    (folder / "logs" / "1000_1.log").write_text("slurmstepd: x\nmodule: command not found\n\n")
    assert submission_status(out).failed == {}, "Python may still be loading"
    slurm.end()
    assert command(["status", str(out)]) == 0
    stdout = capsys.readouterr().out
    assert "failed: job pack-1: " in stdout and ": module: command not found (log: " in stdout
    assert f"{folder}/logs/1000_1.log)" in stdout and "modis-dist resume" in stdout
    with record_job_status(folder / "status" / "pack-1.json", code="c", requeues=1):
        assert submission_status(out).failed == {}


def test_resume_prints_only_the_jobs_that_it_sent(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    slurm.end()
    assert command(["resume", str(out)]) == 0
    stdout = capsys.readouterr().out
    assert stdout.splitlines()[0].endswith(": array 1003, array 1004, finish 1005")


def test_resume_uses_the_packs_as_arranged_after_a_crash(slurm: FakeSlurm, store: Path, out: Path) -> None:
    stacked = plan(study(store, packing={"enabled": True}), out=out, slots=1, source="study.yaml", gpu=False)
    before = submit.submit(stacked, site(), form="array", out=out)
    (stack,) = before.packs
    listed = json.loads((out / "manifest.json").read_text())
    listed["packs"] = [[trial] for trial in stack]  # the last job retried its members one by one
    (out / "manifest.json").write_text(json.dumps(listed))
    conclude(out, stack[:3])
    slurm.end()
    again = submit.resume(out)
    assert again.packs == tuple((trial,) for trial in stack)
    assert rows(again.sent[2:]) == [("array", 3, (0,)), ("finish", 0, ())]


def test_cancel_cancels_live_jobs_and_prints_their_ids(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = submitted(store, out)
    live = {number: job for number, job in slurm.jobs.items() if number != "1000"}
    slurm.set_answers(jobs=live, sacct=[SACCT, "1000_0|FAILED|"])
    assert command(["cancel", str(out)]) == 0
    stdout = capsys.readouterr().out
    assert re.search(r"\b2 job.*: 1001_0, 1002\n", stdout) and f"next: modis-dist resume {out}" in stdout
    assert slurm.calls("scancel") == [["1001", "1002"]] and load(out) == before
    assert command(["cancel", str(out)]) == 0
    assert "modis-dist status" in capsys.readouterr().out and len(slurm.calls("scancel")) == 1


def test_status_shows_the_states_of_the_queue(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    assert submission_status(out).state == "waiting"
    slurm.put("1000", "RUNNING", tasks=[1, 2], nodes="n1")
    slurm.put("1001", "PENDING", tasks=[0], reason="Dependency")
    slurm.set_answers(sacct=[SACCT, "1000_0|CANCELLED by 0|n1"])
    status = submission_status(out)
    assert status.state == "running" and status.form == "array" and status.study.trials == {"waiting": 4}
    assert [(job.number, job.kind, job.states) for job in status.jobs] == [
        ("1000", "array", {"RUNNING": 2, "CANCELLED": 1}),
        ("1001", "array", {"PENDING": 1}),
        ("1002", "finish", {"PENDING": 1}),
    ]
    assert command(["status", str(out)]) == 0
    stdout = capsys.readouterr().out
    assert re.search(r"toy: running, .*\barray; stage: search\b", stdout)
    assert "job 1001 (array): 1 PENDING (Dependency)" in stdout and "modis-dist cancel" in stdout
    slurm.end()
    slurm.set_answers(sacct="Slurm accounting storage is disabled\n")
    assert submission_status(out).state == "stopped" and "modis-dist resume" in submission_status(out).advice
    assert command(["status", str(out)]) == 0
    assert "job 1002 (finish): " in capsys.readouterr().out


def test_while_the_controller_is_down_the_state_is_unknown_and_nothing_changes(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = submitted(store, out)
    slurm.set_answers(squeue=DOWN)
    assert command(["status", str(out), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["state"] == "unknown" and "Unable to contact slurm controller" in output["advice"]
    for action in ("cancel", "resume"):
        assert command([action, str(out)]) == 3
        assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert load(out) == before and len(slurm.calls("sbatch")) == 3 and not slurm.calls("scancel")


@pytest.mark.parametrize("action", ["cancel", "resume", "fetch"])
def test_a_folder_without_a_submission_is_named(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([action, str(tmp_path), *(["--to", str(tmp_path / "home")] if action == "fetch" else [])]) == 2
    assert f"{tmp_path}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("text", ["", "[]", "{", '{"study": "x"}', '{"sent": 1}', '{"sent": [{"x": 1}], "packs": []}'])
def test_a_damaged_record_is_refused_by_its_path(text: str, store: Path, out: Path) -> None:
    submitted(store, out)
    path = out / "submission" / "submission.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path}: "):
        load(out)


@pytest.mark.usefixtures("slurm")
def test_an_edited_profile_is_refused_by_file_and_key(
    store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    path = out / "submission" / "cluster.yaml"
    path.write_text(path.read_text().replace("array_parallelism: 10", "array_parallelism: none"))
    assert command(["status", str(out)]) == 2
    stderr = capsys.readouterr().err
    assert str(path) in stderr and "array_parallelism" in stderr
