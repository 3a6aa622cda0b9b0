"""Results as tables: for a terminal (rich) and as Markdown.

Every cell is a ``Text``, so that names from data are shown as they are written and never read as markup.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.table import Column, Table
from rich.text import Text

from modis_dist.report.text import best_of_each_condition, plain, settings, varying

NOTHING = "-"
FIGURES = ("balanced_accuracy", "macro_f1", "nmi", "ari")


def evaluation_table(model: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Table:
    """Figures of ``metrics.classification`` per modality and pooled, beside the baseline's on the same rows.

    ``baseline`` is a result of ``baseline.logistic_regression``. No difference is shown where it judged other rows.
    """
    table = _table("modality", "rows", "balanced accuracy", "macro F1", "NMI", "ARI", "LR", "over LR")
    parts = {} if baseline is None else baseline["modalities"]
    lines = [(plain(name), held, parts.get(name)) for name, held in model["modalities"].items()]
    for name, ours, theirs in [*lines, ("all", model, baseline)]:
        figures = [_number(ours[figure]) for figure in FIGURES]
        compared = [NOTHING, NOTHING] if theirs is None else [_number(theirs["balanced_accuracy"]), _gain(ours, theirs)]
        _add(table, name, f"{ours['n']:,}", *figures, *compared)
    unlabelled = [f"Unlabelled rows left out: {model['unlabelled']:,}."] if model["unlabelled"] else []
    table.caption = Text("\n".join([*unlabelled, *_baseline_notes(baseline)])) if unlabelled or baseline else None
    return table


def class_table(result: Mapping[str, Any]) -> Table:
    """Recall and precision per class, pooled and per modality; pairs absent in training carry a star."""
    modalities = result["modalities"]
    table = _table("class", "rows", "all", *map(plain, modalities))
    absent = {(pair["label"], pair["modality"]) for pair in result["absent_pairs"]}
    for label, pooled in result["per_class"].items():
        cells = [
            ("* " if (label, name) in absent else "") + _recall_precision(held["per_class"][label])
            for name, held in modalities.items()
        ]
        _add(table, plain(label), f"{pooled['n']:,}", _recall_precision(pooled), *cells)
    notes = ["Recall / precision.", *(["* no row of this class and modality in training."] if absent else [])]
    table.caption = Text("\n".join(notes))
    return table


def sweep_table(groups: Sequence[Mapping[str, Any]], *, metric: str = "balanced_accuracy") -> Table:
    """One line per configuration; the best of each condition carries a star.

    A group holds ``condition``, ``params`` {dotted key: value}, ``mean`` and ``sd`` over folds and replicates (or
    None), ``n`` finished trials of ``expected``, ``failed``, and optionally ``baseline`` and ``probe`` (kNN).
    """
    table = _table(
        "condition",
        "parameters",
        plain(metric.replace("_", " ")),
        "sd",
        "LR",
        "probe kNN",
        "trials",
        "failed",
        text_columns=2,
    )
    keys = varying(groups) if groups else []
    best = best_of_each_condition(groups, metric=metric)
    for place, group in enumerate(groups):
        mean = ("* " if place in best else "") + _number(group["mean"])
        trials = f"{group['n']} of {group['expected']}"
        beside = (_number(group.get("baseline")), _number(group.get("probe")))
        cells = (mean, _number(group["sd"]), *beside, trials, str(group["failed"]))
        name, style = plain(group["condition"]), "bold" if place in best else ""
        _add(table, name, settings(group["params"], keys) or NOTHING, *cells, style=style)
    notes = ["* best of its condition"] if best else []
    if any(group.get("probe") is not None for group in groups):
        notes.append("Probe: balanced accuracy of telling the modality; lower is better aligned.")
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def comparison_table(conditions: Sequence[Mapping[str, Any]]) -> Table:
    """One line per condition, scored on the test rows.

    A condition holds ``condition``, ``mean`` and ``sd`` of the test balanced accuracy over ``n`` replicates (or
    None), ``probe`` {logistic_regression, knn, perfect} or None, and ``baseline``, a balanced accuracy or None.
    """
    table = _table("condition", "test balanced accuracy", "replicates", "probe LR", "probe kNN", "LR", "over LR")
    for row in conditions:
        mean = _number(row["mean"]) + ("" if row["sd"] is None else f" ± {row['sd']:.3f}")
        probes = [_number((row["probe"] or {}).get(name)) for name in ("logistic_regression", "knn")]
        compared = [_number(row["baseline"]), _difference(row["mean"], row["baseline"])]
        _add(table, plain(row["condition"]), mean, str(row["n"]), *probes, *compared)
    perfect = sorted({row["probe"]["perfect"] for row in conditions if row["probe"]})
    if perfect:
        table.caption = Text(
            f"Probe: balanced accuracy of telling the modality; {perfect[0]:.3f} is perfect alignment."
        )
    return table


# --- as text ------------------------------------------------------------------------------------------------


def plain_rows(table: Table) -> list[list[str]]:
    """Header and cells of a table as they are shown, without markup."""
    return [
        [_shown(column.header) for column in table.columns],
        *map(list, zip(*map(_cells, table.columns), strict=True)),
    ]


def to_markdown(table: Table) -> str:
    """A GitHub table; everything a name might mean in Markdown or HTML is escaped."""
    header, *lines = ([_escaped(cell) for cell in row] for row in plain_rows(table))
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    text = "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *lines))
    caption = _shown(table.caption) if table.caption else ""
    notes = "".join(f"\n\n{_escaped(line)}" for line in caption.split("\n") if line)
    return f"{text}{notes}\n"


def _escaped(text: str) -> str:
    entities = plain(text, limit=1000).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|$~])", r"\\\1", entities)


def _shown(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _cells(column: Column) -> list[str]:
    return [_shown(cell) for cell in column.cells]


# --- parts --------------------------------------------------------------------------------------------------


def _table(*headers: str, text_columns: int = 1) -> Table:
    """An empty table whose first columns hold text and the others numbers."""
    table = Table(caption_justify="left")
    for place, header in enumerate(headers):
        justify: Literal["left", "right"] = "left" if place < text_columns else "right"
        table.add_column(Text(header), justify=justify, overflow="fold")
    return table


def _add(table: Table, *cells: str, style: str = "") -> None:
    table.add_row(*map(Text, cells), style=style)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _difference(ours: float | None, theirs: float | None) -> str:
    return NOTHING if ours is None or theirs is None else f"{ours - theirs:+.3f}"


def _gain(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Over the baseline, where both judged the same number of rows."""
    same = ours["n"] == theirs["n"]
    return _difference(ours["balanced_accuracy"], theirs["balanced_accuracy"]) if same else NOTHING


def _recall_precision(held: Mapping[str, Any]) -> str:
    return f"{_number(held['recall'])} / {_number(held['precision'])}"


def _baseline_notes(baseline: Mapping[str, Any] | None) -> list[str]:
    if baseline is None:
        return []
    notes = [f"LR: balanced accuracy of logistic regression per modality (C = {baseline['C']:g})."]
    for name, held in baseline["modalities"].items():
        if held["reason"]:
            notes.append(f"LR of {plain(name)}: {held['reason']}.")
        elif not held["converged"]:
            notes.append(f"LR of {plain(name)}: not converged in {baseline['max_iter']} iterations.")
    return notes
