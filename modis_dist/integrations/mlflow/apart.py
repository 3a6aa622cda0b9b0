"""A study's mirror in a process of its own, on cores that nobody else wants.

MLflow spends milliseconds of processor on every epoch of every trial, most of them in Python. Here they neither hold up
the interpreter of a training nor take a core that a training could use.
"""

import atexit
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from operator import methodcaller
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow.runs import Refused, Status, is_permanent
from modis_dist.integrations.mlflow.study import Mirror, NotUploaded, Records
from modis_dist.runtime.errors import ModisError
from modis_dist.runtime.lock import holder
from modis_dist.runtime.processes import signals_blocked

LOWEST = 19  # of the priorities of Unix
FAREWELL_S = 30.0  # to write that the study was killed; at this priority it may take that on a busy machine
LEFT_TO_DRIVER = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
DIED = "the process that writes to MLflow has died; was it killed, by the user or for want of memory?"

Call = methodcaller  # of a Mirror


class MirrorApart:
    """``Mirror``, its settings and its methods, in a process that the first call starts.

    Raises ``ConfigError`` for an address that cannot be used. Calls raise ``NotUploaded``, and ``Refused`` for all else
    that was raised there. Where the process dies the call raises ``Refused``; the next one starts another, which finds
    in MLflow what was sent. Where this process is killed, the other one writes so, and ends.
    """

    def __init__(self, *, uri: str, experiment: str, study: str, folder: Path) -> None:
        self.uri = mlflow_store.checked(uri)
        self.gaps = False
        self._made: dict[str, Any] = {"uri": uri, "experiment": experiment, "study": study, "folder": folder.absolute()}
        self._described = Mirror(**self._made).describe()
        self._declared: list[Call] = []  # what a new process hears first
        self._process: BaseProcess | None = None  # of which all of that was heard
        self._pipe: Connection
        self._ending = Lock()
        self._closed = False

    def describe(self) -> dict[str, str]:
        """See ``Mirror.describe``."""
        return self._described

    def start(self, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """See ``Mirror.start``."""
        self._declare(Call("start", params=params, tags=tags))

    def trial(self, trial: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """See ``Mirror.trial``."""
        self._declare(Call("trial", trial, name=name, params=params, tags=tags))

    def feed(self, records: Records) -> None:
        """See ``Mirror.feed``."""
        self._ask(Call("feed", list(records)))

    def end_trial(self, trial: str, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> None:
        """See ``Mirror.end_trial``."""
        self._ask(Call("end_trial", trial, status=status, metrics=metrics, artifacts=artifacts))

    def finish(
        self, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path], model: Path | None
    ) -> None:
        """See ``Mirror.finish``."""
        self._ask(Call("finish", status=status, metrics=metrics, artifacts=artifacts, model=model))

    def close(self) -> None:
        """End the process, whatever it is doing; MLflow keeps what it has taken whole."""
        with self._ending:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.join()
        atexit.unregister(self.close)

    def _declare(self, call: Call) -> None:
        self._ask(call)
        self._declared.append(call)

    def _ask(self, call: Call) -> None:
        try:
            if self._process is None or not self._process.is_alive():
                self._begin()
            self._told(call)
        except (EOFError, OSError):
            if self._process is not None:
                self._process.join()  # it may be closing its files still
            raise Refused(DIED) from None

    def _begin(self) -> None:
        """A new process that has heard what was declared before, or none."""
        with self._ending:
            if self._closed:
                raise Refused("the study is over", permanent=True)
            spawn = get_context("spawn")
            self._pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(self._made, theirs), name="mlflow", daemon=True)
            with signals_blocked(LEFT_TO_DRIVER):
                self._process.start()
            atexit.register(self.close)  # before Python, at its end, waits for a process that obeys no signal
            theirs.close()
        try:
            for call in self._declared:
                self._told(call)
        except BaseException:
            self._process.kill()  # half of it would be no use
            self._process.join()
            raise

    def _told(self, call: Call) -> None:
        self._pipe.send((self.gaps, call))
        failure, gaps, self._described = self._pipe.recv()
        self.gaps = self.gaps or gaps  # this side may have found one meanwhile
        if failure is not None:
            raise failure


def _serve(made: Mapping[str, Any], pipe: Connection) -> None:
    """Do what is asked until nobody can ask any more."""
    for number in LEFT_TO_DRIVER:
        signal.signal(number, signal.SIG_IGN)  # meant for the driver, which has us write how the study ended
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_DRIVER)
    with suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    Thread(target=_leave_after_driver, name="end with driver", daemon=True).start()
    mirror = Mirror(**made)
    with suppress(OSError):  # there is nobody to tell
        while (asked := _next(pipe)) is not None:
            gaps, call = asked
            mirror.gaps = mirror.gaps or gaps
            failure = _failure(mirror, call)
            _give_way()  # it has loaded
            pipe.send((failure, mirror.gaps, mirror.describe()))
    if mirror.open and not _taken(made["folder"]):
        with suppress(Exception):  # then the next start does it
            mirror.finish(status="KILLED", metrics={}, artifacts=[], model=None)


def _next(pipe: Connection) -> tuple[bool, Call] | None:
    """What is asked next; None where the driver has ended."""
    driver = parent_process()
    assert driver is not None
    try:
        if pipe not in wait([pipe, driver.sentinel]):
            return None
        asked: tuple[bool, Call] = pipe.recv()
    except (EOFError, OSError):
        return None
    return asked


def _failure(mirror: Mirror, call: Call) -> ModisError | None:
    """Do what was asked; returns what is to be raised on the other side."""
    try:
        call(mirror)
    except NotUploaded as error:
        return error
    except Exception as error:
        return Refused(str(error) or type(error).__name__, permanent=is_permanent(error))
    return None


def _leave_after_driver() -> None:
    """Be killed a little after the driver, also where MLflow does not answer."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    time.sleep(FAREWELL_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _taken(folder: Path) -> bool:
    """Whether another driver goes on with the study; what became of it is that one's to write."""
    held = holder(folder)
    return held is not None and held.alive is not False


def _give_way() -> None:
    """Take cores that nobody wants, and three thousandths of one that a training wants too (Linux's weights: 3, 1024).

    At the lowest priority it would be fourteen, more than a training is to lose; for the seconds of loading MLflow it
    has those. Threads inherit it.
    """
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
