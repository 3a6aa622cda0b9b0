"""Death of Ray's own processes: a one-line error, nothing lost or left, and the same command resumes. Slow."""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.execution.resources import cores
from tests.integrations.processes import lives, wait_for
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
    assert wait_for(lambda: not any(map(lives, family)), seconds=30), f"30 s later: {list(filter(lives, family))}"
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
    assert (out.parent / "stderr.txt").read_text().splitlines()[-1] == "got SIGTERM; rerun the same command to resume"


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
    assert "1 pack(s) at a time instead of 2" in caplog.text
    local = write_study(tmp_path / "local.yaml", store, **settings)
    assert command(["tune", str(local), "--out", str(tmp_path / "uninterrupted")]) == 0
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (out, tmp_path / "uninterrupted"))
    for summary in (ours, theirs):
        del summary["seconds"], summary["mlflow"]
    assert ours == theirs
    assert ours["trials"] == {"total": 6, "done": 6, "failed": 0, "pruned": 0}


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="two ranks need two cores")
def test_a_training_whose_ray_node_dies_exits_with_an_error(tmp_path: Path) -> None:
    tree = json.loads(json.dumps(toy.TREE))
    tree["data"]["store"], tree["optim"]["epochs"] = str(write_store(tmp_path / "store")), 200
    run, out = tmp_path / "run.yaml", tmp_path / "out"
    run.write_text(yaml12.dump(tree))
    assert_one_line(killed_in(["train", str(run), "--workers", "2", "--out", str(out)], out, "raylet"))
