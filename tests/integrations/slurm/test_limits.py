"""What Slurm's accounting allows, and what sbatch says when it is only asked: as `submit` will find it."""

from pathlib import Path
from typing import Any

import pytest

from modis_dist.integrations.slurm import checks as doctor_slurm
from modis_dist.integrations.slurm.job_script import requests
from modis_dist.runtime.finding import Finding
from tests.integrations.slurm.fake_slurm import FakeSlurm
from tests.integrations.slurm.toy_submission import site, submitted


def found(what: str, *, jobs: int = 1, **keys: Any) -> Finding:
    profile = site(**keys)
    (one,) = [f for f in doctor_slurm.limits(profile, requests=requests(profile, nodes=1), jobs=jobs) if f.what == what]
    return one


LIMITED = {
    (("me|5|",), 5): ("good", "5 job(s) and tasks, MaxSubmitJobs of the account is 5"),
    (("me|5|",), 6): ("bad", "6 job(s) and tasks, MaxSubmitJobs of the account is 5"),
    (("other|5|", "me||"), 6): ("good", "6 job(s) and tasks; no limit of the account"),
    (("other|5|", "me|100|"), 6): ("good", "6 job(s) and tasks, MaxSubmitJobs of the account is 100"),
    ((), 6): ("good", "6 job(s) and tasks; no limit of the account"),
}


@pytest.mark.parametrize(("accounts", "jobs"), LIMITED)
def test_more_jobs_than_the_account_may_have_in_the_queue_are_foreseen(
    accounts: tuple[str, ...], jobs: int, slurm: FakeSlurm
) -> None:
    slurm.be(accounts=accounts)
    one = found("jobs in the queue", jobs=jobs, account="me")
    assert (one.level, one.found) == LIMITED[accounts, jobs]
    assert ("--form allocation" in one.advice) is (one.level == "bad")


def test_where_the_accounts_are_not_told_the_limit_of_jobs_is_not_known(slurm: FakeSlurm) -> None:
    slurm.be(accounts="sacctmgr: error: slurmdbd is down\n")
    one = found("jobs in the queue", jobs=3)
    assert one.level == "good" and "is not known (sacctmgr: slurmdbd is down)" in one.found


def test_jobs_that_are_in_the_queue_already_count_against_the_limit(slurm: FakeSlurm) -> None:
    slurm.be(accounts=["me|5|"])
    slurm.put("7", "PENDING", tasks=[0, 1, 2])
    assert found("jobs in the queue", jobs=2).level == "good"
    one = found("jobs in the queue", jobs=3)
    assert one.level == "bad" and one.found.startswith("3 job(s) and tasks and 3 that are there, MaxSubmitJobs")


@pytest.mark.parametrize("qos", ["day", None], ids=["of the profile", "of the account"])
def test_the_limits_of_the_quality_of_service_hold_be_it_the_profiles_or_the_accounts(
    qos: str | None, slurm: FakeSlurm
) -> None:
    slurm.be(accounts=["me|100|day"], qos=["night|1|00:01:00||", "day|4|02:00:00|cpu=8|"])
    one = found("jobs in the queue", jobs=5, qos=qos)
    assert one.level == "bad" and "MaxSubmitJobsPU of day is 4" in one.found
    one = found("quality of service", qos=qos, time="03:00:00", cpus=4)
    assert one.level == "bad" and one.advice == "time 03:00:00 is longer than MaxWall: set time: 02:00:00 at most"


@pytest.mark.parametrize(
    ("resources", "level", "advice"),
    [
        ("gres/gpu=2|", "warning", "at_once: 2 in the profile"),
        ("gres/gpu:a100=8,cpu=12|", "warning", "at_once: 3 in the profile"),
        ("gres/gpu=10,mem=64G,node=10|", "good", ""),
        ("cpu=3|", "bad", "ask for less, or name another qos"),
        ("|cpu=4", "good", ""),
        ("|gres/gpu=0", "bad", "ask for less, or name another qos"),
    ],
)
def test_what_a_quality_of_service_gives_a_user_or_a_job_is_compared_with_the_profile(
    resources: str, level: str, advice: str, slurm: FakeSlurm
) -> None:
    slurm.be(qos=[f"day|||{resources}"])
    one = found("quality of service", qos="day", cpus=4, gpus=1, gpu_kind="a100", at_once=10)
    assert (one.level, advice in one.advice) == (level, True), one


def test_sbatch_is_asked_in_the_environment_in_which_jobs_are_submitted_and_says_the_same(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert found("a job").level == "good"
    submitted(store, out)
    assert [*slurm.tested, *(job["environment"] for job in slurm.jobs.values())] == [["SLURM_CONF"]] * 4


def test_variables_of_sbatch_that_have_no_effect_are_told_with_the_key_that_replaces_them(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.be(accounts=[])
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    one = found("environment")
    assert one.level == "warning" and one.found == "SBATCH_ACCOUNT=physics has no effect on our jobs"
    assert one.advice == "say it by account in the profile, if jobs need it"
    monkeypatch.setenv("SBATCH_RESERVATION", "course")
    assert found("environment", account="me").advice == "say it by options in the profile, if jobs need it"
