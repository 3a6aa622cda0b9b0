"""Aggregation of trials: groups over folds and replicates, test metrics over refitted replicates.

A configuration is evaluated by its whole group. A group that lacks a trial is listed with its count and not chosen.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median_high, stdev

from modis_dist.evaluate.results import Evaluation, Result
from modis_dist.execution.trial import Trial
from modis_dist.metrics import HEADLINES, headline
from modis_dist.report.study_results import (
    AbsentPairSpread,
    Condition,
    DetailedMetrics,
    Group,
    MeanTranslation,
    Metrics,
    Pruned,
    Spread,
)

Results = Mapping[str, Result]  # by trial id
Configuration = tuple[str, int]  # condition and number: a group of all its folds and replicates


class Verdict(Spread, Pruned):
    """Decision on a configuration at a rung, by its metric there."""

    promoted: bool  # trained beyond the rung


def spread(values: Iterable[float | None]) -> Spread:
    """Return mean, standard deviation and number of the defined values."""
    defined = [value for value in values if value is not None]
    return {
        "mean": fmean(defined) if defined else None,
        "sd": stdev(defined) if len(defined) > 1 else None,
        "n": len(defined),
    }


def spread_by_name(rows: Sequence[Mapping[str, float]], *, names: Iterable[str] = ()) -> Metrics:
    """Return the ``spread`` of each metric in the rows, and of ``names`` even if no row has them."""
    every = dict.fromkeys([*names, *(name for row in rows for name in row)])
    return {name: spread(row.get(name) for row in rows) for name in every}


def by_configuration(trials: Sequence[Trial]) -> dict[Configuration, list[Trial]]:
    """Return trials by condition and configuration, in their order."""
    groups: dict[Configuration, list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.condition, trial.configuration), []).append(trial)
    return groups


def grouped(
    trials: Sequence[Trial],
    results: Results,
    reasons: Mapping[str, str],
    pruned: Mapping[Configuration, Verdict] | None = None,
) -> list[Group]:
    """Return one group per condition and configuration, in the order of the grid or the search.

    ``reasons`` of failed trials are by id; ``pruned`` has the last verdict on each configuration that was pruned.
    """
    verdicts = pruned or {}
    return [_group(group, results, reasons, verdicts.get(key)) for key, group in by_configuration(trials).items()]


def _group(trials: Sequence[Trial], results: Results, reasons: Mapping[str, str], pruned: Verdict | None) -> Group:
    metric = trials[0].run.trainer.metric
    done = {t.id: results[t.id] for t in trials if t.id in results and results[t.id]["status"] == "done"}
    failed = {t.id: reasons[t.id] for t in trials if t.id in reasons}
    epochs = [result["best_epoch"] for result in done.values() if result["best_epoch"] is not None]
    probes = [result["evaluation"]["probe"] for result in done.values() if result["evaluation"]]
    group: Group = {
        "condition": trials[0].condition,
        "params": trials[0].params,
        **spread(result["value"] for result in done.values()),
        "expected": len(trials),
        "failed": len(failed),
        "reasons": sorted(set(failed.values())),
        "baseline": spread(baseline_metrics(result).get(metric) for result in done.values())["mean"],
        "probe": spread(probe["knn"] for probe in probes if probe)["mean"],
        "epochs": median_high(epochs) if epochs else None,
        "pruned": None,
        "trials": [trial.id for trial in trials],
        "done_trials": list(done),
        "failed_trials": sorted(failed),
    }
    if pruned is not None:
        group |= {"mean": pruned["mean"], "sd": pruned["sd"], "n": pruned["n"]}
        group |= {"baseline": None, "probe": None, "epochs": None}
        group["pruned"] = {"epoch": pruned["epoch"], "rank": pruned["rank"], "of": pruned["of"]}
    return group


def baseline_metrics(result: Result) -> dict[str, float]:
    """Return the metrics of the baseline on exactly the rows of the model.

    A modality without labelled training rows has no regression; pooled metrics would then cover fewer rows than those
    of the model, and are left out.
    """
    baseline, evaluation = result["baseline"], result["evaluation"]
    if baseline is None or evaluation is None:
        return {}
    same_rows = baseline["n"] == evaluation["classification"]["n"]
    return {name: value for name, value in headline(baseline).items() if same_rows or name not in HEADLINES}


def training_metrics(result: Result) -> dict[str, float]:
    """Return the held-out metrics of a training: those of the model, ``probe/...`` and ``baseline/...``."""
    evaluation = result["evaluation"]
    if evaluation is None:
        return {}
    metrics = headline(evaluation["classification"])
    if result["value"] is not None:
        metrics[result["metric"]] = result["value"]
    metrics |= {f"probe/{name}": value for name, value in (evaluation["probe"] or {}).items()}
    return metrics | {f"baseline/{name}": value for name, value in baseline_metrics(result).items()}


def condition_metrics(condition: Condition) -> dict[str, float]:
    """Return the mean test metrics of a condition, named like those of ``training_metrics``."""
    parts = {"": condition["test"], "probe/": condition["probe"], "baseline/": condition["baseline"]}
    return {
        f"{prefix}{name}": value["mean"]
        for prefix, metrics in parts.items()
        for name, value in (metrics or {}).items()
        if value["mean"] is not None
    }


def metrics_over_replicates(results: Sequence[Result]) -> tuple[Metrics | None, Metrics | None, Metrics | None]:
    """Return test, baseline and probe metrics of refitted replicates; None if there are none."""
    evaluations = [result["evaluation"] for result in results if result["evaluation"] is not None]
    test = [headline(evaluation["classification"]) for evaluation in evaluations]
    baseline = [baseline_metrics(result) for result in results if result["baseline"] is not None]
    probe = [evaluation["probe"] for evaluation in evaluations if evaluation["probe"] is not None]
    return (
        spread_by_name(test, names=HEADLINES) if test else None,
        spread_by_name(baseline, names=HEADLINES) if baseline else None,
        spread_by_name(probe) if probe else None,
    )


def details_over_replicates(results: Sequence[Result]) -> DetailedMetrics | None:
    """Return the test metrics by class, modality and pair of modalities, None without test rows."""
    evaluations = [result["evaluation"] for result in results if result["evaluation"] is not None]
    if not evaluations:
        return None
    pooled = [evaluation["classification"]["per_class"] for evaluation in evaluations]
    modalities = [evaluation["classification"]["modalities"] for evaluation in evaluations]
    return {
        "per_class": {
            label: {
                "recall": spread(classes[label]["recall"] for classes in pooled),
                "precision": spread(classes[label]["precision"] for classes in pooled),
            }
            for label in pooled[0]
        },
        "per_modality_recall": {
            modality: {
                label: spread(each[modality]["per_class"][label]["recall"] for each in modalities)
                for label in metrics["per_class"]
            }
            for modality, metrics in modalities[0].items()
        },
        "absent_pairs": _absent_pairs(evaluations),
        "translation": _translation(evaluations),
    }


def _absent_pairs(evaluations: Sequence[Evaluation]) -> list[AbsentPairSpread]:
    recalls: dict[tuple[str, str], list[float | None]] = {}
    for evaluation in evaluations:
        for pair in evaluation["classification"]["absent_pairs"]:
            recalls.setdefault((pair["label"], pair["modality"]), []).append(pair["recall"])
    return [{"label": k, "modality": m, "recall": spread(values)} for (k, m), values in recalls.items()]


def _translation(evaluations: Sequence[Evaluation]) -> MeanTranslation:
    translations = [evaluation["translation"] for evaluation in evaluations]
    mse = {
        a: {b: spread(translation["mse"][a][b] for translation in translations)["mean"] for b in row}
        for a, row in translations[0]["mse"].items()
    }
    return {"mse": mse, "all_pairs_baseline": translations[0]["all_pairs_baseline"]}
