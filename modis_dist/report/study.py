"""The report of a finished study: what was chosen, how it does on test rows, beside the baseline."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from modis_dist.report.tables import comparison_table, sweep_table, to_markdown
from modis_dist.report.text import plain


def tables(summary: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], *, metric: str) -> list[tuple[str, Table]]:
    """Titled tables: the search, the test figures of each condition, per modality."""
    found = [("Search, on validation rows", sweep_table(groups, metric=metric))]
    tested = [condition for condition in summary["conditions"] if condition["test"] is not None]
    if tested:
        found.append(("Chosen configuration, on test rows", comparison_table([_compared(c) for c in tested])))
        found.append(("Test balanced accuracy by modality", modality_table(tested)))
    return found


def report(summary: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], *, metric: str) -> str:
    """The tables as Markdown."""
    parts = [f"# {plain(summary['study'])}\n"]
    for title, table in tables(summary, groups, metric=metric):
        parts.append(f"## {title}\n\n{to_markdown(table)}")
    return "\n".join(parts)


def modality_table(conditions: Sequence[Mapping[str, Any]]) -> Table:
    """Mean test balanced accuracy of every modality, MODIS beside logistic regression."""
    prefix = "balanced_accuracy/"
    names = dict.fromkeys(key for c in conditions for key in c["test"] if key.startswith(prefix))
    table = Table("condition", "model")
    for key in names:
        table.add_column(plain(key.removeprefix(prefix)), justify="right")
    for condition in conditions:
        for model, figures in (("MODIS", condition["test"]), ("logistic regression", condition["baseline"])):
            cells = [_mean_sd((figures or {}).get(key)) for key in names]
            table.add_row(plain(condition["condition"]), model, *cells)
    return table


def _mean_sd(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "-"
    return f"{figure['mean']:.3f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.3f}")


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
