"""Allocations and time limits on a real Slurm cluster: results equal those of a local run."""

import json
import re
from pathlib import Path

import pytest

from tests.integrations.processes import wait_for
from tests.real_slurm.cluster import Cluster
from tests.real_slurm.studies import (
    assert_equals_local_run,
    command,
    processes_of_job,
    readable_by_others,
    submitted,
    write_profile,
    write_study,
)
from tests.study.toy_study import BARE, write_store

pytestmark = pytest.mark.slurm

CLOSE = 2e-3  # float32: sums over ranks are rounded differently


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
