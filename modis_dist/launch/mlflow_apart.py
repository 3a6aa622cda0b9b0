"""A study's mirror in a process of its own, on cores that nobody else wants.

MLflow spends milliseconds of processor on every epoch of every trial, most of them in Python. Here they neither hold up
the interpreter of a training nor take a core that a training could use.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from modis_dist.errors import ModisError
from modis_dist.launch import mlflow_store
from modis_dist.launch.mlflow_runs import Refused, Status, is_permanent
from modis_dist.launch.mlflow_study import Mirror, NotUploaded, Records
from modis_dist.processes import end_with_parent

LOWEST = 19  # of the priorities of Unix; where Linux has a policy below them, see _give_way
FAREWELL_S = 1.0


class MirrorApart:
    """``Mirror``, its settings and its methods, in a process that the first call starts.

    Raises ``ConfigError`` as ``Mirror`` does, ``NotUploaded`` and ``Refused`` for what was raised there. Where the
    process dies the call raises ``Refused``, and the next one starts another, which finds in MLflow what was sent.
    """

    def __init__(self, *, uri: str, experiment: str, study: str, folder: Path) -> None:
        self.uri = mlflow_store.checked(uri)
        self.gaps = False
        self._made: dict[str, Any] = {"uri": uri, "experiment": experiment, "study": study, "folder": folder.absolute()}
        self._described = Mirror(**self._made).describe()
        self._declared: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []  # calls that a new process hears first
        self._process: BaseProcess | None = None
        self._pipe: Connection
        self._closed = False

    def describe(self) -> dict[str, str]:
        """See ``Mirror.describe``."""
        return self._described

    def start(self, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """See ``Mirror.start``."""
        self._declare("start", params=params, tags=tags)

    def trial(self, trial: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """See ``Mirror.trial``."""
        self._declare("trial", trial, name=name, params=params, tags=tags)

    def feed(self, records: Records) -> None:
        """See ``Mirror.feed``."""
        self._call("feed", list(records))

    def end_trial(self, trial: str, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> None:
        """See ``Mirror.end_trial``."""
        self._call("end_trial", trial, status=status, metrics=metrics, artifacts=artifacts)

    def finish(
        self, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path], model: Path | None
    ) -> None:
        """See ``Mirror.finish``."""
        self._call("finish", status=status, metrics=metrics, artifacts=artifacts, model=model)

    def close(self) -> None:
        """End the process, whatever it is doing; MLflow keeps what it has taken whole."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.join(FAREWELL_S)

    def _declare(self, method: str, *arguments: Any, **values: Any) -> None:
        self._call(method, *arguments, **values)
        self._declared.append((method, arguments, values))

    def _call(self, method: str, *arguments: Any, **values: Any) -> None:
        if self._closed:
            raise Refused("the study is over", permanent=True)
        if self._process is None or not self._process.is_alive():
            self._begin()
            for call in self._declared:
                self._ask(*call)
        self._ask(method, arguments, values)

    def _begin(self) -> None:
        spawn = get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(self._made, theirs), name="mlflow", daemon=True)
        self._process.start()
        theirs.close()

    def _ask(self, method: str, arguments: tuple[Any, ...], values: dict[str, Any]) -> None:
        try:
            self._pipe.send((self.gaps, method, arguments, values))
            failure, self.gaps, self._described = self._pipe.recv()
        except (EOFError, OSError):
            assert self._process is not None
            self._process.join(FAREWELL_S)
            raise Refused(
                "its process has died; was it killed, by the user or for want of memory?", permanent=False
            ) from None
        if failure is not None:
            raise failure


def _serve(made: Mapping[str, Any], pipe: Connection) -> None:
    """Do what is asked until nobody can ask any more."""
    _give_way()
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver, which has us write how the study ended
    mirror = Mirror(**made)
    while True:
        try:
            mirror.gaps, method, arguments, values = pipe.recv()
        except EOFError:
            return
        failure: ModisError | None = None
        try:
            getattr(mirror, method)(*arguments, **values)
        except NotUploaded as error:
            failure = error
        except Exception as error:
            failure = Refused(str(error) or type(error).__name__, permanent=is_permanent(error))
        pipe.send((failure, mirror.gaps, mirror.describe()))


def _give_way() -> None:
    """Take cores that nobody wants, and three thousandths of one that a training wants too (Linux's weights: 3, 1024).

    At the lowest priority it would be fourteen, more than a training is to lose. Threads inherit it.
    """
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
