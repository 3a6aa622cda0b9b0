"""A study on a private Ray cluster: results, listeners, leftovers, kills. Slow: Ray starts and stops several times."""

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from modis_dist.cli.main import run as command
from modis_dist.config.study import Resources
from modis_dist.execution.resources import Cluster, Node
from modis_dist.execution.run_pack import load_pack
from modis_dist.integrations.mlflow.follower import LOWEST
from modis_dist.integrations.ray import reaper as ray_reaper
from modis_dist.integrations.ray import tune
from modis_dist.integrations.ray.private_cluster import (
    PREFIX,
    PrivateRay,
    driver_environment,
    environment,
    short_parent,
    temporary_folder,
)
from modis_dist.integrations.ray.train import STOP
from modis_dist.integrations.ray.tune import DEATHS, WORKER_DIED, RayExecutor
from modis_dist.runtime.errors import ConfigError, DataError, MachineFailed, NodeFailed
from modis_dist.runtime.lock import LOCK, holder, locked
from tests.integrations.processes import is_running, wait_for
from tests.integrations.slurm.toy_submission import planned
from tests.study.kills import compared
from tests.study.toy_study import BARE, write_store, write_study

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@contextmanager
def started(study: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a study in a separate process with umask 0; kill it at the end of the block."""
    with (out.parent / "stderr.txt").open("w") as output, (out.parent / "stdout.txt").open("w") as shown:
        driver = subprocess.Popen(
            [*BARE, "tune", str(study), "--out", str(out)],
            start_new_session=True,
            stdout=shown,
            stderr=output,
            text=True,
            umask=0,
        )
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


class Watch:
    """Polls a process and all its descendants in the background."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[int, psutil.Process] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.commands: set[str] = set()
        self.listeners: set[str] = set()
        self.folder: Path | None = None
        """Return the folder of Ray's files."""

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def alive(self) -> list[psutil.Process]:
        return [process for process in self._seen.values() if is_running(process)]

    def _poll(self) -> None:
        while not self._stop.wait(1):
            with suppress(psutil.NoSuchProcess):
                for process in [self._root, *self._root.children(recursive=True)]:
                    self._note(process)

    def _note(self, process: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            self._seen[process.pid] = process
            self.commands.add(" ".join(process.cmdline()))
            self.listeners |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            if "RAY_AUTH_TOKEN_PATH" in (environment := process.environ()):
                self.folder = Path(environment["RAY_AUTH_TOKEN_PATH"]).parent


def unreaped_descendants(driver: int, folder: Path) -> list[psutil.Process]:
    """Return the descendants of a driver that the reaper would not find, without the reaper itself.

    The MLflow follower (lowest priority) and Python's resource tracker are left out: they end without the reaper.
    """
    family = psutil.Process(driver).children(recursive=True)
    known = {*ray_reaper.processes_of(folder), *(p.pid for p in family if nice_or_python(p))}
    return [p for p in family if is_running(p) and p.pid not in known and ray_reaper.__file__ not in cmdline(p)]


def nice_or_python(process: psutil.Process) -> bool:
    try:
        return process.nice() == LOWEST or "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def results(out: Path) -> list[Path]:
    return list(out.glob("trials/*/result.json"))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six unpacked trials for two slots."""
    settings = {"executor": "ray", "packing": {"enabled": False}, "folds": 3}
    return write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), **settings)


@pytest.mark.slow
def test_a_private_ray_refuses_other_users_ends_with_its_killed_driver_and_the_study_resumes(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # must not be used
    with started(study, out) as driver, Watch(driver.pid) as watch:
        assert wait_for(lambda: results(out), seconds=120), (tmp_path / "stderr.txt").read_text()
        folder = watch.folder
        assert folder is not None
        _assert_private(folder)
        token = (folder / "token").read_text()
        assert not any(token in line for line in watch.commands)
        files = [*_files(folder), *_files(out), *tmp_path.glob("*.txt")]
        assert {path for path in files if token.encode() in _content(path)} == {folder / "token"}
        _assert_refused(next(match[1] for line in watch.commands if (match := re.search(r"--gcs-address=(\S+)", line))))
        assert all("--disable-frontend" in line for line in watch.commands if "dashboard/dashboard.py" in line)
        assert wait_for(lambda: not unreaped_descendants(driver.pid, folder), seconds=30), unreaped_descendants(
            driver.pid, folder
        )
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        assert wait_for(lambda: not watch.alive(), seconds=30), f"30 s later: {watch.alive()}"
    assert len(watch.commands) > 5 and watch.listeners and watch.listeners <= LOOPBACK
    finished = {path: path.stat().st_mtime_ns for path in results(out)}
    assert 0 < len(finished) < 8 and not folder.exists()

    assert command(["tune", str(study), "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished trial was run again"
    owners = [owner.pid for p in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if (owner := holder(p)) is not None]
    assert not {driver.pid, os.getpid()} & set(owners)
    local = write_study(tmp_path / "local.yaml", tmp_path / "store", packing={"enabled": False}, folds=3)
    assert command(["tune", str(local), "--out", str(uninterrupted)]) == 0
    assert compared(out, uninterrupted) == []


def _files(folder: Path) -> list[Path]:
    """Return every file below a folder that other processes change."""
    return [Path(root) / name for root, _, names in os.walk(folder) for name in names]


def _content(path: Path) -> bytes:
    """Return the content of a file; empty if it was removed meanwhile or is a socket."""
    try:
        return path.read_bytes()
    except OSError as error:
        assert error.errno in {errno.ENOENT, errno.ENXIO}, error
        return b""


def _assert_private(folder: Path) -> None:
    """Assert that no other user can enter the folder or reach what Ray makes public below it."""
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "token").stat().st_mode & 0o777 == 0o600
    sessions = [Path(root) / name for root, names, _ in os.walk(folder) for name in names if "session_" in name]
    opened = next(path for path in sessions if path.stat().st_mode & 0o007)
    if os.geteuid() == 0:
        nobody = 65534
        for path in (folder, folder / "token", opened):
            assert subprocess.run(["ls", str(path)], user=nobody, capture_output=True, check=False).returncode != 0


def _assert_refused(address: str) -> None:
    """Assert that Ray refuses a process without the token."""
    code = f"from ray._raylet import GcsClient; GcsClient(address='{address}')"
    stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    output = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, check=False)
    assert output.returncode != 0 and "InvalidAuthToken" in output.stderr


def test_tmp_is_used_if_the_path_of_the_temporary_folder_is_too_long_for_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The longest socket path of Ray 2.60, with the largest pid.
    longest = f"{PREFIX}12345678/r/session_2030-12-31_23-59-59_999999_4194304/sockets/plasma_store"
    for bytes_ in range(5, 60):
        parent = "/é" + "d" * (bytes_ - 3)
        monkeypatch.setattr(tempfile, "gettempdir", lambda parent=parent: parent)
        fits = len(f"{parent}/{longest}".encode()) <= 107
        assert short_parent() == Path(parent if fits else "/tmp")


@pytest.mark.slow
def test_ray_starts_despite_a_long_temporary_path_and_an_exception_leaves_no_process_or_file(
    tmp_path: Path,
) -> None:
    long = tmp_path / ("job" * 30)
    long.mkdir()
    code = "from modis_dist.integrations.ray.private_cluster import private_cluster\n"
    code += "with private_cluster(cpus=1, gpus=0) as folder:\n    print(folder, flush=True)\n    input()\n    1 / 0"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"TMPDIR": str(long)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **streams) as driver:
        assert driver.stdout is not None
        folder = Path(driver.stdout.readline().strip())
        family = psutil.Process(driver.pid).children(recursive=True)
        assert len(family) > 4 and str(folder).startswith(f"/tmp/{PREFIX}") and folder.stat().st_mode == 0o40700
        assert "ZeroDivisionError" in driver.communicate("\n", timeout=60)[1]
    assert not folder.exists()
    assert wait_for(lambda: not any(map(is_running, family)), seconds=30)


@pytest.mark.parametrize(
    ("environment", "open_file", "belongs"),
    [
        ("A=1\0RAY_AUTH_TOKEN_PATH=FOLDER/token\0", "elsewhere", True),
        ("A=1\0RAY_AUTH_TOKEN_PATH=FOLDER2/token\0", "elsewhere", False),
        ("A=1\0", "FOLDER/r/logs/tail", False),  # a process that reads a log
        ("\0\0\0\0B=2\0", "FOLDER/r/logs/agent.log", True),  # a process title has overwritten the environment
        ("\0\0\0\0B=2\0", "FOLDER2/r/logs/agent.log", False),
        ("", "FOLDER/r/logs/agent.log", False),  # a zombie
    ],
)
def test_the_reaper_identifies_processes_by_token_or_by_their_open_logs(
    environment: str, open_file: str, belongs: bool, tmp_path: Path
) -> None:
    process, folder = tmp_path / "proc" / "7", tmp_path / "modis"
    (process / "fd").mkdir(parents=True)
    (process / "environ").write_text(environment.replace("FOLDER", str(folder)))
    (process / "fd" / "7").symlink_to(open_file.replace("FOLDER", str(folder)))
    assert ray_reaper.processes_of(folder, proc=tmp_path / "proc") == ([7] if belongs else [])


def test_folders_of_killed_drivers_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    for name in ("dead", "living", "foreign"):
        (tmp_path / f"{PREFIX}{name}").mkdir()
    (tmp_path / f"{PREFIX}dead" / LOCK).write_text("")
    with locked(tmp_path / f"{PREFIX}living"), temporary_folder(tmp_path) as mine:
        assert {p.name for p in tmp_path.iterdir()} == {f"{PREFIX}living", f"{PREFIX}foreign", mine.name}
        assert mine.stat().st_mode & 0o777 == 0o700
    assert {p.name for p in tmp_path.iterdir()} == {f"{PREFIX}living", f"{PREFIX}foreign"}


# --- outcomes of packs, with Tune replaced ----------------------------------------------------------------------


@pytest.fixture
def ray_errors(tmp_path: Path) -> ModuleType:
    """Return Ray's exceptions. Ray keeps the token of its first import for the life of the process."""
    with environment(driver_environment(tmp_path)):
        import ray.exceptions

        return ray.exceptions


@dataclass(frozen=True)
class WithoutRay:
    """A backend that starts nothing."""

    folder: Path

    @property
    def cluster(self) -> Cluster:
        return Cluster("this machine", (Node(cores=2, gpus=0),))

    @contextmanager
    def ready(self, *, out: Path, store: Path) -> Iterator[Path]:
        assert out != store
        yield self.folder


Execute = Callable[[Callable[[list[str], Mapping[str, Any]], list[Any]]], Mapping[str, str]]


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_errors: ModuleType) -> Execute:
    """Return a function that executes four packs of one trial each; its argument replaces Tune.

    It gets the folders of packs and the settings of the workers, and returns a result of Tune for each folder.
    """
    from ray import tune as ray_tune

    store, out = write_store(tmp_path / "store"), tmp_path / "out"
    packs = planned(store, out).packs()

    def executed(fits: Callable[[list[str], Mapping[str, Any]], list[Any]]) -> Mapping[str, str]:
        class Tuner:
            def __init__(self, _: object, *, param_space: Mapping[str, Any], tune_config: Any, **__: object) -> None:
                assert tune_config.max_concurrent_trials == 2
                self.fit = partial(fits, param_space["pack"]["grid_search"], param_space)

        monkeypatch.setattr(ray_tune, "Tuner", Tuner)
        monkeypatch.setattr(tune, "while_ray_lives", lambda work: work())
        with RayExecutor(Resources(), backend=WithoutRay(tmp_path), device="cpu") as executor:
            return executor.execute(packs, out=out, store=store)

    assert ray_errors.RayError
    return executed


def trial_of(pack: str) -> str:
    """Return the id of the trial in the folder of a pack."""
    return load_pack(Path(pack))[0].ids[0]


def done(pack: str) -> SimpleNamespace:
    """Return Tune's result of a pack that was trained."""
    return SimpleNamespace(error=None, metrics={"pack": pack, "crashed": None})


def start(pack: str, settings: Mapping[str, Any]) -> None:
    """Start a pack in a worker that stops before it trains."""
    stopped = Path(settings["storage"]) / "stopped"
    stopped.mkdir(exist_ok=True)
    (stopped / STOP).write_text("asked")
    tune.train_pack({**settings, "pack": pack, "out": str(stopped)})


def test_a_pack_given_up_before_its_start_is_submitted_again_and_one_that_killed_its_workers_is_not(
    execute: Execute, ray_errors: ModuleType
) -> None:
    turns: list[list[str]] = []

    def fits(folders: list[str], settings: Mapping[str, Any]) -> list[Any]:
        turns.append(folders)
        if len(turns) > 1:
            return [done(pack) for pack in folders]
        for _ in range(DEATHS + 1):
            start(folders[1], settings)
        died = SimpleNamespace(error=ray_errors.ActorDiedError(), metrics={})
        return [done(folders[0]), died, died, done(folders[3])]

    reasons = execute(fits)
    (first, again), deadly = turns, trial_of(turns[0][1])
    assert again == [first[2]] and reasons == {deadly: WORKER_DIED}


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (DataError("pack.json: is damaged"), "pack.json: is damaged"),
        (ConfigError(["optim.lr: must be positive"], source="pack.json"), "pack.json: optim.lr: must be positive"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (ValueError("two\nlines"), "ValueError: two\\nlines"),
    ],
)
def test_an_exception_in_a_worker_is_the_crash_reason(
    raised: Exception, reason: str, execute: Execute, ray_errors: ModuleType
) -> None:
    sent = pickle.loads(pickle.dumps(ray_errors.RayTaskError("train_pack", "Traceback\n", raised)))
    for error in (sent, sent.as_instanceof_cause()):
        reasons = execute(
            lambda folders, _, error=error: [SimpleNamespace(error=error, metrics={}), *map(done, folders[1:])]
        )
        assert list(reasons.values()) == [reason]


def test_a_failed_gpu_in_every_worker_that_tried_a_pack_ends_the_study(
    execute: Execute, ray_errors: ModuleType
) -> None:
    failed = ray_errors.RayTaskError("train_pack", "Traceback\n", NodeFailed("packs/x: the GPU failed"))
    error = pickle.loads(pickle.dumps(failed)).as_instanceof_cause()
    with pytest.raises(MachineFailed, match="packs/x: ") as raised:
        execute(lambda folders, _: [*map(done, folders[1:]), SimpleNamespace(error=error, metrics={})])
    assert not isinstance(raised.value, NodeFailed), "the GPU may be on another node than the driver"


def test_dead_workers_are_retried_and_one_that_could_not_start_has_a_reason(
    execute: Execute, ray_errors: ModuleType
) -> None:
    missing = ModuleNotFoundError("No module named 'modis_dist'")
    cause = ray_errors.RayTaskError("__init__", f"Traceback\nModuleNotFoundError: {missing}", missing)
    turns: list[list[str]] = []

    def fits(folders: list[str], _: Mapping[str, Any]) -> list[Any]:
        turns.append(folders)
        if len(turns) > 1:
            return [done(pack) for pack in folders]
        errors = (
            ray_errors.ActorDiedError(),
            ray_errors.ActorDiedError(cause),
            ray_errors.ActorUnavailableError("", None),
        )
        dead, unable, away = (SimpleNamespace(error=error, metrics={}) for error in errors)
        return [dead, done(folders[1]), unable, away]

    reason = "its worker could not start: ModuleNotFoundError: No module named 'modis_dist'"
    assert execute(fits) == {trial_of(turns[0][2]): reason}
    assert turns[1:] == [[turns[0][0], turns[0][3]]]


def test_slots_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    executor = RayExecutor(Resources(), backend=PrivateRay())
    assert (executor.slots, executor.threads) == (cores, 1)
    assert RayExecutor(Resources(cpus=cores), backend=PrivateRay()).slots == 1


def test_workers_have_one_thread_each_if_gpus_outnumber_cores() -> None:
    backend = PrivateRay(Cluster("this machine", (Node(cores=4, gpus=8),)))
    executor = RayExecutor(Resources(), backend=backend, workers=4)
    assert (executor.threads, executor.slots) == (1, 1)


@pytest.mark.parametrize("resources", [Resources(cpus=4096), Resources(gpus=64)])
def test_too_many_resources_are_refused_before_ray_starts(resources: Resources) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.resources\.(cpus: 4096|gpus: 64)\b"):
        RayExecutor(resources, backend=PrivateRay())
