"""Mirrors a study to MLflow without ever making the driver wait; or to nowhere, with the same calls.

The journals are the truth: what MLflow could not take is sent by the next start. Must not know MLflow itself.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modis_dist.integrations.mlflow.apart import MirrorApart
from modis_dist.integrations.mlflow.runs import Refused, Status, is_permanent
from modis_dist.integrations.mlflow.store import scrubbed
from modis_dist.integrations.mlflow.study import Mirror, NotUploaded, Records
from modis_dist.runtime.text import shown

__all__ = ["BackgroundMirror", "Mirror", "NotUploaded", "NullMirror"]

MAX_PENDING = 20_000  # records held while MLflow does not answer; they stay in the journals
RESTS = 20  # times as long as sending took, before curves are sent again: many in one transaction cost little more
LONGEST_REST_S = 30.0
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0


class NullMirror:
    """Where MLflow is not wanted."""

    def start(self, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Nothing."""

    def trial(self, trial: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Nothing."""

    def feed(self, records: Records) -> None:
        """Nothing."""

    def end_trial(self, trial: str, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> None:
        """Nothing."""

    def finish(
        self, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path], model: Path | None
    ) -> None:
        """Nothing."""

    def describe(self) -> dict[str, str]:
        """The study is nowhere."""
        return {}

    def close(self, timeout_s: float) -> list[str]:  # noqa: ARG002
        """Nothing went wrong."""
        return []


class BackgroundMirror:
    """A mirror behind a queue: no call waits for MLflow and none raises.

    One daemon thread sends in order and tries again, with growing pauses, what MLflow could not take. Curves gather
    while it rests. What is left at ``close`` is sent by the next start of the same study, since the journals stay.
    """

    def __init__(self, mirror: Mirror | MirrorApart) -> None:
        self._mirror = mirror
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._waiting = 0  # records not sent yet
        self._gathering: list[Mapping[str, Any]] | None = None  # where they go while nothing else stands behind it
        self._left = 0  # tasks not done
        self._rest_s = 0.0  # before curves are sent again
        self._hurry = threading.Event()  # no rest any more
        self._deadline = float("inf")
        self._closing = threading.Event()
        self._problems: dict[str, None] = {}
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def start(self, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """See ``Mirror.start``."""
        self._put(lambda: self._mirror.start(params=params, tags=tags))

    def trial(self, trial: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """See ``Mirror.trial``."""
        self._put(lambda: self._mirror.trial(trial, name=name, params=params, tags=tags))

    def feed(self, records: Records) -> None:
        """See ``Mirror.feed``. While MLflow does not answer, records beyond 20,000 are left to the next start."""
        with self._counting:
            fits = self._waiting + len(records) <= MAX_PENDING
            self._waiting += len(records) if fits else 0
            gathering = self._gathering
            if fits and gathering is not None:
                gathering += records
            if self._waiting > MAX_PENDING // 2:
                self._hurry.set()
        if not fits:
            self._lose(RuntimeError("too slow for now"))
        elif records and gathering is None:
            batch = [*records]
            self._put(lambda: self._send(batch), gathering=batch)

    def end_trial(self, trial: str, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> None:
        """See ``Mirror.end_trial``."""
        self._put(lambda: self._mirror.end_trial(trial, status=status, metrics=metrics, artifacts=artifacts))

    def finish(
        self, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path], model: Path | None
    ) -> None:
        """See ``Mirror.finish``."""
        self._put(lambda: self._mirror.finish(status=status, metrics=metrics, artifacts=artifacts, model=model))

    def describe(self) -> dict[str, str]:
        """See ``Mirror.describe``."""
        return self._mirror.describe()

    def close(self, timeout_s: float) -> list[str]:
        """Give the queue some time to empty; returns what went wrong, one line each, without passwords."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._hurry.set()
        self._tasks.put(None)
        try:
            self._thread.join(timeout_s)
        finally:
            self._mirror.close()
        problems = list(self._problems)
        if self._left:
            problems.append(f"{self._left} updates not delivered; the same command sends them")
        elif self._mirror.gaps:
            problems.append("not everything was taken; the same command tries the rest again")
        return problems

    def _put(self, send: Callable[[], None], gathering: list[Mapping[str, Any]] | None = None) -> None:
        with self._counting:
            self._left += 1
            self._gathering = gathering
            self._tasks.put(send)

    def _work(self) -> None:
        while (send := self._tasks.get()) is not None:
            if not self._deliver(send):
                return
            with self._counting:
                self._left -= 1

    def _send(self, batch: list[Mapping[str, Any]]) -> None:
        """Send the records of a batch, after the rest that the last one has earned; until then others come to it."""
        self._hurry.wait(self._rest_s)
        with self._counting:
            if self._gathering is batch:
                self._gathering = None
        began = time.monotonic()
        try:
            self._mirror.feed(batch)
        except Exception as error:
            if not is_permanent(error):
                raise
            self._lose(error)
            single = [partial(self._mirror.feed, [record]) for record in batch]  # one of them is to blame
            if not all(self._deliver(send) for send in single):
                raise Refused("not all was taken in time") from error
        self._rest_s = min(RESTS * (time.monotonic() - began), LONGEST_REST_S)
        with self._counting:
            self._waiting -= len(batch)
            if self._waiting <= MAX_PENDING // 2 and not self._closing.is_set():
                self._hurry.clear()

    def _deliver(self, send: Callable[[], None]) -> bool:
        """Send until it succeeds or never will; false where the thread must give up."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                send()
                return True
            except NotUploaded as error:
                self._report(error)
                return True
            except Exception as error:
                if time.monotonic() > self._deadline:  # nobody listens any more
                    return False
                self._report(error)
                if is_permanent(error):
                    self._mirror.gaps = True
                    return bool(self._mirror.describe()["parent_run_id"])  # without a parent nothing else can work
            if self._closing.wait(pause) and time.monotonic() > self._deadline - FIRST_PAUSE_S:
                return False
            if self._closing.is_set():
                time.sleep(FIRST_PAUSE_S)
            pause = min(2 * pause, LAST_PAUSE_S)

    def _lose(self, reason: Exception) -> None:
        self._mirror.gaps = True
        self._report(reason)

    def _report(self, error: Exception) -> None:
        text = shown(scrubbed(str(error) or type(error).__name__, self._mirror.uri))
        if not self._problems:
            logging.getLogger(__name__).warning("MLflow: %s; the work goes on, the journals keep everything", text)
        self._problems[text] = None
