"""`modis-dist verify-resume` with real kills: the verdict is right, and no file of the user changes."""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from modis_dist.cli.main import run as command
from modis_dist.execution import verify_resume
from modis_dist.execution.verify_resume import VerificationResult, differences
from modis_dist.train import checkpoint
from modis_dist.train.checkpoint import Checkpoint
from tests.execution.test_single import write_run
from tests.integrations.processes import is_running, wait_for
from tests.ranks import CONTEXT
from tests.study.toy_study import COMMAND, write_store

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run.yaml``."""
    folder = tmp_path_factory.mktemp("verify")
    store = write_store(tmp_path_factory.mktemp("data") / "store", samples=60)
    write_run(folder / "run.yaml", store=str(store))
    return folder


@pytest.mark.slow
def test_a_run_that_is_killed_twice_is_bit_identical_and_its_folder_unchanged(folder: Path, capsys: Captured) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert command(["verify-resume", str(folder), "--kills", "2", "--seed", "1", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["equal"] and output["differences"] == [] and output["tensors"] > 100
    assert (output["epochs"], output["steps"], len(set(output["kills"]))) == (2, 6, 2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_in_turn_is_bit_identical(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_resume, "get_context", lambda _: CONTEXT)  # PyTorch is loaded once for all processes
    settings = ["--set", "trainer.workers=2", "--kills", "2", "--seed", "3", "--json"]
    assert command(["verify-resume", str(folder), *settings]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["equal"] and output["differences"] == [] and output["tensors"] > 100
    assert {kill % 2 for kill in output["kills"]} == {0, 1}, "each rank is killed once"


def test_a_difference_exits_with_3_and_is_named(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = ("last: progress 0 history epoch 2 train/total_g: 0.1 against 0.2", "last: model/w")
    monkeypatch.setattr(verify_resume, "verify", lambda *_, **__: VerificationResult(2, 8, (3, 5), 100, reported))
    assert command(["verify-resume", str(folder / "run.yaml")]) == 3
    output = capsys.readouterr()
    assert "2 differences" in output.out and all(line in output.out for line in reported)
    assert output.err.startswith("error: ") and "epoch 2 train/total_g" in output.err and output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/.."], "no run.yaml"),
        (["{folder}/nowhere"], "does not exist"),
        (["{folder}/run.yaml", "--set", "data.store={folder}/nowhere"], "data.store: no such folder"),
        (["{folder}/run.yaml", "--set", "data.modalities=[rna]"], "rna"),
        (["{folder}/run.yaml", "--kills", "1000", "--epochs", "1"], "--kills"),
        (["{folder}/run.yaml", "--set", "trainer.workers=4000"], "trainer.workers: 4000"),
    ],
)
def test_a_run_that_cannot_be_verified_is_a_one_line_error(
    folder: Path, capsys: Captured, arguments: list[str], message: str
) -> None:
    assert command(["verify-resume", *(argument.format(folder=folder) for argument in arguments)]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and output.count("\n") == 1 and message in output


def training_of(command: psutil.Process, folder: Path, *, begun: bool) -> psutil.Process:
    """Return a training process of a command once it exists, or, if ``begun``, once it has trained an epoch."""

    def training() -> psutil.Process | None:
        journals = "".join(path.read_text() for path in folder.rglob("journal.jsonl"))
        known = [child for child in command.children() if "spawn_main" in " ".join(child.cmdline())]
        return known[0] if known and (not begun or '"metrics"' in journals) else None

    assert wait_for(training, seconds=60)
    child = training()
    assert child is not None
    return child


@pytest.mark.parametrize(
    ("number", "begun"),
    [(signal.SIGTERM, True), (signal.SIGHUP, False), (signal.SIGINT, False), (signal.SIGKILL, True)],
)
def test_a_signal_ends_the_command_and_its_trainings_and_removes_their_folder(
    folder: Path, tmp_path: Path, number: signal.Signals, begun: bool
) -> None:
    long = [*COMMAND, "verify-resume", str(folder), "--epochs", "10000"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(long, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        child = training_of(psutil.Process(process.pid), tmp_path, begun=begun)
        # A terminal signals the whole process group, others only the command.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, output = process.communicate(timeout=60)
        assert wait_for(lambda: not is_running(child), seconds=30)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        return  # no process is left to clean up
    assert process.returncode == 75 and list(tmp_path.glob("verify-*")) == []
    assert output.startswith(f"got {number.name}; ") and output.count("\n") == 1


# --- comparing ----------------------------------------------------------------------------------------------


def saved(folder: Path, **changes: object) -> Path:
    """Save a checkpoint in ``last`` and return the folder."""
    tensors = {"a": torch.tensor([0.0, 1.0]), "n": torch.tensor(3.0)}
    values = {"step": 4, "state": history(0.25), "tensors": {"model": tensors}} | changes
    checkpoint.save(folder / "last", Checkpoint(**values))
    return folder


def test_equal_checkpoints_have_no_difference(tmp_path: Path) -> None:
    assert differences(saved(tmp_path / "one"), saved(tmp_path / "two")) == []


def history(loss: float) -> dict:
    """A state after two epochs."""
    rows = [{"epoch": 1.0, "train/total_g": 0.5}, {"epoch": 2.0, "train/total_g": loss}]
    return {"progress": [{"history": rows}]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": 5}, ["last: step 4 against 5"]),
        ({"tensors": {"model": {"a": torch.tensor([-0.0, 1.0]), "n": torch.tensor(3.0)}}}, ["last: model/a"]),
        ({"tensors": {"model": {"a": torch.tensor([0.0, 1.0]).half(), "n": torch.tensor(3)}}}, None),
        ({"tensors": {"model": {"a": torch.tensor([0.0, 1.0])}}}, ["last: model/n"]),
        ({"state": {"progress": [], "more": True}}, None),
        ({"state": history(0.3)}, ["last: progress 0 history epoch 2 train/total_g: 0.25 against 0.3"]),
    ],
)
def test_a_difference_of_one_bit_is_reported_by_name(tmp_path: Path, changes: dict, expected: list[str] | None) -> None:
    reported = differences(saved(tmp_path / "one"), saved(tmp_path / "two", **changes))
    assert len(reported) == 2 if expected is None else reported == expected


def test_a_checkpoint_that_is_missing_on_one_side_is_a_difference(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    assert differences(saved(tmp_path / "one"), tmp_path / "two") == [f"last: is missing in {tmp_path / 'two'}"]
