"""Tables of results, for a terminal (rich) and as Markdown.

Every cell is a ``Text``: names from data are shown as written, never read as markup.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from modis_dist.evaluate.baseline import Baseline
from modis_dist.metrics import HEADLINES, Classification, ClassMetrics, ModalityMetrics, Translation
from modis_dist.report.study_results import Condition, MeanTranslation, Metrics, RankedGroup, Spread
from modis_dist.report.text import settings, varying
from modis_dist.runtime.text import markdown, plain

NOTHING = "-"
LABELS: dict[str, str] = {name: name.replace("_", " ") for name in HEADLINES}
LABELS |= {"macro_f1": "macro F1", "nmi": "NMI", "ari": "ARI"}
ModalityMetric = Literal["balanced_accuracy", "macro_f1", "nmi", "ari"]
MODALITY_METRICS: tuple[ModalityMetric, ...] = get_args(ModalityMetric)
BASELINE = "baseline: a separate logistic regression per modality, trained and tested on the same rows as MODIS."
GAIN = "gain: MODIS minus baseline."
PROBE = (
    "modality probe: balanced accuracy of a classifier (kNN or logistic regression) that predicts the modality of a "
    "row from its latent vector. 1: the modalities are separated; 1 / number of modalities: they are aligned."
)
REPLICATES = "n: replicates; values are mean ± standard deviation."
ABSENT = "* no training rows of this class in this modality"


def probe_line(probe: Mapping[str, float]) -> str:
    """Return the modality probe of one model with its definition."""
    values = f"kNN {number(probe['knn'])}, logistic regression {number(probe['logistic_regression'])}"
    return f"Modality probe: {values}; aligned modalities: {number(probe['perfect'])}.\n{PROBE}"


# --- one model ----------------------------------------------------------------------------------------------


def evaluation_table(model: Classification, baseline: Baseline | None) -> Table:
    """Return metrics by modality and pooled, with the baseline.

    ``gain`` is left out if the baseline was scored on other rows.
    """
    table = empty("modality")
    numbers(table, "rows", *(LABELS[name] for name in MODALITY_METRICS), "baseline", "gain")
    lines: list[tuple[str, ModalityMetrics, ModalityMetrics | None]] = [
        (plain(name), metrics, baseline["modalities"].get(name) if baseline else None)
        for name, metrics in model["modalities"].items()
    ]
    for name, metrics, reference in [*lines, ("all", model, baseline)]:
        compared = [NOTHING, NOTHING]
        if reference is not None:
            compared = [number(reference["balanced_accuracy"]), _gain(metrics, reference)]
        add(table, name, f"{metrics['n']:,}", *(number(metrics[metric]) for metric in MODALITY_METRICS), *compared)
    unlabelled = [f"Excluded: {model['unlabelled']:,} unlabelled rows."] if model["unlabelled"] else []
    return finished(table, *unlabelled, *_baseline_notes(baseline))


def class_table(model: Classification) -> Table:
    """Return recall and precision by class, pooled and by modality; pairs absent in training are starred."""
    modalities = model["modalities"]
    table = empty("class")
    numbers(table, "rows", "all", *map(plain, modalities))
    absent = {(pair["label"], pair["modality"]) for pair in model["absent_pairs"]}
    for label, pooled in model["per_class"].items():
        cells = [
            starred(_recall_precision(metrics["per_class"][label]), marked=(label, name) in absent)
            for name, metrics in modalities.items()
        ]
        add(table, plain(label), f"{pooled['n']:,}", _recall_precision(pooled), *cells)
    return finished(table, "recall/precision", *([ABSENT] if absent else []))


def translation_table(translations: Mapping[str, Translation | MeanTranslation]) -> Table:
    """Return errors by condition, decoded (down) and encoded (across) modality, and the all-pairs baseline.

    The condition column is omitted if there is only one.
    """
    several = len(translations) > 1
    table = empty(*(["condition"] if several else []), "decoded as")
    sources = dict.fromkeys(a for translation in translations.values() for a in translation["mse"])
    numbers(table, *(f"from {plain(a)}" for a in sources), "all pairs")
    for condition, translation in translations.items():
        for b, all_pairs in translation["all_pairs_baseline"].items():
            errors = [_error(translation["mse"].get(a, {}).get(b)) for a in sources]
            add(table, *([plain(condition)] if several else []), plain(b), *errors, _error(all_pairs))
    return finished(
        table,
        "Mean squared error of preprocessed features, lower is better. From a modality to itself: reconstruction.",
        "all pairs: mean squared difference of different samples; predicting the mean of a feature gives half of it.",
    )


# --- a study ------------------------------------------------------------------------------------------------


def sweep_table(
    groups: Sequence[RankedGroup], *, metric: str = "balanced_accuracy", max_groups: int | None = None
) -> Table:
    """Return one line per configuration, or the best ``max_groups``; the chosen one of each condition is starred."""
    label = LABELS.get(metric, plain(metric.replace("_", " ")))
    table = empty("condition")
    parameters(table, "parameters")
    numbers(table, label, "baseline", "modality probe", "trials")
    keys = varying([group["params"] for group in groups])
    shown = [group for group in groups if max_groups is None or group["rank"] <= max_groups]
    for group in shown:
        cells = (number(group["baseline"]), number(group["probe"]), _trials(group))
        mean, style = starred(mean_sd(group), marked=group["chosen"]), "bold" if group["chosen"] else ""
        add(table, plain(group["condition"]), settings(group["params"], keys) or NOTHING, mean, *cells, style=style)
    notes = [f"... and {len(groups) - len(shown)} more; report.md lists all."] if len(shown) < len(groups) else []
    notes.append("Mean ± standard deviation over folds and replicates.")
    notes += ["* best of its condition"] if any(group["chosen"] for group in shown) else []
    if any(group["pruned"] for group in shown):
        notes.append("pruned at: the last epoch of a pruned configuration; its value is the best so far.")
    if any(group["baseline"] is not None for group in shown):
        notes.append(BASELINE)
    if any(group["probe"] is not None for group in shown):
        notes += [PROBE, f"Selection uses {label} only: check the modality probe before you rely on alignment."]
    return finished(table, *notes)


def comparison_table(conditions: Sequence[Condition]) -> Table:
    """Return the test metrics of each condition with its baseline and modality probe."""
    table = empty("condition")
    numbers(
        table, LABELS["balanced_accuracy"], "n", "baseline", "gain", "modality probe kNN", "modality probe logistic"
    )
    for condition in conditions:
        accuracy, baseline = (spread_of(condition[part], "balanced_accuracy") for part in ("test", "baseline"))
        gain = _difference(accuracy["mean"], baseline["mean"])
        probes = [number(spread_of(condition["probe"], name)["mean"]) for name in ("knn", "logistic_regression")]
        cells = (mean_sd(accuracy), str(accuracy["n"]), number(baseline["mean"]), gain, *probes)
        add(table, plain(condition["condition"]), *cells)
    with_baseline = any(condition["baseline"] for condition in conditions)
    with_probe = any(condition["probe"] for condition in conditions)
    return finished(table, REPLICATES, *([BASELINE, GAIN] if with_baseline else []), *([PROBE] if with_probe else []))


# --- as text ------------------------------------------------------------------------------------------------


def plain_rows(table: Table) -> list[list[str]]:
    """Return header and cells as displayed, without markup."""
    return [
        [_one_line(column.header) for column in table.columns],
        *map(list, zip(*(map(_one_line, column.cells) for column in table.columns), strict=True)),
    ]


def to_markdown(table: Table) -> str:
    """Return a GitHub table with names escaped for Markdown and HTML."""
    header, *lines = ([escaped(cell) for cell in row] for row in plain_rows(table))
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    text = "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *lines))
    caption = _shown(table.caption) if table.caption else ""
    notes = "".join(f"\n\n{escaped(line)}" for line in caption.split("\n") if line)
    return f"{text}{notes}\n"


def escaped(text: str) -> str:
    """Return a line of text escaped for Markdown and HTML."""
    return markdown(plain(text, limit=1000))


def _shown(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _one_line(cell: Any) -> str:
    """Replace the line breaks of headers (``numbers``); names have none (``plain``)."""
    return _shown(cell).replace("\n", " ")


# --- parts --------------------------------------------------------------------------------------------------


def empty(*names: str) -> Table:
    """Return a table whose first columns are names, which may wrap on a narrow terminal."""
    table = Table(caption_justify="left")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    return table


def parameters(table: Table, header: str) -> None:
    """Add a column of settings, wrapped only between two settings."""
    table.add_column(Text(header), overflow="crop")


def numbers(table: Table, *headers: str) -> None:
    """Add columns of numbers, never wrapped; headers have one word per line."""
    for header in headers:
        table.add_column(Text(header.replace(" ", "\n")), justify="right", no_wrap=True, overflow="crop")


def add(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of plain text."""
    table.add_row(*map(Text, cells), style=style)


def finished(table: Table, *notes: str) -> Table:
    """Add the notes below the table and set the minimum width of every column."""
    for column in table.columns:
        cells = [] if column.overflow == "fold" else [_shown(cell) for cell in column.cells]
        texts = [_shown(column.header), *cells]
        pieces = [piece for text in texts for piece in (text.split("\n") if column.no_wrap else text.split())]
        column.min_width = max(map(cell_len, pieces), default=1)
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def number(value: float | None) -> str:
    """Return a number with three decimals; a dash for None."""
    return NOTHING if value is None else f"{value:.3f}"


def mean_sd(spread: Spread) -> str:
    """Return ``mean ± sd``, or the mean alone if ``sd`` is undefined."""
    if spread["mean"] is None:
        return NOTHING
    return number(spread["mean"]) + ("" if spread["sd"] is None else f" ± {spread['sd']:.3f}")


def starred(cell: str, *, marked: bool) -> str:
    """Return the cell, with a star if it is marked."""
    return f"* {cell}" if marked else cell


def spread_of(metrics: Metrics | None, name: str) -> Spread:
    """Return the spread of a metric; an empty one (n = 0) if it is missing."""
    return (metrics or {}).get(name, {"mean": None, "sd": None, "n": 0})


def _trials(group: RankedGroup) -> str:
    pruned = group["pruned"]
    count = f"pruned at {pruned['epoch']}" if pruned else f"{group['n']} of {group['expected']}"
    return count + (f",\n{group['failed']} failed" if group["failed"] else "")


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:#.3g}"


def _difference(value: float | None, reference: float | None) -> str:
    return NOTHING if value is None or reference is None else f"{value - reference:+.3f}"


def _gain(metrics: ModalityMetrics, baseline: ModalityMetrics) -> str:
    """Return the difference to the baseline if both have the same number of rows."""
    same_rows = metrics["n"] == baseline["n"]
    return _difference(metrics["balanced_accuracy"], baseline["balanced_accuracy"]) if same_rows else NOTHING


def _recall_precision(metrics: ClassMetrics) -> str:
    return f"{number(metrics['recall'])}/{number(metrics['precision'])}"


def _baseline_notes(baseline: Baseline | None) -> list[str]:
    if baseline is None:
        return []
    c = ", ".join(f"{fit['C']:g}" for fit in baseline["fits"].values() if fit["C"] is not None)
    notes = [BASELINE, GAIN, *([f"C of the regressions, selected on training rows: {c}."] if c else [])]
    for name, fit in baseline["fits"].items():
        if fit["reason"]:
            notes.append(f"baseline of {plain(name)}: {fit['reason']}.")
        elif not fit["converged"]:
            notes.append(f"baseline of {plain(name)}: not converged after {baseline['max_iter']} iterations.")
    return notes
