"""The report of a finished study: what was chosen, how it does on test rows, beside the baseline."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from modis_dist.report.tables import (
    ABSENT,
    BASELINE,
    add,
    comparison_table,
    empty,
    escaped,
    finished,
    mean_sd,
    numbers,
    starred,
    sweep_table,
    to_markdown,
    translation_table,
)
from modis_dist.report.text import plain, settings

FIGURES = ("balanced_accuracy", "mean_modality_balanced_accuracy", "macro_f1", "nmi", "ari")
CHANGES_SHOWN = 3
HEADERS = ("balanced accuracy", "mean modality balanced accuracy", "macro F1", "NMI", "ARI")

Titled = list[tuple[str, Table]]
Conditions = Sequence[Mapping[str, Any]]


def tables(
    summary: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], *, metric: str, most: int | None = None
) -> Titled:
    """The titled tables of a terminal: search, comparison, by modality, translation, absent pairs if there are any.

    Of the search the best ``most`` configurations are listed, or all.
    """
    found = [("Search, on validation rows", sweep_table(groups, metric=metric, most=most))]
    tested = _tested(summary)
    if tested:
        translations = {c["condition"]: c["test"]["translation"] for c in tested}
        found.append(("Chosen configuration, on test rows", comparison_table([_compared(c) for c in tested])))
        found.append(("Test balanced accuracy by modality", modality_table(tested)))
        found.append(("Test error of reconstruction and translation", translation_table(translations)))
    if any(condition["test"]["absent_pairs"] for condition in tested):
        found.append(("Test recall of pairs absent in training", absent_table(tested)))
    return found


def report(summary: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], *, metric: str) -> str:
    """Those tables as Markdown, and all figures of the chosen configurations by condition and by class."""
    parts = [f"# {escaped(summary['study'])}\n"]
    for title, table in [*tables(summary, groups, metric=metric), *_details(_tested(summary))]:
        parts.append(f"## {escaped(title)}\n\n{to_markdown(table)}")
    return "\n".join([*parts, *(f"{escaped(line)}\n" for line in [*models(summary), *continued(summary)])])


def models(summary: Mapping[str, Any]) -> list[str]:
    """Lines that say whose model was delivered, and where those of other conditions are."""
    if not summary["model"]:
        return []
    held = [condition["model"] for condition in summary["conditions"] if condition["model"]]
    several = len(summary["conditions"]) > 1

    def named(model: Mapping[str, Any]) -> str:
        parts = [f"condition {plain(model['condition'])}"] if several else []
        return ", ".join([*parts, *filter(None, [settings(model["params"])]), f"seed {model['seed']}"])

    others = [f"The model of {named(model)} is in {model['folder']}." for model in held if model != summary["model"]]
    return [f"The folder model holds the model of {named(summary['model'])}.", *others]


def continued(summary: Mapping[str, Any]) -> list[str]:
    """A line where trainings were continued with other hardware or software than they began with."""
    held = summary["changes"]
    if not held:
        return []
    kinds = sorted({change for changes in held.values() for change in changes})
    shown = "; ".join(map(plain, kinds[:CHANGES_SHOWN])) + "; ..." * (len(kinds) > CHANGES_SHOWN)
    line = "trainings went on with other hardware or software than they began with, so not to the bit"
    return [f"{len(held)} {line} ({shown}); summary.json names them."]


def modality_table(conditions: Conditions) -> Table:
    """Mean test balanced accuracy of every modality, MODIS beside the baseline."""
    prefix = "balanced_accuracy/"
    keys = list(dict.fromkeys(key for c in conditions for key in c["test"] if key.startswith(prefix)))
    return _beside_the_baseline(conditions, keys, [plain(key.removeprefix(prefix)) for key in keys])


def figures_table(conditions: Conditions) -> Table:
    """Every pooled test figure, MODIS beside the baseline."""
    return _beside_the_baseline(conditions, FIGURES, HEADERS)


def absent_table(conditions: Conditions) -> Table:
    """Test recall on every class and modality without a training row."""
    table = empty("condition", "class", "modality")
    numbers(table, "recall", "n")
    for condition in conditions:
        for pair in condition["test"]["absent_pairs"]:
            names = (condition["condition"], pair["label"], pair["modality"])
            add(table, *map(plain, names), mean_sd(pair["recall"]), str(pair["recall"]["n"]))
    return finished(table, "n: replicates.")


def class_table(test: Mapping[str, Any]) -> Table:
    """Test recall and precision of every class, pooled and recall by modality; absent pairs carry a star."""
    by_modality = test["per_modality_recall"]
    table = empty("class")
    numbers(table, "precision", "recall", *(f"recall {plain(m)}" for m in by_modality), "n")
    absent = {(pair["label"], pair["modality"]) for pair in test["absent_pairs"]}
    for label, held in test["per_class"].items():
        recalls = [starred(mean_sd(one.get(label)), marked=(label, m) in absent) for m, one in by_modality.items()]
        add(
            table, plain(label), mean_sd(held["precision"]), mean_sd(held["recall"]), *recalls, str(held["recall"]["n"])
        )
    return finished(table, "n: replicates with rows of the class.", *([ABSENT] if absent else []))


def _details(conditions: Conditions) -> Titled:
    """What is too long for a terminal."""
    by_class = [(f"Test figures by class: {c['condition']}", class_table(c["test"])) for c in conditions]
    return [("All test figures", figures_table(conditions)), *by_class] if conditions else []


def _tested(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [condition for condition in summary["conditions"] if condition["test"] is not None]


def _beside_the_baseline(conditions: Conditions, keys: Sequence[str], headers: Sequence[str]) -> Table:
    """Figures under ``keys``, a line of MODIS and one of the baseline for each condition."""
    table = empty("condition", "model")
    numbers(table, *headers, "n")
    for condition in conditions:
        for model, figures in (("MODIS", condition["test"]), ("baseline", condition["baseline"] or {})):
            held = [figures.get(key) for key in keys]
            n = max((figure["n"] for figure in held if figure is not None), default=0)
            add(table, plain(condition["condition"]), model, *map(mean_sd, held), str(n))
    return finished(table, f"{BASELINE}.", "n: replicates.")


def _compared(condition: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the comparison table."""
    test, baseline = condition["test"], condition["baseline"]
    probe = test["probe"]
    return {
        "condition": condition["condition"],
        **test["balanced_accuracy"],
        "probe": None if probe is None else {name: figure["mean"] for name, figure in probe.items()},
        "baseline": None if baseline is None else baseline["balanced_accuracy"]["mean"],
    }
