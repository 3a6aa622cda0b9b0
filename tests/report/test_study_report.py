"""The report of a study, from its summary."""

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from modis_dist.metrics import ClassPredictions, classification
from modis_dist.report.study import (
    absent_table,
    class_table,
    metrics_table,
    modality_table,
    models,
    report,
    resumed_elsewhere,
    tables,
)
from modis_dist.report.tables import plain_rows
from modis_dist.report.terminal import show
from modis_dist.study.aggregate import details_over_replicates, metrics_over_replicates
from modis_dist.study.selection import mark
from tests.report.test_tables import group, scored

CLASSES = ["BRCA", "OV"]
HALF = {"a": {"a": 0.5, "b": None}, "b": {"a": 1.5, "b": 0.25}}


def replicate(*, hit: int, absent: bool = True) -> dict:
    """Return the result of a refit, one of whose predictions is ``hit``; OV has no training row in b."""
    parts: dict[str, ClassPredictions] = {"a": scored((0, 0), (1, 1)), "b": scored((0, 0), (1, hit))}
    scores = classification(parts, classes=CLASSES, absent_pairs=[("OV", "b")] if absent else [])
    probe = {"logistic_regression": 0.75, "knn": 1.0, "perfect": 0.5}
    translation = {"mse": HALF, "all_pairs_baseline": {"a": 2.0, "b": 1.0}}
    return {
        "evaluation": {"classification": scores, "translation": translation, "probe": probe},
        "baseline": classification({name: scored((0, 0), (1, 0)) for name in parts}, classes=CLASSES),
    }


def condition(name: str, *, absent: bool = True) -> dict:
    results = [replicate(hit=1, absent=absent), replicate(hit=0, absent=absent)]
    test, baseline, probe = metrics_over_replicates(results)
    metrics = {"test": test, "baseline": baseline, "probe": probe, "details": details_over_replicates(results)}
    model = {"condition": name, "params": {"objective.beta": 1e-4}, "seed": 3, "folder": f"trials/{name}"}
    return {"condition": name, **metrics, "model": model}


def summary(*conditions: dict, groups: Sequence[dict] = ()) -> dict:
    model = next((condition["model"] for condition in conditions if condition["model"]), None)
    marked = mark(groups, metric="nmi")
    return {
        "study": "s_1",
        "metric": "nmi",
        "conditions": list(conditions),
        "groups": marked,
        "model": model,
        "changes": {},
    }


UNTESTED = {"condition": "lost", "test": None, "baseline": None, "probe": None, "details": None, "model": None}


def test_every_test_metric_is_listed_with_the_baseline_its_spread_and_count():
    header, model, baseline = plain_rows(metrics_table([condition("few")]))
    assert header[2:] == [
        "balanced accuracy", "mean modality balanced accuracy", "macro F1", "NMI", "ARI", "n",
    ]  # fmt: skip
    # Pooled recall of OV is 2/2 and 1/2, so the balanced accuracies are 1 and 3/4: mean 7/8, sd (1/4) / sqrt(2).
    assert model[:4] == ["few", "MODIS", "0.875 ± 0.177", "0.875 ± 0.177"] and model[-1] == "2"
    # Macro F1 of the second: BRCA 2*2/(2+3), OV 2*1/(2+1); mean with 1 is 0.8667.
    assert model[4] == "0.867 ± 0.189"
    assert baseline == ["few", "baseline", "0.500 ± 0.000", "0.500 ± 0.000", "0.333 ± 0.000", "0.000 ± 0.000",
                      "0.000 ± 0.000", "2"]  # fmt: skip


def test_recall_and_precision_of_every_class_are_starred_if_absent_in_training():
    header, brca, ov = plain_rows(class_table(condition("few")["details"]))
    assert header == ["class", "precision", "recall", "recall a", "recall b", "n"]
    assert brca == ["BRCA", "0.833 ± 0.236", "1.000 ± 0.000", "1.000 ± 0.000", "1.000 ± 0.000", "2"]
    assert ov == ["OV", "1.000 ± 0.000", "0.750 ± 0.354", "1.000 ± 0.000", "* 0.500 ± 0.707", "2"]


def test_recall_on_absent_pairs():
    assert plain_rows(absent_table({"few": condition("few")["details"]}))[1:] == [
        ["few", "OV", "b", "0.500 ± 0.707", "2"]
    ]


def test_modalities_beside_the_baseline():
    assert plain_rows(modality_table([condition("few")])) == [
        ["condition", "model", "a", "b", "n"],
        ["few", "MODIS", "1.000 ± 0.000", "0.750 ± 0.354", "2"],
        ["few", "baseline", "0.500 ± 0.000", "0.500 ± 0.000", "2"],
    ]


def test_a_condition_without_a_baseline_has_dashes_in_its_row():
    lines = plain_rows(modality_table([condition("few") | {"baseline": None}]))
    assert lines[2] == ["few", "baseline", "-", "-", "0"]


def test_a_terminal_gets_the_short_tables_and_absent_pairs_only_if_there_are_any():
    groups = [group("few", 1e-4, 0.8)]

    def short(*conditions: dict) -> list[str]:
        return [
            " ".join(map(str, plain_rows(table)[0][:2])) for _, table in tables(summary(*conditions, groups=groups))
        ]

    search, comparison, modalities, errors = (
        "condition parameters", "condition balanced accuracy", "condition model", "decoded as from a",
    )  # fmt: skip
    assert short(condition("few", absent=False), UNTESTED) == [search, comparison, modalities, errors]
    assert short(condition("few")) == [search, comparison, modalities, errors, "condition class"]
    assert short(UNTESTED) == [search]


def test_the_report_has_every_table_and_conditions_by_name():
    text = report(summary(condition("few"), UNTESTED, condition("all_of"), groups=[group("few", 1e-4, 0.8)]))
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0] == "# s\\_1" and len(headings) == 1 + 5 + 3
    assert [heading.rpartition(": ")[2] for heading in headings[-2:]] == ["few", "all\\_of"]
    assert "| few | b | - | 0.250 | 1.00 |" in text  # decoded as b: no pairs from a, itself, the all-pairs baseline
    assert "lost" not in text


def test_a_repeated_note_is_written_once():
    text = report(summary(condition("few"), condition("all"), groups=[group("few", 1e-4, 0.8) | {"probe": 0.5}]))
    for term in ("baseline", "gain", "modality probe", "all pairs", "n"):
        assert sum(line.startswith(f"{term}: ") for line in text.splitlines()) == (2 if term == "n" else 1), term


def test_the_delivered_model_is_named_and_so_are_the_folders_of_other_conditions():
    delivered, other = models(summary(condition("few"), UNTESTED, condition("all_of")))
    assert "model" in delivered and delivered.endswith("condition few, beta=0.0001, seed 3.")
    assert "condition all_of, beta=0.0001, seed 3" in other and other.endswith("trials/all_of.")


def test_a_study_of_one_condition_does_not_name_it():
    (line,) = models(summary(condition("all")))
    assert line.endswith("of beta=0.0001, seed 3.") and line in report(summary(condition("all"))).replace("\\", "")


def test_a_study_without_a_test_shows_only_the_search():
    text = report(summary(UNTESTED, groups=[group("lost", 1e-4, None, n=0)]))
    assert text.count("\n## ") == 1 and models(summary(UNTESTED)) == []


@pytest.mark.parametrize("name", ["[red]x[/red]", "\x1b[31m"])
def test_a_hostile_condition_is_text_in_titles_and_cells(name):
    stream = io.StringIO()
    show(tables(summary(condition(name))), Console(file=stream, width=200, color_system=None))
    assert "\x1b" not in stream.getvalue()
    assert ("[red]x[/red]" if "red" in name else "\\x1b[31m") in stream.getvalue()
    assert "\x1b" not in report(summary(condition(name)))


def test_trainings_that_resumed_on_other_hardware_are_counted_and_the_changes_named():
    changes = ["model Slow 1, now Fast 2"]
    assert resumed_elsewhere(summary()) == []
    (line,) = resumed_elsewhere(summary() | {"changes": {"a": changes, "b": changes}})
    assert line.startswith("2 trainings ") and "(model Slow 1, now Fast 2)" in line and "summary.json" in line
    assert line in report(summary() | {"changes": {"a": changes, "b": changes}})
