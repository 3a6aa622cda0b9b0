"""Status of a study or training: running, finished, killed, with incomplete or damaged files."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import parse
from modis_dist.config.study import Study
from modis_dist.execution.trial import sequence_digest
from modis_dist.runtime.files import write_json, write_text
from modis_dist.runtime.lock import Holder, holder, locked
from modis_dist.study import manifest
from modis_dist.study.manifest import Manifest
from modis_dist.study.status import Status, seconds_per_epoch, status
from modis_dist.train.journal import JournalWriter
from tests import toy_results
from tests.study.toy_study import BARE, tree, write_store, write_study
from tests.train import toy

HOLD = """import sys, time
from contextlib import ExitStack
from pathlib import Path
from modis_dist.runtime.lock import locked
with ExitStack() as open:
    for folder in sys.argv[1:]:
        open.enter_context(locked(Path(folder)))
    print("held", flush=True)
    time.sleep(600)"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A study of four trials in two packs, listed and not started; trained for at most 4 epochs."""
    folder = tmp_path / "out"
    folder.mkdir()
    study = parse.build(Study, tree(tmp_path / "store"), source="toy")
    trials = manifest.expand(study, "data", source="toy")
    packs = tuple(tuple(trial.id for trial in trials[start : start + 2]) for start in (0, 2))
    manifest.save(folder / "manifest.json", Manifest("toy", "data", trials, packs))
    write_text(folder / "study.yaml", parse.dump(study))
    return folder


def packs_of(out: Path) -> list[tuple[Path, list[str]]]:
    listed = json.loads((out / "manifest.json").read_text())["packs"]
    return [(out / "packs" / sequence_digest(ids), ids) for ids in listed]


def write_journal(folder: Path, trials: Sequence[str], times_s: Sequence[float], monkeypatch: Any) -> None:
    """Write a journal whose epochs end at the given times."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = JournalWriter(folder / "journal.jsonl")
    for step, at in enumerate(times_s, start=1):
        monkeypatch.setattr(
            "modis_dist.train.journal.time", SimpleNamespace(time_ns=lambda at=at: int(1000 * at) * 1_000_000)
        )
        for trial in trials:
            writer.metrics(trial, step=step, values={"loss": 1.0})
    writer.close()


def write_result(out: Path, trial: str, **values: Any) -> None:
    folder = out / "trials" / trial
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", toy_results.result(trial, **values))


@contextmanager
def locked_by_child(*folders: Path) -> Iterator["subprocess.Popen[str]"]:
    """Lock folders in another process during the block."""
    with subprocess.Popen([sys.executable, "-c", HOLD, *map(str, folders)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "held\n"
            yield child
        finally:
            child.kill()


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def advised(shown: Status) -> list[str]:
    """Return the command at the end of the advice."""
    return shlex.split(shown.advice[shown.advice.index("modis-dist ") :])


# --- states ---------------------------------------------------------------------------------------------------


def test_a_running_study_has_its_process_its_epochs_and_the_time_left_and_is_not_changed(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, trials), (second, _) = packs_of(out)
    write_journal(first, trials, [10, 13, 16], monkeypatch)
    with locked_by_child(out, first) as child:
        before = content(out)
        shown = status(out)
        assert content(out) == before
        assert command(["status", str(out)]) == 0
    assert (shown.kind, shown.name, shown.state, shown.stage) == ("study", "toy", "running", "search")
    assert shown.holder is not None and (shown.holder.pid, shown.holder.host) == (child.pid, socket.gethostname())
    assert shown.trials == {"running": 2, "waiting": 2}
    assert [(p.id, p.state, p.epoch, p.epochs, p.seconds_per_epoch) for p in shown.packs] == [
        (first.name, "running", 3, 4, 3.0),
        (second.name, "waiting", 0, 4, None),
    ]
    assert shown.eta_s == 1 * 3 + 4 * 3  # one pack at a time
    printed = capsys.readouterr().out
    assert f"process {child.pid}" in printed and "3 of 4" in printed and "15 s" in printed
    assert f"kill -INT {child.pid}" in printed


def test_after_sigkill_a_study_is_dead_and_after_an_orderly_end_interrupted(out: Path) -> None:
    with locked_by_child(out) as child:
        child.kill()
        child.wait()
        shown = status(out)
        assert (shown.state, shown.eta_s, shown.trials) == ("dead", None, {"waiting": 4})
        assert shown.holder is not None and shown.holder.pid == child.pid and shown.holder.alive is False
        assert advised(shown) == ["modis-dist", "tune", str(out / "study.yaml"), "--out", str(out)]
    with locked(out, patience_s=0):
        assert holder(out) is not None
    assert holder(out) is None
    assert status(out).state == "interrupted" and status(out).holder is None


def test_a_process_with_the_reused_pid_of_a_dead_one_is_not_the_holder(out: Path) -> None:
    reused = Holder(os.getpid(), socket.gethostname(), started=1.0)
    (out / "lock").write_text(json.dumps(asdict(reused)))
    assert status(out).state == "dead"


def test_a_process_on_another_machine_is_neither_alive_nor_dead(out: Path) -> None:
    (out / "lock").write_text(json.dumps({"pid": 1, "host": "node-17", "started": 5.0}))
    shown = status(out)
    assert shown.state == "elsewhere" and "node-17" in shown.advice and "process 1 " in shown.advice


def test_results_are_counted_by_status_and_failures_have_reasons(out: Path) -> None:
    (_, (done, failed)), (crashed, (pruned, odd)) = packs_of(out)
    write_result(out, done)
    write_result(out, failed, status="failed", reason="loss is nan at step 3")
    write_result(out, pruned, status="pruned")
    crashed.mkdir(parents=True)
    (crashed / "error.txt").write_text("Traceback\n  frame\nMemoryError: out of it\n\n")
    shown = status(out)
    assert shown.trials == {"done": 1, "failed": 1, "pruned": 1, "crashed": 1}
    assert shown.failures == {failed: "loss is nan at step 3", odd: "MemoryError: out of it"}
    (out / "trials" / odd).mkdir()
    (out / "trials" / odd / "result.json").write_text('{"status": "do')
    assert status(out).trials["damaged"] == 1


def test_a_finished_study_with_crashed_trials_is_finished_and_advises_to_retry_them(out: Path) -> None:
    (_, first), (_, (third, crashed)) = packs_of(out)
    for trial in (*first, third):
        write_result(out, trial)
    write_json(out / "summary.json", toy_results.summary(failures={crashed: "the worker died 3 times"}))
    shown = status(out)
    assert (shown.state, shown.stage) == ("finished", "done")
    assert shown.failures == {crashed: "the worker died 3 times"}
    assert shown.advice.startswith("1 ") and advised(shown)[:2] == ["modis-dist", "tune"]
    (out / "lock").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "started": 5.0}))
    assert status(out).state == "dead"  # killed while it retried the crashed trial


def test_a_single_training_has_the_same_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "run.yaml", parse.dump(toy.run()))
    write_journal(tmp_path, ["id"], [10, 12, 14], monkeypatch)
    with locked_by_child(tmp_path) as child:
        shown = status(tmp_path)
        assert (shown.kind, shown.state, shown.stage, shown.trials) == ("run", "running", "training", {"running": 1})
        assert (shown.packs[0].epoch, shown.packs[0].epochs, shown.eta_s) == (3, 4, 2.0)
        child.kill()
        child.wait()
        shown = status(tmp_path)
        assert (shown.state, shown.trials) == ("dead", {"stopped": 1})
        assert advised(shown) == ["modis-dist", "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path)]
    write_json(tmp_path / "result.json", toy_results.result("toy", status="failed", reason="loss is nan"))
    shown = status(tmp_path)
    assert (shown.state, shown.trials, shown.failures) == ("finished", {"failed": 1}, {"toy": "loss is nan"})


# --- pace -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times_s", "pace"), [([], None), ([5], None), ([5, 7], 2.0), ([5, 7, 9, 5000, 5002], 2.0), ([5, 4], 0.0)]
)
def test_the_pace_is_the_median_which_ignores_a_pause_between_two_starts(
    times_s: list[float], pace: float | None
) -> None:
    records = [{"trial": "a", "step": k, "time_ms": int(1000 * at)} for k, at in enumerate(times_s)]
    assert seconds_per_epoch(records) == pace


def test_the_time_left_is_unknown_before_two_epochs_and_then_shared_by_the_running_packs(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, a), (second, b) = packs_of(out)
    write_journal(first, a, [10], monkeypatch)
    second.mkdir(parents=True)
    with locked_by_child(out, first, second):
        assert status(out).eta_s is None
        write_journal(second, b, [20, 22], monkeypatch)
        assert status(out).eta_s == max((3 * 2 + 2 * 2) / 2, 3 * 2)


def test_the_pace_of_finished_packs_counts_until_a_running_one_has_its_own(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, done), (second, running) = packs_of(out)
    write_journal(first, done, [10, 12, 14], monkeypatch)
    for trial in done:
        write_result(out, trial)
    write_journal(second, running, [20], monkeypatch)
    with locked_by_child(out, second):
        assert status(out).eta_s == 3 * 2
        write_journal(second, running, [25], monkeypatch)  # repeats epoch 1: only the first counts
        assert status(out).eta_s == 3 * 2


def test_a_partly_written_record_is_not_counted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, trials = packs_of(out)[0]
    write_journal(first, trials, [1, 2, 3], monkeypatch)
    with (first / "journal.jsonl").open("ab") as file:
        file.truncate((first / "journal.jsonl").stat().st_size - 9)
    (out / "lock").write_text('{"pid": 12')
    shown = status(out)
    assert shown.packs[0].epoch == 3 and shown.state == "interrupted"  # the other trial's line of epoch 3 is whole


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}'])
def test_a_damaged_manifest_exits_with_one_line_and_code_2(
    out: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "manifest.json").write_text(text)
    assert command(["status", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out / 'manifest.json'}: ")


def test_a_folder_without_a_run_exits_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert command(["status", str(tmp_path / "none")]) == 2


# --- real processes -------------------------------------------------------------------------------------------


def wait_for_epoch(folder: Path, child: "subprocess.Popen[bytes]") -> Status:
    """Return the first status with an epoch."""
    end = time.monotonic() + 120
    while time.monotonic() < end and child.poll() is None:
        if (folder / "manifest.json").exists():
            shown = status(folder)
            if any(pack.epoch for pack in shown.packs):
                return shown
        time.sleep(0.05)
    raise AssertionError("no epoch was seen")


def test_the_advice_for_a_killed_study_finishes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "the out"
    study = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"))
    with subprocess.Popen([*BARE, "tune", str(study), "--out", str(out)], stderr=subprocess.DEVNULL) as driver:
        shown = wait_for_epoch(out, driver)
        assert shown.state == "running" and shown.holder is not None and shown.holder.pid == driver.pid
        driver.send_signal(signal.SIGKILL)
    shown = status(out)
    assert (shown.state, sum(shown.trials.values())) == ("dead", 4)
    assert command(advised(shown)[1:]) == 0
    capsys.readouterr()
    assert command(["status", str(out), "--json"]) == 0
    finished = json.loads(capsys.readouterr().out)
    assert tuple(finished[key] for key in ("state", "stage", "trials", "refits")) == (
        "finished",
        "done",
        {"done": 4},
        {"done": 1},
    )
