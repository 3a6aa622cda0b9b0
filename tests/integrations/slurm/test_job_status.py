"""Status files of jobs, and interrupted jobs, with fake Slurm commands."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modis_dist.cli.main import run as command
from modis_dist.integrations.slurm import jobs as array_job
from modis_dist.integrations.slurm import submission
from modis_dist.integrations.slurm.job_status import JobStatus, PackFailed, read_job_status, record_job_status
from modis_dist.integrations.slurm.submission import load
from modis_dist.integrations.slurm.submission_status import submission_status
from modis_dist.runtime.errors import DataError, Interrupted, RunFailed
from tests.integrations.processes import wait_for
from tests.integrations.slurm.fake_slurm import FakeSlurm
from tests.integrations.slurm.toy_submission import site, submitted
from tests.study.toy_study import COMMAND

DOWN = "squeue: error: Unable to contact slurm controller (connect failure)\n"


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    yield


def begun(path: Path, *, requeues: int, error: BaseException | None = None) -> JobStatus:
    try:
        with record_job_status(path, code="c", requeues=requeues):
            if error is not None:
                raise error
    except (Interrupted, RunFailed):
        pass
    status = read_job_status(path)
    assert status is not None
    return status


@pytest.mark.usefixtures("in_job")
def test_a_status_file_has_the_end_and_the_number_of_starts_of_a_job(tmp_path: Path) -> None:
    path = tmp_path / "pack-0.json"
    assert read_job_status(path) is None
    statuses = [
        begun(path, requeues=9, error=error)
        for error in (Interrupted("got SIGTERM"), PackFailed("step 3: loss is nan"), RunFailed("no GPU"), None)
    ]
    assert [(status.state, status.starts, status.reason) for status in statuses] == [
        ("saved", 1, "got SIGTERM"),
        ("pack_failed", 2, "step 3: loss is nan"),
        ("job_failed", 3, "no GPU"),
        ("done", 4, None),
    ]
    assert {(status.job, status.code) for status in statuses} == {("7", "c")}


@pytest.mark.parametrize("state", ["failed", "broken", "given up"])
def test_a_status_file_of_another_version_is_refused(state: str, tmp_path: Path) -> None:
    path = tmp_path / "pack-0.json"
    with record_job_status(path, code="c", requeues=0):
        pass
    path.write_text(path.read_text().replace('"done"', f'"{state}"'))
    with pytest.raises(DataError, match=rf"pack-0\.json.*'{state}'"):
        read_job_status(path)


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("requeues", [0, 2])
def test_a_job_that_was_requeued_too_often_gives_up_and_status_shows_it(
    requeues: int, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    path = out / "submission" / "status" / "pack-1.json"
    stopped = [begun(path, requeues=requeues, error=Interrupted("x")).starts for _ in range(requeues + 1)]
    assert stopped == list(range(1, requeues + 2))
    message = rf"\b{requeues} .*`modis-dist resume`"
    with pytest.raises(RunFailed, match=message), record_job_status(path, code="c", requeues=requeues):
        pytest.fail("it began")
    assert begun(path, requeues=requeues).state == "requeue_limit"
    status = submission_status(out)
    assert status.failed.keys() == {"pack-1"}
    assert command(["status", str(out)]) == 0
    assert "pack-1" in capsys.readouterr().out


@pytest.mark.usefixtures("slurm")
def test_a_pack_that_was_given_up_or_cancelled_is_not_crashed(store: Path, out: Path) -> None:
    submitted(store, out)
    for number, error in enumerate([Interrupted("got SIGTERM"), PackFailed("out of memory"), RunFailed("no GPU")]):
        begun(out / "submission" / "status" / f"pack-{number}.json", requeues=0, error=error)
    packs = submission.packs_of(out, load(out))
    executor = array_job.AfterArray(out)
    assert executor.execute([packs[1]], out=out, store=store) == {packs[1].trials[0].id: "out of memory"}
    with pytest.raises(RunFailed, match=r"\b3 of 4 .*modis-dist resume"):
        executor.execute(packs, out=out, store=store)


@pytest.mark.usefixtures("in_job", "slurm")
def test_a_signal_stops_an_executor_between_packs(store: Path, out: Path) -> None:
    submitted(store, out)
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Interrupted, match="SIGUSR1"), array_job.job(out, "finish", site()) as flag:
        executor = array_job.StopBetweenPacks(array_job.AfterArray(out), flag)
        os.kill(os.getpid(), signal.SIGUSR1)
        executor.execute([], out=out, store=store)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.usefixtures("in_job")
def test_requeueing_is_retried_while_slurm_does_not_answer(
    slurm: FakeSlurm, store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, out)
    slurm.put("7", "RUNNING")
    slurm.set_answers(squeue=DOWN)
    monkeypatch.setattr(array_job.time, "sleep", lambda _: slurm.set_answers(squeue=None))
    with pytest.raises(Interrupted), array_job.job(out, "finish", site()):
        raise Interrupted("got SIGUSR1")
    assert ["requeue", "7"] in slurm.calls("scontrol")


@pytest.mark.usefixtures("in_job", "slurm")
def test_a_job_with_other_source_code_warns_and_continues(
    store: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = submitted(store, out)
    caplog.clear()
    with array_job.job(out, "finish", site()):
        assert not caplog.records
    monkeypatch.setattr(array_job, "code", lambda: "other")
    with array_job.job(out, "finish", site()):
        assert "(other)" in caplog.text and f"({before.code}, version" in caplog.text
    status = read_job_status(out / "submission" / "status" / "finish.json")
    assert status is not None and status.code == "other" and status.starts == 2
    assert submission_status(out).other_code == ("finish",)
    assert command(["status", str(out)]) == 0
    assert re.search(r"^warning: 1 job\(s\) .*: finish$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("state", "reason", "again"),
    [("RUNNING", "None", True), ("COMPLETING", "TimeLimit", True), ("CANCELLED", "None", False)],
)
@pytest.mark.usefixtures("in_job")
def test_an_interrupted_job_is_requeued_unless_it_was_cancelled(
    state: str,
    reason: str,
    again: bool,
    slurm: FakeSlurm,
    store: Path,
    out: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    submitted(store, out)
    slurm.put("7", state, reason=reason)
    with caplog.at_level(logging.WARNING), pytest.raises(Interrupted), array_job.job(out, "finish", site()):
        raise Interrupted("got SIGUSR1")
    assert ("not requeued" in caplog.text) is not again and "requeued" in caplog.text
    assert (["requeue", "7"] in slurm.calls("scontrol")) is again


def blocked(process: int) -> int:
    """Return the blocked signals of a process as a bit mask."""
    match = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    assert match is not None
    return int(match[1], 16)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.usefixtures("in_job")
def test_a_signal_during_import_is_not_lost(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    slurm.put("7", "RUNNING")
    words = shlex.join([*COMMAND, "job", "array", str(out), "0"])
    job = subprocess.Popen(["bash", "-c", f"trap '' USR1; exec {words}"], stderr=subprocess.PIPE, text=True)
    try:
        assert wait_for(lambda: blocked(job.pid) & 1 << signal.SIGUSR1 - 1, seconds=60)
        job.send_signal(signal.SIGUSR1)
        _, stderr = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 75 and "SIGUSR1" in stderr, stderr
    assert ["requeue", "7"] in slurm.calls("scontrol")


@pytest.mark.usefixtures("in_job")
def test_a_failed_job_is_not_requeued(slurm: FakeSlurm, store: Path, out: Path) -> None:
    submitted(store, out)
    slurm.put("7", "RUNNING")
    with pytest.raises(RunFailed), array_job.job(out, "finish", site()):
        raise RunFailed("no configuration has all its folds")
    assert not slurm.calls("scontrol")
