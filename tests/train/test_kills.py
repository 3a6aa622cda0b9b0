"""A training killed at every step and in every phase of every write ends bit-identical to an uninterrupted one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modis_dist.train import checkpoint
from modis_dist.train.journal import JournalWriter
from tests.train import kills, toy

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_after_hundreds_of_kills_results_are_bit_identical_and_no_file_is_left() -> None:
    soak = [sys.executable, "tools/soak.py", "--kills", "240", "--json"]
    ended = subprocess.run(soak, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    tally = json.loads(ended.stdout)
    assert tally["kills"] >= 240 and tally["differences"] == []
    assert tally["lives"] == tally["kills"] + tally["stops"] + tally["runs"]


@pytest.mark.slow
def test_after_kills_of_ranks_the_others_exit_and_results_are_bit_identical() -> None:
    soak = [sys.executable, "tools/soak.py", "--ranks", "2", "--kills", "10", "--json"]
    ended = subprocess.run(soak, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    tally = json.loads(ended.stdout)
    assert tally["kills"] == 10 and tally["runs"] >= 2 and tally["differences"] == []


# --- the comparison detects differences ---------------------------------------------------------------------


def trained(folder: Path) -> Path:
    with JournalWriter(folder / "journal.jsonl") as journal:
        toy.train([toy.member("t", toy.run("optim.epochs=2"), folder)], folder, callbacks=toy.Callbacks(journal))
    (folder / "result.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("uninterrupted"))


def nudge(folder: Path) -> None:
    loaded = checkpoint.load(checkpoint.latest(folder / "t" / "best"))
    shutil.rmtree(folder / "t" / "best")
    first = next(iter(loaded.tensors["model"].values()))
    first.view(-1)[0] = first.view(-1)[0].nextafter(first.new_tensor(9.0))
    checkpoint.save(folder / "t" / "best", loaded)


def cut_journal(folder: Path) -> None:
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (folder / "journal.jsonl").write_text("".join(line for line in lines if '"step":2' not in line))


def test_two_uninterrupted_trainings_are_identical(uninterrupted: Path, tmp_path: Path) -> None:
    assert kills.compared(trained(tmp_path), uninterrupted) == []


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (nudge, "best: model/"),
        (cut_journal, "journal: metrics: 1 against 2"),
        (lambda folder: (folder / "result.json").write_text("{ }"), "result.json is another"),
        (lambda folder: (folder / "last" / ".step-1.9.tmp").mkdir(), ".step-1.9.tmp is left over"),
    ],
)
def test_a_difference_is_reported(
    uninterrupted: Path, tmp_path: Path, spoil: Callable[[Path], object], expected: str
) -> None:
    spoil(trained(tmp_path))
    (difference,) = kills.compared(tmp_path, uninterrupted)
    assert expected in difference
