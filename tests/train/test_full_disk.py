"""A full or failing disk during a save: no results are lost, and no incomplete checkpoint is used."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from modis_dist.cli.display import RunBar
from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.execution.verify_resume import differences
from modis_dist.runtime import files
from modis_dist.train import checkpoint
from modis_dist.train.journal import JournalWriter, read
from modis_dist.train.loop import Callbacks
from tests.bare import skip_figures
from tests.study.toy_study import write_store
from tests.train import toy
from tests.train.test_checkpoint import made

FAILING = [errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE]
SETTINGS = ("optim.epochs=5", "optim.batch_size=16")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class AtEpoch:
    """A reporter that runs actions after given epochs, and records the content of ``last`` after every epoch."""

    def __init__(self, last: Path, actions: Mapping[int, Callable[[], None]]) -> None:
        self.last, self.actions, self.saved = last, actions, dict[int, list[str]]()

    def progress(self, *, epoch: int, **_: object) -> None:
        self.saved[epoch] = names(self.last)
        self.actions.get(epoch, lambda: None)()


def train_on_failing_disk(folder: Path, *, fail: Callable[[], None], repair: Callable[[], None]) -> AtEpoch:
    """Train the toy for five epochs on a disk that fails in epochs two and three."""
    reporter = AtEpoch(folder / "last", {1: fail, 3: repair})
    folder.mkdir()
    with JournalWriter(folder / "journal.jsonl") as journal:
        toy.train([toy.member("t", toy.run(*SETTINGS), folder)], folder, callbacks=Callbacks(journal, reporter))
    return reporter


def check_results(folder: Path, uninterrupted: Path, reporter: AtEpoch, log: str) -> None:
    first, _, _, fourth, last = (f"step-{epoch * 2:08d}" for epoch in range(1, 6))
    assert reporter.saved == {1: [first], 2: [first], 3: [first], 4: [fourth], 5: [last]}
    warnings = [line for line in log.splitlines() if "bytes needed" in line]
    assert len(warnings) == 2 and all(first in line for line in warnings)
    steps = [record["step"] for record in read(folder / "journal.jsonl") if record["kind"] == "metrics"]
    assert steps == [1, 2, 3, 4, 5]
    toy.train([toy.member("t", toy.run(*SETTINGS), uninterrupted)], uninterrupted)
    assert differences(folder, uninterrupted) == differences(folder / "t", uninterrupted / "t") == []


def test_a_temporary_disk_failure_logs_a_warning_and_results_stay_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        reporter = train_on_failing_disk(
            tmp_path / "failing", fail=lambda: patch.setattr(os, "fsync", failing), repair=patch.undo
        )
    check_results(tmp_path / "failing", tmp_path / "uninterrupted", reporter, caplog.text)
    assert "Input/output error (" in caplog.text


@pytest.mark.parametrize("number", FAILING)
@pytest.mark.parametrize("call", range(1, 7))
def test_a_checkpoint_whose_fsync_fails_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: int
) -> None:
    saved = checkpoint.save(tmp_path, made(1))
    original, remaining_calls = files.sync, [call]

    def failing(path: Path) -> None:
        remaining_calls[0] -= 1
        if remaining_calls[0] == 0:
            raise OSError(number, os.strerror(number))
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", failing)
        try:
            checkpoint.save(tmp_path, made(2))
        except OSError as error:
            assert error.errno == number
    assert remaining_calls[0] <= 0, "fewer calls than expected"
    assert list(tmp_path.iterdir()) == [saved] and checkpoint.problem(saved) is None
    assert checkpoint.save(tmp_path, made(2)) == checkpoint.newest(tmp_path)


def test_a_checkpoint_that_does_not_read_back_as_written_does_not_replace_its_predecessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint.save(tmp_path, made(1))
    original = files.sync

    def corrupting(path: Path) -> None:
        original(path)
        if path.name == "model.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"\x00")

    monkeypatch.setattr(files, "sync", corrupting)
    with pytest.raises(OSError, match=r"step-00000002: model\.safetensors"):
        checkpoint.save(tmp_path, made(2))
    assert checkpoint.newest(tmp_path) == saved


# --- a real small disk --------------------------------------------------------------------------------------

USER_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.slow
def test_a_training_on_a_full_tmpfs_loses_no_results(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*USER_NAMESPACE, "true"], check=False).returncode:
        pytest.skip("mounting a small disk needs user namespaces")
    code = "import sys; from pathlib import Path; from tests.train import test_full_disk as tests\n"
    code += "tests.on_a_small_disk(Path(sys.argv[1]))"
    command_line = [*USER_NAMESPACE, sys.executable, "-c", code, tmp_path]
    child = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


def on_a_small_disk(folder: Path) -> None:
    """Fill a disk of two megabytes during ``fit`` and during the command; needs a mount namespace."""
    disk, filler = folder / "disk", folder / "disk" / "filler"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    log = folder / "log"
    logging.basicConfig(filename=log)
    reporter = train_on_failing_disk(disk / "failing", fail=fill, repair=filler.unlink)
    check_results(disk / "failing", folder / "uninterrupted", reporter, log.read_text())
    assert "No space left on device (" in log.read_text()
    shutil.rmtree(disk / "failing")

    skip_figures()
    tree = json.loads(json.dumps(toy.TREE))
    tree["data"]["store"] = str(write_store(folder / "store"))
    tree["optim"] |= {"epochs": 5, "batch_size": 16}
    (folder / "run.yaml").write_text(yaml12.dump(tree))
    by_command(folder, disk / "last", {4: fill}, "step 10: No space left on device (")
    filler.unlink()
    by_command(folder, disk / "last", {}, "")
    stop = lambda: (fill(), os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    by_command(folder, disk / "stop", {2: stop}, "error: got SIGTERM; ")
    filler.unlink()
    by_command(folder, disk / "stop", {}, "")
    assert differences(disk / "stop", disk / "last") == []


def by_command(folder: Path, out: Path, actions: Mapping[int, Callable[[], None]], message: str) -> None:
    """Run ``modis-dist train``; given a message, it must exit with status 3 and print one line that contains it."""
    RunBar.progress = lambda _, **values: AtEpoch(out / "last", actions).progress(**values)  # type: ignore[method-assign]
    original_stderr, stderr_file = os.dup(2), folder / "stderr"
    with stderr_file.open("w") as file:
        os.dup2(file.fileno(), 2)
        status = command(["train", str(folder / "run.yaml"), "--out", str(out)])
        sys.stderr.flush()
        os.dup2(original_stderr, 2)
    lines = [line for line in stderr_file.read_text().splitlines() if line.startswith("error: ")]
    assert (status, len(lines)) == ((3, 1) if message else (0, 0)), stderr_file.read_text()
    assert message in stderr_file.read_text() and "Traceback" not in stderr_file.read_text()
    if message:
        assert len(names(out / "last")) == 1
