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
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from modis_dist.execution.resources import Cluster, this_machine
from modis_dist.integrations.ray import reaper as ray_reaper
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.lock import LOCK, locked

PREFIX = "modis-"
SOCKET_BYTES = 107  # of a Unix socket's path, at most
RAY_BYTES = 81  # of those that Ray and we add to the folder for temporary files
SHORT = Path("/tmp")
OF_DRIVER: Mapping[str, str | None] = {  # in its environment, with what its workers find in theirs; None removes one
    "RAY_ADDRESS": None,
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # where Ray is lost, it would start another one, open to everybody
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


class RayBackend(Protocol):
    """Where Ray's workers run."""

    @property
    def cluster(self) -> Cluster:
        """Its nodes."""
        ...

    def ready(self, *, out: Path, store: Path) -> AbstractContextManager[Path]:
        """Ray, connected, with workers that see these folders; yields one for temporary files that all of them see."""
        ...


@dataclass(frozen=True)
class PrivateRay:
    """A Ray of one's own on this machine, started when it is needed."""

    cluster: Cluster = field(default_factory=this_machine)

    def ready(self, *, out: Path, store: Path) -> AbstractContextManager[Path]:  # noqa: ARG002
        """Its folder is its own: nobody is elsewhere."""
        (node,) = self.cluster.nodes
        return private_cluster(cpus=node.cores, gpus=node.gpus)


@contextmanager
def private_cluster(*, cpus: int, gpus: int) -> Iterator[Path]:
    """Start Ray with some resources; yields a temporary folder that nobody else may enter. Stops it at the end."""
    with temporary_folder(short_parent()) as folder, _reaper(folder), environment(_private(folder)):
        import ray

        connect(num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _temp_dir=str(folder / "r"))
        try:
            yield folder
        finally:
            ray.shutdown()


def short_parent() -> Path:
    """The folder for temporary files; /tmp where that has too long a path for Ray's sockets, as those of jobs may."""
    usual = Path(tempfile.gettempdir())
    return usual if len(os.fsencode(usual)) + RAY_BYTES <= SOCKET_BYTES else SHORT


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder that nobody else may enter, gone afterwards; those of drivers that were killed go first."""
    for left in parent.glob(f"{PREFIX}*"):
        _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # 0700: what Ray opens below it stays closed
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose driver, on whatever machine, does not hold its lock any more."""
    with suppress(OSError, DataError):  # not ours, or in use
        if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / LOCK).exists():
            return
        with locked(folder, patience_s=0):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reaper(folder: Path) -> Iterator[None]:
    """Whoever clears up after this process, even where it is killed; done when the block is left."""
    command = [sys.executable, "-I", "-S", ray_reaper.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def connect(**settings: Any) -> None:
    """``ray.init`` with some settings, which says nothing on the terminal: what a user must know we say."""
    import ray
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None  # the end of nodes and workers, with pages of their state
    with _own_signals():
        ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **settings)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep Ray from putting its own handlers in the place of ours.

    A closing terminal tells all processes of its group, which the children of Ray are not to obey; the driver alone
    is: it has them save, and ends.
    """
    terminate, hang_up = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:  # what is ignored stays so in new programs
        yield
    finally:
        signal.signal(signal.SIGHUP, hang_up)
        signal.signal(signal.SIGTERM, terminate)


def for_workers() -> dict[str, str]:
    """What the processes of our trainings must find in their environment, wherever they run."""
    package = str(Path(__file__).resolve().parents[3])  # workers start in another folder
    before = os.environ.get("PYTHONPATH")
    return {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how soon the end, or a death, of a rank is seen
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a pack without a GPU sees none
        "PYTHONPATH": f"{package}{os.pathsep}{before}" if before else package,
    }


def _private(folder: Path) -> dict[str, str | None]:
    """Environment of the driver and, inherited from it, of every process of a private Ray."""
    token = folder / ray_reaper.TOKEN
    token.touch(mode=0o600)
    token.write_text(_token())
    return {
        **for_workers(),
        **OF_DRIVER,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listeners on 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # Tune would take its kills for errors, and end the study
    }


@cache
def _token() -> str:
    """One for the life of this process: Ray remembers the first it has read."""
    return secrets.token_hex(32)


@contextmanager
def environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """These variables for the time of the block; None removes one."""
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
