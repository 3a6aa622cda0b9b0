"""Results as tables: for a terminal (rich) and as Markdown.

Every cell is a ``Text``, so that names from data are shown as they are written and never read as markup.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text

from modis_dist.report.text import plain, settings, varying
from modis_dist.runtime.text import markdown

NOTHING = "-"
FIGURES = ("balanced_accuracy", "macro_f1", "nmi", "ari")
BASELINE = "baseline: logistic regression of every modality by itself, on the same rows"
PROBE = "probe: balanced accuracy of telling the modality of a row from its place in the latent space."
ABSENT = "* no row of this class and modality in training"


# --- one model ----------------------------------------------------------------------------------------------


def evaluation_table(model: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Table:
    """Figures of ``metrics.classification`` per modality and pooled, beside the baseline's on the same rows.

    ``baseline`` is a result of ``baseline.logistic_regression``. No difference is shown where it judged other rows.
    """
    table = empty("modality")
    numbers(table, "rows", "balanced accuracy", "macro F1", "NMI", "ARI", "baseline", "gain")
    parts = {} if baseline is None else baseline["modalities"]
    lines = [(plain(name), held, parts.get(name)) for name, held in model["modalities"].items()]
    for name, ours, theirs in [*lines, ("all", model, baseline)]:
        figures = [number(ours[figure]) for figure in FIGURES]
        compared = [NOTHING, NOTHING] if theirs is None else [number(theirs["balanced_accuracy"]), _gain(ours, theirs)]
        add(table, name, f"{ours['n']:,}", *figures, *compared)
    unlabelled = [f"Unlabelled rows left out: {model['unlabelled']:,}."] if model["unlabelled"] else []
    return finished(table, *unlabelled, *_baseline_notes(baseline))


def class_table(result: Mapping[str, Any]) -> Table:
    """Recall and precision per class, pooled and per modality; pairs absent in training carry a star."""
    modalities = result["modalities"]
    table = empty("class")
    numbers(table, "rows", "all", *map(plain, modalities))
    absent = {(pair["label"], pair["modality"]) for pair in result["absent_pairs"]}
    for label, pooled in result["per_class"].items():
        cells = [
            starred(_recall_precision(held["per_class"][label]), marked=(label, name) in absent)
            for name, held in modalities.items()
        ]
        add(table, plain(label), f"{pooled['n']:,}", _recall_precision(pooled), *cells)
    return finished(table, "recall/precision", *([ABSENT] if absent else []))


def translation_table(translations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Errors of ``metrics.translation`` by condition: decoded modality down, encoded across, the all-pairs baseline.

    The column of conditions is left out where there is one.
    """
    several = len(translations) > 1
    table = empty(*(["condition"] if several else []), "decoded as")
    sources = dict.fromkeys(a for one in translations.values() for a in one["mse"])
    numbers(table, *(f"from {plain(a)}" for a in sources), "all pairs")
    for condition, one in translations.items():
        for b, reference in one["all_pairs_baseline"].items():
            errors = [_error(one["mse"].get(a, {}).get(b)) for a in sources]
            add(table, *([plain(condition)] if several else []), plain(b), *errors, _error(reference))
    return finished(
        table,
        "Mean squared error of preprocessed features, lower is better; from a modality to itself: reconstruction.",
        "all pairs: between two different samples. A decoder that knows only the mean has half of it.",
    )


# --- a sweep ------------------------------------------------------------------------------------------------


def sweep_table(
    rows: Sequence[Mapping[str, Any]], *, metric: str = "balanced_accuracy", most: int | None = None
) -> Table:
    """One line per configuration, or the best ``most`` of them; the best of each condition carries a star.

    A row holds ``condition``, ``params`` {dotted key: value}, ``mean`` and ``sd`` over folds and replicates (or None),
    ``n`` finished trials of ``expected``, ``failed``, ``rank`` and ``chosen``, and optionally ``baseline``, ``probe``
    (kNN) and ``pruned``.
    """
    shown = plain(metric.replace("_", " "))
    table = empty("condition")
    parameters(table, "parameters")
    numbers(table, shown, "baseline", "probe", "trials")
    keys = varying(rows) if rows else []
    groups = [row for row in rows if most is None or row["rank"] <= most]
    for group in groups:
        beside = (number(group.get("baseline")), number(group.get("probe")))
        cells = (starred(mean_sd(group), marked=group["chosen"]), *beside, _trials(group))
        name, style = plain(group["condition"]), "bold" if group["chosen"] else ""
        add(table, name, settings(group["params"], keys) or NOTHING, *cells, style=style)
    notes = [f"... and {len(rows) - len(groups)} more; report.md lists all."] if len(groups) < len(rows) else []
    notes += ["* best of its condition"] if any(group["chosen"] for group in groups) else []
    if any(group.get("pruned") for group in groups):
        notes.append("pruned at: the epoch at which it was not among the best; its value is the best up to there.")
    if any(group.get("baseline") is not None for group in groups):
        notes.append(f"{BASELINE}.")
    if any(group.get("probe") is not None for group in groups):
        notes += [
            f"{PROBE} 1: they lie apart, nothing is aligned; 1 / number of modalities: perfectly aligned.",
            f"The choice looks at {shown} only: compare the probes before you rely on alignment.",
        ]
    return finished(table, *notes)


def comparison_table(conditions: Sequence[Mapping[str, Any]]) -> Table:
    """One line per condition, scored on the test rows.

    A condition holds ``condition``, ``mean`` and ``sd`` of the test balanced accuracy over ``n`` replicates (or
    None), ``probe`` {logistic_regression, knn, perfect} or None, and ``baseline``, a balanced accuracy or None.
    """
    table = empty("condition")
    numbers(table, "balanced accuracy", "n", "baseline", "gain", "probe logistic", "probe kNN")
    for row in conditions:
        probes = [number((row["probe"] or {}).get(name)) for name in ("logistic_regression", "knn")]
        compared = [number(row["baseline"]), _difference(row["mean"], row["baseline"])]
        add(table, plain(row["condition"]), mean_sd(row), str(row["n"]), *compared, *probes)
    notes = ["n: replicates."]
    if any(row["baseline"] is not None for row in conditions):
        notes.append(f"{BASELINE}; gain: over it.")
    perfect = sorted({row["probe"]["perfect"] for row in conditions if row["probe"]})
    if perfect:
        notes.append(f"{PROBE} 1: they lie apart, nothing is aligned; {perfect[0]:.3f}: perfectly aligned.")
    return finished(table, *notes)


# --- as text ------------------------------------------------------------------------------------------------


def plain_rows(table: Table) -> list[list[str]]:
    """Header and cells of a table as they are shown, without markup."""
    return [
        [_one_line(column.header) for column in table.columns],
        *map(list, zip(*map(_cells, table.columns), strict=True)),
    ]


def to_markdown(table: Table) -> str:
    """A GitHub table; everything a name might mean in Markdown or HTML is escaped."""
    header, *lines = ([escaped(cell) for cell in row] for row in plain_rows(table))
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    text = "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *lines))
    caption = _shown(table.caption) if table.caption else ""
    notes = "".join(f"\n\n{escaped(line)}" for line in caption.split("\n") if line)
    return f"{text}{notes}\n"


def escaped(text: str) -> str:
    """A line of text that Markdown and HTML show as it is."""
    return markdown(plain(text, limit=1000))


def _shown(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _cells(column: Column) -> list[str]:
    return [_one_line(cell) for cell in column.cells]


def _one_line(cell: Any) -> str:
    """Names hold no line breaks (``plain``), so these are ours, in place of a space."""
    return _shown(cell).replace("\n", " ")


# --- parts --- --------------------------------------------------------------------------------------------------


def empty(*names: str) -> Table:
    """A table that begins with columns of names, which may be folded where a terminal is narrow."""
    table = Table(caption_justify="left")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    return table


def parameters(table: Table, header: str) -> None:
    """Add a column of settings, wrapped between two of them and never within one."""
    table.add_column(Text(header), overflow="crop")


def numbers(table: Table, *headers: str) -> None:
    """Add columns of numbers, never wrapped; their headers have a word on each line."""
    for header in headers:
        table.add_column(Text(header.replace(" ", "\n")), justify="right", no_wrap=True, overflow="crop")


def add(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of plain text."""
    table.add_row(*map(Text, cells), style=style)


def finished(table: Table, *notes: str) -> Table:
    """With its notes below, and every column at least as wide as the longest piece that must stay whole."""
    for column in table.columns:
        cells = [] if column.overflow == "fold" else [_shown(cell) for cell in column.cells]
        texts = [_shown(column.header), *cells]
        pieces = [piece for text in texts for piece in (text.split("\n") if column.no_wrap else text.split())]
        column.min_width = max(map(cell_len, pieces), default=1)
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return NOTHING if value is None else f"{value:.3f}"


def mean_sd(figure: Mapping[str, Any] | None) -> str:
    """``mean`` ± ``sd``, the latter where it is defined."""
    if figure is None or figure["mean"] is None:
        return NOTHING
    return number(figure["mean"]) + ("" if figure["sd"] is None else f" ± {figure['sd']:.3f}")


def starred(cell: str, *, marked: bool) -> str:
    """The cell, with a star if it is marked."""
    return f"* {cell}" if marked else cell


def _trials(group: Mapping[str, Any]) -> str:
    pruned = group.get("pruned")
    trained = f"pruned at {pruned['epoch']}" if pruned else f"{group['n']} of {group['expected']}"
    return trained + (f",\n{group['failed']} failed" if group["failed"] else "")


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:#.3g}"


def _difference(ours: float | None, theirs: float | None) -> str:
    return NOTHING if ours is None or theirs is None else f"{ours - theirs:+.3f}"


def _gain(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Over the baseline, where both judged the same number of rows."""
    same = ours["n"] == theirs["n"]
    return _difference(ours["balanced_accuracy"], theirs["balanced_accuracy"]) if same else NOTHING


def _recall_precision(held: Mapping[str, Any]) -> str:
    return f"{number(held['recall'])}/{number(held['precision'])}"


def _baseline_notes(baseline: Mapping[str, Any] | None) -> list[str]:
    if baseline is None:
        return []
    chosen = ", ".join(f"{held['C']:g}" for held in baseline["modalities"].values() if held["C"] is not None)
    how = f" (C = {chosen}, chosen on training rows)" if chosen else ""
    notes = [f"{BASELINE}{how}, its balanced accuracy; gain: over it."]
    for name, held in baseline["modalities"].items():
        if held["reason"]:
            notes.append(f"baseline of {plain(name)}: {held['reason']}.")
        elif not held["converged"]:
            notes.append(f"baseline of {plain(name)}: not converged in {baseline['max_iter']} iterations.")
    return notes
