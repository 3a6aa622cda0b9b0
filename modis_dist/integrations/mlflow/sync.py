"""Update an MLflow store from the run folder of a study.

The run folder is the source of truth: manifest, pack journals, results, summary, figures, delivered model. ``sync``
compares it with the store and sends the difference, so it is idempotent and the next call completes what a crash left
incomplete. Independent of Ray and of how trainings run.

The study is a parent run, each trial a nested run. Runs are found by tags, never by name. A closed run has as a tag the
digest of the file that closed it (``result.json``, ``summary.json``); while it matches, the run is skipped.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modis_dist.config.parse import load_run, load_study, to_tree
from modis_dist.evaluate.results import Result
from modis_dist.execution.trial import Trial, sequence_digest
from modis_dist.integrations.mlflow import pyfunc
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.integrations.mlflow.runs import (
    MAX_METRICS,
    NOT_UPLOADED,
    Runs,
    Status,
    is_permanent,
    is_refused_record,
)
from modis_dist.report.study_results import SUMMARY, Summary, read_summary
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json
from modis_dist.runtime.lock import holder
from modis_dist.runtime.text import shown
from modis_dist.study import manifest
from modis_dist.study.aggregate import condition_metrics, training_metrics
from modis_dist.train.journal import JournalReader, Record

STUDY = "modis.study_id"
TRIAL = "modis.trial_id"
DELIVERED = "modis.delivered"  # digest of the file that closed the run; set last, when nothing is missing
CHECKPOINT, CHECKPOINT_SHA256 = "modis.checkpoint", "modis.checkpoint_sha256"
PARENT = "mlflow.parentRunId"
FINAL = "final/"
STATE = "mlflow-sync.json"
REPORTS = ("report.md", "sweep.png", SUMMARY)
STATUS: dict[str, Status] = {"done": "FINISHED", "pruned": "KILLED"}

Progress = Callable[[int, int], None]  # trials done, trials in total


@dataclass(frozen=True)
class SyncResult:
    """State of a study in MLflow after a call of ``sync``."""

    uri: str  # without password
    experiment_id: str
    run_id: str  # of the parent
    trials: int  # trials that have a run
    metrics: int  # values sent by this call
    running: bool  # the study is still training
    complete: bool  # the study is finished and MLflow lacks nothing
    problems: tuple[str, ...]  # what MLflow refused or could not store


def sync(folder: Path, uri: str | None = None, *, progress: Progress = lambda _done, _total: None) -> SyncResult:
    """Send what MLflow lacks of the study in a run folder, to the study's tracking URI or ``uri``.

    Raises ``Busy`` if another process sends this study, ``DataError`` if the folder has no study, ``ConfigError`` for a
    URI that cannot be used, and the errors of MLflow.
    """
    with mlflow_store.only_writer(folder):
        try:
            return StudySync(folder, uri).update(progress)
        except Exception as error:
            with suppress(OSError, DataError):
                write_state(folder, problems=[describe(error, folder, uri)], delivered="")
            raise


def describe(error: Exception, folder: Path, uri: str | None = None) -> str:
    """Return an error as one line, without the password of the tracking URI."""
    with suppress(Exception):
        uri = uri or tracking_uri(folder)
    return shown(mlflow_store.scrubbed(str(error) or type(error).__name__, uri or ""))


def is_running(folder: Path) -> bool:
    """Return whether a process trains in the folder; one on another machine is assumed to be alive."""
    driver = holder(folder)
    return driver is not None and driver.alive is not False


def tracking_uri(folder: Path) -> str:
    """Return the tracking URI of a study: ``sweep.mlflow.tracking_uri``, or a SQLite file in its folder."""
    return load_study(folder / "study.yaml").sweep.mlflow.tracking_uri or mlflow_store.default_uri(folder)


def was_delivered(folder: Path, uri: str) -> bool:
    """Return whether MLflow at a tracking URI has everything of a finished study."""
    state = read_state(folder)
    return bool(state["delivered"]) and (state["uri"], state["delivered"]) == (
        mlflow_store.without_password(uri),
        _study_digest(folder),
    )


def read_state(folder: Path) -> dict[str, Any]:
    """Return ``study_id``, ``uri``, ``delivered`` (digest of the study) and ``problems`` of the last sync.

    Raises ``DataError`` for a damaged file: with another id the study would be sent a second time.
    """
    state: dict[str, Any] = {"study_id": "", "uri": "", "delivered": "", "problems": []}
    try:
        return {**state, **json.loads((folder / STATE).read_text())}
    except FileNotFoundError:
        return state
    except (ValueError, TypeError):
        raise DataError(f"{shown(str(folder / STATE))}: damaged; remove it to send the study as a new run") from None


def write_state(folder: Path, **changes: Any) -> None:
    """Change keys of the state that ``read_state`` returns. The caller must hold ``only_writer``."""
    before = read_state(folder)
    if before | changes != before:
        write_json(folder / STATE, before | changes)


@dataclass
class _TrialRun:
    """A trial and its nested run."""

    trial: Trial
    stage: str
    run_id: str = ""  # empty until there is something to record
    status: Status = "RUNNING"
    delivered: str = ""
    logged: set[tuple[str, int]] | None = None  # metric and step that an earlier process sent; None: not looked up
    steps: set[int] = field(default_factory=set)  # epochs that this process sent
    result_time: int = 0  # modification time of the ``result.json`` that was sent
    refused: list[str] = field(default_factory=list)


class StudySync:
    """One study and its MLflow store. ``update`` sends what MLflow lacks; after the first call, only what is new.

    After an exception, create a new object, which reads back from the store what was sent. The caller must hold
    ``only_writer``.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self._folder = folder.absolute()
        if not all((folder / name).is_file() for name in ("manifest.json", "study.yaml")):
            raise DataError(f"{shown(str(folder))}: no study was started here; give the output folder of `tune`")
        self._study = load_study(folder / "study.yaml")
        self._uri = mlflow_store.checked(uri or tracking_uri(folder))
        self._experiment = self._study.sweep.mlflow.experiment_name or self._study.name
        self._runs = Runs(uri=self._uri, experiment=self._experiment, folder=self._folder)
        self._study_id = read_state(folder)["study_id"] or secrets.token_hex(8)
        write_state(folder, study_id=self._study_id, uri=mlflow_store.without_password(self._uri), problems=[])
        runs = self._runs.search(f"tags.`{STUDY}` = '{self._study_id}'")
        self._existing = {run.data.tags[TRIAL]: run for run in reversed(runs) if TRIAL in run.data.tags}
        self._manifest_time = 0
        self._trials: dict[str, _TrialRun] = {}
        self._readers: dict[str, JournalReader] = {}
        self._sent = 0
        self._parent = self._parent_delivered = ""
        self._parent_status: Status = "RUNNING"
        self._read_manifest()
        self._find_parent([run for run in runs if TRIAL not in run.data.tags])
        self._close_dropped()

    def update(self, progress: Progress = lambda _done, _total: None) -> SyncResult:
        """Send what MLflow lacks and return the state. Raises the errors of MLflow."""
        running = is_running(self._folder)  # before anything is read: a study that has ended writes nothing more
        self._read_manifest()
        self._sent = 0
        summary = None if running else _finished(self._folder, [*self._trials, *self._refit_ids])
        digest = _study_digest(self._folder) if summary else ""
        if digest and self._parent_delivered == digest:
            return self._result(running=False, complete=True, problems=[])
        if running and self._parent_status != "RUNNING":
            self._runs.set_tags(self._parent, {DELIVERED: ""})
            self._runs.reopen(self._parent)
            self._parent_status, self._parent_delivered = "RUNNING", ""
        problems = self._update_trials(progress)
        if not running:
            self._close_unfinished(summary["failures"] if summary else {})
            problems += self._close_parent(summary, digest if not problems else "")
        return self._result(running=running, complete=summary is not None and not problems, problems=problems)

    def _result(self, *, running: bool, complete: bool, problems: Sequence[str]) -> SyncResult:
        clean = tuple(mlflow_store.scrubbed(problem, self._uri) for problem in dict.fromkeys(problems))
        write_state(self._folder, delivered=_study_digest(self._folder) if complete else "", problems=clean)
        return SyncResult(
            uri=mlflow_store.without_password(self._uri),
            experiment_id=self._runs.experiment_id,
            run_id=self._parent,
            trials=len(self._existing) + sum(bool(state.run_id) for state in self._trials.values()),
            metrics=self._sent,
            running=running,
            complete=complete,
            problems=clean,
        )

    def _read_manifest(self) -> None:
        """Add trials and packs that are new in the manifest, which is replaced when packs change."""
        path = self._folder / "manifest.json"
        time = path.stat().st_mtime_ns
        if time != self._manifest_time:
            self._manifest_time, self._manifest = time, manifest.load(path)
            for trial in manifest.unique(self._manifest.trials):
                self._trials.setdefault(trial.id, _TrialRun(trial, "search"))
            for ids in (*self._manifest.packs, *self._manifest.refit_packs):
                pack = sequence_digest(ids)
                self._readers.setdefault(pack, JournalReader(self._folder / "packs" / pack / "journal.jsonl"))
            self._refit_ids = [name for ids in self._manifest.refit_packs for name in ids]
        for name in self._refit_ids:
            if name not in self._trials and (refit := _refit(self._folder, self._manifest, name)) is not None:
                self._trials[name] = _TrialRun(refit, "refit")

    # --- the parent run ---------------------------------------------------------------------------------------------

    def _find_parent(self, parents: Sequence[Any]) -> None:
        if parents:
            parent = parents[0]
            self._parent, self._parent_status = parent.info.run_id, parent.info.status
            self._parent_delivered = parent.data.tags.get(DELIVERED, "")
        else:
            name = f"{self._experiment} ({self._study_id[:8]})"
            started = _modified_ms(self._folder / "study.yaml")
            self._parent = self._runs.create(name, {STUDY: self._study_id}, start_ms=started)
        if not self._parent_delivered:
            params = to_tree(self._study.base())
            self._runs.send_params(self._parent, params, known=parents[0].data.params if parents else {})
            self._runs.set_tags(self._parent, {"study": self._study.name, "data": self._manifest.fingerprint})

    def _close_dropped(self) -> None:
        """Close the runs of trials that are no longer part of the study."""
        for name, run in self._existing.items():
            if run.info.status == "RUNNING" and name not in {*self._trials, *self._refit_ids}:
                self._runs.close(run.info.run_id, "KILLED")

    def _close_parent(self, summary: Summary | None, digest: str) -> list[str]:
        """Close the parent, for a finished study with summary, reports and model; return the problems."""
        if summary is None:
            if self._parent_status != "KILLED":
                self._runs.close(self._parent, "KILLED")
                self._parent_status = "KILLED"
            return []
        metrics = _test_metrics(summary)
        reports = [path for name in REPORTS if (path := self._folder / name).exists()]
        problems = self._runs.upload(self._parent, reports)
        model_id = None
        if (self._folder / "model").exists():
            try:
                model_id = pyfunc.log(
                    self._runs.client,
                    model_folder=self._folder / "model",
                    experiment_id=self._runs.experiment_id,
                    run_id=self._parent,
                    name=self._experiment,
                )
            except Exception as error:
                if not is_permanent(error):
                    raise
                problems.append(f"model: {error}")
        time_ms = _modified_ms(self._folder / SUMMARY)
        self._runs.send_values(self._parent, metrics, time_ms=time_ms, model_id=model_id)
        self._parent_status = "FINISHED" if summary["best"] else "FAILED"
        self._close(self._parent, self._parent_status, problems, delivered=digest, time_ms=time_ms)
        self._parent_delivered = "" if problems else digest
        return problems

    # --- nested runs ------------------------------------------------------------------------------------------------

    def _update_trials(self, progress: Progress) -> list[str]:
        """Send new records and close the runs of trials with a result; return the problems."""
        results = {name: _modified(self._result_file(name)) for name in self._trials}  # before journals
        records: dict[str, list[Record]] = {name: [] for name in self._trials}
        for reader in self._readers.values():
            for record in reader.new():
                if record["kind"] == "metrics" and record["trial"] in records:
                    records[record["trial"]].append(record)
        problems = []
        for number, (name, state) in enumerate(self._trials.items(), start=1):
            self._update_trial(state, records[name], results[name])
            problems += state.refused
            progress(number, len(self._trials))
        return problems

    def _update_trial(self, state: _TrialRun, records: Sequence[Record], result_time: int) -> None:
        """Send new records; if a result was written, at ``result_time``, close the run."""
        if result_time and result_time == state.result_time:
            return
        self._find_run(state)
        state.result_time = result_time
        result = self._result_file(state.trial.id).read_bytes() if result_time else b""
        digest = _digest(result)
        if result and state.delivered == digest:
            return
        if missing := self._missing(state, records):
            self._open(state, missing[0]["time_ms"])
            for batch in _batches(missing):
                self._send(state, batch)
        if result:
            self._open(state, result_time // 1_000_000, reopen=False)
            self._end(state, json.loads(result), digest)

    def _find_run(self, state: _TrialRun) -> None:
        """Continue the run of an earlier process."""
        run = self._existing.pop(state.trial.id, None)
        if run is None:
            return
        state.run_id, state.status = run.info.run_id, run.info.status
        state.delivered = run.data.tags.get(DELIVERED, "")
        if run.data.tags.get(PARENT) != self._parent:
            self._runs.set_tags(state.run_id, {PARENT: self._parent})
        if not state.delivered:
            self._runs.send_params(state.run_id, to_tree(state.trial.run), known=run.data.params)

    def _open(self, state: _TrialRun, time_ms: int, *, reopen: bool = True) -> None:
        """Create the run of a trial that has something to record, or set it to running."""
        if not state.run_id:
            trial, stage = state.trial, state.stage
            tags = {"stage": stage, "condition": trial.condition, STUDY: self._study_id, PARENT: self._parent}
            name = trial.name if stage == "search" else f"{stage} {trial.name}"
            state.run_id = self._runs.create(name, tags | {TRIAL: trial.id}, start_ms=time_ms)
            state.status, state.logged = "RUNNING", set()
            self._runs.send_params(state.run_id, to_tree(trial.run), known={})
        elif reopen and state.status != "RUNNING":
            self._runs.reopen(state.run_id)
            state.status, state.delivered = "RUNNING", ""

    def _missing(self, state: _TrialRun, records: Sequence[Record]) -> list[Record]:
        """Return the records that MLflow lacks."""
        if records and state.logged is None:
            state.logged = self._runs.logged(state.run_id) if state.run_id else set()
        missing: list[Record] = []
        for record in records:
            if record["step"] not in state.steps:  # a trial that moved to another pack has epochs in both journals
                state.steps.add(record["step"])
                logged = state.logged or set()
                values = record["values"].items()
                new = {name: value for name, value in values if (mlflow_text.key(name), record["step"]) not in logged}
                missing += [{**record, "values": new}] if new else []
        return missing

    def _send(self, state: _TrialRun, batch: Sequence[Record]) -> None:
        """Send records; if MLflow refuses one, send the others."""
        try:
            self._runs.send_records(state.run_id, batch)
            self._sent += sum(len(record["values"]) for record in batch)
        except Exception as error:
            if not is_refused_record(error) or self._runs.is_deleted(state.run_id):
                raise
            if len(batch) > 1:
                self._send(state, batch[: len(batch) // 2])
                self._send(state, batch[len(batch) // 2 :])
            else:
                state.refused.append(f"{state.trial.name}, epoch {batch[0]['step']}: {error}")

    def _end(self, state: _TrialRun, result: Result, digest: str) -> None:
        """Close a run with the trial's final metrics (``final/<name>``), figures and checkpoint."""
        folder = self._folder / "trials" / state.trial.id
        metrics, time_ms = training_metrics(result), _modified_ms(folder / "result.json")
        final = {FINAL + name: number for name, number in metrics.items()}
        self._runs.send_values(state.run_id, final, time_ms=time_ms)
        problems = self._runs.upload(state.run_id, sorted((folder / "figures").glob("*.png")))
        self._runs.set_tags(state.run_id, _checkpoint(folder))
        state.status = STATUS.get(result["status"], "FAILED")
        delivered = "" if state.refused else digest
        self._close(state.run_id, state.status, problems, delivered=delivered, time_ms=time_ms)
        state.refused += problems
        state.delivered = digest

    def _close_unfinished(self, failures: Mapping[str, str]) -> None:
        """Close the runs of trials without a result: as FAILED if they crashed, else as KILLED."""
        for name, state in self._trials.items():
            if state.result_time:
                continue
            status: Status = "FAILED" if name in failures else "KILLED"
            if name in failures:
                self._open(state, _modified_ms(self._folder / SUMMARY), reopen=False)
            if state.run_id and state.status != status:
                self._runs.close(state.run_id, status)
                state.status = status

    def _close(self, run_id: str, status: Status, problems: Sequence[str], *, delivered: str, time_ms: int) -> None:
        self._runs.close(run_id, status, end_ms=time_ms)
        if problems:
            self._runs.set_tags(run_id, {NOT_UPLOADED: mlflow_store.scrubbed("; ".join(problems), self._uri)})
        elif delivered:
            self._runs.set_tags(run_id, {DELIVERED: delivered})

    def _result_file(self, name: str) -> Path:
        return self._folder / "trials" / name / "result.json"


def _refit(folder: Path, listed: manifest.Manifest, name: str) -> Trial | None:
    """Return the refit trial ``name``; None before it starts. The manifest stores only its id."""
    path = folder / "trials" / name / "run.yaml"
    if not path.exists():
        return None
    run = load_run(path)
    candidates = (trial for trial in listed.trials if trial.run.seed == run.seed)
    refits = (manifest.refit(trial, listed.fingerprint, epochs=run.optim.epochs) for trial in candidates)
    return next((trial for trial in refits if trial.id == name), None)


def _finished(folder: Path, trials: Iterable[str]) -> Summary | None:
    """Return the summary of a finished study; None if the study was interrupted."""
    try:
        summary = read_summary(folder)
    except DataError:
        return None
    if summary is None:
        return None
    without_result = {name for name in trials if not (folder / "trials" / name / "result.json").exists()}
    killed = holder(folder) is not None  # the summary may be of an earlier start, whose retry was killed
    return None if (killed and without_result) or without_result - set(summary["failures"]) else summary


def _study_digest(folder: Path) -> str:
    """Return a digest of manifest and summary; empty if one is missing."""
    try:
        return _digest((folder / "manifest.json").read_bytes() + (folder / SUMMARY).read_bytes())
    except FileNotFoundError:
        return ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _modified(path: Path) -> int:
    """Return the modification time of a file in nanoseconds; 0 if there is no file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _modified_ms(path: Path) -> int:
    return _modified(path) // 1_000_000


def _checkpoint(trial: Path) -> dict[str, str]:
    """Return path and SHA-256 of a trial's best model as tags; no tags if its checkpoint is not in the folder."""
    for path in sorted((trial / "best").glob("step-*/manifest.json"), reverse=True):
        sha256 = json.loads(path.read_text())["sha256"].get("model.safetensors", "")
        return {CHECKPOINT: str(path.parent), CHECKPOINT_SHA256: sha256}
    return {}


def _test_metrics(summary: Summary) -> dict[str, float]:
    """Return mean test metrics as ``test/<name>``, with several conditions ``test/<condition>/<name>``."""
    several = len(summary["conditions"]) > 1
    return {
        f"test/{condition['condition'] + '/' if several else ''}{name}": value
        for condition in summary["conditions"]
        for name, value in condition_metrics(condition).items()
    }


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Yield consecutive records with at most 1000 metrics together, or a single record."""
    batch: list[Record] = []
    size = 0
    for record in records:
        if batch and size + len(record["values"]) > MAX_METRICS:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += len(record["values"])
    if batch:
        yield batch
