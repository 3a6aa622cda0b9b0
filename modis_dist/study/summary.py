"""Output files of a finished study: ``summary.json``, ``report.md``, ``sweep.png`` and the delivered model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from modis_dist.execution.run_pack import trial_folder
from modis_dist.execution.trial import Trial
from modis_dist.report.study import report
from modis_dist.report.study_results import (
    MODEL,
    OVERVIEW,
    REPORT,
    VERSION,
    Condition,
    RankedGroup,
    StudyModel,
    Summary,
    write_summary,
)
from modis_dist.runtime.files import write_text
from modis_dist.study.aggregate import Results, details_over_replicates, metrics_over_replicates
from modis_dist.study.interfaces import Tracking
from modis_dist.study.manifest import Manifest


def failures(results: Results) -> dict[str, str]:
    """Return failure reasons by trial id."""
    return {name: str(r["reason"]) for name, r in results.items() if r["status"] == "failed"}


def changes(results: Results) -> dict[str, list[str]]:
    """Return the hardware and software changes at which trainings resumed, by trial id."""
    return {name: r["changes"] for name, r in results.items() if r["changes"]}


def summarise(
    listed: Manifest,
    groups: Sequence[RankedGroup],
    best: Mapping[str, RankedGroup],
    refits: Mapping[str, Sequence[Trial]],
    results: Results,
    reasons: Mapping[str, str],
    *,
    metric: str,
    tracking: Tracking | None,
) -> Summary:
    """Return the summary of a study, whose seconds the caller fills in.

    ``best`` groups and ``refits`` are by condition, ``results`` of trials and refits and crash ``reasons`` by trial id.
    The delivered model is that of the first condition that has one.
    """
    done_refits = {
        name: [t for t in trials if t.id in results and results[t.id]["status"] == "done"]
        for name, trials in refits.items()
    }
    conditions = [
        _condition(name, best.get(name), done_refits.get(name, []), results)
        for name in dict.fromkeys(group["condition"] for group in groups)
    ]
    return {
        "version": VERSION,
        "study": listed.study,
        "metric": metric,
        "trials": _counts(groups),
        "best": conditions[0]["best"],
        "test": conditions[0]["test"],
        "baseline": conditions[0]["baseline"],
        "model": next((condition["model"] for condition in conditions if condition["model"]), None),
        "conditions": conditions,
        "groups": list(groups),
        "failures": {**reasons, **failures(results)},
        "changes": changes(results),
        "mlflow": {
            "uri": tracking.uri if tracking else None,
            "experiment": tracking.experiment if tracking else None,
        },
        "seconds": 0.0,
    }


def _counts(groups: Sequence[RankedGroup]) -> dict[str, int]:
    """Return the numbers of trials; groups of several conditions may share a trial."""
    total = {name for group in groups for name in group["trials"]}
    failed = {name for group in groups for name in group["failed_trials"]}
    done = {name for group in groups for name in group["done_trials"]}
    pruned = {name for group in groups if group["pruned"] for name in group["trials"]} - done - failed
    return {"total": len(total), "done": len(done), "failed": len(failed), "pruned": len(pruned)}


def _condition(name: str, best: RankedGroup | None, refits: Sequence[Trial], results: Results) -> Condition:
    replicates = [results[trial.id] for trial in refits]
    test, baseline, probe = metrics_over_replicates(replicates)
    return {
        "condition": name,
        "best": best,
        "test": test,
        "baseline": baseline,
        "probe": probe,
        "details": details_over_replicates(replicates),
        "model": _model(refits[0]) if refits else None,  # the first by seed: test rows choose nothing
    }


def _model(trial: Trial) -> StudyModel:
    """Return the model of a refit."""
    folder = trial_folder(Path(), trial)
    return {"condition": trial.condition, "params": trial.params, "seed": trial.run.seed, "folder": str(folder)}


def write(summary: Summary, *, out: Path) -> None:
    """Write the report, the overview figure, the delivered model and last the summary."""
    from modis_dist.report import drawing, figures  # imports matplotlib, which jobs of a search do not need

    write_text(out / REPORT, report(summary))
    drawing.save(figures.sweep_overview(summary["groups"], metric=summary["metric"]), out / OVERVIEW)
    if summary["model"]:
        _deliver(out / summary["model"]["folder"], out / MODEL)
    else:
        shutil.rmtree(out / MODEL, ignore_errors=True)  # left by an earlier start
    write_summary(out, summary)


def _deliver(trained: Path, model: Path) -> None:
    temporary = model.with_name(".model.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(trained, temporary)
    shutil.rmtree(model, ignore_errors=True)
    temporary.replace(model)


def why_nothing(summary: Summary, out: Path) -> str:
    """Return the reason no configuration could be chosen, and the fix."""
    trials, reasons = summary["trials"], sorted(set(summary["failures"].values()))
    if not reasons:
        return f"{out}: {summary['metric']} is undefined for every trial; check that validation rows are labelled"
    return (
        f"{out}: no configuration has all its folds and replicates; {trials['failed']} of {trials['total']} trials "
        f"failed ({'; '.join(reasons[:3])}); results of finished trials are kept; change the settings of trials that "
        "diverged, rerun the same command to retry trials that crashed"
    )
