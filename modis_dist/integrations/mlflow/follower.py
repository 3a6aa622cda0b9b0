"""A separate idle-priority process that follows a run folder and keeps MLflow up to date.

MLflow costs milliseconds of CPU time per epoch and trial, and seconds to import; in a separate process it delays no
training. Driver and follower share only the run folder.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow.runs import is_permanent
from modis_dist.integrations.mlflow.sync import (
    StudySync,
    SyncResult,
    describe,
    is_running,
    read_state,
    write_state,
)
from modis_dist.runtime.errors import DataError, RunFailed
from modis_dist.study import manifest

LOG = "mlflow-sync.log"
LOWEST = 19  # nice value
LEFT_TO_DRIVER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
POLL_S = 0.5  # interval of checks whether the driver is alive
REST_FACTOR, LONGEST_REST_S = 100, 600.0  # pause after a pass: 100 times its CPU time, 1 % of a core
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # after an error
GIVE_UP_S = 3600.0  # after the end of the study


class Follower:
    """The follower that `tune` starts for a run folder. It outlives the driver until MLflow is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._pid = 0
        self._exit_status: int | None = None

    def start(self) -> None:
        """Start the process in a new session, with the signals of the driver's job blocked."""
        command = [sys.executable, "-m", "modis_dist", "mlflow-sync", str(self._folder), "--follow"]
        log = str(self._folder / LOG)
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        environment = {**os.environ, **ONE_THREAD}
        with suppress(OSError):  # the study runs without it
            self._pid = os.posix_spawn(
                sys.executable, command, environment, file_actions=streams, setsid=True, setsigmask=LEFT_TO_DRIVER
            )

    def wait(self, seconds: float) -> list[str]:
        """Wait at most ``seconds`` for the process to end; return the problems, also if it still runs."""
        if not self._pid:
            return []
        end = time.monotonic() + seconds
        while not self._has_ended():
            if time.monotonic() > end:
                problem = "".join(f"{problem}; " for problem in self._problems())
                catching_up = f"process {self._pid} sends the remaining metrics in the background and then exits"
                return [f"{problem}{catching_up}; `modis-dist mlflow-sync {self._folder}` completes it at any time"]
            time.sleep(POLL_S / 10)
        problems = self._problems()
        if self._exit_status and not problems:
            problems = [f"the process that sends this study failed; see {self._folder / LOG}"]
        return problems

    def _problems(self) -> list[str]:
        with suppress(Exception):  # the log names a damaged file
            return list(read_state(self._folder)["problems"])
        return []

    def _has_ended(self) -> bool:
        if self._exit_status is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                self._exit_status = status if pid else None
            except ChildProcessError:  # reaped elsewhere
                self._exit_status = 0
        return self._exit_status is not None


def follow(folder: Path, uri: str | None = None) -> SyncResult:
    """Keep MLflow up to date until the study has ended and MLflow is complete; return the final state.

    Errors are written to ``mlflow-sync.json`` and retried with growing pauses. Raises ``RunFailed`` if the study has
    ended and MLflow refuses the request or has not answered for an hour.
    """
    _lower_priority()
    with mlflow_store.only_writer(folder, wait=True):
        study: StudySync | None = None
        with suppress(OSError, DataError):
            write_state(folder, problems=[])
        pause, ended_at = FIRST_PAUSE_S, float("inf")
        while True:
            began = time.monotonic()
            try:
                study = study or StudySync(folder, uri)
                _use_idle_cores()  # MLflow is imported
                cpu_s = time.process_time()
                result = study.update()
                if not result.running:
                    return result
                pause = FIRST_PAUSE_S
                _rest(folder, min(REST_FACTOR * (time.process_time() - cpu_s), LONGEST_REST_S), was_running=True)
            except Exception as error:
                _use_idle_cores()
                study = None  # a new object reads back from MLflow what was sent
                problem = describe(error, folder, uri)
                with suppress(OSError, DataError):
                    write_state(folder, problems=[problem], delivered="")
                running = is_running(folder)
                ended_at = float("inf") if running else min(ended_at, began)
                gave_up = not running and (is_permanent(error) or time.monotonic() - ended_at > GIVE_UP_S)
                if gave_up or not (folder / manifest.FILE).exists():
                    raise RunFailed(problem) from error
                print(json.dumps({"problem": problem}), file=sys.stderr, flush=True)  # noqa: T201  # the log
                _rest(folder, pause, was_running=running)
                pause = min(2 * pause, LONGEST_PAUSE_S)


def _rest(folder: Path, seconds: float, *, was_running: bool) -> None:
    """Sleep at most ``seconds``, or until the study starts or ends; unblock signals if it has ended."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and is_running(folder) == was_running:
        time.sleep(min(POLL_S, left))
    if not is_running(folder):
        _unblock_signals()


def _unblock_signals() -> None:
    """Unblock signals; discard the pending ones, which were meant for the driver."""
    blocked = {number for number in LEFT_TO_DRIVER if number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}
    for number in blocked:
        signal.signal(number, signal.SIG_IGN)  # discards a pending signal
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


def _lower_priority() -> None:
    with suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST)


def _use_idle_cores() -> None:
    """Switch to the idle scheduling policy, at most 0.3 % of a core that a training uses (Linux weights 3 and 1024).

    The lowest nice value alone has weight 15, which is acceptable only while MLflow is imported. Threads started later
    inherit the policy.
    """
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
