"""Update an MLflow store from the run folder of a study.

The run folder is the source of truth: manifest, pack journals, results, summary, figures, delivered model. ``sync``
compares it with the store and sends the difference, so it is idempotent and the next call completes what a crash left
incomplete. Independent of Ray and of how trainings run.

The study is a parent run, each trial a nested run. Runs are found by tags, never by name. A closed run has as a tag the
digest of the file that closed it (``result.json``, ``summary.json``); while it matches, the run is skipped.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from typing_extensions import TypedDict

from modis_dist.config.parse import load_study, to_tree
from modis_dist.evaluate.results import RESULT, read_json, read_run
from modis_dist.execution.trial import Trial, sequence_digest
from modis_dist.integrations.mlflow import pyfunc
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow.runs import DELIVERED, Runs, RunStatus, is_permanent
from modis_dist.integrations.mlflow.trial_run import STUDY, TRIAL, Stage, TrialRun
from modis_dist.report.study_results import MODEL, OVERVIEW, REPORT, SUMMARY, Summary
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json
from modis_dist.runtime.lock import holder
from modis_dist.runtime.text import shown
from modis_dist.study import manifest
from modis_dist.study.aggregate import condition_metrics
from modis_dist.study.status import summary_of_finished
from modis_dist.train.journal import JOURNAL, JournalReader, Record

STATE = "mlflow-sync.json"

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
    return load_study(folder / manifest.STUDY_FILE).sweep.mlflow.tracking_uri or mlflow_store.default_uri(folder)


def was_delivered(folder: Path, uri: str) -> bool:
    """Return whether MLflow at a tracking URI has everything of a finished study."""
    state = read_state(folder)
    return bool(state["delivered"]) and (state["uri"], state["delivered"]) == (
        mlflow_store.without_password(uri),
        _study_digest(folder),
    )


class SyncState(TypedDict, total=False):
    """Content of ``mlflow-sync.json``: the state after the last sync."""

    study_id: str
    uri: str  # without password
    delivered: str  # digest of the study; empty if MLflow lacks something
    problems: list[str]


def read_state(folder: Path) -> SyncState:
    """Return the state of the last sync, with empty values before the first.

    Raises ``DataError`` for a damaged file: with another id the study would be sent a second time.
    """
    state = SyncState(study_id="", uri="", delivered="", problems=[])
    return state | (read_json(folder / STATE, SyncState) or {})


def write_state(folder: Path, **changes: Unpack[SyncState]) -> None:
    """Change keys of the state. The caller must hold ``only_writer``."""
    before = read_state(folder)
    if before | changes != before:
        write_json(folder / STATE, before | changes)


class StudySync:
    """One study and its MLflow store. ``update`` sends what MLflow lacks; after the first call, only what is new.

    After an exception, create a new object, which reads back from the store what was sent. The caller must hold
    ``only_writer``.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self._folder = folder.absolute()
        if not manifest.is_study(folder):
            raise DataError(f"{shown(str(folder))}: no study was started here; give the output folder of `tune`")
        self._study = load_study(folder / manifest.STUDY_FILE)
        self._uri = mlflow_store.checked(uri or tracking_uri(folder))
        self._experiment = self._study.sweep.mlflow.experiment_name or self._study.name
        self._runs = Runs(uri=self._uri, experiment=self._experiment, folder=self._folder)
        self._study_id = read_state(folder)["study_id"] or secrets.token_hex(8)
        write_state(folder, study_id=self._study_id, uri=mlflow_store.without_password(self._uri), problems=[])
        runs = self._runs.search(f"tags.`{STUDY}` = '{self._study_id}'")
        self._existing = {run.data.tags[TRIAL]: run for run in reversed(runs) if TRIAL in run.data.tags}
        self._manifest_time = 0
        self._trials: dict[str, TrialRun] = {}
        self._readers: dict[str, JournalReader] = {}
        self._sent = 0
        self._parent = self._parent_delivered = ""
        self._parent_status: RunStatus = "RUNNING"
        self._read_manifest()
        self._find_parent([run for run in runs if TRIAL not in run.data.tags])
        self._close_dropped()

    def update(self, progress: Progress = lambda _done, _total: None) -> SyncResult:
        """Send what MLflow lacks and return the state. Raises the errors of MLflow."""
        running = is_running(self._folder)  # before anything is read: a study that has ended writes nothing more
        self._read_manifest()
        self._sent = 0
        summary = None if running else summary_of_finished(self._folder, unfinished=self._unfinished())
        digest = _study_digest(self._folder) if summary else ""
        if digest and self._parent_delivered == digest:
            return self._result(running=False, delivered=digest, problems=[])
        if running and self._parent_status != "RUNNING":
            self._runs.set_tags(self._parent, {DELIVERED: ""})
            self._runs.reopen(self._parent)
            self._parent_status, self._parent_delivered = "RUNNING", ""
        problems = self._update_trials(progress)
        if not running:
            crashed = summary["failures"] if summary else {}
            for name, run in self._trials.items():
                run.close_unfinished(failed_ms=_modified_ms(self._folder / SUMMARY) if name in crashed else None)
            problems += self._close_parent(summary, "" if problems else digest)
        return self._result(running=running, delivered="" if problems else digest, problems=problems)

    def _result(self, *, running: bool, delivered: str, problems: Sequence[str]) -> SyncResult:
        clean = [mlflow_store.scrubbed(problem, self._uri) for problem in dict.fromkeys(problems)]
        write_state(self._folder, delivered=delivered, problems=clean)
        return SyncResult(
            uri=mlflow_store.without_password(self._uri),
            experiment_id=self._runs.experiment_id,
            run_id=self._parent,
            trials=len(self._existing) + sum(bool(run.run_id) for run in self._trials.values()),
            metrics=self._sent,
            running=running,
            complete=bool(delivered),
            problems=tuple(clean),
        )

    def _read_manifest(self) -> None:
        """Read the manifest, which is replaced when trials or packs change."""
        path = self._folder / manifest.FILE
        time = path.stat().st_mtime_ns
        if time != self._manifest_time:
            self._manifest_time, self._manifest = time, manifest.load(path)
            packs = (*self._manifest.packs, *self._manifest.refit_packs)
            for name in map(sequence_digest, packs):
                self._readers.setdefault(name, JournalReader(self._folder / "packs" / name / JOURNAL))
            self._ids = {trial.id for trial in self._manifest.trials} | {*self._manifest.refit_ids}

    def _unfinished(self) -> set[str]:
        return {name for name in self._ids if not (self._trial_folder(name) / RESULT).exists()}

    # --- the parent run ---------------------------------------------------------------------------------------------

    def _find_parent(self, parents: Sequence[Any]) -> None:
        if parents:
            parent = parents[0]
            self._parent, self._parent_status = parent.info.run_id, parent.info.status
            self._parent_delivered = parent.data.tags.get(DELIVERED, "")
        else:
            name = f"{self._experiment} ({self._study_id[:8]})"
            started = _modified_ms(self._folder / manifest.STUDY_FILE)
            self._parent = self._runs.create(name, {STUDY: self._study_id}, start_ms=started)
        if not self._parent_delivered:
            params = to_tree(self._study.base())
            self._runs.send_params(self._parent, params, known=parents[0].data.params if parents else {})
            self._runs.set_tags(self._parent, {"study": self._study.name, "data": self._manifest.fingerprint})

    def _close_dropped(self) -> None:
        """Close the runs of trials that are no longer part of the study."""
        for name, run in self._existing.items():
            if run.info.status == "RUNNING" and name not in self._ids:
                self._runs.close(run.info.run_id, "KILLED")

    def _close_parent(self, summary: Summary | None, digest: str) -> list[str]:
        """Close the parent, for a finished study with summary, reports and model; return the problems."""
        if summary is None:
            if self._parent_status != "KILLED":
                self._runs.close(self._parent, "KILLED")
                self._parent_status = "KILLED"
            return []
        metrics = _test_metrics(summary)
        reports = [path for name in (REPORT, OVERVIEW, SUMMARY) if (path := self._folder / name).exists()]
        problems = self._runs.upload(self._parent, reports)
        model_id = None
        if (self._folder / MODEL).exists():
            try:
                model_id = pyfunc.log(
                    self._runs.client,
                    model_folder=self._folder / MODEL,
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
        self._runs.finish(self._parent, self._parent_status, problems=problems, delivered=digest, end_ms=time_ms)
        self._parent_delivered = "" if problems else digest
        return problems

    # --- nested runs ------------------------------------------------------------------------------------------------

    def _update_trials(self, progress: Progress) -> list[str]:
        """Send new records and close the runs of trials with a result; return the problems."""
        self._add_trials()
        results = {name: _modified(self._trial_folder(name) / RESULT) for name in self._trials}
        records: dict[str, list[Record]] = {name: [] for name in self._trials}  # read after results
        for reader in self._readers.values():
            for record in reader.new():
                if record["kind"] == "metrics" and record["trial"] in records:
                    records[record["trial"]].append(record)
        problems = []
        for number, (name, run) in enumerate(self._trials.items(), start=1):
            self._sent += run.update(records[name], results[name])
            problems += run.problems
            progress(number, len(self._trials))
        return problems

    def _add_trials(self) -> None:
        """Add the trials that are new in the manifest, and the refits that have started."""
        for trial in manifest.unique(self._manifest.trials):
            self._add(trial, "search")
        for name in self._manifest.refit_ids:
            if name not in self._trials and (refit := self._refit(name)) is not None:
                self._add(refit, "refit")

    def _refit(self, name: str) -> Trial | None:
        """Return the refit trial ``name``; None before it starts. The manifest stores only its id."""
        run, listed = read_run(self._trial_folder(name)), self._manifest
        if run is None:
            return None
        candidates = (trial for trial in listed.trials if trial.run.seed == run.seed)
        refits = (manifest.refit(trial, listed.fingerprint, epochs=run.optim.epochs) for trial in candidates)
        return next((trial for trial in refits if trial.id == name), None)

    def _trial_folder(self, name: str) -> Path:
        return self._folder / "trials" / name

    def _add(self, trial: Trial, stage: Stage) -> None:
        if trial.id in self._trials:
            return
        folder = self._trial_folder(trial.id)
        run = TrialRun(trial, stage, folder, self._runs, parent=self._parent, study_id=self._study_id)
        if (existing := self._existing.pop(trial.id, None)) is not None:
            run.resume(existing)
        self._trials[trial.id] = run


def _study_digest(folder: Path) -> str:
    """Return a digest of manifest and summary; empty if one is missing."""
    try:
        content = (folder / manifest.FILE).read_bytes() + (folder / SUMMARY).read_bytes()
        return hashlib.sha256(content).hexdigest()[:32]
    except FileNotFoundError:
        return ""


def _modified(path: Path) -> int:
    """Return the modification time of a file in nanoseconds; 0 if there is no file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _modified_ms(path: Path) -> int:
    return _modified(path) // 1_000_000


def _test_metrics(summary: Summary) -> dict[str, float]:
    """Return mean test metrics as ``test/<name>``, with several conditions ``test/<condition>/<name>``."""
    several = len(summary["conditions"]) > 1
    return {
        f"test/{condition['condition'] + '/' if several else ''}{name}": value
        for condition in summary["conditions"]
        for name, value in condition_metrics(condition).items()
    }
