"""A private Ray cluster on this machine: on loopback, with a token and a temporary folder that is removed at the end.

By default Ray listens on all interfaces, makes its folders readable to everybody and connects to ``RAY_ADDRESS``.
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
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from modis_dist.execution.resources import Cluster, this_machine
from modis_dist.integrations.ray import reaper as ray_reaper
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.lock import LOCK, locked

PREFIX = "modis-"
SOCKET_BYTES = 107  # of a Unix socket's path, at most
RAY_BYTES = 81  # that Ray's socket paths add to the temporary folder
SHORT = Path("/tmp")
RAY_TOKEN = secrets.token_hex(32)  # one per process: Ray caches the first token that it reads
DRIVER_ENVIRONMENT: Mapping[str, str | None] = {  # in addition to that of workers; None removes a variable
    "RAY_ADDRESS": None,
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # otherwise a lost Ray would be replaced by one open to everybody
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


class RayBackend(Protocol):
    """The Ray cluster that workers run on."""

    @property
    def cluster(self) -> Cluster:
        """Nodes of the cluster."""
        ...

    def ready(self, *, out: Path, store: Path) -> AbstractContextManager[Path]:
        """Connect to Ray, whose workers must see these folders; yield a temporary folder that all workers see."""
        ...


@dataclass(frozen=True)
class PrivateRay:
    """A private Ray cluster on this machine, started by ``ready``."""

    cluster: Cluster = field(default_factory=this_machine)

    def ready(self, *, out: Path, store: Path) -> AbstractContextManager[Path]:  # noqa: ARG002
        (node,) = self.cluster.nodes
        return private_cluster(cpus=node.cores, gpus=node.gpus)


@contextmanager
def private_cluster(*, cpus: int, gpus: int) -> Iterator[Path]:
    """Start Ray and stop it at the end; yield a temporary folder that no other user may enter."""
    with temporary_folder(short_parent()) as folder, _reaper(folder), environment(driver_environment(folder)):
        import ray

        connect(num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _temp_dir=str(folder / "r"))
        try:
            yield folder
        finally:
            ray.shutdown()


def short_parent() -> Path:
    """Return the folder for temporary files; /tmp if its path is too long for Ray's sockets, as in some jobs."""
    usual = Path(tempfile.gettempdir())
    return usual if len(os.fsencode(usual)) + RAY_BYTES <= SOCKET_BYTES else SHORT


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a folder that no other user may enter and remove it at the end; first remove those of killed drivers."""
    for folder in parent.glob(f"{PREFIX}*"):
        _remove_if_abandoned(folder)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700: what Ray opens below it stays private
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a folder whose driver, on any machine, no longer holds its lock."""
    with suppress(OSError, DataError):  # of another user, or in use
        if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / LOCK).exists():
            return
        with locked(folder, patience_s=0):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reaper(folder: Path) -> Iterator[None]:
    """Start the process that cleans up after this one, however it ends."""
    command = [sys.executable, "-I", "-S", ray_reaper.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def connect(**settings: Any) -> None:
    """Call ``ray.init`` without output on the terminal."""
    import ray
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None  # Ray prints pages of state when nodes or workers end
    with _signal_handlers_kept():
        ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **settings)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Keep this process's signal handlers, which Ray replaces, and have Ray's processes ignore SIGHUP.

    A closing terminal signals its whole process group. Only the driver handles it: it makes workers save, then exits.
    """
    terminate, hang_up = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:  # an ignored signal stays ignored in new programs
        yield
    finally:
        signal.signal(signal.SIGHUP, hang_up)
        signal.signal(signal.SIGTERM, terminate)


def worker_environment() -> dict[str, str]:
    """Return the environment variables of processes that train, on any node."""
    package = str(Path(__file__).resolve().parents[3])  # workers start in another folder
    before = os.environ.get("PYTHONPATH")
    return {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how soon the end or death of a rank is noticed
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a pack without a GPU sees none
        "PYTHONPATH": f"{package}{os.pathsep}{before}" if before else package,
    }


def driver_environment(folder: Path) -> dict[str, str | None]:
    """Return the environment of the driver, which every process of a private Ray inherits."""
    token = folder / ray_reaper.TOKEN
    token.touch(mode=0o600)
    token.write_text(RAY_TOKEN)
    return {
        **worker_environment(),
        **DRIVER_ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # Tune would treat its kills as errors and end the study
    }


@contextmanager
def environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables during the block; None removes a variable."""
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
