"""Disturbed studies on a real Slurm cluster: results are bit-identical to those of a local run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.processes import wait_for
from tests.real_slurm.cluster import Cluster
from tests.real_slurm.studies import (
    PARTS,
    command,
    processes_of_job,
    readable_by_others,
    submitted,
    summary,
    write_profile,
    write_study,
)
from tests.study.toy_study import BARE, write_store

pytestmark = pytest.mark.slurm

CLOSE = 2e-3  # float32: sums over ranks are rounded differently


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a study and, in ``home``, the results of a local run."""
    folder = tmp_path_factory.mktemp("studies")
    study = write_study(folder / "study.yaml", write_store(folder / "store"))
    command("tune", str(study), "--out", str(folder / "home"), program=BARE)
    return folder


def assert_equals_local_run(actual: dict[str, Any], base: Path) -> None:
    """Assert that results are equal except for times and the MLflow store."""
    home = summary(base / "home")
    for part in PARTS:
        assert actual[part] == home[part], part


def test_an_array_that_is_preempted_requeued_and_loses_a_node_equals_a_local_run(
    in_cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path / "profile.yaml", gpus=1, python=BARE[:2])
    study = submitted(in_cluster, base / "study.yaml", profile, tmp_path / "out", "--form", "array", paused=True)
    study.until_saved()
    first, second = f"{study.number}_0", f"{study.number}_1"
    study.preempt(first)
    study.until_started("pack-0", times=2)
    in_cluster.run("scontrol", "requeue", first)
    study.until_started("pack-0", times=3)  # a node that is lost meanwhile would not start it again, and fail it
    study.until(lambda: study.node(second), "its second task does not run")
    before = study.starts("pack-1")  # both tasks were preempted if they shared the node
    study.lose(second)
    study.until_started("pack-1", times=before + 1)
    assert_equals_local_run(study.until_over(), base)
    assert "SIGUSR1" in study.logs(), "Slurm warned before it preempted"
    assert not readable_by_others(study.out)
    assert not list(study.out.rglob("*.pkl"))


def test_an_allocation_that_is_preempted_and_loses_a_node_equals_a_local_run_and_leaves_no_process(
    in_cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path / "profile.yaml", nodes=2, python=BARE[:2])
    study = submitted(in_cluster, base / "study.yaml", profile, tmp_path / "out", "--form", "allocation", paused=True)
    study.until_saved()
    study.preempt(study.number)
    study.until_started("allocation", times=2)
    study.until(lambda: list(study.out.glob("submission/ray-*/joined-1")), "Ray does not start again")
    study.lose(study.number)
    study.until_started("allocation", times=3)
    assert_equals_local_run(study.until_over(), base)
    assert "SIGUSR1: saving" in study.logs(), "Slurm warned before it preempted"
    assert wait_for(lambda: not processes_of_job(study.number), seconds=120), processes_of_job(study.number)
    assert not list((study.out / "submission").glob("ray-*"))
    assert not readable_by_others(study.out)


def test_one_training_on_two_nodes_takes_the_steps_of_one_worker(
    in_cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    study = write_study(tmp_path / "study.yaml", base / "store", epochs=3, folds=1)
    profile = write_profile(tmp_path / "profile.yaml", nodes=2, python=BARE[:2])
    ranks = ["--set", "sweep.executor=ray", "--set", "trainer.workers=2", "--set", "sweep.resources.cpus=2"]
    assert submitted(in_cluster, study, profile, out, *ranks).until_over()["trials"]["done"] == 1
    command("tune", str(study), "--out", str(home), program=BARE)
    assert len(trials(out)) == 2 and trials(out).keys() == trials(home).keys()
    for trial, ran in trials(out).items():
        right = trials(home)[trial]
        assert [row["epoch"] for row in ran] == [row["epoch"] for row in right] == [1, 2, 3][: len(right)]
        for row, other in zip(ran, right, strict=True):
            losses = [name for name in other if name.startswith("train/")]
            assert losses and [row[n] for n in losses] == pytest.approx(
                [other[n] for n in losses], rel=CLOSE, abs=CLOSE
            )


def trials(out: Path) -> dict[str, list[dict[str, float]]]:
    """Return the history of every trial, including refits."""
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("trials/*/history.json")}


def test_a_training_above_its_time_limit_is_requeued_and_equals_a_local_run(
    in_cluster: Cluster, tmp_path: Path
) -> None:
    study_file = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), folds=1)
    profile = write_profile(tmp_path / "profile.yaml", time="00:01:00", warning_s=30, python=BARE[:2])
    study = submitted(in_cluster, study_file, profile, tmp_path / "out", "--form", "array", paused=True)
    command("tune", str(study_file), "--out", str(tmp_path / "home"), program=BARE)
    study.until_started("pack-0", times=2)
    assert_equals_local_run(study.until_over(), tmp_path)
    # Slurm checks every 30 s: if its warning comes before the training starts, SIGTERM interrupts the job instead
    assert re.search("got SIG(USR1|TERM); saved", study.logs())


def test_a_study_is_cancelled_resumed_and_fetched(in_cluster: Cluster, base: Path, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "profile.yaml", array_parallelism=1)
    out, home = tmp_path / "it's $(out)", tmp_path / "here"
    study = submitted(in_cluster, base / "study.yaml", profile, out, "--form", "array", paused=True)
    again = ["submit", str(base / "study.yaml"), "--cluster", str(profile), "--out", str(out)]
    study.until(lambda: list(out.glob("packs/*/last/step-*")), "no checkpoint")
    command(*again, code=2)
    output = command("cancel", str(out))
    assert re.match(r"cancelled 3 job\(s\): ", output), output
    study.until(lambda: study.state() == "stopped", "it runs on")
    assert set(in_cluster.states(study.number).values()) == {"CANCELLED"}
    saved = {path.name for path in out.glob("packs/*/last/step-*")}
    assert saved
    command(*again, code=2)
    study.paused.unlink()
    command("resume", str(out), "--wait")
    assert_equals_local_run(summary(out), base)
    status = json.loads(command("status", str(out), "--json"))
    assert status["state"] == "finished" and status["trials"] == {"done": 2}
    assert {job["kind"]: job["states"] for job in status["submission"]["jobs"]} == {
        "array": {"COMPLETED": 2},
        "finish": {"COMPLETED": 1},
    }
    command("fetch", str(out), "--to", str(home))
    assert summary(home) == summary(out) and (home / "mlflow.db").exists() and not list(home.rglob("last"))
