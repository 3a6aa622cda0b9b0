"""A study on a real Ray of its own: results, listeners, leftovers, kills. Slow: Ray starts and stops a few times."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from modis_dist.cli.main import run as command
from modis_dist.config.study import Resources
from modis_dist.errors import ConfigError
from modis_dist.launch.ray_cluster import OWNER, PREFIX, _remove_leftovers
from modis_dist.launch.ray_tune import RayExecutor
from tests.sweep.toy_study import COMMAND, write_store, write_study

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@contextmanager
def started(study: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """The study in a process of its own, which does not outlive the test."""
    with (out.parent / "stderr.txt").open("w") as said, (out.parent / "stdout.txt").open("w") as shown:
        driver = subprocess.Popen(
            [*COMMAND, "tune", str(study), "--out", str(out)],
            start_new_session=True,
            stdout=shown,
            stderr=said,
            text=True,
        )
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


def results(out: Path) -> list[Path]:
    return list(out.glob("trials/*/result.json"))


def wait_for(condition: Callable[[], object], *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def workers_of(out: Path) -> list[psutil.Process]:
    """Processes that Ray started for a study, by the private folder they were given."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or [])
        named = (process.info["environ"] or {}).get("MODIS_TEST", "")
        if named == str(out) and ("ray::" in line or "raylet" in line or "gcs_server" in line):
            found.append(process)
    return found


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six unpacked trials for two slots."""
    settings = {"executor": "ray", "packing": {"enabled": False}, "folds": 3}
    return write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), **settings)


def test_a_study_on_ray_listens_on_loopback_only_and_survives_the_death_of_driver_and_worker(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calm = tmp_path / "out", tmp_path / "calm"
    monkeypatch.setenv("MODIS_TEST", str(out))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # somebody else's Ray is not used
    with started(study, out) as driver:
        assert wait_for(lambda: results(out), seconds=120), (tmp_path / "stderr.txt").read_text()
        family = psutil.Process(driver.pid).children(recursive=True)
        beyond = {
            f"{process.name()} {connection.laddr}"
            for process in [psutil.Process(driver.pid), *family]
            for connection in listening(process)
            if connection.laddr.ip not in LOOPBACK
        }
        assert family and not beyond
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    finished = {path: path.stat().st_mtime_ns for path in results(out)}
    assert 0 < len(finished) < 8
    assert wait_for(lambda: not workers_of(out), seconds=10), "a process of Ray outlived its driver by 10 s"

    assert command(["tune", str(study), "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished trial was run again"
    assert not [p for p in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if (p / OWNER).exists()]
    local = write_study(tmp_path / "local.yaml", tmp_path / "store", packing={"enabled": False}, folds=3)
    assert command(["tune", str(local), "--out", str(calm)]) == 0
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (out, calm))
    for part in ("trials", "best", "test", "baseline", "groups"):
        assert ours[part] == theirs[part], part


def test_ctrl_c_saves_and_the_same_command_continues(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(study, out) as driver:
        assert wait_for(lambda: list(out.glob("packs/*/last/step-*")), seconds=120)
        os.kill(driver.pid, signal.SIGINT)
        assert driver.wait(60) == 75, (tmp_path / "stderr.txt").read_text()
    assert (tmp_path / "stderr.txt").read_text().splitlines()[-1] == "got SIGINT; the same command continues"
    assert command(["tune", str(study), "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["trials"] == {"total": 6, "done": 6, "failed": 0, "pruned": 0}


def listening(process: psutil.Process) -> list:
    try:
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def test_folders_of_killed_drivers_are_removed_and_those_of_living_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, owner in (("dead", 2**22 + 1), ("living", os.getpid())):
        folder = tmp_path / f"{PREFIX}{name}"
        folder.mkdir()
        (folder / OWNER).write_text(str(owner))
    (tmp_path / f"{PREFIX}foreign").mkdir()
    _remove_leftovers()
    assert {p.name for p in tmp_path.iterdir()} == {f"{PREFIX}living", f"{PREFIX}foreign"}


def test_slots_share_out_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert (RayExecutor(Resources()).slots, RayExecutor(Resources()).threads) == (cores, 1)
    assert RayExecutor(Resources(cpus=cores)).slots == 1


@pytest.mark.parametrize("asked", [Resources(cpus=4096), Resources(gpus=64)])
def test_more_than_the_machine_has_is_refused_before_ray_starts(asked: Resources) -> None:
    with pytest.raises(ConfigError, match="asked for, this machine has"):
        RayExecutor(asked)
