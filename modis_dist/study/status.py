"""How far the study or training of a folder is, from what stands in the folder.

Only reads, takes no lock, needs no torch: it may look at any moment, whoever trains there, on whatever machine. What is
half written is taken for not written yet.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any, Literal

from modis_dist.config.parse import load_run
from modis_dist.execution.trial import sequence_digest
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.lock import Holder, holder
from modis_dist.runtime.text import shown
from modis_dist.study import manifest
from modis_dist.train.journal import Record, read

State = Literal["running", "elsewhere", "finished", "interrupted", "dead"]
Live = Callable[[str], bool | None]  # whether a job of a queue may be training a pack; None where it is not known
PACES = 4  # finished packs whose journals are read where no running one tells the pace yet


@dataclass(frozen=True)
class PackStatus:
    """Trials that are trained together."""

    id: str
    state: Literal["done", "running", "waiting", "stopped", "crashed"]
    trials: tuple[str, ...]
    epoch: int = 0  # of the trial that is furthest
    epochs: int | None = None  # at most: early stopping may end it before; None where not known yet
    seconds_per_epoch: float | None = None  # of all its trials together; None before there are two epochs


@dataclass(frozen=True)
class Status:
    """A folder at one moment."""

    kind: Literal["study", "run"]
    name: str
    state: State
    stage: Literal["search", "refit", "training", "done"]
    holder: Holder | None  # who trains here, or was killed doing it
    trials: Mapping[str, int]  # of the search, by state: that of the result, or running, waiting, crashed
    refits: Mapping[str, int]
    packs: tuple[PackStatus, ...]  # of the stage
    failures: Mapping[str, str]  # trial -> reason
    last_sign: float | None  # when something was written, seconds since 1970
    eta_s: float | None  # to the end of the stage at the pace measured, without early stopping; None if unknown
    advice: str


def status(folder: Path, *, live: Live = lambda _: None) -> Status:
    """How far the study or the training of a folder is.

    ``live`` tells of a pack, by its id, what locks do not tell of other machines. Raises ``DataError`` where there is
    neither, or the manifest is damaged.
    """
    if (folder / "manifest.json").exists() and (folder / "study.yaml").exists():
        return _study(folder, live=live)
    if (folder / "run.yaml").exists() and (folder / "lock").exists():
        return _run(folder)
    raise DataError(f"{shown(str(folder))}: no study or training was started here; give the folder of --out")


def _study(folder: Path, *, live: Live) -> Status:
    listed = manifest.load(folder / "manifest.json")
    there = holder(folder)
    epochs = {trial.id: trial.run.optim.epochs for trial in listed.trials}
    results = {name: _result(folder, name) for name in [*epochs, *_flat(listed.refit_packs)]}
    search = [_pack(folder, ids, results, epochs, live=live) for ids in listed.packs]
    refit = [_pack(folder, ids, results, epochs, live=live) for ids in listed.refit_packs]
    summary = _json(folder / "summary.json")
    failures = _failures(folder, [*search, *refit], results, summary)
    over = bool(summary) and all(results[name] or name in summary.get("failures", {}) for name in results)
    state = _state(there, over=over, whole=all(results.values()))
    searching = any(pack.state != "done" for pack in search)
    stage: Literal["search", "refit", "done"] = "done" if state == "finished" else "search" if searching else "refit"
    packs = {"search": search, "refit": refit, "done": [*search, *refit]}[stage]
    running = state == "running" or any(live(pack.id) for pack in packs)
    if running and not any(pack.seconds_per_epoch for pack in packs):
        packs = _with_paces(folder, packs)
    files = [folder / "manifest.json", *(folder / "packs" / pack.id / "journal.jsonl" for pack in [*search, *refit])]
    return Status(
        kind="study",
        name=listed.study,
        state=state,
        stage=stage,
        holder=there if state in {"running", "elsewhere", "dead"} else None,
        trials=_counts(search, results, wanted=epochs),
        refits=_counts(refit, results, wanted=_flat(listed.refit_packs)),
        packs=tuple(packs),
        failures=failures,
        last_sign=_newest(files),
        eta_s=_eta(packs) if running else None,
        advice=_advice(state, folder, there, f"tune {quote(str(folder / 'study.yaml'))}", _crashed(results, failures)),
    )


def _run(folder: Path) -> Status:
    there, result = holder(folder), _json(folder / "result.json")
    run = load_run(folder / "run.yaml")
    epoch, pace = _journal(folder / "journal.jsonl")
    state = _state(there, over=bool(result), whole=bool(result))
    alone: Literal["done", "running", "stopped"] = "done" if result else "running" if state == "running" else "stopped"
    pack = PackStatus("", alone, (run.name,), epoch, run.optim.epochs, pace)
    return Status(
        kind="run",
        name=run.name,
        state=state,
        stage="done" if result else "training",
        holder=there if state in {"running", "elsewhere", "dead"} else None,
        trials={str(result["status"]) if result else alone: 1},
        refits={},
        packs=(pack,),
        failures={run.name: str(result["reason"])} if result.get("reason") else {},
        last_sign=_newest([folder / "journal.jsonl", folder / "result.json"]),
        eta_s=_eta([pack]) if state == "running" else None,
        advice=_advice(state, folder, there, f"train {quote(str(folder / 'run.yaml'))}", 0),
    )


def _state(there: Holder | None, *, over: bool, whole: bool) -> State:
    """``over``: there is a summary of all there is; ``whole``: and every trial has a result."""
    if there is not None and there.alive is not False:
        return "running" if there.alive else "elsewhere"
    if over and (there is None or whole):
        return "finished"
    return "interrupted" if there is None else "dead"


def _pack(
    folder: Path,
    ids: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
    epochs: Mapping[str, int],
    *,
    live: Live,
) -> PackStatus:
    name, trials = sequence_digest(ids), tuple(ids)
    place = folder / "packs" / name
    known = [epochs[trial] if trial in epochs else _epochs(folder / "trials" / trial) for trial in trials]
    most = None if None in known else max(number for number in known if number is not None)
    if all(results[trial] for trial in trials):
        return PackStatus(name, "done", trials, most or 0, most)
    there = holder(place)
    epoch, pace = _journal(place / "journal.jsonl")
    if there is not None and there.alive is not False and live(name) is not False:
        return PackStatus(name, "running", trials, epoch, most, pace)
    if (place / "error.txt").exists():
        return PackStatus(name, "crashed", trials, epoch, most)
    return PackStatus(name, "stopped" if epoch else "waiting", trials, epoch, most, pace)


def _epochs(trial: Path) -> int | None:
    """Epochs of a refit, which the manifest names only."""
    return load_run(trial / "run.yaml").optim.epochs if (trial / "run.yaml").exists() else None


def _journal(path: Path) -> tuple[int, float | None]:
    """The last epoch of a journal, and its seconds per epoch."""
    records = [record for record in read(path) if record["kind"] == "metrics"]
    return max((record["step"] for record in records), default=0), seconds_per_epoch(records)


def seconds_per_epoch(records: Sequence[Record]) -> float | None:
    """The middle one of the times between epochs, so that a pause between two starts does not count; None below two."""
    ended = {record["step"]: record["time_ms"] for record in records}  # of several trials the last
    times = sorted(ended.items())
    paces = [(later - earlier) / 1000 / (last - first) for (first, earlier), (last, later) in pairwise(times)]
    return max(median(paces), 0.0) if paces else None


def _with_paces(folder: Path, packs: Sequence[PackStatus]) -> list[PackStatus]:
    """The packs, some finished ones with their pace."""
    done = [pack.id for pack in packs if pack.state == "done"][-PACES:]
    paces = {name: _journal(folder / "packs" / name / "journal.jsonl")[1] for name in done}
    return [PackStatus(pack.id, pack.state, pack.trials, pack.epoch, pack.epochs, paces.get(pack.id)) for pack in packs]


def _eta(packs: Sequence[PackStatus]) -> float | None:
    """Seconds for what is left, as many packs at a time as are running now."""
    paces = [pack.seconds_per_epoch / len(pack.trials) for pack in packs if pack.seconds_per_epoch is not None]
    left = [pack for pack in packs if pack.state != "done"]
    running = sum(pack.state == "running" for pack in left)
    if not paces or not running or any(pack.epochs is None for pack in left):
        return None
    usual = median(paces)
    seconds = [
        ((pack.epochs or 0) - pack.epoch)
        * (usual * len(pack.trials) if pack.seconds_per_epoch is None else pack.seconds_per_epoch)
        for pack in left
    ]
    return max(sum(seconds) / running, *seconds)


def _counts(
    packs: Sequence[PackStatus], results: Mapping[str, Mapping[str, Any]], *, wanted: Sequence[str] | Mapping[str, int]
) -> dict[str, int]:
    """Trials by state, each once; those in no pack wait."""
    of_pack = {trial: "waiting" if pack.state == "stopped" else pack.state for pack in packs for trial in pack.trials}
    states = (str(results[name].get("status")) if results[name] else of_pack.get(name, "waiting") for name in wanted)
    return dict(Counter(states).most_common())


def _failures(
    folder: Path,
    packs: Sequence[PackStatus],
    results: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> dict[str, str]:
    """Why trials failed, those without a result from their pack's traceback or from the last summary."""
    told = {name: str(reason) for name, reason in summary.get("failures", {}).items() if not results.get(name)}
    for pack in packs:
        if pack.state == "crashed":
            lines = (folder / "packs" / pack.id / "error.txt").read_text(errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), "crashed")
            told |= {trial: reason for trial in pack.trials if not results[trial]}
    ended = {name: result for name, result in results.items() if result.get("status") == "failed"}
    return told | {name: str(result.get("reason")) for name, result in ended.items()}


def _crashed(results: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]) -> int:
    return sum(not results.get(name) for name in failures)


def _advice(state: State, folder: Path, there: Holder | None, command: str, crashed: int) -> str:
    again = f"modis-dist {command} --out {quote(str(folder))}"
    match state:
        case "running" if there is not None:
            return f"wait; `kill -INT {there.pid}` saves and stops it"
        case "elsewhere" if there is not None:
            return f"look on {there.host} whether process {there.pid} still runs; if not, go on with: {again}"
        case "dead":
            return f"it was killed; go on with: {again}"
        case "interrupted":
            return f"go on with: {again}"
    if crashed:
        return f"{crashed} trials crashed and are tried again by: {again}"
    return (
        f"modis-dist ui {quote(str(folder))}"
        if command.startswith("tune")
        else f"modis-dist evaluate {quote(str(folder))} STORE"
    )


def _result(folder: Path, trial: str) -> dict[str, Any]:
    return _json(folder / "trials" / trial / "result.json")


def _json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty where there is none yet, and ``{"status": "damaged"}`` where it cannot be read."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {"status": "damaged"}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return {"status": "damaged"}


def _newest(files: Sequence[Path]) -> float | None:
    return max((file.stat().st_mtime for file in files if file.exists()), default=None)


def _flat(packs: Sequence[Sequence[str]]) -> list[str]:
    return [name for pack in packs for name in pack]
