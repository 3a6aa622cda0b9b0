"""What the trials of a sweep add up to: groups over folds and replicates, the choice, the summary.

A configuration is judged by its whole group. A group with a trial missing is shown with its count and is not chosen.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median_high, stdev
from typing import Any

from modis_dist.execution.trial import Trial
from modis_dist.metrics import HEADLINES, headline

Results = Mapping[str, Mapping[str, Any]]  # trial id -> result.json
Group = dict[str, Any]
Configuration = tuple[str, int]  # condition and number: a group of all its folds and replicates


def spread(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """``mean``, sample standard deviation ``sd`` (None below two values) and ``n`` of the defined values."""
    held = [value for value in values if value is not None]
    return {
        "mean": fmean(held) if held else None,
        "sd": stdev(held) if len(held) > 1 else None,
        "n": len(held),
    }


def by_configuration(trials: Sequence[Trial]) -> dict[Configuration, list[Trial]]:
    """Trials by condition and configuration, in their order."""
    found: dict[Configuration, list[Trial]] = {}
    for trial in trials:
        found.setdefault((trial.condition, trial.configuration), []).append(trial)
    return found


def grouped(
    trials: Sequence[Trial],
    results: Results,
    reasons: Mapping[str, str],
    pruned: Mapping[Configuration, Mapping[str, Any]] | None = None,
) -> list[Group]:
    """One row per condition and configuration, in the order of the grid or the search.

    Keys: ``condition``, ``params``, ``mean``, ``sd``, ``n``, ``expected``, ``failed``, ``reasons``, ``baseline``,
    ``probe`` (kNN), ``epochs`` (the middle best epoch), ``pruned``, ``trials``, ``done_trials`` and ``failed_trials``
    (ids). ``pruned`` is None, or ``epoch``, ``rank`` and ``of``; ``mean``, ``sd`` and ``n`` are then of that epoch.
    """
    verdicts = pruned or {}
    members = by_configuration(trials)
    return [_group(group, results, reasons) | _cut_short(verdicts.get(key)) for key, group in members.items()]


def _cut_short(verdict: Mapping[str, Any] | None) -> Group:
    """What a verdict at a rung changes in a row."""
    if verdict is None:
        return {"pruned": None}
    figures = {name: verdict[name] for name in ("mean", "sd", "n")}
    nothing = dict.fromkeys(("baseline", "probe", "epochs"))
    return {**figures, **nothing, "pruned": {name: verdict[name] for name in ("epoch", "rank", "of")}}


def _group(group: Sequence[Trial], results: Results, reasons: Mapping[str, str]) -> Group:
    metric = group[0].run.trainer.metric
    finished = [t.id for t in group if t.id in results and results[t.id]["status"] == "done"]
    done = [results[name] for name in finished]
    failed = {t.id: reasons[t.id] for t in group if t.id in reasons}
    epochs = [result["best_epoch"] for result in done if result["best_epoch"] is not None]
    baselines = [_comparable(result).get(metric) for result in done]
    probes = [(result["evaluation"] or {}).get("probe", {}).get("knn") for result in done]
    return {
        "condition": group[0].condition,
        "params": group[0].params,
        **spread(result["value"] for result in done),
        "expected": len(group),
        "failed": len(failed),
        "reasons": sorted(set(failed.values())),
        "baseline": spread(baselines)["mean"],
        "probe": spread(probes)["mean"],
        "epochs": median_high(epochs) if epochs else None,
        "trials": [trial.id for trial in group],
        "done_trials": finished,
        "failed_trials": sorted(failed),
    }


def figures_on_test(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Test figures of the refitted replicates: mean, sd and n of each; None where there are no test rows."""
    judged = [result["evaluation"] for result in results if result["evaluation"] is not None]
    if not judged:
        return None
    figures: dict[str, Any] = spread_of_all([headline(one["classification"]) for one in judged], keys=HEADLINES)
    probes = [one["probe"] for one in judged if "probe" in one]
    return {
        **figures,
        "probe": spread_of_all(probes) if probes else None,
        "per_class": _per_class(judged),
        "per_modality_recall": _per_modality_recall(judged),
        "absent_pairs": _absent(judged),
        "translation": _translation(judged),
    }


def figures_of_baseline(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The same of logistic regression per modality on the same rows; a figure of other rows is left undefined."""
    held = [_comparable(result) for result in results if result["baseline"] is not None]
    return spread_of_all(held, keys=HEADLINES) if held else None


def figures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one training's held-out rows, flat: its own, ``probe/...`` and ``baseline/...``."""
    evaluation = result["evaluation"]
    if evaluation is None:
        return {}
    figures = headline(evaluation["classification"])
    if result["value"] is not None:
        figures[result["metric"]] = result["value"]
    figures |= {f"probe/{name}": value for name, value in evaluation.get("probe", {}).items()}
    return figures | {f"baseline/{name}": value for name, value in _comparable(result).items()}


def tested(condition: Mapping[str, Any]) -> dict[str, float]:
    """The same means of a condition's replicates on test rows."""
    test, baseline = condition["test"] or {}, condition["baseline"] or {}
    classes = {name: test[name] for name in test if name in HEADLINES or name.startswith("balanced_accuracy/")}
    parts = {"": classes, "probe/": test.get("probe") or {}, "baseline/": baseline}
    return {
        f"{prefix}{name}": figure["mean"]
        for prefix, figures in parts.items()
        for name, figure in figures.items()
        if figure["mean"] is not None
    }


def spread_of_all(
    rows: Sequence[Mapping[str, float]], *, keys: Iterable[str] = ()
) -> dict[str, dict[str, float | int | None]]:
    """``spread`` of these keys and of every other that a row has."""
    every = dict.fromkeys([*keys, *(key for row in rows for key in row)])
    return {key: spread(row.get(key) for row in rows) for key in every}


def _comparable(result: Mapping[str, Any]) -> dict[str, float]:
    """The baseline's figures on the very rows that the model was judged on.

    A modality without labelled training rows has no regression; figures of all modalities together are then of fewer
    rows than the model's and would flatter either side.
    """
    baseline, evaluation = result["baseline"], result["evaluation"]
    if baseline is None or evaluation is None:
        return {}
    same = baseline["n"] == evaluation["classification"]["n"]
    return {name: value for name, value in headline(baseline).items() if same or name not in HEADLINES}


def _per_class(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recall and precision of every class, the rows of all modalities pooled."""
    held = [one["classification"]["per_class"] for one in judged]
    return {
        label: {name: spread(one[label][name] for one in held) for name in ("recall", "precision")} for label in held[0]
    }


def _per_modality_recall(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recall of every class in every modality."""
    held = [one["classification"]["modalities"] for one in judged]
    return {
        modality: {
            label: spread(one[modality]["per_class"][label]["recall"] for one in held) for label in first["per_class"]
        }
        for modality, first in held[0].items()
    }


def _absent(judged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Recall on every class/modality pair without a training row."""
    recalls: dict[tuple[str, str], list[float | None]] = {}
    for one in judged:
        for pair in one["classification"]["absent_pairs"]:
            recalls.setdefault((pair["label"], pair["modality"]), []).append(pair["recall"])
    return [{"label": k, "modality": m, "recall": spread(values)} for (k, m), values in recalls.items()]


def _translation(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean MSE of every reconstruction and translation."""
    first = judged[0]["translation"]
    mse = {
        a: {b: spread(one["translation"]["mse"][a][b] for one in judged)["mean"] for b in row}
        for a, row in first["mse"].items()
    }
    return {"mse": mse, "all_pairs_baseline": first["all_pairs_baseline"]}
