"""Interrupted job arrays on a real Slurm cluster: results are bit-identical to those of a local run."""

import json
import re
from pathlib import Path

import pytest

from tests.real_slurm.cluster import Cluster
from tests.real_slurm.studies import (
    assert_equals_local_run,
    command,
    readable_by_others,
    submitted,
    summary,
    write_profile,
)
from tests.study.toy_study import BARE

pytestmark = pytest.mark.slurm


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
