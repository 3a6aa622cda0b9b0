"""Closed or unread output streams and closed terminals: a training continues, or saves and stops."""

import json
import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.execution.verify_resume import differences
from modis_dist.runtime.signals import SIGNALS
from modis_dist.study.status import status
from tests.study.toy_study import COMMAND, write_store
from tests.train import toy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    data = toy.TREE["data"] | {"store": str(write_store(tmp_path / "store"))}  # type: ignore[operator]
    path.write_text(yaml12.dump(toy.TREE | {"data": data}))
    return path


def started(
    run: Path, out: Path, *options: str, prepare: Callable[[], object], error: int
) -> "subprocess.Popen[bytes]":
    """Start a training in a new session after calling ``prepare`` in its process; its output is not read."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.Popen(
            [*COMMAND, "train", str(run), "--out", str(out), *options],
            stdout=writing,
            stderr=error,
            preexec_fn=prepare,  # noqa: PLW1509
            start_new_session=True,
        )
    finally:
        os.close(writing)


def _close_both() -> None:
    os.close(1)
    os.close(2)


@pytest.mark.parametrize("prepare", [_close_both, lambda: None], ids=["closed", "not read"])
def test_a_training_whose_output_cannot_be_written_finishes(
    prepare: Callable[[], None], run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (tmp_path / "stderr.txt").open("wb") as output:
        process = started(run, out, prepare=prepare, error=output.fileno())
    assert process.wait(120) == 0 and (tmp_path / "stderr.txt").read_text() == ""
    assert json.loads((out / "result.json").read_text())["status"] == "done"


@pytest.mark.parametrize("ignored", [False, True], ids=["hang-up", "nohup"])
def test_a_closed_terminal_saves_the_training_unless_it_was_started_with_nohup(
    ignored: bool, run: Path, tmp_path: Path
) -> None:
    out, (master, terminal) = tmp_path / "out", pty.openpty()

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = started(run, out, "--set", "optim.epochs=30", prepare=prepare, error=terminal)
    os.close(terminal)
    end = time.monotonic() + 120
    while not list(out.glob("last/step-*")) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.02)
    os.close(master)
    process.send_signal(signal.SIGHUP)  # as the kernel does for a controlling terminal
    assert process.wait(120) == (0 if ignored else 75)
    assert status(out).state == ("finished" if ignored else "interrupted")


def test_a_training_saves_at_every_signal_and_resumes_bit_identically(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    arguments = ["train", str(run), "--set", "optim.epochs=60", "--set", "trainer.checkpoint_every=1", "--out"]

    def signal_after_checkpoint(number: signal.Signals) -> None:
        before = {path.name for path in out.glob("last/step-*")}
        while not {path.name for path in out.glob("last/step-*")} - before:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    for number in SIGNALS:
        threading.Thread(target=signal_after_checkpoint, args=(number,), daemon=True).start()
        assert command([*arguments, str(out)]) == 75
        assert f"got {number.name}; saved " in " ".join(capsys.readouterr().err.split())
        assert not (out / "result.json").exists()
    assert command([*arguments, str(out)]) == 0
    assert command([*arguments, str(uninterrupted)]) == 0
    assert differences(out, uninterrupted) == []
