"""Trainings on several real ranks with Ray Train: equal results, restarts after deaths, packs, refusals. Slow."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.execution.resources import cores
from modis_dist.execution.verify_resume import differences
from modis_dist.integrations.ray.train import UNUSED_CALLBACKS
from modis_dist.runtime.lock import locked
from modis_dist.train.journal import JournalReader
from tests.integrations.ray.without_ray import train_two_ranks
from tests.study.toy_study import COMMAND, write_store, write_study
from tests.train import toy

needs_two_cores = pytest.mark.skipif(cores() < 2, reason="two ranks need two cores")
FOUR_CORES = """
from modis_dist.execution import resources
resources.cores = lambda: 4
from modis_dist.cli.main import main
main()
"""
CLOSE = 2e-3  # float32: sums over ranks are rounded differently, which four epochs amplify


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on the toy store."""
    tree = json.loads(json.dumps(toy.TREE))
    tree["data"]["store"] = str(write_store(tmp_path / "store"))
    tree["optim"]["epochs"], tree["trainer"]["metric"] = 4, "reconstruction_mse"
    path = tmp_path / "run.yaml"
    path.write_text(yaml12.dump(tree))
    return path


def history(out: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((out / "history.json").read_text())
    return rows


def ranks_of(driver: int) -> list[psutil.Process]:
    """Return the Ray workers of a driver that train."""
    ranks = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            ranks += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    return ranks


def output_text(folder: Path) -> str:
    """Return the output of the command, wrapped lines joined."""
    return " ".join((folder / "output.txt").read_text().split("\n"))


@contextmanager
def started(command_line: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with its output in a file of the folder."""
    with (folder / "output.txt").open("w") as log_file:
        driver = subprocess.Popen(command_line, stdout=log_file, stderr=log_file, start_new_session=True)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


@pytest.mark.slow
@needs_two_cores
def test_two_workers_that_are_killed_interrupted_and_hung_in_turn_are_bit_identical_to_uninterrupted_ones(
    run: Path, tmp_path: Path
) -> None:
    settings = ["optim.epochs=60", "trainer.log_every=5"]
    arguments = ["train", str(run), "--workers", "2", *(word for text in settings for word in ("--set", text))]
    out, uninterrupted, single = tmp_path / "interrupted", tmp_path / "uninterrupted", tmp_path / "one"
    command_line = [*COMMAND, *arguments, "--out", str(out)]
    train_two_ranks(run, uninterrupted, settings)
    with started(command_line, tmp_path) as driver:
        assert wait_for_epoch(out, 10), output_text(tmp_path)
        os.kill(ranks_of(driver.pid)[1].pid, signal.SIGKILL)
        assert wait_for((out / "ranks.log").exists), output_text(tmp_path)
        family = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGTERM)  # Ray has its own handler for it
        assert driver.wait(60) == 75, output_text(tmp_path)
    assert "SIGTERM" in output_text(tmp_path)
    (line,) = (out / "ranks.log").read_text().splitlines()
    assert "killed" in line and line.endswith("all ranks restart from the last checkpoint")
    assert line in output_text(tmp_path)
    assert not (out / "result.json").exists()
    assert not psutil.wait_procs(family, timeout=30)[1]
    hung = hang_rank_0(command_line, out)
    (_, line) = (out / "ranks.log").read_text().splitlines()
    assert f"rank 0 of 2 (process {hung} on " in line and " 60 s" in line and "(SIGSTOP)" in line
    assert line in output_text(tmp_path)
    assert [row["epoch"] for row in history(out)] == list(range(1, 61))
    assert history(out) == history(uninterrupted)
    assert differences(out, uninterrupted) == []
    assert command(["train", str(run), "--out", str(single), "--set", "optim.epochs=4"]) == 0
    for row, right in zip(history(out)[:4], history(single), strict=True):
        assert row == pytest.approx(right, rel=CLOSE, abs=CLOSE)


def hang_rank_0(command_line: list[str], out: Path) -> int:
    """Stop rank 0 (SIGSTOP); return its pid once it is killed and the training has finished by restarting."""
    next_epoch = reached(out) + 5
    with started(command_line, out.parent) as driver:
        assert wait_for_epoch(out, next_epoch), output_text(out.parent)
        pid: int = json.loads((out / "lock").read_text())["pid"]  # rank 0 holds the lock
        assert pid in {process.pid for process in ranks_of(driver.pid)}
        os.kill(pid, signal.SIGSTOP)
        assert driver.wait(240) == 0, output_text(out.parent)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return pid


def test_a_locked_folder_is_refused_before_ray_starts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "modis_dist.integrations.ray.private_cluster.private_cluster", lambda **_: pytest.fail("Ray was started")
    )
    out = tmp_path / "taken"
    out.mkdir()
    with locked(out):
        assert command(["train", str(run), "--out", str(out), "--workers", "2"]) == 2
    assert f"process {os.getpid()} on " in capsys.readouterr().err


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def reached(out: Path) -> int:
    """Return the last epoch in the journal of a training."""
    return max((r["step"] for r in JournalReader(out / "journal.jsonl").new() if r["kind"] == "metrics"), default=0)


def wait_for_epoch(out: Path, epoch: int) -> bool:
    """Wait until a training has reached an epoch."""
    reader = JournalReader(out / "journal.jsonl")
    return wait_for(lambda: any(r["kind"] == "metrics" and r["step"] >= epoch for r in reader.new()))


def test_the_unused_callbacks_exist_in_ray_train() -> None:
    text = (
        f"import ray.train.v2.api.data_parallel_trainer as made; assert vars(made).keys() >= {{*{UNUSED_CALLBACKS!r}}}"
    )
    subprocess.run([sys.executable, "-c", text], check=True)


@pytest.mark.slow
@needs_two_cores
def test_packs_of_several_workers_train_at_once_and_survive_the_death_of_one(tmp_path: Path) -> None:
    store, out, single = write_store(tmp_path / "store"), tmp_path / "two", tmp_path / "one"
    settings = {"folds": 1, "packing": {"max_trials": 1}}
    longer = ["--set", "optim.epochs=12", "--set", "trainer.checkpoint_every=1"]
    study = write_study(tmp_path / "ray.yaml", store, executor="ray", **settings)
    command_line = [sys.executable, "-c", FOUR_CORES, "tune", str(study), "--out", str(out), *longer]
    max_ranks, killed = 0, None
    with started([*command_line, "--set", "trainer.workers=2"], tmp_path) as driver:
        while driver.poll() is None:
            ranks = ranks_of(driver.pid)
            max_ranks = max(max_ranks, len(ranks))
            if ranks and killed is None and list(out.glob("packs/*/last/step-*")):
                killed = ranks[-1].pid
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.05)
        assert driver.wait() == 0, output_text(tmp_path)
    assert killed is not None and max_ranks >= 4, "packs were trained one after the other"
    local = write_study(tmp_path / "local.yaml", store, executor="local", **settings)
    assert command(["tune", str(local), "--out", str(single), *longer]) == 0
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, single))
    assert summary["trials"] == expected["trials"] == {"total": 2, "done": 2, "failed": 0, "pruned": 0}
    assert sorted(p.name for p in (out / "trials").iterdir()) == sorted(p.name for p in (single / "trials").iterdir())
    for trial in (out / "trials").iterdir():
        ran, right = history(trial), history(single / "trials" / trial.name)
        assert [row["epoch"] for row in ran] == [row["epoch"] for row in right] == list(range(1, len(right) + 1))
        for row, other in list(zip(ran, right, strict=True))[:4]:
            losses = [name for name in other if name.startswith("train/")]
            assert [row[name] for name in losses] == pytest.approx([other[n] for n in losses], rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "RUN", "--out", "o", "--workers", "999"], "trainer.workers: 999 of 1 thread(s) requested"),
        (["train", "RUN", "--out", "o", "--workers", "2", "--set", "trainer.device=cuda:1"], "trainer.device: cuda:1"),
        (
            ["train", "RUN", "--out", "o", "--set", "trainer.precision=fp16", "--set", "trainer.device=cpu"],
            "trainer.precision: fp16",
        ),
        (["tune", "STUDY", "--set", "trainer.workers=2"], "sweep.executor: ray"),
        (["tune", "STUDY", "--set", "trainer.workers=999", "--set", "sweep.executor=ray"], "this machine has"),
    ],
)
def test_impossible_workers_and_precision_are_one_line_errors(
    arguments: list[str], expected: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study.yaml", tmp_path / "store")
    before = sorted(tmp_path.iterdir())
    filled = [{"RUN": str(run), "STUDY": str(study), "o": str(tmp_path / "o")}.get(a, a) for a in arguments]
    assert command(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert sorted(tmp_path.iterdir()) == before
