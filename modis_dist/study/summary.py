"""What a finished study leaves: ``summary.json``, ``report.md``, ``sweep.png`` and the delivered model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modis_dist.execution.run_pack import trial_folder
from modis_dist.execution.trial import Trial
from modis_dist.report.study import report
from modis_dist.runtime.files import write_json, write_text
from modis_dist.study.aggregate import Group, Results, figures_of_baseline, figures_on_test
from modis_dist.study.manifest import Manifest

SUMMARY = "summary.json"
MODEL = "model"
REPORTS = ("report.md", "sweep.png", SUMMARY)


def failures(results: Results) -> dict[str, str]:
    return {name: str(r["reason"]) for name, r in results.items() if r["status"] == "failed"}


def changes(results: Results) -> dict[str, list[str]]:
    """What changed of machine and software under trainings that were continued: they are not those of one machine."""
    return {name: list(r["changes"]) for name, r in results.items() if r.get("changes")}


def summarise(
    listed: Manifest,
    groups: Sequence[Group],
    best: Mapping[str, Group],
    refits: Mapping[str, Sequence[Trial]],
    final: Results,
    *,
    metric: str,
) -> dict[str, Any]:
    """What scripts and tables read: counts, and of each condition its choice, test figures, baseline and model.

    ``best``, ``test`` and ``baseline`` at the top are those of the first condition. ``model`` at the top is the one
    that is delivered to the folder ``model``: that of the first condition that has one.
    """
    conditions: list[dict[str, Any]] = []
    for condition in dict.fromkeys(group["condition"] for group in groups):
        group = best.get(condition)
        trained = _done(refits.get(condition, ()), final)
        held = [final[trial.id] for trial in trained]
        conditions.append(
            {
                "condition": condition,
                "best": None if group is None else _choice(group, metric),
                "test": figures_on_test(held),
                "baseline": figures_of_baseline(held),
                "model": _model(trained[0]) if trained else None,
            }
        )
    expected = {name for group in groups for name in group["trials"]}
    failed = {name for group in groups for name in group["failed_trials"]}
    done = {name for group in groups for name in group["done_trials"]}
    pruned = {name for group in groups if group["pruned"] for name in group["trials"]} - done - failed
    return {
        "study": listed.study,
        "trials": {"total": len(expected), "done": len(done), "failed": len(failed), "pruned": len(pruned)},
        **{key: conditions[0][key] for key in ("best", "test", "baseline")},
        "model": next((one["model"] for one in conditions if one["model"]), None),
        "conditions": conditions,
        "metric": metric,
        "groups": list(groups),
    }


def _done(trials: Sequence[Trial], results: Results) -> list[Trial]:
    return [trial for trial in trials if results.get(trial.id, {}).get("status") == "done"]


def _model(trial: Trial) -> dict[str, Any]:
    """Which model stands for a condition: the first replicate by seed, never the best by test rows."""
    folder = trial_folder(Path(), trial)
    return {"condition": trial.condition, "params": trial.params, "seed": trial.run.seed, "folder": str(folder)}


def _choice(group: Group, metric: str) -> dict[str, Any]:
    return {
        "params": group["params"],
        "metric": metric,
        "mean": group["mean"],
        "sd": group["sd"],
        "n": group["n"],
        "epochs": group["epochs"],
        "baseline": group["baseline"],
    }


def write(
    summary: dict[str, Any],
    groups: Sequence[Group],
    *,
    out: Path,
    metric: str,
) -> None:
    """Tables, the overview figure, the delivered model, and last the summary."""
    from modis_dist.report import figures  # loads matplotlib, which the jobs of a search never need

    write_text(out / "report.md", report(summary, groups, metric=metric))
    figures.sweep_overview(groups, out / "sweep.png", metric=metric)
    if summary["model"]:
        _deliver(out / summary["model"]["folder"], out / MODEL)
    else:
        shutil.rmtree(out / MODEL, ignore_errors=True)  # one of an earlier start is not this study's
    write_json(out / SUMMARY, summary)


def _deliver(trained: Path, model: Path) -> None:
    """Copy a refit to ``model``."""
    temporary = model.with_name(".model.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(trained, temporary)
    shutil.rmtree(model, ignore_errors=True)
    temporary.replace(model)


def why_nothing(summary: Mapping[str, Any], out: Path) -> str:
    """Why no configuration could be chosen, and what to do."""
    trials, reasons = summary["trials"], sorted(set(summary["failures"].values()))
    if not reasons:
        return f"{out}: {summary['metric']} is undefined for every trial; are there labelled validation rows?"
    return (
        f"no configuration has all its folds and replicates: {trials['failed']} of {trials['total']} trials failed "
        f"({'; '.join(reasons[:3])}); what is finished is kept in {out}; change the settings of those that diverged, "
        "the same command tries those that crashed again"
    )
