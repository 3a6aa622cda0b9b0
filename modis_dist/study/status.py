"""Status of the study or training in a folder.

Only reads, takes no lock and imports no torch: it runs at any time, on any machine, beside any training.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Literal, NamedTuple

from modis_dist.config.parse import load_run
from modis_dist.evaluate.results import RESULT, RUN, read_result, read_run
from modis_dist.execution.trial import sequence_digest
from modis_dist.report.study_results import Summary, read_summary
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.lock import LOCK, Holder, holder
from modis_dist.runtime.text import shown
from modis_dist.study import manifest
from modis_dist.train.journal import JOURNAL, Record, read

State = Literal["running", "elsewhere", "finished", "interrupted", "dead"]
Live = Callable[[str], bool | None]  # pack id -> true if a queued job may be training it; None if unknown
PACES = 4  # finished packs whose journals are read if no running pack has a pace


class TrialStatus(NamedTuple):
    """Status of a finished trial; ``damaged`` if its result cannot be read."""

    status: str
    reason: str | None


Outcomes = Mapping[str, TrialStatus | None]  # trial -> outcome, None while unfinished


@dataclass(frozen=True)
class PackStatus:
    """Status of trials that train as one stack."""

    id: str
    state: Literal["done", "running", "waiting", "stopped", "crashed"]
    trials: tuple[str, ...]
    epoch: int = 0  # of the trial with the most epochs
    epochs: int | None = None  # maximum, without early stopping; None if unknown
    seconds_per_epoch: float | None = None  # of all its trials together; None before the second epoch


@dataclass(frozen=True)
class Status:
    """Status of a folder."""

    kind: Literal["study", "run"]
    name: str
    state: State
    stage: Literal["search", "refit", "training", "done"]
    holder: Holder | None  # process that trains here, or that was killed
    trials: Mapping[str, int]  # of the search, by status of the result or state of the pack
    refits: Mapping[str, int]
    packs: tuple[PackStatus, ...]  # of the stage
    failures: Mapping[str, str]  # trial -> reason
    last_update: float | None  # time of the last write, seconds since 1970
    eta_s: float | None  # to the end of the stage at the current pace, without early stopping; None if unknown
    advice: str


def status(folder: Path, *, live: Live = lambda _: None) -> Status:
    """Return the status of the study or training in a folder.

    ``live`` knows packs that train on other machines, where locks cannot be checked. Raises ``DataError`` if the folder
    has no study or training, or a damaged manifest.
    """
    if manifest.is_study(folder):
        return _study(folder, live=live)
    if (folder / RUN).exists() and (folder / LOCK).exists():
        return _run(folder)
    raise DataError(f"{shown(str(folder))}: has no study or training; pass the folder of --out")


def summary_of_finished(folder: Path, *, unfinished: Set[str]) -> Summary | None:
    """Return the summary of a study that has ended and whose ``unfinished`` trials have all failed; None otherwise."""
    summary = _valid_summary(folder)
    killed = holder(folder) is not None  # the summary may be of an earlier start, whose retry was killed
    if summary is None or (killed and unfinished):
        return None
    return summary if unfinished <= summary["failures"].keys() else None


def _valid_summary(folder: Path) -> Summary | None:
    with suppress(DataError):
        return read_summary(folder)
    return None


def _study(folder: Path, *, live: Live) -> Status:
    listed = manifest.load(folder / manifest.FILE)
    process = holder(folder)
    epochs = {trial.id: trial.run.optim.epochs for trial in listed.trials}
    outcomes = {name: _outcome(folder / "trials" / name) for name in [*epochs, *listed.refit_ids]}
    search = [_pack(folder, ids, outcomes, epochs, live=live) for ids in listed.packs]
    refit = [_pack(folder, ids, outcomes, epochs, live=live) for ids in listed.refit_packs]
    summary = _valid_summary(folder)
    failures = _failures(folder, [*search, *refit], outcomes, summary["failures"] if summary else {})
    unfinished = {name for name, outcome in outcomes.items() if outcome is None}
    state = _state(process, finished=summary_of_finished(folder, unfinished=unfinished) is not None)
    searching = any(pack.state != "done" for pack in search)
    stage: Literal["search", "refit", "done"] = "done" if state == "finished" else "search" if searching else "refit"
    packs = {"search": search, "refit": refit, "done": [*search, *refit]}[stage]
    running = state == "running" or any(live(pack.id) for pack in packs)
    files = [folder / manifest.FILE, *(folder / "packs" / pack.id / JOURNAL for pack in [*search, *refit])]
    return Status(
        kind="study",
        name=listed.study,
        state=state,
        stage=stage,
        holder=process if state in {"running", "elsewhere", "dead"} else None,
        trials=_counts(search, outcomes, trials=epochs),
        refits=_counts(refit, outcomes, trials=listed.refit_ids),
        packs=tuple(packs),
        failures=failures,
        last_update=_newest(files),
        eta_s=_eta(folder, packs) if running else None,
        advice=_advice(
            state,
            process,
            again=f"modis-dist tune {quote(str(folder / manifest.STUDY_FILE))} --out {quote(str(folder))}",
            after=f"modis-dist ui {quote(str(folder))}",
            crashed=sum(not outcomes.get(name) for name in failures),
        ),
    )


def _run(folder: Path) -> Status:
    process, outcome = holder(folder), _outcome(folder)
    run = load_run(folder / RUN)
    epoch, pace = _journal(folder / JOURNAL)
    state = _state(process, finished=outcome is not None)
    trial: Literal["done", "running", "stopped"] = "done" if outcome else "running" if state == "running" else "stopped"
    pack = PackStatus("", trial, (run.name,), epoch, run.optim.epochs, pace)
    return Status(
        kind="run",
        name=run.name,
        state=state,
        stage="done" if outcome else "training",
        holder=process if state in {"running", "elsewhere", "dead"} else None,
        trials={outcome.status if outcome else trial: 1},
        refits={},
        packs=(pack,),
        failures={run.name: outcome.reason} if outcome and outcome.reason else {},
        last_update=_newest([folder / JOURNAL, folder / RESULT]),
        eta_s=_eta(folder, [pack]) if state == "running" else None,
        advice=_advice(
            state,
            process,
            again=f"modis-dist train {quote(str(folder / RUN))} --out {quote(str(folder))}",
            after=f"modis-dist evaluate {quote(str(folder))} STORE",
        ),
    )


def _state(process: Holder | None, *, finished: bool) -> State:
    if process is not None and process.alive is not False:
        return "running" if process.alive else "elsewhere"
    if finished:
        return "finished"
    return "interrupted" if process is None else "dead"


def _pack(folder: Path, ids: Sequence[str], outcomes: Outcomes, epochs: Mapping[str, int], *, live: Live) -> PackStatus:
    name, trials = sequence_digest(ids), tuple(ids)
    pack = folder / "packs" / name
    known = [epochs[trial] if trial in epochs else _epochs(folder / "trials" / trial) for trial in trials]
    max_epochs = None if None in known else max(number for number in known if number is not None)
    if all(outcomes[trial] for trial in trials):
        return PackStatus(name, "done", trials, max_epochs or 0, max_epochs)
    process = holder(pack)
    epoch, pace = _journal(pack / JOURNAL)
    if process is not None and process.alive is not False and live(name) is not False:
        return PackStatus(name, "running", trials, epoch, max_epochs, pace)
    if (pack / "error.txt").exists():
        return PackStatus(name, "crashed", trials, epoch, max_epochs)
    return PackStatus(name, "stopped" if epoch else "waiting", trials, epoch, max_epochs, pace)


def _epochs(trial: Path) -> int | None:
    """Return the epochs of a refit, which the manifest does not have."""
    run = read_run(trial)
    return run.optim.epochs if run else None


def _journal(path: Path) -> tuple[int, float | None]:
    """Return the last epoch of a journal and its seconds per epoch."""
    records = [record for record in read(path) if record["kind"] == "metrics"]
    return max((record["step"] for record in records), default=0), seconds_per_epoch(records)


def seconds_per_epoch(records: Sequence[Record]) -> float | None:
    """Return the median time between epochs, which ignores a pause between two starts; None below two epochs."""
    ended = {record["step"]: record["time_ms"] for record in records}  # of the last trial
    times = sorted(ended.items())
    paces = [(later - earlier) / 1000 / (last - first) for (first, earlier), (last, later) in pairwise(times)]
    return max(median(paces), 0.0) if paces else None


def _eta(folder: Path, packs: Sequence[PackStatus]) -> float | None:
    """Return the seconds left, with as many packs at a time as are running now."""
    left = [pack for pack in packs if pack.state != "done"]
    running = sum(pack.state == "running" for pack in left)
    paces = [pack.seconds_per_epoch / len(pack.trials) for pack in left if pack.seconds_per_epoch is not None]
    if not paces:
        finished = [pack for pack in packs if pack.state == "done"][-PACES:]
        journals = {pack: _journal(folder / "packs" / pack.id / JOURNAL) for pack in finished}
        paces = [pace / len(pack.trials) for pack, (_, pace) in journals.items() if pace is not None]
    if not paces or not running or any(pack.epochs is None for pack in left):
        return None
    median_pace = median(paces)
    seconds = [
        ((pack.epochs or 0) - pack.epoch)
        * (median_pace * len(pack.trials) if pack.seconds_per_epoch is None else pack.seconds_per_epoch)
        for pack in left
    ]
    return max(sum(seconds) / running, *seconds)


def _counts(
    packs: Sequence[PackStatus], outcomes: Outcomes, *, trials: Sequence[str] | Mapping[str, int]
) -> dict[str, int]:
    """Return the number of trials by state; a trial without a pack is waiting."""
    states = {trial: "waiting" if pack.state == "stopped" else pack.state for pack in packs for trial in pack.trials}
    finished = {name: outcome.status for name, outcome in outcomes.items() if outcome}
    return dict(Counter(finished.get(name, states.get(name, "waiting")) for name in trials).most_common())


def _failures(
    folder: Path, packs: Sequence[PackStatus], outcomes: Outcomes, summarised: Mapping[str, str]
) -> dict[str, str]:
    """Return failure reasons by trial; without a result, from the traceback of the pack or from the last summary."""
    reasons = {name: reason for name, reason in summarised.items() if not outcomes.get(name)}
    for pack in packs:
        if pack.state == "crashed":
            lines = (folder / "packs" / pack.id / "error.txt").read_text(errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), "crashed")
            reasons |= {trial: reason for trial in pack.trials if not outcomes[trial]}
    return reasons | {
        name: str(outcome.reason) for name, outcome in outcomes.items() if outcome and outcome.status == "failed"
    }


def _advice(state: State, process: Holder | None, *, again: str, after: str, crashed: int = 0) -> str:
    """Return what to do next; ``again`` and ``after`` are the commands for an unfinished and a finished folder."""
    match state:
        case "running" if process is not None:
            return f"wait, or stop it with `kill -INT {process.pid}`, which saves a checkpoint"
        case "elsewhere" if process is not None:
            return f"check on {process.host} that process {process.pid} is running; if not, resume with: {again}"
        case "dead":
            return f"the process was killed; resume with: {again}"
        case "interrupted":
            return f"resume with: {again}"
    return f"{crashed} trials crashed; retry them with: {again}" if crashed else after


def _outcome(folder: Path) -> TrialStatus | None:
    """Return the outcome of the training in a folder, None without a result."""
    try:
        result = read_result(folder)
    except DataError:
        return TrialStatus("damaged", None)
    return None if result is None else TrialStatus(result["status"], result["reason"])


def _newest(files: Sequence[Path]) -> float | None:
    return max((file.stat().st_mtime for file in files if file.exists()), default=None)
