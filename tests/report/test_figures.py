"""Figures show exactly the given numbers, and names that look like formulas as plain text."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.decomposition import PCA

from modis_dist.metrics import ClassPredictions, classification
from modis_dist.report import drawing, figures
from modis_dist.report.drawing import CLASS_COLOURS, MODALITY_COLOURS, drawable
from modis_dist.study.selection import mark
from tests.report.test_tables import group

HOSTILE = ["$x^2$", "$\\frac{a}{", "_hidden", "a\x1b[31m\nb", "\U0001f600\u202e", "<img>", "x" * 90, "méthyl %s {0}"]


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


def panel(figure: Figure, title: str):
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    return panel


# --- files --------------------------------------------------------------------------------------------------


def small_figure(text: str = "x") -> Figure:
    figure, (axes,) = drawing.grid(1, columns=1, width=2, height=1)
    drawing.heading(axes, text)
    return figure


def test_a_saved_figure_is_a_private_png_of_the_drawn_size(tmp_path):
    path = tmp_path / "a.png"
    drawing.save(small_figure(), path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (200, 100)
        assert len(image.convert("L").getcolors()) > 2  # not blank
    assert path.stat().st_mode & 0o077 == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        drawing.save(small_figure(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    figure = small_figure()

    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", fails)
    with pytest.raises(OSError, match="no space"):
        drawing.save(figure, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_figures_need_no_pyplot():
    program = "import sys, modis_dist.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- loss curves --------------------------------------------------------------------------------------------

HISTORY = [
    {"epoch": 1, "train/kl/x": 5000.0, "train/kl/y": 4000.0, "train/adversarial_d": 0.7, "seconds": 3.0},
    {"epoch": 2, "train/kl/x": 50.0, "train/kl/y": 40.0, "train/adversarial_d": 0.6, "val/reconstruction_mse/x": 0.4},
    {"epoch": 3, "train/kl/x": 5.0, "train/kl/y": 4.0, "val/nmi": None, "train/reconstruction/x": 0.5},
]


def test_curves_hold_the_history_in_a_panel_per_family():
    figure = figures.loss_curves(HISTORY, best_epoch=2)
    kl = panel(figure, "KL").lines
    assert [line.get_xydata().tolist() for line in kl[:2]] == [
        [[1, 5000], [2, 50], [3, 5]],
        [[1, 4000], [2, 40], [3, 4]],
    ]
    assert panel(figure, "Adversarial").lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.6]]
    assert len(figure.axes) == 3  # neither seconds nor a term that is never defined


def test_training_and_validation_errors_share_a_panel_and_a_colour():
    lines = panel(figures.loss_curves(HISTORY), "Reconstruction").lines
    training, validation = sorted(lines, key=lambda line: len(line.get_linestyle()))
    assert training.get_xydata().tolist() == [[3, 0.5]]
    assert validation.get_xydata().tolist() == [[2, 0.4]]
    assert training.get_color() == validation.get_color() == MODALITY_COLOURS[0]
    assert (training.get_linestyle(), validation.get_linestyle()) == ("-", "--")


def test_a_family_over_two_decades_is_on_a_log_scale_and_others_are_not():
    figure = figures.loss_curves(HISTORY)
    assert panel(figure, "KL").get_yscale() == "log"
    assert panel(figure, "Adversarial").get_yscale() == "linear"


def test_the_best_epoch_is_marked_in_every_panel():
    figure = figures.loss_curves(HISTORY, best_epoch=2)
    assert [axes.lines[-1].get_xdata()[0] for axes in figure.axes] == [2, 2, 2]
    assert "best epoch (2)" in texts(figure)


def test_a_history_without_epochs_is_drawn_as_a_note():
    assert "no epochs recorded" in texts(figures.loss_curves([]))


# --- latent space -------------------------------------------------------------------------------------------


def latents() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    z = {m: draw.normal(size=(40, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32) for m in ("x", "y")}
    return z, {m: draw.integers(-1, 3, 40) for m in z}


def test_principal_components_are_scikit_learns_up_to_sign():
    z = np.concatenate(list(latents()[0].values()))
    scores, fraction = figures.principal_components(z)
    reference = PCA(2, svd_solver="full").fit(z.astype(np.float64))
    np.testing.assert_allclose(np.abs(scores), np.abs(reference.transform(z.astype(np.float64))), atol=1e-6)
    assert fraction == pytest.approx(reference.explained_variance_ratio_)


@pytest.mark.parametrize("shape", [(5, 1), (1, 4)])
def test_missing_components_are_0(shape):
    scores, fraction = figures.principal_components(np.ones(shape, np.float32))
    assert not scores.any() and fraction == (0, 0)


def test_every_latent_is_drawn_once_in_the_colour_of_its_class_and_of_its_modality():
    z, label = latents()
    figure = figures.latent_pca(z, label, ["a", "b", "c"])
    scores, _ = figures.principal_components(np.concatenate(list(z.values())))
    by_class = ["0.75" if k < 0 else CLASS_COLOURS[k] for k in np.concatenate(list(label.values()))]
    by_modality = [MODALITY_COLOURS[0]] * 40 + [MODALITY_COLOURS[1]] * 40
    for axes, colours in zip(figure.axes, (by_class, by_modality), strict=True):
        assert drawn(axes) == points_of(scores, matplotlib.colors.to_rgba_array(colours))


def drawn(axes) -> set:
    drawn_points = set()
    for points in axes.collections:
        xy = np.asarray(points.get_offsets())
        drawn_points |= points_of(xy, np.broadcast_to(points.get_facecolors(), (len(xy), 4)))
    return drawn_points


def points_of(xy: np.ndarray, colours: np.ndarray) -> set:
    rounded = np.round(np.hstack([xy, colours[:, :3]]), 6)
    return {tuple(row) for row in rounded.tolist()}


def test_more_classes_than_colours_get_other_markers():
    count = len(CLASS_COLOURS) + 2
    z = {"x": np.eye(count, dtype=np.float32)}
    axes = figures.latent_pca(z, {"x": np.arange(count)}, [f"c{k}" for k in range(count)]).axes[0]
    assert [len(points.get_offsets()) for points in axes.collections] == [len(CLASS_COLOURS), 2]
    handles = axes.get_legend().legend_handles
    assert len({(handle.get_marker(), str(handle.get_color())) for handle in handles}) == count


def test_of_very_many_latents_a_sample_is_drawn_and_the_title_gives_its_size(monkeypatch):
    monkeypatch.setattr(figures, "MAX_POINTS", 30)
    figure = figures.latent_pca(*latents(), ["a", "b", "c"])
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 30
    assert "(30 of 80 rows)" in figure.axes[0].get_title(loc="left")


# --- confusion ----------------------------------------------------------------------------------------------


def classification_scores() -> dict:
    parts = {
        "x": ClassPredictions(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])),
        "y": ClassPredictions(np.array([0, 2]), np.array([2, 2])),
    }
    return classification(parts, classes=["a", "b", "c"])


def test_confusion_panels_hold_shares_of_the_true_class_and_counts():
    figure = figures.confusion(classification_scores(), ["a", "b", "c"])
    pooled = panel(figure, "All")
    shares = pooled.get_images()[0].get_array()
    np.testing.assert_allclose(shares, [[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]])
    assert [text.get_text() for text in pooled.texts] == ["2", "1", "1", "", "1", "", "", "", "1"]
    absent = panel(figure, "y").get_images()[0].get_array()
    assert absent.mask[1].all()  # no row of class b in y
    assert "balanced accuracy 0.500, n = 2" in panel(figure, "y").get_title(loc="left")


def test_the_colour_of_a_count_contrasts_with_its_cell():
    axes = figures.confusion(classification_scores(), ["a", "b", "c"]).axes[0]
    assert [text.get_color() for text in axes.texts[4:6]] == ["white", "black"]  # shares 1 and 0


def test_many_classes_are_drawn_without_counts():
    many = [f"c{k}" for k in range(30)]
    result = classification({"x": ClassPredictions(np.arange(30), np.arange(30))}, classes=many)
    assert not figures.confusion(result, many).axes[0].texts


# --- translation --------------------------------------------------------------------------------------------

TRANSLATION = {
    "mse": {"x": {"x": 0.5, "y": 1.5}, "y": {"x": None, "y": 0.25}},
    "pairs": {"x": {"x": 9, "y": 1234}, "y": {"x": 0, "y": 8}},
    "all_pairs_baseline": {"x": 2.0, "y": 1.0},
}


def test_the_heat_map_compares_errors_with_the_baseline_of_the_decoded_modality():
    axes = figures.mse_heatmap(TRANSLATION).axes[0]
    shares = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    np.testing.assert_array_equal(shares, [[0.25, np.nan, np.nan], [1.5, 0.25, np.nan]])
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["0.500\nn = 9", "no pairs", "2.00", "1.50\nn = 1,234", "0.250\nn = 8", "1.00"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "all pairs"]


@pytest.mark.parametrize("baseline", [None, 0.0])
def test_an_error_without_a_usable_baseline_is_uncoloured(baseline):
    result = {"mse": {"x": {"x": 0.5}}, "pairs": {"x": {"x": 1}}, "all_pairs_baseline": {"x": baseline}}
    axes = figures.mse_heatmap(result).axes[0]
    assert axes.get_images()[0].get_array().mask.all()
    assert axes.texts[0].get_text() == "0.500\nn = 1"


# --- sweep --------------------------------------------------------------------------------------------------


def configuration(condition: str, lr: float, mean: float | None, *, n: int = 5, baseline: float | None = None) -> dict:
    sd = None if mean is None else 0.02
    return group(condition, lr, mean, n=n) | {"sd": sd, "baseline": baseline}


def overview(rows: Sequence[dict], *, metric: str = "balanced_accuracy") -> Figure:
    return figures.sweep_overview(mark(rows, metric=metric), metric=metric)


def test_configurations_show_mean_spread_baseline_and_what_is_missing():
    rows = [
        configuration("a", 1e-4, 0.7, baseline=0.6),
        configuration("a", 1e-3, 0.8, n=3, baseline=0.6),
        configuration("b", 1e-3, None, n=0),
    ]
    axes = overview(rows).axes[0]
    means = {tuple(line.get_xydata()[0]): line.get_marker() for line in axes.lines if line.get_marker() in "oD"}
    assert means == {(0.7, 0): "D", (0.8, 1): "o"}  # the second lacks a trial
    bars = [c.get_segments()[0].tolist() for c in axes.collections]
    assert [[0.68, 0], [0.72, 0]] in np.round(bars, 9).tolist()
    assert [[0.6, 0.5], [0.6, 1.5]] in bars
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["a  lr=0.0001", "a  lr=0.001  (3 of 5)", "b  lr=0.001  (0 of 5)"]


def test_a_pruned_configuration_is_hollow_named_with_its_epoch_and_not_the_best():
    rows = [configuration("a", 1e-4, 0.7), configuration("a", 1e-3, 0.9) | {"pruned": {"epoch": 20}}]
    figure = overview(rows)
    axes = figure.axes[0]
    drawn = {line.get_xdata()[0]: line for line in axes.lines if line.get_marker() in ("o", "D")}
    assert drawn[0.7].get_marker() == "D" and drawn[0.9].get_markerfacecolor() == "none"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lr=0.0001", "lr=0.001  (epoch 20)"]
    assert "pruned (best so far)" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_of_very_many_configurations_the_best_are_drawn(monkeypatch):
    monkeypatch.setattr(figures, "MAX_CONFIGURATIONS", 2)
    rows = [configuration("a", lr, mean) for lr, mean in ((1, 0.1), (2, None), (3, 0.9), (4, 0.5))]
    axes = overview(rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lr=3", "lr=4"]
    assert "(best 2 of 4)" in axes.get_title(loc="left")
    errors = overview(rows, metric="reconstruction_mse").axes[0]
    assert [label.get_text() for label in errors.get_yticklabels()] == ["lr=1", "lr=4"]


def test_a_single_run_and_no_run_can_be_drawn():
    single = configuration("a", 1e-3, 0.5) | {"params": {}, "sd": None, "n": 1, "expected": 1}
    assert [t.get_text() for t in overview([single]).axes[0].get_yticklabels()] == ["the run"]
    assert not overview([]).axes[0].get_yticklabels()


# --- names --------------------------------------------------------------------------------------------------


def hostile_figures() -> dict[str, Figure]:
    z = {name: np.random.default_rng(k).normal(size=(9, 3)).astype(np.float32) for k, name in enumerate(HOSTILE)}
    codes = {name: np.arange(9) % len(HOSTILE) for name in HOSTILE}
    result = classification({name: ClassPredictions(codes[name], codes[name]) for name in HOSTILE[:2]}, classes=HOSTILE)
    square = {a: dict.fromkeys(HOSTILE, 1.0) for a in HOSTILE}
    translated = {"mse": square, "pairs": square, "all_pairs_baseline": dict.fromkeys(HOSTILE, 2.0)}
    rows = [{**configuration(name, 1e-3, 0.5), "params": {name: name}} for name in HOSTILE]
    return {
        "loss_curves": figures.loss_curves([{"epoch": 1} | {f"train/kl/{name}": 1.0 for name in HOSTILE}]),
        "latent_pca": figures.latent_pca(z, codes, HOSTILE),
        "confusion": figures.confusion(result, HOSTILE),
        "mse_heatmap": figures.mse_heatmap(translated),
        "sweep_overview": overview(rows),
    }


def test_names_with_markup_are_drawn_literally(tmp_path):
    before = dict(matplotlib.rcParams)
    for name, figure in hostile_figures().items():
        drawing.save(figure, tmp_path / name)  # a formula or a missing glyph would warn or raise
        shown = texts(figure)
        for hostile in HOSTILE:
            assert any(drawable(hostile, limit=16) in text or drawable(hostile) in text for text in shown), name
        formulas = [text for text in figure.findobj(Text) if "x^2" in text.get_text() or "\\frac" in text.get_text()]
        assert formulas and not any(text.get_parse_math() for text in formulas)
    assert dict(matplotlib.rcParams) == before


def test_characters_missing_from_the_font_are_escaped():
    assert drawable("méthyl") == "méthyl"
    assert drawable("漢\u202e\x1b") == "\\u6f22\\u202e\\x1b"
    assert drawable("x" * 90) == "x" * 11 + "..." + "x" * 10


@pytest.mark.parametrize("metric", ["mean_modality_balanced_accuracy", "reconstruction_mse", "nmi"])
def test_the_axis_of_a_sweep_has_the_full_name_of_its_metric(metric: str) -> None:
    row = configuration("all", 1e-3, 0.5) | {"params": {}}
    (axes,) = overview([row], metric=metric).axes
    assert axes.get_xlabel() and "..." not in axes.get_xlabel()


def test_long_class_names_of_a_confusion_matrix_do_not_overlap() -> None:
    classes = ["adrenocortical carcinoma", "colon adenocarcinoma", "uveal melanoma"]
    codes = np.arange(3)
    figure = figures.confusion(classification({"m": ClassPredictions(codes, codes)}, classes=classes), classes)
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_long_names_with_a_common_prefix_stay_distinct():
    names = [drawable(f"proteome_of_the_discovery_cohort_{part}", limit=16) for part in ("plasma", "tissue")]
    assert names == ["proteom...plasma", "proteom...tissue"]


def test_each_figure_has_the_size_of_its_panels(tmp_path):
    z, label = latents()
    drawn = {
        "loss": figures.loss_curves(HISTORY, best_epoch=2),
        "pca": figures.latent_pca(z, label, ["a", "b", "c"]),
        "confusion": figures.confusion(classification_scores(), ["a", "b", "c"]),
        "mse": figures.mse_heatmap(TRANSLATION),
        "sweep": figures.sweep_overview(mark([configuration("a", 1e-4, 0.7)], metric="nmi")),
    }
    for name, figure in drawn.items():
        drawing.save(figure, tmp_path / name)
    assert {path.name: size_of(path) for path in tmp_path.iterdir()} == {
        "loss": (990, 240),
        "pca": (1280, 480),
        "confusion": (1140, 350),
        "mse": (710, 350),
        "sweep": (900, 177),
    }


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size
