"""Kill a study at random moments: its driver and its Ray workers.

Every start of the driver is `modis-dist tune`, forked from a process that has imported everything. The finished study
is compared with an uninterrupted one: no trial is lost or repeated, and every metric is the same.
"""

import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

from modis_dist.cli.main import run as command
from modis_dist.execution.trial import sequence_digest
from modis_dist.execution.verify_resume import differences
from modis_dist.integrations.ray.tune import DEATHS
from modis_dist.study import manifest
from modis_dist.train.journal import read
from tests.study.toy_study import write_study
from tests.train.kills import Tally

POLL_S = 0.005
PATIENCE_S = 120.0  # for a written record, or a Ray worker
KILLS_OF_A_STUDY = 4
# Twelve trials and one refit, in the same stacks for every executor: other stacks round differently.
GRID = {"objective.beta": [1e-4, 1e-3, 1e-2], "objective.penalty_weight": [1.0, 10.0]}
SIZE = {"grid": GRID, "folds": 2, "packing": {"max_trials": 3}, "probe": False}


def soak(
    kills: int, *, seed: int, folder: Path, store: Path, executors: Sequence[str], report: Callable[[Tally], None]
) -> Tally:
    """Kill processes of studies, alternating executors, until ``kills`` are reached and the last study has ended.

    With "ray", some of the killed processes are workers. ``report`` is called after every kill.
    """
    tally, chance = Tally(), random.Random(seed)
    uninterrupted = Study(folder, "uninterrupted", store, "local")
    status = uninterrupted.start().wait()
    assert status == 0, f"the uninterrupted study ended with {status}: {uninterrupted.last_line()}"
    for executor in cycle(executors):
        if tally.kills >= kills:
            break
        tally.runs += 1
        study = Study(folder, f"study{tally.runs}", store, executor)
        max_kills = min(kills, tally.kills + KILLS_OF_A_STUDY)
        while (status := _run_driver(study, chance, tally, max_kills=max_kills, report=report)) is None:
            pass
        if status:
            tally.differences.append(f"study {tally.runs}: ended with {status}: {study.last_line()}")
        else:
            tally.differences += [f"study {tally.runs}: {what}" for what in compared(study.out, uninterrupted.out)]
        shutil.rmtree(study.out)
    return tally


def _run_driver(
    study: "Study", chance: random.Random, tally: Tally, *, max_kills: int, report: Callable[[Tally], None]
) -> int | None:
    """Run a driver until it is killed (returns None) or ends (returns its exit status)."""
    driver = study.start()
    tally.lives += 1
    workers = study.lives % (DEATHS + 1) if study.executor == "ray" else 0  # with more kills, a pack is given up
    for victim in (*["worker"] * workers, "driver"):
        if tally.kills >= max_kills:
            break
        _wait(study, driver, chance)
        process = driver.worker(chance) if victim == "worker" else driver.process
        if process is None or driver.ended():
            break
        process.kill()
        tally.kills += 1
        tally.workers += victim == "worker"
        report(tally)
        if victim == "driver":
            driver.wait()
            return None
    return driver.wait()


def _wait(study: "Study", driver: "Driver", chance: random.Random) -> None:
    """Wait for a write and a random time after it; in a quarter of the calls, for a random time only."""
    before = study.size()
    at_any_time = chance.random() < 0.25
    end = time.monotonic() + (0.0 if at_any_time else PATIENCE_S)
    while time.monotonic() < end and study.size() == before and not driver.ended():
        time.sleep(POLL_S)
    end = time.monotonic() + chance.uniform(0.0, 5.0 if at_any_time else 0.7)
    while time.monotonic() < end and not driver.ended():
        time.sleep(POLL_S)


class Study:
    """A study in its own folder."""

    def __init__(self, folder: Path, name: str, store: Path, executor: str) -> None:
        self.executor = executor
        self.out = folder / name
        self.lives = 0
        self._log = folder / f"{name}.log"
        self._file = write_study(folder / f"{name}.yaml", store, executor=executor, **SIZE)

    def start(self) -> "Driver":
        """Start a driver."""
        self.lives += 1
        child = os.fork()
        if child == 0:
            status = 1
            try:
                log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
                status = command(["tune", str(self._file), "--out", str(self.out), "--json"])
                sys.stdout.flush()
            finally:
                os._exit(status)
        return Driver(child)

    def size(self) -> int:
        """Return a number that grows with every record and every result."""
        return sum(p.stat().st_size for p in self.out.glob("packs/*/journal.jsonl")) + len(
            list(self.out.glob("trials/*/result.json"))
        )

    def last_line(self) -> str:
        """Return the last line of the log."""
        return self._log.read_text().strip().rpartition("\n")[2]


class Driver:
    """A running `modis-dist tune`."""

    def __init__(self, child: int) -> None:
        self.process = psutil.Process(child)
        self._status: int | None = None

    def ended(self) -> bool:
        """Return True if the driver has ended."""
        if self._status is None:
            child, status = os.waitpid(self.process.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if child else None
        return self._status is not None

    def wait(self) -> int:
        """Wait for the driver; return its exit code, negative after a signal."""
        while not self.ended():
            time.sleep(POLL_S)
        assert self._status is not None
        return self._status

    def worker(self, chance: random.Random) -> psutil.Process | None:
        """Return a random Ray worker that trains; None if the driver ends first."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and not self.ended():
            processes = [p for p in self.process.children(recursive=True) if trains(p)]
            if processes:
                return chance.choice(sorted(processes, key=lambda process: process.pid))
            time.sleep(POLL_S)
        return None


def trains(process: psutil.Process) -> bool:
    """Return True for a Ray worker that trains; killing an agent of Ray ends the whole node."""
    try:
        name = " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return False
    return name.startswith("ray::") and name != "ray::IDLE" and not name.endswith("Agent")


# --- comparing ----------------------------------------------------------------------------------------------


def compared(out: Path, uninterrupted: Path) -> list[str]:
    """Return the differences between the folders of two finished studies."""
    problems = []
    results, expected = (
        {p.parent.name: p for p in folder.glob("trials/*/result.json")} for folder in (out, uninterrupted)
    )
    if results.keys() != expected.keys():
        return [
            f"trials lost: {sorted(expected.keys() - results.keys())}, new: {sorted(results.keys() - expected.keys())}"
        ]
    for name in sorted(expected):
        if results[name].read_bytes() != expected[name].read_bytes():
            problems.append(f"trial {name}: another result.json")
        problems += [f"trial {name}: {what}" for what in differences(results[name].parent, expected[name].parent)]
    if _summary(out) != _summary(uninterrupted):
        problems.append("another summary.json")
    return [*problems, *_listed(out, uninterrupted)]


def _summary(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in {"seconds", "mlflow"}}


def _listed(out: Path, uninterrupted: Path) -> Iterator[str]:
    """Yield differences in the lists of trials and in the epochs recorded in their journals."""
    (ours, recorded), (theirs, expected) = (_epochs(folder) for folder in (out, uninterrupted))
    if ours.trials != theirs.trials or Counter(t.id for t in ours.trials).most_common(1)[0][1] != 1:
        yield "another list of trials"
    for kind in ("packs", "refit_packs"):
        names = Counter(name for pack in getattr(ours, kind) for name in pack)
        if names != Counter(name for pack in getattr(theirs, kind) for name in pack):
            yield f"{kind} with other trials: {sorted(names.elements())}"
    if recorded != expected:
        yield f"journals: {sum(map(len, recorded.values()))} of {sum(map(len, expected.values()))} epochs, or others"


def _epochs(out: Path) -> tuple[manifest.Manifest, dict[str, list[Any]]]:
    listed = manifest.load(out / "manifest.json")
    epochs: dict[str, list[Any]] = {}
    for pack in (*listed.packs, *listed.refit_packs):
        for record in read(out / "packs" / sequence_digest(pack) / "journal.jsonl"):
            if record["kind"] == "metrics":
                epochs.setdefault(record["trial"], []).append((record["step"], record["values"]))
    return listed, epochs
