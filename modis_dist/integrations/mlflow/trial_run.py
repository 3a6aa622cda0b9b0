"""The nested run of one trial: parameters, curves, final metrics, figures and the checkpoint's path."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modis_dist.config.parse import to_tree
from modis_dist.evaluate.results import RESULT, Result, read_result
from modis_dist.execution.trial import Trial
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.integrations.mlflow.runs import DELIVERED, MAX_METRICS, Runs, RunStatus, is_refused_record
from modis_dist.runtime.files import sha256
from modis_dist.study.aggregate import training_metrics
from modis_dist.train.journal import Record

STUDY, TRIAL, PARENT = "modis.study_id", "modis.trial_id", "mlflow.parentRunId"
CHECKPOINT, CHECKPOINT_SHA256 = "modis.checkpoint", "modis.checkpoint_sha256"
Stage = Literal["search", "refit"]
STATUS: dict[str, RunStatus] = {"done": "FINISHED", "pruned": "KILLED"}


@dataclass
class TrialRun:
    """A trial and its nested run, which is created as soon as there is something to record."""

    trial: Trial
    stage: Stage
    folder: Path  # of the trial
    runs: Runs
    parent: str
    study_id: str
    run_id: str = ""
    status: RunStatus = "RUNNING"
    delivered: str = ""  # digest of the ``result.json`` that was sent
    logged: set[tuple[str, int]] | None = None  # metric and step that an earlier process sent; None: not looked up
    steps: set[int] = field(default_factory=set)  # epochs that this process sent
    result_time: int = 0  # modification time of the ``result.json`` that was sent
    problems: list[str] = field(default_factory=list)  # what MLflow refused or could not store

    def resume(self, run: Any) -> None:
        """Continue the run of an earlier process."""
        self.run_id, self.status = run.info.run_id, run.info.status
        self.delivered = run.data.tags.get(DELIVERED, "")
        if run.data.tags.get(PARENT) != self.parent:
            self.runs.set_tags(self.run_id, {PARENT: self.parent})
        if not self.delivered:
            self.runs.send_params(self.run_id, to_tree(self.trial.run), known=run.data.params)

    def update(self, records: Sequence[Record], result_time: int) -> int:
        """Send new records and, if a result was written at ``result_time``, close the run; return the values sent."""
        if result_time and result_time == self.result_time:
            return 0
        self.result_time = result_time
        result = read_result(self.folder) if result_time else None
        digest = sha256(self.folder / RESULT)[:32] if result else ""
        if result and self.delivered == digest:
            return 0
        sent = 0
        if missing := self._missing(records):
            self._open(missing[0]["time_ms"])
            sent = sum(self._send(batch) for batch in _batches(missing))
        if result:
            self._end(result, digest, time_ms=result_time // 1_000_000)
        return sent

    def close_unfinished(self, *, failed_ms: int | None) -> None:
        """Close the run of a trial without a result: as FAILED if it crashed (at ``failed_ms``), else as KILLED."""
        if self.result_time:
            return
        status: RunStatus = "KILLED" if failed_ms is None else "FAILED"
        if failed_ms is not None:
            self._open(failed_ms, reopen=False)
        if self.run_id and self.status != status:
            self.runs.close(self.run_id, status)
            self.status = status

    def _open(self, time_ms: int, *, reopen: bool = True) -> None:
        """Create the run, or set it to running."""
        if not self.run_id:
            trial, stage = self.trial, self.stage
            tags = {"stage": stage, "condition": trial.condition, STUDY: self.study_id, PARENT: self.parent}
            name = trial.name if stage == "search" else f"{stage} {trial.name}"
            self.run_id = self.runs.create(name, tags | {TRIAL: trial.id}, start_ms=time_ms)
            self.status, self.logged = "RUNNING", set()
            self.runs.send_params(self.run_id, to_tree(trial.run), known={})
        elif reopen and self.status != "RUNNING":
            self.runs.reopen(self.run_id)
            self.status, self.delivered = "RUNNING", ""

    def _missing(self, records: Sequence[Record]) -> list[Record]:
        """Return the records that MLflow lacks."""
        if records and self.logged is None:
            self.logged = self.runs.logged(self.run_id) if self.run_id else set()
        logged = self.logged or set()
        missing: list[Record] = []
        for record in records:
            if record["step"] not in self.steps:  # a trial that moved to another pack has epochs in both journals
                self.steps.add(record["step"])
                values = record["values"].items()
                new = {name: value for name, value in values if (mlflow_text.key(name), record["step"]) not in logged}
                missing += [{**record, "values": new}] if new else []
        return missing

    def _send(self, batch: Sequence[Record]) -> int:
        """Send records and return the number of values; if MLflow refuses one, send the others."""
        try:
            self.runs.send_records(self.run_id, batch)
            return sum(len(record["values"]) for record in batch)
        except Exception as error:
            if not is_refused_record(error) or self.runs.is_deleted(self.run_id):
                raise
            if len(batch) > 1:
                middle = len(batch) // 2
                return self._send(batch[:middle]) + self._send(batch[middle:])
            self.problems.append(f"{self.trial.name}, epoch {batch[0]['step']}: {error}")
            return 0

    def _end(self, result: Result, digest: str, *, time_ms: int) -> None:
        """Close the run with the trial's final metrics (``final/<name>``), figures and checkpoint."""
        self._open(time_ms, reopen=False)
        final = {f"final/{name}": number for name, number in training_metrics(result).items()}
        self.runs.send_values(self.run_id, final, time_ms=time_ms)
        problems = self.runs.upload(self.run_id, sorted((self.folder / "figures").glob("*.png")))
        self.runs.set_tags(self.run_id, _checkpoint(self.folder))
        self.status = STATUS.get(result["status"], "FAILED")
        delivered = "" if self.problems else digest
        self.runs.finish(self.run_id, self.status, problems=problems, delivered=delivered, end_ms=time_ms)
        self.problems += problems
        self.delivered = digest


def _checkpoint(trial: Path) -> dict[str, str]:
    """Return path and SHA-256 of a trial's best model as tags; no tags if its checkpoint is not in the folder."""
    for path in sorted((trial / "best").glob("step-*/manifest.json"), reverse=True):
        digest = json.loads(path.read_text())["sha256"].get("model.safetensors", "")
        return {CHECKPOINT: str(path.parent), CHECKPOINT_SHA256: digest}
    return {}


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
