"""Killed Ray processes and failed GPUs: a one-line error, no leftovers, the same command resumes. Slow."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.execution import run_pack
from modis_dist.execution.resources import cores
from modis_dist.integrations.ray import tune
from modis_dist.integrations.ray.private_cluster import PrivateRay
from modis_dist.integrations.ray.train import RESTARTS, on_ranks
from modis_dist.runtime.errors import MachineFailed, NodeFailed
from modis_dist.train.process_group import RankSpec
from tests.integrations.processes import is_running, wait_for
from tests.integrations.ray.test_ray_tune import Watch, started
from tests.study.toy_study import BARE, write_store, write_study
from tests.train import toy


def checkpoints(out: Path) -> set[Path]:
    return set(out.glob("**/last/step-*"))


def killed_in(arguments: list[str], out: Path, victim: str) -> str:
    """Return the output of a command; ``victim``, a process of its Ray, is killed at its first checkpoint."""
    output, before = out.parent / "output.txt", checkpoints(out)
    with output.open("w") as file:
        driver = subprocess.Popen([*BARE, *arguments], stdout=file, stderr=file, start_new_session=True)
        try:
            saved = wait_for(lambda: checkpoints(out) - before, seconds=120)
            assert saved and driver.poll() is None, output.read_text()
            family = psutil.Process(driver.pid).children(recursive=True)
            (process_to_kill,) = [process for process in family if process.name() == victim]
            os.kill(process_to_kill.pid, signal.SIGKILL)
            assert driver.wait(60) == 3, output.read_text()
        finally:
            driver.kill()
            driver.wait()
    assert wait_for(lambda: not any(map(is_running, family)), seconds=30), list(filter(is_running, family))
    return output.read_text()


def assert_one_line(output: str) -> None:
    assert output.startswith("error: Ray") and output.count("\n") == 1, output


def assert_stopped_by_sigterm(study: Path, out: Path) -> None:
    """Stop a study by SIGTERM at its first checkpoint; assert its message, and that no process or folder is left."""
    with started(study, out) as driver, Watch(driver.pid) as watch:
        assert wait_for(lambda: checkpoints(out), seconds=120)
        os.kill(driver.pid, signal.SIGTERM)  # Ray replaces its handler
        assert driver.wait(60) == 75, (out.parent / "stderr.txt").read_text()
        assert wait_for(lambda: not watch.alive(), seconds=30), f"30 s later: {watch.alive()}"
    assert watch.folder is not None and not watch.folder.exists()
    assert (out.parent / "stderr.txt").read_text().splitlines()[-1].startswith("got SIGTERM; ")


@pytest.mark.slow
def test_a_study_that_is_interrupted_and_loses_rays_head_resumes_with_less_memory_to_the_same_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, out = write_store(tmp_path / "store"), tmp_path / "out"
    settings = {"packing": {"enabled": False}, "folds": 3, "probe": False}
    study = write_study(tmp_path / "study.yaml", store, executor="ray", **settings)
    arguments = ["tune", str(study), "--out", str(out)]
    assert_stopped_by_sigterm(study, out)
    assert_one_line(killed_in(arguments, out, "gcs_server"))
    with monkeypatch.context() as small:
        small.setattr("modis_dist.execution.memory.memory_limit", lambda: 2**30)
        assert command(arguments) == 0
    assert re.search(r"\b1 pack.* 2\b", caplog.text)
    local = write_study(tmp_path / "local.yaml", store, **settings)
    assert command(["tune", str(local), "--out", str(tmp_path / "uninterrupted")]) == 0
    summary, expected = (
        json.loads((folder / "summary.json").read_text()) for folder in (out, tmp_path / "uninterrupted")
    )
    for content in (summary, expected):
        del content["seconds"], content["mlflow"]
    assert summary == expected
    assert summary["trials"] == {"total": 6, "done": 6, "failed": 0, "pruned": 0}


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="two ranks need two cores")
def test_a_training_whose_ray_node_dies_exits_with_an_error(tmp_path: Path) -> None:
    tree = json.loads(json.dumps(toy.TREE))
    tree["data"]["store"], tree["optim"]["epochs"] = str(write_store(tmp_path / "store")), 200
    run, out = tmp_path / "run.yaml", tmp_path / "out"
    run.write_text(yaml12.dump(tree))
    assert_one_line(killed_in(["train", str(run), "--workers", "2", "--out", str(out)], out, "raylet"))


# --- a failed GPU -----------------------------------------------------------------------------------------------

TRAIN_PACK, FIT = tune.train_pack, run_pack.fit


def starts_of(folder: Path) -> list[str]:
    """Return the processes that tried to train, in order."""
    return (folder / "starts").read_text().splitlines()


def fails(folder: Path) -> bool:
    """Record the start of a training in a folder; return whether its GPU fails."""
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(starts_of(folder)) <= int((folder / "failures").read_text())


def train_pack_with_failing_gpu(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train a pack in a Ray worker whose GPU fails on the first starts of trainings with beta 1e-2."""

    def fit(members: Any, **settings: Any) -> Any:
        if members[0].run.objective.beta == 1e-2 and fails(Path(config["out"]).parent):
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return FIT(members, **settings)

    run_pack.fit = fit
    return TRAIN_PACK(config)


@pytest.mark.slow
def test_a_pack_whose_gpu_fails_is_retried_in_a_new_worker_and_no_trial_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"packing": {"enabled": False}, "folds": 1, "probe": False, "executor": "ray"}
    study = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), **settings)
    out, arguments = tmp_path / "out", ["tune", str(study), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(tune, "train_pack", train_pack_with_failing_gpu)
    (tmp_path / "failures").write_text("99")
    assert command(arguments) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "(CUDA error: uncorrectable ECC error encountered); " in line
    assert len(set(starts_of(tmp_path))) == tune.DEATHS + 1
    assert len(list(out.glob("trials/*/result.json"))) == 1 and not list(out.glob("packs/*/error.txt"))
    (tmp_path / "starts").unlink()
    (tmp_path / "failures").write_text("1")
    assert command(arguments) == 0
    assert len(set(starts_of(tmp_path))) >= 2
    trials = json.loads((out / "summary.json").read_text())["trials"]
    assert trials == {"total": 2, "done": 2, "failed": 0, "pruned": 0}


def rank_with_failing_gpu(spec: RankSpec, settings: Mapping[str, Any]) -> str:
    """Return the process of a rank; the GPU of rank 1 fails on the first starts."""
    if spec.rank == 1 and fails(Path(settings["folder"])):
        raise NodeFailed("the GPU failed")
    return str(os.getpid())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Train, imported in this process, uses its own old names
@pytest.mark.skipif(cores() < 2, reason="two ranks need two cores")
def test_ranks_restart_when_a_gpu_fails_and_a_gpu_that_fails_again_is_a_machine_failure(tmp_path: Path) -> None:
    restarts, settings = tmp_path / "ranks.log", {"folder": str(tmp_path)}
    resources = {"workers": 2, "threads": 1, "gpus": 0, "restart_log": restarts}
    with PrivateRay().ready(out=tmp_path, store=tmp_path) as folder:
        (tmp_path / "failures").write_text("1")
        assert on_ranks(rank_with_failing_gpu, settings, folder=folder, **resources) not in starts_of(tmp_path)
        assert len(restarts.read_text().splitlines()) == 1 and len(set(starts_of(tmp_path))) == 2
        (tmp_path / "failures").write_text("99")
        with pytest.raises(MachineFailed, match="the GPU failed"):
            on_ranks(rank_with_failing_gpu, settings, folder=folder, **resources)
    assert len(set(starts_of(tmp_path))) == 2 + RESTARTS + 1
