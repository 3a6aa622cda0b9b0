"""The report of a study, from the summary that the sweep writes."""

import io

import pytest
from rich.console import Console

from modis_dist.metrics import Scored, classification
from modis_dist.report.study import absent_table, class_table, continued, figures_table, modality_table, report, tables
from modis_dist.report.tables import plain_rows
from modis_dist.report.terminal import show
from modis_dist.study.aggregate import figures_of_baseline, figures_on_test
from modis_dist.study.selection import mark
from tests.report.test_tables import group, scored

CLASSES = ["BRCA", "OV"]
HALF = {"a": {"a": 0.5, "b": None}, "b": {"a": 1.5, "b": 0.25}}


def replicate(*, hit: int, absent: bool = True) -> dict:
    """A result of a refit, one of whose predictions is ``hit``; OV has no training row in b."""
    parts: dict[str, Scored] = {"a": scored((0, 0), (1, 1)), "b": scored((0, 0), (1, hit))}
    judged = classification(parts, classes=CLASSES, absent_pairs=[("OV", "b")] if absent else [])
    probe = {"logistic_regression": 0.75, "knn": 1.0, "perfect": 0.5}
    translation = {"mse": HALF, "all_pairs_baseline": {"a": 2.0, "b": 1.0}}
    return {
        "evaluation": {"classification": judged, "translation": translation, "probe": probe},
        "baseline": classification({name: scored((0, 0), (1, 0)) for name in parts}, classes=CLASSES),
    }


def condition(name: str, *, absent: bool = True) -> dict:
    results = [replicate(hit=1, absent=absent), replicate(hit=0, absent=absent)]
    figures = {"test": figures_on_test(results), "baseline": figures_of_baseline(results)}
    model = {"condition": name, "params": {"objective.beta": 1e-4}, "seed": 3, "folder": f"trials/{name}"}
    return {"condition": name, **figures, "model": model}


def summary(*conditions: dict) -> dict:
    model = next((one["model"] for one in conditions if one["model"]), None)
    return {"study": "s_1", "conditions": list(conditions), "model": model, "changes": {}}


UNTESTED = {"condition": "lost", "test": None, "baseline": None, "model": None}


def test_every_test_figure_stands_beside_the_baseline_with_spread_and_count():
    header, ours, theirs = plain_rows(figures_table([condition("few")]))
    assert header[2:] == [
        "balanced accuracy", "mean modality balanced accuracy", "macro F1", "NMI", "ARI", "n",
    ]  # fmt: skip
    # Pooled recall of OV is 2/2 and 1/2, so the balanced accuracies are 1 and 3/4: mean 7/8, sd (1/4) / sqrt(2).
    assert ours[:4] == ["few", "MODIS", "0.875 ± 0.177", "0.875 ± 0.177"] and ours[-1] == "2"
    # Macro F1 of the second: BRCA 2*2/(2+3), OV 2*1/(2+1); mean with 1 is 0.8667.
    assert ours[4] == "0.867 ± 0.189"
    assert theirs == ["few", "baseline", "0.500 ± 0.000", "0.500 ± 0.000", "0.333 ± 0.000", "0.000 ± 0.000",
                      "0.000 ± 0.000", "2"]  # fmt: skip


def test_recall_and_precision_of_every_class_with_a_star_where_training_had_no_row():
    header, brca, ov = plain_rows(class_table(condition("few")["test"]))
    assert header == ["class", "precision", "recall", "recall a", "recall b", "n"]
    assert brca == ["BRCA", "0.833 ± 0.236", "1.000 ± 0.000", "1.000 ± 0.000", "1.000 ± 0.000", "2"]
    assert ov == ["OV", "1.000 ± 0.000", "0.750 ± 0.354", "1.000 ± 0.000", "* 0.500 ± 0.707", "2"]


def test_recall_on_absent_pairs():
    assert plain_rows(absent_table([condition("few")]))[1:] == [["few", "OV", "b", "0.500 ± 0.707", "2"]]


def test_modalities_beside_the_baseline():
    assert plain_rows(modality_table([condition("few")])) == [
        ["condition", "model", "a", "b", "n"],
        ["few", "MODIS", "1.000 ± 0.000", "0.750 ± 0.354", "2"],
        ["few", "baseline", "0.500 ± 0.000", "0.500 ± 0.000", "2"],
    ]


def test_a_condition_without_a_baseline_has_dashes_in_its_line():
    lines = plain_rows(modality_table([condition("few") | {"baseline": None}]))
    assert lines[2] == ["few", "baseline", "-", "-", "0"]


def test_a_terminal_gets_the_short_tables_and_absent_pairs_only_where_there_are_any():
    groups = mark([group("few", 1e-4, 0.8)], metric="nmi")
    short = ["Search", "Chosen", "Test balanced accuracy", "Test error"]

    def titles(*conditions: dict) -> list[str]:
        return [title for title, _ in tables(summary(*conditions), groups, metric="nmi")]

    found = titles(condition("few", absent=False), UNTESTED)
    assert all(title.startswith(begin) for title, begin in zip(found, short, strict=True))
    assert titles(condition("few"))[4:] == ["Test recall of pairs absent in training"]
    assert titles(UNTESTED) == ["Search, on validation rows"]


def test_the_report_has_every_table_and_conditions_by_name():
    text = report(
        summary(condition("few"), UNTESTED, condition("all_of")),
        mark([group("few", 1e-4, 0.8)], metric="nmi"),
        metric="nmi",
    )
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0] == "# s\\_1"
    assert headings[-3:] == [
        "## All test figures",
        "## Test figures by class: few",
        "## Test figures by class: all\\_of",
    ]
    assert "| few | b | - | 0.250 | 1.00 |" in text  # decoded as b: no pairs from a, itself, the all-pairs baseline
    assert "lost" not in text
    assert "The folder model holds the model of condition few, beta=0.0001, seed 3." in text
    assert "The model of condition all\\_of, beta=0.0001, seed 3 is in trials/all\\_of." in text


def test_a_study_of_one_condition_does_not_name_it():
    text = report(summary(condition("all")), mark([group("all", 1e-4, 0.8)], metric="nmi"), metric="nmi")
    assert "The folder model holds the model of beta=0.0001, seed 3." in text


def test_a_study_that_tested_nothing_has_the_search_only():
    text = report(summary(UNTESTED), mark([group("lost", 1e-4, None, n=0)], metric="nmi"), metric="nmi")
    assert text.count("\n## ") == 1


@pytest.mark.parametrize("name", ["[red]x[/red]", "\x1b[31m"])
def test_a_hostile_condition_is_text_in_titles_and_cells(name):
    stream = io.StringIO()
    show(tables(summary(condition(name)), [], metric="nmi"), Console(file=stream, width=200, color_system=None))
    assert "\x1b" not in stream.getvalue()
    assert ("[red]x[/red]" if "red" in name else "\\x1b[31m") in stream.getvalue()
    assert "\x1b" not in report(summary(condition(name)), [], metric="nmi")


def test_trainings_that_went_on_upon_other_hardware_are_counted_and_what_changed_is_named():
    assert continued(summary()) == []
    (line,) = continued(summary() | {"changes": {"a": ["model Slow 1, now Fast 2"], "b": ["model Slow 1, now Fast 2"]}})
    assert line.startswith("2 trainings went on") and "(model Slow 1, now Fast 2); summary.json" in line
