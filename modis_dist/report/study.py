"""The report of a finished study: the chosen configurations and their test metrics, with the baseline."""

from collections.abc import Mapping, Sequence
from itertools import chain

from rich.table import Table
from rich.text import Text

from modis_dist.metrics import HEADLINES
from modis_dist.report.study_results import Condition, DetailedMetrics, StudyModel, Summary
from modis_dist.report.tables import (
    ABSENT,
    BASELINE,
    LABELS,
    REPLICATES,
    add,
    comparison_table,
    empty,
    escaped,
    finished,
    mean_sd,
    numbers,
    spread_of,
    starred,
    sweep_table,
    to_markdown,
    translation_table,
)
from modis_dist.report.text import settings
from modis_dist.runtime.text import plain

CHANGES_SHOWN = 3

Titled = list[tuple[str, Table]]
Conditions = Sequence[Condition]


def tables(summary: Summary, *, max_groups: int | None = None) -> Titled:
    """Return the titled tables for a terminal; the first lists the best ``max_groups`` configurations, or all."""
    titled = [
        ("Search, on validation rows", sweep_table(summary["groups"], metric=summary["metric"], max_groups=max_groups))
    ]
    tested = _tested(summary)
    details = {c["condition"]: c["details"] for c in tested if c["details"] is not None}
    if tested:
        translations = {name: detail["translation"] for name, detail in details.items()}
        titled.append(("Selected configuration, on test rows", comparison_table(tested)))
        titled.append(("Test balanced accuracy by modality", modality_table(tested)))
        titled.append(("Test error of reconstruction and translation", translation_table(translations)))
    if any(detail["absent_pairs"] for detail in details.values()):
        titled.append(("Test recall of class/modality pairs without training rows", absent_table(details)))
    return _defined_once(titled)


def report(summary: Summary) -> str:
    """Return ``tables`` as Markdown, and all test metrics by condition and class."""
    parts = [f"# {escaped(summary['study'])}\n"]
    for title, table in _defined_once([*tables(summary), *_detailed(_tested(summary))]):
        parts.append(f"## {escaped(title)}\n\n{to_markdown(table)}")
    return "\n".join([*parts, *(f"{escaped(line)}\n" for line in [*models(summary), *resumed_elsewhere(summary)])])


def models(summary: Summary) -> list[str]:
    """Return lines that name the delivered model and the folders of the models of other conditions."""
    delivered = summary["model"]
    if delivered is None:
        return []
    several = len(summary["conditions"]) > 1

    def named(model: StudyModel) -> str:
        parts = [f"condition {plain(model['condition'])}"] if several else []
        return ", ".join([*parts, *filter(None, [settings(model["params"])]), f"seed {model['seed']}"])

    others = [c["model"] for c in summary["conditions"] if c["model"] is not None and c["model"] != delivered]
    lines = [f"The model of {named(model)} is in {model['folder']}." for model in others]
    return [f"The folder model contains the model of {named(delivered)}.", *lines]


def resumed_elsewhere(summary: Summary) -> list[str]:
    """Return a line if trainings resumed on different hardware or software."""
    changes = summary["changes"]
    if not changes:
        return []
    kinds = sorted(set(chain.from_iterable(changes.values())))
    shown = "; ".join(map(plain, kinds[:CHANGES_SHOWN])) + "; ..." * (len(kinds) > CHANGES_SHOWN)
    line = f"{len(changes)} trainings resumed on different hardware or software ({shown})"
    return [f"{line}; results may not be bit-identical to an uninterrupted run. summary.json lists them."]


def modality_table(conditions: Conditions) -> Table:
    """Return the mean test balanced accuracy of every modality, MODIS and baseline."""
    prefix = "balanced_accuracy/"
    names = dict.fromkeys(name for c in conditions for name in c["test"] or {} if name.startswith(prefix))
    return _with_baseline(conditions, {name: plain(name.removeprefix(prefix)) for name in names})


def metrics_table(conditions: Conditions) -> Table:
    """Return every pooled test metric, MODIS and baseline."""
    return _with_baseline(conditions, {name: LABELS[name] for name in HEADLINES})


def absent_table(details: Mapping[str, DetailedMetrics]) -> Table:
    """Return, by condition, the test recall of every class and modality without training rows."""
    table = empty("condition", "class", "modality")
    numbers(table, "recall", "n")
    for condition, detail in details.items():
        for pair in detail["absent_pairs"]:
            names = (condition, pair["label"], pair["modality"])
            add(table, *map(plain, names), mean_sd(pair["recall"]), str(pair["recall"]["n"]))
    return finished(table, REPLICATES)


def class_table(detail: DetailedMetrics) -> Table:
    """Return test recall and precision of every class, and recall by modality; absent pairs are starred."""
    by_modality = detail["per_modality_recall"]
    table = empty("class")
    numbers(table, "precision", "recall", *(f"recall {plain(m)}" for m in by_modality), "n")
    absent = {(pair["label"], pair["modality"]) for pair in detail["absent_pairs"]}
    for label, pooled in detail["per_class"].items():
        recalls = [starred(mean_sd(recall[label]), marked=(label, m) in absent) for m, recall in by_modality.items()]
        recall, precision = mean_sd(pooled["recall"]), mean_sd(pooled["precision"])
        add(table, plain(label), precision, recall, *recalls, str(pooled["recall"]["n"]))
    return finished(table, "n: replicates with rows of the class.", *([ABSENT] if absent else []))


def _detailed(conditions: Conditions) -> Titled:
    """Return the tables that are too long for a terminal."""
    by_class = [
        (f"Test metrics by class: {c['condition']}", class_table(c["details"]))
        for c in conditions
        if c["details"] is not None
    ]
    return [("All test metrics, modalities pooled", metrics_table(conditions)), *by_class] if conditions else []


def _defined_once(titled: Titled) -> Titled:
    """Remove the notes that a table repeats from an earlier one."""
    printed: set[str] = set()
    for _, table in titled:
        notes = [note for note in str(table.caption or "").split("\n") if note not in printed]
        table.caption = Text("\n".join(notes)) if any(notes) else None
        printed |= set(notes)
    return titled


def _tested(summary: Summary) -> list[Condition]:
    return [condition for condition in summary["conditions"] if condition["test"] is not None]


def _with_baseline(conditions: Conditions, labels: Mapping[str, str]) -> Table:
    """Return metrics as columns, with one line of MODIS and one of the baseline per condition."""
    table = empty("condition", "model")
    numbers(table, *labels.values(), "n")
    for condition in conditions:
        for model, metrics in (("MODIS", condition["test"]), ("baseline", condition["baseline"])):
            spreads = [spread_of(metrics, name) for name in labels]
            n = max((spread["n"] for spread in spreads), default=0)
            add(table, plain(condition["condition"]), model, *map(mean_sd, spreads), str(n))
    return finished(table, BASELINE, REPLICATES)
