"""A private Ray on this machine: loopback only, token, temporary folder of its own, gone afterwards.

Ray listens on all interfaces, opens its folders to everybody and attaches to whatever ``RAY_ADDRESS`` names unless it
is told otherwise; here it is told otherwise.
"""

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from modis_dist.launch import ray_reaper

PREFIX = "modis-"  # short: Ray's socket paths may have 107 bytes
OWNER = "owner.pid"


@contextmanager
def private_cluster(*, cpus: int, gpus: int) -> Iterator[Path]:
    """Start Ray with some resources; yields a temporary folder that nobody else may enter. Stops it at the end."""
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # 0700: what Ray opens below it stays closed
    (folder / OWNER).write_text(str(os.getpid()))
    with _reaper(folder), _environment(_settings(folder)):
        import ray

        with _children_survive_hang_up():
            ray.init(
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "r"),
            )
        try:
            yield folder
        finally:
            ray.shutdown()


@contextmanager
def _reaper(folder: Path) -> Iterator[None]:
    """Whoever clears up after this process, even where it is killed; done when the block is left."""
    command = [sys.executable, "-I", "-S", ray_reaper.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


@contextmanager
def _children_survive_hang_up() -> Iterator[None]:
    """A closing terminal tells all processes of its group; the driver alone is to obey: it has them save, and ends."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is ignored stays so in new programs
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _settings(folder: Path) -> dict[str, str | None]:
    """Environment of the driver and, inherited from it, of every process of Ray; None removes a variable."""
    token = folder / ray_reaper.TOKEN
    token.touch(mode=0o600)
    token.write_text(_token())
    package = str(Path(__file__).resolve().parents[2])  # workers start in another folder
    before = os.environ.get("PYTHONPATH")
    return {
        "RAY_ADDRESS": None,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listeners on 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how soon the end, or a death, of a rank is seen
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a pack without a GPU sees none
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "PYTHONPATH": f"{package}{os.pathsep}{before}" if before else package,
    }


@cache
def _token() -> str:
    """One for the life of this process: Ray remembers the first it has read."""
    return secrets.token_hex(32)


@contextmanager
def _environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    _apply(settings)
    try:
        yield
    finally:
        _apply(before)


def _apply(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _remove_leftovers() -> None:
    """Folders of drivers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = folder / OWNER
        try:
            mine = folder.stat().st_uid == os.getuid() and not folder.is_symlink()
            if mine and not psutil.pid_exists(int(owner.read_text())):
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue  # not one of ours
