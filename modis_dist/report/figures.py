"""Figures of a finished training or study, drawn but not written (``drawing.save``)."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from modis_dist.data.store.index import UNLABELLED, Features, Rows
from modis_dist.evaluate.results import EpochMetrics
from modis_dist.metrics import Classification, ModalityMetrics, Translation
from modis_dist.report.drawing import (
    CLASS_COLOURS,
    CROWDED,
    GREY,
    MODALITY_COLOURS,
    OKABE_ITO,
    PALE,
    Entry,
    Points,
    axes_legend,
    cell_texts,
    drawable,
    figure_legend,
    grid,
    heading,
    matrix,
)
from modis_dist.report.study_results import RankedGroup
from modis_dist.report.text import settings, varying
from modis_dist.runtime.text import plain

MARKERS = ("o", "^", "s", "D", "v", "P", "X")
BEST: dict[str, Any] = {"marker": "D", "color": OKABE_ITO[1]}
COMPLETE: dict[str, Any] = {"marker": "o", "color": OKABE_ITO[0]}
PRUNED: dict[str, Any] = {"marker": "o", "color": GREY, "markerfacecolor": "none"}
MAX_POINTS = 20_000
MAX_CONFIGURATIONS = 60

FAMILIES = {
    "reconstruction": ("Reconstruction error", "mean squared error"),
    "total_d": ("Total, discriminator", "weighted loss"),
    "total_g": ("Total, VAEs", "weighted loss"),
    "kl": ("KL divergence", "nats"),
    "adversarial_d": ("Adversarial, discriminator", "loss"),
    "adversarial_g": ("Adversarial, VAEs", "loss"),
    "class_d": ("Classification, discriminator", "cross-entropy (nats)"),
    "class_g": ("Classification, VAEs", "cross-entropy (nats)"),
    "clustering_d": ("Clustering, discriminator", "loss"),
    "clustering_g": ("Clustering, VAEs", "loss"),
    "penalty": ("Gradient penalty, discriminator", "loss"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall of classes"),
    "mean_modality_balanced_accuracy": ("Balanced accuracy, mean of modalities", "mean recall of classes"),
    "macro_f1": ("Macro F1", "mean F1 of classes"),
    "nmi": ("Normalised mutual information", "NMI"),
    "ari": ("Adjusted Rand index", "ARI"),
}
SAME_FAMILY = {"recon": "reconstruction", "reconstruction_mse": "reconstruction"}
Curves = dict[str, dict[tuple[str, str], Points]]
"""family -> (phase, modality or "") -> points [n, 2] of epoch and value"""

PHASES = {"train": ("-", "training"), "val": ("--", "validation")}


# --- loss curves --------------------------------------------------------------------------------------------


def loss_curves(history: Sequence[EpochMetrics], *, best_epoch: int | None = None) -> Figure:
    """Return losses and metrics over epochs, one panel per family of terms.

    A row of ``history`` has ``epoch`` and terms named ``phase/family`` or ``phase/family/modality``, with phase train
    or val; other entries are ignored.
    """
    curves = _curves(history)
    families = [f for f in FAMILIES if f in curves] + [f for f in curves if f not in FAMILIES]
    modalities = list(dict.fromkeys(modality for family in families for _, modality in curves[family] if modality))
    colour = {"": "black"} | {m: MODALITY_COLOURS[i % len(MODALITY_COLOURS)] for i, m in enumerate(modalities)}
    figure, panels = grid(len(families), columns=4, width=3.3, height=2.4)
    for axes, family in zip(panels, families, strict=True):
        for (phase, modality), points in curves[family].items():
            ls, zorder = PHASES[phase][0], 2 if modality else 3
            (line,) = axes.plot(*points.T, lw=1.4, ls=ls, color=colour[modality], zorder=zorder)
            line.set_marker("o" if len(points) == 1 else "")
        _style_curves(axes, family, best_epoch)
    if not families:
        figure.text(0.5, 0.5, "no epochs recorded", ha="center")
    else:
        figure_legend(figure, _curve_entries(curves, {m: colour[m] for m in modalities}, best_epoch))
    return figure


def _curve_entries(curves: Curves, colour: Mapping[str, str], best_epoch: int | None) -> list[Entry]:
    phases = {phase for lines in curves.values() for phase, _ in lines}
    entries = [(modality, Line2D([], [], color=shade, lw=2)) for modality, shade in colour.items()]
    entries += [(n, Line2D([], [], color="black", ls=ls)) for phase, (ls, n) in PHASES.items() if phase in phases]
    if best_epoch is not None:
        entries.append((f"best epoch ({best_epoch})", Line2D([], [], color=GREY, ls=":")))
    return entries


def _curves(history: Sequence[EpochMetrics]) -> Curves:
    points: dict[str, dict[tuple[str, str], list[tuple[float | None, float]]]] = {}
    for row in history:
        for key, value in row.items():
            phase, _, rest = key.partition("/")
            if phase in PHASES and rest and value is not None:
                family, _, modality = rest.partition("/")
                lines = points.setdefault(SAME_FAMILY.get(family, family), {})
                lines.setdefault((phase, modality), []).append((row["epoch"], value))
    return {f: {line: np.array(pairs, float) for line, pairs in lines.items()} for f, lines in points.items()}


def _style_curves(axes: Axes, family: str, best_epoch: int | None) -> None:
    name, unit = FAMILIES.get(family, (family, "value"))
    heading(axes, name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.grid(color=PALE, lw=0.6)
    if best_epoch is not None:
        axes.axvline(best_epoch, color=GREY, ls=":", lw=1.2, zorder=0)


# --- latent space -------------------------------------------------------------------------------------------


def latent_pca(z: Mapping[str, Features], label: Mapping[str, Rows], classes: Sequence[str]) -> Figure:
    """Return the first two principal components of latent vectors, coloured by class and by modality.

    ``z[m]`` is [n_m, L], ``label[m]`` the class codes [n_m]. At most ``MAX_POINTS`` random rows are drawn.
    """
    points, fraction = principal_components(np.concatenate(list(z.values())))
    codes = np.concatenate([label[m] for m in z])
    modality = np.repeat(np.arange(len(z)), [len(rows) for rows in z.values()])
    chosen = np.random.default_rng(0).permutation(len(points))[:MAX_POINTS]  # mixed, so that no group covers another
    figure, panels = grid(2, columns=2, width=6.4, height=4.8)
    shown = f"{len(chosen):,} of {len(points):,} rows" if len(chosen) < len(points) else f"{len(points):,} rows"
    for axes, by, code, names, colours in (
        (panels[0], "class", codes, list(classes), CLASS_COLOURS),
        (panels[1], "modality", modality, list(z), MODALITY_COLOURS),
    ):
        entries = _scatter(axes, points[chosen], code[chosen], names, colours)
        axes_legend(axes, entries, columns=1 + len(entries) // 20)
        heading(axes, f"Latent space by {by} ({shown})")
        axes.set_xlabel(f"PC 1 ({fraction[0]:.0%} of variance)")
        axes.set_ylabel(f"PC 2 ({fraction[1]:.0%} of variance)")
    return figure


def principal_components(z: Features) -> tuple[Points, tuple[float, float]]:
    """Return scores [n, 2] on the first two components and their fractions of variance; missing components are 0."""
    centred = z.astype(np.float64)
    centred -= centred.mean(0) if len(z) else 0
    variance, direction = np.linalg.eigh(centred.T @ centred)
    direction = direction[:, ::-1][:, :2]
    direction = direction * np.sign(direction[np.abs(direction).argmax(0), np.arange(direction.shape[1])])
    scores = np.zeros((len(z), 2))
    scores[:, : direction.shape[1]] = centred @ direction
    fractions = np.zeros(2)
    fractions[: direction.shape[1]] = variance[::-1][:2] / max(float(variance.sum()), np.finfo(float).tiny)
    return scores, (float(fractions[0]), float(fractions[1]))


def _scatter(axes: Axes, points: Points, code: Rows, names: Sequence[str], colours: Sequence[str]) -> list[Entry]:
    """Draw one collection per marker, so that groups mix; return legend entries of the groups that occur."""
    marker = [MARKERS[k // len(colours) % len(MARKERS)] for k in range(len(names))]
    shade = np.array([colours[k % len(colours)] for k in range(len(names))])
    draw = partial(axes.scatter, s=26 if len(points) < 500 else 12, alpha=0.75, linewidths=0)
    for shape in dict.fromkeys(marker):
        rows = np.isin(code, [k for k in range(len(names)) if marker[k] == shape])
        if rows.any():
            draw(*points[rows].T, c=shade[code[rows]], marker=shape, zorder=2)
    present = [k for k in range(len(names)) if (code == k).any()]
    entries = [(names[k], Line2D([], [], ls="", marker=marker[k], color=shade[k], ms=6)) for k in present]
    unknown = code == UNLABELLED
    if unknown.any():
        draw(*points[unknown].T, c="0.75", zorder=1)
        entries.append(("unlabelled", Line2D([], [], ls="", marker="o", color="0.75", ms=6)))
    return entries


# --- confusion ----------------------------------------------------------------------------------------------


def confusion(metrics: Classification, classes: Sequence[str]) -> Figure:
    """Return confusion matrices, pooled and by modality.

    Colours are fractions of the true class, texts are numbers of rows (for up to ``CROWDED`` classes).
    """
    matrices: dict[str, ModalityMetrics] = {"All modalities": metrics, **metrics["modalities"]}
    side = min(max(0.42 * len(classes), 2.4), 8.0) + 1.1
    columns = len(matrices) if len(matrices) <= 3 else math.ceil(math.sqrt(len(matrices)))
    figure, panels = grid(len(matrices), columns=columns, width=side + 0.3, height=side)
    rotation = 90 if len(classes) > 4 or max(map(len, classes)) > 6 else 0
    for axes, (name, part) in zip(panels, matrices.items(), strict=True):
        counts = np.array(part["confusion"])
        rows = counts.sum(1, keepdims=True)
        fraction = np.divide(counts, rows, out=np.full(counts.shape, np.nan), where=rows > 0)
        image = matrix(axes, fraction, classes, classes, colours="Blues", rotation=rotation)
        if len(classes) <= CROWDED:
            cell_texts(axes, image, [[str(n) if n else "" for n in line] for line in counts], size=7.5)
        accuracy = part["balanced_accuracy"]
        subtitle = "no labelled rows" if accuracy is None else f"balanced accuracy {accuracy:.3f}, n = {part['n']:,}"
        heading(axes, plain(name, limit=24), subtitle)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
    figure.colorbar(image, ax=panels, label="fraction of the true class", shrink=0.6, aspect=30)
    return figure


# --- translation --------------------------------------------------------------------------------------------


def mse_heatmap(translation: Translation) -> Figure:
    """Return the errors by decoded (down) and encoded (across) modality, and the all-pairs baseline in the last column.

    Colours are ratios of the error to the all-pairs baseline of the decoded modality, comparable between modalities.
    """
    error, baseline, pairs = translation["mse"], translation["all_pairs_baseline"], translation["pairs"]
    names = list(error)
    table = np.array([[error[a][b] for a in names] for b in names], float)
    reference = np.array([[baseline[b]] for b in names], float)
    fraction = np.full((len(names), len(names) + 1), np.nan)  # the baseline's own column stays uncoloured
    np.divide(table, reference, out=fraction[:, :-1], where=reference > 0)
    texts = [[_error_text(error[a][b], pairs[a][b]) for a in names] + [_error_text(baseline[b])] for b in names]
    figure, (axes,) = grid(1, columns=1, width=1.3 * (len(names) + 1) + 3.2, height=0.9 * len(names) + 1.7)
    image = matrix(axes, fraction, names, [*names, "all pairs"], colours="RdBu_r", rotation=0)
    cell_texts(axes, image, texts, size=9)
    axes.axvline(len(names) - 0.5, color="black", lw=1.5)
    heading(axes, "Reconstruction and translation error (mean squared error)")
    axes.set_xlabel("encoded modality")
    axes.set_ylabel("decoded modality")
    figure.colorbar(
        image, ax=axes, label="error / all-pairs error\n(0.5: predicting the mean)", aspect=14, extend="max"
    )
    return figure


def _error_text(value: float | None, pairs: int | None = None) -> str:
    if value is None:
        return "no pairs" if pairs == 0 else "undefined"
    return f"{value:#.3g}" + ("" if pairs is None else f"\nn = {pairs:,}")


# --- sweep --------------------------------------------------------------------------------------------------


def sweep_overview(groups: Sequence[RankedGroup], *, metric: str = "balanced_accuracy") -> Figure:
    """Return mean and standard deviation of each configuration, with the chosen one of each condition marked.

    At most ``MAX_CONFIGURATIONS`` are drawn, the best.
    """
    shown = [group for group in groups if group["rank"] <= MAX_CONFIGURATIONS]
    names = _configuration_names(shown)
    width = 9 + 0.07 * max(0, max(map(len, names), default=0) - 50)  # wider for long names
    figure, (axes,) = grid(1, columns=1, width=width, height=0.27 * len(shown) + 1.5)
    for y, group in enumerate(shown):
        if group["baseline"] is not None:
            axes.vlines(group["baseline"], y - 0.5, y + 0.5, color=GREY, ls="--", lw=1.2)
        if group["mean"] is not None:
            marker = BEST if group["chosen"] else PRUNED if group["pruned"] else COMPLETE
            axes.errorbar(group["mean"], y, xerr=group["sd"], ls="", ms=5, capsize=3, **marker)
    axes.set_yticks(range(len(shown)), names, parse_math=False, fontsize=9)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"{FAMILIES.get(SAME_FAMILY.get(metric, metric), (metric, ''))[0]} (validation)", parse_math=False)
    axes.grid(axis="x", color=PALE, lw=0.6)
    some = f" (best {len(shown)} of {len(groups)})" if len(shown) < len(groups) else ""
    heading(axes, f"Mean ± SD over folds and replicates{some}")
    entries = [("best of its condition", Line2D([], [], ls="", **BEST))]
    if any(group["pruned"] for group in shown):
        entries.append(("pruned (best so far)", Line2D([], [], ls="", **PRUNED)))
    if any(group["baseline"] is not None for group in shown):
        entries.append(("baseline", Line2D([], [], color=GREY, ls="--")))
    axes_legend(axes, entries)
    return figure


def _configuration_names(groups: Sequence[RankedGroup]) -> list[str]:
    keys = varying([group["params"] for group in groups])
    conditions = len({group["condition"] for group in groups}) > 1
    names = []
    for group in groups:
        parts = [group["condition"]] if conditions else []
        parts += [settings(group["params"], keys)] if keys else []
        note = f"  ({group['n']} of {group['expected']})" if group["n"] < group["expected"] else ""
        if group["pruned"]:
            note = f"  (epoch {group['pruned']['epoch']})"
        names.append(drawable("  ".join(parts) or "the run", limit=100) + note)
    return names
