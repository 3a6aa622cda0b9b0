"""What a mirror is told of a study: its trials, how each ended, how the study ended."""

from pathlib import Path
from typing import Literal

from modis_dist.config.parse import to_tree
from modis_dist.config.study import Study
from modis_dist.evaluate.results import read_result
from modis_dist.execution.run_pack import trial_folder
from modis_dist.execution.trial import Trial
from modis_dist.report.study_results import Summary
from modis_dist.study.aggregate import condition_metrics, training_metrics
from modis_dist.study.interfaces import Mirror
from modis_dist.study.manifest import Manifest
from modis_dist.study.summary import MODEL, REPORTS


def begin(mirror: Mirror, study: Study, listed: Manifest) -> None:
    """The study itself."""
    mirror.start(params=to_tree(study.base()), tags={"study": study.name, "data": listed.fingerprint})


def declare(mirror: Mirror, trial: Trial, *, stage: str) -> None:
    """A trial, before anything else about it."""
    name = trial.name if stage == "search" else f"{stage} {trial.name}"
    mirror.trial(trial.id, name=name, params=to_tree(trial.run), tags={"stage": stage, "condition": trial.condition})


def end(mirror: Mirror, trial: Trial, *, out: Path) -> None:
    """How a trial ended, its figures and pictures; killed where it has no result."""
    folder = trial_folder(out, trial)
    result = read_result(folder)
    if result is None:
        mirror.end_trial(trial.id, status="KILLED", metrics={}, artifacts=[])
        return
    ended: dict[str, Literal["FINISHED", "KILLED", "FAILED"]] = {"done": "FINISHED", "pruned": "KILLED"}
    pictures = sorted((folder / "figures").glob("*.png"))
    status = ended.get(result["status"], "FAILED")
    mirror.end_trial(trial.id, status=status, metrics=training_metrics(result), artifacts=pictures)


def finish(mirror: Mirror, summary: Summary, *, out: Path) -> None:
    """How the study ended: test figures, reports, the delivered model."""
    several = len(summary["conditions"]) > 1
    metrics = {
        f"test/{condition['condition'] + '/' if several else ''}{name}": value
        for condition in summary["conditions"]
        for name, value in condition_metrics(condition).items()
    }
    model = out / MODEL
    mirror.finish(
        status="FINISHED" if summary["best"] else "FAILED",
        metrics=metrics,
        artifacts=[path for path in (out / name for name in REPORTS) if path.exists()],
        model=model if model.exists() else None,
    )
