"""A study from `submit` to `fetch` with local jobs; an interrupted study equals an uninterrupted one."""

import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from modis_dist.cli import wait
from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.config.cluster import Site
from modis_dist.execution.trial import sequence_digest
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.slurm.job_status import read_job_status
from modis_dist.integrations.slurm.local_queue import LocalQueue
from modis_dist.integrations.slurm.submission_status import submission_status
from modis_dist.study import manifest
from modis_dist.train.journal import read
from tests.bare import skip_figures
from tests.integrations.processes import wait_for
from tests.study.kills import compared
from tests.study.toy_study import write_store, write_study

# Two packs of four, and a stack of two refits.
pytestmark = pytest.mark.slow

STUDY: dict[str, Any] = {"replicates": 2, "packing": {"max_trials": 4}, "probe": False}
SMALL: dict[str, Any] = {"grid": {}, "probe": False}
PATIENCE_S = 120.0
ROOT = Path(__file__).parents[3]

# Replaces Python in jobs: draws no figures, which take most of the time. While a file `slow` is beside it, every record
# is delayed; while `poison` is, fold 1 crashes.
STAND_IN = """
import sys, time
from pathlib import Path

here = Path(__file__).parent
if sys.argv[4] != "local":
    from modis_dist.execution import run_pack
    from modis_dist.train.journal import JournalWriter

    sys.path.append(ROOT)
    from tests.bare import skip_figures

    skip_figures()
    if (here / "slow").exists():
        genuine_record = JournalWriter.metrics
        JournalWriter.metrics = lambda *a, **k: (time.sleep(0.3), genuine_record(*a, **k))[1]
    if (here / "poison").exists():
        genuine = run_pack.fit

        def fit(members, **settings):
            if any(member.run.data.split.fold == 1 for member in members):
                raise RuntimeError("poisoned")
            return genuine(members, **settings)

        run_pack.fit = fit
from modis_dist.cli.main import main

main(sys.argv[3:])
"""


@pytest.fixture(autouse=True)
def _polls_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "POLL_S", 0.2)


class SubmittedStudy:
    """A folder with a study, a profile and its results."""

    def __init__(self, folder: Path, **sweep: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.out, self.stand_in = folder, folder / "out", folder / "python.py"
        self.study = write_study(folder / "study.yaml", write_store(folder / "store"), **sweep)
        self.stand_in.write_text(f"ROOT = {str(ROOT)!r}\n{STAND_IN}")
        self.profile = folder / "local.yaml"
        words = [sys.executable, str(self.stand_in)]
        self.profile.write_text(yaml12.dump({"executor": "local", "cpus": 1, "python": words}))

    def submit(self, *options: str) -> int:
        return command(["submit", str(self.study), "--cluster", str(self.profile), "--out", str(self.out), *options])

    def tune(self) -> Path:
        """Run the same study without a queue and return its output folder."""
        uninterrupted = self.folder / "uninterrupted"
        with pytest.MonkeyPatch.context() as patch:
            skip_figures(patch)
            assert command(["tune", str(self.study), "--out", str(uninterrupted)]) == 0
        return uninterrupted

    @property
    def summary(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return values


def records(out: Path) -> dict[str, int]:
    """Return the number of epochs of every trial in the journals of the listed packs."""
    listed, by_trial = manifest.load(out / "manifest.json"), {}
    for pack in listed.packs:
        for record in read(out / "packs" / sequence_digest(pack) / "journal.jsonl"):
            by_trial[record["trial"]] = by_trial.get(record["trial"], 0) + (record["kind"] == "metrics")
    return by_trial


# --- from end to end --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SubmittedStudy, Path]]:
    """A study that was cancelled in its first pack and resumed, and the same study run without interruption."""
    submitted_study = SubmittedStudy(tmp_path_factory.mktemp("resumed"), **STUDY)
    (submitted_study.folder / "slow").touch()
    assert submitted_study.submit() == 0
    assert wait_for(lambda: list(submitted_study.out.glob("packs/*/last/step-*")), seconds=PATIENCE_S)
    assert submission_status(submitted_study.out).state == "running"
    assert submitted_study.submit() == 2, "jobs are running"
    assert command(["resume", str(submitted_study.out)]) == 2, "jobs are running"
    assert command(["cancel", str(submitted_study.out)]) == 0
    assert wait_for(lambda: submission_status(submitted_study.out).state == "stopped", seconds=PATIENCE_S)
    first, second = (read_job_status(submitted_study.out / "submission" / "status" / f"pack-{k}.json") for k in (0, 1))
    assert first is not None and first.state == "saved" and "SIGTERM" in str(first.reason) and second is None
    assert not (submitted_study.out / "summary.json").exists()
    (submitted_study.folder / "slow").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wait, "POLL_S", 0.2)
        assert command(["resume", str(submitted_study.out), "--wait"]) == 0
    yield submitted_study, submitted_study.tune()


def test_a_cancelled_and_resumed_study_equals_an_uninterrupted_one(
    resumed: tuple[SubmittedStudy, Path],
) -> None:
    submitted_study, uninterrupted = resumed
    assert compared(submitted_study.out, uninterrupted) == []
    assert (
        submission_status(submitted_study.out).state == "finished"
        and submission_status(submitted_study.out).restarts == 0
    )


def test_a_finished_submission_shows_the_next_command_and_is_not_submitted_again(
    resumed: tuple[SubmittedStudy, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    submitted_study, _ = resumed
    assert command(["status", str(submitted_study.out)]) == 0
    stdout = " ".join(capsys.readouterr().out.split())
    assert re.search(r"toy: finished, .*\barray; stage: done\b", stdout) and "trials: 8 (8 done)" in stdout
    assert f"next: modis-dist fetch {submitted_study.out} --to DIR" in stdout
    assert command(["status", str(submitted_study.out), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["state"] == "finished" and output["submission"]["failed"] == {} and output["trials"] == {"done": 8}
    assert [job["kind"] for job in output["submission"]["jobs"]] == ["array", "finish"], "only the last jobs are listed"
    assert submitted_study.submit() == 2
    assert "`modis-dist resume`" in capsys.readouterr().err


def test_files_of_jobs_are_private_and_not_pickles(resumed: tuple[SubmittedStudy, Path]) -> None:
    files = [path for path in resumed[0].out.rglob("*") if not path.is_symlink()]
    assert len(files) > 80 and not [path for path in files if path.stat().st_mode & 0o077]
    assert not [path for path in files if "pickle" in path.name or path.suffix in {".pkl", ".pt"}]


# --- fetching ---------------------------------------------------------------------------------------------------


def in_mlflow(database: Path) -> dict[str, list[Any]]:
    """Return MLflow's rows of a study without times."""
    queries = {
        "runs": "select name, status from runs",
        "params": "select r.name, p.key, p.value from params p join runs r using (run_uuid)",
        "metrics": "select r.name, m.key, m.step, m.value from metrics m join runs r using (run_uuid)",
    }
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return {name: sorted(connection.execute(query).fetchall()) for name, query in queries.items()}


@pytest.fixture(scope="module")
def home(resumed: tuple[SubmittedStudy, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "deep" / "mine"
    assert command(["fetch", str(resumed[0].out), "--to", str(folder)]) == 0
    return folder


def test_fetch_copies_results_without_checkpoints_and_machine_files(
    resumed: tuple[SubmittedStudy, Path], home: Path
) -> None:
    out = resumed[0].out
    for name in ("summary.json", "report.md", "manifest.json", "study.yaml"):
        assert (home / name).read_bytes() == (out / name).read_bytes()
    for pattern in ("trials/*/result.json", "packs/*/journal.jsonl", "model/best/*/*"):
        assert file_contents(home, pattern) == file_contents(out, pattern) != {}
    assert file_contents(home, "trials/*/best/*/*") == {} != file_contents(out, "trials/*/best/*/*")
    assert not list(home.rglob("last")) and not list(home.rglob("scripts")) and not list(home.rglob("*.tmp"))
    mine = [path for path in [home, *home.rglob("*")] if path.stat().st_mode & 0o077]
    assert not [path for path in mine if "mlflow" not in str(path.relative_to(home))]


def file_contents(folder: Path, pattern: str) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob(pattern)}


def test_models_all_fetches_the_best_model_of_every_trial_after_printing_the_size(
    resumed: tuple[SubmittedStudy, Path], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, copy = resumed[0].out, tmp_path / "all"
    shutil.copytree(home, copy)
    assert command(["fetch", str(out), "--to", str(copy), "--models", "all"]) == 0
    models = file_contents(out, "trials/*/best/*/*")
    assert file_contents(copy, "trials/*/best/*/*") == models
    size = sum(map(len, models.values()))
    assert re.search(rf" {len(models)} files, {size / 1e6:.1f} MB, .*{copy}\n", capsys.readouterr().err)


def test_fetch_fills_mlflow_as_the_same_study_without_a_queue_does(
    resumed: tuple[SubmittedStudy, Path], home: Path
) -> None:
    assert command(["mlflow-sync", str(resumed[1])]) == 0
    fetched, expected = in_mlflow(home / "mlflow.db"), in_mlflow(resumed[1] / "mlflow.db")
    assert len(fetched["runs"]) == 8 + 2 + 1 and len(fetched["metrics"]) > 100

    def comparable(rows_by_table: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Remove the parent run, whose name contains the folder."""
        return {what: [row for row in rows if not row[0].startswith("toy")] for what, rows in rows_by_table.items()}

    assert comparable(fetched) == comparable(expected)
    assert {what: len(rows) for what, rows in fetched.items()} == {what: len(rows) for what, rows in expected.items()}
    assert {status for name, status in fetched["runs"]} == {"FINISHED"}


def test_a_repeated_fetch_copies_and_duplicates_nothing(
    resumed: tuple[SubmittedStudy, Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = in_mlflow(home / "mlflow.db")
    times = {path: path.stat().st_mtime_ns for path in home.glob("trials/*/*") if path.is_file()}
    assert command(["fetch", str(resumed[0].out), "--to", str(home)]) == 0
    assert capsys.readouterr().out.startswith("0 files ")
    assert in_mlflow(home / "mlflow.db") == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_fetched_study_is_finished_and_has_no_jobs_to_cancel(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["status", str(home)]) == 0 and "toy: finished; stage: done" in capsys.readouterr().out
    assert command(["cancel", str(home)]) == 2 and f"{home}: " in capsys.readouterr().err


def test_a_fetched_model_predicts(resumed: tuple[SubmittedStudy, Path], home: Path, tmp_path: Path) -> None:
    store = str(resumed[0].folder / "store")
    assert command(["predict", str(home), store, "--out", str(tmp_path / "p.parquet")]) == 0


def test_fetch_refuses_a_folder_inside_the_output_folder_and_one_of_another_study(
    resumed: tuple[SubmittedStudy, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = resumed[0].out

    def refused(to: Path) -> str:
        assert command(["fetch", str(out), "--to", str(to)]) == 2
        return capsys.readouterr().err

    assert "is inside" in refused(out / "home") and not (out / "home").exists()
    assert "is inside" in refused(out)
    other = SubmittedStudy(tmp_path / "other", **SMALL)
    before = manifest.load(out / "manifest.json")
    other.out.mkdir()
    manifest.save(other.out / "manifest.json", manifest.Manifest("other", before.fingerprint, (), (), ()))
    assert f"--to: {other.out}" in refused(other.out)
    assert [path.name for path in other.out.iterdir()] == ["manifest.json"]


def test_on_a_network_file_system_fetch_copies_results_without_mlflow(
    resumed: tuple[SubmittedStudy, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlflow_store, "file_system", lambda _: "nfs4")
    assert command(["fetch", str(resumed[0].out), "--to", str(tmp_path / "there")]) == 0
    stderr = capsys.readouterr().err
    assert "(nfs4)" in stderr and "local disk" in stderr
    assert (tmp_path / "there" / "summary.json").exists() and not (tmp_path / "there" / "mlflow.db").exists()


# --- crashes ----------------------------------------------------------------------------------------------------


def test_a_crashed_trial_fails_alone_with_exit_code_4_and_resume_retries_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted_study = SubmittedStudy(tmp_path, **SMALL)
    (tmp_path / "poison").touch()
    assert submitted_study.submit("--wait") == 4
    assert "1 trial(s) failed (" in capsys.readouterr().err
    job_status = read_job_status(submitted_study.out / "submission" / "status" / "pack-0.json")
    assert job_status is not None
    assert (job_status.state, job_status.reason) == ("pack_failed", "RuntimeError: poisoned")
    assert submitted_study.summary["trials"] == {"total": 2, "done": 1, "failed": 1, "pruned": 0}
    before = {p: p.stat().st_mtime_ns for p in submitted_study.out.glob("trials/*/result.json")}
    (tmp_path / "poison").unlink()
    capsys.readouterr()
    assert command(["resume", str(submitted_study.out), "--wait", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == submitted_study.summary
    assert submitted_study.summary["trials"] == {"total": 2, "done": 2, "failed": 0, "pruned": 0}
    trained = {trial.id for trial in manifest.load(submitted_study.out / "manifest.json").trials}
    assert records(submitted_study.out) == dict.fromkeys(trained, 4)
    assert {p: p.stat().st_mtime_ns for p in before if p.parent.name in trained} == {
        p: t for p, t in before.items() if p.parent.name in trained
    }


# --- the local queue --------------------------------------------------------------------------------------------


def local(tmp_path: Path, **keys: Any) -> tuple[LocalQueue, Path]:
    folder = tmp_path / "submission"
    for name in ("scripts", "logs"):
        (folder / name).mkdir(parents=True)
    return LocalQueue(Site(executor="local", **keys)), folder


def test_a_local_job_has_no_time_limit_and_the_next_one_waits_for_it(tmp_path: Path) -> None:
    queue, folder = local(tmp_path, time="00:00:31", warning_s=10)
    script = "#!/bin/bash\nsleep 4\necho $SLURM_ARRAY_TASK_ID >> order\n"
    first = queue.submit(script, folder=folder, mark="modis-a", tasks=[3], after=[])
    last = queue.submit("#!/bin/bash\necho last >> order\n", folder=folder, mark="modis-b", tasks=[], after=[first])
    assert queue.marked("modis-b") == last and queue.marked("modis-c") is None
    assert all(job.live for job in queue.jobs([first, last]).values())
    assert wait_for(lambda: not queue.jobs([first])[first].live, seconds=PATIENCE_S)
    assert (folder / "order").read_text().startswith("3\n")
    assert wait_for(lambda: not queue.jobs([last])[last].live, seconds=PATIENCE_S)
    assert (folder / "order").read_text() == "3\nlast\n"


def test_local_tasks_run_after_a_failed_one_but_not_after_a_cancel(tmp_path: Path) -> None:
    queue, folder = local(tmp_path)
    failing = "#!/bin/bash\necho $SLURM_ARRAY_TASK_ID >> order\nexit 3\n"
    number = queue.submit(failing, folder=folder, mark="modis-a", tasks=[0, 1], after=[])
    slow = "#!/bin/bash\necho slow$SLURM_ARRAY_TASK_ID >> order\nexec sleep 60\n"
    second = queue.submit(slow, folder=folder, mark="modis-b", tasks=[0, 1], after=[number])
    assert wait_for(lambda: "slow0" in _text(folder / "order"), seconds=PATIENCE_S)
    queue.cancel([number, second])
    assert wait_for(lambda: not queue.jobs([second])[second].live, seconds=PATIENCE_S)
    assert (folder / "order").read_text() == "0\n1\nslow0\n"
    assert queue.marked("modis-b") is None and not queue.jobs(["1-0.00"])["1-0.00"].live


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
